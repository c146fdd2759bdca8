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
    DMCLIPConfig,
    DMCLIPModel,
    DMCLIPTextConfig,
    DMCLIPTextModel,
    DMCLIPVisionConfig,
    DMCLIPVisionModel,
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

    def __init__(self, config, inputs, is_training, **fields):
        self.get_config, self.inputs, self.is_training = config, inputs, is_training
        vars(self).update(fields)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()


class DCLIPModelTests(modeling.ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False
    returns_loss = True
    tester_fields = {}
    common_properties = None  # of the config; None: those of a plain stack of layers

    def make(self):
        raise NotImplementedError

    def setUp(self):
        config, inputs = self.make()
        self.model_tester = Tester(config, inputs, is_training=self.returns_loss, **self.tester_fields)
        self.config_tester = configuration.ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=self.common_properties,
            **self.config_fields,
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


# -- DM-CLIP ---------------------------------------------------------------------------------------------------------

STAGES = {
    "image_size": 32,
    "hidden_size": 8,
    "stem_dim": 4,
    "depths": [1, 1, 2, 2],
    "num_heads": [1, 1, 2, 4],
    "window_sizes": [8, 8, 2, 1],
    "projection_dim": 64,
}
BIDIRECTIONAL_TEXT = {**TEXT, "max_position_embeddings": TOKENS, "pad_token_id": 0}


class MambaVisionModelTest(DCLIPModelTests, unittest.TestCase):
    all_model_classes = (DMCLIPVisionModel,)
    config_class = DMCLIPVisionConfig
    config_fields = STAGES
    common_properties = ["hidden_size", "num_channels"]  # heads and depths are of stages
    # Four stages after the stem, whose map of 8 x 8 is the first hidden state.
    tester_fields = {"expected_num_hidden_layers": 5, "seq_length": 8, "hidden_size": 8}
    returns_loss = False  # its trainer has the losses; gradients and checkpointing: tests/test_modeling_dmclip.py

    def make(self):
        def inputs():
            return {"pixel_values": modeling.floats_tensor([BATCH, 3, 32, 32])}

        return lambda: DMCLIPVisionConfig(**STAGES), inputs

    def test_model_get_set_embeddings(self):
        # The common test wants a token table; the input layer of an image encoder is a convolution.
        model = DMCLIPVisionModel(self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), torch.nn.Conv2d)
        self.assertIsNone(model.get_output_embeddings())

    @unittest.skip("Attends in some blocks only, in windows that differ by stage: tests/test_modeling_dmclip.py")
    def test_attention_outputs(self):
        pass


class BidirectionalTextModelTest(DCLIPModelTests, unittest.TestCase):
    all_model_classes = (DMCLIPTextModel,)
    config_class = DMCLIPTextConfig
    config_fields = BIDIRECTIONAL_TEXT
    tester_fields = {"seq_length": TOKENS}
    mask_padding = False
    returns_loss = False

    def make(self):
        return lambda: DMCLIPTextConfig(**BIDIRECTIONAL_TEXT, mask_padding=self.mask_padding), text_inputs


class MaskedTextModelTest(BidirectionalTextModelTest):
    mask_padding = True


class MambaDualModelTest(CompositeModelTests, unittest.TestCase):
    all_model_classes = (DMCLIPModel,)
    config_class = DMCLIPConfig
    config_fields = {"projection_dim": 64}
    additional_model_inputs = ["pixel_values"]
    skip_test_image_features_output_shape = True  # a map, not tokens: tests/test_modeling_dmclip.py

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return 1 + len(STAGES["depths"])

    def make(self):
        def inputs():
            return {**text_inputs(), "pixel_values": modeling.floats_tensor([BATCH, 3, 32, 32]), "return_loss": True}

        fields = {"text_config": BIDIRECTIONAL_TEXT, "vision_config": STAGES, "projection_dim": 64}
        return lambda: DMCLIPConfig(**fields), inputs
