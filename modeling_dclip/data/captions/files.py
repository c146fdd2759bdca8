"""Readers of caption files beside a folder of pictures (COCO, Karpathy's splits, Flickr30k, Conceptual Captions, one's
own tables), and of folders of pictures without captions.

Pictures stay paths until they are read. A row without captions has an empty list under `captions`; only
[`read_images`] and [`drop_captions`] make such rows, for teachers that read no caption.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from datasets import Dataset

from modeling_dclip.data.columns import put_columns
from modeling_dclip.data.failures import MistakeCollector
from modeling_dclip.data.files import (
    NULLABLE_TEXT,
    SEPARATORS,
    FileFinder,
    TableRow,
    find_separator,
    name_entry,
    read_json,
    read_table,
    read_text,
    require_field,
    require_file,
    require_folder,
    require_id,
)
from modeling_dclip.data.images import describe_others, find_images, image_suffixes, warn_passed_over
from modeling_dclip.data.rows import (
    CAPTION_FEATURES,
    FIRST_IDS,
    ID_RULES,
    NEGATIVES,
    Lines,
    apply_rule,
    build_rows,
    coco_id,
    first,
    flickr_id,
    require_unique,
)
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"\s*https?://")
_ADDRESS_NAMES = {"url", "urls", "image_url", "imageurl", "link", "image"}  # what the column of addresses is called
_COMMENT = re.compile(r"\s*(\d+)\s+(\S.*)", re.DOTALL)


def read_coco_id(entry: Any, key: str, where: str, path: str | PurePath) -> str:
    """`coco-<number>` of a number, or of a text that ends in one, in a JSON file.

    Args:
        entry (`Any`): The object.
        key (`str`): Where the number is.
        where (`str`): The object's name in the file, for messages.
        path (`str` or `PurePath`): The file, for messages.

    Raises:
        ValueError: If it is none; the message names file, entry and key.
    """
    value = require_id(entry, key, where, path)
    try:
        return coco_id(value)
    except ValueError as error:
        raise ValueError(
            f"{where} of '{path}': expected a number, or text that ends in one, under {key!r}, got {value!r:.80}."
        ) from error


def _captions(entry: Any, key: str, where: str, path: str | Path) -> list[str | None]:
    """One caption, none, or a list of them, under a key."""
    value = require_field(entry, key, where, path, (*NULLABLE_TEXT, list))
    if not isinstance(value, list):
        return [value]
    return [require_field({key: text}, key, where, path, NULLABLE_TEXT) for text in value]


def read_coco(annotations: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read a COCO captions file (`captions_train2017.json`, `captions_val2017.json`) and its image folder.

    Args:
        annotations (`str`): The JSON file, with `images` (`id`, `file_name`) and `annotations` (`image_id`,
            `caption`: text, or a list of texts). Ids are numbers, or texts that end in one.
        image_folder (`str`): The folder of the files named there.
        missing (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out images without a file and reports them.

    Returns:
        `datasets.Dataset`: `image_id` (`coco-<id>`), `image` (a path), `captions` in the order of the file.

    Raises:
        FileNotFoundError: If the file, the folder or an image is missing.
        ValueError: If a key is missing, an image id is repeated, or an annotation belongs to no image.
    """
    content = read_json(annotations, "COCO captions file", ("images", "annotations"))
    folder = require_folder(image_folder, "image folder")
    images = require_field(content, "images", "The object", annotations, list)
    named = [(name_entry("Image", image, position), image) for position, image in enumerate(images)]
    image_ids = [read_coco_id(image, "id", where, annotations) for where, image in named]
    paths = [folder / require_field(image, "file_name", where, annotations, str) for where, image in named]
    require_unique(image_ids, f"'{annotations}'")
    captions: dict[str, list[str | None]] = {image_id: [] for image_id in image_ids}
    entries = require_field(content, "annotations", "The object", annotations, list)
    for position, annotation in enumerate(entries):
        name = name_entry("Annotation", annotation, position)
        image_id = read_coco_id(annotation, "image_id", name, annotations)
        if image_id not in captions:
            raise ValueError(
                f"{name} of '{annotations}' belongs to image {annotation['image_id']!r}, which is not under 'images'."
            )
        captions[image_id] += _captions(annotation, "caption", name, annotations)
    return build_rows(image_ids, paths, list(captions.values()), f"'{annotations}'", missing)


def _karpathy_id(entry: dict[str, Any], where: str, path: str | Path) -> str:
    """`coco-<cocoid>`, or `flickr-...` of the file name where the entry has no `cocoid`."""
    if "cocoid" in entry:
        return read_coco_id(entry, "cocoid", where, path)
    return flickr_id(require_field(entry, "filename", where, path, str))


def _karpathy_images(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The entries, each with a split, and what messages call them."""
    content = read_json(path, "Karpathy split file", ("images",))
    images = require_field(content, "images", "The object", path, list)
    named = [(f"Image at position {position} (from 0)", entry) for position, entry in enumerate(images)]
    for where, entry in named:
        require_field(entry, "split", where, path, str)
    return named


def _sentence(sentence: Any, where: str, path: str | Path) -> str | None:
    """A sentence is an object with its words as they were written under `raw`, or these words themselves."""
    return sentence if isinstance(sentence, str) else require_field(sentence, "raw", where, path, NULLABLE_TEXT)


def karpathy_test_ids(path: str | Path) -> set[str]:
    """Image ids of the test split of a Karpathy file, to be left out of training under whatever file name they come.

    Args:
        path (`str` or `Path`): `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`.

    Returns:
        `set[str]`: `coco-<id>` or `flickr-<photo id>`, as every reader writes them.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If a key is missing or the file has no test image.
    """
    images = _karpathy_images(path)
    ids = {_karpathy_id(entry, where, path) for where, entry in images if entry["split"] == "test"}
    if not ids:
        raise ValueError(f"No image of the split 'test' in '{path}'. Expected a file of Karpathy's splits.")
    return ids


def read_karpathy(dataset: str, image_folder: str, split: str, *, missing: str = "raise") -> Dataset:
    """Read one split of a Karpathy file for COCO, Flickr30k or Flickr8k.

    The image of a COCO entry is looked for at `filepath/filename` (the 2014 layout), then under the 2017 name in
    `train2017/` and `val2017/`, then by either name in the folder itself. A Flickr entry's is `filename`.

    Args:
        dataset (`str`): The JSON file, with `images` (`filename`, `split`, `sentences`, and for COCO `filepath`,
            `cocoid`). A sentence is an object with `raw`, or text.
        image_folder (`str`): The folder of the pictures.
        split (`str`): `"train"` (with `"restval"`, as usual), `"val"` or `"test"`.
        missing (`str`, *optional*, defaults to `"raise"`): As in [`read_coco`].

    Returns:
        `datasets.Dataset`: `image_id`, `image` (a path), `captions` (the raw sentences).

    Raises:
        FileNotFoundError: If the file, the folder or an image is missing.
        ValueError: If a key is missing, an image id is repeated or the split is unknown; the message lists the splits.
    """
    images = _karpathy_images(dataset)
    folder = require_folder(image_folder, "image folder")
    wanted = {"train", "restval"} if split == "train" else {split}
    present = {entry["split"] for _, entry in images}
    if not wanted & present:
        raise ValueError(f"Unknown split {split!r} of '{dataset}'. It has {sorted(present)}.")
    image_ids, paths, captions = [], [], []
    finder = FileFinder()
    for where, entry in images:
        if entry["split"] not in wanted:
            continue
        image_ids.append(_karpathy_id(entry, where, dataset))
        name = require_field(entry, "filename", where, dataset, str)
        where = f"Image {name}"
        subfolder = require_field(entry, "filepath", where, dataset, NULLABLE_TEXT) if "filepath" in entry else None
        candidates = [folder / (subfolder or "") / name, folder / name]
        if "cocoid" in entry:
            modern = f"{int(image_ids[-1].removeprefix('coco-')):012d}.jpg"
            candidates[1:1] = [folder / "train2017" / modern, folder / "val2017" / modern, folder / modern]
        paths.append(next((path for path in candidates if finder.find(path) is not None), candidates[0]))
        sentences = require_field(entry, "sentences", where, dataset, list)
        captions.append([_sentence(sentence, f"A sentence of {name}", dataset) for sentence in sentences])
    return build_rows(image_ids, paths, captions, f"split {split!r} of '{dataset}'", missing)


def read_flickr30k(results: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read Flickr30k's `results.csv`: `image_name| comment_number| comment`, separated by pipes and spaces.

    The published file has a row whose second pipe is missing (`2199200615.jpg| 4   A dog runs ...`). Such a row is
    read by its number and reported with its line. Any other malformed row is an error. Pipes inside a comment stay.

    Args:
        results (`str`): The file.
        image_folder (`str`): The folder of the pictures (`flickr30k_images`).
        missing (`str`, *optional*, defaults to `"raise"`): As in [`read_coco`].

    Returns:
        `datasets.Dataset`: `image_id` (`flickr-<photo id>`), `image` (a path), `captions`.

    Raises:
        FileNotFoundError: If the file, the folder or an image is missing.
        ValueError: If the header or a row is malformed; the message names the line.
    """
    folder = require_folder(image_folder, "image folder")
    lines = read_text(require_file(results, "Flickr30k results file")).split("\n")
    if [part.strip() for part in lines[0].split("|")] != ["image_name", "comment_number", "comment"]:
        raise ValueError(
            f"Expected the header 'image_name| comment_number| comment' in '{results}', got {lines[0]!r}."
        )
    captions: dict[str, list[str]] = {}
    numbers: dict[str, int] = {}  # the first line of each image
    repaired = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("|", 2)]
        if len(parts) == 2 and (match := _COMMENT.fullmatch(parts[1])):
            parts = [parts[0], match[1], match[2]]
            repaired.append(number)
        if len(parts) != 3 or not parts[0] or not parts[1].isdigit():
            raise ValueError(f"Expected 'name| number| comment' in line {number} of '{results}', got {line!r}.")
        captions.setdefault(parts[0], []).append(parts[2])
        numbers.setdefault(parts[0], number)
    if repaired:
        lines_text = ", ".join(map(str, repaired[:FIRST_IDS]))
        logger.warning("'%s': read %d rows without their second pipe, lines %s", results, len(repaired), lines_text)
    names = list(captions)
    ids, paths = [flickr_id(name) for name in names], [folder / name for name in names]
    lines_of = Lines(results, list(numbers.values()))
    return build_rows(ids, paths, list(captions.values()), f"'{results}'", missing, lines_of)


def _files_by_number(folder: Path) -> dict[int, Path]:
    """Pictures in `folder` and below whose name is a number, by that number."""
    found: dict[int, Path] = {}
    pictures = find_images(folder)
    warn_passed_over(pictures.passed_over, folder)
    for path in pictures.files:
        if not (path.stem.isascii() and path.stem.isdecimal()):
            continue
        number = int(path.stem)
        if found.setdefault(number, path) != path:
            raise ValueError(f"Two files stand for row {number}: '{found[number]}' and '{path}'. Keep one.")
    return found


def read_conceptual(table: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read a Conceptual Captions table (`caption <tab> url`, no header) with pictures downloaded beforehand.

    The picture of a row is the file named in a third column, relative to the folder, where there is one; otherwise the
    file, in the folder or below it, whose name is the row's number counted from 0, padded or not (`12.jpg`,
    `00000/000000012.jpg`). Many of the published addresses are dead: `missing=skip` keeps what was downloaded and
    reports the rest.

    Args:
        table (`str`): The TSV file.
        image_folder (`str`): The folder of the pictures.
        missing (`str`, *optional*, defaults to `"raise"`): As in [`read_coco`].

    Returns:
        `datasets.Dataset`: `image_id` (`conceptual-<table's stem>-<row>`, or with a third column `conceptual-<file>`),
        `image` (a path), `captions` (one).

    Raises:
        FileNotFoundError: If the table, the folder or an image is missing.
        ValueError: If a row has no tab, the first is a header, a row has its address first, two files stand for one
            row, or a third-column name is repeated.
    """
    path = require_file(table, "Conceptual Captions table")
    folder = require_folder(image_folder, "image folder")
    by_number: dict[int, Path] | None = None
    image_ids, paths, captions = [], [], []
    text = read_text(path, keep_newlines=True)
    newline = "\n" if "\n" in text else "\r"
    for row, line in enumerate(text.removesuffix(newline).split(newline)):
        parts = line.rstrip("\r").split("\t")
        if len(parts) not in (2, 3):
            raise ValueError(f"Expected 'caption<tab>url[<tab>file]' in line {row + 1} of '{path}', got {line!r}.")
        if row == 0 and parts[1].strip().casefold() in _ADDRESS_NAMES:
            raise ValueError(
                f"Line 1 of '{path}' is the header {line!r:.80}. Expected a caption there, as in the published file, "
                "or each picture would get the caption of the row before. Remove it, or read the table with csv:."
            )
        if _ADDRESS.match(parts[0]) and not _ADDRESS.match(parts[1]):
            raise ValueError(
                f"Expected 'caption<tab>url' in line {row + 1} of '{path}', got {line!r:.160}: swap them."
            )
        if len(parts) == 3:
            image_ids.append(f"conceptual-{parts[2]}")
            paths.append(folder / parts[2])
        else:
            by_number = _files_by_number(folder) if by_number is None else by_number
            image_ids.append(f"conceptual-{path.stem}-{row}")
            paths.append(by_number.get(row, folder / f"{row}.jpg"))
        captions.append([parts[0]])
    lines_of = Lines(path, range(1, len(paths) + 1))
    return build_rows(image_ids, paths, captions, f"'{path}'", missing, lines_of)


CAPTION_NAMES = ("caption", "captions", "text")


def _find_column(header: list[str], names: tuple[str, ...], option: str, path: Path, separator: str) -> int:
    found = [index for index, name in enumerate(header) if name in names]
    if len(found) == 1:
        return found[0]
    expected = " or ".join(map(repr, names))
    advice = f"Name yours with ',{option}=COLUMN'"
    similar = [name for name in header if name.casefold() in {known.casefold() for known in names}]
    if not found and len(similar) == 1:
        advice = f"Did you mean ',{option}={similar[0]}'?"
    raise ValueError(
        f"Expected one column {expected} in the first line of '{path}', with columns separated by {separator!r}, got "
        f"{len(found)} among {header}. {advice}."
    )


def _find_columns(header: list[str], wanted: Mapping[str, tuple[str, ...]], path: Path, separator: str) -> list[int]:
    """The place of each column. Where the line looks separated otherwise, one error says all that the spec lacks."""
    absent = [option for option, names in wanted.items() if not any(name in names for name in header)]
    other = find_separator(separator.join(header), separator)
    if absent and other is not None:
        cells = [name.strip() for name in separator.join(header).split(SEPARATORS.get(other, other))]
        unnamed = [f"',{option}=COLUMN'" for option, names in wanted.items() if sum(c in names for c in cells) != 1]
        naming = f"; and name its columns {cells} with {' and '.join(unnamed)}" if unnamed else ""
        raise ValueError(
            f"Expected one column {' or '.join(map(repr, wanted[absent[0]]))} in the first line of '{path}', with "
            f"columns separated by {separator!r}, got 0 among {header}. Is the table separated otherwise? Then add "
            f"',sep={other}'{naming}."
        )
    found, places = MistakeCollector(), []
    for option, names in wanted.items():
        with found.collecting():
            places.append(_find_column(header, names, option, path, separator))
    found.tell()
    return places


def _name_in(folder: Path, cell: str) -> str:
    """One name for each file: `./a.jpg`, `b/../a.jpg` and the absolute path are all `a.jpg`. A file outside the folder
    keeps its absolute path.
    """
    name = PurePath(cell.strip())
    if not name.is_absolute() and ".." not in name.parts:
        return name.as_posix()
    path, root = (folder / name).parent.resolve() / name.name, folder.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def read_csv(
    table: str,
    image_folder: str,
    *,
    image: str = "image",
    captions: str | None = None,
    negatives: str | None = None,
    sep: str = ",",
    source: str | None = None,
    missing: str = "raise",
) -> Dataset:
    """Read a CSV file with a column of image files and one of captions; several lines of one image are its captions.

    Args:
        table (`str`): UTF-8, names of columns in the first line, one caption a line. Other columns are passed over.
        image_folder (`str`): What the paths in the table start from; absolute ones are taken as they are.
        image (`str`, *optional*, defaults to `"image"`): Column of the paths.
        captions (`str`, *optional*): Column of the captions, by default the one called `caption`, `captions` or
            `text`.
        negatives (`str`, *optional*): Column of false captions: one a line, or a list of them as JSON; cells may be
            empty.
        sep (`str`, *optional*, defaults to `","`): What separates columns: one character, or `tab`, `semicolon`,
            `pipe`, `comma`.
        source (`str`, *optional*): `"coco"` or `"flickr"`: the files are named as there and give the ids that all
            readers share, so that test images are recognised. By default an id is `<folder>/<path>`, outside the
            folder the absolute path.
        missing (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out images without a file and reports them.

    Returns:
        `datasets.Dataset`: `image_id`, `image` (a path), `captions` in the order of the file.

    Raises:
        FileNotFoundError: If the table, the folder or an image is missing.
        ValueError: If the table is no CSV in UTF-8, a column is not there, a line has another number of values or
            names no image (the lines are named), or no row is left.
    """
    separator = SEPARATORS.get(sep, sep)
    if len(separator) != 1:
        raise ValueError(
            f"Expected sep to be one character or one of {sorted(SEPARATORS)}, got {sep!r}."
            + (" A shell takes ';' for the end of a command: write sep=semicolon." if not sep else "")
        )
    if source is not None and source not in ID_RULES:
        raise ValueError(f"Expected source to be one of {sorted(ID_RULES)}, got {source!r} for '{table}'.")
    path, folder = require_file(table, "table of captions"), require_folder(image_folder, "image folder")
    lines = read_table(path, separator)
    header = [name.strip() for name in lines[0].cells] if lines else [""]
    names = {"image": (image,), "captions": CAPTION_NAMES if captions is None else (captions,)}
    names |= {} if negatives is None else {NEGATIVES: (negatives,)}
    image_at, *texts_at = _find_columns(header, names, path, separator)
    for line in lines[1:]:
        if len(line.cells) != len(header):
            raise ValueError(
                f"Expected {len(header)} values ({', '.join(header)}) in line {line.number} of '{path}', got "
                f"{len(line.cells)}: {line.cells}. Put a text with {separator!r} in it between double quotes."
            )
        if not line.cells[image_at].strip():
            raise ValueError(f"Line {line.number} of '{path}' names no image in the column {header[image_at]!r}.")
    return _group_lines(lines[1:], image_at, texts_at, path, folder, source, missing)


def picture_lines(
    table: str, image_folder: str, *, image: str = "image", sep: str = ",", **options: Any
) -> dict[str, str]:
    """Where a table that [`read_csv`] has read names each picture first.

    Args:
        table, image_folder, image, sep (`str`): As in [`read_csv`]; other options of it are not looked at.

    Returns:
        `dict[str, str]`: `FILE:LINE` by the picture's file.
    """
    separator, path, folder = SEPARATORS.get(sep, sep), Path(table), Path(image_folder)
    lines = read_table(path, separator)
    (at,) = _find_columns([name.strip() for name in lines[0].cells], {"image": (image,)}, path, separator)
    numbers, finder = Lines(path, [line.number for line in lines]), FileFinder()
    places: dict[str, str] = {}
    for row, line in enumerate(lines[1:], start=1):
        named = folder / _name_in(folder, line.cells[at])
        places.setdefault(str(finder.find(named) or named), numbers.name(row))
    return places


def _group_lines(
    lines: list[TableRow],
    image_at: int,
    texts_at: list[int],
    path: Path,
    folder: Path,
    source: str | None,
    missing: str,
) -> Dataset:
    """The lines of each image as a row; `texts_at` are the columns of captions and maybe of false ones."""
    texts: list[dict[str, list[str]]] = [{} for _ in texts_at]
    captions, caption_at = texts[0], texts_at[0]
    numbers: dict[str, int] = {}  # the first line of each image
    finder, names = FileFinder(), dict[Path, str]()  # the first spelling of each file
    for line in lines:
        name = _name_in(folder, line.cells[image_at])
        file = finder.find(folder / name) or folder / name
        if file != folder / name:  # it is called as on disk, where the table spells it otherwise
            name = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.as_posix()
        name = names.setdefault(file, name)
        for of_image, at in zip(texts, texts_at, strict=True):
            of_image.setdefault(name, []).append(line.cells[at])
        numbers.setdefault(name, line.number)
    if empty := [str(line.number) for line in lines if not line.cells[caption_at].strip()]:
        shown = count_of(len(empty), "line")
        logger.warning("'%s': left out %s without a caption: %s", path, shown, first(empty))
    root = folder.resolve().name
    ids = [name if name.startswith("/") else f"{root}/{name}" for name in captions]
    if source is not None:
        ids = [apply_rule(source, name, f"'{path}'") for name in captions]
    paths = [folder / name for name in captions]
    lines_of = Lines(path, list(numbers.values()))
    negatives = list(texts[1].values()) if len(texts) > 1 else None
    return build_rows(ids, paths, list(captions.values()), f"'{path}'", missing, lines_of, negatives)


def read_images(folder: str, *, source: str | None = None) -> Dataset:
    """Read all pictures of a folder and of the folders below it, without captions.

    Args:
        folder (`str`): Searched for all pictures that PIL reads, see [`~modeling_dclip.data.images.find_images`].
            What is passed over is counted and named in the log.
        source (`str`, *optional*): `"coco"` or `"flickr"`: the file names are COCO's or Flickr's and give the ids that
            all readers share, so that test images are recognised. By default an id is `<folder>/<path below it>`.

    Returns:
        `datasets.Dataset`: `image_id`, `image` (a path), `captions` (empty), in order of their paths.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no picture, `source` is unknown, or two files give one id.
    """
    root = require_folder(folder, "image folder")
    if source is not None and source not in ID_RULES:
        raise ValueError(f"Expected source to be one of {sorted(ID_RULES)}, got {source!r} for '{folder}'.")
    paths, passed_over = find_images(root)
    if not paths:
        raise ValueError(
            f"Expected pictures ({', '.join(image_suffixes()[:4])}, ...) in '{folder}' or below, got none among "
            f"{describe_others(passed_over, root)}. Check the path."
        )
    warn_passed_over(passed_over, root)
    name = root.resolve().name
    ids = [f"{name}/{path.relative_to(root).as_posix()}" for path in paths]
    if source is not None:
        ids = [apply_rule(source, path.name, f"'{folder}'") for path in paths]
    require_unique(ids, f"'{folder}'")
    columns = {"image_id": ids, "image": [str(path) for path in paths], "captions": [[] for _ in paths]}
    return Dataset.from_dict(columns, features=CAPTION_FEATURES)


def drop_captions(dataset: Dataset) -> Dataset:
    """The same rows with an empty list in place of their captions."""
    return put_columns(dataset, {"captions": ([[] for _ in range(len(dataset))], CAPTION_FEATURES["captions"])})
