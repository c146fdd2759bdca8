"""Where regions come from: four kinds of detectors behind one interface, by a spec string.

| detector | what | licence |
|---|---|---|
| `ultralytics[:WEIGHTS]` | YOLO weights, default `yolov8x.pt`, through the optional package ultralytics | AGPL-3.0 |
| `transformers:MODEL` | an object-detection checkpoint, with the option `labels` an open-vocabulary one | the checkpoint's |
| `annotations[:INSTANCES.json]` | boxes of a COCO instances file, or without a file the dataset's own `boxes` column | the data's |
| `grid:ROWSxCOLUMNS` | equal cells | |

Options follow as `,key=value`, e.g. `ultralytics:yolov8n.pt,imgsz=320`; they are the keyword arguments of the
detector's class.
"""

from typing import Any

from modeling_dclip.data.annotated_regions import AnnotationDetector, GridDetector
from modeling_dclip.data.network_detectors import RegionDetector, TransformersDetector, UltralyticsDetector
from modeling_dclip.data.specs import Source, parse_spec

DETECTORS = {
    "ultralytics": Source("ultralytics[:WEIGHTS]", UltralyticsDetector),
    "transformers": Source("transformers:MODEL", TransformersDetector),
    "annotations": Source("annotations[:INSTANCES.json]", AnnotationDetector),
    "grid": Source("grid:ROWSxCOLUMNS", GridDetector),
}


def build_detector(spec: str, **options: Any) -> RegionDetector:
    """Build a detector from a spec string.

    Args:
        spec (`str`): See the table above.
        **options: More options, over those in the spec.

    Returns:
        `RegionDetector`: Ready to be called.

    Raises:
        ValueError: If the spec is wrong (the message lists the known forms), or as the detector says.
        ImportError: If ultralytics is asked for and not installed.
        FileNotFoundError: If a file is missing.
    """
    source, fields, spec_options, _ = parse_spec(spec, DETECTORS)
    return source.build(*fields, **{**spec_options, **options})
