"""Export a ViT student for sentence-transformers, where `SentenceTransformer(FOLDER)` needs no code of ours.

Its `encode` takes pictures or texts. Up to version 5.3 one call takes both in one list; later versions need two calls.
"""

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_dclip.data.files import write_json
from modeling_dclip.encoders.loading import load_processor
from modeling_dclip.hub.export.onnx import Deviation
from modeling_dclip.hub.export.readers import (
    OPEN_PICTURE,
    Reader,
    compare_reader,
    describe_readings,
    write_readme,
)
from modeling_dclip.hub.native_clip import require_stock_clip, to_native_clip, to_native_processor

# Since 5.4 `Transformer` reads CLIP itself; every version reads this older name.
MODULES = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
# PIL's preprocessing, as ours: torchvision's pixels differ by 1 to 2 grey levels.
MODULE_SETTINGS = {"processor_kwargs": {"backend": "pil"}}
_USE = f"""
from sentence_transformers import SentenceTransformer
{OPEN_PICTURE.strip()}


model = SentenceTransformer("FOLDER")  # this one
image_embeds = model.encode([open_picture("photo.jpg")], normalize_embeddings=True)  # inner products are cosines
text_embeds = model.encode(["a photo of a dog"], normalize_embeddings=True)
"""
_WHY = {
    "text": "sentence-transformers reads a text that is the address of a picture, or the path of one that is there, "
    "as that picture.",
    "picture": "It leaves out what EXIF says of a picture that is open, and makes 16 bits a pixel white. "
    "`open_picture` of the README makes up for both.",
}


def write_sentence_transformers(
    model: PreTrainedModel, source: str | os.PathLike, folder: Path
) -> dict[str, Deviation]:
    """Write the student as a stock CLIP in the layout of sentence-transformers, and compare what it computes.

    Args:
        model ([`DCLIPModel`]): A ViT student with CLIP's own positions.
        source (`str` or `os.PathLike`): The model's folder, with tokenizer and preprocessing.
        folder (`Path`): A new folder.

    Returns:
        `dict[str, Deviation]`: The file of weights, and how far its embeddings are from the model's.

    Raises:
        ImportError: If sentence-transformers is not installed. An export that cannot be checked is not written.
        ValueError: If the model is no stock CLIP, or the embeddings of plain texts and pictures differ.
    """
    require_stock_clip(model, "sentence-transformers")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"Expected sentence-transformers, which checks the export, got {error}. Install it with `pip install "
            "sentence-transformers`."
        ) from error
    inner = folder / str(MODULES[0]["path"])
    inner.mkdir(parents=True)
    processor = load_processor(source)
    native = to_native_processor(processor)
    native.tokenizer.model_max_length = model.config.text_config.max_position_embeddings
    to_native_clip(model).save_pretrained(inner)
    native.save_pretrained(inner)
    native.image_processor.save_pretrained(inner)
    write_json(inner / "sentence_bert_config.json", MODULE_SETTINGS, indent=2)
    write_json(folder / "modules.json", MODULES, indent=2)
    versions = {name: metadata.version(name) for name in ("sentence-transformers", "transformers", "torch")}
    settings = {"__version__": {name.replace("-", "_"): version for name, version in versions.items()}}
    write_json(folder / "config_sentence_transformers.json", settings, indent=2)
    encoder = SentenceTransformer(str(folder), device="cpu")

    def encode(inputs: list[Any]) -> torch.Tensor:
        return torch.from_numpy(encoder.encode(inputs, show_progress_bar=False))

    reader = Reader("sentence-transformers", encode, encode, _WHY, install="sentence-transformers pillow")
    measured, readings = compare_reader(model, processor, reader)
    write_readme(folder, _USE, readings, reader)
    weights = f"{MODULES[0]['path']}/model.safetensors"
    return {weights: measured | {"differs": describe_readings(readings, reader)}}
