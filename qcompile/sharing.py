"""Weights that several sites read, as a table that is the head, too: who keeps what of them."""

from collections.abc import Hashable, Iterable, Iterator, Mapping

from qcompile.plan import Decision


def kept_apart(decisions: Iterable[Decision], weight_of: Mapping[str, Hashable]) -> Iterator[str]:
    """A note for each weight that sites read under several specs, and that is kept once under each.

    weight_of: by site, equal for those that read one weight; sites without are left out.
    """
    specs: dict[Hashable, dict[str, list[str]]] = {}
    for decision in decisions:
        if decision.weight is not None and decision.name in weight_of:
            under = specs.setdefault(weight_of[decision.name], {})
            under.setdefault(str(decision.weight), []).append(decision.name)
    for under in specs.values():
        if len(under) > 1:
            each = ", ".join(f"as {spec} for {', '.join(map(repr, sites))}" for spec, sites in under.items())
            yield f"one weight is kept {len(under)} times, {each}: give these sites one spec to keep it once"
