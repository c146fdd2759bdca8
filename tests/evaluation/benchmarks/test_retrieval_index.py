"""Approximate retrieval: the ranks of exact search where the index finds everything,
and an honest word where it does not.
"""

import sys

import pytest
import torch

from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.retrieval_ranks import RetrievalRanks, metrics_from_ranks, retrieval_ranks
from modeling_dclip.evaluation.benchmarks.retrieval import evaluate_retrieval, retrieval_metrics
from modeling_dclip.evaluation.benchmarks.retrieval_index import NOT_FOUND, approximate_ranks


@pytest.fixture
def faiss():
    """Tests that search an index need its package."""
    return pytest.importorskip("faiss", reason="faiss-cpu is not installed")


def make_embeddings(images=300, captions=3, width=16, noise=1.0, gap=0.0, seed=0):
    """Embeddings of which the texts may lie apart from the images, as those of CLIP-like models do."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(images * captions) % images
    image_embeds = torch.randn(images, width, generator=generator)
    text_embeds = image_embeds[owners] + noise * torch.randn(len(owners), width, generator=generator)
    return image_embeds + gap, text_embeds - gap, owners


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tiny_clip, tiny_scenes):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"faiss-cpu .*pip install modeling_dclip\[index\]"):
        retrieval_metrics(*make_embeddings(), index="faiss")
    monkeypatch.setattr(
        "modeling_dclip.evaluation.benchmarks.retrieval.embed_dataset", None
    )  # refused before the work
    with pytest.raises(ImportError, match="faiss-cpu"):
        evaluate_retrieval(Encoder(*tiny_clip), tiny_scenes, index="faiss")


def test_exact_search_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert retrieval_metrics(*make_embeddings())["text_to_image_recall@1"] > 0


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.usefixtures("faiss")
def test_a_scan_of_all_gives_the_exact_ranks(captions):
    embeddings = make_embeddings(captions=captions)
    expected = retrieval_ranks(*embeddings)
    ranks, recalls = approximate_ranks(*embeddings, index="faiss:Flat", depth=len(embeddings[1]))
    assert all(torch.equal(one, other) for one, other in zip(ranks, expected, strict=True))
    assert set(recalls.values()) == {1.0} and len(recalls) == 6


@pytest.mark.usefixtures("faiss")
def test_what_lies_beyond_the_depth_is_not_found():
    embeddings = make_embeddings(noise=2.0)
    expected = retrieval_ranks(*embeddings)
    ranks, _ = approximate_ranks(*embeddings, index="faiss:Flat", depth=20)
    assert torch.equal(
        ranks.text_to_image, torch.where(expected.text_to_image <= 20, expected.text_to_image, NOT_FOUND)
    )
    assert torch.equal(
        ranks.image_to_text, torch.where(expected.image_to_text <= 20, expected.image_to_text, NOT_FOUND)
    )
    metrics, exact = retrieval_metrics(*embeddings, index="faiss:Flat", depth=20), metrics_from_ranks(expected)
    for name in ("text_to_image_recall@10", "image_to_text_recall@1", "rsum"):
        assert metrics[name] == pytest.approx(exact[name], abs=1e-12)
    for name in ("text_to_image_mrr", "image_to_text_map"):
        assert name not in metrics  # of all answers, they are not known
        assert exact[name] - 1 / 20 < metrics[f"{name}@20"] < exact[name]


def test_answers_that_were_not_found_add_nothing():
    ranks = RetrievalRanks(
        torch.tensor([1, NOT_FOUND, 4]), torch.tensor([2, NOT_FOUND, NOT_FOUND]), torch.tensor([0, 0, 1])
    )
    metrics = metrics_from_ranks(ranks, ks=(1, 5), depth=5)
    assert metrics["text_to_image_recall@5"] == pytest.approx(2 / 3)
    assert metrics["text_to_image_mrr@5"] == metrics["text_to_image_map@5"] == pytest.approx((1 + 1 / 4) / 3)
    assert metrics["image_to_text_recall@5"] == 0.5 and metrics["image_to_text_map@5"] == (1 / 2 / 2) / 2
    assert metrics["text_to_image_median_rank"] == 4
    assert "image_to_text_median_rank" not in metrics  # it lies between 2 and what was not found


@pytest.mark.parametrize("index", ["faiss", "faiss:HNSW16"])
@pytest.mark.parametrize("gap", [0.0, 1.0])
@pytest.mark.usefixtures("faiss")
def test_effort_grows_until_the_index_finds_enough(index, gap):
    embeddings = make_embeddings(images=1500, captions=2, gap=gap)
    exact = retrieval_metrics(*embeddings)
    metrics = retrieval_metrics(*embeddings, index=index)
    for direction in ("text_to_image", "image_to_text"):
        found = [metrics[f"{direction}_index_recall@{k}"] for k in (1, 5, 10)]
        assert all(0.97 < share <= 1 for share in found)  # 0.99 is reached on other queries than these
        assert metrics[f"{direction}_recall@1"] == pytest.approx(exact[f"{direction}_recall@1"], abs=0.02)


@pytest.mark.usefixtures("faiss")
def test_an_index_that_finds_little_says_so_and_finds_little():
    embeddings = make_embeddings(images=1500, captions=2, noise=0.5)
    ranks, recalls = approximate_ranks(*embeddings, index="faiss:IVF30,Flat", target_recall=1e-9)
    assert 0.05 < recalls["text_to_image_index_recall@10"] < 0.9
    assert 0.05 < (ranks.text_to_image == NOT_FOUND).double().mean() < 0.9
    compressed, recalls = approximate_ranks(
        *embeddings, index="faiss:PQ4x4"
    )  # similarities of other vectors than the given
    assert recalls["text_to_image_index_recall@1"] < 0.9


@pytest.mark.usefixtures("faiss")
def test_the_reported_share_is_that_of_queries_not_tuned_on():
    """Of 40 queries, the sample of 10 tunes; 10 others report: as counted by hand from the exact first answer."""
    images, texts, owners = make_embeddings(images=1500, captions=1, noise=0.5)
    options = {"index": "faiss:IVF30,Flat", "target_recall": 1e-9, "ks": (1,), "sample": 10}
    ranks, recalls = approximate_ranks(images, texts, owners, **options)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[-10:]
    units = [torch.nn.functional.normalize(part, dim=1) for part in (texts, images)]
    nearest_is_own = (units[0] @ units[1].T).argmax(dim=1)[order] == owners[order]
    assert nearest_is_own.any()
    found = (ranks.text_to_image[order] == 1) & nearest_is_own
    low, high = int(found.sum()), int(found.sum() + (~nearest_is_own).sum())
    assert low <= round(10 * recalls["text_to_image_index_recall@1"]) <= high


@pytest.mark.usefixtures("faiss")
def test_ties_count_against_the_model_in_an_index_too():
    owners = torch.arange(20).repeat_interleave(3)
    ranks, _ = approximate_ranks(torch.ones(20, 7), torch.ones(60, 7), owners)
    assert ranks.text_to_image.tolist() == [20] * 60
    assert ranks.image_to_text.tolist() == [58, 59, 60] * 20


@pytest.mark.usefixtures("faiss")
def test_evaluate_retrieval_searches_an_index(tiny_clip, tiny_scenes):
    exact = evaluate_retrieval(Encoder(*tiny_clip), tiny_scenes)
    found = evaluate_retrieval(Encoder(*tiny_clip), tiny_scenes, index="faiss")
    assert found["text_to_image_recall@5"] == exact["text_to_image_recall@5"]
    assert found["text_to_image_index_recall@10"] == 1.0 and "text_to_image_mrr@100" in found["outcomes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "annoy"}, "'faiss' or 'faiss:FACTORY', .* got 'annoy'"),
        ({"index": "faiss:"}, "got 'faiss:'"),
        ({"index": "faiss:NoSuch"}, "FAISS can build over 300 vectors of width 16, got 'NoSuch'"),
        ({"index": "faiss:IVF4000,Flat"}, "FAISS can build over 300 vectors .* 'IVF4000,Flat'"),
        ({"ks": (1, 200)}, r"depth 100, got \(1, 200\)"),
        ({"ks": (0,)}, r"got \(0,\)"),
        ({"target_recall": 0.0}, "target_recall in"),
        ({"sample": 0}, "sample >= 1"),
    ],
)
@pytest.mark.usefixtures("faiss")
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        approximate_ranks(*make_embeddings(), **options)


def test_bad_cut_offs_for_the_depth_are_named():
    with pytest.raises(ValueError, match="at most the depth 5 "):
        retrieval_metrics(*make_embeddings(), index="faiss", depth=5)
