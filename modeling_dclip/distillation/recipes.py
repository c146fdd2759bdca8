"""Recipes: a YAML file, flattened into an argument list before the real command line, parsed by one parser a section.

    output_dir: outputs/mine
    clip_model: dclip-vitb16
    train_datasets: ["karpathy:dataset_coco.json:images:train@50000"]
    student:
      learning_rate: 1e-6

`--output_dir other --student.learning_rate 2e-6` on the command line goes before the file; a value is typed the same
in both. `base: other.yaml` reads another recipe first. A key that is no field is an error that names the nearest one.
`null` and an empty list in a file leave the default; where that is nothing, the word `none` on the command line gives
it back.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from modeling_dclip.data.files import read_yaml
from modeling_dclip.distillation.arguments import (
    SECTIONS,
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
    check_reference,
)

UNCAPTIONED = "uncaptioned"  # their split, which only the student sees
_UNCAPTIONED_STAGES = {
    "regions",
    "teacher",
    "targets",
    "student",
}  # that see them or decide what the student learns from them


def check_uncaptioned_fields(recipe: Any) -> None:
    """Refuse a recipe whose fields say that nothing can be learned from the images of `uncaptioned_datasets`.

    Args:
        recipe ([`~modeling_dclip.distillation.recipes.Recipe`]): Parsed; of one arm.

    Raises:
        ValueError: If no loss term can use such images, the recipe's teacher reads captions, or there is no student;
            the message names the field.
    """
    run, student = recipe.run, recipe.student
    if not run.uncaptioned_datasets or (run.stages and not _UNCAPTIONED_STAGES & set(run.stages)):
        return
    if "dmclip" in recipe.named:
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


def require_leak_free(field: str, cross_attention: str) -> None:
    """Refuse a teacher that reads captions where images without captions are to be learned from.

    Raises:
        ValueError: If `cross_attention` is not `regions`; `field` says where that was set.
    """
    if cross_attention != "regions":
        raise ValueError(
            f"uncaptioned_datasets: expected {field} to be 'regions', a teacher that reads no caption, got "
            f"{cross_attention!r}. Set it so, or leave uncaptioned_datasets out."
        )


def check_adapters(recipe: Any) -> None:
    """See that what a recipe evaluates or publishes will be whole weights.

    Raises:
        ValueError: If the student is saved as an adapter alone.
    """
    wanted = [name for name in ("evaluate", "push_to_hub") if getattr(recipe.run, name)]
    if wanted and recipe.student.lora_rank is not None and not recipe.student.merge_adapter:
        raise ValueError(
            f"student.merge_adapter: expected true beside {wanted[0]}, which reads whole weights, got false. The "
            "adapter is written either way."
        )


GLOBAL = "global fields"
# What the run decides for every stage that trains.
_SET_BY_RUN = ("output_dir",)


class _Parser(HfArgumentParser):
    """Raises instead of ending the process, and names the section."""

    def __init__(self, section: str, dataclass_type: type):
        self.section = section
        super().__init__(dataclass_type, allow_abbrev=False, add_help=False, prog=section, usage=section)

    def error(self, message):
        raise ValueError(f"Recipe, {self.section}: {message}.")


@dataclass
class Recipe:
    """A parsed recipe.

    Args:
        run ([`RunArguments`]): The global fields.
        anchor, regions, teacher, targets, student, reinforce, dmclip: The sections.
        named (`frozenset[str]`): Sections that the file or the command line sets anything in.
        path (`str` or None): The file it came from.
    """

    run: RunArguments
    anchor: AnchorArguments
    regions: RegionsArguments
    teacher: TeacherArguments
    targets: TargetsArguments
    student: StudentArguments
    reinforce: ReinforceArguments
    dmclip: DMCLIPArguments
    named: frozenset[str]
    path: str | None

    def resolved(self, *sections: str) -> dict[str, Any]:
        """The global fields and these sections as plain values, to be saved beside weights."""
        return {
            "recipe": self.path,
            **as_plain(self.run),
            **{name: as_plain(getattr(self, name)) for name in sections},
        }


def _field_names(dataclass_type: type) -> list[str]:
    return [f.name for f in fields(dataclass_type) if f.init]


def _check_name(section: str, name: str) -> None:
    known = _field_names(SECTIONS.get(section, RunArguments))
    if section in TRAINING_SECTIONS and name in _SET_BY_RUN:
        raise ValueError(
            f"Recipe, {section}: {name!r} is set for all stages at once; set the global {name!r} instead."
        )
    if name in known or (name.removeprefix("no_") in known and name.startswith("no_")):
        return
    where = "" if section == GLOBAL else f"{section}."
    homes = [other for other, kind in SECTIONS.items() if name in _field_names(kind)]
    nearest = difflib.get_close_matches(name, [*known, *(SECTIONS if section == GLOBAL else ())], n=1)
    hint = f" Did you mean {where + nearest[0]!r}?" if nearest else ""
    hint = f" It is a field of {', '.join(homes)}: write {homes[0]}.{name}." if homes else hint
    raise ValueError(f"Unknown recipe key {where + name!r}.{hint} `train.py --help` lists all.")


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """A recipe file as a mapping, its `base` recipes merged in.

    Raises:
        FileNotFoundError: If it or its base is missing.
        ValueError: If it is no YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No recipe at '{path}'.")
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe '{path}': expected a mapping of fields, got {type(recipe).__name__}.")
    base = recipe.pop("base", None)
    if base is None:
        return recipe
    merged = read_recipe_file(path.parent / base)
    for name, value in recipe.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def _flatten(recipe: dict[str, Any]) -> Iterator[str]:
    """A recipe as command-line words."""
    for name, value in recipe.items():
        if name in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"Recipe section {name!r}: expected a mapping of fields, got {value!r}.")
            yield from _flatten_fields(value, f"--{name}.")
        else:
            yield from _flatten_fields({name: value}, "--")


def _flatten_fields(values: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        words = value if isinstance(value, list) else [value]
        if value is None or not words:
            continue
        yield f"{prefix}{name}"
        for word in words:
            yield json.dumps(word) if isinstance(word, (dict, bool)) else str(word)


def _split(words: Sequence[str]) -> dict[str, list[str]]:
    """Words by the section they speak to, names checked and without their prefix."""
    sections: dict[str, list[str]] = {name: [] for name in (GLOBAL, *SECTIONS)}
    section = GLOBAL
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            prefix, dot, rest = name.partition(".")
            section, name = (prefix, rest) if dot else (GLOBAL, name)
            if section != GLOBAL and section not in SECTIONS:
                raise ValueError(f"Unknown recipe section {section!r} in {word!r}. Sections: {', '.join(SECTIONS)}.")
            _check_name(section, name)
            word = f"--{name}{equals}{value}"
        elif not sections[section]:
            raise ValueError(f"Expected --FIELD before {word!r}.")
        sections[section].append(word)
    return sections


def _take_back_none(kind: type, words: list[str]) -> list[str]:
    """Words without the fields whose last value is the one word `none` and whose default is nothing."""
    nothing = {f.name for f in fields(kind) if f.default is None or _is_empty(f)}
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values.pop(name, None)  # the last one counts
            values[name] = [value] if equals else []
        else:
            values[list(values)[-1]].append(word)
    kept = {name: given for name, given in values.items() if not (name in nothing and given == ["none"])}
    return [word for name, given in kept.items() for word in (f"--{name}", *given)]


def _is_empty(one: Any) -> bool:
    return callable(one.default_factory) and one.default_factory() == []


def parse_recipe(words: Sequence[str], path: str | Path | None = None) -> Recipe:
    """Parse a recipe file, then a command line over it.

    Args:
        words (`Sequence[str]`): `--FIELD VALUE ...` and `--SECTION.FIELD VALUE ...`.
        path (`str` or `Path`, *optional*): The recipe file.

    Returns:
        [`Recipe`]

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If a key is unknown (the message names the nearest) or a value is not of its type or range.
    """
    from_file = [] if path is None else list(_flatten(read_recipe_file(path)))
    split_file, split_line = _split(from_file), _split(list(words))
    kinds = {GLOBAL: RunArguments, **SECTIONS}
    given = {name: _take_back_none(kinds[name], [*split_file[name], *split_line[name]]) for name in kinds}
    (run,) = _Parser(GLOBAL, RunArguments).parse_args_into_dataclasses(given[GLOBAL], look_for_args_file=False)
    sections = {}
    for name, kind in SECTIONS.items():
        forced = []
        if name in TRAINING_SECTIONS:
            forced = ["--output_dir", f"{run.output_dir}/{name}", "--seed", str(run.seed)]
        (sections[name],) = _Parser(name, kind).parse_args_into_dataclasses(
            [*forced, *given[name]], look_for_args_file=False
        )
    named = frozenset(name for name in SECTIONS if given[name])
    return Recipe(run=run, **sections, named=named, path=None if path is None else str(path))


@dataclass
class ArmRun:
    """One run of an experiment.

    Args:
        arm (`str`): Its variant's name.
        seed (`int`): Its seed.
        recipe ([`Recipe`]): Complete, with an output folder of its own.
    """

    arm: str
    seed: int
    recipe: Recipe


def expand_arms(words: Sequence[str], path: str | Path | None = None) -> list[ArmRun]:
    """Every run that a recipe with `arms` or `seeds` asks for, in order; one run where it has neither.

    An arm's fields go before the file's, the command line before both. Runs share the cache, the shards of
    `reinforce`, and the anchor in `OUTPUT_DIR/anchor` where no `clip_model` is named.

    Args:
        words, path: As for [`parse_recipe`].

    Returns:
        `list[ArmRun]`

    Raises:
        FileNotFoundError, ValueError: As [`parse_recipe`], [`check_reference`] and, of any arm,
            [`check_uncaptioned_fields`], [`check_adapters`].
    """
    recipe = parse_recipe(words, path)
    check_reference(recipe)
    check_adapters(recipe)
    run = recipe.run
    if not run.arms and not run.seeds:
        return [ArmRun("student", run.seed, recipe)]
    clip_model = run.clip_model or f"{run.output_dir}/anchor"
    cache_dir = run.cache_dir or f"{run.output_dir}/cache"
    shards = {"reinforce": {"folder": recipe.reinforce.folder or f"{run.output_dir}/reinforce"}}
    runs = []
    for arm, overrides in (run.arms or {"student": {}}).items():
        for seed in run.seeds or [run.seed]:
            folder = f"{run.output_dir}/{arm}/seed-{seed}"
            forced = {"seed": seed, "output_dir": folder, "cache_dir": cache_dir, "clip_model": clip_model}
            given = [*_flatten(shards), *_flatten(overrides or {}), *words, *_flatten(forced)]
            runs.append(ArmRun(arm, seed, parse_recipe(given, path)))
            check_uncaptioned_fields(runs[-1].recipe)
            check_adapters(runs[-1].recipe)
    return runs


def describe_fields() -> str:
    """Every field of every section with its default, for `--help`."""
    own = {name: set(_field_names(kind)) for name, kind in SECTIONS.items()}
    lines = ["Global fields:"]
    lines += _describe(RunArguments, "--", set(_field_names(RunArguments)))
    for name, kind in SECTIONS.items():
        lines += ["", f"Section {name}: {' '.join(kind.__doc__.split()).split(': ', 1)[1]}"]
        if name in TRAINING_SECTIONS:
            lines.append("  Every field of transformers.TrainingArguments, and:")
            own[name] = {f.name for base in kind.__mro__[:-2] for f in _declared(base)}
        lines += _describe(kind, f"--{name}.", own[name])
    return "\n".join(lines)


def _declared(kind: type) -> list[Any]:
    if not issubclass(kind, StageTrainingArguments):
        return []
    return [f for f in fields(kind) if f.name in kind.__dict__.get("__annotations__", {})]


def _describe(kind: type, prefix: str, names: set[str]) -> list[str]:
    lines = []
    for f in fields(kind):
        if f.name in names:
            default = f.default_factory() if callable(f.default_factory) else f.default
            lines.append(f"  {prefix}{f.name} (default {default!r})\n      {f.metadata['help']}")
    return lines
