"""How a rank that used DTensor ends."""

from __future__ import annotations

import os
import sys


def leave() -> None:
    """End this process, successfully, without taking Python down.

    DTensor caches the device mesh, and with it gloo's threads, beyond ``destroy_process_group``. A thread that lets go of a
    collective's tensor while Python is taken down has no interpreter left to free it with, and the process dies of SIGABRT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
