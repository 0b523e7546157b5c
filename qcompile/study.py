"""How many bits of accuracy each number format keeps of a distribution or a tensor, and which format suits it best.

    bits = -log2(RMSE / RMS) = SNR in dB / 6.02

at the clip of least squared error, which is the same as the best scale, and for a float the best real exponent bias.
Each bit that moves from the mantissa to the exponent costs about one bit of accuracy, once the range suffices, and
pays where few values are far larger than most.
Source: van Baalen 2023 (FP8 versus INT8 for efficient deep learning inference); Kuzmin 2022 (FP8
Quantization: The Power of the Exponent) for floats that reserve no code.
"""

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompile.clipping import least_error, levels_of
from qcompile.distribution import Distribution, lloyd_max_levels
from qcompile.errors import PlanError, SpecError
from qcompile.formats import CodeBook, Float
from qcompile.graph import Op
from qcompile.numerics import exponent_bias, find_qparams, qparams_of_range, tiles
from qcompile.observers import Part, Stats, observe
from qcompile.outliers import Activation, Group, find_outliers
from qcompile.solvers.mse import squared_error
from qcompile.spec import ALL, Spec, parse_spec

SCHEMA = 1
_KIND = "qcompile.study"

# by bits, from equal steps to powers of two. Of the floats of one exponent bit the steps are equal, too: they are
# integers in another writing
FAMILIES: dict[int, tuple[str, ...]] = {
    8: ("int8", "e2m5", "e3m4", "e4m3", "e5m2"),
    6: ("int6", "e1m4", "e2m3", "e3m2", "e4m1"),
    4: ("int4", "e1m2", "e2m1", "e3m0", "nf4"),
}
# the levels of least error for each distribution: what no format of so many bits exceeds
BOUNDS = ("lloyd8", "lloyd6", "lloyd4")
# what a tensor is observed with for `study_tensor`
PARTS = Part.TENSOR | Part.CHANNELS
# sampled rows, and elements of them, that are tried where each has scales of its own: the error of a sum over so many
# is a few percent
ROWS, ELEMENTS = 64, 2**16
# parts of the range to clip such a row at, by whether its codes are of few bits. A float's error over the clip is a
# saw-tooth of one octave, and in short rows a few large values decide, so that candidates lie dense
FEW = 4
_CLIPS = tuple(tuple(2 ** (i / 32) for i in range(8, -32 * octaves - 1, -1)) for octaves in (1, 3))
# bins of a density, of each sign
BINS = 10000


@dataclass(frozen=True, kw_only=True)
class Density:
    """A density of magnitudes up to `limit`, not normalized; the distribution is symmetric."""

    limit: float
    of: Callable[[Tensor], Tensor]


def _student(degrees: int) -> Density:
    return Density(limit=100.0, of=lambda x: (1 + x * x / degrees) ** (-(degrees + 1) / 2))


def _outliers(x: Tensor) -> Tensor:
    normal = torch.exp(-x * x / 2) * (2 / math.pi) ** 0.5
    return (1 - 1e-4) * normal + 1e-4 * (x >= 50) / 50


# from light to heavy tails; the last: one in ten thousand lies evenly between 50 and 100 standard deviations
DENSITIES: dict[str, Density] = {
    "uniform": Density(limit=1.0, of=torch.ones_like),
    "normal": Density(limit=10.0, of=lambda x: torch.exp(-x * x / 2)),
    "laplace": Density(limit=40.0, of=lambda x: torch.exp(-x)),
    "student-t 8": _student(8),
    "student-t 4": _student(4),
    "outliers": Density(limit=100.0, of=_outliers),
}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A format at its best clip.

    bits: of accuracy; infinite without an error. clip: largest magnitude in use, in root mean squares, and bias: real
    exponent bias; None where each tile has its own, and a bias of other formats than floats.
    """

    format: str
    bits: float
    clip: float | None = None
    bias: float | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What one distribution or tensor is like, and what each format keeps of it.

    kind: "distribution", "weight" or "input". granularity: who shares a scale.
    kurtosis: E[x^4] / E[x^2]^2, and peak: largest magnitude in root mean squares, of what shares a scale; of a
    distribution, peak is where it is cut. ratio: of the largest channel to the median one, None of a distribution.
    best: format by bits, of those in `fits`. reason: why the best of most bits is it.
    """

    name: str
    kind: str
    granularity: str
    kurtosis: float
    peak: float
    ratio: float | None
    fits: tuple[Fit, ...]
    best: Mapping[int, str]
    reason: str = ""

    def bits(self, fmt: str) -> float:
        """Bits of accuracy of a format that was tried."""
        return next(fit.bits for fit in self.fits if fit.format == fmt)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Formats, and the subjects that they were tried on.

    command: what finds the same again, the model and its data called by their names; empty if that is not known.
    """

    formats: tuple[str, ...]
    subjects: tuple[Subject, ...]
    command: str = ""

    def of(self, kind: str) -> tuple[Subject, ...]:
        return tuple(subject for subject in self.subjects if subject.kind == kind)

    def to_json(self) -> str:
        """JSON text, which `from_json` reads back.  Bits without an error are written as JSON's Infinity."""
        found = asdict(self)
        about = {
            "schema": SCHEMA,
            "kind": _KIND,
            "command": found.pop("command"),
            "device": platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        return json.dumps(about | found, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Study":
        """Raises PlanError if the text is no study, or one of a newer schema."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            data = None
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise PlanError("this JSON is no study of qcompile; write one with `qcompile study formats --json FILE`")
        if data["schema"] > SCHEMA:
            raise PlanError(f"study of schema {data['schema']}, this version reads up to {SCHEMA}; upgrade qcompile")
        return cls(
            formats=tuple(data["formats"]),
            subjects=tuple(_subject(s) for s in data["subjects"]),
            command=data.get("command", ""),
        )


def format_spec(text: str, granularity: str) -> Spec:
    """The spec of a format with a granularity.  text: a format's name, and what else a spec has: "int8/asym".

    Raises SpecError as `parse_spec` does.
    """
    name, *rest = text.split("/")
    return parse_spec("/".join([name, granularity, *rest]))


def require_studied(spec: Spec) -> None:
    """Raise SpecError for a code book that is learned for something else than least error, and for blocks of rows."""
    fmt, granularity = spec.format, spec.granularity
    if isinstance(fmt, CodeBook) and fmt.levels is None and not fmt.name.startswith("lloyd"):
        raise SpecError(f"the levels of {fmt.name} are not those of least error: take lloyd{fmt.bits}")
    if granularity.rows not in (ALL, 1):
        raise SpecError(
            f"rows are sampled, so that several cannot share a scale as in {granularity.name!r}: "
            "take tensor, channel or g<K>"
        )


def density_line(density: Density) -> Distribution:
    """The density as one line of bins, closer together near 0, where the steps of floats are small."""
    edges = density.limit * (torch.arange(BINS + 1, dtype=torch.float64) / BINS) ** 2
    mass = density.of((edges[1:] + edges[:-1]) / 2) * edges.diff()
    mass = mass / (2 * mass.sum())
    return Distribution(
        edges=torch.cat([-edges.flip(0), edges[1:]])[None],
        mass=torch.cat([mass.flip(0), mass])[None],
    )


def fit_line(values: Distribution, low: Tensor, high: Tensor, text: str) -> Fit:
    """A format with one scale for all values.  values: one line; low, high: float32 [1], its extremes."""
    spec = format_spec(text, "tensor")
    require_studied(spec)
    mass, _, squares = (float(moment) for moment in values.moments(values.edges[:, -1:]))
    if isinstance(spec.format, CodeBook) and spec.format.levels is None:
        levels = lloyd_max_levels(values, 2**spec.format.bits)
        return Fit(format=text, bits=_bits(float(values.squared_error(levels[None])), squares))
    low, high = least_error(values, low, high, spec)
    qparams = qparams_of_range(low, high, spec)
    levels = levels_of(qparams)
    rms = math.sqrt(squares / mass)
    return Fit(
        format=text,
        bits=_bits(float(values.squared_error(levels)), squares),
        clip=float(levels.abs().max()) / rms if rms > 0 else None,
        bias=float(exponent_bias(qparams.scale, spec.format)) if isinstance(spec.format, Float) else None,
    )


def fit_rows(rows: Tensor, counts: Tensor, granularity: str, text: str) -> Fit:
    """A format with scales for parts of rows.  rows: float32 [R, K]; counts: int64 [R], how often each came.

    Raises SpecError if the granularity does not divide K, and as `require_studied`.
    """
    spec = format_spec(text, granularity)
    require_studied(spec)
    base = find_qparams(rows, spec)
    view, dims = tiles(rows, spec.granularity)
    low, high = view.amin(dims), view.amax(dims)
    least = torch.full_like(base.scale, torch.inf)
    for clip in _CLIPS[spec.format.bits <= FEW]:
        qparams = replace(qparams_of_range(low, high, spec, clip=clip), levels=base.levels)
        least = torch.minimum(least, squared_error(rows, qparams))
    energy = (rows.double().square().sum(1) * counts).sum()
    return Fit(format=text, bits=_bits(float((least.double().sum(1) * counts).sum()), float(energy)))


def best_formats(fits: Sequence[Fit]) -> dict[int, str]:
    """The format of most accuracy for each number of bits, most bits first; of equals the first.

    Of integers and floats: code books are looked up, and nothing multiplies them.
    """
    best: dict[int, Fit] = {}
    for fit in fits:
        fmt = format_spec(fit.format, "tensor").format
        if not isinstance(fmt, CodeBook) and (fmt.bits not in best or fit.bits > best[fmt.bits].bits):
            best[fmt.bits] = fit
    return {bits: best[bits].format for bits in sorted(best, reverse=True)}


def study_density(name: str, formats: Sequence[str]) -> Subject:
    """What each format keeps of the distribution called `name` in `DENSITIES`."""
    limit = DENSITIES[name].limit
    values = density_line(DENSITIES[name])
    middles = (values.edges[:, 1:] + values.edges[:, :-1]) / 2
    second, fourth = (float((values.mass * middles**power).sum()) for power in (2, 4))
    fits = tuple(fit_line(values, torch.tensor([-limit]), torch.tensor([limit]), fmt) for fmt in formats)
    subject = Subject(
        name=name,
        kind="distribution",
        granularity="tensor",
        kurtosis=fourth / second**2,
        peak=limit / math.sqrt(second),
        ratio=None,
        fits=fits,
        best=best_formats(fits),
    )
    return replace(subject, reason=_shape(subject))


def study_weight(name: str, weight: Tensor, granularity: str, formats: Sequence[str]) -> Subject:
    """What each format keeps of a weight, floating [N, K]."""
    return study_tensor(name, "weight", observe(weight, parts=PARTS), granularity, formats)


def study_tensor(name: str, kind: str, stats: Stats, granularity: str, formats: Sequence[str]) -> Subject:
    """What each format keeps of a tensor whose rows were observed with `PARTS`.

    granularity: who shares a scale: one for the tensor, which is judged by its histogram, or each row (channel, token)
    or group one, which is judged by sampled rows.  Raises SpecError for a format or granularity that cannot be, and
    CalibrationError if the tensor held NaN or Inf.
    """
    (found,) = find_outliers([Group(sites=(name,), maker=Op.OTHER, stats=stats)]).activations
    fits = _fits(stats, granularity, formats)
    kurtosis, peak = _tails(stats, found, granularity)
    subject = Subject(
        name=name,
        kind=kind,
        granularity=granularity,
        kurtosis=kurtosis,
        peak=peak,
        ratio=found.amax / found.median if found.median > 0 else None,
        fits=fits,
        best=best_formats(fits),
    )
    return replace(subject, reason="; ".join([_shape(subject), *_causes(subject, found, stats)]))


def _fits(stats: Stats, granularity: str, formats: Sequence[str]) -> tuple[Fit, ...]:
    if format_spec(formats[0], granularity).granularity.rows == ALL:
        low, high = stats.low.amin().cpu(), stats.high.amax().cpu()
        histogram = stats.channels if stats.tensor is None else stats.tensor
        assert histogram is not None, "observed without PARTS"
        values = histogram.together(low, high)
        return tuple(fit_line(values, low[None], high[None], fmt) for fmt in formats)
    rows, counts = _sampled(stats)
    return tuple(fit_rows(rows, counts, granularity, fmt) for fmt in formats)


def _sampled(stats: Stats) -> tuple[Tensor, Tensor]:
    rows = max(1, min(ROWS, ELEMENTS // stats.low.numel()))
    # they stand in the order of their hashes, so that any first ones are a fair sample
    return stats.sample.rows[:rows].float().cpu(), stats.sample.counts[:rows].double().cpu()


def _tails(stats: Stats, found: Activation, granularity: str) -> tuple[float, float]:
    """Kurtosis, and largest magnitude in root mean squares, of what shares a scale: means over rows or groups."""
    shared = format_spec("int8", granularity).granularity
    if shared.rows == ALL:
        return found.kurtosis, found.amax / found.rms if found.rms > 0 else 0.0
    rows, counts = _sampled(stats)
    parts = rows.double().unflatten(1, (-1, shared.columns)) if shared.columns != ALL else rows.double().unsqueeze(1)
    squares = parts.square().mean(-1)
    alive = squares > 0
    weight = torch.where(alive, counts[:, None], 0.0)
    squares = torch.where(alive, squares, 1.0)
    kurtosis, peak = parts.pow(4).mean(-1) / squares.square(), parts.abs().amax(-1) / squares.sqrt()
    total = float(weight.sum())
    if total == 0:
        return 0.0, 0.0
    return float((kurtosis * weight).sum()) / total, float((peak * weight).sum()) / total


# peaks below it, in root mean squares, favour equal steps: of 8 bits they keep log2(127 * sqrt(12) / peak) bits, and a
# float with two for the exponent keeps 7.2 of short normal rows
_SHORT = 2.9
# kurtosis: 1.8 of a uniform distribution, 3 of a normal, 6 of a Laplace distribution
_SHAPES = (
    (2.4, "hardly any tails, steps of one size serve all values"),
    (4.0, "the tails of a normal distribution"),
    (9.0, "heavier tails than a normal distribution"),
    (math.inf, "few values that are far larger than most"),
)


def _shape(subject: Subject) -> str:
    words = next(text for limit, text in _SHAPES if subject.kurtosis < limit or subject.peak < _SHORT)
    reach = "" if subject.ratio is None else f", up to {subject.peak:.3g} rms"
    return f"{words} (kurtosis {subject.kurtosis:.3g}{reach})"


def _causes(subject: Subject, found: Activation, stats: Stats) -> list[str]:
    """Outliers of a tensor, with the format that would be best without outlier channels."""
    causes = []
    if found.massive is not None:
        causes.append(
            f"{found.massive.tokens} of {found.tokens} rows reach {found.massive.ratio:.3g}x the median value"
        )
    if not found.outliers or not subject.best:
        return causes
    first, more = found.outliers[0], len(found.outliers) - 1
    named = f"channel {first.channel} reaches {first.ratio:.3g}x the median one"
    named += f", {more} more stand out" if more else ""
    best = next(iter(subject.best.values()))
    width = format_spec(best, "tensor").format.bits
    rivals = [fit.format for fit in subject.fits if format_spec(fit.format, "tensor").format.bits == width]
    held_out = stats.without(torch.tensor([c.channel for c in found.outliers], device=stats.low.device))
    other = best_formats(_fits(held_out, subject.granularity, rivals))[width]
    them = "them" if more else "it"
    return [
        *causes,
        f"{named}; without {them} " + ("nothing would change" if other == best else f"{other} would be best"),
    ]


def _bits(error: float, energy: float) -> float:
    """-log2(RMSE / RMS) from sums of squares; infinite without an error."""
    return 0.5 * math.log2(energy / error) if error > 0 and energy > 0 else math.inf


def _subject(table: Mapping[str, Any]) -> Subject:
    best = {int(bits): name for bits, name in table["best"].items()}
    return Subject(**{**table, "fits": tuple(Fit(**fit) for fit in table["fits"]), "best": best})
