"""The page on the kernels: its numbers are those of the results files, missing ones say so."""

import dataclasses
import re
from pathlib import Path

import pytest

from gatebook.book import kernels, targets, tiles
from gatebook.book.kernels import Results
from gatebook.book.targets import Target
from gatebook.measure import records
from gatebook.measure.records import Record, Run

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (1024, 2048)
TIMES = {"ours": 0.4567, "fla": 1.3701, "sdpa-flash": 0.2284, "floor": 0.0913}


def planted(device: str = "cuda", **changes: object) -> Run:
    """A run with the same time for every case, metric and length: 3.0, 0.50 and 20 % of it."""
    places = [
        (case, metric)
        for case in ("gla-340m", "gla-1.3b", "fig2", "gla-340m-cpu")
        for metric in ("fwd", "fwdbwd", "memory")
    ]
    found = [
        Record(case=case, metric=metric, T=T, method=method, value=value)
        for case, metric in places
        for T in LENGTHS
        for method, value in TIMES.items()
    ]
    about = {"suite": "gpu" if device == "cuda" else "cpu", "versions": {"torch": "2.11.0"}}
    fields = {"name": "a.json", "device": device, "hardware": "Some GPU", "date": "2026-01-02T03"}
    return Run(**fields | {"about": about, "records": tuple(found)} | changes)


def words(html: str) -> str:
    return re.sub(r"<[^>]+>", " ", html)


@pytest.mark.parametrize("part", ["speed", "memory", "figure-2", "training"])
def test_a_part_shows_the_recorded_numbers_and_ratios(part: str) -> None:
    text = words(kernels.PARTS[part](Results((planted(),), ())))
    assert "0.457" in text
    assert "0.228 (0.50 ×)" in text
    if part != "memory":
        assert "20 %" in text


def test_the_cpu_part_states_the_crossover() -> None:
    run = planted("cpu", records=tuple(
        Record(case="gla-340m-cpu", metric=metric, T=T, method=method, value=value)
        for metric in ("fwd", "fwdbwd", "error")
        for T in (500, 2000)
        for method, value in (("ours", 10.0 * T), ("sdpa", T * T / 100))
    ))  # fmt: skip
    assert "from about 1,000 tokens on" in words(kernels.cpu(Results((), (run,))))


@pytest.mark.parametrize("part", sorted(set(kernels.PARTS) - {"tiles"}))
def test_what_was_not_measured_says_so(part: str) -> None:
    text = words(kernels.PARTS[part](Results((), ())))
    assert "Not measured yet" in text or "not measured" in text
    script = "benchmarks/training.py" if part == "models" else "benchmarks/kernels.py"
    assert script in text or part == "targets"


def test_whole_models_are_shown_in_tokens_a_second() -> None:
    """The newest run of a length counts; 1,024 tokens in 2 ms are 512,000 a second."""
    runs = [
        planted(
            date=date,
            about={"suite": "training", "versions": {}, "tokens": 1024},
            records=tuple(
                Record(case="gla-340m-training", metric=metric, T=512, method=method, value=value)
                for method, step in steps.items()
                for metric, value in (("step", step), ("memory", 2048.0))
            ),
        )
        for date, steps in (("2026-02", {"ours": 2.0, "fla": 3.0}), ("2026-01", {"ours": 9.0}))
    ]
    results = Results((), (), tuple(runs))
    text = words(kernels.models(results))
    assert re.search(r"ours\s+512,000\s+2 GiB", text)
    assert re.search(r"flash-linear-attention\s+341,333", text)
    assert results.ratios("gla-340m-training", "step", "fla") == {512: 1.5}


def test_a_trial_of_the_gpu_suite_on_a_cpu_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = dataclasses.replace(planted("cpu"), about={"suite": "gpu", "versions": {}})
    other = dataclasses.replace(planted(), hardware="Another GPU", date="2025")
    monkeypatch.setattr(records, "load", lambda folder: [trial, planted(), other])
    found = kernels.load(tmp_path)
    assert found.cpu == ()
    assert [run.hardware for run in found.gpu] == ["Some GPU"]


@pytest.mark.parametrize(
    ("kind", "reach", "baseline", "value", "verdict"),
    [
        ("at most", 0.4567, "", 0.4567, "reached"),
        ("at most", 0.4, "", 0.4567, "missed"),
        ("times faster", 3.0, "fla", 3.0, "reached"),
        ("times faster", 3.1, "fla", 3.0, "missed"),
        ("times as long", 2.1, "sdpa-flash", 2.0, "reached"),
        ("times as long", 1.9, "sdpa-flash", 2.0, "missed"),
        ("of the floor", 0.19, "floor", 0.2, "reached"),
        ("times faster", 1.0, "flips", None, "not measured"),
    ],
)
def test_a_target_is_judged_by_its_rule(
    kind: str, reach: float, baseline: str, value: float | None, verdict: str
) -> None:
    target = Target(
        words="", case="gla-340m", metric="fwd", kind=kind, reach=reach, baseline=baseline
    )
    got = targets.reached(target, Results((planted(),), ()))
    assert got == (None if value is None else pytest.approx(value, rel=1e-3))
    assert targets.outcome(target, value) == verdict


def test_a_target_of_which_a_length_is_missing_is_not_reached_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"words": "w", "case": "gla-340m", "metric": "fwd", "kind": "at most", "reach": 1.0}
    monkeypatch.setattr(targets, "all_targets", lambda: (Target(**fields, lengths=(1024, 4096)),))
    assert "reached at 1024; the rest not measured" in targets.table_of(Results((planted(),), ()))
    monkeypatch.setattr(targets, "all_targets", lambda: (Target(**fields, lengths=LENGTHS),))
    assert "not measured" not in targets.table_of(Results((planted(),), ()))


def test_every_target_names_a_case_and_a_method_that_are_measured() -> None:
    files = (ROOT / "benchmarks" / name for name in ("kernels.py", "training.py"))
    script = "".join(file.read_text("utf-8") for file in files)
    for target in targets.all_targets():
        for name in filter(None, (target.case, target.metric, target.baseline)):
            assert f'"{name}"' in script
        assert target.kind in ("at most", "times faster", "times as long", "of the floor")
        assert (target.kind == "at most") == (not target.baseline)


def test_the_tiles_are_drawn_with_alternative_text() -> None:
    assert re.search(r'<img alt="[^"]{200,}" src="data:image/webp', tiles.draw())


def test_the_page_shows_the_recorded_results(html: Path) -> None:
    page = (html / "book" / "kernels.html").read_text("utf-8")
    text = words(page)
    shown = kernels.load(ROOT)
    for case in ("gla-340m", "gla-1.3b", "bigla-340m", "fig2", "gla-340m-cpu"):
        for metric in ("fwd", "fwdbwd"):
            for value in shown.series(case, metric, "ours").values():
                assert kernels.number(value) in text
    for run in (*shown.gpu, *shown.cpu):
        assert run.hardware in text
    for claim in ("C5", "C6"):
        assert f'href="scoreboard.html#gla-{claim}"' in page
    assert page.count("<figure") >= 2
