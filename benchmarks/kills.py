"""Does every command continue after a kill? Kill it at random points, start it again, compare with an undisturbed run.

    python benchmarks/kills.py                            all commands, 20 kills each: about an hour on one core
    python benchmarks/kills.py --what student --runs 50   one of them

A run is killed with SIGKILL, half of the time after a random time, half of the time before a random operation on a
file (opening for writing, making, moving, removing). Some runs are killed twice. Then the command is started again
until it ends, always with the same words. What it leaves has to be equal, bit by bit, to what an undisturbed run
leaves, except times, logs and checkpoints; no temporary folder may stay behind.

The models are those of tests: a few steps, drawn scenes, one thread, on the CPU. Commands run in forked processes, so
that none loads PyTorch again. Started again, the script goes on where it stopped; the points follow from the seed.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import modeling_dclip  # noqa: F401  registers the Auto classes
from modeling_dclip.data.failures import command, recorded_command
from modeling_dclip.data.files import (
    LOCK_NAME,
    find_files,
    is_temporary,
    read_bytes,
    read_json,
    write_json,
    write_text,
)
from modeling_dclip.encoders.fingerprints import hash_bytes
from modeling_dclip.evaluation.records import environment

ROOT = Path(__file__).resolve().parents[1]
CLIP = str(ROOT / "recipes" / "demo_anchor")
STEPS = {
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 5,  # of batches of 4 of 12 images: not where an epoch ends, nor at a checkpoint
    "learning_rate": 1e-3,
    "logging_steps": 1,
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ANCHOR = {
    "train_datasets": ["scenes:pretrain,n=12,image_size=32,captions=coarse"],
    "vision_config": {**TOWER, "image_size": 32, "patch_size": 16},
    "text_config": TOWER,
    "projection_dim": 16,
    **STEPS,
}
DMCLIP = {
    "image_size": 32,
    "vision_config": {"stem_dim": 4, "hidden_size": 4, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    "text_config": TOWER,
    "projection_dim": 8,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 2,
    **STEPS,
}
SCENES = "scenes:train,n=12,image_size=32,captions_per_image=2"
TEACHER = {"cross_attention": "regions", **STEPS}
RECIPES: dict[str, dict[str, Any]] = {
    "anchor": {"stages": ["anchor"], "anchor": ANCHOR},
    "regions, teacher, targets": {
        "stages": ["regions", "teacher", "targets"],
        **{"clip_model": CLIP, "regions": {"detector": "grid:2x2", "batch_size": 4}},
        **{"teacher": TEACHER, "targets": {"chunk_rows": 4}},
    },
    "student": {"clip_model": CLIP, "teacher": {**TEACHER, "max_steps": 1}, "student": STEPS},
    "LoRA student": {
        "clip_model": CLIP,
        "teacher": {**TEACHER, "max_steps": 1},
        "student": {**STEPS, "lora_rank": 2, "lora_target_modules": "q_proj"},
    },
    "reinforce, dmclip": {
        "clip_model": CLIP,
        "reinforce": {"teachers": [CLIP], "augmentations": 2, "samples_per_shard": 4, "image_size": 32},
        "dmclip": DMCLIP,
    },
    "overwrite": {"clip_model": CLIP, "teacher": {**TEACHER, "max_steps": 1}, "student": STEPS},
}
# What may differ between equal runs, by key of a JSON object: times, and what was computed now and what was there.
VOLATILE = {"created", "git_revision", "_fingerprint", "computed", "changes", "command", "hardware"}
LOGS = {"trainer_state.json", "manifest.json", "stage_notes.json", "training_args.bin"}
VOLATILE_SUFFIXES = (".png", ".log")
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
ATTEMPTS = 4  # starts after the kills, of which the first should do


@dataclass
class KillArguments:
    """One run of the script."""

    what: list[str] | None = field(default=None, metadata={"help": "Which of them; by default all."})
    runs: int = field(default=20, metadata={"help": "Runs of each that are killed once or twice."})
    seed: int = field(default=0, metadata={"help": "Of the points."})
    work: str = field(default="outputs/kills", metadata={"help": "Folder of the runs."})
    output: str = field(default="benchmarks/results/kills.json", metadata={"help": "Results file; goes on if there."})


@dataclass(frozen=True)
class Subject:
    """A command that is killed.

    Args:
        command (`str`): Its name, for the table.
        what (`str`): Which part of it.
        run (`Callable`): Runs it to the end, in the folder that it is given.
        prepare (`Callable`, *optional*): Makes what must be there before.
    """

    command: str
    what: str
    run: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None


def script(name: str) -> Any:
    """A script of the repository as a module."""
    spec = spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"No {name}.py in {ROOT}.")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: str, *words: str) -> None:
    """Run a command of the package. Its exit status becomes this process's."""
    loaded = script(module) if module in ("train", "eval") else importlib.import_module(module)
    if status := loaded.main(list(words)):
        if not isinstance(status, Path):
            sys.exit(status)


def train(what: str, *words: str) -> Callable[[Path], None]:
    """A run of train.py with one of the recipes above."""

    def run(folder: Path) -> None:
        recipe = {"output_dir": str(folder / "run"), "train_datasets": [SCENES], **RECIPES[what]}
        write_text(folder / "recipe.yaml", yaml.safe_dump(recipe))
        call("train", "--recipe", str(folder / "recipe.yaml"), *words)

    return run


def index(folder: Path) -> None:
    """Build an index of drawn scenes."""
    words = ("--model", CLIP, "--images", "scenes:test,n=12,image_size=32", "--output", str(folder / "run"))
    call("modeling_dclip.hub.index.__main__", "build", *words, "--chunk_rows", "4", "--batch_size", "4")


def reinforced(folder: Path) -> None:
    """Write reinforced shards."""
    words = ("--dataset", SCENES, "--teachers", CLIP, "--output", str(folder / "run"), "--image_size", "32")
    call("modeling_dclip.data.reinforced.__main__", *words, "--augmentations", "2", "--samples_per_shard", "4")


def regions(folder: Path) -> None:
    """Write regions. A finished output is refused, which is no failure here."""
    output = folder / "run" / "out"
    finished = output.exists()
    words = ("--dataset", SCENES, "--detector", "grid:2x2", "--output", str(output))
    try:
        call("modeling_dclip.data.regions.__main__", *words, "--cache_dir", str(folder / "run" / "cache"))
    except SystemExit as ended:
        if not (finished and f"'{output}' exists." in str(ended.code)):
            raise


def evaluate(folder: Path) -> None:
    """Evaluate a model and points on the way to it."""
    words = ("--model", CLIP, "--anchor", CLIP, "--output", str(folder / "run" / "records.json"), "--alphas", "0.5")
    benchmarks = ("retrieval=scenes:test,n=12", "zero_shot=scenes:test,n=12", "fine_grained=scenes:test,n=4")
    call("eval", *words, "--benchmark", *benchmarks, "--classifier_cache", str(folder / "run" / "classifiers"))


SUBJECTS = {
    one.what: one
    for one in (
        *(Subject("train.py", what, train(what)) for what in RECIPES if what != "overwrite"),
        Subject(
            "train.py",
            "overwrite",
            train("overwrite", "--overwrite", "true"),
            train("overwrite", "--student.learning_rate", "5e-4", "--teacher.learning_rate", "5e-4"),
        ),
        Subject("python -m modeling_dclip.hub.index", "index", index),
        Subject("python -m modeling_dclip.data.reinforced", "reinforced", reinforced),
        Subject("python -m modeling_dclip.data.regions", "regions", regions),
        Subject("eval.py", "eval", evaluate),
    )
}


def begin_in_fork() -> None:
    """Make PyTorch's threads usable in a forked process, before it has a second thread.

    PyTorch renews its pool when it is first used after a fork, and does not guard that: two threads at once find none
    ("Invalid thread pool!"). transformers loads weights in threads.
    """
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


class Forked:
    """A function in a forked process, killed after a time or before its k-th operation on a file, or not at all.

    Args:
        work (`Callable`): The function.
        folder (`Path`): Operations on what is in it count.
        operation (`int`, *optional*): Kill it before this one.
        after_s (`float`, *optional*): Kill it after so many seconds.

    Attributes:
        status (`int`): Its exit status; negative if a signal ended it.
        operations (`int`): How many there were.
        seconds (`float`): How long it took.
        said (`str`): The end of what it wrote.
    """

    def __init__(
        self, work: Callable[[], Any], folder: Path, operation: int | None = None, after_s: float | None = None
    ):
        begin = time.monotonic()
        with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as count:
            child = os.fork()
            if not child:
                begin_in_fork()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                os._exit(self._run(work, folder, operation, count.fileno()))
            while after_s is not None and time.monotonic() - begin < after_s and not self._ended(child):
                time.sleep(min(0.01, after_s))
            if after_s is not None and not self._ended(child):
                os.kill(child, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            self.seconds = time.monotonic() - begin
            count.seek(0)
            self.operations = len(count.read())
            log.seek(0)
            self.said = log.read().decode(errors="replace")[-2000:]

    @staticmethod
    def _ended(child: int) -> bool:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    @staticmethod
    def _run(work: Callable[[], Any], folder: Path, operation: int | None, count: int) -> int:
        place, done = str(folder), [0]

        def watch(event: str, given: tuple) -> None:
            if event not in OPERATIONS and not (
                event == "open" and isinstance(given[1], str) and given[1][0] in "wax"
            ):
                return
            if not any(isinstance(one, (str, Path)) and place in str(one) for one in given):
                return
            done[0] += 1
            if done[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(count, b".")

        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.addaudithook(watch)
        try:
            work()
        except SystemExit as ended:
            if isinstance(ended.code, str):
                sys.stderr.write(ended.code)
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception as error:  # what a user would see as a traceback
            sys.stderr.write(f"TRACEBACK {type(error).__name__}: {error}")
            return 99
        finally:
            sys.stdout.flush(), sys.stderr.flush()
        return 0


def without_volatile(value: Any) -> Any:
    """A JSON value without what may differ between equal runs."""
    if isinstance(value, dict):
        return {name: without_volatile(one) for name, one in value.items() if name not in VOLATILE}
    return [without_volatile(one) for one in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """The files of a run by name, each with a hash of what must not differ."""
    found = {}
    for path in find_files(folder).files:
        name = path.relative_to(folder)
        aside = path.name in LOGS or path.suffix in VOLATILE_SUFFIXES or "runs" in name.parts
        if aside or path.name.endswith(".lock") or any(part.startswith("checkpoint-") for part in name.parts):
            continue
        content = read_bytes(path)
        if path.suffix == ".json":
            content = json.dumps(without_volatile(read_json(path)), sort_keys=True).encode()
        found[name.as_posix()] = hash_bytes(content)
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary folders and locks that a finished run left behind."""
    places = (Path(parent, name) for parent, folders, names in os.walk(folder) for name in [*folders, *names])
    return sorted(str(path) for path in places if is_temporary(path) or path.name in (LOCK_NAME, ".out.lock"))


@dataclass
class Undisturbed:
    """What a run without a kill leaves, and its size in operations and seconds."""

    contents: dict[str, str]
    operations: int
    seconds: float


def start(subject: Subject, folder: Path, **kill: Any) -> Forked:
    """Start a subject in its folder."""
    return Forked(lambda: subject.run(folder), folder, **kill)


def renew(subject: Subject, folder: Path) -> None:
    """An empty folder, or what must be there before."""
    shutil.rmtree(folder, ignore_errors=True)
    prepared = folder.with_name(f"{folder.name} before")
    if not prepared.exists():
        folder.mkdir(parents=True)
        made = Forked(lambda: subject.prepare(folder), folder)
        if made.status:
            raise RuntimeError(f"{subject.what}: could not be prepared: {made.said}")
        folder.rename(prepared)
    shutil.copytree(prepared, folder)


def run_undisturbed(subject: Subject, folder: Path) -> Undisturbed:
    """Run a subject to its end."""
    renew(subject, folder)
    whole = start(subject, folder)
    if whole.status or leftovers(folder):
        raise RuntimeError(f"{subject.what}: the undisturbed run failed ({leftovers(folder)}): {whole.said}")
    return Undisturbed(contents(folder), whole.operations, whole.seconds)


def try_kills(subject: Subject, folder: Path, whole: Undisturbed, draw: random.Random) -> dict[str, Any]:
    """Kill a run once or twice, start it until it ends, compare.

    Returns:
        `dict[str, Any]`: `kills`, `outcome` (`equal`, `different` or `error`), `leftovers`, and `where` for messages.
    """
    renew(subject, folder)
    kills, where = 0, []
    for _ in range(1 + (draw.random() < 0.3)):
        if draw.random() < 0.5:
            point: dict[str, Any] = {"operation": draw.randint(1, whole.operations)}
        else:
            point = {"after_s": draw.uniform(0, whole.seconds)}
        where.append(point)
        killed = start(subject, folder, **point)
        kills += killed.status == -signal.SIGKILL
        if killed.status not in (0, -signal.SIGKILL):
            return {"kills": kills, "outcome": "error", "leftovers": 0, "where": where, "said": killed.said}
    ended = start(subject, folder)
    if ended.status:
        return {"kills": kills, "outcome": "error", "leftovers": 0, "where": where, "said": ended.said}
    found = contents(folder)
    odd = sorted(name for name in found.keys() | whole.contents.keys() if found.get(name) != whole.contents.get(name))
    left = leftovers(folder)
    outcome = "different" if odd else "equal"
    return {"kills": kills, "outcome": outcome, "leftovers": len(left), "where": where, "said": [odd, left]}


def new_row(subject: Subject) -> dict[str, Any]:
    """A row of the table, before the first run."""
    counts = dict.fromkeys(("runs", "kills", "resumed_equal", "different", "errors", "leftovers"), 0)
    return {"command": subject.command, "what": subject.what, **counts}


def add_run(row: dict[str, Any], tried: dict[str, Any]) -> None:
    """Count one run."""
    row["runs"] += 1
    row["kills"] += tried["kills"]
    row["leftovers"] += tried["leftovers"] > 0
    row[{"equal": "resumed_equal", "different": "different", "error": "errors"}[tried["outcome"]]] += 1


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Kill every subject, and keep the counts after each run."""
    parser = HfArgumentParser(KillArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(argv)
    unknown = [name for name in args.what or () if name not in SUBJECTS]
    if unknown:
        raise ValueError(f"Expected what to be of {', '.join(SUBJECTS)}, got {unknown[0]!r}.")
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread may hold the bars' lock while this process forks, and no child would get it
    work, output = Path(args.work).resolve(), Path(args.output)
    os.environ.update(XDG_CACHE_HOME=str(work / "cache"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    stored = read_json(output, "results file", ["rows"])["rows"] if output.is_file() else []
    rows = {row["what"]: row for row in stored}
    words = recorded_command("python benchmarks/kills.py", sys.argv[1:] if argv is None else argv)
    head = {"created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": words, "seed": args.seed}
    versions, hardware = environment()
    head["environment"] = {"versions": versions, "hardware": hardware}
    names = args.what or list(SUBJECTS)
    done = sum(min(args.runs, rows[name]["runs"]) for name in names if name in rows)
    with tqdm(total=args.runs * len(names), initial=done, unit="run") as progress:
        for name in names:
            subject = SUBJECTS[name]
            row = rows.setdefault(name, new_row(subject))
            folder = work / name.replace(", ", "-")
            if row["runs"] < args.runs:
                progress.set_description(name)
                shutil.rmtree(folder.with_name(f"{folder.name} before"), ignore_errors=True)
                whole = run_undisturbed(subject, folder)
            while row["runs"] < args.runs:
                tried = try_kills(subject, folder, whole, random.Random(f"{args.seed} {name} {row['runs']}"))
                add_run(row, tried)
                if tried["outcome"] != "equal" or tried["leftovers"]:
                    progress.write(f"{name}, run {row['runs'] - 1}: {json.dumps(tried)}")
                ordered = [rows[one] for one in SUBJECTS if one in rows]
                write_json(output, {**head, "rows": ordered})
                progress.update()


if __name__ == "__main__":
    main()
