"""What a user installs is whole: sdist, wheel and editable installs hold the passes and backends behind the links."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# of every part something that only a whole package has
WANTED = (
    "qcompile/__init__.py",
    "qcompile/py.typed",
    "qcompile/passes/__init__.py",
    "qcompile/passes/insert_qdq.py",
    "qcompile/backends/devices.py",
    "qcompile/backends/fx/kernels/int8.py",
    "qcompile/cli/sentences.txt",
    "qcompile/report/report.py",
)
USE = (
    "import qcompile, qcompile.passes, qcompile.backends, qcompile.backends.devices, torch;"
    "assert 'qcompile' in torch._dynamo.list_backends();"
    "print(qcompile.__file__)"
)


def test_torch_compile_finds_the_backend_by_name() -> None:
    found = entry_points(group="torch_dynamo_backends")
    assert [e.value for e in found if e.name == "qcompile"] == ["qcompile.compile:backend"]


def test_the_core_depends_on_little() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("<")[0] for requirement in project["dependencies"]}
    assert names == {"torch", "safetensors", "rich", "typer"}
    assert all("CUDA" not in line for line in project["dependencies"])


def test_no_constraint_is_on_torch_or_what_comes_with_it() -> None:
    """pip would replace an installed torch by one that was built for that Triton."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not {"torch", "triton"} & {line.partition("==")[0] for line in lines}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository, links as links, without what git ignores."""
    target = tmp_path_factory.mktemp("clone")
    listed = _run("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    names = [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (target / name).symlink_to((ROOT / name).readlink())
        else:
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def built(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(clone))
    return folder


@pytest.mark.slow
def test_sdist_holds_real_files(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {m.name.split("/", 1)[1]: m for m in archive.getmembers() if "/" in m.name}
    assert [name for name in WANTED if name not in files or not files[name].isfile()] == []
    assert {"LICENSE", "README.md", "pyproject.toml"} <= files.keys()


@pytest.mark.slow
def test_wheel_holds_real_files_and_the_package_alone(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert [name for name in WANTED if name not in names] == []
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"qcompile"}


@pytest.mark.slow
def test_an_installed_wheel_works_from_another_folder(built: Path, tmp_path: Path) -> None:
    python = _fresh_environment(tmp_path / "env")
    _run(python, "-m", "pip", "install", "-q", "--no-deps", str(next(built.glob("*.whl"))))
    assert str(tmp_path / "env") in _run(python, "-c", USE, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-e",)], ids=["plain", "editable"])
def test_installing_from_a_clone_works_from_another_folder(
    clone: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    python = _fresh_environment(tmp_path / "env")
    _run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *options, str(clone))
    expected = clone if options else tmp_path / "env"
    assert str(expected) in _run(python, "-c", USE, cwd=tmp_path)
    script = Path(python).with_name("qcompile")
    assert _run(str(script), "--version", cwd=tmp_path).startswith("qcompile ")


def _fresh_environment(folder: Path) -> str:
    """The python of an environment in which only this machine's own packages, torch among them, are visible."""
    venv.create(folder, with_pip=False, system_site_packages=True)
    return str(folder / "bin" / "python")


def _run(*command: str, cwd: Path | None = None) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
