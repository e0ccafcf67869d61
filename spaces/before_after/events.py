"""What happens when a visitor arrives, asks, stops, or chooses another adapter or a held-out row."""

import asyncio
import json
import time
from typing import Any

import gradio as gr
from chat import CannotAnswer
from comparison import LONGEST_PROMPT, compare, validate
from decoding import settings_of
from differences import NO_DIFFERENCES_YET, STOPPED, readable
from layout import NO_ANSWERS, Page, heading, labels_of, name_of, recorded
from startup import ADAPTERS, DEFAULTS, FIRST, RESULTS, START_LENGTH, SYSTEM_PROMPTS


# Of Compare, Stop and the prompt, while no model answers.
READY = (gr.update(interactive=True), gr.update(visible=False), gr.update(interactive=True))
NO_REFERENCE = (gr.update(visible=False), "", "")  # its column, its text, and the prompt of its row
# At once, before the question has left the browser: without the answers to an older question, with Stop instead of
# Compare, and with the answers in view, which on a phone are below the fold.
BEGIN = """(prompt, seed) => {
    const set = (properties) => ({...properties, __type__: 'update'});
    if (!(prompt || '').trim() || seed === null) return Array(8).fill(set({}));
    // On a phone the answers are one below the other: with the first at the top, both are in view.
    const block = window.matchMedia('(max-width: 700px)').matches ? 'start' : 'nearest';
    document.querySelector('#base-side').scrollIntoView({behavior: 'smooth', block});
    const waiting = [{token: WAITING, class_or_confidence: null}];
    return [
        set({interactive: false}), set({visible: true}), set({interactive: false}),
        ...['', '', '', ''].map((value) => set({value})), set({value: waiting}),
    ];
}""".replace("WAITING", json.dumps(NO_DIFFERENCES_YET[0][0]))
# At temperature 0 every seed gives the same answer.
NEXT_SEED = """(seed, temperature) => {
    setTimeout(() => document.querySelector('#run').click(), 100);
    return [(seed ?? 0) + 1, temperature || 0.7];
}"""
# What a link to a question has. The page's own address is known to the browser only.
COPY_LINK = """(prompt, adapter, system, max_new_tokens, temperature, top_p, seed) => {
    const values = {prompt, adapter, system, max_new_tokens, temperature, top_p, seed};
    const url = new URL(window.location.href);
    url.search = new URLSearchParams(values).toString();
    navigator.clipboard.writeText(url.toString());
}"""
# The reference stands beside the answers to its row only. `input` would miss what is pasted or dictated.
SHOW_REFERENCE = "(prompt, row) => ({visible: !!prompt && prompt === row, __type__: 'update'})"
# What happens in the browser or outside the queue is no part of the API. Outside, because Stop would wait behind the
# answer that it shall stop.
HIDDEN: dict[str, Any] = {"queue": False, "api_visibility": "private"}


def connect(blocks: gr.Blocks, page: Page) -> None:
    """Says what follows from which event of the page and its fields."""
    buttons, shown_adapter = [page.run, page.stop, page.prompt], gr.State(FIRST)
    stop_signal = _connect_question(page, buttons)
    of_adapter = [page.title, page.adapter_name, page.examples, *page.training]
    system, _, temperature, _, seed = page.settings
    # `change` fires, too, when the page itself sets the adapter; `input` also when a visitor leaves the field, and
    # `select` not for the keyboard.
    chosen = page.adapter.change(stop_soon, None, stop_signal, **HIDDEN)
    changed = [*of_adapter, system, *page.answers, *page.reference, *buttons, shown_adapter]
    chosen.then(show_adapter, [page.adapter, shown_adapter, system], changed, **HIDDEN)
    shown = page.examples.click(stop_soon, None, stop_signal, **HIDDEN)
    row = [page.prompt, *page.answers, *page.reference, page.run, page.stop]
    shown.then(show_example, [page.adapter, page.examples], row, **HIDDEN)
    column, _, of_row = page.reference
    page.prompt.change(None, [page.prompt, of_row], column, js=SHOW_REFERENCE, **HIDDEN)
    page.again.click(None, [seed, temperature], [seed, temperature], js=NEXT_SEED, **HIDDEN)
    page.share.click(None, [page.prompt, page.adapter, *page.settings], None, js=COPY_LINK, **HIDDEN)
    arriving = [page.adapter, shown_adapter, *page.settings, page.prompt, *page.answers, *page.reference, *of_adapter]
    blocks.load(arrive, None, arriving, show_progress="hidden", **HIDDEN)


def _connect_question(page: Page, buttons: list[gr.components.Component]) -> gr.components.Component:
    """Compare and Stop. Returns a hidden field that stops the answer when it changes."""
    asked = [page.run.click, page.prompt.submit]
    gr.on(asked, None, [page.prompt, page.settings[-1]], [*buttons, *page.answers], js=BEGIN, **HIDDEN)
    comparison = gr.on(
        asked,
        compare,
        [page.prompt, page.adapter, *page.settings],
        page.answers,
        api_name="compare",
        validator=validate,
        concurrency_limit=1,
        concurrency_id="model",
        show_progress="minimal",
    )
    # After an error or Stop the answers stay as they are.
    comparison.success(end, page.answers[:2], [*buttons, *page.answers[:2]], **HIDDEN)
    comparison.failure(lambda: READY, None, buttons, **HIDDEN)
    # Gradio's `cancels` works on an event of a component and not on a `then`: a change of this field stops.
    stop_signal = gr.Number(visible="hidden")
    stop_signal.change(None, cancels=[comparison], **HIDDEN)
    stop_event = page.stop.click(stop_soon, None, stop_signal, **HIDDEN)
    stop_event.then(stopped, page.answers[2:], [*buttons, *page.answers[2:]], **HIDDEN)
    return stop_signal


async def stop_soon() -> float:
    """A new value for the hidden field that cancels, a moment later.

    Gradio cannot cancel a question that has not arrived yet; one that was sent before this has arrived by then.
    """
    await asyncio.sleep(0.2)
    return time.monotonic()


def end(base: str, adapted: str) -> tuple:
    """The page after both answers: JSON is shown so that people can read it."""
    return *READY, readable(base), readable(adapted)


def stopped(base_facts: str, adapted_facts: str, changes: Any) -> tuple:
    """The page after Stop: nothing promises to go on."""
    facts = [text.removesuffix(" …") for text in (base_facts or "", adapted_facts or "")]
    unfinished = any(text != shown for text, shown in zip(facts, (base_facts, adapted_facts), strict=True))
    changes = STOPPED if unfinished or not any(facts) else changes
    return *READY, *facts, changes


def about(name: str) -> tuple:
    """What the page shows of an adapter: the heading, the examples and its training."""
    results = RESULTS[name]
    examples = gr.Dataset(
        samples=[[number] for number in range(len(results.examples))],
        sample_labels=labels_of(name),
        visible=bool(results.examples),
    )
    scores = gr.Dataframe(results.scores, visible=bool(results.scores))
    curve = gr.LinePlot(results.losses, visible=not results.losses.empty)
    card = gr.Accordion(visible=bool(results.card))
    return heading(name), name_of(name), examples, results.text, scores, curve, card, results.card


def show_adapter(name: str, shown: str, system: str | None) -> tuple:
    """The page after a visitor has chosen another adapter than the one that is `shown`.

    The answers of the old one are cleared. The system prompt becomes the new one's, unless the visitor has typed one.
    """
    if name == shown:  # the page itself has set it, for a visitor who came by a link
        return (gr.skip(),) * 21
    system = SYSTEM_PROMPTS[name] if system is None or system in SYSTEM_PROMPTS.values() else system
    return *about(name), system, *NO_ANSWERS, *NO_REFERENCE, *READY, name


def show_example(name: str, number: int) -> tuple:
    """The page after a visitor has chosen a held-out row."""
    prompt, *shown, reference = recorded(name, number)
    column, row = gr.update(visible=bool(reference)), prompt if reference else ""
    return gr.update(value=prompt, interactive=True), *shown, column, reference, row, *READY[:2]


def arrive(request: gr.Request) -> tuple:
    """What changes on the page for a visitor who comes by a link to a question: `?prompt=…&adapter=…&seed=…`."""
    query = dict(request.query_params)
    adapter = query["adapter"] if query.get("adapter") in ADAPTERS else FIRST
    system = query.get("system", SYSTEM_PROMPTS[adapter])[:LONGEST_PROMPT]
    numbers = {"max_new_tokens": START_LENGTH, "temperature": DEFAULTS.temperature, "top_p": DEFAULTS.top_p}
    numbers = {**numbers, "seed": DEFAULTS.seed}
    try:
        settings = settings_of(**{name: query.get(name, value) for name, value in numbers.items()})
    except CannotAnswer:
        settings = settings_of(**numbers)
    values = vars(settings) | {"max_new_tokens": min(settings.max_new_tokens, DEFAULTS.max_new_tokens)}
    # What the link does not have stays as it is: a visitor may have changed it before this arrives.
    given = [values[name] if name in query else gr.skip() for name in numbers]
    chosen = [adapter if "adapter" in query else gr.skip()] * 2
    fields = *chosen, system, *given
    if "prompt" not in query:
        return *fields, *[gr.skip()] * 17
    return *fields, query["prompt"][:LONGEST_PROMPT], *NO_ANSWERS, *NO_REFERENCE, *about(adapter)
