"""Runs of a subject of `benchmarks/kills.py`, undisturbed, killed or short of room, and what they leave.

Run by test_kills.py in a process that has not trained: the subjects fork, and autograd's threads do not survive that.
"""

import dataclasses
import importlib.util
import json
import resource
import signal
import sys
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "kills.py"
spec = importlib.util.spec_from_file_location("kills", PATH)
kills = importlib.util.module_from_spec(spec)
sys.modules["kills"] = kills  # dataclasses look there
spec.loader.exec_module(kills)
torch.set_num_threads(1)

what, folder, kept, *how = sys.argv[1:]
subject, folder, kept = kills.SUBJECTS[what], Path(folder), Path(kept)
if not how:
    kept.write_text(json.dumps(dataclasses.asdict(kills.run_undisturbed(subject, folder))))
    sys.exit()
whole, (point, value) = kills.Undisturbed(**json.loads(kept.read_text())), how
kills.renew(subject, folder)
if point == "killed":
    ended = kills.start(subject, folder, operation=1 + int(float(value) * whole.operations))
    assert ended.status == -signal.SIGKILL, ended.said
else:

    def run_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
        subject.run(folder)

    ended = kills.Forked(run_with_little_room, folder)
    assert ended.status == 1 and "TRACEBACK" not in ended.said, ended.said
    assert f"Failed: Cannot write '{folder}" in ended.said and "Make room, then run the same" in ended.said, ended.said
again = kills.start(subject, folder)
assert again.status == 0, again.said
assert kills.contents(folder) == whole.contents and kills.leftovers(folder) == []
