"""The same picture through every door: the cosine of its embedding to that of the same picture in plain 8-bit RGB.

    python benchmarks/pictures.py

The pictures and the doors are those of the tests (`tests/fixtures/pictures.py`, `tests/fixtures/doors.py`). The
reference is the plain picture through transformers' image processor alone; for `regions` and `reinforced`, which see
another part of a picture, the plain picture through the same door.
"""

import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.records import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fixtures.doors import Doors, Outcome, plainly
from fixtures.pictures import Picture, make_zoo

CLAIM = 0.999


@dataclass
class BenchmarkArguments:
    """One run."""

    output: str = field(
        default="benchmarks/results/pictures.json", metadata={"help": "Results file; replaced if it is there."}
    )


def describe(
    picture: Picture, outcomes: dict[str, Outcome], expected: dict[str, dict[str, Outcome]]
) -> dict[str, Any]:
    """What each door made of a picture."""
    refusals = {door: outcome for door, outcome in outcomes.items() if isinstance(outcome, str)}
    cosines = {
        door: round(float(torch.nn.functional.cosine_similarity(outcome, expected[door][picture.name], dim=0)), 6)
        for door, outcome in outcomes.items()
        if not isinstance(outcome, str) and picture.plain is not None
    }
    return {
        "name": picture.name,
        "what": picture.what,
        "outcome": "refused" if len(refusals) == len(outcomes) else "read" if not refusals else "differs",
        "message": refusals.get("training"),
        "cosines": cosines,
    }


def measure() -> dict[str, Any]:
    """Send all pictures through all doors."""
    zoo = make_zoo()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, on damaged metadata
        doors = Doors(Path(folder))
        found, expected = {}, {}
        for name, door in doors.all().items():
            found[name] = door(zoo)
            expected[name] = (
                door(plainly(zoo))
                if name in doors.RESIZED
                else {one.name: doors.reference(one.plain) for one in zoo if one.plain is not None}
            )
    by_picture = [
        describe(one, {door: outcomes[one.name] for door, outcomes in found.items()}, expected) for one in zoo
    ]
    return {"doors": list(found), "pictures": by_picture}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the results file."""
    (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)
    results = measure()
    versions, hardware = environment()
    differing = [one["name"] for one in results["pictures"] if one["outcome"] == "differs"]
    low = [one["name"] for one in results["pictures"] if min(one["cosines"].values(), default=1) < CLAIM]
    content = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": {"versions": versions, "hardware": hardware},
        "command": "python benchmarks/pictures.py",
        **results,
    }
    write_json(arguments.output, content)
    sys.stdout.write(
        f"{len(results['pictures'])} pictures through {len(results['doors'])} doors: "
        f"{sum(one['outcome'] == 'read' for one in results['pictures'])} read, "
        f"{sum(one['outcome'] == 'refused' for one in results['pictures'])} refused; cosine below {CLAIM}: "
        f"{low or 'none'}; read by some doors only: {differing or 'none'}. Written to {arguments.output}\n"
    )


if __name__ == "__main__":
    main()
