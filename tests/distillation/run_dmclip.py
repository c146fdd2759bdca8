"""Two real steps of DM-CLIP's trainer on 8 samples in two shards, however many processes share them.

Run by test_trainer_dual_encoders.py.
"""

import sys

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, set_seed

from modeling_dclip.data.reinforced import ReinforcedBatches, SampleView
from modeling_dclip.distillation.arguments import DMCLIPArguments
from modeling_dclip.distillation.dmclip import build_dmclip
from modeling_dclip.distillation.trainer import DMCLIPTrainer


class FixedNorm(nn.BatchNorm2d):
    """Keeps its first statistics: those of a batch would be of one process's images."""

    def train(self, mode=True):
        return super().train(False)


clip_dir, shards, output_dir, processes = sys.argv[1:]
state = PartialState(cpu=True)
if state.num_processes != int(processes):
    raise RuntimeError(f"Expected {processes} processes, got {state.num_processes}.")
args = DMCLIPArguments(
    output_dir=output_dir,
    per_device_train_batch_size=8 // state.num_processes,
    image_size=32,
    vision_config={
        "stem_dim": 4, "hidden_size": 4, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "drop_path_rate": 0.0,
    },
    text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    projection_dim=8,
    max_steps=2,
    logging_steps=1,
    save_strategy="no",
    use_cpu=True,
    learning_rate=1e-2,
    max_grad_norm=0.0,
    warmup_steps=0,
    optim="sgd",  # linear in the gradient: rounding is not magnified as Adam's first steps do
)  # fmt: skip
set_seed(0)
model, processor = build_dmclip(args, AutoTokenizer.from_pretrained(clip_dir))
for module in model.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.__class__ = FixedNorm
model.train()
view, batch_size = SampleView(image_size=32), args.per_device_train_batch_size
batches = ReinforcedBatches(shards, processor.tokenizer, view, batch_size=batch_size)
trainer = DMCLIPTrainer(model, args, batches, processor, {})
trainer.train()
losses = {
    f"loss/{k}/{log['step']}": torch.tensor(v)
    for log in trainer.state.log_history
    for k, v in log.items()
    if "loss" in k
}
if state.is_main_process:
    trained = {f"trained/{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({**losses, **trained}, f"{output_dir}/results.safetensors")
state.destroy_process_group()
