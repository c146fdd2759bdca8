"""Harder negatives in the trainer: batches of images that are near each other, false captions."""

import shutil

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import load_from_disk
from fixtures.training import equal, make_inputs, student_arguments, train, weights
from torch.utils.data import BatchSampler

from modeling_dclip import DCLIPProcessor
from modeling_dclip.data import collation
from modeling_dclip.data.collation import StudentBatches
from modeling_dclip.data.columns import flat_column, ragged_column
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
    assert [first + second for first, second in zip(*shares, strict=True)] == [
        order[i : i + 4] for i in range(0, 16, 4)
    ]


def read_step(batches, rows):
    batch = batches.__getitems__(rows)
    return batch["negative_embeds"], batch["negative_mask"]


def false_captions(stored, row):
    return torch.tensor(stored.values[stored.offsets[row] : stored.offsets[row + 1]])


def test_batches_hold_the_false_captions_of_their_images(inputs, tmp_path, monkeypatch):
    args = student_arguments(tmp_path, hard_negatives="column")
    data, processor = inputs["targets"], DCLIPProcessor.from_pretrained(inputs["clip"])
    stored = ragged_column(data, "negative_embeds")
    batches = StudentBatches(data, processor.image_processor, args.columns, width=16, seed=3)
    embeds, mask = read_step(batches, [5, 2])
    assert embeds.shape == (2, stored.lengths.max(), 16) and embeds.dtype == torch.float16
    for place, row in enumerate((5, 2)):
        assert torch.equal(embeds[place][mask[place]], false_captions(stored, row)) and mask[place].sum() >= 5
    monkeypatch.setattr(collation, "MOST_NEGATIVES", 3)
    places = np.arange(len(stored.values), dtype=np.float16)[:, None].repeat(16, axis=1)
    batches.negatives, drawn = stored._replace(values=places), set()
    for epoch in range(8):
        batches.set_epoch(epoch)
        embeds, mask = read_step(batches, [5])
        assert embeds.shape == (1, 3, 16) and mask.all()
        drawn.add(tuple(embeds[0, :, 0].int().tolist()))
    assert len(drawn) > 3 and all(list(places) == sorted(set(places)) for places in drawn)
    assert set().union(*drawn) <= set(range(stored.offsets[5], stored.offsets[6]))


@pytest.mark.parametrize("negatives", ["batch", "bank"])
def test_false_captions_raise_the_loss_and_change_the_step(inputs, tmp_path, negatives):
    found = []
    for kind in ("none", "column"):
        folder = tmp_path / kind
        options = {"max_steps": 1, "hard_negatives": kind, "negatives": negatives, "temperature": 0.5}
        state = train("student", inputs, folder, **options)
        found.append((state.log_history[0]["contrastive_loss"], weights(folder)))
    assert found[1][0] > found[0][0] + 0.05  # 6 beside 31 or 3 wrong answers, in half of the loss
    assert not equal(found[0][1], found[1][1])


def test_rows_without_captions_have_no_false_ones(inputs, partly_captioned_data, tmp_path):
    folder, options = tmp_path / "student", {"max_steps": 2, "hard_negatives": "column", "temperature": 0.5}
    state = train("student", {**inputs, "targets": load_from_disk(partly_captioned_data)}, folder, **options)
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in state.log_history if "loss" in log)


def test_a_text_tower_that_is_adapted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hard_negatives: expected none with lora_text"):
        student_arguments(tmp_path, hard_negatives="swap", lora_rank=2, lora_text=True)
