"""The page's fields, and what they show of an adapter before anybody has asked anything."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from differences import NO_DIFFERENCES_YET, Marked, differences, readable
from gradio.components import Component
from startup import ADAPTERS, BASE, DEFAULTS, ENGINE, FIRST, RESULTS, START_LENGTH


CSS = """
footer {display: none !important}
/* Gradio's code blocks scroll where the keyboard can't, and their colours are too pale. */
#card pre, #card code {white-space: pre-wrap; overflow-wrap: anywhere}
#card .token, #card a {color: inherit !important}
/* The sides have the colours of the differences. */
#base {border-top: 4px solid #eab308 !important}
#adapted {border-top: 4px solid #2563eb !important}
#reference {border-top: 4px solid #16a34a !important}
/* Each answer's name is above its column, with a link. Gradio shows the copy button only beside a label. */
#base label > span, #adapted label > span, #reference label > span {
    position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%)
}
/* On a phone the held-out rows are one line, so that the answers begin on the first screen. */
@media (max-width: 700px) {
    #examples .gallery {flex-wrap: nowrap; overflow-x: auto; justify-content: flex-start}
    #examples .gallery button {flex: none}
}
"""
TEXT = {"lines": 5, "max_lines": 20, "buttons": ["copy"]}  # of an answer
RECORDED = "as recorded by the training run"
LABEL = 44  # characters of a held-out row's label: five of them are two lines on a desktop
NO_ANSWERS = ("", "", "", "", NO_DIFFERENCES_YET)  # texts, facts and differences


@dataclass
class Page:
    """The fields of the page.

    Attributes:
        title: What the training was for, and what it changed.
        prompt, adapter, run, stop: The question.
        examples: Held-out rows of the adapter's training run.
        answers: Both texts, both lines of facts, and the differences, as `compare` yields them.
        adapter_name: The line above the adapter's answers.
        reference: What the held-out row should be answered with: its column, its text, and hidden the row's prompt.
        settings: System prompt, length, temperature, top-p and seed, as `compare` takes them.
        again, share: Buttons below them.
        training: What is known of the adapter's training: text, scores, loss, card's box and card.
    """

    title: Component
    prompt: Component
    adapter: Component
    run: Component
    stop: Component
    examples: Component
    answers: list[Component]
    adapter_name: Component
    reference: list[Any]
    settings: list[Component]
    again: Component
    share: Component
    training: list[Component]


def lay_out() -> Page:
    """The fields in their order on the page, with what a visitor sees first: a held-out row, already answered."""
    first = recorded(FIRST, 0) if RESULTS[FIRST].examples else ("", *NO_ANSWERS, "")
    title = gr.Markdown(heading(FIRST), elem_id="title")
    question = _question_fields(first[0])
    examples = _examples()
    answers, adapter_name, reference = _answer_fields(*first)
    *settings, again, share = settings_fields()
    return Page(
        title, *question, examples, answers, adapter_name, reference, settings, again, share, _training_fields()
    )


def _question_fields(prompt: str) -> tuple[Component, ...]:
    """Prompt, adapter, Compare and Stop."""
    with gr.Row(equal_height=True):
        # One line that grows: Gradio sends at Enter only if a field begins with one.
        field = gr.Textbox(
            prompt,
            label="Prompt",
            lines=1,
            max_lines=12,
            autofocus=True,
            scale=6,
            min_width=300,
            elem_id="prompt",
            placeholder="Ask both. Enter sends, Shift+Enter begins a new line.",
        )
        several = len(ADAPTERS) > 1
        adapter = gr.Dropdown(list(ADAPTERS), value=FIRST, label="Adapter", scale=2, min_width=220, visible=several)
        run = gr.Button("Compare", variant="primary", scale=1, min_width=140, elem_id="run")
        stop = gr.Button("Stop", variant="stop", visible=False, scale=0, min_width=80)
    return field, adapter, run, stop


def _examples() -> Component:
    return gr.Dataset(
        components=[gr.Number(visible=False)],
        samples=[[number] for number in range(len(RESULTS[FIRST].examples))],
        sample_labels=labels_of(FIRST),
        label="Held-out rows, before → after training",
        type="index",
        elem_id="examples",
        visible=bool(RESULTS[FIRST].examples),
    )


def _answer_fields(
    prompt: str, base: str, adapted: str, base_facts: str, adapted_facts: str, changes: Marked, reference: str
) -> tuple[list[Component], Component, list[Any]]:
    """The answers, the line above the adapter's, and the reference, as `Page` has them."""
    with gr.Row():
        with gr.Column(min_width=300, elem_id="base-side"):
            gr.Markdown(f"**Base model** {_link(BASE)}")
            base_text, base_line = _side("Base model", "base", base, base_facts)
        with gr.Column(min_width=300):
            adapter_name = gr.Markdown(name_of(FIRST))
            adapted_text, adapted_line = _side("With the adapter", "adapted", adapted, adapted_facts)
        with gr.Column(min_width=300, visible=bool(reference)) as column:
            gr.Markdown("**Reference** of this held-out row")
            right = gr.Textbox(reference, label="Reference", **TEXT, elem_id="reference")
    row = gr.Textbox(prompt if reference else "", visible="hidden")
    difference = gr.HighlightedText(
        changes,
        label="Differences",
        color_map={"base": "yellow", "adapter": "blue"},
        show_legend=True,
        combine_adjacent=False,
    )
    return [base_text, adapted_text, base_line, adapted_line, difference], adapter_name, [column, right, row]


def _side(label: str, element: str, text: str, facts: str) -> tuple[Component, Component]:
    field = gr.Textbox(text, label=label, **TEXT, elem_id=element)
    return field, gr.Markdown(facts, label=f"{label}: length and speed")


def settings_fields() -> list[Component]:
    """System prompt, length, temperature, top-p and seed, as `compare` takes them, and two buttons."""
    with gr.Accordion("System prompt and sampling", open=False):
        # Filled when the page loads: a value given here would be the API's default, for every adapter.
        system = gr.Textbox(None, label="System prompt", lines=2, max_lines=8)
        with gr.Row():
            length = gr.Slider(1, DEFAULTS.max_new_tokens, START_LENGTH, step=1, label="Longest answer, in tokens")
            temperature = gr.Slider(0, 5, DEFAULTS.temperature, step=0.05, label="Temperature (0: likeliest token)")
            top_p = gr.Slider(0.05, 1, DEFAULTS.top_p, step=0.05, label="Top-p")
            seed = gr.Number(DEFAULTS.seed, label="Seed (the same luck for both)", precision=0, minimum=0)
        with gr.Row():
            again = gr.Button("Again with the next seed", size="sm")
            share = gr.Button("Copy a link to this question", size="sm")
    return [system, length, temperature, top_p, seed, again, share]


def _training_fields() -> list[Component]:
    first = RESULTS[FIRST]
    with gr.Accordion("The adapter's training run", open=False):
        about = gr.Markdown(first.text)
        scores = gr.Dataframe(
            first.scores,
            headers=["score", "before", "after"],
            label="Scores",
            interactive=False,
            visible=bool(first.scores),
        )
        losses = {"x": "step", "y": "loss", "label": "Training loss", "height": 240}
        curve = gr.LinePlot(first.losses, **losses, visible=not first.losses.empty)
    with gr.Accordion("The adapter's card", open=False, visible=bool(first.card)) as card:
        card_text = gr.Markdown(first.card, elem_id="card")
    return [about, scores, curve, card, card_text]


def recorded(name: str, number: int) -> tuple:
    """A held-out row of the adapter's training run, answered before and after it: prompt, answers, reference."""
    example = RESULTS[name].examples[number]
    answers = readable(example["before"]), readable(example["after"])
    changes = differences(example["before"], example["after"])
    return example["prompt"], *answers, RECORDED, RECORDED, changes, readable(example["reference"])


def labels_of(name: str) -> list[str]:
    """The examples' prompts, each with whether the answers before and after training are the reference."""
    labels = []
    for example in RESULTS[name].examples:
        outcome = " ".join("✓" if example[when] == example["reference"] else "✗" for when in ("before", "after"))
        outcome = f"{outcome.replace(' ', ' → ')}   " if example["reference"] else ""
        labels.append(outcome + textwrap.shorten(example["prompt"], LABEL, placeholder=" …"))
    return labels


def name_of(name: str) -> str:
    """The line above an adapter's answers."""
    return f"**With the adapter** {_link(ADAPTERS[name])}"


def heading(name: str) -> str:
    """What the training was for, and what it changed."""
    results = RESULTS[name]
    lines = [results.task, results.headline, *ENGINE.notes.get(name, [])]
    return "# Before and after the fine-tune\n\n" + "  \n".join(line for line in lines if line)


def _link(source: str) -> str:
    """A model's name as Markdown, linked if it is on the Hub."""
    on_hub = "/" in source and not Path(source).exists()
    return f"[{source}](https://huggingface.co/{source})" if on_hub else Path(source).name
