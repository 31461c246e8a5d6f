"""The published models: what the tensors of a checkpoint and the gin file of its training say of them, and the reverse.

Names, defaults and semantics are those of music-spectrogram-diffusion (docs/spec.md 3.14-3.18). A tensor tells
sizes. What it does not tell is in the gin file; without one it is assumed to be as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from music_synth.autoregressive.objective import Autoregressive
from music_synth.autoregressive.outputs import Deterministic, GaussianMixture
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule, LinearSchedule
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer
from music_synth.midi.vocabulary import Vocabulary
from music_synth.models.base import SpectrogramModel
from music_synth.models.layers import NetworkConfig

HEAD_DIM = 64
GUIDANCE_SCALE = 2.0  # as the released models play; the class's default, 5, is in no released configuration
SAMPLERS = ("ddpm", "ddim")  # that the published code has
ATTEND_STYLES = {"concat": "concat_encodings", "sum": "sum_cross_attends"}
FIXED = {  # what their code could also do, and ours cannot
    "T5Config.mlp_activations": ("gelu", "linear"),
    "NoteRepresentationConfig.onsets_only": False,
    "VocabularyConfig.steps_per_second": 100,
    "T5Config.logits_via_embedding": False,
}


def model_of(
    params: Mapping[str, Any], given: Mapping[str, Any], where: Any, num_heads: int | None = None
) -> tuple[SpectrogramModel, Tokenizer, list[str]]:
    """The model and tokenizer that parameters belong to.

    Args:
        params: nested dictionaries of arrays, named as published.
        given: what the gin file binds (`gin_files.read_values`); empty where there is none.
        where: for messages.
        num_heads: of the attention, where no gin file says it; None: as many as have 64 channels.

    Returns:
        model, tokenizer, and a line on each setting that neither the tensors nor the gin file tell.

    Raises:
        UserError: a network of another kind, a tensor without which nothing can be told, a setting we do not have.
    """
    for name, ours in FIXED.items():
        if _plain(given.get(name, ours)) != ours:
            raise UserError(f"{where}: {name} = {given[name]!r} cannot be had here, only {ours!r}")

    def shape(path: str) -> tuple[int, ...]:
        node: Any = params
        for part in path.split("/"):
            node = node.get(part) if isinstance(node, Mapping) else None
        if getattr(node, "ndim", 0) != (1 if path.endswith("scale") else 2):
            raise UserError(f"{where} has no {path}: it is no network of music-spectrogram-diffusion, or not whole")
        return node.shape

    num_mels = shape("decoder/continuous_inputs_projection/kernel")[0]
    channels = shape("decoder/spec_out_dense/kernel")[1]
    encoder = "token_encoder" if "token_encoder" in params else "encoder"
    is_diffusion = "time_emb_dense0" in params["decoder"]
    lengths = given.get("TASK_FEATURE_LENGTHS") or {}

    def length(name, table, default):
        return lengths.get(name) or (shape(table)[0] if table else default)

    # The gin file has the last word, so that a tensor it does not fit is named when shapes are compared.
    def size(name, told):
        return value if isinstance(value := given.get(f"T5Config.{name}"), int) else told

    vocab_size, model_dim = shape(f"{encoder}/token_embedder/embedding")
    width = shape("decoder/layers_0/self_attention/query/kernel")[1]
    if "T5Config.num_heads" in given:
        num_heads = given["T5Config.num_heads"]
    head_dim = given.get("T5Config.head_dim", width // num_heads if num_heads else HEAD_DIM)
    heads = num_heads or width // head_dim
    if heads * head_dim != width:
        mend = "correct its gin file" if "T5Config.num_heads" in given else "convert it with --num_heads"
        raise UserError(f"{where}: attention of width {width} is not {heads} heads of {head_dim}: {mend}")
    bins = given.get("VocabularyConfig.num_velocity_bins", given.get("NUM_VELOCITY_BINS"))
    if bins is None:
        bins = next((n for n in (1, 127) if Vocabulary(n).num_embeddings == vocab_size), 1)
    shift_steps = 100 * given.get("VocabularyConfig.max_shift_seconds", 10)
    context_table = "continuous_encoder/Embed_0/embedding" if "continuous_encoder" in params else ""
    config = NetworkConfig(
        vocab_size=size("vocab_size", vocab_size),
        model_dim=size("emb_dim", model_dim),
        num_heads=heads,
        head_dim=head_dim,
        mlp_dim=size("mlp_dim", shape("decoder/layers_0/mlp/wi_0/kernel")[1]),
        num_encoder_layers=size("num_encoder_layers", _num_layers(params[encoder])),
        num_decoder_layers=size("num_decoder_layers", _num_layers(params["decoder"])),
        num_mels=num_mels,
        max_tokens=length("inputs", f"{encoder}/Embed_0/embedding" * is_diffusion, 2048),
        target_frames=length("targets", "decoder/Embed_0/embedding" * is_diffusion, 256),
        context_frames=length("targets_context", context_table, 0),
        dropout_rate=given.get("T5Config.dropout_rate", 0.1),
        dtype=given.get("T5Config.dtype", "float32"),
        context_positions=given.get(
            "T5Config.context_positions", "regular" if given and context_table else "terminal_relative"
        ),
        cross_attention="sum" if "MultiHeadDotProductAttention_1" in params["decoder"]["layers_0"] else "concat",
        vocabulary=Vocabulary(bins, shift_steps),
        max_noise_time=float(given.get("T5Config.max_decoder_noise_time", 20000.0)),
    )
    tokenizer = Tokenizer(
        velocity_bins=bins,
        granularity=given.get("map_midi_programs.granularity_type", given.get("PROGRAM_GRANULARITY")) or "full",
        ties=given.get("NoteRepresentationConfig.include_ties", True),
        segment_frames=config.target_frames,
        max_tokens=config.max_tokens,
        max_shift_steps=shift_steps,
    )
    try:
        model = _diffusion(config, channels, given) if is_diffusion else _autoregressive(config, channels, given)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    assumed = [
        f"{heads} heads of {head_dim}",
        f"dropout {config.dropout_rate}",
        f"{bins} velocity bin{'s' * (bins > 1)}",
        f"programs {tokenizer.granularity}",
    ]
    if isinstance(model, Diffusion):
        assumed += [f"prediction of {model.prediction_type}", "the cosine schedule"]
        assumed += [f"{config.context_positions} positions of the context"] * bool(config.context_frames)
    elif "inputs" not in lengths:
        assumed += [f"{config.max_tokens} tokens and {config.target_frames} frames a segment"]
    return model, tokenizer, [] if given else assumed


def _diffusion(config: NetworkConfig, channels: int, given: Mapping[str, Any]) -> Diffusion:
    def schedule(scope: str) -> CosineSchedule | LinearSchedule:
        def get(name, default):
            return _scoped(given, scope, f"DiffusionSchedule.{name}", default)

        if get("name", "cosine") == "linear":
            return LinearSchedule(get("start", 1e-4), get("stop", 0.02), get("num_steps", 1000))
        return CosineSchedule()

    if schedule("train") != schedule("sampler"):
        raise ValueError("the schedule of the sampler differs from that of the training, which cannot be had here")
    both = "x0_and_eps" if channels == 2 * config.num_mels else "eps"
    return Diffusion(
        network=config,
        schedule=schedule("train"),
        prediction_type=given.get("DiffusionConfig.model_output", both),
        loss_target=given.get("DiffusionConfig.loss_type", "eps"),
        loss_norm=given.get("DiffusionConfig.loss_norm", "l1"),
        condition_dropout=given.get("ClassifierFreeGuidanceConfig.drop_condition_prob", 0.1),
        sampler=Sampler(
            name=given.get("SamplerConfig.name", "ddpm"),
            num_steps=_scoped(given, "sampler", "DiffusionSchedule.num_steps", 1000),
            guidance_scale=float(given.get("ClassifierFreeGuidanceConfig.eval_condition_weight", GUIDANCE_SCALE)),
            variance=given.get("SamplerConfig.logvar_type", "large"),
            clip_x_0=given.get("SamplerConfig.clip_x0", True),
        ),
    )


def _autoregressive(config: NetworkConfig, channels: int, given: Mapping[str, Any]) -> Autoregressive:
    output: Deterministic | GaussianMixture = Deterministic(given.get("Deterministic.sampling_dither_amount", 0.0))
    if channels != config.num_mels:
        output = GaussianMixture(channels // (1 + 2 * config.num_mels) or 1)
    return Autoregressive(network=config, output=output, as_published=True)


def _scoped(given: Mapping[str, Any], scope: str, name: str, default: Any) -> Any:
    value = given.get(f"{scope}/{name}", given.get(name))
    return default if value is None else value


def _num_layers(stack: Mapping[str, Any]) -> int:
    return sum(name.startswith("layers_") for name in stack)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# --- out ---------------------------------------------------------------------------------------------------------


def check_published(model: Any) -> None:
    """UserError unless the published networks compute what that of `model` does from the same parameters."""
    reasons = []
    if not isinstance(model, (Diffusion, Autoregressive)):
        raise UserError(f"a {type(model).__name__} is no decoder: the published code has none")
    if model.network.note_roll:
        reasons.append("NetworkConfig.note_roll")
    if model.network.scan_layers:
        reasons.append("NetworkConfig.scan_layers, which stacks the layers' parameters")
    if isinstance(model, Autoregressive):
        if not model.as_published:
            reasons.append("Autoregressive that is not as_published")
        elif model.network.context_frames:
            reasons.append("context for an autoregressive decoder")
    if reasons:
        raise UserError(f"the published code has no {' and no '.join(reasons)}: it would compute something else")


def gin_text(model: Diffusion | Autoregressive, tokenizer: Tokenizer) -> str:
    """The gin file that says of `model` what `model_of` reads, for T5X beside the published task and train files.

    The published code has no discrete schedule like that of diffusers, nor a mapping of programs to Slakh's classes
    (its notebook makes one first): it gets the cosine and all programs.
    """
    c, package = model.network, "music_spectrogram_diffusion"
    family = "diffusion" if isinstance(model, Diffusion) else "autoregressive"
    lengths = {"inputs": c.max_tokens, "targets": c.target_frames}
    if c.context_frames:
        lengths["targets_context"] = c.context_frames
    lines = [
        "# Written by music_synth. Sizes of a model, for the code of music-spectrogram-diffusion and T5X.",
        "from __gin__ import dynamic_registration",
        f"from {package}.models.{family} import network",
        f"from {package} import preprocessors",
        f"from {package} import tasks",
        f"from {package} import vocabularies",
    ]
    if family == "diffusion":
        lines.append(f"from {package}.models.diffusion import diffusion_utils")
    else:
        lines.append(f"from {package}.models.autoregressive import output_functions")
    values: dict[str, Any] = {
        "TASK_FEATURE_LENGTHS": lengths,
        "NUM_VELOCITY_BINS": tokenizer.velocity_bins,
        "vocabularies.VocabularyConfig.num_velocity_bins": tokenizer.velocity_bins,
        "vocabularies.VocabularyConfig.max_shift_seconds": tokenizer.max_shift_steps // 100,
        "preprocessors.map_midi_programs.granularity_type": "full"
        if tokenizer.granularity == "slakh"
        else tokenizer.granularity,
        "tasks.NoteRepresentationConfig.include_ties": tokenizer.ties,
        "network.T5Config.vocab_size": c.vocab_size,
        "network.T5Config.dtype": c.dtype,
        "network.T5Config.emb_dim": c.model_dim,
        "network.T5Config.num_heads": c.num_heads,
        "network.T5Config.num_encoder_layers": c.num_encoder_layers,
        "network.T5Config.num_decoder_layers": c.num_decoder_layers,
        "network.T5Config.head_dim": c.head_dim,
        "network.T5Config.mlp_dim": c.mlp_dim,
        "network.T5Config.mlp_activations": FIXED["T5Config.mlp_activations"],
        "network.T5Config.dropout_rate": c.dropout_rate,
    }
    if isinstance(model, Diffusion):
        s = model.schedule
        schedule: dict[str, Any] = {"name": "cosine", "num_steps": model.sampler.num_steps}
        if isinstance(s, LinearSchedule):
            schedule = {"name": "linear", "start": s.beta_start, "stop": s.beta_end, "num_steps": s.num_steps}
        for scope in ("train", "sampler"):
            values |= {f"{scope}/diffusion_utils.DiffusionSchedule.{key}": value for key, value in schedule.items()}
        values |= {
            "network.T5Config.max_decoder_noise_time": c.max_noise_time,
            "network.T5Config.decoder_cross_attend_style": ATTEND_STYLES[c.cross_attention],
            "network.T5Config.position_encoding": "fixed_permuted_offset",
            "network.T5Config.context_positions": c.context_positions,
            "diffusion_utils.DiffusionConfig.model_output": model.prediction_type,
            "diffusion_utils.DiffusionConfig.loss_type": model.loss_target,
            "diffusion_utils.DiffusionConfig.loss_norm": model.loss_norm,
            "diffusion_utils.ClassifierFreeGuidanceConfig.drop_condition_prob": model.condition_dropout,
            "diffusion_utils.ClassifierFreeGuidanceConfig.eval_condition_weight": model.sampler.guidance_scale,
            "diffusion_utils.SamplerConfig.name": model.sampler.name if model.sampler.name in SAMPLERS else "ddim",
            "diffusion_utils.SamplerConfig.logvar_type": model.sampler.variance,
            "diffusion_utils.SamplerConfig.clip_x0": model.sampler.clip_x_0,
        }
    elif isinstance(model.output, Deterministic):
        values["output_functions.Deterministic.sampling_dither_amount"] = model.output.dither
    else:
        values["output_functions.GaussianMixture.n_components"] = model.output.num_components
        values["output_functions.GaussianMixture.dims_per_component"] = c.num_mels
    return "\n".join([*lines, "", *(f"{name} = {value!r}" for name, value in values.items()), ""])
