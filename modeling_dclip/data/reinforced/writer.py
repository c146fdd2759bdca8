"""Write a reinforced dataset: compute the teachers' embeddings of augmented images and captions once.

Each shard is written atomically, and holds a key of everything that made it. A run that was killed goes on at the
first shard that is missing or damaged. Several processes share the shards; one run at a time writes a folder.
`reinforced.json` beside the shards holds what a reader needs.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from modeling_dclip.data.collation import pass_batch
from modeling_dclip.data.columns import arrow_column, encoded_images, row_keys
from modeling_dclip.data.files import (
    LOCK_NAME,
    entry_names,
    holding,
    read_json,
    remove_leftovers,
    replacing,
    write_json,
)
from modeling_dclip.data.images import UnreadableImageError, open_image, read_header
from modeling_dclip.data.reinforced.augmentations import (
    AugmentationSettings,
    StoredAugmentation,
    draw_augmentation,
    replay_augmentation,
)
from modeling_dclip.data.reinforced.shards import (
    INDEX_NAME,
    DamagedSampleError,
    pack_sample,
    read_shard_fields,
    scan_shard,
    storable_image,
)
from modeling_dclip.data.reinforced.teachers import ReinforcementTeacher, TransformersCaptioner
from modeling_dclip.data.rows import require_rows
from modeling_dclip.encoders.fingerprints import combine_keys

TEXTS_PER_PASS = 256
IMAGES_PER_LOT = 16  # captioned together, whatever batch_size is, because the captioner's draws depend on the lot
_DTYPES = ("float16", "float32")


class _AugmentedImages(TorchDataset):
    """Every augmentation of every image, preprocessed for each teacher in the data loader's workers."""

    def __init__(
        self, images: Sequence[bytes], augmentations: list[list[StoredAugmentation]], size: int, preprocess: list
    ):
        self.images, self.augmentations, self.size, self.preprocess = images, augmentations, size, preprocess
        self.each = len(augmentations[0])

    def __len__(self) -> int:
        return len(self.images) * self.each

    def __getitems__(self, items: list[int]) -> list[torch.Tensor]:
        decoded = {row: open_image(self.images[row], upright=False) for row in {item // self.each for item in items}}
        augmented = [
            replay_augmentation(
                decoded[item // self.each], self.augmentations[item // self.each][item % self.each], self.size
            )
            for item in items
        ]
        return [preprocess(augmented) for preprocess in self.preprocess]


class ReinforcedRow(NamedTuple):
    """A row with everything that its sample stores.

    Args:
        image_id (`str`): Id of the row.
        image (`tuple[str, bytes]`): Kind and content, as stored.
        captions (`list[str]`): C captions.
        synthetic_captions (`list[str]`): S synthetic captions, maybe 0.
        augmentations (`list[StoredAugmentation]`): A augmentations.
        image_embeds (`np.ndarray` of shape `(A, W)`): Of the augmented images.
        text_embeds (`np.ndarray` of shape `(C + S, W)`): Of the captions, then of the synthetic captions.
    """

    image_id: str
    image: tuple[str, bytes]
    captions: list[str]
    synthetic_captions: list[str]
    augmentations: list[StoredAugmentation]
    image_embeds: np.ndarray
    text_embeds: np.ndarray

    def pack(self) -> dict[str, bytes]:
        """The members of the sample."""
        return pack_sample(
            self.image,
            self.captions,
            self.synthetic_captions,
            [augmentation.encode() for augmentation in self.augmentations],
            self.image_embeds,
            self.text_embeds,
            {"image_id": self.image_id},
        )

    def require_finite(self) -> None:
        """Refuse NaN and infinity in the embeddings.

        Raises:
            ValueError: If there is one; the message names the image.
        """
        for name in ("image_embeds", "text_embeds"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f"Image {self.image_id!r}: expected finite {name} from the teachers, got NaN or infinity. Check "
                    "their weights."
                )


@dataclass
class Reinforcer:
    """Turn rows of a dataset into samples.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and `image`.
        captions (`list[list[str]]`): Of each row.
        synthetic_captions (`list[list[str]]` or None): Of each row; `None` to let the captioner write them.
        captioner ([`~modeling_dclip.data.reinforced.teachers.TransformersCaptioner`] or None): Writes synthetic
            captions where none are given; `None` for no synthetic captions.
        teachers (`Sequence`): See [`~modeling_dclip.data.reinforced.teachers.ReinforcementTeacher`].
        settings ([`~modeling_dclip.data.reinforced.augmentations.AugmentationSettings`]): The ranges that
            augmentations are drawn from.
        augmentations (`int`, *optional*, defaults to 30): Per image.
        seed (`int`, *optional*, defaults to 0): Of the draws.
        dtype (`str`, *optional*, defaults to `"float16"`): Of the embeddings; or `"float32"`.
        batch_size (`int`, *optional*, defaults to 64): Augmented images in one forward pass.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode and augment.

    Raises:
        ValueError: If there is no teacher or an argument is out of range.
    """

    dataset: Dataset
    captions: list[list[str]]
    synthetic_captions: list[list[str]] | None
    captioner: TransformersCaptioner | None
    teachers: Sequence[ReinforcementTeacher]
    settings: AugmentationSettings
    augmentations: int = 30
    seed: int = 0
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not self.teachers or min(self.augmentations, self.batch_size) < 1 or self.dtype not in _DTYPES:
            raise ValueError(
                "Expected one or more teachers, augmentations and a batch_size of at least 1, and a dtype of "
                f"{_DTYPES}, got {len(self.teachers)}, {self.augmentations}, {self.batch_size} and {self.dtype!r}."
            )

    def samples(self, rows: range, progress: tqdm) -> list[ReinforcedRow]:
        """Compute the samples of some rows.

        Args:
            rows (`range`): Rows of the dataset.
            progress (`tqdm`): Advances by each augmented image.

        Raises:
            ValueError: If an image cannot be read, the captioner writes nothing about it, or an embedding is not
                finite; the message names the image.
        """
        part = self.dataset.select(rows)
        image_ids = part["image_id"][:]
        named = enumerate(zip(image_ids, encoded_images(part), strict=True), rows.start)
        images = [_storable(row, image_id, encoded) for row, (image_id, encoded) in named]
        encoded = [content for _, content in images]
        drawn = [self._draw(image_id, content) for image_id, content in zip(image_ids, encoded, strict=True)]
        captions = [self.captions[row] for row in rows]
        if self.synthetic_captions is None:
            synthetic = self._caption(image_ids, encoded, rows)
        else:
            synthetic = [self.synthetic_captions[row] for row in rows]
        image_embeds = self._encode_images(encoded, drawn, progress)
        texts = [[*real, *made] for real, made in zip(captions, synthetic, strict=True)]
        text_embeds = self._encode_texts([text for row in texts for text in row])
        ends = np.cumsum([len(row) for row in texts])
        columns = (image_ids, images, captions, synthetic, drawn, image_embeds, np.split(text_embeds, ends[:-1]))
        samples = [ReinforcedRow(*row) for row in zip(*columns, strict=True)]
        for sample in samples:
            sample.require_finite()
        return samples

    def _draw(self, image_id: str, encoded: bytes) -> list[StoredAugmentation]:
        size = read_header(encoded).size
        numbers = range(self.augmentations)
        return [draw_augmentation(self.seed, image_id, number, size, self.settings) for number in numbers]

    def _caption(self, image_ids: Sequence[str], images: Sequence[bytes], rows: range) -> list[list[str]]:
        if self.captioner is None:
            return [[] for _ in rows]
        found: list[list[str]] = []
        for start in range(0, len(rows), IMAGES_PER_LOT):
            batch = [open_image(image, upright=False) for image in images[start : start + IMAGES_PER_LOT]]
            found += self.captioner(batch, lot=rows[start])
        silent = [image_id for image_id, texts in zip(image_ids, found, strict=True) if not texts]
        if silent:
            raise ValueError(
                f"Expected a caption of image {silent[0]!r} from {self.captioner.name!r}, got none with words "
                f"({len(silent)} such images in this shard). Use another captioner or a column."
            )
        return found

    def _encode_images(self, images: list[bytes], drawn: list[list[StoredAugmentation]], progress: tqdm) -> np.ndarray:
        """`(rows, augmentations, W)`."""
        preprocess = [teacher.preprocess for teacher in self.teachers]
        augmented = _AugmentedImages(images, drawn, self.settings.image_size, preprocess)
        loader = DataLoader(augmented, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=pass_batch)
        embeds = []
        for batch in loader:
            views = zip(self.teachers, batch, strict=True)
            embeds.append(np.concatenate([teacher.encode_images(pixels) for teacher, pixels in views], axis=1))
            progress.update(len(batch[0]))
        return np.concatenate(embeds).astype(self.dtype).reshape(len(images), self.augmentations, -1)

    def _encode_texts(self, texts: list[str]) -> np.ndarray:
        """`(texts, W)`."""
        starts = range(0, len(texts), TEXTS_PER_PASS)
        passes = [texts[start : start + TEXTS_PER_PASS] for start in starts]
        embeds = [[teacher.encode_texts(part) for teacher in self.teachers] for part in passes]
        return np.concatenate([np.concatenate(part, axis=1) for part in embeds]).astype(self.dtype)


def _storable(row: int, image_id: str, encoded: bytes) -> tuple[str, bytes]:
    try:
        kind, encoded = storable_image(encoded)
        open_image(encoded, upright=False)
    except UnreadableImageError as error:
        raise ValueError(
            f"Image {image_id!r} (row {row}): expected an image, got {error.reason}. Replace the file or drop the row."
        ) from error
    return kind, encoded


FORMAT = 1  # of the index
# Fields in the global header of a shard's tar; readers of samples ignore them.
KEY_HEADER, SYNTHETIC_HEADER = "MODELING_DCLIP.key", "MODELING_DCLIP.synthetic_captions"


def _texts_of(dataset: Dataset, column: str) -> list[list[str]]:
    """Read a column of texts, or of lists of texts, stripped."""
    rows = [[row] if isinstance(row, str) else row or [] for row in arrow_column(dataset, column).to_pylist()]
    texts = [[text.strip() for text in row if isinstance(text, str) and text.strip()] for row in rows]
    bad = [number for number, row in enumerate(texts) if not row]
    if bad:
        raise ValueError(
            f"Image {dataset['image_id'][bad[0]]!r} (row {bad[0]}): expected a caption with words in the column "
            f"{column!r}, got {rows[bad[0]]!r} ({len(bad)} such rows in all). Drop these rows or give them captions."
        )
    return texts


def _sample_keys(dataset: Dataset, captions: list[list[str]], synthetic: list[list[str]] | None) -> list[str]:
    """A key of each row's content. It includes the id, because the augmentations depend on it."""
    texts = [[*row, "\0", *(synthetic[number] if synthetic else [])] for number, row in enumerate(captions)]
    parts = zip(dataset["image_id"][:], row_keys(dataset), texts, strict=True)
    return [combine_keys([image_id, key, *row]) for image_id, key, row in parts]


def _write_shard(path: Path, headers: Mapping[str, str], samples: Mapping[int, Mapping[str, bytes]]) -> None:
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT, pax_headers=dict(headers)) as tar:
            for row, members in samples.items():
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{row:09d}.{kind}")  # no time and no owner: equal samples give equal bytes
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _is_whole(path: Path, key: str, samples: int) -> bool:
    """Whether a shard was made from these inputs and holds so many samples."""
    if read_shard_fields(path).get(KEY_HEADER) != key:
        return False
    try:
        return sum(1 for _ in scan_shard(path)) == samples
    except DamagedSampleError:
        return False


def _differences(stored: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        stored, now = dict(enumerate(stored)), dict(enumerate(now))
    if isinstance(stored, dict) and isinstance(now, dict):
        names = dict.fromkeys([*stored, *now])
        pairs = [(f"{name}.{key}".strip("."), stored.get(key), now.get(key)) for key in names]
        return [line for key, one, other in pairs for line in _differences(one, other, key)]
    return [] if stored == now else [f"{name}: there {stored!r}, now {now!r}"]


def _begin(output: Path, made_from: Mapping[str, Any]) -> None:
    """Begin a folder with its index, or check that it was begun with the same rows, teachers and settings.

    Raises:
        FileExistsError: If the folder holds something else.
        ValueError: If it was begun with other rows, teachers or settings, or its index cannot be read.
    """
    path = output / INDEX_NAME
    remove_leftovers(output)
    if path.is_file():
        stored = read_json(path, "index", (), "Remove the folder, or name another.")
        different = _differences({name: stored.get(name) for name in made_from}, dict(made_from))
        if different:
            raise ValueError(
                f"'{output}' was written from something else: {'; '.join(different)}. Name another output, or remove "
                "the folder."
            )
    elif entry_names(output) - {LOCK_NAME}:
        raise FileExistsError(f"'{output}' exists and holds no {INDEX_NAME}. Name another output, or remove it.")
    else:
        write_json(path, {**made_from, "shards": []}, indent=2)


@contextmanager
def _keeping(output: Path, made_from: Mapping[str, Any]) -> Iterator[None]:
    """Keep the folder to this run, begun in the main process; the others hear of a refusal.

    Raises:
        OSError: If another run holds the folder, or nothing can be written there.
        ValueError: As [`_begin`].
    """
    state = PartialState()
    refused: list[Exception | None] = [None]
    with ExitStack() as held:
        if state.is_main_process:
            try:
                held.enter_context(holding(output))
                _begin(output, made_from)
            except (OSError, ValueError) as error:
                refused = [error]
        broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        yield
        state.wait_for_everyone()


def _write_shards(
    reinforcer: Reinforcer, output: Path, keys: Sequence[str], made_by: str, samples_per_shard: int
) -> tuple[list[dict[str, Any]], int]:
    """Write the missing shards.

    Returns:
        `tuple[list[dict], int]`: File, number of samples and key of each shard; synthetic captions in all of them.
    """
    state, each = PartialState(), reinforcer.augmentations
    shards: list[dict[str, Any]] = []
    starts = range(0, len(keys), samples_per_shard)
    rows_of = [range(start, min(start + samples_per_shard, len(keys))) for start in starts]
    hidden = not state.is_local_main_process
    with tqdm(total=len(keys) * each, desc="Asking the teachers", unit="view", disable=hidden) as progress:
        for number, rows in enumerate(rows_of):
            path, key = output / f"{number:06d}.tar", combine_keys([made_by, *keys[rows.start : rows.stop]])
            shards.append({"file": path.name, "samples": len(rows), "key": key})
            if number % state.num_processes != state.process_index or _is_whole(path, key, len(rows)):
                progress.update(len(rows) * each)
                continue
            samples = reinforcer.samples(rows, progress)
            synthetic = sum(len(sample.synthetic_captions) for sample in samples)
            packed = {row: sample.pack() for row, sample in zip(rows, samples, strict=True)}
            _write_shard(path, {KEY_HEADER: key, SYNTHETIC_HEADER: str(synthetic)}, packed)
    state.wait_for_everyone()
    return shards, sum(int(read_shard_fields(output / shard["file"])[SYNTHETIC_HEADER]) for shard in shards)


def _made_from(reinforcer: Reinforcer, keys: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the content of the shards depends on; names and folders are not part of it."""
    captioner = reinforcer.captioner
    made_from = {
        "format": FORMAT,
        "teachers": [
            {name: getattr(teacher, name) for name in ("width", "logit_scale", "fingerprint")}
            for teacher in reinforcer.teachers
        ],
        "settings": asdict(reinforcer.settings)
        | {name: getattr(reinforcer, name) for name in ("augmentations", "seed", "dtype")}
        | {**settings, "captioner": captioner and captioner.fingerprint},
        "rows": combine_keys(keys),
    }
    return json.loads(json.dumps(made_from))  # as it will be read back


def write_reinforced(
    dataset: Dataset,
    teachers: Sequence[ReinforcementTeacher],
    *,
    output: str | Path,
    settings: AugmentationSettings,
    synthetic_captions: str | None = None,
    captioner: TransformersCaptioner | None = None,
    samples_per_shard: int = 1000,
    **options: Any,
) -> Path:
    """Write a dataset in DataCompDR's format; [`~modeling_dclip.data.reinforced.ReinforcedDataset`] reads the folder.

    Source: [MC] dataset reinforcement; docs/papers.md, reinforced data. Deviation: none.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`.
        teachers (`Sequence`): See [`~modeling_dclip.data.reinforced.teachers.build_teacher`]. Their embeddings are
            stored one after the other, each L2-normalised.
        output (`str` or `Path`): A new folder, or one that the same call began.
        settings ([`~modeling_dclip.data.reinforced.augmentations.AugmentationSettings`]): The ranges that
            augmentations are drawn from.
        synthetic_captions (`str`, *optional*): Column of texts or of lists of texts.
        captioner ([`~modeling_dclip.data.reinforced.teachers.TransformersCaptioner`], *optional*): Writes synthetic
            captions of the stored images. Without a column and a captioner there are none.
        samples_per_shard (`int`, *optional*, defaults to 1000): Images per file.
        options: `augmentations`, `seed`, `dtype`, `batch_size`, `num_workers` of
            [`~modeling_dclip.data.reinforced.writer.Reinforcer`].

    Returns:
        `Path`: The index written.

    Raises:
        FileExistsError: If the folder holds something else.
        OSError: If another run writes it, or nothing can be written there.
        ValueError: If an argument is wrong, the folder was begun with other rows, teachers or settings, an image
            cannot be read, or an embedding is not finite; the message names the image.
    """
    if samples_per_shard < 1 or (synthetic_captions is not None and captioner is not None):
        raise ValueError(
            "Expected samples_per_shard of at least 1, and synthetic captions from a column or from a captioner, got "
            f"{samples_per_shard}, {synthetic_captions!r} and {captioner!r}."
        )
    require_rows(len(dataset), "the dataset to reinforce")
    captions = _texts_of(dataset, "captions")
    synthetic = None if synthetic_captions is None else _texts_of(dataset, synthetic_captions)
    reinforcer = Reinforcer(dataset, captions, synthetic, captioner, teachers, settings, **options)
    keys = _sample_keys(dataset, captions, synthetic)
    made_from = _made_from(reinforcer, keys, {"column": synthetic_captions, "samples_per_shard": samples_per_shard})
    output, state = Path(output), PartialState()
    made_by = combine_keys([json.dumps(made_from)])
    with _keeping(output, made_from):
        shards, num_synthetic = _write_shards(reinforcer, output, keys, made_by, samples_per_shard)
        if state.is_main_process:
            counts = {"samples": len(keys), "captions": sum(map(len, captions)), "synthetic_captions": num_synthetic}
            versions = {module.__name__: module.__version__ for module in (torch, transformers, PIL)}
            names = {"teachers": [teacher.name for teacher in teachers], "captioner": captioner and captioner.name}
            told = {"counts": counts, "shards": shards, "names": names, "versions": versions}
            write_json(output / INDEX_NAME, made_from | told, indent=2)
    return output / INDEX_NAME
