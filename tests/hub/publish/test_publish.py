"""All repositories pushed over real HTTP to a Hub on this machine,
and loaded from there by a process that has nothing else.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.loopback_hub import READ_TOKEN, TOKEN, Repo, git_oid, run_loopback_hub
from fixtures.publications import (
    HOME,
    make_arguments,
    make_dmclip,
    make_native_student,
    make_student,
    make_teacher,
    write_records,
)
from fixtures.tiny_dual_encoders import save_dual_encoder, save_fixed_siglip2
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.hf_api import RepoFile
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPModel

from modeling_dclip import DCLIPConfig, DCLIPModel, DCLIPProcessor, DCLIPTeacher, DCLIPTeacherProcessor, DMCLIPModel
from modeling_dclip.data.captions.parts import TRAINED_IMAGES, write_trained_images
from modeling_dclip.encoders.families import tokenize_texts
from modeling_dclip.encoders.loading import load_pair
from modeling_dclip.hub.publish import describe_publication, publish
from modeling_dclip.hub.publish import push as repositories
from modeling_dclip.hub.publish.__main__ import main
from modeling_dclip.hub.publish.cards import CARD_TEMPLATES
from modeling_dclip.hub.publish.facts import find_languages, find_results, gather
from modeling_dclip.hub.publish.pictures import LABELS, draw_pictures
from modeling_dclip.hub.publish.push import check_access, find_differences, push_folder
from modeling_dclip.hub.publish.staging import StagedRepo, check_folder, stage

DELAYS = (0.0, 0.0)
REPOS = ("me/tiny-vision", "me/tiny-teacher", "me/tiny")
# Loaded without code from beside the weights, and their processors.
NATIVE = {
    "CLIPModel": "CLIPProcessor",
    "SiglipModel": "SiglipProcessor",
    "VisionTextDualEncoderModel": "VisionTextDualEncoderProcessor",
}
PICTURE = next(iter(draw_pictures()))

# Runs with -I, an empty cache, no token, and without this package.
READER = """
import contextlib, io, json, os, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_dclip":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
jobs = json.loads(open(sys.argv[1]).read())
answers = {"models": [], "pipelines": [], "code": []}
for job in jobs["models"]:
    named = {"trust_remote_code": True} if job["trust"] else {}
    if job["revision"]:
        named["revision"] = job["revision"]
    model = getattr(transformers, job["auto_class"]).from_pretrained(job["repo"], **named)
    processor = transformers.AutoProcessor.from_pretrained(job["repo"], **named)
    with torch.no_grad():
        out = model(**load_file(job["inputs"]))
    save_file({name: out[name].contiguous() for name in job["names"]}, job["outputs"])
    ids = processor(text=["a red dog"], return_tensors="pt")["input_ids"].tolist()
    answers["models"].append([type(model).__name__, type(processor).__name__, ids])
for job in jobs["pipelines"]:
    named = {"trust_remote_code": True} if job["trust"] else {}
    run = transformers.pipeline(job["task"], model=job["repo"], **named)
    answers["pipelines"].append(run(job["image"], **job["options"]))
for code in jobs["code"]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "card", "exec"), {})
    answers["code"].append(said.getvalue())
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub():
    with run_loopback_hub() as loopback, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", loopback.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", loopback.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        loopback.repos["openai/clip-vit-base-patch16"] = Repo(private=False)
        yield loopback


@pytest.fixture(scope="module")
def trained(tiny_clip_dir, tmp_path_factory):
    """Folders of a student, what it was a day later, a teacher and a DM-CLIP, and results of all."""
    root = tmp_path_factory.mktemp("trained")
    made = {
        "student": make_student(root / "student", tiny_clip_dir),
        "later": make_student(root / "later", tiny_clip_dir, seed=2),
        "teacher": make_teacher(root / "teacher", tiny_clip_dir),
        "dmclip": make_dmclip(root / "dmclip", tiny_clip_dir),
        "sigmoid": make_native_student(root / "sigmoid", save_fixed_siglip2),
        "pair": make_native_student(root / "pair", lambda folder: save_dual_encoder("vision_text", folder)),
    }
    (root / "results").mkdir()
    models = (made["student"], made["later"], made["dmclip"], made["sigmoid"], made["pair"])
    made["results"] = write_records(root / "results", *models, anchor=tiny_clip_dir, teacher=made["teacher"])
    return made


@pytest.fixture(scope="module")
def pushed(hub, trained):
    """The student pushed through a failure, pushed again, its later state over it, and a DM-CLIP."""
    arguments = make_arguments(trained["student"], trained["results"], teacher=str(trained["teacher"]))
    hub.fail("POST", r"^/api/models/me/tiny-teacher/commit/", 500)
    hub.fail("LOST", r"/me/tiny-vision$", 0)
    first = publish(arguments, DELAYS)
    commits = {repo_id: hub.commits(repo_id) for repo_id in REPOS}
    again = publish(arguments, DELAYS)
    commits_again = {repo_id: hub.commits(repo_id) for repo_id in REPOS}
    later = publish(make_arguments(trained["later"], trained["results"], teacher=str(trained["teacher"])), DELAYS)
    dmclip = publish(make_arguments(trained["dmclip"], trained["results"], repo_id="me/mamba"), DELAYS)
    for name in ("sigmoid", "pair"):  # of other families
        publish(make_arguments(trained[name], trained["results"], repo_id=f"me/{name}"), DELAYS)
    return {
        "first": first,
        "commits": commits,
        "again": again,
        "commits_again": commits_again,
        "later": later,
        "dmclip": dmclip,
    }


def test_every_repository_gets_one_commit_through_failures(hub, pushed):
    assert [done.repo_id for done in pushed["first"]] == list(REPOS)
    asked = [path for method, path in hub.requests if method == "POST" and "/me/tiny-teacher/commit/" in path]
    assert len(asked) >= 2  # one was refused
    for repo_id in REPOS:
        assert len(pushed["commits"][repo_id]) == 2  # the Hub's own first one, and ours
    lost = next(done for done in pushed["first"] if done.repo_id == "me/tiny-vision")
    assert lost.commit == pushed["commits"]["me/tiny-vision"][-1] and not lost.changed  # found done when asked again
    assert "me/tiny-vision" in describe_publication(pushed["first"])


def test_pushing_twice_changes_nothing(pushed):
    assert pushed["commits_again"] == pushed["commits"]
    assert all(not done.changed and not done.deleted for done in pushed["again"])
    assert "nothing to change" in describe_publication(pushed["again"])


def test_a_later_state_changes_the_files_that_differ_in_one_commit(hub, pushed):
    assert all(len(hub.commits(repo_id)) == (2 if repo_id == "me/tiny-teacher" else 3) for repo_id in REPOS)
    changed = next(done.changed for done in pushed["later"] if done.repo_id == "me/tiny")
    assert set(changed) == {"README.md", "model.safetensors"}


def test_the_card_was_checked_by_the_hub_before_the_first_repository_was_made(hub, pushed):
    checks = [index for index, (_, path) in enumerate(hub.requests) if path == "/api/validate-yaml"]
    created = next(index for index, (_, path) in enumerate(hub.requests) if path == "/api/repos/create")
    assert len([index for index in checks if index < created]) == len(REPOS)


def test_no_file_tells_where_it_was_made(hub, pushed, trained, tiny_clip_dir):
    for repo_id in (*REPOS, "me/mamba", "me/mamba-vision", "me/sigmoid", "me/pair"):
        for path, content in hub.files(repo_id).items():
            for place in (str(trained["student"].parent), str(tiny_clip_dir), *HOME.split("/")[2:]):
                assert place.encode() not in content, (repo_id, path)
    card = hub.files("me/tiny")["README.md"].decode()
    assert "`coco:captions.json:images@8`" in card and "`zero_shot=parquet:cifar10/test.parquet`" in card


def save_inputs(path, batch):
    save_file({name: value.contiguous() for name, value in batch.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def reader_jobs(hub, pushed, trained, tiny_clip_dir, tmp_path_factory):
    """What to load by repository id, and what this process gets from the folders that were published."""
    root = tmp_path_factory.mktemp("reader")
    pictures = list(draw_pictures().values())[:2]
    batch = DCLIPProcessor.from_pretrained(tiny_clip_dir)(images=pictures, text=["a dog", "red"], return_tensors="pt")
    boxes = [[[1, 2, 30, 20], [5, 5, 40, 40]], None]
    read = DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir)(pictures, ["a dog", "red"], boxes=boxes)
    others = {name: load_pair(trained[name]) for name in ("sigmoid", "pair")}
    inputs = {
        name: save_inputs(
            root / f"{name}.inputs",
            {
                **tokenize_texts(*other, ["a dog", "A Red dog"]),
                "pixel_values": other[1].image_processor(pictures, return_tensors="pt")["pixel_values"],
            },
        )
        for name, other in others.items()
    } | {
        "dual": save_inputs(root / "dual.inputs", batch),
        "vision": save_inputs(root / "vision.inputs", {"pixel_values": batch["pixel_values"]}),
        "teacher": save_inputs(root / "teacher.inputs", read),
    }
    student, later = (DCLIPModel.from_pretrained(trained[name]).eval() for name in ("student", "later"))
    teacher, mamba = (
        DCLIPTeacher.from_pretrained(trained["teacher"]).eval(),
        DMCLIPModel.from_pretrained(trained["dmclip"]).eval(),
    )
    both, embeds = ["image_embeds", "text_embeds", "logits_per_image"], ["image_embeds"]
    pinned, zero_shot = pushed["commits"]["me/tiny"][-1], "AutoModelForZeroShotImageClassification"

    def tower(model):
        return lambda pixel_values: {"image_embeds": model.get_image_features(pixel_values=pixel_values).pooler_output}

    cases = [
        ("me/tiny", "AutoModel", None, "dual", both, later, "DCLIPModel"),
        ("me/tiny", "AutoModel", pinned, "dual", both, student, "DCLIPModel"),
        ("me/tiny", zero_shot, pinned, "dual", both, student, "DCLIPModel"),
        ("me/tiny-vision", "AutoModel", None, "vision", embeds, tower(later), "DCLIPVisionModel"),
        ("me/tiny-teacher", "AutoModel", None, "teacher", ["teacher_embeds"], teacher, "DCLIPTeacher"),
        ("me/tiny", "AutoModel", None, "dual", both, later, "CLIPModel"),
        ("me/tiny", zero_shot, pinned, "dual", both, student, "CLIPModel"),
        ("me/mamba", zero_shot, None, "dual", both, mamba, "DMCLIPModel"),
        ("me/mamba-vision", "AutoModel", None, "vision", embeds, tower(mamba), "DMCLIPVisionModel"),
        ("me/sigmoid", "AutoModel", None, "sigmoid", both, others["sigmoid"][0], "SiglipModel"),
        ("me/pair", "AutoModel", None, "pair", both, others["pair"][0], "VisionTextDualEncoderModel"),
    ]  # fmt: skip
    jobs, expected = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the reader: a product split over threads may differ in its last bit
    for index, (repo, auto_class, revision, kind, names, model, class_name) in enumerate(cases):
        job = {"repo": repo, "auto_class": auto_class, "revision": revision, "names": names, "inputs": inputs[kind]}
        jobs.append({**job, "trust": class_name not in NATIVE, "outputs": str(root / f"{index}.outputs")})
        with torch.no_grad():
            outputs = model(**load_file(inputs[kind]))
        processor = others[kind][1] if kind in others else DCLIPProcessor.from_pretrained(tiny_clip_dir)
        ids = processor.tokenizer(["a red dog"], return_tensors="pt")["input_ids"].tolist()
        expected.append((class_name, ids, {name: outputs[name] for name in names}))
    torch.set_num_threads(threads)
    draw_pictures()[PICTURE].save(root / "picture.png")
    Image.effect_noise((64, 48), 80).convert("RGB").save(root / "photo.jpg")  # what the cards' code opens
    labels = {"candidate_labels": list(LABELS[0])}
    pipelines = [
        {
            "task": task,
            "repo": repo,
            "image": str(root / "picture.png"),
            "options": options,
            "trust": trust,
        }
        for task, repo, options, trust in (
            ("zero-shot-image-classification", "me/tiny", labels, True),
            ("zero-shot-image-classification", "me/tiny", labels, False),
            ("zero-shot-image-classification", "me/mamba", labels, True),
            ("image-feature-extraction", "me/tiny-vision", {}, True),
            ("image-feature-extraction", "me/mamba-vision", {}, True),
            ("zero-shot-image-classification", "me/sigmoid", labels, False),
        )
    ]
    cards = {
        repo: hub.files(repo)["README.md"].decode()
        for repo in (*REPOS, "me/mamba", "me/mamba-vision", "me/sigmoid", "me/pair")
    }
    code = [block for card in cards.values() for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)]
    return {
        "root": root,
        "jobs": {"models": jobs, "pipelines": pipelines, "code": code},
        "expected": expected,
        "cards": cards,
    }


@pytest.fixture(scope="module")
def answers(hub, reader_jobs):
    """What a fresh process with an empty cache gets."""
    root = reader_jobs["root"]
    (root / "jobs.json").write_text(json.dumps(reader_jobs["jobs"]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(root / "empty_cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-I", "-c", READER, str(root / "jobs.json")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_with_nothing_but_the_id_loads_each_and_gets_the_same_numbers(reader_jobs, answers):
    processors = {"DCLIPTeacher": "DCLIPTeacherProcessor", **NATIVE}
    assert len(answers["models"]) == len(reader_jobs["expected"])
    for job, answer, (class_name, ids, expected) in zip(
        reader_jobs["jobs"]["models"], answers["models"], reader_jobs["expected"], strict=True
    ):
        assert answer == [class_name, processors.get(class_name, "DCLIPProcessor"), ids]
        outputs = load_file(job["outputs"])
        for name, value in expected.items():
            assert torch.equal(outputs[name], value), (job["repo"], job["auto_class"], name)


def test_both_pipelines_serve_the_repositories_and_give_what_the_card_stores(reader_jobs, answers):
    dual, stock, mamba, vision, mamba_vision, sigmoid = answers["pipelines"]
    for repo, found in (("me/tiny", dual), ("me/mamba", mamba)):
        widget = read_metadata(reader_jobs["cards"][repo])["widget"][0]
        assert {one["label"]: round(one["score"], 3) for one in found} == {
            one["label"]: one["score"] for one in widget["output"]
        }
    # Without our code pixels may be prepared with torchvision: a grey level or two apart.
    scores = [{one["label"]: one["score"] for one in found} for found in (dual, stock)]
    assert all(abs(scores[0][label] - scores[1][label]) < 0.02 for label in LABELS[0])
    assert len(vision[0]) == len(mamba_vision[0]) == 16
    stored = {
        one["label"]: one["score"] for one in read_metadata(reader_jobs["cards"]["me/sigmoid"])["widget"][0]["output"]
    }
    assert all(abs(one["score"] - stored[one["label"]]) < 0.02 for one in sigmoid) and sum(stored.values()) != 1


def read_metadata(card):
    return ModelCard(card).data.to_dict()


def test_the_code_in_the_cards_runs_as_it_stands(reader_jobs, answers):
    assert len(answers["code"]) == len(reader_jobs["jobs"]["code"]) >= 11
    for code, said in zip(reader_jobs["jobs"]["code"], answers["code"], strict=True):
        assert said.strip(), code


def test_a_token_that_may_not_write_ends_before_anything_is_pushed(hub, trained, monkeypatch):
    arguments = make_arguments(trained["student"], trained["results"], repo_id="me/refused")
    for token, message in (("hf_wrong", "token that http"), (READ_TOKEN, "only reads")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionError, match=message):
            publish(arguments, DELAYS)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PermissionError, match="Expected a repository of me or lab"):
        publish(make_arguments(trained["student"], trained["results"], repo_id="you/tiny"), DELAYS)
    with pytest.raises(ValueError, match="expected namespace/name"):
        publish(make_arguments(trained["student"], trained["results"], repo_id="tiny"), DELAYS)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(PermissionError, match="got none. Set HF_TOKEN"):
        publish(arguments, DELAYS)
    assert not any(repo_id.endswith("refused") for repo_id in hub.repos)


def test_a_hub_that_stays_broken_is_given_up_on_with_a_clear_error(hub):
    hub.fail("GET", "^/api/whoami-v2$", 503, times=3)
    with pytest.raises(ConnectionError, match="answered 503, 3 times"):
        check_access("me/tiny", HfApi(), DELAYS)
    assert check_access("me/tiny", HfApi(), DELAYS) == "me"
    with pytest.raises(ConnectionError, match="ConnectError.*, 3 times"):
        check_access("me/tiny", HfApi(endpoint="http://127.0.0.1:9"), DELAYS)


def test_files_of_others_stay_and_code_that_is_no_longer_shipped_goes(hub, pushed, trained):
    repo = hub.repos["me/tiny"]
    files = dict(hub.files("me/tiny")) | {"onnx/model.onnx": b"graph", "notes.md": b"mine", "modeling_old.py": b"old"}
    repo.commit(files)
    later = make_arguments(trained["later"], trained["results"], teacher=str(trained["teacher"]))
    done = {one.repo_id: one for one in publish(later, DELAYS)}["me/tiny"]
    assert done.deleted == ("modeling_old.py",) and not done.changed
    assert {"onnx/model.onnx", "notes.md"} <= set(hub.files("me/tiny"))


def test_a_commit_of_somebody_else_in_between_is_kept_and_compared_again(hub, tmp_path, monkeypatch):
    (tmp_path / "mine.md").write_text("mine")
    seen = []

    def meddle(folder, remote):
        found = find_differences(folder, remote)
        if not seen:  # after the first comparison
            hub.repos["me/shared"].commit(hub.files("me/shared") | {"theirs.md": b"theirs"})
        seen.append(found)
        return found

    monkeypatch.setattr(repositories, "find_differences", meddle)
    done = push_folder("me/shared", tmp_path, HfApi(), delays=DELAYS)
    assert len(seen) == 2 and done.changed == ("mine.md",)
    assert {"theirs.md", "mine.md"} < set(hub.files("me/shared")) and len(hub.commits("me/shared")) == 3


def test_a_name_with_brackets_is_a_name_and_not_a_pattern(hub, tmp_path):
    for name in ("a1.md", "a[1].md", "examples/1.png", "examples/[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    push_folder("me/brackets", tmp_path, HfApi(), delays=DELAYS)
    assert hub.files("me/brackets")["a[1].md"] == b"a[1].md"
    (tmp_path / "a[1].md").write_text("changed")
    (tmp_path / "examples/[1].png").unlink()
    done = push_folder("me/brackets", tmp_path, HfApi(), delays=DELAYS)
    assert done.changed == ("a[1].md",) and done.deleted == ("examples/[1].png",)
    files = hub.files("me/brackets")
    assert files["a[1].md"] == b"changed" and files["a1.md"] == b"a1.md"
    assert "examples/1.png" in files and "examples/[1].png" not in files
    assert len(hub.commits("me/brackets")) == 3  # the Hub's own first one, and ours


def test_a_large_file_is_compared_by_its_own_hash(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    same, other = (hashlib.sha256(content).hexdigest() for content in (b"weights", b"Weights"))
    for digest, expected in ((same, []), (other, ["model.safetensors"])):
        large = {"oid": digest, "size": 7, "pointerSize": 100}
        remote = {
            "model.safetensors": RepoFile(path="model.safetensors", size=7, oid="00", lfs=large),
            "config.json": RepoFile(path="config.json", size=2, oid=git_oid(b"{}")),
        }
        assert find_differences(tmp_path, remote) == (expected, [])


def test_what_publishing_wrote_before_and_no_more_goes_and_other_files_stay(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    stale = [
        "adapter/adapter_model.safetensors",
        "examples/old.png",
        "model-00001-of-00002.safetensors",
        "modeling_old.py",
    ]
    kept = ["NOTES.md", "adapter/notes.md", "onnx/model.onnx", "onnx/model.safetensors", "photo.png"]
    remote = {path: RepoFile(path=path, size=1, oid="00") for path in (*stale, *kept)}
    assert find_differences(tmp_path, remote) == (["config.json"], stale)


def test_a_private_publication_refuses_what_is_public_and_makes_private_repositories(hub, pushed, trained):
    with pytest.raises(ValueError, match="to be private, got a public one"):
        publish(make_arguments(trained["dmclip"], trained["results"], repo_id="me/mamba", private=True), DELAYS)
    publish(make_arguments(trained["dmclip"], trained["results"], repo_id="lab/hidden", private=True), DELAYS)
    assert hub.repos["lab/hidden"].private and hub.repos["lab/hidden-vision"].private
    assert not hub.repos["me/mamba"].private


def test_a_dry_run_shows_what_would_go_and_asks_the_hub_nothing(hub, trained, tmp_path, capsys):
    before = len(hub.requests)
    words = [
        "--model",
        trained["student"],
        "--results",
        trained["results"],
        "--repo_id",
        "me/tiny",
        "--license",
        "mit",
    ]
    main([*map(str, words), "--dry_run", "--staging", str(tmp_path / "staged")])
    said = capsys.readouterr().out
    assert "me/tiny-vision: would push" in said and "me/tiny-teacher" not in said
    assert len(hub.requests) == before
    stock = AutoModel.from_pretrained(tmp_path / "staged" / "tiny")
    ours = DCLIPModel.from_pretrained(trained["student"])
    assert type(stock) is CLIPModel and torch.equal(stock.visual_projection.weight, ours.visual_projection.weight)
    read = ", ".join(str(tmp_path / "staged" / name / "README.md") for name in ("tiny", "tiny-vision"))
    assert said.endswith(f"Nothing was pushed; read {read}\n")
    assert "names no base model" not in said


def test_a_dry_run_says_that_a_card_names_no_base_model(trained, tiny_clip_dir, tmp_path, capsys):
    student = shutil.copytree(trained["student"], tmp_path / "student")
    arguments = yaml.safe_load((student / "arguments.yaml").read_text())
    (student / "arguments.yaml").write_text(yaml.safe_dump({**arguments, "clip_model": str(tiny_clip_dir)}))
    words = ["--model", str(student), "--results", str(trained["results"]), "--repo_id", "me/tiny", "--license", "mit"]
    main([*words, "--dry_run", "--staging", str(tmp_path / "staged")])
    said = capsys.readouterr().out
    assert "names no base model, because training started from a folder" in said and "--base_model NAME" in said


def test_a_card_states_a_language_that_is_known_or_named_and_else_none(trained, tmp_path, capsys):
    words = ["--model", str(trained["student"]), "--results", str(trained["results"]), "--repo_id", "me/tiny"]
    words += ["--license", "mit", "--dry_run", "--staging", str(tmp_path / "staged")]
    known = yaml.safe_load((trained["student"] / "arguments.yaml").read_text())["train_datasets"]
    assert find_languages([], known) == (["en"] if str(known[0]).startswith("scenes") else [])
    main([*words, "--language", "de", "pt-BR"])
    assert "names no language" not in capsys.readouterr().out
    stated = ModelCard.load(tmp_path / "staged" / "tiny" / "README.md").data.language
    assert stated == ["de", "pt-BR"]
    with pytest.raises(SystemExit, match="language: expected codes such as en, de or zh-TW, .*got 'German'"):
        main([*words, "--language", "German"])


def test_a_dry_run_again_says_what_changed_and_keeps_what_was_edited_by_hand(trained, tmp_path, capsys):
    words = ["--model", str(trained["student"]), "--repo_id", "me/tiny", "--dry_run", "--staging", str(tmp_path / "s")]
    main([*words, "--license", "mit"])
    assert "Written for the first time" in capsys.readouterr().out
    main([*words, "--license", "mit"])  # results: those beside the model
    said = capsys.readouterr().out
    assert "Nothing changed since the last dry run." in said
    model = str(trained["student"])
    assert f"\n  python -m modeling_dclip.hub.publish --model {model} --repo_id me/tiny --license mit --st" in said
    main([*words, "--license", "apache-2.0", "--examples", "none"])
    said = capsys.readouterr().out
    assert "Changed since the last dry run:\n  tiny-vision: README.md\n  tiny: README.md\n" in said
    pictures = "examples/blue-star.png, examples/green-heart.png, examples/red-circle.png"
    assert f"Left out, which the last dry run wrote:\n  tiny: {pictures}\n" in said
    card = tmp_path / "s" / "tiny" / "README.md"
    assert "apache-2.0" in card.read_text() and "## Examples" not in card.read_text()
    card.write_text("edited")
    with pytest.raises(SystemExit, match=r"what the last run wrote, got changes in tiny/README.md, which a new run"):
        main([*words, "--license", "mit"])
    assert card.read_text() == "edited"


def test_a_dry_run_breaks_no_file_name_over_two_lines(tmp_path):
    names = [f"a-picture-of-{number}-red-bicycles-and-a-dog.jpg" for number in range(9)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    lines = describe_publication([StagedRepo("dual", "me/tiny", tmp_path)]).splitlines()
    assert [name.strip() for line in lines[1:] for name in line.rstrip(",").split(",")] == names
    assert len(lines) > 2 and max(map(len, lines)) <= 120


def test_dry_runs_of_several_models_lie_beside_each_other(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"dry_run": True, "examples": ["none"]}
    one = publish(make_arguments(trained["student"], trained["results"], repo_id="me/a1", **named))
    written = {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    other = publish(make_arguments(trained["later"], trained["results"], repo_id="me/c1", **named))
    assert [repo.folder for repo in one] == [Path("outputs/publish/me/a1", f"a1{end}") for end in ("-vision", "")]
    assert all(repo.changed is None for repo in (*one, *other))
    assert {path.parent.name for path in written} == {"a1", "a1-vision"} and all(
        path.read_bytes() == content for path, content in written.items()
    )
    with pytest.raises(FileExistsError, match="wrote, got 'outputs/publish/me/a1' with me/a1-vision, me/a"):
        publish(
            make_arguments(trained["later"], trained["results"], repo_id="me/c1", staging=str(one[0].folder.parent))
        )
    assert all(path.read_bytes() == content for path, content in written.items())


def test_all_problems_are_said_at_once_one_line_each(trained, tmp_path, capsys):
    words = ["--model", str(trained["student"]), "--results", str(tmp_path / "nowhere"), "--examples", "IMG_1.jpg"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--license", "free", "--dataset", " ", "--dry_run", "--staging", str(tmp_path / "staged")])
    first, *problems = str(ended.value).splitlines()
    assert first == "Failed: nothing was pushed. 5 problems:"
    starts = ["repo_id: expected", "examples: expected", "license: expected one of", "dataset: expected", "Expected a"]
    assert all(problem.startswith(f"- {start}") for problem, start in zip(problems, starts, strict=True))
    assert not (tmp_path / "staged").exists()


def test_pictures_and_datasets_are_published_as_they_are_named_and_without_exif(trained, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    for name in ("a-red-bicycle.jpg", "a_green_[car].png"):
        Image.effect_noise((640, 480), 80).convert("RGB").save(tmp_path / name, exif=exif)
    named = {"examples": [str(tmp_path / "a-red-bicycle.jpg"), str(tmp_path / "a_green_[car].png")]}
    named |= {"dataset": ["me/photos", "pictures of our garden"], "dry_run": True, "staging": str(tmp_path / "staged")}
    folder = publish(make_arguments(trained["student"], trained["results"], **named))[-1].folder
    card = (folder / "README.md").read_text()
    data = read_metadata(card)
    assert data["datasets"] == ["me/photos"]
    assert "Data: [me/photos](https://huggingface.co/datasets/me/photos), pictures of our garden, read as" in card
    assert [one["candidate_labels"] for one in data["widget"]] == [
        "a red bicycle, a green [car]", "a green [car], a red bicycle"
    ]  # fmt: skip
    shown = Image.open(folder / "examples" / "a-red-bicycle.jpg")
    assert shown.size == (384, 288) and not shown.getexif()
    assert "The publisher chose the pictures" in card and "![a green  car ](examples/a-green-car.jpg)" in card


def test_an_adapter_goes_out_beside_the_weights_it_is_merged_into(trained, tmp_path):
    shutil.copytree(trained["student"], tmp_path / "student")
    adapter = tmp_path / "student" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": HOME, "r": 2}))
    weights = {"base_model.model.vision_model.q_proj.lora_A.weight": torch.ones(2, 4)}
    save_file(weights, adapter / "adapter_model.safetensors")
    dry = {"dry_run": True, "staging": str(tmp_path / "staged")}
    folder = publish(make_arguments(tmp_path / "student", trained["results"], **dry))[-1].folder
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": "openai/clip-vit-base-patch16", "r": 2}
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert "The folder `adapter` holds the change that training made" in (folder / "README.md").read_text()


def test_a_base_model_that_the_hub_does_not_know_stops_everything(hub, trained):
    arguments = make_arguments(trained["student"], trained["results"], repo_id="me/based", base_model="recipes/anchor")
    with pytest.raises(ValueError, match="base_model: expected a model of the Hub, got 'recipes/anchor'"):
        publish(arguments, DELAYS)
    assert "me/based" not in hub.repos


def test_the_card_of_a_student_with_rotary_positions_says_that_it_needs_our_code(trained, tiny_clip_dir, tmp_path):
    config = DCLIPConfig.from_pretrained(tiny_clip_dir)
    config.vision_config.position_embedding_type = "rope"
    make_student(tmp_path / "rotary", tiny_clip_dir)
    DCLIPModel.from_pretrained(tiny_clip_dir, config=config).save_pretrained(tmp_path / "rotary")
    (tmp_path / "results").mkdir()
    results = write_records(tmp_path / "results", tmp_path / "rotary")
    dry = {"dry_run": True, "staging": str(tmp_path / "staged")}
    staged = publish(make_arguments(tmp_path / "rotary", results, **dry))
    assert [repo.kind for repo in staged] == ["vision", "dual"]
    card = (staged[-1].folder / "README.md").read_text()
    assert "stock `CLIPModel`" not in card and 'AutoModel.from_pretrained("me/tiny", trust_remote_code=True)' in card


@pytest.mark.parametrize("missing", ["README.md", "tokenizer.json", "modeling_dclip.py", "examples/red-circle.png"])
def test_a_repository_that_lacks_a_file_is_not_pushed(hub, pushed, tmp_path, missing):
    for path, content in hub.files("me/tiny").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    check_folder(StagedRepo("dual", "me/tiny", tmp_path))
    (tmp_path / missing).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(missing)):
        check_folder(StagedRepo("dual", "me/tiny", tmp_path))


def test_a_card_that_the_hub_refuses_stops_everything(hub, trained, monkeypatch, tmp_path):
    cards = tmp_path / "cards"
    cards.mkdir()
    for template in (Path(__file__).parents[3] / "hub_cards").glob("*.jinja"):
        (cards / template.name).write_bytes(template.read_bytes())
    hub.fail("POST", "^/api/validate-yaml$", 400)
    created = len(hub.repos)
    with pytest.raises(ValueError, match="metadata that the Hub accepts"):
        publish(make_arguments(trained["dmclip"], trained["results"], repo_id="me/faulty", cards=str(cards)), DELAYS)
    (cards / "dmclip-vision.md.jinja").unlink()
    with pytest.raises(FileNotFoundError, match="dmclip-vision.md.jinja"):
        publish(make_arguments(trained["dmclip"], trained["results"], repo_id="me/faulty", cards=str(cards)), DELAYS)
    assert len(hub.repos) == created


def spoiled(trained, tmp_path, change):
    """Arguments of a dry run over a copy of what was trained, after a change to it."""
    for name in ("student", "results", "teacher"):
        shutil.copytree(trained[name], tmp_path / name)
    change(tmp_path)
    folders = {"teacher": str(tmp_path / "teacher"), "staging": str(tmp_path / "staged")}
    return make_arguments(tmp_path / "student", tmp_path / "results", **folders, dry_run=True)


def edit_records(folder, **fields):
    """As by hand, in every record."""
    path = folder / "results" / "records.json"
    path.write_text(json.dumps([{**record, **fields} for record in json.loads(path.read_text())]))


def drop(name):
    return lambda folder: (folder / name).unlink()


def replace_bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def add_adapter(rank, content=None):
    """An adapter whose config says rank 2, with weights of a rank, or with bytes in their place, or without any."""

    def change(folder):
        adapter = folder / "student" / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"r": 2}')
        if rank:
            save_file({"q_proj.lora_A.weight": torch.ones(rank, 4)}, adapter / "adapter_model.safetensors")
        if content:
            (adapter / "adapter_model.safetensors").write_bytes(content)

    return change


def leave_adapter_alone(folder):
    add_adapter(2)(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / "student" / name).unlink()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (drop("student/tokenizer.json"), ValueError, "a tokenizer that tells letters apart in .*student"),
        (drop("teacher/tokenizer.json"), ValueError, "a tokenizer that tells letters apart in .*teacher"),
        (replace_bytes("student/model.safetensors", b"x" * 99), ValueError,
         "whole weights in .*student/model.safetensors', got a damaged file"),
        (replace_bytes("student/arguments.yaml", b"student: [a"), ValueError, "YAML in .*student/arguments.yaml"),
        (replace_bytes("student/arguments.yaml", b"hello"), ValueError, "fields in .*arguments.yaml', got 'hello'"),
        (replace_bytes("results/records.json", b"[\xff\xfe"), ValueError, "UTF-8 text in .*records.json"),
        (lambda folder: edit_records(folder, hardware={}), ValueError,
         "gpus, .* in 'hardware' of record 0 of .*records"),
        (lambda folder: edit_records(folder, versions={}), ValueError,
         "torch, transformers in 'versions' of record 0"),
        (lambda folder: edit_records(folder, intervals={"top1": [1]}), ValueError,
         r"'intervals' / 'top1' of record 0 .*got \[1\]"),
        (lambda folder: edit_records(folder, metrics={"top1": 1.5}), ValueError,
         r"share from 0 to 1 in 'metrics' / 'top1'.*got 1.5"),
        (lambda folder: shutil.rmtree(folder / "teacher"), FileNotFoundError,
         "teacher: expected a folder that train.py wrote"),
        (lambda folder: shutil.rmtree(folder / "student"), FileNotFoundError,
         "model: expected a folder that train.py wrote"),
        (add_adapter(0), FileNotFoundError, "Expected adapter_model.safetensors beside adapter_config.json"),
        (add_adapter(3), ValueError, r"an adapter of rank 2, as adapter_config.json says, in .*got \[3\]"),
        (add_adapter(0, b"x" * 99), ValueError, "whole weights in .*adapter', got a damaged file"),
        (leave_adapter_alone, ValueError, "model: expected whole weights in .*got an adapter alone"),
    ],
)  # fmt: skip
def test_what_is_missing_or_spoiled_is_named_and_nothing_is_written(trained, tmp_path, change, kind, message):
    with pytest.raises(kind, match=message):
        publish(spoiled(trained, tmp_path, change))
    assert not (tmp_path / "staged").exists()


def test_what_a_model_was_trained_on_stays_home(trained, tmp_path):
    arguments = spoiled(trained, tmp_path, lambda folder: write_trained_images(folder / "student", ["ab" * 32]))
    assert (tmp_path / "student" / TRAINED_IMAGES).is_file()
    staged = stage(gather(arguments), tmp_path / "staged")
    assert len(staged) == 3 and not list((tmp_path / "staged").rglob("*.npy"))


def test_staging_writes_from_the_facts_alone(trained, tmp_path):
    facts = gather(spoiled(trained, tmp_path, lambda folder: None))
    for name in ("student", "results", "teacher"):
        shutil.rmtree(tmp_path / name)
    staged = stage(facts, tmp_path / "staged")
    assert [repo.kind for repo in staged] == ["vision", "teacher", "dual"]
    assert all((repo.folder / "README.md").is_file() for repo in staged)


def test_a_publication_that_fails_half_way_leaves_no_folder(trained, tmp_path):
    arguments = spoiled(trained, tmp_path, lambda folder: shutil.copytree(CARD_TEMPLATES, folder / "cards"))
    (tmp_path / "cards" / "dclip-vision.md.jinja").unlink()  # asked for after the dual encoder is written
    arguments.cards = str(tmp_path / "cards")
    with pytest.raises(FileNotFoundError, match="card's template dclip-vision.md.jinja"):
        publish(arguments)
    assert not [path for path in tmp_path.iterdir() if "staged" in path.name]


def test_the_results_of_a_run_are_those_of_training_and_those_of_the_documented_evaluation(tmp_path, monkeypatch):
    (tmp_path / "mine" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither 'results' nor 'results.json' beside it"):
        find_results("mine/student")
    (tmp_path / "mine" / "results.json").touch()
    assert find_results("mine/student") == ["mine/results.json"]
    (tmp_path / "mine" / "results").mkdir()
    assert find_results("mine/student") == ["mine/results", "mine/results.json"]
