"""Trackers: TensorBoard gets every loss term, wandb and trackio write their offline runs where they are installed."""

import pytest
from datasets import load_from_disk
from fixtures.training import make_trainer, student_arguments

from modeling_dclip import DCLIPProcessor

TERMS = ("loss", "cosine_distillation_loss", "contrastive_loss", "learning_rate")


def train(clip_dir, data_dir, folder, **options):
    args = student_arguments(folder, **options)
    trainer = make_trainer(clip_dir, load_from_disk(data_dir), DCLIPProcessor.from_pretrained(clip_dir), args)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_tensorboard_gets_every_loss_term_by_default(tiny_clip_dir, distillation_data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = train(tiny_clip_dir, distillation_data, tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()  # what `tensorboard --logdir` finds below the run
    events = accumulator.EventAccumulator(str(folder)).Reload()
    for name in TERMS:
        points = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert points == [(log["step"], pytest.approx(log[name])) for log in logs], name


def test_none_writes_no_tracker_files(tiny_clip_dir, distillation_data, tmp_path):
    train(tiny_clip_dir, distillation_data, tmp_path, report_to="none")
    assert not (tmp_path / "runs").exists()


def test_wandb_writes_an_offline_run(tiny_clip_dir, distillation_data, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    train(tiny_clip_dir, distillation_data, tmp_path, report_to=["wandb"])
    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_writes_a_local_run(tiny_clip_dir, distillation_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    train(tiny_clip_dir, distillation_data, tmp_path, report_to=["trackio"], project="dclip")
    assert [path.name for path in (tmp_path / "trackio").glob("dclip*.db")] == ["dclip.db"]
