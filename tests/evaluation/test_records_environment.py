"""A fingerprint follows the content, not the name; a revision follows the weights."""

from modeling_dclip.data.columns import dataset_fingerprint
from modeling_dclip.evaluation.records import environment


def test_fingerprint_follows_content_and_order_not_the_storage(tiny_scenes, tmp_path):
    expected = dataset_fingerprint(tiny_scenes)
    tiny_scenes.save_to_disk(tmp_path / "saved")
    assert dataset_fingerprint(type(tiny_scenes).load_from_disk(str(tmp_path / "saved"))) == expected
    captions = [["changed"], *tiny_scenes["captions"][1:]]
    changed = tiny_scenes.remove_columns("captions").add_column("captions", captions)
    others = [tiny_scenes.select([1, 0, *range(2, 8)]), tiny_scenes.select(range(7)), changed]
    assert len({expected, *map(dataset_fingerprint, others)}) == 4


def test_fingerprint_reads_the_pixels_of_files(tiny_scenes, tmp_path):
    from datasets import Dataset, Features, Image, Value

    def from_file(colour):
        from PIL import Image as PILImage

        PILImage.new("RGB", (4, 4), colour).save(tmp_path / "same.png")
        rows = {"image_id": ["a"], "image": [str(tmp_path / "same.png")]}
        return dataset_fingerprint(Dataset.from_dict(rows, Features(image_id=Value("string"), image=Image())))

    assert from_file("red") == from_file("red") != from_file("blue")


def test_environment_names_packages_and_machine():
    versions, hardware = environment()
    assert versions["torch"] and hardware["cpu_count"] >= 1 and isinstance(hardware["gpus"], list)
