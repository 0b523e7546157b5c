"""What GPTQ costs a stack of a large model's layers on a GPU: seconds and memory, and what it gains over rounding.

    python examples/benchmarks/gptq_stack.py [--layers 16] [--batches 64] [--tokens 2048] [--device cuda]

Layers of Llama-3.1-8B's shapes with random weights, without embeddings and logits, calibrated on sequences of 2048
hidden states whose channels are correlated, as those of real models are, in host memory. Seconds are those of
`qcompile.calibrate`, from the float model to the plan; memory is the most that PyTorch ever held meanwhile on the
device, beyond the float model. Codes are checked on a sequence that was not among the data: what they make of it must
be nearer to the float model's result than what rounding makes of it.
Writes examples/benchmarks/results/gptq_stack.json.
"""

import argparse
import time
from typing import Any

import torch
from decoder_cuda import HIDDEN, INNER, decoder, rotations
from outliers import quantized
from result_files import RESULTS, device, write_result
from torch import Tensor, nn

import qcompile
from qcompile.plan import Plan

TOKENS = 2048
RECIPE, ROUNDED = "gptq4", "int4-weight"
# share of a hidden state's variance that lies in few directions, and how many
SHARED, DIRECTIONS = 0.9, 256


def sequences(count: int, tokens: int, place: str) -> list[tuple[Any, ...]]:
    """What the stack takes: hidden states [1, T, HIDDEN], places [T], rotations [T, HEAD / 2], and no caches.

    They are made on the device, and lie in host memory.
    """
    directions = torch.randn(DIRECTIONS, HIDDEN, device=place) * (SHARED / DIRECTIONS) ** 0.5
    places = torch.arange(tokens, device=place)
    cos, sin = rotations(places)
    found = []
    for _ in range(count):
        alone = torch.randn(1, tokens, HIDDEN, device=place) * (1 - SHARED) ** 0.5
        x = torch.randn(1, tokens, DIRECTIONS, device=place) @ directions + alone
        found.append((x.bfloat16().cpu(), places.cpu(), cos.cpu(), sin.cpu(), ()))
    return found


def off(model: nn.Module, plan: Plan, given: tuple[Any, ...], exact: Tensor) -> float:
    """How far the plan moves the stack's result, relatively."""
    y = quantized(model, plan)(*given).float()
    return float((y - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    model = decoder(given.layers, given.device)
    *batches, held_out = sequences(given.batches + 1, given.tokens, given.device)
    nbytes = sum(p.nbytes for p in model.parameters())
    on_gpu = given.device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    plan = qcompile.calibrate(model, batches, RECIPE)
    seconds = time.perf_counter() - start
    most = torch.cuda.max_memory_allocated() - nbytes if on_gpu else None
    with torch.no_grad():
        held_out = tuple(x.to(given.device) if isinstance(x, Tensor) else x for x in held_out)
        exact = model(*held_out).float()
        rounded = qcompile.calibrate(model, batches[:1], ROUNDED, progress=False)
        error, error_rounded = (off(model, one, held_out, exact) for one in (plan, rounded))
    if not error < error_rounded:
        raise SystemExit(f"GPTQ moves the result by {error:.3g}, and rounding by {error_rounded:.3g}")
    result = {
        "command": "python examples/benchmarks/gptq_stack.py",
        "machine": device(given.device),
        "shapes": {"layers": given.layers, "hidden": HIDDEN, "inner": INNER},
        "data": [given.batches, given.tokens],
        "recipe": RECIPE,
        "seconds": round(seconds, 1),
        "model_gigabytes": round(nbytes / 1e9, 3),
        "more_gigabytes": None if most is None else round(most / 1e9, 3),
        "error": round(error, 5),
        "error_of_rounding": round(error_rounded, 5),
    }
    print(result)
    if on_gpu:
        write_result(RESULTS / "gptq_stack.json", result)


if __name__ == "__main__":
    main()
