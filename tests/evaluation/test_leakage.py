"""Leakage: exchanging what a teacher reads changes what it reaches exactly as far as it reads it."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from modeling_dclip import DCLIPModel, DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.columns import Ragged, row_keys
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.data.teacher_targets import FeatureOptions, TeacherFeatures, compute_features
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.retrieval_ranks import RetrievalRanks, metrics_from_ranks
from modeling_dclip.evaluation import leakage
from modeling_dclip.evaluation.benchmarks.retrieval import evaluate_retrieval
from modeling_dclip.evaluation.leakage import EXCHANGES, chance_metrics, make_draws, measure_leakage, pair_embeds
from modeling_dclip.evaluation.records import read_results
from modeling_dclip.evaluation.reports.tables import render_leakage
from modeling_dclip.evaluation.results import render_readme

IMAGES, CAPTIONS = 12, 3
SPEC = f"scenes:test,n={IMAGES},image_size=40,captions_per_image={CAPTIONS}"
T2I, I2T = "text_to_teacher_recall@1", "teacher_to_text_recall@1"


@pytest.fixture(scope="module")
def scenes():
    return load_scenes("test", n=IMAGES, image_size=40, captions_per_image=CAPTIONS)


def make_teacher(folder, **config):
    torch.manual_seed(0)
    teacher = DCLIPTeacher.from_clip(folder, **config)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if not name.startswith("clip."):  # as if trained: the leak-free block starts as the identity
                parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher.eval()


@pytest.fixture(scope="module", params=["bidirectional", "regions"])
def taught(request, tiny_clip_dir, scenes, tmp_path_factory):
    """A teacher and the features of the scenes."""
    teacher = make_teacher(tiny_clip_dir, cross_attention=request.param)
    processor = DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir)
    cache = tmp_path_factory.mktemp("features")
    paths = compute_features(scenes, teacher, processor, FeatureOptions(cache), keys=row_keys(scenes))
    return teacher, TeacherFeatures.load(paths)


def test_draws_use_each_caption_once_and_leave_no_image_its_own():
    offsets = np.array([0, 3, 4, 6])  # 3, 1 and 2 captions
    draws = make_draws(offsets, 6, seed=4)
    for image, count in enumerate((3, 1, 2)):
        drawn = [int(draw.captions[image]) for draw in draws]
        assert sorted(set(drawn)) == list(range(offsets[image], offsets[image + 1]))
        assert len(set(drawn[:count])) == count
    for draw in draws:
        assert sorted(draw.others) == [0, 1, 2] and (draw.others != np.arange(3)).all()
    again, other = make_draws(offsets, 6, seed=4), make_draws(np.arange(0, 99, 3), 1, seed=5)
    assert all(
        np.array_equal(one, two) for a, b in zip(draws, again, strict=True) for one, two in zip(a, b, strict=True)
    )
    assert not np.array_equal(other[0].others, make_draws(np.arange(0, 99, 3), 1, seed=6)[0].others)


@pytest.mark.parametrize(("offsets", "count"), [([0, 3], 1), ([0, 3, 3], 1), ([0, 3, 4], 0)])
def test_what_cannot_be_drawn_is_refused(offsets, count):
    with pytest.raises(ValueError, match="two or more images with captions"):
        make_draws(np.array(offsets), count)


def test_each_condition_hands_the_teacher_what_its_name_says(taught):
    teacher, features = taught
    (draw,) = make_draws(features.text_embeds.offsets, 1)
    own = np.arange(IMAGES)
    pairs = {
        "as_trained": (own, draw.captions),
        "regions_shuffled": (draw.others, draw.captions),
        "captions_shuffled": (own, draw.captions[draw.others]),
    }
    for condition, (rows, captions) in pairs.items():
        with torch.no_grad():
            expected = teacher(**features.batch(rows, captions)).teacher_embeds
        torch.testing.assert_close(pair_embeds(teacher, features, draw, condition), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("taught", ["bidirectional"], indirect=True)
def test_text_share_0_leaves_the_config_as_it_was_and_the_pooled_tokens_out(taught, tiny_clip_dir):
    teacher, features = taught
    (draw,) = make_draws(features.text_embeds.offsets, 1)
    silent = make_teacher(tiny_clip_dir, text_share=0.0)
    for condition in ("text_share_0", "text_share_0_regions_shuffled"):
        embeds = pair_embeds(teacher, features, draw, condition)
        exchanged = condition.replace("text_share_0_", "").replace("text_share_0", "as_trained")
        torch.testing.assert_close(embeds, pair_embeds(silent, features, draw, exchanged), rtol=0, atol=1e-6)
    assert teacher.config.text_share == 0.5
    assert not torch.allclose(embeds, pair_embeds(teacher, features, draw, "regions_shuffled"), atol=1e-3)


def test_no_caption_moves_the_leak_free_teacher_and_every_exchange_moves_the_papers(taught):
    teacher, features = taught
    draws = make_draws(features.text_embeds.offsets, 3)
    for draw in draws:
        trained = pair_embeds(teacher, features, draw, "as_trained")
        for condition in ("captions_shuffled", "text_share_0"):
            same = torch.equal(pair_embeds(teacher, features, draw, condition), trained)
            assert same == (teacher.config.cross_attention == "regions"), condition
        shuffled = pair_embeds(teacher, features, draw, "regions_shuffled")
        assert not torch.allclose(shuffled, trained, atol=1e-4)
        if teacher.config.cross_attention == "regions":  # nothing of the pair but its image: the image of another
            torch.testing.assert_close(shuffled, trained[draw.others], rtol=0, atol=1e-6)
    results = measure_leakage(teacher, features, draws=3)
    same = results["captions_shuffled"] == results["as_trained"]
    assert same == (teacher.config.cross_attention == "regions")


class Reader(torch.nn.Module):
    """A teacher that is one of its inputs: it recites the caption, or says what the image is."""

    device = torch.device("cpu")

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.config = type("Config", (), {"text_share": 0.5})()

    def forward(self, return_loss, **batch):
        return type("Output", (), {"teacher_embeds": self.answer(batch)})


def made_features():
    """Ten images that point each its own way, two captions each, which point where their image does."""
    ways = np.eye(10, dtype=np.float16)
    regions = {name: Ragged.from_lengths(np.zeros((10, *shape), np.float32), np.ones(10)) for name, shape in
               (("region_boxes", (4,)), ("region_scores", ()))}  # fmt: skip
    return TeacherFeatures(
        image_embeds=ways,
        region_embeds=Ragged.from_lengths(ways, np.ones(10)),
        text_embeds=Ragged.from_lengths(np.repeat(ways, 2, axis=0), np.full(10, 2)),
        token_embeds=None,
        **regions,
    )


def test_a_teacher_that_recites_and_one_that_looks_are_told_apart():
    recites = measure_leakage(Reader(lambda batch: batch["text_embeds"]), made_features())
    looks = measure_leakage(Reader(lambda batch: batch["region_embeds"][:, 0]), made_features())
    for metric in (T2I, I2T):
        reached = {name: (recites[name]["metrics"][metric], looks[name]["metrics"][metric]) for name in recites}
        assert reached["as_trained"] == (1, 1) and reached["whole_image"] == (1, 1)
        assert reached["regions_shuffled"] == (1, 0)  # the recital is whole without the image
        assert reached["captions_shuffled"] == (0, 1)
        assert reached["chance"] == (0.1, 0.1)
    assert recites["as_trained"]["draws"][T2I] == [1.0] * 5


def test_chance_is_the_mean_over_every_rank_the_right_answer_may_have():
    every = torch.arange(1, 24)
    expected = metrics_from_ranks(RetrievalRanks(every, every, torch.arange(23)))
    chance = chance_metrics(23)
    assert len(chance) == 2 * 4
    for name, value in chance.items():
        assert value == pytest.approx(expected[name.replace("teacher", "image")]), name


def test_the_whole_image_is_what_retrieval_measures(taught, tiny_clip_dir, scenes):
    teacher, features = taught
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    processor = AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil")
    expected = evaluate_retrieval(Encoder(model, processor), scenes)["text_to_image_recall@5"]
    whole = measure_leakage(teacher, features, draws=CAPTIONS)["whole_image"]["metrics"]["text_to_teacher_recall@5"]
    assert whole == pytest.approx(expected, abs=1.01 / (IMAGES * CAPTIONS))  # a pair may turn on a rounding to float16


@pytest.fixture(scope="module")
def folders(tiny_clip_dir, tmp_path_factory):
    made = {}
    for name, seed, attention in (
        ("paper", 0, "bidirectional"),
        ("paper", 1, "bidirectional"),
        ("free", 0, "regions"),
    ):
        folder = made[name, seed] = tmp_path_factory.mktemp(f"{name}-{seed}")
        teacher = make_teacher(tiny_clip_dir, cross_attention=attention)
        if seed:
            with torch.no_grad():
                teacher.text_to_image.attention.v_proj.weight.mul_(-1)
        teacher.save_pretrained(folder)
        DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir).save_pretrained(folder)
    return made


def test_one_command_measures_teachers_and_a_block_shows_them(folders, tmp_path, capsys):
    named = [f"{label}={folder}" for (label, _), folder in folders.items()]
    output = tmp_path / "results" / "leakage.json"
    leakage.main(["--teacher", *named, "--dataset", SPEC, "--output", str(output), "--draws", "3", "--seed", "2",
                  "--device", "cpu"])  # fmt: skip
    records = read_results(output)
    assert len(records) == 3 * 7
    for record in records:
        assert (record["benchmark"], record["split"], record["n"]) == (f"leakage={SPEC}", "test", IMAGES)
        assert (record["n_captions"], record["seed"]) == (IMAGES * CAPTIONS, 2) and record["revision"].startswith(
            "sha256:"
        )
        if record["condition"] != "chance":
            assert record["metrics"][T2I] == pytest.approx(np.mean(record["draws"][T2I]))
            assert record["intervals"][T2I]["covers"] == "images" and len(record["draws"][T2I]) == 3
    free = {record["condition"]: record["metrics"] for record in records if record["label"] == "free"}
    assert [*free] == [*EXCHANGES, "whole_image", "chance"]
    assert free["captions_shuffled"] == free["as_trained"] == free["text_share_0"]
    shown = capsys.readouterr().out
    assert render_leakage(records) in shown and "paper (2 trained)" in shown and f"Written to {output}" in shown

    page = tmp_path / "papers.md"
    page.write_text(
        f"<!-- results:leakage source=results/leakage.json table=leakage metric={I2T} -->\n<!-- /results:leakage -->\n"
    )
    assert render_readme(page) == ["leakage"]
    assert render_leakage(records, metric=I2T) in page.read_text() and render_readme(page, check=True) == []


def record(label="paper", condition="as_trained", value=0.5, interval=None, **fields):
    about = {
        "label": label,
        "condition": condition,
        "model": "m",
        "benchmark": "leakage=x",
        "dataset_fingerprint": "f",
    }
    values = {"n": 9, "metrics": {T2I: value}, "draws": {T2I: [value, value + 0.01]}, "intervals": {T2I: interval}}
    return {**about, **values, **fields}


def test_a_cell_is_over_trainings_where_there_are_several_and_over_images_where_there_is_one():
    interval = {"estimate": 0.25, "low": 0.2, "high": 0.3, "confidence": 0.95, "covers": "images"}
    text = render_leakage([record(value=0.4), record(value=0.5), record(label="free", value=0.25, interval=interval)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[:3]]
    assert rows[0] == ["The teacher reads", "paper (2 trained)", "free"]
    assert rows[2] == ["own regions, own caption", "45.0 ± 63.5", "25.0 [20.0, 30.0]"]
    assert "over training seeds" in text and "over test images" in text
    assert "Means of 2 draws of captions and shuffles, which are at most 1.0 apart." in text


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([record(condition="chance", label="free")], "every condition for every label"),
        ([record(label="free", benchmark="leakage=y")], "on one benchmark"),
        ([record(metrics={"top1": 0.5})], "the metric 'text_to_teacher_recall@1' in every record"),
        ([{name: value for name, value in record().items() if name != "condition"}], "Expected a 'condition'"),
    ],
)
def test_records_that_make_no_table_are_named(others, message):
    with pytest.raises(ValueError, match=message):
        render_leakage([record(), *others])


def test_a_device_that_is_not_there_is_named_before_anything_is_loaded():
    with pytest.raises(SystemExit, match="Failed: expected a device of this machine, got 'foo'"):
        leakage.main(["--teacher", "nowhere", "--device", "foo"])


def test_a_teacher_without_a_label_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    seen = []
    monkeypatch.setattr(leakage, "evaluate_leakage", lambda teachers, *_, **__: seen.extend(teachers) or [])
    monkeypatch.setattr(leakage, "render_leakage", lambda records, metric=None: "")
    leakage.main(["--teacher", "someone/teacher", "paper=folder", "a=b", "--dataset", "scenes:test,n=1"])
    assert seen == [("someone/teacher", "someone/teacher"), ("paper", "folder"), ("a=b", "a=b")]
