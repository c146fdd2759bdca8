"""Reinforced datasets: images and captions with what strong teachers said of them, read in DataCompDR's format.

    python -m modeling_dclip.data.reinforced --dataset SPEC --teachers A,B --augmentations 10 --output FOLDER

writes one ([`~modeling_dclip.data.reinforced.writer.write_reinforced`]); the classes here read it, or shards others
wrote.

An epoch is a fixed number of samples. Which samples, in which order and with which draws, is a pure function of seed,
epoch and the process's place among the others: not of the number of `DataLoader` workers, nor of how often the run
was resumed. Where damaged samples are skipped, each worker fills the gaps from its own share, so that there the number
of workers decides too.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch.utils.data import IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_dclip.data.images import open_image
from modeling_dclip.data.reinforced.augmentations import StoredAugmentation, normalise_pixels, replay_augmentation
from modeling_dclip.data.reinforced.shards import (
    SYNTHETIC_KEYS,
    DamagedSampleError,
    Sample,
    SamplePlace,
    SampleReader,
    find_shards,
    scan_shard,
)
from modeling_dclip.encoders.fingerprints import combine_keys

logger = logging.getLogger(__name__)

FIRST_REPORTS = 10  # damaged samples named in the log; then one of so many


class DamageReport:
    """What is done about damage: raise it, or count it and name it in the log.

    Args:
        on_bad_sample (`str`): `"raise"` or `"skip"`.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, on_bad_sample: Literal["raise", "skip"]):
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f"Expected on_bad_sample to be 'raise' or 'skip', got {on_bad_sample!r}.")
        self.on_bad_sample = on_bad_sample
        self.skipped: Counter[str] = Counter()

    def __call__(self, error: DamagedSampleError) -> None:
        """Raise the error, or count it."""
        if self.on_bad_sample == "raise":
            raise error
        self.skipped[error.shard.name] += 1
        total = self.skipped.total()
        if total <= FIRST_REPORTS or total % FIRST_REPORTS == 0:
            logger.warning("Left out, number %d: %s", total, error)


class SampleOrder:
    """Deals shards out to processes and shuffles.

    Args:
        shards (`Sequence[Path]`): The tar files.
        samples_of (`Mapping[Path, int]`): How many samples an index says a shard has; maybe of none.
        seed (`int`): Another seed is another order.
        shuffle_buffer (`int`): Samples among which the next is drawn; 0 keeps the order of the files.
        process_index, num_processes (`int`): Whose share.
        report ([`DamageReport`]): Told of damaged shards.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        samples_of: Mapping[Path, int],
        *,
        seed: int,
        shuffle_buffer: int,
        process_index: int,
        num_processes: int,
        report: DamageReport,
    ):
        if shuffle_buffer < 0 or not 0 <= process_index < num_processes:
            raise ValueError(
                f"Expected shuffle_buffer >= 0 and 0 <= process_index < num_processes, got {shuffle_buffer}, "
                f"{process_index} and {num_processes}."
            )
        self.shards, self.samples_of, self.report = list(shards), dict(samples_of), report
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self.process_index, self.num_processes = process_index, num_processes

    def count(self) -> int:
        """Samples of all shards, by the tars' headers."""
        progress = tqdm(self.shards, desc="Counting samples", unit="shard")
        number = sum(1 for shard in progress for _ in self._scan(shard))
        self.report.skipped.clear()  # they are met again
        return number

    def places(self, epoch: int) -> Iterator[tuple[int, SamplePlace]]:
        """Where this process's samples are, without end, each with the number of times the data were gone through
        before.

        Raises:
            ValueError: If there are none for this process.
        """
        for lap in itertools.count():
            shards, found = list(self.shards), False
            if self.shuffle_buffer:
                random.Random(f"shards/{self.seed}/{epoch}/{lap}").shuffle(shards)
            by_shard = len(shards) >= self.num_processes
            mine = slice(self.process_index, None, self.num_processes)
            places = itertools.chain.from_iterable(map(self._scan, shards[mine] if by_shard else shards))
            if not by_shard:
                places = itertools.islice(places, mine.start, None, mine.step)
            for place in self._shuffled(places, random.Random(f"order/{self.seed}/{epoch}/{lap}")):
                found = True
                yield lap, place
            if not found:
                names = ", ".join(f"'{path}'" for path in self.shards[:3])
                raise ValueError(
                    f"Expected a sample for process {self.process_index} of {self.num_processes} in {len(shards)} "
                    f"shards ({names}...), got none."
                )

    def _shuffled(self, places: Iterator[SamplePlace], rng: random.Random) -> Iterator[SamplePlace]:
        buffer = list(itertools.islice(places, self.shuffle_buffer))
        for place in places:
            if not buffer:
                yield place
                continue
            chosen = rng.randrange(len(buffer))
            yield buffer[chosen]
            buffer[chosen] = place
        rng.shuffle(buffer)
        yield from buffer

    def _scan(self, shard: Path) -> Iterator[SamplePlace]:
        count = 0
        try:
            for place in scan_shard(shard):
                count += 1
                yield place
            expected = self.samples_of.get(shard, count)
            if count != expected:
                raise DamagedSampleError.at(shard, f"expected {expected} samples as the index says, got {count}")
        except DamagedSampleError as error:
            self.report(error)


# What training sees of a stored sample: one augmentation replayed, one caption, one synthetic caption, what the
# teachers said of each.


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
            DamagedSampleError: If the image or the augmentation cannot be used, a teacher's embedding has no
                direction, or there is no synthetic caption.
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


class ReinforcedDataset(IterableDataset):
    """Samples of a reinforced dataset: of each, one stored augmentation, one caption and one synthetic caption.

    Shards are dealt out to the processes anew each epoch; where there are fewer shards than processes, their samples
    are. One process sees every sample once an epoch; of several, one whose shards hold fewer samples than its share of
    the epoch goes through them again. Samples are shuffled by their places in the files, so a large buffer costs
    little memory. What it gives is said in [`~modeling_dclip.data.reinforced.SampleDraw`].

    Source: [MC] reinforced training; docs/papers.md, reinforced data. Deviation: none.

    Args:
        shards (`str` or `Path`): A folder, a tar file or a pattern (see
            [`~modeling_dclip.data.reinforced.shards.find_shards`]).
        image_size (`int`, *optional*): Side S in pixels. Defaults to the size the teachers' augmentations had, if the
            folder has an index.
        teacher_widths (`Sequence[int]`, *optional*): Width of each teacher's slice of an embedding. Defaults to the
            index's.
        image_mean, image_std (`Sequence[float]`, *optional*): Of each colour. Default to CLIP's.
        synthetic_captions (`bool`, *optional*): Whether a sample shows one. Defaults to whether the index says there
            are any, and to `True` without an index.
        synthetic_keys (`str`, *optional*, defaults to `"syn_text.*"`): Regular expression of the keys that hold them.
        seed (`int`, *optional*, defaults to 0): Another seed is another order and other draws.
        shuffle_buffer (`int`, *optional*, defaults to 10000): Samples among which the next is drawn; 0 keeps the order
            of the files.
        samples_per_epoch (`int`, *optional*): Of all processes together; it may be more than there are. Defaults to
            all, which without an index are counted first.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out damaged shards and samples, names
            them in the log and counts them by shard in `skipped`; the next good sample takes the place.
        process_index, num_processes (`int`, *optional*): Default to Accelerate's.

    Raises:
        FileNotFoundError: If nothing is at `shards`.
        ValueError: If an argument is missing or out of range, or there is less than one sample a process. Iterating
            raises [`~modeling_dclip.data.reinforced.shards.DamagedSampleError`], a `ValueError`, for what is damaged.
    """

    block = 1  # samples given together; consecutive blocks go to consecutive workers

    def __init__(
        self,
        shards: str | Path,
        *,
        image_size: int | None = None,
        teacher_widths: Sequence[int] | None = None,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        synthetic_captions: bool | None = None,
        synthetic_keys: str = SYNTHETIC_KEYS,
        seed: int = 0,
        shuffle_buffer: int = 10000,
        samples_per_epoch: int | None = None,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        process_index: int | None = None,
        num_processes: int | None = None,
    ):
        paths, index = find_shards(shards)
        self.name, self.seed, self.synthetic_keys, self.index = str(shards), seed, synthetic_keys, index
        self.epoch, self.position, self.report = 0, 0, DamageReport(on_bad_sample)
        self.teacher_widths, size = self._shape(teacher_widths, image_size)
        if synthetic_captions is None:
            synthetic_captions = index is None or index["counts"]["synthetic_captions"] > 0
        self.synthetic_captions = synthetic_captions
        self.draw = SampleDraw(size, self.teacher_widths, image_mean, image_std, synthetic_captions)
        samples_of = (
            {} if index is None else {paths[0].parent / one["file"]: one["samples"] for one in index["shards"]}
        )
        self.order = SampleOrder(
            paths,
            samples_of,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
            process_index=PartialState().process_index if process_index is None else process_index,
            num_processes=PartialState().num_processes if num_processes is None else num_processes,
            report=self.report,
        )
        if samples_per_epoch is None:
            samples_per_epoch = sum(samples_of.values()) or self.order.count()
        self.samples_per_epoch = samples_per_epoch
        if len(self) < 1:
            raise ValueError(
                f"Expected at least {self.block} samples an epoch for each of {self.order.num_processes} processes, "
                f"got {samples_per_epoch} in all of '{self.name}'. Give more data, or lower the batch size or the "
                "number of processes."
            )

    def _shape(self, teacher_widths: Sequence[int] | None, image_size: int | None) -> tuple[tuple[int, ...], int]:
        """Widths of the teachers and side of the image, as given or as the index says."""
        stored = {} if self.index is None else self.index["settings"]
        teachers = [] if self.index is None else self.index["teachers"]
        widths = tuple(teacher_widths or (one["width"] for one in teachers))
        size = image_size or stored.get("image_size")
        if not size or not widths:
            raise ValueError(
                f"Expected image_size and teacher_widths, because '{self.name}' is no folder with an index, got "
                f"{image_size} and {teacher_widths}. The widths of DataCompDR's two ViT-L/14 are (768, 768)."
            )
        if size != stored.get("image_size", size):
            logger.warning(
                f"{self.name}: augmentations were drawn for {stored['image_size']} pixels and are replayed at {size}: "
                "shifts, which are in pixels, move another share of the image than the teachers saw."
            )
        return widths, size

    @property
    def skipped(self) -> dict[str, int]:
        """Damaged samples and shards left out so far, by the shard's name;
        in this process, and each time one was met.
        """
        return dict(self.report.skipped)

    @property
    def teacher_logit_scales(self) -> tuple[float, ...] | None:
        """Each teacher's trained `logit_scale` (a logarithm), if there is an index."""
        return None if self.index is None else tuple(one["logit_scale"] for one in self.index["teachers"])

    def __len__(self) -> int:
        """Blocks of an epoch, of this process."""
        return self.samples_per_epoch // self.order.num_processes // self.block

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for (sample,) in self._blocks():
            yield sample

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch from now on; from its start, unless it is the one that was resumed in."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def resume(self, epoch: int, given: int) -> None:
        """Go on in an epoch after so many samples (or batches) that this process was given.

        To be called before workers start; any number of them may follow. Only with `on_bad_sample="skip"` must it be
        the number it was, and what was given is read once more to learn what was skipped.
        """
        self.epoch, self.position = epoch, given

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is.

        Under a `DataLoader` with workers it is their copies that move: count, and use [`resume`].
        """
        ended = self.position >= len(self)
        return {"epoch": self.epoch + ended, "position": 0 if ended else self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where [`state_dict`] was taken, with the very samples that would have followed.

        Raises:
            ValueError: If the state is of other data or settings, so that other samples would follow.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"Expected a state with {name} = {value}, got {state[name]}: other samples would follow. Resume "
                    "with the data and settings the run began with, or start a new run."
                )
        self.resume(state["epoch"], state["position"])

    def _identity(self) -> dict[str, Any]:
        order = {name: getattr(self.order, name) for name in ("shuffle_buffer", "process_index", "num_processes")}
        settings = {"seed": self.seed, "block": self.block, "samples_per_epoch": self.samples_per_epoch}
        return settings | order | {"shards": combine_keys([path.name for path in self.order.shards])}

    def _blocks(self) -> Iterator[list[dict[str, Any]]]:
        """Of all blocks of this epoch those of this worker, from the position on."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        start = 0 if self.position >= len(self) else self.position
        worker = (start + worker) % workers  # the loader asks its first worker first: it gets what comes next
        given = len(range(worker, start, workers))
        reader = SampleReader(sum(self.teacher_widths), self.synthetic_keys)
        samples = self._samples(reader, worker, workers, given * self.block)
        try:
            for number in range(worker, len(self), workers)[given:]:
                block = list(itertools.islice(samples, self.block))
                self.position = number + 1
                yield block
        finally:
            reader.files.close()

    def _samples(self, reader: SampleReader, worker: int, workers: int, given: int) -> Iterator[dict[str, Any]]:
        """This worker's samples without end, after those that were given before."""
        current, good, bad = 0, 0, 0
        for number, (lap, place) in enumerate(self.order.places(self.epoch)):
            if number // self.block % workers != worker:
                continue
            if lap != current:
                if bad and not good:
                    raise ValueError(
                        f"Expected samples that can be read in '{self.name}', got {bad} damaged and no other."
                    )
                current, good, bad = lap, 0, 0
            if given and self.report.on_bad_sample == "raise":  # else which ones were given has to be found out again
                given -= 1
                continue
            try:
                sample = self.draw(reader.read(place), place, f"{self.seed}/{self.epoch}/{lap}")
            except DamagedSampleError as error:
                bad += 1
                self.report(error)
                continue
            good += 1
            if given:
                given -= 1
            else:
                yield sample


class ReinforcedBatches(ReinforcedDataset):
    """Batches of a reinforced dataset, to train a dual encoder from the teachers' embeddings.

    Give it to `DataLoader(batches, batch_size=None, num_workers=...)` as it is; it takes its share of several
    processes itself, so nothing else may split it (Accelerate's `prepare` would once more). A batch holds tensors
    only:

    | key | shape, type |
    |---|---|
    | `pixel_values` | `(B, 3, S, S)` float32, normalised |
    | `input_ids`, `attention_mask` | `(B, T)` int64, of a caption, cut at `max_length` keeping EOS; mask 1 is real |
    | `synthetic_input_ids`, `synthetic_attention_mask` | `(B, T')` int64, of a synthetic caption |
    | `teacher_image_embeds` | `(B, W)` float32, of the very augmentation in `pixel_values` |
    | `teacher_text_embeds` | `(B, W)` float32, of the caption |
    | `teacher_synthetic_text_embeds` | `(B, W)` float32, of the synthetic caption |

    W holds the teachers one after the other, each slice L2-normalised: `embeds.split(batches.teacher_widths, dim=-1)`.
    The three keys of the synthetic caption are there if `batches.synthetic_captions`.

    Args:
        shards (`str` or `Path`): As in [`ReinforcedDataset`].
        tokenizer (`CLIPTokenizer`): The student's.
        batch_size (`int`): B, of this process; every batch is full.
        max_length (`int`, *optional*): Tokens kept. Defaults to the tokenizer's `model_max_length`.
        options: Of [`ReinforcedDataset`].

    Raises:
        FileNotFoundError: If nothing is at `shards`.
        ValueError: As [`ReinforcedDataset`], or if there is less than one batch an epoch.
    """

    def __init__(
        self, shards: str | Path, tokenizer: Any, *, batch_size: int, max_length: int | None = None, **options: Any
    ):
        if batch_size < 1:
            raise ValueError(f"Expected a batch_size of at least 1, got {batch_size}.")
        self.tokenizer, self.block, self.max_length = tokenizer, batch_size, max_length or tokenizer.model_max_length
        super().__init__(shards, **options)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for samples in self._blocks():
            yield self.collate(samples)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these samples."""
        tensors = [name for name, value in samples[0].items() if isinstance(value, torch.Tensor)]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in tensors}
        texts = {"caption": ""} | ({"synthetic_caption": "synthetic_"} if self.synthetic_captions else {})
        for name, prefix in texts.items():
            tokens = self.tokenizer(
                [sample[name] for sample in samples],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            batch |= {f"{prefix}{key}": tokens[key] for key in ("input_ids", "attention_mask")}
        return batch
