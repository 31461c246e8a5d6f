"""Writes a trained inverter as an ONNX file, which onnxruntime plays without Python or JAX.

    python -m music_synth.interop.onnx out.onnx --inverter MODEL_DIR

The file takes and gives what the published SoundStream inverter does (`interop.inverters`): `input_features`, log-mel
float32 [1, T, 128] of any T, and `audio`, float32 [1, 320 T].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from music_synth.audio.mel import MAX_LOG_MEL, MIN_LOG_MEL, NUM_MELS
from music_synth.errors import ArgumentParser, UserError, run
from music_synth.interop.inverters import load_onnx
from music_synth.interop.onnx_graph import Graph
from music_synth.vocoder.inverter import load_inverter
from music_synth.vocoder.melgan import MelGANGenerator, normalized
from music_synth.vocoder.neural import NeuralInverter

INPUT, OUTPUT = "input_features", "audio"


def export_onnx(generator: MelGANGenerator, params: Mapping, path: Path) -> None:
    """Writes an ONNX file that does what the generator does with these parameters; UserError if it is no MelGAN."""
    if not isinstance(generator, MelGANGenerator):
        raise UserError(f"only a MelGANGenerator can be written as ONNX, not a {type(generator).__name__}")
    graph = Graph()
    melgan(graph, generator, params, INPUT)
    doc = "Natural-log mel magnitude [1, frames, 128], 50 frames a second, to audio at 16 kHz, [1, 320 frames]."
    graph.save(path, {INPUT: [1, "frames", NUM_MELS]}, {OUTPUT: [1, "samples"]}, doc)


def scaled(graph: Graph, mel: str) -> str:
    """As `audio.mel.scale_mel`."""
    slope = 2 / (MAX_LOG_MEL - MIN_LOG_MEL)
    x = graph.add("Mul", graph.add("Sub", mel, np.float32(MIN_LOG_MEL)), np.float32(slope))
    return graph.add("Clip", graph.add("Sub", x, np.float32(1)), np.float32(-1), np.float32(1))


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


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m music_synth.interop.onnx", "Writes a trained inverter as an ONNX file.")
    parser.add_argument("out", type=Path, help="file to write, .onnx")
    parser.add_argument("--inverter", help="a .safetensors file or the MODEL_DIR of a run (default: what is shipped)")
    flags = parser.parse_args(argv)
    inverter = load_inverter(flags.inverter)
    if not isinstance(inverter, NeuralInverter):
        raise UserError(f"--inverter {flags.inverter}: only inverters trained here can be exported")
    if flags.out.suffix != ".onnx":
        raise UserError(f"{flags.out}: the name must end in .onnx")
    try:
        export_onnx(inverter.generator, inverter.params, flags.out)
    except OSError as error:
        raise UserError(f"{flags.out} cannot be written ({error.strerror})") from error
    mel = np.random.default_rng(0).uniform(MIN_LOG_MEL, MAX_LOG_MEL, (100, NUM_MELS))
    difference = np.abs(load_onnx(flags.out)(mel) - inverter(mel)).max()
    print(f"{flags.out}: {flags.out.stat().st_size / 1e6:.1f} MB; {difference:.0e} from JAX on two seconds of noise")


if __name__ == "__main__":
    run(main)
