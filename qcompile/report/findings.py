"""What an analysis found, as pieces of HTML: a function for each section, "" where there is nothing to say."""

import re
from collections.abc import Sequence
from html import escape
from math import isfinite

from qcompile.advice import title
from qcompile.analysis import Analysis, SiteNoise
from qcompile.outliers import Activation
from qcompile.report.plots import Series, dots, heat_map, shares

# rows of a drawing; of more sites, the worst are drawn
ROWS = 64
# advice that is shown at once
FIRST = 10
# share of clipping that is worth a bar
CLIPS = 0.01
BARS = 24
NAME = 44
MAKERS = {
    "rms_norm": "After a norm",
    "layer_norm": "After a norm",
    "mul": "After a product, such as a gated activation",
    "other": "Other inputs",
}
# the first number of a module path that is a part of its own
LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


def tiles(analysis: Analysis) -> list[tuple[str, str]]:
    """Numbers for the top of the page, each with what it means."""
    found = []
    worst = min(analysis.sites, key=lambda s: s.noise.snr_db, default=None)
    if worst is not None:
        found.append((f"{worst.noise.snr_db:.1f} dB", f"lowest signal to noise: {short(worst.name)}"))
    named = {key for key, _ in analysis.outliers.by_channel().items()}
    massive = sum(a.massive is not None for a in analysis.outliers.activations)
    found.append((str(len(named)), "outlier channels"))
    found.append((str(len(analysis.outliers.emergent)), "emergent features"))
    if massive:
        found.append((str(massive), "inputs with massive tokens"))
    return found


def advice(analysis: Analysis) -> str:
    """The remedies, in order: what was found, what it should gain, what it gained."""
    if not analysis.advice:
        return "<p>No site would gain a decibel by a remedy that is known here.</p>" if analysis.sites else ""
    cells = []
    seen: set[tuple[str, ...]] = set()
    for a in analysis.advice:
        cells.append(
            (
                f"or {a.action}" if a.sites in seen else a.text,
                f"{a.before_db:.1f}",
                f"+{a.predicted_db:.1f}",
                "-" if a.measured_db is None else f"{a.measured_db:+.2f}",
                _bytes(a.bytes),
            )
        )
        seen.add(a.sites)
    columns = ("site, cause and remedy", "now, dB", "predicted, dB", "measured, dB", "bytes")
    note = (
        "<p>Sites whose noise weighs most come first. <em>Predicted</em> is what the outputs of these sites gain in "
        "signal to noise, found from rows that calibration kept; <em>measured</em> is what the outputs of the whole "
        "model gained when this one remedy was applied and the model was run.</p>"
    )
    more = ""
    if len(cells) > FIRST:
        rest = table(columns, cells[FIRST:], numbers=4)
        more = f"<details><summary>{len(cells) - FIRST} more</summary>{rest}</details>"
    return note + table(columns, cells[:FIRST], numbers=4) + more


def signal_to_noise(analysis: Analysis) -> str:
    """Both sides, each side alone, and what it was before folding; the worst sites if there are many."""
    if not analysis.sites:
        return ""
    sites = _worst(analysis.sites)
    series = [
        Series(name="quantized", shape="circle", values=[s.noise.snr_db for s in sites]),
        Series(name="inputs only", shape="triangle", values=[s.noise.input_db for s in sites]),
        Series(name="weights only", shape="square", values=[s.noise.weight_db for s in sites]),
        Series(name="before folding", shape="ring", values=[s.unfolded_db for s in sites]),
    ]
    drawn = dots([short(s.name) for s in sites], [s for s in series if any(v is not None for v in s.values)], "dB")
    note = (
        "<p>Of each site's output, on rows that calibration kept. Higher is better; 6 dB are one bit. Where "
        "<em>quantized</em> lies at <em>inputs only</em>, activations make the noise, and where it lies at "
        "<em>weights only</em>, weights do.</p>"
    )
    return note + _of(len(sites), len(analysis.sites), "lowest") + drawn + _details(analysis.sites)


def clipping(analysis: Analysis) -> str:
    """Of the input's noise, what comes from values beyond the grid; only for sites where it is any."""
    quantized = [s for s in analysis.sites if s.noise.input_db is not None]
    if not quantized:
        return ""
    clipped = sorted((s for s in quantized if s.noise.clipping > CLIPS), key=lambda s: -s.noise.clipping)
    if not clipped:
        return "<p>No input loses anything by clipping: all of its noise is rounding.</p>"
    drawn = clipped[:BARS]
    bars = shares(
        [short(s.name) for s in drawn],
        [
            ("clipping", [s.noise.clipping for s in drawn]),
            ("rounding", [1 - max(s.noise.clipping, 0.0) for s in drawn]),
        ],
    )
    note = (
        f"<p>Clipping is part of the noise of {len(clipped)} of {len(quantized)} quantized inputs. A range that is "
        "chosen for the least error clips a little; where clipping outweighs rounding, a wider range would help.</p>"
    )
    return note + _of(len(drawn), len(clipped), "largest") + bars


def heat_maps(analysis: Analysis) -> str:
    """A map for each kind of activation: one row an activation in graph order, one column a run of channels."""
    kinds: dict[tuple[str, int], list[Activation]] = {}
    for activation in analysis.outliers.activations:
        if activation.maxima:
            kinds.setdefault((activation.maker, activation.channels), []).append(activation)
    drawn = [_heat_map(maker, rows) for (maker, _), rows in kinds.items()]
    if not drawn:
        return ""
    note = (
        "<p>The largest magnitude that calibration saw, channel by channel, layers from top to bottom. A bright line "
        "from top to bottom is a channel that is loud in every layer. Channels named above a map stand out of the "
        "crowd.</p>"
    )
    return note + "".join(drawn)


def outlier_channels(analysis: Analysis) -> str:
    """Every channel that stands out, where it does, and how far."""
    found = analysis.outliers.by_channel()
    if not found:
        return "<p>No channel stands out of the crowd.</p>" if analysis.outliers.activations else ""
    cells = []
    for (channels, channel), places in found.items():
        strongest = max((c for _, c in places), key=lambda c: c.ratio)
        where = places_of([title([short(s) for s in a.sites]) for a, _ in places])
        cells.append(
            (
                str(channel),
                where,
                str(channels),
                str(len(places)),
                f"{strongest.amax:.3g}",
                f"{strongest.ratio:.1f}x",
                f"{strongest.rms_ratio:.1f}x",
                f"{max(c.exceeding for _, c in places):.1%}",
                f"{strongest.peak_factor:.1f}",
                f"{strongest.kurtosis:.1f}",
                f"{strongest.gain_db:.1f}",
            )
        )
    columns = (
        *("channel", "where it stands out", "of", "inputs", "largest", "to median", "rms to median"),
        *("|x| ≥ 6", "peak / rms", "kurtosis", "alone, dB"),
    )
    note = (
        "<p>By how much a channel's largest magnitude exceeds the median channel's, where it does so most; the share "
        "of tokens in which it reaches 6.0; and what the range of the tensor would shrink by if it were gone.</p>"
    )
    return note + _folded(columns, cells, numbers=9)


def emergent(analysis: Analysis) -> str:
    """Features by the definition of LLM.int8()."""
    if not analysis.outliers.activations:
        return ""
    note = (
        "<p>Hidden dimensions with |x| ≥ 6.0 in 6 % of the tokens or more, in a quarter or more of the inputs that a "
        "norm makes (the definition of LLM.int8(), Dettmers 2022).</p>"
    )
    if not analysis.outliers.emergent:
        return note + "<p>There are none.</p>"
    cells = [
        (str(e.channel), f"{e.layers} of {e.of}", f"{e.positions:.1%}", f"{e.amax:.3g}")
        for e in analysis.outliers.emergent
    ]
    return note + table(("channel", "inputs", "share of tokens there", "largest"), cells, numbers=3)


def massive(analysis: Analysis) -> str:
    """Inputs in which few tokens dwarf all others."""
    cells = [
        (
            title([short(s) for s in a.sites]),
            f"{a.massive.amax:.3g}",
            f"{a.massive.ratio:.3g}x",
            f"{a.massive.tokens} of {a.tokens}",
            ", ".join(map(str, a.massive.channels)),
        )
        for a in analysis.outliers.activations
        if a.massive is not None
    ]
    if not cells:
        return "<p>No token reaches 1000 times the median magnitude.</p>" if analysis.outliers.activations else ""
    note = (
        "<p>A few tokens with magnitudes over 1000 times the median. They are no outlier channels: a scale for each "
        "token keeps them from spoiling the others.</p>"
    )
    return note + table(("read by", "largest", "to median", "tokens", "channels"), cells, numbers=0)


def changes(analysis: Analysis) -> str:
    """Folds, multiplications that remain, and channels that bypass quantization."""
    split = [s for s in analysis.sites if s.split]
    if not analysis.folds and not split:
        return "<p>Nothing was folded and no channel was split off.</p>" if analysis.sites else ""
    remain = sum(not fold.into for fold in analysis.folds)
    known = {s.name: s for s in analysis.sites}
    parts = []
    if analysis.folds:
        cost = f"multiplications that remain in the graph: {remain}" if remain else "none costs anything at run time"
        parts.append(f"<p>Folds: {len(analysis.folds)}; {cost}.</p>")
        cells = [
            (
                title([short(s) for s in fold.sites]),
                short(fold.into) if fold.into else "a multiplication that remains",
                fold.method,
                f"{fold.smallest:.3g} to {fold.largest:.3g}",
                _gained(known.get(fold.sites[0])),
            )
            for fold in analysis.folds
        ]
        parts.append(_folded(("sites", "into", "how", "factors", "dB before and after"), cells, numbers=2))
    if split:
        kept = [(short(s.name), str(len(s.split)), ", ".join(map(str, s.split))) for s in split]
        parts.append("<h3>Channels kept in 16 bit</h3>" + _folded(("site", "channels", "which"), kept, numbers=0))
    return "".join(parts)


def table(columns: Sequence[str], cells: Sequence[Sequence[str]], *, numbers: int) -> str:
    """An HTML table of escaped cells.  numbers: how many of the last columns are set to the right."""
    first = len(columns) - numbers
    head = "".join(f"<th{_class(i, first)}>{escape(c)}</th>" for i, c in enumerate(columns))
    body = "\n".join(
        "<tr>" + "".join(f"<td{_class(i, first)}>{escape(c)}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in cells
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def short(name: str) -> str:
    """The end of a module path, whole parts of it, at most NAME characters where parts are not longer."""
    parts = name.split(".")
    while len(parts) > 2 and len(".".join(parts)) > NAME:
        parts = parts[1:]
    return ".".join(parts[1:] if len(parts) > 3 and parts[0] in ("model", "transformer", "encoder") else parts)


def places_of(names: Sequence[str]) -> str:
    """Names with equal layers said once: "layers.0-3, 7.mlp.up_proj; lm_head" with hyphens that do not break."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = LAYER.search(name)
        key = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
        layers.setdefault(key, []).extend([] if number is None else [int(number[0])])
    return "; ".join(key.replace("{}", _ranges(numbers)) for key, numbers in layers.items())


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs shortened: "0-3, 7", with hyphens that do not break."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}\u2011{run[-1]}" for run in runs)


def _heat_map(maker: str, rows: Sequence[Activation]) -> str:
    loud: dict[int, float] = {}
    hints: dict[int, str] = {}
    for row in rows:
        for c in row.outliers:
            # loud in many layers matters more than loud in one
            loud[c.channel] = loud.get(c.channel, 0.0) + c.ratio
            hints.setdefault(c.channel, f"channel {c.channel}: {c.ratio:.1f}x the median in {row.sites[0]}")
    marked = {channel: hints[channel] for channel in sorted(loud, key=lambda c: -loud[c])}
    names = [_label(row.sites) for row in rows]
    drawn = heat_map(names, [row.maxima for row in rows], rows[0].channels, marked, "|x|")
    made = MAKERS.get(maker, f"Made by {maker.replace('_', ' ')}")
    return f"<h3>{escape(made)}: {rows[0].channels} channels</h3>{drawn}"


def _label(sites: Sequence[str]) -> str:
    more = f" +{len(sites) - 1}" if len(sites) > 1 else ""
    return short(sites[0]) + more


def _details(sites: Sequence[SiteNoise]) -> str:
    cells = [
        (
            s.name,
            s.weight or "float",
            s.input or "float",
            _db(s.noise.snr_db),
            _db(s.noise.weight_db),
            _db(s.noise.input_db),
            "-" if s.noise.input_db is None else f"{s.noise.clipping:.1%}",
            ", ".join(f"{k}: {share:.0%}" for k, share in s.noise.channels[:3]),
        )
        for s in sites
    ]
    columns = (
        *("site", "weight", "input", "both, dB", "weights only", "inputs only", "clipping"),
        "channels whose own error is largest",
    )
    drawn = table(columns, cells, numbers=5)
    return f"<details><summary>All {len(sites)} sites as a table</summary>{drawn}</details>"


def _folded(columns: Sequence[str], cells: Sequence[Sequence[str]], *, numbers: int) -> str:
    """The first rows, and the rest behind a click."""
    first, rest = cells[: 2 * FIRST], cells[2 * FIRST :]
    more = (
        f"<details><summary>{len(rest)} more</summary>{table(columns, rest, numbers=numbers)}</details>" if rest else ""
    )
    return table(columns, first, numbers=numbers) + more


def _worst(sites: Sequence[SiteNoise]) -> list[SiteNoise]:
    """The lowest ROWS of the sites, in their order."""
    kept = {s.name for s in sorted(sites, key=lambda s: s.noise.snr_db)[:ROWS]}
    return [s for s in sites if s.name in kept]


def _of(drawn: int, whole: int, which: str) -> str:
    return f'<p class="soft">The {which} {drawn} of {whole}.</p>' if drawn < whole else ""


def _gained(site: SiteNoise | None) -> str:
    if site is None or site.unfolded_db is None:
        return "-"
    return f"{site.unfolded_db:.1f} → {site.noise.snr_db:.1f}"


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if isfinite(value) else "exact"


def _bytes(count: int) -> str:
    return "0" if count == 0 else f"{count / 1e3:+.1f} kB"


def _class(index: int, first: int) -> str:
    if index >= first:
        return ' class="number"'
    return ' class="name"' if index == 0 else ""
