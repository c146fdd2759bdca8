"""Losses of contrastive training and of distillation: pure functions of a batch of embeddings.

The in-batch losses need every pair of the *global* batch. [`gather_across_processes`] brings all rows to each process,
with gradient; the losses themselves know nothing of processes. Each process then computes the same global loss. The
mean that `DistributedDataParallel` takes of the gradients is the gradient of one process with the whole batch.

Sources: "Distill CLIP", arXiv 2505.21549 [D]; "MobileCLIP", arXiv 2311.17049 [MC]; "Knowledge Distillation from
Transformer to Mamba for an efficient CLIP" [M]; "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343
[SigLIP]; docs/papers.md.
Letters in shape comments: B batch, D embedding, F false captions of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F


class _GatherWithGradient(torch.autograd.Function):
    """Concatenate a tensor over processes along dimension 0. Its gradient is summed over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.start = sum(sizes[: torch.distributed.get_rank()])
        ctx.size = len(tensor)
        # all_gather needs equal shapes: pad to the longest, gather, cut.
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.size], None


def gather_across_processes(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Bring every process's rows to each process, with gradient.

    A loss of the gathered rows is the same on every process, and `DistributedDataParallel`'s mean of the gradients is
    then exactly that of one process with the whole batch, also where the processes' batches differ in size. With
    gradient accumulation the negatives are still those of one micro-batch over all processes, never of several
    micro-batches.

    Args:
        tensors (`torch.Tensor` of shape `(B, ...)`): Of equal `B` on one process. Gradient flows to the caller's own
            rows.

    Returns:
        `tuple[torch.Tensor, ...]`: Each of shape `(sum of all B, ...)`, in order of rank; the very tensors given
            without a process group.

    Raises:
        ValueError: If the tensors' batch sizes differ.

    Example:
        >>> gather_across_processes(torch.ones(2, 3))[0].shape
        torch.Size([2, 3])
    """
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1:
        raise ValueError(f"Expected tensors of one batch size, got {[len(tensor) for tensor in tensors]}.")
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return tensors
    size = torch.tensor(len(tensors[0]), device=tensors[0].device)
    sizes = [torch.empty_like(size) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(sizes, size)
    sizes = torch.stack(sizes).tolist()
    return tuple(_GatherWithGradient.apply(tensor.contiguous(), sizes) for tensor in tensors)


def _check_same_batch(**embeds: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in embeds.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
        raise ValueError(f"Expected embeddings of shape (B, D) with one B, got {shapes}.")


def _check_same_width(**embeds: torch.Tensor) -> None:
    _check_same_batch(**embeds)
    widths = {name: tensor.shape[1] for name, tensor in embeds.items()}
    if len(set(widths.values())) != 1:
        raise ValueError(
            f"Expected embeddings of one width, got {widths}: both sides of a similarity must share their space."
        )


def _check_temperature(**temperatures: float | torch.Tensor) -> None:
    for name, temperature in temperatures.items():
        # A tensor is learned and positive by construction. Reading it would wait for the device.
        if not isinstance(temperature, torch.Tensor) and not temperature > 0:
            raise ValueError(f"Expected {name} > 0, got {temperature}.")


def _check_share(image_to_text_weight: float) -> None:
    if not 0 <= image_to_text_weight <= 1:
        raise ValueError(f"Expected image_to_text_weight in [0, 1], got {image_to_text_weight}.")


def _full_precision(embeds: torch.Tensor) -> torch.autocast:
    return torch.autocast(embeds.device.type, enabled=False)


def _normalise(embeds: torch.Tensor) -> torch.Tensor:
    return F.normalize(embeds.float(), dim=-1)


class FalseTexts(NamedTuple):
    """False captions of a batch's images, each a wrong answer of its own image alone.

    Args:
        embeds (`torch.Tensor` of shape `(B, F, D)`): Any scale; constant.
        mask (`torch.Tensor` of shape `(B, F)`): Bool, which of them there are.
    """

    embeds: torch.Tensor
    mask: torch.Tensor

    def cosines(self, images: torch.Tensor) -> torch.Tensor:
        """Of unit vectors `(B, D)` with their false captions: `(B, F)`, in the type of the images."""
        texts = F.normalize(self.embeds.detach().to(images.dtype), dim=-1)
        return (images[:, None] * texts).sum(dim=-1)

    def log_sum_exp(self, images: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
        """Of the logits of each image's false captions: `(B,)`, very small where there are none."""
        logits = self.cosines(images) / temperature
        return logits.masked_fill(~self.mask, torch.finfo(logits.dtype).min / 2).logsumexp(dim=1)

    def sum_of_softplus(
        self, images: torch.Tensor, scale: float | torch.Tensor, bias: float | torch.Tensor
    ) -> torch.Tensor:
        """Of scale * cosine + bias, over each image's false captions: `(B,)`."""
        return (F.softplus(self.cosines(images) * scale + bias) * self.mask).sum(dim=1)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: float | torch.Tensor = 0.05,
    image_to_text_weight: float = 0.5,
    image_ids: torch.Tensor | None = None,
    false_texts: FalseTexts | None = None,
) -> torch.Tensor:
    """Make each image prefer its own text among the batch's, and each text its own image (symmetric InfoNCE).

    Unlike [`similarity_distillation_loss`] every other row counts as equally wrong. Rows with the same `image_ids`
    (two captions of one image) are not: each is a right answer for the others, all right answers weighing the same.

    Source: [D] student and teacher loss; CLIP; false captions: [NegCLIP]. Deviation: direction weights and
    `image_ids`, both neutral by default; a false caption is a wrong answer of its own image alone.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        text_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        temperature (`float` or `torch.Tensor` of shape `()`, *optional*, defaults to 0.05): Dimensionless, > 0. To
            learn it pass `logit_scale.neg().exp()`.
        image_to_text_weight (`float`, *optional*, defaults to 0.5): Share of the image-to-text direction, in [0, 1];
            the rest is text-to-image's.
        image_ids (`torch.Tensor` of shape `(B,)`, *optional*): Equal numbers are the same image. By default all
            differ.
        false_texts ([`FalseTexts`], *optional*): More wrong answers in the image-to-text direction.

    Returns:
        `torch.Tensor` of shape `()`: In nats, >= 0. float32 even under autocast.

    Raises:
        ValueError: If shapes differ, `temperature <= 0` or the share is outside [0, 1].

    Example:
        >>> round(float(contrastive_loss(torch.eye(2), torch.eye(2), temperature=1.0)), 4)
        0.3133
    """
    _check_same_width(image_embeds=image_embeds, text_embeds=text_embeds)
    _check_temperature(temperature=temperature)
    _check_share(image_to_text_weight)
    with _full_precision(image_embeds):
        logits = _normalise(image_embeds) @ _normalise(text_embeds).T / temperature  # (B, B): image rows, text columns
        if image_ids is None:
            targets = torch.arange(len(logits), device=logits.device)
        else:
            same = (image_ids[:, None] == image_ids[None, :]).float()
            targets = same / same.sum(dim=1, keepdim=True)
        image_to_text_loss = F.cross_entropy(logits, targets)
        if false_texts is not None:  # they join the sum below the fraction
            false = false_texts.log_sum_exp(_normalise(image_embeds), temperature)
            image_to_text_loss = image_to_text_loss + F.softplus(false - logits.logsumexp(dim=1)).mean()
        text_to_image_loss = F.cross_entropy(logits.T, targets)
        return image_to_text_weight * image_to_text_loss + (1 - image_to_text_weight) * text_to_image_loss


def sigmoid_contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor,
    image_ids: torch.Tensor | None = None,
    false_texts: FalseTexts | None = None,
) -> torch.Tensor:
    """Ask of each image and each text of the batch, on its own, whether they belong together.

    -log sigmoid(+-(scale * cosine + bias)), plus for the right pairs and minus for the others, summed over texts and
    averaged over images. Unlike [`contrastive_loss`] pairs do not compete, and the loss has one direction. Rows with
    the same `image_ids` (two captions of one image) are right pairs, too.

    Source: [SigLIP] eq. 1 and its algorithm 1; docs/papers.md. Deviation: `image_ids`, neutral by default;
    false captions.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        text_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        logit_scale (`float` or `torch.Tensor` of shape `()` or `(1,)`): Logarithm of what multiplies the cosines, as
            the model stores it. Gradient flows.
        logit_bias (`float` or `torch.Tensor` of shape `()` or `(1,)`): Added to each product. Gradient flows.
        image_ids (`torch.Tensor` of shape `(B,)`, *optional*): Equal numbers are the same image. By default all
            differ.
        false_texts ([`FalseTexts`], *optional*): More wrong pairs.

    Returns:
        `torch.Tensor` of shape `()`: In nats an image, >= 0. float32 even under autocast.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> round(float(sigmoid_contrastive_loss(torch.eye(2), torch.eye(2), 0.0, 0.0)), 4)
        1.0064
    """
    _check_same_width(image_embeds=image_embeds, text_embeds=text_embeds)
    with _full_precision(image_embeds):
        cosines = _normalise(image_embeds) @ _normalise(text_embeds).T  # (B, B): image rows, text columns
        scale = torch.as_tensor(logit_scale, device=cosines.device).float().exp()
        bias = torch.as_tensor(logit_bias, device=cosines.device).float()
        logits = scale * cosines + bias
        if image_ids is None:
            image_ids = torch.arange(len(logits), device=logits.device)
        right = (image_ids[:, None] == image_ids[None, :]).float()
        loss = F.binary_cross_entropy_with_logits(logits, right, reduction="sum") / len(logits)
        if false_texts is None:
            return loss
        return loss + false_texts.sum_of_softplus(_normalise(image_embeds), scale, bias).mean()


def _mean_cosine_distance(embeds: torch.Tensor, target_embeds: torch.Tensor) -> torch.Tensor:
    with _full_precision(embeds):
        return (1 - (_normalise(embeds) * _normalise(target_embeds.detach())).sum(dim=-1)).mean()


def cosine_distillation_loss(student_embeds: torch.Tensor, teacher_embeds: torch.Tensor) -> torch.Tensor:
    """Move each student embedding to the teacher's of the same pair.

    1 - cosine, averaged. Unlike [`similarity_distillation_loss`] it constrains positions, not relations, and needs
    equal widths.

    Source: [D] student loss, first term. Deviation: none.

    Args:
        student_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        teacher_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; treated as constant.

    Returns:
        `torch.Tensor` of shape `()`: In [0, 2]; 0 when all directions agree. float32 even under autocast.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> float(cosine_distillation_loss(torch.eye(2), 3 * torch.eye(2)))
        0.0
    """
    _check_same_width(student_embeds=student_embeds, teacher_embeds=teacher_embeds)
    return _mean_cosine_distance(student_embeds, teacher_embeds)


def cosine_preservation_loss(student_embeds: torch.Tensor, anchor_embeds: torch.Tensor) -> torch.Tensor:
    """Keep each student embedding near the untouched CLIP's embedding of the same image.

    The same formula as [`cosine_distillation_loss`] with the anchor in the teacher's place: it works against
    forgetting.

    Source: [D] ViT-L/14 extras. Deviation: none.

    Args:
        student_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        anchor_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; treated as constant.

    Returns:
        `torch.Tensor` of shape `()`: In [0, 2]; 0 when nothing has moved. float32 even under autocast.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> float(cosine_preservation_loss(torch.eye(2), -torch.eye(2)))
        2.0
    """
    _check_same_width(student_embeds=student_embeds, anchor_embeds=anchor_embeds)
    return _mean_cosine_distance(student_embeds, anchor_embeds)


def _row_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL from the teacher's to the student's row-wise softmax, averaged over rows."""
    return F.kl_div(
        student_logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1), reduction="batchmean", log_target=True
    )


def similarity_distillation_loss(
    student_embeds: torch.Tensor,
    teacher_embeds: torch.Tensor,
    student_text_embeds: torch.Tensor | None = None,
    teacher_text_embeds: torch.Tensor | None = None,
    temperature: float = 0.01,
    teacher_temperature: float | None = None,
    image_to_text_weight: float = 0.5,
) -> torch.Tensor:
    """Make the student rank the batch as the teacher does.

    KL from the teacher's to the student's row-wise softmax of in-batch similarities. Unlike
    [`cosine_distillation_loss`] it constrains relations only. With text embeddings the similarities are image-text, in
    both directions; without, they are those of the embeddings among themselves.

    Source: [MC] eq. 2; docs/papers.md. Deviation: direction weights; a temperature of the teacher's own; without
    texts, the embeddings' own similarities.

    Args:
        student_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        teacher_embeds (`torch.Tensor` of shape `(B, D')`): Any scale; treated as constant.
        student_text_embeds (`torch.Tensor` of shape `(B, D)`, *optional*): Any scale. Gradient flows.
        teacher_text_embeds (`torch.Tensor` of shape `(B, D')`, *optional*): Any scale; constant. Both texts or
            neither.
        temperature (`float`, *optional*, defaults to 0.01): Of the student's softmax. Dimensionless, > 0.
        teacher_temperature (`float`, *optional*): Of the teacher's softmax. Defaults to `temperature`.
        image_to_text_weight (`float`, *optional*, defaults to 0.5): Share of the image-to-text direction, in [0, 1].

    Returns:
        `torch.Tensor` of shape `()`: In nats, >= 0; 0 when both rank alike. float32 even under autocast.

    Raises:
        ValueError: If batch sizes or the widths of one model differ, a temperature is <= 0, or one text is given
            without the other.

    Example:
        >>> float(similarity_distillation_loss(torch.eye(3), torch.eye(3)))
        0.0
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    _check_temperature(temperature=temperature, teacher_temperature=teacher_temperature)
    _check_share(image_to_text_weight)
    if (student_text_embeds is None) != (teacher_text_embeds is None):
        raise ValueError("Expected text embeddings of student and teacher, or neither; got one of them.")
    among_themselves = student_text_embeds is None or teacher_text_embeds is None
    if student_text_embeds is None or teacher_text_embeds is None:
        student_text_embeds, teacher_text_embeds = student_embeds, teacher_embeds
    _check_same_batch(student_embeds=student_embeds, teacher_embeds=teacher_embeds)
    _check_same_width(student_embeds=student_embeds, student_text_embeds=student_text_embeds)
    _check_same_width(teacher_embeds=teacher_embeds, teacher_text_embeds=teacher_text_embeds)
    with _full_precision(student_embeds):
        student_logits = _normalise(student_embeds) @ _normalise(student_text_embeds).T / temperature  # (B, B)
        with torch.no_grad():
            teacher_logits = _normalise(teacher_embeds) @ _normalise(teacher_text_embeds).T / teacher_temperature
        image_to_text_loss = _row_divergence(student_logits, teacher_logits)
        if among_themselves:  # symmetric
            return image_to_text_loss
        text_to_image_loss = _row_divergence(student_logits.T, teacher_logits.T)
        return image_to_text_weight * image_to_text_loss + (1 - image_to_text_weight) * text_to_image_loss


def _teacher_slices(embeds: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
    if not widths or min(widths) < 1 or sum(widths) != embeds.shape[1]:
        raise ValueError(
            f"Expected embeddings as wide as the teachers {list(widths)} together ({sum(widths)}), got "
            f"{embeds.shape[1]}. Give the widths of the teachers that made them, in their order."
        )
    return [_normalise(part) for part in embeds.split(list(widths), dim=1)]


@torch.no_grad()
def teacher_probabilities(
    teacher_image_embeds: torch.Tensor,
    teacher_text_embeds: torch.Tensor,
    teacher_widths: Sequence[int],
    teacher_logit_scales: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of several teachers' softmaxes over which image and text of a batch belong together.

    Probabilities are averaged, not similarities, so that no teacher outvotes the others by a larger scale.

    Source: [MC] eq. 2; [M]; docs/papers.md. Deviation: none.

    Args:
        teacher_image_embeds, teacher_text_embeds (`torch.Tensor` of shape `(B, sum of widths)`): The teachers'
            embeddings side by side; each teacher's slice is normalised here. Constant.
        teacher_widths (`Sequence[int]`): Width of each slice, in order.
        teacher_logit_scales (`Sequence[float]`): Multiplies each teacher's cosines, > 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Image-to-text and text-to-image, each `(B, B)` float32, rows summing to 1.

    Raises:
        ValueError: If batch sizes differ, the widths do not sum to the embeddings', or scales and widths differ in
            number.

    Example:
        >>> teacher_probabilities(torch.eye(2), torch.eye(2), [2], [100.0])[0].round(decimals=6).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_same_width(teacher_image_embeds=teacher_image_embeds, teacher_text_embeds=teacher_text_embeds)
    if len(teacher_logit_scales) != len(teacher_widths) or not all(scale > 0 for scale in teacher_logit_scales):
        raise ValueError(
            f"Expected one logit scale > 0 for each of {len(teacher_widths)} teachers, got "
            f"{list(teacher_logit_scales)}."
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
    """Make the student match images and texts of the batch as several teachers do on average.

    Cross-entropy from the teachers' mean softmax to the student's. Its gradient is that of the KL divergence, from
    which it differs by the teachers' entropy, so it ends above 0. Unlike
    [`~modeling_dclip.distillation.losses.similarity_distillation_loss`] it takes several teachers, whose widths have
    nothing to do with the student's.

    Source: [MC] eq. 2 and 3; [M]; docs/papers.md. Deviation: direction weights, equal by default.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): The student's, any scale; normalised here.
            Gradient flows to both.
        teacher_image_embeds, teacher_text_embeds, teacher_widths, teacher_logit_scales: Of [`teacher_probabilities`].
        temperature (`float` or `torch.Tensor` of shape `()`, *optional*, defaults to 0.01): Of the student's softmax,
            > 0. To learn it pass `logit_scale.neg().exp()`.
        image_to_text_weight (`float`, *optional*, defaults to 0.5): Share of the image-to-text direction, in [0, 1].

    Returns:
        `torch.Tensor` of shape `()`: In nats, >= the teachers' mean entropy. float32 even under autocast.

    Raises:
        ValueError: If batch sizes or the student's widths differ, the teachers' widths do not sum to their
            embeddings', a scale or the temperature is <= 0, or the share is outside [0, 1].

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
