"""What users type, as literal lists: public names, flags of commands, forms of specs, fields of recipes."""

import contextlib
import io
import re
import runpy
import sys
import warnings
from dataclasses import MISSING, fields
from inspect import get_annotations
from pathlib import Path

import pytest

import modeling_dclip
from modeling_dclip.configuration_dclip import PRESETS
from modeling_dclip.configuration_dmclip import DMCLIP_PRESETS
from modeling_dclip.data.captions import CAPTION_SOURCES, load_captions
from modeling_dclip.data.labels import LABEL_SOURCES
from modeling_dclip.data.questions import QUESTION_SOURCES
from modeling_dclip.data.regions.detectors import DETECTORS
from modeling_dclip.data.specs import Source, parse_spec
from modeling_dclip.distillation.arguments import SECTIONS, STAGES, TRAINING_SECTIONS, RunArguments
from modeling_dclip.distillation.recipes import parse_recipe
from modeling_dclip.evaluation.benchmarks.kinds import KINDS
from modeling_dclip.evaluation.command_line import parse_arguments
from modeling_dclip.evaluation.records import FIELDS, OPTIONAL_FIELDS
from modeling_dclip.evaluation.results import TABLES
from modeling_dclip.hub.index import SearchIndex

ROOT = Path(__file__).parent.parent
# What stands before the description of an option or of a positional argument.
OPTION = re.compile(r"^ {1,8}(-[^\n]*?)(?: {2,}|$)", re.MULTILINE)
POSITIONAL = re.compile(r"^ {1,8}([^-\s][^\s]*)(?: {2,}|$)", re.MULTILINE)
COMMANDS = {
    "train.py": [
        "--recipe",
        "--output_dir",
        "--stages",
        "--clip_model",
        "--teacher_model",
        "--train_datasets",
        "--uncaptioned_datasets",
        "--train_fraction",
        "--test_fraction",
        "--on_bad_image",
        "--exclude_karpathy",
        "--cache_dir",
        "--seed",
        "--seeds",
        "--arms",
        "--alphas",
        "--baseline",
        "--overwrite",
        "--evaluate",
        "--push_to_hub",
        "--push_license",
        "--push_arm",
        "--push_private",
        "--anchor.learning_rate",
        "--anchor.lr_scheduler_type",
        "--anchor.warmup_steps",
        "--anchor.weight_decay",
        "--anchor.logging_steps",
        "--anchor.logging_nan_inf_filter",
        "--anchor.on_nonfinite",
        "--anchor.report_to",
        "--anchor.save_strategy",
        "--anchor.save_total_limit",
        "--anchor.per_device_eval_batch_size",
        "--anchor.dataloader_drop_last",
        "--anchor.remove_unused_columns",
        "--anchor.ddp_find_unused_parameters",
        "--anchor.image_cache_mib",
        "--anchor.train_datasets",
        "--anchor.vision_config",
        "--anchor.text_config",
        "--anchor.freeze_text",
        "--anchor.freeze_vision",
        "--anchor.projection_dim",
        "--anchor.text_model",
        "--anchor.vision_model",
        "--anchor.tokenizer",
        "--anchor.vocab_size",
        "--anchor.max_length",
        "--anchor.image_to_text_weight",
        "--anchor.save_dtype",
        "--regions.detector",
        "--regions.ignore_boxes",
        "--regions.max_regions",
        "--regions.batch_size",
        "--regions.on_bad_image",
        "--regions.trust_checkpoint",
        "--teacher.per_device_train_batch_size",
        "--teacher.num_train_epochs",
        "--teacher.learning_rate",
        "--teacher.lr_scheduler_type",
        "--teacher.logging_steps",
        "--teacher.logging_nan_inf_filter",
        "--teacher.on_nonfinite",
        "--teacher.report_to",
        "--teacher.save_strategy",
        "--teacher.save_total_limit",
        "--teacher.per_device_eval_batch_size",
        "--teacher.dataloader_drop_last",
        "--teacher.remove_unused_columns",
        "--teacher.ddp_find_unused_parameters",
        "--teacher.image_cache_mib",
        "--teacher.cross_attention",
        "--teacher.num_attention_heads",
        "--teacher.attention_temperature",
        "--teacher.text_share",
        "--teacher.region_weighting",
        "--teacher.aggregation",
        "--teacher.num_clusters",
        "--teacher.num_cluster_steps",
        "--teacher.num_region_layers",
        "--teacher.region_feedforward_ratio",
        "--teacher.loss_temperature",
        "--teacher.save_dtype",
        "--targets.batch_size",
        "--targets.text_batch_size",
        "--targets.chunk_rows",
        "--targets.num_workers",
        "--student.per_device_train_batch_size",
        "--student.num_train_epochs",
        "--student.learning_rate",
        "--student.lr_scheduler_type",
        "--student.weight_decay",
        "--student.max_grad_norm",
        "--student.logging_steps",
        "--student.logging_nan_inf_filter",
        "--student.on_nonfinite",
        "--student.report_to",
        "--student.save_strategy",
        "--student.save_total_limit",
        "--student.per_device_eval_batch_size",
        "--student.dataloader_drop_last",
        "--student.remove_unused_columns",
        "--student.ddp_find_unused_parameters",
        "--student.image_cache_mib",
        "--student.lora_rank",
        "--student.lora_alpha",
        "--student.lora_dropout",
        "--student.use_dora",
        "--student.lora_target_modules",
        "--student.merge_adapter",
        "--student.cosine_distillation_loss_weight",
        "--student.contrastive_loss_weight",
        "--student.contrastive_loss",
        "--student.cosine_preservation_loss_weight",
        "--student.similarity_distillation_loss_weight",
        "--student.temperature",
        "--student.similarity_temperature",
        "--student.similarity_teacher_temperature",
        "--student.image_to_text_weight",
        "--student.negatives",
        "--student.batch_order",
        "--student.hard_negatives",
        "--student.bank_limit",
        "--student.max_negative_similarity",
        "--student.micro_batch_size",
        "--student.l2_sp_loss_weight",
        "--student.layer_decay",
        "--student.ema_decay",
        "--dmclip.micro_batch_size",
        "--student.freeze",
        "--student.position_embedding_type",
        "--student.lora_text",
        "--student.wise_ft_alpha",
        "--student.probe",
        "--student.probe_steps",
        "--student.keep_retention",
        "--student.wise_ft_rule",
        "--student.min_crop_area",
        "--student.save_dtype",
        "--student.load_best_model_at_end",
        "--reinforce.folder",
        "--reinforce.teachers",
        "--reinforce.augmentations",
        "--reinforce.image_size",
        "--reinforce.min_crop_area",
        "--reinforce.num_operations",
        "--reinforce.magnitude",
        "--reinforce.synthetic_captions",
        "--reinforce.captioner",
        "--reinforce.captions_per_image",
        "--reinforce.samples_per_shard",
        "--reinforce.dtype",
        "--reinforce.batch_size",
        "--reinforce.num_workers",
        "--reinforce.seed",
        "--dmclip.per_device_train_batch_size",
        "--dmclip.learning_rate",
        "--dmclip.lr_scheduler_type",
        "--dmclip.warmup_steps",
        "--dmclip.weight_decay",
        "--dmclip.adam_beta2",
        "--dmclip.max_grad_norm",
        "--dmclip.logging_steps",
        "--dmclip.logging_nan_inf_filter",
        "--dmclip.on_nonfinite",
        "--dmclip.report_to",
        "--dmclip.save_strategy",
        "--dmclip.save_steps",
        "--dmclip.save_total_limit",
        "--dmclip.per_device_eval_batch_size",
        "--dmclip.ignore_data_skip",
        "--dmclip.dataloader_drop_last",
        "--dmclip.remove_unused_columns",
        "--dmclip.ddp_find_unused_parameters",
        "--dmclip.image_cache_mib",
        "--dmclip.train_shards",
        "--dmclip.train_samples",
        "--dmclip.teacher_widths",
        "--dmclip.model",
        "--dmclip.preset",
        "--dmclip.vision_config",
        "--dmclip.text_config",
        "--dmclip.projection_dim",
        "--dmclip.image_size",
        "--dmclip.tokenizer",
        "--dmclip.vision_model",
        "--dmclip.text_model",
        "--dmclip.freeze_text",
        "--dmclip.contrastive_loss_weight",
        "--dmclip.distillation_loss_weight",
        "--dmclip.synthetic_captions",
        "--dmclip.teacher_logit_scale",
        "--dmclip.image_to_text_weight",
        "--dmclip.synthetic_keys",
        "--dmclip.samples_per_epoch",
        "--dmclip.shuffle_buffer",
        "--dmclip.on_bad_sample",
        "--dmclip.save_dtype",
    ],
    "eval.py": [
        "--model",
        "--benchmark",
        "--anchor",
        "--alphas",
        "--save_alpha",
        "--save_to",
        "--plot",
        "--gallery",
        "--maps",
        "--output",
        "--overwrite",
        "--label",
        "--batch_size",
        "--num_workers",
        "--on_bad_image",
        "--device",
        "--seed",
        "--class_names",
        "--templates",
        "--classifier_cache",
        "--index",
        "--hessian",
        "--trust_remote_code",
    ],
    "eval.py report": ["results", "--output"],
    "eval.py compare": ["A.json", "B.json", "--models"],
    "eval.py equal_retention": ["RESULTS.json", "--baseline", "--retention", "--zero_shot", "--output"],
    "modeling_dclip.data.regions": [
        "--dataset",
        "--output",
        "--detector",
        "--batch_size",
        "--max_regions",
        "--cache_dir",
        "--on_bad_image",
        "--seed",
        "--trust_checkpoint",
    ],
    "modeling_dclip.data.reinforced": [
        "--dataset",
        "--teachers",
        "--output",
        "--augmentations",
        "--synthetic_captions",
        "--captioner",
        "--captions_per_image",
        "--image_size",
        "--min_crop_area",
        "--num_operations",
        "--magnitude",
        "--samples_per_shard",
        "--dtype",
        "--batch_size",
        "--num_workers",
        "--seed",
    ],
    "modeling_dclip.evaluation.leakage": [
        "--teacher",
        "--dataset",
        "--output",
        "--draws",
        "--seed",
        "--max_regions",
        "--batch_size",
        "--num_workers",
        "--device",
        "--cache_dir",
    ],
    "modeling_dclip.evaluation.results": ["readme", "--check"],
    "modeling_dclip.hub.publish": [
        "--repo_id",
        "--license",
        "--model",
        "--results",
        "--teacher",
        "--license_name",
        "--license_link",
        "--dataset",
        "--language",
        "--examples",
        "--base_model",
        "--hardware",
        "--emissions_grams",
        "--private",
        "--dry_run",
        "--staging",
        "--cards",
    ],
    "modeling_dclip.hub.export": ["{onnx,torch_export,open_clip,sentence_transformers}"],
    "modeling_dclip.hub.export onnx": ["--model", "--output", "--towers", "--image_size", "--dtypes", "--winograd"],
    "modeling_dclip.hub.export torch_export": ["--model", "--output", "--towers", "--image_size"],
    "modeling_dclip.hub.export open_clip": ["--model", "--output"],
    "modeling_dclip.hub.export sentence_transformers": ["--model", "--output"],
    "modeling_dclip.hub.convert": ["{mambavision,mobileclip,open_clip}"],
    "modeling_dclip.hub.convert mambavision": ["--checkpoint", "--output", "--config", "--projection_dim"],
    "modeling_dclip.hub.convert mobileclip": ["--checkpoint", "--output"],
    "modeling_dclip.hub.convert open_clip": ["SPEC", "OUT"],
    "modeling_dclip.hub.index": [
        "--model",
        "--images",
        "--output",
        "--index",
        "--queries",
        "--on_bad_image",
        "--batch_size",
        "--chunk_rows",
        "--num_workers",
        "--overwrite",
        "--trust_remote_code",
    ],
}


def ask_for_help(command):
    """What a command prints for `--help`, run as `python FILE` or `python -m MODULE` runs it, and its exit status."""
    name, *words = command.split()
    printed, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        # Other tests have imported the module.
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", [name, *words, "--help"])
        try:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code or 0
    return status, printed.getvalue()


def accepted(text):
    """Positional arguments, then options, as a command's help names them, without the spellings with `-` for `_`."""
    places = re.search(r"^positional arguments:\n((?: .*\n|\n)*)", text, re.MULTILINE)
    options = [flag for line in OPTION.findall(text) for flag in re.findall(r"--[A-Za-z][\w.-]*", line)]
    options = [
        flag for flag in options if not ("-" in flag[2:] and flag.replace("-", "_").replace("__", "--", 1) in options)
    ]
    return [
        *POSITIONAL.findall(places[1] if places else ""),
        *(flag for flag in dict.fromkeys(options) if flag != "--help"),
    ]


def test_public_names():
    assert modeling_dclip.__all__ == [
        "DMCLIP_PRESETS",
        "PRESETS",
        "DCLIPConfig",
        "DCLIPModel",
        "DCLIPProcessor",
        "DCLIPTeacher",
        "DCLIPTeacherConfig",
        "DCLIPTeacherOutput",
        "DCLIPTeacherProcessor",
        "DCLIPVisionConfig",
        "DCLIPVisionModel",
        "DCLIPVisionModelOutput",
        "DMCLIPConfig",
        "DMCLIPModel",
        "DMCLIPTextConfig",
        "DMCLIPTextModel",
        "DMCLIPTextModelOutput",
        "DMCLIPVisionConfig",
        "DMCLIPVisionModel",
        "DMCLIPVisionModelOutput",
    ]
    assert modeling_dclip.__version__ == "0.1.0.dev0"
    assert all(hasattr(modeling_dclip, name) for name in modeling_dclip.__all__)
    assert [sorted(PRESETS), sorted(DMCLIP_PRESETS)] == [
        ["dclip-vitb16", "dclip-vitb32", "dclip-vitl14"],
        ["B", "L", "S", "T", "T2"],
    ]
    assert [name for name in ("load", "search", "set_effort", "encoder") if not hasattr(SearchIndex, name)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_a_command(command):
    status, text = ask_for_help(command)
    assert status == 0
    assert sorted(accepted(text)) == sorted(COMMANDS[command])


def test_defaults_of_an_evaluation():
    found = vars(parse_arguments(["--model", "m", "--benchmark", "efficiency", "--device", "cpu"], ""))
    assert found == {
        "model": ["m"],
        "benchmark": ["efficiency"],
        "anchor": None,
        "alphas": None,
        "save_alpha": None,
        "save_to": None,
        "plot": None,
        "gallery": None,
        "maps": None,
        "output": "results.json",
        "overwrite": False,
        "label": None,
        "batch_size": 64,
        "num_workers": 0,
        "device": "cpu",
        "seed": 0,
        "class_names": None,
        "templates": None,
        "classifier_cache": None,
        "index": None,
        "hessian": [],
        "trust_remote_code": False,
        "on_bad_image": "raise",
    }


@pytest.mark.parametrize(
    ("sources", "forms"),
    [
        pytest.param(
            CAPTION_SOURCES,
            {
                "scenes:SPLIT": "n, seed, captions, captions_per_image, image_size, singles, max_siblings, negatives",
                "coco:ANNOTATIONS.json:IMAGE_FOLDER": "missing",
                "karpathy:DATASET.json:IMAGE_FOLDER:SPLIT": "missing",
                "flickr30k:results.csv:IMAGE_FOLDER": "missing",
                "conceptual:FILE.tsv:IMAGE_FOLDER": "missing",
                "csv:TABLE.csv:IMAGE_FOLDER": "image, captions, negatives, sep, source, missing",
                "parquet:GLOB": "image, captions, negatives, image_id, source, captions_per_image, missing",
                "hub:NAME:SPLIT": "config, image, captions, negatives, image_id, source, captions_per_image, missing",
                "disk:FOLDER": "none",
                "wds:DIR_OR_URL[:SPLIT]": "cache_dir",
                "held_out:RUN_FOLDER": "missing",
                "images:FOLDER": "source",
            },
            id="captions",
        ),
        pytest.param(
            QUESTION_SOURCES,
            {
                "scenes[:SPLIT]": "n, seed, image_size",
                "sugarcrepe:JSON_OR_FOLDER:IMAGE_FOLDER": "missing",
                "winoground:EXAMPLES.jsonl:IMAGE_FOLDER": "missing",
                "aro:FILE.json:IMAGE_FOLDER": "min_items, missing",
                "json:FILE:IMAGE_FOLDER": "missing",
                "parquet:GLOB": "image, caption, negatives, category",
                "hub:NAME:SPLIT": "config, image, caption, negatives, category",
            },
            id="questions",
        ),
        pytest.param(
            LABEL_SOURCES,
            {
                "scenes[:SPLIT]": "n, seed, image_size",
                "parquet:GLOB": "image, label, names, templates",
                "imagefolder:DIR[:SPLIT]": "names, templates",
                "hub:ID[:SPLIT]": "config, revision, image, label, names, templates",
                "wds:DIR_OR_URL[:SPLIT]": "names, templates, cache_dir",
            },
            id="labels",
        ),
        pytest.param(
            DETECTORS,
            {
                "ultralytics[:WEIGHTS]": "conf, iou, max_det, imgsz, device",
                "transformers:MODEL": "threshold, labels, device",
                "annotations[:INSTANCES.json]": "on_bad_box, keep_crowd",
                "grid:ROWSxCOLUMNS": "none",
            },
            id="detectors",
        ),
    ],
)
def test_forms_and_options_of_specs(sources, forms):
    assert {source.form: known_options(kind, sources) for kind, source in sources.items()} == forms


def known_options(kind, sources):
    """What the message about an unknown option lists."""
    spec = kind + ":x" * sources[kind].form.count(":") + ",no_such=1"
    try:
        parse_spec(spec, sources)
        load_captions(spec.replace(":x", ":train"))  # drawn scenes take their options on
    except ValueError as error:
        return str(error).partition("Known options: ")[2].removesuffix(".")


def test_kinds_of_benchmarks():
    assert {name: (kind.default_spec, *kind.forms.split(", ")) for name, kind in KINDS.items()} == {
        "retrieval": (
            "scenes:test",
            "scenes:SPLIT",
            "coco:ANNOTATIONS.json:IMAGE_FOLDER",
            "karpathy:DATASET.json:IMAGE_FOLDER:SPLIT",
            "flickr30k:results.csv:IMAGE_FOLDER",
            "conceptual:FILE.tsv:IMAGE_FOLDER",
            "csv:TABLE.csv:IMAGE_FOLDER",
            "parquet:GLOB",
            "hub:NAME:SPLIT",
            "disk:FOLDER",
            "wds:DIR_OR_URL[:SPLIT]",
            "held_out:RUN_FOLDER",
        ),
        "diagnostics": (
            "scenes:test",
            "scenes:SPLIT",
            "coco:ANNOTATIONS.json:IMAGE_FOLDER",
            "karpathy:DATASET.json:IMAGE_FOLDER:SPLIT",
            "flickr30k:results.csv:IMAGE_FOLDER",
            "conceptual:FILE.tsv:IMAGE_FOLDER",
            "csv:TABLE.csv:IMAGE_FOLDER",
            "parquet:GLOB",
            "hub:NAME:SPLIT",
            "disk:FOLDER",
            "wds:DIR_OR_URL[:SPLIT]",
            "held_out:RUN_FOLDER",
        ),
        "hessian": (
            "scenes:test",
            "scenes:SPLIT",
            "coco:ANNOTATIONS.json:IMAGE_FOLDER",
            "karpathy:DATASET.json:IMAGE_FOLDER:SPLIT",
            "flickr30k:results.csv:IMAGE_FOLDER",
            "conceptual:FILE.tsv:IMAGE_FOLDER",
            "csv:TABLE.csv:IMAGE_FOLDER",
            "parquet:GLOB",
            "hub:NAME:SPLIT",
            "disk:FOLDER",
            "wds:DIR_OR_URL[:SPLIT]",
            "held_out:RUN_FOLDER",
        ),
        "zero_shot": (
            "scenes:test",
            "scenes[:SPLIT]",
            "parquet:GLOB",
            "imagefolder:DIR[:SPLIT]",
            "hub:ID[:SPLIT]",
            "wds:DIR_OR_URL[:SPLIT]",
            "suite:ROOT[:SPLIT]",
        ),
        "fine_grained": (
            "scenes:test",
            "scenes[:SPLIT]",
            "sugarcrepe:JSON_OR_FOLDER:IMAGE_FOLDER",
            "winoground:EXAMPLES.jsonl:IMAGE_FOLDER",
            "aro:FILE.json:IMAGE_FOLDER",
            "json:FILE:IMAGE_FOLDER",
            "parquet:GLOB",
            "hub:NAME:SPLIT",
        ),
        "efficiency": ("", ""),
    }


def test_tables_and_fields_of_results():
    assert {name: sorted(options) for name, (_, options) in TABLES.items()} == {
        "results": ["arms", "best", "metrics"],
        "demo": [],
        "equal_retention": [],
        "leakage": ["metric"],
        "encoders": ["cells", "over"],
        "families": [],
        "fuzz": [],
        "index": [],
        "kills": [],
        "negatives": [],
        "onnx_towers": [],
        "pictures": [],
        "retrieval": [],
        "rotary_positions": [],
        "scan": [],
        "student_step": [],
        "twins": [],
        "verdict": ["model"],
    }
    assert [*FIELDS, "", *OPTIONAL_FIELDS] == [
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
        "",
        "label",
        "condition",
        "n_captions",
        "chance",
        "comparison",
        "draws",
        "intervals",
        "settings",
        "spread",
        "notes",
        "n_trained_on",
    ]


def read_rows(
    folder, *split, limit: int | None = None, rate: float = 1.0, mode: str | None = None, flag: bool = False
):
    """A source of two fields, the second optional, and of options of every type."""


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("rows:a", (["a"], {}, None)),
        ("rows:a:b@12", (["a", "b"], {}, 12)),
        ("rows:dir/a.b,c:test", (["dir/a.b,c", "test"], {}, None)),
        ("rows:a,limit=3,rate=2,mode=7,flag=True@5", (["a"], {"limit": 3, "rate": 2, "mode": "7", "flag": True}, 5)),
        ("rows:a,mode=x:y=z", (["a"], {"mode": "x:y=z"}, None)),
        ("rows:a,mode=", (["a"], {"mode": ""}, None)),
        ("rows:a b", (["a b"], {}, None)),
        ("rows:'a':\"b\"", (["'a'", '"b"'], {}, None)),
        ("rows:a@2@3", (["a@2"], {}, 3)),
        ("rows:a@x", (["a@x"], {}, None)),
    ],
)
def test_grammar_of_specs(spec, parts):
    sources = {"rows": Source("rows:FOLDER[:SPLIT]", read_rows), "none": Source("none", dict)}
    parsed = parse_spec(spec, sources, counted=True)
    assert (parsed.fields, parsed.options, parsed.count) == parts


@pytest.mark.parametrize(
    "spec",
    [
        "rows",
        "rows:",
        "rows:a:b:c",
        "other:a",
        "rows:a,limit=x",
        "rows:a,limit=true",
        "rows:a,no=1",
        "rows:a@0",
        "rows:a,limit=3@2,mode=b",
    ],
)
def test_wrong_specs_are_refused(spec):
    with pytest.raises(ValueError, match=re.escape(spec)):
        parse_spec(spec, {"rows": Source("rows:FOLDER[:SPLIT]", read_rows)}, counted=True)


def test_a_count_is_part_of_a_field_where_none_is_allowed():
    parsed = parse_spec("rows:a@3", {"rows": Source("rows:FOLDER", read_rows)})
    assert (parsed.fields, parsed.options, parsed.count) == (["a@3"], {}, None)


def own_fields(kind):
    """Fields that this package declares, not those of `transformers.TrainingArguments` alone, with their defaults."""
    declared = {
        name for base in kind.__mro__ if base.__module__.startswith("modeling_dclip") for name in get_annotations(base)
    }
    found = {}
    for one in fields(kind):
        if one.name in declared and one.init:
            default = one.default if one.default_factory is MISSING else one.default_factory()
            found[one.name] = f"{type(default).__name__} {default!r}"
    return found


def test_fields_of_recipes():
    found = own_fields(RunArguments)
    for section, kind in SECTIONS.items():
        found |= {f"{section}.{name}": default for name, default in own_fields(kind).items()}
    assert dict(sorted(found.items())) == {
        "alphas": "list []",
        "anchor.dataloader_drop_last": "bool True",
        "anchor.ddp_find_unused_parameters": "bool False",
        "anchor.image_cache_mib": "int 2048",
        "anchor.image_to_text_weight": "float 0.5",
        "anchor.learning_rate": "float 0.001",
        "anchor.logging_nan_inf_filter": "bool False",
        "anchor.on_nonfinite": "str 'stop'",
        "anchor.logging_steps": "int 50",
        "anchor.lr_scheduler_type": "str 'cosine'",
        "anchor.max_length": "int 48",
        "anchor.freeze_text": "bool True",
        "anchor.freeze_vision": "bool True",
        "anchor.projection_dim": "int 128",
        "anchor.text_model": "NoneType None",
        "anchor.vision_model": "NoneType None",
        "anchor.remove_unused_columns": "bool False",
        "anchor.report_to": "list ['auto']",
        "anchor.save_dtype": "str 'float32'",
        "anchor.save_strategy": "str 'epoch'",
        "anchor.save_total_limit": "int 1",
        "anchor.per_device_eval_batch_size": "NoneType None",
        "anchor.text_config": "str '{}'",
        "anchor.tokenizer": "str 'scenes'",
        "anchor.train_datasets": "list []",
        "anchor.vision_config": "str '{}'",
        "anchor.vocab_size": "int 512",
        "anchor.warmup_steps": "float 0.1",
        "anchor.weight_decay": "float 0.1",
        "arms": "str '{}'",
        "baseline": "NoneType None",
        "cache_dir": "NoneType None",
        "clip_model": "NoneType None",
        "dmclip.adam_beta2": "float 0.95",
        "dmclip.contrastive_loss_weight": "float 0.25",
        "dmclip.dataloader_drop_last": "bool True",
        "dmclip.ddp_find_unused_parameters": "bool False",
        "dmclip.distillation_loss_weight": "float 0.75",
        "dmclip.freeze_text": "bool False",
        "dmclip.ignore_data_skip": "bool True",
        "dmclip.image_cache_mib": "int 2048",
        "dmclip.image_size": "NoneType None",
        "dmclip.image_to_text_weight": "float 0.5",
        "dmclip.learning_rate": "float 0.0001",
        "dmclip.logging_nan_inf_filter": "bool False",
        "dmclip.on_nonfinite": "str 'stop'",
        "dmclip.logging_steps": "int 50",
        "dmclip.lr_scheduler_type": "str 'cosine'",
        "dmclip.max_grad_norm": "float 1.0",
        "dmclip.model": "NoneType None",
        "dmclip.on_bad_sample": "str 'raise'",
        "dmclip.per_device_train_batch_size": "int 256",
        "dmclip.preset": "NoneType None",
        "dmclip.projection_dim": "NoneType None",
        "dmclip.remove_unused_columns": "bool False",
        "dmclip.report_to": "list ['auto']",
        "dmclip.samples_per_epoch": "NoneType None",
        "dmclip.save_steps": "int 1000",
        "dmclip.save_dtype": "str 'auto'",
        "dmclip.save_strategy": "str 'steps'",
        "dmclip.save_total_limit": "int 1",
        "dmclip.per_device_eval_batch_size": "NoneType None",
        "dmclip.shuffle_buffer": "int 10000",
        "dmclip.synthetic_captions": "NoneType None",
        "dmclip.synthetic_keys": "str 'syn_text.*'",
        "dmclip.teacher_logit_scale": "NoneType None",
        "dmclip.teacher_widths": "list []",
        "dmclip.text_config": "str '{}'",
        "dmclip.text_model": "NoneType None",
        "dmclip.tokenizer": "NoneType None",
        "dmclip.train_samples": "NoneType None",
        "dmclip.train_shards": "NoneType None",
        "dmclip.vision_config": "str '{}'",
        "dmclip.vision_model": "NoneType None",
        "dmclip.warmup_steps": "int 1000",
        "dmclip.weight_decay": "float 0.2",
        "evaluate": "list []",
        "exclude_karpathy": "list []",
        "on_bad_image": "str 'raise'",
        "output_dir": "str 'outputs/run'",
        "overwrite": "bool False",
        "push_arm": "NoneType None",
        "push_license": "NoneType None",
        "push_private": "bool False",
        "push_to_hub": "NoneType None",
        "regions.batch_size": "int 16",
        "regions.detector": "NoneType None",
        "regions.ignore_boxes": "bool False",
        "regions.max_regions": "NoneType None",
        "regions.on_bad_image": "str 'raise'",
        "regions.trust_checkpoint": "bool False",
        "reinforce.augmentations": "int 30",
        "reinforce.batch_size": "int 64",
        "reinforce.captioner": "NoneType None",
        "reinforce.captions_per_image": "int 5",
        "reinforce.dtype": "str 'float16'",
        "reinforce.folder": "NoneType None",
        "reinforce.image_size": "NoneType None",
        "reinforce.magnitude": "int 9",
        "reinforce.min_crop_area": "float 0.08",
        "reinforce.num_operations": "int 2",
        "reinforce.num_workers": "int 0",
        "reinforce.samples_per_shard": "int 1000",
        "reinforce.seed": "int 0",
        "reinforce.synthetic_captions": "NoneType None",
        "reinforce.teachers": "list []",
        "seed": "int 0",
        "seeds": "list []",
        "stages": "list []",
        "student.contrastive_loss_weight": "float 1.0",
        "student.contrastive_loss": "str 'auto'",
        "student.cosine_distillation_loss_weight": "float 1.0",
        "student.cosine_preservation_loss_weight": "float 0.0",
        "student.dataloader_drop_last": "bool True",
        "student.ddp_find_unused_parameters": "bool False",
        "student.freeze": "list []",
        "student.image_cache_mib": "int 2048",
        "student.image_to_text_weight": "float 0.5",
        "student.negatives": "str 'batch'",
        "student.batch_order": "str 'random'",
        "student.hard_negatives": "str 'none'",
        "student.bank_limit": "int 1048576",
        "student.max_negative_similarity": "float 1.01",
        "student.micro_batch_size": "NoneType None",
        "student.l2_sp_loss_weight": "float 0.0",
        "student.layer_decay": "float 1.0",
        "student.ema_decay": "NoneType None",
        "student.probe": "list []",
        "student.probe_steps": "float 0.25",
        "student.keep_retention": "NoneType None",
        "student.wise_ft_rule": "NoneType None",
        "dmclip.micro_batch_size": "NoneType None",
        "student.learning_rate": "float 1e-06",
        "student.logging_nan_inf_filter": "bool False",
        "student.on_nonfinite": "str 'stop'",
        "student.logging_steps": "int 50",
        "student.lora_alpha": "NoneType None",
        "student.lora_dropout": "float 0.0",
        "student.lora_rank": "NoneType None",
        "student.lora_target_modules": "list []",
        "student.lora_text": "bool False",
        "student.lr_scheduler_type": "str 'constant'",
        "student.max_grad_norm": "float 0.5",
        "student.merge_adapter": "bool True",
        "student.min_crop_area": "float 1.0",
        "student.num_train_epochs": "float 2.0",
        "student.per_device_train_batch_size": "int 32",
        "student.position_embedding_type": "str 'absolute'",
        "student.remove_unused_columns": "bool False",
        "student.report_to": "list ['auto']",
        "student.save_dtype": "str 'auto'",
        "student.load_best_model_at_end": "NoneType None",
        "student.save_strategy": "str 'epoch'",
        "student.save_total_limit": "int 1",
        "student.per_device_eval_batch_size": "NoneType None",
        "student.similarity_distillation_loss_weight": "float 0.0",
        "student.similarity_teacher_temperature": "NoneType None",
        "student.similarity_temperature": "float 0.05",
        "student.temperature": "float 0.05",
        "student.use_dora": "bool False",
        "student.weight_decay": "float 0.01",
        "student.wise_ft_alpha": "float 1.0",
        "targets.batch_size": "int 16",
        "targets.chunk_rows": "int 512",
        "targets.num_workers": "int 0",
        "targets.text_batch_size": "int 256",
        "teacher.aggregation": "str 'mean'",
        "teacher.attention_temperature": "float 2.0",
        "teacher.cross_attention": "str 'bidirectional'",
        "teacher.dataloader_drop_last": "bool True",
        "teacher.ddp_find_unused_parameters": "bool False",
        "teacher.image_cache_mib": "int 2048",
        "teacher.learning_rate": "float 1e-05",
        "teacher.logging_nan_inf_filter": "bool False",
        "teacher.on_nonfinite": "str 'stop'",
        "teacher.logging_steps": "int 50",
        "teacher.loss_temperature": "float 0.05",
        "teacher.lr_scheduler_type": "str 'constant'",
        "teacher.num_attention_heads": "int 8",
        "teacher.num_cluster_steps": "int 5",
        "teacher.num_clusters": "int 3",
        "teacher.num_region_layers": "int 2",
        "teacher.num_train_epochs": "float 3.0",
        "teacher.per_device_train_batch_size": "int 64",
        "teacher.region_feedforward_ratio": "int 2",
        "teacher.region_weighting": "bool True",
        "teacher.remove_unused_columns": "bool False",
        "teacher.report_to": "list ['auto']",
        "teacher.save_dtype": "str 'auto'",
        "teacher.save_strategy": "str 'epoch'",
        "teacher.save_total_limit": "int 1",
        "teacher.per_device_eval_batch_size": "NoneType None",
        "teacher.text_share": "float 0.5",
        "teacher_model": "NoneType None",
        "train_datasets": "list []",
        "test_fraction": "float 0.0",
        "train_fraction": "float 1.0",
        "uncaptioned_datasets": "list []",
    }
    assert (
        list(SECTIONS) == list(STAGES) == ["anchor", "regions", "teacher", "targets", "student", "reinforce", "dmclip"]
    )
    assert sorted(TRAINING_SECTIONS) == ["anchor", "dmclip", "student", "teacher"]


def test_grammar_of_recipes(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 3\nstudent: {learning_rate: 1.0e-4, freeze: [a, 're:b']}\n")
    (tmp_path / "recipe.yaml").write_text(
        "base: base.yaml\nstudent: {temperature: 0.1}\ntrain_datasets: ['disk:a@5']\n"
    )
    words = ["--student.learning-rate=2e-6", "--student.freeze", "none", "--regions.detector", "grid:2x2"]
    words += ["--anchor.vision_config", '{"image_size": 32}', "--stages", "teacher,student", "--output_dir", "out"]
    recipe = parse_recipe([*words, "--student.use_cpu", "true"], tmp_path / "recipe.yaml")
    assert (recipe.run.seed, recipe.run.train_datasets, recipe.run.stages) == (3, ["disk:a@5"], ["teacher", "student"])
    student = recipe.student
    assert (student.learning_rate, student.freeze, student.temperature, student.seed) == (2e-6, [], 0.1, 3)
    assert (recipe.regions.detector, recipe.anchor.vision_config) == ("grid:2x2", {"image_size": 32})
    assert (student.output_dir, sorted(recipe.named)) == ("out/student", ["anchor", "regions", "student"])
