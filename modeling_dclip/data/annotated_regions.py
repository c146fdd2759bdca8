"""Regions that no network finds: boxes that somebody drew, and a grid."""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modeling_dclip.data.caption_files import read_json, require_field
from modeling_dclip.data.network_detectors import RegionDetector, Regions, fingerprint

logger = logging.getLogger(__name__)

# Annotations are rounded to hundredths when they are written; up to one pixel outside the image is taken for rounding.
BOX_TOLERANCE_PIXELS = 1.0


def _annotated_boxes(path: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, tuple[int, int]]]:
    """Annotations and `(width, height)` by image, under `coco-<id>` and under the bare id."""
    content = read_json(path, "COCO instances file", ("images", "annotations"))
    annotations: dict[str, list[dict[str, Any]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for image in content["images"]:
        number, width, height = (require_field(image, key, "An image", path) for key in ("id", "width", "height"))
        for name in (f"coco-{number}", str(number)):
            annotations[name], sizes[name] = [], (width, height)
    for annotation in content["annotations"]:
        what = f"Annotation {annotation.get('id')}"
        number, box = (require_field(annotation, key, what, path) for key in ("image_id", "bbox"))
        if str(number) not in annotations or len(box) != 4:
            raise ValueError(
                f"{what} of '{path}' belongs to no image of the file, or its 'bbox' is not x, y, width, height: "
                f"image {number}, {box}. Expected a COCO instances file."
            )
        for name in (f"coco-{number}", str(number)):
            annotations[name].append(annotation)
    return annotations, sizes


def box_fault(box: np.ndarray, size: tuple[int, int]) -> str | None:
    """What is wrong with an annotated box in an image of `size` `(width, height)`; `None` if nothing."""
    x1, y1, x2, y2 = box.tolist()
    width, height = size
    if not np.isfinite(box).all():
        return "has a coordinate that is no finite number"
    if x2 <= x1 or y2 <= y1:
        return "has no area (expected x1 < x2 and y1 < y2)"
    if min(x1, y1) < -BOX_TOLERANCE_PIXELS or max(x2 - width, y2 - height) > BOX_TOLERANCE_PIXELS:
        return f"reaches outside the image of {width}x{height} pixels"
    return None


class AnnotationDetector(RegionDetector):
    """Boxes that somebody drew: a COCO instances file, or the `boxes` (and `box_scores`) columns of the dataset
    itself.

    Crowd annotations (`iscrowd` 1: one box around many objects) are left out, as COCO's own evaluation ignores them.

    Args:
        instances (`str`, *optional*): The JSON file, boxes as x, y, width, height. An image is found by its id,
            `coco-<id>` or bare.
        on_bad_box (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out wrong boxes, each named in a warning
            (COCO's train2017 holds a few without area).
        keep_crowd (`bool`, *optional*, defaults to `False`): Keep crowd annotations.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is malformed; when called, if an image is not in it or of another size, or a box is not
            finite, without area or outside the image. The message names the image and the annotation.
    """

    reads_rows = True

    def __init__(self, instances: str | None = None, *, on_bad_box: str = "raise", keep_crowd: bool = False):
        if on_bad_box not in ("raise", "skip"):
            raise ValueError(f"Expected on_bad_box to be 'raise' or 'skip', got {on_bad_box!r}.")
        self.instances, self.on_bad_box, self.keep_crowd = instances, on_bad_box, keep_crowd
        self.annotations, self.sizes = _annotated_boxes(instances) if instances else ({}, {})
        content = hashlib.sha256(Path(instances).read_bytes()).hexdigest() if instances else "columns"
        self.fingerprint = fingerprint("annotations", content, on_bad_box, keep_crowd)

    def _of_file(self, image_id: str, size: tuple[int, int]) -> list[tuple[str, list[float], float]]:
        if image_id not in self.annotations:
            raise ValueError(
                f"Image {image_id!r} is not in '{self.instances}'. Expected 'coco-<id>' or an id of the file."
            )
        if self.sizes[image_id] != size:
            raise ValueError(
                f"Image {image_id!r} has {size[0]}x{size[1]} pixels, but its boxes in '{self.instances}' are for "
                f"{self.sizes[image_id][0]}x{self.sizes[image_id][1]}. Use the original picture or another detector."
            )
        kept = [a for a in self.annotations[image_id] if self.keep_crowd or not a.get("iscrowd")]
        corners = [
            [a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in kept
        ]
        return [(f"annotation {a.get('id')}", box, 1.0) for a, box in zip(kept, corners, strict=True)]

    def _of_row(self, row: dict[str, Any]) -> list[tuple[str, list[float], float]]:
        if row.get("boxes") is None:
            raise ValueError(
                f"Image {row['image_id']!r} has no value in a column 'boxes'; the columns are {sorted(row)}. "
                "Name an instances file: 'annotations:INSTANCES.json'."
            )
        scores = row.get("box_scores")
        scores = [1.0] * len(row["boxes"]) if scores is None else scores
        if len(scores) != len(row["boxes"]):
            raise ValueError(f"Image {row['image_id']!r} has {len(row['boxes'])} boxes but {len(scores)} box_scores.")
        pairs = zip(row["boxes"], scores, strict=True)
        return [(f"box {number}", box, score) for number, (box, score) in enumerate(pairs)]

    def __call__(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Regions]:
        regions = []
        for image, row in zip(images, rows, strict=True):
            found = self._of_file(row["image_id"], image.size) if self.instances else self._of_row(row)
            boxes, scores = [], []
            for name, corners, score in found:
                box = np.asarray(corners, np.float32)
                fault = box_fault(box, image.size)
                if fault is None:
                    boxes.append(box)
                    scores.append(score)
                    continue
                message = f"Image {row['image_id']!r}: {name} {fault}: {box.tolist()} (x1, y1, x2, y2)"
                if self.on_bad_box == "raise":
                    raise ValueError(f"{message}. Correct it, or leave such boxes out with ',on_bad_box=skip'.")
                logger.warning("%s; left out", message)
            regions.append((np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)))
        return regions


class GridDetector(RegionDetector):
    """Equal cells, row by row, all with score 1.

    Args:
        shape (`str`): `ROWSxCOLUMNS`, e.g. `2x3`.

    Raises:
        ValueError: If `shape` is not of this form with both numbers at least 1.

    Example:
        >>> GridDetector("1x2")([Image.new("RGB", (8, 4))], [{}])[0][0].tolist()
        [[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]]
    """

    reads_rows = True  # cheaper than a look into the cache

    def __init__(self, shape: str):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if match is None:
            raise ValueError(f"Expected a grid as ROWSxCOLUMNS, e.g. 2x3, got {shape!r}.")
        self.rows, self.columns = int(match[1]), int(match[2])
        self.fingerprint = fingerprint("grid", self.rows, self.columns)

    def __call__(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Regions]:
        regions = []
        for image in images:
            xs = np.linspace(0, image.width, self.columns + 1, dtype=np.float32)
            ys = np.linspace(0, image.height, self.rows + 1, dtype=np.float32)
            cells = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(self.rows) for c in range(self.columns)]
            regions.append((np.array(cells, np.float32), np.ones(len(cells), np.float32)))
        return regions
