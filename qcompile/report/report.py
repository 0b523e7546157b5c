"""The report as data: one entry for each site, sums over them, JSON."""

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import PlanError, QcompileError
from qcompile.report.comparison import Agreement, Comparison

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from qcompile.analysis import Analysis

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """One weight of the model and the op that reads it.

    name: module path.  op: the op's kind, or what the host calls it where quantization does not reach it.
    shape: of the weight.  weight, input: specs as text, None where float.
    kernel: what multiplies, and `refused` says why others do not.
    snr_db: of the dequantized weight, None if not measured.
    bytes_before, bytes_after: of the weight, scales included; 0 where another site already counts the same tensor.
    macs: multiply-adds for one token; of a convolution, for one sample.  reason: why the weight was left alone, or "".
    outliers: channels of the input that are multiplied as they are, with their columns of the weight.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    weight: str | None = None
    input: str | None = None
    kernel: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    snr_db: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    macs: int = 0
    reason: str = ""
    outliers: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a recipe did on a device.  Print it, or keep it with `to_json`.

    notes: what concerns no single site, a line each.  comparison: with the float model, and agreement: with the same
    plan in PyTorch, both of files alone.
    """

    recipe: str
    device: str
    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...] = ()
    comparison: Comparison | None = None
    agreement: Agreement | None = None

    @property
    def quantized(self) -> tuple[SiteReport, ...]:
        """Sites whose weight is quantized."""
        return tuple(s for s in self.sites if s.weight is not None)

    @property
    def left_alone(self) -> tuple[SiteReport, ...]:
        """Sites whose weight stays float; each carries a reason."""
        return tuple(s for s in self.sites if s.weight is None)

    @property
    def bytes_before(self) -> int:
        return sum(s.bytes_before for s in self.sites)

    @property
    def bytes_after(self) -> int:
        return sum(s.bytes_after for s in self.sites)

    @property
    def coverage(self) -> float:
        """Share of the weight bytes that is quantized, 0 to 1."""
        return _share(sum(s.bytes_before for s in self.quantized), self.bytes_before)

    @property
    def mac_coverage(self) -> float:
        """Share of the multiply-adds that reads a quantized weight, 0 to 1."""
        return _share(sum(s.macs for s in self.quantized), sum(s.macs for s in self.sites))

    def summary(self) -> str:
        """One line: sites, bytes, coverage, and the site of the lowest signal-to-noise ratio."""
        parts = [
            f"{self.recipe} on {self.device}: {len(self.quantized)} of {len(self.sites)} sites",
            f"{megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)}",
            f"{self.coverage:.1%} of weight bytes",
            f"{self.mac_coverage:.1%} of multiply-adds",
        ]
        measured = [s for s in self.sites if s.snr_db is not None]
        if measured:
            worst = min(measured, key=lambda s: s.snr_db or 0.0)
            parts.append(f"lowest SNR {worst.snr_db:.1f} dB ({worst.name})")
        return ", ".join(parts)

    def to_text(self, *, full: bool = False, width: int = 140) -> str:
        """The report as tables.  full: a row for each site, none folded."""
        from qcompile.report.table import render

        return render(self, full=full, width=width)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON, also written to `path` if given: a reader never sees half a file.

        Raises QcompileError if the folder cannot be written.
        """
        text = json.dumps({"schema": SCHEMA, "kind": "qcompile.report", **asdict(self)}, indent=1) + "\n"
        if path is not None:
            write_text(Path(path), text)
        return text

    def to_html(
        self, path: str | os.PathLike[str] | None = None, analysis: "Analysis | None" = None, title: str = ""
    ) -> str:
        """The report as one HTML page that needs nothing else, also written to `path` if given, whole or not at all.

        analysis: what `qcompile.analysis.analyze` found; the page then tells where the noise comes from and what
        would help. title: what was quantized.  Raises QcompileError if the folder cannot be written.
        """
        from qcompile.report.html import page

        text = page(self, analysis, title)
        if path is not None:
            write_text(Path(path), text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Report":
        """The report that `to_json` wrote.  source: a path, or the JSON text itself.

        Raises PlanError if it is no report, or one of a newer schema.
        """
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text()
        data = _parsed(text)
        sites = tuple(_site(site) for site in data["sites"])
        compared, certified = data.get("comparison"), data.get("agreement")
        return cls(
            recipe=data["recipe"],
            device=data["device"],
            sites=sites,
            notes=tuple(data["notes"]),
            comparison=None if compared is None else Comparison.from_table(compared),
            agreement=None if certified is None else Agreement.from_table(certified),
        )

    def __str__(self) -> str:
        return self.to_text()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from qcompile.report.table import tables

        yield from tables(self, width=options.max_width)


def merge(reports: Iterable[Report]) -> Report:
    """One report for a model that was compiled in several pieces.

    A site that several pieces compiled counts once, with all its kernels.  Raises ValueError if there is none.
    """
    reports = list(reports)
    if not reports:
        raise ValueError("merge needs at least one report, got none")
    sites: dict[tuple[str, str, tuple[int, ...]], SiteReport] = {}
    for site in (s for r in reports for s in r.sites):
        key = (site.name, site.op, site.shape)
        first = sites.get(key)
        sites[key] = site if first is None else _joined(first, site)
    return Report(
        recipe=", ".join(dict.fromkeys(r.recipe for r in reports)),
        device=", ".join(dict.fromkeys(r.device for r in reports)),
        sites=tuple(sites.values()),
        notes=tuple(dict.fromkeys(note for r in reports for note in r.notes)),
    )


def megabytes(count: int) -> str:
    """Bytes for a reader, in units of 10**6 (or 10**3 below one of those)."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _joined(first: SiteReport, second: SiteReport) -> SiteReport:
    kernels = dict.fromkeys([*first.kernel.split(" | "), second.kernel])
    return replace(
        first,
        kernel=" | ".join(k for k in kernels if k),
        refused={**first.refused, **second.refused},
        bytes_before=max(first.bytes_before, second.bytes_before),
        bytes_after=max(first.bytes_after, second.bytes_after),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _site(data: dict[str, Any]) -> SiteReport:
    # a later minor version may have written more
    known = {f.name for f in fields(SiteReport)}
    values: dict[str, Any] = {name: value for name, value in data.items() if name in known}
    return SiteReport(**values | {"shape": tuple(values["shape"])})


def _parsed(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise PlanError(f"this is no report: its JSON breaks at line {e.lineno}; write one with Report.to_json") from e
    if not isinstance(data, dict) or data.get("kind") != "qcompile.report":
        raise PlanError("this JSON is no report of qcompile: it lacks 'kind': 'qcompile.report'")
    if data["schema"] > SCHEMA:
        raise PlanError(f"report of schema {data['schema']}, this version reads up to {SCHEMA}; upgrade qcompile")
    return data


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader never sees half of it.  Raises QcompileError if the folder cannot be written."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as e:
        raise QcompileError(f"cannot write the report to {path}: {e.strerror}; choose a folder you may write") from e
    finally:
        new.unlink(missing_ok=True)
