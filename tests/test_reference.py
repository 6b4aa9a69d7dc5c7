"""The oracle itself: it is the definition, it meets the plain model at zero queries, and its float64 is float64."""

import math
from collections.abc import Callable

import pytest
import torch
from models import NAMES, TRANSFORMERS, example_inputs, tiny
from reference import ReferenceStream, attend, gpt2_logits, llama_logits, promote_to_float64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SUBLAYERS = 8
DECODERS: dict[str, Callable[..., Tensor]] = {
    "llama": llama_logits,
    "qwen3": llama_logits,
    "mistral": llama_logits,
    "gemma": llama_logits,
    "gpt2": gpt2_logits,
}
SPELLINGS = [(name, "sdpa") for name in NAMES] + [(name, "eager") for name in TRANSFORMERS]


def logits_of(model: nn.Module, name: str) -> Tensor:
    args, kwargs = example_inputs(name)
    output = model(*args, **kwargs)
    return output if isinstance(output, Tensor) else output.logits


def build(name: str, attention: str) -> nn.Module:
    return tiny(name, attn_implementation=attention) if name in TRANSFORMERS else tiny(name)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("scale", ["preserve", "paper"])
@pytest.mark.parametrize("weighted", [True, False], ids=["key-norm", "no-key-norm"])
def test_attend_is_the_literal_sum(scale: str, weighted: bool) -> None:
    count, width, eps = 5, 6, 1e-3
    sources, query, key_norm = draw(count, 2, 3, width), draw(width, seed=1), draw(width, seed=2) if weighted else None
    read = attend(list(sources), query, key_norm, eps, scale)
    for position in [(b, t) for b in range(2) for t in range(3)]:
        values = [[sources[(i, *position, d)].item() for d in range(width)] for i in range(count)]
        scores = []
        for value in values:
            rms = math.sqrt(sum(v * v for v in value) / width + eps)
            weight = [1.0] * width if key_norm is None else key_norm.tolist()
            scores.append(sum(q * g * v / rms for q, g, v in zip(query.tolist(), weight, value, strict=True)))
        total = sum(map(math.exp, scores))
        alpha = [math.exp(s) / total * (count if scale == "preserve" else 1) for s in scores]
        expected = [sum(a * value[d] for a, value in zip(alpha, values, strict=True)) for d in range(width)]
        assert read[position].tolist() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_attend_rejects_an_unknown_scale() -> None:
    with pytest.raises(ValueError, match="preserve"):
        attend([draw(3)], draw(3), None, 1e-6, "mean")


def test_block_sources_are_root_block_sums_and_the_running_sum() -> None:
    root, *outputs = (10.0**i * torch.ones(1) for i in range(6))
    stream = ReferenceStream(root, 2, "paper", 1e-6, [], None)
    seen = [[source.item() for source in stream.sources()]]
    for output in outputs:
        stream.add(output)
        seen.append([source.item() for source in stream.sources()])
    # digits tell which outputs a source holds
    assert seen == [[1], [1, 10], [1, 110], [1, 110, 1000], [1, 110, 11000], [1, 110, 11000, 100000]]


def test_only_reads_of_two_or_more_sources_take_a_query() -> None:
    queries, key_norms = [draw(4, seed=1), draw(4, seed=2)], [draw(4, seed=3), draw(4, seed=4)]
    root, first, second = draw(3, 4, seed=5), draw(3, 4, seed=6), draw(3, 4, seed=7)
    stream = ReferenceStream(root, 1, "paper", 1e-6, queries, key_norms)
    assert stream.read() is root
    stream.add(first)
    torch.testing.assert_close(stream.read(), attend([root, first], queries[0], key_norms[0], 1e-6, "paper"))
    stream.add(second)
    torch.testing.assert_close(stream.read(), attend([root, first, second], queries[1], key_norms[1], 1e-6, "paper"))


# --------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("block_size", [1, 3, 8])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_zero_queries_preserve_the_model(name: str, attention: str, block_size: int) -> None:
    model = build(name, attention)
    (ids,), _ = example_inputs(name)
    width = model.config.hidden_size
    queries = [torch.zeros(width, dtype=torch.float64)] * SUBLAYERS
    # the weights of the keys cannot matter while the queries are zero
    key_norms = [draw(width, seed=i) for i in range(SUBLAYERS)]
    with promote_to_float64(model):
        expected = logits_of(model, name)
        actual = DECODERS[name](model, ids, queries, key_norms, block_size, "preserve")
        assert actual.dtype == torch.float64
        assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize(("name", "eps"), [("llama", "rms_norm_eps"), ("gpt2", "layer_norm_epsilon")])
def test_weights_of_sum_one_preserve_the_model_up_to_eps(name: str, eps: str) -> None:
    """Norms forget the factor 1/n but for their eps, so the error falls with eps: proportionally, not by luck."""
    errors = []
    for value in (1e-5, 1e-8):
        model = tiny(name, **{eps: value})
        (ids,), _ = example_inputs(name)
        queries = [torch.zeros(model.config.hidden_size, dtype=torch.float64)] * SUBLAYERS
        with promote_to_float64(model):
            errors.append(relative(DECODERS[name](model, ids, queries, None, 1, "paper"), logits_of(model, name)))
    assert 1e-6 < errors[0] < 1e-1
    assert errors[1] == pytest.approx(errors[0] / 1000, rel=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_query_key_norm_and_parameter_has_a_gradient(name: str) -> None:
    model = tiny(name)
    (ids,), _ = example_inputs(name)
    width = model.config.hidden_size
    queries = [draw(width, seed=i).requires_grad_() for i in range(SUBLAYERS)]
    key_norms = [(1 + 0.1 * draw(width, seed=100 + i)).requires_grad_() for i in range(SUBLAYERS)]
    with promote_to_float64(model):
        read = DECODERS[name](model, ids, queries, key_norms, 3, "preserve")
        assert relative(read, logits_of(model, name)) > 1e-2  # queries matter
        read.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in [*queries, *key_norms, *model.parameters()])


@pytest.mark.parametrize("count", [SUBLAYERS - 1, SUBLAYERS + 1])
def test_a_wrong_number_of_queries_is_an_error(count: int) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="quer"):
        llama_logits(model, *example_inputs("llama")[0], [torch.zeros(32)] * count, None, 1, "preserve")


# ------------------------------------------------------------------------------------------------------- true float64


class Float32Seen(TorchDispatchMode):
    """Records the operators, of forward and backward, that return a float32 tensor with a fractional value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            # integers (expert ids, say) are exact in float32
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not tensor.equal(tensor.round()):
                self.seen.add(str(func))
        return out


@pytest.mark.parametrize(("name", "attention"), SPELLINGS)
def test_promoted_model_never_leaves_float64(name: str, attention: str) -> None:
    model, (args, kwargs) = build(name, attention), example_inputs(name)
    with promote_to_float64(model), Float32Seen() as mode:
        output = model(*args, **kwargs)
        getattr(output, "logits", output).square().mean().backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float64}
    assert not mode.seen


def smoothness(model: nn.Module, name: str, step: float = 1e-8) -> float:
    """How far a central difference along a random direction of the first parameter misses the gradient, relatively.

    The step is below float32's resolution: one cast anywhere on the way swallows it or turns it into noise.
    """
    parameter = next(p for p in model.parameters() if p.dim() > 1)
    weight = draw(*logits_of(model, name).shape, seed=2)
    direction = draw(*parameter.shape, seed=3)
    (gradient,) = torch.autograd.grad((logits_of(model, name) * weight).sum(), parameter)
    expected = (gradient * direction).sum()
    with torch.no_grad():
        start = parameter.clone()
        parameter.copy_(start + step * direction)
        ahead = logits_of(model, name)
        parameter.copy_(start - step * direction)
        behind = logits_of(model, name)
        parameter.copy_(start)
    return (((ahead - behind) * weight).sum() / (2 * step) / expected - 1).abs().item()


@pytest.mark.parametrize(("name", "attention"), SPELLINGS)
def test_promoted_model_answers_to_a_tiny_step(name: str, attention: str) -> None:
    model = build(name, attention)
    with promote_to_float64(model):
        assert smoothness(model, name) < 1e-5


def test_double_alone_is_caught_by_both_checks() -> None:
    model = tiny("llama").double()
    with Float32Seen() as mode:
        assert smoothness(model, "llama") > 1e-2
    assert mode.seen


@pytest.mark.parametrize(("name", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("gemma", "sdpa"), ("mixtral", "sdpa")])
def test_dynamo_sees_the_promotion(name: str, attention: str) -> None:
    model, graphs = build(name, attention), []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    args, kwargs = example_inputs(name)
    with promote_to_float64(model):
        actual = torch.compile(model, backend=keep)(*args, **kwargs).logits
        assert relative(actual, logits_of(model, name)) < 1e-14
    assert len(graphs) == 1
    assert "float64" in graphs[0]
    assert "float32" not in graphs[0]
    assert ".float()" not in graphs[0]


@pytest.mark.parametrize("name", NAMES)
def test_exit_restores_the_model_and_its_classes(name: str) -> None:
    model, dtype_of = tiny(name), torch.get_default_dtype()
    before = logits_of(model, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), promote_to_float64(model):
        assert logits_of(model, name).dtype == torch.float64
        raise RuntimeError("inside")
    assert torch.equal(logits_of(model, name), before)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {dtype_of}
    assert identities == [id(p) for p in model.parameters()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_contexts_nest() -> None:
    first, second = tiny("llama", seed=1), tiny("llama", seed=2)
    before = logits_of(first, "llama")
    with promote_to_float64(first):
        outer = logits_of(first, "llama")
        with promote_to_float64(second):
            assert torch.equal(logits_of(first, "llama"), outer)
        assert torch.equal(logits_of(first, "llama"), outer)
    assert torch.equal(logits_of(first, "llama"), before)


# -------------------------------------------------------------------------------------------------------- tiny models


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_are_deterministic_and_random_everywhere(name: str) -> None:
    model, again, other = tiny(name), tiny(name), tiny(name, seed=1)
    for (key, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), key
        assert not torch.equal(p, r), key
        assert p.std() > 0.01, key
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    assert torch.equal(logits_of(model.train(), name), logits_of(again.train(), name))
