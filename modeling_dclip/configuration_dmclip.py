"""Architectures of DM-CLIP: a MambaVision image encoder beside MobileCLIP-S1's text tower.

Source: [M] "Knowledge Distillation from Transformer to Mamba for an efficient CLIP"; [MV] MambaVision, arXiv
2407.08083; [MC] MobileCLIP, arXiv 2311.17049; docs/papers.md.
"""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, PreTrainedConfig

from .configuration_dclip import check_choice, check_number, check_sizes, merge_sub_config

NUM_STAGES = 4
NUM_CONV_STAGES = 2  # the others are hybrid: mixers first, then attention
STEM_STRIDE = 4
DT_INITS = ("published", "mamba")
SCAN_BACKENDS = ("auto", "reference", "torch", "triton", "mamba_ssm")  # selective_scan's BACKENDS

# Fields of DMCLIPVisionConfig, as published for 224 pixels. T is the small default.
DMCLIP_PRESETS: dict[str, dict[str, Any]] = {
    "T": {"depths": (1, 3, 8, 4), "num_heads": (2, 4, 8, 16), "hidden_size": 80, "stem_dim": 32,
          "drop_path_rate": 0.2},
    "T2": {"depths": (1, 3, 11, 4), "num_heads": (2, 4, 8, 16), "hidden_size": 80, "stem_dim": 32,
           "drop_path_rate": 0.2},
    "S": {"depths": (3, 3, 7, 5), "num_heads": (2, 4, 8, 16), "hidden_size": 96, "stem_dim": 64,
          "drop_path_rate": 0.2},
    "B": {
        "depths": (3, 3, 10, 5),
        "num_heads": (2, 4, 8, 16),
        "hidden_size": 128,
        "stem_dim": 64,
        "drop_path_rate": 0.3,
        "layer_scale_init_value": 1e-5,
    },
    "L": {
        "depths": (3, 3, 10, 5),
        "num_heads": (4, 8, 16, 32),
        "hidden_size": 196,
        "stem_dim": 64,
        "drop_path_rate": 0.3,
        "layer_scale_init_value": 1e-5,
    },
}  # fmt: skip


@strict
class DMCLIPVisionConfig(PreTrainedConfig):
    """The image encoder: MambaVision and its projection into the shared space. The defaults are preset T.

    Of four stages, widths `hidden_size * (1, 2, 4, 8)`, the first two are convolutional and the last two hybrid: in
    windows of the map, `ceil(depth / 2)` Mamba mixers, then `floor(depth / 2)` attentions.

    Source: [MV]; [M]; docs/papers.md. Deviation: `batch_norm_folded`, `dt_init` and `scan_backend` are ours.

    Args:
        image_size (`int`, *optional*, defaults to 224): Pixels a side it is meant for. Any size runs: the map is
            padded to whole windows; [`~DMCLIPVisionConfig.for_image_size`] picks windows that need no padding.
        num_channels (`int`, *optional*, defaults to 3): Of the input.
        stem_dim (`int`, *optional*, defaults to 32): Width between the stem's two convolutions (published `in_dim`).
        hidden_size (`int`, *optional*, defaults to 80): Width of the first stage (published `dim`).
        depths (`tuple[int, ...]`, *optional*, defaults to `(1, 3, 8, 4)`): Blocks of each stage.
        num_heads (`tuple[int, ...]`, *optional*, defaults to `(2, 4, 8, 16)`): Attention heads of each stage; without
            meaning for the convolutional ones, as `window_sizes`.
        window_sizes (`tuple[int, ...]`, *optional*, defaults to `(8, 8, 14, 7)`): Places a side of each stage's
            windows. They hold no parameters: change them freely.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Width of the hybrid blocks' MLPs over the stage's.
        drop_path_rate (`float`, *optional*, defaults to 0.2): Of the last block; grows linearly from 0 at the first.
        layer_scale_init_value (`float`, *optional*): Initial gain of both branches of hybrid blocks; None: no gains.
        conv_layer_scale_init_value (`float`, *optional*): The same for convolutional blocks.
        state_size (`int`, *optional*, defaults to 8): State of the selective scan, per channel.
        conv_kernel (`int`, *optional*, defaults to 3): Of the mixers' depthwise convolution; odd.
        dt_init (`str`, *optional*, defaults to `"published"`): How the mixers' step sizes start. `"published"`: like
            every Linear (bias 0, so every step starts near log 2). `"mamba"`: as Mamba's, log-uniform in [0.001, 0.1].
        scan_backend (`str`, *optional*, defaults to `"auto"`): What computes the mixers' selective scan, as in
            `selective_scan`: `"auto"`, `"reference"`, `"torch"`, `"triton"` or `"mamba_ssm"`. Read at every call; one
            that cannot run where the model does is an error there.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): Of the hybrid blocks' LayerNorms.
        initializer_range (`float`, *optional*, defaults to 0.02): Deviation of Linear weights, a truncated normal.
        projection_dim (`int`, *optional*, defaults to 512): Width of the shared space.
        batch_norm_folded (`bool`, *optional*, defaults to `False`): The inference form that
            [`~DMCLIPVisionModel.fuse`] makes: BatchNorms of stem and blocks, and all layer scales, are inside the
            weights beside them.

    Raises:
        StrictDataclassError: If a tuple has not one positive entry per stage, a hybrid width is not divisible by its
            heads, or a number is out of its range.

    Example:
        >>> DMCLIPVisionConfig(**DMCLIP_PRESETS["B"]).for_image_size(256).window_sizes
        (8, 8, 16, 8)
    """

    model_type = "dmclip_vision"
    base_config_key = "vision_config"

    image_size: int = 224
    num_channels: int = 3
    stem_dim: int = 32
    hidden_size: int = 80
    depths: list[int] | tuple[int, ...] = (1, 3, 8, 4)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    window_sizes: list[int] | tuple[int, ...] = (8, 8, 14, 7)
    mlp_ratio: float | int = 4.0
    drop_path_rate: float | int = 0.2
    layer_scale_init_value: float | int | None = None
    conv_layer_scale_init_value: float | int | None = None
    state_size: int = 8
    conv_kernel: int = 3
    dt_init: str = "published"
    scan_backend: str = "auto"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    projection_dim: int = 512
    batch_norm_folded: bool = False

    def __post_init__(self, **kwargs):
        for name in ("depths", "num_heads", "window_sizes"):  # JSON has lists only
            setattr(self, name, tuple(getattr(self, name)))
        super().__post_init__(**kwargs)

    @property
    def stage_sizes(self):
        """Width of each stage."""
        return tuple(self.hidden_size * 2**stage for stage in range(NUM_STAGES))

    @property
    def num_hidden_layers(self):
        """Stages: what `hidden_states` has one of, after the stem's."""
        return len(self.depths)

    def for_image_size(self, image_size):
        """A copy for another resolution, whose hybrid windows divide their maps, so that nothing is padded.

        Of the map's divisors each stage takes the one nearest to its present window, by ratio. Weights stay valid.

        Args:
            image_size (`int`): Pixels a side, square.

        Returns:
            [`DMCLIPVisionConfig`]

        Example:
            >>> DMCLIPVisionConfig().for_image_size(384).window_sizes
            (8, 8, 12, 6)
        """
        config = copy.deepcopy(self)
        windows = list(self.window_sizes)
        for stage in range(NUM_CONV_STAGES, NUM_STAGES):
            places = math.ceil(image_size / (STEM_STRIDE * 2**stage))
            divisors = [size for size in range(1, places + 1) if places % size == 0]
            windows[stage] = min(divisors, key=lambda size: abs(math.log(size / self.window_sizes[stage])))
        config.image_size, config.window_sizes = image_size, tuple(windows)
        return config

    def validate_architecture(self):
        for name in ("depths", "num_heads", "window_sizes"):
            entries = getattr(self, name)
            if len(entries) != NUM_STAGES or min(entries) < 1:
                raise ValueError(f"{name}: expected {NUM_STAGES} positive entries, one per stage, got {entries}.")
        for stage in range(NUM_CONV_STAGES, NUM_STAGES):
            width, heads = self.hidden_size * 2**stage, self.num_heads[stage]
            if width % heads:
                raise ValueError(f"num_heads: expected a divisor of stage {stage}'s width {width}, got {heads}.")
        check_sizes(self)
        for name, most in (("stem_dim", 2**14), ("state_size", 2**12), ("conv_kernel", 63)):
            check_number(name, getattr(self, name), 1, most)
        for name in ("depths", "num_heads", "window_sizes"):
            for entry in getattr(self, name):
                check_number(name, entry, 1, 1000)
        check_number("mlp_ratio", self.mlp_ratio, 0, 100, above=True)
        for name in ("layer_scale_init_value", "conv_layer_scale_init_value"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), -1e6, 1e6)
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel: expected an odd number, got {self.conv_kernel}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: expected a probability in [0, 1), got {self.drop_path_rate}.")
        check_choice("dt_init", self.dt_init, DT_INITS)
        check_choice("scan_backend", self.scan_backend, SCAN_BACKENDS)
        gains = (self.layer_scale_init_value, self.conv_layer_scale_init_value)
        if self.batch_norm_folded and gains != (None, None):
            raise ValueError(f"batch_norm_folded: expected no layer scales beside it, got {gains}. Use `fuse()`.")


@strict
class DMCLIPTextConfig(CLIPTextConfig):
    """The text tower: CLIP's, but bidirectional, with exact GELU. The defaults are MobileCLIP-S1's.

    Source: [MC]; [M]; docs/papers.md. Deviation: `mask_padding` is ours.

    Args:
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Of the MLPs.
        pad_token_id (`int`, *optional*, defaults to 0): What every place after EOS holds, whatever the tokenizer pads
            with.
        mask_padding (`bool`, *optional*, defaults to `False`): `False` is MobileCLIP's: every text is padded to
            `max_position_embeddings`, and padding is attended to as any token. `True`: padding is masked, and texts
            cost what their length does; not for weights that were trained without.
        kwargs: Every field of [`~transformers.CLIPTextConfig`], same meaning and defaults.

    Raises:
        StrictDataclassError: If `eos_token_id` or `pad_token_id` is not one id.

    Example:
        >>> DMCLIPTextConfig().num_hidden_layers, DMCLIPTextConfig().max_position_embeddings
        (12, 77)
    """

    model_type = "dmclip_text"
    base_config_key = "text_config"

    hidden_act: str = "gelu"
    pad_token_id: int | None = 0
    mask_padding: bool = False

    def validate_architecture(self):
        check_sizes(self)
        super().validate_architecture()
        for name in ("eos_token_id", "pad_token_id"):
            token_id = getattr(self, name)
            if not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"{name}: expected one token id, got {token_id}.")


@strict
class DMCLIPConfig(PreTrainedConfig):
    """The dual encoder: [`DMCLIPVisionConfig`] beside [`DMCLIPTextConfig`].

    Source: [M]; docs/papers.md. Deviation: none.

    Args:
        text_config (`dict` or `DMCLIPTextConfig`, *optional*): The text tower. Defaults to MobileCLIP-S1's.
        vision_config (`dict` or `DMCLIPVisionConfig`, *optional*): The image tower. Defaults to preset T.
        projection_dim (`int`, *optional*, defaults to 512): Width of the shared space; both towers get it.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592): Log of the similarity's multiplier.
        freeze_text (`bool`, *optional*, defaults to `False`): The text tower gets no gradient and stays in eval mode,
            whatever `.train()` says. Saved with the model.

    Example:
        >>> DMCLIPConfig(vision_config=DMCLIP_PRESETS["B"]).vision_config.hidden_size
        128
    """

    model_type = "dmclip"
    sub_configs = {"text_config": DMCLIPTextConfig, "vision_config": DMCLIPVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    freeze_text: bool = False

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            merged = merge_sub_config(getattr(self, name), None, config_class, projection_dim=self.projection_dim)
            setattr(self, name, merged)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        check_sizes(self)


DMCLIPVisionConfig.register_for_auto_class()
DMCLIPTextConfig.register_for_auto_class()
DMCLIPConfig.register_for_auto_class()
