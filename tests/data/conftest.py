"""Small pictures on disk, and a cache of `datasets` that lives as long as the test."""

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Keep converted parquet files out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def draw():
    """`draw(path, seed=0, size=(32, 24))` writes a picture of noise that depends on the seed, and returns the path."""

    def _draw(path, seed=0, size=(32, 24)):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return _draw
