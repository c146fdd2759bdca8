"""The facts of a publication: everything that it is written from, read once and before anything is written.

They come from the command line, from the models' folders, from what training wrote beside the weights and from results
files. A fact that is missing is an error.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from modeling_dclip.data.files import list_folder, read_bytes, read_json
from modeling_dclip.data.specs import Range
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.encoders.loading import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    find_adapter,
    load_checked,
    load_merged,
    load_processor,
    read_config,
)
from modeling_dclip.evaluation.records import Record, read_results
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.evaluation.reports.tables import render_leakage, render_table
from modeling_dclip.hub.native_clip import has_native_twin
from modeling_dclip.hub.publish.cards import (
    REPO_SUFFIXES,
    CardFacts,
    EvaluationFacts,
    Example,
    ModelFacts,
    TeacherFacts,
    TrainingFacts,
    make_examples,
)
from modeling_dclip.hub.publish.licences import check_licence, describe_data, find_origins, read_arguments
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPProcessor, DCLIPTeacherProcessor


def _help(text: str, default: Any = None, **options: Any) -> Any:
    return field(default=default, metadata={"help": text}, **options)


@dataclass
class PublishArguments:
    """Arguments of `python -m modeling_dclip.hub.publish`."""

    model: str = field(metadata={"help": "Folder of the trained dual encoder, as train.py wrote it."})
    results: list[str] = field(
        metadata={"help": "Results files, or folders of them. The card shows the records of these weights."}
    )
    repo_id: str = field(
        metadata={
            "help": "namespace/name of the dual encoder. The other repositories get the suffix -vision, -teacher or "
            "-clip."
        }
    )
    license: str = field(metadata={"help": "Licence of the weights, by its id on the Hub, for example mit."})
    teacher: str | None = _help("Folder of the trained teacher, to publish it too.")
    license_name: str | None = _help("Name of the licence, if the licence is `other`.")
    license_link: str | None = _help("Address of the licence's text, if the licence is `other`.")
    base_model: str | None = _help("Hub id of the model that training started from, if that was a local copy.")
    hardware: str | None = _help("Hardware that it was trained on, for the card.")
    emissions_grams: float | None = field(
        default=None,
        metadata={"help": "CO2-equivalent of the training in grams, for the card.", "range": Range(0, 1e15)},
    )
    private: bool = _help("Make the repositories private.", False)
    dry_run: bool = _help("Write the folders and list what would be pushed. Nothing leaves this machine.", False)
    staging: str | None = _help(
        "Folder to write the repositories in. The default is a temporary one, or outputs/publish with dry_run."
    )
    cards: str | None = _help("Folder of the cards' templates. The default is hub_cards of this checkout.")


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
        processor ([`DCLIPProcessor`]): The dual encoder's processor.
        teacher ([`Teacher`], *optional*): The teacher that is published too.
        adapter ([`Adapter`], *optional*): The adapter that is published beside the weights.
        templates (`str`, *optional*): Folder of the cards' templates, if not `hub_cards` of this checkout.
    """

    card: CardFacts
    model: PreTrainedModel
    processor: DCLIPProcessor
    teacher: Teacher | None
    adapter: Adapter | None
    templates: str | None


def gather(arguments: PublishArguments) -> Facts:
    """Read everything that a publication is written from.

    Args:
        arguments ([`PublishArguments`]): The arguments of the publication.

    Returns:
        [`Facts`]

    Raises:
        FileNotFoundError: If a folder or file is missing.
        ValueError: If a fact is missing or damaged, no record is of these weights, or the licence is not allowed.
    """
    check_repo_name(arguments.repo_id)
    _check_folders(arguments)
    adapter = _read_adapter(Path(arguments.model) / ADAPTER_FOLDER)
    model, processor = load_merged(arguments.model), load_processor(arguments.model)
    teacher = None if arguments.teacher is None else _load_teacher(arguments.teacher, model)
    examples = make_examples(model, processor)
    card = gather_card_facts(
        arguments,
        model,
        teacher=None if teacher is None else teacher.model,
        examples=examples,
        has_adapter=adapter is not None,
    )
    return Facts(card, model, processor, teacher, adapter, arguments.cards)


def gather_card_facts(
    arguments: PublishArguments,
    model: PreTrainedModel,
    *,
    teacher: DCLIPTeacher | None,
    examples: list[Example],
    has_adapter: bool,
) -> CardFacts:
    """Gather what the cards' templates read.

    Args:
        arguments ([`PublishArguments`]): The arguments of the publication.
        model (`PreTrainedModel`): The dual encoder.
        teacher ([`DCLIPTeacher`], *optional*): The teacher that is published with it.
        examples (`list[Example]`): Example pictures with this model's scores.
        has_adapter (`bool`): Whether an adapter is published beside the weights.

    Returns:
        [`CardFacts`]

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a fact is missing, no record is of these weights, or the licence is not allowed.
    """
    training_arguments = read_arguments(arguments.model)
    training = describe_training(training_arguments, arguments.model)
    origins = find_origins(training_arguments, arguments.base_model)
    check_licence(arguments.license, arguments.license_name, arguments.license_link, origins)
    records = read_all_results(arguments.results)
    records = [_with(record, benchmark=show_spec(record["benchmark"])) for record in records]
    own, reference = select_records(records, model_revision(arguments.model, model), arguments)
    family = "dmclip" if model.config.model_type == "dmclip" else "dclip"
    name = arguments.repo_id.split("/")[1]
    read = None
    if arguments.teacher is not None and teacher is not None:
        read = describe_teacher(teacher, arguments.teacher, f"{name}-teacher", records)
    return CardFacts(
        family=family,
        repos=name_repos(arguments.repo_id, model, has_teacher=teacher is not None),
        model=describe_model(model),
        training=training,
        teacher=read,
        has_adapter=has_adapter,
        evaluation=describe_evaluation(own, reference, name, REFERENCE_ROLES[family]),
        examples=examples,
        origins=origins,
        base_models=list(dict.fromkeys(origin.hub_id for origin in origins if origin.hub_id)),
        data_terms=describe_data(training["datasets"]),
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        hardware=arguments.hardware,
        emissions_grams=arguments.emissions_grams,
    )


def check_repo_name(repo_id: str) -> None:
    """Check the form of a repository's name, without a network.

    Args:
        repo_id (`str`): The name of the dual encoder's repository.

    Raises:
        ValueError: If it is not `namespace/name`, or too long with a suffix such as `-teacher`.
    """
    try:
        validate_repo_id(f"{repo_id}-teacher")
    except HFValidationError as error:
        raise ValueError(f"repo_id: expected namespace/name as the Hub takes it, got {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: expected namespace/name, for example me/dclip-vitb16, got {repo_id!r}.")


def name_repos(repo_id: str, model: PreTrainedModel, has_teacher: bool) -> dict[str, str]:
    """Name the repositories of a publication, by their kind.

    Args:
        repo_id (`str`): `namespace/name` of the dual encoder.
        model (`PreTrainedModel`): The dual encoder. A plain ViT student is also published as a stock `CLIPModel`.
        has_teacher (`bool`): Whether its teacher is published too.

    Returns:
        `dict[str, str]`: Ids in the order of pushing. The dual encoder is last, so that the repositories that its card
        links to exist.
    """
    kinds = ["vision", *(["teacher"] if has_teacher else []), *(["clip"] if has_native_twin(model) else []), "dual"]
    return {kind: f"{repo_id}{REPO_SUFFIXES[kind]}" for kind in kinds}


def _check_folders(arguments: PublishArguments) -> None:
    """Check early that the models are folders: any other name would be looked up on the Hub."""
    for name in ("model", "teacher"):
        folder = getattr(arguments, name)
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{name}: expected a folder that train.py wrote, got no folder at '{folder}'.")
    if find_adapter(arguments.model) is not None:
        raise ValueError(
            f"model: expected whole weights in '{arguments.model}', got an adapter alone. Train with "
            "`merge_adapter: true`; the adapter is then published beside the merged weights."
        )


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


def _load_teacher(folder: str, model: PreTrainedModel) -> Teacher:
    if model.config.model_type != "dclip":
        raise ValueError(
            f"teacher: expected none for {model.config.model_type!r}, whose teachers are other models, got '{folder}'."
        )
    model_type = read_config(folder).model_type
    if model_type != "dclip_teacher":
        raise ValueError(f"teacher: expected the folder of a DCLIP teacher, got {model_type!r} at '{folder}'.")
    processor = load_processor(folder, DCLIPTeacherProcessor)
    return Teacher(load_checked(DCLIPTeacher, folder), processor)


# The settings of each training stage that a card shows, in this order.
_OPTIMISER = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "seed",
)  # fmt: skip
SETTINGS = {
    "student": (
        "cosine_distillation_loss_weight", "contrastive_loss_weight", "cosine_preservation_loss_weight",
        "similarity_distillation_loss_weight", "temperature", "image_to_text_weight", "wise_ft_alpha", "freeze",
        "position_embedding_type", *_OPTIMISER,
    ),
    "dmclip": ("preset", "image_size", "contrastive_loss_weight", "distillation_loss_weight", "freeze_text",
               *_OPTIMISER),
    "anchor": ("image_to_text_weight", *_OPTIMISER),
    "teacher": (
        "cross_attention", "attention_temperature", "text_share", "region_weighting", "aggregation",
        "loss_temperature", *_OPTIMISER,
    ),
}  # fmt: skip
# Shown if adapters were trained.
ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "use_dora", "lora_text")
# Weights of the loss terms that need a teacher.
TEACHER_LOSSES = (
    "cosine_distillation_loss_weight",
    "similarity_distillation_loss_weight",
    "distillation_loss_weight",
)


def describe_training(
    arguments: Mapping[str, Any], folder: str | os.PathLike, section: str | None = None
) -> TrainingFacts:
    """Say how a model was trained, from what training wrote beside its weights.

    Args:
        arguments (`Mapping[str, Any]`): The training arguments in that folder.
        folder (`str` or `os.PathLike`): The model's folder. `trainer_state.json` may be missing.
        section (`str`, *optional*): The stage that trained the model. By default `student`, `dmclip` or `anchor`,
            whichever the arguments have.

    Returns:
        [`TrainingFacts`]

    Raises:
        ValueError: If an argument is missing.
    """
    if section is None:
        section = next((name for name in ("student", "dmclip", "anchor") if name in arguments), None)
    if section is None:
        raise ValueError(
            f"Expected student, dmclip or anchor in arguments.yaml of '{folder}', got {sorted(arguments)}."
        )
    values = arguments.get(section) or {}
    missing = [f"{section}.{name}" for name in SETTINGS[section] if name not in values]
    missing += [name for name in ("train_datasets", "exclude_karpathy", "seed") if name not in arguments]
    if missing:
        raise ValueError(f"Expected {missing[0]} in arguments.yaml of '{folder}', got {sorted(arguments)}.")
    datasets = arguments["train_datasets"] or values.get("train_datasets") or []
    shards = values.get("train_shards")
    adapted = [name for name in ADAPTER_SETTINGS if name in values] if values.get("lora_rank") else []
    # Two fields set the length of training; the one that the other overrides is not shown.
    unused = "num_train_epochs" if values["max_steps"] > 0 else "max_steps"
    teachers = (arguments.get("reinforce") or {}).get("teachers", [])
    steps, epochs, minutes = _read_trainer_state(Path(folder) / "trainer_state.json")
    return TrainingFacts(
        section=section,
        datasets=[*map(show_spec, datasets), *([f"shards {Path(shards).name}"] if shards else [])],
        uncaptioned=[show_spec(spec) for spec in arguments.get("uncaptioned_datasets") or []],
        excluded=[Path(name).name for name in arguments["exclude_karpathy"]],
        teachers=[Path(name).name if Path(name).is_dir() else show_spec(name) for name in teachers],
        reads_teacher=any(values.get(name) for name in TEACHER_LOSSES),
        trains_text=section != "teacher" and bool(values.get("lora_text")),
        settings=[(name, show_value(values[name])) for name in (*SETTINGS[section], *adapted) if name != unused],
        steps=steps,
        epochs=epochs,
        minutes=minutes,
    )


def show_spec(spec: str) -> str:
    """Write a spec without the folders of this machine: an absolute path is cut to its last name.

    Example:
        >>> show_spec("coco:/home/me/coco/captions.json:images@500")
        'coco:captions.json:images@500'
    """
    return re.sub(r"(?<![\w.])/(?:[^/:,=@]+/)+", "", spec)


def show_value(value: Any) -> str:
    """Write a setting as a recipe does.

    Example:
        >>> [show_value(value) for value in (1e-05, True, None, "cosine")]
        ['1e-05', 'true', '–', 'cosine']
    """
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.10g}"
    return str(value).lower() if isinstance(value, bool) else "–" if value in (None, []) else str(value)


def _read_trainer_state(path: Path) -> tuple[int | None, float | None, float | None]:
    """Steps, epochs and minutes of a training, `None` where they were not recorded."""
    if not path.is_file():
        return None, None, None
    state = read_json(path, "trainer's state", keys=("global_step", "epoch", "log_history"), advice="Restore it.")
    runtimes = [entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry]
    return state["global_step"], state["epoch"], runtimes[-1] / 60 if runtimes else None


# What a card shows of a record, by the record's field. Reading a results file does not check these.
SHOWN_FIELDS = {"hardware": ("gpus", "cpu", "torch_threads"), "versions": ("torch", "transformers")}
INTERVAL_FIELDS = ("low", "high", "covers", "confidence")
# What the reference model is to the published one, by family.
REFERENCE_ROLES = {"dclip": "before training", "dmclip": "for comparison"}


def read_all_results(paths: Sequence[str]) -> list[Record]:
    """Read the records of results files, and of all results files in folders.

    Args:
        paths (`Sequence[str]`): Files or folders. Summaries and other JSON files in a folder are skipped.

    Returns:
        `list[Record]`: All records, in the order of the files' names.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder holds no results.
        ValueError: If a results file is not valid.
    """
    records = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"Expected a results file or a folder of them at '{path}', got nothing.")
        files = list_folder(path, "*.json") if path.is_dir() else [path]
        # A results file is a list; a summary beside it is an object.
        files = [file for file in files if file == path or read_bytes(file).lstrip().startswith(b"[")]
        if not files:
            raise FileNotFoundError(f"Expected results files in '{path}', got none. Run eval.py with --output there.")
        for file in files:
            for index, record in enumerate(read_results(file)):
                check_shown(record, f"record {index} of {file}")
                records.append(record)
    return records


def check_shown(record: Record, where: str) -> None:
    """Check the values of a record that a card shows: a results file may have been edited by hand.

    Args:
        record (`Record`): A record that is valid for [`~modeling_dclip.evaluation.records.validate_record`].
        where (`str`): Its file and position, for messages.

    Raises:
        ValueError: If a field is missing, or a share is not in [0, 1].
    """
    values, intervals = dict(record), record.get("intervals", {})
    fields: dict[str, tuple[object, tuple[str, ...]]] = {
        name: (values[name], needed) for name, needed in SHOWN_FIELDS.items()
    }
    fields |= {f"intervals / {name}": (interval, INTERVAL_FIELDS) for name, interval in intervals.items()}
    for name, (found, needed) in fields.items():
        if not isinstance(found, dict) or not set(needed) <= set(found):
            raise ValueError(f"Expected {', '.join(needed)} in {name!r} of {where}, got {found!r}. Evaluate again.")
    for name, value in record["metrics"].items():
        if metric_of(name).unit == "%" and not 0 <= value <= 1 + 1e-9:
            raise ValueError(
                f"Expected a share in [0, 1] in 'metrics' / {name!r} of {where}, got {value!r}. Evaluate again."
            )


def select_records(
    records: Sequence[Record], revision: str, arguments: PublishArguments
) -> tuple[list[Record], list[Record]]:
    """Select the records of exactly these weights, and those of the model that they are compared with.

    Args:
        records (`Sequence[Record]`): All records that were read.
        revision (`str`): The revision of the weights.
        arguments ([`PublishArguments`]): The arguments of the publication, for messages.

    Returns:
        `tuple[list[Record], list[Record]]`: The newest record of each benchmark: of this model, and of the reference
        on the same benchmarks.

    Raises:
        ValueError: If no record is of these weights.
    """
    own = _newest(record for record in records if record["revision"] == revision and "condition" not in record)
    if not own:
        models = sorted({record["model"] for record in records})
        raise ValueError(
            f"Expected results of the weights in '{arguments.model}' ({revision[:19]}...) in "
            f"{', '.join(arguments.results)}, got only results of {', '.join(models)} with other weights. Evaluate "
            f"these weights: eval.py --model {arguments.model} --output FILE."
        )
    references = {
        record["comparison"]["anchor_revision"] for record in own if "anchor_revision" in record.get("comparison", {})
    }
    benchmarks = {record["benchmark"] for record in own}
    others = (
        record for record in records if record["revision"] in references - {revision} and "condition" not in record
    )
    return own, _newest(record for record in others if record["benchmark"] in benchmarks)


def _newest(records: Iterable[Record]) -> list[Record]:
    by_benchmark = {record["benchmark"]: record for record in sorted(records, key=lambda record: record["created"])}
    return list(by_benchmark.values())


def describe_model(model: PreTrainedModel) -> ModelFacts:
    """Measure a dual encoder, from its config and weights."""
    vision, text = model.config.vision_config, model.config.text_config
    return ModelFacts(
        image_size=vision.image_size,
        patch_size=getattr(vision, "patch_size", None),
        projection_dim=model.config.projection_dim,
        text_length=text.max_position_embeddings,
        dtype=str(model.dtype).removeprefix("torch."),
        image_parameters_millions=_millions(model, ("vision_model", "visual_projection")),
        text_parameters_millions=_millions(model, ("text_model", "text_projection")),
    )


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
    measured = [record for record in records if "condition" in record and record["revision"] == revision]
    clip = {id(parameter) for parameter in teacher.clip.parameters()}
    trained = sum(parameter.numel() for parameter in teacher.parameters() if id(parameter) not in clip)
    return TeacherFacts(
        cross_attention=config.cross_attention,
        reads_text=config.cross_attention != "regions",
        text_share=config.text_share,
        parameters_millions=f"{trained / 1e6:.3g}",
        training=describe_training(read_arguments(folder), folder, "teacher"),
        leakage=render_leakage([_with(record, label=name) for record in measured]) if measured else None,
    )


def describe_evaluation(own: Sequence[Record], reference: Sequence[Record], name: str, role: str) -> EvaluationFacts:
    """Make the results table, and say with what it was measured.

    Args:
        own (`Sequence[Record]`): The records of this model.
        reference (`Sequence[Record]`): The records of the model that it is compared with.
        name (`str`): The name of this model in the table.
        role (`str`): What the reference is to this model, as in [`REFERENCE_ROLES`].

    Returns:
        [`EvaluationFacts`]
    """
    shown = [_with(record, label=f"{record.get('label', 'reference')} ({role})") for record in reference]
    shown += [_with(record, label=name) for record in own]
    machines = {_machine(record["hardware"]) for record in own}
    versions = {f"{package} {record['versions'][package]}" for record in own for package in SHOWN_FIELDS["versions"]}
    return EvaluationFacts(
        table=render_table(sorted(shown, key=lambda record: record["benchmark"])),
        records=list(own),
        benchmarks=[record["benchmark"] for record in own],
        hardware=", ".join(sorted(machines)),
        versions=", ".join(sorted(versions)),
        has_reference=bool(reference),
    )


def _with(record: Record, **fields: object) -> Record:
    """Copy a record, with other values in some fields."""
    return cast("Record", {**record, **fields})


def _machine(hardware: Mapping[str, Any]) -> str:
    if hardware["gpus"]:
        return ", ".join(hardware["gpus"])
    return f"{hardware['cpu']}, {hardware['torch_threads']} thread(s)"
