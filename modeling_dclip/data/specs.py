"""Spec strings: one line names a source and its options, in a recipe and on the command line alike.

The grammar is `KIND[:FIELD...][,key=value...][@COUNT]`. A dict literal of [`Source`] lists the kinds. A kind's fields
are the positional parameters of its function, and its options are the keyword-only ones.

A spec is parsed once, into a [`Spec`]. What takes a spec takes the text or the parsed value.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from modeling_dclip.data.failures import without_secrets

_COUNT = re.compile(r"@(\d+)$")
_NUMBERS = {int: "an integer", int | None: "an integer", float: "a number", float | None: "a number"}
_OPTIONS = re.compile(r"((?:,[A-Za-z_]+=[^,]*)+)$")
# The colons of an address do not separate fields.
_ORIGIN = re.compile(r"https?://[^/,]*")


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


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


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
        ValueError: If an option is unknown (the message lists the known ones) or is no number where one is expected.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    known = {
        parameter.name: parameter.annotation for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r} in {spec!r}. Known options: {', '.join(known) or 'none'}.")
    values = {key: text if known[key] in (str, str | None) else _value(text) for key, text in options.items()}
    for key, value in values.items():
        if _is_of_another_type(value, known[key]):
            raise ValueError(
                f"Expected {_NUMBERS[known[key]]} for the option {key!r} in {spec!r}, got {options[key]!r}."
            )
    return values


def _is_of_another_type(value: bool | int | float | str, annotation: Any) -> bool:
    """Whether a number is expected and this is none. Other annotations are left to the function."""
    if annotation not in _NUMBERS:
        return False
    allowed = (int, float) if annotation in (float, float | None) else int
    return isinstance(value, bool) or not isinstance(value, allowed)


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
            forms), or an address holds a password or a token.

    Example:
        >>> parse_spec("grid:2x3", {"grid": Source("grid:ROWSxCOLUMNS", len)}).fields
        ['2x3']
        >>> parse_spec("a:https://example.org:8000/b:c", {"a": Source("a:DIR_OR_URL:SPLIT", print)}).fields
        ['https://example.org:8000/b', 'c']
    """
    if isinstance(spec, Spec):
        return spec
    require_open_address(spec)
    body, count = spec, None
    if counted and (match := _COUNT.search(spec)):
        body, count = spec[: match.start()], int(match[1])
    options: dict[str, str] = {}
    if match := _OPTIONS.search(body):
        body = body[: match.start()]
        options = dict(part.split("=", 1) for part in match[1][1:].split(","))
    kind, *fields = _split_fields(body)
    forms = "; ".join(source.form + ("[@COUNT]" if counted else "") for source in sources.values())
    if kind not in sources:
        raise ValueError(f"Unknown kind {kind!r} in the spec {spec!r}. Known forms: {forms}.")
    source = sources[kind]
    most = source.form.count(":")
    fewest = most - source.form.count("[:")
    if not fewest <= len(fields) <= most or not all(fields):
        raise ValueError(
            f"Expected the form {source.form!r}, got {spec!r} with fields {fields}. Known forms: {forms}."
        )
    if count == 0:
        raise ValueError(f"Expected a count of at least 1 in {spec!r}, got @0.")
    return Spec(spec, source, fields, bind_options(source.build, options, spec), count)
