"""The DCLIP teacher: a frozen dual encoder and a small block that reads image regions and caption tokens together.

Source: "Distill CLIP: Enhancing Image-Text Retrieval via Cross-Modal Transformer Distillation", arXiv 2505.21549;
docs/papers.md. Letters in shape comments: B batch, R regions, T tokens, N items of one or both, K clusters,
D embedding, H W pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_dclip_teacher import DCLIPTeacherConfig, check_family
from .modeling_dclip import LEGACY_EOS_TOKEN_ID, DCLIPModel, InitialisedAsInTree, set_auto_map, truncate_text
from .modeling_dmclip import DMCLIPModel
from .text_reading import READ_AT_END, READ_PADDING, longest_positions

BOX_FEATURES = 8  # x1 y1 x2 y2 width height area score
# By model_type; other families are transformers' own. A stock CLIP becomes a DCLIP, under the same keys.
OWN_MODELS = {"clip": DCLIPModel, "dclip": DCLIPModel, "dmclip": DMCLIPModel}
CLIP_TEXT_TOWERS = ("clip_text_model", "metaclip_2_text_model")  # which give one of any two towers an end token


@dataclass
class DCLIPTeacherOutput(ModelOutput):
    """What [`DCLIPTeacher`] returns. Embeddings are L2-normalised; padding regions are zeros.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Symmetric InfoNCE of `teacher_embeds` and `text_embeds`.
        teacher_embeds (`torch.Tensor` of shape `(B, D)`): The target the student learns. Gradient flows.
        text_embeds (`torch.Tensor` of shape `(B, D)`, *optional*): The frozen CLIP's; None where no text was given.
        region_embeds (`torch.Tensor` of shape `(B, R, D)`): The frozen CLIP's, before weighting.
        region_weights (`torch.Tensor` of shape `(B, R)`): Non-negative, 0 at padding, summing to 1.
        text_to_image_attentions (`torch.Tensor` of shape `(B, heads, T, R)`, *optional*): With
            `output_attentions=True` where tokens attend to regions.
        image_to_text_attentions (`torch.Tensor` of shape `(B, heads, R, T)`, *optional*): Likewise the other way.
        region_attentions (`tuple` of `(B, heads, 1 + R, 1 + R)`, *optional*): Likewise of `"regions"`, a layer each;
            the whole image is item 0.
    """

    loss: torch.Tensor | None = None
    teacher_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    region_embeds: torch.Tensor | None = None
    region_weights: torch.Tensor | None = None
    text_to_image_attentions: torch.Tensor | None = None
    image_to_text_attentions: torch.Tensor | None = None
    region_attentions: tuple[torch.Tensor, ...] | None = None


def symmetric_info_nce(embeds, text_embeds, temperature):
    """Mean cross-entropy of matching rows in both directions.

    Source: docs/papers.md, teacher loss. Deviation: none.

    Args:
        embeds (`torch.Tensor` of shape `(B, D)`): L2-normalised. Gradient flows.
        text_embeds (`torch.Tensor` of shape `(B, D)`): L2-normalised.
        temperature (`float`): > 0.

    Returns:
        `torch.Tensor` of shape `()`: In nats, float32 even under autocast.

    Example:
        >>> round(float(symmetric_info_nce(torch.eye(2), torch.eye(2), 1.0)), 4)
        0.3133
    """
    with torch.autocast(device_type=embeds.device.type, enabled=False):
        logits = embeds.float() @ text_embeds.float().T / temperature
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def weigh_regions(region_mask, boxes=None, scores=None, region_embeds=None, token_embeds=None, token_mask=None):
    """Share of each region in its image: area x detector score x likeness to the caption, summing to 1.

    A factor whose input is None is left out; where the product vanishes everywhere, regions weigh alike.

    Source: docs/papers.md, region weight. Deviation: area as a fraction of the image, likeness clamped at 0.

    Args:
        region_mask (`torch.Tensor` of shape `(B, R)`): True = real.
        boxes (`torch.Tensor` of shape `(B, R, 4)`, *optional*): xyxy as fractions of the image.
        scores (`torch.Tensor` of shape `(B, R)`, *optional*): In [0, 1].
        region_embeds (`torch.Tensor` of shape `(B, R, D)`, *optional*): With `token_embeds` gives the likeness, the
            largest cosine over the caption's tokens.
        token_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*): Any scale.
        token_mask (`torch.Tensor` of shape `(B, T)`, *optional*): True = real.

    Returns:
        `torch.Tensor` of shape `(B, R)`: float32, 0 at padding.
    """
    mask = region_mask.float()
    weights = mask
    if boxes is not None:
        x1, y1, x2, y2 = boxes.float().unbind(-1)
        weights = weights * ((x2 - x1) * (y2 - y1)).clamp(min=0)
    if scores is not None:
        weights = weights * scores.float()
    if token_embeds is not None:
        cosines = (
            F.normalize(region_embeds.float(), dim=-1) @ F.normalize(token_embeds.float(), dim=-1).mT
        )  # (B, R, T)
        cosines = cosines.masked_fill(~token_mask[:, None], -1.0)
        weights = weights * cosines.amax(dim=-1).clamp(min=0)
    total = weights.sum(dim=-1, keepdim=True)
    weights = torch.where(total > 0, weights, mask)
    return weights / weights.sum(dim=-1, keepdim=True)


def attention_pool(items, item_weights, temperature):
    """Pool items by a softmax over their cosine to the mean.

    Source: docs/papers.md, global pooling. Deviation: items carry weights, 0 being a mask.

    Args:
        items (`torch.Tensor` of shape `(..., N, D)`): Any scale. Gradient flows.
        item_weights (`torch.Tensor` of shape `(..., N)`): >= 0; multiplies an item's share in mean and softmax.
        temperature (`float`): > 0.

    Returns:
        `torch.Tensor` of shape `(..., D)`: float32; zeros where every weight is 0.
    """
    items, item_weights = items.float(), item_weights.float()
    empty = (item_weights <= 0).all(dim=-1, keepdim=True)
    safe_weights = torch.where(empty, 1.0, item_weights)  # a softmax over nothing is NaN, its gradient too
    mean = (safe_weights[..., None] * items).sum(dim=-2) / safe_weights.sum(dim=-1, keepdim=True)
    cosines = F.cosine_similarity(items, mean[..., None, :], dim=-1)
    shares = (cosines / temperature + safe_weights.log()).softmax(dim=-1)
    return (shares[..., None] * items).sum(dim=-2).masked_fill(empty, 0.0)


@torch.no_grad()
def assign_clusters(items, item_mask, num_clusters, num_steps):
    """Spherical k-means with a farthest-point start and a fixed number of steps; the same on every run.

    Args:
        items (`torch.Tensor` of shape `(B, N, D)`): Any scale; only directions count. Constant here.
        item_mask (`torch.Tensor` of shape `(B, N)`): True = real.
        num_clusters (`int`): K.
        num_steps (`int`): Updates of the centres.

    Returns:
        `torch.Tensor` of shape `(B, K, N)`: 1 where item n belongs to cluster k. With fewer distinct items than
        clusters, the clusters too many are empty.
    """
    directions = F.normalize(items.float(), dim=-1)
    mask = item_mask[:, None].float()  # (B, 1, N)
    mean = F.normalize(mask @ directions, dim=-1)  # (B, 1, D)
    likeness = (mean @ directions.mT).masked_fill(mask == 0, -math.inf)
    batch = torch.arange(len(items), device=items.device)
    centres = directions[batch, likeness[:, 0].argmax(dim=-1)][:, None]  # the most typical item first
    for _ in range(num_clusters - 1):
        nearest = (centres @ directions.mT).amax(dim=1).masked_fill(~item_mask, math.inf)
        centres = torch.cat([centres, directions[batch, nearest.argmin(dim=-1)][:, None]], dim=1)
    for step in range(num_steps + 1):
        assignment = F.one_hot((centres @ directions.mT).argmax(dim=1), num_clusters).mT.float() * mask  # (B, K, N)
        if step < num_steps:
            sums = assignment @ directions
            centres = torch.where(assignment.any(dim=-1, keepdim=True), F.normalize(sums, dim=-1), centres)
    return assignment


class InputProjection(nn.Linear):
    """Query, key or value projection, drawn as one third of `nn.MultiheadAttention`'s joint one."""


class ReadoutProjection(nn.Linear):
    """Starts at zero, so that what it is added to starts unchanged."""


class MaskedHeads(nn.Module):
    """Multi-head attention over masked keys; the softmax is float32.

    It is written out instead of going through the attention interface: it always knows its weights, which are an
    output, and its few dozen items need no kernel. (No class here is called attention: transformers reads the source,
    and would then refuse to switch the attention of the CLIP inside.)
    """

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = InputProjection(width, width)
        self.k_proj = InputProjection(width, width)
        self.v_proj = InputProjection(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries, keys, key_mask):
        q, k, v = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)
            for projection, states in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, keys))
        )
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~key_mask[:, None, None], -math.inf).softmax(dim=-1)
        attended = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return self.out_proj(attended), weights


class CrossModalLayer(nn.Module):
    """LN(T + MHA(q=T, kv=V)); no MLP, no dropout.

    Source: docs/papers.md, cross-attention. Deviation: padding is masked.
    """

    def __init__(self, config):
        super().__init__()
        self.attention = MaskedHeads(config.projection_dim, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.projection_dim, eps=config.layer_norm_eps)

    def forward(self, states, others, others_mask):
        attended, weights = self.attention(states, others, others_mask)
        return self.norm(states + attended), weights


class RegionLayer(nn.Module):
    """A pre-norm transformer layer over whole image and regions."""

    def __init__(self, config):
        super().__init__()
        width = config.projection_dim
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = MaskedHeads(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.region_feedforward_ratio * width)
        self.fc2 = nn.Linear(config.region_feedforward_ratio * width, width)

    def forward(self, states, mask):
        normed = self.norm1(states)
        attended, weights = self.attention(normed, normed, mask)
        states = states + attended
        return states + self.fc2(F.gelu(self.fc1(self.norm2(states)))), weights


class RegionEncoder(nn.Module):
    """The leak-free teacher's block: whole image, regions and box positions attend to each other.

    What it computes is added to the whole image's CLIP embedding through a projection that starts at zero: the
    untrained teacher *is* CLIP, and training can only add what the regions tell.
    """

    def __init__(self, config):
        super().__init__()
        width = config.projection_dim
        self.box_fc1 = nn.Linear(BOX_FEATURES, width)
        self.box_fc2 = nn.Linear(width, width)
        self.image_type = nn.Parameter(torch.zeros(width))  # tells the whole image from a region as large
        self.layers = nn.ModuleList([RegionLayer(config) for _ in range(config.num_region_layers)])
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.readout = ReadoutProjection(2 * width, width)

    def encode_boxes(self, boxes, scores):
        width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
        features = torch.cat([boxes, torch.stack([width, height, width * height, scores], dim=-1)], dim=-1)
        return self.box_fc2(F.gelu(self.box_fc1(features.to(self.box_fc1.weight.dtype))))

    def forward(self, image_embeds, region_embeds, boxes, scores, mask):
        """Returns the attended items `(B, 1 + R, D)`, whole image first, their mask, and each layer's weights."""
        whole = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(boxes), 1, 4)
        boxes = torch.cat([whole, boxes], dim=1)
        scores = torch.cat([scores.new_ones(len(scores), 1), scores], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        items = torch.cat([image_embeds[:, None], region_embeds], dim=1)
        # Unit vectors of width D have entries of size D ** -0.5; brought to 1, they stand beside the box encoding.
        states = items * math.sqrt(items.shape[-1]) + self.encode_boxes(boxes, scores)
        states = torch.cat([states[:, :1] + self.image_type, states[:, 1:]], dim=1)
        attentions = []
        for layer in self.layers:
            states, weights = layer(states, mask)
            attentions.append(weights)
        return self.norm(states), mask, tuple(attentions)


def _last_places(input_ids, attention_mask):
    """`(B, 1)`: the last real place of each text, its end token's."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return ((attention_mask != 0) * positions).amax(dim=-1, keepdim=True)


def _cut_at_mask(input_ids, attention_mask, max_length):
    """Cut texts to what a text encoder holds, so that each still ends in its last real token."""
    end = _last_places(input_ids, attention_mask)
    kept = input_ids[:, :max_length].clone()
    kept[:, -1:] = torch.where(end >= max_length, input_ids.gather(1, end), kept[:, -1:])
    return kept, None if attention_mask is None else attention_mask[:, :max_length]


def _pool_each(tower, states):
    """What a text encoder makes of the pooled place, made of every place: `(B, T, hidden)` to `(B, T, width)`."""
    pooler, flat = getattr(tower, "pooler", None), states.flatten(0, 1)
    if pooler is None:
        return states
    if isinstance(pooler, nn.Linear):  # ALBERT's, with the activation beside it
        pooled = tower.pooler_activation(pooler(flat))
    else:
        pooled = pooler(flat[:, None])  # reads the first place of a text, and each token is a text of one place
    return pooled.unflatten(0, states.shape[:2])


def project_tokens(clip, states):
    """Bring the states of tokens into the shared space, each as its family brings the pooled one there.

    Args:
        clip (`PreTrainedModel`): A dual encoder of any family that [`DCLIPTeacherConfig`] names.
        states (`torch.Tensor` of shape `(B, T, hidden_size)`): The text encoder's `last_hidden_state`.

    Returns:
        `torch.Tensor` of shape `(B, T, D)`: Not normalised.
    """
    kind = clip.config.model_type
    if kind in READ_PADDING:
        return clip.text_model.head(states)
    if kind == "dmclip":
        return clip.text_model.projection(states)
    if kind == "vision-text-dual-encoder":
        states = _pool_each(clip.text_model, states)
    return clip.text_projection(states)


@torch.no_grad()
def require_known_pooling(clip, where):
    """Refuse a pair of any two towers whose text encoder makes a sentence of its tokens in an unknown way.

    Families of transformers are known; of a `VisionTextDualEncoder` the text encoder is tried on four tokens.

    Args:
        clip (`PreTrainedModel`): A dual encoder in eval mode.
        where (`str`): What names it, for the message.

    Raises:
        ValueError: If what is made of one token does not give the sentence's embedding.
    """
    text_config = clip.config.text_config
    if clip.config.model_type != "vision-text-dual-encoder" or text_config.model_type in CLIP_TEXT_TOWERS:
        return
    tower = clip.text_model
    ids = torch.arange(4, device=clip.device)[None] % text_config.vocab_size
    outputs = tower(input_ids=ids, attention_mask=torch.ones_like(ids))
    sentence = getattr(outputs, "pooler_output", None)
    if sentence is not None and getattr(tower, "pooler", None) is not None:
        first = _pool_each(tower, outputs.last_hidden_state[:, :1])[:, 0]
        if torch.allclose(first.float(), sentence.float(), rtol=1e-2, atol=1e-3):
            return
    raise ValueError(
        f"Expected a text encoder in '{where}' that embeds a text by a pooler at its first token, as BERT does, or at "
        f"its end token, as CLIP does, got {type(tower).__name__}. Name a dual encoder with another."
    )


class DCLIPTeacher(InitialisedAsInTree, PreTrainedModel):
    """Embeds an (image regions, caption) pair, or with `cross_attention="regions"` the image's regions alone.

    The dual encoder inside, `clip` whatever its family, is frozen: no gradient and eval mode, whatever `.train()` says
    and also after loading. At the defaults 2,103,296 parameters train at width 512 and 4,727,808 at 768.

    Source: docs/papers.md, teacher. Deviation: padding is masked, crops are normalised, an image without a box is one
    region, and a stream that attends to nobody is brought to the norm LayerNorm gives one that does (`sqrt(D)` per
    item), so that `text_share` is a share in every variant.

    Example:
        >>> small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> clip = {"text_config": small, "vision_config": small, "projection_dim": 16}
        >>> teacher = DCLIPTeacher(DCLIPTeacherConfig(clip_config=clip))
        >>> regions, tokens, text = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
        >>> teacher(region_embeds=regions, token_embeds=tokens, text_embeds=text).teacher_embeds.shape
        torch.Size([2, 16])
    """

    config: DCLIPTeacherConfig
    base_model_prefix = "dclip_teacher"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        own = OWN_MODELS.get(config.clip_config.model_type)
        self.clip = AutoModel.from_config(config.clip_config) if own is None else own._from_config(config.clip_config)
        if config.cross_attention in ("bidirectional", "text_to_image"):
            self.text_to_image = CrossModalLayer(config)
        if config.cross_attention in ("bidirectional", "image_to_text"):
            self.image_to_text = CrossModalLayer(config)
        if config.cross_attention == "regions":
            self.region_encoder = RegionEncoder(config)
        self.post_init()
        self.train(self.training)  # freezes

    @classmethod
    def from_clip(cls, clip_path, **config_overrides):
        """Build an untrained teacher around a pretrained dual encoder.

        Args:
            clip_path (`str`): Folder or Hub id of a CLIP, MetaCLIP 2, SigLIP, SigLIP 2 of fixed size, Chinese-CLIP,
                AltCLIP, `VisionTextDualEncoder`, DCLIP or DM-CLIP.
            config_overrides: Fields of [`DCLIPTeacherConfig`] other than `clip_config`.

        Returns:
            [`DCLIPTeacher`]

        Raises:
            TypeError: If an override is no field of the config.
            ValueError: If it is another kind of model, a weight is missing, or it is not known how its text encoder
                makes one vector of a text's tokens.
        """
        known = set(DCLIPTeacherConfig.__dataclass_fields__) - {"clip_config"}
        if unknown := set(config_overrides) - known:
            raise TypeError(f"Unknown teacher config fields {sorted(unknown)}; expected some of {sorted(known)}.")
        kind = PreTrainedConfig.get_config_dict(clip_path)[0].get("model_type")
        check_family(kind, f"'{clip_path}'")
        clip, report = OWN_MODELS.get(kind, AutoModel).from_pretrained(clip_path, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"Expected all weights of a CLIP at '{clip_path}', got {len(missing)} missing, the first "
                f"{missing[0]}: they would be random. Name a CLIP with both towers, not a teacher or one tower."
            )
        require_known_pooling(clip.eval(), clip_path)
        clip_config = clip.config.to_dict()
        clip_config.pop("auto_map", None)
        teacher = cls(cls.config_class(clip_config=clip_config, **config_overrides))
        teacher.clip.load_state_dict(clip.state_dict())
        return teacher

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, ReadoutProjection):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, InputProjection):
            init.xavier_uniform_(module.weight, gain=0.5**0.5)  # the bound of a joint (3 D, D) matrix
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RegionEncoder):
            init.zeros_(module.image_type)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with the code beside the weights."""
        set_auto_map(self, "AutoModel")
        super().save_pretrained(save_directory, **kwargs)

    def train(self, mode=True):
        """Set the mode of the cross-modal block; the CLIP inside stays frozen and in eval mode."""
        super().train(mode)
        self.clip.eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def encode_images(self, pixel_values):
        """The frozen CLIP's image embedding `(B, D)`, L2-normalised, no gradient, of `pixel_values (B, 3, H, W)`."""
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # convolutions are fastest on it
        return F.normalize(self.clip.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)

    @torch.no_grad()
    def encode_regions(self, pixel_values, region_mask=None):
        """Embed cropped regions with the frozen CLIP; padding is not computed.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, R, 3, H, W)`): CLIP-normalised crops.
            region_mask (`torch.Tensor` of shape `(B, R)`, *optional*): True = real. Defaults to all real.

        Returns:
            `torch.Tensor` of shape `(B, R, D)`: L2-normalised, no gradient, zeros at padding.
        """
        if region_mask is None:
            region_mask = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
        region_mask = region_mask.bool()
        embeds = self.encode_images(pixel_values[region_mask])
        return embeds.new_zeros(*region_mask.shape, embeds.shape[-1]).masked_scatter(region_mask[..., None], embeds)

    @torch.no_grad()
    def encode_text(self, input_ids, attention_mask=None):
        """Embed captions with the frozen dual encoder: the sentence, and every token between start and end token.

        A token is brought into the shared space as its family brings a sentence's pooled one there.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`): Token ids, as the teacher's processor gives them; too long a
                text is cut, keeping its end token.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 = real. Families that find a text's end by
                it need it; SigLIP's text encoder does not see it.

        Returns:
            `tuple`: `text_embeds (B, D)` L2-normalised; `token_embeds (B, T, D)`, projected, not normalised, with
            `T = L - 1`, or `L` in families without a start token; `token_mask (B, T)`, True = real. A caption without
            any word has its end token as its one token.

        Raises:
            ValueError: If a family that reads padding gets texts of another length than it was trained with, or no
                mask.
        """
        text_config = self.config.clip_config.text_config
        places = longest_positions(text_config)
        pads = self.config.clip_config.model_type in READ_PADDING
        if pads and (attention_mask is None or input_ids.shape[1] != places):
            got = f"{input_ids.shape[1]} {'without' if attention_mask is None else 'with'} a mask"
            raise ValueError(
                f"input_ids: expected texts padded to the {places} tokens that a {self.config.clip_config.model_type} "
                f"reads, and their attention_mask, got {got}. Let the teacher's processor make both."
            )
        ends = self._names_its_end_token()
        if ends:
            input_ids, attention_mask = truncate_text(
                input_ids, attention_mask, max_length=places, eos_token_id=text_config.eos_token_id
            )
        elif input_ids.shape[1] > places:
            input_ids, attention_mask = _cut_at_mask(input_ids, attention_mask, places)
        outputs = self.clip.get_text_features(input_ids=input_ids, attention_mask=None if pads else attention_mask)
        end = self._end_places(input_ids) if ends else _last_places(input_ids, attention_mask)  # (B, 1)
        start = 0 if pads else 1
        tokens = project_tokens(self.clip, outputs.last_hidden_state[:, start : input_ids.shape[1]])
        positions = torch.arange(start, input_ids.shape[1], device=input_ids.device)
        token_mask = (positions < end) | ((end == start) & (positions == start))
        return F.normalize(outputs.pooler_output, dim=-1), tokens, token_mask

    def _names_its_end_token(self):
        config = self.config.clip_config
        return config.model_type in READ_AT_END or config.text_config.model_type in CLIP_TEXT_TOWERS

    def _end_places(self, input_ids):
        """`(B, 1)`: the place of each text's end token; its last place where it has none."""
        text_config = self.config.clip_config.text_config
        # MetaCLIP 2's end token is 2; CLIP's old configs say 2, and mean the highest id.
        if text_config.eos_token_id == LEGACY_EOS_TOKEN_ID and text_config.model_type == "clip_text_model":
            return input_ids.argmax(dim=-1, keepdim=True)
        is_end = input_ids == text_config.eos_token_id
        last = input_ids.shape[1] - 1
        return torch.where(is_end.any(dim=-1), is_end.int().argmax(dim=-1), last)[:, None]

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        region_pixel_values=None,
        region_boxes=None,
        region_scores=None,
        region_mask=None,
        region_embeds=None,
        image_embeds=None,
        text_embeds=None,
        token_embeds=None,
        token_mask=None,
        return_loss=True,
        output_attentions=None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """Embed pairs. Every frozen input can be given as pixels and ids or, precomputed, as embeddings.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T + 1)`, *optional*): Captions, BOS first.
            attention_mask (`torch.Tensor` of shape `(B, T + 1)`, *optional*): 1 = real.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Whole images; only `"regions"` reads
                them.
            region_pixel_values (`torch.Tensor` of shape `(B, R, 3, H, W)`, *optional*): CLIP-normalised crops.
            region_boxes (`torch.Tensor` of shape `(B, R, 4)`, *optional*): xyxy as fractions of the image, in [0, 1].
                Needed by `"regions"`; elsewhere None leaves the area out of the weights.
            region_scores (`torch.Tensor` of shape `(B, R)`, *optional*): Detector scores in [0, 1]; None means 1.
            region_mask (`torch.Tensor` of shape `(B, R)`, *optional*): True = real. Defaults to all real.
            region_embeds (`torch.Tensor` of shape `(B, R, D)`, *optional*): In place of `region_pixel_values`.
            image_embeds (`torch.Tensor` of shape `(B, D)`, *optional*): In place of `pixel_values`.
            text_embeds (`torch.Tensor` of shape `(B, D)`, *optional*): With `token_embeds`, in place of `input_ids`;
                `"regions"` needs no `token_embeds`.
            token_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*): As from [`~DCLIPTeacher.encode_text`].
            token_mask (`torch.Tensor` of shape `(B, T)`, *optional*): True = real. Defaults to all real.
            return_loss (`bool`, *optional*, defaults to `True`): Compute `loss` where text is given.
            output_attentions (`bool`, *optional*): Return the block's attention maps.

        Returns:
            [`DCLIPTeacherOutput`]

        Raises:
            ValueError: If an input the config needs is missing, a width differs from the config's, or a sample has no
                region.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        reads_text = self.config.cross_attention != "regions"
        if region_mask is not None:
            region_mask = region_mask.bool()
        if region_embeds is None:
            self._require("region_pixel_values or region_embeds", region_pixel_values)
            region_embeds = self.encode_regions(region_pixel_values, region_mask)
        if region_mask is None:
            region_mask = torch.ones(region_embeds.shape[:2], dtype=torch.bool, device=region_embeds.device)
        self._check_regions(region_embeds, region_mask)
        if input_ids is not None and (text_embeds is None or (reads_text and token_embeds is None)):
            text_embeds, token_embeds, token_mask = self.encode_text(input_ids, attention_mask)

        attentions = {}
        if reads_text:
            self._require("input_ids, or token_embeds and text_embeds", token_embeds)
            if token_mask is None:
                token_mask = torch.ones(token_embeds.shape[:2], dtype=torch.bool, device=token_embeds.device)
            teacher_embeds, weights, attentions = self._attend_across(
                region_embeds, region_mask, region_boxes, region_scores, token_embeds, token_mask.bool()
            )
        else:
            self._require("region_boxes", region_boxes)
            if image_embeds is None:
                self._require("pixel_values or image_embeds", pixel_values)
                image_embeds = self.encode_images(pixel_values)
            weights = weigh_regions(region_mask)
            teacher_embeds, attentions = self._attend_regions(
                image_embeds, region_embeds, region_mask, region_boxes, region_scores
            )
        if text_embeds is not None:
            text_embeds = F.normalize(text_embeds, dim=-1)
        loss = None
        if return_loss and text_embeds is not None:
            loss = symmetric_info_nce(teacher_embeds, text_embeds, self.config.loss_temperature)
        return DCLIPTeacherOutput(
            loss=loss,
            teacher_embeds=teacher_embeds,
            text_embeds=text_embeds,
            region_embeds=region_embeds,
            region_weights=weights,
            **(attentions if output_attentions else {}),
        )

    def _block_dtype(self):
        """Columns are float16, the CLIP inside may be half precision; the block computes in its own weights' type."""
        trained = (weight.dtype for name, weight in self.named_parameters() if not name.startswith("clip."))
        return next(trained, torch.float32)

    def _require(self, names, value):
        if value is None:
            raise ValueError(
                f"A teacher with cross_attention={self.config.cross_attention!r} needs {names}; got None."
            )

    def _check_regions(self, region_embeds, region_mask):
        if region_embeds.shape[-1] != self.config.projection_dim:
            raise ValueError(
                f"region_embeds: expected width {self.config.projection_dim}, got {region_embeds.shape[-1]}; "
                "were they made by another CLIP?"
            )
        empty = ~region_mask.any(dim=-1)
        if not torch.compiler.is_compiling() and empty.any():
            raise ValueError(
                "region_mask: expected at least one region per sample, got none for sample "
                f"{int(empty.nonzero()[0])}; give the whole image as the one region."
            )

    def _attend_across(self, region_embeds, region_mask, boxes, scores, token_embeds, token_mask):
        weights = region_mask.float() / region_mask.sum(dim=-1, keepdim=True)
        if self.config.region_weighting:
            weights = weigh_regions(region_mask, boxes, scores, region_embeds, token_embeds, token_mask)
        dtype = self._block_dtype()
        # Rescaled by the number of regions: uniform weights multiply by 1.
        scaled = weights * region_mask.sum(dim=-1, keepdim=True)
        regions, tokens = region_embeds.to(dtype) * scaled[..., None].to(dtype), token_embeds.to(dtype)
        norm = math.sqrt(self.config.projection_dim)
        attended_tokens, attended_regions = F.normalize(tokens, dim=-1) * norm, regions * norm
        attentions = {}
        if self.config.cross_attention in ("bidirectional", "text_to_image"):
            attended_tokens, attentions["text_to_image_attentions"] = self.text_to_image(tokens, regions, region_mask)
        if self.config.cross_attention in ("bidirectional", "image_to_text"):
            attended_regions, attentions["image_to_text_attentions"] = self.image_to_text(regions, tokens, token_mask)
        embeds = self._aggregate(attended_tokens, token_mask, attended_regions, region_mask)
        return F.normalize(embeds, dim=-1), weights, attentions

    def _attend_regions(self, image_embeds, region_embeds, region_mask, boxes, scores):
        if scores is None:
            scores = torch.ones_like(boxes[..., 0])
        dtype = self._block_dtype()
        image_embeds = F.normalize(image_embeds, dim=-1).to(dtype)
        items, mask, attentions = self.region_encoder(
            image_embeds, region_embeds.to(dtype), boxes, scores, region_mask
        )
        pooled = self._pool(items, mask.float()).to(dtype)
        change = self.region_encoder.readout(torch.cat([items[:, 0], pooled], dim=-1))
        return F.normalize((image_embeds + change).float(), dim=-1), {"region_attentions": attentions}

    def _aggregate(self, tokens, token_mask, regions, region_mask):
        text_share = self.config.text_share
        if self.config.aggregation == "mean":
            pooled_tokens, pooled_regions = self._pool(tokens, token_mask), self._pool(regions, region_mask)
            return text_share * pooled_tokens + (1 - text_share) * pooled_regions
        # Clustered together, a stream keeps its share in the sum of the items' weights.
        token_weights = text_share * token_mask.float() / token_mask.sum(dim=-1, keepdim=True)
        region_weights = (1 - text_share) * region_mask.float() / region_mask.sum(dim=-1, keepdim=True)
        return self._pool(torch.cat([tokens, regions], dim=1), torch.cat([token_weights, region_weights], dim=1))

    def _pool(self, items, item_weights):
        temperature = self.config.attention_temperature
        if self.config.aggregation == "mean":
            return attention_pool(items, item_weights, temperature)
        clusters = assign_clusters(items, item_weights > 0, self.config.num_clusters, self.config.num_cluster_steps)
        clusters = clusters * item_weights[:, None]  # (B, K, N)
        pooled = attention_pool(items[:, None].expand(-1, clusters.shape[1], -1, -1), clusters, temperature)
        return pooled.sum(dim=1) / clusters.any(dim=-1).sum(dim=-1, keepdim=True)


DCLIPTeacher.register_for_auto_class("AutoModel")
