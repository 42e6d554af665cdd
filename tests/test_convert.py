"""GLA to and from flash-linear-attention 0.6: names, shapes, what is refused, and logits.

The logits need fla and transformers: on a CPU with fla's Triton kernels replaced by plain torch,
on a GPU as they are.
"""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gatebook import models
from gatebook.convert import fla_config, gla_from_fla, gla_to_fla
from gatebook.models.gla import GLAConfig, GLALanguageModel

SMALL = GLAConfig(
    vocab_size=11, d_model=24, n_layers=2, n_heads=2, expand_v=1.5, d_ff=40, norm_eps=1e-3
)

# fla's tensors of SMALL, read off its own model: the name of each, ours, and its shape.
OUTER = {
    "model.embeddings.weight": ("embedding.weight", [11, 24]),
    "model.norm.weight": ("norm.weight", [24]),
    "lm_head.weight": ("head.weight", [11, 24]),
}
LAYER = {
    "attn_norm.weight": ("mixer_norm.weight", [24]),
    "attn.q_proj.weight": ("mixer.query.weight", [12, 24]),
    "attn.k_proj.weight": ("mixer.key.weight", [12, 24]),
    "attn.v_proj.weight": ("mixer.value.weight", [36, 24]),
    "attn.g_proj.weight": ("mixer.output_gate.weight", [36, 24]),
    "attn.gk_proj.0.weight": ("mixer.log_gate.down.weight", [16, 24]),
    "attn.gk_proj.1.weight": ("mixer.log_gate.up.weight", [12, 16]),
    "attn.gk_proj.1.bias": ("mixer.log_gate.up.bias", [12]),
    "attn.o_proj.weight": ("mixer.out.weight", [24, 36]),
    "attn.g_norm_swish_gate.weight": ("mixer.norm.weight", [18]),
    "mlp_norm.weight": ("ffn_norm.weight", [24]),
    "mlp.gate_proj.weight": ("ffn.gate.weight", [40, 24]),
    "mlp.up_proj.weight": ("ffn.up.weight", [40, 24]),
    "mlp.down_proj.weight": ("ffn.down.weight", [24, 40]),
}
TABLE = OUTER | {
    f"model.layers.{i}.{theirs}": (f"blocks.{i}.{ours}", shape)
    for i in range(2)
    for theirs, (ours, shape) in LAYER.items()
}

ARGUMENTS = {
    "vocab_size": 11,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "expand_k": 0.5,
    "expand_v": 1.5,
    "intermediate_size": 40,
    "norm_eps": 1e-3,
    "initializer_range": 0.02,
    "attn": None,
    "attnres_block_size": None,
    "clamp_min": None,
    "elementwise_affine": True,
    "feature_map": None,
    "fuse_norm": True,
    "hidden_act": "swish",
    "num_kv_heads": None,
    "tie_word_embeddings": False,
    "use_output_gate": True,
    "use_short_conv": False,
}


def random_model(config=SMALL):
    """A model in which no two parameters are alike, norms and biases included."""
    torch.manual_seed(0)
    model = GLALanguageModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_names_and_shapes_are_those_of_fla():
    model = random_model()
    state, own = gla_to_fla(model), model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        name: shape for name, (_, shape) in TABLE.items()
    }
    for theirs, (ours, _) in TABLE.items():
        assert torch.equal(state[theirs], own[ours]), theirs


def test_arguments_of_flas_configuration():
    assert fla_config(SMALL) == ARGUMENTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"d_ff": 0, "init_std": 0.1, "norm_eps": 1e-5}])
def test_there_and_back_is_exact(changes, dtype):
    model = random_model(dataclasses.replace(SMALL, **changes)).to(dtype)
    back = gla_from_fla(gla_to_fla(model), fla_config(model.config))
    assert dataclasses.replace(back.config, d_ff=model.config.d_ff) == model.config
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_the_converted_model_has_memory_of_its_own():
    model = random_model()
    back = gla_from_fla(gla_to_fla(model), fla_config(SMALL))
    with torch.no_grad():
        back.head.weight.zero_()
    assert model.head.weight.abs().min() > 0


@pytest.mark.parametrize(
    ("d_model", "ratio", "width"), [(24, None, 256), (24, 4, 256), (96, 4, 256), (48, 12, 512)]
)
def test_feed_forward_width_that_fla_derives(d_model, ratio, width):
    """The least multiple of 256 that is at least ⅔ ratio D; the ratio is 4 where it is None."""
    config = dataclasses.replace(SMALL, d_model=d_model, d_ff=width)
    theirs = fla_config(config) | {"intermediate_size": None, "hidden_ratio": ratio}
    assert gla_from_fla(gla_to_fla(GLALanguageModel(config)), theirs).config.d_ff == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "scalar"}, "gate='scalar' has no form in fla; only 'vector' converts"),
        ({"mixer": "attention"}, "mixer='attention' has no form in fla; only 'gla' converts"),
        ({"tau": 8.0}, r"tau=8\.0 has no form in fla; only 16\.0 converts"),
        ({"gate_rank": 8}, "gate_rank=8 has no form in fla; only 16 converts"),
        ({"expand_k": 0.51}, "d_model · expand_k = 12.24 is rounded here"),
    ],
)
def test_what_fla_has_not_is_refused(changes, message):
    model = GLALanguageModel(dataclasses.replace(SMALL, **changes))
    with pytest.raises(ValueError, match=message):
        gla_to_fla(model)
    with pytest.raises(ValueError, match=message):
        fla_config(model.config)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="only a GLALanguageModel converts; got a GAMLanguage"):
        gla_to_fla(models.create("gam", d_model=8, n_layers=1, n_slots=4, vocab_size=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_short_conv": True}, "use_short_conv=True has no form here; only False converts"),
        ({"feature_map": "relu"}, "feature_map='relu' has no form here; only None converts"),
        ({"clamp_min": -1.0}, r"clamp_min=-1\.0 has no form here; only None converts"),
        ({"num_kv_heads": 1}, "num_kv_heads=1 has no form here; only None converts"),
        ({"use_output_gate": False}, "use_output_gate=False has no form here"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True has no form here"),
        ({"model_type": "gsa"}, "model_type 'gsa' does not convert; only 'gla' does"),
        ({"norm_eps": ...}, "fla's configuration lacks norm_eps"),
        ({"num_heads": 3}, r"g_norm_swish_gate.weight is \[18\], the model's \[12\]"),
        ({"num_hidden_layers": 1}, r"layers.1.attn_norm.weight \[24\] is not the model's"),
        ({"num_hidden_layers": 3}, r"layers.2.attn_norm.weight \[24\] is missing; .* 10 more"),
    ],
)
def test_what_we_have_not_is_refused(changes, message):
    theirs = {k: v for k, v in (fla_config(SMALL) | changes).items() if v is not ...}
    with pytest.raises(ValueError, match=message):
        gla_from_fla(gla_to_fla(random_model()), theirs)


def test_a_transposed_tensor_is_refused():
    state = gla_to_fla(random_model())
    name = "model.layers.1.attn.gk_proj.1.weight"
    state[name] = state[name].T
    with pytest.raises(ValueError, match=r"1.weight is \[16, 12\], the model's \[12, 16\]"):
        gla_from_fla(state, fla_config(SMALL))


@pytest.fixture(scope="module")
def fla_gla():
    """fla's module of GLA; its import takes seconds and warns where there is no GPU."""
    for package in ("fla", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    import fla.models.gla

    return fla.models.gla


def fla_model(fla_gla, model):
    """fla's model with our weights; each key must be there and no other."""
    theirs = fla_gla.GLAForCausalLM(fla_gla.GLAConfig(**fla_config(model.config)))
    theirs.load_state_dict(gla_to_fla(model), strict=True)
    return theirs.eval()


@pytest.fixture
def without_triton(fla_gla, monkeypatch):
    """fla's four kernels of a forward pass in plain torch, its own forms where it has them."""
    from fla.layers import gla as layer
    from fla.modules import mlp
    from fla.modules.norm import fused_norm_gate, layernorm
    from fla.ops.gla.naive import naive_recurrent_gla

    def norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32):
        return layernorm.rms_norm_ref(x, weight, bias, residual, eps, prenorm, upcast=True)

    def gated(x, g, weight, bias, activation, eps, **_):
        assert activation == "swish"
        return layernorm.rms_norm_ref(x, weight, bias, eps=eps, upcast=True) * F.silu(g)

    def swiglu_linear(x, y, weight, bias):
        return F.linear(F.silu(x) * y, weight, bias)

    def recurrent(q, k, v, gk, **_):
        return naive_recurrent_gla(q, k, v, gk)

    def chunk(q, k, v, g, **_):
        return naive_recurrent_gla(q, k, v, g)

    monkeypatch.setattr(layernorm, "rms_norm", norm)
    monkeypatch.setattr(fused_norm_gate, "rms_norm_gated", gated)
    monkeypatch.setattr(mlp, "swiglu_linear", swiglu_linear)
    monkeypatch.setattr(layer, "fused_recurrent_gla", recurrent)
    monkeypatch.setattr(layer, "chunk_gla", chunk)


def tokens(vocab_size, length):
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def relative_rms(x, y):
    return ((x - y).square().mean() / y.square().mean()).sqrt().item()


@pytest.mark.parametrize("length", [30, 70])
@torch.no_grad()
def test_logits_are_those_of_fla(fla_gla, without_triton, length):
    """Up to 64 tokens fla takes another operator than for more."""
    model, x = random_model(), tokens(11, length)
    expected = fla_model(fla_gla, model)(x, use_cache=False).logits
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@torch.no_grad()
def test_a_model_of_fla_gives_its_logits_here(fla_gla, without_triton):
    arguments = ARGUMENTS | {"intermediate_size": None, "hidden_ratio": 12}
    theirs = fla_gla.GLAForCausalLM(fla_gla.GLAConfig(**arguments)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    model, x = gla_from_fla(theirs.state_dict(), theirs.config.to_dict()), tokens(11, 30)
    expected = theirs(x, use_cache=False).logits
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_initial_weights_have_the_spread_of_flas(fla_gla):
    config = dataclasses.replace(SMALL, d_model=128, init_std=0.05)
    state = fla_gla.GLAForCausalLM(fla_gla.GLAConfig(**fla_config(config))).state_dict()
    for name, tensor in gla_to_fla(GLALanguageModel(config)).items():
        assert tensor.std().item() == pytest.approx(state[name].std().item(), rel=0.1), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [48, 300])
@torch.no_grad()
def test_logits_of_flas_kernels_in_bfloat16(fla_gla, length):
    """Two roundings, ours and fla's, are 1.3 % apart on a CPU."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "d_model": 256, "expand_v": 1.0, "d_ff": 0}
    model = GLALanguageModel(dataclasses.replace(SMALL, **sizes))
    for parameter in (p for p in model.parameters() if p.ndim == 1):
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    model = model.to("cuda", torch.bfloat16).eval()
    theirs = fla_model(fla_gla, model).to("cuda", torch.bfloat16)
    x = tokens(101, length).cuda()
    expected = theirs(x, use_cache=False).logits
    assert relative_rms(model(x).float(), expected.float()) < 2e-2
