"""Benchmarks by name: load the data once, evaluate any number of models on it, keep what a results record needs."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from modeling_dclip.data.captions import SOURCES as CAPTION_SOURCES
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.specs import Source, parse_spec
from modeling_dclip.evaluation.intervals import bootstrap_outcomes
from modeling_dclip.evaluation.provenance import dataset_fingerprint
from modeling_dclip.evaluation.results import make_record
from modeling_dclip.evaluation.retrieval import evaluate_retrieval
from modeling_dclip.evaluation.zero_shot import SOURCES as LABELLED_SOURCES
from modeling_dclip.evaluation.zero_shot import evaluate_zero_shot, load_classification


class Benchmark(NamedTuple):
    """A loaded benchmark: `evaluate(model, processor)` gives its metrics. `settings` is what else they depend on."""

    name: str
    split: str | None
    fingerprint: str
    evaluate: Callable[[torch.nn.Module, Any], dict[str, Any]]
    settings: dict[str, Any]


def split_of(spec: str, sources: Mapping[str, Source]) -> str | None:
    """The split a spec names, or the default; `None` where the source has no splits."""
    source, fields, *_ = parse_spec(spec, sources, counted=True)
    bound = inspect.signature(source.build).bind(*fields)
    bound.apply_defaults()
    return bound.arguments.get("split")


def _load_retrieval(spec: str, seed: int, **options: Any) -> tuple[Any, ...]:
    dataset, split = load_captions(spec, seed=seed), split_of(spec, CAPTION_SOURCES)
    return dataset, split, partial(evaluate_retrieval, dataset=dataset, **options), {}


def _load_zero_shot(
    spec: str,
    seed: int,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    dataset, own_names, own_templates = load_classification(spec)
    prompts = {"class_names": list(class_names or own_names), "templates": list(templates or own_templates)}
    settings = {"prompts": hashlib.sha256(repr(sorted(prompts.items())).encode()).hexdigest()[:16]}
    evaluate = partial(evaluate_zero_shot, dataset=dataset, **prompts, **options)
    return dataset, split_of(spec, LABELLED_SOURCES), evaluate, settings


class Kind(NamedTuple):
    """A kind of benchmark: the spec it takes by default, and what loads one: data, split, evaluation and settings."""

    default_spec: str
    load: Callable[..., tuple[Any, ...]]


KINDS = {
    "retrieval": Kind("scenes:test", _load_retrieval),
    "zero_shot": Kind("scenes:test", _load_zero_shot),
}


def load_benchmark(benchmark: str, *, seed: int = 0, **options: Any) -> Benchmark:
    """Load a benchmark's data.

    Args:
        benchmark (`str`): `KIND[=SPEC]`, of [`KINDS`].
        seed (`int`, *optional*, defaults to 0): Of the draw of `@COUNT`.
        options: `batch_size`, `device`, `num_workers` of the evaluation; of `zero_shot` also `class_names` and `templates`, in place of
            the data's own. A kind takes those it knows.

    Returns:
        [`Benchmark`]

    Raises:
        ValueError: If the name or the spec is unknown.
    """
    kind, _, spec = benchmark.partition("=")
    if kind not in KINDS:
        known = ", ".join(f"{name}[=SPEC]" for name in KINDS)
        raise ValueError(f"unknown benchmark {kind!r}; known benchmarks: {known}")
    spec = spec or KINDS[kind].default_spec
    if kind != "zero_shot":
        options = {name: value for name, value in options.items() if name not in ("class_names", "templates")}
    dataset, split, evaluate, settings = KINDS[kind].load(spec, seed, **options)
    return Benchmark(f"{kind}={spec}", split, dataset_fingerprint(dataset), evaluate, settings)


def benchmark_record(benchmark: Benchmark, result: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A results record of one model on one benchmark.

    Args:
        benchmark ([`Benchmark`]): What was measured.
        result (`dict`): From its `evaluate`: the floats are the metrics; `outcomes` become intervals over images.
        fields: Those of [`~modeling_dclip.evaluation.results.make_record`] that the two do not know.

    Returns:
        `dict[str, Any]`: Valid for [`~modeling_dclip.evaluation.results.write_results`].
    """
    intervals = None
    if (outcomes := result.get("outcomes")) and result["n"] > 1:
        found = bootstrap_outcomes(outcomes, seed=fields.get("seed", 0))
        intervals = {name: interval.to_dict() for name, interval in found.items()}
    return make_record(
        benchmark=benchmark.name,
        metrics={name: value for name, value in result.items() if isinstance(value, float)},
        n=result["n"],
        n_captions=result.get("n_captions"),
        split=benchmark.split,
        dataset_fingerprint=benchmark.fingerprint,
        intervals=intervals,
        **fields,
    )
