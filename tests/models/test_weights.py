"""Models on disk: exact round trips, files written whole or not at all, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gatebook import __version__, models

LM = {"vocab_size": 11, "d_model": 16, "n_layers": 2}
SWIN = {"d_model": 8, "depths": (1, 2), "n_heads": (1, 2), "window_size": 4, "image_size": 32}
SMALL = {
    "gam": LM | {"n_slots": 4, "context": 8},
    "gam_transformer": LM | {"n_heads": 2, "context": 8},
    "gam_mamba": LM | {"context": 0},
    "gla_340m": LM | {"n_heads": 2, "d_ff": 32, "tau": 8.0},
    "moh_llm_s": LM | {"n_heads": 4, "n_shared": 1, "n_active": 1, "d_ff": 24},
    "sqa_sqa": LM | {"n_heads": 4, "n_query_heads": 2, "n_kv_heads": 1, "d_ff": 24},
    "mossformer_small": {"n_layers": 2},
    "swin_t": SWIN | {"n_classes": 3},
}
GLA = SMALL["gla_340m"]


def random_model(name, **overrides):
    """A small model in which no parameter has its initial value."""
    torch.manual_seed(0)
    model = models.create(name, **(SMALL[name] | overrides))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.fixture
def saved(tmp_path):
    """A folder with a small GLA model."""
    models.save(random_model("gla_340m"), tmp_path / "gla", name="gla_340m")
    return tmp_path / "gla"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_keeps_its_configuration(name):
    with torch.device("meta"):
        model = models.create(name)
    assert model.config == models.config(name)
    assert type(model) is models._registry()[name][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_is_exact(name, dtype, tmp_path):
    model = random_model(name).to(dtype)
    models.save(model, tmp_path, name=name)
    for back in (models.load(tmp_path), models.create(name, weights=str(tmp_path))):
        assert type(back) is type(model)
        assert back.config == model.config
        assert hash(back.config) == hash(model.config)
        state = back.state_dict()
        assert list(state) == list(model.state_dict())
        for key, tensor in model.state_dict().items():
            assert state[key].dtype == tensor.dtype
            assert torch.equal(state[key], tensor), key
        grads = {key: p.requires_grad for key, p in back.named_parameters()}
        assert grads == {key: p.requires_grad for key, p in model.named_parameters()}


def test_a_loaded_model_gives_the_same_logits(saved):
    x = torch.arange(10)[None]
    assert torch.equal(models.load(saved)(x), random_model("gla_340m")(x))


def test_what_the_folder_holds(saved):
    assert sorted(files(saved)) == ["config.json", "model.safetensors"]
    about = json.loads((saved / "config.json").read_text())
    config = dataclasses.asdict(models.config("gla_340m", **GLA))
    assert about == {"name": "gla_340m", "version": __version__, "config": config}


def test_whoever_can_read_one_file_can_read_both(saved):
    modes = {path.stat().st_mode for path in saved.iterdir()}
    assert len(modes) == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedConfig:
    """Of the test's own model."""

    width: int = 4


class Tied(nn.Module):
    """Two modules with one weight, as an embedding and a head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(6, config.width)
        self.head = nn.Linear(config.width, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path, monkeypatch):
    monkeypatch.setitem(models._registry(), "tied", (Tied, TiedConfig()))
    model = Tied(TiedConfig(width=5)).double()
    models.save(model, tmp_path, name="tied")
    assert list(load_file(tmp_path / "model.safetensors")) == ["embedding.weight"]
    back = models.load(tmp_path)
    assert back.head.weight is back.embedding.weight
    assert torch.equal(back.head.weight, model.head.weight)


def test_a_module_that_blocks_share_is_stored_once_and_stays_shared(tmp_path):
    models.save(random_model("mossformer_small"), tmp_path, name="mossformer_small")
    stored = load_file(tmp_path / "model.safetensors")
    assert [key for key in stored if "rotary" in key] == ["mask_net.blocks.0.rotary.freqs"]
    first, second = models.load(tmp_path).mask_net.blocks
    assert first.rotary.freqs is second.rotary.freqs


def test_weights_that_are_not_contiguous(tmp_path):
    model = random_model("gla_340m")
    model.head.weight.data = model.head.weight.data.T.contiguous().T
    models.save(model, tmp_path, name="gla_340m")
    assert torch.equal(models.load(tmp_path).head.weight, model.head.weight)


def test_a_loaded_model_does_not_see_later_changes_of_the_file(saved):
    model = models.load(saved)
    before = model.head.weight.clone()
    size = (saved / "model.safetensors").stat().st_size
    (saved / "model.safetensors").write_bytes(bytes(size))
    assert torch.equal(model.head.weight, before)


def test_overrides_change_what_leaves_the_parameters_alone(saved):
    model = models.create("gla_340m", weights=saved, tau=4.0, chunk_size=16, backend="naive")
    assert model.config == models.config(
        "gla_340m", **(GLA | {"tau": 4.0, "chunk_size": 16, "backend": "naive"})
    )
    assert torch.equal(model.head.weight, random_model("gla_340m").head.weight)
    assert model.blocks[0].mixer.log_gate.tau == 4.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_model": 32}, r"embedding.weight is \[11, 16\], the model's \[11, 32\]; .* more"),
        ({"n_layers": 1}, r"blocks.1.ffn.down.weight \[16, 32\] is not the model's.*and 10 more"),
        ({"n_layers": 3}, r"blocks.2.mixer_norm.weight \[16\] is missing.*and 10 more"),
        ({"gate": "scalar"}, r"log_gate.up.weight is \[8, 16\], the model's \[2, 16\]"),
        ({"taw": 4.0}, "unknown field of GLAConfig 'taw'. Did you mean 'tau'?"),
        ({"tau": -1.0}, "tau positive"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(saved, overrides, message):
    with pytest.raises(ValueError, match=message):
        models.create("gla_340m", weights=saved, **overrides)


def test_another_name_is_refused(saved):
    with pytest.raises(ValueError, match=r"gla holds 'gla_340m', not 'gla_1.3b'"):
        models.create("gla_1.3b", weights=saved)
    with pytest.raises(ValueError, match=r"unknown model 'gla_430m'. Did you mean 'gla_340m'"):
        models.create("gla_430m", weights=saved)


def test_a_missing_folder_or_file_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json is missing: a saved model"):
        models.load(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"gla/model.safetensors is missing"):
        models.load(saved)


ABOUT = {"name": "gla_340m", "version": "0.1.0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json is damaged"),
        ('{"name": "gla_340m", ', "config.json is damaged"),
        ("[]", "expected an object of a name, a version and a config"),
        (json.dumps(ABOUT), "expected an object of a name, a version and a config"),
        (json.dumps(ABOUT | {"config": []}), "expected an object"),
        (json.dumps(ABOUT | {"config": {}, "more": 1}), "expected an object"),
        (json.dumps(ABOUT | {"name": "gla", "config": {}}), "unknown model 'gla'. Did you mean"),
        (json.dumps(ABOUT | {"config": {"dmodel": 8}}), "unknown field of GLAConfig 'dmodel'. Did"),
        (json.dumps(ABOUT | {"config": {"d_model": 8}}), "config lacks backend, chunk_size, d_ff"),
    ],
)
def test_a_damaged_configuration_is_refused(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(saved)
    assert str(saved / "config.json") in str(caught.value)


def test_a_configuration_that_is_no_text_is_refused(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        models.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": "16"}, "config.d_model: Input should be a valid integer"),
        ({"d_model": True}, "config.d_model: Input should be a valid integer"),
        ({"gate": "matrix"}, "config.gate: Input should be 'none', 'fixed', 'scalar' or 'vector'"),
        ({"tau": None}, "config.tau: Input should be a valid number"),
        ({"tau": -1.0}, "config: .*tau positive"),
    ],
)
def test_a_field_of_a_wrong_type_is_refused(saved, changes, message):
    about = json.loads((saved / "config.json").read_text())
    about["config"] |= changes
    (saved / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        models.load(saved)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.5, 0.9999])
def test_truncated_weights_are_refused(saved, kept):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"gla/model.safetensors is damaged: "):
        models.load(saved)


def test_missing_and_unexpected_keys_are_named(saved):
    state = load_file(saved / "model.safetensors")
    state["tail.weight"] = state.pop("head.weight")
    save_file(state, saved / "model.safetensors")
    message = r"head.weight \[11, 16\] is missing; tail.weight \[11, 16\] is not the model's$"
    with pytest.raises(ValueError, match=message):
        models.load(saved)


def test_saving_again_replaces_both_files(saved):
    model = random_model("gla_340m", tau=2.0)
    nn.init.zeros_(model.head.weight)
    models.save(model, saved, name="gla_340m")
    back = models.load(saved)
    assert back.config.tau == 2.0
    assert back.head.weight.abs().max() == 0
    assert len(files(saved)) == 2


def half_written(state, path):
    Path(path).write_bytes(b"half")
    raise OSError("disk full")


def refused(*_):
    raise OSError("refused")


@pytest.mark.parametrize(
    ("owner", "attribute", "failure"),
    [
        (safetensors.torch, "save_file", half_written),
        (Path, "write_text", refused),
        (os, "fsync", refused),
        (os, "replace", refused),
    ],
)
def test_a_failed_write_leaves_the_older_files(saved, monkeypatch, owner, attribute, failure):
    before = files(saved)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, lambda *args, **_: failure(*args))
        with pytest.raises(OSError, match=r"disk full|refused"):
            models.save(random_model("gla_340m", tau=2.0), saved, name="gla_340m")
    assert files(saved) == before


def test_files_are_flushed_before_they_are_put_in_place(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b)))
    models.save(random_model("gla_340m"), tmp_path, name="gla_340m")
    assert calls == ["fsync", "model.safetensors", "fsync", "config.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gla", "unknown model 'gla'"),
        ("swin_t", "'swin_t' is a SwinTransformer; got a GLALanguageModel"),
    ],
)
def test_a_name_that_is_not_the_models_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        models.save(random_model("gla_340m"), tmp_path / "new", name=name)
    assert not (tmp_path / "new").exists()


def test_without_weights_a_model_is_what_its_class_makes(saved):
    torch.manual_seed(3)
    model = models.create("gla_340m", **GLA)
    torch.manual_seed(3)
    kind, config = models._registry()["gla_340m"]
    same = kind(dataclasses.replace(config, **GLA))
    assert all(map(torch.equal, model.parameters(), same.parameters()))


def test_importing_models_leaves_the_readers_out():
    code = "import gatebook.models, sys; print({'safetensors', 'pydantic'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
