"""Readers of published fine-grained questions in files beside a folder of pictures:
SugarCrepe, Winoground, ARO, and a plain form.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from modeling_dclip.data.captions.files import read_coco_id
from modeling_dclip.data.files import (
    FileFinder,
    list_folder,
    read_json,
    read_json_lines,
    require_field,
    require_file,
    require_folder,
    require_id,
)
from modeling_dclip.data.images import has_image_suffix, image_suffixes
from modeling_dclip.data.questions.rows import Item, build_item_rows

BOX_FIELDS = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")


def read_entries(path: str | Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Read JSON objects with a name for messages: of a JSON list, of a JSON object of objects, or of the lines of a
    `.jsonl`.

    Args:
        path (`str` or `Path`): The file.
        what (`str`): What it is, for messages.

    Returns:
        `list[tuple[str, dict]]`: `("Item 3", {...})`, counted from 0, `("Item '17'", {...})` by key, or
            `("Line 4", {...})` from 1.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is empty, no JSON, holds nothing, or an entry is no JSON object; entry and file are named.
    """
    path = require_file(path, what)
    entries = list(_entries(path, what))
    if not entries:
        raise ValueError(f"Expected one or more entries in the {what} '{path}', got none. Download it again.")
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{where} of '{path}': expected a JSON object, got {entry!r:.80} in the {what}.")
    return entries


def _entries(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        yield from ((f"Line {number}", entry) for number, entry in read_json_lines(path, what))
        return
    content = read_json(path, what)
    if isinstance(content, list):
        yield from ((f"Item {index}", entry) for index, entry in enumerate(content))
    elif isinstance(content, dict):
        yield from ((f"Item {key!r}", entry) for key, entry in content.items())
    else:
        raise ValueError(f"Expected a JSON list or object in the {what} '{path}', got a {type(content).__name__}.")


def _text(entry: dict[str, Any], key: str, where: str, path: str | Path) -> str:
    value = require_field(entry, key, where, path)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} of '{path}': expected text under {key!r}, got {value!r:.80}.")
    return value.strip()


def _texts(entry: dict[str, Any], key: str, where: str, path: str | Path, least: int = 1) -> list[str]:
    """A list of texts; where one is enough, one text too."""
    values = require_field(entry, key, where, path)
    if isinstance(values, str) and least == 1:
        values = [values]
    if not isinstance(values, list) or len(values) < least:
        raise ValueError(
            f"{where} of '{path}': expected a list of {least} or more texts under {key!r}, got {values!r:.80}."
        )
    return [_text({key: value}, key, where, path) for value in values]


def _either(entry: dict[str, Any], keys: tuple[str, str], where: str, path: str | Path) -> str:
    """Which of two keys the entry has; the first for the message if none."""
    if keys[0] not in entry and keys[1] not in entry:
        raise ValueError(f"{where} of '{path}' has neither {keys[0]!r} nor {keys[1]!r}; it has {sorted(entry)}.")
    return keys[0] if keys[0] in entry else keys[1]


def read_sugarcrepe(questions: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read SugarCrepe: a JSON file a category (`swap_att.json`...) of
    `{"0": {"filename", "caption", "negative_caption"}, ...}`.

    Args:
        questions (`str`): The folder of the files, all of which are read, or one of them. A file's name is its
            category.
        image_folder (`str`): COCO's `val2017`.
        missing (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out questions without a picture and reports
            them.

    Returns:
        `datasets.Dataset`: The schema of [`~modeling_dclip.data.questions.rows`], `image_id` being `coco-<id>`.

    Raises:
        FileNotFoundError: If a file, folder or picture is missing.
        ValueError: If the folder has no JSON file, or a file is malformed; file, entry and field are named.
    """
    folder = require_folder(image_folder, "image folder")
    files = [Path(questions)]
    if files[0].is_dir():
        files = list_folder(files[0], "*.json")
        if not files:
            raise ValueError(
                f"Expected SugarCrepe's JSON files (swap_att.json...) in the folder '{questions}', got none."
            )
    items = []
    for path in files:
        for where, entry in read_entries(path, "SugarCrepe file"):
            name = _text(entry, "filename", where, path)
            negatives = _texts(entry, "negative_caption", where, path)
            items.append(
                Item(
                    read_coco_id(entry, "filename", where, path),
                    folder / name,
                    _text(entry, "caption", where, path),
                    negatives,
                    path.stem,
                )
            )
    return build_item_rows(items, f"'{questions}'", missing)


def _picture(folder: Path, name: str, finder: FileFinder) -> Path:
    """The file of that name, or of that stem: Winoground names pictures without the ending."""
    if has_image_suffix(name):
        return folder / name
    candidates = [folder / f"{name}{suffix}" for suffix in (".png", *image_suffixes())]
    return next((path for path in candidates if finder.find(path) is not None), candidates[0])


def read_winoground(examples: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read Winoground's `examples.jsonl`: two pictures and two captions a line, caption 0 true of picture 0 and 1 of
    1.

    The parquet form of the Hub, with the pictures in it, is read by
    [`~modeling_dclip.data.questions.tables.read_item_tables`].

    Args:
        examples (`str`): The file, with `id`, `image_0`, `image_1` (names of files, with or without their ending),
            `caption_0`, `caption_1` and, if there, `collapsed_tag` (the category).
        image_folder (`str`): The folder of the pictures.
        missing (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out lines without both pictures and reports
            them.

    Returns:
        `datasets.Dataset`: The schema of [`~modeling_dclip.data.questions.rows`] with `pair_id`.

    Raises:
        FileNotFoundError: If a file, the folder or a picture is missing.
        ValueError: If a line is malformed or an id comes twice; file, line and field are named.
    """
    folder = require_folder(image_folder, "image folder")
    items, seen, finder = [], set(), FileFinder()
    for where, entry in read_entries(examples, "Winoground file"):
        pair = str(require_id(entry, "id", where, examples))
        if pair in seen:
            raise ValueError(f"{where} of '{examples}' repeats the id {pair!r}. Remove one of the two.")
        seen.add(pair)
        category = _text(entry, "collapsed_tag", where, examples) if entry.get("collapsed_tag") else ""
        captions = [_text(entry, f"caption_{side}", where, examples) for side in (0, 1)]
        for side in (0, 1):
            path = _picture(folder, _text(entry, f"image_{side}", where, examples), finder)
            texts = (captions[side], [captions[1 - side]])
            items.append(Item(f"winoground-{pair}-{side}", path, *texts, category, pair_id=f"winoground-{pair}"))
    return build_item_rows(items, f"'{examples}'", missing)


def _box(entry: dict[str, Any], where: str, path: str | Path) -> tuple[float, float, float, float] | None:
    """`bbox_x`, `bbox_y`, `bbox_w`, `bbox_h` as xyxy; `None` where there is none of them."""
    if not any(field in entry for field in BOX_FIELDS):
        return None
    numbers = [require_field(entry, field, where, path, (int, float)) for field in BOX_FIELDS]
    left, top, width, height = map(float, numbers)
    if width <= 0 or height <= 0:
        raise ValueError(f"{where} of '{path}': expected bbox_w and bbox_h above 0, got {width} and {height}.")
    return (left, top, left + width, top + height)


def _aro_category(entry: dict[str, Any], where: str, path: str | Path) -> str:
    if "relation_name" in entry:
        return _text(entry, "relation_name", where, path)
    return " ".join(_texts(entry, "attributes", where, path)) if "attributes" in entry else ""


def read_aro(questions: str, image_folder: str, *, min_items: int = 25, missing: str = "raise") -> Dataset:
    """Read ARO's questions: `visual_genome_relation.json`, `visual_genome_attribution.json`, or stored COCO/Flickr30k
    order ones.

    An entry has `image_path` (or `image`); `true_caption` and `false_caption`, or `caption_options` with the true one
    first; and where it asks about a part of the picture `bbox_x`, `bbox_y`, `bbox_w`, `bbox_h` in pixels, which is cut
    out as ARO does.

    Args:
        questions (`str`): The JSON file, a list.
        image_folder (`str`): The folder the pictures' names are relative to.
        min_items (`int`, *optional*, defaults to 25): A relation or pair of attributes with fewer questions counts in
            the total only.
        missing (`str`, *optional*, defaults to `"raise"`): As in [`read_sugarcrepe`].

    Returns:
        `datasets.Dataset`: The schema of [`~modeling_dclip.data.questions.rows`], with `crop_box` where entries have a
            box.

    Raises:
        FileNotFoundError: If a file, the folder or a picture is missing.
        ValueError: If an entry is malformed, or only some have a box; file, entry and field are named.
    """
    folder = require_folder(image_folder, "image folder")
    items: list[Item] = []
    for where, entry in read_entries(questions, "ARO file"):
        name = _text(entry, _either(entry, ("image_path", "image"), where, questions), where, questions)
        if _either(entry, ("true_caption", "caption_options"), where, questions) == "true_caption":
            texts = [_text(entry, key, where, questions) for key in ("true_caption", "false_caption")]
        else:
            texts = _texts(entry, "caption_options", where, questions, least=2)
        box = _box(entry, where, questions)
        if items and (box is None) != (items[0].crop_box is None):
            raise ValueError(f"{where} of '{questions}': expected {BOX_FIELDS} in all entries or in none.")
        image_id = name if box is None else f"{name}[{','.join(f'{edge:g}' for edge in box)}]"
        category = _aro_category(entry, where, questions)
        items.append(Item(image_id, folder / name, texts[0], texts[1:], category, box))
    counts = Counter(item.category for item in items)
    items = [item if counts[item.category] >= min_items else item._replace(category="") for item in items]
    return build_item_rows(items, f"'{questions}'", missing)


def read_questions(questions: str, image_folder: str, *, missing: str = "raise") -> Dataset:
    """Read questions of one's own: `image`, `caption`, `negative_caption` or `negative_captions`, and if wanted
    `category`.

    Args:
        questions (`str`): A JSON list of objects, or JSON lines in a `.jsonl`.
        image_folder (`str`): The folder `image` is relative to.
        missing (`str`, *optional*, defaults to `"raise"`): As in [`read_sugarcrepe`].

    Returns:
        `datasets.Dataset`: The schema of [`~modeling_dclip.data.questions.rows`].

    Raises:
        FileNotFoundError: If a file, the folder or a picture is missing.
        ValueError: If an entry is malformed; file, entry and field are named.
    """
    folder = require_folder(image_folder, "image folder")
    items = []
    for where, entry in read_entries(questions, "file of questions"):
        name = _text(entry, "image", where, questions)
        key = _either(entry, ("negative_captions", "negative_caption"), where, questions)
        negatives = _texts(entry, key, where, questions)
        category = _text(entry, "category", where, questions) if entry.get("category") is not None else ""
        items.append(Item(name, folder / name, _text(entry, "caption", where, questions), negatives, category))
    return build_item_rows(items, f"'{questions}'", missing)
