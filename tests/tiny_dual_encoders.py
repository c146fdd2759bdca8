"""Random dual encoders of transformers' families, small enough to run in milliseconds,
saved as their checkpoints are.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    EfficientNetImageProcessorPil,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
)

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
SPECIAL = ["<s>", "<pad>", "<unk>", "</s>"]  # an EOS of 2 would mean CLIP's old convention
WORDS = "a the red blue small large dog circle square photo of and".split()
TEXT = {**LAYERS, "vocab_size": len(SPECIAL + WORDS), "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 3}
VISION = {**LAYERS, "image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}


def make_word_tokenizer(max_length, template="<s> $A </s>", **options):
    """A tokenizer of whole words that pads on the right with a token of its own."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 3)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    options = {"padding_side": "right", "model_max_length": max_length, **special, **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def _clip():
    config = CLIPConfig(text_config={**TEXT, "max_position_embeddings": 16}, vision_config=VISION, projection_dim=12)
    return CLIPModel(config), CLIPProcessor(CLIPImageProcessorPil(**CROPPED), make_word_tokenizer(16))


def _siglip():
    text = {**TEXT, "max_position_embeddings": 16, "projection_size": 16}
    tokenizer = make_word_tokenizer(16, "$A </s>", model_input_names=["input_ids"])
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    return model, SiglipProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer)


def make_siglip_tokenizer(folder):
    """The tokenizer of the first SigLIP, over a vocabulary that sentencepiece makes: lower case, no punctuation."""
    import sentencepiece

    texts = folder / "texts.txt"
    texts.write_text("\n".join(20 * [" ".join(WORDS), "abcdefghijklmnopqrstuvwxyz"]))
    options = {"vocab_size": 34, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(texts), model_prefix=str(folder / "spiece"), **options)
    return SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"], model_max_length=16)


def _siglip2():
    text = {**TEXT, "max_position_embeddings": 16, "projection_size": 16}
    letters = {letter: 5 + place for place, letter in enumerate("abcdefghilnopqrstu▁")}
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, **letters}
    options = {"padding_side": "right", "model_input_names": ["input_ids"], "add_eos_token": True}
    tokenizer = Siglip2Tokenizer(vocabulary, [], **options)
    text |= {"vocab_size": len(vocabulary), "pad_token_id": 0, "eos_token_id": 1}
    vision = {**LAYERS, "patch_size": 8, "num_patches": 16}
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    return model, Siglip2Processor(Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), tokenizer)


def _align():
    stages = {"kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "strides": [1], "expand_ratios": [1]}
    vision = {**stages, "num_block_repeats": [1], "hidden_dim": 24, "image_size": 32, "width_coefficient": 1.0}
    vision |= {"depth_coefficient": 1.0, "depthwise_padding": []}
    config = AlignConfig(text_config={**TEXT, "max_position_embeddings": 32}, vision_config=vision, projection_dim=24)
    image_processor = EfficientNetImageProcessorPil(size=SQUARE, rescale_offset=True)
    return AlignModel(config), AlignProcessor(image_processor, make_word_tokenizer(32))


def _altclip():
    text = {**TEXT, "max_position_embeddings": 18, "project_dim": 16}  # two of them are no places of a text
    config = AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    return AltCLIPModel(config), AltCLIPProcessor(CLIPImageProcessorPil(**CROPPED), make_word_tokenizer(10**30))


def _chinese_clip():
    config = ChineseCLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 32}, vision_config=VISION, projection_dim=12
    )
    image_processor = ChineseCLIPImageProcessorPil(**CROPPED)
    return ChineseCLIPModel(config), ChineseCLIPProcessor(image_processor, make_word_tokenizer(32))


def _metaclip_2():
    config = MetaClip2Config(
        text_config={**TEXT, "max_position_embeddings": 16}, vision_config=VISION, projection_dim=12
    )
    return MetaClip2Model(config), CLIPProcessor(CLIPImageProcessorPil(**CROPPED), make_word_tokenizer(16))


FAMILIES = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2_naflex": _siglip2,
    "align": _align,
    "altclip": _altclip,
    "chinese_clip": _chinese_clip,
    "metaclip_2": _metaclip_2,
}


@torch.no_grad()
def save_dual_encoder(family, folder):
    """Write a random model of the family, far enough from zero for every part to matter, with its processor."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if "logit" not in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return folder
