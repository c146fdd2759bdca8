"""What works for which family of dual encoders: each command on a random checkpoint in the published layout.

    python benchmarks/families.py                                   all families and commands: about 6 minutes
    python benchmarks/families.py --families siglip --steps lora    one of them; other results in the file stay

Every cell is a command in a process of its own, on drawn scenes: training with a region teacher (`teach`) and without
(`train`), loading the student with transformers alone, adapters (`lora`), evaluation, index, ONNX export and a dry run
of publishing. A cell is `yes`, or `refused` where the command ended in one line; `error` is a fault of this package.
The checkpoints are those of `tests/fixtures/tiny_dual_encoders.py`.
"""

import os
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, HfArgumentParser

import modeling_dclip.distillation.checks
import modeling_dclip.distillation.stages
import modeling_dclip.evaluation.command_line
import modeling_dclip.hub.export.open_clip
import modeling_dclip.hub.export.sentence_transformers
import modeling_dclip.hub.export.towers
import modeling_dclip.hub.index.build
import modeling_dclip.hub.publish.facts  # noqa: F401  all of them once, for the forked processes
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import read_json, read_text, write_json, write_text
from modeling_dclip.evaluation.records import environment

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from conftest import make_clip_config, make_tokenizer  # noqa: E402  found by the line above
from fixtures.publications import make_dmclip  # noqa: E402
from fixtures.tiny_dual_encoders import save_dual_encoder, save_first_siglip, save_fixed_siglip2  # noqa: E402
from kills import begin_in_fork  # noqa: E402

SCENES = "scenes:train,n=24,image_size=32,captions_per_image=2"
STEPS = {"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 4}
RECIPE = {
    "train_datasets": [SCENES],
    "train_fraction": 0.5,
    "test_fraction": 0.25,
    "regions": {"detector": "grid:2x2"},
    "teacher": {**STEPS, "num_attention_heads": 4},  # divides the widths of the checkpoints
    "student": STEPS,
}
ALONE = ["--student.cosine_distillation_loss_weight", "0"]
LOAD = """
import sys
from transformers import AutoModel, AutoProcessor

folder, trust = sys.argv[1], sys.argv[2] == "true"
model = AutoModel.from_pretrained(folder, trust_remote_code=trust)
AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
print(type(model).__name__)
"""
ENDS = ("yes", "with trust_remote_code", "refused", "error", "no student")
OF_STUDENT = ("load", "evaluate", "index", "onnx", "publish")  # commands on what `train` made


def _save_legacy_clip(folder: Path) -> None:
    """As the first CLIPs were published: `pytorch_model.bin` alone, with the positions' indices as a weight."""
    _save_clip(folder)
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _save_clip(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    torch.manual_seed(0)
    CLIPModel(make_clip_config(tokenizer)).save_pretrained(folder)


def _save_dmclip(folder: Path) -> None:
    clip = folder.with_name("clip_of_dmclip")
    _save_clip(clip)
    make_dmclip(folder, clip)


# What each is called, and what writes its checkpoint.
FAMILIES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "clip": ("CLIP", _save_clip),
    "legacy_clip": ("CLIP, pytorch_model.bin alone", _save_legacy_clip),
    "metaclip_2": ("MetaCLIP 2", lambda folder: save_dual_encoder("metaclip_2", folder)),
    "siglip": ("SigLIP, sentencepiece", save_first_siglip),
    "siglip2": ("SigLIP 2 of fixed size, Gemma's tokenizer", save_fixed_siglip2),
    "chinese_clip": ("Chinese-CLIP", lambda folder: save_dual_encoder("chinese_clip", folder)),
    "altclip": ("AltCLIP", lambda folder: save_dual_encoder("altclip", folder)),
    "vision_text": ("VisionTextDualEncoder, ViT and BERT", lambda folder: save_dual_encoder("vision_text", folder)),
    "timm": ("VisionTextDualEncoder, timm and BERT", lambda folder: save_dual_encoder("timm", folder)),
    "dmclip": ("DM-CLIP", _save_dmclip),
    "siglip2_naflex": ("SigLIP 2, NaFlex", lambda folder: save_dual_encoder("siglip2_naflex", folder)),
}


@dataclass
class FamilyArguments:
    """One run of the script."""

    families: list[str] | None = field(default=None, metadata={"help": "Which of them; by default all."})
    steps: list[str] | None = field(default=None, metadata={"help": "Which commands; by default all."})
    work: str = field(default="outputs/families", metadata={"help": "Folder of checkpoints and runs."})
    output: str = field(
        default="benchmarks/results/families.json", metadata={"help": "Results file; other cells in it stay."}
    )


def commands(clip: Path, work: Path) -> dict[str, list[str]]:
    """The command of each cell, without Python itself.

    Args:
        clip (`Path`): The checkpoint.
        work (`Path`): Folder of the runs.
    """
    run = ["train.py", "--recipe", str(work / "recipe.yaml"), "--clip_model", str(clip)]
    student = str(work / "train" / "student")
    publish = ["-m", "modeling_dclip.hub.publish", "--model", student, "--repo_id", "me/student", "--license", "mit"]
    return {
        "teach": [*run, "--output_dir", str(work / "teach")],
        "train": [*run, *ALONE, "--output_dir", str(work / "train")],
        "load": ["-c", LOAD, student, "false"],
        "lora": [*run, *ALONE, "--student.lora_rank", "2", "--output_dir", str(work / "lora")],
        "evaluate": ["eval.py", "--model", student, "--benchmark", f"retrieval={SCENES}"]
        + ["--output", str(work / "results.json")],
        "index": ["-m", "modeling_dclip.hub.index", "--model", student, "--images", SCENES]
        + ["--output", str(work / "index")],
        "onnx": ["-m", "modeling_dclip.hub.export", "onnx", "--model", student, "--dtypes", "fp32"]
        + ["--output", str(work / "onnx")],
        "publish": [*publish, "--dry_run", "--staging", str(work / "staging")],
    }


def run_cell(words: list[str], log: Path) -> dict[str, str]:
    """Run a command, and say how it ended.

    Args:
        words (`list[str]`): After the name of Python.
        log (`Path`): Gets what it wrote.

    Returns:
        `dict[str, str]`: The `end`, one of [`ENDS`], and what was `said` where it is not `yes`.
    """
    started = _start if words[0] == "-c" else _fork
    status, written = started(words, log), ""
    if status == 0:
        return {"end": "yes", "said": ""}
    written = read_text(log)
    if words[0] == "-c" and words[-1] == "false" and "trust_remote_code" in written:
        trusted = run_cell([*words[:-1], "true"], log)
        return {"end": ENDS[1], "said": ""} if trusted["end"] == "yes" else trusted
    lines = written.strip().splitlines()
    told = [line for line in lines if line.startswith("Failed: ")]
    if told and "Traceback" not in written:
        said = lines[lines.index(told[-1]) :]  # several mistakes are a list
        return {
            "end": "refused",
            "said": " ".join(said).removeprefix("Failed: ").partition(" (TRANSFORMERS_VERBOSITY")[0],
        }
    return {"end": "error", "said": lines[-1] if lines else "nothing was said"}


def _start(words: list[str], log: Path) -> int:
    """Run a new Python."""
    with log.open("w") as file:
        return subprocess.run([sys.executable, *words], stdout=file, stderr=file, cwd=log.parent).returncode


def _fork(words: list[str], log: Path) -> int:
    """Run a command of the repository in a forked process, so that PyTorch is not loaded again."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        begin_in_fork()
        with log.open("w") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
        status = 1
        try:
            sys.argv = words if words[0] != "-m" else words[1:]
            run = runpy.run_path if words[0] != "-m" else runpy.run_module
            run(str(ROOT / words[0]) if words[0] != "-m" else f"{words[1]}.__main__", run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@command
def main(argv: list[str] | None = None) -> None:
    """Run all cells that are asked for, print each, and write the results after each family."""
    (args,) = HfArgumentParser(FamilyArguments).parse_args_into_dataclasses(argv)
    if unknown := sorted(set(args.families or ()) - set(FAMILIES)):
        raise ValueError(f"--families: expected some of {', '.join(FAMILIES)}, got {unknown[0]!r}.")
    output, work = Path(args.output), Path(args.work).absolute()
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    earlier = read_json(output, "results of this script", ("rows",))["rows"] if output.is_file() else []
    known: dict[str, Any] = {row["family"]: row for row in earlier}
    for family in args.families or FAMILIES:
        name, save = FAMILIES[family]
        place = work / family
        row = known.setdefault(family, {"family": family, "name": name, "cells": {}})
        if not (place / "clip").is_dir():
            save(place / "clip")
        write_text(place / "recipe.yaml", yaml.safe_dump(RECIPE))
        for step, words in commands(place / "clip", place).items():
            if args.steps and step not in args.steps:
                continue
            written = Path(words[words.index("--output_dir") + 1]) if "--output_dir" in words else place / step
            if written.is_dir():
                shutil.rmtree(written)
            if step in OF_STUDENT and not (place / "train" / "student").is_dir():
                row["cells"][step] = {"end": ENDS[-1], "said": ""}
                continue
            cell = row["cells"][step] = run_cell(words, place / f"{step}.log")
            cell["said"] = cell["said"].replace(str(work), "outputs")
            print(f"{name}, {step}: {cell['end']} {cell['said']}".rstrip(), flush=True)
        versions, hardware = environment()
        rows = [known[one] for one in FAMILIES if one in known]
        results = {"benchmark": "families", "rows": rows, "environment": {"versions": versions, "hardware": hardware}}
        write_json(output, results, indent=2)


if __name__ == "__main__":
    main()
