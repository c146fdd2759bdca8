"""Architectures of the DCLIP student and teacher.

Source: "Distill CLIP: Enhancing Image-Text Retrieval via Cross-Modal Transformer Distillation", arXiv 2505.21549;
docs/papers.md.
"""

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

PRESETS = {
    "dclip-vitb32": "openai/clip-vit-base-patch32",
    "dclip-vitb16": "openai/clip-vit-base-patch16",
    "dclip-vitl14": "openai/clip-vit-large-patch14",
}

POSITION_EMBEDDING_TYPES = ("absolute", "rope")
CROSS_ATTENTION_TYPES = ("bidirectional", "text_to_image", "image_to_text", "none", "regions")
AGGREGATION_TYPES = ("mean", "multi_cluster")

# Least and largest value of the numbers that families of transformers name alike. The largest published encoders are
# ten times smaller; a configuration that asks for more is damaged, and would take the machine with it.
MODEL_SIZES = {
    "num_hidden_layers": (1, 1000),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_attention_heads": (1, 2**12),
    "projection_dim": (1, 2**17),
    "vocab_size": (1, 10**7),
    "max_position_embeddings": (1, 10**6),
    "image_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "num_channels": (1, 1000),
    "layer_norm_eps": (0, 1),
    "attention_dropout": (0, 1),
    "initializer_range": (0, 1e3),
    "initializer_factor": (0, 1e6),
    "logit_scale_init_value": (-100, 100),
}
# Largest value of the numbers of the teacher's block.
TEACHER_SIZES = {
    "num_attention_heads": 2**12,
    "num_clusters": 1000,
    "num_cluster_steps": 1000,
    "num_region_layers": 100,
    "region_feedforward_ratio": 100,
}


def check_choice(name, value, choices):
    """Refuse a value that is not among `choices`.

    Raises:
        ValueError: Naming the field, what was expected and what came.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}.")


def check_number(name, value, low, high, above=False):
    """Refuse a number outside `low` to `high` (`above`: without `low` itself), and what is no number; NaN and infinity
    are outside.

    Raises:
        ValueError: Naming the field, the range and what came.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (low < value if above else low <= value) or not value <= high:
        raise ValueError(
            f"{name}: expected a number {'above' if above else 'from'} {low} to {high}, got {value!r:.80}."
        )


def _check_fields(whose, values):
    for name, (low, high) in MODEL_SIZES.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            check_number(f"{whose}.{name}", value, low, high)


def check_sizes(config):
    """Refuse numbers of a model's configuration with which it can't be built, or not in this world: before it is.

    Args:
        config (`PreTrainedConfig`): Of any family; the configurations inside it are checked too. A field that is no
            single number is passed over.

    Raises:
        ValueError: Naming the field, the range and what came.

    Example:
        >>> check_sizes(DCLIPConfig())
    """
    _check_fields(config.model_type, {name: getattr(config, name, None) for name in MODEL_SIZES})
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            check_sizes(inner)


def merge_sub_config(value, legacy, config_class, **overrides):
    """A config object from None, a dict (or a config of a sibling class) and an old checkpoint's `*_config_dict`."""
    if not legacy and getattr(value, "model_type", None) == config_class.model_type:
        for key, override in overrides.items():
            setattr(value, key, override)
        return value
    fields = value.to_dict() if hasattr(value, "to_dict") else dict(value or {})
    fields.update(legacy or {})
    fields.pop("model_type", None)
    _check_fields(config_class.model_type, fields)  # before transformers divides by one of them
    return config_class(**{**fields, **overrides})


@strict
class DCLIPVisionConfig(CLIPVisionConfig):
    """The image encoder: CLIP's ViT and its projection into the shared space.

    Source: docs/papers.md, student. Deviation: none at the default `position_embedding_type`.

    Args:
        position_embedding_type (`str`, *optional*, defaults to `"absolute"`): `"absolute"` is CLIP's learned table.
            `"rope"` replaces it by a 2-D axial rotation of patch queries and keys; of the table only what does not
            depend on the place stays (the class token's row and the mean of the patch rows), so that stock weights
            still load key by key and any input size that is a multiple of the patch works.
        rotary_base (`float`, *optional*, defaults to 100.0): Longest rotary wavelength is `2 * pi * rotary_base`
            patches. 100 suits grids of 7 to 64 patches a side; a language model's 10000 would leave most
            frequencies constant over so short an axis.
        kwargs: Every field of [`~transformers.CLIPVisionConfig`], same meaning and defaults (ViT-B/32).

    Raises:
        StrictDataclassError: If a choice is unknown, or if `"rope"` is asked of a head width not divisible by 4.

    Example:
        >>> DCLIPVisionConfig(patch_size=16, position_embedding_type="rope").rotary_base
        100.0
    """

    model_type = "dclip_vision"
    base_config_key = "vision_config"

    position_embedding_type: str = "absolute"
    rotary_base: float | int = 100.0

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # A dual checkpoint may state its projection width only at the top; the tower's field would be a default.
        if "vision_config" in config_dict and "projection_dim" in config_dict:
            vision_config = {**(config_dict["vision_config"] or {}), "projection_dim": config_dict["projection_dim"]}
            vision_config["model_type"] = cls.model_type
            config_dict = {**config_dict, "vision_config": vision_config}
        return config_dict, kwargs

    def validate_architecture(self):
        check_sizes(self)
        check_number("rotary_base", self.rotary_base, 0, 1e9, above=True)
        super().validate_architecture()
        check_choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_embedding_type == "rope" and head_dim % 4:
            raise ValueError(
                "position_embedding_type 'rope' rotates pairs along two axes: expected hidden_size / "
                f"num_attention_heads divisible by 4, got {head_dim}."
            )


@strict
class DCLIPConfig(PreTrainedConfig):
    """The dual encoder: [`DCLIPVisionConfig`] beside CLIP's text tower.

    Reads the `config.json` of any stock `CLIPModel`. Source: docs/papers.md, student. Deviation: none.

    Args:
        text_config (`dict` or `CLIPTextConfig`, *optional*): The text tower. Defaults to ViT-B/32's.
        vision_config (`dict` or `DCLIPVisionConfig`, *optional*): The image tower. Defaults to ViT-B/32's.
        projection_dim (`int`, *optional*, defaults to 512): Width of the shared space; both towers get it.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592): Log of the similarity's multiplier.
        initializer_factor (`float`, *optional*, defaults to 1.0): Multiplies every initial standard deviation.
        freeze_text (`bool`, *optional*, defaults to `True`): The text tower and its projection get no gradient and
            stay in eval mode, whatever `.train()` says. Saved with the model.

    Example:
        >>> DCLIPConfig(vision_config={"patch_size": 16}).vision_config.patch_size
        16
    """

    model_type = "dclip"
    sub_configs = {"text_config": CLIPTextConfig, "vision_config": DCLIPVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float | int = 1.0
    freeze_text: bool = True

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "clip":  # a stock checkpoint is welcome: spare the reader the warning
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            legacy = kwargs.pop(f"{name}_dict", None)  # OpenAI's checkpoints of 2022 carry both spellings
            merged = merge_sub_config(getattr(self, name), legacy, config_class, projection_dim=self.projection_dim)
            setattr(self, name, merged)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        check_sizes(self)


def _vit_b16():
    return DCLIPConfig(vision_config={"patch_size": 16})


@strict
class DCLIPTeacherConfig(PreTrainedConfig):
    """A frozen CLIP and the small cross-modal block that reads regions and caption tokens together.

    Source: docs/papers.md, teacher. Deviation: `cross_attention="regions"` and its `num_region_layers` and
    `region_feedforward_ratio` are ours.

    Args:
        clip_config (`dict` or `DCLIPConfig`, *optional*): The frozen CLIP. Defaults to ViT-B/16.
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
        StrictDataclassError: If a choice is unknown or a number is out of its range.

    Example:
        >>> DCLIPTeacherConfig().clip_config.vision_config.patch_size
        16
    """

    model_type = "dclip_teacher"
    sub_configs = {"clip_config": DCLIPConfig}

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
        if self.clip_config is None:
            self.clip_config = _vit_b16()
        else:
            self.clip_config = merge_sub_config(self.clip_config, None, DCLIPConfig)
        super().__post_init__(**kwargs)

    @property
    def projection_dim(self):
        return self.clip_config.projection_dim

    def validate_architecture(self):
        check_choice("cross_attention", self.cross_attention, CROSS_ATTENTION_TYPES)
        check_choice("aggregation", self.aggregation, AGGREGATION_TYPES)
        for name in ("attention_temperature", "loss_temperature"):
            check_number(name, getattr(self, name), 0, 1e6, above=True)
        check_number("text_share", self.text_share, 0, 1)
        for name, most in TEACHER_SIZES.items():
            check_number(name, getattr(self, name), 1, most)
        check_sizes(self)
        width = getattr(self.clip_config, "projection_dim", None)
        if width is not None and width % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of the embedding width {width}, "
                f"got {self.num_attention_heads}."
            )


DCLIPVisionConfig.register_for_auto_class()
DCLIPConfig.register_for_auto_class()
DCLIPTeacherConfig.register_for_auto_class()
