"""The report as one page: a file that needs nothing else, in light and dark."""

from collections.abc import Callable, Iterator, Sequence
from html import escape

from qcompile.analysis import Analysis
from qcompile.report import findings
from qcompile.report.report import Report, megabytes
from qcompile.report.table import AGREEMENTS, ERRORS, agreement_cells, error_cells, rows, shape

_STYLE = """
:root { --ink:#1c1c1c; --soft:#5a5a5a; --paper:#ffffff; --card:#f5f5f3; --line:#d9d9d4; --good:#00694c; --bad:#a33c00;
  --c0:#0072b2; --c1:#d55e00; --c2:#009e73; --c3:#a0588a; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink:#e8e8e6; --soft:#a5a5a0; --paper:#161618; --card:#212124;
  --line:#3a3a3e; --good:#4cc9a0; --bad:#f5a15c; --c0:#56b4e9; --c1:#e69f00; --c2:#2fc296; --c3:#d991bf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1140px; padding: 24px 28px 60px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 38px 0 8px; } h3 { font-size: 15px; }
p { margin: 6px 0 12px; max-width: 78ch; } .soft, .soft text { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.tile { background: var(--card); border-radius: 8px; padding: 10px 16px; min-width: 128px; }
.tile b { display: block; font-size: 21px; font-weight: 600; } .tile span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } td.name { overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } details { margin: 10px 0; } summary { cursor: pointer; }
svg { max-width: 100%; height: auto; display: block; margin: 8px 0 14px; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg text.soft { fill: var(--soft); } svg text.mark { font-weight: 600; fill: var(--bad); }
svg .axis { stroke: var(--soft); fill: none; } svg .grid { stroke: var(--line); fill: none; }
.fill0 { fill: var(--c0); } .fill1 { fill: var(--c1); } .fill2 { fill: var(--c2); } .fill3 { fill: var(--c3); }
.line0, .line1, .line2, .line3 { fill: none; stroke-width: 1.8; } .line0 { stroke: var(--c0); }
.line1 { stroke: var(--c1); } .line2 { stroke: var(--c2); } .line3 { stroke: var(--c3); }
"""


def page(report: Report, analysis: Analysis | None = None, title: str = "") -> str:
    """The report as an HTML document; with an analysis, also what it found.  title: what was quantized."""
    heading = escape(title or "Quantization report")
    sections = [*_sections(report, analysis)]
    body = "\n".join(f"<section>\n<h2>{escape(name)}</h2>\n{text}\n</section>" for name, text in sections if text)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{heading}</h1>\n"
        f'<div class="soft">recipe {escape(report.recipe)} on {escape(report.device)}</div>\n</header>\n'
        f"{_tiles(report, analysis)}\n{body}\n</body>\n</html>\n"
    )


def _sections(report: Report, analysis: Analysis | None) -> Iterator[tuple[str, str]]:
    """Headings and contents in order; a section without content is left out."""
    if analysis is not None:
        for name, make in _FOUND.items():
            yield name, make(analysis)
    yield "Quantized", _quantized(report)
    yield "Left alone", _left_alone(report)
    yield "Outputs beside the float model's", _compared(report)
    yield "The same plan in PyTorch and in the file", _certified(report)
    yield "Notes", "".join(f"<p>{escape(note)}</p>" for note in report.notes)


_FOUND: dict[str, Callable[[Analysis], str]] = {
    "What would help": findings.advice,
    "Signal to noise, site by site": findings.signal_to_noise,
    "Clipping against rounding": findings.clipping,
    "Where activations are large": findings.heat_maps,
    "Outlier channels": findings.outlier_channels,
    "Emergent features": findings.emergent,
    "Massive activations": findings.massive,
    "What was folded and split": findings.changes,
}


def _tiles(report: Report, analysis: Analysis | None) -> str:
    saved = report.bytes_before / report.bytes_after if report.bytes_after else 1.0
    tiles = [
        (f"{len(report.quantized)} of {len(report.sites)}", "sites quantized"),
        (f"{megabytes(report.bytes_before)} → {megabytes(report.bytes_after)}", f"weights, {saved:.2f}x smaller"),
        (f"{report.coverage:.1%}", "of weight bytes"),
        (f"{report.mac_coverage:.1%}", "of multiply-adds"),
    ]
    if analysis is not None:
        tiles += findings.tiles(analysis)
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _quantized(report: Report) -> str:
    if not report.quantized:
        return ""
    table = [
        (
            row.title,
            shape(row.sites[0].shape),
            row.sites[0].weight or "float",
            row.sites[0].input or "float",
            row.sites[0].kernel or "-",
            "-" if row.snr_db is None else f"{row.snr_db:.1f}",
            f"{row.bytes_before / 1e6:.2f}",
            f"{row.bytes_after / 1e6:.2f}",
        )
        for row in rows(report.quantized)
    ]
    columns = ("site", "shape", "weight", "input", "kernel", "weight's SNR, dB", "MB", "after")
    note = '<p class="soft">Layers that differ only in their number share a row; the ratio is that of the worst.</p>'
    return note + findings.table(columns, table, numbers=3)


def _left_alone(report: Report) -> str:
    if not report.left_alone:
        return ""
    table: Sequence[tuple[str, ...]] = [
        (row.title, row.sites[0].op, shape(row.sites[0].shape), row.sites[0].reason, f"{row.bytes_before / 1e6:.2f}")
        for row in rows(report.left_alone)
    ]
    return findings.table(("site", "op", "shape", "reason", "MB"), table, numbers=1)


def _compared(report: Report) -> str:
    if report.comparison is None:
        return ""
    table = findings.table(ERRORS, error_cells(report.comparison.outputs), numbers=4)
    return f"<p>{escape(str(report.comparison))}</p>" + (table if report.comparison.outputs else "")


def _certified(report: Report) -> str:
    if report.agreement is None:
        return ""
    kind = "good" if report.agreement.agrees else "bad"
    verdict = f'<p class="{kind}">{escape(str(report.agreement))}</p>'
    return verdict + findings.table(AGREEMENTS, agreement_cells(report.agreement), numbers=5)
