"""What is saved loads where this package is not: a fresh process, remote code, the same numbers, and again."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from fixtures.tiny_dual_encoders import save_dual_encoder
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
)

from modeling_dclip import (
    DCLIPConfig,
    DCLIPModel,
    DCLIPProcessor,
    DCLIPTeacher,
    DCLIPTeacherConfig,
    DCLIPTeacherProcessor,
    DCLIPVisionConfig,
    DCLIPVisionModel,
    DMCLIPConfig,
    DMCLIPModel,
    DMCLIPTextConfig,
    DMCLIPTextModel,
    DMCLIPVisionConfig,
    DMCLIPVisionModel,
)
from modeling_dclip.encoders.loading import load_processor

# Runs with -I and from another folder; the finder refuses the package even where it is installed.
READER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_dclip":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    model = getattr(transformers, job["auto_class"]).from_pretrained(job["folder"], trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(job["folder"], trust_remote_code=True)
    with torch.no_grad():
        out = model(**load_file(job["inputs"]))
    kept = {name: value.contiguous() for name, value in out.items() if isinstance(value, torch.Tensor)}
    kept["ids"] = processor(text=["a red dog " * 60, "a"], return_tensors="pt")["input_ids"]
    save_file(kept, job["outputs"])
    model.save_pretrained(job["again"])
    processor.save_pretrained(job["again"])
    leaked = any(name.split(".")[0] == "modeling_dclip" for name in sys.modules)
    stock = None
    if job["stock"]:  # without any flag: nobody is asked, and no code of the folder is run
        plain = getattr(transformers, job["auto_class"]).from_pretrained(job["folder"])
        reader = transformers.AutoProcessor.from_pretrained(job["folder"], backend="pil")
        with torch.no_grad():
            plain_out = plain(**load_file(job["inputs"]))
        ids = reader(text=["a red dog " * 60, "a"], padding=True, truncation=True, return_tensors="pt")["input_ids"]
        found = {**plain_out, "ids": ids}
        equal = all(torch.equal(found[name], value) for name, value in kept.items())
        stock = [type(plain).__name__, type(reader).__name__, equal]
    print(json.dumps([type(model).__module__, type(processor).__name__, leaked, stock]))
"""

CASES = (
    ("dual", "AutoModel"),
    ("dual", "AutoModelForZeroShotImageClassification"),
    ("rotary", "AutoModel"),
    ("vision", "AutoModel"),
    ("teacher", "AutoModel"),
    ("teacher_siglip", "AutoModel"),
    ("teacher_altclip", "AutoModel"),
    ("teacher_chinese_clip", "AutoModel"),
    ("teacher_metaclip_2", "AutoModel"),
    ("teacher_vision_text", "AutoModel"),
    ("teacher_dmclip", "AutoModel"),
    ("dmclip", "AutoModel"),
    ("dmclip", "AutoModelForZeroShotImageClassification"),
    ("dmclip_fused_vision", "AutoModel"),
    ("dmclip_text", "AutoModel"),
)


def build_dmclip(kind, clip_dir):
    processor = DCLIPProcessor.from_pretrained(clip_dir)
    batch = processor(images=pictures(), text=["a red dog", "a dog"], return_tensors="pt")
    ends = {"bos_token_id": processor.tokenizer.bos_token_id, "eos_token_id": processor.tokenizer.eos_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    stages = {"hidden_size": 8, "stem_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2)}
    text = {**sizes, **ends, "vocab_size": len(processor.tokenizer)}
    model = DMCLIPModel(DMCLIPConfig(text_config=text, vision_config=stages, projection_dim=16))
    if kind == "dmclip":
        return model, processor, batch
    if kind == "dmclip_text":
        return model.text_model, processor, {name: batch[name] for name in ("input_ids", "attention_mask")}
    tower = model.vision_model.fuse() if kind == "dmclip_fused_vision" else model.vision_model
    return tower, processor, {"pixel_values": batch["pixel_values"]}


def build_teacher(family, clip_dir, folder):
    if family == "dmclip":
        model, processor, _ = build_dmclip("dmclip", clip_dir)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    elif family != "clip":
        save_dual_encoder(family, folder)
    source = str(clip_dir if family == "clip" else folder)
    teacher = DCLIPTeacher.from_clip(source, num_attention_heads=4)
    processor = DCLIPTeacherProcessor.from_dual_encoder(load_processor(source), teacher.config.clip_config)
    boxes = [[[1, 2, 30, 20], [5, 5, 40, 40]], []]
    return teacher, processor, processor(pictures(), ["a red dog", "a dog"], boxes=boxes)


def build(kind, clip_dir, folder=None):
    if kind.startswith("dmclip"):
        return build_dmclip(kind, clip_dir)
    if kind.startswith("teacher"):
        return build_teacher(kind.partition("_")[2] or "clip", clip_dir, folder)
    processor = DCLIPProcessor.from_pretrained(clip_dir)
    if kind in ("dual", "rotary"):
        config = DCLIPConfig.from_pretrained(clip_dir)
        config.vision_config.position_embedding_type = "rope" if kind == "rotary" else "absolute"
        batch = processor(images=pictures(), text=["a red dog", "a dog"], return_tensors="pt")
        return DCLIPModel.from_pretrained(clip_dir, config=config), processor, batch
    config = DCLIPVisionConfig.from_pretrained(clip_dir, position_embedding_type="rope")
    batch = processor(images=pictures(), return_tensors="pt")
    return DCLIPVisionModel.from_pretrained(clip_dir, config=config), processor, batch


def pictures():
    # Two, for of one row PyTorch computes a matrix-vector product, whose last bit depends on where memory lies.
    return [Image.fromarray(np.arange(40 * width * 3, dtype=np.uint8).reshape(40, width, 3)) for width in (50, 60)]


def read_elsewhere(jobs, home):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", READER, json.dumps(jobs)]
    done = subprocess.run(command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def shipped(tiny_clip_dir, tmp_path_factory):
    """Every case saved here, read and re-saved in one fresh process, and that read and re-saved in a second one."""
    root = tmp_path_factory.mktemp("shipping")
    cases, jobs = {}, []
    for case in CASES:
        kind, auto_class = case
        model, processor, batch = build(kind, tiny_clip_dir, root / f"{kind}_encoder")
        name = f"{kind}_{auto_class}"
        job = {"auto_class": auto_class, "folder": str(root / name), "inputs": str(root / f"{name}.inputs")}
        job["stock"] = kind == "dual"
        model.save_pretrained(job["folder"])
        processor.save_pretrained(job["folder"])
        save_file({name: value.contiguous() for name, value in batch.items()}, job["inputs"])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the reader: a product split over threads may differ in its last bit
        with torch.no_grad():
            expected = dict(model.eval()(**batch).items())
        torch.set_num_threads(threads)
        expected["ids"] = processor(text=["a red dog " * 60, "a"], return_tensors="pt")["input_ids"]
        cases[case] = {"folder": root / name, "expected": expected, "processor": type(processor).__name__, "reads": []}
        jobs.append(job)
    for generation in ("first", "second"):
        for job, case in zip(jobs, CASES, strict=True):
            name = f"{case[0]}_{case[1]}"
            job.update(outputs=str(root / f"{name}.{generation}"), again=str(root / f"{name}_{generation}"))
        for case, job, report in zip(CASES, jobs, read_elsewhere(jobs, root), strict=True):
            cases[case]["reads"].append((*report, load_file(job["outputs"]), root / job["again"]))
            job["folder"] = job["again"]
    return cases


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_fresh_process_without_the_package_gives_identical_outputs_twice(case, shipped):
    expected = shipped[case]["expected"]
    for module, processor, leaked, _, outputs, _ in shipped[case]["reads"]:
        assert module.startswith("transformers_modules.") and not leaked
        assert processor == shipped[case]["processor"]
        assert len(outputs) >= 3
        for name, value in outputs.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", CASES[:2], ids="-".join)
def test_without_any_flag_a_student_with_clips_own_positions_is_a_stock_clip_with_the_same_outputs(case, shipped):
    assert case[0] == "dual" and len(shipped[case]["reads"]) == 2
    for _, _, _, stock, *_ in shipped[case]["reads"]:
        assert stock == ["CLIPModel", "CLIPProcessor", True]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_folder_saved_where_the_package_is_not_keeps_code_and_auto_map(case, shipped):
    folder = shipped[case]["folder"]
    assert len(code_files(folder)) >= 3
    for *_, again in shipped[case]["reads"]:
        assert code_files(again) == code_files(folder)
        assert auto_map(again) == auto_map(folder)


def auto_map(folder):
    return json.loads((folder / "config.json").read_text())["auto_map"]


def code_files(folder):
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_the_dual_encoder_names_every_auto_class_that_serves_it(tiny_clip_dir, tmp_path):
    DCLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    DCLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    assert auto_map(tmp_path) == {
        "AutoConfig": "configuration_dclip.DCLIPConfig",
        "AutoModel": "modeling_dclip.DCLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_dclip.DCLIPModel",
    }
    processor_map = json.loads((tmp_path / "processor_config.json").read_text())["auto_map"]
    assert processor_map == {"AutoProcessor": "processing_dclip.DCLIPProcessor"}


def test_dmclip_ships_the_scan_and_names_every_auto_class_that_serves_it(tiny_clip_dir, tmp_path):
    build("dmclip", tiny_clip_dir)[0].save_pretrained(tmp_path)
    code = code_files(tmp_path)
    assert {"modeling_dmclip.py", "modeling_dmclip_text.py", "configuration_dmclip.py", "selective_scan.py"} <= set(
        code
    )
    for text in code.values():  # whatever a shipped file imports beside it is there too
        assert {f"{module}.py" for module in re.findall(r"^from \.(\w+) import", text, flags=re.MULTILINE)} <= set(
            code
        )
    assert auto_map(tmp_path) == {
        "AutoConfig": "configuration_dmclip.DMCLIPConfig",
        "AutoModel": "modeling_dmclip.DMCLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_dmclip.DMCLIPModel",
    }


def test_importing_the_package_registers_every_auto_class_and_leaves_a_stock_clip_stock(tiny_clip_dir, tmp_path):
    for kind, config_class, model_class, processor_class in (
        ("vision", DCLIPVisionConfig, DCLIPVisionModel, DCLIPProcessor),
        ("dual", CLIPConfig, CLIPModel, CLIPProcessor),
        ("rotary", DCLIPConfig, DCLIPModel, DCLIPProcessor),
        ("teacher", DCLIPTeacherConfig, DCLIPTeacher, DCLIPTeacherProcessor),
        ("dmclip", DMCLIPConfig, DMCLIPModel, DCLIPProcessor),
        ("dmclip_vision", DMCLIPVisionConfig, DMCLIPVisionModel, DCLIPProcessor),
        ("dmclip_text", DMCLIPTextConfig, DMCLIPTextModel, DCLIPProcessor),
    ):
        folder = tmp_path / kind
        build(kind, tiny_clip_dir)[0].save_pretrained(folder)
        processor_class.from_pretrained(tiny_clip_dir).save_pretrained(folder)
        assert type(AutoConfig.from_pretrained(folder)) is config_class
        assert type(AutoModel.from_pretrained(folder)) is model_class
        assert type(AutoProcessor.from_pretrained(folder)) is processor_class
        assert AutoImageProcessor.from_pretrained(folder, backend="pil").crop_size["height"] == 32
    for kind, model_class in (("dual", CLIPModel), ("rotary", DCLIPModel), ("dmclip", DMCLIPModel)):
        assert type(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / kind)) is model_class


def test_the_teachers_clip_carries_no_code_of_its_own_in_the_config(tiny_clip_dir, tmp_path):
    DCLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path / "dual")
    DCLIPTeacher.from_clip(str(tmp_path / "dual")).save_pretrained(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_dclip_teacher.DCLIPTeacher"
    assert "auto_map" not in config["clip_config"]
