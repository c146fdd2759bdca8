"""Where an encoder looks: maps over pictures of what an image encoder reads, and a teacher's attention over regions.

Maps of an image encoder, by [`image_maps`]; the value of a place is

- `attention_rollout` (ViT): its share of what reaches the class token through all layers, where attention and skip
  connection count alike;
- `class_attention` (ViT): its share of the class token's attention in the last layer, averaged over heads;
- `text_relevance` (ViT): how much the attention to it raises the cosine of image and text through all layers, >= 0;
- `text_similarity` (ViT): the cosine of its own embedding and the text's, with a last layer in which each place reads
  only itself;
- `text_similarity` (DM-CLIP): what it adds to the cosine of image and text; the mean over places **is** that cosine.

The first two do not depend on the text: attention says what is read, not what it is used for. A ViT's last layer mixes
places, so its output at a patch says little about that patch; hence the form of the fourth map. Nothing in CLIP's
training brings a patch near a text, so even this map misleads: pictures of the demo's anchor show objects *less*
similar than their background. Prefer the third map. DM-CLIP averages its last feature map and projects linearly, so
the fifth is exact.

Sources: rollout, "Quantifying Attention Flow in Transformers", arXiv 2005.00928; relevance, "Generic Attention-model
Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers", arXiv 2103.15679; the last layer's values
in place of its attention, MaskCLIP, "Extract Free Dense Labels from CLIP", arXiv 2112.01071; an averaged map taken
apart, "Learning Deep Features for Discriminative Localization" (CAM), arXiv 1512.04150.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image

from modeling_dclip.data.images import PixelReader, decode_image
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.families import WrongModelError
from modeling_dclip.encoders.loading import load_checked, load_processor
from modeling_dclip.evaluation.embedding import embed_texts
from modeling_dclip.evaluation.reports.plots import plot_image_maps, plot_region_attention
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor, as_rgb

LONGEST_DRAWN = 1600  # pixels


class RegionShares(NamedTuple):
    """What a teacher looked at.

    Attributes:
        boxes (`np.ndarray` of shape `(R, 4)`): xyxy, in pixels of the image that was given.
        scores (`np.ndarray` of shape `(R,)`): The detector's.
        shares (`np.ndarray` of shape `(R,)`): Of the teacher's attention; they sum to 1.
    """

    boxes: np.ndarray
    scores: np.ndarray
    shares: np.ndarray


def attention_rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Follow attention through all layers: how much of each input token is in each output token.

    Heads are averaged; a layer is half its attention, half the skip connection; layers are multiplied.

    Source: arXiv 2005.00928, section 3. Deviation: none.

    Args:
        attentions (`Sequence[torch.Tensor]`): Of each layer, first to last, `(B, heads, T, T)`, rows summing to 1.

    Returns:
        `torch.Tensor` of shape `(B, T, T)`: Rows sum to 1.

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> attention_rollout([torch.full((1, 2, 2, 2), 0.5)]).tolist()
        [[[0.75, 0.25], [0.25, 0.75]]]
    """
    if not len(attentions):
        raise ValueError("Expected the attention of one or more layers, got none.")
    flow = torch.eye(attentions[0].shape[-1], device=attentions[0].device).expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        layer = attention.float().mean(dim=1)
        flow = (layer @ flow + flow) / 2  # (A + I) / 2, times what came before
    return flow


def attention_relevance(attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Follow through all layers only the attention that raises a score.

    Per layer, attention times the score's gradient, negative values cut, averaged over heads; layers add up along the
    skip connection.

    Source: arXiv 2103.15679, equations 5 and 6 for self-attention. Deviation: none.

    Args:
        attentions, gradients (`Sequence[torch.Tensor]`): Of each layer, first to last, `(B, heads, T, T)`.

    Returns:
        `torch.Tensor` of shape `(B, T, T)`: >= 0.

    Raises:
        ValueError: If there is no layer, or not one gradient a layer.
    """
    if not len(attentions) or len(attentions) != len(gradients):
        raise ValueError(
            f"Expected one gradient for each of one or more layers, got {len(gradients)} for {len(attentions)}."
        )
    relevance = torch.eye(attentions[0].shape[-1], device=attentions[0].device).expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (attention * gradient).float().clamp(min=0).mean(dim=1) @ relevance
    return relevance


@contextmanager
def _eager(tower: torch.nn.Module) -> Iterator[None]:
    """Let a tower return its attention for a while: fused implementations keep none."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


def _shares(of_class: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The class token's row as a map that sums to 1 over patches: `(B, 1 + P)` to `(B, rows, columns)`."""
    patches = of_class[:, 1:]
    return (patches / patches.sum(dim=1, keepdim=True)).unflatten(1, grid)


def _patches_alone(model: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Project each patch through a last layer in which it attends to itself only: `(B, P, D)`, unit length."""
    tower = model.vision_model
    layer = tower.encoder.layers[-1]
    attention = layer.self_attn
    hidden_states = hidden_states + attention.out_proj(attention.v_proj(layer.layer_norm1(hidden_states)))
    hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
    return F.normalize(model.visual_projection(tower.post_layernorm(hidden_states[:, 1:])).float(), dim=-1)


@torch.no_grad()
def image_maps(
    model: torch.nn.Module, pixel_values: torch.Tensor, text_embeds: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Compute the maps of images, each with one text.

    Args:
        model (`torch.nn.Module`): A CLIP or DCLIP with a ViT, or a DM-CLIP, in eval mode.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): On the model's device.
        text_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; one text for each image.

    Returns:
        `dict[str, torch.Tensor]`: The maps listed at the top of this module, by name; each float32
            `(B, rows, columns)` on the CPU, rows from the top.

    Raises:
        WrongModelError: If the image encoder is neither.
        ValueError: If the number of texts is not the number of images.
    """
    tower = getattr(model, "vision_model", None)
    is_vit = hasattr(tower, "encoder") and hasattr(tower, "post_layernorm") and hasattr(model, "visual_projection")
    if not is_vit and not hasattr(tower, "stages"):
        raise WrongModelError(
            f"Expected a CLIP or DCLIP with a ViT, or a DM-CLIP, to draw maps of, got {type(model).__name__}."
        )
    if len(text_embeds) != len(pixel_values):
        raise ValueError(f"Expected one text an image, got {len(text_embeds)} texts and {len(pixel_values)} images.")
    texts = F.normalize(text_embeds.to(pixel_values.device).float(), dim=1)
    if not is_vit:
        outputs = tower(pixel_values, return_dict=True)
        places = tower.projection(outputs.last_hidden_state.permute(0, 2, 3, 1)).float()  # (B, rows, columns, D)
        norms = outputs.image_embeds.float().norm(dim=1)
        return {"text_similarity": (torch.einsum("bhwd,bd->bhw", places, texts) / norms[:, None, None]).cpu()}
    patch = tower.config.patch_size
    grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    with _eager(tower), torch.enable_grad():
        pixel_values = pixel_values.detach().requires_grad_()  # so that attention has a gradient in a frozen model
        outputs = tower(pixel_values, output_attentions=True, output_hidden_states=True, return_dict=True)
        embeds = F.normalize(model.visual_projection(outputs.pooler_output).float(), dim=1)
        gradients = torch.autograd.grad((embeds * texts).sum(), outputs.attentions)
    attentions = [attention.detach() for attention in outputs.attentions]
    alone = _patches_alone(model, outputs.hidden_states[-2])  # the input of the last layer
    maps = {
        "attention_rollout": _shares(attention_rollout(attentions)[:, 0], grid),
        "class_attention": _shares(attentions[-1].float().mean(dim=1)[:, 0], grid),
        "text_relevance": attention_relevance(attentions, gradients)[:, 0, 1:].unflatten(1, grid),
        "text_similarity": (alone @ texts[:, :, None])[..., 0].unflatten(1, grid),
    }
    return {name: values.cpu() for name, values in maps.items()}


def _as_pictures(pixel_values: torch.Tensor, image_processor: Any) -> np.ndarray:
    """Undo the normalisation: from `(B, 3, H, W)` to `(B, H, W, 3)` in [0, 1], as the encoder saw it."""
    mean, deviation = (
        torch.tensor(getattr(image_processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    return (pixel_values * deviation + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def draw_image_maps(
    encoder: Encoder,
    dataset: Dataset,
    path: str | os.PathLike,
    *,
    rows: Sequence[int] = (0, 1, 2, 3),
    texts: Sequence[str] | None = None,
) -> None:
    """Draw the maps of some images of a dataset on what the encoder sees of them: resized and cropped.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): With a model as in [`image_maps`]; its mode is restored.
        dataset (`datasets.Dataset`): With `image_id`, `image` and `captions`.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        rows (`Sequence[int]`, *optional*): One or more rows of the dataset; its first four if not given.
        texts (`Sequence[str]`, *optional*): One for each row; each image's first caption if not given.

    Raises:
        ImportError: If matplotlib is not installed.
        WrongModelError: As in [`image_maps`].
        ValueError: If a row does not exist, the number of texts is not that of the rows, an image or a text is bad, or
            the file is no `.png`.
    """
    outside = [row for row in rows if not 0 <= row < len(dataset)]
    if not len(rows) or outside:
        raise ValueError(f"Expected one or more rows in [0, {len(dataset)}), got {list(rows)}.")
    texts = [dataset["captions"][row][0] for row in rows] if texts is None else list(texts)
    if len(texts) != len(rows):
        raise ValueError(f"Expected one text a row, got {len(texts)} texts and {len(rows)} rows.")
    image_processor = encoder.processor.image_processor
    pixel_values = PixelReader(dataset, image_processor, cache_mib=0).read(np.array(rows))
    text_embeds = embed_texts(encoder, texts)
    with encoder.evaluating() as device:
        maps = image_maps(encoder.model, pixel_values.to(device), text_embeds)
    pictures = _as_pictures(pixel_values, image_processor)
    plot_image_maps(pictures, {name: values.numpy() for name, values in maps.items()}, texts, path)


def draw_teacher_attention(teacher: str | Path, dataset: Dataset, path: str | Path, *, row: int = 0) -> None:
    """Draw a teacher's attention over the regions of one row, as [`draw_attention`] does.

    Args:
        teacher (`str` or `Path`): Folder of a trained teacher with its processor.
        dataset (`datasets.Dataset`): With `image`, `captions`, `boxes`, `box_scores`.
        path (`str` or `Path`): A `.png` file.
        row (`int`, *optional*, defaults to 0): Which row; its first caption is used.

    Raises:
        ValueError: If the dataset has no boxes, or the image cannot be read.
    """
    if "boxes" not in dataset.column_names:
        raise ValueError(f"Expected the column 'boxes' to draw attention over, got {dataset.column_names}.")
    model = load_checked(DCLIPTeacher, teacher)
    processor = load_processor(teacher, DCLIPTeacherProcessor)
    sample = dataset.remove_columns("image")[row]
    regions = (np.array(sample["boxes"]), np.array(sample["box_scores"]))
    draw_attention(model, processor, decode_image(dataset, row), regions, sample["captions"][0], path)


@torch.no_grad()
def draw_attention(
    model: DCLIPTeacher,
    processor: DCLIPTeacherProcessor,
    image: Image.Image,
    regions: tuple[np.ndarray, np.ndarray],
    caption: str,
    path: str | Path,
) -> RegionShares:
    """Draw a teacher's attention over the regions of an image.

    Of a teacher that reads text, the picture shows the region weights, and beside them which token attends to which
    region, averaged over heads. The leak-free teacher reads no text: the picture shows what the whole image attends to
    in the last layer, averaged over heads and normalised over the regions.

    Args:
        model ([`DCLIPTeacher`]): In eval mode, on the CPU.
        processor ([`DCLIPTeacherProcessor`]): The teacher's.
        image (`PIL.Image.Image`): Any size and mode. Drawn with at most [`LONGEST_DRAWN`] pixels a side.
        regions (`tuple`): Boxes `(R, 4)` xyxy in pixels and their scores `(R,)`.
        caption (`str`): Written above the picture. A teacher that reads text reads it.
        path (`str` or `Path`): A `.png` file.

    Returns:
        [`RegionShares`]: The regions as the teacher read them, in the order of the numbers in the drawing.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an input is not valid, or the file is no `.png`.
    """
    boxes, scores = regions
    inputs = processor(text=[caption], images=[image], boxes=[boxes], box_scores=[scores])
    outputs = model(**inputs, output_attentions=True)
    token_attention, tokens = None, None
    if outputs.region_attentions is not None:
        weights = outputs.region_attentions[-1][0].mean(dim=0)[0, 1:]
        weights = weights / weights.sum()
        note = "Percent: what the whole image attends to in the last layer, mean over heads."
    else:
        weights = outputs.region_weights[0]
        note = "Percent: the weight of each region in the teacher's embedding."
    if outputs.text_to_image_attentions is not None:
        token_attention = outputs.text_to_image_attentions[0].mean(dim=0)  # (T, R)
        _, _, is_read = model.encode_text(inputs["input_ids"], inputs["attention_mask"])  # no start, end or padding
        input_ids = inputs["input_ids"][0, -is_read.shape[1] :][is_read[0]]
        tokens = [
            token.removesuffix("</w>").removeprefix("▁")  # how CLIP's, and sentencepiece's, mark a word
            for token in processor.tokenizer.convert_ids_to_tokens(input_ids)
        ]
        token_attention = token_attention[is_read[0]].numpy()
    drawn = as_rgb(image).copy()
    drawn.thumbnail((LONGEST_DRAWN, LONGEST_DRAWN))  # matplotlib holds a picture several times, in floats
    fractions = inputs["region_boxes"][0].numpy()
    boxes = fractions * np.tile(drawn.size, 2)
    plot_region_attention(drawn, boxes, weights.numpy(), caption, path, token_attention, tokens=tokens, note=note)
    return RegionShares(fractions * np.tile(image.size, 2), inputs["region_scores"][0].numpy(), weights.numpy())
