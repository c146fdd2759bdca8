"""A folder that answers: FAISS vectors, a parquet file that says whose they are, and a manifest of what made both.

| file | what |
|---|---|
| `index.json` | the manifest, written last: model, images, counts, names and hashes of the other two |
| `vectors-<hash>.faiss` | the index of FAISS, inner product of unit vectors |
| `images-<hash>.parquet` | `image_id`, `path`, `sha256` of each, in the order of the vectors |
| `embeddings/` | what building computed, kept so that more images can be added; searching does not need it |
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub.utils import WeakFileLock
from PIL import Image

from modeling_dclip.data.files import replacing
from modeling_dclip.encoders.fingerprints import hash_file
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.benchmarks.retrieval_index import effort_of, find_faiss
from modeling_dclip.evaluation.embedding import embed_query, open_picture
from modeling_dclip.hub.index.embeddings import fingerprint_encoder

MANIFEST, EMBEDDINGS = "index.json", "embeddings"
LOCK = ".lock"  # of the files, while one build writes them
SUFFIXES = {"vectors": "faiss", "images": "parquet"}
FORMAT = 1
COLUMNS = ("image_id", "path", "sha256")


class Hit(NamedTuple):
    """One answer: `score` is the cosine to the query, in [-1, 1];
    `path` is None where the image came from inside a dataset.
    """

    score: float
    image_id: str
    path: str | None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a folder says of its index.

    Raises:
        FileNotFoundError: If there is no index.
        ValueError: If the manifest is damaged or of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected an index with {MANIFEST} in '{folder}', got none. Build one with `python -m "
            f"modeling_dclip.hub.index --model MODEL --images FOLDER --output {folder}`; a build that was killed has "
            "none and goes on when started again."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged ({error}). Delete it and build the index again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"Expected an index of format {FORMAT} in '{path}', got {found!r}. Build it again.")
    wanted = {"model": str, "encoder": str, "images": str, "n": int, "dim": int, "files": dict}
    wrong = [name for name, kind in wanted.items() if not isinstance(manifest.get(name), kind)]
    if wrong:
        raise ValueError(
            f"Expected {sorted(wanted)} in '{path}', got none or another type of {wrong}. Build it again."
        )
    return manifest


def _check_file(folder: Path, name: str, digest: str, verify: bool) -> Path:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise FileNotFoundError(
            f"Expected the file {name!r} that {MANIFEST} names in '{folder}', got none. Build again."
        )
    if verify and (found := hash_file(path)) != digest:
        raise ValueError(
            f"'{path}' is damaged: expected the SHA-256 {digest[:12]}..., got {found[:12]}.... Delete it and build "
            "again; embeddings that are there are not computed again."
        )
    return path


def write_index(folder: Path, vectors: Any, columns: dict[str, list[Any]], manifest: dict[str, Any]) -> None:
    """Write vectors, rows, and last the manifest that names them; whoever looks sees the old index or the new one.

    Builds of one folder at a time write one after the other; the last one stays.

    Args:
        folder (`Path`): Of the index.
        vectors: An index of FAISS.
        columns (`dict[str, list]`): The parquet file's, as [`COLUMNS`].
        manifest (`dict`): All but `files`.
    """
    faiss = find_faiss("faiss")
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    files = {}
    with tempfile.TemporaryDirectory(prefix=".new.", dir=folder) as scratch, WeakFileLock(folder / LOCK):
        written = {kind: Path(scratch) / f"{kind}.{suffix}" for kind, suffix in SUFFIXES.items()}
        faiss.write_index(vectors, str(written["vectors"]))
        pq.write_table(pa.table(columns, schema=schema), written["images"])
        for kind, path in written.items():
            digest = hash_file(path)
            files[kind] = {"name": f"{kind}-{digest[:12]}{path.suffix}", "sha256": digest}
            path.replace(folder / files[kind]["name"])
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n", encoding="utf-8")
        named = {entry["name"] for entry in files.values()}
        for old in [path for kind, suffix in SUFFIXES.items() for path in folder.glob(f"{kind}-*.{suffix}")]:
            if old.name not in named:
                old.unlink()


class SearchIndex:
    """An index that is ready to be asked; the model is loaded with the first question.

    Args:
        folder (`Path`): Of the index.
        manifest (`dict`): Of [`read_manifest`].
        vectors: The index of FAISS.
        rows (`pyarrow.Table`): Whose the vectors are.
        model (`str`): What to load for asking.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        vectors: Any,
        rows: pa.Table,
        model: str,
        trust_remote_code: bool = False,
    ):
        self.folder, self.manifest, self.vectors, self.rows = folder, manifest, vectors, rows
        self.model, self.trust_remote_code = model, trust_remote_code
        self._encoder: tuple[torch.nn.Module, Any] | None = None

    @classmethod
    def load(
        cls, folder: str | Path, *, model: str | None = None, verify: bool = True, trust_remote_code: bool = False
    ) -> "SearchIndex":
        """Open an index.

        Args:
            folder (`str` or `Path`): What [`~modeling_dclip.hub.index.build.build_index`] wrote.
            model (`str`, *optional*): Where the model is now, if not where it was; it must be the one that embedded
                the images.
            verify (`bool`, *optional*, defaults to `True`): Compare the files' hashes with the manifest's: about a
                second a GB.
            trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

        Raises:
            FileNotFoundError: If there is no index, or one of its files is missing.
            ImportError: If `faiss-cpu` is not installed.
            ValueError: If a file is damaged.
        """
        folder, faiss = Path(folder), find_faiss("faiss")
        manifest = read_manifest(folder)
        try:
            entries = {kind: manifest["files"][kind] for kind in ("vectors", "images")}
            named = {kind: (entry["name"], entry["sha256"]) for kind, entry in entries.items()}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"'{folder / MANIFEST}' does not name its files ({error!r}). Build the index again."
            ) from error
        paths = {kind: _check_file(folder, name, digest, verify) for kind, (name, digest) in named.items()}
        try:
            vectors, rows = faiss.read_index(str(paths["vectors"])), pq.read_table(paths["images"])
        except (RuntimeError, pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"A file of the index '{folder}' is damaged ({error}). Build it again.") from error
        expected = {"vectors": manifest["n"], "rows": manifest["n"], "width": manifest["dim"]}
        found = {"vectors": vectors.ntotal, "rows": rows.num_rows, "width": vectors.d}
        if expected != found or not set(COLUMNS) <= set(rows.column_names):
            raise ValueError(
                f"Expected {expected} and the columns {list(COLUMNS)} in '{folder}', got {found} and "
                f"{rows.column_names}. Its files are not of one build; build it again."
            )
        index = cls(folder, manifest, vectors, rows, model or manifest["model"], trust_remote_code)
        if manifest.get("effort") is not None:
            index.set_effort(manifest["effort"])
        return index

    def __len__(self) -> int:
        return self.vectors.ntotal

    def set_effort(self, effort: int) -> None:
        """Look into so many cells (inverted file) or keep so many candidates (graph): more finds more and takes
        longer.

        Raises:
            ValueError: If the index is exact, or `effort < 1`.
        """
        knob = effort_of(find_faiss("faiss"), self.vectors)
        if knob is None or effort < 1:
            raise ValueError(
                f"Expected an effort >= 1 of an inverted file or a graph, got {effort} for an index "
                f"{self.manifest.get('index')!r}. An exact index has none: leave it out."
            )
        holder, name, most = knob
        setattr(holder, name, min(effort, most))

    def encoder(self) -> tuple[torch.nn.Module, Any]:
        """The model that embedded the images and its processor; loaded once.

        Raises:
            ValueError: If it is not the model that embedded the images; as [`load_dual_encoder`] otherwise.
        """
        if self._encoder is None:
            model, processor, revision = load_dual_encoder(self.model, trust_remote_code=self.trust_remote_code)
            if (found := fingerprint_encoder(model, processor)) != self.manifest["encoder"]:
                raise ValueError(
                    f"The index '{self.folder}' is of another model: expected {self.manifest['model']!r} "
                    f"({self.manifest.get('revision')}, encoder {self.manifest['encoder'][:12]}...), got "
                    f"{self.model!r} ({revision}, encoder {found[:12]}...). Their vectors do not compare: name the "
                    "model it was built with, or build an index for this one."
                )
            self._encoder = (model, processor)
        return self._encoder

    def search(self, query: str | Path | Image.Image, top_k: int = 10) -> list[Hit]:
        """Find the images nearest to a text or to a picture.

        Args:
            query (`str`, `Path` or `PIL.Image.Image`): A `str` is a text; a path is that of a picture.
            top_k (`int`, *optional*, defaults to 10): Answers, if there are as many images.

        Returns:
            `list[Hit]`: Best first.

        Raises:
            FileNotFoundError: If there is no such picture.
            ValueError: If the text is empty, the picture damaged, `top_k < 1`, or the model another.
        """
        if top_k < 1:
            raise ValueError(f"Expected top_k >= 1, got {top_k}.")
        if isinstance(query, Path):
            query = open_picture(query)
        vector = embed_query(*self.encoder(), query)
        scores, rows = self.vectors.search(vector.numpy(), min(top_k, len(self)))
        found = [(float(score), int(row)) for score, row in zip(scores[0], rows[0], strict=True) if row >= 0]
        table = self.rows.take([row for _, row in found]).to_pylist()
        return [Hit(score, row["image_id"], row["path"]) for (score, _), row in zip(found, table, strict=True)]
