"""``python -m tiny_onn.convert``: a packed checkpoint that predicts, its table, and refusals."""

import json
import re

import pytest
import torch

from tiny_onn.config.load import load_convert_config
from tiny_onn.config.schema import Config, ModelConfig, MoeConfig, PredictConfig, SubmitConfig
from tiny_onn.convert.run import file_bytes, run_convert
from tiny_onn.errors import UserError
from tiny_onn.inference import run as inference
from tiny_onn.inference.run import run_submit
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.tiny_onn import build_model

SHARED = MoeConfig(experts=3, expert_width=8, target_active=1.5, expert_weights="shared_k24")


def command(*words):
    return run_convert(load_convert_config(words))


@pytest.fixture
def run(tmp_path):
    """``run(name, moe, **model)``: a run folder as if it were trained, and its network."""

    def build(name="run", moe=SHARED, **model):
        sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_width": 8}
        config = ModelConfig(**(sizes | {"ffn_width": 24, "weights": "k24"} | model))
        torch.manual_seed(0)
        network = build_model(config, 1, moe).eval()
        torch.nn.init.normal_(network.head.weight, std=0.5)  # zero before training
        folder = tmp_path / name
        facts = {"steps": 1, "trained": True}
        whole = Config(model=config, moe=moe, out=str(folder))
        save_checkpoint(folder / "checkpoint", network, whole, ("t",), facts)
        return folder, network

    return build


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_packed_run_is_submitted_as_the_trained_one(run, tmp_path, monkeypatch):
    folder, _ = run(ffn="dynmoe")
    settled = []
    monkeypatch.setattr(inference, "settle_products", settled.append)
    assert command(f"checkpoint={folder}") == 0
    pair = {"input": [[1, 2], [3, 4]], "output": [[3, 4], [1, 2]]}
    challenge = {"t": {"train": [pair, pair], "test": [{"input": [[5, 6], [7, 8]]}]}}
    (tmp_path / "challenges.json").write_text(json.dumps(challenge))
    found = []
    for checkpoint in (folder, folder / "packed"):
        out = tmp_path / "out"
        submit = SubmitConfig(
            checkpoint=str(checkpoint),
            challenges=str(tmp_path / "challenges.json"),
            out=str(out),
            accelerator="cpu",
            progress=False,
            predict=PredictConfig(views=2, vote="sum_prob"),
        )
        assert run_submit(submit) == 0
        record = json.loads((out / "predictions.json").read_text())["tasks"]
        found.append(((out / "submission.json").read_text(), record))
    assert found[0] == found[1]
    assert [model.packed is None for model in settled] == [True, False]


def test_the_table_tells_bytes_before_and_after_by_weight_and_the_files(run, capsys):
    folder, model = run(moe=MoeConfig())
    command(f"checkpoint={folder}", "backend=reference")
    text = capsys.readouterr().out
    for pattern, weight in model.masked_weights:
        packed = weight.numel() * 4 // 2 + weight.numel() // 8
        mask = sum(t.nbytes for t in pattern.state_dict().values())
        row = (
            rf"{weight.shape[0]} x {weight.shape[1]} +rows +{weight.nbytes:,} +{mask:,} +{packed:,}"
        )
        assert re.search(rf"^blocks.0.ffn.\w+.weight +{row} +reference$", text, re.M)
    before, after = file_bytes(folder / "checkpoint"), file_bytes(folder / "packed" / "checkpoint")
    assert f"{before:,} -> {after:,} bytes, {before - after:,} fewer" in text
    (computed,) = re.findall(r"([\d,]+) fewer as computed", text)
    assert f"({computed} of tensors" in text
    assert tree(folder / "packed")[-1] == "checkpoint/weights.safetensors"
    facts = json.loads((folder / "packed" / "checkpoint" / "provenance.json").read_text())
    assert facts["packed_from"]["checkpoint"] == str(folder / "checkpoint")


def test_unpacking_a_run_leaves_a_dense_one_of_the_masked_weights(run, capsys):
    folder, model = run(ffn="dynmoe")
    command(f"checkpoint={folder}", "backend=reference")
    command(f"checkpoint={folder / 'packed'}", f"out={folder / 'd'}", "unpack=true")
    dense = load_model(folder / "d")
    assert dense.config.model.weights == "dense" and dense.model.packed is None
    experts, own = dense.model.blocks[0].ffn.experts, model.blocks[0].ffn.experts
    with torch.no_grad():
        assert torch.equal(experts.gate_up, own.eval().matrices()[0])
    with pytest.raises(UserError, match="got a network that is not packed"):
        command(f"checkpoint={folder}", f"out={folder / 'e'}", "unpack=true")
    assert not (folder / "e").exists()
    packed, dense = folder / "packed", folder / "d"
    command(f"checkpoint={packed}", f"out={dense}", "unpack=true")  # over its like
    command(f"checkpoint={packed}", f"out={folder / 'p'}", "unpack=true")
    command(f"checkpoint={folder}", f"out={folder / 'q'}", "backend=reference")
    before = tree(folder)
    for out, kind in (("q", "packed"), ("", "not packed")):
        with pytest.raises(UserError, match=f"holds a checkpoint that is {kind}; .*is unpacked is"):
            command(f"checkpoint={packed}", f"out={folder / out}", "unpack=true")
    with pytest.raises(UserError, match="holds a checkpoint that is unpacked; .*is packed is"):
        command(f"checkpoint={folder}", f"out={dense}", "backend=reference")
    assert tree(folder) == before


def test_what_is_packed_from_a_checkpoint_folder_lies_beside_it(run):
    folder, _ = run(moe=MoeConfig())
    command(f"checkpoint={folder / 'checkpoint'}", "backend=reference")
    assert (folder / "packed" / "checkpoint" / "packed.json").is_file()
    assert not (folder / "checkpoint" / "packed").exists()


@pytest.mark.parametrize("file", ["resume.ckpt", "metrics.json", "leak_report.json"])
def test_the_folder_of_a_run_is_never_written_to(run, tmp_path, file):
    folder, _ = run(moe=MoeConfig())
    other = tmp_path / "unfinished"
    other.mkdir()
    (other / file).touch()
    with pytest.raises(UserError, match=f"unfinished, the folder of a run .{file}.*another out"):
        command(f"checkpoint={folder}", f"out={other}", "backend=reference")
    assert tree(other) == [file]


def test_packing_again_replaces_a_packed_checkpoint_and_nothing_else(run):
    folder, _ = run(moe=MoeConfig())
    command(f"checkpoint={folder}", f"out={folder / 'p'}", "backend=reference")
    first = file_bytes(folder / "p" / "checkpoint")
    command(f"checkpoint={folder}", f"out={folder / 'p'}", "backend=reference", "dtype=bf16")
    assert file_bytes(folder / "p" / "checkpoint") < first
    other, _ = run("other", MoeConfig())
    before = tree(folder.parent)
    for words, message in (
        ([f"out={folder}"], "holds the checkpoint to read"),
        ([f"out={other}"], "holds a checkpoint that is not packed"),
    ):
        with pytest.raises(UserError, match=message):
            command(f"checkpoint={folder}", *words)
    with pytest.raises(UserError, match="got a packed network to pack"):
        command(f"checkpoint={folder / 'p'}", f"out={folder / 'q'}")
    assert tree(folder.parent) == before


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ({"weights": "dense"}, [], "nothing can be packed .dense weights.*weights=k24"),
        ({"weights": "dense", "ffn": "relu2_act24"}, [], "activations are packed per forward"),
        ({"weights": "k24"}, ["backend=cutlass"], "needs a CUDA device"),
        ({"weights": "k24"}, ["out=FILE"], "cannot write to folder"),
    ],
)
def test_what_cannot_be_packed_is_one_line_and_writes_nothing(run, tmp_path, model, words, message):
    if "backend=cutlass" in words and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    (tmp_path / "file").touch()
    run(moe=MoeConfig(), **model)
    before = tree(tmp_path)
    words = [w.replace("FILE", str(tmp_path / "file")) for w in words]
    with pytest.raises(UserError, match=message) as caught:
        command(f"checkpoint={tmp_path / 'run'}", *words)
    assert "\n" not in str(caught.value) and tree(tmp_path) == before
    assert not (tmp_path / "run" / "packed").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint is missing"),
        (["checkpoint="], "such as checkpoint=runs/x"),
        (["checkpoint=x", "backend=cutlas"], "did you mean cutlass"),
        (["checkpoint=x", "dtype=fp8"], "one of keep, bf16, fp16"),
        (["checkpoint=x", "dtpe=fp16"], "did you mean dtype"),
        (["checkpoint=x", "unpack=true", "dtype=bf16"], "got unpack=true with"),
    ],
)
def test_bad_settings_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        load_convert_config(words)
