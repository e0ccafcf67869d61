"""Scores of answers, by hand, and answers that end early."""

import re

import pytest
import tiny
import torch
from datasets import Dataset

from hf_reflora.recipes import scores
from hf_reflora.recipes.scores import (
    EXAMPLES,
    Scorer,
    final_answer_scores,
    never_a_json_object,
    reference,
    tool_call_scores,
)


LIGHT = '{"name": "set_light", "arguments": {"room": "hall", "on": true}}'
TIMER = '{"name": "set_timer", "arguments": {"minutes": 10}}'


@pytest.mark.parametrize(
    ("answer", "exact", "valid", "tool", "f1"),
    [
        (LIGHT, 1, 1, 1, 1),
        ('{"arguments": {"on": true, "room": "hall"}, "name": "set_light"}', 1, 1, 1, 1),
        ('{"name": "set_light", "arguments": {"room": "hall", "on": 1}}', 0, 1, 1, 0.5),
        ('{"name": "set_light", "arguments": {"room": "hall", "on": true, "level": 3}}', 0, 1, 1, 0.8),
        ('{"name": "set_light", "arguments": ["hall"]}', 0, 1, 1, 0),
        ('{"name": "set_lamp", "arguments": {"room": "hall", "on": true}}', 0, 1, 0, 0),
        ("{}", 0, 1, 0, 0),
        ("[1, 2]", 0, 0, 0, 0),
        (LIGHT + " done", 0, 0, 0, 0),
        (LIGHT[:-1], 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_tool_call_scores_of_one_answer(answer, exact, valid, tool, f1):
    scores = tool_call_scores([answer], [LIGHT])
    assert scores == {"exact": exact, "valid_json": valid, "right_tool": tool, "argument_f1": pytest.approx(f1)}


def test_tool_call_scores_are_means_and_one_f1_over_all():
    scores = tool_call_scores([LIGHT, "no idea"], [LIGHT, TIMER])
    assert scores["exact"] == scores["valid_json"] == scores["right_tool"] == 0.5
    assert scores["argument_f1"] == pytest.approx(2 * 2 / (2 + 3))


def test_calls_without_arguments():
    call = '{"name": "stop", "arguments": {}}'
    assert tool_call_scores([call], [call])["argument_f1"] == 1.0
    assert tool_call_scores(["{}"], [call])["argument_f1"] == 1.0  # nothing was wanted and nothing given


@pytest.mark.parametrize(
    ("score", "completion", "message"),
    [
        ("tool_call", "no JSON", "That of test row 1 is 'no JSON'"),
        ("tool_call", '{"name": "stop"}', "of the form"),
        ("tool_call", '["stop"]', "of the form"),
        ("final_answer", "It is 7.", 'what follows "answer is" or "####"'),
    ],
)
def test_references_that_a_score_cannot_compare_with(score, completion, message):
    first = LIGHT if score == "tool_call" else "The answer is 7"
    rows = Dataset.from_list([{"prompt": "x", "completion": text} for text in (first, completion)])
    with pytest.raises(ValueError, match=re.escape(message)):
        Scorer(score, rows, max_new_tokens=1, batch_size=1)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("#### 1,200", "The answer is: 1200", True),
        ("The answer is: $0.50.", "#### 1/2", True),
        ("The answer is 7\n\nQuestion: what is 8?", "#### 7", True),
        ("The answer is 50%", "#### 50", True),
        ("The answer is 1/0", "#### 1/0", True),  # a text
        ("7", "#### 7", False),
        ("The answer is", "#### 7", False),
    ],
)
def test_final_answers_of_gsm8k(answer, reference, right):
    assert final_answer_scores([answer], [reference]) == {"accuracy": float(right)}


def test_final_answers():
    references = ["So, the answer is: 1200", "the correct answer is answer2", "The answer is: 7", "The answer is 3"]
    answers = ["The answer is: 1,200.", "the correct answer is answer1", "7", "The answer is 4. No, the answer is 3"]
    assert final_answer_scores(answers, references) == {"accuracy": 0.5}


def test_reference_of_both_formats():
    assert reference({"completion": "a"}) == "a"
    assert reference({"completion": [{"role": "assistant", "content": "b"}]}) == "b"


@pytest.mark.parametrize("text", [LIGHT, TIMER + "\n ", '{"a": "\\u00e9 }{", "b": [{}]}', "\n\t{}", "{}"])
def test_no_beginning_of_a_json_object_is_hopeless(text):
    assert not any(never_a_json_object(text[:end]) for end in range(len(text) + 1))


@pytest.mark.parametrize("text", ["So", " [", '"{', "{} {", LIGHT + "\nDone", "1"])
def test_hopeless_beginnings_score_nothing(text):
    assert never_a_json_object(text)
    assert tool_call_scores([text], [LIGHT]) == tool_call_scores([text + "}"], [LIGHT])
    assert set(tool_call_scores([text], [LIGHT]).values()) == {0.0}


def memorized(answers: dict[str, str]):
    """A tiny model that gives each prompt its answer, and its tokenizer."""
    tokenizer, model = tiny.tokenizer(), tiny.llama(hidden_size=64, intermediate_size=96)
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in answers.items()]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def test_hopeless_answers_end_early_and_no_score_changes(monkeypatch):
    """Some rows are answered with the call, one with a wrong call, some with prose or with a call and prose."""
    call = '{"name": "f", "arguments": {}}'
    texts = [call, "It is so", call, "No", "Yes", "So it is", call + " done", call, '{"name": "g"}', "Hello you"]
    asked = {f"{chr(97 + i) * 2}=": text for i, text in enumerate(texts)}
    model, tokenizer = memorized(asked)
    rows = Dataset.from_list([{"prompt": prompt, "completion": call} for prompt in asked])
    found, answers = {}, {}
    for early in (True, False):
        if not early:
            monkeypatch.setattr(scores, "HOPELESS", {})
        scorer = Scorer("tool_call", rows, max_new_tokens=40, batch_size=3)
        found[early] = scorer.score(model, tokenizer, "after")
        answers[early] = scorer.answers["after"]
    assert answers[False] == texts
    assert found[True] == found[False]
    assert found[True] == {"exact": 0.3, "valid_json": 0.4, "right_tool": 0.3, "argument_f1": 1.0}
    assert answers[True][:EXAMPLES] == texts[:EXAMPLES]  # these are shown, so they are complete
    assert answers[True][EXAMPLES:] == ["S", call + " d", call, '{"name": "g"}', "H"]
