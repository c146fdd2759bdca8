"""Arms beside their anchor: records, summary, a picture; and what a teacher looks at."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from modeling_dclip import DCLIPModel, DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.evaluation.arms import evaluate_arms
from modeling_dclip.evaluation.records import read_results
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
