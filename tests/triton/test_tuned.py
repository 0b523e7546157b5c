"""What `qcompile tune` keeps: it comes before the tables, under one key, and nothing else is believed."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.triton import tuned
from qcompile.backends.triton.eight_bit_table import HopperTiles, Library
from qcompile.backends.triton.families import FAMILIES, families_on
from qcompile.backends.triton.table import configs_of, fitting
from qcompile.backends.triton.tuned import Key, Tuned, read_tuning, tuned_entries, tuning_of, write_tuning
from qcompile.backends.triton.tuning import CHOICES, Outcome, candidates, fastest, neighbours
from qcompile.backends.triton.width_table import FewRows, ManyRows, Unpack, choose

KEY = Key(device="NVIDIA H200", capability=90, torch="2.11.0", triton="3.6.0", kernels="abc")
FEW = FewRows(rows=8, units=2, warps=4, depth=2, blocks=4, resident=3)
DEVICE = torch.device("cuda", 0)


def found(rows: int, config: tuned.Config = FEW, fmt: str = "int4-weight") -> Tuned:
    return Tuned(format=fmt, N=4096, K=4096, rows=rows, config=config, us=7.5, bf16_us=13.0)


@pytest.fixture(autouse=True)
def on_an_h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "key_of", lambda device: KEY)
    tuning_of.cache_clear()
    yield
    tuning_of.cache_clear()


def test_nothing_was_tuned() -> None:
    assert read_tuning(KEY) == tuned.Tuning(path=tuned.path_for("NVIDIA H200"))
    assert tuned_entries("int4-weight", 4096, 4096, DEVICE) == ()


def test_what_is_written_is_read() -> None:
    configs = [FEW, *{type(c): c for f in FAMILIES.values() for c in configs_of(f.table, 90)}.values()]
    assert len({type(config) for config in configs}) == len(tuned._KINDS)
    written = [found(rows, config) for rows, config in enumerate(configs, 1)]
    assert write_tuning(KEY, written) == tuned.path_for("NVIDIA H200")
    assert read_tuning(KEY).tuned == tuple(written)
    # only the file itself is left
    assert [path.name for path in tuned.cache_folder().iterdir()] == ["tuned-NVIDIA-H200.json"]


def test_a_second_run_adds_and_replaces() -> None:
    write_tuning(KEY, [found(1), found(16)])
    write_tuning(KEY, [replace(found(16), us=7.0), found(64)])
    assert [(t.rows, t.us) for t in read_tuning(KEY).tuned] == [(1, 7.5), (16, 7.0), (64, 7.5)]


@pytest.mark.parametrize("field", ["capability", "triton", "kernels"])
def test_another_key_is_not_used_and_says_so(field: str, caplog: pytest.LogCaptureFixture) -> None:
    write_tuning(replace(KEY, **{field: 80 if field == "capability" else "old"}), [found(1)])
    with caplog.at_level(logging.WARNING):
        assert tuned_entries("int4-weight", 4096, 4096, DEVICE) == ()
        assert tuned_entries("int4-weight", 4096, 4096, DEVICE) == ()
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"{field} was" in message
    assert "qcompile tune" in message
    # what is tuned anew takes its place
    write_tuning(KEY, [found(16)])
    assert [t.rows for t in read_tuning(KEY).tuned] == [16]


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"key": {}, "tuned": []}', '{"key": null}', "\N{SNOWMAN}"], ids=repr
)
def test_a_broken_file_is_not_used(text: str) -> None:
    path = tuned.path_for("NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert "cannot be read" in str(read_tuning(KEY).stale)


def test_a_configuration_that_is_none_is_not_used() -> None:
    path = write_tuning(KEY, [found(1)])
    held = json.loads(path.read_text())
    held["tuned"][0]["config"]["kind"] = "Path"
    path.write_text(json.dumps(held))
    assert "cannot be read" in str(read_tuning(KEY).stale)


def test_what_was_tuned_comes_first() -> None:
    many = ManyRows(rows=64, units=1, warps=4, steps=4, stages=4, slices=2, resident=2)
    write_tuning(KEY, [found(1), found(64, many), found(8, fmt="int8")])
    first = tuned_entries("int4-weight", 4096, 4096, DEVICE)
    chosen = {M: choose("int4", M, 4096, 4096, 90, exact=True, first=first) for M in (1, 2, 64, 65)}
    assert chosen == {1: FEW, 2: many, 64: many, 65: choose("int4", 65, 4096, 4096, 90, exact=True)}
    # scales in float32 are not for wgmma: the table's then
    tables = choose("int4", 64, 4096, 4096, 90, exact=False)
    assert choose("int4", 64, 4096, 4096, 90, exact=False, first=first) == tables
    assert tuned_entries("int4-weight", 4096, 4224, DEVICE) == ()


def test_the_digest_is_of_the_sources() -> None:
    assert len(tuned._digest()) == 16
    assert tuned._digest() == tuned._digest.__wrapped__()


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("fmt", FAMILIES)
@pytest.mark.parametrize("M", [1, 16, 64, 512, 8192])
def test_candidates_are_few_and_begin_with_the_tables(fmt: str, M: int, capability: int) -> None:
    if fmt not in families_on(capability):
        return
    family = FAMILIES[fmt]
    tried = candidates(family, M, 4096, 4096, capability)
    assert tried[0] == next(c for c in fitting(family.table, M, 4096, 4096, capability) if family.can_run(c, M, 4096))
    assert len(tried) == len(set(tried)) < 28
    assert capability == 90 or not any(isinstance(c, ManyRows | HopperTiles) for c in tried)
    # the library is always among them, where there is a way to it
    assert fmt in ("int8", "w4a8") or any(isinstance(c, Unpack | Library) for c in tried)


def test_what_is_not_clearly_faster_changes_nothing() -> None:
    assert fastest([10.0, 9.9, 11.0]) == 0
    assert fastest([10.0, 9.9, 9.0, 9.5]) == 2
    assert fastest([10.0]) == 0


def test_an_outcome_says_what_changed() -> None:
    def outcome(config: tuned.Config) -> Outcome:
        return Outcome(best=found(1, config), table=FEW, table_us=8.0, tried=3, refused={})

    assert outcome(FEW).changes == "the table's"
    assert outcome(replace(FEW, units=1, resident=7)).changes == "units 2 -> 1, resident 3 -> 7"
    assert outcome(Unpack(blocks=4)).changes == "Unpack blocks=4"
    assert outcome(Library()).changes == "Library"


def test_what_the_tables_choose_is_among_the_choices() -> None:
    for family in FAMILIES.values():
        for config in configs_of(family.table, 90):
            assert all(getattr(config, name) in values for name, values in CHOICES.get(type(config), {}).items()), (
                config
            )


def test_neighbours_differ_in_one_field_by_one_step() -> None:
    assert FEW in neighbours(FEW)
    for config in neighbours(FEW)[1:]:
        (changed,) = (name for name in CHOICES[FewRows] if getattr(config, name) != getattr(FEW, name))
        values = CHOICES[FewRows][changed]
        assert abs(values.index(getattr(config, changed)) - values.index(getattr(FEW, changed))) == 1
