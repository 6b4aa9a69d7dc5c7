"""A model written to a file, with a statement that breaks the graph at any of its places."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

# A line "#? condition" is a place; the condition says in which of the layers the statement runs.
SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F

broken = False


def doubled(x):
    #? broken
    x = x * 2
    #? broken
    return x


class Attention(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index, self.qkv, self.out = index, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        #? broken and self.index == 1
        q, k, v = self.qkv(x).chunk(3, -1)
        #? broken and self.index == 1
        x = F.softmax(q @ k.transpose(-1, -2), -1) @ v
        #? broken and self.index == 1
        return self.out(x)


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index, self.norm1, self.norm2 = index, nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention, self.mlp = Attention(index), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        #? broken and self.index == 1
        h = self.norm1(x)
        #? broken and self.index == 1
        h = self.attention(h)
        #? broken and self.index == 1
        x = x + h
        #? broken and self.index == 1
        h = doubled(self.mlp(self.norm2(x)))
        #? broken and self.index == 1
        x = x + h
        #? broken and self.index == 1
        return x


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList(Layer(index) for index in range(3))

    def forward(self, ids):
        x = ids
        #? broken
        x = self.embed(ids)
        #? broken
        for index, layer in enumerate(self.layers):
            #? broken and index == 1
            x = layer(x)
        #? broken
        x = self.norm(x)
        #? broken
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(8, 16)

    def forward(self, ids):
        x = ids
        #? broken
        x = self.body(ids)
        #? broken
        x = self.head(x)
        #? broken
        return x
"""
SITES = 6
_LINES = SOURCE.splitlines()
PLACES = [number for number, line in enumerate(_LINES) if line.lstrip().startswith("#? ")]

STATEMENTS = {
    "graph_break": "torch._dynamo.graph_break()",
    "print": "print(end='')",
    "item": "x = x + 1 if x.sum().item() > 1e9 else x",
    "any": "x = x if x.isnan().any() else x + 0",
    "disabled": "x = torch.compiler.disable(torch.clone)(x)",
    "builtin": "__import__('time').sleep(0)",
    "finally": "try:\n    torch._dynamo.graph_break()\nfinally:\n    pass",
    "with": "with torch.autograd.set_detect_anomaly(False):\n    torch._dynamo.graph_break()",
}


def broken_model(folder: Path, place: int, statement: str) -> Any:
    """The module with ``Model``, and ``broken`` to be set, in which ``statement`` stands at ``place``, a line number."""
    line = _LINES[place]
    indent = " " * (len(line) - len(line.lstrip()))
    condition = line.partition("#? ")[2]
    inserted = [f"{indent}if {condition}:", *(f"{indent}    {part}" for part in STATEMENTS[statement].splitlines())]
    name = f"broken_{statement}_{place}"
    path = folder / f"{name}.py"
    path.write_text("\n".join([*_LINES[:place], *inserted, *_LINES[place + 1 :]]) + "\n")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
