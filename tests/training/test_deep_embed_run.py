"""Runs with DeepEmbed, from train to prediction: in memory, on disk, killed, on two processes."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.config.check import check_train
from tiny_onn.config.load import load_config
from tiny_onn.config.schema import DeepEmbedConfig
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training import row_tables
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.run import run_training

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"ngram": 2, "task_rank": 3}


def deep(*keys, **settings):
    return {"deep_embed": DeepEmbedConfig(keys=list(keys), **SMALL | settings)}


def weights(config):
    """Bytes of every tensor of the checkpoint, tables on disk included."""
    found = {}
    for path in (Path(config.out) / "checkpoint").glob("*.safetensors"):
        found |= {f"{path.name}/{k}": v for k, v in load_file(path).items()}
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_in_memory_trains_every_table(tiny):
    config = tiny(model=deep("token", "ngram", "patch", "task"), budget={"steps": 12},
                  optim={"ema_decay": 0.5})  # fmt: skip
    assert run_training(config) == 0
    model = load_model(config.out).model
    for name, table in model.deep_embed.tables.items():
        weight = table.rows.weight
        touched = weight.flatten(1).any(1)
        assert touched.any(), name
        assert not touched.all() or name in ("token", "task"), name
    facts = json.loads((Path(config.out) / "metrics.json").read_text())
    assert facts["deep_embed_parameters"] == model.deep_embed.num_parameters()
    assert facts["deep_embed"] == ["token", "ngram", "patch", "task"]
    assert (facts["attention"], facts["ffn"]) == ("full", "dense")


def test_a_run_on_disk_ends_where_the_same_run_in_memory_does(tiny, tmp_path, capsys):
    """The whole chain: prefetch, leaf, clipping, rule, files, checkpoint."""
    ends, told = [], set()
    for store in ("dense", "memmap"):
        config = replace(
            tiny(model=deep("token", "patch", "task", store=store), budget={"steps": 6}),
            out=str(tmp_path / store),
        )
        assert run_training(config) == 0
        assert sorted(p.name for p in (tmp_path / store).iterdir()) == [
            "checkpoint", "config.yaml", "leak_report.json", "logs", "metrics.json"
        ]  # fmt: skip
        ends.append(weights(config))
        told |= set(re.findall(r"training ([\d,]+) parameters", capsys.readouterr().out))
    model = load_model(tmp_path / "dense").model
    assert told == {f"{sum(p.numel() for p in model.parameters()):,}"}
    dense, filed = ends
    for name in ("token", "patch"):
        a = dense[f"weights.safetensors/deep_embed.tables.{name}.rows.weight"]
        b = filed[f"deep_embed.{name}.safetensors/rows"]
        assert a.any()
        assert (a - b).norm() < 0.02 * a.norm()  # clipping sums norms in another order


@pytest.mark.parametrize(
    ("form", "parts"), [("4x", {}), ("1x", {"attention": "nsa", "ffn": "dynmoe"})], ids=str
)
def test_a_stopped_run_on_disk_goes_on_to_the_same_bits(tiny, tmp_path, interrupt, form, parts):
    """In bfloat16, which is rounded at random: the random numbers of a step must come back too."""
    rows = deep("ngram", "task", form=form, store="memmap", dtype="bf16")
    settings = {
        "model": {**rows, **parts, "dropout": 0.1},
        "reset": {"window_steps": 3, "patience": 1},
        "trainer": {"checkpoint_steps": 4},
        "budget": {"steps": 14},
    }
    whole = replace(tiny(**settings), out=str(tmp_path / "whole"))
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    assert run_training(whole) == 0
    with interrupt(9, signal.SIGTERM):
        assert run_training(stopped) == 143
    folder = tmp_path / "stopped" / row_tables.FOLDER
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["step10", "step8"]
    # What training wrote after its last checkpoint must not count: spoil the working file.
    working = folder / "deep_embed.ngram.safetensors"
    working.write_bytes(working.read_bytes()[:-100] + b"\1" * 100)
    assert run_training(stopped) == 0
    assert same(weights(whole), weights(stopped))
    assert weights(whole)["deep_embed.ngram.safetensors/rows"].any()


KILLS = {
    "in the middle of a copy": """
from tiny_onn.model.deep_embed_store import FileRows as Owner
name, at = "copy_to", 4  # two tables: the second one of the second copy
""",
    "between tables and resume file": """
from tiny_onn.training.resume import AtomicCheckpointIO as Owner
name, at = "save_checkpoint", 2
""",
    "while rows are written": """
from tiny_onn.model.row_file import RowFile as Owner
name, at = "write", 11
""",
    "while the checkpoint is written": """
from tiny_onn.model.deep_embed_store import FileRows as Owner
name, at = "copy_to", 8  # after those of steps 3, 6 and 8
""",
}
KILL = """
import os, signal

calls, original = 0, getattr(Owner, name)

def killed(self, *given, **named):
    global calls
    calls += 1
    if calls == at:
        if name != "save_checkpoint":
            with open(given[0] if name == "copy_to" else self.path, "ab") as half:
                half.truncate(5000)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *given, **named)

setattr(Owner, name, killed)
"""


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_run_on_disk_killed_at_any_moment_goes_on_to_the_same_bits(
    tiny, start, tmp_path, whole_folder, moment
):
    settings = {
        "model": deep("token", "ngram", store="memmap", dtype="bf16"),
        "trainer": {"checkpoint_steps": 3},
        "budget": {"steps": 8},
    }
    whole = replace(tiny(**settings), out=str(whole_folder))
    killed = replace(whole, out=str(tmp_path / "killed"))
    assert run_training(whole) == 0  # the first moment's: a finished run is left as it is
    process = start(killed, prelude=KILLS[moment] + KILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "killed" / "checkpoint").exists()
    assert run_training(killed) == 0
    assert same(weights(whole), weights(killed))
    left = [sorted(p.name for p in Path(c.out).iterdir()) for c in (whole, killed)]
    assert left[0] == left[1]


def test_a_finished_or_restarted_run_leaves_no_tables_behind(tiny, monkeypatch):
    config = tiny(model=deep("token", store="memmap"), trainer={"checkpoint_steps": 2})
    folder = Path(config.out) / row_tables.FOLDER

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Pretrain, "on_train_batch_end", stop)
    assert run_training(config) == 143
    monkeypatch.undo()
    assert folder.is_dir()
    dense = replace(config, model=replace(config.model, **deep("token")), resume=False)
    assert run_training(dense) == 0
    assert not folder.exists()
    folder.mkdir()  # as a kill after the metrics were written would leave it
    (folder / "step2").mkdir()
    assert run_training(replace(dense, resume=True)) == 0
    assert not folder.exists()


def test_a_resume_file_without_its_tables_says_so(tiny, tmp_path, interrupt):
    config = tiny(model=deep("token", store="memmap"), trainer={"checkpoint_steps": 2})
    with interrupt(4, signal.SIGTERM):
        assert run_training(config) == 143
    copies = list((Path(config.out) / row_tables.FOLDER).glob("step*/*"))
    for path in copies:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="deep_embed.token.safetensors' is cut short.*bytes"):
        run_training(config)
    for path in copies:
        path.unlink()
    with pytest.raises(UserError, match="deep_embed.token.safetensors' cannot be opened"):
        run_training(config)
    for path in (Path(config.out) / row_tables.FOLDER).glob("step*"):
        path.rmdir()
    with pytest.raises(UserError, match="DeepEmbed tables of the checkpoint.*resume=false"):
        run_training(config)


def test_a_copy_that_cannot_be_written_is_a_warning_and_the_run_goes_on(tiny, monkeypatch, capsys):
    config = tiny(model=deep("token", store="memmap"), trainer={"checkpoint_steps": 2})
    save = row_tables.RowTables.save

    def fails_once(self, step):
        return OSError(28, "No space left on device") if step == 2 else save(self, step)

    monkeypatch.setattr(row_tables.RowTables, "save", fails_once)
    assert run_training(config) == 0
    assert "No space left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"devices": 2}}, "store=memmap with trainer.devices=2"),
        ({"trainer": {"strategy": "fsdp"}}, "store=memmap with trainer.strategy=fsdp"),
        ({"optim": {"ema_decay": 0.9}}, "store=memmap with optim.ema_decay=0.9"),
    ],
)
def test_what_files_cannot_do_is_refused_before_training(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        check_train(tiny(model=deep("token", store="memmap"), **changes))
    check_train(tiny(model=deep("token"), **changes))


def test_settings_are_written_on_the_command_line():
    words = ["model.deep_embed.keys=[token,task]", "model.deep_embed.form=1x",
             "model.deep_embed.store=memmap"]  # fmt: skip
    config = load_config(["preset=nano", *words]).model.deep_embed
    assert (config.keys, config.form, config.store) == (["token", "task"], "1x", "memmap")
    with pytest.raises(UserError, match=r"keys=\[colour\].*mend colour"):
        load_config(["preset=nano", "model.deep_embed.keys=[colour]"])


@pytest.mark.parametrize("form", ["1x", "4x", "v7a"])
def test_blocks_still_compile_as_one_graph_for_any_number_of_tokens(tiny, form):
    """Traced and differentiated as torch.compile does, without its slow code generation."""
    config = tiny(model=deep("token", "task", form=form, mix_rank=4))
    corpus = build_corpus(config.data)
    model = build_model(config.model, len(corpus.task_ids))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batches = [EpochBatches(corpus, config.data, 0).batch(0, i) for i in range(2)]
    found = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.leave = torch.compile(
                    block.leave, backend="aot_eager", dynamic=True, fullgraph=True
                )
        outputs = [model(batch).logits_MV for batch in batches]
        model.zero_grad()
        outputs[0].logsumexp(-1).sum().backward()
        found.append((*outputs, *(p.grad for p in model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_sharded_tables_like_one(tiny, start, tmp_path):
    """Rows are split between processes; one that has none of a step's rows changes none."""
    settings = {"model": deep("token", "patch", "task"), "budget": {"steps": 6}}
    one = replace(tiny(**settings), out=str(tmp_path / "one"))
    two = replace(
        tiny(**settings, trainer={"devices": 2, "strategy": "fsdp", "checkpoint_steps": 3}),
        out=str(tmp_path / "two"),
    )
    run_training(one)
    process = start(two)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 0.02 * a[name].norm(), name


PEAK = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_pair
from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig, OptimConfig
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.optim import build_optimizer

def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

before = peak()
deep = DeepEmbedConfig(keys=["ngram"], ngram=4, store="memmap")
sizes = {"width": 64, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_width": 1408}
model = build_model(ModelConfig(**sizes, deep_embed=deep), 1)
model.deep_embed.create_files(Path(sys.argv[1]))
store = model.deep_embed.files["ngram"]
for first in range(0, store.shape[0], 1000):  # every byte on disk, and in the page cache
    ids = torch.arange(first, min(first + 1000, store.shape[0]))
    store.file.write(ids, torch.full((len(ids), *store.shape[1:]), 0.1))
optimizer = build_optimizer(model, OptimConfig())
rng = np.random.default_rng(0)
for step in range(8):
    grids = [rng.integers(0, 10, (8, 8)).astype(np.uint8) for _ in range(2)]
    batch = pack([encode_pair(Pair(*grids))])
    optimizer.zero_grad()
    model(batch).logits_MV.logsumexp(-1).sum().backward()
    optimizer.step()
print(json.dumps([before, peak()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_training_on_disk_needs_memory_for_the_batch_not_for_the_table(tmp_path):
    """A 254 MiB table (47,250 4-grams of 1,408 numbers); a 1 GiB one: exp/bench/deep_embed.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout)
    assert (tmp_path / "deep_embed.ngram.safetensors").stat().st_size > 253 << 20
    assert peak - before < 100, (before, peak)
