"""Fixtures every test may use: a stock CLIP small enough to run in milliseconds."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from modeling_dclip.encoders import families

# Scripts that tests start as processes of their own.
collect_ignore_glob = ["run_*.py", "*/run_*.py"]


@pytest.fixture(scope="session", autouse=True)
def no_test_writes_into_the_users_cache(tmp_path_factory):
    """The cache of this package is a folder of the session; those of other packages stay where they are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in (("HF_HOME", "huggingface"), ("MPLCONFIGDIR", "matplotlib")):
            patch.setenv(name, os.environ.get(name) or str(cache / folder))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def each_test_is_told_what_a_process_says_once():
    """The tests of a session are one process."""
    families.tell_cut_once.cache_clear()


@pytest.fixture(autouse=True)
def each_test_leaves_the_logs_as_they_were():
    """`train.py` sets how much the package and the root logger say, and its own process ends with it."""
    loggers = logging.getLogger(), logging.getLogger("modeling_dclip")
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


WORDS = ["a", "photo", "of", "the", "red", "blue", "small", "large", "circle", "square", "left", "right", "and", "dog"]


def make_tokenizer(folder, max_length=77):
    """A CLIPTokenizer of single letters and a few whole words, written to `folder` and read back."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merge = (symbols[0], symbols[1])
            if merge not in merges:
                merges.append(merge)
            symbols = ["".join(merge), *symbols[2:]]
            if symbols[0] not in pieces:
                pieces.append(symbols[0])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)


def make_clip_config(tokenizer, **vision):
    """A two-layer CLIP of 16-wide embeddings on 32-pixel images."""
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": tokenizer.model_max_length,
    }
    return CLIPConfig(
        text_config={**layers, **tokens, "projection_dim": 16},
        vision_config={**layers, "image_size": 32, "patch_size": 8, "projection_dim": 16, **vision},
        projection_dim=16,
    )


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory):
    """Folder of a random stock CLIPModel (16-wide, 32 pixels) with its CLIPTokenizer and CLIP image processor."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    torch.manual_seed(0)
    CLIPModel(make_clip_config(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(tiny_clip_dir):
    """The `DCLIPProcessor` of the tiny CLIP."""
    from modeling_dclip import DCLIPProcessor

    return DCLIPProcessor.from_pretrained(tiny_clip_dir)


@pytest.fixture(scope="session")
def tiny_clip(tiny_clip_dir):
    """`(model, processor)`, the processor with the PIL backend."""
    return AutoModel.from_pretrained(tiny_clip_dir), AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil")


@pytest.fixture(scope="session")
def tiny_scenes():
    """Eight scenes of two captions each."""
    from modeling_dclip.data.scenes import load_scenes

    return load_scenes("test", n=8, captions_per_image=2, image_size=48)
