"""Retrieval as clip_benchmark measures it, fetched from the package registry. Opt in with `make test-conformance`.

Its recall from images counts an image as found if any of its captions is among the first k, ours too: the definitions
agree. They differ in ties alone. It takes the order of `topk`, ours counts them against the model; the embeddings of
parity have none.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.retrieval import evaluate_retrieval, retrieval_metrics
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset

pytestmark = pytest.mark.conformance

PACKAGES = ("clip-benchmark==1.6.2", "tqdm")
OURS = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}


@pytest.fixture(scope="module")
def clip_benchmark(tmp_path_factory):
    """A function from embeddings to clip_benchmark's recalls, by our names."""
    packages, folder = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("embeddings")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    subprocess.run([*pip, *PACKAGES], check=True)
    script = Path(__file__).with_name("run_clip_benchmark.py")

    def measure(embeddings):
        torch.save(tuple(embeddings), folder / "embeddings.pth")
        files = [str(folder / "embeddings.pth"), str(folder / "metrics.json")]
        subprocess.run([sys.executable, str(script), str(packages), *files], check=True)
        found = json.loads((folder / "metrics.json").read_text())
        return {f"{way}_recall@{k}": found[f"{name}_recall@{k}"] for way, name in OURS.items() for k in (1, 5, 10)}

    return measure


def made_embeddings(captions_per_image):
    generator = torch.Generator().manual_seed(0)
    owners = torch.arange(len(captions_per_image)).repeat_interleave(torch.tensor(captions_per_image))
    images = torch.randn(len(captions_per_image), 32, generator=generator)
    return DatasetEmbeddings(images, images[owners] + 3 * torch.randn(len(owners), 32, generator=generator), owners)


@pytest.mark.parametrize("captions_per_image", [(1,) * 200, (5,) * 200, (5, 6, 1, 7) * 50])
def test_recalls_of_embeddings_are_clip_benchmarks(clip_benchmark, captions_per_image):
    embeddings = made_embeddings(captions_per_image)
    expected, found = clip_benchmark(embeddings), retrieval_metrics(*embeddings)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 6) for value in expected.values()}) > 3 and max(expected.values()) < 1


def test_recalls_of_a_model_are_clip_benchmarks(clip_benchmark, tiny_clip_dir):
    from transformers import AutoModel, AutoProcessor

    from modeling_dclip.data.scenes import load_scenes

    model, processor = (
        AutoModel.from_pretrained(tiny_clip_dir),
        AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil"),
    )
    scenes = load_scenes("test", n=40, captions_per_image=2, image_size=48)
    embeddings = embed_dataset(Encoder(model, processor), scenes)
    similarity = embeddings.text_embeds @ embeddings.image_embeds.T
    right = similarity.gather(1, embeddings.image_of_caption[:, None])
    assert int(((similarity - right).abs() < 1e-6).sum()) == len(right), (
        "no ties but with itself, or the definitions differ"
    )
    expected, found = clip_benchmark(embeddings), evaluate_retrieval(Encoder(model, processor), scenes)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_ties_make_clip_benchmark_better_than_the_model_is(clip_benchmark):
    """All images alike and all captions alike: nothing is known,
    and `topk` answers with rows that happen to be right.
    """
    owners = torch.arange(20).repeat_interleave(5)
    embeddings = DatasetEmbeddings(torch.ones(20, 32), torch.ones(100, 32), owners)
    expected, found = clip_benchmark(embeddings), retrieval_metrics(*embeddings)
    assert found["text_to_image_recall@10"] == found["image_to_text_recall@10"] == 0
    assert expected["text_to_image_recall@10"] == pytest.approx(10 / 20)  # every caption gets the same ten images
    assert expected["image_to_text_recall@10"] >= 1 / 20  # the same ten captions belong to one image at least
