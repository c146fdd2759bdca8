"""The averages of the zero-shot suite as a table, for every model that was measured on sets of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.metric_names import percent
from modeling_dclip.evaluation.tables import markdown_table, row_title
from modeling_dclip.evaluation.zero_shot_suite import averages_of_records, suite_name


def render_averages(records: Sequence[Mapping[str, Any]]) -> str:
    """Show each model's averages over the sets it was measured on, and over how many they are.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.results.read_results`]. Points between two models and splits are
            averaged apart.

    Returns:
        `str`: Markdown; empty where no record is of a set of the suite.

    Raises:
        ValueError: If two records of one model and split are of one set.
    """
    models: dict[tuple[str | None, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind == "zero_shot" and suite_name(spec) is not None:
            key = record["model"], record.get("condition"), record.get("split")
            models.setdefault(key, []).append(record)
    rows, several = [], len({split for *_, split in models}) > 1
    for (_, _, split), own in models.items():
        label = row_title(own[0]) + (f", {split}" if several else "")
        for title, average in averages_of_records(own).items():
            if average.value is not None:
                rows.append([label, title, percent(average.value), f"{average.n_measured} of {average.n_defined}"])
    return markdown_table(["Model", "Average", "%", "sets"], rows, left=2) if rows else ""
