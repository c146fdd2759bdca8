"""Write a reinforced dataset: let teachers speak once about augmented images and captions, for every student to come.

Shards are written one by one, each atomically and under a key of what made it: a run that was killed goes on at the next shard,
and several processes share the shards among them. `reinforced.json` beside them says all that is needed to read.
"""

import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import PIL
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from modeling_dclip.data.caption_rows import require_rows
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.columns import arrow_column, combine_keys, row_keys
from modeling_dclip.data.region_cache import replacing
from modeling_dclip.data.reinforced_shards import INDEX_NAME
from modeling_dclip.data.reinforced_teachers import ReinforcementTeacher, TransformersCaptioner, build_teacher
from modeling_dclip.data.reinforcing import Reinforcer
from modeling_dclip.data.stored_augmentations import AugmentationSettings

FORMAT = 1  # of the index
# Of a shard, in its tar's global header, which readers of samples pass over.
KEY_HEADER, SYNTHETIC_HEADER = "MODELING_DCLIP.key", "MODELING_DCLIP.synthetic_captions"


def _texts_of(dataset: Dataset, column: str) -> list[list[str]]:
    """The texts of a column of texts or of lists of texts, stripped."""
    rows = [[row] if isinstance(row, str) else row or [] for row in arrow_column(dataset, column).to_pylist()]
    texts = [[text.strip() for text in row if isinstance(text, str) and text.strip()] for row in rows]
    bad = [number for number, row in enumerate(texts) if not row]
    if bad:
        raise ValueError(
            f"Image {dataset[bad[0]]['image_id']!r} (row {bad[0]}): expected a caption with words in the column {column!r}, got "
            f"{rows[bad[0]]!r} ({len(bad)} such rows in all). Drop these rows or give them captions."
        )
    return texts


def _sample_keys(dataset: Dataset, captions: list[list[str]], synthetic: list[list[str]] | None) -> list[str]:
    """A key of all that rows hold of their samples. The id is in it, for it decides the augmentations."""
    texts = [[*row, "\0", *(synthetic[number] if synthetic else [])] for number, row in enumerate(captions)]
    parts = zip(dataset["image_id"][:], row_keys(dataset), texts, strict=True)
    return [combine_keys([image_id, key, *row]) for image_id, key, row in parts]


def _write_shard(path: Path, headers: Mapping[str, str], samples: Mapping[int, Mapping[str, bytes]]) -> None:
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT, pax_headers=dict(headers)) as tar:
            for row, members in samples.items():
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{row:09d}.{kind}")  # no time, no owner: equal samples, equal bytes
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _read_headers(path: Path) -> dict[str, str]:
    """The global headers of a shard; none if it is not there or cannot be read."""
    if not path.is_file():
        return {}
    try:
        with tarfile.open(path, "r:") as tar:
            return dict(tar.pax_headers)
    except tarfile.TarError:
        return {}


def _write_index(path: Path, index: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_index(path: Path) -> dict[str, Any]:
    """The index of a folder that was begun."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"The index '{path}': expected JSON, got {error}. Remove the folder, or name another."
        ) from error
    if not isinstance(index, dict):
        raise ValueError(
            f"The index '{path}': expected an object, got {type(index).__name__}. Remove the folder, or name another."
        )
    return index


def _differences(stored: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        stored, now = dict(enumerate(stored)), dict(enumerate(now))
    if isinstance(stored, dict) and isinstance(now, dict):
        names = dict.fromkeys([*stored, *now])
        pairs = [(f"{name}.{key}".strip("."), stored.get(key), now.get(key)) for key in names]
        return [line for key, one, other in pairs for line in _differences(one, other, key)]
    return [] if stored == now else [f"{name}: there {stored!r}, now {now!r}"]


def _begin(output: Path, made_from: Mapping[str, Any]) -> None:
    """Claim the folder for what is to be written, or see that it was begun with the same.

    Raises:
        FileExistsError: If it holds something else.
        ValueError: If it was begun with other rows, teachers or settings, or its index cannot be read.
    """
    path = output / INDEX_NAME
    if path.is_file():
        stored = _read_index(path)
        different = _differences({name: stored.get(name) for name in made_from}, dict(made_from))
        if different:
            raise ValueError(
                f"'{output}' was written from something else: {'; '.join(different)}. Name another output, or remove the folder."
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"'{output}' exists and holds no {INDEX_NAME}. Name another output, or remove it.")
    else:
        _write_index(path, {**made_from, "shards": []})


def _write_shards(
    reinforcer: Reinforcer, output: Path, keys: Sequence[str], made_by: str, samples_per_shard: int
) -> tuple[list[dict[str, Any]], int]:
    """Write the shards that are not there: of each its file, number of samples and key; and how many synthetic captions all hold."""
    state, shards, each = PartialState(), [], reinforcer.augmentations
    starts = range(0, len(keys), samples_per_shard)
    rows_of = [range(start, min(start + samples_per_shard, len(keys))) for start in starts]
    hidden = not state.is_local_main_process
    with tqdm(total=len(keys) * each, desc="Asking the teachers", unit="view", disable=hidden) as progress:
        for number, rows in enumerate(rows_of):
            path, key = output / f"{number:06d}.tar", combine_keys([made_by, *keys[rows.start : rows.stop]])
            shards.append({"file": path.name, "samples": len(rows), "key": key})
            if number % state.num_processes != state.process_index or _read_headers(path).get(KEY_HEADER) == key:
                progress.update(len(rows) * each)
                continue
            samples = reinforcer.samples(rows, progress)
            synthetic = sum(len(sample.synthetic_captions) for sample in samples)
            packed = {row: sample.pack() for row, sample in zip(rows, samples, strict=True)}
            _write_shard(path, {KEY_HEADER: key, SYNTHETIC_HEADER: str(synthetic)}, packed)
    state.wait_for_everyone()
    return shards, sum(int(_read_headers(output / shard["file"])[SYNTHETIC_HEADER]) for shard in shards)


def _made_from(reinforcer: Reinforcer, keys: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what is written; no name or folder does."""
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

    Source: [MC] dataset reinforcement; PAPERS.md, reinforced data. Deviation: none.

    Args:
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`.
        teachers (`Sequence`): See [`~modeling_dclip.data.reinforced_teachers.build_teacher`]. Their embeddings are stored one after
            the other, each L2-normalised.
        output (`str` or `Path`): Folder; new, or begun by the same call.
        settings ([`~modeling_dclip.data.stored_augmentations.AugmentationSettings`]): What augmentations are drawn from.
        synthetic_captions (`str`, *optional*): Column of texts or of lists of texts.
        captioner ([`~modeling_dclip.data.reinforced_teachers.TransformersCaptioner`], *optional*): Writes synthetic captions of the
            images as they are stored. Without column and captioner there are none.
        samples_per_shard (`int`, *optional*, defaults to 1000): Images a file.
        options: `augmentations`, `seed`, `dtype`, `batch_size`, `num_workers` of [`~modeling_dclip.data.reinforcing.Reinforcer`].

    Returns:
        `Path`: The index written.

    Raises:
        FileExistsError: If the folder holds something else.
        ValueError: If an argument is wrong, the folder was begun with other rows, teachers or settings, an image cannot be read, or
            an embedding is not finite; the message names the image.
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
    if state.is_main_process:
        _begin(output, made_from)
    state.wait_for_everyone()
    made_by = combine_keys([json.dumps(made_from)])
    shards, num_synthetic = _write_shards(reinforcer, output, keys, made_by, samples_per_shard)
    if state.is_main_process:
        counts = {"samples": len(keys), "captions": sum(map(len, captions)), "synthetic_captions": num_synthetic}
        versions = {module.__name__: module.__version__ for module in (torch, transformers, PIL)}
        names = {"teachers": [teacher.name for teacher in teachers], "captioner": captioner and captioner.name}
        told = {"counts": counts, "shards": shards, "names": names, "versions": versions}
        _write_index(output / INDEX_NAME, made_from | told)
    state.wait_for_everyone()
    return output / INDEX_NAME


@dataclass
class ReinforcedWriterArguments:
    """One run of the command line."""

    dataset: str = field(metadata={"help": "Spec of the captions, e.g. scenes:train,n=1000; see data/captions.py."})
    teachers: str = field(
        metadata={"help": "CLIPs, separated by commas: folders, Hub ids, or open_clip:NAME:PRETRAINED."}
    )
    output: str = field(metadata={"help": "Folder to write; a run that was stopped goes on in it."})
    augmentations: int = field(default=30, metadata={"help": "Stored augmentations of each image."})
    synthetic_captions: str | None = field(
        default=None, metadata={"help": "Column of synthetic captions, e.g. coarse_caption of drawn scenes."}
    )
    captioner: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a captioner (BLIP, GIT, ViT-GPT2) that writes them."}
    )
    captions_per_image: int = field(default=5, metadata={"help": "Synthetic captions the captioner draws."})
    image_size: int = field(default=256, metadata={"help": "Side in pixels of the augmented image, as in training."})
    min_crop_area: float = field(
        default=0.08, metadata={"help": "Smallest share of the image that a random resized crop keeps, in (0, 1]."}
    )
    num_operations: int = field(default=2, metadata={"help": "Operations of RandAugment."})
    magnitude: int = field(default=9, metadata={"help": "Strength of RandAugment, 0 to 30."})
    samples_per_shard: int = field(default=1000, metadata={"help": "Images a file."})
    dtype: Literal["float16", "float32"] = field(default="float16", metadata={"help": "Of the stored embeddings."})
    batch_size: int = field(default=64, metadata={"help": "Augmented images a forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode and augment."})
    seed: int = field(default=0, metadata={"help": "Of augmentations, drawn captions, and the draw of @COUNT."})


def main(argv: list[str] | None = None) -> Path:
    """Run the command line and return the index written."""
    (arguments,) = HfArgumentParser(ReinforcedWriterArguments).parse_args_into_dataclasses(argv)
    device, seed, captioner = PartialState().device, arguments.seed, None
    if arguments.captioner is not None:
        options = {"captions": arguments.captions_per_image, "seed": seed, "device": device}
        captioner = TransformersCaptioner(arguments.captioner, **options)
    index = write_reinforced(
        load_captions(arguments.dataset, seed=seed),
        [build_teacher(spec.strip(), device) for spec in arguments.teachers.split(",")],
        output=arguments.output,
        settings=AugmentationSettings(
            arguments.image_size,
            scale=(arguments.min_crop_area, 1.0),
            num_operations=arguments.num_operations,
            magnitude=arguments.magnitude,
        ),
        captioner=captioner,
        **{
            name: getattr(arguments, name)
            for name in (
                "augmentations",
                "synthetic_captions",
                "samples_per_shard",
                "dtype",
                "batch_size",
                "num_workers",
            )
        },
        seed=seed,
    )
    counts = json.loads(index.read_text(encoding="utf-8"))["counts"]
    told = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
    if PartialState().is_main_process:
        sys.stdout.write(f"Wrote {told} to {arguments.output}\n")
    return index
