"""A progress bar where somebody looks: how far, how long still, how much memory, and what each step has to say."""

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Item = TypeVar("Item")


def shown(
    items: Iterable[Item],
    *,
    progress: bool = True,
    what: str = "calibrate",
    total: int | None = None,
    tell: Callable[[Item], str] | None = None,
) -> Iterable[Item]:
    """The items, behind a bar if that is wanted, standard error is a terminal, and `rich` is at hand.

    total: how many they are, where they have no length.  tell: what to say of each once it is there.
    """
    if not progress or not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return items
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    told = TextColumn("{task.fields[memory]} {task.fields[told]}")

    def all_items() -> Iterable[Item]:
        with Progress(*columns, told, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=_length(items, total), told="", memory="")
            for item in items:
                bar.update(task, told="" if tell is None else tell(item), memory=most_memory(), advance=1)
                yield item

    return all_items()


def _length(items: Iterable[Item], total: int | None) -> int | None:
    # a generator has none
    return total if total is not None else getattr(items, "__len__", lambda: None)()


def most_memory() -> str:
    """The most memory that the process has held so far, on the GPU if it uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes
    return f"{held / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"
