"""The line of weights from an anchor (0) to what fine-tuning made of it (1), and where on it a student lies.

A student whose training averaged its weights with the anchor's (`wise_ft_alpha` below 1) does not lie at the end. The
file `arguments.yaml` beside its weights says where.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.data.files import ARGUMENTS_NAME, MANIFEST_NAME, read_json, read_yaml
from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.families import is_image_side
from modeling_dclip.encoders.loading import load_pair, stored_dtype
from modeling_dclip.encoders.weight_interpolation import interpolate_models

ALPHA = "alpha="  # how the condition of a point on the line begins
_CHECKPOINT, _SCHEDULER = "checkpoint-", "scheduler.pt"  # of a folder that training saves before it averages


class Line(NamedTuple):
    """What is known of a student and the anchor that it is compared with.

    Attributes:
        student_alpha (`float`): Where the student lies, in (0, 1]; 1 where nothing says otherwise.
        described (`str`): What an alpha is a share of, for the reader of a result.
        arguments (`dict`, *optional*): Of the training that led from this anchor to this student.
        same_text (`bool`): Whether both have one text encoder.
    """

    student_alpha: float
    described: str
    arguments: dict[str, Any] | None
    same_text: bool

    def weights(self, anchor: DualEncoder, student: DualEncoder, alpha: float) -> dict[str, torch.Tensor]:
        """The weights at `alpha`. Beyond the student they are extrapolated, which multiplies the rounding of its
        stored weights by `alpha / student_alpha`.

        Args:
            anchor, student ([`~modeling_dclip.encoders.DualEncoder`]): The ends, in float32.
            alpha (`float`): In [0, 1].

        Returns:
            `dict[str, torch.Tensor]`: For the student's architecture.

        Raises:
            ValueError: As [`~modeling_dclip.encoders.weight_interpolation.interpolate_models`].
        """
        return interpolate_models(anchor, student, alpha, self.student_alpha)


def place_on_line(record: Mapping[str, Any]) -> float | None:
    """The alpha of a record; `None` of one of a model itself.

    Example:
        >>> place_on_line({"condition": "alpha=0.25"}), place_on_line({})
        (0.25, None)
    """
    condition = record.get("condition") or ""
    return float(condition.removeprefix(ALPHA)) if condition.startswith(ALPHA) else None


def place_of_student(points: Iterable[Mapping[str, Any]]) -> float:
    """Where the student lies on the line, as records of points on it say; 1 where they do not."""
    return next((place for one in points if (place := (one.get("settings") or {}).get("student_alpha"))), 1.0)


def read_training(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Read the arguments that a student was trained with.

    Args:
        folder (`str` or `os.PathLike`): The student, or anything else that names a model.

    Returns:
        `dict` or `None`: With a mapping under `student`; `None` where nothing says that such a training made it.

    Raises:
        ValueError: If the file is damaged, or `student.wise_ft_alpha` in it is no number in [0, 1].
    """
    path = Path(folder) / ARGUMENTS_NAME
    if not path.is_file():
        return None
    manifest = Path(folder) / MANIFEST_NAME
    if manifest.is_file() and read_json(manifest, "manifest", keys=("stage",))["stage"] != "student":
        return None  # a stage of a run that trains students too
    arguments = read_yaml(path, "training's arguments", "Restore the file that train.py wrote.")
    if not isinstance(arguments, dict) or not isinstance(student := arguments.get("student"), dict):
        return None
    alpha = student.get("wise_ft_alpha", 1)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise ValueError(
            f"Expected a number from 0 to 1 under student.wise_ft_alpha in '{path}', got {alpha!r:.80}. Restore the "
            "file that train.py wrote."
        )
    return arguments


def find_line(anchor_name: str, student_name: str, anchor: DualEncoder, student: DualEncoder) -> Line:
    """Find where a student lies on the line from an anchor.

    Its training's arguments count if that training started from this anchor: from the same name or the same weights,
    or where these cannot be found any more, from a model with the same text encoder.

    Args:
        anchor_name, student_name (`str`): What the two were loaded from.
        anchor, student ([`~modeling_dclip.encoders.DualEncoder`]): The two, in float32.

    Returns:
        [`Line`]

    Raises:
        ValueError: If training kept nothing of what it learned (`wise_ft_alpha: 0`), or as [`read_training`].
    """
    dtype = getattr(torch, stored_dtype(student_name)) if Path(student_name).is_dir() else torch.float32
    same_text = _have_one_text_encoder(anchor.state_dict(), student.state_dict(), dtype)
    arguments = read_training(student_name)
    if arguments is None:
        told = f"alpha counts from {anchor_name} (0) to {student_name} (1), which has no record of a training"
        return Line(1, told, None, same_text)
    if not _started_from(arguments.get("clip_model"), anchor_name, anchor, dtype, same_text):
        told = f"alpha counts from {anchor_name} (0) to {student_name} (1), whose training started from another model"
        return Line(1, told, None, same_text)
    alpha = 1 if _is_checkpoint(Path(student_name)) else arguments["student"].get("wise_ft_alpha", 1)
    if not alpha:
        raise ValueError(
            f"Expected a student with a share of what its training learned, got wise_ft_alpha 0 in "
            f"'{Path(student_name) / ARGUMENTS_NAME}': its weights are those before training."
        )
    told = f"alpha counts from {anchor_name} (0) to the fine-tuned weights (1)"
    told += f"; {student_name} is alpha {alpha:g}" if alpha != 1 else ""
    return Line(alpha, told, arguments, same_text)


def _is_checkpoint(folder: Path) -> bool:
    """Whether training saved a folder on its way; its weights are not averaged, though its arguments say so."""
    return folder.resolve().name.startswith(_CHECKPOINT) or (folder / _SCHEDULER).is_file()


def _have_one_text_encoder(
    anchor: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> bool:
    """Whether all that is not of the image side is equal, in the type that the student is stored in."""
    texts = [name for name in student if not is_image_side(name)]
    return all(name in anchor and torch.equal(anchor[name].to(dtype), student[name].to(dtype)) for name in texts)


def _started_from(start: Any, anchor_name: str, anchor: DualEncoder, dtype: torch.dtype, same_text: bool) -> bool:
    """Whether the model that a training names as its start is the anchor."""
    if not isinstance(start, str):
        return same_text
    start, anchor_name = (PRESETS.get(name, name) for name in (start, anchor_name))
    if start == anchor_name or (Path(start).is_dir() and Path(start).resolve() == Path(anchor_name).resolve()):
        return True
    if not Path(start).is_dir():
        return same_text
    own, other = load_pair(start)[0].state_dict(), anchor.state_dict()
    return all(torch.equal(own[name].to(dtype), other[name].to(dtype)) for name in own.keys() & other.keys())
