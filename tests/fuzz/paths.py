"""Makes tests/support importable, for runs without pytest."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "support"))
