"""The progress line: in place on a terminal, now and then in a file."""

import io

from tiny_onn.inference.predict import Progress
from tiny_onn.inference.progress import ProgressPrinter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_line_at_once_and_then_every_ten_seconds():
    stream, now = io.StringIO(), [0.0]
    printer = ProgressPrinter(stream, clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        printer(Progress(second, 100, float(second), 75.0, 1))
    printer.finish()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/100", "10/100", "20/100"]
    assert "ETA 1:15" in lines[0] and "\r" not in stream.getvalue()


def test_a_terminal_line_is_rewritten_in_place():
    stream, now = Terminal(), [0.0]
    printer = ProgressPrinter(stream, clock=lambda: now[0])
    printer(Progress(1, 2, 100.0, 100.0, 0))
    now[0] = 1.0
    printer(Progress(2, 2, 1.0, 0.0, 0))
    printer.finish()
    text = stream.getvalue()
    assert text.count("\r") == 2 and text.endswith("\n") and text.count("\n") == 1
    first, second = text.rstrip("\n").split("\r")[1:]
    assert len(second) == len(first)
