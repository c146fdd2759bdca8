"""Augmentations as numbers: drawn once, stored beside the image, replayed pixel for pixel.

A reinforced dataset stores the teachers' embeddings of an augmented image, but not the augmented image itself:
training makes the same pixels again from the stored numbers. One augmentation is a random resized crop and
RandAugment. Both equal torchvision's for PIL images, and need only PIL.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from modeling_dclip.data.specs import Range

MAGNITUDE_BINS = 31  # of RandAugment; a magnitude is the number of a bin
CROP_ATTEMPTS = 10  # then the crop is at the centre, as in torchvision


@dataclass(frozen=True)
class AugmentationSettings:
    """The ranges that augmentations are drawn from. The defaults are torchvision's.

    Source: [MC] reinforced training; docs/papers.md, reinforced data. Deviation: none.

    Args:
        image_size (`int`): Side S in pixels of the augmented image; shifts are drawn as shares of it.
        scale (`tuple[float, float]`, *optional*, defaults to (0.08, 1.0)): Share of the area a crop keeps, from and
            to, in (0, 1].
        ratio (`tuple[float, float]`, *optional*, defaults to (3/4, 4/3)): Width over height of a crop, from and to.
        num_operations (`int`, *optional*, defaults to 2): Of RandAugment, one after the other; 0 leaves the crop as it
            is.
        magnitude (`int`, *optional*, defaults to 9): Of RandAugment, 0 to 30.

    Raises:
        ValueError: If a number is out of its range.
    """

    image_size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    num_operations: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        Range(1, 2**13, whole=True).check(self.image_size, "image_size")
        Range(0, 100, whole=True).check(self.num_operations, "num_operations")
        Range(0, MAGNITUDE_BINS - 1, whole=True).check(self.magnitude, "magnitude")
        for name, most in (("scale", 1), ("ratio", 1000)):
            first, last = getattr(self, name)
            if not 0 < first <= last <= most:
                raise ValueError(
                    f"{name}: expected two numbers above 0 and up to {most}, the smaller first, got {first}, {last}."
                )


class StoredAugmentation(NamedTuple):
    """One augmentation.

    Args:
        crop (`tuple[int, int, int, int]`): Top, left, height and width in pixels of the stored image.
        operations (`tuple[tuple[int, float] | None, ...]`): Index into [`OPERATIONS`] and magnitude, in the order they
            are applied; `None` where one was skipped.
    """

    crop: tuple[int, int, int, int]
    operations: tuple[tuple[int, float] | None, ...]

    @classmethod
    def decode(cls, stored: Any) -> "StoredAugmentation":
        """Read an augmentation from JSON: `[[top, left, height, width], [[index, magnitude] or null, ...]]`.

        Raises:
            ValueError: If it has another form, a crop without area, an unknown operation, or a magnitude the operation
                cannot take.
        """
        if not isinstance(stored, Sequence) or len(stored) != 2 or not _numbers(stored[0], 4):
            raise ValueError(f"expected [[top, left, height, width], operations], got {stored!r}")
        top, left, height, width = (int(number) for number in stored[0])
        crop = (top, left, height, width)
        if list(crop) != list(stored[0]) or min(top, left) < 0 or min(height, width) < 1:
            raise ValueError(
                f"expected a crop [top, left, height, width] in whole pixels with an area, got {stored[0]!r}"
            )
        operations = [] if stored[1] is None else stored[1]
        if not isinstance(operations, (list, tuple)):
            raise ValueError(f"expected a list of operations, or null, got {operations!r}")
        wrong = [one for one in operations if one is not None and not _is_operation(one)]
        if wrong:
            raise ValueError(
                f"expected operations [index, magnitude] with an index below {len(OPERATIONS)} and a finite "
                f"magnitude, or null, got {wrong[0]!r}"
            )
        return cls(crop, tuple(None if one is None else (int(one[0]), float(one[1])) for one in operations))

    def encode(self) -> list:
        """The JSON form, which [`decode`] reads."""
        return [list(self.crop), [None if one is None else list(one) for one in self.operations]]


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == count
        and all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in value)
    )


def _is_operation(value: Any) -> bool:
    if not _numbers(value, 2) or value[0] != int(value[0]) or not 0 <= value[0] < len(OPERATIONS):
        return False
    return OPERATIONS[int(value[0])].name != "Posterize" or 0 <= int(value[1]) <= 8


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
    """Where each output pixel comes from: `(a, b, c, d, e, f)`, x = a x' + b y' + c and y = d x' + e y' + f.

    Black outside.
    """
    return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)


def _shear_x(image: Image.Image, magnitude: float) -> Image.Image:
    # To degrees and back, as torchvision does: the last bit decides which of two pixels is the nearest.
    angle = math.radians(math.degrees(math.atan(magnitude)))
    return _affine(image, 1.0, math.tan(angle), 0.0, 0.0, 1.0, 0.0)


def _shear_y(image: Image.Image, magnitude: float) -> Image.Image:
    angle = math.radians(math.degrees(math.atan(magnitude)))
    return _affine(image, 1.0, 0.0, 0.0, math.sin(angle) / math.cos(angle), 1.0, 0.0)


def _enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, magnitude: kind(image).enhance(1.0 + magnitude)


class Operation(NamedTuple):
    """One operation of RandAugment.

    Args:
        name (`str`): torchvision's.
        apply (`Callable`): From an RGB image and a magnitude to an image of the same size.
        magnitude (`Callable`): From the strength in [0, 1] and the image's side to the magnitude.
        signed (`bool`): Whether the magnitude's sign is drawn.
    """

    name: str
    apply: Callable[[Image.Image, float], Image.Image]
    magnitude: Callable[[float, int], float]
    signed: bool


OPERATIONS = (
    Operation("Identity", lambda image, _: image, lambda strength, side: 0.0, False),
    Operation("ShearX", _shear_x, lambda strength, side: 0.3 * strength, True),
    Operation("ShearY", _shear_y, lambda strength, side: 0.3 * strength, True),
    Operation(
        "TranslateX",
        lambda image, pixels: _affine(image, 1.0, 0.0, -int(pixels), 0.0, 1.0, 0.0),
        lambda strength, side: 150 / 331 * side * strength,
        True,
    ),
    Operation(
        "TranslateY",
        lambda image, pixels: _affine(image, 1.0, 0.0, 0.0, 0.0, 1.0, -int(pixels)),
        lambda strength, side: 150 / 331 * side * strength,
        True,
    ),
    Operation(
        "Rotate",
        lambda image, degrees: image.rotate(degrees, Image.Resampling.NEAREST),
        lambda strength, side: 30.0 * strength,
        True,
    ),
    Operation("Brightness", _enhance(ImageEnhance.Brightness), lambda strength, side: 0.9 * strength, True),
    Operation("Color", _enhance(ImageEnhance.Color), lambda strength, side: 0.9 * strength, True),
    Operation("Contrast", _enhance(ImageEnhance.Contrast), lambda strength, side: 0.9 * strength, True),
    Operation("Sharpness", _enhance(ImageEnhance.Sharpness), lambda strength, side: 0.9 * strength, True),
    Operation(
        "Posterize",
        lambda image, bits: ImageOps.posterize(image, int(bits)),
        lambda strength, side: 8.0 - round(4 * strength),
        False,
    ),
    Operation(
        "Solarize",
        lambda image, threshold: ImageOps.solarize(image, threshold),  # type: ignore[arg-type]  # a share of 255
        lambda strength, side: 255.0 * (1 - strength),
        False,
    ),
    Operation("AutoContrast", lambda image, _: ImageOps.autocontrast(image), lambda strength, side: 0.0, False),
    Operation("Equalize", lambda image, _: ImageOps.equalize(image), lambda strength, side: 0.0, False),
)


def _draw_crop(rng: random.Random, size: tuple[int, int], settings: AugmentationSettings) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*settings.scale)
        ratio = math.exp(rng.uniform(*map(math.log, settings.ratio)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = rng.randint(0, height - crop_height), rng.randint(0, width - crop_width)
            return top, left, crop_height, crop_width
    # As large as the ratio allows, from the centre.
    crop_width = min(width, max(1, round(height * settings.ratio[1])))
    crop_height = min(height, max(1, round(width / settings.ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def draw_augmentation(
    seed: int, image_id: str, index: int, size: tuple[int, int], settings: AugmentationSettings
) -> StoredAugmentation:
    """Draw one augmentation, a pure function of its arguments.

    Args:
        seed (`int`): Another seed is another draw.
        image_id (`str`): Of the image.
        index (`int`): Which of the image's augmentations.
        size (`tuple[int, int]`): Width and height of the stored image in pixels.
        settings ([`AugmentationSettings`]): What to draw from.

    Returns:
        [`StoredAugmentation`].

    Example:
        >>> settings = AugmentationSettings(image_size=32)
        >>> draw_augmentation(0, "a", 0, (64, 48), settings) == draw_augmentation(0, "a", 0, (64, 48), settings)
        True
    """
    rng = random.Random(f"augmentation/{seed}/{image_id}/{index}")
    crop = _draw_crop(rng, size, settings)
    operations = []
    for _ in range(settings.num_operations):
        number = rng.randrange(len(OPERATIONS))
        operation = OPERATIONS[number]
        magnitude = operation.magnitude(settings.magnitude / (MAGNITUDE_BINS - 1), settings.image_size)
        operations.append((number, -magnitude if operation.signed and rng.random() < 0.5 else magnitude))
    return StoredAugmentation(crop, tuple(operations))


def replay_augmentation(image: Image.Image, augmentation: StoredAugmentation, image_size: int) -> Image.Image:
    """Make the augmented image: cut, resize bicubically (antialiased), then apply the operations, nearest pixel and
    black outside.

    Args:
        image (`PIL.Image`): The stored image, RGB, in its own size.
        augmentation ([`StoredAugmentation`]): What was drawn for it.
        image_size (`int`): Side S in pixels. Only at the size it was drawn for is the augmented image the one the
            teachers saw.

    Returns:
        `PIL.Image`: RGB, S x S.

    Raises:
        ValueError: If the crop reaches out of the image: then it is not the image the augmentation was drawn for.
    """
    top, left, height, width = augmentation.crop
    if left + width > image.width or top + height > image.height:
        raise ValueError(
            f"expected a crop inside the image of {image.width} x {image.height} pixels, got top {top}, left {left}, "
            f"height {height}, width {width}; was the image resized after its augmentations were drawn?"
        )
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    for operation in augmentation.operations:
        if operation is not None:
            number, magnitude = operation
            image = OPERATIONS[number].apply(image, magnitude)
    return image


def normalise_pixels(image: Image.Image, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """An RGB image as float32 `(3, H, W)`: in [0, 1], less `mean (3, 1, 1)`, by `deviation (3, 1, 1)`."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div_(255).sub_(mean).div_(deviation)
