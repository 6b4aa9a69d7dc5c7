"""Who reads a value of the residual stream: scale-invariant readers, raw readers, the output."""

from __future__ import annotations

import dataclasses
import heapq

import networkx
from torch.fx import Node

from attnres_compile.chain import ResidualAdd
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.patterns.degrees import ONE, Degree, Eps, degree_of
from attnres_compile.patterns.features import reductions_elsewhere
from attnres_compile.patterns.operations import PERMUTES, name_of, reads_only_metadata


@dataclasses.dataclass(frozen=True)
class Readers:
    """One group of operations that read the stream together.

    ``edges`` are pairs (value, user). ``outputs`` are the values of degree 0 that leave an invariant group; a raw group
    has none and names in ``obstacles`` the operations that are not homogeneous, or (``is_elsewhere``) that normalise
    another dimension than the stream's last.
    """

    edges: tuple[tuple[Node, Node], ...]
    nodes: frozenset[Node]
    outputs: tuple[Node, ...]
    obstacles: tuple[Node, ...]
    is_elsewhere: bool
    eps: Eps | None

    @property
    def is_invariant(self) -> bool:
        return not self.obstacles


@dataclasses.dataclass(frozen=True)
class StreamReads:
    """All reads of one value of the stream.

    ``base`` is the image of the stream in which the readers find feature vectors along the last dimension: the stream
    itself, or where the stream goes on in another layout (a convolution's sum goes on as tokens), that one.
    """

    stream: Node
    base: Node
    images: dict[Node, Node | None]
    groups: tuple[Readers, ...]
    is_output: bool


def reads_of(index: GraphIndex, stream: Node, preceding: ResidualAdd | None, following: ResidualAdd | None) -> StreamReads:
    """The reads of ``stream``, which the ``preceding`` add gave; its use as the skip operand of the ``following`` add is none.

    Degrees are propagated forward from the stream until every value has degree 0 or is not homogeneous; readers that
    share a value of another degree belong together. What no output of the graph needs reads nothing.
    """
    images = index.images(stream)
    degrees: dict[Node, Degree] = dict.fromkeys(images, ONE)
    next_add, next_skip = (following.node, following.skip) if following else (None, None)
    found = _Propagation(index, images, degrees, next_add, next_skip)
    components = networkx.connected_components(found.together)
    alive = [nodes for nodes in components if any(index.live & index.bit(node) for node in nodes)]
    homogeneous = [nodes for nodes in alive if not nodes & found.obstacles]
    # The last add, too, may have been made in a layout of its own, which no path to another add undoes.
    relaid = preceding is not None and any(name_of(operation) in PERMUTES for operation in preceding.path)
    way = following.path if following else tuple(images) if relaid else ()
    base = _base(index, found, homogeneous, stream, way)
    groups = [_readers(nodes, found, base) for nodes in alive]
    ordered = sorted((g for g in groups if g is not None), key=lambda g: min(index.position[user] for _, user in g.edges))
    return StreamReads(stream, base, images, tuple(ordered), found.is_output)


def _base(index: GraphIndex, found: _Propagation, components: list[set[Node]], stream: Node, way: tuple[Node, ...]) -> Node:
    """The stream, or the first image on its ``way`` that all ``components`` read through, if they find their features there."""
    values = [value for nodes in components for value, user in found.edges if user in nodes]
    if not way or not values or all(not found.elsewhere(nodes, stream) for nodes in components):
        return stream
    common = set.intersection(set(way), *(set(found.way_to(value)) for value in values))
    shared = sorted(common, key=index.position.__getitem__)
    return next((image for image in shared if any(not found.elsewhere(nodes, image) for nodes in components)), stream)


class _Propagation:
    """Forward propagation of degrees from one value of the stream."""

    def __init__(
        self, index: GraphIndex, images: dict[Node, Node | None], degrees: dict[Node, Degree], next_add: Node | None,
        next_skip: Node | None,
    ) -> None:  # fmt: skip
        self.images, self.degrees = images, degrees
        self.edges: list[tuple[Node, Node]] = []
        self.obstacles: set[Node] = set()
        self.eps: dict[Node, Eps] = {}
        self.is_output = False
        self.together = networkx.Graph()
        queue: list[tuple[int, Node]] = []
        queued: set[Node] = set()

        def enqueue_users(value: Node) -> None:
            for user in value.users:
                if user not in queued and user not in images and not reads_only_metadata(user, value):
                    is_skip = value is next_skip and user is next_add and list(user.args).count(value) == 1
                    if not is_skip:
                        queued.add(user)
                        heapq.heappush(queue, (index.position[user], user))

        for image in images:
            enqueue_users(image)
        while queue:
            _, node = heapq.heappop(queue)
            is_skip_of_node = node is next_add
            sources = [
                source
                for source in node.all_input_nodes
                if source in degrees and not reads_only_metadata(node, source) and not (is_skip_of_node and source is next_skip)
            ]
            if node.op == "output":
                self.is_output = True
                self.obstacles.update(s for s in sources if s not in images and not _is_zero(degrees[s]))
                continue
            self.together.add_node(node)
            self.edges.extend((source, node) for source in sources if source in images)
            for source in sources:
                if source not in images and not _is_zero(degrees[source]):
                    self.together.add_edge(source, node)
            scaling = None if is_skip_of_node else degree_of(node, degrees)
            if scaling is None:
                self.obstacles.add(node)
                continue
            degrees[node] = scaling.degree
            if scaling.eps is not None:
                self.eps[node] = scaling.eps
            if not _is_zero(scaling.degree):
                enqueue_users(node)

    def way_to(self, value: Node) -> list[Node]:
        """The images between ``value`` and the stream, both included."""
        way = [value]
        while (source := self.images[way[-1]]) is not None:
            way.append(source)
        return way

    def edges_of(self, component: set[Node]) -> tuple[tuple[Node, Node], ...]:
        return tuple((value, user) for value, user in self.edges if user in component)

    def elsewhere(self, component: set[Node], base: Node) -> tuple[Node, ...]:
        """What in ``component`` normalises another dimension than the last of ``base``."""
        edges = self.edges_of(component)
        if not all(base in self.way_to(value) for value, _ in edges):
            return tuple(user for _, user in edges)
        images = {value: None if value is base else source for value, source in self.images.items()}
        return reductions_elsewhere(edges, images, component)


def _is_zero(degree: Degree) -> bool:
    return all(part == 0 for part in degree) if isinstance(degree, tuple) else degree == 0


def _readers(component: set[Node], found: _Propagation, base: Node) -> Readers | None:
    edges = found.edges_of(component)
    obstacles = tuple(sorted(component & found.obstacles, key=lambda n: n.name))
    elsewhere = () if obstacles else found.elsewhere(component, base)
    outputs = tuple(n for n in component if n in found.degrees and _is_zero(found.degrees[n]))
    if not edges or not (obstacles or outputs):
        return None  # a computation that nothing uses
    eps = next((found.eps[n] for n in component if n in found.eps), None)
    return Readers(
        edges, frozenset(component), () if obstacles or elsewhere else outputs, obstacles or elsewhere, bool(elsewhere), eps
    )


def describe_obstacles(readers: Readers) -> str:
    """Why a raw group is no site."""
    return f"reads the stream but {name_obstacles(readers)}: it keeps the plain sum"


def name_obstacles(readers: Readers) -> str:
    """What keeps a raw group from being a norm of feature vectors."""
    names = ", ".join(dict.fromkeys(name_of(node) for node in readers.obstacles))
    return (
        f"normalises another dimension than its last ({names})" if readers.is_elsewhere else f"is not scale invariant ({names})"
    )
