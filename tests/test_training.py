"""Training a converted model: precisions, accumulated gradients, torch.compile's modes, and going on from a checkpoint."""

import contextlib
import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, NanoGPT, tiny
from reference import ReferenceStream
from small_nets import BATCH, Net, converted, eager, expected_of, set_queries
from torch import Tensor, nn

import attnres_compile as ac

IDS = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
CONFIG = ac.AttnResConfig(num_blocks=2)


def gpt(queries: bool = True) -> NanoGPT:
    """Two layers, four sites, converted; random queries, or zeros."""
    model = tiny("nanogpt", num_layers=2).train()
    ac.convert_(model, CONFIG, (IDS,))
    if queries:
        set_queries(model, 3)
    return model


def by_definition(model: NanoGPT, ids: Tensor) -> Tensor:
    """What a converted NanoGPT gives, site by site, in the dtype of its parameters."""
    x = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
    sites, config = model.attnres.sites, model.attnres.config
    queries, norms = [site.query for site in sites], [site.key_norm for site in sites]
    stream = ReferenceStream(x, config.resolved_block_size(4), config.scale, model.norm.eps, queries, norms)
    for block in model.blocks:
        stream.add(block.attention(block.ln_1(stream.read())))
        stream.add(block.mlp(block.ln_2(stream.read())))
    return model.head(model.norm(stream.read()))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def loss_of(logits: Tensor, ids: Tensor = IDS) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def step(run: Callable[..., Tensor], model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    logits = run(IDS)
    loss_of(logits).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


PATHS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "compiled": lambda model: torch.compile(model, backend=eager),
    "rewritten": lambda model: ac.rewrite(model, args=(IDS,)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
class TestBfloat16:
    """Relative L2 errors: 2e-2 of logits, 6e-2 of all gradients together; and no more than the written-out definition, and
    the standard model, have in the same precision.
    """

    def prepare(self, precision: str, queries: bool) -> tuple[NanoGPT, Any]:
        model = gpt(queries)
        if precision == "bfloat16":
            return model.bfloat16(), contextlib.nullcontext()
        return model, torch.autocast("cpu", dtype=torch.bfloat16)

    def test_against_the_definition_in_float64(self, precision: str, path: str) -> None:
        model, context = self.prepare(precision, queries=True)
        exact = copy.deepcopy(model).double()
        expected, exact_gradients = step(lambda ids: by_definition(exact, ids), exact)
        with context:
            logits, gradients = step(PATHS[path](model), model)
            _, written_out = step(lambda ids: by_definition(model, ids), model)
        assert logits.dtype == torch.bfloat16
        assert error(logits, expected) <= 2e-2
        assert gradients.keys() == exact_gradients.keys() and sum("query" in name for name in gradients) == 4
        assert all(gradients[name].dtype == model.get_parameter(name).dtype for name in gradients)
        names = list(exact_gradients)
        together = [torch.cat([of[name].double().flatten() for name in names]) for of in (gradients, exact_gradients)]
        assert error(*together) <= 6e-2
        worst = [max(error(of[name], exact_gradients[name]) for name in names) for of in (gradients, written_out)]
        assert worst[0] <= 1.1 * worst[1]

    def test_zero_queries_give_the_standard_model(self, precision: str, path: str) -> None:
        model, context = self.prepare(precision, queries=False)
        standard = tiny("nanogpt", num_layers=2).train().to(model.norm.weight.dtype)
        expected = copy.deepcopy(standard).double()(IDS)
        with context:
            logits, _ = step(PATHS[path](model), model)
            of_standard = standard(IDS).detach()
        assert error(logits, of_standard) <= 2e-2
        assert error(logits, expected) <= 1.5 * error(of_standard, expected)


@pytest.mark.parametrize("path", PATHS)
class TestAccumulation:
    def test_microbatches_equal_one_batch(self, path: str) -> None:
        """Four of them, in float64 to 1e-13."""
        model = gpt().double()
        _, expected = step(lambda ids: by_definition(model, ids), model)
        parts = IDS.chunk(4)
        run = PATHS[path](model) if path == "compiled" else ac.rewrite(model, args=(parts[0],))
        graphs: list[int] = []
        for _ in range(2):  # the second time with gradients set to None, and nothing compiled anew
            for part in parts:
                (loss_of(run(part), part) / len(parts)).backward()
            worst = max(error(model.get_parameter(name).grad, gradient) for name, gradient in expected.items())
            assert worst <= 1e-13
            model.zero_grad(set_to_none=True)
            assert all(site.query.grad is None for site in model.attnres.sites)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1]

    def test_a_gradient_scaler_scales_skips_and_steps(self, path: str) -> None:
        model = gpt().double()
        _, expected = step(lambda ids: by_definition(model, ids), model)
        run, scaler = PATHS[path](model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD(model.attnres.parameters(), lr=1.0)
        query = model.attnres.sites[1].query
        before = query.detach().clone()
        scaler.scale(loss_of(run(IDS))).backward()
        query.grad[3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(query, before) and scaler.get_scale() == 2.0**11
        optimizer.zero_grad()
        scaler.scale(loss_of(run(IDS))).backward()
        scaler.unscale_(optimizer)
        assert error(query.grad, expected["attnres.sites.1.query"]) <= 1e-13
        scaler.step(optimizer)
        torch.testing.assert_close(query.detach(), before - expected["attnres.sites.1.query"], rtol=1e-12, atol=1e-12)


def test_modes_of_torch_compile_train_alike() -> None:
    """Through Inductor. What they add is for GPUs: CUDA graphs, and trying several Triton kernels for a matrix product."""
    model, found = converted(model=Net(layers=2), config=CONFIG), {}
    for mode in ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"):
        torch.compiler.reset()
        model.zero_grad(set_to_none=True)
        output = torch.compile(model, backend="attnres", mode=mode)(BATCH)
        output.square().sum().backward()
        found[mode] = [output.detach(), *(parameter.grad for parameter in model.parameters())]
        assert all(gradient.norm() > 0 for gradient in found[mode])
        if mode == "default":
            torch.testing.assert_close(output, expected_of(model))
        for value, expected in zip(found[mode], found["default"], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


class TestResuming:
    """Losses to the bit: five steps in one go, and the same with everything built anew after the second."""

    STEPS, SAVED_AFTER = 5, 2

    def batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        return [torch.randint(3, VOCABULARY, (2, 9), generator=generator) for _ in range(self.STEPS)]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train(self, run: Any, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[float]:
        losses = []
        for ids in batches:
            loss = loss_of(run(ids), ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    def fresh(self, seed: int, ahead_of_time: bool) -> tuple[nn.Module, Any]:
        model, ids = tiny("nanogpt", seed=seed, num_layers=2).train(), self.batches()[0]
        if ahead_of_time:
            rewritten = ac.rewrite(model, CONFIG, args=(ids,))
            return rewritten, rewritten
        ac.convert_(model, CONFIG, (ids,))
        torch.compiler.reset()
        return model, torch.compile(model, backend=eager)

    @pytest.mark.parametrize("ahead_of_time", [False, True], ids=["compiled", "rewritten"])
    def test_from_state_dicts(self, ahead_of_time: bool, tmp_path: Path) -> None:
        batches = self.batches()
        model, run = self.fresh(0, ahead_of_time)
        uninterrupted = self.train(run, self.optimizer(model), batches)
        model, run = self.fresh(0, ahead_of_time)
        optimizer = self.optimizer(model)
        self.train(run, optimizer, batches[: self.SAVED_AFTER])
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        model, run = self.fresh(1, ahead_of_time)
        optimizer, state = self.optimizer(model), torch.load(tmp_path / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        assert self.train(run, optimizer, batches[self.SAVED_AFTER :]) == uninterrupted[self.SAVED_AFTER :]
        assert len(set(uninterrupted)) == self.STEPS

    def test_the_example_goes_on_from_save_pretrained(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With selective checkpoints, autocast and accumulated gradients."""
        monkeypatch.syspath_prepend(str(repository / "examples"))
        resumed, uninterrupted = importlib.import_module("checkpointed_training").main(eager)
        assert resumed == uninterrupted and len(set(resumed)) == 5
