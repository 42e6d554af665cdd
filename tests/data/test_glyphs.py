"""A cue and glyphs: what the label is, and what it does not depend on."""

import pytest
import torch

from gatebook.data.glyphs import TYPES, cued_glyph


def draw(n, seed=0, **sizes):
    return cued_glyph(n, torch.Generator().manual_seed(seed), **sizes)


@pytest.mark.parametrize(("rows", "columns"), [(4, 7), (2, 9)])
def test_label_is_the_sign_of_the_glyph_that_has_the_cues_type(rows, columns):
    maps, labels = draw(300, rows=rows, columns=columns)
    assert maps.shape == (300, TYPES + 1, rows, columns)
    assert not maps[..., 1:-2].any()
    for one, label in zip(maps, labels, strict=True):
        (cue,) = one[:TYPES, 0, 0].nonzero()[:, 0].tolist()
        assert (one[cue, :, 0] == 1).all()
        assert not one[TYPES, :, 0].any()
        ((row, column),) = one[cue, :, -2:].nonzero().tolist()
        assert one[TYPES, row, columns - 2 + column] == (1 if label else -1)


def test_each_type_is_there_once_and_signs_are_balanced():
    maps, _ = draw(300)
    assert (maps[:, :TYPES, :, -2:].sum((2, 3)) == 1).all()
    assert (maps[:, :TYPES].sum(1) <= 1).all()
    assert (maps[:, TYPES].abs().sum((1, 2)) == TYPES).all()
    assert not maps[:, TYPES].sum((1, 2)).any()


def test_label_depends_neither_on_the_cue_nor_on_any_glyph_alone():
    maps, labels = draw(40_000)
    cue = maps[:, :TYPES, 0, 0].argmax(1)
    signs = (maps[:, :TYPES] * maps[:, TYPES:]).sum((2, 3))
    for kind in range(TYPES):
        assert labels[cue == kind].float().mean().item() == pytest.approx(0.5, abs=0.02)
        agree = (signs[:, kind] > 0) == labels.bool()
        assert agree[cue != kind].float().mean().item() == pytest.approx(1 / 3, abs=0.02)
        assert agree.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_maps_depend_on_the_generator_alone():
    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(3), strict=True))
    assert not torch.equal(first[0], draw(3, seed=1)[0])


@pytest.mark.parametrize("sizes", [{"rows": 1}, {"columns": 6}])
def test_small_maps_are_refused(sizes):
    with pytest.raises(ValueError, match="2 rows and 7 columns or more"):
        draw(3, **sizes)
