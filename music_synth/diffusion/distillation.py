"""Distillation: a student that says in one call of its network what its teacher finds in many.

Progressive distillation (Salimans and Ho 2022, algorithm 2) in one stage instead of many halvings: noise a mel (or
its residual) to a point t of the student's grid, let the teacher solve the ODE to the next point s in small steps, and
teach the student the x_0 whose single DDIM step from t lands where the teacher did. The teacher's guidance is thereby
folded in. The student is a `Diffusion` with `distilled = True`, its batches come from a `DistillationFeed`; played, it
needs no teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.diffusion import process
from music_synth.diffusion import sampler as samplers
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.schedule import alpha, sigma
from music_synth.errors import UserError
from music_synth.midi.segments import token_bucket
from music_synth.models.base import Batch, Params

Array = jax.Array
SOLVERS = ("ddim", "euler", "dpmpp_2m", "heun")  # the samplers that add no noise


def distillation_target(
    teacher: Diffusion, params: Params, batch: Batch, student_times: Array, num_substeps: int, rng: Array
) -> dict[str, Array]:
    """What a student is to learn of a batch: at t [B] and x_t [B, T, M], that x_0 is x_0 [B, T, M].

    Args:
        teacher: with the sampler that solves its ODE.
        student_times: the student's grid, falling to 0, [K + 1].
        num_substeps: of the teacher between two of its points, uniform in t.
    """
    time_key, noise_key = jax.random.split(rng)
    rows, num_points = batch["mel"].shape[0], len(student_times) - 1
    point = (jax.random.randint(time_key, (), 0, num_points) + jnp.arange(rows)) % num_points  # each as often
    t, s = student_times[point], student_times[point + 1]  # [B]
    share = jnp.arange(num_substeps + 1, dtype=jnp.float32)[:, None] / num_substeps
    times = t[None] + share * (s - t)[None]  # [J + 1, B]
    log_snr_t, log_snr_s = (teacher.schedule.log_snr(time)[:, None, None] for time in (t, s))

    params = teacher._in_dtype(params)
    cache = teacher._encode(params, batch, None)
    x_0 = teacher.target(params, cache, batch)
    noise = teacher._noise(params, cache, jax.random.normal(noise_key, x_0.shape))
    x_t = process.diffuse(x_0, noise, log_snr_t)
    x_s = teacher.solve(params, cache, x_t, times)
    kept = sigma(log_snr_s) / sigma(log_snr_t)  # of x_t in a DDIM step from t to s
    x_0 = (x_s - kept * x_t) / (alpha(log_snr_s) - kept * alpha(log_snr_t))
    return {"t": t, "x_t": x_t, "x_0": x_0}


class DistillationFeed:
    """A feed whose batches also hold a teacher's `distillation_target`, as "teacher_t", "teacher_x_t", "teacher_x_0".

    The teacher works here, a batch ahead of the student, with its parameters apart from the student's and from what
    is saved. Batch k has the same noise whenever it is asked for.
    """

    def __init__(
        self,
        feed: Any,
        teacher: tuple[Any, Any, Params, int],  # a trained decoder: model, tokenizer, parameters, step
        student: Diffusion,
        solver: str = "dpmpp_2m",  # of the teacher's ODE: "ddim", "euler", "dpmpp_2m" or "heun"
        num_substeps: int = 8,  # steps of the teacher for one of the student
        guidance_scale: float = 1.0,  # of the teacher; 1: none
        seed: int = 0,  # of the noise
    ):
        if solver not in SOLVERS:
            raise ValueError(f"DistillationFeed.solver = {solver!r}: choose from {SOLVERS}")
        if num_substeps < 1:
            raise ValueError(f"DistillationFeed.num_substeps = {num_substeps}: must be at least 1")
        if student.sampler.grid != "t":  # the last points of others may coincide, and then nothing is between them
            raise ValueError(
                f'the student\'s Sampler.grid = {student.sampler.grid!r}: a student learns on the grid "t"'
            )
        model, tokenizer, params, step = teacher
        if not isinstance(model, Diffusion) or model.distilled:
            raise UserError("the teacher is no diffusion decoder that can be distilled: give the run of diffusion.gin")
        for name, its, ours in (
            ("tokenizer", tokenizer, feed.tokenizer),
            ("schedule", model.schedule, student.schedule),
            ("context_frames", model.network.context_frames, student.network.context_frames),
        ):
            if its != ours:
                raise UserError(f"the teacher has the {name} {its}, its student {ours}: give both the same")
        if jax.process_index() == 0:
            print(f"the teacher, of step {step}, does {num_substeps} steps of {solver} for one of the student")
        self.teacher = model.with_sampling(name=solver, guidance_scale=guidance_scale)
        self.feed, self.student, self.num_substeps, self._params = feed, student, num_substeps, params
        self._key = jax.random.fold_in(jax.random.key(seed), jax.process_index())
        self._target = jax.jit(distillation_target, static_argnums=(0, 4))

    @property
    def tokenizer(self) -> Any:
        return self.feed.tokenizer

    @property
    def num_skipped(self) -> int:
        return self.feed.num_skipped

    def train_batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return self._with_targets(self.feed.train_batches(start_step), start_step, purpose=0)

    def eval_batches(self, split: str = "validation") -> Iterator[dict[str, np.ndarray]]:
        return self._with_targets(self.feed.eval_batches(split), 0, purpose=1)

    def pieces(self, split: str) -> Iterator[Any]:
        return self.feed.pieces(split)

    def _with_targets(self, batches: Iterator, start_step: int, purpose: int) -> Iterator[dict[str, np.ndarray]]:
        key = jax.random.fold_in(self._key, purpose)
        times = samplers.grid_times(self.student.sampler, self.student.schedule)
        self._params = jax.device_put(self._params)
        for step, batch in enumerate(batches, start_step):
            longest = int(np.max(np.sum(batch["note_tokens"] > 0, axis=1), initial=1))
            length = token_bucket(longest, self.teacher.network.max_tokens)
            batch = dict(batch, note_tokens=batch["note_tokens"][:, :length])
            targets = self._target(
                self.teacher, self._params, batch, times, self.num_substeps, jax.random.fold_in(key, step)
            )
            yield batch | {f"teacher_{name}": np.asarray(array) for name, array in targets.items()}
