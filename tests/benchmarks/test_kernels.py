"""The benchmarks of the kernels, on tiny shapes on the CPU: the same code as on a GPU."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gatebook.measure import records

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "kernels.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with all cases shrunk to two heads, narrow channels and two lengths."""
    spec = importlib.util.spec_from_file_location("benchmark_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    small = {"H": 2, "K": 16, "V": 32}
    cases = [
        dataclasses.replace(
            case,
            **small,
            lengths=case.lengths if case.lengths == (1,) else (32, 48),
            batch=min(case.batch, 2),
            first_call=(),
        )
        for case in module.CASES
    ]
    monkeypatch.setattr(module, "CASES", tuple(cases))
    return module


def run(bench: ModuleType, path: Path, *words: str) -> tuple[int, records.Run]:
    fast = ["--seconds", "0.001", "--tokens", "96", "--device", "cpu", "--out", str(path)]
    return bench.main([*words, *fast]), records.read(path)


def found(run: records.Run, case: str, metric: str) -> set[tuple[str, int | None]]:
    return {(r.method, r.T) for r in run.records if (r.case, r.metric) == (case, metric)}


def test_cpu_suite_records_every_number_and_reports_the_target(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench, "LONGEST_NAIVE", 32)
    code, result = run(bench, tmp_path / "cpu.json", "cpu")
    assert code == 0
    places = {(m, T) for m in ("ours", "sdpa") for T in (32, 48)} | {("naive", 32)}
    for metric in ("fwd", "fwdbwd"):
        assert found(result, "gla-340m-cpu", metric) == places
    errors = [r.value for r in result.records if r.metric.startswith("error")]
    assert errors
    assert 0 < max(errors) < 1e-5
    out = capsys.readouterr().out
    assert "target 20x, measured" in out
    assert "faster than softmax attention" in out
    assert result.about["threads"] >= 1
    assert result.about["failures"] == []
    assert str(tmp_path) not in result.about["command"]


def test_gpu_suite_goes_through_every_case(bench: ModuleType, tmp_path: Path) -> None:
    code, result = run(bench, tmp_path / "gpu.json", "gpu", "--baselines", "all")
    assert code == 0
    assert {r.case for r in result.records} == {
        "machine", *(case.name for case in bench.CASES if case.suite == "gpu")
    }  # fmt: skip
    for case in bench.CASES:
        for metric in set(case.metrics) - {"memory", "first_call"}:
            if case.suite == "gpu":
                assert {("ours", T) for T in case.lengths} <= found(result, case.name, metric)
    for method in ("flips", "causal", "floor"):
        assert (method, 32) in found(result, "bigla-340m", "fwd")
    assert {"error_dg_forward", "error_dg_backward"} <= {r.metric for r in result.records}
    absent = {"fla", "sdpa-cudnn"}  # on a CPU
    assert {name for name in absent if any(name in f for f in result.about["failures"])} == absent
    assert not any(" ours" in failure for failure in result.about["failures"])


def test_the_floor_counts_every_input_and_output_once_for_each_pass(
    bench: ModuleType, tmp_path: Path
) -> None:
    _, result = run(bench, tmp_path / "gpu.json", "gpu", "--cases", "gla-340m,decode-340m")
    value = {(r.case, r.metric, r.T, r.method): r.value for r in result.records}
    per_second = 1e9 * value["machine", "copy", None, "ours"]
    tokens, widths = 96, {"q": 32, "k": 32, "g": 32, "v": 64, "o": 64}  # two heads, float32
    forward = 4 * tokens * sum(widths.values())
    backward = 4 * tokens * (2 * (sum(widths.values()) - 64) + 64)
    got = value["gla-340m", "fwd", 32, "floor"] / 1000 * per_second
    assert got == pytest.approx(forward)
    got = value["gla-340m", "fwdbwd", 32, "floor"] / 1000 * per_second
    assert got == pytest.approx(forward + backward)
    got = value["decode-340m", "fwd", 1, "floor"] / 1000 * per_second
    assert got == pytest.approx(4 * 2 * (sum(widths.values()) + 2 * 2 * 16 * 32))


def test_what_was_measured_is_kept_when_the_run_is_cut_off(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(case: object, *_: object) -> None:
        if case.name == "gla-1.3b":
            raise KeyboardInterrupt

    inputs = bench.gla_inputs
    monkeypatch.setattr(bench, "gla_inputs", lambda *args: cut_off(*args) or inputs(*args))
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path / "gpu.json", "gpu", "--metrics", "fwd")
    kept = records.read(tmp_path / "gpu.json")
    assert ("ours", 48) in found(kept, "gla-340m", "fwd")


def test_a_failure_of_ours_is_an_error(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = "gatebook.kernels.gated_linear_attention.fused"  # imported when all is collected
    monkeypatch.setattr(f"{fused}.INTERPRETED", False)  # so that the kernel refuses the CPU
    words = ("gpu", "--cases", "gla-340m", "--metrics", "fwd", "--backend", "triton")
    code, result = run(bench, tmp_path / "gpu.json", *words)
    assert code == 1
    assert any(" ours: " in failure for failure in result.about["failures"])


def test_the_first_call_is_timed_in_a_new_process(bench: ModuleType, tmp_path: Path) -> None:
    cases = tuple(dataclasses.replace(case, first_call=(2048,)) for case in bench.CASES)
    bench.CASES = cases  # the new process has the real ones
    words = ("gpu", "--cases", "gla-340m", "--metrics", "first_call", "--tokens", "64")
    _, result = run(bench, tmp_path / "gpu.json", *words)
    assert found(result, "gla-340m", "first_call") == {("ours", 2048)}


@pytest.mark.parametrize(
    "words",
    [
        ["tpu"],
        ["cpu", "--cases", "nothing"],
        ["cpu", "--metrics", "fwd,nothing"],
        ["cpu", "--baselines", "nothing"],
        ["all", "--out", "x.json"],
    ],
)
def test_unknown_names_are_refused_before_anything_is_measured(
    bench: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(words)
    assert words[-1].split(",")[-1] in capsys.readouterr().err or words[0] == "all"


def test_the_report_prints_the_recorded_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == records.tsv(records.rows(records.load(ROOT / "benchmarks" / "results")))
    assert done.stderr == ""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "\nbench-report: setup" in makefile
    assert "@$(BIN)/python benchmarks/report.py" in makefile


def test_the_cpu_results_are_recorded() -> None:
    runs = records.load(ROOT / "benchmarks" / "results")
    cpu = next(run for run in runs if run.about["suite"] == "cpu")
    for method, longest in (("ours", 8192), ("sdpa", 8192), ("naive", 2048)):
        for metric in ("fwd", "fwdbwd"):
            assert max(records.series([cpu], "gla-340m-cpu", metric, method)) == longest
