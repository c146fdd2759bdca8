"""Reinforced datasets: images and captions stored with the embeddings of strong teachers, in DataCompDR's format.

    python -m modeling_dclip.data.reinforced --dataset SPEC --teachers A,B --augmentations 10 --output FOLDER

writes one ([`~modeling_dclip.data.reinforced.writer.write_reinforced`]). The classes here read it, and shards that
others wrote.

An epoch is a fixed number of samples. The samples, their order and their draws are a pure function of the seed, the
epoch and the process's place among the others. They do not depend on the number of `DataLoader` workers, nor on how
often the run was resumed. One exception: where damaged samples are skipped, each worker fills the gaps from its own
share, so the number of workers matters too.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch.utils.data import IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_dclip.data.collation import SharedNumbers
from modeling_dclip.data.images import UnreadableImageError, open_image
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
from modeling_dclip.data.specs import Range
from modeling_dclip.encoders.fingerprints import combine_keys
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

MOST_WORKERS = 256  # of a data loader
FIRST_REPORTS = 10  # the first damaged samples are named in the log, then every tenth


class DamageReport:
    """What to do about damage: raise the error, or count it and name it in the log.

    Args:
        on_bad_sample (`str`): `"raise"` or `"skip"`.

    Raises:
        ValueError: If `on_bad_sample` is neither.
    """

    def __init__(self, on_bad_sample: Literal["raise", "skip"]):
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f"Expected on_bad_sample to be 'raise' or 'skip', got {on_bad_sample!r}.")
        self.on_bad_sample = on_bad_sample
        self.skipped: Counter[str] = Counter()
        self._counts = SharedNumbers(1 + MOST_WORKERS)  # of this process, and of each worker

    @property
    def total(self) -> int:
        """What this process and its workers left out."""
        return self._counts.total()

    def clear(self) -> None:
        """Begin to count anew."""
        self.skipped.clear()
        self._counts.set(*[0] * (1 + MOST_WORKERS))

    def __call__(self, error: DamagedSampleError) -> None:
        """Raise the error, or count it."""
        if self.on_bad_sample == "raise":
            raise error
        worker = get_worker_info()
        self.skipped[error.shard.name] += 1
        self._counts.add_one(0 if worker is None else 1 + worker.id % MOST_WORKERS)
        total = self.total
        if total <= FIRST_REPORTS or total % FIRST_REPORTS == 0:
            logger.warning("Left out, number %d: %s", total, error)


@dataclass(frozen=True)
class ProcessShare:
    """Which process of a run reads.

    Args:
        process_index (`int`): Of this process, from 0.
        num_processes (`int`): Of the run.

    Raises:
        ValueError: If there is no such process.
    """

    process_index: int
    num_processes: int

    def __post_init__(self) -> None:
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(
                f"Expected 0 <= process_index < num_processes, got {self.process_index} and {self.num_processes}."
            )

    @classmethod
    def current(cls) -> "ProcessShare":
        """This process, as Accelerate counts processes."""
        state = PartialState()
        return cls(state.process_index, state.num_processes)


class SampleOrder:
    """Give each process its share of the shards, and shuffle the samples.

    Args:
        shards (`Sequence[Path]`): The tar files.
        samples_of (`Mapping[Path, int]`): The number of samples of a shard, where an index says it.
        seed (`int`): Another seed gives another order.
        shuffle_buffer (`int`): Samples among which the next is drawn; 0 keeps the order of the files.
        share ([`ProcessShare`]): Which process reads.
        report ([`DamageReport`]): Called with the error of a damaged shard.

    Raises:
        ValueError: If `shuffle_buffer` is negative.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        samples_of: Mapping[Path, int],
        *,
        seed: int,
        shuffle_buffer: int,
        share: ProcessShare,
        report: DamageReport,
    ):
        if shuffle_buffer < 0:
            raise ValueError(f"Expected shuffle_buffer >= 0, got {shuffle_buffer}.")
        self.shards, self.samples_of, self.report = list(shards), dict(samples_of), report
        self.seed, self.shuffle_buffer, self.share = seed, shuffle_buffer, share

    def count(self) -> int:
        """Count the samples of all shards by the headers of the tars."""
        progress = tqdm(self.shards, desc="Counting samples", unit="shard")
        number = sum(1 for shard in progress for _ in self._scan(shard))
        self.report.clear()  # reading meets them again and counts them then
        return number

    def places(self, epoch: int) -> Iterator[tuple[int, SamplePlace]]:
        """The places of this process's samples, without end.

        Yields:
            `tuple[int, SamplePlace]`: The lap (how often this process went through its samples before), and a place.

        Raises:
            ValueError: If this process has no sample.
        """
        index, processes = self.share.process_index, self.share.num_processes
        for lap in itertools.count():
            shards, found = list(self.shards), False
            if self.shuffle_buffer:
                random.Random(f"shards/{self.seed}/{epoch}/{lap}").shuffle(shards)
            if len(shards) >= processes:
                places = itertools.chain.from_iterable(map(self._scan, shards[index::processes]))
            else:  # too few shards: the processes share the samples of all
                places = itertools.chain.from_iterable(map(self._scan, shards))
                places = itertools.islice(places, index, None, processes)
            for place in self._shuffled(places, random.Random(f"order/{self.seed}/{epoch}/{lap}")):
                found = True
                yield lap, place
            if not found:
                names = ", ".join(f"'{path}'" for path in self.shards[:3])
                raise ValueError(
                    f"Expected a sample for process {index} of {processes} in {count_of(len(shards), 'shard')} "
                    f"({names}...), got none."
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
                raise DamagedSampleError.at(
                    shard, f"expected {count_of(expected, 'sample')} as the index says, got {count}"
                )
        except DamagedSampleError as error:
            self.report(error)


@dataclass(frozen=True)
class SampleView:
    """What training sees of a stored sample.

    Args:
        image_size (`int`, *optional*): Side S of the image in pixels. Defaults to the size of the teachers'
            augmentations, if the folder has an index.
        teacher_widths (`Sequence[int]`, *optional*): Width of each teacher's slice of an embedding, W in all. Defaults
            to the index's.
        image_mean, image_std (`Sequence[float]`, *optional*): Of each colour. Default to CLIP's.
        synthetic_captions (`bool`, *optional*): Whether to draw a synthetic caption. Defaults to whether the index
            counts any, and to `True` without an index.
        synthetic_keys (`str`, *optional*, defaults to `"syn_text.*"`): Regular expression of the keys that hold
            synthetic captions.
    """

    image_size: int | None = None
    teacher_widths: Sequence[int] | None = None
    image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN)
    image_std: Sequence[float] = tuple(OPENAI_CLIP_STD)
    synthetic_captions: bool | None = None
    synthetic_keys: str = SYNTHETIC_KEYS

    def completed(self, index: Mapping[str, Any] | None, name: str) -> "SampleView":
        """Fill in what is not given from the dataset's index.

        Args:
            index (`Mapping`, *optional*): As [`~modeling_dclip.data.reinforced.shards.find_shards`] returns it.
            name (`str`): The spec of the shards, for messages.

        Raises:
            ValueError: If `image_size` or `teacher_widths` is neither given nor in an index, or out of range.
        """
        stored = {} if index is None else index["settings"]
        teachers = [] if index is None else index["teachers"]
        widths = tuple(self.teacher_widths or (one["width"] for one in teachers))
        size, synthetic = self.image_size or stored.get("image_size"), self.synthetic_captions
        if not size or not widths:
            raise ValueError(
                f"Expected image_size and teacher_widths, because '{name}' is no folder with an index, got "
                f"{self.image_size} and {self.teacher_widths}. The widths of DataCompDR's two ViT-L/14 are (768, 768)."
            )
        Range(1, 2**13, whole=True).check(size, "image_size")
        for number in widths:
            Range(1, 2**16, whole=True).check(number, "teacher_widths")
        if size != stored.get("image_size", size):
            logger.warning(
                f"{name}: augmentations were drawn for {stored['image_size']} pixels and are replayed at {size}: "
                "shifts, which are in pixels, move another share of the image than the teachers saw."
            )
        if synthetic is None:
            synthetic = index is None or index["counts"]["synthetic_captions"] > 0
        return replace(self, image_size=size, teacher_widths=widths, synthetic_captions=synthetic)


class SampleDraw:
    """Draw one augmentation, one caption and one synthetic caption of a sample, with the teachers' embeddings.

    Args:
        view ([`SampleView`]): Completed.
    """

    def __init__(self, view: SampleView):
        self.view = view
        self.mean, self.deviation = (torch.tensor(v).view(-1, 1, 1) for v in (view.image_mean, view.image_std))

    def __call__(self, sample: Sample, place: SamplePlace, lot: str) -> dict[str, Any]:
        """Draw once.

        Args:
            sample ([`Sample`]): As stored.
            place ([`SamplePlace`]): Where it is stored; gives the key, and the place for messages.
            lot (`str`): The draw depends on the lot and the key alone.

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
        if self.view.synthetic_captions:
            if not sample.synthetic_captions:
                problem = "expected synthetic captions, got none (synthetic_captions=False reads without)"
                raise DamagedSampleError.at(place.shard, problem, place.key, "syn.json")
            chosen = rng.randrange(len(sample.synthetic_captions))
            embeds = sample.text_embeds[len(sample.captions) + chosen]
            drawn["synthetic_caption"] = sample.synthetic_captions[chosen]
            drawn["teacher_synthetic_text_embeds"] = self._normalise(embeds, place)
        return drawn

    def _augment(self, sample: Sample, place: SamplePlace, number: int) -> torch.Tensor:
        member = "paug.json"  # the member to name if the next step fails
        try:
            augmentation = StoredAugmentation.decode(sample.augmentations[number])
            member = sample.image_member
            image = open_image(sample.image, upright=False)
            member = "paug.json"
            image = replay_augmentation(image, augmentation, self.view.image_size)
        except ValueError as error:
            problem = str(error)
            if isinstance(error, UnreadableImageError):
                problem = f"expected an image, got {error.reason}"
            raise DamagedSampleError.at(place.shard, f"augmentation {number}: {problem}", place.key, member) from error
        return normalise_pixels(image, self.mean, self.deviation)

    def _normalise(self, embeds: torch.Tensor, place: SamplePlace) -> torch.Tensor:
        slices = embeds.float().split(self.view.teacher_widths)
        lengths = [float(one.norm()) for one in slices]
        if min(lengths) == 0:
            problem = f"expected a direction from every teacher, got embeddings of lengths {lengths}"
            raise DamagedSampleError.at(place.shard, problem, place.key, "npz" if "npz" in place.members else "pth.gz")
        return torch.cat([one / length for one, length in zip(slices, lengths, strict=True)])


class ReinforcedDataset(IterableDataset):
    """Samples of a reinforced dataset: of each, one stored augmentation, one caption and one synthetic caption.

    Each epoch shares the shards among the processes anew. With fewer shards than processes, the processes share the
    samples instead. A single process sees every sample once an epoch. Of several processes, one whose shards hold
    fewer samples than its share of the epoch reads them again. The shuffle buffer holds the samples' places in the
    files, not their content, so a large buffer costs little memory. [`SampleDraw`] says what a sample looks like.

    Source: [MC] reinforced training; docs/papers.md, reinforced data. Deviation: none.

    Args:
        shards (`str` or `Path`): A folder, a tar file or a pattern (see
            [`~modeling_dclip.data.reinforced.shards.find_shards`]).
        view ([`SampleView`], *optional*): What is seen of a sample.
        seed (`int`, *optional*, defaults to 0): Another seed gives another order and other draws.
        shuffle_buffer (`int`, *optional*, defaults to 10000): Samples among which the next is drawn; 0 keeps the order
            of the files.
        samples_per_epoch (`int`, *optional*): Of all processes together; it may be more than there are. Defaults to
            all, which without an index are counted first.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out damaged shards and samples, names
            them in the log and counts them by shard in `skipped`; the next good sample takes the place.
        share ([`ProcessShare`], *optional*): Which process reads. Defaults to Accelerate's.

    Raises:
        FileNotFoundError: If nothing is at `shards`.
        ValueError: If an argument is missing or out of range, or there is less than one sample for each process.
            Iterating raises [`~modeling_dclip.data.reinforced.shards.DamagedSampleError`], a `ValueError`, for what is
            damaged.
    """

    block = 1  # samples given together; consecutive blocks go to consecutive workers

    def __init__(
        self,
        shards: str | Path,
        view: SampleView | None = None,
        *,
        seed: int = 0,
        shuffle_buffer: int = 10000,
        samples_per_epoch: int | None = None,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        share: ProcessShare | None = None,
    ):
        paths, index = find_shards(shards)
        self.name, self.seed, self.index = str(shards), seed, index
        self._clock, self.report = SharedNumbers(2), DamageReport(on_bad_sample)
        self.view = (view or SampleView()).completed(index, self.name)
        self.draw = SampleDraw(self.view)
        samples_of = (
            {} if index is None else {paths[0].parent / one["file"]: one["samples"] for one in index["shards"]}
        )
        self.order = SampleOrder(
            paths,
            samples_of,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
            share=share or ProcessShare.current(),
            report=self.report,
        )
        if samples_per_epoch is None:
            samples_per_epoch = sum(samples_of.values()) or self.order.count()
        self.samples_per_epoch = samples_per_epoch
        if len(self) < 1:
            raise ValueError(
                f"Expected at least {count_of(self.block, 'sample')} an epoch for each of "
                f"{self.order.share.num_processes} processes, got {samples_per_epoch} in all of '{self.name}'. Give "
                "more data, or lower the batch size or the number of processes."
            )

    @property
    def teacher_widths(self) -> tuple[int, ...]:
        """Width of each teacher's slice of an embedding."""
        return tuple(self.view.teacher_widths)

    @property
    def synthetic_captions(self) -> bool:
        """Whether a sample shows a synthetic caption."""
        return bool(self.view.synthetic_captions)

    @property
    def skipped(self) -> dict[str, int]:
        """Damaged samples and shards left out by this process so far, by the shard's name, without its workers.

        A sample counts each time it is met.
        """
        return dict(self.report.skipped)

    @property
    def num_skipped(self) -> int:
        """Damaged samples and shards left out so far by this process and the workers of its data loader."""
        return self.report.total

    @property
    def teacher_logit_scales(self) -> tuple[float, ...] | None:
        """Each teacher's trained `logit_scale` (a logarithm), if there is an index."""
        return None if self.index is None else tuple(one["logit_scale"] for one in self.index["teachers"])

    def __len__(self) -> int:
        """Blocks of this process in an epoch."""
        return self.samples_per_epoch // self.order.share.num_processes // self.block

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for (sample,) in self._blocks():
            yield sample

    @property
    def epoch(self) -> int:
        """The epoch, from 0."""
        return self._clock.get(0)

    @property
    def position(self) -> int:
        """Samples, or batches, of this process that were given in the epoch. With workers it does not move."""
        return self._clock.get(1)

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch from now on, in the workers of a `DataLoader` too, also in those that outlive an epoch.

        Another epoch begins at its start; the resumed one keeps its position.
        """
        if epoch != self.epoch:
            self._clock.set(epoch, 0)

    def resume(self, epoch: int, given: int) -> None:
        """Go on in an epoch after the samples (or batches) that this process was given before.

        Call it before an epoch is read. The number of workers may change, except with `on_bad_sample="skip"`: there it
        must stay, and the samples given before are read once more to learn which were skipped.

        Args:
            epoch (`int`): The epoch.
            given (`int`): Samples, or batches, of this process in it.
        """
        self._clock.set(epoch, given)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is.

        With the workers of a `DataLoader` the position does not move. Count the batches there and call [`resume`].
        """
        ended = self.position >= len(self)
        return {"epoch": self.epoch + ended, "position": 0 if ended else self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where [`state_dict`] was taken, with exactly the samples that would have followed.

        Raises:
            ValueError: If the state comes from other data or settings, so that other samples would follow.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"Expected a state with {name} = {value}, got {state[name]}: other samples would follow. Resume "
                    "with the data and settings the run began with, or start a new run."
                )
        self.resume(state["epoch"], state["position"])

    def _identity(self) -> dict[str, Any]:
        settings = {"seed": self.seed, "block": self.block, "samples_per_epoch": self.samples_per_epoch}
        order = {"shuffle_buffer": self.order.shuffle_buffer, **asdict(self.order.share)}
        return settings | order | {"shards": combine_keys([path.name for path in self.order.shards])}

    def _blocks(self) -> Iterator[list[dict[str, Any]]]:
        """This worker's blocks of the epoch, from the position on."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, position = self.epoch, self.position
        start = 0 if position >= len(self) else position
        worker = (start + worker) % workers  # the loader asks its first worker first, so that one has the next block
        given = len(range(worker, start, workers))
        reader = SampleReader(sum(self.teacher_widths), self.view.synthetic_keys)
        samples = self._samples(reader, epoch, worker, workers, given * self.block)
        try:
            for number in range(worker, len(self), workers)[given:]:
                block = list(itertools.islice(samples, self.block))
                if info is None and epoch == self.epoch:
                    self._clock.set(epoch, number + 1)
                yield block
        finally:
            reader.files.close()

    def _samples(
        self, reader: SampleReader, epoch: int, worker: int, workers: int, given: int
    ) -> Iterator[dict[str, Any]]:
        """This worker's samples without end, after those that it was given before."""
        current, good, bad = 0, 0, 0
        for number, (lap, place) in enumerate(self.order.places(epoch)):
            if number // self.block % workers != worker:
                continue
            if lap != current:
                if bad and not good:
                    raise ValueError(
                        f"Expected samples that can be read in '{self.name}', got {bad} damaged and no other."
                    )
                current, good, bad = lap, 0, 0
            if given and self.report.on_bad_sample == "raise":  # no sample was skipped: the first ones were given
                given -= 1
                continue
            try:
                sample = self.draw(reader.read(place), place, f"{self.seed}/{epoch}/{lap}")
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

    Pass it to `DataLoader(batches, batch_size=None, num_workers=...)` directly. It takes the share of its process
    itself, so do not pass the loader to Accelerate's `prepare`, which would split it once more. A batch holds:

    | key | shape, type |
    |---|---|
    | `keys` | B texts: the samples' keys, for messages |
    | `pixel_values` | `(B, 3, S, S)` float32, normalised |
    | `input_ids`, `attention_mask` | `(B, T)` int64, of a caption, cut at `max_length` keeping EOS; mask 1 is real |
    | `synthetic_input_ids`, `synthetic_attention_mask` | `(B, T')` int64, of a synthetic caption |
    | `teacher_image_embeds` | `(B, W)` float32, of the augmentation in `pixel_values` |
    | `teacher_text_embeds` | `(B, W)` float32, of the caption |
    | `teacher_synthetic_text_embeds` | `(B, W)` float32, of the synthetic caption |

    W holds the teachers one after the other, each slice L2-normalised: `embeds.split(batches.teacher_widths, dim=-1)`.
    The three keys of the synthetic caption are present if `batches.synthetic_captions` is true.

    Args:
        shards (`str` or `Path`): As in [`ReinforcedDataset`].
        tokenizer (`CLIPTokenizer`): The student's.
        view ([`SampleView`], *optional*): What is seen of a sample.
        batch_size (`int`): B, of this process; every batch is full.
        max_length (`int`, *optional*): Tokens kept. Defaults to the tokenizer's `model_max_length`.
        options: `seed`, `shuffle_buffer`, `samples_per_epoch`, `on_bad_sample`, `share` of [`ReinforcedDataset`].

    Raises:
        FileNotFoundError: If nothing is at `shards`.
        ValueError: As in [`ReinforcedDataset`], or if an epoch has less than one batch.
    """

    def __init__(
        self,
        shards: str | Path,
        tokenizer: Any,
        view: SampleView | None = None,
        *,
        batch_size: int,
        max_length: int | None = None,
        **options: Any,
    ):
        if batch_size < 1:
            raise ValueError(f"Expected a batch_size of at least 1, got {batch_size}.")
        self.tokenizer, self.block, self.max_length = tokenizer, batch_size, max_length or tokenizer.model_max_length
        super().__init__(shards, view, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for samples in self._blocks():
            yield self.collate(samples)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these samples."""
        tensors = [name for name, value in samples[0].items() if isinstance(value, torch.Tensor)]
        batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in tensors}
        batch["keys"] = [sample["key"] for sample in samples]
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
