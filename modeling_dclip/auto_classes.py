"""The public names of the package in one place, registered with transformers' Auto classes when this is imported."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPImageProcessorPil,
)

from .configuration_dclip import PRESETS, DCLIPConfig, DCLIPVisionConfig
from .configuration_dclip_teacher import DCLIPTeacherConfig
from .configuration_dmclip import DMCLIP_PRESETS, DMCLIPConfig, DMCLIPTextConfig, DMCLIPVisionConfig
from .modeling_dclip import DCLIPModel, DCLIPVisionModel, DCLIPVisionModelOutput
from .modeling_dclip_teacher import DCLIPTeacher, DCLIPTeacherOutput
from .modeling_dmclip import DMCLIPModel, DMCLIPVisionModel, DMCLIPVisionModelOutput
from .modeling_dmclip_text import DMCLIPTextModel, DMCLIPTextModelOutput
from .processing_dclip import DCLIPProcessor, DCLIPTeacherProcessor

__all__ = [
    "DMCLIP_PRESETS",
    "PRESETS",
    "DCLIPConfig",
    "DCLIPModel",
    "DCLIPProcessor",
    "DCLIPTeacher",
    "DCLIPTeacherConfig",
    "DCLIPTeacherOutput",
    "DCLIPTeacherProcessor",
    "DCLIPVisionConfig",
    "DCLIPVisionModel",
    "DCLIPVisionModelOutput",
    "DMCLIPConfig",
    "DMCLIPModel",
    "DMCLIPTextConfig",
    "DMCLIPTextModel",
    "DMCLIPTextModelOutput",
    "DMCLIPVisionConfig",
    "DMCLIPVisionModel",
    "DMCLIPVisionModelOutput",
]

for _config, _model, _processor in (
    (DCLIPVisionConfig, DCLIPVisionModel, DCLIPProcessor),
    (DCLIPConfig, DCLIPModel, DCLIPProcessor),
    (DCLIPTeacherConfig, DCLIPTeacher, DCLIPTeacherProcessor),
    (DMCLIPVisionConfig, DMCLIPVisionModel, DCLIPProcessor),
    (DMCLIPTextConfig, DMCLIPTextModel, DCLIPProcessor),
    (DMCLIPConfig, DMCLIPModel, DCLIPProcessor),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoProcessor.register(_config, _processor)
    AutoImageProcessor.register(_config, image_processor_classes={"pil": CLIPImageProcessorPil})
AutoModelForZeroShotImageClassification.register(DCLIPConfig, DCLIPModel)
AutoModelForZeroShotImageClassification.register(DMCLIPConfig, DMCLIPModel)
