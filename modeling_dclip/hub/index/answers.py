"""What a search found, as lines for a terminal and as a page of pictures that any browser opens offline."""

import json
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from modeling_dclip.data.files import check_output_folder, printable, write_text
from modeling_dclip.data.images import Thumbnail, UnreadableImageError, make_thumbnail
from modeling_dclip.evaluation.reports.document import render_page
from modeling_dclip.hub.index import Hit, SearchIndex
from modeling_dclip.progress import count_of

MOST_COLUMNS = 120  # columns of a line
LONGEST_WORD = 18  # characters of a name in one line, on a telephone
_TELLS_NOTHING = re.compile(r"student|teacher|anchor|model|final|(seed|checkpoint)-\d+")
LONGEST_QUERY = 300  # characters shown
THUMBNAIL_SIZE = 320  # pixels of the longest side: sharp on a telephone, 20 KB each
NOTHING_FOUND = (
    "No picture was found: this approximate index looked at too little. Search again with a higher --effort."
)


class Tile(NamedTuple):
    """A picture of a page.

    Attributes:
        rank (`int`): 1 is the nearest.
        hit ([`Hit`]): What was found.
        link (`str`, *optional*): Where the picture's file is, as seen from the page; `None` if a dataset holds it.
        thumbnail ([`Thumbnail`], *optional*): The small picture; `None` if it cannot be read.
        reason (`str`): Why it cannot be read; empty if it can.
        name (`list[str]`): The picture's name, in the parts between which a line may break.
    """

    rank: int
    hit: Hit
    link: str | None
    thumbnail: Thumbnail | None
    reason: str
    name: list[str]


def _columns(text: str) -> int:
    """How many columns a terminal gives a text: two for each wide character, as those of Chinese and Japanese are."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )


def _shorten_name(name: str, width: int) -> str:
    """The end of a name, which tells more than its begin."""
    if _columns(name) <= width:
        return name
    while _columns(name) > width - 1:
        name = name[1:]
    return f"…{name}"


def short_name(model: str) -> str:
    """The name of a model to show: a Hub id, or a folder's name, with the folder above where it tells nothing alone.

    Example:
        >>> short_name("openai/clip-vit-base-patch16")
        'openai/clip-vit-base-patch16'
    """
    if not os.path.isdir(model):
        return model
    parts = Path(model).resolve().parts
    start = len(parts) - 1
    while start > 1 and _TELLS_NOTHING.fullmatch(parts[start]):
        start -= 1
    return "/".join(parts[start:])


def short_place(images: str) -> str:
    """Name what was indexed as people do: a folder by its name, a dataset by the name of its file and its split.

    Args:
        images (`str`): A folder that is there, or a dataset's spec.

    Example:
        >>> short_place("coco:/data/coco/annotations/captions_val2017.json:/data/coco/val2017")
        'captions_val2017.json'
        >>> short_place("scenes:validation,n=60"), short_place("hub:me/photos:test")
        ('drawn scenes (validation)', 'me/photos (test)')
    """
    if os.path.isdir(images):
        return Path(images).resolve().name or images
    from modeling_dclip.data.captions import parse_caption_spec

    spec = parse_caption_spec(images)
    kind = spec.source.form.partition(":")[0]
    place = spec.fields[0] if spec.fields else ""
    names = {"scenes": "drawn scenes", "hub": place, "held_out": f"the held-out pictures of {short_name(place)}"}
    name = names.get(kind) or PurePath(place).name or place
    return f"{name} ({spec.split})" if spec.split else name


def count_nearest(found: int, total: int) -> str:
    """Say how many pictures were found, of how many.

    Example:
        >>> count_nearest(1, 1), count_nearest(3, 1800)
        ('The nearest of 1 picture', 'The 3 nearest of 1,800 pictures')
    """
    return f"The {f'{found:,} ' if found != 1 else ''}nearest of {count_of(total, 'picture')}"


def describe_left_out(names: str, count: int) -> str:
    """Say which pictures are not among the answers, being the one that was looked for.

    Args:
        names (`str`): Of the pictures, as the place that shows them needs them.
        count (`int`): How many they are, at least 1.

    Example:
        >>> describe_left_out("a.png, b.png", 2)
        'Left out, because they are the same picture: a.png, b.png.'
    """
    return f"Left out, because {'it is' if count == 1 else 'they are'} the same picture: {names}."


def split_name(name: str) -> list[str]:
    """Cut a name where a line may break: after `/`, and in a long part after `_` and before the ending. Browsers break
    at `-` and spaces by themselves.

    Example:
        >>> split_name("photos/IMG_0013.jpg"), split_name("20240613_summer_holidays.jpg")
        (['photos/', 'IMG_0013.jpg'], ['20240613_', 'summer_', 'holidays', '.jpg'])
    """
    pieces: list[str] = []
    for part in re.split(r"(?<=/)", name):
        is_long = max(map(len, re.split(r"[\s-]", part))) > LONGEST_WORD
        pieces += re.split(r"(?<=_)(?!_)|(?=\.\w+$)", part) if is_long else [part]
    return [piece for piece in pieces if piece]


def describe_query(query: str | Image.Image, name: str | None = None) -> str:
    """Say what was looked for, in one line: the words between quotes, or the picture's file.

    Args:
        query (`str` or `PIL.Image.Image`): Words, or a picture.
        name (`str`, *optional*): The picture's file.
    """
    if isinstance(query, str):
        words = printable(query if len(query) <= LONGEST_QUERY else f"{query[:LONGEST_QUERY].rstrip()}…")
        return f"“{words}”"
    return printable(Path(name).name) if name else "a picture"


def describe_hits(index: SearchIndex, asked: str, hits: Sequence[Hit], as_json: bool = False) -> str:
    """Write the found pictures in lines of at most [`MOST_COLUMNS`] columns: rank, cosine, and the file.

    Args:
        index ([`SearchIndex`]): What was searched.
        asked (`str`): What was looked for, from [`describe_query`].
        hits (`Sequence[Hit]`): What was found, best first.
        as_json (`bool`, *optional*, defaults to `False`): One JSON object in a line instead, for other programs.

    Returns:
        `str`: Lines, without a break at the end.
    """
    if as_json:
        return "\n".join(json.dumps(hit._asdict()) for hit in hits)
    if not hits:
        return NOTHING_FOUND
    nearest = count_nearest(len(hits), len(index))
    folder = [index.images] if os.path.isdir(index.images) else []  # its path, where a line holds it
    places = [f" in {printable(place)}" for place in (*folder, short_place(index.images))] + [""]
    headers = [f"{nearest}{place}, to {asked}" for place in places] + [nearest]
    lines = [next(header for header in headers if _columns(header) <= MOST_COLUMNS)]
    digits = max(4, len(str(len(hits))))
    lines.append(f"{'rank':>{digits}}  cosine  picture")
    room = MOST_COLUMNS - digits - 10
    lines += [
        f"{rank:{digits}d}  {hit.score:6.3f}  {_shorten_name(printable(hit.name), room)}"
        for rank, hit in enumerate(hits, 1)
    ]
    return "\n".join(lines)


def check_page(path: str | os.PathLike) -> None:
    """Say early that a page cannot be written there.

    Raises:
        OSError: If its folder cannot be written.
        ValueError: If it is no `.html` file.
    """
    if Path(path).suffix.lower() != ".html":
        raise ValueError(f"--page: expected a .html file to write to, got '{printable(path)}'.")
    check_output_folder(Path(path).parent)


def write_page(
    index: SearchIndex,
    query: str | Image.Image,
    hits: Sequence[Hit],
    path: str | os.PathLike,
    name: str | None = None,
    left_out: Sequence[str] = (),
) -> list[Tile]:
    """Write what a search found as one HTML page: query, pictures, file names and cosines.

    The page holds small copies of the pictures (about 20 KB each), so that it can be moved and sent. Each links to the
    file itself, relative to the page. There is no script, and nothing is fetched. It fits a telephone, and follows the
    browser's dark mode.

    Args:
        index ([`SearchIndex`]): What was searched.
        query (`str` or `PIL.Image.Image`): What was looked for, as [`read_query`] gives it.
        hits (`Sequence[Hit]`): What [`SearchIndex.search`] found.
        path (`str` or `os.PathLike`): A `.html` file, written whole or not at all.
        name (`str`, *optional*): The file of a picture that was looked for.
        left_out (`Sequence[str]`, *optional*): Names of pictures that are the same as the one that was looked for.

    Returns:
        `list[Tile]`: What the page shows. A picture that is gone or damaged has its reason in place of the picture.

    Raises:
        OSError: If it cannot be written.
        ValueError: If it is no `.html` file.
    """
    check_page(path)
    tiles = [_make_tile(index, rank, hit, Path(path)) for rank, hit in enumerate(hits, 1)]
    page = render_page(
        "search.html.jinja",
        asked=describe_query(query, name),
        asking=make_thumbnail(query, THUMBNAIL_SIZE) if isinstance(query, Image.Image) else None,
        tiles=tiles,
        nearest=count_nearest(len(hits), len(index)),
        images=short_place(index.images),
        left_out=describe_left_out(", ".join(left_out), len(left_out)) if left_out else "",
        model=short_name(index.model),
        warning=index.warning(),
        nothing_found=NOTHING_FOUND,
    )
    write_text(path, page)
    return tiles


def _make_tile(index: SearchIndex, rank: int, hit: Hit, page: Path) -> Tile:
    link = quote(os.path.relpath(hit.path, page.absolute().parent)) if hit.path is not None else None
    name = split_name(hit.name)
    try:
        return Tile(rank, hit, link, make_thumbnail(index.picture(hit), THUMBNAIL_SIZE), "", name)
    except UnreadableImageError as error:
        return Tile(rank, hit, None, None, error.reason, name)
