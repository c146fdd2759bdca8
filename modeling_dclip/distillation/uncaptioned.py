"""Images that the student learns from the teacher alone: whether a recipe can use them, and which of them are new."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from datasets import Dataset

from modeling_dclip.configuration_dclip import DCLIPTeacherConfig
from modeling_dclip.data.caption_rows import require_rows
from modeling_dclip.data.captions import load_uncaptioned
from modeling_dclip.data.columns import image_keys

logger = logging.getLogger(__name__)

UNCAPTIONED = "uncaptioned"  # their split, which only the student sees
_STAGES = {"regions", "teacher", "targets", "student"}  # that see them or decide what the student learns from them


def check_uncaptioned_fields(recipe: Any) -> None:
    """Refuse a recipe whose fields say that nothing can be learned from the images of `uncaptioned_datasets`.

    Args:
        recipe ([`~modeling_dclip.distillation.recipes.Recipe`]): Parsed; of one arm.

    Raises:
        ValueError: If no loss term can use such images, the recipe's teacher reads captions, or there is no student; the message names
            the field.
    """
    run, student = recipe.run, recipe.student
    if not run.uncaptioned_datasets or (run.stages and not _STAGES & set(run.stages)):
        return
    if "dmclip" in recipe.named:
        raise ValueError(
            "uncaptioned_datasets: only the stage student learns from them, and this recipe trains a DM-CLIP."
        )
    if not (student.cosine_distillation_loss_weight or student.cosine_preservation_loss_weight):
        raise ValueError(
            "uncaptioned_datasets: no term of the loss can use an image without a caption. Set student.cosine_distillation_loss_weight or "
            "student.cosine_preservation_loss_weight above 0."
        )
    if student.reads_teacher and run.teacher_model is None:
        _require_leak_free("teacher.cross_attention", recipe.teacher.cross_attention)


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
        _require_leak_free(f"cross_attention of teacher_model '{run.teacher_model}'", config.cross_attention)


def _require_leak_free(field: str, cross_attention: str) -> None:
    if cross_attention != "regions":
        raise ValueError(
            f"uncaptioned_datasets: expected {field} to be 'regions', a teacher that reads no caption, got {cross_attention!r}. Set it so, "
            "or leave uncaptioned_datasets out."
        )


def load_new_images(
    specs: list[str], *, seed: int, exclude_ids: Collection[str], captioned: Mapping[str, tuple[Dataset, list[str]]]
) -> tuple[Dataset, list[str]]:
    """Load the images of `uncaptioned_datasets` that are not among the captioned ones.

    Args:
        specs (`list[str]`): Of [`load_uncaptioned`].
        seed (`int`): Of the draws.
        exclude_ids (`Collection[str]`): Ids of captioned images and of those that must not be trained on.
        captioned (`Mapping`): Captioned rows and the keys of their images, by split. The same file under another id is left out too.

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
