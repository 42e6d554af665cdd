"""Pretrained LLaMA models as decoders of ours: from the hub, a folder, or a GGUF file.

`load` reads them through transformers (and, for GGUF, the package gguf), which are imported there:
`pip install 'gatebook[pretrained]'`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatebook.models import check_shapes
from gatebook.models.liger import LigerConfig, LigerDecoder

NAMES = {  # modules, ours to transformers'; those of a block below
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "mixer_norm": "input_layernorm",
    "mixer.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
JOINED = [f"self_attn.{name}_proj" for name in "qkv"]  # in one matrix of ours, in this order
FIELDS = {  # of the configuration, transformers' to ours
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "sliding_window": None}
MODEL_TYPES = ("llama", "mistral")


def load(path: str, device: str = "cpu") -> tuple[LigerDecoder, Any]:
    """A pretrained model with its own softmax attention, in float32, and its tokeniser.

    Args:
        path: A hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct", a folder with the same files,
            or a `.gguf` file.
        device: Where the model goes.

    Raises:
        ImportError: transformers or gguf is missing; it says what to install.
        OSError: transformers' own, for a path that is no model or cannot be reached.
        ValueError: A model of another architecture; it says what is known.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(
            f"a pretrained model needs transformers ({error}): pip install 'gatebook[pretrained]'"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if path.endswith(".gguf"):
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no GGUF file {file.name} at the path that was given")
        path, options = str(file.parent), {"gguf_file": file.name}
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    return from_llama(theirs.state_dict(), theirs.config.to_dict()).to(device), tokenizer


def from_llama(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LigerDecoder:
    """A model of ours with the weights of transformers' `LlamaForCausalLM`.

    Args:
        state: Its `state_dict()`; it is copied.
        config: Its `config.to_dict()`.

    Raises:
        ValueError: A field has a value that does not convert, or the state does not fit; the
            message gives names and shapes.
    """
    settings = llama_config(config)
    with torch.device("meta"):
        model = LigerDecoder(settings)
    found = {_our_name(name): tensor for name, tensor in state.items() if not _joined(name)}
    for layer in range(settings.n_layers):
        parts = [state.get(f"model.layers.{layer}.{name}.weight") for name in JOINED]
        if all(part is not None for part in parts):
            found[f"blocks.{layer}.mixer.qkv.weight"] = torch.cat(parts)
    if settings.tied:
        found.setdefault("head.weight", found.get("embedding.weight"))
    wanted = model.state_dict()
    check_shapes(wanted, found, "the pretrained state")
    model.load_state_dict({n: x.detach().clone() for n, x in found.items()}, assign=True)
    if settings.tied:
        model.head.weight = model.embedding.weight
    return model


def llama_config(config: Mapping[str, Any]) -> LigerConfig:
    """Our configuration, before conversion, for transformers' `LlamaConfig.to_dict()`.

    Raises:
        ValueError: A field has a value that does not convert; it says what does.
    """
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"model_type {config.get('model_type')!r} does not convert; {MODEL_TYPES} do"
        )
    for field, value in FIXED.items():
        if (given := config.get(field, value)) != value:
            raise ValueError(f"{field}={given!r} has no form here; only {value!r} converts")
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head * config["num_attention_heads"] != config["hidden_size"]:
        raise ValueError(f"head_dim={head} has no form here; only hidden_size / heads converts")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise ValueError(f"rope_type={kind!r} has no form here; only 'default' converts")
    base = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    sizes = {ours: config[theirs] for theirs, ours in FIELDS.items()}
    return LigerConfig(**sizes, rope_base=float(base), mixer="attention")


def _joined(name: str) -> bool:
    return any(f".{part}." in name for part in JOINED)


def _our_name(name: str) -> str:
    """Transformers' name of a tensor, such as `model.layers.3.mlp.up_proj.weight`, to ours."""
    ours = {theirs: ours for ours, theirs in NAMES.items()}
    module, _, leaf = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{ours.get(module, module)}.{leaf}"
    index, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blocks.{index}.{ours.get(part, part)}.{leaf}"
