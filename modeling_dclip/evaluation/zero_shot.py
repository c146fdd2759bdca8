"""Zero-shot classification as CLIP does it: a class is the mean of its prompts' embeddings.

Every template is filled with the class name, embedded and normalised; the mean over templates is normalised again. Ties count
against the model, as in retrieval.

Source: CLIP's published prompt-ensembling procedure.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, LargeList, List

from modeling_dclip.evaluation.class_prompts import check_prompts
from modeling_dclip.evaluation.classifier_cache import ClassifierCache
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.evaluation.zero_shot_metrics import accuracy_outcomes, label_ranks, mean_average_precision


def build_classifier(
    model: torch.nn.Module,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    classifiers: ClassifierCache | None = None,
) -> torch.Tensor:
    """Embed every class once.

    Args:
        model, processor, device: As in [`~modeling_dclip.evaluation.embedding.embed_texts`].
        class_names (`Sequence[str]`): K non-empty names. Classes of one name, as ImageNet's usual list has them, get equal rows and a warning.
        templates (`Sequence[str]`): Each with one place for the name, `{}` or `{c}`.
        batch_size (`int`, *optional*, defaults to 256): Prompts at a time.
        classifiers ([`ClassifierCache`], *optional*): Where to look first, and to keep what is built.

    Returns:
        `torch.Tensor` of shape `(K, D)`: float32, L2-normalised, on the CPU.

    Raises:
        ValueError: If there are fewer than two classes, a name is empty, there is no template, or one has not one place.
    """
    names, templates = check_prompts(class_names, templates)
    distinct = list(dict.fromkeys(names))
    if len(distinct) < len(names):
        repeated = next(name for name in distinct if names.count(name) > 1)
        warnings.warn(
            f"{len(names) - len(distinct)} of {len(names)} classes have the name of another one, e.g. {repeated!r}: the model cannot tell "
            f"them apart, and the first of them is taken.",
            stacklevel=2,
        )

    def build() -> torch.Tensor:
        prompts = [template.replace("{}", name) for name in distinct for template in templates]
        embeds = embed_texts(model, processor, prompts, batch_size=batch_size, device=device)  # unit rows
        return torch.nn.functional.normalize(embeds.view(len(distinct), len(templates), -1).mean(dim=1), dim=1)

    rows = build() if classifiers is None else classifiers.get(model, processor, distinct, templates, build)
    numbers = {name: row for row, name in enumerate(distinct)}
    return rows[[numbers[name] for name in names]]


def _read_labels(dataset: Dataset, classes: int) -> torch.Tensor:
    """The column `label`: `(I,)` class numbers, or `(I, K)` zeros and ones."""
    if "label" not in dataset.column_names:
        raise ValueError(f"Expected a column 'label', got {dataset.column_names}.")
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and feature.num_classes != classes:
        raise ValueError(
            f"Expected {feature.num_classes} class names, one per class of the dataset in its order, got {classes}."
        )
    values = dataset["label"][:]
    if isinstance(feature, (List, LargeList)):
        wrong = [row for row, value in enumerate(values) if value is None or len(value) != classes]
        if wrong:
            got = values[wrong[0]]
            raise ValueError(
                f"Expected {classes} zeros and ones an image, one per class name, got {None if got is None else len(got)} in row {wrong[0]} "
                f"({len(wrong)} such rows)."
            )
        return torch.tensor(values)
    wrong = [row for row, value in enumerate(values) if not isinstance(value, int) or not 0 <= value < classes]
    if wrong:
        raise ValueError(
            f"Expected integer labels in [0, {classes}), got {values[wrong[0]]!r} in row {wrong[0]} ({len(wrong)} such rows)."
        )
    return torch.tensor(values)


def evaluate_zero_shot(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    classifiers: ClassifierCache | None = None,
) -> dict[str, Any]:
    """Classify every image by its nearest class embedding.

    Args:
        model, processor, batch_size, device, num_workers: As in [`~modeling_dclip.evaluation.embedding.embed_images`].
        dataset (`datasets.Dataset`): With `image` and `label`: an integer, a `ClassLabel` with one name per class name, or where an
            image may be of several classes a list of K zeros and ones.
        class_names, templates, classifiers: As in [`build_classifier`].

    Returns:
        `dict[str, Any]`: `n` and the metrics, in [0, 1]. One label an image: `top1`; `top5` with five classes or more; `mean_per_class`, the
        mean accuracy of the classes that have images; `outcomes` per image of each, as
        [`~modeling_dclip.evaluation.zero_shot_metrics.accuracy_outcomes`] gives them. Several labels: `map`, as
        [`~modeling_dclip.evaluation.zero_shot_metrics.mean_average_precision`] gives it.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If the dataset names another number of classes, a label is out of range, or as in [`build_classifier`].
    """
    labels = _read_labels(dataset, len(class_names))
    prompts = {"batch_size": 4 * batch_size, "device": device, "classifiers": classifiers}
    classifier = build_classifier(model, processor, class_names, templates, **prompts)
    images = embed_images(model, processor, dataset, batch_size=batch_size, device=device, num_workers=num_workers)
    if labels.ndim == 2:
        return {"map": mean_average_precision(images, classifier, labels), "n": len(labels)}
    ranks = label_ranks(images, classifier, labels, [name.strip() for name in class_names])
    outcomes = accuracy_outcomes(ranks, labels, len(class_names))
    metrics = {
        name: float(sums[0] / sums[1]) for name, sums in ((name, pair.sum(0)) for name, pair in outcomes.items())
    }
    return {**metrics, "n": len(ranks), "outcomes": outcomes}
