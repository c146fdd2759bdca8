"""A recipe at work: what its stages share, read when first asked for."""

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, load_from_disk

from modeling_dclip.configuration_dclip import PRESETS, DCLIPConfig, DCLIPTeacherConfig
from modeling_dclip.data.captions import load_mix, load_uncaptioned, split_train_validation
from modeling_dclip.data.captions.files import karpathy_test_ids
from modeling_dclip.data.columns import attach_columns, concatenate_shared, image_keys, row_keys
from modeling_dclip.data.files import read_json, write_json
from modeling_dclip.data.images import PixelReader
from modeling_dclip.data.rows import require_rows
from modeling_dclip.distillation.arguments import STAGES
from modeling_dclip.distillation.recipes import UNCAPTIONED, Recipe, check_uncaptioned_fields, require_leak_free
from modeling_dclip.encoders.fingerprints import combine_keys, fingerprint_model, fingerprint_processor
from modeling_dclip.encoders.loading import load_checked
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor

logger = logging.getLogger(__name__)

RECORD_NAME = "stage.json"


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [
            line for name in names for line in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {str(old)[:60]} -> {str(new)[:60]}"]


class StageRecord:
    """The record of one stage.

    Args:
        folder (`Path`): The stage's own.
        inputs (`dict`): All that decides the result, as plain values: arguments, keys of data and of models.
        overwrite (`bool`): Delete what other inputs made instead of raising.

    Raises:
        ValueError: If the folder was made from other inputs; the message says which and what to do.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], overwrite: bool = False):
        self.folder, self.inputs = folder, json.loads(json.dumps(inputs))
        self.path = folder / RECORD_NAME
        self.finished = False
        stored = self._read()
        PartialState().wait_for_everyone()  # all have read before the first one writes
        if stored is not None and stored["inputs"] != self.inputs:
            changes = "; ".join(_differences(stored["inputs"], self.inputs))
            if not overwrite:
                raise ValueError(
                    f"'{folder}' was made from other inputs ({changes}). Name another --output_dir, or pass "
                    "--overwrite true to delete the folder and make it again."
                )
            logger.warning("%s: made again, inputs changed: %s", folder.name, changes)
            if PartialState().is_main_process:
                shutil.rmtree(folder)
            stored = None
        if stored is not None:
            self.finished = stored["finished"]
        if stored is None:
            self._write(finished=False)

    def finish(self) -> None:
        """Note that the stage is done."""
        self.finished = True
        self._write(finished=True)
        logger.info("%s: wrote %s", self.folder.name, self.folder)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.is_file():
            return None
        return read_json(self.path, "record")

    def _write(self, finished: bool) -> None:
        if PartialState().is_main_process:
            write_json(self.path, {"finished": finished, "inputs": self.inputs}, indent=2)
        PartialState().wait_for_everyone()


def finished_inputs(folder: Path) -> dict[str, Any]:
    """What a finished stage was made from.

    Raises:
        FileNotFoundError: If the stage was not run.
        ValueError: If it did not finish.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"No {RECORD_NAME} in '{folder}': run the stage {folder.name!r} first.")
    record = read_json(path, "record")
    if not record["finished"]:
        raise ValueError(
            f"The stage in '{folder}' did not finish. Run the stage {folder.name!r} again; it goes on where it was."
        )
    return record["inputs"]


class SharedData:
    """What several runs of one process need not read twice:
    images and their pixels, by what selects them, and teachers' fingerprints.
    """

    def __init__(self):
        self.sources: dict[str, dict[str, tuple[Dataset, list[str]]]] = {}
        self.captioned_ids: dict[str, set[str]] = {}
        self.pixels: dict[tuple, PixelReader] = {}
        self.fingerprints: dict[str, str] = {}  # of the teachers of reinforced data, by their specs


class Run:
    """A recipe with what its stages share, read when first asked for.

    Args:
        recipe ([`Recipe`]): Parsed.
        shared ([`SharedData`], *optional*): Of runs before it in this process.
    """

    def __init__(self, recipe: Recipe, shared: SharedData | None = None):
        self.recipe = recipe
        self.shared = SharedData() if shared is None else shared
        self.folder = Path(recipe.run.output_dir)
        self.cache_dir = Path(recipe.run.cache_dir or self.folder / "cache")

    @property
    def stages(self) -> list[str]:
        """The stages to run, in order: those asked for, else those the recipe needs."""
        recipe = self.recipe
        reinforced = "dmclip" in recipe.named
        needed = {
            "anchor": recipe.run.clip_model is None and (not reinforced or "anchor" in recipe.named),
            "regions": not reinforced and self.uses_detector,
            "teacher": not reinforced and recipe.student.reads_teacher and recipe.run.teacher_model is None,
            "targets": not reinforced,
            "student": not reinforced,
            "reinforce": reinforced and recipe.dmclip.train_shards is None,
            "dmclip": reinforced,
        }
        return [name for name in STAGES if (name in recipe.run.stages if recipe.run.stages else needed[name])]

    @property
    def uses_detector(self) -> bool:
        """Whether rows go through the detector: for the teacher, or because it leaves bad images out."""
        regions = self.recipe.regions
        return regions.detector is not None and (self.recipe.student.reads_teacher or regions.on_bad_image == "skip")

    @property
    def clip_path(self) -> str:
        """Folder or Hub id of the CLIP that teacher and student start from.

        Raises:
            FileNotFoundError: If it is the run's own anchor and not there yet.
        """
        named = self.recipe.run.clip_model
        return str(self.made("anchor", "config.json", "clip_model")) if named is None else PRESETS.get(named, named)

    @property
    def teacher_path(self) -> str:
        """Folder or Hub id of the trained teacher."""
        return self.recipe.run.teacher_model or str(self.made("teacher", "config.json", "teacher_model"))

    @property
    def reinforce_folder(self) -> Path:
        """Where the stage reinforce writes, its shards in `shards`."""
        return Path(self.recipe.reinforce.folder or self.folder / "reinforce")

    def made(self, stage: str, file: str, instead: str) -> Path:
        """The folder of a stage that `file` shows to be done.

        Raises:
            FileNotFoundError: If it is not there; the message says which stage to run, or which field to set instead.
        """
        if not (self.folder / stage / file).exists():
            raise FileNotFoundError(
                f"No {file} in '{self.folder / stage}': run the stage {stage!r} first"
                + (f", or name {instead}." if instead else ".")
            )
        return self.folder / stage

    @cached_property
    def clip_key(self) -> str:
        """A key of the CLIP and its processor."""
        processor = DCLIPProcessor.from_pretrained(self.clip_path)
        return combine_keys([fingerprint_model(load_student(self.clip_path)), fingerprint_processor(processor)])

    @cached_property
    def sources(self) -> dict[str, tuple[Dataset, list[str]]]:
        """The images as loaded, by split, with the keys of their images;
        those without captions are the split `uncaptioned`.
        """
        run = self.recipe.run
        validates = any(args.eval_strategy.value != "no" for args in (self.recipe.teacher, self.recipe.student))
        if not run.train_datasets:
            raise ValueError("train_datasets: expected one or more specs of captioned images, got none.")
        if validates and run.train_fraction == 1:
            raise ValueError(
                "eval_strategy asks for rows to validate on, but train_fraction is 1: set it below 1, or "
                "eval_strategy to no."
            )
        selection = (run.train_datasets, run.exclude_karpathy, run.train_fraction, run.seed)
        key = json.dumps([*selection, self.recipe.regions.ignore_boxes, validates])
        if key not in self.shared.sources:
            dataset = self._without_boxes(load_mix(run.train_datasets, seed=run.seed, exclude_ids=self._excluded_ids))
            self.shared.captioned_ids[key] = set(dataset["image_id"][:])
            splits = self._split(dataset, validates)
            self.shared.sources[key] = {split: (rows, image_keys(rows)) for split, rows in splits.items()}
        return self.shared.sources[key] | self._uncaptioned(key)

    @cached_property
    def _excluded_ids(self) -> set[str]:
        return set().union(*(karpathy_test_ids(path) for path in self.recipe.run.exclude_karpathy))

    def _without_boxes(self, dataset: Dataset) -> Dataset:
        """The rows without boxes of their own where the recipe ignores them."""
        own = [name for name in ("boxes", "box_scores") if name in dataset.column_names]
        return dataset.remove_columns(own) if self.recipe.regions.ignore_boxes else dataset

    def _split(self, dataset: Dataset, validates: bool) -> dict[str, Dataset]:
        run = self.recipe.run
        if run.train_fraction == 1:
            return {"train": dataset}
        train, validation = split_train_validation(dataset, run.train_fraction, run.seed)
        return {"train": train, **({"validation": validation} if validates else {})}

    def check_batches(self) -> None:
        """See that the captioned images fill a batch, before anything looks at them; what is skipped later, the
        trainers notice.

        Raises:
            ValueError: If they do not, of a stage that will run; the message names the field to lower.
        """
        rows = len(self.sources["train"][0])
        for name in ("teacher", "student"):
            args = getattr(self.recipe, name)
            needed = args.train_batch_size * args.world_size
            alone = name == "teacher" or not self.recipe.run.uncaptioned_datasets
            if name in self.stages and alone and args.dataloader_drop_last and rows < needed:
                raise ValueError(
                    f"Expected at least {needed} images to train on, one batch of {args.world_size} processes, got "
                    f"{rows}. Lower {name}.per_device_train_batch_size, or give more images."
                )

    def _uncaptioned(self, captioned: str) -> dict[str, tuple[Dataset, list[str]]]:
        """The new images beside the captioned ones of a key, validation's and those held out included."""
        run, shared = self.recipe.run, self.shared
        if not run.uncaptioned_datasets:
            return {}
        key = json.dumps([UNCAPTIONED, captioned, run.uncaptioned_datasets])
        if key not in shared.sources:
            options = {"seed": run.seed, "captioned": shared.sources[captioned]}
            excluded = self._excluded_ids | shared.captioned_ids[captioned]
            rows, images = load_new_images(run.uncaptioned_datasets, exclude_ids=excluded, **options)
            shared.sources[key] = {UNCAPTIONED: (self._without_boxes(rows), images)}
            has_boxes = ["boxes" in dataset.column_names for dataset in (options["captioned"]["train"][0], rows)]
            if has_boxes == [True, False] and not self.uses_detector and self.recipe.student.reads_teacher:
                logger.warning(
                    "The captioned images have boxes of their own, those without captions none: there the teacher "
                    "sees the whole image alone. Name regions.detector to give both the same regions."
                )
        return shared.sources[key]

    @cached_property
    def data(self) -> dict[str, tuple[Dataset, list[str]]]:
        """The images with their regions, by split, and the keys of their rows."""
        data = {}
        for split, (dataset, images) in self.sources.items():
            if self.uses_detector:
                key_of = dict(zip(dataset["image_id"][:], images, strict=True))
                dataset = attach_columns(dataset, load_from_disk(self.made("regions", split, "") / split))
                images = [key_of[image_id] for image_id in dataset["image_id"][:]]
            data[split] = dataset, row_keys(dataset, images)
        return data

    @property
    def captioned_data(self) -> dict[str, tuple[Dataset, list[str]]]:
        """Of [`Run.data`] what a teacher trains and validates on."""
        return {split: data for split, data in self.data.items() if split != UNCAPTIONED}

    @property
    def data_keys(self) -> dict[str, str]:
        """One key of all rows, by split."""
        return {split: combine_keys(keys) for split, (_, keys) in self.data.items()}

    @property
    def student_splits(self) -> list[str]:
        """The splits whose rows, one after the other, the student trains on."""
        return [split for split in ("train", UNCAPTIONED) if split in self.data]

    def pixels(self, image_processor: Any, cache_mib: int) -> PixelReader:
        """Reads the pixels of the student's training rows."""
        settings = json.dumps(image_processor.to_dict(), sort_keys=True, default=str)
        key = (*(self.data_keys[split] for split in self.student_splits), settings, cache_mib)
        if key not in self.shared.pixels:
            images = [self.data[split][0].select_columns(["image_id", "image"]) for split in self.student_splits]
            self.shared.pixels[key] = PixelReader(concatenate_shared(images), image_processor, cache_mib)
        return self.shared.pixels[key]

    def record(self, stage: str, inputs: dict[str, Any], folder: Path | None = None) -> StageRecord:
        """The record of a stage of this run, in the stage's own folder if no other is given."""
        record = StageRecord(folder or self.folder / stage, inputs, self.recipe.run.overwrite)
        if record.finished:
            logger.info("%s: already finished from the same inputs, skipped (%s)", stage, record.folder)
        return record


# Images that the student learns from the teacher alone: whether a recipe can use them, and which of them are new.


def check_uncaptioned(recipe: Any) -> None:
    """As [`check_uncaptioned_fields`], and look into the config of the `teacher_model` that a recipe names.

    Raises:
        OSError: If there is no such teacher.
        ValueError: As there.
    """
    check_uncaptioned_fields(recipe)
    run = recipe.run
    if run.uncaptioned_datasets and run.teacher_model is not None and recipe.student.reads_teacher:
        config = DCLIPTeacherConfig.from_pretrained(run.teacher_model)
        require_leak_free(f"cross_attention of teacher_model '{run.teacher_model}'", config.cross_attention)


def load_new_images(
    specs: list[str], *, seed: int, exclude_ids: Collection[str], captioned: Mapping[str, tuple[Dataset, list[str]]]
) -> tuple[Dataset, list[str]]:
    """Load the images of `uncaptioned_datasets` that are not among the captioned ones.

    Args:
        specs (`list[str]`): Of [`load_uncaptioned`].
        seed (`int`): Of the draws.
        exclude_ids (`Collection[str]`): Ids of captioned images and of those that must not be trained on.
        captioned (`Mapping`): Captioned rows and the keys of their images, by split. The same file under another id is
            left out too.

    Returns:
        `tuple[Dataset, list[str]]`: The rows, without captions, and the keys of their images.

    Raises:
        FileNotFoundError, ValueError: As [`load_uncaptioned`]; also if none is left.
    """
    dataset = load_uncaptioned(specs, seed=seed, exclude_ids=exclude_ids)
    keys = image_keys(dataset)
    known = set().union(*(images for _, images in captioned.values()))
    new = [row for row, key in enumerate(keys) if key not in known]
    if len(new) < len(keys):
        left_out = len(keys) - len(new)
        logger.info("uncaptioned_datasets: left out %d images that are captioned ones under another id", left_out)
        require_rows(len(new), f"{specs} after leaving out {left_out} captioned images", "an image")
        dataset, keys = dataset.select(new), [keys[row] for row in new]
    logger.info("uncaptioned_datasets: %d images for the student alone", len(new))
    return dataset, keys


def load_student(clip_path: str, position_embedding_type: str = "absolute") -> DCLIPModel:
    """Load the dual encoder that becomes a student: pretrained weights in float32, text tower frozen.

    Args:
        clip_path (`str`): Folder or Hub id of a CLIP or of a model of this package.
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`): Of the student's image encoder.

    Raises:
        ValueError: If a weight is missing, as in a teacher's folder or one tower's.
    """
    config = DCLIPConfig.from_pretrained(clip_path)
    config.freeze_text = True
    config.vision_config.position_embedding_type = position_embedding_type
    return load_checked(DCLIPModel, clip_path, config=config)
