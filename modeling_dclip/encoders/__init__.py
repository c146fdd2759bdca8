"""Any dual encoder as one: its interface, loading, how each family reads text, and every content hash.

PyTorch is imported where a function needs it, so that a command's help need not wait for it; so it is in `families`
and `fingerprints`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn


@runtime_checkable
class DualEncoder(Protocol):
    """A model that embeds images and texts in one space: what this package needs of it, whatever its family.

    [`~modeling_dclip.encoders.loading.load_dual_encoder`] returns one: a model of this package, of transformers (CLIP,
    SigLIP, ...) or of open_clip behind the same methods. All are `torch.nn.Module`s.

    Attributes:
        config: With `model_type`, and `text_config` where the family has one.
        training (`bool`): Whether the model is in training mode.
        device (`torch.device`), dtype (`torch.dtype`): Of the weights.
    """

    config: Any
    training: bool

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """Embed `pixel_values` `(B, 3, H, W)` and whatever else the family's image processor returns.

        The result is a tensor `(B, D)` or an output object that holds it;
        [`~modeling_dclip.encoders.families.projected`] reads both.
        """

    def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
        """Embed what [`~modeling_dclip.encoders.families.tokenize_texts`] returns; the result is as above."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, or to evaluation mode with `False`."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the weights in place."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The trainable tensors."""

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """The other tensors, such as running statistics."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every weight by its name."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Copy weights by their names."""


@dataclass(frozen=True)
class Encoder:
    """A dual encoder with its processor, and how to run the two: one argument instead of five.

    Args:
        model ([`DualEncoder`]): The model. Its mode is restored after use; its device is not.
        processor: The model's processor, with `image_processor` and `tokenizer`. A function that reads only images or
            only texts takes the image processor or the tokenizer alone.
        batch_size (`int`, *optional*, defaults to 64): Images in one forward pass, at least 1. No metric depends on
            it.
        device (`torch.device` or `str`, *optional*): Where to compute. By default the model stays where it is.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and resize images, at least 0.
        kept_texts (`dict[tuple[str, str], torch.Tensor]`, *optional*): Where embedded texts are kept, by text encoder
            and token ids, those of one text encoder at a time. Encoders that share it embed the captions of a test set
            once if their text towers are equal, as those of students and their anchor are.

    Raises:
        ValueError: If `batch_size` or `num_workers` is too small.
    """

    model: DualEncoder
    processor: Any
    batch_size: int = 64
    device: torch.device | str | None = None
    num_workers: int = 0
    kept_texts: dict[tuple[str, str], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"Expected batch_size >= 1 and num_workers >= 0, got {self.batch_size} and {self.num_workers}."
            )

    @property
    def compute_device(self) -> torch.device:
        """`device`, or the model's own where none is given."""
        import torch

        return self.model.device if self.device is None else torch.device(self.device)

    @contextmanager
    def evaluating(self) -> Iterator[torch.device]:
        """Move the model to the compute device, in evaluation mode, and restore its mode at the end.

        Yields:
            `torch.device`: Where the inputs belong.
        """
        device, training = self.compute_device, self.model.training
        self.model.to(device).eval()
        try:
            yield device
        finally:
            self.model.train(training)
