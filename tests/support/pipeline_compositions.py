"""What ranks do in the tests of pipelines with other tools of training."""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pipelines
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import attnres_compile as ac
from attnres_compile.pipelining.states import rank_module

CONFIG = ac.AttnResConfig(block_size=3)
LAYERS, MICROBATCHES = 4, 3


def converted(model: nn.Module, dtype: torch.dtype = torch.float64, config: ac.AttnResConfig = CONFIG, **call: Any) -> nn.Module:
    """``model``, converted, with queries that are not zero."""
    model = model.to(dtype)
    ac.convert_(model, config, **(call or {"args": (pipelines.example(),)}))
    torch.manual_seed(1)
    for site in model.attnres.sites:  # type: ignore[union-attr]
        nn.init.normal_(site.query, std=0.3)
    return model


def plain(dtype: torch.dtype = torch.float64, layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    return converted(pipelines.Transformer(layers), dtype)


def each(name: str, *cases: tuple[Any, ...]) -> list[Any]:
    """What one of the functions below returns for each case."""
    return [globals()[name](*case) for case in cases]


class Run:
    """The stages of this rank with a schedule, held against the same model in one process."""

    def __init__(
        self, model: nn.Module, name: str = "1F1B", virtual: int = 1, microbatches: int = MICROBATCHES, loss: Any = None,
        group: Any = None, prepare: Callable[[ac.PipelinePlan, int], nn.Module | None] = lambda plan, i: None,
        call: dict[str, Any] | None = None, options: dict[str, Any] | None = None, plan: ac.PipelinePlan | None = None,
        **planned: Any,
    ) -> None:  # fmt: skip
        self.call = call or {"args": (pipelines.example(),)}
        self.model, self.microbatches = model, microbatches
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        self.plan = plan or ac.partition(model, size, virtual, **self.call, **planned)
        mine = [i for i, place in enumerate(self.plan.placement) if place == rank]
        self.stages = [
            ac.BlockCacheStage(self.plan, i, device="cpu", group=group, submodule=prepare(self.plan, i), **(options or {}))
            for i in mine
        ]
        self.schedule = pipelines.schedule_of(name, self.stages, microbatches)
        if loss is not None:
            self.schedule._loss_fn = loss

    @property
    def own(self) -> dict[str, nn.Parameter]:
        return {k: p for stage in self.stages for k, p in self.plan.stages[stage.stage_index].named_parameters()}

    @property
    def cache(self) -> Any:
        return self.stages[0].cache

    def step(self, tokens: Tensor, target: Tensor, evaluate: bool = False) -> Tensor | None:
        """The mean loss, on the last stage's rank, or what evaluation gives there."""
        output, losses = pipelines.step(self.schedule, self.stages, tokens, target, evaluate)
        return output if evaluate else torch.stack(losses).mean().detach() if losses else None

    def gradients(self) -> dict[str, Tensor]:
        return {k: p.grad.clone() for k, p in self.own.items() if p.grad is not None}


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    return pipelines.batch(MICROBATCHES, seed)


def whole_of(model: nn.Module, **call: Any) -> nn.Module:
    """The rewritten model with parameters of its own."""
    return copy.deepcopy(ac.rewrite(model, **(call or {"args": (pipelines.example(),)})))


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


def error_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error; every gradient of ``found`` must be expected."""
    assert found and found.keys() <= expected.keys(), found.keys() ^ expected.keys()
    return pipelines.largest_error(found, {k: expected[k] for k in found})


def difference(loss: Tensor | None, expected: Tensor) -> float:
    return 0.0 if loss is None else (loss - expected).abs().item()


# --------------------------------------------------------------------------------------------- checkpointing and dropout


class Dropping(pipelines.Transformer):
    """Drops parts of every layer's result."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        for layer in self.layers:
            query, key, value = layer.qkv(layer.norm1(x)).chunk(3, -1)
            x = x + F.dropout(layer.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)), 0.3, self.training)
            x = x + F.dropout(layer.down(F.gelu(layer.up(layer.norm2(x)))), 0.3, self.training)
        return self.head(self.norm(x))


def recomputed(name: str, virtual: int, placement: str = "looped", two_phase: bool = True) -> dict[str, Any]:
    """One step with and without activation checkpointing from the same random state, and once from another."""
    found = []
    for checkpointing, seed in ((False, 5), (True, 5), (True, 6)):
        torch.manual_seed(0)
        options = {"activation_checkpointing": checkpointing}
        run = Run(
            converted(Dropping(LAYERS)), name, virtual, 4, options=options, placement=placement, two_phase=two_phase
        )  # fmt: skip
        torch.manual_seed(seed + dist.get_rank())
        loss = run.step(*pipelines.batch(4))
        found.append((loss, run.gradients(), torch.get_rng_state()))
    (loss, gradients, state), (again, recomputed, state_again), (_, others, _) = found
    return {
        "error": error_of(recomputed, gradients), "loss": 0.0 if loss is None else abs(loss - again).item(),
        "state": torch.equal(state, state_again), "others": error_of(others, gradients),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- autocast


def sixteen_bits(two_phase: bool) -> dict[str, Any]:
    """Under autocast to bfloat16, and a model that is in bfloat16; then evaluation."""
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _like_one_process(plain(torch.float32), two_phase)
    return {"autocast": mixed, "pure": _like_one_process(plain(torch.bfloat16), two_phase)}


def _like_one_process(model: nn.Module, two_phase: bool) -> dict[str, Any]:
    whole = whole_of(model)
    tokens, target = pipelines.batch(4)
    expected = pipelines.reference_step(whole, tokens, target, 4)
    run = Run(model, "Interleaved1F1B", 2, 4, two_phase=two_phase)
    loss = run.step(tokens, target)
    with torch.no_grad():
        logits = torch.cat([whole(part) for part in tokens.split(pipelines.ROWS)])
    output = run.step(tokens, target, evaluate=True)
    return {
        "gradients": error_of(run.gradients(), gradients_of(whole)), "loss": difference(loss, expected), "held": len(run.cache),
        "output": 0.0 if output is None else (output - logits).abs().max().item(),
    }  # fmt: skip


def wrong_autocast(planned: bool) -> list[str]:
    """A plan made with (without) autocast, stepped without (with) it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=planned):
        run = Run(plain(torch.float32))
    texts = []
    for attempt in (lambda: run.step(*batch()), run.stages[0].warm_up):
        with torch.autocast("cpu", torch.bfloat16, enabled=not planned):
            texts.append(message_of(ac.TransferError, attempt))
    with torch.autocast("cpu", torch.bfloat16, enabled=planned):
        run.step(*batch())
    return texts


def wrong_mode(training: bool) -> str:
    """Stages that are set to another mode than the model was in."""
    torch.manual_seed(0)
    run = Run(converted(Dropping(LAYERS).train(not training)))
    for stage in run.stages:
        stage.submod.train(training)
    return message_of(ac.CaptureError, lambda: run.step(*batch()))


def message_of(kind: type[BaseException], attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


# ---------------------------------------------------------------------------------------------------- compiled stages


class Compilations:
    """A backend that counts what it compiles: forward and backward graphs."""

    def __init__(self, inductor: bool = False) -> None:
        self.forward = self.backward = 0
        if inductor:
            torch._inductor.config.force_disable_caches = True  # what a cache has is not compiled, and not counted
            self.backend = functools.partial(compile_fx, inner_compile=self._inner)
        else:
            self.backend = aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)

    def _forward(self, graph_module: Any, inputs: Any) -> Any:
        self.forward += 1
        return make_boxed_func(graph_module)

    def _backward(self, graph_module: Any, inputs: Any) -> Any:
        self.backward += 1
        return make_boxed_func(graph_module)

    def _inner(self, *arguments: Any, **options: Any) -> Any:
        if options.get("is_backward"):
            self.backward += 1
        else:
            self.forward += 1
        return compile_fx_inner(*arguments, **options)

    @property
    def counts(self) -> tuple[int, int]:
        return self.forward, self.backward


def compiled(inductor: bool, in_place: bool, name: str, virtual: int, checkpointing: bool) -> dict[str, Any]:
    """Warm up, train two steps, evaluate; count compilations after each."""
    compilations = Compilations(inductor)

    def prepare(plan: ac.PipelinePlan, index: int) -> nn.Module | None:
        if not in_place:
            return torch.compile(plan.stages[index], backend=compilations.backend)  # type: ignore[return-value]
        plan.stages[index].compile(backend=compilations.backend)
        return None

    torch.manual_seed(0)
    model = converted(pipelines.Transformer(1), config=ac.AttnResConfig(block_size=2)) if inductor else plain()
    whole = whole_of(model)
    run = Run(model, name, virtual, 4, prepare=prepare, options={"activation_checkpointing": checkpointing})
    for parameter in run.own.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    state = torch.get_rng_state()
    for stage in run.stages:
        stage.warm_up()
    untouched = torch.equal(state, torch.get_rng_state()) and all((p.grad == 2).all() for p in run.own.values())
    for parameter in run.own.values():
        parameter.grad = None
    counts, errors = [compilations.counts], []
    for seed in range(2):
        tokens, target = pipelines.batch(4, seed)
        expected = pipelines.reference_step(whole, tokens, target, 4)
        loss = run.step(tokens, target)
        errors.append(difference(loss, expected))
        counts.append(compilations.counts)
    errors.append(error_of(run.gradients(), gradients_of(whole)))
    with torch.no_grad():
        for stage in run.stages:
            stage.warm_up()
        counts.append(compilations.counts)
        logits = torch.cat([whole(part) for part in tokens.split(pipelines.ROWS)])
    for without_gradients in (True, False):
        with torch.set_grad_enabled(not without_gradients):
            output = run.step(tokens, target, evaluate=True)
        errors.append(0.0 if output is None else (output - logits).abs().max().item())
        counts.append(compilations.counts)
    run.step(tokens, target)
    counts.append(compilations.counts)
    return {"counts": counts, "error": max(errors), "untouched": untouched}


def compiled_zero_bubble() -> float:
    """Gradients of weights apart, through compiled graphs."""
    model = plain()
    whole = whole_of(model)
    run = Run(model, "InterleavedZeroBubble", 2, 4, two_phase=False)
    for stage in run.stages:
        stage.submod.compile(backend="aot_eager")
    tokens, target = pipelines.batch(4)
    pipelines.reference_step(whole, tokens, target, 4)
    run.step(tokens, target)
    assert run.gradients().keys() == run.own.keys()
    return error_of(run.gradients(), gradients_of(whole))


# --------------------------------------------------------------------------------------------------------------- FSDP


def sharded(name: str, virtual: int, meta: bool, checkpointing: bool) -> dict[str, Any]:
    """Two pipelines of two ranks, each with data of its own; two steps, the second accumulates; evaluation between them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    model = plain()
    whole = whole_of(model)
    expected = []
    for seed in range(2):
        for replica in range(2):
            loss = pipelines.reference_step(whole, *pipelines.batch(4, 10 * seed + replica), 4)
            if replica == mesh["dp"].get_local_rank():
                expected.append(loss)

    def prepare(plan: ac.PipelinePlan, index: int) -> nn.Module | None:
        stage = plan.stages[index]
        if meta:
            assert all(parameter.is_meta for parameter in stage.parameters())
            stage.to_empty(device="cpu")
            stage.load_state_dict({key: whole.state_dict()[key] for key in stage.state_dict()})
        fully_shard(stage, mesh=mesh["dp"])
        return None

    call = None
    if meta:
        model = copy.deepcopy(model).to("meta")
        call = {"args": (pipelines.example().to("meta"),)}
    with torch.device("meta") if meta else contextlib.nullcontext():
        group = mesh["pp"].get_group()
        plan = ac.partition(model, 2, virtual, **(call or {"args": (pipelines.example(),)}))
    run = Run(
        model, name, virtual, 4, group=group, prepare=prepare, plan=plan, options={"activation_checkpointing": checkpointing}
    )
    errors = []
    for stage in run.stages:
        stage.warm_up()
    for seed in range(2):
        tokens, target = pipelines.batch(4, 10 * seed + mesh["dp"].get_local_rank())
        errors.append(difference(run.step(tokens, target), expected[seed]))
        output = run.step(tokens, target, evaluate=True)
        with torch.no_grad():
            logits = torch.cat([whole(part) for part in tokens.split(pipelines.ROWS)])
        errors.append(0.0 if output is None else (output - logits).abs().max().item())
    named = dict(rank_module(run.stages).named_parameters())
    found = {key: parameter.grad.full_tensor() for key, parameter in named.items()}
    halves = {key: gradient / 2 for key, gradient in gradients_of(whole).items()}
    return {
        "gradients": error_of(found, halves),
        "loss": max(errors),
        "sharded": all(isinstance(p, DTensor) for p in named.values()),
    }


# ---------------------------------------------------------------------------------------- accumulation, frozen, tied, skips


def accumulated(name: str, virtual: int, placement: str, two_phase: bool, trained: str) -> dict[str, Any]:
    """Two steps without zero_grad."""
    model = plain()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_({"all": True, "queries": key.endswith("query"), "body": "embedding" not in key}[trained])
    whole = whole_of(model)
    boundaries = [1] if virtual == 1 else None  # queries alone: the first stage then has none
    run = Run(model, name, virtual, 4, placement=placement, two_phase=two_phase, boundaries=boundaries)
    for stage in run.stages:
        stage.warm_up()
    errors = []
    for seed in range(2):
        expected = pipelines.reference_step(whole, *pipelines.batch(4, seed), 4)
        errors.append(difference(run.step(*pipelines.batch(4, seed)), expected))
    names = {key for key, parameter in run.own.items() if parameter.requires_grad}
    gradients = run.gradients()
    assert gradients.keys() == names
    error = error_of(gradients, gradients_of(whole)) if gradients else 0.0
    return {"error": max(error, *errors), "names": sorted(names), "held": len(run.cache)}


class Skipping(pipelines.Transformer):
    """The embedding scales what late layers add, and nothing reads that in between."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.gate = nn.Linear(pipelines.WIDTH, pipelines.WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        gate = torch.sigmoid(self.gate(x))
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        for number, layer in enumerate(self.layers):
            query, key, value = layer.qkv(layer.norm1(x)).chunk(3, -1)
            x = x + layer.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
            made = layer.down(F.gelu(layer.up(layer.norm2(x))))
            x = x + (made * gate if number == len(self.layers) // 2 else made)
        return self.head(self.norm(x))


def skipping(transport: str) -> dict[str, Any]:
    """A value that only a later stage of the rank that made it reads."""
    torch.manual_seed(0)
    model = converted(Skipping(LAYERS))
    whole = whole_of(model)
    tokens, target = pipelines.batch(4)
    expected = pipelines.reference_step(whole, tokens, target, 4)
    run = Run(model, "Interleaved1F1B", 2, 4, boundaries=[2, 4, 6], transport=transport)
    loss = run.step(tokens, target)
    only_kept = [name for stage in run.plan.transport for name in stage.keeps if name not in {*stage.sends, *stage.receives}]
    return {"error": max(error_of(run.gradients(), gradients_of(whole)), difference(loss, expected)), "only_kept": only_kept}


# -------------------------------------------------------------------------------------------------------- Transformers


def llama(by_name: bool) -> dict[str, Any]:
    """Token ids and a mask with padding, by name or by position."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=pipelines.VOCABULARY,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    example = {"input_ids": pipelines.example(), "attention_mask": torch.ones_like(pipelines.example())}
    model = converted(LlamaForCausalLM(config).train(), kwargs=example)
    whole = whole_of(model, kwargs=example)
    tokens, target = pipelines.batch(4)
    mask = torch.ones_like(tokens)
    mask[::2, -2:] = 0
    mask[1::4, :1] = 0
    target = target.masked_fill(mask == 0, -100)
    losses = [
        pipelines.loss_of(whole(input_ids=a, attention_mask=b).logits, c)
        for a, b, c in zip(*(part.split(pipelines.ROWS) for part in (tokens, mask, target)), strict=True)
    ]
    expected = torch.stack(losses).mean()
    expected.backward()
    run = Run(model, "Interleaved1F1B", 2, 4, call={"kwargs": example})
    found: list[Tensor] = []
    args, kwargs = ((), {"input_ids": tokens, "attention_mask": mask}) if by_name else ((tokens, mask), {})
    if run.stages[0].is_first:
        run.schedule.step(*args, **kwargs)
    else:
        run.schedule.step(target=target, losses=found)
    loss = torch.stack(found).mean() if found else None
    return {"gradients": error_of(run.gradients(), gradients_of(whole)), "loss": difference(loss, expected.detach())}


def gpt2(name: str) -> dict[str, Any]:
    """Tied embeddings: refused where their stages are on different ranks, right where they are on one."""
    config = GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=pipelines.VOCABULARY, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    example = {"input_ids": pipelines.example()}
    model = converted(GPT2LMHeadModel(config).train(), kwargs=example)
    refusals = [
        message_of(ac.PartitionError, functools.partial(ac.partition, model, 2, virtual, kwargs=example)) for virtual in (1, 2)
    ]
    whole = whole_of(model, kwargs=example)
    run = Run(model, name, 2, 4, call={"kwargs": example}, placement="folded", two_phase=False)
    errors = []
    for seed in range(2):
        tokens, target = pipelines.batch(4, seed)
        losses = [
            pipelines.loss_of(whole(input_ids=a).logits, b)
            for a, b in zip(tokens.split(pipelines.ROWS), target.split(pipelines.ROWS), strict=True)
        ]
        torch.stack(losses).mean().backward()
        errors.append(difference(run.step(tokens, target), torch.stack(losses).mean().detach()))
    found = run.gradients()
    expected = gradients_of(whole)
    expected |= {"lm_head.weight": expected["transformer.wte.weight"]}
    return {"gradients": error_of(found, expected), "loss": max(errors), "refusals": refusals, "names": sorted(found)}


# ---------------------------------------------------------------------------------------------------------- checkpoints


def saved(folder: str) -> tuple[float | None, dict[str, Any]]:
    """Two stages on each of two ranks: a step, a checkpoint, another step."""
    run = Run(plain(), "Interleaved1F1B", 2, 4)
    local = rank_module(run.stages)
    optimizer = adamw(local)
    run.step(*pipelines.batch(4, 0))
    optimizer.step()
    optimizer.zero_grad()
    dcp.save(state_of(local, optimizer), checkpoint_id=folder)
    loss = run.step(*pipelines.batch(4, 1))
    optimizer.step()
    return loss and loss.item(), arrays_of(local)


def adamw(module: nn.Module) -> Any:
    """Biases of keys have gradients that are rounding alone; the usual eps would blow them up by 1e8."""
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)


def arrays_of(module: nn.Module) -> dict[str, Any]:
    return {key: value.detach().numpy() for key, value in module.named_parameters()}


def state_of(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return {
        "model": get_model_state_dict(module),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=options),
    }


def load_into(module: nn.Module, optimizer: Any, folder: str) -> None:
    state = state_of(module, optimizer)
    dcp.load(state, checkpoint_id=folder)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )  # fmt: skip


def loaded(folder: str) -> tuple[float | None, dict[str, Any]]:
    """One stage on each rank, with other parameters until the checkpoint is loaded."""
    model = plain()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    run = Run(model, "1F1B", 1, 4)
    local = rank_module(run.stages)
    optimizer = adamw(local)
    load_into(local, optimizer, folder)
    loss = run.step(*pipelines.batch(4, 1))
    optimizer.step()
    return loss and loss.item(), arrays_of(local)


def loaded_alone(folder: str) -> tuple[float, dict[str, Any]]:
    """The converted model in one process."""
    model = plain()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    optimizer = adamw(model)
    load_into(model, optimizer, folder)
    loss = pipelines.reference_step(ac.rewrite(model, args=(pipelines.example(),)), *pipelines.batch(4, 1), 4)
    optimizer.step()
    return loss.item(), arrays_of(model)


# -------------------------------------------------------------------------------------------------------------- failures


@contextlib.contextmanager
def _failing(error: BaseException, after: int) -> Iterator[Callable[[Any], Any]]:
    calls = 0

    def pass_on(value: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return value

    yield pass_on


def failing(kind: str, name: str, virtual: int) -> dict[str, Any]:
    """On the last rank the model, the loss function, the backward pass or a user ends the step."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    last = dist.get_rank() == dist.get_world_size() - 1
    error: BaseException = KeyboardInterrupt() if kind == "interrupt" else ArithmeticError("no more")
    with _failing(error, 1) as check:
        loss = (lambda output, target: check(pipelines.loss_of(output, target))) if kind == "loss" else None
        run = Run(plain(), name, virtual, 4, group=group, loss=loss)
        for parameter in run.own.values():
            parameter.grad = torch.ones_like(parameter)
        if last and kind in ("forward", "interrupt"):
            run.stages[0].submod.register_forward_hook(lambda module, inputs, output: check(output))
        elif last and kind == "backward":
            run.own["head.bias"].register_hook(check)
        try:
            run.step(*pipelines.batch(4))
        except BaseException as caught:
            chain = [caught]
            while chain[-1].__cause__ is not None:
                chain.append(chain[-1].__cause__)
            found = [type(link).__name__ for link in chain], str(caught)
            chain.clear()
    dist.barrier()  # whoever failed is still there: the others run into the timeout
    held = len(run.cache)
    kept = all(parameter.grad is not None and (parameter.grad == 1).all() for parameter in run.own.values())
    for stage in run.stages:  # as the next step begins, here an evaluation
        stage.has_backward = False
        stage.clear_runtime_states()
    again = all(parameter.grad is not None and (parameter.grad == 1).all() for parameter in run.own.values())
    return {"found": found, "held": held, "kept": kept, "later": len(run.cache), "kept_later": again}
