"""What a call costs: time next to its rivals on one machine, operations, memory, and how they grow with the input.

The functions take calls without arguments, so a model, a compiled model and an ONNX session are measured in one way.
[`evaluate_efficiency`] is the benchmark of one dual encoder.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import modeling_dclip.selective_scan  # noqa: F401  registers its operators
from modeling_dclip.data.files import read_json, temporary_folder
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.families import projected, tokenize_texts
from modeling_dclip.encoders.loading import require_dual_encoder
from modeling_dclip.evaluation.records import BenchmarkResult

Call = Callable[[], Any]
MIB = 2**20
SCAN_FLOPS = 9  # for each position, channel and state: the usual count
MIN_MS = 20.0  # a shorter call is repeated to fill it, so that the clock's own cost does not count


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range of one or more values.

    Args:
        values (`Sequence[float]`): In any unit.

    Returns:
        `dict[str, float]`: `median`, `min` and `max`.

    Example:
        >>> spread([9.0, 1.0, 2.0])
        {'median': 2.0, 'min': 1.0, 'max': 9.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def interleaved_times(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    warmups: int = 1,
    max_seconds: float = math.inf,
    min_ms: float = 0.0,
    device: str | torch.device = "cpu",
) -> dict[str, list[dict[str, float]]]:
    """Time several calls in turns, so that all see the same machine; a ratio within a round cancels the load.

    Each round starts with another call, so that no call always follows the same one.

    Args:
        calls (`Mapping[str, Callable]`): By name.
        rounds (`int`): Measured rounds, at least 1.
        warmups (`int`, *optional*, defaults to 1): Rounds before them that are not kept.
        max_seconds (`float`, *optional*): No further round starts after this many seconds. Three rounds are always
            measured, if `rounds` allows.
        min_ms (`float`, *optional*, defaults to 0): Shorter calls are repeated to fill this time, and averaged.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): On CUDA the clock waits for the device after
            each call.

    Returns:
        `dict[str, list[dict]]`: For each name and round `latency_ms`, by the wall clock, and `cpu_ms`, of all threads
            of the process. On a busy machine the second one moves less.

    Raises:
        ValueError: If there is no call or no round.
    """
    if not calls or rounds < 1:
        raise ValueError(f"Expected one or more calls and rounds, got {len(calls)} calls and {rounds} rounds.")
    device = torch.device(device)
    names, repeats = list(calls), dict.fromkeys(calls, 1)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    start = time.perf_counter()
    for index in range(-warmups, rounds):
        if index >= 3 and time.perf_counter() - start > max_seconds:
            break
        for place in range(len(names)):
            name = names[(index + place) % len(names)]
            taken = _time(calls[name], repeats[name], device)
            if index >= 0:
                times[name].append(taken)
            if index < 0:
                repeats[name] = max(1, math.ceil(min_ms / max(taken["latency_ms"], 1e-3)))
    return times


def _time(call: Call, repeats: int, device: torch.device) -> dict[str, float]:
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
        _wait(device)
    return {
        "latency_ms": 1000 * (time.perf_counter() - wall) / repeats,
        "cpu_ms": 1000 * (time.process_time() - cpu) / repeats,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(call: Call, formulas: Mapping[Any, Callable[..., int]] | None = None) -> int:
    """Count the floating-point operations of matrix products and convolutions.

    A multiplication with an addition counts as two. Attention is counted through its plain form, also that of
    `nn.MultiheadAttention` in eval mode. Operators without a formula in PyTorch, such as the selective scan, count as
    nothing: give their formulas.

    Args:
        call (`Callable`): Runs eager PyTorch.
        formulas (`Mapping`, *optional*): Operator of `torch.ops` -> function of its arguments' shapes.

    Returns:
        `int`: Operations, >= 0.

    Example:
        >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
        48
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, which the counter does not know
    try:
        counter = FlopCounterMode(display=False, custom_mapping=dict(formulas or {}))
        with sdpa_kernel(SDPBackend.MATH), counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops()


def _scan_flops(x: Sequence[int], delta: Sequence[int], A: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, channels, length = x
    return SCAN_FLOPS * batch * channels * length * A[1]


def scan_formulas() -> dict[Any, Callable[..., int]]:
    """Give [`count_flops`] the formulas of this package's selective scans, on every device."""
    operators = torch.ops.modeling_dclip_selective_scan
    names = ("chunked", "triton")  # the second only where Triton is
    return {getattr(operators, name): _scan_flops for name in names if hasattr(operators, name)}


def peak_memory_mib(call: Call, device: str | torch.device = "cpu") -> float:
    """Measure the most memory that a call holds at once for activations and buffers, beyond what was there before.

    Args:
        call (`Callable`): Runs eager PyTorch. Run it once before, so that nothing is set up for the first time.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where its tensors are.

    Returns:
        `float`: In MiB, of PyTorch's allocator, not of the process. Exact, and the same at each call.
    """
    device = torch.device(device)
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and a missing GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with temporary_folder() as folder:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        events = read_json(folder / "trace.json", "trace of the profiler", ["traceEvents"])["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / MIB


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit `cost = a * size ** exponent` by least squares between the logarithms.

    Args:
        sizes (`Sequence[float]`): Two or more different ones, > 0; for images the pixels, width times height.
        costs (`Sequence[float]`): One for each size, > 0.

    Returns:
        `float`: 1 is linear growth.

    Raises:
        ValueError: If the numbers of sizes and costs differ, there are fewer than two different sizes, or a number is
            not positive.

    Example:
        >>> round(growth_exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(f"Expected two or more positive sizes with a positive cost each, got {sizes} and {costs}.")
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(xs, ys).slope


def _repeated(inputs: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}


@torch.no_grad()
def evaluate_efficiency(
    encoder: Encoder,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 10,
    max_seconds: float = 60.0,
    text_tokens: int = 77,
) -> BenchmarkResult:
    """Measure what embedding costs, from tensors on the device to embeddings.

    Reading, resizing and tokenizing are not part of it. Image and text take turns, each warmed up. The text fills
    `text_tokens`, as in published latencies: a model that pads by itself takes as long for a short text. Times move
    with the machine's load, so compare times of one quiet machine, and look at their spread.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): Its model is measured in its own precision, on `device`. Its
            processor makes the inputs, of the model's own size. `batch_size` and `num_workers` are not used.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 32)`): Latency is of the smallest, throughput of the
            largest.
        rounds (`int`, *optional*, defaults to 10): Measured rounds of each.
        max_seconds (`float`, *optional*, defaults to 60): No further round starts after this many seconds; three are
            always measured.
        text_tokens (`int`, *optional*, defaults to 77): Or as many as the model reads, where that is fewer.

    Returns:
        `BenchmarkResult`: Medians `image_latency_ms`, `text_latency_ms`, `image_throughput_per_s`,
            `text_throughput_per_s`; `parameters_millions` of both towers; `image_gflop` of one image, as
            [`count_flops`] counts; `peak_memory_mib` of weights and activations while the largest batch of images is
            embedded; `n` rounds; `spread`: the median, min and max of each time; `measured_with`: device, dtype, batch
            sizes, shape of an image, tokens of a text and CPU threads, which the numbers depend on.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: If a batch size or the rounds are below 1.
    """
    model = encoder.model
    require_dual_encoder(model)
    small, large = min(batch_sizes), max(batch_sizes)
    if small < 1:
        raise ValueError(f"Expected batch sizes of at least 1, got {batch_sizes}.")
    with encoder.evaluating() as device:
        image, text = _one_of_each(model, encoder.processor, device, text_tokens)
        calls = {}
        for count in (small, large):
            images, texts = _repeated(image, count), _repeated(text, count)
            calls[count] = {
                "image": lambda images=images: projected(model.get_image_features(**images)),
                "text": lambda texts=texts: projected(model.get_text_features(**texts)),
            }
        measure = partial(
            interleaved_times, rounds=rounds, warmups=2, max_seconds=max_seconds, min_ms=MIN_MS, device=device
        )
        latencies = measure(calls[small])
        batches = latencies if small == large else measure(calls[large])
        flops = count_flops(lambda: model.get_image_features(**image), scan_formulas())
        activations_mib = peak_memory_mib(calls[large]["image"], device)
    spreads = {f"{kind}_latency_ms": spread([taken["latency_ms"] for taken in latencies[kind]]) for kind in latencies}
    for kind, times in batches.items():
        spreads[f"{kind}_throughput_per_s"] = spread([1000 * large / taken["latency_ms"] for taken in times])
    tensors = [*model.parameters(), *model.buffers()]
    weights_mib = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB
    return {
        **{name: found["median"] for name, found in spreads.items()},
        "parameters_millions": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "image_gflop": flops / 1e9,
        "peak_memory_mib": weights_mib + activations_mib,
        "n": len(latencies["image"]),
        "spread": spreads,
        "measured_with": {
            "device": device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_sizes": [small, large],
            "image_shape": list(image["pixel_values"].shape[1:]),
            "text_tokens": text["input_ids"].shape[1],
            "torch_threads": torch.get_num_threads(),
        },
    }


def _one_of_each(
    model: DualEncoder, processor: Any, device: torch.device, text_tokens: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Make the inputs of one image of noise and of one text that is cut: their content does not change the time."""
    image_processor = getattr(processor, "image_processor", processor)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))
    made = image_processor(images=noise, return_tensors="pt")
    image = {name: made[name].to(device) for name in image_processor.model_input_names}
    image["pixel_values"] = image["pixel_values"].to(model.dtype)
    words = ["a photo of a dog " * (1 + text_tokens // 5)]
    text = tokenize_texts(model, processor, words, max_length=text_tokens)
    return image, {name: tensor.to(device) for name, tensor in text.items()}
