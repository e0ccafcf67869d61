"""The last look before a push: which secrets it finds in files, and that it does not tell them."""

import os
import random
import re
import string

import pytest
import tiny

from hf_reflora.hub import scan
from hf_reflora.hub.scan import PATTERNS, SecretFound, check_files


LETTERS = "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8bC0fG"
SECRETS = {
    "a Hugging Face token": [f"hf_{LETTERS}"],
    "a GitHub token": [f"ghp_{LETTERS}", f"gho_{LETTERS}", f"ghs_{LETTERS}", f"github_pat_{LETTERS[:11]}_{LETTERS}"],
    "an OpenAI or Anthropic key": [f"sk-{LETTERS}", f"sk-ant-api03-{LETTERS}-{LETTERS}_x"],
    "an AWS key": ["AKIAIOSFODNN7EXAMPLE"],
    "a private key": ["-----BEGIN OPENSSH PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----"],
}


@pytest.fixture(autouse=True)
def no_secrets_of_the_machine(monkeypatch):
    for name in list(os.environ):
        if scan.NAMES.search(name):
            monkeypatch.delenv(name)


def check(folder, *secrets):
    given = {"the token in use" if i == 0 else f"secret {i}": secret for i, secret in enumerate(secrets)}
    check_files(folder, sorted(path for path in folder.rglob("*") if path.is_file()), given)


def refused(folder, *secrets) -> str:
    with pytest.raises(SecretFound, match="Secrets were found and nothing was published") as found:
        check(folder, *secrets)
    return str(found.value)


def test_every_pattern_has_its_examples():
    assert SECRETS.keys() == PATTERNS.keys()


@pytest.mark.parametrize(("kind", "secret"), [(kind, s) for kind, found in SECRETS.items() for s in found])
@pytest.mark.parametrize("around", ['{"x": "%s"}', "%s", "https://user:%s@host", "a\n%s\nb", "TOKEN=%s;"])
def test_the_message_names_file_and_kind_and_not_the_secret(tmp_path, kind, secret, around):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "a.json").write_text(around % secret)
    (tmp_path / "b.txt").write_text("nothing here")
    message = refused(tmp_path)
    assert f"native/a.json has {kind}" in message
    assert message.count(" has ") == 1
    assert secret not in message
    assert LETTERS[:10] not in message
    assert "b.txt" not in message
    assert "revoke them" in message


def test_all_places_are_told_once_each(tmp_path):
    for name, kinds in (("a.md", ["an AWS key", "a GitHub token"]), ("b.md", ["an AWS key"])):
        (tmp_path / name).write_text("\n".join(SECRETS[kind][0] for kind in kinds * 2))
    message = refused(tmp_path)
    places = {"a.md has an AWS key", "a.md has a GitHub token", "b.md has an AWS key"}
    assert all(message.count(place) == 1 for place in places)
    assert message.count(" has ") == 3


@pytest.mark.parametrize(
    "text",
    [
        *("hf_reflora", "hf_transfer", "HF_HUB_ENABLE_HF_TRANSFER", "hf_***", "hf_" + "a" * 29, "sk-short"),
        *("xhf_" + LETTERS, "task-" + LETTERS, "mask-" + LETTERS, "AKIA" + "A" * 17, "XAKIAIOSFODNN7EXAMPLE"),
        *("0123456789abcdef" * 4, "sha256:" + "ab" * 32, "-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----"),
        *("model.layers.0.self_attn.q_proj.lora_A.default.weight", "hub_token", "ghp_short", "<|im_start|>"),
    ],
)
def test_harmless_text_passes(tmp_path, text):
    (tmp_path / "a.md").write_text(f"{text}\n{text} ({text})")
    check(tmp_path)


def test_what_a_trainer_saves_passes(tmp_path):
    tiny.lora(tiny.llama()).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) >= 5
    check(tmp_path)


@pytest.mark.parametrize(
    "secret", ["plainly a secret", 'with "quotes" and (.*)[+?\\', "é漢 é漢 é漢", SECRETS["a GitHub token"][0]]
)
def test_given_secrets_are_found_as_they_are(tmp_path, secret):
    (tmp_path / "a.txt").write_text(f"x{secret}y", encoding="utf-8")
    message = refused(tmp_path, secret, None, "")
    assert "a.txt has the token in use" in message
    assert secret not in message


@pytest.mark.parametrize("given", [(), (None,), ("",), ("other things",), ("pl.in plain",)])
def test_other_secrets_are_none(tmp_path, given):
    (tmp_path / "a.txt").write_text("plain plain")
    check(tmp_path, *given)


def test_every_given_secret_is_looked_for(tmp_path):
    for name, value in (("a", "first-secret"), ("b", "second-secret")):
        (tmp_path / f"{name}.txt").write_text(value)
    message = refused(tmp_path, "first-secret", "second-secret", "third-secret")
    assert "a.txt has the token in use; b.txt has secret 1" in message


def test_a_short_secret_is_not_looked_for(tmp_path):
    """It would stand in every file."""
    (tmp_path / "a.txt").write_text("1 true 1234567")
    check(tmp_path, "1", "true", "1234567")
    (tmp_path / "a.txt").write_text("12345678")
    assert "secret 1" in refused(tmp_path, "1", "12345678")


@pytest.mark.parametrize(
    "name",
    [
        *("MY_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "DB_PASSWORD", "db_passwd", "AWS_SECRET_ACCESS_KEY"),
        "AZURE_CREDENTIALS",
    ],
)
def test_values_of_the_environment_are_found_by_their_names(tmp_path, monkeypatch, name):
    (tmp_path / "a.txt").write_text("there is something+plain in it")
    monkeypatch.setenv("A_NAME", "something+plain")
    check(tmp_path)
    monkeypatch.setenv(name, "something+plain")
    message = refused(tmp_path)
    assert f"a.txt has the value of ${name}." in message
    assert "something+plain" not in message


def test_values_of_the_environment_that_are_paths_or_short_pass(tmp_path, monkeypatch):
    secret = tmp_path / "where" / "token"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text(f"{secret} false 1234567 12345678")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("MY_TOKEN", "1234567")
    secret.parent.mkdir()
    secret.touch()
    monkeypatch.setenv("HF_TOKEN_PATH", str(secret))
    check(tmp_path / "a")
    secret.unlink()
    assert "$HF_TOKEN_PATH" in refused(tmp_path / "a")
    monkeypatch.setenv("MY_TOKEN", "12345678")
    assert "$MY_TOKEN" in refused(tmp_path / "a")


def test_long_values_of_the_environment(tmp_path, monkeypatch):
    """Such as the JSON of a service account."""
    monkeypatch.setenv("MY_CREDENTIALS", '{"key": "' + "x" * 5000 + '"}')
    (tmp_path / "a.txt").write_text("harmless")
    check(tmp_path)


@pytest.mark.parametrize("position", range(0, 80, 7))
def test_a_secret_across_the_border_of_two_chunks(tmp_path, monkeypatch, position):
    monkeypatch.setattr(scan, "CHUNK", 16)
    monkeypatch.setattr(scan, "OVERLAP", 64)
    (tmp_path / "a.bin").write_bytes(b" " * position + f"hf_{LETTERS}".encode() + b" " * 100)
    assert "a.bin has a Hugging Face token" in refused(tmp_path)


def test_the_real_chunks_overlap(tmp_path, monkeypatch):
    assert scan.OVERLAP > max(len(s) for found in SECRETS.values() for s in found)
    block = bytearray(b"\0") * (scan.CHUNK + 100)
    for secret, at in (("AKIAIOSFODNN7EXAMPLE", scan.CHUNK - 10), ("private-thing", scan.CHUNK - 3)):
        data = block[:]
        data[at : at + len(secret)] = secret.encode()
        (tmp_path / "a.bin").write_bytes(data)
        assert "a.bin has" in refused(tmp_path, "private-thing")


def test_long_secrets_across_a_border(tmp_path, monkeypatch):
    """The overlap is as long as the longest value."""
    monkeypatch.setattr(scan, "CHUNK", 256)
    monkeypatch.setattr(scan, "OVERLAP", 16)
    secret = "".join(random.Random(0).choices(string.ascii_letters, k=200))
    (tmp_path / "a.txt").write_text(" " * 200 + secret)
    assert "the token in use" in refused(tmp_path, secret)


@pytest.mark.parametrize("before", [b"\x00\xff\xfe", b"\x80" * 5, b"\n\r\n", "é".encode()])
def test_binary_files(tmp_path, before):
    (tmp_path / "a.safetensors").write_bytes(before * 50 + f" hf_{LETTERS}".encode() + before * 50)
    assert "a.safetensors has a Hugging Face token" in refused(tmp_path)


def test_only_the_given_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "secret.txt").write_text(f"hf_{LETTERS}")
    (tmp_path / "empty").touch()
    check_files(tmp_path, [tmp_path / "a.txt", tmp_path / "empty"])
    assert re.search("secret.txt has", refused(tmp_path))
