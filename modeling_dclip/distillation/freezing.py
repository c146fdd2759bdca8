"""Choose by name which parameters stay as they are, and say what came of it."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

REGEX_PREFIX = "re:"


@dataclass(frozen=True)
class FreezeReport:
    """What [`freeze_parameters`] did.

    Args:
        matched (`dict[str, int]`): Parameter tensors each pattern matched.
        frozen_parameters (`int`): Numbers that get no gradient, whoever froze them.
        trainable_parameters (`int`): Numbers that train.
    """

    matched: dict[str, int]
    frozen_parameters: int
    trainable_parameters: int

    def __str__(self) -> str:
        patterns = "".join(f"; {pattern!r} froze {count} tensors" for pattern, count in self.matched.items())
        return f"{self.trainable_parameters:,} parameters train, {self.frozen_parameters:,} are frozen{patterns}"


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> FreezeReport:
    """Turn off the gradient of every parameter whose whole name matches a pattern.

    Args:
        model (`nn.Module`): Changed in place.
        patterns (`Sequence[str]`): Globs over parameter names, such as `vision_model.encoder.layers.[0-5].*`, or
            regular expressions after `re:`, such as `re:.*layer_norm\\d.*`.

    Returns:
        [`FreezeReport`]

    Raises:
        ValueError: If a pattern matches nothing, is no regular expression, or nothing is left to train.

    Example:
        >>> print(freeze_parameters(nn.Linear(2, 3), ["bias"]))
        6 parameters train, 3 are frozen; 'bias' froze 1 tensors
    """
    parameters = dict(model.named_parameters())
    matched = {}
    for pattern in patterns:
        regex = pattern.removeprefix(REGEX_PREFIX) if pattern.startswith(REGEX_PREFIX) else fnmatch.translate(pattern)
        try:
            names = [name for name in parameters if re.fullmatch(regex, name)]
        except re.error as error:
            raise ValueError(
                f"Freeze pattern {pattern!r}: expected a regular expression after 're:' ({error})."
            ) from error
        if not names:
            raise ValueError(f"Freeze pattern {pattern!r} matches no parameter. There are: {', '.join(parameters)}.")
        for name in names:
            parameters[name].requires_grad_(False)
        matched[pattern] = len(names)
    trainable = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    if trainable == 0:
        raise ValueError(f"Freeze patterns {list(patterns)} leave nothing to train. Freeze less.")
    frozen = sum(parameter.numel() for parameter in parameters.values()) - trainable
    return FreezeReport(matched, frozen, trainable)
