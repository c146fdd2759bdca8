"""An index gives the answers of exact comparison, computes nothing twice, and names whatever is wrong."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.processes import run_together
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from modeling_dclip import DCLIPModel
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.captions.files import read_images
from modeling_dclip.data.images import UnreadableImageError
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.benchmarks.retrieval_index import find_faiss
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.hub import index as search_index
from modeling_dclip.hub.index import SearchIndex, read_manifest
from modeling_dclip.hub.index import build as index_building
from modeling_dclip.hub.index import embeddings as stored_embeddings
from modeling_dclip.hub.index.__main__ import describe_build, main
from modeling_dclip.hub.index.build import EmbeddingOptions, build_index

pytest.importorskip("faiss")

CHUNKS_OF_5 = EmbeddingOptions(chunk_rows=5)
TEXTS = ["a red dog", "the small blue circle and a large square", "a photo of the left square"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of 12 drawn scenes, three of them in a folder below."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for number, row in enumerate(load_scenes("test", n=12, captions_per_image=1, image_size=48)):
        row["image"].save(folder / ("more" if number % 4 == 3 else "") / f"{number:02d}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def own_pictures(pictures, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


@pytest.fixture(scope="module")
def other_model(tiny_clip_dir, tmp_path_factory):
    """The same architecture and processor with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_clip_dir, folder)
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    torch.nn.init.normal_(model.visual_projection.weight, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(tiny_clip_dir, pictures, tmp_path_factory):
    """The index of all pictures."""
    return build_index(
        str(tiny_clip_dir), str(pictures), tmp_path_factory.mktemp("built") / "index", options=CHUNKS_OF_5
    )


@pytest.fixture
def copied(built, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(built.folder, tmp_path / "index"))


def file_of(folder, kind):
    (path,) = folder.glob(f"{kind}-*")
    return path


def test_answers_are_those_of_comparing_everything(built, tiny_clip_dir, pictures):
    model, processor, _ = load_dual_encoder(tiny_clip_dir)
    dataset = read_images(str(pictures))
    images, texts = embed_images(Encoder(model, processor), dataset), embed_texts(Encoder(model, processor), TEXTS)
    for text, scores in zip(TEXTS, texts @ images.T, strict=True):
        hits = built.search(text, top_k=5)
        best = scores.argsort(descending=True)[:5]
        assert [hit.image_id for hit in hits] == [dataset["image_id"][int(row)] for row in best]
        assert np.allclose([hit.score for hit in hits], scores[best], atol=2e-6)


def test_every_picture_finds_itself_and_says_where_it_is(built, pictures):
    for path in sorted(pictures.rglob("*.png")):
        for query in (path, Image.open(path)):
            hit = built.search(query, top_k=1, keep_same=True)[0]
            assert hit.path == str(path) and hit.score == pytest.approx(1, abs=1e-5)
            assert hit.image_id == f"{pictures.name}/{path.relative_to(pictures).as_posix()}"


def test_more_answers_than_images_are_all_images(built):
    assert len(built.search("a dog", top_k=100)) == len(built) == 12


def test_an_index_on_disk_is_found_again_without_naming_its_model(built):
    again = SearchIndex.load(built.folder)
    assert again.search("a red dog", 3) == built.search("a red dog", 3)
    assert again.manifest["computed"] == 12 and again.manifest["skipped"] == []


def count_embedded(monkeypatch, stop_after=None):
    """How many images are embedded from here on, as a list that grows; after so many chunks the run is killed."""
    counts, real = [], index_building.embed_readable

    def counted(encoder, reader, rows):
        if stop_after is not None and len(counts) == stop_after:
            raise KeyboardInterrupt
        counts.append(len(rows))
        return real(encoder, reader, rows)

    monkeypatch.setattr(index_building, "embed_readable", counted)
    return counts


def test_a_killed_build_goes_on_where_it_was(built, tiny_clip_dir, pictures, tmp_path, monkeypatch):
    arguments = (str(tiny_clip_dir), str(pictures), tmp_path / "index")
    with monkeypatch.context() as patch:
        assert count_embedded(patch, stop_after=2) == []
        with pytest.raises(KeyboardInterrupt):
            build_index(*arguments, options=CHUNKS_OF_5)
    with pytest.raises(FileNotFoundError, match="If a build was killed, start it again"):
        SearchIndex.load(tmp_path / "index")
    counts = count_embedded(monkeypatch)
    index = build_index(*arguments, options=EmbeddingOptions(chunk_rows=3))  # another size of chunks does not matter
    assert counts == [2]
    assert index.search("a red dog") == built.search("a red dog")


def test_only_new_pictures_are_embedded_and_changes_are_said(
    tiny_clip_dir, own_pictures, pictures, tmp_path, monkeypatch
):
    arguments = (str(tiny_clip_dir), str(own_pictures), tmp_path / "index")
    build_index(*arguments)
    (own_pictures / "00.png").unlink()
    Image.effect_noise((48, 48), 90).convert("RGB").save(own_pictures / "new.png")
    shutil.copy(own_pictures / "01.png", own_pictures / "the same again.png")
    shutil.move(own_pictures / "02.png", own_pictures / "renamed.png")
    counts = count_embedded(monkeypatch)
    index = build_index(*arguments)
    name = own_pictures.name
    assert counts == [1] and index.manifest["changes"] == {
        "new": {"count": 3, "first": [f"{name}/{new}" for new in ("new.png", "renamed.png", "the same again.png")]},
        "changed": {"count": 0, "first": []},
        "gone": {"count": 2, "first": [f"{name}/00.png", f"{name}/02.png"]},
        "kept": {
            "count": 10,
            "first": [f"{name}/{kept}" for kept in ("01.png", *(f"{n:02d}.png" for n in (4, 5, 6, 8)))],
        },
    }
    assert len(index) == len(index.rows) == 13
    assert len(list(index.folder.glob("vectors-*"))) == len(list(index.folder.glob("images-*"))) == 1
    first, second, *_ = index.search(pictures / "01.png", keep_same=True)
    assert {Path(first.path).name, Path(second.path).name} == {"01.png", "the same again.png"}
    assert Path(index.search(pictures / "02.png", keep_same=True)[0].path).name == "renamed.png"


def damage(folder):
    """Three files that are no pictures any more, and why each."""
    whole = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])
    (folder / "02.png").write_bytes(b"not a picture")
    (folder / "04.png").write_bytes(b"")
    return ["01.png", "02.png", "04.png"]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_damaged_images_are_left_out_by_name(tiny_clip_dir, own_pictures, tmp_path, batch_size):
    names = damage(own_pictures)
    options = {"on_bad_image": "skip", "options": EmbeddingOptions(batch_size, chunk_rows=6)}
    index = build_index(str(tiny_clip_dir), str(own_pictures), tmp_path / "index", **options)
    assert [Path(one["file"]).name for one in index.manifest["skipped"]] == names
    assert all(one["reason"] and one["image_id"].endswith(Path(one["file"]).name) for one in index.manifest["skipped"])
    assert len(index) == index.manifest["computed"] == 9
    for path in (own_pictures / "00.png", own_pictures / "more" / "03.png"):  # no vector went to another image
        assert index.search(path, keep_same=True)[0].path == str(path)


def test_a_damaged_image_is_fatal_unless_said_otherwise(tiny_clip_dir, own_pictures, tmp_path):
    damage(own_pictures)
    arguments = (str(tiny_clip_dir), str(own_pictures), tmp_path / "index")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"3 of the images.*pictures/01.png.*02.png.*--on_bad_image skip"):
            build_index(*arguments)
    assert len(build_index(*arguments, on_bad_image="skip")) == 9
    again = build_index(*arguments, on_bad_image="skip")
    assert again.manifest["computed"] == 0 and len(again.manifest["skipped"]) == 3  # nor looked at once more
    with pytest.raises(ValueError, match="3 of the images"):  # known from before, and still fatal
        build_index(*arguments)


def test_a_file_that_cannot_be_opened_is_a_damaged_image(tiny_clip_dir, own_pictures, tmp_path):
    (own_pictures / "gone.png").symlink_to(own_pictures / "nowhere.png")
    arguments = (str(tiny_clip_dir), str(own_pictures), tmp_path / "index")
    with pytest.raises(ValueError, match="gone.png.*No such file"):
        build_index(*arguments)
    index = build_index(*arguments, on_bad_image="skip")
    assert [Path(one["file"]).name for one in index.manifest["skipped"]] == ["gone.png"] and len(index) == 12


def test_a_folder_of_damaged_images_alone_makes_no_index(tiny_clip_dir, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="got 1 of which none can: "):
        build_index(str(tiny_clip_dir), str(tmp_path / "bad"), tmp_path / "index", on_bad_image="skip")
    assert not (tmp_path / "index" / "index.json").exists()


def test_a_dataset_of_captions_is_indexed_too(tiny_clip_dir, tmp_path):
    index = build_index(str(tiny_clip_dir), "scenes:test,n=6,image_size=48", tmp_path / "index")
    hits = index.search("a dog", top_k=6)
    assert sorted(hit.image_id for hit in hits) == [f"scenes-test-0-{row}" for row in range(6)]
    assert all(hit.path is None for hit in hits)
    words = shlex.split(describe_build(index).splitlines()[-1])
    tried = words[words.index("search") + 1]
    assert tried in [captions[0] for captions in load_captions("scenes:test,n=6,image_size=48")["captions"]]


def test_an_index_of_another_model_is_not_mixed_in(copied, other_model, tiny_clip_dir, pictures, tmp_path):
    with pytest.raises(FileExistsError, match=r"another model.*has other weights"):
        build_index(str(other_model), str(pictures), copied)
    (tmp_path / "few").mkdir()
    shutil.copy(pictures / "00.png", tmp_path / "few")
    with pytest.raises(FileExistsError, match="an index of other images"):
        build_index(str(tiny_clip_dir), str(tmp_path / "few"), copied)
    replaced = build_index(str(other_model), str(pictures), copied, overwrite=True)
    assert replaced.manifest["computed"] == 12
    path = pictures / "05.png"
    assert replaced.search(path, keep_same=True)[0].path == str(path)


def test_a_question_to_another_model_is_refused(copied, other_model):
    with pytest.raises(ValueError, match=r"of another model: expected .*cannot be compared"):
        SearchIndex.load(copied, model=str(other_model)).search("a dog")


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_a_flipped_bit_is_seen(copied, kind):
    flip_last_byte(file_of(copied, kind))
    with pytest.raises(ValueError, match=rf"{kind}-.*is damaged: expected the SHA-256"):
        SearchIndex.load(copied)


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_half_a_file_is_seen_even_unverified(copied, kind):
    path = file_of(copied, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is damaged"):
        SearchIndex.load(copied, verify=False)


def test_a_missing_file_is_named(copied):
    file_of(copied, "images").unlink()
    with pytest.raises(FileNotFoundError, match="images-.*that index.json names"):
        SearchIndex.load(copied)


def test_a_manifest_cannot_name_a_file_outside_its_folder(copied, tmp_path):
    file = file_of(copied, "vectors")
    file.rename(copied.parent / file.name)
    manifest = copied / "index.json"
    manifest.write_text(manifest.read_text().replace(file.name, f"../{file.name}"))
    for verify in (True, False):
        with pytest.raises(FileNotFoundError, match="Expected the file '../vectors"):
            SearchIndex.load(copied, verify=verify)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:40], "index.json'.*is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 7'), "format 1.*got 7"),
        (lambda text: text.replace('"encoder"', '"coder"'), "index.json' has no key 'encoder'"),
        (lambda text: text.replace('"n": 12', '"n": 11'), "not of one build"),
        (
            lambda text: text.replace('"files": {', '"files": {}, "old": {'),
            "Under 'files', the object of .* no key 'vectors'",
        ),
        (lambda text: text.replace('"n": 12', '"n": "12"'), "expected an integer under 'n', got '12'"),
        (lambda text: text.replace('"effort": null', '"effort": [1]'), "expected an integer or null under 'effort'"),
        (lambda text: text.replace('"effort": null', '"effort": 3'), "for the index 'exact' in '"),
        (
            lambda text: re.sub('"name": "vec.*"', '"name": 7', text),
            "'vectors' of .* expected text under 'name', got 7",
        ),
        (lambda text: "[]", "got 'list'"),
    ],
)
def test_a_damaged_manifest_is_said(copied, change, message):
    path = copied / "index.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        SearchIndex.load(copied)


def test_a_damaged_chunk_is_named(copied, tiny_clip_dir, pictures):
    chunk = next(copied.glob("embeddings/*/*.safetensors"))
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{chunk.name}.*is damaged"):
        build_index(str(tiny_clip_dir), str(pictures), copied)


@pytest.mark.parametrize("factory", ["IVF2,Flat", "hnsw"])
def test_an_approximate_index_is_tuned_on_queries_and_says_what_it_misses(tiny_clip_dir, pictures, tmp_path, factory):
    queries = [f"a photo of the {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square")]
    index = build_index(str(tiny_clip_dir), str(pictures), tmp_path / "index", index=factory, queries=queries)
    assert index.manifest["recall@10"] >= 0.99 and index.manifest["effort"] >= 1
    exact = build_index(str(tiny_clip_dir), str(pictures), tmp_path / "exact")
    index.set_effort(1000)  # looks at everything
    assert [hit.image_id for hit in index.search("a dog")] == [hit.image_id for hit in exact.search("a dog")]


@pytest.mark.parametrize(
    "factory, queries, notes",
    [
        ("hnsw", [], ["How much this approximate index finds was not measured; its effort is 12. "]),
        ("ivf", [], ["An inverted file begins at 624 pictures, and these are 12: the index is exact"]),
        ("exact", TEXTS, ["The queries were not used: an exact index has nothing to tune."]),
        ("IVF2,Flat", TEXTS[:2], ["FAISS asks for 78 pictures for 2 cells, and these are 12.",
            "It finds 100.0% of the exact first 10, at an effort of 2: measured on 1 of the queries, tuned on",
            "2 queries are few for such a number. Give 100 or more."]),
    ],
)  # fmt: skip
def test_what_there_is_to_say_of_an_index_is_said_once(
    built, tiny_clip_dir, pictures, tmp_path, capfd, factory, queries, notes
):
    output = tmp_path / "index"
    shutil.copytree(built.folder / "embeddings", output / "embeddings")
    index = build_index(str(tiny_clip_dir), str(pictures), output, index=factory, queries=queries)
    assert [note[: len(start)] for note, start in zip(index.manifest["notes"], notes, strict=True)] == notes
    assert "WARNING clustering" not in "".join(capfd.readouterr())  # FAISS's own
    assert all(note in describe_build(index) for note in index.manifest["notes"])


def test_an_exact_index_has_no_effort(built):
    with pytest.raises(ValueError, match="An exact index has none"):
        built.set_effort(4)


def test_wrong_arguments_are_refused_before_anything_is_read(tiny_clip_dir, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(index_building, "load_dual_encoder", None)
    arguments = (str(tiny_clip_dir), str(pictures), tmp_path / "index")
    for option, message in (
        ({"on_bad_image": "ignore"}, "on_bad_image to be one of"),
        ({"index": ""}, "got an empty text"),
    ):
        with pytest.raises(ValueError, match=message):
            build_index(*arguments, **option)
    for sizes in ({"batch_size": 0}, {"chunk_rows": 0}):
        with pytest.raises(ValueError, match="batch_size and chunk_rows >= 1"):
            EmbeddingOptions(**sizes)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    for images, kind, message in (
        (tmp_path / "nowhere", FileNotFoundError, "Expected a folder of pictures, or a dataset"),
        (tmp_path / "empty", ValueError, "got none among 0 files"),
        (tmp_path / "text", ValueError, "got none among 1 file: 1 .txt"),
        ("parquet:", ValueError, "Expected the form 'parquet:GLOB'"),
    ):
        with pytest.raises(kind, match=message):
            build_index(str(tiny_clip_dir), str(images), tmp_path / "index")


def test_one_tower_is_not_enough(tiny_clip_dir, pictures, tmp_path):
    CLIPVisionModelWithProjection.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path / "vision")
    with pytest.raises(TypeError, match="Expected a dual encoder"):
        build_index(str(tmp_path / "vision"), str(pictures), tmp_path / "index")


def test_an_unknown_factory_is_refused_after_embedding_which_is_kept(tiny_clip_dir, pictures, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="FAISS can build.*'Nonsense'"):
        build_index(str(tiny_clip_dir), str(pictures), tmp_path / "index", index="Nonsense")
    counts = count_embedded(monkeypatch)
    build_index(str(tiny_clip_dir), str(pictures), tmp_path / "index")
    assert counts == []


def test_copies_are_counted_and_named(tiny_clip_dir, own_pictures, tmp_path):
    shutil.copy(own_pictures / "01.png", own_pictures / "写真.png")
    index = build_index(str(tiny_clip_dir), str(own_pictures), tmp_path / "index")
    said = describe_build(index).splitlines()
    assert said[0].startswith("13 pictures in ") and "12 embedded now" in said[0]
    assert said[1] == "1 picture is a copy of another, and will be found beside it:"
    assert said[2] == f"    {own_pictures.name}/写真.png = {own_pictures.name}/01.png"


def test_pictures_and_model_may_have_moved(tiny_clip_dir, own_pictures, tmp_path):
    build_index(str(tiny_clip_dir), str(own_pictures), tmp_path / "index")
    moved = own_pictures.rename(tmp_path / "elsewhere")
    lost = SearchIndex.load(tmp_path / "index")
    with pytest.raises(UnreadableImageError, match="'00.png' cannot be read.*No such file.*Build the index again"):
        lost.picture(lost.search("a dog", 12)[0]._replace(path=str(own_pictures / "00.png"), name="00.png"))
    index = SearchIndex.load(tmp_path / "index", images=str(moved))
    hit = index.search(moved / "more" / "03.png", keep_same=True)[0]
    assert hit[2:] == (str(moved / "more" / "03.png"), "more/03.png")
    assert index.picture(hit).tobytes() == Image.open(moved / "more" / "03.png").tobytes()


def test_pictures_of_a_dataset_are_read_from_it(tiny_clip_dir, tmp_path):
    index = build_index(str(tiny_clip_dir), "scenes:test,n=3,image_size=48", tmp_path / "index")
    scenes = load_scenes("test", n=3, image_size=48)
    for hit in index.search("a dog"):
        row = int(hit.image_id.rpartition("-")[2])
        assert hit.name == hit.image_id and index.picture(hit).tobytes() == scenes[row]["image"].tobytes()
    fewer = SearchIndex.load(index.folder, images="scenes:test,n=2,image_size=48")
    with pytest.raises(UnreadableImageError, match="'scenes-test-0-2' is no longer in 'scenes:test,n=2"):
        fewer.picture(next(hit for hit in fewer.hits(range(3)) if hit.image_id.endswith("2")))


def test_one_import_opens_an_index(built):
    from modeling_dclip import hub

    assert hub.SearchIndex is SearchIndex
    with pytest.raises(AttributeError, match="no attribute 'SearchFolder'"):
        hub.SearchFolder  # noqa: B018


def test_a_text_that_names_a_picture_is_the_picture(built, pictures):
    by_path = built.search(pictures / "01.png", 3, keep_same=True)
    assert built.search(str(pictures / "01.png"), 3, keep_same=True) == by_path and by_path[0].name == "01.png"


def test_wrong_queries_are_refused(built, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for query, kind, message in (
        ("  ", ValueError, "got an empty text"),
        (tmp_path / "nowhere.jpg", FileNotFoundError, "no such file"),
        ("nowhere.jpg", FileNotFoundError, "no such file"),
        (tmp_path / "broken.jpg", ValueError, "'broken.jpg' cannot be read: .*Give an undamaged JPEG"),
    ):
        with pytest.raises(kind, match=message):
            built.search(query)
    with pytest.raises(ValueError, match="top_k >= 1"):
        built.search("a dog", top_k=0)


def test_a_zero_embedding_is_refused_by_name(tiny_clip_dir, pictures, tmp_path):
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    for weight in model.vision_model.post_layernorm.parameters():  # a matrix of zeros would be refused before
        torch.nn.init.zeros_(weight)
    shutil.copytree(tiny_clip_dir, tmp_path / "zero")
    model.save_pretrained(tmp_path / "zero")
    with pytest.raises(ValueError, match=r"12 bad ones of 12.*pictures.*/00.png"):
        build_index(str(tmp_path / "zero"), str(pictures), tmp_path / "index")


def test_the_command_builds_and_answers(tiny_clip_dir, pictures, tmp_path, capsys):
    index = str(tmp_path / "index")
    command = ["--model", str(tiny_clip_dir), "--images", str(pictures), "--output", index]
    main(command)
    captured = capsys.readouterr()
    assert captured.out.startswith(f"12 pictures in {index}, 12 embedded now. Index: exact, width 16.\n")
    assert "Since" not in captured.out
    lines = [line.rsplit("\r", 1)[-1] for line in captured.err.split("\n")]  # a bar is drawn anew over itself
    assert sum("images: 100%" in line for line in lines) == 1  # one bar, and only as a library
    main(["build", *command])
    assert "0 embedded now" in (out := capsys.readouterr().out)
    assert "Since the last build: 0 new, 0 changed, 0 gone, 12 kept." in out and "copies" not in out
    assert out.splitlines()[-1].endswith(f"search 'something red' --index {index} --page results.html")
    main(["search", "a dog on a beach", "--index", index, "--top_k", "3"])
    said, header, *lines = capsys.readouterr().out.splitlines()
    assert said == f"The 3 nearest of 12 pictures in {pictures}, to “a dog on a beach”"
    assert header.split() == ["rank", "cosine", "picture"]
    assert len(lines) == 3 and all((pictures / line.split(maxsplit=2)[2]).is_file() for line in lines)
    main(["search", str(pictures / "00.png"), "--index", index, "--top_k", "1", "--json", "--keep_same"])
    assert json.loads(capsys.readouterr().out)["path"] == str(pictures / "00.png")
    assert read_manifest(index)["images"] == str(pictures)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["search", "a dog", "--index", "nowhere"], "Expected an index with index.json in 'nowhere'"),
        (["--model", "/nowhere", "--images", "/nowhere", "--output", "index"], "Expected a folder of pictures"),
    ],
)
def test_the_command_ends_with_a_message_and_no_traceback(argv, message):
    with pytest.raises(SystemExit, match=message):
        main(argv)


def launch_two(*arguments):
    """Run the command with two CPU processes; `accelerate launch --cpu` starts one, whatever number is asked for."""
    several = ["--multi_gpu", "--main_process_port", "0", "--num_processes", "2", "--num_machines", "1"]
    command = [*several, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "modeling_dclip.hub.index"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command, *map(str, arguments)],
        env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_processes_make_the_index_of_one(built, tiny_clip_dir, pictures, tmp_path):
    output = tmp_path / "index"
    done = launch_two("--model", tiny_clip_dir, "--images", pictures, "--output", output, "--chunk_rows", 2)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("12 pictures in ") == 1
    assert len(list(output.glob("embeddings/*/*.safetensors"))) == 6
    index = SearchIndex.load(output)
    assert index.manifest["processes"] == 2 and index.rows.equals(built.rows)
    vectors = index.vectors.reconstruct_n(0, 12)
    assert np.allclose(vectors, built.vectors.reconstruct_n(0, 12), atol=1e-6)  # batches of other sizes
    assert [hit.image_id for hit in index.search("a dog")] == [hit.image_id for hit in built.search("a dog")]


@pytest.mark.slow
def test_two_processes_end_together_over_a_damaged_image(tiny_clip_dir, own_pictures, tmp_path):
    damage(own_pictures)
    arguments = ("--model", tiny_clip_dir, "--images", own_pictures, "--output", tmp_path / "index", "--chunk_rows", 2)
    command = "import runpy; runpy.run_module('modeling_dclip.hub.index', run_name='__main__', alter_sys=True)"
    ended = run_together(command, 2, *arguments)
    assert all(done.returncode for done in ended)
    said = "".join(done.stderr for done in ended)
    assert "--on_bad_image skip" in said and "01.png" in said


def test_equal_models_have_equal_keys_and_settings_count(tiny_clip_dir, other_model):
    model, processor, _ = load_dual_encoder(tiny_clip_dir)
    again = load_dual_encoder(tiny_clip_dir)[:2]
    other = load_dual_encoder(other_model)[:2]
    key = stored_embeddings.fingerprint_encoder(model, processor)
    assert key == stored_embeddings.fingerprint_encoder(*again) != stored_embeddings.fingerprint_encoder(*other)
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert key != stored_embeddings.fingerprint_encoder(model, processor)


def test_a_file_in_place_of_the_index_is_said_before_anything_is_embedded(
    tiny_clip_dir, pictures, tmp_path, monkeypatch
):
    (tmp_path / "index").write_text("mine")
    counts = count_embedded(monkeypatch)
    with pytest.raises(FileExistsError, match="a folder for the index at .*got a file"):
        build_index(str(tiny_clip_dir), str(pictures), tmp_path / "index")
    assert counts == [] and (tmp_path / "index").read_text() == "mine"


def test_builds_of_other_pictures_that_end_together_leave_one_whole_index(built, copied, tmp_path, monkeypatch):
    """Each waits, its files written, until the other has written its own:
    without turns they would delete each other's.
    """
    meeting = threading.Barrier(2)
    hash_file = search_index.hash_file

    def hash_when_both_are_here(path):
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(timeout=1)
        return hash_file(path)

    monkeypatch.setattr(search_index, "hash_file", hash_when_both_are_here)
    whole = [built.vectors.reconstruct_n(0, count) for count in (12, 5)]

    def write(vectors):
        flat = find_faiss("faiss").IndexFlatIP(vectors.shape[1])
        flat.add(vectors)
        columns = {name: built.rows[name].to_pylist()[: len(vectors)] for name in search_index.IMAGE_COLUMNS}
        search_index.write_index(copied, flat, columns, {**built.manifest, "n": len(vectors)})

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(write, vectors) for vectors in whole]:
            done.result()
    monkeypatch.undo()
    assert len(SearchIndex.load(copied)) in (12, 5)
    assert len(list(copied.glob("vectors-*"))) == len(list(copied.glob("images-*"))) == 1
    assert not list(copied.glob(".new*"))


def test_a_query_that_is_a_folder_or_no_utf8_is_refused(built, tmp_path, capsys):
    for query, message in ((str(tmp_path), "which is a folder or another file"), ("caf\udce9", "half a character")):
        with pytest.raises(SystemExit, match=f"Failed: .*{message}"):
            main(["search", query, "--index", str(built.folder)])


def test_the_same_picture_is_not_what_a_search_finds(tiny_clip_dir, own_pictures, tmp_path):
    shutil.copy(own_pictures / "00.png", own_pictures / "more" / "copy.png")
    index = build_index(str(tiny_clip_dir), str(own_pictures), tmp_path / "index")
    same = ["00.png", "more/copy.png"]
    assert [hit.name for hit in index.copies_of(own_pictures / "00.png")] == same
    kept = index.search(str(own_pictures / "00.png"), 6, keep_same=True)
    assert sorted(hit.name for hit in kept[:2]) == same
    assert index.search(own_pictures / "00.png", 4) == kept[2:]
    assert len(index.search(own_pictures / "00.png", 100)) == len(index) - 2
    assert index.search(Image.open(own_pictures / "00.png"), 6) == kept  # no file, which could be compared
    assert index.copies_of("a dog") == []
