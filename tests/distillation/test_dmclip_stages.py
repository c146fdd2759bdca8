"""Reinforced training: shards and a DM-CLIP from nothing, the same after a kill, from shards that others wrote,
refused where they do not fit.
"""

import json
import logging
import shutil
import tarfile
import textwrap

import pytest
import torch
import yaml
from fixtures.processes import run_forked
from fixtures.training import equal, run, weights
from PIL import Image
from transformers import AutoTokenizer

from modeling_dclip import DCLIPProcessor, DMCLIPModel, DMCLIPTextModel
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.captions.parts import read_trained_images
from modeling_dclip.data.columns import image_keys
from modeling_dclip.data.files import holding
from modeling_dclip.distillation import arguments as reinforced_arguments
from modeling_dclip.distillation import dmclip as reinforced_stages
from modeling_dclip.distillation.arguments import DMCLIPArguments
from modeling_dclip.distillation.checkpoints import last_checkpoint
from modeling_dclip.distillation.dmclip import build_dmclip, find_image_size
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.run import SharedData
from modeling_dclip.distillation.stages import run_stages
from modeling_dclip.distillation.trainer import cast_weights
from modeling_dclip.encoders.loading import stored_dtype

STEPS = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": 4}
DMCLIP = {
    "image_size": 32,
    "vision_config": {"stem_dim": 4, "hidden_size": 4, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "projection_dim": 8,
    "teacher_logit_scale": 100.0,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_steps": 5,
    **STEPS,
}


def write_recipe(folder, clip, dmclip=(), reinforce=(), **changes):
    teachers = {"teachers": [str(clip), str(clip)], "synthetic_captions": "coarse_caption"}
    fields = {
        "output_dir": str(folder / "run"),
        "clip_model": str(clip),
        "train_datasets": ["scenes:train,n=13,image_size=40,captions_per_image=2"],
        "reinforce": {**teachers, "augmentations": 2, "samples_per_shard": 5, **dict(reinforce)},
        "dmclip": {**DMCLIP, **dict(dmclip)},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in fields.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def finished(tiny_clip_dir, tmp_path_factory):
    """Shards of 13 images in three files, two teachers of width 16, and a DM-CLIP after five steps;
    three batches are an epoch.
    """
    folder = tmp_path_factory.mktemp("finished")
    run(write_recipe(folder, tiny_clip_dir))
    return folder


@pytest.fixture(scope="module")
def shards(finished):
    return finished / "run" / "reinforce" / "shards"


def test_the_model_says_which_images_the_shards_are_of(finished):
    keys = image_keys(load_captions("scenes:train,n=14,image_size=40,captions_per_image=2"))
    for stage in ("reinforce", "dmclip"):
        trained = read_trained_images(finished / "run" / stage)
        assert trained.describe_overlap(keys).startswith("13 of the 14 test images trained this model")


@pytest.fixture
def foreign(shards, tmp_path):
    """The same shards as others would hand them on: without an index."""
    for path in shards.glob("*.tar"):
        shutil.copy(path, tmp_path / path.name)
    return f"{tmp_path}/*.tar"


def logs(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log for log in history if "loss" in log]


def test_a_run_from_nothing_makes_shards_and_a_model_that_loads(finished, shards):
    index = json.loads((shards / "reinforced.json").read_text())
    assert [one["width"] for one in index["teachers"]] == [16, 16]
    assert sum(one["samples"] for one in index["shards"]) == 13 and index["settings"]["image_size"] == 32
    model = DMCLIPModel.from_pretrained(finished / "run" / "dmclip").eval()
    assert model.config.vision_config.window_sizes[2:] == (2, 1)  # divide the maps of 32 pixels: no place is padded
    processor = DCLIPProcessor.from_pretrained(finished / "run" / "dmclip")
    assert processor.image_processor.crop_size["height"] == 32
    tokens = processor(text=["a red circle"], return_tensors="pt")
    assert model.get_text_features(**tokens).pooler_output.shape == (1, 8)
    arguments = yaml.safe_load((finished / "run" / "dmclip" / "arguments.yaml").read_text())
    assert arguments["dmclip"]["distillation_loss_weight"] == 0.75 and arguments["reinforce"]["augmentations"] == 2
    assert not (finished / "run" / "student").exists() and not (finished / "run" / "targets").exists()


def test_a_model_that_goes_on_from_float16_weights_is_saved_in_float16(finished, shards, tiny_clip_dir, tmp_path):
    start = DMCLIPModel.from_pretrained(finished / "run" / "dmclip")
    start.save_pretrained(tmp_path / "start", state_dict=cast_weights(start.state_dict(), "float16"))
    DCLIPProcessor.from_pretrained(finished / "run" / "dmclip").save_pretrained(tmp_path / "start")
    section = {"model": str(tmp_path / "start"), "train_shards": str(shards), "max_steps": 2}
    section |= dict.fromkeys(("image_size", "projection_dim"), None) | dict.fromkeys(
        ("vision_config", "text_config"), {}
    )
    path, saved = write_recipe(tmp_path, tiny_clip_dir, section), {}
    for name, words in (("auto", ()), ("float32", ("--dmclip.save_dtype", "float32"))):
        out = run(path, "--stages", "dmclip", "--output_dir", str(tmp_path / name), *words)
        saved[name] = weights(out / "dmclip")
        assert (
            json.loads((out / "dmclip" / "config.json").read_text())["dtype"] == ("float16", "float32")[len(words) > 0]
        )
    assert equal(saved["auto"], cast_weights(saved["float32"], "float16"))
    kept = {name.rpartition(".")[2] for name, one in saved["auto"].items() if one.dtype == torch.float32}
    assert kept == {"A_log", "D", "logit_scale"}
    assert {one.dtype for one in saved["auto"].values()} == {torch.float16, torch.float32, torch.int64}
    assert stored_dtype(out / "dmclip") == "float32" and stored_dtype(tmp_path / "auto" / "dmclip") == "float16"


@pytest.mark.parametrize(("text", "expected"), [("float16", "float16"), ("float32", "float32"), (None, "float32")])
def test_a_model_around_towers_has_their_type_only_if_both_share_it(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(reinforced_stages, "stored_dtype", lambda path: path)
    args = DMCLIPArguments(output_dir="x", use_cpu=True, vision_model="float16", text_model=text)
    assert reinforced_stages.find_dtype(args) == expected
    args.save_dtype = "bfloat16"
    assert reinforced_stages.find_dtype(args) == "bfloat16"
    args = DMCLIPArguments(output_dir="x", use_cpu=True)
    assert reinforced_stages.find_dtype(args) == "float32"


def test_the_loss_is_the_weighted_sum_of_four_logged_terms(finished):
    for log in logs(finished / "run" / "dmclip"):
        total = sum(
            weight * log[f"{text}{kind}_loss"]
            for text in ("", "synthetic_")
            for kind, weight in (("contrastive", 0.25), ("distillation", 0.75))
        )
        assert log["loss"] == pytest.approx(total, rel=1e-3)
    assert [log["epoch"] for log in logs(finished / "run" / "dmclip")] == pytest.approx(
        [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], abs=1e-3
    )


def test_finished_stages_are_skipped_and_changed_ones_refused(finished, caplog):
    with caplog.at_level(logging.INFO):
        run(finished / "recipe.yaml", "--dmclip.logging_steps", "3", "--reinforce.batch_size", "2")
    assert "reinforce: already finished" in caplog.text and "dmclip: already finished" in caplog.text
    with pytest.raises(ValueError, match="arguments.distillation_loss_weight: 0.75 -> 0.5"):
        run(finished / "recipe.yaml", "--dmclip.distillation_loss_weight", "0.5")
    with pytest.raises(ValueError, match="arguments.augmentations: 2 -> 3"):
        run(finished / "recipe.yaml", "--reinforce.augmentations", "3")


def test_shards_that_another_run_writes_are_neither_deleted_nor_written(tiny_clip_dir, tmp_path):
    shared = tmp_path / "shared"
    recipe = write_recipe(tmp_path, tiny_clip_dir, reinforce={"folder": str(shared)}, stages=["reinforce"])
    run(recipe)
    before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    changed = ("--reinforce.augmentations", "1", "--overwrite", "true")
    with holding(shared):
        with pytest.raises(OSError, match=f"'{shared}' is in use by another run"):
            run(recipe, *changed)
        run(recipe)  # what is finished is read
    assert {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()} == before
    run(recipe, *changed)
    assert json.loads((shared / "shards" / "reinforced.json").read_text())["settings"]["augmentations"] == 1
    assert not list(shared.glob("*.lock")) and not list(shared.glob(".*.lock"))


def test_arms_and_seeds_share_one_set_of_shards(tiny_clip_dir, tmp_path, caplog, monkeypatch):
    arms = {"contrastive": {"dmclip": {"contrastive_loss_weight": 1, "distillation_loss_weight": 0}}}
    arms["distilled"] = {"dmclip": {"contrastive_loss_weight": 0, "distillation_loss_weight": 1}}
    path = write_recipe(tmp_path, tiny_clip_dir, {"max_steps": 1}, arms=arms, seeds=[0, 1])
    runs, shared, loaded = expand_arms(parse_recipe([], path)), SharedData(), []
    build = reinforced_stages.build_teacher
    monkeypatch.setattr(
        reinforced_stages, "build_teacher", lambda spec, device: loaded.append(spec) or build(spec, device)
    )
    with caplog.at_level(logging.INFO):
        for one in runs:
            run_stages(one.recipe, shared)
    assert loaded == [str(tiny_clip_dir)]  # by the first of four runs, though it is named twice
    assert caplog.text.count("reinforce: wrote") == 1 and caplog.text.count("reinforce: already finished") == 3
    assert [folder.name for folder in tmp_path.rglob("shards")] == ["shards"]
    (contrastive,), (distilled,) = (logs(tmp_path / "run" / arm / "seed-0" / "dmclip") for arm in arms)
    assert {
        "contrastive_loss",
        "synthetic_contrastive_loss",
    } <= contrastive.keys() and "distillation_loss" not in contrastive
    assert {
        "distillation_loss",
        "synthetic_distillation_loss",
    } <= distilled.keys() and "contrastive_loss" not in distilled
    seeds = [weights(tmp_path / "run" / "distilled" / f"seed-{seed}" / "dmclip") for seed in (0, 1)]
    assert not equal(*seeds)


KILLED = textwrap.dedent(
    """
    import os, sys
    from modeling_dclip.distillation.trainer import DMCLIPTrainer
    from modeling_dclip.distillation.recipes import parse_recipe
    from modeling_dclip.distillation.stages import run_stages

    recipe, steps = sys.argv[1], int(sys.argv[2])
    taken, training_step = [], DMCLIPTrainer.training_step
    def step_and_die(*args, **kwargs):
        if len(taken) == steps:
            os.kill(os.getpid(), 9)
        taken.append(1)
        return training_step(*args, **kwargs)
    DMCLIPTrainer.training_step = step_and_die
    run_stages(parse_recipe([], recipe))
    """
)


def test_a_run_killed_in_mid_epoch_goes_on_with_the_same_samples_and_ends_with_the_same_weights(
    tiny_clip_dir, shards, tmp_path
):
    changes = {"save_steps": 2, "max_steps": 7, "train_shards": str(shards)}
    changes["vision_config"] = {
        **DMCLIP["vision_config"],
        "drop_path_rate": 0.5,
    }  # draws from torch's generator in every step
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(write_recipe(tmp_path / "whole", tiny_clip_dir, changes))
    path = write_recipe(tmp_path / "killed", tiny_clip_dir, changes)
    (killed,) = run_forked(KILLED, path, 5)
    assert killed.returncode == -9, killed.stderr[-3000:]
    folder = tmp_path / "killed" / "run" / "dmclip"
    assert last_checkpoint(folder).endswith("checkpoint-4")  # the second batch of the second epoch comes next
    run(path)
    whole = tmp_path / "whole" / "run" / "dmclip"
    fields = ("loss", "contrastive_loss", "synthetic_distillation_loss", "epoch", "grad_norm")
    assert [[log[name] for name in fields] for log in logs(folder)] == [
        [log[name] for name in fields] for log in logs(whole)
    ]
    assert len(logs(whole)) == 7 and equal(weights(folder), weights(whole))


def test_shards_that_others_wrote_train_the_same_model(finished, foreign, tiny_clip_dir, tmp_path):
    path = write_recipe(
        tmp_path, tiny_clip_dir, {"train_shards": foreign, "teacher_widths": [16, 16]}, reinforce={"teachers": []}
    )
    run(path)
    assert not (tmp_path / "run" / "reinforce").exists()
    assert equal(weights(tmp_path / "run" / "dmclip"), weights(finished / "run" / "dmclip"))


def test_samples_to_see_become_steps(tiny_clip_dir, tmp_path):
    words = ["--dmclip.max_steps", "-1", "--dmclip.train_samples", "6000", "--dmclip.gradient_accumulation_steps", "3"]
    assert parse_recipe(words, write_recipe(tmp_path, tiny_clip_dir)).dmclip.max_steps == 500
    with pytest.raises(ValueError, match="train_samples or max_steps, got both"):
        parse_recipe(words[2:], write_recipe(tmp_path, tiny_clip_dir))


def test_a_pretrained_text_tower_stays_as_it_is_where_it_is_frozen(finished, shards, tiny_clip_dir, tmp_path):
    source = finished / "run" / "dmclip"
    changes = {
        "train_shards": str(shards),
        "text_model": str(source),
        "text_config": None,
        "freeze_text": True,
        "max_steps": 2,
    }
    changes = {name: value for name, value in {**DMCLIP, **changes}.items() if value is not None}
    path = write_recipe(tmp_path, tiny_clip_dir)
    fields = yaml.safe_load(path.read_text()) | {"dmclip": changes}
    path.write_text(yaml.safe_dump(fields))
    run(path)
    text = DMCLIPTextModel.from_pretrained(source).state_dict()
    trained = DMCLIPModel.from_pretrained(tmp_path / "run" / "dmclip")
    assert trained.config.freeze_text and equal(trained.text_model.state_dict(), text)
    assert not equal(trained.vision_model.state_dict(), DMCLIPModel.from_pretrained(source).vision_model.state_dict())


def test_a_checkpoint_trains_on_at_another_size(finished, shards, tiny_clip_dir, tmp_path):
    source = finished / "run" / "dmclip"
    fields = yaml.safe_load(write_recipe(tmp_path, tiny_clip_dir).read_text())
    fields["dmclip"] = {
        "model": str(source),
        "train_shards": str(shards),
        "image_size": 64,
        "max_steps": 1,
        "learning_rate": 0.0,
        **STEPS,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    run(tmp_path / "recipe.yaml")
    before, after = weights(source), weights(tmp_path / "run" / "dmclip")
    for name in before:
        assert torch.equal(before[name], after[name]) or "norm" in name, name  # BatchNorm's statistics follow the data
    config = DMCLIPModel.from_pretrained(tmp_path / "run" / "dmclip").config.vision_config
    assert config.image_size == 64 and config.window_sizes[2:] == (2, 1)


@pytest.fixture
def grey(finished, tmp_path):
    """The trained model with a normalisation of its own, as converted weights may have."""
    processor = DCLIPProcessor.from_pretrained(finished / "run" / "dmclip")
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.0] * 3, [1.0] * 3
    DMCLIPModel.from_pretrained(finished / "run" / "dmclip").save_pretrained(tmp_path / "grey")
    processor.save_pretrained(tmp_path / "grey")
    return str(tmp_path / "grey")


@pytest.mark.parametrize(("asked", "side"), [({}, 32), ({"image_size": 64}, 64)])
def test_a_checkpoint_keeps_its_size_width_and_normalisation_unless_another_size_is_asked_for(grey, asked, side):
    args = DMCLIPArguments(output_dir="x", model=grey, use_cpu=True, **asked)
    model, processor = build_dmclip(args, AutoTokenizer.from_pretrained(grey))
    assert model.config.vision_config.image_size == find_image_size(args) == side
    assert model.config.projection_dim == 8
    kept = processor.image_processor
    assert (kept.crop_size["height"], kept.size["shortest_edge"]) == (side, side)
    assert (list(kept.image_mean), list(kept.image_std)) == ([0.0] * 3, [1.0] * 3)
    image = Image.new("RGB", (80, 80), (255, 0, 0))
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, side, side) and pixels.unique().tolist() == [0.0, 1.0]


def test_what_contradicts_a_checkpoint_is_refused(grey):
    tokenizer = AutoTokenizer.from_pretrained(grey)
    for named in ("model", "text_model"):
        args = DMCLIPArguments(output_dir="x", use_cpu=True, projection_dim=16, **{named: grey})
        with pytest.raises(ValueError, match=f"projection_dim: expected 8, as {named} .* has it, got 16"):
            build_dmclip(args, tokenizer)
    with pytest.raises(ValueError, match="a checkpoint to go on from .* preset"):
        DMCLIPArguments(output_dir="x", use_cpu=True, model=grey, preset="B")
    made = DMCLIPArguments(output_dir="x", use_cpu=True)
    assert (made.preset, made.image_size, made.projection_dim) == ("T", 256, 512)


def test_a_device_without_bfloat16_is_told_once(tiny_clip_dir, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reinforced_arguments, "is_torch_bf16_gpu_available", lambda: False)
    logging.Logger.warning_once.cache_clear()
    path = write_recipe(tmp_path, tiny_clip_dir, {"bf16": True, "use_cpu": False})
    recipes = [parse_recipe([], path) for _ in range(3)]
    assert caplog.text.count("no device with bfloat16 here") == 1 and not any(one.dmclip.bf16 for one in recipes)


def test_widths_that_are_not_the_teachers_are_told(shards, foreign, tiny_clip_dir, tmp_path):
    def train(**changes):
        run(write_recipe(tmp_path, tiny_clip_dir, changes))

    with pytest.raises(ValueError, match=r"teacher_widths: expected \[16, 16\], as the index .* got \[768, 768\]"):
        train(train_shards=str(shards), teacher_widths=[768, 768])
    assert not (tmp_path / "run").exists()  # nothing is claimed for what cannot begin
    with pytest.raises(ValueError, match="0000.*image_emb.*expected the shape .*1536.*got .*32"):
        train(train_shards=foreign, teacher_widths=[768, 768])
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="teacher_widths.*768, 768"):
        train(train_shards=foreign)


def test_synthetic_captions_that_are_not_there_are_told(tiny_clip_dir, tmp_path):
    path = write_recipe(tmp_path, tiny_clip_dir, {"max_steps": 1}, reinforce={"synthetic_captions": None})
    run(path)  # without a word about them: real captions only
    (log,) = logs(tmp_path / "run" / "dmclip")
    assert "distillation_loss" in log and "synthetic_distillation_loss" not in log
    words = ["--dmclip.synthetic_captions", "true", "--dmclip.train_shards", str(tmp_path / "run/reinforce/shards")]
    with pytest.raises(ValueError, match="expected synthetic captions in .* got none"):
        run(path, *words, "--output_dir", str(tmp_path / "asked"))
    words[-1] += "/*.tar"
    with pytest.raises(ValueError, match="sample .*syn.json.*expected synthetic captions, got none"):
        run(path, *words, "--dmclip.teacher_widths", "16", "16", "--output_dir", str(tmp_path / "foreign"))
    with pytest.raises(ValueError, match="column 'nowhere'"):
        run(path, "--reinforce.synthetic_captions", "nowhere", "--output_dir", str(tmp_path / "column"))


def test_a_captioner_writes_what_no_column_holds(tiny_clip_dir, tmp_path, monkeypatch):
    class Captioner:
        name, fingerprint = "tiny", "tiny"

        def __init__(self, name, *, captions, seed, device):
            self.captions = [f"caption {number} of {name}" for number in range(captions)]

        def __call__(self, images, lot=0):
            return [self.captions for _ in images]

    monkeypatch.setattr(reinforced_stages, "TransformersCaptioner", Captioner)
    written = {"captioner": "tiny", "captions_per_image": 3, "synthetic_captions": None}
    run(write_recipe(tmp_path, tiny_clip_dir, {"max_steps": 1}, reinforce=written))
    with tarfile.open(next((tmp_path / "run" / "reinforce" / "shards").glob("*.tar"))) as tar:
        members = [member for member in tar if member.name.endswith("syn.json")]
        stored = json.loads(tar.extractfile(members[0]).read())
    assert stored == {"syn_text": [f"caption {number} of tiny" for number in range(3)]}
    assert "synthetic_distillation_loss" in logs(tmp_path / "run" / "dmclip")[0]


def test_an_empty_shard_is_named_and_left_out_on_demand(foreign, tiny_clip_dir, tmp_path, caplog):
    tarfile.open(f"{tmp_path}/zzz-empty.tar", "w").close()
    options = {"train_shards": foreign, "teacher_widths": [16, 16], "samples_per_epoch": 12, "max_steps": 4}
    path = write_recipe(tmp_path, tiny_clip_dir, options)
    with pytest.raises(ValueError, match="zzz-empty.tar.*expected samples, got an empty shard"):
        run(path)
    with caplog.at_level(logging.WARNING):
        run(path, "--dmclip.on_bad_sample", "skip", "--output_dir", str(tmp_path / "skips"))
    assert "zzz-empty.tar" in caplog.text and "left out" in caplog.text
    shutil.rmtree(tmp_path / "run")


def test_what_is_missing_is_told_with_its_remedy(shards, tiny_clip_dir, tmp_path):
    path = write_recipe(tmp_path, tiny_clip_dir)
    with pytest.raises(FileNotFoundError, match="run the stage 'reinforce' first, or name dmclip.train_shards"):
        run(path, "--stages", "dmclip")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(path, "--dmclip.train_shards", str(tmp_path / "nowhere-*.tar"))
    with pytest.raises(ValueError, match="Expected at least 99 samples"):
        run(path, "--dmclip.train_shards", str(shards), "--dmclip.per_device_train_batch_size", "99")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"contrastive_loss_weight": 0, "distillation_loss_weight": 0},
            "Expected a loss weight above 0, got contrastive and distillation",
        ),
        (
            {"contrastive_loss_weight": -1},
            "dmclip.contrastive_loss_weight: expected a number from 0 to 1000000, got .-1",
        ),
        ({"ignore_data_skip": False}, "ignore_data_skip: expected true"),
        ({"teacher_logit_scale": 0}, "dmclip.teacher_logit_scale: expected a number above 0"),
        ({"teacher_logit_scale": -1}, "dmclip.teacher_logit_scale: expected a number above 0"),
        ({"model": "x"}, "a checkpoint to go on from"),
        ({"preset": "XL"}, "invalid choice"),
    ],
)
def test_a_wrong_field_is_an_error_of_the_recipe(tiny_clip_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe([], write_recipe(tmp_path, tiny_clip_dir, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"hidden_sise": 4}}, "vision_config: expected fields of DMCLIPVisionConfig.*'hidden_sise'"),
        ({"vision_config": {"image_size": 4}}, "that the section does not set itself, got 'image_size'"),
        ({"text_config": {"hidden_sise": 4}}, "text_config: expected fields of DMCLIPTextConfig.*'hidden_sise'"),
    ],
)
def test_a_typo_in_a_config_is_noticed(shards, tiny_clip_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(write_recipe(tmp_path, tiny_clip_dir, {**changes, "train_shards": str(shards)}))


def test_a_text_tower_of_another_vocabulary_is_refused(finished, shards, tiny_clip_dir, tmp_path):
    source = finished / "run" / "dmclip"
    other = DMCLIPTextModel.from_pretrained(source)
    other.resize_token_embeddings(len(other.get_input_embeddings().weight) + 5)
    other.save_pretrained(tmp_path / "other")
    fields = yaml.safe_load(write_recipe(tmp_path, tiny_clip_dir, {"train_shards": str(shards)}).read_text())
    del fields["dmclip"]["text_config"]
    fields["dmclip"]["text_model"] = str(tmp_path / "other")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match="a tokenizer of the text tower's"):
        run(tmp_path / "recipe.yaml")
