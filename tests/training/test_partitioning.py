"""One program on one device, on eight, and in two processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from music_synth.autoregressive.objective import Autoregressive
from music_synth.diffusion.objective import Diffusion
from music_synth.errors import UserError
from music_synth.models.layers import NetworkConfig
from music_synth.training import partitioning
from music_synth.training.checkpoint import load_params, saved_steps
from music_synth.training.optimizer import adafactor, adamw
from music_synth.training.step import create_state
from tests import tiny_runs
from tests.training.toy import Toy

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]


def run(model_dir, *arguments, devices=1):
    environment = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    command = [sys.executable, "-m", "tests.training.toy", str(model_dir), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def losses(model_dir, process, name="train/loss"):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    lines = map(json.loads, (Path(model_dir) / "metrics.jsonl").read_text().splitlines())
    return np.array([line[name] for line in lines if name in line]), output


def test_eight_devices_give_the_losses_of_one(tmp_path):
    arguments = ("num_steps=6", "log_every=1", "num_samples=2", "eval_every=3")
    layouts = {
        "one": (1, ()),
        "data": (8, ()),
        "data and model": (8, ("model_parallelism=2",)),
    }
    processes = {
        name: run(tmp_path / name, *arguments, *extra, devices=devices) for name, (devices, extra) in layouts.items()
    }
    found = {name: losses(tmp_path / name, process) for name, process in processes.items()}
    expected, output = found.pop("one")
    assert len(expected) == 6 and "1 cpu device" in output
    for name in ("data", "data and model"):
        actual, output = found[name]
        assert "8 cpu device" in output
        np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)
        held_out = [losses(tmp_path / n, processes[n], "eval/loss")[0] for n in ("one", name)]
        np.testing.assert_allclose(*held_out, rtol=1e-5)
    params = [load_params(tmp_path / name)[0] for name in ("one", "data and model")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *params)


def test_two_processes_train_together_and_agree_with_one(tmp_path):
    address = free_address()
    arguments = ("num_steps=4", "log_every=1", "checkpoint_every=2", "num_samples=2", "model_parallelism=2")
    both = [run(tmp_path / "two", *arguments, f"process=2/{i}/{address}", devices=2) for i in range(2)]
    alone = run(tmp_path / "one", *arguments, devices=4)
    expected, _ = losses(tmp_path / "one", alone)
    actual, output = losses(tmp_path / "two", both[0])
    assert "4 cpu device" in output
    _, errors = both[1].communicate(timeout=300)
    assert both[1].returncode == 0, errors
    assert len(expected) == 4
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    params = [load_params(tmp_path / name)[0] for name in ("one", "two")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *params)
    # And what two processes saved, one goes on from.
    more, _ = losses(tmp_path / "two", run(tmp_path / "two", "num_steps=6", "log_every=1"))
    assert len(more) == 6


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path):
    address = free_address()
    arguments = ("num_steps=100000", "delay=0.05", "checkpoint_every=20")
    both = [run(tmp_path, *arguments, f"process=2/{i}/{address}") for i in range(2)]
    end = time.monotonic() + 300
    while not (tmp_path / "checkpoints" / "20").exists() and time.monotonic() < end:
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1].strip().splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    stopped_at = max(saved_steps(tmp_path / "checkpoints"))
    assert stopped_at > 20
    assert said[0] == said[1]
    assert f"error: stopped by SIGTERM after step {stopped_at}: checkpoint saved in {tmp_path}" in said[0]


@pytest.mark.slow
def test_the_real_decoder_gives_the_same_losses_on_eight_devices(tmp_path):
    prepared = tiny_runs.prepare(tmp_path / "prepared")
    argv = ["--gin_file=diffusion.gin", "--gin_file=smoke.gin", f"--gin.TASK={prepared}", "--gin.BATCH_SIZE=8"]
    argv += ["--gin.train.log_every=1", "--gin.train.num_samples=0", "--gin.NetworkConfig.scan_layers=True"]

    def start(name, devices, *more):
        environment = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
        command = [sys.executable, "-m", "music_synth.train", *argv, f"--gin.MODEL_DIR={tmp_path / name}", *more]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    processes = {"one": start("one", 1), "eight": start("eight", 8, "--gin.train.model_parallelism=2")}
    (expected, _), (actual, output) = (losses(tmp_path / name, process) for name, process in processes.items())
    assert "8 cpu device" in output and len(expected) == 3
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_real_decoders_split_their_kernels(scan_layers):
    class TwoModelDevices:
        shape = {"data": 4, "model": 2}

    network = NetworkConfig(scan_layers=scan_layers)
    for model in (Diffusion(network), Autoregressive(network)):
        shapes = jax.eval_shape(model.init, jax.random.key(0))

        def is_split(leaf, names):
            return any(map(partial(partitioning.mesh_axis, TwoModelDevices), names, leaf.shape))

        leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(is_split, shapes, model.logical_axes()))
        split = {"/".join(key.key for key in path): truth for path, truth in leaves}
        heavy = {name for name in split if re.search(r"attention/|Attention_0/|mlp/|token_embedder/", name)}
        assert len(heavy) > 20 or scan_layers
        assert all(split[name] for name in heavy), [name for name in heavy if not split[name]]


def layout(optimizer=adamw(1e-2), model=Toy(), mesh=None):  # noqa: B008
    shapes = jax.eval_shape(lambda: create_state(model, optimizer, jax.random.key(0), 0.9))
    return partitioning.state_shardings(mesh or partitioning.make_mesh(), shapes, model.logical_axes())


def test_rules_lay_parameters_and_moments_out_alike():
    state = layout()
    assert state.params["notes"]["embedding"].spec == PartitionSpec("model", None)
    assert state.params["context"]["wi"]["kernel"].spec == PartitionSpec(None, "model")
    assert state.params["context"]["wo"]["kernel"].spec == PartitionSpec("model", None)
    assert state.ema_params == state.params
    moments = [leaf.spec for leaf in jax.tree.leaves(state.opt_state)]
    assert moments.count(PartitionSpec("model", None)) == 4  # two parameters, two moments each
    assert state.step.spec == state.rng.spec == PartitionSpec()


def test_factored_moments_stay_whole():
    state = layout(adafactor(1e-2, min_dim_to_factor=4))
    factored = state.opt_state[0]
    assert factored.v_row["context"]["wi"]["kernel"].spec == PartitionSpec()
    assert jax.tree.structure(factored.v) == jax.tree.structure(state.params)


def test_a_dimension_that_the_mesh_does_not_divide_stays_whole():
    mesh = partitioning.make_mesh()

    class Mesh3:
        shape = {"data": 1, "model": 3}

    rules = partitioning.mesh_axis
    assert rules(Mesh3, "mlp", 8) is None
    assert rules(Mesh3, "mlp", 9) == "model"
    assert rules(Mesh3, "layers", 9) is None and rules(Mesh3, None, 9) is None
    assert mesh.shape == {"data": 1, "model": 1}


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="model_parallelism = 3: must divide the number of devices, 1"):
        partitioning.make_mesh(3)
    with pytest.raises(UserError, match="num_microbatches = 0"):
        partitioning.check_batch_size(partitioning.make_mesh(), 8, 0)
    with pytest.raises(ValueError, match="do not fit shape"):
        partitioning.param_shardings(
            partitioning.make_mesh(), {"a": jax.ShapeDtypeStruct((2, 2), "float32")}, {"a": ("mlp",)}
        )
