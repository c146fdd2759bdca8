"""Zero-shot classification as CLIP does it: a class is the mean of its prompts' embeddings.

Every template is filled with the class name, embedded and normalised; the mean over templates is normalised again.
Ties count against the model, as in retrieval.

[`ClassifierCache`] keeps classifiers on disk and in memory: 1,000 classes of 80 prompts are embedded once for each
text encoder, not once for each evaluation. The key of a classifier is the content of what made it: the weights and
settings of the text side, names, templates, and the token ids that the tokenizer makes of them. Checkpoints with the
same frozen text encoder share their classifiers, whatever their image encoders.

Source: CLIP's published prompt-ensembling procedure.
"""

import json
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, LargeList, List
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_dclip.data.files import list_folder, remove_leftovers, replacing
from modeling_dclip.data.labels.prompts import check_prompts
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_text_encoder, fingerprint_tokens
from modeling_dclip.encoders.retrieval_ranks import TIE_TOLERANCE
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.evaluation.records import BenchmarkResult

_ROWS_AT_A_TIME = 4096  # of scores against all classes: 16 MiB for 1,000
_HELD = 64  # classifiers in memory; one of ImageNet takes 2 to 3 MiB


def label_ranks(
    image_embeds: torch.Tensor,
    classifier: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str] | None = None,
) -> torch.Tensor:
    """Rank the right class of every image; 1 is first, ties count against the model.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): L2-normalised.
        classifier (`torch.Tensor` of shape `(K, D)`): From [`build_classifier`].
        labels (`torch.Tensor` of shape `(I,)`): Integers in [0, K).
        class_names (`Sequence[str]`, *optional*): K names. A class never ranks before an earlier class of its name.

    Returns:
        `torch.Tensor` of shape `(I,)`: int64, in [1, K].

    Raises:
        ValueError: If shapes do not fit, or a label is out of range; the message names its row.
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
    numbers: dict[Hashable, int] = {}
    names: Sequence[Hashable] = range(len(classifier)) if class_names is None else class_names
    alike = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
    ranks = []
    for embeds, own in zip(image_embeds.split(_ROWS_AT_A_TIME), labels.split(_ROWS_AT_A_TIME), strict=True):
        scores = embeds @ classifier.T
        bar = scores.gather(1, own[:, None]) - TIE_TOLERANCE
        later = (alike[None] == alike[own][:, None]) & (torch.arange(len(alike))[None] >= own[:, None])
        ranks.append((scores.masked_fill(later, -torch.inf) >= bar).sum(dim=1) + 1)
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.long)


def accuracy_outcomes(ranks: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
    """Sum and count of every image for each accuracy: a metric is the sum of column 0 over the sum of column 1.

    Args:
        ranks (`torch.Tensor` of shape `(I,)`): Of [`label_ranks`].
        labels (`torch.Tensor` of shape `(I,)`): Integers in [0, K).
        classes (`int`): K.

    Returns:
        `dict[str, torch.Tensor]`: float64 of shape `(I, 2)` for `top1`, with five classes or more `top5`, and
            `mean_per_class`: the mean of the accuracies of the classes that have an image, in which an image weighs
            one over the number of images of its class.
    """
    ones = torch.ones(len(ranks), dtype=torch.float64)
    hits = {"top1": (ranks <= 1).double()}
    if classes >= 5:
        hits["top5"] = (ranks <= 5).double()
    outcomes = {name: torch.stack([hit, ones], dim=1) for name, hit in hits.items()}
    weights = 1 / torch.bincount(labels, minlength=classes).double()[labels]
    return {**outcomes, "mean_per_class": torch.stack([hits["top1"] * weights, weights], dim=1)}


def average_precision(scores: torch.Tensor, relevant: torch.Tensor) -> float:
    """Area under precision over recall, as a sum over the thresholds, without interpolation.

    Images with equal scores are found together, so the order among them does not matter. Each of them counts the
    precision after the last one, as in scikit-learn.

    Args:
        scores (`torch.Tensor` of shape `(I,)`): Higher is more relevant.
        relevant (`torch.Tensor` of shape `(I,)`): 1 or True where relevant, at least once.

    Returns:
        `float`: In (0, 1].

    Raises:
        ValueError: If the shapes differ, or nothing is relevant.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 1]))
        0.8333333333333333
    """
    if scores.ndim != 1 or scores.shape != relevant.shape or not relevant.any():
        raise ValueError(
            f"Expected two vectors of one length with something relevant, got {tuple(scores.shape)} and "
            f"{tuple(relevant.shape)} with {int(relevant.sum())} relevant."
        )
    ordered, order = scores.sort(descending=True, stable=True)
    found = relevant[order].double().cumsum(dim=0)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])  # the last image of its score
    found, seen = found[last], (last.nonzero()[:, 0] + 1).double()
    new = torch.diff(found, prepend=found.new_zeros(1))
    return float((new * found / seen).sum() / found[-1])


def mean_average_precision(image_embeds: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes of [`average_precision`] among all images.

    A class that no image has is left out: its precision is undefined.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): L2-normalised.
        classifier (`torch.Tensor` of shape `(K, D)`): As in [`label_ranks`].
        labels (`torch.Tensor` of shape `(I, K)`): 1 where the image is of the class, else 0.

    Returns:
        `float`: In (0, 1].

    Raises:
        ValueError: If shapes do not fit, a label is neither 0 nor 1, or no image has a class.
    """
    if image_embeds.shape[-1] != classifier.shape[-1] or labels.shape != (len(image_embeds), len(classifier)):
        raise ValueError(
            f"Expected image_embeds (I, D), classifier (K, D) and labels (I, K), got {tuple(image_embeds.shape)}, "
            f"{tuple(classifier.shape)} and {tuple(labels.shape)}."
        )
    if ((labels != 0) & (labels != 1)).any() or not labels.any():
        raise ValueError(
            "Expected labels 0 and 1, and at least one image of a class, got others or none. Repair the labels."
        )
    present = labels.any(dim=0).nonzero()[:, 0].tolist()
    # One class at a time: float32 scores, as everywhere here, and one column of them in memory.
    found = [average_precision(image_embeds @ classifier[column], labels[:, column]) for column in present]
    return sum(found) / len(found)


class ClassifierCache:
    """Classifiers by content, on disk and in memory.

    Files are written whole or not at all, so a killed run leaves no half-written file, and several processes may share
    a folder. When the folder grows beyond its bound, the least recently used files are deleted.

    The folder saves 961 s of CPU time for each later run on ImageNet with ViT-B/32's text tower: embedding the 79,840
    prompts takes 965 s on one thread (extrapolated from 1,000 of them), and a hit takes 4 s, key included. Measured by
    `benchmarks/classifier_cache.py`; see `benchmarks/results/classifier_cache.json`.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Where files are, e.g. `user_cache_dir("classifiers")`. Without a
            folder, classifiers are kept in memory alone.
        limit_mib (`int`, *optional*, defaults to 1024): Bound of the folder in MiB, >= 1.

    Raises:
        ValueError: If `limit_mib` is below 1.
    """

    def __init__(self, folder: str | os.PathLike | None = None, limit_mib: int = 1024):
        if limit_mib < 1:
            raise ValueError(f"Expected limit_mib >= 1, got {limit_mib}. To keep nothing, pass no cache.")
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            remove_leftovers(self.folder)
        self.limit_mib = limit_mib
        self._held: dict[str, torch.Tensor] = {}

    def get(
        self,
        model: DualEncoder,
        processor: Any,
        class_names: Sequence[str],
        templates: Sequence[str],
        build: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Take the classifier of a model for some classes, or build it.

        Args:
            model, processor: As in [`~modeling_dclip.encoders.fingerprints.fingerprint_text_encoder`] and
                [`~modeling_dclip.encoders.fingerprints.fingerprint_tokens`].
            class_names (`Sequence[str]`): The classes.
            templates (`Sequence[str]`): Each with `{}` for the name.
            build (`Callable`): Called without arguments if there is no classifier yet; gives float32 of shape `(K, D)`
                on the CPU.

        Returns:
            `torch.Tensor` of shape `(K, D)`: float32, on the CPU. Do not change it in place.

        Raises:
            ValueError: If a file is damaged.
        """
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        made_of = json.dumps([list(class_names), list(templates)], ensure_ascii=False)
        key = combine_keys([fingerprint_text_encoder(model), fingerprint_tokens(processor, prompts), made_of])
        classifier = self._held.pop(key, None)
        if classifier is None:
            classifier = self._read(key)
        if classifier is None:
            classifier = build()
            self._write(key, classifier)
        self._held[key] = classifier  # last in the order: the first one is the least recently used
        while len(self._held) > _HELD:
            del self._held[next(iter(self._held))]
        return classifier

    def clear(self) -> int:
        """Delete all files of the folder and forget what is in memory.

        Returns:
            `int`: How many files were deleted.
        """
        self._held.clear()
        files = self._files()
        for path in files:
            path.unlink(missing_ok=True)
        return len(files)

    def _files(self) -> list[Path]:
        return [] if self.folder is None else list_folder(self.folder, "*.safetensors")

    def _read(self, key: str) -> torch.Tensor | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            classifier = load_file(path)["classifier"]
            os.utime(path)  # mark it as used now, for the choice of what to delete
        except FileNotFoundError:  # never there, or deleted by another process
            return None
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"The cached classifier '{path}' is damaged ({error}). Delete the file.") from error
        return classifier

    def _write(self, key: str, classifier: torch.Tensor) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{key}.safetensors"
        with replacing(path) as temporary:
            save_file({"classifier": classifier.contiguous()}, temporary)
        self._shrink(keep=path)

    def _shrink(self, keep: Path) -> None:
        sizes = {}
        for path in self._files():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process deleted it
                continue
            sizes[path] = status.st_mtime_ns, status.st_size
        total = sum(size for _, size in sizes.values())
        for path in sorted(set(sizes) - {keep}, key=lambda path: sizes[path][0]):
            if total <= self.limit_mib * 2**20:
                break
            path.unlink(missing_ok=True)
            total -= sizes[path][1]


def build_classifier(
    encoder: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    classifiers: ClassifierCache | None = None,
) -> torch.Tensor:
    """Embed every class: the normalised mean of its prompts' normalised embeddings.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): As in [`~modeling_dclip.evaluation.embedding.embed_texts`].
        class_names (`Sequence[str]`): K non-empty names. Classes that share a name, as in ImageNet's usual list, get
            equal rows and a warning.
        templates (`Sequence[str]`): Each with one place for the name, `{}` or `{c}`.
        classifiers ([`ClassifierCache`], *optional*): Where to look first, and where to keep what is built.

    Returns:
        `torch.Tensor` of shape `(K, D)`: float32, L2-normalised, on the CPU.

    Raises:
        ValueError: If there are fewer than two classes, a name is empty, there is no template, or a template does not
            have exactly one place for the name.
    """
    names, templates = check_prompts(class_names, templates)
    distinct = list(dict.fromkeys(names))
    if len(distinct) < len(names):
        repeated = next(name for name in distinct if names.count(name) > 1)
        warnings.warn(
            f"{len(names) - len(distinct)} of {len(names)} classes have the name of another one, e.g. {repeated!r}: "
            "the model cannot tell them apart, and the first of them is taken.",
            stacklevel=2,
        )

    def build() -> torch.Tensor:
        prompts = [template.replace("{}", name) for name in distinct for template in templates]
        embeds = embed_texts(encoder, prompts)  # unit rows
        return torch.nn.functional.normalize(embeds.view(len(distinct), len(templates), -1).mean(dim=1), dim=1)

    if classifiers is None:
        rows = build()
    else:
        rows = classifiers.get(encoder.model, encoder.processor, distinct, templates, build)
    numbers = {name: row for row, name in enumerate(distinct)}
    return rows[[numbers[name] for name in names]]


def _read_labels(dataset: Dataset, classes: int) -> torch.Tensor:
    """Read the column `label`: `(I,)` class numbers, or `(I, K)` zeros and ones."""
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
                f"Expected {classes} zeros and ones an image, one per class name, got "
                f"{None if got is None else len(got)} in row {wrong[0]} ({len(wrong)} such rows)."
            )
        return torch.tensor(values)
    wrong = [row for row, value in enumerate(values) if not isinstance(value, int) or not 0 <= value < classes]
    if wrong:
        raise ValueError(
            f"Expected integer labels in [0, {classes}), got {values[wrong[0]]!r} in row {wrong[0]} ({len(wrong)} "
            "such rows)."
        )
    return torch.tensor(values)


def evaluate_zero_shot(
    encoder: Encoder,
    dataset: Dataset,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    classifiers: ClassifierCache | None = None,
) -> BenchmarkResult:
    """Classify every image by its nearest class embedding.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): As in [`~modeling_dclip.evaluation.embedding.embed_images`].
        dataset (`datasets.Dataset`): With `image` and `label`: an integer, a `ClassLabel` with one name for each class
            name, or, where an image may be of several classes, a list of K zeros and ones.
        class_names, templates, classifiers: As in [`build_classifier`].

    Returns:
        `BenchmarkResult`: `n` images and the metrics, in [0, 1]. With one label an image: `top1`; `top5` with five
            classes or more; `mean_per_class`, the mean accuracy of the classes that have images; `outcomes` of each
            ([`accuracy_outcomes`]); and `chance`, what guessing one of the K classes scores. With several labels an
            image: `map` ([`mean_average_precision`]).

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`build_classifier`]; also if the dataset names another number of classes, or a label is out
            of range.
    """
    labels = _read_labels(dataset, len(class_names))
    classifier = build_classifier(encoder, class_names, templates, classifiers=classifiers)
    images = embed_images(encoder, dataset)
    if labels.ndim == 2:
        return {"map": mean_average_precision(images, classifier, labels), "n": len(labels)}
    ranks = label_ranks(images, classifier, labels, [name.strip() for name in class_names])
    outcomes = accuracy_outcomes(ranks, labels, len(class_names))
    sums = {name: pairs.sum(0) for name, pairs in outcomes.items()}
    metrics = {name: float(total / count) for name, (total, count) in sums.items()}
    chance = {name: (5 if name == "top5" else 1) / len(class_names) for name in outcomes}
    return {**metrics, "n": len(ranks), "outcomes": outcomes, "chance": chance}
