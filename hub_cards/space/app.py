"""The page of the Space: search pictures by text, and see what the models see. It runs on a CPU, without a network.

    python hub_cards/space/app.py --model FOLDER_OR_HUB_ID [--teacher FOLDER_OR_HUB_ID] [--gallery FOLDER_OR_DATASET]

On the Hub, set the variables MODEL, TEACHER, GALLERY and DETECTOR instead.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from modeling_dclip.data.failures import command
from modeling_dclip.data.images import UnreadableImageError, open_image
from modeling_dclip.evaluation.reports.document import escape_markdown
from modeling_dclip.hub.space import (
    DETECTOR,
    GALLERY,
    MOST_UPLOADED_PIXELS,
    SpaceAnswers,
    UserMistake,
    suggest_labels,
    suggest_queries,
)

ROOT = Path(__file__).resolve().parents[2]
# Folders that `make demo` writes, best first. The small CLIP of the repository is always there.
DEMO_MODELS = ("outputs/demo/leak_free/seed-0", "outputs/demo/paper/seed-0")
FALLBACK_MODEL = "recipes/demo_anchor"
EXAMPLES = 5
FONTS = ["system-ui", "sans-serif"]  # nothing is fetched
CSS = ".gradio-container {width: 100% !important; max-width: 1100px !important; margin: 0 auto !important}"


class BrokenUpload(NamedTuple):
    """An uploaded file that cannot be read as a picture, and why."""

    message: str


def make_upload(**options: Any) -> gr.Image:
    """Make an upload that is read as all other pictures are, and passes one that cannot be read on as
    [`BrokenUpload`], so that the answer can say so.

    gradio would decode a picture before its size is looked at, and lay transparent pixels over black. The component is
    not subclassed, because gradio would write a `.pyi` file beside this one.
    """
    upload = gr.Image(type="filepath", **options)

    def preprocess(payload: Any) -> Image.Image | BrokenUpload | None:
        if payload is None:
            return None
        name = f"'{payload.orig_name}'" if payload.orig_name else "The picture"
        if payload.path is None:
            return BrokenUpload(f"{name} is no file. Upload it as a file.")
        try:
            return open_image(
                payload.path,
                name,
                most_pixels=MOST_UPLOADED_PIXELS,
                advice="Give an undamaged JPEG, PNG or WebP file.",
            )
        except UnreadableImageError as error:
            return BrokenUpload(str(error).replace(str(payload.path), name))

    upload.preprocess = preprocess
    return upload


def said_plainly(function: Callable[..., tuple[Any, str]]) -> Callable[..., tuple[Any, str]]:
    """Show a visitor's mistake in place of the remark, with an empty answer."""

    def answer(*inputs: Any) -> tuple[Any, str]:
        try:
            for given in inputs:
                if isinstance(given, BrokenUpload):
                    raise UserMistake(given.message)
            return function(*inputs)
        except UserMistake as mistake:
            return None, f"⚠️ {escape_markdown(str(mistake))}"

    return answer


def save_examples(answers: SpaceAnswers) -> list[str]:
    """Save some pictures of the gallery, spread over it, as files."""
    folder = Path(tempfile.mkdtemp(prefix="space-"))
    rows = range(0, len(answers.gallery), max(1, len(answers.gallery) // EXAMPLES))
    paths = [folder / f"{number}.png" for number, _ in enumerate(rows)]
    for path, row in zip(paths, rows, strict=True):
        answers.picture(row).save(path)
    return [str(path) for path in paths[:EXAMPLES]]


def _picture_input(examples: list[str]) -> gr.Image:
    picture = make_upload(label="Picture", height=300, sources=["upload", "clipboard"])
    gr.Examples([[path] for path in examples], picture, label="Examples")
    return picture


def _search_tab(answers: SpaceAnswers) -> None:
    with gr.Row(equal_height=True):
        text = gr.Textbox(label="What should the picture show?", placeholder="a red circle left of a star", scale=5)
        count = gr.Slider(
            1, min(30, len(answers.gallery)), value=min(10, len(answers.gallery)), step=1, label="Pictures", scale=2
        )
        button = gr.Button("Search", variant="primary", scale=1, min_width=100)
    if queries := suggest_queries(answers.captions, answers.is_drawn):
        gr.Examples([[query] for query in queries], text, label="Examples")
    remark = gr.Markdown()
    found = gr.Gallery(
        label="Pictures, best first",
        show_label=False,
        buttons=["fullscreen"],
        columns=5,
        object_fit="contain",
        height="auto",
        format="png",
        interactive=False,
    )
    for event in (button.click, text.submit):
        event(said_plainly(answers.find_pictures), [text, count], [found, remark], api_name="search")


def _texts_tab(answers: SpaceAnswers, examples: list[str]) -> None:
    with gr.Row():
        with gr.Column():
            picture = _picture_input(examples)
            own = gr.Textbox(
                label="Your own texts, one in each line", placeholder="empty: the gallery's captions", lines=3
            )
            button = gr.Button("Find texts", variant="primary")
        with gr.Column():
            remark = gr.Markdown()
            table = gr.Dataframe(headers=["text", "cosine"], datatype=["str", "number"], wrap=True, interactive=False,
                                 column_widths=["80%", "20%"], label="Texts, best first")  # fmt: skip
    button.click(said_plainly(answers.find_texts), [picture, own], [table, remark], api_name="texts")


def _classes_tab(answers: SpaceAnswers, examples: list[str]) -> None:
    labels, prompt = suggest_labels(answers.is_drawn)
    with gr.Row():
        with gr.Column():
            picture = _picture_input(examples)
            names = gr.Textbox(value=labels, label="Labels, separated by commas or one in each line", lines=2)
            phrase = gr.Textbox(value=prompt, label="Prompt ({} stands for the label)")
            button = gr.Button("Classify", variant="primary")
        with gr.Column():
            remark = gr.Markdown()
            shares = gr.Label(num_top_classes=8, label="Probability of each label")
    button.click(said_plainly(answers.classify), [picture, names, phrase], [shares, remark], api_name="classify")


def _attention_tab(answers: SpaceAnswers, examples: list[str]) -> None:
    if answers.teacher is None:
        gr.Markdown(
            "This page was started without a teacher. To add one, start it with `--teacher FOLDER`, or set the "
            "variable `TEACHER` of the Space."
        )
        return
    reads_text = answers.teacher[0].config.cross_attention != "regions"
    hint = "this teacher reads the text" if reads_text else "optional: the title of the drawing"
    with gr.Row():
        with gr.Column():
            picture = _picture_input(examples)
            caption = gr.Textbox(
                label="What does it show?",
                placeholder=hint,
            )
            button = gr.Button("Show attention", variant="primary")
        with gr.Column():
            remark = gr.Markdown()
            drawing = gr.Image(
                label="Where the teacher looks",
                show_label=False,
                interactive=False,
                format="png",
                buttons=["download", "fullscreen"],
            )
    button.click(said_plainly(answers.attend), [picture, caption], [drawing, remark], api_name="attention")


def short_name(model: str) -> str:
    """The name of a model to show: a Hub id, or the end of a folder's path."""
    return "/".join(Path(model).resolve().parts[-3:]) if os.path.isdir(model) else model


def build_app(answers: SpaceAnswers) -> gr.Blocks:
    """Build the page."""
    examples = save_examples(answers)
    with gr.Blocks(title="Picture search", analytics_enabled=False) as app:
        gr.Markdown(
            f"# Picture search\n{len(answers.gallery)} pictures, model **{escape_markdown(short_name(answers.name))}**"
            f"{f', teacher **{escape_markdown(short_name(answers.teacher_name))}**' if answers.teacher_name else ''}. "
            "Everything is computed on this machine."
        )
        with gr.Tab("Text to picture"):
            _search_tab(answers)
        with gr.Tab("Picture to text"):
            _texts_tab(answers, examples)
        with gr.Tab("Classify"):
            _classes_tab(answers, examples)
        with gr.Tab("Teacher's attention"):
            _attention_tab(answers, examples)
    return app


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
    model, teacher = default_models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="Folder or Hub id of a dual encoder.")
    parser.add_argument("--teacher", default=os.environ.get("TEACHER"), help="Folder or Hub id of a trained teacher.")
    parser.add_argument(
        "--gallery", default=os.environ.get("GALLERY", GALLERY), help="Folder of pictures to search, or a dataset."
    )
    parser.add_argument(
        "--detector", default=os.environ.get("DETECTOR", DETECTOR), help="What finds regions in uploads."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME"), help="Address to listen on.")
    parser.add_argument("--port", type=int, default=None, help="Port; by default the first free one from 7860.")
    arguments = parser.parse_args(argv)
    if arguments.model is None:
        arguments.model, arguments.teacher = model, arguments.teacher or teacher
    if arguments.model is None:
        parser.error("Expected a model, got none. Give --model, or set the variable MODEL.")
    if arguments.port is not None and not 0 <= arguments.port < 2**16:
        parser.error(f"--port: expected a number from 0 to 65535, got {arguments.port}")
    return arguments


def launch(app: gr.Blocks, **options: Any) -> tuple[Any, str, str]:
    """Start the server with the page's theme."""
    theme = gr.themes.Soft(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"])
    return app.launch(theme=theme, css=CSS, max_file_size="20mb", footer_links=["gradio"], **options)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Load the models and serve the page."""
    given = parse_arguments(argv)
    answers = SpaceAnswers(
        given.model, given.teacher, gallery=given.gallery, detector=given.detector,
        trust_remote_code=given.trust_remote_code,
    )  # fmt: skip
    launch(build_app(answers), server_name=given.host, server_port=given.port)


if __name__ == "__main__":
    main()
