"""A page that shows what a fine-tune changed: one prompt, answered by the base model and by its adapter, side by side.

    BASE_MODEL=org/model ADAPTERS=org/adapter python app.py

BASE_MODEL is an id on the Hub or a folder. ADAPTERS lists the adapters that visitors may choose, as ids, folders or
name=id, separated by commas. Without these variables the page takes the `models` in README.md's front matter: first
the base model, then the adapters. SYSTEM_PROMPT, TEMPERATURE, TOP_P and SEED set what the page's fields start with,
MAX_NEW_TOKENS the longest answer that visitors may ask for, and DTYPE the base model's: float32 (the default on a
CPU), bfloat16, float16 or auto.
"""

import zero_gpu  # noqa: F401, I001  (before the others, which import torch)

import gradio as gr

from events import connect
from layout import CSS, lay_out
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse


QUEUE_SIZE = 20  # visitors who may wait
# Monochrome is the one theme of Gradio's whose colours have enough contrast.
THEME = gr.themes.Monochrome(
    primary_hue="blue", spacing_size="sm", font=["system-ui", "sans-serif"], font_mono=["monospace"]
).set(
    button_primary_background_fill="#1d4ed8",
    button_primary_background_fill_hover="#1e3a8a",
    button_primary_background_fill_dark="#1d4ed8",
    button_primary_background_fill_hover_dark="#1e3a8a",
    input_background_fill="#ffffff",
    input_background_fill_dark="#1c1f26",
)


class WithoutUploads:
    """The server without the address at which Gradio keeps any file that anybody sends, however many."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        is_upload = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")
        await (PlainTextResponse("Not Found", 404) if is_upload else self.app)(scope, receive, send)


with gr.Blocks(title="Before and after the fine-tune", analytics_enabled=False) as demo:
    connect(demo, lay_out())
# api_open: by default a page that is not on Hugging Face's hosts takes direct posts, which go past the queue and its
# limits. Gradio's clients use the queue.
demo.queue(max_size=QUEUE_SIZE, api_open=False)


if __name__ == "__main__":
    # show_error would show visitors the text of any exception, with paths of this machine; a gr.Error is shown anyway.
    # What visitors ask is nobody else's: no monitoring, no history in the browser.
    demo.launch(
        theme=THEME,
        css=CSS,
        show_error=False,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(WithoutUploads)]},
        enable_monitoring=False,
        run_history=False,
    )
