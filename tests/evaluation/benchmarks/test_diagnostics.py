"""Gap, alignment and uniformity are those of the papers' formulas, pair by pair; tiles change nothing;
bad input is named.
"""

import itertools
import math

import pytest
import torch

from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.diagnostics import (
    alignment_by_image,
    embedding_diagnostics,
    evaluate_diagnostics,
    modality_gap,
    uniformity,
)
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset


def draw(rows, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def embeddings():
    """Nine images with one to four captions each, not in order."""
    owners = torch.tensor([3, 0, 1, 1, 2, 8, 4, 5, 5, 5, 5, 6, 7, 0, 8])
    return DatasetEmbeddings(draw(9), draw(len(owners), seed=1) + 0.5, owners)


def unit(rows):
    return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows.double().tolist()]


def squared_distance(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def naive_diagnostics(embeddings, t=2.0):
    """Pair by pair, in Python's floats."""
    images, texts, owners = unit(embeddings[0]), unit(embeddings[1]), embeddings[2].tolist()
    centroids = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in (images, texts)]

    def log_mean_potential(rows, groups):
        potentials = [
            math.exp(-t * squared_distance(rows[i], rows[j]))
            for i, j in itertools.combinations(range(len(rows)), 2)
            if groups[i] != groups[j]
        ]
        return math.log(sum(potentials) / len(potentials))

    return {
        "modality_gap": math.sqrt(squared_distance(*centroids)),
        "alignment": sum(squared_distance(text, images[o]) for text, o in zip(texts, owners, strict=True))
        / len(texts),
        "image_uniformity": log_mean_potential(images, range(len(images))),
        "text_uniformity": log_mean_potential(texts, owners),
    }


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_every_measure_is_the_naive_one(embeddings, t):
    expected, result = naive_diagnostics(embeddings, t), embedding_diagnostics(embeddings, t=t)
    assert {name for name, value in result.items() if isinstance(value, float)} == set(expected)
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=2e-6), name
    assert (result["n"], result["n_captions"]) == (9, 15)


@pytest.mark.parametrize("tile_size", [1, 2, 4, 7, 100])
def test_tiles_change_nothing(embeddings, tile_size):
    texts, owners = embeddings.text_embeds, embeddings.image_of_caption
    whole = uniformity(texts, owners)
    assert uniformity(texts, owners, tile_size=tile_size) == pytest.approx(whole, abs=1e-6)
    assert uniformity(texts[:9], tile_size=tile_size) == pytest.approx(uniformity(texts[:9]), abs=1e-6)
    chunked = alignment_by_image(embeddings.image_embeds, texts, owners, chunk_size=tile_size)
    torch.testing.assert_close(chunked, alignment_by_image(embeddings.image_embeds, texts, owners))


def test_no_tile_is_larger_than_asked(monkeypatch):
    largest = 0
    original = torch.Tensor.__matmul__

    def watch(one, other):
        nonlocal largest
        product = original(one, other)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watch)
    uniformity(draw(300), tile_size=16)
    assert largest == 16 * 16


def test_order_and_scale_change_nothing(embeddings):
    images, texts, owners = embeddings
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(2))
    scaled = DatasetEmbeddings(3 * images, texts[order] * torch.arange(1, 16)[:, None], owners[order])
    first, second = embedding_diagnostics(embeddings), embedding_diagnostics(scaled)
    for name in naive_diagnostics(embeddings):
        assert second[name] == pytest.approx(first[name], abs=1e-6), name


def test_outcomes_sum_up_to_alignment_an_image_a_row(embeddings):
    result = embedding_diagnostics(embeddings)
    outcomes = result["outcomes"]["alignment"]
    assert outcomes.shape == (9, 2) and outcomes.dtype == torch.float64
    assert outcomes[:, 1].tolist() == [2, 2, 1, 1, 1, 4, 1, 1, 2]
    assert result["alignment"] == float(outcomes[:, 0].sum() / outcomes[:, 1].sum())
    lone = squared_distance(unit(embeddings.image_embeds)[3], unit(embeddings.text_embeds)[0])
    assert float(outcomes[3, 0]) == pytest.approx(lone, abs=1e-6)


def test_collapsed_and_even_embeddings_are_the_ends_of_the_scale():
    assert uniformity(torch.ones(50, 8)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[0.0, 1], [0, -1]]), t=3) == pytest.approx(-12)
    torch.manual_seed(0)
    even = torch.randn(4000, 64)  # two random points of a wide sphere: cosine near 0, so about -2 t
    assert uniformity(even) == pytest.approx(-4 + 8 / 64, abs=0.02)
    assert modality_gap(even, -even) == pytest.approx(
        2 * float(torch.nn.functional.normalize(even, dim=1).mean(0).norm())
    )


def test_captions_of_one_image_are_no_pair():
    texts = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert uniformity(texts, torch.tensor([0, 0, 1, 1])) == pytest.approx(-4)  # only orthogonal pairs
    assert uniformity(texts) == pytest.approx(math.log((2 + 4 * math.exp(-4)) / 6))


def test_what_is_undefined_is_left_out():
    alone = DatasetEmbeddings(draw(1), draw(3, seed=1), torch.zeros(3, dtype=torch.long))
    result = embedding_diagnostics(alone)
    assert set(result) == {"modality_gap", "alignment", "n", "n_captions", "outcomes"}


def test_a_model_is_measured_by_its_embeddings(tiny_clip, tiny_scenes):
    result = evaluate_diagnostics(Encoder(*tiny_clip, batch_size=3, device="cpu"), tiny_scenes)
    expected = naive_diagnostics(embed_dataset(Encoder(*tiny_clip), tiny_scenes))
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=2e-6)
    assert (result["n"], result["n_captions"]) == (8, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: modality_gap(draw(2), draw(2, width=5)), "one width, got 6 for images and 5 for texts"),
        (lambda: modality_gap(draw(2)[:0], draw(2)), r"image_embeds of shape \(rows, width\), not empty"),
        (
            lambda: modality_gap(draw(2), torch.zeros(2, 6)),
            r"rows in text_embeds, got 2 bad ones, the first at \[0, 1\]",
        ),
        (lambda: uniformity(draw(3) / 0 * 0), "finite, non-zero rows in embeds, got 3 bad ones"),
        (lambda: uniformity(draw(3), t=0), "Expected t > 0"),
        (lambda: uniformity(draw(3), tile_size=0), "tile_size >= 1"),
        (lambda: uniformity(draw(3), torch.zeros(2, dtype=torch.long)), "groups as 3 integers"),
        (lambda: uniformity(draw(3), torch.zeros(3)), "groups as 3 integers, got torch.float32"),
        (lambda: alignment_by_image(draw(2), draw(3), torch.tensor([0, 1, 2])), r"in \[0, 2\).*from 0 to 2"),
        (lambda: alignment_by_image(draw(2), draw(3), torch.tensor([0, 1])), r"got shape \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
