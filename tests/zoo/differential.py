"""One model on all paths that lead to a rewritten graph: site by site, in two phases, under torch.compile, on Triton kernels.

Each is held against the ahead-of-time graph, site by site, with random queries and in float64; the kernels, which know no
float64, against the plain operations in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from promotion import promote_casts, relative_error
from torch import nn
from torch.fx import GraphModule

import attnres_compile as ac
from attnres_compile import convert
from attnres_compile.backend import compile_rewritten
from attnres_compile.passes.base import Pass
from attnres_compile.passes.lower import Lower
from attnres_compile.passes.pipeline import LOWERING, PHASING, REWRITING
from attnres_compile.rewritten import RewrittenModule


def error_of_phases(
    rewritten: RewrittenModule, model: nn.Module, config: ac.AttnResConfig, args: Sequence[Any], kwargs: dict[str, Any]
) -> float:
    """Relative L2 error of the graph that a compiler gets, sites in two phases, against ``rewritten`` with its queries."""
    in_phases = _rewrite(PHASING + LOWERING, model, config, args, kwargs, rewritten)
    promote_casts(in_phases)
    return relative_error(_run(in_phases, args, kwargs), _run(rewritten, args, kwargs))


def error_of_compiled(
    rewritten: RewrittenModule, model: nn.Module, config: ac.AttnResConfig, args: Sequence[Any], kwargs: dict[str, Any]
) -> float:
    """The same of ``model`` under torch.compile with our backend, and nothing behind it. ``model`` stays converted."""
    ac.convert_(model, config, args=tuple(args), kwargs=kwargs)
    model.attnres.load_state_dict(rewritten.attnres.state_dict())

    def eager(graph_module: GraphModule, inputs: list[Any], mode: str | None) -> Callable[..., Any]:
        promote_casts(graph_module)
        return graph_module.forward

    def backend(graph_module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_rewritten(graph_module, inputs, eager)

    # In full, as models are captured ahead of time: numbers out of tensors are then a part of the graph.
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    return relative_error(_run(compiled, args, kwargs), _run(rewritten, args, kwargs))


def error_of_kernels(
    rewritten: RewrittenModule, model: nn.Module, config: ac.AttnResConfig, args: Sequence[Any], kwargs: dict[str, Any]
) -> float:
    """Relative L2 error of the fused kernels, in Triton's interpreter where there is no GPU, against plain torch: ``model`` and
    its arguments are float32, the queries those of ``rewritten``.
    """
    plain, fused = (
        _rewrite((*PHASING, Lower(kernels)), model, config, args, kwargs, rewritten) for kernels in ("naive", "fused")
    )
    return relative_error(_run(fused, args, kwargs), _run(plain, args, kwargs))


def _rewrite(
    lowering: tuple[Pass, ...], model: nn.Module, config: ac.AttnResConfig, args: Sequence[Any], kwargs: dict[str, Any],
    like: RewrittenModule,
) -> RewrittenModule:  # fmt: skip
    with mock.patch.object(convert, "REWRITING", REWRITING + lowering):
        made = ac.rewrite(model, config, tuple(args), kwargs)
    made.attnres.load_state_dict(like.attnres.state_dict())
    return made


def _run(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    torch.manual_seed(0)  # masked autoencoders draw their masks
    with torch.no_grad():
        return model(*args, **kwargs)
