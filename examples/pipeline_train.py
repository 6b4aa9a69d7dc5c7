"""Train a small Llama with Block Attention Residuals on a pipeline of processes, and hold it against one process.

The text is the Python standard library's own source, byte by byte. Every rank builds the same model from a seed, ``ac.partition``
cuts it, and torch's own schedule runs the stages over gloo; on one machine everything stays on its loopback interface. Rank 0
then trains the whole model by itself on the same batches and prints both, the plan, and the bytes that were sent.

    torchrun --nproc-per-node 2 examples/pipeline_train.py [--virtual-stages 2] [--microbatches 8] [--transport naive]

The number of processes is the number of ranks. ``python -m torch.distributed.run`` is the same as ``torchrun``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

# Threads that wait by spinning stall each other where other programs use the cores too. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from demo_data import standard_library
from pipeline_report import Outcome, SentBytes, progress, report
from small_llama import small_llama
from torch import Tensor
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from transformers import LlamaForCausalLM

import attnres_compile as ac
from attnres_compile.pipelining.orders import placement_of
from attnres_compile.pipelining.plots import check_format, save, timelines
from attnres_compile.pipelining.simulation import Link
from attnres_compile.pipelining.timeline import forward_seconds, simulate_step

LAYERS, HIDDEN, LENGTH, ROWS = 8, 128, 128, 2  # ROWS sequences per microbatch
LEARNING_RATE = 1e-3
# What the picture is drawn for: ranks that compute at 20 GFLOP/s and talk over gigabit Ethernet.
FLOPS_PER_SECOND, LINK = 20e9, Link(bandwidth=125e6, latency=50e-6)
# Their separate gradients of weights want every query read by one operation.
ZERO_BUBBLE = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how; the same on every rank."""

    virtual: int
    microbatches: int
    steps: int
    schedule: str
    transport: str
    config: ac.AttnResConfig
    seed: int


def main(
    # torchrun would take a plain --virtual for one of its own options.
    virtual: Annotated[int, typer.Option("--virtual-stages", help="Stages per rank.", min=1)] = 2,
    microbatches: Annotated[int, typer.Option(help="Microbatches per step.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=2)] = 20,
    schedule: Annotated[str, typer.Option(help="torch's name of the schedule.")] = "Interleaved1F1B",
    transport: Annotated[str, typer.Option(help="What hops carry: cached or naive.")] = "cached",
    blocks: Annotated[int, typer.Option(help="Blocks of Block AttnRes.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the data.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the picture of the schedule goes.")] = Path("pipeline.png"),
) -> None:
    """Train a small Llama with Block AttnRes on a pipeline, and the same in one process."""
    started = time.perf_counter()
    config = ac.AttnResConfig(variant="block", num_blocks=blocks)
    setting = Setting(virtual, microbatches, steps, schedule, transport, config, seed)
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        check_format(out)
        plan = plan_of(setting, dist.get_world_size())
        # Simulating first refuses what the schedule can't run before anything runs.
        step = simulate_step(plan, schedule, microbatches, forward_seconds(plan, FLOPS_PER_SECOND), LINK)
        outcomes = gathered(train_pipeline(plan, setting, rank))
    except (ac.ConfigError, ac.PartitionError) as error:  # alike on every rank
        sys.exit(str(error) if dist.get_rank() == 0 else 1)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        report(plan, outcomes, train_alone(setting), microbatches)
        out.parent.mkdir(parents=True, exist_ok=True)
        save(timelines(step), out)
        print(f"Picture of a step: {out}, for ranks of {FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s on gigabit Ethernet.")
        print(f"All of this took {time.perf_counter() - started:.0f} s.")


def plan_of(setting: Setting, ranks: int) -> ac.PipelinePlan:
    return ac.partition(
        model_of(setting.seed),
        ranks,
        setting.virtual,
        args=(torch.zeros(ROWS, LENGTH, dtype=torch.long),),
        config=setting.config,
        placement=placement_of(setting.schedule),
        transport=setting.transport,
        two_phase=setting.schedule not in ZERO_BUBBLE,
    )


def train_pipeline(plan: ac.PipelinePlan, setting: Setting, rank: int) -> Outcome:
    """Train this rank's stages. The first stage's rank puts tokens in, the last stage's has the losses."""
    stages = [ac.BlockCacheStage(plan, i, device="cpu") for i, place in enumerate(plan.placement) if place == rank]
    kind = get_schedule_class(setting.schedule)
    several = issubclass(kind, PipelineScheduleMulti)
    schedule = kind(stages if several else stages[0], setting.microbatches, loss_fn=loss_of)
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.submod.parameters()], lr=LEARNING_RATE)
    outcome = Outcome()
    for batch in progress(f"{plan.ranks} ranks", batches(setting), setting.steps, rank == 0):
        arguments = (batch[:, :-1],) if plan.placement[0] == rank else ()
        losses: list[Tensor] = []
        wanted = {"target": batch[:, 1:], "losses": losses} if plan.placement[-1] == rank else {}
        with SentBytes() as sent:
            schedule.step(*arguments, **wanted, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses += [torch.stack(losses).mean().item()] if losses else []
        outcome.sent.append(sent.nbytes)
    return outcome


def train_alone(setting: Setting) -> Outcome:
    """Train the whole model in this process, on whole batches."""
    model = model_of(setting.seed)
    rows = ROWS * setting.microbatches
    example = torch.zeros(rows, LENGTH, dtype=torch.long)
    rewritten = ac.rewrite(model, setting.config, args=(example,), kwargs={"use_cache": False})
    optimizer = torch.optim.AdamW(rewritten.parameters(), lr=LEARNING_RATE)
    outcome = Outcome()
    for batch in progress("one process", batches(setting), setting.steps):
        loss = loss_of(rewritten(batch[:, :-1], use_cache=False).logits, batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses.append(loss.item())
    return outcome


def model_of(seed: int) -> LlamaForCausalLM:
    """The same weights on every rank. The embedding is not tied to the last layer, which is on another rank."""
    torch.manual_seed(seed)
    return small_llama(LAYERS, HIDDEN, LENGTH, tie_word_embeddings=False)


def batches(setting: Setting) -> Iterator[Tensor]:
    """The same on every rank: ``[microbatches * ROWS, LENGTH + 1]`` bytes, inputs and, one further, targets."""
    text = standard_library()
    generator = torch.Generator().manual_seed(setting.seed)
    while True:
        yield text.batch(generator, setting.microbatches * ROWS, LENGTH)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per byte."""
    return F.cross_entropy(logits.transpose(1, 2), targets)


def gathered(outcome: Outcome) -> list[Outcome]:
    """The outcomes of all ranks."""
    outcomes: list[Outcome] = [outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes


if __name__ == "__main__":
    typer.run(main)
