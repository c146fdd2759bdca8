"""A tiny CLIP with its processor, and a handful of drawn scenes."""

import pytest
from transformers import AutoModel, AutoProcessor

from modeling_dclip.data.scenes import load_scenes


@pytest.fixture(scope="session")
def tiny_clip(tiny_clip_dir):
    """`(model, processor)`, the processor with the PIL backend."""
    return AutoModel.from_pretrained(tiny_clip_dir), AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil")


@pytest.fixture(scope="session")
def tiny_scenes():
    """Eight scenes of two captions each."""
    return load_scenes("test", n=8, captions_per_image=2, image_size=48)
