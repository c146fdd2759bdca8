"""The guard of training: a step whose loss or gradient is not finite changes no weight, and none such is saved.

Before each step of the optimiser the guard looks at the terms of the loss, at the weighted sum and at the norm of the
gradient, all in one number. On the CPU this number is read at once. On CUDA with `on_nonfinite: stop` it is read one
step later, or before the next log, evaluation or checkpoint, so that the device never waits; what the late step did to
the weights in memory is thrown away with the run.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from modeling_dclip.data.collation import Batches
from modeling_dclip.data.reinforced import ReinforcedBatches
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

LossTerms = dict[str, tuple[torch.Tensor, float]]

MOST_SKIPPED_IN_A_ROW = 10  # so many steps without a finite loss are a run that has diverged
NAMED_IMAGES = 64  # in a message


@dataclass
class _MicroBatch:
    """A batch of one forward pass with its loss."""

    inputs: Mapping[str, Any]
    terms: LossTerms = field(default_factory=dict)
    loss: torch.Tensor | None = None

    def values(self) -> list[torch.Tensor]:
        return [term for term, _ in self.terms.values()] + ([] if self.loss is None else [self.loss])

    def is_odd(self) -> bool:
        return not all(bool(torch.isfinite(value)) for value in self.values())


@dataclass
class _Step:
    """A step of the optimiser that is to be looked at: `odd` is 1 if something is not finite."""

    number: int
    batches: list[_MicroBatch]
    norm: torch.Tensor | None
    odd: torch.Tensor
    copied: torch.cuda.Event | None = None

    def is_odd(self) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.odd)


class TrainingGuard(TrainerCallback):
    """Stops at a step that is not finite, or leaves it out.

    Args:
        accelerator (`accelerate.Accelerator`): The trainer's.
        batches ([`Batches`] or [`ReinforcedBatches`]): Names the images of a batch.
        stage (`str`): For messages.
        add ([`Callable`]): Called with the terms and the loss of each batch of a step that is kept.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batches: Batches | ReinforcedBatches,
        stage: str,
        add: Callable[[LossTerms, torch.Tensor], None],
    ):
        self.accelerator, self.batches, self.stage, self.add = accelerator, batches, stage, add
        self.norm: torch.Tensor | None = None  # of this step's gradient, if the trainer computed it
        self.skipped = self.skipped_in_a_row = 0
        self.last_inputs: Mapping[str, Any] | None = None  # the last batch of a step that was kept
        self._taken: list[_MicroBatch] = []
        self._waiting: _Step | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Remember the batch that goes through the model next."""
        self._taken.append(_MicroBatch(inputs))

    def record(self, terms: LossTerms, loss: torch.Tensor) -> None:
        """Remember the loss of this batch."""
        batch = self._taken[-1]
        batch.terms = {name: (term.detach(), weight) for name, (term, weight) in terms.items()}
        batch.loss = loss.detach()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Refuse a model that holds NaN before it trains."""
        self._require_finite(model, "before training. Name another model to start from, or make it again.")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """A new step of the optimiser begins."""
        self._taken, self.norm = [], None
        if args.on_nonfinite == "skip":  # BatchNorm takes in a batch before its loss is known
            self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Look at this step, or at the one before, before the weights change."""
        late = args.on_nonfinite == "stop" and self.accelerator.device.type == "cuda"
        step = self._look(state.global_step + 1, model, late)
        if late:
            self.settle(args)
            self._waiting = step
        elif not step.is_odd():
            self._keep(step)
        elif args.on_nonfinite == "stop":
            raise FloatingPointError(self._describe(step, args))
        else:
            self._skip(step, args, model, optimizer)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Under fp16 the scaler leaves out steps and halves the loss scale. Below 1 that does not help any more."""
        scaler = self.accelerator.scaler
        if scaler is not None and self.accelerator.optimizer_step_was_skipped and scaler.get_scale() < 1:
            raise FloatingPointError(
                f"{self.stage}: the gradients at step {state.global_step + 1} are not finite even with a loss scale "
                f"of {scaler.get_scale()}. Lower {self.stage}.learning_rate, or train with bf16."
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Nothing is logged, measured or saved before its step was looked at."""
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.settle(args)

    def on_epoch_end(self, args, state, control, **kwargs):
        """As at the end of a step."""
        self.settle(args)

    def on_train_end(self, args, state, control, **kwargs):
        """Say how many steps were left out."""
        self.settle(args)
        if self.skipped:
            logger.warning("%s: left out %s of %d", self.stage, count_of(self.skipped, "step"), state.global_step)

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Refuse to save weights that are not finite. Every process has to call it.

        Args:
            model (`nn.Module`): What is to be saved.
            step (`int`): After which.

        Raises:
            FloatingPointError: If a weight or a buffer holds NaN or infinity.
        """
        advice = f"at step {step}, so it is not saved. Lower {self.stage}.learning_rate. Earlier checkpoints are kept."
        self._require_finite(model, advice)

    def check_loss(self, terms: LossTerms, loss: torch.Tensor, args: Any, step: int) -> None:
        """Check the loss after the last step, whose weights no later step has read. Every process has to call it.

        Raises:
            FloatingPointError: If it is not finite.
        """
        batch = _MicroBatch(self.last_inputs or {})
        self._taken = [batch]
        self.record(terms, loss)
        odd = torch.tensor(float(batch.is_odd()), device=loss.device)
        if bool(self._of_all(odd)):
            raise FloatingPointError(self._describe(_Step(step, [batch], None, odd), args, "After the last step, "))

    def _look(self, number: int, model: nn.Module, late: bool) -> _Step:
        norm = self.norm
        values = [value.float() for batch in self._taken for value in batch.values()]
        if self.accelerator.scaler is not None:
            norm = None  # infinite gradients are normal under fp16: the scaler leaves such a step out
        else:
            if norm is None:
                norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded parameters
            values.append(norm.float().to(self.accelerator.device))
        odd = self._of_all(1 - torch.isfinite(torch.stack(values)).all().float())
        step = _Step(number, self._taken, norm, odd)
        if late:
            step.odd = torch.empty((), pin_memory=True).copy_(odd, non_blocking=True)
            step.copied = torch.cuda.Event()
            step.copied.record()
        return step

    def _of_all(self, odd: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, so that all decide alike."""
        return self.accelerator.reduce(odd) if self.accelerator.num_processes > 1 else odd

    def settle(self, args: Any) -> None:
        """Read what the last step was, where that was put off."""
        step, self._waiting = self._waiting, None
        if step is None:
            return
        if step.is_odd():
            raise FloatingPointError(self._describe(step, args))
        self._keep(step)

    def _keep(self, step: _Step) -> None:
        self.skipped_in_a_row, self.last_inputs = 0, step.batches[-1].inputs
        for batch in step.batches:
            if batch.loss is not None:
                self.add(batch.terms, batch.loss)

    def _skip(self, step: _Step, args: Any, model: nn.Module, optimizer: Any) -> None:
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        told = self._describe(step, args)
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{self.skipped_in_a_row} steps in a row were left out; the last: {told}")
        logger.warning("Left out, step number %d of this kind: %s", self.skipped, told)
        if self.accelerator.scaler is None:  # which leaves the step out itself
            optimizer.zero_grad()
        buffers = dict(model.named_buffers())
        for name, kept in self._buffers.items():
            buffers[name].copy_(kept)

    def _describe(self, step: _Step, args: Any, prefix: str = "") -> str:
        """One line: the loss terms, the images, and what to do. The processes put their images together."""
        batch = next((one for one in step.batches if one.is_odd()), step.batches[-1])
        mine: dict[str, list[str]] = {"images": [], "odd": []}
        for one in step.batches:
            names = name_images(self.batches, one.inputs)
            mine["images"] += names
            mine["odd"] += odd_columns(one.inputs, names)
        found = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        images, odd = ([name for one in found for name in one[kind]] for kind in ("images", "odd"))
        what = "the loss"
        if not batch.is_odd() and step.norm is not None:
            what = f"the gradient (norm {float(step.norm)})"
        terms = ", ".join(_describe_term(name, *term) for name, term in batch.terms.items())
        advice = (
            f"Lower {self.stage}.learning_rate ({args.learning_rate:g}), raise the temperature of a softmax loss, or "
            f"clip gradients by max_grad_norm. {self.stage}.on_nonfinite skip leaves such steps out."
        )
        if odd:
            advice = (
                f"The data are the cause: {', '.join(odd[:3])} {'hold' if len(odd) > 1 else 'holds'} NaN or infinity. "
                "Correct these rows, or make the column again: delete the folder of the stage that wrote it."
            )
        shown = ", ".join(map(repr, images[:NAMED_IMAGES])) + (", ..." if len(images) > NAMED_IMAGES else "")
        return (
            f"{prefix}{self.stage}: {what} is not finite at step {step.number}: {terms} ({len(images)} images: "
            f"{shown}). {advice}"
        )

    def _require_finite(self, model: nn.Module, advice: str) -> None:
        names = nonfinite_weights(model)
        count = self._of_all(torch.tensor(float(len(names)), device=self.accelerator.device))
        if bool(count):
            raise FloatingPointError(f"{self.stage}: {_name_weights(names)} NaN or infinity {advice}")


def _describe_term(name: str, term: torch.Tensor, weight: float) -> str:
    told = f"{name} {float(term):.6g}"
    odd = torch.isfinite(term) and not torch.isfinite(weight * term)
    return f"{told} (weight {weight:g})" if odd else told


def _name_weights(names: list[str]) -> str:
    if not names:
        return "a weight of another process holds"
    if len(names) == 1:
        return f"{names[0]} holds"
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more weights' if len(names) > 3 else ''} hold"


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


@torch.no_grad()
def nonfinite_weights(model: nn.Module) -> list[str]:
    """The names of the parameters and buffers of a model that hold NaN or infinity. The device is waited for once."""
    named: Iterable[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: tensor for name, tensor in named if _is_float(tensor)}
    finite = [
        torch.isfinite(tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()).all()
        for tensor in tensors.values()
    ]
    if not finite:
        return []
    return [name for name, fine in zip(tensors, torch.stack(finite).tolist(), strict=True) if not fine]


def name_images(batches: Batches | ReinforcedBatches, inputs: Mapping[str, Any]) -> list[str]:
    """The ids of a batch's images, or the keys of its samples.

    Args:
        batches ([`Batches`] or [`ReinforcedBatches`]): What gave the batch.
        inputs (`Mapping`): The batch.
    """
    if isinstance(batches, Batches):
        return batches.names(inputs["image_ids"].tolist()) if "image_ids" in inputs else []
    return list(inputs.get("keys", []))


def odd_columns(inputs: Mapping[str, Any], names: list[str]) -> list[str]:
    """The columns of a batch that are not finite, each with the first such image.

    Args:
        inputs (`Mapping`): The batch.
        names (`list[str]`): Of its images.
    """
    told = []
    for column, values in inputs.items():
        if isinstance(values, torch.Tensor) and values.is_floating_point() and values.ndim:
            rows = (~torch.isfinite(values.flatten(1) if values.ndim > 1 else values[:, None]).all(dim=1)).nonzero()
            if len(rows):
                row = int(rows[0])
                told.append(f"{column} of image {names[row]!r}" if row < len(names) else f"{column} of row {row}")
    return told
