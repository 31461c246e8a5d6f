"""What a distillation_target says, and who may teach whom. A student's whole life is in tests/test_train.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth import config
from music_synth.diffusion import process
from music_synth.diffusion import sampler as samplers
from music_synth.diffusion.distillation import distillation_target
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule
from music_synth.errors import UserError
from tests import tiny_runs
from tests.diffusion.test_diffusion import MODEL, make_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEACHER = dataclasses.replace(MODEL, schedule=CosineSchedule(shift=-4.0))
STUDENT = dataclasses.replace(TEACHER, distilled=True, sampler=Sampler(num_steps=3))
TIMES = samplers.grid_times(STUDENT.sampler, STUDENT.schedule)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: 3 * leaf, tiny_runs.random_like(TEACHER.init))  # enough to depend on the notes


def taught(teacher, params, num_substeps):
    """Targets of three examples, one for each point of the grid, and log-SNR [3, 1, 1] where it begins and ends."""
    given = jax.jit(distillation_target, static_argnums=(0, 4))(
        teacher, params, make_batch(), TIMES, num_substeps, jax.random.key(0)
    )
    assert sorted(np.asarray(given["t"])) == sorted(np.asarray(TIMES[:-1]))
    points = jnp.argmin(jnp.abs(TIMES[None] - given["t"][:, None]), axis=1)
    ends = (STUDENT.schedule.log_snr(TIMES[points + k])[:, None, None] for k in (0, 1))
    return given, *ends


@functools.partial(jax.jit, static_argnums=0)
def said(teacher, params, x_t, t):
    """What the teacher says that x_0 is, at times t [3] of the examples."""
    denoise_fn = teacher.denoiser(params, teacher._encode(params, make_batch(), None))
    film = teacher._apply(params, t, method="condition_time")
    return denoise_fn(x_t, teacher.schedule.log_snr(t)[:, None, None], film)


def test_a_target_of_one_step_is_what_the_guided_teacher_says(params):
    teacher = TEACHER.with_sampling(guidance_scale=3.0)
    given, *_ = taught(teacher, params, 1)
    guided, plain = (said(model, params, given["x_t"], given["t"]) for model in (teacher, TEACHER))
    # Two programs round the sinusoids of the time differently, and guidance multiplies that.
    error = np.abs(given["x_0"] - guided)
    assert error.max() < 0.1 * np.abs(plain - guided).max(), (error.max(), np.abs(plain - guided).max())


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_one_step_of_a_perfect_student_ends_where_the_teacher_does(params, solver):
    """The teacher's walk is written out here."""
    given, log_snr_t, log_snr_s = taught(TEACHER.with_sampling(name=solver), params, 4)
    ends = samplers.ddim_step(given["x_t"], given["x_0"], log_snr_t, log_snr_s)
    x, before, h_before = given["x_t"], None, None
    for j in range(4):
        t, s = (given["t"] - TIMES[-2] * k / 4 for k in (j, j + 1))  # all steps of the grid are as long as its last
        lt, ls = (TEACHER.schedule.log_snr(jnp.maximum(u, 0))[:, None, None] for u in (t, s))
        now = x_0 = said(TEACHER, params, x, t)
        if solver == "dpmpp_2m" and j:
            x_0 = now + 0.5 * (ls - lt) / h_before * (now - before)
        x = process.diffuse(x_0, process.eps_from_x_0(x, x_0, lt), ls)
        before, h_before = now, ls - lt
    np.testing.assert_allclose(ends, x, atol=2e-3)


def test_a_student_who_knows_it_all_has_no_loss(params):
    given, *_ = taught(TEACHER.with_sampling(clip_x_0=False), params, 1)
    batch = make_batch() | {f"teacher_{name}": array for name, array in given.items()}
    student = dataclasses.replace(STUDENT, loss_weighting="none")
    loss = jax.jit(student.loss, static_argnums=3)
    assert float(loss(params, batch, jax.random.key(5), False)[0]) < 1e-5
    off = dict(batch, teacher_x_0=batch["teacher_x_0"] + 0.5)
    np.testing.assert_allclose(loss(params, off, jax.random.key(5), False)[0], 0.25, rtol=1e-2)


def test_a_student_samples_only_as_it_was_taught():
    assert STUDENT.with_sampling(num_steps=3) == STUDENT
    for other in (dict(num_steps=4), dict(guidance_scale=2.0), dict(name="ddpm")):
        with pytest.raises(UserError, match="3 steps"):
            STUDENT.with_sampling(**other)
    with pytest.raises(ValueError, match="guidance_scale = 1"):
        Diffusion(distilled=True, sampler=Sampler(guidance_scale=2.0))


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A prepared folder, a teacher of noise, and how `DistillationFeed` is called with them."""
    folder = tmp_path_factory.mktemp("school")
    prepared = tiny_runs.prepare(folder / "prepared")
    runs = {recipe: tiny_runs.start(folder / recipe, f"{recipe}.gin", prepared) for recipe in
            ("diffusion", "autoregressive")}  # fmt: skip

    def keywords(*overrides):
        config.parse(["distill.gin", "smoke.gin"], [f"TASK={prepared}", f"TEACHER={runs['diffusion']}", *overrides])
        return config.build("train").keywords

    return runs, keywords


def test_targets_do_not_change_from_time_to_time(school):
    """Batch k is the same whether a run comes to it or begins with it, and training is not taught as evaluation is."""
    feed = school[1]()["feed"]
    batches = feed.train_batches()
    first, second = next(batches), next(batches)
    again = next(feed.train_batches(1))
    assert {"teacher_t", "teacher_x_t", "teacher_x_0", "mel", "note_tokens"} <= set(first)
    for name, array in second.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, again[name])
    assert np.abs(first["teacher_x_t"] - second["teacher_x_t"]).max() > 0.1
    held_out = next(feed.eval_batches())
    np.testing.assert_array_equal(held_out["teacher_x_t"], next(feed.eval_batches())["teacher_x_t"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("TEACHER=nowhere", "no folder nowhere"),
        ("TEACHER=autoregressive", "no diffusion decoder"),
        ("LogNormalSchedule.mean=0.0", "schedule"),
        ("VELOCITY_BINS=4", "tokenizer"),
        ("DistillationFeed.solver=ddpm", "'ddpm'.*'ddim'"),
        ("DistillationFeed.num_substeps=0", "num_substeps = 0"),
        ("Sampler.grid=leading", "Sampler.grid = 'leading'.*\"t\""),
    ],
)
def test_unfit_teachers_are_named(school, override, said):
    runs, keywords = school
    name, _, value = override.partition("=")
    with pytest.raises(UserError, match=said) as told:
        keywords(f"{name}={runs.get(value, value)}")
    assert "\n" not in str(told.value)
