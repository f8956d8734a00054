"""What holds for every test: compiled loops are of the code as it is now."""

from contextlib import suppress
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fusion_ray"


def pytest_configure(config: pytest.Config) -> None:
    """Numba's cache of a function looks at its own file alone: a change of what it calls in another file would go unseen."""
    newest = max(path.stat().st_mtime for path in PACKAGE.rglob("*.py") if "njit" in path.read_text(encoding="utf-8"))
    for index in list(PACKAGE.rglob("*.nbi")):
        with suppress(FileNotFoundError):  # another test run does the same
            if index.stat().st_mtime < newest:
                for path in list(index.parent.glob("*.nb[ic]")):
                    path.unlink(missing_ok=True)
