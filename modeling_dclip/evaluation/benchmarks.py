"""Benchmarks by name: load the data once, evaluate any number of models on it, keep what a results record needs."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, AutoProcessor

from modeling_dclip.data.captions import SOURCES as CAPTION_SOURCES
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.specs import Source, parse_spec
from modeling_dclip.evaluation.provenance import dataset_fingerprint, model_revision
from modeling_dclip.evaluation.results import make_record
from modeling_dclip.evaluation.retrieval import evaluate_retrieval
from modeling_dclip.evaluation.zero_shot import SOURCES as LABELLED_SOURCES
from modeling_dclip.evaluation.zero_shot import evaluate_zero_shot, load_classification

DEFAULT_SPECS = {"retrieval": "scenes:test", "zero_shot": "scenes:test"}


class Benchmark(NamedTuple):
    """A loaded benchmark: `evaluate(model, processor)` gives its metrics."""

    name: str
    split: str | None
    fingerprint: str
    evaluate: Any


def split_of(spec: str, sources: Mapping[str, Source]) -> str | None:
    """The split a spec names, or the default; `None` where the source has no splits."""
    source, fields, *_ = parse_spec(spec, sources, counted=True)
    bound = inspect.signature(source.build).bind(*fields)
    bound.apply_defaults()
    return bound.arguments.get("split")


def load_benchmark(
    benchmark: str,
    *,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    **options: Any,
) -> Benchmark:
    """Load a benchmark's data.

    Args:
        benchmark (`str`): `retrieval[=SPEC]` or `zero_shot[=SPEC]`.
        seed (`int`, *optional*, defaults to 0): Of the draw of `@COUNT`.
        class_names, templates (`Sequence[str]`, *optional*): For `zero_shot`, in place of the data's own.
        options: `batch_size`, `device`, `num_workers` of the evaluation.

    Returns:
        [`Benchmark`]

    Raises:
        ValueError: If the name or the spec is unknown.
    """
    kind, _, spec = benchmark.partition("=")
    if kind not in DEFAULT_SPECS:
        known = ", ".join(f"{name}[=SPEC]" for name in DEFAULT_SPECS)
        raise ValueError(f"unknown benchmark {kind!r}; known benchmarks: {known}")
    spec = spec or DEFAULT_SPECS[kind]
    if kind == "retrieval":
        dataset, split = load_captions(spec, seed=seed), split_of(spec, CAPTION_SOURCES)
        evaluate = partial(evaluate_retrieval, dataset=dataset, **options)
    else:
        dataset, own_names, own_templates = load_classification(spec)
        split = split_of(spec, LABELLED_SOURCES)
        options |= {"class_names": class_names or own_names, "templates": templates or own_templates}
        evaluate = partial(evaluate_zero_shot, dataset=dataset, **options)
    return Benchmark(f"{kind}={spec}", split, dataset_fingerprint(dataset), evaluate)


def evaluate_model(
    name: str, benchmarks: Sequence[Benchmark], *, trust_remote_code: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """Load a dual encoder in float32 with the PIL image processor and evaluate it.

    Args:
        name (`str`): Folder or Hub id.
        benchmarks (`Sequence[Benchmark]`): From [`load_benchmark`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        `tuple`: The result of every benchmark, and the model's revision.
    """
    model = AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, backend="pil")
    return [benchmark.evaluate(model, processor) for benchmark in benchmarks], model_revision(name, model)


def benchmark_record(benchmark: Benchmark, result: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A results record of one model on one benchmark; `fields` are those of [`make_record`] that the two do not know."""
    return make_record(
        benchmark=benchmark.name,
        metrics={name: value for name, value in result.items() if isinstance(value, float)},
        n=result["n"],
        n_captions=result.get("n_captions"),
        split=benchmark.split,
        dataset_fingerprint=benchmark.fingerprint,
        **fields,
    )
