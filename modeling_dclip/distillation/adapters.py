"""Low-rank adapters in a dual encoder: put in, saved, merged, and taken back from a checkpoint, every other weight
left as it is.

Source: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; "DoRA: Weight-Decomposed Low-Rank
Adaptation", arXiv 2402.09353; docs/papers.md. The peft package does both; it is imported when an adapter is asked for.
"""

import copy
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from modeling_dclip.data.files import replacing
from modeling_dclip.distillation.arguments import AdapterArguments
from modeling_dclip.encoders.loading import ADAPTER_FOLDER, ADAPTER_WEIGHTS

logger = logging.getLogger(__name__)

# Last names of the linear layers of attention, Mamba mixers and MLPs, in CLIP's towers and in MambaVision.
ADAPTED_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "qkv", "proj", "in_proj", "x_proj", "fc1", "fc2")


def add_adapters(model: PreTrainedModel, args: AdapterArguments, towers: Sequence[str] = ("vision_model",)) -> Any:
    """Put low-rank adapters into a dual encoder, as the identity, and freeze every weight that it has.

    Args:
        model (`PreTrainedModel`): Changed in place: each adapted layer is wrapped. [`plain_state`] has its weights
            under their own names.
        args ([`AdapterArguments`]): With a `lora_rank`. The draw of weights is torch's: seed before.
        towers (`Sequence[str]`, *optional*, defaults to the image encoder): Submodules of the model whose layers are
            adapted.

    Returns:
        `peft.PeftModel`: Around the model.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If no linear layer of the towers has one of the names.

    Example:
        >>> from modeling_dclip import DCLIPConfig, DCLIPModel
        >>> small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = DCLIPModel(DCLIPConfig(text_config=small, vision_config=small, projection_dim=16))
        >>> adapters = add_adapters(model, AdapterArguments(output_dir="x", lora_rank=2))
        >>> sum(part.numel() for part in model.parameters() if part.requires_grad)  # 2 * (4 * 64 + 2 * 96)
        896
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            'Expected the package peft for lora_rank, got none. Install it with `pip install "modeling_dclip[peft]"`.'
        ) from error
    names = tuple(args.lora_target_modules) or ADAPTED_LAYERS
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if name.split(".")[0] in towers]
    found = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(args.lora_target_modules) - found) or not found & set(names):
        raise ValueError(
            f"lora_target_modules: expected last names of linear layers in {' and '.join(towers)} "
            f"({', '.join(sorted(found))}), got {unknown if isinstance(unknown, list) else list(names)}."
        )
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        target_modules=rf"({'|'.join(towers)})\.(.*\.)?({'|'.join(names)})",
    )
    return get_peft_model(model, config)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped layers of a model, by name; none where nothing is adapted."""
    # By what they have, so that a model without adapters needs no peft.
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}


def plain_state(model: nn.Module, merged: bool) -> dict[str, torch.Tensor]:
    """The state of an adapted model under the names it has without adapters; the live layers are not touched.

    Args:
        model (`nn.Module`): With or without adapters.
        merged (`bool`): Whether the adapted weights hold what the adapter adds, or are as they were.

    Returns:
        `dict[str, torch.Tensor]`: Not copied, but for the merged ones.
    """
    layers = adapted_layers(model)
    prefixes = tuple(f"{name}." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    for name, layer in layers.items():
        if merged:
            layer = copy.deepcopy(layer)
            layer.merge(safe_merge=True)
        state |= {f"{name}.{key}": tensor for key, tensor in layer.get_base_layer().state_dict().items()}
    return state


@torch.no_grad()
def scale_adapters(model: nn.Module, alpha: float) -> None:
    """Walk back from the adapted model to the one without: what the adapters add is multiplied, so the weights lie on
    the straight line.

    That is WiSE-FT, kept in the adapter itself: what is published as adapter and as whole weights is one model.

    Args:
        model (`nn.Module`): With LoRA, not DoRA, in place.
        alpha (`float`): In [0, 1]; 0 is the untouched model.
    """
    for layer in adapted_layers(model).values():
        for weights in layer.lora_B.values():
            weights.weight.mul_(alpha)


def save_adapters(adapters: Any, folder: Path) -> None:
    """Write `adapter/` into a folder: the weights and the config that `PeftModel.from_pretrained(model, folder)`
    reads.

    Args:
        adapters (`peft.PeftModel`): From [`add_adapters`].
        folder (`Path`): Of the model or the checkpoint.
    """
    target = folder / ADAPTER_FOLDER
    if target.exists():
        shutil.rmtree(target)
    with replacing(target) as temporary:
        adapters.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card


def load_adapters(adapters: Any, folder: Path) -> None:
    """Take an adapter's weights from a checkpoint, all of them.

    Args:
        adapters (`peft.PeftModel`): From [`add_adapters`], with the same arguments; changed in place.
        folder (`Path`): Of the checkpoint.

    Raises:
        FileNotFoundError: If there is no adapter in it.
        ValueError: If it is another one.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"No {ADAPTER_FOLDER}/{ADAPTER_WEIGHTS} in the checkpoint '{folder}'.")
    weights, own = load_file(path), get_peft_model_state_dict(adapters, save_embedding_layers=False)
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, weights)]
    if shapes[0] != shapes[1]:
        odd = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise ValueError(f"'{path}' holds another adapter: {len(odd)} tensors differ, the first {odd[0]!r}.")
    set_peft_model_state_dict(adapters, weights)
