"""Which tests of compiling run where time is short: of each, one configuration of every kernel for every device."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen = set()
    for item in items:
        if not isinstance(item, pytest.Function) or not item.originalname.endswith(("_compile", "_compiles")):
            continue
        given = item.callspec.params if hasattr(item, "callspec") else {}
        config = given.get("config", given.get("tiles"))
        named = (given.get(name) for name in ("capability", "codes", "before"))
        key = (item.path, item.originalname, type(config), *named)
        if key in seen:
            item.add_marker(pytest.mark.again)
        seen.add(key)
