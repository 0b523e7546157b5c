"""Calibration: run the float model on data, see its sites, and keep what a plan needs to know of their inputs.

It watches function calls of eager torch and knows weights by identity, so it sees `F.linear`, functional uses and
GPT-2's Conv1D alike, and the same linears that a compiler finds in the model's graph.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from qcompile.binding import Binding, require_values
from qcompile.errors import CalibrationError
from qcompile.graph import Op
from qcompile.observers import Stats, merge, observe
from qcompile.plan import Plan, make_plan
from qcompile.presets import parse_recipe
from qcompile.recipe import Recipe
from qcompile.sites import LeftOver, Site

_LOG = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: str | Path | Mapping[str, Any] | Recipe = "int8-static",
    *,
    progress: bool = True,
) -> Plan:
    """The plan of a recipe for a model, with ranges of activations from data; it is bound to the model.

    batches: what the model takes: dicts of keyword arguments, tuples of positional ones, or single tensors. Where a
        dict has an attention_mask [B, T], rows of activations that are padding (0) are not counted.
    progress: show a bar, if standard error is a terminal.
    The model runs in eval mode without gradients; its training flags are as before afterwards.
    Raises CalibrationError without batches, without sites, or if an activation is NaN or Inf; WeightError if a
    parameter has no values; and what `make_plan`
    and `parse_recipe` raise.
    """
    parsed = parse_recipe(recipe)
    if isinstance(batches, Mapping | Tensor | str):
        raise CalibrationError(
            f"batches is one {type(batches).__name__}, not a collection of batches: write calibrate(model, [batch])"
        )
    model = getattr(model, "_orig_mod", model)
    for name, parameter in model.named_parameters():
        require_values(name, parameter)
    watch = _Watch(Binding(model))
    index = -1
    with _evaluating(model), torch.no_grad():
        for index, batch in enumerate(_shown(batches) if progress else batches):
            watch.start(index, _mask(batch))
            _run(model, batch, index, watch)
    _require_data(parsed, index + 1, watch.sites)
    plan = make_plan(list(watch.sites.values()), parsed, watch.stats, watch.left_over())
    return plan.bind(model)


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


class _Watch(TorchFunctionMode):
    """Sees every function call of a model: sites and stats by name, and who else read a parameter."""

    def __init__(self, binding: Binding) -> None:
        super().__init__()
        self.sites: dict[str, Site] = {}
        self.stats: dict[str, Stats] = {}
        self._binding = binding
        self._readers: dict[str, str] = {}
        self._groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._group_count = 0
        self._index = 0
        self._mask: Tensor | None = None
        self._said_unmasked = False

    def start(self, index: int, mask: Tensor | None) -> None:
        """The next batch has this number and this mask of real tokens, bool [B, T]."""
        self._index, self._mask = index, mask

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

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # first, so that shapes that do not fit are the model's error
        result = func(*args, **kwargs)
        spelling = _SPELLINGS.get(func)
        if spelling is None or not self._site(spelling, args, kwargs):
            self._reader(func, (*args, *kwargs.values()), result)
        return result

    def _site(self, spelling: _Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Note the site that this call is; False if it is none."""
        x, weight = _argument(spelling.x, args, kwargs), _argument(spelling.weight, args, kwargs)
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or weight.dim() != 2:
            return False
        parameter = self._binding.parameter_of(weight)
        name = self._binding.site_name(weight, spelling.op)
        if parameter is None or name is None or parameter.numel() != weight.numel():
            return False
        if name not in self.sites:
            weight = weight.t() if spelling.transposed else weight
            self.sites[name] = Site(name=name, op=spelling.op, weight=weight.detach(), group=self._group(x))
        if spelling.op is Op.LINEAR:
            self._observe(name, x)
        return True

    def _group(self, x: Tensor) -> int:
        """A number that sites reading the same activation share."""
        version = 0 if x.is_inference() else x._version
        if self._groups.get(x, (None, None))[0] != version:
            self._groups[x] = (version, self._group_count)
            self._group_count += 1
        return int(self._groups[x][1])

    def _observe(self, name: str, x: Tensor) -> None:
        rows = self._real_rows(name, x)
        if rows.numel() == 0:
            return
        seen = observe(rows, batch=self._index)
        if not seen.is_finite:
            raise CalibrationError(
                f"batch {self._index} gives NaN or Inf at the input of {name!r} {list(x.shape)}: "
                "check the batch and the float model's weights, or leave the batch out"
            )
        self.stats[name] = merge(self.stats[name], seen) if name in self.stats else seen

    def _real_rows(self, name: str, x: Tensor) -> Tensor:
        """The rows of x that are no padding, [rows, K]; all of them where the mask does not fit."""
        rows, mask = x.detach().reshape(-1, x.shape[-1]), self._mask
        if mask is None or bool(mask.all()):
            return rows
        if x.shape[:-1] in (mask.shape, (mask.numel(),)):
            return rows[mask.flatten().to(rows.device)]
        # one row a sequence, as poolers have: nothing of it is padding
        if x.shape[:-1] != mask.shape[:1] and not self._said_unmasked:
            self._said_unmasked = True
            _LOG.warning(
                "the input of %r %s has not the attention_mask's shape %s: padding is counted there",
                name,
                list(x.shape),
                list(mask.shape),
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


def _mask(batch: Any) -> Tensor | None:
    """bool [B, T], True for a real token, if the batch says so."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _run(model: nn.Module, batch: Any, index: int, watch: TorchFunctionMode) -> None:
    if not isinstance(batch, Mapping | tuple | list | Tensor):
        raise CalibrationError(
            f"batch {index} is {type(batch).__name__}, not a dict of keyword arguments, a tuple of positional ones, "
            "or a tensor"
        )
    try:
        with watch:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, Tensor):
                model(batch)
            else:
                model(*batch)
    except Exception as error:
        error.add_note(f"while qcompile.calibrate ran batch {index} through {type(model).__name__}")
        raise


def _require_data(recipe: Recipe, count: int, sites: Mapping[str, Site]) -> None:
    if count == 0:
        purpose = "static ranges come from data" if recipe.needs_data else "the model's sites are seen while it runs"
        raise CalibrationError(
            f"batches is empty, and recipe {recipe.name!r} needs at least one: {purpose}. "
            "Give batches that the model takes (an iterator that was used up is empty, too)"
        )
    if not sites:
        raise CalibrationError(
            f"{count} batches ran, and no linear or embedding read a parameter of the model: calibrate the eager "
            "float model itself, not a wrapper that calls another one"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, behind a progress bar if someone watches and `rich` is at hand."""
    if not sys.stderr.isatty():
        return batches
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return batches
    return track(batches, description="calibrate", console=Console(stderr=True), transient=True)
