"""The house's rules, read off the syntax trees: who imports whom, what ships, which names are not used."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "modeling_dclip"
FILES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
# What a folder may import from this package; "" is the root. Scripts join everything and are not listed.
ARROWS = {
    "": {""},
    "encoders": {"", "encoders"},
    "data": {"", "encoders", "data"},
    "distillation": {"", "encoders", "data", "distillation"},
    "evaluation": {"", "encoders", "data", "evaluation"},
    "hub": {"", "encoders", "data", "evaluation", "hub"},
}
# Of what ships: torch, transformers, and what transformers itself cannot be installed without.
SHIPPED_IMPORTS = {"torch", "transformers", "huggingface_hub", "numpy"}
FORBIDDEN_STEMS = {"utils", "helpers", "misc", "common", "tools", "legacy", "v2"}


def name(path):
    return str(path.relative_to(PACKAGE))


def tree(path):
    return ast.parse(path.read_text())


def folder(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def package_imports(path):
    """Modules of this package that a file imports, dotted and relative to the package's root."""
    package = ["modeling_dclip", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from ..data import captions` names a module by its second half
            found += [
                f"{module}.{alias.name}" if (PACKAGE.parent / module.replace(".", "/")).is_dir() else module
                for alias in node.names
            ]
    return [
        module.removeprefix("modeling_dclip").removeprefix(".")
        for module in found
        if module.startswith("modeling_dclip")
    ]


def is_allowed(module, allowed):
    home = module.split(".")[0] if (PACKAGE / module.split(".")[0]).is_dir() else ""
    return home in allowed or any(module == dotted or module.startswith(f"{dotted}.") for dotted in allowed if dotted)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_downward(path):
    allowed = ARROWS[folder(path)]
    wrong = [module for module in package_imports(path) if not is_allowed(module, allowed)]
    assert not wrong, f"{name(path)} imports {wrong}; its folder may import {sorted(allowed)}"


def test_the_walk_sees_a_wrong_arrow():
    assert not is_allowed("evaluation.retrieval", ARROWS["distillation"])
    assert not is_allowed("data.captions", ARROWS[""])
    assert not is_allowed("distillation.trainer", ARROWS["hub"]) and is_allowed("evaluation.results", ARROWS["hub"])
    assert is_allowed("configuration_dclip", ARROWS["hub"])


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_shipped_file_imports_only_what_every_reader_has(path):
    module = tree(path)
    optional = {
        child
        for node in ast.walk(module)
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(handler.type) for handler in node.handlers)
        for child in ast.walk(node)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module.split(".")[0]]
        else:
            continue
        known = SHIPPED_IMPORTS | set(sys.stdlib_module_names)
        assert node in optional or set(modules) <= known, f"{name(path)}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_shipped_file_names_its_siblings_as_the_hubs_scanner_reads_them(path):
    # The scanner is a regular expression: it must find exactly the relative imports the syntax tree has.
    scanned = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), flags=re.MULTILINE))
    parsed = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            parsed.add(node.module)
    assert scanned == parsed
    assert all((PACKAGE / f"{module}.py").exists() for module in parsed)


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_shipped_file_opens_nothing_prints_nothing_and_keeps_its_annotations(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("open", "print", "torch.load"), ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__", "strict configs need real annotations"


def test_every_command_ends_through_one_door():
    scripts = [PACKAGE.parent / "train.py", PACKAGE.parent / "eval.py", *PACKAGE.parent.glob("hub_cards/*/*.py")]
    commands = [
        path
        for path in (*FILES, *scripts, *sorted(PACKAGE.parent.glob("benchmarks/*.py")))
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree(path).body)
    ]
    assert len(commands) >= 11
    for path in commands:
        (main,) = [node for node in tree(path).body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        assert "command" in map(ast.unparse, main.decorator_list), f"{path}: decorate main with failures.command"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_has_a_name_that_says_nothing(path):
    assert path.stem not in FORBIDDEN_STEMS and not FORBIDDEN_STEMS & set(path.stem.split("_"))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_smell_of_the_list(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException")
        if isinstance(node, ast.Assert):
            raise AssertionError(f"{name(path)}:{node.lineno}: an assert vanishes under python -O; raise instead")
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert not function.endswith(".cuda"), f"{name(path)}:{node.lineno}"
            if function == "torch.load":
                safe = [ast.unparse(keyword) for keyword in node.keywords if keyword.arg == "weights_only"]
                assert safe == ["weights_only=True"], f"{name(path)}:{node.lineno}: pickles run code"
            if function.endswith("load_state_dict"):
                loose = [keyword for keyword in node.keywords if keyword.arg == "strict"]
                assert not loose, f"{name(path)}:{node.lineno}: load whole, or say which keys may differ"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_modules_and_public_things_say_what_they_are(path):
    module = tree(path)
    if path.name == "__init__.py" and not module.body:
        return
    assert ast.get_docstring(module), f"{name(path)} has no docstring"
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Kwargs"):
                continue
            assert ast.get_docstring(node), f"{name(path)}: {node.name} has no docstring"
