"""Averages of the suite as a table."""

import pytest

from modeling_dclip.evaluation.reports.tables import render_averages


def record(model, name, top1, **fields):
    metrics = {"top1": top1, "top5": top1 + 0.2}
    return {"model": model, "benchmark": f"zero_shot=wds:data/wds_{name}:test", "metrics": metrics, **fields}


def test_every_model_has_its_averages_and_says_over_how_many_sets():
    records = [record("m", "mnist", 0.3), record("m", "cars", 0.5), record("n", "mnist", 0.7, label="ours")]
    records += [record("m", "mnist", 0.1, condition="alpha=0.5")]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in render_averages(records).splitlines()]
    assert ["m", "suite_38", "40.0", "2 of 38"] in lines and ["m", "dmclip_23", "60.0", "2 of 23"] in lines
    assert ["ours", "suite_38", "70.0", "1 of 38"] in lines
    assert ["m, alpha=0.5", "suite_38", "10.0", "1 of 38"] in lines
    assert not any("vtab_13" in line for line in lines)  # none of its sets was measured


def test_splits_are_averaged_apart_and_one_set_twice_is_refused():
    records = [record("m", "mnist", 0.3, split="test"), record("m", "mnist", 0.5, split="train")]
    lines = render_averages(records).splitlines()
    assert any("m, test" in line and "30.0" in line for line in lines)
    assert any("m, train" in line and "50.0" in line for line in lines)
    with pytest.raises(ValueError, match="one record of 'mnist'"):
        render_averages([records[0], records[0]])


def test_other_benchmarks_have_no_averages():
    assert render_averages([{"model": "m", "benchmark": "zero_shot=scenes:test", "metrics": {"top1": 0.5}}]) == ""
