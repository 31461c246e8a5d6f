"""Metadata and dependencies of music_synth; tool settings are in pyproject.toml.

The core plays MIDI files and trains from a folder of prepared arrays. Extras: `data` builds data sets (TensorFlow),
`eval` scores checkpoints beyond the log-mel error, `studio` serves the page to play in, `hub` fetches published models
by name, `dev` runs the tests, `docs` builds the site of docs/.

Tested with what a resolver picks in November 2026: on Python 3.11 (jax 0.10.2, flax 0.12.8) and on 3.12 (jax 0.12.0,
flax 0.12.12). Upper bounds stand only where the next release is known to break something; the comment says what.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    "jax>=0.10",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "gin-config>=0.5.0",
    "numpy>=2.2",
    "scipy>=1.15",
    "threadpoolctl>=3.5",  # one thread for eigenvalues: OpenBLAS's spin on cores that are shared
    "pretty_midi>=0.2.11",  # older ones need setuptools' pkg_resources, which setuptools 81 dropped
    "pyfluidsynth>=1.3.4",  # and the system library libfluidsynth3, for rendering only
    "soundfile>=0.12",
    "soxr>=0.5",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "safetensors>=0.5",
    "tensorstore>=0.1.70",  # T5X checkpoints; orbax needs it anyway
]

EXTRAS = {
    "data": [
        "tensorflow>=2.21",
        "tensorflow-datasets>=4.9.10",
        "seqio>=0.0.20",
        "note-seq>=0.0.5",
        "apache-beam>=2.69",
        "pyyaml>=6.0",
        "google-crc32c>=1.5",  # without it Beam cannot write TFRecords
        "sentencepiece<0.2.2",  # 0.2.2 registers a protobuf file that clashes with the one of seqio
    ],
    "eval": [
        "mir_eval>=0.8",
        "onnx>=1.17",  # writes inverters, for onnxruntime and others
        "onnxruntime>=1.20",
        "jinja2>=3.1",
    ],
    "studio": ["starlette>=0.45", "uvicorn>=0.34", "websockets>=15"],
    "hub": ["huggingface_hub>=1.0"],  # published models by name
    "dev": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "pytest-cov>=6.0",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.15",
        "pre-commit>=4.0",
        "tensorboard>=2.18",
        "selenium>=4.25",  # and Debian's chromium and chromium-driver: scripts/setup.sh --browser
    ],
    "docs": ["mkdocs-material>=9.6"],
}

setup(
    name="music_synth",
    version=re.search(r'^__version__ = "(.+?)"', (HERE / "music_synth/__init__.py").read_text(), re.MULTILINE)[1],
    description="MIDI in, music out: spectrogram decoders (diffusion and autoregressive) and inverters in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    # The recipes live in configs/ at the top of the checkout and ship as the package music_synth.configs.
    packages=find_packages(include=["music_synth", "music_synth.*"]) + ["music_synth.configs"],
    package_dir={"music_synth.configs": "configs"},
    package_data={
        "music_synth": ["shipped/*.md", "shipped/*/*"],
        "music_synth.configs": ["*.gin", "*/*.gin"],
        "music_synth.vocoder": ["*.safetensors", "*.md"],
        "music_synth.evaluation": ["*.jinja"],
        "music_synth.studio": ["static/*"],
    },
    entry_points={"console_scripts": ["music_synth=music_synth.__main__:run"]},
    zip_safe=False,
)
