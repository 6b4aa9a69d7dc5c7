"""At zero queries a rewritten model computes what it computed before: real model classes, Full and Block, both modes."""

import contextlib

import pytest
import torch
from models import NAMES, TRANSFORMERS, example_inputs, tiny
from reference import promote_to_float64
from torch import Tensor, nn

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten

CONFIGS = {
    "full": ac.AttnResConfig(variant="full"),
    "block-2": ac.AttnResConfig(num_blocks=2),
    "block-3": ac.AttnResConfig(num_blocks=3),
    "block-8": ac.AttnResConfig(num_blocks=8),
}
SOME = {name: CONFIGS[name] for name in ("full", "block-3")}
MODES = {"eval": False, "train": True}


def logits_of(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def inputs_of(name: str, dtype: torch.dtype) -> tuple[tuple, dict]:
    args, kwargs = example_inputs(name)

    def cast(value):
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_preserved(name: str, mode: str) -> None:
    model = tiny(name).train(MODES[mode])
    for dtype, tolerance, configs in ((torch.float32, 1e-5, SOME), (torch.float64, 1e-12, CONFIGS if mode == "eval" else SOME)):
        with promote_to_float64(model) if dtype == torch.float64 else contextlib.nullcontext():
            args, kwargs = inputs_of(name, dtype)
            expected = logits_of(model(*args, **kwargs))
            assert expected.dtype == dtype
            for config in configs.values():
                found = logits_of(ac.rewrite(model, config, args, kwargs)(*args, **kwargs))
                assert relative_error(found, expected) <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_paper_scale_differs_by_the_eps_alone(name: str) -> None:
    """Weights that add up to one divide the stream by n, which a norm undoes up to its eps."""
    model = tiny(name).eval()
    with promote_to_float64(model):
        args, kwargs = inputs_of(name, torch.float64)
        expected = logits_of(model(*args, **kwargs))
        found = logits_of(ac.rewrite(model, ac.AttnResConfig(num_blocks=2, scale="paper"), args, kwargs)(*args, **kwargs))
        assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder"])
def test_gradients_are_preserved(name: str) -> None:
    model = tiny(name).train()
    with promote_to_float64(model):
        args, kwargs = inputs_of(name, torch.float64)
        logits_of(model(*args, **kwargs)).square().sum().backward()
        expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        rewritten = ac.rewrite(model, ac.AttnResConfig(num_blocks=3), args, kwargs)
        logits_of(rewritten(*args, **kwargs)).square().sum().backward()
        for key, gradient in expected.items():
            assert relative_error(rewritten.get_parameter(key).grad, gradient) <= 1e-10, key


@pytest.mark.parametrize("name", NAMES)
def test_every_site_is_found(name: str) -> None:
    """Four layers of two sublayers: a site before each sublayer but the first, and the final norm's."""
    args, kwargs = example_inputs(name)
    for mode in MODES.values():
        report = ac.detect(tiny(name).train(mode), args, kwargs)
        (chain,) = report.chains
        assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("prenorm", 8, 8)
        assert report.refusals == ()


def test_parallel_branches_are_one_sublayer_and_one_site() -> None:
    args, kwargs = example_inputs("gpt_neox")
    model = tiny("gpt_neox", use_parallel_residual=True).eval()
    (chain,) = ac.detect(model, args, kwargs).chains
    assert (chain.kind, chain.num_sublayers, chain.num_sites) == ("parallel", 4, 4)
    assert chain.sites[0].modules == ("gpt_neox.layers.1.input_layernorm", "gpt_neox.layers.1.post_attention_layernorm")
    rewritten = ac.rewrite(model, ac.AttnResConfig(num_blocks=2), args, kwargs)
    assert ac.compare(model, rewritten, args, kwargs).max_rel_error <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "opt", "vit", "encoder"])
def test_all_other_operations_survive_once(name: str) -> None:
    model = tiny(name).train()
    args, kwargs = example_inputs(name)
    diff = ac.compare(model, ac.rewrite(model, ac.AttnResConfig(variant="full"), args, kwargs), args, kwargs).graph_diff
    removed = [line.split(" = ")[1].split("(")[0] for line in diff.removed]
    assert removed.count("add") == 8
    # OPT flattens and unflattens the stream on its way; nothing else may go.
    assert set(removed) <= ({"add", "reshape", "view"} if name == "opt" else {"add"})
    added = [line.split(" = ")[1].split("(")[0] for line in diff.added]
    assert added.count("site") == 8
    assert set(added) <= ({"site", "reshape_as", "reshape", "view"} if name == "opt" else {"site"})


class Hidden(nn.Module):
    """A model that returns its stream after every layer beside the normed result."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, hidden = torch.sin(x), []
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
            hidden.append(x)
        return self.norms[-1](x), hidden


def test_hidden_states_keep_the_plain_sum() -> None:
    model, x = Hidden().double(), torch.randn(3, 8, dtype=torch.float64)
    rewritten = ac.rewrite(model, ac.AttnResConfig(num_blocks=2), (x,))
    torch.testing.assert_close(rewritten(x), model(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for site in rewritten.attnres.sites:
            site.query.normal_()
    result, hidden = rewritten(x)
    plain = torch.sin(x)
    reads = [plain, *hidden[:-1]]
    assert len(hidden) == 4
    # Every output is the sum of what the sublayers really gave, though they read mixtures and not these sums.
    torch.testing.assert_close(hidden[0], plain + model.layers[0](model.norms[0](plain)))
    assert not torch.allclose(hidden[2], reads[2] + model.layers[2](model.norms[2](reads[2])))
    assert not torch.allclose(result, model.norms[-1](hidden[-1]))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_backend_sees_the_same_sites(name: str) -> None:
    """The path through the compiled backend, without Inductor's compile time."""
    model = tiny(name).eval()
    args, kwargs = example_inputs(name)
    expected = logits_of(model(*args, **kwargs))
    report = ac.convert_(model, ac.AttnResConfig(num_blocks=3), args, kwargs)
    compiled = torch.compile(model, backend=eager_backend)
    assert relative_error(logits_of(compiled(*args, **kwargs)), expected) <= 1e-5
    assert [site.module for site in report.chains[0].sites] == [site.module for site in model.attnres.layout]


def eager_backend(gm, example_inputs, **options):
    """The rewriting backend without a compiler behind it."""
    return compile_rewritten(gm, example_inputs, lambda graph, inputs, mode: graph.forward, **options)


def test_a_module_without_norms_at_its_end_keeps_its_output() -> None:
    """nn.TransformerEncoder alone: the stream begins at a graph input and leaves as the output, un-normalised."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, norm_first=True, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    rewritten = ac.rewrite(model, ac.AttnResConfig(num_blocks=2), (x,))
    assert rewritten.report.num_sites == 5
    torch.testing.assert_close(rewritten(x), model(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.eval()
        rewritten = ac.rewrite(model, ac.AttnResConfig(num_blocks=2), (x,))
        assert rewritten.report.chains[0].sites[0].module == "layers.0.norm2"
        torch.testing.assert_close(rewritten(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masks", ["padding", "causal", "both"])
def test_fused_encoder_layers_with_masks(masks: str) -> None:
    """In evaluation without gradients nn.TransformerEncoderLayer is one operator, which takes its masks along."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, norm_first=True, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    kwargs: dict[str, Tensor] = {}
    if masks != "causal":
        kwargs["src_key_padding_mask"] = torch.tensor([[False] * 5, [False, False, False, True, True]])
    if masks != "padding":
        kwargs["mask"] = torch.ones(5, 5).triu(1).bool()
    with torch.no_grad():
        rewritten = ac.rewrite(model, ac.AttnResConfig(num_blocks=2), (x,), kwargs)
        expected = model(x, **kwargs)
        assert not torch.allclose(expected, model(x))
        torch.testing.assert_close(rewritten(x, **kwargs), expected, rtol=1e-12, atol=1e-12)


def test_fused_encoder_layers_with_post_norm() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3, enable_nested_tensor=False).eval()
    with torch.no_grad(), pytest.raises(ac.NoResidualChainError, match=r"post-norm: .layers\.0\.norm2. normalises the sum"):
        ac.rewrite(model, args=(torch.randn(2, 5, 16),))


def test_a_branch_under_vmap() -> None:
    class Mapped(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(x)
            for norm, layer in zip(self.norms, self.layers, strict=False):
                x = x + torch.vmap(torch.matmul, in_dims=(0, None))(norm(x), layer.weight)
            return self.norms[-1](x)

    model, x = Mapped().double(), torch.randn(3, 8, dtype=torch.float64)
    rewritten = ac.rewrite(model, ac.AttnResConfig(num_blocks=2), (x,))
    assert rewritten.report.num_sites == 4
    torch.testing.assert_close(rewritten(x), model(x), rtol=1e-12, atol=1e-12)
