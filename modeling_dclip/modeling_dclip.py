"""The DCLIP student: CLIP's dual encoder, loadable from any stock CLIP checkpoint.

Source: "Distill CLIP: Enhancing Image-Text Retrieval via Cross-Modal Transformer Distillation", arXiv 2505.21549;
docs/papers.md. Letters in shape comments: B batch, P patches, D embedding, T tokens, H W pixels.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionEmbeddings, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .configuration_dclip import DCLIPConfig, DCLIPVisionConfig

logger = logging.get_logger(__name__)

LEGACY_EOS_TOKEN_ID = 2  # in configs written before transformers 4.31; the tower then takes the highest id as EOS


@dataclass
class DCLIPVisionModelOutput(ModelOutput):
    """What [`DCLIPVisionModel`] returns.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): Projected, not normalised.
        last_hidden_state (`torch.Tensor` of shape `(B, 1 + P, hidden_size)`): Class token first.
        pooler_output (`torch.Tensor` of shape `(B, hidden_size)`): The class token after the last LayerNorm.
        hidden_states (`tuple`, *optional*): With `output_hidden_states=True`; input of the first layer first.
        attentions (`tuple`, *optional*): With `output_attentions=True` and eager attention;
            `(B, heads, 1 + P, 1 + P)`.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def set_auto_map(model, *auto_classes):
    """Name this code in the model's config, so that a saved folder loads through every one of `auto_classes`.

    `register_for_auto_class` holds one Auto class only; the others have to stand in the config before it is saved.
    """

    def reference(thing):
        return f"{type(thing).__module__.split('.')[-1]}.{type(thing).__name__}"

    model.config.auto_map = {"AutoConfig": reference(model.config), **dict.fromkeys(auto_classes, reference(model))}


def truncate_text(input_ids, attention_mask=None, *, max_length, eos_token_id):
    """Cut token ids to what the text tower holds, so that every row still ends in EOS.

    A row whose EOS lies beyond the cut gets it at the last place; CLIP reads the sentence there.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`): Token ids.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 = real; cut alike.
        max_length (`int`): Positions the tower has.
        eos_token_id (`int`): The config's. 2 is CLIP's old convention: the highest id of a row is its EOS.

    Returns:
        `tuple`: `(input_ids, attention_mask)`, the very objects given where nothing is too long.

    Example:
        >>> truncate_text(torch.tensor([[7, 3, 4, 5, 9]]), max_length=3, eos_token_id=9)[0].tolist()
        [[7, 3, 9]]
    """
    if input_ids is None or input_ids.shape[-1] <= max_length:
        return input_ids, attention_mask
    logger.warning_once(
        f"A text has more than the {max_length} tokens the text encoder reads: it is cut there, its end token kept. "
        "Said once; others are cut alike."
    )
    kept = input_ids[:, :max_length].clone()
    if eos_token_id == LEGACY_EOS_TOKEN_ID:
        eos = input_ids.max(dim=-1).values
    else:
        eos = torch.full_like(input_ids[:, 0], eos_token_id)
    lost_eos = (kept != eos[:, None]).all(dim=-1)
    kept[:, -1] = torch.where(lost_eos, eos, kept[:, -1])
    return kept, None if attention_mask is None else attention_mask[:, :max_length]


def axial_rotary_embedding(rows, columns, head_dim, base, device=None, *, scale=1.0, centred=False):
    """Angles of a 2-D axial rotary embedding for a class token followed by a grid of patches.

    The first half of a head rotates with the row, the second with the column; pairs are (i, i + head_dim / 4) inside
    each half. The class token gets angle 0: it is not rotated.

    Args:
        rows (`int`): Patches down.
        columns (`int`): Patches across.
        head_dim (`int`): Divisible by 4.
        base (`float`): Frequencies are `scale * base ** (-4 i / head_dim)` radians a patch, `i < head_dim / 4`.
        device (`torch.device`, *optional*): Where to make them.
        scale (`float`, *optional*, defaults to 1.0): The fastest rotation, radians a patch.
        centred (`bool`, *optional*, defaults to `False`): Count places from the middle of the grid, not from its first
            patch. Patches see each other as before; the class token, which is not rotated, sees them turned less.

    Returns:
        `tuple`: `(cos, sin)`, each float32 `(1 + rows * columns, head_dim)`.

    Example:
        >>> axial_rotary_embedding(2, 3, 8, 100.0)[0].shape
        torch.Size([7, 8])
    """
    quarter = head_dim // 4
    frequencies = scale * base ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    row = torch.arange(rows, device=device, dtype=torch.float32)
    column = torch.arange(columns, device=device, dtype=torch.float32)
    if centred:
        row, column = row - (rows - 1) / 2, column - (columns - 1) / 2
    row, column = row.repeat_interleave(columns), column.repeat(rows)
    row_angles, column_angles = row[:, None] * frequencies, column[:, None] * frequencies  # (P, head_dim / 4)
    angles = torch.cat([row_angles, row_angles, column_angles, column_angles], dim=-1)
    angles = torch.cat([angles.new_zeros(1, head_dim), angles])  # class token first
    return angles.cos(), angles.sin()


def rotate_axial(states, cos, sin):
    """Apply [`axial_rotary_embedding`] to queries or keys `(B, heads, 1 + P, head_dim)`, in float32."""
    a, b, c, d = states.float().chunk(4, dim=-1)
    turned = torch.cat([-b, a, -d, c], dim=-1)
    return (states.float() * cos + turned * sin).to(states.dtype)


class DCLIPRotaryAttention(CLIPAttention):
    """CLIP's attention with queries and keys rotated by their place in the grid."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries = rotate_axial(self.q_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        keys = rotate_axial(self.k_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        values = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        attended, weights = attention(
            self, queries, keys, values, attention_mask, scaling=self.scale, dropout=dropout, **kwargs
        )
        return self.out_proj(attended.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class DCLIPRotaryEmbeddings(CLIPVisionEmbeddings):
    """CLIP's patch embedding beside rotary positions.

    With `config.rotary_table` it has the whole table, interpolated to the input's grid; without, its class row and its
    patches' mean, that is no places.
    """

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        # `interpolate_pos_encoding` is moot here: the table is interpolated where it is kept.
        if self.config.rotary_table:
            return super().forward(pixel_values, interpolate_pos_encoding=True)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        offsets = self.position_embedding.weight
        class_token = (self.class_embedding + offsets[0]).expand(len(patches), 1, -1)
        return torch.cat([class_token, patches + offsets[1:].mean(dim=0)], dim=1)


class InitialisedAsInTree:
    """Draw weights as transformers draws those of its own models.

    For models from outside, it skips modules without parameters of their own, in case `_init_weights` overwrites
    loaded ones. CLIP's does not (it goes through `transformers.initialization`), and it draws attention, MLP and
    projections exactly at such modules: skipped, they would all get one deviation of 0.02.
    """

    @classmethod
    def is_custom_code(cls):
        return False


class DCLIPVisionTransformer(InitialisedAsInTree, CLIPVisionModel):
    """CLIP's vision tower, under CLIP's keys, with the choice of rotary positions.

    Source: docs/papers.md, ViT-L extras. Deviation: with `"rope"` the learned table stays, or keeps its
    place-independent part.
    """

    config: DCLIPVisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config):
        super().__init__(config)
        if config.position_embedding_type == "rope":
            self.embeddings = DCLIPRotaryEmbeddings(config)
            for layer in self.encoder.layers:
                layer.self_attn = DCLIPRotaryAttention(config)
            self.post_init()

    def forward(self, pixel_values=None, interpolate_pos_encoding=False, **kwargs: Unpack[TransformersKwargs]):
        if pixel_values is None:
            raise ValueError("DCLIP's image encoder needs `pixel_values` of shape (B, channels, H, W), got None.")
        height, width = pixel_values.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"Image size: expected multiples of the patch ({patch} pixels), got {height} x {width}.")
        if self.config.position_embedding_type == "rope":
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            kwargs["position_embeddings"] = axial_rotary_embedding(
                *(height // patch, width // patch, head_dim, self.config.rotary_base, pixel_values.device),
                scale=self.config.rotary_scale,
                centred=self.config.rotary_table,
            )
        return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)


class DCLIPVisionModel(InitialisedAsInTree, CLIPVisionModelWithProjection):
    """The student alone: one image in, one embedding of the shared space out.

    Its keys are those of the tower inside [`DCLIPModel`], so `from_pretrained` takes a vision-only folder, a dual
    DCLIP one or a stock CLIP one.

    Source: docs/papers.md, student. Deviation: none.

    Example:
        >>> small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> DCLIPVisionModel(DCLIPVisionConfig(**small))(torch.zeros(1, 3, 224, 224)).image_embeds.shape
        torch.Size([1, 512])
    """

    config: DCLIPVisionConfig
    base_model_prefix = "vision_model"
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.vision_model = DCLIPVisionTransformer._from_config(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with the code beside the weights."""
        set_auto_map(self, "AutoModel")
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(self, pixel_values=None, interpolate_pos_encoding=False, **kwargs: Unpack[TransformersKwargs]):
        """Embed images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, channels, H, W)`): Normalised with CLIP's mean and deviation;
                `H` and `W` multiples of the patch.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): Resize absolute positions to the
                input; without it another size than the config's raises. With rotary positions any size works.

        Returns:
            [`DCLIPVisionModelOutput`]

        Raises:
            ValueError: If the size is no multiple of the patch, or differs from the config's uninterpolated.
        """
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        return DCLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.pooler_output,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DCLIPModel(InitialisedAsInTree, CLIPModel):
    """The dual encoder: the student beside CLIP's text tower, under CLIP's keys.

    `from_pretrained` takes a stock `CLIPModel` checkpoint with no missing and no unexpected key, and the outputs are
    then bit-equal to CLIP's. With `config.freeze_text` the text tower and its projection stay without gradient and in
    eval mode through saving, loading, `.train()` and `accelerate.prepare`; to train them set it to `False` before the
    model is built.

    Source: docs/papers.md, student. Deviation: none.

    Example:
        >>> small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = DCLIPModel(DCLIPConfig(text_config=small, vision_config=small)).train()
        >>> model.vision_model.training, model.text_model.training
        (True, False)
    """

    config: DCLIPConfig
    base_model_prefix = "dclip"
    # In half precision the multiplier (about 100) would be off by up to 0.4, which moves every logit.
    _keep_in_fp32_modules_strict = ["logit_scale"]

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.projection_dim = config.projection_dim
        self.text_embed_dim = config.text_config.hidden_size
        self.vision_embed_dim = config.vision_config.hidden_size
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.vision_model = DCLIPVisionTransformer._from_config(config.vision_config)
        self.visual_projection = nn.Linear(self.vision_embed_dim, self.projection_dim, bias=False)
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value, dtype=torch.float32))
        self.post_init()
        self.train(self.training)  # freezes

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with the code beside the weights."""
        set_auto_map(self, "AutoModel", "AutoModelForZeroShotImageClassification")
        super().save_pretrained(save_directory, **kwargs)

    def train(self, mode=True):
        """Set the mode of everything that is not frozen. Loading ends here too, so freezing survives it."""
        super().train(mode)
        if self.config.freeze_text:
            for module in (self.text_model, self.text_projection):
                module.eval().requires_grad_(False)
        return self

    @can_return_tuple
    def get_text_features(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        """CLIP's text embedding; a text longer than the tower is cut, keeping EOS, instead of raising.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Token ids, any `T`.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 = real.
            position_ids (`torch.Tensor` of shape `(1 or B, T)`, *optional*): Cut to the tower's length too.

        Returns:
            `BaseModelOutputWithPooling`: Its `pooler_output` `(B, D)` is the projected embedding, not normalised.
        """
        max_length = self.config.text_config.max_position_embeddings
        input_ids, attention_mask = truncate_text(
            input_ids, attention_mask, max_length=max_length, eos_token_id=self.config.text_config.eos_token_id
        )
        if position_ids is not None:
            position_ids = position_ids[:, :max_length]
        outputs: BaseModelOutputWithPooling = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs


DCLIPVisionModel.register_for_auto_class("AutoModel")
DCLIPModel.register_for_auto_class("AutoModel")
