"""Architecture of the DCLIP teacher: a small block around any frozen dual encoder.

Source: "Distill CLIP: Enhancing Image-Text Retrieval via Cross-Modal Transformer Distillation", arXiv 2505.21549;
docs/papers.md.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_dclip import DCLIPConfig, check_choice, check_fields, check_number, check_sizes, merge_sub_config
from .configuration_dmclip import DMCLIPConfig
from .text_reading import READ_PADDING, shared_width

CROSS_ATTENTION_TYPES = ("bidirectional", "text_to_image", "image_to_text", "none", "regions")
AGGREGATION_TYPES = ("mean", "multi_cluster")

# Largest value of the numbers of the teacher's block.
TEACHER_SIZES = {
    "num_attention_heads": 2**12,
    "num_clusters": 1000,
    "num_cluster_steps": 1000,
    "num_region_layers": 100,
    "region_feedforward_ratio": 100,
}

# Families of transformers that a teacher can hold, beside CLIP and the models of this package.
NATIVE_ENCODERS = ("altclip", "chinese_clip", "metaclip_2", "siglip", "vision-text-dual-encoder")


def check_family(model_type, where):
    """Refuse a kind of model that a teacher cannot hold.

    Args:
        model_type (`str` or `None`): Of a config.
        where (`str`): What names the model, for the message.

    Raises:
        ValueError: Naming what was expected and what came.

    Example:
        >>> check_family("siglip", "clip_config")
    """
    if model_type == "siglip2":
        raise ValueError(
            f"{where}: expected a dual encoder that takes square images, got SigLIP 2 in its NaFlex form, whose "
            "images have any shape. Name a SigLIP 2 of fixed size, such as google/siglip2-base-patch16-224."
        )
    if model_type not in (known := ("clip", "dclip", "dmclip", *NATIVE_ENCODERS)):
        raise ValueError(
            f"{where}: expected a dual encoder of type {', '.join(known[:-1])} or {known[-1]}, got {model_type!r}. "
            "Name the dual checkpoint, not a teacher or one tower."
        )


def _read_dual_config(value):
    """The config of a dual encoder, from a dict or a config; without `model_type` a CLIP's."""
    fields = value if isinstance(value, dict) else value.to_dict()
    kind = fields.get("model_type") or "clip"
    check_family(kind, "clip_config")
    if kind in ("clip", "dclip"):
        return merge_sub_config(value, None, DCLIPConfig)
    if kind == "dmclip":
        return merge_sub_config(value, None, DMCLIPConfig)
    check_fields(kind, fields)
    if not isinstance(value, dict):
        return value
    return AutoConfig.for_model(kind, **{name: field for name, field in value.items() if name != "model_type"})


def _vit_b16():
    return DCLIPConfig(vision_config={"patch_size": 16})


@strict
class DCLIPTeacherConfig(PreTrainedConfig):
    """A frozen dual encoder and the small cross-modal block that reads regions and caption tokens together.

    Source: docs/papers.md, teacher. Deviation: `cross_attention="regions"` and its `num_region_layers` and
    `region_feedforward_ratio` are ours.

    Args:
        clip_config (`dict` or `PreTrainedConfig`, *optional*): The frozen dual encoder; its `model_type` says the
            family. Defaults to CLIP ViT-B/16.
        cross_attention (`str`, *optional*, defaults to `"bidirectional"`): Who attends to whom. `"text_to_image"`:
            tokens attend to regions only; `"image_to_text"`: the other way only; `"none"`: nobody, nothing trains;
            `"regions"`: the leak-free teacher, in which regions, whole image and box positions attend to each other
            and no text enters the embedding.
        num_attention_heads (`int`, *optional*, defaults to 8): Heads of every attention of the block.
        attention_temperature (`float`, *optional*, defaults to 2.0): Of the pooling's softmax over cosines, > 0.
        text_share (`float`, *optional*, defaults to 0.5): Share of the text stream in the embedding, in [0, 1].
            Without meaning for `"regions"`.
        region_weighting (`bool`, *optional*, defaults to `True`): Weigh regions by area, detector score and
            similarity to the caption. `"regions"` ignores it: its box encoder sees area and score, and the
            similarity would leak the caption.
        aggregation (`str`, *optional*, defaults to `"mean"`): `"mean"` mixes the two pooled streams;
            `"multi_cluster"` pools inside each of `num_clusters` spherical k-means clusters and averages them.
        num_clusters (`int`, *optional*, defaults to 3): Clusters of `"multi_cluster"`.
        num_cluster_steps (`int`, *optional*, defaults to 5): Fixed number of k-means steps.
        num_region_layers (`int`, *optional*, defaults to 2): Self-attention layers of `"regions"`.
        region_feedforward_ratio (`int`, *optional*, defaults to 2): Width of their MLPs over the embedding's.
        loss_temperature (`float`, *optional*, defaults to 0.05): Of the symmetric InfoNCE, > 0.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): Of the block's LayerNorms.

    Raises:
        ValueError: If `clip_config` is of no family that a teacher can hold.
        StrictDataclassError: If a choice is unknown, a number is out of its range, or the two towers of a SigLIP have
            no width in common.

    Example:
        >>> DCLIPTeacherConfig().clip_config.vision_config.patch_size
        16
    """

    model_type = "dclip_teacher"
    sub_configs = {"clip_config": AutoConfig}

    clip_config: dict | PreTrainedConfig | None = None
    cross_attention: str = "bidirectional"
    num_attention_heads: int = 8
    attention_temperature: float | int = 2.0
    text_share: float | int = 0.5
    region_weighting: bool = True
    aggregation: str = "mean"
    num_clusters: int = 3
    num_cluster_steps: int = 5
    num_region_layers: int = 2
    region_feedforward_ratio: int = 2
    loss_temperature: float | int = 0.05
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        self.clip_config = _vit_b16() if self.clip_config is None else _read_dual_config(self.clip_config)
        super().__post_init__(**kwargs)

    @property
    def has_no_defaults_at_init(self):
        """Whether the encoder's family has no default configuration. transformers 5.18 stores such a one whole."""
        return getattr(self.clip_config, "has_no_defaults_at_init", False)

    @property
    def projection_dim(self):
        """The width of the space that images and texts share."""
        return shared_width(self.clip_config)

    def validate_architecture(self):
        check_choice("cross_attention", self.cross_attention, CROSS_ATTENTION_TYPES)
        check_choice("aggregation", self.aggregation, AGGREGATION_TYPES)
        for name in ("attention_temperature", "loss_temperature"):
            check_number(name, getattr(self, name), 0, 1e6, above=True)
        check_number("text_share", self.text_share, 0, 1)
        for name, most in TEACHER_SIZES.items():
            check_number(name, getattr(self, name), 1, most)
        check_sizes(self)
        width = self.projection_dim
        if self.clip_config.model_type in READ_PADDING:
            image_width = self.clip_config.vision_config.hidden_size
            if image_width != width:
                raise ValueError(
                    f"clip_config: expected an image encoder of the text encoder's width {width}, got {image_width}."
                )
        if self.cross_attention != "none" and width % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of the embedding width {width}, "
                f"got {self.num_attention_heads}."
            )


DCLIPTeacherConfig.register_for_auto_class()
