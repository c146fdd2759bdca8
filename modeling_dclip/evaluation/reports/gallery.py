"""Pages to look at of what results records measured: for each model and retrieval benchmark a gallery,
or maps of the image encoder.
"""

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.files import replacing
from modeling_dclip.data.images import decode_image
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.benchmarks.retrieval import metrics_from_ranks
from modeling_dclip.evaluation.benchmarks.retrieval_ranks import TIE_TOLERANCE, RetrievalRanks, retrieval_ranks
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset
from modeling_dclip.evaluation.records import record_key
from modeling_dclip.evaluation.reports.maps import draw_image_maps

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
"""  # noqa: E501


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
            f'<div class="frame"><img src="data:image/jpeg;base64,{content}" width="{width}" height="{height}" '
            f'loading="lazy" alt="{escape(alt)}"></div>'
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
            '<figure class="missed" '
            f'title="{escape(ids[own.item])}">{pictures.element(own.item, f"the right image {ids[own.item]}")}'
            f"<figcaption>the right one:<br>rank {query.rank:,} · {own.score:.3f}</figcaption></figure>"
        )
    columns = shown + 1  # as wide with a hit as with a miss
    return (
        "<article><header><div "
        f'class="caption">{escape(_shorten(caption))}</div>{_badge(query.rank, shown, total)}</header><div '
        f'class="row" style="--columns:{columns}">{"".join(figures)}</div></article>'
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
        f"<article><header><p>{name}</p>{badge}</header><div "
        f'class="ask"><figure>{pictures.element(query.item, f"image {ids[query.item]}")}'
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
        answered (`Mapping`): From [`~modeling_dclip.evaluation.reports.gallery.answer_queries`].
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
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1>{lines}{_numbers(metrics)}<nav>{''.join(contents)}</nav>\n"
        + "\n".join(sections)
        + "</main></body></html>\n"
    )


# What a model finds: a page of queries with their first answers, hit or miss, that opens in any browser without a
# network.
#
# Two files do the work: here queries are chosen and answered, [`~modeling_dclip.evaluation.reports.gallery`] draws
# them. Ranks are those of [`~modeling_dclip.evaluation.benchmarks.retrieval_ranks.retrieval_ranks`],
# and answers are shown in the order those ranks mean: of equal scores the right answer comes last.
# The similarity matrix is never held, only the rows of the chosen queries.


CHOICES = {
    "random": "Drawn at random",
    "worst": "Worst misses",
    "hits": "Hits, the surest first",
}
DIRECTIONS = ("text_to_image", "image_to_text")


class Answer(NamedTuple):
    """One answer to a query.

    Attributes:
        item (`int`): Row of the image, or number of the caption.
        score (`float`): Cosine, in [-1, 1].
        is_right (`bool`): Whether image and caption belong together.
    """

    item: int
    score: float
    is_right: bool


class Query(NamedTuple):
    """A question and what the model said.

    Attributes:
        item (`int`): Number of the caption, or row of the image, that asks.
        answers (`list[Answer]`): The first ones, in order.
        rank (`int`): Of the first right answer; 1 is first.
        best (`Answer`): That answer, wherever it came.
    """

    item: int
    answers: list[Answer]
    rank: int
    best: Answer


def choose_queries(
    ranks: torch.Tensor, scores: torch.Tensor, owners: torch.Tensor, choice: str, count: int, seed: int = 0
) -> list[int]:
    """Choose queries by how they went, at most one an image.

    Args:
        ranks (`torch.Tensor` of shape `(Q,)`): Of each query's first right answer.
        scores (`torch.Tensor` of shape `(Q,)`): Cosine of that answer.
        owners (`torch.Tensor` of shape `(Q,)`): The image of each query.
        choice (`str`): `"random"`; `"worst"`, the highest ranks, of equal ones the lowest scores, and no hits at 1;
            `"hits"`, those at 1, the highest scores first.
        count (`int`): At most so many.
        seed (`int`, *optional*, defaults to 0): Of the random choice.

    Returns:
        `list[int]`: Query numbers, in the order to show. Fewer than `count`, or none, where no more fit.

    Raises:
        ValueError: If the choice is unknown or the count is below 1.

    Example:
        >>> choose_queries(torch.tensor([1, 9, 4]), torch.zeros(3), torch.arange(3), "worst", 2)
        [1, 2]
    """
    if choice not in CHOICES or count < 1:
        raise ValueError(f"Expected one of {list(CHOICES)} and a count >= 1, got {choice!r} and {count}.")
    if choice == "random":
        order = np.random.default_rng(seed).permutation(len(ranks))
    else:
        sign = -1 if choice == "worst" else 1
        order = np.lexsort((-sign * scores.numpy(), sign * ranks.numpy()))  # the last key first
        hits = (ranks == 1).numpy()
        order = order[hits[order] == (choice == "hits")]
    chosen: list[int] = []
    seen: set[int] = set()
    for query in order.tolist():
        owner = int(owners[query])
        if owner not in seen:
            seen.add(owner)
            chosen.append(query)
        if len(chosen) == count:
            break
    return chosen


def _relevant_scores(embeddings: DatasetEmbeddings, chunk_size: int = 4096) -> torch.Tensor:
    """Cosine of every caption with its own image, `(C,)`."""
    images, texts, owners = embeddings
    return torch.cat(
        [
            (text * images[owner]).sum(dim=1)
            for text, owner in zip(texts.split(chunk_size), owners.split(chunk_size), strict=True)
        ]
    )


def _best_captions(ranks: RetrievalRanks) -> torch.Tensor:
    """Number of each image's first caption in the image's own ranking, `(I,)`."""
    order = torch.argsort(ranks.image_to_text, descending=True, stable=True)
    best = torch.empty(int(ranks.image_of_caption.max()) + 1, dtype=torch.long)
    best[ranks.image_of_caption[order]] = order  # of an image's captions the last written has the smallest rank
    return best


def _first_answers(scores: torch.Tensor, right: torch.Tensor, top: int) -> list[Answer]:
    """In the order that ranks mean: another answer within the tolerance comes before a right one."""
    order = torch.argsort(scores - TIE_TOLERANCE * right, descending=True, stable=True)
    # Equal after the tolerance's subtraction: the wrong one first.
    first = sorted(
        order[: 4 * top].tolist(), key=lambda i: (-float(scores[i] - TIE_TOLERANCE * right[i]), bool(right[i]))
    )
    return [Answer(item, float(scores[item]), bool(right[item])) for item in first[:top]]


def answer_queries(
    embeddings: DatasetEmbeddings,
    ranks: RetrievalRanks,
    *,
    choices: Sequence[str] = tuple(CHOICES),
    count: int = 8,
    top: int = 5,
    seed: int = 0,
) -> dict[str, dict[str, list[Query]]]:
    """Choose queries in both directions and answer them.

    Args:
        embeddings ([`~modeling_dclip.evaluation.embedding.DatasetEmbeddings`]): Of the whole dataset.
        ranks ([`RetrievalRanks`]): Of these.
        choices (`Sequence[str]`, *optional*): Of `CHOICES`; all if not given.
        count (`int`, *optional*, defaults to 8): Queries of each choice and direction, at most.
        top (`int`, *optional*, defaults to 5): Answers of each.
        seed (`int`, *optional*, defaults to 0): Of the random choice.

    Returns:
        `dict[str, dict[str, list[Query]]]`: By direction and choice.

    Raises:
        ValueError: As in [`choose_queries`], or if `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"Expected one answer or more, got top={top}.")
    images, texts, owners = embeddings
    own_scores, best = _relevant_scores(embeddings), _best_captions(ranks)
    asked = {
        "text_to_image": (ranks.text_to_image, own_scores, owners),
        "image_to_text": (ranks.image_to_text[best], own_scores[best], torch.arange(len(images))),
    }
    answered: dict[str, dict[str, list[Query]]] = {}
    for direction, (first_ranks, scores, askers) in asked.items():
        answered[direction] = {}
        for choice in choices:
            queries = []
            for item in choose_queries(first_ranks, scores, askers, choice, count, seed):
                if direction == "text_to_image":
                    found, right, target = (
                        images @ texts[item],
                        torch.arange(len(images)) == owners[item],
                        owners[item],
                    )
                else:
                    found, right, target = texts @ images[item], owners == item, best[item]
                true = Answer(int(target), float(scores[item]), True)
                queries.append(Query(item, _first_answers(found, right, top), int(first_ranks[item]), true))
            answered[direction][choice] = queries
    return answered


def write_gallery(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    path: str | os.PathLike,
    *,
    title: str = "Retrieval gallery",
    about: Sequence[str] = (),
    choices: Sequence[str] = tuple(CHOICES),
    count: int = 8,
    top: int = 5,
    seed: int = 0,
    thumbnail_size: int = 192,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    embeddings: DatasetEmbeddings | None = None,
) -> None:
    """Write a page of queries, what the model answered, and where the right answer came.

    One file, about 8 KB a thumbnail: pictures are inside as data URIs, there is no script, and all text is escaped.

    Args:
        model, processor, dataset, batch_size, device, num_workers: As in
            [`~modeling_dclip.evaluation.embedding.embed_dataset`].
        path (`str` or `os.PathLike`): A `.html` file, written whole or not at all.
        title (`str`, *optional*): Of the page, e.g. the model's name.
        about (`Sequence[str]`, *optional*): Lines under it, e.g. the data's spec and the model's revision.
        choices (`Sequence[str]`, *optional*): Of `"random"`, `"worst"` and `"hits"`; all if not given. See
            [`choose_queries`].
        count (`int`, *optional*, defaults to 8): Queries of each choice and direction.
        top (`int`, *optional*, defaults to 5): Answers of each query.
        seed (`int`, *optional*, defaults to 0): Of the random choice.
        thumbnail_size (`int`, *optional*, defaults to 192): Longest side of a thumbnail in pixels.
        embeddings ([`~modeling_dclip.evaluation.embedding.DatasetEmbeddings`], *optional*): Of this model on this
            dataset, on the CPU, where they are there already.

    Raises:
        ValueError: If the file is no `.html`, a choice is unknown, a number is below 1, or an image or a caption is
            bad, naming it.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"Expected a .html file to write to, got {str(path)!r}.")
    unknown = [choice for choice in choices if choice not in CHOICES]
    if unknown or not choices or min(count, top, thumbnail_size) < 1:
        raise ValueError(
            f"Expected choices of {list(CHOICES)} and count, top and thumbnail_size >= 1, got {list(choices)}, "
            f"{count}, {top} and {thumbnail_size}."
        )
    if embeddings is None:
        embeddings = embed_dataset(Encoder(model, processor, batch_size, device, num_workers), dataset)
    ranks = retrieval_ranks(*embeddings)
    answered = answer_queries(embeddings, ranks, choices=choices, count=count, top=top, seed=seed)
    page = render_page(
        dataset,
        embeddings.image_of_caption.tolist(),
        answered,
        titles=CHOICES,
        title=title,
        about=about,
        metrics=metrics_from_ranks(ranks),
        thumbnail_size=thumbnail_size,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def page_name(record: Mapping[str, Any]) -> str:
    """A file's stem that says model and benchmark, and is another for other weights or data."""
    words = f"{record.get('label', record['model'])} {record['benchmark'].partition('=')[2]}"
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', words).strip('-')[-80:]}-{record_key(record)[:6]}"


def write_pages(
    records: Sequence[Mapping[str, Any]],
    *,
    gallery: str | os.PathLike | None = None,
    maps: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    **options: Any,
) -> list[Path]:
    """Write the pages of every record of retrieval; the model is loaded and the data embedded again.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.evaluator.evaluate`]. Other benchmarks, and
            points between two models, have no page.
        gallery (`str` or `os.PathLike`, *optional*): Folder of HTML pages, see
            [`~modeling_dclip.evaluation.reports.gallery.write_gallery`].
        maps (`str` or `os.PathLike`, *optional*): Folder of pictures, see
            [`~modeling_dclip.evaluation.reports.maps.draw_image_maps`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with a model.
        device (`torch.device` or `str`, *optional*): Where to compute.
        options: `seed`, `batch_size`, `num_workers` of [`~modeling_dclip.evaluation.reports.gallery.write_gallery`].

    Returns:
        `list[Path]`: What was written.

    Raises:
        TypeError: If maps are asked of a model of another build than CLIP's or DM-CLIP's.
    """
    pages = []
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind != "retrieval" or "condition" in record or not (gallery or maps):
            continue
        model, processor, revision = load_dual_encoder(record["model"], trust_remote_code=trust_remote_code)
        dataset, stem = load_captions(spec, seed=record["seed"]), page_name(record)
        if gallery:
            page, title = Path(gallery) / f"{stem}.html", record.get("label", record["model"])
            about = [record["benchmark"], f"revision {revision}"]
            write_gallery(model, processor, dataset, page, title=title, about=about, device=device, **options)
            pages.append(page)
        if maps:
            page = Path(maps) / f"{stem}.png"
            draw_image_maps(model, processor, dataset, page, rows=range(min(4, len(dataset))), device=device)
            pages.append(page)
    return pages
