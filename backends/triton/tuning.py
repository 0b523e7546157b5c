"""The fastest configuration for a weight on this GPU: those of the table, and their neighbours, checked and timed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.triton.eight_bit_table import HopperTiles, Library, RingTiles, Tiles
from qcompile.backends.triton.families import DTYPE, FAMILIES, Family, given, reference
from qcompile.backends.triton.graphs import Captured, captured, in_turns
from qcompile.backends.triton.int4_int8_table import AsInt8, Int4Int8Tiles
from qcompile.backends.triton.table import capability_of, configs_of, fitting
from qcompile.backends.triton.tuned import ROWS, Config, Tuned
from qcompile.backends.triton.width_table import FewRows, ManyRows, Unpack
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

# relative error to float32 on the same codes: results are bfloat16, and sums of fp8 keep about 14 bits
LIMIT = 1e-2
# what all copies of a weight fill, so that none is in the cache when its turn comes
ROTATED = 300e6
MOST_COPIES = 24
# rows from which on two copies do, and few rounds: the weight is a small part of what is moved
MANY = 256
ROUNDS, FEW_ROUNDS = 15, 5
# what the same configuration, timed twice, differs by
NOISE = 0.02
# how many of a table's configurations are starting points for a problem, the first with all its neighbours
STARTS = 3
# values next to each other are neighbours
CHOICES: Mapping[type, Mapping[str, tuple[int, ...]]] = {
    FewRows: {"units": (1, 2, 4), "depth": (1, 2, 4), "blocks": (2, 4, 8, 16), "resident": (1, 2, 3, 4, 5, 6, 7, 8)},
    ManyRows: {
        "rows": (16, 32, 64, 128, 256),
        "units": (1, 2, 4),
        "steps": (2, 4),
        "stages": (3, 4, 6, 8),
        "slices": (1, 2, 4, 8),
        "resident": (1, 2, 3, 4, 5),
    },
    Unpack: {"blocks": (1, 2, 4, 8)},
    AsInt8: {"blocks": (1, 2, 4, 8)},
    Tiles: {
        "tokens": (16, 32, 64, 128),
        "channels": (32, 64, 128, 256),
        "depth": (64, 128, 256),
        "stages": (2, 3, 4, 5, 6),
    },
    RingTiles: {"channels": (64, 128), "stages": (3, 4, 6, 8, 12, 14, 16), "resident": (1, 2)},
    HopperTiles: {"tokens": (64, 128), "channels": (64, 128, 256), "stages": (3, 4, 6, 8)},
    Int4Int8Tiles: {
        "tokens": (8, 16, 32, 64, 128, 192, 256),
        "stages": (4, 5, 6, 8, 10, 12, 16),
        "slices": (1, 2, 4, 8),
        "pending": (0, 1),
        "resident": (1, 2),
    },
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was tuned for one number of rows.

    table, table_us: the table's configuration and its microseconds; tried: how many were timed; refused: why others
    cannot run.
    """

    best: Tuned
    table: Config
    table_us: float
    tried: int
    refused: Mapping[str, str]

    @property
    def changes(self) -> str:
        """How the best differs from the table's, for a reader."""
        best, table = asdict(self.best.config), asdict(self.table)
        if type(self.best.config) is not type(self.table):
            return f"{type(self.best.config).__name__} {' '.join(f'{k}={v}' for k, v in best.items())}".rstrip()
        return ", ".join(f"{k} {table[k]} -> {best[k]}" for k in best if best[k] != table[k]) or "the table's"


def neighbours(config: Any) -> list[Config]:
    """The configuration, and those that differ from it in one field by one step."""
    found: list[Config] = [config]
    for name, values in CHOICES.get(type(config), {}).items():
        held = getattr(config, name)
        below, above = [v for v in values if v < held], [v for v in values if v > held]
        found += [replace(config, **{name: value}) for value in (*below[-1:], *above[:1])]
    return found


def candidates(family: Family, M: int, N: int, K: int, capability: int) -> list[Config]:
    """What is tried, the table's choice first.

    Its neighbours, those of its choice for half as many rows, what it would choose next, and the library.
    """
    able = [c for c in fitting(family.table, M, N, K, capability) if family.can_run(c, M, N)]
    fewer = next(fitting(family.table, M // 2, N, K, capability))
    library = [c for c in configs_of(family.table, capability) if isinstance(c, Unpack | AsInt8 | Library)]
    found = [*neighbours(able[0]), *neighbours(fewer), *able[1:STARTS], *library]
    return [c for c in dict.fromkeys(found) if family.can_run(c, M, N)]


def tune(fmt: str, N: int, K: int, rows: Sequence[int] = ROWS) -> Iterator[Outcome]:
    """The fastest configurations for a weight [N, K] on the current device, one for each number of rows of x.

    Of weights to which `families.why_not` has no objection.  Raises RuntimeError if the table's own configuration gives
    a wrong result.
    """
    family = FAMILIES[fmt]
    device = torch.device("cuda", torch.cuda.current_device())
    spec = parse_spec(family.weight)
    weight = torch.randn(N, K, device=device) * K**-0.5
    qparams = find_qparams(weight, spec)
    codes = quantize(weight, qparams)
    exact = dequantize(codes, qparams)
    packs = _copies(family.pack(codes, qparams))
    floats = _copies({"weight": exact.to(DTYPE)})

    def plain(x: Tensor, copy: int) -> Tensor:
        return torch.nn.functional.linear(x, floats[copy]["weight"])

    for M in sorted(rows):
        x = torch.randn(M, K, device=device, dtype=DTYPE)
        expected = reference(family, x) @ exact.T
        operands = given(family, x)

        def run(config: Config, copy: int, operands: tuple[Tensor, QParams | None] = operands) -> Tensor:
            return family.run(*operands, packs[copy], N, config)

        tried = candidates(family, M, N, K, capability_of(device))
        able, refused = _able(tried, run, expected)
        if able[:1] != tried[:1]:
            raise RuntimeError(f"{fmt} [{N}, {K}], M={M}: the table's {tried[0]} fails: {refused[str(tried[0])]}")
        graphs = [_graph(partial(run, config), len(packs), M) for config in able]
        graphs.append(_graph(partial(plain, x), len(floats), M))
        *times, bf16_us = in_turns(graphs, FEW_ROUNDS if M > MANY else ROUNDS)
        place = fastest(times)
        best = Tuned(
            format=fmt, N=N, K=K, rows=M, config=able[place], us=round(times[place], 2), bf16_us=round(bf16_us, 2)
        )
        yield Outcome(best=best, table=able[0], table_us=round(times[0], 2), tried=len(able), refused=refused)


def fastest(times: Sequence[float]) -> int:
    """The place of the least time; that of the first, the table's, if the least is not clearly less."""
    least = min(times)
    return 0 if least > (1 - NOISE) * times[0] else times.index(least)


def _graph(call: Callable[[int], Tensor], copies: int, M: int) -> Captured:
    return captured(call, min(copies, 2) if M > MANY else copies)


def _able(
    configs: Sequence[Config], run: Callable[[Config, int], Tensor], expected: Tensor
) -> tuple[list[Config], dict[str, str]]:
    """Those of the configurations that run and are right, and why the others are not among them."""
    able, refused = [], {}
    for config in configs:
        # what the allocator hands out next holds NaN
        torch.full_like(expected, torch.nan, dtype=DTYPE)
        try:
            y = run(config, 0).float()
            torch.cuda.synchronize()
        except Exception as error:
            # a compiler, too, may give up: what it says is the reason
            refused[str(config)] = str(error).splitlines()[0] if str(error) else repr(error)
            continue
        wrong = float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())
        if wrong < LIMIT:
            able.append(config)
        else:
            refused[str(config)] = f"its relative error is {wrong:.2g}"
    return able, refused


def _copies(pack: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Copies of a pack that no cache holds all."""
    count = max(2, min(MOST_COPIES, round(ROTATED / sum(t.nbytes for t in pack.values()))))
    return [{name: t.clone() for name, t in pack.items()} for _ in range(count)]
