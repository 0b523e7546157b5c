"""Every kernel in every configuration of the table becomes a binary, without a GPU."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from qcompile.backends.triton.int4_table import TABLE, Config, ManyRows
from qcompile.backends.triton.table import configs_of
from tests.triton.compiled import CAPABILITIES, name_of
from tests.triton.int4_cubins import cubin, reduce_cubin

CASES = [
    pytest.param(config, capability, id=f"sm_{capability}-{name_of(config)}")
    for capability in CAPABILITIES
    for config in configs_of(TABLE, capability)
]


@pytest.mark.parametrize(("config", "capability"), CASES)
@pytest.mark.parametrize("parts", [1, 4])
def test_configuration_compiles(config: Config, capability: int, parts: int) -> None:
    assert cubin(config, capability, torch.bfloat16, 1, wide=False, parts=parts)[:4] == b"\x7fELF"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_reduction_compiles(capability: int) -> None:
    assert reduce_cubin(capability, torch.bfloat16)[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize(("config", "capability"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("wide", [False, True])
def test_every_variant_compiles(config: Config, capability: int, dtype: torch.dtype, groups: int, wide: bool) -> None:
    if wide and isinstance(config, ManyRows):
        return
    assert cubin(config, capability, dtype, groups, wide=wide)[:4] == b"\x7fELF"
