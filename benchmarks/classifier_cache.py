"""What the disk half of the cache of zero-shot classifiers saves: building a classifier against reading it.

    python benchmarks/classifier_cache.py

The classifier is ImageNet's: 1,000 class names and 80 templates, of the package open_clip_torch, are 80,000 prompts.
The text tower has the size of CLIP's ViT-B/32 and random weights, as time does not depend on them; the vocabulary is
CLIP's own, so that prompts have their real lengths. Building is timed on a random draw of prompts and multiplied up to
all of them. A hit is timed whole: the key (weights and token ids of all prompts) and the file. Times are CPU time of
the process, which other processes of the machine do not change much.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, HfArgumentParser, set_seed

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json, write_text
from modeling_dclip.data.labels.prompts import OPEN_CLIP, check_prompts, read_names, read_templates
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.zero_shot import ClassifierCache
from modeling_dclip.evaluation.embedding import embed_texts
from modeling_dclip.evaluation.records import environment

CLASSES = 1000


@dataclass
class BenchmarkArguments:
    """One run."""

    timed_prompts: int = field(default=1000, metadata={"help": "Prompts of the draw that is embedded and timed."})
    rounds: int = field(default=3, metadata={"help": "Measurements of each time."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    output: str = field(
        default="benchmarks/results/classifier_cache.json", metadata={"help": "Results file; replaced if it is there."}
    )


def make_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer of transformers, from the vocabulary that open_clip brings."""
    from open_clip.tokenizer import SimpleTokenizer

    stored = SimpleTokenizer()
    merges = sorted(stored.bpe_ranks, key=stored.bpe_ranks.get)
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(piece, piece): index
        for piece, index in stored.encoder.items()
    }
    write_text(folder / "vocab.json", json.dumps(vocabulary))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def time_s(function: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median and range of the CPU seconds of several calls."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


@command
def main() -> None:
    """Measure, print, write."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    set_seed(0)
    names = read_names(OPEN_CLIP, [str(number) for number in range(CLASSES)])
    names, templates = check_prompts(names, read_templates(OPEN_CLIP, []))
    names = list(dict.fromkeys(names))  # two classes of ImageNet share a name, which is embedded once
    prompts = [template.replace("{}", name) for name in names for template in templates]
    model = CLIPModel(CLIPConfig()).eval()  # ViT-B/32
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_clip_tokenizer(Path(folder))
        encoder = Encoder(model, tokenizer)
        drawn = random.Random(0).sample(prompts, args.timed_prompts)
        embed_texts(encoder, drawn[:64])  # warms up
        timed = time_s(lambda: embed_texts(encoder, drawn), args.rounds)
        classifier = torch.randn(len(names), model.config.projection_dim)

        def read() -> None:  # a new cache holds nothing in memory
            ClassifierCache(Path(folder) / "cache").get(model, tokenizer, names, templates, lambda: classifier)

        read()  # writes the file
        hit = time_s(read, args.rounds)
    factor = len(prompts) / args.timed_prompts
    build = {name: factor * seconds for name, seconds in timed.items()}
    versions, hardware = environment()
    results = {
        "benchmark": "classifier_cache",
        "arguments": {name: value for name, value in asdict(args).items() if name != "output"},
        "classes": len(names),
        "templates": len(templates),
        "prompts": len(prompts),
        "timed_prompts_cpu_s": timed,
        "build_cpu_s": build,
        "hit_cpu_s": hit,
        "saved_cpu_s": build["median"] - hit["median"],
        "n": args.rounds,
        "versions": versions,
        "hardware": hardware,
    }
    write_json(Path(args.output), results)
    costs = ("timed_prompts_cpu_s", "build_cpu_s", "hit_cpu_s", "saved_cpu_s")
    print(json.dumps({name: results[name] for name in costs}, indent=2))


if __name__ == "__main__":
    main()
