"""Export a trained model for other programs.

Each export is checked against the model, and deleted if the outputs differ.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_dclip.data.files import check_new_folder, holding, replacing

# The rest is imported where it is needed: PyTorch and transformers take seconds, for which `--help` need not wait.
if TYPE_CHECKING:
    from modeling_dclip.hub.export.onnx import Deviation

TOWERS = ("image", "text")
ONNX_DTYPES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}  # with the file suffixes that transformers.js reads


def write_export(output: str | os.PathLike, write: "Callable[[Path], dict[str, Deviation]]") -> "dict[str, Deviation]":
    """Write a folder whole or not at all.

    Args:
        output (`str` or `os.PathLike`): A new or empty folder.
        write (`Callable[[Path], dict[str, Deviation]]`): Fills a folder; what it raises leaves no folder behind.

    Returns:
        `dict[str, Deviation]`: What `write` returned.

    Raises:
        FileExistsError: If the output is in use.
        OSError: If another process writes it, or it cannot be written.
    """
    check_new_folder(output)
    with holding(output, beside=True):
        if Path(output).is_dir():
            Path(output).rmdir()
        with replacing(output) as folder:
            return write(folder)
