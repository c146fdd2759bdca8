"""Galleries of what results records measured: one page for each model and retrieval benchmark."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_dclip.data.captions import load_captions
from modeling_dclip.evaluation.gallery import write_gallery
from modeling_dclip.evaluation.models import load_dual_encoder
from modeling_dclip.evaluation.outcomes import record_key


def gallery_name(record: Mapping[str, Any]) -> str:
    """A file name that says model and benchmark, and is another for other weights or data."""
    words = f"{record.get('label', record['model'])} {record['benchmark'].partition('=')[2]}"
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', words).strip('-')[-80:]}-{record_key(record)[:6]}.html"


def write_galleries(
    records: Sequence[Mapping[str, Any]], folder: str | os.PathLike, *, trust_remote_code: bool = False, **options: Any
) -> list[Path]:
    """Write a page for every record of retrieval; the model is loaded and the data embedded again.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.evaluator.evaluate`]. Other benchmarks, and points between two models, have
            no page.
        folder (`str` or `os.PathLike`): Where; made if it is not there.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with a model.
        options: `seed`, `device`, `batch_size`... of [`~modeling_dclip.evaluation.gallery.write_gallery`].

    Returns:
        `list[Path]`: The pages.
    """
    pages = []
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind != "retrieval" or "condition" in record:
            continue
        model, processor, revision = load_dual_encoder(record["model"], trust_remote_code=trust_remote_code)
        page = Path(folder) / gallery_name(record)
        about = [record["benchmark"], f"revision {revision}"]
        dataset = load_captions(spec, seed=record["seed"])
        write_gallery(
            model, processor, dataset, page, title=record.get("label", record["model"]), about=about, **options
        )
        pages.append(page)
    return pages
