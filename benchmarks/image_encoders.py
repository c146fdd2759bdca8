"""What an image encoder costs: ours, MobileCLIP-S1's and CLIP's, in one run.

    PYTHONPATH=/tmp/timm_bench python benchmarks/image_encoders.py
    python benchmarks/image_encoders.py --encoders dmclip_t clip_vitb16 --cells 224@1 384@1

MobileCLIP-S1's encoder (FastViT MCi1) comes from timm: `pip install --no-deps --target /tmp/timm_bench timm`. It is
measured in its training form and reparameterised. The reparameterised form is the fair rival, because that is how it
is meant to run. Our windows divide the map, unless a form says `published_windows`. The published MambaVision's own
code is measured as `published_mambavision_*`, with the weights of ours, from the folder `--published_package` (see
published_mambavision.py).

A form is an encoder's name, a colon, and changes joined by plus: `fused` (norms folded in), `published_windows`,
`bf16`, `compiled`, `onnx`, `winograd` (convolutions in fewer products, after `fused`), and for published code
`our_scan`. The output of each form is compared with that of the eager form.

Weights are random. Statistics and gains are uneven, so that a form that lost one of them would show. A cell is an
image size (or `native`: each encoder's own) and a batch size. Encoders take turns within a cell; ratios are medians
over rounds. With one thread on the CPU they are ratios of CPU time, which equals the latency of an idle machine; the
wall clock stands next to it. On CUDA everything runs compiled with CUDA graphs in bfloat16 unless told otherwise, and
ratios are of latency. Parameters, operations and memory (`eager_*`) are those of the eager float32 model in every row.
"""

import copy
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from published_mambavision import PUBLISHED, PublishedEncoder, import_published
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, HfArgumentParser

from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS, NUM_CONV_STAGES, DMCLIPVisionConfig
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.benchmarks.efficiency import (
    SCAN_FLOPS,
    count_flops,
    growth_exponent,
    interleaved_times,
    peak_memory_mib,
    spread,
)
from modeling_dclip.evaluation.records import environment
from modeling_dclip.evaluation.reports.plots import plot_growth
from modeling_dclip.hub.export.winograd import use_winograd
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel

OURS = {f"dmclip_{name.lower()}": preset for name, preset in DMCLIP_PRESETS.items()}
S1_FORMS = ("mobileclip_s1_train_form", "mobileclip_s1_reparameterised")
VIT_PATCHES = {"clip_vitb16": 16, "clip_vitb32": 32}
NATIVE_SIZES = {**dict.fromkeys([*OURS, *PUBLISHED, *VIT_PATCHES], 224), **dict.fromkeys(S1_FORMS, 256)}
FORMS = ("published_windows", "fused", "winograd", "bf16", "compiled", "onnx", "our_scan")
DEFAULT_ENCODERS = (
    "dmclip_t",
    "dmclip_b",
    "mobileclip_s1_reparameterised",
    "clip_vitb16",
    "mobileclip_s1_train_form@native",
    "clip_vitb32@native",
    "dmclip_t:fused@native",
    "dmclip_t:bf16@native",
    "mobileclip_s1_reparameterised:bf16@native",
    "dmclip_t:fused+onnx@native@1",
    "dmclip_t:fused+winograd+onnx@native@1",
    "mobileclip_s1_reparameterised:onnx@native@1",
    "dmclip_t:published_windows@256@1",
    "dmclip_b:published_windows@256@1",
)
TARGETS = {  # by device and encoder: the largest ratio to a rival
    "cpu": {"dmclip_t": {S1_FORMS[1]: 0.9}, "dmclip_b": {"published_mambavision_b": 1.0}},
    "cuda": {
        "dmclip_t": {S1_FORMS[1]: 0.75, S1_FORMS[0]: 0.4},
        "dmclip_b": {S1_FORMS[1]: 1.0, S1_FORMS[0]: 0.5, "published_mambavision_b": 1.0},
    },
}


@dataclass
class BenchmarkArguments:
    """One run."""

    encoders: list[str] = field(
        default_factory=lambda: list(DEFAULT_ENCODERS),
        metadata={
            "help": f"encoder[:change+change][@cells]: of {', '.join(NATIVE_SIZES)}; changes of {', '.join(FORMS)}; "
            "only in this cell, or with @native in the native ones"
        },
    )
    cells: list[str] = field(
        default_factory=lambda: ["native@1", "native@8", "224@1", "256@1", "384@1", "512@1"],
        metadata={"help": "Image size (or native) @ batch size."},
    )
    rounds: int = field(default=7, metadata={"help": "Measured rounds of a cell."})
    cell_seconds: float = field(default=30.0, metadata={"help": "No further round of a cell starts after so long."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    changes: str = field(
        default="auto",
        metadata={"help": "Made to every encoder: as in a form; auto is none on cpu, bf16+compiled on cuda."},
    )
    published_package: str | None = field(
        default=None,
        metadata={"help": "Folder that the package mambavision was fetched to; see published_mambavision.py."},
    )
    output: str = field(
        default="benchmarks/results/image_encoders.json",
        metadata={"help": "Results file; replaced if it is there. The plot stands beside it."},
    )


def build(name: str, image_size: int, changes: Sequence[str], args: BenchmarkArguments) -> nn.Module:
    """Build an encoder in eval mode, from pixels to embeddings of width 512. Equal names give equal weights."""
    torch.manual_seed(0)
    if name in PUBLISHED:
        scan = None if args.device.startswith("cuda") else "torch" if "our_scan" in changes else "reference"
        ours = build(twin_of(name), image_size, ["published_windows"], args)
        return PublishedEncoder(
            ours, PUBLISHED[name], import_published(args.published_package, args.device), scan
        ).eval()
    if name in OURS:
        config = DMCLIPVisionConfig(**OURS[name])
        model = DMCLIPVisionModel(config if "published_windows" in changes else config.for_image_size(image_size))
    elif name in VIT_PATCHES:
        layers = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        model = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**layers, patch_size=VIT_PATCHES[name], image_size=image_size)
        )
    else:
        timm = import_timm()
        model = timm.create_model("fastvit_mci1", num_classes=512)
    make_uneven(model)
    model.eval()
    return timm.utils.reparameterize_model(model) if name == S1_FORMS[1] else model


def twin_of(name: str) -> str:
    """Name the encoder of the same architecture: the published MambaVision for ours, and ours for a published one."""
    preset = PUBLISHED.get(name)
    return f"dmclip_{preset.lower()}" if preset else name.replace("dmclip_", "published_mambavision_")


def function_of(name: str, model: nn.Module) -> tuple:
    """Identify what an encoder computes. Encoders with equal values must give equal outputs."""
    if isinstance(model, (DMCLIPVisionModel, PublishedEncoder)):
        return model.config.hidden_size, model.config.depths, model.config.window_sizes
    return ("mobileclip_s1" if name in S1_FORMS else name,)  # reparameterised, it is still the same function


def import_timm() -> Any:
    """Import timm, or exit with a message that says how to install it."""
    try:
        import timm
        import timm.utils
    except ImportError as error:
        raise SystemExit(
            f"Expected timm for {' and '.join(S1_FORMS)}, got no such package ({error}). Install it apart, `pip "
            "install --no-deps --target /tmp/timm_bench timm`, and run with PYTHONPATH=/tmp/timm_bench; or leave "
            "those encoders out."
        ) from error
    return timm


@torch.no_grad()
def make_uneven(model: nn.Module) -> None:
    """Move statistics away from 0 and 1, and layer scales to order 1.

    At the initial values a form could lose them without a difference in the output.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.7, 1.4)
    for name, parameter in model.named_parameters():
        if "gamma" in name.rpartition(".")[2]:
            parameter.uniform_(0.1, 0.3)


def apply_changes(model: nn.Module, changes: Sequence[str], pixels: torch.Tensor, threads: int) -> Callable[[], Any]:
    """Make a call that embeds the pixels in the wanted form."""
    if "fused" in changes:
        model = model.fuse()
    if "winograd" in changes:
        use_winograd(model)
    dtype = torch.bfloat16 if "bf16" in changes else torch.float32
    model, pixels = model.to(pixels.device, dtype), pixels.to(dtype)
    if "onnx" in changes:
        return onnx_call(model, pixels, threads)
    if "compiled" in changes:
        model = torch.compile(model, mode="reduce-overhead" if pixels.device.type == "cuda" else "default")
    return lambda: embeddings(model(pixels))


def embeddings(outputs: Any) -> torch.Tensor:
    """Take the embeddings from the output of a model of timm or of transformers."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs.image_embeds


class EmbeddingsOnly(nn.Module):
    """A model for export: pixels in, one tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed."""
        return embeddings(self.model(pixels))


def onnx_call(model: nn.Module, pixels: torch.Tensor, threads: int) -> Callable[[], Any]:
    """Export the model, and make a call that runs it with ONNX Runtime on this many threads."""
    import onnxruntime

    program = torch.onnx.export(EmbeddingsOnly(model).eval(), (pixels,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: pixels.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def scan_flops(model: nn.Module, image_size: int, batch_size: int) -> int:
    """Count the operations of the selective scans, which no counter knows."""
    if not isinstance(model, (DMCLIPVisionModel, PublishedEncoder)):
        return 0
    config, total = model.config, 0
    for stage in range(NUM_CONV_STAGES, len(config.depths)):
        window, places = config.window_sizes[stage], -(-image_size // (4 * 2**stage))
        positions = (-(-places // window) * window) ** 2
        mixers = config.depths[stage] - config.depths[stage] // 2
        total += mixers * positions * (config.stage_sizes[stage] // 2) * config.state_size * SCAN_FLOPS
    return batch_size * total


def parse_encoder(entry: str) -> tuple[str, list[str], str]:
    """Split `"dmclip_t:fused+bf16@native"` into name, changes and cell; `ValueError` names what is unknown."""
    form, _, pinned = entry.partition("@")
    name, _, joined = form.partition(":")
    changes = joined.split("+") if joined else []
    if name not in NATIVE_SIZES or not set(changes) <= set(FORMS):
        raise ValueError(
            f"Expected an encoder of {', '.join(NATIVE_SIZES)} and changes of {', '.join(FORMS)}, got {entry!r}."
        )
    if {"fused", "published_windows"} & set(changes) and name not in OURS:
        raise ValueError(f"Expected one of {', '.join(OURS)} for fused and published_windows, got {entry!r}.")
    if "winograd" in changes and "fused" not in changes:
        raise ValueError(f"Expected fused beside winograd, got {entry!r}.")
    if "our_scan" in changes and name not in PUBLISHED:
        raise ValueError(f"Expected one of {', '.join(PUBLISHED)} for our_scan, got {entry!r}.")
    return name, changes, pinned


def parse_cell(cell: str) -> tuple[int | None, int]:
    """Split `"224@8"` into image size (`None` for native) and batch size."""
    size, _, batch = cell.partition("@")
    if not batch.isdigit() or not (size.isdigit() or size == "native"):
        raise ValueError(f"Expected IMAGE_SIZE@BATCH_SIZE or native@BATCH_SIZE, got {cell!r}.")
    return (int(size) if size.isdigit() else None), int(batch)


def compare(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Compare outputs: the largest difference over the largest value, and the lowest cosine of a row."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return {
        "difference_to_eager": float((found - expected).abs().max() / expected.abs().max()),
        "cosine_to_eager": float(torch.cosine_similarity(found, expected).min()),
    }


def describe(model: nn.Module, pixels: torch.Tensor) -> dict[str, Any]:
    """Measure what does not depend on the machine's load: parameters, operations, and the memory of a call.

    All of it is of the eager float32 model, whatever form is timed: no counter sees into ONNX Runtime or a compiled
    graph. The memory does not include the weights.
    """
    with torch.device("meta"):
        twin, shapes = copy.deepcopy(model).to("meta"), torch.empty_like(pixels, device="meta")
    batch_size, _, image_size, _ = pixels.shape
    return {
        "eager_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "eager_gflops": (count_flops(lambda: twin(shapes)) + scan_flops(model, image_size, batch_size)) / 1e9,
        "eager_peak_memory_mib": peak_memory_mib(lambda: model(pixels), pixels.device),
    }


def run_cell(cell: str, args: BenchmarkArguments) -> list[dict[str, Any]]:
    """Build the encoders of a cell, describe them, compare forms with eager ones, and time all in turns."""
    size, batch_size = parse_cell(cell)
    calls, rows, eager = {}, {}, {}
    for entry in args.encoders:
        name, changes, pinned = parse_encoder(entry)
        if pinned not in ("", cell) and not (pinned == "native" and size is None):
            continue
        form, image_size = entry.partition("@")[0], size or NATIVE_SIZES[name]
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(batch_size, 3, image_size, image_size, generator=generator).to(args.device)
        model = build(name, image_size, changes, args).to(args.device)
        base = function_of(name, model)
        found = None
        if base not in eager:
            found = eager[base] = embeddings(model(pixels)).clone()
        calls[form] = apply_changes(model, [*changes, *args.changes.split("+")], pixels, args.threads)
        if changes or args.changes or found is None:
            found = calls[form]().clone()
        shared = {"cell": cell, "encoder": form, "image_size": image_size, "batch_size": batch_size}
        if name in PUBLISHED:
            shared["scan"] = model.scan_name
        described = describe(build(name, image_size, changes, args).to(args.device), pixels)
        rows[form] = shared | described | compare(found, eager[base])
    load = os.getloadavg()[0]
    times = interleaved_times(
        calls,
        rounds=args.rounds,
        warmups=3 if args.device == "cuda" else 0,  # compared above, each has run once
        max_seconds=args.cell_seconds,
        min_ms=50.0 if args.device == "cuda" else 0.0,
        device=args.device,
    )
    clock = ratio_clock(args)
    return [finish_row(row | {"load_average": load}, times, clock) for row in rows.values()]


def ratio_clock(args: BenchmarkArguments) -> str:
    """Choose the clock of ratios, growth and plot."""
    return "cpu_ms" if args.device == "cpu" and args.threads == 1 else "latency_ms"


def finish_row(row: dict[str, Any], times: dict[str, list[dict[str, float]]], clock: str) -> dict[str, Any]:
    """Add to a row its times, its throughput, and its ratios to MobileCLIP-S1 and published code in each round."""
    own = times[row["encoder"]]
    for name in ("latency_ms", "cpu_ms"):
        row[name] = spread([taken[name] for taken in own])
    row["images_per_second"] = 1000 * row["batch_size"] / row["latency_ms"]["median"]
    row["rounds"] = len(own)
    name, _, joined = row["encoder"].partition(":")
    changes = joined.split("+")  # S1 in the same form; reparameterised, it is fused already
    alike = ":".join([S1_FORMS[1], "+".join(change for change in changes if change in ("bf16", "compiled", "onnx"))])
    published = [twin_of(name), f"{twin_of(name)}:our_scan"] if name in OURS else []
    rivals = [rival for rival in (*S1_FORMS, alike, *published) if rival in times]
    row["time_over"] = {
        rival: spread([a[clock] / b[clock] for a, b in zip(own, times[rival], strict=True)])
        for rival in rivals
        if rival != row["encoder"]
    }
    return row


def growth(rows: Sequence[dict[str, Any]], clock: str) -> dict[str, float]:
    """Fit the exponent of time in pixels, for each encoder with two or more sizes at the smallest batch."""
    batch_size = min(row["batch_size"] for row in rows)
    fitted = {}
    for encoder in dict.fromkeys(row["encoder"] for row in rows):
        found = [row for row in rows if row["encoder"] == encoder and row["batch_size"] == batch_size]
        found = [row for row in found if not row["cell"].startswith("native")]
        if len({row["image_size"] for row in found}) > 1:
            costs = [row[clock]["median"] for row in found]
            fitted[encoder] = growth_exponent([row["image_size"] ** 2 for row in found], costs)
    return fitted


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Render the rows as aligned text."""
    lines = [
        f"{'cell':10} {'encoder':38} {'px':>4} {'ms median (range)':>26} {'CPU ms':>8} {'img/s':>8} {'M par.':>7} "
        f"{'GFLOP':>8} {'MiB':>7} {'diff.':>8} {'/ S1 rep.':>9} {'/ S1 train':>10}"
    ]
    for row in rows:
        wall = row["latency_ms"]
        times = f"{wall['median']:.1f} ({wall['min']:.1f}-{wall['max']:.1f})"
        ratios = [row["time_over"].get(rival, {}).get("median") for rival in reversed(S1_FORMS)]
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(
            f"{row['cell']:10} {row['encoder']:38} {row['image_size']:4} {times:>26} {row['cpu_ms']['median']:8.1f} "
            f"{row['images_per_second']:8.1f} {row['eager_parameters'] / 1e6:7.1f} {row['eager_gflops']:8.2f} "
            f"{row['eager_peak_memory_mib']:7.1f} {row['difference_to_eager']:8.1e} {shown[0]:>9} {shown[1]:>10}"
        )
    return "\n".join(lines)


def judge(rows: Sequence[dict[str, Any]], device: str) -> list[str]:
    """Say for each target of a native cell whether it was reached or missed."""
    lines = []
    for row in rows:
        for rival, target in TARGETS.get(device, {}).get(row["encoder"], {}).items():
            if row["cell"].startswith("native") and rival in row["time_over"]:
                ratio = row["time_over"][rival]["median"]
                verdict = "reached" if ratio <= target else "missed"
                lines.append(f"{row['cell']}: {row['encoder']} over {rival} {ratio:.2f}, target {target}: {verdict}")
    return lines


def summarise(rows: Sequence[dict[str, Any]], args: BenchmarkArguments) -> dict[str, Any]:
    """Make the content of the results file."""
    versions, hardware = environment()
    for package in ("timm", "onnxruntime", "mambavision", "mamba_ssm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    clock = ratio_clock(args)
    return {
        "benchmark": "image_encoders",
        "arguments": {name: value for name, value in asdict(args).items() if name != "output"},
        "clock_of_ratios": clock,
        "rows": list(rows),
        "growth_exponents": growth(rows, clock),
        "targets": judge(rows, args.device.partition(":")[0]),
        "versions": versions,
        "hardware": hardware,
    }


def draw(rows: Sequence[dict[str, Any]], exponents: dict[str, float], clock: str, path: Path) -> None:
    """Draw time against resolution, a line for each encoder."""
    batch_size = min(row["batch_size"] for row in rows)
    series = {}
    for encoder, exponent in exponents.items():
        found = [row for row in rows if (row["encoder"], row["batch_size"]) == (encoder, batch_size)]
        found = sorted(
            (row for row in found if not row["cell"].startswith("native")), key=lambda row: row["image_size"]
        )
        label = f"{encoder.replace('_', ' ')}: pixels$^{{{exponent:.2f}}}$"
        series[label] = [(row["image_size"], row[clock]) for row in found]
    what = "CPU time, 1 thread" if clock == "cpu_ms" else "latency"
    plot_growth(series, path, x_label="image side (pixels)", y_label=f"{what}, batch {batch_size} (ms)")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write, draw."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    if args.changes == "auto":
        args.changes = "bf16+compiled" if args.device == "cuda" else ""
    for cell in args.cells:
        parse_cell(cell)
    if any(parse_encoder(entry)[0] in S1_FORMS for entry in args.encoders):
        import_timm()
    if any(parse_encoder(entry)[0] in PUBLISHED for entry in args.encoders):
        import_published(args.published_package, args.device)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for cell in args.cells:
            gc.collect()
            rows += (measured := run_cell(cell, args))
            print(table(measured), flush=True)
            results = summarise(rows, args)  # after every cell: a run that is interrupted leaves what it measured
            write_json(Path(args.output), results)
    exponents = results["growth_exponents"]
    for encoder, exponent in exponents.items():
        print(f"{encoder}: time grows as pixels^{exponent:.2f}")
    print("\n".join(results["targets"]))
    if exponents:
        draw(rows, exponents, results["clock_of_ratios"], Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
