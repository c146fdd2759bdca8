"""A student's run in which one process meets a batch that is not finite: all stop, or leave the step out.

Run by test_guard.py.
"""

import math
import sys

import torch
from accelerate import PartialState
from datasets import load_from_disk
from safetensors.torch import save_file
from transformers import set_seed

from modeling_dclip import DCLIPProcessor
from modeling_dclip.data.collation import StudentBatches
from modeling_dclip.distillation.arguments import StudentArguments
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.trainer import StudentTrainer

clip_dir, data_dir, output_dir = sys.argv[1:]
state = PartialState(cpu=True)


def train(on_nonfinite):
    set_seed(0)
    args = StudentArguments(
        output_dir=f"{output_dir}/run",
        per_device_train_batch_size=4,
        max_steps=2,
        save_strategy="no",
        use_cpu=True,
        learning_rate=1e-3,
        disable_tqdm=True,
        report_to="none",
        on_nonfinite=on_nonfinite,
    )
    model, processor = load_student(clip_dir), DCLIPProcessor.from_pretrained(clip_dir)
    batches = StudentBatches(load_from_disk(data_dir), processor.image_processor, args.columns, width=16)
    trainer = StudentTrainer(model, args, batches, processor, {})
    terms = trainer.loss_terms

    def spoilt(model, batch):
        if trainer.state.global_step == 1 and state.process_index == 1:  # the main process sees no NaN of its own
            batch["pixel_values"] = batch["pixel_values"] * math.nan
        return terms(model, batch)

    trainer.loss_terms = spoilt
    trainer.train()
    return trainer


skipping = train("skip")
try:
    train("stop")
    message = "did not stop"
except FloatingPointError as error:
    message = str(error)
told = torch.tensor(list(message.encode()), dtype=torch.uint8)
weights = {f"weights/{name}": tensor for name, tensor in skipping.model.state_dict().items()}
skipped = torch.tensor(skipping.guard.skipped)
save_file({"message": told, "skipped": skipped, **weights}, f"{output_dir}/{state.process_index}.safetensors")
state.wait_for_everyone()
state.destroy_process_group()
