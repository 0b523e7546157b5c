"""Quality measures against their definitions, written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.report.quality import (
    LanguageQuality,
    cosines,
    mean_pooled,
    token_divergences,
    token_losses,
    token_windows,
)
from qcompile.report.timing import time_in_turns


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))


def test_windows_are_whole_and_from_the_second_half() -> None:
    windows = token_windows(torch.arange(25, dtype=torch.int16), size=5)
    assert windows.tolist() == [[12, 13, 14, 15, 16], [17, 18, 19, 20, 21]]
    assert windows.dtype is torch.int64
    assert token_windows(torch.arange(25), size=5, count=1).shape == (1, 5)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(CalibrationError, match="give at least 10 tokens"):
        token_windows(torch.arange(8), size=5)


def test_losses_predict_every_token_but_the_first(logits: Tensor) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    found = token_losses(logits, tokens)
    probabilities = logits.double().softmax(-1)
    for b in range(2):
        for t in range(4):
            assert found[b, t] == pytest.approx(-math.log(probabilities[b, t, tokens[b, t + 1]]), rel=1e-5)


def test_divergence_is_the_sum_of_p_log_p_over_q(logits: Tensor) -> None:
    other = logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    torch.testing.assert_close(token_divergences(logits, other), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-7)
    assert token_divergences(logits, logits).abs().max() == 0


def test_language_quality_is_the_mean_over_all_windows(logits: Tensor) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    other = logits.roll(1, -1)
    whole, parts = LanguageQuality(), LanguageQuality()
    whole.add(logits, other, tokens)
    for i in range(2):
        parts.add(logits[i : i + 1], other[i : i + 1], tokens[i : i + 1])
    assert whole.perplexity == pytest.approx(math.exp(float(token_losses(other, tokens).mean())))
    assert parts.perplexity == pytest.approx(whole.perplexity)
    assert parts.kl == pytest.approx(float(token_divergences(logits[:, :-1], other[:, :-1]).mean()))
    assert parts.top1 == 0.0


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    quality = LanguageQuality()
    quality.add(torch.zeros(1, 6, 7), torch.zeros(1, 6, 7), torch.arange(6)[None])
    assert quality.perplexity == pytest.approx(7.0)
    assert (quality.kl, quality.top1) == (0.0, 1.0)


def test_cosines_see_angle_only() -> None:
    found = cosines(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    assert found.tolist() == pytest.approx([1.0, math.sqrt(0.5)])


def test_pooling_ignores_padding() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [99.0, -99.0]]])
    assert mean_pooled(hidden, torch.tensor([[1, 1, 0]])).tolist() == [pytest.approx([0.6, 0.8])]


def test_candidates_run_in_turns() -> None:
    calls: list[str] = []
    timings = time_in_turns({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ababab"
    assert {n: len(t.rounds) for n, t in timings.items()} == {"a": 3, "b": 3}
    assert all(t.lowest <= t.median <= max(t.rounds) for t in timings.values())
