"""Configurations that `qcompile tune` measured on this machine: they come before those of the tables.

A file for each kind of GPU in the user's cache folder holds them, under the key of what they depend on: the device,
Triton, and the source of the kernels. Under another key they are not used, and a warning says so.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from qcompile.backends.triton import eight_bit_table, int4_int8_table, width_table
from qcompile.backends.triton.table import Entry, capability_of

_LOG = logging.getLogger(__name__)

Config = width_table.Config | eight_bit_table.Config | int4_int8_table.Config
_KINDS: Mapping[str, type[Config]] = {
    kind.__name__: kind
    for kind in (
        *(width_table.FewRows, width_table.ManyRows, width_table.Unpack),
        *(eight_bit_table.Tiles, eight_bit_table.RingTiles, eight_bit_table.HopperTiles, eight_bit_table.Library),
        *(int4_int8_table.Int4Int8Tiles, int4_int8_table.AsInt8),
    )
}


# numbers of rows that are tuned for: each stands for those down to the next
ROWS = (1, 16, 32, 64, 128, 256, 512, 2048, 8192)


@dataclass(frozen=True, kw_only=True)
class Key:
    """What measured times depend on. capability: 90 for 9.0; kernels: digest of the sources."""

    device: str
    capability: int
    torch: str
    triton: str
    kernels: str


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The fastest configuration for a format, a weight [N, K], and x of that many rows, and fewer down to the next.

    us, bf16_us: microseconds of it, and of the library's product of bfloat16.
    """

    format: str
    N: int
    K: int
    rows: int
    config: Config
    us: float
    bf16_us: float


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a file holds. stale: why it is not used, None if it is."""

    path: Path
    tuned: tuple[Tuned, ...] = ()
    stale: str | None = None


def cache_folder() -> Path:
    """Where this user's programs keep what they can make anew (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompile"


def key_of(device: torch.device) -> Key:
    return Key(
        device=torch.cuda.get_device_name(device),
        capability=capability_of(device),
        torch=torch.__version__,
        triton=triton.__version__,
        kernels=_digest(),
    )


@cache
def _digest() -> str:
    """Of all sources of this folder."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def path_for(name: str) -> Path:
    """The file for a GPU of that name."""
    return cache_folder() / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"


def read_tuning(key: Key) -> Tuning:
    """What was tuned for the device of the key: nothing, with a reason, if the file is of another key or broken."""
    path = path_for(key.device)
    if not path.exists():
        return Tuning(path=path)
    try:
        found = json.loads(path.read_text())
        made = Key(**found["key"])
        if made != key:
            return Tuning(path=path, stale=_difference(made, key))
        return Tuning(path=path, tuned=tuple(_tuned(row) for row in found["tuned"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        return Tuning(path=path, stale=f"the file cannot be read: {error!r}")


def write_tuning(key: Key, tuned: Iterable[Tuned]) -> Path:
    """Add to what was tuned under the same key; what was tuned under another one goes."""
    path = path_for(key.device)
    whole = {(t.format, t.N, t.K, t.rows): t for t in (*read_tuning(key).tuned, *tuned)}
    text = json.dumps({"key": asdict(key), "tuned": [_row(whole[place]) for place in sorted(whole)]}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(f"{text}\n")
    os.replace(beside, path)
    return path


@cache
def tuning_of(device: torch.device) -> Tuning:
    """What is in force on a CUDA device, read once."""
    tuning = read_tuning(key_of(device))
    if tuning.stale is not None:
        _LOG.warning("the tuning in %s is not used: %s; run `qcompile tune` anew", tuning.path, tuning.stale)
    return tuning


def tuned_for(fmt: str, N: int, K: int, device: torch.device) -> list[Tuned]:
    """By increasing rows."""
    found = [t for t in tuning_of(device).tuned if (t.format, t.N, t.K) == (fmt, N, K)]
    return sorted(found, key=lambda t: t.rows)


def tuned_entries(fmt: str, N: int, K: int, device: torch.device) -> tuple[Entry[Any], ...]:
    """Entries that come before those of a table, for x of any number of rows that was tuned for, and fewer."""
    return tuple(Entry(config=t.config, rows=t.rows) for t in tuned_for(fmt, N, K, device))


def is_worth(fmt: str, N: int, K: int) -> bool:
    """Whether tuning on the current device found the format nowhere slower than bfloat16, for any number of rows."""
    if not torch.cuda.is_available():
        return False
    found = tuned_for(fmt, N, K, torch.device("cuda", torch.cuda.current_device()))
    return {t.rows for t in found} >= set(ROWS) and all(t.us <= t.bf16_us for t in found)


def _difference(made: Key, key: Key) -> str:
    before, now = asdict(made), asdict(key)
    return ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name])


def _row(tuned: Tuned) -> dict[str, Any]:
    config = {"kind": type(tuned.config).__name__, **asdict(tuned.config)}
    return {**asdict(tuned), "config": config}


def _tuned(row: Mapping[str, Any]) -> Tuned:
    config = dict(row["config"])
    return Tuned(**{**row, "config": _KINDS[config.pop("kind")](**config)})
