"""Export the towers of a model for ONNX Runtime and `torch.export`, with the settings that their readers need.

Also the model that every format is made from, and the preprocessing and tokenizer that go with it.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from modeling_dclip import DCLIPVisionModel, DMCLIPVisionModel
from modeling_dclip.data.files import read_json, write_bytes, write_json
from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.families import READ_PADDING, longest_text
from modeling_dclip.encoders.loading import (
    NATIVE_ENCODERS,
    STUDENT_ENCODERS,
    find_adapter,
    load_checked,
    load_merged,
    load_processor,
    read_config,
)
from modeling_dclip.hub.export import ONNX_DTYPES, TOWERS
from modeling_dclip.hub.export.onnx import (
    EXPORTED_TOWERS,
    Deviation,
    Tower,
    compare_onnx,
    make_onnx,
    onnx_runner,
    save_program,
)
from modeling_dclip.hub.export.readers import (
    OPEN_PICTURE,
    Reader,
    compare_reader,
    describe_readings,
    write_readme,
)
from modeling_dclip.hub.export.winograd import with_winograd
from modeling_dclip.hub.native_clip import is_stock_clip, to_native_clip, to_native_processor

IMAGE_ENCODERS = {"dmclip_vision": DMCLIPVisionModel, "dclip_vision": DCLIPVisionModel}
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
Runner = Callable[[torch.Tensor], torch.Tensor]  # a tower as a function of pixels or ids
_WHY = {
    "picture": "It leaves out what EXIF says and makes 16 bits a pixel white. `open_picture` of the README makes up "
    "for both. All numbers are for PIL's resizing: the default backend of transformers differs by 1 to 2 grey levels",
}
# The code in a README: for each tower how to make its input, how each runtime computes it, and what to do with it.
_INPUTS = {
    "image": """
image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
pixels = image_processor([open_picture("photo.jpg")], return_tensors="{tensors}")["pixel_values"]
""",
    "text": """
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(["a photo of a dog"], padding=True, truncation=True, return_tensors="{tensors}")["input_ids"]
""",
}
_ONNX_RUNS = {
    "image": """
vision = onnxruntime.InferenceSession(f"{folder}/onnx/vision_model.onnx")
(image_embeds,) = vision.run(None, {"pixel_values": pixels})
""",
    "text": """
text = onnxruntime.InferenceSession(f"{folder}/onnx/text_model.onnx")
(text_embeds,) = text.run(None, {"input_ids": ids})
""",
}
_PROGRAM_RUNS = {
    "image": """
image_embeds = torch.export.load(f"{folder}/vision_model.pt2").module()(pixels).detach()
""",
    "text": """
text_embeds = torch.export.load(f"{folder}/text_model.pt2").module()(ids).detach()
""",
}

_LENGTH = (
    "length = lambda embeds: (embeds**2).sum(-1)[:, None] ** 0.5  # vectors of length 1: inner products are cosines"
)


class _Runtime(NamedTuple):
    name: str
    module: str  # what the README imports
    install: str  # what pip installs
    tensors: str
    runs: Mapping[str, str]
    others: str = ""  # what is known of further readers of the same files

    def use(self, kinds: Collection[str]) -> str:
        """Code that embeds with these towers."""
        head = [f"import {self.module}", "from transformers import AutoImageProcessor, AutoTokenizer"]
        made = [_INPUTS[kind].strip().replace("{tensors}", self.tensors) for kind in kinds]
        runs = [self.runs[kind].strip() for kind in kinds]
        last = "\n".join([_LENGTH, *(f"{kind}_embeds = {kind}_embeds / length({kind}_embeds)" for kind in kinds)])
        return "\n".join([*head, OPEN_PICTURE.strip(), "\n", 'folder = "FOLDER"  # this one', *made, *runs, last])


_ONNX = _Runtime(
    "ONNX Runtime",
    "onnxruntime",
    "onnxruntime transformers pillow",
    "np",
    _ONNX_RUNS,
    ", and transformers.js resizes in its own way",
)
_PROGRAM = _Runtime("torch.export", "torch", "torch transformers pillow", "pt", _PROGRAM_RUNS)


def load_model(model: str | os.PathLike, image_size: int | None = None) -> PreTrainedModel:
    """Load a dual encoder or an image encoder in the fastest form that computes the same.

    DM-CLIP's image encoder is fused: its norms and layer scales are folded into the weights.

    Args:
        model (`str` or `os.PathLike`): A folder that training, `fuse()` or conversion wrote. Adapters are merged.
        image_size (`int`, *optional*): Width and height of the images in pixels. By default the config's. If it is
            given, also as the config's, DM-CLIP gets windows that divide its feature map.

    Returns:
        `PreTrainedModel`: Float32, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds another model, weights are missing, damaged or not finite, or the model does not take
            the size.
    """
    if not Path(model).is_dir():
        found = "a file" if Path(model).exists() else "nothing there"
        raise FileNotFoundError(f"Expected the folder of a model at '{model}', got {found}.")
    if find_adapter(model) is not None:
        loaded = load_merged(model)
    else:
        model_type = read_config(model, (*STUDENT_ENCODERS, *IMAGE_ENCODERS)).model_type
        if model_type in STUDENT_ENCODERS:
            loaded = load_merged(model)
        else:
            loaded = load_checked(IMAGE_ENCODERS[model_type], model)
    _check_finite(loaded, model)
    if loaded.config.model_type in READ_PADDING:  # a SigLIP 2 names another padding than its tokenizer has
        loaded.config.text_config.pad_token_id = load_processor(model).tokenizer.pad_token_id
    encoder = getattr(loaded, "vision_model", loaded) if is_dual(loaded) else loaded
    if isinstance(encoder, DMCLIPVisionModel):
        fused = (encoder if image_size is None else _for_image_size(encoder, image_size)).fuse()
        if not is_dual(loaded):
            return fused
        loaded.vision_model, loaded.config.vision_config = fused, fused.config
    elif not hasattr(encoder.config, "image_size"):  # of timm: its image processor alone says it
        encoder.config.image_size = load_processor(model).image_processor.crop_size["height"]
    if not isinstance(encoder, DMCLIPVisionModel) and image_size not in (None, encoder.config.image_size):
        raise ValueError(
            f"image_size: expected {encoder.config.image_size}, which '{model}' was made for, got {image_size}."
        )
    return loaded


def _check_finite(loaded: nn.Module, folder: str | os.PathLike) -> None:
    for name, weight in loaded.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(
                f"Expected finite weights at '{folder}', got NaN or infinity in {name}. The model diverged or the "
                "file is damaged; export another checkpoint."
            )


def is_dual(model: nn.Module) -> bool:
    """Whether a model has a text tower too."""
    return hasattr(model, "text_model")


def _for_image_size(encoder: DMCLIPVisionModel, image_size: int) -> DMCLIPVisionModel:
    with torch.device("meta"):  # no weight is initialised: all come from the other encoder
        resized = type(encoder)(encoder.config.for_image_size(image_size))
    resized.load_state_dict(encoder.state_dict(), assign=True)
    return resized.eval()


def select_towers(model: PreTrainedModel, names: Sequence[str], folder: str | os.PathLike) -> list[Tower]:
    """Take towers of a model.

    Args:
        model (`PreTrainedModel`): As [`load_model`] returns it.
        names (`Sequence[str]`): Of `"image"` and `"text"`.
        folder (`str` or `os.PathLike`): The model's folder, for messages.

    Returns:
        `list[Tower]`: In the order of the names.

    Raises:
        ValueError: If a name is unknown, or the model has no such tower.
    """
    if unknown := [name for name in names if name not in EXPORTED_TOWERS]:
        raise ValueError(f"Expected towers of {', '.join(EXPORTED_TOWERS)}, got {unknown[0]!r}.")
    if "text" in names and not is_dual(model):
        raise ValueError(f"Expected a dual encoder at '{folder}', got an image encoder alone. Give `--towers image`.")
    return [EXPORTED_TOWERS[name](model).eval() for name in names]


def export_onnx(
    model: PreTrainedModel,
    source: str | os.PathLike,
    folder: Path,
    towers: Sequence[str] = TOWERS,
    dtypes: Sequence[str] = tuple(ONNX_DTYPES),
    winograd: bool = False,
) -> dict[str, Deviation]:
    """Write the towers of a model as ONNX graphs, with the settings that transformers.js and optimum need.

    Args:
        model (`PreTrainedModel`): As [`load_model`] returns it.
        source (`str` or `os.PathLike`): The model's folder. Tokenizer and preprocessing may be missing.
        folder (`Path`): A new or empty folder.
        towers (`Sequence[str]`, *optional*): Of `"image"` and `"text"`.
        dtypes (`Sequence[str]`, *optional*): Of `"fp32"`, `"fp16"` and `"int8"`.
        winograd (`bool`, *optional*, defaults to `False`): In float32, compute DM-CLIP's convolutions as
            [`~modeling_dclip.hub.export.winograd.use_winograd`] does.

    Returns:
        `dict[str, Deviation]`: The written files, and how far their outputs are from the model's.

    Raises:
        ImportError: If the extra `export` is not installed.
        ValueError: If a tower or dtype is unknown, the preprocessing is for another size, or the outputs differ.
    """
    found: dict[str, Deviation] = {}
    runners: dict[str, Runner] = {}
    selected = select_towers(model, towers, source)
    write_settings(model, source, folder)
    (folder / "onnx").mkdir(parents=True)
    for tower in selected:
        plain = None
        for dtype in dtypes:
            if dtype == "fp32" and winograd and tower.kind == "image":
                content = make_onnx(with_winograd(tower), dtype)
            else:
                content = make_onnx(tower, dtype, plain)
                plain = content if dtype == "fp32" else plain
            name = f"onnx/{tower.file_name}{ONNX_DTYPES[dtype]}.onnx"
            found[name] = compare_onnx(content, tower, dtype)
            write_bytes(folder / name, content)
            if dtype == "fp32":
                runners[tower.kind] = onnx_runner(folder / name, tower)
        runners.setdefault(tower.kind, tower)
    suffix = ONNX_DTYPES["fp32" if "fp32" in dtypes else dtypes[0]]
    runs = {kind: code.replace(".onnx", f"{suffix}.onnx") for kind, code in _ONNX_RUNS.items()}
    return _compare_settings(model, source, folder, found, runners, _ONNX._replace(runs=runs))


def export_programs(
    model: PreTrainedModel, source: str | os.PathLike, folder: Path, towers: Sequence[str] = TOWERS
) -> dict[str, Deviation]:
    """Write the towers of a model as `torch.export` programs, `vision_model.pt2` and `text_model.pt2`.

    Arguments, results and errors are those of [`export_onnx`].
    """
    selected = select_towers(model, towers, source)
    write_settings(model, source, folder)
    found = {f"{tower.file_name}.pt2": save_program(tower, folder / f"{tower.file_name}.pt2") for tower in selected}
    runners: dict[str, Runner] = {
        tower.kind: torch.export.load(folder / f"{tower.file_name}.pt2").module() for tower in selected
    }
    return _compare_settings(model, source, folder, found, runners, _PROGRAM)


def _compare_settings(
    model: PreTrainedModel,
    source: str | os.PathLike,
    folder: Path,
    found: dict[str, Deviation],
    runners: Mapping[str, Runner],
    runtime: _Runtime,
) -> dict[str, Deviation]:
    """Compare texts and pictures through the exported tokenizer and preprocessing, where there are any; write the
    README.
    """
    if not (folder / PREPROCESSOR).is_file():
        if not is_dual(model):
            return found
        (*_, last) = found
        said = f"No {PREPROCESSOR} in '{source}', so the export has neither preprocessing nor tokenizer."
        return found | {last: found[last] | {"differs": [said]}}
    why = {side: f"{text}{runtime.others}." for side, text in _WHY.items()}
    reader = Reader(runtime.name, None, None, why, install=runtime.install)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if "text" in runners:
        reader = reader._replace(
            embed_texts=lambda texts: runners["text"](
                tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
            )
        )
    if "image" in runners:
        reader = reader._replace(
            embed_pictures=lambda pictures: runners["image"](
                image_processor(pictures, return_tensors="pt")["pixel_values"]
            )
        )
    ours = load_processor(source)
    resize_images(ours.image_processor, model, source)
    _, readings = compare_reader(model, ours, reader)
    about = [f"Made from `{Path(source).name}`, a {model.config.model_type}. {_describe_files(found)}"]
    write_readme(folder, runtime.use(runners), readings, reader, [*about, *_describe_scores(model, runners)])
    (*_, last) = found
    return found | {last: found[last] | {"differs": describe_readings(readings, reader)}}


def _describe_files(found: Collection[str]) -> str:
    """The written files, each with its precision where the name has one."""
    kinds = {"fp32": "float32", "fp16": "float16", "int8": "8-bit integers"}
    precisions = {suffix: kinds[dtype] for dtype, suffix in ONNX_DTYPES.items()}
    named = []
    for name in found:
        suffix = next((one for one in ("_fp16", "_quantized") if Path(name).stem.endswith(one)), "")
        named.append(f"`{name}`" + (f" ({precisions[suffix]})" if name.endswith(".onnx") else ""))
    return (
        f"Files: {', '.join(named)}. Whatever the file, pictures go in as float32 and embeddings come out as float32."
    )


def _describe_scores(model: PreTrainedModel, kinds: Collection[str]) -> list[str]:
    """How the model makes probabilities of cosines."""
    if len(kinds) < 2 or not hasattr(model, "logit_scale"):
        return []
    dual: Any = model
    scale = f"{float(dual.logit_scale.detach().exp()):.6g}"
    if getattr(dual, "logit_bias", None) is not None:
        bias = f"{float(dual.logit_bias.detach()):+.6g}".replace("+", "+ ").replace("-", "- ")
        return [f"The probability that a text fits a picture is sigmoid({scale} * cosine {bias})."]
    return [f"The model's probabilities of texts, given a picture, are softmax({scale} * cosines)."]


def write_settings(model: PreTrainedModel, source: str | os.PathLike, folder: Path) -> None:
    """Write configuration, tokenizer and preprocessing without what names our code, so that any reader takes them.

    Args:
        model (`PreTrainedModel`): As [`load_model`] returns it.
        source (`str` or `os.PathLike`): The model's folder.
        folder (`Path`): Where to write.

    Raises:
        ValueError: If the preprocessing makes images of another size than the model reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = (to_native_clip(model) if is_dual(model) and is_stock_clip(model) else model).config.to_dict()
    config = {name: value for name, value in config.items() if name not in ("auto_map", "_name_or_path")}
    write_json(folder / "config.json", config, indent=2, default=str)
    if not is_dual(model) or not any((Path(source) / name).is_file() for name in (PREPROCESSOR, PROCESSOR)):
        return
    processor = load_processor(source)
    if model.config.model_type not in NATIVE_ENCODERS:
        processor = to_native_processor(processor)
    resize_images(processor.image_processor, model, source)
    processor.tokenizer.model_max_length = longest_text(cast("DualEncoder", model), processor.tokenizer)
    processor.tokenizer.save_pretrained(folder)
    if model.config.model_type in NATIVE_ENCODERS and processor.tokenizer.is_fast:
        # Gemma's own class, which SigLIP 2 has, would undo that small letters are read, and pad on the left.
        path = folder / "tokenizer_config.json"
        described = read_json(path, "configuration of a tokenizer")
        write_json(path, described | {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right"}, indent=2)
    kind = type(processor.image_processor).__name__.removesuffix("Pil")
    settings = processor.image_processor.to_dict() | {"image_processor_type": kind}
    write_json(folder / PREPROCESSOR, settings, indent=2, default=str)


def resize_images(image_processor: Any, model: PreTrainedModel, source: str | os.PathLike) -> None:
    """Set the preprocessing of a DM-CLIP to the size that the model reads; check the preprocessing of a ViT.

    Args:
        image_processor: Of transformers; changed in place.
        model (`PreTrainedModel`): A dual encoder.
        source (`str` or `os.PathLike`): The model's folder, for messages.

    Raises:
        ValueError: If a ViT's preprocessing is for another size, or images are not cropped to one size.
    """
    if model.config.model_type in NATIVE_ENCODERS:
        _check_size(image_processor, model, source)
        return
    if not image_processor.do_resize or not image_processor.do_center_crop:
        raise ValueError(
            f"Expected {PREPROCESSOR} of '{source}' to resize and to crop, so that all images have one size, got "
            f"do_resize {image_processor.do_resize} and do_center_crop {image_processor.do_center_crop}."
        )
    size = model.config.vision_config.image_size
    crop = image_processor.crop_size["height"]
    if crop == size:
        return
    if model.config.model_type != "dmclip":
        raise ValueError(
            f"Expected images of {size} pixels, which the image encoder reads, from {PREPROCESSOR} of '{source}', got "
            f"{crop}. Set its `crop_size` and `size`."
        )
    image_processor.crop_size, image_processor.size = {"height": size, "width": size}, {"shortest_edge": size}


def _check_size(image_processor: Any, model: PreTrainedModel, source: str | os.PathLike) -> None:
    """Check that pictures of any shape become squares of the size that a model of another family reads."""
    side = model.config.vision_config.image_size
    for shape in ((2 * side, side), (side + 3, 3 * side)):
        pixels = image_processor(images=[Image.new("RGB", shape)], return_tensors="pt")["pixel_values"]
        if pixels.shape[-2:] != (side, side):
            raise ValueError(
                f"Expected images of {side} x {side} pixels, which the image encoder reads, from {PREPROCESSOR} of "
                f"'{source}', got {pixels.shape[-2]} x {pixels.shape[-1]}. Set its `crop_size` and `size`."
            )
