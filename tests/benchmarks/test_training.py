"""The benchmark of training steps, on a tiny model on the CPU."""

import importlib.util
import sys
from pathlib import Path

import pytest

from gatebook.measure import records

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--layers", "1", "--width", "64", "--tokens", "64", "--lengths", "32,64"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "benchmark_training", ROOT / "benchmarks/training.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_each_model_and_length_is_recorded(bench, tmp_path, capsys):
    path = tmp_path / "training.json"
    code = bench.main([*TINY, "--methods", "ours,llama", "--steps", "2", "--out", str(path)])
    assert code == 0
    run = records.read(path)
    places = [(r.metric, r.T, r.method) for r in run.records]
    assert places == [("step", T, m) for T in (32, 64) for m in ("ours", "llama")]
    assert all(0 < r.value < 10_000 for r in run.records)
    assert "--layers 1" in run.about["command"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("tokens/s" in line for line in lines)
    rows = [row for row in records.rows([run]) if row["baseline_name"] == "llama"]
    assert [row["T"] for row in rows] == ["32", "64"]
    assert all(row["ratio"] for row in rows)


def test_models_have_one_size(bench):
    options = bench.argparse.Namespace(device="meta", layers=24, width=1024)
    counts = {}
    for method in ("ours", "llama"):
        model, _ = bench.build(method, options)
        counts[method] = sum(p.numel() for p in model.parameters())
    assert counts["ours"] == 374_475_776
    assert counts["llama"] == pytest.approx(counts["ours"], rel=0.005)


def test_a_method_that_fails_is_said_and_left_out(bench, tmp_path, capsys, monkeypatch):
    def measured(method, length, options):
        if method == "llama":
            raise RuntimeError("out of memory")
        return {"step": 1.0}

    monkeypatch.setattr(bench, "measured", measured)
    path = tmp_path / "training.json"
    args = [*TINY, "--methods", "llama,ours", "--lengths", "32", "--out", str(path)]
    assert bench.main(args) == 0
    assert [r.method for r in records.read(path).records] == ["ours"]
    assert records.read(path).about["failures"] == ["llama at 32: RuntimeError: out of memory"]
    assert "llama           failed" in capsys.readouterr().out


def test_unknown_methods_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--methods", "mamba"])
    assert "'mamba' is none of ours, ours-compiled" in capsys.readouterr().err
