"""The Space on ZeroGPU, all but the GPU: its own package with its emulation of CUDA and its forked workers.

`python space_zero_gpu.py APP_FOLDER REQUESTS` starts the page and puts the requests, JSON, to its API. It prints what
was answered, what was asked of the scheduler, which is ours, and what the page starts with.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Scheduler(BaseHTTPRequestHandler):
    """Has one GPU, and it is free."""

    asked = []

    def do_POST(self):
        url = urlsplit(self.path)
        self.asked.append([url.path, {name: value for name, [value] in parse_qs(url.query).items()}])
        granted = {"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": f"token{len(self.asked)}"}
        body = json.dumps(granted).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def start_zero_gpu():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scheduler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    os.environ |= {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": address}
    import torch

    # What a CPU build of torch does not have and the package takes from it.
    torch.version.cuda, torch._C._cuda_init, torch.cuda._is_in_bad_fork = "12.8", None, torch.cuda.is_initialized
    import spaces.zero.torch as zero
    from spaces.zero.torch.patching import cuda_aliases

    def move(callback=None):
        """To the GPU, which is the CPU here."""
        for fake, original in cuda_aliases.items():
            fake.data = original

    zero.pack, zero.init, zero.move = lambda: 0, lambda uuid: None, move


def main(folder, requests):
    start_zero_gpu()
    sys.path.insert(0, folder)
    import app
    from gradio_client import Client
    from startup import ENGINE, SYSTEM_PROMPTS

    page = {block.label: block.value for block in app.demo.blocks.values() if hasattr(block, "value")}
    found = {"page": page, "system_prompts": SYSTEM_PROMPTS, "device": str(ENGINE.shared.model.device)}
    _, url, _ = app.demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    client = Client(url, verbose=False)
    running = client.submit("Hello", "first", "", 4000, api_name="/compare")
    while not running.outputs():
        time.sleep(0.05)
    running.cancel()
    found["answers"] = [client.predict(*request, api_name="/compare")[:2] for request in json.loads(requests)]
    found["asked"] = list(Scheduler.asked)
    try:
        client.predict("x" * 5000, "first", api_name="/compare")
    except Exception as error:
        found["refused"] = str(error)
    found["asked_for_the_refused"] = Scheduler.asked[len(found["asked"]) :]
    print(json.dumps(found, default=str))
    sys.stdout.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)  # the servers go with it


if __name__ == "__main__":
    main(*sys.argv[1:])
