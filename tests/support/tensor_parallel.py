"""A small tensor-parallel transformer, and what a rank finds when it holds it against the same in one process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)  # fmt: skip
from torch.fx import GraphModule
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten

VOCABULARY, WIDTH, ROWS, LAYERS = 29, 16, 2, 2
CONFIG = ac.AttnResConfig(num_blocks=2)
# A sequence that two ranks can't halve. Before torch 2.13 no layer can compute on one that it gathered, rewritten or not.
ODD_LENGTH = 7 if TorchVersion(torch.__version__) >= (2, 13) else 8
# Before torch 2.12 clip_grad_norm_ leaves gradients that are not summed over ranks yet as they are: those of all norms.
_CLIPS_PARTIAL_SUMS = TorchVersion(torch.__version__) >= (2, 12)
MOST_SOURCES = 3  # 4 sublayers in 2 blocks: the embedding, a block, and the second one while it grows


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # A bias of the keys has no gradient: softmax does not see it.
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=i != 1) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (project(x).unflatten(-1, (-1, 4)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """No cast in it: float64 stays float64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def small() -> Transformer:
    """The same on every rank, with norms that are not neutral."""
    torch.manual_seed(0)
    model = Transformer().double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, length), generator=torch.Generator().manual_seed(length))


def draw_queries(model: Any) -> None:
    """Queries and key norms that are not neutral, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in model.attnres.sites:
            for parameter, centre in ((site.query, 0.0), (site.key_norm, 1.0)):
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(centre + 0.4 * torch.randn(WIDTH, generator=generator, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- parallelize plans


def whole_stream() -> dict[str, Any]:
    """The simplest plan: all ranks hold the stream, as plain tensors; branches end in an all-reduce."""
    return _branches(lambda: RowwiseParallel())


def split_stream(use_local_output: bool) -> dict[str, Any]:
    """Sequence parallelism: the stream is split along the sequence, as plain tensors or as DTensors."""
    plan = _branches(lambda: RowwiseParallel(output_layouts=Shard(1), use_local_output=use_local_output))
    plan["embedding"] = RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=use_local_output
    )
    plan["norm"] = SequenceParallel()
    plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    for i in range(LAYERS):
        for norm, branch in (("norm1", "attention"), ("norm2", "mlp")):
            plan[f"layers.{i}.{norm}"] = SequenceParallel()
            plan[f"layers.{i}.{branch}"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    return plan


def split_features() -> dict[str, Any]:
    """Every rank holds some features of the stream, which norms gather."""
    plan = _branches(lambda: RowwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1), use_local_output=False)
    for name in ("norm", *(f"layers.{i}.norm{n}" for i in range(LAYERS) for n in (1, 2))):
        plan[name] = PrepareModuleInput(input_layouts=Shard(-1), desired_input_layouts=Replicate(), use_local_output=True)
    return plan


def unreduced() -> dict[str, Any]:
    """The branches' terms are added up on the stream alone."""
    plan = split_stream(use_local_output=False)
    end = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    return plan | {f"layers.{i}.mlp.down": end for i in range(LAYERS)}


def _branches(end: Callable[[], Any]) -> dict[str, Any]:
    plan: dict[str, Any] = {}
    for i in range(LAYERS):
        plan |= {f"layers.{i}.{name}": ColwiseParallel() for name in ("attention.q", "attention.k", "attention.v", "mlp.up")}
        plan |= {f"layers.{i}.{name}": end() for name in ("attention.out", "mlp.down")}
    return plan


PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    "whole": whole_stream,
    "split": lambda: split_stream(use_local_output=True),
    "split DTensor": lambda: split_stream(use_local_output=False),
    "unreduced DTensor": unreduced,
    "features": split_features,
}


# ------------------------------------------------------------------------------------------------------------- ranks


class SiteBytes(TorchDispatchMode):
    """Of every site that runs, the memory behind its sources: whole storages, so that a view counts as what it keeps alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.attnres.site.default:
            storages = [getattr(source, "elem", source).untyped_storage() for source in args[0]]  # elem: of one on its way
            self.held.append(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
        return function(*args, **kwargs or {})


def eager(graph_module: GraphModule, inputs: list[Any], *, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    return compile_rewritten(graph_module, inputs, lambda graph, _inputs, _mode: graph.forward, options=options)


def rewritten(mesh: DeviceMesh, plan: str, length: int, shard_sequence: bool = False) -> dict[str, Any]:
    """Ahead of time: errors, gradients of queries, the most that a site's sources take, and collectives of a forward pass."""
    model = parallelize_module(small(), mesh, PLANS[plan]())
    gm = ac.rewrite(model, CONFIG, (tokens(length),), shard_sequence=shard_sequence)
    draw_queries(gm)
    with torch.no_grad(), CommDebugMode() as collectives, SiteBytes() as sites:
        gm(tokens(length))
    counts = {str(kind).partition(".")[2]: count for kind, count in collectives.get_comm_counts().items()}
    return {**_errors(gm, gm, length), "bytes": max(sites.held), "collectives": counts}


def compiled(mesh: DeviceMesh, plan: str, order: str, length: int = 8, **options: Any) -> dict[str, Any]:
    """Under torch.compile: errors, and gradients of queries."""
    torch.compiler.reset()
    model = small()
    if order == "convert, parallelize":
        ac.convert_(model, CONFIG, (tokens(length),))
    parallelize_module(model, mesh, PLANS[plan]())
    if order == "parallelize, convert":
        ac.convert_(model, CONFIG, (tokens(length),))
    if order == "one line":
        options |= {"num_blocks": 2}
    fast = torch.compile(model, backend=eager, options=options)
    if order == "one line":
        with torch.no_grad():
            fast(tokens(length))
    draw_queries(model)
    return _errors(model, fast, length)


def distributed_queries(mesh: DeviceMesh, plan: str) -> dict[str, Any]:
    """Queries as DTensors, as gradient clipping wants them where all other parameters are; with an optimizer step."""
    torch.compiler.reset()
    model = parallelize_module(small(), mesh, PLANS[plan]())
    ac.convert_(model, CONFIG, (tokens(8),))
    distribute_module(model.attnres, mesh)
    draw_queries(model)
    found = _errors(model, torch.compile(model, backend=eager), 8)
    reference = copy.deepcopy(_reference(8)[0])
    for mine, its in zip(reference.parameters(), _reference(8)[0].parameters(), strict=True):
        mine.grad = its.grad
    after = {}
    for which in (model, reference):
        if _CLIPS_PARTIAL_SUMS:
            torch.nn.utils.clip_grad_norm_(which.parameters(), 0.1)
        torch.optim.AdamW(which.parameters(), lr=0.1).step()
        after[which] = {name: _whole(parameter).detach() for name, parameter in which.named_parameters()}
    worst = max(_error(after[model][name], value) for name, value in after[reference].items())
    return {**found, "step": worst}


def refused(call: Callable[[], Any]) -> str:
    """The first line of what ``call`` raises, with the class of our own error."""
    torch.compiler.reset()
    try:
        call()
    except ac.AttnResError as error:
        kind = next(base for base in type(error).__mro__ if base.__module__ == "attnres_compile.errors")
        return f"{kind.__name__}: {str(error).splitlines()[0]}"
    return "ran"


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    ids = tokens(8)

    def parallel(plan: str) -> nn.Module:
        return parallelize_module(small(), mesh, PLANS[plan]())

    def run_with_a_split_query() -> None:
        gm = ac.rewrite(parallel("split"), CONFIG, (ids,))
        site = gm.attnres.sites[0]
        site.query = nn.Parameter(distribute_tensor(site.query.data, mesh, [Shard(0)]))
        gm(ids)

    def symbolic() -> None:
        options = {"shard_sequence": True}
        torch.compile(parallel("whole"), backend=eager, dynamic=True, options=options)(ids)

    return {
        "features": refused(lambda: ac.convert_(parallel("features"), CONFIG, (ids,))),
        "odd length": refused(lambda: torch.compile(parallel("split"), backend=eager)(tokens(7))),
        "split query": refused(run_with_a_split_query),
        "not parallel": refused(lambda: ac.rewrite(small(), CONFIG, (ids,), shard_sequence=True)),
        "symbolic length": refused(symbolic),
        "no flag": refused(lambda: torch.compile(small(), backend=eager, options={"shard_sequence": 2})(ids)),
        "FSDP": refused(lambda: torch.compile(fully_shard(small(), mesh=mesh), backend=eager)(ids)),
        "pipeline": refused(lambda: ac.partition(parallel("whole"), 2, args=(ids,), config=CONFIG)),
    }


def on_two_ranks() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for plan, length in (("whole", 8), ("split", 8), ("split DTensor", ODD_LENGTH), ("unreduced DTensor", 8)):
        found["rewritten", plan] = rewritten(mesh, plan, length)
    for length in (8, 1):
        found["sharded", length] = rewritten(mesh, "whole", length, shard_sequence=True)
    found["split already"] = rewritten(mesh, "split", 8, shard_sequence=True)
    found["compiled", "whole"] = compiled(mesh, "whole", "convert, parallelize")
    found["compiled", "split DTensor"] = compiled(mesh, "split DTensor", "one line")
    found["compiled", "sharded"] = compiled(mesh, "whole", "convert, parallelize", shard_sequence=True)
    found["distributed queries"] = distributed_queries(mesh, "split")
    found["refusals"] = refusals(mesh)
    return found


def on_four_ranks() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (4,))
    return {
        "split": rewritten(mesh, "split", 8),
        ("sharded", 8): rewritten(mesh, "whole", 8, shard_sequence=True),
        ("sharded", 5): rewritten(mesh, "whole", 5, shard_sequence=True),
    }


def _errors(model: Any, call: Callable[..., Any], length: int) -> dict[str, Any]:
    """Relative L2 errors against one process, of the output and of the worst gradient; and the queries' own gradients."""
    reference, expected = _reference(length)
    model.zero_grad()
    output = _whole(call(tokens(length)))
    _loss(output, length).backward()
    gradients = {name: _whole(parameter.grad) for name, parameter in model.named_parameters()}
    wanted = dict(reference.named_parameters())
    assert gradients.keys() == wanted.keys()
    queries = [gradient.tolist() for name, gradient in gradients.items() if name.startswith("attnres.")]
    worst = max(_error(gradients[name], parameter.grad) for name, parameter in wanted.items())
    return {"output": _error(output, expected), "gradients": worst, "queries": queries}


@functools.cache
def _reference(length: int) -> tuple[Any, Tensor]:
    """The model rewritten in one process, with gradients, and its output."""
    gm = ac.rewrite(small(), CONFIG, (tokens(length),))
    draw_queries(gm)
    output = gm(tokens(length))
    _loss(output, length).backward()
    return gm, output


def _loss(output: Tensor, length: int) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), tokens(length).flatten())


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
