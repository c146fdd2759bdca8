"""The `evaluate` modules of this repository, loaded by path without a network."""

from pathlib import Path

import pytest
import torch

import modeling_dclip
from modeling_dclip.evaluation.benchmarks.retrieval import retrieval_metrics

evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")

FOLDER = Path(modeling_dclip.__file__).parent / "evaluation" / "metrics"
NAMES = ("retrieval_recall", "retrieval_map")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a module in a folder needs no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture(params=NAMES)
def metric(request, tmp_path):
    return evaluate.load(str(FOLDER / request.param), cache_dir=str(tmp_path))


@pytest.fixture(scope="module")
def embeddings():
    """Twelve images, 30 captions; one image has one, another five."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([0, *([1] * 5), *(row for row in range(2, 12) for _ in range(2)), 2, 3, 4, 5])
    images = torch.randn(12, 8, generator=generator)
    return images, images[owners] + 2 * torch.randn(30, 8, generator=generator), owners


def expected_of(name, embeddings, **options):
    metrics = retrieval_metrics(*embeddings, **options)
    kinds = ("recall", "rsum") if name == "retrieval_recall" else ("_map", "_mrr")
    return {key: value for key, value in metrics.items() if any(kind in key for kind in kinds)}


def rows_of(embeddings):
    images, texts, owners = embeddings
    return {"image_embeds": images[owners].numpy(), "text_embeds": texts.numpy(), "image_ids": owners.tolist()}


def test_compute_gives_this_packages_numbers(metric, embeddings):
    expected = expected_of(metric.name, embeddings)
    assert len(expected) == {"retrieval_recall": 7, "retrieval_map": 4}[metric.name]
    assert metric.compute(**rows_of(embeddings)) == pytest.approx(expected, abs=1e-12)


def test_batches_give_what_all_rows_at_once_do(metric, embeddings):
    rows = rows_of(embeddings)
    for start in range(0, 30, 7):
        metric.add_batch(**{name: values[start : start + 7] for name, values in rows.items()})
    assert metric.compute() == pytest.approx(expected_of(metric.name, embeddings), abs=1e-12)


def test_ids_may_be_texts(metric, embeddings):
    rows = rows_of(embeddings)
    rows["image_ids"] = [f"image {row}" for row in rows["image_ids"]]
    assert metric.compute(**rows) == pytest.approx(expected_of(metric.name, embeddings), abs=1e-12)


def test_cut_offs_are_an_argument(embeddings, tmp_path):
    metric = evaluate.load(str(FOLDER / "retrieval_recall"), cache_dir=str(tmp_path))
    found = metric.compute(**rows_of(embeddings), ks=[2, 20])
    assert found == pytest.approx(expected_of("retrieval_recall", embeddings, ks=(2, 20)))
    assert "rsum" not in found


def test_an_image_with_two_embeddings_is_named(metric):
    rows = {"image_embeds": [[1.0, 0.0], [0.0, 1.0]], "text_embeds": [[1.0, 0.0]] * 2, "image_ids": ["cat", "cat"]}
    with pytest.raises(ValueError, match="two for 'cat': rows 0 and 1"):
        metric.compute(**rows)


def test_a_module_says_what_it_takes_and_where_it_comes_from(metric):
    assert [form["image_ids"].dtype for form in metric.features] == ["string", "int64"]
    assert "ties count against the model" in metric.description
    assert "image_ids" in metric.inputs_description and metric.citation.startswith("@")
