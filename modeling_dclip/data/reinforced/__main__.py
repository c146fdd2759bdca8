"""Write a reinforced dataset: with each image, augmentations, captions and the embeddings that teachers give to them.

    python -m modeling_dclip.data.reinforced --dataset scenes:train,n=1000 --image_size 64 \\
        --teachers recipes/demo_anchor,recipes/demo_anchor_2 --output FOLDER

DM-CLIP trains on such a folder. Start the same command again after a stop: it continues where it was.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import PartialState

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import (
    MANIFEST_NAME,
    check_output_folder,
    holding,
    read_json,
    write_manifest,
)
from modeling_dclip.data.reinforced.augmentations import AugmentationSettings
from modeling_dclip.data.reinforced.teachers import TransformersCaptioner, build_teacher
from modeling_dclip.data.reinforced.writer import write_reinforced
from modeling_dclip.data.specs import BATCH, SEED, WORKERS, CommandParser, Range
from modeling_dclip.progress import count_of


@dataclass
class ReinforcedWriterArguments:
    """One run of the command line."""

    dataset: str = field(metadata={"help": "Spec of the captions, e.g. scenes:train,n=1000; see docs/data.md."})
    teachers: str = field(
        metadata={"help": "CLIPs, separated by commas: folders, Hub ids, or open_clip:NAME:PRETRAINED."}
    )
    output: str = field(metadata={"help": "Folder to write, or of a run to continue."})
    augmentations: int = field(
        default=30, metadata={"help": "Stored augmentations of each image.", "range": Range(1, 10**6, whole=True)}
    )
    synthetic_captions: str | None = field(
        default=None, metadata={"help": "Column of synthetic captions, e.g. coarse_caption of drawn scenes."}
    )
    captioner: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a captioner (BLIP, GIT, ViT-GPT2) that writes them."}
    )
    captions_per_image: int = field(
        default=5, metadata={"help": "Synthetic captions the captioner draws.", "range": Range(1, 1000, whole=True)}
    )
    image_size: int = field(
        default=256,
        metadata={
            "help": "Side in pixels of the augmented image, as in training.",
            "range": Range(1, 2**13, whole=True),
        },
    )
    min_crop_area: float = field(
        default=0.08,
        metadata={
            "help": "Smallest share of the image that a random resized crop keeps, in (0, 1].",
            "range": Range(0, 1, above=True),
        },
    )
    num_operations: int = field(
        default=2, metadata={"help": "Operations of RandAugment per augmentation.", "range": Range(0, 100, whole=True)}
    )
    magnitude: int = field(
        default=9, metadata={"help": "Strength of RandAugment, 0 to 30.", "range": Range(0, 30, whole=True)}
    )
    samples_per_shard: int = field(
        default=1000, metadata={"help": "Images per file.", "range": Range(1, 10**6, whole=True)}
    )
    dtype: Literal["float16", "float32"] = field(
        default="float16", metadata={"help": "Type of the stored embeddings."}
    )
    batch_size: int = field(default=64, metadata={"help": "Augmented images in one forward pass.", "range": BATCH})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode and augment.", "range": WORKERS})
    seed: int = field(
        default=0, metadata={"help": "Seed of augmentations, sampled captions, and the draw of @COUNT.", "range": SEED}
    )


@command
def main(argv: list[str] | None = None) -> Path:
    """Run the command line and return the index written."""
    parser = CommandParser(
        ReinforcedWriterArguments, prog="python -m modeling_dclip.data.reinforced", description=__doc__
    )
    (arguments,) = parser.parse(argv)
    if arguments.synthetic_captions is not None and arguments.captioner is not None:
        raise ValueError("Expected --synthetic_captions (a column) or --captioner, got both. Leave one out.")
    teachers = [spec.strip() for spec in arguments.teachers.split(",")]
    if not all(teachers):
        raise ValueError(f"teachers: expected names separated by commas, got an empty one in {arguments.teachers!r}.")
    check_output_folder(arguments.output)
    if PartialState().is_main_process:
        with holding(arguments.output):
            pass  # another run is refused before models are loaded
    device, seed, captioner = PartialState().device, arguments.seed, None
    if arguments.captioner is not None:
        options = {"captions": arguments.captions_per_image, "seed": seed, "device": device}
        captioner = TransformersCaptioner(arguments.captioner, **options)
    index = write_reinforced(
        load_captions(arguments.dataset, seed=seed),
        [build_teacher(spec, device) for spec in teachers],
        output=arguments.output,
        settings=AugmentationSettings(
            arguments.image_size,
            scale=(arguments.min_crop_area, 1.0),
            num_operations=arguments.num_operations,
            magnitude=arguments.magnitude,
        ),
        captioner=captioner,
        **{
            name: getattr(arguments, name)
            for name in (
                "augmentations",
                "synthetic_captions",
                "samples_per_shard",
                "dtype",
                "batch_size",
                "num_workers",
            )
        },
        seed=seed,
    )
    counts = read_json(index)["counts"]
    told = ", ".join(count_of(number, name.replace("_", " ").removesuffix("s")) for name, number in counts.items())
    if PartialState().is_main_process:
        about = {"seed": seed, "data": arguments.dataset, "teachers": teachers, "key": read_json(index)["rows"]}
        write_manifest(index.with_name(MANIFEST_NAME), processes=PartialState().num_processes, **about)
        sys.stdout.write(f"Wrote {told} to {arguments.output}\n")
    return index


if __name__ == "__main__":
    main()
