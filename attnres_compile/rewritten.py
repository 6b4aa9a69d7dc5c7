"""A rewritten graph as a module that is called like the model it came from."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from attnres_compile.capture import tree_flatten, tree_unflatten
from attnres_compile.errors import CaptureError, ModelTypeError
from attnres_compile.parameters import ATTRIBUTE, AttnResParameters
from attnres_compile.patterns.placements import is_device_mesh
from attnres_compile.report import Report

_INPUT, _OUTPUT, _CONSTANT = "input", "output", "constant"


@dataclasses.dataclass(frozen=True)
class CallSignature:
    """How a model's arguments become a graph's inputs, and its outputs the model's result.

    ``leaves`` describes every leaf of the example arguments: (shape, dtype, device type) of a tensor, or the value
    itself. ``inputs`` are the leaves that the graph takes, in order. ``result`` says of every leaf of the model's result
    which output or input it is, or holds it as a constant or as an object around outputs. ``training`` is the mode of the
    capture, or None where the mode makes no difference.
    """

    signature: inspect.Signature
    structure: Any
    leaves: tuple[Any, ...]
    inputs: tuple[int, ...]
    result_structure: Any
    result: tuple[tuple[str, Any], ...]
    outputs: tuple[Tensor, ...]
    training: bool | None

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The graph's inputs.

        Raises:
            CaptureError: if the arguments are not those that the graph was captured for.
        """
        leaves, structure = tree_flatten(_bound(self.signature, args, kwargs))
        if structure != self.structure:
            raise CaptureError(
                "this graph was rewritten for other arguments: "
                f"{_names(self.structure, self.signature)}; call rewrite again for these, or use "
                'torch.compile(model, backend="attnres").'
            )
        for expected, leaf in zip(self.leaves, leaves, strict=True):
            found = _describe(leaf)
            if not _same(found, expected):
                raise CaptureError(
                    f"this graph was rewritten for an argument {_show(expected)} and is called with one {_show(found)}; call "
                    'rewrite again for it, or use torch.compile(model, backend="attnres"), which follows shapes.'
                )
        return [leaves[i] for i in self.inputs]

    def check_mode(self, training: bool) -> None:
        """Raises:
            CaptureError: if the graph was captured in the other mode, and the mode makes a difference.
        """
        if self.training is not None and training != self.training:
            raise CaptureError(
                f"this graph was rewritten in {_mode(self.training)} mode, is called in {_mode(training)} mode, and the "
                "model behaves differently there; rewrite the model in that mode too, or use "
                'torch.compile(model, backend="attnres").'
            )

    def rebuild(self, outputs: tuple[Any, ...], inputs: list[Any]) -> Any:
        """The model's result around the graph's outputs."""
        leaves = []
        for kind, value in self.result:
            if kind == _OUTPUT:
                leaves.append(outputs[value])
            elif kind == _INPUT:
                leaves.append(inputs[value])
            elif isinstance(value, (Tensor, int, float, bool, str, type(None), torch.dtype)):
                leaves.append(value)
            else:  # an object, such as a key-value cache, that holds outputs: a copy around the new ones
                leaves.append(copy.deepcopy(value, dict(zip(map(id, self.outputs), outputs, strict=True))))
        return tree_unflatten(leaves, self.result_structure)


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, so that ``model(x)`` and ``model(x=x)`` are the same call."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _describe(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device.type) if isinstance(leaf, Tensor) else leaf


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _show(leaf: Any) -> str:
    if isinstance(leaf, tuple) and len(leaf) == 3 and isinstance(leaf[1], torch.dtype):
        return f"of shape {list(leaf[0])} and {leaf[1]} on {leaf[2]}"
    return f"that is {leaf!r}"


def _names(structure: Any, signature: inspect.Signature) -> str:
    return f"{structure.num_leaves} values under ({', '.join(signature.parameters)})"


def signature_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, inputs: list[Any], outputs: tuple[Any, ...]
) -> CallSignature:
    """The signature of a captured call, whose graph took ``inputs`` (of the user's) and gave ``outputs``."""
    signature = inspect.signature(model.forward)
    leaves, structure = tree_flatten(_bound(signature, args, kwargs))
    positions = tuple(_position(value, leaves) for value in inputs)
    result_leaves, result_structure = tree_flatten(result)
    parts: list[tuple[str, Any]] = []
    for leaf in result_leaves:
        if isinstance(leaf, Tensor) and (found := _position(leaf, outputs)) >= 0:
            parts.append((_OUTPUT, found))
        elif isinstance(leaf, Tensor) and (found := _position(leaf, inputs)) >= 0:
            parts.append((_INPUT, found))
        else:
            parts.append((_CONSTANT, leaf))
    return CallSignature(
        signature, structure, tuple(map(_describe, leaves)), positions, result_structure, tuple(parts), outputs, model.training
    )


def _position(value: Any, among: Any) -> int:
    return next((i for i, other in enumerate(among) if other is value), -1)


class CalledLikeModel(CodeGen):
    """Code generation for a forward that takes the model's arguments."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        names = [name.split(":")[0].split("#")[0].strip() for name in free_vars]
        unpack = f"{', '.join(names)}, = _inputs" if names else "pass"
        return f"def {self._func_name}(self, *args, **kwargs):\n    _inputs = self.inputs_of(args, kwargs)\n    {unpack}"

    def generate_output(self, output_args: Any, **_: Any) -> str:
        return f"return self.call_signature.rebuild({output_args!r}, _inputs)"


class RewrittenModule(GraphModule):
    """The rewritten graph of a model: its parameters under the model's names, AttnRes parameters under ``attnres.*``.

    It is called like the model, with arguments of the captured shapes and in the captured mode, and runs eagerly.
    ``report`` tells what was rewritten.
    """

    call_signature: CallSignature
    report: Report
    is_same_graph: Callable[[bool], bool]

    @classmethod
    def build(
        cls, tree: nn.Module, graph: Graph, name: str, signature: CallSignature, report: Report,
        is_same_graph: Callable[[bool], bool],
    ) -> RewrittenModule:  # fmt: skip
        """``tree`` holds all that ``graph`` reads, and the parameters that it does not read.

        ``is_same_graph(training)`` tells whether the model has this very graph in the given mode too; it is asked once,
        when the module is first called in the mode that it was not captured in.
        """
        graph.set_codegen(CalledLikeModel())
        module = cls(tree, graph, class_name=f"Rewritten{name}")
        module._adopt(tree)
        module.call_signature, module.report, module.training = signature, report, tree.training
        module.is_same_graph = is_same_graph
        return module

    def inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The graph's inputs for a call.

        Raises:
            CaptureError: if the arguments or the mode are not those that the graph was captured for.
        """
        expected = self.call_signature.training
        if expected is not None and self.training != expected and self.is_same_graph(self.training):
            self.call_signature = dataclasses.replace(self.call_signature, training=None)
        self.call_signature.check_mode(self.training)
        return self.call_signature.flatten(args, kwargs)

    def _adopt(self, tree: nn.Module) -> None:
        """Take over all parameters and buffers, those too that the graph does not use: the state dict has the model's names."""
        self._parameters, self._buffers, self._modules = tree._parameters, tree._buffers, tree._modules
        self._non_persistent_buffers_set = tree._non_persistent_buffers_set

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        tree = nn.Module()
        tree._parameters = copy.deepcopy(self._parameters, memo)
        tree._buffers = copy.deepcopy(self._buffers, memo)
        tree._modules = copy.deepcopy(self._modules, memo)
        tree._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        for node in self.graph.find_nodes(op="get_attr"):
            if is_device_mesh(value := self.__dict__.get(str(node.target))):
                setattr(tree, str(node.target), value)
        graph = Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        graph.set_codegen(CalledLikeModel())
        copied = RewrittenModule(tree, graph, class_name=type(self).__name__)
        copied._adopt(tree)
        copied.call_signature, copied.report, copied.training = self.call_signature, self.report, self.training
        copied.is_same_graph = self.is_same_graph
        return copied

    def __reduce__(self) -> Any:
        raise ModelTypeError("a rewritten graph can't be pickled; save its state_dict(), and rewrite the model again to load it.")


def parameter_tree(model: nn.Module, parameters: AttnResParameters | None) -> nn.Module:
    """A tree of plain modules with the parameters and buffers of ``model``: the same tensors, no code, no hooks.

    A norm stays an ``nn.LayerNorm`` by class, since weight-decay rules go by that.
    """
    tree = nn.LayerNorm((), elementwise_affine=False) if isinstance(model, nn.LayerNorm) else nn.Module()
    for name, child in model._modules.items():
        if name != ATTRIBUTE or not isinstance(child, AttnResParameters):
            tree._modules[name] = None if child is None else parameter_tree(child, None)
    tree._parameters = dict(model._parameters)
    tree._buffers = dict(model._buffers)
    tree._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
    tree.training = model.training
    if parameters is not None:
        tree._modules[ATTRIBUTE] = parameters
    return tree


def hold_constants(tree: nn.Module, graph_module: GraphModule) -> None:
    """Give ``tree`` what the graph reads as attributes of its own module: constants, and bodies of control flow."""
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = getattr(graph_module, name)
        if isinstance(value, nn.Module):
            tree._modules[name] = value
        else:
            tree.register_buffer(name, value, persistent=False)


def bind_parameters(graph: Graph, names: dict[Node, str]) -> None:
    """Turn placeholders into reads of the attributes that hold them."""
    for node, name in names.items():
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        graph.erase_node(node)


def qualified_names(model: nn.Module) -> Callable[[Any], str | None]:
    """A look-up from a parameter or buffer to its qualified name (the first one, where it is tied)."""
    names: dict[int, str] = {}
    for source in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in source:
            names.setdefault(id(tensor), name)
    return lambda value: names.get(id(value))
