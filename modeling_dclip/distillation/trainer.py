"""The trainers of anchor, teacher, student and DM-CLIP: `transformers.Trainer` with named loss terms.

A loss is computed over the global batch: each process gathers the rows of all. With gradient accumulation the losses
of micro-batches are averaged; the negatives are those of one micro-batch over all processes.
"""

import copy
import logging
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SchedulerType, TrainOutput
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_dclip.data.collation import Batches, TokenizedStudentBatches, pass_batch
from modeling_dclip.data.failures import redact_values
from modeling_dclip.data.files import ARGUMENTS_NAME, read_json, write_json, write_text, writing
from modeling_dclip.data.reinforced import ReinforcedBatches
from modeling_dclip.distillation.adapters import load_adapters, plain_state, save_adapters
from modeling_dclip.distillation.arguments import (
    MEAN_RECALL,
    RECALLS,
    AnchorArguments,
    DMCLIPArguments,
    StageTrainingArguments,
    StudentArguments,
)
from modeling_dclip.distillation.checkpoints import (
    RunNotes,
    delete_old_checkpoints,
    last_checkpoint,
    read_notes,
    reading_checkpoint,
)
from modeling_dclip.distillation.guard import LossTerms, TrainingGuard
from modeling_dclip.distillation.losses import (
    FalseTexts,
    contrastive_loss,
    cosine_distillation_loss,
    cosine_preservation_loss,
    distillation_loss,
    gather_across_processes,
    sigmoid_contrastive_loss,
    similarity_distillation_loss,
)
from modeling_dclip.distillation.negatives import (
    HardBatches,
    Negatives,
    bank_contrastive_loss,
    bank_sigmoid_loss,
    bank_similarity_loss,
)
from modeling_dclip.distillation.probe import Probe, StudentProbe, describe_probe
from modeling_dclip.encoders.families import SIGMOID_TRAINED, image_modules, projected
from modeling_dclip.encoders.loading import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    DUAL_ENCODERS,
    load_checked,
    stays_float32,
)
from modeling_dclip.encoders.retrieval_ranks import metrics_from_ranks, retrieval_ranks
from modeling_dclip.encoders.saving import save_processor
from modeling_dclip.modeling_dmclip import DMCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor
from modeling_dclip.progress import LOG_EVERY_SECONDS, count_of

if TYPE_CHECKING:
    from peft import PeftModel

_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # schedules that ignore warmup_steps

logger = logging.getLogger(__name__)


class _TellEpoch(TrainerCallback):
    """Tells the training batches which epoch begins; the prepared data loader tells it on one process only.

    No worker is ahead of an epoch's end, because the loader asks for the next epoch after this call.
    """

    def __init__(self, batches: Batches | ReinforcedBatches):
        self.batches = batches

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.batches.set_epoch(math.floor(state.epoch or 0))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, of one file or of several with an index.

    Args:
        folder (`Path`): Of the checkpoint.

    Returns:
        `dict[str, torch.Tensor]`: By name, on the CPU.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return load_file(folder / SAFE_WEIGHTS_NAME)
    index = read_json(folder / SAFE_WEIGHTS_INDEX_NAME, "index of weights", ("weight_map",))
    files = sorted(set(index["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def _is_cast(name: str, tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not stays_float32(name)


def cast_weights(weights: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Weights in the type that a model is saved in. Integers and what every model keeps in float32 stay as they are.

    Args:
        weights (`Mapping[str, torch.Tensor]`): By name.
        dtype (`str`): `"float32"`, `"float16"` or `"bfloat16"`.

    Returns:
        `dict[str, torch.Tensor]`: In the same order; tensors of that type are not copied.

    Example:
        >>> cast = cast_weights({"weight": torch.ones(2), "logit_scale": torch.ones(())}, "float16")
        >>> cast["weight"].dtype, cast["logit_scale"].dtype
        (torch.float16, torch.float32)
    """
    kind = getattr(torch, dtype)
    return {name: tensor.to(kind) if _is_cast(name, tensor) else tensor for name, tensor in weights.items()}


@torch.no_grad()
def find_overflows(weights: Mapping[str, torch.Tensor], dtype: str) -> list[str]:
    """The weights that hold a number too large for a type, each with that number.

    Args:
        weights (`Mapping[str, torch.Tensor]`): By name.
        dtype (`str`): As for [`cast_weights`].

    Returns:
        `list[str]`

    Example:
        >>> find_overflows({"weight": torch.tensor([1.0, -7e4])}, "float16")
        ['weight (70000)']
    """
    found, kind = [], getattr(torch, dtype)
    for name, tensor in weights.items():
        local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of sharded training
        if _is_cast(name, local) and local.numel() and torch.isinf((largest := local.abs().max()).to(kind)):
            found.append(f"{name} ({float(largest):.6g})")
    return found


def require_fit(found: list[str], dtype: str, stage: str) -> None:
    """Refuse to save weights that a type would turn into infinity.

    Args:
        found (`list[str]`): Of [`find_overflows`].
        dtype (`str`): The type.
        stage (`str`): Whose `save_dtype` it is.

    Raises:
        ValueError: If there is one; the message names the first, and what to do.
    """
    if found:
        largest = torch.finfo(getattr(torch, dtype)).max
        others = [kind for kind in ("float32", "bfloat16") if kind != dtype]
        raise ValueError(
            f"{stage}: expected weights within +-{largest:.6g} to save them in {dtype}, got {len(found)} with larger "
            f"numbers, such as {found[0]}. Nothing was saved. Set {stage}.save_dtype to {' or '.join(others)}."
        )


def save_weights(model: PreTrainedModel, folder: Path, weights: Mapping[str, torch.Tensor], dtype: str) -> None:
    """Save a model's weights, config and code. The config says which type the weights have.

    Args:
        model (`PreTrainedModel`): Gives config and code; not changed.
        folder (`Path`): Where to.
        weights (`Mapping[str, torch.Tensor]`): The model's, by name.
        dtype (`str`): As for [`cast_weights`].
    """
    with writing(folder):
        model.save_pretrained(folder, state_dict=cast_weights(weights, dtype))
    if dtype != "float32":  # transformers writes the type of the first weight, the logit scale's
        config = read_json(folder / CONFIG_NAME, "configuration of a model")
        write_json(folder / CONFIG_NAME, config | {"dtype": dtype}, indent=2)


def warn_of_warm_up(args: StageTrainingArguments, stage: str, steps: int) -> None:
    """Warn of a warm-up that takes all steps of a stage; once a process, as a stage may be looked at before it runs.

    Args:
        args ([`StageTrainingArguments`]): The stage's section.
        stage (`str`): Its name.
        steps (`int`): How many it takes.
    """
    schedule = str(SchedulerType(args.lr_scheduler_type).value)
    if schedule not in _NO_WARMUP and args.get_warmup_steps(steps) >= steps:
        tell_long_warm_up(stage, float(args.warmup_steps), steps, float(args.learning_rate))


@cache
def tell_long_warm_up(stage: str, warmup_steps: float, steps: int, learning_rate: float) -> None:
    """Log what [`warn_of_warm_up`] found, unless this process has said just that before."""
    learns = "the one step has the rate 0, so nothing is learned" if steps == 1 else "the rate stays below it"
    logger.warning(
        "%s: warm-up (warmup_steps %g) takes all of the %s, before learning_rate %g is reached: %s. Set %s to 0, or "
        "train for more steps: raise num_train_epochs or lower per_device_train_batch_size.",
        *(stage, warmup_steps, count_of(steps, "step"), learning_rate, learns, f"{stage}.warmup_steps"),
    )


class _AllStepsTaken(Exception):
    """Leaves the loop of a run that resumes where nothing is left to train."""


class _StopAtLastStep(TrainerCallback):
    """Ends a run that resumes from its last step; the base class would begin an epoch and take one step more."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise _AllStepsTaken


class _StopAfterProbe(TrainerCallback):
    """Ends a run that resumes where a probe had ended its training."""

    def __init__(self, probing: StudentProbe):
        self.probing = probing

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.probing.failed(state) is not None:
            raise _AllStepsTaken


class _SaveAfterEpoch(TrainerCallback):
    """Puts a checkpoint of an epoch's last step off until the epoch has ended, with what is logged and measured then.

    A run that resumes from it begins with the next epoch, and would leave out these logs and measurements.

    Args:
        measured (`bool`): Save a checkpoint at each validation too, so that the best one is there in the end.
    """

    def __init__(self, measured: bool = False) -> None:
        self.measured, self.ends, self.is_due = measured, False, False

    def on_step_end(self, args, state, control, **kwargs):
        self.ends = control.should_training_stop or float(state.epoch or 0).is_integer()
        self.is_due = control.should_save and self.ends
        control.should_save &= not self.ends

    def on_evaluate(self, args, state, control, **kwargs):
        self.is_due |= self.measured and self.ends
        control.should_save |= self.measured and not self.ends

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.is_due
        self.ends = self.is_due = False


class _FindBest(TrainerCallback):
    """Finds the best checkpoint so far in the folder as it is called now: its name in a checkpoint is a whole path.

    The base class goes on without a best checkpoint where that path has gone.
    """

    def __init__(self, trainer: "BatchesTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed_from is None:
            return
        path = Path(self.trainer.resumed_from) / TRAINER_STATE_NAME
        if (stored := read_json(path, "state of the trainer", ()).get("best_model_checkpoint")) is None:
            return
        best = Path(args.output_dir) / Path(stored).name
        if args.load_best_model_at_end and not best.is_dir():
            raise ValueError(
                f"The best checkpoint so far, '{best}', is missing, so it cannot be loaded at the end. Put it back, "
                "or pass --overwrite true to make the stage again."
            )
        state.best_model_checkpoint = str(best)


class _TakeIntervals(TrainerCallback):
    """Lets a run that resumes log, validate and save as often as it is asked to now.

    The base class goes on as often as the checkpoint's run did, and warns where the two differ; it takes a share of
    the steps, as it is asked for, to differ from the steps that it came to.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


_INTERVALS_DIFFER = "The following arguments do not match the ones in the `trainer_state.json`"


@contextmanager
def _without_intervals_warning() -> Iterator[None]:
    """Leave out transformers' warning of other intervals in a checkpoint, as [`_TakeIntervals`] settles them."""

    def is_news(record: logging.LogRecord) -> bool:
        return _INTERVALS_DIFFER not in record.getMessage()

    source = logging.getLogger("transformers.trainer_utils")
    source.addFilter(is_news)
    try:
        yield
    finally:
        source.removeFilter(is_news)


class _ContinueLog(TrainerCallback):
    """Takes over what a checkpoint's run added up since its last log: the next log is a mean over all of its steps."""

    def __init__(self, trainer: "BatchesTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed_from is not None:
            self.trainer.continue_log(read_notes(Path(self.trainer.resumed_from)).get("log"))


@dataclass(frozen=True)
class ValidationSplit:
    """How the processes share the validation images.

    An in-batch loss grows with the batch, so that of validation is a mean over whole batches, as large as those of
    training. Images that are left over, fewer than a batch, are in no loss. If all images together are fewer than a
    batch, they are one smaller batch.

    Args:
        rows (`int`): Validation images.
        batch_size (`int`): Images per step and process.
        processes (`int`): Number of processes.
    """

    rows: int
    batch_size: int
    processes: int

    @property
    def fills_a_batch(self) -> bool:
        """Whether the images are enough for one whole batch over all processes."""
        return self.rows >= self.batch_size * self.processes

    @property
    def loss_rows(self) -> int:
        """How many images, the first ones, the loss is computed over."""
        step = self.processes * (self.batch_size if self.fills_a_batch else 1)
        return self.rows // step * step

    def loss_batches(self, process: int) -> list[list[int]]:
        """The rows of each batch of one process. All processes have as many.

        Example:
            >>> ValidationSplit(rows=10, batch_size=2, processes=2).loss_batches(process=1)
            [[2, 3], [6, 7]]
            >>> ValidationSplit(rows=5, batch_size=4, processes=2).loss_batches(process=1)
            [[2, 3]]
        """
        each = self.batch_size if self.fills_a_batch else self.rows // self.processes
        starts = range(process * each, self.loss_rows, each * self.processes) if each else ()
        return [list(range(start, start + each)) for start in starts]

    def shares(self, process: int, count: int) -> list[list[int]]:
        """All of `count` rows in batches, as many for each process; the first rows fill up the last process's.

        Example:
            >>> ValidationSplit(rows=5, batch_size=2, processes=2).shares(process=1, count=5)
            [[3, 4], [0]]
        """
        each = math.ceil(count / self.processes)
        rows = [row % count for row in range(process * each, (process + 1) * each)]
        return [rows[start : start + self.batch_size] for start in range(0, each, self.batch_size)]

    def __str__(self) -> str:
        images, step = count_of(self.rows, "image"), self.batch_size * self.processes
        if not self.fills_a_batch:
            return f"{images}, fewer than a batch: do not compare their loss with that of training"
        left = self.rows - self.loss_rows
        return images + (f", the loss over {self.loss_rows:,} of them, in batches of {step:,}" if left else "")


def _number(value: float) -> str:
    """A loss with three digits after the point; there is no -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def _describe_loss(logs: Mapping[str, Any]) -> str:
    """The loss of a training log with its terms: `1.701 (contrastive 1.084, cosine distillation 0.617)`."""
    terms = {name.removesuffix("_loss").replace("_", " "): value for name, value in logs.items() if "_loss" in name}
    named = ", ".join(f"{name} {_number(value)}" for name, value in terms.items())
    return _number(logs["loss"]) + (f" ({named})" if len(terms) > 1 else "")


def _describe_recalls(logs: Mapping[str, Any]) -> str:
    found = [100 * logs[f"eval_{name}"] for name in RECALLS]
    return f"R@1 {found[0]:.1f} % text to image, {found[1]:.1f} % image to text"


class _Narrator(ProgressCallback):
    """Says how training goes: one bar on a terminal, and in the log a line at each validation.

    In between it logs a loss at most every [`LOG_EVERY_SECONDS`]; the curves have them all.
    """

    training_bar: Any

    def __init__(self, stage: str, images: int | None, validation: ValidationSplit | None, shows_bar: bool):
        super().__init__()
        self.stage, self.images, self.validation, self.shows_bar = stage, images, validation, shows_bar
        self.said, self.loss = 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self._say(self._describe(args, state.max_steps))
        if state.is_world_process_zero and self.shows_bar:
            bar = {"total": state.max_steps, "initial": state.global_step, "desc": self.stage, "unit": "step"}
            self.training_bar = tqdm(**bar, dynamic_ncols=True, leave=False)

    def _describe(self, args: StageTrainingArguments, steps: int) -> str:
        """How much there is to train, and what the validation is."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        images = "" if self.images is None else f" on {count_of(self.images, 'image')}"
        validates = self.validation is not None and args.eval_strategy != IntervalStrategy.NO
        validation = f" Validation: {self.validation}." if validates else ""
        return f"trains{images} in {count_of(steps, 'step')} of {per_step:,}.{validation}"

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """No bar of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs, place = logs or {}, f"step {state.global_step:,} of {state.max_steps:,}, epoch {state.epoch or 0:.3g}"
        if "loss" in logs:
            self.loss = logs["loss"]
            if self.training_bar is not None:
                self.training_bar.set_postfix_str(f"loss {_number(self.loss)}", refresh=False)
            if time.monotonic() - self.said >= LOG_EVERY_SECONDS:
                self._say(f"{place}: loss {_describe_loss(logs)}")
        elif any(name.startswith("eval_") for name in logs):
            told = [] if self.loss is None else [f"loss {_number(self.loss)}"]
            told += [f"validation loss {_number(logs['eval_loss'])}"] if "eval_loss" in logs else []
            told += [_describe_recalls(logs)] if f"eval_{MEAN_RECALL}" in logs else []
            self._say(f"{place}: {', '.join(told)}")
            self.loss = None  # said once: a loss that was logged before an earlier validation is not this one's
        elif told_probe := describe_probe(logs):
            self._say(f"{place}: {told_probe}")

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        with tqdm.external_write_mode(file=sys.stderr):
            logger.info("%s: %s", self.stage, text)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


class BatchesTrainer(Trainer):
    """The base of all trainers: takes whole batches, and logs each term of the loss under its name.

    Args:
        model (`nn.Module`): What trains.
        args ([`StageTrainingArguments`]): The stage's section.
        train_batches ([`Batches`] or [`ReinforcedBatches`]): Training rows, or a stream of batches.
        processor ([`DCLIPProcessor`]): Saved beside the weights.
        resolved_arguments (`dict`): Saved beside the weights, in `arguments.yaml`.
        eval_batches ([`Batches`], *optional*): Validation rows.

    Raises:
        ValueError: If the rows do not fill one batch.
    """

    args: StageTrainingArguments
    saved_dtype = "float32"  # of every checkpoint, so that a resumed run goes on exactly

    def __init__(
        self,
        model: nn.Module,
        args: StageTrainingArguments,
        train_batches: Batches | ReinforcedBatches,
        processor: DCLIPProcessor,
        resolved_arguments: dict[str, Any],
        eval_batches: Batches | None = None,
    ):
        rows_per_step = args.train_batch_size * args.world_size
        counts_rows = isinstance(train_batches, Batches)  # a stream counts batches, and checks its samples
        if counts_rows and args.dataloader_drop_last and len(train_batches) < rows_per_step:
            raise ValueError(
                f"Expected at least one batch of {rows_per_step} rows ({args.world_size} processes), got "
                f"{len(train_batches)} rows. Lower {Path(args.output_dir).name}.per_device_train_batch_size."
            )
        self.validation = None
        if eval_batches is not None:
            self.validation = ValidationSplit(len(eval_batches), args.eval_batch_size, args.world_size)
        self.processor, self.resolved_arguments = processor, resolved_arguments
        # One process trains several stages, each maybe in another precision; accelerate would keep the first one's.
        AcceleratorState._reset_state()
        self._sums: dict[str, dict[str, torch.Tensor]] = {"": {}, "eval_": {}}
        self._counts = {"": 0, "eval_": 0}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_batches,
            eval_dataset=eval_batches,
            data_collator=pass_batch,
            callbacks=[_StopAtLastStep(), _TellEpoch(train_batches), _SaveAfterEpoch(args.load_best_model_at_end)],
        )
        stage = Path(args.output_dir).name
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        images = len(train_batches) if counts_rows else None
        bar = not args.disable_tqdm and sys.stderr.isatty()
        self.add_callback(_Narrator(stage, images, self.validation, bar))
        self.guard = TrainingGuard(self.accelerator, train_batches, stage, self._add_terms)
        self.add_callback(self.guard)
        self.add_callback(_TakeIntervals())
        self.add_callback(_ContinueLog(self))
        self.add_callback(_FindBest(self))
        self.resumed_from: str | None = None
        # The base class does not get the processor: it would write the tokenizer's special tokens into the model's
        # config. The loss is a mean over the micro-batch, so accumulation has to divide it, whatever `forward`
        # accepts.
        self.model_accepts_loss_kwargs = False

    def _refuse_reentrant_checkpoints(self) -> None:
        """Behind frozen weights reentrant checkpointing gives no gradient to a layer, with a warning of PyTorch."""
        args = self.args
        options = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        if args.gradient_checkpointing and options.get("use_reentrant") and frozen:
            raise ValueError(
                f"gradient_checkpointing_kwargs: expected use_reentrant false beside frozen weights ({len(frozen)} "
                f"tensors, such as {frozen[0]}), got true: layers behind them would get no gradient. Leave it out."
            )

    def loss_terms(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> LossTerms:
        """The terms of a batch's loss.

        Args:
            model (`nn.Module`): What trains, wrapped for the device and the processes.
            batch (`dict[str, torch.Tensor]`): One process's rows; the method may change the dictionary.

        Returns:
            `dict[str, tuple[torch.Tensor, float]]`: Loss `()` and weight by name; the same numbers on every process.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its loss.")

    def model_to_save(self) -> PreTrainedModel:
        """The model that a checkpoint holds."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def train(self, *args, **kwargs):
        """As the base class; a checkpoint at the last step is loaded, and no step is taken.

        Raises:
            ValueError: If reentrant checkpointing is asked for and a weight is frozen.
        """
        self._refuse_reentrant_checkpoints()
        self.resumed_from = kwargs.get("resume_from_checkpoint")
        try:
            with _without_intervals_warning():
                return super().train(*args, **kwargs)
        except _AllStepsTaken:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            return TrainOutput(self.state.global_step, 0.0, {})

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As the base class; a warm-up that takes all steps is told."""
        warn_of_warm_up(self.args, self.guard.stage, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def describe_best(self) -> None:
        """Log which step's weights were kept, if a validation chose them."""
        state, step = self.state, self.state.best_global_step
        if not self.args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        measured = [log for log in state.log_history if any(name.startswith("eval_") for name in log)]
        kept = next((log for log in measured if log["step"] == step), {})
        name = self.args.metric_for_best_model
        found = f"{name} {_number(state.best_metric)}"
        if name == MEAN_RECALL and f"eval_{name}" in kept:
            found = f"mean {_describe_recalls(kept)}"
        if (alpha := getattr(self.args, "wise_ft_alpha", 1)) < 1:
            found += f", measured before its weights are averaged with the anchor's (wise_ft_alpha {alpha:g})"
        logger.info(
            "%s: kept step %s of %s, the best of %s by %s. No test image had a say.",
            *(self.guard.stage, f"{step:,}", f"{state.global_step:,}", count_of(len(measured), "validation"), found),
        )

    def _determine_best_metric(self, metrics, trial):
        """As the base class; of equal validations that with the lowest loss is the best."""
        if super()._determine_best_metric(metrics, trial):
            return True
        state, name = self.state, f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if state.best_global_step is None or metrics.get(name) != state.best_metric:
            return False
        losses = {log["step"]: log["eval_loss"] for log in state.log_history if "eval_loss" in log}
        is_new = metrics.get("eval_loss", math.inf) < losses.get(state.best_global_step, -math.inf)
        if is_new:
            state.best_global_step = state.global_step
        return is_new

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of the terms. Each term is added up for the log."""
        terms = self.loss_terms(model, dict(inputs))
        loss: Any = sum(weight * term for term, weight in terms.values())
        if model.training:
            self.guard.record(terms, loss)
        else:
            self._add_terms(terms, loss, "eval_")
        return (loss, {}) if return_outputs else loss

    def _add_terms(self, terms: LossTerms, loss: torch.Tensor, prefix: str = "") -> None:
        """Add the terms of a batch up for the log."""
        sums = self._sums[prefix]
        for name, term in {"loss": loss, **{name: term for name, (term, _) in terms.items()}}.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach().clone()
        self._counts[prefix] += 1

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the base class, under the guard. The logged loss is a sum that one NaN would spoil for good."""
        self.guard.begin(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        return loss.nan_to_num(0.0, 0.0, 0.0) if self.args.on_nonfinite == "skip" else loss

    def _clip_grad_norm(self, model):
        """As the base class; the guard looks at the norm."""
        self.guard.norm = super()._clip_grad_norm(model)
        return self.guard.norm

    def _get_grad_norm(self, model, grad_norm=None):
        """As the base class, which computes the norm here where gradients are not clipped."""
        self.guard.norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.guard.norm

    def save_model(self, output_dir=None, _internal_call=False):
        """As the base class; weights that are not finite are never saved.

        Raises:
            FloatingPointError: If a weight is NaN or infinite. Nothing is written.
        """
        self.guard.check_weights(self.model_to_save(), self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def save_result(self, dtype: str) -> None:
        """Save the model after training in the stage's own folder.

        Args:
            dtype (`str`): Of the saved weights: `"float32"`, `"float16"` or `"bfloat16"`. Logit scales stay float32,
                and so does the model in memory.

        Raises:
            FloatingPointError: If a weight is NaN or infinite. Nothing is written.
            ValueError: If a weight is too large for the type. Nothing is written.
        """
        if dtype != "float32":
            self._check_fits(dtype)
        self.saved_dtype = dtype
        self.save_model()
        self.saved_dtype = "float32"

    def _check_fits(self, dtype: str) -> None:
        """Raise in every process if a weight of one is too large for the type that it would be saved in."""
        found = find_overflows(self._weights_to_save(None), dtype)
        found = gather_object(found) if self.args.world_size > 1 else found
        require_fit(found, dtype, self.guard.stage)

    def check_result(self) -> None:
        """Compute the loss of the last batch once more, after the last step.

        Raises:
            FloatingPointError: If it is not finite.
        """
        if (inputs := self.guard.last_inputs) is None:
            return
        model = self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            terms = self.loss_terms(model, dict(self._prepare_inputs(inputs)))
            loss: Any = sum(weight * term for term, weight in terms.values())
        model.train()
        self.guard.check_loss(terms, loss, self.args, self.state.global_step)

    def get_eval_dataloader(self, eval_dataset=None):
        """This process's share of the validation batches whose loss counts ([`ValidationSplit`])."""
        return self._validation_loader(self.validation.loss_batches(self.args.process_index))

    def _validation_loader(self, batches: list[list[int]]) -> DataLoader:
        """These rows of the validation images, a batch for each list.

        It is not prepared by accelerate, as it is split between processes already. Its generator keeps the draw of a
        loader's seed away from training, so that validation changes no weight.
        """
        return DataLoader(
            self.eval_dataset,
            batch_sampler=batches,
            collate_fn=pass_batch,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            generator=torch.Generator(),
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As the base class, with the mean of the batches' losses and with [`measure`]."""
        self._sums["eval_"], self._counts["eval_"] = {}, 0
        output: Any = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        if count := self._counts["eval_"]:
            output.metrics[f"{metric_key_prefix}_loss"] = float(self._sums["eval_"]["loss"]) / count
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()})
        return output

    def measure(self) -> dict[str, float]:
        """What a validation measures besides the loss, by name; the same in every process."""
        return {}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss only: there are no labels, and predictions are left to evaluation."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs, start_time=None):
        """Log the mean of each term since the last log, too.

        Raises:
            FloatingPointError: If a term is NaN or infinite.
        """
        if self.guard.skipped and "loss" in logs:
            self._log_without_skipped(logs)
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in logs and self._counts[prefix]:
                means = {name: float(total) / self._counts[prefix] for name, total in self._sums[prefix].items()}
                self._sums[prefix], self._counts[prefix] = {}, 0
                del means["loss"]  # the base class has it
                for name, mean in means.items():
                    if not math.isfinite(mean):
                        raise FloatingPointError(
                            f"{Path(self.args.output_dir).name}: {prefix}{name} is {mean} at step "
                            f"{self.state.global_step}. Lower learning_rate, raise the temperature of a softmax "
                            "loss, or look for NaN in the rows."
                        )
                    logs[f"{prefix}{name}"] = mean
        super().log(logs, start_time)

    def _open_log(self) -> dict[str, Any] | None:
        """What was added up since the last log, as plain numbers; `None` before training."""
        if not hasattr(self, "_tr_loss"):
            return None
        return {
            "last_step": self._globalstep_last_logged,
            "loss": float(self._tr_loss),
            "batches": self._counts[""],
            "terms": {name: float(total) for name, total in self._sums[""].items()},
            "skipped": self.guard.skipped,
        }

    def continue_log(self, log: dict[str, Any] | None) -> None:
        """Go on with what a checkpoint's run had added up.

        Args:
            log (`dict`, *optional*): From its notes; earlier versions wrote none.
        """
        if log is None:
            return
        with reading_checkpoint(str(self.resumed_from)):
            self._globalstep_last_logged = int(log["last_step"])
            self._tr_loss += float(log["loss"])
            self._counts[""] = int(log["batches"])
            device = self.args.device
            self._sums[""] = {name: torch.tensor(float(total), device=device) for name, total in log["terms"].items()}
            self.guard.skipped = int(log["skipped"])

    def _log_without_skipped(self, logs: dict[str, Any]) -> None:
        """Log the mean loss of the steps that were kept; none if all since the last log were left out."""
        logs["skipped_steps"] = self.guard.skipped
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]
        if self._counts[""]:
            logs["loss"] = float(self._sums[""]["loss"]) / self._counts[""]
        else:
            del logs["loss"]

    def floating_point_ops(self, inputs):
        """0: they are not counted. The base class would visit every parameter in every step."""
        return 0

    def get_decay_parameter_names(self, model):
        """Matrices only, as for CLIP: no decay of gains, biases, the logit scale and a module's `no_weight_decay`."""
        spared = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            for name in getattr(module, "no_weight_decay", ())
        }
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2 and name not in spared]

    @property
    def resumed_weights(self) -> str:
        """The file in a checkpoint whose weights a resumed run loads; empty if a sharded run has its own format."""
        return "" if self.is_fsdp_enabled else SAFE_WEIGHTS_NAME

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """All weights from a checkpoint; the base class would leave a missing one as it is, with a warning."""
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with reading_checkpoint(resume_from_checkpoint):
            self._take_weights(self._read_weights(Path(resume_from_checkpoint)))

    def _load_best_model(self):
        """As for resuming: the base class would go on without a word if the weights were missing."""
        if self.is_fsdp_enabled:
            return super()._load_best_model()
        return self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _read_weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """The weights in a checkpoint by the names that they have in the model."""
        return load_weights(folder)

    def _take_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load the weights of a checkpoint into what trains."""
        self.model.load_state_dict(weights)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As the base class; an error names the checkpoint."""
        with reading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        """As the base class; an error names the checkpoint."""
        with reading_checkpoint(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        """As the base class; an error names the checkpoint."""
        with reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir=None, state_dict=None):
        """Weights, config, code, processor and resolved arguments; no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_weights(self.model_to_save(), folder, self._weights_to_save(state_dict), self.saved_dtype)
        self.save_beside(folder)
        if folder != Path(self.args.output_dir):
            RunNotes.current(Path(self.args.output_dir), self.args.world_size, self._open_log()).write(folder)

    def _save_checkpoint(self, model, trial):
        """Save as the base class, if the loss after the last step is finite. An error names a folder that is full.

        Old checkpoints are deleted here: the base class would delete any folder called `checkpoint-NAME`.
        """
        self.guard.check_weights(self.model_to_save(), self.state.global_step)
        self.check_result()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with writing(self.args.output_dir):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if limit is not None and self.args.should_save:
            delete_old_checkpoints(
                Path(self.args.output_dir), limit, self.state.global_step, self.state.best_model_checkpoint
            )

    def save_beside(self, folder: Path) -> None:
        """Save what belongs beside the weights: the processor and the resolved arguments.

        Args:
            folder (`Path`): Of the model or the checkpoint.
        """
        if self.processor.tokenizer.is_fast:  # it keeps how the last batch was cut; a resumed run may have had none
            self.processor.tokenizer.backend_tokenizer.no_truncation()
            self.processor.tokenizer.backend_tokenizer.no_padding()
        with writing(folder):
            save_processor(self.model_to_save(), self.processor, folder)
        write_text(folder / ARGUMENTS_NAME, yaml.safe_dump(redact_values(self.resolved_arguments), sort_keys=False))

    def _weights_to_save(self, state_dict):
        """By default those that the base class hands over, or else the model's own."""
        return self.model_to_save().state_dict() if state_dict is None else state_dict


class TeacherTrainer(BatchesTrainer):
    """Trains the teacher's block towards the frozen CLIP's sentence embedding, from precomputed features.

    Source: [D] teacher loss; docs/papers.md. Deviation: none.
    """

    def loss_terms(self, model, batch):
        """Symmetric InfoNCE between teacher and text embeddings over the global batch."""
        image_ids = batch.pop("image_ids")
        outputs = model(**batch, return_loss=False)
        teacher_embeds, text_embeds, image_ids = gather_across_processes(
            outputs.teacher_embeds, outputs.text_embeds, image_ids
        )
        temperature = self.model.config.loss_temperature
        return {"contrastive_loss": (contrastive_loss(teacher_embeds, text_embeds, temperature, 0.5, image_ids), 1.0)}


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ImageSide(nn.Module):
    """The image encoder of a dual encoder as a module of its own: what images pass and texts do not, of any family.

    Args:
        model ([`~modeling_dclip.encoders.DualEncoder`]): The dual encoder. Its parameters are shared, not copied, and
            keep their names.
    """

    def __init__(self, model: Any):
        super().__init__()
        for name in image_modules(model):
            self.add_module(name.rstrip("."), getattr(model, name.rstrip(".")))
        classes = {type(module).__name__ for module in self.modules()}
        layers = {name for child in self.children() for name in getattr(child, "_no_split_modules", None) or ()}
        self._no_split_modules = sorted(layers & classes)  # where sharded training cuts
        self._get_image_features = model.get_image_features  # as a method, so that the text encoder is no child
        self.train(model.training)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed images `(B, 3, H, W)`: `(B, D)`, not normalised."""
        return projected(self._get_image_features(pixel_values=pixel_values))

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """As of a model of transformers: compute activations again in the backward pass."""
        vision_model: Any = self.vision_model
        vision_model.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """The name of the method above in earlier versions of transformers."""
        vision_model: Any = self.vision_model
        vision_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)


_LAYER = re.compile(r"\.(?:layers?|blocks|stages|levels)\.([0-9]+)\.")


def layer_rates(model: nn.Module, decay: float) -> dict[str, float]:
    """The share of the learning rate of each parameter: the layers' one `decay` less from one to the next below.

    Source: layer-wise learning-rate decay, "ELECTRA", arXiv 2003.10555; docs/papers.md. Deviation: none.

    Args:
        model (`nn.Module`): Its parameters come in the order in which images pass them: before the first layer those
            of the lowest rate, after the last one those of the full rate.
        decay (`float`): In (0, 1].

    Returns:
        `dict[str, float]`: By the parameter's name.

    Example:
        >>> patch, head, *layers = (nn.Linear(1, 1, bias=False) for _ in range(4))
        >>> layer_rates(nn.ModuleDict({"patch": patch, "layers": nn.ModuleList(layers), "head": head}), 0.5)
        {'patch.weight': 0.125, 'layers.0.weight': 0.25, 'layers.1.weight': 0.5, 'head.weight': 1.0}
    """
    names = [name for name, _ in model.named_parameters()]
    found = [_LAYER.search(f".{name}") for name in names]
    layers = [int(match[1]) for match in found if match is not None]
    if not layers:
        return dict.fromkeys(names, 1.0)
    first, top = next(place for place, match in enumerate(found) if match is not None), max(layers) + 2
    heights = [int(match[1]) + 1 if match else 0 if place < first else top for place, match in enumerate(found)]
    return {name: decay ** (top - height) for name, height in zip(names, heights, strict=True)}


class Embeds(NamedTuple):
    """Embeddings `(B, D)` and `(T, D)` of a batch's images and texts."""

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor


def run_in_micro_batches(model: nn.Module, size: int) -> None:
    """Let a model embed a batch in micro-batches while it trains, as if it were one.

    Between forward and backward pass each keeps its embeddings only, and the last one its activations. The backward
    pass computes the others' anew, with the random numbers of the first time. So a contrastive loss sees the whole
    batch in the memory of a micro-batch, for about a quarter more time. BatchNorm that trains sees a micro-batch, and
    takes it into its running statistics once.

    Source: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983 [GradCache];
    docs/papers.md. Deviation: by non-reentrant checkpoints, so that autograd adds the gradients up.

    Args:
        model (`nn.Module`): Its `forward` takes tensors by name and returns embeddings, or an output with
            `image_embeds` and `text_embeds`. Changed in place: the method of this one object.
        size (`int`): Images at a time.
    """
    whole, norms = model.forward, [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    norms = [norm for norm in norms if norm.num_batches_tracked is not None]

    @contextmanager
    def without_statistics() -> Iterator[None]:
        taken = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        try:
            for norm in norms:
                norm.momentum = 0.0
            yield
        finally:
            for norm, (momentum, count) in zip(norms, taken, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), without_statistics()

    def embed(**inputs: torch.Tensor) -> torch.Tensor | Embeds:
        found = whole(**inputs)
        return found if isinstance(found, torch.Tensor) else Embeds(found.image_embeds, found.text_embeds)

    def forward(**inputs: torch.Tensor) -> torch.Tensor | Embeds:
        count = -(-len(inputs["pixel_values"]) // size)
        if count < 2 or not torch.is_grad_enabled() or not model.training:
            return embed(**inputs)
        parts = zip(*(tensor.tensor_split(count) for tensor in inputs.values()), strict=True)
        batches = [dict(zip(inputs, part, strict=True)) for part in parts]
        found = [checkpoint(embed, **one, use_reentrant=False, context_fn=contexts) for one in batches[:-1]]
        found.append(embed(**batches[-1]))
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)
        return Embeds(*map(torch.cat, zip(*found, strict=True)))

    model.forward = forward


def choose_contrastive_loss(asked: str, config: Any) -> str:
    """Choose the contrastive loss of a student.

    Args:
        asked (`str`): `"softmax"`, `"sigmoid"`, or `"auto"` for the one that the family was trained with.
        config (`PreTrainedConfig`): Of the dual encoder.

    Returns:
        `str`: `"softmax"` or `"sigmoid"`.

    Raises:
        ValueError: If the sigmoid loss is asked for and the model holds no bias for it.
    """
    own = "sigmoid" if config.model_type in SIGMOID_TRAINED else "softmax"
    if asked == "sigmoid" != own:
        raise ValueError(
            f"contrastive_loss: expected softmax or auto for a model of type {config.model_type!r}, got sigmoid. That "
            f"loss needs the trained logit_bias of a model of type {' or '.join(SIGMOID_TRAINED)}. Leave it out."
        )
    return own if asked == "auto" else asked


def _false_texts(columns: Mapping[str, torch.Tensor]) -> FalseTexts | None:
    if "negative_embeds" not in columns:
        return None
    return FalseTexts(columns["negative_embeds"], columns["negative_mask"])


class StudentTrainer(BatchesTrainer):
    """Trains the image encoder of a dual encoder from stored targets: no text tower and no teacher in the step.

    Checkpoints hold the whole dual encoder. The optimiser gets nothing of its text tower, except an adapter in it.
    With adapters a checkpoint holds the merged weights, and beside them the adapter. A resumed run loads the latter.

    Source: [D] student loss; docs/papers.md. Deviation: relational term and direction weights, off by default; the
    contrastive term of a family that was trained with the sigmoid loss is that one.

    Args:
        model (`PreTrainedModel`): A dual encoder of any family, from
            [`~modeling_dclip.distillation.run.load_student`]. Its image side trains, in place; with `args.lora_text`
            the adapters of both towers. BatchNorm keeps its running statistics, and normalises by them.
        adapters (`peft.PeftModel`, *optional*): Around it, from
            [`~modeling_dclip.distillation.adapters.add_adapters`].
        probe ([`~modeling_dclip.distillation.probe.Probe`], *optional*): Measures the benchmarks of `args.probe`.
        args ([`StudentArguments`]): Losses and optimiser.
        train_batches, processor, resolved_arguments, eval_batches: As for [`BatchesTrainer`].

    Raises:
        ValueError: If adapters are trained with FSDP, the rows do not fill one batch, the model has no bias for a
            sigmoid loss, or `args` names benchmarks and nothing measures them.
    """

    args: StudentArguments

    def __init__(
        self,
        model: Any,
        args: StudentArguments,
        train_batches: Batches,
        processor: DCLIPProcessor,
        resolved_arguments: dict[str, Any],
        eval_batches: Batches | None = None,
        adapters: "PeftModel | None" = None,
        probe: Probe | None = None,
    ):
        self.dual_encoder, self.adapters = model, adapters
        self._sigmoid: tuple[float, float] | None = None  # scale and bias, which stay as they are
        if choose_contrastive_loss(args.contrastive_loss, model.config) == "sigmoid":
            self._sigmoid = float(model.logit_scale.detach()), float(model.logit_bias.detach())
        trained = model if args.lora_text else ImageSide(model)
        self._start = {}
        if args.l2_sp_loss_weight:
            self._start = {name: tensor.detach().clone() for name, tensor in trained.named_parameters()}
        if args.micro_batch_size is not None:
            run_in_micro_batches(trained, args.micro_batch_size)
        super().__init__(trained, args, train_batches, processor, resolved_arguments, eval_batches)
        self._batch_norms = [module for module in trained.modules() if isinstance(module, BATCH_NORMS)]
        self.negatives: Negatives | None = None
        if args.negatives == "bank":
            all_rows: Any = train_batches
            self.negatives = Negatives(all_rows, args.device, args.bank_limit, args.max_negative_similarity)
        self.average: WeightAverage | None = None
        if args.ema_decay is not None:
            self.average = WeightAverage(trained, args.ema_decay)
            self.add_callback(self.average)
        self.probing: StudentProbe | None = None
        if args.probe:
            self._add_probe(probe)
        readable: Any = eval_batches
        if eval_batches is not None and args.load_best_model_at_end and "text_embeds" not in readable.columns:
            if str(args.metric_for_best_model).removeprefix("eval_") in (MEAN_RECALL, *RECALLS):
                raise ValueError(
                    "load_best_model_at_end: expected text_embeds among the columns of the validation images, which "
                    f"retrieval is measured against, got {list(readable.columns)}."
                )
        if adapters is not None and self.is_fsdp_enabled:
            raise ValueError(
                "lora_rank: expected data-parallel training, got FSDP. Adapters are small, so launch without FSDP."
            )
        by_weights = args.l2_sp_loss_weight or args.layer_decay < 1 or args.ema_decay is not None
        if by_weights and self.is_fsdp_enabled:
            raise ValueError(
                "l2_sp_loss_weight, layer_decay, ema_decay: expected data-parallel training, got FSDP, which flattens "
                "the weights. Leave them out, or launch without FSDP."
            )

    def _add_probe(self, probe: Probe | None) -> None:
        """Measure benchmarks on the way, after each step of the average and before anything is saved."""
        if probe is None:
            raise ValueError(
                "student.probe: expected something that measures benchmarks beside it, got none. Train with train.py, "
                "or pass what modeling_dclip.evaluation.evaluator.Probes opens."
            )
        if self.is_fsdp_enabled:
            raise ValueError(
                "student.probe: expected data-parallel training, got FSDP, in which no process has the whole model. "
                "Leave probe, keep_retention and wise_ft_rule out, or launch without FSDP."
            )
        self.probing = StudentProbe(self, probe)
        self.add_callback(self.probing)
        self.add_callback(_StopAfterProbe(self.probing))
        self.add_callback(self.pop_callback(_SaveAfterEpoch))  # a probe may end the training

    def model_to_save(self) -> PreTrainedModel:
        """The dual encoder that holds the image encoder."""
        return self.dual_encoder

    def loss_terms(self, model, batch):
        """Every term whose weight is not 0, over the global batch; the in-batch terms over its rows with a caption."""
        inputs = {name: batch.pop(name) for name in ("pixel_values", "input_ids", "attention_mask") if name in batch}
        for norm in self._batch_norms:  # each step begins with `train()` of the whole model
            norm.eval()
        outputs = model(**inputs)
        image_embeds = outputs
        if "input_ids" in inputs:
            image_embeds, batch["student_text_embeds"] = outputs.image_embeds, outputs.text_embeds
        image_embeds, *gathered = gather_across_processes(image_embeds, *batch.values())
        columns = dict(zip(batch, gathered, strict=True))
        args, terms = self.args, {}
        if args.cosine_distillation_loss_weight:
            terms["cosine_distillation_loss"] = cosine_distillation_loss(image_embeds, columns["teacher_embeds"])
        if args.cosine_preservation_loss_weight:
            terms["cosine_preservation_loss"] = cosine_preservation_loss(image_embeds, columns["anchor_embeds"])
        if self._start:
            terms["l2_sp_loss"] = self._distance_to_start()
        if self.negatives is not None and model.training:
            self.negatives.remember(columns["image_ids"], image_embeds)
        if (mask := columns.pop("caption_mask", None)) is not None:
            image_embeds, columns = image_embeds[mask], {name: column[mask] for name, column in columns.items()}
        terms |= self._in_batch_terms(image_embeds, columns)
        return {name: (term, getattr(args, f"{name}_weight")) for name, term in terms.items()}

    def train(self, *args, **kwargs):
        """As the base class; with `ema_decay` the model ends as the average, of the step whose weights are kept; with
        `keep_retention` as it was at the last probe that held.
        """
        output = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.put_in()
        if self.probing is not None:
            self.probing.keep_last_held()
        return output

    def describe_best(self) -> None:
        """As the base class, unless the weights of a probe were kept."""
        if self.probing is None or not self.probing.is_kept():
            super().describe_best()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average in the weights' place meanwhile, where there is one."""
        if self.average is None or not self.average.average:  # before the first step
            yield
            return
        taken = self.average.put_in()
        try:
            yield
        finally:
            self.average.put_back(taken)

    def evaluation_loop(self, *args, **kwargs):
        """As the base class, of the average where there is one."""
        with self.averaged():
            return super().evaluation_loop(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        """As the base class; with `batch_order: hard` images that are near each other come together."""
        if self.args.batch_order == "random":
            return super()._get_train_sampler(train_dataset)
        return HardBatches(self.train_dataset, self.args.train_batch_size * self.args.world_size)

    def _distance_to_start(self) -> torch.Tensor:
        """Half the squared distance of the trained weights to the anchor's.

        Source: "Explicit Inductive Bias for Transfer Learning", arXiv 1802.01483 [L2SP]; docs/papers.md. Deviation: no
        term for new weights, because a student has none.
        """
        distances = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                start = self._start[name] = self._start[name].to(parameter.device)
                distances.append((parameter.float() - start).square().sum())
        return 0.5 * torch.stack(distances).sum()

    def create_optimizer(self, *args, **kwargs):
        """As the base class; with `layer_decay` each layer has a rate of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.layer_decay < 1:
            rates = layer_rates(self.model, self.args.layer_decay)
            share = {id(parameter): rates[name] for name, parameter in self.model.named_parameters()}
            groups = []
            for group in optimizer.param_groups:
                for rate in sorted({share[id(one)] for one in group["params"]}, reverse=True):
                    parameters = [one for one in group["params"] if share[id(one)] == rate]
                    groups.append({**group, "params": parameters, "lr": rate * group["lr"]})
            groups.sort(key=lambda group: -group["lr"])  # the first one's is logged
            optimizer.param_groups[:] = groups
        return optimizer

    def _in_batch_terms(self, image_embeds: torch.Tensor, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The terms that compare each image with every text of these rows. They are 0, with a gradient, if there are
        fewer than two rows.
        """
        args, stored, false_texts = self.args, columns.get("text_embeds"), _false_texts(columns)
        texts = columns.get("student_text_embeds", stored)
        names = [
            name for name in ("contrastive_loss", "similarity_distillation_loss") if getattr(args, f"{name}_weight")
        ]
        if len(image_embeds) < (2 if self.negatives is None else 1):
            return {name: 0.0 * image_embeds.float().sum() for name in names}
        if self.negatives is not None:
            return self._bank_terms(self.negatives, names, image_embeds, columns)
        terms = {}
        if "contrastive_loss" in names and self._sigmoid is not None:
            terms["contrastive_loss"] = sigmoid_contrastive_loss(
                image_embeds, texts, *self._sigmoid, columns["image_ids"], false_texts
            )
        elif "contrastive_loss" in names:
            terms["contrastive_loss"] = contrastive_loss(
                image_embeds, texts, args.temperature, args.image_to_text_weight, columns["image_ids"], false_texts
            )
        if "similarity_distillation_loss" in names:
            temperatures = args.similarity_temperature, args.similarity_teacher_temperature
            terms["similarity_distillation_loss"] = similarity_distillation_loss(
                image_embeds, columns["teacher_embeds"], texts, stored, *temperatures, args.image_to_text_weight
            )
        return terms

    def _bank_terms(
        self, negatives: Negatives, names: list[str], image_embeds: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The same terms against all texts and images of the training set; validation rows are none of them."""
        args, texts, terms = self.args, columns["text_embeds"], {}
        step = negatives.find(columns["image_ids"], columns.get("caption_ids"), texts)
        banks, share = (negatives.texts, negatives.images), args.image_to_text_weight
        more: dict[str, Any] = {"false_texts": _false_texts(columns)}
        if "contrastive_loss" in names and self._sigmoid is not None:
            terms["contrastive_loss"] = bank_sigmoid_loss(
                image_embeds, texts, negatives.texts, step.texts, *self._sigmoid, **more
            )
        elif "contrastive_loss" in names:
            more |= {"temperature": args.temperature, "image_to_text_weight": share, "right": step.right}
            terms["contrastive_loss"] = bank_contrastive_loss(
                image_embeds, texts, banks, (step.texts, step.images), **more
            )
        if negatives.teacher is not None and "similarity_distillation_loss" in names:
            of_teacher = args.similarity_teacher_temperature or args.similarity_temperature
            terms["similarity_distillation_loss"] = bank_similarity_loss(
                *(image_embeds, columns["teacher_embeds"], texts),
                (*banks, negatives.teacher),
                step.batch_images,
                temperatures=(args.similarity_temperature, of_teacher),
                image_to_text_weight=share,
            )
        return terms

    @torch.no_grad()
    def measure(self):
        """R@1 of retrieval in both directions over all validation images, and their mean.

        Captions have the frozen text embeddings that are stored; with an adapter in the text tower they are embedded
        anew.
        """
        batches: Any = self.eval_dataset
        if "text_embeds" not in batches.columns:
            return {}
        index, split = self.args.process_index, self.validation
        images = self._gather_shares(
            (self._embed_images(batch) for batch in self._validation_loader(split.shares(index, len(batches)))),
            len(batches),
        )
        stored = batches.columns["text_embeds"]
        texts = torch.tensor(stored.values, device=images.device)
        if isinstance(batches, TokenizedStudentBatches):
            shares = split.shares(index, len(texts))
            texts = self._gather_shares((self._embed_captions(batches, rows) for rows in shares), len(texts))
        owners = torch.repeat_interleave(torch.arange(len(batches)), torch.tensor(stored.lengths))
        if not torch.isfinite(images).all() or not torch.isfinite(texts).all():
            raise FloatingPointError(
                f"{self.guard.stage}: an embedding of a validation image or caption is NaN or infinite at step "
                f"{self.state.global_step}. Lower {self.guard.stage}.learning_rate."
            )
        found = metrics_from_ranks(retrieval_ranks(images, texts, owners.to(images.device)), ks=(1,))
        recalls = {name: found[name] for name in RECALLS}
        return broadcast_object_list([recalls | {MEAN_RECALL: sum(recalls.values()) / 2}])[0]

    def _embed_images(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        model: Any = self.model
        pixel_values = self._prepare_inputs(batch)["pixel_values"]
        with self.compute_loss_context_manager():
            if self.args.lora_text:
                return projected(model.get_image_features(pixel_values=pixel_values))
            return model(pixel_values=pixel_values)

    def _embed_captions(self, batches: TokenizedStudentBatches, rows: list[int]) -> torch.Tensor:
        model: Any = self.model
        inputs = self._prepare_inputs(batches.read_tokens(np.array(rows)))
        with self.compute_loss_context_manager():
            return projected(model.get_text_features(**inputs))

    def _gather_shares(self, embeds: Iterable[torch.Tensor], count: int) -> torch.Tensor:
        """The shares of all processes as one tensor `(count, D)`, float32, without the rows that filled up."""
        return self.accelerator.gather(torch.cat([part.float() for part in embeds]))[:count]

    def _save(self, output_dir=None, state_dict=None):
        """Save as the base class, and the adapter, and in a checkpoint bank and average. In the saved config the
        text tower is frozen, even if an adapter trained it.
        """
        config = self.dual_encoder.config
        if hasattr(config, "freeze_text"):  # of this package's models; others keep their own format
            freeze_text, config.freeze_text = config.freeze_text, True
            super()._save(output_dir, state_dict)
            config.freeze_text = freeze_text
        else:
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.adapters is not None and self.args.should_save:
            save_adapters(self.adapters, folder)
        if self.args.should_save and folder != Path(self.args.output_dir):
            for part in (self.negatives, self.average, self.probing):
                if part is not None:
                    part.save(folder)

    def _weights_to_save(self, state_dict):
        """The dual encoder's weights, with those that sharded training hands over, or with adapters merged in."""
        if self.adapters is not None:
            return plain_state(self.dual_encoder, merged=True)
        return self.dual_encoder.state_dict() | (state_dict or {})

    @property
    def resumed_weights(self) -> str:
        """That of the adapter if there is one."""
        return super().resumed_weights if self.adapters is None else f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load the adapter, or all of the image encoder's weights from the checkpoint's dual encoder; and the bank."""
        with reading_checkpoint(resume_from_checkpoint):
            for part in (self.negatives, self.average):
                if part is not None:
                    part.load(Path(resume_from_checkpoint))
        if self.adapters is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with reading_checkpoint(resume_from_checkpoint):
            load_adapters(self.adapters, Path(resume_from_checkpoint))

    def _read_weights(self, folder):
        """As the base class; in the files of some families of transformers weights have other names."""
        if self.dual_encoder.config.model_type in DUAL_ENCODERS:
            return super()._read_weights(folder)
        return load_checked(type(self.dual_encoder), folder).state_dict()

    def _take_weights(self, weights):
        """The image encoder's of the dual encoder."""
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})


MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound of the learned scale
PUBLISHED_LOGIT_SCALE = 100.0  # of both teachers of [M]: CLIP's bound, which trained CLIPs reach


EMA_NAME = "ema.safetensors"  # in a checkpoint


class WeightAverage(TrainerCallback):
    """The exponential moving average of what trains, from the weights before the first step on.

    Source: Polyak averaging as in "Mean teachers", arXiv 1703.01780 [MeanT]; docs/papers.md. Deviation: none.

    Args:
        model (`nn.Module`): What trains.
        decay (`float`): The share of itself that the average keeps in a step, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average: dict[str, torch.Tensor] = {}

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: one.detach() for name, one in self.model.named_parameters() if one.requires_grad}

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin with the weights, or with what a checkpoint held."""
        trained = self._trained()
        self.average = {name: self.average.get(name, one.clone()).to(one.device) for name, one in trained.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        """Take the weights after a step in."""
        for name, one in self._trained().items():
            self.average[name].lerp_(one, 1 - self.decay)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        save_file({name: one.cpu().contiguous() for name, one in self.average.items()}, folder / EMA_NAME)

    def load(self, folder: Path) -> None:
        """Take the average from a checkpoint.

        Raises:
            ValueError: If it is not there.
        """
        if not (folder / EMA_NAME).is_file():
            raise ValueError(f"'{folder / EMA_NAME}' is missing")
        self.average = load_file(folder / EMA_NAME)

    @torch.no_grad()
    def put_in(self) -> dict[str, torch.Tensor]:
        """Put the average in the weights' place, and return the weights."""
        trained = self._trained()
        taken = {name: one.clone() for name, one in trained.items()}
        for name, one in trained.items():
            one.copy_(self.average[name])
        return taken

    @torch.no_grad()
    def put_back(self, taken: Mapping[str, torch.Tensor]) -> None:
        """Undo [`put_in`]."""
        for name, one in self._trained().items():
            one.copy_(taken[name])


class _BoundLogitScale(TrainerCallback):
    """Keeps the learned scale at CLIP's bound or below, before the first step and after each one.

    The parameter itself is clamped, as CLIP does. With a clamp in the forward pass alone there would be no gradient
    above the bound, and the scale could not return.
    """

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    on_step_end = on_train_begin


class AnchorTrainer(BatchesTrainer):
    """Pretrains a small dual encoder contrastively, with its logit scale.

    Source: CLIP; docs/papers.md. Deviation: none.
    """

    args: AnchorArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_BoundLogitScale())

    def loss_terms(self, model, batch):
        """Symmetric InfoNCE over the global batch."""
        image_ids = batch.pop("image_ids")
        outputs = model(**batch)
        logit_scale = self.accelerator.unwrap_model(model, keep_torch_compile=False).logit_scale
        image_embeds, text_embeds, image_ids = gather_across_processes(
            outputs.image_embeds, outputs.text_embeds, image_ids
        )
        temperature = logit_scale.neg().exp()
        share = self.args.image_to_text_weight
        loss = contrastive_loss(image_embeds, text_embeds, temperature, share, image_ids)
        return {"contrastive_loss": (loss, 1.0)}


def _stack_padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Token tensors `(B, T)` of several lengths T as one tensor, the shorter ones padded with `value`."""
    longest = max(tokens.shape[1] for tokens in rows)
    return torch.cat([F.pad(tokens, (0, longest - tokens.shape[1]), value=value) for tokens in rows])


class _PlacedStream(IterableDataset):
    """A stream with an empty place for each batch that a resumed run was given before.

    The base class passes over these places without a read, and counts steps and accumulated batches as a run that was
    never interrupted does.

    Args:
        loader (`DataLoader`): Gives the batches from the stream's position on.
        batches ([`ReinforcedBatches`]): The stream.
    """

    def __init__(self, loader: DataLoader, batches: ReinforcedBatches):
        self.loader, self.batches = loader, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        given = self.batches.position
        for _ in range(given if given < len(self.batches) else 0):  # at its end, the stream begins the epoch anew
            yield {}
        yield from self.loader


class _FollowStream(TrainerCallback):
    """Starts a stream of batches where a checkpoint was saved, without reading those before."""

    def __init__(self, batches: ReinforcedBatches):
        self.batches = batches

    def on_train_begin(self, args, state, control, **kwargs):
        steps = math.ceil(len(self.batches) / args.gradient_accumulation_steps)
        epoch, step = divmod(state.global_step, steps)
        self.batches.resume(epoch, step * args.gradient_accumulation_steps)


class DMCLIPTrainer(BatchesTrainer):
    """Trains a dual encoder from several teachers' stored embeddings of the same augmented images and captions.

    The loss is `contrastive_loss_weight` * InfoNCE + `distillation_loss_weight` * cross-entropy to the teachers' mean
    softmax. It is computed over the images with one real caption each. If there are synthetic captions, it is computed
    again with one of these per image, and both are added. The student's scale is learned and bounded as in CLIP.
    BatchNorm sees the images of its own process.

    Source: [MC] eq. 1 to 3; [M]; docs/papers.md. Deviation: teachers whose trained scale is known are scaled by it.

    Args:
        model ([`DMCLIPModel`]): Trains, in place.
        args ([`DMCLIPArguments`]): Losses, optimiser.
        train_batches ([`~modeling_dclip.data.reinforced.ReinforcedBatches`]): A stream. A resumed run continues with
            the same batches as an uninterrupted one.
        processor, resolved_arguments: As for [`BatchesTrainer`].
    """

    args: DMCLIPArguments

    def __init__(
        self,
        model: DMCLIPModel,
        args: DMCLIPArguments,
        train_batches: ReinforcedBatches,
        processor: DCLIPProcessor,
        resolved_arguments: dict[str, Any],
    ):
        args = copy.copy(args)
        args.ignore_data_skip = False  # what it skips are empty places
        if args.micro_batch_size is not None:
            run_in_micro_batches(model, args.micro_batch_size)
        super().__init__(model, args, train_batches, processor, resolved_arguments)
        self.teacher_widths = list(train_batches.teacher_widths)
        given = PUBLISHED_LOGIT_SCALE if args.teacher_logit_scale is None else args.teacher_logit_scale
        self.teacher_logit_scales = [given] * len(self.teacher_widths)
        if args.teacher_logit_scale is None and train_batches.teacher_logit_scales is not None:
            self.teacher_logit_scales = [math.exp(scale) for scale in train_batches.teacher_logit_scales]
        self.add_callback(_FollowStream(train_batches))
        self.add_callback(_BoundLogitScale())

    def get_train_dataloader(self):
        """The stream itself, not prepared by accelerate: it is already split between processes and workers."""
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_size=None,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            # The loader draws a seed. From the global generator, a resumed run would draw once more than others.
            generator=torch.Generator(),
        )
        placed = _PlacedStream(loader, self.train_dataset)
        return DataLoader(placed, batch_size=None, generator=torch.Generator())

    def loss_terms(self, model, batch):
        """Both losses over real captions, and over synthetic ones if the batch has them."""
        args = self.args
        texts = [name.removesuffix("input_ids") for name in ("input_ids", "synthetic_input_ids") if name in batch]
        pad_token_id = self.processor.tokenizer.pad_token_id
        outputs = model(
            # channels_last makes a step a sixth faster
            pixel_values=batch["pixel_values"].contiguous(memory_format=torch.channels_last),
            input_ids=_stack_padded([batch[f"{text}input_ids"] for text in texts], pad_token_id),
            attention_mask=_stack_padded([batch[f"{text}attention_mask"] for text in texts], 0),
        )
        text_embeds = outputs.text_embeds.chunk(len(texts))
        teachers = []
        if args.reads_teachers:
            teachers = [batch["teacher_image_embeds"], *(batch[f"teacher_{text}text_embeds"] for text in texts)]
        image_embeds, *gathered = gather_across_processes(outputs.image_embeds, *text_embeds, *teachers)
        text_embeds, teachers = gathered[: len(texts)], gathered[len(texts) :]
        logit_scale = self.accelerator.unwrap_model(model, keep_torch_compile=False).logit_scale
        temperature = logit_scale.neg().exp()
        terms = {}
        for index, text in enumerate(texts):
            if args.contrastive_loss_weight:
                loss = contrastive_loss(image_embeds, text_embeds[index], temperature, args.image_to_text_weight)
                terms[f"{text}contrastive_loss"] = (loss, args.contrastive_loss_weight)
            if args.reads_teachers:
                loss = distillation_loss(
                    image_embeds, text_embeds[index], teachers[0], teachers[1 + index], self.teacher_widths,
                    self.teacher_logit_scales, temperature, args.image_to_text_weight,
                )  # fmt: skip
                terms[f"{text}distillation_loss"] = (loss, args.distillation_loss_weight)
        return terms


def train_or_resume(trainer: BatchesTrainer, folder: Path) -> None:
    """Train from the last complete checkpoint in a stage's folder, or from the start; save `trainer_state.json`.

    Args:
        trainer ([`BatchesTrainer`]): Ready to train.
        folder (`Path`): The stage's own folder.

    Raises:
        FloatingPointError: If a term of the loss is NaN or infinite.
        ValueError: If another number of processes wrote the checkpoint, or it cannot be loaded.
    """
    checkpoint = last_checkpoint(folder, trainer.args.world_size, trainer.resumed_weights)
    if checkpoint is not None:
        logger.info("%s: resuming from %s", folder.name, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.describe_best()
    trainer.check_result()
    with writing(folder):
        trainer.save_state()
