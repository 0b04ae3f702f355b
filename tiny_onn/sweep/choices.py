"""What is asked of a comparison of trainings on its command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tiny_onn.config.keys import suggestion
from tiny_onn.errors import UserError


def choose_arms(text: str, known: Iterable[str]) -> list[str]:
    """ "dense,nsa" -> ["dense", "nsa"], in the order of ``known``.

    Raises:
        UserError: an unknown name, or none.
    """
    known = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(
                f"unknown arm '{name}'; expected some of {', '.join(known)}; "
                + suggestion(name, known, "choose from them")
            )
    if not names:
        raise UserError("got no arm in --arms; expected some of " + ", ".join(known) + "; name one")
    return [name for name in known if name in names]


def choose_seeds(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2], each once.

    Raises:
        UserError: something that is no whole number of at least 0, or nothing.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(re.fullmatch(r"\d{1,9}", word) for word in words):
        raise UserError(
            f"got --seeds {text or '(empty)'}; expected whole numbers of at least 0, such as "
            "0,1,2; change it"
        )
    return list(dict.fromkeys(int(word) for word in words))


def check_cores(threads: int, jobs: int, timed: bool, cores: int) -> None:
    """Runs that share a core take minutes from each other (``timed``: that is their budget).

    Raises:
        UserError: fewer than 1 of either, or under minutes more threads than cores.
    """
    for name, value in (("--threads", threads), ("--jobs", jobs)):
        if value < 1:
            raise UserError(f"got {name} {value}; expected a whole number of at least 1; change it")
    if timed and threads * jobs > cores:
        raise UserError(
            f"got --threads {threads} --jobs {jobs}, {threads * jobs} threads; expected at most "
            f"the {cores} cores of this machine, or runs take minutes from each other; give fewer, "
            "or a budget that is none of time"
        )


def check_overrides(words: list[str], tag: str, own_keys: Sequence[str]) -> None:
    """Settings of the user's own are allowed under a name, and not those that make an experiment
    what it is (``own_keys``, keys and groups).

    Raises:
        UserError: no or a bad tag, or a key that is not free.
    """
    if bool(words) != bool(tag):
        got = f"settings {' '.join(words)} without --tag" if words else f"--tag {tag} alone"
        raise UserError(
            f"got {got}; expected both: the tag keeps the results of other settings apart; "
            "give --tag NAME key=value"
        )
    if tag and not re.fullmatch(r"[A-Za-z0-9.-]{1,40}", tag):
        raise UserError(f"got --tag {tag}; expected letters, digits, points and hyphens; change it")
    for word in words:
        key = word.partition("=")[0]
        if any(key == own or key.startswith(f"{own}.") for own in own_keys):
            raise UserError(
                f"got {word}; expected settings that leave the experiment what it is (not "
                f"{', '.join(own_keys)}); leave it out"
            )
