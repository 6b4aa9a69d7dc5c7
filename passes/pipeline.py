"""The order of the passes."""

from __future__ import annotations

from attnres_compile.passes.base import Pass
from attnres_compile.passes.find_chains import FindChains
from attnres_compile.passes.fuse_norms import FuseNorms
from attnres_compile.passes.localize import Localize
from attnres_compile.passes.lower import Lower
from attnres_compile.passes.normalize import Normalize
from attnres_compile.passes.plan_blocks import PlanBlocks
from attnres_compile.passes.policies import Policies
from attnres_compile.passes.rewrite import Rewrite
from attnres_compile.passes.two_phase import TwoPhase
from attnres_compile.passes.verify import Verify

DETECTION: tuple[Pass, ...] = (Normalize(), FindChains())
PLANNING: tuple[Pass, ...] = (PlanBlocks(),)
REWRITING: tuple[Pass, ...] = (Rewrite(), Verify(), Localize())
PHASING: tuple[Pass, ...] = (TwoPhase(), FuseNorms())
LOWERING: tuple[Pass, ...] = (Lower(), Policies())
