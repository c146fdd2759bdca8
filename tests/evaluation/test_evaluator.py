"""Evaluations that go on, lose nothing to a failure, and compare with an anchor."""

import threading
import time

import pytest
import torch

from modeling_dclip.data.captions.parts import TRAINED_IMAGES, read_trained_images, write_trained_images
from modeling_dclip.data.images import UnreadableImageError
from modeling_dclip.encoders.fingerprints import hash_bytes
from modeling_dclip.evaluation import evaluator, records
from modeling_dclip.evaluation.benchmarks.kinds import Benchmark
from modeling_dclip.evaluation.evaluator import Candidate, Probes, evaluate
from modeling_dclip.evaluation.line import Line
from modeling_dclip.evaluation.records import outcomes_path, read_outcomes, read_results, write_results
from modeling_dclip.evaluation.reports.tables import render_table


@pytest.fixture
def world(monkeypatch):
    """Models that are one number, benchmarks that threshold it; counts what is evaluated."""
    calls = []

    def load_model(name, *, trust_remote_code=False):
        if name == "broken":
            raise OSError("broken: no weights there")
        model = torch.nn.Linear(1, 1, bias=False)
        model.load_state_dict({"weight": torch.tensor([[{"anchor": 0.2, "student": 0.6}[name]]])})
        return model, None, f"sha256:{name}"

    def load_benchmark(name, options):
        if name == "zero_shot=missing":
            raise FileNotFoundError("no such data")

        def score(encoder):
            model = encoder.model
            calls.append((name, round(model.weight.item(), 3)))
            if name == "retrieval=fatal" and model.weight.item() > 0.5:
                raise RuntimeError("out of memory")
            if name == "retrieval=damaged":
                raise UnreadableImageError("one picture")
            if name == "zero_shot=bug":
                raise AssertionError("a bug")
            hits = (torch.arange(10) / 10 < model.weight).double().flatten()
            metric = "top1" if name.startswith("zero_shot") else "text_to_image_recall@1"
            outcomes = {metric: torch.stack([hits, torch.ones(10)], dim=1).double()}
            if name == "efficiency":
                return {"image_latency_ms": 3.0, "n": 1}
            return {metric: float(hits.mean()), "n": 10, "outcomes": outcomes}

        return Benchmark(name, "test", f"sha256:{name}", score, {})

    monkeypatch.setattr(evaluator, "load_dual_encoder", load_model)
    monkeypatch.setattr(evaluator, "load_benchmark", load_benchmark)
    return calls


BENCHMARKS = ["retrieval=a", "zero_shot=b"]


def test_the_anchor_comes_first_and_the_others_are_compared_with_it(world, tmp_path):
    done = evaluate([Candidate("student", "ours")], BENCHMARKS, tmp_path / "r.json", anchor="anchor", command="c")
    assert [record["model"] for record in done.records] == ["anchor", "anchor", "student", "student"]
    assert read_results(tmp_path / "r.json") == done.records and done.failures == [] and done.kept == 0
    retrieval, zero_shot = done.records[2:]
    assert retrieval["comparison"]["text_to_image_recall@1_gain"]["estimate"] == pytest.approx(2)
    assert zero_shot["comparison"]["top1_retention"]["estimate"] == pytest.approx(3)
    assert zero_shot["comparison"]["anchor_revision"] == "sha256:anchor" and zero_shot["label"] == "ours"
    assert zero_shot["intervals"]["top1"]["low"] < 0.6 < zero_shot["intervals"]["top1"]["high"]
    assert "comparison" not in done.records[0]


def test_a_second_run_evaluates_only_what_is_not_there(world, tmp_path):
    evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json")
    evaluate([Candidate("anchor")], ["efficiency"], tmp_path / "r.json")
    world.clear()
    models = [Candidate("student", "new name"), Candidate("anchor")]
    done = evaluate(models, [*BENCHMARKS, "efficiency"], tmp_path / "r.json")
    assert sorted(world) == [
        ("efficiency", 0.6),
        ("retrieval=a", 0.2),
        ("zero_shot=b", 0.2),
        ("zero_shot=b", 0.6),
    ]
    assert done.kept == 2 and len(done.records) == 6 and done.records[0]["label"] == "new name"
    world.clear()
    evaluate(models, BENCHMARKS, tmp_path / "r.json", overwrite=True)
    assert len(world) == 4 and len(read_results(tmp_path / "r.json")) == 4


def test_a_record_says_that_the_model_was_trained_on_its_images(world, tmp_path, monkeypatch, caplog):
    keys = [hash_bytes(str(number)) for number in range(10)]
    write_trained_images(tmp_path, keys[:4])
    monkeypatch.setattr(evaluator, "read_trained_images", lambda name: read_trained_images(tmp_path / name))
    load = evaluator.load_benchmark
    monkeypatch.setattr(
        evaluator,
        "load_benchmark",
        lambda name, options: load(name, options)._replace(image_keys=lambda: keys[2:], notes=("of a run",)),
    )
    (tmp_path / "student").mkdir()  # a checkpoint of the model there
    models = [Candidate("student", "ours"), Candidate("anchor")]
    for _ in range(2):  # measured, and kept
        done = evaluate(models, BENCHMARKS[:1], tmp_path / "r.json")
        trained = f"2 of the 8 test images trained this model or chose its checkpoint ({tmp_path / TRAINED_IMAGES})"
        assert [record.get("notes") for record in done.records] == [
            ["of a run", f"retrieval=a, ours: {trained}"],
            ["of a run"],
        ]
        assert [record.get("n_trained_on") for record in done.records] == [2, None]
        assert read_results(tmp_path / "r.json") == done.records
    assert f"retrieval=a: {trained}" in caplog.text
    assert f"ours: {trained}." in render_table(done.records)
    (tmp_path / TRAINED_IMAGES).unlink()
    done = evaluate(models[:1], BENCHMARKS[:1], tmp_path / "r.json")
    assert done.kept == 1 and done.records[0]["notes"] == ["of a run"]
    assert "n_trained_on" not in done.records[0]


def test_what_an_index_finds_stays_beside_what_exact_search_finds(world, tmp_path, monkeypatch):
    evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json")
    load = evaluator.load_benchmark
    monkeypatch.setattr(
        evaluator, "load_benchmark", lambda name, options: load(name, options)._replace(settings={"index": "faiss"})
    )
    evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json")
    assert [record.get("settings") for record in read_results(tmp_path / "r.json")] == [None, {"index": "faiss"}]


def test_other_seeds_and_other_models_stay_in_the_file_unless_told(world, tmp_path):
    evaluate([Candidate("student", seed=1)], BENCHMARKS[:1], tmp_path / "r.json")
    evaluate([Candidate("student", seed=2)], BENCHMARKS[:1], tmp_path / "r.json")
    assert [record["seed"] for record in read_results(tmp_path / "r.json")] == [1, 2]
    done = evaluate([Candidate("anchor")], BENCHMARKS[:1], tmp_path / "r.json", keep_others=False)
    assert read_results(tmp_path / "r.json") == done.records and len(read_outcomes(tmp_path / "r.json")) == 1


def test_a_record_killed_before_its_outcomes_is_measured_again(world, tmp_path):
    evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json")
    outcomes_path(tmp_path / "r.json").unlink()
    done = evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json")
    assert done.kept == 0 and len(world) == 2 and len(read_outcomes(tmp_path / "r.json")) == 1


def test_what_fails_is_reported_and_the_rest_is_kept(world, tmp_path):
    benchmarks = ["zero_shot=missing", "retrieval=fatal", *BENCHMARKS]
    done = evaluate([Candidate("broken"), Candidate("student")], benchmarks, tmp_path / "r.json", anchor="anchor")
    assert done.failures == [
        "zero_shot=missing: FileNotFoundError: no such data",
        "broken: OSError: broken: no weights there",
        "student on retrieval=fatal: RuntimeError: out of memory",
    ]
    assert [record["benchmark"] for record in read_results(tmp_path / "r.json")] == [*benchmarks[1:], *BENCHMARKS]


def test_nothing_is_loaded_where_no_benchmark_is(world, tmp_path):
    done = evaluate([Candidate("broken")], ["zero_shot=missing"], tmp_path / "r.json")
    assert len(done.failures) == 1 and not (tmp_path / "r.json").exists()


def test_a_bug_is_not_taken_for_bad_data(world, tmp_path):
    with pytest.raises(AssertionError, match="a bug"):
        evaluate([Candidate("student")], ["retrieval=a", "zero_shot=bug"], tmp_path / "r.json")
    assert len(read_results(tmp_path / "r.json")) == 1


def test_points_on_the_line_are_measured_and_say_which(world, tmp_path):
    candidates = [Candidate("student", alpha=0.5), Candidate("student")]
    done = evaluate(candidates, BENCHMARKS, tmp_path / "r.json", anchor="anchor")
    middle = done.records[2]
    assert middle["condition"] == "alpha=0.5" and middle["settings"]["alpha"] == 0.5
    assert middle["metrics"]["text_to_image_recall@1"] == 0.4 and ("retrieval=a", 0.4) in world
    world.clear()
    assert evaluate(candidates, BENCHMARKS, tmp_path / "r.json", anchor="anchor").kept == 6 and world == []
    with pytest.raises(ValueError, match="anchor to interpolate from"):
        evaluate(candidates, BENCHMARKS, tmp_path / "r.json")


def test_pictures_that_cannot_be_read_are_told_once(world, tmp_path):
    done = evaluate([Candidate("student")], ["retrieval=damaged", "zero_shot=b"], tmp_path / "r.json", anchor="anchor")
    assert done.failures == ["retrieval=damaged: UnreadableImageError: one picture"]
    assert [name for name, _ in world] == ["retrieval=damaged", "zero_shot=b", "zero_shot=b"]


def test_points_count_to_what_training_reached(world, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "find_line", lambda *ends: Line(0.5, "alpha counts to 1", None, True))
    candidates = [Candidate("student", alpha=0.75)]
    done = evaluate(candidates, ["retrieval=a"], tmp_path / "r.json", anchor="anchor")
    assert world[-1] == ("retrieval=a", 0.8)  # half of the way is 0.4
    assert done.records[-1]["settings"].items() >= {"alpha": 0.75, "student_alpha": 0.5}.items()
    assert done.records[-1]["notes"] == ["alpha counts to 1"] and "notes" not in done.records[0]
    monkeypatch.setattr(evaluator, "find_line", lambda *ends: Line(1, "alpha counts to 1", None, True))
    assert evaluate(candidates, ["retrieval=a"], tmp_path / "r.json", anchor="anchor").kept == 1  # the anchor's
    assert world[-1] == ("retrieval=a", 0.5)


def test_a_file_that_is_no_results_file_is_not_touched(world, tmp_path):
    (tmp_path / "r.json").write_text("mine")
    with pytest.raises(ValueError, match=r"Expected JSON in the results file '.*r.json', got"):
        evaluate([Candidate("student")], BENCHMARKS, tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == "mine" and world == []


def test_one_damaged_set_of_a_suite_does_not_lose_the_others(world, tmp_path, monkeypatch):
    members = ["zero_shot=b", "zero_shot=missing", "zero_shot=c"]
    monkeypatch.setattr(evaluator, "expand_benchmark", lambda name: members)
    done = evaluate([Candidate("student")], ["zero_shot=suite:d"], tmp_path / "r.json")
    assert [record["benchmark"] for record in done.records] == [members[0], members[2]]
    assert done.failures == ["zero_shot=missing: FileNotFoundError: no such data"]


def test_two_runs_at_once_keep_each_others_records(world, tmp_path, monkeypatch):
    load = evaluator.load_benchmark

    def load_slowly(name, options):
        benchmark = load(name, options)

        def evaluate_while_another_runs(encoder):
            if name == "retrieval=a" and encoder.model.weight.item() > 0.5:
                evaluate([Candidate("anchor")], BENCHMARKS, tmp_path / "r.json")
            return benchmark.evaluate(encoder)

        return benchmark._replace(evaluate=evaluate_while_another_runs)

    monkeypatch.setattr(evaluator, "load_benchmark", load_slowly)
    evaluate([Candidate("student")], BENCHMARKS, tmp_path / "r.json")
    models = [record["model"] for record in read_results(tmp_path / "r.json")]
    assert models == ["anchor", "anchor", "student", "student"] and len(read_outcomes(tmp_path / "r.json")) == 4
    evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json", overwrite=True)
    assert [record["model"] for record in read_results(tmp_path / "r.json")] == ["student"]


def test_the_lock_on_a_folder_of_results_lets_one_in_at_a_time(tmp_path):
    order = []

    def write(name):
        with records._alone_in(tmp_path):
            order.append(name)
            time.sleep(0.05)
            order.append(name)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"])


def test_results_that_could_not_be_written_stop_it_before_any_work(world, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "r.json"):
        with pytest.raises(OSError, match=f"Expected a place to write the results file {output} to, got"):
            evaluate([Candidate("student")], BENCHMARKS, output)
    assert world == []


def test_results_that_can_not_be_written_any_more_are_a_failure(world, tmp_path, monkeypatch):
    def fill_disk(path, records):
        if records[-1]["benchmark"] == "retrieval=a":
            raise OSError("No space left on device")
        write_results(path, records)

    monkeypatch.setattr(records, "write_results", fill_disk)
    done = evaluate([Candidate("student")], BENCHMARKS, tmp_path / "r.json")
    assert done.failures == ["student on retrieval=a: OSError: No space left on device"]
    assert [record["benchmark"] for record in done.records] == ["zero_shot=b"]


def test_the_same_weights_from_another_place_have_their_own_label_and_outcomes(world, tmp_path, monkeypatch):
    load = evaluator.load_dual_encoder
    monkeypatch.setattr(evaluator, "load_dual_encoder", lambda name, **options: load("student", **options))
    evaluate([Candidate("student", "first")], BENCHMARKS[:1], tmp_path / "r.json")
    done = evaluate([Candidate("copy")], BENCHMARKS[:1], tmp_path / "r.json")
    assert done.kept == 1 and "label" not in done.records[0]
    monkeypatch.setattr(evaluator, "load_dual_encoder", load)
    monkeypatch.setattr(
        evaluator, "load_dual_encoder", lambda name, **options: load({"copy": "anchor"}.get(name, name), **options)
    )
    evaluate([Candidate("copy")], BENCHMARKS[:1], tmp_path / "r.json")  # trained again
    assert len(read_outcomes(tmp_path / "r.json")) == 2
    assert evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json").kept == 1


def test_what_a_killed_run_left_half_written_is_removed(world, tmp_path):
    for name in (".r.json.a1b2c3d4.modeling_dclip", ".r.json.backup-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.json").write_text("[")
    (tmp_path / ".r.json.a1b2c3d4.modeling_dclip" / ".in_use").touch()  # locked by nobody
    evaluate([Candidate("student")], BENCHMARKS[:1], tmp_path / "r.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".r.json.backup-of-mine",
        "r.json",
        "r.outcomes.safetensors",
    ]


def test_a_probe_measures_what_evaluate_does_and_loads_its_data_once(tiny_clip_dir, tmp_path, monkeypatch):
    names = ["zero_shot=scenes:validation,n=64,image_size=32", "retrieval=scenes:test,n=8,image_size=32"]
    done = evaluate([Candidate(str(tiny_clip_dir))], names, tmp_path / "results.json")
    expected = {one["benchmark"]: one["metrics"] for one in done.records}
    loaded, load = [], evaluator.load_benchmark
    monkeypatch.setattr(evaluator, "load_benchmark", lambda *given: loaded.append(given[0]) or load(*given))
    probes = Probes()
    probe, (model, processor) = probes(names), evaluator.load_dual_encoder(tiny_clip_dir)[:2]
    model.train()
    for _ in range(2):
        found = probe(model, processor)
        assert list(found) == names and list(found[names[0]]) == ["top1"]
        assert list(found[names[1]]) == ["text_to_image_recall@1", "image_to_text_recall@1"]
        for name, metrics in found.items():
            assert metrics == {metric: expected[name][metric] for metric in metrics}
    assert model.training and len(probes(names[1:]).image_keys()) == 8
    assert loaded == names
