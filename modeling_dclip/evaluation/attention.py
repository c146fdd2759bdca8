"""What a teacher looks at: its attention over the regions of one image, drawn on the image."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from modeling_dclip.evaluation.plots import plot_region_attention
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor


def draw_teacher_attention(teacher: str | Path, dataset: Dataset, path: str | Path, *, row: int = 0) -> None:
    """Draw a teacher's attention over the regions of one row, as [`draw_attention`] does.

    Args:
        teacher (`str` or `Path`): Folder of a trained teacher with its processor.
        dataset (`datasets.Dataset`): With `image`, `captions`, `boxes`, `box_scores`.
        path (`str` or `Path`): A `.png` file.
        row (`int`, *optional*, defaults to 0): Which row; its first caption is used.

    Raises:
        ValueError: If the dataset has no boxes.
    """
    if "boxes" not in dataset.column_names:
        raise ValueError(f"Expected the column 'boxes' to draw attention over, got {dataset.column_names}.")
    model = DCLIPTeacher.from_pretrained(teacher, dtype=torch.float32).eval()
    processor = DCLIPTeacherProcessor.from_pretrained(teacher)
    sample = dataset[row]
    regions = (np.array(sample["boxes"]), np.array(sample["box_scores"]))
    draw_attention(model, processor, sample["image"], regions, sample["captions"][0], path)


@torch.no_grad()
def draw_attention(
    model: DCLIPTeacher,
    processor: DCLIPTeacherProcessor,
    image: Image.Image,
    regions: tuple[np.ndarray, np.ndarray],
    caption: str,
    path: str | Path,
) -> None:
    """Draw a teacher's attention over the regions of an image.

    With text in the teacher: the region weights, and beside them which token attends to which region, averaged over heads. The leak-free
    teacher reads no text: what the whole image attends to in the last layer, averaged over heads, renormalised over the regions.

    Args:
        model ([`DCLIPTeacher`]): In eval mode.
        processor ([`DCLIPTeacherProcessor`]): Its own.
        image (`PIL.Image.Image`): Any size.
        regions (`tuple`): Boxes `(R, 4)` xyxy in pixels and their scores `(R,)`.
        caption (`str`): Written above; read where the teacher reads text.
        path (`str` or `Path`): A `.png` file.
    """
    boxes, scores = regions
    inputs = processor(text=[caption], images=[image], boxes=[boxes], box_scores=[scores])
    outputs = model(**inputs, output_attentions=True)
    token_attention, tokens = None, None
    if outputs.region_attentions is not None:
        weights = outputs.region_attentions[-1][0].mean(dim=0)[0, 1:]
        weights = weights / weights.sum()
    else:
        weights = outputs.region_weights[0]
    if outputs.text_to_image_attentions is not None:
        token_attention = outputs.text_to_image_attentions[0].mean(dim=0)  # (T, R)
        input_ids = inputs["input_ids"][0, 1 : 1 + len(token_attention)]
        is_word = input_ids != processor.tokenizer.eos_token_id  # EOS is no token of the teacher's, padding neither
        tokens = [
            token.removesuffix("</w>") for token in processor.tokenizer.convert_ids_to_tokens(input_ids[is_word])
        ]
        token_attention = token_attention[is_word].numpy()
    boxes = inputs["region_boxes"][0].numpy() * np.tile(image.size, 2)
    plot_region_attention(image, boxes, weights.numpy(), caption, path, token_attention, tokens=tokens)
