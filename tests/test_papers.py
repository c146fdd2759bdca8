"""docs/papers.md is true: every place that it names exists, every value that it quotes is the one that runs."""

import ast
import re
from pathlib import Path

import pytest

from modeling_dclip.distillation.recipes import parse_recipe

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
ADDRESS = re.compile(r"`([\w./-]+\.py):([\w.]+)`")
SOURCE_LINE = re.compile(r"docs/papers\.md, ([^.;`\n]+)\.")
NOTHING = object()


def tables(text):
    """Every table as `(header, rows)`, cells stripped."""
    found, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))])
        elif current:
            found.append((current[0], current[2:]))
            current = []
    return found


def rows_of(*header):
    """Rows of all tables with these first columns, as dicts."""
    return [
        dict(zip(names, row, strict=True))
        for names, rows in tables(TEXT)
        if tuple(names[: len(header)]) == header
        for row in rows
    ]


def unquote(cell):
    return cell.strip("`")


def defaults(function):
    """Names of a function's parameters with their default's node, `NOTHING` where there is none."""
    positional = [*function.args.posonlyargs, *function.args.args]
    missing = [NOTHING] * (len(positional) - len(function.args.defaults))
    pairs = list(zip(positional, [*missing, *function.args.defaults], strict=True))
    pairs += zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {argument.arg: default for argument, default in pairs if argument.arg != "self"}


def members(node):
    """What a dotted name may go on with: of a module or class its definitions, of a class also its constructor's
    parameters, of a function its parameters."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return defaults(node)
    found = {}
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            found[child.name] = child
            if child.name == "__init__":
                found |= defaults(child)
        elif isinstance(child, ast.AnnAssign):
            found[child.target.id] = child.value
        elif isinstance(child, ast.Assign):
            found |= {target.id: child.value for target in child.targets if isinstance(target, ast.Name)}
    return found


def resolve(file, symbol):
    """The syntax node behind `file:symbol`, or a `LookupError` that says where the path ends."""
    path = ROOT / file
    if not path.is_file():
        raise LookupError(f"{file} does not exist")
    node = ast.parse(path.read_text(encoding="utf-8"))
    for part in symbol.split("."):
        known = members(node)
        if part not in known:
            raise LookupError(f"{file} has no {symbol}: no {part!r} among {sorted(known)}")
        node = known[part]
    return node


ADDRESSES = sorted(set(ADDRESS.findall(TEXT)))
DEFAULTS = rows_of("symbol", "value", "source")
RECIPE_VALUES = rows_of("recipe", "field", "value", "source")


def test_the_page_names_places_and_values():
    assert len(ADDRESSES) > 90 and len(DEFAULTS) > 10


@pytest.mark.parametrize("file, symbol", ADDRESSES, ids=str)
def test_every_place_exists(file, symbol):
    assert resolve(file, symbol) is not None


def test_a_wrong_place_is_noticed():
    with pytest.raises(LookupError, match="no 'text_part'"):
        resolve("modeling_dclip/configuration_dclip_teacher.py", "DCLIPTeacherConfig.text_part")
    with pytest.raises(LookupError, match="does not exist"):
        resolve("modeling_dclip/nowhere.py", "DCLIPTeacher")


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: unquote(row["symbol"]))
def test_every_quoted_default_is_the_codes(row):
    node = resolve(*unquote(row["symbol"]).split(":"))
    assert isinstance(node, ast.AST), f"{row['symbol']} has no default"
    assert ast.literal_eval(node) == ast.literal_eval(unquote(row["value"]))


@pytest.mark.parametrize("row", RECIPE_VALUES, ids=lambda row: f"{unquote(row['recipe'])}:{unquote(row['field'])}")
def test_every_quoted_recipe_value_is_what_the_recipe_runs_with(row):
    value = parse_recipe([], ROOT / unquote(row["recipe"]))
    for name in ["run", *unquote(row["field"]).split(".")][-2:]:
        value = getattr(value, name)
    assert value == ast.literal_eval(unquote(row["value"]))


def test_every_row_is_one_short_claim():
    long = [(row[0], len(cell)) for _, rows in tables(TEXT) for row in rows for cell in row if len(cell) > 300]
    assert not long, f"expected at most 300 characters a cell, got {long}"
    points = [row["point"] for row in rows_of("point")]
    assert len(points) > 90 and len(points) == len(set(points))


def test_every_claim_has_a_place_in_the_code():
    missing = [row["point"] for row in rows_of("point") if not ADDRESS.search(row["where"])]
    assert not missing, f"expected `file:symbol` in the column 'where' of {missing}"


def test_every_row_names_a_source_that_is_defined():
    (keys,) = [{row[0] for row in rows} for header, rows in tables(TEXT) if header == ["key", "what"]]
    for header, rows in tables(TEXT):
        if "source" not in header:
            continue
        for row in rows:
            named = set(re.findall(r"\[\w+\]", row[header.index("source")]))
            assert named and named <= keys, f"row {row[0]!r}: expected keys of {sorted(keys)}, got {sorted(named)}"


def topics():
    """What a docstring may point at: headings, and the points of tables."""
    headings = re.findall(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    points = [row["point"] for row in rows_of("point")]
    return {re.sub(r"[`*]", "", topic).lower() for topic in [*headings, *points]}


def test_every_docstring_that_points_here_points_at_a_row_or_heading():
    pointers = [
        (path.name, match)
        for path in sorted((ROOT / "modeling_dclip").rglob("*.py"))
        for match in SOURCE_LINE.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(pointers) > 20
    missing = [(name, topic) for name, topic in pointers if topic.strip().lower() not in topics()]
    assert not missing, f"docs/papers.md has no row or heading for {missing}"
