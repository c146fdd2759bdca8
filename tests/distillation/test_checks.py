"""What a recipe cannot do is told before its first stage runs: models are built without weights."""

import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_dclip.data.failures import FAILURES
from modeling_dclip.data.regions import detectors
from modeling_dclip.distillation import checks, run
from modeling_dclip.distillation.checks import check_effects, check_recipe, check_starting_models
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.run import Places, SharedData, load_student
from modeling_dclip.encoders import loading

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = {"vision_config": '{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16}'}


def check(*words, path=None):
    recipe = parse_recipe(list(words), path)
    for one in expand_arms(recipe):
        check_recipe(one.recipe, recipe)


@pytest.fixture
def no_hub(monkeypatch):
    """No model but those in folders."""

    def in_folders(load):
        def find(name, *kinds):
            if not Path(name).is_dir():
                raise FileNotFoundError(f"Expected a model at '{name}', got none.")
            return load(name, *kinds)

        return find

    monkeypatch.setattr(checks, "check_model", in_folders(loading.check_model))
    monkeypatch.setattr(detectors, "check_model", in_folders(loading.check_model))
    monkeypatch.setattr(checks, "load_tokenizer", in_folders(loading.load_tokenizer))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_lacks_nothing_but_its_data_and_the_hub(path, no_hub):
    try:
        check(path=path)
    except FAILURES as error:
        assert all(isinstance(one, FileNotFoundError) for one in getattr(error, "errors", [error])), error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--student.freeze", "vision_model.nothing.*"],
            "Freeze pattern 'vision_model.nothing.*' matches no parameter",
        ),
        (["--student.freeze", "*"], "leave nothing to train"),
        (["--teacher.num_attention_heads", "7"], "Recipe, teacher: num_attention_heads: expected a divisor of .* 128"),
        (["--anchor.vision_config", '{"num_hidden_layers": 1000000}'], "Recipe, anchor: .*num_hidden_layers.*1000000"),
        (
            ["--anchor.vision_config", '{"num_hidden_layer": 2}'],
            "anchor.vision_config: .*Did you mean 'num_hidden_layers'",
        ),
        (["--anchor.text_config", '{"hidden_size": 30}'], "Recipe, anchor: .*attention heads"),
        (["--regions.detector", "nope"], "Unknown kind 'nope' in the spec 'nope'"),
        (["--train_datasets", "nope:x"], "Unknown kind 'nope'"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(words, message):
    with pytest.raises(ValueError, match=message):
        check("--anchor.vision_config", SMALL["vision_config"], *words)


def test_an_arm_that_freezes_nothing_is_told_before_the_others_train(tmp_path):
    (tmp_path / "recipe.yaml").write_text("arms: {one: {}, two: {student: {freeze: [nothing]}}}\n")
    with pytest.raises(ValueError, match="Freeze pattern 'nothing' matches no parameter"):
        check("--anchor.vision_config", SMALL["vision_config"], path=tmp_path / "recipe.yaml")


def test_the_clip_that_is_there_decides(tiny_clip_dir):
    check("--clip_model", str(tiny_clip_dir), "--teacher.num_attention_heads", "2", "--student.freeze", "*layers.0.*")
    with pytest.raises(ValueError, match="Freeze pattern"):
        check(
            "--clip_model", str(tiny_clip_dir), "--teacher.num_attention_heads", "2", "--student.freeze", "*layers.9.*"
        )


COCO = "coco:{0}/captions.json:{0}/photos"


def mistakes_of(*words):
    with pytest.raises(FAILURES) as refused:
        check(*map(str, words))
    return [str(one) for one in getattr(refused.value, "errors", [refused.value])]


def copy_clip(folder, tmp_path, without=()):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*without))
    return copy


def test_all_that_is_wrong_is_told_at_once(tmp_path, tiny_clip_dir):
    clip = copy_clip(tiny_clip_dir, tmp_path, ["vocab.json", "merges.txt", "tokenizer*"])
    (tmp_path / "file").write_text("")
    told = mistakes_of(
        *("--clip_model", clip, "--train_datasets", COCO.format(tmp_path), "--output_dir", tmp_path / "file" / "run"),
        *("--regions.detector", f"transformers:{tiny_clip_dir}", "--student.fp16", "true"),
    )
    assert len(told) == 5
    assert told[0].startswith("output_dir: expected a folder to write at")
    assert told[1].startswith("train_datasets: No ANNOTATIONS.json of the spec 'coco:")
    assert told[2].startswith(f"regions.detector: expected an object detector at '{tiny_clip_dir}', got a model of")
    assert told[3].startswith("student.fp16: expected a GPU, got the CPU")
    assert told[4].startswith(f"clip_model: expected a tokenizer that tells letters apart in '{clip}'")


def test_a_name_with_a_typo_gets_the_nearest_one(tmp_path, tiny_clip_dir, monkeypatch):
    monkeypatch.setattr(loading, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    clip = copy_clip(tiny_clip_dir, tmp_path)
    (told,) = mistakes_of("--clip_model", clip.with_name("copi"))
    assert told.startswith("clip_model: expected a folder with a model at") and told.endswith(f"mean '{clip}'?")
    (told,) = mistakes_of("--clip_model", "openai/clip-vit-base-patch61")
    assert "HF_HUB_OFFLINE forbids" in told and told.endswith("Did you mean 'openai/clip-vit-base-patch16'?")


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["config.json"], "clip_model: expected config.json in"),
        (["*.safetensors"], r"clip_model: expected \*.safetensors or pytorch_model.bin in"),
        (["preprocessor_config.json", "processor_config.json"], "clip_model: expected the files of a processor"),
    ],
)
def test_a_clip_that_lacks_a_file_is_told(absent, message, tmp_path, tiny_clip_dir):
    (told,) = mistakes_of("--clip_model", copy_clip(tiny_clip_dir, tmp_path, absent))
    assert re.match(message, told)


def test_weights_that_are_damaged_are_told_before_the_first_stage(tmp_path, tiny_clip_dir):
    clip = copy_clip(tiny_clip_dir, tmp_path)
    weights = load_file(clip / "model.safetensors")
    weights["logit_scale"] = torch.tensor(float("nan"))
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    recipe = parse_recipe(["--clip_model", str(clip)])
    with pytest.raises(ValueError, match="clip_model: expected finite weights at .* logit_scale"):
        check_starting_models(recipe, recipe, SharedData())


def test_a_clip_is_read_once_for_all_runs_and_again_after_a_change(tmp_path, tiny_clip_dir, monkeypatch):
    clip, read = copy_clip(tiny_clip_dir, tmp_path), []
    monkeypatch.setattr(run, "load_student", lambda path: read.append(path) or load_student(path))
    shared, recipe = SharedData(), parse_recipe(["--clip_model", str(clip)])
    check_starting_models(recipe, recipe, shared)
    check_starting_models(recipe, recipe, shared)
    assert len(read) == 1
    os.utime(clip / "model.safetensors", (1, 1))
    check_starting_models(recipe, recipe, shared)
    assert len(read) == 2


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("ultralytics:nowhere/yolo.pt", "No YOLO weights at 'nowhere/yolo.pt'"),
        ("annotations:nowhere.json", "No INSTANCES.json of the spec 'annotations:nowhere.json'"),
        ("grid:0x2", "expected a grid as ROWSxCOLUMNS"),
        ("transformers:nowhere/or/other", "expected a folder with a model at nowhere/or/other"),
    ],
)
def test_a_detector_that_cannot_be_built_is_told(detector, message, tiny_clip_dir):
    (told,) = mistakes_of("--clip_model", tiny_clip_dir, "--regions.detector", detector)
    assert told.startswith(f"regions.detector: {message}")


def test_a_detector_that_no_stage_needs_is_not_looked_for(tiny_clip_dir):
    weights = ["--student.cosine_distillation_loss_weight", "0"]
    check("--clip_model", str(tiny_clip_dir), "--teacher.num_attention_heads", "2", *weights)
    recipe = parse_recipe(["--regions.detector", "ultralytics:nowhere/yolo.pt", *weights])
    assert "regions" not in recipe.stages


NO_TEACHER = ["--student.cosine_distillation_loss_weight", "0"]
CLIP = ["--clip_model", "recipes/demo_anchor"]
DMCLIP = ["--dmclip.preset", "T", *CLIP]


def effects(*words, path=None):
    recipe = parse_recipe(list(words), path)
    check_effects(expand_arms(recipe), recipe)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*CLIP, "--anchor.learning_rate", "1"],
            "--anchor.learning_rate: .*_anchor. is named, .*--clip_model none unset",
        ),
        (
            [*NO_TEACHER, "--teacher.learning_rate", "1"],
            "reads no teacher.* run: anchor, targets, student",
        ),
        ([*NO_TEACHER, "--regions.detector", "grid:1x1"], "--regions.detector: .*the student reads no teacher"),
        (
            ["--regions.on_bad_image", "skip"],
            "regions.*expected raise, got skip. Set the global field, --on_bad",
        ),
        ([*NO_TEACHER, "--teacher_model", "a/b"], "--teacher_model: .*no loss of a student reads a teacher"),
        ([*CLIP, "--teacher_model", "a/b", "--teacher.learning_rate", "1"], "teacher_model is named"),
        (["--stages", "anchor", "--student.learning_rate", "1"], "the stage student is not among --stages"),
        (["--student.similarity_temperature", "1"], "student.similarity_distillation_loss_weight is 0"),
        (["--student.contrastive_loss_weight", "0", "--student.temperature", "1"], "contrastive_loss_weight is 0"),
        (["--student.max_steps", "5", "--student.num_train_epochs", "1"], r"student.max_steps \(5\) says how long"),
        (["--student.eval_steps", "5"], "student.eval_strategy is not steps"),
        (["--student.bank_limit", "9"], "--student.bank_limit: .*student.negatives is not bank"),
        (["--student.probe_steps", "9"], "--student.probe_steps: .*student.probe names no benchmark"),
        (
            ["--student.micro_batch_size", "32", "--student.per_device_train_batch_size", "32"],
            r"it is not below student.per_device_train_batch_size \(32\)",
        ),
        (["--teacher.num_clusters", "5"], "teacher.aggregation is not multi_cluster"),
        ([*CLIP, "--seeds", "1", "2", "--seed", "3"], r"seeds says \[1, 2\]: set --seeds"),
        (["--push_license", "mit"], "nothing is published without push_to_hub"),
        (["--reinforce.batch_size", "2"], "the stage reinforce does not run without a section dmclip"),
        ([*DMCLIP, "--reinforce.captions_per_image", "2"], "reinforce.captioner is not set"),
        (
            [*DMCLIP, "--dmclip.train_shards", "x", "--reinforce.batch_size", "2"],
            "dmclip.train_shards names the shards",
        ),
        ([*DMCLIP, "--student.learning_rate", "2"], "the recipe trains a DM-CLIP, not a student"),
    ],
)
def test_a_field_of_the_command_line_without_effect_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        effects(*words)


def test_fields_that_some_arm_or_another_stage_reads_are_taken(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "arms: {one: {}, none: {student: {cosine_distillation_loss_weight: 0}}}\nclip_model: recipes/demo_anchor\n"
    )
    effects("--teacher.learning_rate", "1", path=tmp_path / "recipe.yaml")
    effects("--seeds", "1", "2", "--seed", "3")  # of the anchor that both share
    effects("--stages", "teacher", "--targets.batch_size", "2", "--student.cosine_distillation_loss_weight", "0")
    effects(*DMCLIP, "--reinforce.folder", "x", "--stages", "dmclip")
    effects("--student.negatives", "bank", "--student.bank_limit", "9", "--student.micro_batch_size", "2")


def test_fields_of_a_file_without_effect_are_told_in_one_line(tmp_path, caplog):
    (tmp_path / "recipe.yaml").write_text(
        "teacher: {learning_rate: 1}\nstudent: {cosine_distillation_loss_weight: 0}\n"
    )
    with caplog.at_level("INFO"):
        effects(path=tmp_path / "recipe.yaml")
    (told,) = caplog.messages
    assert "without effect in this run: teacher.learning_rate (the student reads no teacher" in told


def test_a_field_of_a_dmclip_does_not_turn_a_recipe_for_a_student_into_another():
    with pytest.raises(ValueError, match="--dmclip.learning_rate: expected a recipe with a section dmclip, got one"):
        effects("--dmclip.learning_rate", "1", path=Path(__file__).parents[2] / "recipes" / "finetune.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_no_recipe_is_refused_for_its_own_fields(path):
    effects(path=path)


@pytest.mark.parametrize(
    ("recipe", "hint"),
    [
        ("dmclip_demo.yaml", "It is a field of dmclip: write for example dmclip.learning_rate"),
        ("dclip_vitb16_no_teacher.yaml", "It is a field of student: write for example student.learning_rate"),
        ("demo_anchor.yaml", "It is a field of anchor: write for example anchor.learning_rate"),
    ],
)
def test_a_hint_names_only_sections_whose_stages_run(recipe, hint):
    path = Path(__file__).parents[2] / "recipes" / recipe
    with pytest.raises(ValueError, match=hint):
        parse_recipe(["--learning_rate", "1"], path)
    with pytest.raises(ValueError, match="whose stages do not run here: anchor run"):
        parse_recipe(["--wise_ft_alpha", "1"], path.with_name("demo_anchor.yaml"))


def test_detectors_answers_are_shared_unless_a_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shared = tmp_path / "modeling_dclip" / "regions"
    for words in ([], ["--seeds", "1", "2"]):
        recipe = parse_recipe(words)
        assert {Places.of(one.recipe).regions_cache for one in expand_arms(recipe)} == {shared}
        recipe = parse_recipe([*words, "--cache_dir", str(tmp_path / "own")])
        assert {Places.of(one.recipe).regions_cache for one in expand_arms(recipe)} == {tmp_path / "own" / "regions"}
