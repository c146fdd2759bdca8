"""Which parameters of a dual encoder train: freezing by name, and low-rank adapters beside frozen weights.

Source: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; "DoRA: Weight-Decomposed Low-Rank
Adaptation", arXiv 2402.09353; docs/papers.md. The peft package does both; it is imported when an adapter is asked for.
"""

import copy
import logging
import re
import shutil
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from modeling_dclip.data.files import replacing
from modeling_dclip.distillation.arguments import AdapterArguments, check_pattern
from modeling_dclip.encoders.loading import ADAPTER_FOLDER, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

logger = logging.getLogger(__name__)

# The last parts of names of the linear layers of attention, Mamba mixers and MLPs: first in CLIP's towers and its kin,
# in timm's ViTs and in MambaVision, then in BERT and its kin.
ADAPTED_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "out_proj", "qkv", "proj", "in_proj", "x_proj", "fc1", "fc2"),
    *("query", "key", "value", "dense"),
)


@dataclass(frozen=True)
class FreezeReport:
    """What [`freeze_parameters`] did.

    Args:
        matched (`dict[str, int]`): Number of parameter tensors that each pattern matched.
        frozen_parameters (`int`): Number of parameters without a gradient, whatever froze them.
        trainable_parameters (`int`): Number of parameters that train.
    """

    matched: dict[str, int]
    frozen_parameters: int
    trainable_parameters: int

    def __str__(self) -> str:
        patterns = "".join(f"; {pattern!r} froze {count} tensors" for pattern, count in self.matched.items())
        return f"{self.trainable_parameters:,} parameters train, {self.frozen_parameters:,} are frozen{patterns}"


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> FreezeReport:
    """Turn off the gradient of every parameter whose whole name matches a pattern.

    Args:
        model (`nn.Module`): Changed in place.
        patterns (`Sequence[str]`): Globs over parameter names, such as `vision_model.encoder.layers.[0-5].*`, or
            regular expressions after `re:`, such as `re:.*layer_norm\\d.*`.

    Returns:
        [`FreezeReport`]

    Raises:
        ValueError: If a pattern matches nothing, is no regular expression, or nothing is left to train.

    Example:
        >>> print(freeze_parameters(nn.Linear(2, 3), ["bias"]))
        6 parameters train, 3 are frozen; 'bias' froze 1 tensors
    """
    parameters = dict(model.named_parameters())
    matched = {}
    for pattern, names in match_parameters(parameters, patterns).items():
        for name in names:
            parameters[name].requires_grad_(False)
        matched[pattern] = len(names)
    trainable = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
    if trainable == 0:
        raise ValueError(f"Freeze patterns {list(patterns)} leave nothing to train. Freeze less.")
    frozen = sum(parameter.numel() for parameter in parameters.values()) - trainable
    return FreezeReport(matched, frozen, trainable)


def match_parameters(parameters: Collection[str], patterns: Sequence[str]) -> dict[str, list[str]]:
    """The names of parameters that each pattern matches whole.

    Args:
        parameters (`Collection[str]`): Names.
        patterns (`Sequence[str]`): As of [`freeze_parameters`].

    Raises:
        ValueError: If a pattern matches nothing, or is no regular expression.
    """
    matched = {}
    for pattern in patterns:
        regex = check_pattern(pattern)
        matched[pattern] = [name for name in parameters if re.fullmatch(regex, name)]
        if not matched[pattern]:
            raise ValueError(f"Freeze pattern {pattern!r} matches no parameter. There are: {', '.join(parameters)}.")
    return matched


def add_adapters(
    model: PreTrainedModel, args: AdapterArguments, towers: Sequence[str] = ("vision_model",)
) -> "PeftModel":
    """Add low-rank adapters to a dual encoder and freeze its weights. Untrained adapters change no output.

    Args:
        model (`PreTrainedModel`): Changed in place: each adapted layer is wrapped. [`plain_state`] returns its
            weights under their own names.
        args ([`AdapterArguments`]): With a `lora_rank`. The adapters are drawn from torch's generator: seed it before.
        towers (`Sequence[str]`, *optional*, defaults to the image encoder): Submodules of the model whose layers are
            adapted.

    Returns:
        `peft.PeftModel`: Around the model.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If there is no `lora_rank`, or no linear layer of the towers has one of the names.

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
    if args.lora_rank is None:
        raise ValueError("lora_rank: expected the adapters' rank, got none. Set it, for example to 16.")
    names, left_out = find_adapted_layers(model, args, towers)
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        target_modules=rf"({'|'.join(towers)})\.(.*\.)?({'|'.join(names)})",
        exclude_modules=left_out or None,
    )
    with warnings.catch_warnings():  # of a name in transformers that peft reads
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)


def find_adapted_layers(
    model: nn.Module, args: AdapterArguments, towers: Sequence[str] = ("vision_model",)
) -> tuple[tuple[str, ...], list[str]]:
    """The last parts of the names of the layers that adapters are added to, and layers of such a name that get none.

    PyTorch's own attention reads the weights of its layers without calling them, so that an adapter there would have
    no effect.

    Args:
        model (`nn.Module`): A dual encoder, with or without weights.
        args ([`AdapterArguments`]): May name layers.
        towers (`Sequence[str]`, *optional*, defaults to the image encoder): Submodules of the model.

    Returns:
        `tuple`: The last parts, and whole names that are left out.

    Raises:
        ValueError: If no linear layer of the towers has one of the names.
    """
    names = tuple(args.lora_target_modules) or ADAPTED_LAYERS
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if name.split(".")[0] in towers]
    found = {name.rpartition(".")[2] for name in linear if not name.startswith(inside)}
    if unknown := sorted(set(args.lora_target_modules) - found) or not found & set(names):
        there = ", ".join(sorted(found)) or "none: it has no linear layer, so train without lora_rank"
        raise ValueError(
            f"lora_target_modules: expected names of linear layers in {' and '.join(towers)} ({there}), got "
            f"{unknown if isinstance(unknown, list) else list(names)}."
        )
    return names, [name for name in linear if name.startswith(inside) and name.rpartition(".")[2] in names]


def adapted_layers(model: nn.Module) -> dict[str, "LoraLayer"]:
    """The wrapped layers of a model by name; empty if nothing is adapted."""
    # Recognised by an attribute, so that a model without adapters does not need peft.
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}


def plain_state(model: nn.Module, merged: bool) -> dict[str, torch.Tensor]:
    """The weights of an adapted model under their names without adapters. The model is not changed.

    Args:
        model (`nn.Module`): With or without adapters.
        merged (`bool`): Whether to add the adapters to the weights that they adapt.

    Returns:
        `dict[str, torch.Tensor]`: The model's own tensors; only merged ones are copies.

    Raises:
        FloatingPointError: If a merged weight is NaN or infinite.
    """
    layers = adapted_layers(model)
    prefixes = tuple(f"{name}." for name in layers)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    for name, adapted in layers.items():
        layer: Any = copy.deepcopy(adapted) if merged else adapted
        if merged:
            layer.merge()
            if not torch.isfinite(layer.get_base_layer().weight).all():
                raise FloatingPointError(
                    f"{name}: the weight with its adapter merged in holds NaN or infinity, so it is not saved. Lower "
                    "student.learning_rate."
                )
        state |= {f"{name}.{key}": tensor for key, tensor in layer.get_base_layer().state_dict().items()}
    return state


@torch.no_grad()
def scale_adapters(model: nn.Module, alpha: float) -> None:
    """Scale what the adapters add: interpolate the weights between the model without adapters and with them.

    This is WiSE-FT on the adapter itself, so that the published adapter and the published whole weights are one model.

    Args:
        model (`nn.Module`): With LoRA adapters, not DoRA; changed in place.
        alpha (`float`): In [0, 1]; 0 is the model without adapters.
    """
    for layer in adapted_layers(model).values():
        for weights in layer.lora_B.values():
            weights.weight.mul_(alpha)


def save_adapters(adapters: "PeftModel", folder: Path) -> None:
    """Save adapters in the folder `adapter/`, as `PeftModel.from_pretrained(model, folder)` reads them.

    Args:
        adapters (`peft.PeftModel`): From [`add_adapters`].
        folder (`Path`): Of the model or the checkpoint; gets the folder `adapter`.
    """
    target = folder / ADAPTER_FOLDER
    if target.exists():
        shutil.rmtree(target)
    with replacing(target) as temporary:
        adapters.save_pretrained(str(temporary), save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty template of a model card


def load_adapters(adapters: "PeftModel", folder: Path) -> None:
    """Load the weights of all adapters from a checkpoint.

    Args:
        adapters (`peft.PeftModel`): From [`add_adapters`], with the same arguments; changed in place.
        folder (`Path`): Of the checkpoint.

    Raises:
        FileNotFoundError: If there is no adapter in the checkpoint.
        ValueError: If its tensors have other names or shapes.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"No {ADAPTER_FOLDER}/{ADAPTER_WEIGHTS} in the checkpoint '{folder}'.")
    weights, own = load_file(path), get_peft_model_state_dict(adapters, save_embedding_layers=False)
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, weights)]
    if shapes[0] != shapes[1]:
        odd = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise ValueError(f"'{path}' holds another adapter: {len(odd)} tensors differ, the first is {odd[0]!r}.")
    set_peft_model_state_dict(adapters, weights)
