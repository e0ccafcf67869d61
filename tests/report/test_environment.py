"""The run record: facts, no secrets, whole files."""

import json
import subprocess

import pytest

from hf_reflora.report.environment import environment, peak_memory_gb, public_address, redacted, write_json


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["a.py", "--hub_token", "hf_abc", "--lr", "1"], ["a.py", "--hub_token", "***", "--lr", "1"]),
        (["--hub_token=plain"], ["--hub_token=***"]),
        (["--wandb_api_key", "xyz"], ["--wandb_api_key", "***"]),
        (["hf_secretsecret"], ["***"]),
        (["--name=hf_secret"], ["--name=***"]),
        (["--eos_token", "<|im_end|>"], ["--eos_token", "<|im_end|>"]),
    ],
)
def test_secrets_are_redacted(arguments, shown):
    assert redacted(arguments) == shown


def test_environment_names_commit_versions_and_hardware(tmp_path):
    facts = environment(tmp_path)
    assert "commit" not in facts  # not a repository: unknown, so left out
    assert facts["versions"]["torch"].startswith("2.")
    assert facts["cores"] >= 1
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    facts = environment(tmp_path)
    assert len(facts["commit"]) == 40
    assert facts["uncommitted_changes"] is False
    (tmp_path / "new").touch()
    assert environment(tmp_path)["uncommitted_changes"] is True


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_gb()["host"]
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_gb()["host"] >= max(before, 0.3)


def test_write_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"loss": 0.5, "text": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 0.5, "text": "é"}
    with pytest.raises(TypeError):
        write_json(path, {"loss": 1, "bad": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["loss"] == 0.5


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/org/name.git", "https://github.com/org/name"),
        ("https://me:ghp_secret@github.com/org/name", "https://github.com/org/name"),
        ("https://oauth2:secret@gitlab.example.org/group/sub/name.git/", "https://gitlab.example.org/group/sub/name"),
        ("git@github.com:org/name.git", "https://github.com/org/name"),
        ("ssh://git@gitlab.example.org:2222/org/name.git", "https://gitlab.example.org/org/name"),
        *((None, None), ("/srv/git/name.git", None), ("../name", None), ("file:///srv/name", None), ("", None)),
        *(("git@server:name.git", None), ("http://10.0.0.5/name.git", None), ("ssh://me@10.0.0.5/x", None)),
    ],
)
def test_the_repository_is_named_without_credentials(remote, address):
    assert public_address(remote) == address
