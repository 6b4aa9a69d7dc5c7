"""What two ranks do with a split model under FSDP2, held against the same model in one process. Run by ``ranks.run_ranks``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gradients import relative_error
from models import tiny
from reference import promote_to_float64
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten

CONFIG = ac.AttnResConfig(num_blocks=3)
IDS = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))


def converted(tied: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A Llama of four layers with queries that are not zero, alike on every rank."""
    model = tiny("llama", tie_word_embeddings=tied, use_cache=False).to(dtype).train()
    ac.convert_(model, CONFIG, (IDS[:2],))
    torch.manual_seed(3)
    for site in model.attnres.sites:
        nn.init.normal_(site.query, std=0.3)
    return model


def whole_graph(model: nn.Module) -> nn.Module:
    with promote_to_float64(model):
        return ac.rewrite(model, args=(IDS,))


def sharded(model: nn.Module, compiled: bool) -> ac.SplitModule:
    with promote_to_float64(model):
        split = ac.rewrite(model, args=(IDS[:2],), split=True)
    for block in split.blocks:
        if compiled:
            block.compile(backend="aot_eager")
        fully_shard(block)
    fully_shard(split)
    return split


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Outside of the model: Transformers computes its own in float32."""
    return cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def train(split: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(split, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_like_one_process(tied: bool, compiled: bool, folder: str | None = None) -> dict[str, Any]:
    """Two steps on halves of a batch against two steps on the whole in one process.

    With a ``folder`` it is saved there, loaded into a new model, and trained for one step more.
    """
    whole = converted(tied)
    plain = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    expected = train(whole_graph(whole), plain, IDS, 2 if folder is None else 3)
    mine = IDS[2 * dist.get_rank() :][:2]
    split = sharded(converted(tied), compiled)
    tree = ac.rank_module(split)
    optimizer = torch.optim.AdamW(tree.parameters(), lr=1e-2)
    losses = train(split, optimizer, mine, 2)
    if folder is not None:
        state = {"model": get_model_state_dict(tree), "optimizer": get_optimizer_state_dict(tree, optimizer)}
        dcp.save(state, checkpoint_id=folder)
        split = sharded(converted(tied), compiled)
        tree = ac.rank_module(split)
        optimizer = torch.optim.AdamW(tree.parameters(), lr=1e-2)
        state = {"model": split.state_dict(), "optimizer": get_optimizer_state_dict(tree, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(tree, optimizer, state["optimizer"])
        losses += train(split, optimizer, mine, 1)
    loss = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(loss)
    named = dict(ac.rank_module(split).named_parameters())
    found = {name: parameter.full_tensor() for name, parameter in named.items()}
    return {
        "losses": (loss / dist.get_world_size() - torch.tensor(expected, dtype=torch.float64)).abs().max().item(),
        "names": found.keys() == dict(whole.named_parameters()).keys(),
        "parameters": max(relative_error(found[name], value) for name, value in whole.named_parameters()),
        "sharded": all(isinstance(parameter, DTensor) for parameter in named.values()),
    }


def loaded_by_the_plain_model(folder: str) -> float:
    """What a plain converted model loads of a sharded checkpoint, against a sharded model that loads it."""
    plain, split = converted(), sharded(converted(), compiled=False)
    states = {"model": plain.state_dict()}, {"model": split.state_dict()}
    for state in states:
        dcp.load(state, checkpoint_id=folder)
    whole = {name: value.full_tensor() for name, value in states[1]["model"].items()}
    return max(relative_error(states[0]["model"][name], value) for name, value in whole.items())


def in_bfloat16() -> dict[str, Any]:
    """Captured in bfloat16, with parameters of float32 that FSDP casts: gradients against float64, and those of one process."""
    whole = converted()
    reference = whole_graph(whole)
    model = converted(dtype=torch.bfloat16)
    split = ac.rewrite(model, args=(IDS[:2],), split=True).float()
    split.load_state_dict({name: value.float() for name, value in whole.state_dict().items()})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in split.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(split, mp_policy=policy)
    rows = IDS[2 * dist.get_rank() :][:2]
    loss_of(split, rows).backward()
    loss_of(reference, IDS).backward()
    alone = converted(dtype=torch.bfloat16)
    alone.load_state_dict(whole.state_dict())  # random numbers in 16 bits are others
    loss_of(ac.rewrite(alone, args=(IDS,)), IDS).backward()
    names = [name for name, _ in whole.named_parameters()]

    def joined(named: dict[str, Tensor]) -> Tensor:
        return torch.cat([named[name].flatten().double() for name in names])

    expected = joined({name: parameter.grad for name, parameter in whole.named_parameters()})
    gathered = {name: p.grad.full_tensor() for name, p in ac.rank_module(split).named_parameters()}
    rounded = joined({name: parameter.grad for name, parameter in alone.named_parameters()})
    return {
        "dtypes": {value.dtype for value in gathered.values()},
        "error": relative_error(joined(gathered), expected),
        "alone": relative_error(rounded, expected),
    }


def layers_of_a_converted_model() -> str:
    """The error of a converted model whose layers are sharded, compiled as a whole."""
    model = converted()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    try:
        torch.compile(model, backend="attnres")(IDS[:2])
    except ac.AttnResError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def converted_model_as_one_unit() -> float:
    """A converted model that FSDP shards as a whole, under torch.compile: gradients against one process."""
    whole, model = converted(), converted()
    loss_of(whole_graph(whole), IDS).backward()
    fully_shard(model)

    def backend(graph_module: GraphModule, inputs: list[Any]) -> Any:
        return compile_rewritten(graph_module, inputs, lambda graph, *_: graph.forward)

    with promote_to_float64(model):
        loss_of(torch.compile(model, backend=backend), IDS[2 * dist.get_rank() :][:2]).backward()
    found = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return max(relative_error(found[name], parameter.grad) for name, parameter in whole.named_parameters())


def all_of(folder: str) -> dict[str, Any]:
    """Everything in one group of processes."""
    return {
        "tied": trained_like_one_process(True, False, f"{folder}/tied"),
        "untied, compiled": trained_like_one_process(False, True),
        "plain": loaded_by_the_plain_model(f"{folder}/tied"),
        "bfloat16": in_bfloat16(),
        "layers": layers_of_a_converted_model(),
        "one unit": converted_model_as_one_unit(),
    }
