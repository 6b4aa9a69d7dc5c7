"""Where every norm as wide as a residual stream stands: is it a site, and if not, what is it?

This counts by the names of module classes and of torch's norm functions, which detection never looks at. Equality at zero
queries can't show a missed site, since the site that was missed computes what it computed before; this does.
"""

import re
from collections import Counter, defaultdict

from torch.fx import Node

from attnres_compile.chain import ResidualChain
from attnres_compile.passes.base import Program
from attnres_compile.passes.graph_index import GraphIndex
from attnres_compile.patterns.degrees import FUSED_NORMS
from attnres_compile.patterns.operations import is_float_tensor, module_of, name_of, shape_of

SITE, FIRST, RAW, MISSED = "site", "first read", "raw read", "missed"
BRANCH, INSIDE, BEFORE, AFTER, ELSEWHERE = "branch output", "inside a sublayer", "before the stream", "after", "elsewhere"
UNUSED = "unused"  # no output of the model needs it
_ORDER = (SITE, UNUSED, MISSED, RAW, FIRST, BRANCH, INSIDE, BEFORE, AFTER, ELSEWHERE)
_NORM = re.compile(r"norm(gated|\d?d)?$", re.IGNORECASE)


def census_of(program: Program) -> dict[str, dict[str, int]]:
    """Place -> module name with numbers as ``*`` -> number of calls, over the norms as wide as any accepted chain."""
    index = GraphIndex(program.graph_module.graph, program.parameters)
    raw = {refusal.node for refusal in program.refusals if refusal.subject == "read"}
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for call in _norm_calls(index):
        source = _input_of(call, index)
        shape = shape_of(source) if source is not None else None
        places = [
            _place(index, chain, call, source, raw)
            for chain in program.chains
            if source is not None and shape and shape[-1] == chain.hidden_size
        ]
        if places:
            name = re.sub(r"\d+", "*", module_of(call[0])) or name_of(call[0])
            found[min(places, key=_ORDER.index)][name] += 1
    return {place: dict(found[place]) for place in _ORDER if place in found}


def _norm_calls(index: GraphIndex) -> list[list[Node]]:
    """The nodes that each call of a norm module made, and calls of torch's norm functions elsewhere."""
    calls: list[list[Node]] = []
    last = None
    for node in index.nodes:
        paths = [path for path, _ in _modules(node)]
        path = _norm_module(node)
        if path is not None and path == last:
            calls[-1].append(node)
        elif path is not None or (node.op == "call_function" and name_of(node) in FUSED_NORMS):
            calls.append([node])
        if path is not None or last not in paths:  # what a norm's own submodules do belongs to the call
            last = path
    return calls


def _modules(node: Node) -> list[tuple[str, str]]:
    """Path and class name of the modules around ``node``, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [(str(path), kind if isinstance(kind, str) else kind.__name__) for path, kind in stack]


def _norm_module(node: Node) -> str | None:
    """The norm module that made ``node``: the outermost of those that stand at the end of its module stack."""
    found = None
    for path, name in reversed(_modules(node)):
        if not _NORM.search(name):
            break
        found = path
    return found


def _input_of(call: list[Node], index: GraphIndex) -> Node | None:
    """The first activation that comes from outside the call."""
    for node in call:
        for source in node.all_input_nodes:
            if source not in call and is_float_tensor(source) and not index.is_parameter(source):
                return source
    return None


def _place(index: GraphIndex, chain: ResidualChain, call: list[Node], source: Node, raw: set[str]) -> str:
    reads = {user for read, _ in chain.reads for _, user in read.edges}
    sites = {user for read, _ in chain.sites for _, user in read.edges}
    adds = [add for sublayer in chain.sublayers for add in sublayer]
    values = {add.node for add in adds}
    if sites & set(call):
        return SITE
    if not any(index.live & index.bit(node) for node in call):
        return UNUSED
    behind = index.peel(source)[0]
    if reads & set(call):
        return FIRST
    if behind is index.peel(chain.root)[0]:
        return FIRST
    if behind in values:
        return RAW if raw & {node.name for node in call} else MISSED
    output = call[-1]
    if any(_leads_to(index, output, add.branch) for add in adds):
        return BRANCH
    bit = index.bit(output)
    if index.ancestors[chain.root] & bit:
        return BEFORE
    if any(index.ancestors[add.branch] & bit for add in adds):
        return INSIDE
    return AFTER if index.ancestors[output] & index.bit(chain.root) else ELSEWHERE


def _leads_to(index: GraphIndex, output: Node, branch: Node) -> bool:
    """Whether ``branch`` is the norm's ``output`` up to what a stream passes through."""
    while branch is not output:
        source = index.transparent(branch)
        if source is None:
            return False
        branch = source
    return True
