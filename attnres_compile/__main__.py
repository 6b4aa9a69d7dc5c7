"""``python -m attnres_compile`` is the same as ``attnres``."""

import sys
from pathlib import Path

import attnres_compile


def main() -> None:
    # `-m` at the root of a checkout puts the root on sys.path, where our kernels/ would pass for the package `kernels`
    # that Transformers imports. What the package's own __path__ says beyond its first entry is that root.
    checkout = [Path(entry).resolve() for entry in attnres_compile.__path__[1:]]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in checkout]

    from attnres_compile import cli

    cli.main()


if __name__ == "__main__":
    main()
