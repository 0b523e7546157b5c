"""What an emitter hands back: the file's model, and what it expects of the runtime at each site; and what it got."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompile.report import Report, SiteReport
from qcompile.sizes import stored_bytes
from qcompile.spec import parse_spec


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One linear or embedding as written.

    site: its module path.  node: the name of the node that multiplies.  outputs: names of the values of which the
    fused kernel makes one.  kernel: the op type expected in onnxruntime's optimized model, None if none is expected.
    reason: why none is.  stored: names of the constants that hold its weight, where that is quantized.
    """

    site: str
    node: str
    outputs: tuple[str, ...]
    kernel: str | None = None
    reason: str = ""
    stored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """A model of standard nodes (and those of the target's own domain), and its record.

    notes: where it deviates from the plan, a sentence each, the site first.
    """

    model: ir.Model
    target: str
    planned: tuple[Planned, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What a runtime makes of a file.

    counts: of nodes, by op type.  by_site: what runs each site for which a kernel was planned; several if it is called
    several times and they differ.
    """

    counts: Counter[str] = field(default_factory=Counter)
    by_site: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def as_written(report: Report, emitted: Emitted, kernels: Kernels) -> Report:
    """The report of a plan with what runs each site, or why no fused kernel does, and with the bytes that are stored.

    What several sites share counts at the first.
    """
    runs = {one.site: one.kernel or one.reason for one in emitted.planned}
    runs |= {site: " and ".join(found) for site, found in kernels.by_site.items()}
    stored: dict[str, dict[str, None]] = {}
    for one in emitted.planned:
        stored.setdefault(one.site, {}).update(dict.fromkeys(one.stored))
    initializers, counted, sites = emitted.model.graph.initializers, set[str](), []
    for site in report.sites:
        names = [n for n in stored.get(site.name, {}) if n in initializers and n not in counted]
        after = site.bytes_after
        if site.weight is not None and stored.get(site.name):
            after = _beside(site) + sum(_bytes(initializers[name]) for name in names)
            counted.update(names)
        sites.append(replace(site, kernel=runs.get(site.name, site.kernel), bytes_after=after))
    return replace(report, sites=tuple(sites))


def _beside(site: SiteReport) -> int:
    """Of the float columns beside a quantized weight: what a plan expects over the weight itself."""
    assert site.weight is not None
    return max(site.bytes_after - stored_bytes(parse_spec(site.weight), *site.shape), 0)


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
