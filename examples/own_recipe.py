"""A recipe of your own: as a TOML file, and as an object. The first rule that matches a site decides.

python examples/own_recipe.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import qcompile
from qcompile import Recipe, Rule, parse_spec

TOML = """
name = "careful"
summary = "the head stays float, the first layer keeps 8 bits, the others 4 bits in groups of 64"

[[rules]]
match = "head"

[[rules]]
match = "body.0"
weight = "int8/channel"
input = "int8/token"

[[rules]]
weight = "int4/g64"
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


torch.manual_seed(0)
model = Net().eval()
x = torch.randn(16, 128)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "careful.toml"
    path.write_text(TOML)
    from_file = torch.compile(model, backend="qcompile", options={"recipe": str(path)})
    with torch.no_grad():
        from_file(x)

recipe = Recipe(
    name="careful-too",
    rules=(
        Rule(match="head"),
        Rule(match="body.0", weight=parse_spec("int8/channel"), input=parse_spec("int8/token")),
        Rule(weight=parse_spec("int4/g64")),
    ),
)
from_object = torch.compile(model, backend="qcompile", options={"recipe": recipe})
with torch.no_grad():
    same = torch.equal(from_file(x), from_object(x))

print(qcompile.report(from_object))
print(f"file and object give the same numbers: {same}")
