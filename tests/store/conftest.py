from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test pulls the plug, so none needs to wait for the disk; that files are synced is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
