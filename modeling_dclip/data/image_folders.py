"""Images that nobody has described: a folder of files, and rows whose captions were dropped.

A teacher that reads no caption can teach a student from them. `captions` is an empty list in each such row, here alone.
"""

import os
from pathlib import Path

from datasets import Dataset

from modeling_dclip.data.caption_files import IMAGE_SUFFIXES
from modeling_dclip.data.caption_rows import FEATURES, ID_RULES, put_columns, require_folder, require_unique


def read_images(folder: str, *, source: str | None = None) -> Dataset:
    """Read all pictures of a folder and those below it, without captions.

    Args:
        folder (`str`): Searched for `.jpg`, `.jpeg`, `.png` and `.webp`, in any case; other files are passed over.
        source (`str`, *optional*): `"coco"` or `"flickr"`: the file names are COCO's or Flickr's and give the ids that all readers
            share, so that test images are recognised. By default an id is `<folder>/<path below it>`.

    Returns:
        `datasets.Dataset`: `image_id`, `image` (a path), `captions` (empty), in order of their paths.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no picture, `source` is unknown, or two files give one id.
    """
    root = require_folder(folder, "image folder")
    if source is not None and source not in ID_RULES:
        raise ValueError(f"Expected source to be one of {sorted(ID_RULES)}, got {source!r} for '{folder}'.")
    found = [Path(parent, name) for parent, _, names in os.walk(root) for name in names]
    paths = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"Expected pictures ({', '.join(IMAGE_SUFFIXES)}) in '{folder}' or below, got none among {len(found)} files. Check the path."
        )
    name = root.resolve().name
    ids = [ID_RULES[source](path.name) if source else f"{name}/{path.relative_to(root).as_posix()}" for path in paths]
    require_unique(ids, f"'{folder}'")
    columns = {"image_id": ids, "image": [str(path) for path in paths], "captions": [[] for _ in paths]}
    return Dataset.from_dict(columns, features=FEATURES)


def drop_captions(dataset: Dataset) -> Dataset:
    """The same rows with an empty list in place of their captions."""
    return put_columns(dataset, {"captions": ([[] for _ in range(len(dataset))], FEATURES["captions"])})
