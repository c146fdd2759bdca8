"""Images without captions: found in folders, told from captioned ones, and never taken for them."""

import logging

import pytest
from datasets import Image

from modeling_dclip.data.captions import load_captions, load_mix, load_uncaptioned
from modeling_dclip.data.captions.files import drop_captions, read_images
from modeling_dclip.data.rows import CAPTION_FEATURES
from modeling_dclip.data.scenes import load_scenes


@pytest.fixture
def folder(tmp_path, draw):
    for seed, name in enumerate(["b.png", "a.JPG", "deep/er/a.jpeg", "deep/c.webp"]):
        draw(tmp_path / "album" / name, seed)
    (tmp_path / "album" / "notes.txt").write_text("no picture")
    return tmp_path / "album"


def test_a_folder_is_searched_to_the_bottom_and_ids_are_paths(folder):
    dataset = load_uncaptioned([f"images:{folder}"], seed=0)
    assert dataset["image_id"][:] == ["album/a.JPG", "album/b.png", "album/deep/c.webp", "album/deep/er/a.jpeg"]
    assert dataset["captions"][:] == [[]] * 4
    assert dataset.features == CAPTION_FEATURES and dataset[3]["image"].size == (32, 24)
    stored = dataset.cast_column("image", Image(decode=False))[1]["image"]
    assert stored == {"bytes": None, "path": str(folder / "b.png")}


def test_the_names_of_known_collections_give_the_ids_that_all_readers_share(tmp_path, draw):
    draw(tmp_path / "train2017" / "000000000009.jpg")
    draw(tmp_path / "flickr" / "1000268201_693b08cb0e.jpg")
    assert read_images(str(tmp_path / "train2017"), source="coco")["image_id"][:] == ["coco-9"]
    specs = [f"images:{tmp_path / 'flickr'},source=flickr", f"images:{tmp_path / 'train2017'},source=coco"]
    assert load_uncaptioned(specs, seed=0, exclude_ids={"coco-9x"})["image_id"][:] == ["flickr-1000268201", "coco-9"]
    with pytest.raises(ValueError, match="Expected source to be one of .'coco', 'flickr'., got 'imagenet'"):
        load_uncaptioned([f"images:{tmp_path},source=imagenet"], seed=0)


def test_a_folder_without_pictures_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"Expected pictures .*\.webp.* in '.*empty' or below, got none among 0 files"
    ):
        load_uncaptioned([f"images:{tmp_path / 'empty'}"], seed=0)
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="none among 1 file: 1 .txt .first: 'notes.txt'"):
        load_uncaptioned([f"images:{tmp_path / 'empty'}"], seed=0)
    with pytest.raises(FileNotFoundError, match="No image folder at '.*nowhere'"):
        load_uncaptioned([f"images:{tmp_path / 'nowhere'}"], seed=0)


def test_a_folder_is_no_captioned_dataset(folder):
    for load in (lambda spec: load_captions(spec), lambda spec: load_mix([spec], seed=0)):
        with pytest.raises(ValueError, match="album' has images and no captions.*uncaptioned_datasets"):
            load(f"images:{folder}")


def test_images_are_drawn_and_left_out_by_id_and_counted(folder, caplog):
    with caplog.at_level(logging.INFO):
        dataset = load_uncaptioned([f"images:{folder}@2"], seed=0, exclude_ids={"album/b.png", "album/a.JPG"})
    assert dataset["image_id"][:] == ["album/deep/c.webp", "album/deep/er/a.jpeg"]
    assert "left out 2 images that another part of the run holds" in caplog.text
    ids = set(read_images(str(folder))["image_id"])
    with pytest.raises(ValueError, match="No row with an image is left of 'images:.*after leaving out 4"):
        load_uncaptioned([f"images:{folder}"], seed=0, exclude_ids=ids)


def test_any_captioned_source_loses_its_captions_and_keeps_its_boxes(folder):
    scenes = load_scenes("train", n=3, image_size=32)
    dataset = load_uncaptioned(["scenes:train,n=3,image_size=32"], seed=0)
    assert dataset.column_names == ["image_id", "image", "boxes", "box_scores", "captions"]
    assert dataset["captions"][:] == [[]] * 3 and dataset["boxes"][:] == scenes["boxes"][:]
    mixed = load_uncaptioned(["scenes:train,n=3,image_size=32", f"images:{folder}"], seed=0)
    assert len(mixed) == 7 and mixed.column_names == ["image_id", "image", "captions"]
    assert mixed[0]["image"].size == (32, 32)
    with pytest.raises(ValueError, match="4 image ids come more than once"):
        load_uncaptioned([f"images:{folder}", f"images:{folder}"], seed=0)


def test_dropping_captions_drops_nothing_else():
    scenes = load_scenes("train", n=2, image_size=32)
    bare = drop_captions(scenes)
    assert bare.features["captions"] == CAPTION_FEATURES["captions"] and bare["captions"][:] == [[], []]
    assert bare["image_id"][:] == scenes["image_id"][:] and set(bare.column_names) == set(scenes.column_names)
