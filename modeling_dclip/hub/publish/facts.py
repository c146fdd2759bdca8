"""All that a card says about a model, gathered from what training and evaluation wrote.

A fact that is missing is an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.evaluation.records import read_results
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.evaluation.reports.tables import render_leakage, render_table
from modeling_dclip.hub.publish.cards import Example
from modeling_dclip.hub.publish.licences import (
    Origin,
    check_licence,
    describe_data,
    find_origins,
    read_training,
    show_spec,
)


def _help(text: str, default: Any = None, **options: Any) -> Any:
    return field(default=default, metadata={"help": text}, **options)


@dataclass
class PublishArguments:
    """Of `python -m modeling_dclip.hub.publish`."""

    model: str = field(metadata={"help": "Folder of the trained dual encoder, as train.py wrote it."})
    results: list[str] = field(
        metadata={"help": "Results files, or folders of them; the records of these weights are shown."}
    )
    repo_id: str = field(
        metadata={"help": "namespace/name of the dual encoder; the others get -vision, -teacher, -clip behind it."}
    )
    license: str = field(metadata={"help": "Of the weights, as the Hub writes it, for example mit."})
    teacher: str | None = _help("Folder of the trained teacher, to be published too.")
    license_name: str | None = _help("With the licence `other`: its name.")
    license_link: str | None = _help("With the licence `other`: where it can be read.")
    base_model: str | None = _help("Hub id of the model it starts from, where it was trained from a local copy.")
    hardware: str | None = _help("What it was trained on, for the card.")
    emissions_grams: float | None = _help("CO2-equivalent of the training in grams, for the card.")
    private: bool = _help("Make the repositories private.", False)
    dry_run: bool = _help("Write the folders and say what would be pushed; nothing leaves this machine.", False)
    staging: str | None = _help(
        "Folder to write the repositories in; by default a temporary one, outputs/publish with dry_run."
    )
    cards: str | None = _help("Folder of the cards' templates; by default hub_cards of this checkout.")


SHOWN = {"hardware": ("gpus", "cpu", "torch_threads"), "versions": ("torch", "transformers")}  # of a record
INTERVAL = ("low", "high", "covers", "confidence")
# What the model that results are compared with is to this one.
ROLES = {"dclip": "before training", "dmclip": "for comparison"}


def gather_facts(
    arguments: PublishArguments,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    examples: Sequence[Example],
    repos: Mapping[str, str],
) -> dict[str, Any]:
    """Everything the templates read.

    Args:
        arguments ([`PublishArguments`]): Of the publication.
        model (`PreTrainedModel`): The dual encoder.
        teacher (`PreTrainedModel`, *optional*): The teacher that is published with it.
        examples (`Sequence[Example]`): With this model's outputs.
        repos (`Mapping[str, str]`): Repository ids by kind.

    Returns:
        `dict[str, Any]`: Plain values.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a fact is missing, no record is of these weights, or the licence does not fit.
    """
    trained = read_training(arguments.model)
    origins = find_origins(trained["arguments"], arguments.base_model)
    check_licence(arguments.license, arguments.license_name, arguments.license_link, origins)
    records = [{**one, "benchmark": show_spec(one["benchmark"])} for one in read_all_results(arguments.results)]
    own, reference = select_records(records, model_revision(arguments.model, model), arguments)
    teacher_facts = None
    if teacher is not None:
        teacher_facts = describe_teacher(arguments, teacher, [record for record in records if "condition" in record])
    return {
        "repo_id": arguments.repo_id,
        "repos": dict(repos),
        "has_adapter": (Path(arguments.model) / "adapter" / "adapter_config.json").is_file(),
        "family": "dmclip" if model.config.model_type == "dmclip" else "dclip",
        "model": describe_model(model),
        "training": trained,
        "origins": [vars(origin) for origin in origins],
        "base_models": find_base_models(origins),
        "teacher": teacher_facts,
        "evaluation": describe_evaluation(
            own, reference, arguments.repo_id.split("/")[1], ROLES[model.config.model_type]
        ),
        "examples": [{"path": one.path, "labels": one.labels, "outputs": one.outputs} for one in examples],
        "widget": [one.to_widget() for one in examples],
        "license": arguments.license,
        "license_name": arguments.license_name,
        "license_link": arguments.license_link,
        "data_terms": describe_data(trained["datasets"]),
        "hardware": arguments.hardware,
        "emissions_grams": arguments.emissions_grams,
    }


def read_all_results(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The records of results files, and of every one in folders; summaries and other JSON beside them are passed over.

    Raises:
        FileNotFoundError: If a path is not there, or a folder holds no results.
        ValueError: If a results file is not valid.
    """
    records = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"Expected a results file or a folder of them at '{path}', got nothing.")
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        # A results file is a list; a summary beside it is an object.
        files = [file for file in files if file == path or file.read_bytes().lstrip().startswith(b"[")]
        if not files:
            raise FileNotFoundError(f"Expected results files in '{path}', got none. Run eval.py with --output there.")
        for file in files:
            for index, record in enumerate(read_results(file)):
                check_shown(record, f"record {index} of {file}")
                records.append(record)
    return records


def check_shown(record: Mapping[str, Any], where: str) -> None:
    """Check what a card reads inside a record, which reading leaves open: a file may have been edited by hand.

    Args:
        record (`dict`): Valid for [`~modeling_dclip.evaluation.records.validate_record`].
        where (`str`): File and position, for messages.

    Raises:
        ValueError: If a field is missing, or a share is not in [0, 1].
    """
    intervals = record.get("intervals", {})
    fields = {name: (record[name], needed) for name, needed in SHOWN.items()}
    fields |= {f"intervals / {name}": (interval, INTERVAL) for name, interval in intervals.items()}
    for name, (found, needed) in fields.items():
        if not isinstance(found, dict) or not set(needed) <= set(found):
            raise ValueError(f"Expected {', '.join(needed)} in {name!r} of {where}, got {found!r}. Evaluate again.")
    for name, value in record["metrics"].items():
        if metric_of(name).unit == "%" and not 0 <= value <= 1 + 1e-9:
            raise ValueError(
                f"Expected a share in [0, 1] in 'metrics' / {name!r} of {where}, got {value!r}. Evaluate again."
            )


def select_records(
    records: Sequence[Mapping[str, Any]], revision: str, arguments: PublishArguments
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Pick the records of exactly these weights, and those of the model they are compared with.

    Args:
        records (`Sequence[dict]`): All.
        revision (`str`): Of the weights.
        arguments ([`PublishArguments`]): For messages.

    Returns:
        `tuple[list, list]`: This model's, the newest of each benchmark, and the reference's on the same benchmarks.

    Raises:
        ValueError: If there is none of these weights.
    """
    own = _newest(record for record in records if record["revision"] == revision and "condition" not in record)
    if not own:
        models = sorted({record["model"] for record in records})
        raise ValueError(
            f"Expected results of the weights in '{arguments.model}' ({revision[:19]}...) in "
            f"{', '.join(arguments.results)}, got only those of {', '.join(models)} in other states. Evaluate these "
            f"weights: eval.py --model {arguments.model} --output FILE."
        )
    references = {
        record["comparison"]["anchor_revision"] for record in own if "anchor_revision" in record.get("comparison", {})
    }
    benchmarks = {record["benchmark"] for record in own}
    others = (
        record for record in records if record["revision"] in references - {revision} and "condition" not in record
    )
    return own, _newest(record for record in others if record["benchmark"] in benchmarks)


def _newest(records: Any) -> list[Mapping[str, Any]]:
    by_benchmark: dict[str, Mapping[str, Any]] = {}
    for record in sorted(records, key=lambda record: record["created"]):
        by_benchmark[record["benchmark"]] = record
    return list(by_benchmark.values())


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Sizes of a dual encoder, from its config and weights."""
    vision, text = model.config.vision_config, model.config.text_config
    towers = [name for name, _ in model.named_children()]
    images = [name for name in towers if name in ("vision_model", "visual_projection")]
    texts = [name for name in towers if name in ("text_model", "text_projection")]
    return {
        "image_size": vision.image_size,
        "patch_size": getattr(vision, "patch_size", None),
        "position_embedding_type": getattr(vision, "position_embedding_type", None),
        "projection_dim": model.config.projection_dim,
        "text_length": text.max_position_embeddings,
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_parameters_millions": _millions(model, images),
        "text_parameters_millions": _millions(model, texts),
    }


def _millions(model: PreTrainedModel, names: Sequence[str]) -> str:
    count = sum(p.numel() for name in names for p in getattr(model, name).parameters())
    return f"{count / 1e6:.3g}"


def find_base_models(origins: Sequence[Origin]) -> list[str]:
    """Hub ids of what the weights start from."""
    return list(dict.fromkeys(origin.hub_id for origin in origins if origin.hub_id))


def describe_teacher(
    arguments: PublishArguments, teacher: PreTrainedModel, leakage: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the teacher reads, how it was trained, and what of the caption shows in its embedding, where that was
    measured.

    Args:
        arguments ([`PublishArguments`]): With the teacher's folder.
        teacher ([`DCLIPTeacher`]): Loaded.
        leakage (`Sequence[dict]`): Records under several conditions.

    Returns:
        `dict[str, Any]`
    """
    config, revision = teacher.config, model_revision(arguments.teacher, teacher)
    measured = [record for record in leakage if record["revision"] == revision]
    label = arguments.repo_id.split("/")[1] + "-teacher"
    clip = {id(parameter) for parameter in teacher.clip.parameters()}
    trained = sum(parameter.numel() for parameter in teacher.parameters() if id(parameter) not in clip)
    return {
        "cross_attention": config.cross_attention,
        "reads_text": config.cross_attention != "regions",
        "text_share": config.text_share,
        "parameters_millions": f"{trained / 1e6:.3g}",
        "training": read_training(arguments.teacher, "teacher"),
        "leakage": render_leakage([{**record, "label": label} for record in measured]) if measured else None,
    }


def describe_evaluation(
    own: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], name: str, role: str
) -> dict[str, Any]:
    """The table, and with what it was measured.

    Args:
        own (`Sequence[dict]`): This model's records.
        reference (`Sequence[dict]`): Those of the model it is compared with.
        name (`str`): To show for this model.
        role (`str`): What the model that it is compared with is to it.

    Returns:
        `dict[str, Any]`: `table` (Markdown), `records` (this model's), `hardware`, `versions`, `benchmarks`.
    """
    shown = [{**record, "label": f"{record.get('label', 'reference')} ({role})"} for record in reference]
    shown += [{**record, "label": name} for record in own]
    shown = [{**record, "metrics": _shown_metrics(record["metrics"])} for record in shown]
    machines = {_machine(record["hardware"]) for record in own}
    versions = {f"{package} {record['versions'][package]}" for record in own for package in ("torch", "transformers")}
    return {
        "table": render_table(sorted(shown, key=lambda record: record["benchmark"])),
        "records": list(own),
        "hardware": ", ".join(sorted(machines)),
        "versions": ", ".join(sorted(versions)),
        "benchmarks": [record["benchmark"] for record in own],
        "has_reference": bool(reference),
    }


def _shown_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without those that say the same as another column; the metadata hold all."""
    return {name: value for name, value in metrics.items() if not name.endswith(("_mrr", "_map", "_median_rank"))}


def _machine(hardware: Mapping[str, Any]) -> str:
    return (
        ", ".join(hardware["gpus"])
        if hardware["gpus"]
        else f"{hardware['cpu']}, {hardware['torch_threads']} thread(s)"
    )
