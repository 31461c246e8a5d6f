"""Files of named arrays, mapped into memory instead of read: safetensors, and torch's .bin without torch.

Parameters of gigabytes are there at once, and only what is looked at takes memory, which the system can take back.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from music_synth.errors import UserError

SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
MAX_PICKLE = 2**24  # bytes of the list of tensors in a file of torch; that of a model has some 100 kB
TORCH_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a .safetensors file, or else of one of `torch.save`, by name. They cannot be written to.

    Raises:
      UserError: there is no such file, it is damaged, or it holds anything but arrays of floating point.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    kind, read = ("safetensors", _safetensors) if path.suffix == ".safetensors" else ("a file of torch", _torch)
    try:
        return read(path, np.asarray(np.memmap(path, np.uint8, "r")))
    except Exception as error:  # damaged bytes can raise nearly anything
        raise UserError(f"{path} cannot be read as {kind} ({error or type(error).__name__}): get it again") from error


def _safetensors(path: Path, data: np.ndarray) -> dict[str, np.ndarray]:
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        raise ValueError("it ends within its header")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is of {entry['dtype']}, not of floating point")
        dtype, (begin, end) = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), entry["data_offsets"]
        if end - begin != dtype.itemsize * math.prod(entry["shape"]) or not 0 <= begin <= end <= len(data) - start:
            raise ValueError(f"{name} reaches beyond the end of the file")
        tensors[name] = data[start + begin : start + end].view(dtype).reshape(entry["shape"])
    return tensors


def _torch(path: Path, data: np.ndarray) -> dict[str, np.ndarray]:
    """A zip with a pickle `data.pkl` and the bytes of each tensor in a file of its own (torch.save since torch 1.6)."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip file; torch before 1.6 wrote others, which torch.load and torch.save make new")
    with zipfile.ZipFile(path) as archive:
        root = next((name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]), None)
        if root is None:
            raise ValueError("the zip file holds no data.pkl")
        root = root.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its bytes are in big-endian order")

        def storage(dtype: Any, key: str) -> np.ndarray:
            member = archive.getinfo(f"{root}data/{key}")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its tensors are compressed")
            # The local header: 30 bytes, the last four of which are the lengths of the name and of what follows it.
            lengths = data[member.header_offset + 26 : member.header_offset + 30].view(np.uint16)
            begin = member.header_offset + 30 + int(lengths.sum(dtype=np.int64))
            return data[begin : begin + member.file_size].view(dtype)

        if archive.getinfo(f"{root}data.pkl").file_size > MAX_PICKLE:
            raise ValueError("its list of tensors is too long")
        tensors = _StateDict(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()
    if not isinstance(tensors, dict) or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise ValueError("it is no state dict: names and tensors")
    return dict(tensors)


class _StateDict(pickle.Unpickler):
    """Reads the pickle of a state dict. A pickle can call whatever it names; this one knows a few names, all harmless.

    storage: (dtype, key) -> the elements that lie under a key, [n].
    """

    def __init__(self, file: io.BytesIO, storage: Callable[[Any, str], np.ndarray]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        if f"{module}.{name}" not in known:
            raise ValueError(f"it holds a {module}.{name}, which no state dict of floating-point tensors needs")
        return known[f"{module}.{name}"]

    def persistent_load(self, identifier: tuple) -> np.ndarray:
        _, dtype, key, *_ = identifier
        return self.storage(dtype, key)


def _rebuild_tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *strides)) < 0 or (0 not in shape and last >= len(storage)) or math.prod(shape) > len(storage):
        raise ValueError("a tensor reaches beyond its bytes")
    bytes_ = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_, writeable=False)
