"""The API endpoint `/compare`: a visitor's question waits for the model, and both answers stream back."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio as gr
from chat import CannotAnswer
from decoding import Settings, settings_of
from differences import NO_DIFFERENCES_YET, describe, differences
from gradio.context import LocalContext
from startup import DEFAULTS, ENGINE, FIRST, START_LENGTH, SYSTEM_PROMPTS
from zero_gpu import on_gpu


LONGEST_PROMPT = 20_000  # characters
# Sending each token of a fast model would leave slow browsers behind, and their Stop button with them.
SECONDS_BETWEEN_UPDATES = 0.1
MOST_UNREAD = 50  # updates that wait for a visitor to take them: at least 5 seconds of an answer
# One visitor at a time has the model, and one thread runs it.
MODEL_IS_BUSY = asyncio.Lock()
MODEL_THREAD = ThreadPoolExecutor(1, thread_name_prefix="model")


@on_gpu
def stream_answers(prompt: str, adapter: str, settings: Settings, system: str) -> Iterator[tuple]:
    """Both answers as they grow: (base text, adapter text, base facts, adapter facts)."""
    for base, adapted in ENGINE.compare(prompt, adapter, settings, system):
        yield base.text, adapted.text, describe(base), describe(adapted)


async def compare(
    prompt: str,
    adapter: str = FIRST,
    system: str | None = None,
    max_new_tokens: float = START_LENGTH,
    temperature: float = DEFAULTS.temperature,
    top_p: float = DEFAULTS.top_p,
    seed: float = DEFAULTS.seed,
    request: gr.Request | None = None,
) -> AsyncIterator[tuple]:
    """Both answers to a prompt as they grow: texts, lengths and speeds, and at the end their differences.

    Without `system` the adapter gets the system prompt of its training; "" is none.
    """
    session = request.session_hash if request else None
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
                    if unread_updates(session) > MOST_UNREAD:
                        raise gr.Error("Stopped, as nobody reads this answer.", print_exception=False)
                    yield *outputs, NO_DIFFERENCES_YET
                    last_update = time.monotonic()
            yield *outputs, differences(*outputs[:2])
        finally:
            # After the step that may still be running; a generator cannot be closed while it runs.
            await asyncio.shield(in_model_thread(stream.close))


def in_model_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future:
    """Calls `function` in the one thread that runs the model, after what was asked of it before."""
    return asyncio.get_running_loop().run_in_executor(MODEL_THREAD, function, *arguments)


def unread_updates(session: str | None) -> int:
    """How many updates wait for a visitor to take them.

    Gradio stops an answer when its visitor leaves. One whose visitor asks and never begins to listen would go on to
    its end, and others would wait for it.
    """
    blocks = LocalContext.blocks.get()
    updates = blocks._queue.pending_messages_per_session.get(session) if blocks else None
    return updates.qsize() if updates else 0


def validate(prompt: str | None, *others: Any) -> list[dict[str, Any]]:
    """Messages at the fields that a visitor must change, before the question joins the queue."""
    no_messages = [gr.validate(True, "") for _ in others[:-1]]
    seed = gr.validate(others[-1] is not None, "Type a whole number.")
    return [gr.validate(bool((prompt or "").strip()), "Type a prompt first."), *no_messages, seed]
