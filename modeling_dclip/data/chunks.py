"""Rows that are computed in chunks, each kept in a file keyed by its rows' content, the weights and the settings.

A run that was killed continues at the next chunk. Several processes share the chunks.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from modeling_dclip.data.files import remove_leftovers, replacing
from modeling_dclip.encoders.fingerprints import combine_keys, hash_parts

logger = logging.getLogger(__name__)

Chunk = dict[str, np.ndarray]


_CHECKSUM = "sha256"  # in a file's metadata; files of earlier versions have none


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Write a chunk atomically, with a checksum: a reader sees the whole file or none."""
    arrays = {name: np.ascontiguousarray(array) for name, array in chunk.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata={_CHECKSUM: _checksum(arrays)})


def read_chunk(path: Path) -> Chunk:
    """Read a chunk.

    Raises:
        ValueError: If the file is damaged, or a number in it is not finite.
    """
    try:
        with safe_open(path, "np") as file:
            expected = (file.metadata() or {}).get(_CHECKSUM)
        chunk = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"The cached chunk '{path}' is damaged ({error}). Delete the file and run again.") from error
    if expected is not None and expected != _checksum(chunk):
        raise ValueError(
            f"The cached chunk '{path}' is damaged (its content is not what was written). Delete the file and run "
            "again."
        )
    for name, array in chunk.items():
        if not _is_finite(array):
            raise ValueError(
                f"The cached chunk '{path}' holds NaN or infinity under {name!r}. Delete the file and run again; if "
                "that is the same, the model or an image gives no finite numbers."
            )
    return chunk


def _checksum(chunk: Chunk) -> str:
    names = sorted(chunk)
    return hash_parts(part for name in names for part in (f"{name} {chunk[name].shape}", chunk[name].tobytes()))


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype == np.float16:  # by the bits of the exponent: numpy has no fast test for it
        return not ((array.view(np.uint16) & 0x7C00) == 0x7C00).any()
    return bool(np.isfinite(array).all())


def _is_whole(path: Path) -> bool:
    """Whether a chunk's file is there with its full length; its values are checked where they are read."""
    try:
        with safe_open(path, "np"):
            return True
    except FileNotFoundError:
        return False
    except SafetensorError as error:
        logger.warning("The cached chunk '%s' is damaged (%s) and computed again", path, error)
        return False


def compute_chunks(
    keys: Sequence[str],
    compute: Callable[[range], Chunk],
    *,
    made_by: str,
    cache_dir: Path,
    chunk_rows: int,
    desc: str,
    alone: bool = False,
) -> list[Path]:
    """Compute rows in chunks and keep each in a file that is named by its content. Existing files are not computed
    again.

    Each of n processes computes every n-th chunk, and all wait for each other at the end.

    Args:
        keys (`Sequence[str]`): A key of each row's content.
        compute (`Callable`): From a range of rows to arrays.
        made_by (`str`): A key of what else decides the result: weights and settings.
        cache_dir (`Path`): The folder of the files. All datasets and models share it.
        chunk_rows (`int`): Rows in one file, at least 1.
        desc (`str`): The title of the progress bar.
        alone (`bool`, *optional*, defaults to `False`): Only one process of the run calls this function. It computes
            all chunks and does not wait for the others.

    Returns:
        `list[Path]`: The files, in order of rows.
    """
    state = PartialState()
    processes, process = (1, 0) if alone else (state.num_processes, state.process_index)
    starts = range(0, len(keys), chunk_rows)
    rows_of = [range(start, min(start + chunk_rows, len(keys))) for start in starts]
    paths = [Path(cache_dir) / f"{combine_keys([made_by, *keys[r.start : r.stop]])}.safetensors" for r in rows_of]
    remove_leftovers(cache_dir)
    with tqdm(total=len(keys), desc=desc, unit="image", disable=not state.is_local_main_process) as progress:
        for index, (rows, path) in enumerate(zip(rows_of, paths, strict=True)):
            if index % processes == process and not _is_whole(path):
                write_chunk(path, compute(rows))
            progress.update(len(rows))
    if not alone:
        state.wait_for_everyone()
    return paths
