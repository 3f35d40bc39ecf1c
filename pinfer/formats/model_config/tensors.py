"""The tensors a model needs, those it may have, and the check that a file holds them and no others."""

from __future__ import annotations

from pinfer.config import ModelConfig
from pinfer.formats.errors import shown
from pinfer.formats.model_file import FLOAT_DTYPES, ModelFile
from pinfer.formats.powerinfer import EMBEDDED, expect_neuron_major, is_neuron_major

Shapes = dict[str, tuple[int, ...]]

_BIASED_ATTENTION = ("qwen2", "opt")  # biases are part of the architecture; elsewhere they may be there
_QK_NORMED = ("gemma3", "qwen3", "qwen3moe")
_POST_NORMED = ("gemma2", "gemma3")


def expected_tensors(config: ModelConfig) -> Shapes:
    """Name and shape `[rows, columns]`, `[n]` or `[experts, rows, columns]` of every tensor a model needs, in its own order."""
    expected: Shapes = {"token_embd.weight": (config.vocab_size, config.d_model)}
    if config.rope is None:
        expected["position_embd.weight"] = (config.context_length + config.position_offset, config.d_model)
    block = _block(config)
    for layer in range(config.n_layers):
        expected |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return expected | _norm("output_norm", config)


def optional_tensors(config: ModelConfig) -> Shapes:
    """The same of tensors that a file may have: an output matrix of its own, biases, a second norm, frequency factors.

    Without `output.weight` the output matrix is the embedding.
    """
    optional: Shapes = {"output.weight": (config.vocab_size, config.d_model)}
    if config.rope is not None:
        factors = (config.rope.dim // 2,)
        optional |= {f"{name}.weight": factors for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")}
    block = _attention_biases(config) if config.architecture not in ("gemma2", "gemma3") else {}
    if config.architecture == "falcon":
        block |= _norm("attn_norm_2", config)
    if config.experts is None:
        block["ffn_down.bias"] = (config.d_model,)
        block["ffn_gate.bias" if config.gated else "ffn_up.bias"] = (config.d_ffn,)
    for layer in range(config.n_layers):
        optional |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return optional


def _block(config: ModelConfig) -> Shapes:
    d_model, head_dim = config.d_model, config.head_dim
    block = _norm("attn_norm", config) | {
        "attn_q.weight": (config.n_heads * head_dim, d_model),
        "attn_k.weight": (config.n_kv_heads * head_dim, d_model),
        "attn_v.weight": (config.n_kv_heads * head_dim, d_model),
        "attn_output.weight": (d_model, config.n_heads * head_dim),
    }
    if config.architecture in _BIASED_ATTENTION:
        biases = _attention_biases(config)
        block |= {name: biases[name] for name in ("attn_q.bias", "attn_k.bias", "attn_v.bias")}
    if config.architecture != "falcon":  # whose FFN reads what attention reads
        block |= _norm("ffn_norm", config)
    block |= _ffn(config)
    if config.architecture in _QK_NORMED:
        block |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if config.architecture in _POST_NORMED:
        block |= {"post_attention_norm.weight": (d_model,), "post_ffw_norm.weight": (d_model,)}
    return block


def _ffn(config: ModelConfig) -> Shapes:
    n, d = config.d_ffn, config.d_model
    parts: Shapes = {"ffn_gate": (n, d)} if config.gated else {}
    parts |= {"ffn_up": (n, d), "ffn_down": (d, n)}
    if config.experts is None:
        return {f"{name}.weight": shape for name, shape in parts.items()}
    count = config.experts.count
    stacked = {f"{name}_exps.weight": (count, *shape) for name, shape in parts.items()}
    return {"ffn_gate_inp.weight": (count, d)} | stacked


def _norm(name: str, config: ModelConfig) -> Shapes:
    parts = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (config.d_model,) for part in parts}


def _attention_biases(config: ModelConfig) -> Shapes:
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = {"attn_q": queries, "attn_k": keys, "attn_v": keys, "attn_output": config.d_model}
    return {f"{name}.bias": (count,) for name, count in rows.items()}


def check_tensors(file: ModelFile, config: ModelConfig) -> None:
    """Check that a file holds the model's tensors in their shapes, and no other; reads no weights.

    Raises FormatError naming the first tensor that is missing, misshapen, not of floats where it must be, or unknown
    (an ignored bias would silently change the model).
    """
    optional = optional_tensors(config)
    expected = expected_tensors(config) | {name: shape for name, shape in optional.items() if file.has(name)}
    if is_neuron_major(file):
        expected = expect_neuron_major(file, expected)
    for name, shape in expected.items():
        info = file.info(name)
        if info.shape != shape:
            raise file.error(f"tensor {shown(name)} has shape {list(info.shape)}, not {list(shape)}")
        if len(shape) == 1 and info.type not in FLOAT_DTYPES:
            what = "a bias" if name.endswith(".bias") else "a norm"
            raise file.error(f"tensor {shown(name)} is {info.type}; {what} must be F32, F16 or BF16")
    for name in file.tensors:
        if name not in expected and not name.startswith(EMBEDDED):
            raise file.error(f"tensor {shown(name)} is not supported yet for {config.architecture}")
    pair = [file.has(f"rope_factors_{which}.weight") for which in ("long", "short")]
    if any(pair) and not (all(pair) and config.rope and config.rope.original_context):
        raise file.error("rope_factors_long and _short need each other and 'rope.scaling.original_context_length'")
