"""A representative part of the zoo: verdicts are those recorded and those derived by hand, and no rewrite has a fault.

``make zoo`` checks every model and records the verdicts; a difference in verdicts.json is a decision to be made.
"""

import json
from pathlib import Path

import own_models
import pytest
import x_transformers_variants
from entries import all_entries
from interpreter import make_faithful
from measure import Row, measure
from table import faults_of
from transformers.models.auto import modeling_auto

make_faithful()

RECORDED = {
    name: Row.from_dict(fields) for name, fields in json.loads((Path(__file__).parent / "verdicts.json").read_text()).items()
}
ENTRIES = {entry.name: entry for entry in all_entries()}
BY_HAND = {**own_models.EXPECTED, **{f"x-transformers, {name}": v for name, v in x_transformers_variants.EXPECTED.items()}}

# One or two of everything that Transformers has: kinds of chains, norms, adds, families, reasons to refuse.
REPRESENTATIVE = """
LlamaForCausalLM Qwen3ForCausalLM GPT2LMHeadModel OPTForCausalLM BloomForCausalLM CpmAntForCausalLM GPTBigCodeForCausalLM
MegatronBertForCausalLM XLMRobertaXLForCausalLM OpenAIGPTLMHeadModel GraniteForCausalLM NemotronForCausalLM NanoChatForCausalLM
PhiForCausalLM GPTJForCausalLM FalconForCausalLM CohereForCausalLM GPTNeoXForCausalLM
Gemma2ForCausalLM Glm4ForCausalLM Gemma4UnifiedForCausalLM AfmoeForCausalLM OlmoHybridForCausalLM
MixtralForCausalLM Qwen3MoeForCausalLM DeepseekV3ForCausalLM GptOssForCausalLM KimiLinearForCausalLM ZayaForCausalLM
MambaForCausalLM Mamba2ForCausalLM RwkvForCausalLM BambaForCausalLM Zamba2ForCausalLM NemotronHForCausalLM
Olmo2ForCausalLM DeepseekV4ForCausalLM HYV4ForCausalLM HrmTextForCausalLM InklingForCausalLM Inkling2ForCausalLM BartForCausalLM
BertForMaskedLM ModernBertForMaskedLM MobileBertForMaskedLM NeoMMEForMaskedLM PerceiverForMaskedLM
T5ForConditionalGeneration PegasusForConditionalGeneration BlenderbotForConditionalGeneration PegasusXForConditionalGeneration
ViTForImageClassification BeitForImageClassification Dinov2ForImageClassification SwinForImageClassification
Swinv2ForImageClassification ConvNextForImageClassification PoolFormerForImageClassification PvtV2ForImageClassification
ResNetForImageClassification ImageGPTForImageClassification TimesformerForVideoClassification YolosModel Dinov2Backbone
CLIPTextModel SiglipVisionModel LlavaForConditionalGeneration Qwen3VLForConditionalGeneration IdeficsForVisionText2Text
"""


# Those of which the Triton kernels compute the sites as well; `make zoo` does that for all.
ON_KERNELS = """
LlamaForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM Gemma2ForCausalLM MixtralForCausalLM Mamba2ForCausalLM KimiLinearForCausalLM
T5ForConditionalGeneration ViTForImageClassification SwinForImageClassification
"""


@pytest.mark.parametrize("name", REPRESENTATIVE.split())
def test_transformers_classes(name: str) -> None:
    row = measure(ENTRIES[name], kernels=name in ON_KERNELS.split())
    assert row.verdict == RECORDED[name].verdict
    assert faults_of(row) == []


@pytest.mark.parametrize("name", BY_HAND)
def test_models_whose_verdict_is_known_by_hand(name: str) -> None:
    row = measure(ENTRIES[name], kernels=False)
    assert row.problem == ""
    if isinstance(BY_HAND[name], str):
        assert row.chains == ()
        assert BY_HAND[name] in row.refusal
    else:
        assert row.chains == BY_HAND[name]
    assert row.verdict == RECORDED[name].verdict
    assert faults_of(row) == []


def test_no_entry_is_without_a_recorded_verdict() -> None:
    assert list(RECORDED) == list(ENTRIES)


@pytest.mark.parametrize(
    "task", ["CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "BACKBONE", "TEXT_ENCODING"]
)
def test_no_class_of_the_auto_mappings_is_without_an_entry(task: str) -> None:
    mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    classes = {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}
    assert classes <= set(ENTRIES)


def test_no_recorded_rewrite_has_a_fault() -> None:
    assert {name: faults for name, row in RECORDED.items() if (faults := faults_of(row))} == {}
