"""The report as tables for a terminal: equal layers folded into one row, what was left alone with its reason."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from qcompile.report.comparison import Agreement, Comparison, OutputError
from qcompile.report.report import Report, SiteReport

# columns from which op and shape are shown too
WIDE = 110
_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Sites that differ only in their layer numbers."""

    name: str
    sites: tuple[SiteReport, ...]

    @property
    def title(self) -> str:
        return self.sites[0].name if len(self.sites) == 1 else f"{self.name} x{len(self.sites)}"

    @property
    def bytes_before(self) -> int:
        return sum(s.bytes_before for s in self.sites)

    @property
    def bytes_after(self) -> int:
        return sum(s.bytes_after for s in self.sites)

    @property
    def kernel(self) -> str:
        """What multiplies, and how many channels of the input are multiplied as they are: "int8 + tail (3-5)"."""
        counts = sorted({s.outliers for s in self.sites})
        most = "-".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        return f"{self.sites[0].kernel} ({most})" if counts[-1] else self.sites[0].kernel

    @property
    def snr_db(self) -> float | None:
        """The lowest of the sites."""
        return min((s.snr_db for s in self.sites if s.snr_db is not None), default=None)


def rows(sites: Sequence[SiteReport], *, full: bool = False) -> list[Row]:
    """Sites folded where all but layer number, error and bytes agree; in order of first appearance."""
    folded: dict[object, list[SiteReport]] = {}
    for i, site in enumerate(sites):
        key = (pattern(site.name), site.op, site.shape, site.weight, site.input, site.kernel, site.reason)
        folded.setdefault(i if full else key, []).append(site)
    return [Row(name=pattern(group[0].name), sites=tuple(group)) for group in folded.values()]


def pattern(name: str) -> str:
    """A module path with its numbers as stars: "layers.3.q_proj" is "layers.*.q_proj"."""
    return _LAYER_NUMBER.sub("*", name)


def tables(report: Report, *, full: bool = False, width: int = WIDE) -> Iterator[RenderableType]:
    """Everything that a printed report consists of, for a terminal of `width` columns.

    full: a row for each site, and why other kernels refused.
    """
    if report.quantized:
        yield _quantized(report, full=full, wide=width >= WIDE)
    if report.left_alone:
        yield _left_alone(report, full=full)
    if full and any(s.refused for s in report.sites):
        yield _refused(report)
    if report.comparison is not None and report.comparison.outputs:
        yield errors(report.comparison.outputs, "Outputs beside the float model's")
    if report.agreement is not None:
        yield _agreements(report.agreement)
    yield Text(report.summary(), style="bold")
    yield from (Text(text, style=style) for text, style in verdicts(report.comparison, report.agreement))
    for note in report.notes:
        yield Text(f"note: {note}", style="yellow")


def render(report: Report, *, full: bool, width: int) -> str:
    """The tables as plain text, lines of at most `width` columns."""
    file = StringIO()
    console = Console(file=file, width=width, color_system=None, force_terminal=False)
    for part in tables(report, full=full, width=width):
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _quantized(report: Report, *, full: bool, wide: bool) -> Table:
    table = _table(f"Quantized by {report.recipe} on {report.device}")
    for header in ("site", "op", "shape", "weight", "input", "kernel") if wide else ("site", "how"):
        table.add_column(header, overflow="fold")
    for header in ("SNR dB", "MB", "after"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows(report.quantized, full=full):
        site = row.sites[0]
        how = (site.weight or "float", site.input or "float", row.kernel)
        table.add_row(
            row.title,
            *((site.op, shape(site.shape), *how) if wide else ("\n".join(how),)),
            "" if row.snr_db is None else f"{row.snr_db:.1f}",
            f"{row.bytes_before / 1e6:.2f}",
            f"{row.bytes_after / 1e6:.2f}",
        )
    return table


def _left_alone(report: Report, *, full: bool) -> Table:
    table = _table("Left alone")
    for header in ("site", "op", "shape", "reason"):
        table.add_column(header, overflow="fold")
    table.add_column("MB", justify="right", no_wrap=True)
    for row in rows(report.left_alone, full=full):
        site = row.sites[0]
        table.add_row(row.title, site.op, shape(site.shape), site.reason, f"{row.bytes_before / 1e6:.2f}")
    return table


def errors(outputs: Sequence[OutputError], title: str) -> Table:
    """How far outputs are from their references, a row each."""
    table = _table(title)
    for header in ERRORS:
        table.add_column(header, overflow="fold", justify="left" if header == ERRORS[0] else "right")
    for row in error_cells(outputs):
        table.add_row(*row)
    return table


# columns of outputs beside their references, and of those of a file beside PyTorch's
ERRORS = ("output", "signal to noise, dB", "relative error", "lowest cosine", "largest difference")
AGREEMENTS = ("output", "apart, dB", "largest difference", "PyTorch to float, dB", "file to float, dB", "")


def error_cells(outputs: Sequence[OutputError]) -> list[tuple[str, ...]]:
    """Outputs as text, under ERRORS."""
    return [
        (o.name, f"{o.snr_db:.1f}", f"{o.relative:.3g}", f"{o.lowest_cosine:.5f}", f"{o.largest:.3g}") for o in outputs
    ]


def agreement_cells(agreement: Agreement) -> list[tuple[str, ...]]:
    """Outputs as text, under AGREEMENTS; the largest difference is relative to the largest magnitude."""
    return [
        (
            o.name,
            f"{o.between_db:.1f}",
            f"{o.largest:.2g}",
            f"{o.torch_db:.1f}",
            f"{o.file_db:.1f}",
            "agrees" if o.agrees else "DISAGREES",
        )
        for o in agreement.outputs
    ]


def verdicts(comparison: Comparison | None, agreement: Agreement | None) -> Iterator[tuple[str, str]]:
    """What was compared, as sentences, each with its style."""
    if comparison is not None:
        yield str(comparison), "" if comparison.outputs else "yellow"
    if agreement is not None:
        yield str(agreement), "green" if agreement.agrees else "bold red"


def _agreements(agreement: Agreement) -> Table:
    table = _table("The same plan in PyTorch and in the file")
    for header in AGREEMENTS:
        table.add_column(header, overflow="fold", justify="left" if header == AGREEMENTS[0] else "right")
    for row in agreement_cells(agreement):
        table.add_row(*row)
    return table


def _refused(report: Report) -> Table:
    table = _table("Kernels that refused")
    for header in ("kernel", "why not", "sites"):
        table.add_column(header)
    sites: dict[tuple[str, str], int] = {}
    for site in report.sites:
        for refusal in site.refused.items():
            sites[refusal] = sites.get(refusal, 0) + 1
    for (kernel, reason), count in sites.items():
        table.add_row(kernel, reason, str(count))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def shape(dimensions: Sequence[int]) -> str:
    return "x".join(str(d) for d in dimensions)
