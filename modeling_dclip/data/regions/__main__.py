"""Add the boxes of a detector to a dataset, and save it.

    python -m modeling_dclip.data.regions --dataset coco:captions.json:val2017 --detector annotations:instances.json \\
        --output FOLDER

The spec `disk:FOLDER` reads what it wrote. docs/data.md lists datasets and detectors.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import (
    MANIFEST_NAME,
    check_output_folder,
    holding,
    remove_leftovers,
    replacing,
    user_cache_dir,
    write_manifest,
)
from modeling_dclip.data.regions import add_regions
from modeling_dclip.data.regions.detectors import RegionDetector, build_detector
from modeling_dclip.data.specs import BATCH, COUNT, SEED, CommandParser
from modeling_dclip.progress import count_of


@dataclass
class RegionArguments:
    """One run of the command line."""

    dataset: str = field(metadata={"help": "Spec of the captions, e.g. coco:captions.json:val2017; see docs/data.md."})
    output: str = field(metadata={"help": "Folder to write; the spec disk:FOLDER reads it."})
    detector: str = field(
        default="ultralytics:yolov8x.pt", metadata={"help": "Spec of the detector; see docs/data.md."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images per call of the detector.", "range": BATCH})
    max_regions: int | None = field(
        default=None,
        metadata={
            "help": "Keep this many boxes per image, those with the highest scores. By default all.",
            "range": COUNT,
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder where boxes are kept for later runs. By default in the user's cache folder."},
    )
    on_bad_image: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "skip: leave out images that cannot be read, and list them in OUTPUT.report.json."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the images that @COUNT draws.", "range": SEED})
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Load YOLO weights whose SHA-256 is not known. Such a file runs code when it is loaded."},
    )


@command
def main(argv: list[str] | None = None) -> Path:
    """Run the command line and return the folder written."""
    parser = CommandParser(RegionArguments, prog="python -m modeling_dclip.data.regions", description=__doc__)
    (arguments,) = parser.parse(argv)
    output = Path(arguments.output)
    if output.exists():
        with holding(output, beside=True):  # a run that was killed after its last step left its lock, too
            remove_leftovers(output.parent)
        raise FileExistsError(f"'{output}' exists. Remove it or name another --output.")
    check_output_folder(output)
    if arguments.cache_dir is not None:
        check_output_folder(arguments.cache_dir)
    dataset = load_captions(arguments.dataset, seed=arguments.seed)  # before a detector is fetched
    detector = build_detector(arguments.detector, trust_checkpoint=arguments.trust_checkpoint)
    with holding(output, beside=True):
        return _write(arguments, dataset, detector, output)


def _write(arguments: RegionArguments, dataset: Dataset, detector: RegionDetector, output: Path) -> Path:
    report_file = output.with_name(output.name + ".report.json")
    dataset = add_regions(
        dataset,
        detector,
        batch_size=arguments.batch_size,
        cache_dir=arguments.cache_dir or user_cache_dir("regions"),
        max_regions=arguments.max_regions,
        on_bad_image=arguments.on_bad_image,
        report_file=report_file,
    )
    with replacing(output) as folder:
        dataset.save_to_disk(folder)  # pictures go in too
        about = {name: getattr(arguments, name) for name in ("detector", "max_regions", "on_bad_image")}
        write_manifest(folder / MANIFEST_NAME, seed=arguments.seed, data=arguments.dataset, **about)
    boxes = sum(map(len, dataset["box_scores"]))
    told = f"{count_of(len(dataset), 'image')} with {count_of(boxes, 'region')}"
    sys.stdout.write(f"Wrote {told} to {output} (report: {report_file})\n")
    return output


if __name__ == "__main__":
    main()
