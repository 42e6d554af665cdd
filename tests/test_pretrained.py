"""Pretrained LLaMA models: names, the architecture written out, what is refused, transformers."""

import math

import pytest
import torch
from torch.nn import functional as F

from gatebook.pretrained import from_llama, llama_config, load

CONFIG = {
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": 4,
}
LAYER = {
    "input_layernorm": (24,),
    "post_attention_layernorm": (24,),
    "self_attn.q_proj": (24, 24),
    "self_attn.k_proj": (8, 24),
    "self_attn.v_proj": (8, 24),
    "self_attn.o_proj": (24, 24),
    "mlp.gate_proj": (40, 24),
    "mlp.up_proj": (40, 24),
    "mlp.down_proj": (24, 40),
}


def weights(tied=False):
    """Random tensors under transformers' names."""
    shapes = {"model.embed_tokens.weight": (19, 24), "model.norm.weight": (24,)}
    shapes |= {} if tied else {"lm_head.weight": (19, 24)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
    gen = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=gen, dtype=torch.float64) * 0.3
        for name, shape in shapes.items()
    }


def written_out(w, x, theta=50.0):
    """Logits of a LLaMA decoder for one sequence, from its description, head by head."""

    def norm(h, name):
        return h / (h.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w[name]

    def turn(z):  # (T, 4): channels 0 and 2 are a pair, 1 and 3 another
        out = z.clone()
        for t in range(len(z)):
            for i in range(2):
                angle = t * theta ** (-2 * i / 4)
                a, b = z[t, i], z[t, i + 2]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    h = w["model.embed_tokens.weight"][x]
    for layer in range(2):
        p = f"model.layers.{layer}."
        z = norm(h, p + "input_layernorm.weight")
        q, k, v = (z @ w[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
        heads = []
        for i in range(6):
            g = i // 3
            qi, ki = turn(q[:, 4 * i : 4 * i + 4]), turn(k[:, 4 * g : 4 * g + 4])
            scores = (qi @ ki.T / 2).masked_fill(
                torch.ones(len(x), len(x)).triu(1).bool(), -math.inf
            )
            heads.append(scores.softmax(-1) @ v[:, 4 * g : 4 * g + 4])
        h = h + torch.cat(heads, -1) @ w[p + "self_attn.o_proj.weight"].T
        z = norm(h, p + "post_attention_layernorm.weight")
        gate, up = z @ w[p + "mlp.gate_proj.weight"].T, z @ w[p + "mlp.up_proj.weight"].T
        h = h + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(h, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_model_computes_what_the_architecture_says(tied):
    w, x = weights(tied), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    model = from_llama(w, CONFIG | {"tie_word_embeddings": tied})
    torch.testing.assert_close(model(x[None])[0], written_out(w, x), atol=1e-5, rtol=0)
    assert (model.head.weight is model.embedding.weight) == tied
    assert model.config.n_kv_heads == 2
    assert model.config.mixer == "attention"


def test_older_configurations_keep_theta_outside():
    older = {k: v for k, v in CONFIG.items() if k != "rope_parameters"} | {"rope_theta": 50.0}
    assert llama_config(older) == llama_config(CONFIG)
    assert llama_config(CONFIG).rope_base == 50.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", "model_type 'gpt2' does not convert"),
        ("attention_bias", True, "attention_bias=True has no form here; only False"),
        ("hidden_act", "gelu", "hidden_act='gelu' has no form here; only 'silu'"),
        ("head_dim", 8, "head_dim=8 has no form here"),
        ("rope_parameters", {"rope_type": "llama3"}, "rope_type='llama3' has no form here"),
        ("sliding_window", 4096, "sliding_window=4096 has no form here"),
    ],
)
def test_what_has_no_form_here_raises(field, value, message):
    with pytest.raises(ValueError, match=message):
        llama_config(CONFIG | {field: value})


def test_a_state_that_does_not_fit_raises():
    w = weights()
    del w["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"blocks.1.mixer.qkv.weight \[40, 24\] is missing"):
        from_llama(w, CONFIG)


def test_a_missing_file_is_named():
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"no GGUF file nothing\.gguf"):
        load("nothing.gguf")


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = from_llama(theirs.state_dict(), theirs.config.to_dict())
    x = torch.randint(19, (2, 12))
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-5, rtol=0)
