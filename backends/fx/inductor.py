"""From a lowered FX module to compiled code: constants become inputs, then Inductor.

Constants are inputs because one compiled frame may serve several module instances: baked in, the weights of one
would silently be used for all.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph, GraphModule, Node

import qcompile.numerics

# freezing would bake constants in, and rewrites integer matmuls into reference kernels on the CPU
PATCHES = {"freezing": False}

Compiled = Callable[..., Any]


def lift_constants(module: GraphModule) -> tuple[GraphModule, list[str]]:
    """A copy of `module` whose tensors are inputs, after its own; and their attribute names, in that order."""
    graph = Graph()
    copied: dict[Node, Node] = {}
    constants: dict[str, Node] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        copied[node] = graph.node_copy(node)
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if isinstance(getattr(module, name, None), Tensor):
            constants[name] = copied[node] = constants.get(name) or graph.placeholder(f"constant_{name}")
    for node in module.graph.nodes:
        if node not in copied:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    lifted = GraphModule(module, graph)
    lifted.meta = dict(module.meta)
    return lifted, list(constants)


class Inductor:
    """Compiles modules for one Dynamo frame, also when Dynamo is done with it (a new structure in a shared frame)."""

    def __init__(self, frame: GraphModule, example_inputs: Sequence[Any], mode: str | None) -> None:
        self._placeholders = {n.name: n for n in frame.graph.find_nodes(op="placeholder")}
        self._context = TracingContext.try_get()
        self._patches: dict[str, Any] = PATCHES | (list_mode_options(mode) if mode else {})
        fakes = [_fake(x, self._context) for x in example_inputs]
        self._inputs = dict(zip(self._placeholders, fakes, strict=True))

    def compile(self, module: GraphModule) -> tuple[Compiled, list[str], list[str]]:
        """Compiled code f(*inputs, *constants) of a module; the names of its inputs and of its constants."""
        lifted, constants = lift_constants(module)
        inputs = [n for n in lifted.graph.find_nodes(op="placeholder")][: -len(constants) or None]
        names = [n.name for n in inputs]
        fakes = [self._inputs[name] for name in names]
        fakes += [_fake(getattr(module, name), self._context, static=True) for name in constants]
        for node in lifted.graph.find_nodes(op="placeholder"):
            self._mark(node)
        lifted._param_name_to_source = {}  # type: ignore[assignment]
        inside = tracing(self._context) if self._context is not None else nullcontext()
        with inside, torch.no_grad(), torch.compiler.config.patch(cache_key_tag=_cache_tag()):  # type: ignore[attr-defined]
            code = cast(Compiled, compile_fx(lifted, fakes, config_patches=self._patches))
        return code, names, constants

    def _mark(self, node: Node) -> None:
        """Give an input what AOTAutograd wants: a source of its own, and whether it stays where it is (CUDA graphs)."""
        original = self._placeholders.get(node.name)
        if original is not None:
            node.meta = dict(original.meta)
            source = getattr(original, "_dynamo_source", None)
        else:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            source = LocalSource(f"qcompile_{node.name}")
        if source is not None:
            node._dynamo_source = source


def _cache_tag() -> str:
    """What torch's compile caches add to their keys: they know our ops by name only, not what they decompose into."""
    return f"{torch.compiler.config.cache_key_tag}qcompile {_source_hash()}"


@cache
def _source_hash() -> str:
    root = Path(qcompile.numerics.__file__).parent
    sources = sorted([*root.glob("*.py"), *root.glob("backends/fx/**/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _fake(x: Any, context: TracingContext | None, *, static: bool = False) -> Any:
    """x as the fake tensor that AOTAutograd would make of it, with Dynamo's symbols for dynamic sizes."""
    if not isinstance(x, Tensor) or context is None or context.fake_mode is None:
        return x
    if static:
        return context.fake_mode.from_tensor(x, static_shapes=True)
    symbols = context.tensor_to_context.get(x)
    source = None if symbols is None else symbols.tensor_source
    return context.fake_mode.from_tensor(x, symbolic_context=symbols, source=source, trace=False)


def structure(module: GraphModule) -> str:
    """What decides whether compiled code fits: the graph, and the kind of each constant, without values."""
    kinds = []
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = getattr(module, str(node.target), None)
        if isinstance(tensor, Tensor):
            kinds.append(f"{node.target}: {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}")
    return "\n".join([str(module.graph), *kinds])
