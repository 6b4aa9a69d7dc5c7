"""Run a script as ``python`` does, with rewritten graphs run as they are: what it shows is the same, and nothing waits for C++.

    python tests/support/without_inductor.py SCRIPT [arguments]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from attnres_compile import capture

capture.compile_with_inductor = lambda graph_module, inputs, mode: graph_module.forward
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
