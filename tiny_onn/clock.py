"""Seconds as people read them on a clock."""

from __future__ import annotations


def clock_text(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss; below 0 as 0:00, ``None`` (unknown) as ``-:--``."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
