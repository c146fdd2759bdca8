"""Benchmarks while a student trains: what it finds and still knows, and what of it is kept.

What measures comes from outside ([`Probe`]), because training does not know the benchmarks of evaluation. A probe goes
to the log like a loss. With `keep_retention` the first one that keeps too little zero-shot accuracy ends the training,
and the weights of the one before are kept. With `wise_ft_rule` the share of the student in the saved weights is chosen
on the validation images ([`choose_alpha`]).
"""

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from modeling_dclip.data.files import write_json
from modeling_dclip.distillation.arguments import MEAN_RECALL, RECALLS, WiseFTRule, parse_wise_ft_rule
from modeling_dclip.distillation.checkpoints import reading_checkpoint
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

PROBE_PREFIX = "probe_"  # of every number of a probe in a log
PROBE_RETENTION = "probe_retention"
KEPT_STEP = "probe_kept_step"  # in the last entry of a log: the step whose weights keep_retention kept
HELD_NAME = "held.safetensors"  # in a checkpoint
WISE_FT_NAME = "wise_ft.json"  # in the student's folder
ALPHAS = tuple(tenths / 10 for tenths in range(11))  # from the anchor to the student

_ZERO_SHOT, _ACCURACIES = f"{PROBE_PREFIX}zero_shot", ("_top1", "_map")
_WORDS = {"zero_shot": "zero-shot", "top1": "top-1", "recall@1": "R@1", "_": " "}
_SHARES = (*_ACCURACIES, "accuracy", "_score", *RECALLS)  # how names of numbers in [0, 1] end


class Probe(Protocol):
    """Benchmarks that are measured on models in memory."""

    def __call__(self, model: Any, processor: Any) -> Mapping[str, Mapping[str, float]]:
        """Measure a dual encoder: by benchmark (`KIND=SPEC`) its metrics by name."""

    def image_keys(self) -> Sequence[str]:
        """Keys of the content of all its images."""


OpenProbe = Callable[[Sequence[str]], Probe]  # takes the benchmarks of `student.probe`


@contextmanager
def left_as_is(model: nn.Module) -> Iterator[None]:
    """Let a model be measured amid training: random states and the mode of each module are at the end as before.

    Args:
        model (`nn.Module`): In any mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    python, arrays = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(arrays)


def name_numbers(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What a probe found under the names of a log. Of several benchmarks of a kind each has its number in the name.

    Args:
        found (`Mapping`): Metrics by benchmark.

    Returns:
        `dict[str, float]`

    Example:
        >>> name_numbers({"zero_shot=a": {"top1": 0.5}})
        {'probe_zero_shot_top1': 0.5}
        >>> list(name_numbers({"zero_shot=a": {"top1": 0.5}, "zero_shot=b": {"top1": 0.25}}))
        ['probe_zero_shot_1_top1', 'probe_zero_shot_2_top1']
    """
    return {
        f"{PROBE_PREFIX}{short}_{metric}": value
        for benchmark, short in _short_names(found).items()
        for metric, value in found[benchmark].items()
    }


def _short_names(benchmarks: Iterable[str]) -> dict[str, str]:
    """The kind of each benchmark, with a number where there are several of its kind."""
    kinds = [name.partition("=")[0] for name in benchmarks]
    numbers = [kinds[: place + 1].count(kind) for place, kind in enumerate(kinds)]
    return {
        name: kind if kinds.count(kind) == 1 else f"{kind}_{number}"
        for name, kind, number in zip(benchmarks, kinds, numbers, strict=True)
    }


def zero_shot_accuracy(numbers: Mapping[str, Any]) -> float | None:
    """The mean accuracy over the zero-shot benchmarks of a probe; of images with several labels the mAP.

    Args:
        numbers (`Mapping[str, Any]`): Of [`name_numbers`], or an entry of a log.

    Returns:
        `float` or `None`: In [0, 1]; `None` where there is no such benchmark.

    Example:
        >>> zero_shot_accuracy({"probe_zero_shot_1_top1": 0.5, "probe_zero_shot_2_map": 0.25, "loss": 1.0})
        0.375
    """
    found = [one for name, one in numbers.items() if name.startswith(_ZERO_SHOT) and name.endswith(_ACCURACIES)]
    return sum(found) / len(found) if found else None


def describe_probe(logs: Mapping[str, Any]) -> str:
    """A probe in a log as words; empty if it is none.

    Example:
        >>> describe_probe({"probe_zero_shot_top1": 0.812, "probe_retention": 0.95, "epoch": 1.0})
        'probe: zero-shot top-1 81.2 %, retention 0.950'
    """
    told = []
    for name, value in logs.items():
        if name.startswith(PROBE_PREFIX):
            words = name.removeprefix(PROBE_PREFIX)
            for short, long in _WORDS.items():
                words = words.replace(short, long)
            told.append(f"{words} {100 * value:.1f} %" if name.endswith(_SHARES) else f"{words} {value:.3f}")
    return f"probe: {', '.join(told)}" if told else ""


class StudentProbe(TrainerCallback):
    """Measures a student before the first step, every `probe_steps` and after the last step.

    The main process measures; all get the numbers. With `ema_decay` the average is measured. Training is not touched:
    it ends with the same weights, bit for bit, as without a probe, unless `keep_retention` ends it.

    Args:
        trainer ([`~modeling_dclip.distillation.trainer.StudentTrainer`]): The student's.
        probe ([`Probe`]): Measures.
    """

    def __init__(self, trainer: Any, probe: Probe):
        self.trainer, self.probe = trainer, probe
        self.stage, self.told = Path(trainer.args.output_dir).name, False
        self.held: dict[str, torch.Tensor] = {}  # what trains, as it was at the last probe that held

    def measure(self) -> dict[str, float]:
        """Measure the model as it is now.

        Returns:
            `dict[str, float]`: As [`name_numbers`]; the same in every process.
        """
        trainer = self.trainer
        found: list[Any] = [None]
        if trainer.args.process_index == 0:
            with left_as_is(trainer.dual_encoder):
                measured = self.probe(trainer.dual_encoder, trainer.processor)
            self._tell_numbers(measured)
            found = [name_numbers(measured)]
        return broadcast_object_list(found)[0]

    def _tell_numbers(self, benchmarks: Iterable[str]) -> None:
        """Say once which benchmark has which number."""
        numbered = [f"{short} {name}" for name, short in _short_names(benchmarks).items() if short[-1].isdigit()]
        if numbered and not self.told:
            logger.info("%s: numbers of the probe: %s", self.stage, ", ".join(numbered))
        self.told = True

    def retention_of(self, numbers: Mapping[str, float], start: Mapping[str, Any] | None) -> float | None:
        """The zero-shot accuracy as a share of that before training.

        Args:
            numbers (`Mapping[str, float]`): Of [`measure`].
            start (`Mapping[str, Any]`, *optional*): Those before training; without them there is no retention.

        Returns:
            `float` or `None`: 0 or more; `None` without zero-shot benchmarks too.

        Raises:
            ValueError: If a choice depends on it, and there was no accuracy above 0 before training.
        """
        before, now = zero_shot_accuracy(start or {}), zero_shot_accuracy(numbers)
        if before and now is not None:
            return now / before
        if name := self.trainer.args.choosing_field:
            raise ValueError(
                f"{self.stage}.{name}: expected zero_shot benchmarks in probe of which the model knows something "
                f"before training, got {'no accuracy' if before is None else 'an accuracy of 0'}. Name others, or "
                f"leave {name} out."
            )
        return None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what training starts from; a run that resumes did so, and takes over what it holds."""
        every = self._every(args, state)
        often = "every step" if every == 1 else f"every {every:,} steps"
        logger.info("%s: probes %s %s, and after the last step", self.stage, ", ".join(args.probe), often)
        if state.global_step == 0:
            self._look(args, state, control)
        elif args.keep_retention is not None:
            with reading_checkpoint(self.trainer.resumed_from):
                self.load(Path(self.trainer.resumed_from))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        if state.global_step % self._every(args, state) == 0 or state.global_step >= state.max_steps:
            self.trainer.guard.settle(args)
            self._look(args, state, control)

    @staticmethod
    def _every(args: Any, state: Any) -> int:
        return math.ceil(args.probe_steps * state.max_steps) if args.probe_steps < 1 else int(args.probe_steps)

    def _look(self, args: Any, state: Any, control: Any) -> None:
        """Measure, log, and end the training if too little is kept."""
        with self.trainer.averaged():
            numbers = self.measure()
        first = next((log for log in state.log_history if zero_shot_accuracy(log) is not None), None)
        start = numbers if state.global_step == 0 else first if first is not None and first["step"] == 0 else None
        retention = self.retention_of(numbers, start)
        logs = dict(numbers) if retention is None else {**numbers, PROBE_RETENTION: retention}
        is_due = control.should_log  # a log of numbers ends a wait for the log of losses
        self.trainer.log(logs)
        control.should_log = is_due
        if args.keep_retention is not None and retention is not None:
            if retention < args.keep_retention:
                control.should_training_stop = True
            else:
                self.held = {name: one.detach().clone() for name, one in self._measured().items()}

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: one for name, one in self.trainer.model.named_parameters() if one.requires_grad}

    def _measured(self) -> Mapping[str, torch.Tensor]:
        average = self.trainer.average
        return self._trained() if average is None else average.average

    def save(self, folder: Path) -> None:
        """Write the weights of the last probe that held into a checkpoint."""
        if self.held:
            save_file({name: one.cpu().contiguous() for name, one in self.held.items()}, folder / HELD_NAME)

    def load(self, folder: Path) -> None:
        """Take these weights from a checkpoint.

        Raises:
            ValueError: If they are not there.
        """
        if not (folder / HELD_NAME).is_file():
            raise ValueError(f"'{folder / HELD_NAME}' is missing")
        self.held = load_file(folder / HELD_NAME)

    def failed(self, state: Any) -> dict[str, Any] | None:
        """The entry of the log whose probe kept too little; `None` if there is none."""
        limit, logs = self.trainer.args.keep_retention, state.log_history
        if limit is None:
            return None
        return next((log for log in logs if log.get(PROBE_RETENTION, limit) < limit), None)

    def keep_last_held(self) -> None:
        """After a training that a probe ended: keep the best validated weights up to the last probe that held, or else
        those of that probe; and say so.
        """
        args, state = self.trainer.args, self.trainer.state
        if (failed := self.failed(state)) is None:
            return
        held = [log for log in state.log_history if PROBE_RETENTION in log and log["step"] < failed["step"]][-1]
        best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
        if best is None or best > held["step"]:
            self._put_held()
            entry = {KEPT_STEP: held["step"], "epoch": state.epoch, "step": state.global_step}
            state.log_history.append(entry)
            kept = f"step {held['step']:,}, the last probe that held (retention {held[PROBE_RETENTION]:.3f})"
        else:
            kept = f"step {best:,}, the best validation up to the last probe that held, that of step {held['step']:,}"
        first = next(log for log in state.log_history if PROBE_RETENTION in log)
        now, before = (100 * (zero_shot_accuracy(log) or 0.0) for log in (failed, first))
        logger.info(
            "%s: stopped after step %s of %s: retention %.3f is below keep_retention %g (zero-shot accuracy %.1f %%, "
            "before training %.1f %%). Kept: %s.",
            *(self.stage, f"{failed['step']:,}", f"{state.max_steps:,}", failed[PROBE_RETENTION]),
            *(args.keep_retention, now, before, kept),
        )
        if held["step"] == 0 and args.process_index == 0:
            logger.warning(
                "%s: nothing was learned: already the first probe after the start kept too little, so the student is "
                "the anchor. Set %s.probe_steps below %g, lower %s.learning_rate or %s.keep_retention, or leave "
                "keep_retention out and set %s.wise_ft_rule.",
                *(self.stage, self.stage, args.probe_steps, self.stage, self.stage, self.stage),
            )

    @torch.no_grad()
    def _put_held(self) -> None:
        for name, one in self._trained().items():
            one.copy_(self.held[name])

    def is_kept(self) -> bool:
        """Whether the weights of a probe were kept, not those of a validation or of the last step."""
        return any(KEPT_STEP in log for log in self.trainer.state.log_history)


def choose_alpha(trainer: Any, text: str, put: Callable[[float], None]) -> float:
    """Choose the share of the student in the saved weights, on the validation images and the zero-shot benchmarks.

    Of [`ALPHAS`] that keep the rule's share of the anchor's zero-shot accuracy, the one with the best metric; of equal
    ones the lowest. What was measured is logged in one line and written to [`WISE_FT_NAME`] in the student's folder.

    Source: "Robust fine-tuning of zero-shot models" [WiSE], arXiv 2109.01903; docs/papers.md. Deviation: the share is
    chosen by a rule, on validation images.

    Args:
        trainer ([`~modeling_dclip.distillation.trainer.StudentTrainer`]): After training, with validation images and a
            probe.
        text (`str`): The rule, as [`~modeling_dclip.distillation.arguments.parse_wise_ft_rule`] reads it.
        put (`Callable`): Puts the weights at an alpha into the model. The model is left at the last one measured.

    Returns:
        `float`: One of [`ALPHAS`].

    Raises:
        ValueError: If the validation images have no text embeddings, or there are none.
    """
    rule, probing, stage = parse_wise_ft_rule(text), trainer.probing, trainer.probing.stage
    logger.info("%s: wise_ft_rule measures %s between anchor and student", stage, count_of(len(ALPHAS), "point"))
    points: list[dict[str, float]] = []
    for alpha in ALPHAS:
        put(alpha)
        points.append({"alpha": alpha, **_measure_validation(trainer), **probing.measure()})
    for point in points:
        point["retention"] = probing.retention_of(point, points[0]) or 0.0
    chosen = _find_best(points, rule)
    alpha = chosen["alpha"]
    names = ("alpha", MEAN_RECALL, *RECALLS, "retention")
    table = [{name: point[name] for name in names} | {"probe": _only_probe(point)} for point in points]
    if trainer.args.should_save:
        told = {"rule": text, "alpha": alpha, "measured_on": "validation images", "points": table}
        write_json(Path(trainer.args.output_dir) / WISE_FT_NAME, told)
    logger.info(
        "%s: wise_ft_rule chose alpha %g: %s %.1f %% on the validation images at retention %.3f (alpha 0: %.1f %% at "
        "1; alpha 1: %.1f %% at %.3f). %s has all points. No test image had a say.",
        *(stage, alpha, rule.metric, 100 * chosen[rule.metric], chosen["retention"], 100 * points[0][rule.metric]),
        *(100 * points[-1][rule.metric], points[-1]["retention"], WISE_FT_NAME),
    )
    if alpha == 0 and trainer.args.process_index == 0:
        logger.warning(
            "%s: no point that keeps retention %g is better than the anchor on the validation images, so the student "
            "is the anchor. Lower the rule's retention, lower %s.learning_rate, or train longer.",
            *(stage, rule.retention, stage),
        )
    return alpha


def _find_best(points: Sequence[Mapping[str, float]], rule: WiseFTRule) -> Mapping[str, float]:
    """Of the points that keep enough the best one, of equal ones the first. The anchor always keeps enough."""
    return max((one for one in points if one["retention"] >= rule.retention), key=lambda one: one[rule.metric])


def _only_probe(point: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(PROBE_PREFIX): one for name, one in point.items() if name.startswith(PROBE_PREFIX)}


def _measure_validation(trainer: Any) -> dict[str, float]:
    """Retrieval on the validation images, with the model as it is."""
    with left_as_is(trainer.dual_encoder):
        trainer.dual_encoder.eval()
        trainer.model.eval()
        recalls = trainer.measure() if trainer.eval_dataset is not None else {}
    if MEAN_RECALL not in recalls:
        raise ValueError(
            f"{trainer.probing.stage}.wise_ft_rule: expected validation images with text_embeds, on which retrieval "
            "is measured, got none."
        )
    return recalls
