"""Train a DCLIP teacher and student, or a DM-CLIP, from a recipe, stage by stage.

    accelerate launch train.py                                       the demo, offline, minutes on two CPU cores
    accelerate launch train.py --recipe recipes/dclip_vitb16.yaml    the paper
    accelerate launch train.py --recipe recipes/dmclip_demo.yaml     a Mamba CLIP taught by stored teachers, offline
    ... --stages teacher,student                                     some stages only
    ... --output_dir outputs/mine --student.learning_rate 2e-6       any field, over the recipe's value

Finished stages are skipped, interrupted ones go on. A recipe with `arms` and `seeds` trains each arm with each seed;
one with `evaluate` then measures them beside the anchor; `--push_to_hub me/name` publishes what was trained.
"""

import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.failures import FAILURES, command, one_line
from modeling_dclip.data.files import entry_names
from modeling_dclip.distillation.recipes import ArmRun, describe_fields, expand_arms, parse_recipe
from modeling_dclip.distillation.run import Run, SharedData
from modeling_dclip.distillation.stages import run_stages
from modeling_dclip.evaluation.arms import evaluate_arms
from modeling_dclip.evaluation.leakage import LeakageOptions, evaluate_leakage
from modeling_dclip.evaluation.records import read_results
from modeling_dclip.evaluation.reports.maps import draw_teacher_attention
from modeling_dclip.evaluation.reports.plots import draw_training_curves
from modeling_dclip.evaluation.reports.tables import render_leakage, render_summary, render_table
from modeling_dclip.hub.publish import check_publication, describe_publication, publish
from modeling_dclip.hub.publish.facts import PublishArguments

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"
# Runs in a process of its own, in which the package is not imported: the code comes with the folder.
RELOAD = """
import sys
from transformers import AutoModel, AutoProcessor
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    print(f"loaded {type(model).__name__} and {type(processor).__name__} from {folder}")
"""


def read_recipe(words: list[str]) -> tuple[list[str], Path]:
    """The command line without its recipe file, and that file."""
    if "--recipe" not in words:
        return words, DEMO
    place = words.index("--recipe") + 1
    if place == len(words):
        raise ValueError("Expected a file after --recipe, got nothing.")
    return [*words[: place - 1], *words[place + 1 :]], Path(words[place])


def train_runs(runs: Sequence[ArmRun], words: list[str], path: Path) -> None:
    """Run every arm's stages, after those that all share."""
    shared = SharedData()
    whole = parse_recipe(words, path)
    needs_anchor = whole.run.clip_model is None and ("dmclip" not in whole.named or "anchor" in whole.named)
    if needs_anchor and runs[0].recipe.run.clip_model is not None:
        whole.run.stages = ["anchor"]
        run_stages(whole, shared)
    for run in runs:
        if len(runs) > 1:
            logging.info("\n=== %s, seed %d", run.arm, run.seed)
        run_stages(run.recipe, shared)


def report(runs: Sequence[ArmRun], anchor: str, folder: Path) -> None:
    """Evaluate all runs beside their anchor and what their teachers read, draw attention,
    load what was saved in a fresh process.
    """
    first = runs[0].recipe.run
    arms: dict[str, dict[int, str]] = {}
    for run in runs:
        for name in ("student", "dmclip"):
            student = Path(run.recipe.run.output_dir) / name
            if (student / "config.json").exists():
                arms.setdefault(run.arm, {})[run.seed] = str(student)
    options = {"baseline": first.baseline, "command": shlex.join(["train.py", *sys.argv[1:]])}
    summary = evaluate_arms(arms, anchor, first.evaluate, folder, device=PartialState().device, **options)
    both = {"retrieval", "zero_shot"} <= {name.partition("=")[0] for name in first.evaluate}
    print("\n" + (render_summary(summary) if both else render_table(read_results(folder / "records.json"))))
    folders = [next(iter(seeds.values())) for seeds in list(arms.values())[-1:]]
    trained = [(run.arm, Path(run.recipe.run.output_dir) / "teacher") for run in runs]
    teachers = [(arm, str(teacher)) for arm, teacher in trained if (teacher / "config.json").exists()]
    captions = [name.partition("=")[2] for name in first.evaluate if name.startswith("retrieval=")]
    if teachers and captions and "boxes" in (dataset := load_captions(captions[0])).column_names:
        for _, teacher in teachers:
            draw_teacher_attention(teacher, dataset, Path(teacher).parent / "teacher_attention.png")
        leakage = evaluate_leakage(
            teachers,
            dataset,
            captions[0],
            folder / "leakage.json",
            cache_dir=Run(runs[0].recipe).cache_dir,
            device=PartialState().device,
            command=options["command"],
            options=LeakageOptions(max_regions=runs[0].recipe.regions.max_regions),
        )
        print(f"\n{render_leakage(leakage)}")
    if saved := [str(Path(name).resolve()) for name in (*folders, *(teacher for _, teacher in teachers[-1:]))]:
        subprocess.run([sys.executable, "-c", RELOAD, *saved], check=True, cwd=Path.home())
    print(f"\nWritten to {folder}: {', '.join(sorted(entry_names(folder)))}")


def plan_publication(runs: Sequence[ArmRun], results: Path) -> PublishArguments | None:
    """What to publish at the end; whether the Hub will take it is seen before training."""
    run = runs[0].recipe.run
    if run.push_to_hub is None:
        return None
    recipe = next(one.recipe for one in runs if run.push_arm in (None, one.arm))
    model = f"{recipe.run.output_dir}/{'dmclip' if 'dmclip' in recipe.named else 'student'}"
    plan = PublishArguments(model, [str(results)], run.push_to_hub, run.push_license, private=run.push_private)
    check_publication(plan)
    return plan


def run_recipe(words: list[str], path: Path) -> None:
    """Train; then, in the main process, draw, measure and publish."""
    runs = expand_arms(words, path)
    results = Path(parse_recipe(words, path).run.output_dir) / "results"
    publication = plan_publication(runs, results)
    is_main = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    train_runs(runs, words, path)
    if not is_main:
        return
    draw_training_curves(results.parent)
    if runs[0].recipe.run.evaluate:
        report(runs, Run(runs[0].recipe).clip_path, results)
    if publication is not None:
        teacher = Path(publication.model).parent / "teacher"
        made = str(teacher) if (teacher / "config.json").is_file() else None
        try:
            print(describe_publication(publish(replace(publication, teacher=made))))
        except FAILURES as error:
            advice = "Then run `python -m modeling_dclip.hub.publish`."
            sys.exit(f"Failed: trained, but not published: {one_line(error)} {advice}")


@command
def main(words: list[str]) -> None:
    """Run a recipe."""
    if "--help" in words or "-h" in words:
        return print(f"{__doc__}\n  --recipe FILE (default recipes/{DEMO.name})\n\n{describe_fields()}")
    run_recipe(*read_recipe(words))


if __name__ == "__main__":
    main(sys.argv[1:])
