"""A small Hugging Face Hub for the tests: `python hub_server.py ROOT` prints its URL and ends when its stdin closes.

It keeps users, repos, faults and the request log in memory, LFS objects and a Xet CAS (`local://`) below ROOT. It was
written from the source of huggingface_hub 2.4 and has never been compared with the real Hub.
"""

import base64
import fnmatch
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote

import yaml


TOKENS = {who: "hf_" + f"fakeTokenOf{who.title()}".ljust(34, "x") for who in ("me", "reader", "other")}
LFS_SUFFIXES = "bin ckpt gguf gz h5 model msgpack npy npz onnx parquet pkl pt pth safetensors tar tgz zip zst".split()
# Some of those that the Hub knows.
LICENSES = """apache-2.0 mit openrail bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 gpl-3.0 lgpl-3.0 mpl-2.0
openmdw-1.1 openrail++ creativeml-openrail-m llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other""".split()
FRONT_MATTER = re.compile(r"\A\s*---[\r\n]+(.*?)(?:[\r\n]+)?---(?:\r\n|\n|\Z)", re.S)
PREFIX = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
PAGE = r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)"
OBJECT = r"/_lfs/([0-9a-f]{64})"
DATE = "2026-01-01T00:00:00.000Z"
ROUTES = []


class Refusal(Exception):
    def __init__(self, status, message, **headers):
        self.status, self.message, self.headers = status, message, headers


def require(condition, status, message):
    if not condition:
        raise Refusal(status, message)


def missing(what, detail, status=404, **headers):
    return Refusal(status, f"{what} not found: {detail}", **{"X-Error-Code": f"{what}NotFound"}, **headers)


def route(methods, pattern, access=None):
    """Register a method of Hub; with `access` it is given the repo named by the first two groups of the pattern."""

    def register(function):
        ROUTES.append((re.compile(methods), re.compile(pattern), access, function))
        return function

    return register


class File:
    def __init__(self, size, sha256, data=None, xet=None):
        self.size, self.sha256, self.data, self.xet = size, sha256, data, xet  # data: of a regular file
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        blob = pointer if data is None else data
        oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        self.etag = sha256 if data is None else oid
        kind = "regular" if data is not None else "xet" if xet else "lfs"
        self.facts = {"type": "file", "kind": kind, "size": size, "oid": oid, "blobId": oid, "sha256": sha256}
        if data is None:
            self.facts["lfs"] = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}
        if xet:
            self.facts["xetHash"] = xet


def regular(data):
    return File(len(data), hashlib.sha256(data).hexdigest(), data)


class Repo:
    def __init__(self, kind, id, author, visibility="public", sdk=None, hardware="cpu-basic"):
        self.kind, self.id, self.key, self.visibility = kind, id, PREFIX[kind] + id, visibility
        self.sdk, self.hardware, self.secrets, self.variables = sdk, hardware, {}, {}
        self.history, self.files, self.refs, self.discussions = {None: []}, {}, {}, []
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": regular(attributes.encode())}
        if kind == "spaces":
            files["README.md"] = regular(f"---\ntitle: {id}\nsdk: {sdk}\n---\n".encode())
        self.add_commit("refs/heads/main", None, "initial commit", "", author, files)

    def at(self, revision):
        """The id of a commit that is named by a branch, tag, pull request or itself."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.refs[name]
        if revision not in self.files:
            raise missing("Revision", revision)
        return revision

    def add_commit(self, ref, parent, title, message, author, files):
        oid = os.urandom(20).hex()
        commit = {"oid": oid, "title": title, "message": message, "author": author, "parent": parent}
        self.history[oid] = [commit, *self.history[parent]]
        self.files[oid], self.refs[ref] = files, oid
        return oid

    def discuss(self, title, description, author, pull, status):
        number = len(self.discussions) + 1
        discussion = {"num": number, "title": title, "description": description, "author": {"name": author}}
        discussion |= {"status": status, "isPullRequest": pull, "createdAt": DATE, "events": []}
        discussion["repo"] = {"name": self.id, "type": self.kind[:-1]}
        if pull:
            discussion |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}
            self.refs[f"refs/pr/{number}"] = self.refs["refs/heads/main"]
        self.discussions.append(discussion)
        return number

    def entries(self, oid):
        """Path -> entry of every file and folder."""
        files = self.files[oid]
        folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
        entries = {path: {"type": "directory", "path": path, "oid": oid, "size": 0} for path in folders}
        return entries | {path: file.facts | {"path": path} for path, file in files.items()}

    def tree(self, oid, prefix, recursive):
        found = [entry for path, entry in sorted(self.entries(oid).items()) if path.startswith(prefix)]
        if not found:
            raise missing("Entry", prefix, **{"X-Repo-Commit": oid})
        return [entry for entry in found if recursive or "/" not in entry["path"].removeprefix(prefix)]

    def references(self):
        found = {"heads": [], "tags": [], "pr": []}
        for ref, oid in self.refs.items():
            _, kind, name = ref.split("/", 2)
            found[kind].append({"name": name, "ref": ref, "targetCommit": oid})
        return {"branches": found["heads"], "tags": found["tags"], "pullRequests": found["pr"], "converts": []}

    def runtime(self):
        return {"stage": "BUILDING", "hardware": {"current": None, "requested": self.hardware}}

    def info(self, oid, blobs):
        readme = self.files[oid].get("README.md")
        card = front_matter(readme.data.decode()) if readme and readme.data else {}
        info = {"id": self.id, "sha": oid, "lastModified": DATE, "cardData": card}
        info |= {"private": self.visibility == "private", "sdk": self.sdk}
        info["runtime"] = self.runtime()
        info |= {key: card.get(key) for key in ("library_name", "pipeline_tag", "model-index")}
        info["tags"] = listed(card, "tags") + [f"license:{name}" for name in listed(card, "license")]
        files = self.files[oid].items()
        info["siblings"] = [{"rfilename": path} | (file.facts if blobs else {}) for path, file in files]
        return info

    def state(self):
        revisions = {}
        for ref, oid in self.refs.items():
            keys = ("size", "kind", "sha256")
            files = [{"path": path} | {key: file.facts[key] for key in keys} for path, file in self.files[oid].items()]
            name = ref.removeprefix("refs/heads/").removeprefix("refs/tags/")
            revisions[name] = {"commits": self.history[oid], "files": files}
        state = {key: getattr(self, key) for key in ("visibility", "sdk", "hardware", "variables", "discussions")}
        return state | {"type": self.kind[:-1], "secrets": list(self.secrets), "revisions": revisions}


def front_matter(text):
    found = FRONT_MATTER.match(text)
    return (yaml.safe_load(found[1]) if found else None) or {}


def listed(card, key):
    value = card.get(key, [])
    return value if isinstance(value, list) else [value]


def card_errors(text):
    """What the Hub has against a README."""
    try:
        card = front_matter(text)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(card, dict):
        return ["The metadata must be a mapping"]
    errors = []
    for key in ("base_model", "datasets", "tags"):
        for value in listed(card, key):
            if not isinstance(value, str):
                errors.append(f'"{key}" must be a string')
            elif key != "tags" and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/\w[\w.-]*)?", value, re.A):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co.')
    if not all(value in LICENSES for value in listed(card, "license")):
        errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    models = card.get("model-index", [])
    if not isinstance(models, list) or not all(isinstance(model, dict) and "results" in model for model in models):
        errors.append('"model-index" must be an array of models with their results')
    return errors


def ignored(path, gitignore):
    """Whether .gitignore text (taken for fnmatch patterns, without "!") names the path or a folder of it."""
    parts = path.split("/")
    names = [*parts, *("/".join(parts[:n]) for n in range(2, len(parts) + 1))]
    patterns = [line.strip().strip("/") for line in gitignore.splitlines()]
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def hex_of(hash):
    """A Xet hash in their notation: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))


class Hub(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Request)
        self.url, self.root = f"http://127.0.0.1:{self.server_port}", Path(root).resolve()
        self.lock = threading.RLock()
        self.reset()

    def handle_error(self, *args):
        pass  # a client that has gone

    def reset(self):
        self.repos, self.faults, self.log = {}, [], []
        self.settings = {"lfs_threshold": 10 * 1000**2, "chunk_size": 5 * 1000**2}
        orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        me = {"name": "me", "role": "write", "orgs": orgs}
        other = {"name": "other", "role": "write", "orgs": []}
        self.users = {TOKENS["me"]: me, TOKENS["reader"]: me | {"role": "read"}, TOKENS["other"]: other}
        # A new folder each time: a client that still has the old CAS open would be in the way.
        self.store = Path(tempfile.mkdtemp(dir=self.root))

    def may(self, user, repo_id, write):
        """Whether a user may write to, or see private repos in, the namespace of a repo."""
        if user is None or (write and user["role"] == "read"):
            return False
        roles = {org["name"]: org["roleInOrg"] for org in user["orgs"]} | {user["name"]: "admin"}
        role = roles.get(repo_id.split("/")[0])
        return role in ("admin", "write", "contributor") if write else role is not None

    def repo(self, request, kind, repo_id, access, revision=None):
        """A repo for which the user has the right to "read", "discuss", "push" (to pull requests, too) or "write"."""
        repo, user = self.repos.get(PREFIX[kind] + repo_id), request.user
        if repo is None or (repo.visibility == "private" and not self.may(user, repo_id, False)):
            raise missing("Repo", repo_id, status=404 if user else 401)
        request.note = repo.key
        pull = request.query.get("create_pr") == "1" or (revision or "").startswith("refs/pr/")
        if access == "read" or self.may(user, repo_id, True):
            return repo
        require(user, 401, "Invalid username or password.")
        if user["role"] != "read" and (access == "discuss" or (access == "push" and pull)):
            return repo
        raise Refusal(403, "Forbidden: you must have write access; pass `create_pr=1` to create a Pull Request")

    def xet_hashes(self):
        """Map of SHA-256 to Xet hash of all files in the shards of the CAS."""
        found = {}
        for shard in (self.store / "cas").rglob("*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] not in (b"\xff" * 32, b"") and at + 48 <= len(data):
                name, (flags, count) = data[at : at + 32], struct.unpack_from("<II", data, at + 32)
                at += 48 + 48 * count * (2 if flags & 0x80000000 else 1)
                if flags & 0x40000000:
                    found[hex_of(data[at : at + 32])] = hex_of(name)
                    at += 48
        return found

    def content(self, file):
        if file.data is not None:
            return file.data
        path = self.store / file.sha256
        if not path.exists():
            import hf_xet

            # Its database can be open in one process only, and the client may be holding it: read a copy.
            with tempfile.TemporaryDirectory(dir=self.root) as folder:
                shutil.copytree(self.store / "cas", f"{folder}/cas")
                session = hf_xet.XetSession()
                with session.new_file_download_group(endpoint=f"local://{folder}/cas") as group:
                    group.start_download_file(hf_xet.XetFileInfo(file.xet, file.size), str(path))
        return path.read_bytes()

    def answer(self, request):
        """Status, headers and body for a request."""
        try:
            token = request.headers.get("Authorization", "").removeprefix("Bearer ")
            request.user = self.users.get(token)
            if token and request.user is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for methods, pattern, access, function in ROUTES:
                match = pattern.fullmatch(request.path)
                if match and methods.fullmatch(request.method):
                    groups = [group and unquote(group) for group in match.groups()]
                    if access:
                        kind, repo_id, *groups = groups
                        groups.insert(0, self.repo(request, kind or "models", repo_id, access, *groups[:1]))
                    result = function(self, request, *groups)
                    return result if isinstance(result, tuple) else (200, {}, result)
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            request.note = f"{request.note} {refusal.message}".strip()
            headers = {"X-Error-Message": refusal.message.replace("\n", " ")} | refusal.headers
            return refusal.status, headers, {"error": refusal.message}
        except Exception as error:
            request.note = f"Error in hub_server.py: {error!r}"
            return 500, {}, {"error": request.note}

    @route("GET", r"/api/whoami-v2")
    def whoami(self, request):
        user = request.user
        require(user, 401, "Invalid username or password.")
        token = {"displayName": "test", "role": user["role"], "fineGrained": user.get("fineGrained")}
        return {"type": "user", "name": user["name"], "orgs": user["orgs"], "auth": {"accessToken": token}}

    @route("POST", r"/api/validate-yaml")
    def validate(self, request):
        errors = [{"message": text} for text in card_errors(json.loads(request.body)["content"])]
        return (400 if errors else 200), {}, {"errors": errors, "warnings": []}

    @route("POST|DELETE", r"/api/repos/(create|delete)")
    def create_or_delete(self, request, what):
        body, user = json.loads(request.body), request.user
        require(user, 401, "Invalid username or password.")
        kind, namespace = body.get("type") or "model", body.get("organization") or user["name"]
        right = f'the rights to {what} a {kind} under the namespace "{namespace}"'
        require(self.may(user, namespace, True), 403, f"You don't have {right}")
        if body.get("private"):  # as huggingface_hub 1.x asks for it
            body["visibility"] = "private"
        options = {key: body[key] for key in ("visibility", "sdk", "hardware") if body.get(key)}
        repo = Repo(f"{kind}s", f"{namespace}/{body['name']}", user["name"], **options)
        request.note, url = repo.key, f"{self.url}/{repo.key}"
        if what == "delete":
            if self.repos.pop(repo.key, None) is None:
                raise missing("Repo", repo.key)
            return {}
        if repo.key in self.repos:
            return 409, {}, {"error": f"You already created this {kind} repo", "url": url}
        repo.secrets = {secret["key"]: secret for secret in body.get("secrets") or ()}
        repo.variables = {variable["key"]: variable for variable in body.get("variables") or ()}
        self.repos[repo.key] = repo
        return {"url": url}

    @route("PUT", REPO + "/settings", "write")
    def change(self, request, repo):
        repo.visibility = json.loads(request.body).get("visibility", repo.visibility)
        return {}

    @route("GET", REPO + "/auth-check", "read")
    @route("GET", REPO + "/auth-check/write", "write")
    def auth_check(self, request, repo):
        return {}

    @route("GET", r"/api/(models|datasets)/([^/]+)", "read")
    def look_at_legacy(self, request, repo):
        """What is older than namespaces, such as gpt2 and squad, has an id without a slash."""
        return repo.info(repo.at("main"), False)

    @route("GET", REPO + "(?:/(revision|tree|commits|refs|runtime)(?:/([^/]+)(?:/(.*))?)?)?", "read")
    def look(self, request, repo, what, revision, path):
        oid = repo.at(revision or "main")
        if what == "tree":
            return repo.tree(oid, f"{path}/" if path else "", request.query["recursive"].lower() == "true")
        if what == "commits":
            return [{"id": c["oid"], "date": DATE, "authors": [{"user": c["author"]}], **c} for c in repo.history[oid]]
        if what == "refs":
            return repo.references()
        info = repo.info(oid, "blobs" in request.query)
        return info["runtime"] if what == "runtime" else info

    @route("POST", REPO + "/paths-info/([^/]+)", "read")
    def paths_info(self, request, repo, revision):
        entries = repo.entries(repo.at(revision))
        return [entries[path] for path in parse_qs(request.body.decode())["paths"] if path in entries]

    @route("POST", REPO + "/(branch|tag)/([^/]+)", "write")
    def add_ref(self, request, repo, kind, name):
        body = json.loads(request.body)
        if kind == "branch":
            ref, start = f"refs/heads/{name}", body.get("startingPoint", "main")
        else:
            ref, start = f"refs/tags/{body['tag']}", name
        require(ref not in repo.refs, 409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(start)
        return {}

    @route("POST", REPO + "/preupload/([^/]+)", "push")
    def preupload(self, request, repo, revision):
        body, present, answers = json.loads(request.body), repo.files[repo.at(revision)], []
        stored = present[".gitignore"].data.decode() if ".gitignore" in present else ""
        for file in body["files"]:
            path, size = file["path"], file["size"]
            large = size > self.settings["lfs_threshold"] or path.rpartition(".")[2] in LFS_SUFFIXES
            answer = {"path": path, "uploadMode": "lfs" if large and size else "regular"}
            answer["shouldIgnore"] = ignored(path, body.get("gitIgnore", stored))
            answers.append(answer | ({"oid": present[path].etag} if path in present else {}))
        return {"files": answers}

    # The client does not say here whether it is for a pull request.
    @route("POST", PAGE + r"\.git/info/lfs/objects/batch", "discuss")
    def batch(self, request, repo):
        objects, chunk_size = json.loads(request.body)["objects"], self.settings["chunk_size"]
        for item in objects:
            at = f"{self.url}/_lfs/{item['oid']}"
            upload = {"href": f"{at}/put"}
            if item["size"] > chunk_size:
                parts = range(1, -(-item["size"] // chunk_size) + 1)
                header = {"chunk_size": str(chunk_size), **{str(n): f"{at}/part/{n}" for n in parts}}
                upload = {"href": f"{at}/complete", "header": header}
            if not (self.store / item["oid"]).exists():
                item["actions"] = {"upload": upload, "verify": {"href": f"{at}/verify"}}
        return {"objects": objects}

    @route("PUT|POST", OBJECT + r"/(put|part|complete|verify)(?:/(\d+))?")
    def large_object(self, request, oid, what, number):
        path, data = self.store / oid, request.body
        if what == "part":
            (self.store / f"{oid}.{number}").write_bytes(data)
            return 200, {"ETag": f'"{number}"'}, {}
        if what == "verify":
            stored = path.exists() and path.stat().st_size == json.loads(data)["size"]
            require(stored, 404, "The object has not been uploaded")
            return {}
        if what == "complete":
            numbers = [part["partNumber"] for part in json.loads(data)["parts"]]
            data = b"".join((self.store / f"{oid}.{number}").read_bytes() for number in numbers)
        require(hashlib.sha256(data).hexdigest() == oid, 400, "The content does not match its SHA-256")
        path.write_bytes(data)
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
        head, ref = repo.at(revision), revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        first, *operations = [json.loads(line) for line in request.body.splitlines()]
        title, message = first["value"]["summary"], first["value"].get("description", "")
        parent = first["value"].get("parentCommit") or head
        require(ref in repo.refs, 400, f"Cannot commit to {revision}")
        require(parent == head, 412, "A commit has happened since. Please refresh and try again.")
        require(operations, 400, "An empty commit is not allowed")
        files, author, answer = dict(repo.files[head]), request.user["name"], {}
        for operation in operations:
            self.apply(files, operation["key"], operation["value"])
        if request.query.get("create_pr") == "1":
            number = repo.discuss(title, message, author, True, "open")
            ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.url}/{repo.key}/discussions/{number}"}
        oid = repo.add_commit(ref, head, title, message, author, files)
        request.note = f"{repo.key} {ref} {oid}"
        return answer | {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo.key}/commit/{oid}"}

    def apply(self, files, key, value):
        """Do an operation of a commit on its files."""
        path = value["path"]
        if key == "file":
            files[path] = regular(base64.b64decode(value["content"], validate=True))
            errors = card_errors(files[path].data.decode()) if path == "README.md" else []
            require(not errors, 400, "\n- ".join(["Invalid metadata in README.md.", *errors]))
        elif key == "lfsFile":
            xet = self.xet_hashes().get(value["oid"])
            known = xet or (self.store / value["oid"]).exists()
            require(known, 400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
            files[path] = File(value["size"], value["oid"], None, xet)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise missing("Entry", path)
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    @route("GET", REPO + "/discussions", "read")
    @route("POST", REPO + "/discussions", "discuss")
    def discussions(self, request, repo):
        if request.method == "POST":
            body = json.loads(request.body)
            pull = bool(body.get("pullRequest"))
            status, author = "draft" if pull else "open", request.user["name"]
            return {"num": repo.discuss(body["title"], body.get("description", ""), author, pull, status)}
        found = []
        for discussion in reversed(repo.discussions):
            facts = {"author": discussion["author"]["name"]}
            facts["type"] = "pull_request" if discussion["isPullRequest"] else "discussion"
            facts["status"] = "closed" if discussion["status"] == "closed" else "open"
            if all(request.query.get(key, "all") in ("all", facts[key]) for key in facts):
                found.append(discussion)
        return {"discussions": found, "count": len(found), "start": 0}

    @route("GET", REPO + r"/discussions/(\d+)", "read")
    @route("POST", REPO + r"/discussions/(\d+)/status", "discuss")
    def discussion(self, request, repo, number):
        require(int(number) <= len(repo.discussions), 404, "Discussion not found")
        discussion = repo.discussions[int(number) - 1]
        if request.method == "GET":
            return discussion
        discussion["status"] = json.loads(request.body)["status"]
        data, author = {"status": discussion["status"]}, {"name": request.user["name"]}
        event = {"id": number, "type": "status-change", "createdAt": DATE, "data": data, "author": author}
        return {"newStatus": event}

    @route("GET|HEAD", PAGE + "/resolve/([^/]+)/(.+)", "read")
    def resolve(self, request, repo, revision, path):
        oid = repo.at(revision)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path not in repo.files[oid]:
            raise missing("Entry", path, **headers)
        file = repo.files[oid][path]
        headers["ETag"] = f'"{file.etag}"'
        if file.data is None:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        if file.xet:
            token = f"{self.url}/api/{repo.kind}/{repo.id}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
        if request.method == "HEAD":
            return 200, headers | {"Content-Length": str(file.size)}, b""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not wanted:
            return 200, headers, self.content(file)
        start, end = int(wanted[1]), int(wanted[2] or file.size - 1)
        data = self.content(file)[start : end + 1]
        return 206, headers | {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{file.size}"}, data

    @route("GET|POST|DELETE", REPO + "/(secrets|variables)", "write")
    def space_values(self, request, repo, what):
        values = repo.secrets if what == "secrets" else repo.variables
        if request.method == "POST":
            values[json.loads(request.body)["key"]] = json.loads(request.body) | {"updatedAt": DATE}
        elif request.method == "DELETE":
            values.pop(json.loads(request.body)["key"], None)
        return values if what == "variables" else {key: {"key": key} for key in values}

    @route("POST", REPO + "/hardware", "write")
    def space_hardware(self, request, repo):
        repo.hardware = json.loads(request.body)["flavor"]
        return repo.runtime()

    def fault(self, method, path):
        """The first fault that is due for a request."""
        with self.lock:
            for fault in self.faults:
                if not re.fullmatch(fault["method"], method) or not re.search(fault["path"], path):
                    continue
                if fault["skip"] > 0:
                    fault["skip"] -= 1
                elif fault["times"] != 0:
                    fault["times"] -= 1
                    return fault
        return {"action": None}

    def control(self, request):
        what, body, answer = request.path.removeprefix("/_control/"), json.loads(request.body or b"{}"), {}
        if what == "fault":
            default = {"method": "POST", "times": 1, "skip": 0, "status": 500, "headers": {}, "action": "answer"}
            self.faults.append(default | {"body": {"error": "Injected fault"}, "seconds": 1} | body)
        elif what == "mend":
            self.faults.clear()
        elif what == "reset":
            self.reset()
        elif what == "user":
            self.users[body["token"]] = {"role": "write", "orgs": []} | body
        elif what == "settings":
            self.settings |= body
        elif what == "add":
            repo = Repo(body["kind"], body["id"], "huggingface")
            self.repos[repo.key] = repo
        elif what == "log":
            answer = self.log
        elif what == "state":
            answer = {key: repo.state() for key, repo in self.repos.items()}
        elif what == "file":
            repo, path = self.repos.get(request.query["repo"]), request.query["path"]
            files = repo.files[repo.at(request.query["revision"])] if repo else {}
            return (200, {}, self.content(files[path])) if path in files else (404, {}, {})
        return 200, {}, answer


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def serve(self):
        hub, raw, self.method = self.server, self.path, self.command
        self.path, _, query = raw.partition("?")
        self.query = {key: values[0] for key, values in parse_qs(query).items()}
        self.note, size = "", int(self.headers.get("Content-Length") or 0)
        if self.path.startswith("/_control/"):
            self.body = self.rfile.read(size)
            with hub.lock:
                answer = hub.control(self)
            return self.send(*answer)
        fault = hub.fault(self.method, raw)
        action = fault["action"]
        received = {"cut": 0, "cut_body": size // 2}.get(action, size)
        self.body = self.rfile.read(received)
        if action == "cut" or received < size:
            self.record(raw, "cut", action)
            return self.cut()
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
        user = self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "), {})
        note = f"{self.note} [{action}]".strip() if action else self.note
        entry = {"method": self.method, "path": raw, "status": status, "size": len(self.body), "note": note}
        self.server.log.append(entry | {"user": user.get("name"), "role": user.get("role"), "time": time.time()})

    def send(self, status, headers, body, half=False):
        kind = "application/octet-stream"
        if isinstance(body, str):
            kind, body = "text/html", body.encode()
        elif not isinstance(body, bytes):
            kind, body = "application/json", json.dumps(body, default=str).encode()
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

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    os.environ["HF_HOME"] = sys.argv[1]  # where hf_xet keeps its own cache
    hub = Hub(sys.argv[1])
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    print(hub.url, flush=True)
    sys.stdin.read()
