"""A plot of a result of triton_kernels.py: time over the number of rows, a panel for each format.

    python examples/benchmarks/triton_plot.py [--shape NxK] [--result FILE] [--out FILE]

Writes examples/benchmarks/results/triton_kernels.png.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
# of a marker and a line, for peers in the order in which they come
PEERS = (("s", "#2a7f62"), ("D", "#b07d2b"))


def panel(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Times of one format: ours, bfloat16, peers, and the floor."""
    numbers = [row["M"] for row in rows]
    axes.fill_between(numbers, [row["floor_us"] for row in rows], color="#dddddd", label="below the floor", lw=0)
    axes.plot(numbers, [row["bf16_us"] for row in rows], "o--", color="#555555", label="bf16, cuBLAS", ms=4)
    titles = list(dict.fromkeys(title for row in rows for title in row["peers"]))
    for title, (marker, color) in zip(titles, PEERS, strict=False):
        points = [(row["M"], row["peers"][title]) for row in rows if title in row["peers"]]
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=color, label=title, ms=4, lw=1)
    axes.plot(numbers, [row["us"] for row in rows], "o-", color="#b3123c", label="qcompile", ms=5, lw=2)
    axes.set(xscale="log", yscale="log", title=name, xlabel="rows of x", ylabel="microseconds")
    axes.set_xticks(numbers, [str(M) for M in numbers])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot(result: Mapping[str, Any], N: int, K: int, path: Path) -> None:
    names = list(dict.fromkeys(row["format"] for row in result["results"]))
    floors: list[float] = []
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 4.2), sharey=True, squeeze=False)
    for place, name in zip(axes[0], names, strict=True):
        found = [row for row in result["results"] if (row["format"], row["N"], row["K"]) == (name, N, K)]
        panel(place, name, sorted(found, key=lambda row: row["M"]))
        floors += [row["floor_us"] for row in found]
    # the panels share one scale
    axes[0][0].autoscale(axis="y")
    axes[0][0].set_ylim(bottom=min(floors) / 2)
    figure.suptitle(
        f"Linears of {N} x {K}, quantization of x included: {result['device']}, torch {result['torch']}, "
        f"Triton {result['triton']}"
    )
    figure.tight_layout()
    # no date and no version of matplotlib: the same numbers are the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="28672x4096")
    parser.add_argument("--result", type=Path, default=RESULTS / "triton_kernels.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "triton_kernels.png")
    given = parser.parse_args()
    matplotlib.use("Agg")
    N, K = map(int, given.shape.split("x"))
    plot(json.loads(given.result.read_text()), N, K, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
