"""The guide's Python runs as it stands, block after block; Inductor is left to the examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_nets import eager


def test_the_guide_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (repository / "examples" / "README.md").read_text(), re.S)
    assert len(blocks) == 6, "a block was added or lost"
    names: dict[str, object] = {"eager": eager}
    for number, block in enumerate(blocks):
        code = block.replace('backend="attnres"', "backend=eager").replace("block.compile()", 'block.compile(backend="eager")')
        exec(compile(code, f"block {number} of the guide", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
