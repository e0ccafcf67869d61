"""A page that shows what a fine-tune changed: one prompt, the base model and the adapter side by side.

    BASE_MODEL=org/model ADAPTERS=org/adapter python app.py

BASE_MODEL is an id on the Hub or a folder; ADAPTERS, the allow-list, has ids, folders or name=id, with commas between.
Without them the `models` in README.md's front matter are taken: the base model, then the adapters. SYSTEM_PROMPT,
MAX_NEW_TOKENS, TEMPERATURE, TOP_P and SEED set what the page starts with.
"""

try:
    from spaces import GPU  # ZeroGPU's, before anything that imports torch; without effect elsewhere
except ImportError:
    GPU = None

import asyncio
import difflib
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from engine import CannotAnswer, Engine, Settings, settings_of
from huggingface_hub import metadata_load
from results import Results


QUEUE = 20
LONGEST_PROMPT = 20_000  # characters
UPDATE = 0.1  # seconds; with one for each token of a fast model, slow browsers fall behind, and so does their Stop
NOT_YET = [("They appear when both answers have ended.", None)]  # Gradio's own empty box is not accessible
CSS = """
footer {display: none !important}
/* Gradio's code blocks scroll where the keyboard can't, and their colours are too pale. */
#card pre, #card code {white-space: pre-wrap; overflow-wrap: anywhere}
#card .token, #card a {color: inherit !important}
"""


def configured() -> tuple[str, dict[str, str]]:
    """The base model and the adapters by name.

    Raises:
        ValueError: neither the variables nor the front matter say them, or two adapters have one name.
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
        if name in adapters:
            raise ValueError(f"Two adapters are called {name}. Name them: ADAPTERS=first=org/a,second=org/b.")
        adapters[name] = source
    return base, adapters


def configured_settings() -> Settings:
    """What the page and the API start with.

    Raises:
        ValueError: a variable is no number, or out of range.
    """
    defaults = {"max_new_tokens": 128, "temperature": 0, "top_p": 1, "seed": 0}
    return settings_of(**{name: os.environ.get(name.upper()) or value for name, value in defaults.items()})


BASE, ADAPTERS = configured()
DEFAULTS, SYSTEM_PROMPT = configured_settings(), os.environ.get("SYSTEM_PROMPT", "")
ENGINE = Engine(BASE, ADAPTERS)
RESULTS = {name: Results(source) for name, source in ADAPTERS.items()}
SYSTEM_PROMPTS = {name: SYSTEM_PROMPT or results.system_prompt for name, results in RESULTS.items()}
FIRST = next(iter(ADAPTERS))


def duration(prompt: str, adapter: str, settings: Settings, system: str) -> int:
    """Seconds of a GPU to ask for."""
    return 15 + settings.max_new_tokens // 8


def answer(prompt: str, adapter: str, settings: Settings, system: str) -> Iterator[tuple]:
    """Both answers as they grow: [base text, adapter text, base facts, adapter facts]."""
    for base, adapted in ENGINE.compare(prompt, adapter, settings, system):
        yield base.text, adapted.text, facts(base), facts(adapted)


if GPU is not None:
    answer = GPU(duration=duration)(answer)


async def compare(
    prompt: str,
    adapter: str = FIRST,
    system: str = "",
    max_new_tokens: float = DEFAULTS.max_new_tokens,
    temperature: float = DEFAULTS.temperature,
    top_p: float = DEFAULTS.top_p,
    seed: float = DEFAULTS.seed,
) -> AsyncIterator[tuple]:
    """Both answers to a prompt as they grow: texts, lengths and speeds, and at the end their differences."""
    system = system or ""
    try:  # what a visitor can change is said before a GPU is asked for
        if len(prompt) + len(system) > LONGEST_PROMPT:
            raise CannotAnswer(f"The prompt is longer than {LONGEST_PROMPT:,} characters. Shorten it.")
        settings = settings_of(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        await asyncio.to_thread(ENGINE.prompt, prompt, adapter, system)
    except CannotAnswer as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None
    # Asynchronous, so that whoever cancels need not wait for a token: Gradio's /cancel fails if asked again meanwhile.
    stream, shown = answer(prompt, adapter, settings, system), float("-inf")
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, stream, None))
            if (latest := await asyncio.shield(step)) is None:
                break
            outputs = latest
            if time.monotonic() - shown >= UPDATE:
                yield *outputs, NOT_YET
                shown = time.monotonic()
        yield *outputs, differences(*outputs[:2])
    finally:
        step.add_done_callback(lambda _: stream.close())


def facts(side) -> str:
    speed = f", {side.tokens / side.seconds:.1f} tokens/s" if side.seconds else ""
    return f"{side.tokens} tokens{speed}" + (f" · {side.ended}" if side.ended else " …")


def differences(base: str, adapted: str) -> list[tuple[str, str | None]]:
    """Words of both answers, marked where only one has them."""
    left, right = (re.findall(r"\w+\s*|[^\w\s]\s*|\s+", text) for text in (base, adapted))
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right).get_opcodes():
        if kind == "equal":
            parts.append(("".join(left[a:b]), None))
            continue
        parts += [
            (text, who) for text, who in (("".join(left[a:b]), "base"), ("".join(right[c:d]), "adapter")) if text
        ]
    return parts or [("Both are empty.", None)]


def check(prompt: str | None, *others: Any) -> list[dict[str, Any]]:
    """What is wrong is said at its field, before the queue."""
    fine = [gr.validate(True, "") for _ in others[:-1]]
    seed = gr.validate(others[-1] is not None, "Type a whole number.")
    return [gr.validate(bool((prompt or "").strip()), "Type a prompt first."), *fine, seed]


async def now() -> float:
    """A moment later, when a question that was sent before this has arrived; Gradio can't cancel what hasn't."""
    await asyncio.sleep(0.2)
    return time.monotonic()


def page() -> gr.Blocks:
    first = RESULTS[FIRST]
    with gr.Blocks(title="Before and after the fine-tune", analytics_enabled=False) as blocks:
        gr.Markdown("# Before and after\n\nOne prompt, the base model and a LoRA adapter of it, side by side.")
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, autofocus=True, scale=4, elem_id="prompt")
            adapter = gr.Dropdown(list(ADAPTERS), value=FIRST, label="Adapter", scale=1, min_width=300)
        with gr.Row():
            run = gr.Button("Compare", variant="primary")
            stop = gr.Button("Stop", variant="stop")
        with gr.Accordion("System prompt and sampling", open=False):
            system = gr.Textbox(SYSTEM_PROMPTS[FIRST], label="System prompt", lines=2, max_lines=8)
            with gr.Row():
                length = gr.Slider(1, 4096, DEFAULTS.max_new_tokens, step=1, label="Longest answer, in tokens")
                temperature = gr.Slider(
                    0, 5, DEFAULTS.temperature, step=0.05, label="Temperature (0: likeliest token)"
                )
                top_p = gr.Slider(0.05, 1, DEFAULTS.top_p, step=0.05, label="Top-p")
                seed = gr.Number(DEFAULTS.seed, label="Seed (the same luck for both)", precision=0, minimum=0)
        with gr.Row():
            with gr.Column(min_width=320):
                base_text = gr.Textbox(label="Base model", lines=8, buttons=["copy"], elem_id="base")
                base_facts = gr.Markdown(label="Base model: length and speed")
            with gr.Column(min_width=320):
                adapted_text = gr.Textbox(label="With the adapter", lines=8, buttons=["copy"], elem_id="adapted")
                adapted_facts = gr.Markdown(label="Adapter: length and speed")
        changes = gr.HighlightedText(
            NOT_YET,
            label="Differences",
            color_map={"base": "yellow", "adapter": "blue"},
            show_legend=True,
            combine_adjacent=False,
        )
        inputs = [prompt, adapter, system, length, temperature, top_p, seed]
        outputs = [base_text, adapted_text, base_facts, adapted_facts, changes]
        if first.examples:
            gr.Examples([[text] for text in first.examples], inputs=[prompt], label="Examples: held-out rows")
        event = gr.on(
            [run.click, prompt.submit],
            compare,
            inputs,
            outputs,
            api_name="compare",
            validator=check,
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
        )
        hidden = {"queue": False, "api_visibility": "private"}
        stopped = gr.Number(visible="hidden")  # Gradio cancels on a component's event, not in a `then`
        stopped.change(None, cancels=[event], **hidden)
        stop.click(now, None, stopped, **hidden)
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

        def chosen(name: str, its_system: str):
            """Another adapter's run and card. The old one's answers go, a system prompt of the visitor's stays."""
            found = RESULTS[name]
            its_system = SYSTEM_PROMPTS[name] if its_system in SYSTEM_PROMPTS.values() else its_system
            table = gr.Dataframe(found.scores, visible=bool(found.scores))
            plot = gr.LinePlot(found.losses, visible=not found.losses.empty)
            its_card = gr.Accordion(visible=bool(found.card))
            return its_system, found.text, table, plot, its_card, found.card, "", "", "", "", NOT_YET

        shown = [system, about, scores, curve, card, card_text, *outputs]
        adapter.change(now, None, stopped, **hidden).then(chosen, [adapter, system], shown, **hidden)
        gr.DeepLinkButton("Share the last comparison")
    return blocks


demo = page().queue(max_size=QUEUE)


if __name__ == "__main__":
    theme = gr.themes.Monochrome(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    demo.launch(theme=theme, css=CSS, show_error=False, ssr_mode=False)
