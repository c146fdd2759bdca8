"""Fine-grained questions from a spec string, in the schema of [`~modeling_dclip.data.questions.rows`].

| spec | what |
|---|---|
| `scenes[:SPLIT]` | scenes of [`~modeling_dclip.data.questions.hard_negatives`]; options `n`, `seed`, `image_size` |
| `sugarcrepe:JSON_OR_FOLDER:IMAGE_FOLDER` | SugarCrepe on COCO's `val2017` |
| `winoground:EXAMPLES.jsonl:IMAGE_FOLDER` | Winoground's files; its parquet form through `parquet` or `hub` |
| `aro:FILE.json:IMAGE_FOLDER` | ARO: VG-Relation, VG-Attribution, stored order questions; option `min_items` |
| `json:FILE:IMAGE_FOLDER` | one's own: JSON or JSON lines |
| `parquet:GLOB` | one's own with the pictures inside; options `image`, `caption`, `negatives`, `category` |
| `hub:NAME:SPLIT` | a dataset of the Hub, the same options and `config` |

Where pictures are files, `,missing=skip` leaves out and reports those that are not there.
"""

from datasets import Dataset

from modeling_dclip.data.questions.files import read_aro, read_questions, read_sugarcrepe, read_winoground
from modeling_dclip.data.questions.tables import read_item_hub, read_item_tables
from modeling_dclip.data.specs import Source, Spec, parse_spec


def _read_scenes(split: str = "test", *, n: int = 1000, seed: int = 0, image_size: int = 128) -> Dataset:
    from modeling_dclip.data.questions.hard_negatives import (
        load_hard_negatives,  # drawing is needed by this source only
    )

    return load_hard_negatives(split, n=n, seed=seed, image_size=image_size)


QUESTION_SOURCES = {
    "scenes": Source("scenes[:SPLIT]", _read_scenes),
    "sugarcrepe": Source("sugarcrepe:JSON_OR_FOLDER:IMAGE_FOLDER", read_sugarcrepe),
    "winoground": Source("winoground:EXAMPLES.jsonl:IMAGE_FOLDER", read_winoground),
    "aro": Source("aro:FILE.json:IMAGE_FOLDER", read_aro),
    "json": Source("json:FILE:IMAGE_FOLDER", read_questions),
    "parquet": Source("parquet:GLOB", read_item_tables),
    "hub": Source("hub:NAME:SPLIT", read_item_hub),
}


def parse_question_spec(spec: str | Spec) -> Spec:
    """Take a spec of fine-grained questions apart.

    Raises:
        ValueError: If it is wrong; the message lists the known forms.
    """
    return parse_spec(spec, QUESTION_SOURCES)


def load_fine_grained(spec: str | Spec) -> Dataset:
    """Load fine-grained questions.

    Args:
        spec (`str` or [`~modeling_dclip.data.specs.Spec`]): See the table above.

    Returns:
        `datasets.Dataset`: The schema of [`~modeling_dclip.data.questions.rows`], one row a picture.

    Raises:
        FileNotFoundError: If a file, folder or picture is missing.
        ValueError: If the spec is wrong (the message lists the known forms), or a file is malformed; file, entry and
            field are named.

    Example:
        >>> load_fine_grained("scenes:test,n=2")["categories"][0][:1]
        ['swapped_colour']
    """
    return parse_question_spec(spec).build()
