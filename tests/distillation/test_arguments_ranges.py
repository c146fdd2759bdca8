"""Every number of a recipe has a range, which is checked before any work and named with its field."""

import dataclasses
import math
import typing

import pytest

from modeling_dclip.data.specs import Range, range_of
from modeling_dclip.distillation.arguments import INHERITED_RANGES, SECTIONS, RunArguments
from modeling_dclip.distillation.recipes import describe_fields, expand_arms, parse_recipe

KINDS = {"": RunArguments, **SECTIONS}


def is_number(hint):
    """Whether an annotation is a number, a list of numbers, or either of these or nothing."""
    parts = {hint, *typing.get_args(hint)}
    return bool({int, float, list[int], list[float]} & parts) and bool not in parts


def numbers():
    for section, kind in KINDS.items():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init and is_number(hints[field.name]):
                yield f"{section}.{field.name}".lstrip("."), range_of(field, INHERITED_RANGES)


NUMBERS = dict(numbers())


def refused(words, path=None):
    with pytest.raises(ValueError) as raised:
        expand_arms(parse_recipe(words, path))
    return str(raised.value)


def test_every_number_has_a_range():
    assert len(NUMBERS) > 150 and [key for key, allowed in NUMBERS.items() if not isinstance(allowed, Range)] == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-7", "9" * 5000, "2.5e19", "yes", ""])
def test_a_number_outside_its_range_is_one_line_with_its_field(value):
    for key, allowed in NUMBERS.items():
        told = refused([f"--{key}={value}"])
        assert told.startswith(f"{key}: expected {allowed}, got '{value[:50]}") and len(told) < 250


@pytest.mark.parametrize(("text", "shown"), [(".nan", "nan"), (".inf", "inf"), ("-7", "-7"), ("yes", "true")])
def test_a_number_of_a_file_is_checked_as_one_of_the_command_line(tmp_path, text, shown):
    path = tmp_path / "recipe.yaml"
    for key in ("student.learning_rate", "student.max_steps", "teacher.num_region_layers", "targets.batch_size"):
        path.write_text("{}: {{{}: {}}}\n".format(*key.split("."), text))
        assert refused([], path) == f"{key}: expected {NUMBERS[key]}, got '{shown}'."


def test_a_whole_number_is_no_fraction_and_a_number_of_steps_is_whole_or_a_share():
    assert refused(["--seed", "2.5"]) == "seed: expected an integer from 0 to 4294967295, got '2.5'."
    assert "whole, or a share of all steps below 1), got '2.5'" in refused(["--student.save_steps", "2.5"])
    assert parse_recipe(["--student.save_steps", "0.25"]).student.save_steps == 0.25


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student.temperature", "0"),
        ("student.temperature", "1e-30"),
        ("student.similarity_temperature", "0"),
        ("teacher.attention_temperature", "0"),
        ("student.cosine_distillation_loss_weight", "1e39"),
        ("teacher.num_train_epochs", "0"),
        ("student.max_steps", "0"),
        ("student.max_steps", "-5"),
        ("student.save_steps", "0"),
        ("student.dataloader_num_workers", "1000"),
        ("targets.num_workers", "1000"),
        ("teacher.num_region_layers", "100000"),
        ("student.learning_rate", "1e30"),
        ("reinforce.magnitude", "31"),
    ],
)
def test_what_trained_nothing_or_hung_is_refused(key, value):
    assert refused([f"--{key}", value]) == f"{key}: expected {NUMBERS[key]}, got '{value}'."


def test_the_numbers_that_mean_something_are_taken():
    recipe = parse_recipe(["--student.max_steps", "-1", "--student.learning_rate", "1e-5", "--train_fraction", "0.5"])
    assert (recipe.student.max_steps, recipe.student.learning_rate, recipe.run.train_fraction) == (-1, 1e-5, 0.5)


def test_an_arms_numbers_and_seeds_are_checked_before_any_work(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("arms: {one: {}, two: {student: {temperature: .nan}}}\n")
    assert refused([], path).startswith("student.temperature: expected a number from 0.0001 to 10000, got 'nan'")
    path.write_text("seeds: [1, 5000000000]\n")
    assert refused([], path) == "seeds: expected an integer from 0 to 4294967295, got '5000000000'."
    path.write_text("seeds: [1, 1]\n")
    assert "seeds: expected different seeds" in refused([], path)
    path.write_text("alphas: [0.5]\nevaluate: ['retrieval=scenes:test']\n")
    assert refused([], path).startswith("alphas: expected evaluate and several arms or seeds beside it")
    path.write_text("seeds: [0, 1]\nalphas: [1.5]\nevaluate: ['retrieval=scenes:test']\n")
    assert refused([], path) == "alphas: expected a number from 0 to 1, got '1.5'."


@pytest.mark.parametrize("value", [True, math.nan, "1", [1.0], None])
def test_a_value_that_python_gives_is_checked_too(value):
    with pytest.raises(ValueError, match=r"^student.temperature: expected a number from 0.0001 to 10000, got "):
        SECTIONS["student"](output_dir="x", temperature=value)


def test_the_help_says_the_ranges():
    text = " ".join(describe_fields().split())
    for key in ("student.temperature", "targets.batch_size", "seed"):
        assert f"Expected: {NUMBERS[key]}." in text.split(f"--{key} (default")[1].split(" --")[0]
    assert "adam_beta1: a number from 0 and below 1;" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: {temperature: [0.1]}", r"student.temperature: expected one value, got a list: \[0.1\]"),
        ("student: {temperature: {a: 1}}", "student.temperature: expected one value, got a mapping"),
        ("clip_model: [a, b]", "clip_model: expected one value, got a list"),
        ("train_datasets: [[a], b]", r"train_datasets: expected a list of single values, got \['a'\] in it"),
        ("train_datasets: [null, b]", "train_datasets: expected a list of single values, got None in it"),
        ("student: {freeze: ['re:([']}", "Freeze pattern 're:.*expected a regular expression"),
        ("student: {report_to: tensorboad}", "report_to: expected trackers, of .*tensorboard.*, got 'tensorboad'"),
        ("student: {accelerator_config: {a: 1}}", "Recipe, student: expected fields that transformers.*'a'"),
    ],
)
def test_a_value_of_another_form_is_told(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_recipe([], tmp_path / "recipe.yaml")


def test_none_unsets_arms(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("arms: {one: {}, two: {}}\nanchor: {vision_config: {patch_size: 8}}\n")
    assert len(expand_arms(parse_recipe([], path))) == 2
    (only,) = expand_arms(parse_recipe(["--arms", "none", "--anchor.vision_config", "none"], path))
    assert only.arm == "student" and only.recipe.anchor.vision_config == {}
