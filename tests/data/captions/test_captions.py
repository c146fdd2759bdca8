import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from modeling_dclip.data.captions import load_captions, load_mix, split_train_validation
from modeling_dclip.data.captions.files import karpathy_test_ids
from modeling_dclip.data.captions.tables import standardise_columns
from modeling_dclip.data.rows import coco_id, flickr_id

DATA = Path(__file__).parents[4] / "shared" / "data"


def write_coco(folder, draw, numbers=(9, 25, 30), captions=("a dog", "a cat"), draw_images=True):
    """A COCO captions file and its folder; returns the spec."""
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers]
    annotations = [
        {"id": 10 * n + k, "image_id": n, "caption": f"{text} {n}"} for n in numbers for k, text in enumerate(captions)
    ]
    for image in images if draw_images else ():
        draw(folder / "val2017" / image["file_name"], image["id"])
    (folder / "val2017").mkdir(parents=True, exist_ok=True)
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return f"coco:{path}:{folder / 'val2017'}"


def karpathy_entry(split, number=None, name=None, sentences=("a dog",)):
    """An entry as in dataset_coco.json (by number) or dataset_flickr30k.json (by name)."""
    entry = {"split": split, "sentences": [{"raw": text, "tokens": text.split()} for text in sentences], "imgid": 0}
    if number is None:
        return {**entry, "filename": name}
    return {**entry, "cocoid": number, "filepath": "val2014", "filename": f"COCO_val2014_{number:012d}.jpg"}


def write_karpathy(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": entries, "dataset": path.stem}))
    return path


def write_parquet(path, columns, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=1000)
    return path


# --- spec strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cocoa:a:b", "Unknown kind 'cocoa'.*Did you mean 'coco:a:b'.*Known kinds: .*karpathy"),
        ("coco:a", "Expected the form 'coco:ANNOTATIONS.json:IMAGE_FOLDER', got"),
        ("coco::b", "Expected the form 'coco"),
        ("disk", "Expected the form 'disk:FOLDER'"),
        ("disk:x@0", "count of at least 1"),
        ("coco:a:b,mising=skip", "Unknown option 'mising'.*Known options: missing"),
        ("scenes:test,number=3", "Unknown option 'number'.*Known options: n,"),
        ("scenes:test,n=many", "Expected an integer for the option 'n' in 'scenes:test', got 'many'"),
        ("scenes:test,n=2.5", "Expected an integer for the option 'n'.*got '2.5'"),
        ("scenes:test,image_size=true", "Expected an integer for the option 'image_size'.*got 'true'"),
    ],
)
def test_a_wrong_spec_names_the_known_forms(spec, message):
    with pytest.raises(ValueError, match=message):
        load_captions(spec)


# --- ids -------------------------------------------------------------------------------------------------------------


def test_a_picture_has_one_id_under_every_file_name():
    assert {coco_id(v) for v in (391895, "000000391895.jpg", "val2014/COCO_val2014_000000391895.jpg")} == {
        "coco-391895"
    }
    assert flickr_id("1000268201_693b08cb0e.jpg") == flickr_id("1000268201.jpg") == "flickr-1000268201"
    assert flickr_id("my_dog_1.jpg") != flickr_id("my_dog_2.jpg")
    with pytest.raises(ValueError, match="ends in a number, got 'dog.jpg'"):
        coco_id("dog.jpg")


# --- COCO ------------------------------------------------------------------------------------------------------------


def test_coco_rows_follow_the_schema_and_images_stay_paths(tmp_path, draw):
    dataset = load_captions(write_coco(tmp_path, draw))
    assert dataset.features == Features(image_id=Value("string"), image=Image(), captions=List(Value("string")))
    assert dataset["image_id"][:] == ["coco-9", "coco-25", "coco-30"]
    assert dataset[1]["captions"] == ["a dog 25", "a cat 25"]
    assert dataset[1]["image"].size == (32, 24)
    stored = dataset.cast_column("image", Image(decode=False))[0]["image"]
    assert stored == {"bytes": None, "path": str(tmp_path / "val2017" / "000000000009.jpg")}


def test_coco_missing_images_are_counted_and_named(tmp_path, draw, caplog):
    spec = write_coco(tmp_path, draw, numbers=range(1, 9))
    for number in range(2, 9):
        (tmp_path / "val2017" / f"{number:012d}.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"7 of 8 image files are missing, first: coco-2 \('.*02.jpg'\)"
    ) as error:
        load_captions(spec)
    assert "coco-6" in str(error.value) and "coco-7" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert load_captions(f"{spec},missing=skip")["image_id"][:] == ["coco-1"]
    assert "7 of 8 image files are missing" in caplog.text
    with pytest.raises(ValueError, match="Expected missing to be one of"):
        load_captions(f"{spec},missing=ignore")


def test_coco_images_without_captions_are_rejected_and_reported(tmp_path, draw, caplog):
    spec = write_coco(tmp_path, draw)
    path = tmp_path / "captions.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        if annotation["image_id"] == 25:
            annotation["caption"] = " \n"
    content["annotations"][0]["caption"] = ""
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        dataset = load_captions(spec)
    assert dataset["image_id"][:] == ["coco-9", "coco-30"]
    assert dataset[0]["captions"] == ["a cat 9"]
    assert "rejected 1 image without a caption, first ids: coco-25" in caplog.text


def test_coco_without_any_caption_is_an_error(tmp_path, draw):
    with pytest.raises(ValueError, match="No row with an image and a caption is left"):
        load_captions(write_coco(tmp_path, draw, captions=()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{'images'", "invalid JSON"),
        ("[]", "Expected a JSON object.*got a list"),
        ('{"images": []}', "no key 'annotations'; it has .'images'"),
        ('{"images": [{"id": 1}], "annotations": []}', "no key 'file_name'; it has .'id'"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 4, "image_id": 1, "bbox": []}]}',
            "Annotation 4 .*no key 'caption'",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 4, "image_id": 2, "caption": "x"}]}',
            "Annotation 4 .*belongs to image 2",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "1 image ids come more than once .*coco-1",
        ),
    ],
)
def test_coco_malformed_files_are_told_apart(tmp_path, content, message):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_captions(f"coco:{tmp_path / 'captions.json'}:{tmp_path}")


def test_coco_missing_file_and_folder_are_named(tmp_path, draw):
    with pytest.raises(FileNotFoundError, match="No COCO captions file at '.*nowhere.json'"):
        load_captions(f"coco:{tmp_path / 'nowhere.json'}:{tmp_path}")
    write_coco(tmp_path, draw)
    with pytest.raises(FileNotFoundError, match="No image folder at '.*nowhere'"):
        load_captions(f"coco:{tmp_path / 'captions.json'}:{tmp_path / 'nowhere'}")


# --- Karpathy's splits -----------------------------------------------------------------------------------------------


def test_karpathy_train_includes_restval_and_finds_both_layouts(tmp_path, draw):
    entries = [karpathy_entry(split, n) for n, split in enumerate(("train", "restval", "val", "test", "train"), 1)]
    path = write_karpathy(tmp_path / "dataset_coco.json", entries)
    draw(tmp_path / "val2014" / "COCO_val2014_000000000001.jpg")
    draw(tmp_path / "train2017" / "000000000002.jpg")
    draw(tmp_path / "COCO_val2014_000000000005.jpg")
    dataset = load_captions(f"karpathy:{path}:{tmp_path}:train")
    assert dataset["image_id"][:] == ["coco-1", "coco-2", "coco-5"]
    assert dataset[1]["image"].size == (32, 24)
    with pytest.raises(ValueError, match="Unknown split 'dev'.*'restval', 'test', 'train', 'val'"):
        load_captions(f"karpathy:{path}:{tmp_path}:dev")
    with pytest.raises(FileNotFoundError, match="1 of 1 image files are missing, first: coco-4"):
        load_captions(f"karpathy:{path}:{tmp_path}:test")


def test_karpathy_reads_flickr_by_file_name(tmp_path, draw):
    entries = [karpathy_entry("train", name="1000092795.jpg", sentences=("Two men.", "Two friends."))]
    path = write_karpathy(tmp_path / "dataset_flickr30k.json", entries)
    draw(tmp_path / "1000092795.jpg")
    dataset = load_captions(f"karpathy:{path}:{tmp_path}:train")
    assert dataset[0]["image_id"] == "flickr-1000092795"
    assert dataset[0]["captions"] == ["Two men.", "Two friends."]


def test_karpathy_files_without_keys_or_test_images_are_errors(tmp_path):
    with pytest.raises(ValueError, match="has no key 'images'; it has .'annotations'"):
        (tmp_path / "a.json").write_text('{"annotations": []}')
        karpathy_test_ids(tmp_path / "a.json")
    with pytest.raises(ValueError, match="No image of the split 'test'"):
        karpathy_test_ids(write_karpathy(tmp_path / "b.json", [karpathy_entry("train", 1)]))
    with pytest.raises(ValueError, match="1 image ids come more than once .*coco-1"):
        path = write_karpathy(tmp_path / "c.json", [karpathy_entry("train", 1), karpathy_entry("train", 1)])
        load_captions(f"karpathy:{path}:{tmp_path}:train")


def test_karpathy_test_images_leave_every_source_under_every_file_name(tmp_path, draw):
    coco_split = write_karpathy(
        tmp_path / "dataset_coco.json", [karpathy_entry("test", 25), karpathy_entry("train", 9)]
    )
    names = ("1000268201.jpg", "2000.jpg")
    flickr_split = write_karpathy(
        tmp_path / "dataset_flickr30k.json",
        [karpathy_entry("test", name=names[0]), karpathy_entry("val", name=names[1])],
    )
    excluded = karpathy_test_ids(coco_split) | karpathy_test_ids(flickr_split)
    assert excluded == {"coco-25", "flickr-1000268201"}

    coco_2017 = write_coco(tmp_path / "coco", draw, numbers=(9, 25))
    draw(tmp_path / "val2014" / "COCO_val2014_000000000009.jpg")
    coco_karpathy = f"karpathy:{coco_split}:{tmp_path}:train"
    table = {"image": [str(draw(tmp_path / "a.png"))] * 2, "captions": [["x"], ["y"]]}
    coco_parquet = write_parquet(
        tmp_path / "c.parquet",
        {**table, "image_id": ["COCO_val2014_000000000025.jpg", "COCO_train2014_000000000031.jpg"]},
    )
    flickr8k = write_parquet(
        tmp_path / "f.parquet", {**table, "image_id": ["1000268201_693b08cb0e.jpg", "3000_0123456789.jpg"]}
    )
    (tmp_path / "flickr").mkdir()
    (tmp_path / "flickr" / "results.csv").write_text(
        "image_name| comment_number| comment\n" + "".join(f"{name}| 0| text\n" for name in names)
    )
    for name in names:
        draw(tmp_path / "flickr" / name)
    specs = [
        f"parquet:{coco_parquet},source=coco",
        f"parquet:{flickr8k},source=flickr",
        f"flickr30k:{tmp_path / 'flickr' / 'results.csv'}:{tmp_path / 'flickr'}",
        coco_2017,
    ]
    assert excluded & {i for spec in (*specs, coco_karpathy) for i in load_captions(spec)["image_id"]} == excluded
    mixed = load_mix(specs, seed=0, exclude_ids=excluded)["image_id"][:]
    assert mixed == ["coco-31", "flickr-3000", "flickr-2000", "coco-9"]
    # Counts are drawn from what is left: a count that only the test image could fill is an error.
    with pytest.raises(ValueError, match=r"Expected at least 2 images in 'coco:.*@2', got 1 \(1 left out by id\)"):
        load_mix([f"{coco_2017}@2"], seed=0, exclude_ids=excluded)


# --- Flickr30k -------------------------------------------------------------------------------------------------------


def write_results(folder, text, draw, names=("1.jpg", "2.jpg")):
    for name in names:
        draw(folder / name)
    (folder / "results.csv").write_text(text)
    return f"flickr30k:{folder / 'results.csv'}:{folder}"


def test_flickr30k_groups_comments_and_reports_the_row_without_its_second_pipe(tmp_path, draw, caplog):
    text = (
        "image_name| comment_number| comment\n"
        "1.jpg| 0| A dog | a cat .\n1.jpg| 1| A dog .\n2.jpg| 0| A man .\n2.jpg| 4   A dog runs across the grass .\n\n"
    )
    with caplog.at_level(logging.WARNING):
        dataset = load_captions(write_results(tmp_path, text, draw))
    assert dataset["image_id"][:] == ["flickr-1", "flickr-2"]
    assert dataset["captions"][:] == [["A dog | a cat .", "A dog ."], ["A man .", "A dog runs across the grass ."]]
    assert "read 1 rows without their second pipe, lines 5" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("image,caption\n1.jpg,x\n", "Expected the header"),
        ("image_name| comment_number| comment\n1.jpg A dog\n", "in line 2"),
        ("image_name| comment_number| comment\n1.jpg| 0| a\n1.jpg| A dog\n", "in line 3"),
        ("image_name| comment_number| comment\n", "No row with an image and a caption"),
    ],
)
def test_flickr30k_malformed_rows_name_their_line(tmp_path, draw, text, message):
    with pytest.raises(ValueError, match=message):
        load_captions(write_results(tmp_path, text, draw))


# --- Conceptual Captions ---------------------------------------------------------------------------------------------


def test_conceptual_pictures_are_found_by_row_number_padded_or_not(tmp_path, draw, caplog):
    table = tmp_path / "train.tsv"
    table.write_text("a dog\thttp://x/1\na cat\thttp://x/2\na bird\thttp://x/3\n")
    draw(tmp_path / "images" / "0.png")
    draw(tmp_path / "images" / "00000" / "000000002.jpg")
    spec = f"conceptual:{table}:{tmp_path / 'images'}"
    with pytest.raises(FileNotFoundError, match="1 of 3 image files are missing, first: conceptual-train-1"):
        load_captions(spec)
    with caplog.at_level(logging.WARNING):
        dataset = load_captions(f"{spec},missing=skip")
    assert dataset["image_id"][:] == ["conceptual-train-0", "conceptual-train-2"]
    assert dataset["captions"][:] == [["a dog"], ["a bird"]]
    draw(tmp_path / "images" / "00.jpg")
    with pytest.raises(ValueError, match="Two files stand for row 0"):
        load_captions(spec)


def test_conceptual_third_column_names_the_file(tmp_path, draw):
    table = tmp_path / "train.tsv"
    table.write_text("a dog\thttp://x/1\tb/one.jpg\n")
    draw(tmp_path / "b" / "one.jpg")
    assert load_captions(f"conceptual:{table}:{tmp_path}")["image_id"][:] == ["conceptual-b/one.jpg"]
    table.write_text("a dog\thttp://x/1\tb/one.jpg\na cat\thttp://x/2\tb/one.jpg\n")
    with pytest.raises(ValueError, match="1 image ids come more than once .*conceptual-b/one.jpg"):
        load_captions(f"conceptual:{table}:{tmp_path}")
    table.write_text("a dog http://x/1\n")
    with pytest.raises(ValueError, match="Expected 'caption<tab>url.*in line 1"):
        load_captions(f"conceptual:{table}:{tmp_path}")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_parquet_takes_bytes_paths_and_structs_alike(tmp_path, draw):
    picture = draw(tmp_path / "a.png")
    stored = picture.read_bytes()
    captions = [["a dog", "a cat"]]
    columns = {
        "bytes": pa.table({"image": [stored], "captions": captions}),
        "path": pa.table({"image": [str(picture)], "captions": captions}),
        "struct": pa.table({"image": [{"bytes": stored, "path": None}], "captions": captions}),
    }
    for name, table in columns.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        row = load_captions(f"parquet:{tmp_path / name}.parquet")[0]
        assert row["image"].convert("RGB").tobytes() == PILImage.open(picture).tobytes()
        assert row["captions"] == captions[0]
        assert row["image_id"] == f"{tmp_path.name}/{name}-0"


def test_parquet_rows_of_one_image_merge_only_where_the_id_column_says_so(tmp_path, draw):
    picture = str(draw(tmp_path / "a.png"))
    path = write_parquet(
        tmp_path / "a.parquet",
        {"picture": [picture] * 4, "text": ["one", "two", "three", None], "key": [7, 8, 7, 8]},
    )
    merged = load_captions(f"parquet:{path},image=picture,captions=text,image_id=key")
    assert merged["image_id"][:] == ["7", "8"]
    assert merged["captions"][:] == [["one", "three"], ["two"]]
    separate = load_captions(f"parquet:{path},image=picture,captions=text")
    assert separate["captions"][:] == [["one"], ["two"], ["three"]]


def test_parquet_keeps_the_columns_of_the_schema_only(tmp_path, draw):
    columns = {
        "image": [str(draw(tmp_path / "a.png"))],
        "captions": [["x"]],
        "boxes": [[[0.0, 0.0, 4.0, 4.0]]],
        "box_scores": [[1.0]],
        "sentence_id": [3],
    }
    dataset = load_captions(f"parquet:{write_parquet(tmp_path / 'a.parquet', columns)}")
    assert dataset.column_names == ["image_id", "image", "captions", "boxes", "box_scores"]


def test_parquet_files_of_a_glob_are_read_in_order(tmp_path, draw):
    for name in ("b", "a"):
        columns = {"image": [str(draw(tmp_path / f"{name}.png"))], "captions": [[name]]}
        write_parquet(tmp_path / "many" / f"{name}.parquet", columns)
    dataset = load_captions(f"parquet:{tmp_path}/many/*.parquet")
    assert dataset["image_id"][:] == ["many/a-0", "many/b-0"]
    assert dataset["captions"][:] == [["a"], ["b"]]


def test_parquet_errors_name_columns_files_and_rows(tmp_path, draw, caplog):
    with pytest.raises(FileNotFoundError, match="No parquet file matches"):
        load_captions(f"parquet:{tmp_path}/*.parquet")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="broken.parquet' is not readable as parquet"):
        load_captions(f"parquet:{broken}")
    picture = str(draw(tmp_path / "a.png"))
    columns = {"image": [picture, str(tmp_path / "gone.png")], "captions": [["x"], ["y"]], "key": ["a", None]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(
        ValueError, match=r"no column 'text'; its columns are \['image', 'captions', 'key'.*,captions="
    ):
        load_captions(f"parquet:{path},captions=text")
    with pytest.raises(ValueError, match="to hold text or lists of text, got"):
        standardise_columns(Dataset.from_dict({"image": [picture], "captions": [[1, 2]]}))
    with pytest.raises(FileNotFoundError, match=r"1 of 2 image files are missing, first: .*a-1 \('.*gone.png'\)"):
        load_captions(f"parquet:{path}")
    with caplog.at_level(logging.WARNING):
        assert len(load_captions(f"parquet:{path},missing=skip")) == 1
    with pytest.raises(ValueError, match="row 1 has no image id in the column 'key'"):
        load_captions(f"parquet:{path},image_id=key")
    with pytest.raises(ValueError, match="Expected source to be one of .'coco', 'flickr'., .*got 'imagenet'"):
        load_captions(f"parquet:{path},image_id=key,source=imagenet")


def test_a_parquet_file_damaged_inside_is_named(tmp_path, draw):
    columns = {"image": [str(draw(tmp_path / "a.png"))] * 50, "captions": [[f"caption {i}"] for i in range(50)]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet' is not readable as parquet"):
        load_captions(f"parquet:{path}")


def test_empty_tables_and_rows_without_an_image_are_errors(tmp_path):
    features = Features(image=Image(), captions=List(Value("string")))
    path = write_parquet(tmp_path / "a.parquet", {"image": [], "captions": []}, features)
    with pytest.raises(ValueError, match="No row with an image and a caption"):
        load_captions(f"parquet:{path}")
    with pytest.raises(ValueError, match="image dataset-0 has neither bytes nor a path"):
        standardise_columns(Dataset.from_dict({"image": [None], "captions": [["x"]]}, features=features))
    with pytest.raises(ValueError, match="No row with an image and a caption is left of dataset"):
        standardise_columns(
            Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "captions": [["", "  "]]}, features=features)
        )


def test_a_hub_name_may_be_a_local_folder(tmp_path, draw):
    columns = {"image": [str(draw(tmp_path / "a.png"))], "caption": ["a dog"]}
    write_parquet(tmp_path / "repo" / "train.parquet", columns)
    dataset = load_captions(f"hub:{tmp_path / 'repo'}:train,captions=caption")
    assert dataset[0]["captions"] == ["a dog"]
    with pytest.raises(ValueError, match="(?i)split"):
        load_captions(f"hub:{tmp_path / 'repo'}:test,captions=caption")


def test_a_saved_dataset_keeps_all_its_columns(tmp_path, draw):
    dataset = load_captions(write_coco(tmp_path, draw)).add_column("teacher_embeds", [[0.5], [0.25], [1.0]])
    dataset.save_to_disk(tmp_path / "saved")
    again = load_captions(f"disk:{tmp_path / 'saved'}")
    assert again.column_names == [*dataset.column_names]
    assert again[2]["teacher_embeds"] == [1.0]
    (table,) = (tmp_path / "saved").glob("*.arrow")
    table.write_bytes(table.read_bytes()[:800])
    with pytest.raises(ValueError, match="The dataset folder '.*saved' is damaged"):
        load_captions(f"disk:{tmp_path / 'saved'}")


def test_a_saved_dataset_outside_the_schema_is_an_error(tmp_path, draw):
    dataset = load_captions(write_coco(tmp_path, draw))
    dataset.remove_columns("image_id").save_to_disk(tmp_path / "no_id")
    with pytest.raises(ValueError, match="Expected the column 'image_id'.*no_id"):
        load_captions(f"disk:{tmp_path / 'no_id'}")
    datasets.concatenate_datasets([dataset, dataset]).save_to_disk(tmp_path / "twice")
    with pytest.raises(ValueError, match="3 image ids come more than once .*coco-9, coco-25, coco-30"):
        load_captions(f"disk:{tmp_path / 'twice'}")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds the splits .'train'."):
        load_captions(f"disk:{tmp_path / 'splits'}")
    with pytest.raises(FileNotFoundError, match="No dataset folder at"):
        load_captions(f"disk:{tmp_path / 'nowhere'}")


# --- draws, mixes, splits --------------------------------------------------------------------------------------------


def test_a_draw_depends_on_ids_and_seed_alone(tmp_path, draw):
    spec = write_coco(tmp_path / "a", draw, numbers=range(1, 31))
    reverse = write_coco(tmp_path / "b", draw, numbers=range(30, 0, -1))
    ten = load_captions(f"{spec}@10", seed=3)["image_id"][:]
    assert ten == load_captions(f"{spec}@10", seed=3)["image_id"][:]
    assert set(ten) == set(load_captions(f"{reverse}@10", seed=3)["image_id"])
    assert set(load_captions(f"{spec}@4", seed=3)["image_id"]) < set(ten)
    assert set(ten) != set(load_captions(f"{spec}@10", seed=4)["image_id"])
    without = load_captions(f"{spec}@9", seed=3, exclude_ids=ten[:1])["image_id"][:]
    assert set(without) == set(ten[1:])
    assert ten == sorted(ten, key=lambda i: int(i.removeprefix("coco-")))


def test_a_mix_has_the_counts_asked_for_and_the_shared_columns(tmp_path, draw):
    coco = write_coco(tmp_path, draw, numbers=range(1, 21))
    mixed = load_mix([f"{coco}@5", "scenes:train,n=8,captions=coarse@3"], seed=0)
    assert mixed.column_names == ["image_id", "image", "captions"]
    assert [i.split("-")[0] for i in mixed["image_id"]] == ["coco"] * 5 + ["scenes"] * 3
    assert all(row["image"].size[0] > 0 and row["captions"] for row in mixed)
    assert load_mix(["scenes:train,n=4"], seed=0).column_names[-2:] == ["boxes", "box_scores"]


def test_a_mix_refuses_overlaps_and_counts_that_are_not_there(tmp_path, draw):
    spec = write_coco(tmp_path, draw)
    with pytest.raises(ValueError, match="3 image ids come more than once in the mix"):
        load_mix([spec, spec], seed=0)
    with pytest.raises(ValueError, match="Expected at least 4 images in 'coco:.*@4', got 3"):
        load_mix([f"{spec}@4"], seed=0)
    with pytest.raises(ValueError, match="is left of .* after leaving out 3 images"):
        load_mix([spec], seed=0, exclude_ids={"coco-9", "coco-25", "coco-30"})
    with pytest.raises(ValueError, match="Expected a list of one or more specs"):
        load_mix(spec, seed=0)
    with pytest.raises(ValueError, match="exclude_ids to be a collection of image ids, got the one string"):
        load_mix([spec], seed=0, exclude_ids="coco-9")


def test_the_papers_75000_rows_split_into_67500_and_7500():
    dataset = Dataset.from_dict({"image_id": [f"coco-{n}" for n in range(75_000)]})
    train, validation = split_train_validation(dataset, 0.9, seed=0)
    assert (len(train), len(validation)) == (67_500, 7_500)
    assert not set(train["image_id"][:]) & set(validation["image_id"])
    # Proportionate in every part of the rows: 5 standard deviations of a draw of 7,500.
    first_part = sum(int(i.removeprefix("coco-")) < 50_000 for i in validation["image_id"][:])
    assert abs(first_part - 5_000) < 5 * (7_500 * (2 / 3) * (1 / 3)) ** 0.5
    other = split_train_validation(dataset.select(range(74_999, -1, -1)), 0.9, seed=0)[1]
    assert set(other["image_id"][:]) == set(validation["image_id"])
    assert set(split_train_validation(dataset, 0.9, seed=1)[1]["image_id"]) != set(validation["image_id"][:])


def test_a_split_is_exact_where_binary_fractions_are_not():
    ten = Dataset.from_dict({"image_id": [str(i) for i in range(10)]})
    assert [len(split_train_validation(ten, fraction)[0]) for fraction in (0.1, 0.3, 0.7)] == [1, 3, 7]


@pytest.mark.parametrize(("fraction", "message"), [(1.0, "fraction in"), (0.0, "fraction in"), (0.01, "rows on both")])
def test_a_split_refuses_empty_sides(fraction, message):
    with pytest.raises(ValueError, match=message):
        split_train_validation(Dataset.from_dict({"image_id": list("abc")}), fraction)


# --- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not (DATA / "coco_val_sample").is_dir(), reason="needs ../shared/data/coco_val_sample")
def test_the_coco_sample_has_its_128_images_and_641_captions():
    folder = DATA / "coco_val_sample"
    dataset = load_captions(f"coco:{folder / 'annotations/captions_val2017.json'}:{folder / 'val2017'}")
    assert (len(dataset), sum(map(len, dataset["captions"]))) == (128, 641)
    assert dataset[0]["image"].size == (640, 426)


@pytest.mark.real_data
@pytest.mark.skipif(not (DATA / "flickr8k").is_dir(), reason="needs ../shared/data/flickr8k")
def test_flickr8k_parquet_has_7000_different_photos_with_five_captions():
    dataset = load_captions(f"parquet:{DATA}/flickr8k/*.parquet,source=flickr")
    assert len(set(dataset["image_id"][:])) == 7_000
    assert all(image_id.removeprefix("flickr-").isdigit() for image_id in dataset["image_id"][:])
    assert set(map(len, dataset["captions"])) == {5}
    assert dataset[0]["image"].size == (224, 224)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("caption\turl", "Line 1 of '.*t.tsv' is the header 'caption.turl'"),
        ("Text\tIMAGE_URL\timage", "Line 1 of '.*t.tsv' is the header"),
        ("http://host/a.jpg\ta dog", "Expected 'caption<tab>url' in line 1 of '.*t.tsv', got .*: swap them"),
    ],
)
def test_a_conceptual_table_with_a_header_or_swapped_columns_pairs_no_picture_wrongly(tmp_path, draw, first, message):
    for row in range(3):
        draw(tmp_path / "images" / f"{row}.jpg", row)
    rest = "a cat\thttp://host/b.jpg\ta bird\n" if first.count("\t") == 2 else "a cat\thttp://host/b.jpg\n"
    (tmp_path / "t.tsv").write_text(f"{first}\n{rest}", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_captions(f"conceptual:{tmp_path / 't.tsv'}:{tmp_path / 'images'},missing=skip")
