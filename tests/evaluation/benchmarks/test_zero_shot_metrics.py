"""Ranks, accuracies and mean average precision against naive forms and scikit-learn; ties; bad input."""

import pytest
import torch

from modeling_dclip.evaluation.benchmarks import zero_shot as zero_shot_metrics
from modeling_dclip.evaluation.benchmarks.zero_shot import (
    accuracy_outcomes,
    average_precision,
    label_ranks,
    mean_average_precision,
)


def unit(generator, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_ranks_equal_sorting_and_perfect_embeddings_come_first(generator, monkeypatch):
    images, classifier = unit(generator, 40, 6), unit(generator, 9, 6)
    labels = torch.randint(0, 9, (40,), generator=generator)
    order = (images.double() @ classifier.double().T).argsort(dim=1, descending=True)
    expected = (order == labels[:, None]).nonzero()[:, 1] + 1
    assert torch.equal(label_ranks(images, classifier, labels), expected)
    monkeypatch.setattr(zero_shot_metrics, "_ROWS_AT_A_TIME", 7)
    assert torch.equal(label_ranks(images, classifier, labels), expected)
    assert label_ranks(classifier, classifier, torch.arange(9)).tolist() == [1] * 9


def test_a_collapsed_model_never_hits():
    ones = torch.nn.functional.normalize(torch.ones(7, 5), dim=1)
    assert label_ranks(ones, ones, torch.arange(7)).tolist() == [7] * 7
    assert label_ranks(ones, ones, torch.arange(7), list("abcdefg")).tolist() == [7] * 7


def test_of_classes_with_one_name_the_first_ranks_first():
    classifier = torch.eye(4)[[0, 1, 0, 0]]
    images, labels = torch.eye(4)[[0, 0, 0, 1]], torch.tensor([0, 2, 3, 1])
    assert label_ranks(images, classifier, labels, ["missile", "dog", "missile", "missile"]).tolist() == [1, 2, 3, 1]
    assert label_ranks(images, classifier, labels).tolist() == [3, 3, 3, 1]
    assert (images @ classifier.T).argmax(dim=1).tolist() == [0, 0, 0, 1]  # what argmax makes of them


def test_accuracies_are_sums_over_sums():
    labels = torch.tensor([0, 0, 0, 1, 4])  # no image of 2, 3 and 5
    outcomes = accuracy_outcomes(torch.tensor([1, 5, 1, 6, 1]), labels, 6)
    metrics = {name: float(pair[:, 0].sum() / pair[:, 1].sum()) for name, pair in outcomes.items()}
    assert metrics == pytest.approx({"top1": 3 / 5, "top5": 4 / 5, "mean_per_class": (2 / 3 + 0 + 1) / 3})
    assert all(pair.shape == (5, 2) and pair.dtype == torch.float64 for pair in outcomes.values())
    assert "top5" not in accuracy_outcomes(torch.tensor([1, 2]), torch.tensor([0, 1]), 4)


def test_mean_per_class_equals_scikit_learns_balanced_accuracy(generator):
    metrics = pytest.importorskip("sklearn.metrics")
    images, classifier = unit(generator, 300, 5), unit(generator, 8, 5)
    labels = torch.randint(0, 7, (300,), generator=generator) ** 2 % 8  # uneven, and one class is never seen
    pair = accuracy_outcomes(label_ranks(images, classifier, labels), labels, 8)["mean_per_class"]
    predicted = (images @ classifier.T).argmax(dim=1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = metrics.balanced_accuracy_score(labels, predicted)
    assert float(pair[:, 0].sum() / pair[:, 1].sum()) == pytest.approx(expected, abs=1e-12)


def naive_average_precision(scores, relevant):
    """Precision among all that score at least as high as each relevant image, averaged."""
    pairs = list(zip(scores.tolist(), relevant.tolist(), strict=True))
    precisions = []
    for score, hit in pairs:
        if hit:
            found = [other_hit for other, other_hit in pairs if other >= score]
            precisions.append(sum(found) / len(found))
    return sum(precisions) / len(precisions)


@pytest.mark.parametrize("levels", [1, 3, 10, 10**6])  # the fewer, the more ties
def test_average_precision_equals_the_naive_one_and_scikit_learns(generator, levels):
    metrics = pytest.importorskip("sklearn.metrics")
    scores = torch.randint(0, levels, (200,), generator=generator).double()
    relevant = torch.randint(0, 2, (200,), generator=generator)
    found = average_precision(scores, relevant)
    assert found == pytest.approx(naive_average_precision(scores, relevant), abs=1e-12)
    assert found == pytest.approx(metrics.average_precision_score(relevant, scores), abs=1e-12)
    shuffled = torch.randperm(200, generator=generator)
    assert average_precision(scores[shuffled], relevant[shuffled]) == found


def test_mean_average_precision_equals_scikit_learns_macro(generator):
    metrics = pytest.importorskip("sklearn.metrics")
    images, classifier = unit(generator, 500, 6), unit(generator, 20, 6)
    labels = (torch.rand(500, 20, generator=generator) < 0.1).long()
    scores = images.double() @ classifier.double().T
    expected = metrics.average_precision_score(labels, scores, average="macro")
    assert mean_average_precision(images, classifier, labels) == pytest.approx(expected, abs=1e-6)


def test_a_class_of_no_image_is_left_out(generator):
    images, classifier = unit(generator, 30, 4), unit(generator, 3, 4)
    labels = torch.randint(0, 2, (30, 3), generator=generator)
    labels[:, 1] = 0
    assert mean_average_precision(images, classifier, labels) == pytest.approx(
        mean_average_precision(images, classifier[[0, 2]], labels[:, [0, 2]]), abs=1e-12
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"got \(3, 3\), \(4, 4\) and \(3,\)"):
        label_ranks(torch.eye(3), torch.eye(4), torch.arange(3))
    with pytest.raises(ValueError, match=r"labels in \[0, 3\), got -1 in row 1"):
        label_ranks(torch.eye(3), torch.eye(3), torch.tensor([0, -1, 2]))
    with pytest.raises(ValueError, match="with 0 relevant"):
        average_precision(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"labels \(I, K\), got \(3, 3\), \(3, 3\) and \(3,\)"):
        mean_average_precision(torch.eye(3), torch.eye(3), torch.arange(3))
    for labels in (torch.zeros(3, 3), 2 * torch.eye(3)):
        with pytest.raises(ValueError, match="Expected labels 0 and 1"):
            mean_average_precision(torch.eye(3), torch.eye(3), labels)
