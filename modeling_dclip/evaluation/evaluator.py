"""Evaluate models on benchmarks, one pair after the other: what is done is on disk, what fails does not lose the rest.

The results file grows by one record a pair. Run again, it keeps what was measured with the same weights, data,
settings and version.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_dclip.data.failures import BENCHMARK_FAILURES, describe_failure
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.encoders.weight_interpolation import interpolate_weights
from modeling_dclip.evaluation.benchmarks.kinds import Benchmark, benchmark_record, expand_benchmark, load_benchmark
from modeling_dclip.evaluation.records import (
    Outcomes,
    RecordStore,
    record_key,
)
from modeling_dclip.evaluation.statistics import compare_to_anchor

try:
    import fcntl
except ImportError:  # not on this system: then one process at a time
    fcntl = None

logger = logging.get_logger(__name__)


class Candidate(NamedTuple):
    """A model to evaluate.

    Attributes:
        name (`str`): As of [`~modeling_dclip.encoders.loading.load_dual_encoder`].
        label (`str`, *optional*): What tables show instead.
        alpha (`float`, *optional*): The point on the line from the anchor (0) to the model (1), in place of the model.
        seed (`int`, *optional*): It was trained with; the evaluation's own if not given.
    """

    name: str
    label: str | None = None
    alpha: float | None = None
    seed: int | None = None


@dataclass
class Evaluation:
    """What [`evaluate`] did: `records` asked for, in order; how many of them were `kept` from an earlier run;
    `failures`, one line each.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0
    failures: list[str] = field(default_factory=list)


def _load(
    candidate: Candidate, anchor: str | None, trust_remote_code: bool
) -> tuple[torch.nn.Module, Any, str, dict[str, Any]]:
    """Model, processor, revision, and of a point on the line what fixes it."""
    model, processor, revision = load_dual_encoder(candidate.name, trust_remote_code=trust_remote_code)
    if candidate.alpha is None:
        return model, processor, revision, {}
    start, _, anchor_revision = load_dual_encoder(anchor, trust_remote_code=trust_remote_code)
    model.load_state_dict(interpolate_weights(start.state_dict(), model.state_dict(), candidate.alpha))
    return model, processor, revision, {"alpha": candidate.alpha, "anchor_revision": anchor_revision}


def evaluate(
    candidates: Sequence[Candidate],
    benchmarks: Sequence[str],
    output: str | os.PathLike,
    *,
    anchor: str | None = None,
    command: str = "",
    seed: int = 0,
    overwrite: bool = False,
    keep_others: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> Evaluation:
    """Evaluate every model, the anchor first, on every benchmark.

    Args:
        candidates (`Sequence[Candidate]`): The models.
        benchmarks (`Sequence[str]`): Of [`~modeling_dclip.evaluation.benchmarks.kinds.load_benchmark`].
        output (`str` or `os.PathLike`): The results file; the outcomes lie beside it. Written after every pair.
        anchor (`str`, *optional*): The reference: the other models' records get their gain or retention against it.
        command (`str`, *optional*): What the user ran, for the records.
        seed (`int`, *optional*, defaults to 0): Of draws of data and of the bootstrap.
        overwrite (`bool`, *optional*, defaults to `False`): Begin anew instead of going on with what `output` holds.
        keep_others (`bool`, *optional*, defaults to `True`): Whether records that `output` holds and this call did not
            ask for stay.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with a model.
        options: Fields of [`~modeling_dclip.evaluation.benchmarks.kinds.EvaluationOptions`].

    Returns:
        [`Evaluation`]: Records of this call, kept ones included; a benchmark or a model that failed is under
            `failures` and has none.

    Raises:
        OSError: If `output` cannot be written.
        ValueError: If `output` is no results file, or an interpolation is without an anchor.
    """
    if anchor is None and any(candidate.alpha is not None for candidate in candidates):
        raise ValueError("Expected an anchor to interpolate from, got none. Name it.")
    store, done = RecordStore(output, overwrite), Evaluation()
    loaded = _load_benchmarks(benchmarks, done.failures, seed=seed, **options)
    candidates = _anchor_first(candidates, anchor) if loaded else ()
    references: dict[str, tuple[Outcomes, str]] = {}
    for candidate in tqdm(candidates, desc="Models", unit="model", disable=len(candidates) < 2):
        try:
            model, processor, revision, settings = _load(candidate, anchor, trust_remote_code)
        except BENCHMARK_FAILURES as error:
            _leave_out(done.failures, candidate.name, error)
            continue
        fields = {"model": candidate.name, "label": candidate.label, "command": command, "revision": revision}
        fields["seed"] = seed if candidate.seed is None else candidate.seed
        fields["condition"] = None if candidate.alpha is None else f"alpha={candidate.alpha:g}"
        for name, benchmark in loaded.items():
            fields["settings"] = {**benchmark.settings, **settings} or None
            try:
                record, outcomes, kept = _evaluate_pair(store, benchmark, model, processor, fields)
                if candidate.name == anchor and candidate.alpha is None:
                    references[name] = outcomes, revision
                elif name in references:
                    reference, anchor_revision = references[name]
                    ratios = compare_to_anchor(outcomes, reference, seed=fields["seed"])
                    record["comparison"] = {"anchor": anchor, "anchor_revision": anchor_revision, **ratios}
                store.put(record, outcomes)
            except BENCHMARK_FAILURES as error:
                _leave_out(done.failures, f"{candidate.label or candidate.name} on {name}", error)
                continue
            done.records.append(record)
            done.kept += kept
    if not keep_others:
        store.keep_only(done.records)
    return done


def _anchor_first(candidates: Sequence[Candidate], anchor: str | None) -> list[Candidate]:
    if anchor is None:
        return list(candidates)
    named = [one for one in candidates if one.name == anchor and one.alpha is None] or [Candidate(anchor)]
    return named[:1] + [one for one in candidates if one not in named]


def _leave_out(failures: list[str], what: str, error: BaseException) -> None:
    """Say so at once, as the rest may take hours; the reason comes at the end."""
    logger.warning("%s failed and is left out", what)
    failures.append(describe_failure(what, error))


def _load_benchmarks(benchmarks: Sequence[str], failures: list[str], **options: Any) -> dict[str, Benchmark]:
    """Those that load, by name; of the others a line in `failures`."""
    loaded = {}
    for benchmark in benchmarks:
        try:
            members = expand_benchmark(benchmark)
        except BENCHMARK_FAILURES as error:
            _leave_out(failures, benchmark, error)
            continue
        for member in members:
            try:
                loaded[member] = load_benchmark(member, **options)
            except BENCHMARK_FAILURES as error:
                _leave_out(failures, member, error)
    return loaded


def _evaluate_pair(
    store: RecordStore, benchmark: Benchmark, model: torch.nn.Module, processor: Any, fields: dict[str, Any]
) -> tuple[dict[str, Any], Outcomes, bool]:
    """A record with its outcomes, and whether the store had both."""
    known = benchmark_record(benchmark, {"n": 0}, **fields)
    key = record_key(known)
    kept = store.find(key)
    if kept is not None and (key in store.outcomes or "intervals" not in kept):  # else killed between the two files
        if (
            fields["label"] or kept["model"] != fields["model"]
        ):  # the same weights from elsewhere have no label of these
            kept = {name: value for name, value in kept.items() if name != "label"}
        label = {"label": fields["label"]} if fields["label"] else {}
        return {**kept, "model": fields["model"], **label}, store.outcomes.get(key, {}), True
    result = benchmark.evaluate(model, processor)
    return benchmark_record(benchmark, result, **fields), result.get("outcomes", {}), False
