"""Module paths: how Dynamo and torch.export spell them, and which one an op gets."""

import re
from collections import Counter
from collections.abc import Iterable

# an owner's dictionary: ._modules['layers']._parameters["weight"]
_DICTIONARY = re.compile(r"\._(?:modules|parameters|buffers)\[(['\"])(.*?)\1\]")
_INDEX = re.compile(r"\[(\d+)\]")
# the variable that holds the outermost module: L['self'], G["model"], L__self__
_ROOT = re.compile(r"^(?:[LG]\[(['\"]).*?\1\]|L__self__)_*\.?")

_VARIABLE = re.compile(r"^[LG]\[(['\"])(.*?)\1\]")

# what to take off the front of a path in a frame, and what to put there instead
Frame = tuple[str, str]


def module_path(spelled: str) -> str:
    """The dotted path, relative to the root, of a module or tensor as torch spells it.

    "L['self'].model.layers.0" and "L['self']._modules['model']._modules['layers'][0]" are "model.layers.0".
    """
    return _ROOT.sub("", _INDEX.sub(r".\1", _DICTIONARY.sub(r".\2", spelled)))


def root_variable(spelled: str) -> str:
    """The variable that holds the outermost module: "a" of "G['a']._modules['fc']"; "" if torch does not say."""
    match = _VARIABLE.match(spelled)
    return match[2] if match else ""


def frame_of(tensors: Iterable[tuple[str, str]]) -> Frame:
    """How paths in one compiled frame relate to paths in the model, judged by its tensors.

    tensors: path in the frame, qualified name in the model. A frame may run one layer of the model (it says
    "q_proj.weight" for "layers.0.q_proj.weight") or an object that holds the model ("net.fc.weight" for "fc.weight").
    """
    votes: Counter[Frame] = Counter()
    for inner, outer in tensors:
        # a tied weight goes by the name of another module, and has no vote
        if f".{outer}".endswith(f".{inner}"):
            votes["", outer.removesuffix(inner).rstrip(".")] += 1
        elif inner.endswith(f".{outer}"):
            votes[inner.removesuffix(outer).rstrip("."), ""] += 1
    return votes.most_common(1)[0][0] if votes else ("", "")


def in_model(path: str, frame: Frame) -> str:
    """The path in the model of what a frame calls `path`."""
    inner, outer = frame
    if path == inner or path.startswith(f"{inner}."):
        path = path.removeprefix(inner).lstrip(".")
    return ".".join(part for part in (outer, path) if part)
