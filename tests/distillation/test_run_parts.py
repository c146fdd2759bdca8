"""The test part in a run: no stage sees it, every arm and seed has the same, and its folder says which it is."""

import json
import logging

import pytest
import yaml
from datasets import Dataset, concatenate_datasets

import modeling_dclip.distillation.run as run_module
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.captions.parts import write_trained_images
from modeling_dclip.data.columns import image_keys
from modeling_dclip.data.images import UnreadableImageError, decode_image
from modeling_dclip.distillation.dmclip import _captioned_images
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.run import (
    KeyedRows,
    SharedData,
    check_batches,
    check_parts,
    find_test_part,
    keep_test_part,
    load_training_images,
    naming_unreadable,
    without_test,
)
from modeling_dclip.distillation.stages import student_keys

DATA = "scenes:train,n=20,image_size=32,captions_per_image=1"
RECIPE = {"train_datasets": [DATA], "train_fraction": 0.8, "test_fraction": 0.1, "clip_model": "none-needed"}


def recipe_of(folder, *words, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "run"), **changes}))
    return parse_recipe(words, path)


def test_three_parts_share_no_image(tmp_path):
    recipe, shared = recipe_of(tmp_path, "--student.eval_strategy", "epoch"), SharedData()
    parts = {**load_training_images(recipe, shared), "test": find_test_part(recipe.run, shared)}
    assert {name: len(part.rows) for name, part in parts.items()} == {"train": 16, "validation": 2, "test": 2}
    assert len(set().union(*(part.keys for part in parts.values()))) == 20
    for part in parts.values():
        assert part.keys == image_keys(part.rows)
    keep_test_part(recipe, shared)
    kept = load_captions(f"held_out:{tmp_path / 'run'}")
    assert kept["image_id"][:] == parts["test"].rows["image_id"][:] and "boxes" in kept.column_names
    assert json.loads((tmp_path / "run" / "held_out" / "held_out.json").read_text())["of"] == 20


def test_without_a_test_part_nothing_changes(tmp_path):
    recipe, shared = recipe_of(tmp_path, test_fraction=0), SharedData()
    assert find_test_part(recipe.run, shared) is None and len(load_training_images(recipe, shared)["train"].rows) == 16
    keep_test_part(recipe, shared)
    assert not (tmp_path / "run").exists()


def test_every_arm_and_seed_has_the_same_test_part(tmp_path):
    arms = {"a": {}, "b": {"student": {"temperature": 0.5}, "train_fraction": 0.5}}
    recipe = recipe_of(tmp_path, arms=arms, seeds=[0, 1], train_datasets=[f"{DATA}@10"])
    runs, tests, trained = expand_arms(recipe), set(), set()
    for run in runs:
        shared = SharedData()
        tests.add(tuple(find_test_part(run.recipe.run, shared).keys))
        trained |= set(load_training_images(run.recipe, shared)["train"].keys)
    [test] = tests
    assert len(test) == 1 and not trained & set(test)


def test_the_runs_of_an_experiment_keep_it_once(tmp_path):
    recipe, shared = recipe_of(tmp_path, seeds=[0, 1]), SharedData()
    keep_test_part(recipe, shared)
    for run in expand_arms(recipe):
        keep_test_part(run.recipe, shared)
    folder = tmp_path / "run" / "student" / "seed-1"
    folder.mkdir(parents=True)
    assert not (folder / "held_out").exists()
    one, other = (load_captions(f"held_out:{place}") for place in (folder, tmp_path / "run"))
    assert one["image_id"][:] == other["image_id"][:]


def test_a_folder_with_another_test_part_is_refused(tmp_path):
    keep_test_part(recipe_of(tmp_path), SharedData())
    other = recipe_of(tmp_path, test_fraction=0.2)
    with pytest.raises(ValueError, match="was made from other inputs .*test_fraction: 0.1 -> 0.2.*--overwrite true"):
        keep_test_part(other, SharedData())
    keep_test_part(recipe_of(tmp_path, "--overwrite", "true", test_fraction=0.2), SharedData())
    assert len(load_captions(f"held_out:{tmp_path / 'run'}")) == 4


def test_other_sources_lose_the_test_part_too(tmp_path):
    recipe, shared = recipe_of(tmp_path), SharedData()
    test = find_test_part(recipe.run, shared)
    other = load_captions(DATA)
    renamed = other.map(lambda row: {"image_id": f"other-{row['image_id']}"})
    left = without_test(KeyedRows(renamed, image_keys(renamed)), recipe.run, shared)
    assert len(left.rows) == 18 and left.keys == image_keys(left.rows) and not set(left.keys) & set(test.keys)
    reinforced = _captioned_images(recipe.run, 3, shared)[1].rows
    assert len(reinforced) == 18 and not set(image_keys(reinforced)) & set(test.keys)
    with pytest.raises(ValueError, match="is left of 2 images without the test part"):
        without_test(test, recipe.run, shared)


def test_uncaptioned_images_of_the_test_part_are_left_out(tmp_path):
    renamed = load_captions(DATA.replace("n=20", "n=24")).map(lambda row: {"image_id": f"other-{row['image_id']}"})
    renamed.save_to_disk(tmp_path / "more")
    student = {"cosine_distillation_loss_weight": 0, "cosine_preservation_loss_weight": 1}
    recipe = recipe_of(tmp_path, uncaptioned_datasets=[f"disk:{tmp_path / 'more'}"], student=student)
    images = load_training_images(recipe, SharedData())
    assert len(images["uncaptioned"].rows) == 4 and len(images["train"].rows) == 16


def test_copies_are_told_and_stay_together(tmp_path, caplog):
    scenes = load_captions(DATA)
    copies = scenes.map(lambda row: {"image_id": f"copy-{row['image_id']}"})
    concatenate_datasets([scenes, copies]).save_to_disk(tmp_path / "doubled")
    recipe = recipe_of(tmp_path, "--student.eval_strategy", "epoch", train_datasets=[f"disk:{tmp_path / 'doubled'}"])
    shared = SharedData()
    parts = {**load_training_images(recipe, shared), "test": find_test_part(recipe.run, shared)}
    sizes = {name: (len(part.rows), len(set(part.keys))) for name, part in parts.items()}
    assert sizes == {"train": (32, 16), "validation": (4, 2), "test": (4, 2)}
    assert "20 images are identical copies of another, e.g. copy-" in caplog.text


def test_the_stages_are_given_training_images_alone(tmp_path):
    assert set(load_training_images(recipe_of(tmp_path), SharedData())) == {"train"}


def test_two_runs_that_share_data_keep_it_both(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shared = SharedData()
    for name in ("one", "two"):
        keep_test_part(recipe_of(tmp_path, "--output_dir", str(tmp_path / name)), shared)
        assert len(load_captions(f"held_out:{tmp_path / name}")) == 2
        assert f"test part: 2 of 20 images, which no stage sees; held_out:{tmp_path / name} names them" in caplog.text
    assert "Each image is 50.0 points of R@1, so only a large difference shows. --train_fraction 0.5" in caplog.text


@pytest.mark.parametrize(("epochs", "told"), [(1, True), (3, False)])
def test_a_warm_up_that_takes_all_steps_is_told_before_targets_are_computed(epochs, told, tmp_path, caplog):
    words = ["--student.num_train_epochs", str(epochs), "--student.lr_scheduler_type", "cosine"]
    words += ["--student.warmup_steps", "0.1", "--student.per_device_train_batch_size", "12", "--stages", "student"]
    words += ["--student.learning_rate", f"{epochs}e-3"]  # a process says the same once
    recipe = recipe_of(tmp_path, *words)
    check_batches(recipe, load_training_images(recipe, SharedData()))
    assert ("warm-up (warmup_steps 0.1) takes all of the 1 step" in caplog.text) == told


def test_images_that_choose_the_checkpoint_have_a_say_in_the_student(tmp_path):
    shared, numbers = SharedData(), []
    for words in ((), ("--student.load_best_model_at_end", "false")):
        recipe = recipe_of(tmp_path, "--student.eval_strategy", "epoch", *words)
        images = load_training_images(recipe, shared)
        keys = student_keys(recipe.student, images)
        numbers.append(len(keys))
        assert set(images["train"].keys) <= set(keys) and not set(find_test_part(recipe.run, shared).keys) & set(keys)
    assert numbers == [18, 16]


def test_a_start_that_saw_test_images_is_told_once(tmp_path, caplog):
    recipe, shared = recipe_of(tmp_path, clip_model=str(tmp_path / "clip")), SharedData()
    test = find_test_part(recipe.run, shared)
    (tmp_path / "clip").mkdir()
    write_trained_images(tmp_path / "clip", [test.keys[0], "ab" * 32])
    for _ in range(2):
        keep_test_part(recipe, shared)
    [told] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith(
        f"test part: this run begins with '{tmp_path / 'clip'}', and 1 of the 2 test images trained this model or "
        "chose its checkpoint ("
    )
    caplog.clear()
    write_trained_images(tmp_path / "clip", ["ab" * 32])
    keep_test_part(recipe, SharedData())
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_fraction": 0.95}, r"train_fraction 0.95 and test_fraction 0.1 are more than all images. Set train_"),
        ({"train_fraction": 1.0}, r"train_fraction 1 and test_fraction 0.1 are more .* to at most 0.9, less if"),
        ({"test_fraction": 1}, r"test_fraction: expected a number from 0 and below 1, got '?1"),
        ({"arms": {"a": {"train_datasets": ["scenes:train,n=5"]}}}, "the arm 'a' sets train_datasets, but with test_"),
        ({"arms": {"a": {}, "b": {"test_fraction": 0}}}, "the arm 'b' sets test_fraction, but"),
        ({"train_datasets": ["held_out:x"]}, "train_datasets: expected images to train on, got the test part 'held_"),
        (
            {"dmclip": {"train_shards": "x.tar"}, "reinforce": {"teachers": ["x"]}},
            "test_fraction: the images of dmclip.train_shards are in the shards already",
        ),
    ],
)
def test_impossible_parts_are_refused_before_any_image_is_read(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        expand_arms(recipe_of(tmp_path, **changes))


def test_validation_needs_a_part_of_its_own(tmp_path):
    words = ("--student.eval_strategy", "epoch", "--train_fraction", "0.9")
    with pytest.raises(ValueError, match="train_fraction is 0.9 and test_fraction 0.1, which is all: set it below"):
        load_training_images(recipe_of(tmp_path, *words), SharedData())
    assert len(load_training_images(recipe_of(tmp_path, "--train_fraction", "0.9"), SharedData())["train"].rows) == 18


def write_damaged(folder, count):
    """Write the scenes with the first `count` cut off behind their header; the ids of these, and a recipe's fields."""
    scenes = load_captions(DATA).select_columns(["image_id", "image", "captions"])
    rows = scenes.with_format(None).to_dict()
    for image in rows["image"][:count]:
        image["bytes"] = image["bytes"][:150]
    Dataset.from_dict(rows, features=scenes.features).to_parquet(folder / "scenes.parquet")
    fields = {"train_datasets": [f"parquet:{folder}/scenes.parquet"], "train_fraction": 0.6, "test_fraction": 0.2}
    return set(rows["image_id"][:count]), {**fields, "student": {"eval_strategy": "epoch"}}


def parts_of(recipe, check=True):
    shared = SharedData()
    if check:
        check_parts(recipe, shared)
        keep_test_part(recipe, shared)
    return {**load_training_images(recipe, shared), "test": find_test_part(recipe.run, shared)}


def ids_of(part):
    return set(part.rows["image_id"][:])


@pytest.mark.parametrize("regions", [{}, {"detector": "grid:1x2"}])
def test_images_that_cannot_be_read_are_left_out_of_every_part_before_the_split(tmp_path, regions, caplog):
    bad, fields = write_damaged(tmp_path, 10)
    assert all(ids_of(part) & bad for part in parts_of(recipe_of(tmp_path, **fields), check=False).values())
    parts = parts_of(recipe_of(tmp_path, on_bad_image="skip", regions=regions, **fields))
    assert {name: len(part.rows) for name, part in parts.items()} == {"train": 6, "validation": 2, "test": 2}
    for part in parts.values():
        assert part.keys == image_keys(part.rows) and not ids_of(part) & bad
    report = json.loads((tmp_path / "run" / "train_datasets_report.json").read_text())
    assert (report["images"], report["skipped_images"]) == (20, 10)
    assert {one["image_id"] for one in report["skipped"]} == bad
    assert "train_datasets: left out 10 of 20 images that cannot be read, first: scenes-train-0-0, " in caplog.text


def test_a_copy_is_named_rightly_where_images_before_it_are_left_out(tmp_path, caplog):
    _, fields = write_damaged(tmp_path, 3)
    whole = load_captions(fields["train_datasets"][0])
    copy = whole.select([9]).map(lambda row: {"image_id": "copy"})
    Dataset.from_dict(
        concatenate_datasets([whole, copy]).with_format(None).to_dict(), features=whole.features
    ).to_parquet(tmp_path / "scenes.parquet")
    parts_of(recipe_of(tmp_path, on_bad_image="skip", **fields), check=False)
    assert f"1 image is an identical copy of another, e.g. copy of {whole['image_id'][9]};" in caplog.text


def test_a_second_start_takes_the_answer_of_the_first_one_for_the_same_images(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path, on_bad_image="skip", **write_damaged(tmp_path, 1)[1])
    first, looked = parts_of(recipe), []
    look = run_module.find_unreadable
    monkeypatch.setattr(run_module, "find_unreadable", lambda *words: looked.append(words) or look(*words))
    again = parts_of(recipe)
    assert not looked and {name: part.keys for name, part in again.items()} == {n: p.keys for n, p in first.items()}
    write_damaged(tmp_path, 2)
    assert len(parts_of(recipe, check=False)["train"].rows) == 10 and looked  # 0.6 of 18
    (tmp_path / "run" / "train_datasets_report.json").write_text("{")
    with pytest.raises(ValueError, match="train_datasets_report.json.*Delete it"):
        parts_of(recipe)


def test_a_bad_image_that_is_measured_has_all_of_every_part_named_before_anything_is_written(tmp_path):
    bad, fields = write_damaged(tmp_path, 10)
    recipe = recipe_of(tmp_path, **fields)
    parts = parts_of(recipe, check=False)
    assert (ids_of(parts["test"]) | ids_of(parts["validation"])) & bad and ids_of(parts["train"]) & bad
    message = "train_datasets: 10 of 20 images cannot be read: .*--on_bad_image skip .*Nothing was trained"
    with pytest.raises(ValueError, match=message) as caught:
        parts_of(recipe)
    assert all(f"{image_id} (stored bytes)" in str(caught.value) for image_id in bad)
    assert not (tmp_path / "run").exists()


def test_a_cut_image_that_is_only_trained_on_is_named_before_anything_is_written(tmp_path):
    (cut,), fields = write_damaged(tmp_path, 1)
    recipe = recipe_of(tmp_path, **fields | {"train_fraction": 1, "test_fraction": 0, "student": {}})
    with pytest.raises(ValueError, match=f"1 of 20 images cannot be read: {cut} .*Nothing was trained"):
        parts_of(recipe)
    assert not (tmp_path / "run").exists()


def test_a_bad_image_met_in_training_has_all_named_the_first_ten_with_their_reasons(tmp_path):
    bad, fields = write_damaged(tmp_path, 12)
    shared = SharedData()
    with pytest.raises(
        UnreadableImageError, match="12 of 20 images cannot be read: .*; and 2 more. Replace"
    ) as caught:
        with naming_unreadable(shared):
            rows = load_training_images(recipe_of(tmp_path, **fields), shared)["train"].rows
            for row in range(len(rows)):
                decode_image(rows, row)
    named = [image_id for image_id in bad if f"{image_id} (stored bytes): " in str(caught.value)]
    assert len(named) == 10 and str(caught.value).endswith("leaves such images out of every part.")


def test_a_bad_image_of_other_data_keeps_its_own_message(tmp_path):
    _, fields = write_damaged(tmp_path, 0)
    shared = SharedData()
    with pytest.raises(UnreadableImageError, match="^of a benchmark$"), naming_unreadable(shared):
        load_training_images(recipe_of(tmp_path, **fields), shared)
        raise UnreadableImageError("of a benchmark")


def test_a_small_validation_part_is_named_once_where_the_student_is_measured_on_it(tmp_path, caplog):
    _, fields = write_damaged(tmp_path, 0)
    line = "validation part: 4 of 20 images, which choose the checkpoint. Each image is 25.0 points of R@1"
    shared = SharedData()
    with caplog.at_level(logging.INFO):
        load_training_images(recipe_of(tmp_path, **{**fields, "student": {}}), shared)
        assert line not in caplog.text
        for seed in (0, 1):
            load_training_images(recipe_of(tmp_path, **fields, seed=seed), shared)
    assert caplog.text.count(line) == 1


def test_whole_images_have_the_same_parts_whether_bad_ones_are_skipped_or_not(tmp_path):
    _, fields = write_damaged(tmp_path, 0)
    one, other = (parts_of(recipe_of(tmp_path, on_bad_image=mode, **fields)) for mode in ("raise", "skip"))
    assert {name: part.keys for name, part in one.items()} == {name: part.keys for name, part in other.items()}
