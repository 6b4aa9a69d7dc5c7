"""Recipes as source: a complete PyTorch module that can be read, pasted into a file, and run."""

from __future__ import annotations

import textwrap

import near_misses
from networks import (
    IN_PLACE_ADDS,
    Branch,
    Cut,
    Injection,
    LongSkip,
    Network,
    Reader,
    Remember,
    Step,
    Sublayer,
    Tower,
    Transform,
)
from scope import Scope, shared_norm_of
from spellings import ADDS, BRANCH_CLASSES, BRANCHES, EMBEDDINGS, HEADS, READERS, TRANSFORMS


def _branch(scope: Scope, i: int, branch: Branch, normed: str, raw: bool) -> tuple[str, str]:
    """Emit the branch ``i`` of a sublayer: returns the variables of what it reads and what it gives."""
    network, d = scope.network, scope.network.width
    n, b = f"n{i}", f"b{i}"
    if branch.norm is None:
        n = normed
    elif raw:
        n = "x"
    elif network.shared_norm:
        if scope.prefix:
            scope.say(f"{n} = self.shared_norm(x)")
        else:
            scope.init.append(f"self.norm{i} = shared")
            scope.say(f"{n} = self.norm{i}(x)")
    else:
        scope.say(f"{n} = {scope.norm(branch.norm, f'norm{i}', 'x')}")
    if branch.kind == "functional":
        up, down = scope.parameter(f"up{i}", 2 * d, d), scope.parameter(f"down{i}", d, 2 * d)
        scope.say(f"{b} = F.linear(torch.tanh(F.linear({n}, {up})), {down})")
    else:
        if branch.kind in BRANCH_CLASSES:
            scope.classes[branch.kind] = BRANCH_CLASSES[branch.kind]
        made = BRANCHES[branch.kind].format(d=d, t=network.shape[1])
        scope.say(f"{b} = {scope.attribute(f'branch{i}', made)}({n}{', memory' if branch.kind == 'cross' else ''})")
    if branch.gate == "layer scale":
        scope.say(f"{b} = {b} * {scope.parameter(f'gamma{i}', d)}")
    elif branch.gate == "gate of norm":
        scope.say(f"{b} = torch.sigmoid({scope.attribute(f'gate{i}', f'nn.Linear({d}, {d})')}({n})) * {b}")
    elif branch.gate == "scalar":
        scope.say(f"{b} = {scope.parameter(f'scalar{i}')} * {b}")
    elif branch.gate == "dropout":
        scope.say(f"{b} = F.dropout({b}, 0.25, self.training)")
    elif branch.gate == "nn.Dropout":
        scope.say(f"{b} = {scope.attribute(f'dropout{i}', 'nn.Dropout(0.25)')}({b})")
    elif branch.gate == "rounded":
        scope.say(f"{b} = {b}.float().double()")
    elif branch.gate == "constant":
        scope.say(f"{b} = {b} * 0.5")
    elif branch.gate == "condition":
        scope.say(f"{b} = {b} * side")
    if branch.behind is not None:
        scope.say(f"{b} = {scope.norm(branch.behind, f'behind{i}', b)}")
    return n, b


def _add(scope: Scope, spelling: str) -> str:
    code = ADDS[spelling]
    mix = scope.parameter("mix", scope.network.width) if "{mix}" in code else ""
    alpha = scope.parameter("alpha") if "{alpha}" in code else ""
    return code.format(mix=mix, alpha=alpha)


def emit_step(scope: Scope, step: Step) -> None:
    network, d = scope.network, scope.network.width
    if isinstance(step, Sublayer):
        _sublayer(scope, step)
    elif isinstance(step, Transform):
        code = TRANSFORMS[step.kind]
        scope.say(code.format(d=d, alpha=scope.parameter("alpha") if "{alpha}" in code else ""))
    elif isinstance(step, Reader):
        code = READERS[step.kind]
        router = scope.attribute("router", f"nn.Linear({d}, 3)") if "{router}" in code else ""
        scope.say(code.format(router=router, norm=scope.norm(step.norm, "norm", "x") if "{norm}" in code else ""))
    elif isinstance(step, Injection):
        made = {
            "side": lambda: "side",
            "positions": lambda: scope.parameter("positions", *network.shape),
            "projected": lambda: f"{scope.attribute('project', f'nn.Linear({d}, {d})')}(side)",
        }[step.kind]()
        scope.say(f"x = x + {made}")
    elif isinstance(step, Remember):
        scope.say("kept.append(x)")
    elif isinstance(step, LongSkip):
        scope.say("x = x + kept.pop()")
    elif isinstance(step, Cut):
        if step.kind == "norm":
            scope.say(f"x = {scope.attribute('cut', f'nn.LayerNorm({d})')}(x)")
        elif step.kind == "linear":
            scope.say(f"x = {scope.attribute('cut', f'nn.Linear({d}, {d})')}(x)")
        else:
            scope.say("x = x.detach()")


def _sublayer(scope: Scope, step: Sublayer) -> None:
    inner = Scope(scope.network, scope.prefix, scope.init, [], scope.classes)
    if scope.network.near_miss or step.wild:
        emit_near_miss(inner, step, scope.network.near_miss or step.wild)
    else:
        _plain_sublayer(inner, step)
    if not step.guard:
        scope.body += inner.body
        return
    if step.guard == "autocast":  # leaves float64 alone
        scope.say('with torch.autocast("cpu", torch.bfloat16):')
        scope.say("\n".join(inner.body), 1)
        return
    condition = "x.shape[0] > 1" if step.guard == "shape" else scope.attribute("flag", "True")
    scope.say(f"if {condition}:")
    scope.say("\n".join(inner.body), 1)
    scope.say("else:\n    x = x * 0.0")


def emit_near_miss(scope: Scope, step: Sublayer, kind: str) -> None:
    """Emit the sublayer of one branch, without gate or norm behind it, as the near-miss or the wild one of that name."""
    d = scope.network.width
    branch = step.branches[0]
    if branch.kind in BRANCH_CLASSES:
        scope.classes[branch.kind] = BRANCH_CLASSES[branch.kind]
    code = (near_misses.CODE | near_misses.WILD)[kind]
    made = {"f": BRANCHES[branch.kind], **near_misses.MODULES}
    used = {
        name: scope.attribute(name, value.format(d=d, e=2 * d, t=scope.network.shape[1]))
        for name, value in made.items()
        if f"{{{name}}}" in code
    }
    scope.say(code.format(**used))


def _plain_sublayer(scope: Scope, step: Sublayer) -> None:
    given = []
    normed = "x"
    for i, branch in enumerate(step.branches):
        normed, b = _branch(scope, i, branch, normed, step.raw)
        given.append(b)
    if step.summed:
        scope.say(f"b = {' + '.join(given)}")
        given = ["b"]
    code = _add(scope, step.add)
    for b in given:
        if b != "b":
            scope.say(f"b = {b}")
        scope.say(code)


def _tower(scope: Scope, i: int, tower: Tower, classes: list[str]) -> None:
    network, d = scope.network, scope.network.width
    code = EMBEDDINGS[tower.embedding]
    made = {
        "ids": f"nn.Embedding(11, {d})",
        "positions": f"nn.Parameter(torch.randn({', '.join(map(str, network.shape[1:]))}))",
        "layer_norm": f"nn.LayerNorm({d})",
        "project": f"nn.Linear(3, {d})",
        "cls": f"nn.Parameter(torch.randn(1, 1, {d}))",
        "entry": f"nn.Linear({d}, {d})",
        "latents": f"nn.Parameter(torch.randn(1, {network.shape[1]}, {d}))",
    }
    scope.prefix = f"t{i}_"
    used = {name: scope.attribute(name, value) for name, value in made.items() if f"{{{name}}}" in code}
    scope.say(code.format(d=d, **used))
    scope.say("kept = []")
    depth = 0
    if tower.repeat > 1:
        scope.say(f"for _ in range({tower.repeat}):")
        depth = 1
    if network.blocks:
        names = []
        for j, step in enumerate(tower.steps):
            block = Scope(network, "", classes=scope.classes)
            emit_step(block, step)
            if network.checkpointed:
                recomputed = isinstance(step, Sublayer) and not step.wild and step.add not in IN_PLACE_ADDS
                recomputed &= network.near_miss != "depth attention"  # its layers append to what all have kept
                block.attribute("checkpointed", str(recomputed))
            names.append(f"T{i}Step{j}({'self.shared_norm' if network.shared_norm else ''})")
            classes.append(
                f"class T{i}Step{j}(nn.Module):\n    def __init__(self{', shared' if network.shared_norm else ''}):\n"
                "        super().__init__()\n"
                + textwrap.indent("\n".join(block.init), " " * 8)
                + "\n\n    def forward(self, x, side, mask, memory, aux, kept):\n"
                + textwrap.indent("\n".join([*block.body, "return x"]), " " * 8)
            )
        scope.attribute("steps", f"nn.ModuleList([{', '.join(names)}])")
        scope.say(f"for step in self.t{i}_steps:", depth)
        if network.checkpointed:
            scope.say("if step.checkpointed:", depth + 1)
            recompute = "torch.utils.checkpoint.checkpoint(step, x, side, mask, memory, None, None, use_reentrant=False)"
            scope.say(f"x = {recompute}\ncontinue", depth + 2)
        scope.say("x = step(x, side, mask, memory, aux, kept)", depth + 1)
    else:
        outer = scope.body
        scope.body = []
        for j, step in enumerate(tower.steps):
            scope.prefix = f"t{i}_s{j}_"
            emit_step(scope, step)
        outer += textwrap.indent("\n".join(scope.body or ["pass"]), "    " * depth).split("\n")
        scope.body = outer
    scope.prefix = f"t{i}_"
    _head(scope, tower)


def _head(scope: Scope, tower: Tower) -> None:
    d = scope.network.width
    if tower.head == "pooled norm":
        scope.say(f"pooled = x.mean(1)\ny = {scope.norm(tower.norm, 'norm', 'pooled')}")
    elif tower.head == "token norm":
        scope.say(f"token = x[:, 0]\ny = {scope.norm(tower.norm, 'norm', 'token')}")
    else:
        code = HEADS[tower.head]
        head = scope.attribute("head", f"nn.Linear({d}, {d})") if "{head}" in code else ""
        if "{norm}" in code:
            scope.say(f"normed = {scope.norm(tower.norm, 'norm', 'x')}")
        scope.say(f"y = {code.format(head=head, norm='normed')}")


def source_of(network: Network) -> str:
    """The source of the class ``Net``."""
    scope = Scope(network)
    classes: list[str] = []
    if network.shared_norm:
        scope.norm(shared_norm_of(network), "shared_norm", "x")
    scope.say("aux = []\nmemory = side")
    for i, tower in enumerate(network.towers):
        _tower(scope, i, tower, classes)
        if i + 1 < len(network.towers):
            scope.say("memory = y\naux.append(y)")
    scope.say("return (y, *aux)")
    kinds = [text.strip("\n") for text in scope.classes.values()]
    net = (
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        + textwrap.indent("\n".join(scope.init), " " * 8)
        + "\n\n    def forward(self, ids, patches, entry, side, mask):\n"
        + textwrap.indent("\n".join(scope.body), " " * 8)
    )
    head = "import torch\nimport torch.nn.functional as F\nimport torch.utils.checkpoint\nfrom torch import nn"
    return "\n\n\n".join([head, *kinds, *classes, net]) + "\n"
