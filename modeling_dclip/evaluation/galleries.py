"""Pages to look at of what results records measured: for each model and retrieval benchmark a gallery, or maps of the image encoder."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_dclip.data.captions import load_captions
from modeling_dclip.evaluation.gallery import write_gallery
from modeling_dclip.evaluation.image_maps import draw_image_maps
from modeling_dclip.evaluation.models import load_dual_encoder
from modeling_dclip.evaluation.outcomes import record_key


def page_name(record: Mapping[str, Any]) -> str:
    """A file's stem that says model and benchmark, and is another for other weights or data."""
    words = f"{record.get('label', record['model'])} {record['benchmark'].partition('=')[2]}"
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', words).strip('-')[-80:]}-{record_key(record)[:6]}"


def write_pages(
    records: Sequence[Mapping[str, Any]],
    *,
    gallery: str | os.PathLike | None = None,
    maps: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    **options: Any,
) -> list[Path]:
    """Write the pages of every record of retrieval; the model is loaded and the data embedded again.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.evaluator.evaluate`]. Other benchmarks, and points between two models, have
            no page.
        gallery (`str` or `os.PathLike`, *optional*): Folder of HTML pages, see [`~modeling_dclip.evaluation.gallery.write_gallery`].
        maps (`str` or `os.PathLike`, *optional*): Folder of pictures, see [`~modeling_dclip.evaluation.image_maps.draw_image_maps`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with a model.
        device (`torch.device` or `str`, *optional*): Where to compute.
        options: `seed`, `batch_size`, `num_workers` of [`~modeling_dclip.evaluation.gallery.write_gallery`].

    Returns:
        `list[Path]`: What was written.

    Raises:
        TypeError: If maps are asked of a model of another build than CLIP's or DM-CLIP's.
    """
    pages = []
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind != "retrieval" or "condition" in record or not (gallery or maps):
            continue
        model, processor, revision = load_dual_encoder(record["model"], trust_remote_code=trust_remote_code)
        dataset, stem = load_captions(spec, seed=record["seed"]), page_name(record)
        if gallery:
            page, title = Path(gallery) / f"{stem}.html", record.get("label", record["model"])
            about = [record["benchmark"], f"revision {revision}"]
            write_gallery(model, processor, dataset, page, title=title, about=about, device=device, **options)
            pages.append(page)
        if maps:
            page = Path(maps) / f"{stem}.png"
            draw_image_maps(model, processor, dataset, page, rows=range(min(4, len(dataset))), device=device)
            pages.append(page)
    return pages
