"""The suite of `clip-benchmark/wds_*` classification sets, the metric of each, and the averages that papers report.

The 38 sets are those in DM-CLIP's result files. The metric is the set's usual one, as DataComp's evaluation defines
it: accuracy; mean per class where classes are uneven; mean average precision where an image has several labels.
(DataComp's own 38 sets differ: 29 of these, Food-101, and eight of retrieval, WinoGAViL, WILDS and fairness, most of
which take other metrics.)

Averages are over the sets that were measured, and say how many those are: an average over fewer sets is another
number.

Source: [Mcode] result files and its plot, for the 38 and the 23; DataComp's task list, for the metrics and the two
groups; docs/papers.md.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from modeling_dclip.data.labels import spec_root
from modeling_dclip.data.labels.webdataset import WebdatasetFiles, is_url
from modeling_dclip.evaluation.records import Metrics, Record

# Name and metric; a set's folder is wds_<name>.
SUITE = {
    "imagenet1k": "top1",
    "imagenetv2": "top1",
    "imagenet_sketch": "top1",
    "imagenet-a": "top1",
    "imagenet-r": "top1",
    "imagenet-o": "top1",
    "objectnet": "top1",
    "fer2013": "top1",
    "voc2007": "top1",
    "voc2007_multilabel": "map",
    "sun397": "top1",
    "cars": "top1",
    "fgvc_aircraft": "mean_per_class",
    "mnist": "top1",
    "stl10": "top1",
    "gtsrb": "top1",
    "country211": "top1",
    "renderedsst2": "top1",
    "vtab-caltech101": "mean_per_class",
    "vtab-cifar10": "top1",
    "vtab-cifar100": "top1",
    "vtab-clevr_count_all": "top1",
    "vtab-clevr_closest_object_distance": "top1",
    "vtab-diabetic_retinopathy": "top1",
    "vtab-dmlab": "top1",
    "vtab-dsprites_label_orientation": "top1",
    "vtab-dsprites_label_x_position": "top1",
    "vtab-dsprites_label_y_position": "top1",
    "vtab-dtd": "top1",
    "vtab-eurosat": "top1",
    "vtab-kitti_closest_vehicle_distance": "top1",
    "vtab-flowers": "mean_per_class",
    "vtab-pets": "mean_per_class",
    "vtab-pcam": "top1",
    "vtab-resisc45": "top1",
    "vtab-smallnorb_label_azimuth": "top1",
    "vtab-smallnorb_label_elevation": "top1",
    "vtab-svhn": "top1",
}


class Average(NamedTuple):
    """An average: the names of its sets, and the metric that is taken of each (`None`: the set's own)."""

    names: tuple[str, ...]
    metric: str | None


_IMAGENET_SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
_DM_CLIP = """objectnet fer2013 voc2007 sun397 cars mnist stl10 gtsrb vtab-cifar10 vtab-cifar100 imagenet1k vtab-pets
vtab-clevr_closest_object_distance vtab-caltech101 vtab-svhn vtab-dmlab vtab-eurosat vtab-diabetic_retinopathy
vtab-resisc45 imagenetv2 imagenet_sketch imagenet-r imagenet-o"""
_VTAB = """vtab-caltech101 vtab-cifar100 vtab-clevr_count_all vtab-clevr_closest_object_distance vtab-dtd vtab-eurosat
vtab-kitti_closest_vehicle_distance vtab-flowers vtab-pets vtab-pcam vtab-resisc45 vtab-svhn sun397"""

AVERAGES = {
    "suite_38": Average(tuple(SUITE), None),
    # DM-CLIP's average: top-5, on the sets of its plot.
    "dmclip_23": Average(tuple(_DM_CLIP.split()), "top5"),
    "dmclip_23_top1": Average(tuple(_DM_CLIP.split()), "top1"),
    # DataComp's groups.
    "imagenet_shifts_6": Average(_IMAGENET_SHIFTS, None),
    "vtab_13": Average(tuple(_VTAB.split()), None),
}


class SuiteMembers(NamedTuple):
    """Which sets of the suite were found.

    Attributes:
        specs (`dict[str, str]`): A spec for each set that is there, by name.
        absent (`list[str]`): The names of the others.
    """

    specs: dict[str, str]
    absent: list[str]


class SuiteAverage(NamedTuple):
    """A mean over the sets that were measured.

    Attributes:
        value (`float`, *optional*): The mean; `None` if no set was measured.
        n_measured (`int`), n_defined (`int`): How many sets were measured, of how many.
        missing (`list[str]`): The names of the others.
    """

    value: float | None
    n_measured: int
    n_defined: int
    missing: list[str]


def _folders(name: str) -> list[str]:
    # clip-benchmark and DataComp name one set differently: with or without vtab- (CIFAR-10) and the split.
    stems = [name, name.removeprefix("vtab-")] if name.startswith("vtab-") else [name]
    return [f"wds_{stem}{end}" for stem in dict.fromkeys(stems) for end in ("", "_test")]


def _below(root: str, folder: str) -> str:
    return root.replace("{}", folder) if "{}" in root else f"{root.rstrip('/')}/{folder}"


def expand_suite(spec: str) -> SuiteMembers:
    """Find the sets of the suite.

    Args:
        spec (`str`): `suite:ROOT[:SPLIT]`, with the split `test` by default. ROOT is a folder or an address that holds
            the folders `wds_<name>` (or `wds_<name>_test`, DataComp's names); `{}` in it stands for `wds_<name>`. The
            Hub's are at `https://huggingface.co/datasets/clip-benchmark`.

    Returns:
        [`SuiteMembers`]: Specs for [`~modeling_dclip.data.labels.load_classification`], in the suite's order.

    Raises:
        ConnectionError: If a server cannot be reached or refuses.
        FileNotFoundError: If ROOT is not a folder, or has none of the sets.
        ValueError: If the spec is wrong.
    """
    match = re.fullmatch(r"suite:((?:https?://[^/:]+(?::[0-9]+)?)?[^:]*)(?::([^:]+))?", spec)
    if match is None or not match[1]:
        raise ValueError(f"Expected the form 'suite:ROOT[:SPLIT]', got {spec!r}.")
    root, split = match[1], match[2] or "test"
    if not is_url(root) and "{}" not in root and not Path(root).is_dir():
        raise FileNotFoundError(f"No folder '{root}' (of the spec {spec!r}). Check the path.")
    specs, absent, counted = {}, [], f"{split}/nshards.txt"
    for name in SUITE:
        places = [_below(root, folder) for folder in _folders(name)]
        place = next((place for place in places if WebdatasetFiles(place).find_text(counted) is not None), None)
        if place is None:
            absent.append(name)
        else:
            specs[name] = f"wds:{place}:{split}"
    if not specs:
        raise FileNotFoundError(
            f"None of the {len(SUITE)} sets is at '{root}' with the split {split!r}. Expected e.g. "
            f"'{_below(root, 'wds_vtab-pets')}/{split}/nshards.txt'."
        )
    return SuiteMembers(specs, absent)


def suite_name(spec: str) -> str | None:
    """Find which set of the suite a spec reads.

    Args:
        spec (`str`): Such as `wds:ROOT[:SPLIT]`.

    Returns:
        `str` or `None`: The suite's name of the set; `None` for other data.

    Example:
        >>> suite_name("wds:data/wds_vtab-pets_test:test")
        'vtab-pets'
    """
    root = spec_root(spec)
    if root is None:
        return None
    folder = WebdatasetFiles(root).name
    return next((name for name in SUITE if folder in _folders(name)), None)


def main_metric(name: str, metrics: Metrics, metric: str | None = None) -> float | None:
    """Take the number that a set contributes to an average.

    Args:
        name (`str`): Of the suite.
        metrics (`dict[str, float]`): From
            [`~modeling_dclip.evaluation.benchmarks.zero_shot.evaluate_zero_shot`].
        metric (`str`, *optional*): In place of the set's own.

    Returns:
        `float` or `None`: In [0, 1]; `None` if it was not measured.
    """
    return metrics.get(metric or SUITE[name])


def suite_averages(results: Mapping[str, Metrics]) -> dict[str, SuiteAverage]:
    """Average the metrics of one model.

    Args:
        results (`Mapping[str, Metrics]`): Metrics by name of the suite.

    Returns:
        `dict[str, SuiteAverage]`: All of [`AVERAGES`], each over the sets among `results` that have its metric, with
            equal weights.

    Raises:
        ValueError: If a name is not of the suite.
    """
    unknown = sorted(set(results) - set(SUITE))
    if unknown:
        raise ValueError(f"Expected names of the suite, got {unknown[0]!r}. The suite has {', '.join(SUITE)}.")
    averages = {}
    for title, average in AVERAGES.items():
        values = {name: main_metric(name, results.get(name, {}), average.metric) for name in average.names}
        found = [value for value in values.values() if value is not None]
        missing = [name for name, value in values.items() if value is None]
        mean = sum(found) / len(found) if found else None
        averages[title] = SuiteAverage(mean, len(found), len(average.names), missing)
    return averages


def averages_of_records(records: Sequence[Record]) -> dict[str, SuiteAverage]:
    """Average the results records of one model.

    Args:
        records (`Sequence[Record]`): Records of benchmarks that are not sets of the suite are ignored.

    Returns:
        `dict[str, SuiteAverage]`: As [`suite_averages`].

    Raises:
        ValueError: If two records are of one set.
    """
    results: dict[str, Metrics] = {}
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        name = suite_name(spec) if kind == "zero_shot" else None
        if name is None:
            continue
        if name in results:
            raise ValueError(
                f"Expected one record of {name!r} for a model, got two. Give the records of one model and split."
            )
        results[name] = record["metrics"]
    return suite_averages(results)
