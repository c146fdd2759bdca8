"""The checks that the rows of every caption source pass, and stable ids that are equal for one picture in all sources.

A rejected row is counted, and a warning names the first ids. No row is replaced silently.
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

from modeling_dclip.data.files import entry_names

logger = logging.getLogger(__name__)

FIRST_IDS = 5
CAPTION_FEATURES = Features(image_id=Value("string"), image=Image(), captions=List(Value("string")))
MISSING_MODES = ("raise", "skip")
# How programs write a missing value as text: pandas, numpy, spreadsheets, databases.
_NO_CAPTION = {"nan", "NaN", "NAN", "<NA>", "#N/A", "N/A", "null", "NULL", "None", "NaT"}
_FLICKR_NAME = re.compile(r"(\d+)_[0-9a-f]{6,}")


def coco_id(value: str | int) -> str:
    """`coco-<number>` from a COCO image id or from any of its file names.

    Raises:
        ValueError: If the value ends in no number.

    Example:
        >>> coco_id("COCO_val2014_000000391895.jpg") == coco_id("000000391895.jpg") == coco_id(391895)
        True
    """
    match = re.search(r"(\d+)$", Path(str(value)).stem)
    if match is None:
        raise ValueError(f"Expected a COCO image id or file name that ends in a number, got {value!r}.")
    return f"coco-{int(match[1])}"


def flickr_id(value: str | int) -> str:
    """`flickr-<photo id>` from the file name of Flickr30k (`<photo id>.jpg`) or Flickr8k (`<photo id>_<secret>.jpg`).

    The secret is dropped because Flickr30k holds pictures of Flickr8k under the bare photo id. Without it, a test
    picture of one set is found in the other. A name of another form keeps its whole stem.

    Example:
        >>> flickr_id("1000268201_693b08cb0e.jpg") == flickr_id("1000268201.jpg")
        True
    """
    stem = Path(str(value)).stem
    match = _FLICKR_NAME.fullmatch(stem)
    return f"flickr-{match[1] if match else stem}"


ID_RULES = {"coco": coco_id, "flickr": flickr_id}


def first(ids: Iterable[str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(list(ids)[:FIRST_IDS])


def require_unique(image_ids: Sequence[str], source: str) -> None:
    """Refuse repeated image ids.

    Raises:
        ValueError: If an image id comes more than once; the message counts and names them.
    """
    if len(set(image_ids)) == len(image_ids):
        return
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for image_id in image_ids:
        if image_id in seen:
            repeated[image_id] = None
        seen.add(image_id)
    raise ValueError(
        f"{len(repeated)} image ids come more than once in {source}: {first(repeated)}. "
        "Expected one row an image with all its captions; remove the repeated rows or the overlapping source."
    )


def require_rows(number: int, source: str, what: str = "an image and a caption") -> None:
    """Refuse a dataset left empty.

    Raises:
        ValueError: If `number` is 0.
    """
    if number == 0:
        raise ValueError(f"No row with {what} is left of {source}. Expected at least one.")


def clean_captions(
    image_ids: Sequence[str], captions: Sequence[Sequence[str | None] | None], source: str
) -> tuple[list[list[str]], list[int]]:
    """Strip captions and leave out empty ones; a row with none left is rejected and reported.

    A caption that is nothing but `nan`, `null` or another of the words that programs write for a missing value counts
    as empty; such captions are counted and reported.

    Returns:
        `tuple`: The captions of every row (maybe empty), and the indices of the rows to keep.
    """
    stripped = [[text.strip() for text in row or () if text and text.strip()] for row in captions]
    cleaned = [[text for text in row if text not in _NO_CAPTION] for row in stripped]
    missing = [i for i, (all_of, kept) in enumerate(zip(stripped, cleaned, strict=True)) if len(all_of) > len(kept)]
    if missing:
        texts = sorted({text for i in missing for text in stripped[i] if text in _NO_CAPTION})
        logger.warning(
            "%s: left out captions that say %s, which stands for a missing value, of %d images, first ids: %s",
            *(source, " or ".join(map(repr, texts)), len(missing), first(image_ids[i] for i in missing)),
        )
    keep = [index for index, row in enumerate(cleaned) if row]
    if len(keep) < len(cleaned):
        rejected = [image_id for image_id, row in zip(image_ids, cleaned, strict=True) if not row]
        logger.warning(
            "%s: rejected %d images without a caption, first ids: %s", source, len(rejected), first(rejected)
        )
    return cleaned, keep


def existing_images(image_ids: Sequence[str], paths: Sequence[Path], source: str, missing: str) -> list[int]:
    """Find the rows whose image file exists. Folders are listed once, so that a hundred thousand files are quick.

    Raises:
        FileNotFoundError: If a file is missing and `missing` is `"raise"`.
        ValueError: If `missing` is neither `"raise"` nor `"skip"`.
    """
    if missing not in MISSING_MODES:
        raise ValueError(f"Expected missing to be one of {MISSING_MODES}, got {missing!r}.")
    listed: dict[str, set[str]] = {}
    for path in paths:
        folder = os.path.dirname(path)
        if folder not in listed:
            listed[folder] = entry_names(folder or ".")
    keep = [i for i, path in enumerate(paths) if os.path.basename(path) in listed[os.path.dirname(path)]]
    absent = sorted(set(range(len(paths))) - set(keep))
    if absent:
        examples = ", ".join(f"{image_ids[i]} ('{paths[i]}')" for i in absent[:FIRST_IDS])
        message = f"{source}: {len(absent)} of {len(paths)} image files are missing, first: {examples}"
        if missing == "raise":
            raise FileNotFoundError(f"{message}. Fix the image folder, or add ',missing=skip' to leave them out.")
        logger.warning("%s; left out", message)
    return keep


def build_rows(
    image_ids: list[str], paths: list[Path], captions: Sequence[Sequence[str | None]], source: str, missing: str
) -> Dataset:
    """Check the rows and make the dataset. Images stay paths until they are read.

    Raises:
        FileNotFoundError: If an image file is missing and `missing` is `"raise"`.
        ValueError: If an image id is repeated or no row is left.
    """
    require_unique(image_ids, source)
    cleaned, keep = clean_captions(image_ids, captions, source)
    image_ids, paths, captions = [image_ids[i] for i in keep], [paths[i] for i in keep], [cleaned[i] for i in keep]
    there = existing_images(image_ids, paths, source, missing)
    require_rows(len(there), source)
    return Dataset.from_dict(
        {
            "image_id": [image_ids[i] for i in there],
            "image": [str(paths[i]) for i in there],
            "captions": [captions[i] for i in there],
        },
        features=CAPTION_FEATURES,
    )
