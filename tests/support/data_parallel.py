"""What ranks do in the tests of DDP: each takes its half of a batch, and compares with all of it in one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from small_nets import BATCH, VOCABULARY, Net, converted, eager, set_queries
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

import attnres_compile as ac

TOKENS = (torch.arange(48).view(8, 6) * 7) % VOCABULARY
ORDERS = ("DDP(compile)", "compile(DDP)", "compile method")
WIDE = 384  # a block of it is more than the megabyte that DDP's first bucket holds


class WithUnused(Net):
    """A layer that the forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)


def each(*calls: tuple[Any, ...]) -> list[Any]:
    """What the functions below return, or the error that they raise, as ``(class, message)``."""
    found = []
    for name, *arguments in calls:
        torch.compiler.reset()
        try:
            found.append(globals()[name](*arguments))
        except ac.AttnResError as error:
            found.append((type(error).__name__, str(error).splitlines()[0]))
    return found


def network(kind: type[Net] = Net, width: int = 8) -> Any:
    torch.manual_seed(0)
    return converted(model=(WithUnused() if kind is WithUnused else Net(width=width)).double())


def wrapped(model: nn.Module, order: str, backend: Any = eager, **options: Any) -> nn.Module:
    """``model`` under DDP and compiled, in one of the orders that users write."""
    if order == "DDP(compile)":
        return DistributedDataParallel(torch.compile(model, backend=backend), **options)
    if order == "compile(DDP)":
        return torch.compile(DistributedDataParallel(model, **options), backend=backend)
    model.compile(backend=backend)
    return DistributedDataParallel(model, **options)


def loss_of(output: Tensor) -> Tensor:
    return output.pow(3).mean() + (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).mean()


def equal(
    order: str, setting: bool | str, width: int = 8, kind: type[Net] = Net, accumulate: bool = False, **options: Any
) -> dict[str, Any]:
    """The largest error over two steps against one process with the whole batch, and how far the slowest query moved."""
    with torch._dynamo.config.patch(optimize_ddp=setting):
        model, alone = network(kind, width), network(kind, width)
        before = [site.query.detach().clone() for site in model.attnres.sites]
        parallel, reference = wrapped(model, order, **options), torch.compile(alone, backend=eager)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, alone)]
        errors = []
        for _ in range(2):
            mine = TOKENS.chunk(dist.get_world_size())[dist.get_rank()]
            loss = _step(parallel, mine, accumulate)
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
            expected = loss_of(reference(TOKENS))
            expected.backward()
            errors.append(((loss - expected) / expected).abs().item())
            errors += _gradient_errors(model, alone)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    moved = [(site.query - query).abs().max().item() for site, query in zip(model.attnres.sites, before, strict=True)]
    return {"error": max(errors), "moved": min(moved)}


def accumulating(order: str) -> dict[str, Any]:
    return equal(order, True, accumulate=True)


def with_unused(order: str) -> dict[str, Any]:
    return equal(order, True, kind=WithUnused, find_unused_parameters=True)


def static(order: str) -> dict[str, Any]:
    return equal(order, False, static_graph=True)


def _step(parallel: nn.Module, mine: Tensor, accumulate: bool) -> Tensor:
    """Forward and backward, over two parts of the batch where gradients are accumulated."""
    parts = mine.chunk(2) if accumulate else (mine,)
    ddp = getattr(parallel, "_orig_mod", parallel)
    total = torch.zeros((), dtype=torch.float64)
    for i, part in enumerate(parts):
        with contextlib.nullcontext() if i == len(parts) - 1 else ddp.no_sync():
            loss = loss_of(parallel(part)) / len(parts)
            loss.backward()
        total += loss.detach()
    return total


def _gradient_errors(model: nn.Module, alone: nn.Module) -> list[float]:
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and sum("query" in name for name in found) == 4
    return [((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()]


def split_after_rewriting() -> dict[str, Any]:
    """The graph of ``rewrite`` under DDP's graph splitting: its pieces are anybody's to compile."""
    graphs = []

    def compiler(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    mine = TOKENS.chunk(2)[dist.get_rank()]
    model, alone = network(width=WIDE), network(width=WIDE)
    rewritten = ac.rewrite(model, args=(mine,))
    parallel = torch.compile(DistributedDataParallel(rewritten), backend=compiler)
    loss_of(parallel(mine)).backward()
    loss_of(torch.compile(alone, backend=eager)(TOKENS)).backward()
    return {"graphs": len(graphs), "error": max(_gradient_errors(rewritten, alone))}


def tied_at_the_end() -> Any:
    """A head that shares its weights with the embedding: the first piece has every parameter, the second the head alone."""
    torch.manual_seed(0)

    class Tied(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) @ self.embed.weight.t()

    model = Tied(width=8)
    model.embed = nn.Embedding(40_000, 8)
    ac.convert_(model, args=(BATCH,))
    return wrapped(model, "DDP(compile)")(BATCH)


def unconverted(order: str, setting: bool | str) -> Any:
    with torch._dynamo.config.patch(optimize_ddp=setting):
        return wrapped(Net(), order)(BATCH)


def converted_after_wrapping(order: str, setting: bool | str) -> Any:
    model = Net()
    with torch._dynamo.config.patch(optimize_ddp=setting):
        parallel = wrapped(model, order)
        ac.convert_(model, args=(BATCH,))
        return parallel(BATCH)


def compiled_before_ddp_runs() -> Any:
    """The graph exists when DDP comes to it, so nothing is compiled there."""
    model = Net()
    compiled = torch.compile(model, backend=eager)
    parallel = DistributedDataParallel(compiled)
    ac.convert_(model, args=(BATCH,))
    compiled(BATCH)
    return parallel(BATCH)


def on_the_wrapper(function: str, setting: bool | str) -> Any:
    with torch._dynamo.config.patch(optimize_ddp=setting):
        return getattr(ac, function)(DistributedDataParallel(Net()), args=(BATCH,))


def a_teacher_of_its_own() -> float:
    """A converted model that a model under DDP calls, and that is no part of it, is none of DDP's business."""
    teacher = converted(2)
    fast = torch.compile(teacher, backend=eager)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, ids: Tensor) -> Tensor:
            return self.scale * fast(ids)

    expected = fast(BATCH)
    return (DistributedDataParallel(Student())(BATCH) - expected).abs().max().item()


def accelerated(folder: str) -> dict[str, Any]:
    """accelerate on the process group that is there already: prepare, two steps, save and load."""
    from accelerate import Accelerator  # here, since only this case needs it

    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    accelerator = Accelerator(cpu=True)
    model, alone = network(), network()
    model.compile(backend=eager)
    reference = torch.compile(alone, backend=eager)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, alone)]
    prepared, optimizers[0] = accelerator.prepare(model, optimizers[0])
    errors = []
    for _ in range(2):
        accelerator.backward(loss_of(prepared(TOKENS.chunk(world)[rank])))
        loss_of(reference(TOKENS)).backward()
        errors += _gradient_errors(model, alone)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.save_state(folder)
    set_queries(model, 9)
    accelerator.wait_for_everyone()
    accelerator.load_state(folder)
    same = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    unwrapped = accelerator.unwrap_model(prepared)
    return {"kind": type(prepared).__name__, "error": max(errors), "same": same, "unwrapped": unwrapped is model}
