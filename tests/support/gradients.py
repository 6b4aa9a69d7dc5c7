"""A loss that depends on every logit, the gradients of a model's parameters, and how far two tensors are apart."""

import torch
from torch import Tensor, nn


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(logits: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits * weights).sum() + logits.square().mean()
