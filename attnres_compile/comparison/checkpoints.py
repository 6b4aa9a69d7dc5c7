"""Two checkpoints against each other: an original, and what it was converted to or trained into."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from attnres_compile.checkpoint.loading import load_plain_or_converted
from attnres_compile.checkpoint.structure import transformers_config
from attnres_compile.comparison.graphs import captured_differences, compare_graphs
from attnres_compile.comparison.numbers import SiteComparison, compare_outputs, compare_reads, rounding_of
from attnres_compile.comparison.report import CheckpointComparison, Inputs
from attnres_compile.comparison.runs import ComparedModel, Run, describe, run
from attnres_compile.errors import CheckpointError
from attnres_compile.inputs import checkpoint_inputs
from attnres_compile.layout import difference


def compare_checkpoints(
    source: Path, destination: Path, *, text: Path | None = None, tokens: int = 128, seed: int = 0,
    trust_remote_code: bool = False,
) -> CheckpointComparison:  # fmt: skip
    """Run two checkpoints, one after the other, on the same inputs, and compare outputs, residual streams and graphs.

    Either is a Transformers directory, plain or converted. With ``scale="paper"`` a site gives the stream divided by its number
    of sources n; such a mixture is compared times n.

    Args:
        source: the original.
        destination: what it was converted to or trained into.
        text: a UTF-8 file to run them on, through the tokenizer of ``source``; random inputs if None.
        tokens: the length of the inputs, in tokens, or as many as the model has positions for; the first so many of a text.
        seed: of random inputs.
        trust_remote_code: whether to run Python code that the directories ship.

    Raises:
        CheckpointError: if a directory can't be loaded, or if the two are not the same architecture with the same vocabulary
            and the same sites.
        NoResidualChainError, CaptureError, ChainCutError: if a model has no residual stream, or can't be captured.
    """
    _check_configs(source, destination, trust_remote_code)
    given = Inputs(str(text) if text else None, tokens, None if text else seed)
    reads: dict[int, Tensor] = {}
    errors: dict[int, tuple[float, float, float]] = {}

    def look(
        folder: Path, receive: Callable[[int, Tensor], None], check: Callable[[ComparedModel], None]
    ) -> tuple[ComparedModel, Run]:
        model = load_plain_or_converted(folder, trust_remote_code)
        inputs = checkpoint_inputs(source, model, text, tokens, seed)
        described = describe(folder, model, inputs)
        check(described)
        return described, run(described, model, inputs, receive)

    def keep(site: int, value: Tensor) -> None:
        reads[site] = value.clone()

    def measure(site: int, value: Tensor) -> None:
        errors[site] = compare_reads(reads.pop(site), value)

    first, original = look(source, keep, lambda model: None)
    gc.collect()  # models are held in cycles, and the next one wants the memory
    second, other = look(destination, measure, lambda model: _check_sites(first, model))
    if original.output.shape != other.output.shape:
        raise CheckpointError(
            f"{destination}: gives {second.output_name} of shape {list(other.output.shape)}, where {source} gives "
            f"{list(original.output.shape)}; compare checkpoints of one model"
        )
    return CheckpointComparison(
        source=first.checkpoint,
        destination=second.checkpoint,
        inputs=given,
        output=compare_outputs(first.output_name, original.output, other.output, first.is_distribution),
        sites=tuple(
            SiteComparison(read.site, i, read.modules, read.before, *errors[read.site], other.weights.get(read.site))
            for i, stream in enumerate(first.streams)
            for read in stream.reads
            if read.site is not None
        ),
        rounding=max(map(rounding_of, original.dtypes | other.dtypes)),
        streams=first.streams,
        graph=compare_graphs(
            original.graph, other.graph, first.stream_nodes | second.stream_nodes,
            second.replaced if second.checkpoint.config else (), _differences(first, second),
        ),
    )  # fmt: skip


def _check_configs(source: Path, destination: Path, trust_remote_code: bool) -> None:
    """Say early, from the config.json files alone, that two checkpoints are not of one model."""
    mine, its = (transformers_config(folder, trust_remote_code) for folder in (source, destination))
    for what, before, after in (
        ("model type", mine.model_type, its.model_type),
        ("architecture", *((config.architectures or [None])[0] for config in (mine, its))),
        ("vocabulary size", *(getattr(config.get_text_config(), "vocab_size", None) for config in (mine, its))),
    ):
        if before != after:
            raise CheckpointError(
                f"{destination}: its {what} is {after}, that of {source} is {before}; compare checkpoints of one model"
            )


def _check_sites(original: ComparedModel, other: ComparedModel) -> None:
    """The sites must be the same reads of the same streams; their sources may differ."""
    before, after = ([dataclasses.replace(site, num_sources=0) for site in model.layout] for model in (original, other))
    if before != after:
        raise CheckpointError(
            f"{other.checkpoint.path}: its residual streams are not read where those of {original.checkpoint.path} are. "
            f"{difference(original.layout, other.layout)} Compare checkpoints of one model"
        )


def _differences(original: ComparedModel, other: ComparedModel) -> tuple[str, ...]:
    """What differs between two models before rewriting, and between the options of rewriting if both are converted."""
    mine, its = original.checkpoint, other.checkpoint
    found = []
    if mine.dtype != its.dtype:
        found.append(f"the weights are {mine.dtype} in the original, {its.dtype} in the other")
    if mine.config and its.config and mine.config != its.config:
        found.append(f"the AttnRes options are {mine.config} in the original, {its.config} in the other")
    return (*found, *captured_differences(original.operations, other.operations))
