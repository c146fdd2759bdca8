"""Recipes: every file parses into what it says, and a wrong key or value is told before anything runs."""

import dataclasses
import re
from pathlib import Path

import pytest

from modeling_dclip import PRESETS
from modeling_dclip.data.captions import CAPTION_SOURCES
from modeling_dclip.data.failures import Mistakes
from modeling_dclip.data.specs import parse_spec
from modeling_dclip.distillation import recipes
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe, read_recipe_file, shared_anchor
from modeling_dclip.distillation.run import check_uncaptioned

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
FOLDER = RECIPES[0].parent


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_its_specs_are_known(path):
    recipe = parse_recipe([], path)
    for run in expand_arms(recipe):
        check_uncaptioned(run.recipe)
    specs = [*recipe.run.train_datasets, *recipe.run.uncaptioned_datasets, *recipe.anchor.train_datasets]
    assert specs or recipe.dmclip.train_shards
    for spec in specs:
        parse_spec(spec, CAPTION_SOURCES, counted=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_writes_into_a_folder_of_its_own_name(path):
    assert parse_recipe([], path).run.output_dir == f"outputs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_path_among_the_recipes_that_a_recipe_names_exists(path):
    named = set(re.findall(r"(?<![\w/])recipes/[\w./-]*[\w-]", path.read_text(encoding="utf-8")))
    missing = sorted(name for name in named if not (FOLDER.parent / name).exists())
    assert not missing, f"{path.name} names {missing}"


@pytest.mark.parametrize("name", ["dclip_vitb16", "dclip_vitb32", "dclip_vitl14"])
def test_the_papers_recipes_have_the_papers_values(name):
    recipe = parse_recipe([], FOLDER / f"{name}.yaml")
    counts = [parse_spec(spec, CAPTION_SOURCES, counted=True).count for spec in recipe.run.train_datasets]
    assert counts == [50_000, 15_000, 10_000] and recipe.run.train_fraction == 0.9
    assert len(recipe.run.exclude_karpathy) == 2
    assert recipe.run.clip_model in PRESETS and recipe.run.clip_model == name.replace("_", "-")
    assert recipe.regions.detector == "ultralytics:yolov8x.pt"
    teacher, student = recipe.teacher, recipe.student
    assert (teacher.learning_rate, teacher.weight_decay, teacher.num_train_epochs) == (1e-5, 0.0, 3)
    assert (teacher.cross_attention, teacher.text_share, teacher.loss_temperature) == ("bidirectional", 0.5, 0.05)
    assert (student.learning_rate, student.weight_decay, student.num_train_epochs) == (1e-6, 0.01, 2)
    assert (student.per_device_train_batch_size, student.gradient_accumulation_steps) == (32, 4)
    assert student.max_grad_norm == 0.5 and student.temperature == 0.05
    assert student.cosine_distillation_loss_weight == student.contrastive_loss_weight == 1


def test_the_large_model_takes_the_papers_three_remedies():
    recipe = parse_recipe([], FOLDER / "dclip_vitl14.yaml")
    assert (recipe.teacher.aggregation, recipe.teacher.num_clusters) == ("multi_cluster", 3)
    assert recipe.student.position_embedding_type == "rope"
    assert recipe.student.cosine_preservation_loss_weight == 0.3


def test_ablations_change_what_their_name_says_and_nothing_else():
    for model in ("dclip_vitb16", "dclip_vitl14"):
        base = parse_recipe([], FOLDER / f"{model}.yaml")
        ablations = {
            name: parse_recipe([], FOLDER / f"{model}_{name}.yaml")
            for name in ("no_regions", "no_bidirectional", "no_cross_modal", "no_teacher")
        }
        assert ablations["no_regions"].regions.detector is None and ablations["no_regions"].regions.ignore_boxes
        assert ablations["no_bidirectional"].teacher.cross_attention == "none"
        assert ablations["no_bidirectional"].teacher.text_share == 0.5
        assert ablations["no_cross_modal"].teacher.text_share == 0
        assert not ablations["no_teacher"].student.reads_teacher
        assert ablations["no_teacher"].student.columns == ["text_embeds"]
        for recipe in ablations.values():
            assert recipe.run.train_datasets == base.run.train_datasets
            assert recipe.student.learning_rate == base.student.learning_rate
            assert recipe.student.num_train_epochs == base.student.num_train_epochs
            assert recipe.student.position_embedding_type == base.student.position_embedding_type


def test_the_posters_recipe_has_the_posters_values():
    recipe = parse_recipe([], FOLDER / "dmclip_b_datacompdr.yaml")
    args = recipe.dmclip
    assert (args.preset, args.image_size, args.teacher_widths, args.teacher_logit_scale) == ("B", 256, [768, 768], 100)
    assert (args.contrastive_loss_weight, args.distillation_loss_weight, args.synthetic_captions) == (0.25, 0.75, True)
    assert (args.learning_rate, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (1e-4, 0.95, 0.2, 1.0)
    assert (args.warmup_steps, args.per_device_train_batch_size, args.train_samples) == (1000, 256, 6_000_000)
    assert args.max_steps == 6_000_000 // 256
    assert recipe.stages == ["dmclip"]


@pytest.mark.parametrize("name", ["b_datacompdr_weights", "demo", "photos"])
def test_the_posters_question_is_asked_with_its_four_weightings(name):
    runs = expand_arms(parse_recipe([], FOLDER / f"dmclip_{name}.yaml"))
    weights = {
        run.arm: (run.recipe.dmclip.contrastive_loss_weight, run.recipe.dmclip.distillation_loss_weight)
        for run in runs
    }
    assert list(weights.values()) == [(1, 0), (0.25, 0.75), (0.75, 0.25), (0, 1)]
    assert runs[0].recipe.run.baseline == "contrastive" == runs[0].arm  # what the others have to beat
    others = [dataclasses.replace(run.recipe, run=None, dmclip=None) for run in runs]
    assert all(one.reinforce == others[0].reinforce for one in others)  # one set of shards
    budgets = {(run.recipe.dmclip.max_steps, run.recipe.dmclip.num_train_epochs) for run in runs}
    assert len(budgets) == 1
    wanted = {"b_datacompdr_weights": []}.get(name, ["reinforce"])
    assert runs[0].recipe.stages[:-1] == wanted
    kinds = {one.partition("=")[0] for one in runs[0].recipe.run.evaluate}
    assert kinds == {"retrieval", "zero_shot"}  # its answer is a table


@pytest.mark.parametrize("arms", ["", "arms: {one: {dmclip: {seed: 1}}}\n"])
def test_a_table_without_a_reference_is_refused_before_training(tmp_path, arms):
    path = tmp_path / "recipe.yaml"
    path.write_text("evaluate: [zero_shot=scenes]\ndmclip: {max_steps: 1, train_shards: x, tokenizer: y}\n" + arms)
    with pytest.raises(ValueError, match="evaluate: name clip_model, the reference of the table"):
        expand_arms(parse_recipe([], path))
    for words in (["--clip_model", "z"], ["--anchor.projection_dim", "8"], ["--evaluate", "none"]):
        assert len(expand_arms(parse_recipe(words, path))) == 1


def test_the_demos_teachers_are_two_committed_clips():
    teachers = parse_recipe([], FOLDER / "dmclip_demo.yaml").reinforce.teachers
    assert len(teachers) == 2
    for name in teachers:
        assert (FOLDER.parent / name / "config.json").is_file()


def test_the_sweep_covers_one_to_five_epochs_of_the_teacher():
    paths = [FOLDER / "dclip_vitb16.yaml", *FOLDER.glob("dclip_vitb16_teacher_epochs_*.yaml")]
    assert sorted(parse_recipe([], path).teacher.num_train_epochs for path in paths) == [1, 2, 3, 4, 5]


def test_the_command_line_goes_before_the_file_and_numbers_are_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 3\nstudent: {learning_rate: 1e-5, freeze: [a, b], bf16: false}\n")
    recipe = parse_recipe([], tmp_path / "recipe.yaml")
    assert recipe.student.learning_rate == 1e-5 and recipe.student.freeze == ["a", "b"] and recipe.student.seed == 3
    words = [
        "--student.learning_rate=2e-6",
        "--student.seed",
        "4",
        "--stages",
        "targets,student",
        "--student.freeze",
        "none",
    ]
    recipe = parse_recipe(words, tmp_path / "recipe.yaml")
    assert recipe.student.learning_rate == 2e-6 and (recipe.student.seed, recipe.teacher.seed) == (4, 3)
    assert recipe.run.stages == ["targets", "student"] and recipe.student.freeze == []


@pytest.fixture
def arms(tmp_path):
    """A recipe with two arms, of which the first changes nothing."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "regions: {detector: 'grid:2x2'}\n"
        "student: {temperature: 0.1, freeze: [a]}\n"
        "arms:\n"
        "  plain: null\n"
        "  other: {seed: 9, student: {temperature: 0.2, freeze: none}, regions: {detector: none}}\n"
    )
    return path


def test_an_arm_overrides_the_file_and_the_command_line_overrides_the_arm(arms):
    plain, other = (run.recipe for run in expand_arms(parse_recipe([], arms)))
    assert (plain.student.temperature, plain.student.freeze, plain.regions.detector) == (0.1, ["a"], "grid:2x2")
    assert (other.student.temperature, other.student.freeze, other.regions.detector) == (0.2, [], None)
    assert plain.run.seed == other.run.seed == 0  # the recipe's seeds decide
    words = ["--student.temperature", "0.3", "--student.freeze", "b", "--regions.detector", "none"]
    plain, other = (run.recipe for run in expand_arms(parse_recipe(words, arms)))
    for one in (plain, other):
        assert (one.student.temperature, one.student.freeze, one.regions.detector) == (0.3, ["b"], None)


def test_the_file_is_read_once_for_all_arms(arms, monkeypatch):
    read = []
    monkeypatch.setattr(recipes, "read_recipe_file", lambda path: read.append(path) or read_recipe_file(path))
    assert len(expand_arms(parse_recipe(["--seeds", "1", "2"], arms))) == 4 and read == [arms]


def test_arms_share_no_value_that_one_of_them_could_change(arms):
    runs = expand_arms(parse_recipe(["--seeds", "1", "2", "--student.freeze", "a"], arms))
    runs[0].recipe.student.freeze.append("b")
    assert [run.recipe.student.freeze for run in runs[1:]] == [["a"]] * 3


def test_arms_without_a_clip_share_one_anchor(arms):
    anchor = shared_anchor(parse_recipe([], arms))
    assert anchor.stages == ["anchor"] and anchor.run.output_dir == "outputs/run"
    assert {run.recipe.run.clip_model for run in expand_arms(parse_recipe([], arms))} == {"outputs/run/anchor"}
    assert shared_anchor(parse_recipe(["--clip_model", "x"], arms)) is None
    assert shared_anchor(parse_recipe([])) is None  # a single run makes its own


def test_no_before_a_switch_turns_it_off():
    words = ["--dmclip.no_ignore_data_skip"]
    with pytest.raises(ValueError, match="ignore_data_skip: expected true, got false"):
        parse_recipe(words)
    with pytest.raises(ValueError, match="expected no value for 'no_ignore_data_skip', got '3'"):
        parse_recipe([*words, "3"])
    with pytest.raises(ValueError, match="'student.no_bf16'. Did you mean 'student.bf16'"):
        parse_recipe(["--student.no_bf16"])


def test_none_unsets_a_field_unless_it_is_a_value_of_its(tmp_path):
    words = ["--regions.detector", "none", "--exclude_karpathy", "none", "--teacher.cross_attention", "none"]
    recipe = parse_recipe([*words, "--student.temperature", "none"], FOLDER / "dclip_vitb16.yaml")
    assert "temperature" not in recipe.values["student"] and recipe.student.temperature == 0.05
    assert recipe.regions.detector is None and recipe.run.exclude_karpathy == []
    assert recipe.teacher.cross_attention == "none"


def test_a_recipe_builds_on_its_base_section_by_section(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\nstudent: {temperature: 0.1, learning_rate: 1e-3}\n")
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\nstudent: {temperature: 0.2}\n")
    assert read_recipe_file(tmp_path / "recipe.yaml") == {
        "seed": 1,
        "student": {"temperature": 0.2, "learning_rate": "1e-3"},
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student.learning_rat", "1"], "Did you mean 'student.learning_rate'"),
        (["--sead", "1"], "Did you mean 'seed'"),
        (
            ["--learning_rate", "1"],
            "It is a field of anchor, teacher, student: write for example student.learning_rate",
        ),
        (["--studnt.temperature", "1"], "Unknown recipe section 'studnt'"),
        (
            ["--student.learning_rate", "fast"],
            "^student.learning_rate: expected a number from 0 to 1000000, got 'fast'.$",
        ),
        (["--student.output_dir", "x"], "set the global 'output_dir'"),
        (["--student.remove_unused_columns", "true"], "remove_unused_columns"),
        (["--student.ignore_data_skip", "true"], "^Recipe, student: ignore_data_skip: expected false, got true"),
        (["--teacher.auto_find_batch_size", "true"], "auto_find_batch_size: expected false, got true"),
        (["--anchor.save_only_model", "true"], "save_only_model: expected false, got true"),
        (["--student.learning_r", "1"], "Did you mean"),
        (["--stages", "teach"], "Unknown stage 'teach'"),
        (["--train_fraction", "1.5"], "^train_fraction: expected a number above 0 and up to 1, got '1.5'"),
        (["--student.wise_ft_alpha", "2"], "wise_ft_alpha"),
        (
            ["--student.metric_for_best_model", "foo"],
            "^Recipe, student: metric_for_best_model: expected what a validation measures, of mean_recall@1, "
            "text_to_image_recall@1, image_to_text_recall@1, loss, cosine_distillation_loss, contrastive_loss, got",
        ),
        (["--teacher.metric_for_best_model", "accuracy"], "metric_for_best_model: .* of loss, got 'accuracy'"),
        (["--dmclip.distilation_loss_weight", "1"], "Did you mean 'dmclip.distillation_loss_weight'"),
        (["--dmclip.augmentations", "2"], "write for example reinforce.augmentations"),
        (["--reinforce.captioner", "x", "--reinforce.synthetic_captions", "y"], "or captioner, got both"),
        (["--teacher.cross_attention", "all"], "invalid choice"),
        (
            ["--student.cosine_distillation_loss_weight", "0", "--student.contrastive_loss_weight", "0"],
            "nothing to learn",
        ),
        (["stray"], "--FIELD before 'stray'"),
        (["--seed", "1", "2"], r"^seed: expected one value, got \['1', '2'\]"),
        (["--arms", "{"], "arms: expected a mapping as JSON, got '{'"),
        (["--anchor.vision_config", "all"], "vision_config: expected a mapping as JSON, got 'all'"),
    ],
)
def test_a_wrong_word_is_an_error_that_helps(words, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: {learning_rat: 1}", "Did you mean 'student.learning_rate'"),
        ("studnet: {learning_rate: 1}", "Did you mean 'student'"),
        ("student: 3", "section 'student': expected fields as `name: value`, got 3"),
        ("- a\n- b", r"recipe.yaml': expected fields and sections as `name: value`, got \['a', 'b'\]"),
        ("a: [", "Expected YAML in the recipe .*recipe.yaml', got invalid YAML"),
        ("arms: 3", "arms: expected a mapping, got 3"),
        ("arms: {a: 3}", "expected a mapping of fields for the arm 'a', got 3"),
    ],
)
def test_a_wrong_file_is_an_error_that_helps(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_recipe([], tmp_path / "recipe.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml'\.$"):
        parse_recipe([], tmp_path / "nowhere.yaml")
    (tmp_path / "finetune.yaml").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"fine_tune.yaml'\. Did you mean '.*/finetune.yaml'\?"):
        parse_recipe([], tmp_path / "fine_tune.yaml")


def test_all_wrong_values_of_a_recipe_are_told_at_once():
    with pytest.raises(Mistakes) as raised:
        parse_recipe(["--seed", "one", "--student.learning_rate", "1e-4x", "--teacher.num_train_epochs", "x"])
    told = [str(one).partition(":")[0] for one in raised.value.errors]
    assert told == ["seed", "teacher.num_train_epochs", "student.learning_rate"]
    with pytest.raises(Mistakes) as raised:
        parse_recipe(["--train_fraction", "7", "--student.learning_rate", "-1", "--student.temperature", "0"])
    told = [str(one).partition(":")[0] for one in raised.value.errors]
    assert told == ["train_fraction", "student.learning_rate", "student.temperature"]
    with pytest.raises(ValueError, match="^Recipe, student: "):
        parse_recipe(["--student.lora_rank", "4", "--student.l2_sp_loss_weight", "1"])
