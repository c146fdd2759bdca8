"""What to search for and to classify by: words of the captions of an index's pictures, where there are some."""

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

from modeling_dclip.data.captions import CAPTION_SOURCES, load_captions, parse_caption_spec
from modeling_dclip.data.failures import FAILURES, one_line
from modeling_dclip.hub.index import SearchIndex
from modeling_dclip.hub.publish.licences import read_arguments

logger = logging.getLogger(__name__)

MOST_TEXTS = 500  # captions that are read for suggestions, and texts of a visitor's own
LONGEST_SUGGESTION = 45  # characters
MOST_NAMES, FEWEST_NAMES = 6, 2
# Of English captions: words that name nothing that a picture shows.
_FUNCTION_WORDS = frozenset(
    "a an the and or of in on at to by for from with without into onto over under above below beside behind between "
    "near next through across along around out up down off is are was were be being been has have having do does it "
    "its his her their this that these those there which who while as two three four five six seven eight nine ten "
    "one some several many few other another each all both left right front back top bottom side picture image photo "
    "photograph".split()
)
_WORD = re.compile(r"[^\W\d_]+")


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what a reader of captions says of its rows: it was said where they were trained on or indexed."""
    data = logging.getLogger("modeling_dclip.data")
    level = data.level
    data.setLevel(logging.ERROR)
    try:
        yield
    finally:
        data.setLevel(level)


def find_captions(index: SearchIndex) -> list[str]:
    """The first captions of some pictures of an index: of its dataset, or those that its model learned from.

    Args:
        index ([`SearchIndex`]): Open.

    Returns:
        `list[str]`: At most [`MOST_TEXTS`], without repetitions; none where nothing captions them.
    """
    return load_some_captions(index.images) or load_learned_captions(
        index.model, set(index.rows["image_id"].to_pylist())
    )


def load_some_captions(images: str) -> list[str]:
    """The first caption of some pictures, spread over a dataset; none of pictures that come without captions. If they
    cannot be read, that is logged.

    Args:
        images (`str`): A folder, or a dataset's spec.
    """
    if os.path.isdir(images) or images.startswith("images:"):
        return []
    try:
        with _quietly():
            captions = load_captions(images).select_columns("captions")
    except FAILURES as error:
        logger.warning("The captions of '%s' are not known: %.120s", images, one_line(error))
        return []
    count = min(MOST_TEXTS, len(captions))
    rows = captions.select([place * len(captions) // count for place in range(count)])["captions"][:]
    return list(dict.fromkeys(row[0] for row in rows if row))


def load_learned_captions(model: str, image_ids: Collection[str]) -> list[str]:
    """The first captions of some pictures of an index, from the tables that the model's run recorded.

    An index of a folder has no captions; the run that trained its model may have read them from a table, `csv:`, which
    names pictures as a folder does. If one cannot be read any more, that is logged.

    Args:
        model (`str`): A folder, a Hub id, or `open_clip:NAME:PRETRAINED`.
        image_ids (`Collection[str]`): Of the pictures in the index. Captions of other pictures are not taken.
    """
    if not (Path(model) / "arguments.yaml").is_file():
        return []
    found: list[str] = []
    try:
        specs = map(parse_caption_spec, read_arguments(model).get("train_datasets") or [])
        for spec in (spec for spec in specs if spec.source is CAPTION_SOURCES["csv"]):
            with _quietly():
                dataset = load_captions(spec).select_columns(["image_id", "captions"])
            rows = [row for row, image_id in enumerate(dataset["image_id"][:]) if image_id in image_ids]
            count = min(MOST_TEXTS, len(rows))
            spread = [rows[place * len(rows) // count] for place in range(count)]
            found += [row[0] for row in dataset.select(spread)["captions"][:] if row]
    except FAILURES as error:
        logger.warning("The captions that '%s' learned from are not known: %.120s", model, one_line(error))
    return list(dict.fromkeys(found))[:MOST_TEXTS]


def short_captions(captions: Sequence[str], count: int) -> list[str]:
    """Some short captions, spread over all; where none is short, the shortest.

    Example:
        >>> short_captions(["a red dog", "a cat", "a" * 99, "two cats"], 2)
        ['a red dog', 'a cat']
    """
    short = [text for text in captions if len(text) <= LONGEST_SUGGESTION]
    candidates = short or sorted(captions, key=len)[:count]
    count = min(count, len(candidates))
    return [candidates[place * len(candidates) // count] for place in range(count)]


def frequent_names(captions: Sequence[str]) -> list[str]:
    """What captions name most: pairs of words such as `brown dog`; where they have few, single words.

    Args:
        captions (`Sequence[str]`): Any; words of other languages than English are taken as they are. A plural counts
            as the word without `s`, where the captions have both.

    Returns:
        `list[str]`: At most [`MOST_NAMES`], the most frequent first; none if fewer than [`FEWEST_NAMES`] are named
            twice.

    Example:
        >>> frequent_names(["a brown dog on the grass", "two brown dogs", "a brown dog", "a man on a red bike"] * 2)
        ['brown dog', 'red bike']
        >>> frequent_names(["a brown dog runs", "two dogs run", "a dog runs on grass", "a red bike"] * 2)
        ['brown dog', 'red bike']
    """
    pairs, single = Counter[str](), Counter[str]()
    texts = [_WORD.findall(caption.lower()) for caption in captions]
    known = {word for words in texts for word in words}
    for written in texts:
        words = [word[:-1] if word[-1] == "s" and word[:-1] in known else word for word in written]
        named = [word not in _FUNCTION_WORDS and len(word) > 1 and not word.endswith("ing") for word in words]
        single.update({word for word, is_name in zip(words, named, strict=True) if is_name})
        # A plural after a word of which there is a plural too is a verb (`a dog runs`, where others have dogs).
        pairs_of_words = zip(["", *words], words, written, strict=False)
        verbs = [word != as_written and f"{before}s" in known for before, word, as_written in pairs_of_words]
        # The pair ends what is named: `large brown dog` is a `brown dog`. A verb (`a brown dog runs`) ends it too.
        goes_on = [
            is_name and not word.endswith("s") and not is_verb
            for word, is_name, is_verb in zip(words, named, verbs, strict=True)
        ]
        for place, more in enumerate([*goes_on[2:], False][: len(words) - 1]):
            is_plural = words[place] != written[place]  # `dogs run`: the second word is a verb
            if named[place] and named[place + 1] and not (more or is_plural or verbs[place + 1]):
                pairs[f"{words[place]} {words[place + 1]}"] += 1
    for counted in (pairs, single):
        names = [name for name, count in counted.most_common(MOST_NAMES) if count > 1]
        if len(names) >= FEWEST_NAMES:
            return names
    return []


def name_folders(names: Sequence[str]) -> list[str]:
    """The folders that pictures lie in, as words.

    Args:
        names (`Sequence[str]`): Of the pictures, as seen from the folder that was indexed.

    Returns:
        `list[str]`: At most [`MOST_NAMES`], those with the most pictures first; none if there are fewer than
            [`FEWEST_NAMES`], or a name is no word.

    Example:
        >>> name_folders(["kitchen/1.jpg", "work_shop/2.jpg", "kitchen/3.jpg"]), name_folders(["2024/1.jpg", "x.jpg"])
        (['kitchen', 'work shop'], [])
    """
    folders = [" ".join(PurePath(name).parent.name.replace("_", " ").replace("-", " ").split()) for name in names]
    found = [name for name, _ in Counter(folders).most_common(MOST_NAMES)]
    are_words = all(len(word) > 2 for name in found for word in name.split() or [""])
    is_told = all(_WORD.fullmatch(word) for name in found for word in name.split())
    return found if len(found) >= FEWEST_NAMES and are_words and is_told else []
