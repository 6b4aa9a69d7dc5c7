"""A stage for torch.distributed.pipelining that keeps what its rank received: only what a rank lacks travels.

This file and ``capture.py`` alone touch torch's private interface. Overridden of ``PipelineStage`` is what moves values and
gradients between stages; what runs and when stays with torch's schedules.
"""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, _schedule_visualizer, schedules
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from attnres_compile.errors import ConfigError
from attnres_compile.patterns.operations import value_of
from attnres_compile.pipelining.agreement import check_place, check_schedule, compare_plans, wire_problem
from attnres_compile.pipelining.cache import BlockCache
from attnres_compile.pipelining.devices import signature_on
from attnres_compile.pipelining.gradients import StepGradients
from attnres_compile.pipelining.hops import PendingTransfer, Route, Transfer, check, empty_like, operations
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.states import check_ties
from attnres_compile.pipelining.surroundings import check_surroundings
from attnres_compile.transport import CutValue

# What the stages of a rank share, by plan and process group.
_SHARED: weakref.WeakKeyDictionary[PipelinePlan, dict[Any, tuple[BlockCache, StepGradients]]] = weakref.WeakKeyDictionary()
_FETCHED = "fetched_"  # keyword arguments under which cached values enter a stage, out of the user's way


class BlockCacheStage(PipelineStage):
    """Stage ``index`` of ``plan``, for torch's schedules: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, and the zero-bubble ones.

    ``schedule.step`` takes the model's arguments on the first stage's rank. The last stage gives the model's output tensors: the
    tensor itself if there is one, else a tuple. All stages of a rank share one block cache; it is empty between steps.

    ``.grad`` gets what a step adds, scaled once, beside what was there: gradients accumulate over steps, at the price of holding
    both until the step ends. A step that fails leaves gradients as they were and the cache empty, at once, or when the next step
    begins if it was the loss function that failed, which torch calls outside of the stage. ``schedule.eval`` computes no
    gradients; it keeps the mode of the plan, so dropout wants a second plan, made from the model in evaluation mode. Shard a
    stage with ``fully_shard`` as a whole: it is one graph, its submodules have no forward of their own.

    Args:
        device: where the stage runs; its module is moved there.
        group: the ranks of this pipeline; the default group if None.
        submodule: what runs instead of ``plan.stages[index]``: the same, compiled or wrapped.
        activation_checkpointing: recompute the stage in the backward pass instead of keeping its activations.

    Raises:
        ConfigError: if the group has another number of ranks than the plan, or this rank is not the stage's.
        TransferError: while running, if ranks hold different plans, a transfer is not what the plan says, a gradient of a cached
            value is lost or doubled, or a peer fails.
    """

    def __init__(
        self, plan: PipelinePlan, index: int, *, device: torch.device | str, group: dist.ProcessGroup | None = None,
        submodule: nn.Module | None = None, activation_checkpointing: bool = False,
    ) -> None:  # fmt: skip
        check_place(plan, index, group)
        self.plan, self.transport = plan, plan.transport[index]
        self.cache, self._step_gradients = _SHARED.setdefault(plan, {}).setdefault(group, (BlockCache(), StepGradients()))
        self.activation_checkpointing = activation_checkpointing
        self._given = [plan.value(name) for name in self.transport.receives]
        self._sent = [plan.value(name) for name in self.transport.sends]
        # Gradients of what this stage makes and only the cache takes come from there alone.
        sent_or_given = {*self.transport.sends, *self.transport.receives}
        self._only_kept = [name for name in self.transport.keeps if name not in sent_or_given]
        here = [i for i, rank in enumerate(plan.placement) if rank == plan.placement[index]]
        self._readers = {
            name: [i for i in here if name in plan.transport[i].fetches] for name in self.transport.keeps
        }  # fmt: skip
        self._arrived: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._leaves: dict[int, dict[int, str]] = {}
        self._relayed: dict[int, dict[str, Tensor | None]] = {}
        self._transfers: dict[int, list[Transfer]] = {}
        self._under_way: collections.deque[list[Transfer]] = collections.deque()
        module = plan.stages[index] if submodule is None else submodule
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ConfigError(
                f"stage {index} has parameters on the meta device; call plan.stages[{index}].to_empty(device=...) and load them "
                "first."
            )
        number, device = plan.num_stages, torch.device(device)
        module.to(device)
        if index == 0:
            stage = plan.stages[0]
            assert plan.signature is not None and isinstance(stage, torch.fx.GraphModule)
            self._signature = signature_on(plan.signature, stage.graph, device)
        inputs, outputs = self._examples(index)
        super().__init__(module, index, number, device, input_args=inputs, output_args=outputs, group=group)

    def _examples(self, index: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        stage = self.plan.stages[index]
        assert isinstance(stage, torch.fx.GraphModule)
        inputs = tuple(map(_example, self._given))
        outputs = tuple(map(_example, self._sent))
        if index == 0:
            inputs = tuple(_on_meta(value_of(node)) for node in stage.graph.find_nodes(op="placeholder"))
        if index == self.plan.num_stages - 1:
            outputs = tuple(_on_meta(value_of(node)) for node in stage.graph.output_node().all_input_nodes)
        return inputs, outputs

    def warm_up(self) -> None:
        """Run the stage forward and backward on zeros, so that a compiled one is compiled before others wait for it.

        Under ``torch.no_grad()`` it runs forward alone, as ``schedule.eval`` does. Gradients, buffers and the state of random
        numbers stay as they are.
        """
        self._check_surroundings()
        examples = [*self._examples(self.stage_index)[0], *(_example(self.plan.value(name)) for name in self.transport.fetches)]
        training = torch.is_grad_enabled()
        inputs = [
            torch.zeros_like(tensor, device=self.device, requires_grad=training and tensor.requires_grad) for tensor in examples
        ]
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.submod.buffers()]
        gradients = StepGradients()
        gradients.begin(self.stage_index, self.submod.parameters())
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type != "cpu" else []):
                outputs = [tensor for tensor in tree_leaves(self._run(inputs, self.submod)) if tensor.requires_grad]
                if outputs:
                    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
        finally:
            gradients.abandon()
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    # Preparation

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        check_schedule(self.plan, dict(self.stage_index_to_group_rank))
        check_ties(self.plan, self.group_rank)
        if not self.cache.plans_agree:
            receives, sends = [value.name for value in self._given], [value.name for value in self._sent]
            compare_plans(self.plan, self.group, wire_problem(self.plan, self.stage_index, receives, sends))
            self.cache.plans_agree = True
        # Buffers are made when they are needed: torch would make those of all microbatches here, and torch 2.11 would ask for
        # gradients of whole numbers. What is left describes one microbatch.
        had_backward, self.has_backward = self.has_backward, False
        try:
            prepared = super()._prepare_forward_infra(1, *args, **kwargs)
        finally:
            self.has_backward = had_backward
        for info in self.args_recv_info[0]:
            if getattr(info, "buffer", None) is not None:
                info.buffer = torch.empty(0)
        return prepared

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """In torch 2.11, without those from a rank to itself that V schedules would have it make."""
        return [operation for operation in super()._get_init_p2p_neighbors_ops() if operation.group_peer != self.group_rank]

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_backward_infra(0, *args, **kwargs)
        self.chunks = num_microbatches
        return prepared

    def _post_metadata_inference_cleanup(self) -> None:
        """Nothing ran to find out shapes. torch would drop gradients of sharded parameters here."""

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self._clear()
        self._check_surroundings()
        self._step_gradients.begin(self.stage_index, self.submod.parameters() if self.has_backward else ())

    def _check_surroundings(self) -> None:
        stage = self.plan.stages[self.stage_index]
        assert isinstance(stage, torch.fx.GraphModule)
        check_surroundings(self.stage_index, stage, self.submod, self.device.type, (*self._sent, *self._given))

    def _clear(self) -> None:
        self.cache.clear()
        for held in (self._arrived, self._gradients, self._leaves, self._relayed, self._transfers):
            held.clear()
        self._under_way.clear()

    @contextlib.contextmanager
    def _cleared_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """The step failed: hold nothing of it."""
        self._clear()
        self._step_gradients.abandon()
        for held in (self.fwd_cache, self.bwd_cache, self.backward_state, self.dw_runner):
            held.clear()
        self.output_chunks.clear()

    # Forward

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *more: Any, **options: Any
    ) -> Any:
        with self._cleared_on_error():
            if self.is_first:
                args = tuple(self._signature.flatten(args, kwargs or {}))
            fetched = {f"{_FETCHED}{name}": self._fetch(fwd_chunk_id, name) for name in self.transport.fetches}
            if self.has_backward:
                self._leaves[fwd_chunk_id] = {id(leaf): key.removeprefix(_FETCHED) for key, leaf in fetched.items()}
            self._kept: dict[str, Tensor] = {}
            with torch.set_grad_enabled(self.has_backward and torch.is_grad_enabled()):
                output = super().forward_one_chunk(fwd_chunk_id, args, fetched, *more, **options)
            kept, self._kept = self._kept, {}
            for name, value in kept.items():
                self.cache.put(fwd_chunk_id, name, value.detach().contiguous())
            for name in self.transport.frees:
                self.cache.drop(fwd_chunk_id, name)
            outputs, inputs = self.fwd_cache[fwd_chunk_id]
            self.fwd_cache[fwd_chunk_id] = (*outputs, *(_own(kept[name]) for name in self._only_kept)), inputs
            if not self.has_backward and self.is_last:
                del self.fwd_cache[fwd_chunk_id]
            return output

    def _fetch(self, microbatch: int, name: str) -> Tensor:
        value = self.cache.get(microbatch, name).detach()
        return value.requires_grad_(self._needs_gradient(self.plan.value(name)))

    def _needs_gradient(self, value: CutValue) -> bool:
        return value.differentiable and self.has_backward and torch.is_grad_enabled()

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        arrived = self._arrived.pop(fwd_chunk_id)
        return tuple(
            tensor.requires_grad_(self._needs_gradient(value)) for value, tensor in zip(self._given, arrived, strict=True)
        )

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *(kwargs[f"{_FETCHED}{name}"] for name in self.transport.fetches))
        made = self._run(inputs, super().forward_maybe_with_nosync)
        if self.is_last:
            return made[0] if len(made) == 1 else tuple(made)
        sent, kept = made
        self._kept = dict(zip(self.transport.keeps, kept, strict=True))
        return tuple(map(_own, sent))

    def _run(self, inputs: Sequence[Tensor], module: Callable[..., Any]) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    # Backward

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        if not self.has_backward:
            return
        with self._cleared_on_error():
            self._delivered(bwd_chunk_id)
            self._microbatch = bwd_chunk_id
            self._relayed[bwd_chunk_id] = {}
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
            loss = kwargs.get("loss") if kwargs.get("full_backward", True) else None
            if isinstance(loss, Tensor) and not loss._is_view():
                loss.detach_()  # torch keeps losses until the step ends, and with their graphs what entered the last stage
            relayed = self._relayed.pop(bwd_chunk_id)
            if self.is_first:
                return
            gradients = list(self.bwd_cache[bwd_chunk_id][: len(self._given)])
            for i, value in enumerate(self._given):
                gradients[i] = _sum(gradients[i], relayed.pop(value.name, None))
                if value.name in self.transport.keeps and value.differentiable:
                    gradients[i] = _sum(gradients[i], self._collect(bwd_chunk_id, value.name))
            self.bwd_cache[bwd_chunk_id] = tuple(gradients)
            assert not relayed, relayed

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self._cleared_on_error():
            try:
                super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            except RuntimeError as error:
                if "_input_metadata" not in str(error):
                    raise
                raise ConfigError(
                    f"torch {torch.__version__} can't compute the gradients of weights apart through custom operators, such as "
                    "sites, which zero-bubble schedules ask for; use Interleaved1F1B, or torch 2.13."
                ) from error

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        super().perform_reduce_grad(1)
        self.scale_grads(grad_scale_factor)

    def scale_grads(self, grad_scale_factor: int) -> None:
        self._step_gradients.finish(self.stage_index, grad_scale_factor)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        received = self._gradients.pop(bwd_chunk_id)
        gradients: list[Tensor | None] = []
        for value, gradient in zip(self._sent, received, strict=True):
            if value.name in self.transport.relays:
                self._relayed[bwd_chunk_id][value.name] = gradient
                gradients.append(None)
            elif value.name in self.transport.keeps and value.differentiable:
                gradients.append(_sum(gradient, self._collect(bwd_chunk_id, value.name)))
            else:
                gradients.append(gradient)
        for name in self._only_kept:
            gradients.append(self._collect(bwd_chunk_id, name) if self.plan.value(name).differentiable else None)
        return tuple(gradients)

    def _collect(self, microbatch: int, name: str) -> Tensor | None:
        return self.cache.collect(microbatch, name, self._readers[name])

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]] | None]:
        if backward_type != "weight" and bwd_kwargs["output_grads"] is not None:
            _keep_those_with_gradients(bwd_kwargs)
        if backward_type == "input" and self.plan.two_phase:
            raise ConfigError(
                "zero-bubble schedules compute the gradients of weights apart, which torch can do where one operation reads each "
                "parameter; call partition with two_phase=False, so that one site reads each query."
            )
        gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        leaves = self._leaves.pop(self._microbatch, {}) if backward_type != "weight" else {}
        for tensor, gradient in zip(bwd_kwargs.get("input_values", ()), gradients or (), strict=False):
            name = leaves.get(id(tensor))
            if name is not None and self.plan.value(name).differentiable:
                owed = _sum(gradient, self._relayed[self._microbatch].pop(name, None))
                self.cache.deposit(self._microbatch, name, self.stage_index, owed)
        return gradients, groups

    # Transfers

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        buffers = [empty_like(value, self.device) for value in self._given]
        self._arrived[fwd_chunk_id] = buffers
        return self._operations(dist.irecv, buffers, self._given, fwd_chunk_id, -1, is_gradient=False)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        made = self.fwd_cache[fwd_chunk_id][0] if self.has_backward else self.fwd_cache.pop(fwd_chunk_id)[0]
        return self._operations(dist.isend, list(made[: len(self._sent)]), self._sent, fwd_chunk_id, 1, is_gradient=False)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last or not self.has_backward:
            return []
        buffers = [empty_like(value, self.device) if value.differentiable else None for value in self._sent]
        self._gradients[bwd_chunk_id] = list(buffers)
        return self._operations(dist.irecv, buffers, self._sent, bwd_chunk_id, 1, is_gradient=True)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first or not self.has_backward:
            return []
        return self._operations(dist.isend, self._owed(bwd_chunk_id), self._given, bwd_chunk_id, -1, is_gradient=True)

    def _owed(self, microbatch: int) -> list[Tensor | None]:
        """The gradients of what was received; zeros where it made no difference, as the other side waits for them."""
        gradients = self.bwd_cache.pop(microbatch)
        return [
            (torch.zeros_like(empty_like(value, self.device)) if gradient is None else gradient) if value.differentiable else None
            for value, gradient in zip(self._given, gradients, strict=True)
        ]

    def _operations(
        self, kind: Any, tensors: list[Any], values: list[CutValue], microbatch: int, step: int, is_gradient: bool
    ) -> list[dist.P2POp]:
        neighbour = self.stage_index + step
        placement = self.plan.placement
        route = Route(
            self.stage_index, placement[self.stage_index], neighbour, placement[neighbour], microbatch, is_gradient
        )  # fmt: skip
        pairs = [(value, tensor) for value, tensor in zip(values, tensors, strict=True) if tensor is not None]
        sends = kind is dist.isend
        with self._cleared_on_error():
            ready = [check(tensor, value, route) if sends else tensor for value, tensor in pairs]
        group = self.group or dist.group.WORLD
        assert group is not None
        peer = dist.get_global_rank(group, placement[neighbour])
        made = operations(kind, ready, [value for value, _ in pairs], route, peer, self.group, self._abandon)
        if sends:
            self._remember(microbatch, is_gradient, [made_for.op for made_for in made if isinstance(made_for.op, Transfer)])
        return made

    def _remember(self, microbatch: int, is_gradient: bool, transfers: list[Transfer]) -> None:
        """torch holds what is sent until the end of the step. Let go of it when it has certainly arrived.

        What a gradient came back for has. The rest has when as many more microbatches went the same way as there are stages:
        no schedule runs further ahead.
        """
        if not is_gradient and self.has_backward:
            self._transfers[microbatch] = transfers
            return
        self._under_way.append(transfers)
        if len(self._under_way) > self.num_stages:
            _wait(self._under_way.popleft())

    def _delivered(self, microbatch: int) -> None:
        _wait(self._transfers.pop(microbatch, []))

    # Neighbours on one rank

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self._arrived[mb_index] = [tensor.detach().contiguous() for tensor in prev_stage_outputs]

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return tuple(self._owed(mb_index)) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            self._gradients[mb_index] = list(next_stage_bwd_outputs)


def _wait(transfers: list[Transfer]) -> None:
    for transfer in transfers:
        if isinstance(transfer.work, PendingTransfer):
            transfer.work.wait()


def _example(value: CutValue) -> Tensor:
    return torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta", requires_grad=value.differentiable)


def _on_meta(value: Any) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


class _Own(torch.autograd.Function):
    """Passes a value on as no view: zero-bubble schedules detach a stage's outputs in place."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _own(value: Tensor) -> Tensor:
    if not value.requires_grad or not (value._is_view() or value.is_leaf):
        return value
    owned: Tensor = _Own.apply(value)  # type: ignore[no-untyped-call]
    return owned


def _keep_those_with_gradients(bwd_kwargs: dict[str, Any]) -> None:
    """torch 2.11 asks for gradients of outputs that have none."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], strict=True)
        if output.requires_grad
    ]
    bwd_kwargs["stage_output"] = tuple(output for output, _ in pairs)
    bwd_kwargs["output_grads"] = tuple(gradient for _, gradient in pairs)


def has_one_stage_per_rank(schedule: str) -> bool:
    """Whether a schedule of torch's, by name, runs one stage on every rank."""
    return issubclass(schedules.get_schedule_class(schedule), schedules.PipelineScheduleSingle)


def computations(schedule: str, ranks: int, microbatches: int, virtual: int) -> list[list[tuple[int, str, int]]]:
    """What every rank computes in a step of torch's schedule: stages, "F", "B", "I" or "W", and microbatches, in order.

    A forward and a backward that DualPipeV overlaps come one after the other. No process group is needed.
    """
    rows = _schedule_visualizer.get_schedule_ops(schedule, ranks, microbatches, virtual)
    parts = [[part for action in row if action is not None for part in action.sub_actions or (action,)] for row in rows]
    return [
        [
            (part.stage_index, part.computation_type.value, part.microbatch_index)
            for part in row
            if part.computation_type.value in "FBIW" and part.microbatch_index is not None
        ]
        for row in parts
    ]
