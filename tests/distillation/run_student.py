"""Real steps of the student's trainer on 16 rows, however many processes share them.

Run by test_trainer.py.
"""

import sys

import torch
from accelerate import PartialState
from datasets import load_from_disk
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed

from modeling_dclip import DCLIPProcessor
from modeling_dclip.data.collation import StudentBatches
from modeling_dclip.distillation.arguments import StudentArguments
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.trainer import StudentTrainer


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train(data_dir, negatives):
    """Losses, the last gradients and the trained weights on one dataset."""
    set_seed(0)
    args = StudentArguments(
        output_dir=output_dir,
        per_device_train_batch_size=16 // PartialState().num_processes,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        learning_rate=1e-3,
        optim="sgd",  # linear in the gradient: rounding is not magnified as Adam's first steps do
        cosine_preservation_loss_weight=0.5,
        similarity_distillation_loss_weight=0.5,
        negatives=negatives,
        hard_negatives="column" if negatives == "bank" else "none",
        micro_batch_size=3 if negatives == "bank" else None,
    )
    model = load_student(clip_dir)
    processor = DCLIPProcessor.from_pretrained(clip_dir)
    dataset = load_from_disk(data_dir)
    options = {"width": model.config.projection_dim, "bank": negatives == "bank"}
    batches = StudentBatches(dataset, processor.image_processor, args.columns, **options)
    keep = KeepGradients()
    trainer = StudentTrainer(model, args, batches, processor, {})
    trainer.add_callback(keep)
    trainer.train()
    return {
        **{
            f"loss/{k}/{log['step']}": torch.tensor(v)
            for log in trainer.state.log_history
            for k, v in log.items()
            if "loss" in k
        },
        **{f"gradient/{name}": tensor for name, tensor in keep.gradients.items()},
        **{f"trained/{name}": tensor for name, tensor in trainer.model.state_dict().items()},
    }


clip_dir, output_dir, processes, *data_dirs = sys.argv[1:]
if PartialState(cpu=True).num_processes != int(processes):
    raise RuntimeError(f"Expected {processes} processes, got {PartialState().num_processes}.")
results = {
    f"{negatives}/{i}/{name}": tensor
    for negatives in ("batch", "bank")
    for i, data_dir in enumerate(data_dirs)
    for name, tensor in train(data_dir, negatives).items()
}
if PartialState().is_main_process:
    save_file(results, f"{output_dir}/results.safetensors")
PartialState().destroy_process_group()
