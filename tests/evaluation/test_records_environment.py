"""A fingerprint follows the content, not the name; a revision follows the weights."""

import pytest
from transformers import AutoModel

from modeling_dclip.data.columns import dataset_fingerprint
from modeling_dclip.encoders.fingerprints import model_revision
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


def test_revision_of_a_folder_follows_the_weights(tiny_clip_dir, tiny_clip, tmp_path):
    model = AutoModel.from_pretrained(tiny_clip_dir)
    revision = model_revision(tiny_clip_dir, model)
    assert revision.startswith("sha256:") and revision == model_revision(str(tiny_clip_dir), tiny_clip[0])
    model.visual_projection.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert model_revision(tmp_path, model) != revision


def test_revision_of_a_folder_follows_the_names_of_its_files(tmp_path, tiny_clip):
    revisions = set()
    for name in ("b", "c"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(b"the same")
        revisions.add(model_revision(folder, tiny_clip[0]))
    assert len(revisions) == 2


def test_a_folder_without_safetensors_is_named(tmp_path, tiny_clip):
    with pytest.raises(FileNotFoundError, match="safetensors in "):
        model_revision(tmp_path, tiny_clip[0])


def test_revision_of_the_hub_is_its_commit(tiny_clip_dir):
    model = AutoModel.from_pretrained(tiny_clip_dir)
    with pytest.raises(ValueError, match="commit hash with the model 'someone/model'"):
        model_revision("someone/model", model)
    model.config._commit_hash = "abc"
    assert model_revision("someone/model", model) == "commit:abc"


def test_environment_names_packages_and_machine():
    versions, hardware = environment()
    assert versions["torch"] and hardware["cpu_count"] >= 1 and isinstance(hardware["gpus"], list)
