"""Parking: what a batch that stands still holds on a GPU waits in host memory, so that one batch at a time fills it.

The functions that a batch runs are told, and what they made is known by its storage, weakly, so that it dies as it
would. A parked storage is empty and its tensors are as they were: views need no care, and all of them are whole once it
is filled again. Only what a function made anew is parked. What one returns of its arguments, as views and in-place
functions do, was there before: it belongs to the batch that made it, or to the model or the user, and stays. So does
what modules keep: another batch may read it by code that tells nobody, as TorchScript and C++ extensions do.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef

# bytes of a storage; to move less costs more time than the memory is worth
SMALLEST = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class _Copy:
    """What a storage held, uint8 in host memory, and the batch that made it."""

    batch: int
    host: Tensor


class Parked:
    """What the standing batches of one run hold. Left as a context, it makes all whole that is still alive.

    Batches have numbers, and one at a time runs. A storage has its address as a key: no other takes it, dead or alive,
    while it is known here.
    """

    def __init__(
        self, model: nn.Module | None = None, devices: Collection[str] = ("cuda",), *, smallest: int = SMALLEST
    ) -> None:
        """model: which the batches run.  devices: types of those whose memory is freed.  smallest: see `SMALLEST`."""
        self._model, self._devices, self._smallest = model, frozenset(devices), smallest
        self._made: dict[int, dict[int, StorageWeakRef]] = {}
        self._parked: dict[int, _Copy] = {}

    def __enter__(self) -> "Parked":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for batch in list(self._made):
            self.bring_back(batch)
        if "cuda" in self._devices and torch.cuda.is_initialized():
            # locked host memory is kept for the next who asks for some; nobody does
            torch.cuda.synchronize()
            torch._C._host_emptyCache()

    def made(self, batch: int, result: Any, given: Any) -> None:
        """A function gave this batch its result for what it was given, both in lists, tuples and dicts or alone."""
        mine = self._made.setdefault(batch, {})
        theirs: set[int] | None = None
        for tensor in _tensors(result):
            storage = _storage(tensor) if tensor.device.type in self._devices else None
            if storage is None or storage._cdata in mine or not self._can_park(storage):
                continue
            if theirs is None:
                theirs = {other._cdata for other in map(_storage, _tensors(given)) if other is not None}
            if storage._cdata not in theirs:
                mine[storage._cdata] = StorageWeakRef(storage)

    def _can_park(self, storage: UntypedStorage) -> bool:
        try:
            # memory of other libraries cannot be given up
            return storage.nbytes() >= self._smallest and storage.data_ptr() != 0 and storage.resizable()
        except RuntimeError:
            # what only looks like a tensor, as jagged ones do, has no memory of its own
            return False

    def park(self, batch: int) -> None:
        """The batch stands still: move what it made and still holds to host memory."""
        mine = self._made.get(batch, {})
        living = {key: storage for key, ref in mine.items() if (storage := _alive(ref)) is not None}
        self._made[batch] = {key: mine[key] for key in living}
        _finish({storage.device for storage in living.values()})
        kept = self._kept_by_modules()
        for key, storage in living.items():
            if not storage.nbytes() or key in kept:
                # the model itself gave it up, or has it for others
                continue
            host = _host_memory(storage)
            # waits until it is there: the memory may go to any stream
            host.untyped_storage().copy_(storage)
            self._parked[key] = _Copy(batch=batch, host=host)
            storage.resize_(0)

    def _kept_by_modules(self) -> set[int]:
        modules = () if self._model is None else self._model.modules()
        tensors = (tensor for module in modules for tensor in _tensors(vars(module)))
        return {storage._cdata for storage in map(_storage, tensors) if storage is not None}

    def bring_back(self, batch: int) -> None:
        """The batch goes on: what it made and still holds is whole again."""
        for key in self._made.get(batch, {}):
            if key in self._parked:
                # on the stream that all batches run on
                self._fill(key, non_blocking=True)
                del self._parked[key]

    def bring_back_for(self, given: Any) -> None:
        """A function is about to read these: what another batch made of them is whole from now on, and stays.

        given: as of `made`.
        """
        if not self._parked:
            return
        for tensor in _tensors(given):
            storage = _storage(tensor)
            if storage is not None and storage._cdata in self._parked:
                # perhaps on a stream of the model's own, on which others will not wait
                self._fill(storage._cdata, non_blocking=False)
                found = self._parked.pop(storage._cdata)
                del self._made[found.batch][storage._cdata]

    @contextmanager
    def lent(self, x: Tensor) -> Iterator[None]:
        """x is whole inside, and only to be read; what else its batch holds stays parked."""
        storage = _storage(x)
        if storage is None or storage._cdata not in self._parked:
            yield
            return
        self._fill(storage._cdata, non_blocking=True)
        try:
            yield
        finally:
            # an error may have brought it back for good
            if storage._cdata in self._parked:
                storage.resize_(0)

    def _fill(self, key: int, *, non_blocking: bool) -> None:
        """Give a storage its memory and what it held, unless it died or has them; its copy stays."""
        found = self._parked[key]
        storage = _alive(self._made[found.batch][key])
        if storage is not None and not storage.nbytes():
            storage.resize_(found.host.nbytes)
            storage.copy_(found.host.untyped_storage(), non_blocking=non_blocking)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


def _storage(tensor: Tensor) -> UntypedStorage | None:
    """None where there is none, as of sparse tensors."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        # inside vmap, which puts tensors into others
        inside = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        return _storage(torch._C._functorch.get_unwrapped(tensor)) if inside else None


def _host_memory(storage: UntypedStorage) -> Tensor:
    """As many bytes, uint8; locked where a GPU copies to them, if the system lets so many be."""
    if storage.device.type == "cuda":
        try:
            return torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:
            pass
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")


def _finish(devices: Collection[torch.device]) -> None:
    """Wait for all that CUDA devices among these have to do, and give up what only speeds it up."""
    on_gpu = [device for device in devices if device.type == "cuda"]
    for device in on_gpu:
        # on all streams: the model may have some of its own
        torch.cuda.synchronize(device)
    if on_gpu:
        # each thread has its own for products, of up to 32 MiB, and batches are threads
        torch._C._cuda_clearCublasWorkspaces()


def _alive(ref: StorageWeakRef) -> UntypedStorage | None:
    found: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(ref.cdata)
    return found
