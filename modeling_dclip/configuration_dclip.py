"""Architecture of the DCLIP student.

Source: "Distill CLIP: Enhancing Image-Text Retrieval via Cross-Modal Transformer Distillation", arXiv 2505.21549;
docs/papers.md.
"""

from dataclasses import fields as dataclass_fields

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

PRESETS = {
    "dclip-vitb32": "openai/clip-vit-base-patch32",
    "dclip-vitb16": "openai/clip-vit-base-patch16",
    "dclip-vitl14": "openai/clip-vit-large-patch14",
}

POSITION_EMBEDDING_TYPES = ("absolute", "rope")

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


def check_fields(whose, values):
    """Refuse numbers out of bounds among the fields of a configuration, as [`check_sizes`] does in a whole one.

    Args:
        whose (`str`): What the configuration is of, for the message.
        values (`dict`): Fields by their names; those that are no single number are passed over.

    Raises:
        ValueError: Naming the field, the range and what came.
    """
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
    check_fields(config.model_type, {name: getattr(config, name, None) for name in MODEL_SIZES})
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
    check_fields(config_class.model_type, fields)  # before transformers divides by one of them
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
        rotary_scale (`float`, *optional*, defaults to 1.0): Fastest rotation of `"rope"`, in radians a patch. 1 is the
            usual one, for a model trained from scratch. A trained CLIP breaks at it and hardly changes at 0.3.
        rotary_table (`bool`, *optional*, defaults to `False`): With `"rope"`, keep the learned table too, interpolated
            to the input's grid, and count places from the middle of the image. A trained CLIP then starts almost as
            it is; training sets it so.
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
    rotary_scale: float | int = 1.0
    rotary_table: bool = False

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
        check_number("rotary_scale", self.rotary_scale, 0, 1e3, above=True)
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

    Reads the `config.json` of any stock `CLIPModel`. Where the image encoder has CLIP's own positions, it is also
    saved as one: the model is then a `CLIPModel` for whoever does not run our code, and a [`DCLIPModel`] for whoever
    does. Source: docs/papers.md, student. Deviation: none.

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
        if config_dict.get("model_type") == CLIPConfig.model_type:  # welcome: spare the reader the warning
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

    @property
    def is_stock_clip(self):
        """Whether a stock `CLIPModel` with these weights gives the same outputs: with absolute positions it does."""
        return self.vision_config.position_embedding_type == "absolute"

    def to_diff_dict(self):
        """What `config.json` gets: with absolute positions a stock CLIP's fields, and the `auto_map` of our code."""
        fields = super().to_diff_dict()
        if not self.is_stock_clip:
            return fields
        own = {one.name for one in dataclass_fields(DCLIPVisionConfig)}
        own -= {one.name for one in dataclass_fields(CLIPVisionConfig)}  # those of rotary positions
        vision = {name: value for name, value in fields["vision_config"].items() if name not in own}
        fields["vision_config"] = {**vision, "model_type": CLIPVisionConfig.model_type}
        if fields.get("architectures") == ["DCLIPModel"]:
            fields["architectures"] = ["CLIPModel"]
        return {**fields, "model_type": CLIPConfig.model_type}


DCLIPVisionConfig.register_for_auto_class()
DCLIPConfig.register_for_auto_class()
