"""Retrieval metrics against naive float64 loops, other libraries where installed, properties, and bad input."""

import statistics

import pytest
import torch

from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.retrieval_ranks import (
    TIE_TOLERANCE,
    RetrievalRanks,
    metrics_from_ranks,
    outcomes_from_ranks,
    retrieval_ranks,
)
from modeling_dclip.evaluation.benchmarks.efficiency import MIB, peak_memory_mib
from modeling_dclip.evaluation.benchmarks.retrieval import embeddings_of_pairs, evaluate_retrieval, retrieval_metrics
from modeling_dclip.evaluation.embedding import DatasetEmbeddings


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
        metrics[f"{direction}_median_rank"] = statistics.median(places[0] for places in ranked)

    owners = owners.tolist()
    add("text_to_image", [(similarity[c], {owner}) for c, owner in enumerate(owners)])
    columns = [[row[i] for row in similarity] for i in range(len(images))]
    add("image_to_text", [(columns[i], {c for c, o in enumerate(owners) if o == i}) for i in range(len(images))])
    if ks == (1, 5, 10):
        metrics["rsum"] = sum(value for name, value in metrics.items() if "recall" in name)
    return metrics


@pytest.mark.parametrize("captions_per_image", [(1,) * 30, (5,) * 12, (1, 7, 2, 2, 5, 1, 1, 3)])
@pytest.mark.parametrize("chunk_size", [1, 3, 1024])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_metrics_equal_naive_loops(captions_per_image, chunk_size, noise):
    embeddings = make_embeddings(captions_per_image, noise=noise)
    metrics = retrieval_metrics(*embeddings, chunk_size=chunk_size)
    assert metrics == pytest.approx(naive_metrics(*embeddings), abs=1e-12)


@pytest.mark.parametrize("chunk_size", [20, 1024])
def test_slots_of_many_and_of_few_images_are_both_counted(chunk_size):
    """120 images have a first caption and 60 a second, which are counted a slot at a time;
    one has 90, counted together.
    """
    embeddings = make_embeddings((1, 2) * 60 + (90,), noise=2.0)
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
    assert metrics.pop("rsum") == 6
    assert set(metrics.values()) == {1.0}


def test_the_sum_of_recalls_needs_all_six_of_them():
    assert "rsum" not in retrieval_metrics(*make_embeddings(), ks=(1, 5))
    assert "rsum" in retrieval_metrics(*make_embeddings(), ks=(1, 3, 5, 10))


def test_the_median_of_an_even_number_of_ranks_lies_in_the_middle():
    ranks = RetrievalRanks(torch.tensor([1, 2, 5, 8]), torch.tensor([4, 1, 9, 2]), torch.tensor([0, 0, 1, 2]))
    metrics = metrics_from_ranks(ranks)
    assert metrics["text_to_image_median_rank"] == 3.5
    assert metrics["image_to_text_median_rank"] == 2  # of the images' first hits 1, 9 and 2


@pytest.mark.parametrize("captions_per_image", [(5,) * 12, (1, 7, 2, 2, 5, 1, 1, 3)])
def test_outcomes_sum_to_the_metrics(captions_per_image):
    ranks = retrieval_ranks(*make_embeddings(captions_per_image))
    metrics, outcomes = metrics_from_ranks(ranks), outcomes_from_ranks(ranks)
    assert set(metrics) - set(outcomes) == {"rsum", "text_to_image_median_rank", "image_to_text_median_rank"}
    for name, pairs in outcomes.items():
        assert pairs.shape == (len(captions_per_image), 2) and pairs.dtype == torch.float64
        assert float(pairs[:, 0].sum() / pairs[:, 1].sum()) == metrics[name]
        from_texts = name.startswith("text_to_image")
        assert pairs[:, 1].tolist() == (list(captions_per_image) if from_texts else [1] * len(captions_per_image))


def test_outcomes_of_an_image_are_those_of_its_captions():
    ranks = RetrievalRanks(torch.tensor([1, 2, 1]), torch.tensor([1, 3, 2]), torch.tensor([1, 1, 0]))
    outcomes = outcomes_from_ranks(ranks, ks=(1,))
    assert outcomes["text_to_image_recall@1"].tolist() == [[1, 1], [1, 2]]
    assert outcomes["image_to_text_recall@1"].tolist() == [[0, 1], [1, 1]]
    assert outcomes["text_to_image_mrr"].tolist() == outcomes["text_to_image_map"].tolist() == [[1, 1], [1.5, 2]]
    assert outcomes["image_to_text_map"][:, 0].tolist() == pytest.approx([1 / 2, (1 + 2 / 3) / 2])


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


@pytest.fixture(scope="module")
def coco_sized():
    """5,000 images and 25,010 captions, of which ten images have a sixth."""
    owners = torch.cat([torch.arange(25_000) % 5000, torch.arange(10)])
    images = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    return images, images[owners] + torch.randn(25_010, 16, generator=torch.Generator().manual_seed(1)), owners


def test_coco_needs_a_fraction_of_its_matrix(coco_sized):
    peak = peak_memory_mib(lambda: retrieval_ranks(*coco_sized))
    matrix = 5000 * 25_010 * 4 / MIB  # 477 MiB
    assert 8 < peak < 32 < matrix / 10  # a tile, its flags and vectors


def test_memory_does_not_depend_on_how_unevenly_captions_are_spread():
    """A matrix with a row for each image and a column for each caption of the largest one would be 15 MiB."""
    owners = torch.cat([torch.arange(2000), torch.zeros(2000, dtype=torch.long)])
    texts = torch.randn(len(owners), 4, generator=torch.Generator().manual_seed(0))
    peak = peak_memory_mib(lambda: retrieval_ranks(texts[:2000], texts, owners, chunk_size=64))
    assert peak < 4


def test_neither_autocast_nor_short_products_change_the_result(monkeypatch):
    embeddings = make_embeddings((3,) * 40, width=64, noise=2.0)
    expected = retrieval_ranks(*embeddings)
    seen = []
    original = torch.ge
    monkeypatch.setattr(torch, "ge", lambda tile, *a, **kw: seen.append(tile.dtype) or original(tile, *a, **kw))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            ranks = retrieval_ranks(*embeddings)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {torch.float32}
    assert all(torch.equal(one, other) for one, other in zip(ranks, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_ranks_as_the_cpu_does(coco_sized):
    expected = retrieval_ranks(*coco_sized)
    embeddings = [part.cuda() for part in coco_sized]
    torch.cuda.reset_peak_memory_stats()
    ranks = retrieval_ranks(*embeddings)
    assert torch.cuda.max_memory_allocated() < 2 * 1024**3
    for one, other in zip(ranks, expected, strict=True):
        assert (one != other).double().mean() < 1e-4  # a rounding may turn two that lie at the tolerance's edge


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
        (lambda i, t, o: (1e30 * i, t, o), "finite, non-zero rows in image_embeds"),
        (lambda i, t, o: (i.to("meta"), t, o), "one device, got meta for images and cpu for texts"),
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
    result = evaluate_retrieval(Encoder(model, processor, batch_size=3), tiny_scenes)
    captions = [text for own in tiny_scenes["captions"] for text in own]
    inputs = processor(text=captions, images=list(tiny_scenes["image"]), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.eval()(**inputs)
    owners = torch.arange(len(tiny_scenes)).repeat_interleave(len(captions) // len(tiny_scenes))
    expected = naive_metrics(output.image_embeds, output.text_embeds, owners)
    assert {key: value for key, value in result.items() if isinstance(value, float)} == pytest.approx(
        expected, abs=1e-9
    )
    assert {name: pairs.shape for name, pairs in result["outcomes"].items()} == dict.fromkeys(
        (name for name in expected if "median" not in name and name != "rsum"), (len(tiny_scenes), 2)
    )
    assert (result["n"], result["n_captions"]) == (len(tiny_scenes), len(captions))


def test_pairs_are_taken_apart_into_images_and_captions():
    images, texts, owners = make_embeddings((2, 1, 3, 1))
    pairs = embeddings_of_pairs(images[owners], texts, [f"image {row}" for row in owners.tolist()])
    assert torch.equal(pairs.image_embeds[pairs.image_of_caption], images[owners])
    assert len(pairs.image_embeds) == 4 and torch.equal(pairs.text_embeds, texts)
    assert retrieval_metrics(*pairs) == pytest.approx(retrieval_metrics(images, texts, owners))


def test_two_embeddings_of_one_image_are_refused_by_id_and_row():
    images = torch.eye(3)
    with pytest.raises(ValueError, match="two for 'cat': rows 0 and 2"):
        embeddings_of_pairs(images, images, ["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="as many image embeddings as text embeddings and ids, got 3, 3 and 2"):
        embeddings_of_pairs(images, images, ["cat", "dog"])
