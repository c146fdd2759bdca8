"""Parity of the text tower with open_clip's MobileCLIP-S1, fetched from the package registry.

Opt in with `make test-conformance`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_dclip.hub.convert import convert_mobileclip
from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel

pytestmark = pytest.mark.conformance

PACKAGES = ("open_clip_torch==3.3.0", "timm==1.0.31", "ftfy==6.3.1", "wcwidth")
GATE = 2e-6  # relative; float32 noise reaches 5e-7


@torch.no_grad()
def test_a_converted_text_tower_computes_what_open_clips_does(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    subprocess.run([*pip, *PACKAGES], check=True)
    script = Path(__file__).with_name("run_open_clip.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "packages"), str(tmp_path)], check=True)
    input_ids, expected = torch.load(tmp_path / "outputs.pth", weights_only=True)

    _, left = convert_mobileclip(tmp_path / "weights.pt", tmp_path / "out")
    assert {key.split(".")[0] for key in left} == {"visual", "logit_scale"}
    model = DMCLIPTextModel.from_pretrained(tmp_path / "out").eval()
    for length in (77, 78):  # as open_clip pads, and one place longer
        padded = torch.nn.functional.pad(input_ids, (0, length - 77))
        found = model(padded).text_embeds
        assert float((found - expected).abs().max() / expected.abs().max()) <= GATE
