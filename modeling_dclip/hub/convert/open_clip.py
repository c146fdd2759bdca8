"""ViT checkpoints of open_clip as folders of transformers' `CLIPModel`, `MetaClip2Model` and `SiglipModel`.

open_clip itself reads the checkpoint. Its weights get transformers' names, and its tokenizer and its transform become
those of transformers. The folder, loaded again as it was written, has to give open_clip's embeddings.

Source: the names and shapes of open_clip's and of timm's weights; no code. docs/papers.md.
"""

import logging
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import ModelCard
from tokenizers import Regex, Tokenizer, normalizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)
from transformers.image_utils import PILImageResampling

from modeling_dclip.data.failures import FAILURES, one_line
from modeling_dclip.data.files import check_new_folder, entry_names, holding, read_json, replacing, write_text
from modeling_dclip.encoders.families import WrongModelError, projected, tokenize_texts
from modeling_dclip.encoders.fingerprints import hash_file
from modeling_dclip.encoders.loading import load_pair
from modeling_dclip.encoders.open_clip import (
    HOLD_BOTH,
    OPEN_CLIP_PREFIX,
    OpenClipDualEncoder,
    OpenClipProcessor,
    load_open_clip,
)
from modeling_dclip.encoders.saving import save_processor
from modeling_dclip.hub.convert.checkpoints import check_keys, read_checkpoint
from modeling_dclip.hub.export.onnx import EXPORTED_TOWERS, check_outputs
from modeling_dclip.hub.export.open_clip import NAMES, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from modeling_dclip.hub.export.readers import Reader, compare_reader, describe_readings
from modeling_dclip.hub.publish.licences import PUBLISHED_LICENCES
from modeling_dclip.modeling_dclip import LEGACY_EOS_TOKEN_ID

logger = logging.getLogger(__name__)

TAKEN = (
    "Taken are the ViTs of CLIP (OpenAI, LAION, DataComp, DFN, MetaCLIP), of SigLIP and of SigLIP 2, each with its "
    "own text encoder."
)
# Of a folder, in the order in which open_clip looks for them.
_WEIGHTS = (OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# Fields of open_clip's configurations that decide what is computed: the value that is taken, and open_clip's default.
_LAYERS = {
    **dict.fromkeys(("ls_init_value", "block_type"), (None, None)),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False, False)),
    **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False, False)),
}
_CLIP_IMAGES = {
    "attentional_pool": (False, False),
    "no_ln_pre": (False, False),
    "pos_embed_type": ("learnable", "learnable"),
    "pool_type": ("tok", "tok"),
    **_LAYERS,
}
_SIGLIP_IMAGES = {"timm_pool": ("map", "avg"), "timm_proj": ("none", "linear")}
_TEXTS = {"embed_cls": (False, False), "tokenizer_mode": (None, None), **_LAYERS}
_CLIP_TEXTS = {
    "no_causal_mask": (False, False),
    "proj_bias": (False, False),
    "proj_type": ("linear", "linear"),
    **_TEXTS,
}
_SIGLIP_TEXTS = {"no_causal_mask": (True, False), "pool_type": ("last", "argmax"), **_TEXTS}

_TIMM_NAMES = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Ours to open_clip's, but for the layers. A text encoder's stand behind `text.` in some checkpoints.
_TEXT_PLACES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.head.": "text_projection.",  # SigLIP's
    "text_projection.weight": "text_projection",  # CLIP's, for a product from the right
}
_IMAGE_PLACES = {
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding.": "conv1.",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm.": "ln_pre.",
    "vision_model.post_layernorm.": "ln_post.",
    "visual_projection.weight": "proj",  # for a product from the right
}
_TIMM_PLACES = {
    "vision_model.embeddings.patch_embedding.": "patch_embed.proj.",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "vision_model.post_layernorm.": "norm.",
    "vision_model.head.probe": "attn_pool.latent",
    "vision_model.head.attention.out_proj.": "attn_pool.proj.",
    "vision_model.head.layernorm.": "attn_pool.norm.",
    "vision_model.head.mlp.": "attn_pool.mlp.",
}
_TURNED = ("visual_projection.weight", "text_projection.weight")  # open_clip's are for a product from the right
_NUMBERS = ("logit_scale", "logit_bias")  # which some models hold as a row of one
_POOL_ATTENTION = "vision_model.head.attention.in_proj_"
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")  # transformers' names of CLIP's last two tokens
_SAMPLES = 3  # pictures of random pixels
_PROBES = (
    "A photo of a dog.",
    "STOP! two red_circles, left of (a) table?",
    'the dog\'s "red" ball: 3-4 kg & more; #1',
)
# What open_clip does to a text before a tokenizer of transformers, besides ftfy and HTML.
_WHITE_SPACE = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
_CLEANING = {
    "whitespace": _WHITE_SPACE,
    "lower": [*_WHITE_SPACE, normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Lowercase(),
        *_WHITE_SPACE,
    ],
}
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_ATTENTION = re.compile(r"self_attn\.([qkv])_proj")

_README = """---
{front}
---

# {title}

Converted from `{spec}`{digest} by `python -m modeling_dclip.hub.convert open_clip`. It is a plain `{kind}` of
transformers; all {count} weights of open_clip's model are in it.{notes}

```python
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("FOLDER"), AutoProcessor.from_pretrained("FOLDER")
```

**Licence.** {licence}

## How near it is to open_clip

On the same pixels and token ids its embeddings differ from open_clip's by {same:.1e} of the largest value, through its
own preprocessing and tokenizer by {read:.1e}.

{differs}
"""
_WHY = {
    "text": "open_clip repairs every text with ftfy (quotes, ligatures, widths, encodings) and resolves HTML entities "
    "before its tokenizer. This tokenizer does not.",
    "picture": "open_clip leaves out what transparency and EXIF say, makes 16 bits a pixel white, resizes before it "
    "converts to RGB, and rounds the margins of its crop to even numbers.",
}


class Converted(NamedTuple):
    """What became of a checkpoint.

    Attributes:
        model (`PreTrainedModel`): As the folder gives it: float32, in eval mode, on the CPU.
        weights (`int`): Tensors of open_clip's model, each of which has its place.
        same (`float`): The largest difference from open_clip's embeddings of the same pixels and token ids, as a share
            of the largest value.
        read (`float`): The same of plain pictures and texts, each through its own preprocessing and tokenizer.
        notes (`list[str]`): What else there is to know.
        licence (`str`): What is known of it.
    """

    model: PreTrainedModel
    weights: int
    same: float
    read: float
    notes: list[str]
    licence: str


class _Comparison(NamedTuple):
    model: PreTrainedModel
    same: float
    read: float
    differs: list[str]  # kinds of texts and pictures that are read otherwise


class _Source(NamedTuple):
    spec: str  # as `load_open_clip` reads it
    config: dict[str, Any]  # open_clip's `model_cfg`
    file: Path | None  # of the weights, if they are local
    folder: Path | None  # that holds both


def _find_source(spec: str) -> _Source:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"Expected open_clip, which reads its checkpoints, got {error}. Install it with `pip install "
            "open_clip_torch`."
        ) from error
    spec = spec.removeprefix(OPEN_CLIP_PREFIX)
    name, _, pretrained = spec.partition(":")
    path = Path(pretrained if name == "local-dir" else spec)
    if name == "local-dir" or path.exists():
        return _find_local(path)
    if not name or not pretrained:
        raise ValueError(
            f"Expected NAME:PRETRAINED, hf-hub:ORGANISATION/REPOSITORY or a folder with {OPEN_CLIP_CONFIG}, got "
            f"{spec!r}: no such folder is there, and no tag or file names the weights."
        )
    config = open_clip.get_model_config(spec if name in HOLD_BOTH else name.replace("/", "-"))
    file = Path(pretrained) if name not in HOLD_BOTH and Path(pretrained).is_file() else None
    return _Source(spec, config or {}, file, None)


def _find_local(path: Path) -> _Source:
    """A folder in open_clip's layout, or the file of weights in it."""
    folder = path.parent if path.is_file() else path
    told = read_json(folder / OPEN_CLIP_CONFIG, "configuration of open_clip", ("model_cfg",), "Fetch it again.")
    there = [name for name in _WEIGHTS if name in entry_names(folder)]
    if not there or (path.is_file() and path.name != there[0]):
        raise FileNotFoundError(
            f"Expected weights in '{folder}' under the name {' or '.join(_WEIGHTS)}, the first of which open_clip "
            f"reads, got {path.name if path.is_file() else sorted(entry_names(folder))}."
        )
    return _Source(f"local-dir:{folder}", told["model_cfg"], folder / there[0], folder)


def find_kind(config: Mapping[str, Any], spec: str) -> str:
    """Which model of transformers an architecture of open_clip is.

    Args:
        config (`Mapping[str, Any]`): open_clip's `model_cfg`.
        spec (`str`): Where it came from, for messages.

    Returns:
        `str`: `"clip"`, `"metaclip_2"` or `"siglip"`.

    Raises:
        WrongModelError: If it is none of these; the message names the part that differs.
    """
    if "multimodal_cfg" in config:
        raise WrongModelError(f"Expected two encoders in {spec}, got a CoCa, which has a decoder. {TAKEN}")
    images, texts = (dict(config.get(part) or {}) for part in ("vision_cfg", "text_cfg"))
    siglip = images.get("timm_model_name") is not None
    if isinstance(images.get("layers"), list):
        raise WrongModelError(f"Expected a ViT in {spec}, got a ResNet of {images['layers']} layers. {TAKEN}")
    if texts.get("hf_model_name") is not None:
        raise WrongModelError(
            f"Expected a text encoder of open_clip's own in {spec}, got the model {texts['hf_model_name']!r}. {TAKEN}"
        )
    tower = f" of {images['timm_model_name']}" if siglip else ""
    _check_fields(images, _SIGLIP_IMAGES if siglip else _CLIP_IMAGES, f"vision_cfg{tower} in {spec}")
    _check_fields(texts, _SIGLIP_TEXTS if siglip else _CLIP_TEXTS, f"text_cfg in {spec}")
    if siglip != ("init_logit_bias" in config):
        holds = "a SiglipModel holds one" if siglip else "a CLIPModel holds none"
        raise WrongModelError(
            f"Expected {'a' if siglip else 'no'} init_logit_bias in {spec}, as {holds}, got "
            f"{config.get('init_logit_bias')!r}. {TAKEN}"
        )
    if siglip:
        return "siglip"
    pool, end = texts.get("pool_type", "argmax"), texts.get("eos_id", LEGACY_EOS_TOKEN_ID)
    if pool not in ("argmax", "eos"):
        raise WrongModelError(f"Expected pool_type argmax or eos in text_cfg in {spec}, got {pool!r}. {TAKEN}")
    # CLIPModel reads this end token as CLIP's old convention, the highest id of a text.
    return "metaclip_2" if pool == "eos" and end == LEGACY_EOS_TOKEN_ID else "clip"


def _check_fields(given: Mapping[str, Any], fields: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """Compare fields of open_clip's configuration with what they must be; a missing one has open_clip's default."""
    for field, (value, default) in fields.items():
        if given.get(field, default) != value:
            raise WrongModelError(f"Expected {field} {value!r} in {where}, got {given.get(field, default)!r}. {TAKEN}")


def _activation(block: Any, spec: str) -> str:
    """transformers' name of what a layer of open_clip or timm applies, found by what it computes."""
    from transformers.activations import ACT2FN

    layer = block.mlp.act if hasattr(block.mlp, "act") else block.mlp.gelu
    points = torch.linspace(-4, 4, 65)
    for name in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        if torch.allclose(layer(points), ACT2FN[name](points), rtol=0, atol=1e-6):
            return name
    raise WrongModelError(f"Expected GELU or QuickGELU in the layers of {spec}, got {layer}. {TAKEN}")


def _sizes(blocks: Sequence[Any], spec: str) -> dict[str, Any]:
    """Fields of a configuration that all layers share."""
    first = blocks[0]
    norm, inner = (first.norm1, first.mlp.fc1) if hasattr(first, "norm1") else (first.ln_1, first.mlp.c_fc)
    return {
        "hidden_size": inner.in_features,
        "intermediate_size": inner.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attn.num_heads,
        "layer_norm_eps": norm.eps,
        "hidden_act": _activation(first, spec),
    }


def _read_config(kind: str, theirs: Any, tokenizer: Any, source: _Source) -> Any:
    """The configuration of transformers' model, from the modules that open_clip made."""
    visual, text, spec = theirs.visual, getattr(theirs, "text", theirs), source.spec
    height, width = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    if height != width:
        raise WrongModelError(f"Expected square images in {spec}, got {height} x {width}. {TAKEN}")
    blocks = visual.trunk.blocks if kind == "siglip" else visual.transformer.resblocks
    patch = (visual.trunk.patch_embed.proj if kind == "siglip" else visual.conv1).weight.shape[-1]
    images = {**_sizes(blocks, spec), "image_size": height, "patch_size": patch}
    texts = {
        **_sizes(text.transformer.resblocks, spec),
        "vocab_size": text.token_embedding.weight.shape[0],
        "max_position_embeddings": text.positional_embedding.shape[0],
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "siglip":
        if images["hidden_act"] != _activation(visual.trunk.attn_pool, spec):
            raise WrongModelError(f"Expected one activation in the image encoder of {spec}, got two. {TAKEN}")
        return SiglipConfig(text_config={**texts, "projection_size": source.config["embed_dim"]}, vision_config=images)
    told = dict(source.config["text_cfg"])
    if told.get("pool_type") == "eos":
        texts["eos_token_id"] = told.get("eos_id", LEGACY_EOS_TOKEN_ID)
    elif texts["eos_token_id"] != max(tokenizer.get_vocab().values()):
        texts["eos_token_id"] = LEGACY_EOS_TOKEN_ID  # read at the highest id, as open_clip does
    made = MetaClip2Config if kind == "metaclip_2" else CLIPConfig
    return made(text_config=texts, vision_config=images, projection_dim=source.config["embed_dim"])


class _Place(NamedTuple):
    """Where a weight of transformers' model stands in open_clip's."""

    name: str
    thirds: int = 3  # of our rows that it has: 9 for queries, keys and values in one
    part: int | None = None  # which of these three ours is


def _find_places(key: str, kind: str, prefix: str) -> list[_Place]:
    """The places of a weight; several are joined."""
    timm = kind == "siglip"
    if match := _LAYER.match(key):
        tower, layer, part, form = match.groups()
        names, start, packed = NAMES, f"{prefix}transformer.resblocks", "attn.in_proj_"
        if tower == "vision_model" and timm:
            names, start, packed = _TIMM_NAMES, "visual.trunk.blocks", "attn.qkv."
        elif tower == "vision_model":
            start = "visual.transformer.resblocks"
        if attention := _ATTENTION.match(part):
            return [_Place(f"{start}.{layer}.{packed}{form}", 9, "qkv".index(attention[1]))]
        return [_Place(f"{start}.{layer}.{names[part]}.{form}")]
    if key.startswith(_POOL_ATTENTION):
        form = key.removeprefix(_POOL_ATTENTION)
        return [_Place(f"visual.trunk.attn_pool.q.{form}", 1), _Place(f"visual.trunk.attn_pool.kv.{form}", 2)]
    images = (_TIMM_PLACES, "visual.trunk.") if timm else (_IMAGE_PLACES, "visual.")
    for places, start in ((_TEXT_PLACES, prefix), images):
        for ours, name in places.items():
            if key.startswith(ours):
                return [_Place(start + name + key.removeprefix(ours))]
    return [_Place(key)]  # scale and bias


def place_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], kind: str, spec: str) -> list[str]:
    """Fill a model of transformers with the weights of one of open_clip.

    Args:
        model (`PreTrainedModel`): Filled in place.
        weights (`Mapping[str, torch.Tensor]`): open_clip's, under its names.
        kind (`str`): Of [`find_kind`].
        spec (`str`): Where they came from, for messages.

    Returns:
        `list[str]`: What the model has that open_clip's has not.

    Raises:
        ValueError: If a key is missing, left over or of another shape.
    """
    prefix, notes = "text." if any(key.startswith("text.") for key in weights) else "", []
    state = model.state_dict()
    places = {key: _find_places(key, kind, prefix) for key in state}
    if kind == "siglip" and not any(key.startswith(f"{prefix}text_projection") for key in weights):
        head = state["text_model.head.weight"]
        state |= {"text_model.head.weight": torch.eye(*head.shape), "text_model.head.bias": torch.zeros(len(head))}
        places = {key: found for key, found in places.items() if not key.startswith("text_model.head.")}
        notes.append("The text projection is the identity, because open_clip's model has none.")
    expected = {
        place.name: _published_shape(key, state[key].shape, place.thirds)
        for key, found in places.items()
        for place in found
    }
    check_keys(weights, expected, spec, f"a {type(model).__name__}")
    for key, found in places.items():
        parts = [weights[place.name] for place in found]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if found[0].part is not None:
            value = value.chunk(3)[found[0].part]
        state[key] = (value.T if key in _TURNED else value).reshape(state[key].shape)
    model.load_state_dict(state)
    return notes


def _published_shape(key: str, shape: torch.Size, thirds: int) -> tuple[int, ...]:
    """The shape of a weight in open_clip's model."""
    if key in _TURNED:
        return tuple(shape[::-1])
    if key in _NUMBERS:
        return ()
    if key == "vision_model.embeddings.position_embedding.weight" and thirds == 3:
        return tuple(shape)
    return (shape[0] * thirds // 3, *shape[1:])


def _published_weights(theirs: Any) -> dict[str, torch.Tensor]:
    """The weights of open_clip's model: scale and bias as numbers, timm's positions without a batch."""
    weights = dict(theirs.state_dict())
    for name in _NUMBERS:
        if name in weights and weights[name].numel() == 1:
            weights[name] = weights[name].reshape(())
    positions = weights.get("visual.trunk.pos_embed")
    if positions is not None and positions.ndim == 3 and len(positions) == 1:
        weights["visual.trunk.pos_embed"] = positions[0]
    return weights


def _check_file(source: _Source, theirs: Any) -> None:
    """Refuse a file whose weights open_clip does not take as they are: it stretches positions in silence."""
    if source.file is None or source.file.suffix == ".npz":
        return
    found = {key.removeprefix("text."): value for key, value in read_checkpoint(source.file).items()}
    expected = {key.removeprefix("text."): tuple(value.shape) for key, value in theirs.state_dict().items()}
    for name in _NUMBERS:
        if name in found and name in expected and found[name].numel() == 1:
            found[name] = found[name].reshape(expected[name])
    check_keys(found, expected, source.file, f"the architecture of {source.spec}")


def _read_cleaning(source: _Source) -> str:
    """What open_clip does to a text before its tokenizer."""
    texts = source.config.get("text_cfg") or {}
    told = texts.get("tokenizer_kwargs") or {}
    wraps = bool(texts.get("hf_tokenizer_name"))  # a tokenizer of transformers; else CLIP's own
    clean = told.get("clean", "whitespace" if wraps else "lower")
    unread = sorted(set(told) - {"clean"})
    if unread or clean not in (_CLEANING if wraps else ("lower",)):
        found = f"{unread[0]} {told[unread[0]]!r}" if unread else f"clean {clean!r}"
        raise WrongModelError(f"Expected a plain tokenizer in {source.spec}, got one with {found}. {TAKEN}")
    return clean


def _make_tokenizer(read: Any, length: int, clean: str, spec: str) -> Any:
    """A tokenizer of transformers that reads as open_clip's does, but for ftfy and HTML."""
    options: dict[str, Any] = {"padding_side": "right", "truncation_side": "right", "model_max_length": length}
    inner = getattr(read, "tokenizer", None)  # of transformers, where open_clip wraps one
    if inner is None:
        words = sorted(read.encoder, key=read.encoder.get)[: -len(_CLIP_SPECIAL)] + list(_CLIP_SPECIAL)
        merges = sorted(read.bpe_ranks, key=read.bpe_ranks.get)
        return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=merges, **options)
    if isinstance(inner, CLIPTokenizer) and clean != "canonicalize":  # which cleans in this way itself
        inner.model_max_length = length
        return inner
    if not hasattr(inner, "backend_tokenizer"):
        raise WrongModelError(
            f"Expected a tokenizer with tokenizer.json in {spec}, before which texts can be cleaned, got a "
            f"{type(inner).__name__}. {TAKEN}"
        )
    backend = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    rest = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*_CLEANING[clean], *rest])
    special = {name: str(token) for name, token in inner.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


def _make_processor(kind: str, theirs: Any, tokenizer: Any, source: _Source) -> Any:
    told = dict(theirs.visual.preprocess_cfg)
    size, mode = theirs.visual.image_size, told.get("resize_mode") or "shortest"
    side = size[0] if isinstance(size, tuple) else size
    if mode not in ("shortest", "squash"):
        raise WrongModelError(f"Expected resize_mode shortest or squash in {source.spec}, got {mode!r}. {TAKEN}")
    square = {"height": side, "width": side}
    # open_clip takes bicubic for any other word when it does not train
    bilinear = told.get("interpolation") == "bilinear"
    settings: dict[str, Any] = {
        "image_mean": list(told["mean"]),
        "image_std": list(told["std"]),
        "resample": PILImageResampling.BILINEAR if bilinear else PILImageResampling.BICUBIC,
    }
    if mode == "shortest":
        images: Any = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **settings)
    elif kind == "siglip":
        images = SiglipImageProcessorPil(size=square, **settings)
    else:
        images = CLIPImageProcessorPil(size=square, do_center_crop=False, **settings)
    return (SiglipProcessor if kind == "siglip" else CLIPProcessor)(images, tokenizer)


@torch.no_grad()
def _compare(folder: Path, reference: OpenClipDualEncoder, inputs: OpenClipProcessor) -> _Comparison:
    """Load a folder, and compare its embeddings with open_clip's: of the same inputs, and of pictures and texts."""
    model, processor = load_pair(folder)
    native = cast("PreTrainedModel", model)
    pixels = EXPORTED_TOWERS["image"](native).sample(_SAMPLES)
    ids = inputs.tokenizer(_PROBES)["input_ids"]
    texts = reference.get_text_features(ids)
    pairs = [
        (reference.get_image_features(pixels), projected(model.get_image_features(pixel_values=pixels))),
        (texts, projected(model.get_text_features(input_ids=ids))),
    ]
    same = max(check_outputs([pair], "fp32", "open_clip")["max_relative_difference"] for pair in pairs)
    again = projected(model.get_text_features(**tokenize_texts(model, processor, _PROBES, max_length=ids.shape[1])))
    check_outputs([(texts, again)], "fp32", "open_clip's tokenizer on punctuation and capitals")
    reader = Reader(
        "open_clip",
        lambda texts: reference.get_text_features(inputs.tokenizer(texts)["input_ids"]),
        lambda pictures: reference.get_image_features(inputs.image_processor(pictures)["pixel_values"]),
        _WHY,
    )
    read, readings = compare_reader(native, processor, reader)
    return _Comparison(native, same, read["max_relative_difference"], describe_readings(readings, reader))


def convert_open_clip(spec: str, output: str | Path) -> Converted:
    """Convert a checkpoint of open_clip to a folder that transformers loads without further code.

    Args:
        spec (`str`): `NAME:PRETRAINED` (an architecture and a tag or a file of weights),
            `hf-hub:ORGANISATION/REPOSITORY`, or a folder in open_clip's layout, with `open_clip_config.json` and
            `open_clip_model.safetensors`.
        output (`str` or `Path`): A new or empty folder; written whole or not at all.

    Returns:
        [`Converted`]

    Raises:
        FileExistsError, FileNotFoundError: If the output is in use, or a file is not there.
        ImportError: If open_clip is not installed. What cannot be compared is not written.
        WrongModelError: If it is a model of another kind.
        ValueError: If the checkpoint is damaged, a key has no place, or the folder's embeddings are not open_clip's.
    """
    check_new_folder(output)
    source = _find_source(str(spec))
    kind = find_kind(source.config, source.spec)
    clean = _read_cleaning(source)
    reference, inputs = load_open_clip(source.spec)
    theirs: Any = reference.model
    _check_file(source, theirs)
    tokenizer = _make_tokenizer(inputs.tokenizer.read, inputs.tokenizer.model_max_length, clean, source.spec)
    processor = _make_processor(kind, theirs, tokenizer, source)
    made = {"clip": CLIPModel, "metaclip_2": MetaClip2Model, "siglip": SiglipModel}[kind]
    model: Any = made(_read_config(kind, theirs, tokenizer, source))
    weights = _published_weights(theirs)
    notes = place_weights(model, weights, kind, source.spec)
    with holding(output, beside=True), replacing(output) as folder:
        model.save_pretrained(folder)
        save_processor(model, processor, folder)
        del model
        processor.image_processor.save_pretrained(folder)
        found = _compare(folder, reference, inputs)
        front, licence = _read_licence(source)
        write_text(
            folder / "README.md",
            _README.format(
                front=front,
                title=f"{Path(source.spec).name} in transformers' format",
                spec=source.spec if source.folder is None else source.folder.name,
                digest="" if source.file is None else f" (sha256 {hash_file(source.file)})",
                kind=made.__name__,
                count=len(weights),
                notes="".join(f" {note}" for note in notes),
                licence=licence,
                same=found.same,
                read=found.read,
                differs="\n".join(f"- {line}" for line in found.differs)
                or "Nothing of what was tried is read otherwise.",
            ),
        )
    return Converted(found.model, len(weights), found.same, found.read, notes, licence)


def _read_licence(source: _Source) -> tuple[str, str]:
    """The front of the folder's card with the licence of the weights, and a sentence.

    The licence is what the card beside the weights or on their page of the Hub says; where that cannot be read, what
    is known of weights of this kind.
    """
    front = ["library_name: transformers", "pipeline_tag: zero-shot-image-classification"]
    hub_id = _find_hub_id(source)
    told, where = _read_card(source, hub_id), f"the card {'beside the weights' if hub_id is None else f'of {hub_id}'}"
    if not told.get("license") and hub_id is not None:
        known = (name for start, name in PUBLISHED_LICENCES.items() if hub_id.startswith(start))
        told, where = {"license": next(known, None)}, f"weights of {hub_id} are published; their card was not read"
    if not told.get("license"):
        return "\n".join(front), (
            "Not known here: it is that of the weights, on their page. It applies to this folder and to every model "
            "that is trained from it."
        )
    front += [f"{name}: {told[name]}" for name in ("license", "license_name", "license_link") if told.get(name)]
    says = " says" if where.startswith("the card") else ""
    return "\n".join(front), (
        f"{told.get('license_name') or told['license']}, as {where}{says}. It applies to this folder and to every "
        "model that is trained from it."
    )


def _find_hub_id(source: _Source) -> str | None:
    """The repository of the Hub that the weights come from; `None` of a folder or a file."""
    import open_clip

    name, _, pretrained = source.spec.partition(":")
    if source.folder is not None or source.file is not None:
        return None
    if name != "hf-hub":
        pretrained = (open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained) or {}).get("hf_hub") or ""
    return "/".join(pretrained.split("/")[:2]) or None


def _read_card(source: _Source, hub_id: str | None) -> Any:
    """What the card of the weights says in its front; empty if there is none, or it cannot be read."""
    if source.folder is not None:
        card = source.folder / "README.md"
        return ModelCard.load(card).data if card.is_file() else {}
    try:
        return {} if hub_id is None else ModelCard.load(hub_id).data
    except FAILURES as error:
        logger.warning("The card of %s cannot be read: %s", hub_id, one_line(error))
        return {}
