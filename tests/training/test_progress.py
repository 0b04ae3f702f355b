import io

from tiny_onn.training.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


FACTS = {
    "share": 0.5,
    "step": 12,
    "loss": 1.5,
    "tokens_per_s": 12345.0,
    "lr": 0.01,
    "elapsed": 61.0,
    "left": 3700.0,
}


def test_a_pipe_gets_whole_lines_at_most_every_ten_seconds():
    now = [0.0]
    stream = io.StringIO()
    line = ProgressLine(stream=stream, clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        if line.due():
            line.show(**FACTS)
    assert stream.getvalue().count("\n") == 3
    first = stream.getvalue().splitlines()[0]
    for part in (
        "50.0%",
        "step 12",
        "loss 1.5000",
        "12,345 tok/s",
        "1.00e-02",
        "1:01 < 1:01:40",
    ):
        assert part in first


def test_a_terminal_is_rewritten_in_place_and_cleared():
    stream = Terminal()
    line = ProgressLine(stream=stream, clock=lambda: 0.0)
    line.show(**FACTS)
    line.show(**{**FACTS, "loss": None, "left": None})
    line.close()
    text = stream.getvalue()
    assert text.count("\r") == 2 and text.count("\n") == 1
    lengths = [len(part) for part in text.strip("\n").split("\r")[1:]]
    assert lengths[1] >= lengths[0]  # the shorter line covers the longer one


def test_a_disabled_line_writes_nothing():
    stream = io.StringIO()
    line = ProgressLine(enabled=False, stream=stream)
    assert not line.due()
    line.show(**FACTS)
    assert stream.getvalue() == ""
