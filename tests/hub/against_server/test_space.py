"""The Space's deployment: what arrives on the Hub, what it is told, what is refused."""

import os
import re

import pytest
import saved_adapters
import tiny
import yaml
from huggingface_hub import HfApi
from peft import IA3Config, LoraConfig

from hf_reflora import LoraSbConfig, PushError, push_adapter
from hf_reflora.cli import main
from hf_reflora.hub import space
from hf_reflora.hub.scan import SecretFound
from hf_reflora.hub.space import FILES, deploy_space, fill


SPACE = "spaces/me/demo"


@pytest.fixture
def models(server, tmp_path):
    tiny.llama().push_to_hub("me/base")
    tiny.tokenizer().push_to_hub("me/base")
    push_adapter(saved_adapters.lora(tmp_path / "adapter"), "me/adapter")


def deploy(**options):
    return deploy_space("me/demo", base="me/base", adapters=["me/adapter"], **options)


def test_the_space_arrives_in_one_commit(server, models):
    done = deploy(license="mit")
    assert done.url == f"{server.url}/spaces/me/demo"
    assert done.warnings == []
    assert set(FILES) <= set(server.files(SPACE))
    assert set(server.files(SPACE)) - set(FILES) <= {".gitattributes"}
    assert len([c for c in server.commits(SPACE) if c["title"].startswith("Before")]) == 1
    data = yaml.safe_load(server.read(SPACE, "README.md").decode().split("---\n")[1])
    assert (data["sdk"], data["app_file"], data["license"]) == ("gradio", "app.py", "mit")
    assert data["models"] == ["me/base", "me/adapter"]
    state = server.state()[SPACE]
    assert {key: v["value"] if isinstance(v, dict) else v for key, v in state["variables"].items()} == {
        "BASE_MODEL": "me/base",
        "ADAPTERS": "me/adapter",
    }
    assert state["secrets"] == []
    commits = len(server.commits(SPACE))
    deploy(license="mit")
    assert len(server.commits(SPACE)) == commits


def test_adapters_of_one_name_are_told_apart(server, models, tmp_path):
    for name in ("team/adapter", "me/third"):
        push_adapter(tmp_path / "adapter", name)
    deploy_space("me/demo", base="me/base", adapters=["me/adapter", "team/adapter", "me/third"])
    listed = server.state()[SPACE]["variables"]["ADAPTERS"]
    expected = "me/adapter=me/adapter,team/adapter=team/adapter,me/third"
    assert (listed["value"] if isinstance(listed, dict) else listed) == expected


def test_a_private_adapter_gets_the_token_as_a_secret_and_a_warning(server, models, tmp_path, capsys, monkeypatch):
    push_adapter(tmp_path / "adapter", "me/private", private=True)
    main(["space", "me/demo", "--base", "me/base", "--adapter", "me/adapter", "me/private", "--private"])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{server.url}/spaces/me/demo"
    assert "Not everybody can read me/private, so the Space got your token as its secret HF_TOKEN" in out
    assert server.tokens["me"] not in out
    assert server.state()[SPACE]["secrets"] == ["HF_TOKEN"]
    assert server.state()[SPACE]["visibility"] == "private"
    monkeypatch.setenv("READ_ONLY", server.tokens["reader"])
    main(["space", "me/other", "--base", "me/base", "--adapter", "me/private", "--secret", "HF_TOKEN=READ_ONLY"])
    assert "Not everybody" not in capsys.readouterr().out
    assert server.state()["spaces/me/other"]["secrets"] == ["HF_TOKEN"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "/models/base", "--adapter", "me/adapter"], "base must be an id on the Hub such as org/model"),
        (["--base", "me/base", "--adapter", "runs/x/y"], "adapter must be an id on the Hub"),
        (["--base", "me/base", "--adapter", "me/adapter", "--license", " "], "license must be an id of the Hub"),
        (["--base", "me/base", "--adapter", "me/adapter", "--secret", "ABSENT"], "no environment variable ABSENT"),
    ],
)
def test_refusals(server, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["space", "me/demo", *arguments])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert server.state() == {}


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        ("me/typo", "me/adapter", "There is no model me/typo on the Hub that you can see"),
        ("me/base", "me/none", "There is no model me/none on the Hub that you can see"),
        ("me/base", "me/base", "Is me/base an adapter?"),
        ("me/base", "me/ia3", "this page shows LoRA adapters, me/ia3 is IA3"),
        ("me/base", "me/classifier", "me/classifier is for SEQ_CLS"),
        ("me/base", "me/pissa", "changes the base model where it is loaded"),
        ("me/base", "me/bias", "can't show adapters with bias"),
        ("me/base", "me/lora_sb", "me/lora_sb is LORASB. Export it to a LoRA: hf-reflora export me/lora_sb"),
        ("me/base", "me/unfinished", "me/unfinished has an adapter_config.json, but no weights"),
    ],
)
def test_what_the_page_cannot_show_makes_no_space_and_gives_no_token_away(server, models, base, adapter, message):
    configs = {
        "me/ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "me/classifier": LoraConfig(task_type="SEQ_CLS"),
        "me/pissa": LoraConfig(init_lora_weights="pissa"),
        "me/bias": LoraConfig(bias="all"),
        "me/lora_sb": LoraSbConfig(),
        "me/unfinished": LoraConfig(task_type="CAUSAL_LM"),
    }
    if adapter in configs:
        configs[adapter].push_to_hub(adapter)
    with pytest.raises((PushError, ValueError), match=re.escape(message)):
        deploy_space("me/demo", base=base, adapters=[adapter])
    assert SPACE not in server.state()


def test_a_base_that_does_not_fit_is_said(server, models, monkeypatch):
    assert deploy().warnings == []
    monkeypatch.setitem(space.MEMORY_GB, "cpu-basic", 1e-4)
    [warning] = deploy().warnings
    parameters = sum(p.numel() for p in tiny.llama().parameters())
    assert warning.startswith(f"me/base takes {parameters * 4 / 1e9:.1f} GB and cpu-basic has 0.0001 GB")
    assert "DTYPE=bfloat16" in warning
    assert deploy(hardware="t4-small").warnings == []


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_base_whose_size_cannot_be_told_is_no_obstacle(server, models, file):
    api = HfApi()
    api.create_repo("me/old")
    api.upload_file(path_or_fileobj=b"no safetensors", path_in_repo=file, repo_id="me/old")
    [warning] = deploy_space("me/demo", base="me/old", adapters=["me/adapter"]).warnings
    assert warning == "me/adapter was trained from me/base, not from me/old; the page says so, too."
    assert "README.md" in server.files(SPACE)


def test_zero_gpu_gets_a_torch_that_it_has(server, models):
    deploy(hardware="zero-a10g")
    assert server.state()[SPACE]["hardware"] == "zero-a10g"
    assert "torch>=2.8,<2.12" in server.read(SPACE, "requirements.txt").decode().splitlines()
    deploy()
    assert "torch>=2.8" in server.read(SPACE, "requirements.txt").decode().splitlines()


@pytest.mark.parametrize("exists", [False, True], ids=["new", "update"])
def test_a_license_that_the_hub_refuses_makes_no_space_and_gives_no_token_away(server, models, exists):
    if exists:
        deploy()
    before = server.state()
    with pytest.raises(PushError, match='The Hub refuses the card: "license" must be one of'):
        deploy(license="nonsense-1.0", hardware="t4-small", secrets={"HF_TOKEN": "x" * 20})
    assert server.state() == before


def test_hardware_that_the_hub_refuses_makes_no_space(server, models):
    server.fault("/repos/create", status=402)
    with pytest.raises(PushError, match="Creating the Space me/demo"):
        deploy(hardware="a100-large")
    assert SPACE not in server.state()
    deploy(hardware="t4-small")
    assert server.state()[SPACE]["hardware"] == "t4-small"
    deploy(hardware="cpu-upgrade")
    assert server.state()[SPACE]["hardware"] == "cpu-upgrade"


def test_a_space_of_another_kind_is_not_overwritten(server, models):
    HfApi().create_repo("me/demo", repo_type="space", space_sdk="static")
    with pytest.raises(PushError, match="The Space me/demo is one of static, not of gradio"):
        deploy()
    assert "app.py" not in server.files(SPACE)


def test_faults_in_between_leave_one_commit(server, models):
    server.fault("/repos/create", status=500)
    server.fault("/variables", status=503)
    server.fault("/commit/", action="cut_after")
    deploy()
    assert len([c for c in server.commits(SPACE) if c["title"].startswith("Before")]) == 1


def test_secrets_are_not_in_the_files(server, models, monkeypatch, tmp_path):
    fill(tmp_path / "space", base="me/base", adapters=["me/adapter"])
    word = re.search(r"\w{12,}", (tmp_path / "space" / "app.py").read_text())[0]
    monkeypatch.setitem(os.environ, "HF_TOKEN", server.tokens["me"])
    with pytest.raises(SecretFound, match=r"app\.py has the value of the secret HF_TOKEN"):
        deploy(secrets={"HF_TOKEN": word})
    assert SPACE not in server.state()
