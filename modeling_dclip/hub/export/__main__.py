"""Export a trained model for ONNX Runtime, transformers.js, torch.export, open_clip or sentence-transformers.

    python -m modeling_dclip.hub.export onnx --model runs/student --output runs/onnx
    python -m modeling_dclip.hub.export torch_export --model runs/student --output runs/programs
    python -m modeling_dclip.hub.export open_clip --model runs/student --output runs/open_clip
    python -m modeling_dclip.hub.export sentence_transformers --model runs/student --output runs/sentence_transformers

The output is a new folder; OUTPUT.manifest.json beside it says what made it. The export is checked against the model,
and deleted if the outputs differ.

`onnx` writes the layout of transformers.js and optimum: `onnx/vision_model.onnx` and `onnx/text_model.onnx`, the same
with `_fp16` and `_quantized` (8-bit integers), and the configuration, tokenizer and preprocessing. With
`--towers image` the model may be an image encoder alone. DM-CLIP's image encoder is fused first: norms and layer
scales become part of the weights. With `--image_size` it gets windows that divide its feature map.
"""

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import MANIFEST_NAME, check_new_folder, write_manifest
from modeling_dclip.data.specs import CommandParser, Range
from modeling_dclip.hub.export import ONNX_DTYPES, TOWERS, write_export

if TYPE_CHECKING:
    from modeling_dclip.hub.export.onnx import Deviation

DIFFERS = "What differs from the model:"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m modeling_dclip.hub.export",
        description=__doc__,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    for name in ("onnx", "torch_export", "open_clip", "sentence_transformers"):
        options = formats.add_parser(name)
        options.add_argument("--model", required=True, help="folder of a dual encoder")
        options.add_argument("--output", required=True, help="a new folder")
        if name in ("onnx", "torch_export"):
            towers = list(TOWERS)
            options.add_argument("--towers", nargs="+", default=towers, choices=towers, help="encoders to export")
            options.add_argument(
                "--image_size",
                range=Range(1, 2**13, whole=True),
                help="pixels; DM-CLIP gets windows that fit this size",
            )
        if name == "onnx":
            dtypes = list(ONNX_DTYPES)
            options.add_argument("--dtypes", nargs="+", default=dtypes, choices=dtypes, help="precisions to write")
            options.add_argument(
                "--winograd", action="store_true", help="DM-CLIP in fp32: convolutions with fewer multiplications"
            )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Export, and print how far the outputs are from the model's."""
    args = _parse(argv)
    check_new_folder(args.output)
    # PyTorch and transformers take seconds, for which `--help` and a mistake need not wait.
    from modeling_dclip.hub.export.open_clip import write_open_clip
    from modeling_dclip.hub.export.sentence_transformers import write_sentence_transformers
    from modeling_dclip.hub.export.towers import export_onnx, export_programs, load_model

    model = load_model(args.model, getattr(args, "image_size", None))
    writers = {
        "onnx": lambda folder: export_onnx(model, args.model, folder, args.towers, args.dtypes, args.winograd),
        "torch_export": lambda folder: export_programs(model, args.model, folder, args.towers),
        "open_clip": lambda folder: write_open_clip(model, args.model, folder),
        "sentence_transformers": lambda folder: write_sentence_transformers(model, args.model, folder),
    }
    written = write_export(args.output, writers[args.format])
    output = Path(args.output)
    options = {name: value for name, value in vars(args).items() if name not in ("model", "output")}
    manifest = output.with_name(f"{output.name}.{MANIFEST_NAME}")  # beside the folder, which other programs read
    write_manifest(manifest, seed=None, data={"model": args.model}, **options)
    sys.stdout.write(describe_export(output, args.model, written))


def describe_export(output: Path, model: str, written: "Mapping[str, Deviation]") -> str:
    """Say what was written, how near it is to the model, how to use it, and what its reader reads otherwise.

    Args:
        output (`Path`): The export.
        model (`str`): The model's folder.
        written (`Mapping[str, Deviation]`): Files in it with what was measured.

    Returns:
        `str`: Lines.
    """
    from modeling_dclip.hub.export.readers import short_code

    lines = [f"Exported {model} to {output}.", "Each file was loaded again and compared with the model:", ""]
    width = max(map(len, written))
    for name, measured in written.items():
        size_mib = (output / name).stat().st_size / 2**20
        lines.append(
            f"  {name:<{width}}  {size_mib:8,.1f} MiB  largest difference "
            f"{measured['max_relative_difference']:.1e} of the largest value, least "
            f"cosine {measured['min_cosine']:.6f}"
        )
    if code := short_code(output):
        lines += ["", f"To use it ({output / 'README.md'} says more):", "", *code.splitlines()]
    differs = [line for measured in written.values() for line in measured.get("differs", ())]
    for line in ([DIFFERS] if differs else []) + differs:
        lines += ["", *textwrap.wrap(line, 120, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
