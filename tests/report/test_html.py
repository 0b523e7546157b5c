"""The page: valid, self-contained, and with the numbers of the data in it; and its drawings."""

import re
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qcompile.advice import Advice, Kind, Remedy
from qcompile.analysis import Analysis, FoldNote, SiteNoise
from qcompile.errors import QcompileError
from qcompile.noise import Noise
from qcompile.outliers import Activation, EmergentFeature, MassiveTokens, OutlierChannel, Outliers
from qcompile.report import Report, SiteReport
from qcompile.report.findings import places_of, short
from qcompile.report.html import page
from qcompile.report.plots import Series, colour, dots, heat_map, png, shares

VOID = {"meta", "br", "image", "path", "rect", "circle"}


class Page(HTMLParser):
    """What a page consists of. Raises AssertionError where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.headings: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data


def channel(number: int, **changes: float) -> OutlierChannel:
    values = {
        **{"amax": 40.0, "ratio": 21.5, "rms_ratio": 8.25, "share": 1.0, "exceeding": 0.0625},
        **{"peak_factor": 3.5, "kurtosis": 2.75, "gain_db": 11.25},
    }
    return OutlierChannel(channel=number, **values | changes)


def activation(layer: int, *outliers: OutlierChannel, massive: MassiveTokens | None = None) -> Activation:
    maxima = tuple(40.0 if k == 19 else 1.0 + k / 64 for k in range(64))
    return Activation(
        sites=(f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.self_attn.k_proj"),
        maker="rms_norm",
        channels=64,
        tokens=4096,
        amax=40.0,
        median=1.5,
        rms=0.75,
        kurtosis=12.5,
        outliers=outliers,
        massive=massive,
        maxima=maxima,
    )


HUGE = MassiveTokens(amax=83555.0, ratio=330000.0, tokens=8, share=8 / 4096, channels=(19, 61))
ANALYSIS = Analysis(
    outliers=Outliers(
        activations=(
            activation(0, channel(19)),
            activation(1, channel(19), channel(7, ratio=4.25)),
            activation(2, massive=HUGE),
        ),
        emergent=(EmergentFeature(channel=19, layers=2, of=3, positions=0.375, amax=41.5),),
    ),
    sites=(
        SiteNoise(
            name="model.layers.0.self_attn.q_proj",
            noise=Noise(snr_db=18.75, weight_db=42.5, input_db=18.8, clipping=0.59, channels=((19, 0.61), (3, 0.05))),
            unfolded_db=12.25,
            weight="int8/channel",
            input="int8/tensor/asym",
            split=(3, 5),
        ),
        SiteNoise(name="model.layers.1.mlp.up_proj", noise=Noise(snr_db=33.5, weight_db=33.5), weight="int8/channel"),
    ),
    folds=(
        FoldNote(
            sites=("model.layers.0.self_attn.q_proj",),
            into="model.norm",
            method="smooth alpha=0.55",
            smallest=0.125,
            largest=16.0,
        ),
        FoldNote(sites=("model.layers.1.mlp.up_proj",), into="", method="by hand", smallest=1.0, largest=2.0),
    ),
    advice=(
        Advice(
            sites=("model.layers.0.self_attn.q_proj",),
            cause="channel 19, 21.5x the median channel, causes 61% of the noise",
            action="split off channel 19 (+0.4% bytes)",
            remedy=Remedy(kind=Kind.SPLIT, channels=(19,)),
            before_db=18.75,
            predicted_db=13.25,
            bytes=1024,
            measured_db=0.875,
        ),
        Advice(
            sites=("model.layers.0.self_attn.q_proj",),
            cause="the same",
            action="give every token its own scale (int8/token/asym)",
            remedy=Remedy(kind=Kind.DYNAMIC, spec="int8/token/asym"),
            before_db=18.75,
            predicted_db=9.5,
            bytes=0,
        ),
    ),
)
REPORT = Report(
    recipe="int8-static",
    device="cpu",
    sites=(
        SiteReport(name="a.0.fc", op="linear", shape=(8, 16), weight="int8/channel", input="int8/token", kernel="int8",
                   snr_db=41.5, bytes_before=2_000_000, bytes_after=500_000, macs=128),
        SiteReport(name="a.table", op="embedding", shape=(8, 16), bytes_before=2_000_000, bytes_after=2_000_000,
                   reason="no rule matches this embedding"),
    ),
    notes=("a note",),
)  # fmt: skip


def row(found: Page, first: str) -> list[str]:
    """The row whose first cell starts so."""
    return next(cells for cells in found.cells if cells and cells[0].startswith(first))


@pytest.mark.parametrize("analysis", [None, ANALYSIS, Analysis(outliers=Outliers())], ids=["none", "full", "empty"])
def test_the_page_is_whole_and_needs_nothing_else(analysis: Analysis | None) -> None:
    text = page(REPORT, analysis)
    found = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "img", "base", "form"})
    sources = [a[name] for _, a in found.tags for name in ("src", "href", "srcset", "action") if name in a]
    assert all(s is not None and s.startswith("data:image/png;base64,") for s in sources)
    assert bool(sources) is (analysis is ANALYSIS)
    assert "prefers-color-scheme: dark" in text


def test_an_ordinary_report_tells_what_was_done() -> None:
    found = Page(page(REPORT, title="my model"))
    assert found.headings == ["Quantized", "Left alone", "Notes"]
    assert row(found, "a.0.fc") == ["a.0.fc", "8x16", "int8/channel", "int8/token", "int8", "41.5", "2.00", "0.50"]
    assert row(found, "a.table")[3] == "no rule matches this embedding"
    assert "my model" in found.words
    assert "4.00 MB → 2.50 MB" in found.words
    assert "50.0%" in found.words


def test_an_analysis_adds_its_sections_in_order() -> None:
    found = Page(page(REPORT, ANALYSIS))
    assert found.headings == [
        "What would help",
        "Signal to noise, site by site",
        "Clipping against rounding",
        "Where activations are large",
        "Outlier channels",
        "Emergent features",
        "Massive activations",
        "What was folded and split",
        "Quantized",
        "Left alone",
        "Notes",
    ]


def test_the_numbers_are_those_of_the_analysis() -> None:
    found = Page(page(REPORT, ANALYSIS))
    assert row(found, "model.layers.0.self_attn.q_proj: channel 19") == [
        "model.layers.0.self_attn.q_proj: channel 19, 21.5x the median channel, causes 61% of the noise; "
        "split off channel 19 (+0.4% bytes)",
        *("18.8", "+13.2", "+0.88", "+1.0 kB"),
    ]
    # a second remedy for the same sites does not repeat the cause
    assert row(found, "or give every token")[1:] == ["18.8", "+9.5", "-", "0"]
    assert [c for c in found.cells if c[0] == "19"] == [
        [
            "19",
            "layers.0\u20111.self_attn.q_proj, k_proj",
            "64",
            "2",
            "40",
            "21.5x",
            "8.2x",
            "6.2%",
            "3.5",
            "2.8",
            "11.2",
        ],
        ["19", "2 of 3", "37.5%", "41.5"],
    ]
    assert row(found, "layers.2.self_attn.q_proj, k_proj") == [
        "layers.2.self_attn.q_proj, k_proj", "8.36e+04", "3.3e+05x", "8 of 4096", "19, 61",
    ]  # fmt: skip
    details = [c for c in found.cells if c[0] == "model.layers.0.self_attn.q_proj" and len(c) == 8]
    assert details == [
        [
            "model.layers.0.self_attn.q_proj",
            "int8/channel",
            "int8/tensor/asym",
            "18.8",
            "42.5",
            "18.8",
            "59.0%",
            "19: 61%, 3: 5%",
        ]
    ]
    assert row(found, "model.layers.1.mlp.up_proj")[2:6] == ["float", "33.5", "33.5", "-"]


def test_folds_tell_what_they_cost() -> None:
    found = Page(page(REPORT, ANALYSIS))
    assert "Folds: 2; multiplications that remain in the graph: 1." in found.words
    rows = [c for c in found.cells if len(c) == 5 and "to" in c[3]]
    assert ["layers.0.self_attn.q_proj", "model.norm", "smooth alpha=0.55", "0.125 to 16", "12.2 → 18.8"] in rows
    assert ["layers.1.mlp.up_proj", "a multiplication that remains", "by hand", "1 to 2", "-"] in rows
    assert ["layers.0.self_attn.q_proj", "2", "3, 5"] in found.cells


def test_text_is_escaped_everywhere() -> None:
    evil = '<img src=x onerror=alert(1)>&"'
    site = SiteReport(name=evil, op=evil, shape=(1,), reason=evil, bytes_before=1)
    activation_ = activation(0, channel(19))
    analysis = Analysis(
        outliers=Outliers(activations=(Activation(**{**vars(activation_), "sites": (evil,), "maker": evil}),)),
        sites=(
            SiteNoise(
                name=evil, noise=Noise(snr_db=1.0, input_db=1.0, clipping=0.5), input=evil, weight=evil, split=(1,)
            ),
        ),
        folds=(FoldNote(sites=(evil,), into=evil, method=evil, smallest=1, largest=1),),
        advice=(
            Advice(
                sites=(evil,),
                cause=evil,
                action=evil,
                remedy=Remedy(kind=Kind.FLOAT),
                before_db=1,
                predicted_db=1,
                bytes=1,
            ),
        ),
    )
    text = page(Report(recipe=evil, device=evil, sites=(site,), notes=(evil,)), analysis, title=evil)
    assert "<img" not in text
    assert "img" not in {tag for tag, _ in Page(text).tags}
    assert Page(text).words.count(evil) >= 12


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    text = REPORT.to_html(path, ANALYSIS, title="t")
    assert path.read_text(encoding="utf-8") == text == page(REPORT, ANALYSIS, "t")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(QcompileError, match="choose a folder you may write"):
        REPORT.to_html(tmp_path / "absent" / "report.html")


def pixels(image: bytes) -> list[list[tuple[int, ...]]]:
    """Rows of RGB pixels of a PNG as `png` writes it."""
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(image[i : i + 4]) for i in (16, 20))
    start = image.index(b"IDAT")
    raw = zlib.decompress(image[start + 4 : start + 4 + int.from_bytes(image[start - 4 : start])])
    lines = [raw[i * (3 * width + 1) + 1 : (i + 1) * (3 * width + 1)] for i in range(height)]
    return [[tuple(line[3 * x : 3 * x + 3]) for x in range(width)] for line in lines]


def test_images_hold_their_pixels() -> None:
    drawn = [[(1, 2, 3), (4, 5, 6), (255, 0, 128)], [(0, 0, 0), (9, 9, 9), (7, 8, 9)]]
    assert pixels(png(drawn)) == drawn


def test_a_heat_map_is_brightest_where_a_channel_is_loudest() -> None:
    rows = [[1.0] * 64 for _ in range(3)]
    rows[1][40] = 16.0
    rows[2][5] = 0.0
    drawn = heat_map(["a", "b", "c"], rows, 64, {40: "loud"}, "|x|")
    image = re.search(r'href="data:image/png;base64,([^"]+)"', drawn)
    assert image
    found = pixels(b64decode(image[1]))
    assert (len(found), len(found[0])) == (3, 64)
    assert found[1][40] == colour(1.0)
    assert found[0][40] == found[2][5] == colour(0.0)
    assert ">40<title>loud</title>" in drawn


@pytest.mark.parametrize(("channels", "bins"), [(5, 5), (513, 257), (1408, 470), (11008, 501), (4096, 512)])
def test_many_channels_share_columns_and_the_loudest_is_kept(channels: int, bins: int) -> None:
    row_ = [1.0] * bins
    row_[-1] = 64.0
    image = re.search(r'base64,([^"]+)"', heat_map(["a"], [row_], channels, {}, "|x|"))
    assert image
    (found,) = pixels(b64decode(image[1]))
    assert len(found) <= 256
    assert found[-1] == colour(1.0)


def test_marks_stand_in_the_order_of_their_values() -> None:
    drawn = dots(["a", "b"], [Series(name="s", shape="circle", values=[10.0, 40.0])], "dB")
    xs = [float(x) for x in re.findall(r'<circle class="fill0" cx="([\d.]+)"', drawn)]
    # the first is the legend's
    assert xs[1] < xs[2]
    ring = dots(["a"], [Series(name="s", shape="ring", values=[None])], "dB")
    assert ring.count("<circle") == 1


def test_bars_are_as_long_as_their_shares() -> None:
    drawn = shares(["a", "b"], [("x", [0.25, 1.5]), ("y", [0.75, -0.5])])
    widths = [
        float(w) for w in re.findall(r'<rect class="fill\d" x="[\d.]+" y="\d+" width="([\d.]+)" height="11"', drawn)
    ]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(4 * widths[0], abs=0.2)
    assert widths[3] == 0


@pytest.mark.parametrize("values", [[float("inf")], [float("-inf")], [0.0, 0.0], [-3.0], [1e-9, 1e9]])
def test_odd_values_can_be_drawn(values: list[float]) -> None:
    drawn = dots(["n"] * len(values), [Series(name="s", shape="square", values=values)], "dB")
    assert "nan" not in drawn
    assert not re.search(r'[xy]="-?inf', drawn)


def test_names_are_shortened_by_whole_parts() -> None:
    assert short("model.layers.3.mlp.up_proj") == "layers.3.mlp.up_proj"
    assert short("fc") == "fc"
    assert short("a" * 60) == "a" * 60
    assert short("some.very.long.path.that.has.many.parts.layers.3.mlp.up_proj").endswith("layers.3.mlp.up_proj")


def test_places_are_said_once() -> None:
    layers = [f"layers.{i}.q, k" for i in (0, 1, 2, 3, 7)]
    assert places_of([*layers, "head"]) == "layers.0\u20113, 7.q, k; head"
    assert places_of(["v2.x"]) == "v2.x"
