"""Every card renders from files alone, is valid, says what leaks, and fails where a fact is missing."""

import json
import re
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.loopback_hub import find_fault
from fixtures.publications import RETRIEVAL, make_arguments, make_dmclip, make_student, make_teacher, write_records
from huggingface_hub import ModelCard, constants
from PIL import Image
from transformers import AutoModel

from modeling_dclip import DCLIPConfig
from modeling_dclip.data.captions.parts import TRAINED_IMAGES, write_held_out, write_trained_images
from modeling_dclip.data.columns import image_keys
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.encoders.loading import load_merged
from modeling_dclip.evaluation.records import write_results
from modeling_dclip.evaluation.reports.document import show_text
from modeling_dclip.evaluation.reports.verdict import DIRECTION_WORDS
from modeling_dclip.hub.publish.cards import (
    REPO_SUFFIXES,
    check_card,
    make_eval_results,
    make_metadata,
    render_card,
    template_name,
)
from modeling_dclip.hub.publish.evaluation import Seen, find_passed_over, find_seen, read_all_results, select_records
from modeling_dclip.hub.publish.facts import MOST_LETTERS, check_repo_name, gather_card_facts, suggest_name
from modeling_dclip.hub.publish.licences import check_licence, find_origins, read_arguments
from modeling_dclip.hub.publish.pictures import LABELS, Example, choose_pictures, draw_pictures, save_pictures
from modeling_dclip.hub.publish.training import DataSource, describe_source, show_spec

CARDS = Path(__file__).parents[3] / "hub_cards"
KINDS = {"dclip": ("dual", "vision", "teacher"), "dmclip": ("dual", "vision")}


def make_fake_examples():
    scores = (0.5, 0.25, 0.125, 0.125)
    return [
        Example(
            path, labels, tuple({"label": label, "score": score} for label, score in zip(labels, scores, strict=True))
        )
        for path, labels in zip(draw_pictures(), LABELS, strict=True)
    ]


@pytest.fixture(scope="module")
def made(tiny_clip_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    folders = {
        "dclip": make_student(root / "student", tiny_clip_dir),
        "teacher": make_teacher(root / "teacher", tiny_clip_dir),
        "dmclip": make_dmclip(root / "dmclip", tiny_clip_dir),
    }
    (root / "results").mkdir()
    models = (folders["dclip"], folders["dmclip"])
    folders["results"] = write_records(root / "results", *models, anchor=tiny_clip_dir, teacher=folders["teacher"])
    return folders


def gather(made, family="dclip", *, teacher=True, **fields):
    arguments = make_arguments(made[family], made["results"], **fields)
    loaded = None
    if teacher and family == "dclip":
        arguments.teacher = str(made["teacher"])
        loaded = AutoModel.from_pretrained(made["teacher"])
    model = load_merged(made[family])
    made_of = {"teacher": loaded, "examples": make_fake_examples(), "has_adapter": False}
    facts = gather_card_facts(arguments, model, read_arguments(made[family]), **made_of)
    kinds = [kind for kind in KINDS[family] if kind != "teacher" or loaded is not None]
    assert facts["repos"] == {kind: f"me/tiny{REPO_SUFFIXES[kind]}" for kind in kinds}
    return facts


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in KINDS.items() for kind in kinds])
def test_every_card_renders_and_is_valid(made, tmp_path, family, kind):
    facts = gather(made, family, hardware="1 x H200", emissions_grams=120.5)
    card = render_card(kind, facts)
    assert find_fault(card) is None
    save_pictures(tmp_path, choose_pictures([], ["scenes:train"]).files)
    check_card(card, tmp_path, "me/tiny")
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "mit" and data["co2_eq_emissions"]["emissions"] == 120.5
    assert data.get("base_model") == (["openai/clip-vit-base-patch16"] if family == "dclip" else None)
    for part in ("## Intended use", "## Training", "## Licence", "arXiv 2505.21549" if family == "dclip" else "Mamba"):
        assert part in card
    assert ("@article{dclip2025" in card, "@misc{dmclip" in card) == (family == "dclip", family == "dmclip")
    assert (
        "None " not in card.replace("None is the whole image", "") and "∞" not in card and "not recorded" not in card
    )
    assert not re.search(r"^#+ [^\n]*\n+(?=#|\Z)", card, flags=re.MULTILINE)  # no heading without a text
    assert re.search(r"2 epochs, 12 steps of \d+ pairs per device, 1 minute 30 seconds\.", card)
    assert render_card(kind, facts) == card


def test_the_model_index_and_the_table_hold_the_records_numbers(made):
    card = render_card("dual", gather(made))
    own = [record for record in read_all_results([str(made["results"])]) if record.get("label") == "arm 0"]
    (index,) = ModelCard(card).data.to_dict()["model-index"]
    found = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    expected = {
        (describe_source(show_spec(record["benchmark"]).partition("=")[2]).words, metric): value
        for record in own
        for metric, value in record["metrics"].items()
    }
    assert found == expected and len(found) == 4
    assert {result["task"]["type"] for result in index["results"]} == {
        "image-text-retrieval",
        "zero-shot-image-classification",
    }
    table = card[card.index(f"`{RETRIEVAL}`") :]
    for start, ours, change in (("12.5", "25.0", "+12.5"), ("25.0", "50.0", "+25.0")):  # before, and this model
        assert re.search(rf"R@1 +\| +{start} \| +{ours} \| +\{change} \|", table)
    assert "| before training |" in card and "| difference, in points |" in render_card("dual", gather(made, "dmclip"))


def test_the_metadata_name_data_in_words_and_without_a_folder(made):
    (record,) = [one for one in gather(made)["evaluation"]["records"] if one["benchmark"] == RETRIEVAL]
    held_out = "retrieval=held_out:outputs/mine"
    told = {
        held_out: "held-out part of the training data (8 images)",
        "retrieval=held_out:outputs/other": "held-out part of a run's data (8 images)",
        "retrieval=csv:my/table.csv:my/photos": "the publisher's own captions in table.csv",
        RETRIEVAL: "scenes drawn by modeling_dclip",
    }
    results = [make_eval_results([{**record, "benchmark": one}], [held_out])[0] for one in told]
    assert [one.dataset_name for one in results] == list(told.values())


def test_a_setting_that_earlier_runs_did_not_have_is_shown_where_training_recorded_it(made, tmp_path):
    assert "| `contrastive_loss` | auto |" in render_card("dual", gather(made, teacher=False))
    earlier = tmp_path / "earlier"
    shutil.copytree(made["dclip"], earlier)
    arguments = read_arguments(earlier)
    del arguments["student"]["contrastive_loss"]
    (earlier / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    assert "`contrastive_loss`" not in render_card("dual", gather({**made, "dclip": earlier}, teacher=False))


def test_a_card_says_by_what_rule_and_on_which_data_weights_were_chosen(made, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(made["dclip"], student)
    arguments, state = read_arguments(student), json.loads((student / "trainer_state.json").read_text())
    rule = {"wise_ft_alpha": 0.4, "wise_ft_rule": "best mean_recall@1 at retention 0.98", "keep_retention": 0.95}
    arguments["student"] |= {**rule, "probe": ["zero_shot=imagefolder:/home/me/birds", "retrieval=scenes:test"]}
    (student / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    state["log_history"].append({"step": state["global_step"], "probe_kept_step": 1})
    (student / "trainer_state.json").write_text(json.dumps(state))
    told = render_card("dual", gather({**made, "dclip": student}, teacher=False)).replace("\\", "")
    assert (
        "the saved weights are 0.4 times the trained ones plus 0.6 times those before training; the share was" in told
    )
    assert (
        "chosen on validation data by the rule 'best mean_recall@1 at retention 0.98', measured on zero_shot=" in told
    )
    assert "to end at the first measurement that found less than 95 % of the accuracy on zero_shot=imagefolder" in told
    assert "Checkpoint: the last one measured that kept 95 % of the zero-shot accuracy, after step 1 of" in told
    assert "/home/me" not in told


def test_an_address_stays_whole_and_tells_neither_secrets_nor_folders():
    for spec, shown in (
        ("wds:https://host.org/sets/wds_flickr8k", "wds:https://host.org/sets/wds_flickr8k"),
        ("retrieval=wds:https://host.org:80/a/b/:test", "retrieval=wds:https://host.org:80/a/b/:test"),
        ("wds:hf://datasets/me/birds@500,cache_dir=/home/me/cache", "wds:hf://datasets/me/birds@500,cache_dir=cache"),
        ("wds:https://me:abc@host/a/b?token=abc", "wds:https://***@host/a/b?token=***"),
        ("csv:file:///home/me/secret/t.csv:/home/me/photos", "csv:file://t.csv:photos"),
    ):
        assert show_spec(spec) == shown


def test_leakage_is_said_with_numbers_where_they_were_measured(made, tmp_path):
    for kind in ("dual", "teacher"):
        card = render_card(kind, gather(made))
        assert "reads the caption" in card or "caption's own words" in card
        assert re.search(r"another image's regions, own caption\s*\|\s*62\.5", card)
    unmeasured = tmp_path / "records.json"
    shutil.copy(made["results"] / "records.json", unmeasured)
    card = render_card("dual", gather({**made, "results": unmeasured}))
    assert "has not been measured for this teacher" in card and "62.5" not in card
    alone = render_card("dual", gather(made, teacher=False))
    assert "Its teacher is not published with it" in alone and "tiny-teacher" not in alone


def test_a_baseline_is_not_called_distilled(made, tiny_clip_dir, tmp_path):
    words = ("--student.cosine_distillation_loss_weight", "0", "--clip_model", "dclip-vitb32")
    baseline = make_student(
        tmp_path / "baseline", tiny_clip_dir, seed=1, words=words
    )  # the same weights as the student
    facts = gather({**made, "dclip": baseline}, teacher=False)
    card = render_card("dual", facts)
    assert "**without a teacher**" in card and facts["base_models"] == ["openai/clip-vit-base-patch32"]
    for word in ("2505.21549", "Research on distillation", "detector", "- distillation", "that distillation helped"):
        assert word not in card


def test_a_text_encoder_that_trained_is_not_called_untouched(made):
    facts = gather(made)
    assert "The text encoder was left as it was" in render_card("dual", facts)
    facts["training"]["trains_text"] = True
    assert "left as it was" not in render_card("dual", facts)


def test_a_card_says_why_its_weights_are_larger_than_those_that_training_saved(made, tiny_clip_dir, tmp_path):
    half = {**made, "dclip": make_student(tmp_path / "half", tiny_clip_dir, dtype=torch.float16)}
    half["results"] = write_records(tmp_path, half["dclip"], anchor=tiny_clip_dir)
    told = "stored in float32, with the values that training saved in float16: transformers computes in the type that"
    assert [told in render_card("dual", gather(one, teacher=False)) for one in (made, half)] == [False, True]


def test_the_limits_name_few_images_and_lost_zero_shot_accuracy_where_there_are_such(made, tmp_path):
    lines = render_card("dual", gather(made, teacher=False)).split("## Limits")[1]
    assert "keeps" not in lines and "Few training images" not in lines  # not compared in zero-shot, and not counted
    student = tmp_path / "student"
    shutil.copytree(made["dclip"], student)
    counts = {"train": {"images": 90, "captions": 196}, "uncaptioned": {"images": 1, "captions": 0}}
    (student / "manifest.json").write_text(json.dumps({"counts": counts}))
    records = read_all_results([str(made["results"])])
    own = next(one for one in records if "anchor_revision" in one.get("comparison", {}))
    shares = {"high": 0.93, "low": 0.87, "estimate": 0.9, "confidence": 0.95, "covers": "images"}
    own = {**own, "benchmark": "zero_shot=scenes:test", "metrics": {"top1": 0.9}, "intervals": {"top1": shares}}

    def limits(n, kept):
        about = {**own["comparison"], "top1_retention": {**shares, **kept}}
        write_results(tmp_path / "records.json", [{**own, "n": n, "comparison": about}])
        facts = gather({**made, "dclip": student, "results": tmp_path / "records.json"}, teacher=False)
        return render_card("dual", facts).split("## Limits")[1].split("## ")[0]

    told = limits(499, {})
    assert "Few training images: 91 images." in told
    assert "on `zero_shot=scenes:test` rest on 499 images, and their intervals are up to 6 points wide." in told
    assert "it keeps 90.0 % (87.0 % to 93.0 %) of its zero-shot accuracy on `zero_shot=scenes:test`." in told
    told = limits(500, {"high": 1.0})  # enough images, and what was lost is not beyond noise
    assert "Few test images" not in told and "keeps" not in told
    counts["train"]["images"] = 999
    (student / "manifest.json").write_text(json.dumps({"counts": counts}))
    assert "Few training images" not in limits(500, {})


@pytest.mark.parametrize(
    ("retrieval", "top1", "told", "uses", "warned"),
    [
        (0.01, 0.1, ["from text to image and from image to text", "zero-shot"], "- A trial of", "search or zero-shot"),
        (0.01, 0.9, ["from text to image and from image to text"], "- A trial of", "search:"),
        (0.5, 0.1, ["zero-shot classification"], "- Search images", "zero-shot classification:"),
        (0.5, 0.9, [], "- Search images", None),
    ],
)
def test_what_a_model_can_only_guess_is_a_limit_and_no_intended_use(
    made, tmp_path, retrieval, top1, told, uses, warned
):
    records = read_all_results([str(made["results"])])
    own = next(one for one in records if one["benchmark"] == RETRIEVAL and "comparison" in one)
    own = {**own, "n": 100, "metrics": dict.fromkeys(DIRECTION_WORDS, retrieval)}
    other = {"benchmark": "zero_shot=scenes:test", "metrics": {"top1": top1}, "chance": {"top1": 0.1}}
    write_results(tmp_path / "records.json", [own, {**own, **other, "intervals": {}}])
    card = render_card("dual", gather({**made, "results": tmp_path / "records.json"}, teacher=False))
    intended, limits = (card.split(f"## {name}")[1].split("## ")[0] for name in ("Intended use", "Limits"))
    lines = re.findall("At chance: in (.*) on `.*` the model does no better than a guess", limits)
    assert len(lines) == len(told) and all(want in line for want, line in zip(told, lines, strict=True))
    assert uses in intended and ("- Search images" in intended) == (retrieval > 0.1)
    assert ("- Zero-shot image" in intended) == (top1 > 0.1)
    assert ("no better than a guess" in intended) == bool(warned) and f"for {warned or ''}" in intended + "for "
    use = card.split("## How to use it")[1].split("## Evaluation")[0]
    assert ("get_text_features" in use, "pipeline(" in use) == (retrieval > 0.1, top1 > 0.1)
    assert ("There is no example here of" in use) == (retrieval < 0.1 or top1 < 0.2)


def test_a_card_offers_what_was_measured_above_chance_and_says_what_was_not(made, tmp_path):
    own = next(one for one in read_all_results([str(made["results"])]) if one["benchmark"] == RETRIEVAL)

    def parts(**fields):
        write_results(tmp_path / "records.json", [{**own, **fields}])
        card = render_card("dual", gather({**made, "results": tmp_path / "records.json"}, teacher=False))
        return [card.split(f"## {name}")[1].split("\n## ")[0] for name in ("Intended use", "How to use it")]

    intended, use = parts(n=100, metrics=dict.fromkeys(DIRECTION_WORDS, 0.5))
    assert "- Search images by text" in intended and "- Zero-shot" not in intended
    assert "Zero-shot classification was not measured: whether the model can do it is not known." in intended
    assert "get_text_features" in use and "pipeline(" not in use
    assert "There is no example here of zero-shot classification: [Intended use]" in use
    intended, use = parts(n=100, metrics=dict.fromkeys(DIRECTION_WORDS, 0.01))
    assert "- Search" not in intended and "- Zero-shot" not in intended and "Do not use it for search: " in intended
    assert "AutoModel" in use and "get_text_features" not in use and "pipeline(" not in use
    assert "There is no example here of search or of zero-shot classification: " in use
    intended, _ = parts(n=5, metrics=dict.fromkeys(DIRECTION_WORDS, 1.0))  # too few to tell
    assert "Search was measured, but with too little to tell it from a guess." in intended and "- Sea" not in intended


def test_what_is_found_on_two_benchmarks_alike_is_said_once(made, tmp_path):
    records = read_all_results([str(made["results"])])
    other = {"benchmark": "retrieval=scenes:val", "dataset_fingerprint": "sha256:01"}
    records += [{**one, **other} for one in records if one["benchmark"] == RETRIEVAL]
    write_results(tmp_path / "records.json", records)
    facts = gather({**made, "results": tmp_path}, teacher=False)
    (verdict,) = facts["evaluation"]["verdicts"]
    assert len(verdict.details) == 2 and "scenes:test" in verdict.details[0] and "scenes:val" in verdict.details[1]
    card = render_card("dual", facts)
    assert card.count(f"**{verdict.headline}") == 2  # at the top, and over the numbers


def test_the_metadata_of_a_widget_hold_labels_and_stored_outputs(made):
    for kind, has_widget in (("dual", True), ("vision", False), ("teacher", False)):
        data = make_metadata(kind, gather(made)).to_dict()
        assert ("widget" in data) == has_widget
    entry = make_metadata("dual", gather(made)).to_dict()["widget"][0]
    assert entry["candidate_labels"] == ", ".join(LABELS[0])
    assert entry["output"][0] == {"label": LABELS[0][0], "score": 0.5}


def test_captions_keep_their_commas_and_long_ones_are_shown_in_part(made, tmp_path):
    long = "two dogs, one of them brown, run over a wide green meadow behind which a row of old trees stands"
    captions = ["a cross,  two discs", "a star", long]
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [f'{number}.png,"{caption}"' for number, caption in enumerate(captions)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    pictures = choose_pictures([f"csv:{tmp_path}/t.csv:{tmp_path}@3"], [])
    texts = {"a cross, two discs", "a star", long}
    assert all(set(labels) == texts for labels in pictures.labels)  # what the model is given
    outputs = tuple({"label": label, "score": 0.25} for label in sorted(texts))
    shown = [Example(path, labels, outputs) for path, labels in zip(pictures.files, pictures.labels, strict=True)]
    facts = gather(made) | {"examples": shown, "examples_source": pictures.source}
    card = render_card("dual", facts)
    assert "a cross, two discs 25.0 %" in card and "| two dogs, one of them brown, run over" in card.replace(
        "<br>", "| "
    )
    assert "behind which … 25.0 %" in card and "A label that ends in … is shown in part" in card
    # The Hub's widget takes labels apart at commas, so these pictures stand in the table alone.
    assert "widget" not in ModelCard(card).data.to_dict()
    short = render_card("dual", facts | {"examples": make_fake_examples()})
    assert "is shown in part" not in short and len(ModelCard(short).data.to_dict()["widget"]) == 3


def test_data_whose_file_says_only_a_part_are_named_with_their_folder():
    for spec, shown, words in (
        (
            "parquet:/home/me/data/cifar10/*.parquet",
            "parquet:cifar10/*.parquet",
            "the parquet files cifar10/*.parquet",
        ),
        ("parquet:/d/cifar10/a-*/test-0.parquet@9", "parquet:cifar10/a-*/test-0.parquet@9", None),
        ("imagefolder:/d/pets/test", "imagefolder:pets/test", "the image folder pets/test"),
        ("parquet:/home/me/test.parquet", "parquet:test.parquet", "the parquet files test.parquet"),
        (
            "csv:/d/garden/photos.csv:/d/garden/2",
            "csv:photos.csv:garden/2",
            "the publisher's own captions in photos.csv",
        ),
    ):
        assert show_spec(spec) == shown and words in (None, describe_source(shown).words)


def test_the_authors_of_the_cited_papers_are_named(made):
    (paper,) = [
        one
        for one in yaml.safe_load((CARDS.parent / "CITATION.cff").read_text())["references"]
        if "DCLIP" in one["title"]
    ]
    names = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    for family in KINDS:
        entries = re.findall(r"@(\w+)\{\w+,\n(.*?)\n\}", render_card("dual", gather(made, family)), re.DOTALL)
        assert all("author" in entry for kind, entry in entries if kind == "article") and len(entries) == 2
        assert (f"{{{names}}}" in "".join(entry for _, entry in entries)) == (family == "dclip")


def test_a_fact_that_is_missing_is_an_error_that_names_it(made):
    facts = gather(made)
    del facts["training"]["excluded"]
    with pytest.raises(ValueError, match="dclip.md.jinja.*'excluded'"):
        render_card("dual", facts)


def test_every_template_has_a_model_and_types_no_measurement():
    names = {template_name(family, kind) for family, kinds in KINDS.items() for kind in kinds}
    assert names == {path.name for path in CARDS.glob("*.jinja") if not path.name.startswith("_")}
    for path in CARDS.glob("*.jinja"):
        text = re.sub(r"\{[{%].*?[%}]\}|```.*?```", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"\d\s*%|\d\.\d(?!505)", text.replace("2505.21549", "").replace("Apache-2.0", "")), (
            path.name
        )


def test_results_of_other_weights_are_refused(made, tiny_clip_dir, tmp_path):
    other = make_student(tmp_path / "other", tiny_clip_dir, seed=5)
    with pytest.raises(
        ValueError, match="Expected results of the weights in .*Evaluate these weights: python eval.py"
    ):
        gather({**made, "dclip": other})
    with pytest.raises(FileNotFoundError, match="Expected a results file or a folder"):
        gather({**made, "results": tmp_path / "nowhere"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="got none. Run eval.py"):
        gather({**made, "results": tmp_path / "empty"})


def test_what_training_did_not_leave_is_asked_for(made, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(made["dclip"], bare)
    arguments = yaml.safe_load((bare / "arguments.yaml").read_text())
    del arguments["student"]["temperature"]
    (bare / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    with pytest.raises(ValueError, match="Expected student.temperature in .*arguments.yaml"):
        gather({**made, "dclip": bare})
    (bare / "arguments.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="Expected arguments.yaml beside the weights"):
        gather({**made, "dclip": bare})
    (bare / "arguments.yaml").write_text((made["dclip"] / "arguments.yaml").read_text())
    (bare / "trainer_state.json").unlink()
    assert gather({**made, "dclip": bare})["training"]["length"] is None


def test_a_card_that_shows_what_is_not_there_is_refused(made, tmp_path):
    card = render_card("dual", gather(made))
    with pytest.raises(ValueError, match="Expected examples/red-circle.png, which the card of me/tiny shows"):
        check_card(card, tmp_path, "me/tiny")
    save_pictures(tmp_path, choose_pictures([], ["scenes:train"]).files)
    with pytest.raises(ValueError, match="one stored output for each label"):
        check_card(card.replace("- label: red square", "- label: red cube", 1), tmp_path, "me/tiny")
    with pytest.raises(ValueError, match="no tag of the template"):
        check_card(card + "{{ left }}", tmp_path, "me/tiny")


def test_the_licence_follows_what_the_model_starts_from(made, tiny_clip_dir, tmp_path):
    with pytest.raises(ValueError, match="license: expected one of .*got 'Apache'"):
        check_licence("Apache", None, None, [])
    with pytest.raises(ValueError, match="license 'other': expected license_name"):
        check_licence("other", None, None, [])
    converted = tmp_path / "mambavision_t"
    converted.mkdir()
    metadata = {"license": "other", "license_name": "mambavision-non-commercial", "license_link": "https://x.org"}
    (converted / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# Converted\n")
    # A model that went on from one that went on from published weights is bound by them too.
    middle = make_dmclip(tmp_path / "middle", tiny_clip_dir, "--dmclip.model", str(converted))
    last = make_dmclip(tmp_path / "last", tiny_clip_dir, "--dmclip.model", str(middle))
    origins = find_origins(yaml.safe_load((last / "arguments.yaml").read_text()))
    assert [origin.name for origin in origins] == ["middle", "mambavision_t"]
    with pytest.raises(ValueError, match="mambavision_t limits the licence of models .*non-commercial"):
        check_licence("mit", None, None, origins)
    check_licence("cc-by-nc-sa-4.0", None, None, origins)
    named = find_origins({"dmclip": {"model": "nvidia/MambaVision-T-1K"}})
    with pytest.raises(ValueError, match="non-commercial"):
        check_licence("apache-2.0", None, None, named)
    facts = gather({**made, "dmclip": last}, "dmclip", license="cc-by-nc-sa-4.0")
    assert "MambaVision's weights are for non-commercial use only" in render_card("dual", facts)


def write_card_of(folder, **metadata):
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n\n# A model\n")
    return str(folder)


@pytest.mark.parametrize(
    ("metadata", "allowed", "refused"),
    [
        ({"license": "apple-amlr"}, ("apple-amlr", "other"), ("mit", "apache-2.0", "cc-by-nc-4.0")),
        ({"license": "other", "license_name": "apple-amlr"}, ("apple-amlr",), ("mit",)),
        ({"license": "cc-by-sa-4.0"}, ("cc-by-sa-4.0",), ("mit", "cc-by-4.0", "other")),
        ({"license": "cc-by-nc-sa-4.0"}, ("cc-by-nc-sa-4.0",), ("mit", "cc-by-nc-4.0", "cc-by-sa-4.0")),
        ({"license": "cc-by-nc-4.0"}, ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), ("mit", "cc-by-4.0")),
        ({"license": "other", "license_name": "mine"}, ("other",), ("mit",)),
        ({"license": "gpl-3.0"}, ("gpl-3.0", "agpl-3.0"), ("mit", "lgpl-3.0")),
        ({"license": "cc-by-nc-nd-4.0"}, (), ("cc-by-nc-nd-4.0", "other")),
        ({"license": "mit"}, ("mit", "apache-2.0", "cc-by-4.0"), ()),
        ({}, ("mit",), ()),
    ],
)
def test_a_folders_own_licence_holds_for_models_trained_from_it(tmp_path, metadata, allowed, refused):
    folder = write_card_of(tmp_path / "start", **metadata)
    for section in ({"clip_model": folder}, {"dmclip": {"vision_model": folder}}, {"anchor": {"text_model": folder}}):
        origins = find_origins(section)
        assert [origin.name for origin in origins] == ["start"]
        for name in allowed:
            check_licence(name, "name", "https://x.org", origins)
        for name in refused:
            with pytest.raises(ValueError, match="start limits the licence|start allows no model trained from it"):
                check_licence(name, "name", "https://x.org", origins)
    # An id that the publisher states does not lift what the folder says.
    (stated,) = find_origins({"clip_model": folder}, "openai/clip-vit-base-patch16")
    assert stated.name == "openai/clip-vit-base-patch16" and set(allowed) <= set(stated.allowed)
    assert not set(refused) & set(stated.allowed)


def test_an_image_encoder_of_mambavision_is_no_training_from_scratch(made, tiny_clip_dir, tmp_path):
    metadata = {"license": "other", "license_name": "mambavision-non-commercial", "license_link": "https://x.org"}
    converted = write_card_of(tmp_path / "mambavision_t", **metadata)
    model = make_dmclip(tmp_path / "model", tiny_clip_dir, "--dmclip.vision_model", converted)
    with pytest.raises(ValueError, match=r"mambavision_t limits .*\(MambaVision's weights .* got 'apache-2.0'"):
        gather({**made, "dmclip": model}, "dmclip", license="apache-2.0")
    card = render_card("dual", gather({**made, "dmclip": model}, "dmclip", license="cc-by-nc-sa-4.0"))
    assert "- Training started from `mambavision_t`, weights in a local folder of this name." in card
    assert "trained from scratch" not in card


def test_a_stated_base_model_of_other_sizes_is_refused_and_one_that_cannot_be_read_is_called_stated(
    made, tiny_clip_dir, tmp_path
):
    local = make_student(tmp_path / "local", tiny_clip_dir, words=("--clip_model", str(tiny_clip_dir)))
    folders = {**made, "dclip": local}
    same = gather(folders, teacher=False, base_model=str(tiny_clip_dir), dry_run=True)
    assert same["origins"][0].stated == "as the publisher states; its sizes are this model's"
    unknown = render_card(
        "dual", gather(folders, teacher=False, base_model="openai/clip-vit-base-patch16", dry_run=True)
    )
    stated = "as the publisher states; its sizes could not be compared with this model's"
    assert f"- Training started from `openai/clip-vit-base-patch16` ({stated})." in unknown
    assert "fine-tuned from `openai/clip-vit-base-patch16` (as the publisher states) for" in unknown
    unnamed = render_card("dual", gather(folders, teacher=False))
    assert "weights in a local folder of this name. No id of the Hub was given for them." in unnamed
    config = DCLIPConfig.from_pretrained(tiny_clip_dir)
    had = config.vision_config.patch_size, config.text_config.hidden_size
    config.vision_config.patch_size, config.text_config.hidden_size = 2 * had[0], 2 * had[1]
    config.save_pretrained(tmp_path / "larger")
    told = rf"got '.*/larger' with image patch size {2 * had[0]}, text width {2 * had[1]}; '.*/local' has image patch"
    with pytest.raises(ValueError, match=f"base_model: expected the model that training started from, {told}"):
        gather(folders, teacher=False, base_model=str(tmp_path / "larger"), dry_run=True)


def test_a_hub_id_given_for_a_local_copy_is_the_base_model(made, tiny_clip_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = ("--clip_model", str(tiny_clip_dir))
    local = make_student(tmp_path / "local", tiny_clip_dir, words=words)
    unnamed = gather({**made, "dclip": local})
    assert unnamed["base_models"] == [] and str(tiny_clip_dir) not in render_card("dual", unnamed)
    with pytest.raises(FileNotFoundError, match="which the model was trained from"):
        find_origins({"clip_model": str(tmp_path / "gone")})
    named = gather({**made, "dclip": local}, base_model="openai/clip-vit-base-patch32")
    assert make_metadata("dual", named).to_dict()["base_model"] == ["openai/clip-vit-base-patch32"]


def test_pictures_are_always_the_same(tmp_path):
    for folder in ("one", "two"):
        draw_pictures.cache_clear()
        save_pictures(tmp_path / folder, choose_pictures([], ["scenes:train"]).files)
    names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png")]
    assert len(names) == len(LABELS)
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    assert torch.tensor([len(set(labels)) for labels in LABELS]).unique().tolist() == [4]
    assert json.dumps([example.to_widget() for example in make_fake_examples()])


def test_a_suggested_name_is_one_that_the_hub_takes():
    for text in ("my run ü!", "", "...", "-a-", "a--b..c", "x.git", "ÄÖ", "新", "n" * 200, "a/b", "_x_", "1.5"):
        check_repo_name(f"me/{suggest_name(text)}")
    assert [suggest_name(text) for text in ("mine", "my run ü!", "legit")] == ["mine", "my-run-u", "legit"]


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("me/my run ü!", r"got 'me/my run ü!': .*For example me/my-run-u\."),
        ("me/x.git", r"got 'me/x.git': .*For example me/x\."),
        ("alone", "expected namespace/name, for example me/my-clip, got 'alone'"),
        ("me/" + "n" * 90, f"at most {MOST_LETTERS} characters, .* got 90 in 'me/nnn"),
    ],
)
def test_a_wrong_name_is_named_as_it_was_given(repo_id, message):
    with pytest.raises(ValueError, match=message) as raised:
        check_repo_name(repo_id)
    assert "-teacher" not in str(raised.value)


def test_of_several_records_the_newest_counts_and_other_conditions_do_not():
    def record(top1, created, revision="sha256:own", **fields):
        shared = {"model": "m", "benchmark": "zero_shot=x", "metrics": {"top1": top1}, "revision": revision}
        shared |= {"dataset_fingerprint": "sha256:ab", "n": 8}
        return {**shared, "created": f"2026-01-{created:02d}", **fields}

    compared = {"comparison": {"anchor_revision": "sha256:anchor"}}
    records = [record(0.3, 2, **compared), record(0.1, 1), record(0.9, 3, condition="alpha=0.5")]
    records += [record(0.2, 2, "sha256:anchor"), record(0.8, 1, "sha256:anchor"), record(0.7, 3, "sha256:other")]
    own, reference = select_records(records, "sha256:own", "m", ["r"])
    assert [one["metrics"]["top1"] for one in own] == [0.3]
    assert [one["metrics"]["top1"] for one in reference] == [0.2]
    assert find_passed_over(records, own) == ["zero_shot=x of 2026-01-01 (shown: zero_shot=x of 2026-01-02)"]
    # The same data under another name is the same benchmark; other data, or another number of them, is not.
    records += [record(0.4, 4, benchmark="zero_shot=y"), record(0.5, 1, benchmark="zero_shot=z", n=4)]
    records += [record(0.6, 1, benchmark="retrieval=x", dataset_fingerprint="none")]
    records += [record(0.7, 2, benchmark="retrieval=y", dataset_fingerprint="none")]
    own, reference = select_records(records, "sha256:own", "m", ["r"])
    assert sorted(one["metrics"]["top1"] for one in own) == [0.4, 0.5, 0.6, 0.7]


def test_a_test_part_is_called_held_out_only_where_no_image_of_it_was_trained_on(tmp_path):
    scenes = load_scenes("test", n=3, image_size=32)
    keys, run = image_keys(scenes), tmp_path / "run"
    write_held_out(run / "held_out", scenes, keys, of=30, fraction=0.1)
    (run / "student").mkdir()

    def find(benchmark=f"retrieval=held_out:{run}", notes=(), **fields):
        record = {"benchmark": benchmark, "revision": "sha256:own", "created": "2026-01-01", "notes": list(notes)}
        record |= {"dataset_fingerprint": "sha256:ab", "n": 3}
        others = [{**record, "revision": "sha256:other"}, {**record, "condition": "alpha=0.5"}]
        return find_seen([record | fields, *others], "sha256:own", str(run / "student"))

    shown = "retrieval=held_out:run"
    assert find() == [Seen(shown, False, "")]  # nobody wrote what the model learned from
    write_trained_images(run / "student", ["ab" * 32])
    assert find() == [Seen(shown, True, "")]
    (run / "start").mkdir()
    write_trained_images(run / "start", keys[:2])
    write_trained_images(run / "student", ["ab" * 32], [run / "start"])
    assert find() == [Seen(shown, False, "2 of the 3 images")]
    note = "x: 27 of the 1,108 test images were in this model's training data (a/trained_images.npy)"
    for said in (
        note,
        note.replace("were in this model's training data", "trained this model or chose its checkpoint"),
    ):
        assert find(notes=["of a run", said]) == [Seen(shown, False, "27 of the 1,108 images")]
    assert find("retrieval=csv:a.csv:b", [note]) == [Seen("retrieval=csv:a.csv:b", False, "27 of the 1,108 images")]
    (run / "student" / TRAINED_IMAGES).unlink()
    assert find(notes=[note]) == [Seen(shown, False, "27 of the 1,108 images")]
    assert find("retrieval=csv:a.csv:b", ["of a run"]) == [Seen("retrieval=csv:a.csv:b", False, "")]


def test_a_card_counts_the_test_images_that_were_trained_on(made):
    facts = gather(made)
    told = [facts["evaluation"] | {"held_out": [RETRIEVAL], "trained_on": {RETRIEVAL: "27 of the 108 images"}}]
    told += [told[0] | {"trained_on": {RETRIEVAL: ""}}, told[0] | {"trained_on": {}}]
    cards = [render_card("dual", facts | {"evaluation": one}) for one in told]
    claim = "it never trained on them"
    assert [claim in card for card in cards] == [False, False, True]
    assert "⚠ 27 of the 108 images trained this model or chose its checkpoint" in cards[0]
    assert "⚠ Images of this dataset were trained on" in cards[1]


HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)>",
    "a | b \\| c ` d `` e",
    "x: y\n---\nlicense: mit\n---\n# {title}",
    "[x](javascript:alert(1)) ![x](http://a/b.png) [y]: z",
    "caf\udce9 \x00\x1b[1m \u202eexe",
    "&lt;script&gt; 'quote' \"double\" #hash !tag *star @at %percent",
)


def spoil(value, text, path=()):
    """The facts with a text in every field that comes from files or names, not from a closed list."""
    closed = {"repos", "license", "base_models", "cross_attention", "section", "table", "leakage", "path"}
    closed |= {"reading", "image_parameters_millions", "text_parameters_millions", "parameters_millions"}  # numbers
    closed |= {"family", "dtype", "saved_dtype", "hub_id", "allowed", "emissions_grams", "license_link", "split"}
    if isinstance(value, dict):
        return {name: one if name in closed else spoil(one, text, (*path, name)) for name, one in value.items()}
    if is_dataclass(value):
        changed = {one.name: getattr(value, one.name) for one in fields(value)}
        return replace(value, **{name: spoil(one, text) for name, one in changed.items() if name not in closed})
    if hasattr(value, "_fields"):
        return type(value)(**spoil(value._asdict(), text, path))
    if isinstance(value, (list, tuple)):
        return type(value)(spoil(one, text, path) for one in value)
    if path[-2:] == ("records", "benchmark"):
        return f"retrieval={text}"
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in KINDS.items() for kind in kinds])
def test_no_text_of_a_card_becomes_markup_or_metadata(made, family, kind, text):
    markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py, which gradio brings")
    parse = markdown_it.MarkdownIt("commonmark").enable("table").parse
    facts = gather(made, family, hardware="1 x H200", emissions_grams=120.5)
    facts["training"] |= {"uncaptioned": [DataSource("a", "b")], "excluded": ["b"], "specs": ["hub:a/b:c"]}
    facts["training"] |= {"teachers": ["t"], "detector": "d", "checkpoint": "c", "losses": ["l"], "methods": ["m"]}
    facts["examples_source"] = "A source."
    facts["data_terms"] = ["A term."]
    card, plain = (render_card(kind, spoil(facts, one)) for one in (text, "plain"))
    assert find_fault(card) is None
    bodies = [re.sub(r"\A---\n.*?\n---\n", "", one, flags=re.DOTALL) for one in (card, plain)]
    tokens, expected = (parse(body) for body in bodies)
    assert [token.type for token in tokens] == [token.type for token in expected]
    inner, expected = ([one for token in found for one in token.children or ()] for found in (tokens, expected))
    for wanted in ("html_inline", "link_open", "image", "code_inline", "strong_open"):
        found, without = (
            [(one.content if wanted == "html_inline" else one.attrs) for one in side if one.type == wanted]
            for side in (inner, expected)
        )
        assert len(found) == len(without) or (wanted == "code_inline" and "\\|" in text)  # no cell holds it as code
        assert wanted == "code_inline" or found == without
    data, without = (ModelCard(one).data.to_dict() for one in (card, plain))
    assert data.keys() == without.keys() and data["license"] == without["license"]
    if kind != "teacher":
        names = {result["dataset"]["name"] for index in data["model-index"] for result in index["results"]}
        assert names == {show_text(text)}
    assert data["co2_eq_emissions"]["hardware_used"] == show_text(text)
