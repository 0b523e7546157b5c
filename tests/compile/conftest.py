"""Each test compiles anew, without gradients."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run what Inductor would compile as the graph it was given: all of the way but generating C++, which is slow."""
    from torch._functorch import config as aot
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config as inductor
    from torch._inductor.compile_fx import compile_fx

    def run_graph(gm: torch.fx.GraphModule, example_inputs: object, **_: object) -> object:
        return make_boxed_func(gm.forward)

    def compile_without_code(*args: object, **kwargs: object) -> object:
        return compile_fx(*args, inner_compile=run_graph, **kwargs)

    monkeypatch.setattr("qcompile.backends.fx.inductor.compile_fx", compile_without_code)
    # torch's caches on disk would answer with code that Inductor generated in another test or run
    with aot.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        yield
