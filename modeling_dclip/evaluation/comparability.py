"""What numbers were measured on, and whether two of them may stand beside each other. Pure: records in, text out."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.tables import name_of, short_hash

# Fields that say what was measured rather than on what; all others are compared, also those that a later version adds.
_MEASURED = {"metrics", "intervals", "draws", "comparison", "label", "created", "format_version"}
_HASHES = {"revision", "dataset_fingerprint"}
_WORDS = {"dataset_fingerprint": "data", "n_captions": "captions", "revision": "weights"}
# Rows that differ in one of these do not answer one question. Other weights are the question; commands differ with them.
_DECISIVE = ("dataset_fingerprint", "split", "n", "n_captions", "settings")


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record was measured on, one entry each: versions, hardware and settings become `versions.torch` and so on.

    Args:
        record (`dict`): From [`~modeling_dclip.evaluation.results.read_results`], or any JSON of a benchmark.

    Returns:
        `dict[str, Any]`: Without what was measured: metrics, their intervals, the time.
    """
    flat = {}
    for name, value in record.items():
        if name in _MEASURED:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _show(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name in _HASHES and isinstance(value, str):
        return short_hash(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and name != "seed" else str(value)


def word(name: str) -> str:
    """A field as a reader calls it: `dataset_fingerprint` -> "data", `versions.torch` -> "torch"."""
    return _WORDS.get(name, name.removeprefix("versions.").removeprefix("hardware.").removeprefix("settings."))


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """In what two records differ but for what was measured.

    Args:
        first, second (`dict`): Records.

    Returns:
        `list[tuple[str, str, str]]`: Field and the two values as text; "none" for a field that is missing.
    """
    one, other = flatten(first), flatten(second)
    names = list(dict.fromkeys([*one, *other]))
    return [
        (name, _show(name, one.get(name)), _show(name, other.get(name)))
        for name in names
        if one.get(name) != other.get(name)
    ]


def find_conflicts(records: Sequence[Mapping[str, Any]], *, timed: bool = False) -> list[str]:
    """Say why records of one table are not comparable.

    Args:
        records (`Sequence[dict]`): Rows of one table.
        timed (`bool`, *optional*, defaults to `False`): Whether times or memory are compared, so that other hardware matters too.

    Returns:
        `list[str]`: One sentence for each field that differs: the data, split, numbers, settings, seeds, versions of packages.
    """
    flat = [flatten(record) for record in records]
    names = list(dict.fromkeys(name for fields in flat for name in fields))
    found = []
    for name in names:
        group, _, _ = name.partition(".")
        if group not in (*_DECISIVE, "seed", "versions", *(["hardware"] if timed else [])) or name == "settings.alpha":
            continue
        rows: dict[str, list[str]] = {}
        for record, fields in zip(records, flat, strict=True):
            if name != "seed" or name in fields:  # the mean of several seeds has none
                rows.setdefault(_show(name, fields.get(name)), []).append(name_of(record))
        if len(rows) > 1:
            parts = "; ".join(f"{value} ({_some(labels)})" for value, labels in rows.items())
            found.append(f"{_VERDICTS.get(group, 'Not comparable')}: other {word(name)}: {parts}.")
    return found


_VERDICTS = {
    "seed": "A row of one seed says little of another's",
    "versions": "Measured with different software",
    "hardware": "Measured on different hardware",
}


def _some(labels: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(labels))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def measured_on(records: Sequence[Mapping[str, Any]], *, weights: bool = True) -> list[tuple[str, str]]:
    """What the rows of a table were measured on.

    Args:
        records (`Sequence[dict]`): Records, or JSON of a benchmark with `n`, `arguments`, `versions` and `hardware`.
        weights (`bool`, *optional*, defaults to `True`): Name each row's weights; not needed where a column does.

    Returns:
        `list[tuple[str, str]]`: Term and text: benchmark, n, split, seed, data, weights, settings, hardware, versions, command, date. Several
        values are joined by " or "; terms of which nothing is known are left out.
    """
    flat = [flatten(record) for record in records]

    def values(name: str) -> str:
        shown = dict.fromkeys(_show(name, fields[name]) for fields in flat if fields.get(name) not in (None, ""))
        return " or ".join(shown)

    def group(prefix: str) -> str:
        names = dict.fromkeys(name for fields in flat for name in fields if name.startswith(f"{prefix}."))
        shown = ((word(name).removeprefix(f"{prefix}."), values(name)) for name in names)
        return ", ".join(f"{name} {text}" for name, text in shown if text)

    named = dict.fromkeys(
        f"{name_of(record)} {short_hash(record['revision'])}" for record in records if "revision" in record
    )
    dates = sorted({record["created"][:10] for record in records if "created" in record})
    full = dict.fromkeys(record["dataset_fingerprint"] for record in records if "dataset_fingerprint" in record)
    terms = {
        "Benchmark": values("benchmark"),
        "n": values("n") + (f" images, {captions} captions" if (captions := values("n_captions")) else ""),
        "Split": values("split"),
        "Seed": values("seed").replace(" or ", ", "),
        "Data": " or ".join(full),
        "Weights": ", ".join(named) if weights else "",
        "Settings": group("settings"),
        "Arguments": group("arguments"),
        "Hardware": group("hardware"),
        "Versions": group("versions"),
        "Command": values("command"),
        "Date": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
    }
    return [(term, text) for term, text in terms.items() if text]
