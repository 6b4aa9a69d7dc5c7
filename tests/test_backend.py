"""The backend on real models through Inductor, and how it behaves when the world around it changes."""

import copy
import logging
import pickle

import pytest
import torch
from models import VOCABULARY, example_inputs, tiny
from torch import Tensor, nn

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten


def eager(gm, example_inputs, **options):
    """The rewriting backend without a compiler behind it: what is tested is ours, and compiles in no time."""
    return compile_rewritten(gm, example_inputs, lambda graph, inputs, mode: graph.forward, **options)


def llama(seed: int = 0, **overrides) -> nn.Module:
    return tiny("llama", seed=seed, **overrides).eval()


def ids_of(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def set_queries(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in model.attnres.sites:
            site.query.copy_(torch.randn(site.query.shape, generator=generator))


def reference(model: nn.Module, ids: Tensor, **kwargs) -> Tensor:
    """What the converted model must give, from the ahead-of-time graph of a copy."""
    return ac.rewrite(copy.deepcopy(model), args=(ids,), kwargs=kwargs)(ids, **kwargs).logits


class TestInductor:
    def test_one_line_on_a_model_that_nobody_converted(self, caplog) -> None:
        model, ids = llama(), ids_of(2, 9)
        expected = model(ids).logits
        with caplog.at_level(logging.WARNING, logger="attnres_compile"):
            compiled = torch.compile(model, backend="attnres", options={"variant": "block", "num_blocks": 2})
            torch.testing.assert_close(compiled(ids).logits, expected)
        (record,) = [record for record in caplog.records if record.name.startswith("attnres_compile")]
        assert "8 sites" in record.message and "attnres_compile.convert_(model, ...)" in record.message
        assert model.attnres.config == ac.AttnResConfig(num_blocks=2)
        assert len(model.attnres.sites) == 8

    def test_training_step_matches_the_ahead_of_time_graph(self) -> None:
        model, ids = llama().train(), ids_of(2, 9)
        ac.convert_(model, ac.AttnResConfig(num_blocks=3), (ids,))
        set_queries(model, 3)
        twin = copy.deepcopy(model)
        rewritten = ac.rewrite(twin, args=(ids,), kwargs={"labels": ids})
        rewritten(ids, labels=ids).loss.backward()
        torch.compile(model, backend="attnres")(ids, labels=ids).loss.backward()
        expected = dict(twin.named_parameters())
        for name, parameter in model.named_parameters():
            reference_grad = expected[name].grad
            assert reference_grad.norm() > 0, name
            assert ((parameter.grad - reference_grad).norm() / reference_grad.norm()).item() < 1e-4, name

    def test_generate_with_a_key_value_cache(self) -> None:
        model, ids = llama(num_hidden_layers=2), ids_of(1, 5)
        arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(ids, **arguments)
        ac.convert_(model, args=(ids,))
        model.compile(backend="attnres")
        assert torch.equal(model.generate(ids, **arguments), expected)
        set_queries(model, 5)
        with_cache = model.generate(ids, **arguments)
        without = model.generate(ids, use_cache=False, **arguments)
        assert torch.equal(with_cache, without)
        assert not torch.equal(with_cache, expected)

    def test_bfloat16_autocast(self) -> None:
        model, ids = llama(num_hidden_layers=2).train(), ids_of(2, 9)
        compiled = torch.compile(model, backend="attnres")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model(ids).logits.float()
            found = compiled(ids).logits.float()
        assert ((found - expected).norm() / expected.norm()).item() < 2e-2
        found.sum().backward()
        assert all(site.query.grad.dtype == torch.float32 for site in model.attnres.sites)

    def test_dynamic_sequence_length_compiles_twice(self) -> None:
        model = llama(num_hidden_layers=2)
        set_up = ac.convert_(model, args=(ids_of(2, 9),))
        set_queries(model, 5)
        compiled = torch.compile(model, backend="attnres")
        counter = torch._dynamo.utils.counters
        counter.clear()
        for length in (9, 12, 7, 16, 21):
            ids = ids_of(2, length)
            torch.testing.assert_close(compiled(ids).logits, reference(model, ids))
        assert set_up.num_sites == 4
        assert counter["stats"]["unique_graphs"] == 2 + 5  # and one ahead-of-time capture for each reference


class TestLifeOfAModel:
    def test_forward_of_a_compiled_method(self) -> None:
        model, ids = llama(), ids_of(2, 9)
        ac.convert_(model, args=(ids,))
        set_queries(model, 2)
        expected = reference(model, ids)
        model.forward = torch.compile(model.forward, backend=eager)
        torch.testing.assert_close(model(ids).logits, expected)

    def test_the_first_call_of_a_model_with_hooks_of_its_own(self) -> None:
        """The backend attaches parameters and hooks while PyTorch goes through the model's hooks."""
        model, ids = llama(), ids_of(2, 9)
        expected = model(ids).logits
        model.register_forward_hook(lambda module, args, output: None)
        model.forward = torch.compile(model.forward, backend=eager)
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected)

    def test_a_compiled_training_step_around_the_model(self) -> None:
        model, ids = llama(), ids_of(2, 9)
        ac.convert_(model, args=(ids,))
        set_queries(model, 2)
        expected = reference(model, ids).sum()

        @torch.compile(backend=eager)
        def step(batch: Tensor) -> Tensor:
            return model(batch).logits.sum()

        torch.testing.assert_close(step(ids), expected)

    def test_modes_share_the_parameters(self) -> None:
        model, ids = llama(), ids_of(2, 9)
        compiled = torch.compile(model, backend=eager)
        compiled(ids)
        parameters = model.attnres
        model.train()
        compiled(ids).logits.sum().backward()
        model.eval()
        with torch.no_grad():
            compiled(ids, use_cache=False)
        assert model.attnres is parameters

    def test_two_instances_of_a_class_keep_their_own_parameters(self) -> None:
        first, ids = llama().double(), ids_of(2, 9)  # float32 would show in which order either graph adds up
        ac.convert_(first, args=(ids,))
        second = copy.deepcopy(first)
        set_queries(first, 1)
        set_queries(second, 2)
        for model in (first, second, first):
            torch.testing.assert_close(torch.compile(model, backend=eager)(ids).logits, reference(model, ids))

    def test_reassigned_loaded_and_cast_parameters_take_effect(self) -> None:
        model, ids = llama().double(), ids_of(2, 9)  # float32 would show in which order either graph adds up
        ac.convert_(model, args=(ids,))
        compiled = torch.compile(model, backend=eager)
        compiled(ids)
        model.attnres.sites[3].query = nn.Parameter(torch.ones(32, dtype=torch.float64))
        torch.testing.assert_close(compiled(ids).logits, reference(model, ids))
        state = {name: torch.randn_like(value) if "query" in name else value for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        torch.testing.assert_close(compiled(ids).logits, reference(model, ids))
        model.load_state_dict({name: -value if "query" in name else value for name, value in state.items()})
        torch.testing.assert_close(compiled(ids).logits, reference(model, ids))
        model.load_state_dict({name: 0.1 * value if "query" in name else value for name, value in state.items()})
        model.to(torch.float32)
        assert model.attnres.sites[0].query.dtype == torch.float32
        torch.testing.assert_close(compiled(ids).logits, reference(model, ids))

    def test_freezing_and_thawing_recompiles(self) -> None:
        model, ids = llama(), ids_of(2, 9)
        ac.convert_(model, args=(ids,))
        model.attnres.requires_grad_(False)
        compiled = torch.compile(model, backend=eager)
        compiled(ids).logits.sum().backward()
        assert all(site.query.grad is None for site in model.attnres.sites)
        model.attnres.requires_grad_(True)
        compiled(ids).logits.square().sum().backward()
        assert all(site.query.grad.abs().max() > 0 for site in model.attnres.sites)

    def test_pickling_keeps_parameters_and_protection(self) -> None:
        model, ids = llama(), ids_of(2, 9)
        ac.convert_(model, ac.AttnResConfig(num_blocks=2), (ids,))
        set_queries(model, 4)
        copied = pickle.loads(pickle.dumps(model))
        assert copied.attnres.config == model.attnres.config
        with pytest.raises(ac.NotRewrittenError):
            copied(ids)
        torch.testing.assert_close(torch.compile(copied, backend=eager)(ids).logits, reference(model, ids))

    def test_gradient_checkpointing_is_seen_through_and_kept(self) -> None:
        model, ids = llama().train(), ids_of(2, 9)
        ac.convert_(model, args=(ids,), kwargs={"use_cache": False})
        set_queries(model, 4)
        expected = reference(model, ids, use_cache=False)
        model.gradient_checkpointing_enable()
        compiled = torch.compile(model, backend=eager)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)

    def test_a_sequential_model(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.linear(self.norm(x))

        model = nn.Sequential(nn.Linear(4, 8), *(Block() for _ in range(4)), nn.LayerNorm(8))
        x = torch.randn(3, 4)
        expected = model(x)
        ac.convert_(model, args=(x,))
        compiled = torch.compile(model, backend=eager)
        torch.testing.assert_close(compiled(x), expected)
        set_queries(model, 1)
        torch.testing.assert_close(compiled(x), ac.rewrite(model, args=(x,))(x))

    def test_parameters_look_like_norms_to_an_optimizer(self) -> None:
        model, (args, kwargs) = tiny("llama"), example_inputs("llama")
        ac.convert_(model, args=args, kwargs=kwargs)
        assert {name: parameter.dim() for name, parameter in model.attnres.named_parameters()} == {
            f"sites.{i}.{kind}": 1 for i in range(8) for kind in ("query", "key_norm")
        }
