"""What the paper shows of trained models: magnitudes and gradients per sublayer, and what is read over depth."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from models import plain_model

from attnres_compile.inspection.measure import inspect_model
from attnres_compile.inspection.results import ChainInspection

if TYPE_CHECKING:
    from training import Training

BATCHES = 4  # of validation text, over which gradients are averaged
SEQUENCES = 4  # of it, whose tokens what is inspected is a mean over


def measure(training: Training) -> dict[str, Any]:
    """Names of sublayers and readers, magnitudes, gradient norms and the depth mixing matrix, as JSON types."""
    chain = inspect_trained(training)
    return {
        "sublayers": [sublayer.name for sublayer in chain.sublayers],
        "readers": [read.name for read in chain.reads],
        "added": [chain.root_magnitude, *(sublayer.magnitude for sublayer in chain.sublayers)],
        "read": [read.magnitude for read in chain.reads],
        "gradients": gradient_norms(training, chain),
        "mixing": chain.mixing.tolist(),
    }


def inspect_trained(training: Training) -> ChainInspection:
    """Inspect the trained weights in a model that wasn't rewritten ahead of time."""
    model = plain_model(training.task.size)
    if training.task.row.config is not None:
        model.attnres = copy.deepcopy(training.model.attnres)  # what convert_ would attach, without capturing once more
    model.load_state_dict(training.model.state_dict())
    device = training.task.scale.device
    model, ids = model.to(device), training.validation[0][:SEQUENCES, :-1].to(device)
    (chain,) = inspect_model(model, kwargs={"input_ids": ids, "use_cache": False}).chains
    return chain


def gradient_norms(training: Training, chain: ChainInspection) -> list[float]:
    """For every sublayer the norm of the gradient of the validation loss by its weights, attention's or the MLP's."""
    training.optimizer.zero_grad()
    for batch in training.validation[:BATCHES]:
        (training.loss(batch) / BATCHES).backward()
    norms = []
    for sublayer in chain.sublayers:
        owners = {module.rpartition(".")[0] + "." for module in sublayer.modules}
        gradients = [p.grad for name, p in training.model.named_parameters() if name.startswith(tuple(owners))]
        norms.append(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()))
    training.optimizer.zero_grad()
    return norms
