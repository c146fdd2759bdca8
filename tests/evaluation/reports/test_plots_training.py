"""Training curves: drawn for every stage that trained, once, and never in the way of a run."""

import importlib.util
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from modeling_dclip.evaluation.reports import plots as training_curves
from modeling_dclip.evaluation.reports.plots import draw_training_curves, plot_training

LOG = [
    {"step": 1, "loss": 2.0, "contrastive_loss": 2.0},
    {"step": 2, "loss": 1.0, "contrastive_loss": 1.0},
    {"step": 2, "train_loss": 1.5, "train_runtime": 3.0},
]


def write_state(folder, log_history):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log_history}))


def test_each_stage_that_trained_gets_a_picture_once(tmp_path):
    write_state(tmp_path / "student", LOG)
    write_state(tmp_path / "teacher", LOG)
    write_state(tmp_path / "short", LOG[2:])  # too few steps to log a loss
    write_state(tmp_path / "paper" / "seed-1" / "student", LOG)
    write_state(tmp_path / "student" / "checkpoint-2", LOG)  # part of a stage
    drawn = draw_training_curves(tmp_path)
    assert drawn == [
        tmp_path / name / "training_curves.png" for name in ("student", "teacher", "paper/seed-1/student")
    ]
    assert len(np.unique(np.asarray(Image.open(drawn[0]).convert("RGB")).reshape(-1, 3), axis=0)) > 10
    assert draw_training_curves(tmp_path) == []
    write_state(tmp_path / "student", LOG)
    os.utime(tmp_path / "student" / "trainer_state.json", (2e9, 2e9))
    assert draw_training_curves(tmp_path) == drawn[:1]


def test_without_matplotlib_a_run_ends_all_the_same(tmp_path, monkeypatch, caplog):
    write_state(tmp_path / "student", LOG)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        training_curves.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with caplog.at_level(logging.INFO):
        assert draw_training_curves(tmp_path) == []
    assert "matplotlib is not installed" in caplog.text and not (tmp_path / "student" / "training_curves.png").exists()


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    write_state(tmp_path / "student", [{"step": 3, "loss": float("nan")}])
    with pytest.raises(ValueError, match="loss=nan at step 3"):
        draw_training_curves(tmp_path)


def test_the_step_whose_weights_were_kept_is_marked(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training_curves, "plot_training", lambda log, path, **options: drawn.append(options))
    write_state(tmp_path / "paper" / "seed-1" / "student", LOG)
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG, "best_global_step": 1}))
    (folder / "manifest.json").write_text(json.dumps({"counts": {"validation": {"images": 18}}}))
    draw_training_curves(tmp_path)
    assert drawn == [
        {"title": "student", "best_step": 1, "validation_images": 18},
        {"title": "paper, seed-1, student", "best_step": None, "validation_images": None},
    ]


def test_the_last_probe_that_held_is_marked_where_its_weights_were_kept(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training_curves, "plot_training", lambda log, path, **options: drawn.append(options))
    write_state(tmp_path / "student", [*LOG, {"step": 2, "probe_kept_step": 1}])
    (tmp_path / "student" / "arguments.yaml").write_text("student: {keep_retention: 0.9}\n")
    draw_training_curves(tmp_path)
    (options,) = drawn
    assert options["best_step"] == 1 and options["keep_retention"] == 0.9


def test_probes_and_their_retention_have_panels_of_their_own(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(training_curves, "save_figure", lambda figure, path: figures.append(figure))
    probes = [
        {"step": 0, "probe_zero_shot_1_top1": 0.5, "probe_zero_shot_2_map": 0.25, "probe_retention": 1.0},
        {"step": 2, "probe_zero_shot_1_top1": 0.25, "probe_diagnostics_modality_gap": 0.3, "probe_retention": 0.5},
    ]
    plot_training([*probes, *LOG], tmp_path / "a.png", keep_retention=0.75)
    losses, probed, kept = figures[0].axes
    assert [line.get_xydata().tolist() for line in probed.lines] == [[[0, 50], [2, 25]], [[0, 25]]]
    told = [text.get_text() for text in probed.get_legend().get_texts()]
    assert told == ["zero-shot 1 top-1", "zero-shot 2 mAP"]  # a gap is no share
    assert kept.lines[0].get_xydata().tolist() == [[0, 100], [2, 50]] and kept.lines[1].get_ydata()[0] == 75
    assert [text.get_text() for text in kept.get_legend().get_texts()] == ["retention", "keep_retention: 75 %"]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["total = contrastive"]
    with pytest.raises(ValueError, match="numbers, got probe_retention=nan at step 3"):
        plot_training([*LOG, {"step": 3, "probe_retention": float("nan")}], tmp_path / "a.png")


def test_chance_stands_beside_the_retrieval_of_the_validation_part(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(training_curves, "save_figure", lambda figure, path: figures.append(figure))
    log = [*LOG, {"step": 4, "epoch": 3.3333333, "eval_text_to_image_recall@1": 0.25}]
    plot_training(log, tmp_path / "a.png", validation_images=20)
    axes = figures[0].axes[-1]
    assert 5.0 in {float(line.get_ydata()[0]) for line in axes.lines}  # 1 of 20, in percent
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "chance: 1 of 20" in told
    assert "in 3.3 epochs" in axes.get_xlabel()
