"""The Space's configuration: front matter, variables, files."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from space_server import models

from hf_reflora.hub.space import FILES, fill


VARIABLES = ("BASE_MODEL", "ADAPTERS", "SYSTEM_PROMPT", "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_P", "SEED", "DTYPE")

SPACES = Path(__file__).parents[2] / "spaces"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Space that says its models in the front matter alone."""
    pytest.importorskip("gradio")
    root = tmp_path_factory.mktemp("app")
    base, adapters = models(root)
    fill(root / "space", base=str(base), adapters=[str(path) for path in reversed(adapters.values())])
    return root / "space"


@pytest.fixture(scope="module")
def page(folder):
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.syspath_prepend(folder)
        import app
        import comparison
        import configuration
        import differences
        import layout
        import results
        import startup
        import zero_gpu

        modules = [app, comparison, configuration, differences, layout, results, startup, zero_gpu]
        yield SimpleNamespace(**{module.__name__: module for module in modules})


def test_each_file_is_listed_and_imports_only_from_those_below_it():
    """The table of README.md, the files that a Space gets, and those that are there."""
    folder = SPACES / "before_after"
    listed = re.findall(r"^\| \[`([\w.]+)`\]", (SPACES / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(FILES)
    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".py", ".md", ".txt")) == sorted(FILES)
    modules = [name.removesuffix(".py") for name in listed if name.endswith(".py")]
    for i, module in enumerate(modules):
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert imported & set(modules) <= set(modules[i + 1 :]), module


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TEMPERATURE": "hot"}, "temperature must be a number, not 'hot'"),
        ({"TOP_P": "0"}, "top-p must be above 0 and at most 1, not 0.0"),
        ({"MAX_NEW_TOKENS": "1e9"}, "max_new_tokens must be a whole number, not '1e9'"),
    ],
)
def test_wrong_settings_end_the_start(page, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        page.configuration.configured_settings()


def test_variables_go_before_the_front_matter(page, monkeypatch):
    assert list(page.configuration.configured_models()[1]) == ["second", "first"]
    monkeypatch.setenv("ADAPTERS", "org/x, mine = org/y")
    assert page.configuration.configured_models()[1] == {"x": "org/x", "mine": "org/y"}
    monkeypatch.setenv("BASE_MODEL", "org/base")
    assert page.configuration.configured_models()[0] == "org/base"
    monkeypatch.setenv("ADAPTERS", "a/x,b/x")
    with pytest.raises(ValueError, match="Two adapters are called x"):
        page.configuration.configured_models()
    for entry in ("=org/a", "name=", "="):
        monkeypatch.setenv("ADAPTERS", entry)
        with pytest.raises(ValueError, match="Write name=id, or the id alone"):
            page.configuration.configured_models()


def test_a_record_without_a_system_prompt(page, tmp_path):
    (tmp_path / "run_record.json").write_text('{"method": "lora", "arguments": {"system_prompt": null}}')
    assert page.results.Results(str(tmp_path)).system_prompt == ""


@pytest.mark.parametrize(
    ("record", "task"),
    [
        ({"method": "reflora"}, "Trained with RefLoRA"),
        ({"method": "IA3", "dataset": "/data/my_rows"}, r"Trained with IA3 on my\_rows"),
        (
            {"method": "lora_sb", "train_rows": 1720, "arguments": {"system_prompt": "\nBe [brief](x).\nTools: a, b"}},
            r"Trained with LoRA-SB to follow the system prompt “Be \[brief\]\(x\).”",
        ),
        (
            {"method": "lora", "train_rows": 1720, "dataset": "a/b", "arguments": {"system_prompt": "Go on. " * 99}},
            f"Trained with LoRA on 1,720 rows of b to follow the system prompt “{'Go on. ' * 17}…”",
        ),
    ],
)
def test_the_task_of_a_training_run_in_a_sentence(page, tmp_path, record, task):
    (tmp_path / "run_record.json").write_text(json.dumps(record), encoding="utf-8")
    assert page.results.Results(str(tmp_path)).task == task


def test_a_gpu_call_is_never_longer_than_zero_gpu_takes(page):
    for length in (1, 128, 4096):
        settings = page.comparison.settings_of(max_new_tokens=length, temperature=0, top_p=1, seed=0)
        assert 15 <= page.zero_gpu.seconds("Hello", "first", settings, "") <= 120


def test_the_owner_limits_the_answers(page):
    """MAX_NEW_TOKENS is not set here: 1024."""
    fields = page.layout.settings_fields
    with page.layout.gr.Blocks():
        length = fields()[1]
    assert (length.maximum, length.value) == (1024, 128)


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "{",
        '{"scores": []}',
        '{"log": []}',
        '{"method": 1, "examples": [{}]}',
        '{"scores": {"before": {"a": null}, "after": {"a": 1}}, "method": "x"}',
        "[" * 100_000,
    ],
)
def test_a_run_record_of_somebody_else_is_no_run_record(page, tmp_path, record):
    (tmp_path / "run_record.json").write_text(record, encoding="utf-8")
    (tmp_path / "README.md").write_text("# A card", encoding="utf-8")
    found = page.results.Results(str(tmp_path))
    assert (found.text, found.scores, found.examples, found.card) == ("It has no run record.", [], [], "# A card")


@pytest.mark.parametrize("front_matter", ["license: mit", "- a list", "a: [", ""])
def test_a_card_is_shown_without_its_front_matter(page, tmp_path, front_matter):
    """Whatever is in it."""
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n# A card\n\n---\nThe end.", encoding="utf-8")
    assert page.results.Results(str(tmp_path)).card.strip() == "# A card\n\n---\nThe end."


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({}, "0 tokens …"),
        ({"tokens": 1, "first_token_seconds": 0.26}, "1 token, first after 0.3 s …"),
        ({"tokens": 41, "seconds": 2.0, "first_token_seconds": 0.26}, "41 tokens, 20.0 tokens/s, first after 0.3 s …"),
        ({"ended": "end of text", "first_token_seconds": 1}, "0 tokens, first after 1.0 s · end of text"),
    ],
)
def test_the_line_under_an_answer(page, answer, line):
    assert page.differences.describe(page.differences.Answer(**answer)) == line


def test_the_ways_are_measured_before_the_first_visitor(page):
    assert page.startup.ENGINE._uses_mixed_batch.keys() == page.startup.ADAPTERS.keys()


def test_differences_put_both_answers_together(page):
    base, adapted = "The cat sat on the mat. " * 40, "The dog sat on a mat! " * 30
    parts = page.differences.differences(base, adapted)
    assert "".join(text for text, who in parts if who != "adapter") == base
    assert "".join(text for text, who in parts if who != "base") == adapted
    assert page.differences.differences("so", "so") == [("so", None)]
    assert page.differences.differences("", "") == [("Both are empty.", None)]
    assert page.differences.differences("one two three", '{"name": "x"}') == [
        ("The answers have next to nothing in common.", None)
    ]


def test_without_a_variable_the_system_prompt_is_the_records(page):
    assert page.startup.SYSTEM_PROMPTS == {"second": "", "first": "Be brief."}


def test_without_models_the_start_says_what_to_set(page, monkeypatch, tmp_path):
    fill(tmp_path / "space", base="", adapters=[])
    monkeypatch.setattr(page.configuration, "__file__", str(tmp_path / "space" / "configuration.py"))
    with pytest.raises(ValueError, match="Set BASE_MODEL to the base model and ADAPTERS to its adapters"):
        page.configuration.configured_models()
