"""The instructions of PTX that `width_ptx` and `fp4_ptx` write, on tensors of registers: int64, 32 bits in use."""

import re

import torch
from torch import Tensor

FULL = 0xFFFFFFFF


def halves(register: Tensor, dtype: torch.dtype) -> Tensor:
    """The two floats of a register, low one first, in float64."""
    parts = torch.stack([register & 0xFFFF, register >> 16], dim=-1)
    return parts.to(torch.int16).view(dtype).double()


def run(text: str, operands: list[Tensor | None], table: Tensor | None = None) -> None:
    """Replace the results among operands by what the text makes of the others.

    table: int32 [256], of which shared memory holds 32 copies, one for each lane.
    """
    registers: dict[str, Tensor] = {}
    memory = torch.empty(0) if table is None else table.to(torch.int64).repeat_interleave(32)
    size = next(o for o in operands if o is not None)

    def read(name: str) -> Tensor:
        if name.startswith("$"):
            found = operands[int(name[1:])]
            assert found is not None, f"{name} is read before it is written"
            return found
        if name.startswith("["):
            assert (registers[name.strip("[]")] % 4 == 0).all()
            return memory[registers[name.strip("[]")] // 4]
        if name.startswith("qcompile"):
            return torch.zeros_like(size)
        return registers[name] if name in registers else torch.full_like(size, int(name, 0))

    for line in text.strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, to, *rest = re.split(r"[ ,{]+", line.strip().rstrip("}"))
        given = [read(name) for name in rest]
        made = _OPS[op.split(".")[0]](op, *given) & FULL
        if to.startswith("$"):
            operands[int(to[1:])] = made
        else:
            registers[to] = made


def _lop3(_: str, a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    found = {0xEA: (a & b) | c, 0x6A: (a & b) ^ c}
    return found[int(table.flatten()[0])]


def _prmt(_: str, a: Tensor, b: Tensor, selectors: Tensor) -> Tensor:
    """Four of the eight bytes; a selector of 8 or more spreads the sign of its byte."""
    pool = torch.stack([source >> (8 * i) & 255 for source in (a, b) for i in range(4)])
    made = torch.zeros_like(a)
    for i in range(4):
        selector = selectors >> (4 * i) & 15
        byte = pool.gather(0, (selector & 7)[None])[0]
        made |= torch.where(selector > 7, (byte >> 7) * 255, byte) << (8 * i)
    return made


def _cvt(op: str, a: Tensor) -> Tensor:
    assert op == "cvt.rn.satfinite.e4m3x2.f16x2"
    low, high = halves(a, torch.float16).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int64).unbind(-1)
    return low | (high << 8)


def _sub(op: str, a: Tensor, b: Tensor) -> Tensor:
    return a - b if op == "sub.u32" else _float(op, a, b)


def _float(op: str, *given: Tensor) -> Tensor:
    dtype = torch.float16 if ".f16x2" in op else torch.bfloat16
    a, b, *c = (halves(g, dtype) for g in given)
    made = {"sub": lambda: a - b, "mul": lambda: a * b, "fma": lambda: a * b + c[0]}[op.split(".")[0]]()
    low, high = made.to(dtype).view(torch.int16).to(torch.int64).unbind(-1)
    return (low & 0xFFFF) | ((high & 0xFFFF) << 16)


_OPS = {
    # two are halves of a register
    "mov": lambda _, a, *high: a | high[0] << 16 if high else a,
    "shr": lambda _, a, n: a >> n,
    "shl": lambda _, a, n: a << n,
    "add": lambda _, a, b: a + b,
    "and": lambda _, a, b: a & b,
    "lop3": _lop3,
    "ld": lambda _, a: a,
    "sub": _sub,
    "prmt": _prmt,
    "cvt": _cvt,
    "mul": _float,
    "fma": _float,
}
