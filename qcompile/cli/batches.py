"""Batches of a model's inputs from files: .npz archives, folders of them, and .jsonl."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from qcompile.errors import CalibrationError

Batch = dict[str, Tensor]


def read_batches(path: Path) -> Iterator[Batch]:
    """Batches by name of input, one at a time.

    path: an .npz file, which is one batch; a folder of such, in the order of their names; or .jsonl, of which each
    line is one batch: a table of (nested) lists of numbers, where a flat list is one row.
    Raises CalibrationError, at once if there is no such data, and while reading with the place of what is broken.
    """
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise CalibrationError(
                f"the folder {str(path)!r} holds no .npz file: write one for each batch (numpy.savez)"
            )
        return (_archive(file) for file in files)
    if not path.is_file():
        raise CalibrationError(f"there is no file or folder {str(path)!r} to read batches from")
    if path.suffix == ".jsonl":
        return _lines(path)
    if path.suffix == ".npz":
        return iter([_archive(path)])
    raise CalibrationError(f"{str(path)!r} is no .npz, no .jsonl, and no folder of .npz files: write one of these")


def _archive(path: Path) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name], order="C")) for name in arrays.files}
    except (OSError, EOFError, ValueError, TypeError, BadZipFile) as e:
        raise CalibrationError(f"{str(path)!r} cannot be read as arrays: {e}; write it anew with numpy.savez") from e


def _lines(path: Path) -> Iterator[Batch]:
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _line(line, f"line {number} of {str(path)!r}")
        except UnicodeDecodeError as e:
            raise CalibrationError(f"{str(path)!r} is no UTF-8 text: {e}") from e


def _line(line: str, place: str) -> Batch:
    try:
        table = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
        raise CalibrationError(f"{place} is no JSON: {e}") from e
    if not isinstance(table, dict):
        raise CalibrationError(f'{place} is no table: write the model\'s inputs by name, as {{"input_ids": [[1, 2]]}}')
    return {name: _tensor(value, f"{name!r} in {place}") for name, value in table.items()}


def _tensor(value: Any, place: str) -> Tensor:
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise CalibrationError(f"{place} is no table of numbers with rows of one length: {e}") from e
    return tensor[None] if tensor.dim() == 1 else tensor
