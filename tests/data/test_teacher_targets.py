"""Targets: computed once they are what the teacher says online, whatever the chunks,
and only what changed is computed again.
"""

import json
import textwrap

import numpy as np
import pytest
import torch
from datasets import Dataset
from fixtures.processes import run_forked
from safetensors.numpy import load_file, save_file

from modeling_dclip import DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.captions.files import drop_captions
from modeling_dclip.data.collation import TeacherBatches
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.data.teacher_targets import (
    FeatureOptions,
    TeacherFeatures,
    _RegionRows,
    add_teacher_targets,
    compute_features,
)
from modeling_dclip.encoders.fingerprints import fingerprint_model, fingerprint_processor

# Two roundings to float16 (features, target) of numbers up to 1, each 2^-11 relative, through one small block.
ATOL = 2e-3
TEACHERS = {
    "paper": {},
    "one way": {"cross_attention": "text_to_image", "region_weighting": False},
    "clusters": {"aggregation": "multi_cluster"},
    "leak-free": {"cross_attention": "regions"},
}


@pytest.fixture(scope="module")
def processor(tiny_clip_dir):
    return DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir)


@pytest.fixture(scope="module")
def scenes():
    return load_scenes("train", n=7, captions_per_image=3, image_size=40)


def make_teacher(folder, **config):
    torch.manual_seed(0)
    teacher = DCLIPTeacher.from_clip(folder, **config)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if not name.startswith("clip."):  # as if trained: the leak-free block starts as the identity
                parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher.eval()


def targets_of(dataset, teacher, processor, folder, **options):
    names = ("max_regions", "batch_size", "text_batch_size", "chunk_rows", "num_workers")
    feature_options = {"chunk_rows": 3, "batch_size": 2} | {n: options.pop(n) for n in names if n in options}
    options = {"keys": row_keys(dataset), **options}
    return add_teacher_targets(dataset, teacher, processor, FeatureOptions(folder, **feature_options), **options)


@torch.no_grad()
def online(teacher, processor, row):
    count = len(row["captions"])
    inputs = processor(
        images=[row["image"]] * count,
        text=row["captions"],
        boxes=[row["boxes"]] * count,
        box_scores=[row["box_scores"]] * count,
    )
    return teacher(**inputs)


@pytest.mark.parametrize("config", TEACHERS.values(), ids=TEACHERS)
def test_targets_computed_once_equal_targets_computed_online(tiny_clip_dir, scenes, processor, tmp_path, config):
    teacher = make_teacher(tiny_clip_dir, **config)
    dataset = targets_of(scenes, teacher, processor, tmp_path)
    for row in dataset:
        outputs = online(teacher, processor, row)
        for name in ("teacher_embeds", "text_embeds"):
            stored = torch.tensor(row[name])
            torch.testing.assert_close(stored, getattr(outputs, name), rtol=0, atol=ATOL)
            torch.testing.assert_close(stored.norm(dim=-1), torch.ones(3), rtol=0, atol=ATOL)
        anchor = teacher.encode_images(processor(images=row["image"])["pixel_values"])[0]
        torch.testing.assert_close(torch.tensor(row["anchor_embeds"]), anchor, rtol=0, atol=ATOL)


def test_the_leak_free_teacher_says_the_same_for_every_caption_and_the_papers_does_not(
    tiny_clip_dir, scenes, processor, tmp_path
):
    for name, alike in (("leak-free", True), ("paper", False)):
        teacher = make_teacher(tiny_clip_dir, **TEACHERS[name])
        embeds = np.array(targets_of(scenes, teacher, processor, tmp_path)["teacher_embeds"])
        assert (np.abs(embeds - embeds[:, :1]).max() == 0) == alike


def test_an_image_without_captions_has_the_target_it_has_with_them(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir, **TEACHERS["leak-free"])
    expected = targets_of(scenes, teacher, processor, tmp_path)
    bare = drop_captions(scenes)
    dataset = targets_of(bare, teacher, processor, tmp_path, captioned=False)
    assert dataset["captions"][:] == dataset["text_embeds"][:] == [[]] * len(scenes)
    for row, captioned in zip(dataset, expected, strict=True):
        assert row["teacher_embeds"] == captioned["teacher_embeds"][:1]
        assert row["anchor_embeds"] == captioned["anchor_embeds"]
    assert dataset.features == expected.features
    before = files(tmp_path)
    targets_of(bare, teacher, processor, tmp_path, captioned=False)
    assert files(tmp_path) == before


def test_without_a_teacher_images_without_captions_have_their_anchor(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir, cross_attention="none")
    options = {"captioned": False, "with_teacher": False}
    dataset = targets_of(drop_captions(scenes), teacher, processor, tmp_path, **options)
    assert "teacher_embeds" not in dataset.column_names
    expected = targets_of(scenes, teacher, processor, tmp_path, with_teacher=False)
    assert dataset["anchor_embeds"][:] == expected["anchor_embeds"][:]


def test_captions_have_to_be_there_or_not_as_said(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir, **TEACHERS["leak-free"])
    with pytest.raises(ValueError, match="'scenes-train-0-0' .row 0.: expected one or more captions"):
        targets_of(drop_captions(scenes), teacher, processor, tmp_path)
    with pytest.raises(ValueError, match="'scenes-train-0-0' .row 0.: expected no caption, got 3"):
        targets_of(scenes, teacher, processor, tmp_path, captioned=False)
    teacher = make_teacher(tiny_clip_dir)
    with pytest.raises(ValueError, match="reads no caption .*got 'bidirectional'"):
        targets_of(drop_captions(scenes), teacher, processor, tmp_path, captioned=False)


def test_chunks_and_batches_change_nothing(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    first = targets_of(scenes, teacher, processor, tmp_path / "a")
    second = targets_of(scenes, teacher, processor, tmp_path / "b", chunk_rows=7, batch_size=5, text_batch_size=4)
    for name in ("teacher_embeds", "text_embeds", "anchor_embeds"):
        np.testing.assert_allclose(np.array(second[name]), np.array(first[name]), rtol=0, atol=ATOL)


def test_each_image_is_encoded_once_and_not_once_a_caption(tiny_clip_dir, scenes, processor, tmp_path, monkeypatch):
    teacher = make_teacher(tiny_clip_dir)
    encoded = []
    encode_images = teacher.encode_images
    monkeypatch.setattr(teacher, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode_images(pixels))
    targets_of(scenes, teacher, processor, tmp_path)
    assert sum(encoded) == len(scenes) + sum(map(len, scenes["boxes"]))


def test_without_a_teacher_only_the_frozen_clip_speaks(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir, cross_attention="none")
    dataset = targets_of(scenes, teacher, processor, tmp_path, with_teacher=False)
    assert "teacher_embeds" not in dataset.column_names
    expected = targets_of(scenes, make_teacher(tiny_clip_dir), processor, tmp_path)
    np.testing.assert_allclose(np.array(dataset["text_embeds"]), np.array(expected["text_embeds"]), rtol=0, atol=ATOL)


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_second_run_computes_nothing_and_a_changed_row_only_its_chunk(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    targets_of(scenes, teacher, processor, tmp_path)
    before = files(tmp_path)
    assert len(before) == 2 * 3  # features and targets of chunks of 3, 3 and 1
    targets_of(scenes, teacher, processor, tmp_path)
    assert files(tmp_path) == before
    rows = scenes.with_format(None).to_dict()
    rows["captions"][4] = [*rows["captions"][4][:2], "a red dog"]
    targets_of(Dataset.from_dict(rows, features=scenes.features), teacher, processor, tmp_path)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2


def test_another_block_over_the_same_clip_computes_targets_only(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    targets_of(scenes, teacher, processor, tmp_path)
    before = len(files(tmp_path))
    with torch.no_grad():
        teacher.text_to_image.norm.weight.mul_(1.5)
    targets_of(scenes, teacher, processor, tmp_path)
    assert len(files(tmp_path)) == before + 3


def test_keys_of_models_and_processors_follow_what_they_compute(tiny_clip_dir, processor):
    teacher, again = make_teacher(tiny_clip_dir), make_teacher(tiny_clip_dir)
    again.config._name_or_path = "elsewhere"
    assert fingerprint_model(teacher) == fingerprint_model(again)
    again.config.attention_temperature = 1.0
    assert fingerprint_model(teacher) != fingerprint_model(again)
    key = fingerprint_processor(processor)
    processor.tokenizer(["a", "a dog"], truncation=True, padding=True)  # a call's settings stay out of the key
    assert fingerprint_processor(processor) == key


def test_a_cut_chunk_is_computed_again(tiny_clip_dir, scenes, processor, tmp_path, caplog):
    teacher = make_teacher(tiny_clip_dir)
    whole = targets_of(scenes, teacher, processor, tmp_path)
    for victim, share in zip(sorted(tmp_path.glob("*.safetensors")), (0.1, 0, 0.5, 0.01, 0.9, 0.3), strict=True):
        victim.write_bytes(victim.read_bytes()[: int(share * victim.stat().st_size)])
    again = targets_of(scenes, teacher, processor, tmp_path)
    assert caplog.text.count("is damaged") == caplog.text.count("computed again") == 6
    for name in ("teacher_embeds", "text_embeds", "anchor_embeds"):
        assert again.with_format(None)[name][:] == whole.with_format(None)[name][:]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def spoil(name, value):
    def change(path):
        chunk = load_file(path)
        if name in chunk:
            chunk[name] = value(chunk[name])
        save_file({key: array for key, array in chunk.items() if array is not None}, path)

    return change


def with_nan(array):
    array = array.copy()
    array.flat[0] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "its content is not what was written"),
        (spoil("image_embeds", with_nan), "holds NaN or infinity under 'image_embeds'"),
        (spoil("text_embeds", lambda array: array[:-1]), "text_embeds is of another length"),
        (spoil("image_embeds", lambda array: array[:-1]), "image_embeds is of another length"),
        (spoil("captions_per_image", lambda array: None), "it lacks captions_per_image"),
        (spoil("image_embeds", lambda array: None), "it lacks image_embeds"),
    ],
)
def test_a_damaged_chunk_is_named(change, message, tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    paths = compute_features(scenes, teacher, processor, FeatureOptions(tmp_path, chunk_rows=3), keys=row_keys(scenes))
    TeacherFeatures.load(paths)
    change(paths[1])
    with pytest.raises(ValueError, match=f"{paths[1].name}' .*{message}.*Delete the file"):
        TeacherFeatures.load(paths)


def test_a_model_that_answers_nan_leaves_no_chunk(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    with torch.no_grad():
        teacher.clip.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="Column 'image_embeds', row 0 .image 'scenes-train-0-0'.*Check the model"):
        targets_of(scenes, teacher, processor, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_teacher_that_answers_nan_is_told_by_image(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    with torch.no_grad():
        teacher.text_to_image.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="'teacher_embeds', row 0 .image 'scenes-train-0-0'"):
        targets_of(scenes, teacher, processor, tmp_path)


def test_a_teachers_training_batch_is_what_it_would_compute_itself(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    keys = row_keys(scenes)
    paths = compute_features(scenes, teacher, processor, FeatureOptions(tmp_path, chunk_rows=3), keys=keys)
    batches = TeacherBatches(TeacherFeatures.load(paths), seed=2)
    batch = batches.__getitems__([5, 1])
    image_ids = batch.pop("image_ids")
    embeds = teacher(**batch).teacher_embeds
    for row, embed in zip(image_ids.tolist(), embeds, strict=True):
        choices = online(teacher, processor, scenes[row]).teacher_embeds
        assert (choices - embed).abs().max(dim=-1).values.min() < ATOL


KILLED = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from modeling_dclip import DCLIPTeacher, DCLIPTeacherProcessor
    from modeling_dclip.data import chunks
    from modeling_dclip.data.columns import row_keys
    from modeling_dclip.data.scenes import load_scenes
    from modeling_dclip.data.teacher_targets import FeatureOptions, add_teacher_targets

    teacher_dir, clip_dir, cache, die_after = sys.argv[1:]
    written, write_chunk = [], chunks.write_chunk
    def write_and_die(path, chunk):
        write_chunk(path, chunk)
        written.append(path.name)
        if len(written) == int(die_after):
            os.kill(os.getpid(), 9)
    chunks.write_chunk = write_and_die
    scenes = load_scenes("train", n=7, captions_per_image=3, image_size=40)
    teacher = DCLIPTeacher.from_pretrained(teacher_dir)
    processor = DCLIPTeacherProcessor.from_pretrained(clip_dir)
    options = FeatureOptions(Path(cache), chunk_rows=3, batch_size=2)
    dataset = add_teacher_targets(scenes, teacher, processor, options, keys=row_keys(scenes))
    import json
    print(json.dumps({"written": len(written), "teacher_embeds": dataset["teacher_embeds"][:]}))
    """
)


def test_a_killed_run_goes_on_at_the_next_chunk(tiny_clip_dir, scenes, processor, tmp_path):
    teacher = make_teacher(tiny_clip_dir)
    teacher.save_pretrained(tmp_path / "teacher")

    def run(die_after):
        arguments = [tmp_path / "teacher", tiny_clip_dir, tmp_path / "cache", die_after]
        (done,) = run_forked(KILLED, *arguments)
        return done

    assert run(die_after=2).returncode == -9
    finished = run(die_after=99)
    assert finished.returncode == 0, finished.stderr[-3000:]
    said = json.loads(finished.stdout.splitlines()[-1])
    assert said["written"] == 4  # 3 chunks of features and 3 of targets, less the 2 there already
    expected = targets_of(scenes, teacher, processor, tmp_path / "uninterrupted")
    np.testing.assert_array_equal(np.array(said["teacher_embeds"]), np.array(expected["teacher_embeds"]))


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (
            [[0, 0, 8, 8], [4, 4, 50, 8]],
            [1, 1],
            r"box 1 of sample 'scenes-.*' \(row 2\): expected a box inside the 40 x",
        ),
        (
            [[0, 0, float("nan"), 8]],
            [1],
            r"Box 0 of image 'scenes-.*' \(row 2\): expected four finite numbers.*1 such",
        ),
        ([[0, 0, 8, 8], [9, 0, 8, 8]], [1, 1], r"Box 1 of image 'scenes-.*' \(row 2\): expected x1 < x2 and y1 < y2"),
        ([[-1, 0, 8, 8]], [1], r"Box 0 of image 'scenes-.*' \(row 2\): expected a box inside the image, got .-1.0"),
        ([[0, 0, 8, 8]], [1.5], r"Box 0 of image 'scenes-.*' \(row 2\): expected a score in \[0, 1\], got 1.5"),
        ([[0, 0, 8, 8]], [1, 1], "row 2: expected one score for each of 1 boxes, got 2"),
    ],
    ids=str,
)
def test_a_wrong_box_is_named_with_its_row(tiny_clip_dir, scenes, processor, tmp_path, boxes, scores, message):
    columns = scenes.select(range(3)).with_format(None).to_dict()
    columns["boxes"][2], columns["box_scores"][2] = boxes, scores
    dataset = Dataset.from_dict(columns, features=scenes.features)
    with pytest.raises(ValueError, match=message):
        targets_of(dataset, make_teacher(tiny_clip_dir), processor, tmp_path)


def test_each_image_has_the_scores_of_its_own_boxes(tiny_clip_dir, scenes, processor, tmp_path):
    columns = scenes.select(range(3)).with_format(None).to_dict()
    columns["boxes"] = [[[0, 0, 8, 8]], None, [[0, 0, 9, 9], [0, 0, 4, 4]]]
    columns["box_scores"] = [None, [], [0.25, 0.5]]
    dataset = Dataset.from_dict(columns, features=scenes.features)
    rows = _RegionRows(dataset, processor, None, True)
    batch = rows.__getitems__([0, 1, 2])
    assert batch["region_scores"].tolist() == [[1, 0], [1, 0], [0.25, 0.5]]
    assert (batch["region_boxes"][2] * 40).tolist() == [[0, 0, 9, 9], [0, 0, 4, 4]]
    assert batch["region_boxes"][1, 0].tolist() == [0, 0, 1, 1]  # without a box the whole image
