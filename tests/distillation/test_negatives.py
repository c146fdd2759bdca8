"""Banks of negatives: the losses against loops in float64, what is no negative, the trainer's steps."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_dclip.data.columns import Ragged
from modeling_dclip.distillation import negatives as negatives_module
from modeling_dclip.distillation.losses import FalseTexts
from modeling_dclip.distillation.negatives import (
    NOTHING_EXCLUDED,
    Bank,
    Excluded,
    Negatives,
    bank_contrastive_loss,
    bank_sigmoid_loss,
    bank_similarity_loss,
    order_hard_batches,
)

WIDTH = 5
LENGTHS = (2, 1, 3, 1, 1, 2)  # captions of six images; the fourth image has none
CLASSES = (0, 1, 2, 3, 0, 4, -1, 5, 1, 6)  # the first caption of image 0 is one of image 2, that of image 1 one of 5


@pytest.fixture(params=[2**22, 10], ids=["one tile", "tiles of two"])
def tile(request, monkeypatch):
    monkeypatch.setattr(negatives_module, "_TILE_NUMBERS", request.param)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Rows(SimpleNamespace):
    """What [`Negatives`] reads of the batches."""

    def __len__(self):
        return len(LENGTHS)


def make_negatives(limit=100, max_similarity=1.01, teacher=False):
    texts = random(len(CLASSES), WIDTH, seed=1, dtype=torch.float16)
    texts[CLASSES.index(-1)] = 0
    columns = {"text_embeds": texts, "anchor_embeds": random(len(LENGTHS), WIDTH, seed=2, dtype=torch.float16)}
    if teacher:
        columns["teacher_embeds"] = random(len(CLASSES), WIDTH, seed=3, dtype=torch.float16)
    columns = {name: Ragged.from_lengths(one.numpy(), np.ones(len(one), np.int64)) for name, one in columns.items()}
    classes, lengths = np.array(CLASSES), np.array(LENGTHS)
    rows = Rows(caption_classes=classes, captions_per_row=lengths, columns=columns, epoch=0, seed=0)
    return Negatives(rows, torch.device("cpu"), limit, max_similarity)


def unit(vector):
    return vector / vector.norm()


def wrong_captions(row):
    """All captions but those with the words of one of the row's."""
    owners = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    own = {CLASSES[entry] for entry in np.flatnonzero(owners == row)}
    return [entry for entry, kind in enumerate(CLASSES) if kind >= 0 and kind not in own]


def has(row, kind):
    return kind in [CLASSES[entry] for entry in np.flatnonzero(np.repeat(np.arange(len(LENGTHS)), LENGTHS) == row)]


def naive_contrastive(images, rows, captions, negatives, temperature, share):
    texts = torch.from_numpy(negatives.batches.columns["text_embeds"].values).double()
    stored = negatives.images.embeds.double()
    fresh = dict(zip(rows, images, strict=True))
    losses = []
    for row, caption, image in zip(rows, captions, images, strict=True):
        own = unit(image) @ unit(texts[caption]) / temperature
        against = [unit(image) @ unit(texts[entry]) / temperature for entry in wrong_captions(row)]
        image_to_text = torch.stack([own, *against]).logsumexp(0) - own
        others = [fresh.get(other, stored[other]) for other in range(len(LENGTHS)) if not has(other, CLASSES[caption])]
        against = [unit(texts[caption]) @ unit(other) / temperature for other in others]
        text_to_image = torch.stack([own, *against]).logsumexp(0) - own
        losses.append(share * image_to_text + (1 - share) * text_to_image)
    return sum(losses) / len(losses)


ROWS, CAPTIONS = [0, 2, 5], [0, 5, 8]  # caption 0 is right for image 2 too, and 8 for image 1, which the batch lacks


@pytest.mark.parametrize("share", [0.5, 1.0, 0.2])
def test_the_contrastive_loss_is_that_of_a_loop_over_all_captions_and_images(tile, share):
    negatives, images = make_negatives(), random(3, WIDTH).requires_grad_()
    texts = torch.from_numpy(negatives.batches.columns["text_embeds"].values[CAPTIONS])
    step = negatives.find(torch.tensor(ROWS), torch.tensor(CAPTIONS), texts)
    banks, options = (negatives.texts, negatives.images), {"temperature": 0.3, "image_to_text_weight": share}
    loss = bank_contrastive_loss(images, texts.double(), banks, (step.texts, step.images), right=step.right, **options)
    (gradient,) = torch.autograd.grad(loss, images)
    expected = naive_contrastive(images, ROWS, CAPTIONS, negatives, 0.3, share)
    (expected_gradient,) = torch.autograd.grad(expected, images)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_the_sigmoid_loss_is_that_of_a_loop_over_all_captions(tile):
    negatives, images = make_negatives(), random(3, WIDTH).requires_grad_()
    every = torch.from_numpy(negatives.batches.columns["text_embeds"].values).double()
    step = negatives.find(torch.tensor(ROWS), torch.tensor(CAPTIONS), every[CAPTIONS])
    loss = bank_sigmoid_loss(images, every[CAPTIONS], negatives.texts, step.texts, math.log(4.0), -1.5)
    expected = 0.0
    for row, caption, image in zip(ROWS, CAPTIONS, images, strict=True):
        pairs = [(caption, 1.0), *((entry, -1.0) for entry in wrong_captions(row))]
        for entry, sign in pairs:
            logit = 4.0 * unit(image) @ unit(every[entry]) - 1.5
            expected = expected + torch.nn.functional.softplus(-sign * logit) / len(ROWS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(one, images, retain_graph=True)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_the_similarity_loss_is_that_of_a_loop_over_all_captions_and_images(tile):
    negatives, images = make_negatives(teacher=True), random(3, WIDTH).requires_grad_()
    columns = {name: torch.from_numpy(embeds.values).double() for name, embeds in negatives.batches.columns.items()}
    texts, targets = columns["text_embeds"][CAPTIONS], columns["teacher_embeds"][CAPTIONS]
    step = negatives.find(torch.tensor(ROWS), torch.tensor(CAPTIONS), texts)
    banks = (negatives.texts, negatives.images, negatives.teacher)
    options = {"temperatures": (0.4, 0.2), "image_to_text_weight": 0.3}
    loss = bank_similarity_loss(images, targets, texts, banks, step.batch_images, **options)

    def divergence(logits, wanted):
        logits, wanted = torch.stack(logits).log_softmax(0), torch.stack(wanted).log_softmax(0)
        return (wanted.exp() * (wanted - logits)).sum()

    captioned = [entry for entry, kind in enumerate(CLASSES) if kind >= 0]
    stored, of_teacher = negatives.images.embeds.double(), negatives.teacher.embeds.double()
    places = [(stored[row], of_teacher[row]) for row in range(len(LENGTHS)) if row not in ROWS]
    places += zip(images, targets, strict=True)
    expected = 0.0
    for image, target, text in zip(images, targets, texts, strict=True):
        every = [unit(columns["text_embeds"][entry]) for entry in captioned]
        expected = expected + 0.3 * divergence(
            [unit(image) @ one / 0.4 for one in every], [unit(target) @ one / 0.2 for one in every]
        )
        pairs = [(unit(text) @ unit(one) / 0.4, unit(text) @ unit(other) / 0.2) for one, other in places]
        expected = expected + 0.7 * divergence(*map(list, zip(*pairs, strict=True)))
    torch.testing.assert_close(loss, expected / len(ROWS), rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(one, images, retain_graph=True)[0] for one in (loss, expected / len(ROWS))]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


def test_false_captions_join_the_banks_wrong_answers(tile):
    negatives, images = make_negatives(), random(3, WIDTH).requires_grad_()
    texts = torch.from_numpy(negatives.batches.columns["text_embeds"].values[CAPTIONS]).double()
    step = negatives.find(torch.tensor(ROWS), torch.tensor(CAPTIONS), texts)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    false, banks = FalseTexts(random(3, 2, WIDTH, seed=9), mask), (negatives.texts, negatives.images)
    options = {"temperature": 0.3, "image_to_text_weight": 1.0}
    loss = bank_contrastive_loss(images, texts, banks, (step.texts, step.images), false_texts=false, **options)
    expected = 0.0
    every = torch.from_numpy(negatives.batches.columns["text_embeds"].values).double()
    of_image = [false.embeds[i][mask[i]] for i in range(3)]
    for row, caption, image, more in zip(ROWS, CAPTIONS, images, of_image, strict=True):
        wrong = [unit(image) @ unit(one) / 0.3 for one in (*every[wrong_captions(row)], *more)]
        own = unit(image) @ unit(every[caption]) / 0.3
        expected = expected + (torch.stack([own, *wrong]).logsumexp(0) - own) / 3
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(one, images, retain_graph=True)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    without, loss = (
        bank_sigmoid_loss(images, texts, negatives.texts, step.texts, math.log(4.0), -1.5, one)
        for one in (None, false)
    )
    cosines = [unit(image) @ unit(one) for image, more in zip(images, of_image, strict=True) for one in more]
    added = sum(torch.nn.functional.softplus(4 * cosine - 1.5) for cosine in cosines) / 3
    torch.testing.assert_close(loss - without, added, rtol=1e-12, atol=0)


def test_an_image_that_stands_in_a_batch_twice_is_no_negative_of_itself():
    negatives, images = make_negatives(), random(3, WIDTH)
    texts = torch.from_numpy(negatives.batches.columns["text_embeds"].values[[3, 5, 5]]).double()
    step = negatives.find(torch.tensor([2, 2, 3]), torch.tensor([3, 5, 5]), texts)
    assert step.right.tolist() == [[True, True, False], [True, True, False], [True, True, False]]
    assert step.images.of_all.tolist() == [2, 3]
    banks, excluded = (negatives.texts, negatives.images), (step.texts, step.images)
    assert torch.isfinite(bank_contrastive_loss(images, texts, banks, excluded, right=step.right))


def test_texts_that_are_too_near_are_no_negatives():
    texts = torch.eye(2)
    images = torch.tensor([[1.0, 1.0]])
    bank, near = Bank(torch.tensor([[1.0, 0.1], [0.0, 1.0]]).half()), (texts[:1], 0.9)
    nothing = np.zeros(0, np.int64)
    banks, options = (bank, Bank(torch.zeros(0, 2).half())), {"temperature": 1.0, "image_to_text_weight": 1.0}
    loss = bank_contrastive_loss(
        images, texts[:1], banks, (Excluded(nothing, nothing, nothing, near), NOTHING_EXCLUDED), **options
    )
    assert float(loss) == pytest.approx(math.log(2))  # against the second text alone
    both = bank_contrastive_loss(images, texts[:1], banks, (NOTHING_EXCLUDED, NOTHING_EXCLUDED), **options)
    assert float(both) > 1.0


def test_where_all_is_excluded_nothing_is_lost():
    bank, images = Bank(torch.eye(2).half()), torch.eye(2, requires_grad=True)
    none = np.zeros(0, np.int64)
    everything = Excluded(none, none, np.array([0, 1]))
    loss = bank_contrastive_loss(
        images, torch.eye(2), (bank, bank), (everything, everything), image_to_text_weight=1.0
    )
    loss.backward()
    assert float(loss.detach()) == 0.0 and not images.grad.any()


def test_a_limit_draws_another_part_of_each_bank_in_each_epoch():
    negatives, seen = make_negatives(limit=4), []
    for negatives.batches.epoch in range(20):
        texts = torch.from_numpy(negatives.batches.columns["text_embeds"].values[CAPTIONS])
        step = negatives.find(torch.tensor(ROWS), torch.tensor(CAPTIONS), texts)
        chosen = negatives._chosen["texts"]
        assert len(negatives.texts) == len(negatives.images) == 4 and len(set(chosen)) == 4
        captioned = [entry for entry, kind in enumerate(CLASSES) if kind >= 0]
        for query, row in enumerate(ROWS):
            right = {captioned.index(entry) for entry in captioned if entry not in wrong_captions(row)}
            assert set(chosen[step.texts.places[step.texts.queries == query]]) == right & set(chosen)
        seen.append(tuple(chosen))
    assert len(set(seen)) > 10 and set(itertools.chain(*seen)) == set(range(9))
    again = make_negatives(limit=4)
    again.batches.epoch = 7
    again.choose()
    assert tuple(again._chosen["texts"]) == seen[7]


def test_the_bank_takes_fresh_embeddings_and_none_that_is_not_finite():
    negatives = make_negatives()
    before = negatives.images.embeds.clone()
    negatives.remember(torch.tensor([1, 4]), torch.tensor([[3.0, 4.0, 0, 0, 0], [math.nan, 1, 1, 1, 1]]))
    assert negatives.images.embeds[1].tolist() == pytest.approx([0.6, 0.8, 0, 0, 0], abs=1e-3)
    assert torch.equal(negatives.images.embeds[[0, 2, 3, 4, 5]], before[[0, 2, 3, 4, 5]])


def test_a_bank_that_is_not_there_or_of_other_images_is_refused(tmp_path):
    negatives = make_negatives()
    with pytest.raises(ValueError, match="image_bank.safetensors' is missing"):
        negatives.load(tmp_path)
    negatives.save(tmp_path)
    negatives.load(tmp_path)
    negatives.images = Bank(torch.zeros(2, WIDTH).half())
    with pytest.raises(ValueError, match=r"expected embeddings \(2, 5\), got \(6, 5\)"):
        negatives.load(tmp_path)


def test_hard_batches_hold_every_row_once_near_each_other_and_anew_each_epoch():
    centres = np.eye(8, 16)[np.arange(203) % 8]
    embeds = (centres + 0.05 * random(203, 16, seed=4).numpy()).astype(np.float16) * np.float16(3)
    orders = [order_hard_batches(embeds, 10, seed=1, epoch=epoch) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(203))
        batches = order[:200].reshape(20, 10) % 8
        assert np.mean([len(set(batch)) for batch in batches.tolist()]) < 2.5  # of 8 clusters; 5.9 in random batches
    assert (orders[0] != orders[1]).mean() > 0.9
    assert set(orders[0][200:]) != set(orders[1][200:])  # other rows are left over
    assert (order_hard_batches(embeds, 10, seed=1, epoch=1) == orders[1]).all()


@pytest.mark.parametrize("rows, batch", [(1, 4), (4, 4), (7, 3), (12, 1)])
def test_hard_batches_of_few_or_equal_rows(rows, batch):
    assert sorted(order_hard_batches(np.ones((rows, 3), np.float16), batch, 0, 0).tolist()) == list(range(rows))
    assert sorted(order_hard_batches(np.zeros((rows, 3), np.float16), batch, 0, 0).tolist()) == list(range(rows))
