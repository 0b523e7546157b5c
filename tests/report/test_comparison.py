"""Sums of differences: over batches, without padding and what is not finite, and the certificate's verdict."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile.report import Report
from qcompile.report.comparison import Agreement, Comparison, Differences, OutputAgreement, OutputError

ERROR = OutputError(name="y", snr_db=30.0, relative=0.03, lowest_cosine=0.999, largest=0.5, peak=9.0)
OUTPUT = OutputAgreement(
    name="y", largest=0.01, between_db=60.0, torch_db=30.0, file_db=29.0, distance=0.001, bound=0.003
)
CERTIFICATE = Agreement(outputs=(OUTPUT,), batches=2, runtimes="PyTorch 2 and onnxruntime 1", why="one tenth")


def summed(*pairs: tuple[Tensor, Tensor], mask: Tensor | None = None) -> OutputError:
    sums = Differences()
    for reference, found in pairs:
        sums.add(reference, found, mask)
    return sums.error("y")


def test_batches_of_any_sizes_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 5, generator=generator)
    b = a + 0.01 * torch.randn(7, 5, generator=generator)
    whole, parts = summed((a, b)), summed((a[:2], b[:2]), (a[2:], b[2:]))
    assert parts.relative == pytest.approx(float((a - b).double().norm() / a.double().norm()), rel=1e-9)
    assert parts.snr_db == pytest.approx(-20 * math.log10(parts.relative), rel=1e-9)
    assert (parts.lowest_cosine, parts.largest, parts.peak) == (whole.lowest_cosine, whole.largest, whole.peak)
    assert parts.peak == float(a.abs().max())


def test_equal_outputs_are_infinitely_near() -> None:
    a = torch.ones(2, 3)
    same = summed((a, a), (0 * a, 0 * a))
    assert (same.snr_db, same.relative, same.lowest_cosine, same.largest) == (math.inf, 0.0, pytest.approx(1.0), 0.0)
    assert summed((0 * a, a)).snr_db == -math.inf


def test_padding_is_left_out_and_rows_of_zeros_have_no_cosine() -> None:
    a, mask = torch.ones(2, 2, 3), torch.tensor([[True, False], [True, True]])
    b = a.clone()
    b[0, 1] = 100
    assert summed((a, b)).largest == 99
    assert summed((a, b), mask=mask).largest == 0
    a[0, 0], b[0, 0] = 0, 0
    assert summed((a, b), mask=mask).lowest_cosine == pytest.approx(1.0)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_what_is_lost_is_far_and_what_the_reference_leaves_open_is_not(lost: float) -> None:
    a = torch.ones(2, 3)
    b = a.clone()
    b[0, 0] = lost
    far = summed((a, b))
    assert (far.snr_db, far.relative) == (-math.inf, math.inf)
    # a mask of -inf is no number in both
    assert summed((b, b)).relative == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_every_type_is_compared(dtype: torch.dtype) -> None:
    a = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    assert summed((a, a)).relative == 0
    assert summed((a, torch.ones_like(a))).relative == pytest.approx(math.sqrt(2 / 4))
    assert summed((a.new_empty(0, 3), a.new_empty(0, 3))).relative == 0
    assert summed((a[0, 0], a[0, 0])).relative == 0


def test_the_verdict_is_that_of_the_worst_output() -> None:
    assert CERTIFICATE.agrees
    assert "agree on 2 batches" in str(CERTIFICATE)
    bad = replace(CERTIFICATE, outputs=(OUTPUT, replace(OUTPUT, name="z", distance=0.004)))
    assert not bad.agrees
    assert "DISAGREE on 2 batches" in str(bad)
    assert "0.004 of 'z'" in str(bad)
    # a reference that has lost its numbers bounds nothing
    assert not replace(OUTPUT, distance=math.inf, bound=0.0).agrees
    assert not replace(OUTPUT, distance=math.nan).agrees
    assert "DISAGREE" in str(replace(CERTIFICATE, outputs=(replace(OUTPUT, distance=math.inf, bound=0.0),)))


@pytest.mark.parametrize(
    ("comparison", "words"),
    [
        (Comparison(outputs=(ERROR,), batches=1, runtime="onnxruntime 1"), "1 batch, which calibration did not see"),
        (Comparison(outputs=(ERROR,), batches=3, seen=True), "3 batches, which calibration may have seen"),
        (Comparison(reason="the file is <large>"), "not compared with the float model's: the file is <large>"),
    ],
)
def test_every_rendering_says_what_was_compared(comparison: Comparison, words: str) -> None:
    report = Report(recipe="int8", device="ort-cpu", sites=(), comparison=comparison, agreement=CERTIFICATE)
    text, page = report.to_text(width=400), report.to_html()
    assert words in text
    assert words.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;") in page
    assert ("0.99900" in text) == ("0.99900" in page) == bool(comparison.outputs)
    assert "agree on 2 batches" in text
    assert "agree on 2 batches" in page
    assert Report.from_json(report.to_json()) == report


def test_a_report_of_an_earlier_version_is_read() -> None:
    old = '{"schema": 1, "kind": "qcompile.report", "recipe": "int8", "device": "cpu", "sites": [], "notes": []}'
    assert (Report.from_json(old).comparison, Report.from_json(old).agreement) == (None, None)


def test_a_field_of_a_later_version_is_skipped() -> None:
    report = Report(
        recipe="int8", device="cpu", sites=(), comparison=Comparison(outputs=(ERROR,)), agreement=CERTIFICATE
    )
    later = report.to_json().replace('"batches": 2', '"batches": 2, "new": 1').replace('"snr_db"', '"new": 1, "snr_db"')
    assert Report.from_json(later) == report
