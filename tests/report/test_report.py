"""Reports: sums, folding of equal layers, JSON, several frames in one."""

import json
from pathlib import Path

import pytest

from qcompile.errors import PlanError, QcompileError
from qcompile.report import Report, SiteReport, merge
from qcompile.report.table import pattern, rows


def site(name: str, **changes: object) -> SiteReport:
    values: dict[str, object] = {
        "op": "linear",
        "shape": (8, 16),
        "weight": "int8/channel",
        "input": "int8/token",
        "kernel": "int8",
        "snr_db": 40.0,
        "bytes_before": 512,
        "bytes_after": 160,
        "macs": 128,
    }
    return SiteReport(name=name, **values | changes)  # type: ignore[arg-type]


def alone(name: str, **changes: object) -> SiteReport:
    values: dict[str, object] = {"weight": None, "input": None, "kernel": "", "snr_db": None, "bytes_after": 512}
    return site(name, **values | {"reason": "no rule matches an embedding"} | changes)


def report(*sites: SiteReport, **changes: object) -> Report:
    values: dict[str, object] = {"recipe": "int8", "device": "cpu", "sites": sites}
    return Report(**values | changes)  # type: ignore[arg-type]


LAYERS = tuple(site(f"model.layers.{i}.mlp.{p}", snr_db=40.0 - i) for i in range(12) for p in ("gate", "up"))


def test_channels_that_are_multiplied_as_they_are_are_counted() -> None:
    plain, few, more = site("a"), site("l.0.fc", outliers=3, kernel="int8 + tail"), site("l.1.fc", outliers=5)
    assert [row.kernel for row in rows([plain, few, few])] == ["int8", "int8 + tail (3)"]
    assert rows([few, more], full=True)[1].kernel == "int8 (5)"
    text = report(plain, few, site("l.1.fc", outliers=5, kernel="int8 + tail")).to_text()
    assert "int8 + tail (3-5)" in text
    assert Report.from_json(report(few).to_json()).sites == (few,)


def test_sums_and_shares() -> None:
    both = report(site("a"), alone("b", bytes_before=1536, bytes_after=1536, macs=0))
    assert (both.bytes_before, both.bytes_after) == (2048, 1696)
    assert both.coverage == 512 / 2048
    assert both.mac_coverage == 1.0
    assert [s.name for s in both.quantized] == ["a"]
    assert [s.name for s in both.left_alone] == ["b"]


def test_a_report_of_nothing_covers_nothing() -> None:
    empty = report()
    assert (empty.coverage, empty.mac_coverage) == (0.0, 0.0)
    assert "0 of 0 sites" in str(empty)


def test_equal_layers_become_one_row_with_the_lowest_snr() -> None:
    found = rows(LAYERS)
    assert [r.title for r in found] == ["model.layers.*.mlp.gate x12", "model.layers.*.mlp.up x12"]
    assert found[0].snr_db == 29.0
    assert found[0].bytes_before == 12 * 512
    assert [r.title for r in rows(LAYERS, full=True)] == [s.name for s in LAYERS]


@pytest.mark.parametrize(
    "change", [{"kernel": "other"}, {"shape": (8, 32)}, {"weight": "nf4/g64"}, {"op": "embedding"}, {"input": None}]
)
def test_layers_that_differ_keep_their_own_row(change: dict[str, object]) -> None:
    found = rows([site("layers.0.q"), site("layers.1.q", **change)])
    assert [r.title for r in found] == ["layers.0.q", "layers.1.q"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("layers.3.q_proj", "layers.*.q_proj"), ("0.fc1", "*.fc1"), ("h.10.attn.2", "h.*.attn.*"), ("fc1.w2v", "fc1.w2v")],
)
def test_only_whole_parts_of_a_name_are_layer_numbers(name: str, expected: str) -> None:
    assert pattern(name) == expected


def test_text_names_what_was_left_alone_and_why() -> None:
    text = report(*LAYERS, alone("embed"), notes=("two frames",)).to_text()
    for word in ("model.layers.*.mlp.gate x12", "int8/channel", "embed", "no rule matches an embedding", "two frames"):
        assert word in text
    assert "lowest SNR 29.0 dB (model.layers.11.mlp.gate)" in " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_text_keeps_to_its_width(width: int) -> None:
    lines = report(*LAYERS, alone("embed")).to_text(width=width).splitlines()
    assert max(len(line) for line in lines) <= width


def test_full_text_says_why_kernels_refused() -> None:
    refusing = report(site("a", refused={"fp8": "needs sm_89"}), site("b", refused={"fp8": "needs sm_89"}))
    assert "needs sm_89" in refusing.to_text(full=True)
    assert "needs sm_89" not in refusing.to_text()


def test_json_round_trip_by_file_and_by_text(tmp_path: Path) -> None:
    original = report(site("a", refused={"fp8": "no"}), alone("b"), notes=("n",))
    path = tmp_path / "report.json"
    text = original.to_json(path)
    assert path.read_text() == text
    assert Report.from_json(path) == Report.from_json(str(path)) == Report.from_json(text) == original
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_field_of_a_later_version_is_skipped() -> None:
    data = json.loads(report(site("a")).to_json())
    data["sites"][0]["colour"] = "green"
    assert Report.from_json(json.dumps(data)) == report(site("a"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"kind": "qcompile.report"', "breaks at line 1"),
        ('{"recipe": "int8"}', "no report of qcompile"),
        ('{"kind": "qcompile.report", "schema": 99}', "schema 99"),
    ],
)
def test_what_is_no_report_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Report.from_json(text)


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    target = tmp_path / "absent" / "report.json"
    with pytest.raises(QcompileError, match=r"cannot write the report to .*absent.*choose a folder"):
        report(site("a")).to_json(target)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(QcompileError, match="No space left"):
        report(site("a")).to_json(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_merge_counts_a_site_once_with_all_its_kernels() -> None:
    first = report(site("a"), site("b"), notes=("x",))
    second = report(site("a", kernel="packed", refused={"int8": "M is 1"}), site("c"), notes=("x", "y"))
    merged = merge([first, second])
    assert [s.name for s in merged.sites] == ["a", "b", "c"]
    assert merged.sites[0].kernel == "int8 | packed"
    assert merged.sites[0].refused == {"int8": "M is 1"}
    assert merged.bytes_before == 3 * 512
    assert (merged.recipe, merged.notes) == ("int8", ("x", "y"))
    assert merge([merged, second]) == merged


def test_merge_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one report"):
        merge([])
