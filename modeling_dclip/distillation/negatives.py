"""Every caption and every image of the training set as a negative, not only those of the batch.

The text tower is frozen and its embeddings of all captions are stored, so all of them can be wrong answers of an
image, exactly. The image encoder changes, so of images the embedding of the last visit counts, and before the first
visit the anchor's. Both stand in a [`Bank`] in float16. Products are taken in tiles, with a running maximum, so that
no matrix of all pairs is held; the gradient of a tile is added up on the way.

Every process takes each step's gathered embeddings, so the banks are the same on all without further communication.

[`HardBatches`] makes the other negatives, those of a batch, harder: it puts images that are near each other together.

Letters in shape comments: B global batch, D embedding, N entries of a bank.

Source: stored embeddings as negatives: "Cross-Batch Memory for Embedding Learning", arXiv 1912.06798 [XBM]; tiles:
"FlashAttention", arXiv 2205.14135; docs/papers.md.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler

from modeling_dclip.data.collation import StudentBatches, random_numbers
from modeling_dclip.data.columns import Ragged
from modeling_dclip.data.files import writing
from modeling_dclip.distillation.losses import FalseTexts

_TILE_NUMBERS = 2**22  # of a tile's largest matrix
_AT_ONCE = 2**14  # entries whose lengths are taken in float64
_STREAM = 4  # of the seed: which entries are drawn; of texts and of images
_ORDER_STREAM = 6  # which rows come first, and which batch
BANK_NAME = "image_bank.safetensors"  # in a checkpoint


class BankTile(NamedTuple):
    """A part of a bank.

    Args:
        start (`int`): The place of its first entry.
        entries (`torch.Tensor` of shape `(S, D)`): Any scale.
        inverse (`torch.Tensor` of shape `(S,)`): One over their lengths.
    """

    start: int
    entries: torch.Tensor
    inverse: torch.Tensor

    def cosines(self, queries: torch.Tensor) -> torch.Tensor:
        """Of unit vectors `(B, D)` with the entries: `(B, S)`."""
        return queries @ self.entries.T * self.inverse

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """The sums `(B, D)` of the entries' unit vectors, weighted by `(B, S)`."""
        return (weights * self.inverse) @ self.entries


class Bank:
    """Embeddings to compare with.

    Args:
        embeds (`torch.Tensor` of shape `(N, D)`): float16, any scale; changed in place by [`put`].

    Example:
        >>> bank = Bank(torch.eye(3).half())
        >>> bank.put(torch.tensor([0]), torch.tensor([[0.0, 2.0, 0.0]]))
        >>> [tile.cosines(torch.eye(3)[:2]).tolist() for tile in bank.tiles(1)]
        [[[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]]
    """

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds
        self._chosen: torch.Tensor | None = None  # entries that count, ascending; all by default
        self._inverse = _inverse_lengths(embeds)

    def __len__(self) -> int:
        return len(self.embeds if self._chosen is None else self._chosen)

    def choose(self, entries: np.ndarray | None) -> None:
        """Let only these entries count, or all."""
        self._chosen = None if entries is None else torch.from_numpy(entries).to(self.embeds.device)

    def put(self, entries: torch.Tensor, embeds: torch.Tensor) -> None:
        """Exchange entries `(B,)` for embeddings `(B, D)`. Those that are not finite are not taken."""
        units = F.normalize(embeds.detach().float(), dim=-1).to(self.embeds.dtype)
        kept = torch.isfinite(units).all(dim=-1, keepdim=True)
        self.embeds[entries] = torch.where(kept, units, self.embeds[entries])
        self._inverse[entries] = _inverse_lengths(self.embeds[entries])

    def restore(self, embeds: torch.Tensor) -> None:
        """Exchange all entries for others in float16 `(N, D)`."""
        self.embeds.copy_(embeds)
        self._inverse.copy_(_inverse_lengths(self.embeds))

    def tiles(self, queries: int, dtype: torch.dtype = torch.float32) -> Iterator[BankTile]:
        """All entries that count, in parts.

        Args:
            queries (`int`): Rows that each tile is compared with; more of them make smaller tiles.
            dtype (`torch.dtype`, *optional*): Of the tiles' numbers.
        """
        size = max(1, _TILE_NUMBERS // max(queries, self.embeds.shape[1]))
        for start in range(0, len(self), size):
            place: Any = slice(start, start + size)
            place = place if self._chosen is None else self._chosen[place]
            yield BankTile(start, self.embeds[place].to(dtype), self._inverse[place].to(dtype))


def _inverse_lengths(embeds: torch.Tensor) -> torch.Tensor:
    parts = [1 / part.double().norm(dim=-1).clamp_min(1e-12) for part in embeds.split(_AT_ONCE)]
    return torch.cat(parts)


class Excluded(NamedTuple):
    """What is no negative of each query, by the places in a bank.

    Args:
        queries, places (`np.ndarray` of shape `(P,)`): Pairs, the places ascending.
        of_all (`np.ndarray` of shape `(K,)`): Places that are no negative of any query.
        near (`tuple`, *optional*): Unit vectors `(B, D)`, and the cosine from which on an entry is too near to one.
    """

    queries: np.ndarray
    places: np.ndarray
    of_all: np.ndarray
    near: tuple[torch.Tensor, float] | None = None

    def mask(self, logits: torch.Tensor, tile: BankTile) -> None:
        """Set a tile's logits `(B, S)` to minus infinity, in place."""
        start = tile.start
        first, last = np.searchsorted(self.places, [start, start + logits.shape[1]])
        if last > first:
            pair = [torch.from_numpy(part[first:last]).to(logits.device) for part in (self.queries, self.places)]
            logits[pair[0], pair[1] - start] = -torch.inf
        inside = self.of_all[(self.of_all >= start) & (self.of_all < start + logits.shape[1])]
        if len(inside):
            logits[:, torch.from_numpy(inside - start).to(logits.device)] = -torch.inf
        if self.near is not None:
            owns, cosine = self.near
            logits[tile.cosines(owns.to(tile.entries.dtype)) >= cosine] = -torch.inf


_NONE = np.zeros(0, np.int64)
NOTHING_EXCLUDED = Excluded(_NONE, _NONE, _NONE)


class _LogSumExp(torch.autograd.Function):
    """Logarithm of the sum of exponentials over a bank: `(B,)`, minus infinity where all is excluded."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, bank: Bank, temperature: float, excluded: Excluded) -> torch.Tensor:
        highest = queries.new_full((len(queries),), -torch.inf)
        total, mean = torch.zeros_like(highest), torch.zeros_like(queries)
        for tile in bank.tiles(len(queries), queries.dtype):
            logits = tile.cosines(queries) / temperature
            excluded.mask(logits, tile)
            top = torch.maximum(highest, logits.amax(dim=1))
            reference = top.masked_fill(top == -torch.inf, 0.0)
            weights, shrunk = (logits - reference[:, None]).exp_(), (highest - reference).exp()
            total = total * shrunk + weights.sum(dim=1)
            if ctx.needs_input_grad[0]:
                mean = mean * shrunk[:, None] + tile.mix(weights)
            highest = top
        ctx.save_for_backward(mean / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None] / temperature)
        return total.log() + highest.masked_fill(highest == -torch.inf, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None, None


class _SumOfSoftplus(torch.autograd.Function):
    """Sum over a bank of softplus(scale * cosine + bias): `(B,)`. What is excluded adds nothing."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, bank: Bank, scale: float, bias: float, excluded: Excluded
    ) -> torch.Tensor:
        total, slope = queries.new_zeros(len(queries)), torch.zeros_like(queries)
        for tile in bank.tiles(len(queries), queries.dtype):
            logits = tile.cosines(queries) * scale + bias
            excluded.mask(logits, tile)
            total = total + F.softplus(logits).sum(dim=1)
            slope = slope + tile.mix(logits.sigmoid()) * scale
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None, None, None


def _unit_vectors(embeds: torch.Tensor) -> torch.Tensor:
    return F.normalize(embeds if embeds.dtype == torch.float64 else embeds.float(), dim=-1)


def bank_contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    banks: tuple[Bank, Bank],
    excluded: tuple[Excluded, Excluded],
    *,
    temperature: float = 0.05,
    image_to_text_weight: float = 0.5,
    right: torch.Tensor | None = None,
    false_texts: FalseTexts | None = None,
) -> torch.Tensor:
    """The contrastive loss against banks: each image prefers its text among all texts, each text its image among all
    images.

    Unlike [`~modeling_dclip.distillation.losses.contrastive_loss`] the number of negatives does not depend on the
    batch. Other right answers are left out, where in a batch all right answers weigh the same.

    Source: [XBM]; InfoNCE as in CLIP. Deviation: texts are exact; their gradient is none, because they are frozen.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        text_embeds (`torch.Tensor` of shape `(B, D)`): Of the images' own texts, any scale; constant.
        banks (`tuple[Bank, Bank]`): Of texts and of images.
        excluded (`tuple[Excluded, Excluded]`): Entries of the text bank that are right for each image, its own text
            among them, and of the image bank that are right for each text; and those of the batch's images, of which
            the fresh embedding counts.
        temperature (`float`, *optional*, defaults to 0.05): Dimensionless, > 0.
        image_to_text_weight (`float`, *optional*, defaults to 0.5): Share of the image-to-text direction, in [0, 1].
        right (`torch.Tensor` of shape `(B, B)`, *optional*): Bool, images (columns) that are right for each text
            (rows) of the batch. By default each text's own.
        false_texts ([`~modeling_dclip.distillation.losses.FalseTexts`], *optional*): More wrong answers in the
            image-to-text direction.

    Returns:
        `torch.Tensor` of shape `()`: In nats, >= 0; float32, or float64 where the images are.

    Raises:
        ValueError: If the temperature is not above 0.

    Example:
        >>> bank, nothing = Bank(torch.tensor([[0.0, 1.0]]).half()), (NOTHING_EXCLUDED, NOTHING_EXCLUDED)
        >>> own = torch.tensor([[1.0, 0.0]])
        >>> round(float(bank_contrastive_loss(own, own, (bank, bank), nothing, temperature=1.0)), 4)
        0.3133
    """
    if not temperature > 0:
        raise ValueError(f"Expected temperature > 0, got {temperature}.")
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = _unit_vectors(image_embeds), _unit_vectors(text_embeds.detach())
        logits = texts @ images.T / temperature  # (B, B): text rows, image columns
        own = logits.diagonal()
        itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        wrong = logits.masked_fill(itself if right is None else itself | right, -torch.inf)
        beyond_texts = _LogSumExp.apply(images, banks[0], temperature, excluded[0])
        if false_texts is not None:
            beyond_texts = torch.logaddexp(beyond_texts, false_texts.log_sum_exp(images, temperature))
        beyond_images = _LogSumExp.apply(texts, banks[1], temperature, excluded[1])
        image_to_text_loss = (torch.logaddexp(own, beyond_texts) - own).mean()
        every = torch.cat([own[:, None], wrong, beyond_images[:, None]], dim=1)
        text_to_image_loss = (every.logsumexp(dim=1) - own).mean()
        return image_to_text_weight * image_to_text_loss + (1 - image_to_text_weight) * text_to_image_loss


def bank_sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    bank: Bank,
    excluded: Excluded,
    logit_scale: float,
    logit_bias: float,
    false_texts: FalseTexts | None = None,
) -> torch.Tensor:
    """SigLIP's loss against a bank of texts: ask of each image and each text of the bank whether they belong together.

    Pairs do not compete, so an image's pairs with all texts are all that reaches its embedding: no bank of images is
    needed. Other right answers are left out.

    Source: [SigLIP] eq. 1; docs/papers.md. Deviation: the texts of the bank in place of the batch's.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        text_embeds (`torch.Tensor` of shape `(B, D)`): Of the images' own texts, any scale; constant.
        bank ([`Bank`]): Of texts.
        excluded ([`Excluded`]): What is right for each image, its own text among it.
        logit_scale (`float`): Logarithm of what multiplies the cosines, as the model stores it.
        logit_bias (`float`): Added to each product.
        false_texts ([`~modeling_dclip.distillation.losses.FalseTexts`], *optional*): More wrong pairs.

    Returns:
        `torch.Tensor` of shape `()`: In nats an image, >= 0; float32, or float64 where the images are.

    Example:
        >>> bank = Bank(torch.tensor([[0.0, 1.0]]).half())
        >>> own = torch.tensor([[1.0, 0.0]])
        >>> round(float(bank_sigmoid_loss(own, own, bank, NOTHING_EXCLUDED, 0.0, 0.0)), 4)
        1.0064
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = _unit_vectors(image_embeds), _unit_vectors(text_embeds.detach())
        scale = float(np.exp(logit_scale))
        own = F.softplus(-((images * texts).sum(dim=-1) * scale + logit_bias))
        losses = own + _SumOfSoftplus.apply(images, bank, scale, logit_bias, excluded)
        if false_texts is not None:
            losses = losses + false_texts.sum_of_softplus(images, scale, logit_bias)
        return losses.mean()


def bank_similarity_loss(
    student_embeds: torch.Tensor,
    teacher_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    banks: tuple[Bank, Bank, Bank],
    excluded: Excluded,
    *,
    temperatures: tuple[float, float],
    image_to_text_weight: float = 0.5,
) -> torch.Tensor:
    """Make the student rank all texts for each image, and all images for each text, as the teacher does.

    KL from the teacher's to the student's softmax, as
    [`~modeling_dclip.distillation.losses.similarity_distillation_loss`] over the batch. Right answers are not left
    out.

    Source: [MC] eq. 2; docs/papers.md. Deviation: banks in place of the batch.

    Args:
        student_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; normalised here. Gradient flows.
        teacher_embeds (`torch.Tensor` of shape `(B, D)`): Any scale; constant.
        text_embeds (`torch.Tensor` of shape `(B, D)`): Of the images' own texts, any scale; constant.
        banks (`tuple[Bank, Bank, Bank]`): Of texts, of the student's images, and of the teacher's in the same places.
        excluded ([`Excluded`]): Places of the batch's images, of which the fresh embedding counts.
        temperatures (`tuple[float, float]`): Of the student's softmax and of the teacher's, > 0.
        image_to_text_weight (`float`, *optional*, defaults to 0.5): Share of the image-to-text direction, in [0, 1].

    Returns:
        `torch.Tensor` of shape `()`: In nats, >= 0 but for rounding; float32, or float64 where the student is.
    """
    texts_bank, student_bank, teacher_bank = banks
    own, teacher = temperatures
    with torch.autocast(student_embeds.device.type, enabled=False):
        images, targets, texts = map(_unit_vectors, (student_embeds, teacher_embeds.detach(), text_embeds.detach()))
        with torch.no_grad():
            expected, teacher_sum = _softmax_mean(targets, texts_bank, teacher)
            information = (targets * expected).sum(dim=-1) / teacher - teacher_sum
        student_sum = _LogSumExp.apply(images, texts_bank, own, NOTHING_EXCLUDED)
        image_to_text_loss = (information - (images * expected).sum(dim=-1) / own + student_sum).mean()
        logits, wanted = texts @ images.T / own, texts @ targets.T / teacher  # (B, B): text rows, image columns
        with torch.no_grad():
            stored = _expectations(texts, (student_bank, teacher_bank), temperatures, excluded)
        student_sum = torch.logaddexp(logits.logsumexp(dim=1), stored.student_sum)
        teacher_sum = torch.logaddexp(wanted.logsumexp(dim=1), stored.teacher_sum)
        shares, rest = (wanted - teacher_sum[:, None]).exp(), (stored.teacher_sum - teacher_sum).exp()
        gap = (shares * (wanted - logits)).sum(dim=1) + rest * stored.gap
        text_to_image_loss = (gap - teacher_sum + student_sum).mean()
        return image_to_text_weight * image_to_text_loss + (1 - image_to_text_weight) * text_to_image_loss


def _softmax_mean(queries: torch.Tensor, bank: Bank, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of a bank's unit vectors under each query's softmax `(B, D)`, and the logarithm of its sum `(B,)`."""
    queries = queries.detach().requires_grad_()
    with torch.enable_grad():
        total = _LogSumExp.apply(queries, bank, temperature, NOTHING_EXCLUDED)
        (slope,) = torch.autograd.grad(total.sum(), queries)
    return slope * temperature, total.detach()


class _Expectations(NamedTuple):
    """Of each text over the images of a bank `(B,)`: logarithms of both softmaxes' sums, and the mean difference of
    teacher's and student's logits under the teacher's softmax.
    """

    student_sum: torch.Tensor
    teacher_sum: torch.Tensor
    gap: torch.Tensor


def _expectations(
    texts: torch.Tensor, banks: tuple[Bank, Bank], temperatures: tuple[float, float], excluded: Excluded
) -> _Expectations:
    student_sum = texts.new_full((len(texts),), -torch.inf)
    teacher_sum, gap = student_sum.clone(), torch.zeros_like(student_sum)
    for student, teacher in zip(*(bank.tiles(len(texts), texts.dtype) for bank in banks), strict=True):
        logits, wanted = student.cosines(texts) / temperatures[0], teacher.cosines(texts) / temperatures[1]
        difference = wanted - logits
        for one in (logits, wanted):
            excluded.mask(one, student)
        student_sum = torch.logaddexp(student_sum, logits.logsumexp(dim=1))
        tile_sum = wanted.logsumexp(dim=1)
        total = torch.logaddexp(teacher_sum, tile_sum)
        reference = total.masked_fill(total == -torch.inf, 0.0)
        weights = (wanted - reference[:, None]).exp()
        gap = gap * (teacher_sum - reference).exp() + (weights * difference).sum(dim=1)
        teacher_sum = total
    return _Expectations(student_sum, teacher_sum, gap)


class StepNegatives(NamedTuple):
    """What the rows of one step are compared with.

    Args:
        texts ([`Excluded`]): Of the text bank, for each image.
        images ([`Excluded`]): Of the image bank, for each text.
        batch_images ([`Excluded`]): Of the image bank, the batch's images alone.
        right (`torch.Tensor` of shape `(B, B)`, *optional*): Images of the batch that are right for each text.
    """

    texts: Excluded
    images: Excluded
    batch_images: Excluded
    right: torch.Tensor | None = None


class Negatives:
    """The banks of a training, and what in them is no negative of a step's rows.

    No negatives of an image are its own captions and captions of the same words, whichever image they belong to; none
    of a caption are the images that have it. Images without captions are negatives too.

    Args:
        batches ([`~modeling_dclip.data.collation.StudentBatches`]): Of the training rows, made with `bank`.
        device (`torch.device`): Where the banks lie.
        limit (`int`): Most texts, and most images, that a step is compared with. Where there are more, each epoch
            draws as many.
        max_similarity (`float`): Texts whose cosine to an image's own text is at least this are no negatives; above 1
            all others are.
    """

    def __init__(self, batches: StudentBatches, device: torch.device, limit: int, max_similarity: float):
        self.batches, self.limit, self.max_similarity, self._epoch = batches, limit, max_similarity, -1
        if batches.caption_classes is None:
            raise ValueError("Expected batches that name their captions, made with `bank`.")
        self._classes = classes = batches.caption_classes
        captioned = classes >= 0
        rows = np.repeat(np.arange(len(batches)), batches.captions_per_row)[captioned]
        self._classes_of_row = _group(rows, classes[captioned], len(batches))
        self._texts_of_class = _group(classes[captioned], np.arange(len(rows)), int(classes.max(initial=-1)) + 1)
        self._rows_of_class = _group(classes[captioned], rows, len(self._texts_of_class.lengths))
        columns = {name: embeds.values for name, embeds in batches.columns.items()}
        self.texts = Bank(torch.from_numpy(columns["text_embeds"][captioned]).to(device))
        self.images = Bank(torch.tensor(columns["anchor_embeds"], device=device))  # a copy, which changes
        self.teacher: Bank | None = None
        if "teacher_embeds" in columns:
            self.teacher = Bank(_mean_by_row(columns["teacher_embeds"], batches.captions_per_row).to(device))
        self._chosen: dict[str, np.ndarray | None] = {}

    def choose(self) -> None:
        """Draw what counts in this epoch where a bank is larger than the limit."""
        if self.batches.epoch == self._epoch:
            return
        self._epoch = self.batches.epoch
        for name, stream in (("texts", _STREAM), ("images", _STREAM + 1)):
            entries = len(getattr(self, name).embeds)
            self._chosen[name] = None
            if entries > self.limit:
                order = random_numbers(self.batches.seed, self._epoch, np.arange(entries), stream)
                self._chosen[name] = np.sort(np.argpartition(order, self.limit)[: self.limit])
            for bank in (self.texts,) if name == "texts" else filter(None, (self.images, self.teacher)):
                bank.choose(self._chosen[name])

    def find(self, rows: torch.Tensor, captions: torch.Tensor | None, text_embeds: torch.Tensor) -> StepNegatives:
        """What is no negative of a step's rows. It waits for the device, which holds the rows.

        Args:
            rows (`torch.Tensor` of shape `(B,)`): Of the training images.
            captions (`torch.Tensor` of shape `(B,)`, *optional*): Indices of the drawn captions among those of all
                rows; `None` for rows of another dataset, to which all is wrong.
            text_embeds (`torch.Tensor` of shape `(B, D)`): Of these captions.
        """
        self.choose()
        if captions is None:
            return StepNegatives(NOTHING_EXCLUDED, NOTHING_EXCLUDED, NOTHING_EXCLUDED)
        images, classes = rows.cpu().numpy(), self._classes[captions.cpu().numpy()]
        near = None if self.max_similarity > 1 else (_unit_vectors(text_embeds.detach()), self.max_similarity)
        query, own = _expand(self._classes_of_row, images)
        through, texts = _expand(self._texts_of_class, own)
        owner, right = _expand(self._rows_of_class, classes)
        places, kept = self._places("images", images)
        return StepNegatives(
            self._exclude("texts", query[through], texts, near=near),
            self._exclude("images", owner, right, of_all=np.unique(places[kept])),
            self._exclude("images", owner[:0], right[:0], of_all=np.unique(places[kept])),
            _right_in_batch(images, owner, right).to(rows.device),
        )

    def _exclude(self, bank: str, queries: np.ndarray, entries: np.ndarray, **more: Any) -> Excluded:
        places, kept = self._places(bank, entries)
        order = np.argsort(places[kept], kind="stable")
        return Excluded(queries[kept][order], places[kept][order], **{"of_all": entries[:0], **more})

    def _places(self, bank: str, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where entries stand among those that count, and which of them do."""
        chosen = self._chosen[bank]
        if chosen is None:
            return entries, np.ones(len(entries), bool)
        places = np.searchsorted(chosen, entries).clip(max=len(chosen) - 1)
        return places, chosen[places] == entries

    def remember(self, rows: torch.Tensor, image_embeds: torch.Tensor) -> None:
        """Take the fresh embeddings `(B, D)` of images, as all processes gathered them."""
        self.images.put(rows, image_embeds)

    def save(self, folder: Path) -> None:
        """Save what training changes: the images' embeddings. The rest comes from the stored targets."""
        with writing(folder / BANK_NAME):
            save_file({"images": self.images.embeds.cpu()}, folder / BANK_NAME)

    def load(self, folder: Path) -> None:
        """Go on from what [`save`] wrote.

        Raises:
            ValueError: If it is not there or of other images.
        """
        if not (folder / BANK_NAME).is_file():
            raise ValueError(f"'{folder / BANK_NAME}' is missing")
        saved = load_file(folder / BANK_NAME)["images"]
        if saved.shape != self.images.embeds.shape:
            raise ValueError(
                f"'{folder / BANK_NAME}': expected embeddings {tuple(self.images.embeds.shape)}, got "
                f"{tuple(saved.shape)}."
            )
        self.images.restore(saved)


def _group(keys: np.ndarray, values: np.ndarray, count: int) -> Ragged:
    """The different values of each key from 0 to `count - 1`, ascending."""
    pairs = np.unique(np.stack([keys, values], axis=1), axis=0)
    return Ragged.from_lengths(pairs[:, 1], np.bincount(pairs[:, 0], minlength=count))


def _expand(of: Ragged, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All values of some keys, and for each the place of its key among those asked for.

    Example:
        >>> of = Ragged.from_lengths(np.array([5, 6, 7]), np.array([1, 0, 2]))
        >>> [part.tolist() for part in _expand(of, np.array([2, 0]))]
        [[0, 0, 1], [6, 7, 5]]
    """
    lengths = of.lengths[keys]
    owner = np.repeat(np.arange(len(keys)), lengths)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return owner, of.values[np.repeat(of.offsets[keys], lengths) + within]


def _mean_by_row(values: np.ndarray, counts: np.ndarray) -> torch.Tensor:
    """The mean direction of each row's embeddings, float16."""
    units = F.normalize(torch.tensor(values).float(), dim=-1)
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    sums = torch.zeros(len(counts), units.shape[1]).index_add_(0, rows, units)
    return F.normalize(sums, dim=-1).half()


def _right_in_batch(images: np.ndarray, owner: np.ndarray, right: np.ndarray) -> torch.Tensor:
    """Which of the batch's images (columns) are right for each of its texts (rows), from pairs of text and image."""
    order = np.argsort(images, kind="stable")
    first = np.searchsorted(images[order], right)
    found = first < len(images)
    found[found] = images[order][first[found]] == right[found]
    is_right = torch.zeros(len(images), len(images), dtype=torch.bool)
    is_right[torch.from_numpy(owner[found]), torch.from_numpy(order[first[found]])] = True
    same = torch.from_numpy(images[:, None] == images[None])
    return (is_right.float() @ same.float()) > 0  # an image may stand in a batch more than once


def order_hard_batches(embeds: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Put rows that are near each other into one batch.

    All rows are halved again and again, each time along the line between two rows that lie far apart, until each part
    is a batch: a tree of projections, whose cost grows with `N log N`. Which rows begin a split, which batch comes
    first, and which rows are left over, is drawn anew in each epoch.

    Args:
        embeds (`np.ndarray` of shape `(N, D)`): Any scale.
        batch_size (`int`): Rows in a batch, of all processes together.
        seed, epoch (`int`): A pure function of them.

    Returns:
        `np.ndarray` of shape `(N,)`: All rows, batch after batch; those that fill none come last.

    Example:
        >>> rows = order_hard_batches(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]]), 2, seed=0, epoch=0)
        >>> sorted(sorted(batch) for batch in rows.reshape(2, 2).tolist())
        [[0, 2], [1, 3]]
    """
    rows = np.argsort(random_numbers(seed, epoch, np.arange(len(embeds)), _ORDER_STREAM), kind="stable")
    whole = len(rows) // batch_size * batch_size
    parts, batches = [rows[:whole]], []
    while parts:
        part = parts.pop()
        if len(part) <= batch_size:
            batches.append(part)
            continue
        units = embeds[part].astype(np.float32)
        units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
        near_one = units @ units[np.argmin(units @ units[0])]  # far from the first row
        places = near_one - units @ units[np.argmin(near_one)]
        first = np.zeros(len(part), bool)
        first[np.argsort(places, kind="stable")[: len(part) // batch_size // 2 * batch_size]] = True
        parts += [part[first], part[~first]]
    order = np.argsort(random_numbers(seed, epoch, np.arange(len(batches)), _ORDER_STREAM + 1), kind="stable")
    return np.concatenate([*(batches[place] for place in order), rows[whole:]])


class HardBatches(Sampler[int]):
    """The training rows in the order of [`order_hard_batches`], by the anchor's embeddings of the images.

    Args:
        batches ([`~modeling_dclip.data.collation.StudentBatches`]): With the column `anchor_embeds`; tells the epoch.
        batch_size (`int`): Rows in a step, of all processes together.
    """

    def __init__(self, batches: StudentBatches, batch_size: int):
        self.batches, self.batch_size = batches, batch_size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[int]:
        embeds = self.batches.columns["anchor_embeds"].values
        yield from order_hard_batches(embeds, self.batch_size, self.batches.seed, self.batches.epoch).tolist()
