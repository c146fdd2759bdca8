"""The published MambaVision as a rival in `image_encoders.py`, from a folder that the user fetched.

    pip install --no-deps --target /tmp/published mambavision==1.2.0 timm==1.0.15 einops==0.8.1

Its code has a non-commercial licence. It runs unchanged, outside the repository, and nothing of it is copied. Its scan
is mamba-ssm's CUDA kernel. That package does not import on a CPU, so one of our paths runs in its place: the plain
loop, or the fast path in the form `our_scan`, which leaves only differences that are not the scan's.
"""

import functools
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS
from modeling_dclip.hub.convert.mambavision import published_mambavision_keys
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel
from modeling_dclip.selective_scan import selective_scan

PUBLISHED = {f"published_mambavision_{name.lower()}": name for name in DMCLIP_PRESETS}
MODULE = "mambavision.models.mamba_vision"
INTERFACE = "mamba_ssm.ops.selective_scan_interface"
INSTALL = "pip install --no-deps --target /tmp/published mambavision==1.2.0 timm==1.0.15 einops==0.8.1"


def _scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=None, *, backend
):
    """Answer MambaVision's call of mamba-ssm's function by one of our paths."""
    if z is not None or return_last_state:
        raise ValueError("Expected a call without gate and without state.")
    return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus, backend=backend)


# By the backend's name: the function, and how the results file calls it.
STAND_INS = {
    "reference": (functools.partial(_scan, backend="reference"), "our plain reference loop"),
    "torch": (functools.partial(_scan, backend="torch"), "our fast CPU path"),
}


def import_published(package: str | None, device: str) -> Any:
    """Import the published module, or exit with a message that says how to fetch it.

    On CUDA it runs with mamba-ssm, on a CPU with a stand-in for it.
    """
    if package is None or not (Path(package) / "mambavision").is_dir():
        raise SystemExit(
            f"--published_package: expected a folder that holds the package mambavision, got {package!r}. Fetch it, "
            f"`{INSTALL}`, and name /tmp/published; or leave those encoders out."
        )
    if package not in sys.path:
        sys.path.append(package)
    stand_ins = {}
    if device.startswith("cuda"):
        try:
            importlib.import_module(INTERFACE)
        except ImportError as error:
            raise SystemExit(
                f"Expected mamba_ssm beside the published MambaVision on CUDA, got none ({error}): without its kernel "
                "it would be a weak rival. Install mamba-ssm, or leave the published encoders out."
            ) from error
    elif MODULE not in sys.modules:
        stand_ins = {name: types.ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", INTERFACE)}
        stand_ins[INTERFACE].selective_scan_fn = STAND_INS["reference"][0]
    hidden = {name: sys.modules.pop(name) for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(MODULE)
    finally:  # nobody else may take a stand-in for the package
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(hidden)


class PublishedEncoder(nn.Module):
    """The published model with the weights of ours, from pixels to the outputs of its head.

    Args:
        ours ([`DMCLIPVisionModel`]): Of the same preset, with published windows; its weights are copied.
        preset (`str`): Of `DMCLIP_PRESETS`.
        module: What [`import_published`] gave.
        scan (`str`, *optional*): Which of `STAND_INS` runs in place of mamba-ssm's kernel; by default that one does.
    """

    def __init__(self, ours: DMCLIPVisionModel, preset: str, module: Any, scan: str | None = None):
        super().__init__()
        self.config, self.scan = ours.config, scan
        self.model = getattr(module, f"mamba_vision_{preset}")(num_classes=ours.config.projection_dim)
        weights = {}
        for key, tensor in ours.state_dict().items():
            names = published_mambavision_keys(key)
            weights |= dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True))
        self.model.load_state_dict(weights)

    @property
    def scan_name(self) -> str:
        """The name of what computes the scan, for the results file."""
        if self.scan is None:
            return "mamba-ssm's CUDA kernel"
        return f"{STAND_INS[self.scan][1]}, in place of mamba-ssm's CUDA kernel, which cannot run on a CPU"

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed."""
        if self.scan is not None:
            sys.modules[MODULE].selective_scan_fn = STAND_INS[self.scan][
                0
            ]  # its blocks look it up there at every call
        return self.model(pixels)
