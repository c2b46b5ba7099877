"""The service is tested where its extra is installed."""

from __future__ import annotations

import pytest

for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="the extra [serve] is not installed")
