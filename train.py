"""Train a DCLIP teacher and student from a recipe, stage by stage.

    accelerate launch train.py                                       the demo, offline, minutes on two CPU cores
    accelerate launch train.py --recipe recipes/dclip_vitb16.yaml    the paper
    ... --stages teacher,student                                     some stages only
    ... --output_dir outputs/mine --student.learning_rate 2e-6       any field, over the recipe's value

Finished stages are recognised and skipped; interrupted ones go on where they were.
"""

import logging
import sys
from pathlib import Path

from accelerate import PartialState

from modeling_dclip.distillation.recipes import Recipe, describe_fields, parse_recipe
from modeling_dclip.distillation.stages import run_stages

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"


def read_recipe(words: list[str]) -> Recipe:
    """The recipe that a command line asks for; a wrong word ends the script with one line that says so."""
    path = DEMO
    try:
        if "--recipe" in words:
            position = words.index("--recipe")
            if position + 1 == len(words):
                raise ValueError("Expected a file after --recipe, got nothing.")
            path = Path(words[position + 1])
            words = [*words[:position], *words[position + 2 :]]
        return parse_recipe(words, path)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))


def main(words: list[str]) -> None:
    """Run a recipe."""
    if "--help" in words or "-h" in words:
        print(f"{__doc__}\n  --recipe FILE (default {DEMO.relative_to(Path(__file__).parent)})\n\n{describe_fields()}")
        return
    recipe = read_recipe(words)
    level = logging.INFO if PartialState().is_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run_stages(recipe)
    # Evaluation joins distillation here: `recipe.run.evaluate` lists the benchmarks.


if __name__ == "__main__":
    main(sys.argv[1:])
