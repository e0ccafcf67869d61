"""The handle of the tests on hub_server.py, which runs as a process of its own."""

import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

import pytest
from hub_server import TOKENS


# For what depends on how files travel; all other tests upload by Xet, as the client does unless it is told not to.
BOTH_UPLOAD_PATHS = pytest.mark.parametrize("upload_path", ["xet", "lfs"], indirect=True)


class LocalHub:
    """A Hub on this machine, gone with the test process.

    >>> with LocalHub() as hub:
    ...     hub.fault(path="/commit/", status=500)
    ...     run(code, env=os.environ | hub.environment(tmp_path / "home"))
    ...     assert hub.read("me/adapter", "README.md").startswith(b"---")

    Repos are named as in their URLs: `me/adapter`, `datasets/me/data`, `spaces/me/demo`.
    """

    tokens = TOKENS

    def start(self):
        self._folder = tempfile.TemporaryDirectory(prefix="hub", ignore_cleanup_errors=True)
        command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), self._folder.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"hub_server.py ended with {self._process.wait()}")
        return self

    def stop(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def environment(self, home):
        """What a client needs in its environment before huggingface_hub is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKENS["me"],
            "HF_HUB_DISABLE_XET": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def _control(self, what, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"{self.url}/_control/{what}", data, timeout=60) as response:
            return response.read()

    def fault(self, path, method="POST", **fault):
        """Spoil requests by `method` (a pattern) whose path or query has the pattern `path`.

        `action` is one of answer (instead of the work), answer_after (the work), cut, cut_after, cut_body (a reset
        after half of the upload or download), close_body (an orderly end after half of the download) and hang
        (`seconds` late, then as usual). The answers have `status` (500), `headers` and `body` (text or an object).
        `skip` requests are let through, then `times` (-1: all) are hit.
        """
        self._control("fault", {"path": path, "method": method, **fault})

    def mend(self):
        """No more faults."""
        self._control("mend", {})

    def reset(self):
        self._control("reset", {})

    def user(self, name, token, **user):
        """Add a user: role ("write", "read", "fineGrained"), orgs, fineGrained (as in whoami)."""
        self._control("user", {"name": name, "token": token, **user})

    def add(self, repo_id):
        """Add a public repository of nobody, also one with an id without a slash: "gpt2", "datasets/squad"."""
        kind, _, name = repo_id.rpartition("/") if repo_id.startswith("datasets/") else ("models", "", repo_id)
        self._control("add", {"kind": kind, "id": name})

    def settings(self, **settings):
        """Set lfs_threshold or chunk_size (of the multipart uploads), both in bytes."""
        self._control("settings", settings)

    def log(self, method=None, path=None):
        return [
            entry
            for entry in json.loads(self._control("log"))
            if re.fullmatch(method or ".*", entry["method"]) and re.search(path or "", entry["path"])
        ]

    def state(self):
        return json.loads(self._control("state"))

    def files(self, repo_id, revision="main"):
        """Path -> {path, size, kind ("regular", "lfs" or "xet"), sha256}."""
        return {file["path"]: file for file in self.state()[repo_id]["revisions"][revision]["files"]}

    def commits(self, repo_id, revision="main"):
        """Newest first: {oid, title, message, author, parent}."""
        return self.state()[repo_id]["revisions"][revision]["commits"]

    def read(self, repo_id, path, revision="main"):
        try:
            return self._control("file?" + urlencode({"repo": repo_id, "path": path, "revision": revision}))
        except urllib.error.HTTPError as error:
            raise FileNotFoundError(f"{repo_id}/{path}") from error
