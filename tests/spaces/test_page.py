"""The Space's page in a real browser, and its API: what visitors see, under load and abuse, too."""

import contextlib
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from space_server import ANSWERS, EXAMPLES, Space


gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.slow
PROMPTS = ["Hello", "2 + 2 =", "a longer prompt"]
STRANGE = ["\x00\x01\x1b[2J", "<script>alert(1)</script>", "{{7*7}} ${x}", "\u202egnp.exe", "🪞" * 50]
NOT_SERVED = ["file=/etc/passwd", "gradio_api/file=/etc/passwd", "gradio_api/file=../app.py", "file=app.py"]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    with Space(tmp_path_factory.mktemp("space")) as running:
        yield running


@pytest.fixture(scope="module")
def client(space):
    return gradio_client.Client(space.url, verbose=False)


def resident_mb(space) -> float:
    status = Path(f"/proc/{space.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1000


def test_the_api_has_one_endpoint(client):
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {"/compare"}


def test_the_api_answers_and_streams(client):
    job = client.submit("Hello", "first", "", 400, 0, 1, 0, api_name="/compare")
    base, adapted, base_facts, adapted_facts, changes = job.result(60)
    assert base != adapted
    assert 5 <= len(job.outputs()) < 200  # an update is not sent for each token
    assert base_facts.startswith("400 tokens")
    assert "length" in adapted_facts
    assert changes
    assert client.predict("Hello", system="", max_new_tokens=400, api_name="/compare")[:2] == (base, adapted)


def test_the_snippet_of_the_card_runs(space):
    page = Path(__file__).parents[2] / "spaces" / "before_after" / "README.md"
    [snippet] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    exec(snippet.replace("owner/space", space.url), names := {})
    assert names["base"] != names["adapted"]


def test_every_answer_under_load_is_the_one_alone(space, client):
    """8 clients × 12 requests, two adapters, mixed lengths."""
    requests = [
        (
            ["Hello", "2 + 2 =", "a longer prompt"][i % 3],
            ["first", "second"][i % 2],
            "",
            3 + i % 5,
            0.5 * (i % 3),
            1,
            i,
        )
        for i in range(96)
    ]

    def ask(request, who=client):
        for attempt in range(20):
            try:
                return who.predict(*request, api_name="/compare")[:2]
            except Exception as error:  # the queue holds 20
                if "queue" not in str(error).lower() or attempt == 19:
                    raise
                time.sleep(0.5)

    alone = [ask(request) for request in requests]
    before = resident_mb(space)
    clients = [gradio_client.Client(space.url, verbose=False) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        shares = list(pool.map(lambda k: [ask(r, clients[k]) for r in requests[k::8]], range(8)))
    assert [shares[i % 8][i // 8] for i in range(96)] == alone
    assert resident_mb(space) < before + 60


def test_visitors_are_served_in_the_order_they_came(space):
    clients, order = [gradio_client.Client(space.url, verbose=False) for _ in range(5)], []
    jobs = []
    for i, who in enumerate(clients):
        length = 400 if i == 0 else 100
        job = who.submit("Hello", "first", "", length, api_name="/compare")
        job.add_done_callback(lambda _, i=i: order.append(i))
        jobs.append(job)
        time.sleep(0.4)
    for job in jobs:
        job.result(60)
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("x" * 30_000, "first"), "longer than 20,000 characters"),
        (("x" * 5000, "first"), "tokens long; the model takes 4095"),
        (("Hello", "../../etc/passwd"), "not in the list of choices"),
        (("Hello", "first", "", 10**6), "greater than maximum value"),
        (("Hello", "first", "", 5, -3), "less than minimum value"),
        (("  ", "first"), "Type a prompt first"),
    ],
)
def test_abuse_is_refused_with_a_message(client, request_, message):
    with pytest.raises(Exception) as refused:
        client.predict(*request_, api_name="/compare")
    assert message in str(refused.value) + getattr(getattr(refused.value, "response", None), "text", "")
    assert client.predict("Hello", "first", "", 3, api_name="/compare")[0]


@pytest.mark.parametrize("text", STRANGE)
def test_strange_prompts_are_prompts(client, text):
    base, *_ = client.predict(text, "first", "", 3, api_name="/compare")
    assert isinstance(base, str)


@pytest.mark.parametrize("path", NOT_SERVED)
def test_files_are_not_served(space, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(space.url + path, timeout=10)
    assert refused.value.code in (403, 404)


def post(space, path: str, **body) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{space.url}gradio_api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def join(space, client, session: str, tokens: int) -> tuple[dict, tuple[int, str]]:
    """The event, as a browser of its own sends it, and what the server says."""
    function = next(d["id"] for d in client.config["dependencies"] if d["api_name"] == "compare")
    event = {"fn_index": function, "session_hash": session}
    return event, post(space, "queue/join", data=["Hello", "first", "", tokens, 0, 1, 0], **event)


def test_an_answer_may_be_cancelled_twice(space, client):
    """As by somebody who clicks Stop again while nothing has happened yet."""

    def cancel(event, after):
        time.sleep(after)
        return post(space, "cancel", **event)[0]

    for i in range(5):
        event, (_, said) = join(space, client, f"twice{i}", 4000)
        event["event_id"] = json.loads(said)["event_id"]
        time.sleep(0.5)
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(cancel, [event, event], [0, 0.01])) == [200, 200]
        begin = time.monotonic()
        assert client.predict("Hello", "first", "", 3, api_name="/compare")[0]
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize("posts", [8, 16, 32])
def test_direct_posts_and_clients_that_vanish_hang_nothing(space, client, posts):
    """Six such posts beside one answer on the page used to hang the server for good."""
    body = {"data": ["Hello", "first", "", 4000, 0, 1, 0]}
    event, (_, said) = join(space, client, f"posts{posts}", 4000)

    def vanish(i):
        request = urllib.request.Request(
            f"{space.url}gradio_api/run/compare", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=0.5 + i % 3).read()

    with ThreadPoolExecutor(posts) as pool:
        list(pool.map(vanish, range(posts)))
    assert post(space, "run/compare", **body)[0] == 404  # they would go past the queue
    assert post(space, "cancel", **event, event_id=json.loads(said)["event_id"])[0] == 200
    begin = time.monotonic()
    assert client.predict("Hello", "first", "", 3, api_name="/compare")[0]
    assert time.monotonic() - begin < 10


def test_an_answer_that_nobody_reads_is_stopped(space, client):
    """Gradio notices a visitor who leaves, but not one who never begins to listen."""
    join(space, client, "silent", 4000)
    assert client.predict("Hello", "first", "", 3, api_name="/compare")[0]  # after the silent one's
    with urllib.request.urlopen(f"{space.url}gradio_api/queue/data?session_hash=silent", timeout=60) as messages:
        text = messages.read().decode()
    assert "Stopped, as nobody reads this answer." in text
    assert "4000 tokens" not in text


def test_visitors_that_leave_the_queue_without_a_word_hang_nothing(space, client):
    """Their answers are stopped, or go by."""
    for _ in range(8):
        visitor = gradio_client.Client(space.url, verbose=False)
        visitor.submit("Hello", "first", "", 200, api_name="/compare")
        del visitor
    begin = time.monotonic()
    assert client.predict("Hello", "first", "", 3, api_name="/compare")[0]
    assert time.monotonic() - begin < 60


def test_a_flood_is_refused_and_the_server_lives(space, client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: join(space, client, f"flood{i}", 100)[1], range(40)))
    refused = [text for status, text in answers if status == 503]
    assert 10 <= len(refused) < 40
    assert all("Queue is full" in text for text in refused)
    for _ in range(100):  # nobody listens to the flood's answers: they go by
        with contextlib.suppress(Exception):
            assert client.predict("Hello", "first", "", 3, api_name="/compare")[0]
            break
        time.sleep(1)
    else:
        pytest.fail("the server did not come back")


browser_test = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, as `apt-get install chromium` puts it")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def visit(page, space):
    """The prompt is there before Gradio has all of the page and takes its "Loading..." away."""
    page.goto(space.url)
    page.locator("#prompt textarea").wait_for()
    page.wait_for_function("!document.querySelector('.loading')")


@pytest.fixture
def page(browser, space, request):
    """A fresh page; afterwards: no console errors, no requests to others."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 900}}))
    page, errors, outside = context.new_page(), [], []

    def ours(message):  # 422 is how Gradio says that the validator has found something
        found = "422" in message.text and "/queue/join" in message.location["url"]
        return message.type == "error" and not found

    page.on("console", lambda message: errors.append(message.text) if ours(message) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request", lambda r: outside.append(r.url) if not r.url.startswith((space.url, "data:", "blob:")) else None
    )
    visit(page, space)
    yield page
    context.close()
    assert errors == []
    assert outside == []


def text_of(page, side):
    return page.locator(f"#{side} textarea").input_value()


def compare(page, prompt="Hello", tokens=None):
    if tokens is not None:
        page.get_by_role("button", name="System prompt and sampling").click()
        page.get_by_label("number input for Longest answer, in tokens").fill(str(tokens))
    page.locator("#prompt textarea").fill(prompt)
    page.get_by_role("button", name="Compare").click()


def wait_for_end(page):
    page.get_by_text(re.compile(r"tokens/s.* · ")).nth(1).wait_for(timeout=60_000)


@browser_test
def test_compare_in_the_browser(page):
    compare(page, tokens=12)
    wait_for_end(page)
    base, adapted = text_of(page, "base"), text_of(page, "adapted")
    assert base
    assert base != adapted
    assert page.get_by_text("12 tokens").count() == 2


@browser_test
def test_both_sides_stream_and_stop_at_once(page):
    compare(page, tokens=4000)
    page.wait_for_function("document.querySelector('#adapted textarea').value.length > 0", timeout=60_000)
    lengths = [len(text_of(page, name)) for name in ("base", "adapted")]
    assert min(lengths) > 0
    page.get_by_role("button", name="Stop").click()
    time.sleep(1)
    stopped = text_of(page, "base")
    time.sleep(1)
    assert text_of(page, "base") == stopped
    assert page.get_by_text("4000 tokens").count() == 0


@browser_test
def test_a_closed_tab_frees_the_model(browser, space, client):
    page = browser.new_page()
    visit(page, space)
    compare(page, tokens=4000)
    page.wait_for_function("document.querySelector('#adapted textarea').value.length > 0", timeout=60_000)
    page.close()
    begin = time.monotonic()
    client.predict("Hello", "first", "", 2, api_name="/compare")
    assert time.monotonic() - begin < 10


@browser_test
def test_a_waiting_visitor_sees_the_place_in_the_queue_and_may_leave_it(page, client):
    running = client.submit("Hello", "first", "", 4000, api_name="/compare")
    compare(page, tokens=3)
    page.get_by_text("queue: 1/1").first.wait_for(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("queue: 1/1").first.wait_for(state="detached", timeout=60_000)
    running.cancel()
    assert client.predict("Hello", "first", "", 3, api_name="/compare")[0]
    page.wait_for_timeout(500)
    assert text_of(page, "base") == ""


@browser_test
def test_an_error_is_shown_at_its_place(page):
    page.locator("#prompt textarea").fill("")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Type a prompt first.").first.wait_for()
    compare(page, "x" * 5000)
    page.get_by_text("tokens long; the model takes 4095").wait_for(timeout=60_000)


@browser_test
def test_switching_the_adapter_shows_its_run(page):
    compare(page, tokens=6)
    wait_for_end(page)
    page.get_by_role("button", name="The adapter's training run").click()
    page.get_by_text("Trained with RefLoRA.").wait_for()
    assert page.get_by_text("0.5").count() >= 1
    page.get_by_role("button", name="The adapter's card").click()
    page.get_by_text("What it was made for.").wait_for()
    assert page.get_by_text("license: mit").count() == page.locator("img[alt='Training loss']").count() == 0
    page.get_by_label("Adapter", exact=True).first.click()
    page.get_by_role("option", name="second").click()
    page.get_by_text("It has no run record.").wait_for()
    assert text_of(page, "base") == text_of(page, "adapted") == ""
    page.get_by_role("button", name="The adapter's card").wait_for(state="hidden")
    page.get_by_role("button", name="Compare").click()
    wait_for_end(page)
    assert page.get_by_label("System prompt").input_value() == ""
    page.get_by_label("System prompt").fill("My own.")
    page.get_by_label("Adapter", exact=True).first.click()
    page.get_by_role("option", name="first").click()
    page.get_by_text("Trained with RefLoRA.").wait_for()
    assert page.get_by_label("System prompt").input_value() == "My own."


@browser_test
def test_switching_the_adapter_stops_the_answer(page):
    compare(page, tokens=4000)
    page.wait_for_function("document.querySelector('#adapted textarea').value.length > 0", timeout=60_000)
    page.get_by_label("Adapter", exact=True).first.click()
    page.get_by_role("option", name="second").click()
    page.wait_for_function("document.querySelector('#adapted textarea').value.length == 0", timeout=60_000)
    time.sleep(1)
    assert text_of(page, "adapted") == ""


@browser_test
def test_stop_before_the_server_has_the_question(page):
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    slow = {"offline": False, "latency": 300, "downloadThroughput": 2**20, "uploadThroughput": 2**20}
    network.send("Network.emulateNetworkConditions", slow)
    compare(page, tokens=4000)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(2500)
    stopped = text_of(page, "base")
    page.wait_for_timeout(1500)
    assert text_of(page, "base") == stopped
    assert page.get_by_text("4000 tokens").count() == 0


@browser_test
def test_only_another_adapter_clears_the_answers(page):
    """Leaving the picker does not; with the keyboard, too."""
    compare(page, tokens=6)
    wait_for_end(page)
    picker = page.get_by_label("Adapter", exact=True).first
    picker.focus()
    page.keyboard.press("Tab")
    page.wait_for_timeout(500)
    assert text_of(page, "adapted")
    page.get_by_role("button", name="The adapter's training run").click()
    picker.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.get_by_text("It has no run record.").wait_for()
    assert picker.input_value() == "second"
    assert text_of(page, "adapted") == ""


@browser_test
def test_a_missing_seed_is_named_at_its_field(page):
    compare(page, tokens=6)
    wait_for_end(page)
    page.get_by_label("Seed (the same luck for both)").fill("")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Type a whole number.").first.wait_for()


@browser_test
def test_a_visitor_sees_a_finished_comparison_at_once(page):
    """The first held-out row as the training run answered it, with its reference and what changed."""
    assert page.locator("#prompt textarea").input_value() == EXAMPLES[0]
    assert text_of(page, "base") == ANSWERS[0]["before"]
    assert json.loads(text_of(page, "adapted")) == json.loads(ANSWERS[0]["after"])
    assert "\n" in text_of(page, "adapted")  # JSON on several lines
    reference = page.locator("#reference textarea")
    assert json.loads(reference.input_value()) == json.loads(ANSWERS[0]["reference"])
    page.get_by_text("The answers have next to nothing in common.").wait_for()
    page.get_by_text("exact 0.00 → 0.50 on 4 held-out rows").wait_for()
    page.get_by_text("Trained with RefLoRA to follow the system prompt “Be brief.”").wait_for()
    page.get_by_role("button", name="✗ → ✓").wait_for()
    page.get_by_role("button", name="✗ → ✗").click()
    page.wait_for_function("document.querySelector('#adapted textarea').value == 'Hello, friend'")
    assert page.locator("#prompt textarea").input_value() == EXAMPLES[1]
    assert reference.input_value() == "Goodbye"
    prompt = page.locator("#prompt textarea")
    prompt.press_sequentially(", else")
    reference.wait_for(state="hidden")
    for text, state in ((EXAMPLES[1], "visible"), ("pasted", "hidden"), (EXAMPLES[1], "visible"), ("", "hidden")):
        prompt.fill(text)
        reference.wait_for(state=state)


@browser_test
def test_while_the_models_answer_stop_takes_the_place_of_compare(page):
    stop, run = page.get_by_role("button", name="Stop"), page.get_by_role("button", name="Compare")
    assert stop.count() == 0
    compare(page, tokens=4000)
    stop.wait_for()
    assert run.is_disabled()
    assert text_of(page, "base") != ANSWERS[0]["before"]  # gone at once
    assert page.locator("#prompt textarea").is_disabled()  # a second question would be lost
    page.wait_for_function("document.querySelector('#adapted textarea').value.length > 0", timeout=60_000)
    stop.click()
    stop.wait_for(state="hidden")
    page.get_by_text("Stopped before both answers had ended.").wait_for()
    assert run.is_enabled()
    assert page.get_by_text("tokens/s …").count() == 0
    compare(page, "x" * 5000)
    page.get_by_text("tokens long; the model takes 4095").wait_for(timeout=60_000)
    page.wait_for_function("!document.querySelector('#run').disabled")
    assert text_of(page, "base") == ""


@browser_test
def test_a_link_brings_the_question_along(page, space):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#prompt textarea").fill("Is this & that = 1?")
    page.get_by_role("button", name="System prompt and sampling").click()
    page.get_by_label("Seed (the same luck for both)").fill("7")
    page.get_by_role("button", name="Copy a link to this question").click()
    page.wait_for_timeout(500)
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(space.url)
    page.goto(link.replace("adapter=first", "adapter=second"))
    page.wait_for_function("document.querySelector('#prompt textarea')?.value == 'Is this & that = 1?'")
    page.get_by_text("With the adapter second").wait_for()
    assert text_of(page, "base") == ""
    page.get_by_role("button", name="System prompt and sampling").click()
    assert page.get_by_label("Seed (the same luck for both)").input_value() == "7"
    page.get_by_role("button", name="Again with the next seed").click()
    wait_for_end(page)
    assert page.get_by_label("Seed (the same luck for both)").input_value() == "8"


def test_an_adapter_gets_its_own_system_prompt_over_the_api(client):
    """The first adapter's is "Be brief."; the second has none."""

    def ask(adapter, **system):
        return client.predict("Hello", adapter, max_new_tokens=8, **system, api_name="/compare")[:2]

    assert ask("first") == ask("first", system="Be brief.") != ask("first", system="")
    assert ask("second") == ask("second", system="") != ask("second", system="Be brief.")


def test_nothing_is_kept_of_visitors(space):
    """No uploads, no monitoring, no history of runs."""
    for content in (b"", b"hello"):
        head = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.txt\r\n\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        body = head + content + b"\r\n--x--\r\n"
        request = urllib.request.Request(f"{space.url}gradio_api/upload", body, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 404
    for path in ("monitoring", "monitoring/summary"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{space.url}gradio_api/{path}", timeout=10)
        assert refused.value.code in (403, 404)
    assert json.load(urllib.request.urlopen(f"{space.url}config", timeout=10))["run_history"] is False


@browser_test
def test_html_in_a_prompt_stays_text(page):
    compare(page, "<img src=x onerror=\"document.title='hacked'\"> **bold**", tokens=6)
    wait_for_end(page)
    assert page.title() == "Before and after the fine-tune"


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DARK = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"}


@browser_test
@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_a_phone_stacks_the_answers(page):
    compare(page, tokens=6)
    wait_for_end(page)
    boxes = [page.locator(f"#{side} textarea").bounding_box() for side in ("base", "adapted")]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@browser_test
@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_on_a_phone_both_answers_come_into_view(page):
    def bottom(side):
        return page.locator(f"#{side}").evaluate("element => element.getBoundingClientRect().bottom")

    page.evaluate("window.scrollTo(0, 0)")
    assert bottom("adapted") > PHONE["viewport"]["height"]  # below the fold
    compare(page, tokens=400)
    page.wait_for_function("document.querySelector('#adapted').getBoundingClientRect().bottom < innerHeight")
    page.wait_for_function("document.querySelector('#base-side').getBoundingClientRect().top >= 0")
    wait_for_end(page)
    assert bottom("adapted") <= PHONE["viewport"]["height"]


@browser_test
@pytest.mark.parametrize("page", [{}, DARK, PHONE], indirect=True, ids=["light", "dark", "phone"])
def test_axe_finds_nothing(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    assert axe.Axe().run(page).response["violations"] == []
    compare(page, tokens=6)
    wait_for_end(page)
    page.get_by_role("button", name="The adapter's training run").click()
    page.get_by_role("button", name="The adapter's card").click()
    page.wait_for_timeout(500)
    found = axe.Axe().run(page).response["violations"]
    assert [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found] == []


@browser_test
def test_it_is_used_by_keyboard_alone(page):
    page.locator("#prompt textarea").focus()
    page.locator("#prompt textarea").fill("")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("again")
    assert page.locator("#prompt textarea").input_value() == "Hello\nagain"
    page.keyboard.press("Enter")
    page.get_by_text("tokens/s").nth(1).wait_for(timeout=60_000)


def test_no_traceback_is_in_the_log(space):
    """Of the server."""
    assert "Traceback" not in space.output()
