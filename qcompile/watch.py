"""Watching: run the float model on data, see its sites, and keep what a plan needs to know of their inputs.

It watches function calls of eager torch and knows weights by identity, so it sees `F.linear`, functional uses and
GPT-2's Conv1D alike, and the same linears that a compiler finds in the model's graph.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from qcompile.binding import Binding, require_values
from qcompile.calls import Calls
from qcompile.errors import CalibrationError
from qcompile.gathering import Gathering, Room
from qcompile.graph import Op
from qcompile.observers import Part, Stats, merge
from qcompile.progress import shown
from qcompile.sites import LeftOver, Site

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What running a model on data showed.

    sites: by name. stats: of their inputs, by name; sites that always read one activation share them.
    left: weights that no site reads. batches: how many ran. example: the first that is not empty.
    features: what errors of each output feature cost, float32 [N] by site; only for recipes that ask for it.
    again: names of linears that read several activations in one run of the model.
    """

    sites: Mapping[str, Site]
    stats: Mapping[str, Stats]
    left: Sequence[LeftOver]
    batches: int
    example: Any
    features: Mapping[str, Tensor] = field(default_factory=dict)
    again: Collection[str] = ()


def watch(model: nn.Module, batches: Iterable[Any], parts: Part, *, progress: bool = True) -> Seen:
    """Run the model on batches and see its sites.

    batches, progress: see `qcompile.calibrate`.  parts: the histograms to keep of each activation.
    The model runs in eval mode without gradients; its training flags are as before afterwards.
    Raises CalibrationError for batches of a wrong type, or if an activation is NaN or Inf; WeightError if a parameter
    has no values.
    """
    require_several(batches)
    for name, parameter in model.named_parameters():
        require_values(name, parameter)
    watching = _Watch(Binding(model), parts)
    example, ran = None, 0
    with evaluating(model), torch.no_grad():
        for ran, batch in enumerate(shown(batches, progress=progress), start=1):
            # what is checked on an empty batch would always hold
            example = example if _holds_numbers(example) else batch
            watching.start(ran - 1, mask_of(batch))
            with watching:
                run_batch(model, batch, ran - 1)
    return Seen(
        sites=watching.sites,
        stats=watching.stats(),
        left=watching.left_over(),
        batches=ran,
        example=example,
        again=tuple(watching.again),
    )


def require_several(batches: Iterable[Any]) -> None:
    """Raise CalibrationError for what is one batch, and not a collection of them."""
    if isinstance(batches, Mapping | Tensor | str):
        raise CalibrationError(
            f"batches is one {type(batches).__name__}, not a collection of batches: write calibrate(model, [batch])"
        )


@dataclass(frozen=True, kw_only=True)
class _Spelling:
    """How a function is an op with a weight: positions and keywords of its input and its weight."""

    op: Op
    x: tuple[int, str]
    weight: tuple[int, str]
    # the weight comes as [K, N]
    transposed: bool = False


_LINEAR = _Spelling(op=Op.LINEAR, x=(0, "input"), weight=(1, "weight"))
_MATMUL = _Spelling(op=Op.LINEAR, x=(0, "input"), weight=(1, "other"), transposed=True)
_MM = _Spelling(op=Op.LINEAR, x=(0, "input"), weight=(1, "mat2"), transposed=True)
_ADDMM = _Spelling(op=Op.LINEAR, x=(1, "mat1"), weight=(2, "mat2"), transposed=True)
_EMBEDDING = _Spelling(op=Op.EMBEDDING, x=(0, "input"), weight=(1, "weight"))

_SPELLINGS: dict[Callable[..., Any], _Spelling] = {
    torch.nn.functional.linear: _LINEAR,
    torch.matmul: _MATMUL,
    torch.Tensor.matmul: _MATMUL,
    torch.Tensor.__matmul__: _MATMUL,
    torch.mm: _MM,
    torch.Tensor.mm: _MM,
    torch.addmm: _ADDMM,
    torch.Tensor.addmm: _ADDMM,
    torch.nn.functional.embedding: _EMBEDDING,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A call that is a site: its name, x [..., K], and the weight [N, K] it reads.

    spelling: where both stand among the arguments.
    """

    name: str
    spelling: _Spelling
    x: Tensor
    weight: Tensor

    @property
    def op(self) -> Op:
        """What kind of site it is."""
        return self.spelling.op

    def arguments(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor, weight: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, with others in place of its x and its weight [N, K]."""
        weight = weight.t() if self.spelling.transposed else weight
        positional, named = list(args), dict(kwargs)
        for (position, keyword), new in ((self.spelling.x, x), (self.spelling.weight, weight)):
            if position < len(positional):
                positional[position] = new
            else:
                named[keyword] = new
        return tuple(positional), named


def find_call(
    binding: Binding, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call | None:
    """The site that this function call is, if it is one: an op with a weight that is a parameter of the model."""
    spelling = _SPELLINGS.get(func)
    if spelling is None:
        return None
    x, weight = _argument(spelling.x, args, kwargs), _argument(spelling.weight, args, kwargs)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    parameter = binding.parameter_of(weight)
    name = binding.site_name(weight, spelling.op)
    if parameter is None or name is None or parameter.numel() != weight.numel():
        return None
    return Call(name=name, spelling=spelling, x=x, weight=weight.t() if spelling.transposed else weight)


class _Watch(Calls):
    """Sees every function call of a model: sites and stats by name, and who else read a parameter."""

    def __init__(self, binding: Binding, parts: Part) -> None:
        super().__init__()
        self.sites: dict[str, Site] = {}
        self._binding = binding
        self._parts = parts
        self._readers: dict[str, str] = {}
        # whether some parameter is left of which no reader is known: to look at every call for them takes time
        self._asks = True
        self.again: dict[str, None] = {}
        # of what each linear read last: the batch, and the number of the activation
        self._last: dict[str, tuple[int, int]] = {}
        self._numbers = count()
        # of each activation: its version, the site that read it first, and a number
        self._first: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # what a site read first, and for each site the sites that read its inputs first
        self._seen: dict[str, Gathering] = {}
        self._room = Room()
        self._shared: dict[str, dict[str, None]] = {}
        self._index = 0
        self._mask: Tensor | None = None
        self._said_unmasked = False

    def start(self, index: int, mask: Tensor | None) -> None:
        """The next batch has this number and this mask of real tokens, bool [B, T]."""
        self._index, self._mask = index, mask
        self._asks = any(not found.reader for found in self.left_over())

    def left_over(self) -> list[LeftOver]:
        """Float parameters of two and more dimensions that no site reads, with who read them."""
        read = {id(self._binding.parameter_of(site.weight)) for site in self.sites.values()}
        left: dict[int, LeftOver] = {}
        for name, parameter in self._binding.parameters.items():
            if parameter.dim() < 2 or not parameter.is_floating_point() or id(parameter) in read:
                continue
            found = LeftOver(name=name, weight=parameter, reader=self._readers.get(name, ""))
            left.setdefault(id(parameter), found)
        return list(left.values())

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # first, so that shapes that do not fit are the model's error
        result = func(*args, **kwargs)
        call = find_call(self._binding, func, args, kwargs)
        if call is not None:
            self._site(call)
        elif self._asks:
            self._reader(func, (*args, *kwargs.values()), result)
        return result

    def _site(self, call: Call) -> None:
        name, x = call.name, call.x
        if name not in self.sites:
            group = list(self.sites).index(first) if (first := self._reader_of(x)) in self.sites else len(self.sites)
            self.sites[name] = Site(name=name, op=call.op, weight=call.weight.detach(), group=group)
        if call.op is Op.LINEAR:
            first = self._reader_of(x)
            self._shared.setdefault(name, {})[first or name] = None
            if first is None:
                self._first[x] = (_version(x), name, next(self._numbers))
                self._observe(name, x)
            read = (self._index, self._first[x][2])
            if self._last.setdefault(name, read) != read and self._last[name][0] == self._index:
                self.again[name] = None
            self._last[name] = read

    def stats(self) -> dict[str, Stats]:
        """Of each site's input; sites that always read the same share one object."""
        known = {name: stats for name, seen in self._seen.items() if (stats := seen.stats()) is not None}
        found: dict[tuple[str, ...], Stats] = {}
        by_site = {}
        for name, first in self._shared.items():
            kept = tuple(f for f in first if f in known)
            if kept:
                found.setdefault(kept, reduce(merge, (known[f] for f in kept)))
                by_site[name] = found[kept]
        return by_site

    def _reader_of(self, x: Tensor) -> str | None:
        """The site that read this activation first, None if none did since it was last written to."""
        version, name, _ = self._first.get(x, (None, None, None))
        return name if version == _version(x) else None

    def _observe(self, name: str, x: Tensor) -> None:
        rows = self._real_rows(name, x)
        if rows.numel() == 0:
            return
        if name not in self._seen:
            self._seen[name] = Gathering(f"at the input of {name!r}", self._parts, self._room)
        self._seen[name].add(rows, batch=self._index)

    def _real_rows(self, name: str, x: Tensor) -> Tensor:
        """The rows of x that are no padding, [rows, K]; all of them where the mask does not fit."""
        rows, fits = real_rows(x, self._mask)
        if not fits and not self._said_unmasked:
            self._said_unmasked = True
            assert self._mask is not None
            _LOG.warning(
                "the input of %r %s has not the attention_mask's shape %s: padding is counted there",
                name,
                list(x.shape),
                list(self._mask.shape),
            )
        return rows

    def _reader(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """Note which parameters this call reads, unless it only looks at one or views it whole."""
        if not any(isinstance(r, Tensor) for r in _flat([result])):
            return
        for tensor in _flat(args):
            parameter = self._binding.parameter_of(tensor) if isinstance(tensor, Tensor) else None
            if parameter is None or (isinstance(result, Tensor) and self._views_whole(result, parameter)):
                continue
            for name in self._binding.name_of(parameter):
                self._readers.setdefault(name, _function_name(func))

    def _views_whole(self, result: Tensor, parameter: Tensor) -> bool:
        return result.numel() == parameter.numel() and self._binding.parameter_of(result) is parameter


def _holds_numbers(batch: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.numel() > 0 for leaf in pytree.tree_leaves(batch))


def _argument(where: tuple[int, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    position, keyword = where
    return args[position] if position < len(args) else kwargs.get(keyword)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _function_name(func: Callable[..., Any]) -> str:
    """As a graph calls it: "transformers::grouped_mm_fallback" for a custom op, else the function's own name."""
    operator = getattr(func, "_qualified_op_name", None) or getattr(getattr(func, "_schema", None), "name", None)
    return str(operator or getattr(func, "__name__", func))


def mask_of(batch: Any) -> Tensor | None:
    """bool [B, T], True for a real token, if the batch says so; it may hold arrays, too."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or getattr(mask, "ndim", 0) != 2:
        return None
    return torch.as_tensor(mask).bool()


def real_rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """The rows of x that are no padding [rows, K], and whether it could be told: all of them where it could not.

    mask: see `mask_of`.
    """
    rows = x.detach().flatten(end_dim=-2) if x.dim() > 1 else x.detach().reshape(1, -1)
    if mask is None or bool(mask.all()):
        return rows, True
    if x.shape[:-1] in (mask.shape, (mask.numel(),)):
        return rows[mask.flatten().to(rows.device)], True
    # one row a sequence, as poolers have: nothing of it is padding
    return rows, x.shape[:-1] == mask.shape[:1]


def run_batch(model: Callable[..., Any], batch: Any, index: int) -> Any:
    """What the model gives for a batch.  Raises CalibrationError for a batch of a wrong type; index: for messages.

    A batch that lies as a whole in host memory is moved to the device that the whole model is on.
    """
    if not isinstance(batch, Mapping | tuple | list | Tensor):
        raise CalibrationError(
            f"batch {index} is {type(batch).__name__}, not a dict of keyword arguments, a tuple of positional ones, "
            "or a tensor"
        )
    batch = _beside(model, batch)
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch) if isinstance(batch, Tensor) else model(*batch)
    except Exception as error:
        error.add_note(f"while qcompile.calibrate ran batch {index} through {type(model).__name__}")
        raise


def _beside(model: Callable[..., Any], batch: Any) -> Any:
    """The batch where the model is; as it is where some of it is there already, since the rest may belong elsewhere."""
    devices = {p.device for p in model.parameters()} if isinstance(model, nn.Module) else set()
    values = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]
    if len(devices) != 1 or any(x.device.type != "cpu" for x in tensors):
        return batch
    (device,) = devices
    if device.type in ("cpu", "meta"):
        return batch
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, values)


def first_rows(batch: Any) -> Any:
    """The first two rows of a batch [B, ...] whose tensors all have B rows; others as they are.

    Of two, because a dimension of size 1 is easily mistaken for another, and a graph that mixes rows shows it.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    tensors = [x for x in (values if isinstance(values, list | tuple) else [values]) if isinstance(x, Tensor)]
    sizes = {x.shape[0] if x.dim() else 0 for x in tensors}
    if len(sizes) != 1 or not all(x.dim() > 1 for x in tensors):
        return batch

    def first(x: Any) -> Any:
        return x[:2] if isinstance(x, Tensor) else x

    if isinstance(batch, Mapping):
        return {name: first(x) for name, x in batch.items()}
    return first(batch) if isinstance(batch, Tensor) else tuple(first(x) for x in batch)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; its training flags are as before afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
