"""Drawings as SVG text, in colours that a style sheet gives: they follow light and dark, and need no library.

Colours are told apart by colour-blind readers too: viridis for magnitudes, Okabe and Ito's palette for series, and a
shape of its own for each series.
"""

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

# viridis at equal steps (van der Walt and Smith, 2015)
VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
ROW, CHARACTER, BOLD = 17, 6.6, 7.6
# of a drawing, and of the names to the left of it, at most
WIDTH, NAMES = 1084, 330
# bins that a heat map shows, so that each is a few whole pixels wide
BINS = 256


@dataclass(frozen=True, kw_only=True)
class Series:
    """One mark in each row.  shape: circle, ring, square or triangle.  values: None where there is none."""

    name: str
    shape: str
    values: Sequence[float | None]


def heat_map(
    names: Sequence[str], rows: Sequence[Sequence[float]], channels: int, marked: Mapping[int, str], unit: str
) -> str:
    """Magnitudes [rows, bins] as colours on a logarithmic scale.

    channels: that a row stands for, of which each bin holds an equal run. marked: channels to name, the most important
    first, with what a pointer over the name shows. unit: of the magnitudes, for the colour bar.
    """
    width = ceil(channels / BINS)
    merged = [_merged(row, channels, width) for row in rows]
    columns = len(merged[0])
    left, top, high = _names_width(names), 48 if marked else 26, ROW * len(rows)
    cell = max(1, (WIDTH - left - 70) // columns)
    wide = cell * columns
    positive = [m for row in merged for m in row if m > 0]
    low, high_value = (min(positive), max(positive)) if positive else (1.0, 1.0)
    # what is far below the crowd needs no colours
    low = max(low, sorted(positive)[len(positive) // 2] / 16) if positive else low
    parts = [_picture(merged, low, high_value, x=left, y=top, width=wide, height=high)]
    parts += [_text(left - 6, top + ROW * i + 13, name, anchor="end") for i, name in enumerate(names)]
    parts += _channel_names(marked, lambda channel: left + cell * (channel // width + 0.5), top)
    for tick in _ticks(0, channels):
        x = left + cell * tick / width
        if x <= left + wide:
            parts.append(f'<path class="axis" d="M{x:.1f} {top + high}v4"/>')
            parts.append(_text(x, top + high + 16, f"{tick:g}", anchor="middle"))
    parts.append(_text(left + wide / 2, top + high + 32, "channel", anchor="middle", kind="soft"))
    parts += _colour_bar(low, high_value, x=left + wide + 18, y=top, height=max(high, 5 * ROW), unit=unit)
    return _svg(WIDTH, top + max(high + 40, 5 * ROW + 8), parts, f"largest magnitude of each channel, {unit}")


def dots(names: Sequence[str], series: Sequence[Series], unit: str) -> str:
    """A row for each name with a mark for each series, on one axis; marks beyond the others are left at its end."""
    finite = [v for s in series for v in s.values if v is not None and isfinite(v)]
    ticks = _ticks(min(finite, default=0.0), max(finite, default=1.0), outside=True)
    left, top, high = _names_width(names), 46, ROW * len(names)
    wide = WIDTH - left - 30

    def place(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return left + wide * min(max(share, 0.0), 1.0)

    parts = list(_legend(series, left))
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{place(tick):.1f} {top}v{high}"/>')
        parts.append(_text(place(tick), top - 6, f"{tick:g}", anchor="middle"))
    for i, name in enumerate(names):
        y = top + ROW * (i + 0.5)
        parts.append(_text(left - 8, y + 4, name, anchor="end"))
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{wide}"/>')
        for number, s in enumerate(series):
            value = s.values[i]
            if value is not None:
                parts.append(_mark(s.shape, number, place(value), y, f"{name}, {s.name}: {value:.1f} {unit}"))
    parts.append(_text(left + wide / 2, top + high + 18, unit, anchor="middle", kind="soft"))
    return _svg(WIDTH, top + high + 26, parts, f"{', '.join(s.name for s in series)} of each site, {unit}")


def shares(names: Sequence[str], series: Sequence[tuple[str, Sequence[float]]]) -> str:
    """A bar for each name, parted by shares that sum to 1; values are clamped to [0, 1]."""
    left, top, high = _names_width(names), 46, ROW * len(names)
    wide = WIDTH - left - 60
    marks = [Series(name=name, shape="square", values=()) for name, _ in series]
    parts = list(_legend(marks, left))
    for tick in (0, 25, 50, 75, 100):
        x = left + wide * tick / 100
        parts.append(f'<path class="grid" d="M{x:.1f} {top}v{high}"/>')
        parts.append(_text(x, top - 6, f"{tick} %", anchor="middle"))
    for i, name in enumerate(names):
        y, x = top + ROW * i, float(left)
        parts.append(_text(left - 8, y + 13, name, anchor="end"))
        for number, (label, values) in enumerate(series):
            share = min(max(values[i], 0.0), 1.0)
            hint = f"<title>{escape(name)}, {escape(label)}: {share:.1%}</title>"
            box = f'x="{x:.1f}" y="{y + 3}" width="{wide * share:.1f}" height="11"'
            parts.append(f'<rect class="fill{number}" {box}>{hint}</rect>')
            x += wide * share
    return _svg(WIDTH, top + high + 8, parts, "shares of " + ", ".join(name for name, _ in series))


def png(pixels: Sequence[Sequence[tuple[int, int, int]]]) -> bytes:
    """An image of 8-bit RGB pixels, row by row.  Source: PNG specification (RFC 2083), colour type 2, no filter."""
    raw = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in pixels)
    head = struct.pack(">2I5B", len(pixels[0]), len(pixels), 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def colour(share: float) -> tuple[int, int, int]:
    """Viridis between 0 and 1, as RGB."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    i = min(int(place), len(VIRIDIS) - 2)
    first, second = (bytes.fromhex(c) for c in VIRIDIS[i : i + 2])
    red, green, blue = (round(a + (b - a) * (place - i)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _merged(row: Sequence[float], channels: int, want: int) -> list[float]:
    """The row in bins of `want` channels.  Bins that do not line up are both looked at."""
    have = ceil(channels / len(row))
    return [max(row[start // have : ceil((start + want) / have)]) for start in range(0, channels, want)]


def _channel_names(marked: Mapping[int, str], place: Callable[[int], float], top: int) -> Iterator[str]:
    """Names above a heat map in two lines, as many as fit, the most important first."""
    # where a name stands, half its width, and its line: the upper ones have ticks that pass the lower line
    placed: list[tuple[float, float, int]] = []
    for channel, hint in marked.items():
        x, half = place(channel), len(str(channel)) * BOLD / 2 + 3
        lower = all(abs(x - at) > half + (other if line == 0 else 0) for at, other, line in placed)
        upper = all(abs(x - at) > other + (half if line == 1 else 0) for at, other, line in placed)
        if not lower and not upper:
            continue
        line = 0 if lower else 1
        placed.append((x, half, line))
        y = top - 12 - 14 * line
        yield _text(x, y, str(channel), anchor="middle", hint=hint, kind="mark")
        yield f'<path class="axis" d="M{x:.1f} {y + 3}V{top - 2}"/>'


def _picture(
    rows: Sequence[Sequence[float]], low: float, high: float, *, x: int, y: int, width: int, height: int
) -> str:
    span = log10(high / low) or 1.0
    pixels = [[colour(log10(m / low) / span) if m > 0 else colour(0.0) for m in row] for row in rows]
    data = b64encode(png(pixels)).decode()
    return (
        f'<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    )


def _colour_bar(low: float, high: float, *, x: int, y: int, height: int, unit: str) -> Iterator[str]:
    steps = 64
    pixels = [[colour(1 - i / (steps - 1))] for i in range(steps)]
    data = b64encode(png(pixels)).decode()
    yield (
        f'<image x="{x}" y="{y}" width="14" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    )
    yield _text(x, y - 8, unit)
    for share in (0.0, 1 / 3, 2 / 3, 1.0):
        value = low * (high / low) ** share
        yield _text(x + 19, y + height * (1 - share) + (9 if share == 1 else 4 if share else 0), f"{value:.2g}")


def _legend(series: Sequence[Series], left: int) -> Iterator[str]:
    x = float(left)
    for number, s in enumerate(series):
        yield _mark(s.shape, number, x + 6, 14, s.name)
        yield _text(x + 17, 18, s.name)
        x += len(s.name) * CHARACTER + 44


def _mark(shape: str, number: int, x: float, y: float, hint: str) -> str:
    title = f"<title>{escape(hint)}</title>"
    match shape:
        case "square":
            return f'<rect class="fill{number}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{title}</rect>'
        case "triangle":
            return f'<path class="fill{number}" d="M{x:.1f} {y - 5:.1f}l5 9h-10z">{title}</path>'
        case "ring":
            return f'<circle class="line{number}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
        case _:
            return f'<circle class="fill{number}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{title}</circle>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", hint: str = "", kind: str = "") -> str:
    title = f"<title>{escape(hint)}</title>" if hint else ""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}{title}</text>'


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _names_width(names: Sequence[str]) -> int:
    return min(NAMES, int(max((len(name) for name in names), default=0) * CHARACTER) + 14)


def _ticks(low: float, high: float, *, outside: bool = False) -> list[float]:
    """Round numbers from low to high, about six; with `outside` the first and last lie at or beyond them."""
    span = high - low if high > low else 1.0
    size = 10 ** floor(log10(span / 5))
    step = next(size * f for f in (1, 2, 5, 10) if span / (size * f) <= 7)
    first, last = (floor(low / step), ceil(max(high, low + span) / step)) if outside else (0, floor(high / step))
    return [i * step for i in range(first, last + 1)]
