"""A results file whose numbers or dates cannot be is refused with file, record and field."""

import json
import math

import pytest
from fixtures.records import make_test_record

from modeling_dclip.evaluation.records import MOST_RESULTS_BYTES, read_results


def broken(**changes):
    return make_test_record() | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"created": "yesterday"}, "Expected a time as .* in the field 'created' of .*, got 'yesterday'"),
        ({"created": "2025-13-01T00:00:00"}, "'created'"),
        ({"n": 0}, "Expected an integer from 1 in the field 'n' of .*, got 0"),
        ({"n": -3}, "'n'"),
        ({"n": "12"}, "Expected int in the field 'n'"),
        ({"n": 2**80}, "'n'"),
        ({"seed": -1}, "'seed'"),
        (
            {"metrics": {"text_to_image_recall@1": 250}},
            "Expected a share .* in 'metrics' / .*recall@1.*, got 250",
        ),
        ({"metrics": {"text_to_image_recall@1": -3}}, "Expected a share from 0 to 1"),
        ({"metrics": {"top1": 1.2}}, "Expected a share from 0 to 1"),
        ({"metrics": {"rsum": math.nan}}, "Expected a finite number in 'metrics' / 'rsum'"),
        ({"metrics": {"rsum": math.inf}}, "Expected a finite number in 'metrics' / 'rsum'"),
        ({"metrics": {"rsum": "5"}}, "Expected a finite number in 'metrics' / 'rsum'"),
        ({"metrics": {"rsum": True}}, "Expected a finite number in 'metrics' / 'rsum'"),
        ({"metrics": {}}, "Expected one or more metrics in the field 'metrics'"),
        ({"metrics": []}, "Expected dict in the field 'metrics'"),
        ({"chance": {"top1": 7}}, "Expected a share from 0 to 1 in 'chance' / 'top1'"),
        ({"draws": {"top1": 7}}, "Expected a list in 'draws' / 'top1'"),
        ({"draws": {"rsum": [1.0, math.nan]}}, "Expected a finite number in 'draws' / 'rsum'"),
        ({"intervals": {"rsum": [1, 2]}}, "Expected an object in 'intervals' / 'rsum'"),
        (
            {"intervals": {"rsum": {"estimate": math.nan}}},
            "finite number in 'intervals' / 'rsum' / 'estimate'",
        ),
        ({"format_version": 7}, "Expected 'format_version' 1 in .*, got 7"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_file_record_and_field(tmp_path, changes, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([make_test_record(), broken(**changes)]))
    with pytest.raises(ValueError, match=message) as raised:
        read_results(path)
    assert f"record 1 of {path}" in str(raised.value)


def test_a_run_keeps_a_record_that_no_page_shows(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([broken(created="x", n=0)]))
    assert read_results(path, shown=False) == [json.loads(path.read_text())[0]]


def test_a_whole_record_is_read(tmp_path):
    path = tmp_path / "results.json"
    whole = broken(
        metrics={"text_to_image_recall@1": 1.0, "rsum": 600.0},
        intervals={"rsum": {"estimate": 600.0, "low": None, "high": 600.0, "confidence": 0.95, "covers": "images"}},
    )
    path.write_text(json.dumps([whole]))
    assert read_results(path) == [whole]


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", "[" * 100_000, "[{]"])
def test_a_file_that_is_no_results_file_is_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        read_results(path)


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "results.json"
    with path.open("wb") as file:
        file.truncate(MOST_RESULTS_BYTES + 1)
    with pytest.raises(ValueError, match="Expected a results file of at most 256 MiB at .*results.json, got 256 MiB"):
        read_results(path)
