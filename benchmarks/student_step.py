"""A student's step with stored targets against the same step with teacher and text tower online.

    python benchmarks/student_step.py

Both steps have the same forward, losses, backward and optimiser step of the image encoder. In the online step the
frozen CLIP also encodes every region and the caption, and the teacher's block reads them, without gradients. Weights
are random, because time does not depend on them. Steps of the two kinds alternate in one process, so that both see the
same machine; the ratio is the median over pairs. Preprocessing and reading are left out on both sides, although an
online step would also crop and tokenize.
"""

import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, set_seed

from modeling_dclip import DCLIPTeacher, DCLIPTeacherConfig
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.distillation.losses import contrastive_loss, cosine_distillation_loss
from modeling_dclip.distillation.trainer import ImageSide
from modeling_dclip.evaluation.benchmarks.efficiency import spread
from modeling_dclip.evaluation.records import environment
from modeling_dclip.modeling_dclip import DCLIPModel


@dataclass
class BenchmarkArguments:
    """One run."""

    batch_size: int = field(default=4, metadata={"help": "Images a step."})
    regions: int = field(default=5, metadata={"help": "Regions an image."})
    tokens: int = field(
        default=16, metadata={"help": "Tokens a caption, BOS and EOS included; COCO's captions have 13 on average."}
    )
    pairs: int = field(default=9, metadata={"help": "Measured pairs of steps, after one that warms up."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    cross_attention: str = field(
        default="bidirectional", metadata={"help": "Of the teacher; regions is the leak-free one."}
    )
    device: str = field(default="cpu", metadata={"help": "Where to run; on cuda the clock waits for the device."})
    output: str = field(
        default="benchmarks/results/student_step.json", metadata={"help": "Results file; replaced if it is there."}
    )


def make_batch(args: BenchmarkArguments, config: DCLIPTeacherConfig) -> dict[str, torch.Tensor]:
    """Make random inputs in the shapes of ViT-B/16: those of both steps, and those of the online step alone."""
    batch, regions, width = args.batch_size, args.regions, config.projection_dim
    text_config = config.clip_config.text_config
    input_ids = torch.randint(1000, 40_000, (batch, args.tokens))
    input_ids[:, 0], input_ids[:, -1] = text_config.bos_token_id, text_config.eos_token_id
    corners = torch.rand(batch, regions, 2, 2).sort(dim=2).values  # (B, R, corner, xy)
    tensors = {
        "pixel_values": torch.randn(batch, 3, 224, 224),
        "region_pixel_values": torch.randn(batch, regions, 3, 224, 224),
        "region_boxes": corners.flatten(2),
        "region_scores": torch.rand(batch, regions),
        "input_ids": input_ids,
        "teacher_embeds": torch.randn(batch, width).half(),
        "text_embeds": torch.randn(batch, width).half(),
    }
    return {name: tensor.to(args.device) for name, tensor in tensors.items()}


class Steps:
    """The two kinds of step over one student, one optimiser and one batch."""

    def __init__(self, args: BenchmarkArguments):
        config = DCLIPTeacherConfig(cross_attention=args.cross_attention)  # ViT-B/16
        self.device = torch.device(args.device)
        self.teacher = DCLIPTeacher(config).eval().to(self.device)
        self.student = ImageSide(DCLIPModel(config.clip_config)).train().to(self.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
        self.batch = make_batch(args, config)

    def _learn(self, teacher_embeds: torch.Tensor, text_embeds: torch.Tensor) -> None:
        image_embeds = self.student(pixel_values=self.batch["pixel_values"])
        loss = cosine_distillation_loss(image_embeds, teacher_embeds) + contrastive_loss(image_embeds, text_embeds)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def cached(self) -> None:
        """Learn from teacher and text embeddings that are stored as columns."""
        self._learn(self.batch["teacher_embeds"], self.batch["text_embeds"])

    def online(self) -> None:
        """Run the teacher and the text tower, and learn from their embeddings."""
        names = ("region_pixel_values", "region_boxes", "region_scores", "input_ids")
        if self.teacher.config.cross_attention == "regions":
            names += ("pixel_values",)
        with torch.no_grad():
            outputs = self.teacher(**{name: self.batch[name] for name in names}, return_loss=False)
        self._learn(outputs.teacher_embeds, outputs.text_embeds)

    def time_ms(self, step) -> float:
        """Time one step, in milliseconds."""
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * (time.perf_counter() - start)


@command
def main() -> None:
    """Measure, print, write."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    set_seed(0)
    steps = Steps(args)
    pairs = []
    gc.disable()
    for index in range(args.pairs + 1):
        order = (steps.cached, steps.online) if index % 2 else (steps.online, steps.cached)
        times = {step.__name__: steps.time_ms(step) for step in order}
        gc.collect()
        if index:  # the first pair warms up
            pairs.append(times)
    ratios = [pair["online"] / pair["cached"] for pair in pairs]
    versions, hardware = environment()
    results = {
        "benchmark": "student_step",
        "arguments": {name: value for name, value in asdict(args).items() if name != "output"},
        "cached_ms": spread([pair["cached"] for pair in pairs]),
        "online_ms": spread([pair["online"] for pair in pairs]),
        "online_over_cached": spread(ratios),
        "n": len(pairs),
        "versions": versions,
        "hardware": hardware,
    }
    write_json(Path(args.output), results)
    print(json.dumps({name: results[name] for name in ("cached_ms", "online_ms", "online_over_cached")}, indent=2))
    print(
        f"Online over cached: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), in "
        f"{args.output}"
    )


if __name__ == "__main__":
    main()
