"""`eval.py --save_alpha` writes the weights that training with this `wise_ft_alpha` writes."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from fixtures.training import student_arguments
from safetensors.torch import load_file

from modeling_dclip.data.captions.parts import read_trained_images, write_trained_images
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student
from modeling_dclip.encoders.loading import load_dual_encoder


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("eval_script", Path(__file__).resolve().parents[2] / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_saved_point_is_what_training_with_this_wise_ft_alpha_saves(
    script, tiny_clip_dir, distillation_data, processor, tmp_path, capsys, dtype
):
    data = load_from_disk(distillation_data)
    for alpha in (1.0, 0.25):
        args = student_arguments(tmp_path / str(alpha), wise_ft_alpha=alpha)
        resolved = {"student": {"wise_ft_alpha": alpha, "wise_ft_rule": "chose another point"}}
        fit_student(load_student(str(tiny_clip_dir)), args, data, processor, resolved, save_dtype=dtype)
        write_trained_images(tmp_path / str(alpha), ["ab" * 32])
    trained, saved = tmp_path / "1.0", tmp_path / "new" / "point"
    arguments = ["--model", str(trained), "--anchor", str(tiny_clip_dir), "--save_alpha", "0.25"]
    assert script.main([*arguments, "--save_to", str(saved)]) == 0
    expected = load_file(tmp_path / "0.25" / "model.safetensors")
    found = load_file(saved / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    tolerance = {"rtol": 0, "atol": 0} if dtype == "float32" else {"rtol": 2**-10, "atol": 1e-6}  # rounded twice
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **tolerance)
    names = {path.name for path in (tmp_path / "0.25").iterdir()} - {"runs", "trainer_state.json", "training_args.bin"}
    assert names == {path.name for path in saved.iterdir()}
    told = read_trained_images(saved).describe_overlap(["ab" * 32, "cd" * 32])
    assert told.startswith("1 of the 2 test images trained this model or chose its checkpoint (")
    assert yaml.safe_load((saved / "arguments.yaml").read_text()) == {"student": {"wise_ft_alpha": 0.25}}
    printed = capsys.readouterr().out
    assert f"Saved to {saved}, in {dtype}: alpha 0.25. Alpha counts from" in printed and "too good" in printed
    assert f"from {tiny_clip_dir} (0) to the fine-tuned weights (1).\n" in printed
    assert load_dual_encoder(saved)[0].config.model_type == "dclip"
    back = tmp_path / "back"  # from a point of training itself to what it had trained
    words = ["--model", str(tmp_path / "0.25"), "--anchor", str(tiny_clip_dir), "--save_alpha", "1"]
    assert script.main([*words, "--save_to", str(back)]) == 0
    assert f"{tmp_path / '0.25'} is alpha 0.25." in capsys.readouterr().out
    whole, tolerance = load_file(trained / "model.safetensors"), 2**-22 if dtype == "float32" else 2**-9
    for name, weight in load_file(back / "model.safetensors").items():
        torch.testing.assert_close(weight, whole[name], rtol=4 * tolerance, atol=tolerance)
    assert yaml.safe_load((back / "arguments.yaml").read_text()) == {"student": {"wise_ft_alpha": 1}}
    with pytest.raises(SystemExit, match="--save_to: Expected a new or an empty folder"):
        script.main([*arguments, "--save_to", str(saved)])
