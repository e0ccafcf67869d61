"""A page that shows what a fine-tune changed: one prompt, answered by the base model and by its adapter, side by side.

    BASE_MODEL=org/model ADAPTERS=org/adapter python app.py

BASE_MODEL is an id on the Hub or a folder. ADAPTERS lists the adapters that visitors may choose, as ids, folders or
name=id, separated by commas. Without these variables the page takes the `models` in README.md's front matter: first
the base model, then the adapters. SYSTEM_PROMPT, TEMPERATURE, TOP_P and SEED set what the page's fields start with,
MAX_NEW_TOKENS the longest answer that visitors may ask for, and DTYPE the base model's: float32 (the default on a
CPU), bfloat16, float16 or auto.
"""

# ZeroGPU's package replaces parts of torch and must come before anything that imports torch. Elsewhere it is absent,
# or its GPU decorator does nothing.
try:
    from spaces import GPU
except ImportError:
    GPU = None

import asyncio
import difflib
import json
import os
import re
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
from engine import Answer, CannotAnswer, Engine, Settings, settings_of
from huggingface_hub import metadata_load
from results import Results


QUEUE_SIZE = 20  # visitors who may wait
LONGEST_PROMPT = 20_000  # characters
# Sending each token of a fast model would leave slow browsers behind, and their Stop button with them.
SECONDS_BETWEEN_UPDATES = 0.1
# Shown until there are differences, as the empty box that Gradio would show is not accessible.
NO_DIFFERENCES_YET = [("They appear when both answers have ended.", None)]
STOPPED = [("Stopped before both answers had ended.", None)]
# Below this share of common words, marked words are no help to a reader.
LEAST_IN_COMMON = 0.35
USUAL_LENGTH = 128  # tokens; the page starts with it unless MAX_NEW_TOKENS is smaller
LONGEST_GPU_CALL = 120  # seconds; ZeroGPU refuses calls of several minutes
CSS = """
footer {display: none !important}
/* Gradio's code blocks scroll where the keyboard can't, and their colours are too pale. */
#card pre, #card code {white-space: pre-wrap; overflow-wrap: anywhere}
#card .token, #card a {color: inherit !important}
/* The sides have the colours of the differences. */
#base {border-top: 4px solid #eab308 !important}
#adapted {border-top: 4px solid #2563eb !important}
"""


def configured_models() -> tuple[str, dict[str, str]]:
    """The base model, and the adapters by the names that visitors see.

    Raises:
        ValueError: if neither the variables nor the front matter name them, or two adapters have the same name.
    """
    models = (metadata_load(Path(__file__).with_name("README.md")) or {}).get("models") or [""]
    base = os.environ.get("BASE_MODEL", "").strip() or models[0]
    listed = os.environ.get("ADAPTERS", "").split(",")
    entries = [entry.strip() for entry in listed if entry.strip()] or models[1:]
    if not base or not entries:
        raise ValueError("Set BASE_MODEL to the base model and ADAPTERS to its adapters, separated by commas.")
    adapters = {}
    for entry in entries:
        name, equals, source = entry.partition("=")
        name, source = (name.strip(), source.strip()) if equals else (Path(entry).name, entry)
        if not name or not source:
            raise ValueError(f"ADAPTERS has the entry {entry!r}. Write name=id, or the id alone.")
        if name in adapters:
            raise ValueError(f"Two adapters are called {name}. Name them: ADAPTERS=first=org/a,second=org/b.")
        adapters[name] = source
    return base, adapters


def configured_settings() -> Settings:
    """What the page's fields and the API start with, with the longest answer that visitors may ask for.

    Raises:
        ValueError: if a variable is no number, or out of range.
    """
    defaults = {"max_new_tokens": 1024, "temperature": 0, "top_p": 1, "seed": 0}
    return settings_of(**{name: os.environ.get(name.upper()) or value for name, value in defaults.items()})


BASE, ADAPTERS = configured_models()
DEFAULTS, SYSTEM_PROMPT = configured_settings(), os.environ.get("SYSTEM_PROMPT", "")
# Before the page is launched: ZeroGPU moves what is loaded at import to its GPUs, and elsewhere the Space's own
# "building" screen is shown meanwhile.
ENGINE = Engine(BASE, ADAPTERS, dtype=os.environ.get("DTYPE") or None)
if not os.environ.get("SPACES_ZERO_GPU"):  # there is no GPU at the start there, and the first question measures
    ENGINE.measure()
RESULTS = {name: Results(source) for name, source in ADAPTERS.items()}
SYSTEM_PROMPTS = {name: SYSTEM_PROMPT or results.system_prompt for name, results in RESULTS.items()}
FIRST = next(iter(ADAPTERS))
START_LENGTH = min(USUAL_LENGTH, DEFAULTS.max_new_tokens)
# One visitor at a time has the model, and one thread runs it.
MODEL_IS_BUSY = asyncio.Lock()
MODEL_THREAD = ThreadPoolExecutor(1, thread_name_prefix="model")


def duration(prompt: str, adapter: str, settings: Settings, system: str) -> int:
    """Seconds of a GPU to ask ZeroGPU for. It calls this with the arguments of `stream_answers`."""
    return min(15 + settings.max_new_tokens // 8, LONGEST_GPU_CALL)


def stream_answers(prompt: str, adapter: str, settings: Settings, system: str) -> Iterator[tuple]:
    """Both answers as they grow: (base text, adapter text, base facts, adapter facts).

    On ZeroGPU this runs in another process; all arguments and results must be picklable.
    """
    for base, adapted in ENGINE.compare(prompt, adapter, settings, system):
        yield base.text, adapted.text, describe(base), describe(adapted)


if GPU is not None:
    stream_answers = GPU(duration=duration)(stream_answers)


async def compare(
    prompt: str,
    adapter: str = FIRST,
    system: str | None = None,
    max_new_tokens: float = START_LENGTH,
    temperature: float = DEFAULTS.temperature,
    top_p: float = DEFAULTS.top_p,
    seed: float = DEFAULTS.seed,
) -> AsyncIterator[tuple]:
    """Both answers to a prompt as they grow: texts, lengths and speeds, and at the end their differences.

    Without `system` the adapter gets the system prompt of its training; "" is none.
    """
    system = SYSTEM_PROMPTS.get(adapter, "") if system is None else system
    # What a visitor can change is checked before a GPU is asked for.
    try:
        if len(prompt) + len(system) > LONGEST_PROMPT:
            raise CannotAnswer(f"The prompt is longer than {LONGEST_PROMPT:,} characters. Shorten it.")
        if max_new_tokens > DEFAULTS.max_new_tokens:
            raise CannotAnswer(f"The longest answer here is {DEFAULTS.max_new_tokens} tokens.")
        settings = settings_of(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        await asyncio.to_thread(ENGINE.encode_prompt, prompt, adapter, system)
    except CannotAnswer as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None
    stream, last_update = stream_answers(prompt, adapter, settings, system), float("-inf")
    # Whoever waits for the model waits here, where it costs no thread: threads that wait for the engine's lock could
    # be all that there are, and the visitor who has the lock would get none to go on with.
    async with MODEL_IS_BUSY:
        try:
            # Asynchronous, so that whoever cancels need not wait for the next token: a second request to Gradio's
            # /cancel while the first one waits would fail. Shielded, because a thread cannot be cancelled.
            while (latest := await asyncio.shield(in_model_thread(next, stream, None))) is not None:
                outputs = latest
                if time.monotonic() - last_update >= SECONDS_BETWEEN_UPDATES:
                    yield *outputs, NO_DIFFERENCES_YET
                    last_update = time.monotonic()
            yield *outputs, differences(*outputs[:2])
        finally:
            # After the step that may still be running; a generator cannot be closed while it runs.
            await asyncio.shield(in_model_thread(stream.close))


def in_model_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future:
    """Calls `function` in the one thread that runs the model, after what was asked of it before."""
    return asyncio.get_running_loop().run_in_executor(MODEL_THREAD, function, *arguments)


def describe(answer: Answer) -> str:
    """An answer's length, speed and end, in a line."""
    facts = [f"{answer.tokens} token" + "s" * (answer.tokens != 1)]
    if answer.tokens_per_second:
        facts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.first_token_seconds and (answer.tokens or answer.ended):
        facts.append(f"first after {answer.first_token_seconds:.1f} s")
    return ", ".join(facts) + (f" · {answer.ended}" if answer.ended else " …")


def differences(base: str, adapted: str) -> list[tuple[str, str | None]]:
    """The words of both answers in one text, marked "base" or "adapter" where only one of them has them."""
    base_words, adapted_words = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (base, adapted))
    if not base_words and not adapted_words:
        return [("Both are empty.", None)]
    matcher = difflib.SequenceMatcher(None, base_words, adapted_words)
    if matcher.quick_ratio() < LEAST_IN_COMMON:
        return [("The answers have next to nothing in common.", None)]
    parts = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(("".join(base_words[a:b]), None))
            continue
        changes = ("".join(base_words[a:b]), "base"), ("".join(adapted_words[c:d]), "adapter")
        parts += [(text, side) for text, side in changes if text]
    return parts


def validate(prompt: str | None, *others: Any) -> list[dict[str, Any]]:
    """Messages at the fields that a visitor must change, before the question joins the queue."""
    no_messages = [gr.validate(True, "") for _ in others[:-1]]
    seed = gr.validate(others[-1] is not None, "Type a whole number.")
    return [gr.validate(bool((prompt or "").strip()), "Type a prompt first."), *no_messages, seed]


async def stop_soon() -> float:
    """A new value for the hidden field that cancels, a moment later.

    Gradio cannot cancel a question that has not arrived yet; one that was sent before this has arrived by then.
    """
    await asyncio.sleep(0.2)
    return time.monotonic()


def readable(text: str) -> str:
    """JSON on several lines, and any other text as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return json.dumps(value, indent=2, ensure_ascii=False) if isinstance(value, dict | list) else text


def end(base: str, adapted: str) -> tuple:
    """The page after both answers: JSON is shown so that people can read it."""
    return *READY, readable(base), readable(adapted)


def stopped(base_facts: str, adapted_facts: str, changes: Any) -> tuple:
    """The page after Stop: nothing promises to go on."""
    facts = [text.removesuffix(" …") for text in (base_facts or "", adapted_facts or "")]
    unfinished = any(text != shown for text, shown in zip(facts, (base_facts, adapted_facts), strict=True))
    changes = STOPPED if unfinished or not any(facts) else changes
    return *READY, *facts, changes


RECORDED = "as recorded by the training run"
EMPTY = ("", "", "", "", NO_DIFFERENCES_YET)
# Of Compare, Stop and the prompt, while no model answers.
NO_REFERENCE = gr.update(value="", visible=False)
READY = (gr.update(interactive=True), gr.update(visible=False), gr.update(interactive=True))


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
        labels.append(outcome + textwrap.shorten(example["prompt"], 70, placeholder=" …"))
    return labels


def heading(name: str) -> str:
    """What is compared, and what changed."""
    base, adapter = _link(BASE), _link(ADAPTERS[name])
    lines = [f"{base} alone, and with the adapter {adapter}.", RESULTS[name].headline, *ENGINE.notes.get(name, [])]
    return "# Before and after the fine-tune\n\n" + "  \n".join(line for line in lines if line)


def _link(source: str) -> str:
    """A model's name as Markdown, linked if it is on the Hub."""
    on_hub = "/" in source and not Path(source).exists()
    return f"[{source}](https://huggingface.co/{source})" if on_hub else f"**{Path(source).name}**"


def question_fields() -> tuple[gr.Textbox, gr.Dropdown, gr.Button, gr.Button]:
    with gr.Row(equal_height=True):
        # One line that grows: Gradio sends at Enter only if a field begins with one.
        prompt = gr.Textbox(
            SHOWN_FIRST[0],
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
        stop = gr.Button("Stop", variant="stop", visible=False, scale=1, min_width=80)
    return prompt, adapter, run, stop


def settings_fields() -> list[gr.components.Component]:
    """System prompt, length, temperature, top-p and seed, as `compare` takes them."""
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


def answer_fields() -> list[gr.components.Component]:
    """Both texts, both lines of facts, the differences, as `compare` yields them, and the reference."""
    _, base, adapted, base_facts, adapted_facts, changes, reference = SHOWN_FIRST
    sides = []
    with gr.Row():
        for label, element, text, facts in (
            (f"Base model: {Path(BASE).name}", "base", base, base_facts),
            ("With the adapter", "adapted", adapted, adapted_facts),
        ):
            with gr.Column(min_width=320):
                field = gr.Textbox(text, label=label, lines=5, max_lines=20, buttons=["copy"], elem_id=element)
                sides.append((field, gr.Markdown(facts, label=f"{label}: length and speed")))
    changes = gr.HighlightedText(
        changes,
        label="Differences",
        color_map={"base": "yellow", "adapter": "blue"},
        show_legend=True,
        combine_adjacent=False,
    )
    reference = gr.Textbox(
        reference, label="Reference of this held-out row", lines=1, max_lines=12, visible=bool(reference)
    )
    return [*(field for field, _ in sides), *(facts for _, facts in sides), changes, reference]


def training_fields() -> list[gr.components.Component]:
    """What is known of the adapter's training, as `show_adapter` returns it."""
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
    return heading(name), examples, results.text, scores, curve, card, results.card


def show_adapter(name: str, shown: str, system: str | None) -> tuple:
    """The page after a visitor has chosen another adapter than the one that is `shown`.

    The answers of the old one are cleared. The system prompt becomes the new one's, unless the visitor has typed one.
    """
    if name == shown:  # the page itself has set it, for a visitor who came by a link
        return (gr.skip(),) * 18
    system = SYSTEM_PROMPTS[name] if system is None or system in SYSTEM_PROMPTS.values() else system
    return *about(name), system, *EMPTY, NO_REFERENCE, *READY, name


def show_example(name: str, number: int) -> tuple:
    """The page after a visitor has chosen a held-out row."""
    prompt, *shown, reference = recorded(name, number)
    prompt, reference = gr.update(value=prompt, interactive=True), gr.update(value=reference, visible=bool(reference))
    return prompt, *shown, reference, *READY[:2]


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
    length = min(settings.max_new_tokens, DEFAULTS.max_new_tokens)
    fields = adapter, adapter, system, length, settings.temperature, settings.top_p, settings.seed
    if "prompt" not in query:
        return *fields, *[gr.skip()] * 14
    return *fields, query["prompt"][:LONGEST_PROMPT], *EMPTY, NO_REFERENCE, *about(adapter)


# What a link to a question has. The page's own address is known to the browser only.
COPY_LINK = """(prompt, adapter, system, max_new_tokens, temperature, top_p, seed) => {
    const values = {prompt, adapter, system, max_new_tokens, temperature, top_p, seed};
    const url = new URL(window.location.href);
    url.search = new URLSearchParams(values).toString();
    navigator.clipboard.writeText(url.toString());
}"""
# At once, before the question has left the browser: without the answers to an older question, with Stop instead of
# Compare, and with the answers in view, which on a phone are below the fold.
BEGIN = """(prompt, seed) => {
    const set = (properties) => ({...properties, __type__: 'update'});
    if (!(prompt || '').trim() || seed === null) return Array(8).fill(set({}));
    document.querySelector('#base').scrollIntoView({behavior: 'smooth', block: 'nearest'});
    const waiting = [{token: 'They appear when both answers have ended.', class_or_confidence: null}];
    return [
        set({interactive: false}), set({visible: true}), set({interactive: false}),
        ...['', '', '', ''].map((value) => set({value})), set({value: waiting}),
    ];
}"""
# At temperature 0 every seed gives the same answer.
NEXT_SEED = """(seed, temperature) => {
    setTimeout(() => document.querySelector('#run').click(), 100);
    return [(seed ?? 0) + 1, temperature || 0.7];
}"""


# What a visitor sees first: a held-out row, already answered.
SHOWN_FIRST = recorded(FIRST, 0) if RESULTS[FIRST].examples else ("", *EMPTY, "")


def page() -> gr.Blocks:
    with gr.Blocks(title="Before and after the fine-tune", analytics_enabled=False) as blocks:
        title = gr.Markdown(heading(FIRST), elem_id="title")
        prompt, adapter, run, stop = question_fields()
        examples = gr.Dataset(
            components=[gr.Number(visible=False)],
            samples=[[number] for number in range(len(RESULTS[FIRST].examples))],
            sample_labels=labels_of(FIRST),
            label="Held-out rows, before → after training",
            type="index",
            visible=bool(RESULTS[FIRST].examples),
        )
        *outputs, reference = answer_fields()
        *settings, again, share = settings_fields()
        _, _, temperature, _, seed = settings
        of_adapter = [title, examples, *training_fields()]
        buttons = [run, stop, prompt]

        # What happens in the browser or outside the queue is no part of the API. Outside, because Stop would wait
        # behind the answer that it shall stop.
        hidden = {"queue": False, "api_visibility": "private"}
        gr.on([run.click, prompt.submit], None, [prompt, seed], [*buttons, *outputs], js=BEGIN, **hidden)
        comparison = gr.on(
            [run.click, prompt.submit],
            compare,
            [prompt, adapter, *settings],
            outputs,
            api_name="compare",
            validator=validate,
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
        )
        # After an error or Stop the answers stay as they are.
        comparison.success(end, outputs[:2], [*buttons, *outputs[:2]], **hidden)
        comparison.failure(lambda: READY, None, buttons, **hidden)
        # Gradio's `cancels` works on an event of a component and not on a `then`: a change of this field stops.
        stop_signal = gr.Number(visible="hidden")
        stop_signal.change(None, cancels=[comparison], **hidden)
        stop_event = stop.click(stop_soon, None, stop_signal, **hidden)
        stop_event.then(stopped, outputs[2:], [*buttons, *outputs[2:]], **hidden)
        # `change` fires, too, when the page itself sets the adapter; `input` also when a visitor leaves the field, and
        # `select` not for the keyboard.
        shown_adapter = gr.State(FIRST)
        chosen = adapter.change(stop_soon, None, stop_signal, **hidden)
        changed = [*of_adapter, settings[0], *outputs, reference, *buttons, shown_adapter]
        chosen.then(show_adapter, [adapter, shown_adapter, settings[0]], changed, **hidden)
        shown = examples.click(stop_soon, None, stop_signal, **hidden)
        shown.then(show_example, [adapter, examples], [prompt, *outputs, reference, run, stop], **hidden)
        prompt.input(None, None, reference, js="() => ({visible: false, __type__: 'update'})", **hidden)
        again.click(None, [seed, temperature], [seed, temperature], js=NEXT_SEED, **hidden)
        share.click(None, [prompt, adapter, *settings], None, js=COPY_LINK, **hidden)
        arriving = [adapter, shown_adapter, *settings, prompt, *outputs, reference, *of_adapter]
        blocks.load(arrive, None, arriving, show_progress="hidden", **hidden)
    return blocks


# api_open: by default a page that is not on Hugging Face's hosts takes direct posts, which go past the queue and its
# limits. Gradio's clients use the queue.
demo = page().queue(max_size=QUEUE_SIZE, api_open=False)


if __name__ == "__main__":
    # Monochrome is the one theme of Gradio's whose colours have enough contrast. show_error would show visitors the
    # text of any exception, with paths of this machine; a gr.Error is shown anyway.
    theme = gr.themes.Monochrome(
        primary_hue="blue", spacing_size="sm", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    ).set(
        button_primary_background_fill="#1d4ed8",
        button_primary_background_fill_hover="#1e3a8a",
        button_primary_background_fill_dark="#1d4ed8",
        button_primary_background_fill_hover_dark="#1e3a8a",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1c1f26",
    )
    # Nobody uploads anything here, and what visitors ask is nobody else's: no monitoring, no history in the browser.
    demo.launch(
        theme=theme,
        css=CSS,
        show_error=False,
        ssr_mode=False,
        max_file_size=1,
        enable_monitoring=False,
        run_history=False,
    )
