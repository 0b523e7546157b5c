"""A trained language model keeps its quality under every recipe that needs no data."""

from pathlib import Path

import pytest
import torch

from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.report.quality import LanguageQuality, token_windows

SHARED = Path(__file__).resolve().parents[3] / "shared"
MODEL, TOKENS = SHARED / "models" / "llama28m", SHARED / "data" / "wikitext2-valid.bin"
WINDOWS = 24

# largest KL divergence to float in nats a token, largest relative rise of perplexity
BARS = {
    "int8": (4.3e-3, 0.005),
    "int8-weight": (1e-3, 0.005),
    "int4-weight": (99e-3, 0.06),
    "nf4": (56e-3, 0.05),
    "fp8": (15e-3, 0.015),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason="the model lies beside the checkout of its developers only"),
]


def test_presets_stay_below_their_bars() -> None:
    model = load_model(MODEL)
    windows = token_windows(read_tokens(TOKENS, MODEL, int(model.config.vocab_size)), 512, WINDOWS)
    compiled = {
        name: torch.compile(model, dynamic=False, backend="qcompile", options={"recipe": name}) for name in BARS
    }
    quality = {name: LanguageQuality() for name in ("float", *BARS)}
    with torch._dynamo.config.patch(recompile_limit=64):
        for batch in windows.split(8):
            logits = model(batch).logits
            quality["float"].add(logits, logits, batch)
            for name, run in compiled.items():
                quality[name].add(logits, run(batch).logits, batch)
    base = quality["float"].perplexity
    found = {name: (quality[name].kl, quality[name].perplexity / base - 1) for name in BARS}
    assert {name: pair for name, pair in found.items() if pair[0] > BARS[name][0] or pair[1] > BARS[name][1]} == {}
