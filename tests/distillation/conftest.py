"""Run a script as `accelerate launch` does, with one or more CPU processes."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def launch():
    """`launch(script, processes, *arguments)`: run to the end, or fail with what the script wrote to stderr."""

    def run(script, processes, *arguments):
        # `--multi_gpu` is accelerate's word for torchrun; with ACCELERATE_USE_CPU its processes meet over gloo.
        several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *(str(script), *map(str, arguments)),
        ]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert finished.returncode == 0, finished.stderr[-5000:]

    return run
