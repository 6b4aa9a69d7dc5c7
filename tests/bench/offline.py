"""Compiles the Triton kernels for GPUs that are not here and reports what came out: ``make kernels``.

    python tests/bench/offline.py [--quick] [--first] [--modules NAME ...] [--triton VERSION ...] [--json FILE]

Per target one table of registers, spills, shared memory and widths of loads. A spill goes to memory and back for every row, and a
row that is not fetched by 16 bytes per thread needs several times the instructions, so both are defects; the exit status is 1 if
anything spills, does not fit or does not compile. ``--triton`` repeats the report under further versions of Triton, which are
installed into build/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # a kernel that is interpreted cannot be compiled

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MODULES = ("fused_merge", "fused_inter", "fused_inter_backward", "fused_site")
WIDTHS = (1024, 1536, 2048, 4096, 5120, 7168)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """A target, and what a multiprocessor of it has. ``lane_registers`` and ``granule`` are in registers of one lane."""

    backend: str
    arch: int | str
    lanes: int
    lane_registers: int
    granule: int
    warps: int
    shared: int
    largest_shared: int

    def resident_warps(self, registers: int, num_warps: int, shared: int) -> int:
        """Warps that run at a time, by registers, shared memory and the limits of 32 programs and ``warps`` warps."""
        by_registers = self.lane_registers // max(self.granule, -(-registers // self.granule) * self.granule)
        by_shared = self.shared // (shared + 1024)
        return min(by_registers // num_warps, by_shared, self.warps // num_warps, 32) * num_warps


KIB = 1024
MACHINES = {
    "sm_80": Machine("cuda", 80, 32, 2048, 8, 64, 164 * KIB, 163 * KIB),
    "sm_90": Machine("cuda", 90, 32, 2048, 8, 64, 228 * KIB, 227 * KIB),
    "sm_100": Machine("cuda", 100, 32, 2048, 8, 64, 228 * KIB, 227 * KIB),
    "gfx942": Machine("hip", "gfx942", 64, 2048, 8, 32, 65 * KIB, 64 * KIB),
}


@dataclass
class Row:
    """What one compilation gave. ``spilled`` is in bytes per thread; ``loads`` counts the instructions by their bits."""

    target: str
    kernel: str
    D: int
    dtype: str
    config: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    wide: float = 0.0
    resident_warps: int = 0
    error: str = ""


# ------------------------------------------------------------------------------------------------------- one compilation


def compile_group(group: tuple[str, str, int, str, bool]) -> list[Row]:
    """All configurations of a module for one target, width and dtype, or the first of each kernel alone."""
    module_name, target, D, dtype, first = group
    machine = MACHINES[target]
    module = importlib.import_module(f"attnres_compile.kernels.{module_name}")
    launch_options = getattr(module, "launch_options", lambda config, lanes: {"num_warps": config.num_warps})
    rows: list[Row] = []
    seen: set[tuple[Any, ...]] = set()
    firsts: dict[Any, Any] = {}
    for name, kernel, signature, constants, config in module.variants(D, DTYPES[dtype], machine.lanes):
        row = Row(target, name, D, dtype, described(config, constants))
        if first and firsts.setdefault(kernel, config) != config:
            continue
        key = (name, config.num_warps, config.num_stages, tuple(constants.items()))
        if key in seen:  # the configurations differ in the grid alone
            continue
        seen.add(key)
        try:
            options = {"num_stages": config.num_stages} | launch_options(config, machine.lanes)
            binary = compiled(kernel, signature, constants, options, machine)
            measure(row, machine, binary, config.num_warps)
        except Exception as error:  # the report is about every kernel, so one that fails becomes a line of it
            row.error = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        rows.append(row)
    return rows


def described(config: Any, constants: dict[str, Any]) -> str:
    size = {name.lower(): value for name, value in constants.items() if name != "D" and value is not None}
    stages = {"stages": config.num_stages} if config.num_stages != 1 else {}
    return " ".join(f"{name}={value}" for name, value in ({"warps": config.num_warps} | stages | size).items())


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int], machine: Machine) -> Any:
    """The kernel with every pointer on a 16-byte boundary, as it is at run time."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget(machine.backend, machine.arch, machine.lanes), options=options)


def measure(row: Row, machine: Machine, binary: Any, num_warps: int) -> None:
    (nvidia if machine.backend == "cuda" else amd)(row, binary)
    row.shared = binary.metadata.shared
    if row.shared > machine.largest_shared:
        row.error = f"{row.shared} bytes of shared memory"
    row.resident_warps = machine.resident_warps(row.registers, num_warps, row.shared)
    row.wide = wide_share(row.loads, rows_to_load(binary.asm["ttgir"], num_warps * machine.lanes))


def nvidia(row: Row, binary: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = output_of(TOOLS / "cuobjdump", "-res-usage", cubin.name)
        code = output_of(TOOLS / "nvdisasm", "-c", cubin.name)
    row.registers = int(found(r"REG:(\d+)", usage))
    # Local memory holds nothing but spills: Triton has no arrays.
    row.spilled = sum(bits_of(text) // 8 for text in re.findall(r"\b(?:STL|LDL)((?:\.\w+)*)", code))
    row.loads = dict(Counter(bits_of(text) for text in re.findall(r"\b(?:LDG|LDGSTS)((?:\.\w+)+)", code)))


def bits_of(modifiers: str) -> int:
    """The width of a memory instruction: ``.E.128.CONSTANT`` is 128, and no width at all is 32."""
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
    return int(width[1]) if width else 32


AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8, "sbyte": 8}


def amd(row: Row, binary: Any) -> None:
    code = binary.asm["amdgcn"]
    row.registers = int(found(r"\.vgpr_count:\s*(\d+)", code))
    scratch = int(found(r"\.private_segment_fixed_size:\s*(\d+)", code))
    spills = int(found(r"\.vgpr_spill_count:\s*(\d+)", code)) + int(found(r"\.sgpr_spill_count:\s*(\d+)", code))
    row.spilled = max(scratch, 4 * spills)
    loads = re.findall(r"\b(?:global|buffer|flat)_load_(?:lds_)?(dwordx[234]|dword|[us]?short|[us]byte)", code)
    row.loads = dict(Counter(AMD_BITS[kind] for kind in loads))


LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local|amdg\w*\.buffer_load\w*) .*?: .*?tensor<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+)"
)


ROW = 64  # features: tensors of scores and addresses are smaller in every dimension


def rows_to_load(code: str, threads: int) -> int:
    """How many 128-bit loads a thread needs for all tensors that hold parts of rows."""
    total = 0
    for shape, bits in LOAD.findall(code):
        extents = [int(extent) for extent in shape.split("x")[:-1]]
        if max(extents) >= ROW:
            total += max(1, math.prod(extents) * int(bits) // (128 * threads))
    return total


def wide_share(loads: dict[int, int], needed: int) -> float:
    """Of the bytes of rows, the share that comes by 128 bits. Narrower loads count as rows as far as wide ones are missing."""
    wide = sum(bits // 8 * count for bits, count in loads.items() if bits >= 128)
    narrow = sum(bits // 8 * count for bits, count in loads.items() if bits < 128)
    missing = min(max(16 * needed - wide, 0), narrow)
    return wide / (wide + missing) if wide + missing else 1.0


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the output of the compiler")
    return match[1]


def output_of(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------- report


def report(arguments: argparse.Namespace) -> bool:
    """Compiles and prints; whether nothing spilled or failed."""
    targets, widths, dtypes = list(MACHINES), list(WIDTHS), list(DTYPES)
    if arguments.quick:
        targets, widths, dtypes = ["sm_90", "gfx942"], [1024, 7168], ["bf16"]
    groups = [
        (module, target, D, dtype, arguments.first)
        for target in targets for module in arguments.modules for D in widths for dtype in dtypes
    ]  # fmt: skip
    begin = time.perf_counter()
    # Every run compiles everything: the cache lives as long as the run.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            rows = [row for group in pool.map(compile_group, groups) for row in group]
    console = Console(width=150)
    for target in targets:
        console.print(table(target, [row for row in rows if row.target == target]))
    failed, spilling = [row for row in rows if row.error], [row for row in rows if row.spilled]
    narrow = [row for row in rows if not row.error and row.wide < 0.9]
    console.print(
        f"triton {triton.__version__}: {len(rows)} compilations in {time.perf_counter() - begin:.0f} s, {len(spilling)} spill, "
        f"{len(narrow)} lack 128-bit loads, {len(failed)} failed"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return not spilling and not failed


def table(target: str, rows: list[Row]) -> Table:
    made = Table(title=f"{target}, triton {triton.__version__}", title_justify="left")
    for header in ("kernel", "D", "dtype", "configuration"):
        made.add_column(header, justify="right" if header == "D" else "left")
    for header in ("registers", "spilled", "shared", "loads by bits", "128-bit", "warps"):
        made.add_column(header, justify="right")
    for row in rows:
        if row.error:
            made.add_row(row.kernel, str(row.D), row.dtype, row.config, row.error, style="red")
            continue
        loads = " ".join(f"{bits}:{count}" for bits, count in sorted(row.loads.items(), reverse=True))
        made.add_row(
            row.kernel, str(row.D), row.dtype, row.config, str(row.registers), str(row.spilled), str(row.shared), loads,
            f"{row.wide:.0%}", f"{row.resident_warps} / {MACHINES[target].warps}", style="red" if row.spilled else None,
        )  # fmt: skip
    return made


def under(version: str, options: list[str]) -> bool:
    """The same report by another version of Triton, in a process of its own."""
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), f"triton=={version}"], check=True)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, __file__, *options], env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="D = 1024 and 7168, bf16, sm_90 and gfx942 only")
    parser.add_argument("--first", action="store_true", help="of every kernel the configuration that is taken untimed")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES, help="some of the modules")
    parser.add_argument("--triton", nargs="*", default=[], metavar="VERSION", help="repeat under these versions")
    parser.add_argument("--json", metavar="FILE", help="write the rows of this version's tables as well")
    arguments = parser.parse_args()
    clean = report(arguments)
    same = ["--quick"] * arguments.quick + ["--first"] * arguments.first + ["--modules", *arguments.modules]
    for version in arguments.triton:
        clean = under(version, same) and clean
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
