"""Write a trained model for programs that do not know it: ONNX Runtime, transformers.js, torch.export, open_clip,
sentence-transformers.

    python -m modeling_dclip.hub.export onnx --model runs/student --output runs/onnx
    python -m modeling_dclip.hub.export torch_export --model runs/student --output runs/programs
    python -m modeling_dclip.hub.export open_clip --model runs/student --output runs/open_clip
    python -m modeling_dclip.hub.export sentence_transformers --model runs/student --output runs/sentence_transformers

The output is a new folder, written whole or not at all, after what was written gave the model's own outputs. `onnx`
lays it out as transformers.js and optimum read it: `onnx/vision_model.onnx` and `onnx/text_model.onnx`, `_fp16` and
`_quantized` (8-bit integers) beside them, and the configuration, tokenizer and preprocessing. `--towers image` takes
the folder of an image encoder alone too. DM-CLIP's image encoder is fused first (norms and layer scales inside the
weights), with windows that divide its map if `--image_size` is given.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import check_new_folder
from modeling_dclip.hub.export import export_onnx, export_programs, load_model, write_export
from modeling_dclip.hub.export.onnx import DTYPES, TOWERS
from modeling_dclip.hub.export.open_clip import write_open_clip
from modeling_dclip.hub.export.sentence_transformers import write_sentence_transformers


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Export, and say how near the outputs are."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_dclip.hub.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    for name in ("onnx", "torch_export", "open_clip", "sentence_transformers"):
        command = formats.add_parser(name)
        command.add_argument("--model", required=True, help="folder of a dual encoder")
        command.add_argument("--output", required=True, help="a new folder")
        if name in ("onnx", "torch_export"):
            command.add_argument("--towers", nargs="+", default=list(TOWERS), choices=list(TOWERS))
            command.add_argument("--image_size", type=int, help="pixels a side, for DM-CLIP with windows that fit")
        if name == "onnx":
            command.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
            command.add_argument(
                "--winograd", action="store_true", help="DM-CLIP in fp32: convolutions in fewer products"
            )
    args = parser.parse_args(argv)
    check_new_folder(args.output)
    model = load_model(args.model, getattr(args, "image_size", None))
    writers = {
        "onnx": lambda folder: export_onnx(model, args.model, folder, args.towers, args.dtypes, args.winograd),
        "torch_export": lambda folder: export_programs(model, args.model, folder, args.towers),
        "open_clip": lambda folder: write_open_clip(model, args.model, folder),
        "sentence_transformers": lambda folder: write_sentence_transformers(model, args.model, folder),
    }
    found = write_export(args.output, writers[args.format])
    for name, measured in found.items():
        mebibytes = (Path(args.output) / name).stat().st_size / 2**20
        sys.stdout.write(
            f"{args.output}/{name}: {mebibytes:.1f} MiB; the model's outputs to "
            f"{measured['max_relative_difference']:.1e}, cosine at least {measured['min_cosine']:.6f}.\n"
        )


if __name__ == "__main__":
    main()
