"""An ONNX graph, built node by node, and the layers of our inverters in it.

Values are known by the names of what makes them. Sequences lie as in JAX, [1, T, D] and audio [1, S]; T and S may be of
any size when the graph runs. `onnx` is imported when a graph is finished.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from music_synth.errors import UserError

OPSET = 20  # the first with Gelu; onnxruntime runs it since 1.17
LAST = np.iinfo(np.int64).max  # Slice: to the end


class Graph:
    """A graph; with `outer`, the body of a loop in that, which may use all that is in `outer` before the loop."""

    def __init__(self, outer: Graph | None = None):
        self.nodes: list[tuple[str, list[str], list[str], dict]] = []  # operator, inputs, outputs, attributes
        self.constants: dict[str, np.ndarray] = outer.constants if outer else {}
        # In names: none may come twice, in bodies either.
        self.numbers: Iterator[int] = outer.numbers if outer else itertools.count()

    def constant(self, value) -> str:
        """A name for an array, for use in several places."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def add(self, operator: str, *inputs: Any, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        """A node on values (names) and arrays; the name of its output, or a list of names where it has several.

        `name` is for an output of the whole graph.
        """
        taken = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        names = [name or f"{operator}_{next(self.numbers)}" for _ in range(outputs)]
        self.nodes.append((operator, taken, names, attributes))
        return names[0] if outputs == 1 else names

    def loop(self, count: int, body: Callable[..., Sequence[str]], *values: str) -> list[str]:
        """`values = body(graph, *values)` so many times: what comes out last. Two values or more, of float32.

        Rather than unrolled: the graph, its check and its loading do not grow with the count.
        """
        inner = Graph(self)
        number, more, *given = (f"given_{next(self.numbers)}" for _ in range(2 + len(values)))
        made = [inner.add("Identity", value) for value in (more, *body(inner, *given))]
        taken = [(number, "INT64", []), (more, "BOOL", []), *floats(given)]
        given_back = [(made[0], "BOOL", []), *floats(made[1:])]
        return self.add("Loop", np.int64(count), "", *values, outputs=len(values), body=Body(inner, taken, given_back))

    def scan(self, body: Callable[..., Sequence[str]], state: Sequence[str], sequences: Sequence[str]) -> list[str]:
        """`state = body(graph, *state, *elements)` from frame to frame: the states after each, [1, T, D].

        Args:
          state: before frame 0, [1, D] each, of float32.
          sequences: [1, T, D] each, whose elements [1, D] the body is given.
        """
        inner, size = Graph(self), len(state)
        given = [f"given_{next(self.numbers)}" for _ in (*state, *sequences)]
        after = body(inner, *given)
        made = [inner.add("Identity", value) for value in (*after, *after)]  # for the next frame, and for the outside
        results = self.add(
            "Scan",
            *state,
            *sequences,
            outputs=2 * size,
            num_scan_inputs=len(sequences),
            scan_input_axes=[1] * len(sequences),
            scan_output_axes=[1] * size,
            body=Body(inner, floats(given), floats(made)),
        )
        return results[size:]

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

        def proto(graph: Graph, inputs: Sequence[tuple], outputs: Sequence[tuple], constants: Sequence = ()):
            nodes = []
            for operator, taken, made, attributes in graph.nodes:
                attributes = {k: proto(*v) if isinstance(v, Body) else v for k, v in attributes.items()}
                nodes.append(helper.make_node(operator, taken, made, **attributes))
            given, given_back = (
                [
                    helper.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind), shape)
                    for name, kind, shape in side
                ]
                for side in (inputs, outputs)
            )
            return helper.make_graph(nodes, "inverter", given, given_back, constants)

        constants = [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = proto(self, floats(inputs), floats(outputs), constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="music_synth", doc_string=doc)
        model.ir_version = helper.find_min_ir_version_for(opsets)  # the newest would shut out older onnxruntimes
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


class Body(NamedTuple):
    """An attribute: a graph within the graph; its inputs and outputs are names, types and shapes."""

    graph: Graph
    inputs: Sequence[tuple]
    outputs: Sequence[tuple]


def floats(values: Mapping[str, Sequence] | Sequence[str]) -> list[tuple]:
    """Name, type and shape of values of float32; of any shape if it is not given."""
    shapes = values if isinstance(values, Mapping) else dict.fromkeys(values)
    return [(name, "FLOAT", shape) for name, shape in shapes.items()]


# --- layers of flax, with their parameters -------------------------------------------------------------------------


def dense(graph: Graph, x: str, params: Mapping) -> str:
    return graph.add("Add", graph.add("MatMul", x, params["kernel"]), params["bias"])


def layer_norm(graph: Graph, x: str, params: Mapping) -> str:
    return graph.add("LayerNormalization", x, params["scale"], params["bias"], axis=-1, epsilon=1e-6)


def gelu(graph: Graph, x: str) -> str:
    return graph.add("Gelu", x, approximate="tanh")


def depthwise_conv(graph: Graph, x: str, params: Mapping, ahead: int) -> str:
    """Each channel of [1, T, D] with its own kernel, [width, D], `ahead` of it later; zeros beyond the ends."""
    kernel = np.asarray(params["kernel"])
    pads = [len(kernel) - 1 - ahead, ahead]
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    weights = kernel.T[:, None]  # [D, 1, width]
    x = graph.add("Conv", x, weights, params["bias"], group=kernel.shape[1], pads=pads)
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
