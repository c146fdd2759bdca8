"""Trainers of whole dual encoders, logit scale included: the anchor's, and DM-CLIP's from reinforced batches."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from modeling_dclip.distillation.losses import contrastive_loss, gather_across_processes
from modeling_dclip.distillation.reinforced_losses import distillation_loss
from modeling_dclip.distillation.trainer import BatchesTrainer

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound of the learned scale
PUBLISHED_LOGIT_SCALE = 100.0  # of both teachers of [M]: CLIP's bound, where trained CLIPs end


class _BoundLogitScale(TrainerCallback):
    """Keeps the learned scale at CLIP's bound or below, before the first step and after each one.

    The parameter itself is clamped, as CLIP does: where only the forward is, there is no gradient above the bound, and no way back.
    """

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    on_step_end = on_train_begin


class AnchorTrainer(BatchesTrainer):
    """Contrastive pretraining of a small dual encoder, logit scale included.

    Source: CLIP; PAPERS.md. Deviation: none.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_BoundLogitScale())

    def loss_terms(self, model, batch):
        """Symmetric InfoNCE over the global batch."""
        image_ids = batch.pop("image_ids")
        outputs = model(**batch)
        logit_scale = self.accelerator.unwrap_model(model, keep_torch_compile=False).logit_scale
        image_embeds, text_embeds, image_ids = gather_across_processes(
            outputs.image_embeds, outputs.text_embeds, image_ids
        )
        temperature = logit_scale.neg().exp()
        share = self.args.image_to_text_weight
        loss = contrastive_loss(image_embeds, text_embeds, temperature, share, image_ids)
        return {"contrastive_loss": (loss, 1.0)}


def _stack_padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Token rows of several lengths `(B, T)` as one tensor, the shorter ones filled up."""
    longest = max(tokens.shape[1] for tokens in rows)
    return torch.cat([F.pad(tokens, (0, longest - tokens.shape[1]), value=value) for tokens in rows])


class _FollowStream(TrainerCallback):
    """Lets a stream of batches go on where a checkpoint was made, unread, and counts epochs by steps for it."""

    def __init__(self, batches: Any):
        self.batches = batches

    def on_train_begin(self, args, state, control, **kwargs):
        steps = math.ceil(len(self.batches) / args.gradient_accumulation_steps)
        epoch, step = divmod(state.global_step, steps)
        self.batches.resume(epoch, step * args.gradient_accumulation_steps)
        self.steps_per_epoch = steps

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / self.steps_per_epoch  # the base class counts from where it began to read


class DMCLIPTrainer(BatchesTrainer):
    """Trains a dual encoder from what several teachers said of the same augmented images and captions.

    The loss of a pair is `contrastive_loss_weight` * InfoNCE + `distillation_loss_weight` * cross-entropy to the teachers' mean softmax; it is
    computed over the images with one real caption each and, where there are any, again with one synthetic caption each, and the two are added.
    The student's scale is learned and bounded as CLIP's. BatchNorm sees a process's own images.

    Source: [MC] eq. 1 to 3; [M]; PAPERS.md. Deviation: teachers whose trained scale is known are scaled by it.

    Args:
        model ([`DMCLIPModel`]): Trains, in place.
        args ([`DMCLIPArguments`]): Losses, optimiser.
        train_batches ([`~modeling_dclip.data.reinforced.ReinforcedBatches`]): A stream; a resumed run goes on with the very batches.
        processor, resolved_arguments: As for [`BatchesTrainer`].
    """

    def __init__(self, model: Any, args: Any, train_batches: Any, processor: Any, resolved_arguments: dict[str, Any]):
        super().__init__(model, args, train_batches, processor, resolved_arguments)
        self.teacher_widths = list(train_batches.teacher_widths)
        given = PUBLISHED_LOGIT_SCALE if args.teacher_logit_scale is None else args.teacher_logit_scale
        self.teacher_logit_scales = [given] * len(self.teacher_widths)
        if args.teacher_logit_scale is None and train_batches.teacher_logit_scales is not None:
            self.teacher_logit_scales = [math.exp(scale) for scale in train_batches.teacher_logit_scales]
        self.add_callback(_FollowStream(train_batches))
        self.add_callback(_BoundLogitScale())

    def get_train_dataloader(self):
        """The stream itself, which knows its process and worker: accelerate would split it once more."""
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_size=None,
            num_workers=args.dataloader_num_workers,  # started anew each epoch: they learn of it by being copied
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # the loader's draw must not move the global one: a resumed run draws once more
        )

    def loss_terms(self, model, batch):
        """Both losses over real captions, and over synthetic ones where the batch holds them."""
        args = self.args
        texts = [name.removesuffix("input_ids") for name in ("input_ids", "synthetic_input_ids") if name in batch]
        pad_token_id = self.processor.tokenizer.pad_token_id
        outputs = model(
            pixel_values=batch["pixel_values"].contiguous(
                memory_format=torch.channels_last
            ),  # a step is a sixth faster
            input_ids=_stack_padded([batch[f"{text}input_ids"] for text in texts], pad_token_id),
            attention_mask=_stack_padded([batch[f"{text}attention_mask"] for text in texts], 0),
        )
        text_embeds = outputs.text_embeds.chunk(len(texts))
        teachers = []
        if args.reads_teachers:
            teachers = [batch["teacher_image_embeds"], *(batch[f"teacher_{text}text_embeds"] for text in texts)]
        image_embeds, *gathered = gather_across_processes(outputs.image_embeds, *text_embeds, *teachers)
        text_embeds, teachers = gathered[: len(texts)], gathered[len(texts) :]
        logit_scale = self.accelerator.unwrap_model(model, keep_torch_compile=False).logit_scale
        temperature = logit_scale.neg().exp()
        terms = {}
        for index, text in enumerate(texts):
            if args.contrastive_loss_weight:
                loss = contrastive_loss(image_embeds, text_embeds[index], temperature, args.image_to_text_weight)
                terms[f"{text}contrastive_loss"] = (loss, args.contrastive_loss_weight)
            if args.reads_teachers:
                loss = distillation_loss(
                    image_embeds, text_embeds[index], teachers[0], teachers[1 + index], self.teacher_widths,
                    self.teacher_logit_scales,
                    temperature, args.image_to_text_weight,
                )  # fmt: skip
                terms[f"{text}distillation_loss"] = (loss, args.distillation_loss_weight)
        return terms
