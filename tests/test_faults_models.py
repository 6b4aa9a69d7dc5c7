"""Models that change between calls: their path, their structure, their parameters, ours, modes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import BATCH, WIDTH, Block, Net, converted, eager, expected_of, ids_of, set_queries
from torch import Tensor, nn

import attnres_compile as ac


@pytest.fixture
def model() -> Any:
    return converted()


@pytest.fixture
def compiled(model: Any) -> Any:
    """``model``, compiled and run once."""
    call = torch.compile(model, backend=eager)
    call(BATCH)
    return call


# ------------------------------------------------------------------------------------------------------------ their paths


class Fickle(Net):
    """Its path depends on counters and flags that are no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.extra, self.shift, self.order = 0, False, 0, 1

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(ids)
        for block in self.blocks[:: self.order]:
            x = block(x)
        if self.extra:
            x = self.blocks[0](x)
        return self.norm(x)[:, self.shift + (self.calls if self.shift else 0) :]


def test_a_counter_that_changes_the_shape_of_the_result() -> None:
    model = converted(model=Fickle())
    model.shift, model.calls = 1, 0
    compiled = torch.compile(model, backend=eager)
    ids = ids_of(2, 9)
    for calls in (1, 2, 3):
        torch.testing.assert_close(compiled(ids), expected_of(model, ids)[:, 1 + calls :])


def test_flags_that_add_a_layer_and_take_it_away() -> None:
    model = converted(model=Fickle())
    compiled = torch.compile(model, backend=eager)
    for _ in range(2):
        model.extra = False
        torch.testing.assert_close(compiled(BATCH), expected_of(model))
        model.extra = True
        with pytest.raises(ac.ParameterMismatchError, match="4 sites; this graph has 5"):
            compiled(BATCH)


def test_layers_in_another_order() -> None:
    """As many sites as before, and each query would go to another reader."""
    model = converted(model=Fickle())
    compiled = torch.compile(model, backend=eager)
    compiled(BATCH)
    model.order = -1
    with pytest.raises(ac.ParameterMismatchError, match=r"blocks\.1\.norm.*blocks\.2\.norm|blocks\.2\.norm.*blocks\.1\.norm"):
        compiled(BATCH)


def test_layers_swapped_for_others(model: Any, compiled: Any) -> None:
    """The same structure with other weights is the same conversion."""
    model.blocks[1], model.blocks[2] = Block(), model.blocks[1]
    torch.testing.assert_close(compiled(BATCH), expected_of(model))


# -------------------------------------------------------------------------------------------------- parameters of the model


def linear_of(model: Any) -> Any:
    return model.blocks[1].linear


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another value": lambda model: nn.init.normal_(linear_of(model).weight),
    "another parameter": lambda model: setattr(linear_of(model), "weight", nn.Parameter(torch.randn(WIDTH, WIDTH))),
    "no bias": lambda model: setattr(linear_of(model), "bias", None),
    "frozen": lambda model: linear_of(model).requires_grad_(False),
    "all frozen": lambda model: model.requires_grad_(False),
    "tied": lambda model: setattr(linear_of(model), "weight", model.blocks[2].linear.weight),
    "norm tied": lambda model: setattr(model.blocks[1], "norm", model.blocks[2].norm),
    "queries tied": lambda model: setattr(model.attnres.sites[1], "query", model.attnres.sites[2].query),
    "query frozen": lambda model: model.attnres.sites[1].requires_grad_(False),
    "a sparser norm": lambda model: setattr(model.blocks[1].norm, "bias", None),
    "half the embeddings": lambda model: setattr(model.embed, "weight", nn.Parameter(torch.randn(6, WIDTH))),
    "evaluation": lambda model: model.eval(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "half and back": lambda model: model.half().float(),
    "another model's state": lambda model: model.load_state_dict(converted(5).state_dict()),
    "an assigned state": lambda model: model.load_state_dict(converted(5).state_dict(), assign=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_call_follows_the_change(name: str, model: Any, compiled: Any) -> None:
    CHANGES[name](model)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if name == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    for ids in (BATCH, ids_of(3, 2)):
        found = compiled(ids)
        torch.testing.assert_close(found, expected_of(model, ids), **tolerance)
        if found.requires_grad:
            model.zero_grad()
            found.float().square().sum().backward()
            trained = [site.query for site in model.attnres.sites if site.query.requires_grad]
            assert all(query.grad is not None and query.grad.isfinite().all() for query in trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_dtypes_in_turn(dtype: torch.dtype, model: Any, compiled: Any) -> None:
    """As many changes as the recompile limit allows, there and back."""
    for each in (dtype, torch.float32, dtype):
        model.to(each)
        found = compiled(BATCH)
        assert found.dtype == each
        torch.testing.assert_close(found.double(), expected_of(model).double(), rtol=2e-2, atol=5e-2)


def test_a_weight_of_another_shape_is_torch_s_error(model: Any, compiled: Any) -> None:
    weight = linear_of(model).weight
    linear_of(model).weight = nn.Parameter(torch.randn(WIDTH, WIDTH + 1))
    with pytest.raises(Exception, match=r"size|shape"):
        compiled(BATCH)
    linear_of(model).weight = weight
    torch.testing.assert_close(compiled(BATCH), expected_of(model))


def test_a_deleted_weight_is_torch_s_error(model: Any, compiled: Any) -> None:
    weight = linear_of(model).weight
    del linear_of(model).weight
    with pytest.raises(Exception, match=r"weight|compiled alone"):
        compiled(BATCH)
    linear_of(model).weight = weight
    torch.compiler.reset()  # Dynamo gave up on the frame
    torch.testing.assert_close(compiled(BATCH), expected_of(model))


# ----------------------------------------------------------------------------------------------------------- our parameters


def site_of(model: Any) -> Any:
    return model.attnres.sites[1]


def replace_by_a_tensor(model: Any) -> None:
    del site_of(model).query
    site_of(model).query = torch.ones(WIDTH)


def pop_a_site(model: Any) -> None:
    del model.attnres.sites[1]


def rename(model: Any) -> None:
    model.attention_residuals = model.attnres
    del model.attnres


BREAKAGES: dict[str, Callable[[Any], Any]] = {
    "query of another width": lambda model: setattr(site_of(model), "query", nn.Parameter(torch.zeros(WIDTH + 1))),
    "query of two dimensions": lambda model: setattr(site_of(model), "query", nn.Parameter(torch.zeros(1, WIDTH))),
    "query of integers": lambda model: setattr(
        site_of(model), "query", nn.Parameter(torch.zeros(WIDTH, dtype=torch.int64), requires_grad=False)
    ),
    "query on the meta device": lambda model: setattr(site_of(model), "query", nn.Parameter(torch.zeros(WIDTH, device="meta"))),
    "query of None": lambda model: setattr(site_of(model), "query", None),
    "query deleted": lambda model: delattr(site_of(model), "query"),
    "key norm of None": lambda model: setattr(site_of(model), "key_norm", None),
    "key norm deleted": lambda model: delattr(site_of(model), "key_norm"),
    "key norm of another width": lambda model: setattr(site_of(model), "key_norm", nn.Parameter(torch.zeros(1))),
    "a site popped": pop_a_site,
    "a site added": lambda model: model.attnres.sites.append(site_of(model)),
    "all sites gone": lambda model: setattr(model.attnres, "sites", nn.ModuleList()),
    "a site of another kind": lambda model: model.attnres.sites.__setitem__(1, nn.Linear(2, 2)),
    "attnres deleted": lambda model: delattr(model, "attnres"),
    "attnres renamed": rename,
    "attnres of None": lambda model: setattr(model, "attnres", None),
    "attnres of another kind": lambda model: setattr(model, "attnres", nn.Identity()),
}


@pytest.mark.parametrize("is_warm", [True, False], ids=["compiled before", "not compiled yet"])
@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_is_named(name: str, is_warm: bool, model: Any) -> None:
    call = torch.compile(model, backend=eager)
    if is_warm:
        call(BATCH)
    BREAKAGES[name](model)
    for ids in (BATCH, ids_of(3, 4)):
        with pytest.raises(ac.ParameterMismatchError, match=r"attnres|AttnRes"):
            call(ids)


def test_a_query_that_is_a_plain_tensor(model: Any, compiled: Any) -> None:
    """As tools leave it that compute weights from others (parametrisations, functional calls)."""
    replace_by_a_tensor(model)
    torch.testing.assert_close(compiled(BATCH), expected_of(model))


def test_a_query_of_another_dtype_than_the_model_s(model: Any, compiled: Any) -> None:
    site_of(model).query = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
    try:
        found = compiled(BATCH)
    except ac.ParameterMismatchError:
        return
    torch.testing.assert_close(found, expected_of(model).float(), rtol=1e-4, atol=1e-5)


def test_swapped_sites_are_the_queries_in_their_new_order(model: Any, compiled: Any) -> None:
    sites = model.attnres.sites
    sites[1], sites[2] = sites[2], sites[1]
    torch.testing.assert_close(compiled(BATCH), expected_of(model))


def test_nan_in_a_query_shows(model: Any, compiled: Any) -> None:
    with torch.no_grad():
        site_of(model).query[3] = float("nan")
    assert compiled(BATCH).isnan().all()
    set_queries(model, 1)
    torch.testing.assert_close(compiled(BATCH), expected_of(model))
