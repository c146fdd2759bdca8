"""What ONNX Runtime gains over eager PyTorch for each exported tower, and what the precision costs, in one run.

    OMP_NUM_THREADS=1 python benchmarks/onnx_towers.py

The model is a DCLIP of the size of CLIP ViT-B/16 with random weights. Towers take turns on one CPU thread; ratios are
medians over rounds, of CPU time. Pixels and token ids are random, so the cosine of 8-bit weights is that of weights
and inputs without structure.
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from transformers import HfArgumentParser

from modeling_dclip.configuration_dclip import DCLIPConfig
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.benchmarks.efficiency import interleaved_times, spread
from modeling_dclip.evaluation.records import environment
from modeling_dclip.hub.export import ONNX_DTYPES
from modeling_dclip.hub.export.onnx import EXPORTED_TOWERS, compare_onnx, make_onnx
from modeling_dclip.modeling_dclip import DCLIPModel

TOWER_SIZES = {
    "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    },
}


@dataclass
class BenchmarkArguments:
    """One run."""

    towers: list[str] = field(
        default_factory=lambda: list(EXPORTED_TOWERS), metadata={"help": f"Of {', '.join(EXPORTED_TOWERS)}."}
    )
    dtypes: list[str] = field(
        default_factory=lambda: ["fp32", "int8"], metadata={"help": f"Of {', '.join(ONNX_DTYPES)}."}
    )
    batch_size: int = field(default=1, metadata={"help": "Images or texts at once; texts fill the tower's length."})
    rounds: int = field(default=9, metadata={"help": "Measured rounds."})
    tower_seconds: float = field(default=60.0, metadata={"help": "No further round of a tower starts after so long."})
    output: str = field(
        default="benchmarks/results/onnx_towers.json", metadata={"help": "Results file; replaced if it is there."}
    )


def measure(name: str, model: DCLIPModel, args: BenchmarkArguments) -> list[dict[str, Any]]:
    """Measure one tower: a row for eager PyTorch and one for each dtype."""
    tower = EXPORTED_TOWERS[name](model).eval()
    inputs = tower.sample(args.batch_size)
    if name == "text":
        inputs = inputs.new_full((args.batch_size, tower.config.max_position_embeddings), 320)
        inputs[:, -1] = tower.config.eos_token_id
    calls, rows = {"eager": lambda: tower(inputs)}, {"eager": {}}
    float32_content = make_onnx(tower, "fp32")
    for dtype in args.dtypes:
        content = float32_content if dtype == "fp32" else make_onnx(tower, dtype, float32_content)
        rows[f"onnx_{dtype}"] = {"mebibytes": len(content) / 2**20, **compare_onnx(content, tower, dtype)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        feed = {tower.input_name: inputs.numpy()}
        calls[f"onnx_{dtype}"] = lambda session=session, feed=feed: session.run(None, feed)
    times = interleaved_times(calls, rounds=args.rounds, max_seconds=args.tower_seconds)
    eager = [time["cpu_ms"] for time in times["eager"]]
    return [
        {
            "tower": name,
            "form": form,
            "batch_size": args.batch_size,
            **found,
            "cpu_ms": spread([time["cpu_ms"] for time in times[form]]),
            "latency_ms": spread([time["latency_ms"] for time in times[form]]),
            "rounds": len(times[form]),
            "eager_over": spread([a / b["cpu_ms"] for a, b in zip(eager, times[form], strict=True)]),
        }
        for form, found in rows.items()
    ]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DCLIPModel(DCLIPConfig(**TOWER_SIZES)).eval()
    versions, hardware = environment()
    versions |= {package: metadata.version(package) for package in ("onnx", "onnxruntime", "onnxscript")}
    rows: list[dict[str, Any]] = []
    for name in args.towers:
        with torch.no_grad():
            rows += (measured := measure(name, model, args))
        gc.collect()
        for row in measured:
            print(
                f"{row['tower']:6} {row['form']:10} CPU {row['cpu_ms']['median']:7.1f} ms, eager / it "
                f"{row['eager_over']['median']:.2f} ({row['eager_over']['min']:.2f}-{row['eager_over']['max']:.2f}), "
                f"difference {row.get('max_relative_difference', 0.0):.1e}, cosine {row.get('min_cosine', 1.0):.5f}",
                flush=True,
            )
        write_json(
            Path(args.output),
            {
                "benchmark": "onnx_towers",
                "arguments": {key: value for key, value in asdict(args).items() if key != "output"},
                "rows": rows,
                "versions": versions,
                "hardware": hardware,
            },
        )


if __name__ == "__main__":
    main()
