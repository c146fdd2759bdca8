"""transformers' common model tests for what ships. Opt in with `make test-conformance`."""

import unittest

import pytest
import torch

from conformance.fetched_tests import common
from modeling_dclip import (
    DCLIPConfig,
    DCLIPModel,
    DCLIPTeacher,
    DCLIPTeacherConfig,
    DCLIPVisionConfig,
    DCLIPVisionModel,
)

modeling = common("test_modeling_common")
configuration = common("test_configuration_common")
pytestmark = pytest.mark.conformance

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
VISION = {**LAYERS, "image_size": 30, "patch_size": 2, "projection_dim": 64}
TEXT = {
    **LAYERS,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "projection_dim": 64,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 98,
}
BATCH, TOKENS, REGIONS = 8, 7, 3  # the common tests cut batches to 7


def text_inputs():
    ids = modeling.ids_tensor([BATCH, TOKENS], TEXT["vocab_size"] - 2)
    ids[:, 0], ids[:, -1] = TEXT["bos_token_id"], TEXT["eos_token_id"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Tester:
    """What the common tests ask of a model's tester."""

    batch_size = BATCH
    seq_length = 226  # patches and class token
    hidden_size = LAYERS["hidden_size"]
    num_hidden_layers = LAYERS["num_hidden_layers"]
    num_attention_heads = LAYERS["num_attention_heads"]

    def __init__(self, config, inputs, is_training):
        self.get_config, self.inputs, self.is_training = config, inputs, is_training

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()


class DCLIPModelTests(modeling.ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False
    returns_loss = True

    def make(self):
        raise NotImplementedError

    def setUp(self):
        config, inputs = self.make()
        self.model_tester = Tester(config, inputs, is_training=self.returns_loss)
        self.config_tester = configuration.ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, **self.config_fields
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class VisionModelTest(DCLIPModelTests, unittest.TestCase):
    all_model_classes = (DCLIPVisionModel,)
    config_class = DCLIPVisionConfig
    config_fields = VISION
    returns_loss = False  # its trainer has the losses; gradients and checkpointing: tests/test_modeling_dclip.py

    def make(self):
        def inputs():
            return {"pixel_values": modeling.floats_tensor([BATCH, 3, 30, 30])}

        return lambda: DCLIPVisionConfig(**self.config_fields), inputs

    def test_model_get_set_embeddings(self):
        # The common test wants a token table; the input layer of an image encoder is a convolution.
        model = DCLIPVisionModel(self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), torch.nn.Conv2d)
        self.assertIsNone(model.get_output_embeddings())


class RotaryVisionModelTest(VisionModelTest):
    config_fields = {**VISION, "position_embedding_type": "rope"}


class CompositeModelTests(DCLIPModelTests):
    """Composite models, skipping what the common tests ask of a single stack of layers."""

    _is_composite = True

    @unittest.skip("One output per tower, as in CLIP: tested on the vision tower")
    def test_attention_outputs(self):
        pass

    @unittest.skip("One output per tower, as in CLIP: tested on the vision tower")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("One output per tower, as in CLIP: tested on the vision tower")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("Two inputs, as in CLIP: there is no one input embedding")
    def test_model_get_set_embeddings(self):
        pass


class DualModelTest(CompositeModelTests, unittest.TestCase):
    all_model_classes = (DCLIPModel,)
    config_class = DCLIPConfig
    config_fields = {"projection_dim": 64}
    additional_model_inputs = ["pixel_values"]

    def make(self):
        def inputs():
            return {**text_inputs(), "pixel_values": modeling.floats_tensor([BATCH, 3, 30, 30]), "return_loss": True}

        # Frozen text runs in eval mode, where the layer the checkpointing test looks at is never checkpointed.
        fields = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 64, "freeze_text": False}
        return lambda: DCLIPConfig(**fields), inputs


class TeacherModelTest(CompositeModelTests, unittest.TestCase):
    all_model_classes = (DCLIPTeacher,)
    config_class = DCLIPTeacherConfig
    config_fields = {"text_share": 0.25}
    cross_attention = "bidirectional"

    def make(self):
        clip = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 64}

        def inputs():
            boxes = torch.tensor([0.1, 0.2, 0.7, 0.9]).expand(BATCH, REGIONS, 4)
            return {
                **text_inputs(),
                "pixel_values": modeling.floats_tensor([BATCH, 3, 30, 30]),
                "region_pixel_values": modeling.floats_tensor([BATCH, REGIONS, 3, 30, 30]),
                "region_boxes": boxes,
                "region_scores": torch.full((BATCH, REGIONS), 0.5),
                "region_mask": torch.ones(BATCH, REGIONS, dtype=torch.bool),
            }

        return lambda: DCLIPTeacherConfig(clip_config=clip, cross_attention=self.cross_attention), inputs


class LeakFreeTeacherModelTest(TeacherModelTest):
    cross_attention = "regions"


@unittest.skip("Compares hidden_states, which a teacher has not; eager = SDPA: tests/test_modeling_dclip_teacher.py")
def eager_matches_sdpa(self):
    pass


for _name in dir(TeacherModelTest):
    if _name.startswith("test_eager_matches_sdpa_inference_"):  # one test per dtype and padding side
        setattr(TeacherModelTest, _name, eager_matches_sdpa)
        setattr(LeakFreeTeacherModelTest, _name, eager_matches_sdpa)
