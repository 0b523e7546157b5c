"""What sees the function calls of a model in eager torch, those inside of attention too."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# torch hands the whole of it to a mode, and shows no mode what it calls; this one finds that nobody wants it whole
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class Calls(TorchFunctionMode, ABC):
    """A mode whose `called` stands for every call of a function of torch, and makes its result."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **(kwargs or {}))
        return self.called(func, args, kwargs or {})

    @abstractmethod
    def called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of func(*args, **kwargs), or what stands in for it."""
