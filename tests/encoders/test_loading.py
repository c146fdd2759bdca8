"""Every family of dual encoders embeds as it does alone on what its own processor makes, one row at a time;
what is none is refused.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from fixtures.tiny_dual_encoders import (
    FAMILIES,
    TEXT,
    VISION,
    make_siglip_tokenizer,
    make_word_tokenizer,
    save_dual_encoder,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModelWithProjection,
    FlavaConfig,
    FlavaModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from modeling_dclip import DCLIPModel, DCLIPTeacher
from modeling_dclip.data.reinforced.teachers import build_teacher
from modeling_dclip.distillation.run import load_student
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.families import WrongModelError, tokenize_texts
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.encoders.loading import load_checked, load_dual_encoder, load_merged, stored_dtype
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.hub.index import SearchIndex
from modeling_dclip.hub.index.build import build_index
from modeling_dclip.hub.index.embeddings import fingerprint_encoder

TEXTS = ["a red dog", "the small blue circle and a large square", "dog", "a photo of the red square and of the dog"]
# How each family was trained to read one text.
TRAINED = dict.fromkeys(FAMILIES, {"padding": False}) | dict.fromkeys(
    ("siglip", "siglip2_naflex"), {"padding": "max_length", "truncation": True, "max_length": 16}
)


@pytest.fixture(scope="module", params=FAMILIES)
def family_dir(request, tmp_path_factory):
    """`(family, folder of a random checkpoint)`."""
    return request.param, save_dual_encoder(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def embed_alone(folder, family, images):
    """transformers' own model on its own processor's outputs, one row at a time."""
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    image_rows, text_rows = [], []
    for image in images:
        inputs = processor.image_processor(images=image, return_tensors="pt")
        image_rows.append(model.get_image_features(**inputs).pooler_output)
    for text in TEXTS:
        tokens = processor(text=[text], return_tensors="pt", **TRAINED[family])
        text_rows.append(model.get_text_features(**tokens).pooler_output)
    return [F.normalize(torch.cat(rows), dim=1) for rows in (image_rows, text_rows)]


def test_embeddings_are_those_of_transformers_alone_whatever_the_batch(family_dir, tiny_scenes):
    family, folder = family_dir
    images, texts = embed_alone(folder, family, tiny_scenes["image"])
    assert (images[0] - images[1]).abs().max() > 1e-3 < (texts[0] - texts[1]).abs().max()
    model, processor, revision = load_dual_encoder(folder)
    assert revision == model_revision(folder, model) and not model.training and model.dtype == torch.float32
    for batch_size in (1, 3, 8):
        found = embed_images(Encoder(model, processor, batch_size=batch_size), tiny_scenes)
        assert torch.allclose(found, images, atol=2e-6)
        assert torch.allclose(embed_texts(Encoder(model, processor), TEXTS, batch_size=batch_size), texts, atol=2e-6)


def test_a_text_too_long_for_the_model_is_cut_and_counted(family_dir, caplog):
    _, folder = family_dir
    model, processor, _ = load_dual_encoder(folder)
    with caplog.at_level("WARNING"):
        embeds = embed_texts(Encoder(model, processor), ["dog " * 50, "dog " * 60, "dog"])
    assert torch.allclose(embeds[0], embeds[1], atol=1e-6) and not torch.allclose(embeds[0], embeds[2], atol=1e-3)
    assert "Cut 2 of 3 texts after" in caplog.text and "'dog dog" in caplog.text


def test_siglip_reads_padding_which_nobody_else_does(family_dir):
    family, folder = family_dir
    model, processor, _ = load_dual_encoder(folder)
    tokens = tokenize_texts(model, processor, TEXTS[:1], max_length=9)
    longer = tokenize_texts(model, processor, TEXTS[:2], max_length=9)
    assert ("attention_mask" in tokens) is not family.startswith("siglip")
    lengths = [made["input_ids"].shape[1] for made in (tokens, longer)]
    assert lengths == ([16, 16] if family.startswith("siglip") else [5, 9])
    with torch.no_grad():
        short = model.get_text_features(input_ids=tokens["input_ids"][:, :8]).pooler_output
        whole = model.get_text_features(**tokens).pooler_output
    assert family.startswith("siglip") is not torch.allclose(short, whole, atol=1e-4)


@torch.no_grad()
def test_a_siglip_with_its_own_tokenizer_reads_as_it_was_trained(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    tokenizer = make_siglip_tokenizer(tmp_path)
    text = {**TEXT, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 16}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(tmp_path)
    SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    model, processor, _ = load_dual_encoder(tmp_path)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (4, 16)
    expected = F.normalize(SiglipModel.from_pretrained(tmp_path).eval().get_text_features(**tokens).pooler_output)
    assert torch.allclose(embed_texts(Encoder(model, processor), TEXTS, batch_size=3), expected, atol=2e-6)
    assert torch.equal(*embed_texts(Encoder(model, processor), ["a red dog", "A red, dog!"]))
    first = build_teacher(str(tmp_path)).fingerprint
    assert build_teacher(str(tmp_path)).fingerprint == first
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    assert build_teacher(str(tmp_path)).fingerprint != first


def test_a_dclip_is_the_clip_it_was_made_from(tmp_path, tiny_clip_dir, tiny_scenes):
    DCLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    ours, clip = load_dual_encoder(tmp_path), load_dual_encoder(str(tiny_clip_dir))
    assert isinstance(ours[0], DCLIPModel) and ours[2] == clip[2]  # the same weights
    assert torch.equal(embed_images(Encoder(*ours[:2]), tiny_scenes), embed_images(Encoder(*clip[:2]), tiny_scenes))
    assert torch.equal(embed_texts(Encoder(*ours[:2]), TEXTS), embed_texts(Encoder(*clip[:2]), TEXTS))


def test_a_checkpoint_without_a_tower_is_refused(tiny_clip_dir, tmp_path):
    CLIPVisionModelWithProjection.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Expected a dual encoder .*got CLIPVisionModel without"):
        load_dual_encoder(tmp_path)
    # The same weights under the config of the whole: transformers would draw the rest at random, with a warning.
    CLIPModel.from_pretrained(tiny_clip_dir).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Expected all weights of CLIPModel .* missing \(logit_scale, text_model"):
        load_dual_encoder(tmp_path)


def test_missing_folders_weights_and_processors_are_named(tiny_clip_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a folder with a model at .*gone"):
        load_dual_encoder(tmp_path / "gone")
    model = CLIPModel.from_pretrained(tiny_clip_dir)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Expected \*.safetensors or pytorch_model.bin in .*, got none"):
        load_dual_encoder(tmp_path)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil").image_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer that tells letters apart in .* got a CLIPTokenizer of 2 tokens"):
        load_dual_encoder(tmp_path)


def test_damaged_weights_and_missing_preprocessing_are_told_in_one_line(tiny_clip_dir, tmp_path):
    for name in ("cut", "bare"):
        shutil.copytree(tiny_clip_dir, tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ValueError,
        match=r"Expected whole weights in '.*cut/model.safetensors', got a damaged file \(.*\). Fetch it again",
    ):
        load_dual_encoder(tmp_path / "cut")
    for file in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="Expected the files of a processor in .*bare") as caught:
        load_dual_encoder(tmp_path / "bare")
    assert "\n" not in str(caught.value)


def test_a_model_that_embeds_every_token_is_refused():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = FlavaConfig(
        image_config=small, text_config={**small, "vocab_size": 17}, multimodal_config=small, hidden_size=16
    )
    with pytest.raises(TypeError, match=r"Expected one embedding a row, \(B, D\).*got \(1, 5, "):
        embed_texts(Encoder(FlavaModel(config), make_word_tokenizer(16)), TEXTS[:1])


OPEN_CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SIGLIP_TEXT = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def tiny_open_clip(request, tmp_path_factory):
    """`(name, file of weights)` of a random model, and open_clip's own functions for it."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    folder, name = tmp_path_factory.mktemp("open_clip"), f"tiny-{request.param}"
    config = {**OPEN_CLIP_CONFIG}
    if request.param == "siglip":
        config |= {"custom_text": True, "text_cfg": {**config["text_cfg"], **SIGLIP_TEXT}}
        config["text_cfg"]["hf_tokenizer_name"] = str(folder)
        config["vision_cfg"] = {**config["vision_cfg"], "attentional_pool": False, "pool_type": "avg"}
        make_word_tokenizer(24, "$A </s>").save_pretrained(folder)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / "weights.pt")
    return name, folder / "weights.pt"


@torch.no_grad()
def test_an_open_clip_model_embeds_as_open_clip_does(tiny_open_clip, tiny_scenes):
    import open_clip

    name, weights = tiny_open_clip
    theirs, transform = open_clip.create_model_from_pretrained(name, pretrained=str(weights))
    theirs.eval()
    pictures = tiny_scenes["image"][:]
    images = theirs.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
    texts = theirs.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
    model, processor, revision = load_dual_encoder(f"open_clip:{name}:{weights}")
    assert revision.startswith("sha256:") and not model.training
    for batch_size in (1, 3, 8):
        found = embed_images(Encoder(model, processor, batch_size=batch_size), tiny_scenes)
        assert torch.allclose(found, images, atol=2e-6)
        assert torch.allclose(embed_texts(Encoder(model, processor), TEXTS, batch_size=batch_size), texts, atol=2e-6)


@pytest.mark.parametrize("tiny_open_clip", ["clip"], indirect=True)
def test_the_revision_of_an_open_clip_model_is_of_its_weights(tiny_open_clip, tmp_path):
    name, weights = tiny_open_clip
    state = torch.load(weights, weights_only=True)
    torch.save(state, tmp_path / "copy.pt")
    first, copy = (load_dual_encoder(f"open_clip:{name}:{path}")[2] for path in (weights, tmp_path / "copy.pt"))
    state["logit_scale"] += 1
    torch.save(state, tmp_path / "other.pt")
    assert first == copy != load_dual_encoder(f"open_clip:{name}:{tmp_path / 'other.pt'}")[2]


@pytest.mark.parametrize("tiny_open_clip", ["clip"], indirect=True)
def test_a_folder_of_open_clip_holds_architecture_and_weights(tiny_open_clip, tmp_path, tiny_scenes):
    name, weights = tiny_open_clip
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP_CONFIG}))
    with pytest.raises(ValueError, match="got none that load with open_clip:local-dir:"):
        load_dual_encoder(f"open_clip:local-dir:{tmp_path}")
    save_file(torch.load(weights, weights_only=True), tmp_path / "open_clip_model.safetensors")
    folder, file = (
        load_dual_encoder(f"open_clip:local-dir:{tmp_path}"),
        load_dual_encoder(f"open_clip:{name}:{weights}"),
    )
    assert folder[2] == file[2]
    assert torch.equal(embed_texts(Encoder(*folder[:2]), TEXTS), embed_texts(Encoder(*file[:2]), TEXTS))


@pytest.mark.parametrize("tiny_open_clip", ["clip"], indirect=True)
def test_names_and_weights_that_open_clip_lacks_are_refused(tiny_open_clip, tmp_path):
    name, weights = tiny_open_clip
    with pytest.raises(ValueError, match="architecture that open_clip knows, got 'ViT-B-31' .*Near it: .*ViT-B-32"):
        load_dual_encoder("open_clip:ViT-B-31:openai")
    with pytest.raises(ValueError, match="a file of weights or one of the tags .*'openai'.* of ViT-B-32, got 'opnai'"):
        load_dual_encoder("open_clip:ViT-B-32:opnai")
    state = torch.load(weights, weights_only=True)
    del state["logit_scale"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"Expected whole weights of the architecture .*part.pt: (.|\n)*logit_scale"):
        load_dual_encoder(f"open_clip:{name}:{tmp_path / 'part.pt'}")


@pytest.mark.parametrize("tiny_open_clip", ["clip"], indirect=True)
def test_an_index_can_be_built_with_an_open_clip_model(tiny_open_clip, tmp_path):
    name, weights = tiny_open_clip
    for color in ("red", "blue", "green"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), color).save(tmp_path / "pictures" / f"{color}.png")
    spec = f"open_clip:{name}:{weights}"
    build_index(spec, str(tmp_path / "pictures"), tmp_path / "index")
    found = SearchIndex.load(tmp_path / "index").search(tmp_path / "pictures" / "red.png", 1, keep_same=True)[0]
    assert found.path == str(tmp_path / "pictures" / "red.png") and found.score == pytest.approx(1, abs=1e-5)
    model, processor, _ = load_dual_encoder(spec)
    key = fingerprint_encoder(model, processor)
    assert key == fingerprint_encoder(*load_dual_encoder(spec)[:2])
    model.config.name = "other"  # an architecture that reads the same weights
    assert fingerprint_encoder(model, processor) != key


def test_a_checked_model_has_every_weight_stored_and_the_type_asked_for(tiny_clip_dir, tmp_path):
    model = load_checked(DCLIPModel, tiny_clip_dir)
    assert model.dtype == torch.float32 and not model.training
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_checked(DCLIPModel, tmp_path / "half").visual_projection.weight.dtype == torch.float32
    half = load_checked(AutoModel, tmp_path / "half", dtype=torch.bfloat16)
    assert half.visual_projection.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_stored_type_is_that_of_all_matrices_in_any_number_of_files(tiny_clip_dir, tmp_path, dtype):
    model = DCLIPModel.from_pretrained(tiny_clip_dir, dtype=getattr(torch, dtype))  # the logit scale stays float32
    for name, size in (("one", "1GB"), ("several", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        assert stored_dtype(tmp_path / name) == dtype
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    model.visual_projection.double()
    model.save_pretrained(tmp_path / "mixed")
    assert stored_dtype(tmp_path / "mixed") == "float32"
    for path in (tmp_path / "one").glob("*.safetensors"):
        path.unlink()  # the config alone, as of a Hub id
    model.config.dtype = dtype
    model.config.save_pretrained(tmp_path / "one")
    assert stored_dtype(tmp_path / "one") == dtype


def save_without(model, folder, start):
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(start)}
    model.save_pretrained(folder, state_dict=state)
    return folder


def test_a_missing_weight_is_refused_wherever_a_model_is_loaded(tiny_clip_dir, tmp_path):
    teacher = DCLIPTeacher.from_clip(str(tiny_clip_dir), cross_attention="regions")
    holed = save_without(teacher, tmp_path / "holed", "region_encoder.")
    bare = save_without(CLIPModel.from_pretrained(tiny_clip_dir), tmp_path / "bare", "logit_scale")
    refused = [
        (bare, r"DCLIPModel at .*bare', got 1 missing \(logit_scale\)", lambda: load_student(str(bare))),
        (bare, r"DCLIPModel at .*bare', got 1 missing \(logit_scale\)", lambda: load_merged(bare)),
        (bare, r"CLIPModel at .*bare', got 1 missing \(logit_scale\)", lambda: load_dual_encoder(bare)),
        (bare, r"a CLIP at .*bare', got 1 missing, the first logit_scale", lambda: DCLIPTeacher.from_clip(str(bare))),
        (holed, r"DCLIPTeacher at .*holed', got \d+ missing \(region_enc", lambda: load_checked(DCLIPTeacher, holed)),
    ]
    for folder, message, load in refused:
        assert (folder / "model.safetensors").is_file()
        with pytest.raises(ValueError, match=message):
            load()


def test_a_model_that_is_no_teacher_is_named(tiny_clip_dir):
    with pytest.raises(
        WrongModelError, match=f"Expected a model of type dclip_teacher at '{tiny_clip_dir}', got 'clip'"
    ):
        load_checked(DCLIPTeacher, tiny_clip_dir)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="Expected a model at 'nope', got neither a folder of that name nor a model"):
        load_dual_encoder("nope")
