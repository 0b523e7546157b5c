"""What all tests share: texts kept in tests/golden, written anew by `pytest --accept`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.hosts import HOSTS, Host

GOLDEN = Path(__file__).parent / "golden"

# a loaded machine is no defect of ours
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write what tests found into tests/golden; review the diff")


@pytest.fixture
def assert_text(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """assert_text(name, text): `text` is what stands in tests/golden/<name>.txt."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--accept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        assert path.exists(), f"{path} does not exist: run `pytest --accept` and review it"
        assert text == path.read_text().rstrip("\n")

    return check


@pytest.fixture(params=HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    """Each host in turn."""
    if request.param.name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    return request.param
