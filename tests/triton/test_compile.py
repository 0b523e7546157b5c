"""Every kernel in every configuration of the table becomes a binary, without a GPU."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from qcompile.backends.triton.table import configs_of
from qcompile.backends.triton.width_ptx import TABLE_BYTES
from qcompile.backends.triton.width_table import TABLES, Config, FewRows, ManyRows
from qcompile.backends.triton.widths import COLUMNS, SMALLEST_GROUP, WIDTHS
from tests.triton.compiled import CAPABILITIES, name_of
from tests.triton.width_cubins import Form, cubin, kernel, reduce_cubin

# floats in bytes differ by the bits that are moved, and by no configuration
_FLOATS = [width.name for width in WIDTHS.values() if width.mantissa is not None]
CASES = [
    pytest.param(config, capability, width, id=f"{width}-sm_{capability}-{name_of(config)}")
    for width in TABLES
    if width not in _FLOATS[1:]
    for capability in CAPABILITIES
    for config in configs_of(TABLES[width], capability)
]
# of each kernel the first configuration; of 4 bits all, whose kernels they are
VARIANTS = [
    pytest.param(config, capability, width, id=f"{width}-sm_{capability}-{name_of(config)}")
    for width in TABLES
    for capability in CAPABILITIES
    for config in (
        configs_of(TABLES[width], capability)
        if width == "int4"
        else {type(c): c for c in reversed(configs_of(TABLES[width], capability))}.values()
    )
]
# what presets ask for
FORMS = {
    "int8": Form(width="int8", groups=0, wide=True, zero=False),
    "int6": Form(width="int6"),
    "int5": Form(width="int5"),
    "int4": Form(),
    "book": Form(width="book", groups=2, wide=True, zero=False),
    "int3": Form(width="int3"),
    "int2": Form(width="int2"),
    **{name: Form(width=name, groups=0, wide=True, zero=False) for name in _FLOATS},
}


@pytest.mark.parametrize(("config", "capability", "width"), CASES)
def test_configuration_compiles(config: Config, capability: int, width: str) -> None:
    assert cubin(config, capability, torch.bfloat16, FORMS[width])[:4] == b"\x7fELF"


@pytest.mark.parametrize(("config", "capability", "width"), CASES)
def test_one_row_compiles(config: Config, capability: int, width: str) -> None:
    if isinstance(config, FewRows):
        # and behind another kernel of its x
        assert cubin(config, capability, torch.bfloat16, FORMS[width], one=True, follows=True)[:4] == b"\x7fELF"


@pytest.mark.parametrize("config", configs_of(TABLES["int4"], 90), ids=name_of)
def test_slices_compile(config: Config) -> None:
    assert cubin(config, 90, torch.bfloat16, FORMS["int8"], parts=4)[:4] == b"\x7fELF"


@pytest.mark.again
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_books_in_the_smallest_groups_compile(capability: int) -> None:
    form = Form(width="book", groups=COLUMNS // SMALLEST_GROUP, wide=True, zero=False)
    for config in configs_of(TABLES["book"], capability):
        assert cubin(config, capability, torch.bfloat16, form)[:4] == b"\x7fELF"


@pytest.mark.again
@pytest.mark.parametrize("config", configs_of(TABLES["book"], 90), ids=name_of)
@pytest.mark.parametrize("parts", [1, 4])
def test_shared_memory_beside_a_table_can_be_had(config: Config, parts: int) -> None:
    shared = kernel(config, 90, torch.bfloat16, FORMS["book"], parts=parts).metadata.shared
    # 48 KB need no asking; Triton asks for its own part alone
    assert shared + TABLE_BYTES <= 49152 or 49152 < shared <= 232448 - TABLE_BYTES


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_reduction_compiles(capability: int) -> None:
    assert reduce_cubin(capability, torch.bfloat16)[:4] == b"\x7fELF"


# ggml's: Q4_K, Q5_K, Q6_K, Q2_K, Q4_1
BLOCKS = [
    Form(width="int4", groups=4, minimum=True, integers=True),
    Form(width="int5", groups=4, minimum=True, integers=True),
    Form(width="int6", groups=8, zero=False, integers=True),
    Form(width="int2", groups=8, minimum=True, integers=True),
    Form(width="int4", groups=4, wide=True, minimum=True),
]


@pytest.mark.again
@pytest.mark.parametrize("form", BLOCKS, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_minima_and_integer_scales_compile(form: Form, capability: int) -> None:
    for config in configs_of(TABLES[form.width], capability):
        if not isinstance(config, ManyRows):
            assert cubin(config, capability, torch.bfloat16, form)[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize(("config", "capability", "width"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [0, 1, 2, 4])
@pytest.mark.parametrize(("wide", "zero"), [(False, True), (True, True), (True, False), (False, False)])
def test_every_variant_compiles(
    config: Config, capability: int, width: str, dtype: torch.dtype, groups: int, wide: bool, zero: bool
) -> None:
    if (zero if WIDTHS[width].numbers else not wide and not zero) or (
        isinstance(config, ManyRows) and wide and groups and width == "int4"
    ):
        return
    form = Form(width=width, groups=groups, wide=wide, zero=zero)
    assert cubin(config, capability, dtype, form)[:4] == b"\x7fELF"
