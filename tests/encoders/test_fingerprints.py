"""The primitives that every content hash is made of. Values that must not change are in test_pinned_keys.py."""

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import modeling_dclip
from modeling_dclip import DCLIPModel
from modeling_dclip.encoders.families import is_image_side
from modeling_dclip.encoders.fingerprints import (
    canonical_json,
    combine_keys,
    fingerprint_model,
    fingerprint_text_encoder,
    fingerprint_weights,
    hash_bytes,
    hash_file,
    hash_git_blob,
    hash_json,
    hash_parts,
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
    parts = ["\u00e4", b"bytes", path, np.array([1, 2], np.uint8), ""]
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
