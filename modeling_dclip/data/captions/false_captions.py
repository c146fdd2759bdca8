"""False captions of an image, to learn from: those that a dataset names, and those that a rule makes of true ones.

A false caption has (almost) the words of a true one, so a model that reads captions as bags of words takes it for
true. The rules are for English. Each exchanges two things in a caption, and only where the outcome is surely another
claim:

| rule | exchanges | not where |
|---|---|---|
| `colours` | two colours: "a red car behind a blue bus" | both name the same thing, or are one ("black and white") |
| `numbers` | two numbers above one: "two dogs and three cats" | both count the same thing |
| `direction` | left and right, above and below, in front of and behind, top and bottom | no place is meant |
| `order` | what stands before and after a preposition of place: "a dog on a sofa" | it holds both ways (near, with) |

A caption that no rule fits has no false one.

Source: exchanged words as negatives: "When and Why Vision-Language Models Behave like Bags-of-Words", arXiv 2210.01936
[NegCLIP]; docs/papers.md. Deviation: rules without a parser.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset

from modeling_dclip.data.columns import Ragged, arrow_column
from modeling_dclip.data.rows import FIRST_IDS, NEGATIVES, first
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

_COLOURS = frozenset(
    "red green blue yellow orange purple pink black white brown grey gray silver golden tan beige violet turquoise "
    "maroon teal".split()
)
_NUMBERS = frozenset("two three four five six seven eight nine ten".split())
_DETERMINERS = frozenset(
    "a an one the this that these those some several many his her its their my our another each".split()
)
_SINGLE = frozenset("a an one this that another each".split())
_MANY = frozenset("these those some several many".split())
_PLURALS = frozenset("people children men women feet teeth mice sheep geese fish".split())
# What ends the phrase that a colour or a number belongs to.
_BOUNDARIES = frozenset(
    "and or but with without in on at of to from by for as near next beside behind above below under over inside "
    "outside between through across along around against into onto upon off while that which who is are was were has "
    "have holding wearing standing sitting then it its left right top bottom one".split()
)
_PLACES = (
    "to the left of", "to the right of", "in front of", "on top of", "on", "in", "under", "underneath", "beneath",
    "below", "above", "over", "behind", "inside",
)  # fmt: skip
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+")
_ARTICLE = re.compile(r"\b(a)n?(\s+)$", re.IGNORECASE)
_TOGETHER = re.compile(r"\s*(?:,|-|/|&|and|or)?\s*(?:and|or)?\s*")
# Where left and right are places: "on the left", "left side", "to the right of".
_SIDE = re.compile(
    r"(?<=\bthe )(?:left|right)\b|(?<=\bits )(?:left|right)\b|(?<=\bfrom )(?:left|right)(?= to\b)"
    r"|(?<=\bto )(?:left|right)\b|\b(?:left|right)(?=[ -](?:side|hand|corner|of)\b)"
    r"|(?<=\btop )(?:left|right)\b|(?<=\bbottom )(?:left|right)\b|(?<=\bupper )(?:left|right)\b"
    r"|(?<=\blower )(?:left|right)\b",
    re.IGNORECASE,
)
_END = re.compile(
    r"(?<=\bat the )(?:top|bottom)\b|(?<=\bfrom )(?:top|bottom)(?= to\b)|(?<= to )(?:top|bottom)\b", re.IGNORECASE
)
_BOTH_SIDES = re.compile(r"\bleft\s+(?:and|or)\s+(?:the\s+)?right\b|\bright\s+(?:and|or)\s+(?:the\s+)?left\b", re.I)
_OPPOSITES: tuple[tuple[re.Pattern[str], dict[str, str]], ...] = (
    (_SIDE, {"left": "right", "right": "left"}),
    (re.compile(r"\b(?:above|below)\b", re.I), {"above": "below", "below": "above"}),
    (re.compile(r"\bin front of\b|\bbehind\b(?= \w)", re.I), {"in front of": "behind", "behind": "in front of"}),
    (
        re.compile(
            r"(?<=\bat the )(?:top|bottom)\b|(?<=\bfrom )(?:top|bottom)(?= to\b)|(?<= to )(?:top|bottom)\b", re.I
        ),
        {"top": "bottom", "bottom": "top"},
    ),
)
_NOUN = r"(?:[^\W\d_]+(?:['-][^\W\d_]+)*)"
_PHRASE = rf"(?:{_NOUN}|\d+)(?: {_NOUN}){{1,5}}"
_ORDER = re.compile(
    rf"(?P<one>{_PHRASE}?)(?P<verb>(?: (?:is|are|was|were))?(?: (?!{_NOUN}ing\b {_NOUN}ing\b){_NOUN}ing)?)"
    rf" (?P<place>{'|'.join(_PLACES)}) (?P<other>{_PHRASE})(?P<rest>\s*[.!]?)",
    re.IGNORECASE,
)


def swap_words(caption: str) -> dict[str, str]:
    """False captions made of a true one, by the rule that made them.

    Args:
        caption (`str`): English.

    Returns:
        `dict[str, str]`: At most one of each rule; empty if no rule fits.

    Example:
        >>> swap_words("A red car behind a blue bus.")["colours"]
        'A blue car behind a red bus.'
        >>> swap_words("a black and white cat near a dog")
        {}
    """
    caption = " ".join(caption.split())
    made = {name: rule(caption) for name, rule in _RULES.items()}
    return {name: text for name, text in made.items() if text is not None and text != caption}


def _swap_kind(caption: str, is_one: Callable[[str], bool]) -> str | None:
    """Exchange the first two words of a kind that stand alone and belong to different things."""
    words = list(_WORD.finditer(caption))
    places = [i for i, word in enumerate(words) if is_one(word[0].casefold())]
    joined = {
        i
        for one, other in zip(places, places[1:], strict=False)
        if _TOGETHER.fullmatch(caption[words[one].end() : words[other].start()])
        for i in (one, other)
    }
    named = {i: _thing(caption, words, i) for i in places if i not in joined}
    for one in named:
        for other in named:
            differs = words[one][0].casefold() != words[other][0].casefold()
            if one < other and differs and named[one] and named[other] and named[one] != named[other]:
                return _exchange(caption, words[one], words[other])
    return None


def _thing(caption: str, words: Sequence[re.Match[str]], at: int) -> tuple[str, ...]:
    """The words after one that belong to it: up to a comma, a preposition or the like."""
    thing: list[str] = []
    for before, word in zip(words[at:], words[at + 1 :], strict=False):
        between = caption[before.end() : word.start()]
        if between.strip(" -") or word[0].casefold() in _BOUNDARIES | _DETERMINERS:
            break
        thing.append(word[0].casefold())
    return tuple(thing)


def _exchange(caption: str, one: re.Match[str], other: re.Match[str]) -> str:
    """The caption with two words in each other's place, with their capitals and articles as the place wants them."""
    for word, new in ((other, one[0]), (one, other[0])):  # from the end, so that places stay right
        new = new.capitalize() if word[0][:1].isupper() and word[0] != new else new.lower()
        before, article = caption[: word.start()], _ARTICLE.search(caption[: word.start()])
        if article is not None:
            before = before[: article.start()] + article[1] + ("n" if new[0] in "aeiouAEIOU" else "") + article[2]
        caption = before + new + caption[word.end() :]
    return caption


def _swap_direction(caption: str) -> str | None:
    """Exchange the words of the first pair of opposites that is there, wherever one of them stands."""
    for pattern, opposite in _OPPOSITES:
        if pattern is _SIDE and _BOTH_SIDES.search(caption):
            continue

        def turn(match: re.Match[str], opposite: dict[str, str] = opposite) -> str:
            new = opposite[match[0].casefold()]
            return new.capitalize() if match[0][0].isupper() else new

        turned, count = pattern.subn(turn, caption)
        if count:
            return turned
    return None


def _swap_order(caption: str) -> str | None:
    """Exchange what stands before and after the one preposition of place of a caption that says nothing else."""
    match = _ORDER.fullmatch(caption.strip())
    if match is None:
        return None
    one, verb = _split_verb(match["one"].split())
    other, beyond = _split_verb(match["other"].split())
    if not one or not other or beyond or (verb and match["verb"]):
        return None
    verb = verb or match["verb"].split()
    if [word.casefold() for word in one] == [word.casefold() for word in other]:
        return None
    if verb and not verb[0].endswith("ing") and not {one[0].casefold(), other[0].casefold()} <= _SINGLE:
        return None  # the verb may not fit the other
    words = [*other, *verb, match["place"], *one]
    if one[0][0].isupper():
        words[0] = words[0][0].upper() + words[0][1:]
        words[len(words) - len(one)] = one[0][0].lower() + one[0][1:]
    return " ".join(words) + match["rest"]


def _split_verb(phrase: list[str]) -> tuple[list[str], list[str]]:
    """What a phrase names, and the verb of one word that may follow: "a dog runs". Empty where that is not sure."""
    words = [word.casefold() for word in phrase]
    inner, last, verb = words[1:], words[-1], list[str]()
    many = words[0] in _NUMBERS | _MANY or words[0].isdigit()
    if words[0] not in _DETERMINERS and not many:
        return [], []
    if not many and _ends_in_s(last):
        if words[0] not in _SINGLE or len(words) < 3:
            return [], []
        phrase, verb, inner = phrase[:-1], phrase[-1:], inner[:-1]
    plural = [_ends_in_s(word) or word in _PLURALS for word in inner]
    spoiled = any(word in _BOUNDARIES | _DETERMINERS or word.endswith("ing") for word in inner)
    if spoiled or any(plural[:-1] if many else map(_ends_in_s, inner)) or (many and not plural[-1:] == [True]):
        return [], []
    return phrase, verb


def _ends_in_s(word: str) -> bool:
    return word.endswith("s") and not word.endswith(("ss", "us", "is", "'s"))


_RULES: dict[str, Callable[[str], str | None]] = {
    "colours": lambda caption: _swap_kind(caption, _COLOURS.__contains__),
    "numbers": lambda caption: _swap_kind(caption, lambda word: word in _NUMBERS or (word.isdigit() and word > "1")),
    "direction": _swap_direction,
    "order": _swap_order,
}


def collect_negatives(dataset: Dataset, kind: str, name: str) -> Ragged:
    """The false captions of every row: those of its column, or those that the rules make of its captions, or both.

    What equals a true caption of the image is left out and counted. The log says how many there are, of which rule,
    and which captions allow none.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `captions` and, unless the rules alone are asked, `negatives`.
        kind (`str`): `"column"`, `"swap"` or `"both"`.
        name (`str`): What messages call the rows, such as `"training images"`.

    Returns:
        [`~modeling_dclip.data.columns.Ragged`]: Texts, N rows.

    Raises:
        ValueError: If the column is asked for and not there, or no row has a false caption.
    """
    swaps, reads_column = kind != "column", kind != "swap"
    if reads_column and NEGATIVES not in dataset.column_names:
        raise ValueError(
            f"hard_negatives: expected a column of false captions of the {name}, got none. Name it in the spec with "
            "',negatives=COLUMN', or make false captions of the true ones with hard_negatives: swap."
        )
    ids, captions = dataset["image_id"][:], arrow_column(dataset, "captions").to_pylist()
    given = arrow_column(dataset, NEGATIVES).to_pylist() if reads_column else [[] for _ in ids]
    rows, equal, by_rule, without = [], 0, Counter[str](), []
    for image_id, true, false in zip(ids, captions, given, strict=True):
        found = list(false or ())
        for caption in true or () if swaps else ():
            made = swap_words(caption)
            by_rule.update(list(made))
            found += made.values()
            without += [] if made else [image_id]
        known = {" ".join(text.casefold().split()) for text in true or ()}
        kept = [text for text in dict.fromkeys(found) if " ".join(text.casefold().split()) not in known]
        equal += len(set(found)) - len(kept)
        rows.append(kept)
    total = sum(map(len, rows))
    if not total:
        raise ValueError(
            f"hard_negatives: expected a false caption of some of the {len(ids):,} {name}, got none."
            + (" No caption of them allows one by rule; the rules are for English." if swaps else "")
        )
    told = f"hard negatives: {count_of(total, 'false caption')}, of {sum(map(bool, rows)):,} of {len(ids):,} {name}"
    if swaps:
        told += f"; by rule {', '.join(f'{rule} {count:,}' for rule, count in sorted(by_rule.items()))}"
    logger.info(told)
    if without:
        shown = first(dict.fromkeys(without))
        logger.info(
            "hard negatives: %s of these images allow none by rule, of %s%s",
            *(count_of(len(without), "caption"), shown, ", ..." if len(set(without)) > FIRST_IDS else ""),
        )
    if equal:
        logger.warning("hard negatives: left out %s that an image has as a true one", count_of(equal, "false caption"))
    texts = np.array([text for row in rows for text in row], dtype=object)
    return Ragged.from_lengths(texts, np.array([len(row) for row in rows]))
