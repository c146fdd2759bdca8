"""Time every path of the selective scan that runs on this machine, against two references.

    python benchmarks/selective_scan.py

The references are our plain loop and the algorithm of mamba-ssm's own reference, which does not import without CUDA.
`materialised_scan` is that algorithm, written anew: it computes the decays and inflows of all positions by `einsum`,
then indexes them in a loop, whose gradient costs a whole tensor for each position. Every path gets the same numbers.
The paths take turns in one process; a ratio is the median over rounds of the ratio within a round. On the CPU with one
thread the clock is the CPU time of the process, because a busy machine interrupts a long call more often than a short
one.
"""

import gc
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from transformers import HfArgumentParser, set_seed

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.benchmarks.efficiency import spread
from modeling_dclip.evaluation.records import environment
from modeling_dclip.selective_scan import scan_two_level, selective_scan

STATE = 8
BASELINE = "mamba_ssm_reference_algorithm"
BASELINE_UP_TO = 1024  # its gradient is quadratic in the length


@dataclass
class BenchmarkArguments:
    """One run."""

    shapes: list[str] = field(
        default_factory="1,256,196 8,256,196 8,512,196 8,512,49 1,256,1024 1,256,4096".split,
        metadata={"help": "Batch, channels, length."},
    )
    rounds: int = field(default=5, metadata={"help": "Measured rounds, after one that warms up."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})
    dtype: str = field(default="float32", metadata={"help": "Of x, delta, B and C."})
    output: str = field(default="benchmarks/results/selective_scan.json", metadata={"help": "Results file; replaced."})


def materialised_scan(x, delta, A, B, C, D, *, delta_bias):
    """The algorithm of mamba-ssm's reference, written anew."""
    steps = F.softplus(delta.float() + delta_bias[:, None])
    inputs, B, C = x.float(), B.float(), C.float()
    decays = torch.exp(torch.einsum("bdl,dn->bdln", steps, A))
    inflows = torch.einsum("bdl,bnl,bdl->bdln", steps, B, inputs)
    state = A.new_zeros(decays.shape[0], *A.shape)
    outputs = []
    for position in range(x.shape[2]):
        state = decays[:, :, position] * state + inflows[:, :, position]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, position]))
    return (torch.stack(outputs, dim=2) + D[:, None] * inputs).to(x.dtype)


def scan_in_two_levels(*tensors, delta_bias):
    """The path of the backend "torch" while exporting, and on devices without a kernel."""
    return scan_two_level(*tensors, delta_bias, True)


def find_paths(args: BenchmarkArguments, length: int):
    """Find the paths that run on this machine, by name."""
    paths = {BASELINE: materialised_scan} if length <= BASELINE_UP_TO else {}
    for backend in ("reference", "torch", "triton", "mamba_ssm"):
        path = partial(selective_scan, delta_softplus=True, backend=backend)
        try:
            path(*make_tensors(args, 1, 1, 1)[:-1])
        except ValueError as error:
            print(f"without {backend}: {error}")
        else:
            paths[backend] = path
    return paths | {"two_level": scan_in_two_levels}


def make_tensors(args: BenchmarkArguments, batch: int, channels: int, length: int) -> list[torch.Tensor]:
    """Make x, delta, A, B, C, D and delta_bias as in a new mixer: the rates are 1 to 8 in every channel."""
    set_seed(0)
    sizes = [(batch, channels, length)] * 2 + [(batch, STATE, length)] * 2
    dtype = getattr(torch, args.dtype)
    x, delta, B, C = (torch.randn(size).to(args.device, dtype) for size in sizes)
    A = -torch.arange(1.0, STATE + 1, device=args.device).repeat(channels, 1)
    D, bias = torch.ones(channels, device=args.device), torch.zeros(channels, device=args.device)
    return [tensor.requires_grad_() for tensor in (x, delta, A, B, C, D, bias)]


def time_ms(path, tensors, grad=None) -> float:
    """Time a forward, and a backward if there is a gradient, in milliseconds."""
    clock = (
        time.process_time if tensors[0].device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    )
    start = clock()
    with torch.set_grad_enabled(grad is not None):
        outputs = path(*tensors[:-1], delta_bias=tensors[-1])
    if grad is not None:
        torch.autograd.grad(outputs, tensors, grad)
    if outputs.is_cuda:
        torch.cuda.synchronize(outputs.device)
    return 1000 * (clock() - start)


def measure(args: BenchmarkArguments, shape: str) -> dict:
    """Measure one shape: the times of each path, and how many times faster it is than the two references."""
    batch, channels, length = (int(size) for size in shape.split(","))
    tensors = make_tensors(args, batch, channels, length)
    paths = find_paths(args, length)
    with torch.no_grad():
        outputs = {name: path(*tensors[:-1], delta_bias=tensors[-1]) for name, path in paths.items()}
    grad = torch.randn_like(tensors[0])
    row = {"shape": [batch, channels, length], "state": STATE, "paths": {name: {} for name in paths}}
    for name in paths:
        error = (outputs[name] - outputs["reference"]).abs().max() / outputs["reference"].abs().max()
        row["paths"][name]["relative_difference"] = float(error)
    for what, given in (("forward", None), ("forward_backward", grad)):
        rounds = []
        for index in range(args.rounds + 1):
            order = list(paths) if index % 2 else list(reversed(paths))
            times = {name: time_ms(paths[name], tensors, given) for name in order}
            gc.collect()
            if index:  # the first round warms up
                rounds.append(times)
        for name in paths:
            row["paths"][name][f"{what}_ms"] = spread([times[name] for times in rounds])
            for other in {BASELINE, "reference"} & set(paths) - {name}:
                ratios = [times[other] / times[name] for times in rounds]
                row["paths"][name][f"{what}_times_faster_than_{other}"] = spread(ratios)
    return row


@command
def main(argv=None) -> None:
    """Measure, print, write."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    torch.set_num_threads(args.threads)
    gc.disable()
    rows = [measure(args, shape) for shape in args.shapes]
    print(json.dumps(rows, indent=1))
    versions, hardware = environment()
    arguments = {name: value for name, value in asdict(args).items() if name != "output"}
    results = {"benchmark": "selective_scan", "arguments": arguments, "rows": rows, "n": args.rounds}
    write_json(args.output, results | {"versions": versions, "hardware": hardware})


if __name__ == "__main__":
    main()
