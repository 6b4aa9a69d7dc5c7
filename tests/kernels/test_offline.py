"""The kernels compiled for GPUs that are not here: nothing spills, and rows are fetched by 16 bytes per thread.

``make kernels`` does the same for every width, dtype, target and configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Of the bytes of rows that a thread loads, how many come by 128 bits at least.
WIDE = 0.9


@pytest.fixture(scope="module")
def rows(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """D = 1024 and 7168 in bfloat16 on sm_90 and gfx942, the configuration that is taken untimed."""
    report = tmp_path_factory.mktemp("offline") / "rows.json"
    # In this process kernels may be interpreted, and then they cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, repository / "tests" / "bench" / "offline.py", "--quick", "--first", "--json", report]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text())


KERNELS = [f"{family} {way}" for family in ("merge", "inter", "site") for way in ("forward", "backward")]


@pytest.mark.parametrize("D", [1024, 7168], ids=lambda D: f"D{D}")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda name: name.replace(" ", "-"))
def test_no_spills_and_128_bit_loads(rows: list[dict[str, Any]], kernel: str, target: str, D: int) -> None:
    chosen = [
        row for row in rows
        if row["target"] == target and row["D"] == D and row["kernel"].replace("_", " ").startswith(kernel)
    ]  # fmt: skip
    assert chosen, f"no {kernel} was compiled for {target}"
    failed = {(row["kernel"], row["config"]): row["error"] for row in chosen if row["error"]}
    assert failed == {}
    spilled = {(row["kernel"], row["config"]): (row["spilled"], row["registers"]) for row in chosen if row["spilled"]}
    assert spilled == {}
    narrow = {(row["kernel"], row["config"]): (row["wide"], row["loads"]) for row in chosen if row["wide"] < WIDE}
    assert narrow == {}
