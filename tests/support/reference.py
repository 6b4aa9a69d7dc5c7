"""The oracle of the tests: Attention Residuals written by hand on real models.

Nothing here imports the package under test. ``attend`` and ``ReferenceStream`` are the definition, term by term;
``llama_logits`` and ``gpt2_logits`` run a model's own submodules around such a stream, so autograd gives the gradient
of every parameter, query and key norm. Inside ``promote_to_float64`` all of it is true float64 arithmetic.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dis import get_instructions
from types import CodeType, FunctionType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------- the definition


def attend(sources: Sequence[Tensor], query: Tensor, key_norm: Tensor | None, eps: float, scale: str) -> Tensor:
    """One read of the stream: the softmax-weighted sum of the sources, computed in the dtype of the sources.

    Args:
        sources: n tensors ``[..., D]`` of one shape.
        query: ``[D]``, the pseudo-query of the site.
        key_norm: ``[D]``, the weight of the keys' RMSNorm, or None for a weight of one.
        eps: added to the mean square of a key.
        scale: "paper" for weights that add up to one, "preserve" for weights that add up to n.

    Returns:
        ``[..., D]``.
    """
    if scale not in ("preserve", "paper"):
        raise ValueError(f"scale is 'preserve' or 'paper', not {scale!r}.")
    values = torch.stack(list(sources))  # [n, ..., D]
    keys = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    if key_norm is not None:
        keys = keys * key_norm
    alpha = (keys * query).sum(-1, keepdim=True).softmax(0)  # [n, ..., 1]
    read = (alpha * values).sum(0)
    return read * len(values) if scale == "preserve" else read


class ReferenceStream:
    """The sources of a Block AttnRes stream, kept by the definition. Full AttnRes is ``block_size=1``.

    Args:
        root: ``[..., D]``, what the first sublayer reads: the embedding.
        block_size: consecutive sublayers per block.
        scale, eps: see ``attend``.
        queries: ``[D]`` each, one per read with at least two sources, in stream order.
        key_norms: ``[D]`` each, as many as queries; or None for a weight of one everywhere.
    """

    def __init__(
        self,
        root: Tensor,
        block_size: int,
        scale: str,
        eps: float,
        queries: Sequence[Tensor],
        key_norms: Sequence[Tensor] | None,
    ) -> None:
        self.root, self.block_size, self.scale, self.eps = root, block_size, scale, eps
        norms = [None] * len(queries) if key_norms is None else key_norms
        self.unused = list(zip(queries, norms, strict=True))
        self.outputs: list[Tensor] = []

    def sources(self) -> list[Tensor]:
        """The root, the sum of every completed block, and the running sum of the current block if it has begun."""
        starts = range(0, len(self.outputs), self.block_size)
        return [self.root, *(torch.stack(self.outputs[i : i + self.block_size]).sum(0) for i in starts)]

    def add(self, branch_output: Tensor) -> None:
        """Append the output ``[..., D]`` of the next sublayer."""
        self.outputs.append(branch_output)

    def read(self) -> Tensor:
        """What the next reader's norm sees, ``[..., D]``. Only a read with two sources or more takes a query."""
        if not self.outputs:
            return self.root
        if not self.unused:
            raise ValueError(f"No query is left for the read after {len(self.outputs)} sublayers.")
        query, key_norm = self.unused.pop(0)
        return attend(self.sources(), query, key_norm, self.eps, self.scale)


def _final_read(stream: ReferenceStream, sublayers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Run the sublayers (norm and branch) on the stream; return the final norm's read, once all queries are used."""
    for sublayer in sublayers:
        stream.add(sublayer(stream.read()))
    read = stream.read()
    if stream.unused:
        raise ValueError(f"{len(stream.unused)} more queries than the {len(sublayers)} sites of this model.")
    return read


def _causal_mask(x: Tensor) -> Tensor:
    """Additive mask ``[1, 1, T, T]`` for ``x: [B, T, D]``.

    Attention modules of Transformers leave causality to their caller. An explicit mask is what eager attention adds
    to its scores and what SDPA takes as ``attn_mask``, so one mask serves both implementations.
    """
    length = x.shape[1]
    return torch.full((1, 1, length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)


def llama_logits(
    model: transformers.LlamaForCausalLM,
    input_ids: Tensor,
    queries: Sequence[Tensor],
    key_norms: Sequence[Tensor] | None,
    block_size: int,
    scale: str,
    eps: float | None = None,
    make_stream: Callable[[Tensor], ReferenceStream] | None = None,
) -> Tensor:
    """Logits ``[B, T, V]`` of a Llama, or of a model with its submodules (Qwen3, Mistral, Gemma), with AttnRes.

    Args:
        input_ids: ``[B, T]``, without padding.
        queries, key_norms: one ``[D]`` per site: as many as sublayers, the last one is the final norm's.
        eps: that of the keys' norm; by default the model's own.
        make_stream: from the root to another stream than these arguments describe.
    """
    body: Any = model.model
    root = body.embed_tokens(input_ids)
    positions = body.rotary_emb(root, position_ids=torch.arange(input_ids.shape[1], device=root.device)[None])
    mask = _causal_mask(root)

    def attention(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: layer.self_attn(
            hidden_states=layer.input_layernorm(x), attention_mask=mask, position_embeddings=positions
        )[0]

    def mlp(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: layer.mlp(layer.post_attention_layernorm(x))

    eps = model.config.rms_norm_eps if eps is None else eps
    stream = ReferenceStream(root, block_size, scale, eps, queries, key_norms) if make_stream is None else make_stream(root)
    read = _final_read(stream, [make(layer) for layer in body.layers for make in (attention, mlp)])
    return model.lm_head(body.norm(read))


def gpt2_logits(
    model: transformers.GPT2LMHeadModel,
    input_ids: Tensor,
    queries: Sequence[Tensor],
    key_norms: Sequence[Tensor] | None,
    block_size: int,
    scale: str,
    eps: float | None = None,
) -> Tensor:
    """Logits ``[B, T, V]`` of a GPT-2 with AttnRes; the arguments are those of ``llama_logits``."""
    body: Any = model.transformer
    root = body.drop(body.wte(input_ids) + body.wpe(torch.arange(input_ids.shape[1], device=input_ids.device)))
    mask = _causal_mask(root)

    def attention(block: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: block.attn(block.ln_1(x), attention_mask=mask)[0]

    def mlp(block: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: block.mlp(block.ln_2(x))

    eps = model.config.layer_norm_epsilon if eps is None else eps
    stream = ReferenceStream(root, block_size, scale, eps, queries, key_norms)
    read = _final_read(stream, [make(block) for block in body.h for make in (attention, mlp)])
    return model.lm_head(body.ln_f(read))


# ------------------------------------------------------------------------------------------------------ true float64

_WIDER = {"float32": "float64", "float": "double"}


def _widened(code: CodeType) -> CodeType:
    """The same code with the attributes ``float32`` and ``float`` read as ``float64`` and ``double``."""
    if any(op.opname == "LOAD_GLOBAL" and op.argval in _WIDER for op in get_instructions(code)):
        raise NotImplementedError(f"{code.co_qualname} names the builtin float, which cannot be told from Tensor.float.")
    constants = tuple(_widened(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_names=tuple(_WIDER.get(name, name) for name in code.co_names), co_consts=constants)


def _mentions_float32(code: CodeType) -> bool:
    nested = (c for c in code.co_consts if isinstance(c, CodeType))
    return not _WIDER.keys().isdisjoint(code.co_names) or any(map(_mentions_float32, nested))


def _forward_functions(cls: type[nn.Module]) -> set[FunctionType]:
    """``cls.forward`` and what it names, transitively: methods and functions of the file that defines the class."""
    found: set[FunctionType] = set()
    pending: list[Any] = [vars(cls).get("forward")]
    while pending:
        function = inspect.unwrap(pending.pop())  # below decorators such as no_grad and dynamic_rope_update
        if isinstance(function, FunctionType) and function.__module__ == cls.__module__ and function not in found:
            found.add(function)
            for name in function.__code__.co_names:
                pending += [vars(cls).get(name), function.__globals__.get(name)]
    return found


@contextmanager
def promote_to_float64(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes in float64, eagerly and under ``torch.compile``.

    ``model.double()`` converts parameters and buffers (``inv_freq`` too), but norms, rotary embeddings, eager attention
    and routers cast to float32 inside forward. Those casts are names in the bytecode: ``x.to(torch.float32)``,
    ``softmax(..., dtype=torch.float32)``, ``x.float()``. So every function that the forward methods of the model's
    classes reach in their own file gets a code object in which these names are the float64 ones. Function objects,
    closures and decorators stay as they are, and Dynamo, which traces bytecode, sees float64 as well. Source lines stay,
    too: stack traces still quote the float32 line.

    The change holds for all models of these classes, so contexts for several models must be nested properly. On exit
    the code comes back, and parameters, buffers and gradients return to the model's dtype: compare them before.
    """
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1:
        raise ValueError(f"A model of one dtype is needed to restore it afterwards; this one has {dtypes}.")
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    # torch's own modules compute in the dtype they are given
    functions = {f for cls in classes if not cls.__module__.startswith("torch.") for f in _forward_functions(cls)}
    original = {f: f.__code__ for f in functions if _mentions_float32(f.__code__)}
    widened = {f: _widened(code) for f, code in original.items()}
    try:
        for function, code in widened.items():
            function.__code__ = code
        yield model.double()
    finally:
        for function, code in original.items():
            function.__code__ = code
        model.to(dtypes.pop())
