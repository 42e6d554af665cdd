"""`fit` trains, resumes exactly, and refuses what it cannot do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gatebook.training import History, Recipe, fit, make_optimizer

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [torch.randn(16, 8, generator=GENERATOR) for _ in range(7)]


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch)[:, 0] - batch.sum(1)).square().mean()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 1))


def _fit(steps: int = 20, model: nn.Module | None = None, **options: Any) -> History:
    recipe = {"steps": steps, "lr": 1e-2} | options.pop("recipe", {})
    return fit(model or _model(), BATCHES, _loss, Recipe(**recipe), **options)


def test_loss_falls_and_two_runs_are_identical() -> None:
    one, two = _fit(60), _fit(60)
    assert one.loss == two.loss
    assert one.loss[-1] < 0.3 * one.loss[0]
    assert one.steps_per_second > 0


def test_one_adamw_step_is_torchs_own() -> None:
    model, twin = _model().eval(), _model().eval()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    twin.train()
    model[2].p = twin[2].p = 0.0
    for batch in BATCHES[:3]:
        optimizer.zero_grad()
        _loss(twin, batch).backward()
        optimizer.step()
    recipe = {"schedule": "constant", "weight_decay": 0.0, "clip_norm": None}
    _fit(3, model, recipe=recipe)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_accumulation_is_one_large_batch() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(8, 1), nn.Linear(8, 1)]
    models[1].load_state_dict(models[0].state_dict())
    recipe = {"steps": 1, "lr": 1e-2, "clip_norm": None, "optimizer": "adam"}
    fit(models[0], BATCHES[:4], _loss, Recipe(**recipe, accumulate=4))
    fit(models[1], [torch.cat(BATCHES[:4])], _loss, Recipe(**recipe))
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant"])
def test_resume_is_bit_equal(tmp_path: Path, schedule: str) -> None:
    options = {"checkpoint_dir": tmp_path, "recipe": {"schedule": schedule, "accumulate": 2}}
    whole = _fit(20, checkpoint_every=10, **options)
    shutil.rmtree(tmp_path / "step-00000020")
    again = _fit(20, resume=True, **options)
    assert again.loss == whole.loss[10:]


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    assert _fit(5, checkpoint_dir=tmp_path, resume=True).loss == _fit(5).loss


def test_a_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    whole = _fit(20, checkpoint_dir=tmp_path, checkpoint_every=10)
    (tmp_path / "step-00000020").rename(tmp_path / "step-00000020.partial")
    assert _fit(20, checkpoint_dir=tmp_path, resume=True).loss == whole.loss[10:]


class _Counted:
    """Batches that know their position."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < len(BATCHES):
            self.at += 1
            yield BATCHES[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_batches_with_a_state_are_continued_where_they_were(tmp_path: Path) -> None:
    recipe = Recipe(steps=10, lr=1e-2)
    options = {"checkpoint_dir": tmp_path}
    whole = fit(_model(), _Counted(), _loss, recipe, checkpoint_every=5, **options)
    shutil.rmtree(tmp_path / "step-00000010")
    assert fit(_model(), _Counted(), _loss, recipe, resume=True, **options).loss == whole.loss[5:]


def test_weight_decay_spares_biases_and_named_parameters() -> None:
    model = _model()
    model.no_weight_decay = lambda: ["3.weight"]
    decay, plain = make_optimizer(model, Recipe(steps=1, lr=1e-3)).param_groups
    assert [len(decay["params"]), len(plain["params"])] == [1, 3]
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)


def test_schedules_hit_their_corners() -> None:
    cosine = Recipe(steps=110, lr=1.0, warmup_steps=10, final_lr=0.1)
    assert cosine.lr_at(0) == pytest.approx(0.1)
    assert cosine.lr_at(9) == pytest.approx(1.0)
    assert cosine.lr_at(60) == pytest.approx(0.55)
    assert cosine.lr_at(110) == pytest.approx(0.1)
    assert Recipe(steps=10, lr=1.0, schedule="constant").lr_at(9) == 1.0


def test_onecycle_is_torchs_within_a_step() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=400)
    recipe = Recipe(steps=400, lr=1.0, schedule="onecycle")
    for step in range(400):
        assert recipe.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.02)
        optimizer.step()
        if step < 399:
            reference.step()


def test_log_has_one_line_a_step(tmp_path: Path) -> None:
    history = _fit(4, log_path=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["loss"] for line in lines] == pytest.approx(history.loss)
    assert lines[0]["grad_norm"] > 0


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = _fit(5, tensorboard_dir=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(5))
    assert [event.value for event in scalars] == pytest.approx(history.loss, rel=1e-6)
    assert {"loss", "lr", "grad_norm", "seconds"} == set(events.Tags()["scalars"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_to_the_same_losses() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + torch.nn.functional.gelu(block(x))
            return x

    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = Deep()
        losses.append(_fit(10, model, compile=compile).loss)
        assert all((block._compiled_call_impl is not None) == compile for block in model.blocks)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_autocast_trains() -> None:
    history = _fit(60, recipe={"precision": "bf16"})
    assert history.loss[-1] < 0.3 * history.loss[0]


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(FloatingPointError, match="at step 0"):
        fit(_model(), BATCHES, lambda m, b: _loss(m, b) * float("nan"), Recipe(steps=3, lr=1.0))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schedule", "cosin", "'cosine'"),
        ("optimizer", "sgd", "adamw"),
        ("precision", "fp16", "bf16"),
        ("steps", 0, "at least 1"),
    ],
)
def test_a_bad_recipe_says_what_is_allowed(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**({"steps": 1, "lr": 1e-3} | {field: value}))


def test_no_batches_and_no_folder_are_errors() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        fit(_model(), [], _loss, Recipe(steps=1, lr=1e-3))
    with pytest.raises(ValueError, match="checkpoint_dir"):
        _fit(1, checkpoint_every=1)
