"""Keys, fingerprints, cache file names and records of fixed inputs, as literal values.

A value here never changes, so that what earlier runs wrote is found again. Where one depends on a library's version,
the test computes it again from the same parts with hashlib alone.
"""

import hashlib
import json
import shutil
import sys
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from torch import nn
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPModel,
    TrainingArguments,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from modeling_dclip import DCLIPConfig, DCLIPModel, DCLIPProcessor, DCLIPTeacher, DMCLIPModel
from modeling_dclip.data.captions import load_captions, split_train_validation
from modeling_dclip.data.chunks import compute_chunks
from modeling_dclip.data.columns import dataset_fingerprint, hash_images, image_keys, row_keys
from modeling_dclip.data.files import user_cache_dir
from modeling_dclip.data.labels.webdataset import WebdatasetFiles
from modeling_dclip.data.questions.tables import standardise_items
from modeling_dclip.data.regions import add_regions
from modeling_dclip.data.regions.detectors import (
    AnnotationDetector,
    GridDetector,
    TransformersDetector,
    UltralyticsDetector,
)
from modeling_dclip.data.regions.detectors import fingerprint as fingerprint_detector
from modeling_dclip.data.reinforced import ProcessShare, ReinforcedDataset
from modeling_dclip.data.reinforced.augmentations import AugmentationSettings, draw_augmentation
from modeling_dclip.data.reinforced.teachers import TransformersCaptioner
from modeling_dclip.data.reinforced.writer import write_reinforced
from modeling_dclip.distillation.recipes import parse_recipe
from modeling_dclip.distillation.run import StageRecord
from modeling_dclip.distillation.stages import run_stages
from modeling_dclip.encoders.fingerprints import (
    combine_keys,
    fingerprint_model,
    fingerprint_processor,
    fingerprint_text_encoder,
    fingerprint_tokens,
    hash_file,
    model_revision,
)
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.encoders.open_clip import (
    OpenClipDualEncoder,
    OpenClipImageProcessor,
    OpenClipProcessor,
    OpenClipTokenizer,
    fingerprint_open_clip,
)
from modeling_dclip.evaluation.benchmarks.fine_grained import questions_fingerprint
from modeling_dclip.evaluation.benchmarks.kinds import EvaluationOptions, load_benchmark
from modeling_dclip.evaluation.benchmarks.zero_shot import ClassifierCache
from modeling_dclip.evaluation.evaluator import Candidate, evaluate
from modeling_dclip.evaluation.leakage import LeakageOptions, evaluate_leakage
from modeling_dclip.evaluation.records import (
    environment,
    make_record,
    outcomes_path,
    read_outcomes,
    record_key,
    write_outcomes,
    write_results,
)
from modeling_dclip.evaluation.reports.gallery import page_name
from modeling_dclip.evaluation.reports.tables import short_hash
from modeling_dclip.hub.index import write_index
from modeling_dclip.hub.index.build import build_index
from modeling_dclip.hub.index.embeddings import EmbeddingStore, fingerprint_encoder
from modeling_dclip.hub.publish.push import find_differences
from modeling_dclip.hub.space import SpaceAnswers

# Two pictures of 3 x 2 pixels, one red and one blue, as bytes of PNG.
HEADER = "89504e470d0a1a0a0000000d49484452000000030000000208020000001216f14d"
RED = bytes.fromhex(f"{HEADER}0000001049444154789c63fccf00054c3006030013290103f0d807840000000049454e44ae426082")
BLUE = bytes.fromhex(
    f"{HEADER}0000001549444154789c636460f8cfc0c0c0c0c0c0c4000300112b0103dd8814670000000049454e44ae426082"
)


def naive_key(*parts):
    """SHA-256 of texts, one a line."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def captioned(**columns):
    features = {"image_id": Value("string"), "image": Image(), "captions": List(Value("string"))}
    kinds = {"boxes": List(List(Value("float32"), length=4)), "box_scores": List(Value("float32"))}
    kinds |= {"negative_captions": List(List(Value("string"))), "categories": List(Value("string"))}
    rows = {
        "image_id": ["first", "second"],
        "image": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": None}],
        "captions": [["a red square", "it is red"], ["blaues Quadrat: \u00e4"]],
    }
    features |= {name: kinds[name] for name in columns if name in kinds}
    return Dataset.from_dict(rows | columns, features=Features(features))


BOXES = {"boxes": [[[0, 0, 2, 2], [1, 0, 3, 1.5]], []], "box_scores": [[0.5, 0.25], []]}


class ConstantEncoder(nn.Module):
    """A dual encoder of constants, each of which says by its values which one it is."""

    def __init__(self):
        super().__init__()
        self.vision_model, self.text_model = nn.Linear(2, 1), nn.Linear(3, 2).half()
        self.visual_projection = nn.Linear(1, 2, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        for start, parameter in enumerate(self.parameters()):
            values = torch.arange(start, start + parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
            parameter.data = values.to(parameter.dtype)
        settings = {"hidden_size": 3, "_name_or_path": "here", "transformers_version": "0", "dtype": "float32"}
        text_config = SimpleNamespace(to_dict=lambda: settings | {"architectures": None})
        nested = {"model_type": "constant", "text_config": {**settings, "auto_map": {}}, "rate": 0.5}
        self.config = SimpleNamespace(to_dict=lambda: nested | settings, text_config=text_config)


class Tokenizer:
    """Token ids are the letters' code points; a vocabulary of three."""

    model_max_length = 7

    def __init__(self, **more):
        parts = {"version": "1.0", "truncation": None, "padding": {"length": 7}, "model": {"vocab": {"a": 0}}, **more}
        self.backend_tokenizer = SimpleNamespace(to_str=lambda: json.dumps(parts))

    def __call__(self, texts, truncation=True):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def make_processor(tokenizer=None):
    settings = {"size": {"height": 2}, "image_mean": [0.5, 0.25, 0.125], "processor_class": "A", "rescale": True}
    return SimpleNamespace(
        image_processor=SimpleNamespace(to_dict=lambda: settings), tokenizer=tokenizer or Tokenizer()
    )


def test_keys_of_rows():
    dataset = captioned()
    assert image_keys(dataset) == [
        "e3912111240cc23d3907176b114871cb7c9c47e3f55202afa61554de07f4baa9",
        "7ec39bb8586c5a98734443ff6d7c3d4f7fca19241c3646b8041279fe5b8ff5b0",
    ]
    assert row_keys(dataset) == [
        "d7001d34b9acca6485626221a56bd595a765ab1527872fca6f1ceaee8e9fa387",
        "9a595ff2b029c1e7777b8873d5b32f91637ea5fe9f6fc434432e3f41a53c9cb0",
    ]
    assert row_keys(captioned(**BOXES)) == [
        "ab08dc2d389020ab5a87b0bbd9d6f88abf0415a1125a90bcf1ce99c4eaf6b467",
        "9a595ff2b029c1e7777b8873d5b32f91637ea5fe9f6fc434432e3f41a53c9cb0",
    ]
    assert row_keys(dataset, ["x", "y"]) == [
        "eecebfc00d2a08f03bd1918f34e31f095ce85d799490615673543dc2ca14e66b",
        "c5c21d295f8cf3c2f7252832fd4e368653476284f11c17bcadd703198a7e4695",
    ]
    assert row_keys(captioned(captions=[None, ["a", None]])) == [
        "fb26c559781068f148e0068baec5eff3deb37d7a2a65e6ad890a045c819d76dc",
        "ab6539adacc93d7ddc2d9299e09bd0aecfffbc992663b6fbc34bf4d4c1e68ef5",
    ]
    assert hash_images(dataset) == image_keys(dataset)
    assert combine_keys(["one", "two"]) == "21066d108d5319ecb5a1fc4454f42ef22fc5f1c7df49c31d90294950e0ea8b2c"
    assert combine_keys([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_draws_of_rows_by_their_ids(tmp_path):
    ids = [f"row-{number}" for number in range(8)]
    columns = {"image_id": ids, "image": [{"bytes": RED, "path": None}] * 8, "captions": [["a"]] * 8}
    captioned(**columns).save_to_disk(tmp_path / "data")
    assert load_captions(f"disk:{tmp_path / 'data'}@3", seed=5)["image_id"][:] == ["row-0", "row-6", "row-7"]
    train, validation = split_train_validation(load_captions(f"disk:{tmp_path / 'data'}"), 0.5, 5)
    assert train["image_id"][:] == ["row-0", "row-1", "row-2", "row-4"]
    assert validation["image_id"][:] == ["row-3", "row-5", "row-6", "row-7"]


def test_fingerprints_of_models_and_processors():
    model = ConstantEncoder()
    assert fingerprint_model(model) == "ba692f9394800a283e38fc2108421b9bfc16971449aafe61ed5dc86ce717a4a8"
    assert fingerprint_text_encoder(model) == "5ba3396613f63e7b49d5993a0a2ee99b9b2a89db9a3e183bc5e9353ebeb6d11d"
    del model.config
    assert fingerprint_text_encoder(model) == "10789880295fb9934f64aaa2538f8882eaccdb9b95b3ab3a466e17d415abcc39"
    processor = make_processor()
    assert fingerprint_processor(processor) == "5e4bf8865143bc7c26d399d2aa371562f6c807949e81872f3f54dcf4092f5887"
    assert (
        fingerprint_encoder(ConstantEncoder(), processor)
        == "ab8957a0084f998c30457d8c7249be671eaf268760c26da63a99c3b24f0a77cd"
    )
    unlike = SimpleNamespace(transform=["a", 1], note="<x at 0x7f00>")
    assert (
        fingerprint_encoder(ConstantEncoder(), SimpleNamespace(image_processor=unlike))
        == "cf20e5b7fc1176c84d74eea247ea91b1f1492e5f1d635a70f44c54cd1d61318c"
    )
    assert (
        fingerprint_tokens(processor, ["ab", "c"])
        == "202af13ffdd6d4047578f53d58a4df86450ceeff70906f9c50345b4170321552"
    )
    assert (
        fingerprint_tokens(processor.tokenizer, ["ab"] * 8193)
        == "e9cc0c81a68293b5deb77dc639d6cffd5abab78727f01042376d33aeb3839d80"
    )
    tensors = lambda texts, truncation: {"input_ids": torch.tensor([[1, 2], [3, 4]])}  # noqa: E731
    assert (
        fingerprint_tokens(tensors, ["ab", "c"]) == "1e258794ed040eaaeb79d8bc21043c96b5aadaf3a4b51c76b2a76869f139f5f2"
    )


def test_fingerprint_of_a_sentencepiece_processor(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"pieces")

    class SiglipTokenizer:
        model_max_length = 16
        vocab_file = str(tmp_path / "spiece.model")
        init_kwargs = {"vocab_file": "anywhere", "name_or_path": "anywhere", "eos_token": "</s>"}

    assert (
        fingerprint_processor(make_processor(SiglipTokenizer()))
        == "16b3825ab9a5462ca1693e9cd737c3b420c72c0ebc77eb15e332ab540942c6ec"
    )


def test_fingerprint_of_a_pair_of_open_clip():
    tokenizer = OpenClipTokenizer(lambda texts: torch.zeros(len(texts), 5, dtype=torch.long))

    class Transform:
        def __repr__(self):
            return "Compose(Resize(2))"

    processor = OpenClipProcessor(OpenClipImageProcessor(Transform()), tokenizer)
    model = OpenClipDualEncoder(ConstantEncoder(), "ViT-Tiny", tokenizer.model_max_length)
    assert fingerprint_open_clip(model) == "5086d0d831d18cf483e92309b6845c7fb769ca52cacab4a820fe41794469e40c"
    assert (
        fingerprint_open_clip(model, processor) == "856b5195b0fa9b23b3239d0bf6977522ada98fa5c9a9fe625061d0fc3e515400"
    )
    assert fingerprint_text_encoder(model) == "b83606241718c3bdd35107857f8120498e828a161b6035a8e82dabc7249688bd"
    del model.config
    assert fingerprint_text_encoder(model) == "78a6aa40f6864294b4da65012cf255899f333352cd9dab6e4f1db0c86ebee0b2"


def test_fingerprints_of_detectors(tmp_path, monkeypatch):
    assert fingerprint_detector("kind", {"b": 1, "a": None}, [0.5, "x"]) == "kind-84187257a664e8dcc3778d36"
    assert GridDetector("2x3").fingerprint == "grid-5bf775530e2e5fcd9c6ae577"
    assert AnnotationDetector().fingerprint == "annotations-d02f91686dd4b332066cafaf"
    assert AnnotationDetector(on_bad_box="skip", keep_crowd=True).fingerprint == "annotations-161c3fc30f628d3389c1a7bb"
    path = tmp_path / "instances.json"
    path.write_text('{"images": [{"id": 1, "width": 3, "height": 2}], "annotations": []}')
    assert AnnotationDetector(str(path)).fingerprint == "annotations-9c97754f811b705b3bdb7bac"
    (tmp_path / "yolo.pt").write_bytes(b"weights")
    stub = SimpleNamespace(YOLO=lambda weights: SimpleNamespace(task="detect", ckpt_path=weights))
    monkeypatch.setitem(sys.modules, "ultralytics", stub)
    assert UltralyticsDetector(str(tmp_path / "yolo.pt")).fingerprint == "ultralytics-0662c64a9f43b6be2a7950b4"


def test_regions_lie_under_the_detector_and_the_image(tmp_path):
    class Detector:
        fingerprint = "fixed-0123"

        def __call__(self, images, rows):
            return [(np.array([[0, 0, 2, 2]], np.float32), np.array([0.5], np.float32)) for _ in images]

    add_regions(captioned(), Detector(), cache_dir=tmp_path / "cache", report_file=tmp_path / "report.json")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "cache").rglob("*.npy"))
    assert files == [
        "cache/fixed-0123/7e/7ec39bb8586c5a98734443ff6d7c3d4f7fca19241c3646b8041279fe5b8ff5b0.npy",
        "cache/fixed-0123/e3/e3912111240cc23d3907176b114871cb7c9c47e3f55202afa61554de07f4baa9.npy",
    ]
    assert np.load(tmp_path / files[0]).tolist() == [[0, 0, 2, 2, 0.5]]
    assert (tmp_path / "report.json").read_text() == (
        "{\n"
        '  "detector": "fixed-0123",\n'
        '  "images": 2,\n'
        '  "computed_images": 2,\n'
        '  "cached_images": 0,\n'
        '  "dropped_boxes_of_computed_images": 0,\n'
        '  "skipped_images": 0,\n'
        '  "skipped": []\n'
        "}\n"
    )


def test_places_of_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = [user_cache_dir("regions"), user_cache_dir("classifiers"), WebdatasetFiles("http://a/b").cache_dir]
    places = [place.relative_to(tmp_path).as_posix() for place in places]
    assert places == ["modeling_dclip/regions", "modeling_dclip/classifiers", "modeling_dclip/shards"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_dir("regions") == tmp_path / ".cache" / "modeling_dclip" / "regions"


def test_names_of_chunks(tmp_path):
    options = {"made_by": "weights", "cache_dir": tmp_path, "chunk_rows": 2, "desc": "", "alone": True}
    paths = compute_chunks(["a", "b", "c"], lambda rows: {"n": np.arange(len(rows))}, **options)
    assert [path.name for path in paths] == [
        "7b840909c0f9232d285a26b2aca5f25eda5038e1554def489eb4a16ea44aed67.safetensors",
        "3b385d0b784ea2947ae966d3d1a40906b273b25869617336fcde5aa66e33d40b.safetensors",
    ]
    store = EmbeddingStore(tmp_path / "store", "0123456789abcdef" * 4)
    keys = [sha256(RED), None, sha256(BLUE), sha256(RED)]
    store.add(keys, lambda rows: (np.ones((len(rows), 2), np.float32), [True] * len(rows)), 4)
    files = [path.relative_to(tmp_path).as_posix() for path in sorted((tmp_path / "store").rglob("*.safetensors"))]
    assert files == [
        "store/0123456789abcdef/babdea6ea1eafae0d2406854d4a438c1c9d4653d342bd6dd4ecb407837b3b762.safetensors"
    ]


def test_name_of_a_cached_classifier(tmp_path):
    cache = ClassifierCache(tmp_path)
    names, templates = ["dog", "K\u00e4fer"], ["a {}", "two {}"]
    cache.get(ConstantEncoder(), make_processor(), names, templates, lambda: torch.zeros(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == [
        "2a70cf9e076f38fdc1a71275b47aa499552634a45aba7cffca1766818238b2d5.safetensors"
    ]


def test_revision_of_weights(tmp_path):
    (tmp_path / "model-2.safetensors").write_bytes(b"second")
    (tmp_path / "model-1.safetensors").write_bytes(b"first")
    (tmp_path / "config.json").write_bytes(b"{}")
    assert (
        model_revision(tmp_path, ConstantEncoder())
        == "sha256:0fd1d4e673bbaf4533a22207018625618a1bb2e8a208fb7d357277b03d4e60ec"
    )
    model = SimpleNamespace(config=SimpleNamespace(_commit_hash="0123abcd"))
    assert model_revision("some/model", model) == "commit:0123abcd"
    texts = ["sha256:0123456789abcdef", "commit:fedcba9876543210", "none", "sha512:0123456789"]
    assert [short_hash(text) for text in texts] == ["01234567", "fedcba98", "none", "sha512:0123456789"]


def test_fingerprints_of_evaluated_data(tmp_path):
    assert (
        dataset_fingerprint(captioned()) == "sha256:aac87f3a63d30f1550ef702752cc3f2119a4eb2fb0c161cdd30bf7b669a97565"
    )
    labelled = Dataset.from_dict({"image": [RED, BLUE], "label": [1, 0]}).cast_column("image", Image())
    assert dataset_fingerprint(labelled) == "sha256:088804f4f78cb83b16d4c142d5e4afc9fa3d514c3c9a95fa8d7a4c67062cd2b6"
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    images = [{"bytes": None, "path": str(tmp_path / name)} for name in ("red.png", "blue.png")]
    assert dataset_fingerprint(captioned(image=images)) == dataset_fingerprint(captioned())
    questions = {"negative_captions": [[["no"], ["none", "nil"]], [["never"]]], "categories": [["a", "b"], [""]]}
    assert (
        questions_fingerprint(captioned(**questions))
        == "sha256:eda3c27442784e377f40a14475021485c2de7d0ea90fcb7aa3654e701c3d42bd"
    )


def test_equal_pictures_are_one_row_of_questions():
    columns = {"image": [RED, BLUE, RED], "caption": ["a", "b", "c"], "negative_caption": ["d", "e", "f"]}
    rows = standardise_items(Dataset.from_dict(columns).cast_column("image", Image()))
    assert rows["image_id"][:] == ["row-0", "row-1"]
    assert rows["captions"][:] == [["a", "c"], ["b"]]


def test_settings_of_benchmarks(tmp_path):
    captioned().save_to_disk(tmp_path / "data")
    retrieval = load_benchmark(f"retrieval=disk:{tmp_path / 'data'}", EvaluationOptions(index="faiss"))
    assert (retrieval.split, retrieval.fingerprint, retrieval.settings) == (
        None,
        "sha256:aac87f3a63d30f1550ef702752cc3f2119a4eb2fb0c161cdd30bf7b669a97565",
        {"index": "faiss"},
    )
    pictures = tmp_path / "pictures"
    for name, content in (("blue", BLUE), ("red", RED)):
        (pictures / name).mkdir(parents=True)
        (pictures / name / "0.png").write_bytes(content)
    options = EvaluationOptions(class_names=("a", "b"), templates=("one {}", "two {}"))
    assert load_benchmark(f"zero_shot=imagefolder:{pictures}", options).settings == {"prompts": "0ec8a09442682de9"}
    columns = {"image": [RED, BLUE], "caption": ["a", "b"], "negative_caption": ["c", "d"]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "questions.parquet")
    assert load_benchmark(f"fine_grained=parquet:{tmp_path / 'questions.parquet'}").settings == {
        "questions": "sha256:925af8e572b58588ad2f2bdaa3e80ef5ace8d231e0ddb27e8caafb3651419fc1"
    }
    efficiency = load_benchmark("efficiency")
    machine = sha256(repr(environment()[1]).encode())[:16]
    assert (efficiency.name, efficiency.fingerprint, efficiency.settings) == (
        "efficiency",
        "none",
        {"machine": machine},
    )


RECORD = {
    "condition": "alpha=0.5",
    "metrics": {"text_to_image_recall@1": 0.5, "image_to_text_recall@1": 1.0},
    "benchmark": "retrieval=scenes:test",
    "model": "runs/student",
    "settings": {"alpha": 0.5, "index": "faiss"},
    "label": "\u00dcbung",
    "n": 2,
    "n_captions": 3,
    "seed": 4,
    "split": None,
    "revision": "sha256:0123456789abcdef",
    "dataset_fingerprint": "sha256:fedcba9876543210",
    "command": "eval.py --model runs/student",
    "chance": {"text_to_image_recall@1": 0.25},
    "comparison": None,
    "intervals": {"text_to_image_recall@1": {"low": 0.0, "high": 1.0}},
}


def fixed_record(**changes):
    fixed = {"versions": {"modeling_dclip": "0.1.0.dev0", "torch": "0"}, "hardware": {"cpu": "x"}, "created": "now"}
    return make_record(**{**RECORD, **changes}, **fixed)


def test_bytes_of_a_results_file(tmp_path):
    write_results(tmp_path / "results.json", fixed_record())
    assert (tmp_path / "results.json").read_bytes().decode() == (
        "[\n"
        " {\n"
        '  "format_version": 1,\n'
        '  "model": "runs/student",\n'
        '  "benchmark": "retrieval=scenes:test",\n'
        '  "metrics": {\n'
        '   "text_to_image_recall@1": 0.5,\n'
        '   "image_to_text_recall@1": 1.0\n'
        "  },\n"
        '  "n": 2,\n'
        '  "seed": 4,\n'
        '  "split": null,\n'
        '  "revision": "sha256:0123456789abcdef",\n'
        '  "dataset_fingerprint": "sha256:fedcba9876543210",\n'
        '  "versions": {\n'
        '   "modeling_dclip": "0.1.0.dev0",\n'
        '   "torch": "0"\n'
        "  },\n"
        '  "hardware": {\n'
        '   "cpu": "x"\n'
        "  },\n"
        '  "command": "eval.py --model runs/student",\n'
        '  "created": "now",\n'
        '  "condition": "alpha=0.5",\n'
        '  "settings": {\n'
        '   "alpha": 0.5,\n'
        '   "index": "faiss"\n'
        "  },\n"
        '  "label": "Übung",\n'
        '  "n_captions": 3,\n'
        '  "chance": {\n'
        '   "text_to_image_recall@1": 0.25\n'
        "  },\n"
        '  "intervals": {\n'
        '   "text_to_image_recall@1": {\n'
        '    "low": 0.0,\n'
        '    "high": 1.0\n'
        "   }\n"
        "  }\n"
        " }\n"
        "]\n"
    )
    plain = {name: value for name, value in RECORD.items() if name not in ("condition", "settings")}
    assert list(make_record(**plain)) == [
        "format_version",
        "model",
        "benchmark",
        "metrics",
        "n",
        "seed",
        "split",
        "revision",
        "dataset_fingerprint",
        "versions",
        "hardware",
        "command",
        "created",
        "label",
        "n_captions",
        "chance",
        "intervals",
    ]


def test_key_of_a_record(tmp_path):
    assert record_key(fixed_record()) == "ccff87359c9f173a"
    assert record_key(fixed_record(condition=None, settings=None)) == "5be05642db4ec52d"
    elsewhere = fixed_record(model="moved", label=None, metrics={}, n=0, command="", split="test", n_captions=None)
    assert record_key(elsewhere) == record_key(fixed_record())
    for name in ("revision", "benchmark", "dataset_fingerprint", "seed", "condition", "settings"):
        other = {"seed": 5, "settings": {}}.get(name, "other")
        assert record_key(fixed_record(**{name: other})) != record_key(fixed_record())
    assert page_name(fixed_record()) == "bung-scenes-test-ccff87"
    assert outcomes_path(tmp_path / "a.b.json") == tmp_path / "a.b.outcomes.safetensors"
    write_outcomes(tmp_path / "a.json", {"0123": {"recall@1": torch.tensor([[1.0, 2.0]])}})
    content = (tmp_path / "a.outcomes.safetensors").read_bytes()
    assert b'"0123/recall@1"' in content
    assert read_outcomes(tmp_path / "a.json")["0123"]["recall@1"].tolist() == [[1.0, 2.0]]


class ConstantTeacher:
    """Answers with constants; pixels are not looked at."""

    name, fingerprint, width, logit_scale = "folder/teacher", "teacher-0123", 2, 2.5

    def preprocess(self, images):
        return torch.zeros(len(images), 1)

    def encode_images(self, pixel_values):
        return np.tile(np.array([[1, 0]], np.float32), (len(pixel_values), 1))

    def encode_texts(self, texts):
        return np.tile(np.array([[0, 1]], np.float32), (len(texts), 1))


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory):
    """A reinforced dataset of two images in two shards."""
    folder = tmp_path_factory.mktemp("reinforced") / "shards"
    options = {"settings": AugmentationSettings(4), "augmentations": 2, "samples_per_shard": 1, "seed": 3}
    write_reinforced(captioned(), [ConstantTeacher()], output=folder, **options)
    return folder


def test_index_of_a_reinforced_dataset(reinforced):
    text = (reinforced / "reinforced.json").read_text()
    index = json.loads(text)
    assert list(index["versions"]) == ["torch", "transformers", "PIL"]
    index["versions"] = {}
    assert index == {
        "format": 1,
        "teachers": [{"width": 2, "logit_scale": 2.5, "fingerprint": "teacher-0123"}],
        "settings": {
            "image_size": 4,
            "scale": [0.08, 1.0],
            "ratio": [0.75, 1.3333333333333333],
            "num_operations": 2,
            "magnitude": 9,
            "augmentations": 2,
            "seed": 3,
            "dtype": "float16",
            "column": None,
            "samples_per_shard": 1,
            "captioner": None,
        },
        "rows": "b80849cdb580ddefd6a958586b8e9d6bd28d4cb5f09443c17ecfe8134d95c501",
        "counts": {"samples": 2, "captions": 3, "synthetic_captions": 0},
        "shards": [
            {
                "file": "000000.tar",
                "samples": 1,
                "key": "fad3be99b396f3d958864bc3d3c2a296535a2d0f14375ddb8f871a66cb1b1d00",
            },
            {
                "file": "000001.tar",
                "samples": 1,
                "key": "3d227bec48a29ffe77c0d4dd88686791f5915a4e37d90e790f4a3045841b42e2",
            },
        ],
        "names": {"teachers": ["folder/teacher"], "captioner": None},
        "versions": {},
    }
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    assert list(index) == ["format", "teachers", "settings", "rows", "counts", "shards", "names", "versions"]
    head = (reinforced / "000000.tar").read_bytes()[:1536]
    assert f"MODELING_DCLIP.key={index['shards'][0]['key']}\n".encode() in head
    assert b"MODELING_DCLIP.synthetic_captions=0\n" in head


def test_state_of_a_reinforced_dataset(reinforced):
    dataset = ReinforcedDataset(reinforced, seed=1, share=ProcessShare(0, 1))
    assert dataset.state_dict() == {
        "epoch": 0,
        "position": 0,
        "seed": 1,
        "block": 1,
        "samples_per_epoch": 2,
        "shuffle_buffer": 10000,
        "process_index": 0,
        "num_processes": 1,
        "shards": "40b049912abe37a4f179c8b4cfa5f9fe9992345900c338dec45929cb79840ec5",
    }


def test_order_and_draws_of_a_reinforced_dataset(tmp_path):
    count = 6
    captions = [[f"{row} {letter}" for letter in "abcd"] for row in range(count)]
    columns = {"image_id": [str(row) for row in range(count)], "image": [{"bytes": RED, "path": None}] * count}
    options = {"settings": AugmentationSettings(4), "augmentations": 1, "samples_per_shard": 2}
    write_reinforced(
        captioned(**columns, captions=captions), [ConstantTeacher()], output=tmp_path / "shards", **options
    )
    dataset = ReinforcedDataset(tmp_path / "shards", seed=1, share=ProcessShare(0, 1), shuffle_buffer=2)
    given = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        given.append([sample["caption"] for sample in dataset])
    assert given == [["5 c", "4 a", "2 a", "3 a", "1 c", "0 a"], ["5 c", "4 a", "0 b", "1 b", "2 c", "3 a"]]


def test_draws_of_augmentations():
    drawn = [draw_augmentation(3, "first", index, (40, 30), AugmentationSettings(8)) for index in range(2)]
    assert [json.loads(json.dumps(one)) for one in drawn] == [
        [[1, 3, 27, 29], [[2, -0.09], [10, 7.0]]],
        [[0, 3, 30, 33], [[10, 7.0], [2, 0.09]]],
    ]


def test_record_of_a_stage(tmp_path):
    record = StageRecord(tmp_path / "stage", {"b": 1, "a": {"c": [None, True], "d": "\u00e4"}})
    assert (tmp_path / "stage" / "stage.json").read_text(encoding="utf-8") == (
        "{\n"
        '  "finished": false,\n'
        '  "inputs": {\n'
        '    "b": 1,\n'
        '    "a": {\n'
        '      "c": [\n'
        "        null,\n"
        "        true\n"
        "      ],\n"
        '      "d": "\\u00e4"\n'
        "    }\n"
        "  }\n"
        "}\n"
    )
    record.finish()
    assert (tmp_path / "stage" / "stage.json").read_text(encoding="utf-8") == (
        "{\n"
        '  "finished": true,\n'
        '  "inputs": {\n'
        '    "b": 1,\n'
        '    "a": {\n'
        '      "c": [\n'
        "        null,\n"
        "        true\n"
        "      ],\n"
        '      "d": "\\u00e4"\n'
        "    }\n"
        "  }\n"
        "}\n"
    )
    assert StageRecord(tmp_path / "stage", {"a": {"d": "\u00e4", "c": (None, True)}, "b": 1}).finished


def test_hashes_of_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 5)
    assert hash_file(path) == "a917d2e9c028a69f620f879b34123a1eb67fd13ebc763ab107f99bc2cf599b7c"
    assert hash_file(str(path)) == sha256(b"abc" * 5)


def test_files_that_a_repository_holds_are_found_by_content(tmp_path):
    for name in ("large.bin", "small.txt", "other.txt"):
        (tmp_path / name).write_bytes(b"abc")
    lfs = SimpleNamespace(sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    blob = "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"  # git hash-object of abc
    remote = {
        "large.bin": SimpleNamespace(size=3, lfs=lfs, blob_id="pointer"),
        "small.txt": SimpleNamespace(size=3, lfs=None, blob_id=blob),
        "other.txt": SimpleNamespace(size=3, lfs=None, blob_id="0" * 40),
    }
    assert find_differences(tmp_path, remote)[0] == ["other.txt"]


def test_place_of_a_fetched_shard(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("ETag", '"v1"')
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"tar")

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}/set"
        files = WebdatasetFiles(root, cache_dir=tmp_path)
        path, url = files.shard("test/0.tar"), files.place("test/0.tar")
    finally:
        server.shutdown()
        server.server_close()
    assert path == tmp_path / naive_key(url, '"v1"', "3") / "0.tar"
    assert url == f"{root}/test/0.tar"


def test_names_of_an_index(tmp_path):
    faiss = pytest.importorskip("faiss")
    vectors = faiss.IndexFlatIP(2)
    vectors.add(np.eye(2, dtype=np.float32))
    columns = {"image_id": ["a", "b"], "path": [None, "b.png"], "sha256": [sha256(RED), sha256(BLUE)]}
    write_index(tmp_path, vectors, columns, {"format": 1, "model": "m"})
    manifest = json.loads((tmp_path / "index.json").read_text())
    kinds = {"vectors": "faiss", "images": "parquet"}
    digests = {kind: sha256(next(tmp_path.glob(f"{kind}-*.{suffix}")).read_bytes()) for kind, suffix in kinds.items()}
    files = {kind: {"name": f"{kind}-{digests[kind][:12]}.{kinds[kind]}", "sha256": digests[kind]} for kind in kinds}
    assert manifest == {"format": 1, "model": "m", "files": files}
    assert list(manifest["files"]) == ["vectors", "images"]


# Keys of real models are computed again from their parts: configs and processors depend on transformers' version.

PROVENANCE = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "model_type", "processor_class")
}


def naive_strip(config):
    if not isinstance(config, dict):
        return config
    kept = {name: naive_strip(value) for name, value in config.items() if name not in PROVENANCE}
    # Fields that came later: a configuration at their defaults has the key that it had without them.
    if kept.get("rotary_scale") == 1.0:
        del kept["rotary_scale"]
    if kept.get("rotary_table") is False:
        del kept["rotary_table"]
    return kept


def naive_dump(content):
    return json.dumps(content, sort_keys=True, default=str)


def naive_model_key(model):
    content = naive_dump(naive_strip(model.config.to_dict())).encode()
    for name in sorted(model.state_dict()):
        tensor = model.state_dict()[name].detach()
        content += f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes()
    return sha256(content)


def naive_processor_key(processor):
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]
    settings = naive_strip(processor.image_processor.to_dict())
    return naive_key(*map(naive_dump, (settings, tokenizer, processor.tokenizer.model_max_length)))


STEPS = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2, "max_steps": 1}


def run_recipe(folder, **recipe):
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"output_dir": str(folder / "run"), **recipe}))
    return run_stages(parse_recipe([], folder / "recipe.yaml"))


def read_stage(folder):
    record = json.loads((folder / "stage.json").read_text())
    assert list(record) == ["finished", "inputs"] and record["finished"] is True
    return record["inputs"]


def fields_of_ours(arguments):
    """What decides a stage, without the fields of `TrainingArguments` that recipe and package leave alone."""
    left_alone = {field.name for field in fields(TrainingArguments)} - SET_BY_US
    return {name: value for name, value in arguments.items() if name not in left_alone}


# Of TrainingArguments: set by the recipes below, or by this package.
SET_BY_US = {
    *(
        "per_device_train_batch_size",
        "max_steps",
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
    ),
    *("weight_decay", "adam_beta2", "max_grad_norm", "logging_nan_inf_filter", "ignore_data_skip", "seed"),
    *("dataloader_drop_last", "remove_unused_columns"),
}


@pytest.fixture(scope="module")
def dclip_run(tiny_clip_dir, tmp_path_factory):
    """Regions, teacher, targets and student of two images, a step each."""
    folder = tmp_path_factory.mktemp("dclip")
    captioned(**BOXES).save_to_disk(folder / "data")
    teacher = {"cross_attention": "regions", "num_attention_heads": 2, **STEPS}
    given = {"clip_model": str(tiny_clip_dir), "train_datasets": [f"disk:{folder / 'data'}"]}
    return run_recipe(folder, **given, regions={"detector": "grid:1x2"}, teacher=teacher, student=STEPS)


@pytest.fixture(scope="module")
def dmclip_run(tiny_clip_dir, tmp_path_factory):
    """Shards of two images and a DM-CLIP of one step."""
    folder = tmp_path_factory.mktemp("dmclip")
    captioned().save_to_disk(folder / "data")
    tower = {"stem_dim": 4, "hidden_size": 4, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"image_size": 32, "vision_config": tower, "text_config": text, "projection_dim": 8, **STEPS}
    given = {"clip_model": str(tiny_clip_dir), "train_datasets": [f"disk:{folder / 'data'}"]}
    return run_recipe(folder, **given, reinforce={"teachers": [str(tiny_clip_dir)], "augmentations": 1}, dmclip=model)


ROWS_WITH_REGIONS = [
    "222c058506b7d25c028a8af961759f2e8cb019355158a6c28ea9be4aac9467bc",
    "55962fb3e679e1a893fd7aca6033da40a4460aed098aa368d70e9070a34e910d",
]


def naive_clip_key(clip_dir):
    config = DCLIPConfig.from_pretrained(clip_dir)
    config.freeze_text = True
    clip = DCLIPModel.from_pretrained(clip_dir, config=config, dtype=torch.float32)
    return naive_key(naive_model_key(clip), naive_processor_key(DCLIPProcessor.from_pretrained(clip_dir)))


def test_records_of_dclip_stages(dclip_run, tiny_clip_dir):
    clip, dataset = naive_clip_key(tiny_clip_dir), {"train": naive_key(*ROWS_WITH_REGIONS)}
    regions, teacher, targets, student = (
        read_stage(dclip_run / name) for name in ("regions", "teacher", "targets", "student")
    )
    assert regions == {
        "arguments": {"detector": "grid:1x2", "ignore_boxes": False, "max_regions": None},
        "detector": "grid-3a316d6d3226f84c1e46e444",
        "dataset": {"train": "68c2607b4cdd2351a51fb860e5a3f4125660d366589d1d81d32c0dafc912758a"},
    }
    assert list(teacher) == ["arguments", "clip", "dataset", "max_regions"]
    assert fields_of_ours(teacher.pop("arguments")) == {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-05,
        "lr_scheduler_type": "constant",
        "logging_nan_inf_filter": False,
        "seed": 0,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "cross_attention": "regions",
        "num_attention_heads": 2,
        "attention_temperature": 2.0,
        "text_share": 0.5,
        "region_weighting": True,
        "aggregation": "mean",
        "num_clusters": 3,
        "num_cluster_steps": 5,
        "num_region_layers": 2,
        "region_feedforward_ratio": 2,
        "loss_temperature": 0.05,
    }
    assert teacher == {"clip": clip, "dataset": dataset, "max_regions": None}
    trained = naive_model_key(DCLIPTeacher.from_pretrained(dclip_run / "teacher"))
    made = {"teacher": trained, "clip": clip, "dataset": dataset, "max_regions": None, "with_teacher": True}
    assert targets == made and list(targets) == list(made)
    assert list(student) == ["arguments", "clip", "dataset", "targets"]
    assert fields_of_ours(student.pop("arguments")) == {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2.0,
        "max_steps": 1,
        "learning_rate": 1e-06,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "logging_nan_inf_filter": False,
        "seed": 0,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "cosine_distillation_loss_weight": 1.0,
        "contrastive_loss_weight": 1.0,
        "cosine_preservation_loss_weight": 0.0,
        "similarity_distillation_loss_weight": 0.0,
        "temperature": 0.05,
        "similarity_temperature": 0.05,
        "similarity_teacher_temperature": None,
        "image_to_text_weight": 0.5,
        "freeze": [],
        "position_embedding_type": "absolute",
        "wise_ft_alpha": 1.0,
        "min_crop_area": 1.0,
    }
    assert student == {"clip": clip, "dataset": dataset, "targets": made}


def test_chunks_of_features_and_targets(dclip_run):
    teacher = DCLIPTeacher.from_pretrained(dclip_run / "teacher")
    processor = DCLIPProcessor.from_pretrained(dclip_run / "teacher")
    settings = '{"max_regions": null, "reads_text": false, "regions": true}'
    made_by = naive_key(naive_model_key(teacher.clip), naive_processor_key(processor), settings)
    features = naive_key(made_by, *ROWS_WITH_REGIONS)
    targets = naive_key(naive_model_key(teacher), features, features)
    found = {path.relative_to(dclip_run / "cache").as_posix() for path in (dclip_run / "cache").rglob("*.*")}
    assert found == {f"features/{name}.safetensors" for name in (features, targets)}


def test_records_of_dmclip_stages(dmclip_run, tiny_clip_dir, tmp_path):
    reinforce, dmclip = (read_stage(dmclip_run / name) for name in ("reinforce", "dmclip"))
    assert list(reinforce) == ["arguments", "image_size", "dataset", "teachers"]
    given = reinforce.pop("arguments")
    assert given.pop("teachers") == [str(tiny_clip_dir)]
    assert given == {
        "augmentations": 1,
        "image_size": None,
        "min_crop_area": 0.08,
        "num_operations": 2,
        "magnitude": 9,
        "synthetic_captions": None,
        "captioner": None,
        "captions_per_image": 5,
        "samples_per_shard": 1000,
        "dtype": "float16",
        "seed": 0,
    }
    clip, processor = CLIPModel.from_pretrained(tiny_clip_dir), DCLIPProcessor.from_pretrained(tiny_clip_dir)
    teacher = naive_key(naive_model_key(clip), naive_processor_key(processor))
    assert reinforce == {"image_size": 32, "dataset": naive_key(*row_keys(captioned())), "teachers": [teacher]}
    shards = dmclip_run / "reinforce" / "shards"
    index = json.loads((shards / "reinforced.json").read_text())
    assert [one["fingerprint"] for one in index["teachers"]] == [teacher]
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip_dir)
    tokens = naive_key(tokenizer.backend_tokenizer.to_str(), str(tokenizer.model_max_length))
    assert list(dmclip) == ["arguments", "shards", "tokenizer"]
    assert fields_of_ours(dmclip.pop("arguments")) == {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 0.0001,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1000,
        "weight_decay": 0.2,
        "adam_beta2": 0.95,
        "logging_nan_inf_filter": False,
        "ignore_data_skip": True,
        "seed": 0,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "train_shards": None,
        "train_samples": None,
        "teacher_widths": [],
        "model": None,
        "preset": "T",
        "vision_config": {"depths": [1, 1, 2, 1], "hidden_size": 4, "num_heads": [1, 1, 2, 2], "stem_dim": 4},
        "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
        "projection_dim": 8,
        "image_size": 32,
        "tokenizer": None,
        "vision_model": None,
        "text_model": None,
        "freeze_text": False,
        "contrastive_loss_weight": 0.25,
        "distillation_loss_weight": 0.75,
        "synthetic_captions": None,
        "teacher_logit_scale": None,
        "image_to_text_weight": 0.5,
        "synthetic_keys": "syn_text.*",
        "samples_per_epoch": None,
        "shuffle_buffer": 10000,
        "on_bad_sample": "raise",
    }
    assert dmclip == {"shards": naive_key(json.dumps(index, sort_keys=True)), "tokenizer": tokens}

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(shards / "000000.tar", foreign)
    again = {"model": str(dmclip_run / "dmclip"), "train_shards": str(foreign), "teacher_widths": [16], **STEPS}
    again |= {"synthetic_captions": False, "samples_per_epoch": 2, "teacher_logit_scale": 2.0}
    found = read_stage(run_recipe(tmp_path, clip_model=str(tiny_clip_dir), dmclip=again) / "dmclip")
    size = (foreign / "000000.tar").stat().st_size
    images = processor.image_processor
    assert list(found) == ["arguments", "shards", "tokenizer", "model", "normalisation"]
    assert found["shards"] == naive_key(f"000000.tar/{size}")
    assert found["model"] == naive_model_key(DMCLIPModel.from_pretrained(dmclip_run / "dmclip"))
    assert found["normalisation"] == [list(images.image_mean), list(images.image_std)]


def test_fingerprint_of_a_transformers_detector(tmp_path):
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    config = YolosConfig(**layers, image_size=(32, 32), patch_size=8, num_detection_tokens=2, num_labels=2)
    model = YolosForObjectDetection(config)
    model.save_pretrained(tmp_path)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(tmp_path)
    detector = TransformersDetector(str(tmp_path), threshold=0.25)
    weights = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in model.state_dict().items())
    settings = detector.model.config.to_diff_dict()
    settings.pop("transformers_version", None)
    pixels = detector.processor.to_json_string()
    parts = [sha256(weights), json.dumps(settings, default=str), pixels, None, 0.25]
    assert detector.fingerprint == f"transformers-{sha256(naive_dump(parts).encode())[:24]}"


def test_fingerprint_of_a_captioner(tiny_clip_dir, tmp_path):
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip_dir)
    text = {**layers, "vocab_size": len(tokenizer), "encoder_hidden_size": 16}
    config = BlipConfig(text_config=text, vision_config={**layers, "image_size": 32, "patch_size": 16})
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    processor.image_processor.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    captioner = TransformersCaptioner(str(tmp_path), captions=3, seed=4)
    parts = [naive_model_key(captioner.model), naive_processor_key(captioner), "[3, 40, 4]"]
    assert captioner.fingerprint == naive_key(*parts)


def test_records_of_leakage(dclip_run, tmp_path):
    places = {"output": tmp_path / "leakage.json", "cache_dir": tmp_path / "cache"}
    teachers, options = [("ours", dclip_run / "teacher")], LeakageOptions(draws=1)
    records = evaluate_leakage(teachers, captioned(), "disk:data", **places, options=options)
    assert [record["condition"] for record in records] == [
        "as_trained",
        "regions_shuffled",
        "captions_shuffled",
        "text_share_0",
        "text_share_0_regions_shuffled",
        "whole_image",
        "chance",
    ]
    shared = ("benchmark", "split", "dataset_fingerprint", "n", "n_captions")
    assert {tuple(record[name] for name in shared) for record in records} == {
        ("leakage=disk:data", None, "sha256:4874bd1d10e9af5fd5010b4a64bb99f106fa801aa936626f637229d778836409", 2, 3)
    }
    assert list(records[0]) == [
        "format_version",
        "model",
        "benchmark",
        "metrics",
        "n",
        "seed",
        "split",
        "revision",
        "dataset_fingerprint",
        "versions",
        "hardware",
        "command",
        "created",
        "n_captions",
        "label",
        "condition",
        "draws",
        "intervals",
    ]


def test_records_that_an_evaluation_keeps(tiny_clip_dir, tmp_path):
    captioned().save_to_disk(tmp_path / "data")
    model, output = str(tiny_clip_dir), tmp_path / "results.json"
    names = [f"retrieval=disk:{tmp_path / 'data'}"]

    def run(candidate=None, **options):
        done = evaluate([candidate or Candidate(model)], names, output, **options)
        assert done.failures == []
        return done

    (record,) = run(command="first").records
    assert list(record) == [
        "format_version",
        "model",
        "benchmark",
        "metrics",
        "n",
        "seed",
        "split",
        "revision",
        "dataset_fingerprint",
        "versions",
        "hardware",
        "command",
        "created",
        "n_captions",
        "intervals",
    ]
    weights = (tiny_clip_dir / "model.safetensors").read_bytes()
    assert record["revision"] == f"sha256:{sha256(b'model.safetensors' + bytes(1) + weights)}"
    assert record["dataset_fingerprint"] == dataset_fingerprint(captioned())
    assert run(command="second").records == [record]

    def kept(**changes):
        """Whether the record is taken as there already after a change to the file."""
        write_results(output, {**record, **changes})
        write_outcomes(output, {record_key({**record, **changes}): {"recall@1": torch.ones(2, 2)}})
        return run().kept == 1

    versions = record["versions"]
    for changes in ({"n": 7}, {"command": "x"}, {"created": "x"}, {"label": "x"}, {"model": "x"}, {"split": "x"}):
        assert kept(**changes), changes
    assert kept(hardware={}) and kept(versions={**versions, "torch": "0"}) and kept(metrics={"a": 1.0})
    for name in ("revision", "dataset_fingerprint", "benchmark", "condition"):
        assert not kept(**{name: "x"}), name
    assert not kept(seed=1) and not kept(settings={"index": "faiss"})
    assert not kept(versions={**versions, "modeling_dclip": "0"})
    shutil.copytree(tiny_clip_dir, tmp_path / "moved")
    write_results(output, record)
    write_outcomes(output, {record_key(record): {"recall@1": torch.ones(2, 2)}})
    assert run(Candidate(str(tmp_path / "moved"), "ours")).kept == 1
    outcomes_path(output).unlink()
    assert run().kept == 0  # its intervals say that outcomes were there
    write_results(output, {name: value for name, value in record.items() if name != "intervals"})
    outcomes_path(output).unlink()
    assert run().kept == 1


def test_manifest_of_an_index(tiny_clip_dir, tmp_path):
    pytest.importorskip("faiss")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(RED)
    (tmp_path / "pictures" / "blue.png").write_bytes(BLUE)
    manifest = build_index(str(tiny_clip_dir), str(tmp_path / "pictures"), tmp_path / "index").manifest
    assert list(manifest) == [
        "format",
        "model",
        "revision",
        "encoder",
        "images",
        "n",
        "dim",
        "index",
        "effort",
        "recall@10",
        "computed",
        "processes",
        "changes",
        "skipped",
        "notes",
        "versions",
        "files",
    ]
    model, processor, revision = load_dual_encoder(str(tiny_clip_dir))
    encoder = naive_key(naive_model_key(model), naive_dump(processor.image_processor.to_dict()))
    assert (manifest["revision"], manifest["encoder"]) == (revision, encoder)
    told = {
        name: manifest[name] for name in ("format", "n", "dim", "index", "effort", "recall@10", "computed", "skipped")
    }
    assert told == {
        "format": 1,
        "n": 2,
        "dim": 16,
        "index": "exact",
        "effort": None,
        "recall@10": None,
        "computed": 2,
        "skipped": [],
    }
    chunk = naive_key(encoder, sha256(BLUE), sha256(RED))
    embeddings = tmp_path / "index" / "embeddings"
    assert [path.relative_to(embeddings).as_posix() for path in embeddings.rglob("*.*")] == [
        f"{encoder[:16]}/{chunk}.safetensors"
    ]


def test_pictures_of_a_space_are_known_by_their_pixels(tiny_clip_dir, tmp_path):
    captioned(**BOXES).save_to_disk(tmp_path / "data")
    answers = SpaceAnswers(str(tiny_clip_dir), gallery=f"disk:{tmp_path / 'data'}")
    assert answers.row_of == {
        "47f38ff1a0c55a3f0e17c7d533be55b38db97cd90aa364ddc25e82354ffb572b": 0,
        "8cd58efb2a5f4fcfc5a55fafff6f76f72d195ee965fb2f0def24c28c6298e69d": 1,
    }
