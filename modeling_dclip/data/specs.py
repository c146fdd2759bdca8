"""What a setting may say, in a recipe and on the command line alike: spec strings, ranges of numbers, and options.

A spec is one line that names a source and its options. The grammar is `KIND[:FIELD...][,key=value...][@COUNT]`. A dict
literal of [`Source`] lists the kinds. A kind's fields are the positional parameters of its function, and its options
are the keyword-only ones.

A field, or the value of an option, that has `:`, `,key=` or `@7` in itself stands between double quotes:
`csv:"a:b/table.csv":"photos@2"@100`.

A spec is parsed once, into a [`Spec`]. What takes a spec takes the text or the parsed value.

A number of a setting has a [`Range`]: a field of an `*Arguments` class in its metadata (`"range"`), an option of a
source in its annotation (`Annotated[int, Range(1, 100)]`), an option of argparse as its `type` ([`Range.of_text`]).
"""

import argparse
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_origin

from transformers import HfArgumentParser

from modeling_dclip.data.failures import HelpFormatter, MistakeCollector, without_secrets
from modeling_dclip.data.files import is_utf8, match_files, printable, require_file, require_folder

_COUNT = re.compile(r"@([0-9]+)$")
_NUMBERS = {int: "an integer", int | None: "an integer", float: "a number", float | None: "a number"}
_OPTIONS = re.compile(r"((?:,[A-Za-z_]+=[^,]*)+)$")
# A path between quotes. Quotes around anything else are a part of it.
_QUOTED = re.compile(r'(?<=[:=])"([^"]*[:,@/\\][^"]*)"(?=[:,@]|$)')
_HELD = re.compile(r"\0([0-9]+)\0")  # what stands for a quoted text while a spec is taken apart
# The colons of an address do not separate fields.
_ORIGIN = re.compile(r"https?://[^/,]*")
_ARGUMENT = re.compile("^argument (-[^/:]*)[^:]*:")  # how argparse's messages name an option, with its other spellings
# Fields of a spec that name a folder; a word with an ending, or FILE, names a file, and GLOB any number of them.
_FOLDER_FIELDS = ("FOLDER", "IMAGE_FOLDER", "DIR")
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have. NaN and the infinities are in none.

    Args:
        low (`float`): The least number.
        high (`float`): The largest.
        above (`bool`, *optional*, defaults to `False`): Leave out `low` itself.
        below (`bool`, *optional*, defaults to `False`): Leave out `high` itself.
        whole (`bool`, *optional*, defaults to `False`): Integers only.
        steps (`bool`, *optional*, defaults to `False`): A number of steps: an integer, or a share of all steps, < 1.
        also (`int`, *optional*): One more number, with a meaning of its own, such as -1.

    Example:
        >>> print(Range(0, 1)), 0.5 in Range(0, 1), math.nan in Range(0, 1)
        a number from 0 to 1
        (None, True, False)
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    whole: bool = False
    steps: bool = False
    also: int | None = None

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if self.also is not None and value == self.also:
            return True
        if self.whole and not isinstance(value, int):
            return False
        if self.steps and value >= 1 and value % 1:
            return False
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        low, high = (f"{bound:.15g}" for bound in (self.low, self.high))
        text = f"{kind} from {low} to {high}"
        if self.above or self.below:
            text = f"{kind} {'above' if self.above else 'from'} {low} and {'below' if self.below else 'up to'} {high}"
        if self.steps:
            text += " (whole, or a share of all steps below 1)"
        return text if self.also is None else f"{text}, or {self.also}"

    def check(self, value: Any, name: str) -> None:
        """Refuse a value that is not in the range.

        Args:
            value: Any.
            name (`str`): What it is the value of, as the user wrote it.

        Raises:
            ValueError: Naming the setting, the range and the value.
        """
        if value not in self:
            raise ValueError(f"{name}: expected {self}, got {shown(value)}.")

    def of_text(self, text: str) -> int | float:
        """The number that a text spells: the `type` of an option of argparse.

        Raises:
            argparse.ArgumentTypeError: If it spells none, or one outside the range.
        """
        value: int | float = math.nan
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            pass
        if value not in self or not text.isascii():
            raise argparse.ArgumentTypeError(f"expected {self}, got {shown(text)}")
        return value


COUNT = Range(1, 10**9, whole=True)  # of rows, captions, pixels, steps
BATCH = Range(1, 2**20, whole=True)
SEED = Range(0, 2**32 - 1, whole=True)
PART = Range(0, 1)
WORKERS = Range(0, 256, whole=True)  # processes


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_numbers(arguments: Any, name: str = "", inherited: Mapping[str, Range] | None = None) -> None:
    """Check every number of a dataclass against the range in its field's metadata.

    Args:
        arguments: An instance of a dataclass. `None` is allowed where it is the default or of the field's type, and a
            list is checked number by number.
        name (`str`, *optional*): Its section, which goes before the field in the message: `"student."`.
        inherited (`Mapping[str, Range]`, *optional*): Ranges of fields without one in their metadata.

    Raises:
        ValueError: Naming field, range and value.
        Mistakes: If several are wrong.
    """
    found = MistakeCollector()
    for one in fields(arguments):
        allowed, value = range_of(one, inherited), getattr(arguments, one.name)
        if allowed is None or (value is None and (one.default is None or type(None) in get_args(one.type))):
            continue
        for number in value if isinstance(value, list) and callable(one.default_factory) else [value]:
            with found.collecting():
                allowed.check(number, f"{name}{one.name}")
    found.tell()


def range_of(one: Field, inherited: Mapping[str, Range] | None = None) -> Range | None:
    """The range of a field of a dataclass; `None` if it is no number."""
    return one.metadata.get("range", (inherited or {}).get(one.name))


class CommandParser(HfArgumentParser):
    """The parser of a command's options, from dataclasses or one by one. A wrong word is an error of one line.

    Options have no abbreviations. A field of a dataclass may have a range in its metadata (`"range"`, a [`Range`]):
    the parser and its help know it.

    Args:
        dataclass_types (`type` or `Sequence[type]`, *optional*): As of `HfArgumentParser`.
        **options: Of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Any = None, **options: Any):
        self.names: list[str] = []
        super().__init__(dataclass_types, **{"formatter_class": HelpFormatter, **options, "allow_abbrev": False})

    def add_argument(self, *names: str, range: Range | None = None, **options: Any) -> argparse.Action:
        """As of argparse.

        Args:
            *names (`str`): Of the option.
            range ([`Range`], *optional*): Of its numbers.
            **options: Of argparse.
        """
        if range is not None:
            options |= {"type": range.of_text, "help": f"{options.get('help', '')} Expected: {range}.".strip()}
        self.names += names
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ValueError: Always, with the option and what is wrong.
        """
        unknown = message.rpartition(": ")[2].split(" ")[0]
        near = difflib.get_close_matches(unknown, self.names, 1) if message.startswith("unrecognized") else []
        hint = f" Did you mean {near[0]}?" if near else ""
        told = _ARGUMENT.sub(r"\1:", message)
        stop = "" if told.endswith((".", "?")) else "."
        raise ValueError(f"{told}{stop}{hint} `{self.prog} --help` lists all options.")

    def parse(self, words: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses that the words of a command line fill; by default those of the process.

        Raises:
            SystemExit: After `--help`.
            ValueError: If a word is unknown, or a value of another type or outside its range.
        """
        *parsed, unknown = self.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        for one in parsed:
            if not isinstance(one, argparse.Namespace):
                check_numbers(one, "--")
        return tuple(parsed)


class Source(NamedTuple):
    """A kind of spec: how it is written (an optional field as `[:FIELD]`), and what takes its fields and options."""

    form: str
    build: Callable[..., Any]


@dataclass(frozen=True)
class Spec:
    """A spec that is taken apart. As text (`str(spec)`) it is what the user wrote.

    Attributes:
        text (`str`): As the user wrote it.
        source ([`Source`]): Its kind.
        fields (`list[str]`): What the source takes as positional arguments.
        options (`dict[str, Any]`): What the source takes as keyword arguments, as [`bind_options`] gives them.
        count (`int`, *optional*): The number after `@`.
    """

    text: str
    source: Source
    fields: list[str]
    options: dict[str, Any]
    count: int | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def split(self) -> str | None:
        """The split it names, or its source's default; `None` where the source has no splits."""
        bound = inspect.signature(self.source.build).bind(*self.fields)
        bound.apply_defaults()
        return bound.arguments.get("split")

    def check_files(self) -> None:
        """Say early that a file or folder that it names is missing. Nothing is read; an address is not asked.

        Raises:
            FileNotFoundError, ValueError: Naming the first one, as [`~modeling_dclip.data.files.require_file`].
        """
        words = [word.strip("[]") for word in self.source.form.split(":")[1:]]
        for word, path in zip(words, self.fields, strict=False):
            what = f"{word} of the spec {self.text!r}"
            if "://" in path:
                continue
            if word in _FOLDER_FIELDS:
                require_folder(path, what)
            elif "." in word or word == "FILE":
                require_file(path, what)
            elif word == "GLOB" and not match_files(path):
                raise FileNotFoundError(f"No file '{printable(path)}' (of the spec {self.text!r}). Check the path.")

    def build(self, **options: Any) -> Any:
        """Call its source with its fields and options.

        Args:
            **options: More options, over those of the spec.

        Raises:
            FileNotFoundError, ImportError, ValueError: As the source says.
        """
        return self.source.build(*self.fields, **{**self.options, **options})


def require_open_address(text: str) -> None:
    """Refuse an address that holds a password or a token: specs are written to results, records and logs.

    Args:
        text (`str`): A spec or an address. One without `http://` and `https://` passes.

    Raises:
        ValueError: If an address in it names a user, or has a `?`. The message does not repeat them.
    """
    if (shown := without_secrets(text)) != text:
        raise ValueError(
            f"Expected an address without a user name, a password and '?...', got more than {shown!r}: it would be "
            "written to results and logs. Put user and password into ~/.netrc, or copy the set to a folder."
        )


def _split_fields(body: str) -> list[str]:
    """Kind and fields of a spec; a field may be an address."""
    kind, colon, rest = body.partition(":")
    origin = _ORIGIN.match(rest)
    if origin is None:
        return body.split(":")
    first, *others = rest[origin.end() :].split(":")
    return [kind, origin[0] + first, *others]


def _require_one_reading(spec: str, fields: Sequence[str]) -> None:
    """Refuse a spec that cuts the path of something that is there."""
    parts = spec.split(":")[1:]
    runs = [":".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    cut = next((path for path in runs if path not in fields and os.path.exists(path)), None)
    if cut is not None:
        raise ValueError(
            f"Expected a spec with one meaning, got {spec!r}: '{printable(cut)}' is there, but ':', ',key=' and '@7' "
            f"end a path in a spec. Write each path between double quotes: '{spec.partition(':')[0]}:\"{cut}\"'."
        )


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def with_options_of(function: Callable[..., Any], *without: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a reader's `**options` be known as the keyword-only parameters of the function that it hands them to.

    Args:
        function (`Callable`): That function.
        without (`str`): Names of those parameters that the reader gives itself.
    """

    def describe(reader: Callable[..., Any]) -> Callable[..., Any]:
        signature, keywords = inspect.signature(reader), inspect.Parameter
        own = [one for one in signature.parameters.values() if one.kind is not keywords.VAR_KEYWORD]
        taken = [
            one
            for one in inspect.signature(function).parameters.values()
            if one.kind is keywords.KEYWORD_ONLY and one.name not in without
        ]
        reader.__signature__ = signature.replace(parameters=[*own, *taken])  # type: ignore[attr-defined]
        return reader

    return describe


def bind_options(function: Callable[..., Any], options: Mapping[str, str], spec: str) -> dict[str, Any]:
    """Match options with the keyword-only parameters of `function`, before anything is read.

    Args:
        function (`Callable`): With `**options` instead of named parameters it gets the text as it is.
        options (`Mapping[str, str]`): Texts by name. One that reads as a number or boolean becomes it, unless a `str`
            is expected.
        spec (`str`): For messages.

    Returns:
        `dict[str, Any]`: What to call `function` with.

    Raises:
        ValueError: If an option is unknown (the message lists the known ones), is no number where one is expected, or
            is outside the range that its parameter is annotated with.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    annotations = {
        parameter.name: parameter.annotation for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    known = {key: get_args(one)[0] if get_origin(one) is Annotated else one for key, one in annotations.items()}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r} in {spec!r}. Known options: {', '.join(known) or 'none'}.")
    values = {key: text if known[key] in (str, str | None) else _value(text) for key, text in options.items()}
    for key, value in values.items():
        if _is_of_another_type(value, known[key]):
            raise ValueError(
                f"Expected {_NUMBERS[known[key]]} for the option {key!r} in {spec!r}, got {shown(options[key])}."
            )
        for allowed in get_args(annotations[key])[1:] if get_origin(annotations[key]) is Annotated else ():
            allowed.check(value, f"The option {key!r} in {spec!r}")
    return values


def _is_of_another_type(value: bool | int | float | str, annotation: Any) -> bool:
    """Whether a number is expected and this is none. Other annotations are left to the function."""
    if annotation not in _NUMBERS:
        return False
    allowed = (int, float) if annotation in (float, float | None) else int
    return isinstance(value, bool) or not isinstance(value, allowed)


# What kind of spec a path without one may be of, by its ending.
_KINDS_OF_ENDINGS = {
    ".csv": ("csv",),
    ".tsv": ("csv",),
    ".json": ("json", "coco", "karpathy"),
    ".parquet": ("parquet",),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _guess_spec(spec: str, first: str, fields: Sequence[str], sources: Mapping[str, Source]) -> str:
    """A question whether a spec that begins with a path, or with a misspelled kind, was meant otherwise."""
    given = len(fields) + 1
    kinds = _KINDS_OF_ENDINGS.get(PurePath(first).suffix.lower(), ())
    if os.path.isdir(first):
        is_saved = os.path.isfile(os.path.join(first, "dataset_info.json"))
        kinds = ("disk",) if is_saved else ("imagefolder",)
        if "csv" in sources and not is_saved:
            return f" '{printable(first)}' is a folder. With a table of captions, write 'csv:TABLE.csv:{first}'."
    elif not kinds and _HUB_ID.fullmatch(first):
        kinds = ("hub",)
    known = [kind for kind in kinds if kind in sources]
    fitting = [kind for kind in known if sources[kind].form.count(":") == given] or known[:1]
    if not fitting:
        near = difflib.get_close_matches(first, sources, 1)
        return f" Did you mean {near[0] + spec[len(first) :]!r}?" if near and spec.startswith(first) else ""
    kind = fitting[0]
    names = [name for name in sources[kind].form.split(":")[1:] if not name.endswith("]")]
    lacking = "".join(f":{name}" for name in names[given:])
    options = _OPTIONS.search(spec.rpartition("@")[0] or spec) if "," in spec else None
    body = spec[: options.start()] if options else _COUNT.sub("", spec)
    separator = ",sep=tab" if first.lower().endswith(".tsv") else ""
    return f" Did you mean {f'{kind}:{body}{lacking}{separator}{spec[len(body) :]}'!r}?"


def parse_spec(spec: str | Spec, sources: Mapping[str, Source], *, counted: bool = False) -> Spec:
    """Take a spec apart.

    Args:
        spec (`str` or [`Spec`]): `KIND[:FIELD...][,key=value...][@COUNT]`. A parsed one comes back as it is.
        sources (`Mapping[str, Source]`): The kinds by name.
        counted (`bool`, *optional*, defaults to `False`): Whether `@COUNT` is allowed.

    Returns:
        [`Spec`]: The parsed value.

    Raises:
        ValueError: If the kind, the number of fields, an option or the count is wrong (the message lists the known
            forms), the path of something that is there would be cut, or an address holds a password or a token.

    Example:
        >>> parse_spec("grid:2x3", {"grid": Source("grid:ROWSxCOLUMNS", len)}).fields
        ['2x3']
        >>> parse_spec("a:https://example.org:8000/b:c", {"a": Source("a:DIR_OR_URL:SPLIT", print)}).fields
        ['https://example.org:8000/b', 'c']
        >>> parse_spec('a:"b:c@2":d', {"a": Source("a:DIR:SPLIT", print)}).fields
        ['b:c@2', 'd']
    """
    if isinstance(spec, Spec):
        return spec
    if not is_utf8(spec):
        raise ValueError(
            f"Expected names in UTF-8 in the spec '{printable(spec)}', got other bytes. Rename the file or folder."
        )
    require_open_address(spec)
    quoted = _QUOTED.findall(spec)
    places = iter(range(len(quoted)))
    body, count = _QUOTED.sub(lambda _: f"\0{next(places)}\0", spec.replace("\0", "")), None
    if counted and (match := _COUNT.search(body)):
        body = body[: match.start()]
        if len(match[1]) > len(str(COUNT.high)):
            raise ValueError(f"Expected a count up to {COUNT.high} in {shown(spec)}, got more.")
        count = int(match[1])
    options: dict[str, str] = {}
    if match := _OPTIONS.search(body):
        body = body[: match.start()]
        options = dict(part.split("=", 1) for part in match[1][1:].split(","))
    kind, *fields = [_HELD.sub(lambda held: quoted[int(held[1])], field) for field in _split_fields(body)]
    options = {key: _HELD.sub(lambda held: quoted[int(held[1])], value) for key, value in options.items()}
    forms = "; ".join(source.form + ("[@COUNT]" if counted else "") for source in sources.values())
    if kind not in sources:
        hint = _guess_spec(spec, kind, fields, sources)
        known = f"Known kinds: {', '.join(sources)}." if hint else f"Known forms: {forms}."
        raise ValueError(f"Unknown kind {kind!r} in the spec {spec!r}.{hint} {known}")
    source = sources[kind]
    if not quoted and "://" not in spec:
        _require_one_reading(spec, fields)
    most = source.form.count(":")
    fewest = most - source.form.count("[:")
    if not fewest <= len(fields) <= most or not all(fields):
        raise ValueError(
            f"Expected the form {source.form!r}, got {spec!r} with fields {fields}. A path with "
            "':', ',key=' or '@7' in it stands between double quotes."
        )
    if count == 0:
        raise ValueError(f"Expected a count of at least 1 in {spec!r}, got @0.")
    return Spec(spec, source, fields, bind_options(source.build, options, spec), count)
