"""Small sets in the layout of `clip-benchmark/wds_*`, written for tests."""

import functools
import http.server
import io
import tarfile
import threading
from contextlib import contextmanager

import numpy as np
from PIL import Image


def picture(number, kind="png", size=(40, 36)):
    """A picture as bytes: noise of its own number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "jpeg"}.get(kind, kind))
    return buffer.getvalue()


def as_npy(vector):
    """An array as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(vector))
    return buffer.getvalue()


def write_tar(path, members):
    """A tar of `(name, bytes)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample(number, label, kind="png", label_kind="cls"):
    """Members of one sample."""
    content = as_npy(label) if label_kind == "npy" else str(label).encode()
    return [(f"s{number:07d}.{kind}", picture(number, kind)), (f"s{number:07d}.{label_kind}", content)]


def write_set(
    folder, shards, names=("dog", "red circle", "blue square"), templates=("a photo of a {c}.", "a {c}"), **texts
):
    """A set of `shards`, each a list of members; `dataset_type` and `nshards` as `texts`."""
    for number, members in enumerate(shards):
        write_tar(folder / "test" / f"{number}.tar", members)
    (folder / "test" / "nshards.txt").write_text(texts.get("nshards", f"{len(shards)}\n"))
    for name, lines in (("classnames.txt", names), ("zeroshot_classification_templates.txt", templates)):
        if lines is not None:
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
    if "dataset_type" in texts:
        (folder / "dataset_type.txt").write_text(texts["dataset_type"])
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder.

    Counts requests, may answer all with a `status`, and may break off in the middle of `1.tar`.
    """

    requests = []
    status = None
    cut = False

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.requests.append(self.path)
        if self.status is not None:
            self.send_error(self.status)
        elif self.cut and self.path.endswith("1.tar"):
            self.send_response(200)
            self.send_header("Content-Length", "10000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
        else:
            super().do_GET()


@contextmanager
def serve(folder):
    """Serve a folder on this machine: `(address, handler)`."""
    handler = type("OwnHandler", (Handler,), {"requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
