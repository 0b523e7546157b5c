"""Progress is shown where somebody looks, and changes nothing of what is run through."""

import sys

import pytest

from qcompile.progress import most_memory, shown


def test_without_a_terminal_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    items = [1, 2, 3]
    assert shown(items) is items
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_how_far_how_much_memory_and_what_each_step_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    # what rich asks beside it
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    assert shown([1], progress=False) == [1]
    steps = (number for number in (5, 6))
    assert list(shown(steps, what="solve", total=2, tell=lambda n: f"{n} dB")) == [5, 6]
    said = capsys.readouterr().err
    assert "solve" in said
    assert "2/2" in said
    assert "6 dB" in said
    assert "GiB" in said


def test_memory_is_what_the_process_held() -> None:
    # of zeros, pages that nobody wrote to would not be held
    held = b"x" * 2**30
    assert float(most_memory().split()[0]) >= len(held) / 2**30
