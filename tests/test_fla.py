"""An outside implementation agrees: flash-linear-attention's own Transformer with AttnRes, from a checkpoint in its names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import attnres_compile as ac
from attnres_compile.checkpoint.offline import convert_checkpoint

PEERS = Path(sys.prefix) / "peers"  # where `make install` puts the library
PROGRAM = Path(__file__).with_name("support") / "fla_transformer.py"


def trained(block_size: int, ids: Tensor) -> transformers.LlamaForCausalLM:
    """A small Llama with AttnRes, trained until its queries matter."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=4, intermediate_size=96, vocab_size=101, num_attention_heads=4, num_key_value_heads=2,
        rope_theta=10000.0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ac.convert_(model, ac.AttnResConfig(block_size=block_size, scale="paper"), (ids,))
    gm = ac.rewrite(model, args=(ids,), kwargs={"labels": ids})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        gm(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def their_logits(folder: Path, ids: Tensor) -> Tensor:
    save_file({"ids": ids}, folder.parent / "ids")
    environment = os.environ | {"PYTHONPATH": str(PEERS)}
    command = [sys.executable, "-P", "-W", "ignore", PROGRAM, folder, folder.parent / "ids", folder.parent / "logits"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(folder.parent / "logits")["logits"]


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_it_gives_the_same_logits_from_a_checkpoint_in_its_names(block_size: int, tmp_path: Path) -> None:
    ids = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(1))
    model = trained(block_size, ids)
    assert min(site.query.abs().max() for site in model.attnres.sites) > 0.02
    model.save_pretrained(tmp_path / "trained")
    convert_checkpoint(tmp_path / "trained", tmp_path / "theirs", naming="fla")

    expected = their_logits(tmp_path / "theirs", ids)
    loaded = ac.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        found = ac.rewrite(loaded, args=(ids,))(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert ac.compare(loaded, loaded, args=(ids,)).max_rel_error > 0.1  # far from what it computes without AttnRes
