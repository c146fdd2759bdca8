"""Publish a trained model on the Hub: each part of it as a repository with a model card.

    python -m modeling_dclip.hub.publish --model outputs/mine/student --teacher outputs/mine/teacher \\
        --results outputs/mine/results --repo_id me/dclip-vitb16 --license mit

It makes these repositories:

    me/dclip-vitb16          the dual encoder
    me/dclip-vitb16-vision   its image encoder alone
    me/dclip-vitb16-teacher  its teacher, if given
    me/dclip-vitb16-clip     for a plain ViT student: the same weights as a stock CLIPModel

All repositories are first written to a folder and checked. Then each is pushed in one commit, or in none if nothing
differs. With `--dry_run` they are written and listed, and nothing leaves the machine.
"""

import sys
from collections.abc import Sequence

from modeling_dclip.data.failures import command
from modeling_dclip.data.specs import CommandParser
from modeling_dclip.hub.publish import describe_publication, publish
from modeling_dclip.hub.publish.facts import PublishArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Publish, and print the addresses of the repositories."""
    parser = CommandParser(
        PublishArguments,
        prog="python -m modeling_dclip.hub.publish",
        description=__doc__,
    )
    (arguments,) = parser.parse(argv)
    sys.stdout.write(describe_publication(publish(arguments)) + "\n")


if __name__ == "__main__":
    main()
