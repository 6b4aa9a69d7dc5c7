"""Short names from qualified names, whatever the model calls its modules."""

from __future__ import annotations

import pytest

from attnres_compile.inspection.short_names import chain_names, read_names, sublayer_names

CASES = {
    "attention and MLP": (
        [["model.layers.0.self_attn.o_proj"], ["model.layers.0.mlp.down_proj"], ["model.layers.1.self_attn.o_proj"]],
        ["layer 0 attention", "layer 0 MLP", "layer 1 attention"],
    ),
    "parallel branches, in either order": (
        [["h.0.mlp.fc_out", "h.0.attn.out_proj"], ["h.1.attn.out_proj", "h.1.mlp.fc_out"]],
        ["layer 0 attention + MLP", "layer 1 attention + MLP"],
    ),
    "a linear map that stands by itself": (
        [["decoder.layers.0.self_attn.out_proj"], ["decoder.layers.0.fc2"], ["decoder.layers.1.fc2"]],
        ["layer 0 attention", "layer 0 MLP", "layer 1 MLP"],
    ),
    "cross-attention": (
        [["block.0.layer.0.SelfAttention.o"], ["block.0.layer.1.EncDecAttention.o"], ["block.0.layer.2.DenseReluDense.wo"],
         ["block.1.layer.0.SelfAttention.o"]],
        ["layer 0 attention", "layer 0 cross-attention", "layer 0 MLP", "layer 1 attention"],
    ),
    "a stage whose number is the same everywhere": (
        [["stages.2.blocks.0.mlp.fc2"], ["stages.2.blocks.1.mlp.fc2"]],
        ["layer 0 MLP", "layer 1 MLP"],
    ),
    "an unknown kind": ([["backbone.layers.0.mixer.out_proj"], ["backbone.layers.1.mixer.out_proj"]],
                        ["layer 0 mixer", "layer 1 mixer"]),
    "two of a kind in a layer": (
        [["net.0.attn_local.out"], ["net.0.attn_global.out"], ["net.1.attn_local.out"]],
        ["layer 0 attn_local.out", "layer 0 attn_global.out", "layer 1 attention"],
    ),
    "the same module twice": ([["shared.0.mlp"], ["shared.0.mlp"]], ["layer 0 MLP (1)", "layer 0 MLP (2)"]),
    "no numbers, no modules": ([["net.first.attn"], ["net.positions"], []], ["first.attn", "positions", "sublayer 3"]),
}  # fmt: skip


@pytest.mark.parametrize(("modules", "names"), CASES.values(), ids=CASES)
def test_sublayers(modules: list[list[str]], names: list[str]) -> None:
    assert list(sublayer_names(modules)) == names


def test_reads_are_named_after_what_they_feed() -> None:
    assert read_names(["first", "second"], [0, 1, 2]) == ("first", "second", "output")
    assert read_names(["first", "second"], [1, 1]) == ("second (1)", "second (2)")


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        ([["encoder.h.0.mlp", "encoder.h.1.mlp"], ["decoder.h.0.mlp", "decoder.h.1.mlp"]], ["encoder", "decoder"]),
        ([["m.layers.0.blocks.0.mlp", "m.layers.0.blocks.1.mlp"], ["m.layers.1.blocks.0.mlp"]], ["m.layers.0", "m.layers.1"]),
        ([["a"], ["b"]], ["chain 0", "chain 1"]),
    ],
)
def test_chains(modules: list[list[str]], names: list[str]) -> None:
    assert list(chain_names(modules)) == names
