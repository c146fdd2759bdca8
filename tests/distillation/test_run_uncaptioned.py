"""Images without captions in a run: the student alone sees them, every stage's record knows them,
a recipe that cannot use them is refused.
"""

import json
import logging
import shutil

import pytest
import torch
import yaml
from datasets import load_from_disk
from fixtures.training import run
from safetensors.torch import load_file

from modeling_dclip import DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.captions.parts import read_trained_images
from modeling_dclip.data.columns import image_keys
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.run import Places, SharedData, attach_regions, load_training_images

STEPS = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 8, "logging_steps": 1}
SCENES = "scenes:train,n={},image_size=32,captions_per_image=2"
RECIPE = {
    "train_datasets": [SCENES.format(8)],
    "uncaptioned_datasets": [SCENES.format(24)],  # 8 of them are the captioned ones
    "teacher": {"cross_attention": "regions", "num_train_epochs": 1, "learning_rate": 1e-3, **STEPS},
    "targets": {"chunk_rows": 8},
    "student": {"num_train_epochs": 1, "learning_rate": 1e-3, **STEPS},
}


def write_recipe(folder, clip_dir, **changes):
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    recipe = {**RECIPE, "clip_model": str(clip_dir), "output_dir": str(folder / "run"), **changes}
    path.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}))
    return path


def read_data(recipe, shared=None):
    return attach_regions(
        load_training_images(recipe, shared or SharedData()), Places.of(recipe) if recipe.uses_detector else None
    )


@pytest.fixture(scope="module")
def finished(tiny_clip_dir, tmp_path_factory):
    """A run of all stages that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    run(write_recipe(folder, tiny_clip_dir))
    return folder


def same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log_of(folder):
    return [log for log in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in log]


def test_the_student_learns_from_images_that_the_teacher_never_trained_on(finished, tiny_clip_dir, tmp_path):
    out = finished / "run"
    rows = load_from_disk(out / "targets" / "uncaptioned")
    captioned = load_from_disk(out / "targets" / "train")
    assert len(rows) == 16 and len(captioned) == 8
    assert not set(rows["image_id"]) & set(captioned["image_id"])
    assert all(map(len, rows["anchor_embeds"][:])) and rows["text_embeds"][:] == [[]] * 16
    assert [len(embeds) for embeds in rows["teacher_embeds"]] == [1] * 16
    assert len(log_of(out / "student")) == 3  # 24 rows in batches of 8
    assert all(log["cosine_distillation_loss"] > 0 for log in log_of(out / "student"))
    alone = run(write_recipe(tmp_path, tiny_clip_dir, uncaptioned_datasets=None))
    assert same_weights(alone / "teacher", out / "teacher")
    assert not same_weights(alone / "student", out / "student") and len(log_of(alone / "student")) == 1


def test_models_say_which_images_they_learned_from(finished, tiny_clip_dir):
    keys = image_keys(load_captions(SCENES.format(24)))
    for stage, number in (("teacher", 8), ("student", 24)):
        trained = read_trained_images(finished / "run" / stage)
        assert len(trained.keys) == number
        assert trained.describe_overlap(keys).startswith(f"{number} of the 24 test images trained")
    assert read_trained_images(tiny_clip_dir) is None


def test_their_targets_are_those_of_the_same_images_with_captions(finished):
    out = finished / "run"
    teacher = DCLIPTeacher.from_pretrained(out / "teacher").eval()
    processor = DCLIPTeacherProcessor.from_pretrained(out / "teacher")
    scenes = {row["image_id"]: row for row in load_captions(SCENES.format(24))}
    for target in load_from_disk(out / "targets" / "uncaptioned").select(range(3)):
        row = scenes[target["image_id"]]
        inputs = processor(
            images=[row["image"]],
            text=row["captions"][:1],
            boxes=[row["boxes"]],
            box_scores=[row["box_scores"]],
        )
        with torch.no_grad():
            expected = teacher(**inputs).teacher_embeds
        # Two roundings to float16, of features and target.
        torch.testing.assert_close(torch.tensor(target["teacher_embeds"]), expected, rtol=0, atol=2e-3)


def test_a_second_run_finds_every_stage_finished(finished, caplog):
    with caplog.at_level(logging.INFO):
        run(finished / "recipe.yaml")
    assert all(f"{stage}: already finished" in caplog.text for stage in ("teacher", "targets", "student"))
    assert (
        "left out 8 images that another part of the run holds" in caplog.text
        and "16 images for the student alone" in caplog.text
    )


def test_an_interrupted_student_goes_on_with_the_very_batches(tiny_clip_dir, tmp_path, caplog):
    student = {**RECIPE["student"], "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    path = write_recipe(tmp_path, tiny_clip_dir, student=student)
    folder = run(path) / "student"
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    shutil.rmtree(folder / "checkpoint-3")
    record = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({**record, "finished": False}))
    with caplog.at_level(logging.INFO):
        run(path)
    assert "resuming from" in caplog.text and "checkpoint-2" in caplog.text
    assert same_weights(folder, tmp_path)


def test_other_images_are_noticed_and_leave_the_teacher_as_it_is(finished, tiny_clip_dir, tmp_path, caplog):
    path = write_recipe(tmp_path, tiny_clip_dir, uncaptioned_datasets=[SCENES.format(16)])
    options = ("--output_dir", str(finished / "run"))
    with pytest.raises(ValueError, match="targets' was made from other inputs .dataset.uncaptioned: "):
        run(path, *options)
    with pytest.raises(ValueError, match="student' was made from other inputs .dataset.uncaptioned: "):
        run(path, *options, "--stages", "student")
    with caplog.at_level(logging.INFO):
        run(path, *options, "--stages", "teacher")
    assert "teacher: already finished" in caplog.text


def test_a_folder_of_images_goes_through_the_detector_and_captioned_files_stay_out(
    tiny_clip_dir, tmp_path, draw_scenes, caplog
):
    folder = draw_scenes(tmp_path / "album", 6)
    (folder / "0.jpg").write_bytes((folder / "1.jpg").read_bytes()[:40])  # cut off
    captioned = f"parquet:{tmp_path}/captioned.parquet"
    load_captions(SCENES.format(8)).select_columns(["image_id", "image", "captions"]).to_parquet(captioned[8:])
    stored = load_captions(SCENES.format(8)).with_format(None).to_dict()["image"]
    (folder / "same.png").write_bytes(stored[5]["bytes"])
    path = write_recipe(
        tmp_path,
        tiny_clip_dir,
        train_datasets=[captioned],
        uncaptioned_datasets=[f"images:{folder}"],
        regions={"detector": "grid:1x2"},
        on_bad_image="skip",
    )
    with caplog.at_level(logging.INFO):
        out = run(path)
    ids = [f"album/{n}.jpg" for n in range(1, 6)]
    assert "left out 1 image, captioned under another id" in caplog.text
    assert load_from_disk(out / "targets" / "uncaptioned")["image_id"][:] == ids
    assert [len(boxes) for boxes in load_from_disk(out / "regions" / "uncaptioned")["boxes"]] == [2] * 5
    assert json.loads((out / "uncaptioned_datasets_report.json").read_text())["skipped_images"] == 1


@pytest.fixture
def draw_scenes():
    """`draw_scenes(folder, n)` writes scenes that no test trains on as `0.jpg`, `1.jpg`, ..."""

    def draw(folder, n):
        folder.mkdir()
        for index, row in enumerate(load_captions(f"scenes:test,n={n},image_size=32")):
            row["image"].save(folder / f"{index}.jpg")
        return folder

    return draw


def test_test_images_and_held_out_ones_are_left_out(tiny_clip_dir, tmp_path):
    images = [
        {"cocoid": 9, "filename": "9.jpg", "split": "test", "sentences": []},
        {"cocoid": 8, "filename": "8.jpg", "split": "train", "sentences": []},
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    (tmp_path / "coco").mkdir()
    for index, row in enumerate(load_captions("scenes:test,n=3,image_size=32")):
        row["image"].save(tmp_path / "coco" / f"{index + 7:012d}.jpg")
    path = write_recipe(
        tmp_path,
        tiny_clip_dir,
        train_fraction=0.5,
        exclude_karpathy=[str(tmp_path / "karpathy.json")],
        uncaptioned_datasets=[f"images:{tmp_path}/coco,source=coco", SCENES.format(10)],
    )
    rows = read_data(parse_recipe([], path))["uncaptioned"].rows
    expected = load_captions(SCENES.format(10))["image_id"][8:]  # the first 8 are captioned, half of them held out
    assert rows["image_id"][:] == ["coco-7", "coco-8", *expected]


def test_arms_with_and_without_them_share_what_they_read(tiny_clip_dir, tmp_path):
    arms = {
        "with": {},
        "without": {"uncaptioned_datasets": "none"},
        "other": {"uncaptioned_datasets": [SCENES.format(9)]},
    }
    path = write_recipe(tmp_path, tiny_clip_dir, arms=arms)
    shared = SharedData()
    rows = {one.arm: read_data(one.recipe, shared) for one in expand_arms(parse_recipe([], path))}
    assert {arm: {split: len(data) for split, (data, _) in splits.items()} for arm, splits in rows.items()} == {
        "with": {"train": 8, "uncaptioned": 16},
        "without": {"train": 8},
        "other": {"train": 8, "uncaptioned": 1},
    }
    assert len(shared.sources) == 3  # the captioned ones once


def test_boxes_that_only_captioned_images_have_are_told(tiny_clip_dir, tmp_path, draw_scenes, caplog):
    folder = draw_scenes(tmp_path / "album", 3)
    path = write_recipe(tmp_path, tiny_clip_dir, uncaptioned_datasets=[f"images:{folder}"])
    assert "boxes" not in load_training_images(parse_recipe([], path), SharedData())["uncaptioned"].rows.column_names
    assert "have boxes of their own, the images without captions have none" in caplog.text
    caplog.clear()
    assert load_training_images(parse_recipe(["--regions.ignore_boxes", "true"], path), SharedData())
    assert load_training_images(parse_recipe(["--regions.detector", "grid:1x2"], path), SharedData())
    assert "boxes of their own" not in caplog.text


def test_every_arm_is_refused_before_the_first_one_runs(tiny_clip_dir, tmp_path):
    arms = {"good": {}, "bad": {"teacher": {"cross_attention": "bidirectional"}}}
    path = write_recipe(tmp_path, tiny_clip_dir, arms=arms)
    with pytest.raises(
        ValueError, match="uncaptioned_datasets: expected teacher.cross_attention to be 'regions'.*got 'bidi"
    ):
        expand_arms(parse_recipe([], path))
    assert len(expand_arms(parse_recipe(["--teacher.cross_attention", "regions"], path))) == 2


def test_a_recipe_that_cannot_use_them_is_refused_by_field(tiny_clip_dir, tmp_path):
    path = write_recipe(tmp_path, tiny_clip_dir)
    with pytest.raises(ValueError, match="expected teacher.cross_attention to be 'regions'.*got 'text_to_image'"):
        run(path, "--teacher.cross_attention", "text_to_image")
    with pytest.raises(
        ValueError, match="student.cosine_distillation_loss_weight or student.cosine_preservation_loss_weight"
    ):
        run(path, "--student.cosine_distillation_loss_weight", "0")
    with pytest.raises(ValueError, match="only the stage student learns from them"):
        run(path, "--dmclip.image_size", "64")
    DCLIPTeacher.from_clip(tiny_clip_dir).save_pretrained(tmp_path / "paper")
    with pytest.raises(
        ValueError, match="cross_attention of teacher_model '.*paper' to be 'regions'.*got 'bidirectional'"
    ):
        run(path, "--teacher_model", str(tmp_path / "paper"))
    assert not (tmp_path / "run").exists()


def test_preservation_alone_needs_no_teacher(tiny_clip_dir, tmp_path):
    student = {**RECIPE["student"], "cosine_distillation_loss_weight": 0.0, "cosine_preservation_loss_weight": 0.5}
    teacher = {**RECIPE["teacher"], "cross_attention": "bidirectional"}
    out = run(write_recipe(tmp_path, tiny_clip_dir, student=student, teacher=teacher))
    assert not (out / "teacher").exists()
    columns = load_from_disk(out / "targets" / "uncaptioned").column_names
    assert columns == ["image_id", "text_embeds", "anchor_embeds"]
    first, *later = [log["cosine_preservation_loss"] for log in log_of(out / "student")]
    assert (
        abs(first) < 1e-3 and min(later) > 0.01
    )  # the untouched student is the anchor, but for the rounding to float16
