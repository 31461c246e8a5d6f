"""Models of other projects, opened: ONNX files by onnxruntime, SavedModels by TensorFlow, both on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from music_synth.errors import UserError, needing

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}  # of ONNX
SIGNATURE = "serving_default"  # what TensorFlow calls the function of a SavedModel that is to be served


def open_onnx(path: Path) -> InferenceSession:
    """Opens an ONNX file; UserError if onnxruntime is not installed, there is no such file, or it is not ONNX."""
    if not path.is_file():
        raise UserError(f"no file {path}: name an ONNX file")
    with needing(f"{path} needs onnxruntime", "eval"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised; it need not print them too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads burn no CPU time
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # every kind that onnxruntime raises is a child of Exception itself
        raise UserError(f"{path} is no ONNX file that onnxruntime can run: {reason(error)}") from error


def open_saved_model(path: Path, trust: bool) -> tuple[Any, Any]:
    """Loads the model in a folder, and the module `tf`. UserError if TensorFlow is missing or cannot load it.

    trust: that the model, which is a program, may run; without it that is a UserError too.
    """
    check_trust(path, trust)
    with needing(f"{path} needs TensorFlow", "data"):
        from music_synth.data.quiet_tensorflow import tf
    try:
        return tf.saved_model.load(str(path)), tf
    except Exception as error:  # OSError, ValueError, KeyError and protobuf's own
        raise UserError(f"{path} is no SavedModel that TensorFlow can load: {reason(error)}") from error


def check_trust(path: Any, trust: bool) -> None:
    """Raises a UserError if a SavedModel is not trusted."""
    if not trust:
        raise UserError(
            f"{path} is a SavedModel, which is a program: it can read and write files here. If you trust who made"
            " it, add --trust (in Python trust=True)"
        )


def reason(error: Exception) -> str:
    """Returns the first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
