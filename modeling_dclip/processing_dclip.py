"""Turn texts, images and boxes into what the student and the teacher read.

Preprocessing is pinned to PIL: the torchvision backend differs by 1 to 2 grey levels, which moves evaluation numbers.
"""

import numpy as np
import torch
from transformers import BatchFeature, CLIPImageProcessorPil, CLIPProcessor
from transformers.image_utils import PILImageResampling, load_image
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

logger = logging.get_logger(__name__)


class DCLIPProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"truncation": True, "padding": True}}


class DCLIPProcessor(CLIPProcessor):
    """CLIP's processor; a text too long is cut, keeping EOS, and that is said once.

    Source: docs/papers.md, student. Deviation: none.

    Args:
        image_processor (`CLIPImageProcessorPil`, *optional*): One of the torchvision backend is replaced by its PIL
            twin.
        tokenizer (`CLIPTokenizer`, *optional*): Its `model_max_length` is where texts are cut. It is
            set to pad and cut on the right.
    """

    valid_processor_kwargs = DCLIPProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if image_processor is not None and not isinstance(image_processor, CLIPImageProcessorPil):
            image_processor = CLIPImageProcessorPil(**_settings(image_processor))
        if tokenizer is not None:  # the tower counts places from the first token, and reads the end token
            tokenizer.padding_side = tokenizer.truncation_side = "right"
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text=None, **kwargs):
        """Tokenize and preprocess.

        Args:
            images (`PIL.Image` or list, *optional*): Or whatever CLIP's image processor takes.
            text (`str` or `list[str]`, *optional*): Padded to the longest and truncated unless told otherwise.
            kwargs: As for [`~transformers.CLIPProcessor`].

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` for text, `pixel_values (B, 3, H, W)` for images.
        """
        features = super().__call__(images=images, text=text, **kwargs)
        if text is not None:
            texts, rows = text, features["input_ids"]
            if isinstance(text, str):  # one text without `return_tensors` comes back as one flat row
                texts, rows = [text], [rows] if isinstance(rows[0], int) else rows
            self._report_truncation(texts, rows)
        return features

    def _report_truncation(self, texts, input_ids):
        limit = self.tokenizer.model_max_length
        for text, ids in zip(texts, input_ids, strict=True):
            if len(ids) < limit:
                continue
            if len(self.tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]) > len(ids):
                # Once per message: it names no text, or it would be said of every one.
                logger.warning_once(
                    f"A text has more than the {limit} tokens the text encoder reads: it is cut there, its end token "
                    "kept. Said once; others are cut alike."
                )
                return

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, and `preprocessor_config.json` too, which older readers and pipelines look for."""
        files = super().save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory)
        return files


class DCLIPTeacherProcessor(DCLIPProcessor):
    """Texts, images and boxes into the teacher's inputs: crops, resizes, normalises, pads and masks.

    A crop is the exact box, resized to the encoder's square without keeping its aspect. An image without a box has
    itself as its one region, with score 1.

    Source: docs/papers.md, crop. Deviation: crops are normalised with CLIP's mean and deviation; never a zero region.
    """

    def __call__(
        self, images=None, text=None, boxes=None, box_scores=None, max_regions=None, return_tensors="pt", **kwargs
    ):
        """Prepare a batch.

        Args:
            images (`PIL.Image` or `list[PIL.Image]`, *optional*): B images of any size.
            text (`str` or `list[str]`, *optional*): B captions.
            boxes (`list` of array-like `(R_i, 4)`, *optional*): xyxy in absolute pixels, inside the image. None, or
                no row, means the whole image.
            box_scores (`list` of array-like `(R_i,)`, *optional*): In [0, 1]; None means 1.
            max_regions (`int`, *optional*): Keep the best-scored so many per image, in their given order.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            kwargs: As for [`DCLIPProcessor`].

        Returns:
            `BatchFeature`: [`DCLIPProcessor`]'s, and for images `region_pixel_values (B, R, 3, S, S)`,
            `region_boxes (B, R, 4)` as fractions of the image, `region_scores (B, R)`, `region_mask (B, R)` bool;
            padding is 0 and False.

        Raises:
            ValueError: If counts differ, a box lies outside its image, is empty or not finite, or a score is not in
                [0, 1]. The message names sample and box.
        """
        if images is not None:
            images = [load_image(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        elif boxes is not None or box_scores is not None:
            raise ValueError("boxes: expected the images they lie in, got images=None.")
        features = super().__call__(images=images, text=text, return_tensors=return_tensors, **kwargs)
        if images is not None:
            features.update(self._crop_regions(images, boxes, box_scores, max_regions, return_tensors))
        return features

    def _crop_regions(self, images, boxes, box_scores, max_regions, return_tensors):
        for name, given in (("boxes", boxes), ("box_scores", box_scores)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{name}: expected one entry per image ({len(images)}), got {len(given)}.")
        if boxes is None and box_scores is not None:
            raise ValueError("box_scores: expected the boxes they belong to, got boxes=None.")
        regions = []
        for sample, image in enumerate(images):
            sample_boxes = None if boxes is None else boxes[sample]
            sample_scores = None if box_scores is None else box_scores[sample]
            regions.append(check_boxes(sample_boxes, sample_scores, image.size, sample, max_regions))
        most = max(len(scores) for _, scores in regions)
        height, width = self.region_size
        pixels = np.zeros((len(images), most, 3, height, width), dtype=np.float32)
        fractions = np.zeros((len(images), most, 4), dtype=np.float32)
        region_scores = np.zeros((len(images), most), dtype=np.float32)
        mask = np.zeros((len(images), most), dtype=bool)
        for sample, (image, (sample_boxes, sample_scores)) in enumerate(zip(images, regions, strict=True)):
            count = len(sample_scores)
            self._normalise(crop_boxes(image, sample_boxes, (width, height), self._resample), into=pixels[sample])
            fractions[sample, :count] = sample_boxes / np.tile(image.size, 2)
            region_scores[sample, :count] = sample_scores
            mask[sample, :count] = True
        data = {
            "region_pixel_values": pixels,
            "region_boxes": fractions,
            "region_scores": region_scores,
            "region_mask": mask,
        }
        if return_tensors == "pt":
            return {name: torch.from_numpy(array) for name, array in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    @property
    def region_size(self):
        """`(height, width)` of a crop: what the image encoder takes."""
        size = self.image_processor.crop_size
        return size["height"], size["width"]

    @property
    def _resample(self):
        return PILImageResampling(int(self.image_processor.resample))

    def _normalise(self, crops, into):
        """uint8 `(R, H, W, 3)` to normalised float32 `(R, 3, H, W)`:
        a crop at a time, so that it stays in the cache.
        """
        mean, deviation = (
            np.asarray(values, dtype=np.float32)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        multiplier = (self.image_processor.rescale_factor / deviation).astype(np.float32)
        for crop, pixels in zip(crops, into[: len(crops)], strict=True):  # the rest of `into` is padding
            np.multiply(crop.transpose(2, 0, 1), multiplier, out=pixels)
            pixels -= mean / deviation


def check_boxes(boxes, scores, image_size, sample, max_regions=None):
    """Validate one image's boxes; no box becomes the whole image.

    Args:
        boxes (array-like of shape `(R, 4)` or None): xyxy, absolute pixels.
        scores (array-like of shape `(R,)` or None): In [0, 1].
        image_size (`tuple`): `(width, height)`.
        sample (`int`): Index of the image, for messages.
        max_regions (`int`, *optional*): Keep the best-scored so many, in their given order.

    Returns:
        `tuple`: `boxes (R, 4)` and `scores (R,)`, float32, R >= 1.

    Raises:
        ValueError: Naming sample and box, what was expected and what came.

    Example:
        >>> check_boxes(None, None, (8, 6), sample=0)[0].tolist()
        [[0.0, 0.0, 8.0, 6.0]]
    """
    width, height = image_size
    boxes = np.zeros((0, 4), np.float32) if boxes is None else np.asarray(boxes, dtype=np.float32)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes of sample {sample}: expected shape (R, 4), got {boxes.shape}.")
    scores = np.ones(len(boxes), np.float32) if scores is None else np.asarray(scores, dtype=np.float32)
    if scores.shape != (len(boxes),):
        raise ValueError(f"box_scores of sample {sample}: expected shape ({len(boxes)},), got {scores.shape}.")
    if len(boxes) == 0:
        return np.array([[0, 0, width, height]], np.float32), np.ones(1, np.float32)
    x1, y1, x2, y2 = boxes.T
    in_range = (scores >= 0) & (scores <= 1)
    problems = (
        (~np.isfinite(boxes).all(axis=1), "four finite numbers", boxes),
        ((x2 <= x1) | (y2 <= y1), "x1 < x2 and y1 < y2", boxes),
        ((x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height), f"a box inside the {width} x {height} image", boxes),
        (~in_range, "a score in [0, 1]", scores),
    )
    for bad, expected, given in problems:
        if bad.any():
            box = int(bad.argmax())
            raise ValueError(f"box {box} of sample {sample}: expected {expected}, got {given[box].tolist()}.")
    if max_regions is not None and len(boxes) > max_regions:
        if max_regions < 1:
            raise ValueError(f"max_regions: expected at least 1, got {max_regions}.")
        kept = np.sort(np.argsort(-scores, kind="stable")[:max_regions])
        boxes, scores = boxes[kept], scores[kept]
    return boxes, scores


def lay_over_white(image):
    """An image in RGB, transparent pixels over white: what transformers' image processors do, and PIL's own conversion
    does not.

    Args:
        image (`PIL.Image`): Any mode.

    Returns:
        `PIL.Image`: RGB.
    """
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = image.copy()
    white.paste((255, 255, 255, 255), (0, 0, *image.size))
    white.alpha_composite(image)
    return white.convert("RGB")


def crop_boxes(image, boxes, size, resample=PILImageResampling.BICUBIC):
    """Cut boxes out of an image and resize each to `size`, not keeping its aspect.

    Args:
        image (`PIL.Image`): Any mode; read as RGB, transparent pixels as white.
        boxes (`np.ndarray` of shape `(R, 4)`): xyxy inside the image; rounded to whole pixels, at least one each way.
        size (`tuple`): `(width, height)` of a crop.
        resample (`int`, *optional*): A PIL filter. No pixel outside the box enters it.

    Returns:
        `np.ndarray` of shape `(R, height, width, 3)`: uint8.
    """
    image = lay_over_white(image)
    corners = np.rint(boxes).astype(int)
    limits = np.array(image.size)
    top_left = np.minimum(corners[:, :2], limits - 1)
    bottom_right = np.maximum(corners[:, 2:], top_left + 1)
    crops = np.empty((len(boxes), size[1], size[0], 3), dtype=np.uint8)
    for index, (start, end) in enumerate(zip(top_left, bottom_right, strict=True)):
        crops[index] = np.asarray(image.crop((*start, *end)).resize(size, resample))
    return crops


def _settings(image_processor):
    """An image processor's fields without those that name its class."""
    named = ("image_processor_type", "processor_class", "auto_map")
    return {name: value for name, value in image_processor.to_dict().items() if name not in named}


DCLIPProcessor.register_for_auto_class()
DCLIPTeacherProcessor.register_for_auto_class()
