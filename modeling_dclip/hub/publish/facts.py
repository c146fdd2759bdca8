"""The facts of a publication: everything that it is written from, read once and before anything is written.

They come from the command line, from the models' folders, from what training wrote beside the weights and from results
files. A fact that is missing is an error, and all errors are told at once.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from modeling_dclip.data.failures import FAILURES, one_line
from modeling_dclip.data.files import read_json
from modeling_dclip.encoders.families import READ_PADDING, longest_positions, shared_width
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.encoders.loading import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    NATIVE_ENCODERS,
    find_adapter,
    load_checked,
    load_merged,
    load_processor,
    read_config,
    stored_dtype,
)
from modeling_dclip.evaluation.records import Record
from modeling_dclip.evaluation.reports.tables import render_leakage
from modeling_dclip.hub.native_clip import is_stock_clip
from modeling_dclip.hub.publish.arguments import PublishArguments
from modeling_dclip.hub.publish.cards import (
    REPO_SUFFIXES,
    CardFacts,
    ModelFacts,
    NamedDataset,
    TeacherFacts,
)
from modeling_dclip.hub.publish.evaluation import (
    EvaluationFacts,
    describe_evaluation,
    find_passed_over,
    find_results,
    find_seen,
    read_all_results,
    select_records,
    without_paths,
)
from modeling_dclip.hub.publish.licences import Origin, check_licence, describe_data, find_origins, read_arguments
from modeling_dclip.hub.publish.pictures import Example, Pictures, choose_pictures, make_examples
from modeling_dclip.hub.publish.training import describe_training
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor

_Made = TypeVar("_Made")
# What a card calls each family.
FAMILIES = {
    "dclip": "A CLIP",
    "dmclip": "A DM-CLIP (a CLIP with a MambaVision as its image encoder)",
    "altclip": "An AltCLIP",
    "chinese_clip": "A Chinese-CLIP",
    "metaclip_2": "A MetaCLIP 2",
    "siglip": "A SigLIP",
    "vision-text-dual-encoder": "A pair of encoders for images and texts",
}
MOST_LETTERS = 96 - max(map(len, REPO_SUFFIXES.values()))  # of a repository's name: the Hub takes 96


@dataclass(frozen=True)
class Adapter:
    """An adapter of PEFT: its `config` as training wrote it, and the file of its `weights`."""

    config: dict[str, Any]
    weights: Path


@dataclass(frozen=True)
class Teacher:
    """A trained teacher and its processor."""

    model: DCLIPTeacher
    processor: DCLIPTeacherProcessor


@dataclass(frozen=True)
class Facts:
    """Everything that a publication is written from.

    Args:
        card ([`CardFacts`]): What the cards' templates read.
        model (`PreTrainedModel`): The dual encoder with whole weights, float32, on the CPU.
        processor (`ProcessorMixin`): The dual encoder's processor, of this package or of its family.
        teacher ([`Teacher`], *optional*): The teacher that is published too.
        adapter ([`Adapter`], *optional*): The adapter that is published beside the weights.
        pictures ([`Pictures`]): The example pictures.
        templates (`str`, *optional*): Folder of the cards' templates, if not `hub_cards` of this checkout.
    """

    card: CardFacts
    model: PreTrainedModel
    processor: ProcessorMixin
    teacher: Teacher | None
    adapter: Adapter | None
    pictures: Pictures
    templates: str | None


class PublicationError(ValueError):
    """Several problems of one publication.

    Args:
        problems (`Sequence[str]`): One line each.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        numbered = " ".join(f"({number}) {problem}" for number, problem in enumerate(self.problems, 1))
        super().__init__(f"Expected a complete publication, got {len(self.problems)} problems: {numbered}")


class Problems:
    """Collects what is wrong with a publication, so that all of it is said at once."""

    def __init__(self) -> None:
        self.found: list[BaseException] = []

    def find(self, make: Callable[[], _Made]) -> _Made | None:
        """Do something; keep a mistake of the user for [`Problems.report`] and return `None` in its place."""
        try:
            return make()
        except FAILURES as error:
            self.found.append(error)
            return None

    def report(self) -> None:
        """Raise what was found.

        Raises:
            PublicationError: If there are several mistakes. A single one is raised as it is.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise PublicationError([one_line(error) for error in self.found])


def gather(arguments: PublishArguments, problems: Problems | None = None) -> Facts:
    """Read everything that a publication is written from.

    Args:
        arguments ([`PublishArguments`]): The arguments of the publication.
        problems ([`Problems`], *optional*): What was found wrong before; it is reported with the rest.

    Returns:
        [`Facts`]

    Raises:
        FileNotFoundError: If a folder or file is missing.
        PublicationError: If several things are wrong.
        ValueError: If a fact is missing or damaged, no record is of these weights, or the licence is not allowed.
    """
    problems = Problems() if problems is None else problems
    find = problems.find
    model = processor = adapter = teacher = None
    find(lambda: check_repo_name(arguments.repo_id))
    if find(lambda: _check_model(arguments)):
        adapter = find(lambda: _read_adapter(Path(arguments.model) / ADAPTER_FOLDER))
        model = find(lambda: load_merged(arguments.model))
        processor = find(lambda: load_processor(arguments.model))
    trained = find(lambda: read_arguments(arguments.model)) if Path(arguments.model).is_dir() else None
    if arguments.teacher is not None:
        teacher = find(lambda: _load_teacher(str(arguments.teacher), trained or {}))
    specs = (trained or {}).get("train_datasets") or []
    pictures = find(lambda: choose_pictures(arguments.examples, specs))
    examples = None
    if model is not None and processor is not None and pictures is not None:
        examples = find(lambda: make_examples(model, processor, pictures))
    card = gather_card_facts(
        arguments,
        model,
        trained,
        teacher=None if teacher is None else teacher.model,
        examples=examples or [],
        examples_source="" if pictures is None else pictures.source,
        has_adapter=adapter is not None,
        problems=problems,
    )
    if model is None or processor is None or pictures is None:
        raise ValueError(f"Expected a model at '{arguments.model}', got none.")
    return Facts(card, model, processor, teacher, adapter, pictures, arguments.cards)


def gather_card_facts(
    arguments: PublishArguments,
    model: PreTrainedModel | None,
    trained: Mapping[str, Any] | None,
    *,
    teacher: DCLIPTeacher | None,
    examples: list[Example],
    examples_source: str = "",
    has_adapter: bool,
    problems: Problems | None = None,
) -> CardFacts:
    """Gather what the cards' templates read.

    Args:
        arguments ([`PublishArguments`]): The arguments of the publication.
        model (`PreTrainedModel`, *optional*): The dual encoder; `None` if a problem was found in its place.
        trained (`Mapping`, *optional*): Its training arguments; `None` as well.
        teacher ([`DCLIPTeacher`], *optional*): The teacher that is published with it.
        examples (`list[Example]`): Example pictures with this model's scores.
        examples_source (`str`, *optional*): Where they come from, one sentence.
        has_adapter (`bool`): Whether an adapter is published beside the weights.
        problems ([`Problems`], *optional*): What was found wrong before; it is reported with the rest.

    Returns:
        [`CardFacts`]

    Raises:
        FileNotFoundError: If a file is missing.
        PublicationError: If several things are wrong.
        ValueError: If a fact is missing, no record is of these weights, or the licence is not allowed.
    """
    problems = Problems() if problems is None else problems
    find = problems.find
    training = origins = read = evaluation = None
    if trained is not None:
        training = find(lambda: describe_training(trained, arguments.model))
        compared = find(lambda: model is not None and compare_base_model(arguments, model))
        origins = find(lambda: find_origins(trained, arguments.base_model, bool(compared)))
    find(lambda: check_licence(arguments.license, arguments.license_name, arguments.license_link, origins or []))
    datasets = find(lambda: [name_dataset(name) for name in arguments.dataset])
    languages = find(lambda: find_languages(arguments.language, training["specs"] if training is not None else []))
    records = find(lambda: read_all_results(arguments.results or find_results(arguments.model)))
    family = "dmclip" if model is not None and model.config.model_type == "dmclip" else "dclip"
    name = (arguments.repo_id or "").rpartition("/")[2]
    if records is not None and model is not None:
        about: dict[str, Any] = {"training": [] if training is None else training["specs"]}
        about["start"] = None if training is None else _name_start(training["section"], origins)
        evaluation = find(lambda: _evaluate(arguments, model, records, name, about))
    if records is not None and teacher is not None:
        read = find(lambda: describe_teacher(teacher, str(arguments.teacher), f"{name}-teacher", records))
    problems.report()
    if model is None or training is None or origins is None or evaluation is None:
        raise ValueError(f"Expected a trained model at '{arguments.model}', got none.")
    return CardFacts(
        family=family,
        repos=name_repos(
            str(arguments.repo_id),
            has_vision=model.config.model_type not in NATIVE_ENCODERS,
            has_teacher=teacher is not None,
        ),
        model=describe_model(model, arguments.model),
        training=training,
        teacher=read,
        has_adapter=has_adapter,
        evaluation=evaluation,
        examples=examples,
        examples_source=examples_source,
        datasets=datasets or [],
        languages=languages or [],
        origins=origins,
        base_models=list(dict.fromkeys(origin.hub_id for origin in origins if origin.hub_id)),
        data_terms=describe_data(training["specs"]),
        license=str(arguments.license),
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        hardware=arguments.hardware,
        emissions_grams=arguments.emissions_grams,
    )


ENGLISH = ("scenes", "coco", "karpathy", "flickr30k", "conceptual")  # kinds of datasets with English captions
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual")


def find_languages(named: Sequence[str], specs: Sequence[str]) -> list[str]:
    """The languages of a card: those that the publisher names, else English where all training data are known to be.

    Args:
        named (`Sequence[str]`): Codes, as the Hub takes them.
        specs (`Sequence[str]`): Of the training data.

    Raises:
        ValueError: If a name is no code.

    Example:
        >>> find_languages([], ["scenes:train"]), find_languages([], ["csv:a.csv:b"]), find_languages(["de"], [])
        (['en'], [], ['de'])
    """
    if wrong := [name for name in named if not _LANGUAGE.fullmatch(name)]:
        raise ValueError(f"language: expected codes such as en, de or zh-TW, or multilingual, got {wrong[0]!r}.")
    if named:
        return list(named)
    return ["en"] if specs and all(spec.partition(":")[0] in ENGLISH for spec in specs) else []


def _evaluate(
    arguments: PublishArguments, model: PreTrainedModel, records: list[Record], name: str, about: dict[str, Any]
) -> EvaluationFacts:
    revision = model_revision(arguments.model, model)
    seen = find_seen(records, revision, arguments.model)
    records = without_paths(records)
    own, reference = select_records(records, revision, arguments.model, arguments.results)
    passed_over = find_passed_over(records, own)
    return describe_evaluation(own, reference, name, seen=seen, passed_over=passed_over, **about)


def _name_start(section: str, origins: Sequence[Origin] | None) -> str | None:
    """The name of the model before training; `None` where a stage makes a model of something else than its like."""
    if section != "student":
        return None
    return origins[0].name if origins else "the model before training"


def compare_base_model(arguments: PublishArguments, model: PreTrainedModel) -> bool:
    """Compare the sizes of the model that the publisher names as the start with those of what is published.

    A dry run reads what is on this machine, a folder or the Hub's cache, and does not ask the Hub.

    Args:
        arguments ([`PublishArguments`]): With or without a `base_model`.
        model (`PreTrainedModel`): What is published.

    Returns:
        `bool`: Whether they could be compared.

    Raises:
        ValueError: If the two differ.
    """
    if arguments.base_model is None:
        return False
    try:
        base = read_config(arguments.base_model, local_files_only=arguments.dry_run)
    except (OSError, ValueError):  # not on this machine, or a model that needs code of its own
        return False
    known, expected = _read_sizes(base), _read_sizes(model.config)
    if "vision_config" not in base.sub_configs:  # an image encoder alone
        known, expected = _read_sizes(base, "image "), _read_sizes(model.config.vision_config, "image ")
    differing = [name for name in known if name in expected and known[name] != expected[name]]
    if differing:
        had, has = (", ".join(f"{name} {sizes[name]}" for name in differing) for sizes in (known, expected))
        raise ValueError(
            f"base_model: expected the model that training started from, got {arguments.base_model!r} with {had}; "
            f"'{arguments.model}' has {has}. Name another, or leave --base_model out."
        )
    return bool(known.keys() & expected.keys())


def _read_sizes(config: PreTrainedConfig, prefix: str | None = None) -> dict[str, Any]:
    """Width, layers and patch size of one encoder, or with no prefix the family and the sizes of both."""
    if prefix is not None:
        names = {"width": "hidden_size", "layers": "num_hidden_layers", "patch size": "patch_size"}
        sizes = {f"{prefix}{words}": getattr(config, name, None) for words, name in names.items()}
        return {words: value for words, value in sizes.items() if value is not None}
    parts = {
        f"{word} ": getattr(config, f"{part}_config", None) for word, part in (("image", "vision"), ("text", "text"))
    }
    family = {"model type": "clip" if config.model_type == "dclip" else config.model_type}
    return family | {
        name: size
        for word, part in parts.items()
        if part is not None
        for name, size in _read_sizes(part, word).items()
    }


def name_dataset(name: str) -> NamedDataset:
    """Take a name of training data: an id of the Hub (`namespace/name`), or words.

    Raises:
        ValueError: If it is empty.

    Example:
        >>> name_dataset("me/photos").hub_id, name_dataset("photographs of our garden").hub_id
        ('me/photos', None)
    """
    if not name.strip():
        raise ValueError("dataset: expected names of the training data, got an empty one.")
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    return NamedDataset(name, name if is_id else None)


def check_repo_name(repo_id: str | None) -> None:
    """Check the form of a repository's name, without a network.

    Args:
        repo_id (`str`): The name of the dual encoder's repository.

    Raises:
        ValueError: If it is not `namespace/name` as the Hub takes it, or too long with a suffix such as `-teacher`.
    """
    if repo_id is None:
        raise ValueError("repo_id: expected namespace/name, for example me/my-clip, got none. Give --repo_id.")
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: expected namespace/name, for example me/my-clip, got {repo_id!r}.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        advice = f"For example {repo_id.split('/')[0]}/{suggest_name(repo_id.split('/')[1])}."
        raise ValueError(
            f"repo_id: expected namespace/name as the Hub takes it, got {repo_id!r}: {error} {advice}"
        ) from error
    if (length := len(repo_id.split("/")[1])) > MOST_LETTERS:
        raise ValueError(
            f"repo_id: expected a name of at most {MOST_LETTERS} characters, because the other repositories get a "
            f"suffix, got {length} in {repo_id!r}."
        )


def suggest_name(text: str) -> str:
    """Make the name of a repository from any text, such as the name of a run's folder.

    Example:
        >>> suggest_name("my run \u00fc!"), suggest_name("???"), suggest_name("a--b.git")
        ('my-run-u', 'my-clip', 'a-b')
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[-.]{2,}", "-", re.sub(r"[^\w.-]+", "-", plain, flags=re.ASCII)).strip("-.")
    return name[:MOST_LETTERS].removesuffix(".git").strip("-.") or "my-clip"


def name_repos(repo_id: str, *, has_vision: bool, has_teacher: bool) -> dict[str, str]:
    """Name the repositories of a publication, by their kind.

    Args:
        repo_id (`str`): `namespace/name` of the dual encoder.
        has_vision (`bool`): Whether its image encoder is published alone: transformers has no class for those of
            other families with their projection.
        has_teacher (`bool`): Whether its teacher is published too.

    Returns:
        `dict[str, str]`: Ids in the order of pushing. The dual encoder is last, so that the repositories that its card
        links to exist.
    """
    kinds = [*(["vision"] if has_vision else []), *(["teacher"] if has_teacher else []), "dual"]
    return {kind: f"{repo_id}{REPO_SUFFIXES[kind]}" for kind in kinds}


def _check_model(arguments: PublishArguments) -> bool:
    """Check early that the model is a folder of whole weights: any other name would be looked up on the Hub."""
    _require_trained("model", arguments.model)
    if find_adapter(arguments.model) is not None:
        raise ValueError(
            f"model: expected whole weights in '{arguments.model}', got an adapter alone. Train with "
            "`merge_adapter: true`; the adapter is then published beside the merged weights."
        )
    return True


def _require_trained(name: str, folder: str) -> None:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{name}: expected a folder that train.py wrote, got no folder at '{folder}'.")


def _read_adapter(folder: Path) -> Adapter | None:
    """Read an adapter and check that its weights are whole and have the rank that its config gives."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"Expected {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG} in '{folder}', got none. Restore the file, or remove "
            "the folder to publish the whole weights alone."
        )
    config = read_json(folder / ADAPTER_CONFIG, "adapter's config", keys=("r",), advice="Restore it.")
    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"Expected whole weights in '{folder}', got a damaged file ({error}). Restore it.") from error
    ranks = {len(weight) for name, weight in weights.items() if ".lora_A." in name}
    if ranks != {config["r"]}:
        raise ValueError(
            f"Expected an adapter of rank {config['r']}, as {ADAPTER_CONFIG} says, in '{folder}', got "
            f"{sorted(ranks)}. The two files are not of one training."
        )
    return Adapter(config, folder / ADAPTER_WEIGHTS)


def _load_teacher(folder: str, trained: Mapping[str, Any]) -> Teacher:
    _require_trained("teacher", folder)
    if "dmclip" in trained:
        raise ValueError(
            f"teacher: expected none for a model of the stage dmclip, whose teachers are other models, got '{folder}'."
        )
    model_type = read_config(folder).model_type
    if model_type != "dclip_teacher":
        raise ValueError(f"teacher: expected the folder of a DCLIP teacher, got {model_type!r} at '{folder}'.")
    processor = load_processor(folder, DCLIPTeacherProcessor)
    return Teacher(load_checked(DCLIPTeacher, folder), processor)


def describe_model(model: PreTrainedModel, folder: str) -> ModelFacts:
    """Measure a dual encoder, from its config and weights.

    Args:
        model (`PreTrainedModel`): As it is published.
        folder (`str`): Where training saved it.
    """
    config, kind = model.config, model.config.model_type
    longest = longest_positions(config.text_config)
    padded = kind in READ_PADDING
    return ModelFacts(
        words=FAMILIES[kind],
        class_name=type(model).__name__ if kind in NATIVE_ENCODERS else None,
        is_stock_clip=is_stock_clip(model),
        needs_code=not is_stock_clip(model) and kind not in NATIVE_ENCODERS,
        reading=_write_reading(model, longest),
        uses_sigmoid=padded,
        has_pipeline=kind not in NATIVE_ENCODERS or kind in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        image_size=getattr(config.vision_config, "image_size", None),
        patch_size=getattr(config.vision_config, "patch_size", None),
        projection_dim=shared_width(config),
        text_length=longest,
        dtype=str(model.dtype).removeprefix("torch."),
        saved_dtype=stored_dtype(folder),
        image_parameters_millions=_millions(model, ("vision_model", "visual_projection")),
        text_parameters_millions=_millions(model, ("text_model", "text_projection")),
    )


def _write_reading(model: PreTrainedModel, longest: int) -> str:
    """What the processor has to be told of texts, as a card's code writes it; empty where it knows by itself."""
    kind = model.config.model_type
    if kind in READ_PADDING:
        return f'padding="max_length", truncation=True, max_length={longest}, '
    if kind in NATIVE_ENCODERS:
        return f"padding=True, truncation=True, max_length={longest}, "
    return "padding=True, truncation=True, " if is_stock_clip(model) else ""


def _millions(model: PreTrainedModel, names: Sequence[str]) -> str:
    children = [child for name, child in model.named_children() if name in names]
    return f"{sum(parameter.numel() for child in children for parameter in child.parameters()) / 1e6:.3g}"


def describe_teacher(teacher: DCLIPTeacher, folder: str, name: str, records: Sequence[Record]) -> TeacherFacts:
    """Say what a teacher reads, how it was trained, and how much of the caption its embedding gives away.

    Args:
        teacher ([`DCLIPTeacher`]): The loaded teacher.
        folder (`str`): The teacher's folder.
        name (`str`): The name of this teacher in the table.
        records (`Sequence[Record]`): All records. Those of this teacher under several conditions measure its leakage.

    Returns:
        [`TeacherFacts`]

    Raises:
        FileNotFoundError: If the teacher's `arguments.yaml` is missing.
        ValueError: If that file is damaged or incomplete.
    """
    config, revision = teacher.config, model_revision(folder, teacher)
    measured = [
        cast("Record", {**record, "label": name})
        for record in records
        if "condition" in record and record["revision"] == revision
    ]
    clip = {id(parameter) for parameter in teacher.clip.parameters()}
    trained = sum(parameter.numel() for parameter in teacher.parameters() if id(parameter) not in clip)
    return TeacherFacts(
        cross_attention=config.cross_attention,
        reads_text=config.cross_attention != "regions",
        text_share=config.text_share,
        parameters_millions=f"{trained / 1e6:.3g}",
        training=describe_training(read_arguments(folder), folder, "teacher"),
        leakage=render_leakage(measured) if measured else None,
    )
