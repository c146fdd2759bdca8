"""Retrieval metrics against clip_benchmark's, and how their cost grows with the set.

    pip install --no-deps --target /tmp/clip_benchmark clip-benchmark
    python benchmarks/retrieval.py --packages /tmp/clip_benchmark

Both sides get the same embeddings from the same loader, batch after batch as a model would give them, and end with
their metrics: clip_benchmark's own `evaluate` with recall at 1, 5 and 10; ours with those, MRR, mAP and median ranks.
Every measurement runs in a process of its own. Memory is the highest resident size minus that before the first batch,
so it includes the collected embeddings and the similarities. The two sides take turns; a ratio is within a round. The
clock is the CPU time of the process with one thread, because a busy machine interrupts a long call more often than a
short one. A measurement that does not fit into free memory is not run, and one that takes too long is stopped.
"""

import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import HfArgumentParser

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.benchmarks.efficiency import growth_exponent, spread
from modeling_dclip.evaluation.benchmarks.retrieval import retrieval_metrics
from modeling_dclip.evaluation.records import environment
from modeling_dclip.evaluation.reports.plots import plot_growth

RECALLS = [f"{direction}_recall@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]


@dataclass
class BenchmarkArguments:
    """One run."""

    packages: str = field(metadata={"help": "Folder with clip_benchmark: pip install --no-deps --target."})
    images: list[int] = field(default_factory=lambda: [1000, 5000, 20_000], metadata={"help": "Sizes to compare at."})
    rounds: list[int] = field(default_factory=lambda: [3, 3, 1], metadata={"help": "For each of the sizes."})
    grow: list[int] = field(
        default_factory=lambda: [1000, 2500, 5000, 10_000, 20_000, 40_000],
        metadata={"help": "Sizes at which ours alone is measured, once each."},
    )
    captions: int = field(default=5, metadata={"help": "Captions an image."})
    width: int = field(default=512, metadata={"help": "Of the embeddings."})
    batch_size: int = field(
        default=64, metadata={"help": "Images a batch of the loader; clip_benchmark's own default."}
    )
    limit_s: int = field(default=1800, metadata={"help": "What takes longer by the clock on the wall is stopped."})
    output: str = field(default="benchmarks/results/retrieval.json", metadata={"help": "Results file; replaced."})
    work: str | None = field(
        default=None, metadata={"help": "Used by the script itself: SIDE:IMAGES to measure here."}
    )


class Embeddings:
    """A model, a tokenizer and a loader as clip_benchmark expects them, over random embeddings.

    The embeddings resemble those of a trained model.
    """

    def __init__(self, args: BenchmarkArguments, images: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(images, args.width, generator=generator)
        self.owners = torch.arange(images).repeat_interleave(args.captions)
        self.texts = torch.empty(len(self.owners), args.width)
        for rows, owners in zip(self.texts.split(4096), self.owners.split(4096), strict=True):
            rows.copy_(self.images[owners] + 8 * torch.randn(len(owners), args.width, generator=generator))
        self.batches = [
            (rows, [[str(row * args.captions + i) for i in range(args.captions)] for row in rows.tolist()])
            for rows in torch.arange(images).split(args.batch_size)
        ]
        self.model = SimpleNamespace(encode_image=self.images.__getitem__, encode_text=self.texts.__getitem__)

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Read the caption's row, which is its text."""
        return torch.tensor([int(text) for text in texts])


def measure_ours(data: Embeddings) -> dict[str, float]:
    """Collect embeddings as clip_benchmark does, then compute this package's metrics."""
    images, texts = [], []
    for rows, captions in data.batches:
        images.append(data.model.encode_image(rows))
        texts.append(data.model.encode_text(data.tokenize([text for own in captions for text in own])))
    return retrieval_metrics(torch.cat(images), torch.cat(texts), data.owners)


def measure_clip_benchmark(data: Embeddings) -> dict[str, float]:
    """Run clip_benchmark's `evaluate`, and give its metrics our names."""
    from clip_benchmark.metrics import zeroshot_retrieval

    options = {"amp": False, "recall_k_list": [1, 5, 10]}
    metrics = zeroshot_retrieval.evaluate(data.model, data.batches, data.tokenize, "cpu", **options)
    names = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}
    return {name: metrics[f"{names[name.split('_recall')[0]]}_recall@{name.split('@')[1]}"] for name in RECALLS}


def resident_mib(field_name: str) -> float:
    """Read how much memory the process holds (`VmRSS`), or the most it held (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field_name)).split()[1]) / 1024


def work(args: BenchmarkArguments) -> None:
    """Measure one side once, and print it as JSON."""
    side, images = args.work.split(":")
    sys.path.insert(0, args.packages)
    torch.set_num_threads(1)
    sides = {"ours": measure_ours, "clip_benchmark": measure_clip_benchmark}
    sides[side](Embeddings(args, 2 * args.batch_size))  # what is set up at the first call
    data = Embeddings(args, int(images))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = resident_mib("VmRSS"), time.process_time()
    metrics = sides[side](data)
    seconds = time.process_time() - start
    result = {"cpu_s": seconds, "peak_memory_mib": resident_mib("VmHWM") - before, "metrics": metrics}
    print(json.dumps(result))


def run(args: BenchmarkArguments, side: str, images: int) -> dict:
    """Measure one side in a process of its own."""
    options = {name: getattr(args, name) for name in ("packages", "captions", "width", "batch_size")}
    command = [sys.executable, __file__, "--work", f"{side}:{images}"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, timeout=args.limit_s
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{side} at {images} images: {result['cpu_s']:.2f} s, {result['peak_memory_mib']:.0f} MiB", flush=True)
    return result


def free_mib() -> float:
    """Read how much memory is free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 1024


def compare(args: BenchmarkArguments, images: int, rounds: int) -> dict:
    """Measure both sides in turns, or say why one of them cannot run."""
    row = {"images": images, "captions": images * args.captions, "rounds": rounds}
    matrix_mib = images * images * args.captions * 5 / 2**20  # its similarities, and which of them are right
    if 1.5 * matrix_mib > free_mib():
        return row | {
            "not_run": f"clip_benchmark needs {matrix_mib:.0f} MiB for two matrices, {free_mib():.0f} are free"
        }
    pairs = []
    for index in range(rounds):
        order = ("ours", "clip_benchmark") if index % 2 else ("clip_benchmark", "ours")
        try:
            pairs.append({side: run(args, side, images) for side in order})
        except subprocess.TimeoutExpired as error:
            side = "clip_benchmark" if "clip_benchmark:" in " ".join(error.cmd) else "ours"
            return row | {"not_run": f"{side} was stopped after {args.limit_s} s"}
    for side in ("ours", "clip_benchmark"):
        row[side] = {cost: spread([pair[side][cost] for pair in pairs]) for cost in ("cpu_s", "peak_memory_mib")}
    for cost, name in (("cpu_s", "times_faster"), ("peak_memory_mib", "times_less_memory")):
        row[name] = spread([pair["clip_benchmark"][cost] / pair["ours"][cost] for pair in pairs])
    ours, theirs = (pairs[0][side]["metrics"] for side in ("ours", "clip_benchmark"))
    row["largest_difference"] = max(abs(ours[name] - theirs[name]) for name in RECALLS)
    row["text_to_image_recall@1"] = ours["text_to_image_recall@1"]
    return row


@command
def main() -> None:
    """Measure, print, write, draw."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    if args.work:
        work(args)
        return
    growth = [
        {"captions": images * args.captions, "images": images, **run(args, "ours", images)} for images in args.grow
    ]
    for point in growth:
        del point["metrics"]
    rows = [compare(args, images, rounds) for images, rounds in zip(args.images, args.rounds, strict=True)]
    versions, hardware = environment()
    sizes = [point["captions"] for point in growth]
    exponents = {
        cost: growth_exponent(sizes, [point[cost] for point in growth]) for cost in ("cpu_s", "peak_memory_mib")
    }
    arguments = {name: value for name, value in asdict(args).items() if name not in ("output", "packages", "work")}
    results = {"benchmark": "retrieval", "arguments": arguments | {"threads": 1}, "rows": rows, "growth": growth}
    (info,) = Path(args.packages).glob("clip_benchmark-*.dist-info")
    versions["clip_benchmark"] = info.name.removesuffix(".dist-info").partition("-")[2]
    results |= {"growth_exponents_in_captions": exponents, "n": sum(args.rounds)}
    write_json(args.output, results | {"versions": versions, "hardware": hardware})
    for cost, label in (("cpu_s", "CPU time (s)"), ("peak_memory_mib", "peak memory (MiB)")):
        series = {"modeling_dclip": [(point["captions"], spread([point[cost]])) for point in growth]}
        series["clip_benchmark"] = [(row["captions"], row["clip_benchmark"][cost]) for row in rows if "ours" in row]
        series = {name: points for name, points in series.items() if points}
        path = Path(args.output).with_name(
            f"{Path(args.output).stem}_{cost.removesuffix('_s').removesuffix('_mib')}.png"
        )
        plot_growth(series, path, x_label=f"captions, {args.captions} an image", y_label=label)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
