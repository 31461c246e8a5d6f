"""An ONNX graph, built node by node, and the layers of our inverters in it.

Values are known by the names of what makes them. Sequences lie as in JAX, [1, T, D] and audio [1, S]; T and S may be of
any size when the graph runs. `onnx` is imported when a graph is finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from music_synth.errors import UserError

OPSET = 20  # the first with Gelu; onnxruntime runs it since 1.17
LAST = np.iinfo(np.int64).max  # Slice: to the end


class Graph:
    def __init__(self):
        self.nodes: list[tuple[str, list[str], list[str], dict]] = []  # operator, inputs, outputs, attributes
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, value) -> str:
        """A name for an array, for use in several places."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def add(self, operator: str, *inputs, outputs: int = 1, name: str = "", **attributes):
        """A node on values (names) and arrays; the name of its output, or a list of names where it has several.

        `name` is for an output of the whole graph.
        """
        inputs = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        names = [name or f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append((operator, inputs, names, attributes))
        return names[0] if outputs == 1 else names

    def save(self, path: Path, inputs: Mapping[str, Sequence], outputs: Mapping[str, Sequence], doc: str) -> None:
        """Checks the graph and writes it.

        Args:
          inputs, outputs: name to shape, of float32; a string in a shape is a size that may be any.
          doc: what the file is for, kept in it.
        """
        try:
            import onnx
            from onnx import helper
        except ImportError as error:
            raise UserError(f"writing {path} needs onnx ({error}): pip install 'music_synth[eval]'") from error

        def floats(values: Mapping[str, Sequence]) -> list:
            return [helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, shape) for k, shape in values.items()]

        graph = helper.make_graph(
            [helper.make_node(operator, i, o, **attributes) for operator, i, o, attributes in self.nodes],
            "inverter",
            floats(inputs),
            floats(outputs),
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="music_synth", doc_string=doc)
        model.ir_version = helper.find_min_ir_version_for(opsets)  # the newest would shut out older onnxruntimes
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


# --- layers of flax, with their parameters -------------------------------------------------------------------------


def dense(graph: Graph, x: str, params: Mapping) -> str:
    return graph.add("Add", graph.add("MatMul", x, params["kernel"]), params["bias"])


def layer_norm(graph: Graph, x: str, params: Mapping) -> str:
    return graph.add("LayerNormalization", x, params["scale"], params["bias"], axis=-1, epsilon=1e-6)


def gelu(graph: Graph, x: str) -> str:
    return graph.add("Gelu", x, approximate="tanh")


def depthwise_conv(graph: Graph, x: str, params: Mapping) -> str:
    """Each channel of [1, T, D] with its own odd kernel, [width, D], over time; zeros beyond the ends."""
    kernel = np.asarray(params["kernel"])
    side = len(kernel) // 2
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    weights = kernel.T[:, None]  # [D, 1, width]
    x = graph.add("Conv", x, weights, params["bias"], group=kernel.shape[1], pads=[side, side])
    return graph.add("Transpose", x, perm=[0, 2, 1])


# --- short-time Fourier transforms ---------------------------------------------------------------------------------


def rfft_matrix(window: np.ndarray, fft_size: int) -> np.ndarray:
    """float32 [L, 2F], F = fft_size/2 + 1: frames @ it = real | imaginary parts of rfft(frames * window, fft_size).

    A matrix and not the operator DFT: in onnxruntime that is half as fast at these sizes, and the inverse to a real
    signal came to it only in 2026. Float32 products of it are as exact as a float32 FFT.
    """
    angle = 2 * np.pi / fft_size * (np.outer(np.arange(len(window)), np.arange(fft_size // 2 + 1)) % fft_size)
    return (window[:, None] * np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)).astype(np.float32)


def irfft_matrix(window: np.ndarray, fft_size: int) -> np.ndarray:
    """float32 [2F, L]: (real | imaginary parts) @ it = irfft(spectrum, fft_size)[:L] * window."""
    weight = np.full(fft_size // 2 + 1, 2.0)
    weight[[0, -1]] = 1.0  # all but the outer two stand for two bins of the whole spectrum
    return (rfft_matrix(window, fft_size).T * np.tile(weight, 2)[:, None] / fft_size).astype(np.float32)


def frames_of(graph: Graph, audio: str, length: int, hop: int) -> str:
    """As `vocoder.stft.frames_of`: [1, S] to [1, S/hop - length/hop + 1, length]."""
    hops = graph.add("Reshape", audio, np.array([1, -1, hop]))
    parts, time = length // hop, np.array([1])
    ends = [i - parts + 1 if i < parts - 1 else LAST for i in range(parts)]
    shifted = [graph.add("Slice", hops, np.array([i]), np.array([end]), time) for i, end in enumerate(ends)]
    return graph.add("Concat", *shifted, axis=2)


def overlap_add(graph: Graph, frames: str, length: int, hop: int) -> str:
    """As `vocoder.stft.overlap_add`: [1, T, length] to [1, hop T + length - hop]."""
    parts = length // hop
    split = graph.add("Split", frames, axis=2, num_outputs=parts, outputs=parts)
    padded = [graph.add("Pad", x, np.array([0, i, 0, 0, parts - 1 - i, 0])) for i, x in enumerate(split)]
    return graph.add("Reshape", graph.add("Sum", *padded), np.array([1, -1]))
