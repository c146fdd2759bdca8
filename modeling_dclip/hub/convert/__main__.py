"""Convert checkpoints of MambaVision and MobileCLIP to folders of this package's models.

    python -m modeling_dclip.hub.convert mambavision --checkpoint mambavision_tiny_1k.pth.tar --output runs/mambavision
    python -m modeling_dclip.hub.convert mobileclip --checkpoint mobileclip_s1.pt --output runs/mobileclip_s1_text

The output folder holds weights, config, code, preprocessing for images, and a README with a note on the licence. Every
key of the checkpoint (for MobileCLIP: of its text tower) must have its place in the model. If one has none, nothing is
written and the message names the key. If MambaVision's shapes are those of no preset, give its published config as
`--config`. `--projection_dim` replaces its head by a new, untrained projection.
"""

import argparse
import sys
from collections.abc import Sequence

from transformers import PreTrainedModel

from modeling_dclip.data.failures import command
from modeling_dclip.data.specs import CommandParser, Range
from modeling_dclip.hub.convert import MAMBAVISION_NOTE, MOBILECLIP_NOTE, convert_mambavision, convert_mobileclip


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what was written."""
    parser = CommandParser(
        prog="python -m modeling_dclip.hub.convert", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("mambavision", "mobileclip"):
        options = kinds.add_parser(kind)
        options.add_argument("--checkpoint", required=True, help=".safetensors, .pth.tar or a state dict")
        options.add_argument("--output", required=True, help="a new or empty folder")
    mambavision = kinds.choices["mambavision"]
    mambavision.add_argument("--config", help="published config as JSON, needed if the shapes are those of no preset")
    mambavision.add_argument(
        "--projection_dim",
        range=Range(1, 2**16, whole=True),
        help="width of a new, untrained projection in place of the head",
    )
    args = parser.parse_args(argv)
    note = MAMBAVISION_NOTE
    left: list[str] = []
    model: PreTrainedModel
    if args.kind == "mambavision":
        model = convert_mambavision(args.checkpoint, args.output, args.config, args.projection_dim)
    else:
        note = MOBILECLIP_NOTE
        model, left = convert_mobileclip(args.checkpoint, args.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{args.output}: {type(model).__name__}, {parameters:,} parameters, every key has its place.\n")
    if left:
        towers = sorted({key.split(".")[0] for key in left})
        sys.stdout.write(
            f"Left out: {len(left)} keys, under {', '.join(towers)} (the image tower and the similarity scale).\n"
        )
    sys.stdout.write(f"Licence: {note}\n")


if __name__ == "__main__":
    main()
