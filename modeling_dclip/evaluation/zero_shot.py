"""Zero-shot classification as CLIP does it: a class is the mean of its prompts' embeddings.

Every template is filled with the class name, embedded and normalised; the mean over templates is normalised again. Ties count
against the model, as in retrieval.

Source: CLIP's published prompt-ensembling procedure.
"""

import glob
from collections.abc import Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, load_dataset

from modeling_dclip.data.specs import Source, parse_spec
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.evaluation.retrieval import TIE_TOLERANCE

# Our selection, for small photographs of one object. Give a file of your own for other pictures.
PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a cropped photo of a {}.",
)


def _read_scenes(
    split: str = "test", *, n: int = 1024, seed: int = 0, image_size: int = 128
) -> tuple[Dataset, tuple[str, ...]]:
    from modeling_dclip.data.scenes import TEMPLATES, load_single_objects  # drawing is needed by this source only

    return load_single_objects(split, n=n, seed=seed, image_size=image_size), TEMPLATES


def _read_parquet(pattern: str) -> tuple[Dataset, tuple[str, ...]]:
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(
            f"Expected parquet files at {pattern!r}, got none. Check the path; quote it in the shell."
        )
    return load_dataset("parquet", data_files=files, split="train"), PHOTO_TEMPLATES


SOURCES = {
    "scenes": Source("scenes[:SPLIT]", _read_scenes),
    "parquet": Source("parquet:GLOB", _read_parquet),
}


def load_classification(spec: str) -> tuple[Dataset, list[str], list[str]]:
    """Load a classification set with its class names and default templates.

    Args:
        spec (`str`): `scenes[:SPLIT][,n=...,seed=...]` (drawn single objects; `test` by default) or `parquet:GLOB` with the columns
            `image` and `label` (`ClassLabel`). `@COUNT` at the end takes the first so many rows.

    Returns:
        `tuple[Dataset, list[str], list[str]]`: The dataset; the label's names, underscores as spaces; templates.

    Raises:
        FileNotFoundError: If no file matches.
        ValueError: If the spec is wrong, a column is missing or not of its type, or there are fewer rows than the count.
    """
    source, fields, options, count = parse_spec(spec, SOURCES, counted=True)
    dataset, templates = source.build(*fields, **options)
    if "image" not in dataset.column_names or not isinstance(dataset.features.get("label"), ClassLabel):
        raise ValueError(
            f"Expected the columns 'image' and 'label' (ClassLabel) in {spec!r}, got {dataset.features}. A column of class names "
            f"becomes one with `Dataset.class_encode_column`."
        )
    if count is not None:
        if count > len(dataset):
            raise ValueError(f"Expected at least {count} rows in {spec!r}, got {len(dataset)}. Lower the count.")
        dataset = dataset.select(range(count))
    return dataset, [name.replace("_", " ") for name in dataset.features["label"].names], list(templates)


def build_classifier(
    model: torch.nn.Module,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Embed every class once.

    Args:
        model, processor, device: As in [`~modeling_dclip.evaluation.embedding.embed_texts`].
        class_names (`Sequence[str]`): K distinct, non-empty names.
        templates (`Sequence[str]`): Each with one `{}`.
        batch_size (`int`, *optional*, defaults to 256): Prompts at a time.

    Returns:
        `torch.Tensor` of shape `(K, D)`: float32, L2-normalised, on the CPU.

    Raises:
        ValueError: If there are fewer than two classes, names repeat or are empty, there is no template, or one is without `{}`.
    """
    for what, values, least in (("class names", class_names, 2), ("templates", templates, 1)):
        if isinstance(values, str) or len(values) < least:
            raise ValueError(f"Expected at least {least} {what}, got {values!r}.")
    odd = [template for template in templates if template.count("{}") != 1]
    if odd:
        raise ValueError(f"Expected every template to hold '{{}}' once, for the class name, got {odd[0]!r}.")
    names = [name.strip() for name in class_names]
    repeated = sorted({name for name in names if names.count(name) > 1 or not name})
    if repeated:
        raise ValueError(f"Expected distinct, non-empty class names, got {repeated[0]!r} empty or more than once.")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeds = embed_texts(model, processor, prompts, batch_size=batch_size, device=device)  # unit rows
    return torch.nn.functional.normalize(embeds.view(len(names), len(templates), -1).mean(dim=1), dim=1)


def label_ranks(image_embeds: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rank the right class of every image; 1 is first, ties count against the model.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): L2-normalised.
        classifier (`torch.Tensor` of shape `(K, D)`): From [`build_classifier`].
        labels (`torch.Tensor` of shape `(I,)`): Integers in [0, K).

    Returns:
        `torch.Tensor` of shape `(I,)`: int64.

    Raises:
        ValueError: If shapes do not fit or a label is out of range, naming its row.
    """
    if image_embeds.shape[-1] != classifier.shape[-1] or labels.shape != image_embeds.shape[:1]:
        raise ValueError(
            f"Expected image_embeds (I, D), classifier (K, D) and labels (I,), got {tuple(image_embeds.shape)}, "
            f"{tuple(classifier.shape)} and {tuple(labels.shape)}."
        )
    outside = (labels < 0) | (labels >= len(classifier))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"Expected labels in [0, {len(classifier)}), got {int(labels[row])} in row {row}.")
    scores = image_embeds @ classifier.T
    bar = scores.gather(1, labels[:, None]) - TIE_TOLERANCE
    return (scores.scatter(1, labels[:, None], -torch.inf) >= bar).sum(dim=1) + 1


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
) -> dict[str, Any]:
    """Classify every image by its nearest class embedding.

    Args:
        model, processor, batch_size, device, num_workers: As in [`~modeling_dclip.evaluation.embedding.embed_images`].
        dataset (`datasets.Dataset`): With `image` and `label`, an integer column or a `ClassLabel` with one name per class name.
        class_names, templates: As in [`build_classifier`].

    Returns:
        `dict[str, Any]`: `top1` and `top5` in [0, 1] (with fewer than five classes `top5` is 1 by definition), `n`, and per image
        `top1_hits`, `top5_hits` (bool tensors of shape `(I,)`) for intervals.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If the dataset names another number of classes, a label is out of range, or as in [`build_classifier`].
    """
    if "label" not in dataset.column_names:
        raise ValueError(f"Expected a column 'label', got {dataset.column_names}.")
    feature = dataset.features["label"]
    if isinstance(feature, ClassLabel) and feature.num_classes != len(class_names):
        raise ValueError(
            f"Expected {feature.num_classes} class names, one per class of the dataset in its order, got {len(class_names)}."
        )
    values = dataset["label"][:]
    wrong = [row for row, value in enumerate(values) if value is None or not 0 <= value < len(class_names)]
    if wrong:
        raise ValueError(
            f"Expected labels in [0, {len(class_names)}), got {values[wrong[0]]} in row {wrong[0]} ({len(wrong)} such rows)."
        )
    classifier = build_classifier(model, processor, class_names, templates, batch_size=4 * batch_size, device=device)
    images = embed_images(model, processor, dataset, batch_size=batch_size, device=device, num_workers=num_workers)
    ranks = label_ranks(images, classifier, torch.tensor(values))
    hits = {"top1": ranks <= 1, "top5": ranks <= 5}
    accuracies = {name: float(hit.double().mean()) for name, hit in hits.items()}
    return {**accuracies, "n": len(ranks), **{f"{name}_hits": hit for name, hit in hits.items()}}
