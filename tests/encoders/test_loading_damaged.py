"""A model's folder that is damaged, of another kind or out of bounds is named before anything is built or run."""

import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_dclip.distillation.run import load_student, read_clip
from modeling_dclip.encoders.families import WrongModelError
from modeling_dclip.encoders.loading import (
    load_dual_encoder,
    load_merged,
    load_processor,
    load_tokenizer,
    read_config,
)
from modeling_dclip.hub.export.towers import load_model
from modeling_dclip.modeling_dclip import DCLIPModel

DOORS = {
    "evaluation": load_dual_encoder,
    "publishing": load_merged,
    "export": load_model,
    "training": lambda folder: load_student(str(folder)),
}


@pytest.fixture
def model(tiny_clip_dir, tmp_path):
    """A copy of the tiny CLIP, to be damaged."""
    return shutil.copytree(tiny_clip_dir, tmp_path / "model")


def edit(path, change):
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


CONFIGS = {
    "a million layers": (put("vision_config", "num_hidden_layers", value=10**6), "num_hidden_layers.*got 1000000"),
    "negative layers": (put("text_config", "num_hidden_layers", value=-2), "num_hidden_layers.*got -2"),
    "no heads": (put("text_config", "num_attention_heads", value=0), "num_attention_heads.*got 0"),
    "odd heads": (put("vision_config", "num_attention_heads", value=7), "attention heads"),
    "too wide": (put("vision_config", "hidden_size", value=2**20), "hidden_size.*got 1048576"),
    "not the weights'": (put("text_config", "num_hidden_layers", value=900), "missing|of .* weights or more, got"),
    "much too large": (
        put("vision_config", value={"num_hidden_layers": 500, "hidden_size": 4096, "num_attention_heads": 8}),
        r"of [\d,]{10,} weights or more, got files with",
    ),
    "another vocabulary": (put("text_config", "vocab_size", value=77), "of another shape, such as .*token_embedding"),
    "no list": (lambda content: [1], "a model's configuration at '.*model'"),
    "a tower as a list": (put("text_config", value=[1]), "a model's configuration at '.*model'"),
    "words for a number": (put("text_config", "hidden_size", value="wide"), "configuration at '.*hidden_size"),
    "bert": (put("model_type", value="bert"), "got 'bert'|weights or more"),
    "no kind": (lambda content: content.pop("model_type") and None, "model_type|got None"),
}
WEIGHTS = {
    "not finite": (
        lambda weights: weights["visual_projection.weight"].fill_(math.nan),
        "NaN or infinity in visual_projection.weight",
    ),
    "zeros": (lambda weights: [value.zero_() for value in weights.values()], "got only zeros in "),
    "one tower of zeros": (
        lambda weights: [value.zero_() for name, value in weights.items() if name.startswith("text_model")],
        "got only zeros in text_model",
    ),
    "integers": (
        lambda weights: weights.update({"visual_projection.weight": weights["visual_projection.weight"].int()}),
        "expected|Expected weights as floating-point numbers in .*'visual_projection.weight' as I32",
    ),
    "another shape": (
        lambda weights: weights.update({"visual_projection.weight": torch.ones(3, 3)}),
        r"of another shape, such as visual_projection.weight with \(3, 3\) in place of",
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_checked_before_the_model_is_built(model, door, case):
    change, message = CONFIGS[case]
    edit(model / "config.json", change)
    start = time.monotonic()
    with pytest.raises((ValueError, OSError), match=message) as raised:
        DOORS[door](model)
    assert str(model) in str(raised.value) and time.monotonic() - start < 20


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_no_training_gives_are_refused(model, door, case):
    change, message = WEIGHTS[case]
    change_weights(model, change)
    with pytest.raises(ValueError, match=message) as raised:
        DOORS[door](model)
    assert str(model) in str(raised.value)


def test_files_that_are_no_weights_are_named(model):
    path = model / "model.safetensors"
    for content, message in (
        (b"", "damaged file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
        (path.read_bytes()[:-10], "damaged file"),
    ):
        path.write_bytes(content)
        for door in DOORS.values():
            with pytest.raises(ValueError, match=f"Expected whole weights in '{path}', .*{message}"):
                door(model)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors or pytorch_model.bin in .*, got none"):
        load_dual_encoder(model)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_the_weights_of_the_first_clips_are_read_without_running_code(model, door):
    path, whole = model / "pytorch_model.bin", load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(whole, path)
    loaded = door(model)
    state = (loaded[0] if isinstance(loaded, tuple) else loaded).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())
    written, told = model / "written", f"Expected whole weights in '{path}', to be read without running code, got: "
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[:-100], pickle.dumps(Payload(written)), b"version https://git-lfs\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=told) as caught:
            door(model)
        assert "weights_only" not in str(caught.value)
    torch.save({"logit_scale": whole["logit_scale"]}, path)
    with pytest.raises(ValueError, match="Expected all weights of .* missing"):
        door(model)
    assert not written.exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("pool INTERNAL ASSERT FAILED at ParallelOpenMP.cpp:64. Invalid thread pool!", RuntimeError),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", RuntimeError),
        ("We encountered some issues during automatic conversion of the weights.", ValueError),
    ],
)
def test_an_error_of_the_machine_is_not_told_as_one_of_the_weights(model, monkeypatch, said, told):
    def fail(*args, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(DCLIPModel, "from_pretrained", fail)
    with pytest.raises(told) as caught:
        load_merged(model)
    fetched = f"Expected weights at '{model}' that fit its configuration, got: {said[:-1]}. Fetch them again."
    assert str(caught.value) == (fetched if told is ValueError else said)


def test_an_index_that_names_files_that_are_not_there_is_named(model):
    index = {"metadata": {}, "weight_map": {"visual_projection.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match="model-00002-of-00002.safetensors|missing"):
        load_merged(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_or_a_link_to_nothing_in_a_folder_is_named_and_never_opened(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    for load in (*DOORS.values(), load_processor, load_tokenizer):
        with pytest.raises(ValueError, match=f"a pipe, a device or a link to nothing: '{name}'"):
            load(model)
    (model / name).unlink()
    (model / name).symlink_to(model / "nowhere")
    with pytest.raises(ValueError, match=f"a link to nothing: '{name}'"):
        load_dual_encoder(model)


@pytest.mark.parametrize(("field", "value"), [("image_size", []), ("image_size", [32, 32]), ("patch_size", [8])])
def test_sizes_that_are_lists_are_refused_where_the_family_takes_squares(model, field, value):
    edit(model / "config.json", lambda content: content["vision_config"].update({field: value}))
    with pytest.raises(ValueError, match=f"vision_config.{field}: expected an integer, got"):
        load_dual_encoder(model)


def test_a_folder_without_a_configuration_is_named(model):
    (model / "config.json").unlink()
    for door in DOORS.values():
        with pytest.raises((ValueError, OSError), match=f"config.json|'{model}'"):
            door(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("image_std", value=[0, 1, 1]), r"image_std: expected a number above 0 to 1000.0, got 0"),
        (put("image_mean", value=[math.nan, 0, 0]), "image_mean: expected .* got nan"),
        (put("rescale_factor", value=0), "rescale_factor: expected .* got 0"),
        (put("size", value={"shortest_edge": 0}), "size.shortest_edge: expected a number from 1 to 16384, got 0"),
        (put("crop_size", value={"height": -1, "width": 8}), "crop_size.height: expected .* got -1"),
        (put("crop_size", value={"height": 10**6, "width": 8}), "crop_size.height: expected .* got 1000000"),
        (lambda content: [1], "the files of a processor"),
        (put("image_mean", value=[None]), "image_mean: expected a number .* got None"),
        (put("image_mean", value=[]), "an image processor .* that makes pixels of a picture, got: mean must have 3"),
        (put("rescale_factor", value={"a": 1}), "rescale_factor: expected a number .* got {'a': 1}"),
    ],
)
def test_an_image_processor_that_makes_no_picture_is_refused(model, change, message):
    for path in (model / "preprocessor_config.json", model / "processor_config.json"):
        if path.is_file():
            nested = "image_processor" in json.loads(path.read_text())
            edit(path, lambda content: change(content["image_processor"] if nested else content))  # noqa: B023
    for load in (load_dual_encoder, load_processor, read_clip):
        with pytest.raises(ValueError, match=message) as raised:
            load(str(model))
        assert str(model) in str(raised.value)


def test_a_damaged_tokenizer_is_named(model):
    path = model / "tokenizer.json"
    whole = path.read_text()
    for content in (whole[: len(whole) // 2], "[]", '{"model": 3}'):
        path.write_text(content)
        for load in (load_dual_encoder, load_processor, load_tokenizer):
            with pytest.raises(ValueError, match=f"Expected the files of a (processor in|tokenizer at) '{model}'"):
                load(str(model))


@pytest.mark.parametrize("length", [[77], "77", 0, -3, True])
def test_a_tokenizer_whose_longest_text_is_no_number_of_tokens_is_refused(model, length):
    edit(model / "tokenizer_config.json", lambda content: content | {"model_max_length": length})
    for load in (load_dual_encoder, load_processor, load_tokenizer):
        with pytest.raises(ValueError, match="number of tokens from 1 under 'model_max_length' .*model', got"):
            load(model)


def test_a_tokenizer_of_more_words_than_the_text_encoder_embeds_is_refused(model):
    width = json.loads((model / "config.json").read_text())["text_config"]["hidden_size"]
    change_weights(
        model,
        lambda weights: weights.update({"text_model.embeddings.token_embedding.weight": torch.randn(12, width)}),
    )
    edit(model / "config.json", put("text_config", "vocab_size", value=12))
    for load in (load_dual_encoder, read_clip):
        with pytest.raises(ValueError, match=r"Expected a tokenizer of at most 12 tokens in .*, got ids up to \d+"):
            load(str(model))


def test_another_kind_of_model_is_a_wrong_model(tiny_clip_dir):
    with pytest.raises(WrongModelError, match="Expected a model of type siglip at .*, got 'clip'"):
        read_config(tiny_clip_dir, ["siglip"])


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_model_is_not_run_unless_asked_for(model, tmp_path, known, monkeypatch):
    written = tmp_path / "written"
    code = f"from pathlib import Path\nPath({str(written)!r}).touch()\nfrom transformers import CLIPConfig as Evil\n"
    (model / "evil.py").write_text(code)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (model / name).is_file():
            edit(model / name, lambda content: content | {"auto_map": auto_map})
    if not known:
        edit(model / "config.json", put("model_type", value="evil"))
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked at the keyboard"))
    for load in (*DOORS.values(), load_processor, load_tokenizer, read_config):
        try:
            load(model if load is not read_clip else str(model))
        except (ValueError, OSError) as error:
            assert str(model) in str(error)
    assert not written.exists()


class Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_of_open_clip_runs_no_code(tmp_path):
    pytest.importorskip("open_clip")
    written = tmp_path / "written"
    torch.save({"state_dict": {"a": Payload(written)}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="or one that only running its code could read, which is not done"):
        load_dual_encoder(f"open_clip:RN50:{tmp_path / 'evil.pt'}")
    assert not written.exists()


def test_a_damaged_adapter_is_named(model):
    pytest.importorskip("peft")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["q_proj"]}
    adapter = model.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"cut")
    for content in (config, config | {"peft_type": "nope"}, config | {"r": "two"}):
        (adapter / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"Expected an adapter at '{adapter}', got: "):
            load_merged(adapter)
