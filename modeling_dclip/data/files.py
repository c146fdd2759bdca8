"""The door for files: the one place of this package that opens text, JSON, YAML and tables, walks folders, writes
whole files, and names temporary folders and caches.

Text is UTF-8, with or without a byte order mark. An error names the file and, where there is one, the line or the
entry. What a later run will read is written beside its place and moved there, so that it is whole or not there.
"""

import csv
import glob
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

# What JSON calls the types of Python.
_KINDS = {str: "text", list: "a list", dict: "an object", int: "an integer", float: "a number", type(None): "null"}
NULLABLE_TEXT = (str, type(None))
MOST_YAML_BYTES = 1 << 20
MOST_YAML_VALUES = 100_000  # with those that aliases repeat
_WHOLE_FLOATS = 2**53  # above it a float skips whole numbers
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # the byte order mark that some programs write before UTF-8
_LINE_BREAK = re.compile(rb"\r\n|\r|\n")
# How files begin that are no UTF-8 text.
_FIRST_BYTES = {
    b"\xff\xfe\0\0": "saved as UTF-32",
    b"\0\0\xfe\xff": "saved as UTF-32",
    b"\xff\xfe": "saved as UTF-16",
    b"\xfe\xff": "saved as UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip file, as spreadsheets (.xlsx) are",
    b"\xd0\xcf\x11\xe0": "a file of an old office program (.xls)",
    b"PAR1": "a parquet file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF",
}


def require_file(path: str | os.PathLike, what: str) -> Path:
    """The path of a file that is there and not empty.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has 0 bytes.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"Expected a file, the {what}, at '{path}', got a folder. Check the path.")
    if not path.is_file():
        raise FileNotFoundError(f"No {what} at '{path}'. Check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"The {what} '{path}' is empty (0 bytes). Download or write it again.")
    return path


def require_folder(path: str | os.PathLike, what: str) -> Path:
    """The path of a folder that is there.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    path = Path(path)
    if path.is_file():
        raise FileNotFoundError(f"Expected a folder, the {what}, at '{path}', got a file. Check the path.")
    if not path.is_dir():
        raise FileNotFoundError(f"No {what} at '{path}'. Check the path.")
    return path


def check_output_folder(folder: str | os.PathLike) -> None:
    """Say early that an output folder, there or not, cannot be written. Nothing is made.

    Raises:
        OSError: If it or a folder above it is a file, or nothing can be written there.
    """
    folder = Path(folder).absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        check_writable(nearest)
    except OSError as error:
        reason = f"nothing can be written in '{nearest}'" if nearest.is_dir() else f"'{nearest}' is a file"
        raise OSError(f"Expected a folder to write at '{folder}', but {reason}. Choose another.") from error


def check_new_folder(folder: str | os.PathLike) -> None:
    """Say early that an output folder is taken or cannot be written.

    Raises:
        FileExistsError: If it is a file, or a folder with something in it.
        OSError: If nothing can be written there.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"Expected a new or an empty folder at {folder}, got one in use. Choose another.")
    check_output_folder(folder)


# Text.


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file as it is.

    Raises:
        OSError: If it cannot be read.
    """
    return Path(path).read_bytes()


def decode_text(content: bytes, place: str, *, keep_newlines: bool = False) -> str:
    """Text from UTF-8 bytes, without the byte order mark if there is one, nor one that joined files left at the start
    of a line.

    Args:
        content (`bytes`): What a file holds.
        place (`str`): The file, for messages.
        keep_newlines (`bool`, *optional*, defaults to `False`): Leave line breaks as they are; by default each of
            `\\n`, `\\r\\n` and `\\r` becomes `\\n`. No other character breaks a line.

    Raises:
        ValueError: If it is no UTF-8 or holds a NUL character, as UTF-16 and binary files do; the message names the
            line, and what the file is if its first bytes tell.
    """
    return _decode(content, f"'{place}'", keep_newlines)


def _decode(content: bytes, named: str, keep_newlines: bool = False) -> str:
    try:
        text = content.decode("utf-8")
        reason, at = "holds a NUL character", content.find(b"\0")
    except UnicodeDecodeError as error:
        reason, at = f"is not encoded in UTF-8 ({error})", error.start
    if at >= 0:
        line = len(_LINE_BREAK.findall(content[:at])) + 1
        kind = next((kind for start, kind in _FIRST_BYTES.items() if content.startswith(start)), None)
        problem = f"it is {kind}" if kind else f"line {line} {reason}"
        advice = "Save it as UTF-8"
        if Path(named.strip("'")).suffix.lower() in (".csv", ".tsv"):
            advice += "; in a spreadsheet choose 'CSV UTF-8'"
        raise ValueError(f"Expected UTF-8 text in {named}, but {problem}. {advice}.")
    if "\ufeff" in text:
        text = _MARKS.sub("", text)
    return text if keep_newlines else text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | os.PathLike, *, keep_newlines: bool = False) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Args:
        path (`str` or `os.PathLike`): The file.
        keep_newlines (`bool`, *optional*, defaults to `False`): As in [`decode_text`].

    Raises:
        OSError: If it cannot be read.
        ValueError: As [`decode_text`]; the message names file and line.
    """
    return decode_text(read_bytes(path), os.fspath(path), keep_newlines=keep_newlines)


# JSON and YAML.


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {repeated!r} comes twice in one object")
    return content


def _json_fault(text: str, error: Exception) -> str:
    """What a text is that could not be read as JSON."""
    if not text.strip():
        return "nothing but blanks"
    if text.lstrip().startswith("<"):
        return "HTML or XML, perhaps the page of a failed download or of a login"
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
        return f"more than one JSON value, as in JSON Lines (the second begins in line {error.lineno})"
    return f"invalid JSON ({error})"


def parse_json(text: str | bytes, place: str, advice: str = "Write it again.") -> Any:
    """What a JSON text says.

    Args:
        text (`str` or `bytes`): UTF-8.
        place (`str`): Where it is from, e.g. `"the index 'a.json'"`.
        advice (`str`, *optional*): What to do where it is damaged.

    Raises:
        ValueError: If it is no JSON in UTF-8, a key comes twice in one object, or lists and objects are nested too
            deep.
    """
    text = _decode(text, place, keep_newlines=True) if isinstance(text, bytes) else text
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {place}, got {_json_fault(text, error)}. {advice}") from error


def read_json(
    path: str | os.PathLike, what: str = "file", keys: Sequence[str] | None = None, advice: str = "Download it again."
) -> Any:
    """What a JSON file says.

    Args:
        path (`str` or `os.PathLike`): The file.
        what (`str`, *optional*, defaults to `"file"`): What it is, for messages.
        keys (`Sequence[str]`, *optional*): It must be an object with these keys.
        advice (`str`, *optional*): What to do where it is damaged.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is empty, no JSON, no object, or lacks a key; the message names file and what is there.
    """
    content = parse_json(read_bytes(require_file(path, what)), f"the {what} '{path}'", advice)
    if keys is None:
        return content
    if not isinstance(content, dict):
        expected = f"a JSON object with {tuple(keys)}" if keys else "a JSON object"
        raise ValueError(f"Expected {expected} in the {what} '{path}', got a {type(content).__name__}. {advice}")
    for key in keys:
        if key not in content:
            raise ValueError(f"The {what} '{path}' has no key {key!r}; it has {sorted(content)}.")
    return content


def read_json_lines(path: str | os.PathLike, what: str = "file") -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each line of a file with one JSON value a line. Blank lines are passed over.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is empty or a line is no JSON; the message names it.
    """
    text = _decode(read_bytes(require_file(path, what)), f"the {what} '{path}'")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_unique_keys)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"Line {number} of the {what} '{path}': expected one whole JSON value in each line, got "
                    f"{_json_fault(line, error)}."
                ) from error


def require_field(
    entry: Any, key: str, where: str, path: str | os.PathLike, kind: type | tuple[type, ...] | None = None
) -> Any:
    """The value under a key of a JSON object.

    Args:
        entry (`dict`): The object.
        key (`str`): Which.
        where (`str`): The object's name in the file, e.g. `"Annotation 3"`.
        path (`str` or `os.PathLike`): The file.
        kind (`type` or `tuple`, *optional*): What the value must be. `True` and `False` are of no kind; a number is
            finite.

    Raises:
        ValueError: If the entry is no object, has no such key, or the value is of another kind; the message names file
            and entry.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} of '{path}': expected an object with the key {key!r}, got {entry!r:.80}.")
    if key not in entry:
        raise ValueError(f"{where} of '{path}' has no key {key!r}; it has {sorted(entry)}.")
    value = entry[key]
    kinds = kind if isinstance(kind, tuple) else () if kind is None else (kind,)
    if kinds and (not isinstance(value, kinds) or isinstance(value, bool) or not _is_finite(value)):
        names = [_KINDS[one] for one in kinds if one is not int or float not in kinds]
        expected = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        raise ValueError(f"{where} of '{path}': expected {expected} under {key!r}, got {value!r:.80}.")
    return value


def _is_finite(value: Any) -> bool:
    """Whether a value is no number, or one that a float can hold."""
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


def name_entry(what: str, entry: Any, position: int) -> str:
    """What messages call an entry of a list in a JSON file: by its `id` where it has one, e.g. `"Annotation 7"`."""
    number = entry.get("id") if isinstance(entry, Mapping) else None
    known = isinstance(number, int | str) and not isinstance(number, bool)
    return f"{what} {number}" if known else f"{what} at position {position} (from 0)"


def require_id(entry: Any, key: str, where: str, path: str | os.PathLike) -> int | str:
    """The id under a key of a JSON object: a text, or a whole number that is not negative (`64.0` is 64).

    Raises:
        ValueError: As [`require_field`], or if it is another number.
    """
    value = require_field(entry, key, where, path, (int, float, str))
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE_FLOATS:
        value = int(value)
    if isinstance(value, float) or (isinstance(value, int) and value < 0):
        raise ValueError(f"{where} of '{path}': expected a whole number or text under {key!r}, got {value!r:.80}.")
    return value


def read_yaml(path: str | os.PathLike, what: str = "file", advice: str = "Correct it.") -> Any:
    """What a YAML file says.

    Args:
        path (`str` or `os.PathLike`): The file.
        what (`str`, *optional*, defaults to `"file"`): What it is, for messages.
        advice (`str`, *optional*): What to do where it is damaged.

    Raises:
        FileNotFoundError: If it is missing.
        OSError: If it cannot be read.
        ValueError: If it is empty, too large, no YAML in UTF-8, names a key twice, or its aliases make it too large;
            the message names file, line and column.
    """
    if (size := require_file(path, what).stat().st_size) > MOST_YAML_BYTES:
        raise ValueError(
            f"Expected YAML of at most {MOST_YAML_BYTES >> 20} MiB in the {what} '{path}', got {size >> 20} MiB. "
            f"{advice}"
        )
    text = read_text(path)
    try:
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # also a date or a number that is none
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected YAML in the {what} '{path}', got invalid YAML ({reason}). {advice}") from error


def _check_nodes(root: yaml.Node | None) -> None:
    """Refuse YAML whose keys are named twice, or that aliases make large or endless. Each node is visited once."""
    sizes: dict[int, int] = {}

    def visit(node: yaml.Node, above: frozenset[int]) -> int:
        place = f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
        if id(node) in above:
            raise ValueError(f"{place}: an alias of a value inside this value")
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(visit(child, above | {id(node)}) for child in _children(node))
            if sizes[id(node)] > MOST_YAML_VALUES:
                raise ValueError(f"{place}: more than {MOST_YAML_VALUES} values, with those that aliases repeat")
        return sizes[id(node)]

    if root is not None:
        visit(root, frozenset())


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if not isinstance(node, yaml.MappingNode):
        return []
    lines: dict[str, int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"line {line}: the key {key.value!r} twice, before on line {lines[key.value]}")
        lines[key.value] = line
    return [one for pair in node.value for one in pair]


# Tables.


class TableRow(NamedTuple):
    """A row of a table and the line of the file it ends in."""

    number: int
    cells: list[str]


def read_table(path: str | os.PathLike, separator: str) -> list[TableRow]:
    """The rows of a CSV or TSV file that are not blank, the header first.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no such table or no UTF-8; the message names the line.
    """
    reader = csv.reader(io.StringIO(read_text(path, keep_newlines=True), newline=""), delimiter=separator, strict=True)
    rows, begins = [], 1
    try:
        for cells in reader:
            if cells:
                rows.append(TableRow(reader.line_num, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        lines = f"line {begins}" if reader.line_num <= begins else f"lines {begins} to {reader.line_num}"
        raise ValueError(
            f"'{path}' is no table of values separated by {separator!r} ({lines}: {error}). Put a text with the "
            'separator, a quote or a line break between double quotes, a quote inside written twice ("").'
        ) from error
    return rows


def match_parquet(pattern: str) -> list[tuple[Path, int]]:
    """The parquet files that a pattern names, in order, each with its number of rows.

    Raises:
        FileNotFoundError: If no file matches.
        ValueError: If a file is no parquet; it is named.
    """
    files = []
    for path in match_files(pattern):
        try:
            files.append((path, pq.read_metadata(path).num_rows))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"'{path}' is not readable as parquet ({error}). Write or download it again.") from error
    if not files:
        raise FileNotFoundError(f"No parquet file matches '{pattern}'. Check the path or glob in the spec.")
    return files


def load_parquet(paths: Sequence[Path], pattern: str) -> Dataset:
    """The rows of parquet files of one schema, one file after the other.

    Args:
        paths (`Sequence[Path]`): Of [`match_parquet`].
        pattern (`str`): What named them, for messages.

    Raises:
        ValueError: If the files cannot be read as one table.
    """
    # `load_dataset` expands globs: a bracket in a folder's name is to be read as it is.
    names = [glob.escape(str(path)) for path in paths]
    try:
        return load_dataset("parquet", data_files=names, split="train")
    except DatasetGenerationError as error:
        raise ValueError(
            f"'{pattern}' is not readable as parquet ({error.__cause__}). Write or download it again."
        ) from error


# Folders.


def list_folder(folder: str | os.PathLike, pattern: str = "*") -> list[Path]:
    """What lies in a folder, in order of names; hidden entries too.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        pattern (`str`, *optional*, defaults to `"*"`): Which entries, as of `Path.glob`.
    """
    return sorted(Path(folder).glob(pattern))


def entry_names(folder: str | os.PathLike) -> set[str]:
    """The names of what lies in a folder; none if it is no folder. One call however many files are asked for."""
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def find_files(folder: str | os.PathLike, suffixes: Collection[str] | None = None) -> tuple[list[Path], list[Path]]:
    """The files of a folder and of those below it, hidden ones too. Links to folders are not followed.

    Args:
        folder (`str` or `os.PathLike`): Where to begin.
        suffixes (`Collection[str]`, *optional*): Endings to take, in lower case with the point; all if not given.

    Returns:
        `tuple[list[Path], list[Path]]`: The files with such an ending in any case, and those passed over, each in
            order of paths.
    """
    found = sorted(Path(parent, name) for parent, _, names in os.walk(Path(folder)) for name in names)
    if suffixes is None:
        return found, []
    taken = [path for path in found if path.suffix.lower() in suffixes]
    return taken, [path for path in found if path.suffix.lower() not in suffixes]


def match_files(pattern: str) -> list[Path]:
    """The files that a path or a glob of the command line names, in order; `**` goes into subfolders.

    A file of exactly this name is taken as it is, also where its name or a folder's holds brackets.
    """
    if Path(pattern).is_file():
        return [Path(pattern)]
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]


@contextmanager
def temporary_folder(beside: str | os.PathLike | None = None, prefix: str | None = None) -> Iterator[Path]:
    """A folder that is removed at the end.

    Args:
        beside (`str` or `os.PathLike`, *optional*): The folder to make it in; the system's own by default.
        prefix (`str`, *optional*): How its name begins.
    """
    with tempfile.TemporaryDirectory(dir=beside, prefix=prefix) as folder:
        yield Path(folder)


def check_writable(folder: str | os.PathLike) -> None:
    """Say early that nothing can be written into a folder.

    Raises:
        OSError: If a file cannot be made there.
    """
    tempfile.TemporaryFile(dir=Path(folder)).close()


def user_cache_dir(name: str) -> Path:
    """`modeling_dclip/NAME` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`).

    Args:
        name (`str`): What is kept there: `"regions"`, `"shards"`, `"classifiers"`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modeling_dclip" / name


# Writing whole files.


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` and move it there at the end. A reader sees the whole file or the old one.

    Missing folders are made. A replaced file keeps its permissions.

    Args:
        path (`str` or `os.PathLike`): A file, or a folder that does not exist yet.

    Yields:
        `Path`: Where to write. If the writing fails, it is removed, and what was at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary / path.name
        if path.is_file():
            shutil.copymode(path, temporary / path.name)
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all. Folders are made."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(
    path: str | os.PathLike, content: Any, *, indent: Literal[1, 2] = 1, default: Callable[[Any], Any] | None = None
) -> None:
    """Write JSON atomically, in one of the two forms in use.

    Args:
        path (`str` or `os.PathLike`): The file.
        content (`Any`): What `json.dumps` takes.
        indent (`int`, *optional*, defaults to 1): 1 as results files are written: UTF-8, without NaN and infinity. 2
            as transformers writes configurations: ASCII.
        default (`Callable`, *optional*): What to write in place of a value that JSON has no form for.

    Raises:
        ValueError: If a number is NaN or infinite, with `indent` 1.
    """
    results = indent == 1
    text = json.dumps(content, indent=indent, ensure_ascii=not results, allow_nan=not results, default=default)
    write_text(path, text + "\n")
