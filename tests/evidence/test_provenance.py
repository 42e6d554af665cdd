"""The evidence hash follows imports and ignores what cannot change a number."""

from pathlib import Path

import pytest

from gatebook.evidence import provenance


def test_imports_are_followed_through_the_library_also_inside_functions() -> None:
    found = provenance.imported_modules("def f():\n    from gatebook.training import fit\n")
    assert {"gatebook", "gatebook.training", "gatebook.training.fit"} <= set(found)


def test_presentation_and_unrelated_models_do_not_count() -> None:
    found = provenance.imported_modules(
        "import gatebook\nfrom gatebook import plotting\nfrom gatebook.models import swin\n"
    )
    assert "gatebook.models.swin" in found
    assert "gatebook.models.gam" not in found
    assert not [name for name in found if name.startswith(provenance.PRESENTATION)]


@pytest.mark.parametrize(
    "same",
    [
        'def f(x):\n    """Doc."""\n    return x + 1\n',
        "def f(x):\n\n    return x + 1  # why\n",
    ],
)
def test_docstrings_comments_and_blank_lines_do_not_count(same: str) -> None:
    assert provenance._essence(same) == provenance._essence("def f(x):\n    return x + 1\n")


@pytest.mark.parametrize(
    "other", ["def f(x):\n    return x + 2\n", 'def f(x):\n    return "x # 1"\n']
)
def test_code_counts(other: str) -> None:
    assert provenance._essence(other) != provenance._essence("def f(x):\n    return x + 1\n")


def test_outside_a_checkout_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "PACKAGE_ROOT", tmp_path / "lib")
    with pytest.raises(FileNotFoundError, match="inside a checkout"):
        provenance.root()
