"""The look that all pictures share, and the one way to write them. matplotlib is imported when a figure is made, never before."""

import io
import os
from pathlib import Path
from typing import Any

from modeling_dclip.evaluation.results import write_bytes

INK, QUIET, GRID = "#1f2430", "#8a90a0", "#e6e8ee"
COLOURS = ("#6b7280", "#d97706", "#2563eb", "#059669", "#9333ea", "#dc2626")  # grey first: the anchor
MARKERS = ("s", "^", "o", "D", "v", "P")


def style_of(index: int) -> dict[str, str]:
    """Colour and marker of a series: grey for the first, and 30 different pairs for those that follow."""
    colour = COLOURS[0] if index == 0 else COLOURS[1 + (index - 1) % (len(COLOURS) - 1)]
    return {"color": colour, "marker": MARKERS[index % len(MARKERS)]}


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, with the Agg backend and without touching a global state.

    Raises:
        ImportError: If matplotlib is not installed; the extra that brings it is named.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib for drawing, got no such package. Install it with `pip install modeling_dclip[eval]`."
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        ValueError: If the file is no `.png`.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"Expected a .png file to draw to, got {str(path)!r}.")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
