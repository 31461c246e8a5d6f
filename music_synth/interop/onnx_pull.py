"""How an inverter as ONNX pulls its audio to the mel hop by hop, and keeps silent before attacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from music_synth.audio.mel import FRAME_LENGTH, HOP_LENGTH, NUM_MELS, hann_window, mel_matrix
from music_synth.interop.onnx_graph import LAST, Graph
from music_synth.vocoder import pre_echo
from music_synth.vocoder.stft import PULL_AHEAD

CHANNELS = np.array([2])


def part(graph: Graph, x: str, start: int, end: int) -> str:
    """x[:, start:end]"""
    return graph.add("Slice", x, np.array([start]), np.array([end]), np.array([1]))


def padded(graph: Graph, x: str, before: int, after: int, value: float = 0.0) -> str:
    """[1, T, D] to [1, before + T + after, D]."""
    return graph.add("Pad", x, np.array([0, before, 0, 0, after, 0]), np.float32(value))


def pre_echo_limits(graph: Graph, mel: str) -> str:
    """As `vocoder.pre_echo.pre_echo_limits`, of a mel magnitude that exists from end to end: [1, T, 320]."""
    squares = graph.add("Div", graph.add("Mul", mel, mel), mel_matrix().sum(axis=0))
    energy = graph.add("ReduceSum", squares, CHANNELS)
    later = [part(graph, padded(graph, energy, 0, i), i, LAST) for i in range(3)]
    frames = graph.add("Concat", *later, axis=2)
    before = part(graph, padded(graph, energy, 1, 0, 1e30), 0, -1)  # of the first frame nothing is known
    tiny = np.float32(1e-20)
    share = graph.add("Div", before, graph.add("Max", graph.add("ReduceMax", frames, CHANNELS), tiny))
    new = graph.add("Relu", graph.add("Sub", frames, before))
    total = graph.add("Max", graph.add("ReduceSum", new, CHANNELS), tiny)
    found = graph.add("Log", graph.add("Add", graph.add("Div", new, total), np.float32(pre_echo.FLOOR)))
    ends = pre_echo.ends().astype(np.float32)
    apart = graph.add("Sub", graph.add("Unsqueeze", found, CHANNELS), pre_echo.shares()[None, None])
    nearest = graph.add("ArgMin", graph.add("ReduceSumSquare", apart, np.array([3]), keepdims=0), axis=2)
    until = graph.add("Sub", np.arange(2 * HOP_LENGTH, dtype=np.float32), graph.add("Gather", ends, nearest))
    rise = graph.add("Add", graph.add("Div", until, np.float32(pre_echo.RISE)), np.float32(1))
    rise = graph.add("Clip", rise, np.float32(0), np.float32(1))
    least = graph.add("Clip", graph.add("Mul", share, np.float32(pre_echo.MARGIN)), np.float32(1e-12), np.float32(1))
    begins = graph.add("Less", share, np.float32(pre_echo.ATTACK))
    least = graph.add("Where", begins, least, np.float32(1))
    curve = graph.add("Cos", graph.add("Mul", rise, np.float32(np.pi)))
    curve = graph.add("Sub", np.float32(0.5), graph.add("Mul", curve, np.float32(0.5)))
    above = graph.add("Mul", graph.add("Sub", np.float32(1), least), graph.add("Mul", curve, curve))
    limits = graph.add("Add", least, above)
    own, next_ = graph.add("Split", limits, axis=2, num_outputs=2, outputs=2)
    return graph.add("Min", own, part(graph, padded(graph, next_, 1, 0, 1.0), 0, -1))


def without_pre_echo(graph: Graph, hops: str, limits: str) -> str:
    """As `vocoder.pre_echo.without_pre_echo`: hops [1, n, 320] of either form of audio."""
    shape = np.array([1, -1, HOP_LENGTH // pre_echo.BLOCK, pre_echo.BLOCK])
    blocks, allowed = (graph.add("Reshape", x, shape) for x in (hops, limits))
    energy = graph.add("ReduceMean", graph.add("Mul", blocks, blocks), np.array([3]))  # [1, n, 8, 1]
    loudest = graph.add("Pad", graph.add("ReduceMax", energy, CHANNELS), np.array([0, 0, 0, 0, 0, 2, 0, 0]))
    follows = graph.add("Max", *(part(graph, loudest, i, i - 2 or LAST) for i in range(3)))
    gain = graph.add("Div", graph.add("Mul", allowed, follows), graph.add("Max", energy, np.float32(1e-20)))
    gain = graph.add("Min", graph.add("Sqrt", gain), np.float32(1))
    gain = graph.add("Where", graph.add("Less", allowed, np.float32(1)), gain, np.float32(1))
    return graph.add("Reshape", graph.add("Mul", blocks, gain), np.array([1, -1, HOP_LENGTH]))


def pull_to_mel(
    graph: Graph,
    project_frames: Callable[[Graph, str, str], str],
    audio: str,
    mel: str,
    limits: str,
    num_steps: int,
    momentum: float,
) -> str:
    """As `stft.pull_to_mel`, of a whole piece: its hops, [1, T, 320]."""
    rise, fall = np.square(hann_window()).reshape(2, HOP_LENGTH)
    moving = PULL_AHEAD + 1

    def by_hop(x: str, count: int) -> str:
        """[1, n, D] to [1, n - count + 1, count D]: so many elements from each hop on."""
        ends = [i - count + 1 or LAST for i in range(count)]
        parts = [graph.add("Slice", x, np.array([i]), np.array([end]), np.array([1])) for i, end in enumerate(ends)]
        return graph.add("Concat", *parts, axis=2)

    lengths = graph.add("Concat", graph.add("Shape", mel, end=2), np.array([1]), axis=0)  # 1, T, 1
    ones = graph.add("Expand", np.ones((1, 1, 1), np.float32), lengths)
    exists = padded(graph, ones, moving, moving)  # of frames -7 .. T + 6, of which the hops -6 .. T - 1 are made
    hops = padded(graph, graph.add("Reshape", audio, np.array([1, -1, HOP_LENGTH])), 0, moving)
    two = by_hop(hops, 2)
    entering = graph.add("Mul", graph.add("Mul", two, np.concatenate([rise, fall])), part(graph, exists, moving, -1))
    edge = graph.add("Slice", two, np.array([HOP_LENGTH]), np.array([LAST]), CHANNELS)
    edge = graph.add("Mul", graph.add("Mul", edge, rise), part(graph, exists, moving + 1, LAST))

    def one(graph: Graph, frames: str, change: str, _: str, entering: str, *given: str) -> list[str]:
        def rows(x: str, size: int) -> str:
            return graph.add("Reshape", x, np.array([1, -1, size]))

        frames, entering = rows(frames, FRAME_LENGTH), rows(entering, FRAME_LENGTH)
        edge, wanted, here, limited = map(rows, given, (HOP_LENGTH, NUM_MELS, 1, HOP_LENGTH))
        weight = graph.add("Mul", part(graph, here, 0, -1), fall)
        weight = graph.add("Add", weight, graph.add("Mul", part(graph, here, 1, LAST), rise))
        weight = graph.add("Max", weight, np.float32(0.5))
        share = graph.add("Div", part(graph, here, 1, LAST), weight)
        inside, fixed = part(graph, here, 1, -1), part(graph, frames, 0, 1)

        def hops(graph: Graph, frames: str) -> str:
            both = graph.add("Concat", fixed, frames, axis=1)
            first, second = graph.add("Split", both, axis=2, num_outputs=2, outputs=2)
            later = graph.add("Concat", part(graph, first, 1, LAST), edge, axis=1)
            return without_pre_echo(graph, graph.add("Mul", graph.add("Add", second, later), share), limited)

        def project(graph: Graph, frames: str, change: str) -> list[str]:
            x = hops(graph, graph.add("Add", frames, graph.add("Mul", change, np.float32(momentum))))
            x = graph.add("Concat", part(graph, x, 0, -1), part(graph, x, 1, LAST), axis=2)
            made = graph.add("Mul", project_frames(graph, x, wanted), inside)
            return [made, graph.add("Sub", made, frames)]

        frames = graph.add("Concat", part(graph, frames, 1, LAST), entering, axis=1)
        still = np.zeros((1, 1, FRAME_LENGTH), np.float32)
        change = graph.add("Concat", rows(change, FRAME_LENGTH), still, axis=1)
        frames, change = graph.loop(num_steps, project, frames, change)
        change = part(graph, change, 1, LAST)
        made = part(graph, hops(graph, frames), 0, 1)
        return [graph.add("Reshape", x, np.array([1, -1])) for x in (frames, change, made)]

    sizes = moving * FRAME_LENGTH, (moving - 1) * FRAME_LENGTH, HOP_LENGTH
    before = [graph.constant(np.zeros((1, size), np.float32)) for size in sizes]
    wanted = by_hop(padded(graph, mel, PULL_AHEAD, PULL_AHEAD), moving)
    limited = by_hop(padded(graph, limits, PULL_AHEAD, moving, 1.0), moving + 1)
    _, _, made = graph.scan(one, before, [entering, edge, wanted, by_hop(exists, moving + 2), limited])
    return part(graph, made, PULL_AHEAD, LAST)
