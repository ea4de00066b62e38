"""Parity needs the peers: here their absence skips, in CI it fails."""

import importlib.util
import os

import pytest

PEERS = ("diffusers", "transformers", "peft")
missing = [peer for peer in PEERS if importlib.util.find_spec(peer) is None]
if missing and os.environ.get("CI", "").lower() in ("1", "true"):
    raise pytest.UsageError(f"parity tests need {', '.join(missing)}: pip install 'minit2v[test]'")
# Without the peers the files here cannot even be imported.
collect_ignore_glob = ["test_*.py"] if missing else []


def pytest_report_header() -> str | None:
    return f"parity tests are left out: {', '.join(missing)} missing" if missing else None
