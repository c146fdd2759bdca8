"""Publish a trained model on the Hub: each part of it as a repository with a model card.

    python -m modeling_dclip.hub.publish --model outputs/mine/student --repo_id me/my-clip --license mit --dry_run

makes these repositories:

    me/my-clip          the dual encoder
    me/my-clip-vision   its image encoder alone, of a CLIP or a DM-CLIP
    me/my-clip-teacher  its teacher, if --teacher names one

All repositories are first written to a folder and checked. With `--dry_run` they are listed, the cards to read are
named, and nothing leaves the machine. Without it each repository is pushed in one commit, or in none if nothing
differs.
"""

import sys
from collections.abc import Sequence

from transformers.utils import logging

from modeling_dclip.data.failures import command, redact
from modeling_dclip.data.specs import CommandParser
from modeling_dclip.hub.publish import describe_dry_run, describe_publication, publish
from modeling_dclip.hub.publish.arguments import PublishArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Publish, and print the addresses of the repositories."""
    parser = CommandParser(
        PublishArguments,
        prog="python -m modeling_dclip.hub.publish",
        description=__doc__,
    )
    (arguments,) = parser.parse(argv)
    from modeling_dclip.hub.publish.facts import PublicationError

    logging.disable_progress_bar()  # of loading and saving weights, which are read several times
    try:
        done = publish(arguments)
    except PublicationError as error:
        listed = "".join(f"\n- {redact(problem)}" for problem in error.problems)
        sys.exit(f"Failed: nothing was pushed. {len(error.problems)} problems:{listed}")
    said = describe_dry_run(arguments, done) if arguments.dry_run else describe_publication(done)
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
