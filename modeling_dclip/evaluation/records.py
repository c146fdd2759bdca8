"""The one results format: records, the outcomes beside them, and the store that grows both.

A results file is a JSON list of records, one for each benchmark of each model:

    {"format_version": 1, "model": "runs/student", "benchmark": "retrieval=scenes:test",
     "metrics": {"text_to_image_recall@1": 0.31, ...}, "n": 1000, "seed": 0, "split": "test",
     "revision": "sha256:...", "dataset_fingerprint": "sha256:...", "versions": {...}, "hardware": {...},
     "command": "eval.py ...", "created": "2025-01-31T12:00:00+00:00"}

[`Record`] says what every field means. Beside `X.json` lies `X.outcomes.safetensors`: what every image scored. Its
tensors are named `KEY/METRIC`, where KEY is the [`record_key`] of their record, and have the shape (I, 2): the sum and
the count of one image. A record without outcomes is still a record.

The module reads in this order: the environment, the format of a record, its key, results files, outcomes, the store.
"""

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from modeling_dclip.data.failures import redact
from modeling_dclip.data.files import (
    PACKAGES,
    check_writable,
    git_revision,
    package_version,
    read_bytes,
    read_json,
    remove_leftovers,
    replacing,
    write_json,
)
from modeling_dclip.encoders.fingerprints import hash_json
from modeling_dclip.evaluation.statistics import IntervalDict

try:
    import fcntl
except ImportError:  # not on this system: then only one process may write at a time
    fcntl = None  # type: ignore[assignment]

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
OPTIONAL_FIELDS |= {"notes": (list,), "n_trained_on": (int,)}

# Metrics that are shares of images, captions or questions, by their names.
_SHARES = re.compile(r"(?:recall@\d+|accuracy|mrr|map|^top\d+|mean_per_class)$")
_ROUNDING = 1e-6
MOST_RESULTS_BYTES = 256 << 20

Metrics = dict[str, float]  # by name
Outcomes = dict[str, torch.Tensor]  # by metric, each (I, 2): the sum and the count of every image
# What a benchmark measured of one model. Every float is a metric. Further keys: `n` (int), and where they apply
# `n_captions` (int), `outcomes` (Outcomes), `chance` (Metrics), `spread` and `measured_with` (dicts).
BenchmarkResult = dict[str, Any]


class Environment(NamedTuple):
    """The software and the machine of a run.

    Attributes:
        versions (`dict[str, str]`): By package, `python` included, and the commit of a checkout as `git_revision`.
        hardware (`dict`): `cpu`, `cpu_count` usable by this process, `torch_threads`, `gpus` (names) and `platform`.
    """

    versions: dict[str, str]
    hardware: dict[str, Any]


def environment() -> Environment:
    """Describe the software and the machine. Read it once a run, and pass it on.

    Returns:
        [`Environment`]: Packages that are missing have the version `"not installed"`.
    """
    versions = {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES}
    if (revision := git_revision()) is not None:
        versions["git_revision"] = revision
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {
        "cpu": _cpu_name(),
        "cpu_count": usable,
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "platform": platform.platform(),
    }
    return Environment(versions, hardware)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in read_bytes(info).decode("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class _RequiredFields(TypedDict):
    format_version: int
    model: str
    benchmark: str
    metrics: Metrics
    n: int
    seed: int
    split: str | None
    revision: str
    dataset_fingerprint: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    command: str
    created: str


class Record(_RequiredFields, total=False):
    """One benchmark of one model.

    Attributes:
        format_version (`int`): [`FORMAT_VERSION`].
        model (`str`): The folder, Hub id or open_clip name that was asked for.
        benchmark (`str`): `KIND=SPEC`.
        metrics (`dict[str, float]`): By name; finite.
        n (`int`): What was counted: images, questions, or rounds of timings.
        seed (`int`): Of the draws of data and of the bootstrap; for an arm of an experiment the seed of its training.
        split (`str`, *optional*): `None` where the source has no splits.
        revision (`str`): Of the weights: `sha256:<hex>` or `commit:<hash>`.
        dataset_fingerprint (`str`): Of the data: `sha256:<hex>`.
        versions (`dict`), hardware (`dict`): Of the run; [`Environment`].
        command (`str`): What the user ran.
        created (`str`): Time in UTC, ISO 8601.
        label (`str`): The name to show in place of the model's.
        condition (`str`): Which of several conditions, such as `alpha=0.5` on the line between two models.
        n_captions (`int`): Captions of the n images.
        chance (`dict[str, float]`): What guessing scores, by metric.
        comparison (`dict`): Gain or retention against an anchor and the differences, as intervals, with `anchor` and
            `anchor_revision`.
        draws (`dict[str, list[float]]`): The single values whose mean a metric is.
        notes (`list[str]`): What a reader of the numbers has to know: that test images were trained on, or which run
            kept them.
        n_trained_on (`int`): How many of the test images the model learned from; left out where it is not known that
            there are any.
        intervals (`dict`): An [`~modeling_dclip.evaluation.statistics.IntervalDict`] by metric.
        settings (`dict`): What else the metrics depend on.
        spread (`dict`): Median, min and max of timings, by metric.
    """

    label: str
    condition: str
    n_captions: int
    chance: Metrics
    comparison: dict[str, Any]
    draws: dict[str, list[float]]
    notes: list[str]
    n_trained_on: int
    intervals: dict[str, IntervalDict]
    settings: dict[str, Any]
    spread: dict[str, dict[str, float]]


def make_record(measured_in: Environment | None = None, /, **fields: Any) -> Record:
    """Make one record; format version, versions, hardware and time are filled in.

    Args:
        measured_in ([`Environment`], *optional*): Of the run; read now if not given.
        fields: `model`, `benchmark`, `metrics`, `n`, `seed`, `split`, `revision`, `dataset_fingerprint`, `command`,
            and optionally those of `OPTIONAL_FIELDS` (left out where `None`). A field given here replaces the one
            that would be filled in.

    Returns:
        [`Record`]: Valid for [`write_results`].

    Raises:
        ValueError: If a field is missing, unknown or of another type.
    """
    versions, hardware = measured_in or environment()
    filled = {"format_version": FORMAT_VERSION, "versions": versions, "hardware": hardware}
    filled |= {"created": datetime.now(timezone.utc).isoformat(timespec="seconds"), **fields}
    if isinstance(typed := filled.get("command"), str):
        filled["command"] = redact(typed)
    order = [name for name in FIELDS if name in filled] + [name for name in fields if name not in FIELDS]
    record = {name: filled[name] for name in order if name not in OPTIONAL_FIELDS or filled[name] is not None}
    validate_record(record, "the new record")
    return cast(Record, record)


def validate_record(record: Any, where: str) -> None:
    """Check one record.

    Args:
        record: What was read, or is about to be written.
        where (`str`): File and position, for messages.

    Raises:
        ValueError: If a field is missing, unknown, of another type or version, a date is none, a number is not finite,
            a share is not in [0, 1] or nothing was counted; the message names the field.
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
    _check_values(record, where)


def _check_values(record: dict[str, Any], where: str) -> None:
    """Check what the types of the fields leave open: numbers, their and their ranges."""
    for name, least in (("n", 0), ("n_captions", 0), ("n_trained_on", 1), ("seed", 0)):
        if name in record and not least <= record[name] < 2**63:
            raise ValueError(
                f"Expected an integer from {least} in the field {name!r} of {where}, got {record[name]!r}."
            )
    for field in ("metrics", "chance"):
        for name, value in record.get(field, {}).items():
            _check_number(value, f"{field!r} / {name!r} of {where}", name)
    for name, interval in record.get("intervals", {}).items():
        if not isinstance(interval, dict):
            raise ValueError(f"Expected an object in 'intervals' / {name!r} of {where}, got {interval!r:.80}.")
        for key, value in interval.items():
            if key in ("estimate", "low", "high") and value is not None:  # an end without bound is null
                _check_number(value, f"'intervals' / {name!r} / {key!r} of {where}", name)
    if odd := [note for note in record.get("notes", []) if not isinstance(note, str)]:
        raise ValueError(f"Expected texts in the field 'notes' of {where}, got {odd[0]!r:.80}.")
    for name, values in record.get("draws", {}).items():
        if not isinstance(values, list):
            raise ValueError(f"Expected a list in 'draws' / {name!r} of {where}, got {values!r:.80}.")
        for value in values:
            _check_number(value, f"'draws' / {name!r} of {where}", name)
    for field in ("versions", "hardware"):
        if odd := [key for key, value in record[field].items() if isinstance(value, float) and not isfinite(value)]:
            raise ValueError(f"Expected a finite number in {field!r} / {odd[0]!r} of {where}.")


def _check_number(value: Any, place: str, metric: str) -> None:
    """Refuse what is no finite number, and a share that is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and -1e300 < value < 1e300):  # NaN fails this too
        raise ValueError(f"Expected a finite number in {place}, got {value!r:.80}.")
    if _SHARES.search(metric) and not -_ROUNDING <= value <= 1 + _ROUNDING:
        raise ValueError(f"Expected a share from 0 to 1 in {place}, got {value!r}.")


class Measurement(NamedTuple):
    """What a measurement is of. Two measurements that agree in all of it give the same numbers.

    The model's path, its label and the time are not part of it.

    Attributes:
        revision (`str`): Of the weights.
        benchmark (`str`): `KIND=SPEC`.
        dataset_fingerprint (`str`): Of the data.
        seed (`int`): Of the draws.
        version (`str`): Of this package.
        condition (`str`, *optional*), settings (`dict`, *optional*): As in [`Record`].
    """

    revision: str
    benchmark: str
    dataset_fingerprint: str
    seed: int
    version: str
    condition: str | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the content."""
        return hash_json({"format_version": FORMAT_VERSION, **self._asdict()})[:16]


def record_key(record: Record) -> str:
    """The key of the measurement that a record holds, [`Measurement.key`].

    Args:
        record ([`Record`]): From [`make_record`] or [`read_results`].

    Returns:
        `str`: 16 hexadecimal digits.
    """
    return Measurement(
        revision=record["revision"],
        benchmark=record["benchmark"],
        dataset_fingerprint=record["dataset_fingerprint"],
        seed=record["seed"],
        version=record["versions"]["modeling_dclip"],
        condition=record.get("condition"),
        settings=record.get("settings"),
    ).key


def write_results(path: str | os.PathLike, records: Record | Sequence[Record]) -> None:
    """Validate records and write them atomically.

    Args:
        path (`str` or `os.PathLike`): A `.json` file; replaced if it exists, folders are made.
        records ([`Record`] or `Sequence[Record]`): From [`make_record`]; a single one becomes a list of one.

    Raises:
        ValueError: If a record is not valid, or there is none. Then nothing is written.
    """
    records = [records] if isinstance(records, Mapping) else list(records)
    if not records:
        raise ValueError(f"Expected one or more records to write to {path}, got none.")
    for index, record in enumerate(records):
        validate_record(record, f"record {index} for {path}")
    write_json(path, records)


def read_results(path: str | os.PathLike, *, shown: bool = True) -> list[Record]:
    """Read and validate a results file.

    Args:
        path (`str` or `os.PathLike`): Written by [`write_results`].
        shown (`bool`, *optional*, defaults to `True`): Whether each must count something and say when it was made, as
            a page that shows it does.

    Returns:
        `list[Record]`: One or more.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is not a JSON list of valid records; the message names file and field.
    """
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    if size > MOST_RESULTS_BYTES:
        raise ValueError(
            f"Expected a results file of at most {MOST_RESULTS_BYTES >> 20} MiB at {path}, got {size >> 20} MiB. "
            "It is something else."
        )
    records = read_json(path, "results file", advice="Evaluate again.")
    if not isinstance(records, list) or not records:
        raise ValueError(f"Expected a JSON list of one or more records in {path}, got {type(records).__name__}.")
    for index, record in enumerate(records):
        validate_record(record, f"record {index} of {path}")
        if shown:
            _check_shown(record, f"record {index} of {path}")
    return records


def _check_shown(record: Record, where: str) -> None:
    """Refuse a record of nothing, or of no time. Such a record is kept, but not shown."""
    if not record["n"]:
        raise ValueError(f"Expected an integer from 1 in the field 'n' of {where}, got 0.")
    if not record["metrics"]:
        raise ValueError(f"Expected one or more metrics in the field 'metrics' of {where}, got none.")
    try:
        datetime.fromisoformat(record["created"])
    except ValueError as error:
        raise ValueError(
            f"Expected a time as 2025-01-31T12:00:00+00:00 in the field 'created' of {where}, got "
            f"{record['created']!r:.80}."
        ) from error


def outcomes_path(results: str | os.PathLike) -> Path:
    """The file of the outcomes beside a results file: `X.outcomes.safetensors` beside `X.json`."""
    return Path(results).with_suffix(".outcomes.safetensors")


def write_outcomes(results: str | os.PathLike, outcomes: Mapping[str, Outcomes]) -> None:
    """Write outcomes beside a results file, atomically. Without any outcome the file is removed.

    Args:
        results (`str` or `os.PathLike`): The results file.
        outcomes (`Mapping[str, Outcomes]`): [`record_key`] -> metric -> tensor of shape (I, 2).
    """
    path = outcomes_path(results)
    tensors = {
        f"{key}/{metric}": values.contiguous()
        for key, by_metric in outcomes.items()
        for metric, values in by_metric.items()
    }
    if not tensors:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors))  # save_file would make it readable by its owner alone


def read_outcomes(results: str | os.PathLike) -> dict[str, Outcomes]:
    """Read the outcomes beside a results file.

    Args:
        results (`str` or `os.PathLike`): The results file.

    Returns:
        `dict[str, Outcomes]`: [`record_key`] -> metric -> tensor of shape (I, 2); empty where there is no such file.

    Raises:
        ValueError: If the file is damaged or holds something else; the message names it.
    """
    path = outcomes_path(results)
    if not path.is_file():
        return {}
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"Expected outcomes in {path}, got a damaged file ({error}). Remove it and evaluate again."
        ) from error
    outcomes: dict[str, Outcomes] = {}
    for name, values in tensors.items():
        key, _, metric = name.partition("/")
        if not metric or values.ndim != 2 or values.shape[1] != 2:
            raise ValueError(
                f"Expected KEY/METRIC of shape (images, 2) in {path}, got {name!r} of shape {tuple(values.shape)}."
            )
        outcomes.setdefault(key, {})[metric] = values
    return outcomes


class RecordStore:
    """A results file and the outcomes beside it, which grow record by record.

    Every write reads the file again under a lock, so records of other measurements and of other processes stay.

    Args:
        path (`str` or `os.PathLike`): The results file. Folders are made; what killed runs left half written is
            removed.
        overwrite (`bool`): Whether the first record replaces what the file holds.

    Attributes:
        records (`list[Record]`), outcomes (`dict[str, Outcomes]`): What the file held when it was last read or
            written.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the file is not a results file.
    """

    def __init__(self, path: str | os.PathLike, overwrite: bool):
        self.path = Path(path)
        self.records: list[Record] = []
        self.outcomes: dict[str, Outcomes] = {}
        self.overwrite = overwrite
        _check_place(self.path)
        remove_leftovers(self.path.parent)
        self._read()

    def find(self, key: str) -> Record | None:
        """Find the record of the measurement with this key ([`Measurement.key`]); `None` if there is none."""
        return next((record for record in self.records if record_key(record) == key), None)

    def put(self, record: Record, outcomes: Outcomes) -> None:
        """Add a record with its outcomes, on disk too.

        It replaces a record of the same model, benchmark, condition, seed and index.

        Raises:
            OSError: If the files cannot be written.
            ValueError: If the record is not valid, or another process left something else in the file.
        """

        def place(one: Record) -> tuple:
            index = one.get("settings", {}).get("index")  # an index gives other metrics than exact search
            return one["model"], one["benchmark"], one.get("condition"), one["seed"], index

        with _alone_in(self.path.parent):
            self._read()
            self.records = [*(old for old in self.records if place(old) != place(record)), record]
            self.outcomes[record_key(record)] = outcomes
            self._write()

    def keep_only(self, records: Sequence[Record]) -> None:
        """Drop all other records, which earlier runs left."""
        self.records = list(records)
        if records:
            with _alone_in(self.path.parent):
                self._write()

    def _read(self) -> None:
        if not self.overwrite and self.path.exists():
            self.records, self.outcomes = read_results(self.path, shown=False), read_outcomes(self.path)

    def _write(self) -> None:
        keys = {record_key(record) for record in self.records}
        self.outcomes = {key: own for key, own in self.outcomes.items() if key in keys}
        write_results(self.path, self.records)
        write_outcomes(self.path, self.outcomes)
        self.overwrite = False


def _check_place(path: Path) -> None:
    """Fail before hours of work if the results could not be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    except OSError as error:
        raise OSError(
            f"Expected a place to write the results file {path} to, got: {error}. Choose another."
        ) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes that write results there. The lock ends with the process, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def run_label(arm: str, seed: int) -> str:
    """The label of the records of one run of an arm.

    Example:
        >>> run_label("leak_free", 0)
        'leak_free, seed 0'
    """
    return f"{arm}, seed {seed}"


def arm_of(record: Record) -> str | None:
    """The arm whose run a record measured; `None` if the record's label is not a [`run_label`] of its `seed`.

    Example:
        >>> arm_of({"label": "leak_free, seed 0", "seed": 0}), arm_of({"label": "anchor", "seed": 0})
        ('leak_free', None)
    """
    label, suffix = record.get("label", ""), run_label("", record["seed"])
    return label.removesuffix(suffix) if label.endswith(suffix) else None


def split_run_label(label: str) -> tuple[str, int] | None:
    """Arm and seed of a [`run_label`]; `None` of any other label.

    Example:
        >>> split_run_label("leak_free, seed 2"), split_run_label("anchor")
        (('leak_free', 2), None)
    """
    match = re.fullmatch(r"(.+), seed (\d{1,10})", label)
    return (match[1], int(match[2])) if match else None
