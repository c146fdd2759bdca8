"""Stages: a whole run from nothing, skipped when finished, resumed when killed,
refused when its inputs have changed.
"""

import json
import logging

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from fixtures.processes import run_forked
from fixtures.training import KILLED, RECIPE, equal, run, weights, write_recipe

from modeling_dclip import DCLIPConfig, DCLIPModel, DCLIPProcessor, DCLIPTeacher
from modeling_dclip.data.captions import load_mix
from modeling_dclip.data.captions.false_captions import collect_negatives
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.distillation import run as run_module
from modeling_dclip.distillation.checkpoints import last_checkpoint
from modeling_dclip.distillation.recipes import parse_recipe
from modeling_dclip.distillation.run import SharedData, load_student
from modeling_dclip.distillation.stages import run_stages


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all stages that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    run(write_recipe(folder))
    return folder


def test_a_run_from_nothing_makes_models_that_load(finished):
    out = finished / "run"
    anchor, student = (DCLIPModel.from_pretrained(out / name) for name in ("anchor", "student"))
    teacher = DCLIPTeacher.from_pretrained(out / "teacher")
    assert anchor.config.freeze_text and student.config.freeze_text
    assert equal(teacher.clip.state_dict(), anchor.state_dict())
    moved = [
        name for name, tensor in anchor.state_dict().items() if not torch.equal(tensor, student.state_dict()[name])
    ]
    assert moved and all(name.startswith(("vision_model.", "visual_projection.")) for name in moved)
    processor = DCLIPProcessor.from_pretrained(out / "student")
    assert processor(text="a red circle", return_tensors="pt")["input_ids"].shape[0] == 1


def test_targets_and_arguments_lie_where_they_should(finished):
    out = finished / "run"
    targets = load_from_disk(out / "targets" / "train")
    assert targets.column_names == ["image_id", "teacher_embeds", "text_embeds", "anchor_embeds"]
    assert len(targets[0]["teacher_embeds"]) == 2 and len(targets[0]["anchor_embeds"]) == 32
    arguments = yaml.safe_load((out / "student" / "arguments.yaml").read_text())
    assert arguments["student"]["learning_rate"] == 1e-3 and arguments["teacher"]["cross_attention"] == "regions"
    assert arguments["student"]["temperature"] == 0.05 and arguments["seed"] == 0
    assert json.loads((out / "student" / "trainer_state.json").read_text())["log_history"]


def test_finished_stages_are_skipped_and_said_so(finished, caplog):
    before = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO):
        run(finished / "recipe.yaml")
    for stage in ("anchor", "teacher", "targets", "student"):
        assert f"{stage}: already finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()} == before


def test_where_and_how_loudly_a_stage_runs_makes_no_other_stage(finished, caplog):
    with caplog.at_level(logging.INFO):
        run(finished / "recipe.yaml", "--student.logging_steps", "7", "--targets.batch_size", "3")
    assert "student: already finished" in caplog.text and "targets: already finished" in caplog.text


def test_changed_inputs_stop_the_run_and_say_which(finished):
    with pytest.raises(ValueError, match="arguments.learning_rate: 0.001 -> 0.002.*--overwrite true"):
        run(finished / "recipe.yaml", "--student.learning_rate", "2e-3")
    with pytest.raises(ValueError, match="teacher.*made from other inputs.*dataset"):
        run(finished / "recipe.yaml", "--train_datasets", "scenes:train,n=16,image_size=32,captions_per_image=3")


def test_overwriting_makes_the_stage_again_and_only_that(tmp_path, caplog):
    path = write_recipe(tmp_path)
    run(path)
    before = weights(tmp_path / "run" / "student")
    with caplog.at_level(logging.INFO):
        run(path, "--student.seed", "5", "--overwrite", "true")
    assert "teacher: already finished" in caplog.text and "student: made again" in caplog.text
    assert "pass --overwrite" not in caplog.text
    assert not equal(weights(tmp_path / "run" / "student"), before)


def test_a_run_again_elsewhere_gives_the_same_weights(finished, tmp_path):
    run(write_recipe(tmp_path))
    for stage in ("anchor", "teacher", "student"):
        assert equal(weights(tmp_path / "run" / stage), weights(finished / "run" / stage)), stage


def test_without_a_teacher_in_the_loss_none_is_trained(finished, tmp_path):
    student = {**RECIPE["student"], "cosine_distillation_loss_weight": 0.0}
    path = write_recipe(tmp_path, student=student, clip_model=str(finished / "run" / "anchor"))
    out = run(path)
    assert not (out / "teacher").exists() and not (out / "anchor").exists()
    assert load_from_disk(out / "targets" / "train").column_names == ["image_id", "text_embeds", "anchor_embeds"]
    log = json.loads((out / "student" / "trainer_state.json").read_text())["log_history"][0]
    assert "contrastive_loss" in log and "cosine_distillation_loss" not in log


def test_false_captions_are_stored_with_the_targets_and_another_kind_is_another_run(finished, tmp_path):
    losses = {"contrastive_loss_weight": 1, "cosine_distillation_loss_weight": 0, "hard_negatives": "swap"}
    student = {**RECIPE["student"], **losses, "num_train_epochs": 1}
    recipe = write_recipe(tmp_path, clip_model=str(finished / "run" / "anchor"), student=student)
    out = run(recipe)
    targets = load_from_disk(out / "targets" / "train")
    assert targets.column_names == ["image_id", "text_embeds", "anchor_embeds", "negatives", "negative_embeds"]
    expected = collect_negatives(load_mix(RECIPE["train_datasets"], seed=0), "swap", "training images")
    assert [text for texts in targets["negatives"] for text in texts] == expected.values.tolist()
    assert [len(row) for row in targets["negative_embeds"]] == expected.lengths.tolist() and expected.lengths.max() > 1
    words = DCLIPProcessor.from_pretrained(out / "student")(
        text=targets[0]["negatives"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        embeds = DCLIPModel.from_pretrained(out / "student").get_text_features(**words).pooler_output
    torch.testing.assert_close(
        torch.tensor(targets[0]["negative_embeds"]), torch.nn.functional.normalize(embeds, dim=-1), rtol=0, atol=2e-3
    )
    with pytest.raises(ValueError, match="false_captions"):
        run(recipe, "--student.hard_negatives", "none")


def test_a_trained_teacher_can_be_taken_from_elsewhere(finished, tmp_path):
    source = finished / "run"
    path = write_recipe(tmp_path, clip_model=str(source / "anchor"), teacher_model=str(source / "teacher"))
    out = run(path)
    assert not (out / "teacher").exists()
    assert equal(weights(out / "student"), weights(source / "student"))


def test_runs_of_one_process_read_their_images_once(finished, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        run_module, "load_mix", lambda *args, **kwargs: loaded.append(args) or load_mix(*args, **kwargs)
    )
    source, shared, outs = finished / "run", SharedData(), []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        path = write_recipe(tmp_path / name, clip_model=str(source / "anchor"))
        outs.append(run_stages(parse_recipe([], path), shared))
    assert len(loaded) == 1 and len(shared.pixels) == 1
    for out in outs:
        assert equal(weights(out / "student"), weights(source / "student"))


def test_an_unreadable_image_stays_out_of_every_arm_where_bad_images_are_skipped(finished, tmp_path):
    scenes = load_scenes("train", n=9, image_size=32, captions_per_image=2).remove_columns("coarse_caption")
    rows = scenes.with_format(None).to_dict()
    rows["image"][3]["bytes"] = rows["image"][3]["bytes"][:150]
    Dataset.from_dict(rows, features=scenes.features).to_parquet(tmp_path / "scenes.parquet")
    common = {"clip_model": str(finished / "run" / "anchor"), "train_datasets": [f"parquet:{tmp_path}/scenes.parquet"]}
    for weight in (1.0, 0.0):
        regions = {"detector": "grid:1x2"}
        student = {**RECIPE["student"], "cosine_distillation_loss_weight": weight}
        out = run(
            write_recipe(tmp_path, regions=regions, student=student, on_bad_image="skip", **common),
            *("--output_dir", f"{tmp_path}/{weight}"),
        )
        assert load_from_disk(out / "targets" / "train")["image_id"][:] == [
            i for i in rows["image_id"] if not i.endswith("-3")
        ]
        assert json.loads((out / "train_datasets_report.json").read_text())["skipped_images"] == 1
    with pytest.raises(ValueError, match="cannot be read.*--on_bad_image skip"):
        run(write_recipe(tmp_path, **common), "--output_dir", f"{tmp_path}/raises")


def test_regions_come_from_a_detector(finished, tmp_path):
    regions = {"detector": "grid:2x2", "max_regions": 3}
    path = write_recipe(tmp_path, regions=regions, clip_model=str(finished / "run" / "anchor"))
    out = run(path)
    boxes = load_from_disk(out / "regions" / "train")
    assert len(boxes) == 16 and all(len(row) == 3 for row in boxes["boxes"])
    assert json.loads((out / "regions" / "train_report.json").read_text())["images"] == 16
    assert not equal(weights(out / "teacher"), weights(finished / "run" / "teacher"))


def test_validation_rows_are_kept_apart_and_measured(finished, tmp_path):
    student = {**RECIPE["student"], "eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    changes = {"student": student, "train_fraction": 0.75, "clip_model": str(finished / "run" / "anchor")}
    teacher = {**RECIPE["teacher"], "per_device_train_batch_size": 4}
    out = run(write_recipe(tmp_path, teacher=teacher, **changes))
    ids = [set(load_from_disk(out / "targets" / split)["image_id"]) for split in ("train", "validation")]
    assert list(map(len, ids)) == [12, 4] and not ids[0] & ids[1]
    logs = json.loads((out / "student" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_contrastive_loss" in log for log in logs) == 2


def test_a_stage_that_needs_another_says_so(tmp_path):
    path = write_recipe(tmp_path)
    with pytest.raises(FileNotFoundError, match="run the stage 'anchor' first, or name clip_model"):
        run(path, "--stages", "teacher")


def test_too_few_images_for_a_batch_are_told_before_any_is_looked_at(finished, tmp_path):
    path = write_recipe(tmp_path, clip_model=str(finished / "run" / "anchor"), regions={"detector": "grid:2x2"})
    with pytest.raises(
        ValueError, match="at least 17 images to train on, .*got 16. Lower teacher.per_device_train_batch"
    ):
        run(path, "--teacher.per_device_train_batch_size", "17")
    assert not (tmp_path / "run" / "regions").exists()


def test_validation_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="train_fraction is 1"):
        run(write_recipe(tmp_path), "--student.eval_strategy", "epoch")


def test_a_teacher_around_another_clip_is_refused_before_training(finished, tiny_clip_dir, tmp_path):
    other = DCLIPTeacher.from_pretrained(finished / "run" / "teacher")
    path = write_recipe(tmp_path, clip_model=str(finished / "run" / "anchor"))
    with torch.no_grad():
        other.clip.visual_projection.weight.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    DCLIPProcessor.from_pretrained(finished / "run" / "anchor").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds another CLIP than the student starts from"):
        run(path, "--teacher_model", str(tmp_path / "other"))
    DCLIPTeacher.from_clip(tiny_clip_dir).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="a teacher of the student's width 32 .*, got 16"):
        run(path, "--teacher_model", str(tmp_path / "narrow"))


def test_a_run_killed_in_mid_epoch_resumes_and_ends_with_the_same_weights(finished, tmp_path, caplog):
    student = {**RECIPE["student"], "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    source = finished / "run"
    changes = {"student": student, "clip_model": str(source / "anchor"), "teacher_model": str(source / "teacher")}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(write_recipe(tmp_path / "whole", **changes))
    path = write_recipe(tmp_path / "killed", **changes)
    (killed,) = run_forked(KILLED, path, 5)  # 4 steps an epoch, a checkpoint at 3
    assert killed.returncode == -9, killed.stderr[-3000:]
    folder = tmp_path / "killed" / "run" / "student"
    assert last_checkpoint(folder).endswith("checkpoint-3") and not (folder / "model.safetensors").exists()
    (folder / "checkpoint-5").mkdir()  # as if it had died while writing one
    with caplog.at_level(logging.INFO):
        run(path)
    assert "checkpoint-5 is incomplete (trainer_state.json was not written); goes on from checkpoint-3" in caplog.text
    assert equal(weights(folder), weights(tmp_path / "whole" / "run" / "student"))
    logs = [
        [
            log["loss"]
            for log in json.loads((root / "run/student/trainer_state.json").read_text())["log_history"]
            if "loss" in log
        ]
        for root in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert len(logs[0]) == 8 and logs[0] == logs[1]


def test_a_student_with_rotary_positions_starts_near_the_clip_and_one_that_has_them_keeps_its_own(tmp_path):
    """Without the table and at one radian a patch, the same pictures of the demo's anchor have a cosine of 0.9."""
    clip, pixels = "recipes/demo_anchor", torch.rand(4, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    expected = DCLIPModel.from_pretrained(clip).float().eval().get_image_features(pixels).pooler_output
    student = load_student(clip, "rope")
    vision = student.config.vision_config
    assert (vision.rotary_scale, vision.rotary_table) == (0.3, True)
    found = student.get_image_features(pixels).pooler_output
    assert torch.cosine_similarity(found, expected).min() > 0.98
    vision.rotary_scale = 0.2  # as somebody saved it
    student.save_pretrained(tmp_path)
    assert load_student(str(tmp_path), "rope").config.vision_config.rotary_scale == 0.2
    config = DCLIPConfig.from_pretrained(clip)
    config.vision_config.position_embedding_type = "rope"
    usual = DCLIPModel.from_pretrained(clip, config=config).float().eval().get_image_features(pixels).pooler_output
    assert torch.cosine_similarity(usual, expected).min() < 0.95
