"""The picture of a study of formats: bits of accuracy over distributions, and over the tails of a model's tensors."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcompile.errors import UnsupportedError
from qcompile.formats import parse_format
from qcompile.study import Study, Subject

# Okabe and Ito's palette, told apart by colour-blind readers too, and a shape of its own for each
_MARKS = (
    ("#0072b2", "o"),
    ("#e69f00", "s"),
    ("#009e73", "^"),
    ("#d55e00", "D"),
    ("#cc79a7", "v"),
    ("#56b4e9", "P"),
    ("#000000", "X"),
    ("#8a7d00", "*"),
)
_TITLES = {
    "distribution": "distributions",
    "weight": "weights, a scale for each {}",
    "input": "inputs, a scale for each {}",
}


def require_plots() -> None:
    """Raise UnsupportedError without matplotlib, before something is computed that could not be drawn."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError("a picture needs matplotlib: pip install 'qcompile[plots]'")


def draw_study(study: Study, path: Path) -> None:
    """Write a PNG: a row of panels for each kind of subject, a panel for each number of bits.

    Raises as `require_plots`; an old file is whole until the new one is.
    """
    require_plots()
    from matplotlib.figure import Figure

    widths = sorted({_width(name) for name in study.formats}, reverse=True)
    kinds = [kind for kind in _TITLES if study.of(kind)]
    figure = Figure(figsize=(4.6 * len(widths) + 0.6, 3.9 * len(kinds) + 0.3), dpi=100, layout="constrained")
    panels = figure.subplots(len(kinds), len(widths), squeeze=False)
    for row, kind in zip(panels, kinds, strict=True):
        for panel, width in zip(row, widths, strict=True):
            names = [name for name in study.formats if _width(name) == width]
            _draw(panel, kind, study.of(kind), names)
            panel.set_title(f"{width} bits: {_TITLES[kind].format(study.of(kind)[0].granularity)}", fontsize=10)
            panel.grid(alpha=0.3)
    if study.command:
        figure.suptitle(study.command, fontsize=10)
    beside = path.with_name(f"{path.name}.tmp")
    figure.savefig(beside, format="png")
    os.replace(beside, path)


def _draw(panel: Any, kind: str, subjects: Sequence[Subject], names: Sequence[str]) -> None:
    drawn = 0
    for name in names:
        found = [s for s in subjects if any(fit.format == name for fit in s.fits)]
        if not found:
            continue
        bits = [s.bits(name) for s in found]
        if name.startswith("lloyd"):
            panel.plot([s.name for s in found], bits, color="0.5", linestyle=":", label="best levels (Lloyd-Max)")
            continue
        colour, shape = _MARKS[drawn % len(_MARKS)]
        drawn += 1
        # an integer's twin is seen around it
        twin = {"markerfacecolor": "none", "markersize": 9} if name.partition("/")[0].startswith("e1m") else {}
        style: dict[str, Any] = {"color": colour, "marker": shape, "markersize": 5, "label": name, **twin}
        if kind == "distribution":
            panel.plot([s.name for s in found], bits, linewidth=0.8, **style)
        else:
            panel.plot([s.kurtosis for s in found], bits, linestyle="none", alpha=0.75, **style)
    if kind == "distribution":
        panel.tick_params(axis="x", rotation=20, labelsize=8)
    else:
        panel.set_xscale("log")
        # no kurtosis is below 1
        panel.set_xlim(1, max(10.0, 1.3 * max(s.kurtosis for s in subjects)))
        panel.set_xlabel("kurtosis of what shares a scale", fontsize=9)
    panel.set_ylabel("bits of accuracy, log2(RMS / RMSE)", fontsize=9)
    panel.legend(fontsize=7)


def _width(name: str) -> int:
    return parse_format(name.partition("/")[0]).bits
