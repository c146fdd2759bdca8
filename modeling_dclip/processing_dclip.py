"""Turn texts, images and boxes into what the student and the teacher read.

Preprocessing is pinned to PIL: the torchvision backend differs by 1 to 2 grey levels, which moves evaluation numbers.
Every picture becomes upright 8-bit RGB first ([`as_rgb`]), and of a very long one only what the centre crop keeps is
resized ([`cut_long`]).
"""

import struct
import zlib

import numpy as np
import torch
import transformers
from transformers import BatchFeature, CLIPImageProcessorPil, CLIPProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import PILImageResampling, is_pil_image
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .text_reading import READ_PADDING, longest_positions, prepare_tokenizer

logger = logging.get_logger(__name__)

# What PIL raises for damaged pictures, beside errors of its own. Its readers trust what a file says, so that nearly
# any error can come out of them.
DAMAGED = (
    OSError,  # a truncated file
    EOFError,
    SyntaxError,  # a bad chunk of a PNG
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,  # a number of the header that a table of the reader lacks
    ArithmeticError,  # a header with zeros or absurd sizes
    struct.error,  # odd EXIF values, a header that ends too early
    RuntimeError,  # AVIF; also NotImplementedError of DDS
    MemoryError,  # a size that this machine cannot hold
    zlib.error,
)
_ORIENTATION, _PHOTOMETRIC = 0x0112, 262  # tags of EXIF and TIFF
# What turns a picture of this EXIF orientation upright, as numbers of PIL's `Transpose`.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_VALUES_A_BLOCK = 2**20  # converted at a time, so that temporary arrays stay small
LONGEST_ASPECT = 50  # a picture more times as long as wide is cut before it is resized


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
        if image_processor is not None:
            image_processor = self._with_pil(image_processor)
        if tokenizer is not None:  # the tower counts places from the first token, and reads the end token
            tokenizer.padding_side = tokenizer.truncation_side = "right"
        super().__init__(image_processor, tokenizer, **kwargs)

    def _with_pil(self, image_processor):
        if isinstance(image_processor, CLIPImageProcessorPil):
            return image_processor
        return CLIPImageProcessorPil(**_settings(image_processor))

    def __call__(self, images=None, text=None, **kwargs):
        """Tokenize and preprocess.

        Args:
            images (`PIL.Image` or list, *optional*): Pictures of any mode ([`as_rgb`]), or arrays or tensors
                `(H, W)`, `(H, W, C)` or `(C, H, W)` of any type, whose values become 8 bits ([`eight_bits`]). With
                `do_rescale=False` arrays are taken as they are.
            text (`str` or `list[str]`, *optional*): Padded to the longest and truncated unless told otherwise.
            kwargs: As for [`~transformers.CLIPProcessor`].

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` for text, `pixel_values (B, 3, H, W)` for images.

        Raises:
            TypeError: If an image is a text: transformers would open it and lose what 16-bit and transparent pictures
                hold.
            ValueError: If what a picture or an array holds cannot be brought to 8 bits.
        """
        if images is not None:
            settings = {**_read_settings(self.image_processor), **kwargs, **kwargs.get("images_kwargs", {})}
            images = _prepare(images, settings)
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

    def to_dict(self):
        """As in transformers, without the name of this class.

        Where no name is stored, the kind of the model beside it decides: a stock CLIP is read with `CLIPProcessor`
        by whoever does not run our code. With a name that transformers lacks it would ask to run it.
        """
        fields = super().to_dict()
        del fields["processor_class"]
        return fields

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, and `preprocessor_config.json` too, which older readers and pipelines look for."""
        files = super().save_pretrained(save_directory, **kwargs)
        self.tokenizer._set_processor_class(
            None
        )  # again, without the name of this class, or of the one it was read with
        self.tokenizer.init_kwargs.pop("processor_class", None)
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)
        return files


class DCLIPTeacherProcessor(DCLIPProcessor):
    """Texts, images and boxes into the teacher's inputs: crops, resizes, normalises, pads and masks.

    A crop is the exact box, resized to the encoder's square without keeping its aspect. An image processor of another
    kind than CLIP's reads a crop as it reads a whole image. An image without a box has itself as its one region, with
    score 1.

    Source: docs/papers.md, crop. Deviation: crops are normalised with CLIP's mean and deviation; never a zero region.

    Args:
        image_processor (`BaseImageProcessor`, *optional*): Of the dual encoder; one of the torchvision backend is
            replaced by its PIL twin.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the dual encoder.
        model_type (`str`, *optional*): The family of a dual encoder that is no CLIP. Its texts are read as
            [`prepare_tokenizer`] and its padding say.
    """

    def __init__(self, image_processor=None, tokenizer=None, model_type=None, **kwargs):
        self.model_type = model_type
        if tokenizer is not None and model_type is not None:
            prepare_tokenizer(tokenizer, model_type)
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_dual_encoder(cls, processor, config):
        """The teacher's processor from that of the dual encoder that it is built around.

        Args:
            processor: Of any family, with `image_processor` and `tokenizer`. The tokenizer is changed in place: it
                reads no more tokens than the text encoder has places for.
            config (`PreTrainedConfig`): Of the dual encoder.

        Returns:
            [`DCLIPTeacherProcessor`]

        Raises:
            ValueError: If the processor lacks one half.

        Example:
            `DCLIPTeacherProcessor.from_dual_encoder(AutoProcessor.from_pretrained(path), teacher.config.clip_config)`
        """
        halves = [getattr(processor, name, None) for name in ("image_processor", "tokenizer")]
        if None in halves:
            lacking = "image_processor" if halves[0] is None else "tokenizer"
            raise ValueError(
                f"Expected a processor with image_processor and tokenizer, got {type(processor).__name__} without "
                f"{lacking}. Save both beside the weights."
            )
        if config.model_type in ("clip", "dclip"):
            return cls(*halves)
        tokenizer = halves[1]
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest_positions(config.text_config))
        return cls(*halves, model_type=config.model_type)

    def _with_pil(self, image_processor):
        if self.model_type is None or isinstance(image_processor, CLIPImageProcessorPil):
            return super()._with_pil(image_processor)
        twin = getattr(transformers, f"{type(image_processor).__name__}Pil", None)
        return image_processor if twin is None else twin(**_settings(image_processor))

    def __call__(
        self, images=None, text=None, boxes=None, box_scores=None, max_regions=None, return_tensors="pt", **kwargs
    ):
        """Prepare a batch.

        Args:
            images (`PIL.Image` or `list[PIL.Image]`, *optional*): B images of any size and mode.
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
            TypeError: If an image is none of PIL.
            ValueError: If counts differ, a box lies outside its image, is empty or not finite, or a score is not in
                [0, 1]. The message names sample and box.
        """
        if images is not None:
            images = [_as_picture(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
        elif boxes is not None or box_scores is not None:
            raise ValueError("boxes: expected the images they lie in, got images=None.")
        if text is not None and self.model_type is not None:
            padding = "max_length" if self.model_type in READ_PADDING else True
            options = {"padding": padding, "return_attention_mask": True, "return_token_type_ids": False}
            kwargs = options | kwargs
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
            self._read_crops(image, sample_boxes, into=pixels[sample])
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
        if self._squashes:
            size = self.image_processor.crop_size
            return size["height"], size["width"]
        return self._read_whole([to_pil_image(np.zeros((3, 8, 8), np.uint8), do_rescale=False)]).shape[-2:]

    @property
    def _squashes(self):
        return isinstance(self.image_processor, CLIPImageProcessorPil)

    def _read_whole(self, pictures):
        pictures = [cut_long(picture, self.image_processor) for picture in pictures]
        return np.asarray(self.image_processor(images=pictures, return_tensors="np")["pixel_values"])

    def _read_crops(self, image, boxes, into):
        """Normalised float32 `(R, 3, H, W)` of the boxes; the rest of `into` is padding."""
        if self._squashes:
            height, width = into.shape[-2:]
            self._normalise(crop_boxes(image, boxes, (width, height), self._resample), into)
        else:
            into[: len(boxes)] = self._read_whole(cut_boxes(image, boxes))

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
        sample (`int` or `str`): Index or name of the image, for messages.
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


def eight_bits(values, what="The picture", white=None):
    """Bring numbers of any kind to 8 bits, rounded.

    The scale is that of the type where it has one: uint8 as it is, bool 0 and 255, uint16 divided by 257. Other
    integers and floats say it by their largest value: up to 1 (floats only), up to 255, or up to 65535 is white.

    Args:
        values (`np.ndarray`): Any shape.
        what (`str`, *optional*): What messages call it.
        white (`int`, *optional*): The value that is white, where it is known.

    Returns:
        `np.ndarray`: uint8, of the same shape.

    Raises:
        ValueError: If a value is not finite, negative or above 65535; if it is no number; or if the picture would come
            out black, its mean below 1 of 255: then its scale is none of these.

    Example:
        >>> eight_bits(np.array([0, 257, 65535], np.uint16)).tolist(), eight_bits(np.array([0, 0.5, 1])).tolist()
        ([0, 1, 255], [0, 128, 255])
    """
    if values.dtype == np.uint8 or values.size == 0:
        return values.astype(np.uint8, copy=False)
    if values.dtype.kind not in "buif":
        raise ValueError(f"{what}: expected numbers, got {values.dtype}.")
    white = white or {"b": 1, "u": 65535 if values.dtype.itemsize == 2 else None}.get(values.dtype.kind)
    if white is None:
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 65535):
            raise ValueError(
                f"{what} holds values from {low:g} to {high:g}, expected 0 to 1, to 255 or to 65535. Save it with 8 "
                "or 16 bits."
            )
        white = 1 if high <= 1 and values.dtype.kind == "f" else 255 if high <= 255 else 65535
        if white > 1 and high > 1 and float(values.mean(dtype=np.float64)) < white / 255:
            raise ValueError(
                f"{what} holds values from {low:g} to {high:g} whose mean is {values.mean(dtype=np.float64):g}: on a "
                f"scale of 0 to {white} it would be black. Scale it, and save it with 8 or 16 bits."
            )
    flat, found = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, len(flat), _VALUES_A_BLOCK):
        part = flat[start : start + _VALUES_A_BLOCK].astype(np.float64)
        found[start : start + len(part)] = np.rint(part * (255 / white)).clip(0, 255)
    return found.reshape(values.shape)


def orientation_of(image):
    """The EXIF orientation of a picture. It is 1, upright, where EXIF cannot be read: odd metadata make no picture
    unreadable.
    """
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except DAMAGED:
        return 1


def load_whole(image):
    """Decode a picture that was opened, its transparent colour too.

    PIL brings a PNG's grey of 2 or 4 bits and colours of 16 bits to 8, but not the one that is transparent. How they
    are stored is known before decoding only.
    """
    tile, colour = getattr(image, "tile", None), image.info.get("transparency")
    packing = str(tile[0][3]) if image.format == "PNG" and tile else ""
    if packing in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[packing]
    elif packing == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    image.load()


def as_rgb(image, upright=True):
    """A picture in 8-bit RGB, whatever its mode, without losing what it holds.

    Transparent pixels are laid over white. 16-bit grey is divided by 257. 32-bit integers and floats have the scale
    that [`eight_bits`] finds; those of PNG and PPM files have 16 bits. PIL's own conversion cuts all of these at 255,
    and drops transparency.

    Args:
        image (`PIL.Image`): Any mode.
        upright (`bool`, *optional*, defaults to `True`): Turn it as its EXIF orientation says. A picture that was
            turned says so no more.

    Returns:
        `PIL.Image`: RGB, of EXIF orientation 1. The picture itself if nothing is to be done.

    Raises:
        ValueError: If it is on no scale of [`eight_bits`], or PIL cannot convert its mode.

    Example:
        >>> from PIL import Image
        >>> as_rgb(Image.new("I;16", (1, 1), 257 * 90)).getpixel((0, 0))
        (90, 90, 90)
    """
    load_whole(image)  # a TIFF turns itself here
    orientation = orientation_of(image)
    turn = _TURNS.get(orientation) if upright else None
    if image.mode == "RGB" and "transparency" not in image.info:
        rgb = image
    elif image.mode[0] in "IF":  # I, F, I;16 and its byte orders
        rgb = _grey_as_rgb(image)
    elif _is_transparent(image):
        rgb = _over_white(image.convert("LA") if image.mode == "La" else image)
    else:
        rgb = image.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    if orientation != 1 or "transparency" in rgb.info:  # or pictures made from this one would have it too
        rgb = rgb.copy() if rgb is image else rgb
        rgb.info = {name: value for name, value in rgb.info.items() if name not in _METADATA}
    return rgb


# Where PIL keeps an orientation; and a colour that a converted picture has no more.
_METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp", "transparency")


def _is_transparent(image):
    palette = getattr(image, "palette", None)
    return (
        image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
        or "transparency" in image.info
        or (image.mode == "P" and palette is not None and palette.mode.endswith("A"))
    )


def _over_white(image):
    """A picture with transparency over white, in RGB; a band at a time, as RGBA twice would take much memory."""
    rows = max(1, _VALUES_A_BLOCK // image.width)
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        layer = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = layer.copy()
        white.paste((255, 255, 255, 255), (0, 0, *layer.size))
        white.alpha_composite(layer)
        rgb[top : top + rows] = np.asarray(white.convert("RGB"))
    return to_pil_image(rgb, do_rescale=False, input_data_format="channels_last")


def _grey_as_rgb(image):
    """A picture of one channel with more than 8 bits in RGB."""
    values = np.asarray(image)
    is_known = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    grey = eight_bits(values, f"The picture of mode {image.mode}", white=65535 if is_known else None)
    if (
        getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    ):  # a TIFF whose white is 0, which PIL inverts in 8 bits only
        grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):  # of a PNG: the one value that is transparent
        grey = np.where(values == image.info["transparency"], np.uint8(255), grey)
    return to_pil_image(grey[None], do_rescale=False, input_data_format="channels_first").convert("RGB")


def _read_settings(image_processor):
    """What decides how an image processor resizes and crops."""
    names = ("do_resize", "size", "do_center_crop", "crop_size", "resample", "do_rescale", "backend")
    return {name: getattr(image_processor, name, None) for name in names}


def _edge(size, name):
    """A field of a size, which is a dict or an object of transformers; a plain number is the shortest edge."""
    if isinstance(size, int):
        return None if name == "longest_edge" else size
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)


def cut_long(image, image_processor):
    """Of a very long picture, cut out and resize what an image processor's centre crop will keep.

    An image processor that resizes the shortest edge makes a picture of 100,000 x 4 pixels 5,600,000 x 224 first, 3.8
    GB, and then cuts 224 x 224 out of it. Here only that part is resized, to the same pixels (one value in 5,000
    differs by a grey level, where a rounding is a tie). The image processor has nothing left to do but to rescale.
    Other pictures and other image processors are left alone.

    Args:
        image (`PIL.Image`): RGB.
        image_processor: Of transformers or alike, or a `dict` of its settings.

    Returns:
        `PIL.Image`: The picture itself unless it is [`LONGEST_ASPECT`] times as long as wide.

    Raises:
        ValueError: If it is longer and nothing of it would be cut away: its cost would have no bound.
    """
    settings = image_processor if isinstance(image_processor, dict) else _read_settings(image_processor)
    short, long = sorted(image.size)
    edge = _edge(settings["size"], "shortest_edge")
    if long <= LONGEST_ASPECT * short or edge is None or _edge(settings["size"], "longest_edge"):
        return image
    if settings["do_resize"] is False:
        return image
    lies = image.width == long
    crop = _edge(settings["crop_size"], "width" if lies else "height") if settings["do_center_crop"] else None
    if crop is None:
        raise ValueError(
            f"The picture has {image.width} x {image.height} pixels, more than {LONGEST_ASPECT} times as long as "
            "wide, and the image processor cuts nothing away. Cut it into pieces."
        )
    resized = int(edge * long / short)
    start = (resized - crop) // 2
    if settings["backend"] not in ("pil", None):  # torchvision's centre crop rounds
        start = int(round((resized - crop) / 2.0))
    more = max(0, -(-(edge - crop) // 2))  # so that the short edge stays the short one; cut again by the crop
    start, kept = start - more, crop + 2 * more
    scale = long / resized
    margin = int(4 * max(scale, 1)) + 1  # as far as the widest filter of PIL reaches
    first = max(0, int(start * scale) - margin)
    last = min(long, int((start + kept) * scale) + margin + 1)
    inner = (start * scale - first, (start + kept) * scale - first)  # inside the part: PIL's boxes are float32
    if lies:
        part, box, size = (first, 0, last, short), (inner[0], 0, inner[1], short), (kept, edge)
    else:
        part, box, size = (0, first, short, last), (0, inner[0], short, inner[1]), (edge, kept)
    resample = PILImageResampling.BILINEAR if settings["resample"] is None else int(settings["resample"])
    return image.crop(part).resize(size, resample, box=box)


def _as_picture(image):
    if not is_pil_image(image):
        raise TypeError(f"Expected pictures of PIL, got {type(image).__name__}. Open or convert it first.")
    return as_rgb(image)


def _prepare(images, settings):
    """Pictures in upright RGB, arrays and tensors in 8 bits; lists of them alike."""
    if isinstance(images, (list, tuple)):
        return [_prepare(one, settings) for one in images]
    if isinstance(images, (str, bytes)):
        raise TypeError(
            f"Expected a picture, got {type(images).__name__}: {images!r:.60}. Open it first, with PIL.Image.open, so "
            "that what 16-bit and transparent pictures hold is kept."
        )
    if is_pil_image(images):
        return cut_long(as_rgb(images), settings)
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = images.float().numpy() if images.is_floating_point() else images.numpy()
    if isinstance(images, np.ndarray):
        if images.size == 0:
            raise ValueError(f"Expected pixels, got an array of shape {images.shape}.")
        images = images[..., None] if images.ndim == 2 else images  # grey
        images = images if settings["do_rescale"] is False else eight_bits(images, "The array")
        if (
            images.dtype == np.uint8
            and images.ndim == 3
            and sorted(images.shape)[1] * LONGEST_ASPECT < max(images.shape)
        ):
            images = cut_long(to_pil_image(images, do_rescale=False), settings)
    return images


def cut_boxes(image, boxes):
    """Cut boxes out of an image.

    Args:
        image (`PIL.Image`): Any mode; read by [`as_rgb`].
        boxes (`np.ndarray` of shape `(R, 4)`): xyxy inside the image; rounded to whole pixels, at least one each way.

    Returns:
        `list[PIL.Image]`: R pictures, RGB.
    """
    image = as_rgb(image)
    corners = np.rint(boxes).astype(int)
    limits = np.array(image.size)
    top_left = np.minimum(corners[:, :2], limits - 1)
    bottom_right = np.maximum(corners[:, 2:], top_left + 1)
    return [image.crop((*start, *end)) for start, end in zip(top_left, bottom_right, strict=True)]


def crop_boxes(image, boxes, size, resample=PILImageResampling.BICUBIC):
    """Cut boxes out of an image and resize each to `size`, not keeping its aspect.

    Args:
        image (`PIL.Image`): Any mode; read by [`as_rgb`].
        boxes (`np.ndarray` of shape `(R, 4)`): As for [`cut_boxes`].
        size (`tuple`): `(width, height)` of a crop.
        resample (`int`, *optional*): A PIL filter. No pixel outside the box enters it.

    Returns:
        `np.ndarray` of shape `(R, height, width, 3)`: uint8.
    """
    crops = np.empty((len(boxes), size[1], size[0], 3), dtype=np.uint8)
    for index, crop in enumerate(cut_boxes(image, boxes)):
        crops[index] = np.asarray(crop.resize(size, resample))
    return crops


def _settings(image_processor):
    """An image processor's fields without those that name its class."""
    named = ("image_processor_type", "processor_class", "auto_map")
    return {name: value for name, value in image_processor.to_dict().items() if name not in named}


DCLIPProcessor.register_for_auto_class()
DCLIPTeacherProcessor.register_for_auto_class()
