"""A trained generator as an inverter: whole mels or streams of them, and the file it is kept in."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from music_synth.audio.mel import HOP_LENGTH, MIN_LOG_MEL, NUM_MELS
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.vocoder.excitation import Excitation
from music_synth.vocoder.inverter import checked_mel
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.melgan import MelGANGenerator

Array = jax.Array
GENERATORS = {kind.__name__: kind for kind in (MelGANGenerator, ISTFTGenerator)}
FORMAT = "music_synth inverter"
SHIPPED = Path(__file__).with_name("inverter.safetensors")
STRETCH = 256  # frames that are made at once in a stream
LONGEST_STRETCH = 2048  # of a whole mel: the frames on either side are then seen less often


@dataclass(frozen=True)
class NeuralInverter:
    """Log-mel [T, 128] to audio [320 T] by a trained generator.

    A mel of any length is made in stretches, each seen with `generator.reach` frames to either side and with the state
    in which the stretch before it ended. So the audio is the same however the mel arrives, up to rounding, and beyond
    the audio itself memory does not grow with its length.
    """

    generator: MelGANGenerator | ISTFTGenerator
    params: Any

    def __call__(self, mel: np.ndarray, notes: Sequence[Note] | None = None) -> np.ndarray:
        """log-mel [T, 128] to float32 [320 T]. It may exceed 1 where the mel is louder than audio can be."""
        mel = checked_mel(mel)
        stretches = -(-len(mel) // LONGEST_STRETCH) or 1
        stretch = -(-len(mel) // (stretches * STRETCH)) * STRETCH or STRETCH
        parts = list(self.stream([mel], notes, stretch=stretch, early=False))
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def without_source(self, mel: np.ndarray) -> np.ndarray:
        """As called, but by the network's own phases, as an ONNX file that takes no source makes it."""
        exists, first_frame = jnp.ones((1, len(mel)), bool), jnp.zeros(1, jnp.int32)
        return np.asarray(
            play_whole(self.generator, self.params, jnp.asarray(checked_mel(mel)[None]), exists, first_frame)
        )[0]

    def stream(
        self,
        mels: Iterable[np.ndarray],
        notes: Sequence[Note] | None = None,
        *,
        stretch: int = STRETCH,
        early: bool = True,
    ) -> Iterator[np.ndarray]:
        """Pieces of a mel as they come, [t, 128] of any lengths, to audio float32 [320 * stretch] as it can be made.

        Audio is `generator.reach` frames behind the mel; the rest comes when `mels` ends. With `early` the first
        stretch is shorter by as much, so that there is audio as soon as there are `stretch` frames of mel.
        """
        generator = self.generator.as_played()
        (behind, ahead), lead = generator.reach, generator.lead
        state = generator.no_state(1)
        excitation = Excitation(notes or ()) if generator.takes_notes else None
        done, total = -lead - (min(ahead, stretch - 1) if early else 0), 0  # frames made, frames that came
        stretch += lead
        waiting = np.full((behind - done, NUM_MELS), MIN_LOG_MEL, np.float32)  # frames from `done` - behind on
        for mel, ended in _and_the_end(mels):
            waiting = np.concatenate([waiting, checked_mel(mel)])
            if excitation is not None:
                excitation.hear(waiting[len(waiting) - len(mel) :])
            total += len(mel)
            while total - done >= stretch + ahead or (ended and max(done, 0) < total):
                window = np.full((behind + stretch + ahead, NUM_MELS), MIN_LOG_MEL, np.float32)
                window[: len(waiting)] = waiting[: len(window)]
                first = done - behind
                number = first + np.arange(len(window))
                exists = (number >= 0) & (number < total)
                source = None if excitation is None else excitation.of_frames(first, len(window))[None]
                numbers = np.array([first], np.int32)
                audio, state = play_stretch(generator, self.params, window[None], exists[None], numbers, source, state)
                length = min(stretch, total - done)
                yield np.asarray(audio)[0, max(-done, 0) * HOP_LENGTH : length * HOP_LENGTH]
                waiting, done = waiting[stretch:], done + stretch


@functools.partial(jax.jit, static_argnums=0)
def play_stretch(generator: Any, params: Any, *given: Any):
    """As `generator.play`, compiled."""
    return generator.play(params, *given)


def play_whole(
    generator: Any, params: Any, mel: Array, exists: Array, first_frame: Array, source: Array | None = None
) -> Array:
    """Audio [B, 320 T] of whole pieces side by side, or excerpts: see `generator.play`.

    Args:
      mel: [B, T, M].
      source: [B, 320 (T + 3)].
    """
    (behind, ahead), lead = generator.reach, generator.lead
    around = (behind + lead, ahead)
    mel, exists = jnp.pad(mel, ((0, 0), around, (0, 0))), jnp.pad(exists, ((0, 0), around))
    if source is not None:
        source = jnp.pad(source, ((0, 0), (around[0] * HOP_LENGTH, ahead * HOP_LENGTH)))
    state = generator.no_state(len(mel))
    return generator.play(params, mel, exists, first_frame - around[0], source, state)[0][:, lead * HOP_LENGTH :]


def _and_the_end(items: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    for item in items:
        yield item, False
    yield np.zeros((0, NUM_MELS), np.float32), True


# --- the file ----------------------------------------------------------------------------------------------------


def save_inverter(path: str | Path, generator: Any, params: Any, about: str = "") -> None:
    """Writes a generator as safetensors: parameters in float16, and its sizes in the header.

    about: one line for people: data, steps, machine, date.
    """
    from safetensors.numpy import save_file

    config = json.dumps({"generator": type(generator).__name__, **dataclasses.asdict(generator)})
    flat = {key: np.ascontiguousarray(leaf, np.float16) for key, leaf in flatten_dict(params, sep="/").items()}
    save_file(flat, str(path), metadata={"format": FORMAT, "config": config, "about": about})


def load_weights(path: str | Path) -> NeuralInverter:
    """An inverter from a file of `save_inverter`.

    Raises:
      UserError: no such file, a damaged one, one of another kind, or tensors that do not fit its sizes.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(
            f"no inverter {str(path)!r}: give shipped, mel_only, griffin_lim, a .safetensors or .onnx "
            "file, or the folder of a run of istft.gin, informed.gin or melgan.gin, or of a SavedModel"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): get it again") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} is no inverter of music_synth: its header says format {meta.get('format')!r}")
    try:
        config = json.loads(meta["config"])
        kind: Any = GENERATORS[config.pop("generator")]
        generator = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in config.items()})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} has a header that does not parse ({type(error).__name__}: {error})") from error
    if path != SHIPPED:  # whose shapes a test checks: it takes half a second
        _check_shapes(path, tensors, flatten_dict(jax.eval_shape(generator.init, jax.random.key(0)), sep="/"))
    for key, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: tensor {key} is not finite")
    return NeuralInverter(generator, jax.device_put(unflatten_dict(tensors, sep="/")))


def _check_shapes(path: str | Path, tensors: dict[str, np.ndarray], wanted: dict[str, Any]) -> None:
    for key in sorted(wanted.keys() | tensors.keys()):
        shapes = [tuple(found[key].shape) if key in found else None for found in (tensors, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: tensor {key} has shape {shapes[0]}, its config needs {shapes[1]}")
