"""The averages of the zero-shot suite as a table, for every model that was measured on sets of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.metric_names import percent
from modeling_dclip.evaluation.tables import markdown_table
from modeling_dclip.evaluation.zero_shot_suite import averages_of_records, suite_name


def render_averages(records: Sequence[Mapping[str, Any]]) -> str:
    """Show each model's averages over the sets it was measured on, and over how many they are.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.results.read_results`], of one split.

    Returns:
        `str`: Markdown; empty where no record is of a set of the suite.
    """
    models: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind == "zero_shot" and suite_name(spec) is not None:
            models.setdefault((record["model"], record.get("condition")), []).append(record)
    rows = []
    for own in models.values():
        label = own[0].get("label", own[0]["model"])
        for title, average in averages_of_records(own).items():
            if average.value is not None:
                rows.append([label, title, percent(average.value), f"{average.n_measured} of {average.n_defined}"])
    return markdown_table(["Model", "Average", "%", "sets"], rows, left=2) if rows else ""
