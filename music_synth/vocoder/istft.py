"""A generator that writes spectra and leaves the rest to the inverse Fourier transform (Vocos, Siuzdak 2023).

Mel frames go through ConvNeXt blocks (Liu et al. 2022) at 50 frames a second; a head gives magnitude and phase of
a spectrum a frame, and overlapping inverse transforms are the audio. Two things are our own:

- Phases by recurrence. A convolutional generator turns a mel that stands still into audio that repeats with every
  hop: a tone can only have multiples of 50 Hz. Here the phasor of each bin turns from frame to frame by a frequency
  that the network reads off the mel, and is set anew where it says so: z_k = r_k e^(i theta_k) z_(k-1) + (1 - r_k) e_k.
- Mel projections (`stft.project_to_mel`; `pull_to_mel` looks less ahead): they pull the audio to the mel asked for.

And where it is given one, a third: phases from a plain signal made of notes, or of keys read off the mel
(`vocoder.excitation`). A bin takes the source's phase where that explains what the mel has, else the recurrence holds.
Magnitudes stay those of the mel: a wrong note adds nothing. How far a bin trusts the source, a network with `source`
learns, and any other is told (`informed`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import HOP_LENGTH, NUM_MELS, SAMPLE_RATE, hann_window, log_mel, scale_mel
from music_synth.errors import check_range
from music_synth.vocoder.convnext import ConvNeXtBlock, context
from music_synth.vocoder.keys import AHEAD as KEYS_AHEAD
from music_synth.vocoder.pre_echo import pre_echo_limits
from music_synth.vocoder.source import SOURCE_FLOOR, SOURCE_HOPS
from music_synth.vocoder.stft import (
    PULL_AHEAD,
    Pull,
    frames_of,
    magnitude,
    no_pull,
    overlap_add,
    project_to_mel,
    pull_to_mel,
    scaled,
    windowed,
)

Array = jax.Array
WINDOW = 4 * HOP_LENGTH  # samples of a synthesis frame; also its FFT size
NUM_BINS = WINDOW // 2 + 1
TURN = 2 * np.pi * HOP_LENGTH / WINDOW  # radians in a hop of a tone at a frequency of one bin
MAX_LOG_MAGNITUDE = 7.0  # a full-scale sine has 5.8
INFORMED_STEPS = 1  # of consistency, by which the phases that the source does not hold follow those that it does
INFORMED_PULL = (5, 0.5)  # steps a hop, momentum: more cost notes, fewer leave the mel (docs/inverter_log.md)
SOURCE_SHARE = 0.45  # of the source's log-magnitude in a bin that it explains
SOURCE_HZ = (2500.0, 500.0)  # where trust in its phases is half, and how slowly it falls: high partials lie elsewhere
SOURCE_AHEAD = SOURCE_HOPS - 1 + KEYS_AHEAD  # frames of mel after one that the source of its synthesis frame needs
FINE_RANGE = (-5.0, 3.0)  # natural-log magnitude of a bin of the source over that of its mel filters
MAX_OFFSET = 2.5  # bins between a bin and the tone that it follows: half a Hann window's main lobe, and some


class ISTFTNetwork(nn.Module):
    config: ISTFTGenerator
    seen: tuple[int, ...]  # frames that each layer sees ahead

    @nn.compact
    def __call__(
        self, mel: Array, exists: Array, first_frame: Array, state: Array, start: int, source: Array | None = None
    ) -> Spectra:
        c = self.config
        exists = exists[..., None].astype(jnp.float32)  # [B, T, 1]
        seen = scale_mel(mel) * exists
        if c.source:
            excited = jnp.log(jnp.exp(log_mel(source)[:, 1:-2]) + SOURCE_FLOOR)  # [B, T, M]
            seen = jnp.concatenate([seen, scale_mel(excited, clip=False) * exists], axis=-1)
        x = nn.Dense(c.dim, name="embed")(context(seen, c.width, c.frames_ahead, self.seen[0]))  # [B, T, D]
        x = nn.LayerNorm(name="norm")(x)
        for i in range(c.num_layers):
            sizes = c.mlp_dim, c.width, c.frames_ahead, self.seen[i + 1]
            x = ConvNeXtBlock(*sizes, scale=1 / c.num_layers, name=f"layers_{i}")(x, exists)
        x = nn.LayerNorm(name="final_norm")(x).reshape(-1, c.dim)

        def head(name: str, bias: float = 0.0) -> Array:
            dense = nn.Dense(NUM_BINS, bias_init=nn.initializers.constant(bias), name=name)
            return dense(x).reshape(*mel.shape[:2], NUM_BINS)

        def band_head(name: str, bias: float) -> Array:
            """As `head`, but smooth over frequency: a number a mel filter."""
            dense = nn.Dense(NUM_MELS, bias_init=nn.initializers.constant(bias), name=name)
            return dense(x).reshape(*mel.shape) @ interpolation().T

        log_magnitude = head("magnitude") + mel @ interpolation().T  # [B, T, F]
        bins = np.arange(NUM_BINS, dtype=np.float32)
        frequency = MAX_OFFSET * jnp.tanh(head("frequency")) + bins[None, None]  # in bins
        noise = frame_noise(first_frame, mel.shape[1])
        fresh = jax.lax.complex(head("real"), head("imaginary"))
        if c.source:
            keep = nn.sigmoid(band_head("keep", 1.0))
            noise = scaled(noise, nn.softplus(band_head("noise", -2.0)))
            assert source is not None  # `play` and `generate` are given it
            spectrum = centered_spectra(source)
            size = magnitude(spectrum, 1e-6)
            fine = jnp.log(size + SOURCE_FLOOR) - excited @ interpolation().T
            log_magnitude += nn.sigmoid(band_head("fine", 0.0)) * jnp.clip(fine, *FINE_RANGE)
            trust = nn.sigmoid(band_head("trust", 2.0)) / (size + SOURCE_FLOOR)  # of a magnitude of 1
            doubt = 1 - trust * size
            keep *= doubt
            fresh = scaled(fresh, doubt) + scaled(spectrum, trust) + noise
        else:
            keep = nn.sigmoid(head("keep", 1.0))
            fresh += scaled(noise, nn.softplus(head("noise", -1.0)))
        phasor = recurrent_phasor(frequency, keep * exists, scaled(fresh, exists), state, start)
        direction = scaled(phasor, 1 / magnitude(phasor, 1e-6))

        return Spectra(jnp.minimum(log_magnitude, MAX_LOG_MAGNITUDE), frequency, direction, phasor)


@dataclass(frozen=True)
class ISTFTGenerator:
    """Sizes of the network, and how often its audio is made more consistent."""

    dim: int = 256  # width
    mlp_dim: int = 768
    num_layers: int = 6
    width: int = 7  # frames under each convolution
    ahead: int | None = None  # of them, those that come later; None: half of them
    max_ahead: int = 7  # frames that all layers together see ahead when it plays: as many as a source needs, too
    source: bool = False  # whether the network itself is given the signal made of the notes
    num_consistency_steps: int = 16  # towards the network's magnitudes (Griffin and Lim 1984), when it plays
    num_projections: int = 32  # then towards the mel, when it plays
    pull_steps: int = 0  # of each hop of audio (`stft.pull_to_mel`), then: they look less ahead
    consistency_momentum: float = 0.99  # of the steps (Perraudin et al. 2013), and of the projections:
    projection_momentum: float = 0.85  # beyond 0.9 noise grows between the partials (validation split)
    training_steps: tuple[int, int] = (1, 2)  # of the two where a loss looks at the audio; the less, the faster

    def __post_init__(self):
        check_range(self, 1, 256, "num_layers", "width")
        check_range(self, 1, 2**14, "dim", "mlp_dim")
        check_range(self, 0, 10_000, "num_consistency_steps", "num_projections", "pull_steps", "max_ahead")
        if self.width % 2 == 0 and self.ahead is None:
            raise ValueError(f"ISTFTGenerator.width = {self.width}: must be odd, or say how many of them are ahead")
        if not 0 <= self.frames_ahead < self.width:
            raise ValueError(f"ISTFTGenerator.ahead = {self.ahead}: must be less than the width, {self.width}")
        if len(self.training_steps) != 2 or not all(0 <= steps <= 1000 for steps in self.training_steps):
            raise ValueError(f"ISTFTGenerator.training_steps = {self.training_steps}: two numbers, 0 to 1000")
        for name in ("consistency_momentum", "projection_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ISTFTGenerator.{name} = {getattr(self, name)}: must be in [0, 1]")

    @property
    def module(self) -> ISTFTNetwork:
        """The network as it plays."""
        return ISTFTNetwork(self, self.layers_ahead)

    @property
    def frames_ahead(self) -> int:
        return self.width // 2 if self.ahead is None else self.ahead

    @property
    def layers_ahead(self) -> tuple[int, ...]:
        """Frames that each layer sees ahead when it plays: the first ones all of theirs, until `max_ahead` is spent."""
        left = (max(0, self.max_ahead - self.frames_ahead * i) for i in range(self.num_layers + 1))
        return tuple(min(self.frames_ahead, frames) for frames in left)

    @property
    def network_reach(self) -> tuple[int, int]:
        """Frames before and after that the network sees; the recurrence apart."""
        return (self.num_layers + 1) * (self.width - 1 - self.frames_ahead), sum(self.layers_ahead)

    @property
    def reach(self) -> tuple[int, int]:
        """Frames before and after that must be given to play a frame and its source, besides the carried state."""
        behind, ahead = self.network_reach
        steps = 3 * self.num_consistency_steps + self.num_projections
        ahead = max(ahead, SOURCE_AHEAD) if self.source or self.pull_steps else ahead
        return max(1, behind + 2 + steps - self.lead), ahead + 1 + steps + self.hops_pulled

    @property
    def lead(self) -> int:
        """Frames before the first one of a piece at which playing begins."""
        return PULL_AHEAD if self.pull_steps else 0

    @property
    def hops_pulled(self) -> int:
        """Hops after one of audio of which a first estimate is needed to make it."""
        return PULL_AHEAD + 1 if self.pull_steps else 0

    takes_notes = True

    def as_played(self) -> ISTFTGenerator:
        """The generator as it plays by a source: its phases need fewer steps, and so less of the future."""
        if self.source:
            return self
        steps, momentum = INFORMED_PULL
        pulled = replace(self, pull_steps=steps, projection_momentum=momentum)
        return replace(pulled, num_consistency_steps=INFORMED_STEPS, num_projections=0)

    def no_state(self, rows: int) -> State:
        """What is carried along, before a piece begins."""
        return State(no_phasor(rows), no_pull(rows))

    def init(self, rng: Array):
        mel, one = jnp.zeros((1, 8, NUM_MELS)), jnp.ones((1, 8), bool)
        source = jnp.zeros((1, (8 + SOURCE_HOPS) * HOP_LENGTH)) if self.source else None
        return self.module.init(rng, mel, one, jnp.zeros(1, jnp.int32), no_phasor(1), 0, source)["params"]

    def generate(
        self, params, mel: Array, exists: Array, first_frame: Array, source: Array | None = None
    ) -> tuple[Array, Spectra]:
        """Audio [B, 320 T] for a loss, with few consistency steps, and the spectra that the network wrote."""
        network = ISTFTNetwork(self, (self.frames_ahead,) * (self.num_layers + 1))
        phasor = no_phasor(len(mel))
        spectra: Any = network.apply({"params": params}, mel, exists, first_frame, phasor, 0, source)
        return self._audio(spectra, mel, exists, self.training_steps), spectra

    def play(
        self, params, mel: Array, exists: Array, first_frame: Array, source: Array | None, state: State
    ) -> tuple[Array, State]:
        """Audio to be heard, of the frames of a window that have `reach` frames on either side.

        Args:
          mel: natural-log mel [B, behind + n + ahead, M]; whatever stands where `exists` [B, ..] is False is not seen.
          first_frame: int32 [B], the number in the piece of frame 0 of mel: the noise goes by it.
          source: [B, 320 (frames + 3)], from a hop before frame 0 on (`vocoder.excitation`); None: there is none.
          state: as it came out for the frames before those n, or `no_state` if they begin `lead` before the piece.

        Returns:
          Audio [B, 320 n], and the state.
        """
        (behind, ahead), start = self.reach, self.network_reach[0]
        end = mel.shape[1] - ahead
        given = source if self.source else None
        spectra: Any = self.module.apply({"params": params}, mel, exists, first_frame, state.phasor, start, given)
        if source is not None and not self.source:
            spectra = informed(spectra, mel, source)
        limits = pre_echo_limits(mel, exists)
        audio = self._audio(spectra, mel, exists, (self.num_consistency_steps, self.num_projections), limits)
        last = end + self.hops_pulled
        audio, pull = audio[:, behind * HOP_LENGTH : last * HOP_LENGTH], state.pull
        if self.pull_steps:
            wanted = jnp.exp(mel[:, behind : end + PULL_AHEAD])
            near = exists[:, behind - 1 : last].astype(jnp.float32)
            limits = limits[:, behind:last]
            audio, pull = pull_to_mel(audio, wanted, near, limits, pull, self.pull_steps, self.projection_momentum)
        return audio, State(spectra.phasor[:, end - behind + start - 1], pull)

    def _audio(
        self, spectra: Spectra, mel: Array, exists: Array, steps: tuple[int, int], limits: Array | None = None
    ) -> Array:
        size, exists = jnp.exp(spectra.log_magnitude), exists.astype(jnp.float32)
        wanted = jnp.exp(mel) * exists[..., None]

        def towards_magnitudes(audio: Array) -> Array:
            present = analysis(audio)
            if spectra.held is None:
                return inverse(scaled(present, size / magnitude(present, 1e-9)), exists)
            own = scaled(present, 1 / magnitude(present, 1e-9))
            return inverse(scaled(between(own, spectra.direction, spectra.held), size), exists)

        audio = inverse(scaled(spectra.direction, size), exists)
        audio = iterate(towards_magnitudes, audio, steps[0], self.consistency_momentum)
        towards_mel = functools.partial(project_to_mel, mel=wanted, exists=exists, limits=limits)
        return iterate(towards_mel, audio, steps[1], self.projection_momentum)


def iterate(step: Callable[[Array], Array], x: Array, num_steps: int, momentum: float) -> Array:
    """x_(n+1) = step(x_n + momentum (x_n - x_(n-1))), num_steps times."""
    pair = (x, x)
    return jax.lax.fori_loop(0, num_steps, lambda _, p: (step(p[0] + momentum * (p[0] - p[1])), p[0]), pair)[0]


class Spectra(NamedTuple):
    """What the network writes, [B, T, F] each."""

    log_magnitude: Array  # natural
    frequency: Array  # of the tone that a bin follows, in bins
    direction: Array  # the phase, as a complex number of magnitude 1
    phasor: Array  # the recurrence's state, whose direction it is
    held: Array | None = None  # how far consistency steps leave the direction as it is, 0 to 1; None: not at all


def informed(spectra: Spectra, mel: Array, source: Array) -> Spectra:
    """The spectra with the source's phases where it explains them, without any learning.

    Scaled to the mel of each filter, the source has a magnitude of its own in every bin; the lower it lies under the
    network's, the less its phase counts. Where that counts, the magnitude goes a part of the way to the source's, and
    consistency steps leave the phase.
    """
    excited = jnp.log(jnp.exp(log_mel(source)[:, 1:-2]) + SOURCE_FLOOR)  # [B, T, M]
    spectrum = centered_spectra(source)
    size = magnitude(spectrum, 1e-6)
    shaped = jnp.log(size + 1e-4) + (mel - excited) @ interpolation().T
    above = shaped - spectra.log_magnitude
    trust = nn.sigmoid(2 * above + 4) * trusted_bins()[None, None]
    direction = between(spectra.direction, scaled(spectrum, 1 / size), trust)
    log_magnitude = spectra.log_magnitude + SOURCE_SHARE * trust * jnp.clip(above, *FINE_RANGE)
    return spectra._replace(log_magnitude=log_magnitude, direction=direction, held=trust)


def trusted_bins() -> np.ndarray:
    """How far the source's phase is trusted in each bin at most, float32 [F]."""
    most, width = SOURCE_HZ
    return (1 / (1 + np.exp((np.linspace(0, SAMPLE_RATE / 2, NUM_BINS) - most) / width))).astype(np.float32)


def between(direction: Array, other: Array, share: Array) -> Array:
    """A direction a share of the way to another: complex numbers of magnitude 1."""
    mixed = scaled(direction, 1 - share) + scaled(other, share)
    return scaled(mixed, 1 / magnitude(mixed, 1e-6))


class State(NamedTuple):
    """What goes over from one stretch of a long mel to the next."""

    phasor: Array  # complex [B, F], of the recurrence
    pull: Pull


def no_phasor(rows: int) -> Array:
    return jnp.zeros((rows, NUM_BINS), jnp.complex64)


# Phases are those at the middle of the frame: that of a tone is then the same in all bins of its main lobe.
CENTER = np.where(np.arange(NUM_BINS) % 2, -1, 1).astype(np.float32)[None, None]


def analysis(audio: Array) -> Array:
    """Spectra of the synthesis frames: audio [B, 320 T] to [B, T, F]. Frame k begins a hop before mel frame k."""
    return centered_spectra(jnp.pad(audio, ((0, 0), (HOP_LENGTH, 2 * HOP_LENGTH))))


def centered_spectra(audio: Array) -> Array:
    """Spectra of all whole synthesis frames: [B, 320 (T + 3)] to [B, T, F]."""
    return scaled(jnp.fft.rfft(windowed(frames_of(audio, WINDOW, HOP_LENGTH), hann_window(WINDOW))), CENTER)


def inverse(spectrum: Array, exists: Array) -> Array:
    """Audio whose spectra are nearest: [B, T, F] to [B, 320 T], zero where the piece does not exist."""
    frames = windowed(jnp.fft.irfft(scaled(spectrum, CENTER)), hann_window(WINDOW)) * exists[..., None]
    audio = overlap_add(frames, HOP_LENGTH) / 1.5  # the sum of the squares of four Hann windows
    return audio[:, HOP_LENGTH : -2 * HOP_LENGTH] * jnp.repeat(exists, HOP_LENGTH, axis=1)


def turned(angle: Array) -> Array:
    """e^(i angle)"""
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


def recurrent_phasor(frequency: Array, keep: Array, fresh: Array, state: Array, start: int) -> Array:
    """z_k = r_k e^(i theta_k) z_(k-1) + (1 - r_k) e_k, theta the turn in a hop of a tone at `frequency` bins.

    All [B, T, F]; frame `start` follows on `state` [B, F]. Where keep and fresh are 0, z is.
    """

    def one(z, inputs):
        factor, addend, number = inputs
        z = factor * jnp.where(number == start, state, z) + addend
        return z, z

    by_time = functools.partial(jnp.moveaxis, source=1, destination=0)
    inputs = by_time(scaled(turned(TURN * frequency), keep)), by_time(scaled(fresh, 1 - keep))
    _, z = jax.lax.scan(one, jnp.zeros_like(state), (*inputs, jnp.arange(frequency.shape[1])))
    return by_time(z)


@functools.cache
def noise_table() -> np.ndarray:
    """Complex normal noise [128, F], which repeats every 128 frames, 2.56 s."""
    parts = np.random.default_rng(0).standard_normal((2, 128, NUM_BINS), np.float32)
    return parts[0] + 1j * parts[1]


def frame_noise(first_frame: Array, num_frames: int) -> Array:
    """Complex noise [B, T, F], a function of the number of the frame in the piece alone; first_frame int32 [B]."""
    numbers = first_frame[:, None] + jnp.arange(num_frames, dtype=first_frame.dtype)[None]
    return jnp.asarray(noise_table())[numbers % len(noise_table())]


def interpolation() -> np.ndarray:
    """[F, M]: from log-mel to a log-magnitude for each synthesis bin, linear between the centers of the filters."""
    mels = np.log1p(np.linspace(0, SAMPLE_RATE / 2, NUM_BINS) / 700.0)  # of the bins, which end where the filters do
    centers = np.linspace(0, mels[-1], NUM_MELS + 2)[1:-1]
    position = np.interp(mels, centers, np.arange(NUM_MELS))
    return np.maximum(0.0, 1 - np.abs(position[:, None] - np.arange(NUM_MELS))).astype(np.float32)
