"""3x3 convolutions with a quarter of the multiplications, in operators that every runtime has.

Source: F(4x4, 3x3) of Lavin and Gray, arXiv 1509.09308. A tile of 6x6 pixels and a kernel are
transformed, multiplied element by element and summed over channels, and transformed back to 4x4 pixels: 36 products
instead of 144. Both transforms are one matrix each, and the products are 36 matrix products, channels innermost.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from modeling_dclip.hub.export.onnx import Tower
from modeling_dclip.modeling_dmclip import DMCLIPConvBlock, DMCLIPVisionModel

TILE, OUTPUT = 6, 4
# Interpolation at 0, 1, -1, 2, -2 and infinity.
INPUT_TRANSFORM = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT_TRANSFORM = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1, for feature maps of one size, channels last.

    Args:
        conv (`nn.Conv2d`): The convolution to compute, with a bias and in one group.
        size (`int`): Height and width of the feature map.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    to_tiles: torch.Tensor
    from_tiles: torch.Tensor
    places: torch.Tensor

    def __init__(self, conv: nn.Conv2d, size: int):
        super().__init__()
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or conv.bias is None:
            raise ValueError(f"Expected a 3x3 convolution with bias, stride 1, padding 1 and one group, got {conv}.")
        inputs, kernels, outputs = (
            torch.tensor(matrix, dtype=torch.float64)
            for matrix in (INPUT_TRANSFORM, KERNEL_TRANSFORM, OUTPUT_TRANSFORM)
        )
        dtype = conv.weight.dtype
        weight = torch.einsum("ik,ockl,jl->ijco", kernels, conv.weight.detach().double(), kernels)
        self.register_buffer("weight", weight.flatten(0, 1).to(dtype).contiguous())  # (36, C, C')
        self.register_buffer("bias", conv.bias.detach().clone())
        self.register_buffer("to_tiles", torch.kron(inputs, inputs).to(dtype))
        self.register_buffer("from_tiles", torch.kron(outputs, outputs).to(dtype))
        self.size, self.tiles = size, -(-size // OUTPUT)
        self.padded = OUTPUT * self.tiles + TILE - OUTPUT
        places, starts = torch.arange(TILE), OUTPUT * torch.arange(self.tiles)
        rows = places[:, None, None, None] + starts[:, None]
        columns = places[:, None, None] + starts
        self.register_buffer("places", (rows * self.padded + columns).flatten())  # (36 * tiles * tiles,)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, size, size, C)` to `(B, size, size, C')`."""
        channels, count = self.weight.shape[1:], self.tiles**2
        end = self.padded - self.size - 1
        padded = F.pad(hidden_states, (0, 0, 1, end, 1, end)).flatten(1, 2)
        tiles = padded.index_select(1, self.places).reshape(-1, TILE**2, count * channels[0])
        products = (self.to_tiles @ tiles).reshape(-1, TILE**2, count, channels[0]) @ self.weight
        tiles = self.from_tiles @ products.flatten(2)
        tiles = tiles.reshape(-1, OUTPUT, OUTPUT, self.tiles, self.tiles, channels[1]).permute(0, 3, 1, 4, 2, 5)
        side = OUTPUT * self.tiles
        return tiles.reshape(-1, side, side, channels[1])[:, : self.size, : self.size] + self.bias


class WinogradBlock(nn.Module):
    """A [`DMCLIPConvBlock`] with folded norms, for inference.

    Args:
        block (`DMCLIPConvBlock`): The block to compute.
        size (`int`): Height and width of the feature map.
    """

    def __init__(self, block: DMCLIPConvBlock, size: int):
        super().__init__()
        self.conv1, self.conv2 = WinogradConv2d(block.conv1, size), WinogradConv2d(block.conv2, size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """`(B, C, size, size)` to the same."""
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        branch = self.conv2(F.gelu(self.conv1(hidden_states), approximate="tanh"))
        return (hidden_states + branch).permute(0, 3, 1, 2)


def use_winograd(encoder: DMCLIPVisionModel) -> None:
    """Replace the convolutional blocks of an image encoder by [`WinogradBlock`]s, in place.

    The encoder then takes only images of the config's size. This is for float32 exports that run on CPUs: other
    devices have faster kernels, and half precision loses too much in the transforms.

    Args:
        encoder ([`DMCLIPVisionModel`]): A fused encoder.

    Raises:
        ValueError: If the encoder is not fused.
    """
    if not encoder.config.batch_norm_folded:
        raise ValueError(
            "Expected a fused image encoder, got one with norms between its convolutions. Call `fuse()` first."
        )
    size = -(-encoder.config.image_size // 4)
    for stage in encoder.stages:
        if stage.window_size is None:
            stage.blocks = nn.ModuleList(WinogradBlock(block, size) for block in stage.blocks)
        size = -(-size // 2)


def with_winograd(tower: Tower) -> Tower:
    """Copy an image tower, with Winograd's convolutions in its encoder.

    Unlike [`use_winograd`] it leaves the tower itself as it is.

    Args:
        tower ([`~modeling_dclip.hub.export.onnx.ImageTower`]): Of a fused DM-CLIP, or of its image encoder alone.

    Returns:
        [`~modeling_dclip.hub.export.onnx.ImageTower`]: Its outputs are the tower's, up to rounding.

    Raises:
        ValueError: If the image encoder is not DM-CLIP's, or not fused.
    """
    changed = copy.deepcopy(tower)
    encoder = getattr(changed.model, "vision_model", changed.model)
    if not isinstance(encoder, DMCLIPVisionModel):
        raise ValueError(
            f"winograd: expected DM-CLIP, whose image encoder has convolutions, got {type(encoder).__name__}."
        )
    use_winograd(encoder)
    return changed
