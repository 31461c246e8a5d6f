"""Our decoders as T5X's models: recipes, axes, losses and checkpoints; where T5X is installed, its own steps."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth import config, runs
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.errors import UserError
from music_synth.gin_files import read
from music_synth.gin_objects import PARTS, Maker
from music_synth.interop import t5x
from music_synth.interop.t5x_model import DecoderModel
from music_synth.models.layers import NetworkConfig

RECIPES = sorted((config.configs_dir() / "t5x").glob("[!t]*.gin"))
SHAPES = {"note_tokens": (2, 64), "mel": (2, 16, 8), "context_mel": (2, 16, 8)}
NETWORK = NetworkConfig(
    model_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=2, num_mels=8,
    max_tokens=64, target_frames=16, context_frames=16, dropout_rate=0.0, note_roll=True, num_prior_layers=1,
)  # fmt: skip
DIFFUSION = Diffusion(
    NETWORK, condition_dropout=0.0, prediction_type="v", loss_target="v", sampler=Sampler(num_steps=2, clip_x_0=False)
)


def ours(name: str, path: Path) -> Path | None:
    """Of the files that a recipe includes, those that are not T5X's."""
    return next(iter(path.parent.parent.glob(name)), None)


def random_batch(rows: int = 2) -> dict:
    rng = np.random.default_rng(0)

    def mel() -> np.ndarray:
        return rng.uniform(-11, 2, (rows, 16, 8)).astype(np.float32)

    tokens = rng.integers(3, 1400, (rows, 64)).astype(np.int32)
    masks = {name: np.ones((rows, 16), bool) for name in ("mel_mask", "context_mask")}
    return {"note_tokens": tokens, "mel": mel(), "context_mel": mel(), **masks}


def mean_of(metric) -> float:
    """What a metric of clu says, which divides a float by an integer."""
    with jax.numpy_dtype_promotion("standard"):
        return float(metric.compute())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_t5x_make_the_decoders_of_ours(path):
    maker = Maker(read(path, ours), PARTS, str(path))
    made = [maker.value("DecoderModel.decoder"), maker.value("task.tokenizer")]
    assert made == config.build_parts([path.name], ["MAX_TOKENS=1024"], "train.model", "Feed.tokenizer")
    assert f"python -m t5x.train --gin_search_paths=configs --gin_file=t5x/{path.name} " in path.read_text()
    for file in (path, path.parent / "training.gin"):
        for package, module in re.findall(r"from (music_synth\S*) import (\w+)", file.read_text()):
            bound = re.findall(rf"\b{module}\.(\w+)[.(:]", file.read_text())
            assert bound and all(hasattr(importlib.import_module(f"{package}.{module}"), name) for name in bound)


def test_axes_are_those_of_t5x():
    """Names in its `standard_logical_axis_rules` and `standard_logical_factor_rules`, one for every dimension."""
    known = {"vocab", "embed", "mlp", "joined_kv", "relpos_buckets", "layers", "mlp_activations"}
    for network in (NETWORK, dataclasses.replace(NETWORK, scan_layers=True),
                    dataclasses.replace(NETWORK, decoder="convolutional")):  # fmt: skip
        variables = jax.eval_shape(
            lambda key, network=network: DecoderModel(
                dataclasses.replace(DIFFUSION, network=network)
            ).get_initial_variables(key, SHAPES),
            jax.random.PRNGKey(0),
        )
        leaves = jax.tree.leaves_with_path(variables["params"])
        for path, leaf in leaves:
            axes = variables["params_axes"]
            for part in path[:-1]:
                axes = axes[part.key]
            names = axes[f"{path[-1].key}_axes"].names
            assert len(names) == leaf.ndim and set(names) <= known
            assert len(set(names)) == len(names) or set(names) >= {"relpos_buckets"}


def test_the_loss_is_ours_and_the_covariance_moves_beside_the_parameters():
    model, batch = DecoderModel(DIFFUSION), random_batch()
    variables = model.get_initial_variables(jax.random.PRNGKey(3), SHAPES)
    params, mutables = variables["params"], flax.core.freeze({"statistics": variables["statistics"]})
    loss, (metrics, after) = model.loss_fn(params, batch, jax.random.PRNGKey(1), mutables)
    expected, found = DIFFUSION.loss(params, batch, jax.random.wrap_key_data(jax.random.PRNGKey(1)), True)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(mean_of(metrics["loss"]), expected, rtol=1e-6)
    assert after["statistics"]["updates"] == 1
    new = after["statistics"]["prior"]["covariance"]  # of the first batch alone, as the first update's rate is 1
    np.testing.assert_allclose(new, found["statistics"]["prior"]["covariance"], rtol=1e-4, atol=1e-6)
    held_out, metrics = model.eval_fn(params, batch, after)
    assert held_out == model.eval_fn(params, batch, after)[0] and mean_of(metrics["loss"]) == held_out
    mel = model.predict_batch(params, batch, jax.random.PRNGKey(0), after)
    joined = params | {"prior": params["prior"] | {"covariance": new}}
    np.testing.assert_allclose(mel, DIFFUSION.sample(joined, batch, jax.random.key(0)), rtol=1e-4, atol=1e-4)
    assert model.score_batch(params, batch, flax_mutables=after).shape == (2,)


def test_batches_that_do_not_suit_are_refused():
    model = DecoderModel(DIFFUSION)
    with pytest.raises(UserError, match=r"TASK_FEATURE_LENGTHS\['inputs'\] = 65 is more than"):
        model.get_initial_variables(jax.random.PRNGKey(0), SHAPES | {"note_tokens": (2, 65)})
    with pytest.raises(UserError, match=r"mel is \(17, 8\) a segment, the network's \(16, 8\)"):
        model.get_initial_variables(jax.random.PRNGKey(0), SHAPES | {"mel": (2, 17, 8)})
    with pytest.raises(UserError, match="segments are not packed"):
        model.FEATURE_CONVERTER_CLS(pack=True)
    assert "context_mel" in model.FEATURE_CONVERTER_CLS(pack=False).MODEL_FEATURES


def test_a_checkpoint_of_its_run_is_read(tmp_path):
    """Sizes from the run's own config.gin, the covariance from the flax_mutables beside the parameters."""
    path = next(path for path in RECIPES if path.stem == "diffusion")
    lines = [f"import {module.replace(':', '.')}" for module in PARTS.values()]
    lines += [f"{key} = {value!r}" for key, value in read(path, ours).items()]
    lines += ["NetworkConfig.model_dim = 16", "NetworkConfig.mlp_dim = 16", "NetworkConfig.num_decoder_layers = 1"]
    (tmp_path / "config.gin").write_text("\n".join(lines))
    model = Maker(read(tmp_path / "config.gin", ours), PARTS).value("DecoderModel.decoder")
    params = model.init(jax.random.key(0))
    folder = t5x.write(tmp_path, 5, params)
    contents = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    covariance = 2.0 * np.eye(128, dtype=np.float32)
    contents["optimizer"]["flax_mutables"] = {"statistics": {"prior": {"covariance": covariance}, "updates": 5}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    loaded = runs.load(tmp_path)
    assert (loaded.model, loaded.step, loaded.tokenizer.velocity_bins) == (model, 5, 32)
    np.testing.assert_array_equal(loaded.params["prior"]["covariance"], covariance)
    del params["prior"]["covariance"], loaded.params["prior"]["covariance"]
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.tree.map(np.asarray, params))


@pytest.mark.skipif(importlib.util.find_spec("t5x") is not None, reason="T5X is installed")
def test_without_t5x_nothing_is_trained_by_it():
    with pytest.raises(UserError, match="T5X is not installed: pip install"):
        DecoderModel(DIFFUSION, optimizer_def=object())


@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_steps_of_t5x_itself():
    """Where T5X is installed: its partitioner, Adafactor and train step, and a loss that falls."""
    pytest.importorskip("t5x", reason="T5X is not installed")
    from t5x import adafactor, models, partitioning, trainer, utils

    rules = adafactor.standard_logical_factor_rules()
    model = DecoderModel(DIFFUSION, adafactor.Adafactor(logical_factor_rules=rules))
    assert isinstance(model, models.BaseModel)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(model.optimizer_def, model.get_initial_variables, SHAPES, partitioner)
    state, batch = initializer.from_scratch(jax.random.PRNGKey(0)), random_batch()
    step = jax.jit(
        lambda state, batch: trainer.train_with_lr(
            state, batch, jnp.float32(0.02), jax.random.PRNGKey(1), model, num_microbatches=None
        )
    )
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(mean_of(metrics["loss"]))
    assert losses[-1] < losses[0] and int(state.step) == 5
    assert int(state.flax_mutables["statistics"]["updates"]) == 5
