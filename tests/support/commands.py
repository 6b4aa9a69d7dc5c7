"""What tests of the command line ask of its outcomes."""

from __future__ import annotations

from typer.testing import Result


def assert_one_line_on_stderr(result: Result, *words: str) -> None:
    """Bad input: exit code 2, nothing on stdout, and on stderr one line that has ``words``."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("attnres: error: ")
    assert [word for word in words if word not in lines[0]] == []
