"""Every test: OpenMP threads sleep while they wait; GPU tests are skipped where there is none."""

import dataclasses
import importlib.util
import json
import os
import types

# Read when torch is first imported: spinning threads of two processes slow each other tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when triton is first imported: without a GPU its kernels run in the interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no process ends the suite alone with one; and skip what is marked
    ``gpu`` where torch sees no CUDA device."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter computes again and again what does not change: up to half of its time.

    - It goes through all of triton.language for every call of a function inside a kernel, though
      the kernel's launch has done so. Here once a launch.
    - It makes the type of every tensor anew. Here once a launch for every element and shape.
    - It looks up NumPy's type in a table that it builds for every look-up. Here in one.
    - It compares shapes by tuples of constexprs with types. Here equal ones by their numbers.
    - It computes whether integers overflow, for assertions that only debug=True keeps.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language import core, semantic
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version's, at its own speed
        yield
        return
    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    begin_type, begin_tensor = core.block_type.__init__, core.tensor.__init__
    broadcast, look_up = semantic.TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
    done, made, scalars, found = set(), {}, {}, {}

    def prepare_once(function):
        kind = frozenset(
            value.__name__
            for value in function.__globals__.values()
            if isinstance(value, types.ModuleType) and value.__name__.startswith("triton.language")
        )
        if kind in done:
            return interpreter._LangPatchScope()
        done.add(kind)
        return prepare(function)

    def launch_anew(self, *args, **kwargs):
        for known in (done, made, scalars):
            known.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            done.clear()

    def begin_type_once(self, element, shape):
        key = (id(element), *(getattr(size, "value", size) for size in shape))
        if key not in made:  # which keeps the element, and so its id
            begin_type(self, element, shape)
            made[key] = vars(self) | {"of_its_tensors": {}}
        vars(self).update(made[key])

    def begin_tensor_once(self, handle, type):
        known = vars(type).get("of_its_tensors")
        if known is None:
            known = scalars.setdefault(id(type), (type, {}))[1]
        if not known:
            begin_tensor(self, handle, type)
            known.update({k: v for k, v in vars(self).items() if k not in ("handle", "type")})
        vars(self).update(known, handle=handle, type=type)

    def broadcast_others(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def look_up_once(type):
        name = type.scalar.name
        if name not in found:
            found[name] = look_up(type)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(core.block_type, "__init__", begin_type_once)
        patch.setattr(core.tensor, "__init__", begin_tensor_once)
        patch.setattr(semantic.TritonSemantic, "broadcast_impl_value", broadcast_others)
        patch.setattr(interpreter, "_get_np_dtype", look_up_once)
        builder = interpreter.interpreter_builder
        if not builder.options.debug:
            options = dataclasses.replace(builder.options, sanitize_overflow=False)
            patch.setattr(builder, "options", options)
        yield


@pytest.fixture
def small_checkpoint(tmp_path):
    """``small_checkpoint(folder)``: an untrained network of two small tasks, saved there; dense
    unless ``model`` (settings of ModelConfig), ``moe`` and ``nsa`` say otherwise."""
    import numpy as np
    import torch

    from tiny_onn.arc.corpus import build_corpus
    from tiny_onn.config.schema import Config, DataConfig, ModelConfig, MoeConfig, NsaConfig
    from tiny_onn.model.checkpoint import load_model, save_checkpoint
    from tiny_onn.model.tiny_onn import build_model

    def build(folder, moe=None, nsa=None, **model):
        tasks = tmp_path / "small_tasks"
        tasks.mkdir(exist_ok=True)
        for name, width in (("aaaa0001", 2), ("aaaa0002", 3)):
            grids = [np.eye(2, width, dtype=int) * n for n in range(1, 5)]
            grids[2] = np.eye(3, 4, dtype=int)  # the longest one
            pairs = [{"input": g.tolist(), "output": g[::-1].tolist()} for g in grids]
            task = {"train": pairs[:3], "test": pairs[3:]}
            (tasks / f"{name}.json").write_text(json.dumps(task))
        data = DataConfig(sources=[], extra_dirs=[str(tasks)], holdout="train_tests")
        sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8}
        config = Config(
            out="run",
            data=data,
            model=ModelConfig(**sizes, ffn_width=24, **model),
            moe=moe or MoeConfig(),
            nsa=nsa or NsaConfig(),
        )
        corpus = build_corpus(data)
        torch.manual_seed(0)
        model = build_model(config.model, len(corpus.task_ids), config.moe, config.nsa)
        save_checkpoint(folder, model, config, corpus.task_ids, {})
        return load_model(folder)

    return build


@pytest.fixture
def predict_two(tmp_path):
    """``predict_two(run, *words)``: two evaluation tasks predicted by a run's model in two views;
    returns their score."""
    from tiny_onn.config.load import load_submit
    from tiny_onn.inference.run import run_submit

    def predict(run, *words):
        ids = tmp_path / "two_ids.txt"
        ids.write_text("00576224\n0692e18c\n")
        asked = [f"checkpoint={run}", f"ids={ids}", "solutions=arc1:evaluation"]
        assert run_submit(load_submit([*asked, "predict.views=2", *words])) == 0
        submission = json.loads((run / "submission" / "submission.json").read_text())
        assert set(submission) == {"00576224", "0692e18c"}
        return json.loads((run / "submission" / "score.json").read_text())

    return predict
