"""`clip-benchmark/wds_*` sets: rows point into tars, in a folder, on a Hub or behind http; every damage is named."""

import base64
import contextlib
import http.server
import os
import re
import socket
import threading
import time
from email.utils import formatdate
from types import SimpleNamespace
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Image, Value
from fixtures.loopback_hub import TOKEN, Repo, run_loopback_hub
from fixtures.webdatasets import picture, sample, serve, write_set, write_tar
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.columns import dataset_fingerprint
from modeling_dclip.data.failures import TransportError, describe_failure, one_line
from modeling_dclip.data.files import replacing
from modeling_dclip.data.labels import load_classification, webdataset
from modeling_dclip.data.labels.webdataset import WebdatasetFiles, read_description, read_samples
from modeling_dclip.data.rows import CAPTION_FEATURES
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.kinds import load_benchmark
from modeling_dclip.evaluation.benchmarks.retrieval import evaluate_retrieval

TWO_SHARDS = [
    [*sample(0, 1), *sample(1, 0, "jpg"), *sample(2, 2, "webp")],
    [*sample(3, "2\n", "jpeg"), *sample(4, 0)],
]


def read(root, split="test", **options):
    files = WebdatasetFiles(str(root), **options)
    return read_samples(files, split, read_description(files, split))


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    root = write_set(tmp_path_factory.mktemp("sets") / "wds_two", TWO_SHARDS)
    for path in root.rglob("*"):
        os.utime(path, (0, time.time() - 3600))
    return root


@pytest.fixture
def served(two_shards):
    """`(address of the set, its handler)`."""
    with serve(two_shards.parent) as (address, handler):
        yield f"{address}/wds_two", handler


def test_rows_are_the_samples_of_all_shards_in_their_order(two_shards):
    dataset = read(two_shards)
    assert dataset["image_id"][:] == [
        "wds_two/test/0.tar/s0000000.png",
        "wds_two/test/0.tar/s0000001.jpg",
        "wds_two/test/0.tar/s0000002.webp",
        "wds_two/test/1.tar/s0000003.jpeg",
        "wds_two/test/1.tar/s0000004.png",
    ]
    assert dataset["label"][:] == [1, 0, 2, 2, 0]
    assert dataset.features["label"] == ClassLabel(names=["dog", "red circle", "blue square"])
    stored = dataset.cast_column("image", Image(decode=False))["image"][:]
    kinds = ["png", "jpg", "webp", "jpeg", "png"]
    assert [one["bytes"] for one in stored] == [picture(n, kind) for n, kind in enumerate(kinds)]
    assert [image.size for image in dataset["image"]] == [(40, 36)] * 5
    assert dataset_fingerprint(dataset) != dataset_fingerprint(dataset.select(range(4)))


def test_pictures_beyond_the_reach_of_an_offset_go_into_another_part(two_shards, monkeypatch):
    whole = read(two_shards).cast_column("image", Image(decode=False))[:]
    longest = max(len(one["bytes"]) for one in whole["image"])
    monkeypatch.setattr(webdataset, "_REACH", longest + 600)
    assert read(two_shards).cast_column("image", Image(decode=False))[:] == whole
    monkeypatch.setattr(webdataset, "_REACH", longest - 1)
    with pytest.raises(ValueError, match=r"member 's\d+.png': expected a picture below"):
        read(two_shards)


def test_a_row_points_into_the_mapped_shard(tmp_path):
    root = write_set(tmp_path / "wds_mapped", [[member for n in range(9) for member in sample(n, n % 3)]])
    content = read(root).data.column("image").chunk(0).field("bytes").buffers()[2]
    end = (root / "test" / "0.tar").stat().st_size
    # all of the tar after a header, as a view of the mapping
    assert sum(len(picture(n)) for n in range(9)) < content.size < end
    assert not content.is_mutable and content.parent.size == end


def test_classes_of_one_name_are_numbers(tmp_path):
    root = write_set(tmp_path / "wds_twice", [sample(0, 2)], names=["missile", "dog", "missile"])
    assert read(root).features["label"] == Value("int64")


@pytest.mark.parametrize("label_kind", ["npy", "cls"])
def test_several_labels_an_image_are_vectors(tmp_path, label_kind):
    vectors = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    members = [m for n, vector in enumerate(vectors) for m in sample(n, vector, "jpg", label_kind)]
    dataset = read(write_set(tmp_path / "wds_many", [members], dataset_type="multilabel\n"))
    assert dataset["label"][:] == vectors


def test_metadata_beside_a_label_is_no_label(tmp_path):
    members = [*sample(0, 1), ("s0000000.npy", b"not read")]
    assert read(write_set(tmp_path / "wds_wilds", [members]))["label"][:] == [1]


def test_a_set_behind_http_is_the_set_and_its_shards_come_once(two_shards, served, tmp_path):
    address, handler = served
    local = read(two_shards).cast_column("image", Image(decode=False))[:]
    assert read(address, cache_dir=tmp_path).cast_column("image", Image(decode=False))[:] == local
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert sorted(path.name for path in kept) == ["0.tar", "1.tar"]
    read(address, cache_dir=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == kept
    assert handler.requests.count("HEAD /wds_two/test/0.tar") == 2  # asked whether it changed
    assert handler.requests.count("/wds_two/test/0.tar") == 1


def test_a_shard_that_breaks_off_is_not_kept_and_the_ones_before_are(served, tmp_path):
    address, handler = served
    handler.cut = True
    with pytest.raises(ConnectionError, match=r"1\.tar.*(10000 bytes|broke off|got 100)|10000 bytes.*1\.tar"):
        read(address, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0.tar"]
    handler.cut = False
    assert len(read(address, cache_dir=tmp_path)) == 5


@contextlib.contextmanager
def answering(answer):
    """A server that calls `answer(handler)` for every request: its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                answer(self)

        do_HEAD = do_GET

        def send(self, content, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content_Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/set"
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_that_changes_under_one_name_is_fetched_again(two_shards, tmp_path):
    first, second = ((two_shards / "test" / f"{number}.tar").read_bytes() for number in (0, 1))
    second = second.ljust(len(first), b"\0")
    state = {"content": first, "headers": {"ETag": '"1"'}}
    with answering(lambda handler: handler.send(state["content"], **state["headers"])) as address:
        files = WebdatasetFiles(address, cache_dir=tmp_path)

        def fetched(content, **headers):
            state.update(content=content, headers=headers)
            return files.shard("test/0.tar").read_bytes()

        assert fetched(first, ETag='"1"') == first
        assert fetched(second, ETag='"1"') == first  # the server's word
        assert fetched(second, ETag='"2"') == second
        assert fetched(first) == first and fetched(second) == second  # no word at all: never kept
        now, hour_ago = (formatdate(time.time() - seconds, usegmt=True) for seconds in (0, 3600))
        assert fetched(first, Last_Modified=now) == first  # it may change within this second
        assert fetched(second, Last_Modified=now) == second
        assert fetched(first, Last_Modified=hour_ago) == first and fetched(second, Last_Modified=hour_ago) == first
        assert (
            fetched(second, Last_Modified="yesterday") == second and fetched(first, Last_Modified="yesterday") == first
        )


def test_a_file_that_changes_between_question_and_answer_is_kept_as_what_it_is(tmp_path):
    def answer(handler):
        new = handler.command == "GET"
        handler.send(b"new" if new else b"old!", ETag='"2"' if new else '"1"')

    with answering(answer) as address:
        files = WebdatasetFiles(address, cache_dir=tmp_path)
        assert files.shard("test/0.tar").read_bytes() == b"new"
    with answering(lambda handler: handler.send(b"old!", ETag='"1"')) as address:
        assert WebdatasetFiles(address, cache_dir=tmp_path).shard("test/0.tar").read_bytes() == b"old!"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["0.tar", "0.tar"]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda handler: handler.send(b"", 302, Location=handler.path), ConnectionError, "redirected in a circle"),
        (lambda handler: handler.send(b"<!doctype html>"), ValueError, "number of shards in .*got '<!doctype html>'"),
        (lambda handler: handler.send(b"1" * 5000), ValueError, "number of shards in .*got '1111"),
        (lambda handler: handler.send(b"\xff1"), ValueError, "Expected UTF-8 text in '.*nshards.txt'"),
        (lambda handler: handler.send(b"1" * (2 << 20)), ConnectionError, "Expected at most 1 MiB at .*nshards.txt"),
        (lambda handler: handler.send(b"1", Content_Length="9"), ConnectionError, "nshards.txt' broke off"),
        (
            lambda handler: handler.wfile.write(b"HTTP/0.0 hello\r\n\r\n"),
            ConnectionError,
            "nshards.txt' to be served, got",
        ),
    ],
    ids=["a circle", "a page", "too many", "no text", "endless", "cut", "no HTTP"],
)
def test_an_odd_answer_is_one_line_with_its_address(tmp_path, monkeypatch, answer, error, message):
    monkeypatch.setattr(webdataset, "MOST_TEXT_BYTES", 1 << 20)
    with answering(answer) as address, pytest.raises(error, match=message) as caught:
        load_captions(f"wds:{address},cache_dir={tmp_path}")
    assert address in str(caught.value) and not list(tmp_path.iterdir())


def test_a_server_that_drips_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "_TIMEOUT_S", 0.3)

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"1")
            time.sleep(0.05)

    with answering(drip) as address, pytest.raises(ConnectionError, match="nshards.txt' came too slowly"):
        load_captions(f"wds:{address},cache_dir={tmp_path}")


def test_a_page_in_place_of_a_shard_is_named_and_not_kept(tmp_path):
    state = {"tar": b"<!doctype html>" * 100}

    def answer(handler):
        texts = {"nshards.txt": b"1", "dataset_type.txt": b"retrieval", "0.tar": state["tar"]}
        handler.send(texts[handler.path.rsplit("/", 1)[1]], ETag='"always"')

    spec = "wds:{},cache_dir=" + str(tmp_path / "cache")
    with answering(answer) as address:
        with pytest.raises(ValueError, match=f"expected an uncompressed tar.* It came from '{address}/test/0.tar'"):
            load_captions(spec.format(address))
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        write_tar(tmp_path / "good.tar", captioned(0, "a dog"))
        state["tar"] = (tmp_path / "good.tar").read_bytes()
        assert load_captions(spec.format(address))["captions"][:] == [["a dog"]]


def test_a_fetch_that_is_interrupted_leaves_nothing_and_begins_anew(served, tmp_path, monkeypatch):
    address, _ = served
    receive, files = webdataset._receive_file, WebdatasetFiles(address, cache_dir=tmp_path)

    def interrupted(files, url, path, progress):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(webdataset, "_receive_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.shard("test/0.tar")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(webdataset, "_receive_file", receive)
    assert files.shard("test/0.tar").stat().st_size > 1000


def test_a_password_is_taken_from_netrc_as_the_message_says(tmp_path, monkeypatch):
    word = base64.b64encode(b"me:word").decode()

    def answer(handler):
        allowed = handler.headers.get("Authorization") == f"Basic {word}"
        handler.send(b"1" if allowed else b"", 200 if allowed else 403)

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    with answering(answer) as address:
        with pytest.raises(ConnectionError, match="got the HTTP status 403"):
            WebdatasetFiles(address).text("nshards.txt")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        fsspec.filesystem("http").clear_instance_cache()
        assert WebdatasetFiles(address).text("nshards.txt") == "1"


def test_a_server_that_refuses_and_one_that_is_not_there_are_named(served, tmp_path):
    address, handler = served
    with pytest.raises(FileNotFoundError, match=re.escape(f"{address}/train/nshards.txt")):
        read(address, "train", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{address}/test/7.tar")):
        WebdatasetFiles(address, cache_dir=tmp_path).shard("test/7.tar")
    handler.status = 503
    with pytest.raises(ConnectionError, match=f"{re.escape(address)}.*503"):
        read(address, cache_dir=tmp_path)
    with pytest.raises(ConnectionError, match=f"{re.escape(address)}/test/0.tar.*503"):
        WebdatasetFiles(address, cache_dir=tmp_path).shard("test/0.tar")
    with pytest.raises(ConnectionError, match="Cannot reach 'http://127.0.0.1:9/x/test/nshards.txt'"):
        read("http://127.0.0.1:9/x", cache_dir=tmp_path)


def test_a_server_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(ConnectionError, match=f"Cannot reach '{address}/test/nshards.txt': .*[Tt]imeout"):
            read(address, cache_dir=tmp_path)
        with pytest.raises(ConnectionError, match=f"Cannot reach '{address}/test/0.tar': .*[Tt]imeout"):
            WebdatasetFiles(address, cache_dir=tmp_path).shard("test/0.tar")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("root", "files", "name"),
    [
        ("https://hub.example/datasets/o/wds_x", "https://hub.example/datasets/o/wds_x/resolve/main", "wds_x"),
        ("https://hub.example/datasets/o/wds_x/tree/v1/", "https://hub.example/datasets/o/wds_x/resolve/v1", "wds_x"),
        ("https://hub.example/some/wds_y", "https://hub.example/some/wds_y", "wds_y"),
    ],
)
def test_a_page_of_the_hub_stands_for_its_files(root, files, name):
    found = WebdatasetFiles(root)
    assert (found.root, found.name) == (files, name)


@pytest.fixture
def hub(two_shards, monkeypatch):
    """A Hub on this machine with the set as a dataset, private too, and one whose second shard is missing."""
    files = {path.relative_to(two_shards).as_posix(): path.read_bytes() for path in two_shards.rglob("*.t*")}
    short = {name: content for name, content in files.items() if name != "test/1.tar"}
    with run_loopback_hub() as loopback:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, content in (("wds_two", files), ("wds_private", files), ("wds_short", short)):
            loopback.repos[f"datasets/o/{name}"] = Repo(name == "wds_private")
            loopback.repos[f"datasets/o/{name}"].commit(content)
        yield loopback


def test_a_dataset_of_the_hub_is_the_set_and_its_shards_come_once(two_shards, hub, tmp_path):
    local = read(two_shards).cast_column("image", Image(decode=False))[:]
    commit = hub.commits("datasets/o/wds_two")[-1]
    for page in ("", "/tree/main", f"/tree/{commit}"):
        dataset = read(f"{hub.url}/datasets/o/wds_two{page}", cache_dir=tmp_path)
        assert dataset.cast_column("image", Image(decode=False))[:] == local
    paths = {path.resolve() for path in tmp_path.rglob("*.tar")}
    assert len(paths) == 2 and all(path.is_relative_to(tmp_path) for path in paths)
    assert hub.requests.count(("GET", "/datasets/o/wds_two/resolve/main/test/0.tar")) == 1


def test_what_a_hub_lacks_or_refuses_is_named(hub, tmp_path, monkeypatch):
    address = f"{hub.url}/datasets/o"
    for place, split in (("wds_none", "test"), ("wds_two", "train"), ("wds_two/tree/v9", "test")):
        name, _, revision = place.partition("/tree/")
        url = f"{address}/{name}/resolve/{revision or 'main'}/{split}/nshards.txt"
        with pytest.raises(FileNotFoundError, match=f"No file at '{re.escape(url)}'.*Check the address") as error:
            read(f"{address}/{place}", split, cache_dir=tmp_path)
        assert one_line(error.value) == str(error.value)
    with pytest.raises(FileNotFoundError, match="No file at '.*wds_short/resolve/main/test/1.tar'"):
        read(f"{address}/wds_short", cache_dir=tmp_path)
    hub.fail("HEAD", "nshards", 403)
    with pytest.raises(ConnectionError, match="'.*/wds_two/resolve/main/test/nshards.txt': .*403"):
        read(f"{address}/wds_two", cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="Cannot reach '.*/wds_two/resolve/main/test/nshards.txt': .*offline"):
        read(f"{address}/wds_two", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TransportError("peer closed\nconnection"), "got peer closed connection"),
        (GatedRepoError("Restricted.", response=SimpleNamespace(headers={}, request=None)), "Restricted.*Ask"),
    ],
    ids=["broken off", "gated"],
)
def test_a_shard_of_the_hub_that_does_not_come_is_named(error, message, monkeypatch):
    monkeypatch.setattr(webdataset, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(ConnectionError, match=f"'https://huggingface.co/.*/wds_two/resolve/v1/test/0.tar'.*{message}"):
        WebdatasetFiles("https://huggingface.co/datasets/o/wds_two/tree/v1").shard("test/0.tar")


def test_only_the_hub_gets_the_users_token(hub, tmp_path, monkeypatch):
    address = f"{hub.url}/datasets/o/wds_private"
    with pytest.raises(FileNotFoundError, match="No file at '.*wds_private/resolve/main/test/nshards.txt'"):
        read(address, cache_dir=tmp_path)
    monkeypatch.setattr(webdataset, "_HUB", hub.url)
    assert len(read(address, cache_dir=tmp_path)) == 5


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        (sample(0, 3), None, r"0.tar', member 's0000000.cls': expected a label in \[0, 3\).*got 3"),
        (sample(0, -1), None, r"s0000000.cls': expected a label in \[0, 3\).*got -1"),
        (sample(0, "dog"), None, "s0000000.cls': expected the number of a class.*got b'dog'"),
        (sample(0, [1, 0, 0]), None, "s0000000.cls'.*'multilabel' in dataset_type.txt"),
        ([("s1.png", b"x")], None, "0.tar', sample 's1': expected one picture.*one label.*got ..png"),
        ([("s1.cls", b"0")], None, "sample 's1': expected one picture"),
        ([("s1.png", b"x"), ("s1.jpg", b"x"), ("s1.cls", b"0")], None, "sample 's1': expected one picture"),
        ([("s1.png", b"x"), ("s1.cls", b"0"), ("s1.cls", b"1")], None, "sample 's1': expected one picture"),
        (sample(0, [1, 0], label_kind="npy"), "multilabel", r"s0000000.npy': expected 3 values.*\(2,\)"),
        (sample(0, [1, 0, 2], label_kind="npy"), "multilabel", "s0000000.npy': expected zeros and ones, got .*2"),
        ([("s1.png", b"x"), ("s1.npy", b"garbage")], "multilabel", "s1.npy': expected a vector of zeros and ones"),
        ([("s1.png", b"x"), ("s1.cls", b"a b c")], "multilabel", "s1.cls': expected a vector of zeros and ones"),
    ],
)
def test_a_damaged_member_is_named_with_its_shard(tmp_path, members, kind, message):
    root = write_set(tmp_path / "wds_bad", [members], **({"dataset_type": kind} if kind else {}))
    with pytest.raises(ValueError, match=message):
        read(root)


def test_a_pickled_label_is_not_loaded(tmp_path):
    objects = sample(0, np.array([{"a": 1}, 0, 0], dtype=object), label_kind="npy")
    with pytest.raises(ValueError, match="s0000000.npy': expected a vector"):
        read(write_set(tmp_path / "wds_pickle", [objects], dataset_type="multilabel"))


def test_a_cut_shard_and_an_empty_one_are_named(two_shards, tmp_path):
    root = write_set(tmp_path / "wds_cut", TWO_SHARDS)
    path = root / "test" / "1.tar"
    content = path.read_bytes()
    for broken, message in ((content[:1500], "1.tar.*got the end of the file.*Fetch"), (b"", "1.tar.*empty file")):
        with replacing(path) as temporary:
            temporary.write_bytes(broken)
        with pytest.raises(ValueError, match=message) as error:
            read(root)
        assert "on_bad_sample" not in str(error.value)
    write_tar(path, [])
    with pytest.raises(ValueError, match="1.tar'.*expected samples"):
        read(root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="1.tar' is missing"):
        read(root)


def test_a_damaged_picture_is_named_when_it_is_decoded(tmp_path, tiny_clip):
    from modeling_dclip.evaluation.embedding import embed_images

    members = [*sample(0, 1), ("s0000001.png", picture(1)[:60]), ("s0000001.cls", b"0")]
    dataset = read(write_set(tmp_path / "wds_bad", [members]))
    with pytest.raises(ValueError, match="wds_bad/test/0.tar/s0000001.png.*cannot be read"):
        embed_images(Encoder(*tiny_clip), dataset)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ({"names": None}, FileNotFoundError, "classnames.txt': the classes of 'wds_bad' have no names"),
        ({"names": ["dog", "", "cat"]}, ValueError, "classnames.txt', but line 2 is empty"),
        ({"names": [""]}, ValueError, "classnames.txt', but the file is empty"),
        ({"nshards": "two"}, ValueError, "number of shards in '.*nshards.txt', got 'two'"),
        ({"nshards": "0"}, ValueError, "number of shards"),
        ({"dataset_type": "retrieval"}, ValueError, "dataset_type.txt' says 'retrieval'"),
    ],
)
def test_bad_texts_are_named(tmp_path, texts, error, message):
    root = write_set(tmp_path / "wds_bad", [sample(0, 0)], **texts)
    with pytest.raises(error, match=message):
        read(root)


def test_text_of_another_encoding_is_named(tmp_path):
    root = write_set(tmp_path / "wds_bad", [sample(0, 0)])
    (root / "classnames.txt").write_bytes(b"caf\xe9\ndog\ncat\n")
    with pytest.raises(ValueError, match="UTF-8 text in '.*classnames.txt'"):
        read(root)


def captioned(number, captions, kind="jpg", member="txt"):
    """Members of one sample of a set for retrieval."""
    content = captions if isinstance(captions, bytes) else captions.encode()
    return [(f"s{number:07d}.{kind}", picture(number, kind)), (f"s{number:07d}.{member}", content)]


TWO_CAPTIONED = [
    [*captioned(0, "a red square\na square in red\n"), *captioned(1, "\ufeffa cat \r\n\r\n two cats", "png")],
    [
        *captioned(2, '{"captions": ["a dog", "dogs"]}', "webp", "json"),
        *captioned(3, '{"caption": "one"}', "jpeg", "json"),
    ],
]


def write_captioned(folder, shards, dataset_type="retrieval"):
    return write_set(
        folder, shards, names=None, templates=None, **({"dataset_type": dataset_type} if dataset_type else {})
    )


def test_a_set_for_retrieval_has_the_captions_of_its_lines(tmp_path):
    root = write_captioned(tmp_path / "wds_captions", TWO_CAPTIONED)
    dataset = load_captions(f"wds:{root}")
    assert dataset["image_id"][:] == [
        "wds_captions/test/0.tar/s0000000.jpg",
        "wds_captions/test/0.tar/s0000001.png",
        "wds_captions/test/1.tar/s0000002.webp",
        "wds_captions/test/1.tar/s0000003.jpeg",
    ]
    assert dataset["captions"][:] == [
        ["a red square", "a square in red"],
        ["a cat", "two cats"],
        ["a dog", "dogs"],
        ["one"],
    ]
    assert dataset.features == CAPTION_FEATURES
    stored = dataset.cast_column("image", Image(decode=False))["image"][:]
    assert [one["bytes"] for one in stored] == [
        picture(n, kind) for n, kind in enumerate(["jpg", "png", "webp", "jpeg"])
    ]
    assert load_captions(f"wds:{root}:test@2", seed=1)["image_id"][:] == [dataset["image_id"][row] for row in (2, 3)]


def test_a_set_for_retrieval_is_measured_as_its_rows_are(tmp_path, tiny_clip):
    root = write_captioned(tmp_path / "wds_captions", TWO_CAPTIONED)
    columns = load_captions(f"wds:{root}").with_format(None).to_dict()
    plain = Dataset.from_dict(columns, features=CAPTION_FEATURES)
    result = load_benchmark(f"retrieval=wds:{root}").evaluate(Encoder(*tiny_clip))
    expected = evaluate_retrieval(Encoder(*tiny_clip), plain)
    outcomes, others = result.pop("outcomes"), expected.pop("outcomes")
    assert result == expected and (result["n"], result["n_captions"]) == (4, 7)
    assert all((outcomes[name] == others[name]).all() for name in others)


def test_a_set_for_retrieval_behind_an_address_is_the_set(tmp_path):
    local = load_captions(f"wds:{write_captioned(tmp_path / 'sets' / 'wds_captions', TWO_CAPTIONED)}")
    with serve(tmp_path / "sets") as (address, _):
        remote = load_captions(f"wds:{address}/wds_captions:test,cache_dir={tmp_path / 'cache'}")
    assert remote.cast_column("image", Image(decode=False))[:] == local.cast_column("image", Image(decode=False))[:]
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.tar")) == ["0.tar", "1.tar"]


def test_each_kind_of_set_is_sent_to_the_reader_that_exists(tmp_path):
    root = write_captioned(tmp_path / "wds_captions", TWO_CAPTIONED)
    with pytest.raises(ValueError, match="says 'retrieval'.*Evaluate it with (.*) instead of zero_shot") as error:
        load_benchmark(f"zero_shot=wds:{root}")
    remedy = re.search("Evaluate it with (.*) instead", str(error.value))[1]
    assert load_benchmark(remedy).name == f"retrieval=wds:{root}:test"
    labelled = write_set(tmp_path / "wds_labels", TWO_SHARDS, dataset_type="classification")
    with pytest.raises(ValueError, match="Expected 'retrieval' in .*got 'classification'.*Evaluate it with") as error:
        load_benchmark(f"retrieval=wds:{labelled}")
    assert load_benchmark(re.search("Evaluate it with (.*) instead", str(error.value))[1]).split == "test"
    with pytest.raises(ValueError, match="sample 's0000000': expected one picture .* and captions .*'cls'"):
        load_captions(f"wds:{write_set(tmp_path / 'wds_untold', TWO_SHARDS)}")
    with pytest.raises(ValueError, match="Expected one of .*classification.*dataset_type.txt', got 'segmentation'"):
        read(write_set(tmp_path / "wds_other", TWO_SHARDS, dataset_type="segmentation"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (captioned(0, b"caf\xe9"), r"0.tar', member 's0000000.txt': expected UTF-8 text in .*0xe9"),
        (captioned(0, "[" * 100_000, member="json"), "s0000000.json': expected JSON in it, got .*recursion"),
        (captioned(0, '{"captions": [1]}', member="json"), r"s0000000.json': expected captions, got \[1\]"),
        (captioned(0, '{"captions": "a dog"}', member="json"), "s0000000.json': expected captions, got 'a dog'"),
        (captioned(0, r'{"captions": ["\ud83d"]}', member="json"), "s0000000.json': expected captions"),
        ([*captioned(0, "a"), *captioned(1, "b"), *captioned(0, "c")], "'s0000000': expected one picture.*repeated"),
        ([("s1.jpg", b"x")], "sample 's1': expected one picture .* and captions"),
        ([*captioned(0, "a"), ("s0000000.png", b"x")], "sample 's0000000': expected one picture"),
    ],
    ids=["latin-1", "deep JSON", "numbers", "one text", "half a character", "a key twice", "alone", "two pictures"],
)
def test_damaged_captions_are_named_with_their_shard(tmp_path, members, message):
    root = write_captioned(tmp_path / "wds_bad", [members])
    with pytest.raises(ValueError, match=message):
        load_captions(f"wds:{root}")


def test_pictures_without_a_caption_are_left_out_and_named(tmp_path, caplog):
    root = write_captioned(tmp_path / "wds_bad", [[*captioned(0, "a dog"), *captioned(1, " \n")]])
    assert load_captions(f"wds:{root}")["captions"][:] == [["a dog"]]
    assert "rejected 1 image without a caption, first ids: wds_bad/test/0.tar/s0000001.jpg" in caplog.text
    with pytest.raises(ValueError, match="No row with an image and a caption is left"):
        load_captions(f"wds:{write_captioned(tmp_path / 'wds_none', [captioned(1, ' ')])}")


@pytest.mark.parametrize("shown", ["https://me:word@a.example/x", "https://a.example/x?token=word"])
def test_a_password_in_an_address_is_refused_and_not_repeated(shown):
    for load in (load_captions, load_classification):
        with pytest.raises(ValueError, match="without a user name.*'wds:https://a.example/x'.*netrc") as error:
            load(f"wds:{shown}")
        assert "word" not in str(error.value).replace("password", "")
    with pytest.raises(ValueError, match="without a user name"):
        WebdatasetFiles(shown)
    assert one_line(ValueError(f"'{shown}' refused")) == "'https://a.example/x' refused"
    assert "word" not in describe_failure(f"retrieval=wds:{shown}", ValueError("x"))


def test_a_shard_that_nshards_leaves_out_is_named(tmp_path, caplog):
    root = write_set(tmp_path / "wds_x", [[*sample(0, 0), *sample(1, 1)], [*sample(2, 2)]], nshards="1\n")
    assert len(load_classification(f"wds:{root}").dataset) == 2
    assert "nshards.txt' says 1, so that '1.tar' beside it is not read" in caplog.text
