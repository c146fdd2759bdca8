"""DM-CLIP's text tower: MobileCLIP-S1's, which reads a text in both directions.

Source: [MC] MobileCLIP, arXiv 2311.17049; docs/papers.md. Letters in shape comments: B batch, T tokens, D embedding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPEncoder, CLIPTextEmbeddings
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dmclip import DMCLIPTextConfig
from .modeling_dclip import InitialisedAsInTree, set_auto_map, truncate_text


@dataclass
class DMCLIPTextModelOutput(ModelOutput):
    """What [`DMCLIPTextModel`] returns; T is the tower's length, or with `mask_padding` the input's.

    Args:
        text_embeds (`torch.Tensor` of shape `(B, D)`): Projected, not normalised.
        last_hidden_state (`torch.Tensor` of shape `(B, T, hidden_size)`): After the last LayerNorm.
        pooler_output (`torch.Tensor` of shape `(B, hidden_size)`): Its state at EOS: what the projection reads.
        hidden_states (`tuple`, *optional*): With `output_hidden_states=True`; input of the first layer first.
        attentions (`tuple`, *optional*): With `output_attentions=True` and eager attention; `(B, heads, T, T)`.
    """

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class DMCLIPTextModel(InitialisedAsInTree, CLIPTextModel):
    """Text in, one embedding of the shared space out: CLIP's layers without the causal mask.

    MobileCLIP's tower sees every text padded to its full length with token 0, padding attended to. What comes in is
    brought to that form, so that the tokenizer's padding makes no difference; with `config.mask_padding` it is masked.

    Source: docs/papers.md, text encoder. Deviation: `mask_padding`, off by default.

    Example:
        >>> config = DMCLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> DMCLIPTextModel(config)(torch.tensor([[49406, 320, 49407]])).text_embeds.shape
        torch.Size([1, 512])
    """

    config: DMCLIPTextConfig
    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^logit_scale$"]

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        """CLIP's own deviations, of which transformers swaps those of attention's inner and outer projections."""
        super()._init_weights(module)
        width, factor = self.config.hidden_size, self.config.initializer_factor
        inner, residual = factor * width**-0.5, factor * (2 * width * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, CLIPTextEmbeddings):
            init.normal_(module.position_embedding.weight, std=factor * 0.01)
        elif isinstance(module, CLIPAttention):
            for layer in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(layer.weight, std=inner)
            init.normal_(module.out_proj.weight, std=residual)
        elif isinstance(module, CLIPMLP):
            init.normal_(module.fc1.weight, std=factor * (2 * width) ** -0.5)
            init.normal_(module.fc2.weight, std=residual)
        elif module is self:
            init.normal_(self.projection.weight, std=inner)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with the code beside the weights."""
        set_auto_map(self, "AutoModel")
        super().save_pretrained(save_directory, **kwargs)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, input_ids=None, attention_mask=None, **kwargs: Unpack[TransformersKwargs]):
        """Embed texts; one longer than the tower is cut, keeping EOS.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Token ids, any `T`. What follows a row's first EOS is
                padding; a row without EOS is read to its end, and its last token stands for it.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 = padding too.

        Returns:
            [`DMCLIPTextModelOutput`]

        Raises:
            ValueError: If there are no ids, or places are given: a text starts at the tower's first one.
        """
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError(
                "DM-CLIP's text encoder needs `input_ids` of shape (B, T), got "
                f"{None if input_ids is None else tuple(input_ids.shape)}."
            )
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError(
                "position_ids: expected None, for a text starts at the first place; got ids. Leave them out."
            )
        input_ids, attention_mask = truncate_text(
            input_ids,
            attention_mask,
            max_length=self.config.max_position_embeddings,
            eos_token_id=self.config.eos_token_id,
        )
        input_ids, attention_mask, eos_places = self._pad(input_ids, attention_mask)
        hidden_states = self.embeddings(input_ids=input_ids)
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        hidden_states = self.encoder(hidden_states, attention_mask, **kwargs).last_hidden_state
        hidden_states = self.final_layer_norm(hidden_states)
        pooled = hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), eos_places]
        return DMCLIPTextModelOutput(
            text_embeds=self.projection(pooled), last_hidden_state=hidden_states, pooler_output=pooled
        )

    def _pad(self, input_ids, attention_mask):
        """`(ids, mask or None, place of EOS)`, the ids with the tower's own padding."""
        length = input_ids.shape[1]
        is_eos = input_ids == self.config.eos_token_id
        eos_places = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), length - 1)  # (B,)
        is_real = torch.arange(length, device=input_ids.device) <= eos_places[:, None]
        if attention_mask is not None:
            is_real = is_real & (attention_mask != 0)
        input_ids = torch.where(is_real, input_ids, self.config.pad_token_id)
        if self.config.mask_padding:
            return input_ids, is_real, eos_places
        missing = self.config.max_position_embeddings - length
        return F.pad(input_ids, (0, missing), value=self.config.pad_token_id), None, eos_places


DMCLIPTextModel.register_for_auto_class("AutoModel")
