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

from modeling_dclip.distillation.recipes import describe_fields, parse_recipe
from modeling_dclip.distillation.stages import run_stages

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"


def main(words: list[str]) -> Path | None:
    """Run a recipe; returns the folder of the run."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        print("  --recipe FILE (default recipes/demo.yaml)\n")
        print(describe_fields())
        return None
    recipe_file = DEMO
    if "--recipe" in words:
        position = words.index("--recipe")
        if position + 1 == len(words):
            raise ValueError("Expected a file after --recipe, got nothing.")
        recipe_file = Path(words[position + 1])
        words = [*words[:position], *words[position + 2 :]]
    recipe = parse_recipe(words, recipe_file)
    level = logging.INFO if PartialState().is_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = run_stages(recipe)
    # Evaluation joins distillation here: `recipe.run.evaluate` lists the benchmarks.
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
