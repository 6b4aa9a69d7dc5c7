"""What runs in other processes: a spawned one imports it anew, so it stands in a module that can be imported there."""

from __future__ import annotations

from typing import Any

import torch
from small_nets import VOCABULARY, eager
from torch import Tensor
from torch.utils.data import Dataset

import attnres_compile as ac


class Ids(Dataset[Tensor]):
    """Twelve examples, ``[3]`` each."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return (index + torch.arange(3)) % VOCABULARY


class IdsOfAModel(Ids):
    """A dataset that holds a converted model, as those do that tokenise or augment with one; it does not run it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getitem__(self, index: int) -> Tensor:
        assert len(self.model.attnres.sites) == 4
        return super().__getitem__(index)


def run_there(sent: Any, ids: Tensor, answers: Any) -> None:
    """In another process: eagerly, which must raise, then compiled, twice."""
    try:
        sent(ids)
    except ac.NotRewrittenError:
        compiled = torch.compile(sent, backend=eager)
        with torch.no_grad():
            answers.put([compiled(ids).numpy(), compiled(ids.flip(0)).numpy()])
    else:
        answers.put("ran un-rewritten")
