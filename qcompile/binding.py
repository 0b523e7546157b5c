"""Which name of a model a tensor has: by identity, so that it holds for eager torch and for any compiled graph."""

import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qcompile.errors import WeightError
from qcompile.graph import Op


def tensors_of(model: nn.Module) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Every tensor that a model keeps, with its qualified names: parameters, buffers, and attributes of modules."""
    named: dict[int, tuple[Tensor, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in own.items():
            if isinstance(value, Tensor):
                named.setdefault(id(value), (value, []))[1].append(f"{path}.{name}" if path else name)
    for tensor, names in named.values():
        yield tensor, tuple(names)


class Binding:
    """The parameters of one model and their qualified names. Parameters are held weakly.

    A shared parameter has several names (aliases), in the order of `named_parameters`.
    """

    def __init__(self, model: nn.Module) -> None:
        # what torch.compile wraps around a model is no part of the names
        model = getattr(model, "_orig_mod", model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        aliases: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            aliases.setdefault(id(parameter), []).append(name)
        self._aliases = {i: (weakref.ref(parameters[names[0]]), tuple(names)) for i, names in aliases.items()}
        self._at = {(p.data_ptr(), p.numel()): weakref.ref(p) for p in parameters.values() if _has_memory(p)}
        self._tables = frozenset(
            f"{name}.{own}" if name else own
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Embedding)
            for own, _ in module.named_parameters(recurse=False)
        )

        # a graph calls buffers and attributes by their names, too, and they may be weights
        self._kept = {
            name: weakref.ref(tensor) for tensor, names in tensors_of(model) for name in names if name not in parameters
        }
        self._borrowers = frozenset(n for n, m in model.named_modules() if getattr(m, "weight", None) is None)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The living parameters by every name they have."""
        alive = ((ref(), names) for ref, names in self._aliases.values())
        return {name: p for p, names in alive if p is not None for name in names}

    def parameter_of(self, tensor: Tensor) -> Tensor | None:
        """The parameter that `tensor` is, or is a view of, or shares all its memory with; None if there is none."""
        for candidate in (tensor, tensor._base):
            if candidate is None:
                continue
            ref, _ = self._aliases.get(id(candidate), (None, ()))
            # an id may be used again after its tensor died
            if ref is not None and ref() is candidate:
                return candidate
        if not _has_memory(tensor):
            return None
        same = self._at.get((tensor.data_ptr(), tensor.numel()))
        parameter = None if same is None else same()
        # a parameter may have moved since, and left its memory to others
        return parameter if parameter is not None and parameter.data_ptr() == tensor.data_ptr() else None

    def name_of(self, tensor: Tensor) -> tuple[str, ...]:
        """All qualified names of the parameter that `tensor` is or is a view of; () if it is none of the model's."""
        parameter = self.parameter_of(tensor)
        return () if parameter is None else self._aliases[id(parameter)][1]

    def weight_at(self, site: str, shape: tuple[int, ...]) -> Tensor | None:
        """The weight of the site of that name, which may be a buffer; None if there is none.

        shape: of a plan's decision. A module without a weight runs with those of others, which its name does not tell:
        one of that shape is taken for it.
        """
        parameters = self.parameters
        kept = {name: tensor for name, ref in self._kept.items() if (tensor := ref()) is not None}
        named = {**kept, **parameters}
        found = named.get(f"{site}.weight" if site else "weight", named.get(site))
        if found is not None or site not in self._borrowers:
            return found
        matrices = (p for p in parameters.values() if p.dim() > 1)
        return next((p for p in matrices if sorted(p.flatten(1).shape) == sorted(shape)), None)

    def sharing(self, sites: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], ...]:
        """Names of sites that read one weight, where several do.  sites: shapes by name, see `weight_at`."""
        names: dict[int, list[str]] = {}
        for name, shape in sites.items():
            if (weight := self.weight_at(name, shape)) is not None:
                names.setdefault(id(weight), []).append(name)
        return tuple(tuple(several) for several in names.values() if len(several) > 1)

    def site_name(self, tensor: Tensor, op: Op) -> str | None:
        """Name of the site where an op of that kind reads `tensor` as its weight; None if it is no parameter.

        It is the path of the module that owns the weight, or the full name of a parameter not called "weight". Of a
        weight shared by an embedding and a linear, each takes its own module's; a linear without one takes the
        parameter's full name, because the table's path is the embedding's.
        """
        return next(iter(self.site_names(tensor, op)), None)

    def site_names(self, tensor: Tensor, op: Op) -> tuple[str, ...]:
        """`site_name`, and behind it those of other modules that have the same weight for an op of that kind."""
        aliases = self.name_of(tensor)
        own = [name for name in aliases if (name in self._tables) == (op is Op.EMBEDDING)]
        if not own and op is not Op.EMBEDDING:
            return aliases[:1]
        return tuple("" if name == "weight" else name.removesuffix(".weight") for name in own or aliases[:1])


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.data_ptr() != 0


def require_values(name: str, tensor: Tensor) -> None:
    """Raise WeightError for a tensor on the meta device: a checkpoint was not loaded, or not wholly."""
    if tensor.is_meta:
        raise WeightError(
            f"weight {name!r} {list(tensor.shape)} is on the meta device: the checkpoint is not fully loaded; "
            "load it first"
        )
