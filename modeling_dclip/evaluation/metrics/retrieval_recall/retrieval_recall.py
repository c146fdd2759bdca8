"""Recall at k of image-text retrieval, as a module of Hugging Face's `evaluate`;
computed by this package's own retrieval metrics.
"""

import datasets
import evaluate
import numpy as np
import torch

from modeling_dclip.evaluation.benchmarks.retrieval import embeddings_of_pairs, retrieval_metrics

_CITATION = """\
@inproceedings{radford2021learning,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and
    Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and
    Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}
"""

_DESCRIPTION = """\
Recall at k of image-text retrieval, as the CLIP papers count it: from texts, the share of captions whose image is
among the first k of all images; from images, the share of images of whose captions at least one is among the first k
of all captions. Similarity is the cosine, computed in float32; ties count against the model. Memory does not grow with
images times captions.
"""

_INPUTS = """
One row for each caption:
    image_embeds (`list[float]`): Embedding of the caption's image, any scale; the same in all rows of one image.
    text_embeds (`list[float]`): Embedding of the caption, of the same width, any scale.
    image_ids (`str` or `int`): The caption's image.
Args:
    ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs, >= 1.
Returns:
    `dict[str, float]`: `text_to_image_recall@k` and `image_to_text_recall@k`, in [0, 1], and `rsum`, the sum of the
        six, in [0, 6], where 1, 5 and 10 are among the cut-offs.
Raises:
    ValueError: If an embedding is zero or not finite, or an image has two different embeddings.
Example:
    >>> metric = evaluate.load("modeling_dclip/evaluation/metrics/retrieval_recall")
    >>> embeds = [[1.0, 0.0], [0.0, 1.0]]
    >>> metric.add_batch(image_embeds=embeds, text_embeds=embeds, image_ids=["cat", "dog"])
    >>> metric.compute()["text_to_image_recall@1"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RetrievalRecall(evaluate.Metric):
    """Recall at k of image-text retrieval in both directions."""

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
            reference_urls=["https://arxiv.org/abs/2103.00020"],
        )

    def _compute(self, image_embeds, text_embeds, image_ids, ks=(1, 5, 10)):
        images, texts = (torch.from_numpy(np.array(rows, dtype=np.float32)) for rows in (image_embeds, text_embeds))
        embeddings = embeddings_of_pairs(images, texts, list(image_ids))
        metrics = retrieval_metrics(*embeddings, ks=tuple(ks))
        return {name: value for name, value in metrics.items() if "_recall@" in name or name == "rsum"}
