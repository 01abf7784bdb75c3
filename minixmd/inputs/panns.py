"""PANN's log-mel frames, as Cnn14_16k takes them.

The spectrum is a convolution with the Fourier matrix, as in the original: an FFT takes half the time, 9 ms instead of
17 for 10 s, but in quiet bins rounds to up to 0.0005 dB elsewhere.

Letters: S samples at 16 kHz, A frames of 10 ms, F = 257 bins of the spectrum, M = 64 mel bins.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F

from minixmd.inputs.audio import SAMPLE_RATE

N_FFT, HOP, MELS, LOWEST_HZ = 512, 160, 64, 50
FLOOR = 1e-10  # power of silence: -100 dB


def log_mel(wave_S: torch.Tensor) -> torch.Tensor:
    """The log-mel frames of a whole clip, in dB.

    Args:
        wave_S: (S,) float32, 16 kHz mono.
    Returns:
        mel_AM: (S // 160 + 1, 64) float32, >= -100.
    Raises:
        ValueError: not 1-D floating point, or 256 samples (16 ms) or fewer, too short to be mirrored at its ends.
    Source: torchlibrosa 0.1.0 Spectrogram and LogmelFilterBank; tests/test_cnn14.py compares.
    """
    if wave_S.dim() != 1 or not wave_S.is_floating_point():
        raise ValueError(f"log_mel needs a 1-D floating-point wave, got {wave_S.dtype} {tuple(wave_S.shape)}")
    if len(wave_S) <= N_FFT // 2:
        raise ValueError(f"too short: {len(wave_S)} samples, {N_FFT // 2 + 1} are needed")
    real_F1S, imag_F1S, mel_FM = (tensor.to(wave_S.device) for tensor in front_end().values())
    wave_11S = F.pad(wave_S.float()[None, None], (N_FFT // 2, N_FFT // 2), mode="reflect")
    power_FA = (F.conv1d(wave_11S, real_F1S, stride=HOP) ** 2 + F.conv1d(wave_11S, imag_F1S, stride=HOP) ** 2)[0]
    power_AM = power_FA.T @ mel_FM
    return 10 * power_AM.clamp(min=FLOOR).log10()


@functools.cache
def mel_filters() -> torch.Tensor:
    """Slaney's filter bank from 50 Hz to 8 kHz, (257, 64) float32: as inputs/audio.py's, with other edges."""
    step = np.log(6.4) / 27
    mel = np.linspace(LOWEST_HZ * 3 / 200, 15 + np.log(SAMPLE_RATE / 2 / 1000) / step, MELS + 2)
    edge_hz = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))
    bin_hz = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    left, centre, right = edge_hz[:-2], edge_hz[1:-1], edge_hz[2:]
    rise, fall = (bin_hz - left) / (centre - left), (right - bin_hz) / (right - centre)
    return torch.from_numpy((np.maximum(0.0, np.minimum(rise, fall)) * 2 / (right - left)).astype(np.float32))


@functools.cache
def front_end() -> dict[str, torch.Tensor]:
    """The three tensors of `log_mel` by their names in PANN's checkpoints: the windowed Fourier matrix, (257, 1, 512)
    each half, and the mel filters."""
    window_S = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    turns_FS = np.outer(np.arange(N_FFT // 2 + 1), np.arange(N_FFT)) % N_FFT / N_FFT
    wave_FS = window_S * np.exp(-2j * np.pi * turns_FS)
    halves = {f"spectrogram_extractor.stft.conv_{name}.weight": torch.from_numpy(half[:, None].astype(np.float32))
              for name, half in (("real", wave_FS.real), ("imag", wave_FS.imag))}
    return {**halves, "logmel_extractor.melW": mel_filters()}
