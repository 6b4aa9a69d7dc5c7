"""Run a model and find what it reads over depth: weights, mixing matrix, magnitudes and entropies, from its real graph."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_compile.checkpoint.loading import load_plain_or_converted
from attnres_compile.config import AttnResConfig
from attnres_compile.convert import checked_call
from attnres_compile.errors import ConfigError
from attnres_compile.inputs import checkpoint_inputs
from attnres_compile.inspection.report import Inspection
from attnres_compile.inspection.results import PARTIAL, ROOT, ChainInspection, ReadInspection, SublayerInspection
from attnres_compile.inspection.short_names import chain_names, read_names, sublayer_names
from attnres_compile.observe import Modules, Observer, observe
from attnres_compile.plan import SitePlan, plan_site
from attnres_compile.report import ChainReport


def inspect_model(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, per_token: bool = False
) -> Inspection:
    """Run ``model``, converted or not, on example arguments and report what it reads over depth.

    The numbers come from the graph that is captured and run, without gradients. A Transformers model is run on its dummy
    inputs when no arguments are given. A plain model's mixing matrix is the standard residual's.

    Args:
        per_token: keep the weights of every token too.

    Raises:
        ConfigError: if the model lies on the meta device, where there are no values, or if not the model but a part of it
            was converted.
        NoResidualChainError: if the model has no chain that can be rewritten.
        CaptureError, ChainCutError: if the model can't be captured.
    """
    model, args, kwargs = checked_call(model, args, kwargs)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"{type(model).__name__} is on the meta device, where nothing can be measured; load its weights.")
    statistics = _Statistics(per_token)
    observed = observe(model, statistics, args, kwargs)
    reports = observed.report.chains
    config = observed.report.config if observed.rewritten else None
    names = chain_names([[name for made in modules.sublayers for name in made] for modules in observed.modules])
    chains = (
        _chain(i, reports[i], observed.modules[i], names[i] if len(names) > 1 else "", statistics, config)
        for i in range(len(reports))
    )
    ids = {}
    if per_token:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        ids = {name: value.cpu() for name, value in given.items() if name.endswith("input_ids") and isinstance(value, Tensor)}
    return Inspection(type(model).__name__, config, tuple(chains), ids)


def inspect_checkpoint(
    path: Path, text: Path | None = None, tokens: int = 128, seed: int = 0, per_token: bool = False,
    trust_remote_code: bool = False,
) -> Inspection:  # fmt: skip
    """Inspect a Transformers directory, converted or not, on the first tokens of a text or on random inputs.

    Args:
        text: a UTF-8 file, for the directory's own tokenizer; None for random arguments from ``seed``, images and audio too.
        tokens: how many, or as many as the model has positions for.
        per_token: see :func:`inspect_model`.

    Raises:
        CheckpointError: if the directory can't be loaded, if the text gives no tokens, or if the model takes none.
        NoResidualChainError, CaptureError, ChainCutError: as :func:`inspect_model` does.
    """
    model = load_plain_or_converted(path, trust_remote_code)
    return inspect_model(model, kwargs=checkpoint_inputs(path, model, text, tokens, seed), per_token=per_token)


def mixing_row(weights: Tensor, site: SitePlan, block_size: int, num_sublayers: int, scale: float) -> Tensor:
    """One row of the depth mixing matrix, ``[L + 1, ...]``: what a site's weights, ``[n, ...]``, give to every sublayer.

    A block is the sum of its sublayers' outputs (section "Block AttnRes"), so its weight counts for each of them; so with
    the partial sum. ``scale`` is the sum of the site's weights as it computes them.
    """
    row = weights.new_zeros(num_sublayers + 1, *weights.shape[1:])
    row[0] = weights[0]
    for i in range(1, site.num_sources):
        start = (i - 1) * block_size + 1
        row[start : min(start + block_size, site.before + 1)] = weights[i]
    return scale * row


class _Statistics(Observer):
    """Means over tokens, taken while the graph runs: no source is kept."""

    def __init__(self, per_token: bool) -> None:
        self.per_token = per_token
        self.num_tokens: dict[int, int] = {}
        self.outputs: dict[tuple[int, int], float] = {}
        self.reads: dict[int, float] = {}
        self.depth: dict[int, dict[str, Any]] = {}

    def source(self, chain: int, index: int, value: Tensor) -> None:
        if index == 0:
            self.num_tokens[chain] = value[..., 0].numel()
        self.outputs[chain, index] = _rms(value)

    def read(self, chain: int, site: int, value: Tensor) -> None:
        self.reads[site] = _rms(value)

    def weights(self, chain: int, site: int, value: Tensor) -> None:
        value = value.detach().cpu().double()
        entropy = float(torch.special.entr(value).sum(0).mean())  # minus infinity where weights are negative
        self.depth[site] = {
            "weights": value.flatten(1).mean(1),
            "entropy": entropy if self._are_shares(value) else None,
            "token_weights": value.mean(-1) if self.per_token else None,
        }

    @staticmethod
    def _are_shares(value: Tensor) -> bool:
        """Whether weights add up to one, so that they have an entropy; sigmoid and static weights need not."""
        return bool(value.min() >= 0) and bool(((value.sum(0) - 1).abs() < 1e-3).all())


def _rms(value: Tensor) -> float:
    """Root mean square over features, averaged over tokens."""
    return float(value.detach().cpu().double().square().mean(-1).sqrt().mean())


def _chain(
    index: int, report: ChainReport, modules: Modules, name: str, statistics: _Statistics, config: AttnResConfig | None
) -> ChainInspection:
    count = report.num_sublayers
    names = sublayer_names(modules.sublayers)
    sublayers = tuple(SublayerInspection(names[i], modules.sublayers[i], statistics.outputs[index, i + 1]) for i in range(count))
    root = statistics.outputs[index, 0]
    assert report.block_sizes is not None
    size = report.block_sizes[0]
    blocks = names if size == 1 else tuple(f"block {n}" for n in range(1, len(report.block_sizes) + 1))
    titles = read_names(names, [0, *(site.before for site in report.sites)])
    reads = [ReadInspection(titles[0], modules.first_reader, 0, None, root)]
    rows = [mixing_row(torch.ones(1, dtype=torch.float64), plan_site(0, size, count), size, count, 1.0)]
    for site, title in zip(report.sites, titles[1:], strict=True):
        plan = plan_site(site.before, size, count)
        read = ReadInspection(title, site.module, site.before, site.index, statistics.reads[site.index])
        row = (torch.arange(count + 1) <= site.before).double()
        if config is not None:
            sources = (ROOT, *blocks[: plan.complete], *([PARTIAL] if plan.partial else []))
            read = dataclasses.replace(read, sources=sources, **statistics.depth[site.index])
            scale = float(plan.num_sources) if config.scale == "preserve" else 1.0
            row = mixing_row(statistics.depth[site.index]["weights"], plan, size, count, scale)
        reads.append(read)
        rows.append(row)
    return ChainInspection(
        name, report.kind, report.hidden_size, statistics.num_tokens[index], root, sublayers, tuple(reads), torch.stack(rows),
        None if config is None else report.block_sizes,
    )  # fmt: skip
