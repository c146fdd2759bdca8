"""The pictures an index is made of: where they come from, and which cannot be read."""

import os
from collections.abc import Sequence

from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_dclip.data.caption_rows import first
from modeling_dclip.data.captions import SOURCES, load_uncaptioned
from modeling_dclip.data.image_folders import read_images
from modeling_dclip.data.pixels import decode_image


def load_images(images: str) -> Dataset:
    """The pictures of a folder, or of a source of [`~modeling_dclip.data.captions`] without its captions.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no picture, or the spec is wrong.
    """
    if os.path.isdir(images):
        return read_images(images)
    if images.partition(":")[0] not in SOURCES or ":" not in images:
        forms = ", ".join(source.form for source in SOURCES.values())
        raise FileNotFoundError(
            f"Expected a folder of pictures, or a dataset ({forms}), got {images!r}. Check the path."
        )
    return load_uncaptioned([images], seed=0)


def image_paths(dataset: Dataset, rows: Sequence[int]) -> list[str | None]:
    """Where the images are, absolute; None of those that lie inside the dataset."""
    undecoded = dataset.select_columns("image").with_format(None).cast_column("image", ImageFeature(decode=False))
    stored = (row["image"] for row in undecoded.select(list(rows)))
    return [os.path.abspath(image["path"]) if image["bytes"] is None else None for image in stored]


def reason_of(dataset: Dataset, row: int) -> str:
    """Id, file and why an image cannot be read."""
    fault = describe_fault(dataset, row)
    return f"{fault['image_id']!r} ({fault['file'] or 'stored bytes'}): {fault['reason']}"


def describe_fault(dataset: Dataset, row: int) -> dict[str, str | None]:
    """`image_id`, `file` and `reason` of an image that cannot be read."""
    try:
        decode_image(dataset, row)
        reason = "it was not readable when it was embedded"
    except ValueError as error:
        reason = str(error.__cause__)
    except Image.DecompressionBombError as error:
        reason = str(error)
    image_id = dataset.select_columns("image_id")[row]["image_id"]
    return {"image_id": image_id, "file": image_paths(dataset, [row])[0], "reason": reason}


def refuse_unreadable(dataset: Dataset, rows: Sequence[int]) -> None:
    """Say which images cannot be read, and why.

    Raises:
        ValueError: Always.
    """
    examples = "; ".join(reason_of(dataset, row) for row in rows[:2])
    ids = first(dataset.select_columns("image_id")[row]["image_id"] for row in rows)
    raise ValueError(
        f"{len(rows)} of the images looked at so far cannot be read ({ids}): {examples}. Replace or remove the files, or leave such images "
        "out with on_bad_image 'skip'. What was embedded is kept."
    )
