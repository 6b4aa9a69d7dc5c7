"""One network through everything: the verdict, the function at zero queries, outputs and gradients with random ones."""

from __future__ import annotations

import dataclasses
import linecache
import math
from collections.abc import Sequence

import torch
from building import build, inputs_of
from comparing import (
    IN_PLACE,
    TOLERANCE,
    ZERO_TOLERANCE,
    Mismatch,
    clones,
    compare,
    error_of,
    gradients_of,
    leaves,
    randomise,
    rounded_elsewhere,
    run,
    trained,
    worst_of,
)
from definition import Walk
from modules import source_of
from networks import Network, Options
from oracle import Expected, expected_of
from torch import Tensor, nn
from values import StreamPlan, Structure

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten


class GeneratorError(AssertionError):
    """The module that was printed and the definition's plain walk disagree: neither says anything about the package."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``kind`` is "converted", "refused" or "left out"; errors are the largest relative ones."""

    kind: str
    reason: str = ""
    sites: int = 0
    zero_error: float = 0.0
    error: float = 0.0
    gradient_error: float = 0.0


def check(network: Network, options: Options, thorough: bool) -> Outcome:
    """``thorough`` adds ``ac.detect``, ``ac.convert_``, and torch.compile with the two-phase passes and no Inductor; where
    shapes are dynamic, with another batch size, too.

    Raises:
        Mismatch, GeneratorError: see there.
    """
    source = source_of(network)
    names = set(linecache.cache)
    try:
        return _check(network, options, build(source, network.seed, network.training), thorough)
    except (Mismatch, GeneratorError):
        raise
    except Exception as error:
        if type(error) is type(_failure_of_torch(network, source)):
            return Outcome("left out", f"torch.compile alone fails: {type(error).__name__}")
        raise
    finally:
        torch._dynamo.reset()
        for name in set(linecache.cache) - names:
            if name.startswith("<network"):
                del linecache.cache[name]


def _failure_of_torch(network: Network, source: str) -> Exception | None:
    """What torch.compile raises about the network as it is, without us."""
    torch._dynamo.reset()
    model = build(source, network.seed, network.training)
    try:
        torch.compile(model, backend="eager", fullgraph=True, dynamic=network.is_dynamic)(*inputs_of(network))
    except Exception as error:
        return error
    return None


def _check(network: Network, options: Options, model: nn.Module, thorough: bool) -> Outcome:
    inputs = inputs_of(network)
    outputs = run(model, clones(inputs))
    if not all(torch.isfinite(output).all() for output in outputs):
        return Outcome("left out", "not finite")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if network.is_wild:
        outcome = _wild(model, inputs, outputs, options)
        _unchanged(model, state, False)
        return outcome
    structures: list[Structure] = []
    if not network.near_miss:
        walk = Walk(network, model, inputs)
        if walk.is_unclear:
            return Outcome("left out", "a sum that can be read in two ways")
        structures = walk.structures
        if (error := error_of(walk.outputs, outputs)) > ZERO_TOLERANCE * 1e3:
            raise GeneratorError(f"the printed module and the plain walk differ by {error:.1e}")
    expected = expected_of(network, structures)
    if not expected.chains and not expected.is_fragile:
        outcome = _refused(model, inputs, outputs, state, expected, thorough)
    else:
        outcome = _converted(network, options, model, inputs, outputs, structures, expected, thorough)
    _unchanged(model, state, thorough and outcome.kind == "converted")
    return outcome


def _wild(model: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], options: Options) -> Outcome:
    """Whatever is found in it: zero queries preserve outputs and gradients, and random ones have gradients."""
    try:
        rewritten = ac.rewrite(model, ac.AttnResConfig(variant="full", key_norm=options.key_norm), args=inputs)
    except ac.NoResidualChainError:
        return Outcome("refused", "wild")
    sites = list(rewritten.attnres.sites)
    zero = error_of(run(rewritten, clones(inputs)), outputs)
    if not zero <= ZERO_TOLERANCE:
        raise Mismatch(f"with zero queries the outputs of the wild network differ by {zero:.1e}\n{rewritten.report}")
    found = leaves(inputs), leaves(inputs)
    try:
        wanted = gradients_of(model, found[0], run(model, found[0]), [])
    except RuntimeError as failure:
        if IN_PLACE not in str(failure):
            raise
        return Outcome("converted", "wild, without gradients", len(sites), zero)
    worst, i = worst_of(gradients_of(model, found[1], run(rewritten, found[1]), []), wanted)
    if not worst <= TOLERANCE:
        names = [name for name, _ in trained(model)] + ["an input"] * len(wanted)
        raise Mismatch(f"with zero queries the gradient of {names[i]} differs by {worst:.1e}\n{rewritten.report}")
    return Outcome("converted", "wild", len(sites), zero, 0.0, worst)


def _refused(
    model: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], state: dict[str, Tensor], expected: Expected,
    thorough: bool,
) -> Outcome:  # fmt: skip
    reason = next((reason for reason in expected.refused if reason), "any")
    for attempt in (ac.rewrite, ac.convert_) if thorough else (ac.convert_,):
        try:
            result = attempt(model, ac.AttnResConfig(variant="full"), args=inputs)
        except ac.NoResidualChainError as error:
            message = str(error)
        else:
            report = result if isinstance(result, ac.Report) else result.report
            raise Mismatch(f"expected a refusal ({reason}), found:\n{report}")
        if not any(piece in message for piece in expected.refused):
            raise Mismatch(f"expected one of {expected.refused} among the reasons:\n{message}")
    _unchanged(model, state, False)
    if error_of(run(model, clones(inputs)), outputs) != 0:
        raise Mismatch("a refused model gives something else than before")
    return Outcome("refused", reason)


def _converted(
    network: Network, options: Options, model: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...],
    structures: list[Structure], expected: Expected, thorough: bool,
) -> Outcome:  # fmt: skip
    lengths = [chain.num_sublayers for chain in expected.chains]
    size = 1 if options.block_size is None else min(options.block_size, *lengths, 100)
    config = ac.AttnResConfig(
        variant="full" if options.block_size is None else "block",
        block_size=None if options.block_size is None else size,
        scale=options.scale,
        key_norm=options.key_norm,
        eps=options.eps,
    )
    try:
        rewritten = ac.rewrite(model, config, args=inputs)
    except (ac.NoResidualChainError, ac.ConfigError) as error:
        if expected.is_fragile and _is_overwritten(ac.detect(model, args=inputs)):
            return Outcome("refused", "overwritten in place, with views")
        raise Mismatch(f"expected {expected.chains}, but it was refused: {error}") from error
    found = tuple((c.num_sublayers, tuple((s.before, tuple(s.modules)) for s in c.sites)) for c in rewritten.report.chains)
    if found != tuple((chain.num_sublayers, chain.sites) for chain in expected.chains):
        if not (expected.is_fragile and _is_overwritten(rewritten.report)):
            raise Mismatch(f"expected (sublayers, sites)\n  {expected.chains}, found\n  {found}\n{rewritten.report}")
        structures = []
    else:
        for chain, wanted in zip(rewritten.report.chains, expected.chains, strict=True):
            if wanted.kind not in (None, chain.kind):
                raise Mismatch(f"expected the kind {wanted.kind}, found {chain.kind}")
    sites = list(rewritten.attnres.sites)
    zero = math.nan
    if options.scale == "preserve":
        zero = error_of(run(rewritten, clones(inputs)), outputs)
        if not zero <= ZERO_TOLERANCE:
            raise Mismatch(f"with zero queries the outputs differ by {zero:.1e}")
    if not structures:
        return Outcome("converted", "in place, with views: zero queries alone", len(sites), zero)
    randomise(rewritten.attnres, network.seed)
    wanted_outputs, wanted = _by_definition(network, options, model, inputs, structures, expected, size, sites)
    try:
        error, gradient = compare(model, rewritten, inputs, wanted_outputs, wanted, sites, "rewritten")
        if thorough:
            other = _compiled(
                network, options, model, config, inputs, rewritten, structures, expected, size, wanted_outputs, wanted
            )
            error, gradient = max(error, other[0]), max(gradient, other[1])
    except Mismatch:
        with rounded_elsewhere(model):
            outputs, gradients = _by_definition(network, options, model, inputs, structures, expected, size, sites)
        if error_of(outputs, wanted_outputs) < TOLERANCE / 10 and worst_of(gradients, wanted)[0] < TOLERANCE / 10:
            raise
        return Outcome("left out", "ill-conditioned: rounding of the parameters moves the definition as much", len(sites), zero)
    zero = 0.0 if math.isnan(zero) else zero
    return Outcome("converted", "", len(sites), zero, error, gradient)


def _is_overwritten(report: ac.Report) -> bool:
    return any("in place" in refusal.reason or "in-place" in refusal.reason for refusal in report.refusals)


def _compiled(
    network: Network, options: Options, model: nn.Module, config: ac.AttnResConfig, inputs: tuple[Tensor, ...],
    rewritten: ac.rewritten.RewrittenModule, structures: list[Structure], expected: Expected, size: int,
    wanted_outputs: tuple[Tensor, ...], wanted: list[Tensor | None],
) -> tuple[float, float]:  # fmt: skip
    """``detect`` agrees, converting or rewriting twice raises, and the compiled model is the definition, in two phases."""
    chains = [(c.kind, c.num_sublayers, c.num_sites) for c in rewritten.report.chains]
    if chains != [(c.kind, c.num_sublayers, c.num_sites) for c in ac.detect(model, args=inputs).chains]:
        raise Mismatch("detect finds other chains than rewrite")
    larger = _larger(network, model) if network.is_dynamic else None
    ac.convert_(model, config, args=inputs)
    for attempt, what in ((ac.convert_, model), (ac.rewrite, rewritten), (ac.convert_, rewritten)):
        try:
            attempt(what, config, args=inputs)
        except ac.ConfigError:
            continue
        raise Mismatch(f"{attempt.__name__} accepted what was converted before")
    attached = list(model.attnres.sites)
    model.attnres.load_state_dict(rewritten.attnres.state_dict())

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> object:
        return compile_rewritten(graph, examples, lambda inner, given, mode: inner.forward)

    compiled = torch.compile(model, backend=backend, dynamic=network.is_dynamic)
    found = compare(model, compiled, inputs, wanted_outputs, wanted, attached, "compiled")
    if larger is not None:
        more = inputs_of(larger)
        by_definition = _by_definition(larger, options, model, more, structures, expected, size, attached)
        other = compare(model, compiled, more, *by_definition, attached, "compiled, with another batch,")
        found = max(found[0], other[0]), max(found[1], other[1])
    return found


def _larger(network: Network, model: nn.Module) -> Network | None:
    """The network with a larger batch, if the module takes one."""
    larger = dataclasses.replace(network, shape=(network.shape[0] + 1, *network.shape[1:]))
    try:
        run(model, inputs_of(larger))
    except RuntimeError:  # a parameter of the batch's size
        return None
    return larger


def _by_definition(
    network: Network, options: Options, model: nn.Module, inputs: tuple[Tensor, ...], structures: list[Structure],
    expected: Expected, size: int, sites: Sequence[nn.Module],
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:  # fmt: skip
    plans: list[StreamPlan | None] = [None] * len(structures)
    remaining = iter(sites)
    for i in expected.order:
        mine = {adds: next(remaining) for adds in structures[i].sites}
        queries = {adds: site.query for adds, site in mine.items()}
        key_norms = {adds: site.key_norm if options.key_norm else None for adds, site in mine.items()}
        plans[i] = StreamPlan(structures[i], size, options.scale, options.eps, queries, key_norms)  # type: ignore[arg-type]
    given = leaves(inputs)
    outputs = Walk(network, model, given, plans).outputs
    return tuple(output.detach() for output in outputs), gradients_of(model, given, outputs, sites)


def _unchanged(model: nn.Module, state: dict[str, Tensor], converted: bool) -> None:
    now = {name: value for name, value in model.state_dict().items() if not (converted and name.startswith("attnres."))}
    if now.keys() != state.keys() or any(not torch.equal(now[name], state[name]) for name in state):
        raise Mismatch("the model's own state dict has changed")
    if not converted and hasattr(model, "attnres"):
        raise Mismatch("the model has got an attribute attnres")
