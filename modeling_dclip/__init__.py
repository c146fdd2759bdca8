"""DCLIP and DM-CLIP: CLIP image encoders distilled for retrieval and for speed, Hugging Face-native.

Importing registers the models, configs and processors with transformers' Auto classes. A command of this package does
so only when it loads its first model, so that its help need not wait for PyTorch.
"""

from .interruption import INTERRUPTED as _INTERRUPTED  # noqa: F401  first: it takes Ctrl+C while the others load
from .progress import LOG_EVERY_SECONDS as _LOG_EVERY_SECONDS  # noqa: F401  then: it tells tqdm how many bars to show

# isort: split
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .interruption import is_command as _is_command

if _TYPE_CHECKING or not _is_command():
    from .auto_classes import (
        DMCLIP_PRESETS,
        PRESETS,
        DCLIPConfig,
        DCLIPModel,
        DCLIPProcessor,
        DCLIPTeacher,
        DCLIPTeacherConfig,
        DCLIPTeacherOutput,
        DCLIPTeacherProcessor,
        DCLIPVisionConfig,
        DCLIPVisionModel,
        DCLIPVisionModelOutput,
        DMCLIPConfig,
        DMCLIPModel,
        DMCLIPTextConfig,
        DMCLIPTextModel,
        DMCLIPTextModelOutput,
        DMCLIPVisionConfig,
        DMCLIPVisionModel,
        DMCLIPVisionModelOutput,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "DMCLIP_PRESETS",
    "PRESETS",
    "DCLIPConfig",
    "DCLIPModel",
    "DCLIPProcessor",
    "DCLIPTeacher",
    "DCLIPTeacherConfig",
    "DCLIPTeacherOutput",
    "DCLIPTeacherProcessor",
    "DCLIPVisionConfig",
    "DCLIPVisionModel",
    "DCLIPVisionModelOutput",
    "DMCLIPConfig",
    "DMCLIPModel",
    "DMCLIPTextConfig",
    "DMCLIPTextModel",
    "DMCLIPTextModelOutput",
    "DMCLIPVisionConfig",
    "DMCLIPVisionModel",
    "DMCLIPVisionModelOutput",
]


def __getattr__(name: str) -> object:
    """A public name, in a command that has not needed one so far."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import auto_classes

    return getattr(auto_classes, name)
