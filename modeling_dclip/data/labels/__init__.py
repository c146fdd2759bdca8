"""Labelled images by spec: drawn objects, parquet files, folders, datasets of the Hub, and `clip-benchmark/wds_*`
sets.

Each source knows its classes' names and, where the data brings them, its prompt templates. `names=` and `templates=`
take others: a file with one a line, or `open_clip` for OpenAI's ImageNet lists out of that package.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, Value

from modeling_dclip.data.columns import arrow_column, as_text, id_texts, put_columns, with_images
from modeling_dclip.data.files import (
    BROKEN_LINK,
    HIDDEN,
    LINKED_TWICE,
    is_hidden,
    is_utf8,
    list_folder,
    load_hub,
    load_parquet,
    match_parquet,
    printable,
    require_folder,
)
from modeling_dclip.data.images import (
    describe_others,
    find_images,
    has_image_suffix,
    image_suffixes,
    warn_passed_over,
)
from modeling_dclip.data.labels.prompts import (
    NAMES_FILE,
    PHOTO_TEMPLATES,
    SYNSET_FILES,
    TEMPLATES_FILE,
    find_file,
    normal_name,
    order_classes,
    read_names,
    read_numbered_names,
    read_templates,
)
from modeling_dclip.data.labels.webdataset import WebdatasetFiles, label_feature, read_description, read_samples
from modeling_dclip.data.rows import FIX_PATHS, present_images
from modeling_dclip.data.specs import Source, Spec, parse_spec
from modeling_dclip.progress import count_of

# Where several columns hold class numbers: CIFAR-100's finer ones.
_LABEL_COLUMNS = ("label", "fine_label")
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


class LabelledImages(NamedTuple):
    """A classification set: `dataset` with `image` and `label`, its K `class_names`, and its `templates`."""

    dataset: Dataset
    class_names: list[str]
    templates: list[str]


def _spaced(names: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _read_scenes(split: str = "test", *, n: int = 1024, seed: int = 0, image_size: int = 128) -> LabelledImages:
    from modeling_dclip.data.scenes import TEMPLATES, load_single_objects  # drawing is needed by this source only

    dataset = load_single_objects(split, n=n, seed=seed, image_size=image_size)
    return LabelledImages(dataset, _spaced(dataset.features["label"].names), list(TEMPLATES))


def _choose_column(
    dataset: Dataset, given: str | None, usual: Sequence[str], kind: type, what: str, place: str
) -> str:
    if given is not None:
        if given not in dataset.column_names:
            raise ValueError(f"Expected a column {given!r} ({what}) in {place}, got {dataset.column_names}.")
        return given
    fitting = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    chosen = [name for name in usual if name in fitting] or fitting
    if not chosen or (len(chosen) > 1 and chosen[0] not in usual):
        raise ValueError(
            f"Expected one column of type {kind.__name__} ({what}) in {place}, got {fitting or dataset.features}. "
            f"Name it: {what}=COLUMN; a column of class names becomes a ClassLabel with "
            "`Dataset.class_encode_column`, or when it is named."
        )
    return chosen[0]


def _from_columns(
    dataset: Dataset,
    place: str,
    image: str | None,
    label: str | None,
    names: str | None,
    templates: str | None,
) -> LabelledImages:
    if image is None and "image" in dataset.column_names:
        image = "image"  # of whatever type: `with_images` knows them
    if label is None and names is not None:  # numbers of classes are labels where there are names for them
        label = next((name for name in _LABEL_COLUMNS if name in dataset.column_names), None)
    image = _choose_column(dataset, image, ("image",), Image, "image", place)
    label = _choose_column(dataset, label, _LABEL_COLUMNS, ClassLabel, "label", place)
    dataset = dataset.select_columns([*("image_id",) * ("image_id" in dataset.column_names), image, label])
    if "image_id" in dataset.column_names and dataset.features["image_id"] != Value("string"):
        ids = id_texts(dataset, "image_id", place)
        dataset = put_columns(dataset, {"image_id": (ids, Value("string"))}).select_columns(["image_id", image, label])
    dataset, class_names = _numbered(dataset, label, place, names)
    dataset = with_images(dataset, image, place)
    dataset = dataset if label == "label" else dataset.rename_column(label, "label")
    dataset, _ = present_images(dataset, None, place, "raise", FIX_PATHS)
    return LabelledImages(dataset, class_names, read_templates(templates, PHOTO_TEMPLATES))


def _numbered(dataset: Dataset, label: str, place: str, names: str | None) -> tuple[Dataset, list[str]]:
    """The dataset with its labels as numbers from 0, and the names of the classes in this order."""
    feature, column = dataset.features[label], as_text(arrow_column(dataset, label), label, place)
    values = column.to_pylist()
    if None in values:
        raise ValueError(f"{place}, row {values.index(None)}: no label in the column {label!r}. Remove the row.")
    if isinstance(feature, ClassLabel):
        wrong = next((row for row, value in enumerate(values) if not 0 <= value < len(feature.names)), None)
        if wrong is not None:
            raise ValueError(
                f"{place}, row {wrong}: expected a label in [0, {len(feature.names)}) in the column {label!r}, got "
                f"{values[wrong]}. A split without labels cannot be evaluated."
            )
        own = feature.names
        return dataset, _spaced(read_names(None, own)) if names is None else read_names(names, own)
    if pa.types.is_string(column.type):
        texts = [normal_name(value) for value in values]
        if "" in texts:
            raise ValueError(f"{place}, row {texts.index('')}: an empty label in the column {label!r}. Fill it in.")
        own = order_classes(list(set(texts)))
        number_of = {name: number for number, name in enumerate(own)}
        labels = ([number_of[text] for text in texts], ClassLabel(names=own))
        class_names = _spaced(read_names(None, own)) if names is None else read_names(names, own, ordered=False)
        return put_columns(dataset, {label: labels}), class_names
    is_number = isinstance(feature, Value) and re.match("bool|u?int|float|double", feature.dtype) is not None
    if names is None or not is_number:
        raise ValueError(
            f"Expected a ClassLabel, class names, or with names=FILE class numbers, in the column {label!r} of "
            f"{place}, got {feature}."
        )
    wrong = next((row for row, value in enumerate(values) if not math.isfinite(value) or value != int(value)), None)
    if wrong is not None:
        raise ValueError(f"{place}, row {wrong}: expected the number of a class in {label!r}, got {values[wrong]}.")
    present = sorted({int(value) for value in values})
    first, class_names = read_numbered_names(names, present)
    numbers = [int(value) - first for value in values]
    return put_columns(dataset, {label: (numbers, label_feature(class_names))}), class_names


def _read_parquet(
    pattern: str,
    *,
    image: str | None = None,
    label: str | None = None,
    names: str | None = None,
    templates: str | None = None,
) -> LabelledImages:
    dataset = load_parquet([path for path, _ in match_parquet(pattern)], pattern)
    return _from_columns(dataset, f"'{pattern}'", image, label, names, templates)


def _read_hub(
    name: str,
    split: str = "test",
    *,
    config: str | None = None,
    revision: str | None = None,
    image: str | None = None,
    label: str | None = None,
    names: str | None = None,
    templates: str | None = None,
) -> LabelledImages:
    dataset = load_hub(name, split, config=config, revision=revision)
    return _from_columns(dataset, f"{name!r}, split {split!r}", image, label, names, templates)


def _class_folders(top: Path) -> list[Path]:
    """The folders of the classes, in order of their names; of numbers as numbers. What looks like a class or a picture
    and is none is counted and named.
    """
    folders: dict[str, Path] = {}
    seen, passed_over = {top.resolve(), *top.resolve().parents}, dict[str, list[Path]]()
    for path in sorted(list_folder(top), key=Path.is_symlink):  # real folders first, links to them are no classes
        if is_hidden(path.name):
            kind = HIDDEN if path.is_dir() else ""
        elif path.is_dir():
            kind = LINKED_TWICE if path.resolve() in seen else "class"
            seen.add(path.resolve())
        else:
            kind = BROKEN_LINK if not path.exists() else "picture beside the classes" if has_image_suffix(path) else ""
        if kind == "class":
            folders[path.name] = path
        elif kind:
            passed_over.setdefault(kind, []).append(path)
    warn_passed_over(passed_over, top)
    classes = list(folders)
    odd = [name for name in classes if not is_utf8(name)]
    if odd:
        raise ValueError(
            f"The folder '{printable(odd[0])}' in '{top}' has a name that is no UTF-8, so that it names no class. "
            "Rename it."
        )
    splits = sorted(name for name in classes if name.lower() in _SPLITS)
    if splits and (len(splits) > 1 or len(classes) == 1):
        raise ValueError(
            f"Expected one folder a class in '{top}', got the splits {splits}. Name one: "
            f"imagefolder:{top}:{splits[0]}."
        )
    twice = [name for name, count in Counter(map(normal_name, classes)).items() if count > 1]
    if twice:
        raise ValueError(f"Two folders in '{top}' are called {twice[0]!r}, spelled in two ways. Merge them.")
    return [folders[name] for name in order_classes(classes)]


def _read_image_folder(
    folder: str, split: str | None = None, *, names: str | None = None, templates: str | None = None
) -> LabelledImages:
    root = require_folder(folder, "image folder")
    top = root if split is None else require_folder(str(root / split), f"split {split!r}")
    classes = _class_folders(top)
    found = [find_images(path) for path in classes]
    pictures = [one.files for one in found]
    empty = [
        f"none in ['{printable(path.name)}'] among {describe_others(one.passed_over, top)}"
        for path, one in zip(classes, found, strict=True)
        if not one.files
    ]
    if len(classes) < 2 or empty:
        problem = "; ".join(empty[:5]) if empty else f"{len(classes)} folders"
        raise ValueError(
            f"Expected one folder of pictures ({', '.join(image_suffixes()[:4])}, ...) for each of two or more "
            f"classes in '{top}', got {problem}. Remove folders that are no class; name a split as "
            "imagefolder:DIR:SPLIT."
        )
    passed_over: dict[str, list[Path]] = {}
    for one in found:
        for kind, paths in one.passed_over.items():
            passed_over.setdefault(kind, []).extend(paths)
    warn_passed_over(passed_over, top)
    # The first picture of every class, then the second...: the first so many rows are of all classes.
    turns = [(turn, row, path) for row, own in enumerate(pictures) for turn, path in enumerate(own)]
    rows = [(row, path) for _, row, path in sorted(turns, key=lambda entry: entry[:2])]
    own_names = [path.name for path in classes]
    source = names or find_file([top, root], [NAMES_FILE, *SYNSET_FILES])
    class_names = read_names(source, own_names, ordered=False) if source else _spaced(read_names(None, own_names))
    columns = {
        "image_id": [f"{root.resolve().name}/{path.relative_to(root).as_posix()}" for _, path in rows],
        "image": [str(path) for _, path in rows],
        "label": [row for row, _ in rows],
    }
    features = Features(image_id=Value("string"), image=Image(), label=label_feature(class_names))
    dataset = Dataset.from_dict(columns, features=features)
    templates = templates or find_file([top, root], [TEMPLATES_FILE])
    return LabelledImages(dataset, class_names, read_templates(templates, PHOTO_TEMPLATES))


def _read_webdataset(
    root: str,
    split: str = "test",
    *,
    names: str | None = None,
    templates: str | None = None,
    cache_dir: str | None = None,
) -> LabelledImages:
    files = WebdatasetFiles(root, cache_dir)
    description = read_description(files, split)
    if templates is None and description.templates is None:
        raise FileNotFoundError(
            f"No file '{files.place(TEMPLATES_FILE)}': '{files.name}' has no prompts. Put one a line there, or give "
            "templates=FILE."
        )
    class_names = read_names(names, description.class_names) if names else description.class_names
    return LabelledImages(
        read_samples(files, split, description), class_names, read_templates(templates, description.templates or ())
    )


LABEL_SOURCES = {
    "scenes": Source("scenes[:SPLIT]", _read_scenes),
    "parquet": Source("parquet:GLOB", _read_parquet),
    "imagefolder": Source("imagefolder:DIR[:SPLIT]", _read_image_folder),
    "hub": Source("hub:ID[:SPLIT]", _read_hub),
    "wds": Source("wds:DIR_OR_URL[:SPLIT]", _read_webdataset),
}


def parse_label_spec(spec: str | Spec) -> Spec:
    """Take a spec of labelled images apart.

    Raises:
        ValueError: If it is wrong; the message lists the known forms.

    Example:
        >>> parse_label_spec("wds:https://example.org:8000/wds_mnist:train").split
        'train'
    """
    return parse_spec(spec, LABEL_SOURCES, counted=True)


def spec_root(spec: str | Spec) -> str | None:
    """Folder or address of a `wds:` spec; `None` of another.

    Raises:
        ValueError: If a `wds:` spec is wrong.
    """
    return parse_label_spec(spec).fields[0] if str(spec).startswith("wds:") else None


def load_classification(spec: str | Spec) -> LabelledImages:
    """Load a classification set with its class names and templates.

    Args:
        spec (`str` or [`~modeling_dclip.data.specs.Spec`]): One of these. `@COUNT` at the end takes the first so many
            rows. All but the scenes take `names=` and `templates=`.

            - `scenes[:SPLIT][,n=...,seed=...]`: drawn single objects; `test` by default.
            - `parquet:GLOB[,image=COLUMN,label=COLUMN]`: the columns are found by their types; class names become
                numbers if named.
            - `imagefolder:DIR[:SPLIT]`: a folder of pictures a class, in the order of their names. Names come from
              `classnames.txt`, or from ImageNet's `LOC_synset_mapping.txt` or `synset_words.txt`, where one lies
              there. Classes take turns in the rows.
            - `hub:ID[:SPLIT][,config=...,revision=...,image=COLUMN,label=COLUMN]`: a dataset of the Hub, or a folder
                like one.
            - `wds:DIR_OR_URL[:SPLIT][,cache_dir=DIR]`: a `clip-benchmark/wds_*` set, several labels an image included,
              with its own names and templates. Shards behind an address are fetched once, to `cache_dir`.

    Returns:
        [`LabelledImages`]: Underscores in names of folders and of a `ClassLabel` read as spaces; names out of files
            are as they are. The label of a multi-label set is a list of K zeros and ones.

    Raises:
        ConnectionError: If a server cannot be reached or refuses.
        FileNotFoundError: If no file matches, or one of the set's is missing.
        ImportError: If `open_clip` is asked for and not installed.
        ValueError: If the spec is wrong, data are damaged or not of their form, or there are fewer rows than the
            count.
    """
    spec = parse_label_spec(spec)
    loaded = spec.build()
    if spec.count is None:
        return loaded
    if spec.count > len(loaded.dataset):
        raise ValueError(
            f"Expected at least {count_of(spec.count, 'row')} in {spec.text!r}, got {len(loaded.dataset)}. "
            "Lower the count."
        )
    return loaded._replace(dataset=loaded.dataset.select(range(spec.count)))
