"""The page at / of `moec serve`, in a browser: chat, keys, stop, experts, themes, two tabs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

import moec
from moec.runtime.text.chats.chat import ChatTemplate
from moec.serving.access import Access
from tests.browsing import Open, contrast, tabs
from tests.serving.running import PROMPT, TEMPLATE, Running, continuation, serving, until


@pytest.fixture(scope="module")
def model(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> moec.LoadedModel:
    """tiny_moe, whose routing can be recorded."""
    path = tmp_path_factory.mktemp("page") / "tiny.moec"
    moec.compile(tiny_moe, record_routing=True, verify=False).save(path)
    return moec.load(path)


@pytest.fixture
def server(model: moec.LoadedModel) -> Iterator[Running]:
    with serving(model, recorded=True) as running:
        yield running


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server."""
    # What the browser says of a request without a key is no defect of the page.
    with tabs(browser, "401 (Unauthorized)") as open_tab:
        yield lambda server, **options: open_tab(f"http://127.0.0.1:{server.port}/", **options)


def greedy(page: Page, most: int) -> None:
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most new tokens").fill(str(most))


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def answer(model: moec.LoadedModel, messages: list[dict[str, str]], most: int) -> str:
    return continuation(model, ChatTemplate(TEMPLATE).render(messages), most)


def words(page: Page) -> list[str]:
    return [text or "" for text in page.locator("#messages .words").all_text_contents()]


def test_the_page_needs_nothing_else(server: Running, open_page: Open) -> None:
    page = open_page(server)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    response = page.reload()
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; img-src data:;")
    assert "unsafe" not in policy
    expect(page.locator("#state")).to_have_text("ready")
    port = server.port
    assert {re.sub(r"^data:.*", "data:", url) for url in requests} <= {
        f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/v1/moec/stats", "data:"
    }  # fmt: skip
    assert len(response.body()) < 30_000


def test_a_chat(server: Running, model: moec.LoadedModel, open_page: Open) -> None:
    """With a system message; the second answer continues the first, a new chat none."""
    page = open_page(server)
    greedy(page, 24)
    page.get_by_label("System message").fill("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for number, question in enumerate(("Open a file", "Read lines")):
        ask(page, question)
        expect(page.locator("#messages small").nth(number)).to_have_text(
            re.compile(r"^24 tokens, [\d.]+ tokens/s, the first after \d\.\d\d s, cut by the limit")
        )
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(model, messages, 24)})
    assert words(page) == [m["content"] for m in messages if m["role"] == "assistant"]
    assert page.locator("#messages .user").all_text_contents() == ["Open a file", "Read lines"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#messages li")).to_have_count(0)
    ask(page, "Open a file")
    expect(page.locator("#messages small")).to_have_count(1)
    assert words(page) == [messages[2]["content"]]


def test_keys(server: Running, model: moec.LoadedModel, open_page: Open) -> None:
    """Enter sends, Shift+Enter begins a line, Escape stops; what came stays in the chat."""
    server.executor.seconds = 0.02
    page = open_page(server)
    box = page.get_by_label("Message", exact=True)
    expect(box).to_be_focused()
    greedy(page, 400)
    box.press_sequentially("Open")
    box.press("Shift+Enter")
    box.press_sequentially("a file")
    box.press("Enter")
    expect(page.locator("#messages .user")).to_have_text("Open\na file")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator("#messages .words")).to_have_text(re.compile(r"\w{2}"))
    expect(page.locator("#hint")).to_have_text(re.compile(r"^\d+ tokens, [\d.]+ tokens/s"))
    box.press("Escape")
    expect(page.locator("#messages small")).to_have_text(re.compile(r", stopped$"))
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    until(lambda: not server.service.used)
    server.executor.seconds = 0.0
    messages = [{"role": "user", "content": "Open\na file"}]
    (part,) = words(page)
    assert answer(model, messages, 400).startswith(part)
    messages += [{"role": "assistant", "content": part}, {"role": "user", "content": "And?"}]
    page.get_by_label("Most new tokens").fill("9")
    box.fill("And?")
    box.press("Enter")
    expect(page.locator("#messages small")).to_have_count(2)
    assert words(page)[1] == answer(model, messages, 9)


def test_texts_are_no_html(server: Running, open_page: Open) -> None:
    """Neither of the user, nor of the model, nor of an error."""
    markup = "<img src=x onerror=alert(1)><b>x</b>"
    tokenizer = server.service.tokenizer
    marked = replace(tokenizer)
    object.__setattr__(marked, "decoder", lambda prompt, special: lambda token: markup)
    server.service.tokenizer = marked
    page = open_page(server)
    greedy(page, 1)
    ask(page, markup)
    expect(page.locator("#messages .words")).to_have_text(markup)
    expect(page.locator("#messages .user")).to_have_text(markup)
    expect(page.locator("#messages img, #messages b")).to_have_count(0)


def test_errors_are_sentences(server: Running, open_page: Open) -> None:
    """The message goes back into its field."""
    page = open_page(server)
    greedy(page, 24)
    server.executor.fails = moec.errors.ArtifactError("the disk failed")
    ask(page, "Open a file")
    expect(page.get_by_role("alert")).to_contain_text("the disk failed")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Open a file")
    expect(page.locator("#messages .user")).to_have_count(0)
    server.executor.fails = None
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#messages small")).to_have_count(1)


def test_a_model_without_a_template(
    server: Running, model: moec.LoadedModel, open_page: Open
) -> None:
    server.service.tokenizer = replace(server.service.tokenizer, template=None)
    page = open_page(server)
    greedy(page, 16)
    expect(page.locator("#empty")).to_contain_text("no chat template, and continues text")
    expect(page.get_by_label("System message")).to_be_hidden()
    ask(page, PROMPT)
    expect(page.locator("#messages small")).to_have_count(1)
    assert words(page) == [continuation(model, PROMPT, 16)]
    assert page.locator("#messages .prompt").all_text_contents() == [PROMPT]


def test_experts(server: Running, open_page: Open) -> None:
    page = open_page(server)
    cells = page.locator("#heat i")
    expect(cells).to_have_count(4 * 8)
    about = page.locator("#about")
    expect(about).to_have_text(re.compile("No tokens were counted yet"))
    faint = cells.first.evaluate("cell => getComputedStyle(cell).opacity")
    greedy(page, 64)
    ask(page, "Open a file")
    expect(about).to_have_text(re.compile(r"^[\d,]+ choices counted; \d+ of 32 experts had no"))
    opacities = {cell.evaluate("cell => getComputedStyle(cell).opacity") for cell in cells.all()}
    assert len(opacities) > 4
    assert float(faint) == 0.07
    page.get_by_role("button", name="all").click()
    expect(page.get_by_role("button", name="all")).to_have_attribute("aria-pressed", "true")
    cells.nth(8 + 3).hover()
    routing = server.service.routing
    assert routing is not None
    count = int(routing.counts.counts[1][3])
    pattern = rf"^Layer 1 \(model\.layers\.1\.mlp\), expert 3: [\d.]+ times .*, {count} tokens$"
    expect(about).to_have_text(re.compile(pattern))
    label = page.locator("#heat").get_attribute("aria-label")
    assert label is not None
    assert "choices counted" in label


def test_experts_that_are_not_counted(model: moec.LoadedModel, open_page: Open) -> None:
    with serving(model) as server:
        server.service.no_routing = "Experts are not counted, and why"
        page = open_page(server)
        expect(page.locator("#about")).to_have_text("Experts are not counted, and why")
        expect(page.locator("#heat i")).to_have_count(0)
        expect(page.get_by_role("button", name="now")).to_be_hidden()


def test_a_key(model: moec.LoadedModel, open_page: Open) -> None:
    with serving(model, access=Access(key="sécret→")) as server:
        assert server.send("/v1/moec/stats")[0] == 401
        page = open_page(server)
        field = page.get_by_label("API key")
        expect(page.locator("#state")).to_have_text("a key is needed")
        field.fill("wrong")
        field.press("Enter")
        expect(field).to_have_value("")
        expect(page.locator("#state")).to_have_text("a key is needed")
        field.fill("sécret→")
        field.press("Enter")
        expect(field).to_be_hidden()
        greedy(page, 8)
        ask(page, "Open a file")
        expect(page.locator("#messages small")).to_have_count(1)
        page.reload()
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.get_by_label("API key")).to_be_hidden()
        assert page.evaluate("() => Object.keys(localStorage).length") == 0


def test_two_tabs(server: Running, model: moec.LoadedModel, open_page: Open) -> None:
    server.executor.seconds = 0.02
    tabs = [open_page(server), open_page(server)]
    questions = ("Open a file", "Read lines")
    for page, question in zip(tabs, questions, strict=True):
        greedy(page, 150)
        ask(page, question)
    expect(tabs[0].locator("#running")).to_have_text("2")
    for page, question in zip(tabs, questions, strict=True):
        expect(page.locator("#messages small")).to_have_count(1)
        assert words(page) == [answer(model, [{"role": "user", "content": question}], 150)]
        expect(page.locator("#running")).to_have_text("0")


def test_stats_are_read_while_the_page_is_visible(server: Running, open_page: Open) -> None:
    page = open_page(server)
    times: list[str] = []
    page.on("request", lambda request: times.append(request.url))
    page.wait_for_timeout(2500)
    assert 1 <= len(times) <= 3
    page.evaluate(
        """() => {
          Object.defineProperty(document, "visibilityState", { value: "hidden" });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    times.clear()
    page.wait_for_timeout(2200)
    assert times == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(server: Running, open_page: Open, scheme: str) -> None:
    """Words have a contrast of 4.5 with what is behind them (WCAG AA), also small ones."""
    page = open_page(server, color_scheme=scheme)
    greedy(page, 8)
    ask(page, "Open a file")
    expect(page.locator("#messages small")).to_have_count(1)
    pairs = {"body": "body", "#messages small": "body", ".user": ".user", "#about": "aside"}
    pairs |= {"#new": "header", "#state": "header", "#hint": "body", "#now": "aside"}
    for front, behind in pairs.items():
        ratio, dark = contrast(page, front, behind)
        assert (ratio >= 4.5, dark) == (True, scheme == "dark"), front


def test_a_narrow_screen(server: Running, open_page: Open) -> None:
    page = open_page(server, viewport={"width": 340, "height": 640})
    greedy(page, 40)
    ask(page, "a" * 200)
    expect(page.locator("#messages small")).to_have_count(1)
    for element in page.locator("header, #messages li, #composer, aside, #heat, dl").all():
        box = element.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 340
    page.get_by_label("Seed").scroll_into_view_if_needed()
    page.get_by_label("Seed").fill("3")


def test_everything_has_a_name(server: Running, open_page: Open) -> None:
    """For screen readers: every field, button and picture."""
    page = open_page(server)
    expect(page.locator("#state")).to_have_text("ready")
    tree = page.locator("body").aria_snapshot()
    assert not re.search(r"- (textbox|spinbutton|button|img)\b(?! \")", tree), tree
    assert page.locator("html").get_attribute("lang") == "en"


def test_one_of_two_models(model: moec.LoadedModel, open_page: Open) -> None:
    with serving(model, twin="twin") as running:
        page = open_page(running)
        models = page.get_by_label("Model", exact=True)
        expect(models).to_have_value("tiny")
        greedy(page, 5)
        for name in ("twin", "tiny"):
            before = running.metric("generation_tokens_total", name)
            models.select_option(name)
            expect(page).to_have_title(name)
            ask(page, "Open a file")
            expect(page.locator("#messages .user")).to_have_count(1)
            until(lambda n=name, b=before: running.metric("generation_tokens_total", n) == b + 5)
