"""What graphs of models on several ranks call: between DTensors, which are whole, and the part of them that a rank holds.

Each of them is differentiable, and its gradient is that of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnres_compile.errors import PlacementError
from attnres_compile.patterns.placements import is_distributed


def own_copy(parameter: Tensor, like: Any = None) -> Tensor:
    """A parameter that every rank holds alike, as a plain tensor.

    Args:
        parameter: plain, or a DTensor of copies.
        like: the DTensor on whose parts it is used: each rank then computes a term of its gradient, and these are added up, so
            that all ranks get the gradient. None where every rank computes the whole of it.

    Raises:
        PlacementError: if ``parameter`` is a DTensor that is split over ranks, or lies on other ranks than ``like``.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if is_distributed(parameter):
        distributed: Any = parameter
        _check_copies(distributed, like)
    elif like is None:
        return parameter
    else:
        distributed = DTensor.from_local(parameter, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    placements = distributed.placements if like is None else like.placements
    terms = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    own: Tensor = distributed.to_local(grad_placements=terms)
    return own


def _check_copies(parameter: Any, like: Any) -> None:
    if not all(placement.is_replicate() for placement in parameter.placements):
        raise PlacementError(
            f"a query or key-norm weight is placed as {tuple(parameter.placements)} on ranks that each need all of it; leave "
            "model.attnres out of the parallelize plan, or make it copies: distribute_module(model.attnres, mesh)."
        )
    if like is not None and parameter.device_mesh != like.device_mesh:
        raise PlacementError(
            f"a query or key-norm weight lies on {parameter.device_mesh}, and the residual stream on {like.device_mesh}; "
            "distribute model.attnres over the mesh of the stream."
        )


def part(whole: Any, like: Any) -> Tensor:
    """This rank's part of a DTensor that is placed as ``like`` is, or is first brought there."""
    if whole.placements != like.placements:
        whole = whole.redistribute(placements=like.placements)
    own: Tensor = whole.to_local()
    return own


def whole_of(own: Tensor, like: Any) -> Any:
    """The DTensor of the shape and the placements of ``like`` that consists of every rank's ``own``."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride)


def split(own: Tensor, origin: Any, dim: int) -> Any:
    """A tensor that every rank of the mesh of ``origin`` holds whole, as a DTensor of parts along ``dim``.

    The parts are copies: a view would keep the whole alive.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(own, origin.device_mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(dim)]).clone()


def scattered(terms: Any, like: Any) -> Any:
    """The sum of ``terms``, a DTensor of partial sums, placed as ``like`` is: a reduce-scatter."""
    return terms.redistribute(placements=like.placements)


def gathered(own: Tensor, like: Any) -> Any:
    """The DTensor of which every rank holds ``own``, a part as ``like`` has them, brought to all ranks: an all-gather."""
    from torch.distributed.tensor import Replicate

    whole = whole_of(own, like).redistribute(placements=[Replicate()])
    with torch.no_grad():
        is_contiguous = whole.to_local().is_contiguous()
    # Before torch 2.13 what is gathered from parts of several sizes keeps the strides of its padding, and claims others.
    return whole if is_contiguous else whole.clone(memory_format=torch.contiguous_format)
