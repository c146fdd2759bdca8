"""What training sees of a stored sample: one augmentation replayed, one caption, one synthetic caption, what the teachers said of each."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from modeling_dclip.data.reinforced_samples import Sample, open_image
from modeling_dclip.data.reinforced_shards import DamagedSampleError, SamplePlace
from modeling_dclip.data.stored_augmentations import StoredAugmentation, normalise_pixels, replay_augmentation


class SampleDraw:
    """Draws from samples.

    Args:
        image_size (`int`): Side S in pixels.
        teacher_widths (`Sequence[int]`): Width of each teacher's slice; W in all.
        image_mean, image_std (`Sequence[float]`): Of each colour.
        synthetic_captions (`bool`): Whether to draw one.
    """

    def __init__(
        self,
        image_size: int,
        teacher_widths: Sequence[int],
        image_mean: Sequence[float],
        image_std: Sequence[float],
        synthetic_captions: bool,
    ):
        self.image_size, self.teacher_widths, self.synthetic_captions = (
            image_size,
            tuple(teacher_widths),
            synthetic_captions,
        )
        self.mean, self.deviation = (torch.tensor(values).view(-1, 1, 1) for values in (image_mean, image_std))

    def __call__(self, sample: Sample, place: SamplePlace, lot: str) -> dict[str, Any]:
        """Draw once.

        Args:
            sample ([`Sample`]): As it is stored.
            place ([`SamplePlace`]): Where from: for its key, and for messages.
            lot (`str`): With the key it decides the draw, and nothing else does.

        Returns:
            `dict`: `key` (`str`), `caption` (`str`), `pixel_values (3, S, S)`, `teacher_image_embeds (W,)`,
            `teacher_text_embeds (W,)`, and with synthetic captions `synthetic_caption` (`str`) and
            `teacher_synthetic_text_embeds (W,)`; all float32, each teacher's slice L2-normalised.

        Raises:
            DamagedSampleError: If the image or the augmentation cannot be used, a teacher's embedding has no direction, or there is no
                synthetic caption.
        """
        rng = random.Random(f"sample/{lot}/{place.key}")
        number = rng.randrange(len(sample.augmentations))
        caption = rng.randrange(len(sample.captions))
        drawn = {
            "key": place.key,
            "pixel_values": self._augment(sample, place, number),
            "caption": sample.captions[caption],
            "teacher_image_embeds": self._normalise(sample.image_embeds[number], place),
            "teacher_text_embeds": self._normalise(sample.text_embeds[caption], place),
        }
        if self.synthetic_captions:
            if not sample.synthetic_captions:
                problem = "expected synthetic captions, got none (synthetic_captions=False reads without)"
                raise DamagedSampleError.at(place.shard, problem, place.key, "syn.json")
            chosen = rng.randrange(len(sample.synthetic_captions))
            embeds = sample.text_embeds[len(sample.captions) + chosen]
            drawn["synthetic_caption"] = sample.synthetic_captions[chosen]
            drawn["teacher_synthetic_text_embeds"] = self._normalise(embeds, place)
        return drawn

    def _augment(self, sample: Sample, place: SamplePlace, number: int) -> torch.Tensor:
        member = "paug.json"
        try:
            augmentation = StoredAugmentation.decode(sample.augmentations[number])
            member = sample.image_member
            image = open_image(sample.image)
            member = "paug.json"
            image = replay_augmentation(image, augmentation, self.image_size)
        except ValueError as error:
            raise DamagedSampleError.at(place.shard, f"augmentation {number}: {error}", place.key, member) from error
        return normalise_pixels(image, self.mean, self.deviation)

    def _normalise(self, embeds: torch.Tensor, place: SamplePlace) -> torch.Tensor:
        slices = embeds.float().split(self.teacher_widths)
        lengths = [float(one.norm()) for one in slices]
        if min(lengths) == 0:
            problem = f"expected a direction from every teacher, got embeddings of lengths {lengths}"
            raise DamagedSampleError.at(place.shard, problem, place.key, "npz" if "npz" in place.members else "pth.gz")
        return torch.cat([one / length for one, length in zip(slices, lengths, strict=True)])
