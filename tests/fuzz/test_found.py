"""What random networks, and modules written beside them, found wrong: each once, as small as it gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnres_compile as ac

WIDTH, LAYERS = 8, 6
Layer = Callable[["Stack", int, Tensor, Tensor, list[Tensor]], Tensor]


class Stack(nn.Module):
    """Patches ``[2, 5, 3]`` and a condition ``[2, 5, D]`` through layers that a function describes, to a final norm."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.embed, self.project, self.final = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.double()

    def branch(self, i: int, x: Tensor) -> Tensor:
        result: Tensor = self.maps[i](self.norms[i](x))
        return result

    def forward(self, patches: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        aux: list[Tensor] = []
        x = self.embed(patches)
        for i in range(LAYERS):
            x = self.layer(self, i, x, side, aux)
        return (self.final(x), *aux)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, WIDTH, dtype=torch.float64)


def chains_of(model: nn.Module) -> list[tuple[str, int, int]]:
    return [(chain.kind, chain.num_sublayers, chain.num_sites) for chain in ac.detect(model, args=inputs()).chains]


def is_refused_or_preserved(model: Stack) -> bool:
    """Whether ``model`` is refused, or computes what it computed, gradients included."""
    try:
        rewritten = ac.rewrite(model, ac.AttnResConfig(variant="full"), args=inputs())
    except ac.NoResidualChainError:
        return True
    found, expected = rewritten(*inputs()), model(*inputs())
    if not all(torch.allclose(f, e, rtol=1e-12, atol=1e-12) for f, e in zip(found, expected, strict=True)):
        return False
    weights = torch.linspace(-1, 1, expected[0].numel(), dtype=torch.float64).view_as(expected[0])
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad((out[0] * weights).sum(), parameters, allow_unused=True) for out in (found, expected)]
    return all(
        torch.allclose(torch.zeros(()).double() if f is None else f, torch.zeros(()).double() if e is None else e, atol=1e-11)
        for f, e in zip(*gradients, strict=True)
    )


def _conditioned(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    x = x + model.branch(i, x) * side
    return x + side if i == 3 else x


def test_a_condition_that_branches_read_and_the_stream_takes_up() -> None:
    """The condition was taken for the stream, and the stream so far for a branch of it."""
    assert chains_of(Stack(_conditioned)) == [("prenorm", LAYERS, LAYERS)]


class Rounded(Stack):
    """Rounded embeddings, and another embedding added to them."""

    def forward(self, patches: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(patches)
        x = x + (x.round() - x).detach()
        x = x + self.project(side)
        for i in range(LAYERS):
            x = x + self.branch(i, x)
        return (self.final(x),)


def test_embeddings_rounded_straight_through_and_summed() -> None:
    """The second embedding was counted as a sublayer: sums of embeddings are one source."""
    assert chains_of(Rounded(_conditioned)) == [("prenorm", LAYERS, LAYERS)]


def _transposed_at_last(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    b = model.branch(i, x)
    return x + b if i < LAYERS - 1 else (x.transpose(1, 2) + b.transpose(1, 2)).transpose(1, 2)


class Pooled(Stack):
    """The final norm reads the average of the tokens."""

    def forward(self, patches: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(patches)
        for i in range(LAYERS):
            x = _transposed_at_last(self, i, x, side, [])
        return (self.final(x.mean(1)),)


@pytest.mark.parametrize("model_class", [Stack, Pooled])
def test_the_final_norm_reads_a_sum_in_another_layout(model_class: type[Stack]) -> None:
    """It kept the plain sum: there is no path of a following add that would say where the features are."""
    model = model_class(_transposed_at_last)
    assert chains_of(model) == [("prenorm", LAYERS, LAYERS)]
    assert is_refused_or_preserved(model)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda b: F.relu(b, True),
    "silu": lambda b: F.silu(b, True),
    "leaky_relu": lambda b: F.leaky_relu(b, 0.1, True),
    "hardtanh": lambda b: F.hardtanh(b, -0.1, 0.1, True),
    "dropout": lambda b: F.dropout(b, 0.999999, True, True),
    "threshold": lambda b: F.threshold(b, 0.1, 20.0, True),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_branch_overwritten_by_a_positional_flag(name: str) -> None:
    """``F.relu(b, True)`` behind the add was not seen as a write into a source of all later sites."""

    def layer(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
        b = model.branch(i, x)
        x = x + b
        aux.append(IN_PLACE[name](b))
        return x

    model = Stack(layer)
    with torch.no_grad():
        try:
            rewritten = ac.rewrite(model, ac.AttnResConfig(variant="full"), args=inputs())
        except ac.NoResidualChainError as error:
            assert "place" in str(error)
        else:
            torch.testing.assert_close(rewritten(*inputs())[0], model(*inputs())[0], rtol=1e-12, atol=1e-12)


def _frozen_below(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    if i < 2:
        with torch.no_grad():
            return x + model.branch(i, x)
    return x + model.branch(i, x)


def test_layers_under_no_grad_cut_the_gradient_of_the_stream() -> None:
    """Sites above read the embedding past the layers, and gave it a gradient that the model does not."""
    assert is_refused_or_preserved(Stack(_frozen_below))


def _over_tokens_too(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    return x + model.maps[i](F.layer_norm(x, (5, WIDTH)))


def _by_the_first_token(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    return x + model.maps[i](x / (x[:, :1].norm(dim=-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    "layer", [_over_tokens_too, _by_the_first_token], ids=["layer norm over tokens too", "by the first token"]
)
def test_norms_over_more_than_the_features(layer: Layer) -> None:
    """They normalise no feature vector by itself, as GroupNorm over pixels does not."""
    assert chains_of(Stack(layer)) == []


def _sum_given_out(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    b = model.branch(i, x)
    aux.append((x + b).detach())
    return x + b


def _difference_normed(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    y = x + model.branch(i, x)
    aux.append(F.layer_norm(y - x, (WIDTH,)))
    return y


@pytest.mark.parametrize("layer", [_sum_given_out, _difference_normed], ids=["the sum computed twice", "the difference normed"])
def test_sums_beside_the_stream(layer: Layer) -> None:
    """Sums that nothing carries on are readers, and no fragments of the stream."""
    assert chains_of(Stack(layer)) == [("prenorm", LAYERS, LAYERS)]


def _masked_fill(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    return (x + model.branch(i, x)).masked_fill(side[..., :1] > 1, 0.0)


def test_a_mask_by_masked_fill() -> None:
    assert chains_of(Stack(_masked_fill)) == [("prenorm", LAYERS, LAYERS)]


def _sandwich_by_einsum(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    b = model.branch(i, x)
    return x + b * torch.rsqrt(torch.einsum("...d,...d->...", b, b).unsqueeze(-1) / WIDTH + 1e-6)


def test_a_norm_behind_the_branch_spelled_with_einsum() -> None:
    """The kind was prenorm: an inner product was no part of a norm's pattern."""
    assert chains_of(Stack(_sandwich_by_einsum)) == [("sandwich", LAYERS, LAYERS)]


def _rejoined(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    x = x + model.branch(i, x)
    return torch.cat([x[:, :1], x[:, 1:]], 1)


def test_the_verdict_does_not_depend_on_dynamic_shapes() -> None:
    """With sizes that are symbols, slices side by side were no longer the tensor, and the chain was shorter."""
    model = Stack(_rejoined)
    ac.convert_(model, ac.AttnResConfig(variant="block", block_size=4), args=inputs())
    compiled = torch.compile(model, backend="attnres", dynamic=True, options={"variant": "block", "block_size": 4})
    expected = Stack(_rejoined)
    expected.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("attnres.")})
    torch.testing.assert_close(compiled(*inputs()), expected(*inputs()), rtol=1e-12, atol=1e-12)


def _by_einsum_behind_another_layout(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    n = x * torch.rsqrt(torch.einsum("...d,...d->...", x, x).unsqueeze(-1) / WIDTH + 1e-6)
    return (x.transpose(1, 2) + model.maps[i](n).transpose(1, 2)).transpose(1, 2) if i % 2 else x + model.maps[i](n)


def test_a_norm_spelled_with_einsum_says_where_its_features_are() -> None:
    """Its dimension was not known, so that two layouts of the stream seemed to have features, of different widths."""
    model = Stack(_by_einsum_behind_another_layout)
    assert chains_of(model) == [("prenorm", LAYERS, LAYERS)]
    assert is_refused_or_preserved(model)


def _halved_parallel(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    if i:
        return x
    n = model.norms[0](x)
    return torch.lerp(torch.lerp(x, model.maps[0](n), 0.5), model.maps[1](n), 0.5)


def test_the_first_norms_read_what_the_first_add_scales() -> None:
    """Refused with "no sublayer is computed from what the norms give": they read x, and the first add x / 2."""
    assert chains_of(Stack(_halved_parallel)) == [("parallel", 1, 1)]


def test_a_table_added_at_the_end() -> None:
    """What was added last, of the stream's full shape, was taken for the bias of a head: the final norm kept the plain sum."""

    class Positioned(Stack):
        def forward(self, patches: Tensor, side: Tensor) -> tuple[Tensor, ...]:
            x = self.embed(patches)
            for i in range(LAYERS):
                x = x + self.branch(i, x)
            return (self.final(x + self.positions),)

    model = Positioned(_conditioned)
    model.positions = nn.Parameter(torch.randn(5, WIDTH, dtype=torch.float64))
    assert chains_of(model) == [("prenorm", LAYERS, LAYERS)]


def _doubled_in_place(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
    earlier = x
    x -= model.branch(i, x.clone())  # a norm keeps its input for the backward pass
    return x + earlier if i == 1 else x


def test_what_is_added_to_itself_under_two_names() -> None:
    """Refused as a single residual add: after ``x -= f`` the sum of x and what x was called before is 2 x, seen too late."""
    model = Stack(_doubled_in_place)
    assert chains_of(model) == [("prenorm", LAYERS, LAYERS)]
    assert is_refused_or_preserved(model)


def test_a_stream_that_begins_with_index_add_to_an_input() -> None:
    """One sublayer and its site were missing: the first add was looked for behind a computation alone."""

    class Tokenwise(Stack):
        def forward(self, patches: Tensor, side: Tensor) -> tuple[Tensor, ...]:
            x = side
            for i in range(LAYERS):
                x = x.index_add(1, torch.arange(x.shape[1]), self.branch(i, x))
            return (self.final(x),)

    model = Tokenwise(_conditioned)
    assert chains_of(model) == [("prenorm", LAYERS, LAYERS)]
    assert is_refused_or_preserved(model)


def test_another_stream_that_branches_see_is_no_part_of_a_stream_that_a_norm_cuts() -> None:
    """The last two sublayers were refused as a fragment: an encoder that the decoder attends to was counted in."""

    class Decoder(Stack):
        def forward(self, patches: Tensor, side: Tensor) -> tuple[Tensor, ...]:
            memory = self.embed(patches)
            for i in (0, 1):
                memory = memory + self.branch(i, memory)
            x = self.project(side)
            for i in (2, 3, 4, 5):
                x = self.project(x) if i == 4 else x
                x = x + self.branch(i, x) * memory
            return (self.final(x),)

    assert chains_of(Decoder(_conditioned)) == [("prenorm", 2, 1)] * 2 + [("prenorm", 2, 2)]


def test_the_features_of_an_average_of_tokens() -> None:
    """The query had the width of the tokens: adds in another layout, and a norm of what was averaged over tokens alone."""

    class Pooled(Stack):
        def forward(self, patches: Tensor, side: Tensor) -> tuple[Tensor, ...]:
            x = self.embed(patches)
            n = self.norms[0](x)
            for i in range(2):
                x = (x.transpose(1, 2) + self.maps[i](n).transpose(1, 2)).transpose(1, 2)
            pooled = x.mean(1)
            return (pooled / (pooled.square().mean(-1, keepdim=True) + 1e-6).sqrt(),)

    (chain,) = ac.detect(Pooled(_conditioned), args=inputs()).chains
    assert {site.hidden_size for site in chain.sites} == {WIDTH}
    assert is_refused_or_preserved(Pooled(_conditioned))


def test_an_average_over_tokens_that_is_normed_over_the_batch() -> None:
    """It had a site: of what was averaged, no dimension was looked at."""

    def batch_norm(model: Stack, i: int, x: Tensor, side: Tensor, aux: list[Tensor]) -> Tensor:
        pooled = x.mean(1)
        aux.append(pooled / (pooled.square().mean(0, keepdim=True) + 1e-6).sqrt())
        return x + model.branch(i, x)

    report = ac.detect(Stack(batch_norm), args=inputs())
    assert [(chain.kind, chain.num_sublayers, chain.num_sites) for chain in report.chains] == [("prenorm", LAYERS, LAYERS)]
    assert sum("another dimension" in refusal.reason for refusal in report.refusals) == LAYERS
