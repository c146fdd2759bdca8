"""A search index of pictures in a folder.

| file | content |
|---|---|
| `index.json` | the manifest: the model, the images, counts, names and hashes of the other two files; written last |
| `vectors-<hash>.faiss` | the FAISS index: inner products of unit vectors |
| `images-<hash>.parquet` | `image_id`, `path` and `sha256` of each image, in the order of the vectors |
| `embeddings/` | the embeddings that building computed, kept for adding images later; searching does not read them |

[`~modeling_dclip.hub.index.build.build_index`] writes such a folder, and [`SearchIndex`] searches it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub.utils import WeakFileLock
from PIL import Image

from modeling_dclip.data.files import list_folder, read_json, require_field, temporary_folder, write_json, writing
from modeling_dclip.encoders.fingerprints import hash_file

# The rest is imported where it is needed: PyTorch and datasets take seconds, for which `--help` need not wait.
if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from modeling_dclip.encoders import DualEncoder

MANIFEST, EMBEDDINGS = "index.json", "embeddings"
MANIFEST_FORMAT = 1
LOCK = ".lock"  # held while a build writes the files
FILE_SUFFIXES = {"vectors": "faiss", "images": "parquet"}
IMAGE_COLUMNS = ("image_id", "path", "sha256")


class UnreadableImage(TypedDict):
    """An image that was left out: its id, its file (`None` if a dataset holds its bytes) and the reason."""

    image_id: str
    file: str | None
    reason: str


class IndexedFile(TypedDict):
    """The name of a file of an index, and its SHA-256."""

    name: str
    sha256: str


class Change(TypedDict):
    """Pictures that are new, changed, gone or kept since the index that was there: how many, and the first of them."""

    count: int
    first: list[str]


Manifest = TypedDict(
    "Manifest",
    {
        "format": int,
        "model": str,  # the absolute path of a folder, or a Hub id
        "revision": str,
        "encoder": str,  # the key of the weights and the image settings
        "images": str,  # the absolute path of a folder, or a dataset's spec
        "n": int,
        "dim": int,
        "index": str,
        "effort": int | None,
        "recall@10": float | None,
        "computed": int,  # images that this build embedded
        "processes": int,
        "changes": dict[str, Change] | None,  # by `new`, `changed`, `gone`, `kept`; `None` for a first build
        "skipped": list[UnreadableImage],
        "notes": list[str],  # what the build has to say of the index, in sentences
        "versions": dict[str, str],
        "files": dict[str, IndexedFile],
    },
)


# What the manifest's fields must be for a search, and for another build beside it.
_MANIFEST_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "encoder": str,
    "images": str,
    "n": int,
    "dim": int,
    "effort": (int, type(None)),
    "files": dict,
}


class Hit(NamedTuple):
    """A picture that a search found.

    Args:
        score (`float`): The cosine to the query, in [-1, 1].
        image_id (`str`): The picture's id.
        path (`str`, *optional*): The picture's file; `None` if a dataset holds its bytes.
        name (`str`): The file as seen from the folder that was indexed; the id where there is no file.
    """

    score: float
    image_id: str
    path: str | None
    name: str


def is_picture_file(query: str | Path | Image.Image) -> bool:
    """Whether what is looked for is the file of a picture: a `Path`, or a text that ends as the names of pictures do.

    Example:
        >>> is_picture_file("a dog"), is_picture_file("dog.jpg")
        (False, True)
    """
    from modeling_dclip.data.images import has_image_suffix

    return isinstance(query, Path) or (isinstance(query, str) and has_image_suffix(query))


def read_query(query: str | Path | Image.Image) -> str | Image.Image:
    """Take what is looked for: words, or a picture.

    Args:
        query (`str`, `Path` or `PIL.Image.Image`): A text that ends as the names of pictures do (`.jpg`, `.png`, ...)
            and a `Path` are the file of a picture; any other text is words.

    Returns:
        `str` or `PIL.Image.Image`: The words, stripped, or the picture, upright in RGB.

    Raises:
        FileNotFoundError: If there is no such picture.
        ValueError: If there are no words, they are the path of a folder or of another file, or the picture is damaged.
    """
    if isinstance(query, Image.Image):
        return query
    if is_picture_file(query):
        from modeling_dclip.evaluation.embedding import open_picture

        return open_picture(query)
    query = str(query)
    if not query.strip():
        raise ValueError("Expected words or a picture to look for, got an empty text. Say what the picture shows.")
    if "/" in query and Path(query).exists():
        raise ValueError(f"Expected words or the path of a picture, got '{query}', which is a folder or another file.")
    return query.strip()


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of an index.

    Args:
        folder (`str` or `Path`): The folder of the index.

    Returns:
        [`Manifest`]

    Raises:
        FileNotFoundError: If there is no index.
        ValueError: If the manifest is damaged or has another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected an index with {MANIFEST} in '{folder}', got none. Build one with `python -m "
            f"modeling_dclip.hub.index --model MODEL --images FOLDER --output {folder}`. If a build was killed, start "
            "it again, and it continues."
        )
    manifest = read_json(path, "manifest", advice="It is damaged: delete it and build the index again.")
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"Expected an index of format {MANIFEST_FORMAT} in '{path}', got {found!r}. Build it again.")
    for name, kind in _MANIFEST_KINDS.items():
        require_field(manifest, name, "The object", path, kind)
    for file in FILE_SUFFIXES:
        entry = require_field(manifest["files"], file, "Under 'files', the object", path, dict)
        for name in ("name", "sha256"):
            require_field(entry, name, f"Under 'files', {file!r}", path, str)
    return cast("Manifest", manifest)


def write_index(
    folder: Path, vectors: Any, columns: Mapping[str, Sequence[str | None]], manifest: Mapping[str, Any]
) -> None:
    """Write the vectors, the images' table, and last the manifest that names them.

    A reader sees the old index or the new one. Several builds of one folder write one after the other; the last one
    stays.

    Args:
        folder (`Path`): The folder of the index.
        vectors: A FAISS index.
        columns (`Mapping[str, Sequence]`): The columns [`IMAGE_COLUMNS`] of the parquet file.
        manifest (`Mapping[str, Any]`): The [`Manifest`] without `files`.
    """
    from modeling_dclip.evaluation.benchmarks.retrieval_index import find_faiss

    faiss = find_faiss("faiss")
    schema = pa.schema([(name, pa.string()) for name in IMAGE_COLUMNS])
    files: dict[str, IndexedFile] = {}
    with writing(folder), temporary_folder(folder, prefix=".new.") as scratch, WeakFileLock(folder / LOCK):
        written = {kind: scratch / f"{kind}.{suffix}" for kind, suffix in FILE_SUFFIXES.items()}
        faiss.write_index(vectors, str(written["vectors"]))
        pq.write_table(pa.table(columns, schema=schema), written["images"])
        for kind, path in written.items():
            digest = hash_file(path)
            files[kind] = IndexedFile(name=f"{kind}-{digest[:12]}{path.suffix}", sha256=digest)
            path.replace(folder / files[kind]["name"])
        write_json(folder / MANIFEST, {**manifest, "files": files}, indent=2)
        named = {entry["name"] for entry in files.values()}
        for kind, suffix in FILE_SUFFIXES.items():
            for old in list_folder(folder, f"{kind}-*.{suffix}"):
                if old.name not in named:
                    old.unlink()


class SearchIndex:
    """An opened index. The model is loaded with the first query.

    Args:
        folder (`Path`): The folder of the index.
        manifest ([`Manifest`]): As [`read_manifest`] returns it.
        vectors: The FAISS index.
        rows (`pyarrow.Table`): The images, in the order of the vectors.
        model (`str`): The model that embeds the queries.
        images (`str`): Where the pictures are: a folder, or a dataset's spec.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        vectors: Any,
        rows: pa.Table,
        model: str,
        images: str,
        trust_remote_code: bool = False,
    ):
        self.folder, self.manifest, self.vectors, self.rows = folder, manifest, vectors, rows
        self.model, self.images, self.trust_remote_code = model, images, trust_remote_code
        self._encoder: tuple[DualEncoder, Any] | None = None
        self._dataset: tuple[Dataset, dict[str, int]] | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        model: str | None = None,
        images: str | None = None,
        verify: bool = True,
        trust_remote_code: bool = False,
    ) -> "SearchIndex":
        """Open an index.

        Args:
            folder (`str` or `Path`): A folder that [`~modeling_dclip.hub.index.build.build_index`] wrote.
            model (`str`, *optional*): Where the model is now, if it has moved. It must be the model that embedded the
                images.
            images (`str`, *optional*): Where the pictures are now, if they have moved: a folder, or a dataset's spec.
            verify (`bool`, *optional*, defaults to `True`): Compare the files' hashes with the manifest's, which takes
                about a second for each GB.
            trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

        Returns:
            [`SearchIndex`]

        Raises:
            FileNotFoundError: If there is no index, or one of its files is missing.
            ImportError: If `faiss-cpu` is not installed.
            ValueError: If a file is damaged.
        """
        from modeling_dclip.evaluation.benchmarks.retrieval_index import find_faiss

        folder, faiss = Path(folder), find_faiss("faiss")
        manifest = read_manifest(folder)
        paths = _find_files(folder, manifest, verify)
        try:
            vectors, rows = faiss.read_index(str(paths["vectors"])), pq.read_table(paths["images"])
        except (RuntimeError, pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"A file of the index '{folder}' is damaged ({error}). Build it again.") from error
        expected = {"vectors": manifest["n"], "rows": manifest["n"], "width": manifest["dim"]}
        found = {"vectors": vectors.ntotal, "rows": rows.num_rows, "width": vectors.d}
        if expected != found or not set(IMAGE_COLUMNS) <= set(rows.column_names):
            raise ValueError(
                f"Expected {expected} and the columns {list(IMAGE_COLUMNS)} in '{folder}', got {found} and "
                f"{rows.column_names}. Its files are not of one build. Build it again."
            )
        places = (model or manifest["model"], images or manifest["images"])
        index = cls(folder, manifest, vectors, rows, *places, trust_remote_code)
        if (effort := manifest["effort"]) is not None:
            index.set_effort(effort)
        return index

    def __len__(self) -> int:
        return self.vectors.ntotal

    def set_effort(self, effort: int) -> None:
        """Set how much of an approximate index a search looks at. More finds more and takes longer.

        Args:
            effort (`int`): Cells of an inverted file, or candidates of a graph; at least 1.

        Raises:
            ValueError: If the index is exact, or `effort < 1`.
        """
        from modeling_dclip.evaluation.benchmarks.retrieval_index import effort_of, find_faiss

        knob = effort_of(find_faiss("faiss"), self.vectors)
        if knob is None or effort < 1:
            raise ValueError(
                f"Expected an effort >= 1 of an inverted file or a graph, got {effort} for the index "
                f"{self.manifest.get('index')!r} in '{self.folder}'. An exact index has none: leave the effort out."
            )
        holder, name, most = knob
        setattr(holder, name, min(effort, most))

    def encoder(self) -> "tuple[DualEncoder, Any]":
        """Load the model that embedded the images, once.

        Returns:
            `tuple`: The model and its processor.

        Raises:
            ValueError: If it is not the model that embedded the images; else as
                [`~modeling_dclip.encoders.loading.load_dual_encoder`].
        """
        from modeling_dclip.encoders.loading import load_dual_encoder
        from modeling_dclip.hub.index.embeddings import fingerprint_encoder

        if self._encoder is None:
            model, processor, revision = load_dual_encoder(self.model, trust_remote_code=self.trust_remote_code)
            if (found := fingerprint_encoder(model, processor)) != self.manifest["encoder"]:
                raise ValueError(
                    f"The index '{self.folder}' is of another model: expected {self.manifest['model']!r} "
                    f"({self.manifest.get('revision')}, encoder {self.manifest['encoder'][:12]}...), got "
                    f"{self.model!r} ({revision}, encoder {found[:12]}...). The embeddings of two models cannot be "
                    "compared. Name the model that the index was built with, or build an index for this one."
                )
            self._encoder = (model, processor)
        return self._encoder

    def warning(self) -> str:
        """What is known to be wrong with the answers: one line where the model only guesses, else an empty text."""
        from modeling_dclip.hub.publish.evaluation import warn_of_chance

        return warn_of_chance(self.model, self.manifest.get("revision", ""))

    def search(self, query: str | Path | Image.Image, top_k: int = 10, *, keep_same: bool = False) -> list[Hit]:
        """Find the images nearest to a text or to a picture.

        Args:
            query (`str`, `Path` or `PIL.Image.Image`): As for [`read_query`].
            top_k (`int`, *optional*, defaults to 10): The number of images to return, if the index has as many.
            keep_same (`bool`, *optional*, defaults to `False`): Also return the images of [`copies_of`], which would
                come first. Those of a `PIL.Image.Image`, which is no file, are always returned.

        Returns:
            `list[Hit]`: Best first. An approximate index may find fewer, or none.

        Raises:
            FileNotFoundError: If there is no such picture.
            ValueError: If the text is empty, the picture is damaged, `top_k < 1`, or the model is not the one that
                embedded the images.
        """
        from modeling_dclip.evaluation.embedding import embed_query

        if top_k < 1:
            raise ValueError(f"Expected top_k >= 1, got {top_k}.")
        picture = read_query(query)
        same = set() if keep_same else {hit.image_id for hit in self.copies_of(query)}
        hits = self.nearest(embed_query(*self.encoder(), picture), top_k + len(same))
        return [hit for hit in hits if hit.image_id not in same][:top_k]

    def copies_of(self, query: str | Path | Image.Image) -> list[Hit]:
        """The images whose file has the same content as a picture's: the picture itself, if it is in the index.

        Args:
            query (`str`, `Path` or `PIL.Image.Image`): As for [`read_query`]. Words and a `PIL.Image.Image` have no
                file, and no copies.

        Returns:
            `list[Hit]`: In the order of the index. The scores are NaN.

        Raises:
            OSError: If the picture's file cannot be read.
        """
        if not is_picture_file(query):
            return []
        equal = pc.equal(self.rows["sha256"], hash_file(Path(cast("str | Path", query))))
        return self.hits(pc.indices_nonzero(equal).to_pylist())

    def nearest(self, query_embeds: "torch.Tensor", top_k: int = 10) -> list[Hit]:
        """Find the images nearest to an embedding.

        Args:
            query_embeds (`torch.Tensor` of shape `(1, D)`): float32, L2-normalised, on the CPU.
            top_k (`int`, *optional*, defaults to 10): As for [`search`].

        Returns:
            `list[Hit]`: Best first.
        """
        scores, rows = self.vectors.search(query_embeds.numpy(), min(top_k, len(self)))
        found = [(float(score), int(row)) for score, row in zip(scores[0], rows[0], strict=True) if row >= 0]
        table = self.rows.take([row for _, row in found]).to_pylist()
        return [self._hit(score, row) for (score, _), row in zip(found, table, strict=True)]

    def hits(self, rows: Sequence[int]) -> list[Hit]:
        """Images by their place in the index, without a query: the scores are NaN.

        Args:
            rows (`Sequence[int]`): Each in [0, len(self)).
        """
        return [self._hit(float("nan"), row) for row in self.rows.take(list(rows)).to_pylist()]

    def _hit(self, score: float, row: Mapping[str, Any]) -> Hit:
        path, name, indexed = row["path"], row["image_id"], self.manifest["images"]
        if path is not None and PurePath(path).is_relative_to(indexed):
            name = str(PurePath(path).relative_to(indexed))
            path = os.path.join(self.images, name)
        elif self.images != indexed:  # a dataset that has moved: its rows say where the pictures are now
            path = None
        return Hit(score, row["image_id"], path, name)

    def picture(self, hit: Hit) -> Image.Image:
        """Read the picture of a hit, from its file or from the dataset that was indexed.

        Args:
            hit ([`Hit`]): Of this index.

        Returns:
            `PIL.Image.Image`: Upright, in RGB.

        Raises:
            UnreadableImageError: If it is gone or damaged by now.
        """
        from modeling_dclip.data.images import MissingImageError, decode_image, open_image, undecoded_images

        if hit.path is not None:
            return open_image(hit.path, f"'{hit.name}'", advice="Build the index again if the pictures have changed.")
        if self._dataset is None:
            from modeling_dclip.hub.index.build import load_pictures

            dataset = undecoded_images(load_pictures(self.images))
            self._dataset = dataset, {image_id: row for row, image_id in enumerate(dataset["image_id"])}
        dataset, row_of = self._dataset
        if hit.image_id not in row_of:
            raise MissingImageError(
                f"{hit.image_id!r} is no longer in {self.images!r}. Build the index again.", "it is no longer there"
            )
        return decode_image(dataset, row_of[hit.image_id])


def _find_files(folder: Path, manifest: Manifest, verify: bool) -> dict[str, Path]:
    """The files that a manifest names, by their kind; with `verify` their content is compared with its hash."""
    files = {kind: manifest["files"][kind] for kind in FILE_SUFFIXES}
    for name, digest in ((entry["name"], entry["sha256"]) for entry in files.values()):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise FileNotFoundError(
                f"Expected the file {name!r} that {MANIFEST} names in '{folder}', got none. Build the index again."
            )
        if verify and (found := hash_file(path)) != digest:
            raise ValueError(
                f"'{path}' is damaged: expected the SHA-256 {digest[:12]}..., got {found[:12]}.... Delete it and "
                "build the index again. Embeddings that are there are not computed again."
            )
    return {kind: folder / entry["name"] for kind, entry in files.items()}
