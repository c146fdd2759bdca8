"""Questions about pictures in one schema: which of these captions is true?

A picture has one row, so that it is embedded once.

| column | what |
|---|---|
| `image_id`, `image` | as everywhere |
| `captions` | list of str: the true caption of each question about this picture |
| `negative_captions` | list of lists of str, beside `captions`: the false ones, at least one a question |
| `categories` | list of str, beside `captions`: what the question tests; `""` where the source does not say |
| `crop_box` | only where the source asks about a part: xyxy in pixels of the stored image |
| `pair_id` | only of Winoground's form: two rows with one id, each one's true caption the other's false one |
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, Image, List, Value

from modeling_dclip.data.rows import first, locate_images, require_rows
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

QUESTION_FEATURES = Features(
    image_id=Value("string"),
    image=Image(),
    captions=List(Value("string")),
    negative_captions=List(List(Value("string"))),
    categories=List(Value("string")),
)
CROP_FEATURE = List(Value("float32"), length=4)
PAIR_FEATURE = Value("string")


class Item(NamedTuple):
    """One question about the picture in a file. `crop_box` is xyxy in pixels, `pair_id` joins two pictures."""

    image_id: str
    path: Path
    caption: str
    negatives: Sequence[str]
    category: str = ""
    crop_box: tuple[float, float, float, float] | None = None
    pair_id: str = ""


def answerable(
    item_ids: Sequence[str], captions: Sequence[str], negatives: Sequence[Sequence[str]], source: str
) -> list[int]:
    """The questions whose true caption is not among the false ones; the others have no answer, and are counted and
    reported.

    Args:
        item_ids (`Sequence[str]`): For the report.
        captions (`Sequence[str]`): The true caption of each.
        negatives (`Sequence[Sequence[str]]`): The false ones of each.
        source (`str`): For the report.

    Returns:
        `list[int]`: Positions of those to keep.

    Raises:
        ValueError: If none is left.
    """
    same = [i for i, (text, wrong) in enumerate(zip(captions, negatives, strict=True)) if text in wrong]
    if same:
        names = first(item_ids[i] for i in same)
        logger.warning(
            "%s: left out %s whose true caption is among the false ones, first: %s",
            *(source, count_of(len(same), "question"), names),
        )
    left_out = set(same)
    keep = [i for i in range(len(captions)) if i not in left_out]
    require_rows(len(keep), source, "a true and a different false caption")
    return keep


def build_item_rows(items: Sequence[Item], source: str, missing: str) -> Dataset:
    """Gather questions by picture; pictures stay paths until they are read.

    Args:
        items (`Sequence[Item]`): Those with one `image_id` must agree in `path`, `crop_box` and `pair_id`.
        source (`str`): For messages.
        missing (`str`): `"raise"`, or `"skip"` to leave out questions without a file and report them.

    Returns:
        `datasets.Dataset`: The schema above, pictures in order of their first question.

    Raises:
        FileNotFoundError: If a file is missing and `missing` is `"raise"`.
        ValueError: If no question is left, or `missing` is unknown.
    """
    names = [f"{item.image_id} ({item.caption!r})" for item in items]
    kept = answerable(names, [item.caption for item in items], [item.negatives for item in items], source)
    rows: dict[str, list[Item]] = {}
    for index in kept:
        rows.setdefault(items[index].image_id, []).append(items[index])
    questions = list(rows.values())
    files = locate_images(list(rows), [group[0].path for group in questions], source, missing)
    groups = [[questions[i][0]._replace(path=file), *questions[i][1:]] for i, file in files.items()]
    features = dict(QUESTION_FEATURES)
    if any(item.pair_id for item in items):
        features["pair_id"] = PAIR_FEATURE
        members = Counter(group[0].pair_id for group in groups)
        alone = [group[0].image_id for group in groups if members[group[0].pair_id] != 2]
        if alone:
            logger.warning(
                "%s: left out %d pictures whose pair is not whole, first: %s", source, len(alone), first(alone)
            )
        groups = [group for group in groups if members[group[0].pair_id] == 2]
    if any(item.crop_box for item in items):
        features["crop_box"] = CROP_FEATURE
    require_rows(len(groups), source, "an image, a true and a false caption")
    columns = {
        "image_id": [group[0].image_id for group in groups],
        "image": [str(group[0].path) for group in groups],
        "captions": [[item.caption for item in group] for group in groups],
        "negative_captions": [[list(item.negatives) for item in group] for group in groups],
        "categories": [[item.category for item in group] for group in groups],
        "pair_id": [group[0].pair_id for group in groups],
        "crop_box": [group[0].crop_box for group in groups],
    }
    return Dataset.from_dict({name: columns[name] for name in features}, features=Features(features))
