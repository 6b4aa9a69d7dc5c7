"""Run a small Llama with Block Attention Residuals on tensor-parallel processes, and hold it against one process.

torch's parallelize_module splits the projections; the residual stream, and with it the blocks that depth attention reads, is then
the same on every rank. With ``shard_sequence`` each rank keeps only its part of the sequence of every block: the all-reduce
that ends a sublayer becomes a reduce-scatter, and what the next norm gives is gathered. Outputs are the same.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [--length 512] [--blocks 8]

The number of processes is the number of ranks, up to 4. ``python -m torch.distributed.run`` is the same as ``torchrun``.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from demo_data import VOCABULARY
from leaving import leave
from rich.console import Console
from rich.table import Table
from small_llama import small_llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import attnres_compile as ac

LAYERS, HIDDEN, HEADS = 8, 128, 4
COLUMN_WISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_WISE = ("self_attn.o_proj", "mlp.down_proj")


def main(
    length: Annotated[int, typer.Option(help="Tokens of the prompt; need not divide by the number of ranks.", min=1)] = 512,
    blocks: Annotated[int, typer.Option(help="Blocks of Block AttnRes.", min=1)] = 8,
) -> None:
    """Prefill a prompt on tensor-parallel ranks, with whole blocks and with blocks that are split along the sequence."""
    dist.init_process_group("gloo")
    try:
        if HEADS % dist.get_world_size():
            raise ac.ConfigError(f"{dist.get_world_size()} ranks do not divide the model's {HEADS} heads; take 1, 2 or 4.")
        compare(length, ac.AttnResConfig(num_blocks=blocks))
    except ac.AttnResError as error:  # alike on every rank
        sys.exit(str(error) if dist.get_rank() == 0 else 1)
    finally:
        dist.destroy_process_group()
    leave()


def compare(length: int, config: ac.AttnResConfig) -> None:
    prompt = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    rows = [("one process", *run(model_of(), prompt, config))]
    for name, shard_sequence in (("whole on every rank", False), ("split along the sequence", True)):
        model = parallelize_module(model_of(), init_device_mesh("cpu", (dist.get_world_size(),)), plan())
        rows.append((name, *run(model, prompt, config, shard_sequence)))
    if dist.get_rank() == 0:
        report(rows)


def run(model: nn.Module, prompt: Tensor, config: ac.AttnResConfig, shard_sequence: bool = False) -> tuple[Tensor, int, str]:
    """Logits; on every rank the most bytes that one site's sources take; collectives of the forward pass."""
    gm = ac.rewrite(model, config, args=(prompt,), kwargs={"use_cache": False}, shard_sequence=shard_sequence)
    generator = torch.Generator().manual_seed(1)
    for site in gm.attnres.sites:  # as after training; zero queries weigh all sources alike
        site.query.data.normal_(std=0.1, generator=generator)
    with torch.no_grad(), CommDebugMode() as collectives, BlockBytes() as blocks:
        logits = gm(prompt, use_cache=False).logits
    counts = {str(kind).partition(".")[2].partition("_tensor")[0]: n for kind, n in collectives.get_comm_counts().items()}
    names = (f"{n} {kind.removesuffix('_into').replace('_', '-')}" for kind, n in counts.items())
    return logits, blocks.most, ", ".join(names) or "none"


class BlockBytes(TorchDispatchMode):
    """The most memory behind the sources of one site, in whole storages: a view counts as what it keeps alive."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.attnres.site.default:
            storages = [getattr(source, "elem", source).untyped_storage() for source in args[0]]
            self.most = max(self.most, sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
        return function(*args, **kwargs or {})


def plan() -> dict[str, Any]:
    """The usual plan of a Llama: the stream stays whole on every rank."""
    layers = [f"model.layers.{i}." for i in range(LAYERS)]
    return {layer + name: ColwiseParallel() for layer in layers for name in COLUMN_WISE} | {
        layer + name: RowwiseParallel() for layer in layers for name in ROW_WISE
    }


def model_of() -> LlamaForCausalLM:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return small_llama(LAYERS, HIDDEN, 4096, HEADS, tie_word_embeddings=False).eval()


def report(rows: list[tuple[str, Tensor, int, str]]) -> None:
    expected = rows[0][1]
    table = Table(title=f"Prefill on {dist.get_world_size()} ranks")
    for column in ("blocks", "relative error", "bytes of blocks per rank", "collectives"):
        table.add_column(column, justify="right" if column.startswith(("relative", "bytes")) else "left")
    for name, logits, held, collectives in rows:
        error = ((logits - expected).norm() / expected.norm()).item()
        table.add_row(name, f"{error:.1e}", f"{held:,}", collectives)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
