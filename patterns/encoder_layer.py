"""The fused inference kernel of nn.TransformerEncoderLayer, taken apart into the layer's own operations.

In evaluation without gradients PyTorch runs a whole layer as one operator, which hides the residual stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F

_NAME = "_transformer_encoder_layer_fwd"


def is_fused_encoder_layer(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.split(".")[0] == _NAME and len(node.args) == 20


def self_attention(
    x: Tensor, num_heads: int, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:  # fmt: skip
    """Multi-head self-attention on ``x`` ``[B, T, D]``.

    ``mask`` is true (non-zero) where attention is not allowed: ``[T, T]`` for type 0, ``[B, T]`` (padding keys) for type 1,
    ``[B, H, T, T]`` for type 2.
    """
    batch, tokens, width = x.shape
    projected = F.linear(x, in_weight, in_bias).view(batch, tokens, 3, num_heads, width // num_heads)
    query, key, value = projected.permute(2, 0, 3, 1, 4)
    allowed = None
    if mask is not None:
        allowed = ~mask.to(torch.bool)
        if mask_type == 1:
            allowed = allowed.view(batch, 1, 1, tokens)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return F.linear(mixed.transpose(1, 2).reshape(batch, tokens, width), out_weight, out_bias)


def expand_encoder_layer(graph: Graph, node: Node) -> None:
    """Replace the fused operator by norms, attention, feed-forward network and residual adds, in the layer's order."""
    (source, width, num_heads, in_w, in_b, out_w, out_b, use_gelu, norm_first, eps, norm1_w, norm1_b, norm2_w, norm2_b,
     up_w, up_b, down_w, down_b, mask, mask_type) = node.args  # fmt: skip
    activation = F.gelu if use_gelu else F.relu

    def call(function: Any, arguments: tuple[Any, ...], module: str, kind: type[nn.Module]) -> Node:
        made = graph.call_function(function, arguments)
        made.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
        stack = dict(node.meta.get("nn_module_stack") or {})
        if module and stack:
            path = next(reversed(stack.values()))[0]
            stack[f"{path}.{module}"] = (f"{path}.{module}", kind)
            made.meta["nn_module_stack"] = stack
        made.meta["example_value"] = node.meta["example_value"]
        return made

    def norm(x: Any, weight: Any, bias: Any, module: str) -> Node:
        return call(F.layer_norm, (x, (width,), weight, bias, eps), module, nn.LayerNorm)

    def attend(x: Any) -> Node:
        arguments = (x, num_heads, in_w, in_b, out_w, out_b, mask, mask_type)
        return call(self_attention, arguments, "self_attn", nn.MultiheadAttention)

    def feed_forward(x: Any) -> Node:
        hidden = call(activation, (call(F.linear, (x, up_w, up_b), "linear1", nn.Linear),), "", nn.Module)
        # Only the shape of the example value matters further on, and the hidden width differs from the stream's.
        for inner in (hidden, hidden.args[0]):
            assert isinstance(inner, Node)
            value = node.meta["example_value"]
            inner.meta["example_value"] = value.new_empty((*value.shape[:-1], up_w.meta["example_value"].shape[0]))  # type: ignore[union-attr]
        return call(F.linear, (hidden, down_w, down_b), "linear2", nn.Linear)

    def add(x: Any, y: Node) -> Node:
        return call(torch.add, (x, y), "", nn.Module)

    with graph.inserting_before(node):
        if norm_first:
            middle = add(source, attend(norm(source, norm1_w, norm1_b, "norm1")))
            result = add(middle, feed_forward(norm(middle, norm2_w, norm2_b, "norm2")))
        else:
            middle = norm(add(source, attend(source)), norm1_w, norm1_b, "norm1")
            result = norm(add(middle, feed_forward(middle)), norm2_w, norm2_b, "norm2")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
