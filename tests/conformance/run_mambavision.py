"""Run the published MambaVision, fetched to a folder, on random weights; run as a script by `test_mambavision.py`.

    python run_mambavision.py FOLDER OUTPUT

It has a process of its own because a stand-in for mamba-ssm, which needs CUDA, is put where others would look for it.
"""

import math
import sys
import types
from pathlib import Path

import torch

from modeling_dclip.selective_scan import selective_scan

SIZES = (224, 256)
BATCH = 2
WINDOWS = {"published": None, "dividing": {224: [8, 8, 14, 7], 256: [8, 8, 16, 8]}}


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=None):
    """mamba-ssm's function as MambaVision calls it, by our plain loop."""
    if z is not None or return_last_state:
        raise ValueError("Expected a call without gate and without state.")
    return selective_scan(
        u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus, backend="reference"
    )


def randomise(model, generator):
    """Values under which every parameter matters."""
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            values = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif name.endswith("A_log"):
            values = tensor + 0.2 * noise
        elif "gamma" in name or name.endswith(".D") or (name.endswith("weight") and tensor.dim() == 1):
            values = 1.0 + 0.2 * noise
        elif tensor.dim() == 1:  # biases, running means
            values = 0.3 * noise
        else:
            values = noise / math.sqrt(tensor[0].numel())
        tensor.copy_(values)


@torch.no_grad()
def main(folder, output):
    """Write `{preset}.pth` (weights), and `outputs.pth`: inputs, features and class scores by preset,
    size and windows.
    """
    stub = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    stub.selective_scan_fn = scan
    for name in ("mamba_ssm", "mamba_ssm.ops", stub.__name__):
        sys.modules[name] = stub if name == stub.__name__ else types.ModuleType(name)
    sys.path.insert(0, folder)
    from mambavision.models import mamba_vision

    outputs = {}
    generator = torch.Generator().manual_seed(0)
    for preset in ("T", "B"):
        build = getattr(mamba_vision, f"mamba_vision_{preset}")
        model = build().eval()
        randomise(model, generator)
        torch.save({"state_dict": model.state_dict()}, Path(output) / f"{preset}.pth.tar")
        for size in SIZES:
            pixels = torch.randn(BATCH, 3, size, size, generator=generator)
            for windows, sizes in WINDOWS.items():
                published = model
                if sizes:
                    published = build(window_size=sizes[size], resolution=size).eval()
                    published.load_state_dict(model.state_dict())
                features = published.forward_features(pixels)
                outputs[preset, size, windows] = (pixels, features, published.head(features))
    torch.save(outputs, Path(output) / "outputs.pth")


if __name__ == "__main__":
    main(*sys.argv[1:])
