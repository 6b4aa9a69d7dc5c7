"""A rewritten graph as a module of modules, one per block: what FSDP shards and torch.compile compiles piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from attnres_compile.errors import CaptureError, PartitionError
from attnres_compile.layout import CONFIG_KEY, StoredConversion, check_same
from attnres_compile.parameters import ATTRIBUTE
from attnres_compile.pipelining.surroundings import check_autocast
from attnres_compile.report import Report
from attnres_compile.rewritten import CallSignature
from attnres_compile.transport import StageTransport

_BLOCKS, _SHARED = "blocks", "shared"


class SplitModule(nn.Module):
    """What ``rewrite(..., split=True)`` returns: called like the model, it runs ``blocks`` one after the other.

    Attributes:
        blocks: a graph module for every AttnRes block, with the parameters that it alone reads, under the model's names, and one
            more for what follows the last block (final norm, head); the first one embeds. Shard each, then the whole; compile
            each.
        shared: parameters that several blocks read (tied embeddings). They stay in this module, whose ``fully_shard`` takes
            them, and enter blocks as inputs.
        report: what was rewritten.

    A split model runs in the dtypes that it was captured in, and under the same autocast. For FSDP's mixed precision split the
    model in 16 bits, and load the weights in float32: ``split.float().load_state_dict(weights)``.

    Of a model that was captured with activation checkpointing, every block that holds a checkpointed layer is recomputed as a
    whole in the backward pass, compiled or not, whatever a selective policy would keep. Each block can be wrapped in
    ``torch.utils.checkpoint`` too.

    The state dict has the model's own names, and ``attnres.*``; after sharding its values are DTensors. For
    ``torch.distributed.checkpoint.state_dict`` and for optimizers whose state is to be saved under the model's names, use
    ``attnres_compile.rank_module(split)``, once the blocks are sharded.
    """

    report: Report

    def __init__(
        self, blocks: Sequence[GraphModule], shared: nn.Module, inputs: Sequence[tuple[str, ...]],
        transport: Sequence[StageTransport], dtypes: dict[str, torch.dtype], recomputed: frozenset[int], signature: CallSignature,
        report: Report, stored: StoredConversion, training: bool,
    ) -> None:  # fmt: skip
        """``dtypes`` are those of values between blocks; ``recomputed`` numbers blocks that are computed again for gradients."""
        super().__init__()
        self.blocks, self.shared = nn.ModuleList(blocks), shared
        self.report = report
        self._inputs, self._transport, self._signature, self._stored = tuple(inputs), tuple(transport), signature, stored
        self._dtypes, self._recomputed = dtypes, recomputed
        self._surroundings = blocks[0].meta
        self._parameter_dtypes = [{name: value.dtype for name, value in part.named_parameters()} for part in self.parts]
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
            CaptureError: if the arguments, the mode, autocast or the dtypes of parameters are not those that the graph was
                captured for.
        """
        self._signature.check_mode(self.training)
        given = self._signature.flatten(args, kwargs)
        check_autocast(self._surroundings, given)
        values: dict[str, Tensor] = {}
        for i, plan in enumerate(self._transport[:-1]):
            for name, value in zip(plan.keeps, self._run(i, values, given)[1], strict=True):
                if value.dtype != self._dtypes[name]:
                    raise _other_dtype(f"block {i} gives {name}", value.dtype, self._dtypes[name])
                values[name] = value
            for name in plan.frees:
                del values[name]
        return self._signature.rebuild(self._run(len(self.blocks) - 1, values, given), given)

    def _run(self, index: int, values: dict[str, Tensor], given: list[Any]) -> Any:
        arguments = given if index == 0 else [values[name] for name in self._transport[index].fetches]
        arguments = [*arguments, *(self.shared.get_parameter(name) for name in self._inputs[index])]
        block = self.blocks[index]
        try:
            if index in self._recomputed and torch.is_grad_enabled():
                return checkpoint(block, *arguments, use_reentrant=False)
            return block(*arguments)
        except RuntimeError as error:  # operands of two dtypes; FSDP casts parameters where only a block itself sees it
            for part, dtypes in zip(self.parts, self._parameter_dtypes, strict=True):
                for name, parameter in part.named_parameters() if part in (block, self.shared) else ():
                    if parameter.dtype != dtypes[name]:
                        raise _other_dtype(f"block {index} reads {name}", parameter.dtype, dtypes[name]) from error
            raise

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if any(name in part._modules or name in part._parameters for part in self.__dict__["_modules"].get(_BLOCKS, ())):
                raise AttributeError(
                    f"a split model has no {name!r} of its own: parameters lie in its blocks, under the model's names. "
                    "attnres_compile.rank_module(split) has all of them together, for torch.distributed.checkpoint.state_dict."
                ) from error
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitModule:
        raise PartitionError("a split model can't be copied; copy the model that it was made from, and split that copy, too.")


def _other_dtype(what: str, found: torch.dtype, captured: torch.dtype) -> CaptureError:
    name, other = (str(dtype).removeprefix("torch.") for dtype in (found, captured))
    return CaptureError(
        f"{what} in {name}, which was {other} when the model was rewritten, and its graph holds casts to that. Split the model "
        f"in the dtype that it runs in: attnres_compile.rewrite(model.to(torch.{name}), ..., split=True). For FSDP's mixed "
        "precision then load the weights in float32: split.float().load_state_dict(weights)."
    )


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
