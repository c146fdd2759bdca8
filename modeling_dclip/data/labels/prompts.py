"""Class names and prompt templates: from the data's own files, from a file given, or from open_clip where it is
installed.

CLIP's 80 ImageNet prompts and its wording of the 1,000 classes are a selection by their authors, so they are not
copied here: the webdataset `wds_imagenet1k` brings both as files, and `open_clip` has them as a package
(`names=open_clip`, `templates=open_clip`).
"""

import re
from collections.abc import Sequence
from pathlib import Path

from modeling_dclip.data.files import read_json, read_text, require_field

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
        ValueError: If there is none, or an empty one stands between others, which would shift all classes after it.
    """
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} is empty" if lines else "the file is empty"
        raise ValueError(f"Expected one name or template a line in '{place}', but {where}. Repair the file.")
    return lines


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


def read_names(source: str | None, default: Sequence[str]) -> list[str]:
    """Class names of a file, of `"open_clip"` (OpenAI's wording of ImageNet's 1,000), or the default where no source
    is given.

    Args:
        source (`str`, *optional*): A file with a name a line in the order of the labels; or with a synset and its name
            a line, in any order, where the default's names are synsets. `"open_clip"`.
        default (`Sequence[str]`): What the data itself calls its K classes.

    Returns:
        `list[str]`: K names.

    Raises:
        FileNotFoundError, ImportError: As [`read_templates`].
        ValueError: If there are not K names, a synset has none or two, or the default's synsets are all there is.
    """
    synsets = all(_SYNSET.fullmatch(name) for name in default)
    if source is None:
        if synsets and default:
            raise ValueError(
                f"Expected class names, got only synset ids ({default[0]!r}, ...), which are no words. Give the names "
                f"as names=FILE (a name a line in the folders' order, or '{default[0]} NAME'), or names=open_clip for "
                "all of ImageNet-1k."
            )
        return list(default)
    lines = _open_clip_list("IMAGENET_CLASSNAMES") if source == OPEN_CLIP else read_lines(source)
    keyed = [_KEYED.fullmatch(line) for line in lines]
    found = [match for match in keyed if match]
    if synsets and len(found) == len(lines):
        names: dict[str, str] = {}
        for match in found:
            if names.setdefault(match[1], match[2]) != match[2]:
                raise ValueError(f"Expected each synset once in '{source}', got {match[1]!r} with two names.")
        missing = [synset for synset in default if synset not in names]
        if missing:
            raise ValueError(f"Expected a name for every class in '{source}', got none for {missing[:5]}. Add it.")
        return [names[synset] for synset in default]
    if len(lines) != len(default):
        raise ValueError(
            f"Expected {len(default)} class names in '{source}', one per class of the data in its order, got "
            f"{len(lines)}."
        )
    return lines


def find_file(folders: Sequence[Path], names: Sequence[str]) -> str | None:
    """The first of the files that lies in one of the folders, or `None`."""
    found = [folder / name for name in names for folder in folders if (folder / name).is_file()]
    return str(found[0]) if found else None
