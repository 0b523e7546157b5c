"""`qcompile inspect`: what a folder holds: a plan, a model that was saved with its codes, or a checkpoint of others."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from qcompile import artifact
from qcompile.cli.tables import Markdown, show_table
from qcompile.errors import PlanError
from qcompile.manifest import Manifest, read_floats, read_manifest, require_unchanged
from qcompile.plan import Decision, Plan
from qcompile.readers import is_checkpoint, read_checkpoint
from qcompile.sharing import kept_apart
from qcompile.shifts import lowers_columns
from qcompile.sizes import stored_bytes

COLUMNS = ("site", "shape", "weight", "input", "bits per weight", "bytes", "stored as")


def inspect_folder(
    folder: Annotated[Path, typer.Argument(help="What qcompile.save wrote, or a checkpoint of GPTQ, AWQ or the like.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file, and compare it with its checksum.")
    ] = False,
    markdown: Markdown = False,
) -> None:
    """What a folder holds: its sites, and what loads it."""
    manifest = read_manifest(folder) if artifact.holds_model(folder) else None
    foreign = manifest is None and is_checkpoint(folder)
    plan, floats = read_checkpoint(folder) if foreign else (artifact.load(folder), {})
    if manifest is not None:
        floats = read_floats(folder)
    show_table(COLUMNS, [_row(d) for d in plan.decisions.values()], markdown=markdown)
    for line in (
        *_head(folder, plan, manifest, foreign=foreign),
        *_total(plan, sum(t.nbytes for t in floats.values())),
    ):
        typer.echo(line)
    if verify:
        typer.echo(_verified(folder, manifest))


def _row(decision: Decision) -> Sequence[str]:
    count, size = prod(decision.shape), _bytes(decision)
    bits = "" if size is None else f"{8 * size / count:.3f}"
    stored = decision.reason if decision.weight is None else _stored(decision)
    shape = " x ".join(map(str, decision.shape))
    specs = (str(spec or "float") for spec in (decision.weight, decision.input))
    return (decision.name, shape, *specs, bits, "" if size is None else str(size), stored)


def _stored(decision: Decision) -> str:
    """What stands for the weight; octaves by which its columns are lowered are beside its codes, one for each of K."""
    stored = "codes" if decision.solved else decision.solver
    beside = any(decision.shift) and lowers_columns(decision.weight)
    return f"{stored} + shift" if beside else stored


def _bytes(decision: Decision) -> int | None:
    """Of the weight: as it is stored, or will be; None if it stays float."""
    if decision.solved is not None:
        return decision.solved.nbytes
    return None if decision.weight is None else stored_bytes(decision.weight, *decision.shape)


def _head(folder: Path, plan: Plan, manifest: Manifest | None, *, foreign: bool) -> Iterator[str]:
    if manifest is not None:
        made = f"recipe {plan.recipe.name!r}, schema {manifest.schema}, qcompile {manifest.version}"
        yield f"a {manifest.model} with its weights, {made}"
        yield "files: " + ", ".join(f"{name} {size} bytes" for name, (size, _) in manifest.files.items())
        tied = [" = ".join(entry.names) for entry in manifest.entries if entry.parameter and len(entry.names) > 1]
        yield from (f"one tensor: {names}" for names in tied)
        named = {name: entry.names for entry in manifest.entries for name in entry.names}
        weight_of = {site: names for name, names in named.items() for site in (name, name.removesuffix(".weight"))}
        # a module without a weight runs with one of those
        sources = {d.name: d.solved.source for d in plan.decisions.values() if d.solved is not None}
        weight_of |= {site: named[source] for site, source in sources.items() if source in named}
        yield from kept_apart(plan.decisions.values(), weight_of)
    elif foreign:
        yield f"a checkpoint of {plan.recipe.name}"
    else:
        yield f"a plan, recipe {plan.recipe.name!r}, schema {artifact.schema_of(folder)}; weights come from the model"
        yield from (f"one weight: {' = '.join(names)}" for names in plan.shared)
        yield from kept_apart(plan.decisions.values(), _weight_of(plan))
    yield f'to load it: plan = qcompile.load("{folder}", model)'
    yield 'to run it: torch.compile(model, backend="qcompile", options={"plan": plan})'


def _weight_of(plan: Plan) -> Mapping[str, str]:
    """What tells weights apart, by site, of sites that share theirs: who reads it first."""
    return {name: names[0] for names in plan.shared for name in names}


def _total(plan: Plan, floats: int) -> Iterator[str]:
    # a table that two sites read is stored once, under each of its specs
    weight_of = _weight_of(plan)
    owners = {
        (d.solved.digest if d.solved else weight_of.get(d.name, d.name), d.weight): d for d in plan.decisions.values()
    }
    quantized = [(prod(d.shape), size) for d in owners.values() if (size := _bytes(d)) is not None]
    if quantized:
        count, size = (sum(numbers) for numbers in zip(*quantized, strict=True))
        yield f"{len(quantized)} weights, {count} numbers, {size} bytes: {8 * size / count:.3f} bits per weight"
    if floats:
        yield f"in float: {floats} bytes"


def _verified(folder: Path, manifest: Manifest | None) -> str:
    """Says that every file is as it was saved.  Raises PlanError for one that is not."""
    if manifest is None:
        raise PlanError(f"{str(folder)!r} has no manifest with checksums; those of qcompile.save(model, folder) have")
    require_unchanged(manifest, folder, manifest.files)
    return "all files are as they were saved"
