"""Retrieval metrics against naive float64 loops, other libraries where installed, properties, and bad input."""

import pytest
import torch

from modeling_dclip.evaluation.embedding import DatasetEmbeddings
from modeling_dclip.evaluation.retrieval import (
    TIE_TOLERANCE,
    evaluate_retrieval,
    metrics_from_ranks,
    retrieval_metrics,
    retrieval_ranks,
)


def make_embeddings(captions_per_image=(5,) * 12, width=8, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.tensor([image for image, count in enumerate(captions_per_image) for _ in range(count)])
    owners = owners[torch.randperm(len(owners), generator=generator)]
    images = torch.randn(len(captions_per_image), width, generator=generator)
    texts = images[owners] + noise * torch.randn(len(owners), width, generator=generator)
    return DatasetEmbeddings(images, texts, owners)


def naive_metrics(images, texts, owners, ks=(1, 5, 10)):
    """One question at a time, in float64, by sorting; ties against the model."""
    images, texts = (torch.nn.functional.normalize(x.double(), dim=1) for x in (images, texts))
    similarity = (texts @ images.T).tolist()
    metrics = {}

    def add(direction, questions):
        ranked = []
        for scores, relevant in questions:
            order = sorted(range(len(scores)), key=lambda j: (-scores[j], j in relevant))
            ranked.append([place + 1 for place, j in enumerate(order) if j in relevant])
        for k in ks:
            metrics[f"{direction}_recall@{k}"] = sum(places[0] <= k for places in ranked) / len(ranked)
        metrics[f"{direction}_mrr"] = sum(1 / places[0] for places in ranked) / len(ranked)
        metrics[f"{direction}_map"] = sum(
            sum((hit + 1) / place for hit, place in enumerate(places)) / len(places) for places in ranked
        ) / len(ranked)

    owners = owners.tolist()
    add("text_to_image", [(similarity[c], {owner}) for c, owner in enumerate(owners)])
    columns = [[row[i] for row in similarity] for i in range(len(images))]
    add("image_to_text", [(columns[i], {c for c, o in enumerate(owners) if o == i}) for i in range(len(images))])
    return metrics


@pytest.mark.parametrize("captions_per_image", [(1,) * 30, (5,) * 12, (1, 7, 2, 2, 5, 1, 1, 3)])
@pytest.mark.parametrize("chunk_size", [1, 3, 1024])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_metrics_equal_naive_loops(captions_per_image, chunk_size, noise):
    embeddings = make_embeddings(captions_per_image, noise=noise)
    metrics = retrieval_metrics(*embeddings, chunk_size=chunk_size)
    assert metrics == pytest.approx(naive_metrics(*embeddings), abs=1e-12)


def test_average_precision_equals_sklearn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    images, texts, owners = make_embeddings((1, 7, 2, 5), noise=2.0)
    scores = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T
    expected = [sklearn_metrics.average_precision_score(owners == i, scores[i]) for i in range(len(images))]
    assert retrieval_metrics(images, texts, owners)["image_to_text_map"] == pytest.approx(
        sum(expected) / len(expected)
    )


def test_metrics_equal_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.retrieval", reason="torchmetrics is not installed")
    images, texts, owners = make_embeddings((1, 7, 2, 5, 3), noise=2.0)
    scores = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T
    relevant = owners == torch.arange(len(images))[:, None]
    questions = torch.arange(len(images))[:, None].expand_as(scores)
    ours = retrieval_metrics(images, texts, owners)
    for metric, key in (
        (retrieval.RetrievalMRR(), "image_to_text_mrr"),
        (retrieval.RetrievalMAP(), "image_to_text_map"),
        (retrieval.RetrievalHitRate(top_k=5), "image_to_text_recall@5"),
    ):
        positive = scores.flatten() + 2  # torchmetrics takes scores <= 0 for "not retrieved"
        value = metric(positive, relevant.flatten(), indexes=questions.flatten())
        assert ours[key] == pytest.approx(float(value), abs=1e-6)


def test_perfect_embeddings_give_one():
    images = torch.eye(6)
    owners = torch.arange(6).repeat_interleave(3)
    metrics = retrieval_metrics(images, images[owners], owners)
    assert set(metrics.values()) == {1.0}


def test_hand_worked_example():
    """Image 0 finds its captions at places 1 and 3; image 1 at place 2 (its caption ties with nothing)."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    angles = torch.tensor([0.1, 1.2, 0.5])  # from image 0; owners 0, 0, 1
    texts = torch.stack([angles.cos(), angles.sin()], dim=1)
    ranks = retrieval_ranks(images, texts, torch.tensor([0, 0, 1]))
    assert ranks.image_to_text.tolist() == [1, 3, 2]
    assert ranks.text_to_image.tolist() == [1, 2, 2]
    metrics = metrics_from_ranks(ranks, ks=(1,))
    assert metrics["image_to_text_map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert metrics["image_to_text_mrr"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["image_to_text_recall@1"] == 0.5


def test_reordering_images_and_captions_changes_nothing():
    images, texts, owners = make_embeddings((2, 5, 1, 4, 3, 3), noise=1.5)
    texts[3] = texts[8]  # an exact tie
    expected = retrieval_metrics(images, texts, owners)
    image_order, text_order = torch.randperm(len(images)), torch.randperm(len(texts))
    moved = torch.argsort(image_order)[owners]
    assert retrieval_metrics(images[image_order], texts[text_order], moved[text_order]) == pytest.approx(expected)


def test_scaling_embeddings_changes_nothing():
    images, texts, owners = make_embeddings()
    scaled = retrieval_metrics(images * 40, texts * torch.rand(len(texts), 1).add(0.1), owners)
    assert scaled == pytest.approx(retrieval_metrics(images, texts, owners))


def test_collapsed_embeddings_score_at_the_floor():
    owners = torch.arange(20).repeat_interleave(3)
    ranks = retrieval_ranks(torch.ones(20, 7), torch.ones(60, 7), owners, chunk_size=4)
    assert ranks.text_to_image.tolist() == [20] * 60
    assert ranks.image_to_text.tolist() == [58, 59, 60] * 20


def test_a_difference_below_rounding_is_a_tie_and_one_above_is_not():
    for offset, expected in ((TIE_TOLERANCE / 4, 2), (TIE_TOLERANCE * 8, 1)):
        cosine = 0.5
        images = torch.tensor(
            [[cosine, (1 - cosine**2) ** 0.5], [cosine - offset, (1 - (cosine - offset) ** 2) ** 0.5]]
        )
        ranks = retrieval_ranks(images, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        assert ranks.text_to_image[0] == expected


def test_half_precision_embeddings_are_ranked_in_float32():
    images, texts, owners = make_embeddings()
    expected = retrieval_ranks(images.bfloat16().float(), texts.bfloat16().float(), owners)
    ranks = retrieval_ranks(images.bfloat16(), texts.bfloat16(), owners)
    assert torch.equal(ranks.text_to_image, expected.text_to_image)


def test_large_problems_never_hold_the_full_matrix(monkeypatch):
    sizes = []
    original = torch.ge

    def spy(tile, *args, **kwargs):
        sizes.append(tile.numel())
        return original(tile, *args, **kwargs)

    monkeypatch.setattr(torch, "ge", spy)
    retrieval_ranks(torch.randn(300, 4), torch.randn(900, 4), torch.arange(900) % 300, chunk_size=16)
    assert max(sizes) <= 16 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, t, o: (i, t, torch.where(o == 2, 0, o)), r"none for 1 images, the first at \[2\]"),
        (lambda i, t, o: (i, t, torch.where(o == 2, 12, o)), r"in \[0, 12\), got 12 for caption"),
        (lambda i, t, o: (i, t, torch.where(o == 2, -1, o)), r"in \[0, 12\), got -1 for caption"),
        (
            lambda i, t, o: (i.index_fill(0, torch.tensor([4]), torch.nan), t, o),
            r"image_embeds, got 1 bad ones, the first at \[4\]",
        ),
        (
            lambda i, t, o: (i, t.index_fill(0, torch.tensor([3]), torch.inf), o),
            r"text_embeds, got 1 bad ones, the first at \[3\]",
        ),
        (lambda i, t, o: (i, t.index_fill(0, torch.tensor([3]), 0.0), o), "non-zero rows in text_embeds"),
        (lambda i, t, o: (i[:0], t, o), "image_embeds of shape .* got \\(0, 8\\)"),
        (lambda i, t, o: (i, t[:0], o[:0]), "text_embeds of shape .* got \\(0, 8\\)"),
        (lambda i, t, o: (i, t[:, :6], o), "one width, got 8 for images and 6 for texts"),
        (lambda i, t, o: (i, t, o[:-1]), "60 integers, one per caption"),
        (lambda i, t, o: (i, t, o.float()), "integers, one per caption, got torch.float32"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*change(*make_embeddings()))


@pytest.mark.parametrize("ks", [(), (0, 1)])
def test_bad_cut_offs_are_refused(ks):
    with pytest.raises(ValueError, match="cut-offs >= 1"):
        retrieval_metrics(*make_embeddings(), ks=ks)


def test_evaluate_retrieval_equals_transformers_own_forward(tiny_clip, tiny_scenes):
    model, processor = tiny_clip
    result = evaluate_retrieval(model, processor, tiny_scenes, batch_size=3)
    captions = [text for own in tiny_scenes["captions"] for text in own]
    inputs = processor(text=captions, images=list(tiny_scenes["image"]), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.eval()(**inputs)
    owners = torch.arange(len(tiny_scenes)).repeat_interleave(len(captions) // len(tiny_scenes))
    expected = naive_metrics(output.image_embeds, output.text_embeds, owners)
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert (result["n"], result["n_captions"]) == (len(tiny_scenes), len(captions))
    assert result["ranks"].text_to_image.dtype == torch.int64
