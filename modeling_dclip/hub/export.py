"""Write an image encoder as ONNX and prove that ONNX Runtime computes the same.

    python -m modeling_dclip.hub.export --model runs/student --output student.onnx

The model is what training wrote, a dual encoder whose image encoder is taken, or an image encoder alone. Input `pixel_values`
(batch, channels, S, S) with a free batch size, output `image_embeds` (batch, D), not normalised. DM-CLIP's encoder is fused first
(norms and layer scales inside the weights), with windows that divide its map if `--image_size` is given.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from modeling_dclip import DCLIPVisionModel, DMCLIPVisionModel
from modeling_dclip.evaluation.results import write_bytes

# By the folder's model_type: each loads its own folder and, out of a dual one, its tower.
ENCODERS = {
    "dmclip": DMCLIPVisionModel,
    "dmclip_vision": DMCLIPVisionModel,
    "dclip": DCLIPVisionModel,
    "dclip_vision": DCLIPVisionModel,
}
GATE = 1e-4  # relative; the orders of sums differ, and eager PyTorch itself is off by about 5e-7
BATCH_SIZES = (1, 3)  # checked: the traced one would not show a batch size that got stuck

NEEDS_EXTRA = "Expected onnxruntime and onnxscript, got {}. Install them with `pip install modeling_dclip[export]`."


class ImageEmbeds(nn.Module):
    """Pixels in, embeddings out: one tensor each, which is what exporters take.

    Args:
        model (`PreTrainedModel`): Whose output has `image_embeds`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed `(B, channels, H, W)` as `(B, D)`."""
        return self.model(pixel_values=pixel_values).image_embeds


def load_image_encoder(model: str | os.PathLike, image_size: int | None = None) -> nn.Module:
    """Load an image encoder in its fastest form that computes the same.

    Args:
        model (`str` or `os.PathLike`): A folder of [`DMCLIPVisionModel`] or [`DCLIPVisionModel`], or of a dual encoder that
            has one: the rest of it is not loaded.
        image_size (`int`, *optional*): Pixels a side; for DM-CLIP with windows that divide the map, also if it is the
            config's. By default the config's, with its own windows.

    Returns:
        `PreTrainedModel`: In eval mode.

    Raises:
        ValueError: If the folder holds another model, or the size is not the config's and the model takes no other.
    """
    model_type = AutoConfig.from_pretrained(model).model_type
    if model_type not in ENCODERS:
        raise ValueError(
            f"Expected an image encoder, or a dual encoder with one, at {model} ({', '.join(ENCODERS)}), got {model_type!r}."
        )
    encoder_class = ENCODERS[model_type]
    config = encoder_class.config_class.from_pretrained(model)
    if image_size is not None and encoder_class is DMCLIPVisionModel:
        config = config.for_image_size(image_size)
    elif image_size not in (None, config.image_size):
        raise ValueError(f"image_size: expected {config.image_size}, which {model} was made for, got {image_size}.")
    encoder = encoder_class.from_pretrained(model, config=config, dtype=torch.float32).eval()
    return encoder.fuse() if hasattr(encoder, "fuse") else encoder


def export_onnx(encoder: nn.Module, output: str | os.PathLike) -> float:
    """Write an image encoder as one `.onnx` file, after ONNX Runtime gave the model's own outputs with it.

    Args:
        encoder (`PreTrainedModel`): From [`load_image_encoder`]; on the CPU.
        output (`str` or `os.PathLike`): Replaced if it is there, written whole or not at all.

    Returns:
        `float`: What [`compare_onnx`] found.

    Raises:
        ImportError: If the extra `export` is not installed.
        ValueError: If the file is no `.onnx`, or the outputs differ.
    """
    if Path(output).suffix != ".onnx":
        raise ValueError(f"Expected a .onnx file to write to, got {str(output)!r}.")
    try:
        import onnxscript  # noqa: F401  what torch.onnx writes with
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format(error)) from error
    size = encoder.config.image_size
    with torch.no_grad():
        program = torch.onnx.export(
            ImageEmbeds(encoder).eval(),
            (torch.zeros(2, encoder.config.num_channels, size, size),),
            input_names=["pixel_values"],
            output_names=["image_embeds"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=65_536)}},
            dynamo=True,
            verbose=False,
        )
    content = program.model_proto.SerializeToString()
    error = compare_onnx(content, encoder)
    write_bytes(output, content)
    return error


@torch.no_grad()
def compare_onnx(content: bytes, encoder: nn.Module) -> float:
    """Compare ONNX Runtime's outputs with the model's, on random pixels and batches of several sizes.

    Args:
        content (`bytes`): Of a `.onnx` file.
        encoder (`PreTrainedModel`): What it was made from; on the CPU.

    Returns:
        `float`: Largest difference over largest value.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If that is more than 1e-4.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format(error)) from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    size, generator, error = encoder.config.image_size, torch.Generator().manual_seed(0), 0.0
    for batch_size in BATCH_SIZES:
        pixels = torch.randn(batch_size, encoder.config.num_channels, size, size, generator=generator)
        expected = ImageEmbeds(encoder)(pixels).numpy()
        (found,) = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        error = max(error, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if not error <= GATE:  # NaN fails this too
        raise ValueError(
            f"Expected ONNX Runtime to give the model's outputs to {GATE:.0e}, got a difference of {error:.1e}."
        )
    return error


def main(argv: Sequence[str] | None = None) -> None:
    """Export, and say how near the outputs are."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_dclip.hub.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of an image encoder, or of a dual encoder")
    parser.add_argument("--output", required=True, help="a .onnx file")
    parser.add_argument(
        "--image_size", type=int, help="pixels a side, for DM-CLIP with windows that fit; the config's by default"
    )
    args = parser.parse_args(argv)
    try:
        error = export_onnx(load_image_encoder(args.model, args.image_size), args.output)
    except (ValueError, OSError, ImportError) as problem:
        parser.error(str(problem))
    mebibytes = Path(args.output).stat().st_size / 2**20
    sys.stdout.write(f"{args.output}: {mebibytes:.1f} MiB; ONNX Runtime's outputs are the model's to {error:.1e}.\n")


if __name__ == "__main__":
    main()
