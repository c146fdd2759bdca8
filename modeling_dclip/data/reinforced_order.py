"""In which order the samples of a reinforced dataset come: a pure function of seed, epoch and process."""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from modeling_dclip.data.reinforced_shards import DamagedSampleError, SamplePlace, scan_shard

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
                f"Expected shuffle_buffer >= 0 and 0 <= process_index < num_processes, got {shuffle_buffer}, {process_index} and "
                f"{num_processes}."
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
        """Where this process's samples are, without end, each with the number of times the data were gone through before.

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
                    f"Expected a sample for process {self.process_index} of {self.num_processes} in {len(shards)} shards ({names}...), got none."
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
