"""Kernels that this Triton may not run are refused with the reason, and nothing is imported for that."""

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from qcompile.backends.triton.ready import TESTED, missing


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    missing.cache_clear()
    yield
    missing.cache_clear()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing("width_linear") == "triton is not installed"


def test_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in str(missing("width_linear"))


@pytest.mark.parametrize(("version", "words"), [("9.9.0", "tested with"), (f"{TESTED[0]}.1", "cannot be loaded")])
def test_another_triton(version: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("triton")
    other.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", other)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: other)
    assert words in str(missing("no_such_kernel"))
