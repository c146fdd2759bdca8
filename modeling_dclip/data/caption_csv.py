"""One's own captions: a table of comma-separated values and a folder of pictures."""

import csv
from pathlib import Path, PurePath
from typing import NamedTuple

from datasets import Dataset

from modeling_dclip.data.caption_rows import ID_RULES, build_rows, first, logger, require_file, require_folder

CAPTION_NAMES = ("caption", "captions", "text")
SEPARATORS = {"tab": "\t", "comma": ","}  # what a spec cannot hold as it is


class _Line(NamedTuple):
    """A row of the table and the line of the file it ends in."""

    number: int
    cells: list[str]


def _read_lines(path: Path, separator: str) -> list[_Line]:
    """The rows that are not blank, the header first."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            return [_Line(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise ValueError(
            f"'{path}' is no table of values separated by {separator!r} (line {reader.line_num}: {error}). Put a text with the separator, "
            'a quote or a line break in it between double quotes, a quote inside written twice ("").'
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not encoded in UTF-8 ({error}). Save it as 'CSV UTF-8'.") from error


def _find_column(header: list[str], names: tuple[str, ...], option: str, path: Path, separator: str) -> int:
    found = [index for index, name in enumerate(header) if name in names]
    if len(found) != 1:
        expected = " or ".join(map(repr, names))
        raise ValueError(
            f"Expected one column {expected} in the first line of '{path}', got {len(found)} among {header}. Name yours with "
            f"',{option}=COLUMN'; if the columns are not separated by {separator!r}, say by what with ',sep=;' or ',sep=tab'."
        )
    return found[0]


def _name_in(folder: Path, cell: str) -> str:
    """The one name of a file: `./a.jpg`, `b/../a.jpg` and its absolute path are `a.jpg`; outside the folder it is the absolute path."""
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
    sep: str = ",",
    source: str | None = None,
    missing: str = "raise",
) -> Dataset:
    """Read a CSV file with a column of image files and one of captions; several lines of one image are its captions.

    Args:
        table (`str`): UTF-8, names of columns in the first line, one caption a line. Other columns are passed over.
        image_folder (`str`): What the paths in the table start from; absolute ones are taken as they are.
        image (`str`, *optional*, defaults to `"image"`): Column of the paths.
        captions (`str`, *optional*): Column of the captions, by default the one called `caption`, `captions` or `text`.
        sep (`str`, *optional*, defaults to `","`): What separates columns, one character; `tab` is a tab.
        source (`str`, *optional*): `"coco"` or `"flickr"`: the files are named as there and give the ids that all readers share, so that
            test images are recognised. By default an id is `<folder>/<path>`, outside the folder the absolute path.
        missing (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out images without a file and reports them.

    Returns:
        `datasets.Dataset`: `image_id`, `image` (a path), `captions` in the order of the file.

    Raises:
        FileNotFoundError: If the table, the folder or an image is missing.
        ValueError: If the table is no CSV in UTF-8, a column is not there, a line has another number of values or names no image (the
            lines are named), or no row is left.
    """
    separator = SEPARATORS.get(sep, sep)
    if len(separator) != 1:
        raise ValueError(f"Expected sep to be one character or one of {sorted(SEPARATORS)}, got {sep!r}.")
    if source is not None and source not in ID_RULES:
        raise ValueError(f"Expected source to be one of {sorted(ID_RULES)}, got {source!r} for '{table}'.")
    path, folder = require_file(table, "table of captions"), require_folder(image_folder, "image folder")
    lines = _read_lines(path, separator)
    header = [name.strip() for name in lines[0].cells] if lines else []
    image_at = _find_column(header, (image,), "image", path, separator)
    names = CAPTION_NAMES if captions is None else (captions,)
    caption_at = _find_column(header, names, "captions", path, separator)
    for line in lines[1:]:
        if len(line.cells) != len(header):
            raise ValueError(
                f"Expected {len(header)} values ({', '.join(header)}) in line {line.number} of '{path}', got {len(line.cells)}: "
                f"{line.cells}. Put a text with {separator!r} in it between double quotes."
            )
        if not line.cells[image_at].strip():
            raise ValueError(f"Line {line.number} of '{path}' names no image in the column {header[image_at]!r}.")
    return _group_lines(lines[1:], image_at, caption_at, path, folder, source, missing)


def _group_lines(
    lines: list[_Line], image_at: int, caption_at: int, path: Path, folder: Path, source: str | None, missing: str
) -> Dataset:
    captions: dict[str, list[str]] = {}
    for line in lines:
        captions.setdefault(_name_in(folder, line.cells[image_at]), []).append(line.cells[caption_at])
    if empty := [str(line.number) for line in lines if not line.cells[caption_at].strip()]:
        logger.warning("'%s': left out %d lines without a caption, lines %s", path, len(empty), first(empty))
    root = folder.resolve().name
    ids = [
        ID_RULES[source](name) if source else name if name.startswith("/") else f"{root}/{name}" for name in captions
    ]
    return build_rows(ids, [folder / name for name in captions], list(captions.values()), f"'{path}'", missing)
