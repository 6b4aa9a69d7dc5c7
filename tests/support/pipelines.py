"""A small model for pipeline tests, and one training step of it on the stages of this rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

import attnres_compile as ac

VOCABULARY, WIDTH, POSITIONS, ROWS = 31, 16, 6, 2


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Its mask depends on the input, so that later stages need the tokens too. No cast in it: float64 stays float64."""

    def __init__(self, layers: int = 9) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(layers))
        self.norm, self.head = Norm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        mask = causal & (tokens != 0)[:, None, :] | torch.eye(tokens.shape[1], dtype=torch.bool)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


def example() -> Tensor:
    """One microbatch."""
    return torch.zeros(ROWS, POSITIONS, dtype=torch.long)


def converted(config: ac.AttnResConfig, dtype: torch.dtype = torch.float64, layers: int = 9) -> Transformer:
    """The same on every rank: a converted model with queries that are not zero."""
    torch.manual_seed(0)
    model = Transformer(layers).to(dtype)
    ac.convert_(model, config, args=(example(),))
    for site in model.attnres.sites:  # type: ignore[union-attr]
        nn.init.normal_(site.query, std=0.3)
    return model


def batch(microbatches: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randint(VOCABULARY, (2, ROWS * microbatches, POSITIONS), generator=generator)
    return both[0], both[1]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1).to(torch.promote_types(output.dtype, torch.float32)), target.flatten())


def stages_of(plan: ac.PipelinePlan, group: Any = None, **options: Any) -> list[Any]:
    rank = dist.get_rank(group)
    mine = [i for i, place in enumerate(plan.placement) if place == rank]
    return [ac.BlockCacheStage(plan, i, device="cpu", group=group, **options) for i in mine]


def schedule_of(name: str, stages: list[Any], microbatches: int) -> Any:
    kind = get_schedule_class(name)
    return kind(stages if issubclass(kind, PipelineScheduleMulti) else stages[0], microbatches, loss_fn=loss_of)


def step(schedule: Any, stages: list[Any], tokens: Tensor, target: Tensor, evaluate: bool = False) -> tuple[Any, list[Tensor]]:
    """The merged output (on the last stage's rank) and the losses of one step."""
    losses: list[Tensor] = []
    arguments = (tokens,) if any(stage.is_first for stage in stages) else ()
    options = {"target": target, "losses": losses} if any(stage.is_last for stage in stages) else {}
    output = (schedule.eval if evaluate else schedule.step)(*arguments, **options)
    return output, losses


def reference_step(module: nn.Module, tokens: Tensor, target: Tensor, microbatches: int) -> Tensor:
    """The mean loss of all microbatches on one process, with its gradients added to ``.grad``."""
    parts = zip(tokens.split(ROWS), target.split(ROWS), strict=True)
    loss = sum(loss_of(module(part), wanted) for part, wanted in parts) / microbatches
    loss.backward()
    return loss.detach()


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to the largest element of what was expected."""
    return max(
        ((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)).item() for name, value in expected.items()
    )
