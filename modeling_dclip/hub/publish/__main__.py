"""Publish a trained model: the dual encoder, its image encoder alone, its teacher, and the CLIP it is, each with a
card.

    python -m modeling_dclip.hub.publish --model outputs/mine/student --teacher outputs/mine/teacher \\
        --results outputs/mine/results --repo_id me/dclip-vitb16 --license mit

makes `me/dclip-vitb16`, `me/dclip-vitb16-vision`, `me/dclip-vitb16-teacher` and, for a plain ViT student,
`me/dclip-vitb16-clip`, a stock `CLIPModel`. With `--dry_run` nothing leaves the machine. Everything is written and
checked in a folder first; each repository then changes in one commit, or not at all where it already is as it should
be.
"""

import argparse
import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from modeling_dclip.data.failures import command
from modeling_dclip.hub.publish import describe_publication, publish
from modeling_dclip.hub.publish.facts import PublishArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Publish, and print the links."""
    parser = HfArgumentParser(
        PublishArguments,
        prog="python -m modeling_dclip.hub.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    (arguments,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    sys.stdout.write(describe_publication(publish(arguments)) + "\n")


if __name__ == "__main__":
    main()
