"""Interpolate between the weights of two models of one architecture.

Source: "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv 2109.01903; docs/papers.md.
"""

from collections.abc import Mapping
from typing import Any

import torch

# Fields of a tower that no weight has, and that change what a model computes from its weights.
_COMPUTED = (
    "position_embedding_type",
    "rotary_base",
    "rotary_scale",
    "rotary_table",
    "hidden_act",
    "num_attention_heads",
)
_DEFAULTS = {"position_embedding_type": "absolute"}  # CLIP's own configurations have no such field
_COUNTER = "num_batches_tracked"  # of BatchNorm: how many batches it has seen, which no output depends on


def interpolate_models(anchor: Any, student: Any, alpha: float, student_alpha: float = 1) -> dict[str, torch.Tensor]:
    """As [`interpolate_weights`], between two models, which must compute the same from the same weights.

    Args:
        anchor, student ([`~modeling_dclip.encoders.DualEncoder`]): The untouched and the trained model.
        alpha, student_alpha (`float`): As in [`interpolate_weights`].

    Returns:
        `dict[str, torch.Tensor]`: The weights for the student's architecture.

    Raises:
        ValueError: If their architectures differ, as with rotary positions in one of them; or as
            [`interpolate_weights`].
    """
    for tower in ("vision_config", "text_config"):
        ends = [getattr(getattr(model, "config", None), tower, None) for model in (anchor, student)]
        if ends[0] is None or ends[1] is None:
            continue
        for name in _COMPUTED:
            values = [getattr(end, name, _DEFAULTS.get(name)) for end in ends]
            if values[0] != values[1] and _matters(name, ends):
                advice = "Name an anchor of the model's own architecture."
                if name == "position_embedding_type":
                    advice = (
                        "A student with rotary positions starts from the CLIP with these switched on, not from the "
                        "CLIP as it is: name the former as the anchor, which load_student(CLIP, 'rope') of "
                        "modeling_dclip.distillation.run gives."
                    )
                raise ValueError(
                    f"Expected two models of one architecture to interpolate between, got {tower}.{name} "
                    f"{values[0]!r} in the anchor and {values[1]!r} in the model. {advice}"
                )
    return interpolate_weights(anchor.state_dict(), student.state_dict(), alpha, student_alpha)


def _matters(name: str, ends: list[Any]) -> bool:
    """Whether a field changes what a tower computes: the base of rotations does where there are any."""
    return not name.startswith("rotary_") or any(
        getattr(end, "position_embedding_type", None) == "rope" for end in ends
    )


def interpolate_weights(
    anchor: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor], alpha: float, student_alpha: float = 1
) -> dict[str, torch.Tensor]:
    """Interpolate linearly from the anchor to what was trained (WiSE-FT): (1 - alpha) * anchor + alpha * trained.

    Computed in float32 or wider and cast back. The anchor and the student are copied exactly. Integers and booleans
    must be equal; of BatchNorm's counters of batches, which no output depends on, the student's is taken.

    Args:
        anchor, student (`Mapping[str, torch.Tensor]`): States of the untouched and the trained model: same names,
            shapes and types.
        alpha (`float`): In [0, 1]; 0 is the anchor.
        student_alpha (`float`, *optional*, defaults to 1): In (0, 1]; where the student lies, if it is such a point
            itself. Points beyond it are extrapolated: rounding of its weights grows by alpha / student_alpha.

    Returns:
        `dict[str, torch.Tensor]`: New tensors, on the student's devices.

    Raises:
        ValueError: If `alpha` or `student_alpha` is out of range, or names, shapes, types or integer values differ;
            the message names the first.

    Example:
        >>> interpolate_weights({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.25)["w"].tolist()
        [0.25]
        >>> interpolate_weights({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.75, student_alpha=0.5)["w"].tolist()
        [1.5]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"Expected alpha in [0, 1], got {alpha}.")
    if not 0 < student_alpha <= 1:
        raise ValueError(f"Expected student_alpha in (0, 1], got {student_alpha}.")
    share = alpha / student_alpha
    if odd := sorted(anchor.keys() ^ student.keys()):
        raise ValueError(f"Expected the same weights in both, got {len(odd)} in one only, the first {odd[0]!r}.")
    mixed = {}
    for name, end in student.items():
        start = anchor[name].to(end.device)
        shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (start, end)]
        counts = name.rpartition(".")[2] == _COUNTER
        if shapes[0] != shapes[1] or not (end.is_floating_point() or counts or torch.equal(start, end)):
            raise ValueError(f"Expected one shape and type in both, and equal integers, got {shapes} for {name!r}.")
        if share in (0, 1) or not end.is_floating_point():
            mixed[name] = (start if share == 0 or not (counts or share == 1) else end).clone()
        else:
            wide = torch.promote_types(end.dtype, torch.float32)
            mixed[name] = torch.lerp(start.to(wide), end.to(wide), share).to(end.dtype)
    return mixed
