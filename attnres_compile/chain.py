"""A residual chain as the detector finds it in a graph: a root, sublayers that add to it, and reads of the stream."""

from __future__ import annotations

import dataclasses

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class ResidualAdd:
    """``node = transform(skip) + scale * branch``: one step of the residual stream.

    ``path`` are the transparent operations (casts, relayouts, slices, scalings) between the previous stream node and
    ``skip``, in order. ``skip`` has the shape of ``node``; so has ``branch``, unless it is independent of
    the stream and broadcasts.
    """

    node: Node
    skip: Node
    branch: Node
    scale: float = 1.0
    path: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Read:
    """Scale-invariant readers (norms) of one value of the residual stream.

    ``stream`` holds feature vectors along its last dimension; ``path`` are the relayouts that lead to it from the residual
    add, none where the add itself has that layout. ``edges`` are pairs (value, user): ``value`` is ``stream`` or a
    transparent image of it, ``user`` reads it.
    ``modules`` are the qualified names of the readers' modules, in order of execution. ``eps`` is that of the first
    reader's norm, as added to a mean square, or None where the graph shows none.
    """

    stream: Node
    edges: tuple[tuple[Node, Node], ...]
    modules: tuple[str, ...]
    source_line: str
    eps: float | None
    path: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class ResidualChain:
    """A chain that can be rewritten.

    ``root`` is the first value of the stream (h_1). ``sublayers`` groups the residual adds into increments: the adds
    between two consecutive values of the stream that something other than the next add reads. ``reads`` pairs each
    scale-invariant read with the number of sublayers before it. ``kind`` is "prenorm", "parallel" or "sandwich".
    """

    root: Node
    sublayers: tuple[tuple[ResidualAdd, ...], ...]
    reads: tuple[tuple[Read, int], ...]
    kind: str
    hidden_size: int

    @property
    def num_sublayers(self) -> int:
        return len(self.sublayers)

    @property
    def sites(self) -> tuple[tuple[Read, int], ...]:
        """The reads with at least two sources."""
        return tuple((read, before) for read, before in self.reads if before > 0)

    @property
    def adds(self) -> tuple[ResidualAdd, ...]:
        return tuple(add for sublayer in self.sublayers for add in sublayer)
