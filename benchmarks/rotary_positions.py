"""How to give a trained CLIP rotary positions without breaking it, and whether other sizes of the picture gain by it.

    python train.py --recipe recipes/rotary_positions.yaml
    python benchmarks/rotary_positions.py --runs outputs/rotary_positions

First every variant at step 0, at the anchor's own size, on the validation split of the drawn scenes: what is left of
the CLIP when its table of positions is kept or replaced, and patches rotate by so many radians. Then, on the test
split and at several sizes, the anchor and what training made of it. Scenes are drawn at 128 pixels, and the image
processor makes them the size that is asked for; absolute positions are interpolated.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from modeling_dclip import DCLIPConfig, DCLIPModel, DCLIPProcessor
from modeling_dclip.data.failures import command
from modeling_dclip.data.files import list_folder, write_json
from modeling_dclip.data.scenes import CLASS_NAMES, TEMPLATES, load_scenes, load_single_objects
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.retrieval import evaluate_retrieval
from modeling_dclip.evaluation.benchmarks.zero_shot import evaluate_zero_shot
from modeling_dclip.evaluation.records import environment

SCALES = (1.0, 0.3, 0.1)
METRICS = {"text_to_image_recall@1": "retrieval", "image_to_text_recall@1": "retrieval", "top1": "zero_shot"}


@dataclass
class BenchmarkArguments:
    """One run."""

    anchor: str = field(default="recipes/demo_anchor", metadata={"help": "The CLIP at step 0."})
    runs: str | None = field(
        default=None, metadata={"help": "Folder of the recipe's runs: ARM/seed-N/student for its arms and seeds."}
    )
    sizes: list[int] = field(
        default_factory=lambda: [36, 48, 60, 84, 120], metadata={"help": "Sides of the picture in pixels."}
    )
    scenes: int = field(default=1000, metadata={"help": "Scenes of each split."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    output: str = field(
        default="benchmarks/results/rotary_positions.json", metadata={"help": "Results file; replaced if it is there."}
    )


class AnySize(torch.nn.Module):
    """A dual encoder whose absolute positions are interpolated to the picture."""

    def __init__(self, model: DCLIPModel):
        super().__init__()
        self.model, self.config = model, model.config
        self.device, self.dtype = model.device, model.dtype
        self.get_text_features = model.get_text_features

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        """As the model's, at any size."""
        return self.model.get_image_features(pixel_values=pixel_values, interpolate_pos_encoding=True)


def load(folder: str | Path, **vision: Any) -> DCLIPModel:
    """A model in float32, with other fields of its image encoder's configuration."""
    config = DCLIPConfig.from_pretrained(folder)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    return DCLIPModel.from_pretrained(folder, config=config).float().eval()


def measure(model: DCLIPModel, processor: DCLIPProcessor, size: int, data: dict[str, Any]) -> dict[str, float]:
    """Retrieval and zero-shot accuracy at one size."""
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    encoder = Encoder(AnySize(model), processor, batch_size=100)
    found = {
        "retrieval": evaluate_retrieval(encoder, data["scenes"]),
        "zero_shot": evaluate_zero_shot(encoder, data["objects"], CLASS_NAMES, TEMPLATES),
    }
    return {name: found[kind][name] for name, kind in METRICS.items()}


def starts(anchor: str, data: dict[str, Any], processor: DCLIPProcessor) -> list[dict[str, Any]]:
    """Every variant of the untrained anchor at its own size."""
    variants: list[dict[str, Any]] = [{"position_embedding_type": "absolute"}]
    for table in (False, True):
        for scale in SCALES:
            variants.append({"position_embedding_type": "rope", "rotary_table": table, "rotary_scale": scale})
    rows = []
    for variant in variants:
        model = load(anchor, **variant)
        metrics = measure(model, processor, model.config.vision_config.image_size, data)
        rows.append({**variant, "metrics": metrics})
    return rows


def by_size(
    folder: str | Path, name: str, seed: int, sizes: list[int], data: dict[str, Any], **vision: Any
) -> list[dict[str, Any]]:
    """A model at every size."""
    model, processor = load(folder, **vision), DCLIPProcessor.from_pretrained(folder)
    return [
        {"model": name, "seed": seed, "size": size, "metrics": measure(model, processor, size, data)} for size in sizes
    ]


def load_data(split: str, scenes: int) -> dict[str, Any]:
    """Scenes for retrieval, single objects for classification."""
    return {
        "scenes": load_scenes(split, n=scenes, max_siblings=1, seed=1),
        "objects": load_single_objects(split, seed=1),
    }


@command
def main() -> None:
    """Measure, and write the results file."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    start = starts(args.anchor, load_data("validation", args.scenes), DCLIPProcessor.from_pretrained(args.anchor))
    test, rows = load_data("test", args.scenes), []
    kept = {"position_embedding_type": "rope", "rotary_table": True, "rotary_scale": 0.3}
    rows += by_size(args.anchor, "absolute, untrained", 0, args.sizes, test)
    rows += by_size(args.anchor, "rope, untrained", 0, args.sizes, test, **kept)
    for folder in sorted(list_folder(args.runs, "*/seed-*/student")) if args.runs is not None else []:
        arm, seed = folder.parent.parent.name, int(folder.parent.name.removeprefix("seed-"))
        rows += by_size(folder, f"{arm}, trained", seed, args.sizes, test)
    versions, hardware = environment()
    result = {"arguments": asdict(args), "start": start, "sizes": rows, "versions": versions, "hardware": hardware}
    write_json(Path(args.output), result, indent=2)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
