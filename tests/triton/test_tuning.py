"""Tuning on a GPU: what it finds runs, is right, and is what the ops take from then on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.triton import tuned, tuning
from qcompile.backends.triton.families import FAMILIES, families_on
from qcompile.backends.triton.table import capability_of
from qcompile.backends.triton.tuned import key_of, tuning_of, write_tuning
from qcompile.backends.triton.tuning import tune
from qcompile.backends.triton.width_linear import _known_config
from qcompile.backends.triton.width_table import Unpack
from qcompile.cli.doctor import tuning_lines

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kept in (tuning_of, _known_config):
        kept.cache_clear()


@pytest.mark.parametrize("fmt", FAMILIES)
def test_the_fastest_is_right_and_no_slower_than_the_tables(fmt: str) -> None:
    if fmt not in families_on(capability_of(torch.device("cuda", 0))):
        pytest.skip("this GPU does not multiply the format")
    for outcome in tune(fmt, 256, 512, (1, 40)):
        assert outcome.tried > 3
        assert 0 < outcome.best.us <= outcome.table_us


def test_the_op_takes_what_was_tuned() -> None:
    device = torch.device("cuda", 0)
    (outcome,) = tune("int4-weight", 256, 512, (16,))
    # which the table would not choose
    held = Unpack(blocks=1)
    assert "shipped tables" in next(tuning_lines())
    tuning_of.cache_clear()
    path = write_tuning(key_of(device), [replace(outcome.best, config=held)])
    assert _known_config("int4", 16, 256, 256, 512, device, exact=True) == held
    assert f"1 weights from {path}" in next(tuning_lines())


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["int4-weight"]

    def wrong(x: Tensor, given: object, pack: dict, N: int, config: object) -> Tensor:
        y = family.run(x, given, pack, N, config)
        return y if config == tuning.candidates(family, 1, 256, 512, capability_of(x.device))[0] else y * 1.1

    monkeypatch.setattr(tuning, "FAMILIES", {"int4-weight": replace(family, run=wrong)})
    (outcome,) = tune("int4-weight", 256, 512, (1,))
    assert outcome.tried == 1
    assert any("relative error" in reason for reason in outcome.refused.values())
    wrong_everywhere = replace(family, run=lambda *given: family.run(*given) * 1.1)
    monkeypatch.setattr(tuning, "FAMILIES", {"int4-weight": wrong_everywhere})
    with pytest.raises(RuntimeError, match=r"the table's .* fails: its relative error"):
        list(tune("int4-weight", 256, 512, (1,)))
    assert not tuned.cache_folder().exists()
