"""Curves of a run's stages as pictures, from what training always writes: no tracker is needed."""

import importlib.util
import json
import logging
import os
from pathlib import Path

from modeling_dclip.evaluation.report_plots import plot_training

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
CURVES_NAME = "training_curves.png"


def draw_training_curves(folder: str | os.PathLike) -> list[Path]:
    """Draw the losses of each stage that trained into `training_curves.png` in its folder; a picture newer than its numbers stays.

    Args:
        folder (`str` or `os.PathLike`): Of a run, with a folder for each stage, or one for each arm, seed and stage.

    Returns:
        `list[Path]`: The pictures drawn now. None without matplotlib, which a log line says, and none of a stage that logged no loss.

    Raises:
        ValueError: If a loss is not finite.
    """
    found = [path for depth in ("*", "*/seed-*/*") for path in sorted(Path(folder).glob(f"{depth}/{STATE_NAME}"))]
    states = [path for path in found if _is_stale(path)]
    if states and importlib.util.find_spec("matplotlib") is None:
        logger.info("Training curves are not drawn: matplotlib is not installed.")
        return []
    drawn = []
    for path in states:
        log_history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        if not any("loss" in entry or "eval_loss" in entry for entry in log_history):
            continue
        drawn.append(path.with_name(CURVES_NAME))
        plot_training(log_history, drawn[-1], title=path.parent.name)
    return drawn


def _is_stale(state: Path) -> bool:
    picture = state.with_name(CURVES_NAME)
    return not picture.exists() or picture.stat().st_mtime_ns < state.stat().st_mtime_ns
