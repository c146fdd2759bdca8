"""The answers of the Space, without its page.

It finds pictures for a text and texts for a picture, classifies a picture, and maps where a teacher looks.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from modeling_dclip.configuration_dclip import DCLIPTeacherConfig
from modeling_dclip.data.captions import load_captions, load_uncaptioned
from modeling_dclip.data.captions.files import read_images
from modeling_dclip.data.files import temporary_folder
from modeling_dclip.data.images import decode_image, open_image
from modeling_dclip.data.regions.detectors import build_detector
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.fingerprints import hash_parts
from modeling_dclip.encoders.loading import load_checked, load_dual_encoder, load_processor
from modeling_dclip.evaluation.benchmarks.zero_shot import build_classifier
from modeling_dclip.evaluation.embedding import count_dropped_tokens, embed_images, embed_query, embed_texts
from modeling_dclip.evaluation.reports.document import escape_markdown
from modeling_dclip.evaluation.reports.maps import draw_attention
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor, as_rgb

logger = logging.getLogger(__name__)

GALLERY = "scenes:validation,n=60,image_size=224,max_siblings=2"
DETECTOR = "grid:3x3"
LONGEST_INPUT = 2000  # characters of a text, before it is tokenized
MOST_LABELS = 200
MOST_TEXTS = 500  # of a visitor's own
LONGEST_PROMPT = 500  # characters
MOST_SHOWN = 100
MOST_UPLOADED_PIXELS = 50_000_000


class UserMistake(ValueError):
    """A mistake that the visitor can correct. The page shows the message."""


def load_gallery(spec: str) -> Dataset:
    """Load the pictures of a folder, of `images:FOLDER`, or of a dataset with captions such as the drawn scenes."""
    if os.path.isdir(spec):
        return read_images(spec)
    return load_uncaptioned([spec], seed=0) if spec.startswith("images:") else load_captions(spec)


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


def _key(picture: Image.Image) -> str:
    return hash_parts([repr(picture.size), as_rgb(picture).tobytes()])


class SpaceAnswers:
    """A dual encoder with a gallery of pictures, and optionally a teacher.

    Args:
        model (`str`): As for [`~modeling_dclip.encoders.loading.load_dual_encoder`].
        teacher (`str`, *optional*): Folder or Hub id of a trained teacher.
        gallery (`str`, *optional*): As for [`load_gallery`]; drawn scenes by default. All pictures are embedded when
            the page starts, which is fine for some thousands. For more, build an index.
        detector (`str`, *optional*, defaults to `"grid:3x3"`): Finds the regions of pictures that come without boxes;
            any of [`~modeling_dclip.data.regions.detectors`], such as `transformers:MODEL`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.
    """

    def __init__(
        self,
        model: str,
        teacher: str | None = None,
        *,
        gallery: str = GALLERY,
        detector: str = DETECTOR,
        trust_remote_code: bool = False,
    ):
        self.name, self.teacher_name = model, teacher
        self.model, self.processor, _ = load_dual_encoder(model, trust_remote_code=trust_remote_code)
        self.teacher = load_teacher(teacher) if teacher else None
        self.detector_name, self.detector = detector, build_detector(detector)
        self.gallery = load_gallery(gallery)
        self.is_drawn = gallery.startswith("scenes:")
        encoder = Encoder(self.model, self.processor)
        self.image_embeds = embed_images(encoder, self.gallery)
        self.captions = list(dict.fromkeys(row[0] for row in self.gallery["captions"][:] if row))
        self.caption_embeds = embed_texts(encoder, self.captions) if self.captions else None
        self.row_of = {} if "boxes" not in self.gallery.column_names else self._keys()

    def _keys(self) -> dict[str, int]:
        return {_key(self.picture(row)): row for row in range(len(self.gallery))}

    def picture(self, row: int) -> Image.Image:
        """A picture of the gallery, in RGB."""
        return decode_image(self.gallery, row)

    def find_pictures(self, text: str | None, top_k: int = 10) -> tuple[list[tuple[Image.Image, str]], str]:
        """Find the gallery's pictures for a text, best first, each with its rank and cosine; and a remark."""
        text, remark = self._checked_text(
            text, "Type what the picture should show, for example one of the examples below."
        )
        scores = (embed_query(self.model, self.processor, text) @ self.image_embeds.T)[0]
        best = scores.topk(min(max(1, int(top_k)), MOST_SHOWN, len(scores)))
        found = [
            (self.picture(row), f"{rank} · {score:.3f}")
            for rank, (score, row) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1)
        ]
        said = f"The {len(found)} nearest of {len(scores)} pictures, each with its rank and its cosine to the text."
        return found, f"{said} {remark}".strip()

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
        whose = f"your {len(names)} texts" if texts else f"the {len(names)} captions of the gallery"
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
        return dict(
            zip(names, scores.tolist(), strict=True)
        ), f"Most likely: {escape_markdown(repr(prompt.replace('{}', names[int(scores.argmax())])))}."

    def attend(self, picture: Image.Image | None, caption: str | None) -> tuple[Image.Image, str]:
        """Draw the teacher's attention over the picture's regions; and a remark."""
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
            draw_attention(model, processor, picture, (boxes, scores), caption, folder / "attention.png")
            drawing = open_image(folder / "attention.png")
        read = "It reads the text too." if reads_text else "It reads no text."
        shares = "The percentages are their shares of the teacher's attention."
        return drawing, f"{len(boxes)} regions, {source}. {shares} {read} {remark}".strip()

    def _regions(self, picture: Image.Image) -> tuple[np.ndarray, np.ndarray, str]:
        row = self.row_of.get(_key(picture))
        if row is not None:
            sample = self.gallery.select_columns(["boxes", "box_scores"])[row]
            return np.array(sample["boxes"]), np.array(sample["box_scores"]), "drawn with the picture"
        ((boxes, scores),) = self.detector([picture], [{"image_id": "upload"}])
        if not len(boxes):
            boxes, scores = np.array([[0, 0, *picture.size]], np.float32), np.ones(1, np.float32)
        return boxes, scores, f"by {self.detector_name}"

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
        return text, f"**The text is too long: its last {dropped} tokens were not read.**" if dropped else ""

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


def suggest_labels(drawn: bool) -> tuple[str, str]:
    """Suggest labels and a prompt, for drawn pictures or for photographs."""
    if drawn:
        return "red circle, blue circle, green star, yellow square, black cross, pink heart", "a {}"
    return "dog, cat, person, car, food, landscape", "a photo of a {}"


def suggest_queries(captions: Sequence[str], drawn: bool) -> list[str]:
    """Suggest texts to search for, for drawn pictures or from the captions."""
    if drawn:
        return [
            "a large green star",
            "two striped triangles",
            "a red diamond left of a ring",
            "a purple star with dots",
        ]
    return sorted(captions, key=len)[:4]
