"""A rewritten graph as a module of modules, one per block: what FSDP shards and torch.compile compiles piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnres_compile.errors import PartitionError
from attnres_compile.layout import CONFIG_KEY, StoredConversion, check_same
from attnres_compile.parameters import ATTRIBUTE
from attnres_compile.report import Report
from attnres_compile.rewritten import CallSignature
from attnres_compile.transport import StageTransport

_BLOCKS, _SHARED = "blocks", "shared"


class SplitModule(nn.Module):
    """What ``rewrite(..., split=True)`` returns: called like the model, it runs ``blocks`` one after the other.

    Attributes:
        blocks: a graph module for every AttnRes block, with the parameters that it alone reads, under the model's names; the
            first one embeds, the last one holds what follows the last block. Shard each, then the whole; compile each.
        shared: parameters that several blocks read (tied embeddings). They stay in this module, whose ``fully_shard`` takes
            them, and enter blocks as inputs.
        report: what was rewritten.

    The state dict has the model's own names, and ``attnres.*``; after sharding its values are DTensors. For
    ``torch.distributed.checkpoint.state_dict`` and for optimizers whose state is to be saved under the model's names, use
    ``attnres_compile.rank_module(split)``, once the blocks are sharded.
    """

    report: Report

    def __init__(
        self, blocks: Sequence[GraphModule], shared: nn.Module, inputs: Sequence[tuple[str, ...]],
        transport: Sequence[StageTransport], signature: CallSignature, report: Report, stored: StoredConversion, training: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.blocks, self.shared = nn.ModuleList(blocks), shared
        self.report = report
        self._inputs, self._transport, self._signature, self._stored = tuple(inputs), tuple(transport), signature, stored
        self.train(training)
        self.register_state_dict_post_hook(_to_names_of_the_model)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_names_of_the_model)  # type: ignore[no-untyped-call]

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """All that holds parameters: the blocks, and what they share."""
        return (*self.blocks, self.shared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns.

        Raises:
            CaptureError: if the arguments or the mode are not those that the graph was captured for.
        """
        self._signature.check_mode(self.training)
        given = self._signature.flatten(args, kwargs)
        values: dict[str, Tensor] = {}
        for block, names, plan in zip(self.blocks[:-1], self._inputs, self._transport, strict=False):
            kept = self._run(block, names, plan, values, given)[1]
            values.update(zip(plan.keeps, kept, strict=True))
            for name in plan.frees:
                del values[name]
        outputs = self._run(self.blocks[-1], self._inputs[-1], self._transport[-1], values, given)
        return self._signature.rebuild(outputs, given)

    def _run(
        self, block: nn.Module, names: Sequence[str], plan: StageTransport, values: dict[str, Tensor], given: list[Any]
    ) -> Any:
        arguments = given if block is self.blocks[0] else [values[name] for name in plan.fetches]
        return block(*arguments, *(self.shared.get_parameter(name) for name in names))

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitModule:
        raise PartitionError("a split model can't be copied; copy the model that it was made from, and split that copy, too.")


def _own_name(name: str, prefix: str) -> str:
    """The model's name of what this module holds as ``name``."""
    kind, _, rest = name.removeprefix(prefix).partition(".")
    if kind == _BLOCKS:
        return prefix + rest.partition(".")[2]
    return prefix + rest if kind == _SHARED else name


def _to_names_of_the_model(module: nn.Module, state_dict: Any, prefix: str, _: Any) -> None:
    assert isinstance(module, SplitModule)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        value = state_dict.pop(name)
        state_dict[_own_name(name, prefix)] = value
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        metadata.setdefault(prefix + ATTRIBUTE, {})[CONFIG_KEY] = module._stored.to_dict()


def _from_names_of_the_model(
    module: nn.Module, state_dict: Any, prefix: str, _: Any, strict: bool, missing: list[str], unexpected: list[str],
    errors: list[str],
) -> None:  # fmt: skip
    """
    Raises:
        ParameterMismatchError: if the state dict was saved with other options or sites.
    """
    assert isinstance(module, SplitModule)
    saved = getattr(state_dict, "_metadata", {}).get(prefix + ATTRIBUTE, {}).get(CONFIG_KEY)
    if saved is not None:
        check_same(module._stored, StoredConversion.from_dict(saved, "state dict"))
    found: dict[str, Tensor] = {}
    for part, held in ((f"{_BLOCKS}.{i}.", block) for i, block in enumerate(module.blocks)):
        found |= _taken(state_dict, prefix, part, held)
    found |= _taken(state_dict, prefix, f"{_SHARED}.", module.shared)
    for name in {_own_name(name, prefix) for name in found}:
        state_dict.pop(name, None)
    state_dict.update(found)


def _taken(state_dict: Any, prefix: str, part: str, held: nn.Module) -> dict[str, Tensor]:
    """The entries of ``state_dict`` that ``held`` takes, by the names that it has for them."""
    names = torch.nn.Module.state_dict(held).keys()
    return {f"{prefix}{part}{name}": state_dict[prefix + name] for name in names if prefix + name in state_dict}
