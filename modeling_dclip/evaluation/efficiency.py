"""What a call costs: time beside its rivals on the same machine, operations, memory, and how that grows with the input.

Everything takes calls without arguments, so that a model, a compiled one and an ONNX session are measured alike.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], Any]
MIB = 2**20


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'min': 1.0, 'max': 3.0}
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
    """Time several calls in turns, so that all see the same machine; a ratio within a round cancels its load.

    Each round starts one call further on, so that none always follows the same one.

    Args:
        calls (`Mapping[str, Callable]`): By name.
        rounds (`int`): Measured, at least 1.
        warmups (`int`, *optional*, defaults to 1): Rounds before that are not kept.
        max_seconds (`float`, *optional*): No further round starts after so long; three are always measured, if asked for.
        min_ms (`float`, *optional*, defaults to 0): Calls shorter than this are repeated to fill it, and averaged.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): On CUDA the clock waits for the device after each call.

    Returns:
        `dict[str, list[dict]]`: For each name and round `latency_ms`, by the wall clock, and `cpu_ms`, of all threads of the
            process: on a busy machine the second moves less.

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


def count_flops(call: Call) -> int:
    """Count the floating-point operations of matrix products and convolutions, a multiplication and an addition as two.

    Attention is counted through its plain form. Operators that PyTorch has no formula for (the selective scan is one) count
    as nothing: add them.

    Args:
        call (`Callable`): Runs eager PyTorch.

    Returns:
        `int`

    Example:
        >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
        48
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_memory_mib(call: Call, device: str | torch.device = "cpu") -> float:
    """Measure how much memory of tensors a call needs at once beyond what was there before: its activations and buffers.

    Args:
        call (`Callable`): Runs eager PyTorch; it ran before, so that nothing is set up for the first time.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where its tensors live.

    Returns:
        `float`: Of PyTorch's allocator, not of the process. Exact, and the same at each call.
    """
    device = torch.device(device)
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / MIB


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit `cost = a * size ** exponent` by least squares between the logarithms.

    Args:
        sizes (`Sequence[float]`): For images their pixels, width times height. Two or more different ones, > 0.
        costs (`Sequence[float]`): One for each, > 0.

    Returns:
        `float`: 1 is linear growth.

    Raises:
        ValueError: If counts differ, there are fewer than two sizes, or a number is not positive.

    Example:
        >>> round(growth_exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(f"Expected two or more positive sizes with a positive cost each, got {sizes} and {costs}.")
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(xs, ys).slope
