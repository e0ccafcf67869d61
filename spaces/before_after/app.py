"""A page that shows what a fine-tune changed: one prompt, the base model and the adapter side by side.

    BASE_MODEL=org/model ADAPTERS=org/adapter python app.py

BASE_MODEL is an id on the Hub or a folder; ADAPTERS, the allow-list, has ids, folders or name=id, with commas between.
Without them the `models` in README.md's front matter are taken: the base model, then the adapters. SYSTEM_PROMPT,
MAX_NEW_TOKENS, TEMPERATURE, TOP_P and SEED set what the page starts with.
"""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from engine import CannotAnswer, Engine, Settings, settings_of
from huggingface_hub import metadata_load
from results import Results


try:
    from spaces import GPU  # ZeroGPU's; without effect elsewhere
except ImportError:
    GPU = None

QUEUE = 20
LONGEST_PROMPT = 20_000  # characters
CSS = "footer {display: none !important}"


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
FIRST = next(iter(ADAPTERS))


def duration(prompt: str, adapter: str, system: str, max_new_tokens: float, *_: float) -> int:
    """Seconds of a GPU to ask for."""
    return 15 + int(max_new_tokens) // 8


def answer(prompt, adapter, system, max_new_tokens, temperature, top_p, seed) -> Iterator[tuple]:
    """Both answers as they grow: [base text, adapter text, base facts, adapter facts, differences]."""
    settings = settings_of(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    base = adapted = None
    for base, adapted in ENGINE.compare(prompt, adapter, settings, system):
        yield base.text, adapted.text, facts(base), facts(adapted), None
    yield base.text, adapted.text, facts(base), facts(adapted), differences(base.text, adapted.text)


if GPU is not None:
    answer = GPU(duration=duration)(answer)


def compare(
    prompt: str,
    adapter: str = FIRST,
    system: str = "",
    max_new_tokens: float = DEFAULTS.max_new_tokens,
    temperature: float = DEFAULTS.temperature,
    top_p: float = DEFAULTS.top_p,
    seed: float = DEFAULTS.seed,
) -> Iterator[tuple]:
    """The page's event and the API's `/compare`."""
    try:
        if len(prompt) + len(system) > LONGEST_PROMPT:
            raise CannotAnswer(f"The prompt is longer than {LONGEST_PROMPT:,} characters. Shorten it.")
        yield from answer(prompt, adapter, system, max_new_tokens, temperature, top_p, seed)
    except CannotAnswer as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None


def facts(side) -> str:
    speed = f", {side.tokens / side.seconds:.1f} tokens/s" if side.seconds else ""
    return f"{side.tokens} tokens{speed}" + (f" · {side.ended}" if side.ended else " …")


def differences(base: str, adapted: str) -> list[tuple[str, str | None]]:
    """Words of both answers, marked where only one has them."""
    left, right = re.findall(r"\s+|\w+|[^\w\s]", base), re.findall(r"\s+|\w+|[^\w\s]", adapted)
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(("".join(left[a:b]), None))
            continue
        parts += [
            (text, who) for text, who in (("".join(left[a:b]), "base"), ("".join(right[c:d]), "adapter")) if text
        ]
    return parts


def check(prompt: str, *others: Any) -> list[dict[str, Any]]:
    """What is wrong is said at its field, before the queue."""
    return [gr.validate(bool(prompt.strip()), "Type a prompt first."), *(gr.validate(True, "") for _ in others)]


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
            system = gr.Textbox(first.system_prompt or SYSTEM_PROMPT, label="System prompt", lines=2, max_lines=8)
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
        stop.click(None, cancels=[event], queue=False, api_visibility="private")
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

        def chosen(name: str):
            found = RESULTS[name]
            table = gr.Dataframe(found.scores, visible=bool(found.scores))
            system_prompt = found.system_prompt or SYSTEM_PROMPT
            return system_prompt, found.text, table, gr.LinePlot(found.losses, visible=not found.losses.empty)

        adapter.change(chosen, adapter, [system, about, scores, curve], api_visibility="private", queue=False)
        gr.DeepLinkButton("Share these settings")
    return blocks


demo = page().queue(max_size=QUEUE)


if __name__ == "__main__":
    theme = gr.themes.Monochrome(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    demo.launch(theme=theme, css=CSS, show_error=False, ssr_mode=False)
