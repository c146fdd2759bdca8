"""What more negatives cost a step: banks of all captions and images, and large batches in micro-batches.

    python benchmarks/negatives.py

Random numbers in the shapes of ViT-B/32 and its embeddings, because time does not depend on them. Measured in
interleaved rounds: the contrastive loss with its gradient against banks, in tiles and with all products in one matrix,
and the in-batch loss, each beside a step of the image encoder; and a batch in micro-batches with the gradient of the
whole, against accumulating the gradients of these micro-batches. The peak memory of a loss is that of a process of its
own.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import HfArgumentParser, set_seed

from modeling_dclip import DCLIPConfig
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.distillation.losses import contrastive_loss
from modeling_dclip.distillation.negatives import NOTHING_EXCLUDED, Bank, bank_contrastive_loss
from modeling_dclip.distillation.trainer import ImageSide, run_in_micro_batches
from modeling_dclip.evaluation.benchmarks.efficiency import spread
from modeling_dclip.evaluation.records import environment
from modeling_dclip.modeling_dclip import DCLIPModel

CAPTIONS_OF_AN_IMAGE = 5


@dataclass
class BenchmarkArguments:
    """One run."""

    captions: list[int] = field(
        default_factory=lambda: [75_000, 375_000], metadata={"help": "Sizes of the text bank."}
    )
    batch_size: int = field(default=128, metadata={"help": "Images a step."})
    micro_batch_size: int = field(default=32, metadata={"help": "Images of a micro-batch."})
    rounds: int = field(default=3, metadata={"help": "Measured rounds, after one that warms up."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    device: str = field(default="cpu", metadata={"help": "Where to run; on cuda the clock waits for the device."})
    output: str = field(
        default="benchmarks/results/negatives.json", metadata={"help": "Results file; replaced if it is there."}
    )


def parts_of(size: int) -> tuple[torch.Tensor, ...]:
    """So many places in parts, so that no large float32 array is ever there."""
    return torch.arange(size).split(10_000)


class Losses:
    """The same loss in three ways, over one batch and one pair of banks."""

    def __init__(self, captions: int, args: BenchmarkArguments, width: int = 512):
        self.images, self.texts = (torch.randn(args.batch_size, width, device=args.device) for _ in range(2))
        self.banks = tuple(
            Bank(torch.cat([torch.randn(len(part), width, device=args.device).half() for part in parts_of(size)]))
            for size in (captions, captions // CAPTIONS_OF_AN_IMAGE)
        )

    def in_batch(self) -> torch.Tensor:
        """Against the batch alone."""
        return self._gradient(lambda images: contrastive_loss(images, self.texts))

    def tiles(self) -> torch.Tensor:
        """Against the banks, a tile at a time."""
        excluded = (NOTHING_EXCLUDED, NOTHING_EXCLUDED)
        return self._gradient(lambda images: bank_contrastive_loss(images, self.texts, self.banks, excluded))

    def one_matrix(self) -> torch.Tensor:
        """Against the banks, with all products held for the backward pass."""

        def loss(images: torch.Tensor) -> torch.Tensor:
            images, texts = F.normalize(images, dim=-1), F.normalize(self.texts, dim=-1)
            units = [F.normalize(bank.embeds.float(), dim=-1) for bank in self.banks]
            own = (images * texts).sum(dim=-1, keepdim=True)
            targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
            to_texts = F.cross_entropy(torch.cat([own, images @ units[0].T], dim=1) / 0.05, targets)
            wrong = (texts @ images.T).masked_fill(torch.eye(len(images), device=images.device).bool(), -torch.inf)
            return (to_texts + F.cross_entropy(torch.cat([own, wrong, texts @ units[1].T], dim=1) / 0.05, targets)) / 2

        return self._gradient(loss)

    def _gradient(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        images = self.images.clone().requires_grad_()
        return torch.autograd.grad(loss(images), images)[0]


def timed(ways: dict[str, Callable[[], object]], args: BenchmarkArguments) -> dict[str, list[float]]:
    """Milliseconds of each way in each round; rounds begin with another way in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    gc.disable()
    for index in range(args.rounds + 1):
        names = list(ways)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            gc.collect()
            start = time.perf_counter()
            ways[name]()
            if args.device != "cpu":
                torch.cuda.synchronize(args.device)
            if index:
                times[name].append(1000 * (time.perf_counter() - start))
    gc.enable()
    return times


def grown_mebibytes(captions: int, way: str, args: BenchmarkArguments) -> float:
    """How much the peak memory of this process grows by one gradient."""
    torch.set_num_threads(args.threads)
    losses = Losses(captions, args)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        getattr(losses, way)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = peak_mebibytes()
    getattr(losses, way)()
    return peak_mebibytes() - before


def peak_mebibytes() -> float:
    """The largest memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure_banks(args: BenchmarkArguments, step_ms: float) -> list[dict[str, object]]:
    """A row for each size of bank; the two ways must agree."""
    rows = []
    for captions in args.captions:
        losses = Losses(captions, args)
        torch.testing.assert_close(losses.tiles(), losses.one_matrix(), rtol=1e-3, atol=1e-6)
        times = timed({name: getattr(losses, name) for name in ("in_batch", "tiles", "one_matrix")}, args)
        stored = sum(bank.embeds.numel() * bank.embeds.element_size() for bank in losses.banks) / 2**20
        del losses
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            grown = {way: pool.apply(grown_mebibytes, (captions, way, args)) for way in ("tiles", "one_matrix")}
        pairs = zip(times["one_matrix"], times["tiles"], strict=True)
        rows.append(
            {
                "captions": captions,
                "images": captions // CAPTIONS_OF_AN_IMAGE,
                "bank_mebibytes": stored,
                "ms": {name: spread(one) for name, one in times.items()},
                "one_matrix_over_tiles": spread([whole / tiles for whole, tiles in pairs]),
                "tiles_over_step": spread([one / step_ms for one in times["tiles"]]),
                "grown_mebibytes": grown,
            }
        )
    return rows


def measure_steps(args: BenchmarkArguments) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of a batch's gradient: in micro-batches, accumulated over them; and the median of the latter."""
    config = DCLIPConfig()
    config.vision_config.patch_size = 32
    model = ImageSide(DCLIPModel(config)).train().to(args.device)
    pixels = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    texts = torch.randn(args.batch_size, config.projection_dim, device=args.device)
    plain = model.forward

    def accumulated() -> None:
        model.zero_grad()
        for part in zip(pixels.split(args.micro_batch_size), texts.split(args.micro_batch_size), strict=True):
            contrastive_loss(plain(part[0]), part[1]).backward()

    run_in_micro_batches(model, args.micro_batch_size)

    def micro_batches() -> None:
        model.zero_grad()
        contrastive_loss(model(pixel_values=pixels), texts).backward()

    times = timed({"accumulated": accumulated, "micro_batches": micro_batches}, args)
    return times, sorted(times["accumulated"])[len(times["accumulated"]) // 2]


@command
def main() -> None:
    """Measure, print, write."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    set_seed(0)
    steps, step_ms = measure_steps(args)
    versions, hardware = environment()
    results = {
        "benchmark": "negatives",
        "arguments": {name: value for name, value in asdict(args).items() if name != "output"},
        "step_ms": {name: spread(one) for name, one in steps.items()},
        "micro_batches_over_accumulated": spread(
            [one / other for one, other in zip(steps["micro_batches"], steps["accumulated"], strict=True)]
        ),
        "rows": measure_banks(args, step_ms),
        "versions": versions,
        "hardware": hardware,
    }
    write_json(Path(args.output), results)
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
