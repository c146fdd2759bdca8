"""A recipe at work: what its stages share, read when first asked for."""

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.data.captions import karpathy_test_ids, load_mix, split_train_validation
from modeling_dclip.data.columns import attach_columns, combine_keys, concatenate_shared, image_keys, row_keys
from modeling_dclip.data.pixels import PixelReader
from modeling_dclip.data.teacher_features import fingerprint_model, fingerprint_processor
from modeling_dclip.distillation.arguments import STAGES
from modeling_dclip.distillation.recipes import Recipe
from modeling_dclip.distillation.records import StageRecord
from modeling_dclip.distillation.student import load_student
from modeling_dclip.distillation.uncaptioned import UNCAPTIONED, load_new_images
from modeling_dclip.processing_dclip import DCLIPProcessor

logger = logging.getLogger(__name__)


class SharedData:
    """What several runs of one process need not read twice: images and their pixels, by what selects them, and teachers' fingerprints."""

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
        """The images as loaded, by split, with the keys of their images; those without captions are the split `uncaptioned`."""
        run = self.recipe.run
        validates = any(args.eval_strategy.value != "no" for args in (self.recipe.teacher, self.recipe.student))
        if not run.train_datasets:
            raise ValueError("train_datasets: expected one or more specs of captioned images, got none.")
        if validates and run.train_fraction == 1:
            raise ValueError(
                "eval_strategy asks for rows to validate on, but train_fraction is 1: set it below 1, or eval_strategy to no."
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
        """See that the captioned images fill a batch, before anything looks at them; what is skipped later, the trainers notice.

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
                    f"Expected at least {needed} images to train on, one batch of {args.world_size} processes, got {rows}. Lower "
                    f"{name}.per_device_train_batch_size, or give more images."
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
                    "The captioned images have boxes of their own, those without captions none: there the teacher sees the whole image "
                    "alone. Name regions.detector to give both the same regions."
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
