"""Real steps of adapters in both towers on 16 rows, however many processes share them.

Run by test_adapters.py.
"""

import sys

from accelerate import PartialState
from datasets import load_from_disk
from transformers import set_seed

from modeling_dclip import DCLIPProcessor
from modeling_dclip.distillation.arguments import StudentArguments
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student

clip_dir, data_dir, output_dir, processes = sys.argv[1:]
if PartialState(cpu=True).num_processes != int(processes):
    raise RuntimeError(f"Expected {processes} processes, got {PartialState().num_processes}.")
set_seed(0)
args = StudentArguments(
    output_dir=output_dir,
    per_device_train_batch_size=16 // int(processes),
    max_steps=2,
    save_strategy="steps",
    save_steps=1,
    use_cpu=True,
    learning_rate=1.0,
    optim="sgd",  # linear in the gradient: rounding is not magnified as Adam's first steps do
    lora_rank=4,
    lora_text=True,
    report_to="none",
    eval_strategy="steps",
    eval_steps=1,
    load_best_model_at_end=False,
)
dataset, processor = load_from_disk(data_dir), DCLIPProcessor.from_pretrained(clip_dir)
fit_student(load_student(clip_dir), args, dataset, processor, {}, validation=dataset.select(range(9)))
PartialState().destroy_process_group()
