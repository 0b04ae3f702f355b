import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tiny_onn.arc.report import (
    AttemptInfo,
    output_outcome,
    render_report,
    task_outcome,
    wrong_cells,
)
from tiny_onn.arc.score import score_submission
from tiny_onn.arc.task import Pair, Task
from tiny_onn.errors import UserError


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


TRUTH = np.arange(20, dtype=np.uint8).reshape(4, 5) % 10


def with_wrong(count):
    attempt = TRUTH.copy()
    flat = attempt.reshape(-1)
    flat[:count] = (flat[:count] + 1) % 10
    return attempt.tolist()


def task(task_id="t", num_tests=1):
    return Task(task_id, "test", (Pair(grid([1, 2]), grid([3])),), (TRUTH,) * num_tests)


def answer(first, second):
    return {"attempt_1": first, "attempt_2": second}


def data_of(path):
    text = path.read_text(encoding="utf-8")
    block = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    return json.loads(block.group(1))


def test_wrong_cells_are_counted_only_at_equal_size():
    assert wrong_cells(TRUTH.tolist(), TRUTH) == 0
    assert wrong_cells(with_wrong(3), TRUTH) == 3
    assert wrong_cells(TRUTH[:3].tolist(), TRUTH) is None
    assert wrong_cells(TRUTH.T.tolist(), TRUTH) is None


@pytest.mark.parametrize(
    ("attempts", "outcome"),
    [
        ([with_wrong(20), with_wrong(0)], "solved"),
        ([with_wrong(2), with_wrong(20)], "near"),
        ([with_wrong(20), with_wrong(2)], "near"),
        ([with_wrong(3), with_wrong(20)], "unsolved"),
        ([TRUTH[:3].tolist(), TRUTH[:, :4].tolist()], "unsolved"),
        ([], "unsolved"),
    ],
)
def test_outcome_follows_the_better_attempt_and_ten_percent_is_still_near(attempts, outcome):
    assert output_outcome(attempts, TRUTH) == outcome
    assert output_outcome(attempts, None) == "unknown"


@pytest.mark.parametrize(
    ("outputs", "outcome"),
    [
        (["solved", "solved"], "solved"),
        (["solved", "near"], "near"),
        (["near", "unsolved"], "unsolved"),
        (["solved", "unsolved"], "unsolved"),
        (["unknown", "unknown"], "unknown"),
    ],
)
def test_a_task_is_as_good_as_its_worst_output(outputs, outcome):
    assert task_outcome(outputs) == outcome
    assert task_outcome(outputs[::-1]) == outcome


def test_counts_returned_equal_those_on_the_page(tmp_path):
    tasks = [task("a"), task("b", 2), task("c"), task("d")]
    submission = {
        "a": [answer(with_wrong(0), with_wrong(9))],
        "b": [answer(with_wrong(1), with_wrong(9)), answer(with_wrong(9), with_wrong(0))],
        "c": [answer(with_wrong(9), with_wrong(9))],
        "d": [answer(with_wrong(9), with_wrong(9))],
    }
    truths = {"a": (TRUTH,), "b": (TRUTH, TRUTH), "c": (TRUTH,)}
    counts = render_report(tmp_path / "r.html", tasks, submission, truths=truths)
    assert counts == {"solved": 1, "near": 1, "unsolved": 1, "unknown": 1}
    data = data_of(tmp_path / "r.html")
    assert data["counts"] == counts
    assert [t["outcome"] for t in data["tasks"]] == ["solved", "near", "unsolved", "unknown"]
    assert [t["id"] for t in data["tasks"]] == ["a", "b", "c", "d"]
    assert [a["wrong"] for a in data["tasks"][1]["tests"][0]["attempts"]] == [1, 9]
    assert [a["wrong"] for a in data["tasks"][3]["tests"][0]["attempts"]] == [None, None]


def test_grids_and_details_arrive_unchanged(tmp_path):
    submission = {"t": [answer([[1, 2], [3, 4]], [[5]])]}
    details = {"t": [[AttemptInfo(3, 16, -2.25), AttemptInfo(0, 16, None, "no valid grid")]]}
    render_report(
        tmp_path / "r.html",
        [task()],
        submission,
        truths={"t": (grid([1, 2], [3, 5]),)},
        details=details,
        facts={"Views": "16"},
    )
    data = data_of(tmp_path / "r.html")
    (record,) = data["tasks"]
    assert record["demos"] == [["12", "3"]]
    (test,) = record["tests"]
    assert test["truth"] == "12/35"
    first, second = test["attempts"]
    assert (first["grid"], first["wrong"], first["votes"], first["views"]) == ("12/34", 1, 3, 16)
    assert (first["logprob"], first["reason"]) == (-2.25, "")
    assert (second["grid"], second["wrong"], second["logprob"]) == ("5", -1, None)
    assert second["reason"] == "no valid grid"
    assert data["facts"] == [["Views", "16"]]


def test_an_infinite_or_numpy_logprob_does_not_break_the_page(tmp_path):
    details = {"t": [[AttemptInfo(1, 2, float("-inf")), AttemptInfo(1, 2, np.float32(-1.5))]]}
    render_report(tmp_path / "r.html", [task()], {"t": [answer([[1]], [[2]])]}, details=details)
    first, second = data_of(tmp_path / "r.html")["tasks"][0]["tests"][0]["attempts"]
    assert (first["logprob"], second["logprob"]) == (None, -1.5)


def test_what_is_missing_or_malformed_is_shown_as_such(tmp_path):
    tasks = [task("gone"), task("half", 2), task("bad")]
    submission = {"half": [{"attempt_1": [[1]]}], "bad": [answer([[1], [2, 3]], [["4"]])]}
    truths = {t.id: (TRUTH,) * len(t.test_inputs) for t in tasks}
    counts = render_report(tmp_path / "r.html", tasks, submission, truths=truths)
    assert counts["unsolved"] == 3
    gone, half, bad = data_of(tmp_path / "r.html")["tasks"]
    assert [a["note"] for a in gone["tests"][0]["attempts"]] == ["missing", "missing"]
    assert half["tests"][0]["attempts"][0]["grid"] == "1"
    assert half["tests"][0]["attempts"][1]["note"] == "missing"
    assert half["tests"][1]["attempts"][0]["note"] == "missing"
    assert bad["tests"][0]["attempts"][0]["note"].startswith("malformed: row 1")
    assert bad["tests"][0]["attempts"][1]["grid"] is None


def test_score_rows_are_those_of_the_scorer(tmp_path):
    truths = {"a": (TRUTH, TRUTH), "b": (TRUTH,)}
    right, wrong = TRUTH.tolist(), [[0]]
    submission = {"a": [answer(right, wrong), answer(wrong, wrong)], "b": [answer(wrong, right)]}
    score = score_submission(submission, truths)
    render_report(tmp_path / "r.html", [task("a", 2), task("b")], submission, score, truths)
    rows = data_of(tmp_path / "r.html")["score"]
    assert [row[0] for row in rows] == ["Task mean", "Per output", "Strict"]
    assert [row[2:] for row in rows] == [
        pytest.approx([1 / 4, 3 / 4]),
        pytest.approx([1 / 3, 2 / 3]),
        pytest.approx([0, 1 / 2]),
    ]


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_is_self_contained(tmp_path):
    hostile = {"Note": "</script><script>alert(1)</script><!-- /*STYLE*/"}
    render_report(tmp_path / "r.html", [task()], {}, facts=hostile)
    parser = Elements()
    parser.feed((tmp_path / "r.html").read_text(encoding="utf-8"))
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 2
    assert not {"link", "img", "iframe", "object"} & set(tags)
    for _, attributes in parser.found:
        assert not {"src", "href", "srcset"} & set(attributes)
    assert data_of(tmp_path / "r.html")["facts"] == [["Note", hostile["Note"]]]
    policy = next(a["content"] for t, a in parser.found if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_the_page_is_written_atomically_or_not_at_all(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(UserError, match="task 't': got 2 solutions, expected 1"):
        render_report(path, [task()], {}, truths={"t": (TRUTH, TRUTH)})
    assert path.read_text() == "old"
    with pytest.raises(UserError, match="cannot write"):
        render_report(tmp_path / "absent" / "r.html", [task()], {})
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
