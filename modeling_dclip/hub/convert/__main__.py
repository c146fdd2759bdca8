"""Turn checkpoints of MambaVision and MobileCLIP into folders of this package's models.

    python -m modeling_dclip.hub.convert mambavision --checkpoint mambavision_tiny_1k.pth.tar --output runs/mambavision
    python -m modeling_dclip.hub.convert mobileclip --checkpoint mobileclip_s1.pt --output runs/mobileclip_s1_text

Every key of the checkpoint (of its text tower, for MobileCLIP) has its place in the model, or nothing is written and
the keys are named. `--config` gives MambaVision's published config where no preset has the shapes; `--projection_dim`
leaves its head out for a fresh projection. The folder holds weights, config, code, for images the preprocessing, and a
README with the licence's note.
"""

import argparse
import sys
from collections.abc import Sequence

from modeling_dclip.data.failures import command
from modeling_dclip.hub.convert import MAMBAVISION_NOTE, MOBILECLIP_NOTE, convert_mambavision, convert_mobileclip


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and print what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_dclip.hub.convert", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("mambavision", "mobileclip"):
        command = kinds.add_parser(kind)
        command.add_argument("--checkpoint", required=True, help=".safetensors, .pth.tar or a state dict")
        command.add_argument("--output", required=True, help="a new or empty folder")
    mambavision = kinds.choices["mambavision"]
    mambavision.add_argument(
        "--config", help="published config as JSON; needed where no preset has the weights' shapes"
    )
    mambavision.add_argument(
        "--projection_dim", type=int, help="leave the head out; start a fresh projection of this width"
    )
    args = parser.parse_args(argv)
    note, left = MAMBAVISION_NOTE, []
    if args.kind == "mambavision":
        model = convert_mambavision(args.checkpoint, args.output, args.config, args.projection_dim)
    else:
        note = MOBILECLIP_NOTE
        model, left = convert_mobileclip(args.checkpoint, args.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"{args.output}: {type(model).__name__}, {parameters:,} parameters, every key placed.\n")
    if left:
        towers = sorted({key.split(".")[0] for key in left})
        sys.stdout.write(f"Not taken: {len(left)} keys, under {', '.join(towers)} (the image tower and the scale).\n")
    sys.stdout.write(f"Licence: {note}\n")


if __name__ == "__main__":
    main()
