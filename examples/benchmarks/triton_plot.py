"""A plot of a result of triton_kernels.py: time over the number of rows, a panel for each format and shape.

    python examples/benchmarks/triton_plot.py [RESULT] [--out FILE]

RESULT: a file that triton_kernels.py wrote, examples/benchmarks/results/triton_kernels.json if none is given. Whatever
formats, shapes and peers it holds are drawn. Writes a PNG of the same name beside it.
"""

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

RESULTS = Path(__file__).parent / "results"
Style = Mapping[str, Any]
# Okabe and Ito's palette, told apart by colour-blind readers too, and a shape of its own for each
OURS: Style = {"color": "#0072b2", "marker": "o", "markersize": 4, "linewidth": 1.8}
BF16: Style = {"color": "#444444", "marker": "o", "markersize": 4, "linewidth": 1, "markerfacecolor": "white"}
FLOOR: Style = {"color": "#666666", "linestyle": "--", "linewidth": 1}
SLOWER = "#c03a00"
# of peers, in the order in which a format has them
PEERS: Sequence[Style] = (
    {"color": "#e69f00", "marker": "s", "markersize": 3.5, "linewidth": 1},
    {"color": "#009e73", "marker": "^", "markersize": 4, "linewidth": 1},
    {"color": "#cc79a7", "marker": "D", "markersize": 3.5, "linewidth": 1},
    {"color": "#56b4e9", "marker": "v", "markersize": 4, "linewidth": 1},
)
# inches: a panel, what stands above all of them, and a line of text below
WIDE, HIGH, HEAD, LINE = 2.8, 1.5, 1.1, 0.16
# characters of a line above and below, for each column of panels
HEADLINE, FOOTNOTE = 34, 46
# of numbers of rows that are less than so many times apart, texts stand beside their places, not amid them
CLOSE = 3
# and those above the panels a bit nearer, in points
NUDGES = {"left": -3, "center": 0, "right": 3}


def panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Times of one format at one shape, and above them how many times as fast as bfloat16 it is."""
    counts = [row["M"] for row in rows]
    axes.plot(counts, [row["floor_us"] for row in rows], **FLOOR)
    axes.plot(counts, [row["bf16_us"] for row in rows], **BF16)
    peers = []
    for title, style in zip(dict.fromkeys(title for row in rows for title in row["peers"]), PEERS, strict=False):
        points = [(row["M"], row["peers"][title]) for row in rows if title in row["peers"]]
        peers += axes.plot(*zip(*points, strict=True), label=title, **style)
    axes.plot(counts, [row["us"] for row in rows], **OURS)
    for row, side in zip(rows, sides(counts), strict=True):
        faster = round(row["speedup"], 2) >= 1
        axes.annotate(
            f"{row['speedup']:.1f}" if faster else f"{row['speedup']:.2f}".removeprefix("0"),
            (row["M"], 1.02),
            xycoords=axes.get_xaxis_transform(),
            xytext=(NUDGES[side], 0),
            textcoords="offset points",
            color=OURS["color"] if faster else SLOWER,
            weight="normal" if faster else "bold",
            ha=side,
            va="bottom",
            fontsize=8,
        )
    if peers:
        axes.legend(handles=peers, loc="upper left", fontsize=7.5, frameon=False, borderpad=0.1, labelspacing=0.2)


def sides(counts: Sequence[int]) -> list[str]:
    """On which side of its place the text of each number stands, so that neighbours do not meet."""
    close = [b < a * CLOSE for a, b in pairwise(counts)]
    return ["left" if left else "right" if right else "center" for left, right in pairwise([False, *close, False])]


def scale(axes: Axes, counts: Sequence[int]) -> None:
    """Both axes logarithmic, with plain numbers.  counts: all numbers of rows of x."""
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(counts, [str(M) for M in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A row of panels for each format, a column for each shape."""
    rows = result["results"]
    names = list(dict.fromkeys(row["format"] for row in rows))
    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    counts = sorted({row["M"] for row in rows})
    below = textwrap.wrap(result.get("remark", ""), FOOTNOTE * len(shapes))
    size = (WIDE * len(shapes) + 0.3, HIGH * len(names) + HEAD + LINE * len(below))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(len(names), len(shapes), sharex=True, sharey="col", squeeze=False)
    for name, line in zip(names, panels, strict=True):
        line[0].set_ylabel(name, fontsize=11, weight="bold")
        for axes, shape in zip(line, shapes, strict=True):
            found = [row for row in rows if (row["format"], row["N"], row["K"]) == (name, *shape)]
            axes.set_visible(bool(found))
            if found:
                panel(axes, sorted(found, key=lambda row: row["M"]))
                scale(axes, counts)
    for axes, (N, K) in zip(panels[0], shapes, strict=True):
        axes.set_title(f"{N} x {K}", fontsize=11, weight="bold", pad=16)
    for axes in panels[-1]:
        axes.set_xlabel("rows of x", fontsize=9)
        for label, side in zip(axes.get_xticklabels(), sides(counts), strict=True):
            label.set_horizontalalignment(side)
    add_head(figure, result, len(shapes))
    if below:
        figure.supxlabel("\n".join(below), fontsize=8)
    # no date and no version of matplotlib: the same numbers are the same file
    figure.savefig(path, metadata={"Software": None})


def add_head(figure: Figure, result: Mapping[str, Any], columns: int) -> None:
    """What is drawn, where it was measured, and what the lines are."""
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "triton", "gemlite") if name in result)
    lines = (
        "Microseconds of linears by rows of x, quantization of x included; "
        "above each panel: how many times as fast as bf16",
        f"{result['device']}, {versions}",
    )
    styles = {"qcompile": OURS, "bf16 of cuBLAS in the same run": BF16, "floor: bytes or operations": FLOOR}
    head = figure.legend(
        handles=[Line2D([], [], label=label, **style) for label, style in styles.items()],
        title="\n".join(part for line in lines for part in textwrap.wrap(line, HEADLINE * columns)),
        loc="outside upper center",
        ncols=min(columns, len(styles)),
        frameon=False,
    )
    head.get_title().set_multialignment("center")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "triton_kernels.json")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or given.result.with_suffix(".png")
    plot(json.loads(given.result.read_text()), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
