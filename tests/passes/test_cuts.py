"""What crosses a cut, what is computed wherever it is read, and what can't be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from staged import check_plan, difference_from
from streams import SHAPE, WIDTH, Stream, plan_of, tokens, whole_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnres_compile as ac

TOLERANCE = 1e-13


@pytest.fixture(autouse=True)
def float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@torch.library.custom_op("attnres_tests::noise", mutates_args=())
def custom_noise(x: Tensor) -> Tensor:
    return torch.rand(x.shape)


@custom_noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Prepared(Stream):
    """Every branch is multiplied by what ``make`` made of the tokens."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6 * WIDTH))
        self.register_buffer("steps", torch.zeros(()))
        self.statistics = nn.BatchNorm1d(5, affine=False)
        self.make = make

    def prepare(self, tokens: Tensor) -> Any:
        return self.make(self, tokens)

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return super().branch(x, i, None) * (prepared[i % len(prepared)] if isinstance(prepared, tuple) else prepared)


def others(plan: ac.PipelinePlan) -> list[tuple[str, bool]]:
    """The dtype of every value that crosses and is no source of the stream, and whether gradients flow through it."""
    return [(value.dtype, value.differentiable) for value in plan.values if value.kind == "other"]


def check(model: nn.Module, args: tuple[Any, ...] | None = None) -> ac.PipelinePlan:
    """The stages of ``model`` compute what the whole does. The plan for two ranks."""
    args = (tokens(),) if args is None else args
    torch.manual_seed(1)
    whole = whole_of(model, args)
    plan = plan_of(whole)
    for checked in (plan, plan_of(whole, ranks=1, virtual=3, boundaries=[1, 5], cached=False)):
        check_plan(checked, whole)
        difference = difference_from(whole, checked, args)
        assert max(difference.output, difference.gradient) <= TOLERANCE
    return plan


# ------------------------------------------------------------------------------------- made once, or wherever it is read


def masked(model: Prepared, t: Tensor) -> Tensor:
    mask = torch.ones(5, 5).tril().repeat(2, 1, 1)
    mask.masked_fill_((t == 0)[:, None, :], 0.5)
    return mask.sum(-1, keepdim=True)


def assigned(model: Prepared, t: Tensor) -> Tensor:
    mask = torch.zeros(2, 5, 1)
    mask[:, 2:] = 1
    mask[0, 1] = t[0, 1].double()
    mask[:, 1:3].mul_(3)
    return mask.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor([[2.0]]))


def read_before_and_after(model: Prepared, t: Tensor) -> tuple[Tensor, Tensor]:
    before = t * 2
    t.clamp_(min=3)
    return before[..., None], t[..., None] * 3


def learned_into_zeros(model: Prepared, t: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(*SHAPE, WIDTH)
    first = mask[0]
    mask[:, 1:3] = model.embedding(t[:, 1:3])
    return mask, first


def counted(model: Prepared, t: Tensor) -> Tensor:
    return model.steps.add_(1) * 2


def rows_of(t: Tensor) -> Tensor:
    return F.one_hot(t, 16).double()[..., :WIDTH]


# What is made of the tokens: what crosses then beside the stream, and whether gradients flow through it.
TOKENS = [("int64", False)]
MADE: dict[str, tuple[Any, list[tuple[str, bool]]]] = {
    # by what is at hand everywhere
    "constant": (lambda m, t: torch.arange(5.0)[None, :, None], []),
    "scalar": (lambda m, t: t.shape[1] / 3, []),
    "mask": (lambda m, t: (t > 3).double()[..., None] + 1, TOKENS),
    "item": (lambda m, t: t.sum().item(), TOKENS),
    # random
    "rand": (lambda m, t: torch.rand(*SHAPE, 1), [("float64", False)]),
    "randn_like": (lambda m, t: torch.randn_like(t.double())[..., None], [("float64", False)]),
    "uniform_": (lambda m, t: torch.empty(*SHAPE, 1).uniform_(), [("float64", False)]),
    "bernoulli": (lambda m, t: torch.bernoulli(t.double() / 40)[..., None], [("float64", False)]),
    "binomial": (lambda m, t: torch.binomial(torch.full((2, 5, 1), 9.0), torch.full((2, 5, 1), 0.5)), [("float64", False)]),
    "gamma": (lambda m, t: torch._standard_gamma(torch.ones(2, 5, 1)), [("float64", False)]),
    "normal": (lambda m, t: torch.distributions.Normal(torch.zeros(WIDTH), 1.0).sample(), [("float64", False)]),
    "dropout": (lambda m, t: F.dropout(rows_of(t) + 1, 0.5), [("float64", False)]),
    "attention": (
        lambda m, t: F.scaled_dot_product_attention(*[rows_of(t)] * 3, dropout_p=0.5), [("float64", False)],
    ),
    "custom": (lambda m, t: torch.ops.attnres_tests.noise(t.double())[..., None], [("float64", False)]),
    # written in place
    "masked_fill_": (masked, [("float64", False)]),
    "setitem": (assigned, [("float64", False)]),
    "input": (read_before_and_after, [("int64", False), ("int64", False)]),
    "learned": (learned_into_zeros, [("float64", True), ("float64", True)]),
    "counter": (counted, [("float64", False)]),
    "statistics": (lambda m, t: m.statistics(t.double())[..., None], [("float64", False)]),
    # learned, of every kind
    "parameter": (lambda m, t: m.table.mean(), [("float64", True)]),
    "expanded": (lambda m, t: m.table.mean().expand(*SHAPE, WIDTH), [("float64", True)]),
    "bool": (lambda m, t: m.embedding(t).mean(-1, keepdim=True) > 0, [("bool", False)]),
    "integer": (lambda m, t: m.embedding(t).argmax(-1, keepdim=True), [("int64", False)]),
    "narrow": (lambda m, t: m.embedding(t).bfloat16(), [("bfloat16", True)]),
    "detached": (lambda m, t: m.embedding(t).detach() * 2, [("float64", False)]),
    "chunk": (lambda m, t: (m.table * 2).chunk(6), [("float64", True)] * 4),
    "split": (lambda m, t: m.table.split([WIDTH] * 6)[1:4], [("float64", True)] * 3),
    "unbind": (lambda m, t: m.table.view(6, WIDTH).unbind(), [("float64", True)] * 4),
    "topk": (lambda m, t: (m.embedding(t).topk(1).values, m.embedding(t).topk(1).indices), [("float64", True), ("int64", False)]),
    "aliases": (lambda m, t: (m.table[:WIDTH], m.table[:WIDTH].flip(0)), [("float64", True)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_what_crosses(name: str) -> None:
    make, crossing = MADE[name]
    assert others(check(Prepared(make))) == crossing


def test_complex_values_have_gradients() -> None:
    class Rotated(Prepared):
        def branch(self, x: Tensor, i: int, prepared: Tensor) -> Tensor:
            pairs = torch.view_as_complex(torch.tanh(self.mixes[i](x)).unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * prepared).flatten(-2)

    plan = check(Rotated(lambda m, t: torch.polar(torch.ones(WIDTH // 2), m.table[: WIDTH // 2])))
    assert others(plan) == [("complex128", True)]


def test_inputs_with_gradients() -> None:
    """What a loss owes to an input of the model adds up over the stages that read it."""

    class Conditioned(Stream):
        def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
            x = self.embedding(tokens)
            for i, norm in enumerate(self.norms):
                x = x + self.branch(norm(x), i, None) * (condition * 2)
            return self.head(self.norm(x))

    for requires_grad in (True, False):
        condition = torch.linspace(0, 1, WIDTH).requires_grad_(requires_grad)
        assert others(check(Conditioned(), (tokens(), condition))) == [("float64", requires_grad)]


# ------------------------------------------------------------------------------------------------- inputs and outputs


class Hidden(Stream):
    """Gives out the embedding and every state of the stream, early sums, an input and what is made of one, and numbers."""

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        states, auxiliary = [x], []
        for i, norm in enumerate(self.norms):
            added = self.branch(norm(x), i, None)
            auxiliary.append(added.square().mean())
            x = x + added
            states.append(x)
        return {
            "logits": self.head(self.norm(x)), "states": states, "auxiliary": sum(auxiliary),
            "tokens": (tokens, tokens * 2), "numbers": (3, None),
        }  # fmt: skip


class Labelled(Stream):
    def forward(self, tokens: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(tokens)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def test_outputs_of_early_stages() -> None:
    assert set(others(check(Hidden()))) == {("int64", False), ("float64", True)}


def test_an_input_of_the_last_stage() -> None:
    plan = check(Labelled(), (tokens(), tokens() + 1))
    labels = [value for value in plan.values if value.kind == "other"]
    assert [(value.producer, value.consumers) for value in labels] == [(0, (3,))]


# -------------------------------------------------------------------------------------------- higher-order operations


class Conditional(Stream):
    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        weight, bias = self.mixes[i].weight, self.mixes[i].bias
        return torch.cond(
            x.sum() > 0, lambda x: torch.tanh(F.linear(x, weight, bias)), lambda x: F.linear(x, weight, bias).sin(), (x,)
        )


class Batched(Stream):
    def prepare(self, tokens: Tensor) -> Tensor:
        return torch.vmap(lambda row: (row > 3).double() + 1)(tokens)[..., None]

    def branch(self, x: Tensor, i: int, prepared: Tensor) -> Tensor:
        return torch.vmap(lambda row: torch.tanh(self.mixes[i](row)))(x) * prepared


class Checkpointed(Stream):
    """Three sublayers to a checkpoint, with dropout, and noise that all of them read."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, noise = self.embedding(tokens), torch.rand(*SHAPE, 1)

        def three(x: Tensor, noise: Tensor, first: int) -> Tensor:
            for i in range(first, first + 3):
                x = x + F.dropout(self.branch(self.norms[i](x), i, None), 0.3, self.training) * noise
            return x

        for first in (0, 3):
            x = checkpoint(three, x, noise, first, use_reentrant=False)
        return self.head(self.norm(x))


class TwoStreams(nn.Module):
    """Two streams whose sublayers alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stream(), Stream()

    def forward(self, tokens: Tensor) -> Any:
        first, second = self.first, self.second
        x, y = first.embedding(tokens), second.embedding(tokens + 1)
        for i in range(Stream.depth):
            x = x + first.branch(first.norms[i](x), i, None)
            y = y + second.branch(second.norms[i](y), i, None)
        return first.head(first.norm(x)), second.head(second.norm(y))


def test_streams_that_alternate() -> None:
    whole = whole_of(TwoStreams())
    for plan in (plan_of(whole), plan_of(whole, 3, 1, cached=False)):
        check_plan(plan, whole)
        difference = difference_from(whole, plan, (tokens(),))
        assert max(difference.output, difference.gradient) <= TOLERANCE
        assert {value.label for value in plan.values} >= {"chain0.b0", "chain1.b0"}


@pytest.mark.parametrize("model_class", [Conditional, Batched, Checkpointed])
def test_higher_order_operations(model_class: type[nn.Module]) -> None:
    check(model_class())


def test_recompute_tags_stay() -> None:
    plan = check(Checkpointed())
    tagged = [any(node.meta.get("recompute") for node in stage.graph.nodes) for stage in plan.stages]  # type: ignore[union-attr]
    assert tagged == [True] * 4


# ---------------------------------------------------------------------------------------------- parameters and buffers


class Unread(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("dropped", torch.ones(2), persistent=False)


class Normalised(Stream):
    """Running statistics in every sublayer, each for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(self.depth))

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return self.statistics[i](self.mixes[i](x).transpose(1, 2)).transpose(1, 2)


class TiedBuffers(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.full((WIDTH,), 2.0))
        self.register_buffer("other", self.one)

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return super().branch(x, i, None) * (self.one if i % 2 else self.other)


def test_what_nothing_reads_is_kept_in_the_first_stage() -> None:
    first, *later = check(Unread()).stages
    for name in ("extra.weight", "kept"):
        assert name in first.state_dict()
        assert not any(name in stage.state_dict() for stage in later)
    assert "dropped" in dict(first.named_buffers())
    assert "dropped" not in first.state_dict()


@pytest.mark.parametrize("model_class", [Normalised, TiedBuffers])
def test_buffers(model_class: type[nn.Module]) -> None:
    assert others(check(model_class())) == []


class Shared(Stream):
    """Sublayers 0 and 3 use one weight."""

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return super().branch(x, 0 if i == 3 else i, None)


class Tied(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, self.embedding.num_embeddings, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("model_class", "name", "tied", "stages"),
    [(Shared, "mixes.0.weight", "", "0 and 2"), (Tied, "embedding.weight", r" \(tied to 'head\.weight'\)", "0 and 3")],
)
def test_shared_parameters(model_class: type[nn.Module], name: str, tied: str, stages: str) -> None:
    """Refused on different ranks, unless they are frozen. On one rank they are read by several stages, and trained once."""
    whole, boundaries = whole_of(model_class()), [1, 3, 5]
    with pytest.raises(ac.PartitionError, match=f"'{name}'{tied} is used in stages {stages}, on different ranks.*Untie it"):
        plan_of(whole, 4, 1, boundaries)
    plans = [plan_of(whole, 1, 4, boundaries), plan_of(whole, 2, 2, [1, 2, 3] if model_class is Shared else boundaries, "folded")]
    for parameter in (name, name.replace("weight", "bias")):
        if parameter in dict(whole.named_parameters()):
            whole.get_parameter(parameter).requires_grad_(False)
    for plan in (plan_of(whole, 4, 1, boundaries), *plans):
        check_plan(plan, whole)
        for trained in (False, True):
            whole.get_parameter(name).requires_grad_(trained)
            difference = difference_from(whole, plan, (tokens(),))
            assert max(difference.output, difference.gradient) <= TOLERANCE
    assert plans[0].notes[0] == f"{name} is read in stages {stages.replace(' and', ',')}"


# --------------------------------------------------------------------------------------------------------- refusals


class Counted(Stream):
    """Counts its calls in a buffer that all sublayers read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def prepare(self, tokens: Tensor) -> None:
        self.steps.add_(1)

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return super().branch(x, i, None) * self.steps


class CountedByView(Counted):
    def prepare(self, tokens: Tensor) -> Any:
        return self.steps.add_(1).view(1, 1, 1)

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return Stream.branch(self, x, i, None) * prepared


class Averaged(Counted):
    """One running mean for all sublayers."""

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        added = Stream.branch(self, x, i, None)
        self.steps.mul_(0.9).add_(added.detach().mean())
        return added


class SharedStatistics(Stream):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH, affine=False, momentum=0.1)
        self.statistics.num_batches_tracked = None

    def branch(self, x: Tensor, i: int, prepared: Any) -> Tensor:
        return self.statistics(self.mixes[i](x).transpose(1, 2)).transpose(1, 2)


class Collected(Stream):
    """Writes what every sublayer gives into one tensor."""

    def forward(self, tokens: Tensor) -> Any:
        x, auxiliary = self.embedding(tokens), torch.zeros(self.depth)
        for i, norm in enumerate(self.norms):
            added = self.branch(norm(x), i, None)
            auxiliary[i] = added.square().mean()
            x = x + added
        return self.head(self.norm(x)), auxiliary


class WrittenThroughView(Stream):
    """Stage 1 makes a view of what stage 0 made; a sublayer of stage 1 writes into it, and stage 2 reads both."""

    def forward(self, tokens: Tensor) -> Any:
        x, rows = self.embedding(tokens), torch.zeros(4)
        for i, norm in enumerate(self.norms):
            x = x + self.branch(norm(x), i, None) * (1 + rows.sum())
            if i == 2:
                part = rows[:2]
                part.fill_(x.detach().mean())
            if i == 4:
                x = x + part.sum() * 0
        return self.head(self.norm(x))


class Measured(Stream):
    def prepare(self, tokens: Tensor) -> float:
        return self.embedding(tokens).sum().item()

    def branch(self, x: Tensor, i: int, prepared: float) -> Tensor:
        return super().branch(x, i, None) * prepared


REFUSED = {
    Counted: r"'add_' \[.*self\.steps\.add_\(1\)\] writes in place, in stage 0, into 'steps', of which stage 1 has a copy",
    CountedByView: r"'add_' \[.*\] writes in place, in stage 0, into 'steps', of which stage 1 has a copy",
    Averaged: r"writes in place, in stage 0, into 'steps', of which stage 1 has a copy.*let one sublayer alone use it",
    SharedStatistics: r"\[module 'statistics', .*\] writes in place, in stage 0, into 'statistics\.running_mean', of which",
    Collected: r"\[.*auxiliary\[i\] = .*\] writes in place, in stage 1, into a value of stage 0 that crosses",
    WrittenThroughView: r"\[.*part\.fill_.*\] writes in place, in stage 1, into a value of stage 0 that crosses",
    Measured: r"'item' \[.*\.item\(\)\] would cross from one pipeline stage to a later one, and is no tensor but SymFloat",
}


@pytest.mark.parametrize("model_class", REFUSED)
def test_refused(model_class: type[nn.Module]) -> None:
    whole = whole_of(model_class())
    with pytest.raises(ac.PartitionError, match=REFUSED[model_class]) as refused:
        plan_of(whole, ranks=1, virtual=3, boundaries=[2, 4])
    assert "\n" not in str(refused.value)


def test_unknown_shapes_are_refused() -> None:
    class Selected(Stream):
        def prepare(self, tokens: Tensor) -> Tensor:
            return (self.embedding(tokens) > 0).nonzero()

        def branch(self, x: Tensor, i: int, prepared: Tensor) -> Tensor:
            return super().branch(x, i, None) * prepared.double().mean()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        whole = whole_of(Selected())
    with pytest.raises(ac.PartitionError, match=r"\.nonzero\(\)\] has a shape that depends on data"):
        plan_of(whole)


def test_dynamic_inputs_are_refused() -> None:
    given = tokens()
    torch._dynamo.mark_dynamic(given, 1)
    with pytest.raises(ac.ConfigError, match=r"depends on 's.*Leave mark_dynamic out"):
        ac.partition(Stream(), 2, args=(given,))
