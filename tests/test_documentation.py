"""The pages are true: files and links exist, commands parse, tables list what the code knows, Python blocks run."""

import ast
import contextlib
import csv
import fnmatch
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from modeling_dclip import DCLIPModel, DCLIPProcessor, DMCLIPVisionConfig, DMCLIPVisionModel
from modeling_dclip.data.captions import CAPTION_SOURCES
from modeling_dclip.data.labels import LABEL_SOURCES
from modeling_dclip.data.questions import QUESTION_SOURCES
from modeling_dclip.data.regions.detectors import DETECTORS
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.data.specs import parse_spec
from modeling_dclip.distillation.arguments import STAGES
from modeling_dclip.distillation.checks import check_effects
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.run import check_uncaptioned
from modeling_dclip.evaluation.benchmarks.kinds import KINDS
from modeling_dclip.evaluation.command_line import parse_arguments
from modeling_dclip.evaluation.results import render_readme
from modeling_dclip.hub.index.build import build_index

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS)
}
README, CONTRIBUTING = PAGES["README.md"], PAGES["CONTRIBUTING.md"]
FOR_USERS = "\n".join(text for page, text in PAGES.items() if page != "CONTRIBUTING.md")
OWN_FOLDERS = ("modeling_dclip", "recipes", "tests", "benchmarks", "hub_cards", "notebooks", "docs", "examples", ".ci")
# What a reader brings, or what would be downloaded, and what takes its place where README's commands are run.
STAND_INS = {
    "csv:captions.csv:photos": "csv:examples/captions.csv:examples/photos",
    "openai/clip-vit-base-patch16": "recipes/demo_anchor",
    "zero_shot=parquet:cifar10/*.parquet": "zero_shot=scenes:test,n=64",
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def spans(text):
    """Inline code, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(text):
    """Shell commands of fenced blocks, and inline ones, as words."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(text) if re.match(r"(make|python|accelerate|pip) ", span)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [words for text in PAGES.values() for words in commands(text)]


def script_of(words):
    """What a Python command runs: `train.py`, `-m package.module`, or None."""
    if "-m" in words:
        return f"-m {words[words.index('-m') + 1]}"
    return next((word for word in words if word.endswith(".py")), None)


@lru_cache
def load(script):
    """A script or module, by what follows `python`."""
    if script.startswith("-m "):
        module = importlib.import_module(script.removeprefix("-m "))
        return importlib.import_module(f"{module.__name__}.__main__") if hasattr(module, "__path__") else module
    specification = importlib.util.spec_from_file_location(f"{Path(script).stem}_script", ROOT / script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@lru_cache
def help_of(script, *subcommand):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        load(script).main([*subcommand, "--help"])
    return shown.getvalue()


SCRIPTED = [words for words in COMMANDS if script_of(words)]


def arguments(words):
    """What follows the script or module."""
    script = script_of(words).split()[-1]
    return words[words.index(script) + 1 :]


def known_flags(words):
    """The flags of a command's script and of its subcommand, if it has one."""
    subcommand = [word for word in arguments(words)[:1] if re.fullmatch(r"[a-z_]+", word)]
    script = script_of(words)
    return set(re.findall(r"--[\w.]+", help_of(script) + (help_of(script, *subcommand) if subcommand else "")))


@pytest.mark.parametrize("words", SCRIPTED, ids=" ".join)
def test_every_flag_of_a_command_is_one_the_script_knows(words):
    flags = [word.partition("=")[0] for word in arguments(words) if word.startswith("--")]
    known = known_flags(words)
    if script_of(words) == "train.py":  # TrainingArguments' own fields are too many to list
        flags = [flag for flag in flags if "." not in flag]
    assert set(flags) <= known | {"--help"}


@pytest.mark.parametrize("words", [w for w in SCRIPTED if script_of(w) == "train.py"], ids=" ".join)
def test_every_training_command_is_one_the_parser_takes(words):
    given, path = load("train.py").split_recipe([word for word in arguments(words) if word != "--help"])
    recipe = parse_recipe(given, ROOT / path)
    runs = expand_arms(recipe)
    check_effects(runs, recipe)  # whatever the command sets, something reads
    for run in runs:
        check_uncaptioned(run.recipe)
    for spec in [*recipe.run.train_datasets, *recipe.run.uncaptioned_datasets]:
        parse_spec(spec, CAPTION_SOURCES, counted=True)


@pytest.mark.parametrize("words", [w for w in SCRIPTED if script_of(w) == "eval.py" and "--model" in w], ids=" ".join)
def test_every_evaluation_command_asks_for_all_its_benchmarks(words):
    shown = [word for word in words if re.match(rf"({'|'.join(KINDS)})(=|$)", word)]
    assert shown and parse_arguments(arguments(words), "").benchmark == shown


INLINE = [(page, span) for page, text in PAGES.items() for span in spans(text) if span.startswith("--")]


def test_flags_are_shown_inline():
    assert len(INLINE) >= 40


@pytest.mark.parametrize("page, span", INLINE, ids=str)
def test_every_flag_shown_inline_is_one_that_a_command_of_its_page_knows_or_a_field(page, span):
    words = shlex.split(span)
    scripted = [command for command in commands(PAGES[page]) if script_of(command) not in (None, "train.py")]
    if words[0].partition("=")[0] not in {"--help"}.union(*map(known_flags, scripted)):
        parse_recipe(words)


def specs_shown():
    """Every spec on the page with the kinds it is of; one of `zero_shot=` is a classification set."""
    every = (CAPTION_SOURCES, DETECTORS, LABEL_SOURCES, QUESTION_SOURCES)
    forms = {source.form for kinds in every for source in kinds.values()}
    for word in [word for command in COMMANDS for word in command] + spans(FOR_USERS):
        benchmark, _, spec = (
            word.partition("=") if re.match(r"(retrieval|zero_shot|fine_grained)=", word) else ("", "", word)
        )
        kinds = {"zero_shot": LABEL_SOURCES, "fine_grained": QUESTION_SOURCES}.get(
            benchmark, DETECTORS | CAPTION_SOURCES
        )
        if spec not in forms and re.match(rf"({'|'.join(kinds)}):", spec):
            yield spec, kinds


def test_every_spec_shown_is_one_the_parser_takes():
    shown = dict(specs_shown())
    assert len(shown) >= 8
    for spec, kinds in shown.items():
        parse_spec(spec, kinds, counted=True)


@pytest.mark.parametrize(
    "page, heading, kinds",
    [
        ("docs/data.md", "## Caption datasets", CAPTION_SOURCES),
        ("docs/data.md", "## Regions", DETECTORS),
        ("docs/evaluating.md", "## Zero-shot classification", LABEL_SOURCES),
        ("docs/evaluating.md", "## Fine-grained retrieval", QUESTION_SOURCES),
    ],
)
def test_the_tables_of_specs_list_what_the_code_knows(page, heading, kinds):
    assert first_cells(page, heading) == [source.form for source in kinds.values()]


def first_cells(page, heading):
    """The code that opens each table row of a section."""
    section = PAGES[page].split(f"\n{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", section, flags=re.MULTILINE)


def test_the_table_of_benchmarks_lists_every_kind():
    assert sorted(first_cells("docs/evaluating.md", "## Benchmarks")) == sorted(KINDS)


def test_the_table_of_stages_lists_every_stage():
    assert first_cells("docs/training.md", "## Stages") == list(STAGES)


def test_the_row_of_the_scenes_lists_every_option_and_no_other():
    (row,) = re.findall(r"^\| `scenes:SPLIT` \|(.*)\|$", PAGES["docs/data.md"], flags=re.MULTILINE)
    options = row.split("options")[1]
    keywords = [p.name for p in inspect.signature(load_scenes).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert sorted(re.findall(r"`(\w+)`", options)) == sorted(keywords)


def rows_without_a_header(text):
    """Table rows that open a table but are followed by no rule: GitHub shows them as text."""
    lines = ["", *re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines(), ""]
    return [
        line
        for before, line, after in zip(lines, lines[1:], lines[2:], strict=False)
        if line.startswith("|") and not before.startswith("|") and not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+\s*", after)
    ]


def test_a_row_that_a_blank_line_cuts_off_is_seen():
    table = "| a | b |\n|---|--:|\n| 1 | 2 |\n"
    assert rows_without_a_header(f"text\n\n{table}") == []
    assert rows_without_a_header(f"{table}\n| 3 | 4 |\n") == ["| 3 | 4 |"]
    assert rows_without_a_header(f"{table}text\n| 3 | 4 |\n| 5 | 6 |\n") == ["| 3 | 4 |"]


@pytest.mark.parametrize("page", PAGES)
def test_every_table_row_has_its_header(page):
    assert rows_without_a_header(PAGES[page]) == []


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    used = {word for words in COMMANDS if words[0] == "make" for word in words[1:]}
    assert {"demo", "test", "quality", "style", "test-conformance"} <= used <= targets


def test_every_extra_that_is_asked_for_exists():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (extras,) = [
        {ast.literal_eval(key) for key in node.value.keys}
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    ]
    asked = {extra for words in COMMANDS if words[0] == "pip" for extra in re.findall(r"\[(\w+)\]", " ".join(words))}
    assert asked and asked <= extras | {"all"}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    named = [word for words in commands(PAGES[page]) for word in words] + spans(PAGES[page])
    own = [
        path for path in named if path.split("/")[0] in OWN_FOLDERS and re.fullmatch(r"[\w./-]+", path) and "/" in path
    ]
    own += [path for path in named if re.fullmatch(r"[\w-]+\.(py|md)|Makefile", path) and path != "__init__.py"]
    missing = [path for path in {*own} if not (ROOT / path).exists() and not is_sibling(path)]
    assert not missing, f"{page} names {sorted(missing)}"


def anchors(text):
    """What GitHub lets a link end in: its headings, in small letters, without punctuation, with hyphens."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", PAGES[page]):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(f"{target}#{anchor}")
    assert not broken, f"{page} links to {broken}"


def test_every_page_that_the_code_names_exists():
    folders = [ROOT / name for name in OWN_FOLDERS if name not in ("tests", "docs")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".jinja", ".yaml", ".md")
    ]
    page = re.compile(r"\b(?:docs/[\w-]+|[A-Z]{4,})\.md\b")
    named = {match for path in files for match in page.findall(path.read_text(encoding="utf-8"))}
    assert {"README.md", "docs/papers.md"} <= named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_readme_is_short_and_leads_to_every_page():
    assert README.count("\n") <= 150
    missing = [path.name for path in DOCS if f"](docs/{path.name})" not in README]
    assert not missing, f"README.md has no link to {missing}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_page_of_the_docs_starts_with_its_command(path):
    title, empty, *rest = PAGES[f"docs/{path.name}"].splitlines()
    assert title.startswith("# ") and empty == ""
    opening = rest[: rest.index("```bash")]
    assert [line for line in opening if line] == opening[:1], f"{path.name}: expected at most one line before it"


def test_no_table_of_results_calls_a_model_or_benchmark_by_a_local_path():
    for page, text in PAGES.items():
        for block in re.findall(r"^<!-- results:.*?-->\n(.*?)^<!-- /results:", text, flags=re.MULTILINE | re.DOTALL):
            assert not re.search(r"\.\./|outputs/|[ :=]/\w", block), page


def is_sibling(path):
    """A bare file name of the package, such as `dmclip.py`."""
    return "/" not in path and any((ROOT / "modeling_dclip").rglob(path))


def test_every_recipe_is_named_and_every_one_named_exists():
    named = set(re.findall(r"recipes/[\w./-]+\.yaml", FOR_USERS))
    there = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert named <= there
    rows = first_cells("docs/training.md", "## Recipes")
    left_out = [path for path in sorted(there) if not any(fnmatch.fnmatch(path, row) for row in rows)]
    assert not left_out, f"docs/training.md's table of recipes has no row for {left_out}"
    idle = [row for row in rows if not fnmatch.filter(there, row)]
    assert not idle, f"docs/training.md's table of recipes has rows for no file: {idle}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != "CONTRIBUTING.md"]
)  # that one shows the markers' form
def test_results_blocks_are_what_their_files_say(page):
    with_blocks = ("README.md", "docs/evaluating.md", "docs/models.md", "docs/reliability.md", "docs/results.md")
    assert ("<!-- results:" in PAGES[page]) == (page in with_blocks)
    assert render_readme(ROOT / page, check=True) == []


def test_the_citation_file_names_the_papers_by_their_titles():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= set(citation)
    assert f'version="{citation["version"]}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    titles = [reference["title"] for reference in citation["references"]]
    assert len(titles) == 2 and all(f'"{title}"' in PAGES["docs/papers.md"] for title in titles)
    assert all(reference["authors"] for reference in citation["references"])


@pytest.fixture(scope="module")
def substitutes(tiny_clip_dir, tmp_path_factory):
    """A folder of the student's form, a photograph, and a small CLIP, for the names on the pages."""
    folder = tmp_path_factory.mktemp("readme")
    student = folder / "student"
    DCLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(student)
    DCLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(student)
    dmclip = folder / "dmclip"
    sizes = {"stem_dim": 8, "hidden_size": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "image_size": 64}
    DMCLIPVisionModel(DMCLIPVisionConfig(**sizes)).save_pretrained(dmclip)
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "photo.jpg")
    build_index(str(tiny_clip_dir), str(folder), folder / "index")
    return {
        "my_index": folder / "index",
        "outputs/demo/leak_free/seed-0/student": student,
        "outputs/dmclip_demo/contrastive/seed-0/dmclip": dmclip,
        "photo.jpg": folder / "photo.jpg",
        "openai/clip-vit-base-patch16": tiny_clip_dir,
    }


@pytest.mark.parametrize("code", blocks(FOR_USERS, "python"), ids=lambda code: code.splitlines()[-1])
def test_every_python_block_for_users_runs(code, substitutes, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)  # README reads a committed model and picture
    for name, substitute in substitutes.items():
        code = code.replace(f'"{name}"', repr(str(substitute)))
    printed = []
    variables = {"print": lambda *values: printed.append(values)}
    exec(compile(code, "a page", "exec"), variables)
    assert printed or "encoder" in variables
    for value in (value for values in printed for value in values if isinstance(value, torch.Tensor)):
        assert torch.isfinite(value).all()
    if "the first text gets the largest share" in code:
        assert variables["shares"].argmax() == 0


@pytest.mark.parametrize("code", blocks(CONTRIBUTING, "python"))
def test_every_python_block_of_contributing_parses(code):
    assert ast.parse(code).body


def one_step(words):
    """The command on a reader's own captions with a CLIP and a detector that are here, one step a stage."""
    given, path = load("train.py").split_recipe(arguments(words))
    stages = parse_recipe(given, ROOT / path).stages
    trained = [word for stage in ("teacher", "student") if stage in stages for word in (f"--{stage}.max_steps", "1")]
    detector = ["--regions.detector", "grid:2x2"] if "regions" in stages else []
    return [*words, "--clip_model", "recipes/demo_anchor", *detector, *trained]


def test_every_command_of_the_readme_but_installing_runs_within_a_minute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    lines = [line for block in blocks(README, "bash") for line in block.replace("\\\n", " ").splitlines()]
    said = []
    for words in map(shlex.split, lines):
        if words[0] == "pip":
            continue  # tests/test_documentation.py checks its extras
        words = [STAND_INS.get(word, word).replace("outputs/", f"{tmp_path}/") for word in words]
        if "recipes/finetune.yaml" in words:
            words = one_step(words)
        if "recipes/quick_start.yaml" in words:
            words += ["--output_dir", str(tmp_path / "quick_start")]
        began = time.process_time()
        load(script_of(words)).main(arguments(words))
        assert time.process_time() - began < 60
        said.append(capsys.readouterr().out)
    assert len(said) == 6
    assert "quick_start/student is better than recipes/demo_anchor at retrieval" in said[0]
    assert len(re.findall(r"^ +\d+ +0\.\d+  (?:kitchen|workshop)/IMG_", said[2], flags=re.MULTILINE)) == 10
    written = [
        "quick_start/student",
        "quick_start/results/records.json",
        "found.html",
        "mine/student",
        "quick_start/report/report.html",
    ]
    assert not [name for name in written if not (tmp_path / name).exists()]


def test_the_pictures_of_the_examples_are_what_their_script_draws():
    folder, script = ROOT / "examples", load("examples/draw.py")
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    files = sorted(str(path.relative_to(folder / "photos")) for path in (folder / "photos").rglob("*.jpg"))
    assert files == sorted({row["image"] for row in rows}) and len(files) == script.CARDS
    assert sum(path.stat().st_size for path in folder.rglob("*.*")) < 1_000_000
    for number in range(0, script.CARDS, 30):
        name, picture, captions = script.draw_card(number)
        assert captions == [row["caption"] for row in rows if row["image"] == name]
        picture.save(encoded := io.BytesIO(), "JPEG", quality=script.QUALITY)
        drawn, stored = (np.asarray(Image.open(file), float) for file in (encoded, folder / "photos" / name))
        assert abs(drawn - stored).mean() < 1  # encoders of JPEG differ a little
