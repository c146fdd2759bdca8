"""Where regions come from: four kinds of detectors behind one interface, by a spec string.

| detector | what | licence |
|---|---|---|
| `ultralytics[:WEIGHTS]` | YOLO weights, default `yolov8x.pt`, through the optional package ultralytics | AGPL-3.0 |
| `transformers:MODEL` | an object-detection checkpoint; with `labels` an open-vocabulary one | the checkpoint's |
| `annotations[:INSTANCES.json]` | boxes of a COCO instances file; without one the column `boxes` | the data's |
| `grid:ROWSxCOLUMNS` | equal cells | |

Options follow as `,key=value`, e.g. `ultralytics:yolov8n.pt,imgsz=320`; they are the keyword arguments of the
detector's class.
"""

import difflib
import importlib.util
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import (
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

from modeling_dclip.data.files import name_entry, read_json, require_field, require_id
from modeling_dclip.data.specs import PART, Range, Source, Spec, parse_spec
from modeling_dclip.encoders.fingerprints import hash_file, hash_json, hash_parts, tensor_bytes
from modeling_dclip.encoders.loading import check_model

logger = logging.getLogger(__name__)

Regions = tuple[np.ndarray, np.ndarray]

# SHA-256 of YOLO weights that hold networks alone: of ultralytics' releases, as many independent projects record them,
# and of the half-precision copy of yolov8n.pt that this repository's tests and recipes/photos.yaml read.
KNOWN_WEIGHTS = {
    "f59b3d833e2ff32e194b5bb8e08d211dc7c5bdf144b90d2c8412c47ccfc83b36": "yolov8n.pt",
    "1f47a78bf100391c2a140b7ac73a1caae18c32779be7d310658112f7ac9aa78a": "yolov8s.pt",
    "c4d5a3f000d771762f03fc8b57ebd0aae324aeaefdd6e68492a9c4470f2d1e8b": "yolov8x.pt",
    "0ebbc80d4a7680d14987a577cd21342b65ecfd94632bd9a8da63ae6417644ee1": "yolo11n.pt",
    "2cebeed67c7074a9822a24d5677cfe127b183dc02068ad2dc06805dbff3af1f6": "yolov8n.pt in half precision",
}


class RegionDetector(Protocol):
    """What finds regions.

    `fingerprint` names the detector with all its settings: equal fingerprints must mean equal answers, because answers
    are cached under it and the pixels. `reads_rows` is `True` where an answer depends on more than the pixels; such
    answers are never cached.
    """

    fingerprint: str
    reads_rows: bool = False

    def __call__(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Regions]:
        """Find the regions of each image.

        Args:
            images (`list[PIL.Image.Image]`): RGB.
            rows (`list[dict]`): The same images' other columns.

        Returns:
            `list[tuple[np.ndarray, np.ndarray]]`: For each image, boxes float32 `(R, 4)` xyxy in absolute pixels and
            scores float32 `(R,)` in [0, 1]. R may be 0. An answer must not depend on which other images are in the
            batch.
        """
        ...


def fingerprint(kind: str, *parts: Any) -> str:
    """`<kind>-<hash>` of whatever an answer depends on; `parts` must be JSON values."""
    return f"{kind}-{hash_json(parts)[:24]}"


def _as_regions(boxes: torch.Tensor, scores: torch.Tensor) -> Regions:
    return boxes.float().cpu().numpy().reshape(-1, 4), scores.float().cpu().numpy().reshape(-1)


def _groups_by_size(images: list[Image.Image]) -> Iterable[list[int]]:
    """Group the indices of images by size: a batch of several sizes is padded, and the padding moves boxes."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.size, []).append(index)
    return groups.values()


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Undo what ultralytics (8.4) does to the process that imports and calls it.

    It sets `OMP_NUM_THREADS` to 1 and torch to all cores but one, which halves the speed of a training that follows on
    two cores, and replaces `torch.save` and `PIL.Image.open`, the latter by one that installs a package for an
    unreadable picture.
    """
    opener, saver, threads, environment = Image.open, torch.save, torch.get_num_threads(), dict(os.environ)
    os.environ["YOLO_AUTOINSTALL"] = "false"  # it would pip-install what a checkpoint asks for
    try:
        yield
    finally:
        Image.open, torch.save = opener, saver
        torch.set_num_threads(threads)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def _download_weights(name: str) -> str:
    """The file of weights that ultralytics has under a name, fetched but not loaded."""
    with process_left_alone():
        from ultralytics.utils.downloads import attempt_download_asset

        path = str(attempt_download_asset(name))
    if not Path(path).is_file():
        raise FileNotFoundError(f"No YOLO weights at '{name}', and none of this name to download. Check the name.")
    return path


def _require_known(weights: str) -> None:
    """Refuse weights whose content is not known, before anything loads them."""
    if (found := hash_file(weights)) not in KNOWN_WEIGHTS:
        raise ValueError(
            f"Expected YOLO weights whose SHA-256 is known at '{weights}', got {found}. Such a file is a pickle, and "
            "loading it runs whatever code it holds. If you trust its origin, pass --trust_checkpoint (train.py: "
            "--regions.trust_checkpoint true); or use 'transformers:MODEL', which runs no code."
        )


def _no_ultralytics(reason: str) -> ImportError:
    return ImportError(
        f"The detector 'ultralytics' cannot be imported ({reason}). Run `pip install "
        "'modeling_dclip[regions]'`; where libGL.so.1 is missing, `pip uninstall ultralytics opencv-python`, "
        "then `pip install --force-reinstall --no-deps ultralytics-opencv-headless opencv-python-headless`. "
        "Without the package (it is AGPL-3.0) use 'transformers:MODEL'."
    )


def _require_weights(weights: str) -> None:
    """Refuse a path where nothing is; a bare name may be one that ultralytics fetches."""
    if Path(weights).parent != Path(".") and not Path(weights).is_file():
        raise FileNotFoundError(
            f"No YOLO weights at '{weights}'. Check the path, or give a bare name such as yolov8x.pt."
        )


def _check_ultralytics(
    weights: str = "yolov8x.pt", *, trust_checkpoint: bool, device: str | None = None, **_: Any
) -> None:
    """What can be said of YOLO weights before the package is imported: whether both are there, and may be loaded."""
    if importlib.util.find_spec("ultralytics") is None:
        raise _no_ultralytics("it is not installed")
    _require_weights(weights)
    if Path(weights).is_file():
        if not trust_checkpoint:
            _require_known(weights)
        return
    with process_left_alone():
        from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    if weights not in GITHUB_ASSETS_NAMES:
        near = difflib.get_close_matches(weights, GITHUB_ASSETS_NAMES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(f"No YOLO weights at '{weights}', and ultralytics has none of this name.{hint}")


def _check_transformers(model: str, *, labels: str | None = None, **_: Any) -> None:
    """Whether a checkpoint is an object detector with weights and an image processor. No weight is fetched or read."""
    config = type(check_model(model))
    wanted = MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING if labels else MODEL_FOR_OBJECT_DETECTION_MAPPING
    if config not in wanted:
        kind = "open-vocabulary detector, as the option labels asks for" if labels else "object detector"
        hint = " Say what it looks for, with ',labels=a dog|a ball'."
        if labels or config not in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING:
            hint = " Name another checkpoint, such as PekingU/rtdetr_r50vd."
        raise ValueError(f"Expected an {kind} at '{model}', got a model of type {config.model_type!r}.{hint}")
    AutoImageProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)


class UltralyticsDetector(RegionDetector):
    """YOLO weights through ultralytics.

    The package is AGPL-3.0 and therefore an extra: `pip install 'modeling_dclip[regions]'`. A `.pt` file is a pickle:
    loading it runs whatever code it holds. [`build_detector`] therefore loads only files of [`KNOWN_WEIGHTS`] unless
    told to trust the file; who calls this class trusts it.

    Source: [D] YOLOv8x; [Dcode] the library's defaults; docs/papers.md. Deviation: a batch holds images of
    one size only.

    Args:
        weights (`str`, *optional*, defaults to `"yolov8x.pt"`): A file, or a name that ultralytics downloads.
        trust_checkpoint (`bool`, *optional*, defaults to `True`): Load a file whose content is not known.
        conf (`float`, *optional*, defaults to 0.25): Lowest confidence.
        iou (`float`, *optional*, defaults to 0.7): Overlap above which non-maximum suppression drops the weaker box.
        max_det (`int`, *optional*, defaults to 300): Most boxes an image.
        imgsz (`int`, *optional*, defaults to 640): Long side the network sees, in pixels; images are scaled to it, up
            as well as down.
        device (`str`, *optional*): As torch names it; by default the first GPU, else the CPU.

    Raises:
        ImportError: If ultralytics is not installed, or OpenCV misses a system library.
        FileNotFoundError: If there are no such weights.
        ValueError: If the file is not known and not trusted: then it is not opened; if the weights find no boxes (a
            classifier).
    """

    def __init__(
        self,
        weights: str = "yolov8x.pt",
        trust_checkpoint: bool = True,
        *,
        conf: Annotated[float, PART] = 0.25,
        iou: Annotated[float, PART] = 0.7,
        max_det: Annotated[int, Range(1, 10**5, whole=True)] = 300,
        imgsz: Annotated[int, Range(1, 2**14, whole=True)] = 640,
        device: str | None = None,
    ):
        try:
            with process_left_alone():
                from ultralytics import YOLO
        except ImportError as error:
            raise _no_ultralytics(str(error)) from error
        _require_weights(weights)
        path = weights if Path(weights).is_file() else _download_weights(weights)
        if not trust_checkpoint:
            _require_known(path)
        try:
            with process_left_alone():
                self.model: Any = YOLO(path)
        # a damaged checkpoint or one of something else, as releases of torch and ultralytics tell it
        except (AttributeError, EOFError, LookupError, RuntimeError, TypeError, UnpicklingError) as error:
            raise ValueError(
                f"Expected YOLO weights at '{weights}', got a damaged file or one of another kind."
            ) from error
        if self.model.task not in ("detect", "segment", "pose"):
            raise ValueError(f"Expected weights that find boxes, got '{weights}' for the task {self.model.task!r}.")
        self.settings: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det, "imgsz": imgsz}
        self.device = device
        weights_hash = hash_file(str(self.model.ckpt_path))
        self.fingerprint = fingerprint("ultralytics", weights_hash, self.settings)

    def __call__(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Regions]:
        regions: dict[int, Regions] = {}
        for group in _groups_by_size(images):
            batch = [images[i] for i in group]
            results = self._predict(batch)
            for i, result in zip(group, results, strict=True):
                regions[i] = _as_regions(result.boxes.xyxy, result.boxes.conf)
        return [regions[i] for i in range(len(images))]

    def _predict(self, batch: list[Image.Image]) -> list[Any]:
        try:
            with process_left_alone():
                return self.model.predict(batch, device=self.device, verbose=False, save=False, **self.settings)
        except TypeError as error:  # a file of another kind, which ultralytics opens only now
            raise ValueError(
                f"Expected YOLO weights at '{self.model.ckpt_path}', got a file of another kind."
            ) from error


class TransformersDetector(RegionDetector):
    """An object-detection checkpoint of transformers: the way without AGPL.

    Args:
        model (`str`): Hub id or folder.
        threshold (`float`, *optional*, defaults to 0.5): Lowest score, the library's default. Open-vocabulary scores
            are lower (0.1).
        labels (`str`, *optional*): What an open-vocabulary checkpoint (OWL-ViT, Grounding DINO) looks for, joined by
            `|`.
        device (`str`, *optional*): By default the first GPU, else the CPU.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If the checkpoint is of another kind.
    """

    def __init__(
        self,
        model: str,
        *,
        threshold: Annotated[float, PART] = 0.5,
        labels: str | None = None,
        device: str | None = None,
    ):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.labels = labels.split("|") if labels else None
        self.threshold = threshold
        # The PIL backend everywhere: torchvision's pixels differ by a grey level or two, and a cache outlives a
        # machine.
        if self.labels:
            self.model, load_info = AutoModelForZeroShotObjectDetection.from_pretrained(
                model, output_loading_info=True, trust_remote_code=False
            )
            self.processor = AutoProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)
            image_processor = self.processor.image_processor
        else:
            self.model, load_info = AutoModelForObjectDetection.from_pretrained(
                model, output_loading_info=True, trust_remote_code=False
            )
            self.processor = image_processor = AutoImageProcessor.from_pretrained(
                model, backend="pil", trust_remote_code=False
            )
        if load_info["missing_keys"]:
            missing = sorted(load_info["missing_keys"])
            raise ValueError(
                f"'{model}' lacks {len(missing)} weights of {type(self.model).__name__}, first {missing[0]}: "
                "expected a checkpoint trained for object detection."
            )
        self.model.to(self.device).eval()
        weights = ((name, tensor_bytes(tensor)) for name, tensor in self.model.state_dict().items())
        weights_hash = hash_parts(chain.from_iterable(weights))
        config = self.model.config.to_diff_dict()
        config.pop("transformers_version", None)
        pixels = image_processor.to_json_string()
        self.fingerprint = fingerprint(
            "transformers", weights_hash, json.dumps(config, default=str), pixels, self.labels, threshold
        )

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Regions]:
        regions: dict[int, Regions] = {}
        for group in _groups_by_size(images):
            batch = [images[i] for i in group]
            sizes = torch.tensor([[image.height, image.width] for image in batch])
            options = {"threshold": self.threshold, "target_sizes": sizes}
            if self.labels:
                texts = [self.labels] * len(batch)
                inputs = self.processor(images=batch, text=texts, padding=True, return_tensors="pt").to(self.device)
                results = self.processor.post_process_grounded_object_detection(
                    self.model(**inputs), text_labels=texts, **options
                )
            else:
                inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
                results = self.processor.post_process_object_detection(self.model(**inputs), **options)
            for i, result in zip(group, results, strict=True):
                regions[i] = _as_regions(result["boxes"], result["scores"])
        return [regions[i] for i in range(len(images))]


# Annotations are rounded to hundredths when they are written; up to one pixel outside the image is taken for rounding.
BOX_TOLERANCE_PIXELS = 1.0


class _Annotation(NamedTuple):
    """A box of an instances file, x1, y1, x2, y2, and what messages call it."""

    name: str
    corners: list[float]
    is_crowd: bool


def _corners(annotation: Any, where: str, path: str) -> list[float]:
    """`bbox` (x, y, width, height) as x1, y1, x2, y2; whether the numbers are finite is checked with the box."""
    box = require_field(annotation, "bbox", where, path, list)
    if len(box) != 4 or not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in box):
        raise ValueError(
            f"{where} of '{path}': expected the numbers x, y, width, height under 'bbox', got {box!r:.80}."
        )
    x, y, width, height = (edge if abs(edge) <= sys.float_info.max else math.nan for edge in box)
    return [x, y, x + width, y + height]


def _annotated_boxes(path: str) -> tuple[dict[str, list[_Annotation]], dict[str, tuple[float, float]]]:
    """Annotations and `(width, height)` by image, under `coco-<id>` and under the bare id."""
    content = read_json(path, "COCO instances file", ("images", "annotations"))
    annotations: dict[str, list[_Annotation]] = {}
    sizes: dict[str, tuple[float, float]] = {}
    for position, image in enumerate(require_field(content, "images", "The object", path, list)):
        where = name_entry("Image", image, position)
        number = str(require_id(image, "id", where, path))
        if number in annotations:
            raise ValueError(f"{where} of '{path}' comes twice under 'images'. Remove one of the two.")
        width, height = (require_field(image, key, where, path, (int, float)) for key in ("width", "height"))
        found: list[_Annotation] = []
        for name in (number, f"coco-{number}"):
            annotations[name], sizes[name] = found, (width, height)
    for position, annotation in enumerate(require_field(content, "annotations", "The object", path, list)):
        where = name_entry("Annotation", annotation, position)
        number = str(require_id(annotation, "image_id", where, path))
        corners, is_crowd = _corners(annotation, where, path), _is_crowd(annotation, where, path)
        if number not in annotations:
            raise ValueError(f"{where} of '{path}' belongs to image {number}, which is not under 'images'.")
        annotations[number].append(_Annotation(f"a{where[1:]}", corners, is_crowd))
    return annotations, sizes


def _is_crowd(annotation: Any, where: str, path: str) -> bool:
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):  # equal to False and True too
        raise ValueError(f"{where} of '{path}': expected 0 or 1 under 'iscrowd', got {crowd!r:.80}.")
    return bool(crowd)


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
        content = hash_file(instances) if instances else "columns"
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
        found = self.annotations[image_id]
        kept = [one for one in found if self.keep_crowd or not one.is_crowd]
        return [(f"{one.name} of '{self.instances}'", one.corners, 1.0) for one in kept]

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
        ValueError: If `shape` is not of this form with both numbers from 1 to 999.

    Example:
        >>> GridDetector("1x2")([Image.new("RGB", (8, 4))], [{}])[0][0].tolist()
        [[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]]
    """

    reads_rows = True  # cheaper than a look into the cache

    def __init__(self, shape: str):
        match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", shape)
        if match is None:
            raise ValueError(f"Expected a grid as ROWSxCOLUMNS, e.g. 2x3, got {shape!r}. Both are from 1 to 999.")
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


DETECTORS = {
    "ultralytics": Source("ultralytics[:WEIGHTS]", UltralyticsDetector),
    "transformers": Source("transformers:MODEL", TransformersDetector),
    "annotations": Source("annotations[:INSTANCES.json]", AnnotationDetector),
    "grid": Source("grid:ROWSxCOLUMNS", GridDetector),
}


def check_detector(spec: str | Spec, *, trust_checkpoint: bool = False) -> None:
    """Say early that a detector cannot be built: a missing package, file or checkpoint, or one of another kind.

    No weight is fetched, loaded or, of a checkpoint of transformers, read.

    Args:
        spec (`str` or [`~modeling_dclip.data.specs.Spec`]): As for [`build_detector`].
        trust_checkpoint (`bool`, *optional*, defaults to `False`): As for [`build_detector`].

    Raises:
        ImportError: If ultralytics is asked for and not installed.
        OSError: If a file or checkpoint is missing.
        ValueError: If the spec is wrong, YOLO weights are not known and not trusted, or a checkpoint detects nothing.
    """
    parsed = parse_spec(spec, DETECTORS)
    parsed.check_files()
    if parsed.source.build is UltralyticsDetector:
        _check_ultralytics(*parsed.fields, **{"trust_checkpoint": trust_checkpoint, **parsed.options})
    elif parsed.source.build is TransformersDetector:
        _check_transformers(*parsed.fields, **parsed.options)
    elif parsed.source.build is GridDetector:
        parsed.build()


def build_detector(spec: str | Spec, *, trust_checkpoint: bool = False, **options: Any) -> RegionDetector:
    """Build a detector from a spec.

    Args:
        spec (`str` or [`~modeling_dclip.data.specs.Spec`]): See the table above.
        trust_checkpoint (`bool`, *optional*, defaults to `False`): Load a checkpoint that may run code, of a detector
            that has such.
        **options: More options, over those in the spec.

    Returns:
        `RegionDetector`: Ready to be called.

    Raises:
        ValueError: If the spec is wrong (the message lists the known forms), or as the detector says.
        ImportError: If ultralytics is asked for and not installed.
        FileNotFoundError: If a file is missing.
    """
    parsed = parse_spec(spec, DETECTORS)
    if parsed.source.build is UltralyticsDetector:
        options["trust_checkpoint"] = trust_checkpoint
    return parsed.build(**options)
