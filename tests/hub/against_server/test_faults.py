"""Faults in the middle of a push: nothing lost, nothing doubled, no hang, a sentence that a person understands."""

import socket
import subprocess
import sys
import time

import huggingface_hub
import pytest
import saved_adapters
from huggingface_hub import HfApi, get_session

from hf_reflora import PushError, push_adapter
from hf_reflora.hub import retry


CONFLICT = {"error": "Cannot create repo: another conflicting operation is in progress"}
MOVED = {"error": "A commit has happened since. Please refresh and try again."}
NO_RIGHTS = {"error": "No rights"}
QUOTA = {"error": "Private storage limit reached"}
BAD_CARD = {"errors": [{"message": "bad x"}]}
HTML = "<html><body>502 Bad Gateway</body></html>"
GET, ANY, PUT = {"method": "GET"}, {"method": "GET|HEAD"}, {"method": "PUT"}
# (name, path, fault): each is survived, with one commit.
SURVIVED = [
    ("whoami 429", "/whoami-v2", {**GET, "status": 429, "headers": {"Retry-After": "1"}, "times": 2}),
    ("whoami 503", "/whoami-v2", {**GET, "status": 503}),
    ("whoami cut", "/whoami-v2", {**GET, "action": "cut"}),
    ("repository info 500", "/api/models/me/adapter$", {**GET, "status": 500}),
    ("create 500", "/repos/create", {"status": 500, "times": 2}),
    ("create 429", "/repos/create", {"status": 429}),
    ("create cut", "/repos/create", {"action": "cut"}),
    ("create done, answer lost", "/repos/create", {"action": "cut_after"}),
    ("create conflict", "/repos/create", {"status": 409, "body": CONFLICT, "times": 3}),
    ("card 500", "/resolve/main/README.md", {**ANY, "status": 500}),
    ("validate-yaml 500", "/validate-yaml", {"status": 500}),
    ("validate-yaml 502 with HTML", "/validate-yaml", {"status": 502, "body": HTML}),
    ("validate-yaml cut", "/validate-yaml", {"action": "cut"}),
    ("preupload 503", "/preupload/", {"status": 503, "times": 2}),
    ("preupload 429", "/preupload/", {"status": 429, "headers": {"Retry-After": "0"}}),
    ("preupload cut", "/preupload/", {"action": "cut"}),
    ("head 500", "/revision/main", {**GET, "status": 500}),
    ("commit 500", "/commit/", {"status": 500}),
    ("commit 500 twice", "/commit/", {"status": 500, "times": 2}),
    ("commit 429", "/commit/", {"status": 429, "headers": {"Retry-After": "1"}}),
    ("commit cut", "/commit/", {"action": "cut"}),
    ("commit done, answer lost", "/commit/", {"action": "cut_after"}),
    ("commit done, answer lost twice", "/commit/", {"action": "cut_after", "times": 2}),
    ("commit done, answered 500", "/commit/", {"action": "answer_after", "status": 500}),
    ("commit 409", "/commit/", {"status": 409, "body": {"error": "Another commit operation is in progress"}}),
    ("commit 412", "/commit/", {"status": 412, "body": MOVED}),
    ("commit 502 with HTML", "/commit/", {"status": 502, "body": HTML}),
]
LFS = [
    ("LFS batch 500", "/info/lfs/objects/batch", {"status": 500}),
    ("LFS put 500", "/_lfs/", {**PUT, "status": 500, "times": 2}),
    ("LFS put cut in the middle", "/_lfs/", {**PUT, "action": "cut_body"}),
    ("LFS put done, answer lost", "/_lfs/", {**PUT, "action": "cut_after"}),
    ("LFS verify 500", "/verify", {"status": 500}),
]
XET_TOKEN = [
    ("Xet token 500", "/xet-write-token/", {**GET, "status": 500}),
    ("Xet token cut", "/xet-write-token/", {**GET, "action": "cut"}),
]
# (name, path, fault, what a person reads, commits that exist)
FATAL = [
    ("whoami 401", "/whoami-v2", {**GET, "status": 401}, "the token is not valid", None),
    (
        "create 403",
        "/repos/create",
        {"status": 403, "body": {"error": "No rights"}},
        "may not do this .* .No rights",
        None,
    ),
    ("create 402", "/repos/create", {"status": 402}, "the storage or plan of me does not allow it", None),
    (
        "create conflict for ever",
        "/repos/create",
        {"status": 409, "body": CONFLICT},
        "another conflicting operation",
        None,
    ),
    ("validate-yaml 400", "/validate-yaml", {"status": 400, "body": BAD_CARD}, "bad x", 1),
    ("validate-yaml HTML for ever", "/validate-yaml", {"status": 502, "body": HTML}, "not JSON", 1),
    ("preupload 401", "/preupload/", {"status": 401}, "was not found|token is not valid", 1),
    ("preupload 403", "/preupload/", {"status": 403}, "me may not do this with the token in use", 1),
    ("commit 403", "/commit/", {"status": 403, "body": NO_RIGHTS}, "may not do this .* .No rights", 1),
    ("commit 413", "/commit/", {"status": 413}, "the storage or plan of me does not allow it", 1),
    (
        "quota",
        "/commit/",
        {"status": 403, "body": {"error": "Private storage limit reached"}},
        "the storage or plan",
        1,
    ),
    ("commit 429 for ever", "/commit/", {"status": 429}, "the Hub limits the number of requests", 1),
    ("commit 500 for ever", "/commit/", {"status": 500}, "with an error 6 times, the last one 500", 1),
    ("commit 412 for ever", "/commit/", {"status": 412, "body": MOVED}, "others kept changing it", 1),
    ("commit cut for ever", "/commit/", {"action": "cut"}, "could not be reached, or did not answer", 1),
]
FATAL_LFS = [
    ("LFS put 403", "/_lfs/", {**PUT, "status": 403}, "me may not do this with the token in use", 1),
    ("LFS batch 403", "/info/lfs/objects/batch", {"status": 403}, "me may not do this with the token in use", 1),
]
FATAL_XET = [
    (f"Xet token {status}", "/xet-write-token/", {**GET, "status": status}, text, 1)
    for status, text in ((401, "token is not valid"), (403, "may not do this"), (404, "was not found"))
]


def weights_arrived(server, folder):
    return (
        server.read("me/adapter", "adapter_model.safetensors") == (folder / "adapter_model.safetensors").read_bytes()
    )


def by_both_paths(cases: list, of_xet: list, of_lfs: list) -> list:
    """The cases by Xet, and by LFS those that meet the files on their way."""
    uploading = [case for case in cases if case[1] in ("/preupload/", "/commit/")]
    by_xet = [pytest.param("xet", *case[1:], id=case[0]) for case in cases + of_xet]
    return by_xet + [pytest.param("lfs", *case[1:], id=f"{case[0]}, by LFS") for case in uploading + of_lfs]


@pytest.mark.parametrize(
    ("upload_path", "path", "fault"), by_both_paths(SURVIVED, XET_TOKEN, LFS), indirect=["upload_path"]
)
def test_survived(server, tmp_path, path, fault):
    folder = saved_adapters.lora(tmp_path)
    if "README" in path:  # a repository that is not there yet has no card to read
        HfApi().create_repo("me/adapter")
    server.fault(path, **fault)
    begin = time.monotonic()
    push_adapter(folder, "me/adapter")
    assert time.monotonic() - begin < 30
    hit = [entry for entry in server.log() if entry["status"] in ("cut", fault.get("status"))]
    assert hit, "the fault was not met"
    assert len(server.commits("me/adapter")) == 2
    assert weights_arrived(server, folder)
    assert len(server.files("me/adapter")) == 9


@pytest.mark.parametrize(
    ("upload_path", "path", "fault", "message", "commits"),
    by_both_paths(FATAL, FATAL_XET, FATAL_LFS),
    indirect=["upload_path"],
)
def test_fatal_until_mended(server, upload_path, tmp_path, path, fault, message, commits):
    """The push stops in bounded time with a sentence; the same call brings what is missing once the fault is gone."""
    folder = saved_adapters.lora(tmp_path)
    server.fault(path, **{"times": -1, **fault})
    begin = time.monotonic()
    with pytest.raises(PushError, match=message) as caught:
        push_adapter(folder, "me/adapter")
    assert time.monotonic() - begin < 60
    assert len(server.log(path=path)) <= 60
    assert server.tokens["me"] not in str(caught.value)
    assert caught.value.__suppress_context__  # no client's traceback with signed addresses
    assert (server.state() == {}) if commits is None else len(server.commits("me/adapter")) == commits
    server.mend()
    sent = len(server.log("PUT", "/_lfs/"))
    push_adapter(folder, "me/adapter")
    assert len(server.commits("me/adapter")) == 2
    assert weights_arrived(server, folder)
    if commits and "/commit/" in path and upload_path == "lfs":
        assert len(server.log("PUT", "/_lfs/")) == sent  # the weights were there already


def test_a_commit_of_somebody_else_in_between_is_kept(server, tmp_path):
    """Theirs lands between our look at the branch and our commit: 412, and once more on top of it."""
    folder = saved_adapters.lora(tmp_path)
    push_adapter(folder, "me/adapter")
    saved_adapters.lora(tmp_path, seed=5)
    server.fault("/preupload/", action="hang", seconds=2)
    code = (
        "import time; time.sleep(0.7)\n"
        "from huggingface_hub import HfApi\n"
        "HfApi().upload_file(path_or_fileobj=b'theirs', path_in_repo='notes.txt', repo_id='me/adapter')\n"
    )
    theirs = subprocess.Popen([sys.executable, "-c", code])
    push_adapter(folder, "me/adapter")
    assert theirs.wait() == 0
    assert server.read("me/adapter", "notes.txt") == b"theirs"
    assert weights_arrived(server, folder)
    assert len(server.commits("me/adapter")) == 4


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"RateLimit": '"api";r=0;t=40', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 41),
        ({"RateLimit": '"api";r=0;t=40', "Retry-After": "60"}, 60),
        ({"RateLimit": '"api";r=7;t=40'}, 1),  # that limit is not the reason
        ({"RateLimit": '"api";r=0;t=9999'}, 310),
        ({"Retry-After": "soon"}, 1),
        ({}, 1),
    ],
)
def test_the_hubs_own_announcement_of_a_rate_limit_is_obeyed(server, tmp_path, monkeypatch, caplog, headers, seconds):
    waits = []
    monkeypatch.setattr(retry, "DELAYS", (1, 2, 4, 8, 16))
    monkeypatch.setattr(retry, "LONGEST_DELAY", 310)
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    server.fault("/repos/create", status=429, headers=headers)
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    assert waits == [seconds]
    assert (f"limits the number of requests. Trying again in {seconds} s" in caplog.text) == (seconds >= 20)


def test_a_server_without_auth_check_takes_a_second_push(server, tmp_path):
    """Such as a self-hosted one: its 404 has no header that names the error."""
    folder = saved_adapters.lora(tmp_path)
    push_adapter(folder, "me/adapter")
    (folder / "notes.model").write_text("new")
    server.fault("/auth-check", method="GET", status=404, times=-1)
    push_adapter(folder, "me/adapter")
    assert server.read("me/adapter", "notes.model") == b"new"


@pytest.mark.parametrize("body", [{"error": "You already created this model repo"}, {}])
def test_an_existing_repository_without_its_address(server, tmp_path, body):
    """It was created while we looked; not every server puts the address into that answer."""
    server.fault("/repos/create", action="answer_after", status=409, body=body)
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    assert len(server.commits("me/adapter")) == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [("/whoami-v2", []), ("/api/models/me/adapter$", []), ("/repos/create", ["x"]), ("/preupload", [])],
)
def test_answers_of_another_form(server, tmp_path, path, body):
    server.fault(path, method="GET|POST", status=200, body=body, times=-1)
    with pytest.raises(PushError, match="in a form that huggingface_hub does not know"):
        push_adapter(saved_adapters.lora(tmp_path), "me/adapter")


@pytest.mark.parametrize("action", ["cut_after", "cut", "answer_after"])
def test_a_pull_request_is_not_opened_twice(server, tmp_path, action):
    HfApi().create_repo("me/adapter")
    server.fault("/discussions$", action=action, status=500)
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter", create_pr=True)
    assert [pr["num"] for pr in server.state()["me/adapter"]["discussions"]] == [1]
    assert len(server.commits("me/adapter", "refs/pr/1")) == 2


def test_a_lost_answer_to_a_pull_requests_commit(server, tmp_path):
    HfApi().create_repo("me/adapter")
    server.fault("/commit/", action="cut_after")
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter", create_pr=True)
    assert len(server.commits("me/adapter", "refs/pr/1")) == 2


def test_a_silent_hub_does_not_hang_the_push(server, tmp_path, monkeypatch):
    folder = saved_adapters.lora(tmp_path)
    monkeypatch.setattr(get_session(), "timeout", retry.httpx.Timeout(1))
    server.fault("/commit/", action="hang", seconds=3)
    begin = time.monotonic()
    push_adapter(folder, "me/adapter")
    assert time.monotonic() - begin < 20
    while len(server.log(path="/commit/")) < 2:  # the late one arrives in the end
        time.sleep(0.1)
    assert len(server.commits("me/adapter")) == 2


def test_the_client_gets_a_time_limit(server, tmp_path):
    huggingface_hub.close_session()
    default = get_session().timeout  # none in huggingface_hub 2; 1.x has its own limits, which stay
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    assert get_session().timeout == (retry.TIMEOUT if default == retry.httpx.Timeout(None) else default)
    assert get_session().timeout.read is not None
    assert get_session().event_hooks["response"].count(retry._stop_at_conflict) == 1


def test_no_network(server, tmp_path, monkeypatch):
    folder = saved_adapters.lora(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    begin = time.monotonic()
    with pytest.raises(PushError, match=r"Asking who the token belongs to failed: .* could not be reached"):
        push_adapter(folder, "me/adapter")
    assert time.monotonic() - begin < 10


def test_a_cut_download_of_the_card_does_not_make_it_overwritten(server, tmp_path):
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    text = server.read("me/adapter", "README.md").decode().replace("## Limits", "## My own words")
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="me/adapter")
    server.fault("/resolve/main/README.md", method="HEAD", action="cut", times=2)
    server.fault("/resolve/main/README.md", method="GET", action="cut_body")
    assert push_adapter(saved_adapters.lora(tmp_path, seed=5), "me/adapter").kept_card
    assert server.read("me/adapter", "README.md").decode() == text
