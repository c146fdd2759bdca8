"""Fine-grained questions from a spec string, in the schema of [`~modeling_dclip.data.questions.rows`].

| spec | what |
|---|---|
| `scenes[:SPLIT]` | scenes with [`~modeling_dclip.data.scenes.hard_negatives`]; options `n`, `seed`, `image_size` |
| `sugarcrepe:JSON_OR_FOLDER:IMAGE_FOLDER` | SugarCrepe on COCO's `val2017` |
| `winoground:EXAMPLES.jsonl:IMAGE_FOLDER` | Winoground's files; its parquet form through `parquet` or `hub` |
| `aro:FILE.json:IMAGE_FOLDER` | ARO: VG-Relation, VG-Attribution, stored order questions; option `min_items` |
| `json:FILE:IMAGE_FOLDER` | one's own: JSON or JSON lines |
| `parquet:GLOB` | one's own with the pictures inside; options `image`, `caption`, `negatives`, `category` |
| `hub:NAME:SPLIT` | a dataset of the Hub, the same options and `config` |

Where pictures are files, `,missing=skip` leaves out and reports those that are not there.
"""

import random
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from modeling_dclip.data.questions.files import read_aro, read_questions, read_sugarcrepe, read_winoground
from modeling_dclip.data.questions.rows import QUESTION_FEATURES
from modeling_dclip.data.questions.tables import read_item_hub, read_item_tables
from modeling_dclip.data.specs import Source, Spec, parse_spec


def load_hard_negatives(split: str = "test", *, n: int = 1000, seed: int = 0, image_size: int = 128) -> Dataset:
    """Draw independent scenes, each with one true sentence and one false sentence a category.

    The pictures are those of `scenes:SPLIT,n=N,seed=SEED,max_siblings=0`.

    Args:
        split (`str`, *optional*, defaults to `"test"`): As in [`~modeling_dclip.data.scenes.load_scenes`].
        n (`int`, *optional*, defaults to 1000): Number of scenes; with about 6.2 questions each.
        seed (`int`, *optional*, defaults to 0): Another seed is another dataset.
        image_size (`int`, *optional*, defaults to 128): Side of the stored image in pixels.

    Returns:
        `datasets.Dataset`: The schema of [`~modeling_dclip.data.questions.rows`], one false caption a question: chance
            is 1/2.

    Raises:
        ValueError: If the split is unknown or `n < 1`.
    """
    # Drawing is needed by this source only.
    from modeling_dclip.data.scenes import check_request, encode_png, iterate_scenes
    from modeling_dclip.data.scenes.drawing import draw_scene
    from modeling_dclip.data.scenes.hard_negatives import hard_negatives

    check_request(split, n)
    columns: dict[str, list[Any]] = {name: [] for name in QUESTION_FEATURES}
    scenes = iterate_scenes(split, n, seed, max_siblings=0)
    for index, (scene, rng) in enumerate(tqdm(scenes, total=n, desc=f"Drawing scenes ({split})", unit="image")):
        sentence, negatives = hard_negatives(scene, random.Random(f"hard negatives/{split}/{seed}/{index}"))
        columns["image_id"].append(f"scenes-{split}-{seed}-{index}")
        columns["image"].append(encode_png(draw_scene(scene, rng, image_size)[0]))
        columns["captions"].append([sentence] * len(negatives))
        columns["negative_captions"].append([[negative] for negative in negatives.values()])
        columns["categories"].append(list(negatives))
    return Dataset.from_dict(columns, features=QUESTION_FEATURES)


QUESTION_SOURCES = {
    "scenes": Source("scenes[:SPLIT]", load_hard_negatives),
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
