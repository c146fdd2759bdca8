"""The checks that the rows of every caption source pass, and stable ids that are equal for one picture in all sources.

A rejected row is counted, and a warning names the first ids. No row is replaced silently.
"""

import ast
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value

from modeling_dclip.data.columns import put_columns
from modeling_dclip.data.files import FileFinder, is_utf8, parse_json, printable

logger = logging.getLogger(__name__)

FIRST_IDS = 5
CAPTION_FEATURES = Features(image_id=Value("string"), image=Image(), captions=List(Value("string")))
MISSING_MODES = ("raise", "skip")
# How programs write a missing value as text: pandas, numpy, spreadsheets, databases.
_NO_CAPTION = {"nan", "NaN", "NAN", "<NA>", "#N/A", "N/A", "null", "NULL", "None", "NaT"}
# A list of texts written as one text, as tables without lists hold it: of JSON or of Python.
_LISTED = re.compile(r"""\[\s*["'].*["']\s*,?\s*\]""", re.DOTALL)
_FLICKR_NAME = re.compile(r"(\d+)_[0-9a-f]{6,}")


def coco_id(value: str | int) -> str:
    """`coco-<number>` from a COCO image id or from any of its file names.

    Raises:
        ValueError: If the value ends in no number.

    Example:
        >>> coco_id("COCO_val2014_000000391895.jpg") == coco_id("000000391895.jpg") == coco_id(391895)
        True
    """
    match = re.search(r"(\d+)$", PureWindowsPath(str(value)).stem)
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
    stem = PureWindowsPath(str(value)).stem
    match = _FLICKR_NAME.fullmatch(stem)
    return f"flickr-{match[1] if match else stem}"


ID_RULES = {"coco": coco_id, "flickr": flickr_id}


def apply_rule(source: str, value: str, where: str) -> str:
    """The id that a source's rule gives.

    Args:
        source (`str`): A key of `ID_RULES`.
        value (`str`): An id or a file name of the source.
        where (`str`): Where it stands, for messages, e.g. `"'a.parquet', row 3"`.

    Raises:
        ValueError: If it is no id of the source; the message says where.
    """
    try:
        return ID_RULES[source](value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def first(ids: Iterable[str]) -> str:
    """The first few ids, for a message."""
    return ", ".join(map(printable, list(ids)[:FIRST_IDS]))


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


def _without_marks(text: str) -> str:
    return text.strip().strip("\ufeff").strip()


def _listed_texts(text: str) -> list[str]:
    """The texts of a list that is written as one text; any other text is a list of itself."""
    if not _LISTED.fullmatch(text.strip()):
        return [text]
    try:
        values = parse_json(text.strip(), "a caption")
    except ValueError:
        try:
            values = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
    return values if all(isinstance(value, str) for value in values) else [text]


def clean_captions(
    image_ids: Sequence[str], captions: Sequence[Sequence[str | None] | None], source: str
) -> tuple[list[list[str]], list[int]]:
    """Strip captions and leave out empty ones; a row with none left is rejected and reported.

    A caption that is a list of texts, written as one text (`["a dog", "a cat"]`, in JSON's way or in Python's), is
    read as these texts; such images are counted and reported. A byte order mark around a caption is no part of it.

    A caption that is nothing but `nan`, `null` or another of the words that programs write for a missing value counts
    as empty; such captions are counted and reported.

    Returns:
        `tuple`: The captions of every row (maybe empty), and the indices of the rows to keep.
    """
    read = [[one for text in row or () if text for one in _listed_texts(text)] for row in captions]
    given = [[text for text in row or () if text] for row in captions]
    if listed := [i for i, (texts, row) in enumerate(zip(read, given, strict=True)) if texts != row]:
        logger.warning(
            "%s: read captions that are lists, written as one text, of %d images, first ids: %s",
            *(source, len(listed), first(image_ids[i] for i in listed)),
        )
    stripped = [[text for text in map(_without_marks, row) if text] for row in read]
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


LEAVE_OUT = "Fix the image folder, or add ',missing=skip' to leave them out."
FIX_PATHS = "Fix the paths or remove the rows."


def locate_images(
    image_ids: Sequence[str], paths: Sequence[Path], source: str, missing: str, advice: str = LEAVE_OUT
) -> dict[int, Path]:
    """Find the image file of each row, as [`~modeling_dclip.data.files.FileFinder`] finds it.

    Args:
        image_ids (`Sequence[str]`): For messages.
        paths (`Sequence[Path]`): As the source names them.
        source (`str`): For messages.
        missing (`str`): `"raise"`, or `"skip"` to leave out rows whose file is missing and report them.
        advice (`str`, *optional*): What to do about missing files.

    Returns:
        `dict[int, Path]`: The file on disk by row, in order, of the rows that have one.

    Raises:
        FileNotFoundError: If a file is missing and `missing` is `"raise"`.
        ValueError: If `missing` is neither `"raise"` nor `"skip"`, or two files fit one name.
    """
    if missing not in MISSING_MODES:
        raise ValueError(f"Expected missing to be one of {MISSING_MODES}, got {missing!r}.")
    finder = FileFinder()
    found: dict[int, Path] = {}
    for row, path in enumerate(paths):
        file = finder.find(path)
        if file is not None and is_utf8(file):
            found[row] = file
    absent = [row for row in range(len(paths)) if row not in found]
    if absent:
        examples = []
        for row in absent[:FIRST_IDS]:
            reason = finder.explain(paths[row])
            place = f"'{printable(paths[row])}'" + (f": {reason}" if reason else "")
            examples.append(f"{printable(image_ids[row])} ({place})")
        message = f"{source}: {len(absent)} of {len(paths)} image files are missing, first: {', '.join(examples)}"
        if missing == "raise":
            raise FileNotFoundError(f"{message}. {advice}")
        logger.warning("%s; left out", message)
    respelled = [row for row, file in found.items() if file != paths[row]]
    if respelled:
        row = respelled[0]
        logger.info(
            "%s: %d files are spelled otherwise on disk, first %s for %s",
            *(source, len(respelled), ascii(found[row].name), ascii(paths[row].name)),
        )
    return found


def present_images(
    dataset: Dataset, image_ids: Sequence[str] | None, name: str, missing: str, advice: str = LEAVE_OUT
) -> tuple[Dataset, list[int]]:
    """Find the rows whose picture is stored or lies at its path. Chunk by chunk, so that stored bytes stay on disk.

    Args:
        dataset (`datasets.Dataset`): With `image` of type `Image`.
        image_ids (`Sequence[str]`, *optional*): For messages; by default rows are named by their number.
        name (`str`): What messages call the dataset.
        missing, advice (`str`): As in [`locate_images`].

    Returns:
        `tuple[datasets.Dataset, list[int]]`: The dataset, paths spelled as on disk, and the rows that have a picture.

    Raises:
        FileNotFoundError, ValueError: As [`locate_images`]; also if a row has neither bytes nor a path.
    """
    ids = [f"of row {row}" for row in range(len(dataset))] if image_ids is None else image_ids
    chunks = dataset.select_columns(["image"]).with_format("arrow")[:]["image"].chunks if len(dataset) else []
    files: dict[int, Path] = {}
    start = 0
    for chunk in chunks:
        no_bytes = pc.is_null(pc.struct_field(chunk, "bytes")).to_numpy(zero_copy_only=False)
        paths = pc.struct_field(chunk, "path")
        for i in np.flatnonzero(no_bytes).tolist():
            if not paths[i].is_valid:
                raise ValueError(
                    f"{name}: image {printable(ids[start + i])} has neither bytes nor a path. Remove the row."
                )
            files[start + i] = Path(paths[i].as_py())
        start += len(chunk)
    rows = list(files)
    located = locate_images([ids[row] for row in rows], list(files.values()), name, missing, advice)
    found = {rows[place]: file for place, file in located.items()}
    respelled = {row: str(file) for row, file in found.items() if file != files[row]}
    kept = [row for row in range(len(dataset)) if row not in files or row in found]
    return (_with_paths(dataset, chunks, respelled) if respelled else dataset), kept


def _with_paths(dataset: Dataset, chunks: Sequence[pa.StructArray], paths: dict[int, str]) -> Dataset:
    """Replace the paths of some rows; bytes are not copied."""
    parts, start = [], 0
    for chunk in chunks:
        old = pc.struct_field(chunk, "path").to_pylist()
        new = pa.array([paths.get(start + i, path) for i, path in enumerate(old)], pa.string())
        parts.append(pa.StructArray.from_arrays([pc.struct_field(chunk, "bytes"), new], names=["bytes", "path"]))
        start += len(chunk)
    return put_columns(dataset, {"image": (pa.chunked_array(parts), dataset.features["image"])})


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
    there = locate_images(image_ids, paths, source, missing)
    require_rows(len(there), source)
    return Dataset.from_dict(
        {
            "image_id": [image_ids[i] for i in there],
            "image": list(map(str, there.values())),
            "captions": [captions[i] for i in there],
        },
        features=CAPTION_FEATURES,
    )
