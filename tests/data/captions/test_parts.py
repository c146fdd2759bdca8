"""The parts of a run's images: drawn by content, equal pictures together, and the test part kept with the run."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from modeling_dclip.data.captions import load_captions, load_uncaptioned, split_off_test, split_train_validation
from modeling_dclip.data.captions.parts import (
    HELD_OUT,
    TRAINED_IMAGES,
    describe_copies,
    describe_held_out,
    read_trained_images,
    write_held_out,
    write_trained_images,
)
from modeling_dclip.data.columns import image_keys
from modeling_dclip.data.images import undecoded_images


def named(number, prefix="row"):
    return Dataset.from_dict({"image_id": [f"{prefix}-{i}" for i in range(number)]})


def keys_of(number):
    return [f"key-{i}" for i in range(number)]


def rows_of(dataset):
    return [int(image_id.partition("-")[2]) for image_id in dataset["image_id"][:]]


@pytest.mark.parametrize(("number", "size"), [(20, 2), (155, 15), (1000, 100)])
def test_the_test_part_is_the_share_rounded_down(number, size):
    rest, test = split_off_test(named(number), 0.1, keys_of(number))
    assert (len(rest), len(test)) == (number - size, size)
    assert sorted(rows_of(rest) + rows_of(test)) == list(range(number))


def test_content_alone_decides_the_test_part():
    keys = keys_of(20)
    test = rows_of(split_off_test(named(20), 0.1, keys)[1])
    assert test == [7, 10]  # a run must find the part of an earlier one again
    lots = [hashlib.sha256(f"test/0/{key}".encode()).hexdigest() for key in keys]
    assert test == sorted(sorted(range(20), key=lots.__getitem__)[:2])
    assert rows_of(split_off_test(named(20, "other"), 0.1, keys)[1]) == test
    backwards = split_off_test(named(20), 0.1, keys[::-1])[1]
    assert sorted(19 - row for row in rows_of(backwards)) == test
    assert set(test) < set(rows_of(split_off_test(named(20), 0.3, keys)[1]))


def test_more_pictures_move_the_border_alone():
    before = set(rows_of(split_off_test(named(200), 0.1, keys_of(200))[1]))
    after = set(rows_of(split_off_test(named(220), 0.1, keys_of(220))[1]))
    old = {row for row in after if row < 200}
    assert old <= before or before <= old  # the same order of draws, cut elsewhere


def test_identical_pictures_are_in_one_part():
    keys = [f"key-{i // 2}" for i in range(40)]  # in pairs
    for fraction in (0.1, 0.15, 0.2, 0.325, 0.5):
        for part in split_off_test(named(40), fraction, keys):
            assert {row ^ 1 for row in rows_of(part)} == set(rows_of(part))
        for part in split_train_validation(named(40), fraction, 3, keys=keys):
            assert {row ^ 1 for row in rows_of(part)} == set(rows_of(part))
    assert len(split_off_test(named(40), 0.15, keys)[1]) == 6
    assert len(split_off_test(named(40), 0.025, keys)[1]) == 2  # not none: one and its copy
    assert [len(part) for part in split_train_validation(named(40), 0.025, 3, keys=keys)] == [2, 38]


def test_without_copies_the_split_is_that_of_ids_alone():
    for seed in range(3):
        by_id = split_train_validation(named(50), 0.9, seed)
        by_content = split_train_validation(named(50), 0.9, seed, keys=keys_of(50))
        assert [rows_of(part) for part in by_id] == [rows_of(part) for part in by_content]


def test_fractions_are_of_all_images():
    rest, test = split_off_test(named(155), 0.1, keys_of(155))
    train, validation = split_train_validation(rest, 0.8, of=155)
    assert (len(train), len(validation), len(test)) == (124, 16, 15)


@pytest.mark.parametrize(
    ("number", "fraction", "keys", "message"),
    [
        (5, 0.1, None, r"test_fraction 0.1 of 5 images leaves the test part empty. Set it to at least 0.2,"),
        (3, 0.1, None, r"at least 0.334,"),
        (2, 0.9, ["a", "a"], r"of 2 images, 1 of them different, leaves what is left to train on empty. Set it to at"),
        (9, 1.0, None, r"a fraction in \(0, 1\), got 1.0"),
    ],
)
def test_a_part_that_would_be_empty_is_refused(number, fraction, keys, message):
    with pytest.raises(ValueError, match=message):
        split_off_test(named(number), fraction, keys or keys_of(number))


def test_copies_are_counted_with_a_pair():
    assert describe_copies(["a", "b"], ["x", "y"]) == ""
    one = describe_copies(["a", "b", "c"], ["x", "y", "x"])
    assert one == "1 image is an identical copy of another, e.g. c of a; copies stay in one part of a split"
    assert describe_copies(list("abcd"), list("xxxx")).startswith(
        "3 images are identical copies of another, e.g. b of"
    )
    with pytest.raises(ValueError, match="shorter"):
        describe_copies(["a", "b", "c"], ["x", "x"])


# --- the test part of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, draw, monkeypatch):
    """A run's folder with a test part of three pictures, named by relative paths, and its parent."""
    home = tmp_path / "home"
    for index in range(3):
        draw(home / "photos" / f"{index}.png", index)
    (home / "t.csv").write_text("image,caption\n0.png,a dog\n1.png,a cat\n1.png,two\n2.png,a bird\n")
    monkeypatch.chdir(home)
    dataset = load_captions("csv:t.csv:photos")
    write_held_out(home / "run" / HELD_OUT, dataset, image_keys(dataset), of=30, fraction=0.1)
    return home


def test_a_run_names_its_test_part_from_any_folder(kept, monkeypatch):
    monkeypatch.chdir("/")
    (kept / "run" / "student").mkdir()
    expected = load_captions(f"csv:{kept}/t.csv:{kept}/photos")
    about = f"3 of the 30 images of the run {kept}/run, kept out of training"
    (kept / "run" / "arm" / "seed-0" / "student" / "checkpoint-3").mkdir(parents=True)
    for folder in ("run", "run/student", "run/arm/seed-0/student/checkpoint-3"):  # a stage, a checkpoint of an arm
        found = load_captions(f"held_out:{kept}/{folder}")
        assert found.column_names == ["image_id", "captions", "image"]
        assert found["captions"][:] == expected["captions"][:] == [["a dog"], ["a cat", "two"], ["a bird"]]
        assert image_keys(found) == image_keys(expected)
        assert describe_held_out(f"{kept}/{folder}", 3) == about
    assert len(load_captions(f"held_out:{kept}/run@2")) == 2
    part = f"2 of the 3 test images of the run {kept}/run, kept out of training"
    assert describe_held_out(f"{kept}/run", 2) == part
    assert load_uncaptioned([f"held_out:{kept}/run"], seed=0)["captions"][:] == [[], [], []]


def test_pictures_that_are_files_are_not_copied(kept):
    stored = load_from_disk(kept / "run" / HELD_OUT / "images")["image"][:]
    assert stored == [{"bytes": None, "path": str(kept / "photos" / f"{i}.png")} for i in range(3)]


def test_pictures_that_are_bytes_are_copied(tmp_path):
    scenes = load_captions("scenes:test,n=3,image_size=32")
    write_held_out(tmp_path / HELD_OUT, scenes, image_keys(scenes), of=3, fraction=0.5)
    found = load_captions(f"held_out:{tmp_path}")
    assert image_keys(found) == image_keys(scenes) and "boxes" in found.column_names
    assert found["captions"][:] == scenes["captions"][:]


def test_a_run_may_move_with_its_pictures(kept, tmp_path):
    os.rename(kept, tmp_path / "moved")
    found = load_captions(f"held_out:{tmp_path}/moved/run")
    paths = [image["path"] for image in undecoded_images(found)["image"][:]]
    assert paths == [str(tmp_path / "moved" / "photos" / f"{i}.png") for i in range(3)]


def test_pictures_that_are_missing_or_have_changed_are_named(kept, draw, caplog):
    (kept / "photos" / "0.png").unlink()
    draw(kept / "photos" / "2.png", 9)
    message = (
        r"2 of 3 test images are no longer those of the run: photos/0.png \(missing\), photos/2.png \(changed\). Put"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_captions("held_out:run")
    assert load_captions("held_out:run,missing=skip")["image_id"][:] == ["photos/1.png"]
    assert "photos/2.png (changed); left out" in caplog.text
    draw(kept / "photos" / "0.png", 0)
    with pytest.raises(ValueError, match="1 of 3 test images"):
        load_captions("held_out:run")
    shutil.rmtree("photos")
    with pytest.raises(ValueError, match="is left of held_out:run"):
        load_captions("held_out:run,missing=skip")


def test_what_is_no_test_part_is_refused(kept):
    (kept / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="'other' has no test part. Train with test_fraction above 0"):
        load_captions("held_out:other")
    with pytest.raises(FileNotFoundError, match="No run folder at 'nowhere'"):
        load_captions("held_out:nowhere")
    message = (
        "No run folder at 'run/student/checkpoint-3'.* run is a run's folder with a test part: write held_out:run."
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_captions("held_out:run/student/checkpoint-3")
    with pytest.raises(ValueError, match="missing to be one of"):
        load_captions("held_out:run,missing=no")
    about = kept / "run" / HELD_OUT / "held_out.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"of": "many"}))
    with pytest.raises(ValueError, match="held_out.json': expected an integer under 'of', got 'many'"):
        load_captions("held_out:run")
    about.write_text("{")
    with pytest.raises(ValueError, match="held_out.json', got .* Run train.py again with --overwrite true.$"):
        load_captions("held_out:run")
    about.write_text(json.dumps({"run": "x", "images": 3, "of": 30, "test_fraction": 0.1, "mode": None}))
    shutil.rmtree(about.parent / "images")
    with pytest.raises(FileNotFoundError):
        load_captions("held_out:run")
    load_captions("csv:t.csv:photos").save_to_disk(about.parent / "images")
    with pytest.raises(ValueError, match="Expected a column 'image_key'"):
        load_captions("held_out:run")


# --- what a model learned from ---------------------------------------------------------------------------------------


def hashes(*contents):
    return [hashlib.sha256(content).hexdigest() for content in contents]


def test_a_model_says_which_test_images_it_learned_from(tmp_path):
    write_trained_images(tmp_path, hashes(b"a", b"b", b"b", b"c"))
    assert np.load(tmp_path / TRAINED_IMAGES, allow_pickle=False).shape == (3, 16)
    trained = read_trained_images(tmp_path)
    assert trained.describe_overlap(hashes(b"x", b"y")) == "" and trained.describe_overlap([]) == ""
    one = f"1 of the 3 test images trained this model or chose its checkpoint ({tmp_path / TRAINED_IMAGES})"
    assert trained.describe_overlap(hashes(b"x", b"a", b"y")) == one
    assert trained.describe_overlap(hashes(b"x", b"a", b"a", b"y")).startswith("2 of the 4")  # as the benchmark counts
    assert trained.describe_overlap(hashes(b"b", b"a")).startswith("2 of the 2 test images trained")


def test_keys_are_told_apart_by_their_first_16_bytes(tmp_path):
    keys = [f"{number:02x}" * 15 + last + "ff" * 16 for number in range(256) for last in ("00", "01")]
    write_trained_images(tmp_path, keys[::2])
    assert read_trained_images(tmp_path).describe_overlap(keys[1::2]) == ""
    assert read_trained_images(tmp_path).describe_overlap(keys).startswith("256 of the 512 ")


def test_what_the_start_and_the_teacher_learned_from_counts_too(tmp_path):
    for name, keys, starts in (
        ("clip", hashes(b"a"), []),
        ("teacher", hashes(b"b"), [tmp_path / "clip", "openai/clip"]),
        ("student", [], [tmp_path / "teacher", tmp_path / "nowhere"]),
        ("unknown", [], ["openai/clip"]),
    ):
        (tmp_path / name).mkdir()
        write_trained_images(tmp_path / name, keys, starts)
    (tmp_path / "student" / "checkpoint-3").mkdir()
    for model in ("student", "student/checkpoint-3"):
        found = read_trained_images(tmp_path / model)
        assert found.describe_overlap(hashes(b"a", b"b", b"c")).startswith("2 of the 3")
    assert read_trained_images(tmp_path / "unknown") is None and read_trained_images("openai/clip") is None


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00"])
def test_a_damaged_file_of_keys_is_told_and_passed_over(tmp_path, content, caplog):
    (tmp_path / TRAINED_IMAGES).write_bytes(content)
    assert read_trained_images(tmp_path) is None and "whether images were trained on is not known" in caplog.text


def test_an_array_that_holds_no_keys_is_told_and_passed_over(tmp_path, caplog):
    np.save(tmp_path / TRAINED_IMAGES, np.zeros((3, 4)))
    assert read_trained_images(tmp_path) is None and "holds float64 of shape (3, 4), no keys" in caplog.text


def test_a_picture_is_known_from_a_table_a_folder_and_stored_bytes(kept):
    """Any reader gives the key of the file's bytes."""
    table, folder = load_captions("csv:t.csv:photos"), load_uncaptioned(["images:photos"], seed=0)
    files = [(kept / "photos" / f"{i}.png").read_bytes() for i in range(3)]
    rows = {"image": [{"bytes": one, "path": None} for one in files], "captions": [["a"]] * 3}
    Dataset.from_dict(rows).to_parquet("t.parquet")
    stored = load_captions("parquet:t.parquet")
    assert image_keys(table) == image_keys(folder) == image_keys(stored) == hashes(*files)
