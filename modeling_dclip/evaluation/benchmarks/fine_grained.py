"""Fine-grained questions: does the picture's true caption come before captions that are false in one respect?

An answer is right if the cosine of the true caption to the picture is above that of **every** false caption. Ties,
within [`~modeling_dclip.encoders.retrieval_ranks.TIE_TOLERANCE`], count against the model. Guessing is
right with a chance of 1/2 for one false caption, and of 1/(k + 1) for k. Winoground's pairs of two pictures and two
captions have the three scores of its paper, with a chance of 1/4, 1/4 and 1/6.

Source: Winoground (arXiv 2204.03162), SugarCrepe (arXiv 2306.14610), ARO (arXiv 2210.01936); docs/papers.md,
Evaluation. Deviation: ties are wrong in all of them.
"""

import io
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from tqdm.auto import tqdm

from modeling_dclip.data.images import decode_image
from modeling_dclip.data.questions.rows import QUESTION_FEATURES
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.fingerprints import hash_parts
from modeling_dclip.encoders.retrieval_ranks import TIE_TOLERANCE
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.evaluation.records import BenchmarkResult

PAIR_CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
_PAIRS_AT_A_TIME = 8192


def paired_cosines(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, images: torch.Tensor, texts: torch.Tensor
) -> torch.Tensor:
    """Compute the cosines of chosen pairs, in bounded memory.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): L2-normalised.
        text_embeds (`torch.Tensor` of shape `(C, D)`): L2-normalised.
        images, texts (`torch.Tensor` of shape `(P,)`): Rows to pair.

    Returns:
        `torch.Tensor` of shape `(P,)`: float32, in [-1, 1].
    """
    parts = zip(images.split(_PAIRS_AT_A_TIME), texts.split(_PAIRS_AT_A_TIME), strict=True)
    return torch.cat([(image_embeds[i].float() * text_embeds[t].float()).sum(dim=1) for i, t in parts])


def question_hits(true: torch.Tensor, false: torch.Tensor, question_of_false: torch.Tensor) -> torch.Tensor:
    """Say which questions are answered right.

    Args:
        true (`torch.Tensor` of shape `(Q,)`): The picture's cosine to the true caption.
        false (`torch.Tensor` of shape `(F,)`): Its cosines to false captions.
        question_of_false (`torch.Tensor` of shape `(F,)`): The question of each false caption, in [0, Q); every
            question at least once.

    Returns:
        `torch.Tensor` of shape `(Q,)`: bool.

    Raises:
        ValueError: If shapes do not fit, or a question has no false caption; the message names it.

    Example:
        >>> question_hits(torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.4, 0.5]), torch.tensor([0, 0, 1])).tolist()
        [True, False]
    """
    if true.ndim != 1 or false.shape != question_of_false.shape:
        raise ValueError(
            f"Expected true (Q,), false (F,) and question_of_false (F,), got {tuple(true.shape)}, "
            f"{tuple(false.shape)} and {tuple(question_of_false.shape)}."
        )
    empty = torch.bincount(question_of_false, minlength=len(true)) == 0
    if empty.any():
        raise ValueError(
            f"Expected a false caption for every question, got none for question {int(empty.nonzero()[0])}."
        )
    best = torch.full_like(true, -torch.inf).scatter_reduce(0, question_of_false, false, "amax")
    return best < true - TIE_TOLERANCE


def pair_hits(cosines: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute Winoground's three scores of each pair.

    Text: for each picture, its own caption is above the other one. Image: for each caption, its own picture is above
    the other one. Group: both.

    Args:
        cosines (`torch.Tensor` of shape `(U, 2, 2)`): Of pair u, picture i and caption j; i = j belong together.

    Returns:
        `dict[str, torch.Tensor]`: `text_score`, `image_score`, `group_score`, bool of shape `(U,)`.

    Raises:
        ValueError: If the shape is another.

    Example:
        >>> {name: hit.tolist() for name, hit in pair_hits(torch.tensor([[[0.9, 0.8], [0.5, 0.6]]])).items()}
        {'text_score': [True], 'image_score': [False], 'group_score': [False]}
    """
    if cosines.ndim != 3 or cosines.shape[1:] != (2, 2):
        raise ValueError(f"Expected cosines of shape (pairs, 2, 2), got {tuple(cosines.shape)}.")
    own = cosines.diagonal(dim1=1, dim2=2) - TIE_TOLERANCE  # (U, 2): of picture i and caption i
    text = (cosines.flip(2).diagonal(dim1=1, dim2=2) < own).all(dim=1)  # the same picture, the other caption
    image = (cosines.flip(1).diagonal(dim1=1, dim2=2) < own).all(dim=1)  # the same caption, the other picture
    return {"text_score": text, "image_score": image, "group_score": text & image}


def questions_fingerprint(dataset: Dataset) -> str:
    """Hash what [`~modeling_dclip.data.columns.dataset_fingerprint`] leaves out: false captions, categories, boxes,
    pairs.

    Args:
        dataset (`datasets.Dataset`): The schema of [`~modeling_dclip.data.questions.rows`].

    Returns:
        `str`: `sha256:<hex>`.
    """
    names = [
        name for name in ("negative_captions", "categories", "crop_box", "pair_id") if name in dataset.column_names
    ]
    rows = (repr([row[name] for name in names]) + "\0" for row in dataset.select_columns(names))
    return f"sha256:{hash_parts(chain([repr(names)], rows))}"


def _check_columns(dataset: Dataset) -> None:
    missing = [name for name in QUESTION_FEATURES if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"Expected the columns {list(QUESTION_FEATURES)}, got {dataset.column_names} without {missing}. Load the "
            "data with `load_fine_grained`, or bring it into the schema with `standardise_items`."
        )
    columns = (dataset[name][:] for name in ("image_id", "captions", "negative_captions", "categories"))
    for image_id, captions, negatives, categories in zip(*columns, strict=True):
        if not captions or not len(captions) == len(negatives) == len(categories) or not all(negatives):
            raise ValueError(
                f"Expected one or more captions for image_id {image_id!r}, each with its false captions and a "
                f"category, got {len(captions)} captions, {len(negatives)} lists of false ones and {len(categories)} "
                "categories."
            )


def _cut_out(dataset: Dataset, rows: range) -> Dataset:
    """Cut the part inside `crop_box` out of some rows' pictures, in memory."""
    columns: dict[str, list[Any]] = {"image_id": dataset["image_id"][rows.start : rows.stop], "image": []}
    for row in rows:
        image, box = decode_image(dataset, row), dataset.select_columns("crop_box")[row]["crop_box"]
        inside = box[0] < image.width and box[1] < image.height and box[2] > 0 and box[3] > 0
        # What lies outside is black, as in ARO; a picture of its own size on each side is room for any annotation.
        near = min(box[0] + image.width, box[1] + image.height) >= 0
        near = near and box[2] <= 2 * image.width and box[3] <= 2 * image.height
        if not inside or not near or box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(
                f"Image {columns['image_id'][row - rows.start]!r}: expected a box xyxy that meets the picture of "
                f"{image.width} x {image.height} pixels, got {box}."
            )
        buffer = io.BytesIO()
        image.crop(tuple(round(edge) for edge in box)).save(buffer, format="BMP")  # lossless and quick to write
        columns["image"].append({"bytes": buffer.getvalue(), "path": None})
    return Dataset.from_dict(columns, features=Features(image_id=Value("string"), image=Image()))


def _embed_pictures(encoder: Encoder, dataset: Dataset) -> torch.Tensor:
    if "crop_box" not in dataset.column_names:
        return embed_images(encoder, dataset)
    size = max(256, 4 * encoder.batch_size)  # pictures held at a time
    starts = tqdm(range(0, len(dataset), size), desc="Embedding parts of images", unit="lot")
    lots = (_cut_out(dataset, range(start, min(start + size, len(dataset)))) for start in starts)
    return torch.cat([embed_images(encoder, lot) for lot in lots])


def _metric_name(category: str) -> str:
    return re.sub(r"\W+", "_", category.strip().lower()).strip("_")


def _summary(hits: Mapping[str, torch.Tensor], units: Mapping[str, torch.Tensor], n_units: int) -> BenchmarkResult:
    """Average hits by metric, and sum them by unit as `outcomes` (U, 2); `units` holds the unit of each question."""
    outcomes = {
        name: torch.zeros(n_units, 2, dtype=torch.double).index_add(
            0, units[name], torch.stack([hit.double(), torch.ones_like(hit, dtype=torch.double)], dim=1)
        )
        for name, hit in hits.items()
    }
    means = {name: float(sums[:, 0].sum() / sums[:, 1].sum()) for name, sums in outcomes.items()}
    return {**means, "outcomes": outcomes}


def _by_category(names: list[str]) -> dict[str, torch.Tensor]:
    """Find the positions of each category that has a name, ordered by name."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(map(_metric_name, names)):
        if name:
            places.setdefault(name, []).append(place)
    return {name: torch.tensor(places[name]) for name in sorted(places)}


def _question_result(
    dataset: Dataset, image_embeds: torch.Tensor, text_embeds: torch.Tensor, rows: Mapping[str, int]
) -> BenchmarkResult:
    columns = (dataset[name][:] for name in ("captions", "negative_captions", "categories"))
    questions = [
        (row, *question) for row, own in enumerate(zip(*columns, strict=True)) for question in zip(*own, strict=True)
    ]
    owner = torch.tensor([row for row, *_ in questions])
    true = torch.tensor([rows[caption] for _, caption, _, _ in questions])
    numbers = torch.tensor([len(negatives) for _, _, negatives, _ in questions])
    question_of_false = torch.arange(len(questions)).repeat_interleave(numbers)
    false = torch.tensor([rows[negative] for _, _, negatives, _ in questions for negative in negatives])
    hit = question_hits(
        paired_cosines(image_embeds, text_embeds, owner, true),
        paired_cosines(image_embeds, text_embeds, owner[question_of_false], false),
        question_of_false,
    )
    places = _by_category([category for *_, category in questions])
    places = {"accuracy": torch.arange(len(questions))} | {f"{name}_accuracy": at for name, at in places.items()}
    result = _summary(
        {m: hit[at] for m, at in places.items()}, {m: owner[at] for m, at in places.items()}, len(dataset)
    )
    chance = {metric: float((1 / (1 + numbers[at].double())).mean()) for metric, at in places.items()}
    categories = [name for name in places if name != "accuracy"]
    if len(categories) > 1:
        for values in (result, chance):
            values["mean_category_accuracy"] = sum(values[name] for name in categories) / len(categories)
    return {**result, "n": len(questions), "chance": chance}


def _pair_result(
    dataset: Dataset, image_embeds: torch.Tensor, text_embeds: torch.Tensor, rows: Mapping[str, int]
) -> BenchmarkResult:
    captions, categories = dataset["captions"][:], dataset["categories"][:]
    members: dict[str, list[int]] = {}
    for row, pair in enumerate(dataset["pair_id"][:]):
        members.setdefault(pair, []).append(row)
    for pair, found in members.items():
        if len(found) != 2 or any(len(captions[row]) != 1 for row in found):
            raise ValueError(f"Expected two rows of one caption each with pair_id {pair!r}, got rows {found}.")
    images = torch.tensor(list(members.values()))  # (U, 2)
    texts = torch.tensor([[rows[captions[row][0]] for row in found] for found in members.values()])
    first, second = images.repeat_interleave(2, dim=1).flatten(), texts.repeat(1, 2).flatten()
    hits = pair_hits(paired_cosines(image_embeds, text_embeds, first, second).view(-1, 2, 2))
    every = torch.arange(len(images))
    places = {"": every} | _by_category([categories[found[0]][0] for found in members.values()])
    scores = {(name, score): (at, hit[at]) for name, at in places.items() for score, hit in hits.items()}
    named = {f"{name}_{score}" if name else score: value for (name, score), value in scores.items()}
    result = _summary({m: hit for m, (_, hit) in named.items()}, {m: at for m, (at, _) in named.items()}, len(images))
    chance = {f"{name}_{score}" if name else score: PAIR_CHANCE[score] for name, score in scores}
    return {**result, "n": len(images), "chance": chance}


def evaluate_fine_grained(encoder: Encoder, dataset: Dataset) -> BenchmarkResult:
    """Ask every question of a dataset. Each picture and each text is embedded once, however many questions use it.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): As in [`~modeling_dclip.evaluation.embedding.embed_images`].
        dataset (`datasets.Dataset`): From [`~modeling_dclip.data.questions.load_fine_grained`].

    Returns:
        `BenchmarkResult`: `accuracy` over all questions; `<category>_accuracy`; with two categories or more their
            mean, `mean_category_accuracy`. For pairs instead `text_score`, `image_score`, `group_score`, and the same
            by category (`<category>_text_score`...). Further `n` questions or pairs; `chance` by metric; and
            `outcomes` by metric, float64 of shape `(U, 2)`, one row for each picture or pair.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If a column is missing or uneven, a picture cannot be read, or a box lies outside its picture; the
            message names the image's id.
    """
    _check_columns(dataset)
    columns = zip(dataset["captions"][:], dataset["negative_captions"][:], strict=True)
    texts = [text for true, false in columns for text in [*true, *(text for texts in false for text in texts)]]
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    image_embeds, text_embeds = _embed_pictures(encoder, dataset), embed_texts(encoder, list(rows))
    result = _pair_result if "pair_id" in dataset.column_names else _question_result
    return result(dataset, image_embeds, text_embeds, rows)
