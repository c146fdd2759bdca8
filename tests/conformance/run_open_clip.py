"""Run open_clip's MobileCLIP-S1, fetched to a folder, on random weights; run as a script by `test_open_clip.py`.

python run_open_clip.py FOLDER OUTPUT
"""

import sys
from pathlib import Path

import torch

LENGTHS = (3, 10, 40, 77)
BOS, EOS = 49406, 49407


def randomise(tower, generator):
    """Values under which every parameter of the text tower matters."""
    for name, parameter in tower.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "ln_" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))


@torch.no_grad()
def main(folder, output):
    """Write `weights.pt`, and `outputs.pth`: token ids and text embeddings."""
    sys.path.insert(0, folder)
    import open_clip

    generator = torch.Generator().manual_seed(0)
    model = open_clip.create_model("MobileCLIP-S1").eval()
    randomise(model.text, generator)
    torch.save(model.state_dict(), Path(output) / "weights.pt")
    input_ids = torch.zeros(len(LENGTHS), 77, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        input_ids[row, :length] = torch.randint(1, BOS, (length,), generator=generator)
        input_ids[row, 0], input_ids[row, length - 1] = BOS, EOS
    torch.save((input_ids, model.encode_text(input_ids)), Path(output) / "outputs.pth")


if __name__ == "__main__":
    main(*sys.argv[1:])
