"""The primitives that every content hash is made of. Values that must not change are in test_pinned_keys.py."""

import ast
import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import modeling_dclip
from modeling_dclip import DCLIPModel
from modeling_dclip.encoders.families import is_image_side
from modeling_dclip.encoders.fingerprints import (
    canonical_json,
    combine_keys,
    fingerprint_model,
    fingerprint_text_encoder,
    fingerprint_tokens,
    fingerprint_weights,
    hash_bytes,
    hash_file,
    hash_git_blob,
    hash_json,
    hash_parts,
    model_revision,
    tensor_bytes,
)


@pytest.fixture(scope="module")
def model(tiny_clip_dir):
    return DCLIPModel.from_pretrained(tiny_clip_dir)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def imports_hashlib(source):
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if "hashlib" in names or getattr(node, "module", None) == "hashlib":
            return True
    return False


def test_only_this_module_hashes():
    package = Path(modeling_dclip.__file__).parent
    hashing = [path for path in package.rglob("*.py") if imports_hashlib(path.read_text(encoding="utf-8"))]
    assert [path.relative_to(package).as_posix() for path in hashing] == ["encoders/fingerprints.py"]
    assert imports_hashlib("def f():\n    from hashlib import sha256") and not imports_hashlib("hashlib = 1")


def test_parts_are_hashed_as_if_they_were_joined(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"file")
    parts = ["\u00e4", b"bytes", path, np.array([1, 2], np.uint8).data, ""]
    assert hash_parts(parts) == hash_parts(iter(parts)) == sha256("\u00e4".encode() + b"bytesfile\x01\x02")
    assert hash_parts([]) == sha256(b"")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_is_hashed_as_its_bytes(tmp_path, size):
    path, content = tmp_path / "file", bytes(size)
    path.write_bytes(content)
    assert hash_file(path) == hash_file(str(path)) == hash_bytes(content) == sha256(content)
    assert hash_git_blob(path) == hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()


def test_a_missing_file_is_an_error(tmp_path):
    for hash_content in (hash_file, hash_git_blob):
        with pytest.raises(FileNotFoundError):
            hash_content(tmp_path / "none")


def test_json_is_hashed_whatever_the_order_of_its_fields():
    value = {"b": [1, None, "\u00e4"], "a": {"d": 0.5, "c": True}}
    again = {"a": {"c": True, "d": 0.5}, "b": [1, None, "\u00e4"]}
    assert hash_json(value) == hash_json(again) == sha256(canonical_json(value).encode())
    assert json.loads(canonical_json(value)) == value
    assert canonical_json({"path": Path("a")}) == '{"path": "a"}'
    with pytest.raises(TypeError, match="not JSON serializable"):
        hash_json({"path": Path("a")})


def test_keys_are_combined_in_their_order():
    assert combine_keys(["a", "b"]) == sha256(b"a\nb") != combine_keys(["b", "a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 2)])
def test_bytes_of_a_tensor_are_its_rows(dtype, shape):
    tensor = torch.arange(torch.tensor(shape).prod()).reshape(shape).to(dtype)
    found = tensor_bytes(tensor.clone().requires_grad_(tensor.is_floating_point()))
    assert found.tobytes() == bytes(tensor.contiguous().untyped_storage())
    turned = tensor.movedim(0, -1) if tensor.ndim else tensor
    assert tensor_bytes(turned).tobytes() == tensor_bytes(turned.contiguous()).tobytes()


def naive_weights(settings, state):
    content = json.dumps(settings, sort_keys=True).encode()
    for name in sorted(state):
        content += f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode()
        content += state[name].contiguous().numpy().tobytes()
    return sha256(content)


def test_a_model_is_its_settings_and_its_weights(model):
    state = {"b": torch.ones(2, 3), "a": torch.tensor(1, dtype=torch.int32)}
    settings = {"size": 2, "dtype": "float32", "text": {"size": 1, "model_type": "x"}}
    expected = naive_weights({"size": 2, "text": {"size": 1}}, state)
    assert fingerprint_weights(settings, state) == expected
    assert fingerprint_weights(settings, dict(reversed(state.items()))) == expected
    assert fingerprint_model(model) == fingerprint_weights(model.config.to_dict(), model.state_dict())
    for changed in ({"b": torch.ones(3, 2)}, {"b": torch.ones(2, 3).half()}, {"b": torch.zeros(2, 3)}):
        assert fingerprint_weights(settings, state | changed) != expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vision_model.embeddings.class_embedding", True),
        ("visual_projection.weight", True),
        ("model.visual.conv1.weight", True),
        ("logit_scale", True),
        ("model.logit_bias", True),
        ("text_model.visual.weight", False),
        ("text_projection.weight", False),
        ("logit_scale_of_texts", False),
        ("tower.weight", False),
    ],
)
def test_the_image_side_is_told_by_the_beginning_of_a_name(name, expected):
    assert is_image_side(name) is expected


def test_a_text_encoder_keeps_its_key_when_only_where_it_is_from_changes(model):
    key = fingerprint_text_encoder(model)
    before = model.config.text_config._name_or_path
    try:
        model.config.text_config._name_or_path = "elsewhere"
        assert fingerprint_text_encoder(model) == key
    finally:
        model.config.text_config._name_or_path = before


def changed(model, name):
    other = copy.deepcopy(model)
    with torch.no_grad():
        dict(other.named_parameters())[name].view(-1)[0] += 1
    return other


def test_the_text_side_makes_the_key_and_the_image_side_does_not(tiny_clip):
    model = tiny_clip[0]
    key = fingerprint_text_encoder(model)
    for name, _ in model.named_parameters():
        of_images = name.startswith(("vision_model.", "visual_projection.", "logit_scale"))
        assert (fingerprint_text_encoder(changed(model, name)) == key) == of_images, name
    half = copy.deepcopy(model).bfloat16()
    assert fingerprint_text_encoder(half) != key


def test_a_wrapped_models_image_side_is_told_by_name():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"visual": torch.nn.Linear(2, 2), "transformer": torch.nn.Linear(2, 2)})
            self.config = "ViT-B-32"

    torch.manual_seed(0)
    model = Wrapped()
    key = fingerprint_text_encoder(model)
    assert fingerprint_text_encoder(changed(model, "model.visual.weight")) == key
    assert fingerprint_text_encoder(changed(model, "model.transformer.weight")) != key
    model.config = "ViT-B-32-quickgelu"
    assert fingerprint_text_encoder(model) != key


def test_another_tokenizer_is_another_key(tiny_clip):
    tokenizer = tiny_clip[1].tokenizer
    key = fingerprint_tokens(tokenizer, ["a dog", "a red circle"])
    assert fingerprint_tokens(tiny_clip[1], ["a dog", "a red circle"]) == key
    assert fingerprint_tokens(tokenizer, ["a dog", "a blue circle"]) != key

    def as_tensor(texts, **kwargs):
        return {"input_ids": torch.tensor([[len(text)] for text in texts])}

    assert fingerprint_tokens(as_tensor, ["a dog"]) == fingerprint_tokens(as_tensor, ["a cat"]) != key


def test_revision_of_a_folder_follows_the_weights(tiny_clip_dir, tiny_clip, tmp_path):
    model = AutoModel.from_pretrained(tiny_clip_dir)
    revision = model_revision(tiny_clip_dir, model)
    assert revision.startswith("sha256:") and revision == model_revision(str(tiny_clip_dir), tiny_clip[0])
    model.visual_projection.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert model_revision(tmp_path, model) != revision


def test_revision_of_a_folder_follows_the_names_of_its_files(tmp_path, tiny_clip):
    revisions = set()
    for name in ("b", "c"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(b"the same")
        revisions.add(model_revision(folder, tiny_clip[0]))
    assert len(revisions) == 2


def test_a_folder_without_safetensors_is_named(tmp_path, tiny_clip):
    with pytest.raises(FileNotFoundError, match="safetensors or pytorch_model.bin in "):
        model_revision(tmp_path, tiny_clip[0])


def test_revision_of_the_hub_is_its_commit(tiny_clip_dir):
    model = AutoModel.from_pretrained(tiny_clip_dir)
    with pytest.raises(ValueError, match="commit hash with the model 'someone/model'"):
        model_revision("someone/model", model)
    model.config._commit_hash = "abc"
    assert model_revision("someone/model", model) == "commit:abc"


def test_a_field_that_came_later_changes_no_key_at_its_default_and_every_key_elsewhere():
    """Stage records and cached features of models that were saved before the field existed stay valid."""
    state = {"weight": torch.ones(2)}
    before = fingerprint_weights({"vision_config": {"rotary_base": 100.0}}, state)
    later = {"rotary_base": 100.0, "rotary_scale": 1.0, "rotary_table": False}
    assert fingerprint_weights({"vision_config": later}, state) == before
    for change in ({"rotary_scale": 0.3}, {"rotary_table": True}):
        assert fingerprint_weights({"vision_config": {**later, **change}}, state) != before
