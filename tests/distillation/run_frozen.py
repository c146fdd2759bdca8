"""Three prepared steps of a dual encoder whose text tower is frozen and runs.

Run by test_adapters_freezing.py.
"""

import hashlib
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from modeling_dclip.distillation.run import load_student

clip_dir, output_dir, processes = sys.argv[1:]
accelerator = Accelerator(cpu=True)
if accelerator.num_processes != int(processes):
    raise RuntimeError(f"Expected {processes} processes, got {accelerator.num_processes}.")


def digest(*modules):
    """SHA-256 of every weight's name and bytes, as 32 numbers."""
    found = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.contiguous().numpy().tobytes())
    return torch.tensor(list(found.digest()))


dual = load_student(clip_dir)
text, vision = (dual.text_model, dual.text_projection), (dual.vision_model, dual.visual_projection)
results = {"text_before": digest(*text), "vision_before": digest(*vision)}
# The optimiser is handed everything, with decay: what is frozen has to stay because it has no gradient.
model, optimiser = accelerator.prepare(dual, torch.optim.AdamW(dual.parameters(), lr=1e-2, weight_decay=0.1))
results["wrapped"] = torch.tensor(isinstance(model, torch.nn.parallel.DistributedDataParallel))
generator = torch.Generator().manual_seed(accelerator.process_index)  # every process has rows of its own
for _ in range(3):
    model.train()
    inputs = {
        "input_ids": torch.randint(0, 40, (4, 9), generator=generator),
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
    }
    inputs["input_ids"][:, -1] = dual.config.text_config.eos_token_id
    accelerator.backward(model(**inputs, return_loss=True).loss)
    optimiser.step()
    optimiser.zero_grad()
frozen = [parameter for module in text for parameter in module.parameters()]
results["text_has_no_gradient"] = torch.tensor(not any(p.requires_grad or p.grad is not None for p in frozen))
results["text_is_in_eval_mode"] = torch.tensor(not any(module.training for part in text for module in part.modules()))
results |= {"text_after": digest(*text), "vision_after": digest(*vision)}
save_file(results, f"{output_dir}/{accelerator.process_index}.safetensors")
accelerator.end_training()
