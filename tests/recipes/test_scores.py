"""Scores of answers, by hand."""

import re

import pytest
from datasets import Dataset

from hf_reflora.recipes.scores import Scorer, final_answer_scores, reference, tool_call_scores


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
