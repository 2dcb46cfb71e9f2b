"""The schedule's values, and two steps of AdamW and Lion as a few lines of numpy give them; a weight moves at its own rate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import program, specs

from mutransformer import mup
from mutransformer.config.load import load
from mutransformer.config.schema import Config
from mutransformer.training.optim import make_schedule
from mutransformer.training.program import scaling_of


def make(*args: str) -> Config:
    return load(
        [
            "model.d_model=16",
            "model.d_base=10",
            "model.d_head=8",
            "model.n_layer=2",
            "model.ff_multiple=1.5",
            "model.n_vocab=20",
            "model.vocab_multiple=4",
            "model.norm_scale=vector",
            "model.biases=true",
            "steps=10",
            "optim.warmup_steps=4",
            "optim.lr=0.05",
            *args,
        ]
    )


def shares(*args: str, at: range | list[int]) -> list[float]:
    config = make(*args)
    schedule = make_schedule(config.optim, config.steps)
    return [float(schedule(jnp.asarray(i))) for i in at]


FLOOR = 1e-4
UP = [FLOOR + (1 - FLOOR) * i / 4 for i in range(4)]


def test_linear_schedule():
    down = [1 - (1 - FLOOR) * i / 6 for i in range(7)]
    assert shares(at=range(11)) == pytest.approx([*UP, *down], abs=1e-6)
    assert down[-1] == pytest.approx(FLOOR)


def test_cosine_schedule():
    down = [FLOOR + (1 - FLOOR) * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(7)]
    assert shares("optim.schedule=cosine", at=range(11)) == pytest.approx([*UP, *down], abs=1e-6)


def test_constant_schedule():
    assert shares("optim.schedule=constant", at=range(11)) == pytest.approx([*UP, *[1.0] * 7], abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_without_warm_up_the_first_step_has_the_peak_rate(kind):
    first, last = shares(f"optim.schedule={kind}", "optim.warmup_steps=0", at=[0, 10])
    assert first == 1.0
    assert last == (1.0 if kind == "constant" else pytest.approx(FLOOR, rel=1e-3))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_a_run_shorter_than_the_warm_up_ends_within_it(kind):
    got = shares(f"optim.schedule={kind}", "optim.warmup_steps=20", "optim.min_lr_ratio=0.5", at=range(10))
    assert got == pytest.approx([0.5 + 0.5 * i / 20 for i in range(10)], rel=1e-6)


def test_the_warm_up_as_a_share_of_the_run():
    """Of 10 steps, 4 by default here."""
    for share, steps in (("0.4", 4), ("0", 0), ("0.25", 2)):
        want = shares(f"optim.warmup_steps={steps}", at=range(11))
        assert shares(f"optim.warmup_fraction={share}", at=range(11)) == pytest.approx(want, abs=1e-7), share


def test_the_floor_is_a_share_of_the_peak():
    assert shares("optim.min_lr_ratio=0", at=[0, 4, 10]) == pytest.approx([0, 1, 0], abs=1e-7)
    assert shares("optim.min_lr_ratio=1", at=range(11)) == pytest.approx([1] * 11)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(a, np.float64)
        for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def by_hand(config: Config, params: dict[str, np.ndarray], grads: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101), or of Chen et al. (Lion, arXiv 2302.06675), in float64."""
    c, weights = config.optim, {jax.tree_util.keystr(p, simple=True, separator="."): w for p, w in _leaves(config)}
    params, m, v = dict(params), *({n: np.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for i, step in enumerate(grads):
        share = c.min_lr_ratio + (1 - c.min_lr_ratio) * i / c.warmup_steps
        norm = np.sqrt(sum(np.sum(g**2) for g in step.values()))
        clip = min(1, c.clip_norm / norm) if c.clip_norm else 1
        for name, raw in step.items():
            g, w, p = clip * raw, weights[name], params[name]
            width = 10 / 16 if c.rule == "mup" else 1 / w.fan_in if c.rule == "abs_mup" else 1.0
            slow = width if w.role in ("hidden", "residual", "output") else 1.0
            if c.name == "adamw":
                m[name] = c.beta1 * m[name] + (1 - c.beta1) * g
                v[name] = c.beta2 * v[name] + (1 - c.beta2) * g**2
                by_m, by_v = m[name] / (1 - c.beta1 ** (i + 1)), v[name] / (1 - c.beta2 ** (i + 1))
                direction = by_m / (np.sqrt(by_v) + c.eps * (slow if c.eps_scaling else 1))
            else:
                direction = np.sign(c.beta1 * m[name] + (1 - c.beta1) * g)
                m[name] = c.beta2 * m[name] + (1 - c.beta2) * g
            decayed = w.is_matrix or c.decay_vectors
            shrink = c.weight_decay * decayed * p
            rate = c.lr * slow * (4 if w.role == "output" and c.rule != "sp" else 1)  # the default of lr_factors.output
            params[name] = p - share * (rate * direction + (rate * shrink if c.decay == "coupled" else shrink))
    return params


def _leaves(config: Config) -> Any:
    return jax.tree_util.tree_leaves_with_path(specs(config))


def start(config: Config) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    params, first, second = (
        jax.tree.map(lambda w: np.asarray(rng.normal(size=w.shape), np.float32), t) for t in [specs(config)] * 3
    )
    return params, [first, second]


def run(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(how far two updates moved the weights, how far they do by hand)."""
    params, grads = start(config)
    tx = program(config, jax.devices()[:1]).optimizer.transformation()

    @jax.jit
    def two(params: Any, grads: Any) -> Any:
        first, state = tx.update(grads[0], tx.init(params), params)
        second, _ = tx.update(grads[1], state, optax.apply_updates(params, first))
        return jax.tree.map(jnp.add, first, second)

    before = flat(params)
    after = by_hand(config, before, [flat(g) for g in grads])
    return flat(two(params, grads)), {n: after[n] - before[n] for n in before}


SETTINGS = [
    (),
    ("optim.rule=abs_mup", "optim.weight_decay=0.1", "optim.decay=coupled", "optim.eps_scaling=true", "optim.eps=0.3"),
    ("optim.rule=mup", "optim.weight_decay=0.1", "optim.clip_norm=0", "optim.eps_scaling=true", "optim.eps=0.3"),
    ("optim.rule=sp", "optim.weight_decay=0.1", "optim.decay_vectors=true", "optim.clip_norm=1e6", "optim.eps=0.3"),
    ("optim.weight_decay=0.1", "optim.decay=coupled", "optim.decay_vectors=true", "optim.clip_norm=3", "optim.eps=0.3"),
    ("optim.name=lion", "optim.weight_decay=0.1", "optim.beta2=0.98"),
    ("optim.name=lion", "optim.weight_decay=0.1", "optim.decay=coupled", "optim.rule=abs_mup"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=[",".join(s) or "default" for s in SETTINGS])
def test_two_updates(settings):
    ours, theirs = run(make("optim.min_lr_ratio=0.25", *settings))
    wrong = {n: d for n in ours if (d := np.linalg.norm(ours[n] - theirs[n]) / np.linalg.norm(theirs[n])) > 1e-5}
    assert not wrong


@pytest.mark.parametrize(
    "change",
    [
        "optim.decay=independent",
        "optim.decay_vectors=true",
        "optim.clip_norm=0",
        "optim.eps_scaling=false",
        "optim.weight_decay=0",
        "optim.rule=mup",
        "optim.beta1=0.5",
        "optim.min_lr_ratio=0.3",
    ],
)
def test_every_setting_is_felt(change):
    config = make("optim.min_lr_ratio=0.25", *SETTINGS[1])
    other = make("optim.min_lr_ratio=0.25", *SETTINGS[1], change)
    one, two = run(config)[0], run(other)[0]
    assert any(np.linalg.norm(one[n] - two[n]) > 1e-4 * np.linalg.norm(one[n]) for n in one)


def test_every_weight_has_its_own_rate():
    config = make("optim.name=lion", "optim.clip_norm=0", "optim.warmup_steps=0", "optim.rule=abs_mup")
    params, grads = start(config)
    tx = program(config, jax.devices()[:1]).optimizer.transformation()
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    sizes = {name: np.unique(np.abs(u).astype(np.float32)) for name, u in flat(updates).items()}
    assert all(len(size) == 1 for size in sizes.values())  # the sign, times one rate
    rates = {
        n: config.optim.lr * mup.lr_multiplier(w, scaling_of(config))
        for n, w in zip(sizes, jax.tree.leaves(specs(config)), strict=True)
    }
    assert {n: float(s[0]) for n, s in sizes.items()} == pytest.approx(rates, rel=1e-6)
    assert len(set(rates.values())) == 4  # 1, 1 / d_model, 1 / d_ff and, of the unembedding, 4 / d_model


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_first_moment_has_the_dtype_it_is_told(name):
    config = make(f"optim.name={name}", "precision.mu_dtype=bfloat16", "optim.rule=abs_mup", *SETTINGS[1][3:])
    state = jax.eval_shape(lambda: program(config, jax.devices()[:1]).optimizer.transformation().init(start(config)[0]))
    kinds = [a.dtype for a in jax.tree.leaves(state) if a.shape == (20, 16)]
    assert kinds == ([jnp.bfloat16, jnp.float32] if name == "adamw" else [jnp.bfloat16])


def test_two_eps_give_two_groups_and_no_weight_is_left_out():
    config = make(*SETTINGS[1])
    params, grads = start(config)
    tx = program(config, jax.devices()[:1]).optimizer.transformation()
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(np.all(u != 0) for u in flat(updates).values())
