"""Reading reinforced shards: what others wrote, in every form; the same samples whatever the workers;
damage by name.
"""

import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
import zipfile
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_dclip.data.collation import pass_batch
from modeling_dclip.data.reinforced import ProcessShare, ReinforcedBatches, ReinforcedDataset, SampleView
from modeling_dclip.data.reinforced import shards as shards_module
from modeling_dclip.data.reinforced.augmentations import StoredAugmentation, normalise_pixels, replay_augmentation
from modeling_dclip.data.reinforced.shards import DamagedSampleError, find_shards, scan_shard

WIDTHS, SIZE = (4, 3), 16
STORED = [[[2, 3, 20, 24], [[5, 30.0], None]], [[0, 0, 24, 32], None], [[1, 1, 9, 9], [[6, -0.27], [1, 0.09]]]]
SYNTHETIC = ["a dog", "a photo of a dog"]


def picture(seed, kind="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def embeds(rows, seed):
    return np.random.default_rng(seed).normal(size=(rows, sum(WIDTHS))).astype(np.float32)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def pth_gz(**arrays):
    buffer = io.BytesIO()
    torch.save({name: torch.tensor(array).bfloat16() for name, array in arrays.items()}, buffer)
    return gzip.compress(buffer.getvalue())


def text(value):
    return json.dumps(value).encode()


def members(seed=0, **changes):
    """A sample as DataCompDR stores it, one caption and two synthetic ones;
    `changes` by member, `None` leaves it out.
    """
    found = {
        "jpg": picture(seed, "JPEG"),
        "txt": b"a photo",
        "json": text({"uid": f"{seed}"}),
        "syn.json": text({"syn_text": SYNTHETIC}),
        "paug.json": text({"param_aug": STORED}),
        "npz": npz(image_emb=embeds(3, seed), text_emb=embeds(3, 1000 + seed)),
    }
    found |= {name.replace("_", "."): value for name, value in changes.items()}
    return {name: value for name, value in found.items() if value is not None}


def write_tar(path, samples, tar_format=tarfile.USTAR_FORMAT):
    """A shard of `{key: members}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key, parts in samples.items():
            for kind, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder, counts, start=0):
    """Shards of so many samples each, keys numbered through."""
    for number, count in enumerate(counts):
        write_tar(folder / f"{number:04d}.tar", {f"{start + i:05d}": members(start + i) for i in range(count)})
        start += count
    return folder


def as_values(options):
    """Flat options as the values that a dataset takes."""
    options = {"image_size": SIZE, "teacher_widths": WIDTHS, "process_index": 0, "num_processes": 1, **options}
    view, share = (
        kind(**{field.name: options.pop(field.name) for field in fields(kind) if field.name in options})
        for kind in (SampleView, ProcessShare)
    )
    return {"view": view, "share": share, **options}


def read(shards, **options):
    return ReinforcedDataset(shards, **as_values(options))


def keys(samples):
    return [sample["key"] for sample in samples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 samples in four shards of different lengths."""
    return write_shards(tmp_path_factory.mktemp("shards"), [7, 3, 8, 5])


def load(dataset, workers=0):
    return list(DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=pass_batch))


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def unit(row):
    """Naive: each teacher's slice by its length."""
    first, second = row[: WIDTHS[0]], row[WIDTHS[0] :]
    return np.concatenate([first / np.sqrt((first**2).sum()), second / np.sqrt((second**2).sum())])


FORMS = {
    "jpg, npz": {},
    "png": {"jpg": None, "png": picture(0)},
    "webp": {"jpg": None, "webp": picture(0, "WEBP")},
    "captions in json": {"txt": None, "json": text({"captions": ["a photo"]})},
    "caption in json": {"txt": None, "json": text({"caption": "a photo"})},
    "a list in txt": {"txt": text(["a photo"])},
    "augmentations as a string": {"paug_json": text({"param_aug": json.dumps(STORED)})},
    "half": {"npz": npz(image_emb=embeds(3, 0).astype(np.float16), text_emb=embeds(3, 1000).astype(np.float16))},
    "bfloat16": {"npz": None, "pth_gz": pth_gz(image_emb=embeds(3, 0), text_emb=embeds(3, 1000))},
    "synthetic beside": {
        "npz": npz(image_emb=embeds(3, 0), text_emb=embeds(3, 1000)[:1], syn_text_emb=embeds(3, 1000)[1:])
    },
    "two synthetic keys": {
        "syn_json": text({"syn_text": SYNTHETIC[:1], "model": "x", "syn_text_2": SYNTHETIC[1:]}),
        "npz": npz(
            image_emb=embeds(3, 0),
            text_emb=embeds(3, 1000)[:1],
            syn_text_2_emb=embeds(3, 1000)[2:],
            syn_text_emb=embeds(3, 1000)[1:2],
        ),
    },
}
PRECISION = {"half": 1e-3, "bfloat16": 8e-3}  # their last bit, relative


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_is_read(tmp_path, form):
    parts = members(
        **{name.replace("_json", ".json").replace("_gz", ".gz"): part for name, part in FORMS[form].items()}
    )
    dataset = read(write_tar(tmp_path / "a.tar", {"x": parts}))
    image = Image.open(io.BytesIO(next(parts[kind] for kind in ("jpg", "png", "webp") if kind in parts)))
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    augmented = [
        normalise_pixels(replay_augmentation(image, StoredAugmentation.decode(one), SIZE), mean, deviation)
        for one in STORED
    ]
    image_embeds, text_embeds, seen = embeds(3, 0), embeds(3, 1000), set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        (sample,) = dataset
        number = next(i for i, pixels in enumerate(augmented) if torch.equal(pixels, sample["pixel_values"]))
        chosen = SYNTHETIC.index(sample["synthetic_caption"])
        assert sample["key"] == "x" and sample["caption"] == "a photo"
        expected = {
            "teacher_image_embeds": image_embeds[number],
            "teacher_text_embeds": text_embeds[0],
            "teacher_synthetic_text_embeds": text_embeds[1 + chosen],
        }
        for name, row in expected.items():
            assert sample[name].dtype == torch.float32
            np.testing.assert_allclose(sample[name], unit(row), atol=PRECISION.get(form, 1e-6), rtol=0)
        seen.add((number, chosen))
    assert len(seen) == 6  # every augmentation with every synthetic caption


def test_several_captions_are_drawn_with_their_own_embeddings(tmp_path):
    captions = ["a photo", "a dog", "[a] dog"]
    stored = embeds(5, 7)
    parts = members(txt=text(captions), npz=npz(image_emb=embeds(3, 0), text_emb=stored))
    dataset, seen = read(write_tar(tmp_path / "a.tar", {"x": parts})), set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        (sample,) = dataset
        row = captions.index(sample["caption"])
        np.testing.assert_allclose(sample["teacher_text_embeds"], unit(stored[row]), atol=1e-6)
        row = 3 + SYNTHETIC.index(sample["synthetic_caption"])
        np.testing.assert_allclose(sample["teacher_synthetic_text_embeds"], unit(stored[row]), atol=1e-6)
        seen.add(sample["caption"])
    assert seen == set(captions)


def test_transparent_pixels_are_white(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (32, 24), (255, 0, 0, 0)).save(buffer, "PNG")
    parts = members(**{"jpg": None, "png": buffer.getvalue(), "paug.json": text({"param_aug": [STORED[1]] * 3})})
    (sample,) = read(write_tar(tmp_path / "a.tar", {"x": parts}), image_mean=[0.0] * 3, image_std=[1.0] * 3)
    assert (sample["pixel_values"] == 1).all()


def test_a_caption_that_begins_with_a_bracket_is_a_caption(tmp_path):
    (sample,) = read(write_tar(tmp_path / "a.tar", {"x": members(txt=b"[sold] a dog")}))
    assert sample["caption"] == "[sold] a dog"


def test_without_synthetic_captions_none_is_asked_for(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {"x": members(**{"syn.json": None}, npz=npz(image_emb=embeds(3, 0), text_emb=embeds(1, 1)))},
    )
    (sample,) = read(path, synthetic_captions=False)
    assert not [name for name in sample if "synthetic" in name]
    with pytest.raises(DamagedSampleError, match="'x', member 'syn.json'.*expected synthetic captions"):
        list(read(path))


def test_an_epoch_shows_every_sample_once_and_each_epoch_in_another_order(folder):
    dataset = read(folder, shuffle_buffer=6)
    first = keys(dataset)
    dataset.set_epoch(1)
    second = keys(dataset)
    assert len(dataset) == 23 and sorted(first) == sorted(second) == sorted(keys(read(folder, shuffle_buffer=0)))
    assert first != second != sorted(first) and keys(read(folder, shuffle_buffer=0)) == sorted(first)
    assert keys(read(folder, shuffle_buffer=6, seed=1)) != first == keys(read(folder, shuffle_buffer=6))


def test_a_draw_is_a_pure_function_of_seed_epoch_and_key(folder):
    by_key = {sample["key"]: sample for sample in read(folder)}
    for sample in read(folder, shuffle_buffer=0, process_index=1, num_processes=2, samples_per_epoch=16):
        assert same(sample, by_key[sample["key"]])
    others = read(folder, seed=1)
    assert sum(same(sample, by_key[sample["key"]]) for sample in others) < 10  # one of six draws by chance


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, tiny_clip_dir, workers):
    single, several = (load(batches(folder, tiny_clip_dir, batch_size=4), count) for count in (0, workers))
    assert len(single) == 5 and all(same(*pair) for pair in zip(single, several, strict=True))
    assert keys(load(read(folder), workers)) == keys(read(folder))


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, True), (2, True)])
def test_workers_that_outlive_an_epoch_draw_anew_and_resume_in_the_middle(folder, tiny_clip_dir, workers, persistent):
    def run(first_epoch=0, given=0):
        made = batches(folder, tiny_clip_dir, batch_size=4, shuffle_buffer=6)
        loader = DataLoader(
            made, batch_size=None, num_workers=workers, persistent_workers=persistent, collate_fn=pass_batch
        )
        made.resume(first_epoch, given)
        for epoch in range(first_epoch, 3):
            made.set_epoch(epoch)
            yield list(loader)

    expected = batches(folder, tiny_clip_dir, batch_size=4, shuffle_buffer=6)
    for epoch, given in enumerate(run()):
        expected.set_epoch(epoch)
        assert len(given) == 5 and all(same(*pair) for pair in zip(given, expected, strict=True))
    for given in (2, 4):
        middle, last = run(1, given)
        expected.set_epoch(1)
        assert all(same(*pair) for pair in zip(middle, list(expected)[given:], strict=True))
        expected.set_epoch(2)
        assert all(same(*pair) for pair in zip(last, expected, strict=True))


@pytest.mark.parametrize("processes", [2, 3, 4, 6])
def test_processes_share_the_samples_evenly(folder, processes):
    shares = [keys(read(folder, process_index=i, num_processes=processes)) for i in range(processes)]
    assert {len(share) for share in shares} == {23 // processes}
    if processes > 4:  # samples are dealt out, not shards
        assert len({key for share in shares for key in share}) == 23 // processes * processes
    else:
        assert not set.intersection(*map(set, shares))


def test_shards_change_hands_from_epoch_to_epoch(folder):
    dataset, shares = read(folder, process_index=0, num_processes=4), set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        shares.add(frozenset(keys(dataset)))
    assert len(shares) > 1


def test_an_epoch_may_be_longer_than_the_data_and_draws_anew(folder):
    samples = list(read(folder, samples_per_epoch=46))
    first, second = samples[:23], samples[23:]
    assert sorted(keys(first)) == sorted(keys(second))
    by_key = {sample["key"]: sample for sample in first}
    assert sum(same(sample, by_key[sample["key"]]) for sample in second) < 10
    assert len(list(read(folder, samples_per_epoch=5))) == 5


@pytest.mark.parametrize("stop", [0, 1, 11, 22])
def test_a_resumed_epoch_goes_on_with_the_very_samples(folder, stop):
    dataset = read(folder, shuffle_buffer=6)
    dataset.set_epoch(2)
    whole, iterator = list(dataset), iter(dataset)
    begun = [next(iterator) for _ in range(stop)]
    state = json.loads(json.dumps(dataset.state_dict())) if stop else {**dataset.state_dict(), "epoch": 2}
    resumed = read(folder, shuffle_buffer=6)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)  # as a trainer does
    rest = list(resumed)
    assert all(same(*pair) for pair in zip([*begun, *rest], whole, strict=True))
    resumed.set_epoch(3)
    assert len(list(resumed)) == 23 and resumed.state_dict()["epoch"] == 4 and resumed.state_dict()["position"] == 0


@pytest.mark.parametrize("on_bad_sample", ["raise", "skip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_exactly_with_workers_and_after_damage(tmp_path, tiny_clip_dir, workers, on_bad_sample):
    folder = write_shards(tmp_path, [9, 12])
    if on_bad_sample == "skip":
        write_tar(folder / "0002.tar", {f"bad{i}": members(npz=b"") for i in range(4)} | {"last": members(99)})
    options = {"batch_size": 2, "on_bad_sample": on_bad_sample, "samples_per_epoch": 18}
    whole = load(batches(folder, tiny_clip_dir, **options), workers)
    for given in (1, 4, 7):
        resumed = batches(folder, tiny_clip_dir, **options)
        resumed.resume(0, given)
        rest = load(resumed, workers)
        assert all(same(*pair) for pair in zip(rest, whole[given:], strict=True))


def test_a_state_of_other_data_or_settings_is_refused(folder, tmp_path):
    state = read(folder).state_dict()
    for other in (read(folder, seed=1), read(folder, shuffle_buffer=5), read(write_shards(tmp_path, [23]))):
        with pytest.raises(ValueError, match="Expected a state with"):
            other.load_state_dict(state)


def batches(shards, tokenizer_dir, **options):
    from transformers import CLIPTokenizer

    return ReinforcedBatches(shards, CLIPTokenizer.from_pretrained(tokenizer_dir), **as_values(options))


def test_a_batch_holds_what_its_docstring_says(folder, tiny_clip_dir):
    made = batches(folder, tiny_clip_dir, batch_size=5, shuffle_buffer=0)
    samples, batch = list(read(folder, shuffle_buffer=0))[:5], next(iter(made))
    assert len(made) == 4 and made.teacher_widths == WIDTHS and made.teacher_logit_scales is None
    assert batch["pixel_values"].shape == (5, 3, SIZE, SIZE)
    for name in ("pixel_values", "teacher_image_embeds", "teacher_text_embeds", "teacher_synthetic_text_embeds"):
        assert torch.equal(batch.pop(name), torch.stack([sample[name] for sample in samples]))
    for prefix, name in (("", "caption"), ("synthetic_", "synthetic_caption")):
        ids, mask = batch.pop(f"{prefix}input_ids"), batch.pop(f"{prefix}attention_mask")
        for row, sample in enumerate(samples):
            assert ids[row][mask[row].bool()].tolist() == made.tokenizer(sample[name])["input_ids"]
    assert batch == {"keys": [sample["key"] for sample in samples]}
    short = next(iter(batches(folder, tiny_clip_dir, batch_size=5, max_length=3)))
    assert short["input_ids"].shape == (5, 3) and (short["input_ids"][:, -1] == made.tokenizer.eos_token_id).all()


def nan(rows):
    array = embeds(rows, 0)
    array[1, 2] = np.nan
    return array


def as_npy(shape, content=bytes(84)):
    """A .npy file whose header says this shape, whatever follows."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (118 - len(head)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content


def zipped(kind=zipfile.ZIP_STORED, **files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def silent():
    array = embeds(3, 0)
    array[:, WIDTHS[0] :] = 0
    return array


class Command:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran')",))


def pickled():
    buffer = io.BytesIO()
    torch.save({"image_emb": Command()}, buffer)
    return gzip.compress(buffer.getvalue())


TEXT = embeds(3, 1)
DAMAGE = {
    "no image": ({"jpg": None}, "jpg", "expected an image, got the members"),
    "half an image": ({"jpg": picture(0, "JPEG")[:300]}, "jpg", "expected an image"),
    "no caption": ({"txt": None, "json": None}, "txt", "expected captions, got the members"),
    "a blank caption": ({"txt": b" "}, "txt", "captions with words"),
    "no caption in json": ({"txt": None}, "json", "captions with words"),
    "bad JSON": ({"syn.json": b"{"}, "syn.json", "expected JSON"),
    "no key of synthetic captions": ({"syn.json": text({"other": []})}, "syn.json",
                                     r"keys like 'syn_text\.\*', got \['other'\]"),
    "no augmentations": ({"paug.json": None}, "paug.json", r"expected it, got \['jpg'"),
    "bad augmentations": ({"paug.json": text({"param_aug": "["})}, "paug.json", "expected JSON"),
    "an empty list": ({"paug.json": text({"param_aug": []})}, "paug.json", "param_aug"),
    "a crop outside": ({"paug.json": text({"param_aug": [[[0, 0, 25, 32], []]] * 3})}, "paug.json", "32 x 24 pixels"),
    "an unknown operation": ({"paug.json": text({"param_aug": [[[0, 0, 5, 5], [[99, 0]]]] * 3})}, "paug.json",
                             "index below 14"),
    "no list of operations": ({"paug.json": text({"param_aug": [[[0, 0, 5, 5], 5]] * 3})}, "paug.json",
                              "expected a list of operations"),
    "a crop past floats": ({"paug.json": text({"param_aug": [[[0, 0, 5, 10**400], []]] * 3})}, "paug.json",
                           "expected .*top, left"),
    "no embeddings": ({"npz": None}, "npz or pth.gz", "expected embeddings"),
    "no npz": ({"npz": b"text"}, "npz", "expected arrays of numbers"),
    "half an npz": ({"npz": npz(image_emb=embeds(3, 0))[:-40]}, "npz", "expected arrays of numbers"),
    "objects": ({"npz": npz(image_emb=np.array([Command()]), text_emb=TEXT)}, "npz", "allow_pickle"),
    "a pickle": ({"npz": None, "pth.gz": pickled()}, "pth.gz", "UnpicklingError"),
    "no gzip": ({"npz": None, "pth.gz": b"text"}, "pth.gz", "BadGzipFile"),
    "no torch file": ({"npz": None, "pth.gz": gzip.compress(b"text")}, "pth.gz", "not a zip file"),
    "no array": ({"npz": npz(text_emb=TEXT)}, "npz", "'image_emb'.*got NoneType"),
    "integers": ({"npz": npz(image_emb=np.ones((3, 7), int), text_emb=TEXT)}, "npz", "floating point"),
    "N for M augmentations": ({"npz": npz(image_emb=embeds(2, 0), text_emb=TEXT)}, "npz",
                              r"augmentations.*\(3, 7\), got \(2, 7\)"),
    "N for M captions": ({"npz": npz(image_emb=embeds(3, 0), text_emb=TEXT[:2])}, "npz",
                         r"captions \(1\).*\(3, 7\), got \(2, 7\)"),
    "another width": ({"npz": npz(image_emb=embeds(3, 0)[:, :6], text_emb=TEXT)}, "npz", r"\(3, 7\), got \(3, 6\)"),
    "NaN": ({"npz": npz(image_emb=nan(3), text_emb=TEXT)}, "npz", "finite numbers, got NaN or infinity in row 1"),
    "deep JSON": ({"syn.json": b"[" * 100_000}, "syn.json", "expected JSON in it, got .*recursion"),
    "deep augmentations": ({"paug.json": text({"param_aug": "[" * 100_000})}, "paug.json", "JSON in it.*recursion"),
    "a number of 5000 digits": ({"paug.json": b"9" * 5000}, "paug.json", "expected JSON in it, got .*digits"),
    "a caption in another encoding": ({"txt": b"caf\xe9"}, "txt", "expected UTF-8 text in .*0xe9"),
    "half a character": ({"syn.json": rb'{"syn_text": ["a \ud83d"]}'}, "syn.json", "captions with words"),
    "a NUL in a caption": ({"syn.json": text({"syn_text": ["a\0b"]})}, "syn.json", "captions with words"),
    "numbers for captions": ({"syn.json": text({"syn_text": [1, 2]})}, "syn.json", r"with words.*got \[1, 2\]"),
    "an object for captions": ({"txt": None, "json": text({"captions": {"a": "b"}})}, "json", "captions with words"),
    "a crop of booleans": ({"paug.json": text({"param_aug": [[[True, 0, 5, 5], []]] * 3})}, "paug.json", "top, left"),
    "500 GB by its header": ({"npz": zipped(image_emb=as_npy((17_857_142_857, 7)))}, "npz",
                             r"499999999996 bytes for the shape \(17857142857, 7\), got 84"),
    "a shape below 0": ({"npz": zipped(image_emb=as_npy((-3, -7)))}, "npz", "for the shape"),
    "a header that is none": ({"npz": zipped(image_emb=as_npy("(" * 50))}, "npz", "expected arrays of numbers"),
    "numbers of 128 bits": ({"npz": npz(image_emb=embeds(3, 0).astype(np.longdouble), text_emb=TEXT)}, "npz",
                            "floating point numbers"),
    "infinity": ({"npz": npz(image_emb=embeds(3, 0) * np.inf, text_emb=TEXT)}, "npz", "numbers, got NaN or inf"),
    "no direction": ({"npz": npz(image_emb=silent(), text_emb=TEXT)}, "npz", "direction from every teacher"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sample_is_named_or_skipped_and_counted(tmp_path, caplog, damage):
    changes, member, problem = DAMAGE[damage]
    samples = {"a": members(1), "b": members(2) | changes, "c": members(3)}
    samples["b"] = {name: part for name, part in samples["b"].items() if part is not None}
    path = write_tar(tmp_path / "some.tar", samples)
    with pytest.raises(DamagedSampleError, match=problem) as caught:
        list(read(path))
    assert f"Shard '{path}', sample 'b', member '{member}" in str(
        caught.value
    ) and "--dmclip.on_bad_sample skip" in str(caught.value)
    dataset = read(path, on_bad_sample="skip", samples_per_epoch=2)
    assert sorted(keys(dataset)) == ["a", "c"] and dataset.skipped in ({"some.tar": 1}, {})
    dataset = read(path, on_bad_sample="skip", samples_per_epoch=4)
    assert keys(dataset).count("b") == 0 and dataset.skipped["some.tar"] >= 1
    assert "sample 'b'" in caplog.text


def test_damage_met_by_a_worker_is_named_too(tmp_path):
    path = write_tar(tmp_path / "some.tar", {"a": members(1), "b": members(2, txt=b"")})
    with pytest.raises(DamagedSampleError, match="some.tar', sample 'b', member 'txt': expected one or more captions"):
        load(read(path), workers=1)


@pytest.mark.parametrize(
    ("changes", "member", "problem"),
    [
        ({"npz": None, "pth.gz": gzip.compress(bytes(64 << 20), 1)}, "pth.gz", "more than 1 MiB unpacked"),
        (
            {"npz": zipped(zipfile.ZIP_DEFLATED, image_emb=bytes(64 << 20))},
            "npz",
            "at most 1 MiB unpacked, got 67108864",
        ),
        ({"npz": zipped(zipfile.ZIP_LZMA, image_emb=b"x")}, "npz", "compressed in a way that is not read"),
        ({"npz": bytes(2 << 20)}, "npz", "expected at most 1 MiB, got 2097152 bytes"),
        ({"txt": b"a " * (1 << 20)}, "txt", "expected at most 1 MiB, got 2097152 bytes"),
    ],
    ids=["gzip bomb", "zip bomb", "lzma", "large arrays", "a large text"],
)
def test_what_unpacks_to_too_much_is_named_before_it_is_unpacked(tmp_path, monkeypatch, changes, member, problem):
    monkeypatch.setattr(shards_module, "MOST_ARRAY_BYTES", 1 << 20)
    monkeypatch.setattr(shards_module, "MOST_TEXT_BYTES", 1 << 20)
    bad = {name: part for name, part in (members(2) | changes).items() if part is not None}
    path = write_tar(tmp_path / "a.tar", {"good": members(1), "bad": bad})
    with pytest.raises(DamagedSampleError, match=f"sample 'bad', member '{member}': .*{problem}"):
        list(read(path))
    dataset = read(path, on_bad_sample="skip", samples_per_epoch=2)
    tracemalloc.start()
    assert keys(dataset) == ["good", "good"] and dataset.skipped == {"a.tar": dataset.skipped["a.tar"]}
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def header(name="b.jpg", size=b"00000000000", kind=b"0"):
    """A tar header with a right checksum, whatever it says."""
    head = name.encode().ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"0" * 11 + b"\0"
    head = (head + b" " * 8 + kind).ljust(257, b"\0") + b"ustar\00000"
    head = head.ljust(512, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (header(size=b"-0000001000"), "damage at or after byte"),
        (header(size=b"1_000"), "damage at or after byte"),
        (header(size=b"\x80" + (1 << 62).to_bytes(11, "big")), "sample 'b', member 'jpg': expected 46116860184"),
        (header(size=b"\xff" * 12), "damage at or after byte"),
        (header(size=b"77777777777"), "sample 'b', member 'jpg': expected 8589934591 bytes"),
        (header(size=b"77777777777", kind=b"L"), "a header of 8589934591 bytes"),
        (header(size=b"77777777777", kind=b"x"), "a header of 8589934591 bytes"),
        (header(size=b"00000001000", kind=b"x") + b"99 path=a".ljust(512), "a malformed extended header"),
        (header()[:100] + b"9" + header()[101:], "its checksum is wrong"),
    ],
)
def test_headers_that_lie_end_the_shard_with_a_line(tmp_path, block, problem):
    path = write_tar(tmp_path / "a.tar", {"a": members(1)})
    end = max(offset + size for place in scan_shard(path) for offset, size in place.members.values())
    path.write_bytes(path.read_bytes()[: -(-end // 512) * 512] + block + bytes(1024))
    with pytest.raises(DamagedSampleError, match=f"Shard '{path}'.*{problem}"):
        list(scan_shard(path))
    dataset = read(path, on_bad_sample="skip", samples_per_epoch=2)
    assert keys(dataset) == ["a", "a"] and dataset.skipped["a.tar"] >= 1


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
    ],
)
def test_a_link_or_a_device_in_place_of_a_picture_is_named(tmp_path, kind, what):
    (tmp_path / "secret.jpg").write_bytes(picture(0, "JPEG"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members().items():
            info = tarfile.TarInfo(f"x.{name}")
            info.size, info.type = (0, kind) if name == "jpg" else (len(content), tarfile.REGTYPE)
            info.linkname = str(tmp_path / "secret.jpg")
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DamagedSampleError, match=f"sample 'x'.*expected an image, got the members .*jpg \\({what}"):
        list(read(tmp_path / "a.tar"))


def test_members_of_every_writer_are_placed_as_tarfile_places_them(tmp_path):
    names = ["a.txt", "b/c.txt", "l" * 180 + ".txt", "p" * 90 + "/" + "q" * 90 + ".txt", "é" * 60 + ".txt"]
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path, placed = tmp_path / f"{number}.tar", {}
        with tarfile.open(path, "w", format=form, pax_headers={"comment": "x"} if number == 2 else {}) as tar:
            for name in names if number else [names[0], names[3]]:
                info = tarfile.TarInfo(name)
                info.size = len(name)
                tar.addfile(info, io.BytesIO(name.encode()[: len(name)]))
        with tarfile.open(path) as tar:
            placed = {info.name: (info.offset_data, info.size) for info in tar}
        assert {f"{place.key}.txt": place.members["txt"] for place in scan_shard(path)} == placed


def test_a_name_that_is_no_utf8_is_read_and_can_be_written(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members().items():
            info = tarfile.TarInfo(f"caf\xe9.{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert keys(read(tmp_path / "a.tar")) == ["caf\\xe9"]


def test_a_key_that_comes_again_later_is_damage_and_its_first_sample_is_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, key in enumerate("xyx"):
            for kind, content in members(number).items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DamagedSampleError, match="sample 'x'.*expected an image, got the members .*repeated"):
        list(read(tmp_path / "a.tar"))
    assert sorted(keys(read(tmp_path / "a.tar", on_bad_sample="skip", samples_per_epoch=2))) == ["x", "y"]


def test_big_endian_embeddings_are_the_same_numbers(tmp_path):
    swapped = npz(image_emb=embeds(3, 0).astype(">f4"), text_emb=np.asfortranarray(embeds(3, 1000).astype(">f8")))
    plain = write_tar(tmp_path / "plain.tar", {"x": members(0)})
    other = write_tar(tmp_path / "other.tar", {"x": members(0, npz=swapped)})
    assert same(*(next(iter(read(path))) for path in (plain, other)))


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_what_workers_leave_out_is_counted_in_the_main_process(tmp_path, workers, persistent):
    path = write_tar(
        tmp_path / "some.tar", {key: members(2, txt=b"" if key in "bd" else b"a dog") for key in "abcdef"}
    )
    dataset = read(path, on_bad_sample="skip", samples_per_epoch=4)
    options = {"num_workers": workers, "persistent_workers": persistent, "collate_fn": pass_batch}
    loader, alone = DataLoader(dataset, batch_size=None, **options), 0
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert not {"b", "d"} & set(keys(list(loader)))
        assert dataset.num_skipped > alone
        alone = dataset.num_skipped
    assert workers or dataset.num_skipped == sum(dataset.skipped.values())


def test_a_member_that_comes_twice_is_damage(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, content in [*members().items(), ("txt", b"a dog")]:
            info = tarfile.TarInfo(f"x.{kind}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DamagedSampleError, match="'x', member 'txt': expected it once"):
        list(read(tmp_path / "a.tar"))


@pytest.mark.parametrize("kept", [1.0, 0.95, 0.7, 0.55, 0.4])
def test_of_a_truncated_shard_the_whole_samples_before_the_end_are_read(tmp_path, kept):
    path = write_tar(tmp_path / "a.tar", {key: members(number) for number, key in enumerate("abcd")})
    whole = {place.key: max(offset + size for offset, size in place.members.values()) for place in scan_shard(path)}
    size = int(max(whole.values()) * kept)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedSampleError, match=r"Shard '.*a.tar'.*(the end of the file|damage at or after byte)"):
        read(path)
    survivors = sorted(key for key, end in whole.items() if end <= size)
    dataset = read(path, on_bad_sample="skip", samples_per_epoch=len(survivors))
    assert survivors and sorted(keys(dataset)) == survivors


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty shard|damage"),
        (bytes(10240), "empty shard"),
        (b"no tar at all" * 100, "expected an uncompressed tar"),
        (gzip.compress(bytes(10240)), "expected an uncompressed tar"),
    ],
    ids=["no bytes", "no members", "text", "compressed"],
)
def test_a_shard_without_samples_is_named_or_skipped(tmp_path, content, problem):
    write_shards(tmp_path, [3])
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(DamagedSampleError, match=f"bad.tar.*({problem})"):
        read(tmp_path)
    dataset = read(tmp_path, on_bad_sample="skip", samples_per_epoch=6)
    assert len(keys(dataset)) == 6 and dataset.skipped["bad.tar"] >= 1


def test_a_shard_that_goes_away_is_named_or_skipped(tmp_path):
    whole = read(write_shards(tmp_path, [3, 2]), on_bad_sample="skip", samples_per_epoch=4)
    strict = read(tmp_path)
    (tmp_path / "0001.tar").unlink()
    with pytest.raises(DamagedSampleError, match="0001.tar': expected a file that can be read, got No such file"):
        list(strict)
    assert len(keys(whole)) == 4 and whole.skipped["0001.tar"] >= 1
    files, place = shards_module.ShardFiles(), next(scan_shard(tmp_path / "0000.tar"))
    (tmp_path / "0000.tar").unlink()
    with pytest.raises(DamagedSampleError, match="sample '00000', member 'txt': expected a file that can be read"):
        files.read(place, "txt")


def test_where_all_is_damaged_the_reader_stops(tmp_path):
    path = write_tar(tmp_path / "a.tar", {key: members(npz=b"") for key in "abc"})
    with pytest.raises(ValueError, match="got 3 damaged and no other"):
        list(read(path, on_bad_sample="skip"))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_of_any_length_and_folders_are_read(tmp_path, tar_format):
    names = (
        ["a", "folder/b", "long" * 40, "é", "folder/c"] if tar_format != tarfile.USTAR_FORMAT else ["a", "folder/b"]
    )
    path = write_tar(tmp_path / "a.tar", {key: members(number) for number, key in enumerate(names)}, tar_format)
    assert keys(read(path, shuffle_buffer=0)) == names


def test_what_is_no_sample_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in {
            "README": b"hello",
            ".hidden.txt": b"x",
            **{f"d/k.{k}": c for k, c in members().items()},
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("empty")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    assert keys(read(tmp_path / "a.tar")) == ["d/k"]


def test_shards_by_pattern(folder):
    names = [path.name for path in find_shards(folder / "*.tar")[0]]
    assert names == ["0000.tar", "0001.tar", "0002.tar", "0003.tar"]
    assert [path.name for path in find_shards(f"{folder}/{{0001..0003}}.tar")[0]] == names[1:]
    assert [path.name for path in find_shards(f"{folder}/000{{0,3}}.tar")[0]] == ["0000.tar", "0003.tar"]
    with pytest.raises(FileNotFoundError, match="No shard '.*0004.tar'"):
        find_shards(f"{folder}/{{0003..0004}}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{0..2}", ["0", "1", "2"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{8..010}", ["008", "009", "010"]),
        ("{5..5}x", ["5x"]),
        ("{a,{b,c}d}e", ["ae", "bde", "cde"]),
        ("{{1..2},4}", ["1", "2", "4"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a,a}", ["a"]),
        ("a{b", ["a{b"]),
        ("a}b{c}", ["a}b{c}"]),
    ],
)
def test_braces_stand_for_what_a_shell_takes_them_for(tmp_path, pattern, names):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find_shards(tmp_path / pattern)[0]] == names


@pytest.mark.parametrize(
    "pattern", ["{0..999999999}", "{0..999}{0..999}", "{0..9}" * 21, "{5..1}", "{0..99999999999999999999}"]
)
def test_braces_that_stand_for_too_much_or_nothing_are_refused_at_once(tmp_path, pattern):
    with pytest.raises((ValueError, FileNotFoundError), match="Expected (at most|.*FIRST <= LAST)|No shard"):
        find_shards(f"{tmp_path}/{pattern}.tar")


def test_wrong_arguments_are_refused(folder, tmp_path, tiny_clip_dir):
    with pytest.raises(FileNotFoundError, match="No \\*.tar in the folder"):
        read(tmp_path)
    with pytest.raises(ValueError, match="Expected image_size and teacher_widths"):
        read(folder, teacher_widths=None)
    with pytest.raises(ValueError, match="Expected image_size and teacher_widths"):
        read(folder, image_size=None)
    for wrong in (
        {"image_size": -64},
        {"image_size": 10**6},
        {"teacher_widths": ("4", 3)},
        {"teacher_widths": (8, -1)},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected an integer from 1 to"):
            read(folder, **wrong)
    with pytest.raises(ValueError, match="on_bad_sample"):
        read(folder, on_bad_sample="ignore")
    with pytest.raises(ValueError, match="process_index"):
        read(folder, process_index=2, num_processes=2)
    with pytest.raises(ValueError, match="Expected at least 30 samples an epoch"):
        batches(folder, tiny_clip_dir, batch_size=30)
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        batches(folder, tiny_clip_dir, batch_size=0)


def index_of(counts, **changes):
    return {
        "teachers": [{"width": width, "logit_scale": 4.6} for width in WIDTHS],
        "settings": {"image_size": SIZE},
        "counts": {"synthetic_captions": 1},
        "shards": [{"file": f"{number:04d}.tar", "samples": count} for number, count in enumerate(counts)],
        **changes,
    }


def test_an_index_says_what_is_needed_and_is_held_to_its_word(tmp_path, caplog):
    write_shards(tmp_path, [3, 4])
    (tmp_path / "stray.tar").write_bytes(b"not in the index")
    index = tmp_path / "reinforced.json"
    index.write_text(json.dumps(index_of([3, 4])))
    dataset = ReinforcedDataset(tmp_path, share=ProcessShare(0, 1))
    assert len(dataset) == len(list(dataset)) == 7 and dataset.teacher_widths == WIDTHS
    assert dataset.teacher_logit_scales == (4.6, 4.6)
    assert next(iter(dataset))["pixel_values"].shape == (3, SIZE, SIZE)
    assert next(iter(read(tmp_path, image_size=8)))["pixel_values"].shape == (3, 8, 8)
    index.write_text(json.dumps(index_of([3, 5])))
    with pytest.raises(DamagedSampleError, match="0001.tar': expected 5 samples as the index says, got 4"):
        list(read(tmp_path))
    index.write_text(json.dumps(index_of([3, 4, 1])))
    with pytest.raises(FileNotFoundError, match="1 of 3 shards is missing, first: '.*0002.tar'"):
        read(tmp_path)
    index.write_text(json.dumps(index_of([])))
    with pytest.raises(ValueError, match="not finished"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (None, "has no key 'shards'"),
        ([], "Expected a JSON object"),
        ({"shards": 5}, "expected a list under 'shards', got 5"),
        ({"shards": [{"file": "../x.tar", "samples": 3}]}, r"Shard 0 .*name of a file beside it .*got '../x.tar'"),
        ({"shards": [{"file": "/etc/x.tar", "samples": 3}]}, "name of a file beside it"),
        ({"shards": [{"file": "..", "samples": 3}]}, "name of a file beside it"),
        ({"shards": [{"file": "a\0.tar", "samples": 3}]}, "NUL"),
        ({"shards": [{"file": 3, "samples": 3}]}, "Shard 0 .*expected text under 'file', got 3"),
        ({"shards": [{"file": "0000.tar", "samples": "3"}]}, "Shard 0 .*expected an integer under 'samples', got '3'"),
        ({"shards": [{"file": "0000.tar", "samples": -3}]}, "expected 'samples' of at least 0, got -3"),
        ({"shards": [{"file": "0000.tar", "samples": 10**30}]}, "expected 'samples'"),
        ({"teachers": {"width": 7}}, "expected a list under 'teachers'"),
        ({"teachers": [{"width": -4, "logit_scale": 4.6}]}, "Teacher 0 .*expected 'width' of at least 1, got -4"),
        ({"teachers": [{"width": "4", "logit_scale": 4.6}]}, "expected an integer under 'width', got '4'"),
        (
            {"teachers": [{"width": 4, "logit_scale": float("nan")}]},
            "expected a (logarithm as|number under .)logit_scale.*, got nan",
        ),
        ({"teachers": [{"width": 4, "logit_scale": 1e9}]}, "expected a logarithm"),
        ({"settings": {"image_size": 0}}, "expected 'image_size' of at least 1, got 0"),
        ({"settings": None}, "expected an object under 'settings'"),
        ({"counts": {}}, "Counts .*has no key 'synthetic_captions'"),
    ],
)
def test_an_index_of_another_form_is_named_with_its_entry(tmp_path, changes, problem):
    write_shards(tmp_path, [3])
    content = {} if changes is None else index_of([3]) | changes if isinstance(changes, dict) else changes
    (tmp_path / "reinforced.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"reinforced.json' is malformed: .*{problem}"):
        read(tmp_path)


def test_batches_survive_pickling_for_spawned_workers(folder, tiny_clip_dir):
    made = batches(folder, tiny_clip_dir, batch_size=4)
    assert all(same(*pair) for pair in zip(made, pickle.loads(pickle.dumps(made)), strict=True))
