"""The retrieval gallery as one HTML page: cards with pictures inside, no script, legible in light and dark, on paper and on a telephone."""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

from datasets import Dataset

from modeling_dclip.data.pixels import decode_image

DIRECTION_TITLES = {"text_to_image": "Text to image", "image_to_text": "Image to text"}
LEADS = {
    "text_to_image": "A caption asks; the pictures it ranks first, from the left.",
    "image_to_text": "A picture asks; the captions it ranks first, from the top.",
}
EMPTY = {"worst": "No query missed.", "hits": "No query has its right answer first."}
LONGEST_TEXT = 600  # characters shown; a gallery is no place for a page of text
JPEG_QUALITY = 82

# Nothing is fetched, whatever a caption says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --quiet: #667085; --line: #e1e5eb; --page: #f6f7f9; --card: #fff; --accent: #2456c7;
  --hit: #0b7a4b; --hit-soft: #e3f5ec; --near: #8a5a00; --near-soft: #fdf1d8; --miss: #b3261e; --miss-soft: #fce8e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --quiet: #9aa3b2; --line: #333a46; --page: #14171c; --card: #1c2027; --accent: #8fb4ff;
  --hit: #5fd3a0; --hit-soft: #12352a; --near: #f0c36a; --near-soft: #3a2d10; --miss: #ff9d94; --miss-soft: #42201d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .2rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .6rem; color: var(--quiet); font-weight: 600; }
p { margin: .2rem 0; color: var(--quiet); overflow-wrap: anywhere; } a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1.1rem 0; padding: .8rem 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; font-variant-numeric: tabular-nums; }
.numbers b { font-weight: 600; margin-right: .5rem; } .numbers span { color: var(--quiet); }
nav ul { list-style: none; margin: .3rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; } nav b { font-weight: 600; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem 1rem; margin: .8rem 0; break-inside: avoid; }
header { display: flex; gap: .9rem; justify-content: space-between; align-items: baseline; margin-bottom: .7rem; }
.caption { font-size: 1.02rem; font-weight: 500; overflow-wrap: anywhere; }
.badge { flex: none; font-size: .8rem; font-weight: 600; padding: .12rem .6rem; border-radius: 1rem; white-space: nowrap; }
.hit { color: var(--hit); background: var(--hit-soft); } .near { color: var(--near); background: var(--near-soft); } .miss { color: var(--miss); background: var(--miss-soft); }
.row { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: .8rem; align-items: start; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
.frame { padding: 3px; border: 2px solid transparent; border-radius: 9px; } .right .frame { border-color: var(--hit); } .missed .frame { border: 2px dashed var(--miss); }
figcaption { font-size: .82rem; color: var(--quiet); margin-top: .15rem; padding-left: 5px; font-variant-numeric: tabular-nums; }
.right figcaption, li.right .score { color: var(--hit); font-weight: 600; } .missed figcaption, li.missed .score { color: var(--miss); font-weight: 600; }
.ask { display: grid; grid-template-columns: minmax(7rem, 12rem) minmax(0, 1fr); gap: 1.2rem; align-items: start; }
ol { list-style: none; margin: 0; padding: 0; }
li.answer { display: grid; grid-template-columns: 2.6rem 3.4rem minmax(0, 1fr); gap: .5rem; padding: .32rem .6rem; border-radius: 6px; border-left: 3px solid transparent; overflow-wrap: anywhere; }
li.right { border-left-color: var(--hit); background: var(--hit-soft); } li.missed { border-left: 3px dashed var(--miss); margin-top: .35rem; }
.place, .score { color: var(--quiet); font-variant-numeric: tabular-nums; font-size: .9rem; }
@media (max-width: 40rem) { main { padding: 1.2rem .8rem; } .row { grid-template-columns: repeat(3, minmax(0, 1fr)); } .ask { grid-template-columns: 1fr; } .ask figure { max-width: 12rem; } header { flex-direction: column; gap: .3rem; } }
@media print { @page { margin: 12mm; } body { background: #fff; font-size: 9pt; } main { max-width: none; padding: 0; } nav { display: none; } article { padding: .5rem .7rem; } }
"""


class _Pictures:
    """Thumbnails of a dataset as `<img>` elements, each made once."""

    def __init__(self, dataset: Dataset, size: int):
        self.dataset, self.size = dataset, size
        self.uri = lru_cache(maxsize=512)(self._uri)

    def _uri(self, row: int) -> tuple[str, int, int]:
        picture = decode_image(self.dataset, row)
        picture.thumbnail((self.size, self.size))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
        return base64.b64encode(buffer.getvalue()).decode("ascii"), *picture.size

    def element(self, row: int, alt: str) -> str:
        """One picture in its frame."""
        content, width, height = self.uri(row)
        return (
            f'<div class="frame"><img src="data:image/jpeg;base64,{content}" width="{width}" height="{height}" loading="lazy" '
            f'alt="{escape(alt)}"></div>'
        )


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()}…"


def _badge(rank: int, shown: int, total: int) -> str:
    of = f"{rank:,} of {total:,}"
    if rank == 1:
        return '<span class="badge hit">✓ first</span>'
    if rank <= shown:
        return f'<span class="badge near">in the first {shown}: rank {of}</span>'
    return f'<span class="badge miss">✗ missed: rank {of}</span>'


def _text_card(query: Any, caption: str, ids: Sequence[str], pictures: _Pictures, total: int) -> str:
    """A caption and the images it found."""
    shown = len(query.answers)
    figures = []
    for place, answer in enumerate(query.answers, 1):
        mark = " ✓" if answer.is_right else ""
        alt = f"{'right' if answer.is_right else 'wrong'} answer {place}, image {ids[answer.item]}"
        figures.append(
            f'<figure class="{"right" if answer.is_right else "wrong"}" title="{escape(ids[answer.item])}">'
            f"{pictures.element(answer.item, alt)}<figcaption>{place} · {answer.score:.3f}{mark}</figcaption></figure>"
        )
    if not any(answer.is_right for answer in query.answers):
        own = query.best
        figures.append(
            f'<figure class="missed" title="{escape(ids[own.item])}">{pictures.element(own.item, f"the right image {ids[own.item]}")}'
            f"<figcaption>the right one:<br>rank {query.rank:,} · {own.score:.3f}</figcaption></figure>"
        )
    columns = shown + 1  # as wide with a hit as with a miss
    return (
        f'<article><header><div class="caption">{escape(_shorten(caption))}</div>{_badge(query.rank, shown, total)}</header>'
        f'<div class="row" style="--columns:{columns}">{"".join(figures)}</div></article>'
    )


def _image_card(query: Any, captions: Sequence[str], ids: Sequence[str], pictures: _Pictures) -> str:
    """An image and the captions it found."""
    rows = [
        (str(place), "right" if answer.is_right else "wrong", answer) for place, answer in enumerate(query.answers, 1)
    ]
    if not any(answer.is_right for answer in query.answers):
        rows.append((f"{query.rank:,}", "missed", query.best))
    items = "".join(
        f'<li class="answer {kind}"><span class="place">{place}{" ✓" if kind == "right" else ""}</span>'
        f'<span class="score">{answer.score:.3f}</span><span>{"<b>right: </b>" if kind == "missed" else ""}'
        f"{escape(_shorten(captions[answer.item]))}</span></li>"
        for place, kind, answer in rows
    )
    badge = _badge(query.rank, len(query.answers), len(captions))
    name = escape(ids[query.item])
    return (
        f'<article><header><p>{name}</p>{badge}</header><div class="ask"><figure>{pictures.element(query.item, f"image {ids[query.item]}")}'
        f"</figure><ol>{items}</ol></div></article>"
    )


def _numbers(metrics: Mapping[str, float]) -> str:
    lines = []
    for direction, name in DIRECTION_TITLES.items():
        recalls = [
            (key.rpartition("@")[2], value) for key, value in metrics.items() if key.startswith(f"{direction}_recall@")
        ]
        shown = " · ".join(f"R@{k} {100 * value:.1f} %" for k, value in recalls)
        lines.append(f"<div><b>{name}</b><span>{shown}</span></div>")
    return f'<div class="numbers">{"".join(lines)}</div>'


def render_page(
    dataset: Dataset,
    image_of_caption: Sequence[int],
    answered: Mapping[str, Mapping[str, Sequence[Any]]],
    *,
    titles: Mapping[str, str],
    title: str,
    about: Sequence[str] = (),
    metrics: Mapping[str, float],
    thumbnail_size: int = 192,
) -> str:
    """Render answered queries.

    Args:
        dataset (`datasets.Dataset`): With `image`, `captions` and `image_id`, in the order of the queries' rows.
        image_of_caption (`Sequence[int]`): The row of each caption's image.
        answered (`Mapping`): From [`~modeling_dclip.evaluation.gallery.answer_queries`].
        titles (`Mapping[str, str]`): Of the choices.
        title (`str`), about (`Sequence[str]`): Of the page, and lines under it.
        metrics (`Mapping[str, float]`): Its recalls are shown.
        thumbnail_size (`int`, *optional*, defaults to 192): Longest side in pixels.

    Returns:
        `str`: A whole document.

    Raises:
        ValueError: If an image cannot be decoded; the message names it.
    """
    ids = (
        dataset["image_id"][:] if "image_id" in dataset.column_names else [f"row {row}" for row in range(len(dataset))]
    )
    if "image_id" not in dataset.column_names:
        dataset = dataset.add_column("image_id", ids)
    captions = [caption for own in dataset["captions"][:] for caption in own]
    pictures = _Pictures(dataset, thumbnail_size)
    contents, sections = [], []
    for direction, by_choice in answered.items():
        name = DIRECTION_TITLES[direction]
        links = "".join(
            f'<li><a href="#{direction}-{choice}">{escape(titles[choice])}</a></li>' for choice in by_choice
        )
        contents.append(f"<ul><li><b>{name}</b></li>{links}</ul>")
        sections.append(f"<h2>{name}</h2><p>{LEADS[direction]}</p>")
        for choice, queries in by_choice.items():
            sections.append(f'<h3 id="{direction}-{choice}">{escape(titles[choice])}</h3>')
            for query in queries:
                if direction == "text_to_image":
                    sections.append(_text_card(query, captions[query.item], ids, pictures, len(dataset)))
                else:
                    sections.append(_image_card(query, captions, ids, pictures))
            if not queries:
                sections.append(f"<p>{EMPTY.get(choice, 'No query.')}</p>")
    counts = f"{len(dataset):,} images, {len(image_of_caption):,} captions. Numbers under answers are cosines."
    lines = "".join(f"<p>{escape(line)}</p>" for line in (*about, counts))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1>{lines}{_numbers(metrics)}<nav>{''.join(contents)}</nav>\n"
        + "\n".join(sections)
        + "</main></body></html>\n"
    )
