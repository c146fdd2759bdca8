"""The checkpoints in a stage's folder: which are whole, which belong to the stage's record, and which to go on from.

A checkpoint holds the notes of the run that wrote it: a key of the stage's inputs and the number of processes. One of
other inputs is passed over, so that what an interrupted deletion left is never gone on from.
"""

import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME  # written last
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_dclip.data.failures import one_line
from modeling_dclip.data.files import list_folder, read_json, require_field, write_json
from modeling_dclip.encoders.fingerprints import combine_keys
from modeling_dclip.encoders.loading import check_weights

logger = logging.getLogger(__name__)

RECORD_NAME = "stage.json"
NOTES_NAME = "stage_notes.json"  # beside the record and in each checkpoint


class StageError(ValueError):
    """A stage that cannot be gone on from.

    Args:
        reason (`str`): What is wrong, one sentence.
        advice (`str`): What to do, one sentence; somebody who has given `--overwrite true` has done it.
    """

    def __init__(self, reason: str, advice: str):
        self.reason, self.advice = reason, advice
        super().__init__(f"{reason} {advice}")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a stage.

    Args:
        folder (`Path`): The stage's own folder.

    Returns:
        `dict` or `None`: With `finished` (`bool`) and `inputs` (`dict`); `None` if there is none.

    Raises:
        StageError: If it is damaged; the message says what to delete.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = read_json(path, "record", ("finished", "inputs"), advice="")
        if not isinstance(record["finished"], bool):
            raise ValueError(f"The record '{path}': expected true or false under 'finished'.")
        require_field(record, "inputs", "The record", path, dict)
    except ValueError as error:
        raise StageError(
            f"The record of the stage in '{folder}' is damaged: {one_line(error)}",
            "Delete the folder, or pass --overwrite true, to make the stage again.",
        ) from error
    return record


def key_of_inputs(inputs: Mapping[str, Any]) -> str:
    """A key of a record's inputs."""
    return combine_keys([json.dumps(inputs, sort_keys=True)])


@dataclass(frozen=True)
class RunNotes:
    """What a checkpoint says of the run that wrote it.

    Args:
        inputs_key (`str` or `None`): Of the stage's record; `None` if it has none.
        world_size (`int`): Number of processes.
        log (`dict`, *optional*): What was added up since the last log.
    """

    inputs_key: str | None
    world_size: int
    log: dict[str, Any] | None = None

    @classmethod
    def current(cls, folder: Path, world_size: int, log: dict[str, Any] | None = None) -> "RunNotes":
        """Of this run of the stage in a folder."""
        record = read_record(folder)
        return cls(None if record is None else key_of_inputs(record["inputs"]), world_size, log)

    def write(self, checkpoint: Path) -> None:
        """Write them into a checkpoint."""
        write_json(checkpoint / NOTES_NAME, asdict(self))


def read_notes(folder: Path) -> dict[str, Any]:
    """The notes in a stage's folder or in a checkpoint; empty if there are none, as in those of earlier versions.

    Raises:
        StageError: If they are damaged.
    """
    path = folder / NOTES_NAME
    try:
        return read_json(path, "notes", (), advice="") if path.is_file() else {}
    except ValueError as error:
        raise StageError(one_line(error), f"Delete '{folder}'.") from error


def numbered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a stage's folder with their steps, the newest first, whole or not."""
    found = [(re.fullmatch(r"checkpoint-([0-9]+)", path.name), path) for path in list_folder(folder, "checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in found if match is not None and path.is_dir()]
    return sorted(numbered, reverse=True)


def delete_old_checkpoints(folder: Path, keep: int, newest: int, best: str | None = None) -> None:
    """Delete the older checkpoints, by their steps. Folders of other names are let be.

    Those of later steps than the newest are left over from another run, and go first. Their times say nothing: a copy
    of the folder or a jump of the clock changes them.

    Args:
        folder (`Path`): The stage's own folder.
        keep (`int`): How many stay, those below included.
        newest (`int`): The step of the one that was written last; it stays.
        best (`str`, *optional*): The folder of another one that stays.
    """
    found = numbered_checkpoints(folder)
    stay = [path for step, path in found if step == newest or str(path) == str(Path(best or ""))]
    old = [path for step, path in reversed(found) if step < newest and path not in stay]
    old = [path for step, path in found if step > newest and path not in stay] + old
    for path in old[: max(0, len(found) - max(keep, len(stay)))]:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be deleted is tried again at the next checkpoint


def last_checkpoint(folder: Path, world_size: int = 1, weights: str = SAFE_WEIGHTS_NAME) -> str | None:
    """The newest checkpoint in a stage's folder that is whole and belongs to its record. Others are named in the log.

    Args:
        folder (`Path`): The stage's own folder.
        world_size (`int`, *optional*, defaults to 1): Number of processes that will go on.
        weights (`str`, *optional*): Name of the file that the trainer loads; empty if a sharded run has its own.

    Returns:
        `str` or `None`: The checkpoint's folder; `None` if there is none.

    Raises:
        ValueError: If it was written by another number of processes.
    """
    passed_over, last = [], None
    for step, checkpoint in numbered_checkpoints(folder):
        try:
            check_checkpoint(checkpoint, step, weights)
            if foreign := _belongs_elsewhere(folder, checkpoint):
                passed_over.append(f"{checkpoint} is passed over: {foreign}")
                continue
        except (OSError, ValueError) as error:
            passed_over.append(f"{checkpoint} is incomplete ({one_line(error).rstrip('.')})")
            continue
        last = checkpoint
        break
    if passed_over:
        then = "no other can be gone on from: the stage begins anew" if last is None else f"goes on from {last.name}"
        logger.warning("%s: %s; %s", folder.name, "; ".join(passed_over), then)
    if last is None:
        return None
    check_processes(folder, world_size)
    return str(last)


def check_processes(folder: Path, world_size: int) -> None:
    """Refuse to go on with another number of processes: batches, and with them the result, would be others.

    Args:
        folder (`Path`): The stage's own folder.
        world_size (`int`): Number of processes that will go on.

    Raises:
        ValueError: If the newest checkpoint of this stage is of another number.
    """
    for _, checkpoint in numbered_checkpoints(folder):
        try:
            if _belongs_elsewhere(folder, checkpoint):
                continue
            began_with = _processes_of(checkpoint)
        except (OSError, ValueError):
            continue  # damaged: passed over, and said, where it would be loaded
        if began_with is None:
            continue
        if began_with != world_size:
            raise StageError(
                f"'{folder}' was begun with {began_with} process{'es' if began_with > 1 else ''} ({checkpoint.name}), "
                f"got {world_size}: the batches would be others.",
                f"Go on with `accelerate launch --num_processes {began_with}`, or pass --overwrite true to make the "
                "stage again.",
            )
        return


def _processes_of(checkpoint: Path) -> int | None:
    """How many processes wrote a checkpoint. Earlier versions wrote no notes: each process left its random state."""
    if notes := read_notes(checkpoint):
        return int(require_field(notes, "world_size", "The notes", checkpoint / NOTES_NAME, int))
    several = len(list_folder(checkpoint, "rng_state_*.pth"))
    return several or (1 if (checkpoint / "rng_state.pth").is_file() else None)


def _belongs_elsewhere(folder: Path, checkpoint: Path) -> str:
    """Why a checkpoint is not of this stage's record; empty if it is."""
    record, notes = read_record(folder), read_notes(checkpoint)
    if record is None:
        return ""  # a trainer without a stage
    if not notes:
        return "it was there before the stage's record" if read_notes(folder) else ""
    return "" if notes.get("inputs_key") == key_of_inputs(record["inputs"]) else "it was made from other inputs"


def check_checkpoint(checkpoint: Path, step: int, weights: str = SAFE_WEIGHTS_NAME) -> None:
    """Check that a checkpoint is whole: every file is there, with its full length.

    Args:
        checkpoint (`Path`): Its folder.
        step (`int`): The step in its name.
        weights (`str`, *optional*): As for [`last_checkpoint`].

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or of another step.
    """
    path = _require_part(checkpoint, TRAINER_STATE_NAME)
    state = read_json(path, "state of the trainer", ("global_step", "log_history"), advice="")
    if require_field(state, "global_step", "The state", path, int) != step:
        raise ValueError(f"'{path}': expected step {step}, got {state['global_step']}.")
    require_field(state, "log_history", "The state", path, list)
    if not weights:
        return
    names = [weights]
    if not (checkpoint / weights).is_file() and (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = read_json(checkpoint / SAFE_WEIGHTS_INDEX_NAME, "index of weights", ("weight_map",), advice="")
        names = sorted(set(index["weight_map"].values()))
    for name in names:
        check_weights(_require_part(checkpoint, name))
    count = _processes_of(checkpoint)
    states = ["rng_state.pth"] if count in (None, 1) else [f"rng_state_{index}.pth" for index in range(count)]
    for name in ("optimizer.pt", "scheduler.pt", *states):
        _check_archive(_require_part(checkpoint, name))
    if (checkpoint / "scaler.pt").exists():
        _check_archive(checkpoint / "scaler.pt")


def _require_part(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint. No path is wrong if it is missing: the run was stopped while it saved."""
    if not (path := checkpoint / name).is_file():
        raise FileNotFoundError(f"{name} was not written")
    return path


def _check_archive(path: Path) -> None:
    """Check a file of `torch.save`, which is a zip archive with checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"'{path}' is damaged ({error}).") from error
    if damaged is not None:
        raise ValueError(f"'{path}' is damaged (at {damaged}).")


# What torch and pickle raise where a file holds something else than they expect.
_DAMAGE = (
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)


@contextmanager
def reading_checkpoint(checkpoint: str | Path) -> Iterator[None]:
    """Say which folder to delete if the states in a checkpoint cannot be loaded."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _DAMAGE as error:
        raise ValueError(
            f"The checkpoint '{checkpoint}' cannot be loaded ({one_line(error)}). Delete its folder: the stage goes "
            "on from an earlier checkpoint, or begins anew."
        ) from error
