"""One test per assumption about torch's private API; a failure names the behaviour of torch that changed."""

import pytest
import torch
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.testing import CompileCounter

from attnres_compile import capture
from attnres_compile.errors import CaptureError, ChainCutError, ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift


def seen_by_backend(look, model: nn.Module | None = None, call=None):
    """What ``look(graph_module)`` returns inside a backend."""
    found = []

    def backend(graph_module, example_inputs):
        found.append(look(graph_module))
        return graph_module.forward

    model = model or Net()
    torch.compile(call or model, backend=backend)(torch.randn(2, 4))
    return found


def test_placeholders_carry_a_source_with_an_expression() -> None:
    (names,) = seen_by_backend(lambda gm: [capture.source_name(node) for node in gm.graph.find_nodes(op="placeholder")])
    assert "L['self']._modules['inner']._parameters['weight']" in names
    assert "L['self']._buffers['shift']" in names
    assert "L['x']" in names


def test_parameters_and_buffers_are_told_from_arguments() -> None:
    (names,) = seen_by_backend(capture.parameter_placeholders)
    assert len(names) == 3 and not any(name.startswith("l_x") for name in names)


def test_module_names_stand_in_nn_module_stack() -> None:
    def stacks(graph_module):
        return [list(node.meta["nn_module_stack"].values())[-1][0] for node in graph_module.graph.nodes if "linear" in node.name]

    assert seen_by_backend(stacks) == [["L['self'].inner"]]


def test_the_frame_s_locals_hold_the_model() -> None:
    model = Net()
    (frame,) = seen_by_backend(capture.current_frame, model)
    assert frame.roots == {"L['self']": model} and frame.cut == "" and frame.has_parameters


def test_a_model_in_a_closure_is_found() -> None:
    model = Net()

    def step(x):
        return model(x).sum()

    (frame,) = seen_by_backend(capture.current_frame, call=step)
    assert list(frame.roots.values()) == [model]


def test_a_graph_break_is_told_to_the_backend() -> None:
    class Broken(Net):
        def forward(self, x):
            x = self.inner(x)
            torch._dynamo.graph_break()
            return x + self.shift

    before, after = seen_by_backend(capture.current_frame, Broken())
    assert "graph break" in before.cut and "test_capture.py" in before.cut
    assert "graph break in 'forward'" in after.cut


def test_sources_of_new_parameters_are_guarded() -> None:
    """ID_MATCH on the host, CONSTANT_MATCH on requires_grad, both installed while the backend runs."""
    model = Net()
    compiles = []

    def backend(graph_module, example_inputs):
        compiles.append(1)
        capture.guard_on("L['self']", "")
        source = capture._source_of_root(InstructionTranslator.current_tx().output, "L['self']")
        weight = capture.DictGetItemSource(
            capture.AttrSource(capture.DictGetItemSource(capture.AttrSource(source, "_modules"), "inner"), "_parameters"),
            "weight",
        )
        capture.guard_on_tensors([weight])
        return graph_module.forward

    compiled = torch.compile(model, backend=backend)
    compiled(torch.randn(2, 4))
    compiled(torch.randn(2, 4))
    assert len(compiles) == 1
    torch.compile(Net(), backend=backend)(torch.randn(2, 4))
    assert len(compiles) == 2, "a second instance shared the first one's graph"


def test_errors_pass_through_dynamo_as_they_are() -> None:
    def backend(graph_module, example_inputs):
        capture.raise_through_dynamo(ConfigError("no such option"))

    with pytest.raises(ConfigError, match=r"^no such option"):
        torch.compile(Net(), backend=backend)(torch.randn(2, 4))


def test_skipped_code_is_inlined_but_not_compiled_alone() -> None:
    counter = CompileCounter()

    def helper(x):
        return x + 1

    capture.never_compile_alone(helper)
    torch.compile(helper, backend=counter)(torch.ones(2))
    assert counter.frame_count == 0

    def outer(x):
        return helper(x) * 2

    torch.compile(outer, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1 and counter.op_count == 2


def test_active_dynamo_is_noticed() -> None:
    seen = []

    def hook(module, args):
        if not torch.compiler.is_compiling():
            seen.append(capture.dynamo_is_active())

    capture.never_compile_alone(hook)
    model = Net()
    model.register_forward_pre_hook(hook)
    model(torch.randn(2, 4))
    torch.compile(model, backend="eager")(torch.randn(2, 4))
    assert seen == [False, True]


def test_capture_runs_nothing_and_leaves_no_cache_entry() -> None:
    ran = []

    class Watched(Net):
        def forward(self, x):
            return super().forward(x)

    model = Watched()
    for _ in range(2 * torch._dynamo.config.recompile_limit):
        captured = capture.capture(model, (torch.randn(2, 4),), {})
        ran.append(captured.outputs)
    assert set(ran) == {()}
    assert len(captured.parameters) == 3


def test_capture_with_run_gives_inputs_and_outputs() -> None:
    model, x = Net(), torch.randn(2, 4)
    captured = capture.capture(model, (x,), {}, run=True)
    assert any(value is x for value in captured.inputs)
    assert any(value is model.inner.weight for value in captured.inputs)
    torch.testing.assert_close(captured.result, model(x))
    assert captured.result is captured.outputs[0]


def test_capture_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        captured = capture.capture(Net(), (torch.empty(2, 4),), {}, run=True)
    assert captured.result.device.type == "meta"


def test_capture_names_a_graph_break() -> None:
    class Broken(Net):
        def forward(self, x):
            print("here")
            return super().forward(x)

    with pytest.raises(
        ChainCutError, match=r"Broken can't be captured in one graph: a graph break at .*test_capture.py:\d+: print"
    ):
        capture.capture(Broken(), (torch.randn(2, 4),), {})


def test_capture_explains_wrong_arguments() -> None:
    with pytest.raises(
        CaptureError, match=r"Net failed .*: RuntimeError: a and b must have same reduction dim.*test_capture.py:\d+"
    ):
        capture.capture(Net(), (torch.randn(2, 5),), {})
    with pytest.raises(CaptureError, match="Net can't be called with the example arguments: missing a required argument: 'x'"):
        capture.capture(Net(), (), {})


def test_a_graph_copy_keeps_sources_and_meta() -> None:
    def look(graph_module):
        copied = capture.copy_graph(graph_module)
        pairs = zip(graph_module.graph.nodes, copied.graph.nodes, strict=True)
        return all(
            a.name == b.name and a.meta.keys() == b.meta.keys() and capture.source_name(a) == capture.source_name(b)
            for a, b in pairs
        )

    assert seen_by_backend(look) == [True]


def test_unknown_inductor_modes_are_refused() -> None:
    graph_module = torch.fx.symbolic_trace(Net())
    with pytest.raises(ConfigError, match="unknown mode 'fastest'; the modes are: default"):
        capture.compile_with_inductor(graph_module, [torch.randn(2, 4)], "fastest")


def test_inductor_knows_our_options() -> None:
    """If this fails, Inductor renamed what limits the width of a fused loop: rename it in INDUCTOR_OPTIONS, or leave it out."""
    from torch._inductor import list_options

    assert set(capture.INDUCTOR_OPTIONS) <= set(list_options())


def test_outputs_of_dynamic_graphs_carry_marks_that_a_capture_sets_aside() -> None:
    """If no mark is found, torch renamed what makes a later capture dynamic: see _DYNAMIC_MARKS."""
    x = torch.compile(nn.ReLU(), backend="aot_eager", dynamic=True)(torch.randn(3, 4))
    before = dict(x.__dict__)
    assert set(before) & set(capture._DYNAMIC_MARKS)
    captured = capture.capture(Net(), (x,), {})
    shapes = [node.meta["example_value"].shape for node in captured.graph_module.graph.find_nodes(op="placeholder")]
    assert all(isinstance(size, int) for shape in shapes for size in shape)
    assert x.__dict__ == before


@pytest.mark.parametrize("question", [lambda x: x.sum().item() > 0, lambda x: bool((x > 0).any())])
def test_a_branch_on_data_is_a_graph_break(question) -> None:
    """If this is a CaptureError, torch renamed the types of the errors in _BRANCHES_ON_DATA."""

    class Branching(Net):
        def forward(self, x):
            return super().forward(x) if question(x) else x

    with pytest.raises(ChainCutError, match=r"Branching can't be captured in one graph: a graph break at .*test_capture.py"):
        capture.capture(Branching(), (torch.randn(2, 4),), {})


def test_modules_that_are_written_to_have_sources_of_another_spelling() -> None:
    """If no root is found, Dynamo spells the parameters of such modules in a third way: see _ROOT."""

    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting()
    (frame,) = seen_by_backend(capture.current_frame, model)
    assert frame.roots == {"L['self']": model}


def test_graph_breaks_are_counted_with_their_reasons() -> None:
    """If this is "", Dynamo counts graph breaks elsewhere, and messages lose their cause: see last_graph_break."""

    def broken(x):
        print("here")
        return x + 1

    torch._dynamo.utils.counters.clear()
    assert capture.last_graph_break() == ""
    torch.compile(broken, backend="eager")(torch.ones(2))
    assert capture.last_graph_break() != ""


def test_captures_see_no_stance_and_leave_it() -> None:
    """If this fails with a recompilation or no graph, torch keeps the stance elsewhere: see _default_stance."""
    with torch.compiler.set_stance("force_eager"):
        assert len(capture.capture(Net(), (torch.randn(2, 4),), {}).parameters) == 3
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"


def test_captures_see_the_user_s_settings_nowhere() -> None:
    """Errors are not suppressed, earlier shapes make nothing dynamic, and the settings are back afterwards."""
    settings = {"suppress_errors": True, "automatic_dynamic_shapes": True, "assume_static_by_default": False}
    with torch._dynamo.config.patch(**settings):
        for length in (2, 3, 5):
            captured = capture.capture(Net(), (torch.randn(length, 4),), {})
            (x,) = (n for n in captured.graph_module.graph.find_nodes(op="placeholder") if n.name not in captured.parameters)
            assert x.meta["example_value"].shape == (length, 4)
        assert {name: getattr(torch._dynamo.config, name) for name in settings} == settings


def test_a_compiled_module_is_captured_as_itself() -> None:
    """If names differ, nn.Module.compile() keeps the compiled call under another name than _compiled_call_impl."""
    plain, compiled = Net(), Net()
    compiled.inner.compile(backend="eager")

    def stacks(model: nn.Module) -> list[str]:
        nodes = capture.capture(model, (torch.randn(2, 4),), {}).graph_module.graph.nodes
        return [path for node in nodes for path, _ in (node.meta.get("nn_module_stack") or {}).values()]

    assert stacks(compiled) == stacks(plain) != []
    assert compiled.inner._compiled_call_impl is not None


def test_a_model_that_turns_gradients_on_runs_without_them() -> None:
    """If a gradient function is found, such switches are no longer nodes that call torch._C._set_grad_enabled."""

    class Switching(Net):
        def forward(self, x):
            with torch.no_grad():
                y = self.inner(x)
            with torch.enable_grad():
                return super().forward(x) + y

    captured = capture.capture(Switching(), (torch.randn(2, 4),), {}, run=True)
    assert captured.graph_module.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    assert not captured.result.requires_grad


def test_what_fails_in_a_capture_comes_out_of_its_wrapper() -> None:
    """If this is a CaptureError, Dynamo keeps a backend's error under another name than inner_exception."""

    class Exhausting(Net):
        def forward(self, x):
            return exhaust(super().forward(x))

    @torch.library.custom_op("attnres_tests::exhaust", mutates_args=())
    def exhaust(x: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no more")

    exhaust.register_fake(torch.empty_like)
    with pytest.raises(MemoryError, match="no more"):
        capture.capture(Exhausting(), (torch.randn(2, 4),), {}, run=True)


def test_outside_of_ddp_no_module_is_active() -> None:
    """If this fails with an AttributeError, DDP tells in another way which module it runs: see active_ddp."""
    assert capture.active_ddp() is None
