import errno
import subprocess
import sys
import textwrap

import pytest
import torch

from tiny_onn.errors import UserError
from tiny_onn.training import resume
from tiny_onn.training.resume import (
    NEWEST,
    PREVIOUS,
    STATE_KEY,
    AtomicCheckpointIO,
    find_resume,
    remove_leftovers,
    remove_resume,
)


def checkpoint(step):
    return {
        "state_dict": {"w": torch.full((1000,), float(step))},
        STATE_KEY: {"step": step},
    }


def write(folder, *steps):
    files = AtomicCheckpointIO()
    for step in steps:
        files.save_checkpoint(checkpoint(step), folder / NEWEST)
        assert files.failure is None


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
    assert find_resume(tmp_path) == (None, [])


def test_the_newest_is_used_and_the_one_before_it_is_kept(tmp_path):
    write(tmp_path, 1, 2, 3)
    point, notes = find_resume(tmp_path)
    assert (point.state["step"], notes) == (3, [])
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)[STATE_KEY]["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [NEWEST, PREVIOUS]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_torn_newest_gives_way_to_the_previous_and_says_so(tmp_path, damage):
    write(tmp_path, 1, 2)
    data = bytearray((tmp_path / NEWEST).read_bytes())
    if damage == "flipped":
        where = data.find(torch.full((1000,), 2.0).numpy().tobytes()) + 1000
        data[where] ^= 0xFF
    (tmp_path / NEWEST).write_bytes(
        {"truncated": data[: len(data) // 2], "empty": b"", "flipped": data}[damage]
    )
    point, notes = find_resume(tmp_path)
    assert point.state["step"] == 1
    assert NEWEST in notes[0] and "torn" in notes[0] and PREVIOUS in notes[1]


def test_a_kill_between_the_two_renames_leaves_the_previous(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / NEWEST).unlink()
    assert find_resume(tmp_path)[0].state["step"] == 1


def test_two_torn_files_are_an_error_that_names_the_remedy(tmp_path):
    write(tmp_path, 1, 2)
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="resume=false"):
        find_resume(tmp_path)


def test_a_file_with_foreign_objects_is_not_unpickled(tmp_path):
    torch.save({STATE_KEY: {"step": 1}, "evil": Evil()}, tmp_path / NEWEST)
    with pytest.raises(UserError, match="Unpickling"):
        find_resume(tmp_path)
    assert not Evil.woken


class Evil:
    woken = False

    def __reduce__(self):
        return (setattr, (Evil, "woken", True))


def test_a_write_that_fails_midway_keeps_everything(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)

    def failing_save(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume.torch, "save", failing_save)
    files = AtomicCheckpointIO()
    files.save_checkpoint(checkpoint(3), tmp_path / NEWEST)
    assert files.failure.errno == errno.ENOSPC
    monkeypatch.undo()
    assert find_resume(tmp_path)[0].state["step"] == 2
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)[STATE_KEY]["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [NEWEST, PREVIOUS]


def test_a_real_limit_on_file_size_keeps_everything(tmp_path):
    """torch's own writer meets the kernel's error in the middle of a file."""
    write(tmp_path, 1, 2)
    script = f"""
        import resource, signal, torch
        from pathlib import Path
        from tiny_onn.training.resume import AtomicCheckpointIO, NEWEST, STATE_KEY
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        files = AtomicCheckpointIO()
        big = {{"w": torch.zeros(1_000_000), STATE_KEY: {{"step": 3}}}}
        files.save_checkpoint(big, Path({str(tmp_path)!r}) / NEWEST)
        print("errno", files.failure.errno)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"errno {errno.EFBIG}", done.stderr
    assert find_resume(tmp_path)[0].state["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [NEWEST, PREVIOUS]


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / f".{NEWEST}.abc.tmp").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [NEWEST, PREVIOUS]
    remove_resume(tmp_path)
    assert list(tmp_path.iterdir()) == []
