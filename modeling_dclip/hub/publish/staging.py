"""Write the repositories of a publication as folders, complete and checked, before anything leaves the machine."""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPModel, PreTrainedModel

from modeling_dclip.data.files import check_new_folder, replacing
from modeling_dclip.encoders.loading import check_processor
from modeling_dclip.hub.native_clip import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    check_twin,
    find_adapter,
    has_native_twin,
    load_dual_encoder,
    load_processor,
    load_whole,
    to_native_clip,
    to_native_processor,
)
from modeling_dclip.hub.publish.cards import (
    SUFFIXES,
    Example,
    check_card,
    draw_pictures,
    make_examples,
    render_card,
    save_pictures,
)
from modeling_dclip.hub.publish.facts import PublishArguments, gather_facts
from modeling_dclip.hub.publish.push import list_files
from modeling_dclip.modeling_dclip import DCLIPVisionModel
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel
from modeling_dclip.processing_dclip import DCLIPProcessor, DCLIPTeacherProcessor

VISION_MODELS = {"dclip": DCLIPVisionModel, "dmclip": DMCLIPVisionModel}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
WITH_EXAMPLES = ("dual", "clip")


@dataclass(frozen=True)
class StagedRepo:
    """A repository as a folder: its `kind` (`dual`, `vision`, `teacher`, `clip`), its id and where it lies."""

    kind: str
    repo_id: str
    folder: Path


def stage_repos(arguments: PublishArguments, root: Path) -> list[StagedRepo]:
    """Write all repositories of a publication.

    Args:
        arguments ([`PublishArguments`]): Of the publication.
        root (`Path`): New or empty folder; each repository gets one inside, by its name.

    Returns:
        `list[StagedRepo]`: The dual encoder last: the others exist when its card names them. If one fails, none is
            kept.

    Raises:
        FileExistsError: If the folder is in use.
        FileNotFoundError, ImportError, ValueError: If anything that belongs there is missing, differs from the model,
            or does not fit.
    """
    check_new_folder(root)
    _check_sources(arguments)
    model, processor = load_dual_encoder(arguments.model), load_processor(arguments.model)
    teacher = _load_teacher(arguments, model)
    kinds = [
        "vision",
        *(["teacher"] if teacher is not None else []),
        *(["clip"] if has_native_twin(model) else []),
        "dual",
    ]
    ids = {kind: f"{arguments.repo_id}{SUFFIXES[kind]}" for kind in kinds}
    staged = [StagedRepo(kind, repo_id, root / repo_id.split("/")[1]) for kind, repo_id in ids.items()]
    examples = make_examples(model, processor)
    facts = gather_facts(arguments, model, teacher, examples, ids)
    if root.is_dir():
        root.rmdir()
    with replacing(root) as temporary:
        written = [replace(repo, folder=temporary / repo.folder.name) for repo in staged]
        _write_repos(written, arguments, model, processor, teacher, (facts, examples))
    return staged


def _check_sources(arguments: PublishArguments) -> None:
    """See early that the folders are there: what is no folder would be looked for on the Hub."""
    for name in ("model", "teacher"):
        folder = getattr(arguments, name)
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{name}: expected a folder that train.py wrote, got '{folder}', which is none.")
    if find_adapter(arguments.model) is not None:
        raise ValueError(
            f"model: expected whole weights in '{arguments.model}', got an adapter alone. Train with `merge_adapter: "
            "true`: the adapter goes out beside them."
        )
    if (Path(arguments.model) / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file():
        _check_adapter(Path(arguments.model) / ADAPTER_FOLDER)


def _check_adapter(adapter: Path) -> None:
    """See that an adapter's weights are whole and of the rank that its config says."""
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"Expected {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG} in '{adapter}', got none. Bring it back, or remove "
            "the folder to publish the whole weights alone."
        )
    rank = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("r")
    try:
        ranks = {len(weights) for name, weights in load_file(adapter / ADAPTER_WEIGHTS).items() if ".lora_A." in name}
    except SafetensorError as error:
        raise ValueError(
            f"Expected whole weights in '{adapter}', got a damaged file ({error}). Bring it back."
        ) from error
    if ranks != {rank}:
        raise ValueError(
            f"Expected an adapter of rank {rank}, as {ADAPTER_CONFIG} says, in '{adapter}', got {sorted(ranks)}. Its "
            "files are of two trainings."
        )


def _write_repos(
    staged: list[StagedRepo],
    arguments: PublishArguments,
    model: PreTrainedModel,
    processor: DCLIPProcessor,
    teacher: DCLIPTeacher | None,
    card: tuple[dict[str, Any], list[Example]],
) -> None:
    """Fill the folders and check them."""
    facts, examples = card
    for repo in reversed(staged):  # the image encoder is read out of the dual one
        dual = staged[-1].folder
        if repo.kind == "dual":
            _save(model, processor, repo.folder)
            _copy_adapter(Path(arguments.model) / ADAPTER_FOLDER, repo.folder, facts["base_models"])
        elif repo.kind == "vision":
            _save(load_whole(VISION_MODELS[model.config.model_type], dual), processor, repo.folder)
        elif repo.kind == "teacher":
            reader = DCLIPTeacherProcessor.from_pretrained(arguments.teacher)
            check_processor(reader, arguments.teacher)
            _save(teacher, reader, repo.folder)
        else:
            _stage_twin(model, processor, repo.folder)
        _add_card(repo, facts, examples, arguments.cards)
    for repo in staged:
        check_folder(repo)


def _load_teacher(arguments: PublishArguments, model: PreTrainedModel) -> DCLIPTeacher | None:
    if arguments.teacher is None:
        return None
    if model.config.model_type != "dclip":
        raise ValueError(
            f"teacher: expected none for {model.config.model_type!r}, whose teachers are other models, got "
            f"'{arguments.teacher}'."
        )
    model_type = AutoConfig.from_pretrained(arguments.teacher).model_type
    if model_type != "dclip_teacher":
        raise ValueError(
            f"teacher: expected the folder of a DCLIP teacher, got {model_type!r} at '{arguments.teacher}'."
        )
    return load_whole(DCLIPTeacher, arguments.teacher)


def _save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    for name in ("is_local", "local_files_only"):  # say where it was read, not what it is
        processor.tokenizer.init_kwargs.pop(name, None)
    _forget_paths(model.config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _forget_paths(config: Any) -> None:
    """Configs inside a config keep the folder they were read from, and would publish it."""
    for name in config.sub_configs:
        inner = getattr(config, name)
        inner._name_or_path = ""
        _forget_paths(inner)


def _copy_adapter(adapter: Path, folder: Path, base_models: list[str]) -> None:
    """Publish the adapter beside the weights it is merged into, over the base model's Hub id in place of a folder."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        return
    target = folder / ADAPTER_FOLDER
    target.mkdir()
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_models[0] if base_models else None
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(adapter / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS)


def _stage_twin(model: PreTrainedModel, processor: DCLIPProcessor, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        native = to_native_processor(processor, scratch)
    _save(to_native_clip(model), native, folder)
    native.image_processor.save_pretrained(folder)
    pictures = list(draw_pictures().values())
    batch = processor(images=pictures, text=["a red circle", "two blue stars", "a heart"], return_tensors="pt")
    check_twin(model, CLIPModel.from_pretrained(folder).eval(), dict(batch))


def _add_card(repo: StagedRepo, facts: dict[str, Any], examples: list[Example], cards: str | None) -> None:
    if repo.kind in WITH_EXAMPLES:
        save_pictures(repo.folder, [example.path for example in examples])
    card = render_card(repo.kind, facts, cards)
    (repo.folder / "README.md").write_text(card, encoding="utf-8")


def check_folder(repo: StagedRepo) -> None:
    """Check that a repository is complete: card, weights, config, processor, and all code that its code imports.

    Args:
        repo ([`StagedRepo`]): Written.

    Raises:
        FileNotFoundError: Naming the file that is missing.
        ValueError: If the card is not valid.
    """
    files = list_files(repo.folder)
    weights = "model.safetensors.index.json" if "model.safetensors" not in files else "model.safetensors"
    expected = {"README.md", "config.json", weights, *PROCESSOR_FILES}
    code = [name for name in files if name.endswith(".py")]
    if repo.kind != "clip":
        expected |= {f"{module}.py" for module in ("processing_dclip", *_auto_modules(repo.folder))}
    for name in code:
        text = (repo.folder / name).read_text(encoding="utf-8")
        expected |= {f"{module}.py" for module in re.findall(r"^\s*from\s+\.(\w+)\s+import", text, flags=re.MULTILINE)}
    if missing := sorted(expected - set(files)):
        raise FileNotFoundError(
            f"Expected {missing[0]} in '{repo.folder}', the folder of {repo.repo_id}, got only {', '.join(files)}."
        )
    check_card((repo.folder / "README.md").read_text(encoding="utf-8"), repo.folder, repo.repo_id)


def _auto_modules(folder: Path) -> set[str]:
    return {reference.split(".")[0] for reference in AutoConfig.from_pretrained(folder).auto_map.values()}
