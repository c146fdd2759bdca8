"""Parity with the published MambaVision, fetched from the package registry. Opt in with `make test-conformance`.

Its code is under a non-commercial licence: it is run here as a reference, outside the repository, and nothing of it
stays.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_dclip.hub.convert import convert_mambavision
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel

pytestmark = pytest.mark.conformance

PACKAGES = ("mambavision==1.2.0", "timm==1.0.15", "einops==0.8.1")
GATE = 2e-6  # relative; see tests/hub/convert/test_convert.py for what the subtlest mistakes make
PARAMETERS = {"T": 31_794_248, "B": 97_685_288}  # with the published head


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """`(folder of checkpoints, outputs)` of the published T and B on random weights."""
    packages, folder = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("published")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    subprocess.run([*pip, *PACKAGES], check=True)
    script = Path(__file__).with_name("run_mambavision.py")
    subprocess.run([sys.executable, str(script), str(packages), str(folder)], check=True, env=dict(os.environ))
    return folder, torch.load(folder / "outputs.pth", weights_only=True)


@pytest.fixture(scope="module", params=PARAMETERS)
def converted(request, published, tmp_path_factory):
    """`(preset, our model)`, read back from the folder that conversion wrote."""
    output = tmp_path_factory.mktemp("converted") / request.param
    convert_mambavision(published[0] / f"{request.param}.pth.tar", output)
    return request.param, DMCLIPVisionModel.from_pretrained(output).eval()


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_preset_is_found_and_has_as_many_parameters(converted):
    preset, model = converted
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("windows", ["published", "dividing"])
@pytest.mark.parametrize("size", [224, 256])
def test_features_and_scores_are_the_published_ones(published, converted, size, windows, form, record_property):
    preset, model = converted
    pixels, features, scores = published[1][preset, size, windows]
    if windows == "dividing":
        config = model.config.for_image_size(size)
        weights, model = model.state_dict(), DMCLIPVisionModel(config).eval()
        model.load_state_dict(weights)
    if form == "fused":
        model = model.fuse()
    outputs = model(pixels)
    errors = {
        "features": relative_error(outputs.pooler_output, features),
        "scores": relative_error(outputs.image_embeds, scores),
    }
    for name, error in errors.items():
        record_property(name, error)
        print(f"{preset} at {size} px, {windows} windows, {form}: {name} {error:.1e}")
    assert max(errors.values()) <= GATE
