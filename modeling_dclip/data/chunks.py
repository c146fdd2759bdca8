"""Rows that are computed in chunks, each kept in a file keyed by its rows' content, the weights and the settings.

A run that was killed continues at the next chunk. Several processes share the chunks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from modeling_dclip.data.files import remove_leftovers, replacing
from modeling_dclip.encoders.fingerprints import combine_keys

Chunk = dict[str, np.ndarray]


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Write a chunk atomically: a reader sees the whole file or none."""
    with replacing(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in chunk.items()}, temporary)


def read_chunk(path: Path) -> Chunk:
    """Read a chunk.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"The cached chunk '{path}' is damaged ({error}). Delete the file and run again.") from error


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
            if index % processes == process and not path.is_file():
                write_chunk(path, compute(rows))
            progress.update(len(rows))
    if not alone:
        state.wait_for_everyone()
    return paths
