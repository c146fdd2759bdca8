"""Batches: the right caption beside the right image, the same in every process and after a resume,
bad rows told by name.
"""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from modeling_dclip.data.collation import (
    AnchorBatches,
    StudentBatches,
    choose_captions,
    pass_batch,
    random_numbers,
    read_captions,
    tokenize_captions,
)
from modeling_dclip.data.columns import Ragged, with_flat_embeds, with_ragged_embeds
from modeling_dclip.data.scenes import load_scenes

ROWS, CAPTIONS, WIDTH = 6, 3, 16


@pytest.fixture(scope="module")
def scenes():
    return load_scenes("train", n=ROWS, captions_per_image=CAPTIONS, image_size=40)


def with_targets(dataset, width=WIDTH, captions=CAPTIONS):
    """Targets that say which row and caption they belong to: entry c of row r is (r, c, 1, 1, ...)."""
    values = np.ones((len(dataset) * captions, width), np.float16)
    values[:, 0], values[:, 1] = np.divmod(np.arange(len(values)), captions)
    embeds = Ragged.from_lengths(values, np.full(len(dataset), captions))
    dataset = with_ragged_embeds(with_ragged_embeds(dataset, "teacher_embeds", embeds), "text_embeds", embeds)
    return with_flat_embeds(dataset, "anchor_embeds", values[::captions])


def student_batches(dataset, processor, **options):
    columns = ["teacher_embeds", "text_embeds", "anchor_embeds"]
    return StudentBatches(dataset, processor.image_processor, columns, width=WIDTH, **options)


def test_captions_are_chosen_by_seed_epoch_and_row_alone():
    rows, counts = np.arange(1000), np.full(1000, 5)
    chosen = choose_captions(3, 7, rows, counts)
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(choose_captions(3, 7, rows[order], counts), chosen[order])
    assert (choose_captions(3, 8, rows, counts) != chosen).mean() == pytest.approx(0.8, abs=0.05)
    assert (choose_captions(4, 7, rows, counts) != chosen).mean() == pytest.approx(0.8, abs=0.05)


def test_every_caption_is_chosen_as_often_as_the_others():
    counts = np.where(np.arange(20_000) % 2, 4, 1)
    chosen = choose_captions(0, 0, np.arange(20_000), counts)
    assert (chosen[counts == 1] == 0).all()
    assert np.bincount(chosen[counts == 4]) / 10_000 == pytest.approx([0.25] * 4, abs=0.02)
    numbers = random_numbers(0, 0, np.arange(20_000))
    assert 0 <= numbers.min() and numbers.max() < 1 and numbers.mean() == pytest.approx(0.5, abs=0.01)


def test_anchor_batches_hold_the_chosen_captions_tokens(scenes, processor):
    batches = AnchorBatches(scenes, processor, seed=1)
    batches.set_epoch(2)
    batch = batches.__getitems__([4, 0, 5])
    chosen = choose_captions(1, 2, np.array([4, 0, 5]), np.full(3, CAPTIONS))
    captions = [scenes[row]["captions"][caption] for row, caption in zip((4, 0, 5), chosen, strict=True)]
    expected = processor(images=[scenes[row]["image"] for row in (4, 0, 5)], text=captions, return_tensors="pt")
    torch.testing.assert_close(batch["input_ids"], expected["input_ids"])
    torch.testing.assert_close(batch["attention_mask"], expected["attention_mask"])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    assert batch["image_ids"].tolist() == [4, 0, 5]


def test_student_batches_hold_the_targets_of_the_chosen_captions(scenes, processor):
    batches = student_batches(with_targets(scenes), processor, seed=5)
    for epoch in range(3):
        batches.set_epoch(epoch)
        batch = batches.__getitems__([3, 1])
        chosen = choose_captions(5, epoch, np.array([3, 1]), np.full(2, CAPTIONS))
        for name in ("teacher_embeds", "text_embeds"):
            assert batch[name][:, :2].tolist() == [[3, chosen[0]], [1, chosen[1]]]
        assert batch["anchor_embeds"][:, 0].tolist() == [3, 1]
        assert batch["pixel_values"].shape == (2, 3, 32, 32)


def test_a_data_loader_with_workers_gives_what_one_without_gives(scenes, processor):
    batches = student_batches(with_targets(scenes), processor)
    loaders = [DataLoader(batches, batch_size=4, collate_fn=pass_batch, num_workers=workers) for workers in (0, 1)]
    for alone, worked in zip(*loaders, strict=True):
        assert alone.keys() == worked.keys()
        for name in alone:
            torch.testing.assert_close(worked[name], alone[name])


@pytest.mark.parametrize(("workers", "persistent"), [(1, True), (2, False), (2, True)])
def test_workers_draw_for_each_epoch_what_the_main_process_draws(scenes, processor, workers, persistent):
    batches = student_batches(with_targets(scenes), processor, seed=5, min_crop_area=0.3)
    options = {"num_workers": workers, "persistent_workers": persistent, "prefetch_factor": 4}
    loader = DataLoader(batches, batch_size=2, collate_fn=pass_batch, **options)
    drawn = []
    for epoch in (0, 1, 2, 1):
        batches.set_epoch(epoch)
        given = list(loader)
        rows = torch.cat([batch["image_ids"] for batch in given]).numpy()
        chosen = torch.cat([batch["teacher_embeds"][:, 1] for batch in given]).int().tolist()
        assert chosen == choose_captions(5, epoch, rows, np.full(ROWS, CAPTIONS)).tolist()
        alone = student_batches(with_targets(scenes), processor, pixels=batches.pixels, seed=5, min_crop_area=0.3)
        alone.set_epoch(epoch)
        crops = torch.cat([batch["pixel_values"] for batch in given])
        torch.testing.assert_close(crops, alone.__getitems__(rows)["pixel_values"])
        drawn.append((chosen, crops))
    assert drawn[0][0] != drawn[1][0] != drawn[2][0] and drawn[1][0] == drawn[3][0]
    assert (drawn[0][1] - drawn[1][1]).abs().max() > 0.1


def test_pixels_can_be_shared_between_runs(scenes, processor):
    first = student_batches(with_targets(scenes), processor)
    second = student_batches(with_targets(scenes), processor, pixels=first.pixels, seed=1)
    assert second.pixels is first.pixels
    torch.testing.assert_close(second[2]["pixel_values"], first[2]["pixel_values"])


def test_augmentation_is_off_by_default_and_else_follows_the_epoch(scenes, processor):
    plain = student_batches(with_targets(scenes), processor)
    cropped = student_batches(with_targets(scenes), processor, min_crop_area=0.3)
    torch.testing.assert_close(plain[0]["pixel_values"], plain.pixels.read(np.array([0])))
    first = cropped[0]["pixel_values"]
    assert (first - plain[0]["pixel_values"]).abs().max() > 0.1
    torch.testing.assert_close(cropped[0]["pixel_values"], first)
    cropped.set_epoch(1)
    assert (cropped[0]["pixel_values"] - first).abs().max() > 0.1


@pytest.mark.parametrize("captions", [[], [""], ["a dog", "  "], None])
def test_empty_captions_are_told_by_image(captions):
    dataset = Dataset.from_dict({"image_id": ["good", "bad"], "captions": [["a cat"], captions]})
    with pytest.raises(ValueError, match=r"'bad' \(row 1\): expected one or more captions with words.*1 such rows"):
        read_captions(dataset)


def test_a_caption_of_500_words_is_cut_keeping_its_end_and_counted(processor, caplog):
    tokenizer = processor.tokenizer
    with caplog.at_level(logging.WARNING):
        tokens = tokenize_captions(tokenizer, ["a red dog", "red " * 500, "a dog"])
    assert "Cut 1 of 3 captions after 77 tokens" in caplog.text
    assert tokens.lengths[1] == 77
    long = tokens.values[tokens.offsets[1] : tokens.offsets[2]]
    assert long[0] == tokenizer.bos_token_id and long[-1] == tokenizer.eos_token_id
    short = tokens.values[: tokens.offsets[1]].tolist()
    assert short == tokenizer("a red dog")["input_ids"]


def test_nan_in_a_target_is_told_by_image(scenes, processor):
    dataset = with_targets(scenes)
    values = np.ones((ROWS * CAPTIONS, WIDTH), np.float16)
    values[2 * CAPTIONS + 1, 3] = np.nan
    dataset = with_ragged_embeds(dataset, "teacher_embeds", Ragged.from_lengths(values, np.full(ROWS, CAPTIONS)))
    with pytest.raises(ValueError, match=r"'teacher_embeds', row 2 \(image 'scenes-train-0-2'\), entry 1"):
        student_batches(dataset, processor)


def test_another_width_than_the_students_is_told(scenes, processor):
    with pytest.raises(ValueError, match="expected the student's width 16, got 24"):
        student_batches(with_targets(scenes, width=24), processor)


def test_targets_of_other_captions_are_told(scenes, processor):
    with pytest.raises(ValueError, match=r"row 0: expected one embedding per caption \(3; without .*\), got 2"):
        student_batches(with_targets(scenes, captions=2), processor)


def test_a_missing_target_column_is_told(scenes, processor):
    with pytest.raises(ValueError, match="Expected a column 'teacher_embeds'"):
        student_batches(scenes, processor)


def without_captions(dataset, *rows):
    """The targets of these rows as an image without captions has them: one of the teacher's, none of a text."""
    columns = dataset.with_format(None).to_dict()
    for row in rows:
        columns["captions"][row], columns["text_embeds"][row] = [], []
        columns["teacher_embeds"][row] = columns["teacher_embeds"][row][:1]
    return Dataset.from_dict(columns, features=dataset.features)


def test_rows_without_captions_say_so_and_change_nothing_for_the_others(scenes, processor):
    whole = student_batches(with_targets(scenes), processor, seed=5)
    partly = student_batches(without_captions(with_targets(scenes), 1, 4), processor, seed=5)
    for epoch in range(3):
        for batches in (whole, partly):
            batches.set_epoch(epoch)
        expected, batch = whole.__getitems__([4, 3, 1, 5]), partly.__getitems__([4, 3, 1, 5])
        assert "caption_mask" not in expected
        assert batch["caption_mask"].tolist() == [False, True, False, True]
        assert batch["teacher_embeds"][[0, 2], :2].tolist() == [[4, 0], [1, 0]]
        assert batch["text_embeds"][[0, 2]].abs().max() == 0
        for name in ("teacher_embeds", "text_embeds"):
            torch.testing.assert_close(batch[name][[1, 3]], expected[name][[1, 3]])
        for name in ("anchor_embeds", "pixel_values", "image_ids"):
            torch.testing.assert_close(batch[name], expected[name])


def test_a_row_without_captions_has_one_target_of_the_teachers(scenes, processor):
    columns = with_targets(scenes).with_format(None).to_dict()
    columns["captions"][2], columns["text_embeds"][2] = [], []
    dataset = Dataset.from_dict(columns, features=with_targets(scenes).features)
    with pytest.raises(ValueError, match=r"'teacher_embeds', row 2: expected one .*\(0; without captions one.*got 3"):
        student_batches(dataset, processor)
