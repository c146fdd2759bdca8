"""Harder negatives in the trainer: batches of images that are near each other."""

import shutil

import pytest
from accelerate.data_loader import BatchSamplerShard
from fixtures.training import equal, make_inputs, train, weights
from torch.utils.data import BatchSampler

from modeling_dclip.data.collation import StudentBatches
from modeling_dclip.data.columns import flat_column
from modeling_dclip.distillation.negatives import HardBatches, order_hard_batches


@pytest.fixture
def inputs(tiny_clip_dir, distillation_data, tmp_path):
    return make_inputs(tiny_clip_dir, distillation_data, tmp_path)


@pytest.fixture
def seen(monkeypatch):
    """The rows of every batch that is made."""
    rows, collate = [], StudentBatches.collate

    def collate_and_note(self, indices, captions):
        rows.append(indices.tolist())
        return collate(self, indices, captions)

    monkeypatch.setattr(StudentBatches, "collate", collate_and_note)
    return rows


def test_steps_take_hard_batches_and_a_resumed_run_ends_with_the_same_weights(inputs, tmp_path, seen):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"batch_order": "hard", "num_train_epochs": 2}
    train("student", inputs, whole, **options)
    embeds = flat_column(inputs["targets"], "anchor_embeds")
    orders = [order_hard_batches(embeds, 3, seed=42, epoch=epoch)[:15].reshape(5, 3).tolist() for epoch in (0, 1)]
    assert seen == [*orders[0], *orders[1]] and orders[0] != orders[1]
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-7", resumed / "checkpoint-7")
    seen.clear()
    train("student", inputs, resumed, **options)
    assert seen == orders[1][2:]
    assert equal(weights(whole), weights(resumed))


def test_the_steps_of_several_processes_are_the_hard_batches_of_one(inputs):
    class Rows:
        columns = {"anchor_embeds": type("Embeds", (), {"values": flat_column(inputs["targets"], "anchor_embeds")})}
        seed = epoch = 0

        def __len__(self):
            return 16

    order = list(HardBatches(Rows(), 4))
    assert order == order_hard_batches(Rows.columns["anchor_embeds"].values, 4, 0, 0).tolist()
    shares = [
        list(BatchSamplerShard(BatchSampler(HardBatches(Rows(), 4), 2, drop_last=True), 2, process))
        for process in (0, 1)
    ]
    assert [first + second for first, second in zip(*shares, strict=True)] == [order[i : i + 4] for i in range(0, 16, 4)]
