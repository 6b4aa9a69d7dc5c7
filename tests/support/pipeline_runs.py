"""What ranks do in pipeline tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pipelines
import torch
import torch.distributed as dist
from torch import nn

import attnres_compile as ac


def train(
    name: str, virtual: int, microbatches: int, block_size: int, boundaries: Any = None, placement: str = "looped",
    two_phase: bool = True, checkpointing: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Two optimizer steps and an evaluation on this rank's stages, held against one process, with either transport."""
    config = ac.AttnResConfig(block_size=block_size)
    whole = ac.rewrite(pipelines.converted(config), args=(pipelines.example(),))
    optimizer = optimizer_of(whole.parameters())
    expected = []
    for number in range(2):
        loss = pipelines.reference_step(whole, *pipelines.batch(microbatches, seed=number), microbatches)
        expected.append((loss, {k: p.grad.clone() for k, p in whole.named_parameters()}))
        optimizer.step()
        optimizer.zero_grad()
    outcome = {}
    for transport in ("cached", "naive"):
        plan = ac.partition(
            pipelines.converted(config), dist.get_world_size(), virtual, args=(pipelines.example(),), boundaries=boundaries,
            placement=placement, transport=transport, two_phase=two_phase,
        )  # fmt: skip
        stages = pipelines.stages_of(plan, activation_checkpointing=checkpointing)
        schedule = pipelines.schedule_of(name, stages, microbatches)
        outcome[transport] = {**_train(schedule, stages, microbatches, expected, whole), "plan": plan.to_dict()}
    return outcome


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """None that divides by the gradient, as AdamW does: where that is tiny, the next step would show roundings by a multiple."""
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def _train(schedule: Any, stages: list[Any], microbatches: int, expected: list[Any], whole: nn.Module) -> dict[str, Any]:
    own = {k: p for stage in stages for k, p in stage.submod.named_parameters()}
    optimizer = optimizer_of(own.values())
    errors, losses, sent = [], [0.0], []
    for number, (loss, gradients) in enumerate(expected):
        with sent_bytes() as counted:
            _, found = pipelines.step(schedule, stages, *pipelines.batch(microbatches, seed=number))
        sent.append(counted)
        errors.append(pipelines.largest_error({k: p.grad for k, p in own.items()}, {k: gradients[k] for k in own}))
        losses += [abs(torch.stack(found).mean() - loss).item()] if found else []
        assert len(stages[0].cache) == 0
        optimizer.step()
        optimizer.zero_grad()
    tokens, target = pipelines.batch(microbatches, seed=7)
    output, _ = pipelines.step(schedule, stages, tokens, target, evaluate=True)
    if output is not None:
        with torch.no_grad():
            errors.append((output - torch.cat([whole(part) for part in tokens.split(pipelines.ROWS)])).abs().max().item())
    assert len(stages[0].cache) == 0
    return {"error": max(errors), "loss": max(losses), "sent": sent, "names": sorted(own)}


class sent_bytes:
    """Counts, by peer, what the process group is asked to send: below torch's schedules and everything of ours."""

    def __enter__(self) -> Counter[int]:
        self.count: Counter[int] = Counter()
        self.original = dist.ProcessGroup.__dict__["send"]
        call = dist.ProcessGroup.send

        def send(group: Any, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
            self.count[peer] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return call(group, tensors, peer, tag)

        dist.ProcessGroup.send = send  # type: ignore[method-assign]
        return self.count

    def __exit__(self, *_: object) -> None:
        dist.ProcessGroup.send = self.original  # type: ignore[method-assign]
