"""Benchmarks by name: known ones load, unknown ones are named."""

import pytest
import torch
from PIL import Image

from modeling_dclip.evaluation.benchmarks import kinds as benchmarks
from modeling_dclip.evaluation.records import Environment


def test_an_unknown_benchmark_is_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown benchmark 'imagenet'; known benchmarks: retrieval\[=SPEC\], diagnostics"
    ):
        benchmarks.load_benchmark("imagenet=x")


@pytest.mark.parametrize("benchmark", ["retrieval", "zero_shot=suite:nowhere", "retrieval=coco:a:b", "efficiency"])
def test_a_benchmark_is_checked_without_its_data(benchmark):
    benchmarks.check_benchmark(benchmark)


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        ("retreival", "unknown benchmark 'retreival'"),
        ("retrieval=nope", "Unknown kind 'nope'"),
        ("zero_shot=scenes,a=b", "Unknown option 'a'"),
    ],
)
def test_a_wrong_benchmark_is_said_before_its_data_are_read(benchmark, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.check_benchmark(benchmark)


def test_a_record_holds_the_metrics_and_where_they_come_from():
    benchmark = benchmarks.load_benchmark("retrieval=scenes:test,n=4,image_size=40@3")
    fields = {"model": "m", "seed": 1, "revision": "sha256:0", "command": "c"}
    record = benchmarks.benchmark_record(
        benchmark, {"text_to_image_recall@1": 0.5, "n": 3, "n_captions": 15}, **fields
    )
    assert record["metrics"] == {"text_to_image_recall@1": 0.5}
    assert (record["n"], record["split"], record["n_captions"]) == (3, "test", 15)
    assert record["dataset_fingerprint"] == benchmark.fingerprint


def test_many_questions_about_one_image_have_no_interval():
    benchmark = benchmarks.load_benchmark("fine_grained=scenes:test,n=1,image_size=40")
    result = {"accuracy": 0.5, "n": 4, "outcomes": {"accuracy": torch.tensor([[2.0, 4.0]])}}
    record = benchmarks.benchmark_record(benchmark, result, model="m", seed=0, revision="sha256:0", command="c")
    assert record["metrics"] == {"accuracy": 0.5} and "intervals" not in record


def test_the_hessian_takes_only_options_of_its_own():
    spec = "hessian=scenes:test,n=2,image_size=40"
    for option in ("seed", "batch_size", "device"):
        with pytest.raises(ValueError, match=f"options of the Hessian alone, got '{option}'.*use --{option}"):
            benchmarks.load_benchmark(spec, benchmarks.EvaluationOptions(hessian={option: "1"}))
    with pytest.raises(ValueError, match="Expected an integer for the option 'steps'.*got 'abc'"):
        benchmarks.load_benchmark(spec, benchmarks.EvaluationOptions(hessian={"steps": "abc"}))


def test_costs_of_another_machine_are_another_measurement(monkeypatch):
    settings = benchmarks.load_benchmark("efficiency").settings
    monkeypatch.setattr(benchmarks, "environment", lambda: Environment({}, {"cpu": "another"}))
    assert settings and benchmarks.load_benchmark("efficiency").settings != settings


def names_of(benchmark, lines):
    return benchmarks.load_benchmark(benchmark, benchmarks.EvaluationOptions(class_names=lines)).evaluate.keywords[
        "class_names"
    ]


def test_class_names_are_joined_with_folders_by_key_name_or_number_and_else_by_place_in_the_log(tmp_path, caplog):
    for folder in ("words/red", "words/blue", "numbers/9", "numbers/10", "numbers/8"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
    words, numbers = f"zero_shot=imagefolder:{tmp_path}/words", f"zero_shot=imagefolder:{tmp_path}/numbers"
    assert names_of(words, ["red\tcrimson", "blue\tnavy"]) == ["navy", "crimson"]
    assert names_of(words, ["red", "blue"]) == ["blue", "red"]
    assert names_of(numbers, [f"no {n}" for n in range(1, 11)]) == ["no 8", "no 9", "no 10"]
    caplog.clear()
    assert names_of(words, ["navy", "crimson"]) == ["navy", "crimson"]
    assert "joined with the classes by place: blue = 'navy', red = 'crimson'" in caplog.text


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        ("retrieval=coco:nowhere.json:nowhere", "nowhere.json"),
        ("zero_shot=parquet:nowhere/*.parquet", "nowhere"),
        ("fine_grained=json:nowhere.json:nowhere", "nowhere"),
        ("zero_shot=suite:nowhere", "No folder 'nowhere'"),
        ("retrieval=scenes:tset", "tset"),
        ("retrieval=scenes:test,m=3", "Unknown option 'm'"),
        ("zero_shot=scenes:tset", "tset"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_told_before_any_model(benchmark, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        benchmarks.read_benchmark(benchmark)


def test_a_run_may_name_its_own_test_part_before_it_is_there(tmp_path):
    benchmarks.read_benchmark(f"retrieval=held_out:{tmp_path}", begins=str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError)):
        benchmarks.read_benchmark(f"retrieval=held_out:{tmp_path}", begins=str(tmp_path / "other"))
    benchmarks.read_benchmark("efficiency")
