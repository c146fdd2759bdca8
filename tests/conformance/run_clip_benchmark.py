"""Run clip_benchmark's retrieval, fetched to a folder, on given embeddings; run as a script by
`test_clip_benchmark.py`.

python run_clip_benchmark.py FOLDER INPUT OUTPUT
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

BATCH = 16


def main(folder, given, output):
    """Write recalls by clip_benchmark's names.

    Captions come image after image, so an image's are found by counting.
    """
    sys.path.insert(0, folder)
    from clip_benchmark.metrics import zeroshot_retrieval

    images, texts, owners = torch.load(given, weights_only=True)
    captions = [(owners == row).nonzero()[:, 0].tolist() for row in range(len(images))]
    batches = [
        (rows, [[str(caption) for caption in captions[row]] for row in rows.tolist()])
        for rows in torch.arange(len(images)).split(BATCH)
    ]
    model = SimpleNamespace(encode_image=images.__getitem__, encode_text=texts.__getitem__)
    tokenize = lambda given: torch.tensor([int(text) for text in given])  # noqa: E731
    metrics = zeroshot_retrieval.evaluate(model, batches, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    Path(output).write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(*sys.argv[1:])
