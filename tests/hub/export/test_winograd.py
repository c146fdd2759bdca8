"""Winograd's convolution equals the plain one, at any size of map."""

import pytest
import torch
from torch import nn

from modeling_dclip.configuration_dmclip import DMCLIPVisionConfig
from modeling_dclip.hub.export.winograd import WinogradConv2d, use_winograd
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 14, 17])
def test_it_equals_the_plain_convolution(size):
    torch.manual_seed(size)
    conv = nn.Conv2d(6, 5, 3, padding=1).double()
    maps = torch.randn(2, 6, size, size, dtype=torch.float64)
    found = WinogradConv2d(conv, size)(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert (found - conv(maps)).abs().max() <= 1e-12


@torch.no_grad()
def test_an_encoder_gives_its_own_outputs_in_float32():
    torch.manual_seed(0)
    sizes = {
        "stem_dim": 4,
        "hidden_size": 8,
        "depths": (2, 1, 2, 1),
        "num_heads": (1, 1, 2, 2),
        "window_sizes": (8, 8, 6, 3),
    }
    encoder = DMCLIPVisionModel(DMCLIPVisionConfig(**sizes, image_size=88)).eval()
    with pytest.raises(ValueError, match="Expected a fused image encoder"):
        use_winograd(encoder)
    pixels = torch.randn(2, 3, 88, 88)
    expected = encoder(pixels).image_embeds
    fused = encoder.fuse()
    use_winograd(fused)
    assert (fused(pixels).image_embeds - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(isinstance(module, nn.Conv2d) for stage in fused.stages[:2] for module in stage.blocks.modules())


def test_another_convolution_is_refused():
    with pytest.raises(ValueError, match="Expected a 3x3 convolution"):
        WinogradConv2d(nn.Conv2d(4, 4, 3, stride=2, padding=1), 8)
