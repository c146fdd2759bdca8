"""Arms beside their anchor: records, summary, a picture; and what a teacher looks at."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from modeling_dclip import DCLIPModel, DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.files import read_json
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.evaluation.arms import evaluate_arms, mean_curves, tradeoff_points
from modeling_dclip.evaluation.records import arm_of, read_results
from modeling_dclip.evaluation.reports.maps import draw_teacher_attention

BENCHMARKS = ["retrieval=scenes:test,n=12,image_size=40,captions_per_image=2", "zero_shot=scenes,n=256,image_size=40"]


@pytest.fixture(scope="module")
def students(tiny_clip_dir, tmp_path_factory):
    """Two arms of two seeds: one is the anchor itself, one is the anchor slightly moved."""
    folders = {"same": {}, "moved": {}}
    for arm, seeds in folders.items():
        for seed in (0, 1):
            folder = tmp_path_factory.mktemp(f"{arm}-{seed}")
            model = DCLIPModel.from_pretrained(tiny_clip_dir)
            if arm == "moved":
                torch.manual_seed(seed)
                model.visual_projection.weight.data += 0.3 * torch.randn(model.visual_projection.weight.shape)
            model.save_pretrained(folder)
            AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil").save_pretrained(folder)
            seeds[seed] = str(folder)
    return folders


def test_an_arm_that_is_the_anchor_gains_nothing_and_keeps_everything(students, tiny_clip_dir, tmp_path):
    summary = evaluate_arms(students, str(tiny_clip_dir), BENCHMARKS, tmp_path, baseline="same", command="test")
    rows = {row["arm"]: row for row in summary["arms"]}
    assert list(rows) == ["anchor", "same", "moved"]
    assert rows["same"]["gain"]["estimate"] == 0 and rows["same"]["retention"]["estimate"] == 1
    assert rows["moved"]["seeds"] == [0, 1]
    (pair,) = summary["comparisons"]
    assert (pair["student"], pair["baseline"]) == ("moved", "same")
    records = read_results(tmp_path / "records.json")
    assert len(records) == 5 * 2  # anchor and four runs, two benchmarks
    assert Image.open(tmp_path / "tradeoff.png").size[0] > 300


def test_every_point_of_a_line_is_measured_and_drawn(students, tiny_clip_dir, tmp_path):
    summary = evaluate_arms(students, str(tiny_clip_dir), BENCHMARKS, tmp_path, alphas=[0.75, 0.5])
    assert [row["arm"] for row in summary["arms"]] == ["anchor", "same", "moved"]
    records = read_results(tmp_path / "records.json")
    told = [(arm_of(record), record["seed"], record.get("condition")) for record in records[10:]]
    runs = [("same", 0), ("same", 1), ("moved", 0), ("moved", 1)]
    assert told == [(*run, alpha) for run in runs for alpha in ("alpha=0.5", "alpha=0.75") for _ in BENCHMARKS]
    first, *_ = read_json(tmp_path / "equal_retention.json")
    same, moved = first["arms"]
    assert same["alphas"] == moved["alphas"] == [0, 0.5, 0.75, 1] and first["baseline"] is None
    assert {name: mean["estimate"] for name, mean in same["metrics"].items()} == first["anchor_metrics"]
    curves = mean_curves(records, tradeoff_points(summary))
    assert [step["label"] for step in curves["moved"]] == ["", "α 0.5", "α 0.75", ""]
    at_half = [record["metrics"] for record in records if record.get("condition") == "alpha=0.5"]
    top1 = [metrics["top1"] for metrics in at_half if "top1" in metrics]
    assert curves["moved"][1]["x"] == sum(top1[2:]) / 2
    averaged = [{**one, "settings": {"student_alpha": 0.6}} for one in records]
    labels = [step["label"] for step in mean_curves(averaged, tradeoff_points(summary))["moved"]]
    assert labels == ["", "α 0.5", "", "α 0.75"]  # the students lie between the two
    assert {step["x"] for step in curves["same"]} == {curves["same"][0]["x"]}  # the anchor's weights all along


def test_two_benchmarks_of_one_kind_cannot_be_summarised(tmp_path):
    with pytest.raises(ValueError, match="at most one benchmark of a kind"):
        evaluate_arms({}, "x", ["retrieval=scenes:test", "retrieval=scenes:train"], tmp_path)


@pytest.mark.parametrize("cross_attention", ["bidirectional", "regions"])
def test_a_teachers_attention_is_drawn(tiny_clip_dir, tmp_path, cross_attention):
    DCLIPTeacher.from_clip(tiny_clip_dir, cross_attention=cross_attention).save_pretrained(tmp_path / "teacher")
    DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path / "teacher")
    scenes = load_scenes("test", n=1)
    draw_teacher_attention(tmp_path / "teacher", scenes, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 300
    with pytest.raises(ValueError, match="Expected the column 'boxes'"):
        draw_teacher_attention(tmp_path / "teacher", scenes.remove_columns("boxes"), tmp_path / "b.png")
