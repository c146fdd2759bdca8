"""Write two small sets with `clip-benchmark`'s own writer, fetched; run as a script by
`test_clip_benchmark_zero_shot.py`.

python run_clip_benchmark_writer.py OUTPUT PACKAGES...
"""

import io
import sys

import numpy as np
import torch
from PIL import Image


class Pictures(torch.utils.data.Dataset):
    """Seven pictures, each of one class or of several."""

    classes = ["dog", "red circle", "blue square"]
    templates = ["a photo of a {c}.", "a {c}"]

    def __init__(self, several):
        self.several = several

    def __len__(self):
        return 7

    def __getitem__(self, row):
        pixels = np.random.default_rng(row).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "webp", lossless=True)
        return buffer.getvalue(), torch.tensor([row % 2, 1, 0]) if self.several else row % 3


def main(output, *packages):
    """Write `wds_one` and `wds_several`, three samples a shard."""
    sys.path[:0] = packages
    from clip_benchmark.webdataset_builder import convert_dataset

    for name, several in (("wds_one", False), ("wds_several", True)):
        options = {"max_count": 3, "verbose": False, "multilabel": several}
        convert_dataset(Pictures(several), "test", f"{output}/{name}", **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
