"""Export a ViT student for sentence-transformers, where `SentenceTransformer(FOLDER)` needs no code of ours.

Its `encode` takes pictures or texts. Up to version 5.3 one call takes both in one list; later versions need two calls.
"""

import os
from importlib import metadata
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from modeling_dclip.data.files import write_json
from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.loading import load_processor
from modeling_dclip.hub.export.onnx import Deviation, check_outputs
from modeling_dclip.hub.native_clip import has_native_twin, to_native_clip, to_native_processor

# Since 5.4 `Transformer` reads CLIP itself; every version reads this older name.
MODULES = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
# PIL's preprocessing, as ours: torchvision's pixels differ by 1 to 2 grey levels.
MODULE_SETTINGS = {"processor_kwargs": {"backend": "pil"}}
CHECKED_TEXTS = ("a red circle", "two blue squares on a table")


def write_sentence_transformers(
    model: PreTrainedModel, source: str | os.PathLike, folder: Path
) -> dict[str, Deviation]:
    """Write the native twin in the layout of sentence-transformers, and compare the embeddings that it computes.

    Args:
        model ([`DCLIPModel`]): A ViT student with CLIP's own positions.
        source (`str` or `os.PathLike`): The model's folder, with tokenizer and preprocessing.
        folder (`Path`): A new folder.

    Returns:
        `dict[str, Deviation]`: The file of weights, and how far its embeddings are from the model's.

    Raises:
        ImportError: If sentence-transformers is not installed. An export that cannot be checked is not written.
        ValueError: If the model has no native twin, or the embeddings differ.
    """
    if not has_native_twin(model):
        raise ValueError(
            f"Expected a dual ViT student with absolute positions, got {model.config.model_type!r}. "
            "sentence-transformers builds only models of transformers, so every program that reads another model "
            "would need `trust_remote_code`. Publish this one on the Hub, or export it as ONNX."
        )
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
    to_native_clip(model).save_pretrained(inner)
    native.save_pretrained(inner)
    native.image_processor.save_pretrained(inner)
    write_json(inner / "sentence_bert_config.json", MODULE_SETTINGS, indent=2)
    write_json(folder / "modules.json", MODULES, indent=2)
    versions = {name: metadata.version(name) for name in ("sentence-transformers", "transformers", "torch")}
    settings = {"__version__": {name.replace("-", "_"): version for name, version in versions.items()}}
    write_json(folder / "config_sentence_transformers.json", settings, indent=2)
    encoder = SentenceTransformer(str(folder), device="cpu")
    size = model.config.vision_config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size + 17, size + 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    dual = cast("DualEncoder", model)
    with torch.no_grad():
        batch = processor(images=[picture], text=list(CHECKED_TEXTS), return_tensors="pt")
        expected = [
            dual.get_image_features(batch["pixel_values"]).pooler_output,
            dual.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output,
        ]
    found = np.concatenate([encoder.encode([picture]), encoder.encode(list(CHECKED_TEXTS))])
    measured = check_outputs([(torch.from_numpy(found), torch.cat(expected))], "fp32", "sentence-transformers")
    return {f"{MODULES[0]['path']}/model.safetensors": measured}
