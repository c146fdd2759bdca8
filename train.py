"""Train a DCLIP teacher and student, or a DM-CLIP, from a recipe, stage by stage.

    python train.py                                          the demo, offline, minutes on two CPU cores
    python train.py --recipe recipes/finetune.yaml --train_datasets csv:captions.csv:photos --output_dir outputs/mine
    python train.py --recipe recipes/dclip_vitb16.yaml       the paper
    python train.py --recipe recipes/dmclip_demo.yaml        a Mamba CLIP taught by stored teachers, offline
    ... --stages teacher,student                             some stages only
    ... --student.learning_rate 2e-6                         any field; it overrides the recipe's value
    accelerate launch --num_processes 4 train.py ...         several GPUs

Finished stages are skipped, interrupted ones continue. At the end the student is evaluated beside the CLIP that it
started from: on the images that `test_fraction` keeps out of training, and on what `evaluate` names. A recipe with
`arms` and `seeds` trains each arm with each seed. `--push_to_hub me/name` publishes the trained model.
"""

import modeling_dclip  # noqa: F401  first: it takes Ctrl+C while the others load

# isort: split
import sys
from pathlib import Path

from modeling_dclip.data.failures import command

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"
FIELDS = Path(modeling_dclip.__file__).parent / "distillation" / "fields.txt"
HELP = ("--help", "-h")


def show_help() -> None:
    """Every field, from the file that `python -m modeling_dclip.distillation.recipes` writes."""
    print(f"{__doc__}\n  --recipe FILE (default recipes/{DEMO.name})\n\n{FIELDS.read_text(encoding='utf-8')}", end="")


if __name__ == "__main__" and any(word in HELP for word in sys.argv[1:]):
    sys.exit(command(show_help)())  # before what training alone needs is loaded

# isort: split
import logging
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState

from modeling_dclip.data.captions import load_captions, parse_caption_spec
from modeling_dclip.data.captions.parts import HELD_OUT
from modeling_dclip.data.failures import FAILURES, MistakeCollector, naming, one_line, recorded_command
from modeling_dclip.data.files import entry_names, show_script
from modeling_dclip.distillation.checks import check_effects, check_recipe, check_starting_models
from modeling_dclip.distillation.recipes import (
    ArmRun,
    Recipe,
    expand_arms,
    parse_recipe,
    shared_anchor,
)
from modeling_dclip.distillation.run import (
    Places,
    SharedData,
    check_parts,
    find_clip,
    holding_folders,
    keep_test_part,
    naming_unreadable,
)
from modeling_dclip.distillation.stages import run_stages
from modeling_dclip.encoders.loading import ADAPTER_FOLDER
from modeling_dclip.evaluation.arms import evaluate_arms, evaluate_run
from modeling_dclip.evaluation.benchmarks.kinds import check_benchmark, check_probe, find_reported, read_benchmark
from modeling_dclip.evaluation.evaluator import Probes
from modeling_dclip.evaluation.leakage import LeakageOptions, evaluate_leakage
from modeling_dclip.evaluation.records import Record, read_results
from modeling_dclip.evaluation.reports.maps import draw_teacher_attention
from modeling_dclip.evaluation.reports.plots import CURVES_NAME, draw_training_curves
from modeling_dclip.evaluation.reports.tables import (
    render_before_and_after,
    render_leakage,
    render_summary,
    render_table,
)
from modeling_dclip.evaluation.reports.verdict import show_verdicts
from modeling_dclip.hub.publish import check_publication, describe_publication, publish
from modeling_dclip.hub.publish.arguments import PublishArguments
from modeling_dclip.hub.publish.facts import suggest_name
from modeling_dclip.hub.publish.licences import check_licence, find_origins
from modeling_dclip.progress import duration_in_words

logger = logging.getLogger("modeling_dclip.train")  # as the package's own: said by the main process alone

# Runs in a process of its own that does not import the package: the code comes with the folder.
RELOAD = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
from transformers import AutoModel, AutoProcessor
loaded = []
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    loaded.append(f"{type(model).__name__} with {type(processor).__name__}")
print(" and ".join(loaded))
"""


def split_recipe(words: list[str]) -> tuple[list[str], Path]:
    """The command line without `--recipe FILE`, and that file."""
    if "--recipe" not in words:
        return words, DEMO
    place = words.index("--recipe") + 1
    if place == len(words):
        raise ValueError("Expected a file after --recipe, got nothing.")
    return [*words[: place - 1], *words[place + 1 :]], Path(words[place])


def check_all(recipe: Recipe, runs: Sequence[ArmRun], shared: SharedData) -> PublishArguments | None:
    """Find what is wrong before any work, and tell all of it at once; return what to publish at the end.

    First what takes no time: names, files, headers, licence. Then the weights that stages start from, and the data of
    the benchmarks.
    """
    found = MistakeCollector()
    arms = {run.arm: run.recipe for run in runs}  # what is checked does not depend on the seed
    benchmarks = {("evaluate", name): check_benchmark for run in runs for name in run.recipe.run.evaluate}
    students = [arm for arm in arms.values() if "student" in arm.stages]
    benchmarks |= {("student.probe", name): check_probe for arm in students for name in arm.student.probe}
    for (field, benchmark), check in benchmarks.items():
        with found.collecting(), naming(f"{field}: {benchmark}"):
            if (spec := check(benchmark)) is not None:
                spec.check_files()
    with found.collecting():
        check_effects(runs, recipe)
    for arm in arms.values():
        with found.collecting():
            check_recipe(arm, recipe)
    publication = plan_publication(runs, Path(recipe.run.output_dir) / "results", found)
    found.tell()
    for arm in arms.values():
        with found.collecting():
            check_starting_models(arm, recipe, shared)
    for arm in students:
        with found.collecting():
            check_choices(arm, runs, Path(recipe.run.output_dir))
    for field, benchmark in benchmarks if PartialState().is_main_process else []:
        with found.collecting(), naming(f"{field}: {benchmark}"):
            read_benchmark(benchmark, begins=recipe.run.output_dir)
    found.tell()
    return publication


def check_choices(arm: Recipe, runs: Sequence[ArmRun], folder: Path) -> None:
    """Refuse a student that is chosen on data which its results are reported on, and points on a line whose end a rule
    chooses anew for each run.

    Args:
        arm ([`Recipe`]): Of one arm.
        runs (`Sequence[ArmRun]`): All of the recipe.
        folder (`Path`): The run's, which names its test part.

    Raises:
        ValueError: Naming the benchmark, what reports it and the field that chooses by it.
    """
    name = arm.student.choosing_field
    if arm.run.alphas and arm.student.wise_ft_rule is not None:
        raise ValueError(
            "alphas: expected none beside student.wise_ft_rule, which chooses a point of its own for each seed, and "
            f"maybe the anchor, got {arm.run.alphas}. Leave one of both out."
        )
    tests = [f"retrieval={HELD_OUT}:{place}" for place in (folder, arm.run.output_dir)]
    reported = list(dict.fromkeys(one for run in runs for one in run.recipe.run.evaluate))
    for benchmark in arm.student.probe if name is not None else []:
        if same := find_reported(benchmark, [*tests, *reported]):
            where = "the run's test part" if same in tests else f"what evaluate reports ({same})"
            raise ValueError(
                f"student.probe: expected other data than {where} beside {name}, which chooses by it, got "
                f"{benchmark}. Name other images, such as a validation split: what is reported must not choose."
            )


def train_runs(recipe: Recipe, runs: Sequence[ArmRun], shared: SharedData) -> None:
    """Run every arm's stages, after the anchor that all share."""
    with naming_unreadable(shared):
        for run in runs:
            check_parts(run.recipe, shared)
        keep_test_part(recipe, shared)  # in the folder that holds the runs, which share it
        if (anchor := shared_anchor(recipe)) is not None:
            run_stages(anchor, shared)
        for run in runs:
            if len(runs) > 1:
                logger.info("\n=== %s, seed %d", run.arm, run.seed)
            run_stages(run.recipe, shared)


def find_models(runs: Sequence[ArmRun], *stages: str) -> list[tuple[ArmRun, str]]:
    """The folders that hold a model of one of these stages, with their runs."""
    places = [(run, Path(run.recipe.run.output_dir) / stage) for run in runs for stage in stages]
    return [(run, str(folder)) for run, folder in places if (folder / "config.json").exists()]


def named_benchmarks(runs: Sequence[ArmRun], folder: Path) -> list[str]:
    """What to evaluate on: the recipe's benchmarks, after the test part where one was kept.

    A summary of arms holds one benchmark of a kind, so there the test part comes only where no retrieval is named.
    """
    names = runs[0].recipe.run.evaluate
    test = f"retrieval={HELD_OUT}:{folder}"
    if not runs[0].recipe.run.test_fraction or test in names:
        return names
    has_retrieval = any(name.partition("=")[0] == "retrieval" for name in names)
    return names if has_retrieval and len(runs) > 1 else [test, *names]


def report_arms(runs: Sequence[ArmRun], folder: Path) -> None:
    """Evaluate all students beside their anchor, show what the teachers read, and load what was saved."""
    first, names, results = runs[0].recipe, named_benchmarks(runs, folder), folder / "results"
    arms: dict[str, dict[int, str]] = {}
    for run, model in find_models(runs, "student", "dmclip"):
        arms.setdefault(run.arm, {})[run.seed] = model
    anchor = find_clip(first, Places.of(first))
    compared = {"baseline": first.run.baseline, "alphas": first.run.alphas}
    summary = evaluate_arms(arms, anchor, names, results, **compared, **evaluation_options())
    both = {"retrieval", "zero_shot"} <= {name.partition("=")[0] for name in names}
    print("\n" + (render_summary(summary) if both else render_table(read_results(results / "records.json"))))
    teachers = [(run.arm, teacher) for run, teacher in find_models(runs, "teacher")]
    if leakage := report_teachers(first, teachers, results):
        print(f"\n{render_leakage(leakage)}")
    saved = [next(iter(seeds.values())) for seeds in list(arms.values())[-1:]] + [name for _, name in teachers[-1:]]
    if saved:
        print(f"\n{reload_models(saved)}")
    print(f"\nWritten to {results}: {', '.join(sorted(entry_names(results)))}")


def reload_models(folders: Sequence[str]) -> str:
    """Load saved models in a process that does not know this package, and say so."""
    command = [sys.executable, "-c", RELOAD, *(str(Path(name).resolve()) for name in folders)]
    ended = subprocess.run(command, cwd=Path.home(), capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"A saved model cannot be loaded without this package:\n{ended.stderr}")
    return f"A process without this package loaded {ended.stdout.strip()}."


def evaluation_options() -> dict[str, Any]:
    """The device, and the command for the records."""
    return {"device": PartialState().device, "command": recorded_command("train.py", sys.argv[1:])}


def report_run(run: ArmRun, folder: Path, began: float) -> None:
    """Answer what one run's training changed, and say where everything is and what to do next."""
    recipe, results = run.recipe, folder / "results"
    model = next((name for _, name in find_models([run], "student", "dmclip")), None)
    names = named_benchmarks([run], folder)
    adapter = folder / "student" / ADAPTER_FOLDER
    if names and (model or "anchor" in recipe.stages):
        anchor = find_clip(recipe, Places.of(recipe))
        logger.info("results: measures %s", f"{anchor} and {model}" if model else anchor)
        seed = {} if model is None else {"seed": run.seed}
        records = evaluate_run(model, anchor, names, results, **seed, **evaluation_options())
        test = {f"retrieval={HELD_OUT}:{folder}": "test part"}
        if table := render_before_and_after(records, names=test):
            print(f"\nBefore: {anchor}. After: {model}.\n\n{table}\n\n{show_verdicts(records)}")
        else:
            print(f"\n{render_table(records)}")
        report_teachers(recipe, [(run.arm, teacher) for _, teacher in find_models([run], "teacher")], results)
    elif model is not None:
        print("\nNothing says yet whether it helped: no images were kept for that. --test_fraction 0.1 "
              "--train_fraction 0.8 keeps a tenth.")  # fmt: skip
    elif adapter.is_dir() and "student" in recipe.stages:
        print("\nNothing was measured: student.merge_adapter is false, so there is an adapter and no whole model.")
    print(f"\n{describe_places(folder, model)}\nAll took {duration_in_words(time.monotonic() - began)}.")
    if model is not None:
        print(f"\n{describe_next(recipe, folder, model)}")


def describe_places(folder: Path, model: str | None) -> str:
    """Where model, curves and numbers are, one line each."""
    results = folder / "results"
    found = {
        "Model": [Path(model)] if model is not None else [],
        "Adapter": [folder / "student" / ADAPTER_FOLDER],
        "Curves": sorted(folder.glob(f"*/{CURVES_NAME}")),
        "Attention": [folder / "teacher_attention.png"],
        "Numbers": [results / "records.json", results / "leakage.json", results / "tradeoff.png"],
    }
    there = {name: [str(path) for path in paths if path.exists()] for name, paths in found.items()}
    return "\n".join(
        [f"{name:9} {', '.join(paths)}" for name, paths in there.items() if paths] or [f"Folder {folder}"]
    )


def describe_next(recipe: Recipe, folder: Path, model: str) -> str:
    """The next commands with this run's paths, ready to paste: see what it finds, search, publish."""
    query, pictures = "WORDS", next((re.sub(r"@[0-9]+$", "", one) for one in recipe.run.train_datasets), "FOLDER")
    test = pictures if recipe.run.train_datasets else "csv:CAPTIONS.csv:FOLDER"
    if recipe.run.test_fraction:
        test = f"{HELD_OUT}:{folder}"
        captions = load_captions(parse_caption_spec(test))[:5]["captions"]
        query = min((one for row in captions for one in row), key=len).strip(" .")
    anchor = []
    if recipe.run.clip_model is not None or recipe.makes_anchor:  # a DM-CLIP may start from no CLIP
        anchor = ["--anchor", find_clip(recipe, Places.of(recipe))]
    gallery, index = folder / "gallery", folder / "index"
    skipping = ["--on_bad_image", "skip"] if recipe.run.on_bad_image == "skip" else []
    steps: dict[str, list[list[str | Path]]] = {
        "See what it finds and misses. For other pictures, name them: retrieval=csv:CAPTIONS.csv:FOLDER": [
            [
                show_script("eval.py"),
                "--model",
                model,
                *anchor,
                "--benchmark",
                f"retrieval={test}",
                "--gallery",
                gallery,
            ]
            + ["--output", gallery / "results.json"]
        ],
        "Search pictures with words": [
            ["-m", "modeling_dclip.hub.index", "--model", model, "--images", pictures, "--output", index, *skipping],
            ["-m", "modeling_dclip.hub.index", "search", query, "--index", index, "--page", folder / "search.html"],
        ],
        "Write what would be published, under your name and licence; nothing leaves this machine": [
            ["-m", "modeling_dclip.hub.publish", "--model", model, "--results", folder / "results"]
            + ["--repo_id", f"me/{suggest_name(folder.resolve().name)}", "--license", "mit", "--dry_run"]
        ],
    }
    lines = ["Next:"]
    for title, commands in steps.items():
        lines += [f"  # {title}", *(f"  {shlex.join(['python', *map(str, words)])}" for words in commands)]
    return "\n".join(lines)


def report_teachers(recipe: Recipe, teachers: Sequence[tuple[str, str]], folder: Path) -> list[Record]:
    """Draw each teacher's attention and measure how much it reads from captions, on the first retrieval benchmark that
    the recipe names, if its images have boxes.
    """
    captions = [name.partition("=")[2] for name in recipe.run.evaluate if name.startswith("retrieval=")]
    if not teachers or not captions:
        return []
    spec = parse_caption_spec(captions[0])
    dataset = load_captions(spec)
    if "boxes" not in dataset.column_names:
        return []
    for _, teacher in teachers:
        draw_teacher_attention(teacher, dataset, Path(teacher).parent / "teacher_attention.png")
    leakage_options = LeakageOptions(max_regions=recipe.regions.max_regions)
    options = {**evaluation_options(), "cache_dir": Places.of(recipe).cache_dir, "options": leakage_options}
    return evaluate_leakage(teachers, dataset, spec, folder / "leakage.json", **options)


def plan_publication(runs: Sequence[ArmRun], results: Path, found: MistakeCollector) -> PublishArguments | None:
    """What to publish at the end, checked with the Hub before training; `None` if nothing."""
    run = runs[0].recipe.run
    if run.push_to_hub is None:
        return None
    recipe = next(one.recipe for one in runs if run.push_arm in (None, one.arm))
    model = f"{recipe.run.output_dir}/{'dmclip' if recipe.trains_dmclip else 'student'}"
    plan = PublishArguments(model, [str(results)], run.push_to_hub, run.push_license, private=run.push_private)
    with found.collecting():
        check_publication(plan)
    with found.collecting():
        origins = find_origins(recipe.resolved(*(["dmclip"] if recipe.trains_dmclip else [])))
        check_licence(plan.license, plan.license_name, plan.license_link, origins)
    return plan


def publish_model(plan: PublishArguments) -> None:
    """Publish the trained model, with its teacher if the run made one."""
    teacher = Path(plan.model).parent / "teacher"
    made = str(teacher) if (teacher / "config.json").is_file() else None
    try:
        print(describe_publication(publish(replace(plan, teacher=made))))
    except FAILURES as error:
        advice = "Then run `python -m modeling_dclip.hub.publish`."
        sys.exit(f"Failed: trained, but not published: {one_line(error)} {advice}")


def end_processes() -> None:
    """Leave the group of processes together. What follows is the main process's alone, however long it takes."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def run_recipe(recipe: Recipe) -> None:
    """Train; then, in the main process, draw, measure and publish."""
    began, is_main = time.monotonic(), PartialState().is_main_process
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("modeling_dclip").setLevel(logging.INFO if is_main else logging.WARNING)
    if (gpus := torch.cuda.device_count()) > 1 and PartialState().num_processes == 1:
        start = f"accelerate launch --num_processes {gpus} {show_script('train.py')}"
        logging.warning("One of %d GPUs is used. All of them: `%s` and the same words.", gpus, start)
    runs, shared = expand_arms(recipe), SharedData(open_probe=Probes())
    publication = check_all(recipe, runs, shared)
    results = Path(recipe.run.output_dir) / "results"
    with holding_folders([recipe.run.output_dir, *(run.recipe.run.output_dir for run in runs)]):
        train_runs(recipe, runs, shared)
        end_processes()
        if not is_main:
            return
        draw_training_curves(results.parent)
        if len(runs) == 1:
            report_run(runs[0], results.parent, began)
        elif named_benchmarks(runs, results.parent):
            report_arms(runs, results.parent)
        if publication is not None:
            publish_model(publication)


@command
def main(words: list[str]) -> None:
    """Run a recipe."""
    if any(word in HELP for word in words):
        return show_help()
    run_recipe(parse_recipe(*split_recipe(words)))


if __name__ == "__main__":
    main(sys.argv[1:])
