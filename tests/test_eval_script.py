"""`eval.py` evaluates stock CLIP and DCLIP folders, compares with an anchor, and refuses what it does not know."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoProcessor

from modeling_dclip import DCLIPModel
from modeling_dclip.evaluation.records import read_results

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
BENCHMARKS = ("retrieval=scenes:test,n=12,image_size=40,captions_per_image=2", "zero_shot=scenes,n=150,image_size=40")
CHOICES = ("retrieval[=SPEC]", "zero_shot[=SPEC]", "fine_grained[=SPEC]", "hessian[=SPEC]", "efficiency:")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("eval_script", ROOT / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dclip_dir(tiny_clip_dir, tmp_path_factory):
    """The stock checkpoint as a DCLIP dual encoder, its image encoder slightly moved."""
    folder = tmp_path_factory.mktemp("student")
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        model.visual_projection.weight.add_(0.02 * torch.randn(model.visual_projection.weight.shape))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil").save_pretrained(folder)
    return folder


def test_a_fresh_process_evaluates_stock_clip(tiny_clip_dir, tmp_path):
    command = [sys.executable, "eval.py", "--model", str(tiny_clip_dir), "--output", str(tmp_path / "r.json")]
    done = subprocess.run(
        [*command, "--benchmark", *BENCHMARKS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "T→I R@1" in done.stdout and "top-1" in done.stdout and f"Written to {tmp_path / 'r.json'}" in done.stdout
    assert "arning" not in done.stderr and "Traceback" not in done.stderr  # bars come only where it takes longer
    retrieval, zero_shot = read_results(tmp_path / "r.json")
    assert (retrieval["n"], retrieval["n_captions"], retrieval["split"]) == (12, 24, "test")
    assert (zero_shot["n"], zero_shot["split"]) == (150, "test")
    assert set(zero_shot["metrics"]) == {"top1", "top5", "mean_per_class"}
    assert (
        {"rsum", "text_to_image_median_rank"}
        < set(retrieval["metrics"])
        == set(retrieval["intervals"])
        | {
            "rsum",
            "text_to_image_median_rank",
            "image_to_text_median_rank",
        }
    )
    assert retrieval["benchmark"] == BENCHMARKS[0] and retrieval["command"].startswith("eval.py --model")
    assert retrieval["revision"] == zero_shot["revision"] and retrieval["revision"].startswith("sha256:")
    assert retrieval["dataset_fingerprint"] != zero_shot["dataset_fingerprint"]


def test_a_dclip_folder_is_compared_with_its_anchor(script, tiny_clip_dir, dclip_dir, tmp_path, capsys):
    arguments = ["--model", str(dclip_dir), "--anchor", str(tiny_clip_dir), "--output", str(tmp_path / "r.json")]
    script.main([*arguments, "--label", "student", "--benchmark", *BENCHMARKS])
    records = read_results(tmp_path / "r.json")
    assert [record["model"] for record in records] == [str(tiny_clip_dir)] * 2 + [str(dclip_dir)] * 2
    assert "comparison" not in records[0] and "label" not in records[0]
    for anchor, student in zip(records[:2], records[2:], strict=True):
        assert student["comparison"]["anchor"] == str(tiny_clip_dir)
        assert student["comparison"]["anchor_revision"] == anchor["revision"] != student["revision"]
        assert anchor["dataset_fingerprint"] == student["dataset_fingerprint"]
    expected = records[2]["metrics"]["text_to_image_recall@1"] / records[0]["metrics"]["text_to_image_recall@1"] - 1
    assert records[2]["comparison"]["text_to_image_recall@1_gain"]["estimate"] == pytest.approx(expected)
    expected = records[3]["metrics"]["top1"] / records[1]["metrics"]["top1"]
    assert records[3]["comparison"]["top1_retention"]["estimate"] == pytest.approx(expected)
    shown = capsys.readouterr().out
    assert "T→I R@1 gain" in shown and "top-1 kept" in shown and "| student " in shown


def test_a_point_from_another_clip_says_nothing_of_the_training(script, tiny_clip_dir, dclip_dir, tmp_path, capsys):
    other = DCLIPModel.from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        other.text_projection.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil").save_pretrained(tmp_path / "other")
    student = shutil.copytree(dclip_dir, tmp_path / "student")
    (student / "arguments.yaml").write_text("student: {wise_ft_alpha: 0.6}\n")
    arguments = ["--model", str(student), "--save_alpha", "0.5", "--anchor"]
    assert script.main([*arguments, str(tiny_clip_dir), "--save_to", str(tmp_path / "half")]) == 0
    assert yaml.safe_load((tmp_path / "half" / "arguments.yaml").read_text())["student"]["wise_ft_alpha"] == 0.5
    assert "student is alpha 0.6." in capsys.readouterr().out
    assert script.main([*arguments, str(tmp_path / "other"), "--save_to", str(tmp_path / "mixed")]) == 0
    assert (tmp_path / "mixed" / "config.json").is_file() and not (tmp_path / "mixed" / "arguments.yaml").exists()
    assert "student (1), whose training started from another model." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save_alpha", "0.5", "--anchor", "a"], "expected both, the point and the folder"),
        (["--save_alpha", "0.5", "--save_to", "new"], "--save_alpha: expected an --anchor"),
        (["n", "--save_alpha", "0.5", "--save_to", "new", "--anchor", "a"], "expected one --model, got 2"),
        (["--save_alpha", "0.5", "--save_to", "new", "--anchor", "open_clip:x:y"], "got open_clip:x:y"),
        (["--anchor", "a"], "--benchmark: expected what to measure"),
    ],
)
def test_what_a_saved_point_needs_is_said(script, words, message):
    with pytest.raises(SystemExit, match=message):
        script.main(["--model", "m", *words])


def test_all_models_are_checked_before_any_is_measured(script, tiny_clip_dir, dclip_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(dclip_dir) / name, bare / name)
    typo, tower = tmp_path / "bara", tmp_path / "tower"
    DCLIPModel.from_pretrained(tiny_clip_dir).text_model.save_pretrained(tower)
    names = [str(name) for name in (tiny_clip_dir, typo, bare, tower)]
    words = ["--model", *names, "--anchor", f"{tmp_path}/x/y", "--benchmark", BENCHMARKS[0]]
    with pytest.raises(SystemExit) as ended:
        script.main([*words, "--output", str(tmp_path / "r.json")])
    told = ended.value.code
    assert "4 mistakes, found before any work" in told and not (tmp_path / "r.json").exists()
    assert (
        f"1. --model: expected a folder with a model at {typo}, got none." in told
        and f"Did you mean '{bare}'?" in told
    )
    assert f"2. --model: expected the files of a processor in '{bare}'" in told
    assert "3. --model: expected a dual encoder such as CLIPModel" in told and f"at '{tower}'" in told
    assert f"4. --anchor: expected a folder with a model at {tmp_path}/x/y, got none." in told


def test_numbers_are_the_same_every_time(script, tiny_clip_dir, tmp_path):
    for name in "ab":
        script.main(["--model", str(tiny_clip_dir), "--benchmark", BENCHMARKS[0], "--output", str(tmp_path / name)])
    first, second = (read_results(tmp_path / name)[0] for name in "ab")
    assert all(first[key] == second[key] for key in ("metrics", "revision", "dataset_fingerprint", "versions"))


def test_class_names_and_templates_come_from_files(script, tiny_clip_dir, tmp_path, capsys):
    (tmp_path / "names").write_text("red circle\nblue square\n")
    (tmp_path / "templates").write_text("a {}\n\n")
    arguments = ["--model", str(tiny_clip_dir), "--benchmark", BENCHMARKS[1], "--output", str(tmp_path / "r.json")]
    assert script.main([*arguments, "--class_names", str(tmp_path / "names")]) == 1
    assert "one per class of the data in its order, got 2" in capsys.readouterr().err
    assert script.main([*arguments, "--templates", str(tmp_path / "templates")]) == 0
    (tmp_path / "templates").write_text("no place\n")
    assert script.main([*arguments, "--templates", str(tmp_path / "templates")]) == 1
    assert "got 'no place'" in capsys.readouterr().err
    assert len(read_results(tmp_path / "r.json")) == 1  # what was measured before stays


def test_every_kind_of_benchmark_runs(script, tiny_clip_dir, tmp_path, capsys):
    scenes = "scenes:test,n=8,image_size=40,captions_per_image=2"
    benchmarks = [
        "fine_grained=scenes:test,n=8,image_size=40",
        f"diagnostics={scenes}",
        f"hessian={scenes}",
        "efficiency",
    ]
    hessian = ["--hessian", "k=1", "steps=3", "batches=1", "pairs=4"]
    output = ["--output", str(tmp_path / "r.json")]
    assert script.main(["--model", str(tiny_clip_dir), "--benchmark", *benchmarks, *hessian, *output]) == 0
    fine, diagnostics, curvature, efficiency = read_results(tmp_path / "r.json")
    assert 0 <= fine["metrics"]["accuracy"] <= 1 and fine["chance"]["accuracy"] == 0.5
    assert fine["settings"]["questions"].startswith("sha256:")
    assert {"modality_gap", "alignment", "image_uniformity", "text_uniformity"} <= set(diagnostics["metrics"])
    assert curvature["settings"] == {"k": 1, "steps": 3, "batches": 1, "pairs": 4}
    assert curvature["metrics"]["hessian_eigenvalue_1"] > curvature["metrics"]["hessian_eigenvalue_min"]
    assert efficiency["spread"]["image_latency_ms"]["min"] <= efficiency["metrics"]["image_latency_ms"]
    assert efficiency["dataset_fingerprint"] == "none" and efficiency["hardware"]["batch_sizes"] == [1, 32]
    assert "latency" in capsys.readouterr().out


def test_points_between_anchor_and_model_are_drawn(script, tiny_clip_dir, dclip_dir, tmp_path):
    arguments = [
        "--model",
        str(dclip_dir),
        "--anchor",
        str(tiny_clip_dir),
        "--alphas",
        "0.5",
        "--benchmark",
        *BENCHMARKS,
    ]
    output = ["--output", str(tmp_path / "r.json"), "--plot", str(tmp_path / "curve.png")]
    assert script.main([*arguments, *output]) == 0
    assert [record.get("condition") for record in read_results(tmp_path / "r.json")] == [None] * 2 + [
        "alpha=0.5"
    ] * 2 + [None] * 2
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_a_gallery_a_report_and_a_comparison_come_from_what_was_measured(
    script, tiny_clip_dir, dclip_dir, tmp_path, capsys
):
    for name, folder in (("a", tiny_clip_dir), ("b", dclip_dir)):
        arguments = [
            "--model",
            str(folder),
            "--benchmark",
            BENCHMARKS[0],
            "--output",
            str(tmp_path / "results" / f"{name}.json"),
        ]
        assert (
            script.main(
                [*arguments, "--gallery", str(tmp_path / "gallery"), "--maps", str(tmp_path / "maps"), "--label", name]
            )
            == 0
        )
    assert [page.suffix for page in (tmp_path / "gallery").iterdir()] == [".html"] * 2
    assert [page.suffix for page in (tmp_path / "maps").iterdir()] == [".png"] * 2
    capsys.readouterr()
    assert script.main(["compare", *(str(tmp_path / "results" / f"{name}.json") for name in "ab")]) == 0
    assert "paired" in capsys.readouterr().out
    assert script.main(["report", str(tmp_path / "results"), "--output", str(tmp_path / "report")]) == 0
    assert str(tmp_path / "report" / "report.html") in capsys.readouterr().out
    assert "T→I R@1" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--benchmark", "imagenet"],
            "unknown benchmark 'imagenet'; known benchmarks: retrieval[=SPEC], diagnostics[=SPEC], hessian",
        ),
        (["--benchmark", "retrieval", "--templates", "x"], "--templates belongs to the benchmark zero_shot"),
        (["--benchmark", "zero_shot", "--gallery", "x"], "--gallery belongs to the benchmark retrieval"),
        (["--benchmark", "retrieval", "--alphas", "0.5"], "expected an --anchor"),
        (["--benchmark", "retrieval", "--label", "a", "b"], "one name for each of 1 models"),
        (["--benchmark", "hessian", "--hessian", "tower"], "expected KEY=VALUE, got 'tower'"),
        (["--benchmark", "retrieval", "--anchor", "y", "--alphas", "5"], "--alphas: expected a number from 0 to 1"),
        (["--benchmark", "retrieval", "--batch_size", "0"], "--batch_size: expected an integer from 1 to 1048576"),
        (["--benchmark", "retrieval", "--num_workers", "-1"], "--num_workers: expected an integer from 0 to 256"),
        (["--benchmark", "retrieval", "--seed", "x"], "--seed: expected an integer from 0 to 4294967295, got 'x'"),
        (["--benchmark", "retrieval", "--seed", "-1"], "--seed: expected an integer from 0 to 4294967295, got '-1'"),
        (["--benchmark", "retrieval", "--num_workers", "1000"], "--num_workers: expected an integer from 0 to 256"),
        (["--benchmark", "retrieval", "--alphas", "nan"], "--alphas: expected a number from 0 to 1, got 'nan'"),
        (["--benchmark", "retrieval", "--gallery", f"{__file__}/x"], "--gallery: Expected a folder to write at"),
        (["--benchmark", "retrieval", "--batch_siz", "3"], "--batch_siz 3. Did you mean --batch_size?"),
        (["--benchmark", "retrieval", "--device", "cuda:99"], "--device: expected a device of this machine"),
        (["--benchmark", "retrieval", "--device", "gpu"], "expected a device of this machine, got 'gpu'"),
        (["--benchmark", "retrieval", "--gallery", __file__], "test_eval_script.py' is a file"),
        (["--benchmark", "retrieval", "--plot", "a.png"], "expected the benchmarks retrieval and zero_shot"),
        (["--benchmark", "retrieval", "zero_shot", "--plot", "a.jpg"], "expected a .png file, got a.jpg"),
        (
            "--benchmark retrieval zero_shot --model a b --anchor c --alphas 0.5 --plot a.png".split(),
            "expected one --model with --alphas",
        ),
        (["--benchmark", "zero_shot", "--class_names", "no.txt"], "No file 'no.txt' of class names"),
        ([], "--benchmark"),
    ],
)
def test_bad_arguments_are_named(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script.main(["--model", "x", *arguments])
    assert stop.value.code.startswith("Failed: ") and message in stop.value.code
    assert capsys.readouterr().err == ""  # no usage, which would hide it


def test_lines_of_class_names_are_not_dropped_unnoticed(script, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    with pytest.raises(SystemExit, match="line 2 is empty"):
        script.main(["--model", "x", "--benchmark", "zero_shot", "--class_names", str(tmp_path / "names.txt")])


def test_wrong_files_are_one_line_and_not_touched(script, tiny_clip_dir, tmp_path, capsys):
    (tmp_path / "r.json").write_bytes(b"\xff\xfe")
    wrong, missing = str(tmp_path / "r.json"), str(tmp_path / "missing.json")
    measure = ["--model", str(tiny_clip_dir), "--benchmark", "retrieval=scenes:test,n=2", "--output"]
    commands = [
        ([*measure, wrong], "Expected UTF-8 text in"),
        ([*measure, str(tmp_path)], "it is a folder"),
        (["report", missing], "which does not exist"),
        (["report", wrong], "none of these"),
        (["compare", missing, wrong], "No results file at"),
        (["compare", wrong, wrong], "Expected UTF-8 text in"),
    ]
    for command, message in commands:
        with pytest.raises(SystemExit) as ended:
            script.main(command)
        line = ended.value.code  # the interpreter writes it to stderr and ends with status 1
        assert line.startswith("Failed: ") and message in line and len(line.splitlines()) == 1
        assert "Failed" not in capsys.readouterr().err
    assert (tmp_path / "r.json").read_bytes() == b"\xff\xfe"


def test_what_cannot_be_drawn_does_not_lose_what_was_measured(script, tiny_clip_dir, tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise TypeError("no maps of this build")

    monkeypatch.setattr("modeling_dclip.evaluation.reports.gallery.write_pages", refuse)
    arguments = ["--model", str(tiny_clip_dir), "--benchmark", BENCHMARKS[0], "--maps", str(tmp_path / "maps")]
    assert script.main([*arguments, "--output", str(tmp_path / "r.json")]) == 1
    shown = capsys.readouterr()
    assert "T→I R@1" in shown.out and "Failed: tables and pictures: TypeError: no maps of this build" in shown.err


def test_help_names_every_benchmark_and_default(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*CHOICES, "default: 64", "results.json", "--trust_remote_code"))


def test_a_bad_source_stops_before_a_model_is_loaded(script, tiny_clip_dir, tmp_path, capsys):
    arguments = ["--model", str(tiny_clip_dir), "--output", str(tmp_path / "r.json"), "--benchmark"]
    assert script.main([*arguments, "retrieval=nowhere:test"]) == 1
    assert "Unknown kind 'nowhere'" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_a_suite_is_taken_apart_and_averaged(script, tiny_clip_dir, tmp_path, capsys):
    assert (
        script.main(
            [
                *("--model", str(tiny_clip_dir), "--benchmark", f"zero_shot=suite:{tmp_path}"),
                *("--output", str(tmp_path / "r.json")),
            ]
        )
        == 1
    )
    assert "None of the 38 sets is at" in capsys.readouterr().err


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs {DATA}")
def test_real_photographs_are_evaluated(script, tiny_clip_dir, tmp_path):
    coco = f"{DATA}/coco_val_sample/annotations/captions_val2017.json:{DATA}/coco_val_sample/val2017"
    benchmarks = [
        f"retrieval=coco:{coco}@20",
        f"retrieval=parquet:{DATA}/flickr8k/validation.parquet@20",
        f"zero_shot=parquet:{DATA}/cifar10/test.parquet@40",
    ]
    script.main(["--model", str(tiny_clip_dir), "--output", str(tmp_path / "r.json"), "--benchmark", *benchmarks])
    assert [(record["n"], record["split"]) for record in read_results(tmp_path / "r.json")] == [
        (20, None),
        (20, None),
        (40, None),
    ]
