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

from music_synth.errors import needing
from music_synth.vocoder.convnext import seen_taps

OPSET = 20  # the first with Gelu; onnxruntime runs it since 1.17
LAST = np.iinfo(np.int64).max  # Slice: to the end


class Graph:
    """A graph; with `outer`, the body of a loop in that, which may use all that is in `outer` before the loop."""

    def __init__(self, outer: Graph | None = None):
        self.nodes: list[tuple[str, list[str], list[str], dict]] = []  # operator, inputs, outputs, attributes
        self.constants: dict[str, np.ndarray] = outer.constants if outer else {}
        self.known: dict[tuple, str] = outer.known if outer else {}  # the same array is kept once
        # In names: none may come twice, in bodies either.
        self.numbers: Iterator[int] = outer.numbers if outer else itertools.count()

    def constant(self, value) -> str:
        """A name for an array, for use in several places."""
        array = np.asarray(value)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = f"constant_{len(self.constants)}"
            self.constants[self.known[key]] = array
        return self.known[key]

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

    def save(
        self,
        path: Path,
        inputs: Mapping[str, Sequence],
        outputs: Mapping[str, Sequence],
        doc: str,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Checks the graph and writes it, weights that float16 holds exactly in float16.

        Args:
          inputs, outputs: name to shape, of float32, or of int32 where the name ends in "tokens"; a string in a shape
            is a size that may be any.
          doc: what the file is for, kept in it.
          about: further things kept in it, by name.
        """
        with needing(f"writing {path} needs onnx", "eval"):
            import onnx
            from onnx import helper

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
            return helper.make_graph(nodes, "music_synth", given, given_back, constants)

        constants, widened = [], []
        for name, value in self.constants.items():
            if is_half(value):
                widened.append(helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
                name, value = f"{name}_half", value.astype(np.float16)
            constants.append(onnx.numpy_helper.from_array(value, name))
        taken = [(name, "INT32" if name.endswith("tokens") else "FLOAT", shape) for name, shape in inputs.items()]
        graph = proto(self, taken, floats(outputs), constants)
        nodes = [*widened, *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="music_synth", doc_string=doc)
        helper.set_model_props(model, dict(about or {}))
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


def is_half(array: np.ndarray) -> bool:
    """Whether an array is of float32, large, and loses nothing in float16."""
    if array.dtype != np.float32 or array.size < 256:
        return False
    with np.errstate(over="ignore"):
        return bool((array.astype(np.float16) == array).all())


# --- layers of flax, with their parameters -------------------------------------------------------------------------


def dense(graph: Graph, x: str, params: Mapping) -> str:
    return graph.add("Add", graph.add("MatMul", x, params["kernel"]), params["bias"])


def layer_norm(graph: Graph, x: str, params: Mapping) -> str:
    return graph.add("LayerNormalization", x, params["scale"], params["bias"], axis=-1, epsilon=1e-6)


def gelu(graph: Graph, x: str) -> str:
    return graph.add("Gelu", x, approximate="tanh")


def depthwise_conv(graph: Graph, x: str, params: Mapping, ahead: int, seen: int) -> str:
    """Each channel of [1, T, D] with its own kernel, [width, D], `ahead` of it later; zeros beyond the ends."""
    kernel = np.asarray(seen_taps(params["kernel"], ahead, seen))
    pads = [len(kernel) - 1 - seen, seen]
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    weights = kernel.T[:, None]  # [D, 1, width]
    x = graph.add("Conv", x, weights, params["bias"], group=kernel.shape[1], pads=pads)
    return graph.add("Transpose", x, perm=[0, 2, 1])


# --- short-time Fourier transforms ---------------------------------------------------------------------------------


class Transform:
    """Fourier transforms of frames under a window, with phases as at their middle.

    A matrix and not the operator DFT, which onnxruntime has half as fast at these sizes, and to a real signal only
    since 2026. Samples at equal distances from the middle are added and subtracted first, which halves the products.
    The matrices are made of a table of one period when the file is opened, and take no place in it.

    Args:
      window: [L], symmetric about L / 2; its sample 0 is 0.
    """

    def __init__(self, graph: Graph, window: np.ndarray, fft_size: int):
        self.half, self.size = len(window) // 2, fft_size
        angle = 2 * np.pi / fft_size * np.arange(fft_size)
        places = graph.add("Mul", np.arange(self.half)[:, None], np.arange(fft_size // 2 + 1)[None])
        places = graph.add("Mod", places, np.int64(fft_size))
        shape = window[self.half :, None].astype(np.float32)
        self.even = graph.add("Mul", graph.add("Gather", np.cos(angle).astype(np.float32), places), shape)
        self.odd = graph.add("Mul", graph.add("Gather", -np.sin(angle).astype(np.float32), places), shape)
        self.odd = graph.add("Slice", self.odd, np.array([1]), np.array([LAST]), np.array([0]))
        weight = np.full((fft_size // 2 + 1, 1), 2 / fft_size, np.float32)
        weight[[0, -1]] /= 2  # all but the outer two stand for two bins of the whole spectrum
        self.back = [
            graph.add("Mul", graph.add("Transpose", one, perm=[1, 0]), weight) for one in (self.even, self.odd)
        ]

    def spectra(self, graph: Graph, frames: str) -> str:
        """[1, T, L] to [1, T, 2F], F = fft_size/2 + 1: real, then imaginary parts."""

        def cut(start: int, end: int, step: int = 1) -> str:
            return graph.add("Slice", frames, *(np.array([one]) for one in (start, end, 2, step)))

        later, earlier = cut(self.half + 1, 2 * self.half), cut(self.half - 1, 0, -1)
        middle = cut(self.half, self.half + 1)
        sums = graph.add("Concat", middle, graph.add("Add", later, earlier), axis=2)
        parts = graph.add("MatMul", sums, self.even), graph.add("MatMul", graph.add("Sub", later, earlier), self.odd)
        return graph.add("Concat", *parts, axis=2)

    def frames(self, graph: Graph, spectra: str) -> str:
        """The frames of spectra, times the window: [1, T, 2F] to [1, T, L]."""
        parts = graph.add("Split", spectra, axis=2, num_outputs=2, outputs=2)
        even, odd = (graph.add("MatMul", part, back) for part, back in zip(parts, self.back, strict=True))

        def cut(name: str, start: int, end: int, step: int = 1) -> str:
            return graph.add("Slice", name, *(np.array([one]) for one in (start, end, 2, step)))

        middle, sides = cut(even, 0, 1), cut(even, 1, LAST)
        before = cut(graph.add("Sub", sides, odd), -1, -LAST, -1)
        nothing = graph.add("Mul", middle, np.float32(0))  # the window's sample 0
        return graph.add("Concat", nothing, before, middle, graph.add("Add", sides, odd), axis=2)


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
