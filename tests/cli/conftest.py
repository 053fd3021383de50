"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_files import class_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint of three classes."""
    return class_model(tmp_path_factory.mktemp("model") / "checkpoint")
