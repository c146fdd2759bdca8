"""Pictures of diagnostics: maps over images, and the spectral density of a Hessian."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modeling_dclip.evaluation.figures import COLOURS, GRID, INK, QUIET, new_figure, save_figure

MAP_TITLES = {
    "attention_rollout": "attention rollout",
    "class_attention": "class attention, last layer",
    "text_relevance": "relevance for the text",
    "text_similarity": "similarity to the text",
}


def plot_image_maps(pictures: Any, maps: Mapping[str, Any], texts: Sequence[str], path: str | os.PathLike) -> None:
    """Draw maps over pictures: a row a picture, the bare one first; under each map the values at both ends of its colours.

    Args:
        pictures (array of shape `(B, H, W, 3)`): In [0, 1].
        maps (`Mapping[str, array]`): By name, each `(B, rows, columns)`, laid over the whole picture.
        texts (`Sequence[str]`): B, written beside the pictures.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If counts differ, there is nothing to draw, or a value is not finite.
    """
    pictures = np.asarray(pictures, dtype=float)
    maps = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    if pictures.ndim != 4 or not len(pictures) or len(texts) != len(pictures) or not maps:
        raise ValueError(
            f"Expected pictures (B, H, W, 3), B texts and one map or more, got {pictures.shape}, {len(texts)} and {len(maps)}."
        )
    for name, values in maps.items():
        if values.ndim != 3 or len(values) != len(pictures) or not np.isfinite(values).all():
            raise ValueError(
                f"Expected finite values ({len(pictures)}, rows, columns) in the map {name!r}, got shape {values.shape}."
            )
    columns = 1 + len(maps)
    figure = new_figure(2.3 * columns, 2.75 * len(pictures))
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.02 / len(pictures)), h_pad=0.06)
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    height, width = pictures.shape[1:3]
    for row, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        axes[row, 0].imshow(picture)
        label = textwrap.fill(textwrap.shorten(text, 110, placeholder="…"), 32)
        axes[row, 0].set_xlabel(label, fontsize=7, color=INK)
        for column, (name, values) in enumerate(maps.items(), 1):
            low, high = values[row].min(), values[row].max()
            place = axes[row, column]
            place.imshow(np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2))
            place.imshow(values[row], cmap="inferno", alpha=0.6, interpolation="bilinear", extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                         vmin=low, vmax=high if high > low else low + 1)  # fmt: skip
            place.set_xlabel(f"dark {low:.3g}, bright {high:.3g}", fontsize=7, color=QUIET)
            if row == 0:
                place.set_title(MAP_TITLES.get(name, name), fontsize=8, color=INK)
    for place in axes.flat:
        place.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        place.spines[:].set_visible(False)
    save_figure(figure, path)


def plot_spectral_density(
    densities: Mapping[str, Mapping[str, Sequence[float]]], path: str | os.PathLike, *, title: str | None = None
) -> None:
    """Draw the spectral densities of Hessians over each other, the density on a logarithmic axis.

    Args:
        densities (`Mapping[str, Mapping]`): By label, `eigenvalues` and `density`, as [`~modeling_dclip.evaluation.hessian.evaluate_hessian`]
            gives them with probes.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        title (`str`, *optional*): Above.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, lengths differ, or a value is not finite.
    """
    if not densities:
        raise ValueError("Expected one or more densities to draw, got none.")
    for label, one in densities.items():
        values = [np.asarray(one[name], dtype=float) for name in ("eigenvalues", "density")]
        if values[0].shape != values[1].shape or not values[0].size or not np.isfinite(values).all():
            raise ValueError(
                f"Expected as many finite eigenvalues as densities for {label!r}, got {values[0].shape}, {values[1].shape}."
            )
    figure = new_figure(6.4, 3.8)
    axes = figure.add_subplot()
    highest = max(max(one["density"]) for one in densities.values())
    for index, (label, one) in enumerate(densities.items()):
        axes.plot(one["eigenvalues"], one["density"], color=COLOURS[(index + 1) % len(COLOURS)], lw=1.4, label=label)
    axes.axvline(0, color=QUIET, lw=0.8, ls=(0, (4, 4)), zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(highest * 1e-6, highest * 3)
    axes.set_xlabel("eigenvalue of the Hessian (left of 0: not convex)", color=INK)
    axes.set_ylabel("density", color=INK)
    axes.set_title(title or "", loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=GRID, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
