"""A module under construction, and the norms in it."""

from __future__ import annotations

import dataclasses
import textwrap

from networks import Network, Norm
from spellings import MODULES, SPELLINGS


@dataclasses.dataclass
class Scope:
    """A module under construction: what its ``__init__`` creates and its ``forward`` does."""

    network: Network
    prefix: str = ""
    init: list[str] = dataclasses.field(default_factory=list)
    body: list[str] = dataclasses.field(default_factory=list)
    classes: dict[str, str] = dataclasses.field(default_factory=dict)

    def attribute(self, name: str, made: str) -> str:
        self.init.append(f"self.{self.prefix}{name} = {made}")
        return f"self.{self.prefix}{name}"

    def parameter(self, name: str, *shape: int) -> str:
        return self.attribute(name, f"nn.Parameter(torch.randn({', '.join(map(str, shape)) or '()'}) * 0.3 + 1)")

    def say(self, text: str, depth: int = 0) -> None:
        self.body += textwrap.indent(text, "    " * depth).split("\n")

    def norm(self, norm: Norm, name: str, x: str) -> str:
        """An expression for the norm of ``x``."""
        d = self.network.width
        if norm.spelling in MODULES:
            return f"{self.attribute(name, MODULES[norm.spelling].format(d=d, e=norm.eps))}({x})"
        if norm.inline:
            w, b = self.parameter(f"{name}_weight", d), self.parameter(f"{name}_bias", d)
            return "(" + SPELLINGS[norm.spelling].format(x=x, d=d, e=norm.eps, w=w, b=b) + ")"
        spelled = SPELLINGS[norm.spelling].format(x="x", d=d, e=norm.eps, w="self.weight", b="self.bias")
        kind = f"Norm{list(SPELLINGS).index(norm.spelling)}_{str(norm.eps).replace('-', '_').replace('.', '_')}"
        self.classes[kind] = textwrap.dedent(f"""
            class {kind}(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.weight = nn.Parameter(torch.randn({d}) * 0.3 + 1)
                    self.bias = nn.Parameter(torch.randn({d}) * 0.3 + 1)

                def forward(self, x):
                    return {spelled}
            """)
        return f"{self.attribute(name, f'{kind}()')}({x})"


def shared_norm_of(network: Network) -> Norm:
    """The one norm in front of all branches, where they share it: a module."""
    return dataclasses.replace(network.towers[0].norm, inline=False)
