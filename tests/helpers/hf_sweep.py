"""What AdaPM makes of every model class of the installed transformers that builds on the meta device.

Nothing is downloaded and no weight gets memory: classes are built from their default configurations, with fewer layers
and experts. ``tests/helpers/architectures.py`` writes the results to docs/architectures.md.
"""

import gc
import os
import re
import warnings
from dataclasses import dataclass, field

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from observed import observe
from torch import nn
from transformers.modeling_utils import no_init_weights
from transformers.models.auto import configuration_auto, modeling_auto

from lightning_adapm import AdaPM

LAYERS = (
    r"(num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_(num_(hidden_)?)?layers|depth|num_blocks)$"
)
EXPERTS = r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$"
ROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}}

# What default configurations lack, by model type.
ARGUMENTS = {
    "apertus": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 256},
    "autoformer": {"prediction_length": 8},
    "beit": {"out_indices": [3, 5, 7, 11]},
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "data2vec-vision": {"out_indices": [3, 5, 7, 11]},
    "dots1": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_hidden_layers": 3},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "mamba", "attention"],
                         "num_local_experts": 4, "num_experts_per_tok": 2},
    "hiera": {"decoder_hidden_size": 512, "decoder_depth": 2, "decoder_num_heads": 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "informer": {"prediction_length": 8},
    "ministral": {"head_dim": 128},
    "mllama": {"text_config": {"rope_scaling": {"rope_type": "default"}}},
    "nemotron": {"num_key_value_heads": 8},
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
    "qwen3_vl": {"text_config": ROPE},
    "qwen3_vl_moe": {"text_config": ROPE | {"num_experts": 4}},
    "reformer": {"is_decoder": True},
    "time_series_transformer": {"prediction_length": 8},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}  # fmt: skip


def composite(kind):
    """Configurations that are made of others; None for other model types."""
    t = transformers
    bert, vit, gpt2 = t.BertConfig(num_hidden_layers=2), t.ViTConfig(num_hidden_layers=2), t.GPT2Config(n_layer=2)
    audio, music = t.EncodecConfig(), t.MusicgenDecoderConfig(num_hidden_layers=2)
    makers = {
        "encoder-decoder": lambda: t.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert),
        "vision-encoder-decoder": lambda: t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2),
        "speech-encoder-decoder": lambda: t.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
            t.Wav2Vec2Config(num_hidden_layers=2), bert
        ),
        "vision-text-dual-encoder": lambda: t.VisionTextDualEncoderConfig.from_vision_text_configs(vit, bert),
        "musicgen": lambda: t.MusicgenConfig.from_sub_models_config(t.T5Config(num_layers=2), audio, music),
    }
    return makers[kind]() if kind in makers else None


# Tried in order where a model is refused; the first that is enough is reported. Mixers and convolutions get AdamW's
# momentum, which is always right.
MIXERS = {r"\.(mamba|mixer|mlstm_layer|linear_attn|temporal_block|mega_layer)\.": "full"}
CONVOLUTIONS = {r"conv|\.parametrizations\.": "full"}
TEACHINGS = (
    {r"post_attention\.conv1d": "attn_out"},
    MIXERS,
    CONVOLUTIONS,
    CONVOLUTIONS | {r"gru_rel_pos_linear|project_q|label_embeddings_concat": "full"},
    CONVOLUTIONS | {r"\.lstm\.": "full"},
    {r"blocks\.\d+\.attention\.": "full"},  # RWKV's time mixing
    {r"self_attn\.output_gate": "mlp"},
    {r"self_attn\.dt_proj": "full"},
    {r"relative_pos_embeddings": "query"},
    {r"cluster_weight": "lm_head"},
    {r"subsampling\.layers": "full"},
    {r"embeddings\.projection|output\.dense|transform\.dense|seq_relationship": "mlp"},
)


@dataclass
class Result:
    """Of one model class."""

    outcome: str
    """``by rule``, ``taught``, ``refused`` or ``not built``."""
    names: list[str] = field(default_factory=list)
    """Of the matrices that no rule matched, numbers as N; or why it was not built."""
    taught: dict[str, str] = field(default_factory=dict)
    confirmed: int = 0
    """How many attention weights have the role that they were seen in."""
    wrong: list[str] = field(default_factory=list)
    """What contradicts the model; a test fails then."""


def model_classes():
    """``{class name: model type}`` of all that transformers' tables list."""
    known = set(dir(transformers))  # not hasattr, which imports every model: seconds, and objects in every search
    tables = [name for name in dir(modeling_auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)]
    found = {}
    for table in tables:
        for kind, names in getattr(modeling_auto, table).items():
            for name in [names] if isinstance(names, str) else names:
                if name in known:
                    found.setdefault(name, kind)
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def shrunk(config):
    """Keyword arguments that make a configuration smaller."""
    smaller = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            smaller |= {key: inner} if (inner := shrunk(value)) else {}
        elif type(value) is int and value > 8 and re.search(LAYERS, key):
            smaller[key] = 8
        elif type(value) is int and value > 4 and re.search(EXPERTS, key):
            smaller[key] = 4
    return smaller


def configurations(name, kind):
    """Ways to configure a class, smallest first."""
    if (made := composite(kind)) is not None:
        yield made
        return
    makers = [configuration_auto.CONFIG_MAPPING[kind], getattr(transformers, name).config_class]
    for make in dict.fromkeys(makers):
        arguments = ARGUMENTS.get(getattr(make, "model_type", kind), ROPE if "qwen3_vl" in kind else {})
        if make is makers[-1] and "mllama" in kind:
            arguments = arguments or ARGUMENTS["mllama"]["text_config"]
        for wanted in (shrunk, lambda _: {}):
            try:
                yield make(**(wanted(make(**arguments)) | arguments))
            except Exception:
                continue


def build(name, kind):
    """The model on the meta device.

    Raises:
        Exception: whatever its class raises, where no configuration suits it.
    """
    failure = None
    for config in configurations(name, kind):
        config._attn_implementation = "eager"
        config.reference_compile = False  # ModernBERT compiles itself where Triton is installed
        for device in ("meta", "cpu") if kind == "apertus" else ("meta",):  # whose activation reads its parameters
            try:
                with torch.device(device), no_init_weights():
                    return getattr(transformers, name)(config).to("meta")
            except Exception as error:
                failure = failure or error
    raise failure or ValueError("no configuration can be made")


def assign(model, first, **options):
    """The optimizer, with heads for block second moments; without names, too, for the ``first`` class of a type."""
    optimizer = AdaPM(model.named_parameters(), second_moment="block", **options)
    return AdaPM(model.parameters(), **options) if first else optimizer


def examine(model, look=True):
    """Build the optimizer, teach it where it refuses, and compare what it decided with what the model does.

    ``look``: no class of this type has been looked at yet.
    """
    result = Result("by rule")
    try:
        optimizer = assign(model, look)
    except ValueError as error:
        result.outcome, result.names = "refused", refused_names(str(error))
        for taught in TEACHINGS:
            try:
                optimizer = assign(model, look, roles=taught)
            except ValueError:
                continue
            result.outcome, result.taught = "taught", taught
            break
        else:
            try:
                optimizer = AdaPM(model.parameters(), unmatched="full")
            except ValueError:  # rows that cannot be told apart
                return result
    check(model, optimizer, result, look)
    return result


def refused_names(message):
    """The parameters that an error of AdaPM names."""
    names = re.findall(r"^  (\S+)  \(.*\)$", message, re.MULTILINE)
    names = names or re.findall(r"per head of (\S+)", message) or [message.partition(" of shape")[0]]
    return list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names))


def check(model, optimizer, result, look):
    """What the module tree says (embeddings, norms, the head) and, if ``look``, what a forward shows."""
    names = {param: name for name, param in model.named_parameters()}
    pieces = {param: {piece.role for piece in optimizer.pieces[param]} for param in names}
    expected = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            expected[module.weight] = {"embedding"}
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            expected[module.weight] = {"norm"}
    for param, roles in (observe(model) if look else {}).items():
        if param not in names:
            continue
        if "_a_" in names[param]:  # latent attention: values are made of its rows by a second weight
            roles |= pieces[param] & {"value"}
        if roles == {"query", "key"} and len(pieces[param]) == 1:  # one weight for both: Reformer, DeBERTa
            roles = roles & pieces[param] or roles
        expected.setdefault(param, roles)
        result.confirmed += pieces[param] == roles
    for param, roles in expected.items():
        if param in names and pieces[param] not in (roles, {"unmatched"}, {"full"}, {"adapter"}):
            result.wrong.append(f"{names[param]}: {'/'.join(sorted(pieces[param]))}, but is {'/'.join(sorted(roles))}")


def leave_out_of_searches(imported):
    """Keep what importing a class has made out of the search for live modules, which every optimizer makes several
    times: among a million objects it would take most of the sweep.
    """
    gc.collect()
    gc.freeze()


def sweep(classes=None):
    """``{class name: Result}``; of each model type, forwards are run until one has shown attention weights."""
    results, shown = {}, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        for name, kind in (classes or model_classes()).items():
            model = None
            leave_out_of_searches(getattr(transformers, name))
            try:
                model = build(name, kind)
            except Exception as error:
                reason = next(iter(str(error).strip().splitlines()), "")
                results[name] = Result("not built", [f"{type(error).__name__}: {reason}"])
                continue
            results[name] = examine(model, look=kind not in shown)
            if results[name].confirmed:
                shown.add(kind)
    return results
