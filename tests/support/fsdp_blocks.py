"""What two ranks find out about the blocks of a split model under FSDP2. Run by ``ranks.run_ranks``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from gradients import relative_error
from models import tiny
from reference import promote_to_float64
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import attnres_compile as ac

CONFIG = ac.AttnResConfig(block_size=2)
IDS = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))


def converted(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A Llama of two layers, checkpointed, with tied embeddings and queries that are not zero; alike on every rank."""
    model = tiny("llama", tie_word_embeddings=True, use_cache=False, num_hidden_layers=2).to(dtype).train()
    model.gradient_checkpointing_enable()
    ac.convert_(model, CONFIG, (IDS[:2],))
    torch.manual_seed(3)
    for site in model.attnres.sites:
        nn.init.normal_(site.query, std=0.3)
    return model


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows).logits.square().mean()


def sharded(split: ac.SplitModule, **options: Any) -> ac.SplitModule:
    for block in split.blocks:
        fully_shard(block, **options)
    fully_shard(split, **options)
    return split


def recomputed() -> float:
    """Blocks that are compiled, sharded and recomputed: the largest relative error of a gradient against one process."""
    whole, model = converted(), converted()
    with promote_to_float64(whole):
        loss_of(ac.rewrite(whole, args=(IDS,)), IDS).backward()
    with promote_to_float64(model):
        split = ac.rewrite(model, args=(IDS[:2],), split=True)
    for block in split.blocks:
        block.compile(backend="aot_eager")
    sharded(split)
    loss_of(split, IDS[2 * dist.get_rank() :][:2]).backward()
    found = {name: parameter.grad.full_tensor() for name, parameter in ac.rank_module(split).named_parameters()}
    return max(relative_error(found[name], parameter.grad) for name, parameter in whole.named_parameters())


def error_of(call: Any) -> str:
    try:
        call()
    except (ac.AttnResError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def cast_by_fsdp() -> str:
    """Captured in float32, cast to bfloat16 by FSDP."""
    split = ac.rewrite(converted(torch.float32), args=(IDS[:2],), split=True)
    return error_of(lambda: sharded(split, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))(IDS[:2]))


def layers_compiled(first: bool) -> str:
    """A converted model whose layers are sharded, ``first`` before all others: the frame with the chain is given up."""
    model = converted(torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    if not first:
        fully_shard(model)
    return error_of(lambda: torch.compile(model, backend="attnres")(IDS[:2]))


def sharded_before() -> list[str]:
    model = tiny("llama", use_cache=False, num_hidden_layers=2)
    fully_shard(model)
    calls = (ac.convert_, ac.detect, lambda *call: ac.rewrite(*call, split=True))
    return [error_of(lambda call=call: call(model, *(() if call is ac.detect else (CONFIG,)), (IDS[:2],))) for call in calls]


def all_of() -> dict[str, Any]:
    return {
        "layers": [layers_compiled(first) for first in (True, False)],
        "recomputed": recomputed(),
        "cast": cast_by_fsdp(),
        "before": sharded_before(),
        "state": error_of(lambda: get_model_state_dict(sharded(ac.rewrite(converted(), args=(IDS[:2],), split=True)))),
    }
