"""What a stage was made from, kept beside what it made: a finished stage is recognised, an interrupted one resumed."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from modeling_dclip.data.files import replacing

logger = logging.getLogger(__name__)

RECORD_NAME = "stage.json"


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [
            line for name in names for line in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {str(old)[:60]} -> {str(new)[:60]}"]


class StageRecord:
    """The record of one stage.

    Args:
        folder (`Path`): The stage's own.
        inputs (`dict`): All that decides the result, as plain values: arguments, keys of data and of models.
        overwrite (`bool`): Delete what other inputs made instead of raising.

    Raises:
        ValueError: If the folder was made from other inputs; the message says which and what to do.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], overwrite: bool = False):
        self.folder, self.inputs = folder, json.loads(json.dumps(inputs))
        self.path = folder / RECORD_NAME
        self.finished = False
        stored = self._read()
        PartialState().wait_for_everyone()  # all have read before the first one writes
        if stored is not None and stored["inputs"] != self.inputs:
            changes = "; ".join(_differences(stored["inputs"], self.inputs))
            if not overwrite:
                raise ValueError(
                    f"'{folder}' was made from other inputs ({changes}). Name another --output_dir, or pass --overwrite true to delete "
                    "the folder and make it again."
                )
            logger.warning("%s: made again, inputs changed: %s", folder.name, changes)
            if PartialState().is_main_process:
                shutil.rmtree(folder)
            stored = None
        if stored is not None:
            self.finished = stored["finished"]
        if stored is None:
            self._write(finished=False)

    def finish(self) -> None:
        """Note that the stage is done."""
        self.finished = True
        self._write(finished=True)
        logger.info("%s: wrote %s", self.folder.name, self.folder)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.is_file():
            return None
        return json.loads(self.path.read_text(encoding="utf-8"))

    def _write(self, finished: bool) -> None:
        if PartialState().is_main_process:
            record = json.dumps({"finished": finished, "inputs": self.inputs}, indent=2) + "\n"
            with replacing(self.path) as temporary:
                temporary.write_text(record, encoding="utf-8")
        PartialState().wait_for_everyone()


def finished_inputs(folder: Path) -> dict[str, Any]:
    """What a finished stage was made from.

    Raises:
        FileNotFoundError: If the stage was not run.
        ValueError: If it did not finish.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"No {RECORD_NAME} in '{folder}': run the stage {folder.name!r} first.")
    record = json.loads(path.read_text(encoding="utf-8"))
    if not record["finished"]:
        raise ValueError(
            f"The stage in '{folder}' did not finish. Run the stage {folder.name!r} again; it goes on where it was."
        )
    return record["inputs"]


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a stage's folder; one whose writing was interrupted is passed over.

    `transformers` writes a checkpoint's `trainer_state.json` last.
    """
    steps = sorted(
        (
            int(path.name.rpartition("-")[2])
            for path in folder.glob("checkpoint-*")
            if path.name.split("-")[1].isdigit()
        ),
        reverse=True,
    )
    for step in steps:
        state = folder / f"checkpoint-{step}" / "trainer_state.json"
        try:
            if json.loads(state.read_text(encoding="utf-8"))["global_step"] == step:
                return str(state.parent)
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s is incomplete: resuming from an earlier checkpoint", state.parent)
    return None
