"""Packs: the tensors that kernels read instead of weights, kept as long as the weight lives and is unchanged."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qcompile.errors import WeightError

# of a pack: (spec, solver and importance of the weight, kernel)
Key = tuple[str, str]
Stamp = tuple[int, int]
State = tuple[object, ...]


class PackMissingError(Exception):
    """A pack was asked for of which only the weight's shape is at hand."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Tensors by name, and the signal-to-noise ratio in dB of the weight they hold; None where nobody saw it."""

    tensors: Mapping[str, Tensor]
    snr_db: float | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(kw_only=True)
class _Entry:
    weight: weakref.ref[Tensor]
    state: State
    freed: bool = False
    # some frame reads the float values
    float_read: bool = False
    packs: dict[Key, Pack] = field(default_factory=dict)


def weight_stamp(weight: Tensor) -> Stamp:
    """What changes when a weight is moved, given other memory, or written to: its address, and torch's count of writes.

    Writes through `weight.data` are not counted, nor are writes to inference tensors.
    """
    try:
        return weight.data_ptr(), weight._version
    except RuntimeError:
        return weight.data_ptr(), -1


def _state(weight: Tensor) -> State:
    return weight_stamp(weight), weight.device, weight.dtype, weight.shape


class PackStore:
    """Packs by weight. A weight is known by its identity, and forgotten when it dies or changes."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def known(self, weight: Tensor) -> bool:
        """Whether packs of this very weight, in its present state, are here."""
        entry = self._entry(weight)
        return entry is not None and bool(entry.packs)

    def has(self, weight: Tensor, key: Key) -> bool:
        """Whether the pack of that key is here."""
        entry = self._entry(weight)
        return entry is not None and key in entry.packs

    def freed(self, weight: Tensor) -> bool:
        """Whether the weight's float values were given up."""
        entry = self._entry(weight)
        return entry is not None and entry.freed

    def get(self, weight: Tensor, key: Key, make: Callable[[], Pack], *, at_hand: bool) -> Pack:
        """The pack of that key, made if it is new.

        Raises PackMissingError if it must be made and the weight's values are not at hand.
        """
        entry = self._entry(weight) or self._new_entry(weight)
        if key not in entry.packs:
            if not at_hand:
                raise PackMissingError
            entry.packs[key] = make()
        return entry.packs[key]

    def joined(self, members: Sequence[tuple[Tensor, Key]]) -> tuple[dict[str, Tensor], list[Pack]]:
        """The tensors of packs that are here one behind the other, along their first dimension; and the packs.

        Those are views of them from now on. Packs that were joined in this order before share their memory already, and
        none is taken.
        """
        entries = [self._entries[id(weight)] for weight, _ in members]
        packs = [entry.packs[key] for entry, (_, key) in zip(entries, members, strict=True)]
        whole = {name: _behind_each_other([pack.tensors[name] for pack in packs]) for name in packs[0].tensors}
        views = []
        parts = {name: tensor.split([len(pack.tensors[name]) for pack in packs]) for name, tensor in whole.items()}
        for i, (entry, (_, key)) in enumerate(zip(entries, members, strict=True)):
            entry.packs[key] = replace(packs[i], tensors={name: tensors[i] for name, tensors in parts.items()})
            views.append(entry.packs[key])
        return whole, views

    def keep_float(self, weight: Tensor) -> None:
        """Never free this weight: its float values are read."""
        (self._entry(weight) or self._new_entry(weight)).float_read = True

    def free(self, weight: Tensor) -> None:
        """Replace the weight's values by one NaN, expanded to its shape: guards hold, and misuse gives NaN."""
        entry = self._entry(weight)
        if entry is None or entry.freed or entry.float_read:
            return
        weight.data = _no_values(weight.shape, weight.dtype, weight.device)
        entry.freed = True
        entry.state = _state(weight)

    def stand_in(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        """A weight that never had values, as `free` leaves them."""
        weight = nn.Parameter(_no_values(shape, dtype, device), requires_grad=False)
        self._new_entry(weight).freed = True
        return weight

    def _entry(self, weight: Tensor) -> _Entry | None:
        entry = self._entries.get(id(weight))
        if entry is None or entry.weight() is not weight:
            return None
        if entry.state != _state(weight):
            del self._entries[id(weight)]
            return None
        return entry

    def _new_entry(self, weight: Tensor) -> _Entry:
        entry = _Entry(weight=weakref.ref(weight, self._forget(id(weight))), state=_state(weight))
        self._entries[id(weight)] = entry
        return entry

    def _forget(self, key: int) -> Callable[[weakref.ref[Tensor]], None]:
        def forget(reference: weakref.ref[Tensor]) -> None:
            if (entry := self._entries.get(key)) is not None and entry.weight is reference:
                del self._entries[key]

        return forget


def _no_values(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,) * len(shape), torch.nan, dtype=dtype, device=device).expand(*shape)


def _behind_each_other(parts: Sequence[Tensor]) -> Tensor:
    first, place = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        place += part.nbytes
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def freed_error(name: str) -> WeightError:
    return WeightError(
        f"weight {name!r} has no float values: it was freed by free_weights=True, or qcompile.load gave its codes "
        "alone; and it is now needed with other specs or in float. Compile with the plan that qcompile.load gave, on "
        "the device that it was given, or load it again (model.load_state_dict) and compile without free_weights"
    )
