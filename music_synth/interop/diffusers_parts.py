"""The networks of the diffusers port: its names of tensors and settings, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Their name of a tensor, without ".weight", and ours. Ours end in "kernel" where theirs is the transpose.
ENCODER_LAYER = {
    "layer.0.layer_norm": "pre_attention_layer_norm/scale",
    "layer.0.SelfAttention.q": "attention/query/kernel",
    "layer.0.SelfAttention.k": "attention/key/kernel",
    "layer.0.SelfAttention.v": "attention/value/kernel",
    "layer.0.SelfAttention.o": "attention/out/kernel",
    "layer.1.layer_norm": "pre_mlp_layer_norm/scale",
    "layer.1.DenseReluDense.wi_0": "mlp/wi_0/kernel",
    "layer.1.DenseReluDense.wi_1": "mlp/wi_1/kernel",
    "layer.1.DenseReluDense.wo": "mlp/wo/kernel",
}
DECODER_LAYER = {
    "layer.0.layer_norm": "pre_self_attention_layer_norm/scale",
    "layer.0.FiLMLayer.scale_bias": "FiLMLayer_0/DenseGeneral_0/kernel",
    "layer.0.attention.to_q": "self_attention/query/kernel",
    "layer.0.attention.to_k": "self_attention/key/kernel",
    "layer.0.attention.to_v": "self_attention/value/kernel",
    "layer.0.attention.to_out.0": "self_attention/out/kernel",
    "layer.1.layer_norm": "pre_cross_attention_layer_norm/scale",
    "layer.1.attention.to_q": "MultiHeadDotProductAttention_0/query/kernel",
    "layer.1.attention.to_k": "MultiHeadDotProductAttention_0/key/kernel",
    "layer.1.attention.to_v": "MultiHeadDotProductAttention_0/value/kernel",
    "layer.1.attention.to_out.0": "MultiHeadDotProductAttention_0/out/kernel",
    "layer.2.layer_norm": "pre_mlp_layer_norm/scale",
    "layer.2.DenseReluDense.wi_0": "mlp/wi_0/kernel",
    "layer.2.DenseReluDense.wi_1": "mlp/wi_1/kernel",
    "layer.2.DenseReluDense.wo": "mlp/wo/kernel",
    "layer.2.film.scale_bias": "FiLMLayer_1/DenseGeneral_0/kernel",
}
# Settings of every network: theirs and those of NetworkConfig.
SHARED = {
    "d_model": "model_dim",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "dropout_rate": "dropout_rate",
}

# Where diffusers 0.33.1 finds the encoders, by the index of a folder. Published folders say "spectrogram_diffusion",
# as it was before; reading one looks at neither.
LIBRARY = "diffusers.pipelines.deprecated.spectrogram_diffusion"


@dataclass(frozen=True)
class Part:
    """One network of the pipeline; its folder is called by its key in `NETWORKS`."""

    library: str  # in the index
    class_name: str
    ours: str  # in our parameters
    layers: str  # their name of the list of layers
    layer: Mapping[str, str]  # names of the tensors of each layer
    others: Mapping[str, str]  # and of those outside the layers
    settings: Mapping[str, str]  # beside those that all share
    fixed: Mapping[str, Any]  # settings that must be so

    def names(self, num_layers: int) -> dict[str, str]:
        """Their name of every tensor -> the path in our parameters, of both below the part."""
        names = dict(self.others)
        for i in range(num_layers):
            names |= {f"{self.layers}.{i}.{theirs}": f"layers_{i}/{ours}" for theirs, ours in self.layer.items()}
        return {f"{theirs}.weight": ours for theirs, ours in names.items()}


NETWORKS = {
    "notes_encoder": Part(
        f"{LIBRARY}.notes_encoder",
        "SpectrogramNotesEncoder",
        "token_encoder",
        "encoders",
        ENCODER_LAYER,
        {
            "token_embedder": "token_embedder/embedding",
            "position_encoding": "Embed_0/embedding",
            "layer_norm": "encoder_norm/scale",
        },
        {"vocab_size": "vocab_size", "max_length": "max_tokens", "num_layers": "num_encoder_layers"},
        {"feed_forward_proj": "gated-gelu", "is_decoder": False},
    ),
    "continuous_encoder": Part(
        f"{LIBRARY}.continuous_encoder",
        "SpectrogramContEncoder",
        "continuous_encoder",
        "encoders",
        ENCODER_LAYER,
        {
            "input_proj": "input_proj/kernel",
            "position_encoding": "Embed_0/embedding",
            "layer_norm": "encoder_norm/scale",
        },
        {"input_dims": "num_mels", "targets_context_length": "context_frames", "num_layers": "num_encoder_layers"},
        {"feed_forward_proj": "gated-gelu", "is_decoder": False},
    ),
    "decoder": Part(
        "diffusers",
        "T5FilmDecoder",
        "decoder",
        "decoders",
        DECODER_LAYER,
        {
            "conditioning_emb.0": "time_emb_dense0/kernel",
            "conditioning_emb.2": "time_emb_dense1/kernel",
            "position_encoding": "Embed_0/embedding",
            "continuous_inputs_projection": "continuous_inputs_projection/kernel",
            "decoder_norm": "decoder_norm/scale",
            "spec_out": "spec_out_dense/kernel",
        },
        {
            "input_dims": "num_mels",
            "targets_length": "target_frames",
            "max_decoder_noise_time": "max_noise_time",
            "num_layers": "num_decoder_layers",
        },
        {},
    ),
}
