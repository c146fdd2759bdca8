"""Recipes: a YAML file and a command line, parsed once into a [`Recipe`]. Those of arms and seeds are derived from it.

    output_dir: outputs/mine
    clip_model: dclip-vitb16
    train_datasets: ["karpathy:dataset_coco.json:images:train@50000"]
    student:
      learning_rate: 1e-6

The command line (`--output_dir other --student.learning_rate 2e-6`) overrides an arm's fields, which override the
file's, which override those of its `base: other.yaml`. A value has the same form in all of them. An unknown key is an
error that names the nearest known one. `null` and an empty list in a file leave a field as it is. The word `none`
unsets a field whose default is nothing.
"""

import argparse
import copy
import difflib
import functools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from modeling_dclip.data.failures import MistakeCollector, Mistakes, command
from modeling_dclip.data.files import check_name, entry_names, read_yaml, write_text
from modeling_dclip.data.specs import CommandParser, range_of, shown
from modeling_dclip.distillation.arguments import (
    INHERITED_RANGES,
    SECTIONS,
    STAGES,
    TRAINING_SECTIONS,
    AnchorArguments,
    DMCLIPArguments,
    RegionsArguments,
    ReinforceArguments,
    RunArguments,
    StageTrainingArguments,
    StudentArguments,
    TargetsArguments,
    TeacherArguments,
    as_plain,
    default_of,
)

GLOBAL = "global fields"
_KINDS = {GLOBAL: RunArguments, **SECTIONS}
# A training section's fields that the run sets for all stages at once.
_SET_BY_RUN = ("output_dir",)
_UNSET = object()  # in place of a value: the field goes back to its default
# The stages that see images without captions, or decide what the student learns from them.
_UNCAPTIONED_STAGES = {"regions", "teacher", "targets", "student"}

Words = dict[str, dict[str, list[str]]]  # by section and field: a value as text, one word or several
Values = dict[str, dict[str, Any]]  # by section and field: a typed value


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe.

    Args:
        run ([`RunArguments`]): The global fields.
        anchor, regions, teacher, targets, student, reinforce, dmclip: The sections.
        path (`str` or `None`): The file it came from.
        values (`dict[str, dict[str, Any]]`): What the file and the command line set: section -> field -> typed value.
            The global fields are the section `"global fields"`.
        on_line (`frozenset[tuple[str, str]]`): Section and field of each value on the command line. No arm overrides
            them.
        own_cache (`bool`): Whether `cache_dir`, if set, was named, and not derived for the runs of an experiment.
    """

    run: RunArguments
    anchor: AnchorArguments
    regions: RegionsArguments
    teacher: TeacherArguments
    targets: TargetsArguments
    student: StudentArguments
    reinforce: ReinforceArguments
    dmclip: DMCLIPArguments
    path: str | None
    values: Values
    on_line: frozenset[tuple[str, str]] = frozenset()
    own_cache: bool = True

    @property
    def named(self) -> frozenset[str]:
        """The sections that the file, the arm or the command line sets a field of."""
        return frozenset(name for name in SECTIONS if self.values[name])

    @property
    def trains_dmclip(self) -> bool:
        """Whether the recipe trains a DM-CLIP, in place of a teacher and a student."""
        return "dmclip" in self.named

    @property
    def makes_anchor(self) -> bool:
        """Whether the run pretrains the CLIP that it starts from."""
        return self.run.clip_model is None and (not self.trains_dmclip or "anchor" in self.named)

    @property
    def uses_detector(self) -> bool:
        """Whether a detector looks at the images, for the teacher."""
        return self.regions.detector is not None and self.student.reads_teacher

    @property
    def stages(self) -> list[str]:
        """The stages to run, in order: those that `run.stages` asks for, else all that the recipe needs."""
        distils = not self.trains_dmclip
        needed = {
            "anchor": self.makes_anchor,
            "regions": distils and self.uses_detector,
            "teacher": distils and self.student.reads_teacher and self.run.teacher_model is None,
            "targets": distils,
            "student": distils,
            "reinforce": self.trains_dmclip and self.dmclip.train_shards is None,
            "dmclip": self.trains_dmclip,
        }
        return [name for name in STAGES if (name in self.run.stages if self.run.stages else needed[name])]

    @property
    def starts(self) -> list[str]:
        """The models that the recipe names to start from or to be taught by: folders, Hub ids or presets."""
        if self.trains_dmclip:
            named = [self.dmclip.model, self.dmclip.vision_model, self.dmclip.text_model]
            if "reinforce" in self.stages:
                named += self.reinforce.teachers or [self.run.clip_model]
        else:
            named = [self.run.clip_model, self.run.teacher_model if self.student.reads_teacher else None]
            named += [self.anchor.vision_model, self.anchor.text_model] if self.makes_anchor else []
        return [name for name in dict.fromkeys(named) if name is not None]

    def resolved(self, *sections: str) -> dict[str, Any]:
        """The global fields and these sections as plain values, to be saved beside weights."""
        return {
            "recipe": self.path,
            **as_plain(self.run),
            **{name: as_plain(getattr(self, name)) for name in sections},
        }


@dataclass(frozen=True)
class ArmRun:
    """One run of an experiment.

    Args:
        arm (`str`): The arm's name.
        seed (`int`): The run's seed.
        recipe ([`Recipe`]): Complete, with an output folder of its own.
    """

    arm: str
    seed: int
    recipe: Recipe


def parse_recipe(words: Sequence[str], path: str | Path | None = None) -> Recipe:
    """Parse a recipe file and the command line that overrides it.

    Args:
        words (`Sequence[str]`): `--FIELD VALUE ...` and `--SECTION.FIELD VALUE ...`.
        path (`str` or `Path`, *optional*): The recipe file.

    Returns:
        [`Recipe`]

    Raises:
        FileNotFoundError: If the file or its base is missing.
        ValueError: If a key is unknown (the message names the nearest) or a value is not of its type or range.

    Example:
        >>> parse_recipe(["--seed", "3", "--student.learning_rate", "2e-6"]).student.learning_rate
        2e-06
    """
    from_file = _by_section([] if path is None else _read_mapping(read_recipe_file(path)))
    from_line = _by_section(_read_line(words), lambda: _sections_that_run(from_file))
    given, found = dict[str, dict[str, Any]](), MistakeCollector()
    for name in _KINDS:
        with found.collecting():
            given[name] = _type_values(name, {**from_file[name], **from_line[name]})
    found.tell()
    on_line = frozenset((name, field) for name in _KINDS for field in from_line[name])
    return _build(_merge(given), None if path is None else str(path), on_line)


def expand_arms(recipe: Recipe) -> list[ArmRun]:
    """Every run that a recipe with `arms` or `seeds` asks for, in order; one run if it has neither.

    An arm's fields override the file's, the command line overrides both. The runs share the cache, the shards of
    `reinforce` and, without a `clip_model`, the anchor in `OUTPUT_DIR/anchor` (see [`shared_anchor`]).

    Args:
        recipe ([`Recipe`]): From [`parse_recipe`].

    Returns:
        `list[ArmRun]`

    Raises:
        ValueError: If an arm has an unknown key or a wrong value, its name cannot be a folder's, or
            [`check_reference`], [`check_adapters`], [`check_uncaptioned_fields`], [`check_test_part`] or
            [`check_same_test_part`] refuses a recipe.
    """
    check_reference(recipe)
    check_adapters(recipe)
    check_test_part(recipe)
    run = recipe.run
    if not run.variants and not run.seeds:
        return [ArmRun("student", run.seed, recipe)]
    shards = {"reinforce": {"folder": recipe.reinforce.folder or f"{run.output_dir}/reinforce"}}
    shared = {
        "clip_model": run.clip_model or f"{run.output_dir}/anchor",
        "cache_dir": run.cache_dir or f"{run.output_dir}/cache",
    }
    runs = []
    for arm, overrides in (run.variants or {"student": {}}).items():
        check_name(arm, "an arm")  # of a folder
        given = _arm_values(recipe, overrides)
        for seed in run.seeds or [run.seed]:
            own = {GLOBAL: {**shared, "seed": seed, "output_dir": f"{run.output_dir}/{arm}/seed-{seed}"}}
            one = _build(_merge(recipe.values, shards, given, own), recipe.path, recipe.on_line)
            one = replace(one, own_cache=run.cache_dir is not None)
            check_uncaptioned_fields(one)
            check_adapters(one)
            check_same_test_part(recipe, one, arm)
            runs.append(ArmRun(arm, seed, one))
    return runs


def shared_anchor(recipe: Recipe) -> Recipe | None:
    """The recipe of the one stage that all runs of [`expand_arms`] share: the anchor. `None` if they need none.

    Args:
        recipe ([`Recipe`]): From [`parse_recipe`].

    Returns:
        [`Recipe`] or `None`: With the stage `anchor` alone.
    """
    if not recipe.makes_anchor or not (recipe.run.variants or recipe.run.seeds):
        return None
    return replace(recipe, run=replace(recipe.run, stages=["anchor"]))


def read_recipe_file(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file as a mapping, over its `base` recipes.

    Args:
        path (`str` or `Path`): A YAML file. Its `base` is a path relative to it.
        above (`tuple[Path, ...]`, *optional*): The recipes that name it as their base, the first one first.

    Returns:
        `dict[str, Any]`: Fields, and sections as mappings of fields.

    Raises:
        FileNotFoundError: If the file or a base is missing.
        ValueError: If a file is no YAML mapping, or is its own base.
    """
    path = Path(path)
    names = f" (the base of '{above[-1]}')" if above else ""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, entry_names(path.parent) if path.parent.is_dir() else [], 1)
        hint = f" Did you mean '{path.parent / near[0]}'?" if near and not path.is_dir() else ""
        what = ", which is a folder." if path.is_dir() else "."
        raise FileNotFoundError(f"No recipe at '{path}'{names}{what}{hint}")
    if path.resolve() in (one.resolve() for one in above):
        raise ValueError(
            f"The recipe '{path}': expected a base that ends, got a circle: {', '.join(map(str, above))}."
        )
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe '{path}': expected fields and sections as `name: value`, got {recipe!r:.80}.")
    base = recipe.pop("base", None)
    if base is None:
        return recipe
    if not isinstance(base, str):
        raise ValueError(f"The recipe '{path}': expected a file under 'base', got {shown(base)}.")
    merged = read_recipe_file(path.parent / base, (*above, path))
    for name, value in recipe.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def _read_mapping(recipe: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each key of a recipe's mapping, `FIELD` or `SECTION.FIELD`, with its value as words."""
    for name, value in recipe.items():
        if name in SECTIONS and not isinstance(value, dict):
            raise ValueError(f"Recipe section {name!r}: expected fields as `name: value`, got {value!r:.80}.")
        section = name if name in SECTIONS else GLOBAL
        for field, entry in (value if name in SECTIONS else {name: value}).items():
            key = f"{name}.{field}" if name in SECTIONS else str(field)
            if entry is not None and entry != []:
                yield key, _as_words(entry, key, _forms(section).get(field, {list, dict}))


def _as_words(entry: Any, key: str, forms: set[Any]) -> list[str]:
    """The words of a value of a recipe file, whose form the field must know."""
    for form, what in ((list, "a list"), (dict, "a mapping")):
        if isinstance(entry, form) and form not in forms:
            raise ValueError(f"{key}: expected one value, got {what}: {shown(entry)}.")
    items = entry if isinstance(entry, list) else [entry]
    if isinstance(entry, list) and (odd := [one for one in items if one is None or isinstance(one, (list, dict))]):
        raise ValueError(f"{key}: expected a list of single values, got {shown(odd[0])} in it.")
    # of JSON's other types, such as dates, the text is taken
    return [json.dumps(one, default=str) if isinstance(one, (dict, bool)) else str(one) for one in items]


def _read_line(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each key of a command line, `FIELD` or `SECTION.FIELD`, with the words of its value."""
    given: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given.append((key, [value] if equals else []))
        elif not given:
            raise ValueError(f"Expected --FIELD before {word!r}.")
        else:
            given[-1][1].append(word)
    return given


def _sections_that_run(words: Words) -> list[str]:
    """The sections whose stages a recipe file runs, the one that people set last; all if the file cannot be parsed."""
    try:
        stages = _build(_merge({name: _type_values(name, words[name]) for name in _KINDS}), None, frozenset()).stages
    except (ValueError, ImportError):  # told when the recipe itself is built
        stages = list(STAGES)
    return sorted(stages, key=lambda name: (name in ("student", "dmclip"), name == "student"))


def _by_section(
    given: Iterable[tuple[str, list[str]]], sections_that_run: Callable[[], Sequence[str]] = lambda: STAGES
) -> Words:
    """Values by section and field, names checked. `no_FIELD` is FIELD with the value false. The last value counts."""
    words: Words = {name: {} for name in _KINDS}
    for key, value in given:
        prefix, dot, rest = key.replace("-", "_").partition(".")
        section, field = (prefix, rest) if dot else (GLOBAL, prefix)
        if section not in _KINDS:
            raise ValueError(f"Unknown recipe section {section!r} in '--{key}'. Sections: {', '.join(SECTIONS)}.")
        switch = field.removeprefix("no_")
        if switch != field and any(f.name == switch and f.default is True for f in fields(_KINDS[section])):
            if value:
                raise ValueError(f"Recipe, {section}: expected no value for {field!r}, got {' '.join(value)!r}.")
            field, value = switch, ["false"]
        _check_name(section, field, sections_that_run)
        words[section][field] = value
    return words


def _field_names(kind: type) -> list[str]:
    return [f.name for f in fields(kind) if f.init]


def _check_name(section: str, name: str, sections_that_run: Callable[[], Sequence[str]]) -> None:
    """Refuse a field that a section lacks; what is suggested instead is read by a stage that runs."""
    if section in TRAINING_SECTIONS and name in _SET_BY_RUN:
        raise ValueError(
            f"Recipe, {section}: {name!r} is set for all stages at once; set the global {name!r} instead."
        )
    known = _field_names(_KINDS[section])
    if name in known:
        return
    where, hint = ("" if section == GLOBAL else f"{section}."), ""
    running = sections_that_run()
    keys = {field: where + field for field in known}
    if section == GLOBAL:  # a field of a section, without the section's name
        keys = {field: f"{one}.{field}" for one in running for field in _field_names(SECTIONS[one])} | keys
        keys |= {one: one for one in SECTIONS}
    if nearest := difflib.get_close_matches(name, keys, n=1):
        hint = f" Did you mean {keys[nearest[0]]!r}?"
    homes = [one for one, kind in SECTIONS.items() if name in _field_names(kind)]
    read = homes if section != GLOBAL else [one for one in running if one in homes]
    if read:
        example = "student" if "student" in read else read[-1]
        hint = f" It is a field of {', '.join(read)}: write for example {example}.{name}."
    elif homes:
        hint = f" It is a field of {', '.join(homes)}, whose stages do not run here: {', '.join(running)} run."
    raise ValueError(f"Unknown recipe key {where + name!r}.{hint} `train.py --help` lists all.")


class _Parser(CommandParser):
    """Turns the words of one section into typed values. An error is raised, and names the section."""

    def __init__(self, section: str):
        self.section = section
        kind = _KINDS[section]
        self.ranges = {f"--{f.name}": range_of(f, INHERITED_RANGES) for f in fields(kind)}
        super().__init__(kind, add_help=False, prog=section, usage=section)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As of [`CommandParser`]; a field that is inherited from transformers has its range too."""
        return super().add_argument(*names, **{**options, "range": self.ranges.get(names[0])})

    def error(self, message: str) -> NoReturn:
        """Refuse a value.

        Raises:
            ValueError: Always, with section and field.
        """
        where = "" if self.section == GLOBAL else f"{self.section}."
        raise ValueError(re.sub("^argument --([^/:]+)[^:]*:", rf"{where}\1:", message) + ".")


_parser_of = functools.cache(_Parser)


@functools.cache
def _forms(section: str) -> dict[str, set[Any]]:
    """What a field takes besides one word: `list`, `dict` and `bool`, by the types in its annotation."""
    hints = _hints(_KINDS[section])
    kinds = {name: {get_origin(one) or one for one in (hint, *get_args(hint))} for name, hint in hints.items()}
    return {name: found & {list, dict, bool} for name, found in kinds.items()}


def _type_values(section: str, words: Mapping[str, list[str]]) -> dict[str, Any]:
    """The words of a section's fields as values of the fields' types.

    The one word `none` unsets a field whose default is `None`, a number, an empty list or an empty mapping.
    """
    defaults = {f.name: default_of(f) for f in fields(_KINDS[section])}
    nothing = {name for name, value in defaults.items() if value in (None, [], "{}") or type(value) in (int, float)}
    values = {field: _UNSET for field, value in words.items() if field in nothing and value == ["none"]}
    where = "" if section == GLOBAL else f"{section}."
    for field, value in words.items():
        forms = _forms(section)[field]
        if list not in forms and (len(value) > 1 or (not value and bool not in forms)):
            raise ValueError(f"{where}{field}: expected one value, got {shown(value) if value else 'none'}.")
    typed = []
    for field, value in words.items():
        if field not in values:  # after =, a word may begin with -
            typed += [f"--{field}={value[0]}"] if len(value) == 1 else [f"--{field}", *value]
    try:
        parsed = _parser_of(section).parse_args(typed)
    except ValueError:
        if len(words) < 2:
            raise
        found = MistakeCollector()  # the parser tells of the first one
        for field, value in words.items():
            with found.collecting():
                _type_values(section, {field: value})
        found.tell()
        raise
    return {field: values.get(field, getattr(parsed, field)) for field in words}


def _arm_values(recipe: Recipe, overrides: Mapping[str, Any]) -> Values:
    """An arm's fields, without those that the command line sets."""
    words = _by_section(_read_mapping(overrides))
    return {
        name: _type_values(
            name, {field: value for field, value in words[name].items() if (name, field) not in recipe.on_line}
        )
        for name in _KINDS
    }


def _merge(*layers: Mapping[str, Mapping[str, Any]]) -> Values:
    """Values of several layers, later ones over earlier ones, without the fields that are unset."""
    merged: Values = {name: {} for name in _KINDS}
    for layer in layers:
        for name, given in layer.items():
            merged[name] |= given
    return {name: {f: value for f, value in given.items() if value is not _UNSET} for name, given in merged.items()}


def _build(values: Values, path: str | None, on_line: frozenset[tuple[str, str]]) -> Recipe:
    """The recipe of some values: defaults filled in, every section checked."""
    own = copy.deepcopy(values)  # the runs of an experiment share `values`
    found, run, sections = MistakeCollector(), None, dict[str, Any]()
    with found.collecting():
        run = RunArguments(**own[GLOBAL])
    for name in SECTIONS:
        with found.collecting():
            sections[name] = _build_section(name, run, own[name])
    found.tell()
    return Recipe(run=run, **sections, path=path, values=values, on_line=on_line)


def _build_section(name: str, run: RunArguments | None, own: Mapping[str, Any]) -> Any:
    """A section; where the global fields are wrong, to find what is wrong with it too."""
    shared: dict[str, Any] = {}
    if name in TRAINING_SECTIONS:
        shared = {"output_dir": f"{run.output_dir}/{name}", "seed": run.seed} if run else {"output_dir": name}
    try:
        return SECTIONS[name](**{**shared, **own})
    except Mistakes:
        raise  # each of them names section and field
    except (ValueError, ImportError) as error:
        if str(error).startswith(f"{name}."):
            raise
        kind_of_error = ImportError if isinstance(error, ImportError) else ValueError
        raise kind_of_error(f"Recipe, {name}: {error}") from error


def check_reference(recipe: Recipe) -> None:
    """Refuse a recipe that evaluates DM-CLIPs, which start from no CLIP, but names no CLIP to compare them with.

    Args:
        recipe ([`Recipe`]): Parsed.

    Raises:
        ValueError: If `evaluate` is set and there is neither a `clip_model` nor a section `anchor`.
    """
    if recipe.run.evaluate and recipe.run.clip_model is None and not recipe.makes_anchor:
        raise ValueError(
            "evaluate: name clip_model, the reference of the table. This recipe trains a DM-CLIP, and has neither a "
            "clip_model nor a section anchor that makes one."
        )


def check_uncaptioned_fields(recipe: Recipe) -> None:
    """Refuse a recipe that can learn nothing from the images of `uncaptioned_datasets`.

    Args:
        recipe ([`Recipe`]): Parsed; of one arm.

    Raises:
        ValueError: If no loss term can use such images, the recipe's teacher reads captions, or there is no student;
            the message names the field.
    """
    run, student = recipe.run, recipe.student
    if not run.uncaptioned_datasets or (run.stages and not _UNCAPTIONED_STAGES & set(run.stages)):
        return
    if recipe.trains_dmclip:
        raise ValueError(
            "uncaptioned_datasets: only the stage student learns from them, and this recipe trains a DM-CLIP."
        )
    if not (student.cosine_distillation_loss_weight or student.cosine_preservation_loss_weight):
        raise ValueError(
            "uncaptioned_datasets: no term of the loss can use an image without a caption. Set "
            "student.cosine_distillation_loss_weight or student.cosine_preservation_loss_weight above 0."
        )
    if student.reads_teacher and run.teacher_model is None:
        require_leak_free("teacher.cross_attention", recipe.teacher.cross_attention)


def check_test_part(recipe: Recipe) -> None:
    """Refuse a recipe that cannot keep a test part from what its stages see.

    Args:
        recipe ([`Recipe`]): Parsed.

    Raises:
        ValueError: If `test_fraction` is set and the recipe trains on shards that were made elsewhere, or names a test
            part as training data.
    """
    for name in ("train_datasets", "uncaptioned_datasets"):
        if held := [spec for spec in getattr(recipe.run, name) if spec.startswith("held_out:")]:
            raise ValueError(f"{name}: expected images to train on, got the test part {held[0]!r} of another run.")
    if recipe.run.test_fraction and recipe.trains_dmclip and recipe.dmclip.train_shards is not None:
        raise ValueError(
            "test_fraction: the images of dmclip.train_shards are in the shards already. Set test_fraction where the "
            "shards are made, by the stage reinforce."
        )


def check_same_test_part(recipe: Recipe, one: Recipe, arm: str) -> None:
    """Refuse an arm that would have another test part than the recipe's other arms.

    Args:
        recipe ([`Recipe`]): The whole.
        one ([`Recipe`]): The arm's.
        arm (`str`): The arm's name.

    Raises:
        ValueError: Naming the field that the arm sets.
    """
    for name in ("test_fraction", "train_datasets", "exclude_karpathy", "on_bad_image"):
        given, other = getattr(recipe.run, name), getattr(one.run, name)
        if given != other and (recipe.run.test_fraction or one.run.test_fraction):
            raise ValueError(
                f"arms: the arm {arm!r} sets {name}, but with test_fraction all arms share one test part. Set {name} "
                "for all arms, or leave test_fraction out and name other images in evaluate."
            )


def require_leak_free(field: str, cross_attention: str) -> None:
    """Refuse a teacher that reads captions if the student is to learn from images without captions.

    Args:
        field (`str`): Where `cross_attention` was set, for the message.
        cross_attention (`str`): The teacher's.

    Raises:
        ValueError: If `cross_attention` is not `regions`.
    """
    if cross_attention != "regions":
        raise ValueError(
            f"uncaptioned_datasets: expected {field} to be 'regions', a teacher that reads no caption, got "
            f"{cross_attention!r}. Set it to 'regions', or leave uncaptioned_datasets out."
        )


def check_adapters(recipe: Recipe) -> None:
    """Refuse a recipe that saves its student as an adapter alone, but evaluates or publishes it.

    Args:
        recipe ([`Recipe`]): Parsed.

    Raises:
        ValueError: If `student.merge_adapter` is off and whole weights are needed.
    """
    wanted = [name for name in ("evaluate", "push_to_hub") if getattr(recipe.run, name)]
    if wanted and recipe.student.lora_rank is not None and not recipe.student.merge_adapter:
        raise ValueError(
            f"student.merge_adapter: expected true beside {wanted[0]}, which reads whole weights, got false. The "
            "adapter is written either way."
        )


# What most people set; `--help` shows these first.
_FIRST = ("clip_model", "train_datasets", "output_dir", "train_fraction", "test_fraction", "evaluate")


def describe_fields() -> str:
    """Every field of every section with its choices and its default, for `--help`: first what most people set."""
    rest = [name for name in _field_names(RunArguments) if name not in _FIRST]
    lines = ["What most people set:", *_describe(RunArguments, "--", _FIRST)]
    lines += ["", "The rest of the run:", *_describe(RunArguments, "--", rest)]
    for name, kind in SECTIONS.items():
        own = _field_names(kind)
        lines += ["", f"Section {name}: {' '.join((kind.__doc__ or '').split()).split(': ', 1)[1]}"]
        if name in TRAINING_SECTIONS:
            lines.append("  Every field of transformers.TrainingArguments, and:")
            own = list(dict.fromkeys(f.name for base in kind.__mro__[:-2] for f in _declared(base)))
        lines += _describe(kind, f"--{name}.", own)
    ranges = [f"{field}: {allowed}" for field, allowed in INHERITED_RANGES.items()]
    told = "Numbers of transformers.TrainingArguments: " + "; ".join(ranges) + "."
    return "\n".join([*lines, "", *textwrap.wrap(told, _HELP_WIDTH)])


def _declared(kind: type) -> list[Field]:
    if not issubclass(kind, StageTrainingArguments):
        return []
    return [f for f in fields(kind) if f.name in kind.__dict__.get("__annotations__", {})]


_HELP_WIDTH = 100  # characters of a line


def _describe(kind: type, prefix: str, names: Sequence[str]) -> list[str]:
    by_name, lines = {f.name: f for f in fields(kind)}, []
    for name in names:
        f = by_name[name]
        allowed, default = range_of(f, INHERITED_RANGES), default_of(f)
        words = [] if default in (None, "{}") else default if isinstance(default, list) else [default]
        text_of_default = " ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in words) or "none"
        expected = f" Expected: {allowed}." if allowed else ""
        choices = f" {{{','.join(found)}}}" if (found := _choices(kind, name)) else ""
        lines.append(f"  {prefix}{name}{choices} (default {text_of_default})")
        text = f"{f.metadata['help']}{expected}"
        lines += textwrap.wrap(text, _HELP_WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines


def _choices(kind: type, name: str) -> list[str]:
    """The words that a field may be, where its type lists them."""
    hint = _hints(kind)[name]
    literal = next((one for one in (hint, *get_args(hint)) if get_origin(one) is Literal), None)
    return [str(one) for one in get_args(literal)] if literal is not None else []


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write the text that `train.py --help` shows, so that it need not load what the fields are made of."""
    CommandParser(prog="python -m modeling_dclip.distillation.recipes", description=main.__doc__).parse_args(argv)
    write_text(Path(__file__).with_name("fields.txt"), describe_fields() + "\n")


if __name__ == "__main__":
    main()
