"""Classification sets by spec: each source on data of its format, names and templates from everywhere,
bad data named.
"""

import shutil
import sys
import types
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from fixtures.webdatasets import picture, sample, write_set

from modeling_dclip.data.labels import load_classification, parse_label_spec
from modeling_dclip.data.labels.prompts import PHOTO_TEMPLATES
from modeling_dclip.data.scenes import CLASS_NAMES, load_single_objects
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.zero_shot import evaluate_zero_shot

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
SYNSETS = ["n01440764", "n01443537", "n02123045"]


def write_folder(root, classes, pictures=2):
    for row, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(pictures):
            (root / name / f"{number}.JPEG").write_bytes(picture(10 * row + number, "jpg"))
    return root


def write_hub_dataset(folder, image="img", **columns):
    """A dataset as the Hub stores it: parquet files by split under `data`."""
    rows = len(next(iter(columns.values()))[0])
    features = {image: Image(), **{name: feature for name, (_, feature) in columns.items()}}
    values = {image: [{"bytes": picture(n), "path": None} for n in range(rows)]}
    values |= {name: entries for name, (entries, _) in columns.items()}
    dataset = Dataset.from_dict(values, features=Features(features))
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    dataset.select(range(1)).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return folder


def test_drawn_objects_load_by_spec():
    dataset, names, templates = load_classification("scenes:validation,n=5,image_size=40@3")
    assert (len(dataset), names) == (3, list(CLASS_NAMES))
    assert all("{}" in template for template in templates)


def test_parquet_files_load_by_spec(tmp_path):
    load_single_objects("test", n=3, image_size=40).to_parquet(str(tmp_path / "a.parquet"))
    dataset, names, templates = load_classification(f"parquet:{tmp_path}/*.parquet")
    assert (len(dataset), names, templates) == (3, list(CLASS_NAMES), list(PHOTO_TEMPLATES))


def test_a_column_of_names_becomes_numbers_if_it_is_named(tmp_path):
    dataset = load_single_objects("test", n=3, image_size=40).remove_columns("label")
    dataset.add_column("label", ["dog", "cat", "dog"]).to_parquet(str(tmp_path / "names.parquet"))
    with pytest.raises(ValueError, match="ClassLabel.*class_encode_column"):
        load_classification(f"parquet:{tmp_path}/names.parquet")
    found = load_classification(f"parquet:{tmp_path}/names.parquet,label=label")
    assert (found.dataset["label"][:], found.class_names) == ([1, 0, 1], ["cat", "dog"])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "names.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.parquet' is not readable as parquet"):
        load_classification(f"parquet:{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match="a column 'kind' .label.*names.parquet"):
        load_classification(f"parquet:{tmp_path}/names.parquet,label=kind")


def test_a_folder_of_folders_is_classes_in_the_order_of_their_names(tmp_path):
    root = write_folder(tmp_path / "animals", ["red_fox", "dog"])
    (root / ".hidden").mkdir()
    (root / "readme.txt").write_text("not a class")
    dataset, names, templates = load_classification(f"imagefolder:{root}")
    assert names == ["dog", "red fox"] and templates == list(PHOTO_TEMPLATES)
    assert dataset["label"][:] == [0, 1, 0, 1]  # in turns
    assert dataset["image_id"][:2] == ["animals/dog/0.JPEG", "animals/red_fox/0.JPEG"]
    assert load_classification(f"imagefolder:{root}@2").dataset["label"][:] == [0, 1]


def test_a_split_is_a_folder_and_files_beside_it_name_classes_and_prompts(tmp_path):
    write_folder(tmp_path / "set" / "val", ["a", "b"])
    (tmp_path / "set" / "classnames.txt").write_text("b\tred fox\na\ttabby_cat\n\n")
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("a drawing of a {c}.\n")
    dataset, names, templates = load_classification(f"imagefolder:{tmp_path}/set:val")
    assert (names, templates) == (["tabby_cat", "red fox"], ["a drawing of a {c}."])
    assert dataset["image_id"][0] == "set/val/a/0.JPEG"
    assert parse_label_spec("imagefolder:x:val").split == "val" and parse_label_spec("imagefolder:x").split is None


@pytest.mark.parametrize("source", ["list", "mapping", "given"])
def test_synset_folders_get_words(tmp_path, source):
    root = write_folder(tmp_path / "imagenet", SYNSETS, pictures=1)
    words = ["tench", "goldfish, gold fish", "tabby cat"]
    if source == "list":
        (root / "classnames.txt").write_text("\n".join(words))
    lines = [f"{synset} {word}" for synset, word in zip(SYNSETS, words, strict=True)]
    if source == "mapping":  # of more classes than there are folders, in another order
        (root / "LOC_synset_mapping.txt").write_text("\n".join(["n99999999 ghost", *lines[::-1]]))
    (tmp_path / "mine.txt").write_text("\n".join(line.replace(" ", "\t", 1) for line in lines))
    options = f",names={tmp_path}/mine.txt" if source == "given" else ""
    assert load_classification(f"imagefolder:{root}{options}").class_names == words


def test_synsets_without_words_are_refused(tmp_path):
    root = write_folder(tmp_path / "imagenet", SYNSETS, pictures=1)
    with pytest.raises(ValueError, match="only synset ids .'n01440764'.*names=FILE"):
        load_classification(f"imagefolder:{root}")
    (tmp_path / "two.txt").write_text("tench\ngoldfish\n")
    with pytest.raises(ValueError, match="Expected 3 class names in '.*two.txt'.*got 2"):
        load_classification(f"imagefolder:{root},names={tmp_path}/two.txt")
    (tmp_path / "some.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    with pytest.raises(ValueError, match="name for every class in '.*some.txt', got none for .'n02123045'"):
        load_classification(f"imagefolder:{root},names={tmp_path}/some.txt")
    (tmp_path / "both.txt").write_text("n01440764 tench\nn01440764 goldfish\n")
    with pytest.raises(ValueError, match="each class once.*'n01440764' with two names"):
        load_classification(f"imagefolder:{root},names={tmp_path}/both.txt")
    with pytest.raises(FileNotFoundError, match="No file '.*none.txt'"):
        load_classification(f"imagefolder:{root},names={tmp_path}/none.txt")


def test_imagenets_lists_come_from_open_clip_where_it_is_installed(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "imagenet", SYNSETS, pictures=1)
    spec = f"imagefolder:{root},names=open_clip,templates=open_clip"
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load_classification(spec)
    lists = {"IMAGENET_CLASSNAMES": ["tench", "goldfish", "cat"]}
    lists["OPENAI_IMAGENET_TEMPLATES"] = [lambda name: f"a bad photo of a {name}."]
    monkeypatch.setitem(sys.modules, "open_clip", types.SimpleNamespace(**lists))
    _, names, templates = load_classification(spec)
    assert (names, templates) == (["tench", "goldfish", "cat"], ["a bad photo of a {}."])


def test_folders_that_are_no_classes_are_named(tmp_path):
    root = write_folder(tmp_path / "set", ["a", "b"])
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"one folder of pictures.*got none in \['empty'\]"):
        load_classification(f"imagefolder:{root}")
    shutil.rmtree(root / "empty")
    shutil.rmtree(root / "b")
    with pytest.raises(ValueError, match="two or more classes.*got 1 folders"):
        load_classification(f"imagefolder:{root}")
    with pytest.raises(FileNotFoundError, match="none"):
        load_classification(f"imagefolder:{tmp_path}/none")


def test_a_dataset_of_the_hub_finds_its_columns(tmp_path):
    kinds = ClassLabel(names=["red_fox", "dog"])
    folder = write_hub_dataset(tmp_path / "cifar10", label=([0, 1, 1], kinds), number=([1, 2, 3], Value("int64")))
    dataset, names, templates = load_classification(f"hub:{folder}")
    assert (dataset.column_names, dataset["label"][:]) == (["image", "label"], [0, 1, 1])
    assert (names, templates) == (["red fox", "dog"], list(PHOTO_TEMPLATES))
    assert len(load_classification(f"hub:{folder}:train").dataset) == 1
    with pytest.raises(ValueError, match="other"):
        load_classification(f"hub:{folder}:other")


def test_of_cifar_100s_labels_the_finer_one_is_taken_unless_another_is_named(tmp_path):
    fine, coarse = ClassLabel(names=["fox", "dog", "oak"]), ClassLabel(names=["animal", "tree"])
    folder = write_hub_dataset(tmp_path / "cifar100", fine_label=([0, 2], fine), coarse_label=([0, 1], coarse))
    assert load_classification(f"hub:{folder}").class_names == ["fox", "dog", "oak"]
    found = load_classification(f"hub:{folder},label=coarse_label,image=img")
    assert (found.class_names, found.dataset["label"][:]) == (["animal", "tree"], [0, 1])
    (tmp_path / "names.txt").write_text("a fox\na dog\nan oak\n")
    assert load_classification(f"hub:{folder},names={tmp_path}/names.txt").class_names == ["a fox", "a dog", "an oak"]


def test_columns_that_could_be_several_or_none_are_named(tmp_path):
    kinds = ClassLabel(names=["x", "y"])
    folder = write_hub_dataset(tmp_path / "two", shape=([0, 1], kinds), colour=([0, 1], kinds))
    with pytest.raises(ValueError, match=r"one column of type ClassLabel.*got \['shape', 'colour'\].*label=COLUMN"):
        load_classification(f"hub:{folder}")
    with pytest.raises(ValueError, match="Expected pictures .* in the column 'shape' of .*two"):
        load_classification(f"hub:{folder},image=shape,label=colour")


def test_a_webdataset_loads_by_spec_and_evaluates(tmp_path, tiny_clip):
    members = [member for n in range(6) for member in sample(n, n % 3)]
    root = write_set(tmp_path / "wds_small", [members[:6], members[6:]])
    dataset, names, templates = load_classification(f"wds:{root}:test@5")
    assert (len(dataset), names) == (5, ["dog", "red circle", "blue square"])
    assert templates == ["a photo of a {c}.", "a {c}"]
    for workers in (0, 1):
        result = evaluate_zero_shot(Encoder(*tiny_clip, batch_size=2, num_workers=workers), dataset, names, templates)
        assert result["n"] == 5 and 0 <= result["mean_per_class"] <= 1
    vectors = [m for n in range(4) for m in sample(n, [n % 2, 1, 0], label_kind="npy")]
    several = write_set(tmp_path / "wds_several", [vectors], dataset_type="multilabel")
    result = evaluate_zero_shot(Encoder(*tiny_clip), *load_classification(f"wds:{several}"))
    assert set(result) == {"map", "n"} and 0.5 <= result["map"] <= 1  # the second class is in all images


def test_prompts_of_a_webdataset_can_be_replaced_and_must_be_somewhere(tmp_path):
    root = write_set(tmp_path / "wds_bare", [sample(0, 1)], templates=None)
    with pytest.raises(FileNotFoundError, match="zeroshot_classification_templates.txt': 'wds_bare' has no prompts"):
        load_classification(f"wds:{root}")
    (tmp_path / "mine.txt").write_text("one {}\n")
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    options = f"templates={tmp_path}/mine.txt,names={tmp_path}/names.txt"
    assert load_classification(f"wds:{root},{options}")[1:] == (["x", "y", "z"], ["one {}"])


def test_an_address_is_one_field():
    assert parse_label_spec("wds:http://127.0.0.1:8000/a/wds_x").split == "test"
    assert parse_label_spec("wds:https://hub.example/wds_x:train@5").split == "train"
    with pytest.raises(ConnectionError, match="Cannot reach 'http://127.0.0.1:9/wds_x/val/nshards.txt'"):
        load_classification("wds:http://127.0.0.1:9/wds_x:val")


def test_a_wrong_spec_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No parquet file matches"):
        load_classification(f"parquet:{tmp_path}/none*.parquet")
    with pytest.raises(ValueError, match="Unknown kind 'imagenet'.*scenes.*parquet.*imagefolder.*hub.*wds"):
        load_classification("imagenet")
    with pytest.raises(ValueError, match="at least 9 rows"):
        load_classification("scenes:test,n=4,image_size=40@9")
    with pytest.raises(ValueError, match="Unknown option 'colour'"):
        load_classification(f"wds:{tmp_path},colour=red")


@pytest.mark.real_data
def test_real_pictures_load_and_evaluate(tmp_path, tiny_clip):
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}")
    cifar = load_classification(f"parquet:{SHARED}/cifar10/*.parquet@40")
    assert len(cifar.class_names) == 10
    result = evaluate_zero_shot(Encoder(*tiny_clip), *cifar)
    assert result["n"] == 40 and result["top1"] <= result["top5"]
    spec = f"parquet:{SHARED}/imagenet_sample/*.parquet,label=class_name@30"
    with pytest.raises(ValueError, match="synset"):
        load_classification(spec.replace("class_name", "sysnet"))
    imagenet = load_classification(spec)
    assert len(imagenet.class_names) > 990
    assert evaluate_zero_shot(Encoder(*tiny_clip), *imagenet._replace(templates=["a {}"]))["n"] == 30
    # The same photographs as folders named by synset, with a list of words beside them.
    rows = Dataset.from_parquet(f"{SHARED}/imagenet_sample/train.parquet").select(range(12))
    for row in rows.cast_column("image", Image(decode=False)):
        (tmp_path / "val" / row["synset"]).mkdir(parents=True)
        (tmp_path / "val" / row["synset"] / "0.JPEG").write_bytes(row["image"]["bytes"])
    (tmp_path / "synset_words.txt").write_text("\n".join(f"{r['synset']} {r['class_name']}" for r in rows))
    found = load_classification(f"imagefolder:{tmp_path}:val")
    assert found.class_names == [name for _, name in sorted(zip(rows["synset"], rows["class_name"], strict=True))]
    assert evaluate_zero_shot(Encoder(*tiny_clip), *found)["n"] == 12
