"""Two-speaker mixtures: generated voices, spoken digits, and folders of Libri2Mix or WSJ0-2mix.

Everything here yields the separate sources, (count, 2, L) at 8 kHz; the mixture is their sum.
`training_batches` and `held_out` give a chapter the same access to all of them, by name:

    turns      generated voices that speak in turns; nothing to download
    digits     Free Spoken Digit Dataset, six speakers, recordings held out
    libri2mix  a folder of wave files, with dynamic mixing
    wsj0-2mix  the paper's corpus, in the same layout; it needs a licence
"""

import functools
import math
import os
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gatebook.data.sources import DataUnavailableError, load
from gatebook.errors import unknown

SAMPLE_RATE = 8000  # Hz, of every signal in this file
N_HARMONICS = 12
CORPORA = ("turns", "digits", "libri2mix", "wsj0-2mix")
SPLITS = {"libri2mix": ("train-360", "test"), "wsj0-2mix": ("tr", "tt")}
HOW_TO_GET = {
    "libri2mix": "libri2mix (8 kHz, min): about 27 GB for the two sources of train-360, dev and "
    "test. We know of no hub id. Make it with the scripts of github.com/JorisCos/LibriMix from "
    "LibriSpeech, put the folders of Libri2Mix/wav8k/min into DATA/libri2mix/ and run with "
    "`-p data_dir DATA` (or set GATEBOOK_DATA).",
    "wsj0-2mix": "wsj0-2mix (8 kHz, min): about 5 GB for the two sources of tr, cv and tt. It is "
    "licensed (LDC93S6A) and has no hub id. Make it with the scripts of Hershey et al. (2016), put "
    "the folders of 2speakers/wav8k/min into DATA/wsj0-2mix/ and run with `-p data_dir DATA` (or "
    "set GATEBOOK_DATA).",
}


# ---------------------------------------------------------------- one access to all corpora


def training_batches(
    corpus: str,
    *,
    seed: int,
    count: int,
    batch_size: int,
    samples: int,
    data_dir: str | Path = "",
    device: str = "cpu",
    rank: int = 0,
    processes: int = 1,
) -> Iterable[Tensor]:
    """Batches of sources (B, 2, L) to train on.

    Args:
        corpus: "turns" (`count` batches, made at once), "digits" (`count` batches, cut on the
            device as they are asked for) or a folder (endless).
        seed: draws everything.
        count: number of batches; training for longer starts again at the first one.
        batch_size: B.
        samples: L.
        data_dir: folder with `free_spoken_digit/`, `libri2mix/` or `wsj0-2mix/`.
        device: where digits are cut.
        rank: of this process; folders only.
        processes: how many train together; folders only.

    Raises:
        ValueError: unknown corpus.
        DataUnavailableError: the corpus is not there; the message says how to get it.
    """
    generator = torch.Generator().manual_seed(seed)
    if corpus == "turns":
        return list(turn_taking(count * batch_size, samples, generator).split(batch_size))
    if corpus == "digits":
        streams = digit_streams("train", generator, data_dir).to(device)
        return (stream_mixtures(streams, batch_size, samples, generator) for _ in range(count))
    if corpus in SPLITS:
        pairs = mixture_files(corpus, SPLITS[corpus][0], data_dir)
        own = {"rank": rank, "processes": processes}
        return FolderMixtures(pairs, samples=samples, batch_size=batch_size, seed=seed, **own)
    raise ValueError(unknown("corpus", corpus, CORPORA))


def held_out(
    corpus: str, *, seed: int, count: int, samples: int, data_dir: str | Path = ""
) -> list[Tensor]:
    """Test mixtures that training never sees, as sources (count, 2, L) in one or more batches.

    Voices are drawn anew, from another seed; digits are of the test recordings, by the same six
    speakers; a folder gives the first `count` utterances of its test split, at full length.

    Raises:
        ValueError: unknown corpus.
        DataUnavailableError: the corpus is not there; the message says how to get it.
    """
    generator = torch.Generator().manual_seed(10_000_000 + seed)
    if corpus == "turns":
        return list(turn_taking(count, samples, generator).split(16))
    if corpus == "digits":
        streams = digit_streams("test", generator, data_dir)
        return list(stream_mixtures(streams, count, samples, generator).split(16))
    if corpus in SPLITS:
        return [
            utterance(pair) for pair in mixture_files(corpus, SPLITS[corpus][1], data_dir)[:count]
        ]
    raise ValueError(unknown("corpus", corpus, CORPORA))


# ---------------------------------------------------------------- generated voices


def harmonic_voice(height: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Vowel-like tones: harmonics under one formant, with 2 % vibrato and random phases.

    Pitch is `90 * 3^height` Hz and the formant lies at `400 * 4^height` Hz, so that `height` orders
    voices from low and dark (0) to high and bright (1). Below 4 kHz at every height.

    Args:
        height: (count), in [0, 1].
        samples: L.
        generator: draws vibrato and phases.

    Returns:
        (count, L), not normalised.
    """
    count, t = len(height), torch.arange(samples) / SAMPLE_RATE
    rate, start = torch.rand(2, count, 1, generator=generator)
    vibrato = 0.02 * torch.sin(2 * math.pi * ((3 + 3 * rate) * t + start))
    pitch = 90 * 3 ** height[:, None]  # (count, 1), Hz
    phase = 2 * math.pi * (pitch * (1 + vibrato)).cumsum(-1) / SAMPLE_RATE  # (count, L)
    offset = 2 * math.pi * torch.rand(count, N_HARMONICS, generator=generator)
    harmonics = pitch * torch.arange(1, N_HARMONICS + 1)  # (count, 12), Hz
    octaves = (harmonics / (400 * 4 ** height[:, None])).log2()  # distance from the formant
    loudness = torch.exp2(-1.5 * octaves.square())
    tone = torch.zeros(count, samples)
    for k in range(N_HARMONICS):
        tone += loudness[:, k, None] * torch.sin((k + 1) * phase + offset[:, k, None])
    return tone


def alternating_turns(count: int, samples: int, generator: torch.Generator) -> Tensor:
    """Who speaks when: two speakers take turns of random length and overlap at each change.

    A turn lasts 12 to 30 % of the signal, an overlap 5 %.

    Args:
        count: signals.
        samples: L.
        generator: draws the lengths.

    Returns:
        Loudness between 0 and 1, (count, 2, L).
    """
    n_turns, overlap, ramp = 10, 0.05, 0.004  # fractions of the signal
    t = torch.arange(samples) / samples
    length = 0.12 + 0.18 * torch.rand(count, n_turns, generator=generator)
    length[:, 0] *= torch.rand(count, generator=generator)  # the first turn is under way at t = 0
    end = length.cumsum(1)
    begin = F.pad(end[:, :-1], (1, 0), value=-1.0)
    rise = torch.sigmoid((t - begin[..., None] + overlap / 2) / ramp)
    fall = torch.sigmoid((end[..., None] + overlap / 2 - t) / ramp)
    turns = (rise * fall).unflatten(1, (-1, 2))  # (count, turns / 2, 2, L)
    return turns.sum(dim=1).clamp(max=1.0)


def turn_taking(count: int, samples: int, generator: torch.Generator) -> Tensor:
    """Sources whose assignment needs memory: a higher and a lower voice that speak in turns.

    Their heights differ by at least 0.25, but nearly every voice can be the higher or the lower one
    of its mixture. While one voice speaks alone, only the rest of the signal tells which it is.

    Args:
        count: mixtures.
        samples: L.
        generator: draws everything.

    Returns:
        Sources of unit power, (count, 2, L), in random order.
    """
    gap = 0.25
    low = (1 - gap) * torch.rand(count, generator=generator)
    high = low + gap + (1 - gap - low) * torch.rand(count, generator=generator)
    swap = torch.rand(count, 1, generator=generator) < 0.5
    height = torch.stack((low, high), dim=1)
    height = torch.where(swap, height.flip(1), height)
    tone = harmonic_voice(height.flatten(), samples, generator).unflatten(0, (count, 2))
    return unit_power(tone * alternating_turns(count, samples, generator))


def unit_power(signal: Tensor) -> Tensor:
    """Scales signals (..., L) to a mean square of 1."""
    return signal / signal.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-8)


# ---------------------------------------------------------------- spoken digits


def digit_streams(
    split: str, generator: torch.Generator, data_dir: str | Path = "", seconds: float = 600.0
) -> Tensor:
    """One long recording for each speaker of the Free Spoken Digit Dataset.

    A speaker's recordings are shuffled and put end to end, again and again.

    Args:
        split: "train", or "test" with recordings that training never sees.
        generator: draws the orders.
        data_dir: see `sources.load`.
        seconds: length of a stream.

    Returns:
        (speakers, seconds * 8000), each recording scaled to unit power.
    """
    speakers = _recordings(split, str(data_dir))
    samples = int(seconds * SAMPLE_RATE)
    return torch.stack([_endless(speakers[name], samples, generator) for name in sorted(speakers)])


@functools.lru_cache(maxsize=4)
def _recordings(split: str, data_dir: str) -> dict[str, list[Tensor]]:
    """The recordings of each speaker, at unit power; kept, since every run asks for them again."""
    rows = load("free_spoken_digit", split, data_dir).with_format("numpy")
    speakers: dict[str, list[Tensor]] = {}
    for speaker, audio in zip(rows["speaker"], rows["audio"], strict=True):
        speakers.setdefault(speaker, []).append(unit_power(torch.as_tensor(audio).float()))
    return speakers


def _endless(recordings: list[Tensor], samples: int, generator: torch.Generator) -> Tensor:
    rounds = math.ceil(samples / sum(map(len, recordings)))
    orders = [torch.randperm(len(recordings), generator=generator) for _ in range(rounds)]
    return torch.cat([recordings[i] for i in torch.cat(orders).tolist()])[:samples]


def stream_mixtures(
    streams: Tensor, count: int, samples: int, generator: torch.Generator, level_db: float = 5.0
) -> Tensor:
    """Sources cut at random from the streams of two different speakers.

    Args:
        streams: (speakers, T), on any device; T > samples.
        count: mixtures.
        samples: L.
        generator: draws speakers, positions and levels (on the CPU).
        level_db: the first source is up to this much louder or softer than the second.

    Returns:
        (count, 2, L) on the device of `streams`; the second source has unit power.
    """
    who = torch.rand(count, len(streams), generator=generator).argsort(dim=1)[:, :2]
    start = torch.randint(streams.shape[1] - samples, (count, 2), generator=generator)
    level = level_db * (2 * torch.rand(count, generator=generator) - 1)
    who, start, level = (part.to(streams.device) for part in (who, start, level))
    time = start[..., None] + torch.arange(samples, device=streams.device)
    sources = unit_power(streams[who[..., None], time])
    sources[:, 0] *= 10 ** (level[:, None] / 20)
    return sources


# ---------------------------------------------------------------- Libri2Mix and WSJ0-2mix


def mixture_files(corpus: str, split: str, data_dir: str | Path = "") -> list[tuple[Path, Path]]:
    """The files of the two sources of every mixture, `DATA/CORPUS/SPLIT/{s1,s2}/*.wav`, by name.

    Args:
        corpus: "libri2mix" or "wsj0-2mix".
        split: a folder of that corpus.
        data_dir: DATA; empty takes the environment variable GATEBOOK_DATA.

    Raises:
        DataUnavailableError: there are no such files; the message says how to get them.
        ValueError: s1 and s2 hold different files.
    """
    folder = Path(data_dir or os.environ.get("GATEBOOK_DATA", "")).expanduser() / corpus / split
    names, others = ({path.name for path in folder.glob(f"{part}/*.wav")} for part in ("s1", "s2"))
    if not names:
        where = f"no {corpus}/{split}/s1/*.wav in data_dir"
        raise DataUnavailableError(f"{where}. {HOW_TO_GET[corpus]}")
    if names != others:
        odd = sorted(names ^ others)[0]
        raise ValueError(f"{split}/s1 and {split}/s2 must hold the same files; {odd} is in one")
    return [(folder / "s1" / name, folder / "s2" / name) for name in sorted(names)]


def utterance(pair: tuple[Path, Path]) -> Tensor:
    """The sources of one mixture at full length, (1, 2, L)."""
    wavs = [read_wav(path) for path in pair]
    length = min(map(len, wavs))
    return torch.stack([wav[:length] for wav in wavs])[None]


class FolderMixtures:
    """Endless batches of sources (B, 2, L) from pairs of wave files.

    With dynamic mixing the two sources come from different mixtures and different speakers, at
    fresh levels and speeds; file names tell the speakers. Sample n of all processes depends on
    (seed, n) alone, so that a resumed run continues exactly.

    Args:
        pairs: from `mixture_files`.
        samples: L of a training segment; shorter recordings are padded with silence at the end.
        batch_size: B.
        seed: draws files, positions, levels and speeds.
        dynamic: mix anew; False keeps the pairs of the data set.
        rank: of this process.
        processes: how many draw samples together.
    """

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        *,
        samples: int,
        batch_size: int,
        seed: int,
        dynamic: bool = True,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.pairs, self.samples, self.batch_size = pairs, samples, batch_size
        self.seed, self.dynamic, self.rank, self.processes = seed, dynamic, rank, processes
        self.drawn = 0  # samples of all processes so far

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            first = self.drawn + self.rank * self.batch_size
            self.drawn += self.batch_size * self.processes
            yield torch.stack([self._sample(first + i) for i in range(self.batch_size)])

    def state_dict(self) -> dict[str, int]:
        """The samples that all processes drew."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a saved place, on any number of processes."""
        self.drawn = state["drawn"]

    @staticmethod
    def merge_states(states: list[dict[str, int]]) -> dict[str, int]:
        """One state from those of all processes, which are alike."""
        return states[0]

    def _sample(self, n: int) -> Tensor:
        return self._draw(torch.Generator().manual_seed(self.seed * 2**32 + n))

    def _draw(self, generator: torch.Generator) -> Tensor:
        first, second = self._pick(generator), self._pick(generator)
        if not self.dynamic:
            return _segment([read_wav(path) for path in first], self.samples, generator)
        while _speaker(first[0], 0) == _speaker(second[1], 1):
            second = self._pick(generator)
        chosen = [_vary(read_wav(path), generator) for path in (first[0], second[1])]
        return torch.cat([_segment([wav], self.samples, generator) for wav in chosen])

    def _pick(self, generator: torch.Generator) -> tuple[Path, Path]:
        return self.pairs[int(torch.randint(len(self.pairs), (), generator=generator))]


def read_wav(path: Path) -> Tensor:
    """Reads a 16-bit mono file at 8 kHz as (L) in [-1, 1).

    Raises:
        ValueError: for another format; the message names the file and what it holds.
    """
    with wave.open(str(path), "rb") as file:
        found = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if found != (1, 2, SAMPLE_RATE):
            raise ValueError(
                f"{path.name}: need 1 channel, 2 bytes, {SAMPLE_RATE} Hz; found {found}"
            )
        data = bytearray(file.readframes(file.getnframes()))
    return torch.frombuffer(data, dtype=torch.int16).float() / 2**15


def _speaker(path: Path, part: int) -> str:
    """Who speaks in source `part` of `SPEAKER-…_SPEAKER-….wav` (Libri2Mix) or of
    `SPKxxxxx_dB_SPKxxxxx_dB.wav` (WSJ0-2mix, three letters a speaker)."""
    fields = path.stem.split("_")
    return fields[2 * part][:3] if len(fields) == 4 else fields[part].split("-")[0]


def _vary(wav: Tensor, generator: torch.Generator) -> Tensor:
    """Plays at 95 to 105 % of the speed and up to 2.5 dB louder or softer, like the recipes."""
    speed, level = (2 * torch.rand(2, generator=generator) - 1).tolist()
    samples = round(len(wav) / (1 + 0.05 * speed))
    resampled = F.interpolate(wav[None, None], size=samples, mode="linear", align_corners=False)
    return unit_power(resampled[0, 0]) * 10 ** (2.5 * level / 20)


def _segment(wavs: list[Tensor], samples: int, generator: torch.Generator) -> Tensor:
    """Cuts the same random segment out of recordings that belong together: (len(wavs), L)."""
    length = min(map(len, wavs))
    start = int(torch.randint(max(1, length - samples + 1), (), generator=generator))
    return torch.stack(
        [F.pad(w[start : start + samples], (0, max(0, samples - length))) for w in wavs]
    )
