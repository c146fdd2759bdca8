"""Convert checkpoints of open_clip to transformers' format, those of MambaVision and MobileCLIP to this package's.

    python -m modeling_dclip.hub.convert open_clip ViT-B-16:datacomp_xl_s13b_b90k runs/datacomp_vitb16
    python -m modeling_dclip.hub.convert open_clip FOLDER_WITH_OPEN_CLIP_CONFIG runs/converted
    python -m modeling_dclip.hub.convert mambavision --checkpoint mambavision_tiny_1k.pth.tar --output runs/mambavision
    python -m modeling_dclip.hub.convert mobileclip --checkpoint mobileclip_s1.pt --output runs/mobileclip_s1_text

open_clip: the ViTs of CLIP (OpenAI, LAION, DataComp, DFN, MetaCLIP), of SigLIP and of SigLIP 2 become a CLIPModel, a
MetaClip2Model or a SiglipModel with processor and tokenizer, which --clip_model of train.py takes. The folder is
compared with open_clip, and not written if it gives other embeddings.

The output folder holds weights, config, code, preprocessing for images, and a README with a note on the licence. Every
key of the checkpoint (for MobileCLIP: of its text tower) must have its place in the model. If one has none, nothing is
written and the message names the key. If MambaVision's shapes are those of no preset, give its published config as
`--config`. `--projection_dim` replaces its head by a new, untrained projection.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from modeling_dclip.data.failures import command
from modeling_dclip.data.specs import CommandParser, Range
from modeling_dclip.hub.convert import MAMBAVISION_NOTE, MOBILECLIP_NOTE, convert_mambavision, convert_mobileclip

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    options = kinds.add_parser("open_clip")
    options.add_argument(
        "spec",
        metavar="SPEC",
        help="NAME:PRETRAINED, hf-hub:ORGANISATION/REPOSITORY, or a folder in open_clip's layout",
    )
    options.add_argument("output", metavar="OUT", help="a new or empty folder")
    mambavision = kinds.choices["mambavision"]
    mambavision.add_argument("--config", help="published config as JSON, needed if the shapes are those of no preset")
    mambavision.add_argument(
        "--projection_dim",
        range=Range(1, 2**16, whole=True),
        help="width of a new, untrained projection in place of the head",
    )
    args = parser.parse_args(argv)
    if args.kind == "open_clip":
        _convert_open_clip(args.spec, args.output)
        return
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


def _convert_open_clip(spec: str, output: str) -> None:
    from modeling_dclip.hub.convert.open_clip import convert_open_clip  # `--help` need not wait for it

    done = convert_open_clip(spec, output)
    parameters = sum(parameter.numel() for parameter in done.model.parameters())
    sys.stdout.write(
        f"{output}: {type(done.model).__name__}, {parameters:,} parameters; all {done.weights} weights of open_clip's "
        f"model have their place.\nLargest difference from open_clip's embeddings: {done.same:.1e} of the largest "
        f"value on the same input, {done.read:.1e} on plain pictures and texts.\n"
    )
    for note in done.notes:
        sys.stdout.write(f"{note}\n")
    sys.stdout.write(f"Licence: {done.licence}\nREADME.md in it says which texts and pictures are read otherwise.\n")


if __name__ == "__main__":
    main()
