"""Class names and prompt templates: from the data's own files, from a file given, or from open_clip where it is
installed.

CLIP's 80 ImageNet prompts and its wording of the 1,000 classes are a selection by their authors, so they are not
copied here: the webdataset `wds_imagenet1k` brings both as files, and `open_clip` has them as a package
(`names=open_clip`, `templates=open_clip`).
"""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from modeling_dclip.data.files import printable, read_json, read_text, require_field
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

# Our selection, for small photographs of one object. For other pictures give a file.
PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a cropped photo of a {}.",
)
OPEN_CLIP = "open_clip"
NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
# ImageNet's own lists of its folders: one synset and its name in each line.
SYNSET_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")
_SYNSET = re.compile(r"n\d{8}")
_KEYED = re.compile(r"(n\d{8})[\s,:]+(.+)")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.0+)?")
_NUMBERED = re.compile(r"([0-9]{1,18})[\s,:]+(.+)")
_SHOWN = 3  # pairs that the log names
# What tables have in their first line where a list of names has a name.
_HEADERS = {
    *("id", "index", "label", "labels", "class", "classes", "classname", "classnames", "class_name", "class_names"),
    *("category", "categories", "name", "names", "template", "templates"),
}
_SEPARATOR = re.compile(r"[,;:\s]")
_QUOTED = re.compile(r"""(["']).*\1[,;]?""")


def check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> tuple[list[str], list[str]]:
    """Strip class names and templates, and refuse what no classifier can be made of.

    Args:
        class_names (`Sequence[str]`): K >= 2 non-empty names. A name may occur twice, as in ImageNet's usual list.
        templates (`Sequence[str]`): Each with one place for the class name, `{}` or `{c}`.

    Returns:
        `tuple[list[str], list[str]]`: The names; the templates, their place written `{}`.

    Raises:
        ValueError: If there are fewer than two classes, a name is empty, there is no template, or one has not one
            place.
    """
    for what, values, least in (("class names", class_names, 2), ("templates", templates, 1)):
        if isinstance(values, str) or len(values) < least:
            raise ValueError(f"Expected at least {least} {what}, got {values!r}.")
    names = [name.strip() for name in class_names]
    if "" in names:
        raise ValueError(f"Expected non-empty class names, got an empty one for class {names.index('')}.")
    placed = [template.strip().replace("{c}", "{}") for template in templates]
    odd = [given for given, template in zip(templates, placed, strict=True) if template.count("{}") != 1]
    if odd:
        raise ValueError(f"Expected every template to hold '{{}}' once, for the class name, got {odd[0]!r}.")
    return names, placed


def parse_lines(text: str, place: str) -> list[str]:
    """Split the text of a file of names or templates into stripped lines. Empty lines at the end are ignored.

    Raises:
        ValueError: If there is none, an empty one stands between others, the first is the header of a table or a
            comment, or they are JSON or quoted: each would shift the classes after it, or give them wrong words.
    """
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} is empty" if lines else "the file is empty"
        raise ValueError(f"Expected one name or template a line in '{place}', but {where}. Repair the file.")
    if (fault := _line_fault(lines)) is not None:
        raise ValueError(f"Expected one name or template a line in '{place}', but {fault}.")
    return lines


def _line_fault(lines: Sequence[str]) -> str | None:
    """Why lines are no list of names; `None` if they may be one."""
    cells = {cell.strip().strip("\"'").lower() for cell in _SEPARATOR.split(lines[0])} - {""}
    if len(lines) > 1 and cells and cells <= _HEADERS:
        return f"line 1 is {lines[0]!r:.80}, the header of a table. Remove it"
    if comment := next((line for line in lines if line.startswith(("# ", "//"))), None):
        return f"line {lines.index(comment) + 1} is the comment {comment!r:.80}. Remove it"
    if lines[0] in ("{", "[") or lines[0].startswith(('{"', '["', "['", "{'")):
        return f"line 1 is {lines[0]!r:.80}, as in JSON. Call the file NAME.json if it is JSON"
    if code := next((line for line in lines if line.startswith("lambda ")), None):
        return f"line {lines.index(code) + 1} is {code!r:.80}, a line of Python. Write a text with a place, {{}}"
    if all(_QUOTED.fullmatch(line) for line in lines):
        return f"its lines stand between quotes (line 1 is {lines[0]!r:.80}). Remove them"
    return None


def read_lines(path: str | Path) -> list[str]:
    """Read a file for [`parse_lines`], or a `.json` that holds a list of texts, or an object of them by their numbers
    from 0.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: As [`parse_lines`], or if it is not UTF-8, or another JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file '{path}' of class names or templates. Check the path.")
    if path.suffix.lower() != ".json":
        return parse_lines(read_text(path), str(path))
    content = read_json(path, "file of class names or templates")
    if isinstance(content, dict) and set(content) == set(map(str, range(len(content)))):
        content = [content[str(number)] for number in range(len(content))]
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"Expected a list of texts, or an object with the keys '0', '1'..., in '{path}', got {content!r:.80}."
        )
    texts = [require_field({"text": text}, "text", f"Entry {at}", path, str) for at, text in enumerate(content)]
    return [text.strip() for text in texts]


def _open_clip_list(name: str) -> list[str]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            "names=open_clip and templates=open_clip take OpenAI's ImageNet lists from the package open_clip, which "
            "is not installed. pip install open_clip_torch, or give files."
        ) from error
    # Templates are functions of the class name there, and templates of ours are texts with a place for it.
    return [entry("{}") if callable(entry) else entry for entry in getattr(open_clip, name)]


def read_templates(source: str | None, default: Sequence[str]) -> list[str]:
    """Templates of a file, of `"open_clip"` (OpenAI's 80 for ImageNet), or the default where no source is given.

    Raises:
        FileNotFoundError: If the file is missing.
        ImportError: If `"open_clip"` is asked for and not installed.
        ValueError: As [`parse_lines`].
    """
    if source is None:
        return list(default)
    return _open_clip_list("OPENAI_IMAGENET_TEMPLATES") if source == OPEN_CLIP else read_lines(source)


def normal_name(name: str) -> str:
    """A class name as it is compared: a letter and its accent as one character, no blanks around."""
    return unicodedata.normalize("NFC", name).strip()


def as_numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers that names of classes are (`"7"`, `"007"`, `"7.0"`), or `None` if one is no number."""
    if not names or not all(_NUMBER.fullmatch(name) for name in names):
        return None
    return [int(name.partition(".")[0]) for name in names]


def order_classes(names: Sequence[str]) -> list[str]:
    """Names of classes in order: as numbers if all are numbers, else as text.

    Example:
        >>> order_classes(["10", "9", "1"])
        ['1', '9', '10']
    """
    numbers = as_numbers(names)
    return sorted(names) if numbers is None else [name for _, name in sorted(zip(numbers, names, strict=True))]


def read_names(source: str | Sequence[str] | None, default: Sequence[str], *, ordered: bool = True) -> list[str]:
    """Class names of a file, of `"open_clip"` (OpenAI's wording of ImageNet's 1,000), or the default where no source
    is given.

    Names are joined with the classes in the first of these ways that fits. Any other is refused.

    1. By key: a JSON object `{"CLASS": "NAME"}`, or text with a class, a tab and its name a line; for synsets and
       numbers also `n01440764 tench` and `0: tench`. In any order; other keys are left over.
    2. By number, where all classes are called by numbers (`0`, `10`, `2`): the n-th line is of class n. Lines count
       from 0 if there is a class 0, and from 1 if there is none and the last line has a class.
    3. By name, where the file's names are those of the classes in another order.
    4. By place, where the order of the classes is the data's own, or they are synsets: those are in order everywhere.

    Args:
        source (`str` or `Sequence[str]`, *optional*): A file in UTF-8 with a name a line, or JSON (`.json`): an
            object or a list. `"open_clip"`. The lines themselves.
        default (`Sequence[str]`): What the data itself calls its K classes.
        ordered (`bool`, *optional*, defaults to `True`): Whether the data itself puts its classes in this order. Else
            it comes from sorting, and a list of names by place would be joined by accident.

    Returns:
        `list[str]`: K names.

    Raises:
        FileNotFoundError, ImportError: As [`read_templates`].
        ValueError: If there are not K names, a class has none or two, the order would be a guess, or the default's
            synsets are all there is.
    """
    if source is None:
        return _own_names(default)
    place, lines, keyed = _read_source(source)
    keyed = _keyed_lines(lines, default, place) if keyed is None and source != OPEN_CLIP else keyed
    numbers = as_numbers(default)
    if keyed is not None and numbers is None and set(keyed) == set(map(str, range(len(default)))):
        lines, keyed = [keyed[str(number)] for number in range(len(default))], None  # by the classes' places
    if keyed is not None:
        names = _by_key(keyed, default, place)
        _log_pairs("key", default, names, place, 0)
        return names
    if numbers is not None:
        first = first_number(numbers, len(lines), place)
        names = [lines[number - first] for number in numbers]
        _log_pairs("number", default, names, place, len(lines) - len(names))
        return names
    if len(lines) != len(default):
        raise ValueError(
            f"Expected {len(default)} class names in '{place}', one per class of the data in its order, got "
            f"{len(lines)}."
        )
    return _by_name_or_place(lines, default, place, ordered)


def _own_names(default: Sequence[str]) -> list[str]:
    if default and all(_SYNSET.fullmatch(name) for name in default):
        raise ValueError(
            f"Expected class names, got only synset ids ({default[0]!r}, ...), which are no words. Give the names "
            f"as names=FILE (a name a line in the folders' order, or '{default[0]} NAME'), or names=open_clip for "
            "all of ImageNet-1k."
        )
    if as_numbers(default) is not None:
        logger.warning(
            "The classes are called by numbers (%s, ...), and prompts will say these. If they are no names, give "
            "names=FILE with a name a line.",
            ", ".join(map(repr, default[:_SHOWN])),
        )
    return [unicodedata.normalize("NFC", name) for name in default]


def _read_source(source: str | Sequence[str]) -> tuple[str, list[str], dict[str, str] | None]:
    """What messages call a source of names; the names in its order, or by class if it is a JSON object."""
    if not isinstance(source, str):
        return "class_names", list(source), None
    if source == OPEN_CLIP:
        return source, _open_clip_list("IMAGENET_CLASSNAMES"), None
    lines = [] if Path(source).suffix.lower() == ".json" else read_lines(source)
    content = None if lines else read_json(source, "file of class names")
    if isinstance(content, dict):
        return source, [], _flat_object(content, source)
    return source, lines or read_lines(source), None


def _keyed_lines(lines: Sequence[str], default: Sequence[str], source: str) -> dict[str, str] | None:
    """Names by class, or `None` if the lines are only names."""
    synsets, numbers = all(_SYNSET.fullmatch(name) for name in default), as_numbers(default)
    pairs = [line.split("\t", 1) for line in lines if "\t" in line]
    if len(pairs) < len(lines) and synsets:
        pairs = [list(match.groups()) for line in lines if (match := _KEYED.fullmatch(line))]
    elif len(pairs) < len(lines) and numbers is not None:
        pairs = [list(match.groups()) for line in lines if (match := _NUMBERED.fullmatch(line))]
        if len({int(key) for key, _ in pairs}) < len(pairs) or len(pairs) < len(lines):
            return None  # names that begin with a number, e.g. of coins
    if pairs and len(pairs) < len(lines):
        raise ValueError(
            f"Expected a class and its name in every line of '{source}', got only a name in {len(lines) - len(pairs)} "
            "of them. Repair the file."
        )
    found: dict[str, str] = {}
    for key, name in pairs:
        if found.setdefault(normal_name(key), name.strip()) != name.strip():
            raise ValueError(f"Expected each class once in '{source}', got {key!r} with two names.")
    return found or None


def _flat_object(content: Mapping[str, object], source: str) -> dict[str, str]:
    """A JSON object of names by class, also ImageNet's `{"0": ["n01440764", "tench"]}`; or of numbers by name."""
    found: dict[str, str] = {}
    for key, value in content.items():
        texts = [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
        if isinstance(value, int) and not isinstance(value, bool):
            pairs = [(str(value), key)]
        elif isinstance(value, str) and value.strip():
            pairs = [(key, value)]
        elif isinstance(value, list) and len(value) == len(texts) == 2 and all(text.strip() for text in texts):
            pairs = [(key, texts[1]), (texts[0], texts[1])]
        else:
            raise ValueError(f"Expected the name of class {key!r} as text in '{source}', got {value!r:.80}.")
        for one, name in pairs:
            if found.setdefault(normal_name(one), name.strip()) != name.strip():
                raise ValueError(f"Expected each class once in '{source}', got {one!r} with two names.")
    return found


def _by_key(keyed: Mapping[str, str], default: Sequence[str], source: str) -> list[str]:
    numbers, key_numbers = as_numbers(default), as_numbers(list(keyed))
    if numbers is not None and key_numbers is not None:
        by_number: dict[int, str] = {}
        for number, name in zip(key_numbers, keyed.values(), strict=True):
            if by_number.setdefault(number, name) != name:
                raise ValueError(f"Expected each class once in '{source}', got {number} with two names.")
        found = [by_number.get(number) for number in numbers]
    else:
        found = [keyed.get(normal_name(name)) for name in default]
    missing = [name for name, new in zip(default, found, strict=True) if new is None]
    if missing:
        raise ValueError(
            f"Expected a name for every class in '{source}', got none for {missing[:5]}. Add it; a line is the class, "
            "a tab and its name."
        )
    return [name for name in found if name is not None]


def first_number(numbers: Sequence[int], count: int, source: str) -> int:
    """What the first line of a list of names stands for, where classes are numbers: 0 or 1.

    Args:
        numbers (`Sequence[int]`): The classes of the data, in any order.
        count (`int`): Names in the list.
        source (`str`): The list, for messages.

    Raises:
        ValueError: If a class comes twice or has no line, or the list could begin at 0 and at 1.
    """
    low, high = min(numbers), max(numbers)
    advice = 'Give the names as a JSON object {"CLASS": "NAME"}, or with a class, a tab and its name a line.'
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if list(numbers).count(number) > 1)
        raise ValueError(f"Expected each class once, got two called {twice} ('{source}' has one name for them).")
    if low < 0 or high > count or (low == 0 and high == count):
        wrong = low if low < 0 else high
        raise ValueError(
            f"Expected a name for each of the classes {low} to {high} in '{source}', got "
            f"{count_of(count, 'name')} and none for class {wrong}. {advice}"
        )
    if low > 0 and high < count:
        raise ValueError(
            f"The classes are {low} to {high}, and '{source}' has {count_of(count, 'name')}: its first one may be of "
            f"class 0 or of class 1. {advice}"
        )
    return min(low, 1)


def read_numbered_names(source: str, numbers: Sequence[int]) -> tuple[int, list[str]]:
    """The names of classes that the data calls by numbers only, those without a row too.

    Args:
        source (`str`): As in [`read_names`].
        numbers (`Sequence[int]`): The classes that come in the data, each once.

    Returns:
        `tuple[int, list[str]]`: The number of the first class, and the names from it on.

    Raises:
        FileNotFoundError, ImportError, ValueError: As [`read_names`].
    """
    place, lines, keyed = _read_source(source)
    classes = [str(number) for number in numbers]
    keyed = _keyed_lines(lines, classes, place) if keyed is None and source != OPEN_CLIP else keyed
    if keyed is None:
        first = first_number(numbers, len(lines), place)
        _log_pairs("number", [str(first + line) for line in range(len(lines))], lines, place, 0)
        return first, lines
    keys = as_numbers([key for key in keyed if _NUMBER.fullmatch(key)]) or [0]
    first, last = min(keys), max(keys)
    if last - first >= 2 * len(keyed):
        raise ValueError(f"Expected names of the classes {first} to {last} in '{place}', got {len(keyed)}.")
    return first, _by_key(keyed, [str(number) for number in sorted({*range(first, last + 1), *numbers})], place)


def _by_name_or_place(lines: Sequence[str], default: Sequence[str], source: str, ordered: bool) -> list[str]:
    wanted = [_folded(name) for name in default]
    given = {_folded(line): line for line in lines}
    if len(given) == len(lines) and set(given) == set(wanted):
        return [given[name] for name in wanted]
    if not ordered and not (all(_SYNSET.fullmatch(name) for name in default) and list(default) == sorted(default)):
        raise ValueError(
            f"The classes are called {', '.join(map(repr, default[:_SHOWN]))}, ... and '{source}' is a list without "
            "these names. Their order is that of the alphabet, so that joining them by place would be a guess. Give "
            'a JSON object {"CLASS": "NAME"}, or a class, a tab and its name a line.'
        )
    places = {name: place for place, name in enumerate(wanted)}
    for place, line in enumerate(lines):
        if places.get(_folded(line), place) != place:
            raise ValueError(
                f"Name {place} of '{source}' is {line!r}, which the data calls class {places[_folded(line)]}. The "
                "list is in another order. Give a class, a tab and its name a line."
            )
    _log_pairs("place", default, lines, source, 0)
    return list(lines)


def _folded(name: str) -> str:
    return normal_name(name).replace("_", " ").casefold()


def _log_pairs(how: str, classes: Sequence[str], names: Sequence[str], source: str, left_over: int) -> None:
    pairs = [f"{printable(own)} = {name!r}" for own, name in zip(classes[:_SHOWN], names, strict=False)]
    rest = f"; left over: {count_of(left_over, 'name')}" if left_over else ""
    logger.warning("Names of '%s' are joined with the classes by %s: %s, ...%s", source, how, ", ".join(pairs), rest)


def find_file(folders: Sequence[Path], names: Sequence[str]) -> str | None:
    """The first of the files that lies in one of the folders, or `None`."""
    found = [folder / name for name in names for folder in folders if (folder / name).is_file()]
    return str(found[0]) if found else None
