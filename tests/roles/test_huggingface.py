"""Roles in real Hugging Face models on the meta device, against what their modules are and what their forwards do."""

import re

import pytest

pytest.importorskip("transformers")

import hf_sweep

from lightning_adapm import AdaPM

CLASSES = hf_sweep.model_classes()

# One of each way to write attention and MLPs; the slow test has all the others.
FAMILIES = """
LlamaForCausalLM MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen2MoeForCausalLM
Qwen3MoeForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration PhiForCausalLM
Phi3ForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM BloomForCausalLM FalconForCausalLM OPTForCausalLM GPTJForCausalLM
GPTNeoForCausalLM CodeGenForCausalLM GPTBigCodeForCausalLM MptForCausalLM StableLmForCausalLM Starcoder2ForCausalLM
OlmoForCausalLM CohereForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM GptOssForCausalLM Llama4ForCausalLM
T5ForConditionalGeneration MT5ForConditionalGeneration BartForConditionalGeneration WhisperForConditionalGeneration
BertForMaskedLM RobertaForMaskedLM AlbertForMaskedLM DistilBertForMaskedLM ElectraForPreTraining DebertaForMaskedLM
DebertaV2ForMaskedLM XLNetLMHeadModel ViTModel DeiTModel BeitModel SwinModel CLIPModel SiglipModel Dinov2Model
ModernBertForMaskedLM LongformerModel XLMModel CpmAntForCausalLM Qwen2VLForConditionalGeneration EncoderDecoderModel
VisionEncoderDecoderModel SegformerModel
""".split()


@pytest.mark.parametrize("name", FAMILIES)
def test_right_by_rule(name):
    result = hf_sweep.examine(hf_sweep.build(name, CLASSES[name]))
    assert (result.outcome, result.names, result.wrong) == ("by rule", [], [])
    assert result.confirmed or name in ("LongformerModel", "Qwen2VLForConditionalGeneration")  # stop before attention


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("MambaForCausalLM", "mixer.in_proj"),
        ("JambaForCausalLM", "mamba.in_proj"),
        ("FalconH1ForCausalLM", "mamba.in_proj"),  # beside attention in every block
        ("Qwen3NextForCausalLM", "linear_attn.in_proj_qkvz"),
        ("RecurrentGemmaForCausalLM", "temporal_block.linear_x"),
        ("RwkvForCausalLM", "attention.receptance"),
        ("xLSTMForCausalLM", "mlstm_layer.q"),
        ("Wav2Vec2Model", "conv_layers.N.conv"),
        ("ResNetModel", "convolution"),
        ("LevitModel", "queries_keys_values"),  # values of another head size than queries
        ("EfficientFormerModel", "token_mixer.qkv"),
        ("MiniMaxForCausalLM", "self_attn.output_gate"),
    ],
)
def test_what_has_no_role_is_refused_by_name(name, refused):
    model = hf_sweep.build(name, CLASSES[name])
    with pytest.raises(ValueError, match=r"roles=\{|n_head=") as error:
        AdaPM(model.parameters())
    assert any(refused in found for found in hf_sweep.refused_names(str(error.value)))


def roles_of(name, **options):
    model = hf_sweep.build(name, CLASSES[name])
    optimizer = AdaPM(model.parameters(), **options)
    pieces = {re.sub(r"\d+", "N", n): optimizer.pieces[p] for n, p in model.named_parameters()}
    return {n: "/".join(piece.role for piece in found) for n, found in pieces.items()}, pieces


def test_what_lies_between_widths_is_an_mlp():
    roles, _ = roles_of("CLIPModel")
    assert roles["visual_projection.weight"] == roles["text_projection.weight"] == "mlp"
    assert roles["vision_model.embeddings.patch_embedding.weight"] == "mlp"
    assert roles["vision_model.embeddings.position_embedding.weight"] == "embedding"
    roles, _ = roles_of("AlbertForMaskedLM")
    assert roles["albert.encoder.embedding_hidden_mapping_in.weight"] == "mlp"
    roles, _ = roles_of("ElectraForPreTraining")
    assert roles["electra.embeddings_project.weight"] == roles["discriminator_predictions.dense.weight"] == "mlp"
    roles, _ = roles_of("Gemma3ForConditionalGeneration")
    assert roles["model.multi_modal_projector.mm_input_projection_weight"] == "mlp"


def test_tables_of_positions_and_biases():
    roles, _ = roles_of("SwinModel")
    assert roles["encoder.layers.N.blocks.N.attention.self.relative_position_bias_table"] == "bias"
    assert roles["encoder.layers.N.downsample.reduction.weight"] == "mlp"
    roles, _ = roles_of("XLNetLMHeadModel")
    assert roles["transformer.layer.N.rel_attn.r_w_bias"] == "bias"
    assert roles["transformer.layer.N.rel_attn.seg_embed"] == "embedding"
    assert roles["transformer.layer.N.rel_attn.r"] == "key"


def test_experts_of_three_dimensions():
    """Their outputs are columns, and a matrix of biases is none of weights."""
    roles, pieces = roles_of("GptOssForCausalLM", second_moment="block")
    assert roles["model.layers.N.mlp.experts.gate_up_proj_bias"] == "bias"
    assert roles["model.layers.N.mlp.experts.gate_up_proj"] == "mlp"
    for name in ("gate_up_proj", "down_proj"):
        assert pieces[f"model.layers.N.mlp.experts.{name}"][0].transposed
    _, pieces = roles_of("Llama4ForCausalLM", second_moment="block")
    assert pieces["model.layers.N.feed_forward.experts.down_proj"][0].transposed


def test_three_dimensional_projections_of_xlnet():
    _, pieces = roles_of("XLNetLMHeadModel", second_moment="block")
    (query,), (out,) = (pieces[f"transformer.layer.N.rel_attn.{child}"] for child in "qo")
    assert (query.flat, query.transposed, query.heads) == (True, True, 16)
    assert (out.role, out.flat, out.transposed) == ("attn_out", True, False)


def test_a_mixture_of_attention_heads():
    roles, _ = roles_of("JetMoeForCausalLM")
    assert roles["model.layers.N.self_attention.experts.input_linear.weight"] == "query"
    assert roles["model.layers.N.self_attention.experts.output_linear.weight"] == "attn_out"
    assert roles["model.layers.N.self_attention.kv_proj.weight"] == "key/value"
    assert roles["model.layers.N.mlp.input_linear.weight"] == "mlp"


def test_gate_and_up_are_two_weights():
    _, pieces = roles_of("Phi3ForCausalLM")
    gate, up = pieces["model.layers.N.mlp.gate_up_proj.weight"]
    assert (gate.role, gate.prefix, up.role, up.prefix) == ("mlp", "gate.", "mlp", "up.")
    assert (gate.start, gate.stop, up.start, up.stop) == (0, 8192, 8192, 16384)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_class_and_the_page_that_lists_them():
    """The page is written by ``python tests/helpers/architectures.py``."""
    import architectures

    results = hf_sweep.sweep()
    assert {name: result.wrong for name, result in results.items() if result.wrong} == {}
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page(results)
