"""A small Hugging Face Hub for the tests: `python hub_server.py ROOT` prints its URL and ends when its stdin closes.

It keeps users, repos, faults and the request log in memory, LFS objects and a Xet CAS (`local://`) below ROOT. It was
written from the source of huggingface_hub 2.4 and has never been compared with the real Hub.
"""

import base64
import fnmatch
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote


TOKENS = {who: "hf_" + f"fakeTokenOf{who.title()}".ljust(34, "x") for who in ("me", "reader", "other")}
LFS_SUFFIXES = """7z arrow bin bz2 ckpt ftz gguf gz h5 joblib model msgpack npy npz onnx ot parquet pb pickle pkl pt
pth rar safetensors tar tflite tgz wasm xz zip zst""".split()
LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc intel-research h-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research
llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other""".split()
SPACE_SDKS = "gradio docker static".split()
SPACE_COLORS = "red yellow green blue indigo purple pink gray".split()
PREFIX = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
WRITING_ROLES = ("admin", "write", "contributor")
NOT_FOUND = {"Repo": "Repository not found", "Revision": "Invalid rev id", "Entry": "Entry not found"}
FRONT_MATTER = re.compile(r"\A\s*---[\r\n]+(.*?)(?:[\r\n]+)?---(?:\r\n|\n|\Z)", re.S)
REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
PAGE = r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)"
ROUTES = []


class Refusal(Exception):
    def __init__(self, status, message, code=None, **headers):
        self.status, self.message, self.headers = status, message, headers
        if code:
            self.headers["X-Error-Code"] = code


def missing(what, detail="", status=404, **headers):
    return Refusal(status, NOT_FOUND[what] + detail, f"{what}NotFound", **headers)


def now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def truthy(value):
    return str(value).lower() in ("1", "true")


def route(method, pattern, access=None):
    """Register a method of Hub; with `access` it is given the repo named by the first two groups of the pattern."""

    def register(function):
        ROUTES.append((method, re.compile(pattern), access, function))
        return function

    return register


@dataclass(frozen=True)
class File:
    size: int
    sha256: str
    data: bytes | None = None  # of a regular file
    xet: str | None = None

    @property
    def pointer(self):
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @functools.cached_property
    def oid(self):
        return git_oid(self.pointer if self.data is None else self.data)

    @property
    def kind(self):
        return "regular" if self.data is not None else "xet" if self.xet else "lfs"

    def entry(self, path):
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        optional = {"lfs": lfs} if self.data is None else {}
        optional |= {"xetHash": self.xet} if self.xet else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": self.size, **optional}


def regular(data):
    return File(len(data), hashlib.sha256(data).hexdigest(), data)


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    files: dict
    date: str = field(default_factory=now)


class Repo:
    def __init__(self, kind, id, author, visibility, sdk=None):
        self.kind, self.id, self.visibility, self.sdk = kind, id, visibility, sdk
        self.created, self.gated = now(), False
        self.commits, self.branches, self.tags, self.pulls = {}, {}, {}, {}
        self.discussions, self.secrets, self.variables, self.hardware = [], {}, {}, "cpu-basic"
        self.sleep_time = None
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": regular(attributes.encode())}
        if kind == "spaces":
            card = f"---\ntitle: {id.split('/')[1]}\nsdk: {sdk}\n---\n"
            files["README.md"] = regular(card.encode())
        self.add_commit("main", None, "initial commit", "", author, files)

    @property
    def private(self):
        return self.visibility == "private"

    @property
    def key(self):
        return PREFIX[self.kind] + self.id

    def refs(self):
        return {**self.branches, **self.tags, **{f"refs/pr/{num}": oid for num, oid in self.pulls.items()}}

    def at(self, revision):
        refs = self.refs()
        oid = refs.get(revision.removeprefix("refs/heads/")) or revision
        if oid not in self.commits and re.fullmatch(r"[0-9a-f]{7,40}", oid):
            oid = next((full for full in self.commits if full.startswith(oid)), oid)
        if oid not in self.commits:
            raise missing("Revision", f": {revision}")
        return self.commits[oid]

    def history(self, oid):
        while oid:
            yield self.commits[oid]
            oid = self.commits[oid].parent

    def add_commit(self, revision, parent, title, message, author, files):
        oid = hashlib.sha1(os.urandom(20)).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, author, files)
        if pull := re.fullmatch(r"refs/pr/(\d+)", revision):
            self.pulls[int(pull[1])] = oid
            self.event(self.discussions[int(pull[1]) - 1], "commit", author, subject=title, oid=oid)
        else:
            self.branches[revision.removeprefix("refs/heads/")] = oid
        return self.commits[oid]

    def discuss(self, title, description, author, pull, status, base="main"):
        num = len(self.discussions) + 1
        self.discussions.append({"num": num, "title": title, "status": status, "isPullRequest": pull})
        self.discussions[-1] |= {"author": {"name": author}, "createdAt": now(), "events": []}
        self.discussions[-1]["repo"] = {"name": self.id, "type": self.kind[:-1]}
        if pull:
            self.pulls[num] = self.at(base).oid
            self.discussions[-1] |= {"changes": {"base": "refs/heads/main"}, "start": self.pulls[num]}
        self.event(self.discussions[-1], "comment", author, **comment(description))
        return self.discussions[-1]

    def event(self, discussion, type, author, **data):
        event = {"id": os.urandom(12).hex(), "type": type, "createdAt": now()}
        event |= {"author": {"name": author}, "data": data}
        discussion["events"].append(event)
        return event

    def changes(self, discussion):
        """Paths a pull request changes, and those that have been changed differently on main since."""
        start, head, main = (
            self.commits[oid].files
            for oid in (discussion["start"], self.pulls[discussion["num"]], self.branches["main"])
        )
        changed = {path for path in {*start, *head} if start.get(path) != head.get(path)}
        return changed, sorted(p for p in changed if main.get(p) not in (start.get(p), head.get(p)))

    def tree(self, commit, path, recursive, expand):
        prefix = f"{path}/" if path else ""
        names = [name for name in sorted(commit.files) if name.startswith(prefix)]
        if path and not names:
            raise missing("Entry", f": {path}", **{"X-Repo-Commit": commit.oid})
        folders = {str(folder) for name in names for folder in PurePosixPath(name).parents} - {"."}
        entries = [self.folder(folder) for folder in folders if folder.startswith(prefix)]
        entries += [commit.files[name].entry(name) for name in names]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        return self.expanded(commit, sorted(entries, key=lambda entry: entry["path"]), expand)

    def folder(self, path):
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}

    def expanded(self, commit, entries, expand):
        for entry in entries if expand else ():
            last = commit
            for last in self.history(commit.oid):
                before = self.commits[last.parent].files if last.parent else {}
                if before.get(entry["path"]) != commit.files.get(entry["path"]):
                    break
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return entries

    def info(self, commit, blobs):
        card = card_of(commit.files)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if blobs else ():
            entry = commit.files[sibling["rfilename"]].entry("")
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if lfs := entry.get("lfs"):
                sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        index = card.pop("model-index", None)
        *_, first = self.history(commit.oid)
        info = {"_id": first.oid[:24], "id": self.id, "author": self.id.split("/")[0], "sha": commit.oid}
        info |= {"lastModified": commit.date, "createdAt": self.created, "private": self.private, "gated": self.gated}
        info |= {"disabled": False, "downloads": 0, "likes": 0, "siblings": siblings, "cardData": card}
        tags = [tag for tag in as_list(card.get("tags")) if isinstance(tag, str)]
        if self.kind == "models":
            config = json_of(commit.files, "config.json")
            adapter = json_of(commit.files, "adapter_config.json")
            library = card.get("library_name") or ("peft" if adapter else "transformers" if config else None)
            info |= {"modelId": self.id, "library_name": library, "pipeline_tag": card.get("pipeline_tag")}
            peft = {key: adapter.get(key) for key in ("base_model_name_or_path", "task_type")}
            info["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
            info["config"] |= {"peft": peft} if adapter else {}
            info |= {"model-index": index, "spaces": []}
            tags += [library] if library else []
            tags += [f"base_model:{base}" for base in as_list(card.get("base_model"))]
            tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []
        if self.kind == "spaces":
            info |= {"sdk": card.get("sdk", self.sdk), "runtime": self.runtime()}
        tags += [f"license:{card['license']}"] if "license" in card else []
        tags += [f"dataset:{name}" for name in as_list(card.get("datasets"))]
        return info | {"tags": list(dict.fromkeys([*tags, "region:us"]))}

    def runtime(self):
        hardware = {"current": None, "requested": self.hardware}
        return {"stage": "BUILDING", "hardware": hardware, "gcTimeout": self.sleep_time}

    def state(self):
        revisions = {}
        for name, oid in self.refs().items():
            commits = [
                {"oid": c.oid, "title": c.title, "message": c.message, "author": c.author, "parent": c.parent}
                for c in self.history(oid)
            ]
            files = [
                {"path": path, "size": file.size, "kind": file.kind, "sha256": file.sha256}
                for path, file in sorted(self.commits[oid].files.items())
            ]
            revisions[name] = {"commits": commits, "files": files}
        state = {"type": self.kind[:-1], "visibility": self.visibility, "gated": self.gated, "sdk": self.sdk}
        state |= {"revisions": revisions, "tags": self.tags, "secrets": list(self.secrets), "hardware": self.hardware}
        return state | {"variables": self.variables, "discussions": self.discussions}


def comment(text):
    latest = {"raw": text, "html": text, "updatedAt": now()}
    return {"edited": False, "hidden": False, "latest": latest, "history": [latest]}


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def json_of(files, path):
    """A JSON object among the regular files, empty where there is none."""
    try:
        value = json.loads(files[path].data)
    except (KeyError, TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def front_matter(text):
    """The metadata of a README (None without any); ValueError where it is no YAML mapping."""
    import yaml  # as huggingface_hub does; the standard library has no YAML

    found = FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError("The metadata must be a mapping")
    return data


def card_of(files):
    try:
        return front_matter(files["README.md"].data.decode()) or {}
    except (KeyError, AttributeError, ValueError):
        return {}


def card_errors(text, kind):
    """What validate-yaml has against a README: errors and warnings."""
    try:
        data = front_matter(text)
    except ValueError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for key, hub in (("base_model", "models"), ("datasets", "datasets"), ("models", "models")):
        many = isinstance(data.get(key), list)
        for n, value in enumerate(data[key] if many else [data[key]] if key in data else ()):
            name = f"{key}[{n}]" if many else key
            if not isinstance(value, str):
                errors.append(f'"{name}" must be a string')
            elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", value, re.A):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co/{hub}.')
    for value in as_list(data.get("license", [])) or [None] * ("license" in data):
        if value not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    for key in ("tags", "language", "metrics"):
        if not all(isinstance(value, str) for value in as_list(data.get(key))):
            errors.append(f'"{key}" must be a string or an array of strings')
    for key in ("library_name", "pipeline_tag", "license_name", "title"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    if "model-index" in data:
        errors += index_errors(data["model-index"])
    if kind == "space":
        choices = {"sdk": SPACE_SDKS, "colorFrom": SPACE_COLORS, "colorTo": SPACE_COLORS}
        for key, allowed in choices.items():
            if (key in data or key == "sdk") and data.get(key) not in allowed:
                errors.append(f'"{key}" must be one of [{", ".join(allowed)}]')
        if len(str(data.get("short_description", ""))) > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    return errors, []


def index_errors(index):
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []

    def require(value, where, /, **types):
        if not isinstance(value, dict):
            errors.append(f'"{where}" must be of type object')
            return
        for key, kind in types.items():
            if not isinstance(value.get(key), kind):
                errors.append(f'"{where}.{key}" is required')

    for n, model in enumerate(index):
        require(model, f"model-index[{n}]", name=str, results=list)
        for m, result in enumerate(as_list(model.get("results")) if isinstance(model, dict) else ()):
            name = f"model-index[{n}].results[{m}]"
            require(result, name, task=dict, dataset=dict, metrics=list)
            if isinstance(result, dict):
                require(result.get("task", {}), f"{name}.task", type=str)
                require(result.get("dataset", {}), f"{name}.dataset", type=str, name=str)
                for k, metric in enumerate(as_list(result.get("metrics"))):
                    require(metric, f"{name}.metrics[{k}]", type=str, value=(int, float, str, dict, list))
    return errors


def ignored(path, gitignore):
    """Whether .gitignore text (fnmatch, no `**`) names the path or a folder of it."""
    parts = path.split("/")
    heads = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    result = False
    for line in map(str.strip, gitignore.splitlines()):
        pattern = line.lstrip("!").rstrip("/")
        if not pattern or line.startswith("#"):
            continue
        candidates = heads[:-1] if line.endswith("/") else heads
        if "/" not in pattern:
            candidates = [head.rpartition("/")[2] for head in candidates]
        if any(fnmatch.fnmatch(candidate, pattern.lstrip("/")) for candidate in candidates):
            result = not line.startswith("!")
    return result


class Hub:
    def __init__(self, root):
        self.root, self.lock, self.url = Path(root).resolve(), threading.RLock(), None
        self.reset()

    def reset(self):
        self.repos, self.faults, self.log, self.users = {}, [], [], {}
        self.lfs_threshold, self.chunk_size = 10 * 1000**2, 5 * 1000**2
        orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        self.add_user(name="me", token=TOKENS["me"], role="write", orgs=orgs)
        self.add_user(name="me", token=TOKENS["reader"], role="read", orgs=orgs)
        self.add_user(name="other", token=TOKENS["other"], role="write")
        # A new folder each time: a client that still has the old CAS open would be in the way.
        self.store = Path(tempfile.mkdtemp(dir=self.root))
        (self.store / "objects").mkdir()

    def add_user(self, name, token, role="write", orgs=(), fineGrained=None):
        self.users[token] = {"name": name, "role": role, "orgs": list(orgs), "fineGrained": fineGrained}

    # Rights

    def user_of(self, authorization):
        token = (authorization or "").removeprefix("Bearer ").strip()
        if token and token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def may(self, user, kind, repo_id, write):
        """Whether user and token have the right on a repo (a public one can be read in any case)."""
        namespace = repo_id.split("/")[0]
        orgs = {org["name"]: org["roleInOrg"] for org in user["orgs"]}
        role = "admin" if namespace == user["name"] else orgs.get(namespace)
        if role is None or (write and role not in WRITING_ROLES):
            return False
        if user["role"] == "fineGrained":
            wanted = {"repo.write"} if write else {"repo.write", "repo.content.read"}
            return any(
                scope["entity"]["name"] in (namespace, repo_id) and wanted & set(scope["permissions"])
                for scope in (user["fineGrained"] or {}).get("scoped", ())
            )
        return user["role"] == "write" or not write

    def repo(self, request, kind, repo_id, access, revision=None):
        repo, user = self.repos.get(PREFIX[kind] + repo_id), request.user
        if repo is None or (repo.private and not (user and self.may(user, kind, repo_id, False))):
            raise missing("Repo", status=404 if user else 401)
        if access == "read":
            return repo
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user["role"] == "read":
            raise Refusal(403, "This token has no write access: use a token with the write role")
        own = [f"refs/pr/{num}" for num in repo.pulls if repo.discussions[num - 1]["author"]["name"] == user["name"]]
        if access == "push" and (revision in own or request.query.get("create_pr") == "1"):
            return repo
        if access != "discuss" and not self.may(user, kind, repo_id, True):
            message = "you must have write access; pass `create_pr=1` as a query parameter to create a Pull Request"
            raise Refusal(403, f"Forbidden: {message}")
        return repo

    def namespace(self, request, body, kind):
        """The id of a repo in the user's own or a foreign namespace, which has to be writable."""
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{body.get('organization') or request.user['name']}/{body['name']}"
        if not self.may(request.user, kind, repo_id, True):
            space = repo_id.split("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{space}"')
        return repo_id

    # Contents

    def objects(self):
        return self.store / "objects"

    def xet_hashes(self):
        """Map of SHA-256 to (Xet hash, size) of all files in the shards of the CAS."""
        found = {}
        for shard in (self.store / "cas").rglob("*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] not in (b"\xff" * 32, b"") and at + 48 <= len(data):
                flags, count = struct.unpack_from("<II", data, at + 32)
                name, entries = data[at : at + 32], at + 48
                at = entries + 48 * count * (2 if flags & 0x80000000 else 1)
                if flags & 0x40000000:
                    size = sum(struct.unpack_from("<I", data, entries + 48 * n + 36)[0] for n in range(count))
                    found[hex_of(data[at : at + 32])] = hex_of(name), size
                    at += 48
        return found

    def content(self, file):
        if file.data is not None:
            return file.data
        path = self.objects() / file.sha256
        if not path.exists():
            import hf_xet

            # Its database can be open in one process only, and the client may be holding it: read a copy.
            with tempfile.TemporaryDirectory(dir=self.root) as folder:
                shutil.copytree(self.store / "cas", f"{folder}/cas")
                session = hf_xet.XetSession()
                with session.new_file_download_group(endpoint=f"local://{folder}/cas") as group:
                    group.start_download_file(hf_xet.XetFileInfo(file.xet, file.size), f"{folder}/file")
                shutil.move(f"{folder}/file", path)
        return path.read_bytes()

    def large_file(self, sha256, size):
        path = self.objects() / sha256
        xet, xet_size = self.xet_hashes().get(sha256, (None, None))
        if xet is None and not path.exists():
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        actual = path.stat().st_size if xet is None else xet_size
        if size not in (None, actual):
            raise Refusal(400, f"Object {sha256} has {actual} bytes, not {size}")
        return File(actual, sha256, None, xet)

    # Requests

    def answer(self, request):
        """Status, headers and body for a request."""
        try:
            request.user = self.user_of(request.headers.get("Authorization"))
            for method, pattern, access, function in ROUTES:
                match = pattern.fullmatch(request.path)
                if match and method == request.method.replace("HEAD", "GET"):
                    groups = [group and unquote(group) for group in match.groups()]
                    if access:
                        kind, repo_id, *groups = groups
                        revision = groups[0] if groups else None
                        groups.insert(0, self.repo(request, kind or "models", repo_id, access, revision))
                        request.note = groups[0].key
                    result = function(self, request, *groups)
                    return result if isinstance(result, tuple) else (200, {}, result)
            if repo := re.match(REPO, request.path):
                self.repo(request, repo[1], unquote(repo[2]), "read")
            elif re.match(r"/api/(models|datasets|spaces)/[^/]+", request.path):
                raise missing("Repo", status=404 if request.user else 401)
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            request.note = f"{request.note} {refusal.message}".strip()
            headers = {"X-Error-Message": refusal.message.replace("\n", " ")} | refusal.headers
            return refusal.status, headers, {"error": refusal.message}
        except Exception as error:
            traceback.print_exc()
            request.note = f"{request.note} {error!r}".strip()
            return 500, {}, {"error": f"Error in hub_server.py: {error!r}"}

    @route("GET", r"/api/telemetry/.*")
    def telemetry(self, request):
        return {}

    @route("GET", r"/api/whoami-v2")
    def whoami(self, request):
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        user = request.user
        orgs = [{"type": "org", "fullname": org["name"], "isEnterprise": False, **org} for org in user["orgs"]]
        token = {"displayName": "test", "role": user["role"], "createdAt": now()}
        token |= {"fineGrained": user["fineGrained"]} if user["fineGrained"] else {}
        who = {"type": "user", "name": user["name"], "fullname": user["name"], "isPro": False, "orgs": orgs}
        return who | {"email": f"{user['name']}@example.com", "auth": {"type": "access_token", "accessToken": token}}

    @route("POST", r"/api/validate-yaml")
    def validate(self, request):
        body = request.json()
        errors, warnings = card_errors(body["content"], body.get("repoType"))
        answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": w} for w in warnings]}
        return (400 if errors else 200), {}, answer

    @route("POST", r"/api/repos/create")
    def create(self, request):
        body = request.json()
        kind = (body.get("type") or "model") + "s"
        repo_id = self.namespace(request, body, kind)
        request.note = PREFIX[kind] + repo_id
        name = body["name"]
        if not re.fullmatch(r"\w[\w.-]{0,94}\w|\w", name, re.A) or re.search(r"--|\.\.|\.git$", name):
            raise Refusal(400, f"Invalid repo name: {name}")
        if kind == "spaces" and body.get("sdk") not in SPACE_SDKS:
            raise Refusal(400, f'"sdk" must be one of [{", ".join(SPACE_SDKS)}]')
        url = f"{self.url}/{PREFIX[kind]}{repo_id}"
        if PREFIX[kind] + repo_id in self.repos:
            return 409, {}, {"error": f"You already created this {kind[:-1]} repo", "url": url}
        repo = Repo(kind, repo_id, request.user["name"], body.get("visibility") or "public", body.get("sdk"))
        self.repos[repo.key] = repo
        repo.hardware = body.get("hardware") or repo.hardware
        repo.sleep_time = body.get("sleepTimeSeconds")
        repo.secrets = {secret["key"]: secret for secret in body.get("secrets") or ()}
        repo.variables = {variable["key"]: variable for variable in body.get("variables") or ()}
        return {"url": url, "name": repo_id, "private": repo.private}

    @route("DELETE", r"/api/repos/delete")
    def delete(self, request):
        body = request.json()
        kind = (body.get("type") or "model") + "s"
        owner = body.get("organization") or (request.user or {}).get("name")
        del self.repos[self.repo(request, kind, f"{owner}/{body['name']}", "write").key]
        return {}

    @route("POST", r"/api/repos/move")
    def move(self, request):
        body = request.json()
        kind = (body.get("type") or "model") + "s"
        repo = self.repo(request, kind, body["fromRepo"], "write")
        organization, name = body["toRepo"].split("/")
        target = self.namespace(request, {"organization": organization, "name": name}, kind)
        if PREFIX[kind] + target in self.repos:
            raise Refusal(409, f"{target} exists already")
        del self.repos[repo.key]
        repo.id = target
        self.repos[repo.key] = repo
        return {}

    @route("PUT", REPO + "/settings", "write")
    def settings(self, request, repo):
        body = request.json()
        repo.visibility = body.get("visibility", repo.visibility)
        repo.gated = body.get("gated", repo.gated)
        return {"private": repo.private, "gated": repo.gated}

    @route("GET", REPO + "/auth-check", "read")
    @route("GET", REPO + "/auth-check/write", "write")
    def auth_check(self, request, repo):
        return {}

    @route("GET", r"/api/(models|datasets|spaces)")
    def listing(self, request, kind):
        query, found = request.query, []
        for repo in self.repos.values():
            readable = not repo.private or (request.user and self.may(request.user, kind, repo.id, False))
            wanted = query.get("author") in (None, repo.id.split("/")[0]) and query.get("search", "") in repo.id
            if repo.kind == kind and readable and wanted:
                found.append(repo.info(repo.at("main"), False))
        return found

    @route("GET", REPO + "(?:/revision/([^/]+))?", "read")
    def info(self, request, repo, revision):
        info = repo.info(repo.at(revision or "main"), truthy(request.query.get("blobs")))
        if expand := request.lists.get("expand", []) + request.lists.get("expand[]", []):
            info = {key: value for key, value in info.items() if key in ("_id", "id", *expand)}
        return info

    @route("GET", REPO + "/tree/([^/]+)(?:/(.*))?", "read")
    def tree(self, request, repo, revision, path):
        options = (truthy(request.query.get(name)) for name in ("recursive", "expand"))
        return repo.tree(repo.at(revision), (path or "").strip("/"), *options)

    @route("POST", REPO + "/paths-info/([^/]+)", "read")
    def paths_info(self, request, repo, revision):
        commit = repo.at(revision)
        if request.headers.get("Content-Type", "").startswith("application/json"):
            body = request.json()
            paths, expand = as_list(body["paths"]), body.get("expand")
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), form.get("expand", ["false"])[0]
        entries = []
        for path in paths:
            if path in commit.files:
                entries.append(commit.files[path].entry(path))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                entries.append(repo.folder(path))
        return repo.expanded(commit, entries, truthy(expand))

    @route("GET", REPO + "/refs", "read")
    def refs(self, request, repo):
        def listed(kind, refs):
            return [{"name": str(n), "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        refs = {"branches": listed("heads", repo.branches), "converts": [], "tags": listed("tags", repo.tags)}
        return refs | ({"pullRequests": listed("pr", repo.pulls)} if "include_prs" in request.query else {})

    @route("GET", REPO + "/commits/([^/]+)", "read")
    def commits(self, request, repo, revision):
        return [
            {"id": c.oid, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}
            for c in repo.history(repo.at(revision).oid)
        ]

    @route("POST", REPO + "/branch/([^/]+)", "write")
    def add_branch(self, request, repo, name):
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.at(request.json().get("startingPoint", "main")).oid
        return {}

    @route("DELETE", REPO + "/branch/([^/]+)", "write")
    def delete_branch(self, request, repo, name):
        if name == "main":
            raise Refusal(403, "Cannot delete the main branch")
        if repo.branches.pop(name, None) is None:
            raise missing("Revision", f": {name}")
        return {}

    @route("POST", REPO + "/tag/([^/]+)", "write")
    def add_tag(self, request, repo, revision):
        name = request.json()["tag"]
        if name in repo.tags:
            raise Refusal(409, f"Tag already exists: {name}")
        repo.tags[name] = repo.at(revision).oid
        return {}

    @route("DELETE", REPO + "/tag/([^/]+)", "write")
    def delete_tag(self, request, repo, name):
        if repo.tags.pop(name, None) is None:
            raise missing("Revision", f": {name}")
        return {}

    # Uploads

    @route("POST", REPO + "/preupload/([^/]+)", "push")
    def preupload(self, request, repo, revision):
        body, present, answers = request.json(), repo.at(revision).files, []
        stored = present[".gitignore"].data or b"" if ".gitignore" in present else b""
        gitignore = body["gitIgnore"] if "gitIgnore" in body else stored.decode()
        for file in body["files"]:
            path, size = file["path"], file["size"]
            large = size > self.lfs_threshold or path.rpartition(".")[2] in LFS_SUFFIXES or "tfevents" in path
            answer = {"path": path, "uploadMode": "lfs" if large and size else "regular"}
            answer["shouldIgnore"] = ignored(path, gitignore)
            if old := present.get(path):
                answer["oid"] = old.sha256 if old.data is None else old.oid
            answers.append(answer)
        return {"files": answers, "commitOid": repo.at(revision).oid}

    # The client does not say here whether it is for a pull request.
    @route("POST", PAGE + r"\.git/info/lfs/objects/batch", "discuss")
    def batch(self, request, repo):
        objects = []
        for item in request.json()["objects"]:
            oid, size, at = item["oid"], item["size"], f"{self.url}/_lfs/{repo.key}/{item['oid']}"
            if not (self.objects() / oid).exists():
                upload = {"href": f"{at}/put"}
                if size > self.chunk_size:
                    parts = range(1, -(-size // self.chunk_size) + 1)
                    header = {"chunk_size": str(self.chunk_size), **{str(n): f"{at}/part/{n}" for n in parts}}
                    upload = {"href": f"{at}/complete", "header": header}
                item = item | {"actions": {"upload": upload, "verify": {"href": f"{at}/verify"}}}
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    def keep(self, oid, data):
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "The content does not match its SHA-256")
        (self.objects() / oid).write_bytes(data)
        return {}

    @route("PUT", r"/_lfs/.+/([0-9a-f]{64})/put")
    def put(self, request, oid):
        return self.keep(oid, request.body)

    @route("PUT", r"/_lfs/.+/([0-9a-f]{64})/part/(\d+)")
    def put_part(self, request, oid, number):
        (self.store / f"{oid}.{number}").write_bytes(request.body)
        return 200, {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'}, {}

    @route("POST", r"/_lfs/.+/([0-9a-f]{64})/complete")
    def complete(self, request, oid):
        parts = [(self.store / f"{oid}.{part['partNumber']}").read_bytes() for part in request.json()["parts"]]
        if [f'"{hashlib.md5(part).hexdigest()}"' for part in parts] != [p["etag"] for p in request.json()["parts"]]:
            raise Refusal(400, "Wrong ETag of a part")
        return self.keep(oid, b"".join(parts))

    @route("POST", r"/_lfs/.+/([0-9a-f]{64})/verify")
    def verify(self, request, oid):
        path = self.objects() / oid
        if not path.exists() or path.stat().st_size != request.json()["size"]:
            raise Refusal(404, "The object has not been uploaded")
        return {}

    @route("GET", REPO + "/xet-write-token/([^/]+)", "push")
    @route("GET", REPO + "/xet-read-token/([^/]+)", "read")
    def xet_token(self, request, repo, revision):
        if request.query.get("create_pr") != "1":  # huggingface_hub then names the revision "None"
            repo.at(revision)
        url, expires = f"local://{self.store}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return 200, headers, {"casUrl": url, "accessToken": "xet", "exp": expires}

    @route("POST", REPO + "/commit/([^/]+)", "push")
    def commit(self, request, repo, revision):
        head, create_pr = repo.at(revision), request.query.get("create_pr") == "1"
        if revision.removeprefix("refs/heads/") not in repo.branches and not revision.startswith("refs/pr/"):
            raise Refusal(400, f"Cannot commit to {revision}")
        first, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = first["value"]
        if parent := header.get("parentCommit"):
            if create_pr:
                head = repo.at(parent)
            elif not head.oid.startswith(parent):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if not header.get("summary"):
            raise Refusal(400, "A commit needs a summary")
        if not operations:
            raise Refusal(400, "An empty commit is not allowed")
        files = self.applied(dict(head.files), operations, repo.kind[:-1])
        author, title = request.user["name"], header["summary"]
        answer = {}
        if create_pr:
            pull = repo.discuss(title, header.get("description", ""), author, True, "open", head.oid)
            revision = f"refs/pr/{pull['num']}"
            answer["pullRequestUrl"] = f"{self.url}/{repo.key}/discussions/{pull['num']}"
        commit = repo.add_commit(revision, head.oid, title, header.get("description", ""), author, files)
        request.note = f"{repo.key} {revision} {commit.oid}"
        url = f"{self.url}/{repo.key}/commit/{commit.oid}"
        return answer | {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}

    def applied(self, files, operations, kind):
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = regular(base64.b64decode(value["content"], validate=True))
                errors = card_errors(files[path].data.decode(), kind)[0] if path == "README.md" else []
                if errors:
                    raise Refusal(400, "Invalid metadata in README.md.\n" + "\n".join(f"- {text}" for text in errors))
            elif key == "lfsFile":
                files[path] = self.large_file(value["oid"], value.get("size"))
            elif key in ("deletedFile", "deletedFolder"):
                folder = path.rstrip("/") + "/"
                gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(folder))]
                if not gone:
                    raise missing("Entry", f": {path}")
                for old in gone:
                    del files[old]
            else:
                raise Refusal(400, f"Unknown operation {key}")
        return files

    # Discussions

    @route("GET", REPO + "/discussions", "read")
    def discussions(self, request, repo):
        query, size = request.query, 50
        types = {"pull_request": [True], "discussion": [False]}.get(query.get("type"), [True, False])
        statuses = {"open": ["open", "draft"], "closed": ["closed", "merged"]}.get(query.get("status"))
        found = [
            {key: value for key, value in discussion.items() if key not in ("events", "start")}
            for discussion in reversed(repo.discussions)
            if discussion["isPullRequest"] in types
            and (statuses is None or discussion["status"] in statuses)
            and query.get("author") in (None, discussion["author"]["name"])
        ]
        start = int(query.get("p", 0)) * size
        return {"discussions": found[start : start + size], "count": len(found), "start": start}

    @route("POST", REPO + "/discussions", "discuss")
    def add_discussion(self, request, repo):
        body = request.json()
        pull = bool(body.get("pullRequest"))
        status = "draft" if pull else "open"
        discussion = repo.discuss(body["title"], body.get("description", ""), request.user["name"], pull, status)
        return {"num": discussion["num"], "pullRequest": pull}

    def discussion_of(self, repo, number):
        if not 1 <= int(number) <= len(repo.discussions):
            raise Refusal(404, "Discussion not found")
        return repo.discussions[int(number) - 1]

    @route("GET", REPO + r"/discussions/(\d+)", "read")
    def discussion(self, request, repo, number):
        discussion = self.discussion_of(repo, number)
        if not discussion["isPullRequest"]:
            return discussion
        conflicts = [] if discussion["status"] == "merged" else repo.changes(discussion)[1]
        return discussion | {"filesWithConflicts": conflicts, "diff": ""}

    @route("POST", REPO + r"/discussions/(\d+)/(comment|title|status|merge)", "discuss")
    def discussion_change(self, request, repo, number, what):
        discussion, user = self.discussion_of(repo, number), request.user["name"]
        body = request.json() if request.body else {}
        writer = self.may(request.user, repo.kind, repo.id, True)
        if what != "comment" and not writer and (what == "merge" or discussion["author"]["name"] != user):
            raise Refusal(403, "Forbidden: you must have write access")
        if what == "title":
            event = repo.event(discussion, "title-change", user, **{"from": discussion["title"], "to": body["title"]})
            discussion["title"] = body["title"]
            return {"newTitle": event}
        if body.get("comment"):
            event = repo.event(discussion, "comment", user, **comment(body["comment"]))
            if what == "comment":
                return {"newMessage": event}
        status = "merged" if what == "merge" else body["status"]
        if discussion["status"] == "merged" or (what == "merge" and discussion["status"] != "open"):
            raise Refusal(400, f"Cannot {what} a discussion that is {discussion['status']}")
        if what == "merge":
            self.merge(repo, discussion, user)
        discussion["status"] = status
        return {"newStatus": repo.event(discussion, "status-change", user, status=status)}

    def merge(self, repo, discussion, user):
        changed, conflicts = repo.changes(discussion)
        if conflicts:
            raise Refusal(409, "There are conflicts in " + ", ".join(conflicts))
        main, pull = repo.at("main"), repo.commits[repo.pulls[discussion["num"]]]
        files = dict(main.files) | {path: pull.files[path] for path in changed & set(pull.files)}
        files = {path: file for path, file in files.items() if path in pull.files or path not in changed}
        title = f"{discussion['title']} (#{discussion['num']})"
        discussion["changes"]["mergeCommitId"] = repo.add_commit("main", main.oid, title, "", user, files).oid

    # Downloads

    @route("GET", PAGE + "/resolve/([^/]+)/(.+)", "read")
    def resolve(self, request, repo, revision, path):
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise missing("Entry", **headers)
        file = commit.files[path]
        headers["ETag"] = f'"{file.oid if file.data is not None else file.sha256}"'
        if file.data is None:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        if file.xet:
            token = f"{self.url}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if request.method == "HEAD" and not wanted:
            return 200, headers | {"Content-Length": str(file.size)}, b""
        data = self.content(file)
        if not wanted:
            return 200, headers, data
        start, end = int(wanted[1]), min(int(wanted[2] or file.size - 1), file.size - 1)
        if start >= file.size:
            return 416, headers | {"Content-Range": f"bytes */{file.size}"}, b""
        return 206, headers | {"Content-Range": f"bytes {start}-{end}/{file.size}"}, data[start : end + 1]

    # Spaces

    @route("GET", r"/api/(spaces)/([^/]+/[^/]+)/(secrets|variables)", "write")
    @route("POST", r"/api/(spaces)/([^/]+/[^/]+)/(secrets|variables)", "write")
    @route("DELETE", r"/api/(spaces)/([^/]+/[^/]+)/(secrets|variables)", "write")
    def space_values(self, request, repo, what):
        values = getattr(repo, what)
        if request.method == "POST":
            body = request.json()
            values[body["key"]] = body | {"updatedAt": now()}
        elif request.method == "DELETE":
            values.pop(request.json()["key"], None)
        secret = what == "secrets"
        return {key: {k: v for k, v in value.items() if k != "value" or not secret} for key, value in values.items()}

    @route("GET", r"/api/(spaces)/([^/]+/[^/]+)/runtime", "read")
    def space_runtime(self, request, repo):
        return repo.runtime()

    @route("POST", r"/api/(spaces)/([^/]+/[^/]+)/(hardware|sleeptime|pause|restart)", "write")
    def space_control(self, request, repo, what):
        body = request.json() if request.body else {}
        repo.hardware = body.get("flavor", repo.hardware)
        repo.sleep_time = body.get("sleepTimeSeconds", body.get("seconds", repo.sleep_time))
        return repo.runtime()

    # Control

    def fault(self, method, path):
        """The first fault that is due for a request."""
        with self.lock:
            for fault in self.faults:
                if (
                    fault["times"] == 0
                    or not re.fullmatch(fault["method"], method)
                    or not re.search(fault["path"], path)
                ):
                    continue
                if fault["skip"] > 0:
                    fault["skip"] -= 1
                    continue
                fault["times"] -= fault["times"] > 0
                return fault

    def control(self, request):
        what, body = request.path.removeprefix("/_control/"), json.loads(request.body or b"{}")
        if what == "fault":
            default = {"method": "POST", "times": 1, "skip": 0, "status": 500, "headers": {}, "action": "answer"}
            self.faults.append(default | {"body": {"error": "Injected fault"}, "seconds": 1} | body)
        elif what == "mend":
            self.faults.clear()
        elif what == "reset":
            self.reset()
        elif what == "user":
            self.add_user(**body)
        elif what == "settings":
            self.lfs_threshold = body.get("lfs_threshold", self.lfs_threshold)
            self.chunk_size = body.get("chunk_size", self.chunk_size)
        elif what == "log":
            return 200, {}, self.log
        elif what == "state":
            return 200, {}, {key: repo.state() for key, repo in self.repos.items()}
        elif what == "file":
            repo, path = self.repos.get(request.query["repo"]), request.query["path"]
            files = repo.at(request.query["revision"]).files if repo else {}
            return (200, {}, self.content(files[path])) if path in files else (404, {}, {"error": "no such file"})
        else:
            return 404, {}, {"error": what}
        return 200, {}, {}


def hex_of(hash):
    """A Xet hash in their notation: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def json(self):
        return json.loads(self.body)

    def read_body(self, half=False):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    break
            else:
                while self.rfile.readline().strip():
                    pass
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if half else length)

    def serve(self):
        hub, raw, self.method = self.server.hub, self.path, self.command
        self.path, _, query = raw.partition("?")
        self.lists = parse_qs(query, keep_blank_values=True)
        self.query = {key: values[0] for key, values in self.lists.items()}
        self.user, self.note, self.body = None, "", b""
        if self.path.startswith("/_control/"):
            self.body = self.read_body()
            with hub.lock:
                answer = hub.control(self)
            return self.send(*answer)
        fault = hub.fault(self.method, raw) or {"action": None}
        action = fault["action"]
        if action == "cut" or (action == "cut_body" and self.method in ("POST", "PUT")):
            self.body = self.read_body(half=True) if action == "cut_body" else b""
            self.record(raw, "cut", action)
            return self.cut()
        self.body = self.read_body()
        if action == "hang":
            time.sleep(fault["seconds"])
        if action != "answer":
            with hub.lock:
                answer = hub.answer(self)
        if action in ("answer", "answer_after"):
            answer = fault["status"], fault["headers"], fault["body"]
        broken = action in ("cut_after", "cut_body", "close_body")
        self.record(raw, "cut" if broken else answer[0], action)
        if action != "cut_after":
            self.send(*answer, half=broken)
        if action == "close_body":
            self.close_connection = True
        elif broken:
            time.sleep(0.3 if action == "cut_body" else 0)  # a reset throws away what has not been sent yet
            self.cut()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def record(self, raw, status, action):
        hub = self.server.hub
        with hub.lock:
            if self.user is None:
                self.user = hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            who = {"user": self.user and self.user["name"], "role": self.user and self.user["role"]}
            note = f"{self.note} [{action}]".strip() if action else self.note
            entry = {"method": self.method, "path": raw, "status": status, "size": len(self.body), "note": note}
            hub.log.append(entry | who | {"time": time.time()})

    def send(self, status, headers, body, half=False):
        kind = "application/octet-stream"
        if not isinstance(body, (bytes, str)):
            body, kind = json.dumps(body, default=str).encode(), "application/json; charset=utf-8"
        elif isinstance(body, str):
            kind = "text/html" if body.lstrip().startswith("<") else "text/plain; charset=utf-8"
            body = body.encode()
        defaults = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Request-Id": os.urandom(8).hex()}
        self.send_response(status)
        for name, value in (defaults | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.method != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)

    def cut(self):
        """Reset the connection, as a broken line or a dying server does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass  # the client has gone

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main(root):
    os.environ["HF_HOME"] = root  # where hf_xet keeps its own cache
    server = Server(("127.0.0.1", 0), Request)
    server.hub = Hub(root)
    server.hub.url = f"http://127.0.0.1:{server.server_port}"
    print(server.hub.url, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
