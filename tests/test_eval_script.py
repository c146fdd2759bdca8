"""`eval.py` evaluates stock CLIP and DCLIP folders, compares with an anchor, and refuses what it does not know."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from modeling_dclip import DCLIPModel
from modeling_dclip.evaluation.results import read_results

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
BENCHMARKS = ("retrieval=scenes:test,n=12,image_size=40,captions_per_image=2", "zero_shot=scenes,n=150,image_size=40")
CHOICES = ("retrieval=SPEC", "zero_shot=SPEC")


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
    assert "Embedding images" in done.stderr
    retrieval, zero_shot = read_results(tmp_path / "r.json")
    assert (retrieval["n"], retrieval["n_captions"], retrieval["split"]) == (12, 24, "test")
    assert (zero_shot["n"], zero_shot["split"], set(zero_shot["metrics"])) == (150, "test", {"top1", "top5"})
    assert len(retrieval["metrics"]) == 10
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


def test_numbers_are_the_same_every_time(script, tiny_clip_dir, tmp_path):
    for name in "ab":
        script.main(["--model", str(tiny_clip_dir), "--benchmark", BENCHMARKS[0], "--output", str(tmp_path / name)])
    first, second = (read_results(tmp_path / name)[0] for name in "ab")
    assert all(first[key] == second[key] for key in ("metrics", "revision", "dataset_fingerprint", "versions"))


def test_class_names_and_templates_come_from_files(script, tiny_clip_dir, tmp_path):
    (tmp_path / "names").write_text("red circle\nblue square\n")
    (tmp_path / "templates").write_text("a {}\n\n")
    arguments = ["--model", str(tiny_clip_dir), "--benchmark", BENCHMARKS[1], "--class_names", str(tmp_path / "names")]
    with pytest.raises(ValueError, match="class names, one per class of the dataset in its order, got 2"):
        script.main(arguments)
    (tmp_path / "templates").write_text("no place\n")
    with pytest.raises(ValueError, match="got 'no place'"):
        script.main([*arguments[:4], "--templates", str(tmp_path / "templates")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--benchmark", "imagenet"],
            "unknown benchmark 'imagenet'; known benchmarks: retrieval[=SPEC], zero_shot[=SPEC]",
        ),
        (["--benchmark", "retrieval", "--templates", "x"], "belong to the benchmark zero_shot"),
        ([], "--benchmark"),
    ],
)
def test_bad_arguments_are_named(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        script.main(["--model", "x", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_benchmark_and_default(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*CHOICES, "default: 64", "results.json", "--trust_remote_code"))


def test_a_bad_source_stops_before_a_model_is_loaded(script):
    with pytest.raises(ValueError, match="Unknown kind 'nowhere'"):
        script.main(["--model", "does/not/exist", "--benchmark", "retrieval=nowhere:test"])


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
