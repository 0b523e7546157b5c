"""The table of README.md on the study of formats, made of results/format_study.json."""

import json
from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

from qcompile.cli.tables import markdown_table
from qcompile.formats import CodeBook, parse_format
from qcompile.study import FAMILIES, Study, Subject

# from light to heavy tails; the picture has more, and 6 bits, too
DISTRIBUTIONS = ("uniform", "normal", "student-t 8", "student-t 4")
BITS = (8, 4)


def study_table(stored: str, picture: str) -> str:
    """stored: JSON of the study. picture: a link to its drawing."""
    about, study = json.loads(stored), Study.from_json(stored)
    distributions = [subject for subject in study.of("distribution") if subject.name in DISTRIBUTIONS]
    weights, inputs = study.of("weight"), study.of("input")
    text = (
        "Formats: bits of accuracy, log2(RMS / RMSE) at the best clip, on distributions, and on average on a model's "
        f"weights, a scale for each {weights[0].granularity}, and inputs, a scale for each {inputs[0].granularity}; "
        f"{about['device']}, torch {about['torch']} (`{study.command}`). {picture}. A normal distribution has a "
        f"kurtosis of 3, the weights have {_kurtosis(weights)}, the inputs {_kurtosis(inputs)}: of 8 bits "
        f"{_best(weights)} of the weights, and {_best(inputs)} of the inputs."
    )
    columns = (
        "format",
        *(subject.name for subject in distributions),
        f"{len(weights)} weights (best for)",
        f"{len(inputs)} inputs (best for)",
    )
    rows = [
        (
            name,
            *(f"{subject.bits(name):.2f}" for subject in distributions),
            *(_mean(x, name) for x in (weights, inputs)),
        )
        for bits in BITS
        for name in FAMILIES[bits]
    ]
    return f"{text}\n\n{markdown_table(columns, rows)}"


def _mean(subjects: Sequence[Subject], name: str) -> str:
    """Accuracy of a format over all, and for how many it is the best of its bits; code books are no candidates."""
    accuracy = f"{mean(subject.bits(name) for subject in subjects):.2f}"
    fmt = parse_format(name)
    if isinstance(fmt, CodeBook):
        return accuracy
    return f"{accuracy} ({sum(subject.best[fmt.bits] == name for subject in subjects)})"


def _best(subjects: Sequence[Subject]) -> str:
    """Which formats of 8 bits are the best for how many, and how far int8 is from the first of them."""
    (first, count), *others = Counter(subject.best[8] for subject in subjects).most_common()
    gain = mean(subject.bits(first) - subject.bits("int8") for subject in subjects)
    also = "".join(f" and {name} for {number}" for name, number in others)
    return f"{first} ({gain:+.2f} bits over int8 on average over all) is best for {count}{also}"


def _kurtosis(subjects: Sequence[Subject]) -> str:
    found = [subject.kurtosis for subject in subjects]
    return f"{min(found):.1f} to {max(found):.3g} (median {median(found):.3g})"
