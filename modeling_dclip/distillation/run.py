"""One run: where it reads and writes, the record of each stage, and the images and models that its stages read."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, load_from_disk
from transformers import AutoModel, BaseImageProcessor, PreTrainedConfig
from transformers.trainer_utils import IntervalStrategy

from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.configuration_dclip_teacher import DCLIPTeacherConfig
from modeling_dclip.data.captions import load_mix, load_uncaptioned, split_off_test, split_train_validation
from modeling_dclip.data.captions.files import karpathy_test_ids
from modeling_dclip.data.captions.parts import (
    HELD_OUT,
    describe_copies,
    read_trained_images,
    write_held_out,
    write_trained_images,
)
from modeling_dclip.data.columns import attach_columns, concatenate_shared, hash_images, image_keys, row_keys
from modeling_dclip.data.failures import redact_values
from modeling_dclip.data.files import (
    LOCK_NAME,
    MANIFEST_NAME,
    holding,
    list_folder,
    printable,
    read_json,
    remove_leftovers,
    require_field,
    user_cache_dir,
    write_json,
    write_manifest,
)
from modeling_dclip.data.images import (
    PixelReader,
    UnreadableImageError,
    find_suspects,
    find_unreadable,
    readable_formats,
)
from modeling_dclip.data.rows import first, require_rows
from modeling_dclip.distillation.arguments import TRAINING_SECTIONS, RunArguments, StageTrainingArguments
from modeling_dclip.distillation.checkpoints import (
    NOTES_NAME,
    RECORD_NAME,
    StageError,
    check_processes,
    read_notes,
    read_record,
)
from modeling_dclip.distillation.probe import OpenProbe
from modeling_dclip.distillation.recipes import Recipe, check_uncaptioned_fields, require_leak_free
from modeling_dclip.distillation.trainer import cast_weights, warn_of_warm_up
from modeling_dclip.encoders.families import (
    check_end_token,
    image_modules,
    shared_width,
)
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_model, fingerprint_processor
from modeling_dclip.encoders.loading import (
    ADAPTER_FOLDER,
    DUAL_ENCODERS,
    STUDENT_ENCODERS,
    check_vocabulary,
    check_weights,
    load_checked,
    load_processor,
    read_config,
    stored_dtype,
)
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher, require_known_pooling
from modeling_dclip.progress import count_of, duration_in_words

logger = logging.getLogger(__name__)

UNCAPTIONED = "uncaptioned"  # the split of images without captions, which only the student learns from


def _differences(old: object, new: object, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        none = "its default" if path.startswith("arguments") else None  # defaults are not recorded
        return [
            line
            for name in names
            for line in _differences(old.get(name, none), new.get(name, none), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {str(old)[:60]} -> {str(new)[:60]}"]


def count_rows(rows: Dataset) -> dict[str, int]:
    """Count the images of a dataset, and their captions; 0 captions where it has no such column.

    Example:
        >>> count_rows(Dataset.from_dict({"captions": [["a dog", "a cat"], ["a bird"]]}))
        {'images': 2, 'captions': 3}
    """
    captions = rows["captions"][:] if "captions" in rows.column_names else []
    return {"images": len(rows), "captions": sum(map(len, captions))}


class StageRecord:
    """The record of one stage, in `stage.json`: what decided its result, and whether it finished.

    Beside it, `stage_notes.json` names the files that the finished stage consists of, and `manifest.json` says what
    made it.

    Args:
        folder (`Path`): The stage's own folder.
        inputs (`dict`): Everything that decides the result, as plain values: arguments, keys of data and of models.
        overwrite (`bool`): Delete a result of other inputs, or a damaged one, instead of raising.
        told (`Mapping`, *optional*): What else the manifest says: seed, specs of data.

    Raises:
        ValueError: If the folder was made from other inputs, the record is damaged, a file of a finished stage is
            missing or cut, or another number of processes trained it so far; the message says what to do.
    """

    def __init__(
        self, folder: Path, inputs: dict[str, Any], overwrite: bool = False, told: Mapping[str, Any] | None = None
    ):
        self.told, self.began = dict(told or {}), time.monotonic()
        self.folder, self.inputs = folder, redact_values(json.loads(json.dumps(inputs)))
        self.path = folder / RECORD_NAME
        state = PartialState()
        if state.is_main_process and _is_being_deleted(folder):
            _delete_stage(folder)
        remove_leftovers(folder, below=True)
        state.wait_for_everyone()
        is_new = not self.path.is_file()
        self.finished, problem = False, None
        try:
            self._check()
        except StageError as error:
            problem = error
        state.wait_for_everyone()  # every process reads before the first one writes
        if problem is not None:
            if not overwrite:
                raise problem
            logger.warning("%s: made again, as --overwrite asks. %s", folder.name, problem.reason)
            if state.is_main_process:
                _delete_stage(folder)
            state.wait_for_everyone()
        if is_new or problem is not None:
            self._write(finished=False)

    def _check(self) -> None:
        """Read the record, and raise if the stage cannot be gone on from."""
        if (stored := read_record(self.folder)) is None:
            return
        if stored["inputs"] != self.inputs:
            changes = "; ".join(_differences(stored["inputs"], self.inputs))
            raise StageError(
                f"'{self.folder}' was made from other inputs ({changes}).",
                "Name another --output_dir, or pass --overwrite true to delete the folder and make it again.",
            )
        if stored["finished"]:
            _check_outputs(self.folder)
        else:
            check_processes(self.folder, PartialState().num_processes)
        self.finished = stored["finished"]

    def count(self, data: Mapping[str, "KeyedRows"]) -> None:
        """Let the manifest say how many images and captions each part of the data has; a model card tells them.

        Args:
            data (`Mapping[str, KeyedRows]`): The parts by their names, such as `train` and `validation`.
        """
        self.told["counts"] = {split: count_rows(part.rows) for split, part in data.items()}

    def finish(self, is_told: bool = False) -> None:
        """Note that the stage has finished, and the files that it consists of.

        Args:
            is_told (`bool`, *optional*, defaults to `False`): A line of the log named the folder already.
        """
        self.finished = True
        self._write(finished=True)
        if not is_told:
            took = duration_in_words(time.monotonic() - self.began)
            logger.info("%s: wrote %s (%s)", self.folder.name, self.folder, took)

    def _write(self, finished: bool) -> None:
        if PartialState().is_main_process:
            outputs = _sizes_of_outputs(self.folder) if finished else None
            if finished:
                keys = {name: value for name, value in self.inputs.items() if name != "arguments"}
                told = {"stage": self.folder.name, **self.told, "keys": keys}
                write_manifest(self.folder / MANIFEST_NAME, processes=PartialState().num_processes, **told)
            write_json(self.folder / NOTES_NAME, {"world_size": PartialState().num_processes, "outputs": outputs})
            write_json(self.path, {"finished": finished, "inputs": self.inputs}, indent=2)
        PartialState().wait_for_everyone()


# The files of a stage that later ones read, by suffix; not logs, checkpoints, code and reports.
_OUTPUTS = (".safetensors", ".arrow", ".tar", ".json")
_NO_OUTPUTS = ("trainer_state.json", RECORD_NAME, NOTES_NAME, MANIFEST_NAME)
_DELETING = "deleting"  # in a record whose folder is being deleted


def _sizes_of_outputs(folder: Path) -> dict[str, int]:
    """The size in bytes of each file that a finished stage promises, by its path in the stage's folder."""
    sizes = {}
    for path in list_folder(folder, "**/*"):
        name = path.relative_to(folder)
        aside = name.parts[0].startswith(("checkpoint-", ".")) or name.name.endswith("_report.json")
        if path.suffix in _OUTPUTS and path.is_file() and not aside and str(name) not in _NO_OUTPUTS:
            sizes[name.as_posix()] = path.stat().st_size
    return sizes


def _check_outputs(folder: Path) -> None:
    """Check that the files of a finished stage are there and whole.

    Raises:
        ValueError: If one is missing or of another size.
    """
    sizes = read_notes(folder).get("outputs")
    problems = _compare_outputs(folder, sizes) if isinstance(sizes, dict) else _check_old_outputs(folder)
    if problems:
        more = f", and {len(problems) - 1} more files" if len(problems) > 1 else ""
        raise StageError(
            f"The stage in '{folder}' is finished, but {problems[0]}{more}.",
            "Put it back, or delete the folder or pass --overwrite true to make the stage again.",
        )


def _compare_outputs(folder: Path, sizes: dict[str, int]) -> list[str]:
    problems = []
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (got := path.stat().st_size) != size and (got == 0 or path.suffix != ".json"):  # a config may be edited
            problems.append(f"{name} has {got} bytes in place of {size}")
    return problems


def _check_old_outputs(folder: Path) -> list[str]:
    """What is wrong with a stage that finished before records named its files: with the weights of a model."""
    if folder.name not in TRAINING_SECTIONS:
        return []
    weights = [*list_folder(folder, "*.safetensors"), *list_folder(folder / ADAPTER_FOLDER, "*.safetensors")]
    if not weights:
        return ["model.safetensors is missing"]
    problems = []
    for path in weights:
        try:
            check_weights(path)
        except ValueError as error:
            problems.append(f"{path.name} is damaged ({error})")
    return problems


def _is_being_deleted(folder: Path) -> bool:
    """Whether an earlier run was stopped while it deleted a stage's folder."""
    try:
        record = read_record(folder)
    except ValueError:
        return False  # damaged: said where it is read
    return record is not None and bool(record.get(_DELETING))


def _delete_stage(folder: Path) -> None:
    """Delete what is in a stage's folder. It is marked first: if the deletion is stopped, the next run ends it."""
    write_json(folder / RECORD_NAME, {"finished": False, "inputs": {}, _DELETING: True}, indent=2)
    for path in list_folder(folder):
        if path.name not in (RECORD_NAME, LOCK_NAME):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    (folder / RECORD_NAME).unlink()


def finished_inputs(folder: Path) -> dict[str, Any]:
    """What a finished stage was made from.

    Args:
        folder (`Path`): The stage's own folder.

    Returns:
        `dict[str, Any]`: The inputs of its [`StageRecord`].

    Raises:
        FileNotFoundError: If the stage was not run.
        ValueError: If it did not finish, or its record or a file is damaged or missing.
    """
    if (record := read_record(folder)) is None:
        raise FileNotFoundError(f"No {RECORD_NAME} in '{folder}': run the stage {folder.name!r} first.")
    if not record["finished"]:
        raise ValueError(
            f"The stage in '{folder}' did not finish. Run the stage {folder.name!r} again; it continues where it "
            "stopped."
        )
    _check_outputs(folder)
    return record["inputs"]


@contextmanager
def holding_folders(folders: Sequence[str]) -> Iterator[None]:
    """Keep the output folders of a run to its processes. The main process holds them, the others follow its answer.

    Args:
        folders (`Sequence[str]`): Each is held once.

    Raises:
        OSError: If another run holds one, or one cannot be written; in every process.
    """
    state, refused = PartialState(), [""]
    with ExitStack() as held:
        if state.is_main_process:
            try:
                for folder in dict.fromkeys(os.path.abspath(folder) for folder in folders):
                    held.enter_context(holding(folder))
            except OSError as error:
                refused = [str(error)]
        broadcast_object_list(refused)
        if refused[0]:
            raise OSError(refused[0])
        yield


_DATA_FIELDS = ("train_datasets", "uncaptioned_datasets", "exclude_karpathy", "train_fraction", "test_fraction")


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes.

    Args:
        folder (`Path`): The run's own folder. Each stage has a folder of its own name in it.
        cache_dir (`Path`): Of what the frozen models give, cached by content; runs may share it.
        regions_cache (`Path`): Of detectors' answers, cached by content; all runs of a user share it.
        reinforced (`Path`): Folder of the stage reinforce; runs may share it.
        overwrite (`bool`): Whether a stage replaces a result of other inputs.
        told (`Mapping`): What the manifest of each stage says of the recipe: its seed and the specs of its data.
    """

    folder: Path
    cache_dir: Path
    regions_cache: Path
    reinforced: Path
    overwrite: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> "Places":
        """The places that a recipe names."""
        folder = Path(recipe.run.output_dir)
        return cls(
            folder=folder,
            cache_dir=Path(recipe.run.cache_dir or folder / "cache"),
            regions_cache=_regions_cache(recipe),
            reinforced=Path(recipe.reinforce.folder or folder / "reinforce"),
            overwrite=recipe.run.overwrite,
            told={
                "recipe": recipe.path,
                "seed": recipe.run.seed,
                "data": {name: getattr(recipe.run, name) for name in _DATA_FIELDS},
            },
        )

    def made(self, stage: str, file: str, instead: str = "") -> Path:
        """The folder of a stage that `file` shows to be done.

        Args:
            stage (`str`): Its name.
            file (`str`): Name of a file or folder in the stage's folder.
            instead (`str`, *optional*): The field that replaces the stage, for the message.

        Returns:
            `Path`

        Raises:
            FileNotFoundError: If `file` is missing; the message says which stage to run, or which field to set.
        """
        if not (self.folder / stage / file).exists():
            raise FileNotFoundError(
                f"No {file} in '{self.folder / stage}': run the stage {stage!r} first"
                + (f", or name {instead}." if instead else ".")
            )
        return self.folder / stage

    def record(self, stage: str, inputs: dict[str, Any], folder: Path | None = None) -> StageRecord:
        """Open the record of a stage.

        Args:
            stage (`str`): Its name.
            inputs (`dict`): As for [`StageRecord`].
            folder (`Path`, *optional*): The stage's folder. Defaults to the one of its name in the run's folder.

        Returns:
            [`StageRecord`]: Finished if an earlier run made the same.

        Raises:
            ValueError: As [`StageRecord`].
        """
        record = StageRecord(folder or self.folder / stage, inputs, self.overwrite, self.told)
        if record.finished:
            logger.info("%s: already finished from the same inputs, skipped (%s)", stage, record.folder)
        return record


def _regions_cache(recipe: Recipe) -> Path:
    """Detectors' answers are small and dear, so that all runs of a user share them, unless `cache_dir` is named."""
    named = recipe.run.cache_dir if recipe.own_cache else None
    return user_cache_dir("regions") if named is None else Path(named) / "regions"


class KeyedRows(NamedTuple):
    """Rows with a key of each one's content.

    Args:
        rows (`datasets.Dataset`): N rows.
        keys (`list[str]`): N keys: of the images alone, or of all columns that a model reads.
    """

    rows: Dataset
    keys: list[str]

    @property
    def key(self) -> str:
        """One key of all rows."""
        return combine_keys(self.keys)


Splits = dict[str, KeyedRows]  # "train", "validation" and, without captions, "uncaptioned"


@dataclass
class SharedData:
    """What the runs of one process need not read twice, each by a key of what selects it.

    Args:
        sources (`dict[str, Splits]`): Images by split.
        whole (`dict[str, KeyedRows]`): All captioned images, those held out included, with keys of the images.
        tests ([`KeyedRows`] by `str`): The test parts.
        decoded (`set[str]`): Keys of images that were found to be whole.
        looked_at (`set[str]`): Keys of images whose files have their end.
        loaded (`list[tuple[str, Dataset]]`): All rows whose images are read, with the field that names them.
        kept (`dict[str, set[Path]]`): The folders of this process's runs that hold each test part.
        told (`set[tuple[str, str]]`): What was said once: of start models and test parts that were compared, and of
            small validation parts.
        excluded_ids (`dict[tuple[str, ...], set[str]]`): Ids of test images, by the files that list them.
        pixels (`dict[tuple, PixelReader]`): Decoded images.
        fingerprints (`dict[str, str]`): Of models, by spec or path.
        clips (`dict[str, Clip]`): The CLIPs that runs start from, by path and the state of their files.
        open_probe (`Callable`, *optional*): Takes the benchmarks of `student.probe` and gives what measures them.
    """

    sources: dict[str, Splits] = field(default_factory=dict)
    whole: dict[str, KeyedRows] = field(default_factory=dict)
    tests: dict[str, KeyedRows] = field(default_factory=dict)
    decoded: set[str] = field(default_factory=set)
    looked_at: set[str] = field(default_factory=set)
    loaded: list[tuple[str, Dataset]] = field(default_factory=list)
    kept: dict[str, set[Path]] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)
    excluded_ids: dict[tuple[str, ...], set[str]] = field(default_factory=dict)
    pixels: dict[tuple, PixelReader] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    clips: dict[str, "Clip"] = field(default_factory=dict)
    open_probe: OpenProbe | None = None


def load_training_images(recipe: Recipe, shared: SharedData) -> Splits:
    """Load the images that teacher and student learn from.

    Args:
        recipe ([`Recipe`]): Names the datasets, the split and the test images to leave out.
        shared ([`SharedData`]): Images that an earlier run loaded are taken from it; new ones are added.

    Returns:
        `dict[str, KeyedRows]`: By split, with keys of the images: `train`, `validation` if a stage evaluates, and
        `uncaptioned` if the recipe names such datasets.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If no dataset is named, there are no rows to validate on, or a dataset is wrong.
    """
    run, ignores_boxes = recipe.run, recipe.regions.ignore_boxes
    validates = any(
        IntervalStrategy(args.eval_strategy) is not IntervalStrategy.NO for args in (recipe.teacher, recipe.student)
    )
    if validates and not run.leaves_validation:
        raise ValueError(
            f"eval_strategy asks for rows to validate on, but train_fraction is {run.train_fraction:g}"
            + (f" and test_fraction {run.test_fraction:g}, which is all" if run.test_fraction else "")
            + ": set it below 1, or set eval_strategy to no."
        )
    selection = (run.train_datasets, run.exclude_karpathy, run.train_fraction, run.test_fraction, run.seed)
    key = json.dumps([*selection, run.on_bad_image, ignores_boxes, validates])
    whole = load_all_captioned(run, shared)
    if key not in shared.sources:
        shared.sources[key] = _split(whole, run, validates, ignores_boxes, shared)
    captioned = shared.sources[key]
    if IntervalStrategy(recipe.student.eval_strategy) is not IntervalStrategy.NO:
        _tell_few_validated(len(captioned["validation"].rows), len(whole.rows), shared)
    if not run.uncaptioned_datasets:
        return captioned
    new = json.dumps([UNCAPTIONED, key, run.uncaptioned_datasets])
    if new not in shared.sources:
        excluded = _excluded_ids(run.exclude_karpathy, shared) | set(whole.rows["image_id"][:])
        specs, known = run.uncaptioned_datasets, set(whole.keys)
        found = load_new_images(specs, run, shared, exclude_ids=excluded, known=known)
        rows = _without_boxes(found.rows) if ignores_boxes else found.rows
        shared.sources[new] = {UNCAPTIONED: KeyedRows(rows, found.keys)}
        _warn_of_boxes(recipe, captioned["train"].rows, found.rows)
    return captioned | shared.sources[new]


def _tell_few_validated(images: int, of: int, shared: SharedData) -> None:
    """Say once how little a small validation part tells."""
    told = ("validation part", f"{images} of {of}")
    if (few := describe_few(images)) and told not in shared.told:
        shared.told.add(told)
        logger.info(
            "validation part: %d of %s, which choose the checkpoint. %s%s",
            *(images, count_of(of, "image"), few[0].upper(), few[1:]),
        )


def _split(whole: KeyedRows, run: RunArguments, validates: bool, ignores_boxes: bool, shared: SharedData) -> Splits:
    """The parts that are trained and validated on, of all captioned images."""
    key_of = dict(zip(whole.rows["image_id"][:], whole.keys, strict=True))

    def keys_of(rows: Dataset) -> list[str]:
        return [key_of[image_id] for image_id in rows["image_id"][:]]

    rest = without_test(whole, run, shared).rows
    rest = _without_boxes(rest) if ignores_boxes else rest
    splits = {"train": rest}
    if run.leaves_validation:
        options: dict[str, Any] = {"keys": keys_of(rest), "of": len(whole.rows)}
        train, validation = split_train_validation(rest, run.train_fraction, run.seed, **options)
        splits = {"train": train, **({"validation": validation} if validates else {})}
    return {split: KeyedRows(rows, keys_of(rows)) for split, rows in splits.items()}


def load_all_captioned(run: RunArguments, shared: SharedData) -> KeyedRows:
    """Load all captioned images of a recipe, those held out included, and say how many are copies of another.

    Args:
        run ([`RunArguments`]): Names the datasets and the test images of Karpathy's files to leave out.
        shared ([`SharedData`]): Images that an earlier run loaded are taken from it; new ones are added.

    Returns:
        [`KeyedRows`]: With keys of the images.

    Raises:
        FileNotFoundError, ValueError: As [`load_captioned`].
    """
    key = json.dumps([run.train_datasets, run.exclude_karpathy, run.data_seed, run.on_bad_image])
    if key not in shared.whole:
        rows = load_captioned(run.train_datasets, run.exclude_karpathy, run.data_seed, shared)
        keyed = shared.whole[key] = read_keyed(rows, run, "train_datasets", shared)
        if copies := describe_copies(keyed.rows["image_id"][:], keyed.keys):
            logger.warning("train_datasets: %s", copies)
    return shared.whole[key]


def read_keyed(rows: Dataset, run: RunArguments, what: str, shared: SharedData) -> KeyedRows:
    """Compute the keys of images. With `on_bad_image: skip` every image is decoded, and those that cannot be are left
    out, counted, named, and listed in `{what}_report.json` in the run's folder. The same images are not decoded again.

    Args:
        rows (`datasets.Dataset`): With `image_id` and `image`.
        run ([`RunArguments`]): Says what to do with images that cannot be read, and names the folder.
        what (`str`): The field that names the images.
        shared ([`SharedData`]): Notes the rows, so that [`name_unreadable`] can look at all.

    Returns:
        [`KeyedRows`]: With keys of the images.

    Raises:
        UnreadableImageError: If a file is missing, with `raise`.
        ValueError: If no image is left, or the report of an earlier start is damaged.
    """
    shared.loaded.append((what, rows))
    if run.on_bad_image == "raise":
        return KeyedRows(rows, image_keys(rows))
    keys, report = hash_images(rows), Path(run.output_dir) / f"{what}_report.json"
    made_from = combine_keys([*readable_formats(), *(key or "" for key in keys)])
    bad = _read_report(report, made_from)
    PartialState().wait_for_everyone()  # every process reads before the first one writes
    if bad is None:
        bad = [{"row": row, **fault} for row, fault in _find_unreadable(rows, range(len(rows))).items()]
        if PartialState().is_main_process:
            report.parent.mkdir(parents=True, exist_ok=True)
            told = {"images": len(rows), "skipped_images": len(bad), "skipped": bad, "key": made_from}
            write_json(report, told, indent=2)
    if not bad:
        return KeyedRows(rows, image_keys(rows) if None in keys else [key for key in keys if key is not None])
    logger.warning(
        "%s: left out %d of %s that cannot be read, first: %s; %s lists them with the reasons",
        *(what, len(bad), count_of(len(rows), "image"), first(one["image_id"] for one in bad), report),
    )
    out = {one["row"] for one in bad}
    left = [(row, key) for row, key in enumerate(keys) if row not in out and key is not None]
    require_rows(len(left), f"{what} after leaving out {count_of(len(bad), 'image')} that cannot be read", "an image")
    return KeyedRows(rows.select([row for row, _ in left]), [key for _, key in left])


def _read_report(report: Path, made_from: str) -> list[dict[str, Any]] | None:
    """The images that an earlier start left out of the same ones; `None` if it did not look at these."""
    if not report.is_file():
        return None
    advice = "Delete it: the images are then decoded again."
    told = read_json(report, "report of images", ("key", "skipped"), advice=advice)
    if told["key"] != made_from:
        return None
    bad = require_field(told, "skipped", "The object", report, list)
    for number, one in enumerate(bad):
        require_field(one, "row", f"Image {number}", report, int)
        require_field(one, "image_id", f"Image {number}", report, str)
    return bad


def _find_unreadable(rows: Dataset, which: Sequence[int]) -> dict[int, dict[str, str]]:
    """As [`~modeling_dclip.data.images.find_unreadable`]. Under several processes each decodes its share."""
    state = PartialState()
    found = find_unreadable(rows, which[state.process_index :: state.num_processes])
    return dict(sorted(found.items() if state.num_processes == 1 else gather_object(list(found.items()))))


def check_parts(recipe: Recipe, shared: SharedData) -> None:
    """Decode the images that are measured, those of the test and validation parts, before anything is trained.

    The files of the others are looked at, and decoded if their end is missing. If an image cannot be read, all
    images are looked at. With `on_bad_image: skip` they were decoded when they were loaded.

    Args:
        recipe ([`Recipe`]): Of a run.
        shared ([`SharedData`]): Images that an earlier run loaded are taken from it; new ones are added.

    Raises:
        FileNotFoundError, ValueError: As [`load_training_images`]; also if images cannot be read: the message names
            them.
    """
    if recipe.run.on_bad_image == "skip":
        return
    parts: dict[str, KeyedRows] = {}
    if (test := find_test_part(recipe.run, shared)) is not None:
        parts["test"] = test
    if {"regions", "teacher", "targets"} & set(recipe.stages):
        parts |= load_training_images(recipe, shared)
    for name, part in parts.items():
        is_measured = name in ("test", "validation")
        seen = shared.decoded if is_measured else shared.decoded | shared.looked_at
        new = [row for row, key in enumerate(part.keys) if key not in seen]
        asked = new if is_measured or not new else find_suspects(part.rows, new)
        if asked and _find_unreadable(part.rows, asked):
            raise ValueError(f"{describe_unreadable(shared, _find_unreadable)} Nothing was trained.")
        (shared.decoded if is_measured else shared.looked_at).update(part.keys[row] for row in new)


_MOST_NAMED = 10  # images in one message


def describe_unreadable(
    shared: SharedData, find: Callable[[Dataset, Sequence[int]], dict[int, dict[str, str]]] = find_unreadable
) -> str:
    """Look at all images that were to be read in this process's runs, and name those that cannot be.

    Args:
        shared ([`SharedData`]): Has the rows that [`read_keyed`] was given.
        find (`Callable`, *optional*): By default this process looks alone: where it met such an image while others go
            on, none of them would answer.

    Returns:
        `str`: How many, the first [`_MOST_NAMED`] with their reasons, and what to do; empty if all can be read.
    """
    faults, seen = dict[str, list[str]](), set[str]()
    for what, rows in shared.loaded:
        ids = rows["image_id"][:]
        bad = find(rows, [row for row, image_id in enumerate(ids) if image_id not in seen])
        seen.update(ids)
        named = [f"{printable(one['image_id'])} ({one['file']}): {one['reason']}" for one in bad.values()]
        faults |= {what: faults.get(what, []) + named} if named else {}
    if not (named := [one for some in faults.values() for one in some]):
        return ""
    more = f"; and {len(named) - _MOST_NAMED:,} more" if len(named) > _MOST_NAMED else ""
    return (
        f"{', '.join(faults)}: {len(named):,} of {count_of(len(seen), 'image')} cannot be read: "
        f"{'; '.join(named[:_MOST_NAMED])}{more}. Replace the files, or start again with --on_bad_image skip (and "
        "--overwrite true, where stages were begun), which leaves such images out of every part."
    )


@contextmanager
def naming_unreadable(shared: SharedData) -> Iterator[None]:
    """Where an image cannot be read, name all of the run's images that cannot be, so that they are mended at once.

    Args:
        shared ([`SharedData`]): Of the runs inside.

    Raises:
        UnreadableImageError: Naming all. The one that was raised inside is passed on if every image of the run's own
            datasets can be read.
    """
    try:
        yield
    except UnreadableImageError as error:
        if not (told := describe_unreadable(shared)):
            raise
        raise UnreadableImageError(told) from error


def find_test_part(run: RunArguments, shared: SharedData) -> KeyedRows | None:
    """The images that no stage of a run sees; `None` if it keeps none.

    All arms and seeds of a recipe have the same ones.

    Args:
        run ([`RunArguments`]): Names the datasets and the share.
        shared ([`SharedData`]): Images that an earlier run loaded are taken from it; new ones are added.

    Returns:
        [`KeyedRows`] or `None`: With keys of the images.

    Raises:
        FileNotFoundError, ValueError: As [`load_captioned`]; also if the part would be empty.
    """
    if not run.test_fraction:
        return None
    key = _test_key(run)
    if key not in shared.tests:
        whole = load_all_captioned(run, shared)
        test = split_off_test(whole.rows, run.test_fraction, whole.keys)[1]
        key_of = dict(zip(whole.rows["image_id"][:], whole.keys, strict=True))
        shared.tests[key] = KeyedRows(test, [key_of[image_id] for image_id in test["image_id"][:]])
    return shared.tests[key]


def _test_key(run: RunArguments) -> str:
    return json.dumps([run.train_datasets, run.exclude_karpathy, run.test_fraction, run.on_bad_image])


def without_test(images: KeyedRows, run: RunArguments, shared: SharedData) -> KeyedRows:
    """Images without those of a run's test part, under whatever ids they come.

    Args:
        images ([`KeyedRows`]): Of any source, with keys of the images.
        run ([`RunArguments`]), shared ([`SharedData`]): As in [`find_test_part`].

    Returns:
        [`KeyedRows`]

    Raises:
        ValueError: If no image is left, or as [`find_test_part`].
    """
    if (test := find_test_part(run, shared)) is None:
        return images
    held_out = set(test.keys)
    rows = [row for row, key in enumerate(images.keys) if key not in held_out]
    require_rows(len(rows), f"{count_of(len(images.keys), 'image')} without the test part")
    return KeyedRows(images.rows.select(rows), [images.keys[row] for row in rows])


def keep_test_part(recipe: Recipe, shared: SharedData) -> None:
    """Write the test part of a run, if it has one, into the run's folder `held_out`: `held_out:RUN_FOLDER` reads it.

    The runs of an experiment have the one that this process wrote in the folder above theirs.

    Args:
        recipe ([`Recipe`]): Of a run, or of an experiment.
        shared ([`SharedData`]): Of the process's runs.

    Raises:
        ValueError: If the folder holds that of other data, or as [`find_test_part`].
    """
    run, places = recipe.run, Places.of(recipe)
    if (test := find_test_part(run, shared)) is None:
        return
    _warn_of_seen(recipe, test, shared)
    kept, here = shared.kept.setdefault(_test_key(run), set()), places.folder.absolute()
    if kept.intersection((here, *here.parents)):
        return
    of = len(load_all_captioned(run, shared).rows)
    logger.info(
        "test part: %d of %s, which no stage sees; held_out:%s names them%s",
        *(len(test.rows), count_of(of, "image"), places.folder, _warn_of_few_tests(len(test.rows), of)),
    )
    inputs = {"test_fraction": run.test_fraction, "dataset": combine_keys(row_keys(*test))}
    record = StageRecord(places.folder / HELD_OUT, inputs, places.overwrite, places.told)
    if not record.finished:
        if PartialState().is_main_process:
            write_held_out(record.folder, *test, of=of, fraction=run.test_fraction)
        PartialState().wait_for_everyone()
        record.finish(is_told=True)
    kept.add(here)


def _warn_of_few_tests(images: int, of: int) -> str:
    """The end of the line on the test part, where it is small; with options where that helps."""
    if not (few := describe_few(images)):
        return ""
    more = ". --train_fraction 0.5 --test_fraction 0.4 tests on more" if images < 0.4 * of - 1 else ""
    return f". {few[0].upper()}{few[1:]}{more}"


def _warn_of_seen(recipe: Recipe, test: KeyedRows, shared: SharedData) -> None:
    """Warn of test images that had a say in a model which the run starts from or is taught by."""
    for model in recipe.starts:
        told = (model, _test_key(recipe.run))
        if told in shared.told or (trained := read_trained_images(model)) is None:
            continue
        shared.told.add(told)
        if overlap := trained.describe_overlap(test.keys):
            logger.warning(
                "test part: this run begins with '%s', and %s. Results on them are too good: begin with a model that "
                "never saw them.",
                *(printable(model), overlap),
            )


def load_captioned(specs: Sequence[str], exclude_karpathy: Sequence[str], seed: int, shared: SharedData) -> Dataset:
    """Load the captioned images of a recipe, without the test images of Karpathy's files.

    Args:
        specs (`Sequence[str]`): The recipe's `train_datasets`.
        exclude_karpathy (`Sequence[str]`): Karpathy JSON files.
        seed (`int`): Seed of the draws.
        shared ([`SharedData`]): Remembers the ids in those files.

    Returns:
        `datasets.Dataset`: With `image_id`, `image`, `captions`.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If no dataset is named, or one is wrong.
    """
    if not specs:
        raise ValueError("train_datasets: expected one or more specs of captioned images, got none.")
    return load_mix(specs, seed=seed, exclude_ids=_excluded_ids(exclude_karpathy, shared))


def _excluded_ids(paths: Sequence[str], shared: SharedData) -> set[str]:
    if (key := tuple(paths)) not in shared.excluded_ids:
        shared.excluded_ids[key] = set().union(*(karpathy_test_ids(path) for path in paths))
    return shared.excluded_ids[key]


def _without_boxes(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in ("boxes", "box_scores") if name in dataset.column_names])


def _warn_of_boxes(recipe: Recipe, captioned: Dataset, uncaptioned: Dataset) -> None:
    """Warn if the teacher sees regions in captioned images alone."""
    if "boxes" not in captioned.column_names or "boxes" in uncaptioned.column_names:
        return
    if not recipe.regions.ignore_boxes and recipe.student.reads_teacher and not recipe.uses_detector:
        logger.warning(
            "The captioned images have boxes of their own, the images without captions have none, so the teacher sees "
            "only the whole of these. Set regions.detector to give both the same regions."
        )


def load_new_images(
    specs: list[str], run: RunArguments, shared: SharedData, *, exclude_ids: Collection[str], known: Collection[str]
) -> KeyedRows:
    """Load the images of `uncaptioned_datasets` that are not among the captioned ones.

    Args:
        specs (`list[str]`): Of [`load_uncaptioned`].
        run ([`RunArguments`]): Has the seed of the draws, and says what to do with images that cannot be read.
        shared ([`SharedData`]): Notes what is read.
        exclude_ids (`Collection[str]`): Ids of captioned images and of those that must not be trained on.
        known (`Collection[str]`): Keys of the captioned images. The same file under another id is left out too.

    Returns:
        [`KeyedRows`]: The rows, without captions, and the keys of their images.

    Raises:
        FileNotFoundError: As [`load_uncaptioned`].
        ValueError: As [`load_uncaptioned`]; also if no image is left.
    """
    dataset = load_uncaptioned(specs, seed=run.data_seed, exclude_ids=exclude_ids)
    dataset, keys = read_keyed(dataset, run, "uncaptioned_datasets", shared)
    new = [row for row, key in enumerate(keys) if key not in known]
    if len(new) < len(keys):
        left_out = len(keys) - len(new)
        logger.info("uncaptioned_datasets: left out %s, captioned under another id", count_of(left_out, "image"))
        require_rows(len(new), f"{specs} after leaving out {left_out} captioned images", "an image")
        dataset, keys = dataset.select(new), [keys[row] for row in new]
    logger.info("uncaptioned_datasets: %s for the student alone", count_of(len(new), "image"))
    return KeyedRows(dataset, keys)


class Learned(NamedTuple):
    """What a model learns from.

    Args:
        keys (`Sequence[str]`): Of its images, and of those that choose its checkpoint.
        starts (`Sequence`): Folders or Hub ids of the models that it starts from or is taught by.
    """

    keys: Sequence[str]
    starts: Sequence[str | Path] = ()

    def keep(self, folder: Path) -> None:
        """Write the keys beside the model, with those of the models it starts from: the main process does."""
        if PartialState().is_main_process:
            write_trained_images(folder, self.keys, self.starts)


def check_batches(recipe: Recipe, images: Splits) -> None:
    """Check that the captioned images fill a batch, before a model reads them, and warn of a warm-up without an end.

    Images that are skipped later may still leave too few; the trainers check that.

    Args:
        recipe ([`Recipe`]): Its stages `teacher` and `student` are checked if they will run.
        images (`dict[str, KeyedRows]`): From [`load_training_images`].

    Raises:
        ValueError: If they are fewer than a batch; the message names the field to lower.
    """
    captioned, others = len(images["train"].rows), len(images[UNCAPTIONED].rows) if UNCAPTIONED in images else 0
    for name in ("teacher", "student"):
        args = getattr(recipe, name)
        if name not in recipe.stages or (name == "teacher" and recipe.run.teacher_model is not None):
            continue
        needed, rows = args.train_batch_size * args.world_size, captioned + (others if name == "student" else 0)
        if args.dataloader_drop_last and rows < needed:
            raise ValueError(
                f"Expected at least {needed} images to train on, a batch of {args.train_batch_size} for each of "
                f"{args.world_size} process{'' if args.world_size == 1 else 'es'}, got {rows}. Lower "
                f"{name}.per_device_train_batch_size, or give more images."
            )
        batches = rows // needed if args.dataloader_drop_last else math.ceil(rows / needed)
        warn_of_warm_up(args, name, _count_steps(args, batches))


def _count_steps(args: StageTrainingArguments, batches: int) -> int:
    """How many steps the base class of the trainers takes with so many batches in an epoch."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


FEW_IMAGES = 100  # of which one is a point of R@1


def describe_few(images: int) -> str:
    """What so few images cannot tell; nothing of [`FEW_IMAGES`] or more.

    Example:
        >>> describe_few(15), describe_few(100)
        ('each image is 6.7 points of R@1, so only a large difference shows', '')
    """
    points = f"{100 / images:.1f} points of R@1"
    return "" if images >= FEW_IMAGES else f"each image is {points}, so only a large difference shows"


def attach_regions(images: Splits, places: Places | None) -> Splits:
    """Add the regions of the stage `regions` to images.

    Args:
        images (`dict[str, KeyedRows]`): From [`load_training_images`].
        places ([`Places`] or `None`): Of a run with that stage. `None` keeps the images' own boxes.

    Returns:
        `dict[str, KeyedRows]`: Images that the detector skipped are left out. The keys are those of whole rows.

    Raises:
        FileNotFoundError: If the stage was not run.
    """
    data = {}
    for split, (rows, keys) in images.items():
        if places is not None:
            key_of = dict(zip(rows["image_id"][:], keys, strict=True))
            rows = attach_columns(rows, load_from_disk(places.made("regions", split) / split))
            keys = [key_of[image_id] for image_id in rows["image_id"][:]]
        data[split] = KeyedRows(rows, row_keys(rows, keys))
    return data


def student_splits(data: Splits) -> list[KeyedRows]:
    """The splits that the student trains on, in order: the captioned images, then those without captions."""
    return [data[split] for split in ("train", UNCAPTIONED) if split in data]


def share_pixels(data: Splits, image_processor: BaseImageProcessor, cache_mib: int, shared: SharedData) -> PixelReader:
    """A reader of the pixels of the student's training rows, one for all runs with the same rows and processor.

    Args:
        data (`dict[str, KeyedRows]`): From [`attach_regions`].
        image_processor (`BaseImageProcessor`): The student's.
        cache_mib (`int`): Memory for decoded pixels in MiB.
        shared ([`SharedData`]): Holds the readers.

    Returns:
        [`PixelReader`]
    """
    splits = student_splits(data)
    settings = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
    key = (*(split.key for split in splits), settings, cache_mib)
    if key not in shared.pixels:
        images = concatenate_shared([split.rows.select_columns(["image_id", "image"]) for split in splits])
        shared.pixels[key] = PixelReader(images, image_processor, cache_mib)
    return shared.pixels[key]


@dataclass(frozen=True)
class Clip:
    """The CLIP that teacher and student start from.

    Args:
        path (`str`): Folder or Hub id.
        key (`str`): Key of its weights and its processor.
    """

    path: str
    key: str


def find_clip(recipe: Recipe, places: Places) -> str:
    """Folder or Hub id of the CLIP that a run starts from.

    Args:
        recipe ([`Recipe`]): Names it in `clip_model`, or has it made by the stage `anchor`.
        places ([`Places`]): Of the run.

    Returns:
        `str`

    Raises:
        FileNotFoundError: If it is the run's own anchor, and the stage was not run.
    """
    named = recipe.run.clip_model
    return str(places.made("anchor", "config.json", "clip_model")) if named is None else PRESETS.get(named, named)


def file_states(path: str) -> str:
    """A key of the files in a model's folder by name, size and time, and of a Hub id by the name alone."""
    files = [file for file in list_folder(path) if file.is_file()]
    return json.dumps([path, [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]])


def read_clip(path: str, shared: SharedData | None = None) -> Clip:
    """Compute the key of a CLIP. It is read once for all runs, and again if a file changes in between.

    Args:
        path (`str`): Folder or Hub id.
        shared ([`SharedData`], *optional*): Holds CLIPs that an earlier run read.

    Returns:
        [`Clip`]

    Raises:
        OSError: If there is none.
        ValueError: If weights are missing or damaged, the tokenizer's end token is not the text encoder's, or it is
            not known how the text encoder makes one vector of a text's tokens.
    """
    clips = {} if shared is None else shared.clips
    if (read := file_states(path)) not in clips:
        processor, student = load_processor(path), load_student(path)
        check_vocabulary(student, processor.tokenizer, path)
        check_end_token(student, processor.tokenizer, path)
        require_known_pooling(student, path)
        key = combine_keys([fingerprint_model(student), fingerprint_processor(processor)])
        clips[read] = Clip(path, key)
    return clips[read]


def find_teacher(recipe: Recipe, places: Places) -> str:
    """Folder or Hub id of the trained teacher.

    Args:
        recipe ([`Recipe`]): Names it in `teacher_model`, or has it made by the stage `teacher`.
        places ([`Places`]): Of the run.

    Returns:
        `str`

    Raises:
        FileNotFoundError: If it is the run's own teacher, and the stage was not run.
    """
    return recipe.run.teacher_model or str(places.made("teacher", "config.json", "teacher_model"))


def check_uncaptioned(recipe: Recipe) -> None:
    """As [`check_uncaptioned_fields`], and check the config of the recipe's `teacher_model`.

    Args:
        recipe ([`Recipe`]): Parsed; of one arm.

    Raises:
        OSError: If there is no such teacher.
        ValueError: As [`check_uncaptioned_fields`]; also if that teacher reads captions.
    """
    check_uncaptioned_fields(recipe)
    run = recipe.run
    if run.uncaptioned_datasets and run.teacher_model is not None and recipe.student.reads_teacher:
        config = DCLIPTeacherConfig.from_pretrained(run.teacher_model)
        require_leak_free(f"cross_attention of teacher_model '{run.teacher_model}'", config.cross_attention)


def load_student(clip_path: str, position_embedding_type: str = "absolute") -> Any:
    """Load a dual encoder that will become a student.

    A CLIP becomes a model of this package; a model of another family of transformers stays what it is.

    Args:
        clip_path (`str`): Folder or Hub id of a dual encoder of [`~modeling_dclip.encoders.loading.STUDENT_ENCODERS`].
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`): `rope` gives a CLIP rotary positions.

    Returns:
        `PreTrainedModel`: Pretrained weights in float32; all but the image side is frozen.

    Raises:
        WrongModelError: If it is of another kind.
        ValueError: If a weight is missing, as in a teacher's folder or one tower's, or one is NaN or infinite; or if
            rotary positions are asked for and it is no CLIP.
    """
    stored = read_config(clip_path, STUDENT_ENCODERS)
    check_positions(stored, position_embedding_type)
    if (own := DUAL_ENCODERS.get(stored.model_type)) is None:
        return freeze_text_side(load_checked(AutoModel, clip_path))
    config = own.config_class.from_pretrained(clip_path)
    config.freeze_text = True
    if stored.model_type in READ_AS_CLIP:
        set_positions(config.vision_config, position_embedding_type)
    return load_checked(own, clip_path, config=config)


ROTARY_START = {"rotary_scale": 0.3, "rotary_table": True}  # docs/results.md, rotary positions


def set_positions(vision_config: PreTrainedConfig, position_embedding_type: str) -> None:
    """Ask for a kind of positions in the configuration of a CLIP's image encoder, in place.

    A model with absolute positions that gets rotary ones keeps its table beside a slow rotation, so that it starts
    almost as it is. A model that is rotary already stays as it was saved.

    Args:
        vision_config ([`DCLIPVisionConfig`]): Of a pretrained model.
        position_embedding_type (`str`): `absolute` or `rope`.
    """
    if position_embedding_type == "rope" != vision_config.position_embedding_type:
        for name, value in ROTARY_START.items():
            setattr(vision_config, name, value)
    vision_config.position_embedding_type = position_embedding_type


READ_AS_CLIP = ("clip", "dclip")  # have a table of positions that rotary ones can replace


def check_positions(config: PreTrainedConfig, position_embedding_type: str) -> None:
    """Refuse rotary positions in an image encoder that is no CLIP's.

    Args:
        config (`PreTrainedConfig`): Of the dual encoder.
        position_embedding_type (`str`): `absolute` or `rope`.

    Raises:
        ValueError: Naming the field.
    """
    if position_embedding_type != "absolute" and config.model_type not in READ_AS_CLIP:
        raise ValueError(
            f"position_embedding_type: expected absolute for a model of type {config.model_type!r}, got "
            f"{position_embedding_type}. Only a CLIP's positions can be replaced. Leave it out."
        )


def freeze_text_side(model: Any) -> Any:
    """Turn off the gradient of all that is not on the image side of a dual encoder, and return it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(image_modules(model)))
    return model


def load_matching_teacher(teacher_path: str, clip_path: str) -> DCLIPTeacher:
    """Load a trained teacher around the CLIP that a student starts from.

    Args:
        teacher_path (`str`): Folder or Hub id of the teacher.
        clip_path (`str`): Folder or Hub id of the CLIP.

    Returns:
        [`DCLIPTeacher`]: In float32, in eval mode.

    Raises:
        OSError: If there is no such teacher.
        ValueError: If a weight is missing or damaged, or the teacher is around another CLIP.
    """
    teacher = load_checked(DCLIPTeacher, teacher_path)
    _check_same_clip(teacher, teacher_path, clip_path)
    return teacher


def _check_same_clip(teacher: DCLIPTeacher, teacher_path: str, clip_path: str) -> None:
    student = load_student(clip_path)
    families = [config.model_type for config in (student.config, teacher.config.clip_config)]
    if len(set(families)) > 1:
        raise ValueError(
            f"Expected a teacher around a model of the student's type {families[0]!r} ({clip_path}), got one around a "
            f"{families[1]!r} ({teacher_path}). Distil from a teacher around the same model."
        )
    expected, got = shared_width(student.config), teacher.config.projection_dim
    if expected != got:
        raise ValueError(
            f"Expected a teacher of the student's width {expected} ({clip_path}), got {got} ({teacher_path}). Distil "
            "from a teacher around the same CLIP."
        )
    # A teacher saved in a shorter type than its CLIP holds the CLIP's weights rounded.
    theirs, ours = teacher.clip.state_dict(), cast_weights(student.state_dict(), stored_dtype(teacher_path))
    if theirs.keys() != ours.keys() or any(not torch.equal(theirs[name].float(), ours[name].float()) for name in ours):
        raise ValueError(
            f"The teacher '{teacher_path}' holds another CLIP than the student starts from ('{clip_path}'), so their "
            "embeddings are in different spaces. Train the teacher around this CLIP, or set clip_model to the "
            "teacher's."
        )
