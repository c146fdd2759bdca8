"""Benchmarks by name: load the data once, evaluate any number of models on it, and make the records."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers.utils import logging

from modeling_dclip.data.captions import CAPTION_SOURCES, load_captions, parse_caption_spec
from modeling_dclip.data.captions.files import picture_lines
from modeling_dclip.data.captions.parts import describe_held_out
from modeling_dclip.data.columns import dataset_fingerprint, image_keys
from modeling_dclip.data.files import printable
from modeling_dclip.data.images import UnreadableImageError, find_unreadable
from modeling_dclip.data.labels import LABEL_SOURCES, load_classification, parse_label_spec
from modeling_dclip.data.labels.prompts import read_names
from modeling_dclip.data.questions import QUESTION_SOURCES, load_fine_grained, parse_question_spec
from modeling_dclip.data.rows import require_rows
from modeling_dclip.data.specs import Spec, bind_options
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.fingerprints import hash_bytes
from modeling_dclip.evaluation.benchmarks.diagnostics import evaluate_diagnostics
from modeling_dclip.evaluation.benchmarks.efficiency import evaluate_efficiency
from modeling_dclip.evaluation.benchmarks.fine_grained import evaluate_fine_grained, questions_fingerprint
from modeling_dclip.evaluation.benchmarks.forms import KIND_HELP
from modeling_dclip.evaluation.benchmarks.hessian import HessianOptions, evaluate_hessian
from modeling_dclip.evaluation.benchmarks.retrieval import evaluate_retrieval
from modeling_dclip.evaluation.benchmarks.suite import expand_suite
from modeling_dclip.evaluation.benchmarks.zero_shot import ClassifierCache, evaluate_zero_shot
from modeling_dclip.evaluation.records import BenchmarkResult, Environment, Record, environment, make_record
from modeling_dclip.evaluation.statistics import bootstrap_outcomes
from modeling_dclip.progress import count_of

logger = logging.get_logger(__name__)

NO_DATA = "none"  # fingerprint of a benchmark that reads no data


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        seed (`int`, *optional*, defaults to 0): Of the draw of `@COUNT`, and of everything an evaluation draws.
        batch_size, device, num_workers: As in [`~modeling_dclip.encoders.Encoder`]. No metric depends on them.
        class_names, templates (`Sequence[str]`, *optional*): For `zero_shot`, in place of the data's own.
        classifiers ([`ClassifierCache`], *optional*): For `zero_shot`; by default one in memory.
        kept_texts (`dict`, *optional*): As in [`~modeling_dclip.encoders.Encoder`]; by default a new one.
        index (`str`, *optional*): For `retrieval`: `faiss` or `faiss:FACTORY` in place of exact search.
        hessian (`Mapping[str, str]`, *optional*): For `hessian`: fields of [`HessianOptions`] as texts, such as
            `{"tower": "all"}`.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): `"skip"` decodes every picture of a benchmark before
            it is measured, and leaves out those that cannot be read; the records name them.
        measured_in ([`~modeling_dclip.evaluation.records.Environment`], *optional*): Software and machine of the run,
            for the records; by default read once, here.
    """

    seed: int = 0
    batch_size: int = 64
    device: torch.device | str | None = None
    num_workers: int = 0
    class_names: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    classifiers: ClassifierCache = field(default_factory=ClassifierCache)
    kept_texts: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    index: str | None = None
    hessian: Mapping[str, str] = field(default_factory=dict)
    on_bad_image: str = "raise"
    measured_in: Environment = field(default_factory=lambda: environment())

    def encoder(self, model: DualEncoder, processor: Any) -> Encoder:
        """Put a model and its processor together with how to run them."""
        return Encoder(model, processor, self.batch_size, self.device, self.num_workers, self.kept_texts)


class Benchmark(NamedTuple):
    """A benchmark whose data is loaded.

    Attributes:
        name (`str`): `KIND=SPEC`.
        split (`str`, *optional*): `None` where the source has no splits.
        fingerprint (`str`): Of the data; [`NO_DATA`] for a benchmark that reads none.
        evaluate (`Callable`): Takes an encoder and gives the
            [`~modeling_dclip.evaluation.records.BenchmarkResult`].
        settings (`dict`): What else the metrics depend on.
        image_keys (`Callable`): Gives the keys of its images, which it reads when it is first called.
        notes (`tuple[str, ...]`): What its records say of the data.
    """

    name: str
    split: str | None
    fingerprint: str
    evaluate: Callable[[Encoder], BenchmarkResult]
    settings: dict[str, Any]
    image_keys: Callable[[], list[str]] = list
    notes: tuple[str, ...] = ()


def _short_hash(content: object) -> str:
    return hash_bytes(repr(content))[:16]


def _make(
    name: str,
    spec: Spec,
    dataset: Dataset,
    evaluate: Callable[..., BenchmarkResult],
    settings: dict[str, Any],
    options: EvaluationOptions,
) -> Benchmark:
    """A benchmark of a dataset, which `evaluate` takes as `dataset`."""
    notes: list[str] = []
    if spec.source is CAPTION_SOURCES["held_out"]:
        notes.append(f"{name}: {describe_held_out(spec.fields[0], len(dataset))}")
    if options.on_bad_image == "skip":
        dataset, left_out = leave_out_unreadable(name, spec, dataset)
        notes += left_out
    measure = partial(_measure, evaluate=evaluate, spec=spec, dataset=dataset)
    with _naming_unreadable(spec, dataset):
        fingerprint = dataset_fingerprint(dataset)
    keys = cache(partial(image_keys, dataset))
    return Benchmark(name, spec.split, fingerprint, measure, settings, keys, tuple(notes))


def _measure(
    encoder: Encoder, *, evaluate: Callable[..., BenchmarkResult], spec: Spec, dataset: Dataset
) -> BenchmarkResult:
    with _naming_unreadable(spec, dataset):
        return evaluate(encoder, dataset=dataset)


_MOST_NAMED = 10  # pictures in one message


def _find_unreadable(spec: Spec, dataset: Dataset) -> tuple[set[int], str]:
    """The rows whose picture cannot be read, and a sentence that names them: id, line of the table, file, reason."""
    bad = find_unreadable(dataset, range(len(dataset)))
    places = picture_lines(*spec.fields, **spec.options) if bad and spec.source is CAPTION_SOURCES["csv"] else {}
    named = []
    for one in list(bad.values())[:_MOST_NAMED]:
        line = f"{places[one['file']]}, " if one["file"] in places else ""
        named.append(f"{printable(one['image_id'])} ({line}{printable(one['file'])}): {one['reason']}")
    more = f"; and {len(bad) - _MOST_NAMED:,} more" if len(bad) > _MOST_NAMED else ""
    told = f"{len(bad):,} of {count_of(len(dataset), 'image')} cannot be read: {'; '.join(named)}{more}"
    return set(bad), told


def leave_out_unreadable(name: str, spec: Spec, dataset: Dataset) -> tuple[Dataset, list[str]]:
    """Decode every picture, and leave out those that cannot be read, with a warning that names them.

    Args:
        name (`str`): What messages call the benchmark.
        spec ([`~modeling_dclip.data.specs.Spec`]): Of its data.
        dataset (`datasets.Dataset`): With `image`.

    Returns:
        `tuple[datasets.Dataset, list[str]]`: What is left, and what its records say of the others; empty if there are
            none.

    Raises:
        ValueError: If no picture is left.
    """
    bad, told = _find_unreadable(spec, dataset)
    if not bad:
        return dataset, []
    logger.warning("%s: %s; left out", name, told)
    rows = [row for row in range(len(dataset)) if row not in bad]
    require_rows(len(rows), f"{name} after leaving out {count_of(len(bad), 'image')} that cannot be read", "an image")
    return dataset.select(rows), [f"{name}: {told}; left out"]


@contextmanager
def _naming_unreadable(spec: Spec, dataset: Dataset) -> Iterator[None]:
    """Where a picture cannot be read, name all that cannot be, so that they are mended at once."""
    try:
        yield
    except UnreadableImageError as error:
        bad, told = _find_unreadable(spec, dataset)
        if not bad:
            raise
        advice = "Replace the files, or start again with --on_bad_image skip, which leaves such images out."
        raise UnreadableImageError(f"{told}. {advice}") from error


def _load_retrieval(name: str, spec: Spec, options: EvaluationOptions) -> Benchmark:
    dataset = load_captions(spec, seed=options.seed)
    settings = {"index": options.index} if options.index else {}
    return _make(name, spec, dataset, partial(evaluate_retrieval, index=options.index), settings, options)


def _load_zero_shot(name: str, spec: Spec, options: EvaluationOptions) -> Benchmark:
    loaded = load_classification(spec)
    names, templates = loaded.class_names, list(options.templates or loaded.templates)
    if options.class_names:
        names = read_names(options.class_names, names)
    evaluate = partial(evaluate_zero_shot, class_names=names, templates=templates, classifiers=options.classifiers)
    return _make(name, spec, loaded.dataset, evaluate, {"prompts": _short_hash([names, templates])}, options)


def _load_fine_grained(name: str, spec: Spec, options: EvaluationOptions) -> Benchmark:
    dataset = load_fine_grained(spec)
    return _make(name, spec, dataset, evaluate_fine_grained, {"questions": questions_fingerprint(dataset)}, options)


def _load_diagnostics(name: str, spec: Spec, options: EvaluationOptions) -> Benchmark:
    return _make(name, spec, load_captions(spec, seed=options.seed), evaluate_diagnostics, {}, options)


def _load_hessian(name: str, spec: Spec, options: EvaluationOptions) -> Benchmark:
    if given := sorted({"seed", "batch_size", "device", "num_workers"} & set(options.hessian)):
        raise ValueError(
            f"Expected options of the Hessian alone, got {given[0]!r}. Every benchmark has it: use --{given[0]}."
        )
    chosen = bind_options(HessianOptions, options.hessian, "the Hessian's options")
    dataset = load_captions(spec, seed=options.seed)
    evaluate = partial(evaluate_hessian, options=HessianOptions(**chosen), seed=options.seed)
    return _make(name, spec, dataset, evaluate, chosen, options)


def _load_efficiency(name: str, spec: None, options: EvaluationOptions) -> Benchmark:
    machine = {"machine": _short_hash(options.measured_in.hardware)}  # times of another machine are not kept
    return Benchmark(name, None, NO_DATA, evaluate_efficiency, machine)


def _parse_no_spec(spec: str) -> None:
    if spec:
        raise ValueError(f"Expected 'efficiency' without a spec, as it reads no data, got {spec!r}.")


class Kind(NamedTuple):
    """A kind of benchmark.

    Attributes:
        default_spec (`str`): Its data by default; empty if it reads no data.
        parse (`Callable`): Takes a spec apart; `None` if it reads no data.
        load (`Callable`): Loads a benchmark from its name, its spec and the options.
        forms (`str`): The forms of its specs; empty if it reads no data.
        help (`str`): What it measures.
    """

    default_spec: str
    parse: Callable[[str], Spec | None]
    load: Callable[[str, Any, EvaluationOptions], Benchmark]
    forms: str
    help: str


_LOADERS: dict[str, tuple[Callable[[str], Spec | None], Callable[[str, Any, EvaluationOptions], Benchmark]]] = {
    "retrieval": (parse_caption_spec, _load_retrieval),
    "diagnostics": (parse_caption_spec, _load_diagnostics),
    "hessian": (parse_caption_spec, _load_hessian),
    "zero_shot": (parse_label_spec, _load_zero_shot),
    "fine_grained": (parse_question_spec, _load_fine_grained),
    "efficiency": (_parse_no_spec, _load_efficiency),
}
KINDS = {
    name: Kind(about.default_spec, *_LOADERS[name], about.forms, about.measures) for name, about in KIND_HELP.items()
}


def explain_default(benchmark: str) -> str | None:
    """Say what a benchmark without a spec measures; `None` if it has a spec, or reads no data.

    Example:
        >>> explain_default("zero_shot")
        'zero_shot without a spec is zero_shot=scenes:test: drawn shapes of 64 classes, not photographs.'
        >>> explain_default("zero_shot=parquet:cifar10/*.parquet") is None
        True
    """
    kind, _, spec = benchmark.partition("=")
    if spec or not KINDS[kind_of(benchmark)].default_spec:
        return None
    what = "drawn shapes of 64 classes" if kind == "zero_shot" else "drawn scenes of coloured shapes"
    return f"{kind} without a spec is {kind}={KINDS[kind].default_spec}: {what}, not photographs."


def kind_of(benchmark: str) -> str:
    """Read the kind in `KIND[=SPEC]`.

    Args:
        benchmark (`str`): `KIND[=SPEC]`.

    Returns:
        `str`: A key of [`KINDS`].

    Raises:
        ValueError: If there is no such kind; the message lists the known ones.
    """
    kind = benchmark.partition("=")[0]
    if kind not in KINDS:
        known = ", ".join(f"{name}[=SPEC]" for name in KINDS)
        raise ValueError(f"unknown benchmark {kind!r}; known benchmarks: {known}")
    return kind


def check_benchmark(benchmark: str) -> Spec | None:
    """Say early that a benchmark's kind or spec is wrong. No data are read.

    Returns:
        [`~modeling_dclip.data.specs.Spec`] or `None`: Its spec; `None` of a suite and of one that reads no data.

    Raises:
        ValueError: If the kind, the spec or an option is unknown.
    """
    kind, _, text = benchmark.partition("=")
    if kind == "zero_shot" and text.startswith("suite:"):
        return None
    return KINDS[kind_of(benchmark)].parse(text or KINDS[kind].default_spec)


PROBED_KINDS = ("retrieval", "zero_shot", "fine_grained", "diagnostics")  # they embed, and leave a model as it is


def check_probe(benchmark: str) -> Spec | None:
    """As [`check_benchmark`], of a benchmark that is measured on a model while it trains.

    Returns:
        [`~modeling_dclip.data.specs.Spec`] or `None`: As there.

    Raises:
        ValueError: As there; also if it does more than embed, so that it would touch the training.
    """
    if (kind := kind_of(benchmark)) not in PROBED_KINDS:
        raise ValueError(f"expected a benchmark that only embeds, of {', '.join(PROBED_KINDS)}, got {kind}.")
    return check_benchmark(benchmark)


def find_reported(benchmark: str, reported: Sequence[str]) -> str | None:
    """Find a benchmark among others that reads the same data, however each is written.

    Args:
        benchmark (`str`): `KIND[=SPEC]`.
        reported (`Sequence[str]`): As many others, in the same form. A suite has all its sets.

    Returns:
        `str` or `None`: The first of `reported` that is the same kind on the same data.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: As [`check_benchmark`] and [`expand_benchmark`].

    Example:
        >>> find_reported("zero_shot=scenes:test", ["zero_shot=scenes:validation", "zero_shot"])
        'zero_shot'
    """
    own = {_identity(member) for member in _members(benchmark)}
    return next((one for one in reported if own & {_identity(member) for member in _members(one)}), None)


def _members(benchmark: str) -> list[str]:
    """A benchmark, or the sets of a suite."""
    kind, _, text = benchmark.partition("=")
    is_suite = kind == "zero_shot" and text.startswith("suite:")
    return [f"{kind}={one}" for one in expand_suite(text).specs.values()] if is_suite else [benchmark]


def _identity(benchmark: str) -> tuple[str, ...]:
    """What two ways to write one benchmark have in common: its kind, its source and all options, with defaults."""
    if (spec := check_benchmark(benchmark)) is None:
        return (benchmark,)
    bound = inspect.signature(spec.source.build).bind(*spec.fields, **spec.options)
    bound.apply_defaults()
    # As paths, so that one file has one name; other words change in both alike.
    named = (f"{name}={os.path.realpath(str(value))}" for name, value in sorted(bound.arguments.items()))
    return (kind_of(benchmark), spec.source.form, f"@{spec.count}", *named)


def read_benchmark(benchmark: str, *, begins: str | None = None) -> None:
    """Read a benchmark's data once and drop them: a missing column is told before a training, not after it.

    Of drawn scenes one is drawn. A suite is looked up, not read.

    Args:
        benchmark (`str`): `KIND[=SPEC]`.
        begins (`str`, *optional*): Folder of the run that is about to begin. Its test part is not there yet.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: As the source says.
    """
    kind, _, text = benchmark.partition("=")
    spec = check_benchmark(benchmark)
    if spec is None:
        if text.startswith("suite:"):
            expand_suite(text)
        return
    held_out = Path(spec.fields[0]).resolve() if spec.source is CAPTION_SOURCES["held_out"] else None
    if begins is not None and held_out == Path(begins).resolve():
        return
    if spec.source is CAPTION_SOURCES["scenes"]:
        spec.build(n="1")  # its options are bound when it is built
    elif spec.source in (LABEL_SOURCES["scenes"], QUESTION_SOURCES["scenes"]):
        spec.build(n=1)
    else:
        read: dict[str, Callable[[Spec], Any]] = {"zero_shot": load_classification, "fine_grained": load_fine_grained}
        read.get(kind, load_captions)(spec)


def expand_benchmark(benchmark: str) -> list[str]:
    """Expand `zero_shot=suite:ROOT` to its sets. A warning names the sets that are not there.

    Args:
        benchmark (`str`): `KIND[=SPEC]`.

    Returns:
        `list[str]`: One benchmark for each set; any other benchmark alone.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: As in
            [`~modeling_dclip.evaluation.benchmarks.suite.expand_suite`].
    """
    kind, _, spec = benchmark.partition("=")
    if kind != "zero_shot" or not spec.startswith("suite:"):
        return [benchmark]
    members = expand_suite(spec)
    if members.absent:
        names = ", ".join(members.absent)
        logger.warning("%s: %d sets are not there and left out: %s", spec, len(members.absent), names)
    return [f"zero_shot={member}" for member in members.specs.values()]


def load_benchmark(benchmark: str, options: EvaluationOptions | None = None) -> Benchmark:
    """Load a benchmark's data.

    Args:
        benchmark (`str`): `KIND[=SPEC]`, with a kind of [`KINDS`].
        options ([`EvaluationOptions`], *optional*): How to evaluate; by default its defaults.

    Returns:
        [`Benchmark`]: Ready to evaluate any number of models.

    Raises:
        ValueError: If the kind, the spec or an option is unknown.
    """
    kind = kind_of(benchmark)
    text = benchmark.partition("=")[2] or KINDS[kind].default_spec
    spec = KINDS[kind].parse(text)
    return KINDS[kind].load(f"{kind}={spec}" if spec else kind, spec, options or EvaluationOptions())


def benchmark_record(
    benchmark: Benchmark, result: BenchmarkResult, measured_in: Environment | None = None, **fields: Any
) -> Record:
    """Make the results record of one model on one benchmark.

    Args:
        benchmark ([`Benchmark`]): What was measured.
        result (`BenchmarkResult`): From its `evaluate`. The floats become the metrics, and `outcomes` become intervals
            over images.
        measured_in ([`~modeling_dclip.evaluation.records.Environment`], *optional*): Of the run; read now if not
            given.
        fields: The fields of [`~modeling_dclip.evaluation.records.make_record`] that the two do not know.

    Returns:
        [`~modeling_dclip.evaluation.records.Record`]: Valid for
            [`~modeling_dclip.evaluation.records.write_results`].

    Raises:
        ValueError: If a field is missing, unknown or of another type.
    """
    measured_in = measured_in or environment()
    intervals = None
    outcomes = result.get("outcomes")
    if outcomes and len(next(iter(outcomes.values()))) > 1:  # a single image has no interval
        found = bootstrap_outcomes(outcomes, seed=fields.get("seed", 0))
        intervals = {name: interval.to_dict() for name, interval in found.items()}
    return make_record(
        measured_in,
        benchmark=benchmark.name,
        metrics={name: value for name, value in result.items() if isinstance(value, float)},
        n=result["n"],
        n_captions=result.get("n_captions"),
        split=benchmark.split,
        dataset_fingerprint=benchmark.fingerprint,
        intervals=intervals,
        chance=result.get("chance"),
        spread=result.get("spread"),
        hardware=measured_in.hardware | result.get("measured_with", {}),
        **fields,
    )
