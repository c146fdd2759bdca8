"""How the package answers malformed inputs: many changes of small valid files, and what happened to each.

    python benchmarks/fuzz.py --examples 500

The kinds of input, the changes and the judge are those of `tests/fixtures/malformed.py`. A fault (a traceback, an
input read as something else, a message that names neither file nor field, a hang) is listed on the standard output
with the change that made it. `--seed` gives the same changes again.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.records import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures.malformed import FAULTS, KINDS, Outcome, judge  # noqa: E402  found by the line above


@dataclass
class FuzzArguments:
    """One run."""

    examples: int = field(default=300, metadata={"help": "Changes of each kind of input."})
    seed: int = field(default=0, metadata={"help": "Seed of the changes."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": f"Of {', '.join(KINDS)}."})
    seconds: float = field(default=20.0, metadata={"help": "An input that takes longer counts as a hang."})
    show: int = field(default=3, metadata={"help": "Faults of each kind and outcome to print."})
    output: str = field(default="benchmarks/results/fuzz.json", metadata={"help": "Results file; replaced if there."})


def count(name: str, args: FuzzArguments) -> Counter:
    """Judge many changes of one kind of input."""
    kind, counts, shown, seen = KINDS[name], Counter(), Counter(), set()

    @hypothesis.seed(args.seed)
    @hypothesis.settings(
        max_examples=args.examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.changes)
    def attempt(change) -> None:
        if repr(change) in seen:
            return
        seen.add(repr(change))
        judgement = judge(kind, change, args.seconds)
        counts[judgement.outcome] += 1
        if judgement.outcome in FAULTS and shown[judgement.outcome] < args.show:
            shown[judgement.outcome] += 1
            print(f"  {judgement.outcome.value}: {change!r}\n    {judgement.detail.strip()[-600:]}", flush=True)

    attempt()
    return counts


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Count, and write the results file."""
    (args,) = HfArgumentParser(FuzzArguments).parse_args_into_dataclasses(argv)
    if unknown := [name for name in args.kinds if name not in KINDS]:
        raise ValueError(f"Unknown kind {unknown[0]!r}. Known kinds: {', '.join(KINDS)}.")
    transformers_logging.set_verbosity_error()
    rows = []
    for name in args.kinds:
        started = time.perf_counter()
        print(f"{name} ...", flush=True)
        counts = count(name, args)
        row = {"kind": KINDS[name].name, "tried": counts.total()}
        rows.append(row | {outcome.value: counts[outcome] for outcome in Outcome})
        seen = ", ".join(f"{outcome.value} {counts[outcome]}" for outcome in Outcome if counts[outcome])
        print(f"{name}: {seen} ({time.perf_counter() - started:.0f} s)", flush=True)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"created": created, "environment": environment()._asdict(), "arguments": asdict(args)}
    write_json(args.output, {**about, "rows": rows})
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
