"""Plans from published shapes: which values cross which boundary, against counts that are made independently."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_compile.config import AttnResConfig
from attnres_compile.errors import CheckpointError, ConfigError
from attnres_compile.pipelining.plan import PipelinePlan
from attnres_compile.pipelining.shapes import ModelShape, plan_from_shape, read_shape, with_blocks

MIB = 2**20


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def kimi_k3(repository: Path) -> ModelShape:
    return read_shape(repository / "examples" / "kimi_k3_plan.json")


def naive_tensors(done: int, size: int) -> int:
    """On a hop behind ``done`` sublayers: the embedding, the complete blocks, and the block that is under way."""
    return 1 + done // size + (done % size > 0)


def cached_tensors(hop: int, ends: list[int], size: int, ranks: int) -> int:
    """The receiving rank ran stage ``hop + 1 - ranks`` before, and keeps what was complete at its end."""
    ran = hop + 1 - ranks
    known = 1 + ends[ran + 1] // size if ran >= 0 else 0
    return naive_tensors(ends[hop + 1], size) - known


def assert_hops_agree(plan: PipelinePlan, ends: list[int], size: int, ranks: int, nbytes: int) -> None:
    assert list(plan.boundaries) == ends
    for naive, cached in zip(plan.hops(False), plan.hops(True), strict=True):
        assert naive.nbytes == (naive_tensors(ends[naive.source + 1], size) * nbytes if ranks > 1 else 0)
        assert cached.nbytes == (cached_tensors(cached.source, ends, size, ranks) * nbytes if ranks > 1 else 0)
        assert (naive.gradient_nbytes, cached.gradient_nbytes) == (naive.nbytes, cached.nbytes)


def test_the_cut_values_of_a_small_model() -> None:
    """Blocks of sublayers 0 to 3, 4 to 7 and 8, 9; stages of 3, 3, 2 and 2."""
    plan = plan_from_shape(ModelShape("small", 5, 4, 4), 2, 2, 3, "fp32", boundaries=(3, 6, 8))
    found = [(value.label, value.kind, value.producer, value.consumers) for value in plan.values]
    assert found == [
        ("b0", "block", 0, (1, 2, 3)),
        ("p0", "partial", 0, (1,)),
        ("b1", "block", 1, (2, 3)),
        ("p1", "partial", 1, (2,)),
        ("b2", "block", 2, (3,)),
    ]
    assert plan.boundaries == (0, 3, 6, 8, 10)
    assert plan.block_sizes == (4, 4, 2)
    assert {(value.shape, value.dtype, value.nbytes) for value in plan.values} == {((3, 4), "float32", 48)}
    assert [cost["flops"] for cost in plan.costs] == [2 * 3 * 6 * 4**2 * sublayers for sublayers in (3, 3, 2, 2)]


def test_a_block_that_ends_the_model_is_no_cut() -> None:
    plan = plan_from_shape(ModelShape("whole blocks", 4, 4, 4), 2, 1, 1)
    assert [value.label for value in plan.values] == ["b0", "b1"]


def test_one_stage_has_no_cuts() -> None:
    plan = plan_from_shape(ModelShape("alone", 3, 4, 2), 1, 1, 1)
    assert (plan.values, plan.hops(), plan.boundaries) == ((), (), (0, 6))


def test_active_parameters_are_shared_evenly() -> None:
    plan = plan_from_shape(ModelShape("sparse", 4, 8, 2, active_parameters=800), 4, 1, 10)
    assert [cost["flops"] for cost in plan.costs] == [2 * 10 * 200] * 4
    assert "800 active parameters" in plan.notes[0]


def test_kimi_k3_on_eight_ranks(repository: Path) -> None:
    """The figures that the design was made on."""
    plan = plan_from_shape(kimi_k3(repository), 8, 4, 8192, "bf16")
    naive, cached = plan.hops(False), plan.hops(True)
    assert max(hop.nbytes for hop in naive) == 1008 * MIB
    assert max(hop.nbytes for hop in cached) == 336 * MIB
    assert (sum(hop.nbytes for hop in naive), sum(hop.nbytes for hop in cached)) == (166 * 112 * MIB, 81 * 112 * MIB)
    assert round(plan.step_nbytes(16, False) / plan.step_nbytes(16, True), 2) == 2.05


@pytest.mark.parametrize(("ranks", "virtual"), [(8, 2), (8, 4), (16, 2)])
@pytest.mark.parametrize("whole_layers", [True, False])
def test_kimi_k3_hop_by_hop(repository: Path, ranks: int, virtual: int, whole_layers: bool) -> None:
    count = ranks * virtual
    ends = [2 * round(i * 93 / count) if whole_layers else round(i * 186 / count) for i in range(count + 1)]
    plan = plan_from_shape(kimi_k3(repository), ranks, virtual, 8192, "bf16", boundaries=None if whole_layers else ends[1:-1])
    assert_hops_agree(plan, ends, 24, ranks, 112 * MIB)


@st.composite
def cut_shapes(draw: st.DrawFn) -> tuple[ModelShape, int, int, list[int]]:
    """A shape, ranks, stages per rank, and the ends of stages of any sizes."""
    per_layer, layers = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    count = per_layer * layers
    ranks = draw(st.integers(1, min(8, count)))
    virtual = draw(st.integers(1, min(4, count // ranks)))
    places = list(range(1, count))
    inner = draw(st.permutations(places))[: ranks * virtual - 1]
    shape = ModelShape("any", layers, draw(st.integers(1, 64)), draw(st.integers(1, count)), per_layer)
    return shape, ranks, virtual, [0, *sorted(inner), count]


@given(cut_shapes(), st.integers(1, 100), st.sampled_from([("float32", 4), ("bf16", 2), ("fp16", 2)]))
@settings(max_examples=400)
def test_every_hop_of_any_shape(cut: tuple[ModelShape, int, int, list[int]], tokens: int, dtype: tuple[str, int]) -> None:
    shape, ranks, virtual, ends = cut
    plan = plan_from_shape(shape, ranks, virtual, tokens, dtype[0], boundaries=ends[1:-1])
    assert_hops_agree(plan, ends, shape.block_size, ranks, tokens * shape.hidden_size * dtype[1])
    assert sum(plan.block_sizes) == shape.num_sublayers


@given(cut_shapes())
def test_every_stage_gets_all_that_its_sites_attend_to(cut: tuple[ModelShape, int, int, list[int]]) -> None:
    """Site by site: what a site before sublayer i, or the output site, reads of what earlier stages made."""
    shape, ranks, virtual, ends = cut
    plan = plan_from_shape(shape, ranks, virtual, 1, boundaries=ends[1:-1])
    size, last = shape.block_size, len(ends) - 2
    for stage, (start, stop) in enumerate(itertools.pairwise(ends)):
        wanted = set()
        for before in range(start, stop + (stage == last)):
            blocks = before // size
            wanted |= {f"b{k}" for k in range(blocks + 1) if k * size <= start}
            if before % size and blocks * size < start and start % size:
                wanted.add(f"p{stage - 1}")
        assert {value.label for value in plan.values if stage in value.consumers} == (wanted if stage else set())


@given(st.integers(1, 40), st.integers(1, 3), st.data())
def test_default_boundaries_give_every_stage_a_sublayer(layers: int, per_layer: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers * per_layer))
    ends = plan_from_shape(ModelShape("any", layers, 1, 1, per_layer), stages, 1, 1).boundaries
    sizes = [stop - start for start, stop in itertools.pairwise(ends)]
    unit = per_layer if stages <= layers else 1
    assert (len(sizes), ends[0], ends[-1]) == (stages, 0, layers * per_layer)
    assert min(sizes) >= unit
    assert max(sizes) - min(sizes) <= 2 * unit
    assert all(end % unit == 0 for end in ends)


def test_block_size_in_layers_or_sublayers(tmp_path: Path) -> None:
    shape = {"name": "x", "num_layers": 4, "hidden_size": 8}
    of_layers = read_shape(written(tmp_path / "a.json", {**shape, "block_layers": 2, "sublayers_per_layer": 3}))
    of_sublayers = read_shape(written(tmp_path / "b.json", {**shape, "block_size": 6, "sublayers_per_layer": 3}))
    assert of_layers == of_sublayers == ModelShape("x", 4, 8, 6, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": None}, "num_layers is None"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"hidden_size": 8.0}, "hidden_size is 8.0"),
        ({"name": 3}, "name is 3"),
        ({"block_layers": 2}, "either block_size, in sublayers, or block_layers, in layers"),
        ({"block_size": 9}, "block_size=9 exceeds the 8 sublayers"),
        ({"layers": 4}, "unknown entry 'layers'"),
    ],
)
def test_bad_shapes_are_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = written(tmp_path / "shape.json", {"name": "x", "num_layers": 4, "hidden_size": 8, "block_size": 4, **change})
    with pytest.raises(ConfigError) as caught:
        read_shape(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", ["name", "num_layers", "hidden_size", "block_size"])
def test_missing_entries_are_named(tmp_path: Path, lacking: str) -> None:
    shape = {"name": "x", "num_layers": 4, "hidden_size": 8, "block_size": 4}
    del shape[lacking]
    with pytest.raises(ConfigError, match=lacking):
        read_shape(written(tmp_path / "shape.json", shape))


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"name": "x", "name": "y"}', "NaN"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "shape.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"shape\.json"):
        read_shape(tmp_path / "shape.json")


def test_blocks_asked_for_go_before_those_of_the_shape() -> None:
    shape = ModelShape("x", 20, 8, 1)
    asked = (None, AttnResConfig(num_blocks=6), AttnResConfig(), AttnResConfig(block_size=10))
    assert [with_blocks(shape, config).block_size for config in asked] == [1, 7, 5, 10]


def test_module_names_need_a_model() -> None:
    with pytest.raises(ConfigError, match=r"a shape has no module 'model\.layers\.3' to begin a stage with"):
        plan_from_shape(ModelShape("x", 20, 8, 1), 2, 1, 16, boundaries=["model.layers.3"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ranks": 0}, "ranks must be a whole number above zero"),
        ({"virtual": 0}, "virtual must be a whole number above zero"),
        ({"tokens": 0}, "tokens must be a whole number above zero"),
        ({"ranks": 3, "virtual": 3}, "8 sublayers, too few for 9 stages"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"placement": "spiral"}, "placement must be one of"),
        ({"placement": "folded", "virtual": 3}, "virtual must be 2"),
        ({"boundaries": (2, 4)}, "2 boundaries make 3 stages, not 4"),
        ({"boundaries": (2, 2, 4)}, "2 comes after 2"),
        ({"boundaries": (0, 2, 4)}, "0 comes after 0"),
        ({"boundaries": (2, 4, 8)}, "8 comes after 8"),
    ],
)
def test_bad_options_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_from_shape(**{"shape": ModelShape("x", 4, 8, 2), "ranks": 2, "virtual": 2, "tokens": 1, **arguments})
    assert words in str(caught.value)
