"""Reading a ``torch.export.ExportedProgram``, as exported or decomposed, as a graph that the passes understand."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule

from attnres_compile.capture import Captured, copy_graph
from attnres_compile.errors import ConfigError
from attnres_compile.passes.base import is_site
from attnres_compile.passes.normalize import inline_bodies

# Regions under a gradient or autocast mode of their own, and where their body stands among the arguments.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def captured_from(program: ExportedProgram) -> Captured:
    """A copy of the graph of ``program``, for looking only: the modes of its regions are dropped.

    Raises:
        ConfigError: if the program was exported from a rewritten module.
    """
    graph_module: GraphModule = copy_graph(program.graph_module)
    if any(is_site(node) for node in graph_module.graph.nodes):
        raise ConfigError("this program was exported from a rewritten module; export the original model.")
    inline_bodies(graph_module, _REGIONS)
    inputs = [spec for spec in program.graph_signature.input_specs if spec.kind is not InputKind.USER_INPUT]
    return Captured(graph_module, frozenset(spec.arg.name for spec in inputs))
