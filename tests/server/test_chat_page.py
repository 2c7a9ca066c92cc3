"""The chat page, in a real browser."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chromium import Page, find_chromium, new_page
from running_server import WEATHER_TOOL, Running, new_service, running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium or Chrome here; apt-get install chromium")
    with new_page(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, served: Running) -> Page:
    """The page as on a first visit, with an even temper."""
    browser.open(f"{served.url}/")
    browser.run("sessionStorage.clear(); localStorage.setItem('lfm_mlx.settings', '{\"temperature\": \"0\"}')")
    browser.run("localStorage.setItem('lfm_mlx.theme', '\"light\"')")
    browser.open(f"{served.url}/?new")
    browser.wait("document.getElementById('model').textContent === 'tiny'")
    browser.requested.clear()
    browser.complaints.clear()
    return browser


def snap(page: Page, name: str) -> None:
    """Keep a picture where somebody wants to look at them."""
    if folder := os.environ.get("LFM_MLX_PICTURES"):
        page.picture(Path(folder) / f"{name}.png")


def ask(page: Page, text: str) -> None:
    page.click("#input")
    page.type(text)
    page.press("Enter")


def wait_for_answer(page: Page, number: int = 1) -> str:
    page.wait(f"document.querySelectorAll('.message.assistant:not(.writing) .numbers').length === {number}")
    text: str = page.run("[...document.querySelectorAll('.message.assistant .body')].at(-1).innerText")
    return text


def set_field(page: Page, name: str, value: str) -> None:
    page.run(
        f"(() => {{const e = document.getElementById('{name}'); e.value = {json.dumps(value)};"
        "e.dispatchEvent(new Event('input', {bubbles: true}));"
        "e.dispatchEvent(new Event('change', {bubbles: true}))})()"
    )


def test_a_conversation_streams_folds_its_thoughts_and_loads_nothing_from_elsewhere(
    page: Page, served: Running
) -> None:
    assert page.run("document.activeElement.id") == "input"
    assert page.run("document.getElementById('api-key').checkVisibility()") is False
    snap(page, "welcome")
    page.run(
        "window.lengths = new Set(); new MutationObserver(() => lengths.add(document.querySelector('#messages')"
        ".textContent.length)).observe(document.querySelector('#messages'), {childList: true, subtree: true})"
    )
    ask(page, "What is the capital of France?")
    assert "Paris" in wait_for_answer(page)
    assert page.run("lengths.size") > 5
    assert page.run("document.querySelector('.reasoning').open") is False
    assert page.run("document.querySelector('.reasoning div').textContent.length") > 5
    page.click(".reasoning summary")
    assert page.run("document.querySelector('.reasoning').open") is True
    ask(page, "What is the capital of Italy?")
    assert "Rome" in wait_for_answer(page, 2)
    snap(page, "conversation")
    page.open(f"{served.url}/?again")
    assert page.run("document.querySelectorAll('.message').length") == 4
    hosts = {httpx.URL(url).host for url in page.requested if url.startswith("http")}
    assert hosts == {"127.0.0.1"}
    assert page.complaints == []


def test_shift_enter_starts_a_line_and_enter_sends(page: Page) -> None:
    page.click("#input")
    page.type("Say hello.")
    page.press("Enter", shift=True)
    assert page.run("document.getElementById('input').value") == "Say hello.\n"
    assert page.run("document.querySelectorAll('.message').length") == 0
    page.press("Enter")
    wait_for_answer(page)
    assert page.run("document.querySelector('.message.user .body').textContent") == "Say hello.\n"


def test_escape_stops_an_answer_and_regenerate_writes_it_again(page: Page, served: Running) -> None:
    # Tokens that end an answer are made as unlikely as can be, through what the page itself sends.
    page.run(
        "window.plain = window.fetch; window.fetch = (url, options) => plain(url, options?.body ? {...options, body:"
        " JSON.stringify({...JSON.parse(options.body), logit_bias: {7: -100}, reasoning_effort: 'none'})} : options)"
    )
    ask(page, "Say hello.")
    page.wait("document.querySelector('.message.assistant .body')?.innerText.length > 20")
    assert page.run("document.getElementById('send').hidden") is True
    page.press("Escape")
    page.wait("document.getElementById('stop').hidden")
    assert "stopped" in page.run("document.querySelector('.numbers').textContent")
    served.check_alive()
    page.run("window.fetch = plain")
    page.run("window.before = document.querySelector('.message.assistant')")
    snap(page, "stopped")
    page.click(".message.assistant .actions button:nth-child(2)")
    page.wait("!before.isConnected")
    wait_for_answer(page)
    assert page.run("document.querySelectorAll('.message').length") == 2


def test_a_tool_is_called_and_given_its_result(page: Page) -> None:
    page.click("#settings-toggle")
    set_field(page, "tools", json.dumps([WEATHER_TOOL]))
    ask(page, "What's the weather in Paris?")
    wait_for_answer(page)
    assert page.run("document.querySelector('.call h3 code').textContent") == "get_weather"
    assert json.loads(page.run("document.querySelector('.call pre').textContent")) == {"city": "Paris"}
    snap(page, "call")
    page.click(".call textarea")
    page.type('{"temperature": 18, "condition": "sunny"}')
    page.click(".give")
    assert "18" in wait_for_answer(page, 2)
    assert "sunny" in page.run("document.querySelector('.call pre.result').textContent")
    snap(page, "result")


def test_settings_reach_the_model_and_survive_a_reload(page: Page, served: Running) -> None:
    page.click("#settings-toggle")
    snap(page, "settings")
    set_field(page, "max-tokens", "3")
    set_field(page, "thinking", "none")
    ask(page, "What is the capital of France?")
    wait_for_answer(page)
    assert page.run("document.querySelector('.reasoning').hidden") is True
    assert "3 out · " in page.run("document.querySelector('.numbers').textContent")
    assert "limit" in page.run("document.querySelector('.numbers').textContent")
    page.open(f"{served.url}/?later")
    assert page.run("document.getElementById('max-tokens').value") == "3"
    page.click("#settings-toggle")
    set_field(page, "tools", "[{]")
    assert "not used" in page.run("document.getElementById('tools-note').textContent")
    set_field(page, "tools", '[{"type": "web_search"}]')
    ask(page, "Hello")
    page.wait("!document.getElementById('problem').hidden")
    assert "tools[0].type" in page.run("document.getElementById('problem-text').textContent")
    snap(page, "problem")
    set_field(page, "tools", "")
    page.click("#retry")
    wait_for_answer(page, 2)
    assert page.run("document.getElementById('problem').hidden") is True


def test_the_theme_changes_and_every_control_has_a_name(page: Page) -> None:
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.run("document.documentElement.dataset.theme") == "dark"
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    page.click("#settings-toggle")
    snap(page, "dark")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "spinbutton"}
    controls = [node for node in nodes if node.get("role", {}).get("value") in roles and not node["ignored"]]
    assert len(controls) > 10
    assert [node["role"]["value"] for node in controls if not node["name"]["value"]] == []


def test_what_a_model_writes_is_shown_and_never_run(page: Page) -> None:
    source = (
        "# Title\n\n**bold** `x<y`\n\n- one\n  - two\n\n```js\n<script>alert(1)</script>\n```\n\n| a | b |\n|---|---|\n"
        "| 1 | 2 |\n\n<img src=x onerror=alert(1)> [no](javascript:alert(1)) [yes](https://example.org/)"
    )
    shown = page.run(
        "import('/static/markdown.js').then(({show}) => {const box = document.querySelector('#messages')"
        ".appendChild(document.createElement('li')); box.className = 'body'; const text = "
        + json.dumps(source)
        + "; for (let end = 0; end <= text.length; end += 1) show(box, text.slice(0, end)); return box.innerHTML})"
    )
    for part in ("<h3>Title</h3>", "<strong>bold</strong>", "<code>x&lt;y</code>", "<li>two</li>", "<td>2</td>"):
        assert part in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "&lt;img src=x" in shown
    assert "<img" not in shown
    assert 'href="https://example.org/"' in shown
    assert 'href="javascript' not in shown


def test_a_server_with_keys_is_asked_with_one(browser: Page) -> None:
    with running(new_service(api_keys=("secret",))) as guarded:
        assert guarded.http.get("/v1/models").status_code == 401
        browser.open(f"{guarded.url}/")
        browser.wait("document.activeElement.id === 'api-key'")
        snap(browser, "key")
        set_field(browser, "api-key", "secret")
        browser.wait("document.getElementById('model').textContent === 'tiny'")
        set_field(browser, "temperature", "0")
        ask(browser, "What is the capital of France?")
        assert "Paris" in wait_for_answer(browser)


def test_files_of_the_page_are_typed_and_confined(served: Running) -> None:
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")
    assert served.http.get("/static/chat_page.css").headers["content-type"].startswith("text/css")
    for name in ("missing.js", "..%2fapp.py", "%2e%2e%2fapp.py"):
        assert served.http.get(f"/static/{name}").status_code == 404
