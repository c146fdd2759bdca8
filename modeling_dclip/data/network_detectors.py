"""The detectors that are networks, and the interface that every source of regions has.

ultralytics is AGPL-3.0: it is imported here only, and only when asked for.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

Regions = tuple[np.ndarray, np.ndarray]


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
    return f"{kind}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]}"


def _as_regions(boxes: torch.Tensor, scores: torch.Tensor) -> Regions:
    return boxes.float().cpu().numpy().reshape(-1, 4), scores.float().cpu().numpy().reshape(-1)


def _groups_by_size(images: list[Image.Image]) -> Iterable[list[int]]:
    """Indices of images of one size. A mixed batch is padded, and the padding moves boxes; an equal one needs none."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.size, []).append(index)
    return groups.values()


@contextmanager
def process_left_alone() -> Iterator[None]:
    """Undo what ultralytics (8.4) does to the process that imports and calls it.

    It sets `OMP_NUM_THREADS` to 1 and torch to all cores but one, which halves the speed of a training that follows on two
    cores, and replaces `torch.save` and `PIL.Image.open`, the latter by one that installs a package for an unreadable
    picture.
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


class UltralyticsDetector(RegionDetector):
    """YOLO weights through ultralytics.

    The package is AGPL-3.0 and therefore an extra: `pip install 'modeling_dclip[regions]'`. A `.pt` file is a pickle
    that ultralytics executes while loading: give it weights you trust.

    Source: [D] YOLOv8x; [Dcode] the library's defaults; PAPERS.md. Deviation: a batch holds images of one size only.

    Args:
        weights (`str`, *optional*, defaults to `"yolov8x.pt"`): A file, or a name that ultralytics downloads.
        conf (`float`, *optional*, defaults to 0.25): Lowest confidence.
        iou (`float`, *optional*, defaults to 0.7): Overlap above which non-maximum suppression drops the weaker box.
        max_det (`int`, *optional*, defaults to 300): Most boxes an image.
        imgsz (`int`, *optional*, defaults to 640): Long side the network sees, in pixels; images are scaled to it, up
            as well as down.
        device (`str`, *optional*): As torch names it; by default the first GPU, else the CPU.

    Raises:
        ImportError: If ultralytics is not installed, or OpenCV misses a system library.
        FileNotFoundError: If there are no such weights.
        ValueError: If the weights find no boxes (a classifier).
    """

    def __init__(
        self,
        weights: str = "yolov8x.pt",
        *,
        conf: float = 0.25,
        iou: float = 0.7,
        max_det: int = 300,
        imgsz: int = 640,
        device: str | None = None,
    ):
        try:
            with process_left_alone():
                from ultralytics import YOLO
        except ImportError as error:
            raise ImportError(
                f"The detector 'ultralytics' cannot be imported ({error}). Run `pip install 'modeling_dclip[regions]'`; "
                "where libGL.so.1 is missing, `pip uninstall ultralytics opencv-python`, then "
                "`pip install --force-reinstall --no-deps ultralytics-opencv-headless opencv-python-headless`. "
                "Without the package (it is AGPL-3.0) use 'transformers:MODEL'."
            ) from error
        if Path(weights).parent != Path(".") and not Path(weights).is_file():
            raise FileNotFoundError(
                f"No YOLO weights at '{weights}'. Check the path, or give a bare name such as yolov8x.pt."
            )
        with process_left_alone():
            self.model = YOLO(weights)
        if self.model.task not in ("detect", "segment", "pose"):
            raise ValueError(f"Expected weights that find boxes, got '{weights}' for the task {self.model.task!r}.")
        self.settings = {"conf": conf, "iou": iou, "max_det": max_det, "imgsz": imgsz}
        self.device = device
        weights_hash = hashlib.sha256(Path(self.model.ckpt_path).read_bytes()).hexdigest()
        self.fingerprint = fingerprint("ultralytics", weights_hash, self.settings)

    def __call__(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Regions]:
        regions: list[Regions] = [None] * len(images)
        for group in _groups_by_size(images):
            batch = [images[i] for i in group]
            with process_left_alone():
                results = self.model.predict(batch, device=self.device, verbose=False, save=False, **self.settings)
            for i, result in zip(group, results, strict=True):
                regions[i] = _as_regions(result.boxes.xyxy, result.boxes.conf)
        return regions


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

    def __init__(self, model: str, *, threshold: float = 0.5, labels: str | None = None, device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.labels = labels.split("|") if labels else None
        self.threshold = threshold
        # The PIL backend everywhere: torchvision's pixels differ by a grey level or two, and a cache outlives a
        # machine.
        if self.labels:
            self.model, load_info = AutoModelForZeroShotObjectDetection.from_pretrained(
                model, output_loading_info=True
            )
            self.processor = AutoProcessor.from_pretrained(model, backend="pil")
            image_processor = self.processor.image_processor
        else:
            self.model, load_info = AutoModelForObjectDetection.from_pretrained(model, output_loading_info=True)
            self.processor = image_processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        if load_info["missing_keys"]:
            missing = sorted(load_info["missing_keys"])
            raise ValueError(
                f"'{model}' lacks {len(missing)} weights of {type(self.model).__name__}, first {missing[0]}: "
                "expected a checkpoint trained for object detection."
            )
        self.model.to(self.device).eval()
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        config = self.model.config.to_diff_dict()
        config.pop("transformers_version", None)
        pixels = image_processor.to_json_string()
        self.fingerprint = fingerprint(
            "transformers", digest.hexdigest(), json.dumps(config, default=str), pixels, self.labels, threshold
        )

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Regions]:
        regions: list[Regions] = [None] * len(images)
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
        return regions
