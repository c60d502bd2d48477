"""A server on this machine that answers what huggingface_hub asks of the Hub when it makes a repository and uploads."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants

TOKEN = "hf_a_secret_of_nobody"


class Standin:
    """Repositories of the user "somebody", who alone has the token.

    Attributes:
        commits: name of a repository -> its commits, first to last, each its message and all files by then.
        asked: what was asked, method and path.
        failing: paths with one of these words in it are answered with an error.
        gate: uploads of large files wait for it.
    """

    def __init__(self):
        self.commits, self.private, self.asked, self.failing = {}, {}, [], []
        self.large, self.gate, self.lock = {}, threading.Event(), threading.Lock()
        self.gate.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.environment = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        self.environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "0"}
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def files(self, repo):
        return self.commits[repo][-1][1] if self.commits[repo] else {}

    def messages(self, repo):
        return [message for message, _ in self.commits[repo]]


@contextlib.contextmanager
def standin(monkeypatch=None):
    """The server; with `monkeypatch` this process takes it for the Hub."""
    hub = Standin()
    if monkeypatch is not None:
        for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.gate.set()
        hub.server.shutdown()
        hub.server.server_close()


def _sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", value.get("error", ""))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if any(word in path for word in hub.failing):
            return self.answer({"error": "the Hub is tired"}, 403)
        if path == "/api/validate-yaml":
            odd = "license: no-such" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of many'}] if odd else []
            return self.answer({"errors": errors, "warnings": []}, 400 if odd else 200)
        if path.startswith("/large/"):  # its address is the permission
            hub.gate.wait(60)
            hub.large[path.removeprefix("/large/")] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "somebody", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        owner, name, *rest = path.removeprefix("/api/models").removeprefix("/").replace(".git/", "/").split("/")
        repo, rest = f"{owner}/{name}", "/".join(rest)
        if repo not in hub.commits:
            return self.answer({"error": "Repository not found"}, 404)
        if rest in ("", "revision/main"):
            return self.answer({"id": repo, "sha": f"{len(hub.commits[repo]):040x}", "private": hub.private[repo]})
        if owner != "somebody":
            return self.answer({"error": "Forbidden"}, 403)
        return getattr(self, rest.split("/")[0].replace("-", "_"))(repo, body)

    do_GET = do_POST = do_PUT = handle_any

    def create(self, asked):
        repo = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if repo in self.hub.commits:
            return self.answer({"error": "You already created this model repo", "url": repo}, 409)
        if not repo.startswith("somebody/"):
            return self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        self.hub.commits[repo], self.hub.private[repo] = (
            [],
            asked.get("visibility") == "private" or asked.get("private"),
        )
        return self.answer({"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def auth_check(self, repo, body):
        return self.answer({})

    def preupload(self, repo, body):
        files, there = json.loads(body)["files"], self.hub.files(repo)
        return self.answer({"files": [self.mode(file["path"], there) for file in files]})

    def mode(self, path, there):
        is_large = path.endswith(".safetensors")
        known = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        if path in there:
            known["oid"] = hashlib.sha256(there[path]).hexdigest() if is_large else _sha1(there[path])
        return known

    def info(self, repo, body):
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.large:
                each["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{each['oid']}"}}
        return self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo, body):
        head, *operations = [json.loads(line) for line in body.splitlines()]
        files = dict(self.hub.files(repo))
        for each in operations:
            value = each["value"]
            is_large = each["key"] == "lfsFile"
            files[value["path"]] = self.hub.large[value["oid"]] if is_large else base64.b64decode(value["content"])
        self.hub.commits[repo].append((head["value"]["summary"], files))
        number = len(self.hub.commits[repo])
        return self.answer({"success": True, "commitUrl": f"{repo}/commit/{number}", "commitOid": f"{number:040x}"})
