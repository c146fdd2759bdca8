"""Readers of the published caption files: COCO, Karpathy's splits, Flickr30k, Conceptual Captions."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

from modeling_dclip.data.caption_rows import (
    FIRST_IDS,
    build_rows,
    coco_id,
    flickr_id,
    require_file,
    require_folder,
    require_unique,
)

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_COMMENT = re.compile(r"\s*(\d+)\s+(\S.*)", re.DOTALL)


def read_json(path: str | Path, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object that has `keys`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is empty, no JSON, no object, or lacks a key; the message names the keys that are there.
    """
    path = require_file(path, what)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"The {what} '{path}' is no valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object with {keys} in the {what} '{path}', got a {type(content).__name__}.")
    for key in keys:
        if key not in content:
            raise ValueError(f"The {what} '{path}' has no key {key!r}; it has {sorted(content)}.")
    return content


def require_field(entry: dict[str, Any], key: str, what: str, path: str | Path) -> Any:
    """The value of `key`.

    Raises:
        ValueError: If there is none; the message names `what` of which file, and the keys that are there.
    """
    if key not in entry:
        raise ValueError(f"{what} of '{path}' has no key {key!r}; it has {sorted(entry)}.")
    return entry[key]


def read_coco(annotations: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read a COCO captions file (`captions_train2017.json`, `captions_val2017.json`) and its image folder.

    Args:
        annotations (`str`): The JSON file, with `images` (`id`, `file_name`) and `annotations` (`image_id`,
            `caption`).
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
    numbers = [require_field(image, "id", "An image", annotations) for image in content["images"]]
    paths = [folder / require_field(image, "file_name", "An image", annotations) for image in content["images"]]
    image_ids = [coco_id(number) for number in numbers]
    require_unique(image_ids, f"'{annotations}'")
    captions: dict[int, list[str]] = {number: [] for number in numbers}
    for annotation in content["annotations"]:
        name = f"Annotation {annotation.get('id')}"
        number = require_field(annotation, "image_id", name, annotations)
        if number not in captions:
            raise ValueError(f"{name} of '{annotations}' belongs to image {number}, which is not under 'images'.")
        captions[number].append(require_field(annotation, "caption", name, annotations))
    return build_rows(image_ids, paths, [captions[number] for number in numbers], f"'{annotations}'", missing)


def _karpathy_id(entry: dict[str, Any], path: str | Path) -> str:
    """`coco-<cocoid>`, or `flickr-...` of the file name where the entry has no `cocoid`."""
    return (
        coco_id(entry["cocoid"])
        if "cocoid" in entry
        else flickr_id(require_field(entry, "filename", "An image", path))
    )


def _karpathy_images(path: str | Path) -> list[dict[str, Any]]:
    return read_json(path, "Karpathy split file", ("images",))["images"]


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
    ids = {_karpathy_id(entry, path) for entry in images if require_field(entry, "split", "An image", path) == "test"}
    if not ids:
        raise ValueError(f"No image of the split 'test' in '{path}'. Expected a file of Karpathy's splits.")
    return ids


def read_karpathy(dataset: str, image_folder: str, split: str, *, missing: str = "raise") -> Dataset:
    """Read one split of a Karpathy file for COCO, Flickr30k or Flickr8k.

    The image of a COCO entry is looked for at `filepath/filename` (the 2014 layout), then under the 2017 name in
    `train2017/` and `val2017/`, then by either name in the folder itself. A Flickr entry's is `filename`.

    Args:
        dataset (`str`): The JSON file, with `images` (`filename`, `split`, `sentences`, and for COCO `filepath`,
            `cocoid`).
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
    present = {require_field(entry, "split", "An image", dataset) for entry in images}
    if not wanted & present:
        raise ValueError(f"Unknown split {split!r} of '{dataset}'. It has {sorted(present)}.")
    image_ids, paths, captions = [], [], []
    for entry in images:
        if entry["split"] not in wanted:
            continue
        image_ids.append(_karpathy_id(entry, dataset))
        name = require_field(entry, "filename", "An image", dataset)
        candidates = [folder / entry.get("filepath", "") / name, folder / name]
        if "cocoid" in entry:
            modern = f"{int(entry['cocoid']):012d}.jpg"
            candidates[1:1] = [folder / "train2017" / modern, folder / "val2017" / modern, folder / modern]
        paths.append(next((path for path in candidates if path.is_file()), candidates[0]))
        sentences = require_field(entry, "sentences", f"Image {name}", dataset)
        captions.append([require_field(sentence, "raw", f"A sentence of {name}", dataset) for sentence in sentences])
    return build_rows(image_ids, paths, captions, f"split {split!r} of '{dataset}'", missing)


def read_flickr30k(results: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read Flickr30k's `results.csv`: `image_name| comment_number| comment`, separated by pipes and spaces.

    The published file has a row whose second pipe is missing (`2199200615.jpg| 4   A dog runs ...`). Such a row is
        read
    by its number and reported with its line; any other malformed row is an error. Pipes inside a comment stay in it.

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
    lines = require_file(results, "Flickr30k results file").read_text(encoding="utf-8").splitlines()
    if [part.strip() for part in lines[0].split("|")] != ["image_name", "comment_number", "comment"]:
        raise ValueError(
            f"Expected the header 'image_name| comment_number| comment' in '{results}', got {lines[0]!r}."
        )
    captions: dict[str, list[str]] = {}
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
    if repaired:
        lines_text = ", ".join(map(str, repaired[:FIRST_IDS]))
        logger.warning("'%s': read %d rows without their second pipe, lines %s", results, len(repaired), lines_text)
    names = list(captions)
    return build_rows(
        [flickr_id(n) for n in names], [folder / n for n in names], list(captions.values()), f"'{results}'", missing
    )


def _files_by_number(folder: Path) -> dict[int, Path]:
    """Pictures in `folder` and below whose name is a number, by that number."""
    found: dict[int, Path] = {}
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in IMAGE_SUFFIXES or not stem.isdecimal():
                continue
            path = Path(parent, name)
            if found.setdefault(int(stem), path) != path:
                raise ValueError(f"Two files stand for row {int(stem)}: '{found[int(stem)]}' and '{path}'. Keep one.")
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
        ValueError: If a row has no tab, two files stand for one row, or a third-column name is repeated.
    """
    path = require_file(table, "Conceptual Captions table")
    folder = require_folder(image_folder, "image folder")
    by_number: dict[int, Path] | None = None
    image_ids, paths, captions = [], [], []
    with path.open(encoding="utf-8", newline="\n") as lines:
        for row, line in enumerate(lines):
            parts = line.rstrip("\r\n").split("\t")
            if len(parts) not in (2, 3):
                raise ValueError(f"Expected 'caption<tab>url[<tab>file]' in line {row + 1} of '{path}', got {line!r}.")
            if len(parts) == 3:
                image_ids.append(f"conceptual-{parts[2]}")
                paths.append(folder / parts[2])
            else:
                by_number = _files_by_number(folder) if by_number is None else by_number
                image_ids.append(f"conceptual-{path.stem}-{row}")
                paths.append(by_number.get(row, folder / f"{row}.jpg"))
            captions.append([parts[0]])
    return build_rows(image_ids, paths, captions, f"'{path}'", missing)
