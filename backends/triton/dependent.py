"""Kernels that start before the one before them in their stream has ended, and wait inside for what that writes."""

import torch

from qcompile.backends.triton.table import capability_of

# first compute capability that has programmatic dependent launch (PTX ISA, griddepcontrol)
DEPENDENT_CAPABILITY = 90


def is_dependent(device: torch.device) -> bool:
    """Whether kernels on the device may start so."""
    return device.type == "cuda" and capability_of(device) >= DEPENDENT_CAPABILITY
