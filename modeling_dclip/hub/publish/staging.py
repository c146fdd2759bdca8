"""Write the repositories of a publication as folders and check them, before anything leaves the machine."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import (
    AutoConfig,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from modeling_dclip.data.files import (
    check_new_folder,
    check_output_folder,
    entry_names,
    find_files,
    holding,
    read_json,
    read_text,
    remove_leftovers,
    replacing,
    write_json,
    write_text,
)
from modeling_dclip.encoders.fingerprints import hash_file
from modeling_dclip.encoders.loading import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    load_checked,
)
from modeling_dclip.encoders.saving import save_processor
from modeling_dclip.hub.native_clip import check_native, is_stock_clip
from modeling_dclip.hub.publish.cards import WITH_EXAMPLES, check_card, render_card
from modeling_dclip.hub.publish.facts import Facts
from modeling_dclip.hub.publish.pictures import draw_pictures, save_pictures
from modeling_dclip.modeling_dclip import DCLIPVisionModel
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel

VISION_MODELS = {"dclip": DCLIPVisionModel, "dmclip": DMCLIPVisionModel}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
VOCABULARIES = ("tokenizer.json", "spiece.model")  # the second of the first SigLIP
RECORD = "publication.json"  # what was written in a staging folder: each file's hash
COMPARED_TEXTS = ["a red circle", "two blue stars", "a heart"]  # with and without our code, with the example pictures


@dataclass(frozen=True)
class StagedRepo:
    """A repository that was written as a folder.

    Args:
        kind (`str`): `dual`, `vision` or `teacher`.
        repo_id (`str`): Its id on the Hub.
        folder (`Path`): Where it was written.
        changed (`tuple[str, ...]`, *optional*): The files that an earlier run into the same place did not write, or
            wrote otherwise; `None` if there was no earlier run.
        left_out (`tuple[str, ...]`, *optional*): The files that it wrote and this one does not.
        passed_over (`tuple[str, ...]`, *optional*): The results that its card leaves out for newer ones.
    """

    kind: str
    repo_id: str
    folder: Path
    changed: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


def stage(facts: Facts, root: Path) -> list[StagedRepo]:
    """Write and check all repositories of a publication.

    Args:
        facts ([`Facts`]): What to write.
        root (`Path`): A new or empty folder, or one that an earlier run wrote for the same repository, which is
            replaced. Each repository gets a folder in it, with the repository's name.

    Returns:
        `list[StagedRepo]`: In the order of pushing. If one repository fails, `root` stays as it was.

    Raises:
        FileExistsError: If `root` is in use, or holds another publication, or what an earlier run wrote there was
            changed.
        FileNotFoundError: If a template or a written file is missing.
        ValueError: If a card is not valid, or the stock `CLIPModel` gives other outputs than the model.
    """
    repos = facts.card["repos"]
    earlier = check_staging(root, repos["dual"])
    if root.is_dir() and not entry_names(root):
        root.rmdir()
    passed_over = tuple(facts.card["evaluation"]["passed_over"])
    staged = [
        StagedRepo(kind, repo_id, root / repo_id.split("/")[1], passed_over=passed_over)
        for kind, repo_id in repos.items()
    ]
    with holding(root, beside=True), replacing(root) as temporary:
        written = {repo.kind: replace(repo, folder=temporary / repo.folder.name) for repo in staged}
        for kind in sorted(written, key=list(WRITERS).index):
            WRITERS[kind](facts, written[kind].folder, written["dual"].folder)
            write_card(facts, kind, written[kind].folder)
        for repo in written.values():
            check_folder(repo)
        hashes = hash_files(temporary)
        write_json(temporary / RECORD, {"repos": list(repos.values()), "files": hashes}, indent=2)
        if root.is_dir():
            root.rename(temporary.with_name("earlier"))  # it goes with the temporary folder
    if earlier is None:
        return staged
    return [_compare(repo, earlier, hashes) for repo in staged]


def check_staging(root: Path, repo_id: str) -> dict[str, str] | None:
    """Check early that a folder can be written or replaced.

    Args:
        root (`Path`): The staging folder.
        repo_id (`str`): The dual encoder's repository.

    Returns:
        `dict[str, str]`: The hashes of what an earlier run wrote there; `None` if the folder is new or empty.

    Raises:
        FileExistsError: If it holds anything else, another publication, or a file that was changed since.
    """
    if not (root / RECORD).is_file():
        check_new_folder(root)
        return None
    remove_leftovers(root.parent)
    check_output_folder(root)
    record = read_json(root / RECORD, "record of a dry run", keys=("repos", "files"), advice="Remove the folder.")
    if repo_id not in record["repos"][-1:]:  # the dual encoder's is last
        raise FileExistsError(
            f"staging: expected a new folder, or the one that a run for {repo_id} wrote, got '{root}' with "
            f"{', '.join(map(str, record['repos']))}. Name another folder, or move this one away."
        )
    recorded, found = record["files"], hash_files(root)
    if changed := sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name)):
        raise FileExistsError(
            f"staging: expected in '{root}' what the last run wrote, got changes in {', '.join(changed[:3])}"
            f"{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}, which a new run would delete. Edit the "
            "templates in hub_cards (--cards) instead, or move the folder away."
        )
    return recorded


def hash_files(root: Path) -> dict[str, str]:
    """SHA-256 of all files below a staging folder but its record, by their paths in it."""
    return {name: hash_file(root / name) for name in list_files(root) if name != RECORD}


def _compare(repo: StagedRepo, earlier: dict[str, str], hashes: dict[str, str]) -> StagedRepo:
    """A repository with what differs from the hashes of an earlier run."""
    before, now = (
        {name.partition("/")[2]: digest for name, digest in one.items() if name.partition("/")[0] == repo.folder.name}
        for one in (earlier, hashes)
    )
    changed = tuple(sorted(name for name in now if before.get(name) != now[name]))
    return replace(repo, changed=changed, left_out=tuple(sorted(before.keys() - now.keys())))


def _write_dual(facts: Facts, folder: Path, _: Path) -> None:
    _save(facts.model, facts.processor, folder)
    if is_stock_clip(facts.model):
        batch = facts.processor(images=list(draw_pictures().values()), text=COMPARED_TEXTS, return_tensors="pt")
        check_native(facts.model, CLIPModel.from_pretrained(folder).eval(), dict(batch))
    if facts.adapter is None:
        return
    target = folder / ADAPTER_FOLDER
    target.mkdir()
    # The base model's Hub id in place of the folder on this machine.
    base_model = next(iter(facts.card["base_models"]), None)
    config = {**facts.adapter.config, "base_model_name_or_path": base_model}
    write_json(target / ADAPTER_CONFIG, dict(sorted(config.items())), indent=2)
    shutil.copyfile(facts.adapter.weights, target / ADAPTER_WEIGHTS)


def _write_vision(facts: Facts, folder: Path, dual: Path) -> None:
    # Loading the image encoder from the dual encoder's folder takes exactly its own weights.
    _save(load_checked(VISION_MODELS[facts.model.config.model_type], dual), facts.processor, folder)


def _write_teacher(facts: Facts, folder: Path, _: Path) -> None:
    if facts.teacher is None:
        raise ValueError("Expected a teacher to write, got none.")
    _save(facts.teacher.model, facts.teacher.processor, folder)


# What writes each kind of repository, from the facts, its own folder and the dual encoder's, which is written first.
WRITERS: dict[str, Callable[[Facts, Path, Path], None]] = {
    "dual": _write_dual,
    "vision": _write_vision,
    "teacher": _write_teacher,
}


def _save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    for name in ("is_local", "local_files_only"):  # they say where the tokenizer was read, not what it is
        processor.tokenizer.init_kwargs.pop(name, None)
    _forget_paths(model.config)
    model.save_pretrained(folder)
    save_processor(model, processor, folder)
    processor.image_processor.save_pretrained(folder)  # beside the processor, where older programs look for it


def _forget_paths(config: PreTrainedConfig) -> None:
    """Remove the folder that a config inside a config was read from; it would be published."""
    for name in config.sub_configs:
        inner = getattr(config, name)
        inner._name_or_path = ""
        _forget_paths(inner)


def write_card(facts: Facts, kind: str, folder: Path) -> None:
    """Write a repository's card, and the pictures that it shows.

    Args:
        facts ([`Facts`]): What the card says.
        kind (`str`): The kind of the repository.
        folder (`Path`): The repository's folder.

    Raises:
        FileNotFoundError, ValueError: As [`render_card`].
    """
    if kind in WITH_EXAMPLES:
        save_pictures(folder, facts.pictures.files)
    write_text(folder / "README.md", render_card(kind, facts.card, facts.templates))


def list_files(folder: Path) -> list[str]:
    """List the files below a folder, as sorted paths inside the repository."""
    return sorted(path.relative_to(folder).as_posix() for path in find_files(folder).files)


def check_folder(repo: StagedRepo) -> None:
    """Check that a repository is complete: card, weights, config, processor, and every module that its code imports.

    Args:
        repo ([`StagedRepo`]): The written repository.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the card is not valid.
    """
    files = list_files(repo.folder)
    weights = "model.safetensors.index.json" if "model.safetensors" not in files else "model.safetensors"
    vocabulary = next((name for name in VOCABULARIES if name in files), VOCABULARIES[0])
    expected = {"README.md", "config.json", weights, vocabulary, *PROCESSOR_FILES}
    code = [name for name in files if name.endswith(".py")]
    expected |= {f"{module}.py" for module in _auto_modules(repo.folder)}
    for name in code:
        text = read_text(repo.folder / name)
        expected |= {f"{module}.py" for module in re.findall(r"^\s*from\s+\.(\w+)\s+import", text, flags=re.MULTILINE)}
    if missing := sorted(expected - set(files)):
        raise FileNotFoundError(
            f"Expected {missing[0]} in '{repo.folder}', the folder of {repo.repo_id}, got only {', '.join(files)}."
        )
    check_card(read_text(repo.folder / "README.md"), repo.folder, repo.repo_id)


def _auto_modules(folder: Path) -> set[str]:
    """The modules of our code that a folder's configuration names, and the processor's; none of a native model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = {reference.split(".")[0] for reference in (getattr(config, "auto_map", None) or {}).values()}
    return {*named, "processing_dclip"} if named else named
