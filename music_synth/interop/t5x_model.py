"""Our decoders for T5X, which trains them by its own loop, partitioning, optimizers and checkpoints:

    python -m t5x.train --gin_search_paths=configs --gin_file=t5x/diffusion.gin --gin.MODEL_DIR=\\"runs/t5x\\"

T5X is on no package index, and nothing else of this package needs it; where it is not installed, `DecoderModel` is
the same without its base class. What it trained is converted as every checkpoint of T5X (`docs/checkpoints.md`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import clu.metrics
import jax
import jax.numpy as jnp
from flax.linen.partitioning import AxisMetadata

from music_synth.data.examples import SegmentSettings
from music_synth.data.seqio_windows import NoteToMelFeatureConverter, open_provider
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.base import Batch, Params, SpectrogramModel
from music_synth.training.step import with_statistics

BaseModel: type = object
try:
    from t5x.models import BaseModel  # type: ignore[no-redef]
except ImportError:
    pass

log = logging.getLogger(__name__)
Array = jax.Array
# Logical axes that T5X's rules of partitioning and factoring do not know -> those that it keeps whole on every device
# and does, or does not, factor.
AXES = {"mel": "mlp_activations", "length": "relpos_buckets", "tap": "relpos_buckets", "envelope": "relpos_buckets"}
WHOLE = "relpos_buckets"


class FeatureConverter(NoteToMelFeatureConverter):
    """`NoteToMelFeatureConverter` as T5X makes one. UserError if it is to pack: a segment is a row by itself."""

    def __init__(self, context: bool, pack: bool = False, use_custom_packing_ops: bool = False):
        if pack or use_custom_packing_ops:
            raise UserError("utils.DatasetConfig.pack = True: segments are not packed; set it to False")
        super().__init__(context=context)


class DecoderModel(BaseModel):
    """A `Diffusion` or `Autoregressive` as a model of T5X.

    Where the decoder has a prior, its running covariance is a flax_mutable, beside the parameters: no gradient reaches
    it. Losses are means, so T5X's micro-batches, whose gradients it adds up, suit optimizers without a scale, such as
    Adafactor.
    """

    def __init__(self, decoder: SpectrogramModel, optimizer_def: Any = None):
        """optimizer_def: of T5X; None: the model is not to be trained. UserError: there is one, and no T5X."""
        if optimizer_def is not None and BaseModel is object:
            raise UserError(
                "T5X is not installed: pip install git+https://github.com/google-research/t5x, or train here"
            )
        self.decoder, self.optimizer_def = decoder, optimizer_def
        self.FEATURE_CONVERTER_CLS = functools.partial(FeatureConverter, context=decoder.network.context_frames > 0)

    def get_initial_variables(
        self, rng: Array, input_shapes: Mapping[str, tuple[int, ...]], input_types: Any = None
    ) -> dict[str, Any]:
        """Makes {"params", "params_axes"} and, of a decoder with a prior, {"statistics", "statistics_axes"}.

        Raises:
            UserError: batches of these shapes are not what the network reads.
        """
        network = self.decoder.network
        lengths = {"mel": network.target_frames, "context_mel": network.context_frames}
        for name, length in lengths.items():
            if length and input_shapes[name][1:] != (length, network.num_mels):
                raise UserError(f"{name} is {input_shapes[name][1:]} a segment, the network's ({length}, "
                                f"{network.num_mels}): set TASK_FEATURE_LENGTHS and NetworkConfig alike")  # fmt: skip
        if input_shapes["note_tokens"][1] > network.max_tokens:
            raise UserError(
                f"TASK_FEATURE_LENGTHS['inputs'] = {input_shapes['note_tokens'][1]} is more than"
                f" NetworkConfig.max_tokens = {network.max_tokens}"
            )
        variables: dict[str, Any] = {"params": self.decoder.init(typed(rng)), "params_axes": self._axes()}
        if network.num_prior_layers:
            covariance = variables["params"]["prior"]["covariance"]
            variables["statistics"] = {"prior": {"covariance": covariance}, "updates": jnp.zeros((), jnp.int32)}
            axes = {"covariance_axes": AxisMetadata((None, None))}
            variables["statistics_axes"] = {"prior": axes, "updates_axes": AxisMetadata(())}
        return variables

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None, flax_mutables: Any = None
    ) -> tuple[Array, Any]:
        """Computes the loss of a batch, and its metrics or (metrics, flax_mutables); dropout_rng None: no dropout."""
        train = dropout_rng is not None
        if dropout_rng is not None:
            key = typed(dropout_rng)
        else:
            key = jax.random.fold_in(jax.random.key(0), jnp.sum(batch["note_tokens"]))
        loss, found = self.decoder.loss(with_mutables(params, flax_mutables), batch, key, train)
        statistics: Any = found.pop("statistics", {})
        metrics = {
            name: clu.metrics.Average.from_model_output(value[None]) for name, value in ({"loss": loss} | found).items()
        }
        if not flax_mutables:
            return loss, metrics
        kept = flax_mutables["statistics"]
        if train:
            means = with_statistics({"prior": kept["prior"]}, statistics, kept["updates"])
            kept = jax.lax.stop_gradient(means | {"updates": kept["updates"] + 1})
        return loss, (metrics, type(flax_mutables)({"statistics": kept}))

    def eval_fn(self, params: Params, batch: Batch, flax_mutables: Any = None) -> tuple[Array, Any]:
        """Computes the loss of a held-out batch, and its metrics."""
        loss, found = self.loss_fn(params, batch, None, flax_mutables)
        return loss, found[0] if flax_mutables else found

    def predict_batch_with_aux(
        self, params: Params, batch: Batch, rng: Array | None = None, flax_mutables: Any = None
    ) -> tuple[Array, dict[str, Array]]:
        """Samples log-mel [B, T, M] of notes and context."""
        key = jax.random.key(0) if rng is None else typed(rng)
        return self.decoder.sample(with_mutables(params, flax_mutables), batch, key), {}

    def predict_batch(self, params: Params, batch: Batch, rng: Array | None = None, flax_mutables: Any = None) -> Array:
        """Samples log-mel [B, T, M] of notes and context."""
        return self.predict_batch_with_aux(params, batch, rng, flax_mutables)[0]

    def score_batch(
        self, params: Params, batch: Batch, return_intermediates: bool = False, flax_mutables: Any = None
    ) -> Array:
        """Computes minus the loss of each segment [B]: it ranks, and is no likelihood."""

        def one(row: Batch) -> Array:
            return -self.eval_fn(params, jax.tree.map(lambda a: a[None], row), flax_mutables)[0]

        return jax.vmap(one)(batch)

    def _axes(self) -> dict[str, Any]:
        def named(node: Any) -> Any:
            if isinstance(node, dict):
                return {name + "_axes" * (not isinstance(child, dict)): named(child) for name, child in node.items()}
            return AxisMetadata(tuple(WHOLE if name is None else AXES.get(name, name) for name in node))

        return named(self.decoder.logical_axes())


def typed(rng: Array) -> Array:
    """Makes a key of one, or of the uint32 numbers that T5X passes around."""
    return rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(rng)


def with_mutables(params: Any, flax_mutables: Any) -> Params:
    """Puts what T5X keeps beside the parameters into them."""
    params = plain(params)
    if not flax_mutables:
        return params
    return params | {"prior": params["prior"] | plain(flax_mutables["statistics"]["prior"])}


def plain(tree: Any) -> Any:
    """Makes nested dictionaries of nested mappings."""
    return {name: plain(child) for name, child in tree.items()} if isinstance(tree, Mapping) else tree


def task(name: str, tokenizer: Tokenizer, context: bool = True, empty_context: float = 0.1) -> str:
    """Registers a task or mixture of this package for a tokenizer, builds what can be built, and returns its name.

    Raises:
        UserError: as of `open_provider`.
    """

    def on_skip(piece: str, seconds: float) -> None:
        log.warning("skipped a window of %s at %.2f s: more than %d tokens", piece, seconds, tokenizer.max_tokens)

    settings = SegmentSettings(
        task=name, batch_size=1, tokenizer=tokenizer, context=context, empty_context=empty_context
    )
    return open_provider(settings, on_skip).name
