"""DM-CLIP: a MambaVision image encoder, and the dual encoder around it.

Source: [M] "Knowledge Distillation from Transformer to Mamba for an efficient CLIP"; [MV] MambaVision, arXiv
2407.08083; docs/papers.md. Letters in shape comments: B batch, W windows of all images, P places of a window,
C channels, N state, H' W' map.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_dmclip import NUM_CONV_STAGES, DMCLIPConfig, DMCLIPVisionConfig
from .modeling_dclip import InitialisedAsInTree, set_auto_map
from .modeling_dmclip_text import DMCLIPTextModel
from .selective_scan import selective_scan

STEM_NORM_EPS = 1e-4
BATCH_NORM_EPS = 1e-5
DT_RANGE = (1e-3, 0.1)  # Mamba's initial step sizes


@dataclass
class DMCLIPVisionModelOutput(ModelOutput):
    """What [`DMCLIPVisionModel`] returns.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): Projected, not normalised.
        last_hidden_state (`torch.Tensor` of shape `(B, C, H', W')`): The last map after its BatchNorm, a 32nd of the
            input.
        pooler_output (`torch.Tensor` of shape `(B, C)`): Its mean over places: what the projection reads.
        hidden_states (`tuple`, *optional*): With `output_hidden_states=True`: the stem's map, then each stage's,
            before it is downsampled; the last before its BatchNorm.
        attentions (`tuple`, *optional*): With `output_attentions=True` and eager attention; `(W, heads, P, P)` a
            layer.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def partition_windows(hidden_states, size):
    """Cut maps into square windows; zeros fill the right and bottom ones up.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, C, H', W')`): Maps.
        size (`int`): Places a side of a window.

    Returns:
        `torch.Tensor` of shape `(W, size * size, C)`: Contiguous; windows and places in row-major order, image by
            image.

    Example:
        >>> partition_windows(torch.ones(2, 5, 6, 4), 4).shape
        torch.Size([4, 16, 5])
    """
    height, width, channels = hidden_states.shape[2], hidden_states.shape[3], hidden_states.shape[1]
    down, right = -height % size, -width % size
    if down or right:
        hidden_states = F.pad(hidden_states, (0, right, 0, down))
    rows, columns = (height + down) // size, (width + right) // size
    hidden_states = hidden_states.permute(0, 2, 3, 1).reshape(-1, rows, size, columns, size, channels)
    return hidden_states.transpose(2, 3).reshape(-1, size * size, channels).contiguous()


def merge_windows(hidden_states, size, height, width):
    """Put windows back and cut off what filled them up: the inverse of [`partition_windows`].

    Args:
        hidden_states (`torch.Tensor` of shape `(W, size * size, C)`): Windows.
        size (`int`): Places a side of a window.
        height (`int`): Of the map.
        width (`int`): Of the map.

    Returns:
        `torch.Tensor` of shape `(B, C, height, width)`: Channels last in memory.

    Example:
        >>> maps = torch.arange(48.0).view(2, 1, 6, 4)
        >>> torch.equal(merge_windows(partition_windows(maps, 4), 4, 6, 4), maps)
        True
    """
    rows, columns, channels = -(-height // size), -(-width // size), hidden_states.shape[-1]
    hidden_states = hidden_states.view(-1, rows, columns, size, size, channels).transpose(2, 3)
    hidden_states = hidden_states.reshape(-1, rows * size, columns * size, channels)[:, :height, :width]
    return hidden_states.permute(0, 3, 1, 2)


class DMCLIPDropPath(nn.Module):
    """In training, leaves a branch out per row (image, or window of one) and scales what stays."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states):
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = 1.0 - self.rate
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.dim() - 1)
        kept = torch.rand(shape, dtype=torch.float32, device=hidden_states.device) < keep
        return hidden_states * (kept / keep).to(hidden_states.dtype)

    def extra_repr(self):
        return f"rate={self.rate}"


def _batch_norm(config, channels, eps=BATCH_NORM_EPS):
    return nn.Identity() if config.batch_norm_folded else nn.BatchNorm2d(channels, eps=eps)


class DMCLIPStem(nn.Module):
    """Pixels to the first map, a fourth of the size."""

    def __init__(self, config):
        super().__init__()
        folded = config.batch_norm_folded
        self.conv1 = nn.Conv2d(config.num_channels, config.stem_dim, 3, stride=2, padding=1, bias=folded)
        self.norm1 = _batch_norm(config, config.stem_dim, STEM_NORM_EPS)
        self.conv2 = nn.Conv2d(config.stem_dim, config.hidden_size, 3, stride=2, padding=1, bias=folded)
        self.norm2 = _batch_norm(config, config.hidden_size, STEM_NORM_EPS)

    def forward(self, pixel_values):
        hidden_states = F.relu(self.norm1(self.conv1(pixel_values.to(self.conv1.weight.dtype))))
        return F.relu(self.norm2(self.conv2(hidden_states)))


class DMCLIPConvBlock(GradientCheckpointingLayer):
    """Two convolutions around a tanh-form GELU, added to the input."""

    def __init__(self, config, width, drop_path_rate):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = _batch_norm(config, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = _batch_norm(config, width)
        self.scale_init_value = config.conv_layer_scale_init_value
        self.gamma = None if self.scale_init_value is None else nn.Parameter(torch.ones(width))
        self.drop_path = DMCLIPDropPath(drop_path_rate)

    def forward(self, hidden_states, **kwargs):
        branch = F.gelu(self.norm1(self.conv1(hidden_states)), approximate="tanh")
        branch = self.norm2(self.conv2(branch))
        if self.gamma is not None:
            branch = branch * self.gamma[:, None, None]
        return hidden_states + self.drop_path(branch)


class DMCLIPMambaMixer(nn.Module):
    """Half of the channels through a selective scan, the other half past it.

    `conv1d` holds both published convolutions, the scanned half's rows first.

    Source: [MV]; docs/papers.md. Deviation: none; `dt_proj.bias` is added twice, as trained weights rely on.
    """

    # Decay would pull the rates and the skip towards 0, which is no neutral place for them.
    no_weight_decay = ("A_log", "D")

    def __init__(self, config, width):
        super().__init__()
        self.config = config
        inner, self.state_size, self.dt_rank = width // 2, config.state_size, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv1d = nn.Conv1d(width, width, config.conv_kernel, padding="same", groups=width, bias=False)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, self.state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, **kwargs):
        channels = F.silu(self.conv1d(self.in_proj(hidden_states).transpose(1, 2)))  # (W, C, P)
        scanned, passed = channels.chunk(2, dim=1)
        steps, entering, leaving = self.x_proj(scanned.transpose(1, 2)).split(
            [self.dt_rank, self.state_size, self.state_size], dim=-1
        )
        bias = self.dt_proj.bias
        if bias.is_meta:  # offloaded until its module runs: what that makes of nothing
            bias = self.dt_proj(steps.new_zeros(self.dt_rank))
        scanned = selective_scan(
            scanned,
            self.dt_proj(steps).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            entering.transpose(1, 2),
            leaving.transpose(1, 2),
            self.D.float(),
            delta_bias=bias.float(),
            delta_softplus=True,
            backend=self.config.scan_backend,
        )
        return self.out_proj(torch.cat([scanned, passed], dim=1).transpose(1, 2)), None


class DMCLIPAttention(nn.Module):
    """Multi-head attention among the places of a window, without a position term."""

    def __init__(self, config, width, num_heads):
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, width // num_heads
        self.is_causal = False
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states, **kwargs):
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))  # (W, P, 3, heads, head_dim)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attention(self, queries, keys, values, None, scaling=self.head_dim**-0.5, **kwargs)
        return self.proj(attended.reshape(hidden_states.shape)), weights


class DMCLIPMLP(nn.Module):
    """Two layers around an exact GELU."""

    def __init__(self, config, width):
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * config.mlp_ratio))
        self.fc2 = nn.Linear(int(width * config.mlp_ratio), width)

    def forward(self, hidden_states):
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class DMCLIPHybridBlock(GradientCheckpointingLayer):
    """A token mixer and an MLP, each normalised before and added to its input."""

    def __init__(self, config, width, mixer, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = DMCLIPMLP(config, width)
        self.scale_init_value = config.layer_scale_init_value
        self.gamma_1 = None if self.scale_init_value is None else nn.Parameter(torch.ones(width))
        self.gamma_2 = None if self.scale_init_value is None else nn.Parameter(torch.ones(width))
        self.drop_path = DMCLIPDropPath(drop_path_rate)

    def forward(self, hidden_states, **kwargs):
        mixed, _ = self.mixer(self.norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        mixed = self.mlp(self.norm2(hidden_states))
        return hidden_states + self.drop_path(mixed if self.gamma_2 is None else self.gamma_2 * mixed)


class DMCLIPStage(nn.Module):
    """Blocks at one resolution, and the convolution that leads to the next."""

    def __init__(self, config, stage, drop_path_rates):
        super().__init__()
        width, depth, num_heads = config.stage_sizes[stage], config.depths[stage], config.num_heads[stage]
        self.window_size = config.window_sizes[stage] if stage >= NUM_CONV_STAGES else None
        if self.window_size is None:
            blocks = [DMCLIPConvBlock(config, width, rate) for rate in drop_path_rates]
        else:
            first_attention = depth - depth // 2
            blocks = [
                DMCLIPHybridBlock(
                    config,
                    width,
                    DMCLIPMambaMixer(config, width)
                    if block < first_attention
                    else DMCLIPAttention(config, width, num_heads),
                    rate,
                )
                for block, rate in enumerate(drop_path_rates)
            ]
        self.blocks = nn.ModuleList(blocks)
        last = stage == len(config.depths) - 1
        self.downsample = None if last else nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)

    def forward(self, hidden_states, **kwargs):
        """`(map of the next stage, own map)`; the same map twice from the last."""
        height, width = hidden_states.shape[-2:]
        if self.window_size is not None:
            hidden_states = partition_windows(hidden_states, self.window_size)
        for block in self.blocks:
            hidden_states = block(hidden_states, **kwargs)
        if self.window_size is not None:
            hidden_states = merge_windows(hidden_states, self.window_size, height, width)
        return hidden_states if self.downsample is None else self.downsample(hidden_states), hidden_states


class DMCLIPVisionModel(InitialisedAsInTree, PreTrainedModel):
    """The image encoder alone: one image in, one embedding of the shared space out.

    `from_pretrained` takes its own folder or a dual DM-CLIP one. Images of any size go in. For speed see
    [`~DMCLIPVisionModel.fuse`], `config.for_image_size`, bfloat16 weights and `torch.compile`.

    Source: [MV]; docs/papers.md, MambaVision. Deviation: none.

    Example:
        >>> config = DMCLIPVisionConfig(hidden_size=8, stem_dim=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 2))
        >>> DMCLIPVisionModel(config)(torch.zeros(1, 3, 64, 48)).image_embeds.shape
        torch.Size([1, 512])
    """

    config: DMCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["DMCLIPStem", "DMCLIPConvBlock", "DMCLIPHybridBlock"]
    # The scan runs in float32, and rates of 1 to 8 rounded to 8 bits would be other rates.
    _keep_in_fp32_modules_strict = ["A_log", "D"]
    _can_record_outputs = {"hidden_states": OutputRecorder(DMCLIPStage, index=1), "attentions": DMCLIPAttention}
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^logit_scale$"]

    def __init__(self, config):
        super().__init__(config)
        self.stem = DMCLIPStem(config)
        num_blocks = sum(config.depths)
        rates = [config.drop_path_rate * block / max(1, num_blocks - 1) for block in range(num_blocks)]
        firsts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
        self.stages = nn.ModuleList(
            DMCLIPStage(config, stage, rates[first : first + depth])
            for stage, (first, depth) in enumerate(zip(firsts, config.depths, strict=True))
        )
        self.norm = nn.BatchNorm2d(config.stage_sizes[-1], eps=BATCH_NORM_EPS)
        self.projection = nn.Linear(config.stage_sizes[-1], config.projection_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):  # PyTorch's own draw
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, DMCLIPMambaMixer):
            self._init_mixer(module)
        elif isinstance(module, (DMCLIPConvBlock, DMCLIPHybridBlock)):
            for gain in module.parameters(recurse=False):
                init.constant_(gain, module.scale_init_value)
        else:
            super()._init_weights(module)  # norms

    def _init_mixer(self, mixer):
        rates = torch.arange(1, mixer.state_size + 1, dtype=torch.float32, device=mixer.A_log.device)
        init.copy_(mixer.A_log, rates.log().expand_as(mixer.A_log))
        init.ones_(mixer.D)
        if self.config.dt_init == "mamba":
            bound = mixer.dt_rank**-0.5
            init.uniform_(mixer.dt_proj.weight, -bound, bound)
            low, high = (math.log(value) for value in DT_RANGE)
            steps = torch.empty_like(mixer.dt_proj.bias, dtype=torch.float32).uniform_(low, high).exp()
            # Inverse softplus; halved, for the bias is added twice.
            init.copy_(mixer.dt_proj.bias, (steps + (-torch.expm1(-steps)).log()) / 2)

    def get_input_embeddings(self):
        """The first convolution."""
        return self.stem.conv1

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with the code beside the weights."""
        set_auto_map(self, "AutoModel")
        super().save_pretrained(save_directory, **kwargs)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values=None, **kwargs: Unpack[TransformersKwargs]):
        """Embed images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, channels, H, W)`): Normalised with CLIP's mean and deviation;
                any size. Channels last in memory is welcome.

        Returns:
            [`DMCLIPVisionModelOutput`]

        Raises:
            ValueError: If there are no pixels, or not of four dimensions and the config's channels.
        """
        if pixel_values is None or pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"DM-CLIP's image encoder needs `pixel_values` of shape (B, {self.config.num_channels}, H, W), got "
                f"{None if pixel_values is None else tuple(pixel_values.shape)}."
            )
        kwargs.pop("interpolate_pos_encoding", None)  # there are no positions to interpolate
        hidden_states = self.stem(pixel_values)
        for stage in self.stages:
            hidden_states, _ = stage(hidden_states, **kwargs)
        hidden_states = self.norm(hidden_states)
        pooled = hidden_states.mean(dim=(2, 3))
        return DMCLIPVisionModelOutput(
            image_embeds=self.projection(pooled), last_hidden_state=hidden_states, pooler_output=pooled
        )

    @torch.no_grad()
    def fuse(self):
        """A copy for inference: BatchNorms and layer scales are inside the weights beside them.

        Outputs are those of eval mode to rounding. The copy saves and loads as any model. The last BatchNorm stays:
        its output is `last_hidden_state`.

        Returns:
            [`DMCLIPVisionModel`]: In eval mode.

        Example:
            >>> config = DMCLIPVisionConfig(hidden_size=8, stem_dim=4, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 2))
            >>> sum(isinstance(module, nn.BatchNorm2d) for module in DMCLIPVisionModel(config).fuse().modules())
            1
        """
        config = copy.deepcopy(self.config)
        config.layer_scale_init_value = config.conv_layer_scale_init_value = None
        config.batch_norm_folded = True
        state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        for name, module in self.named_modules():
            if isinstance(module, (DMCLIPStem, DMCLIPConvBlock)) and not self.config.batch_norm_folded:
                _fold_norm(state, f"{name}.conv1", f"{name}.norm1", module.norm1.eps)
                _fold_norm(state, f"{name}.conv2", f"{name}.norm2", module.norm2.eps)
            if isinstance(module, DMCLIPConvBlock):
                _fold_gain(state, f"{name}.gamma", f"{name}.conv2")
            elif isinstance(module, DMCLIPHybridBlock):
                mixer = "proj" if isinstance(module.mixer, DMCLIPAttention) else "out_proj"
                _fold_gain(state, f"{name}.gamma_1", f"{name}.mixer.{mixer}")
                _fold_gain(state, f"{name}.gamma_2", f"{name}.mlp.fc2")
        with torch.device("meta"):  # nothing is drawn: every weight comes from here, in its own type and place
            fused = type(self)(config)
        fused.load_state_dict(state, assign=True)
        return fused.eval()


def _scale_rows(state, name, scale):
    """Multiply a layer's outputs by one factor each; computed in float64."""
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in state:
            rows = scale.view(-1, *(1,) * (state[key].dim() - 1))
            state[key] = (state[key].double() * rows).to(state[key].dtype)


def _fold_gain(state, gain, layer):
    if gain in state:
        _scale_rows(state, layer, state.pop(gain).double())


def _fold_norm(state, conv, norm, eps):
    """BatchNorm of eval mode is one factor and one offset a channel: put both into the convolution before it."""
    dtype = state[f"{conv}.weight"].dtype
    weight, bias, mean, variance = (
        state.pop(f"{norm}.{key}").double() for key in ("weight", "bias", "running_mean", "running_var")
    )
    del state[f"{norm}.num_batches_tracked"]
    scale = weight / (variance + eps).sqrt()
    _scale_rows(state, conv, scale)
    offset = bias - mean * scale
    state[f"{conv}.bias"] = (offset + state[f"{conv}.bias"].double() if f"{conv}.bias" in state else offset).to(dtype)


class DMCLIPModel(InitialisedAsInTree, CLIPModel):
    """The dual encoder: MambaVision beside MobileCLIP-S1's text tower, with the interface of [`DCLIPModel`].

    With `config.freeze_text` the text tower stays without gradient and in eval mode through saving, loading,
    `.train()` and `accelerate.prepare`; set it before the model is built.

    Source: docs/papers.md, DM-CLIP. Deviation: none.

    Example:
        >>> vision = {"hidden_size": 8, "stem_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2)}
        >>> text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = DMCLIPModel(DMCLIPConfig(text_config=text, vision_config=vision)).eval()
        >>> model(torch.tensor([[49406, 320, 49407]]), torch.zeros(2, 3, 64, 64)).logits_per_image.shape
        torch.Size([2, 1])
    """

    config: DMCLIPConfig
    base_model_prefix = "dmclip"
    # In half precision the multiplier (about 100) would be off by up to 0.4, which moves every logit.
    _keep_in_fp32_modules_strict = ["logit_scale"]
    _no_split_modules = [*DMCLIPVisionModel._no_split_modules, "CLIPTextEmbeddings", "CLIPEncoderLayer"]

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.text_model = DMCLIPTextModel._from_config(config.text_config)
        self.vision_model = DMCLIPVisionModel._from_config(config.vision_config)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value, dtype=torch.float32))
        self.post_init()
        self.train(self.training)  # freezes

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self:  # the towers initialise themselves
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with the code beside the weights."""
        set_auto_map(self, "AutoModel", "AutoModelForZeroShotImageClassification")
        super().save_pretrained(save_directory, **kwargs)

    def train(self, mode=True):
        """Set the mode of everything that is not frozen. Loading ends here too, so freezing survives it."""
        super().train(mode)
        if self.config.freeze_text:
            self.text_model.eval().requires_grad_(False)
        return self

    @can_return_tuple
    def get_image_features(self, pixel_values=None, interpolate_pos_encoding=False, **kwargs):
        """Embed images of any size; `interpolate_pos_encoding` is moot, for there are no positions.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, channels, H, W)`): As for [`DMCLIPVisionModel`].

        Returns:
            `BaseModelOutputWithPooling`: Its `pooler_output` `(B, D)` is the projected embedding, not normalised.
        """
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        return _with_projected_pooling(outputs, outputs.image_embeds)

    @can_return_tuple
    def get_text_features(self, input_ids=None, attention_mask=None, **kwargs):
        """Embed texts of any length, as [`DMCLIPTextModel`].

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Token ids, any `T`.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 = real.

        Returns:
            `BaseModelOutputWithPooling`: Its `pooler_output` `(B, D)` is the projected embedding, not normalised.
        """
        outputs = self.text_model(input_ids, attention_mask, return_dict=True, **kwargs)
        return _with_projected_pooling(outputs, outputs.text_embeds)

    def fuse(self):
        """A copy for inference, its image encoder in the form of [`~DMCLIPVisionModel.fuse`].

        Returns:
            [`DMCLIPModel`]: In eval mode.
        """
        fused = copy.deepcopy(self).eval()
        fused.vision_model = self.vision_model.fuse()
        fused.config.vision_config = fused.vision_model.config
        return fused


def _with_projected_pooling(outputs, embeds):
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=embeds,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


DMCLIPVisionModel.register_for_auto_class("AutoModel")
DMCLIPModel.register_for_auto_class("AutoModel")
