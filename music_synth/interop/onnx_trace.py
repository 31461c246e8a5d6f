"""Writes what JAX computes as an ONNX graph: a function is traced, and each primitive becomes a node or a few.

Shapes are fixed. What depends on constants alone is computed now; loops of known length are unrolled. Arrays that only
repeat along an axis stay small, as ONNX broadcasts by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from music_synth.errors import UserError
from music_synth.interop.onnx_graph import Graph

LARGEST_FOLDED = 2**16  # elements of a constant that is larger than what it is computed of
INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
UNCHANGED = ("stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint")
TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "uint32": 12}  # of ONNX
ONE_TO_ONE = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "sqrt": "Sqrt", "abs": "Abs",
    "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "sin": "Sin", "cos": "Cos", "erf": "Erf", "not": "Not",
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
    "and": "And", "or": "Or", "xor": "Xor", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual",
}  # fmt: skip
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


@dataclass
class Value:
    """An array of the graph, or a constant one; its shape may have 1 where JAX's is larger."""

    shape: tuple[int, ...]
    name: str = ""
    array: np.ndarray | None = None


def trace(graph: Graph, function: Callable, inputs: Mapping[str, jax.ShapeDtypeStruct], output: str) -> None:
    """Adds the nodes of `function`, of arrays by the names of the graph's inputs, to one array named `output`.

    Raises:
        UserError: it computes something that has no counterpart here.
    """
    closed = jax.make_jaxpr(function)(*inputs.values())
    given = [Value(tuple(struct.shape), name) for name, struct in inputs.items()]
    writer = _Writer(graph)
    (made,) = writer.run(closed.jaxpr, [constant(value) for value in closed.consts], given)
    graph.add("Identity", writer.full(made, closed.jaxpr.outvars[0].aval.shape), name=output)


def constant(array: Any) -> Value:
    array = np.asarray(array)
    return Value(array.shape, "", array)


class _Writer:
    def __init__(self, graph: Graph):
        self.graph = graph

    def run(self, jaxpr: Any, constants: Sequence[Value], given: Sequence[Value]) -> list[Value]:
        """The outputs of a jaxpr; its nodes are added."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *given), strict=True))

        def value_of(variable: Any) -> Value:
            if isinstance(variable, Literal):
                aval: Any = variable.aval
                return constant(np.asarray(variable.val, aval.dtype))  # which may be a float of Python
            return known[variable]

        for equation in jaxpr.eqns:
            values = [value_of(variable) for variable in equation.invars]
            known.update(zip(equation.outvars, self.equation(equation, values), strict=True))
        return [value_of(variable) for variable in jaxpr.outvars]

    def equation(self, equation: Any, values: list[Value]) -> list[Value]:
        name, given = equation.primitive.name, equation.params
        if name in INLINED:
            inner = given.get("jaxpr") or given.get("call_jaxpr") or given["fun_jaxpr"]
            jaxpr, constants = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
            return self.run(jaxpr, [constant(value) for value in constants], values)
        if name == "scan":
            return self.scan(given, values)
        if name in UNCHANGED:
            return values
        shapes = [tuple(variable.aval.shape) for variable in equation.invars]
        outputs = [variable.aval for variable in equation.outvars]
        if name == "broadcast_in_dim" and not values[1:]:
            shape = [1] * len(given["shape"])
            for axis, place in enumerate(given["broadcast_dimensions"]):
                shape[place] = values[0].shape[axis]
            return [self.reshaped(values[0], tuple(shape))]
        size = max(math.prod(output.shape) for output in outputs)
        largest = max((math.prod(value.shape) for value in values), default=size)
        known = [value.array for value in values if value.array is not None]
        if len(known) == len(values) and (size <= LARGEST_FOLDED or size <= largest):
            arrays = [np.broadcast_to(array, shape) for array, shape in zip(known, shapes, strict=True)]
            made = equation.primitive.bind(*arrays, **given)
            return [constant(one) for one in (made if equation.primitive.multiple_results else [made])]
        if name == "split":
            return self.split(given, values, shapes, outputs)
        return [self.one(name, given, values, shapes, outputs[0])]

    # --- helpers ---------------------------------------------------------------------------------------------------

    def name(self, value: Value) -> str:
        if not value.name:
            value.name = self.graph.constant(value.array)
        return value.name

    def add(self, shape: Sequence[int], operator: str, *inputs: Any, **attributes: Any) -> Value:
        names = [self.name(one) if isinstance(one, Value) else one for one in inputs]
        return Value(tuple(shape), self.graph.add(operator, *names, **attributes))

    def full(self, value: Value, shape: Sequence[int]) -> str:
        """The name of a value that has its whole shape."""
        if value.shape == tuple(shape):
            return self.name(value)
        return self.graph.add("Expand", self.name(value), np.array(shape, np.int64))

    def reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        if value.shape == shape:
            return value
        if value.array is not None:
            return constant(np.reshape(value.array, shape))
        return self.add(shape, "Reshape", value, np.array(shape, np.int64))

    def cut(self, name: str, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int] | None = None) -> str:
        axes = np.arange(len(starts))
        ints = [np.array(one, np.int64) for one in (starts, ends, axes, steps or [1] * len(starts))]
        return self.graph.add("Slice", name, *ints)

    # --- primitives ------------------------------------------------------------------------------------------------

    def scan(self, given: Mapping[str, Any], values: list[Value]) -> list[Value]:
        """Unrolled; what it scans over must be constant, and what it stacks is stacked."""
        body, first = given["jaxpr"], given["num_consts"]
        fixed, carry = values[:first], values[first : first + given["num_carry"]]
        over = values[first + given["num_carry"] :]
        stacked: list[list[Value]] = [[] for _ in body.out_avals[len(carry) :]]
        order = range(given["length"])
        for j in reversed(order) if given["reverse"] else order:
            if any(value.array is None for value in over):
                raise UserError("a loop over an input cannot be written as ONNX")
            made = self.run(
                body.jaxpr,
                [constant(value) for value in body.consts],
                [*fixed, *carry, *(constant(value.array[j]) for value in over)],  # type: ignore[index]
            )
            carry = made[: len(carry)]
            for parts, part in zip(stacked, made[len(carry) :], strict=True):
                parts.insert(0 if given["reverse"] else len(parts), part)
        if any(stacked):
            raise UserError("a loop that keeps what each step gives cannot be written as ONNX")
        return list(carry)

    def split(self, given: Any, values: list[Value], shapes: Any, outputs: Any) -> list[Value]:
        whole, sizes = self.full(values[0], shapes[0]), np.array(given["sizes"], np.int64)
        names = self.graph.add("Split", whole, sizes, axis=given["axis"], outputs=len(sizes))
        names = [names] if isinstance(names, str) else names
        return [Value(tuple(one.shape), name) for one, name in zip(outputs, names, strict=True)]

    def one(self, name: str, given: Any, values: list[Value], shapes: Any, output: Any) -> Value:
        """The value of a primitive with one result."""
        if name in ONE_TO_ONE or name in ("ne", "select_n"):
            return self.elementwise(name, values)
        x = values[0]
        if name == "square" or (name == "integer_pow" and given["y"] == 2):
            return self.add(x.shape, "Mul", x, x)
        if name == "rsqrt":
            return self.add(x.shape, "Reciprocal", self.add(x.shape, "Sqrt", x))
        if name == "rem":
            return self.add(np.broadcast_shapes(*(v.shape for v in values)), "Mod", *values, fmod=1)
        if name in ("log1p", "expm1"):
            one, both = np.float32(1), ("Add", "Log") if name == "log1p" else ("Exp", "Sub")
            first = self.add(x.shape, both[0], x, *[one] * (name == "log1p"))
            return self.add(x.shape, both[1], first, *[one] * (name == "expm1"))
        if name == "integer_pow":
            return self.add(x.shape, "Pow", x, np.float32(given["y"]))
        if name == "convert_element_type":
            return self.add(x.shape, "Cast", x, to=_type(given["new_dtype"]))
        whole = Value(shapes[0], self.full(x, shapes[0]))
        if name in ("reshape", "squeeze", "expand_dims"):
            return self.reshaped(whole, tuple(output.shape))
        if name in REDUCTIONS:
            axes = np.array(given["axes"], np.int64)
            return self.add(output.shape, REDUCTIONS[name], whole, axes, keepdims=0)
        if name in ("reduce_and", "reduce_or"):
            numbers = self.add(shapes[0], "Cast", whole, to=TYPES["int32"])
            operator = "ReduceMin" if name == "reduce_and" else "ReduceMax"
            reduced = self.add(output.shape, operator, numbers, np.array(given["axes"], np.int64), keepdims=0)
            return self.add(output.shape, "Cast", reduced, to=TYPES["bool"])
        if name in ("argmin", "argmax"):
            (axis,) = given["axes"]
            numbers = self.add(shapes[0], "Cast", whole, to=TYPES["float32"])
            found = self.add(output.shape, "ArgMin" if name == "argmin" else "ArgMax", numbers, axis=axis, keepdims=0)
            return self.add(output.shape, "Cast", found, to=_type(output.dtype))
        if name == "transpose":
            return self.add(output.shape, "Transpose", whole, perm=list(given["permutation"]))
        if name == "slice":
            cut = self.cut(whole.name, given["start_indices"], given["limit_indices"], given["strides"])
            return Value(tuple(output.shape), cut)
        if name == "concatenate":
            names = [self.full(value, shape) for value, shape in zip(values, shapes, strict=True)]
            return self.add(output.shape, "Concat", *names, axis=given["dimension"])
        made = getattr(self, f"_{name}", None)
        if made is None:
            raise UserError(f"the operation {name} cannot be written as ONNX: a model of other settings may be")
        return made(given, whole, values[1:], shapes, output)

    def elementwise(self, name: str, values: list[Value]) -> Value:
        rank = max(len(value.shape) for value in values)
        shape = np.broadcast_shapes(*(value.shape for value in values))
        assert len(shape) == rank
        if name == "select_n":
            chosen, *cases = values
            if len(cases) != 2:
                raise UserError("a choice among more than two cannot be written as ONNX")
            return self.add(shape, "Where", chosen, cases[1], cases[0])
        if name == "ne":
            return self.add(shape, "Not", self.add(shape, "Equal", *values))
        return self.add(shape, ONE_TO_ONE[name], *values)

    def _dot_general(self, given: Any, x: Value, others: list[Value], shapes: Any, output: Any) -> Value:
        (contract_x, contract_y), (batch_x, batch_y) = given["dimension_numbers"]
        y = Value(shapes[1], self.full(others[0], shapes[1]))

        def laid_out(value: Value, batch: Any, contract: Any, last: bool) -> Value:
            """[batch, free, contracted], or with `last` [batch, contracted, free], one axis of each."""
            shape = value.shape
            free = [axis for axis in range(len(value.shape)) if axis not in (*batch, *contract)]
            order = [*batch, *contract, *free] if last else [*batch, *free, *contract]
            if order != list(range(len(order))):
                value = self.add([shape[axis] for axis in order], "Transpose", value, perm=order)
            inner, outer = (math.prod(shape[axis] for axis in axes) for axes in (contract, free))
            ends = (inner, outer) if last else (outer, inner)
            return self.reshaped(value, (*(shape[axis] for axis in batch), *ends))

        x, y = laid_out(x, batch_x, contract_x, False), laid_out(y, batch_y, contract_y, True)
        product = self.add((*x.shape[:-1], y.shape[-1]), "MatMul", x, y)
        return self.reshaped(product, tuple(output.shape))

    def _stack(self, given: Any, x: Value, others: list[Value], shapes: Any, output: Any) -> Value:
        axis = given["axis"]
        shape = (*shapes[0][:axis], 1, *shapes[0][axis:])
        parts = [self.reshaped(Value(shapes[0], self.full(value, shapes[0])), shape) for value in (x, *others)]
        return self.add(output.shape, "Concat", *parts, axis=axis)

    def _pad(self, given: Any, x: Value, others: list[Value], shapes: Any, output: Any) -> Value:
        config, sizes = given["padding_config"], list(shapes[0])
        name, fill = x.name, self.name(others[0])
        for axis, (_, _, inside) in enumerate(config):
            if inside:  # a row of fill after each, of which the last go
                apart = self.graph.add("Unsqueeze", name, np.array([axis + 1]))
                pads = np.zeros((2, len(config) + 1), np.int64)
                pads[1, axis + 1] = inside
                apart = self.graph.add("Pad", apart, pads.ravel(), fill)
                sizes[axis] *= 1 + inside
                joined = self.graph.add("Reshape", apart, np.array(sizes, np.int64))
                sizes[axis] -= inside
                name = self.cut(joined, [0] * len(config), sizes)
        pads = np.array([[low for low, _, _ in config], [high for _, high, _ in config]], np.int64)
        if pads.any():  # negative ones cut
            name = self.graph.add("Pad", name, pads.ravel(), fill)
        return Value(tuple(output.shape), name)

    def _cummax(self, given: Any, x: Value, others: list[Value], shapes: Any, output: Any) -> Value:
        """As a maximum over a window as long as the axis; of numbers that float32 knows exactly."""
        length = shapes[0][-1]
        if given["axis"] != len(shapes[0]) - 1 or math.prod(shapes[0]) != length:
            raise UserError("a running maximum of several rows cannot be written as ONNX")
        floats = self.add(shapes[0], "Cast", x, to=TYPES["float32"])
        pads = [0, length - 1] if given["reverse"] else [length - 1, 0]
        row = self.reshaped(floats, (1, 1, length))
        pooled = self.add((1, 1, length), "MaxPool", row, kernel_shape=[length], pads=pads)
        back = self.add((1, 1, length), "Cast", pooled, to=_type(output.dtype))
        return self.reshaped(back, tuple(output.shape))

    def _gather(self, given: Any, x: Value, others: list[Value], shapes: Any, output: Any) -> Value:
        """Rows along one axis."""
        numbers, sizes = given["dimension_numbers"], given["slice_sizes"]
        whole = [axis for axis, size in enumerate(sizes) if size == shapes[0][axis]]
        index_shape = shapes[1][:-1]
        (axis,) = numbers.start_index_map if len(numbers.start_index_map) == 1 else (-1,)
        offsets = [i for i in range(len(output.shape)) if not axis <= i < axis + len(index_shape)]
        if (
            numbers.collapsed_slice_dims != (axis,)
            or numbers.operand_batching_dims
            or list(numbers.offset_dims) != offsets
            or len([one for one in whole if one != axis]) != len(sizes) - 1
        ):
            raise UserError("what is picked from several axes cannot be written as ONNX")
        index = self.reshaped(Value(shapes[1], self.full(others[0], shapes[1])), tuple(index_shape))
        return self.add(output.shape, "Gather", x, index, axis=axis)

    def _scatter(self, given: Any, x: Value, others: list[Value], shapes: Any, output: Any) -> Value:
        """One row at a constant place."""
        index, update = others
        axes = given["dimension_numbers"].inserted_window_dims
        if index.array is None or len(axes) != 1 or index.array.size != 1:
            raise UserError("what is put at a place that depends on the input cannot be written as ONNX")
        (axis,), place, rank = axes, int(index.array.ravel()[0]), len(shapes[0])
        end = [np.iinfo(np.int64).max] * rank
        before = [0] * rank, [place if i == axis else end[i] for i in range(rank)]
        after = [place + 1 if i == axis else 0 for i in range(rank)], end
        row = tuple(1 if i == axis else size for i, size in enumerate(shapes[0]))
        parts = [self.reshaped(Value(shapes[2], self.full(update, shapes[2])), row).name]
        parts = [self.cut(x.name, *before)] * (place > 0) + parts
        parts += [self.cut(x.name, *after)] * (place < shapes[0][axis] - 1)
        return self.add(output.shape, "Concat", *parts, axis=axis)

    def _dynamic_slice(self, given: Any, x: Value, others: list[Value], shapes: Any, output: Any) -> Value:
        if any(value.array is None for value in others):
            raise UserError("what is cut at a place that depends on the input cannot be written as ONNX")
        sizes = given["slice_sizes"]
        limits = [whole - size for whole, size in zip(shapes[0], sizes, strict=True)]
        starts = [min(max(int(v.array), 0), limit) for v, limit in zip(others, limits, strict=True)]  # type: ignore
        return Value(tuple(sizes), self.cut(x.name, starts, [a + b for a, b in zip(starts, sizes, strict=True)]))


def _type(dtype: Any) -> int:
    name = np.dtype(dtype).name
    if name not in TYPES:
        raise UserError(f"arrays of {name} are not written as ONNX: make the network's dtype float32")
    return TYPES[name]
