"""Writing reinforced data: what is stored is what the teachers say of the replayed pixels, once,
whatever interrupts.
"""

import errno
import functools
import io
import json
import os
import signal
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from modeling_dclip.data.files import holding
from modeling_dclip.data.reinforced import ProcessShare, ReinforcedBatches, ReinforcedDataset, SampleView
from modeling_dclip.data.reinforced import writer as reinforced_writer
from modeling_dclip.data.reinforced.__main__ import main
from modeling_dclip.data.reinforced.augmentations import (
    AugmentationSettings,
    StoredAugmentation,
    draw_augmentation,
    replay_augmentation,
)
from modeling_dclip.data.reinforced.teachers import build_teacher
from modeling_dclip.data.reinforced.writer import Reinforcer, write_reinforced
from modeling_dclip.data.scenes import load_scenes

SETTINGS = AugmentationSettings(image_size=28)


@pytest.fixture(scope="module")
def other_clip_dir(tiny_clip_dir, tmp_path_factory):
    """A CLIP of another width, another image size and another normalisation."""
    folder = tmp_path_factory.mktemp("other_clip")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(processor, CLIPTokenizer.from_pretrained(tiny_clip_dir)).save_pretrained(folder)
    processor.save_pretrained(folder)
    config = CLIPConfig.from_pretrained(tiny_clip_dir)
    config.projection_dim = config.text_config.projection_dim = config.vision_config.projection_dim = 12
    config.vision_config.image_size = 24
    torch.manual_seed(1)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teachers(tiny_clip_dir, other_clip_dir):
    return [build_teacher(str(folder)) for folder in (tiny_clip_dir, other_clip_dir)]


@pytest.fixture(scope="module")
def scenes():
    return load_scenes("train", n=5, captions_per_image=2, image_size=40)


def write(dataset, teachers, output, **options):
    options = {"augmentations": 3, "samples_per_shard": 2, "batch_size": 4, "dtype": "float32", **options}
    options.setdefault("synthetic_captions", "coarse_caption")
    return write_reinforced(dataset, teachers, output=output, **{"settings": SETTINGS, **options})


def read(folder, **options):
    return ReinforcedDataset(folder, SampleView(**options), share=ProcessShare(0, 1))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def stored_members(folder):
    """Members by sample, of all shards, by tarfile alone."""
    samples = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, kind = info.name.split(".", 1)
                samples.setdefault(key, {})[kind] = tar.extractfile(info).read()
    return samples


class Counting:
    """A teacher that counts what it is asked, and may fall silent."""

    def __init__(self, teacher, views=10**9):
        self.teacher, self.views_left, self.views = teacher, views, 0

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def encode_images(self, pixel_values):
        if self.views_left < len(pixel_values):
            raise KeyboardInterrupt
        self.views_left -= len(pixel_values)
        self.views += len(pixel_values)
        return self.teacher.encode_images(pixel_values)


@functools.cache
def clip_of(folder):
    loaded = [kind.from_pretrained(folder) for kind in (CLIPModel, CLIPImageProcessorPil, CLIPTokenizer)]
    return loaded[0].eval(), *loaded[1:]


@torch.no_grad()
def say(folder, image=None, text=None):
    """What a CLIP says, by transformers alone."""
    model, image_processor, tokenizer = clip_of(folder)
    if image is not None:
        output = model.get_image_features(**image_processor(images=image, return_tensors="pt"))
    else:
        output = model.get_text_features(**tokenizer(text, return_tensors="pt"))
    return torch.nn.functional.normalize(output.pooler_output[0], dim=-1)


def test_what_is_read_is_what_the_teachers_say_of_the_replayed_pixels(
    scenes, teachers, tiny_clip_dir, other_clip_dir, tmp_path
):
    write(scenes, teachers, tmp_path / "out", seed=3)
    folders, dataset = (
        (tiny_clip_dir, other_clip_dir),
        read(tmp_path / "out", image_mean=[0.0] * 3, image_std=[1.0] * 3),
    )
    assert dataset.teacher_widths == (16, 12)
    seen = set()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for sample in dataset:
            row = scenes[int(sample["key"])]
            drawn = [draw_augmentation(3, row["image_id"], number, (40, 40), SETTINGS) for number in range(3)]
            views = [replay_augmentation(row["image"].convert("RGB"), one, 28) for one in drawn]
            pixels = [torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views]
            shown = (sample["pixel_values"] * 255).round().to(torch.uint8)
            number = next(number for number in range(3) if torch.equal(pixels[number], shown))
            assert sample["synthetic_caption"] == row["coarse_caption"] and sample["caption"] in row["captions"]
            for name, what in (
                ("teacher_image_embeds", {"image": views[number]}),
                ("teacher_text_embeds", {"text": sample["caption"]}),
                ("teacher_synthetic_text_embeds", {"text": sample["synthetic_caption"]}),
            ):
                expected = torch.cat([say(folder, **what) for folder in folders])
                torch.testing.assert_close(sample[name], expected, rtol=0, atol=2e-6)  # batched against one by one
            seen.add((sample["key"], number, sample["caption"]))
    assert len(seen) > 10


def test_members_are_those_of_the_published_format(scenes, teachers, tmp_path):
    write(scenes, teachers, tmp_path / "several", dtype="float16")
    one_caption = scenes.map(lambda row: {"captions": row["captions"][:1]})
    write(one_caption, teachers, tmp_path / "one", synthetic_captions="captions")
    for folder, texts in (("several", 2), ("one", 1)):
        samples = stored_members(tmp_path / folder)
        assert len(samples) == 5
        for row, members in zip(scenes, samples.values(), strict=True):
            assert set(members) == {"png", "txt", "json", "syn.json", "paug.json", "npz"}
            assert json.loads(members["json"]) == {"image_id": row["image_id"]}
            stored = json.loads(members["paug.json"])["param_aug"]
            assert [StoredAugmentation.decode(one).encode() for one in stored] == stored and len(stored) == 3
            arrays = np.load(io.BytesIO(members["npz"]))
            assert arrays["image_emb"].shape == (3, 28)
            assert np.allclose(np.linalg.norm(arrays["image_emb"][:, :16].astype(np.float64), axis=1), 1, atol=1e-3)
            if texts == 1:
                assert members["txt"].decode() == row["captions"][0]
                assert arrays["text_emb"].shape == (2, 28) and arrays["text_emb"].dtype == np.float32
            else:
                assert json.loads(members["txt"]) == row["captions"]
                assert arrays["text_emb"].shape == (2, 28) and arrays["text_emb"].dtype == np.float16
                assert arrays["syn_text_emb"].shape == (1, 28)


def test_the_index_says_all_that_is_needed_to_read(scenes, teachers, tmp_path, tiny_clip_dir):
    index = json.loads(write(scenes, teachers, tmp_path / "out").read_text())
    assert index["counts"] == {"samples": 5, "captions": 10, "synthetic_captions": 5}
    assert [one["samples"] for one in index["shards"]] == [2, 2, 1] and index["settings"]["dtype"] == "float32"
    batches = ReinforcedBatches(tmp_path / "out", CLIPTokenizer.from_pretrained(tiny_clip_dir), batch_size=2)
    assert batches.teacher_widths == (16, 12) and len(batches) == 2
    assert batches.teacher_logit_scales == tuple(teacher.logit_scale for teacher in teachers)
    assert next(iter(batches))["pixel_values"].shape == (2, 3, 28, 28)


def test_without_synthetic_captions_batches_hold_none(scenes, teachers, tmp_path, tiny_clip_dir):
    write(scenes, teachers, tmp_path / "out", synthetic_captions=None)
    batches = ReinforcedBatches(tmp_path / "out", CLIPTokenizer.from_pretrained(tiny_clip_dir), batch_size=5)
    assert not batches.synthetic_captions and not [name for name in next(iter(batches)) if "synthetic" in name]


def test_two_runs_write_equal_bytes_whatever_batches_and_workers(scenes, teachers, tmp_path):
    write(scenes, teachers, tmp_path / "one")
    write(scenes, teachers, tmp_path / "other", num_workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    write(scenes, teachers, tmp_path / "seed", seed=1)
    assert contents(tmp_path / "seed").keys() == contents(tmp_path / "one").keys()
    assert contents(tmp_path / "seed") != contents(tmp_path / "one")


def test_a_killed_run_goes_on_where_it_was(scenes, teachers, tmp_path):
    write(scenes, teachers, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(scenes, [Counting(teachers[0], views=9), teachers[1]], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".tar"] == ["000000.tar"]
    with pytest.raises(ValueError, match="not finished. Run its command again"):
        read(tmp_path / "out")
    counting = Counting(teachers[0])
    write(scenes, [counting, teachers[1]], tmp_path / "out")
    assert counting.views == 3 * 3  # three of five rows
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out/reinforced.json").read_text() == (tmp_path / "whole/reinforced.json").read_text()
    counting = Counting(teachers[0])
    (tmp_path / "out/000001.tar").write_bytes(b"damaged")
    (tmp_path / "out/000002.tar").unlink()
    write(scenes, [counting, teachers[1]], tmp_path / "out")
    assert counting.views == 3 * 3 and contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == ["000000.tar", "000001.tar", "000002.tar", "reinforced.json"]


class Unmoved:
    """A teacher that needs no model: what it says depends on the input alone."""

    name, fingerprint, width, logit_scale = "unmoved", "unmoved-1", 2, 2.5

    @staticmethod
    def preprocess(images):
        return torch.tensor([np.asarray(image, np.float32).mean() for image in images])

    def encode_images(self, pixel_values):
        return np.stack([np.cos(pixel_values.numpy()), np.sin(pixel_values.numpy())], axis=1)

    def encode_texts(self, texts):
        return np.tile(np.array([[0, 1]], np.float32), (len(texts), 1))


def write_until(dataset, output, operation=None):
    """Write in a forked process, killed before its k-th operation on a file of the output: status, operations."""
    counts, ready = os.pipe()
    child = os.fork()
    if not child:
        done = 0

        def watch(event, given):
            nonlocal done
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
            opens = event == "open" and isinstance(given[1], str) and given[1][0] in "wax"
            if (changes or opens) and any(str(output) in str(one) for one in given):
                done += 1
                os.write(ready, b".")
                if done == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        status = 1
        try:
            write(dataset, [Unmoved()], output)
            status = 0
        finally:
            os._exit(status)
    os.close(ready)
    with open(counts, "rb") as file:
        operations = len(file.read())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), operations


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_that_is_killed_before_an_operation_leads_to_the_same_bytes(scenes, tmp_path):
    encoded_scenes = Dataset.from_dict(scenes.with_format(None).to_dict(), features=scenes.features)
    status, operations = write_until(encoded_scenes, tmp_path / "whole")
    assert status == 0 and operations > 20
    whole = everything(tmp_path / "whole")
    assert sorted(whole) == ["000000.tar", "000001.tar", "000002.tar", "reinforced.json"]
    everywhere = (
        range(1, operations + 1) if "KILL_EVERYWHERE" in os.environ else (*range(1, operations, 7), operations)
    )
    for operation in sorted({*everywhere, 2, 3, 4, 5}):
        out = tmp_path / str(operation)
        assert write_until(encoded_scenes, out, operation) == (-signal.SIGKILL, operation)
        write(encoded_scenes, [Unmoved()], out)
        assert everything(out) == whole, operation


def test_a_second_run_on_a_folder_is_refused_and_the_first_goes_on(scenes, teachers, tmp_path):
    class Meeting(Unmoved):
        def encode_images(self, pixel_values):
            with (
                ThreadPoolExecutor(1) as pool,
                pytest.raises(BlockingIOError, match="is in use by another run: process"),
            ):
                pool.submit(write, scenes, [Unmoved()], tmp_path / "out").result()
            return super().encode_images(pixel_values)

    write(scenes, [Meeting()], tmp_path / "out")
    write(scenes, [Unmoved()], tmp_path / "alone")
    assert everything(tmp_path / "out") == everything(tmp_path / "alone")
    with holding(tmp_path / "out"), pytest.raises(SystemExit, match="is in use by another run"):
        main(["--dataset", "scenes:train,n=2", "--teachers", "no/such/model", "--output", str(tmp_path / "out")])


def test_a_full_disk_is_one_line_and_the_run_goes_on_where_there_is_room(scenes, tmp_path, monkeypatch):
    write(scenes, [Unmoved()], tmp_path / "whole")
    addfile, left = tarfile.TarFile.addfile, [14]

    def fill(self, info, file):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return addfile(self, info, file)

    monkeypatch.setattr(tarfile.TarFile, "addfile", fill)
    with pytest.raises(OSError, match=r"Cannot write '.*out/000001.tar': No space left on device .* MiB free"):
        write(scenes, [Unmoved()], tmp_path / "out")
    assert sorted(everything(tmp_path / "out")) == ["000000.tar", "reinforced.json"]
    write(scenes, [Unmoved()], tmp_path / "out")
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_shard_that_was_cut_or_lost_a_sample_is_written_again(scenes, tmp_path):
    write(scenes, [Unmoved()], tmp_path)
    whole = everything(tmp_path)
    content = whole["000000.tar"]
    last_sample = content.index(b"000000001.")
    for damaged in (b"", content[:700], content[: len(content) // 2], content[:last_sample] + bytes(1024)):
        (tmp_path / "000000.tar").write_bytes(damaged)
        write(scenes, [Unmoved()], tmp_path)
        assert everything(tmp_path) == whole


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--min_crop_area 5", "--min_crop_area: expected a number above 0 and up to 1, got '5'"),
        ("--min_crop_area nan", "--min_crop_area: expected a number"),
        ("--image_size -64", "--image_size: expected an integer from 1 to 8192, got '-64'"),
        ("--magnitude 300", "--magnitude: expected an integer from 0 to 30, got '300'"),
        ("--samples_per_shard 0", "--samples_per_shard: expected an integer from 1"),
        ("--batch_size 0", "--batch_size: expected an integer from 1"),
        ("--augmentations 0", "--augmentations: expected an integer from 1"),
        ("--num_operations -1", "--num_operations: expected an integer from 0"),
        ("--num_workers 1000", "--num_workers: expected an integer from 0 to 256, got '1000'"),
        ("--captions_per_image 0", "--captions_per_image: expected an integer from 1"),
        ("--seed -1", "--seed: expected an integer from 0"),
        ("--synthetic_captions a --captioner b", "Leave one out"),
    ],
)
def test_numbers_out_of_range_are_one_short_line_before_any_work(tmp_path, words, problem):
    given = ["--dataset", "no:such", "--teachers", "no/such", "--output", str(tmp_path / "out"), *words.split()]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert problem in str(ended.value) and len(str(ended.value)) < 200 and not list(tmp_path.iterdir())


def test_a_folder_written_from_something_else_is_refused(scenes, teachers, tmp_path):
    write(scenes, teachers, tmp_path)
    before = contents(tmp_path)
    changes = {
        "settings.augmentations: there 3, now 4": {"augmentations": 4},
        "settings.dtype: there 'float32', now 'float16'": {"dtype": "float16"},
        "settings.seed: there 0, now 1": {"seed": 1},
        "settings.magnitude: there 9, now 5": {"settings": AugmentationSettings(28, magnitude=5)},
        "settings.samples_per_shard: there 2, now 3": {"samples_per_shard": 3},
        "settings.column: there 'coarse_caption', now None": {"synthetic_captions": None},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=f"something else: .*{message}.*Name another output"):
            write(scenes, teachers, tmp_path, **change)
    with pytest.raises(ValueError, match="rows: there"):
        write(scenes.select(range(4)), teachers, tmp_path)
    renamed = scenes.map(lambda row: {"image_id": row["image_id"] + "x"})
    with pytest.raises(ValueError, match="rows: there"):
        write(renamed, teachers, tmp_path)
    with pytest.raises(ValueError, match="teachers.0.width: there 16, now 12"):
        write(scenes, teachers[::-1], tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"format": 1, "teach', r"Expected JSON in the index '.*reinforced.json'"),
        ("[]", r"Expected a JSON object in the index '.*reinforced.json', got a list"),
    ],
)
def test_an_index_that_is_cut_is_named(scenes, teachers, tmp_path, content, problem):
    (tmp_path / "reinforced.json").write_text(content)
    with pytest.raises(ValueError, match=f"{problem}.*Remove the folder"):
        write(scenes, teachers, tmp_path)
    assert os.listdir(tmp_path) == ["reinforced.json"]


def test_a_teacher_with_other_weights_is_another(scenes, teachers, tmp_path, tiny_clip_dir):
    write(scenes, teachers, tmp_path / "out")
    model = CLIPModel.from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    changed = tmp_path / "changed"
    CLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(changed)
    CLIPImageProcessorPil.from_pretrained(tiny_clip_dir).save_pretrained(changed)
    model.save_pretrained(changed)
    with pytest.raises(ValueError, match="teachers.0.fingerprint: there"):
        write(scenes, [build_teacher(str(changed)), teachers[1]], tmp_path / "out")


def test_a_folder_with_other_things_is_left_alone(scenes, teachers, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no reinforced.json"):
        write(scenes, teachers, tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def encoded(kind, exif=None):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **({} if exif is None else {"exif": exif}))
    return buffer.getvalue()


def test_images_are_stored_as_they_are_or_upright_as_png(teachers, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    pictures = {
        "jpg": encoded("JPEG"),
        "webp": encoded("WEBP"),
        "bmp": encoded("BMP"),
        "turned": encoded("JPEG", turned),
    }
    rows = {"image_id": list(pictures), "image": [{"bytes": one, "path": None} for one in pictures.values()]}
    write(make_dataset(rows), teachers, tmp_path / "out", synthetic_captions=None)
    jpg, webp, bmp, upright = stored_members(tmp_path / "out").values()
    assert jpg["jpg"] == pictures["jpg"] and webp["webp"] == pictures["webp"]
    assert np.array_equal(Image.open(io.BytesIO(bmp["png"])), Image.open(io.BytesIO(pictures["bmp"])))
    assert Image.open(io.BytesIO(upright["png"])).size == (20, 30)
    assert len(list(read(tmp_path / "out"))) == 4


def make_dataset(rows):
    from datasets import Image as ImageFeature

    rows = {"captions": [["a photo"]] * len(rows["image_id"]), **rows}
    return Dataset.from_dict(rows).cast_column("image", ImageFeature())


def test_bad_rows_are_named(scenes, teachers, tmp_path):
    broken = {"image_id": ["a", "b"], "image": [{"bytes": one, "path": None} for one in (encoded("PNG"), b"no image")]}
    with pytest.raises(ValueError, match=r"Image 'b' \(row 1\): expected an image"):
        write(make_dataset(broken), teachers, tmp_path / "broken", synthetic_captions=None)
    blank = scenes.map(lambda row, i: {"coarse_caption": " " if i == 2 else "x"}, with_indices=True)
    with pytest.raises(ValueError, match=r"'scenes-train-0-2' \(row 2\).*column 'coarse_caption'.*1 such rows"):
        write(blank, teachers, tmp_path / "blank")
    with pytest.raises(ValueError, match="Expected a column 'synthetic'"):
        write(scenes, teachers, tmp_path / "column", synthetic_captions="synthetic")
    with pytest.raises(ValueError, match="No row"):
        write(scenes.select([]), teachers, tmp_path / "empty")


class Broken(Counting):
    def encode_images(self, pixel_values):
        return self.teacher.encode_images(pixel_values) * np.nan


def test_a_teacher_that_says_nan_is_refused(scenes, teachers, tmp_path):
    with pytest.raises(ValueError, match="Image 'scenes-train-0-0': expected finite image_embeds"):
        write(scenes, [Broken(teachers[0])], tmp_path / "out")
    assert not contents(tmp_path / "out")


class Captioner:
    name, fingerprint = "captioner", "f"

    def __init__(self, answers):
        self.answers, self.lots = answers, []

    def __call__(self, images, lot):
        self.lots.append((lot, [image.size for image in images]))
        return [self.answers[number % len(self.answers)] for number in range(lot, lot + len(images))]


def test_the_captioners_draws_do_not_depend_on_the_batch_size(teachers, tmp_path):
    scenes, lots = load_scenes("train", n=37, captions_per_image=1, image_size=40), []
    for size in (3, 64):
        captioner = Captioner([["a circle"]])
        options = {"samples_per_shard": 20, "synthetic_captions": None, "augmentations": 1, "batch_size": size}
        write(scenes, teachers[:1], tmp_path / str(size), captioner=captioner, **options)
        lots.append([(lot, len(images)) for lot, images in captioner.lots])
    assert lots[0] == lots[1] == [(0, 16), (16, 4), (20, 16), (36, 1)]


def test_a_captioner_describes_the_stored_images(scenes, teachers, tmp_path):
    captioner = Captioner([["a dog", "a red dog"], ["a circle"]])
    write(scenes, teachers, tmp_path / "out", synthetic_captions=None, captioner=captioner)
    assert captioner.lots == [(0, [(40, 40)] * 2), (2, [(40, 40)] * 2), (4, [(40, 40)])]
    found = [json.loads(members["syn.json"])["syn_text"] for members in stored_members(tmp_path / "out").values()]
    assert found == [["a dog", "a red dog"], ["a circle"]] * 2 + [["a dog", "a red dog"]]
    index = json.loads((tmp_path / "out/reinforced.json").read_text())
    assert index["counts"]["synthetic_captions"] == 8 and index["names"]["captioner"] == "captioner"
    with pytest.raises(ValueError, match="Expected a caption of image 'scenes-train-0-1' from 'captioner'"):
        write(scenes, teachers, tmp_path / "silent", synthetic_captions=None, captioner=Captioner([["a dog"], []]))
    with pytest.raises(ValueError, match="from a column or from a captioner"):
        write(scenes, teachers, tmp_path / "both", captioner=captioner)


@pytest.mark.parametrize(
    "wrong", [{"augmentations": 0}, {"batch_size": 0}, {"dtype": "int8"}, {"samples_per_shard": 0}]
)
def test_wrong_arguments_are_refused(scenes, teachers, tmp_path, wrong):
    with pytest.raises(ValueError, match="Expected"):
        write(scenes, teachers, tmp_path / "out", **wrong)
    with pytest.raises(ValueError, match="Expected one or more teachers"):
        Reinforcer(scenes, [], None, None, [], SETTINGS)
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_what_the_function_writes(
    scenes, teachers, tiny_clip_dir, other_clip_dir, tmp_path, capsys
):
    write(scenes, teachers, tmp_path / "function", dtype="float16")
    options = (
        "--augmentations 3 --samples_per_shard 2 --batch_size 4 --image_size 28 --synthetic_captions coarse_caption"
    )
    spec = "scenes:train,n=5,captions_per_image=2,image_size=40"
    main(
        ["--dataset", spec, "--teachers", f"{tiny_clip_dir},{other_clip_dir}", *options.split()]
        + ["--output", str(tmp_path / "cli")]
    )
    assert "Wrote 5 samples, 10 captions, 5 synthetic captions" in capsys.readouterr().out
    assert contents(tmp_path / "cli") == contents(tmp_path / "function")


class Process:
    """Accelerate's state of one of two processes, which are threads here."""

    num_processes, is_local_main_process, barrier = 2, True, threading.Barrier(2, timeout=60)

    def __init__(self, index):
        self.process_index, self.is_main_process = index, index == 0

    def wait_for_everyone(self):
        self.barrier.wait()


def test_processes_share_the_shards(scenes, teachers, tmp_path, monkeypatch):
    write(scenes, teachers, tmp_path / "alone")
    here, counting = threading.local(), [Counting(teachers[0]), Counting(teachers[0])]
    monkeypatch.setattr(reinforced_writer, "PartialState", lambda: here.state)

    def run(index):
        here.state = Process(index)
        return write(scenes, [counting[index], teachers[1]], tmp_path / "out")

    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(run, range(2)))) == 2
    assert [one.views for one in counting] == [3 * 3, 2 * 3]  # shards 0 and 2, of two rows and one, and shard 1
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert len(list(read(tmp_path / "out"))) == 5


def test_an_empty_name_among_the_teachers_is_named(tmp_path):
    words = ["--dataset", "scenes:train,n=2", "--output", str(tmp_path / "a"), "--teachers", "one,,two"]
    with pytest.raises(SystemExit, match="got an empty one in 'one,,two'"):
        main(words)


def test_python_m_names_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reinforced", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "--synthetic_captions" in capsys.readouterr().out
