"""What is known about a metric by its name: the title to show, the unit, and which direction is better.

A new metric needs an entry here, and nothing else, to be shown with its title and unit everywhere.
"""

import re
from collections.abc import Callable
from typing import NamedTuple


def percent(value: float, *, signed: bool = False) -> str:
    """Show a share as a percentage with one decimal: 0.1234 -> "12.3"."""
    return _decimals(100 * value, 1, signed)


def _decimals(value: float, digits: int, signed: bool) -> str:
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    zero = f"{0:.{digits}f}"
    return zero if text.lstrip("+-") == zero else text


def _digits(value: float, signed: bool) -> str:
    """Three significant digits, or more before the point."""
    sign = "+" if signed else ""
    if value == 0:
        return "0"
    return f"{value:{sign},.0f}" if abs(value) >= 99.95 else f"{value:{sign}#.3g}".removesuffix(".")


def _plain(value: float, signed: bool) -> str:
    sign = "+" if signed else ""
    if abs(value) >= 1000:
        return f"{value:{sign},.0f}"
    return "0" if value == 0 else f"{value:{sign}.4g}"


_SHOW: dict[str, Callable[[float, bool], str]] = {
    "%": lambda value, signed: percent(value, signed=signed),
    "of 600": lambda value, signed: percent(value, signed=signed),  # six percentages added
    "rank": lambda value, signed: _decimals(value, 1, signed).removesuffix(".0"),
    "distance": lambda value, signed: _decimals(value, 3, signed),
    "ms": _digits,
    "per s": _digits,
    "million": lambda value, signed: _decimals(value, 1, signed),
    "GFLOP": _digits,
    "MiB": lambda value, signed: _decimals(value, 0, signed),
    "": _plain,
}


class Metric(NamedTuple):
    """What is known about one metric.

    Attributes:
        title (`str`): To show.
        unit (`str`): `"%"` for a share in [0, 1], which is shown in percent; `""` if nothing is known.
        higher_is_better (`bool`, *optional*): `None` if neither direction is better.
    """

    title: str
    unit: str
    higher_is_better: bool | None

    def show(self, value: float, *, signed: bool = False) -> str:
        """Format a value for a table, without the unit; with `signed`, format a difference of two values."""
        return _SHOW[self.unit](value, signed)

    def in_unit(self, value: float) -> float:
        """The number as it is shown, for axes: shares times 100."""
        return 100 * value if self.unit in ("%", "of 600") else value

    @property
    def heading(self) -> str:
        """The title with the unit; without it for shares, because their table says percent once."""
        return self.title if self.unit in ("", "%", "of 600", "rank", "distance") else f"{self.title}, {self.unit}"


_RANKING = {
    "recall@1": ("R@1", "%", True),
    "recall@5": ("R@5", "%", True),
    "recall@10": ("R@10", "%", True),
    "mrr": ("MRR", "%", True),
    "map": ("mAP", "%", True),
    "median_rank": ("median rank", "rank", False),
}
METRICS: dict[str, Metric] = {
    f"{direction}_{name}": Metric(f"{arrow} {title}", unit, higher)
    for direction, arrow in {"text_to_image": "T→I", "image_to_text": "I→T"}.items()
    for name, (title, unit, higher) in _RANKING.items()
}
METRICS |= {
    "rsum": Metric("R-sum", "of 600", True),
    "top1": Metric("top-1", "%", True),
    "top5": Metric("top-5", "%", True),
    "mean_per_class": Metric("mean per class", "%", True),
    "map": Metric("mAP", "%", True),
    "accuracy": Metric("accuracy", "%", True),
    "text_score": Metric("text score", "%", True),
    "image_score": Metric("image score", "%", True),
    "group_score": Metric("group score", "%", True),
    "modality_gap": Metric("modality gap", "distance", None),
    "alignment": Metric("alignment ↓", "distance", False),
    "image_uniformity": Metric("image uniformity ↓", "distance", False),
    "text_uniformity": Metric("text uniformity ↓", "distance", False),
    "hessian_eigenvalue_min": Metric("smallest Hessian eigenvalue", "", None),
    "contrastive_loss": Metric("contrastive loss, nats", "distance", False),
    "image_latency_ms": Metric("image latency", "ms", False),
    "text_latency_ms": Metric("text latency", "ms", False),
    "image_throughput_per_s": Metric("images", "per s", True),
    "text_throughput_per_s": Metric("texts", "per s", True),
    "parameters_millions": Metric("parameters", "million", False),
    "image_gflop": Metric("an image", "GFLOP", False),
    "peak_memory_mib": Metric("peak memory", "MiB", False),
    "text_to_teacher_recall@1": Metric("sentence→teacher R@1", "%", True),
    "teacher_to_text_recall@1": Metric("teacher→sentence R@1", "%", True),
}
METRIC_TITLES = {name: metric.title for name, metric in METRICS.items()}
_SIDES = {"text": "sentence", "teacher": "teacher", "image": "image"}
_COMPARISONS = {"gain": "gain", "retention": "kept"}  # suffixes of the ratio of a metric to an anchor's
_PATTERN = re.compile(
    rf"({'|'.join(_SIDES)})_to_({'|'.join(_SIDES)})_((?:index_)?recall@\d+|mrr(?:@\d+)?|map(?:@\d+)?|median_rank)"
)


def metric_of(name: str) -> Metric:
    """Look up what is known about a metric.

    Args:
        name (`str`): As in a results record, e.g. `"text_to_image_recall@1"`, `"swapped_colours_accuracy"`,
            `"hessian_eigenvalue_1"`.

    Returns:
        [`Metric`]: An unknown metric has its name as the title, no unit and no direction; it is shown as a plain
        number.

    Example:
        >>> metric_of("text_to_image_recall@1").show(0.1234), metric_of("rsum").show(4.2)
        ('12.3', '420.0')
        >>> metric_of("image_latency_ms").show(13.123)
        '13.1'
        >>> metric_of("unheard_of")
        Metric(title='unheard_of', unit='', higher_is_better=None)
    """
    if name in METRICS:
        return METRICS[name]
    if match := _PATTERN.fullmatch(name):
        source, target, what = match.groups()
        plain = what.replace("index_recall", "found by the index R").replace("recall", "R")
        plain = plain.replace("mrr", "MRR").replace("map", "mAP")
        title, unit, higher = _RANKING.get(what, (plain, "%", True))
        known = METRICS.get(f"{source}_to_{target}_mrr")
        arrow = known.title.partition(" ")[0] if known else f"{_SIDES[source]}→{_SIDES[target]}"
        return Metric(f"{arrow} {title}", unit, higher)
    if name.endswith("_accuracy"):
        return Metric(name.removesuffix("_accuracy").replace("_", " "), "%", True)
    if name.endswith(("_text_score", "_image_score", "_group_score")):
        return Metric(name.replace("_", " "), "%", True)
    if match := re.fullmatch(r"hessian_eigenvalue_(\d+)", name):
        return Metric(f"Hessian eigenvalue {match[1]}", "", None)
    return Metric(name, "", None)


def comparison_title(name: str) -> str | None:
    """The title of a ratio to an anchor (`top1_retention`, `text_to_image_recall@1_gain`); `None` for other names."""
    base, _, kind = name.rpartition("_")
    return f"{metric_of(base).title} {_COMPARISONS[kind]}" if base and kind in _COMPARISONS else None
