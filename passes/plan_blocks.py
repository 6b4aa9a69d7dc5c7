"""Decide, chain by chain, where blocks begin and what every site attends to."""

from __future__ import annotations

import dataclasses

from attnres_compile.passes.base import Program
from attnres_compile.plan import plan_chain


@dataclasses.dataclass(frozen=True)
class PlanBlocks:
    """Adds one plan per chain to the program."""

    name: str = "plan_blocks"

    def run(self, program: Program) -> tuple[Program, int]:
        plans = tuple(
            plan_chain(chain.num_sublayers, [before for _, before in chain.sites], program.config) for chain in program.chains
        )
        return dataclasses.replace(program, plans=plans), sum(len(plan.blocks) for plan in plans)
