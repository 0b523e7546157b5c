"""The measured tables of README.md, made from the result files beside this script.

python examples/benchmarks/tables.py     # writes them into README.md
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_table import study_table

from qcompile.cli.tables import markdown_table

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- measured: python examples/benchmarks/tables.py -->\n", "<!-- /measured -->"

# a perplexity, of which only the power of ten is of interest
SENSELESS = 1000


def result(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return loaded


def drawing(name: str, text: str) -> str:
    """A link to the picture of a result."""
    return f"[{text}](examples/benchmarks/results/{name}.png)"


def under(text: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """What was measured and where, and the table."""
    return f"{text}\n\n{markdown_table(columns, list(rows))}"


def quantized(rows: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All rows but the float model's, with their names."""
    return ((name, row) for name, row in rows.items() if name != "float")


def remark(found: Mapping[str, Any]) -> str:
    """What a result, or a row of it, says of the code that it was measured with, where that has changed since."""
    return "".join(f" {one['remark']}." for one in (found, *found.get("rows", {}).values()) if "remark" in one)


def speed_table() -> str:
    """Milliseconds of whole models on the CPU."""
    found = result("cpu_models")
    machine = found["machine"]
    text = (
        f"CPU: {machine['processor']} ({', '.join(machine['features'])}), {machine['threads']} threads, "
        f"torch {machine['torch']}; median milliseconds, all candidates under `torch.compile`, in turns "
        "(`examples/benchmarks/cpu_models.py`)."
    )
    rows = (
        (
            row["model"],
            " x ".join(map(str, row["shape"])),
            *(f"{row['ms'][name]:.1f}" for name in ("fp32", "bf16", "int8")),
            f"{row['speed_over_fp32']['int8']:.2f}x",
        )
        for row in found["rows"]
    )
    return under(text, ("model", "tokens", "fp32", "bf16", "qcompile int8 on the fp32 model", "over fp32"), rows)


def quality_table() -> str:
    """Perplexity and divergence of a language model under every preset."""
    found = result("language_quality_cuda")
    machine, (count, length) = found["machine"], found["windows"]
    text = (
        f"Quality: {found['model']} in {found['dtype'].removeprefix('torch.')}, {count} windows of {length} tokens of "
        f"WikiText-2, {machine['device']}, torch {machine['torch']} (`examples/benchmarks/language_quality.py`). "
        f"Perplexity of the float model {found['rows']['float']['perplexity']:.2f}.{remark(found)}"
    )
    rows = (
        (
            name,
            f"{row['change']:+.2%}",
            f"{row['kl']:.4f}",
            " -> ".join(f"{size / 1e6:.0f}" for size in row["weight_bytes"]),
            ", ".join(row["kernels"]),
        )
        for name, row in quantized(found["rows"])
    )
    return under(text, ("recipe", "perplexity", "KL to float, nats a token", "weights, MB", "runs as"), rows)


def outlier_table() -> str:
    """Divergence of a language model with and without injected outliers, smoothed and split."""
    found, floats = result("outliers_cuda"), result("outliers_static_cpu")
    machine, (count, length) = found["machine"], found["windows"]
    text = (
        f"Outliers: {found['model']} with six channels of every norm made 20 to 60 times larger, its function kept; "
        f"{count} windows of {length} tokens, calibrated on {found['calibration_windows']}; {machine['device']}, torch "
        f"{machine['torch']} (`examples/benchmarks/outliers.py`). KL to float in nats a token (change of perplexity), "
        f"with the outliers, and KL without them. With 8-bit floats: {floats['windows'][0]} windows, a CPU. "
        + found["remark"]
    )
    rows = (
        (*name.rsplit(", ", 1), f"{row['kl']:.4f} ({row['change']:+.2%})", f"{of['plain'][name]['kl']:.4f}")
        for of in (found, floats)
        for name, row in quantized(of["injected"])
    )
    return under(text, ("input", "method", "with outliers", "without"), rows)


def embedding_table() -> str:
    """Cosines of sentence embeddings."""
    found = result("embedding_quality")
    machine = found["machine"]
    count = next(iter(found["rows"].values()))["sentences"]
    text = (
        f"Embeddings: {found['model']}, {machine['processor']}, torch {machine['torch']}, cosine to the "
        f"float model's on {count} sentences that calibration did not see "
        "(`examples/benchmarks/embedding_quality.py`)."
    )
    rows = (
        (name, f"{row['mean']:.5f}", f"{row['lowest']:.5f}", str(row["multiplications_left"]))
        for name, row in found["rows"].items()
    )
    return under(text, ("recipe", "mean", "lowest", "multiplications left by folds"), rows)


def onnx_table() -> str:
    """Quantized ONNX files beside onnxruntime's quantizers."""
    found = result("onnx_models")
    machine = found["machine"]
    text = (
        f"ONNX: {found['model']}, {machine['processor']}, {machine['threads']} threads, onnxruntime "
        f"{machine['onnxruntime']}; cosine to the float file's embeddings on 32 sentences that calibration did not "
        "see; median milliseconds, each file in turns with quantize_dynamic's (its time over that one's); our recipes "
        "with embeddings in 8 bits, as the baseline has them (`examples/benchmarks/onnx_models.py`)."
    )
    rows = (
        (
            name,
            f"{row['megabytes']:.1f}",
            f"{row['mean']:.4f}",
            f"{row['lowest']:.4f}",
            *(f"{row[f'ms_{shape}']:.1f} ({row[f'over_baseline_{shape}']:.2f}x)" for shape in ("1x128", "8x128")),
            kernels(row),
        )
        for name, row in found["rows"].items()
    )
    return under(text, ("file", "MB", "mean", "lowest", "ms, 1 x 128", "ms, 8 x 128", "fused kernels"), rows)


def kernels(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {kernel}" for kernel, count in row["fused"].items())


def onnx_cuda_table() -> str:
    """Narrow weights in onnxruntime on CUDA."""
    found = result("onnx_cuda")
    machine, shapes = found["machine"], found["shapes"]
    measured = [key for key in found["rows"]["float16"] if key.startswith("us_")]
    text = (
        f"ONNX on CUDA: {shapes['layers']} SwiGLU layers ({shapes['K']}, {shapes['inner']}), target `ort-cuda`, "
        f"{machine['device']}, onnxruntime-gpu {machine['onnxruntime']}, torch {machine['torch']}; error to torch's "
        "float32 under the same rounded weights, relative, and median microseconds of a replayed CUDA graph "
        "(`examples/benchmarks/onnx_cuda.py`)."
    )
    rows = (
        (name, f"{row['megabytes']:.0f}", f"{row['error']:.1e}", *(f"{row[key]:.0f}" for key in measured))
        for name, row in found["rows"].items()
    )
    return under(text, ("weights", "MB", "error", *(f"{key.removeprefix('us_')} tokens" for key in measured)), rows)


def onnx_language_table() -> str:
    """Quantized ONNX files of a language model beside torch.compile under the same plans."""
    found = result("onnx_language")
    machine, (count, length) = found["machine"], found["windows"]
    text = (
        f"ONNX files and torch.compile under the same plans: {found['model']}, {count} windows of {length} tokens of "
        f"WikiText-2, calibrated on {found['calibration_windows']}, {machine['processor']}, {machine['threads']} "
        f"threads, onnxruntime {machine['onnxruntime']}, torch {machine['torch']}; median milliseconds of onnxruntime, "
        "all files in turns. How far the two are apart in perplexity, and the standard error of that, includes what "
        "files with narrow weights alone add: they round inputs to int8 in blocks of 32 "
        "(`examples/benchmarks/onnx_language.py`)."
    )
    columns = ("file", "MB", "perplexity", "in torch", "apart", "KL", "ms, 1 x 16", "ms, 1 x 512")
    return under(text, (*columns, "fused kernels"), (language_row(*named) for named in found["rows"].items()))


def language_row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    # a difference that rounds to nothing has no sign
    kl, difference = (round(x, 5) + 0.0 for x in (row["kl"], row["apart"]))
    return (
        name,
        f"{row['megabytes']:.1f}",
        f"{row['perplexity']:.3f}",
        f"{row['perplexity_in_torch']:.3f}",
        f"{difference:+.3%} ± {row['standard_error_of_apart']:.3%}",
        f"{kl:.4f}",
        f"{row['ms_1x16']:.1f}",
        f"{row['ms_1x512']:.1f}",
        kernels(row),
    )


def calibration_table() -> str:
    """Time beside the plain run, and memory."""
    found = result("calibration_cost")
    machine, (count, length) = found["machine"], found["windows"]
    few, many = next(iter(found["resident_megabytes"].values()))
    text = (
        f"Calibration: {found['model']} on {count} windows of {length} tokens, {machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}: time over that of running the float model, and "
        f"the memory that the process holds before the last of {few} and of {many} batches of one window, and the most "
        "that it ever held, free memory included that its allocator keeps (`examples/benchmarks/calibration_cost.py`)."
        f"{remark(found)}"
    )
    rows = (
        (
            recipe,
            *(f"{row[recipe]['over_plain']:.2f}x" for row in found["time"]),
            *(f"{memory[batches]['held']:.0f} MB, at most {memory[batches]['most']:.0f}" for batches in (few, many)),
        )
        for recipe, memory in found["resident_megabytes"].items()
    )
    return under(text, ("recipe", *(f"batches of {row['batch']}" for row in found["time"]), few, many), rows)


def triton_table() -> str:
    """Microseconds of quantized linears on CUDA, and how much faster than bfloat16."""
    found = result("triton_kernels_h200")
    N, K = max((row["N"], row["K"]) for row in found["results"])
    text = (
        f"Linears on CUDA, {N} x {K}, by rows of x, from bfloat16 to bfloat16, quantization of the input included: "
        f"{found['device']}, torch {found['torch']}, Triton {found['triton']}; microseconds in a CUDA graph, weights "
        "beyond the second-level cache, the speed-up over cuBLAS in bfloat16 in the same run, and the share of the "
        f"floor, which is bytes at the {found['read_tb_s']:.2f} TB/s at which the library read a weight at best, or "
        f"operations at 1979 T/s for 8 bits and the {found['bf16_tflop_s']:.0f} T/s of bfloat16 in the run "
        f"(`examples/benchmarks/triton_kernels.py --no-peers`). {drawing('triton_kernels_h200', 'All shapes, drawn')}."
        f"{remark(found)}"
    )
    cells = {
        (row["format"], row["M"]): f"{row['us']:.1f} ({row['speedup']:.2f}x, {row['floor_us'] / row['us']:.0%})"
        for row in found["results"]
        if (row["N"], row["K"]) == (N, K)
    }
    counts = list(dict.fromkeys(M for _, M in cells))
    rows = ((name, *(cells.get((name, M), "") for M in counts)) for name in dict.fromkeys(name for name, _ in cells))
    return under(text, ("format", *map(str, counts)), rows)


def triton_peers_table() -> str:
    """The same linears in other libraries, in the same run."""
    found = result("triton_kernels")
    N, K = max((row["N"], row["K"]) for row in found["results"])
    libraries = ", ".join(f"{name} {found[name]}" for name in ("gemlite", "torchao", "bitsandbytes"))
    text = (
        f"The same beside others, {found['device']}, {N} x {K}, microseconds: the library's products with everything "
        f"around them by Inductor, tinygemm of torch, {libraries} (`examples/benchmarks/triton_kernels.py`). "
        f"{drawing('triton_kernels', 'All shapes, drawn')}.{remark(found)}"
    )
    rows = (
        (
            row["format"],
            str(row["M"]),
            f"{row['us']:.1f}",
            f"{row['bf16_us']:.1f}",
            ", ".join(f"{title} {us:.1f}" for title, us in row["peers"].items()),
        )
        for row in found["results"]
        if (row["N"], row["K"]) == (N, K)
    )
    return under(text, ("format", "rows of x", "qcompile", "bf16", "others"), rows)


def decoder_table() -> str:
    """A whole decoder on CUDA beside bfloat16."""
    found = result("decoder_cuda")
    machine, shapes = found["machine"], found["shapes"]
    text = (
        f"A decoder on CUDA: {shapes['layers']} layers of {shapes['hidden']} and {shapes['inner']} channels as "
        f"Llama-3.1-8B has them, {shapes['context']} tokens in the cache, {machine['device']}, torch "
        f"{machine['torch']}; milliseconds of a step and the speed-up over `torch.compile` of the bfloat16 original in "
        "the same run, all as CUDA graphs; recipes without what they find on data: shifts, formats, clipped scales "
        f"(`examples/benchmarks/decoder_cuda.py`).{remark(found)}"
    )
    steps = [key for key, value in next(iter(found["rows"].values())).items() if isinstance(value, dict)]
    rows = (
        (
            name,
            f"{row['gigabytes']:.2f}",
            f"{row['compile_seconds']:.0f}",
            *(f"{row[step]['ms']:.2f} ({row[step]['speedup']:.2f}x)" for step in steps),
        )
        for name, row in found["rows"].items()
    )
    return under(text, ("recipe", "weights, GB", "compiling, s", *steps), rows)


def fp4_table() -> str:
    """Divergence and perplexity of a language model with 4 bits on both sides, without and with outliers."""
    found = result("fp4_cpu")
    machine, (count, length) = found["machine"], found["windows"]
    plain, injected = found["plain"], found["injected"]
    text = (
        f"4 bits on both sides: all linears of {found['model']} but the logits', {count} windows of {length} tokens, "
        f"calibrated on {found['calibration_windows']}, torch {machine['torch']}; KL to float in nats a token and "
        f"perplexity (change from the float model's {plain['float']['perplexity']:.2f}), and both with six channels of "
        f"every norm made 20 to 60 times larger, the function kept (`examples/benchmarks/fp4.py`).{remark(found)}"
    )
    rows = (
        (name, f"{row['kl']:.3f}", perplexity(row), f"{injected[name]['kl']:.3f}", perplexity(injected[name]))
        for name, row in quantized(plain)
    )
    columns = ("weights and inputs", "KL", "perplexity", "KL with outliers", "perplexity with outliers")
    return under(text, columns, rows)


def perplexity(row: Mapping[str, Any]) -> str:
    """With its change from the float model's, where the model still predicts anything."""
    found = row["perplexity"]
    return f"{found:.2f} ({row['change']:+.1%})" if found < SENSELESS else f"{found:.1e}"


def levels_table() -> str:
    """Divergence and perplexity of a language model with embeddings, weights and inputs of so many bits."""
    found = result("fp4_cpu")
    text = (
        "The levels of LLM-FP4's tables, on the same windows: embeddings, weights and inputs of so many bits each, "
        "logits included, every weight with one scale a row, every input with one calibrated scale; KL to float in "
        "nats a token, and perplexity (its change) (`examples/benchmarks/fp4.py`)."
    )
    rows = ((*name.split(": ", 1), f"{row['kl']:.4f}", perplexity(row)) for name, row in quantized(found["levels"]))
    return under(text, ("bits", "formats", "KL", "perplexity"), rows)


def formats_table() -> str:
    """Which formats suit which data."""
    stored = (HERE / "results" / "format_study.json").read_text()
    return study_table(stored, drawing("format_study", "Drawn, with 6 bits and more distributions"))


def weights_table() -> str:
    """What solvers keep of a language model with weights of few bits."""
    found = result("weights_cuda")
    machine, (count, length) = found["machine"], found["windows"]
    text = (
        f"Weights alone: all linears of {found['model']} but the logits', {count} windows of {length} tokens, "
        f"calibrated on {found['calibration_windows']}, {machine['device']}, torch {machine['torch']}; bits a weight "
        "with scales and zero points, KL to float in nats a token, and the change of perplexity "
        f"(`examples/benchmarks/weights.py`).{remark(found)}"
    )
    rows = (
        (*name.split(", ", 1), f"{row['bits']:.3f}", f"{row['kl']:.4f}", f"{row['change']:+.1%}")
        for name, row in quantized(found["rows"])
    )
    return under(text, ("weights", "solver", "bits", "KL", "perplexity"), rows)


def stack_text() -> str:
    """What GPTQ costs a large model's layers."""
    found = result("gptq_stack")
    machine, shapes, (count, length) = found["machine"], found["shapes"], found["data"]
    return (
        f"`{found['recipe']}` on {shapes['layers']} layers of {shapes['hidden']} and {shapes['inner']} channels, "
        f"{found['model_gigabytes']:.2f} GB of bfloat16, with {count} x {length} tokens in host memory: "
        f"{found['seconds']:.0f} s, and {found['more_gigabytes']:.2f} GB of the GPU beyond the model, "
        f"{machine['device']}, torch {machine['torch']} (`examples/benchmarks/gptq_stack.py`). {on_the_cpu()}"
    )


def on_the_cpu() -> str:
    """How long GPTQ of the whole small model takes."""
    found = result("weights_cpu")
    times = ", ".join(f"{row['seconds']:.0f} s by {name.split(', ', 1)[1]}" for name, row in quantized(found["rows"]))
    return (
        f"All linears of {found['model']} but the logits' on a CPU, {found['calibration_windows']} windows of "
        f"{found['windows'][1]} tokens, {found['machine']['device']}, torch {found['machine']['torch']}: {times}."
    )


def tables() -> str:
    made = (
        *(speed_table, quality_table, embedding_table, outlier_table, calibration_table),
        *(formats_table, weights_table, stack_text, fp4_table, levels_table),
        *(onnx_table, onnx_language_table, onnx_cuda_table, triton_table, triton_peers_table, decoder_table),
    )
    return "\n\n".join(make() for make in made) + "\n"


def main() -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    beside = README.with_suffix(".tmp")
    beside.write_text(f"{head}{BEGIN}{tables()}{END}{rest.split(END)[1]}")
    os.replace(beside, README)


if __name__ == "__main__":
    main()
