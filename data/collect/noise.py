"""Coloured noise: exploration that lasts longer than one step, as white noise does not."""

import numpy as np
from jaxtyping import Float64


def coloured_noise(
    random: np.random.Generator, steps: int, size: int, exponent: float
) -> Float64[np.ndarray, "steps size"]:
    """Gaussian noise with a power spectrum of 1/frequency^exponent, of mean zero and variance one in expectation.

    Exponent 0 is white noise, 1 pink, 2 red. Drawn in the frequency domain (Timmer and König 1995, "On generating
    power law noise"); the columns are independent.
    """
    frequencies = np.fft.rfftfreq(steps)
    scale = np.zeros(len(frequencies))
    scale[1:] = frequencies[1:] ** (-exponent / 2)
    spectrum = scale[:, None] * (random.normal(size=(len(scale), size, 2)) @ np.array([1, 1j]))
    # Parseval: every frequency but the last counts twice, and each has a real and an imaginary part of variance one.
    deviation = 2 * np.sqrt(np.sum(scale**2)) / steps
    return np.fft.irfft(spectrum, n=steps, axis=0) / deviation
