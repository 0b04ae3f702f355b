"""Write the ids of track nano: ARC-AGI-1 tasks whose every pair has at most 192 tokens.

Test pairs count too, so this script (run once, by hand) reads the sizes of the evaluation
answers; only ids come out of it, and nothing in tiny_onn/ does the same.

    python data/make_nano_ids.py
"""

from __future__ import annotations

import json

from tiny_onn.arc.select import NANO_IDS_FILE, NANO_TOKENS
from tiny_onn.arc.sources import SPLITS, packaged_path
from tiny_onn.arc.tokens import document_length
from tiny_onn.files import atomic_write_text


def longest(pair: dict) -> int:
    """Tokens of a JSON pair in the longer of its two orientations."""
    (h1, w1), (h2, w2) = ((len(pair[k]), len(pair[k][0])) for k in ("input", "output"))
    return max(document_length(h1, w1, h2, w2), document_length(w1, h1, w2, h2))


def main() -> None:
    data = json.loads(packaged_path("arc1").read_text(encoding="utf-8"))
    lists = {
        f"arc1:{split}": sorted(
            task_id
            for task_id, task in data[key].items()
            if max(longest(pair) for pair in task["train"] + task["test"]) <= NANO_TOKENS
        )
        for split, key in SPLITS.items()
    }
    atomic_write_text(NANO_IDS_FILE, json.dumps(lists, indent=0) + "\n")
    print({source: len(ids) for source, ids in lists.items()}, "->", NANO_IDS_FILE)


if __name__ == "__main__":
    main()
