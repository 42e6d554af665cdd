"""A malformed chapter file is refused with file, line and field."""

from pathlib import Path

import pytest
import yaml

from conftest import chapter_fields
from gatebook.evidence import schema


def _write(folder: Path, text: str, name: str = "toy.yml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _load(folder: Path, **changes: object) -> schema.Chapter:
    return schema.load(_write(folder, yaml.safe_dump(chapter_fields(**changes), sort_keys=False)))


def test_a_valid_chapter_loads(tmp_path: Path) -> None:
    chapter = _load(tmp_path)
    assert chapter.claim("C1").tests[0].arms == ("method", "baseline")
    assert chapter.tests("medium") == []


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(schema.ChapterError, match=r"toy\.yml:3: not valid YAML"):
        schema.load(_write(tmp_path, "slug: toy\ntitle: [unclosed\n"))


def test_a_wrong_type_names_file_line_and_field(tmp_path: Path) -> None:
    text = yaml.safe_dump(chapter_fields(), sort_keys=False)
    line = text.splitlines().index("year: 2024") + 1
    with pytest.raises(schema.ChapterError, match=rf"toy\.yml:{line}: year: .*integer"):
        schema.load(_write(tmp_path, text.replace("year: 2024", "year: soon")))


def test_an_unknown_field_is_refused_where_it_stands(tmp_path: Path) -> None:
    text = yaml.safe_dump(chapter_fields(), sort_keys=False)
    text = text.replace("    margin: 0.1", "    margin: 0.1\n    verdict: supported")
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "verdict:" in row)
    with pytest.raises(schema.ChapterError) as error:
        schema.load(_write(tmp_path, text))
    assert str(error.value) == f"toy.yml:{line}: claims.0.tests.0.verdict: unknown field"


def test_the_slug_must_be_the_file_name(tmp_path: Path) -> None:
    text = yaml.safe_dump(chapter_fields())
    with pytest.raises(schema.ChapterError, match="slug: is 'toy'"):
        schema.load(_write(tmp_path, text, "other.yml"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"margin": None}, "needs `margin`"),
        ({"right": None}, "need `right`"),
        ({"rationale": ""}, "`rationale`"),
        ({"direction": "equal"}, "`equal` needs"),
        ({"direction": "within", "margin": -1.0}, "positive margin"),
        ({"tolerance": 0.5}, "`tolerance` belongs to `equal`"),
        ({"at_paper_configuration": True}, "belongs to `equal` or `exact`"),
        ({"exact": True}, "`exact` goes with"),
    ],
)
def test_an_inconsistent_test_is_refused(tmp_path: Path, change: dict, problem: str) -> None:
    fields = chapter_fields()
    fields["claims"][0]["tests"][0] |= change
    with pytest.raises(schema.ChapterError, match=problem):
        _load(tmp_path, claims=fields["claims"])


def test_a_claim_without_tests_must_say_why(tmp_path: Path) -> None:
    claim = chapter_fields()["claims"][0] | {"tests": []}
    with pytest.raises(schema.ChapterError, match="why no test is possible"):
        _load(tmp_path, claims=[claim])
    assert _load(tmp_path, claims=[claim | {"not_tested": "licensed data"}])


def test_ids_are_unique(tmp_path: Path) -> None:
    claim = chapter_fields()["claims"][0]
    with pytest.raises(schema.ChapterError, match="claim ids appear twice"):
        _load(tmp_path, claims=[claim, claim])


def test_all_three_scales_are_planned(tmp_path: Path) -> None:
    scales = {"small": chapter_fields()["scales"]["small"]}
    with pytest.raises(schema.ChapterError, match="lacks"):
        _load(tmp_path, scales=scales)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_margin_that_is_not_finite_is_refused(tmp_path: Path, value: str) -> None:
    text = yaml.safe_dump(chapter_fields(), sort_keys=False)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "margin:" in row)
    text = text.replace("margin: 0.1", f"margin: {value}")
    with pytest.raises(schema.ChapterError, match=rf"toy\.yml:{line}: .*margin: .*finite"):
        schema.load(_write(tmp_path, text))


def test_a_key_given_twice_is_refused_where_it_stands_again(tmp_path: Path) -> None:
    text = yaml.safe_dump(chapter_fields(), sort_keys=False)
    text = text.replace("    margin: 0.1", "    margin: 0.1\n    margin: 0.0") + "year: 2025\n"
    rows = text.splitlines()
    with pytest.raises(schema.ChapterError) as error:
        schema.load(_write(tmp_path, text))
    assert str(error.value).splitlines() == [
        f"toy.yml:{rows.index('    margin: 0.0') + 1}: margin: given twice",
        f"toy.yml:{len(rows)}: year: given twice",
    ]


def test_a_merged_field_may_be_given_anew(tmp_path: Path) -> None:
    text = yaml.safe_dump(chapter_fields(), sort_keys=False)
    text = text.replace("  medium: *id001", "  medium:\n    <<: *id001\n    seeds: 5")
    assert schema.load(_write(tmp_path, text)).scales["medium"].seeds == 5


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "toy.yml"
    path.write_bytes("slug: toy\ntitle: Caf\u00e9\n".encode("latin-1"))
    with pytest.raises(schema.ChapterError, match=r"^toy\.yml:2: not UTF-8"):
        schema.load(path)
