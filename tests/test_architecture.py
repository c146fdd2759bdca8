"""The house's rules, read off the syntax trees: who imports whom, what ships, which names are not used."""

import ast
import re
import subprocess
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
SHIPPED_IMPORTS = {"torch", "transformers", "huggingface_hub", "numpy", "tokenizers"}
# Longest function without its docstring, most parameters without self, and most entries of a folder.
MOST_LINES, MOST_PARAMETERS, MOST_ENTRIES = 60, 9, 15
# A module under so many lines has two importers, or is a command or a package's front.
SMALL_MODULE = 150
# One format of export a file, though each is asked for in one place only; and the arguments of a script.
SMALL_ON_PURPOSE = {"hub/export/sentence_transformers.py", "hub/export/winograd.py", "evaluation/command_line.py"}
# Names that every module or metric has under the same word, by its framework's contract.
SAME_EVERYWHERE = {"logger", "main"}
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


def modules():
    """The package's modules by dotted name, and the files of the scripts that use them."""
    own = {
        ".".join(path.with_suffix("").relative_to(PACKAGE.parent).parts).removesuffix(".__init__"): path
        for path in FILES
    }
    root = PACKAGE.parent
    scripts = [root / "train.py", root / "eval.py", *sorted((root / "benchmarks").glob("*.py"))]
    return own, [*scripts, *sorted((root / "hub_cards").rglob("*.py"))]


def importers():
    """Which files import which module of the package, directly."""
    own, scripts = modules()
    found = {dotted: set() for dotted in own}
    for path in [*FILES, *scripts]:
        for module in imported_modules(path, own):
            if own[module] != path:
                found[module].add(path)
    return found


def imported_modules(path, own):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in own)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["modeling_dclip", *([node.module] if node.module else [])])
            for alias in node.names:
                if (module := f"{base}.{alias.name}" if f"{base}.{alias.name}" in own else base) in own:
                    yield module


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines_of(function):
    """Lines of a function, its docstring not counted."""
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - docstring


def parameters_of(function):
    given = function.args
    named = [one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
    return [name for name in named if name not in ("self", "cls")] + [
        one.arg for one in (given.vararg, given.kwarg) if one
    ]


def is_bound_to_a_contract(path, function):
    """Kernels and their operators pass every tensor and size; a model's `forward` has transformers' parameters."""
    return path.name.startswith("selective_scan") or (function.name == "forward" and path.name.startswith("modeling_"))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_functions_are_short_and_take_few_parameters(path):
    checked = [function for function in functions(path) if not is_bound_to_a_contract(path, function)]
    long = [f"{one.name}: {lines_of(one)} lines" for one in checked if lines_of(one) > MOST_LINES]
    wide = [f"{one.name}: {len(parameters_of(one))}" for one in checked if len(parameters_of(one)) > MOST_PARAMETERS]
    assert not long and not wide


def test_the_counts_of_lines_and_parameters_are_right():
    text = 'def f(self, a, /, b, *c, d=1, **e):\n    """One.\n\n    Two.\n    """\n    return a\n'
    (function,) = ast.parse(text).body
    assert lines_of(function) == 2 and parameters_of(function) == ["a", "b", "d", "c", "e"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_module_imports_anothers_private_name(path):
    taken = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("modeling_dclip"))
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not taken, f"{name(path)} imports {taken}: make them public, or move them"


def public_names(path):
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        else:
            names = [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []
        yield from (one for one in names if not one.startswith("_") and one not in SAME_EVERYWHERE)


def test_no_public_name_is_defined_twice():
    homes = {}
    for path in FILES:
        for public in set(public_names(path)):
            homes.setdefault(public, []).append(name(path))
    twice = {public: places for public, places in homes.items() if len(places) > 1}
    assert not twice


def test_no_folder_is_crowded():
    entries = {
        folder: [path.name for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]
        for folder in {path.parent for path in FILES} - {PACKAGE}
    }
    crowded = {str(folder): len(names) for folder, names in entries.items() if len(names) > MOST_ENTRIES}
    assert not crowded


def test_a_small_module_is_used_in_two_places_or_is_a_front():
    own, _ = modules()
    users = importers()
    lonely = [
        f"{name(path)}: {len(path.read_text().splitlines())} lines, imported by {len(users[dotted])}"
        for dotted, path in own.items()
        if path.parent != PACKAGE and path.name not in ("__init__.py", "__main__.py") and "metrics" not in path.parts
        if name(path) not in SMALL_ON_PURPOSE
        if len(path.read_text().splitlines()) < SMALL_MODULE and len(users[dotted]) < 2
    ]
    assert not lonely, f"fold them into their only importer: {lonely}"


def test_every_file_of_tests_stands_where_its_module_does():
    """`tests/data/labels/test_prompts.py` tests `data/labels/prompts.py`; an aspect may follow the module's name."""
    own = {path.relative_to(PACKAGE).with_suffix("") for path in FILES}
    own |= {path.parent for path in own if path.name == "__init__"}
    astray = []
    for folder in ("encoders", "data", "distillation", "evaluation", "hub"):
        for path in sorted((PACKAGE.parent / "tests" / folder).rglob("test_*.py")):
            stem, home = path.stem.removeprefix("test_"), path.parent.relative_to(PACKAGE.parent / "tests")
            # a package is tested inside its folder (data/captions/test_captions.py) or, where it has none, beside it
            candidates = {home / one.name for one in own if one.parent == home} | ({home} if home.name else set())
            if not any(stem == one.name or stem.startswith(f"{one.name}_") for one in candidates):
                astray.append(str(path.relative_to(PACKAGE.parent)))
    assert not astray


def test_what_every_command_reads_first_does_not_wait_for_pytorch():
    code = (
        "import sys\n"
        "sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'modeling_dclip.hub.index']\n"  # as python -m begins
        "import modeling_dclip.data.specs\n"
        "import modeling_dclip.hub.convert, modeling_dclip.hub.export, modeling_dclip.hub.index\n"
        "import modeling_dclip.hub.publish\n"
        "assert 'torch' not in sys.modules\n"
        "from modeling_dclip import DCLIPModel\n"
        "from transformers import AutoConfig\n"
        "print(DCLIPModel.__name__, AutoConfig.for_model('dmclip').model_type)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == ["DCLIPModel", "dmclip"], done.stderr
