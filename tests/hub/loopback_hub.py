"""The Hub's endpoints that publishing and loading use, on this machine: standard library, repositories in memory.

Every file goes as a regular one (`uploadMode: regular`), so that no large-file storage is needed. Failures can be
planned.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USER = "me"
TOKEN = "hf_loopback"
READ_TOKEN = "hf_reads_only"
MODEL_PATH = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(.*))?$")
FILE_PATH = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
LICENCES = {"apache-2.0", "mit", "cc-by-nc-sa-4.0", "other"}
PIPELINES = {"zero-shot-image-classification", "image-feature-extraction", "feature-extraction"}


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def find_fault(card):
    """What the Hub would say of a card's metadata; None if nothing."""
    block = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    data = yaml.safe_load(block[1]) if block else None
    if not isinstance(data, dict):
        return "the metadata are no mapping"
    if data.get("license") not in LICENCES:
        return f'"license" must be one of {sorted(LICENCES)}'
    if data["license"] == "other" and not (data.get("license_name") and data.get("license_link")):
        return '"license_name" and "license_link" are required'
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINES:
        return '"pipeline_tag" is unknown'
    for entry in data.get("widget", []):
        if not {"src", "candidate_labels", "output"} <= set(entry):
            return '"widget" entries need src, candidate_labels, output'
    for base in [data["base_model"]] if isinstance(data.get("base_model"), str) else data.get("base_model", []):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return f'"base_model" {base} is no model id'
    for index in data.get("model-index", []):
        for result in index["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                return '"model-index" needs task and dataset'
            if not all(isinstance(metric["value"], (int, float)) for metric in result["metrics"]):
                return '"model-index" values must be numbers'
    return None


class Repo:
    """Commits, each a whole tree of files."""

    def __init__(self, private):
        self.private, self.commits, self.order = private, {}, []
        self.commit({".gitattributes": b"*.bin filter=lfs\n"})

    def commit(self, files):
        text = json.dumps([len(self.order), *sorted((path, git_oid(content)) for path, content in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.order.append(sha)
        return sha

    def find(self, revision):
        return self.order[-1] if revision == "main" else revision if revision in self.commits else None


class LoopbackHub:
    """A Hub at `url`; `requests` lists what was asked, `failures` holds `[method, path pattern, status, times]` to
    come.
    """

    def __init__(self):
        self.repos, self.requests, self.failures, self.card_checks = {}, [], [], []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, method, pattern, status, times=1):
        """Answer the next requests that match with a status.

        The method LOST makes a commit, and closes without an answer.
        """
        self.failures.append([method, pattern, status, times])

    def planned_failure(self, method, path):
        for failure in self.failures:
            if failure[3] > 0 and failure[0] == method and re.search(failure[1], path):
                failure[3] -= 1
                return failure[2]
        return None

    def commits(self, repo_id):
        return list(self.repos[repo_id].order)

    def files(self, repo_id):
        repo = self.repos[repo_id]
        return repo.commits[repo.order[-1]]


@contextmanager
def run_loopback_hub():
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def begin(self):
        """Path, body, and whether a planned failure has answered already."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        status = self.hub.planned_failure(self.command, path)
        if status:
            self.answer(status, {"error": "planned"})
        return path, body, status

    def do_GET(self):
        path, _, status = self.begin()
        if status:
            return
        if path == "/api/whoami-v2":
            self.whoami()
        elif match := MODEL_PATH.match(path):
            self.get_model(match[1], match[2] or "")
        elif match := FILE_PATH.match(path):
            self.get_file(*match.groups())
        else:
            self.refuse(404, "EntryNotFound", f"nothing at {path}")

    do_HEAD = do_GET

    def whoami(self):
        roles = {TOKEN: "write", READ_TOKEN: "read"}
        if self.token() not in roles:
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        auth = {"accessToken": {"role": roles[self.token()]}}
        self.answer(200, {"name": USER, "type": "user", "orgs": [{"name": "lab"}], "auth": auth})

    def find_repo(self, repo_id):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.token() not in (TOKEN, READ_TOKEN)):
            self.refuse(401, "RepoNotFound", f"Repository Not Found for {repo_id}")
            return None
        return repo

    def get_model(self, repo_id, rest):
        repo = self.find_repo(repo_id)
        if repo is None:
            return
        kind, _, where = rest.partition("/")
        revision, _, folder = where.partition("/")
        sha = repo.find(revision or "main")
        if sha is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[sha]
        if kind == "tree":
            inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/") or not folder}
            if not inside:
                return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            entries = [(path, len(content), git_oid(content)) for path, content in sorted(inside.items())]
            return self.answer(200, [{"type": "file", "path": p, "size": size, "oid": o} for p, size, o in entries])
        siblings = [{"rfilename": path} for path in sorted(files)]
        config = json.loads(files.get("config.json", b"{}"))
        info = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
        self.answer(200, {**info, "tags": [], "config": {"model_type": config.get("model_type")}})

    def get_file(self, repo_id, revision, path):
        repo = self.find_repo(repo_id)
        if repo is None:
            return
        sha = repo.find(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repo.commits[sha]:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist at {revision}")
        content = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"', "Content-Type": "application/octet-stream"}
        self.answer(200, content, headers)

    def do_POST(self):
        path, body, status = self.begin()
        if status:
            return
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            self.hub.card_checks.append(card)
            fault = find_fault(card)
            errors = [{"message": fault}] if fault else []
            return self.answer(400 if fault else 200, {"errors": errors, "warnings": []})
        if self.token() != TOKEN:
            return self.refuse(403 if self.token() == READ_TOKEN else 401, "Unauthorized", "This token may not write.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        match = MODEL_PATH.match(path)
        action = (match[2] or "").partition("/")[0] if match else ""
        repo = self.find_repo(match[1]) if match else None
        if repo is None:
            return None
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if action == "commit":
            return self.commit(match[1], repo, [json.loads(line) for line in body.splitlines()])
        return self.refuse(404, "EntryNotFound", f"nothing at {path}")

    def create(self, asked):
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        with self.hub.lock:
            if repo_id in self.hub.repos:
                return self.answer(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}
                )
            self.hub.repos[repo_id] = Repo(asked.get("visibility") == "private" or asked.get("private") is True)
        return self.answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def commit(self, repo_id, repo, lines):
        with self.hub.lock:
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, repo.order[-1]):
                return self.refuse(412, "PreconditionFailed", "A commit has happened since.")
            files = dict(repo.commits[repo.order[-1]])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repo.commit(files)
        if self.hub.planned_failure("LOST", f"/{repo_id}") is not None:  # done, but nobody hears of it
            self.close_connection = True
            self.connection.close()
            return None
        commit = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        return self.answer(200, {**commit, "hookOutput": ""})
