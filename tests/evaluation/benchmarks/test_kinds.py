"""Benchmarks by name: known ones load, unknown ones are named."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_dclip.data.images import UnreadableImageError
from modeling_dclip.encoders.loading import load_pair
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


@pytest.mark.parametrize("benchmark", ["hessian=scenes:test", "efficiency", "retreival", "zero_shot=nope:a"])
def test_a_probe_only_embeds_and_is_checked_as_other_benchmarks(benchmark):
    with pytest.raises(ValueError, match=r"only embeds, of retrieval, .* got (hessian|efficiency)\.|nope|retreival"):
        benchmarks.check_probe(benchmark)
    assert benchmarks.check_probe("zero_shot=scenes:validation,n=9").split == "validation"


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("zero_shot=scenes:test", "zero_shot", True),
        ("zero_shot=scenes,seed=0", "zero_shot=scenes:test", True),
        ("zero_shot=scenes,n=9,seed=1", "zero_shot=scenes:test,seed=1,n=9", True),
        ("zero_shot=scenes:test,seed=1", "zero_shot=scenes:test", False),
        ("zero_shot=scenes:validation", "zero_shot=scenes:test", False),
        ("zero_shot=imagefolder:a/b", "zero_shot=imagefolder:./a/../a/b", True),
        ("zero_shot=imagefolder:a@10", "zero_shot=imagefolder:a", False),
        ("retrieval=held_out:run", "retrieval=held_out:./run/", True),
        ("retrieval=scenes:test", "diagnostics=scenes:test", False),
    ],
)
def test_one_benchmark_written_in_two_ways_is_found(one, other, is_same):
    assert benchmarks.find_reported(one, ["retrieval=scenes:validation", other]) == (other if is_same else None)


def test_a_set_of_a_suite_is_found_in_it(tmp_path):
    for name in ("wds_mnist_test", "wds_vtab-pets_test"):
        (tmp_path / name / "test").mkdir(parents=True)
        (tmp_path / name / "test" / "nshards.txt").write_text("1")
    suite = f"zero_shot=suite:{tmp_path}"
    assert benchmarks.find_reported(f"zero_shot=wds:{tmp_path}/wds_vtab-pets_test:test", [suite]) == suite
    assert benchmarks.find_reported(suite, [f"zero_shot=wds:{tmp_path}/wds_vtab-pets_test"]) is not None
    assert benchmarks.find_reported(f"zero_shot=wds:{tmp_path}/wds_vtab-pets_test:train", [suite]) is None


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
    loaded = benchmarks.load_benchmark(benchmark, benchmarks.EvaluationOptions(class_names=lines))
    return loaded.evaluate.keywords["evaluate"].keywords["class_names"]


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


@pytest.fixture
def damaged(tmp_path):
    """A table of three pictures with two captions each, the second one cut."""
    (tmp_path / "p").mkdir()
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "p" / f"{name}.png")
    whole = (tmp_path / "p" / "b.png").read_bytes()
    (tmp_path / "p" / "b.png").write_bytes(whole[: len(whole) // 2])
    lines = [f"{name}.png,{text} {name}" for name in "abc" for text in ("one", "two")]
    (tmp_path / "t.csv").write_text("image,caption\n" + "\n".join(lines) + "\n")
    return f"{tmp_path}/t.csv", f"{tmp_path}/p"


def test_pictures_that_cannot_be_read_are_named_by_line_and_file(damaged, tiny_clip_dir):
    table, folder = damaged
    benchmark = benchmarks.load_benchmark(f"retrieval=csv:{table}:{folder}")
    model, processor = load_pair(tiny_clip_dir)
    message = rf"1 of 3 images cannot be read: p/b.png \({table}:4, {folder}/b.png\): .*again with --on_bad_image skip"
    with pytest.raises(UnreadableImageError, match=message):
        benchmark.evaluate(benchmarks.EvaluationOptions(device="cpu").encoder(model, processor))


def test_pictures_that_cannot_be_read_are_left_out_counted_and_recorded(damaged, tiny_clip_dir, caplog):
    table, folder = damaged
    name, options = f"retrieval=csv:{table}:{folder}", benchmarks.EvaluationOptions(device="cpu", on_bad_image="skip")
    benchmark = benchmarks.load_benchmark(name, options)
    (note,) = benchmark.notes
    assert note.startswith(f"{name}: 1 of 3 images cannot be read: p/b.png ({table}:4, {folder}/b.png): ")
    assert note.endswith("; left out") and note in caplog.text
    model, processor = load_pair(tiny_clip_dir)
    result = benchmark.evaluate(options.encoder(model, processor))
    assert (result["n"], result["n_captions"]) == (2, 4)
    Path(folder, "b.png").unlink()
    rows = Path(table).read_text().splitlines()
    Path(table).write_text("\n".join([*rows[:3], *rows[5:]]) + "\n")
    assert benchmarks.load_benchmark(name).fingerprint == benchmark.fingerprint  # as if it had never been there


def test_pictures_with_labels_are_left_out_too(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (40, 40), "red").save(tmp_path / label / "a.png")
    (tmp_path / "cat" / "b.png").write_bytes((tmp_path / "cat" / "a.png").read_bytes()[:60])
    options = benchmarks.EvaluationOptions(on_bad_image="skip")
    benchmark = benchmarks.load_benchmark(f"zero_shot=imagefolder:{tmp_path}", options)
    assert "1 of 3 images cannot be read" in benchmark.notes[0] and "cat/b.png" in benchmark.notes[0]
    for label in ("cat", "dog"):
        (tmp_path / label / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="left of .* after leaving out 3 images that cannot be read"):
        benchmarks.load_benchmark(f"zero_shot=imagefolder:{tmp_path}", options)
