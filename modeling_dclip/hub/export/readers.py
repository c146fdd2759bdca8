"""What users of an export get: texts and pictures through the reader's own tokenizer and preprocessing.

The inputs are what readers are known to treat in different ways. Some have to give the model's own embeddings in every
reader, or the export is refused. The others are measured, and the export says where they differ and by how much.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers import PreTrainedModel

from modeling_dclip.data.failures import BENCHMARK_FAILURES, one_line
from modeling_dclip.data.files import read_text, write_text
from modeling_dclip.data.images import UnreadableImageError, open_image
from modeling_dclip.encoders import DualEncoder
from modeling_dclip.encoders.families import check_end_token, projected, tokenize_texts
from modeling_dclip.hub.export.onnx import Deviation, check_outputs

# By kind. Those of EQUAL are read alike by every reader, or the export is refused.
TEXTS: dict[str, tuple[str, ...]] = {
    "plain words": ("a dog on a beach", "two red circles, left of a table."),
    "capitals": ("A Dog On THE BEACH",),
    "no words": ("", "   "),
    "white space": ("  a \t dog \n on\r\na beach  ",),
    "more words than are read": ("a dog and " * 60,),
    "composed accents": ("déjà vu in a café",),
    "decomposed accents": ("de\u0301ja\u0300 vu in a cafe\u0301",),
    "curly quotes": ("the dog’s ball", "a “no entry” sign"),
    "HTML entities": ("Tom &amp; Jerry", "a dog &lt;3 a cat", "a red&nbsp;circle"),
    "ligatures": ("ﬁne print", "an oﬃce"),
    "ellipses and dashes": ("ten… dogs", "a dog – a cat"),
    "non-breaking spaces": ("5\u00a0km to the beach",),
    "full-width letters": ("ａ ＤＯＧ",),
    "emoji": ("a dog 🐕 and a heart ❤️",),
    "Chinese": ("海滩上的狗",),
    "mojibake": ("dÃ©jÃ\xa0 vu",),
    "control characters": ("a\x00 dog\x07", "a \x1b[31mred\x1b[0m dog"),
    "invisible characters": ("\ufeffa dog", "a\u200b dog", "a\u00ad dog"),
    "special tokens": ("a <|endoftext|> dog",),
}
EQUAL_TEXTS = ("plain words", "capitals", "no words", "white space", "more words than are read", "Chinese")
EQUAL_PICTURES = ("plain",)
# Part of every README: what the model's own commands do before the image processor.
OPEN_PICTURE = """
from PIL import Image, ImageOps


def open_picture(path):  # upright, in 8 bits, and transparent pixels over white
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
"""
DIFFERENT = 1e-5  # 1 - cosine: an input is read otherwise; float32 rounding stays far below
_TURNED, _QUALITY = 6, 95  # an EXIF orientation, and of JPEG


class Reader(NamedTuple):
    """A program that reads an export.

    Attributes:
        name (`str`): For messages.
        embed_texts (`Callable`): From texts to `(B, D)`, through its own tokenizer; None if it reads none.
        embed_pictures (`Callable`): From pictures to `(B, D)`, through its own preprocessing; None if it reads none.
        why (`Mapping[str, str]`, *optional*): What is known of a difference, by `"text"` and `"picture"`.
        dtype (`str`, *optional*, defaults to `"fp32"`): Of its computations.
        install (`str`, *optional*): The packages that its code needs, for pip.
    """

    name: str
    embed_texts: Callable[[list[str]], torch.Tensor] | None
    embed_pictures: Callable[[list[Image.Image]], torch.Tensor] | None
    why: Mapping[str, str] = {}
    dtype: str = "fp32"
    install: str = ""


class Reading(NamedTuple):
    """How one kind of input is read.

    Attributes:
        side (`str`): `"text"` or `"picture"`.
        kind (`str`): Which kind.
        cosine (`float`): The least to the model's own embedding; NaN where one of the two refuses it.
        said (`str`): Why it is refused, or nothing.
    """

    side: str
    kind: str
    cosine: float
    said: str

    @property
    def is_equal(self) -> bool:
        """Whether the embedding is the model's own."""
        return 1 - self.cosine <= DIFFERENT


def make_pictures(size: int) -> dict[str, tuple[bytes, ...]]:
    """Draw pictures of every kind, as files, for an encoder of so many pixels."""
    generator = np.random.default_rng(0)

    def draw(width: int, height: int, channels: int = 3) -> Image.Image:
        coarse = generator.integers(0, 256, (5, 7, channels), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)

    def save(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, form, **options)
        return stream.getvalue()

    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = _TURNED
    palette = draw(2 * size, 2 * size).quantize(32)
    deep = np.asarray(draw(2 * size, 2 * size).convert("L")).astype(np.uint16) * 257
    wide = draw(2 * size, size)
    return {
        "plain": (
            save(draw(2 * size, 2 * size)),
            save(draw(3 * size, size)),
            save(draw(size, 3 * size), "JPEG", quality=_QUALITY),
        ),
        "grey": (save(draw(2 * size, 2 * size).convert("L")),),
        "transparent": (save(draw(2 * size, 2 * size, 4)),),
        "palette": (save(palette),),
        "transparent palette": (save(palette, transparency=3),),
        "turned by EXIF": (save(wide, "JPEG", quality=_QUALITY, exif=turned),),
        "16 bits a pixel": (save(Image.fromarray(deep)),),
        "CMYK": (save(draw(2 * size, 2 * size).convert("CMYK"), "JPEG", quality=_QUALITY),),
        "odd margins": (save(draw(size + 3, size)), save(draw(size, size + 7))),
        "very wide": (save(draw(30 * size, size // 2)),),
        "very tall": (save(draw(size // 2, 30 * size)),),
        "tiny": (save(draw(1, 1)), save(draw(3, 2))),
    }


@torch.no_grad()
def compare_reader(model: PreTrainedModel, processor: Any, reader: Reader) -> tuple[Deviation, list[Reading]]:
    """Compare a reader's embeddings of texts and pictures with those that the model's own commands compute.

    Args:
        model (`PreTrainedModel`): A dual encoder in float32, in eval mode, on the CPU.
        processor: The model's own.
        reader ([`Reader`]): The program, with the export loaded.

    Returns:
        `tuple[Deviation, list[Reading]]`: Of the kinds that have to be equal; and one reading a kind.

    Raises:
        ValueError: If a kind that has to be equal is not, or the tokenizer's end token is not the text encoder's.
    """
    dual = cast("DualEncoder", model)
    check_end_token(dual, processor.tokenizer, processor.tokenizer.name_or_path)

    def our_texts(texts: list[str]) -> torch.Tensor:
        inputs = tokenize_texts(dual, processor, texts, max_length=model.config.text_config.max_position_embeddings)
        return projected(dual.get_text_features(**inputs))

    def our_pictures(files: Sequence[bytes]) -> torch.Tensor:
        pictures = [open_image(file) for file in files]
        return projected(
            dual.get_image_features(processor.image_processor(pictures, return_tensors="pt").pixel_values)
        )

    def their_pictures(files: Sequence[bytes]) -> torch.Tensor:
        embed = cast("Callable[[list[Image.Image]], torch.Tensor]", reader.embed_pictures)
        return embed([Image.open(io.BytesIO(file)) for file in files])

    pairs, readings = [], []
    jobs: list[tuple[str, str, Any, Any, Any]] = []
    if reader.embed_texts is not None:
        jobs += [("text", kind, list(texts), our_texts, reader.embed_texts) for kind, texts in TEXTS.items()]
    if reader.embed_pictures is not None:
        drawn = make_pictures(model.config.vision_config.image_size)
        jobs += [("picture", kind, files, our_pictures, their_pictures) for kind, files in drawn.items()]
    for side, kind, inputs, ours, theirs in jobs:
        must_be_equal = kind in (EQUAL_TEXTS if side == "text" else EQUAL_PICTURES)
        try:
            expected = ours(inputs).float()
        except UnreadableImageError as error:
            readings.append(Reading(side, kind, float("nan"), f"refused by the model's own commands: {error.reason}"))
            continue
        try:
            found = theirs(inputs).float()
        except BENCHMARK_FAILURES as error:
            if must_be_equal:
                raise
            readings.append(Reading(side, kind, float("nan"), f"refused by {reader.name}: {one_line(error)}"))
            continue
        if must_be_equal:
            check_outputs([(found, expected)], reader.dtype, f"{reader.name} on {side}s of the kind '{kind}'")
            pairs.append((found, expected))
        readings.append(Reading(side, kind, float(torch.cosine_similarity(found, expected).min().clamp(max=1)), ""))
    return check_outputs(pairs, reader.dtype, reader.name), readings


def describe_readings(readings: Sequence[Reading], reader: Reader) -> list[str]:
    """One line for each side that is read otherwise: the kinds, each with its least cosine, and why."""
    lines = []
    for side in ("text", "picture"):
        apart = [reading for reading in readings if reading.side == side and not reading.is_equal]
        if apart:
            kinds = ", ".join(f"{one.kind} ({one.said or f'{one.cosine:.4f}'})" for one in apart)
            why = reader.why.get(side, "")
            lines.append(
                f"{reader.name} reads these {side}s otherwise than the model (least cosine): {kinds}. {why}".rstrip()
            )
    return lines


def write_readme(
    folder: Path, use: str, readings: Sequence[Reading], reader: Reader, about: Sequence[str] = ()
) -> None:
    """Write the README of an export: how to use it, and how its reader reads each kind of text and picture.

    Args:
        folder (`Path`): The export.
        use (`str`): Code in Python that reads it.
        readings (`Sequence[Reading]`): Of [`compare_reader`]; none if it was not compared.
        reader ([`Reader`]): The program.
        about (`Sequence[str]`, *optional*): What was exported, a paragraph each; before the code.
    """
    need = ["```bash", f"pip install {reader.install}", "```", ""] if reader.install else []
    told = [line for paragraph in about for line in (paragraph, "")]
    lines = [f"# Export for {reader.name}", "", *told, *need, "```python", use.strip(), "```", ""]
    if readings:
        differs = describe_readings(readings, reader)
        lines += ["## What differs from the model", ""]
        lines += [f"- {line}" for line in differs] or ["Nothing of what was tried."]
        lines += [
            "",
            "## What was tried",
            "",
            f"Texts and pictures of the kinds below went through the tokenizer and preprocessing of {reader.name} as",
            "above, pictures opened by `Image.open` alone, and through the commands of modeling_dclip. The number is",
            "the least cosine between the two embeddings; 1 is the same.",
            "",
            "| input | cosine |",
            "|---|---|",
            *(
                f"| {one.side}s: {one.kind} | {one.said.replace('|', ' ') or f'{one.cosine:.6f}'}"
                f"{'' if one.is_equal else ' (differs)'} |"
                for one in readings
            ),
        ]
    write_text(folder / "README.md", "\n".join(lines).rstrip() + "\n")


def short_code(folder: Path) -> str:
    """The code of an export's README for its folder, with pictures opened by `Image.open`; nothing without a README.

    Args:
        folder (`Path`): The export.
    """
    if not (folder / "README.md").is_file():
        return ""
    code = read_text(folder / "README.md").split("```python\n")[1].split("```")[0]
    code = code.replace(OPEN_PICTURE.strip(), "from PIL import Image").replace("open_picture(", "Image.open(")
    return re.sub(r"\n{3,}", "\n\n", code.replace("FOLDER", str(folder)).replace("  # this one", "")).strip()
