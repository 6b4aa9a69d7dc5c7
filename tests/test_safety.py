"""No silent wrong result: whatever can't be rewritten as a whole raises, and says where and what to do."""

import copy
import os
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from models import VOCABULARY, tiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attnres_compile as ac
from attnres_compile.backend import compile_rewritten


def eager(gm, example_inputs, **options):
    return compile_rewritten(gm, example_inputs, lambda graph, inputs, mode: graph.forward, **options)


IDS = torch.arange(3, 21).view(2, 9) % VOCABULARY


class Block(nn.Module):
    def __init__(self, broken: bool = False, width: int = 8) -> None:
        super().__init__()
        self.norm, self.linear, self.broken = nn.LayerNorm(width), nn.Linear(width, width), broken

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            torch._dynamo.graph_break()
        return x + self.linear(self.norm(x))


class Net(nn.Module):
    def __init__(self, layers: int = 4, broken: int = -1, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(i == broken, width) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.skip, self.breaks = 0, False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.breaks:
            torch._dynamo.graph_break()
        for block in self.blocks[self.skip :]:
            x = block(x)
        return self.norm(x)


BATCH = torch.arange(6).view(2, 3)


@dataclass
class Fields:
    ids: Tensor


class Named(NamedTuple):
    ids: Tensor


def converted(**kwargs) -> Net:
    model = Net(**kwargs)
    ac.convert_(model, args=(BATCH,))
    return model


class TestUnrewrittenRuns:
    def test_eager(self) -> None:
        with pytest.raises(ac.NotRewrittenError, match=r'Net was converted .* eagerly.*backend="attnres"'):
            converted()(BATCH)

    @pytest.mark.parametrize("backend", ["inductor", "eager", "aot_eager"])
    def test_another_backend(self, backend: str) -> None:
        with pytest.raises(ac.NotRewrittenError, match='backend="attnres"'):
            torch.compile(converted(), backend=backend)(BATCH)

    @pytest.mark.parametrize("backend", ["inductor", "eager", "aot_eager"])
    def test_another_backend_through_the_compile_method(self, backend: str) -> None:
        model = converted()
        model.compile(backend=backend)
        with pytest.raises(ac.NotRewrittenError, match='backend="attnres"'):
            model(BATCH)

    @pytest.mark.parametrize("backend", ["inductor", "eager", "aot_eager"])
    def test_another_backend_on_forward(self, backend: str) -> None:
        model = converted()
        model.forward = torch.compile(model.forward, backend=backend)
        with pytest.raises(ac.NotRewrittenError, match='backend="attnres"'):
            model(BATCH)

    @pytest.mark.parametrize("backend", ["inductor", "eager", "aot_eager"])
    def test_another_backend_around_the_model(self, backend: str) -> None:
        model = converted()
        with pytest.raises(ac.NotRewrittenError, match='backend="attnres"'):
            torch.compile(lambda batch: model(batch).sum(), backend=backend)(BATCH)

    @pytest.mark.parametrize("backend", ["inductor", "eager", "aot_eager"])
    @pytest.mark.parametrize("container", [dict, UserDict, OrderedDict, Fields, Named, lambda ids: [[ids]]])
    def test_another_backend_whatever_the_inputs_lie_in(self, container: Any, backend: str) -> None:
        class Nested(Net):
            def forward(self, batch: Any) -> Tensor:
                if isinstance(batch, list):
                    return super().forward(batch[0][0])
                return super().forward(batch["ids"] if isinstance(batch, (dict, UserDict)) else batch.ids)

        model = Nested()
        batch = container(ids=BATCH)
        ac.convert_(model, kwargs={"batch": batch})
        with pytest.raises(ac.NotRewrittenError, match='backend="attnres"'):
            torch.compile(lambda batch: model(batch=batch) * 1.0, backend=backend)(batch)
        around = torch.compile(lambda batch: model(batch=batch) * 1.0, backend="attnres")
        within = {"batch": {"ids": BATCH}}
        torch.testing.assert_close(around(batch), ac.rewrite(model, kwargs=within)(**within))

    def test_the_mark_passes_under_fake_tensors_alone(self) -> None:
        with FakeTensorMode():
            assert torch.ops.attnres.only_rewritten(torch.zeros(0)) is None
        with pytest.raises(ac.NotRewrittenError, match="the graph that just ran was not rewritten"):
            torch.ops.attnres.only_rewritten(torch.zeros(0))

    def test_nothing_of_the_mark_is_left(self) -> None:
        model = converted()
        rewritten = ac.rewrite(model, args=(BATCH,))
        assert dict(rewritten.named_buffers()) == {}
        assert [node.name for node in rewritten.graph.find_nodes(op="placeholder") if not node.users] == []

    @pytest.mark.parametrize("container", [UserDict, Fields])
    def test_an_ahead_of_time_graph_keeps_no_tensor_of_the_example(self, container: Any) -> None:
        class Nested(Net):
            def forward(self, batch: Any) -> Tensor:
                return super().forward(batch["ids"] if isinstance(batch, UserDict) else batch.ids)

        with pytest.raises(ac.ConfigError, match=r"reads 'l_args_0_\w*ids\w*', a tensor inside an argument .* in tuples, lists"):
            ac.rewrite(Nested(), args=(container(ids=BATCH),))

    def test_another_backend_without_inputs(self) -> None:
        class Constant(Net):
            def forward(self) -> Tensor:
                return super().forward(BATCH)

        model = Constant()
        ac.convert_(model)
        with pytest.raises(ac.NotRewrittenError, match='backend="attnres"'):
            torch.compile(lambda: model() * 1.0, backend="eager")()

    def test_export(self) -> None:
        exported = torch.export.export(converted(), (BATCH,), strict=True)
        with pytest.raises(ac.NotRewrittenError, match='backend="attnres"'):
            exported.module()(BATCH)

    def test_a_compiled_model_under_force_eager(self) -> None:
        compiled = torch.compile(converted(), backend=eager)
        compiled(BATCH)
        with torch.compiler.set_stance("force_eager"), pytest.raises(ac.NotRewrittenError):
            compiled(BATCH)

    def test_the_recompile_limit(self) -> None:
        model = converted()
        compiled = torch.compile(model, backend=eager, dynamic=False)
        with pytest.raises((ac.NotRewrittenError, RuntimeError)) as caught:
            for length in range(2, 4 + torch._dynamo.config.recompile_limit):
                compiled(BATCH[:, :1].expand(2, length).contiguous())
        assert isinstance(caught.value, ac.NotRewrittenError)

    def test_a_failed_call_leaves_no_trace(self) -> None:
        model = converted()
        compiled = torch.compile(model, backend=eager)
        with pytest.raises(Exception):  # noqa: B017
            compiled(BATCH + 100)
        torch.testing.assert_close(compiled(BATCH), ac.rewrite(model, args=(BATCH,))(BATCH))
        with pytest.raises(ac.NotRewrittenError):
            model(BATCH)


class TestCutChains:
    @pytest.mark.parametrize("make", [Net, converted], ids=["plain", "converted"])
    def test_graph_break_in_the_model(self, make) -> None:
        model = make()
        model.breaks = True
        with pytest.raises(
            ac.ChainCutError, match=r"Net was cut by a graph break at .*test_safety.py:\d+: torch._dynamo.graph_break"
        ):
            torch.compile(model, backend=eager)(BATCH)

    @pytest.mark.parametrize("make", [Net, converted], ids=["plain", "converted"])
    def test_graph_break_in_a_layer(self, make) -> None:
        """Dynamo gives up on the loop over the layers and compiles each layer alone."""
        model = make()
        model.blocks[2].broken = True
        with pytest.raises(
            ac.ChainCutError, match=r"Block was compiled alone, called by Net at .*test_safety.py:\d+: x = block\(x\)"
        ):
            torch.compile(model, backend=eager)(BATCH)

    def test_capture_names_the_break(self) -> None:
        for function in (ac.detect, ac.convert_, ac.rewrite):
            with pytest.raises(ac.ChainCutError, match=r"a graph break at .*test_safety.py:\d+: torch._dynamo.graph_break"):
                function(Net(broken=1), args=(BATCH,))

    def test_a_model_that_dynamo_does_not_trace(self) -> None:
        with pytest.raises(ac.ChainCutError, match=r"LSTM can't be captured in one graph: a graph break \(Attempted to wrap RNN"):
            ac.detect(nn.LSTM(4, 4), (torch.randn(2, 3, 4),))

    def test_code_around_the_model_may_break(self) -> None:
        model = converted()

        @torch.compile(backend=eager)
        def step(batch: Tensor) -> Tensor:
            batch = (batch + 1) % 8
            torch._dynamo.graph_break()
            return inner(batch)

        inner = torch.compile(model, backend=eager)
        torch.testing.assert_close(step(BATCH), ac.rewrite(model, args=(BATCH,))((BATCH + 1) % 8))

    def test_ddp_s_graph_splitting(self, tmp_path) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            for make in (Net, converted):  # each block holds a megabyte, DDP's default for the first bucket
                split = nn.parallel.DistributedDataParallel(make(width=512), bucket_cap_mb=1)
                with pytest.raises(ac.ChainCutError, match=r"DDP's graph splitting.*optimize_ddp = False"):
                    torch.compile(split, backend=eager)(BATCH)
                torch.compiler.reset()
            model = converted()
            expected = ac.rewrite(model, args=(BATCH,))(BATCH)
            with torch._dynamo.config.patch(optimize_ddp=False):
                whole = torch.compile(nn.parallel.DistributedDataParallel(model), backend=eager)
                torch.testing.assert_close(whole(BATCH), expected)
        finally:
            torch.distributed.destroy_process_group()

    def test_ddp_before_conversion(self, tmp_path) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            with torch._dynamo.config.patch(optimize_ddp=False), pytest.raises(ac.ConfigError, match="before wrapping it"):
                torch.compile(nn.parallel.DistributedDataParallel(Net()), backend=eager)(BATCH)
        finally:
            torch.distributed.destroy_process_group()


class TestMismatch:
    def test_another_number_of_sublayers(self) -> None:
        model = converted()
        compiled = torch.compile(model, backend=eager)
        compiled(BATCH)
        model.skip = 2
        with pytest.raises(ac.ParameterMismatchError, match="converted with 4 sites; this graph has 2"):
            compiled(BATCH)

    def test_a_layer_was_replaced(self) -> None:
        model = converted()
        model.blocks.append(Block())
        with pytest.raises(ac.ParameterMismatchError, match=r"4 sites; this graph has 5.*'norm'.*'blocks\.4\.norm'"):
            torch.compile(model, backend=eager)(BATCH)

    def test_deleted_parameters(self) -> None:
        model = converted()
        compiled = torch.compile(model, backend=eager)
        compiled(BATCH)
        del model.attnres.sites[1].query
        with pytest.raises(ac.ParameterMismatchError, match=r"attnres\.sites\.1\.query was deleted"):
            compiled(BATCH)

    def test_removed_attnres(self) -> None:
        model = converted()
        compiled = torch.compile(model, backend=eager)
        compiled(BATCH)
        del model.attnres
        with pytest.raises(ac.ParameterMismatchError):
            compiled(BATCH)

    def test_other_options_than_the_conversion_s(self) -> None:
        with pytest.raises(ac.ConfigError, match="leave the options out"):
            torch.compile(converted(), backend=eager, options={"num_blocks": 2})(BATCH)

    def test_a_part_of_a_converted_model(self) -> None:
        model = converted()
        outer = nn.Sequential(model)
        torch.testing.assert_close(torch.compile(outer, backend=eager)(BATCH), ac.rewrite(model, args=(BATCH,))(BATCH))

    def test_several_models_in_one_graph(self) -> None:
        a, b = converted(), converted()
        with pytest.raises(ac.ConfigError, match="several"):
            torch.compile(lambda batch: a(batch) + b(batch), backend=eager)(BATCH)


class TestRefusals:
    def test_post_norm(self) -> None:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )  # fmt: skip
        with pytest.raises(
            ac.NoResidualChainError, match=r"post-norm: 'bert\.encoder\.layer\.0\.attention\.output\.LayerNorm' normalises"
        ):
            ac.convert_(BertForMaskedLM(config), args=(BATCH,))

    def test_reordered_norm(self) -> None:
        from transformers import Olmo2Config, Olmo2ForCausalLM

        config = Olmo2Config(
            vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, pad_token_id=0
        )
        report = ac.detect(Olmo2ForCausalLM(config), (BATCH,), {"use_cache": False})
        (refusal,) = report.near_misses()
        assert report.chains == () and refusal.size == 6
        assert "reordered norm" in refusal.reason and "'model.layers.0.post_attention_layernorm'" in refusal.reason
        assert (refusal.module == "model.layers.0.self_attn.q_proj" and "linear.py" in refusal.source_line) or refusal.source_line

    def test_a_layer_on_its_own(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True)
        with pytest.raises(ac.NoResidualChainError, match="begins at a graph input"):
            ac.convert_(layer, args=(torch.randn(2, 3, 16),))

    def test_backend_refuses_as_convert_does(self) -> None:
        with pytest.raises(ac.NoResidualChainError, match="Linear has no residual chain"):
            torch.compile(nn.Linear(4, 4), backend=eager)(torch.randn(2, 4))


class TestBadInput:
    def test_no_module(self) -> None:
        for function in (ac.detect, ac.convert_, ac.rewrite):
            with pytest.raises(ac.ModelTypeError, match=r"expected a torch\.nn\.Module, not int"):
                function(3)
            assert issubclass(ac.ModelTypeError, TypeError)

    def test_empty_models(self) -> None:
        for model in (nn.Sequential(), nn.Identity()):
            with pytest.raises(ac.NoResidualChainError, match="No residual add carries a stream"):
                ac.convert_(model, args=(torch.randn(2, 4),))

    def test_unknown_option(self) -> None:
        with pytest.raises(ac.ConfigError, match=r"unknown option 'blocks'; the options are: variant, num_blocks, block_size"):
            torch.compile(Net(), backend="attnres", options={"blocks": 2})(BATCH)

    def test_more_blocks_than_sublayers(self) -> None:
        with pytest.raises(ac.ConfigError, match="num_blocks=5 is more than the 4 sublayers"):
            torch.compile(Net(), backend=eager, options={"num_blocks": 5})(BATCH)
        with pytest.raises(ac.ConfigError, match="num_blocks=5 is more than the 4 sublayers"):
            ac.convert_(Net(), ac.AttnResConfig(num_blocks=5), (BATCH,))

    def test_a_failed_conversion_changes_nothing(self) -> None:
        model = Net()
        with pytest.raises(ac.ConfigError):
            ac.convert_(model, ac.AttnResConfig(num_blocks=5), (BATCH,))
        assert not hasattr(model, "attnres") and not model._forward_pre_hooks
        model(BATCH)

    def test_converting_twice(self) -> None:
        with pytest.raises(ac.ConfigError, match="converted before"):
            ac.convert_(converted(), args=(BATCH,))

    def test_rewriting_the_rewritten(self) -> None:
        rewritten = ac.rewrite(Net(), args=(BATCH,))
        for function in (ac.detect, ac.convert_, ac.rewrite):
            with pytest.raises(ac.ConfigError, match="rewritten before"):
                function(rewritten, args=(BATCH,))

    def test_an_attribute_of_that_name(self) -> None:
        model = Net()
        model.attnres = 3
        with pytest.raises(ac.ConfigError, match="already has an attribute 'attnres'"):
            ac.convert_(model, args=(BATCH,))

    def test_wrong_config_type(self) -> None:
        with pytest.raises(ac.ConfigError, match="must be an AttnResConfig, not dict"):
            ac.convert_(Net(), {"num_blocks": 2}, (BATCH,))  # type: ignore[arg-type]


class TestRewrittenModule:
    def test_other_arguments_raise(self) -> None:
        model = Net()
        rewritten = ac.rewrite(model, args=(BATCH,))
        torch.testing.assert_close(rewritten(ids=BATCH), model(BATCH))
        with pytest.raises(ac.CaptureError, match=r"shape \[2, 3\].*is called with one of shape \[2, 2\]"):
            rewritten(BATCH[:, :2])
        with pytest.raises(ac.CaptureError, match=r"int64.*int32"):
            rewritten(BATCH.int())
        with pytest.raises(TypeError, match="missing a required argument: 'ids'"):
            rewritten()

    def test_mode_matters_only_where_the_graph_differs(self) -> None:
        model = Net().train()
        rewritten = ac.rewrite(model, args=(BATCH,))
        torch.testing.assert_close(rewritten.eval()(BATCH), model(BATCH))
        assert model.training

        class Dropping(Net):
            def forward(self, ids: Tensor) -> Tensor:
                return nn.functional.dropout(super().forward(ids), 0.5, self.training)

        rewritten = ac.rewrite(Dropping().train(), args=(BATCH,))
        rewritten(BATCH)
        with pytest.raises(ac.CaptureError, match="rewritten in training mode, is called in evaluation mode"):
            rewritten.eval()(BATCH)

    def test_names_are_the_model_s_and_attnres(self) -> None:
        model = tiny("gpt2")
        rewritten = ac.rewrite(model, args=(IDS,), kwargs={"use_cache": False})
        added = {f"attnres.sites.{i}.{kind}" for i in range(8) for kind in ("query", "key_norm")}
        assert set(rewritten.state_dict()) == set(model.state_dict()) | added
        assert rewritten.get_parameter("transformer.wte.weight") is model.transformer.wte.weight
        assert not hasattr(model, "attnres")

    def test_a_copy_is_independent(self) -> None:
        rewritten = ac.rewrite(Net(), args=(BATCH,))
        copied = copy.deepcopy(rewritten)
        expected = rewritten(BATCH)
        with torch.no_grad():
            for parameter in rewritten.parameters():
                parameter.add_(1.0)
        torch.testing.assert_close(copied(BATCH), expected)
        assert not torch.allclose(rewritten(BATCH), expected)

    def test_results_keep_their_structure(self) -> None:
        from transformers.cache_utils import DynamicCache
        from transformers.modeling_outputs import CausalLMOutputWithPast

        model = tiny("llama").eval()
        rewritten = ac.rewrite(model, args=(IDS,))
        for batch in (IDS, IDS.flip(0)):
            found, expected = rewritten(batch), model(batch)
            assert isinstance(found, CausalLMOutputWithPast) and isinstance(found.past_key_values, DynamicCache)
            torch.testing.assert_close(found.logits, expected.logits)
            torch.testing.assert_close(found.past_key_values.layers[3].keys, expected.past_key_values.layers[3].keys)

    def test_it_can_t_be_pickled_and_says_so(self) -> None:
        with pytest.raises(ac.ModelTypeError, match="state_dict"):
            torch.save(ac.rewrite(Net(), args=(BATCH,)), os.devnull)
