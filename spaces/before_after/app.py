"""A page that shows what a fine-tune changed: one prompt, answered by the base model and by its adapter, side by side.

    BASE_MODEL=org/model ADAPTERS=org/adapter python app.py

BASE_MODEL is an id on the Hub or a folder. ADAPTERS lists the adapters that visitors may choose, as ids, folders or
name=id, separated by commas. Without these variables the page takes the `models` in README.md's front matter: first
the base model, then the adapters. SYSTEM_PROMPT, MAX_NEW_TOKENS, TEMPERATURE, TOP_P and SEED set what the page's
fields start with. DTYPE is the base model's: float32 (the default on a CPU), bfloat16, float16 or auto.
"""

# ZeroGPU's package replaces parts of torch and must come before anything that imports torch. Elsewhere it is absent,
# or its GPU decorator does nothing.
try:
    from spaces import GPU
except ImportError:
    GPU = None

import asyncio
import difflib
import os
import re
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
CSS = """
footer {display: none !important}
/* Gradio's code blocks scroll where the keyboard can't, and their colours are too pale. */
#card pre, #card code {white-space: pre-wrap; overflow-wrap: anywhere}
#card .token, #card a {color: inherit !important}
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
        if name in adapters:
            raise ValueError(f"Two adapters are called {name}. Name them: ADAPTERS=first=org/a,second=org/b.")
        adapters[name] = source
    return base, adapters


def configured_settings() -> Settings:
    """What the page's fields and the API start with.

    Raises:
        ValueError: if a variable is no number, or out of range.
    """
    defaults = {"max_new_tokens": 128, "temperature": 0, "top_p": 1, "seed": 0}
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
# One visitor at a time has the model, and one thread runs it.
MODEL_IS_BUSY = asyncio.Lock()
MODEL_THREAD = ThreadPoolExecutor(1, thread_name_prefix="model")


def duration(prompt: str, adapter: str, settings: Settings, system: str) -> int:
    """Seconds of a GPU to ask ZeroGPU for. It calls this with the arguments of `stream_answers`."""
    return 15 + settings.max_new_tokens // 8


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
    system: str = "",
    max_new_tokens: float = DEFAULTS.max_new_tokens,
    temperature: float = DEFAULTS.temperature,
    top_p: float = DEFAULTS.top_p,
    seed: float = DEFAULTS.seed,
) -> AsyncIterator[tuple]:
    """Both answers to a prompt as they grow: texts, lengths and speeds, and at the end their differences."""
    system = system or ""
    # What a visitor can change is checked before a GPU is asked for.
    try:
        if len(prompt) + len(system) > LONGEST_PROMPT:
            raise CannotAnswer(f"The prompt is longer than {LONGEST_PROMPT:,} characters. Shorten it.")
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
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, base_words, adapted_words).get_opcodes():
        if kind == "equal":
            parts.append(("".join(base_words[a:b]), None))
            continue
        changes = ("".join(base_words[a:b]), "base"), ("".join(adapted_words[c:d]), "adapter")
        parts += [(text, side) for text, side in changes if text]
    return parts or [("Both are empty.", None)]


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


def prompt_fields() -> tuple[gr.Textbox, gr.Dropdown]:
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, autofocus=True, scale=4, elem_id="prompt")
        adapter = gr.Dropdown(list(ADAPTERS), value=FIRST, label="Adapter", scale=1, min_width=300)
    return prompt, adapter


def settings_fields() -> list[gr.components.Component]:
    """System prompt, length, temperature, top-p and seed, as `compare` takes them."""
    with gr.Accordion("System prompt and sampling", open=False):
        system = gr.Textbox(SYSTEM_PROMPTS[FIRST], label="System prompt", lines=2, max_lines=8)
        with gr.Row():
            length = gr.Slider(1, 4096, DEFAULTS.max_new_tokens, step=1, label="Longest answer, in tokens")
            temperature = gr.Slider(0, 5, DEFAULTS.temperature, step=0.05, label="Temperature (0: likeliest token)")
            top_p = gr.Slider(0.05, 1, DEFAULTS.top_p, step=0.05, label="Top-p")
            seed = gr.Number(DEFAULTS.seed, label="Seed (the same luck for both)", precision=0, minimum=0)
    return [system, length, temperature, top_p, seed]


def answer_fields() -> list[gr.components.Component]:
    """Both texts, both lines of facts and the differences, as `compare` yields them."""
    with gr.Row():
        with gr.Column(min_width=320):
            base_text = gr.Textbox(label="Base model", lines=8, buttons=["copy"], elem_id="base")
            base_facts = gr.Markdown(label="Base model: length and speed")
        with gr.Column(min_width=320):
            adapted_text = gr.Textbox(label="With the adapter", lines=8, buttons=["copy"], elem_id="adapted")
            adapted_facts = gr.Markdown(label="Adapter: length and speed")
    changes = gr.HighlightedText(
        NO_DIFFERENCES_YET,
        label="Differences",
        color_map={"base": "yellow", "adapter": "blue"},
        show_legend=True,
        combine_adjacent=False,
    )
    return [base_text, adapted_text, base_facts, adapted_facts, changes]


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


def show_adapter(name: str, system: str):
    """What the page shows after a visitor has chosen another adapter.

    The answers of the old one are cleared. The system prompt becomes the new one's, unless the visitor has typed one.
    """
    results = RESULTS[name]
    system = SYSTEM_PROMPTS[name] if system in SYSTEM_PROMPTS.values() else system
    scores = gr.Dataframe(results.scores, visible=bool(results.scores))
    curve = gr.LinePlot(results.losses, visible=not results.losses.empty)
    card = gr.Accordion(visible=bool(results.card))
    return system, results.text, scores, curve, card, results.card, "", "", "", "", NO_DIFFERENCES_YET


def page() -> gr.Blocks:
    with gr.Blocks(title="Before and after the fine-tune", analytics_enabled=False) as blocks:
        gr.Markdown("# Before and after\n\nOne prompt, the base model and a LoRA adapter of it, side by side.")
        prompt, adapter = prompt_fields()
        with gr.Row():
            run = gr.Button("Compare", variant="primary")
            stop = gr.Button("Stop", variant="stop")
        settings = settings_fields()
        outputs = answer_fields()
        if RESULTS[FIRST].examples:
            rows = [[text] for text in RESULTS[FIRST].examples]
            gr.Examples(rows, inputs=[prompt], label="Examples: held-out rows")
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
        # Outside the queue, or Stop would wait behind the answer that it shall stop; and no part of the API.
        hidden = {"queue": False, "api_visibility": "private"}
        # Gradio's `cancels` works on an event of a component and not on a `then`: a change of this field stops.
        stop_signal = gr.Number(visible="hidden")
        stop_signal.change(None, cancels=[comparison], **hidden)
        stop.click(stop_soon, None, stop_signal, **hidden)
        training = training_fields()
        system = settings[0]
        shown = [system, *training, *outputs]
        adapter.change(stop_soon, None, stop_signal, **hidden).then(show_adapter, [adapter, system], shown, **hidden)
        gr.DeepLinkButton("Share the last comparison")
    return blocks


# api_open: by default a page that is not on Hugging Face's hosts takes direct posts, which go past the queue and its
# limits. Gradio's clients use the queue.
demo = page().queue(max_size=QUEUE_SIZE, api_open=False)


if __name__ == "__main__":
    # Monochrome is the one theme of Gradio's whose colours have enough contrast. show_error would show visitors the
    # text of any exception, with paths of this machine; a gr.Error is shown anyway.
    theme = gr.themes.Monochrome(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    demo.launch(theme=theme, css=CSS, show_error=False, ssr_mode=False)
