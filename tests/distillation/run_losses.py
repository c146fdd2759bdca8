"""Loss and gradients of every loss for a fixed global batch, however many processes share it.

Run by test_losses.py.
"""

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from modeling_dclip.distillation.losses import (
    contrastive_loss,
    cosine_distillation_loss,
    cosine_preservation_loss,
    distillation_loss,
    gather_across_processes,
    sigmoid_contrastive_loss,
    similarity_distillation_loss,
)

WIDTH = 6
SHARES = {1: [8], 2: [5, 3]}  # rows per process: unequal, as the last batch of an epoch may be

LOSSES = {
    "contrastive_loss": lambda image, text, teacher, scale: contrastive_loss(
        image, text, scale.neg().exp(), image_to_text_weight=0.3
    ),
    "repeated_image_contrastive_loss": lambda image, text, teacher, scale: contrastive_loss(
        image, text, image_ids=gather_across_processes(image_ids)[0]
    ),
    "sigmoid_contrastive_loss": lambda image, text, teacher, scale: sigmoid_contrastive_loss(
        image, text, scale, -2 * scale, gather_across_processes(image_ids)[0]
    ),
    "cosine_distillation_loss": lambda image, text, teacher, scale: cosine_distillation_loss(image, teacher),
    "cosine_preservation_loss": lambda image, text, teacher, scale: cosine_preservation_loss(image, teacher),
    "similarity_distillation_loss": lambda image, text, teacher, scale: similarity_distillation_loss(
        image, teacher, text, text, temperature=0.1, image_to_text_weight=0.7
    ),
    "relational_similarity_distillation_loss": lambda image, text, teacher, scale: similarity_distillation_loss(
        image, teacher, temperature=0.1, teacher_temperature=0.2
    ),
    "distillation_loss": lambda image, text, teacher, scale: distillation_loss(
        image, text, teacher, teacher.roll(1, dims=1), [WIDTH - 2, 2], [3.0, 5.0], scale.neg().exp()
    ),
}


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image = torch.nn.Linear(WIDTH, WIDTH)
        self.text = torch.nn.Linear(WIDTH, WIDTH)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, pixels, tokens):
        # A loss that reads only some of these still leaves every parameter with a gradient, as DDP asks.
        nothing = 0 * (self.logit_scale + self.text.weight.sum() + self.text.bias.sum())
        return self.image(pixels) + nothing, self.text(tokens), self.logit_scale + 0 * self.image.weight.sum()


accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = accelerator.prepare(TwoTowers())
pixels, tokens, teacher = torch.randn(3, 8, WIDTH).unbind()
image_ids = torch.tensor([0, 1, 1, 2, 3, 0, 4, 5])
share = SHARES[accelerator.num_processes]
start = sum(share[: accelerator.process_index])
mine = slice(start, start + share[accelerator.process_index])
image_ids = image_ids[mine]
results = {}
for name, loss_of in LOSSES.items():
    model.zero_grad()
    image, text, scale = model(pixels[mine], tokens[mine])
    loss = loss_of(*gather_across_processes(image, text, teacher[mine]), scale)
    accelerator.backward(loss)
    results[name] = loss.detach()
    for parameter_name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.grad is not None:
            results[f"{name}/{parameter_name}"] = parameter.grad.clone()
save_file(results, f"{sys.argv[1]}/rank{accelerator.process_index}.safetensors")
accelerator.end_training()
