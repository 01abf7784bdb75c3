"""PANN's log-mel frames, as Cnn14_16k takes them.

The spectrum is a convolution with the Fourier matrix, as in the original: an FFT takes half the time, but in quiet bins
rounds to up to 0.0005 dB elsewhere.
Letters: S samples at 16 kHz, A frames of 10 ms, F = 257 bins of the spectrum, M = 64 mel bins."""
import functools

import numpy as np
import torch
import torch.nn.functional as F

from minixmd.inputs.audio import mel_filters

N_FFT, HOP, MELS, LOWEST_HZ = 512, 160, 64, 50
FLOOR = 1e-10  # power of silence: -100 dB


def log_mel(wave_S):
    """The log-mel frames of a whole clip, in dB: (S // 160 + 1, 64) float32, >= -100. wave_S: (S,) float32, 16 kHz
    mono, S > 256. Source: torchlibrosa 0.1.0 Spectrogram and LogmelFilterBank; tests/test_cnn14.py compares."""
    *matrices_F1S, mel_FM = (tensor.to(wave_S.device) for tensor in front_end().values())
    wave_11S = F.pad(wave_S.float()[None, None], (N_FFT // 2, N_FFT // 2), mode="reflect")
    power_FA = sum(F.conv1d(wave_11S, matrix_F1S, stride=HOP)[0] ** 2 for matrix_F1S in matrices_F1S)
    return 10 * (power_FA.T @ mel_FM).clamp(min=FLOOR).log10()


@functools.cache
def front_end():
    """`log_mel`'s tensors by their names in PANN's files: a windowed Fourier matrix's halves and filters, (257, 64)."""
    window_S = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    turns_FS = np.outer(np.arange(N_FFT // 2 + 1), np.arange(N_FFT)) % N_FFT / N_FFT
    wave_FS = window_S * np.exp(-2j * np.pi * turns_FS)
    real_F1S, imag_F1S = (torch.from_numpy(half[:, None].astype(np.float32)) for half in (wave_FS.real, wave_FS.imag))
    return {
        "spectrogram_extractor.stft.conv_real.weight": real_F1S,
        "spectrogram_extractor.stft.conv_imag.weight": imag_F1S,
        "logmel_extractor.melW": mel_filters(N_FFT, MELS, LOWEST_HZ).T.contiguous(),
    }
