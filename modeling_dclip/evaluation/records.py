"""The one results format: records, what every image scored, and the files that hold them.

A results file is a JSON list of records, one per benchmark of one model:

    {"format_version": 1, "model": "runs/student", "benchmark": "retrieval=scenes:test",
     "metrics": {"text_to_image_recall@1": 0.31, ...}, "n": 1000, "seed": 0, "split": "test",
     "revision": "sha256:...", "dataset_fingerprint": "sha256:...", "versions": {...}, "hardware": {...},
     "command": "eval.py ...", "created": "2025-01-31T12:00:00+00:00"}

`split` is `null` where the source has none. Optional are `label` (the name to show), `n_captions`, `intervals` of
metrics, `comparison` (intervals against an anchor), `chance` (what guessing scores), `spread` (of timings), `settings`
(what else the numbers depend on) and, of a measurement under several conditions, `condition` and the values of the
metrics' `draws`.

Beside `X.json` lies `X.outcomes.safetensors`: what every image scored. Its tensors are named `KEY/METRIC`, where KEY
is the [`record_key`] of their record, and are of shape (I, 2): the sum and the count of one image. A record without
any is still a record.
"""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from modeling_dclip.data.files import replacing, write_json
from modeling_dclip.encoders.fingerprints import hash_json

try:
    import fcntl
except ImportError:  # not on this system: then one process at a time
    fcntl = None


PACKAGES = ("modeling_dclip", "torch", "transformers", "accelerate", "datasets", "numpy", "pillow", "open_clip_torch")


def environment() -> tuple[dict[str, str], dict[str, Any]]:
    """Describe the software and the machine.

    Returns:
        `tuple[dict, dict]`: `versions` by package, `python` included; `hardware` with `cpu`, `cpu_count` usable by
            this process, `torch_threads`, `gpus` (names) and `platform`.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {
        "cpu": _cpu_name(),
        "cpu_count": usable,
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "platform": platform.platform(),
    }
    return versions, hardware


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# Records that agree in these are the same measurement.
_IDENTITY = ("format_version", "revision", "benchmark", "dataset_fingerprint", "seed", "condition", "settings")

Outcomes = dict[str, torch.Tensor]


def record_key(record: Mapping[str, Any]) -> str:
    """Identify a measurement: weights, data, settings and the package's version, not the model's path or the time.

    Args:
        record (`dict`): From [`~modeling_dclip.evaluation.records.make_record`].

    Returns:
        `str`: 16 hexadecimal digits.
    """
    identity = {name: record.get(name) for name in _IDENTITY}
    identity["version"] = record["versions"]["modeling_dclip"]
    return hash_json(identity)[:16]


def outcomes_path(results: str | os.PathLike) -> Path:
    """Where the outcomes of a results file lie: `X.outcomes.safetensors` beside `X.json`."""
    return Path(results).with_suffix(".outcomes.safetensors")


def write_outcomes(results: str | os.PathLike, outcomes: Mapping[str, Outcomes]) -> None:
    """Write outcomes beside a results file, atomically; a file without any is removed.

    Args:
        results (`str` or `os.PathLike`): The results file.
        outcomes (`Mapping[str, dict]`): [`record_key`] -> metric -> tensor of shape (I, 2).
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
    """Read what lies beside a results file.

    Args:
        results (`str` or `os.PathLike`): The results file.

    Returns:
        `dict[str, dict]`: [`record_key`] -> metric -> tensor; empty where there is no such file.

    Raises:
        ValueError: If the file is damaged or holds something else; it is named.
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


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes that write results there; the lock goes with the process, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class RecordStore:
    """The results file and the outcomes beside it, as they grow.

    Records of other measurements, and of other processes, stay.
    """

    def __init__(self, path: str | os.PathLike, overwrite: bool):
        self.path, self.records = Path(path), []
        self.outcomes: dict[str, Outcomes] = {}
        self.begins_anew = overwrite
        _check_writable(self.path)
        self._clear_killed()
        self._read()

    def _clear_killed(self) -> None:
        """Remove what runs that were killed while writing left of temporary folders;
        under the lock nobody is writing.
        """
        names = "|".join(re.escape(path.name) for path in (self.path, outcomes_path(self.path)))
        with _alone_in(self.path.parent):
            for entry in self.path.parent.iterdir():
                if re.fullmatch(rf"\.({names})\.[a-z0-9_]{{8}}", entry.name) and entry.is_dir():
                    shutil.rmtree(entry)

    def _read(self) -> None:
        if not self.begins_anew and self.path.exists():
            self.records, self.outcomes = read_results(self.path), read_outcomes(self.path)

    def _write(self) -> None:
        keys = {record_key(record) for record in self.records}
        self.outcomes = {key: own for key, own in self.outcomes.items() if key in keys}
        write_results(self.path, self.records)
        write_outcomes(self.path, self.outcomes)
        self.begins_anew = False

    def find(self, key: str) -> dict[str, Any] | None:
        return next((record for record in self.records if record_key(record) == key), None)

    def put(self, record: dict[str, Any], outcomes: Outcomes) -> None:
        def place(one: dict[str, Any]) -> tuple:
            index = one.get("settings", {}).get("index")  # through an index the metrics are others
            return one["model"], one["benchmark"], one.get("condition"), one["seed"], index

        with _alone_in(self.path.parent):
            self._read()
            self.records = [*(old for old in self.records if place(old) != place(record)), record]
            self.outcomes[record_key(record)] = outcomes
            self._write()

    def keep_only(self, records: Sequence[dict[str, Any]]) -> None:
        """Drop what an earlier run left and this one did not ask for."""
        self.records = list(records)
        if records:
            with _alone_in(self.path.parent):
                self._write()


def _check_writable(path: Path) -> None:
    """Before hours of work whose results could not be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(
            f"Expected a place to write the results file {path} to, got: {error}. Choose another."
        ) from error


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
        fields: `model`, `benchmark`, `metrics`, `n`, `seed`, `split`, `revision`, `dataset_fingerprint`, `command`,
            and optionally those of `OPTIONAL_FIELDS` (left out where `None`).

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
        ValueError: If a field is missing, unknown, of another type or version, or a metric is no number; the field is
            named.
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


def read_results_json(path: str | os.PathLike) -> Any:
    """Read JSON of any form.

    Raises:
        ValueError: If it is no JSON in UTF-8; the file is named.
    """
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
    records = read_results_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"Expected a JSON list of one or more records in {path}, got {type(records).__name__}.")
    for index, record in enumerate(records):
        validate_record(record, f"record {index} of {path}")
    return records
