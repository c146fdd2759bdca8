"""Towers of a dual encoder as ONNX graphs and `torch.export` programs, each compared with the model.

An image tower maps `pixel_values (batch_size, channels, S, S)` to `image_embeds`, a text tower maps
`input_ids (batch_size, sequence_length)` to `text_embeds`. Neither normalises them. A text needs no mask: the tokens
after its end token change nothing, or the graph knows the padding by its id.
"""

import copy
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from modeling_dclip.data.files import read_bytes, temporary_folder, write_bytes
from modeling_dclip.encoders.families import READ_AT_END, READ_PADDING, longest_positions
from modeling_dclip.hub.export import ONNX_DTYPES, TOWERS
from modeling_dclip.modeling_dclip import LEGACY_EOS_TOKEN_ID

RELATIVE_GATE = 1e-4  # in float32: orders of sums differ, and eager PyTorch itself is off by about 5e-7
COSINE_GATES = {"fp16": 0.999, "int8": 0.95}  # the least of any row
BATCH_SIZES = (1, 3)  # compared; not the traced size 2, which would hide a graph of a fixed batch size
PROTOBUF_LIMIT = 2**31  # bytes of one file
QUANTIZED_OPERATORS = ["MatMul", "Gemm", "Gather"]  # not convolutions: they lose the most and gain the least
FLOAT32_PARAMETERS = ("A_log", "D")  # the model keeps them in float32

NEEDS_EXTRA = (
    "Expected onnx, onnxruntime and onnxscript, got {}. Install them with `pip install onnx onnxruntime onnxscript`."
)


class Said(TypedDict, total=False):
    """What an export says of its reader: `differs`, in words, what it reads otherwise than the model."""

    differs: list[str]


class Deviation(Said):
    """How far embeddings are from the model's: the largest difference over the largest value, and the least cosine of
    any row.
    """

    max_relative_difference: float
    min_cosine: float


class ImageTower(nn.Module):
    """The image side of a model as exporters take it: pixels in, embeddings out, one float32 tensor each.

    Args:
        model (`PreTrainedModel`): A dual encoder, or an image encoder whose output has `image_embeds`.
    """

    kind, input_name, output_name, file_name = "image", "pixel_values", "image_embeds", "vision_model"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = getattr(model.config, "vision_config", model.config)
        self.is_dual = hasattr(model, "get_image_features")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed `(B, channels, S, S)` as `(B, D)`."""
        if self.is_dual:
            return self.model.get_image_features(pixel_values).pooler_output.float()
        return self.model(pixel_values=pixel_values).image_embeds.float()

    def sample(self, batch_size: int) -> torch.Tensor:
        """Draw random pixels `(B, channels, S, S)`, the same ones at each call."""
        generator, size = torch.Generator().manual_seed(batch_size), self.config.image_size
        return torch.randn(batch_size, getattr(self.config, "num_channels", 3), size, size, generator=generator)

    def dynamic_axes(self) -> dict[int, torch.export.Dim]:
        """The sizes of the input that may vary."""
        return {0: torch.export.Dim("batch_size", min=1, max=65_536)}


class TextTower(nn.Module):
    """The text side of a model as exporters take it: token ids in, embeddings out, one tensor each.

    Args:
        model (`PreTrainedModel`): A dual encoder.
    """

    kind, input_name, output_name, file_name = "text", "input_ids", "text_embeds", "text_model"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config.text_config
        self.longest = longest_positions(self.config)
        self.reads_padding = model.config.model_type in READ_PADDING
        self.needs_mask = not self.reads_padding and model.config.model_type not in READ_AT_END

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed `(B, T)` as `(B, D)`, with `T` at most the tower's number of positions."""
        inputs = {"input_ids": input_ids}
        if self.reads_padding:
            missing = self.longest - input_ids.shape[1]
            inputs["input_ids"] = nn.functional.pad(input_ids, (0, missing), value=self.config.pad_token_id)
        elif self.needs_mask:
            inputs["attention_mask"] = (input_ids != self.config.pad_token_id).long()
        return self.model.get_text_features(**inputs).pooler_output.float()

    def sample(self, batch_size: int) -> torch.Tensor:
        """Draw random ids `(B, T)`, the same ones at each call. Each row ends at another place, and T grows with B."""
        generator, length = torch.Generator().manual_seed(batch_size), min(8 * batch_size, self.longest)
        end = self.config.pad_token_id if self.needs_mask or self.reads_padding else self.config.eos_token_id
        if end == LEGACY_EOS_TOKEN_ID and self.model.config.model_type in ("clip", "dclip"):
            end = self.config.vocab_size - 1  # the highest id of a row is then its end
        ids = torch.randint(0, self.config.vocab_size, (batch_size, length), generator=generator)
        ids = torch.where(ids == end, (end + 1) % self.config.vocab_size if end == 0 else end - 1, ids)
        for row in range(batch_size):
            ids[row, length - 1 - row :] = end
        return ids

    def dynamic_axes(self) -> dict[int, torch.export.Dim]:
        """The sizes of the input that may vary."""
        return {
            0: torch.export.Dim("batch_size", min=1, max=65_536),
            1: torch.export.Dim("sequence_length", min=2, max=self.longest),
        }


Tower = ImageTower | TextTower
EXPORTED_TOWERS: dict[str, type[Tower]] = dict(zip(TOWERS, (ImageTower, TextTower), strict=True))


def make_onnx(tower: Tower, dtype: str, float32_content: bytes | None = None) -> bytes:
    """Trace a tower as an ONNX graph.

    Args:
        tower ([`ImageTower`] or [`TextTower`]): In float32, in eval mode, on the CPU.
        dtype (`str`): `"fp32"`; `"fp16"`: weights of half the size, inputs and outputs in float32; or `"int8"`:
            weights of matrix products and embedding tables as 8-bit integers, activations quantised at run time.
        float32_content (`bytes`, *optional*): The tower's `"fp32"` graph, which is quantised to `"int8"`. Traced if
            not given.

    Returns:
        `bytes`: The content of a `.onnx` file.

    Raises:
        ImportError: If the extra `export` is not installed.
        ValueError: If the dtype is unknown, or the weights exceed what one file holds.
    """
    if dtype not in ONNX_DTYPES:
        raise ValueError(f"Expected a dtype of {', '.join(ONNX_DTYPES)}, got {dtype!r}.")
    try:
        import onnxruntime.quantization
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format(error)) from error
    weights = sum(tensor.numel() * 4 for tensor in part_of(tower).parameters())
    if weights >= PROTOBUF_LIMIT:
        raise ValueError(
            f"Expected a tower of less than 2 GiB, the limit of one .onnx file, got {weights / 2**30:.1f} GiB."
        )
    if dtype == "int8":
        content = float32_content or _trace(tower)
        with temporary_folder() as folder:
            whole, small = folder / "fp32.onnx", folder / "int8.onnx"
            write_bytes(whole, _without_inner_shapes(content))
            with _without_advice():
                onnxruntime.quantization.quantize_dynamic(
                    whole,
                    small,
                    op_types_to_quantize=QUANTIZED_OPERATORS,
                    per_channel=True,
                    weight_type=onnxruntime.quantization.QuantType.QInt8,
                )
            return read_bytes(small)
    return _trace(_to_half(tower) if dtype == "fp16" else tower)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep to itself the quantizer's advice to fold operators first: exported graphs are folded already."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Please consider to run pre-processing before quantization")

    root = logging.getLogger()
    root.addFilter(is_news)
    try:
        yield
    finally:
        root.removeFilter(is_news)


def part_of(tower: Tower) -> nn.Module:
    """The modules that a tower runs, without the other tower of a dual encoder."""
    model = tower.model
    if not (hasattr(model, "text_model") and hasattr(model, "vision_model")):
        return model
    name, projection = (
        ("vision_model", "visual_projection") if tower.kind == "image" else ("text_model", "text_projection")
    )
    return nn.ModuleList(getattr(model, part) for part in (name, projection) if hasattr(model, part))


def _to_half(tower: Tower) -> Tower:
    half = copy.deepcopy(tower)
    for name, parameter in half.named_parameters():
        if name.rpartition(".")[2] not in FLOAT32_PARAMETERS:
            parameter.data = parameter.data.half()
    for buffer in half.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.half()
    return half


def _without_inner_shapes(content: bytes) -> bytes:
    """A model without the shapes that are noted inside its graph. They are optional, and the quantizer refuses those
    that the exporter of PyTorch 2.8 notes.
    """
    import onnx

    model = onnx.load_from_string(content)
    del model.graph.value_info[:]
    return model.SerializeToString()


@torch.no_grad()
def _trace(tower: Tower) -> bytes:
    program = torch.onnx.export(
        tower.eval(),
        (tower.sample(2),),
        input_names=[tower.input_name],
        output_names=[tower.output_name],
        dynamic_shapes={tower.input_name: tower.dynamic_axes()},
        dynamo=True,
        verbose=False,
    )
    return program.model_proto.SerializeToString()


@torch.no_grad()
def compare_onnx(content: bytes, tower: Tower, dtype: str = "fp32") -> Deviation:
    """Compare ONNX Runtime's outputs with the float32 tower's, on random inputs and batches of several sizes.

    Args:
        content (`bytes`): The content of a `.onnx` file.
        tower ([`ImageTower`] or [`TextTower`]): The tower that it was made from, in float32, on the CPU.
        dtype (`str`, *optional*, defaults to `"fp32"`): The dtype of the graph, which decides the limit.

    Returns:
        [`Deviation`]

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If a float32 graph differs by more than 1e-4 of the largest value, or the least cosine is below
            0.999 (float16) or 0.95 (8-bit integers).
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format(error)) from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    pairs = []
    for batch_size in BATCH_SIZES:
        inputs = tower.sample(batch_size)
        (found,) = session.run([tower.output_name], {tower.input_name: inputs.numpy()})
        pairs.append((torch.from_numpy(found), tower(inputs)))
    return check_outputs(pairs, dtype, "ONNX Runtime")


def onnx_runner(path: str | Path, tower: Tower) -> Callable[[torch.Tensor], torch.Tensor]:
    """A graph in a file as a function of its one input, computed by ONNX Runtime on the CPU.

    Args:
        path (`str` or `Path`): A `.onnx` file.
        tower ([`ImageTower`] or [`TextTower`]): What it was made from, for the names of input and output.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: torch.Tensor) -> torch.Tensor:
        (found,) = session.run([tower.output_name], {tower.input_name: inputs.numpy()})
        return torch.from_numpy(found)

    return run


def check_outputs(pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: str, runtime: str) -> Deviation:
    """Measure how far embeddings are from the model's, and refuse them if they are too far for their dtype.

    Args:
        pairs (`list[tuple[torch.Tensor, torch.Tensor]]`): Found and expected embeddings, both `(B, D)`.
        dtype (`str`): A key of [`ONNX_DTYPES`].
        runtime (`str`): The program that computed them, for messages.

    Returns:
        [`Deviation`]

    Raises:
        ValueError: If they are too far from the model's, or not finite.
    """
    found, expected = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    if not expected.isfinite().all():
        raise ValueError("Expected finite embeddings of the model, got NaN or infinity. Its weights are damaged.")
    difference = float((found - expected).abs().max() / expected.abs().max())
    cosine = float(torch.cosine_similarity(found, expected).min())
    if dtype == "fp32" and not difference <= RELATIVE_GATE:  # NaN fails this too
        raise ValueError(
            f"Expected {runtime} to give the model's outputs to {RELATIVE_GATE:.0e}, got a difference of "
            f"{difference:.1e}."
        )
    if dtype != "fp32" and not cosine >= COSINE_GATES[dtype]:
        raise ValueError(
            f"Expected {runtime} in {dtype} to give embeddings with a cosine of at least {COSINE_GATES[dtype]} to "
            f"float32's, got {cosine:.4f}. Leave {dtype} out."
        )
    return Deviation(max_relative_difference=difference, min_cosine=cosine)


@torch.no_grad()
def save_program(tower: Tower, path: str | Path) -> Deviation:
    """Write a tower as a `torch.export` program, read it back, and compare its outputs with the tower's.

    Args:
        tower ([`ImageTower`] or [`TextTower`]): In float32, in eval mode, on the CPU.
        path (`str` or `Path`): A `.pt2` file in a folder that exists.

    Returns:
        [`Deviation`]

    Raises:
        ValueError: If the outputs differ.
    """
    program = torch.export.export(
        tower.eval(), (tower.sample(2),), dynamic_shapes={tower.input_name: tower.dynamic_axes()}, strict=False
    )
    content = io.BytesIO()  # torch's own writer answers a full disk with an error of its own
    torch.export.save(program, content)
    write_bytes(path, content.getvalue())
    module = torch.export.load(path).module()
    pairs = [(module(inputs), tower(inputs)) for inputs in map(tower.sample, BATCH_SIZES)]
    return check_outputs(pairs, "fp32", "the exported program")
