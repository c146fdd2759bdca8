"""The loss of reinforced training: several teachers' stored embeddings, averaged as probabilities.

Pure functions of a batch, as those of [`~modeling_dclip.distillation.losses`]; gather over processes first.

Source: "MobileCLIP", arXiv 2311.17049 [MC]; "Knowledge Distillation from Transformer to Mamba for an efficient CLIP" [M]; PAPERS.md.
Letters in shape comments: B batch, D embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from modeling_dclip.distillation.losses import (
    _check_same_batch,
    _check_same_width,
    _check_share,
    _check_temperature,
    _full_precision,
    _normalise,
)


def _teacher_slices(embeds: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
    if not widths or min(widths) < 1 or sum(widths) != embeds.shape[1]:
        raise ValueError(
            f"Expected embeddings as wide as the teachers {list(widths)} together ({sum(widths)}), got {embeds.shape[1]}. Name the "
            "teachers that made them, in their order."
        )
    return [_normalise(part) for part in embeds.split(list(widths), dim=1)]


@torch.no_grad()
def teacher_probabilities(
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    teacher_widths: Sequence[int],
    teacher_logit_scales: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What several teachers think together of who belongs to whom in a batch: the mean of their softmaxes.

    A mean of probabilities, not of similarities: each teacher may be sure in its own way, and none outvotes the others by a larger scale.

    Source: [MC] eq. 2; [M]; PAPERS.md. Deviation: none.

    Args:
        teacher_image_embeds, teacher_text_embeds (`torch.Tensor` of shape `(B, sum of widths)`): The teachers' embeddings side by side;
            each teacher's slice is normalised here. Constant.
        teacher_widths (`Sequence[int]`): Width of each slice, in order.
        teacher_logit_scales (`Sequence[float]`): What multiplies each teacher's cosines, > 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Image-to-text and text-to-image, each `(B, B)` float32, rows summing to 1.

    Raises:
        ValueError: If batch sizes differ, the widths do not sum to the embeddings', or scales and widths differ in number.

    Example:
        >>> teacher_probabilities(torch.eye(2), torch.eye(2), [2], [100.0])[0].round(decimals=6).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_same_width(teacher_image_embeds=teacher_image_embeds, teacher_text_embeds=teacher_text_embeds)
    if len(teacher_logit_scales) != len(teacher_widths) or not all(scale > 0 for scale in teacher_logit_scales):
        raise ValueError(
            f"Expected one logit scale > 0 for each of {len(teacher_widths)} teachers, got {list(teacher_logit_scales)}."
        )
    with _full_precision(teacher_image_embeds):
        images = _teacher_slices(teacher_image_embeds, teacher_widths)
        texts = _teacher_slices(teacher_text_embeds, teacher_widths)
        logits = [
            scale * image @ text.T for image, text, scale in zip(images, texts, teacher_logit_scales, strict=True)
        ]
        image_to_text = torch.stack([table.softmax(dim=-1) for table in logits]).mean(dim=0)
        text_to_image = torch.stack([table.T.softmax(dim=-1) for table in logits]).mean(dim=0)
        return image_to_text, text_to_image


def distillation_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    teacher_widths: Sequence[int],
    teacher_logit_scales: Sequence[float],
    temperature: float | torch.Tensor = 0.01,
    image_to_text_weight: float = 0.5,
) -> torch.Tensor:
    """Make the student believe of the batch what several teachers believe together.

    Cross-entropy from the teachers' mean softmax to the student's. Its gradient is that of the KL divergence, from which it differs by the
    teachers' entropy, so it ends above 0. Unlike [`~modeling_dclip.distillation.losses.similarity_distillation_loss`] it takes several
    teachers, whose widths have nothing to do with the student's.

    Source: [MC] eq. 2 and 3; [M]; PAPERS.md. Deviation: direction weights, equal by default.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): The student's, any scale; normalised here. Gradient flows to both.
        teacher_image_embeds, teacher_text_embeds, teacher_widths, teacher_logit_scales: Of [`teacher_probabilities`].
        temperature (`float` or `torch.Tensor` of shape `()`, *optional*, defaults to 0.01): Of the student's softmax, > 0. To learn it
            pass `logit_scale.neg().exp()`.
        image_to_text_weight (`float`, *optional*, defaults to 0.5): Share of the image-to-text direction, in [0, 1].

    Returns:
        `torch.Tensor` of shape `()`: In nats, >= the teachers' mean entropy. float32 even under autocast.

    Raises:
        ValueError: If batch sizes or the student's widths differ, the teachers' widths do not sum to their embeddings', a scale or the
            temperature is <= 0, or the share is outside [0, 1].

    Example:
        >>> eye = torch.eye(2)
        >>> round(float(distillation_loss(eye, eye, eye, eye, [2], [1.0], temperature=1.0)), 4)  # the entropy
        0.5822
    """
    _check_same_width(image_embeds=image_embeds, text_embeds=text_embeds)
    _check_same_batch(image_embeds=image_embeds, teacher_image_embeds=teacher_image_embeds)
    _check_temperature(temperature=temperature)
    _check_share(image_to_text_weight)
    targets = teacher_probabilities(teacher_image_embeds, teacher_text_embeds, teacher_widths, teacher_logit_scales)
    with _full_precision(image_embeds):
        logits = _normalise(image_embeds) @ _normalise(text_embeds).T / temperature  # (B, B): image rows, text columns
        image_to_text_loss = F.cross_entropy(logits, targets[0])
        text_to_image_loss = F.cross_entropy(logits.T, targets[1])
        return image_to_text_weight * image_to_text_loss + (1 - image_to_text_weight) * text_to_image_loss
