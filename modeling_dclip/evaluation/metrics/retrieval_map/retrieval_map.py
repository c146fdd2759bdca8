"""Mean average precision of image-text retrieval, as a module of Hugging Face's `evaluate`;
computed by this package's own retrieval metrics.
"""

import datasets
import evaluate
import numpy as np
import torch

from modeling_dclip.evaluation.benchmarks.retrieval import embeddings_of_pairs, retrieval_metrics

_CITATION = """\
@book{manning2008introduction,
  title = {Introduction to Information Retrieval},
  author = {Manning, Christopher D. and Raghavan, Prabhakar and Sch{\\"u}tze, Hinrich},
  publisher = {Cambridge University Press},
  year = {2008}
}
"""

_DESCRIPTION = """\
Mean average precision of image-text retrieval over all right answers, without a cut-off, and the mean reciprocal rank
of the first one. From texts the two are equal, as a caption has one image; some papers call the second MAP from images
too. Similarity is the cosine, computed in float32; ties count against the model. Memory does not grow with images
times captions.
"""

_INPUTS = """
One row for each caption:
    image_embeds (`list[float]`): Embedding of the caption's image, any scale; the same in all rows of one image.
    text_embeds (`list[float]`): Embedding of the caption, of the same width, any scale.
    image_ids (`str` or `int`): The caption's image.
Returns:
    `dict[str, float]`: `text_to_image_map`, `image_to_text_map`, `text_to_image_mrr` and `image_to_text_mrr`, in
        [0, 1].
Raises:
    ValueError: If an embedding is zero or not finite, or an image has two different embeddings.
Example:
    >>> metric = evaluate.load("modeling_dclip/evaluation/metrics/retrieval_map")
    >>> embeds = [[1.0, 0.0], [0.0, 1.0]]
    >>> metric.add_batch(image_embeds=embeds, text_embeds=embeds, image_ids=["cat", "dog"])
    >>> metric.compute()["image_to_text_map"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RetrievalMAP(evaluate.Metric):
    """Mean average precision of image-text retrieval in both directions."""

    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features(
                    {"image_embeds": embedding, "text_embeds": embedding, "image_ids": datasets.Value(kind)}
                )
                for kind in ("string", "int64")
            ],
            reference_urls=["https://nlp.stanford.edu/IR-book/"],
        )

    def _compute(self, image_embeds, text_embeds, image_ids):
        images, texts = (torch.from_numpy(np.array(rows, dtype=np.float32)) for rows in (image_embeds, text_embeds))
        embeddings = embeddings_of_pairs(images, texts, list(image_ids))
        metrics = retrieval_metrics(*embeddings)
        return {name: value for name, value in metrics.items() if name.endswith(("_map", "_mrr"))}
