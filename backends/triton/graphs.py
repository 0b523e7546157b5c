"""Microseconds of work on a CUDA device, without what the host adds: medians of replayed graphs, taken in turns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What runs this many calls: a graph that holds them, mostly."""

    replay: Callable[[], None]
    calls: int


def captured(call: Callable[[int], object], calls: int) -> Captured:
    """call(0) to call(calls - 1) as a graph; each may read another copy of a weight, so that no cache holds it."""
    # what compiles, and what a first launch sets up, is not captured
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return Captured(replay=graph.replay, calls=calls)


def called(call: Callable[[int], object], calls: int) -> Captured:
    """The same without a graph, for calls that none can hold: the host's work counts where the device waits for it."""

    def replay() -> None:
        for i in range(calls):
            call(i)

    return Captured(replay=replay, calls=calls)


def in_turns(graphs: Sequence[Captured], rounds: int) -> list[float]:
    """Median microseconds of one call of each graph, replayed one after the other, so that all meet the same clocks."""
    times: list[list[float]] = [[] for _ in graphs]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(WARMUP + rounds):
        for captured_calls, found in zip(graphs, times, strict=True):
            begin.record()
            captured_calls.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= WARMUP:
                found.append(begin.elapsed_time(end) * 1000 / captured_calls.calls)
    return [statistics.median(found) for found in times]
