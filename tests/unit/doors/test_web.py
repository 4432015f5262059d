"""The chat page: public and empty of data, closed to every other source, and safe with whatever a model writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from llmo.doors import web
from llmo.doors.api import create_app
from llmo.settings import Settings
from llmo.system import System
from llmo.types import Artifact, Kind
from support.browser import CHROMIUM, Browser
from support.chatting import VERSION, Place, chat_place
from support.serving import eventually
from support.tiny_chat import tiny_adapter

FILES = sorted(web.pages())
ENTER = 13
FIELD = "document.getElementById('%s')"
DONE = "document.querySelector('#stop').hidden"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with System(Settings(home=tmp_path_factory.mktemp("store"))) as system, TestClient(create_app(system)) as client:
        yield client


@pytest.mark.parametrize("path", ["/", *(f"/pages/{name}" for name in FILES)])
def test_every_file_is_public_typed_and_closed_to_the_rest_of_the_web(http: TestClient, path: str) -> None:
    reply = http.get(path)
    assert reply.status_code == 200
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types")} == {"'none'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["x-frame-options"] == "DENY"
    assert "charset=utf-8" in reply.headers["content-type"] or path.endswith(".svg")
    again = http.get(path, headers={"if-none-match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nope.js", "..%2fweb.py", "%2e%2e/api.py", "index.html%00", ".", "%ED%A0%80"])
def test_nothing_but_the_pages_own_files_is_sent(http: TestClient, name: str) -> None:
    reply = http.get(f"/pages/{name}")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "not_found"


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    page = web.pages()["index.html"].content.decode()
    assert not re.search(r"<style|\son\w+=|\sstyle=|javascript:", page)
    assert re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL) == [(' type="module" src="pages/app.js"', "")]
    used = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {name.removeprefix("pages/") for name in used} <= set(FILES)
    for name, file in web.pages().items():
        text = file.content.decode()
        if name.endswith(".js"):
            assert {found.removeprefix("./") for found in re.findall(r'from "([^"]+)"', text)} <= set(FILES)
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|localStorage", text
            )
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)[a-z]", text), name


def test_no_data_without_a_key(http: TestClient) -> None:
    for path in ("/v1/endpoints", "/v1/models", "/v1/feedback"):
        assert http.get(path).status_code == 401


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Endless, since an answer that ends before its first word cannot be the better one."""
    with chat_place(tmp_path_factory.mktemp("place"), endless=True) as found:
        yield found


@pytest.fixture(scope="module")
def page(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page in a browser, locked."""
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(place.url)
        yield browser


def unlock(page: Browser, key: str) -> None:
    page.until("document.querySelector('#door').open")
    page.type("#key", key)
    page.press("Enter", ENTER)


def fill(page: Browser, field: str, value: object) -> None:
    """Put a value into a field of the settings, as somebody who leaves it afterwards."""
    page.js(f"(f => {{ f.value = {json.dumps(str(value))}; f.dispatchEvent(new Event('change')); }})({FIELD % field})")


def ask(page: Browser, question: str) -> None:
    page.type("#question", question)
    page.press("Enter", ENTER)


def press(page: Browser, label: str, which: int = -1) -> None:
    """Press one of the visible buttons with that label, by default the last."""
    page.js(
        "[...document.querySelectorAll('button')].filter(b => b.checkVisibility() && "
        f"b.textContent === {json.dumps(label)}).at({which}).click()"
    )


@needs_browser
def test_the_key_is_asked_for_once_and_never_in_an_address(page: Browser, place: Place) -> None:
    unlock(page, "llmo_wrong")
    assert "does not know" in page.until("document.querySelector('#refusal').textContent")
    assert page.js("sessionStorage.getItem('llmo-key')") is None
    page.problems.clear()  # a refusal is an error in the browser's own log
    unlock(page, place.asking)
    assert page.until("document.querySelector('#door').open === false")
    assert page.js("location.href + document.cookie + localStorage.length") == page.js("location.origin") + "/0"
    page.send("Page.reload")
    page.until("document.readyState === 'complete' && document.querySelector('.empty') !== null")
    assert not page.js("document.querySelector('#door').open")
    press(page, "Settings")
    press(page, "Forget the key")
    assert page.until("document.querySelector('#door').open")
    assert page.js("sessionStorage.getItem('llmo-key')") is None
    assert page.problems == []
    unlock(page, place.asking)
    page.until("document.querySelector('#door').open === false")


@needs_browser
def test_only_endpoints_that_generate_are_offered(page: Browser) -> None:
    assert page.js("[...document.querySelector('#first').options].map(o => o.value)") == ["assistant", "other"]


@needs_browser
def test_an_answer_streams_keeps_to_the_settings_and_is_rated(page: Browser, place: Place) -> None:
    before = len(place.system.feedback())
    for field, value in (("system", "Be brief."), ("temperature", 0), ("max_tokens", 12), ("seed", 1)):
        fill(page, field, value)
    ask(page, "Hello there")
    page.until(f"document.querySelectorAll('.turn').length === 1 && {DONE}")
    assert "12 tokens" in page.js("document.querySelector('.figures').textContent")
    assert "cut at the limit" in page.js("document.querySelector('.figures').textContent")
    assert VERSION in page.js("document.querySelector('.answer h3').textContent")
    press(page, "Good")
    page.until("document.querySelector('#status').textContent.includes('Kept')")
    [kept] = place.system.feedback()[before:]
    assert (kept.endpoint, kept.kind, kept.rating, kept.owner, kept.model_ref) == (
        "assistant", "rating", "good", "bob", VERSION,
    )  # fmt: skip
    assert [(m["role"], m["content"]) for m in kept.messages] == [("system", "Be brief."), ("user", "Hello there")]
    assert kept.answers[0]["content"]
    assert page.problems == []


@needs_browser
def test_stop_ends_the_answer_where_it_is_written(tmp_path: Path) -> None:
    with chat_place(tmp_path / "place", endless=True) as place, Browser(tmp_path / "profile") as page:
        page.open(place.url)
        unlock(page, place.asking)
        page.until("!document.querySelector('#door').open && document.querySelector('#first').options.length > 0")
        fill(page, "temperature", 0)
        fill(page, "max_tokens", 60_000)
        ask(page, "Tell me everything")
        eventually(lambda: place.streams() == 1, "the model writes")
        page.until("document.querySelector('.turn:last-child .text').textContent.length > 20")
        page.press("Escape", 27)
        page.until(DONE)
        eventually(lambda: place.streams() == 0, "the model has stopped")
        assert page.js("document.querySelector('.turn:last-child .note').textContent") == "stopped"
        fill(page, "max_tokens", 5)
        press(page, "Regenerate")
        page.until(f"document.querySelector('.turn:last-child .figures').textContent.includes('5 tokens') && {DONE}")
        assert page.js("document.querySelectorAll('.turn').length") == 1


@needs_browser
def test_two_endpoints_answer_the_same_conversation_and_the_better_one_goes_on(page: Browser, place: Place) -> None:
    before = len(place.system.feedback())
    press(page, "New chat")
    page.click("#compare")
    fill(page, "seed", "")
    fill(page, "temperature", 0.5)
    for turn, question in enumerate(("Hello", "And then?"), 1):
        ask(page, question)
        page.until(f"document.querySelectorAll('.turn').length === {turn} && {DONE}")
        press(page, "This one is better")
        page.until("document.querySelector('.turn:last-child .answer:last-child').classList.contains('picked')")
    press(page, "Correct", -2)
    page.js("document.querySelector('.correction textarea').value = 'What it should have said'")
    press(page, "Save the correction")
    page.until("document.querySelector('.correction') === null")
    first, second, mended = place.system.feedback()[before:]
    assert (first.kind, first.rating, first.endpoint, first.against) == ("comparison", "second", "assistant", "other")
    heard = [m["content"] for m in second.messages if m["role"] != "system"]
    assert heard == ["Hello", first.answers[1]["content"], "And then?"]
    assert (mended.kind, mended.correction) == ("correction", "What it should have said")
    assert mended.answers[0]["content"] == second.answers[0]["content"]
    assert page.problems == []


@pytest.fixture
def formal(place: Place, tmp_path: Path) -> Iterator[Artifact]:
    """A model whose adapter is `assistant:formal`."""
    tiny_adapter(tmp_path / "formal" / "adapter")
    store = place.system.store
    made = store.catalog.publish(Kind.MODEL, "formal", tmp_path / "formal", {}, job=None, inputs={})
    store.adapters.add("assistant", "formal", model=made.digest, model_ref=made.ref, base="sha256:3")
    yield made
    store.adapters.remove("assistant", "formal")


@needs_browser
def test_adapters_are_offered_answer_and_are_compared_with_their_own_endpoint(
    page: Browser, place: Place, formal: Artifact
) -> None:
    before = len(place.system.feedback())
    headers = {"authorization": f"Bearer {place.asking}"}
    eventually(
        lambda: "formal@1" in httpx.get(f"{place.url}/v1/models", headers=headers, trust_env=False).text,
        "the gateway knows of it",
    )
    press(page, "New chat")
    page.send("Page.reload")
    page.until("document.readyState === 'complete' && document.querySelector('.empty') !== null")
    for field in ("first", "second"):
        offered = page.js(f"[...{FIELD % field}.options].map(o => o.text.split(',')[0])")
        assert offered == [f"assistant ({VERSION})", "assistant:formal (formal@1)", f"other ({VERSION})"]
        fill(page, field, "assistant" if field == "first" else "assistant:formal")
    if not page.js("document.querySelector('#compare').checked"):
        page.click("#compare")
    fill(page, "max_tokens", 8)
    ask(page, "Hello")
    page.until(f"document.querySelectorAll('.turn').length === 1 && {DONE}")
    titles = page.js("[...document.querySelectorAll('.answer h3')].map(h => h.textContent)")
    assert [title.split(" · ")[:2] for title in titles] == [["assistant", VERSION], ["assistant:formal", "formal@1"]]
    press(page, "This one is better")
    page.until("document.querySelector('#status').textContent.includes('Kept')")
    [kept] = place.system.feedback("assistant")[before:]
    assert [(a["endpoint"], a["model"]) for a in kept.answers] == [("assistant", VERSION), ("assistant", "formal@1")]
    assert kept.answers[1]["digest"] == formal.digest
    assert page.problems == []
    page.click("#compare")


@needs_browser
def test_what_the_server_refuses_is_said_beside_the_question(page: Browser) -> None:
    press(page, "New chat")
    page.click("#compare")
    page.js("document.querySelector('#question').value = 'long '.repeat(40000)")
    ask(page, "!")
    assert "context" in page.until(f"{DONE} && document.querySelector('.failed').textContent")
    press(page, "New chat")
    page.problems.clear()  # the refusal


def rendered(page: Browser, text: str) -> str:
    """The HTML that a Markdown text becomes."""
    found = page.js(
        "import(new URL('pages/markdown.js', location)).then(({ render }) => { "
        f"const into = document.createElement('div'); render(into, {json.dumps(text)}, () => {{}}); "
        "return into.innerHTML; })"
    )
    assert isinstance(found, str)
    return found


LINK = 'target="_blank" rel="noopener noreferrer nofollow"'
MARKDOWN = {
    "a **b** *c* `d` ~~e~~ a_b_c": "<p>a <strong>b</strong> <em>c</em> <code>d</code> <del>e</del> a_b_c</p>",
    "# T #\ntext": "<h3>T</h3><p>text</p>",
    "1. a\n2. b\n   - c": '<ol start="1"><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ol>',
    "> a\n> b": "<blockquote><p>a\nb</p></blockquote>",
    "|a|b|\n|-|-|\n|1|2|": '<div class="table" tabindex="0"><table><tr><th>a</th><th>b</th></tr>'
    "<tr><td>1</td><td>2</td></tr></table></div>",
    "---": "<hr>",
    "2 * 3 * 4 and a_b_ c\\*d": "<p>2 * 3 * 4 and a_b_ c*d</p>",
    "```\n<b>&\n": '<figure><figcaption><span></span><button type="button">Copy</button></figcaption>'
    '<pre tabindex="0"><code>&lt;b&gt;&amp;\n</code></pre></figure>',
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](data:text/html,y) [/etc](/etc)": "<p>[x](data:text/html,y) [/etc](/etc)</p>",
    '![i](http://e.org/i "t")': f'<p>!<a href="http://e.org/i" {LINK} title="http://e.org/i">i</a></p>',
    "see http://e.org/a.": f'<p>see <a href="http://e.org/a" {LINK} title="http://e.org/a">http://e.org/a</a>.</p>',
    "**open *and `left": "<p>**open *and `left</p>",
    "": "",
}
HOSTILE = [
    "*" * 60_000, "> " * 20_000, "[" * 60_000, "`a" * 30_000, "- " * 20_000, "|-" * 30_000, "**a " * 15_000,
    " \n" * 30_000 + "- a", "#" * 60_000, "http" * 15_000, "- a\n\n" * 10_000, "- - - - x" * 5000, " " * 60_000 + "x",
    "_" * 60_000,
]  # fmt: skip


@needs_browser
@pytest.mark.parametrize(("text", "html"), MARKDOWN.items())
def test_markdown_becomes_nodes_and_markup_stays_text(page: Browser, text: str, html: str) -> None:
    assert rendered(page, text) == html


@needs_browser
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_without_a_fuss(page: Browser, text: str) -> None:
    assert len(rendered(page, text)) > 0


@needs_browser
def test_a_growing_text_keeps_the_nodes_that_did_not_change(page: Browser) -> None:
    kept = page.js(
        "import(new URL('pages/markdown.js', location)).then(({ render }) => { "
        "const into = document.createElement('div'); render(into, 'one\\n\\ntwo', () => {}); "
        "const first = into.firstChild; render(into, 'one\\n\\ntwo three', () => {}); "
        "return [first === into.firstChild, into.lastChild.textContent, into.childNodes.length]; })"
    )
    assert kept == [True, "two three", 2]
