"""Drawn scenes with the targets of an untrained teacher, with all captions and with some."""

import pytest

SCENES = 16


@pytest.fixture(scope="session")
def distillation_data(tiny_clip_dir, tmp_path_factory):
    """Folder of drawn scenes with the targets of an untrained teacher around the tiny CLIP,
    as `load_from_disk` reads it.
    """
    import torch

    from modeling_dclip import DCLIPTeacher, DCLIPTeacherProcessor
    from modeling_dclip.data.columns import ragged_column, row_keys
    from modeling_dclip.data.scenes import load_scenes
    from modeling_dclip.data.teacher_targets import (
        FeatureOptions,
        add_teacher_targets,
        embed_negatives,
        with_negatives,
    )

    folder = tmp_path_factory.mktemp("targets")
    scenes = load_scenes("train", n=SCENES, captions_per_image=2, image_size=32, negatives=True)
    torch.manual_seed(0)
    teacher = DCLIPTeacher.from_clip(tiny_clip_dir).eval()
    processor = DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir)
    options = FeatureOptions(folder / "cache")
    dataset = add_teacher_targets(scenes, teacher, processor, options, keys=row_keys(scenes))
    negatives = ragged_column(scenes, "negatives")
    dataset = with_negatives(dataset, negatives, embed_negatives(negatives, teacher, processor, options))
    dataset.save_to_disk(folder / "data")
    return folder / "data"


@pytest.fixture(scope="session")
def partly_captioned_data(distillation_data, tmp_path_factory):
    """The same rows, two of three without captions and texts, as the images of `uncaptioned_datasets` are."""
    from datasets import Dataset, load_from_disk

    folder = tmp_path_factory.mktemp("partly_captioned")
    dataset = load_from_disk(distillation_data)
    rows = dataset.with_format(None).to_dict()
    for row in range(SCENES):
        if row % 3:
            for name in ("captions", "text_embeds", "negatives", "negative_embeds"):
                rows[name][row] = []
            rows["teacher_embeds"][row] = rows["teacher_embeds"][row][:1]
    Dataset.from_dict(rows, features=dataset.features).save_to_disk(folder / "data")
    return folder / "data"
