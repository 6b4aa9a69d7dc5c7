"""What ships, how it imports, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnres_compile

ROOT = Path(__file__).resolve().parent.parent
SUBPACKAGES = ("kernels", "passes", "patterns")
FOLDERS = ("attnres_compile", *SUBPACKAGES)
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The modules that every layer may build on, from the bottom up, with what each of them knows.
BASE = {
    "errors": set(),
    "config": {"errors"},
    "chain": set(),
    "transport": set(),
    "plan": {"config", "errors"},
    "site_parameters": {"config", "errors"},
    "report": {"chain", "config", "plan", "site_parameters"},
}
PRIVATE_TORCH = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch._subclasses", "torch.fx.experimental")
USES_PRIVATE_TORCH = ("attnres_compile/capture.py", "attnres_compile/pipeline.py")


def name_of(path: Path) -> str:
    """A source file's path below the root, which names it in messages."""
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Full names of everything that a source file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_from_us(path: Path) -> set[str]:
    """Modules (``config``, ``cli``) and subpackages (``passes.lower``) of ours that a source file imports."""
    ours = set()
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "attnres_compile" and rest:
            ours.add(".".join(rest[:2]) if rest[0] in SUBPACKAGES else rest[0])
    return ours


def in_folder(folder: str) -> list[Path]:
    return [path for path in SOURCES if path.is_relative_to(ROOT / folder)]


def test_every_folder_with_sources_is_listed_as_a_package() -> None:
    package_dir = PROJECT["tool"]["setuptools"]["package-dir"]
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == set(package_dir)
    assert {path.parent for path in SOURCES} == {ROOT / folder for folder in package_dir.values()}


def test_the_version_is_the_same_everywhere() -> None:
    assert attnres_compile.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("attnres-compile")


def test_constraints_pin_every_direct_dependency() -> None:
    project = PROJECT["project"]
    wanted = {requirement_name(text) for text in (*project["dependencies"], *project["optional-dependencies"]["test"])}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {requirement_name(line) for line in lines if line and not line.startswith("#")}
    assert pinned == wanted


def requirement_name(text: str) -> str:
    return text.partition("=")[0].partition(">")[0].partition("<")[0].strip()


def test_torch_finds_the_backend_through_the_entry_point() -> None:
    (entry,) = {
        (entry.name, entry.value) for entry in importlib.metadata.entry_points(group="torch_dynamo_backends", name="attnres")
    }
    assert entry == ("attnres", "attnres_compile.backend:attnres")


def test_exported_names_exist_and_compare_is_the_function() -> None:
    assert [name for name in attnres_compile.__all__ if not hasattr(attnres_compile, name)] == []
    # The submodule of the same name must not hide it.
    assert callable(attnres_compile.compare)


def test_importing_the_package_is_light() -> None:
    heavy = ("transformers", "matplotlib", "rich", "typer")
    code = f"import attnres_compile, sys; print(*(name for name in {heavy} if name in sys.modules))"
    assert run_python("-P", "-c", code).strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_are_absolute_and_unshadowed(path: Path) -> None:
    # A bare `import kernels` would find our folder at the root of a checkout, and someone else's package elsewhere.
    assert {name.partition(".")[0] for name in imported(path)}.isdisjoint(SUBPACKAGES)


@pytest.mark.parametrize("module", BASE)
def test_base_modules_know_only_those_below(module: str) -> None:
    assert imported_from_us(ROOT / "attnres_compile" / f"{module}.py") <= BASE[module]


@pytest.mark.parametrize("path", in_folder("patterns"), ids=name_of)
def test_patterns_know_only_patterns(path: Path) -> None:
    assert {name.partition(".")[0] for name in imported_from_us(path)} <= {"patterns"}


@pytest.mark.parametrize("path", in_folder("passes"), ids=name_of)
def test_passes_know_patterns_and_the_base(path: Path) -> None:
    known = {"patterns", "passes", *BASE}
    if name_of(path) == "passes/lower.py":
        known.add("kernels")
    assert {name.partition(".")[0] for name in imported_from_us(path)} <= known


@pytest.mark.parametrize("path", in_folder("kernels"), ids=name_of)
def test_kernels_know_only_kernels_torch_and_triton(path: Path) -> None:
    assert {name.partition(".")[0] for name in imported_from_us(path)} <= {"kernels"}
    others = {name.partition(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert others <= {"attnres_compile", "torch", "triton"}


def test_nobody_imports_the_command_line_but_its_entry() -> None:
    importers = {name_of(path) for path in SOURCES if "cli" in imported_from_us(path)}
    assert importers <= {"attnres_compile/__main__.py"}


@pytest.mark.parametrize("path", [path for path in SOURCES if name_of(path) not in USES_PRIVATE_TORCH], ids=name_of)
def test_private_torch_is_named_in_one_place(path: Path) -> None:
    text = path.read_text()
    assert [name for name in PRIVATE_TORCH if name in text] == []


def run_python(*arguments: str, cwd: Path | None = None, path: Path | None = None) -> str:
    """Standard output of this interpreter in a process of its own; ``path`` goes before everything installed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no build output lands in the checkout."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run_python(*pip, "--wheel-dir", str(output), str(source))
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("installed")
    run_python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def test_the_wheel_holds_every_source_and_the_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt")]
    shipped = {name for name in names if name.endswith(".py")}
    face, others = set(in_folder("attnres_compile")), set(SOURCES) - set(in_folder("attnres_compile"))
    assert shipped == {name_of(path) for path in face} | {f"attnres_compile/{name_of(path)}" for path in others}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "attnres = attnres_compile.cli:main" in entry_points
    assert "[torch_dynamo_backends]\nattnres = attnres_compile.backend:attnres" in entry_points


LOCATIONS = "import attnres_compile as a, attnres_compile.passes as b; print(a.__file__); print(b.__file__)"


@pytest.mark.parametrize("at_root", [False, True], ids=["elsewhere", "at the root of a checkout"])
def test_an_installed_wheel_imports_from_where_it_was_installed(installed: Path, tmp_path: Path, at_root: bool) -> None:
    # -P keeps the working folder off sys.path, as the console script does.
    locations = run_python("-P", "-c", LOCATIONS, cwd=ROOT if at_root else tmp_path, path=installed).split()
    package = installed / "attnres_compile"
    assert locations == [str(package / "__init__.py"), str(package / "passes" / "__init__.py")]


def test_the_root_of_a_checkout_goes_before_an_installed_wheel_as_a_whole(installed: Path) -> None:
    # Without -P the working folder comes first. Then all of the package must come from there, none from the wheel.
    locations = run_python("-c", LOCATIONS, cwd=ROOT, path=installed).split()
    assert locations == [str(ROOT / "attnres_compile" / "__init__.py"), str(ROOT / "passes" / "__init__.py")]


@pytest.mark.parametrize("at_root", [False, True], ids=["elsewhere", "at the root of a checkout"])
def test_the_console_script_of_a_wheel_runs(installed: Path, tmp_path: Path, at_root: bool) -> None:
    output = run_python(str(installed / "bin" / "attnres"), "env", cwd=ROOT if at_root else tmp_path, path=installed)
    assert f"{installed / 'attnres_compile'}" in output


def test_running_as_a_module_at_the_root_of_a_checkout_does_not_shadow_the_package_kernels() -> None:
    code = (
        "import importlib.util, runpy, sys\n"
        "sys.argv = ['attnres', 'env']\n"
        "try:\n    runpy.run_module('attnres_compile', run_name='__main__')\n"
        "finally:\n    print(importlib.util.find_spec('kernels'))\n"
    )
    *facts, found = run_python("-c", code, cwd=ROOT).splitlines()
    assert facts[0].split() == ["attnres_compile", attnres_compile.__version__]
    assert str(ROOT / "kernels") not in found


def test_the_tests_do_not_shadow_the_package_kernels() -> None:
    found = importlib.util.find_spec("kernels")
    assert found is None or not Path(str(found.origin)).is_relative_to(ROOT / "kernels")
