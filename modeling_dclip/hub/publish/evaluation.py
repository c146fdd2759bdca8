"""What a card says of a model's results: which records are of these weights, and each benchmark as a small table."""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from modeling_dclip.data.captions.parts import (
    HELD_OUT,
    find_held_out,
    read_held_out_keys,
    read_overlap,
    read_trained_images,
)
from modeling_dclip.data.failures import FAILURES, one_line
from modeling_dclip.data.files import list_folder, read_bytes, show_script
from modeling_dclip.evaluation.benchmarks.kinds import NO_DATA
from modeling_dclip.evaluation.records import Record, read_results
from modeling_dclip.evaluation.reports.document import Cell, Table, render_markdown
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.evaluation.reports.tables import ABSENT, COUNTED, KIND_TITLES, interval_of
from modeling_dclip.evaluation.reports.verdict import DIRECTION_WORDS, Verdict, chance_of, is_at_chance, judge
from modeling_dclip.evaluation.statistics import FEWEST_IMAGES, RETENTION_METRIC, IntervalDict
from modeling_dclip.hub.publish.training import describe_source, find_overlaps, show_spec
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

# What a card shows of a record, by the record's field. Reading a results file does not check these.
SHOWN_FIELDS = {"hardware": ("gpus", "cpu", "torch_threads"), "versions": ("torch", "transformers")}
INTERVAL_FIELDS = ("low", "high", "covers", "confidence")
BEFORE = "before training"
# Fewer test images are a limit of the results: with 500 images a share's 95 % interval is up to 9 points wide.
FEW_TEST_IMAGES = 500
# What a guess is compared with, by the kind of benchmark.
GUESSED = {"retrieval": tuple(DIRECTION_WORDS), "zero_shot": (RETENTION_METRIC,)}
MODEL_SETTINGS = ("alpha", "anchor_revision")  # of a record: they say which weights, not what was asked


class BenchmarkFacts(NamedTuple):
    """One benchmark: what was measured, on how much, the spec that names the data, and the table in Markdown."""

    title: str
    size: str
    spec: str
    table: str


class FewTested(NamedTuple):
    """A benchmark of few images: its spec, how many they are, and the widest interval of a share, in words."""

    spec: str
    size: str
    widest: str


class Forgotten(NamedTuple):
    """A zero-shot benchmark that the model does worse on than before training, beyond noise, in words.

    Attributes:
        spec (`str`): Names the benchmark.
        kept (`str`): The share of the accuracy before training that is left, with its interval.
    """

    spec: str
    kept: str


class AtChance(NamedTuple):
    """A benchmark on which the model does no better than a guess.

    Attributes:
        spec (`str`): Names the benchmark.
        task (`str`): What was asked, in words; of retrieval only the directions that are at chance.
    """

    spec: str
    task: str


class Standing(NamedTuple):
    """What is known of a task that a guess can be compared with.

    Attributes:
        measured (`bool`): Whether a benchmark asked it.
        above_chance (`bool`): Whether the model does better than a guess in it, on one benchmark at least.
        at_chance (`bool`): Whether all that was measured does no better than a guess.
    """

    measured: bool
    above_chance: bool
    at_chance: bool


class EvaluationFacts(TypedDict):
    """Results of a model: `verdicts`, `benchmarks`, their `records`, what to know of them, how they were measured.

    `trained_on` says by benchmark how many images were trained on; an empty text where only the dataset is known.
    `passed_over` names the results that a newer one replaces. `few_tested`, `forgotten` and `at_chance` are limits of
    the model. `retrieval` and `zero_shot` say what the model may be offered for.
    """

    benchmarks: list[BenchmarkFacts]
    records: list[Record]
    trained_on: dict[str, str]
    held_out: list[str]
    is_synthetic: bool
    interval: str | None
    hardware: str
    versions: str
    has_reference: bool
    role: str
    verdicts: list[Verdict]
    passed_over: list[str]
    few_tested: list[FewTested]
    forgotten: list[Forgotten]
    at_chance: list[AtChance]
    retrieval: Standing
    zero_shot: Standing


def find_results(model: str) -> list[str]:
    """Find the results of a run: its folder `results`, which train.py writes, and its file `results.json`, where the
    documentation lets eval.py write. They lie beside the model's folder, or up to two folders above it.

    Args:
        model (`str`): The model's folder, such as `outputs/mine/student`.

    Returns:
        `list[str]`: The folder, the file, or both.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(model).absolute()
    for above in list(folder.parents)[:3]:
        found = [above / name for name in ("results", "results.json")]
        if above != Path.cwd() and (found := [path for path in found if path.exists()]):
            return [os.path.relpath(path) for path in found]
    raise FileNotFoundError(
        f"results: expected results of '{model}', got none, and neither 'results' nor 'results.json' beside it. "
        f"Evaluate it: `python {show_script('eval.py')} --model {model} --benchmark retrieval=SPEC --output FILE`, "
        "then give --results FILE."
    )


def read_all_results(paths: Sequence[str]) -> list[Record]:
    """Read the records of results files, and of all results files in folders.

    Args:
        paths (`Sequence[str]`): Files or folders. Summaries and other JSON files in a folder are skipped.

    Returns:
        `list[Record]`: All records, in the order of the files' names.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder holds no results.
        ValueError: If a results file is not valid.
    """
    records = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"Expected a results file or a folder of them at '{path}', got nothing.")
        files = list_folder(path, "*.json") if path.is_dir() else [path]
        # A results file is a list; a summary beside it is an object.
        files = [file for file in files if file == path or read_bytes(file).lstrip().startswith(b"[")]
        if not files:
            raise FileNotFoundError(f"Expected results files in '{path}', got none. Run eval.py with --output there.")
        for file in files:
            for index, record in enumerate(read_results(file)):
                check_shown(record, f"record {index} of {file}")
                records.append(record)
    return records


def check_shown(record: Record, where: str) -> None:
    """Check the values of a record that a card shows: a results file may have been edited by hand.

    Args:
        record (`Record`): A record that is valid for [`~modeling_dclip.evaluation.records.validate_record`].
        where (`str`): Its file and position, for messages.

    Raises:
        ValueError: If a field is missing, or a share is not in [0, 1].
    """
    values, intervals = dict(record), record.get("intervals", {})
    fields: dict[str, tuple[object, tuple[str, ...]]] = {
        name: (values[name], needed) for name, needed in SHOWN_FIELDS.items()
    }
    fields |= {f"intervals / {name}": (interval, INTERVAL_FIELDS) for name, interval in intervals.items()}
    for name, (found, needed) in fields.items():
        if not isinstance(found, dict) or not set(needed) <= set(found):
            raise ValueError(f"Expected {', '.join(needed)} in {name!r} of {where}, got {found!r}. Evaluate again.")
    for name, value in record["metrics"].items():
        if metric_of(name).unit == "%" and not 0 <= value <= 1 + 1e-9:
            raise ValueError(
                f"Expected a share in [0, 1] in 'metrics' / {name!r} of {where}, got {value!r}. Evaluate again."
            )


def select_records(
    records: Sequence[Record], revision: str, model: str, results: Sequence[str]
) -> tuple[list[Record], list[Record]]:
    """Select the records of exactly these weights, and those of the model that they are compared with.

    Args:
        records (`Sequence[Record]`): All records that were read.
        revision (`str`): The revision of the weights.
        model (`str`): The model's folder, for messages.
        results (`Sequence[str]`): Where the records were read, for messages.

    Returns:
        `tuple[list[Record], list[Record]]`: The newest record on each data of a kind of benchmark, whatever name the
        benchmark has: of this model, and of the reference on the same data. Held-out images of the own data come
        first.

    Raises:
        ValueError: If no record is of these weights.
    """
    own = _newest(record for record in records if record["revision"] == revision and "condition" not in record)
    if not own:
        models = sorted({record["model"] for record in records})
        raise ValueError(
            f"Expected results of the weights in '{model}' ({revision[:19]}...) in {', '.join(results)}, got only "
            f"results of {', '.join(models)} with other weights. Evaluate these weights: python "
            f"{show_script('eval.py')} --model {model} --benchmark retrieval=SPEC --output FILE."
        )
    references = {
        record["comparison"]["anchor_revision"] for record in own if "anchor_revision" in record.get("comparison", {})
    }
    measured = set(map(_data_of, own))
    others = (
        record for record in records if record["revision"] in references - {revision} and "condition" not in record
    )
    own.sort(key=lambda record: not _held_out_run(record["benchmark"]))
    return own, _newest(record for record in others if _data_of(record) in measured)


def find_passed_over(records: Sequence[Record], own: Sequence[Record]) -> list[str]:
    """Name the records of these weights that are left out because a newer one has their data or their name.

    Args:
        records (`Sequence[Record]`): All records that were read.
        own (`Sequence[Record]`): Those of the weights that [`select_records`] chose.

    Returns:
        `list[str]`: The benchmark and the time of each, and the one that is shown; the oldest first.
    """
    by_data = {_data_of(record): record for record in own}
    by_name = {record["benchmark"]: record for record in own}
    revisions = {record["revision"] for record in own}
    left = []
    for record in sorted(records, key=lambda record: record["created"]):
        kept = by_data.get(_data_of(record)) or by_name.get(record["benchmark"])
        if record["revision"] not in revisions or "condition" in record or kept is None:
            continue
        if kept["created"] > record["created"]:
            shown = f"{kept['benchmark']} of {kept['created'][:16]}"
            left.append(f"{record['benchmark']} of {record['created'][:16]} (shown: {shown})")
    return list(dict.fromkeys(left))


def _held_out_run(benchmark: str) -> str:
    """The run whose test part a benchmark is of; an empty text if it is something else."""
    spec = benchmark.partition("=")[2]
    return re.split("[,@]", spec.partition(":")[2])[0] if spec.startswith(f"{HELD_OUT}:") else ""


class Seen(NamedTuple):
    """What is known of a benchmark's images and a model's training.

    Attributes:
        benchmark (`str`): `KIND=SPEC`, without folders of this machine.
        held_out (`bool`): They are of the part that the model's own run held out, and the model learned from none.
        trained_on (`str`): How many it learned from, in words; empty if none, or not known.
    """

    benchmark: str
    held_out: bool
    trained_on: str


def find_seen(records: Sequence[Record], revision: str, model: str) -> list[Seen]:
    """Find for each benchmark of these weights whether the model learned from its images.

    The records say how many, and where they do not, the keys of the images do: those that training wrote beside the
    weights, and those of the test part. Of a test part it is claimed only if both are there and have none in common.

    Args:
        records (`Sequence[Record]`): With the benchmarks as they were measured, with their folders.
        revision (`str`): The revision of the weights.
        model (`str`): The model's folder; it lies in the run's folder, or in that of an arm and a seed in it.
    """
    own = [record for record in records if record["revision"] == revision and "condition" not in record]
    own.sort(key=lambda record: record["created"])
    names = {show_spec(record["benchmark"]): record for record in own}  # the newest
    by_data: dict[tuple[str, ...], list[tuple[bool, str]]] = {}
    for record in names.values():
        overlap = _count_trained_on(record, model)
        number, of = overlap or (0, 0)
        words = f"{number:,} of the {of:,} images" if number else ""
        held_out = overlap is not None and not number and _is_own_test_part(record["benchmark"], model)
        by_data.setdefault(_data_of(record), []).append((held_out, words))
    seen = []
    for benchmark, record in names.items():  # what is known of data under one name holds under the others
        known = by_data[_data_of(record)]
        trained_on = max((words for _, words in known), key=len)
        seen.append(Seen(benchmark, not trained_on and any(held_out for held_out, _ in known), trained_on))
    return seen


def _count_trained_on(record: Record, model: str) -> tuple[int, int] | None:
    """How many of a benchmark's images a model learned from, and of how many; `None` if that is not known."""
    for note in record.get("notes", []):
        if (found := read_overlap(str(note))) is not None:
            return found
    run, trained = _held_out_run(record["benchmark"]), read_trained_images(model)
    if not run or trained is None:
        return None
    try:
        keys = read_held_out_keys(run)
    except FileNotFoundError:  # the run is no longer there
        return None
    return trained.count_overlap(keys), len(keys)


def _is_own_test_part(benchmark: str, model: str) -> bool:
    """Whether a benchmark is of the images that the model's own run held out."""
    try:
        return find_held_out(_held_out_run(benchmark)) == find_held_out(model)
    except FileNotFoundError:  # one of the two is no longer there: nothing is claimed
        return False


def _newest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each name, and of these the newest on each data."""
    in_order = sorted(records, key=lambda record: record["created"])
    by_name = {record["benchmark"]: record for record in in_order}
    by_data = {_data_of(record): record for record in in_order if by_name[record["benchmark"]] is record}
    return list(by_data.values())


def _data_of(record: Record) -> tuple[str, ...]:
    """What a benchmark asks of which data, such as its questions; one that reads no data has only its name."""
    fingerprint = record["dataset_fingerprint"]
    kind = record["benchmark"] if fingerprint == NO_DATA else record["benchmark"].partition("=")[0]
    asked = {name: value for name, value in (record.get("settings") or {}).items() if name not in MODEL_SETTINGS}
    return kind, fingerprint, str(record["n"]), repr(sorted(asked.items()))


def describe_evaluation(
    own: Sequence[Record],
    reference: Sequence[Record],
    name: str,
    *,
    start: str | None = None,
    training: Sequence[str] = (),
    seen: Sequence[Seen] = (),
    passed_over: Sequence[str] = (),
) -> EvaluationFacts:
    """Make a table of each benchmark, and say with what it was measured.

    Args:
        own (`Sequence[Record]`): The records of this model.
        reference (`Sequence[Record]`): The records of the model that it is compared with.
        name (`str`): The name of this model in the tables.
        start (`str`, *optional*): The name of the reference if training started from it: then a verdict is given.
        training (`Sequence[str]`, *optional*): Specs of the training data: a benchmark on them is marked.
        seen (`Sequence[Seen]`, *optional*): From [`find_seen`]: benchmarks that are marked too.
        passed_over (`Sequence[str]`, *optional*): From [`find_passed_over`].

    Returns:
        [`EvaluationFacts`]
    """
    before = {_data_of(record): record for record in reference}
    role = BEFORE if start or not reference else _name_of(reference[0])
    machines = {_machine(record["hardware"]) for record in own}
    versions = {f"{package} {record['versions'][package]}" for record in own for package in SHOWN_FIELDS["versions"]}
    levels = {
        interval["confidence"]
        for record in (*own, *reference)
        for interval in record.get("intervals", {}).values()
        if interval["covers"] == "images" and interval["low"] is not None
    }
    return EvaluationFacts(
        benchmarks=[describe_benchmark(record, before.get(_data_of(record)), name, role) for record in own],
        records=list(own),
        trained_on=dict.fromkeys(find_overlaps([record["benchmark"] for record in own], training), "")
        | {one.benchmark: one.trained_on for one in seen if one.trained_on},
        held_out=[one.benchmark for one in seen if one.held_out],
        is_synthetic=any(record["benchmark"].partition("=")[2].startswith("scenes:") for record in own),
        interval=f"{max(levels):.0%}" if levels else None,
        hardware=", ".join(sorted(machines)),
        versions=", ".join(sorted(versions)),
        has_reference=bool(reference),
        role=role,
        verdicts=merge_verdicts(judge([*_named(reference, start), *_named(own, name)])) if start else [],
        passed_over=list(passed_over),
        few_tested=[_describe_few(record) for record in own if record["n"] < FEW_TEST_IMAGES],
        forgotten=find_forgotten(own) if start else [],
        at_chance=find_at_chance(own),
        retrieval=_find_standing(own, "retrieval"),
        zero_shot=_find_standing(own, "zero_shot"),
    )


def find_forgotten(records: Sequence[Record]) -> list[Forgotten]:
    """Find the zero-shot benchmarks on which a model lost accuracy beyond noise: the whole interval is below 100 %.

    Args:
        records (`Sequence[Record]`): Of a model, compared with the one that its training started from.

    Returns:
        `list[Forgotten]`: In the order of the records.
    """
    found = []
    for record in records:
        kept = record.get("comparison", {}).get(f"{RETENTION_METRIC}_retention")
        if kept and kept["high"] is not None and kept["high"] < 1 and record["n"] >= FEWEST_IMAGES:
            words = f"{_percent(kept['estimate'])} {range_in_words(kept, _percent)}"
            found.append(Forgotten(record["benchmark"], words))
    return found


def find_at_chance(records: Sequence[Record]) -> list[AtChance]:
    """Find the benchmarks of retrieval and of zero-shot classification on which a model does no better than a guess.

    Args:
        records (`Sequence[Record]`): Of a model.

    Returns:
        `list[AtChance]`: In the order of the records.
    """
    found = []
    for record in records:
        guessed = [metric for metric, at_chance in _compare_with_chance(record).items() if at_chance]
        directions = " and ".join(f"from {DIRECTION_WORDS[metric]}" for metric in guessed if metric in DIRECTION_WORDS)
        if guessed:
            task = f"retrieval {directions}" if directions else "zero-shot classification"
            found.append(AtChance(record["benchmark"], task))
    return found


def _compare_with_chance(record: Record) -> dict[str, bool]:
    """Which of a record's metrics in [`GUESSED`] are at chance; none where too few images or no chance can tell."""
    asked = GUESSED.get(record["benchmark"].partition("=")[0], ())
    chances = {name: chance_of(record, name) for name in asked if name in record["metrics"]}
    return {
        name: is_at_chance(record["metrics"][name], chance, record["n"])
        for name, chance in chances.items()
        if chance is not None and record["n"] >= FEWEST_IMAGES
    }


def _find_standing(records: Sequence[Record], kind: str) -> Standing:
    of_kind = [record for record in records if record["benchmark"].partition("=")[0] == kind]
    guesses = [at_chance for record in of_kind for at_chance in _compare_with_chance(record).values()]
    return Standing(bool(of_kind), not all(guesses), bool(guesses) and all(guesses))


def warn_of_chance(model: str, revision: str, kinds: Sequence[str] = ("retrieval",)) -> str:
    """Say that a model is known to guess, by the results of the run that its folder lies in.

    Args:
        model (`str`): Its folder; of anything else nothing is known here.
        revision (`str`): The revision of its weights: results of others are not of it.
        kinds (`Sequence[str]`, *optional*): What it is used for: `retrieval`, `zero_shot`.

    Returns:
        `str`: One line; empty if nothing of the kind was measured, or it does better than a guess throughout. If the
            results cannot be read, that is logged.
    """
    if not Path(model).is_dir():
        return ""
    try:
        records = read_all_results(find_results(model))
    except FileNotFoundError:
        return ""
    except FAILURES as error:
        logger.warning("What was measured of '%s' is not known: %s", model, one_line(error))
        return ""
    own = _newest(one for one in records if one["revision"] == revision and "condition" not in one)
    asked = [one for one in without_paths(own) if one["benchmark"].partition("=")[0] in kinds]
    if not (found := find_at_chance(asked)):
        return ""
    places = "; ".join(f"in {one.task} on {one.spec.partition('=')[2]}" for one in found)
    return f"At chance: {places} this model does no better than a guess. What it answers there means nothing."


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _describe_few(record: Record) -> FewTested:
    """A benchmark of few images, with the widest interval of the shares that the card shows of it."""
    shown = (name for name in record["metrics"] if _is_shown(name, record["metrics"]) and metric_of(name).unit == "%")
    intervals = (interval_of(record, name) for name in shown)
    widths = [one["high"] - one["low"] for one in intervals if one["low"] is not None and one["high"] is not None]
    widest = f"{100 * max(widths):.0f}" if widths else ""
    kind = record["benchmark"].partition("=")[0]
    return FewTested(record["benchmark"], count_of(record["n"], COUNTED.get(kind, "image")), widest)


def merge_verdicts(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Make one of the verdicts that say the same of several benchmarks.

    Its details are then a line for each, and what both say, as of the zero-shot accuracy, stands in the first.

    Example:
        >>> one, other = (Verdict("m", "It helped.", (f"R@1 {number} %.", "Top-1 5 %.")) for number in (2, 3))
        >>> merge_verdicts([one, other])
        [Verdict(model='m', headline='It helped.', details=('R@1 2 %. Top-1 5 %.', 'R@1 3 %.'), advice=())]
    """
    same: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        same.setdefault((verdict.model, verdict.headline), []).append(verdict)
    merged = []
    for found in same.values():
        lines, said = [], set[str]()
        for one in found:
            lines.append(" ".join(line for line in one.details if line not in said))
            said |= set(one.details)
        merged.append(found[0] if len(found) == 1 else found[0]._replace(details=tuple(lines)))
    return merged


def describe_benchmark(record: Record, before: Record | None, name: str, role: str) -> BenchmarkFacts:
    """One benchmark of a model as a table: a row for each metric, a column for each model.

    Args:
        record, before ([`Record`]): Of this model, and of the reference on the same benchmark if there is one.
        name, role (`str`): The names of the two in the table.

    Returns:
        [`BenchmarkFacts`]
    """
    kind, _, spec = record["benchmark"].partition("=")
    names = [metric for metric in record["metrics"] if _is_shown(metric, record["metrics"])]
    header = ["", *([role] if before else []), name]
    rows: list[list[str | Cell]] = []
    for metric in names:
        known, cells = metric_of(metric), [one for one in (before, record) if one is not None]
        rows.append([known.title, *(_cell(one, metric) for one in cells)])
        if before and metric in before["metrics"] and known.unit in ("%", "of 600"):
            header = ["", role, name, "change, in points" if role == BEFORE else "difference, in points"]
            change = record["metrics"][metric] - before["metrics"][metric]
            rows[-1].append(known.show(change, signed=True))
    rows = [[*row, *([ABSENT] * (len(header) - len(row)))] for row in rows]
    size = count_of(record["n"], COUNTED.get(kind, "image"))
    if "n_captions" in record:
        size += f" with {count_of(record['n_captions'], 'caption')}"
    words = describe_source(spec).words if spec else kind
    title = f"{KIND_TITLES.get(kind, kind.replace('_', ' ').capitalize())} on {words}"
    return BenchmarkFacts(title, size, record["benchmark"], render_markdown([Table(header, rows)]))


def _name_of(record: Record) -> str:
    """A model's name without folders of this machine."""
    return Path(record["model"]).name if Path(record["model"]).is_dir() else show_spec(record["model"])


def _is_shown(metric: str, metrics: Mapping[str, float]) -> bool:
    """Whether a metric says what no other row does; the metadata hold all."""
    if metric == "mean_per_class":
        return metrics[metric] != metrics.get("top1")
    return not metric.endswith(("_mrr", "_map", "_median_rank")) and metric != "rsum"


def _cell(record: Record, metric: str) -> str:
    """A value with its interval in words: `36.5 (32.3 to 40.7)`."""
    if metric not in record["metrics"]:
        return ABSENT
    known, interval = metric_of(metric), interval_of(record, metric)
    value = known.show(record["metrics"][metric])
    return f"{value} {range_in_words(interval, known.show)}".rstrip()


def range_in_words(interval: IntervalDict, show: Any) -> str:
    """An interval as a person would write it.

    Example:
        >>> bounds = {"estimate": 2.0, "low": 1.0, "high": None, "confidence": 0.95, "covers": "images"}
        >>> range_in_words(bounds, str)
        '(at least 1.0)'
    """
    low, high = interval["low"], interval["high"]
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f"(at most {show(high)})" if low is None else f"(at least {show(low)})"
    return f"({show(low)} to {show(high)})"


def _machine(hardware: Mapping[str, Any]) -> str:
    if hardware["gpus"]:
        return ", ".join(hardware["gpus"])
    return f"{hardware['cpu']} with {count_of(hardware['torch_threads'], 'thread')}"


def _named(records: Sequence[Record], label: str) -> list[Record]:
    return [cast("Record", {**record, "label": label}) for record in records]


def without_paths(records: Sequence[Record]) -> list[Record]:
    """Records whose benchmarks name no folder of this machine."""
    return [cast("Record", {**record, "benchmark": show_spec(record["benchmark"])}) for record in records]
