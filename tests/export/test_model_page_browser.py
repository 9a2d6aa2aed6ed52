"""The model's page in a browser, worked as a reader works it: by clicks and keys, from a file, without a network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picogpt.alphabet import Alphabet
from picogpt.config import TextConfig
from picogpt.export.model_page import render_model_page
from picogpt.inference import Engine
from picogpt.inference.decoder import RollingDecoder
from picogpt.inference.tensors import Floats
from picogpt.runs.loss_log import LossLog
from picogpt.tokenizer import TextEncoder
from tests.browser import Browser, Tab
from tests.conftest import TINY
from tests.export.page_model import arrays_of, content_of, dequantized, view

LOG = LossLog(train=[3.0, 2.0], val=[2.9, 2.1], chars=[10, 20], seconds=[1.0, 2.0])
SENTENCES = """
window.said = [];
addEventListener("DOMContentLoaded", () => {
  for (const region of document.querySelectorAll("[role=status]")) {
    new MutationObserver(() => said.push(region.textContent)).observe(region, { childList: true, characterData: true, subtree: true });
  }
});
"""
"""Keeps all that a screen reader would be given to say."""
IDLE = "document.getElementById('state').textContent === 'Ready.' && !model.busy"
INSIDE = "inside && inside.length === model.at"
ROLLED = "/bits per character|bits (more|less)/.test(document.getElementById('roll-live').textContent)"


@pytest.fixture(scope="module")
def content() -> str:
    """The tiny model's page; its weights stand in several parts, as a real model's do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("picogpt.export.model_page._PART", 300)
        return render_model_page(view(log=LOG))


@pytest.fixture(scope="module")
def page(content: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file."""
    path = tmp_path_factory.mktemp("page") / "tiny.html"
    path.write_text(content)
    return path


@pytest.fixture
def tab(browser: Browser, page: Path) -> Iterator[Tab]:
    """The page, ready; at the end nothing may have come to the console, and nothing have asked for the network."""
    with browser.tab(script=SENTENCES) as opened:
        opened.open(page)
        opened.wait_for(IDLE)
        yield opened
        assert opened.complaints() == []


def write(tab: Tab, prompt: str = "ab", count: int = 20) -> None:
    """Write so many characters after a prompt."""
    tab.set_value("#prompt", prompt)
    tab.set_value("#count", str(count))
    tab.click("#go")
    tab.wait_for(IDLE)


def pause_after(tab: Tab, length: int) -> None:
    """Begin to write, and pause once the text is longer than that."""
    tab.click("#go")
    tab.wait_for(f"model.text.length > {length}")
    tab.click("#pause")
    tab.wait_for(IDLE)


def written(tab: Tab) -> str:
    """Return the text on the page."""
    return "".join(tab.evaluate("[...document.querySelectorAll('#text [id^=c]:not(.next)')].map(span => span.textContent)"))


def rows(tab: Tab, table: str) -> list[list[str]]:
    """Return the cells of a table."""
    cells = f"[...document.querySelectorAll('{table} tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    found: list[list[str]] = tab.evaluate(cells)
    return found


def engine_logits(content: str, ids: list[int]) -> Floats:
    """Return the numpy engine's logits (k, V) after each of `ids`, with the page's own weights."""
    header, _ = content_of(content)
    decoder = RollingDecoder(Engine(TINY, dequantized(content)), header["hop"])
    logits: Floats = decoder.prefill_all_logits(np.array([ids], np.uint8))[0]
    return logits


def softmax(logits: Floats) -> Floats:
    """Return probabilities over the last axis."""
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = shares / shares.sum(axis=-1, keepdims=True)
    return probabilities


def test_writes_on_from_a_prompt(tab: Tab) -> None:
    """A typed prompt is read, the text goes on from it, and the sum of it is said."""
    write(tab, "the old", 30)

    assert written(tab).startswith("the old")
    assert len(tab.evaluate("model.text")) == 37
    assert re.fullmatch(r"Wrote 30 characters in \d+\.\d seconds, \d+ a second\.", tab.text("#live"))
    assert tab.evaluate("document.querySelectorAll('#text .prompt').length") == 7


def test_text_of_the_weights_is_dropped(content: str, tab: Tab) -> None:
    """Once the model is unpacked, the page keeps none of its weights as text."""
    assert content.count('class="weights"') > 10
    assert tab.evaluate("document.querySelectorAll('.weights').length") == 0


def test_same_seed_same_text(tab: Tab) -> None:
    """A seed fixes the text, and another one gives another."""
    texts = []
    for seed in ("1", "1", "2"):
        tab.set_value("#seed", seed)
        tab.click("#clear")
        write(tab)
        texts.append(written(tab))

    assert texts[0] == texts[1] != texts[2]


def test_probabilities(tab: Tab, content: str) -> None:
    """Shades and the table of expected characters are the numpy engine's probabilities."""
    write(tab)
    ids = tab.evaluate("model.text")
    expected = softmax(engine_logits(content, ids))
    tab.click("#c10")

    shades = tab.evaluate(
        "[...document.querySelectorAll('#text span:not(.next)')].map(span => Number(span.style.getPropertyValue('--p')))"
    )
    assert shades[1:] == pytest.approx([expected[i - 1][ids[i]] for i in range(1, len(ids))], abs=1e-3)
    found = rows(tab, "#expected")
    best = np.sort(expected[9])[::-1]
    assert [float(row[1].strip("<%\u00a0")) for row in found[:10]] == pytest.approx(100 * best[:10], abs=0.06)
    assert [float(row[2]) for row in found[:10]] == pytest.approx(-np.log2(best[:10]), abs=0.01)
    assert sum("(written here)" in row[0] for row in found) == 1
    assert tab.text("#expected-about").startswith("Character 11, ")


def test_goes_on_with_another_character(tab: Tab) -> None:
    """Another character takes the chosen one's place, what stands before it stays, and the text goes on from there."""
    write(tab)
    before = tab.evaluate("model.text")
    tab.click("#c10")
    tab.evaluate("[...document.querySelectorAll('#expected tr:not(.taken) button:not(:disabled)')][0].id = 'other'")
    name = tab.text("#other")
    tab.click("#other")
    tab.wait_for(IDLE)
    after = tab.evaluate("model.text")

    assert after[:10] == before[:10]
    assert after[10] != before[10]
    assert name == f"write on with {tab.evaluate('nameOf(model.text[10])')}"
    assert len(after) == 11 + 20


def test_pauses_and_steps(tab: Tab) -> None:
    """Writing stops when it is told to; a step adds one character, and what comes next is chosen."""
    tab.set_value("#speed", "20")
    tab.set_value("#count", "2000")
    pause_after(tab, 18)
    length = tab.evaluate("model.text.length")
    assert tab.text("#live") == f"Paused after {length} characters."
    assert length < 100

    tab.click("#step")
    tab.wait_for(f"{IDLE} && model.text.length === {length + 1}")
    assert re.fullmatch(r"Wrote .+\.", tab.text("#live"))
    assert tab.text("#expected-about") == f"What comes next, after {length + 1} characters."


def test_a_paused_text_is_the_same(tab: Tab) -> None:
    """Pausing changes nothing of the text that a seed gives."""
    write(tab, "the history of ", 60)
    whole = tab.evaluate("model.text")
    tab.click("#clear")
    tab.set_value("#speed", "20")
    pause_after(tab, 20)
    length = tab.evaluate("model.text.length")
    tab.set_value("#speed", "0")
    tab.set_value("#count", str(len(whole) - length))
    tab.click("#go")
    tab.wait_for(IDLE)

    assert tab.evaluate("model.text") == whole


def test_attention(tab: Tab) -> None:
    """Each head's weights sum to one over the context slot and the window; the choice of a head changes what is shown."""
    write(tab)
    tab.click("#c6")
    tab.wait_for(INSIDE)
    first = rows(tab, "#attention-table")
    tab.set_value("#head", "1")
    second = rows(tab, "#attention-table")

    assert [row[1] for row in first] == ["context slot", *tab.evaluate("model.text.slice(0, 6).map(nameOf)")]
    for table in (first, second):
        assert sum(float(row[2].strip("<%\u00a0")) for row in table) == pytest.approx(100, abs=0.8)
    assert first != second
    assert tab.evaluate("document.querySelectorAll('#attention > div').length") == 7
    assert "Layer 1, head 2 looked most at" in tab.text("#attention-about")


def test_logit_lens(tab: Tab) -> None:
    """There is a row before the first layer and one for each; the last one is what the model predicts."""
    write(tab)
    tab.click("#c6")
    tab.wait_for(INSIDE)
    lens = rows(tab, "#lens")
    expected = [f"{row[0].removesuffix(' (written here)')} {row[1]}" for row in rows(tab, "#expected")]

    assert [row[0] for row in lens] == ["the input", "layer 1", "layer 2"]
    assert lens[-1][1:4] == expected[:3]


def test_roll(tab: Tab, content: str) -> None:
    """Losses of each window with its own context vector, without it and with another text's are the numpy engine's."""
    tab.set_value("#roll-text", "a text of four windows, more or less")
    tab.set_value("#roll-other", "something else, of more than one window")
    ids, other = tab.evaluate("rollIds('roll-text')"), tab.evaluate("rollIds('roll-other')")
    engine = Engine(TINY, dequantized(content))
    own, contexts, losses = roll(engine, ids, None)
    others = roll(engine, other, None)[1]

    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    assert column(tab, 2) == pytest.approx(own, abs=1e-3)
    assert (
        tab.text("#roll-live")
        == f"With its own context vectors the text costs {np.concatenate(losses).mean() / np.log(2):.3f} bits per character."
    )
    headers = ["window", "characters", "own vector"]
    for mode, given in {"zeroed": [np.zeros_like(vector) for vector in contexts], "other": others}.items():
        tab.click(f"#roll-mode [value={mode}]")
        tab.wait_for(ROLLED)
        changed = roll(engine, ids, given)[0]
        headers.append({"zeroed": "no vector", "other": "other text\u2019s"}[mode])
        assert tab.evaluate("[...$('roll-table').tHead.rows[0].cells].map(cell => cell.textContent)") == headers
        assert column(tab, 2) == pytest.approx(own, abs=1e-3)
        assert column(tab, len(headers) - 1) == pytest.approx(changed, abs=1e-3)
        assert column(tab, len(headers) - 1, "small") == pytest.approx(np.subtract(changed, own), abs=2e-3)
        assert re.search(
            r"each character costs \d\.\d{3} bits (more|less): \d\.\d{3} instead of \d\.\d{3}\. The own vectors (made|were) ",
            tab.text("#roll-live"),
        )
    assert tab.evaluate("[...document.querySelectorAll('#strip canvas')].map(canvas => canvas.ariaLabel)")[1:] == [
        f"Window {i + 2} starts from a vector of length {np.linalg.norm(others[i]):.1f}." for i in range(len(contexts) - 1)
    ]


def roll(engine: Engine, ids: list[int], given: list[Any] | None) -> tuple[list[float], list[Any], list[Any]]:
    """Return bits per character of the windows, the context vectors after each, and all losses; `given` replaces what a window starts from."""
    remainder = (len(ids) - 1) % TINY.context_len + 1
    ends = range(remainder, len(ids) + 1, TINY.context_len)
    context = np.zeros((1, TINY.n_embd), np.float32)
    means, contexts, losses = [], [], []
    for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if given is not None and index:
            context = given[(index - 1) % len(given)]
        targets = np.array([[*ids[start:end], *ids[end : end + 1]]], np.uint8)
        scored, _ = engine.score(targets, context)
        window = engine.window()
        window.reset(context)
        window.prefill(np.array([ids[start:end]], np.uint8))
        context = window.context().copy()
        contexts.append(context)
        losses.append(scored[0])
        means.append(float(scored.mean() / np.log(2)))
    return means, contexts, losses


def column(tab: Tab, number: int, part: str = "") -> list[float]:
    """Return a column of the roll's table: its values, or with `part` the differences beside them."""
    cells = f"[...$('roll-table').tBodies[0].rows].map(row => row.cells[{number}])"
    pick = f"cell.querySelector('{part}').textContent" if part else "cell.firstChild.textContent"
    return [float(text.replace("\u2212", "-")) for text in tab.evaluate(f"{cells}.map(cell => {pick})")]


def test_progress_of_the_roll(tab: Tab) -> None:
    """Each window is announced to the eye as it is read, with its number, and nothing remains at the end."""
    tab.set_value("#roll-text", "a text of four windows, more or less")
    tab.evaluate(
        "window.seen = []; new MutationObserver(() => seen.push($('roll-progress').textContent)).observe($('roll-progress'), { childList: true })"
    )
    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    count = len(rows(tab, "#roll-table"))

    assert f"Reading window {count - 1} of {count}" in tab.evaluate("seen")
    assert tab.text("#roll-progress") == ""


def test_readings_last_as_long_as_their_text(tab: Tab) -> None:
    """A new reading of the same texts keeps the columns, and a change of a text begins anew; no cell is a dash or empty."""
    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    tab.click("#roll-mode [value=zeroed]")
    tab.wait_for(ROLLED)
    tab.click("#roll-mode [value='as is']")
    tab.wait_for(ROLLED)
    assert all(len(row) == 4 and all(cell not in {"", "-"} for cell in row) for row in rows(tab, "#roll-table"))

    tab.evaluate("windows.zeroed.length = 2")  # as if another reading had begun before its end
    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    assert all(len(row) == 3 for row in rows(tab, "#roll-table"))

    tab.click("#roll-mode [value=zeroed]")
    tab.wait_for(ROLLED)
    tab.click("#roll-mode [value='as is']")
    tab.set_value("#roll-text", "another text")
    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    assert all(len(row) == 3 for row in rows(tab, "#roll-table"))


def test_clear_empties_the_panels(tab: Tab) -> None:
    """After clearing, no panel shows the old text; while a new one is being written, they are dimmed."""
    write(tab)
    tab.click("#c6")
    tab.wait_for(INSIDE)
    tab.set_value("#speed", "20")
    tab.click("#go")
    assert tab.evaluate("PANELS.every(id => $(id).classList.contains('stale'))")
    tab.click("#pause")
    tab.wait_for(IDLE)
    assert tab.evaluate("document.querySelectorAll('.stale').length") == 0
    tab.click("#clear")

    for panel in ("expected", "attention", "lens"):
        assert tab.text(f"#{panel}-about") == "Click a character of the text."
    assert tab.evaluate("[$('expected').hidden, $('lens').hidden, $('attention').childElementCount]") == [True, True, 0]
    assert rows(tab, "#attention-table") == []


def test_numbers_of_attention(tab: Tab) -> None:
    """A place is counted in the whole text, with its distance, or it is the context slot; an empty slot is named so."""
    write(tab)
    for at in (6, 18):
        tab.click(f"#c{at}")
        tab.wait_for(INSIDE)
        found = rows(tab, "#attention-table")
        assert found[-1][0] == str(at)
        best = tab.evaluate("looksMostAt(inside.attention[0])")
        back = at + 1 - int(found[best][0]) if best else 0
        where = f"character {found[best][0]} ({found[best][1]}), {back} back" if best else "the context slot"
        about = tab.text("#attention-about")
        assert f"looked most at {where}: {found[best][2]}." in about
        assert about.endswith("This is the first window: its context slot is empty.") == (at == 6)


def test_the_attention_stop_shows_a_spread(tab: Tab) -> None:
    """The tour clicks a late character, and no head that looks at the context slot if another one does not."""
    write(tab, count=30)
    tab.evaluate("select(1); showStop(4)")
    tab.click("#stop-show")
    tab.wait_for(INSIDE)
    assert tab.evaluate("model.at") == 31

    tab.evaluate(
        "inside.attention = inside.attention.map((_, i) => [[1, 0, 0], [0, 1, 0], [0.2, 0.4, 0.4], [0.9, 0.05, 0.05]][i])"
    )
    tab.evaluate("$('layer').value = 0; $('head').value = 0; chooseSpread()")
    assert tab.evaluate("[$('layer').value, $('head').value]") == ["1", "0"]
    tab.evaluate("$('layer').value = 0; $('head').value = 1; chooseSpread()")
    assert tab.evaluate("[$('layer').value, $('head').value]") == ["0", "1"]


@pytest.mark.parametrize(
    ("typed", "about"),
    [
        ("plain", ""),
        ("Caf\u00e9", "Read as: \u201ccafe\u201d"),
        ("a\U0001f600", "Read as: \u201ca<?>\u201d 1 character became <?>."),
        ("\U0001f600\U0001f600", "Read as: \u201c<?><?>\u201d 2 characters became <?>."),
    ],
)
def test_how_a_prompt_is_read(typed: str, about: str, tab: Tab) -> None:
    """Below the prompt stands how it is read, if that differs, and how many characters are unknown."""
    tab.set_value("#prompt", typed)

    assert tab.text("#prompt-about") == about


def test_unknown_characters_stay_one(tab: Tab) -> None:
    """The text written above goes to the roll with the same ids."""
    write(tab, "a\U0001f600b", 5)
    tab.click("#roll-mine")

    assert tab.evaluate("rollIds('roll-text')") == tab.evaluate("model.text")


def test_copies_the_link(tab: Tab) -> None:
    """The link goes to the clipboard; where that is forbidden, it is shown and selected."""
    write(tab)
    clipboard = "Object.defineProperty(navigator, 'clipboard', { configurable: true, value: { writeText: %s } })"
    tab.evaluate(clipboard % "async text => { window.copied = text; }" + "; 0")
    tab.click("#copy")
    tab.wait_for("$('live').textContent === 'The link is copied.'")
    assert tab.evaluate("copied === location.href && copied.includes('prompt=ab')")

    tab.evaluate(clipboard % "() => Promise.reject(new Error('no'))" + "; 0")
    tab.click("#copy")
    tab.wait_for("$('live').textContent.includes('Ctrl+C')")
    assert tab.evaluate("document.activeElement.id") == "link"
    assert tab.evaluate("getSelection().toString() === location.href || $('link').selectionEnd === location.href.length")


def test_tour(tab: Tab) -> None:
    """Eight stops one after the other, each read out; nothing moves until a reader asks for it."""
    titles = [tab.text("#stop h3")]
    for _ in range(7):
        tab.click("#stop-next")
        assert tab.evaluate("$('bar').getBoundingClientRect().bottom <= innerHeight + 1")
        assert tab.evaluate("document.activeElement.id") == "stop"
        titles.append(tab.text("#stop h3"))

    assert [title[:7] for title in titles] == [f"{i} of 8:" for i in range(1, 9)]
    assert tab.evaluate("document.getElementById('stop-next').disabled")
    assert tab.evaluate("model.text.length") == 0
    tab.click("#stop-back")
    assert tab.text("#stop h3") == titles[6]
    for hidden in (True, False):
        tab.click("#stop-hide")
        assert tab.evaluate("$('stop').hidden") == hidden
    tab.click("#stop-hide")
    tab.click("#stop-next")
    assert not tab.evaluate("$('stop').hidden")


def test_the_tour_follows_the_page(tab: Tab) -> None:
    """Sections come in the order of the page; those about writing are all in the first one."""
    sections = tab.evaluate(
        "STOPS.map(([, , place]) => [...document.querySelectorAll('section')].indexOf($(place).closest('section')))"
    )

    assert sections == [0, 0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("number", "focused", "place"),
    [
        (1, "prompt", "write"),
        (2, "text", "text-label"),
        (3, "temperature", "write"),
        (4, "text", "text-label"),
        (5, "layer", "attention-label"),
        (6, "lens-label", "lens-label"),
        (7, "stop-show", "roll-label"),
        (8, "after-label", "after-label"),
    ],
)
def test_stops_of_the_tour(number: int, focused: str, place: str, browser: Browser, page: Path) -> None:
    """Each stop shows its place, with what it needs there, and puts the focus where a reader goes on."""
    with browser.tab() as tab:
        tab.open(page, f"#prompt=ab&stop={number}")
        tab.wait_for(IDLE)
        assert tab.text("#stop h3").startswith(f"{number} of 8")
        tab.click("#stop-show")
        tab.wait_for(IDLE)

        assert tab.evaluate("document.activeElement.id") == focused
        assert tab.evaluate(f"(y => y > -1 && y < innerHeight)($('{place}').getBoundingClientRect().y)")
        assert (tab.evaluate("model.text.length") > 0) == (number in {2, 4, 5, 6})
        if number == 7:
            tab.wait_for(ROLLED)
            assert tab.evaluate("rollMode()") == "other"
        assert tab.complaints() == []


def test_a_link_keeps_the_moment(tab: Tab, browser: Browser, page: Path) -> None:
    """Whoever opens the address sees the same text, choice, settings and stop of the tour."""
    tab.set_value("#seed", "5")
    write(tab, "a <b>&#\n\U0001f600 %", 12)
    tab.click("#roll-mode [value=zeroed]")
    tab.set_value("#roll-text", "mine")
    tab.set_value("#layer", "1")
    tab.click("#stop-next")
    tab.click("#c9")
    tab.wait_for(INSIDE)
    shown = "[model.text, model.at, model.prompt, $('seed').value, $('prompt').value, $('roll-text').value, rollMode(), $('stop').textContent,"
    shown += "$('expected').textContent, $('attention-about').textContent, $('lens').textContent]"

    tab.wait_for("location.hash.includes('at=9&')")  # a moment later, if it has just changed
    with browser.tab() as other:
        other.open(page, tab.evaluate("location.hash"))
        other.wait_for(f"{IDLE} && {INSIDE}")
        assert other.evaluate(shown) == tab.evaluate(shown)
        assert other.complaints() == []


@pytest.mark.parametrize(
    "fragment",
    [
        "#prompt=<img src=x onerror=alert(1)>&read=<script>alert(1)</script>&text=<b>&at=1e9",
        "#prompt=%F0%9F%98%80&n=-5&t=NaN&k=1e99&seed=&speed=7&layer=99&head=-1&roll=__proto__&stop=constructor&at=-3",
        "#read=a&text=" + 3000 * "b" + "&at=x",
        "#%%%&&==",
    ],
)
def test_hostile_links(fragment: str, browser: Browser, page: Path) -> None:
    """An address is text and numbers: it makes no element, and the page works after it."""
    with browser.tab() as tab:
        tab.open(page, fragment)
        tab.wait_for(IDLE)
        assert tab.evaluate("document.querySelectorAll('img, b, main script').length") == 0
        write(tab, "ab", 5)

        assert tab.evaluate("model.text.length") == 7
        assert tab.complaints() == []


@pytest.mark.parametrize(
    "script",
    [
        "delete window.Worker; delete window.WebAssembly;",
        "window.Worker = class { constructor() { throw new DOMException('no', 'SecurityError'); } };",
        "window.Worker = class { constructor() { setTimeout(() => this.onerror({ preventDefault() {} }), 0); } };",
    ],
    ids=["none", "forbidden", "broken"],
)
def test_without_a_worker(script: str, browser: Browser, page: Path, tab: Tab) -> None:
    """The page's own thread computes the same text, and a pause is heard while it does."""
    write(tab)
    with browser.tab(script=script) as other:
        other.open(page)
        other.wait_for(IDLE)
        write(other)
        assert written(other) == written(tab)
        other.set_value("#count", "2000")
        other.evaluate("$('go').click(); setTimeout(() => $('pause').click(), 50); 0")
        other.wait_for(IDLE)

        assert 22 < other.evaluate("model.text.length") < 2022
        assert other.complaints() == []


def test_order_of_tab(tab: Tab) -> None:
    """All is reached by the tabulator."""
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    reached = []
    while (
        name := tab.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
    ) != "BODY":
        reached.append(name)
        tab.press("Tab")
    assert {"prompt", "count", "temperature", "top-k", "seed", "speed", "go", "step", "text", "layer", "head", "roll-go"} <= set(
        reached
    )


def test_keyboard(tab: Tab) -> None:
    """All is done by keys; the focus is never lost."""
    tab.set_value("#count", "20")
    tab.evaluate("$('prompt').focus()")
    tab.press(*"ab")
    tab.evaluate("$('go').focus()")
    tab.press("Enter")
    tab.wait_for(f"{IDLE} && model.text.length")
    assert tab.evaluate("document.activeElement.id") == "go"
    assert written(tab).startswith("the history of ab")

    tab.evaluate("$('text').focus()")
    for key, at in {"Home": 0, "ArrowRight": 1, "ArrowDown": 21, "ArrowLeft": 20, "ArrowUp": 0, "End": 37}.items():
        tab.press(key)
        assert tab.evaluate("model.at") == at
        assert tab.evaluate("$('text').getAttribute('aria-activedescendant')") == f"c{at}"
        assert tab.evaluate("$('live').textContent === $('expected-about').textContent")
    tab.press("Tab", " ")
    tab.wait_for(f"{IDLE} && model.text.length > 50")
    assert tab.evaluate("document.activeElement.id") == "text"


def test_keys_of_the_browser(tab: Tab) -> None:
    """With a modifier an arrow key is left to the browser, whose shortcut it is."""
    write(tab)
    before = tab.evaluate("model.at")
    for modifier in ("altKey", "ctrlKey", "metaKey"):
        event = f"new KeyboardEvent('keydown', {{ key: 'ArrowLeft', {modifier}: true, bubbles: true, cancelable: true }})"
        assert tab.evaluate(f"$('text').dispatchEvent({event})")
    assert tab.evaluate("model.at") == before


def test_a_held_key(tab: Tab) -> None:
    """Browsers refuse an address that changes too often: it follows a little later, and a copied link is always of now."""
    write(tab, count=300)
    tab.evaluate("for (let i = 0; i < 250; i++) select(i)")
    tab.wait_for("location.hash.includes('at=249&')")
    tab.evaluate("select(7); void copyLink()")
    assert tab.evaluate("location.hash.includes('at=7&')")


def test_a_link_is_not_replaced_before_it_is_read(browser: Browser, page: Path) -> None:
    """Whoever presses a button while the model loads does not lose the text of the link."""
    with browser.tab(script="addEventListener('DOMContentLoaded', () => document.getElementById('stop-next')?.click())") as tab:
        tab.open(page, "#prompt=ab&read=ab&text=cde&at=3")
        tab.wait_for(f"{IDLE} && model.text.length === 5")
        assert tab.complaints() == []


def test_places_between_characters(browser: Browser, page: Path) -> None:
    """Numbers of a link or a field that should be whole are rounded."""
    with browser.tab() as tab:
        tab.open(page, "#prompt=ab&read=ab&text=cde&at=2.6&stop=1.6")
        tab.wait_for(f"{IDLE} && model.text.length === 5 && model.at === 3")
        assert tab.evaluate("$('stop').textContent").startswith("2 of 8")
        tab.set_value("#count", "2.5")
        tab.click("#go")
        tab.wait_for(f"{IDLE} && model.text.length > 5")
        assert tab.evaluate("$('live').textContent").startswith("Wrote 3 characters")
        assert tab.complaints() == []


def test_a_pause_before_the_first_character(tab: Tab) -> None:
    """What comes next can be chosen as soon as the text is cut."""
    write(tab)
    tab.evaluate("cut(5); select(5)")
    assert tab.evaluate("$('text').getAttribute('aria-activedescendant')") == "c5"
    assert tab.evaluate("$('c5').className") == "next"


def test_windows_of_an_earlier_reading(tab: Tab) -> None:
    """What a reading that was overtaken still sends is not taken for the new one's."""
    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    before = tab.evaluate("$('roll-live').textContent")
    tab.evaluate(
        "windows = {}; showWindow({ reading: reading - 1, mode: 'as is', index: 0 }); sumUpRoll({ reading: reading - 1, mode: 'as is' })"
    )
    assert tab.evaluate("Object.keys(windows).length") == 0
    assert tab.evaluate("$('roll-live').textContent") == before


def test_a_failure_is_said(tab: Tab) -> None:
    """A model that has failed leaves no button that would do nothing, and a screen reader hears of it."""
    tab.evaluate("fail()")
    assert tab.evaluate("[...document.querySelectorAll('#go, #step, #pause, #clear, #roll-go')].every(button => button.disabled)")
    assert tab.evaluate("[$('state').textContent, $('live').textContent]") == ["The model has failed. Load the page again."] * 2


def test_names(tab: Tab) -> None:
    """Each field and button has a name, and each table and picture says what it shows."""
    write(tab)
    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    fields = "[...document.querySelectorAll('input, select, textarea')].filter(field => !field.labels.length).length"
    buttons = "[...document.querySelectorAll('button')].filter(button => !button.textContent.trim()).length"
    pictures = "[...document.querySelectorAll('canvas, svg')].filter(picture => !picture.getAttribute('aria-label')).length"

    assert [tab.evaluate(count) for count in (fields, buttons, pictures)] == [0, 0, 0]
    assert tab.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    assert tab.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size === document.querySelectorAll('[id]').length"
    )


def test_live_regions_get_whole_sentences(tab: Tab) -> None:
    """What is said begins with a capital and ends with a full stop, and writing says no character by itself."""
    write(tab, count=40)
    tab.click("#step")
    tab.wait_for(IDLE)
    tab.click("#c10")
    tab.click("#roll-go")
    tab.wait_for(ROLLED)
    tab.click("#clear")
    said = [text for text in tab.evaluate("said") if text]

    assert len(said) < 12
    assert [text for text in said if not re.fullmatch(r"[A-Z].*\.", text, re.DOTALL)] == []
    assert tab.evaluate(
        "[...document.querySelectorAll('[role=status]')].every(region => region.getAttribute('aria-live') === 'polite')"
    )


def test_reduced_motion(browser: Browser, page: Path) -> None:
    """Who has asked for less motion gets none: no animation, no transition, and no smooth scrolling."""
    with browser.tab(media=("prefers-reduced-motion", "reduce")) as tab:
        tab.open(page)
        tab.wait_for(IDLE)
        write(tab)
        moving = """[...document.querySelectorAll("*")].map(element => getComputedStyle(element)).filter(style =>
          style.animationName !== "none" || style.transitionDuration !== "0s" || style.scrollBehavior !== "auto").length"""

        assert tab.evaluate("document.getAnimations().length") == 0
        assert tab.evaluate(moving) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, browser: Browser, page: Path) -> None:
    """All text stands out by at least 4.5 to 1 (WCAG 2.2, 1.4.3), also on the darkest shade and on the blue button."""
    with browser.tab(media=("prefers-color-scheme", scheme)) as tab:
        tab.open(page)
        names = ("ink", "soft", "page", "card", "blue", "red", "on-blue")
        colours = {
            name: tab.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')") for name in names
        }
    shade = 0.45 * channels(colours["blue"]) + 0.55 * channels(colours["card"])

    for front in ("ink", "soft", "blue", "red"):
        for back in ("page", "card"):
            assert contrast(channels(colours[front]), channels(colours[back])) >= 4.5, (front, back)
    assert contrast(channels(colours["ink"]), shade) >= 4.5
    assert contrast(channels(colours["on-blue"]), channels(colours["blue"])) >= 4.5


def channels(colour: str) -> Floats:
    """Return red, green and blue from 0 to 1."""
    digits = colour.strip().removeprefix("#")
    return np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)], np.float32)


def contrast(one: Floats, other: Floats) -> float:
    """Return the ratio of two colours' luminances, as WCAG defines it."""
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722] for c in (one, other)]
    return float((max(linear) + 0.05) / (min(linear) + 0.05))


@pytest.mark.parametrize("width", [360, 1280])
def test_width(width: int, browser: Browser, page: Path, tmp_path: Path) -> None:
    """With all its tables filled the page is no wider than the window, and no text is cut off. A picture of it is kept."""
    with browser.tab(width=width, height=740) as tab:
        tab.open(page)
        tab.wait_for(IDLE)
        write(tab, count=100)
        tab.click("#roll-mode [value=zeroed]")
        tab.click("#roll-go")
        tab.wait_for(ROLLED)
        tab.click("#roll-mode [value=other]")
        tab.wait_for(ROLLED)
        assert tab.evaluate("$('roll-table').tHead.rows[0].cells.length") == 5
        tab.click("#c40")
        tab.wait_for(INSIDE)
        tab.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        wide = "[...document.querySelectorAll('body *')].filter(element => element.getBoundingClientRect().right > innerWidth + 0.5 && !element.closest('.scroll, .skip')).map(element => element.outerHTML.slice(0, 80))"

        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate(wide) == []
        assert tab.evaluate("$('bar').getBoundingClientRect().height") < 740 * 0.45
        assert tab.evaluate("document.querySelector('svg').getBoundingClientRect().right <= innerWidth")
        assert tab.evaluate("[...$('lens').querySelectorAll('th, td')].every(cell => cell.getBoundingClientRect().width > 0)")
        for table in ("#expected", "#lens", "#roll-table", ".figures"):
            fits = "(table => table.scrollWidth <= table.closest('.scroll').clientWidth)"
            assert tab.evaluate(f"{fits}(document.querySelector('{table}'))"), table
        (tmp_path / "page.png").write_bytes(tab.screenshot())
        assert tab.complaints() == []


def test_another_alphabet(browser: Browser, tmp_path: Path) -> None:
    """A model of another alphabet reads capitals, letters and emoji of its own as they are, and writes them."""
    alphabet = Alphabet.of("Жж Aa\U0001f600" + "".join(map(chr, range(0x4E00, 0x4E00 + 300))), "text")
    config = dataclasses.replace(TINY, vocab_size=alphabet.vocab_size)
    text = TextConfig(fold=True, alphabet=alphabet, ids=tuple(alphabet.text_ids))
    path = tmp_path / "other.html"
    path.write_text(render_model_page(view(config=config, arrays=arrays_of(config), text=text)), encoding="utf-8")
    prompt = "Жж Aáb\U0001f600"
    with browser.tab(script=SENTENCES) as tab:
        tab.open(path)
        tab.wait_for(IDLE)
        first = tab.evaluate("['prompt', 'roll-text', 'roll-other'].map(id => $(id).value)")
        ids = tab.evaluate(f"encode({prompt!r})")
        write(tab, prompt)

        assert first == ["", "", ""]  # it does not know the letters of the usual texts
        assert ids == TextEncoder(fold=True, alphabet=alphabet).encode(prompt).tolist()
        assert written(tab).startswith("Жж Aa<?>\U0001f600")
        assert len(tab.evaluate("model.text")) == len(prompt) + 20
        assert set(written(tab).replace("<?>", "")) <= set(alphabet.characters)
        assert tab.complaints() == []
