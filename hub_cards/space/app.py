"""Open a page in the browser that searches pictures with words or with a picture. It runs on a CPU, without a network.

    python hub_cards/space/app.py --index my_index
    python hub_cards/space/app.py --model outputs/mine/student --gallery my_pictures
    python hub_cards/space/app.py --model outputs/mine/student --gallery my_pictures --teacher outputs/mine/teacher

The first form opens a search index at once; `python -m modeling_dclip.hub.index` builds one. The others embed the
pictures at each start, about a minute for a thousand. Without options it shows drawn pictures, with the models of
`make demo` or else the repository's small CLIP. On the Hub, set the variables INDEX, MODEL, GALLERY, TEACHER and
DETECTOR instead of the options.
"""

import modeling_dclip  # noqa: F401  first: it takes Ctrl+C while the others load

# isort: split
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from modeling_dclip.data.failures import command, naming
from modeling_dclip.data.files import require_folder
from modeling_dclip.data.specs import CommandParser, Range

# The rest is imported after the arguments are checked: gradio and PyTorch take seconds.

ROOT = Path(__file__).resolve().parents[2]
# Folders that `make demo` writes, best first. The small CLIP of the repository is always there.
DEMO_MODELS = ("outputs/demo/leak_free/seed-0", "outputs/demo/paper/seed-0")
FALLBACK_MODEL = "recipes/demo_anchor"
PORTS = Range(0, 2**16 - 1, whole=True)


def default_models(root: Path = ROOT) -> tuple[str | None, str | None]:
    """Student and teacher of the demo if they exist, else the small CLIP of the repository."""
    for folder in (root / name for name in DEMO_MODELS):
        if (folder / "student").is_dir():
            teacher = folder / "teacher"
            return str(folder / "student"), str(teacher) if teacher.is_dir() else None
    fallback = root / FALLBACK_MODEL
    return (str(fallback) if fallback.is_dir() else None), None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, then the variables, then what `make demo` wrote."""
    parser = CommandParser(prog="python hub_cards/space/app.py", description=__doc__)
    variables = {
        "index": "Folder of a search index, which names its model and its pictures.",
        "model": "Model that compares pictures and words: a folder or a Hub id. With --index: where its model is now.",
        "gallery": "Pictures to search: a folder, or a dataset such as csv:captions.csv:photos. With --index: where "
        "its pictures are now. Default: drawn pictures.",
        "teacher": "Folder or Hub id of a trained teacher. Adds a tab that shows where it looks.",
        "detector": "What finds regions for the teacher in pictures without boxes: grid:ROWSxCOLUMNS, or "
        "transformers:MODEL. Default: grid:3x3.",
    }
    for name, text in variables.items():
        parser.add_argument(f"--{name}", default=os.environ.get(name.upper()) or None, help=text)
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    host = "Address to listen on; 0.0.0.0 lets other machines in. Default: this machine only."
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME"), help=host)
    parser.add_argument("--port", range=PORTS, help="Port to listen on. Default: the first free one from 7860.")
    arguments = parser.parse_args(argv)
    if arguments.model is None and arguments.index is None:
        arguments.model, teacher = default_models()
        arguments.teacher = arguments.teacher or teacher
        if arguments.model is None:
            parser.error("Expected a model, got none. Give --model or --index, or set the variable MODEL or INDEX.")
    return arguments


def check_places(given: argparse.Namespace) -> None:
    """Refuse an index, a model or pictures that are not there, before anything slow is imported.

    Raises:
        FileNotFoundError, ValueError: Naming the option, or what the index says.
    """
    from modeling_dclip.hub.index import read_manifest

    if given.index is not None:
        with naming("--index"):
            model = read_manifest(given.index)["model"]
        if given.model is None and os.path.isabs(model) and not os.path.isdir(model):
            raise FileNotFoundError(
                f"--index: the model of '{given.index}' is no longer at '{model}'. Say with --model where it is now."
            )
    for option, place in {"--model": given.model, "--teacher": given.teacher}.items():
        # Any other form is a Hub id or a name of open_clip, which loading looks up.
        if place is not None and (os.path.isabs(place) or place.startswith(".") or place.count("/") > 1):
            with naming(option):
                require_folder(place, "model")
    if given.gallery is not None and ":" not in given.gallery:
        with naming("--gallery"):
            require_folder(given.gallery, "pictures")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Load the models and serve the page."""
    given = parse_arguments(argv)
    check_places(given)
    from page import build_app, launch
    from transformers.utils import logging

    from modeling_dclip.hub.space import DETECTOR, SpaceAnswers

    logging.disable_progress_bar()  # of loading weights; embedding has its own bar
    answers = SpaceAnswers(
        given.model, given.teacher, gallery=given.gallery, index=given.index, detector=given.detector or DETECTOR,
        trust_remote_code=given.trust_remote_code,
    )  # fmt: skip
    app = build_app(answers)
    _, address, _ = launch(app, server_name=given.host, server_port=given.port)
    sys.stdout.write(f"Picture search: open {address} in a browser. Ctrl+C ends it.\n")
    sys.stdout.flush()
    app.block_thread()


if __name__ == "__main__":
    main()
