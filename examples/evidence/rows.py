"""What is compared, one configuration per row, and on which scale: sizes, steps, seeds."""

from __future__ import annotations

import dataclasses
from typing import Any

import attnres_compile as ac


@dataclasses.dataclass(frozen=True)
class Row:
    """One residual connection. ``options`` are those of AttnResConfig, None for the model as it is.

    ``longer`` multiplies the steps: of a baseline, to show what more processor time gives, and of another row, to show what
    remains of a difference when training goes on. That row is compared with the baseline of as many steps.
    """

    name: str
    title: str
    options: dict[str, Any] | None
    longer: int = 1

    @property
    def config(self) -> ac.AttnResConfig | None:
        return None if self.options is None else ac.AttnResConfig(**self.options)


def full(name: str, title: str, **options: Any) -> Row:
    return Row(name, title, {"variant": "full", **options})


def block(name: str, title: str, num_blocks: int, **options: Any) -> Row:
    return Row(name, title, {"variant": "block", "num_blocks": num_blocks, **options})


BASELINE = Row("baseline", "standard residual", None)
BLOCK_4 = block("block-4", "Block, N=4", 4)
BLOCK_8 = block("block-8", "Block, N=8", 8)
FULL = full("full", "Full")
ABLATIONS = (
    full("sigmoid", "Full, sigmoid weights", weights="sigmoid"),
    full("no-key-norm", "Full, keys not normalised", normalize_keys=False),
    full("heads-4", "Full, 4 heads over depth", heads=4),
    full("input-query", "Full, queries from the input", query="input"),
    full("static", "static weights (DenseFormer)", weights="static"),
    full("mhc", "static streams (mHC-like)", weights="mhc"),
    block("block-8-paper", "Block, N=8, scale of the paper", 8, scale="paper"),
)
BASELINE_TWICE = Row("baseline-twice", "standard residual, twice the steps", None, longer=2)
BLOCK_8_TWICE = dataclasses.replace(
    BLOCK_8, name="block-8-twice", title="Block, N=8, and the baseline, twice the steps", longer=2
)
ROWS = (BASELINE, BLOCK_4, BLOCK_8, FULL, *ABLATIONS, BASELINE_TWICE, BLOCK_8_TWICE)
# The plain sum through the same machinery: it must learn what the baseline learns, so it is a check and no row of the table.
STANDARD = full("standard", "standard residual, rewritten", weights="standard")


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder. ``length`` is that of a sequence and ``batch`` the number of sequences in a step.

    Every row is trained for ``steps`` optimizer steps, two controls for longer, with the learning rate ``peak_lr``, which was
    chosen by the baseline alone.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    length: int
    batch: int
    peak_lr: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """An experiment: every row at every size with every seed.

    Attributes:
        evaluations: how often validation loss is measured on the way, and the run saved; on ``windows`` sequences.
        final_windows: sequences of the last evaluation, which is the result.
        continued_steps: of a run that goes on from a trained baseline, with each of ``continued_rows``.
        compiled: whether models are compiled instead of run eagerly, under bfloat16 autocast.
        workers: processes that train at the same time.
    """

    name: str
    sizes: tuple[Size, ...]
    rows: tuple[Row, ...]
    seeds: int
    evaluations: int
    windows: int
    final_windows: int
    continued_steps: int
    continued_rows: tuple[str, ...] = (BASELINE.name, BLOCK_8.name)
    device: str = "cpu"
    compiled: bool = False
    workers: int = 2


TINY = Scale(
    name="tiny", sizes=(Size("tiny", layers=2, hidden=16, heads=4, length=32, batch=2, peak_lr=4e-3, steps=12),),
    rows=(BASELINE, STANDARD, block("block-2", "Block, N=2", 2), FULL, *ABLATIONS[:-1]),
    seeds=2, evaluations=3, windows=4, final_windows=8, continued_steps=6,
    continued_rows=(BASELINE.name, FULL.name),
)  # fmt: skip
CPU = Scale(
    name="cpu",
    sizes=(
        Size("small", layers=8, hidden=48, heads=4, length=64, batch=4, peak_lr=4e-3, steps=400),
        Size("larger", layers=12, hidden=64, heads=4, length=64, batch=4, peak_lr=2e-3, steps=240),
    ),
    rows=ROWS, seeds=3, evaluations=8, windows=32, final_windows=256, continued_steps=120,
)  # fmt: skip
GPU = Scale(
    name="gpu", sizes=(Size("100M", layers=14, hidden=768, heads=12, length=512, batch=32, peak_lr=1e-3, steps=1000),),
    rows=(BASELINE, BLOCK_8, FULL), seeds=1, evaluations=8, windows=256, final_windows=1024,
    continued_steps=500, device="cuda", compiled=True, workers=1,
)  # fmt: skip
SCALES = {scale.name: scale for scale in (TINY, CPU, GPU)}
