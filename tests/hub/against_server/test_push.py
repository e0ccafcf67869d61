"""Pushes that go well, what they leave on the Hub, and what is refused before anything is sent."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import saved_adapters
import tiny
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from local_hub import BOTH_UPLOAD_PATHS
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers.modelcard import TrainingSummary
from trl.trainer.utils import generate_model_card
from versions import needs

import hf_reflora
from hf_reflora import PushError, push_adapter
from hf_reflora.cli import main
from hf_reflora.hub.scan import SecretFound
from hf_reflora.report.card import render
from hf_reflora.report.record import RunRecord
from hf_reflora.report.snippet import OwnTokenizer


ROOT = Path(hf_reflora.__file__).parent.parent
FILES = {
    *(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"),
    *("run_record.json", "tokenizer.json", "tokenizer_config.json", "training.png"),
}


def front_matter(server, repo_id, revision="main"):
    return yaml.safe_load(server.read(repo_id, "README.md", revision).decode().split("---\n")[1])


def put_card(text, repo_id="me/adapter"):
    HfApi().create_repo(repo_id, exist_ok=True)
    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo_id)


def uploads(server):
    """Requests that carry content."""
    return [entry for entry in server.log("PUT|POST") if "/commit/" in entry["path"] or entry["method"] == "PUT"]


@BOTH_UPLOAD_PATHS
def test_everything_arrives_in_one_commit(server, upload_path, tmp_path):
    folder = saved_adapters.lora(tmp_path)
    (folder / "training.png").unlink()  # it is drawn
    done = push_adapter(folder, "me/adapter")
    assert set(server.files("me/adapter")) == FILES
    assert server.read("me/adapter", "training.png").startswith(b"\x89PNG")
    assert [commit["title"] for commit in server.commits("me/adapter")] == [
        "Upload adapter with hf_reflora",
        "initial commit",
    ]
    assert (done.repo_id, done.commit.oid) == ("me/adapter", server.commits("me/adapter")[0]["oid"])
    assert set(done.files) == FILES - {".gitattributes"}
    assert done.left_out == saved_adapters.LEFT_OUT
    assert server.files("me/adapter")["adapter_model.safetensors"]["kind"] == upload_path
    data = front_matter(server, "me/adapter")
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == ("peft", "me/base", "adapter")
    card = server.read("me/adapter", "README.md").decode()
    record, tokenizer = RunRecord.from_dict(saved_adapters.RECORD), OwnTokenizer(has_template=True, has_end=True)
    assert card == render(record, repo_id="me/adapter", plot="training.png", tokenizer=tokenizer)


@BOTH_UPLOAD_PATHS
def test_what_is_there_is_not_sent_again(server, tmp_path):
    first = push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    sent = len(uploads(server))
    again = push_adapter(tmp_path, "me/adapter")
    assert again.commit.oid == first.commit.oid
    assert len(uploads(server)) == sent
    assert len(server.commits("me/adapter")) == 2


@BOTH_UPLOAD_PATHS
def test_an_update_sends_what_is_different(server, tmp_path):
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    HfApi().upload_file(path_or_fileobj=b"of others", path_in_repo="notes.txt", repo_id="me/adapter")
    before = server.files("me/adapter")
    push_adapter(saved_adapters.lora(tmp_path, seed=5), "me/adapter")
    after = server.files("me/adapter")
    assert {name for name in after if after[name] != before.get(name)} == {"adapter_model.safetensors"}
    assert len(server.commits("me/adapter")) == 4
    assert server.read("me/adapter", "notes.txt") == b"of others"


@pytest.mark.parametrize("name", ["adapter", "me/adapter", "team/adapter"])
def test_names_and_private_repositories(server, tmp_path, name):
    done = push_adapter(saved_adapters.lora(tmp_path), name, private=True)
    assert done.repo_id == (name if "/" in name else "me/adapter")
    assert server.state()[done.repo_id]["visibility"] == "private"
    push_adapter(tmp_path, name, private=True)
    code = f"from huggingface_hub import HfApi; print(HfApi().repo_exists({done.repo_id!r}, token=False))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout == "False\n"


def test_a_revision_is_a_branch(server, tmp_path):
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    push_adapter(saved_adapters.lora(tmp_path, seed=5), "me/adapter", revision="seed/5")
    push_adapter(tmp_path, "me/adapter", revision="seed/5")
    assert len(server.commits("me/adapter")) == 2
    assert len(server.commits("me/adapter", "seed/5")) == 3
    weights = {r: server.files("me/adapter", r)["adapter_model.safetensors"]["sha256"] for r in ("main", "seed/5")}
    assert weights["main"] != weights["seed/5"]
    expected = saved_adapters.logits(PeftModel.from_pretrained(tiny.llama(), str(tmp_path)))
    found = PeftModel.from_pretrained(tiny.llama(), "me/adapter", revision="seed/5")
    torch.testing.assert_close(saved_adapters.logits(found), expected, rtol=0, atol=0)


def test_a_pull_request_is_opened_once_and_continued(server, tmp_path):
    """On a repository of somebody else."""
    HfApi(token=server.tokens["other"]).create_repo("other/adapter")
    done = push_adapter(saved_adapters.lora(tmp_path), "other/adapter", create_pr=True)
    assert done.commit.pr_url.endswith("/other/adapter/discussions/1")
    assert set(server.files("other/adapter", "refs/pr/1")) == FILES
    assert set(server.files("other/adapter")) == {".gitattributes"}
    again = push_adapter(saved_adapters.lora(tmp_path, seed=5), "other/adapter", create_pr=True)
    assert again.commit.pr_num == 1
    assert len(server.commits("other/adapter", "refs/pr/1")) == 3
    [found] = HfApi().get_repo_discussions("other/adapter")
    assert (found.status, found.title) == ("open", "Upload adapter with hf_reflora")
    HfApi().change_discussion_status("other/adapter", 1, "closed")
    assert push_adapter(tmp_path, "other/adapter", create_pr=True).commit.pr_num == 2


def test_a_lora_sb_adapter_is_a_lora_for_everybody(server, tmp_path):
    folder = saved_adapters.lora_sb(tmp_path)
    done = push_adapter(folder, "me/adapter")
    assert {"native/adapter_config.json", "native/adapter_model.safetensors"} <= set(done.files)
    assert json.loads(server.read("me/adapter", "adapter_config.json"))["peft_type"] == "LORA"
    card = server.read("me/adapter", "README.md").decode()
    assert 'subfolder="native"' in card
    assert {"lora", "lora-sb"} <= set(front_matter(server, "me/adapter")["tags"])
    expected = saved_adapters.logits(PeftModel.from_pretrained(tiny.llama(), str(folder)))
    native = PeftModel.from_pretrained(tiny.llama(), "me/adapter", subfolder="native")
    torch.testing.assert_close(saved_adapters.logits(native), expected, rtol=0, atol=0)
    code = (
        "import sys, torch, tiny; from peft import PeftModel\n"
        "model = PeftModel.from_pretrained(tiny.llama(), 'me/adapter').eval()\n"
        "torch.save(model(torch.arange(4, 20)[None]).logits, sys.argv[1])\n"
        "assert 'hf_reflora' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support")}
    subprocess.run([sys.executable, "-c", code, tmp_path / "logits.pt"], env=environment, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-6)
    assert push_adapter(folder, "me/adapter").commit.oid == done.commit.oid


@BOTH_UPLOAD_PATHS
def test_adapters_load_by_their_id(server, tmp_path):
    tiny.llama().push_to_hub("me/base")
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter", private=True)
    expected = saved_adapters.logits(PeftModel.from_pretrained(tiny.llama(), str(tmp_path)))
    for found in (
        PeftModel.from_pretrained(tiny.llama(), "me/adapter"),
        AutoPeftModelForCausalLM.from_pretrained("me/adapter"),
    ):
        torch.testing.assert_close(saved_adapters.logits(found), expected, rtol=0, atol=0)


@BOTH_UPLOAD_PATHS
def test_large_files_go_in_parts(server, upload_path, tmp_path):
    server.settings(chunk_size=5_000_000)
    config = {"vocab_size": 40_000, "hidden_size": 64}
    model = tiny.lora(tiny.llama(**config), target_modules=["embed_tokens", "q_proj"], r=64)
    push_adapter(saved_adapters.saved(model, tmp_path, "me/base", None), "me/adapter")
    file = server.files("me/adapter")["adapter_model.safetensors"]
    assert file["size"] > 10_000_000
    if upload_path == "lfs":
        assert len([e for e in server.log("PUT") if "_lfs" in e["path"]]) == -(-file["size"] // 5_000_000)
    found = PeftModel.from_pretrained(tiny.llama(**config), "me/adapter")
    expected = PeftModel.from_pretrained(tiny.llama(**config), str(tmp_path))
    torch.testing.assert_close(saved_adapters.logits(found), saved_adapters.logits(expected), rtol=0, atol=0)


def test_without_a_record_the_card_says_what_the_configuration_does(server, tmp_path):
    HfApi().create_repo("me/base")
    push_adapter(saved_adapters.lora(tmp_path, record=None), "me/adapter")
    data = front_matter(server, "me/adapter")
    assert (data["base_model"], data["tags"]) == ("me/base", ["base_model:adapter:me/base", "lora", "transformers"])
    assert "model-index" not in data


def test_a_local_base_model_is_named_only_if_somebody_does(server, tmp_path):
    base = str(tmp_path / "secret-customer" / "base")
    folder = saved_adapters.lora(
        tmp_path / "a", base=base, record={**saved_adapters.RECORD, "model": "base", "base_model": None}
    )
    push_adapter(folder, "me/adapter")
    for path in server.files("me/adapter"):
        assert b"secret-customer" not in server.read("me/adapter", path)
    assert "base_model" not in front_matter(server, "me/adapter")
    assert json.loads(server.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] is None
    push_adapter(folder, "me/adapter", base_model="me/base")
    assert front_matter(server, "me/adapter")["base_model"] == "me/base"
    assert json.loads(server.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] == "me/base"
    push_adapter(folder, "me/adapter")  # which remembers the base model of this local copy
    assert front_matter(server, "me/adapter")["base_model"] == "me/base"
    assert json.loads(server.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] == "me/base"
    other = saved_adapters.lora(
        tmp_path / "b", base=base + "2", record={**saved_adapters.RECORD, "model": "base2", "base_model": None}
    )
    done = push_adapter(other, "me/adapter")
    assert "base_model" not in front_matter(server, "me/adapter")
    assert "name no base model that is on the Hub" in done.notes[0]
    with pytest.raises(ValueError, match="must be an id on the Hub such as org/model, got '/x'"):
        push_adapter(folder, "me/adapter", base_model="/x")


def test_the_license_is_the_base_models_unless_given(server, tmp_path):
    put_card("---\nlicense: llama3.2\n---\n# base\n", "me/base")
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    assert front_matter(server, "me/adapter")["license"] == "llama3.2"
    put_card("---\nlicense: other\nlicense_name: house\nlicense_link: ./LICENSE\n---\n# base\n", "me/base")
    push_adapter(tmp_path, "me/other")
    data = front_matter(server, "me/other")
    assert (data["license"], data["license_name"]) == ("other", "house")
    assert data["license_link"] == f"{server.url}/me/base/blob/main/LICENSE"
    push_adapter(tmp_path, "me/adapter", license="mit", language=["en", "la"], tags=["mine"])
    data = front_matter(server, "me/adapter")
    assert (data["license"], data["language"], data["tags"][-1]) == ("mit", ["en", "la"], "mine")
    push_adapter(tmp_path, "me/adapter")
    assert front_matter(server, "me/adapter") == data


def test_a_card_edited_on_the_hub_is_kept(server, tmp_path):
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    text = server.read("me/adapter", "README.md").decode().replace("## Limits", "## My own words")
    put_card(text)
    done = push_adapter(saved_adapters.lora(tmp_path, seed=5), "me/adapter")
    assert done.kept_card
    assert server.read("me/adapter", "README.md").decode() == text


def test_no_text_on_the_hub_is_replaced_unless_somebody_says_so(server, tmp_path, capsys):
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    text = server.read("me/adapter", "README.md").decode().replace("## Limits", "## My own words")
    put_card(text)
    newer = text.replace("My own words", "My newest words")
    (tmp_path / "README.md").write_text(newer, encoding="utf-8")
    main(["push", str(tmp_path), "me/adapter"])
    out = capsys.readouterr().out
    assert "README.md on the Hub was edited by hand and is kept; --replace-card puts the folder's in its place." in out
    assert "it lacks lines that somebody has written there, under “My own words”. Copy them, or replace" in out
    assert server.read("me/adapter", "README.md").decode() == text
    both = newer + "\n## My own words\n"
    (tmp_path / "README.md").write_text(both, encoding="utf-8")
    assert not push_adapter(tmp_path, "me/adapter").kept_card
    assert server.read("me/adapter", "README.md").decode() == both
    (tmp_path / "README.md").write_text(newer, encoding="utf-8")
    assert not push_adapter(tmp_path, "me/adapter", replace_card=True).kept_card
    assert server.read("me/adapter", "README.md").decode() == newer
    (tmp_path / "README.md").unlink()
    main(["push", str(tmp_path), "me/adapter", "--replace-card"])
    assert b"My newest words" not in server.read("me/adapter", "README.md")


def test_options_are_written_into_a_card_that_is_kept(server, tmp_path, capsys):
    folder = saved_adapters.lora(tmp_path)
    put_card("---\n# mine\nwidget: []\n---\n# My poet\n")
    main(["push", str(folder), "me/adapter", "--license", "mit", "--language", "en", "--tags", "a", "b"])
    text = server.read("me/adapter", "README.md").decode()
    assert text == ("---\n# mine\nwidget: []\ntags:\n- a\n- b\nlicense: mit\nlanguage:\n- en\n---\n# My poet\n")
    out = capsys.readouterr().out
    for change in ("tags now have a, b", "license is now mit", "language is now en"):
        assert f"In README.md, {change}." in out
    assert push_adapter(folder, "me/adapter").kept_card
    assert server.read("me/adapter", "README.md").decode() == text
    (folder / "README.md").write_text("# My poet\n\nIt rhymes.\n", encoding="utf-8")
    push_adapter(folder, "me/adapter", license="apache-2.0")
    assert (
        server.read("me/adapter", "README.md").decode() == "---\nlicense: apache-2.0\n---\n# My poet\n\nIt rhymes.\n"
    )
    assert (folder / "README.md").read_text(encoding="utf-8") == "# My poet\n\nIt rhymes.\n"


def test_names_without_a_slash_are_ids_if_the_hub_has_them(server, tmp_path, capsys):
    HfApi(token=server.tokens["other"]).create_repo("other/base", private=True)
    server.add("gpt2")
    server.add("datasets/squad")
    folder = saved_adapters.lora(tmp_path, base="gpt2", record=None)
    push_adapter(folder, "me/adapter")
    assert front_matter(server, "me/adapter")["base_model"] == "gpt2"
    assert json.loads(server.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] == "gpt2"
    for name in ("gpt-absent", "models/chatglm-6b", "other/base"):
        folder = saved_adapters.lora(tmp_path, base=name, record=None)
        main(["push", str(folder), "me/adapter", "--other-base"])
        assert f"{name} is no model on the Hub that you can see, so that" in capsys.readouterr().out
        assert "base_model" not in front_matter(server, "me/adapter")
        assert json.loads(server.read("me/adapter", "adapter_config.json"))["base_model_name_or_path"] is None
        push_adapter(folder, "me/adapter", base_model="gpt2", other_base=True)
        assert front_matter(server, "me/adapter")["base_model"] == "gpt2"
    for dataset, shown in (("squad", ["squad"]), ("rows", None)):
        record = {**saved_adapters.RECORD, "dataset": dataset, "dataset_id": dataset}
        push_adapter(saved_adapters.lora(tmp_path, record=record), "me/adapter", other_base=True)
        assert front_matter(server, "me/adapter").get("datasets") == shown


def test_scores_go_to_the_hub_in_its_newer_form_too(server, tmp_path):
    scores = {"rows": 4, "split": "test", "before": {"exact": 0.0, "f": 1.0}, "after": {"exact": 0.5, "f": "nan"}}
    record = {**saved_adapters.RECORD, "dataset": "me/data", "dataset_id": "me/data", "scores": scores}
    push_adapter(saved_adapters.lora(tmp_path, record=record), "me/adapter")
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        assert ".eval_results/hf_reflora.yaml" not in server.files("me/adapter")
        return
    entries = yaml.safe_load(server.read("me/adapter", ".eval_results/hf_reflora.yaml"))
    [entry] = huggingface_hub.parse_eval_result_entries(entries)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("me/data", "exact", 0.5)
    assert entry.notes == "base model: 0.000, 4 rows, split test"


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_entries_of_a_person_survive_a_new_card(server, tmp_path, where):
    folder = saved_adapters.lora(tmp_path, record=None)
    own = (
        "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.y\ndatasets: squad\nwidget: [text: x]\n---\n"
    )
    if where == "hub":
        put_card(own)
    else:
        (folder / "README.md").write_text(own)
    for _ in range(2):
        push_adapter(folder, "me/adapter")
        data = front_matter(server, "me/adapter")
        assert (data["license"], data["license_name"], data["license_link"]) == ("other", "mine", "https://x.y")
        assert (data["datasets"], data["widget"]) == (["squad"], [{"text": "x"}])
    push_adapter(folder, "me/adapter", license="mit")
    assert {"license_name", "license_link"} & set(front_matter(server, "me/adapter")) == set()


def test_front_matter_from_the_website_is_merged(server, tmp_path):
    put_card("---\nlicense: cc-by-4.0\nlanguage: en\ntags:\n- poetry\n- transformers\n---\n")
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    data = front_matter(server, "me/adapter")
    assert (data["license"], data["language"]) == ("cc-by-4.0", "en")
    assert data["tags"].count("poetry") == data["tags"].count("transformers") == 1


def trls_card():
    names = dict.fromkeys(("wandb_url", "trackio_url"))
    return str(
        generate_model_card(
            "me/base", "adapter", "me/adapter", "me/data", ["mine", "sft"], trainer_name="SFT", **names
        )
    )


def test_a_card_of_trl_is_replaced_by_that_of_a_record(server, tmp_path):
    put_card(trls_card())
    push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    data = front_matter(server, "me/adapter")
    assert ("licence" in data, "mine" in data["tags"], data["datasets"]) == (False, True, ["me/data"])
    assert "TRL" not in server.read("me/adapter", "README.md").decode().split("---", 2)[2].split("<details>")[0]


def test_without_a_record_a_trainers_card_stays_and_its_front_matter_is_mended(server, tmp_path):
    HfApi().create_repo("me/base")
    summary = TrainingSummary(
        "adapter",
        finetuned_from="me/base",
        hyperparameters={"learning_rate": 0.1},
        dataset="squad",
        dataset_tags="squad",
    )
    for card in (trls_card(), summary.to_model_card()):
        folder = saved_adapters.lora(tmp_path / str(len(card)), record=None)
        (folder / "README.md").write_text(card)
        done = push_adapter(folder, "me/adapter", replace_card=True)
        text, data = server.read("me/adapter", "README.md").decode(), front_matter(server, "me/adapter")
        assert text.split("---\n", 2)[2] == card.split("---\n", 2)[2]
        assert (data["library_name"], data["base_model"], data["tags"][0]) == (
            *("peft", "me/base", "base_model:adapter:me/base"),
        )
        assert not done.kept_card


def test_a_path_in_a_card_of_ones_own_is_mended_and_said(server, tmp_path, capsys):
    """PEFT writes it there when it saves the adapter."""
    saved_adapters.lora(tmp_path)
    (tmp_path / "README.md").write_text("---\nbase_model: /data/base\n---\n# My text\n")
    main(["push", str(tmp_path), "me/adapter"])
    assert server.read("me/adapter", "README.md") == b"---\nbase_model: me/base\n---\n# My text\n"
    assert "base_model is now me/base, because '/data/base' is no id on the Hub" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "message"),
    [("license: 3", "license must be an id or a list"), ("x: [", "The card has no front matter that can be read")],
)
def test_a_wrong_card_is_refused_before_a_repository_is_made(server, tmp_path, entries, message):
    saved_adapters.lora(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{entries}\n---\n# My text\n")
    with pytest.raises(ValueError, match=message):
        push_adapter(tmp_path, "me/adapter")
    assert server.state() == {}


def test_a_license_that_the_hub_does_not_know_is_refused_before_a_repository_is_made(server, tmp_path):
    with pytest.raises((PushError, ValueError), match='"license" must be one of'):
        push_adapter(saved_adapters.lora(tmp_path), "me/adapter", license="apache")
    assert server.state() == {}


@pytest.mark.parametrize(
    ("repo_id", "token", "options", "message"),
    [
        ("readers/adapter", "me", {}, "me may only read in the organisation readers. Ask its admins"),
        ("acme/adapter", "me", {}, "no organisation acme that me belongs to .me is a member of team, readers."),
        ("other/adapter", "me", {}, "Push to me/adapter, or propose a pull request"),
        ("acme/adapter", "other", {}, "other is a member of no organisation"),
        ("a/b/c", "me", {}, "'a/b/c' cannot be the name of a repository"),
        ("me/ad apter", "me", {}, "cannot be the name of a repository"),
        ("me/adapter", "reader", {}, "The token of me may only read. Make one with write permission at https://hugg"),
        ("me/adapter", "hf_unknown", {}, "the token is not valid"),
        ("me/absent", "me", {"create_pr": True}, "me/absent does not exist or is not visible to me"),
        ("me/adapter", "me", {"create_pr": True, "revision": "dev"}, "A pull request goes to main"),
    ],
)
def test_refusals_before_anything_is_sent(server, tmp_path, repo_id, token, options, message):
    folder = saved_adapters.lora(tmp_path)
    with pytest.raises(PushError, match=message):
        push_adapter(folder, repo_id, token=server.tokens.get(token, token), **options)
    assert server.state() == {}


def test_no_token(server, tmp_path, monkeypatch):
    folder = saved_adapters.lora(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="No Hugging Face token was found"):
        push_adapter(folder, "me/adapter")
    assert server.log(path="/api/") == []


def test_offline(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="while HF_HUB_OFFLINE is set"):
        push_adapter(saved_adapters.lora(tmp_path), "me/adapter")
    assert server.log(path="/api/") == []


def test_a_public_repository_is_not_taken_for_a_private_one(server, tmp_path):
    HfApi().create_repo("me/adapter")
    with pytest.raises(PushError, match=r"me/adapter exists and is public. Make it private in its settings"):
        push_adapter(saved_adapters.lora(tmp_path), "me/adapter", private=True)
    assert len(server.commits("me/adapter")) == 1


def test_a_repository_one_may_not_write_to(server, tmp_path):
    """The organisation lets its member write, the token of somebody who has left it does not."""
    HfApi().create_repo("team/adapter")
    server.fault("/auth-check/write", method="GET", status=403, body={"error": "Forbidden: no write access"}, times=-1)
    with pytest.raises(PushError, match="Asking for permission to write to team/adapter failed: me may not do this"):
        push_adapter(saved_adapters.lora(tmp_path), "team/adapter")
    assert len(server.commits("team/adapter")) == 1


def test_another_base_model_is_refused_unless_told(server, tmp_path):
    push_adapter(saved_adapters.lora(tmp_path / "a"), "me/adapter")
    other = saved_adapters.lora(
        tmp_path / "b", base="me/larger", record={**saved_adapters.RECORD, "base_model": "me/larger"}
    )
    with pytest.raises(PushError, match=r"me/adapter holds an adapter of me/base, this one is of me/larger. Push to"):
        push_adapter(other, "me/adapter")
    push_adapter(other, "me/adapter", other_base=True)
    assert front_matter(server, "me/adapter")["base_model"] == "me/larger"
    assert "base_model:adapter:me/base" not in front_matter(server, "me/adapter")["tags"]


def test_a_card_that_names_another_form_of_the_base_does_not_stop_the_next_push(server, tmp_path):
    HfApi().create_repo("me/base")
    folder = saved_adapters.lora(tmp_path)
    (folder / "README.md").write_text("---\nbase_model: me/base-bnb-4bit\n---\n# Mine\n\nIt rhymes.\n")
    for _ in range(2):
        push_adapter(folder, "me/adapter")
    assert front_matter(server, "me/adapter")["base_model"] == "me/base-bnb-4bit"


def test_a_whole_model_is_not_overwritten(server, tmp_path):
    tiny.llama().push_to_hub("me/base")
    with pytest.raises(PushError, match="me/base holds a whole model, not an adapter"):
        push_adapter(saved_adapters.lora(tmp_path), "me/base")
    assert "adapter_config.json" not in server.files("me/base")


@pytest.mark.parametrize("where", ["run_record.json", "adapter_config.json", "tokenizer_config.json", "LICENSE.txt"])
@pytest.mark.parametrize("kind", ["token in use", "Hugging Face token", "value of .MY_SERVICE_KEY_TOKEN"])
def test_secrets_are_refused(server, tmp_path, monkeypatch, where, kind):
    monkeypatch.setenv("MY_SERVICE_KEY_TOKEN", "correct-horse-battery")
    secret = {
        "token in use": server.tokens["me"],
        "Hugging Face token": "hf_" + "Z" * 34,
    }.get(kind, "correct-horse-battery")
    folder = saved_adapters.lora(tmp_path)
    path = folder / where
    if where == "LICENSE.txt":
        path.write_text(f"my note: {secret}\n")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None, "comment": secret}))
    with pytest.raises(SecretFound, match=f"{where} has (an? |the )*{kind}") as caught:
        push_adapter(folder, "me/adapter")
    assert secret not in str(caught.value)
    assert server.state() == {}
    assert uploads(server) == []


def test_command_pushes_and_says_what(server, tmp_path, capsys):
    saved_adapters.lora(tmp_path)
    main(["push", str(tmp_path), "me/adapter", "--private", "--license", "mit", "--tags", "a", "b"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{server.url}/me/adapter/commit/{server.commits('me/adapter')[0]['oid']}"
    assert "adapter_model.safetensors" in out[1]
    assert out[2] == f"Left out: {', '.join(saved_adapters.LEFT_OUT)}"
    assert front_matter(server, "me/adapter")["tags"][-2:] == ["a", "b"]


def test_the_readmes_command_pushes(server, tmp_path, monkeypatch):
    [line] = re.findall(r"^ +hf-reflora (push .*)$", (ROOT / "model_cards" / "README.md").read_text("utf-8"), re.M)
    monkeypatch.chdir(tmp_path)
    saved_adapters.lora(tmp_path / line.split()[1])
    main(line.split())
    assert set(server.files("me/tool-calls")) == FILES


def test_command_fails_in_one_line_with_a_status(server, tmp_path, capsys):
    folder = saved_adapters.lora(tmp_path)
    server.fault("/commit/", status=403, body={"error": "Forbidden"}, times=-1)
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(folder), "me/adapter"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "hf-reflora: Pushing to me/adapter failed: me may not do this with the token in use (Forbidden). Use one with "
        "write permission (https://huggingface.co/settings/tokens)."
    )
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(tmp_path / "absent"), "me/adapter"])
    assert stopped.value.code == 1
    assert "has no adapter: adapter_config.json and adapter_model.safetensors were" in capsys.readouterr().err


@needs("huggingface_hub", "2.0", "a check of cards at HF_ENDPOINT")
def test_shipped_cards_pass_the_hubs_own_check(server):
    cards = sorted((ROOT / "model_cards").glob("smollm2-*.md"))
    assert cards
    for path in cards:
        ModelCard.load(path).validate()
    assert len(server.log("POST", "/validate-yaml")) == len(cards)
