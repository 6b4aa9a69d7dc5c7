"""The demo runs as a user runs it, on a small scale."""

import subprocess
import sys
from pathlib import Path


def test_the_quick_demo(repository: Path, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    command = [sys.executable, str(repository / "examples" / "demo.py"), "--quick", "--out", str(picture)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for line in ("converted under attnres", "Depth attention on validation text", "40 more steps", "block AttnRes │"):
        assert line in done.stdout, line
