"""Mixtures: what the generators promise, and the two file formats on small data."""

import wave

import numpy as np
import pytest
import torch

from gatebook.data import speech
from gatebook.data.sources import DataUnavailableError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- generated voices


def test_a_voice_has_its_pitch_and_nothing_above_4_khz():
    wav = speech.harmonic_voice(torch.tensor([0.0, 1.0]), 8000, rng())
    power = torch.fft.rfft(wav * torch.hann_window(8000)).abs().square()  # 1 Hz a bin
    for row, pitch in zip(power, (90, 270), strict=True):
        band = row[: int(1.5 * pitch)].argmax().item()
        assert band == pytest.approx(pitch, rel=0.03)
    assert power[:, 3800:].sum() < 1e-3 * power.sum()


def test_a_higher_voice_is_brighter():
    wav = speech.harmonic_voice(torch.tensor([0.1, 0.5, 0.9]), 8000, rng())
    power = torch.fft.rfft(wav).abs().square()
    centre = (power * torch.arange(power.shape[1])).sum(-1) / power.sum(-1)
    assert centre[0] < centre[1] < centre[2]


def test_turns_cover_the_signal_and_both_speakers_speak():
    loud = speech.alternating_turns(50, 2000, rng())
    assert loud.shape == (50, 2, 2000)
    assert loud.min() >= 0
    assert loud.sum(dim=1).min() > 0.9
    both = (loud > 0.5).all(dim=1).float().mean()
    assert 0.1 < both < 0.4
    assert (loud > 0.5).float().mean(dim=-1).min() > 0.2


def test_a_speaker_has_more_than_one_turn():
    """Else the order in time would tell the speakers apart."""
    loud = speech.alternating_turns(50, 2000, rng()) > 0.5
    changes = (loud[:, 0, 1:] != loud[:, 0, :-1]).sum(dim=-1)
    assert changes.float().mean() > 3


def test_turn_taking_sources_have_unit_power_and_repeat_with_the_seed():
    sources = speech.turn_taking(6, 2000, rng(3))
    assert sources.shape == (6, 2, 2000)
    torch.testing.assert_close(sources.square().mean(-1), torch.ones(6, 2))
    assert torch.equal(sources, speech.turn_taking(6, 2000, rng(3)))
    assert not torch.equal(sources, speech.turn_taking(6, 2000, rng(4)))


# ---------------------------------------------------------------- spoken digits


@pytest.fixture
def digits(tmp_path):
    """A mirror of four speakers who hum at 50, 100, 150 and 200 Hz."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "free_spoken_digit"
    folder.mkdir()
    rows = [(digit, f"s{who}", 0, who) for digit in range(3) for who in range(4)]
    audio = [
        (1000 * np.sin(2 * np.pi * 50 * (who + 1) * np.arange(480) / 8000)).astype(np.int16)
        for *_, who in rows
    ]
    table = {
        "digit": [row[0] for row in rows],
        "speaker": [row[1] for row in rows],
        "index": [row[2] for row in rows],
        "audio": pa.array([list(a) for a in audio], pa.list_(pa.int16())),
    }
    for split in ("train", "test"):
        pq.write_table(pa.table(table), folder / f"{split}.parquet")
    return tmp_path


def test_streams_hold_one_speaker_each(digits):
    streams = speech.digit_streams("train", rng(), digits, seconds=1.0)
    assert streams.shape == (4, 8000)
    torch.testing.assert_close(streams.square().mean(-1), torch.ones(4), rtol=0, atol=1e-2)
    peak = torch.fft.rfft(streams).abs().argmax(dim=-1)
    assert peak.tolist() == [50, 100, 150, 200]


def test_stream_mixtures_have_two_speakers_and_levels_in_range(digits):
    streams = speech.digit_streams("train", rng(), digits, seconds=1.0)
    sources = speech.stream_mixtures(streams, 200, 4000, rng(1))
    peak = torch.fft.rfft(sources).abs().argmax(dim=-1) * 2  # Hz
    assert (peak[:, 0] != peak[:, 1]).all()
    assert set(peak.flatten().tolist()) == {50, 100, 150, 200}
    level = 10 * sources.square().mean(-1).log10()
    assert level[:, 1].abs().max() < 0.1
    assert level[:, 0].min() < -4.5
    assert level[:, 0].max() > 4.5
    assert level[:, 0].abs().max() <= 5.01


def test_missing_digits_name_the_data_set(tmp_path):
    with pytest.raises(DataUnavailableError, match=r"free_spoken_digit.*17 MB"):
        speech.digit_streams("train", rng(), tmp_path)


# ---------------------------------------------------------------- folders


def write_wav(path, samples, rate=8000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, dtype="<i2").tobytes())


@pytest.fixture
def folder(tmp_path):
    """Five mixtures of six speakers; recording n of source s is a ramp from 1000 (s + 1) + n."""
    for n in range(5):
        name = f"{n}-10-000{n}_{(n + 1) % 6}-20-000{n}.wav"
        for s in (1, 2):
            write_wav(tmp_path / f"libri2mix/dev/s{s}/{name}", 1000 * s + n + 5 * np.arange(300))
    return tmp_path


def batches(folder, **changes):
    options = {"samples": 200, "batch_size": 3, "seed": 0, "dynamic": False} | changes
    return speech.FolderMixtures(speech.mixture_files("libri2mix", "dev", folder), **options)


def test_folder_yields_aligned_segments(folder):
    sources = next(iter(batches(folder)))
    assert sources.shape == (3, 2, 200)
    gap = (sources[:, 1] - sources[:, 0]) * 2**15
    torch.testing.assert_close(gap, torch.full_like(gap, 1000.0))


def test_short_recordings_are_padded_with_silence(folder):
    sources = next(iter(batches(folder, samples=400)))
    assert sources.shape == (3, 2, 400)
    assert (sources[..., 300:] == 0).all()
    assert (sources[..., :300] > 0).all()


def test_dynamic_mixing_never_pairs_a_speaker_with_itself(folder, monkeypatch):
    seen = []
    original = speech.read_wav
    monkeypatch.setattr(speech, "read_wav", lambda path: seen.append(path) or original(path))
    stream = iter(batches(folder, dynamic=True, batch_size=40))
    assert next(stream).shape == (40, 2, 200)
    firsts = [path.stem.split("_")[0].split("-")[0] for path in seen[0::2]]
    seconds = [path.stem.split("_")[1].split("-")[0] for path in seen[1::2]]
    assert all(a != b for a, b in zip(firsts, seconds, strict=True))
    assert any(a.stem != b.stem for a, b in zip(seen[0::2], seen[1::2], strict=True))


@pytest.mark.parametrize(
    ("name", "speakers"),
    [
        ("4014-186175-0000_1988-147956-0003.wav", ["4014", "1988"]),  # Libri2Mix
        ("011a0101_1.9857_01ao030e_-1.9857.wav", ["011", "01a"]),  # WSJ0-2mix
    ],
)
def test_file_names_tell_the_speakers(name, speakers):
    assert [speech._speaker(speech.Path(name), part) for part in (0, 1)] == speakers


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_restored_position_continues_exactly(folder, dynamic):
    whole = iter(batches(folder, dynamic=dynamic))
    expected = [next(whole) for _ in range(4)][2:]
    first = batches(folder, dynamic=dynamic)
    stream = iter(first)
    next(stream), next(stream)
    resumed = batches(folder, dynamic=dynamic)
    resumed.load_state_dict(first.state_dict())
    stream = iter(resumed)
    assert all(torch.equal(next(stream), batch) for batch in expected)


def test_utterances_come_whole_and_in_order(folder):
    pairs = speech.mixture_files("libri2mix", "dev", folder)
    found = [speech.utterance(pair) for pair in pairs]
    assert [tuple(u.shape) for u in found] == [(1, 2, 300)] * 5
    assert [round(u[0, 0, 0].item() * 2**15) for u in found] == [1000, 1001, 1002, 1003, 1004]


@pytest.mark.parametrize("corpus", sorted(speech.SPLITS))
def test_missing_folder_says_what_to_do(tmp_path, corpus):
    with pytest.raises(DataUnavailableError, match=rf"{corpus}.* GB .*scripts of.*data_dir DATA"):
        speech.mixture_files(corpus, "dev", tmp_path)


def test_unpaired_file_is_named(folder):
    next((folder / "libri2mix/dev/s2").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"same files; .*\.wav is in one"):
        batches(folder)


@pytest.mark.parametrize("wrong", [{"rate": 16000}, {"channels": 2}])
def test_wrong_format_is_named(tmp_path, wrong):
    write_wav(tmp_path / "a.wav", np.zeros(20), **wrong)
    with pytest.raises(ValueError, match=r"a\.wav: need 1 channel"):
        speech.read_wav(tmp_path / "a.wav")


# ---------------------------------------------------------------- access by name


def options(data_dir=""):
    return {"seed": 0, "samples": 1000, "data_dir": data_dir}


@pytest.mark.parametrize("corpus", speech.CORPORA)
def test_every_corpus_gives_batches_and_test_mixtures(corpus, digits):
    for split in speech.SPLITS.get(corpus, ()):
        for part in ("s1", "s2"):
            for name in ("1-1-1_2-2-2.wav", "3-1-1_4-2-2.wav"):
                write_wav(digits / corpus / split / part / name, np.arange(1200))
    data = speech.training_batches(corpus, count=2, batch_size=3, **options(digits))
    batch = next(iter(data))
    assert batch.shape == (3, 2, 1000)
    test = torch.cat(speech.held_out(corpus, count=2, **options(digits)))
    assert test.shape[:2] == (2, 2)
    assert not torch.equal(batch[0, :, :500], test[0, :, :500])


@pytest.mark.parametrize("function", ["training_batches", "held_out"])
def test_unknown_corpus_names_the_known_ones(function):
    sizes = {"count": 1} | ({"batch_size": 1} if function == "training_batches" else {})
    with pytest.raises(ValueError, match=r"unknown corpus 'digit'.*digits"):
        getattr(speech, function)("digit", **sizes, **options())
