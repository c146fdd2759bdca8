"""Evaluate models on benchmarks: load once, measure, record, store.

Every pair of a model and a benchmark becomes one record, which is on disk before the next pair begins. A failure loses
one pair, not the rest. Run again, it keeps what was measured with the same weights, data, settings and version.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_dclip.data.captions.parts import TrainedImages, read_trained_images
from modeling_dclip.data.failures import BENCHMARK_FAILURES, describe_failure, without_secrets
from modeling_dclip.data.images import UnreadableImageError
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.benchmarks.kinds import (
    Benchmark,
    EvaluationOptions,
    benchmark_record,
    expand_benchmark,
    load_benchmark,
)
from modeling_dclip.evaluation.line import ALPHA, find_line
from modeling_dclip.evaluation.records import Measurement, Outcomes, Record, RecordStore
from modeling_dclip.evaluation.statistics import IntervalDict, compare_to_anchor, differences_to_anchor

logger = logging.get_logger(__name__)


class Candidate(NamedTuple):
    """A model to evaluate.

    Attributes:
        name (`str`): As [`~modeling_dclip.encoders.loading.load_dual_encoder`] takes it.
        label (`str`, *optional*): What tables show in place of the name.
        alpha (`float`, *optional*): Evaluate this point on the line from the anchor (0) to what the model's training
            reached (1; [`~modeling_dclip.evaluation.line.find_line`]), in place of the model.
        seed (`int`, *optional*): The seed it was trained with; by default the evaluation's own seed is recorded.
    """

    name: str
    label: str | None = None
    alpha: float | None = None
    seed: int | None = None

    @property
    def condition(self) -> str | None:
        """What a record says of a point on the line; `None` for the model itself."""
        return None if self.alpha is None else f"{ALPHA}{self.alpha:g}"


@dataclass
class Evaluation:
    """What [`evaluate`] did.

    Attributes:
        records (`list[Record]`): In the order of the request, kept ones included.
        kept (`int`): How many of them an earlier run had measured.
        failures (`list[str]`): One line for each benchmark, model or pair that failed.
    """

    records: list[Record] = field(default_factory=list)
    kept: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Subject:
    """A loaded candidate, and what its records say of it."""

    candidate: Candidate
    encoder: Encoder
    revision: str
    seed: int
    settings: dict[str, float | str]  # what fixes a point on the line
    trained: TrainedImages | None  # the images that it learned from, where its folder says
    line: str | None  # what a point's alpha is a share of


class _Reference(NamedTuple):
    """The anchor, its weights, and what it scored on one benchmark."""

    anchor: str
    revision: str
    outcomes: Outcomes


def evaluate(
    candidates: Sequence[Candidate],
    benchmarks: Sequence[str],
    output: str | os.PathLike,
    *,
    anchor: str | None = None,
    command: str = "",
    overwrite: bool = False,
    keep_others: bool = True,
    trust_remote_code: bool = False,
    options: EvaluationOptions | None = None,
) -> Evaluation:
    """Evaluate every model, the anchor first, on every benchmark.

    Args:
        candidates (`Sequence[Candidate]`): The models.
        benchmarks (`Sequence[str]`): As [`~modeling_dclip.evaluation.benchmarks.kinds.load_benchmark`] takes them.
        output (`str` or `os.PathLike`): The results file; the outcomes lie beside it. Written after every pair.
        anchor (`str`, *optional*): The reference. The records of other models get their gain or retention against it.
        command (`str`, *optional*): What the user ran, for the records.
        overwrite (`bool`, *optional*, defaults to `False`): Replace what `output` holds instead of adding to it.
        keep_others (`bool`, *optional*, defaults to `True`): Keep records in `output` that this call did not ask for.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with a model.
        options ([`~modeling_dclip.evaluation.benchmarks.kinds.EvaluationOptions`], *optional*): How to evaluate; by
            default its defaults.

    Returns:
        [`Evaluation`]: Its `records` leave out what failed; its `failures` say why.

    Raises:
        OSError: If `output` cannot be written.
        ValueError: If `output` is not a results file, or there is no anchor for an interpolation.
    """
    if anchor is None and any(candidate.alpha is not None for candidate in candidates):
        raise ValueError("Expected an anchor to interpolate from, got none. Name it.")
    options = options or EvaluationOptions()
    store, done = RecordStore(output, overwrite), Evaluation()
    loaded = _load_benchmarks(benchmarks, options, done.failures)
    candidates = _anchor_first(candidates, anchor) if loaded else ()
    references: dict[str, _Reference] = {}
    for candidate in tqdm(candidates, desc="Models", unit="model", disable=len(candidates) < 2):
        try:
            subject = _load_subject(candidate, anchor, options, trust_remote_code)
        except BENCHMARK_FAILURES as error:
            _leave_out(done.failures, candidate.name, error)
            continue
        for name, benchmark in list(loaded.items()):
            try:
                record, outcomes, kept = _measure_or_keep(store, benchmark, subject, options, command)
                _take_notes(record, benchmark, subject)
                if candidate.name == anchor and candidate.alpha is None:
                    references[name] = _Reference(anchor, subject.revision, outcomes)
                elif name in references:
                    record["comparison"] = _compare(references[name], outcomes, subject.seed)
                store.put(record, outcomes)
            except UnreadableImageError as error:  # no other model could be measured on these pictures
                _leave_out(done.failures, name, error)
                del loaded[name]
                continue
            except BENCHMARK_FAILURES as error:
                _leave_out(done.failures, f"{candidate.label or candidate.name} on {name}", error)
                continue
            done.records.append(record)
            done.kept += kept
    if not keep_others:
        store.keep_only(done.records)
    return done


# What of a benchmark a training follows; of a kind that is not here, everything.
_FOLLOWED = {
    "retrieval": ("text_to_image_recall@1", "image_to_text_recall@1"),
    "zero_shot": ("top1", "map"),
    "fine_grained": ("accuracy", "text_score", "image_score", "group_score"),
}


class LoadedProbe:
    """Benchmarks to measure on models in memory, such as one that is training; [`Probes`] makes it.

    Args:
        benchmarks (`Sequence[str]`): As [`evaluate`] takes them. Their data are read when they are first needed.
        probes ([`Probes`]): Loads them.
    """

    def __init__(self, benchmarks: Sequence[str], probes: "Probes"):
        self.benchmarks, self.probes = list(benchmarks), probes

    def __call__(self, model: DualEncoder, processor: Any) -> dict[str, dict[str, float]]:
        """Measure a model where it is, in evaluation mode; its mode is restored.

        Args:
            model ([`~modeling_dclip.encoders.DualEncoder`]): On the device to use.
            processor: The model's.

        Returns:
            `dict[str, dict[str, float]]`: By benchmark, those of a suite one by one, its main metrics by name: R@1 of
                retrieval, top-1 or mAP, accuracies; of other kinds all.

        Raises:
            ValueError: As the benchmarks do, for example if an embedding is not finite.
        """
        encoder, found = self.probes.options.encoder(model, processor), {}
        for benchmark in self.probes.load(self.benchmarks):
            result = benchmark.evaluate(encoder)
            metrics = {name: value for name, value in result.items() if isinstance(value, float)}
            names = _FOLLOWED.get(benchmark.name.partition("=")[0], tuple(metrics))
            found[benchmark.name] = {name: metrics[name] for name in names if name in metrics}
        return found

    def image_keys(self) -> list[str]:
        """Keys of the content of all its images, each once."""
        return list(dict.fromkeys(key for one in self.probes.load(self.benchmarks) for key in one.image_keys()))


class Probes:
    """Opens sets of benchmarks that are measured again and again: the data of each are loaded once for all sets.

    Args:
        options ([`~modeling_dclip.evaluation.benchmarks.kinds.EvaluationOptions`], *optional*): How to measure. By
            default on the model's own device.

    Example:
        >>> probe = Probes()(["zero_shot=scenes:validation,n=64"])
        >>> probe.benchmarks
        ['zero_shot=scenes:validation,n=64']
    """

    def __init__(self, options: EvaluationOptions | None = None):
        self.options = options or EvaluationOptions()
        self._loaded: dict[str, Benchmark] = {}

    def __call__(self, benchmarks: Sequence[str]) -> LoadedProbe:
        """Open a set of benchmarks."""
        return LoadedProbe(benchmarks, self)

    def load(self, benchmarks: Sequence[str]) -> list[Benchmark]:
        """The benchmarks with their data, those of a suite one by one.

        Raises:
            ConnectionError, FileNotFoundError, ValueError: As
                [`~modeling_dclip.evaluation.benchmarks.kinds.load_benchmark`].
        """
        members = [member for benchmark in benchmarks for member in expand_benchmark(benchmark)]
        for member in members:
            if member not in self._loaded:
                self._loaded[member] = load_benchmark(member, self.options)
        return [self._loaded[member] for member in members]


def _anchor_first(candidates: Sequence[Candidate], anchor: str | None) -> list[Candidate]:
    if anchor is None:
        return list(candidates)
    named = [one for one in candidates if one.name == anchor and one.alpha is None] or [Candidate(anchor)]
    return named[:1] + [one for one in candidates if one not in named]


def _load_benchmarks(
    benchmarks: Sequence[str], options: EvaluationOptions, failures: list[str]
) -> dict[str, Benchmark]:
    """Load benchmarks by name. Those that fail are left out, with a line in `failures`."""
    loaded = {}
    for benchmark in benchmarks:
        try:
            members = expand_benchmark(benchmark)
        except BENCHMARK_FAILURES as error:
            _leave_out(failures, benchmark, error)
            continue
        for member in members:
            try:
                loaded[member] = load_benchmark(member, options)
            except BENCHMARK_FAILURES as error:
                _leave_out(failures, member, error)
    return loaded


def _load_subject(
    candidate: Candidate, anchor: str | None, options: EvaluationOptions, trust_remote_code: bool
) -> _Subject:
    model, processor, revision = load_dual_encoder(candidate.name, trust_remote_code=trust_remote_code)
    settings: dict[str, float | str] = {}
    told = None
    if candidate.alpha is not None and anchor is not None:
        start, _, anchor_revision = load_dual_encoder(anchor, trust_remote_code=trust_remote_code)
        line = find_line(anchor, candidate.name, start, model)
        model.load_state_dict(line.weights(start, model, candidate.alpha))
        settings = {"alpha": candidate.alpha, "anchor_revision": anchor_revision}
        settings |= {"student_alpha": line.student_alpha} if line.student_alpha != 1 else {}
        told = line.described
    seed = options.seed if candidate.seed is None else candidate.seed
    trained = read_trained_images(candidate.name)
    return _Subject(candidate, options.encoder(model, processor), revision, seed, settings, trained, told)


def _measure_or_keep(
    store: RecordStore, benchmark: Benchmark, subject: _Subject, options: EvaluationOptions, command: str
) -> tuple[Record, Outcomes, bool]:
    """Take a record with its outcomes from the store, or measure them; say whether the store had them."""
    candidate = subject.candidate
    settings = {**benchmark.settings, **subject.settings} or None
    key = Measurement(
        revision=subject.revision,
        benchmark=benchmark.name,
        dataset_fingerprint=benchmark.fingerprint,
        seed=subject.seed,
        version=options.measured_in.versions["modeling_dclip"],
        condition=candidate.condition,
        settings=settings,
    ).key
    known = store.find(key)
    # A record with intervals and without outcomes is from a run that was killed between the two files.
    if known is not None and (key in store.outcomes or "intervals" not in known):
        return _rename(known, candidate), store.outcomes.get(key, {}), True
    result = benchmark.evaluate(subject.encoder)
    record = benchmark_record(
        benchmark,
        result,
        options.measured_in,
        model=candidate.name,
        label=candidate.label,
        command=command,
        revision=subject.revision,
        seed=subject.seed,
        condition=candidate.condition,
        settings=settings,
    )
    return record, result.get("outcomes", {}), False


def _take_notes(record: Record, benchmark: Benchmark, subject: _Subject) -> None:
    """Write into a record what its reader has to know: what the data are, and that the model was trained on them."""
    record.pop("notes", None)
    record.pop("n_trained_on", None)
    notes, trained = list(benchmark.notes), subject.trained
    if trained is not None and (overlap := trained.describe_overlap(benchmark.image_keys())):
        logger.warning("%s: %s", benchmark.name, overlap)
        notes.append(f"{benchmark.name}, {subject.candidate.label or subject.candidate.name}: {overlap}")
        record["n_trained_on"] = trained.count_overlap(benchmark.image_keys())
    if subject.line is not None:
        notes.append(subject.line)
    if notes:
        record["notes"] = notes


def _rename(record: Record, candidate: Candidate) -> Record:
    """A kept record under the candidate's name. The same weights under another name do not keep their label."""
    renamed = record.copy()
    if candidate.label or record["model"] != candidate.name:
        renamed.pop("label", None)
    renamed["model"] = candidate.name
    if candidate.label:
        renamed["label"] = candidate.label
    return renamed


def _compare(reference: _Reference, outcomes: Outcomes, seed: int) -> dict[str, str | IntervalDict]:
    both = outcomes, reference.outcomes
    found = compare_to_anchor(*both, seed=seed) | differences_to_anchor(*both, seed=seed)
    return {"anchor": reference.anchor, "anchor_revision": reference.revision, **found}


def _leave_out(failures: list[str], what: str, error: BaseException) -> None:
    """Warn at once, because the rest may take hours; the reason comes at the end."""
    logger.warning("%s failed and is left out", without_secrets(what))
    failures.append(describe_failure(what, error))
