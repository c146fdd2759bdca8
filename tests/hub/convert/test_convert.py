"""Foreign checkpoints: the same numbers come out, every key has its place, and a damaged file is named."""

import argparse
import json
import pickle

import pytest
import torch
from fixtures.naive_mambavision import MISTAKES, TINY, NaiveMambaVision, random_checkpoint, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS, DMCLIPVisionConfig
from modeling_dclip.hub import convert
from modeling_dclip.hub.convert import convert_mambavision
from modeling_dclip.hub.convert.__main__ import main
from modeling_dclip.hub.convert.checkpoints import read_checkpoint
from modeling_dclip.hub.convert.mambavision import published_mambavision_keys, read_mambavision_config
from modeling_dclip.modeling_dmclip import DMCLIPVisionModel

GATE = 2e-6  # relative; float32 noise reaches 5e-7, the subtlest mistake below makes 7e-6
CONFIGS = {
    "layer scale": (TINY, {}),
    "conv layer scale": (TINY, {"layer_scale": False, "conv_layer_scale": True}),
    "no layer scale, other depths": (
        {**TINY, "depths": [2, 1, 4, 1], "window_size": [4, 4, 4, 3], "num_heads": [1, 1, 2, 4], "mlp_ratio": 4},
        {"layer_scale": False},
    ),
}
SIZES = {"padded": (64, 80), "whole windows": (96, 192), "one window": (32, 32)}


@pytest.fixture
def tiny(tmp_path):
    """`(weights, checkpoint, config file)` of a random tiny model."""
    weights = random_checkpoint(TINY)
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "architectures": ["MambaVisionModel"]}))
    return weights, tmp_path / "weights.safetensors", tmp_path / "config.json"


@torch.no_grad()
def run(model, pixels):
    outputs = model(pixels)
    return outputs.pooler_output, outputs.image_embeds


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_converted_model_computes_what_the_published_one_does(tmp_path, name, size):
    config, options = CONFIGS[name]
    weights = random_checkpoint(config, **options)
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert_mambavision(tmp_path / "weights.safetensors", tmp_path / "out", tmp_path / "config.json")
    model = AutoModel.from_pretrained(tmp_path / "out")
    pixels = torch.randn(2, 3, *SIZES[size], generator=torch.Generator().manual_seed(1))
    expected = NaiveMambaVision(weights, config)(pixels)
    for found, wanted in zip(run(model, pixels), expected, strict=True):
        assert relative_error(found, wanted) <= GATE


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gate_would_notice(mistake):
    weights = random_checkpoint(TINY)
    pixels = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    right, wrong = (NaiveMambaVision(weights, TINY, made)(pixels)[0] for made in (None, mistake))
    assert relative_error(wrong, right) > 2 * GATE


@pytest.mark.parametrize("classes", [10, 512])
def test_the_head_is_the_projection(tiny, tmp_path, classes):
    _, _, config = tiny
    torch.save(random_checkpoint(TINY, classes=classes), tmp_path / "weights.pth.tar")
    model = convert_mambavision(tmp_path / "weights.pth.tar", tmp_path / "out", config)
    assert model.config.projection_dim == classes and model.projection.out_features == classes


def test_a_fresh_projection_leaves_the_head_out_and_all_else_alike(tiny, tmp_path):
    weights, checkpoint, config = tiny
    fresh = convert_mambavision(checkpoint, tmp_path / "fresh", config, projection_dim=12)
    again = convert_mambavision(checkpoint, tmp_path / "again", config, projection_dim=12)
    assert fresh.config.projection_dim == 12
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(run(fresh, pixels)[1], run(again, pixels)[1])  # drawn with a fixed seed
    assert relative_error(run(fresh, pixels)[0], NaiveMambaVision(weights, TINY)(pixels)[0]) <= GATE
    assert "untrained" in (tmp_path / "fresh" / "README.md").read_text()


def test_a_backbone_without_head_asks_for_a_projection(tiny, tmp_path):
    weights, _, config = tiny
    backbone = {key: value for key, value in weights.items() if not key.startswith("head.")}
    save_file(backbone, tmp_path / "backbone.safetensors")
    with pytest.raises(ValueError, match="Expected a head.*--projection_dim"):
        convert_mambavision(tmp_path / "backbone.safetensors", tmp_path / "out", config)
    model = convert_mambavision(tmp_path / "backbone.safetensors", tmp_path / "out", config, projection_dim=12)
    assert model.config.projection_dim == 12


@pytest.mark.parametrize("wrap", ["plain", "model.", "module.", "module.model.", "state_dict", "model", "training"])
def test_wrapped_weights_are_found(tiny, tmp_path, wrap):
    weights, _, _ = tiny
    if wrap.endswith("."):
        content = {f"{wrap}{key}": value for key, value in weights.items()}
    elif wrap == "training":
        prefixed = {f"module.{key}": value for key, value in weights.items()}
        content = {"epoch": 3, "args": argparse.Namespace(lr=1e-3), "state_dict": prefixed}
    else:
        content = weights if wrap == "plain" else {wrap: weights, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth.tar")
    found = read_checkpoint(tmp_path / "weights.pth.tar")
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


def test_half_precision_weights_convert_to_float32(tiny, tmp_path):
    weights, _, config = tiny
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    model = convert_mambavision(tmp_path / "half.safetensors", tmp_path / "out", config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.projection.weight, half["head.weight"].float())


def test_every_key_of_every_preset_has_one_published_name():
    for preset in DMCLIP_PRESETS.values():
        with torch.device("meta"):
            keys = list(DMCLIPVisionModel(DMCLIPVisionConfig(**preset)).state_dict())
        published = [name for key in keys for name in published_mambavision_keys(key)]
        assert len(set(published)) == len(published) > len(keys)
        assert all(name.startswith(("patch_embed.conv_down.", "levels.", "norm.", "head.")) for name in published)


@pytest.mark.parametrize("name", DMCLIP_PRESETS)
def test_presets_are_known_by_their_shapes(name):
    preset = DMCLIP_PRESETS[name]
    with torch.device("meta"):
        state = DMCLIPVisionModel(DMCLIPVisionConfig(**preset, projection_dim=1000)).state_dict()
    weights = {
        published: value[: value.shape[0] // len(names)] if len(names) > 1 else value
        for key, value in state.items()
        for names in [published_mambavision_keys(key)]
        for published in names
    }
    config, found = read_mambavision_config(weights, "weights.pth")
    assert found == name
    assert config.to_dict() == DMCLIPVisionConfig(**preset, projection_dim=1000).to_dict()


def test_shapes_of_no_preset_need_a_config(tiny, tmp_path):
    _, checkpoint, _ = tiny
    with pytest.raises(ValueError, match=r"depths \[1, 2, 3, 2\], dim 8, in_dim 6, mlp_ratio 3.0.*--config"):
        convert_mambavision(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 16}, r"'dim' in .*config.json: expected 8, as the shapes in .* say, got 16"),
        ({"depths": [1, 2, 3, 3]}, r"'depths' in .*: expected \[1, 2, 3, 2\]"),
        ({"num_heads": None}, r"'num_heads' in .*: expected positive numbers, got None"),
        ({"num_heads": [1, 2, 4, 7]}, r"a consistent architecture in .*config.json[\s\S]*num_heads"),
        ({"resolution": "224"}, r"'resolution' in .*: expected positive numbers, got '224'"),
    ],
)
def test_a_wrong_config_is_named(tiny, tmp_path, change, message):
    _, checkpoint, config = tiny
    config.write_text(json.dumps({**TINY, **change}))
    with pytest.raises(ValueError, match=message):
        convert_mambavision(checkpoint, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json', got invalid JSON"),
        ("[1]", "got list"),
        ('{"dim": 8}', "Expected the fields depths.*got no 'depths'"),
    ],
)
def test_a_config_that_is_none_is_named(tiny, tmp_path, text, message):
    _, checkpoint, config = tiny
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        convert_mambavision(checkpoint, tmp_path / "out", config)


KEY = "levels.2.blocks.1.mixer.dt_proj.bias"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda weights: weights.pop(KEY), f"1 missing: {KEY}"),
        (
            lambda weights: weights.update({"levels.2.blocks.1.mixer.dt.bias": weights.pop(KEY)}),
            rf"1 missing: {KEY}; 1 left over: levels\.2\.blocks\.1\.mixer\.dt\.bias",
        ),
        (
            lambda weights: weights.update({KEY: torch.zeros(5)}),
            rf"1 of another shape: {KEY} \(expected \(16,\), got \(5,\)\)",
        ),
        (lambda weights: weights.update({"fc.weight": torch.zeros(1)}), r"1 left over: fc\.weight"),
        (lambda weights: weights.pop("levels.2.blocks.0.mixer.conv1d_z.weight"), r"1 missing: .*conv1d_z\.weight"),
        (
            lambda weights: weights.pop("patch_embed.conv_down.3.weight"),
            r"'patch_embed\.conv_down\.3\.weight'.*1 missing",
        ),
        (lambda weights: weights.pop("norm.running_var"), r"1 missing: norm\.running_var"),
        (lambda weights: weights[KEY].fill_(float("nan")), f"Expected finite weights at '{KEY}'"),
        (lambda weights: weights.update({"levels.2.blocks.0.mixer.A_log": torch.zeros(8)}), "expected 2 dimensions"),
        (
            lambda weights: [weights.pop(key) for key in list(weights) if key.startswith("levels.3")],
            "Expected MambaVision's keys",
        ),
    ],
    ids=["missing", "renamed", "misshapen", "extra", "half missing", "telling", "statistic", "nan", "flat", "a stage"],
)
def test_a_damaged_checkpoint_is_named_key_by_key(tiny, tmp_path, damage, message):
    weights, _, config = tiny
    damage(weights)
    torch.save(weights, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=message):
        convert_mambavision(tmp_path / "damaged.pth", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


class Evil:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def whole(folder):
    path = folder / "whole"
    torch.save(random_checkpoint(TINY), path)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.safetensors", lambda folder: _safetensors(folder)[:-1000], "Expected whole safetensors in .*cut"),
        ("short.safetensors", lambda folder: b"\x01\x02", "Expected whole safetensors"),
        ("cut.pth", lambda folder: whole(folder)[:-1000], "damaged or foreign"),
        ("empty.pth", lambda folder: b"", "0 bytes"),
        ("page.pth", lambda folder: b"<!doctype html><html>Not found</html>", "running code|damaged or foreign"),
        ("module.pth", lambda folder: _saved(folder, torch.nn.Linear(2, 2)), "only running code could unpickle"),
        ("evil.pth", lambda folder: _saved(folder, {"a": Evil()}), "only running code could unpickle"),
        ("evil.pkl", lambda folder: pickle.dumps(Evil()), "only running code could unpickle|damaged or foreign"),
        ("list.pth", lambda folder: _saved(folder, [torch.zeros(1)]), "Expected a state dict in .*, got list"),
        ("none.pth", lambda folder: _saved(folder, {}), "got dict without weights"),
        ("number.pth", lambda folder: _saved(folder, {"epoch": 3}), "Expected a tensor at 'epoch'"),
        ("inner.pth", lambda folder: _saved(folder, {"state_dict": 3}), "Expected a state dict under 'state_dict'"),
        (
            "double.pth",
            lambda folder: _saved(folder, {"module.a": torch.ones(1), "a": torch.ones(1), "module.b": torch.ones(1)}),
            "Expected the key 'a' once",
        ),
        ("other.pth", lambda folder: _saved(folder, torch.nn.Linear(2, 2).state_dict()), "Is it a MambaVision"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        convert_mambavision(tmp_path / name, tmp_path / "out")
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


def _saved(folder, content):
    torch.save(content, folder / "saved")
    return (folder / "saved").read_bytes()


def _safetensors(folder):
    save_file(random_checkpoint(TINY), folder / "saved")
    return (folder / "saved").read_bytes()


@pytest.mark.parametrize("where, message", [("nowhere.pth", "nothing there"), (".", "a folder: name a file in it")])
def test_a_path_that_is_no_file_is_named(tmp_path, where, message):
    with pytest.raises(FileNotFoundError, match=message):
        convert_mambavision(tmp_path / where, tmp_path / "out")


def test_an_output_in_use_is_left_alone(tiny, tmp_path):
    _, checkpoint, config = tiny
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Expected a new or an empty folder at .*out"):
        convert_mambavision(checkpoint, tmp_path / "out", config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_folder_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    _, checkpoint, config = tiny

    def fail(path, text):  # the README, after weights and config
        assert (path.parent / "config.json").is_file()
        raise OSError("disk full")

    monkeypatch.setattr(convert, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_mambavision(checkpoint, tmp_path / "made" / "out", config)
    assert list((tmp_path / "made").iterdir()) == []


def test_an_empty_folder_is_filled(tiny, tmp_path):
    _, checkpoint, config = tiny
    output = tmp_path / "made" / "out"
    output.mkdir(parents=True)
    convert_mambavision(checkpoint, output, config)
    assert (output / "config.json").is_file() and list(output.parent.iterdir()) == [output]


def test_a_converted_folder_holds_all_a_reader_needs(tiny, tmp_path):
    _, checkpoint, config = tiny
    convert_mambavision(checkpoint, tmp_path / "out", config)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(processor.image_std) == (0.229, 0.224, 0.225)
    assert (processor.crop_size.height, processor.size.shortest_edge) == (64, 64)
    assert (tmp_path / "out" / "modeling_dmclip.py").exists() and (tmp_path / "out" / "selective_scan.py").exists()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "license: other" in readme and "non-commercial" in readme and "sha256" in readme
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == AutoModel.from_pretrained(tmp_path / "out").state_dict().keys()


def test_the_command_converts_and_says_the_licence(tiny, tmp_path, capsys):
    _, checkpoint, config = tiny
    main(["mambavision", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--config", str(config)])
    told = capsys.readouterr().out
    assert "DMCLIPVisionModel" in told and "non-commercial" in told


def test_the_command_ends_in_one_line_where_the_file_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["mambavision", "--checkpoint", str(tmp_path / "no.pth"), "--output", str(tmp_path / "out")])
    assert ended.value.code.startswith("Failed: Expected a checkpoint file at") and "\n" not in ended.value.code
    assert capsys.readouterr().err == ""  # no usage, which would hide it
