"""Caption datasets from a spec, in one schema, alone or mixed.

| spec | what |
|---|---|
| `scenes:SPLIT[,KEY=VALUE...]` | drawn scenes, [`~modeling_dclip.data.scenes.load_scenes`] |
| `coco:ANNOTATIONS.json:IMAGE_FOLDER` | COCO captions |
| `karpathy:DATASET.json:IMAGE_FOLDER:SPLIT` | Karpathy's splits of COCO, Flickr30k, Flickr8k; `train` has `restval` |
| `flickr30k:results.csv:IMAGE_FOLDER` | Flickr30k's own file |
| `conceptual:FILE.tsv:IMAGE_FOLDER` | Conceptual Captions |
| `csv:TABLE.csv:IMAGE_FOLDER` | one's own captions; `image`, `captions`, `negatives` name columns; `sep`, `source` |
| `parquet:GLOB` | parquet files; `image`, `captions`, `negatives`, `image_id`; `source`, `captions_per_image` |
| `hub:NAME:SPLIT` | a dataset of the Hub, the same options and `config` |
| `disk:FOLDER` | a saved dataset |
| `wds:DIR_OR_URL[:SPLIT]` | a `clip-benchmark/wds_*` set for retrieval; option `cache_dir` |
| `held_out:RUN_FOLDER` | the test part of a run of train.py (its `test_fraction`), with its captions |
| `images:FOLDER` | images without captions, for [`load_uncaptioned`] alone; option `source` |

Each may end in `,missing=skip` (where images are files) and in `@COUNT`. Ids are stable and name the source, so that a
picture is the same under any file name: `coco-<id>`, `flickr-<photo id>`.
"""

import logging
from collections.abc import Callable, Collection, Sequence

from datasets import Dataset

from modeling_dclip.data.captions.files import (
    drop_captions,
    karpathy_test_ids,
    read_coco,
    read_conceptual,
    read_csv,
    read_flickr30k,
    read_images,
    read_karpathy,
)
from modeling_dclip.data.captions.parts import read_held_out, split_off_test, split_train_validation
from modeling_dclip.data.captions.tables import REGION_COLUMNS, read_disk, read_hub, read_parquet, standardise_columns
from modeling_dclip.data.columns import concatenate_shared, put_columns
from modeling_dclip.data.failures import MistakeCollector
from modeling_dclip.data.labels.webdataset import read_captioned
from modeling_dclip.data.rows import CAPTION_FEATURES, NEGATIVES, require_rows, require_unique, rows_by_lot
from modeling_dclip.data.specs import Source, Spec, bind_options, parse_spec
from modeling_dclip.progress import count_of

logger = logging.getLogger(__name__)

__all__ = [
    "karpathy_test_ids",
    "load_captions",
    "load_mix",
    "load_uncaptioned",
    "parse_caption_spec",
    "split_off_test",
    "split_train_validation",
    "standardise_columns",
]


def _read_scenes(split: str, **options: str) -> Dataset:
    from modeling_dclip.data.scenes import load_scenes  # drawing is needed by no other source

    return load_scenes(split, **bind_options(load_scenes, options, f"scenes:{split}"))


CAPTION_SOURCES = {
    "scenes": Source("scenes:SPLIT", _read_scenes),
    "coco": Source("coco:ANNOTATIONS.json:IMAGE_FOLDER", read_coco),
    "karpathy": Source("karpathy:DATASET.json:IMAGE_FOLDER:SPLIT", read_karpathy),
    "flickr30k": Source("flickr30k:results.csv:IMAGE_FOLDER", read_flickr30k),
    "conceptual": Source("conceptual:FILE.tsv:IMAGE_FOLDER", read_conceptual),
    "csv": Source("csv:TABLE.csv:IMAGE_FOLDER", read_csv),
    "parquet": Source("parquet:GLOB", read_parquet),
    "hub": Source("hub:NAME:SPLIT", read_hub),
    "disk": Source("disk:FOLDER", read_disk),
    "wds": Source("wds:DIR_OR_URL[:SPLIT]", read_captioned),
    "held_out": Source("held_out:RUN_FOLDER", read_held_out),
    "images": Source("images:FOLDER", read_images),
}


def parse_caption_spec(spec: str | Spec) -> Spec:
    """Take a spec of captioned or uncaptioned images apart.

    Raises:
        ValueError: If it is wrong; the message lists the known forms.
    """
    return parse_spec(spec, CAPTION_SOURCES, counted=True)


def load_captions(spec: str | Spec, *, seed: int = 0, exclude_ids: Collection[str] = ()) -> Dataset:
    """Load one source.

    Args:
        spec (`str` or [`~modeling_dclip.data.specs.Spec`]): See the table above. `@COUNT` at the end draws that many
            images; a smaller count draws a subset of them.
        seed (`int`, *optional*, defaults to 0): Seed of the draw.
        exclude_ids (`Collection[str]`, *optional*): Image ids to leave out, before the draw (see
            [`karpathy_test_ids`]).

    Returns:
        `datasets.Dataset`: Columns `image_id`, `image` (lazy), `captions`, and what else the source has of the schema.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If the spec is wrong (the message lists the known forms) or of a source without captions, a file is
            malformed, no row is left, or the count is larger than what is there.
    """
    spec = parse_caption_spec(spec)
    if spec.source is CAPTION_SOURCES["images"]:
        raise ValueError(
            f"{spec.text!r} has images and no captions. Expected a source of captioned images here; this one may be "
            "named in uncaptioned_datasets."
        )
    return _draw(spec, seed, exclude_ids, "an image and a caption")


def _draw(spec: Spec, seed: int, exclude_ids: Collection[str], what: str) -> Dataset:
    if isinstance(exclude_ids, str):
        raise ValueError(f"Expected exclude_ids to be a collection of image ids, got the one string {exclude_ids!r}.")
    dataset = spec.build()
    image_ids = dataset["image_id"][:]
    excluded = set(exclude_ids)
    rows = [row for row, image_id in enumerate(image_ids) if image_id not in excluded]
    if len(rows) < len(image_ids):
        left_out = count_of(len(image_ids) - len(rows), "image")
        logger.info("%s: left out %s that another part of the run holds or keeps for tests", spec, left_out)
        require_rows(len(rows), f"{spec.text!r} after leaving out {count_of(len(image_ids), 'image')} by id", what)
    if spec.count is not None:
        if spec.count > len(rows):
            raise ValueError(
                f"Expected at least {count_of(spec.count, 'image')} in {spec.text!r}, got {len(rows)} "
                f"({len(image_ids) - len(rows)} left out by id). Lower the count or give more data."
            )
        rows = sorted(rows[i] for i in rows_by_lot([image_ids[row] for row in rows], seed, "draw")[: spec.count])
    return dataset if len(rows) == len(image_ids) else dataset.select(rows)


def load_mix(specs: Sequence[str | Spec], *, seed: int, exclude_ids: Collection[str] = ()) -> Dataset:
    """Load several sources one after the other, e.g. 50,000 + 15,000 + 10,000 images by `@COUNT`.

    Args:
        specs (`Sequence[str or Spec]`): As in [`load_captions`].
        seed (`int`): Seed of the draws.
        exclude_ids (`Collection[str]`, *optional*): Image ids to leave out of every source.

    Returns:
        `datasets.Dataset`: The rows of all sources in order, with the columns that all of them have.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: As in [`load_captions`]; also if there is no spec or an image id comes in two sources.
        Mistakes: If several sources are wrong: all of them.
    """
    if isinstance(specs, str) or not specs:
        raise ValueError(f"Expected a list of one or more specs, got {specs!r}.")
    return _join(specs, lambda spec: load_captions(spec, seed=seed, exclude_ids=exclude_ids))


def load_uncaptioned(specs: Sequence[str | Spec], *, seed: int, exclude_ids: Collection[str] = ()) -> Dataset:
    """Load images to be looked at without their captions: those of any source, and of folders that hold nothing but
    images.

    Args:
        specs (`Sequence[str or Spec]`): As in [`load_captions`], and `images:FOLDER`.
        seed (`int`): Seed of the draws.
        exclude_ids (`Collection[str]`, *optional*): Image ids to leave out of every source, counted and logged.

    Returns:
        `datasets.Dataset`: The rows of all sources in order: `image_id`, `image`, empty `captions`, and `boxes`,
            `box_scores` where all have them.

    Raises:
        FileNotFoundError, ValueError: As in [`load_mix`].
    """
    if isinstance(specs, str) or not specs:
        raise ValueError(f"Expected a list of one or more specs, got {specs!r}.")
    dataset = _join(specs, lambda spec: _draw(parse_caption_spec(spec), seed, exclude_ids, "an image"))
    kept = [name for name in ("image_id", "image", *REGION_COLUMNS) if name in dataset.column_names]
    return drop_captions(dataset.select_columns(kept))


def _without_negatives(dataset: Dataset) -> Dataset:
    none: list[list[str]] = [[] for _ in range(len(dataset))]
    return put_columns(dataset, {NEGATIVES: (none, CAPTION_FEATURES["captions"])})


def _join(specs: Sequence[str | Spec], load: Callable[[str | Spec], Dataset]) -> Dataset:
    """The rows of all sources; what is wrong with several of them is told at once. Where one has false captions, those
    that have none get none.
    """
    parts, found = [], MistakeCollector()
    for spec in specs:
        with found.collecting():
            parts.append(load(spec))
    found.tell()
    if any(NEGATIVES in part.column_names for part in parts):
        parts = [part if NEGATIVES in part.column_names else _without_negatives(part) for part in parts]
    require_unique(
        [image_id for part in parts for image_id in part["image_id"][:]], f"the mix of {list(map(str, specs))}"
    )
    return concatenate_shared(parts)
