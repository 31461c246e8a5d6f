"""Writes a trained inverter as an ONNX file, which onnxruntime plays without Python or JAX.

The file takes and gives what the published SoundStream inverter does (`interop.inverters`): `input_features`, log-mel
float32 [1, T, 128] of any T, and `audio`, float32 [1, 320 T]. A file that takes the notes has a second input,
`source`, float32 [1, 320 (T + 3)], the signal that `vocoder.excitation` makes of them and the mel; zeros: none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from music_synth.audio.mel import (
    FFT_SIZE,
    FRAME_LENGTH,
    HOP_LENGTH,
    MAX_LOG_MEL,
    MAX_MEL,
    MIN_LOG_MEL,
    MIN_MEL,
    NUM_MELS,
    hann_window,
    mel_matrix,
)
from music_synth.errors import UserError
from music_synth.interop.inverters import SOURCE
from music_synth.interop.onnx_graph import (
    Graph,
    Transform,
    dense,
    depthwise_conv,
    frames_of,
    gelu,
    layer_norm,
    overlap_add,
)
from music_synth.interop.onnx_pull import part, pre_echo_limits, pull_to_mel, without_pre_echo
from music_synth.vocoder.convnext import seen_taps
from music_synth.vocoder.istft import (
    FINE_RANGE,
    MAX_LOG_MAGNITUDE,
    MAX_OFFSET,
    NUM_BINS,
    SOURCE_SHARE,
    TURN,
    WINDOW,
    ISTFTGenerator,
    interpolation,
    noise_table,
    trusted_bins,
)
from music_synth.vocoder.melgan import MelGANGenerator, normalized
from music_synth.vocoder.source import SOURCE_FLOOR
from music_synth.vocoder.stft import spread_matrix

INPUT, OUTPUT = "input_features", "audio"


def export_onnx(generator: MelGANGenerator | ISTFTGenerator, params: Mapping, path: Path, notes: bool = False) -> None:
    """Writes an ONNX file that does what the generator does with these parameters.

    Args:
        notes: as it plays where the notes are known; a generator that learned to read them has no other way.

    Raises:
        UserError: it cannot be told the notes.
    """
    graph, inputs = Graph(), {INPUT: [1, "frames", NUM_MELS]}
    if isinstance(generator, ISTFTGenerator):
        notes = notes or generator.source
        istft(graph, generator.as_played() if notes else generator, params, INPUT, notes)
    elif notes:
        raise UserError(f"a {type(generator).__name__} takes no notes: leave out --notes")
    else:
        melgan(graph, generator, params, INPUT)
    if notes:
        inputs[SOURCE] = [1, "source samples"]
    doc = "Natural-log mel magnitude [1, frames, 128], 50 frames a second, to audio at 16 kHz, [1, 320 frames]."
    graph.save(path, inputs, {OUTPUT: [1, "samples"]}, doc)


def scaled(graph: Graph, mel: str, clip: bool = True) -> str:
    """As `audio.mel.scale_mel`."""
    slope = 2 / (MAX_LOG_MEL - MIN_LOG_MEL)
    x = graph.add("Mul", graph.add("Sub", mel, np.float32(MIN_LOG_MEL)), np.float32(slope))
    x = graph.add("Sub", x, np.float32(1))
    return graph.add("Clip", x, np.float32(-1), np.float32(1)) if clip else x


def melgan(graph: Graph, generator: MelGANGenerator, params: Mapping, mel: str) -> str:
    """As `MelGANNetwork`, for one piece that exists from end to end. Sequences are [1, D, T] in here."""

    def conv(name: str, x: str, dilation: int = 1) -> str:
        kernel = normalized(params[name]["kernel"], params[name]["scale"])  # [taps, C, D]
        pads = [dilation * (len(kernel) // 2)] * 2
        bias = params[name]["bias"]
        return graph.add("Conv", x, kernel.transpose(2, 1, 0), bias, dilations=[dilation], pads=pads)

    def upsample(name: str, x: str, factor: int) -> str:
        kernel = normalized(params[name]["kernel"], params[name]["scale"])  # [1, C, 2 factor D]
        kernel = kernel.reshape(kernel.shape[1], 2 * factor, -1).transpose(0, 2, 1)  # [C, D, 2 factor]
        pads = [factor // 2, factor - factor // 2]
        return graph.add("ConvTranspose", x, kernel, params[name]["bias"], strides=[factor], pads=pads)

    def leaky(x: str) -> str:
        return graph.add("LeakyRelu", x, alpha=0.2)

    x = conv("first", graph.add("Transpose", scaled(graph, mel), perm=[0, 2, 1]))
    for i, factor in enumerate(generator.strides):
        x = upsample(f"upsample_{i}", leaky(x), factor)
        for j, dilation in enumerate(generator.dilations):
            y = conv(f"residual_{i}_{j}_a", leaky(x), dilation)
            y = conv(f"residual_{i}_{j}_b", leaky(y))
            x = graph.add("Add", conv(f"shortcut_{i}_{j}", x), y)
    x = graph.add("Tanh", conv("last", leaky(x)))
    return graph.add("Reshape", x, np.array([1, -1]), name=OUTPUT)


def istft(graph: Graph, generator: ISTFTGenerator, params: Mapping, mel: str, notes: bool) -> str:
    """As `ISTFTGenerator.play`, for one piece that exists from end to end, from frame 0 on.

    The accelerated steps magnify rounding. Measured with the shipped inverter, written without the notes (16 and 32
    steps), on 8 s of each of four test pieces, against JAX: largest difference over the peak, and root mean square
    below that of the audio:

        ONNX without the steps                         4e-6 to 8e-5    -113 to -97 dB
        ONNX                                           5e-4 to 2e-2     -75 to -50 dB
        JAX with the last bit of the mel changed       2e-4 to 8e-3     -85 to -57 dB

    The mel of the audio is as near to what was asked for as JAX's, to 1e-5. On one core it plays at 8 to 14 times real
    time, JAX at 32 to 40, as the transforms are matrix products here. Memory grows by about 40 kB a frame; the size of
    the file, whatever the steps, is in docs/checkpoints.md.
    """
    log_magnitude, direction = spectra(graph, generator, params, mel)
    held = None
    if notes and not generator.source:
        log_magnitude, direction, held = informed(graph, log_magnitude, direction, mel)
    size, wanted = graph.add("Exp", log_magnitude), graph.add("Exp", mel)
    audio = steps(graph, generator, direction, graph.add("Unsqueeze", size, np.array([2])), wanted, held)
    return graph.add("Reshape", audio, np.array([1, -1]), name=OUTPUT)


def spectra(graph: Graph, generator: ISTFTGenerator, params: Mapping, mel: str) -> tuple[str, str]:
    """As `ISTFTNetwork`: log-magnitude [1, T, F] and direction [1, T, 2, F], real and imaginary parts."""
    seen = scaled(graph, mel)
    if generator.source:
        excited, source_spectrum = excitation(graph)
        seen = graph.add("Concat", seen, scaled(graph, excited, clip=False), axis=2)
    ahead, (first, *others) = generator.frames_ahead, generator.layers_ahead
    kernel = np.reshape(params["embed"]["kernel"], (generator.width, -1, generator.dim))
    kernel = np.asarray(seen_taps(kernel, ahead, first)).transpose(2, 1, 0)
    x = graph.add("Transpose", seen, perm=[0, 2, 1])
    x = graph.add("Conv", x, kernel, params["embed"]["bias"], pads=[generator.width - 1 - ahead, first])
    x = layer_norm(graph, graph.add("Transpose", x, perm=[0, 2, 1]), params["norm"])
    for i, sees in enumerate(others):
        block = params[f"layers_{i}"]
        y = layer_norm(graph, depthwise_conv(graph, x, block["conv"], ahead, sees), block["norm"])
        y = dense(graph, gelu(graph, dense(graph, y, block["wi"])), block["wo"])
        x = graph.add("Add", x, graph.add("Mul", y, block["scale"]))
    x = layer_norm(graph, x, params["final_norm"])

    def head(name: str) -> str:
        y = dense(graph, x, params[name])  # [1, T, F], or [1, T, M] where the generator has a number a mel filter
        is_band = np.shape(params[name]["bias"]) == (NUM_MELS,)
        return graph.add("MatMul", y, interpolation().T) if is_band else y

    log_magnitude = graph.add("Add", head("magnitude"), graph.add("MatMul", mel, interpolation().T))
    offset = graph.add("Mul", graph.add("Tanh", head("frequency")), np.float32(MAX_OFFSET))
    frequency = graph.add("Add", np.arange(NUM_BINS, dtype=np.float32), offset)
    angle = graph.add("Mul", frequency, np.float32(TURN))
    keep = graph.add("Sigmoid", head("keep"))
    if generator.source:
        flat_spectrum = flat(graph, source_spectrum)
        real_part, imaginary_part = graph.add("Split", flat_spectrum, axis=2, num_outputs=2, outputs=2)
        size = flat(graph, magnitude(graph, source_spectrum, 1e-6))
        floored = graph.add("Add", size, np.float32(SOURCE_FLOOR))
        fine = graph.add("Sub", graph.add("Log", floored), graph.add("MatMul", excited, interpolation().T))
        fine = graph.add("Clip", fine, np.float32(FINE_RANGE[0]), np.float32(FINE_RANGE[1]))
        log_magnitude = graph.add("Add", log_magnitude, graph.add("Mul", graph.add("Sigmoid", head("fine")), fine))
        trust = graph.add("Div", graph.add("Sigmoid", head("trust")), floored)
        doubt = graph.add("Sub", np.float32(1), graph.add("Mul", trust, size))
        keep = graph.add("Mul", keep, doubt)
        known = {"real": graph.add("Mul", real_part, trust), "imaginary": graph.add("Mul", imaginary_part, trust)}
    renew = graph.add("Sub", np.float32(1), keep)
    loudness = graph.add("Softplus", head("noise"))

    count = graph.add("Squeeze", graph.add("Shape", mel, start=1, end=2))
    number = graph.add("Mod", graph.add("Range", np.int64(0), count, np.int64(1)), np.int64(len(noise_table())))

    def fresh(name: str, noise: np.ndarray) -> str:
        noise = graph.add("Mul", graph.add("Gather", noise, number), loudness)
        own = head(name)
        if generator.source:
            own = graph.add("Add", graph.add("Mul", own, doubt), known[name])
        return graph.add("Mul", graph.add("Add", own, noise), renew)

    factor = [graph.add("Mul", graph.add(part, angle), keep) for part in ("Cos", "Sin")]
    addend = [fresh("real", noise_table().real), fresh("imaginary", noise_table().imag)]
    zero = graph.constant(np.zeros((1, NUM_BINS), np.float32))
    phasor = graph.scan(next_phasor, [zero, zero], [*factor, *addend])
    phasor = graph.add("Concat", *(graph.add("Unsqueeze", part, np.array([2])) for part in phasor), axis=2)
    return (
        graph.add("Min", log_magnitude, np.float32(MAX_LOG_MAGNITUDE)),
        graph.add("Div", phasor, magnitude(graph, phasor, 1e-6)),
    )


def informed(graph: Graph, log_magnitude: str, direction: str, mel: str) -> tuple[str, str, str]:
    """As `istft.informed`: log-magnitude [1, T, F], direction [1, T, 2, F], how far it is held [1, T, 1, F]."""
    excited, spectrum = excitation(graph)
    size = flat(graph, magnitude(graph, spectrum, 1e-6))
    shaped = graph.add("MatMul", graph.add("Sub", mel, excited), interpolation().T)
    shaped = graph.add("Add", shaped, graph.add("Log", graph.add("Add", size, np.float32(1e-4))))
    above = graph.add("Sub", shaped, log_magnitude)
    trust = graph.add("Sigmoid", graph.add("Add", graph.add("Mul", above, np.float32(2)), np.float32(4)))
    trust = graph.add("Mul", trust, trusted_bins())
    change = graph.add("Mul", graph.add("Clip", above, *map(np.float32, FINE_RANGE)), np.float32(SOURCE_SHARE))
    log_magnitude = graph.add("Add", log_magnitude, graph.add("Mul", change, trust))

    held = graph.add("Unsqueeze", trust, np.array([2]))
    other = graph.add("Div", spectrum, graph.add("Unsqueeze", size, np.array([2])))
    return log_magnitude, between(graph, direction, other, held), held


def between(graph: Graph, direction: str, other: str, share: str) -> str:
    """As `istft.between`: [1, T, 2, F], share [1, T, 1, F]."""
    own = graph.add("Mul", direction, graph.add("Sub", np.float32(1), share))
    mixed = graph.add("Add", own, graph.add("Mul", other, share))
    return graph.add("Div", mixed, magnitude(graph, mixed, 1e-6))


def excitation(graph: Graph) -> tuple[str, str]:
    """What `ISTFTNetwork` sees of the source: log-mel [1, T, M] with its floor, and spectra [1, T, 2, F]."""
    frames = frames_of(graph, SOURCE, FRAME_LENGTH, HOP_LENGTH)  # one before the first, and one after the last
    frames = part(graph, frames, 1, -1)
    spectrum = pairs(graph, Transform(graph, hann_window(), FFT_SIZE).spectra(graph, frames))
    mel = graph.add("MatMul", flat(graph, magnitude(graph, spectrum, 0.0)), mel_matrix())
    mel = graph.add("Clip", mel, np.float32(MIN_MEL), np.float32(MAX_MEL))
    excited = graph.add("Log", graph.add("Add", mel, np.float32(SOURCE_FLOOR)))
    wide = Transform(graph, hann_window(WINDOW), WINDOW)
    return excited, pairs(graph, wide.spectra(graph, frames_of(graph, SOURCE, WINDOW, HOP_LENGTH)))


def next_phasor(graph: Graph, *values: str) -> list[str]:
    """As `one` of `istft.recurrent_phasor`: factor times z plus addend, each a real and an imaginary part."""
    z_real, z_imag, real, imag, add_real, add_imag = values

    def times(a, b):
        return graph.add("Mul", a, b)

    return [
        graph.add("Add", graph.add("Sub", times(real, z_real), times(imag, z_imag)), add_real),
        graph.add("Add", graph.add("Add", times(real, z_imag), times(imag, z_real)), add_imag),
    ]


def steps(graph: Graph, generator: ISTFTGenerator, direction: str, size: str, wanted: str, held: str | None) -> str:
    """As `ISTFTGenerator._audio`: direction [1, T, 2, F], size and held [1, T, 1, F], wanted [1, T, 128] to [1, 320 T].

    Whatever does not change from step to step is made once, out here.
    """
    window = hann_window()
    wide, narrow = Transform(graph, hann_window(WINDOW), WINDOW), Transform(graph, window, FFT_SIZE)
    to_mel, spread = graph.constant(mel_matrix()), graph.constant(spread_matrix().T)
    lengths = graph.add("Concat", graph.add("Shape", wanted, end=2), np.array([1]), axis=0)  # 1, T, 1
    weight = graph.add("Expand", np.square(window)[None, None], lengths)
    weight = graph.add("Max", overlap_add(graph, weight, FRAME_LENGTH, HOP_LENGTH), np.float32(0.5))

    def inverse(graph: Graph, spectrum: str) -> str:
        frames = wide.frames(graph, flat(graph, spectrum))
        audio = part(graph, overlap_add(graph, frames, WINDOW, HOP_LENGTH), HOP_LENGTH, -2 * HOP_LENGTH)
        return graph.add("Mul", audio, np.float32(1 / 1.5))  # the sum of the squares of four Hann windows

    def towards_magnitudes(graph: Graph, audio: str) -> str:
        padded = graph.add("Pad", audio, np.array([0, HOP_LENGTH, 0, 2 * HOP_LENGTH]))
        spectrum = pairs(graph, wide.spectra(graph, frames_of(graph, padded, WINDOW, HOP_LENGTH)))
        present = magnitude(graph, spectrum, 1e-9)
        if held is None:
            return inverse(graph, graph.add("Mul", spectrum, graph.add("Div", size, present)))
        own = graph.add("Div", spectrum, present)
        return inverse(graph, graph.add("Mul", between(graph, own, direction, held), size))

    def project_frames(graph: Graph, frames: str, wanted: str) -> str:
        """As `stft.project_frames`: [1, n, 640] towards mel magnitudes [1, n, 128]."""
        spectrum = pairs(graph, narrow.spectra(graph, frames))
        present = graph.add("MatMul", magnitude(graph, spectrum, 1e-7), to_mel)  # [1, n, 1, 128]
        present = graph.add("Max", flat(graph, present), np.float32(1e-6))
        ratio = graph.add("Clip", graph.add("Div", wanted, present), np.float32(0), np.float32(10))
        gain = graph.add("Unsqueeze", graph.add("MatMul", ratio, spread), np.array([2]))
        return narrow.frames(graph, flat(graph, graph.add("Mul", spectrum, gain)))

    def project_to_mel(graph: Graph, audio: str) -> str:
        padded = graph.add("Pad", audio, np.array([0, 0, 0, HOP_LENGTH]))
        frames = frames_of(graph, padded, FRAME_LENGTH, HOP_LENGTH)
        total = overlap_add(graph, project_frames(graph, frames, wanted), FRAME_LENGTH, HOP_LENGTH)
        audio = part(graph, graph.add("Div", total, weight), 0, -HOP_LENGTH)
        return graph.add("Reshape", without_pre_echo(graph, audio, limits), np.array([1, -1]))

    limits = pre_echo_limits(graph, wanted)
    audio = inverse(graph, graph.add("Mul", direction, size))
    audio = iterate(graph, towards_magnitudes, audio, generator.num_consistency_steps, generator.consistency_momentum)
    audio = iterate(graph, project_to_mel, audio, generator.num_projections, generator.projection_momentum)
    if not generator.pull_steps:
        return audio
    how = generator.pull_steps, generator.projection_momentum
    return pull_to_mel(graph, project_frames, audio, wanted, limits, *how)


def iterate(graph: Graph, step: Callable[[Graph, str], str], x: str, num_steps: int, momentum: float) -> str:
    """As `vocoder.istft.iterate`."""

    def one(graph: Graph, x: str, before: str) -> list[str]:
        change = graph.add("Mul", graph.add("Sub", x, before), np.float32(momentum))
        return [step(graph, graph.add("Add", x, change)), x]

    return graph.loop(num_steps, one, x, x)[0]


def pairs(graph: Graph, x: str) -> str:
    """[1, T, 2 F], real parts, then imaginary parts, to [1, T, 2, F]."""
    return graph.add("Reshape", x, np.array([0, 0, 2, -1]))


def flat(graph: Graph, x: str) -> str:
    """[1, T, n, F] to [1, T, n F]."""
    return graph.add("Reshape", x, np.array([0, 0, -1]))


def magnitude(graph: Graph, spectrum: str, floor: float) -> str:
    """As `stft.magnitude`: [1, T, 2, F] to [1, T, 1, F]."""
    squares = graph.add("ReduceSumSquare", spectrum, np.array([2]))
    return graph.add("Sqrt", graph.add("Add", squares, np.float32(floor**2)))
