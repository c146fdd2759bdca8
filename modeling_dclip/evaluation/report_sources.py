"""Find and sort what a report is made of: records, summaries of arms, benchmarks of speed, and what is none of these."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modeling_dclip.evaluation.benchmark_tables import (
    render_encoders,
    render_index,
    render_onnx_towers,
    render_retrieval,
    render_scan,
    render_student_step,
)
from modeling_dclip.evaluation.results import read_results
from modeling_dclip.evaluation.tables import render_summary


def _render_all_encoders(data: Mapping[str, Any]) -> str:
    return render_encoders(data, cells=",".join(dict.fromkeys(row["cell"] for row in data["rows"])))


# What `benchmarks/` writes says its name under "benchmark".
SPEED_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "image_encoders": _render_all_encoders,
    "index": render_index,
    "onnx_towers": render_onnx_towers,
    "retrieval": render_retrieval,
    "selective_scan": render_scan,
    "student_step": render_student_step,
}
_INTERVAL_KEYS = ("estimate", "low", "high", "confidence", "covers")


class Sources(NamedTuple):
    """What was found. `names` gives each file a short name; `left_out` says of each file that is not shown why."""

    records: list[tuple[Path, dict[str, Any]]]
    summaries: list[tuple[Path, dict[str, Any]]]
    speed: list[tuple[Path, dict[str, Any], str]]
    left_out: list[tuple[Path, str]]
    names: dict[Path, str]


def find_json(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """List JSON files: those given, and those in the folders given and below, but for hidden folders.

    Args:
        paths (`Sequence[str | os.PathLike]`): Files and folders.

    Returns:
        `list[Path]`: Each once, in the order given, a folder's in that of their names.

    Raises:
        FileNotFoundError: If a path is missing, or nothing is given.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"Expected results files or folders of them, got {path}, which does not exist.")
        files = [path]
        if path.is_dir():
            files = sorted(
                file
                for file in path.rglob("*.json")
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_sources(paths: Sequence[str | os.PathLike]) -> Sources:
    """Read every file that a report can show; the others are named with the reason.

    Args:
        paths (`Sequence[str | os.PathLike]`): Results files, and folders that are searched.

    Returns:
        [`Sources`]

    Raises:
        FileNotFoundError: If a path is missing.
        ValueError: If there is nothing to show.
    """
    files = find_json(paths)
    sources = Sources([], [], [], [], _name_files(files))
    for file in files:
        try:
            _read_one(file, sources)
        except (ValueError, OSError) as error:
            sources.left_out.append((file, str(error)))
        except (AttributeError, KeyError, IndexError, TypeError) as error:  # a benchmark's file has no schema to check
            sources.left_out.append((file, f"Expected what its script writes, got another form: {error!r}."))
    if not (sources.records or sources.summaries or sources.speed):
        reasons = "".join(f"\n- {path}: {reason}" for path, reason in sources.left_out[:5])
        raise ValueError(
            f"Expected results files of eval.py, train.py or benchmarks/ in {', '.join(map(str, paths))}, got {len(files)} JSON files "
            f"and none of these.{reasons}"
        )
    return sources


def _read_one(file: Path, sources: Sources) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, list):
        records = read_results(file)
        for index, record in enumerate(records):
            _check_intervals(record, f"record {index} of {file}")
        sources.records.extend((file, record) for record in records)
    elif isinstance(content, Mapping) and "arms" in content:
        render_summary(content, where=str(file))  # says what is wrong with it
        sources.summaries.append((file, content))
    elif isinstance(content, Mapping) and content.get("benchmark") in SPEED_TABLES:
        sources.speed.append((file, content, SPEED_TABLES[content["benchmark"]](content)))
    else:
        keys = sorted(content)[:4] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"No list of records, no summary of arms, no benchmark of {list(SPEED_TABLES)}: {keys}.")


def _check_intervals(record: Mapping[str, Any], where: str) -> None:
    """Intervals come as free dicts; a table needs all of their parts."""
    intervals = dict(record.get("intervals", {}))
    intervals |= {name: value for name, value in record.get("comparison", {}).items() if isinstance(value, Mapping)}
    for name, interval in intervals.items():
        if not isinstance(interval, Mapping) or not all(key in interval for key in _INTERVAL_KEYS):
            raise ValueError(f"Expected an interval with {_INTERVAL_KEYS} for {name!r} of {where}, got {interval!r}.")


def _name_files(files: Sequence[Path]) -> dict[Path, str]:
    """A file's folder if that names it, else folder and name, else the path."""
    folders = [file.resolve().parent.name for file in files]
    plain = {
        file: folder if file.stem in ("records", "results", "summary", "leakage") else f"{folder}/{file.stem}"
        for file, folder in zip(files, folders, strict=True)
    }
    parents: dict[str, set[Path]] = {}
    for file, name in plain.items():
        parents.setdefault(name, set()).add(file.resolve().parent)
    return {file: name if len(parents[name]) == 1 else str(file) for file, name in plain.items()}
