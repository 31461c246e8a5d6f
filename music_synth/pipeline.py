"""The interface of the diffusers port of the published models, over any decoder that music_synth reads:

    from music_synth import MidiProcessor, SpectrogramDiffusionPipeline

    pipe = SpectrogramDiffusionPipeline.from_pretrained("google/music-spectrogram-diffusion")
    output = pipe(MidiProcessor()("in.mid"))
    audio = output.audios[0]  # [1, samples] at 16 kHz

Arguments mean what they mean there. What is not there are keyword arguments, whose defaults leave everything as it is.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from music_synth import runs
from music_synth.compilation import keep_compiled
from music_synth.diffusion.sampler import Sampler
from music_synth.errors import UserError, needing
from music_synth.interop import diffusers
from music_synth.interop.runtimes import reason
from music_synth.midi.notes import Note, check_notes, from_pretty_midi, read_midi
from music_synth.midi.segments import OverlongSegmentWarning
from music_synth.midi.tokenizer import Tokenizer
from music_synth.midi.vocabulary import EOS_ID, PAD_ID
from music_synth.models.base import Params, SpectrogramModel
from music_synth.playing import Decoder
from music_synth.vocoder.inverter import Inverter, stream_audio

PLATFORMS = ("cpu", "cuda", "gpu", "tpu")  # of JAX; gpu: whichever kind there is
OUTPUT_TYPES = ("np", "numpy", "mel")  # "numpy": as older versions of the port called "np"
HUB_FILES = ("*.json", "*.onnx", "*.gin", "*.md")  # and weights: safetensors, or else torch's own files

Source = str | os.PathLike | bytes | Sequence[Note]  # of notes; or an object of pretty_midi


class AudioPipelineOutput(NamedTuple):
    """`audios`: for "np" a list with one array float32 [1, samples], for "mel" an array float32 [1, frames, 128]."""

    audios: Any


class MidiProcessor:
    """MIDI to the tokens that a pipeline takes: a list a segment of 5.12 s, filled up with zeros to `max_tokens`.

    As in the port a segment with too many notes gives a longer list; a pipeline cuts it, with a warning.

    tokenizer: of the published models, if it is not given; `pipe.tokenizer` is that of a pipeline.
    timbre: what to sound like, of `tokenizer.timbres`. UserError: it is not among them.
    """

    def __init__(self, tokenizer: Tokenizer = diffusers.TOKENIZER, timbre: str = ""):
        tokenizer.check_timbre(timbre)
        self.tokenizer, self.timbre = tokenizer, timbre

    def __call__(self, midi: Source) -> list[list[int]]:
        """midi: a path, the bytes of a file, an object of pretty_midi, or notes (`midi.notes.Note`)."""
        tokens = self.tokenizer.encode(to_notes(midi), on_overflow="keep", timbre=self.timbre)
        rows = [row.tolist() for row in tokens]
        return [row + [PAD_ID] * (self.tokenizer.max_tokens - len(row)) for row in rows]


class SpectrogramDiffusionPipeline:
    """MIDI to music by a decoder and an inverter, on one device."""

    def __init__(
        self,
        model: SpectrogramModel,
        params: Params,
        tokenizer: Tokenizer,
        inverter: Inverter,
        melgan: Path | None = None,
    ):
        """melgan: the ONNX file that `inverter` is, for `save_pretrained`."""
        self.model, self.tokenizer, self.inverter, self.melgan = model, tokenizer, inverter, melgan
        self._params = params
        self._device: jax.Device | None = None
        self._progress_bar_config: dict[str, Any] = {}

    # --- where it comes from and goes to -------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        inverter: str | os.PathLike | Inverter | None = None,
        cache_dir: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        trust: bool = False,
    ) -> SpectrogramDiffusionPipeline:
        """A pipeline from a folder, or from the Hugging Face hub (`pip install 'music_synth[hub]'`).

        What JAX compiles is kept on disk from then on, unless its settings say otherwise (`keep_compiled`).

        Args:
          pretrained_model_name_or_path: a pipeline folder of the port, a run or an exported model of music_synth, a
            T5X checkpoint; "shipped" or "autoregressive", which come with music_synth; or the name of a repository on
            the hub, "owner/name".
          inverter: mel to audio, as `runs.load_inverter` takes it; None: the one in the folder, or else the
            one that ships with music_synth.
          cache_dir, revision, token, local_files_only: of the hub, as there.
          trust: whether an `inverter` that is a SavedModel, which is a program, may run.

        Raises:
          UserError: there is no such folder or repository, the network is down, or what is there cannot be played.
        """
        keep_compiled()
        folder = runs.find(pretrained_model_name_or_path)
        if not folder.exists():
            name = str(pretrained_model_name_or_path)
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                raise UserError(f"no folder {name}, and no name of a repository on the hub, which is owner/name")
            folder = download(name, cache_dir, revision, token, local_files_only)
        decoder = runs.load_trained(folder)
        if inverter is None and decoder.kind == "diffusers" and decoder.inverter is None:
            ours = "the inverter that ships with music_synth makes the audio"
            warnings.warn(f"no {folder / diffusers.INVERTER}: {ours}", stacklevel=2)
        melgan = None
        if inverter is None or isinstance(inverter, (str, os.PathLike)):
            source = decoder.inverter if inverter is None else Path(inverter)
            melgan = source if source is not None and source.suffix == ".onnx" else None
            inverter = runs.load_inverter(source, trust)
        return cls(decoder.model, decoder.params, decoder.tokenizer, inverter, melgan)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes a folder that the port loads, with the inverter as ONNX (Griffin-Lim cannot be: then without).

        Raises:
          UserError: the port has no such model (`interop.diffusers.write`), onnx is not installed, or the folder cannot
            be written.
        """
        from music_synth.interop.onnx import export_onnx
        from music_synth.vocoder.neural import NeuralInverter

        with tempfile.TemporaryDirectory() as folder:
            melgan = self.melgan
            if melgan is None and isinstance(self.inverter, NeuralInverter):
                melgan = Path(folder) / "model.onnx"
                export_onnx(self.inverter.generator, self.inverter.params, melgan)
            diffusers.write(Path(save_directory), self.model, self._params, melgan)

    def to(self, device: str | jax.Device) -> SpectrogramDiffusionPipeline:
        """Moves the decoder to a device: "cpu", "cuda", "gpu" or "tpu", with ":N" for the N-th of its kind.

        Until then it is where JAX finds it best: on an accelerator, if there is one. Inverters stay where they are.

        Raises:
          UserError: there is no such device.
        """
        self._device = device if isinstance(device, jax.Device) else find_device(str(device))
        self._params = jax.device_put(self._params, self._device)
        return self

    @property
    def device(self) -> jax.Device:
        return self._device or jax.devices()[0]

    @property
    def params(self) -> Params:
        """The decoder's parameters, on the device."""
        if self._device is None:  # they are of NumPy, and would travel at every call
            self.to(self.device)
        return self._params

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """What to give to tqdm: disable=True for no bar, leave=False, ..."""
        self._progress_bar_config = kwargs

    # --- playing -------------------------------------------------------------------------------------------------

    def __call__(
        self,
        input_tokens: Sequence[Sequence[int]] | Source,
        generator: Any = None,
        num_inference_steps: int | None = None,
        return_dict: bool = True,
        output_type: str = "np",
        callback: Callable[[int, np.ndarray], None] | None = None,
        callback_steps: int = 1,
        *,
        sampler: str | Sampler | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        texture: float | None = None,
        streaming: bool = False,
        timbre: str = "",
    ) -> AudioPipelineOutput | tuple | Iterator[np.ndarray]:
        """Plays tokens, a MIDI file or notes: 5.12 s a segment, each with the one before it as its context.

        Args:
          input_tokens: what a `MidiProcessor` gives, or whatever that takes: a path, bytes, a pretty_midi, notes.
          generator: what decides the noise: a seed, a NumPy generator, a key of JAX, a generator of torch (of which
            only the seed counts); None: other noise every time.
          num_inference_steps: of the sampler; None: the pipeline's, 100 for the port's folders.
          return_dict: False: a tuple instead of an `AudioPipelineOutput`.
          output_type: "np": audio; "mel": natural-log mel.
          callback: called with the number of a segment and the mel so far [1, frames, 128], after every
            `callback_steps`-th segment, from the first on.
          sampler: "ddim", "dpmpp_2m", ... or a `Sampler`; None: the pipeline's, DDPM for the port's folders.
          guidance_scale: of classifier-free guidance; None: the pipeline's, 1 (none) for the port's folders.
            A checkpoint of T5X plays as its gin file says, and without one as published: DDPM, 1,000 steps, guidance 2.
          temperature: how far samples differ, of decoders that have it: 0 is the mean, 1 as trained; None: the
            pipeline's.
          texture: of a diffusion decoder, how much they differ besides in how their notes came out; None: likewise.
          streaming: return at once, an iterator of parts [1, samples] of the audio (or of the mel, a segment each) as
            they are done. An ONNX inverter sees the whole mel first and gives one part at the end; ours streams
            (`from_pretrained(..., inverter=load_inverter())`).
          timbre: what to sound like, of `tokenizer.timbres`; "": what the model makes of all of them. Tokens say it
            themselves (`MidiProcessor(pipe.tokenizer, timbre)`).

        Raises:
          UserError: a wrong argument, tokens the network does not know, a MIDI file that cannot be read.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type = {output_type!r}: choose from {', '.join(OUTPUT_TYPES)}")
        if not isinstance(callback_steps, int) or callback_steps < 1:
            raise UserError(f"callback_steps = {callback_steps!r}: must be a whole number, 1 or more")
        model = self._with_sampling(num_inference_steps, sampler, guidance_scale, temperature, texture)
        notes = to_notes(input_tokens) if is_midi(input_tokens) else None
        if notes is None and timbre:
            raise UserError(f"timbre = {timbre!r}: the tokens say it; give it to the MidiProcessor that makes them")
        self.tokenizer.check_timbre(timbre)
        rows = self._tokens(input_tokens) if notes is None else self.tokenizer.encode(notes, timbre=timbre)
        mels = self._sample(model, rows, seed_of(generator), callback, callback_steps)
        if streaming:
            parts = mels if output_type == "mel" else stream_audio(self.inverter, mels, notes)
            return (part[None] for part in parts)
        mel = np.concatenate(list(mels))
        audios = mel[None] if output_type == "mel" else [self.inverter(mel, notes)[None]]
        return AudioPipelineOutput(audios) if return_dict else (audios,)

    def _sample(
        self, model: SpectrogramModel, rows: list[np.ndarray], seed: int, callback: Callable | None, callback_steps: int
    ) -> Iterator[np.ndarray]:
        """Samples the log-mel of each segment, float32 [256, 128]."""
        so_far = np.zeros((1, 0, model.network.num_mels), np.float32)
        segments = Decoder(model, self.params, self.tokenizer).sample_pieces([rows], [seed])
        bar = tqdm(segments, **{"total": len(rows), "unit": "segment", **self._progress_bar_config})
        for i, ((_, _, mel),) in enumerate(bar):
            if callback is not None:
                so_far = np.concatenate([so_far, mel[None]], axis=1)
                if i % callback_steps == 0:
                    callback(i, so_far)
            yield mel

    def _with_sampling(
        self,
        num_inference_steps: int | None,
        sampler: str | Sampler | None,
        guidance_scale: float | None,
        temperature: float | None = None,
        texture: float | None = None,
    ) -> SpectrogramModel:
        if not isinstance(sampler, str | Sampler | None):
            raise UserError(f"sampler = {sampler!r}: give a name or a Sampler")
        settings = {"name": sampler} if isinstance(sampler, str) else dataclasses.asdict(sampler) if sampler else {}
        asked = {"num_steps": num_inference_steps, "guidance_scale": guidance_scale}
        asked |= {"temperature": temperature, "texture": texture}
        model = self.model.with_sampling(**(settings | {k: v for k, v in asked.items() if v is not None}))
        if self.device.platform == "cpu" and jax.default_backend() != "cpu":  # "auto" goes by the default device
            model = dataclasses.replace(model, network=dataclasses.replace(model.network, attention="einsum"))
        return model

    def _tokens(self, source: Any) -> list[np.ndarray]:
        """Checks what is to be the tokens of segments: int32 [n] each with EOS, without padding."""
        vocab_size, rows = self.model.network.vocab_size, []
        if not isinstance(source, Iterable):
            raise UserError(f"{str(source)[:50]!r} is no list of the tokens of segments, and nothing else that plays")
        for i, given in enumerate(source):
            try:
                row = np.asarray(given)
            except ValueError:  # of lists in lists that are not equally long
                row = np.zeros(())
            if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
                raise UserError(
                    f"segment {i} of the tokens is no list of whole numbers: give what a MidiProcessor gives"
                )
            unknown = row[(row < 0) | (row >= vocab_size)]
            if len(unknown):
                raise UserError(f"segment {i} has the token {unknown[0]}; the network knows 0 .. {vocab_size - 1}")
            end = np.flatnonzero((row == EOS_ID) | (row == PAD_ID))
            row = self._fitting(row[: end[0]] if len(end) else row, i)
            rows.append(np.append(row, EOS_ID).astype(np.int32))
        if not rows:
            raise UserError("no segments to play: the list of tokens is empty")
        return rows

    def _fitting(self, row: np.ndarray, segment: int) -> np.ndarray:
        """As many whole events from the start of `row` [n] as leave room for EOS, with a warning if not all."""
        room, vocabulary = self.model.network.max_tokens - 1, self.tokenizer.vocabulary
        if len(row) <= room:
            return row
        num_tokens, row = len(row) + 1, row[:room]
        ends = (row >= vocabulary.pitch_id) & (row < vocabulary.velocity_id)
        ends |= (row == vocabulary.tie_id) | (row >= vocabulary.drum_id)  # an event ends with its pitch or drum
        warnings.warn(
            f"segment {segment} has {num_tokens} tokens, at most {room + 1} fit: the rest is left out",
            OverlongSegmentWarning,
            stacklevel=5,
        )
        return row[: np.flatnonzero(ends)[-1] + 1 if ends.any() else 0]


def is_midi(source: Any) -> bool:
    """Whether this is what `to_notes` takes, and not tokens."""
    return (
        isinstance(source, (str, os.PathLike, bytes))
        or hasattr(source, "instruments")
        or (isinstance(source, Sequence) and len(source) > 0 and isinstance(source[0], Note))
    )


def to_notes(source: Any) -> list[Note]:
    """Takes notes from a path, the bytes of a MIDI file, an object of pretty_midi, or notes.

    Raises:
      UserError: it is none of these, cannot be read, has no notes, or one that no MIDI file can hold.
    """
    if hasattr(source, "instruments"):
        return from_pretty_midi(source)
    if isinstance(source, (str, os.PathLike, bytes)):
        return read_midi(source if isinstance(source, bytes) else Path(source), as_published=True)
    if isinstance(source, Sequence) and len(source) and all(isinstance(note, Note) for note in source):
        return check_notes(source)
    raise UserError(f"{str(source)[:50]!r} is no path, no bytes, no pretty_midi and no notes")


def seed_of(generator: Any) -> int:
    """A seed, 0 .. 2^32 - 1, from what is called a generator: see `SpectrogramDiffusionPipeline.__call__`."""
    if generator is None:
        generator = np.random.default_rng()
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**32))
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        if not 0 <= generator < 2**32:
            raise UserError(f"generator = {generator}: as a seed it must be in 0 .. 2^32 - 1")
        return int(generator)
    if isinstance(generator, jax.Array):
        return int(jax.random.bits(generator))
    if hasattr(generator, "initial_seed"):  # of torch
        return generator.initial_seed() % 2**32
    raise UserError(f"generator = {generator!r}: give a seed, a generator of NumPy or torch, or a key of JAX")


def find_device(name: str) -> jax.Device:
    """A device of JAX by a name such as "cuda" or "gpu:1"; UserError where there is none."""
    platform, _, number = name.partition(":")
    if platform not in PLATFORMS or not (number.isdecimal() or not number):
        raise UserError(f"device {name!r}: choose from {', '.join(PLATFORMS)}, with :1 for the second of its kind")
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise UserError(
            f"JAX finds no {platform} here, only {jax.default_backend()}: install its support, as jax[cuda12], or use"
            f" .to({jax.default_backend()!r})"
        ) from error
    if int(number or 0) >= len(devices):
        raise UserError(f"device {name!r}: there is {platform}:0 to {platform}:{len(devices) - 1}")
    return devices[int(number or 0)]


def download(name: str, cache_dir: Any, revision: str | None, token: Any, local_files_only: bool) -> Path:
    """The folder in the hub's cache into which the files of a repository have been fetched, where they were not there.

    Raises:
      UserError: huggingface_hub is not installed; no network and nothing in the cache; no such repository or revision.
    """
    with needing(f"no folder {name}; to get it from the hub", "hub"):
        from huggingface_hub import snapshot_download
    settings = {"cache_dir": cache_dir, "revision": revision, "token": token, "local_files_only": local_files_only}
    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, weights], **settings))
            if any(folder.rglob(weights)):
                break
        return folder
    except Exception as error:  # of httpx, of the hub, of the file system
        raise UserError(
            f"no folder {name}, and the hub does not give it ({type(error).__name__}: {reason(error)}); check the name"
            " and the network, or download it elsewhere and give its folder"
        ) from error
