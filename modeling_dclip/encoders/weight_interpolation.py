"""Interpolate between the weights of two models of one architecture.

Source: "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv 2109.01903; docs/papers.md.
"""

from collections.abc import Mapping

import torch


def interpolate_weights(
    anchor: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Interpolate linearly from the anchor to the student (WiSE-FT): (1 - alpha) * anchor + alpha * student.

    Computed in float32 or wider and cast back. `alpha` 0 and 1 give exact copies. Integers and booleans must be equal.

    Args:
        anchor, student (`Mapping[str, torch.Tensor]`): States of the untouched and the trained model: same names,
            shapes and types.
        alpha (`float`): In [0, 1]; 0 is the anchor.

    Returns:
        `dict[str, torch.Tensor]`: New tensors, on the student's devices.

    Raises:
        ValueError: If `alpha` is out of range, or names, shapes, types or integer values differ; the message names the
            first.

    Example:
        >>> interpolate_weights({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0.25)["w"].tolist()
        [0.25]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"Expected alpha in [0, 1], got {alpha}.")
    if odd := sorted(anchor.keys() ^ student.keys()):
        raise ValueError(f"Expected the same weights in both, got {len(odd)} in one only, the first {odd[0]!r}.")
    mixed = {}
    for name, end in student.items():
        start = anchor[name].to(end.device)
        shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (start, end)]
        if shapes[0] != shapes[1] or not (end.is_floating_point() or torch.equal(start, end)):
            raise ValueError(f"Expected one shape and type in both, and equal integers, got {shapes} for {name!r}.")
        if alpha in (0, 1) or not end.is_floating_point():
            mixed[name] = (end if alpha == 1 else start).clone()
        else:
            wide = torch.promote_types(end.dtype, torch.float32)
            mixed[name] = torch.lerp(start.to(wide), end.to(wide), alpha).to(end.dtype)
    return mixed
