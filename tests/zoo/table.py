"""The table of the zoo, and what counts as a fault in it."""

import statistics
from collections import Counter
from itertools import groupby

import torch
import transformers
from census import MISSED
from measure import Row

# DESIGN: relative to the logits, with float32 casts promoted. Weights that add up to the number of sources give rounding alone.
TOLERANCE = 1e-13
# The kernels compute in float32, like what they are held against, in another order; queries of size one make softmaxes sharp.
FUSED_TOLERANCE = 1e-4


def faults_of(row: Row) -> list[str]:
    """What must not be: an inexact rewrite, a query without gradient, a norm on the stream that is no site."""
    faults = [f"{name}: relative error {error:.1e}" for name, error in row.errors.items() if not error <= TOLERANCE]
    if not row.phased <= TOLERANCE:
        faults.append(f"two phases change the outputs by {row.phased:.1e}")
    if not row.compiled <= TOLERANCE:
        faults.append(f"torch.compile changes the outputs by {row.compiled:.1e}")
    if not row.fused <= FUSED_TOLERANCE:
        faults.append(f"the fused kernels change the outputs by {row.fused:.1e} in float32")
    if row.idle:
        faults.append(f"{row.idle} queries without gradient")
    if MISSED in row.norms:
        faults.append(f"norms on the stream that are no sites: {row.norms[MISSED]}")
    return faults


def render(rows: list[Row]) -> str:
    """Markdown: a summary, then one table per group."""
    lines = [
        "# The zoo",
        "",
        "Every model is built with random weights, captured by Dynamo, rewritten into Full and into Block AttnRes (2 blocks),",
        "and run in float64 at zero queries against itself (*error*: the larger of the two relative L2 errors of all outputs,",
        "float32 casts promoted). With random queries every query must get a gradient, unless the model itself lets none reach",
        "the reader, and the same outputs must come ahead of time, under torch.compile, in two phases, and from the Triton",
        "kernels (in float32, in their interpreter). *Norms* accounts for each norm as wide as the stream: how many are sites,",
        "and where the others stand.",
        "`make zoo` writes this file.",
        "",
        *_summary(rows),
    ]
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += [
            "",
            f"## {group}",
            "",
            "| class | chains: kind, sublayers, sites | error | norms | why not |",
            "|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in members]
    return "\n".join(lines) + "\n"


def _summary(rows: list[Row]) -> list[str]:
    captured = [row for row in rows if not row.problem]
    rewritten = [row for row in captured if row.chains]
    kinds = Counter(row.chains[0][0] for row in rewritten)
    refused = Counter(row.refusal.partition(":")[0] for row in captured if not row.chains)
    errors = [max(row.errors.values()) for row in rewritten if row.errors]
    seconds = [row.seconds for row in rewritten]
    other_paths = [max(row.phased, row.compiled) for row in rewritten]
    lines = [
        f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, CPU.",
        "",
        f"- {len(rows)} models, {len(captured)} captured in one graph, {len(rewritten)} rewritten "
        f"({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}), {len(captured) - len(rewritten)} refused.",
    ]
    if rewritten:
        lines += [
            f"- Largest error {max(errors):.0e}; {sum(row.idle for row in rewritten)} queries without gradient; "
            f"{sum(sum(row.norms.get(MISSED, {}).values()) for row in rewritten)} norms on a stream missed.",
            f"- With random queries, two phases and torch.compile against ahead of time: at most {max(other_paths):.0e}",
            f"  in float64; the kernels against plain operations: at most {max(row.fused for row in rewritten):.0e} in float32.",
            f"- All passes: median {statistics.median(seconds):.3f} s per rewritten model, at most {max(seconds):.2f} s.",
        ]
    return lines + [f"- Refused, {reason}: {count}." for reason, count in refused.most_common(12)]


def _line(row: Row) -> str:
    chains = "; ".join(f"{kind} {sublayers}, {sites}" for kind, sublayers, sites in row.chains)
    error = f"{max(row.errors.values()):.0e}" if row.errors else ""
    norms = "; ".join(
        f"{place} {_named(names) if place != 'site' else sum(names.values())}" for place, names in row.norms.items()
    )
    cells = (f"`{row.name}`", chains, error, norms, row.problem or row.refusal)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _named(names: dict[str, int]) -> str:
    return ", ".join(f"{count} `{name}`" for name, count in names.items())
