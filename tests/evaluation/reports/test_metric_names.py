"""Each metric shows its unit and knows its direction; an unknown name is a plain number."""

import pytest

from modeling_dclip.evaluation.reports.metric_names import METRICS, comparison_title, metric_of, percent


@pytest.mark.parametrize(
    ("name", "value", "shown", "higher"),
    [
        ("text_to_image_recall@1", 0.1234, "12.3", True),
        ("text_to_image_recall@50", 0.5, "50.0", True),
        ("image_to_text_median_rank", 3.0, "3", False),
        ("text_to_image_median_rank", 1234.5, "1,234.5", False),
        ("rsum", 4.2345, "423.4", True),
        ("swapped_colours_accuracy", 0.5, "50.0", True),
        ("modality_gap", 0.8125, "0.812", None),
        ("image_uniformity", -1.23456, "-1.235", False),
        ("image_latency_ms", 13.123, "13.1", False),
        ("image_latency_ms", 1234.5, "1,234", False),
        ("peak_memory_mib", 2048.4, "2,048", False),
        ("hessian_eigenvalue_2", 12.3456, "12.35", None),
        ("unheard_of", 0.00012, "0.00012", None),
        ("unheard_of", 0, "0", None),
    ],
)
def test_a_metric_is_shown_in_its_unit(name, value, shown, higher):
    metric = metric_of(name)
    assert (metric.show(value), metric.higher_is_better) == (shown, higher)


def test_titles_name_what_is_measured():
    assert metric_of("image_latency_ms").heading == "image latency, ms"
    assert metric_of("text_to_teacher_recall@5").title == "sentence→teacher R@5"
    assert metric_of("swapped_colours_accuracy").title == "swapped colours"
    assert metric_of("text_to_image_index_recall@10").title == "T→I found by the index R@10"
    assert metric_of("image_to_text_map@100")[:2] == ("I→T mAP@100", "%")
    assert metric_of("hats_group_score")[:2] == ("hats group score", "%")
    assert metric_of("unheard_of").heading == "unheard_of"
    assert comparison_title("mean_per_class_retention") == "mean per class kept"
    assert comparison_title("anchor_revision") is None


def test_a_signed_value_has_its_sign_and_zero_none():
    for metric in METRICS.values():
        assert metric.show(12.0, signed=True).startswith("+")
        assert metric.show(0.0, signed=True).strip("0.") == ""
    assert percent(-0.0001, signed=True) == "0.0"
    assert metric_of("rsum").in_unit(4.2) == 420 and metric_of("modality_gap").in_unit(0.8) == 0.8
