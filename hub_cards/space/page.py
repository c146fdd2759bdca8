"""The page of the Space: what a visitor sees, and the answers of `modeling_dclip.hub.space` in it."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from modeling_dclip.data.images import UnreadableImageError, open_image
from modeling_dclip.evaluation.reports.document import escape_markdown
from modeling_dclip.hub.index import Hit
from modeling_dclip.hub.index.answers import short_name, short_place
from modeling_dclip.hub.space import (
    MOST_UPLOADED_PIXELS,
    SpaceAnswers,
    UserMistake,
    suggest_labels,
    suggest_queries,
)
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.progress import count_of

EXAMPLES = 5
SHORT_HINT = 24  # characters that fit a text box of a telephone in one line
LARGEST_EXAMPLE = 1024  # pixels of the longest side
FONTS = ["system-ui", "sans-serif"]  # nothing is fetched
CSS = """
.gradio-container {width: 100% !important; max-width: 1100px !important; margin: 0 auto !important}
.found .grid-wrap {max-height: none !important; min-height: 0 !important; height: auto !important; overflow: visible}
.found .grid-container {grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important}
.found .grid-container {grid-template-rows: none !important; grid-auto-rows: auto !important}
.found .grid-container, .found .gallery-container {height: auto !important}
.found .gallery-item, .found .thumbnail-lg {height: auto !important; aspect-ratio: auto !important; overflow: hidden}
.found .thumbnail-lg {display: flex; flex-direction: column; width: 100%; justify-content: flex-start}
.found .thumbnail-lg img {aspect-ratio: 1; height: auto !important; width: 100%; object-fit: contain}
.found .caption-label {position: static !important; max-width: none !important; width: 100%; margin: 0; border: 0;
  border-radius: 0; box-shadow: none; white-space: pre-line !important; overflow-wrap: anywhere; text-align: left;
  font-size: 13px; line-height: 1.35}
.search-box .submit-button {background: var(--button-primary-background-fill); padding: 0 18px; height: 36px;
  color: var(--button-primary-text-color); font-weight: 600; border-radius: 8px}
@media (max-width: 640px) {
  .gradio-container main {padding: 12px 10px !important}
  #answer {flex-direction: column}
  .found .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
}
"""


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


def said_plainly(function: Callable[..., tuple[Any, ...]], answers: int = 1) -> Callable[..., tuple[Any, ...]]:
    """Show a visitor's mistake in place of the remark, which comes last, with so many empty answers."""

    def answer(*inputs: Any) -> tuple[Any, ...]:
        try:
            for given in inputs:
                if isinstance(given, BrokenUpload):
                    raise UserMistake(given.message)
            return function(*inputs)
        except UserMistake as mistake:
            return *[None] * answers, f"⚠️ {escape_markdown(str(mistake))}"

    return answer


def save_examples(answers: SpaceAnswers) -> list[str]:
    """Save some pictures of the gallery, spread over it, as files. Those that cannot be read any more are left out."""
    folder, paths = Path(tempfile.mkdtemp(prefix="space-")), []
    for number, hit in enumerate(answers.sample(EXAMPLES)):
        try:
            picture = answers.picture(hit).copy()
        except UserMistake:
            continue
        stem = re.sub(r"[^\w-]+", "-", Path(hit.name).stem)[:80]
        if max(picture.size) > LARGEST_EXAMPLE:
            picture.thumbnail((LARGEST_EXAMPLE, LARGEST_EXAMPLE))
            paths.append(folder / f"{number}-{stem}.jpg")
        else:
            paths.append(folder / f"{number}-{stem}.png")  # its pixels as they are: they tell which picture it is
        picture.save(paths[-1])
    return [str(path) for path in paths]


def _offer(kind: gr.components.Component, label: str, samples: list[str], into: gr.components.Component) -> Any:
    """Offer samples that go into a component when they are clicked; the event, to go on from.

    Not gr.Examples: it would make an upload anew, without what `make_upload` did to it.
    """
    shown = gr.Dataset(components=[kind], samples=[[one] for one in samples], type="index", label=label)
    return shown.click(samples.__getitem__, shown, into, api_visibility="private", show_progress="hidden")


def _picture_input(examples: list[str], height: int = 300) -> tuple[gr.Image, Any]:
    """An upload with some pictures of the gallery, and the event that one of these was chosen."""
    picture = make_upload(label="Picture", height=height, sources=["upload", "clipboard"])
    return picture, _offer(gr.Image(visible=False), "Pictures of the gallery", examples, picture)


def _search_tab(answers: SpaceAnswers, examples: list[str]) -> None:
    """Search by text, by picture, and by a picture that was found."""
    queries = suggest_queries(answers)
    most, start = min(60, len(answers.gallery)), answers.browse()
    with gr.Row(equal_height=True):
        text = gr.Textbox(label="What should the picture show?", scale=5, min_width=280, submit_btn="Search",
                          elem_classes="search-box", max_lines=4,
                          placeholder=shorten(min(queries, key=len), SHORT_HINT, placeholder=" …"))  # fmt: skip
        count = gr.Slider(1, most, value=min(12, most), step=1, label="Pictures", scale=2, min_width=180)
    example = _offer(gr.Textbox(visible=False), "Examples", queries, text)
    with gr.Accordion("Search by a picture", open=False):
        picture, chosen = _picture_input(examples, 220)
        by_picture = gr.Button("Search by this picture", variant="primary")
    with gr.Row(elem_id="answer"):
        asked = gr.Image(visible=False, interactive=False, show_label=False, height=180, min_width=140, scale=1,
                         format="png", buttons=["download", "fullscreen"])  # fmt: skip
        remark = gr.Markdown(start.remark)
    found = gr.Gallery(start.tiles, label="Pictures, best first", show_label=False, columns=4, height="auto",
                       object_fit="contain", allow_preview=False, interactive=False, buttons=[],
                       elem_classes="found")  # fmt: skip
    shown = gr.State(start.hits)
    outputs = [found, remark, shown, asked]

    def find(query: str | Image.Image | BrokenUpload | None, count: int) -> tuple[Any, str, list[Hit], Any]:
        result, told = said_plainly(lambda *given: (answers.find_pictures(*given), ""))(query, count)
        if result is None:
            return start.tiles, told, start.hits, gr.Image(value=None, visible=False)
        is_picture = isinstance(query, Image.Image)
        preview = gr.Image(value=query, visible=True) if is_picture else gr.Image(visible=False)
        return result.tiles, result.remark, result.hits, preview

    def find_by(picture: Image.Image | BrokenUpload | None, count: int) -> tuple[Any, str, list[Hit], Any]:
        nothing = BrokenUpload("There is no picture. Upload one, or choose one of the gallery.")
        return find(nothing if picture is None else picture, count)

    def find_like(shown: list[Hit], count: int, event: gr.SelectData) -> tuple[Any, str, list[Hit], Any]:
        result, told = said_plainly(lambda hit, count: (answers.find_like(hit, count), ""))(shown[event.index], count)
        if result is None:
            return gr.skip(), told, gr.skip(), gr.skip()
        picture, like = result
        return (
            gr.Gallery(like.tiles, selected_index=None),
            like.remark,
            like.hits,
            gr.Image(value=picture, visible=True),
        )

    text.submit(find, [text, count], outputs, api_name="search")
    answered = [
        by_picture.click(find_by, [picture, count], outputs, api_name="search_by_picture"),
        picture.upload(find_by, [picture, count], outputs, api_visibility="private"),
        chosen.then(find_by, [picture, count], outputs, api_visibility="private"),
        found.select(find_like, [shown, count], outputs, api_visibility="private"),
    ]
    example.then(find, [text, count], outputs, api_visibility="private")
    for event in answered:  # the answer may be below what a telephone shows
        event.then(None, js="() => document.getElementById('answer').scrollIntoView({behavior: 'smooth'})")


def _texts_tab(answers: SpaceAnswers, examples: list[str]) -> None:
    with gr.Row():
        with gr.Column():
            picture, _ = _picture_input(examples)
            own = gr.Textbox(
                label="Your own texts, one in each line", lines=3,
                placeholder="empty: the gallery's captions" if answers.captions else "a dog on a beach",
            )  # fmt: skip
            button = gr.Button("Find texts", variant="primary")
        with gr.Column():
            remark = gr.Markdown()
            table = gr.Dataframe(headers=["text", "cosine"], datatype=["str", "number"], wrap=True, interactive=False,
                                 column_widths=["80%", "20%"], label="Texts, best first")  # fmt: skip
    button.click(said_plainly(answers.find_texts), [picture, own], [table, remark], api_name="texts")


def _classes_tab(answers: SpaceAnswers, examples: list[str]) -> None:
    labels, prompt = suggest_labels(answers)
    with gr.Row():
        with gr.Column():
            picture, _ = _picture_input(examples)
            names = gr.Textbox(value=labels, label="Labels, separated by commas or one in each line", lines=2)
            phrase = gr.Textbox(value=prompt, label="Prompt ({} stands for the label)")
            button = gr.Button("Classify", variant="primary")
        with gr.Column():
            remark = gr.Markdown()
            shares = gr.Label(num_top_classes=8, label="Probability of each label")
    button.click(said_plainly(answers.classify), [picture, names, phrase], [shares, remark], api_name="classify")


def _attention_tab(answers: SpaceAnswers, teacher: DCLIPTeacher, examples: list[str]) -> None:
    reads_text = teacher.config.cross_attention != "regions"
    hint = "this teacher reads the text" if reads_text else "optional: the title of the drawing"
    with gr.Row():
        with gr.Column():
            picture, _ = _picture_input(examples)
            caption = gr.Textbox(
                label="What does it show?",
                placeholder=hint,
            )
            button = gr.Button("Show attention", variant="primary")
        with gr.Column():
            remark = gr.Markdown()
            drawing = gr.Image(label="Where the teacher looks", show_label=False, interactive=False, format="png",
                               buttons=["download", "fullscreen"])  # fmt: skip
            table = gr.Dataframe(headers=["box", "share", "score", "left, top, right, bottom"], interactive=False,
                                 label="Boxes, in pixels of the picture", wrap=True)  # fmt: skip
    outputs = [drawing, table, remark]
    button.click(said_plainly(answers.attend, 2), [picture, caption], outputs, api_name="attention")


def describe_page(answers: SpaceAnswers) -> str:
    """What the page searches, with which model, and what was left out; in Markdown."""
    model = f"{escape_markdown(short_name(answers.name))}** ({answers.origin})"
    lines = [
        f"**{count_of(len(answers.gallery), 'picture')}** from {escape_markdown(short_place(answers.place))}, "
        f"searched with the model **{model}."
    ]
    if answers.teacher_name:
        lines[0] += f" Its teacher: **{escape_markdown(short_name(answers.teacher_name))}**."
    if answers.warning:
        lines.append(f"⚠️ **{escape_markdown(answers.warning)}**")
    if answers.skipped:
        names = ", ".join(answers.skipped[:EXAMPLES]) + (", …" if len(answers.skipped) > EXAMPLES else "")
        left_out = f"{count_of(len(answers.skipped), 'picture')} left out that cannot be read"
        lines.append(f"⚠️ {left_out}: {escape_markdown(names)}")
    return "\n\n".join(lines)


def build_app(answers: SpaceAnswers) -> gr.Blocks:
    """Build the page."""
    examples = save_examples(answers)
    with gr.Blocks(title="Picture search", analytics_enabled=False) as app:
        gr.Markdown(f"# Picture search\n{describe_page(answers)}")
        with gr.Tab("Search"):
            _search_tab(answers, examples)
        with gr.Tab("Texts"):
            _texts_tab(answers, examples)
        with gr.Tab("Classify"):
            _classes_tab(answers, examples)
        if answers.teacher is not None:
            with gr.Tab("Teacher"):
                _attention_tab(answers, answers.teacher[0], examples)
    return app


def launch(app: gr.Blocks, **options: Any) -> tuple[Any, str, str]:
    """Start the server with the page's theme, and come back."""
    theme = gr.themes.Soft(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"])
    return app.launch(
        theme=theme, css=CSS, max_file_size="20mb", footer_links=["gradio"], quiet=True, prevent_thread_lock=True,
        **options,
    )  # fmt: skip
