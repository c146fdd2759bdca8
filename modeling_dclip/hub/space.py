"""The answers of the Space, without its page.

It finds pictures for a text or a picture, finds texts for a picture, classifies a picture, and maps where a teacher
looks. The pictures are those of a search index, or are embedded when the page starts.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from modeling_dclip.configuration_dclip_teacher import DCLIPTeacherConfig
from modeling_dclip.data.captions import load_captions, load_uncaptioned
from modeling_dclip.data.captions.files import read_images
from modeling_dclip.data.failures import FAILURES, one_line
from modeling_dclip.data.files import temporary_folder
from modeling_dclip.data.images import PixelReader, UnreadableImageError, decode_image, open_image
from modeling_dclip.data.regions.detectors import build_detector
from modeling_dclip.data.rows import first
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.fingerprints import hash_parts
from modeling_dclip.encoders.loading import load_checked, load_dual_encoder, load_processor
from modeling_dclip.evaluation.benchmarks.zero_shot import build_classifier
from modeling_dclip.evaluation.embedding import count_dropped_tokens, embed_query, embed_texts
from modeling_dclip.evaluation.reports.document import escape_markdown
from modeling_dclip.evaluation.reports.maps import draw_attention
from modeling_dclip.hub.index import Hit, SearchIndex
from modeling_dclip.hub.index.answers import count_nearest, describe_left_out, short_name, split_name
from modeling_dclip.hub.index.embeddings import embed_readable
from modeling_dclip.hub.index.suggestions import (
    MOST_TEXTS,
    find_captions,
    frequent_names,
    load_learned_captions,
    name_folders,
    short_captions,
)
from modeling_dclip.hub.publish.evaluation import warn_of_chance
from modeling_dclip.hub.publish.licences import read_arguments
from modeling_dclip.hub.publish.training import SOURCES, describe_training
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor, as_rgb
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

GALLERY = "scenes:validation,n=60,image_size=224,max_siblings=2"
DETECTOR = "grid:3x3"
DRAWN_DATA = SOURCES["scenes"]  # what a card says of a model that knows drawn shapes alone
LONGEST_INPUT = 2000  # characters of a text, before it is tokenized
MOST_LABELS = 200
LONGEST_PROMPT = 500  # characters
MOST_SHOWN = 100
MOST_COPIES = 10  # of a picture, to leave out
NEARLY_SAME = 0.99  # cosine from which pixels are compared; a compressed index rounds that of equal pictures
MOST_UPLOADED_PIXELS = 50_000_000
BATCH_SIZE = 64
TILE_SIZE = 640  # pixels of the longest side of a picture among others
# Suggested to a visitor where no captions tell what the pictures show: for photographs, and for drawn shapes.
QUERIES = ("a dog on a beach", "a person riding a bicycle", "food on a plate", "a street with cars")
SUGGESTED_LABELS = "dog, cat, person, car, food, building"
DRAWN_QUERIES = ("two small red circles", "a large blue square", "a striped yellow star", "a green ring above a cross")
SUGGESTED_SHAPES = "red circle, blue circle, green star, yellow square, black cross, pink heart"


class UserMistake(ValueError):
    """A mistake that the visitor can correct. The page shows the message."""


class Found(NamedTuple):
    """What a search on the page found.

    Attributes:
        tiles (`list[tuple[PIL.Image.Image, str]]`): Small pictures, best first, with rank, cosine and name.
        hits (`list[Hit]`): The same, to search with one of them.
        remark (`str`): What there is to say, in Markdown.
    """

    tiles: list[tuple[Image.Image, str]]
    hits: list[Hit]
    remark: str


class Gallery:
    """Pictures that are embedded now and held in memory.

    A picture that cannot be read is left out, and its id kept in `skipped`.

    Args:
        spec (`str`): A folder, `images:FOLDER`, or a dataset with captions such as the drawn scenes.
        model (`DualEncoder`): In eval mode.
        processor: The model's.

    Raises:
        ValueError: If no picture can be read.
    """

    def __init__(self, spec: str, model: DualEncoder, processor: Any):
        self.spec, self.is_folder = spec, os.path.isdir(spec)
        dataset = load_gallery(spec)
        encoder, reader = Encoder(model, processor, BATCH_SIZE), PixelReader(dataset, processor.image_processor, 0)
        embeds, readable = [], list[bool]()
        batches = range(0, len(dataset), BATCH_SIZE)
        for start in tqdm(batches, desc="Embedding pictures", unit="batch"):
            found, was_read = embed_readable(encoder, reader, range(start, min(start + BATCH_SIZE, len(dataset))))
            embeds += [torch.from_numpy(found)] if len(found) else []
            readable += was_read
        ids = dataset["image_id"][:]
        self.skipped = [name for name, is_read in zip(ids, readable, strict=True) if not is_read]
        if not embeds:
            raise ValueError(
                f"Expected pictures that can be read in {spec!r}, got {len(dataset)} of which none can: "
                f"{first(self.skipped)}."
            )
        self.dataset = dataset.select([row for row, is_read in enumerate(readable) if is_read])
        self.image_embeds = torch.cat(embeds)
        self.row_of = {image_id: row for row, image_id in enumerate(self.dataset["image_id"])}
        self.captions = list(dict.fromkeys(row[0] for row in self.dataset["captions"][:] if row))

    def __len__(self) -> int:
        return len(self.dataset)

    def nearest(self, query_embeds: torch.Tensor, top_k: int) -> list[Hit]:
        """As [`~modeling_dclip.hub.index.SearchIndex.nearest`]."""
        scores = (query_embeds @ self.image_embeds.T)[0]
        best = scores.topk(min(top_k, len(self)))
        hits = self.hits(best.indices.tolist())
        return [hit._replace(score=score) for hit, score in zip(hits, best.values.tolist(), strict=True)]

    def hits(self, rows: Sequence[int]) -> list[Hit]:
        """As [`~modeling_dclip.hub.index.SearchIndex.hits`]."""
        ids = [self.dataset.select_columns("image_id")[row]["image_id"] for row in rows]
        names = [one.partition("/")[2] if self.is_folder else one for one in ids]
        return [Hit(math.nan, image_id, None, name) for image_id, name in zip(ids, names, strict=True)]

    def picture(self, hit: Hit) -> Image.Image:
        """As [`~modeling_dclip.hub.index.SearchIndex.picture`]."""
        return decode_image(self.dataset, self.row_of[hit.image_id])


def load_gallery(spec: str) -> Dataset:
    """Load the pictures of a folder, of `images:FOLDER`, or of a dataset with captions such as the drawn scenes."""
    if os.path.isdir(spec):
        return read_images(spec)
    return load_uncaptioned([spec], seed=0) if spec.startswith("images:") else load_captions(spec)


def describe_origin(model: str) -> str:
    """Say on what a model was trained, in Markdown, as far as its folder, its card or its name tells.

    Args:
        model (`str`): A folder, a Hub id, or `open_clip:NAME:PRETRAINED`.
    """
    if model.startswith("open_clip:"):
        return f"weights “{escape_markdown(model.rpartition(':')[2])}” of open_clip"
    try:
        if (Path(model) / "arguments.yaml").is_file():
            arguments = read_arguments(model)
            facts = describe_training(arguments, model)
            start = arguments.get("clip_model")
            sources = dict.fromkeys(source.words for source in (*facts["sources"], *facts["uncaptioned"]))
            # To a visitor of the page there is no publisher.
            data = ", ".join(escape_markdown(source.removeprefix("the publisher's own ")) for source in sources)
            return f"fine-tuned from {escape_markdown(short_name(start))} on {data}" if start else f"trained on {data}"
        if os.path.isdir(model) and not (Path(model) / "README.md").is_file():
            return "its folder does not say on what it was trained"
        card = ModelCard.load(str(Path(model) / "README.md") if os.path.isdir(model) else model).data
    except FAILURES as error:
        logger.warning("What '%s' was trained on is not known: %s", model, one_line(error))
        return "on what it was trained is not known here"
    told = card.get("datasets") or []
    data = ", ".join(escape_markdown(str(one)) for one in ([told] if isinstance(told, str) else told))
    link = "" if os.path.isdir(model) else f" ([card](https://huggingface.co/{model}))"
    return f"trained on {data}{link}" if data else f"its card does not name its training data{link}"


def load_teacher(spec: str) -> tuple[DCLIPTeacher, DCLIPTeacherProcessor]:
    """Load a trained teacher and its processor.

    Raises:
        ValueError: If it is another model, or weights are missing, so that its attention would be random.
    """
    kind = DCLIPTeacherConfig.get_config_dict(spec)[0].get("model_type")
    if kind != DCLIPTeacherConfig.model_type:
        raise ValueError(
            f"Expected a trained teacher at '{spec}', got a model of type {kind!r}. Give the teacher's own folder."
        )
    return load_checked(DCLIPTeacher, spec), load_processor(spec, DCLIPTeacherProcessor)


def split_lines(text: str | None) -> list[str]:
    """Split what is separated by commas or lines, without repetitions.

    Example:
        >>> split_lines("dog, cat\\ndog")
        ['dog', 'cat']
    """
    pieces = (text or "").replace("\n", ",").split(",")
    return list(dict.fromkeys(piece.strip() for piece in pieces if piece.strip()))


def _breakable(name: str) -> str:
    """A name with spaces of no width, where a long one may be broken."""
    return "\u200b".join(split_name(name))


def _key(picture: Image.Image) -> str:
    return hash_parts([repr(picture.size), as_rgb(picture).tobytes()])


class SpaceAnswers:
    """A dual encoder with pictures to search, and optionally a teacher.

    Args:
        model (`str`, *optional*): As for [`~modeling_dclip.encoders.loading.load_dual_encoder`]. May be left out with
            an index, which names its model.
        teacher (`str`, *optional*): Folder or Hub id of a trained teacher.
        gallery (`str`, *optional*): As for [`Gallery`], drawn scenes by default. All pictures are embedded when the
            page starts, which is fine for some thousands. With an index: where its pictures are now, if they have
            moved.
        index (`str`, *optional*): A folder of [`~modeling_dclip.hub.index`], in place of embedding.
        detector (`str`, *optional*, defaults to `"grid:3x3"`): Finds the regions of pictures that come without boxes;
            any of [`~modeling_dclip.data.regions.detectors`], such as `transformers:MODEL`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Raises:
        ValueError: If there is neither model nor index; else as what is loaded says.
    """

    def __init__(
        self,
        model: str | None = None,
        teacher: str | None = None,
        *,
        gallery: str | None = None,
        index: str | None = None,
        detector: str = DETECTOR,
        trust_remote_code: bool = False,
    ):
        self.gallery: Gallery | SearchIndex
        if index is not None:
            self.gallery = SearchIndex.load(index, model=model, images=gallery, trust_remote_code=trust_remote_code)
            self.name, (self.model, self.processor) = self.gallery.model, self.gallery.encoder()
            revision = self.gallery.manifest["revision"]
            self.place, self.skipped = self.gallery.images, list[str]()
            self.captions = find_captions(self.gallery)
        elif model is None:
            raise ValueError("Expected a model or an index, got neither.")
        else:
            self.name, self.place = model, gallery or GALLERY
            self.model, self.processor, revision = load_dual_encoder(model, trust_remote_code=trust_remote_code)
            self.gallery = Gallery(self.place, self.model, self.processor)
            self.captions = self.gallery.captions or load_learned_captions(model, self.gallery.row_of)
            self.skipped = self.gallery.skipped
        self.origin, self.teacher_name = describe_origin(self.name), teacher
        self.warning = warn_of_chance(self.name, revision, ("retrieval", "zero_shot"))
        self.knows_shapes = self.place.startswith("scenes:") or DRAWN_DATA in self.origin
        self.teacher = load_teacher(teacher) if teacher else None
        self.detector_name, self.detector = detector, build_detector(detector)
        self.caption_embeds = (
            embed_texts(Encoder(self.model, self.processor), self.captions) if self.captions else None
        )
        self.row_of = dict(self._keys()) if isinstance(self.gallery, Gallery) else {}

    def _keys(self) -> Iterator[tuple[str, int]]:
        """The pixels' keys of pictures that come with boxes, and their rows."""
        dataset = self.gallery.dataset if isinstance(self.gallery, Gallery) else None
        if dataset is not None and "boxes" in dataset.column_names:
            yield from ((_key(decode_image(dataset, row)), row) for row in range(len(dataset)))

    def sample(self, count: int) -> list[Hit]:
        """Some pictures, spread over the gallery."""
        count = min(count, len(self.gallery))
        return self.gallery.hits([place * len(self.gallery) // count for place in range(count)])

    def folders(self) -> list[str]:
        """The names of the folders that the pictures lie in, where these are words."""
        return name_folders([hit.name for hit in self.sample(MOST_TEXTS)])

    def picture(self, hit: Hit) -> Image.Image:
        """A picture of the gallery, in RGB.

        Raises:
            UserMistake: If it cannot be read any more.
        """
        try:
            return self.gallery.picture(hit)
        except UnreadableImageError as error:
            raise UserMistake(f"{hit.name} cannot be read any more: {error.reason}.") from error

    def find_pictures(self, query: str | Image.Image | None, top_k: int = 10) -> Found:
        """Find the gallery's pictures for a text or a picture."""
        if isinstance(query, Image.Image):
            return self._find(self._checked_picture(query), top_k, "the picture", "")
        query, remark = self._checked_text(
            query, "Type what the picture should show, for example one of the examples below."
        )
        return self._find(query, top_k, "the text", remark)

    def find_like(self, hit: Hit, top_k: int = 10) -> tuple[Image.Image, Found]:
        """Find the gallery's pictures for one of them; the picture itself comes too, and is not among them."""
        picture = self.picture(hit)
        return picture, self._find(picture, top_k, escape_markdown(hit.name), "", hit.image_id)

    def _shows(self, hit: Hit, picture: Image.Image) -> bool:
        """Whether a picture of the gallery has the pixels of this one."""
        if hit.score < NEARLY_SAME:
            return False
        try:
            return _key(self.gallery.picture(hit)) == _key(picture)
        except UnreadableImageError:
            return False

    def _find(
        self, query: str | Image.Image, top_k: int, asked: str, remark: str, clicked: str | None = None
    ) -> Found:
        count = min(max(1, int(top_k)), MOST_SHOWN)
        hits = self.gallery.nearest(embed_query(self.model, self.processor, query), count + MOST_COPIES)
        hits = [hit for hit in hits if hit.image_id != clicked]
        same = [] if isinstance(query, str) else [hit for hit in hits if self._shows(hit, query)]
        hits = [hit for hit in hits if hit not in same][:count]
        labels = [f"{rank} · cosine {hit.score:.3f}\n{_breakable(hit.name)}" for rank, hit in enumerate(hits, 1)]
        tiles, gone = self._make_tiles(hits, labels)
        said = (
            f"{count_nearest(len(hits), len(self.gallery))} to {asked}. The number is the cosine: higher is nearer. "
            "Click a picture to search for others like it."
        )
        if same:
            names = ", ".join(escape_markdown(hit.name) for hit in same)
            said += f" {describe_left_out(names, len(same))}"
        if not hits:
            said = "No picture was found: the index looked at too little of itself. Its owner can build an exact one."
        return Found(tiles, hits, " ".join(part for part in (said, gone, remark) if part))

    def browse(self, count: int = 12) -> Found:
        """Some pictures of the gallery, before anything is searched."""
        hits = self.sample(count)
        tiles, gone = self._make_tiles(hits, [_breakable(hit.name) for hit in hits])
        said = "Some of the pictures. Type above what to look for, or click a picture to search for pictures like it."
        return Found(tiles, hits, f"{said} {gone}".strip())

    def _make_tiles(self, hits: Sequence[Hit], labels: Sequence[str]) -> tuple[list[tuple[Image.Image, str]], str]:
        """Small pictures with their labels, and a remark on those that cannot be read."""
        tiles, gone = [], []
        for hit, label in zip(hits, labels, strict=True):
            try:
                small = self.gallery.picture(hit).copy()
                small.thumbnail((TILE_SIZE, TILE_SIZE))
            except UnreadableImageError as error:
                small = _blank_tile()
                gone.append(f"{hit.name} ({error.reason})")
            tiles.append((small, label))
        remark = f"**{len(gone)} cannot be read any more: {escape_markdown('; '.join(gone))}.**" if gone else ""
        return tiles, remark

    def find_texts(
        self, picture: Image.Image | None, own: str | None = None, top_k: int = 5
    ) -> tuple[list[list[Any]], str]:
        """Find texts for a picture, best first, as rows of text and cosine; and a remark.

        The texts are the gallery's captions, or the visitor's own, one in each line.
        """
        picture = self._checked_picture(picture)
        texts = list(dict.fromkeys(line.strip() for line in (own or "").splitlines() if line.strip()))
        if len(texts) > MOST_TEXTS:
            raise UserMistake(f"There are {len(texts):,} texts, more than {MOST_TEXTS}. Give fewer.")
        texts = [self._checked_text(text, "")[0] for text in texts]
        embeds = embed_texts(Encoder(self.model, self.processor), texts) if texts else self.caption_embeds
        if embeds is None:
            raise UserMistake("This gallery has no captions. Write some texts, one in each line.")
        scores = (embed_query(self.model, self.processor, picture) @ embeds.T)[0]
        best = scores.topk(min(max(1, int(top_k)), MOST_SHOWN, len(scores)))
        names = texts or self.captions
        rows = [
            [names[row], round(score, 3)]
            for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        what = count_of(len(names), "text" if texts else "caption")
        whose = f"your {what}" if texts else f"{what} of the gallery"
        return rows, f"The {len(rows)} nearest of {whose}, each with its cosine to the picture."

    def classify(
        self, picture: Image.Image | None, labels: str | None, prompt: str | None
    ) -> tuple[dict[str, float], str]:
        """Compute the probability of each label among all that are given; and a remark."""
        picture = self._checked_picture(picture)
        names = split_lines(labels)
        if not 2 <= len(names) <= MOST_LABELS:
            raise UserMistake(
                f"Give between 2 and {MOST_LABELS} different labels, separated by commas or one in each line; "
                f"there are {len(names)}."
            )
        prompt = (prompt or "").strip() or "{}"
        if len(prompt) > LONGEST_PROMPT:
            raise UserMistake(f"The prompt has {len(prompt):,} characters, more than {LONGEST_PROMPT}. Shorten it.")
        if prompt.count("{}") != 1:
            raise UserMistake(
                f"The prompt needs one {{}} where the label goes, as in 'a photo of a {{}}'; it is {prompt!r}."
            )
        for name in names:
            self._checked_text(name, "")
        classifier = build_classifier(Encoder(self.model, self.processor), names, [prompt])
        cosines = (embed_query(self.model, self.processor, picture) @ classifier.T)[0]
        scale = getattr(self.model, "logit_scale", None)
        scores = torch.softmax(cosines * (100.0 if scale is None else float(scale.detach().exp())), dim=0)
        best = int(scores.argmax())
        phrase = escape_markdown(repr(prompt.replace("{}", names[best])))
        remark = f"Most likely: {phrase}, {100 * float(scores[best]):.0f}% among these {len(names)} labels."
        return dict(zip(names, scores.tolist(), strict=True)), remark

    def attend(self, picture: Image.Image | None, caption: str | None) -> tuple[Image.Image, list[list[Any]], str]:
        """Draw the teacher's attention over the picture's regions; the regions as rows of number, share of the
        attention, the detector's score and box; and a remark.
        """
        if self.teacher is None:
            raise UserMistake(
                "This page was started without a teacher. Its owner can add one with --teacher or the variable "
                "TEACHER."
            )
        picture = self._checked_picture(picture)
        model, processor = self.teacher
        reads_text = model.config.cross_attention != "regions"
        if reads_text or (caption or "").strip():
            caption, remark = self._checked_text(
                caption, "This teacher reads the picture and a text together: describe the picture."
            )
        else:
            caption, remark = "Where the teacher looks", ""
        boxes, scores, source = self._regions(picture)
        with temporary_folder() as folder:
            read = draw_attention(model, processor, picture, (boxes, scores), caption, folder / "attention.png")
            drawing = open_image(folder / "attention.png")
        rows = [
            [int(number), f"{100 * read.shares[number]:.0f}%", round(float(read.scores[number]), 2),
             ", ".join(f"{side:.0f}" for side in read.boxes[number])]
            for number in np.argsort(-read.shares, kind="stable")
        ]  # fmt: skip
        reads = "It reads the text too." if reads_text else "It reads no text."
        shares = "The percentages are their shares of the teacher's attention."
        return drawing, rows, f"{count_of(len(boxes), 'region')}, {source}. {shares} {reads} {remark}".strip()

    def _regions(self, picture: Image.Image) -> tuple[np.ndarray, np.ndarray, str]:
        row = self.row_of.get(_key(picture)) if self.row_of else None
        if row is not None and isinstance(self.gallery, Gallery):
            sample = self.gallery.dataset.select_columns(["boxes", "box_scores"])[row]
            return np.array(sample["boxes"]), np.array(sample["box_scores"]), "drawn with the picture"
        ((boxes, scores),) = self.detector([picture], [{"image_id": "upload"}])
        if not len(boxes):
            boxes, scores = np.array([[0, 0, *picture.size]], np.float32), np.ones(1, np.float32)
        fixed = " (a fixed grid, not objects; its owner can name a detector)" if self.detector_name == DETECTOR else ""
        return boxes, scores, f"by {self.detector_name}{fixed}"

    def _checked_text(self, text: str | None, if_empty: str) -> tuple[str, str]:
        """The stripped text, and a remark if it is too long."""
        text = (text or "").strip()
        if not text:
            raise UserMistake(f"The text is empty. {if_empty}")
        if len(text) > LONGEST_INPUT:
            raise UserMistake(
                f"The text has {len(text)} characters, more than {LONGEST_INPUT}. Describe it in one or two sentences."
            )
        dropped = count_dropped_tokens(self.model, self.processor, text)
        was = "was" if dropped == 1 else "were"
        return (
            text,
            f"**The text is too long: its last {count_of(dropped, 'token')} {was} not read.**" if dropped else "",
        )

    @staticmethod
    def _checked_picture(picture: Image.Image | None) -> Image.Image:
        if picture is None:
            raise UserMistake("There is no picture. Upload one, or choose one of the examples.")
        if min(picture.size) < 8:
            raise UserMistake(f"The picture has {picture.width}x{picture.height} pixels. At least 8x8 are needed.")
        if picture.width * picture.height > MOST_UPLOADED_PIXELS:
            raise UserMistake(
                f"The picture has {picture.width}x{picture.height} pixels, more than {MOST_UPLOADED_PIXELS:,}. Make "
                "it smaller."
            )
        return as_rgb(picture)


def _blank_tile() -> Image.Image:
    """What stands for a picture that cannot be read."""
    tile = Image.new("RGB", (TILE_SIZE // 2, TILE_SIZE // 2), (214, 218, 225))
    ImageDraw.Draw(tile).text((TILE_SIZE // 4, TILE_SIZE // 4), "cannot be read", (90, 96, 110), anchor="mm")
    return tile


def suggest_labels(answers: SpaceAnswers) -> tuple[str, str]:
    """Suggest labels and a prompt: what the captions name most, or the gallery's folders; else drawn shapes or things
    of photographs, by what is known of the model and the gallery.
    """
    names = frequent_names(answers.captions) or answers.folders()
    if names:
        return ", ".join(names), "a {}" if answers.knows_shapes else "a photo of a {}"
    return (SUGGESTED_SHAPES, "a {}") if answers.knows_shapes else (SUGGESTED_LABELS, "a photo of a {}")


def suggest_queries(answers: SpaceAnswers, count: int = 4) -> list[str]:
    """Suggest texts to search for: short captions of the gallery, spread over it; where it has none, neutral ones."""
    return short_captions(answers.captions, count) or list(DRAWN_QUERIES if answers.knows_shapes else QUERIES)[:count]
