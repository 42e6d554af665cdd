"""GLA models of flash-linear-attention 0.6 (fla), `GLAForCausalLM`, from ours and back.

    theirs = GLAForCausalLM(GLAConfig(**fla_config(ours.config)))
    theirs.load_state_dict(gla_to_fla(ours))
    ours = gla_from_fla(theirs.state_dict(), theirs.config.to_dict())

Read in fla: `models/gla`, `layers/gla.py`, `modules/{mlp,norm,activations}`. Both compute the same
function; matrices have the same orientation and none is joined with another. What differs:

- Names, in `NAMES`.
- The gate's rank and τ are 16 in every `GLAForCausalLM`: its configuration has no field for them.
- fla has more: what `FIXED` lists converts at these values alone.
- Precision: fla takes log α in the type of the weights, ours in float32; its norms, SwiGLU and
  operator are Triton kernels, and the operator for at most 64 tokens is another one than for more.
- fla's layer on its own has ε = 1e-5 by default; in a `GLAForCausalLM`, 1e-6, as here.
- `pad_token_id` keeps the gradient of one row of fla's embedding at 0.

Nothing here imports fla.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gatebook.models import check_shapes
from gatebook.models.gla import GLAConfig, GLALanguageModel

NAMES = {  # modules, ours to fla's; those of a block below
    "embedding": "model.embeddings",
    "norm": "model.norm",
    "head": "lm_head",
    "mixer_norm": "attn_norm",
    "mixer.query": "attn.q_proj",
    "mixer.key": "attn.k_proj",
    "mixer.value": "attn.v_proj",
    "mixer.log_gate.down": "attn.gk_proj.0",
    "mixer.log_gate.up": "attn.gk_proj.1",
    "mixer.output_gate": "attn.g_proj",
    "mixer.norm": "attn.g_norm_swish_gate",
    "mixer.out": "attn.o_proj",
    "ffn_norm": "mlp_norm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}

FIELDS = {  # of the configuration, fla's to ours
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_heads": "n_heads",
    "expand_k": "expand_k",
    "expand_v": "expand_v",
    "norm_eps": "norm_eps",
    "initializer_range": "init_std",
}

FIXED = {  # fields of fla's configuration at the only value that converts, its default
    "attn": None,  # softmax attention in some of the layers
    "attnres_block_size": None,  # attention over the residuals of earlier layers
    "clamp_min": None,  # least log α
    "elementwise_affine": True,  # the norm of each head has a weight
    "feature_map": None,  # on q and k
    "fuse_norm": True,  # False has another name for the norm of each head
    "hidden_act": "swish",  # of the output gate and of the feed-forward network
    "num_kv_heads": None,  # fewer heads of k, v and α than of q
    "tie_word_embeddings": False,
    "use_output_gate": True,
    "use_short_conv": False,  # convolutions after the projections to q, k and v
}


def fla_config(config: GLAConfig) -> dict[str, Any]:
    """The arguments of fla's `GLAConfig` for a model of ours.

    `backend` and `chunk_size`, which change no function, have no counterpart and are left out.

    Raises:
        ValueError: fla has no such model; the message says what converts.
    """
    only = {"mixer": "gla", "gate": "vector", "gate_rank": 16, "tau": 16.0}
    for field, value in only.items():
        if (given := getattr(config, field)) != value:
            raise ValueError(f"{field}={given!r} has no form in fla; only {value!r} converts")
    for field in ("expand_k", "expand_v"):
        width = config.d_model * getattr(config, field)
        if not math.isclose(width, round(width)):
            raise ValueError(
                f"d_model · {field} = {width} is rounded here; fla wants a whole number"
            )
    sizes = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    return sizes | {"intermediate_size": config.d_ff or _ffn_width(config.d_model, 4)} | FIXED


def gla_to_fla(model: GLALanguageModel) -> dict[str, Tensor]:
    """The state of fla's `GLAForCausalLM` for a model of ours; it shares the model's memory.

    Raises:
        ValueError: fla has no such model; the message says what converts.
    """
    if not isinstance(model, GLALanguageModel):
        raise ValueError(f"only a GLALanguageModel converts; got a {type(model).__name__}")
    fla_config(model.config)
    return {_fla_name(name): tensor for name, tensor in model.state_dict().items()}


def gla_from_fla(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> GLALanguageModel:
    """A model of ours for one of fla's, in the type and on the device of its weights.

    Args:
        state: `GLAForCausalLM.state_dict()`; it is copied.
        config: `GLAConfig.to_dict()`, the content of its `config.json`, or `fla_config(...)`.

    Raises:
        ValueError: a field has a value that does not convert or is missing, or the state does not
            fit the configuration; the message gives names and shapes.
    """
    settings = _our_config(config)
    with torch.device("meta"):
        model = GLALanguageModel(settings)
    wanted = {_fla_name(name): tensor for name, tensor in model.state_dict().items()}
    check_shapes(wanted, state, "the state of fla's model")
    taken = {name: state[_fla_name(name)].detach().clone() for name in model.state_dict()}
    model.load_state_dict(taken, assign=True)
    return model


def _our_config(config: Mapping[str, Any]) -> GLAConfig:
    kind = config.get("model_type", "gla")
    if kind != "gla":
        raise ValueError(f"model_type {kind!r} does not convert; only 'gla' does")
    for field, value in FIXED.items():
        if (given := config.get(field, value)) != value:
            raise ValueError(f"fla's {field}={given!r} has no form here; only {value!r} converts")
    if missing := FIELDS.keys() - config.keys():
        raise ValueError(f"fla's configuration lacks {', '.join(sorted(missing))}")
    sizes = {ours: config[theirs] for theirs, ours in FIELDS.items()}
    d_ff = config.get("intermediate_size")
    d_ff = d_ff or _ffn_width(config["hidden_size"], config.get("hidden_ratio") or 4)
    return GLAConfig(**sizes, d_ff=d_ff, gate="vector", gate_rank=16, tau=16.0, mixer="gla")


def _ffn_width(d_model: int, ratio: float) -> int:
    """fla's width where none is given: ⅔ ratio D, up to a multiple of 256; ours at a ratio of 4."""
    return 256 * -(-int(d_model * ratio * 2 / 3) // 256)


def _fla_name(name: str) -> str:
    """Our name of a tensor, such as `blocks.3.mixer.key.weight`, to fla's."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{NAMES[module]}.{leaf}"
    _, index, part = module.split(".", 2)
    return f"model.layers.{index}.{NAMES[part]}.{leaf}"
