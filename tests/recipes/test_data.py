"""The tool-call data: every row well-formed, every held-out row new."""

import difflib
import json
import re
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "recipes" / "data" / "tool_calls"
# tool -> argument -> (types, required)
SIGNATURES = {
    "set_alarm": {"time": (str, True), "label": (str, False)},
    "set_timer": {"minutes": (int, True)},
    "get_weather": {"city": (str, True), "day": (str, False)},
    "send_message": {"to": (str, True), "text": (str, True)},
    "play_music": {"song": (str, True), "artist": (str, False)},
    "add_to_list": {"list": (str, True), "item": (str, True), "count": (int, False)},
    "convert": {"value": ((int, float), True), "from": (str, True), "to": (str, True)},
    "book_table": {"restaurant": (str, True), "people": (int, True), "time": (str, True)},
    "set_light": {"room": (str, True), "on": (bool, True), "level": (int, False)},
    "translate": {"text": (str, True), "to": (str, True)},
}
# Arguments from open classes: no held-out value occurs in training.
UNSEEN = {
    "set_alarm": ("label",),
    "get_weather": ("city",),
    "send_message": ("to", "text"),
    "play_music": ("song", "artist"),
    "add_to_list": ("item",),
    "book_table": ("restaurant",),
    "translate": ("text",),
}


def load(split):
    rows = [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{"request": row["request"], "call": json.loads(row["call"])} for row in rows]


TRAIN, TEST = load("train"), load("test")


def phrasing(row):
    """The request with its values blanked out: the sentence frame."""
    text = row["request"]
    for value in sorted(map(str, row["call"]["arguments"].values()), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "_", text)
    return re.sub(r"\d+", "#", text.lower())


def test_size_and_balance():
    assert len(TRAIN) >= 600
    assert len(TEST) >= 200
    for rows, least in ((TRAIN, 60), (TEST, 20)):
        counts = {tool: sum(row["call"]["name"] == tool for row in rows) for tool in SIGNATURES}
        assert min(counts.values()) >= least, counts


@pytest.mark.parametrize("rows", [TRAIN, TEST], ids=["train", "test"])
def test_calls_fit_their_signatures(rows):
    for row in rows:
        call = row["call"]
        assert set(call) == {"name", "arguments"}, row
        signature, arguments = SIGNATURES[call["name"]], call["arguments"]
        assert list(arguments) == [name for name in signature if name in arguments], row
        for name, (types, required) in signature.items():
            if name not in arguments:
                assert not required, row
                continue
            value = arguments[name]
            assert isinstance(value, types), row
            assert isinstance(value, bool) == (types is bool), row
            if name == "time":
                assert re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value), row
            elif types is str:
                assert value in row["request"], f"{name} must be copied from the request: {row}"


def test_requests_are_unique():
    requests = [row["request"].lower() for row in TRAIN + TEST]
    assert len(set(requests)) == len(requests)


def test_held_out_values_are_unseen():
    for row in TEST:
        tool = row["call"]["name"]
        for name in UNSEEN.get(tool, ()):
            value = row["call"]["arguments"].get(name)
            seen = {str(r["call"]["arguments"].get(name)).lower() for r in TRAIN if r["call"]["name"] == tool}
            assert value is None or value.lower() not in seen, row


def test_held_out_phrasings_are_unseen():
    seen = {phrasing(row) for row in TRAIN}
    assert not [row for row in TEST if phrasing(row) in seen]


def test_no_held_out_row_is_a_near_copy():
    train = [row["request"].lower() for row in TRAIN]
    matcher = difflib.SequenceMatcher(autojunk=False)
    for row in TEST:
        matcher.set_seq2(row["request"].lower())
        for text in train:
            matcher.set_seq1(text)
            if matcher.real_quick_ratio() > 0.8 and matcher.quick_ratio() > 0.8:
                assert matcher.ratio() <= 0.8, (row["request"], text)


def test_system_prompt_names_every_tool_and_argument():
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((FOLDER.parent.parent / "smollm2-135m" / "reflora.yaml").read_text(encoding="utf-8"))
    for tool, signature in SIGNATURES.items():
        arguments = ", ".join(name + ("" if required else "?") for name, (_, required) in signature.items())
        assert f"{tool}({arguments})" in config["system_prompt"]
