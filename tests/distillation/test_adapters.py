"""Adapters: nothing but them trains, what is saved is one model in two forms,
and a killed run ends as one that was not.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from fixtures.processes import run_forked, train_together
from fixtures.training import KILLED, RECIPE, student_arguments, write_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPModel

from modeling_dclip import DCLIPModel, DCLIPVisionModel
from modeling_dclip.distillation import adapters as adapters_module
from modeling_dclip.distillation import arguments as stage_arguments
from modeling_dclip.distillation.adapters import add_adapters, load_adapters, plain_state, save_adapters
from modeling_dclip.distillation.arguments import StudentArguments, TeacherArguments, deciding_fields
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student, run_stages
from modeling_dclip.distillation.trainer import StudentTrainer
from modeling_dclip.encoders.weight_interpolation import interpolate_weights


@pytest.fixture
def data(distillation_data):
    return load_from_disk(distillation_data)


def fit(clip_dir, data, processor, folder, **options):
    torch.manual_seed(0)
    args = student_arguments(folder, **{"lora_rank": 4, "learning_rate": 1e-2, **options})
    return fit_student(load_student(str(clip_dir)), args, data, processor, {"student": {}})


def moved_weights(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def embed(model, data, processor):
    with torch.no_grad():
        pixels = processor(images=data[:4]["image"], return_tensors="pt")
        tokens = processor(text=["a red circle", "a dog"], return_tensors="pt", padding=True)
        outputs = model.eval()(**pixels, **tokens)
    return outputs.image_embeds, outputs.text_embeds


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_the_saved_student_is_the_anchor_with_the_saved_adapter_merged_in(
    tiny_clip_dir, data, processor, tmp_path, use_dora
):
    trainer = fit(tiny_clip_dir, data, processor, tmp_path, use_dora=use_dora)
    anchor = load_student(str(tiny_clip_dir))
    student = DCLIPModel.from_pretrained(tmp_path)
    moved = moved_weights(anchor.state_dict(), student.state_dict())
    layers = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    expected = {
        name for name in anchor.state_dict() if name.startswith("vision_model.") and name.split(".")[-2] in layers
    }
    assert moved == {name for name in expected if name.endswith(".weight")} and len(moved) == 12
    assert not moved_weights(trainer.dual_encoder.state_dict(), student.state_dict())
    assert student.config.freeze_text
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    around = PeftModel.from_pretrained(load_student(str(tiny_clip_dir)), tmp_path / "adapter")
    for ours, theirs in zip(embed(student, data, processor), embed(around, data, processor), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    merged = around.merge_and_unload()
    assert not moved_weights(merged.state_dict(), student.state_dict())
    assert (embed(student, data, processor)[0] - embed(anchor, data, processor)[0]).abs().max() > 1e-3


def test_an_adapter_of_the_image_encoder_fits_a_stock_clip_and_the_encoder_alone(
    tiny_clip_dir, data, processor, tmp_path
):
    fit(tiny_clip_dir, data, processor, tmp_path)
    expected = embed(DCLIPModel.from_pretrained(tmp_path), data, processor)[0]
    stock = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip_dir), tmp_path / "adapter")
    torch.testing.assert_close(embed(stock, data, processor)[0], expected, rtol=1e-5, atol=1e-6)
    alone = PeftModel.from_pretrained(DCLIPVisionModel.from_pretrained(tiny_clip_dir), tmp_path / "adapter").eval()
    pixels = processor(images=data[:4]["image"], return_tensors="pt")
    with torch.no_grad():
        alone_embeds = torch.nn.functional.normalize(alone(**pixels).image_embeds, dim=-1)
    torch.testing.assert_close(alone_embeds, expected, rtol=1e-5, atol=1e-6)


def hash_of(state):
    hashes = [f"{name} {hashlib.sha256(state[name].numpy().tobytes()).hexdigest()}" for name in sorted(state)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def test_every_weight_of_the_anchor_stays_while_adapters_train(tiny_clip_dir, data, processor, tmp_path, monkeypatch):
    hashes, save_model = [], StudentTrainer.save_model

    def save(self, *args, **kwargs):
        hashes.append(hash_of(plain_state(self.dual_encoder, merged=False)))
        return save_model(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "save_model", save)
    trainer = fit(tiny_clip_dir, data, processor, tmp_path, lora_dropout=0.5, weight_decay=0.5)
    anchor = hash_of(load_student(str(tiny_clip_dir)).state_dict())
    assert hashes == [anchor] and hash_of(trainer.dual_encoder.state_dict()) != anchor


def test_a_base_weight_that_moves_is_noticed(tiny_clip_dir, data, processor, tmp_path, monkeypatch):
    step = StudentTrainer.training_step

    def disturb(self, *args, **kwargs):
        with torch.no_grad():
            next(iter(adapters_module.adapted_layers(self.model).values())).get_base_layer().weight.add_(1e-3)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "training_step", disturb)
    with pytest.raises(RuntimeError, match="Frozen weights have changed: .'vision_model.*q_proj.weight|k_proj.weight"):
        fit(tiny_clip_dir, data, processor, tmp_path)


def test_interpolation_is_kept_in_the_adapter_and_in_the_weights(tiny_clip_dir, data, processor, tmp_path):
    states = {}
    for alpha in (1.0, 0.25):
        fit(tiny_clip_dir, data, processor, tmp_path / str(alpha), wise_ft_alpha=alpha)
        states[alpha] = load_file(tmp_path / str(alpha) / "model.safetensors")
    anchor = load_student(str(tiny_clip_dir))
    expected = interpolate_weights(anchor.state_dict(), states[1.0], 0.25)
    for name, weight in expected.items():
        torch.testing.assert_close(states[0.25][name], weight, rtol=0, atol=1e-6)
    merged = PeftModel.from_pretrained(anchor, tmp_path / "0.25" / "adapter").merge_and_unload()
    assert not moved_weights(merged.state_dict(), DCLIPModel.from_pretrained(tmp_path / "0.25").state_dict())


def test_an_adapter_alone_is_saved_where_no_merging_is_asked_for(tiny_clip_dir, data, processor, tmp_path):
    for merge in (True, False):
        fit(tiny_clip_dir, data, processor, tmp_path / str(merge), merge_adapter=merge)
    alone, merged = tmp_path / "False", tmp_path / "True"
    assert not (alone / "model.safetensors").exists() and not (alone / "config.json").exists()
    assert (alone / "tokenizer.json").exists() and (alone / "arguments.yaml").exists()
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, merged)]
    assert not moved_weights(*weights)


def test_a_text_tower_is_adapted_only_where_asked_for(tiny_clip_dir, data, processor, tmp_path):
    trainer = fit(tiny_clip_dir, data, processor, tmp_path, lora_text=True, **{"cosine_preservation_loss_weight": 0.5})
    anchor, student = load_student(str(tiny_clip_dir)), DCLIPModel.from_pretrained(tmp_path)
    moved = moved_weights(anchor.state_dict(), student.state_dict())
    assert {name.split(".")[0] for name in moved} == {"vision_model", "text_model"} and len(moved) == 24
    assert student.config.freeze_text and trainer.dual_encoder.config.freeze_text
    around = PeftModel.from_pretrained(load_student(str(tiny_clip_dir)), tmp_path / "adapter")
    ours, theirs = embed(student, data, processor), embed(around, data, processor)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
    assert (ours[1] - embed(anchor, data, processor)[1]).abs().max() > 1e-3


def test_a_text_adapter_starts_from_the_stored_embeddings_loss(tiny_clip_dir, data, processor, tmp_path):
    logs = []
    for name, options in (("text", {"lora_text": True}), ("vision", {})):
        terms = {"similarity_distillation_loss_weight": 1.0, "max_steps": 1, **options}
        logs.append(fit(tiny_clip_dir, data, processor, tmp_path / name, **terms).state.log_history[0])
    for name in ("contrastive_loss", "similarity_distillation_loss", "cosine_distillation_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=2e-3)  # stored texts are float16


def test_a_text_adapter_wants_a_caption_in_every_row(tiny_clip_dir, partly_captioned_data, processor, tmp_path):
    with pytest.raises(ValueError, match="expected one or more captions"):
        fit(tiny_clip_dir, load_from_disk(partly_captioned_data), processor, tmp_path, lora_text=True)


def test_layers_can_be_chosen_and_left_out(tiny_clip_dir, data, processor, tmp_path):
    options = {"lora_target_modules": ["q_proj"], "lora_alpha": 8, "freeze": ["vision_model.encoder.layers.0.*"]}
    fit(tiny_clip_dir, data, processor, tmp_path, **options)
    moved = moved_weights(
        load_student(str(tiny_clip_dir)).state_dict(), DCLIPModel.from_pretrained(tmp_path).state_dict()
    )
    assert moved == {"vision_model.encoder.layers.1.self_attn.q_proj.weight"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(tiny_clip_dir))
    with pytest.raises(
        ValueError, match=r"expected names of linear layers in vision_model \(fc1, fc2, k_proj.*got .'query'"
    ):
        fit(tiny_clip_dir, data, processor, tmp_path / "none", lora_target_modules=["q_proj", "query"])


def test_a_mambavision_takes_adapters_as_the_identity(tmp_path):
    from modeling_dclip import DMCLIPVisionConfig, DMCLIPVisionModel

    torch.manual_seed(0)
    config = DMCLIPVisionConfig(
        hidden_size=16,
        stem_dim=8,
        depths=(1, 1, 2, 2),
        num_attention_heads=(1, 1, 2, 2),
        image_size=64,
        projection_dim=8,
    )
    model = torch.nn.ModuleDict({"vision_model": DMCLIPVisionModel(config).eval()})
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, state = (
            model["vision_model"](pixels).image_embeds,
            {k: v.clone() for k, v in model.state_dict().items()},
        )
        adapters = add_adapters(model, StudentArguments(output_dir="x", lora_rank=2))
        torch.testing.assert_close(model["vision_model"](pixels).image_embeds, before)
    kinds = {name.rpartition(".")[2] for name in adapters_module.adapted_layers(model)}
    assert kinds == {"qkv", "proj", "in_proj", "x_proj", "out_proj", "fc1", "fc2"}
    assert not moved_weights(state, plain_state(model, merged=False))
    model["vision_model"](pixels).image_embeds.square().sum().backward()
    trained = {name for name, parameter in adapters.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in adapters.parameters() if parameter.requires_grad)
    assert all("lora_" in name for name in trained) and trained


def test_a_checkpoint_is_a_model_and_another_adapter_is_not_taken(tiny_clip_dir, data, processor, tmp_path):
    fit(tiny_clip_dir, data, processor, tmp_path, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    assert not moved_weights(load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors"))
    other = add_adapters(load_student(str(tiny_clip_dir)), student_arguments(tmp_path, lora_rank=2))
    with pytest.raises(ValueError, match="holds another adapter: 24 tensors differ"):
        load_adapters(other, checkpoint)
    with pytest.raises(FileNotFoundError, match="No adapter/adapter_model.safetensors"):
        load_adapters(other, tmp_path / "nowhere")
    save_adapters(other, checkpoint)  # in place of the one before
    load_adapters(other, checkpoint)


def test_the_best_checkpoint_is_taken_back_with_its_adapter(tiny_clip_dir, data, processor, tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
    }
    args = student_arguments(
        tmp_path, lora_rank=4, learning_rate=1.0, max_steps=3, load_best_model_at_end=True, **options
    )
    torch.manual_seed(0)
    trainer = fit_student(load_student(str(tiny_clip_dir)), args, data, processor, {}, validation=data)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"  # at this rate it gets worse
    assert not moved_weights(load_file(best / "model.safetensors"), load_file(tmp_path / "model.safetensors"))


def test_a_run_killed_in_mid_epoch_resumes_and_ends_with_the_same_weights(tmp_path):
    student = {**RECIPE["student"], "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    student |= {"lora_rank": 2, "lora_dropout": 0.1, "cosine_distillation_loss_weight": 0.0}
    (tmp_path / "whole").mkdir()
    whole = write_recipe(tmp_path / "whole", student=student)
    out = run_stages(parse_recipe([], whole))
    (tmp_path / "killed").mkdir()
    path = write_recipe(tmp_path / "killed", student=student, clip_model=str(out / "anchor"))
    (killed,) = run_forked(KILLED, path, 5)
    assert killed.returncode == -9, killed.stderr[-3000:]
    folder = tmp_path / "killed" / "run" / "student"
    assert (folder / "checkpoint-3").exists() and not (folder / "model.safetensors").exists()
    run_stages(parse_recipe([], path))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert not moved_weights(load_file(folder / name), load_file(out / "student" / name)), name
    arguments = yaml.safe_load((folder / "arguments.yaml").read_text())
    assert arguments["student"]["lora_rank"] == 2


def test_two_processes_adapt_both_towers_as_one_does(tiny_clip_dir, distillation_data, tmp_path):
    for processes in (1, 2):
        script = Path(__file__).with_name("run_adapters.py")
        train_together(script, processes, tiny_clip_dir, distillation_data, tmp_path / str(processes), processes)
    alone, shared = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("1", "2"))
    assert alone.keys() == shared.keys() and len(alone) == 48
    for name, weight in alone.items():
        torch.testing.assert_close(
            shared[name], weight, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert "lora_B" not in name or weight.abs().max() > 1e-5, name
    assert not list(tmp_path.rglob(".adapter.*"))
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("1", "2")]
    alone, shared = ([log["eval_mean_recall@1"] for log in part if "eval_loss" in log] for part in logs)
    assert len(alone) == 2 and alone == shared


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: expected lora_rank beside it"),
        ({"lora_target_modules": ["fc1"]}, "lora_target_modules: expected lora_rank"),
        ({"lora_rank": 0}, "lora_rank: expected an integer from 1 to 8192, got 0"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout: expected a number from 0 and below 1, got 1.0"),
        ({"lora_rank": 4, "use_dora": True, "wise_ft_alpha": 0.5}, "wise_ft_alpha: expected 1 with use_dora.*got 0.5"),
        (
            {"lora_rank": 4, "lora_text": True, "contrastive_loss_weight": 0.0},
            "lora_text: expected a loss that reads texts",
        ),
        ({"lora_text": True}, "lora_text: expected lora_rank beside it"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StudentArguments(output_dir="x", **options)


def test_records_from_before_adapters_still_stand():
    plain = deciding_fields(StudentArguments(output_dir="x"))
    assert not any("lora" in name or "adapter" in name or "dora" in name for name in plain)
    assert (
        deciding_fields(StudentArguments(output_dir="x", lora_rank=4, merge_adapter=False))["merge_adapter"] is False
    )


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"lora_rank": 4}, "peft"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"optim": "adamw_torch_8bit"}, "torchao"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_runs(monkeypatch, options, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        stage_arguments.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ImportError, match=f"expected the package {package}.*pip install"):
        StudentArguments(output_dir="x", **options)


def test_an_eight_bit_optimiser_is_one_word_of_a_recipe(monkeypatch):
    monkeypatch.setattr(stage_arguments, "is_installed", lambda package: True)
    recipe = parse_recipe(["--train_datasets", "scenes:train", "--student.optim", "adamw_bnb_8bit"])
    assert recipe.student.optim == "adamw_bnb_8bit"


def test_trackers_are_tensorboard_where_it_is_there_and_else_by_name(monkeypatch):
    monkeypatch.setattr(stage_arguments, "is_installed", lambda package: package == "tensorboard")
    assert TeacherArguments(output_dir="x").report_to == ["tensorboard"]
    monkeypatch.setattr(stage_arguments, "is_installed", lambda package: False)
    assert (
        TeacherArguments(output_dir="x").report_to
        == TeacherArguments(output_dir="x", report_to="none").report_to
        == []
    )
    monkeypatch.setattr(stage_arguments, "get_available_reporting_integrations", lambda: ["wandb", "trackio"])
    recipe = parse_recipe(["--train_datasets", "scenes:train", "--student.report_to", "wandb", "trackio"])
    assert recipe.student.report_to == ["wandb", "trackio"]
    with pytest.raises(ImportError, match=r"expected an installed tracker \(wandb, trackio\), got 'mlflow'"):
        TeacherArguments(output_dir="x", report_to=["mlflow"])
    with pytest.raises(ValueError, match="expected trackers, of .*, got 'tensorbored'"):
        TeacherArguments(output_dir="x", report_to=["tensorbored"])


def test_what_is_evaluated_has_to_be_merged(tmp_path):
    words = ["--student.lora_rank", "4", "--student.merge_adapter", "false"]
    path = write_recipe(tmp_path, evaluate=["retrieval=scenes:test,n=8"])
    with pytest.raises(ValueError, match="student.merge_adapter: expected true beside evaluate"):
        expand_arms(parse_recipe(words, path))
    assert len(expand_arms(parse_recipe(words[:2], path))) == 1
