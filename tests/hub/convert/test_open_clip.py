"""open_clip's checkpoints in transformers' format: open_clip's embeddings, every key placed, other kinds refused."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from fixtures.tiny_dual_encoders import WORDS, make_siglip_tokenizer, make_word_tokenizer
from fixtures.training import equal
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPModel, GemmaTokenizer, PreTrainedTokenizerFast

from modeling_dclip.data.failures import FAILURES
from modeling_dclip.distillation.run import load_student
from modeling_dclip.encoders.families import WrongModelError, projected, tokenize_texts
from modeling_dclip.encoders.open_clip import load_open_clip
from modeling_dclip.hub.convert import open_clip as conversion
from modeling_dclip.hub.convert.__main__ import main
from modeling_dclip.hub.convert.open_clip import convert_open_clip, find_kind, place_weights
from modeling_dclip.hub.export.open_clip import to_open_clip_weights

open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")

SIDE, GATE = 32, 2e-6  # float32 noise reaches 7e-7 of the largest value
CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 3},
}
SIGLIP_TEXT = {
    **{"context_length": 16, "vocab_size": 16, "width": 24, "heads": 2, "layers": 2},
    **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
    **{"act_kwargs": {"approximate": "tanh"}, "tokenizer_kwargs": {"clean": "canonicalize"}, "hf_tokenizer_name": "."},
}
SIGLIP = {
    **{"embed_dim": 32, "init_logit_bias": -10, "custom_text": True, "text_cfg": SIGLIP_TEXT},
    "vision_cfg": {"image_size": SIDE, "timm_model_name": "vit_of_siglip", "timm_pool": "map", "timm_proj": "none"},
}
PICTURES = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "squash"}
CROPPED = {**PICTURES, "interpolation": "bilinear", "resize_mode": "shortest"}
TEXTS = ["a red dog", "A Photo, of the_large SQUARE!", ""]


@pytest.fixture(scope="module", autouse=True)
def tower():
    """A small ViT with SigLIP's attention pool, under a name of its own in timm."""
    timm = pytest.importorskip("timm", reason="needs timm")
    from timm.models.vision_transformer import VisionTransformer

    def vit_of_siglip(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
        sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
        return VisionTransformer(**sizes, act_layer="gelu_tanh", norm_layer=None, **options)

    vit_of_siglip.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(vit_of_siglip)


def write_folder(folder, config, pictures=PICTURES, tokenizer=None):
    """Random weights in open_clip's layout."""
    folder.mkdir()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    told = {"model_cfg": config, "preprocess_cfg": pictures}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@torch.no_grad()
def check_outputs(folder, converted):
    """The folder, loaded by transformers alone, embeds and scores as open_clip does."""
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    theirs.eval()
    model, processor = AutoModel.from_pretrained(converted), AutoProcessor.from_pretrained(converted, backend="pil")
    pictures = [Image.effect_noise((70, 50), 60).convert("RGB"), Image.linear_gradient("L").convert("RGB")]
    pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    found = projected(model.get_image_features(pixel_values=pixels))
    expected = theirs.encode_image(torch.stack([transform(picture) for picture in pictures]))
    assert (found - expected).abs().max() <= GATE * expected.abs().max()
    found = projected(model.get_text_features(**tokenize_texts(model, processor, TEXTS)))
    expected = theirs.encode_text(ids)
    assert (found - expected).abs().max() <= GATE * expected.abs().max()
    assert model.logit_scale.item() == theirs.logit_scale.item()
    return model, processor, ids


@pytest.fixture(scope="module")
def small(tiny_clip_dir):
    """The folder of CLIP's tokenizer with few words, and fields of a text encoder that reads with it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip_dir)
    return tokenizer, {**CLIP["text_cfg"], "vocab_size": len(tokenizer), "hf_tokenizer_name": "."}


@pytest.mark.parametrize(
    ("spec", "hub_id", "licence"),
    [
        ("ViT-B-16-quickgelu:dfn2b", "apple/DFN2B-CLIP-ViT-B-16", "apple-amlr"),
        ("hf-hub:apple/DFN5B-CLIP-ViT-H-14", "apple/DFN5B-CLIP-ViT-H-14", "apple-amlr"),
        ("ViT-B-32:laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "mit"),
        ("hf-hub:me/mine", "me/mine", None),
    ],
)
def test_the_licence_is_that_of_the_weights_page_or_what_is_known_of_them(spec, hub_id, licence, monkeypatch):
    source = conversion._Source(spec, {}, None, None)
    asked = []

    def load(name):
        asked.append(name)
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(conversion.ModelCard, "load", load)
    front, said = conversion._read_licence(source)
    assert asked == [hub_id]
    if licence is None:
        assert "license" not in front and said.startswith("Not known here")
    else:
        assert f"license: {licence}" in front.splitlines()
        assert said.startswith(f"{licence}, as weights of {hub_id} are published; their card was not read.")
    card = SimpleNamespace(data={"license": "cc-by-nc-4.0"})
    monkeypatch.setattr(conversion.ModelCard, "load", lambda name: card)
    front, said = conversion._read_licence(source)
    assert "license: cc-by-nc-4.0" in front and said.startswith(f"cc-by-nc-4.0, as the card of {hub_id} says.")


@pytest.mark.parametrize("is_own", [True, False], ids=["cropped", "squashed"])
def test_a_clip_gives_open_clips_embeddings_and_keeps_its_licence(small, tmp_path, capsys, is_own):
    if is_own:  # open_clip's tokenizer
        folder, activation = write_folder(tmp_path / "theirs", CLIP, CROPPED), "gelu"
    else:  # keys behind `text.`
        config, activation = {**CLIP, "quick_gelu": True, "custom_text": True, "text_cfg": small[1]}, "quick_gelu"
        folder = write_folder(tmp_path / "theirs", config, PICTURES, small[0])
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n")
    main(["open_clip", str(folder), str(tmp_path / "ours")])
    told = capsys.readouterr().out
    assert "CLIPModel, " in told and "all 62 weights of open_clip's model have their place" in told
    same, read = re.search(r"embeddings: (\S+) of the largest value on the same input, (\S+) on plain", told).groups()
    assert max(float(same), float(read)) <= GATE
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "license_name: apple-amlr" in card and "Licence: apple-amlr" in told
    model, processor, _ = check_outputs(folder, tmp_path / "ours")
    assert type(model).__name__ == "CLIPModel" and type(processor).__name__ == "CLIPProcessor"
    text, images = model.config.text_config, processor.image_processor
    assert {text.hidden_act, model.config.vision_config.hidden_act} == {activation}
    assert (text.hidden_size, text.intermediate_size, text.max_position_embeddings) == (16, 48, 24)
    assert processor.tokenizer.model_max_length == 24 and list(images.image_mean) == PICTURES["mean"]
    assert text.eos_token_id == text.vocab_size - 1 == processor.tokenizer.eos_token_id
    assert load_student(str(tmp_path / "ours")).config.projection_dim == 12  # a CLIP to train


def siglip_folder(folder, tokenizer, **text):
    config = {**SIGLIP_TEXT, "vocab_size": len(tokenizer), **text}
    return write_folder(folder, {**SIGLIP, "text_cfg": config}, PICTURES, tokenizer)


def make_gemma_tokenizer():
    """SigLIP 2's, which tells capitals apart; of letters."""
    letters = "abcdefghijklmnopqrstuvwxyzADEPRQSU,_!▁"
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    vocabulary |= {letter: 5 + place for place, letter in enumerate(letters)}
    return GemmaTokenizer(vocabulary, [], padding_side="right", add_bos_token=False, add_eos_token=True)


def test_a_siglip_gives_open_clips_embeddings_and_reads_its_texts(tmp_path):
    folder = siglip_folder(tmp_path / "theirs", make_gemma_tokenizer())
    done = convert_open_clip(f"local-dir:{folder}", tmp_path / "ours")
    assert max(done.same, done.read) <= GATE and done.notes == []
    model, processor, ids = check_outputs(folder, tmp_path / "ours")
    assert type(model).__name__ == "SiglipModel" and type(processor).__name__ == "SiglipProcessor"
    weights = load_file(folder / "open_clip_model.safetensors")
    assert model.logit_bias.item() == weights["logit_bias"].item() != -10
    read = processor.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    words = processor.tokenizer.decode(ids[1], skip_special_tokens=True)
    assert torch.equal(read, ids) and words.strip() == "a photo of the"  # 16 places: lower case, no comma
    assert model.config.text_config.hidden_act == model.config.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert load_student(str(tmp_path / "ours")).config.model_type == "siglip"


def test_a_siglip_without_a_text_projection_gets_the_identity(tmp_path):
    folder = siglip_folder(
        tmp_path / "theirs", make_word_tokenizer(16, "$A </s>"), proj_bias=False, proj_type="none", width=32
    )
    done = convert_open_clip(folder, tmp_path / "ours")
    assert "identity" in done.notes[0] and torch.equal(done.model.text_model.head.weight, torch.eye(32))
    check_outputs(folder, tmp_path / "ours")


def test_a_tokenizer_that_cannot_be_told_to_clean_texts_is_refused(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    folder = siglip_folder(tmp_path / "theirs", make_siglip_tokenizer(tmp_path))
    with pytest.raises(WrongModelError, match=r"a tokenizer with tokenizer\.json .* got a SiglipTokenizer"):
        convert_open_clip(folder, tmp_path / "ours")


def test_a_model_that_reads_texts_at_token_2_is_a_metaclip_2(tmp_path):
    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]  # the end token is not the highest id
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    text = {**CLIP["text_cfg"], "vocab_size": 20, "pool_type": "eos", "eos_id": 2, "hf_tokenizer_name": "."}
    folder = write_folder(tmp_path / "theirs", {**CLIP, "text_cfg": text}, tokenizer=tokenizer)
    convert_open_clip(folder, tmp_path / "ours")
    model, _, _ = check_outputs(folder, tmp_path / "ours")
    assert model.config.model_type == "metaclip_2" and model.config.text_config.eos_token_id == 2


def test_weights_that_were_exported_for_open_clip_come_back(tiny_clip_dir):
    student, back = load_student(str(tiny_clip_dir)), CLIPModel.from_pretrained(tiny_clip_dir)
    for parameter in back.parameters():
        torch.nn.init.zeros_(parameter)
    assert place_weights(back, to_open_clip_weights(student), "clip", "the export") == []
    assert equal(back.state_dict(), student.state_dict())


def test_kinds_of_open_clips_own_architectures():
    kinds = {}
    for name in open_clip.list_models():
        try:
            kinds[name] = find_kind(open_clip.get_model_config(name), name)
        except WrongModelError:
            kinds[name] = None
    for name, kind in kinds.items():
        if re.fullmatch(r"ViT-.*-(SigLIP.*)", name):
            assert kind == "siglip", name
        elif "worldwide" in name:
            is_second = open_clip.get_model_config(name)["text_cfg"]["eos_id"] == 2
            assert kind == ("metaclip_2" if is_second else "clip"), name
        elif re.fullmatch(r"ViT-(S|M|B|L|H|g|e|bigG)-\d+(-plus|-alt)?(-\d+)?(-quickgelu)?", name):
            assert kind == (None if name == "ViT-M-16-alt" else "clip"), name
        elif not name.startswith("tiny-"):  # of other tests
            assert kind is None, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coca_ViT-B-32", "got a CoCa, which has a decoder"),
        ("RN50", r"got a ResNet of \[3, 4, 6, 3\] layers"),
        ("MobileCLIP-S1", "Expected timm_pool 'map' in vision_cfg of fastvit_mci1 .* got 'avg'"),
        ("convnext_base", "vision_cfg of convnext_base"),
        ("PE-Core-B-16", "Expected timm_proj 'none' in vision_cfg of vit_pe_core_base_patch16_224"),
        ("xlm-roberta-base-ViT-B-32", "a text encoder of open_clip's own .* got the model 'xlm-roberta-base'"),
        ("ViT-H-14-CLIPA", "Expected no_ln_pre False"),
        ("ViT-M-16-alt", r"Expected ls_init_value None in vision_cfg .* got 0\.0001"),
    ],
)
def test_other_kinds_are_refused_before_any_weight_is_fetched(name, message, tmp_path):
    with pytest.raises(WrongModelError, match=f"{message}.*Taken are the ViTs of CLIP"):
        convert_open_clip(f"{name}:any", tmp_path / "out")


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    config = {**CLIP, "text_cfg": small[1]}
    return write_folder(tmp_path_factory.mktemp("plain") / "theirs", config, CROPPED, small[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights, told: weights.pop("ln_final.bias"), 'Missing key.*"ln_final.bias"'),
        (lambda weights, told: weights.update({"fusion.weight": torch.zeros(1)}), 'Unexpected key.*"fusion.weight"'),
        (lambda weights, told: weights["ln_final.bias"].fill_(torch.nan), "finite weights at 'ln_final.bias'"),
        (  # open_clip would stretch the positions
            lambda weights, told: told["model_cfg"]["vision_cfg"].update(image_size=64),
            r"1 of another shape: visual.positional_embedding \(expected \(65, 32\), got \(17, 32\)\)",
        ),
        (lambda weights, told: told["model_cfg"].update(init_logit_bias=-10), "Expected no init_logit_bias"),
        (lambda weights, told: told["preprocess_cfg"].update(resize_mode="longest"), "resize_mode .* got 'longest'"),
        (
            lambda weights, told: told["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"strip_sep_token": True}),
            "Expected a plain tokenizer .* got one with strip_sep_token True",
        ),
        (lambda weights, told: told.pop("model_cfg"), "has no key 'model_cfg'"),
    ],
    ids=["missing", "extra", "nan", "stretched", "bias", "longest", "tokenizer", "config"],
)
def test_what_has_no_place_is_named_and_nothing_is_written(plain, tmp_path, damage, message):
    folder = tmp_path / "theirs"
    shutil.copytree(plain, folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    told = json.loads((folder / "open_clip_config.json").read_text())
    damage(weights, told)
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(FAILURES, match=f"(?s){message}"):
        convert_open_clip(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_other_embeddings_than_open_clips_are_refused(plain, tmp_path, monkeypatch):
    place = conversion.place_weights

    def misplace(model, weights, kind, spec):
        weights["visual.ln_post.bias"] = weights["visual.ln_post.bias"] + 1e-2
        return place(model, weights, kind, spec)

    monkeypatch.setattr(conversion, "place_weights", misplace)
    with pytest.raises(ValueError, match="Expected open_clip to give the model's outputs to 1e-04, got a difference"):
        convert_open_clip(plain, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "Expected NAME:PRETRAINED, hf-hub:.* got 'nothing'"),
        ("ViT-B-33:openai", "an architecture that open_clip knows, got 'ViT-B-33'"),
        ("ViT-B-32:openai", "Expected open_clip:ViT-B-32-quickgelu:openai, as these weights .* QuickGELU"),
        ("local-dir:nowhere", "configuration of open_clip"),
    ],
)
def test_a_wrong_spec_is_named(spec, message, tmp_path):
    with pytest.raises(FAILURES, match=message):
        convert_open_clip(spec, tmp_path / "out")


def test_weights_of_the_other_activation_are_refused_wherever_they_are_loaded():
    with pytest.raises(ValueError, match="Expected open_clip:ViT-L-14-quickgelu:dfn2b"):
        load_open_clip("open_clip:ViT-L-14:dfn2b")


def test_a_folder_without_weights_is_named(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "theirs")
    (tmp_path / "theirs" / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="Expected weights in .* open_clip_model.safetensors or"):
        convert_open_clip(tmp_path / "theirs", tmp_path / "out")
