"""Did training help? One line for each model that was measured beside its anchor, from results records or a summary.

A claim ("better", "worse", "lost") is made only where the interval of the difference excludes 0 and one of the two
models does more than guess. Everything else is "not told apart", with the width of the interval.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modeling_dclip.evaluation.line import place_on_line
from modeling_dclip.evaluation.records import Record, arm_of
from modeling_dclip.evaluation.reports.metric_names import metric_of, percent
from modeling_dclip.evaluation.reports.tables import (
    COUNTED,
    interval_cell,
    is_open,
    kind_of_record,
    name_of,
    row_title,
    shorten_benchmark,
    shorten_paths,
)
from modeling_dclip.evaluation.statistics import (
    DIFFERENCE,
    FEWEST_IMAGES,
    GAIN_METRIC,
    RETENTION_METRIC,
    IntervalDict,
    exact_interval,
    excludes_zero,
    seed_interval,
    unpaired_difference,
)
from modeling_dclip.progress import count_of

IMAGE_TO_TEXT = "image_to_text_recall@1"
DIRECTION_WORDS = {GAIN_METRIC: "text to image", IMAGE_TO_TEXT: "image to text"}
# What else is judged, the first that a benchmark has.
OTHER_TITLES = {
    "map": "Zero-shot mAP",
    "group_score": "Fine-grained group score",
    "accuracy": "Fine-grained accuracy",
}
_METHODS = {
    "paired": "95 % intervals over images, paired",
    "unpaired": "95 % intervals over images, as if the images were not the same",
    "seeds": "95 % intervals over training seeds, on one test set",
}
# What to do next, where the numbers leave a question open. Beside the verdicts of a command, not on a card.
MEASURE_ZERO_SHOT = (
    'Zero-shot accuracy shows what a model forgot. eval.py measures it with --benchmark "zero_shot=imagefolder:DIR", '
    'train.py with --evaluate "zero_shot=imagefolder:DIR"; other sets are in docs/evaluating.md, "Zero-shot '
    'classification".'
)
IF_NOT_TOLD_APART = (
    "Not told apart: a larger test part decides more, because intervals narrow with the number of images. See "
    'docs/evaluating.md, "If it did not help".'
)
IF_AT_CHANCE = (
    "Both at chance: start from a model that knows such pictures, and check that each caption describes its own image "
    'only. A larger test part makes neither find more. See docs/evaluating.md, "If it did not help".'
)


class Effect(NamedTuple):
    """How far a model is from its anchor in one metric.

    Attributes:
        metric (`str`): Its name.
        before (`float`), after (`float`): The anchor's value and the model's.
        interval (`IntervalDict`, *optional*): Of the difference, or with `relative` of the gain; `None` if unknown.
        method (`str`): What the interval covers: `"paired"` or `"unpaired"` images, or `"seeds"`.
        n (`int`): How many, with `"seeds"` runs.
        noun (`str`): What was counted: `"image"`, `"question"` or `"seed"`.
        relative (`bool`): Whether the interval is of after / before - 1.
        over_images (`IntervalDict`, *optional*): With `"seeds"`: the interval over images, the mean of those of the
            runs. A claim has to be beyond this noise too, where it is known.
        trained_on (`tuple[int, int]`): How many of the test images the anchor and the model learned from, as far as
            is known; with `"seeds"` the most of any run.
        images (`int`): Test images; 0 where something else was counted.
        chance (`float`, *optional*): What guessing scores; `None` if unknown.
        counted (`int`): Images or questions that a share is of, with `"seeds"` too; 0 if unknown.
        near_zero (`bool`): Whether the anchor's value is so near 0 that tables give no gain or retention.
    """

    metric: str
    before: float
    after: float
    interval: IntervalDict | None
    method: str
    n: int
    noun: str = "image"
    relative: bool = False
    over_images: IntervalDict | None = None
    trained_on: tuple[int, int] = (0, 0)
    images: int = 0
    chance: float | None = None
    counted: int = 0
    near_zero: bool = False

    @property
    def ratio(self) -> float | None:
        """After over before; `None` where the anchor's value is 0 or too near it."""
        return self.after / self.before if self.before > 0 and not self.near_zero else None

    @property
    def guesses(self) -> tuple[bool, bool]:
        """Whether the anchor, and the model, are not above chance by [`is_at_chance`]."""
        before, after = (is_at_chance(share, self.chance, self.counted) for share in (self.before, self.after))
        return before, after

    @property
    def sign(self) -> int:
        """1 for better beyond noise, -1 for worse, 0 for not told apart, as where both guess."""
        if all(self.guesses):
            return 0
        side = 0 if self.interval is None else _side(self.interval, self.n)
        if self.over_images is not None and _side(self.over_images, FEWEST_IMAGES) != side:
            side = 0
        return side if metric_of(self.metric).higher_is_better else -side

    @property
    def half_width(self) -> float | None:
        """Half the interval's width, as a share; `None` if nothing is known.

        It depends on how many images change, so it is of this comparison, and no floor for others. Where no image
        changed, it is the 95 % bound on the share of images that change, 1 - 0.05 ** (1 / n).
        """
        if self.interval is None or self.interval["low"] is None or self.interval["high"] is None:
            return None
        width = self.interval["high"] - self.interval["low"]
        return width / 2 * (self.before if self.relative else 1) or 1 - 0.05 ** (1 / self.n)


def is_at_chance(share: float, chance: float | None, counted: int) -> bool:
    """Whether a share is not above what guessing scores, by [`exact_interval`].

    Args:
        share (`float`): The value of a metric, in [0, 1].
        chance (`float`, *optional*): What guessing scores; `None` if unknown.
        counted (`int`): Images that it is of, also where each has several captions: these are not independent of
            each other. Fewer than [`FEWEST_IMAGES`] show nothing, not even that.

    Example:
        >>> is_at_chance(0.02, 0.01, 100), is_at_chance(0.2, 0.01, 100)
        (True, False)
    """
    if chance is None or counted < FEWEST_IMAGES:
        return False
    low = exact_interval(min(share, 1) * counted, counted).low
    return low is not None and low <= chance


def _side(interval: IntervalDict, n: int) -> int:
    """1 if an interval is above 0, -1 if it is below, else 0."""
    if not excludes_zero(interval, n):
        return 0
    return 1 if interval["low"] is not None and interval["low"] > 0 else -1


_COUNT = re.compile(r",?\bn=\d+|@\d+$")  # how many images a spec takes


class Verdict(NamedTuple):
    """What was found of one model.

    Attributes:
        model (`str`): Its name in tables.
        headline (`str`): Whether it is better, and what that costs, in one or two sentences.
        details (`tuple[str, ...]`): The numbers: a sentence for each metric, and one on what was counted.
        advice (`tuple[str, ...]`): What would answer what is open.
    """

    model: str
    headline: str
    details: tuple[str, ...]
    advice: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All in one line, without the advice."""
        return " ".join([self.headline, *self.details])


def verdict_lines(records: Sequence[Record]) -> list[str]:
    """Say of each model that was measured beside its anchor whether it is better, and at what cost.

    Args:
        records (`Sequence[Record]`): From [`~modeling_dclip.evaluation.records.read_results`]. Runs of one arm with
            several seeds make one line, with intervals over seeds.

    Returns:
        `list[str]`: One line for each model and retrieval benchmark; for a model without retrieval one for its other
            benchmarks. Empty where no record names an anchor.
    """
    return [verdict.text for verdict in judge(records)]


def show_verdicts(records: Sequence[Record]) -> str:
    """[`verdict_lines`] for a terminal: the headline, below it a line for each number, and at the end the advice."""
    verdicts = judge(records)
    lines = ["\n  ".join([verdict.headline, *verdict.details]) for verdict in verdicts]
    return "\n".join([*lines, *advice_of(verdicts)])


def advice_of(verdicts: Sequence[Verdict]) -> list[str]:
    """The advice of several verdicts, each sentence once."""
    return list(dict.fromkeys(line for verdict in verdicts for line in verdict.advice))


def judge(records: Sequence[Record]) -> list[Verdict]:
    """[`verdict_lines`], with the headline apart from the numbers."""
    records = shorten_paths(records)
    verdicts: list[Verdict] = []
    # A model comes before the points on its line.
    for own in sorted(group_models(records), key=lambda own: place_on_line(own[0]) is not None):
        by_benchmark: dict[tuple, list[Record]] = {}
        for record in own:
            key = (record["benchmark"], record["dataset_fingerprint"], repr(record.get("settings", {}).get("index")))
            by_benchmark.setdefault(key, []).append(record)
        groups = list(by_benchmark.values())
        retrieval = [group for group in groups if kind_of_record(group[0]) == "retrieval"]
        others = [group for group in groups if kind_of_record(group[0]) in ("zero_shot", "fine_grained")]
        others, left_out = _leave_out_parts(others)
        for group in retrieval or [[]]:
            verdict = _judge_one(group, others, records)
            if verdict and left_out and len(verdict.details):
                verdict = verdict._replace(details=(*verdict.details, left_out))
            if verdict and verdict not in verdicts:  # the same weights are so on every benchmark
                verdicts.append(verdict)
    return verdicts


def _leave_out_parts(groups: Sequence[list[Record]]) -> tuple[list[list[Record]], str]:
    """Test sets that are no part of a larger one, and the sentence on the others: to count an image once.

    Two are of one source if their specs differ in nothing but how many images they take.
    """
    largest: dict[str, int] = {}
    for group in groups:
        source = _COUNT.sub("", group[0]["benchmark"])
        largest[source] = max(largest.get(source, 0), group[0]["n"])
    kept, parts = [], []
    for group in groups:
        whole = largest[_COUNT.sub("", group[0]["benchmark"])]
        if group[0]["n"] < whole:
            parts.append(
                f"{count_of(group[0]['n'], 'image')} of {_spec(group[0])}, beside {whole:,} of the same source"
            )
        else:
            kept.append(group)
    return kept, f"Not counted: {'; '.join(parts)}." if parts else ""


def group_models(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each model that was measured beside its anchor; all runs of an arm are one model."""
    models: dict[tuple, list[Record]] = {}
    for record in records:
        if "anchor_revision" in record.get("comparison", {}):
            arm, condition = arm_of(record), record.get("condition")
            seeds = {one["seed"] for one in records if arm is not None and arm_of(one) == arm}
            place = (arm, condition) if len(seeds) > 1 else (record["revision"], name_of(record), condition)
            models.setdefault(place, []).append(record)
    return list(models.values())


def _shift(interval: IntervalDict, by: float) -> IntervalDict:
    low, high = (None if end is None else end + by for end in (interval["low"], interval["high"]))
    return {**interval, "estimate": interval["estimate"] + by, "low": low, "high": high}


def _spec(record: Record) -> str:
    return shorten_benchmark(record["benchmark"]).partition("=")[2]


def _judge_one(
    retrieval: Sequence[Record], others: Sequence[Sequence[Record]], records: Sequence[Record]
) -> Verdict | None:
    """The verdict on one model: on one retrieval benchmark, and on all zero-shot and fine-grained ones."""
    first = (retrieval or others[0])[0] if retrieval or others else None
    if first is None:
        return None
    anchor = next(
        (name_of(one) for one in records if _is_anchor(one, first) and "comparison" not in one),
        first["comparison"].get("anchor", "its anchor"),
    )
    arm = arm_of(first) if len(retrieval or others[0]) > 1 else None
    title = row_title(first) if arm is None else ", ".join([arm, *filter(None, [first.get("condition")])])
    effects = {}
    for metric in DIRECTION_WORDS:
        if retrieval and (effect := _measure(retrieval, metric, records)):
            effects[metric] = effect
    zero_shot: list[tuple[str, Effect]] = []
    rest: list[tuple[str, Effect]] = []
    for group in others:
        judged = judged_metric(group[0])
        if judged and (effect := _measure(group, judged, records)):
            (zero_shot if judged == RETENTION_METRIC else rest).append((_spec(group[0]), effect))
    if not (effects or zero_shot or rest):
        return None
    n = f"{count_of(retrieval[0]['n'], 'image')} of {_spec(retrieval[0])}" if retrieval else ""
    if arm is not None:
        n = ", ".join(filter(None, [n, f"{len(retrieval or others[0])} seeds"]))
    if first["revision"] == first["comparison"]["anchor_revision"] and "condition" not in first:
        return Verdict(title, f"{title} has the same weights as {anchor}: there is nothing to tell apart.", ())
    cuts = [
        f"{metric.rpartition('@')[0]}@{k}" for metric, effect in effects.items() if not effect.sign for k in (5, 10)
    ]
    further = [effect for metric in cuts if (effect := _measure(retrieval, metric, records))]
    return compose(title, anchor, effects, zero_shot, rest, n, further)


def judged_metric(record: Record) -> str | None:
    """The metric of a benchmark other than retrieval that a verdict is about; `None` if it has none."""
    names = (RETENTION_METRIC, *OTHER_TITLES) if kind_of_record(record) == "zero_shot" else tuple(OTHER_TITLES)
    return next((name for name in names if name in record["metrics"]), None)


def _is_anchor(record: Record, student: Record) -> bool:
    """Whether a record is the measurement that another one is compared with."""
    return record["revision"] == student["comparison"]["anchor_revision"] and "condition" not in record


def _measure(runs: Sequence[Record], metric: str, records: Sequence[Record]) -> Effect | None:
    """The effect of one model, or over the runs of an arm; `None` if the anchor's value is not known."""
    effects = []
    for run in runs:
        effect = _measure_run(run, metric, records)
        if effect is None:
            return None
        effects.append(_note_training(effect, run, records))
    if len(effects) == 1:
        return effects[0]
    before = sum(one.before for one in effects) / len(effects)
    after = sum(one.after for one in effects) / len(effects)
    interval = seed_interval([one.after - one.before for one in effects]).to_dict()
    over_images = _mean_interval([one.interval for one in effects if one.interval is not None])
    effect = Effect(metric, before, after, interval, "seeds", len(effects), "seed", over_images=over_images)
    first, second = (max(one.trained_on[side] for one in effects) for side in (0, 1))
    one = effects[0]
    near_zero = any(one.near_zero for one in effects)
    effect = effect._replace(trained_on=(first, second), near_zero=near_zero)
    return effect._replace(images=one.images, chance=one.chance, counted=one.counted)


def _note_training(effect: Effect, run: Record, records: Sequence[Record]) -> Effect:
    """Add how many of the test images were trained on, what guessing scores, and whether the anchor is near 0."""
    anchors = [one for one in records if _is_anchor(one, run) and _data_of(one) == _data_of(run)]
    before = next((one["n_trained_on"] for one in anchors if "n_trained_on" in one), 0)
    effect = effect._replace(near_zero=_is_near_zero(effect.metric, run, anchors))
    images = run["n"] if effect.noun == "image" else 0
    chance = chance_of(run, effect.metric)
    return effect._replace(
        trained_on=(before, run.get("n_trained_on", 0)), images=images, chance=chance, counted=run["n"]
    )


def _is_near_zero(metric: str, run: Record, anchors: Sequence[Record]) -> bool:
    """Whether the ratio to the anchor has no upper end, as in tables.

    Only some metrics have their ratio in the record. Of the others the anchor's own interval, which is from the same
    draws of images, says it: it reaches down to 0.
    """
    for suffix in ("_gain", "_retention"):
        if ratio := run["comparison"].get(f"{metric}{suffix}"):
            return is_open(ratio)
    own = [one["intervals"][metric] for one in anchors if metric in one.get("intervals", {})]
    return any(interval["low"] == 0 for interval in own)


def chance_of(record: Record, metric: str) -> float | None:
    """What guessing scores in R@1, or in another metric by the record; `None` if it does not say.

    A guess of one of n images is right once in n; so is a guess of one of their captions, by the mean over the images.
    """
    return 1 / record["n"] if metric in DIRECTION_WORDS and record["n"] else record.get("chance", {}).get(metric)


def _data_of(record: Record) -> tuple[str, str]:
    return record["benchmark"], record["dataset_fingerprint"]


def _measure_run(run: Record, metric: str, records: Sequence[Record]) -> Effect | None:
    """The effect of one run. The difference is in the record; records of earlier versions hold only the gain or the
    retention, or nothing, and then the two models' own intervals are compared.
    """
    if metric not in run["metrics"]:
        return None
    comparison, after, n = run["comparison"], run["metrics"][metric], run["n"]
    noun = COUNTED.get(kind_of_record(run), "image")
    if stored := comparison.get(f"{metric}{DIFFERENCE}"):
        return Effect(metric, after - stored["estimate"], after, stored, "paired", n, noun)
    same = (one for one in records if _data_of(one) == _data_of(run))
    anchor = next((one for one in same if _is_anchor(one, run) and metric in one["metrics"]), None)
    if anchor is None:
        return None
    before = anchor["metrics"][metric]
    for suffix, offset in (("_gain", 0), ("_retention", 1)):
        if ratio := comparison.get(f"{metric}{suffix}"):
            return Effect(metric, before, after, _shift(ratio, -offset), "paired", n, noun, relative=True)
    first, second = (record.get("intervals", {}).get(metric) for record in (anchor, run))
    found = unpaired_difference(first, second) if first and second else None
    return Effect(metric, before, after, found.to_dict() if found else None, "unpaired", n, noun)


def _mean_interval(intervals: Sequence[IntervalDict]) -> IntervalDict | None:
    """The mean of both ends. The runs share their images, so the noise of the images does not average out."""
    lows = [one["low"] for one in intervals if one["low"] is not None]
    highs = [one["high"] for one in intervals if one["high"] is not None]
    if not intervals or not len(lows) == len(highs) == len(intervals):
        return None
    low, high = (math.fsum(ends) / len(ends) for ends in (lows, highs))
    return {**intervals[0], "estimate": (low + high) / 2, "low": low, "high": high}


def compose(
    model: str,
    anchor: str,
    directions: Mapping[str, Effect],
    zero_shot: Sequence[tuple[str, Effect]],
    rest: Sequence[tuple[str, Effect]],
    n: str,
    further: Sequence[Effect] = (),
) -> Verdict:
    """Put the sentences of a verdict together.

    Args:
        model (`str`), anchor (`str`): The two names; a claim is about `model`.
        directions (`Mapping[str, Effect]`): Retrieval, by metric: R@1 of one or both directions.
        zero_shot (`Sequence[tuple[str, Effect]]`): Top-1 by benchmark.
        rest (`Sequence[tuple[str, Effect]]`): What else is judged, by benchmark.
        n (`str`): What was counted, in words.
        further (`Sequence[Effect]`, *optional*): Recalls at other cut-offs, of which those beyond noise are told.
    """
    sentences = [_on_retrieval(model, anchor, directions)] if directions else []
    found = [("", effect) for effect in directions.values()]
    sentences = [_qualify(sentence, found, model, anchor) for sentence in sentences]
    on_zero_shot = _on_zero_shot(zero_shot, model, anchor, alone=not directions)
    sentences.append(_qualify(on_zero_shot, [*zero_shot, *rest], model, anchor))
    details = [
        _show_effect(DIRECTION_WORDS[metric].capitalize() + " R@1", effect) for metric, effect in directions.items()
    ]
    if told := [_show_further(effect) for effect in further if effect.sign]:
        details.append(f"Beyond noise, though R@1 is not: {', '.join(told)}.")
    if len(zero_shot) <= 2:
        details += [_show_effect(f"Zero-shot top-1{spec and f' on {spec}'}", effect) for spec, effect in zero_shot]
    details += [_show_effect(f"{OTHER_TITLES[effect.metric]} on {spec}", effect) for spec, effect in rest]
    effects = [*directions.values(), *(effect for _, effect in [*zero_shot, *rest])]
    methods = dict.fromkeys(_METHODS[effect.method] for effect in effects if effect.interval is not None)
    details.append(f"{'; '.join(filter(None, [n, *methods]))}.")
    advice = [MEASURE_ZERO_SHOT] if directions and not zero_shot else []
    if directions and all(all(one.guesses) for one in directions.values()):
        advice.append(IF_AT_CHANCE)
    elif directions and not any(one.sign for one in directions.values()):
        advice.append(IF_NOT_TOLD_APART)
    return Verdict(model, " ".join(filter(None, sentences)), tuple(details), tuple(advice))


def _qualify(sentence: str, found: Sequence[tuple[str, Effect]], model: str, anchor: str) -> str:
    """Add to a sentence on benchmarks that test images were trained on, if any were."""
    parts = []
    for side, name in ((1, model), (0, anchor)):
        shares = dict.fromkeys(
            f"{_trained_share(effect.trained_on[side], effect.images)}{spec and f' of {spec}'}"
            for spec, effect in found
            if effect.trained_on[side]
        )
        told = f"test images of {len(shares)} sets" if len(shares) > 2 else " and ".join(shares)
        parts += [f"{name} was trained on {told}"] if shares else []
    if not parts:
        return sentence
    return f"{sentence.removesuffix('.')}; {', '.join(parts)}, so this is no evidence for new images."


def _trained_share(trained: int, images: int) -> str:
    return f"{trained:,} of the {images:,} test images" if images else count_of(trained, "test image")


def _on_retrieval(model: str, anchor: str, effects: Mapping[str, Effect]) -> str:
    """The sentence on both directions of retrieval."""
    if all(all(effect.guesses) for effect in effects.values()):
        where = "in both directions" if len(effects) > 1 else DIRECTION_WORDS[next(iter(effects))]
        return f"{model} and {anchor} are both at chance at retrieval (R@1), {where}: neither finds more than a guess."
    signs = {DIRECTION_WORDS[metric]: effect.sign for metric, effect in effects.items()}
    better, worse, open_ = ([name for name, sign in signs.items() if sign == one] for one in (1, -1, 0))
    if better and worse:
        return f"The directions disagree: {model} is better than {anchor} at {better[0]} and worse at {worse[0]}."
    if not better and not worse:
        where = "in both directions" if len(open_) > 1 else open_[0]
        return f"{model} and {anchor} are not told apart at retrieval (R@1), {where}."
    word, sure = ("better", better) if better else ("worse", worse)
    if not open_:
        where = "in both directions" if len(sure) > 1 else sure[0]
        return f"{model} is {word} than {anchor} at retrieval (R@1), {where}."
    return (
        f"{model} is {word} than {anchor} at retrieval (R@1) from {sure[0]}; from {open_[0]} they are not told apart."
    )


def _on_zero_shot(found: Sequence[tuple[str, Effect]], model: str, anchor: str, *, alone: bool) -> str:
    """The sentence on zero-shot accuracy; with `alone` it names the models."""
    who = f"{model} against {anchor}: " if alone else ""
    if not found:
        return f"{who}Zero-shot accuracy was not measured." if not alone else f"{model} against {anchor}."
    ratios = [effect.ratio for _, effect in found if effect.ratio is not None]
    kept = f"{percent(sum(ratios) / len(ratios))} % of {anchor}'s" if ratios else ""
    signs = [effect.sign for _, effect in found]
    if len(found) > 2:
        kept = f"{kept} on average of {len(ratios)} sets" if ratios else ""
        counted = f"lower beyond noise on {signs.count(-1)} of {len(found)} sets, higher on {signs.count(1)}"
        return f"{who}Zero-shot accuracy is {counted}{kept and f'; {kept}'}."
    words = {1: "rose beyond noise", -1: "fell beyond noise", 0: "did not change beyond noise"}
    kept = kept and f", now {kept}"
    if all(all(effect.guesses) for _, effect in found):
        return f"{who}Zero-shot accuracy is at chance for both, so it shows nothing that could be forgotten."
    if len(set(signs)) > 1:
        parts = "; ".join(f"{words[sign]} on {spec}" for sign, (spec, _) in zip(signs, found, strict=True))
        return f"{who}Zero-shot accuracy {parts}{kept and f'{kept} on average'}."
    return f"{who}Zero-shot accuracy {words[signs[0]]}{kept}."


def _show_further(effect: Effect) -> str:
    metric, word = metric_of(effect.metric), "better" if effect.sign > 0 else "worse"
    return f"{metric.title} {metric.show(effect.before)} → {metric.show(effect.after)} % ({word})"


def _show_effect(title: str, effect: Effect) -> str:
    """One metric: both values, the difference with its interval, and what noise allows to say."""
    metric = metric_of(effect.metric)
    points = f"{metric.show(effect.after - effect.before, signed=True)} points"
    if all(effect.guesses):
        gain = ""  # of a guess
    elif effect.ratio is not None:
        gain = f"{percent(effect.ratio - 1, signed=True)} % relative"
    elif effect.before > 0:
        gain = f"no gain in percent, because {metric.show(effect.before)} is too uncertain to divide by"
    else:
        gain = f"not given in percent of {metric.show(effect.before)}"
    if effect.interval is not None and not effect.relative:
        points = f"{points} {_brackets(effect.interval)}"
    elif effect.interval is not None and effect.ratio is not None and gain:
        gain = f"{gain} {_brackets(effect.interval)}"
    values = f"{title} {metric.show(effect.before)} → {metric.show(effect.after)} %"
    return f"{values}: {', '.join(filter(None, [points, gain]))}{_explain_noise(effect)}."


def _brackets(interval: IntervalDict) -> str:
    return interval_cell({**interval, "covers": "images"}, signed=True).interval


def _explain_noise(effect: Effect) -> str:
    """Why nothing is claimed, where nothing is."""
    at_chance, guesses = f"at chance, which is {percent(effect.chance or 0)} %", effect.guesses
    if all(guesses):
        return f" (both {at_chance})"
    if effect.sign:
        return f" (now {at_chance})" if guesses[1] else ""
    if effect.method != "seeds" and effect.n < FEWEST_IMAGES:
        return f" ({count_of(effect.n, effect.noun)} cannot show a difference; take hundreds)"
    if effect.half_width is None or math.isinf(effect.half_width):
        return " (no interval)"
    if effect.interval is not None and effect.method == "seeds":
        if effect.interval["low"] == effect.interval["high"]:
            return f" (the same for all {effect.n} seeds)"
        if _side(effect.interval, effect.n):
            return " (beyond the noise of the seeds, within that of the images)"
    width, these = f"{percent(effect.half_width)} points", count_of(effect.n, effect.noun)
    if effect.interval is not None and effect.interval["low"] == effect.interval["high"]:
        return f" (none of these {these} changed; that leaves up to {width})"
    return f" (within noise: with these {these} the interval is ±{width}, and smaller differences are not seen)"
