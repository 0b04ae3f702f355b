"""A machine that cannot compile says so in one line, before any training."""

import pytest
import torch

from tiny_onn.config.schema import ModelConfig
from tiny_onn.errors import UserError
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.compiler import compile_model


def test_no_compiler_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler.*trainer.compile=false"):
        compile_model(build_model(ModelConfig(), 1), torch.device("cpu"))


def test_no_python_header_is_one_line_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="Python.h.*python3-dev"):
        compile_model(build_model(ModelConfig(), 1), torch.device("cpu"))
