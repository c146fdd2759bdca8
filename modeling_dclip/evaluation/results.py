"""The one results format, and the blocks of a README that are rendered from such files.

A results file is a JSON list of records, one per benchmark of one model:

    {"format_version": 1, "model": "runs/student", "benchmark": "retrieval=scenes:test", "metrics": {"text_to_image_recall@1": 0.31, ...},
     "n": 1000, "seed": 0, "split": "test", "revision": "sha256:...", "dataset_fingerprint": "sha256:...",
     "versions": {...}, "hardware": {...}, "command": "eval.py ...", "created": "2025-01-31T12:00:00+00:00"}

`split` is `null` where the source has none. Optional are `label` (the name to show), `n_captions`, `intervals` of metrics, `comparison`
(intervals against an anchor), `chance` (what guessing scores), `spread` (of timings), `settings` (what else the numbers depend on) and, of
a measurement under several conditions, `condition` and the values of the metrics' `draws`. In a README

    <!-- results:demo source=results/demo/summary.json table=demo -->
    <!-- /results:demo -->

names its source and form, and `python -m modeling_dclip.evaluation.results README.md` renders all such blocks; with `--check` it only says which are out of date.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from modeling_dclip.data.files import replacing
from modeling_dclip.evaluation.benchmark_tables import BENCHMARK_TABLES
from modeling_dclip.evaluation.provenance import environment
from modeling_dclip.evaluation.tables import render_leakage, render_summary, render_table

FORMAT_VERSION = 1
FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "model": (str,),
    "benchmark": (str,),
    "metrics": (dict,),
    "n": (int,),
    "seed": (int,),
    "split": (str, type(None)),
    "revision": (str,),
    "dataset_fingerprint": (str,),
    "versions": (dict,),
    "hardware": (dict,),
    "command": (str,),
    "created": (str,),
}
OPTIONAL_FIELDS: dict[str, tuple[type, ...]] = {"label": (str,), "condition": (str,), "n_captions": (int,)}
OPTIONAL_FIELDS |= dict.fromkeys(("chance", "comparison", "draws", "intervals", "settings", "spread"), (dict,))


def make_record(**fields: Any) -> dict[str, Any]:
    """Make one record; format version, versions, hardware and time are filled in.

    Args:
        fields: `model`, `benchmark`, `metrics`, `n`, `seed`, `split`, `revision`, `dataset_fingerprint`, `command`, and
            optionally those of `OPTIONAL_FIELDS` (left out where `None`).

    Returns:
        `dict[str, Any]`: Valid for [`write_results`].

    Raises:
        ValueError: If a field is missing, unknown or of another type.
    """
    versions, hardware = environment()
    filled = {"format_version": FORMAT_VERSION, "versions": versions, "hardware": hardware}
    filled |= {"created": datetime.now(timezone.utc).isoformat(timespec="seconds"), **fields}
    order = [name for name in FIELDS if name in filled] + [name for name in fields if name not in FIELDS]
    record = {name: filled[name] for name in order if name not in OPTIONAL_FIELDS or filled[name] is not None}
    validate_record(record, "the new record")
    return record


def validate_record(record: Any, where: str) -> None:
    """Check one record.

    Args:
        record: What was read, or is about to be written.
        where (`str`): File and position, for messages.

    Raises:
        ValueError: If a field is missing, unknown, of another type or version, or a metric is no number; the field is named.
    """
    if not isinstance(record, dict):
        raise ValueError(f"Expected a record (a JSON object) in {where}, got {type(record).__name__}.")
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"Expected 'format_version' {FORMAT_VERSION} in {where}, got {version!r}. Evaluate again.")
    known = FIELDS | OPTIONAL_FIELDS
    if missing := [name for name in FIELDS if name not in record]:
        raise ValueError(f"Expected the field {missing[0]!r} in {where}, got only {sorted(record)}. Evaluate again.")
    for name, value in record.items():
        if name not in known:
            raise ValueError(f"Unknown field {name!r} in {where}. Known fields: {', '.join(known)}.")
        if not isinstance(value, known[name]) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in known[name])
            raise ValueError(f"Expected {kinds} in the field {name!r} of {where}, got {value!r}.")
    for name, value in record["metrics"].items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and -1e300 < value < 1e300):  # NaN fails this too
            raise ValueError(f"Expected a finite number in 'metrics' / {name!r} of {where}, got {value!r}.")


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all. Folders are made."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused (`ValueError`)."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_results(path: str | os.PathLike, records: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Validate records and write them atomically.

    Args:
        path (`str` or `os.PathLike`): A `.json` file; replaced if it exists, folders are made.
        records (`dict` or `Sequence[dict]`): From [`make_record`]; one alone becomes a list of one.

    Raises:
        ValueError: If a record is not valid, or there is none. Then nothing is written.
    """
    records = [dict(records)] if isinstance(records, Mapping) else list(records)
    if not records:
        raise ValueError(f"Expected one or more records to write to {path}, got none.")
    for index, record in enumerate(records):
        validate_record(record, f"record {index} for {path}")
    write_json(path, records)


def _read_json(path: str | os.PathLike) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}, got {error}. Make the file again.") from error


def read_results(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read and validate a results file.

    Args:
        path (`str` or `os.PathLike`): Written by [`write_results`].

    Returns:
        `list[dict[str, Any]]`: One or more records.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is no JSON list of valid records; file and field are named.
    """
    records = _read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"Expected a JSON list of one or more records in {path}, got {type(records).__name__}.")
    for index, record in enumerate(records):
        validate_record(record, f"record {index} of {path}")
    return records


def _markers(name: str) -> re.Pattern[str]:
    name = re.escape(name)
    return re.compile(rf"(<!-- results:{name}(?: [^>]*?)? ?-->\n)(.*?)(<!-- /results:{name} -->)", re.DOTALL)


def _replace_block(document: str, path: str | os.PathLike, name: str, text: str) -> str:
    found = _markers(name).findall(document)
    if len(found) != 1:
        raise ValueError(
            f"Expected the block `<!-- results:{name} -->`, a line break, ..., `<!-- /results:{name} -->` once in {path}, "
            f"got it {len(found)} times."
        )
    return _markers(name).sub(lambda match: f"{match[1]}{text.strip()}\n{match[3]}", document)


def render_block(path: str | os.PathLike, name: str, text: str) -> None:
    """Replace what stands between `<!-- results:NAME ... -->` and `<!-- /results:NAME -->`, atomically; all else stays.

    Args:
        path (`str` or `os.PathLike`): The Markdown file.
        name (`str`): Of the block.
        text (`str`): Markdown.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the markers are not there exactly once.
    """
    document = Path(path).read_bytes().decode("utf-8")
    write_text(path, _replace_block(document, path, name, text))


def _render_results(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    records = [record for path in paths for record in read_results(path)]
    metrics = options["metrics"].split(",") if "metrics" in options else None
    return render_table(records, metrics=metrics, best=options.get("best", "false") == "true")


def _render_demo(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    return "\n\n".join(render_summary(_read_json(path), where=str(path)) for path in paths)


def _render_leakage(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    return render_leakage([record for path in paths for record in read_results(path)], **options)


def _of_benchmark(render: Callable[..., str]) -> Callable[[Sequence[Path], Mapping[str, str]], str]:
    return lambda paths, options: "\n\n".join(render(_read_json(path), **options) for path in paths)


TABLES = {
    "results": (_render_results, {"metrics", "best"}),
    "demo": (_render_demo, set()),
    "leakage": (_render_leakage, {"metric"}),
    **{name: (_of_benchmark(render), options) for name, (render, options) in BENCHMARK_TABLES.items()},
}


def _sources(readme: Path, name: str, patterns: str) -> list[Path]:
    paths = []
    for pattern in patterns.split(","):
        if not (found := sorted(readme.parent.glob(pattern))):
            raise FileNotFoundError(f"Expected files at {pattern!r} beside {readme} for its block {name!r}, got none.")
        paths += found
    return paths


def render_readme(path: str | os.PathLike, *, check: bool = False) -> list[str]:
    """Render every block that names a source.

    Options of the opening marker: `source=` files or globs, comma-separated, relative to the Markdown file; `table=results` (the
    default; with `metrics=` a comma-separated choice and `best=true` for bold), `table=demo` (a summary of arms), `table=leakage` (what
    a teacher reads off its caption; `metric=` another than text-to-teacher R@1), or of a benchmark one of `BENCHMARK_TABLES`.

    Args:
        path (`str` or `os.PathLike`): The Markdown file.
        check (`bool`, *optional*, defaults to `False`): Change nothing.

    Returns:
        `list[str]`: The names of the blocks that were out of date.

    Raises:
        FileNotFoundError: If the file or a source is missing.
        ValueError: If a marker, an option or a source is not valid.
    """
    path = Path(path)
    document = before = path.read_bytes().decode("utf-8")
    stale = []
    for name, attributes in re.findall(r"<!-- results:([\w-]+) (?!-->)([^>]*?) ?-->", before):
        words = [word.partition("=") for word in shlex.split(attributes)]
        options = {key: value for key, _, value in words}
        table = options.pop("table", "results")
        source = options.pop("source", None)
        if table not in TABLES or source is None or not set(options) <= TABLES[table][1]:
            raise ValueError(
                f"Expected source=FILES, table= one of {list(TABLES)} and its options in the block {name!r} of {path}, "
                f"got {attributes!r}."
            )
        text = TABLES[table][0](_sources(path, name, source), options)
        rendered = _replace_block(document, path, name, text)
        if rendered != document:
            stale.append(name)
        document = rendered
    if document != before and not check:
        write_text(path, document)
    return stale


def main(argv: Sequence[str] | None = None) -> int:
    """Render, or with `--check` only compare (exit status 1 if a block is out of date)."""
    parser = argparse.ArgumentParser(description="Render the results blocks of a Markdown file from results files.")
    parser.add_argument("readme", help="Markdown file, e.g. README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a block is out of date")
    arguments = parser.parse_args(argv)
    stale = render_readme(arguments.readme, check=arguments.check)
    if arguments.check and stale:
        command = f"`python -m modeling_dclip.evaluation.results {arguments.readme}`"
        sys.stderr.write(f"Out of date in {arguments.readme}: {', '.join(stale)}. Run {command}.\n")
        return 1
    sys.stdout.write(f"{arguments.readme}: {'rendered ' + ', '.join(stale) if stale else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
