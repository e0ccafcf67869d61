"""The Space's configuration: front matter and variables."""

import pytest
from space_server import models

from hf_reflora.hub.space import fill


VARIABLES = ("BASE_MODEL", "ADAPTERS", "SYSTEM_PROMPT", "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_P", "SEED", "DTYPE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Space that says its models in the front matter alone."""
    pytest.importorskip("gradio")
    root = tmp_path_factory.mktemp("app")
    base, adapters = models(root)
    fill(root / "space", base=str(base), adapters=[str(path) for path in reversed(adapters.values())])
    return root / "space"


@pytest.fixture(scope="module")
def app(folder):
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.syspath_prepend(folder)
        import app

        yield app


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TEMPERATURE": "hot"}, "temperature must be a number, not 'hot'"),
        ({"TOP_P": "0"}, "top-p must be above 0 and at most 1, not 0.0"),
        ({"MAX_NEW_TOKENS": "1e9"}, "max_new_tokens must be a whole number, not '1e9'"),
    ],
)
def test_wrong_settings_end_the_start(app, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        app.configured_settings()


def test_variables_go_before_the_front_matter(app, monkeypatch):
    assert list(app.configured_models()[1]) == ["second", "first"]
    monkeypatch.setenv("ADAPTERS", "org/x, mine = org/y")
    assert app.configured_models()[1] == {"x": "org/x", "mine": "org/y"}
    monkeypatch.setenv("BASE_MODEL", "org/base")
    assert app.configured_models()[0] == "org/base"
    monkeypatch.setenv("ADAPTERS", "a/x,b/x")
    with pytest.raises(ValueError, match="Two adapters are called x"):
        app.configured_models()
    for entry in ("=org/a", "name=", "="):
        monkeypatch.setenv("ADAPTERS", entry)
        with pytest.raises(ValueError, match="Write name=id, or the id alone"):
            app.configured_models()


def test_a_record_without_a_system_prompt(app, tmp_path):
    (tmp_path / "run_record.json").write_text('{"method": "lora", "arguments": {"system_prompt": null}}')
    assert app.Results(str(tmp_path)).system_prompt == ""


def test_a_gpu_call_is_never_longer_than_zero_gpu_takes(app):
    for length in (1, 128, 4096):
        settings = app.settings_of(max_new_tokens=length, temperature=0, top_p=1, seed=0)
        assert 15 <= app.duration("Hello", "first", settings, "") <= 120


def test_the_owner_limits_the_answers(app):
    """MAX_NEW_TOKENS is not set here: 1024."""
    fields = app.settings_fields
    with app.gr.Blocks():
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
def test_a_run_record_of_somebody_else_is_no_run_record(app, tmp_path, record):
    (tmp_path / "run_record.json").write_text(record, encoding="utf-8")
    (tmp_path / "README.md").write_text("# A card", encoding="utf-8")
    found = app.Results(str(tmp_path))
    assert (found.text, found.scores, found.examples, found.card) == ("It has no run record.", [], [], "# A card")


@pytest.mark.parametrize("front_matter", ["license: mit", "- a list", "a: [", ""])
def test_a_card_is_shown_without_its_front_matter(app, tmp_path, front_matter):
    """Whatever is in it."""
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n# A card\n\n---\nThe end.", encoding="utf-8")
    assert app.Results(str(tmp_path)).card.strip() == "# A card\n\n---\nThe end."


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({}, "0 tokens …"),
        ({"tokens": 1, "first_token_seconds": 0.26}, "1 token, first after 0.3 s …"),
        ({"tokens": 41, "seconds": 2.0, "first_token_seconds": 0.26}, "41 tokens, 20.0 tokens/s, first after 0.3 s …"),
        ({"ended": "end of text", "first_token_seconds": 1}, "0 tokens, first after 1.0 s · end of text"),
    ],
)
def test_the_line_under_an_answer(app, answer, line):
    assert app.describe(app.Answer(**answer)) == line


def test_the_ways_are_measured_before_the_first_visitor(app):
    assert app.ENGINE._uses_mixed_batch.keys() == app.ADAPTERS.keys()


def test_differences_put_both_answers_together(app):
    base, adapted = "The cat sat on the mat. " * 40, "The dog sat on a mat! " * 30
    parts = app.differences(base, adapted)
    assert "".join(text for text, who in parts if who != "adapter") == base
    assert "".join(text for text, who in parts if who != "base") == adapted
    assert app.differences("so", "so") == [("so", None)]
    assert app.differences("", "") == [("Both are empty.", None)]
    assert app.differences("one two three", '{"name": "x"}') == [("The answers have next to nothing in common.", None)]


def test_without_a_variable_the_system_prompt_is_the_records(app):
    assert app.SYSTEM_PROMPTS == {"second": "", "first": "Be brief."}


def test_without_models_the_start_says_what_to_set(app, monkeypatch, tmp_path):
    fill(tmp_path / "space", base="", adapters=[])
    monkeypatch.setattr(app, "__file__", str(tmp_path / "space" / "app.py"))
    with pytest.raises(ValueError, match="Set BASE_MODEL to the base model and ADAPTERS to its adapters"):
        app.configured_models()
