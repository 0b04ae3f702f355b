"""The report in a real browser (the fixture ``browser``): what is shown, keys, clicks, pixels."""

import numpy as np
import pytest

from tiny_onn.arc.report import AttemptInfo, render_report
from tiny_onn.arc.score import score_submission
from tiny_onn.arc.task import Pair, Task


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


def answer(first, second):
    return {"attempt_1": first.tolist(), "attempt_2": second.tolist()}


TRUTH = np.arange(20, dtype=np.uint8).reshape(4, 5) % 10
OFF_BY_2 = TRUTH.copy()
OFF_BY_2[1, 2], OFF_BY_2[3, 0] = 0, 3
OFF_BY_9 = TRUTH.copy()
OFF_BY_9.reshape(-1)[:9] = 9
SMALLER = TRUTH[:3]
BIG = np.tile(np.arange(30, dtype=np.uint8) % 10, (30, 1))


def task(task_id, *test_inputs):
    pair = Pair(grid([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]), grid([9]))
    return Task(task_id, "test", (pair, Pair(grid([1]), grid([2, 3]))), test_inputs or (TRUTH,))


TASKS = [
    task("aa-first"),
    task("bb-second", TRUTH, TRUTH),
    task("cc-near"),
    task("dd-half", TRUTH, TRUTH),
    task("ee-wrong-size"),
    task("ff-no-truth", BIG),
]
SUBMISSION = {
    "aa-first": [answer(TRUTH, OFF_BY_9)],
    "bb-second": [answer(OFF_BY_9, TRUTH), answer(TRUTH, SMALLER)],
    "cc-near": [answer(OFF_BY_2, OFF_BY_9)],
    "dd-half": [answer(TRUTH, OFF_BY_2), answer(OFF_BY_9, OFF_BY_9)],
    "ee-wrong-size": [answer(SMALLER, OFF_BY_9)],
    "ff-no-truth": [answer(BIG, 9 - BIG)],
}
TRUTHS = {t.id: tuple(TRUTH for _ in t.test_inputs) for t in TASKS[:-1]}
DETAILS = {
    "aa-first": [[AttemptInfo(12, 16, -1.5), AttemptInfo(0, 16, None, "no valid grid")]],
}
FACTS = {
    "Checkpoint": "runs/" + "a-very-long-name-without-any-blank-" * 4,
    "Script": "</script><b id=injected>",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    score = score_submission(SUBMISSION, TRUTHS)
    counts = render_report(path, TASKS, SUBMISSION, score, TRUTHS, DETAILS, FACTS)
    assert counts == {"solved": 2, "near": 1, "unsolved": 2, "unknown": 1}
    return path


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", [t.id for t in TASKS]),
        ("#filter=solved", ["aa-first", "bb-second"]),
        ("#filter=near", ["cc-near"]),
        ("#filter=unsolved", ["dd-half", "ee-wrong-size"]),
        ("#filter=unknown", ["ff-no-truth"]),
        ("#filter=unsolved&q=HALF", ["dd-half"]),
        ("#filter=nonsense", [t.id for t in TASKS]),
        ("#q=nothing-like-it", []),
    ],
)
def test_the_address_decides_which_tasks_are_shown(browser, page, address, expected):
    browser.open(page, address)
    got = browser.ask("""return {ids: shownIds(), shown: $("#shown")[0].textContent,
        empty: visible($("#empty")[0]), pressed: $("#filters [aria-pressed=true]").length};""")
    assert got["ids"] == expected
    assert got["shown"].startswith(f"{len(expected)} task")
    assert got["empty"] == (not expected)
    assert got["pressed"] == 1
    assert browser.problems == []


def test_filter_buttons_show_counts_and_filter_when_clicked(browser, page):
    browser.open(page)
    labels = browser.ask("""return $("#filters button").map((b) => b.textContent);""")
    assert labels == ["All6", "Solved2", "Near miss1", "Unsolved2", "No truth1"]
    for name, number in (("solved", 2), ("near", 1), ("unsolved", 2), ("unknown", 1), ("all", 6)):
        browser.click(f"#filters [data-filter={name}]")
        shown, address = browser.ask("return [shownIds().length, location.hash];")
        assert (shown, address) == (number, "" if name == "all" else f"#filter={name}")
    assert browser.problems == []


def test_keyboard_steps_and_filters(browser, page):
    browser.open(page)
    expected = [
        ("j", 6, "aa-first"),
        ("j", 6, "bb-second"),
        ("k", 6, "aa-first"),
        ("1", 2, ""),
        ("2", 1, ""),
        ("3", 2, ""),
        ("j", 2, "dd-half"),
        ("j", 2, "ee-wrong-size"),
        ("j", 2, "ee-wrong-size"),
        ("k", 2, "dd-half"),
        ("4", 1, ""),
        ("0", 6, ""),
    ]
    for key, number, current in expected:
        browser.press(key)
        got = browser.ask(
            "const current = $('.task.current h2').map((node) => node.textContent);"
            "return [shownIds().length, current.join()];"
        )
        assert got == [number, current], f"after {key}"
    assert browser.problems == []


def test_stepping_through_all_tasks_visits_each_once_and_keeps_it_in_view(browser, page):
    browser.open(page)
    seen = []
    for _ in TASKS:
        browser.press("j")
        name, top = browser.ask("""const node = $(".task.current")[0];
            return [node.querySelector("h2").textContent, node.getBoundingClientRect().top];""")
        bar = browser.ask("""return $("#bar")[0].getBoundingClientRect().bottom;""")
        assert bar <= top < browser.DESKTOP[1] * 0.75
        seen.append(name)
    assert seen == [t.id for t in TASKS]


def test_help_search_and_theme_by_key(browser, page):
    browser.open(page)
    browser.press("?")
    shown = browser.ask("""return visible($("#help")[0]) ? $("#help")[0].innerText : "";""")
    assert "next, previous task" in shown
    browser.press("1")
    assert browser.ask("return shownIds().length;") == 6, "keys act behind the open help"
    browser.click("#help .close")
    assert browser.ask("""return visible($("#help")[0]);""") is False
    browser.press("/")
    for key in "dd":
        browser.press(key)
    assert browser.ask("return [shownIds(), location.hash];") == [["dd-half"], "#q=dd"]
    browser.press("j")
    assert browser.ask("""return $("#search")[0].value;""") == "ddj"
    browser.open(page, dark=True)
    paper = """return getComputedStyle(document.body).backgroundColor;"""
    dark = browser.ask(paper)
    browser.press("t")
    assert (dark, browser.ask(paper)) == ("rgb(19, 20, 22)", "rgb(246, 246, 244)")


def test_wrong_cells_are_crossed_and_right_ones_are_not(browser, page):
    white, black, green, yellow = [255] * 3, [0] * 3, [0x4F, 0xCC, 0x30], [0xFF, 0xDC, 0]
    browser.open(page, "#task=cc-near")
    ask = """const canvas = $("#task-cc-near .attempt canvas")[0];
        return [[2, 1], [0, 3], [4, 0]].map(([x, y]) => pixel(canvas, x, y, 5, 4));"""
    assert browser.ask(ask) == [white, white, yellow]
    browser.press("m")
    assert browser.ask(ask) == [black, green, yellow]
    got = browser.ask("""const attempts = $("#task-cc-near .attempt");
        return {wrong: attempts.map((node) => node.dataset.wrong), text: attempts[0].innerText,
            sized: $("#task-ee-wrong-size .attempt")[0].innerText,
            halves: $("#task-dd-half > header")[0].innerText};""")
    assert got["wrong"] == ["2", "9"]
    assert "✗ 2 wrong cells" in got["text"]
    assert "✗ size, expected 4×5" in got["sized"]
    assert "1 of 2 tests right" in got["halves"]
    assert browser.problems == []


def test_all_ten_colours_are_the_official_ones(browser, page):
    browser.open(page)
    seen = browser.ask("""const canvas = $("#task-aa-first .pair canvas")[0];
        return [...Array(10).keys()].map((c) => pixel(canvas, c % 5, Math.floor(c / 5), 5, 2));""")
    official = "#000000 #1e93ff #f93c31 #4fcc30 #ffdc00 #999999 #e53aa3 #ff851b #87d8f1 #921231"
    assert " ".join("#" + bytes(rgb).hex() for rgb in seen) == official


def test_truth_votes_fallbacks_scores_and_facts_are_on_the_page(browser, page):
    browser.open(page)
    got = browser.ask("""return {first: $("#task-aa-first .test")[0].innerText,
        unknown: $("#task-ff-no-truth .test")[0].innerText,
        bar: $("#task-aa-first .votes i")[0].style.width,
        score: $("#score")[0].innerText, facts: $("#facts")[0].innerText,
        injected: $("#injected").length};""")
    assert "Truth 4×5" in got["first"] and "✓ right" in got["first"]
    assert "12 of 16 votes (75%)" in got["first"] and "log-likelihood −1.50" in got["first"]
    assert "fallback: no valid grid" in got["first"]
    assert got["bar"] == "75%"
    assert "Truth" not in got["unknown"] and "wrong" not in got["unknown"]
    # task mean pass@2: (1 + 1 + 0 + 1/2 + 0) / 5; per output: 4 of 7; strict: 2 of 5
    for figure in ("50.0%", "57.1%", "40.0%", "4 of 7 outputs", "2 of 5 tasks"):
        assert figure in got["score"]
    assert "</script><b id=injected>" in got["facts"]
    assert got["injected"] == 0
    assert browser.problems == []


def test_the_page_refuses_any_network(browser, page, tmp_path):
    """A foreign image put into a copy of the page is blocked by its policy, and reported."""
    intruder = '<img src="http://127.0.0.1:9/pixel.png"></body>'
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", intruder), "utf-8")
    browser.open(copy)
    assert any("Content Security Policy" in problem for problem in browser.problems)
    assert browser.ask("""return $("img")[0].naturalWidth;""") == 0


@pytest.mark.parametrize("address", ["", "#filter=unsolved", "#filter=unknown"])
def test_a_phone_needs_no_horizontal_scrolling(browser, page, address):
    browser.open(page, address, browser.PHONE)
    got = browser.ask("""
        const beyond = $("body *").filter((node) => visible(node) && !node.closest(".filters")
            && node.getBoundingClientRect().right > innerWidth + 0.5);
        const pressed = $("#filters [aria-pressed=true]")[0].getBoundingClientRect();
        const texts = $("body *").filter((node) => visible(node) && node.innerText?.trim());
        return {width: innerWidth, scroll: document.documentElement.scrollWidth,
            beyond: beyond.map((node) => `${node.tagName}.${node.className}`),
            pressed: pressed.left >= 0 && pressed.right <= innerWidth,
            smallest: Math.min(...texts.map((n) => parseFloat(getComputedStyle(n).fontSize)))};""")
    assert (got["width"], got["scroll"]) == (390, 390)
    assert got["beyond"] == []
    assert got["pressed"] is True
    assert got["smallest"] >= 12
    assert browser.problems == []


def test_a_task_in_the_address_is_scrolled_into_view_and_drawn(browser, page):
    browser.open(page, "#task=ee-wrong-size")
    got = browser.ask("""const box = $("#task-ee-wrong-size")[0].getBoundingClientRect();
        return {top: box.top >= 0 && box.top < innerHeight / 2, scrolled: scrollY > 0,
            current: $(".task.current").map((node) => node.id),
            drawn: pixel($("#task-ee-wrong-size canvas")[0], 1, 0, 5, 2)};""")
    current = ["task-ee-wrong-size"]
    blue = [0x1E, 0x93, 0xFF]
    assert got == {"top": True, "scrolled": True, "current": current, "drawn": blue}


def test_four_hundred_large_tasks_appear_quickly_and_are_drawn_lazily(browser, tmp_path):
    pairs = tuple(Pair(BIG, BIG) for _ in range(4))
    tasks = [Task(f"{number:08x}", "test", pairs, (BIG,)) for number in range(400)]
    submission = {t.id: [answer(BIG, 9 - BIG)] for t in tasks}
    path = tmp_path / "large.html"
    render_report(path, tasks, submission, truths={t.id: (BIG,) for t in tasks})
    browser.open(path)
    milliseconds = browser.ask(
        """return performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd;"""
    )
    assert milliseconds < 5000, "about 300 on two idle cores"
    drawn = "const drawn = (canvas) => canvas.width !== 300 && canvas.width > 0;"
    got = browser.ask(
        drawn
        + """return [$("canvas").length, $("canvas").filter(drawn).length,
        drawn($("#task-00000000 canvas")[0])];"""
    )
    assert got[0] == 400 * 12 and got[1] < 200 and got[2] is True
    got = browser.ask(
        drawn
        + """$("#task-0000018f")[0].scrollIntoView(); await frames();
        return [pixel($("#task-0000018f canvas")[0], 1, 0, 30, 30),
            drawn($("#task-00000000 canvas")[0]), $("canvas").filter(drawn).length];"""
    )
    assert got[0] == [0x1E, 0x93, 0xFF]
    assert got[1] is False and got[2] < 200
