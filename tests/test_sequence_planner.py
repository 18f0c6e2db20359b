"""Planning with the cached transformer gives what uncached passes give, at every length and in every window."""

import dataclasses
import functools
import operator

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import plain_search
from tt_jax import iql, planning, sampling, sequence_planner, tokenization, transformer, types

SPEC = types.TransitionSpec(observation_dim=3, action_dim=2, num_bins=8)
CONFIG = transformer.TransformerConfig(spec=SPEC, num_layers=2, num_heads=2, embed_dim=16, max_transitions=10)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)  # where staleness of deeper keys is not at stake


def random_params(*, config=CONFIG, seed=0, stop_logit=-4.0):
    """Return parameters large enough that logits differ clearly; stop tokens have `stop_logit` on average."""
    generator = np.random.default_rng(seed)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.float32(0.4) * generator.normal(size=leaf.shape).astype(np.float32) + (path[-1].key == "scale")
        ),
        jax.eval_shape(functools.partial(transformer.init, config=config), jax.random.key(0)),
    )
    params["norm"]["bias"][0] += 4.0  # a feature that is almost constant
    head = params["head"]["kernel"]
    head[:, 0], head[:, 0, -1] = 0.0, stop_logit / 4.0
    discretizer = tokenization.fit(generator.normal(size=(400, SPEC.transition_dim)), num_bins=SPEC.num_bins)
    return sequence_planner.PlannerParams(transformer=params, discretizer=discretizer)


def random_roots(*, size, lengths, seed=0):
    """Return keys, contexts with room for `size` transitions and observations of environments; unused rows are junk."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, SPEC.num_bins, size=(len(lengths), size, SPEC.transition_dim))
    context = types.Context(tokens=jnp.asarray(tokens, jnp.int32), length=jnp.asarray(lengths, jnp.int32))
    observation = jnp.asarray(generator.normal(size=(len(lengths), SPEC.observation_dim)), jnp.float32)
    return jax.random.split(jax.random.key(seed), len(lengths)), context, observation


def draw_from(table, greedy=False):
    """Return a draw_fn that reads its random numbers in [0, 1) from `table` [calls, B, W, K]."""

    def draw_fn(rng_key, logits, call_index):
        del rng_key
        xp = np if isinstance(logits, np.ndarray) else jnp
        uniform = xp.asarray(table)[call_index] if logits.ndim == 4 else xp.asarray(table)[call_index][..., 0]
        mass = xp.cumsum(xp.exp(logits - logits.max(axis=-1, keepdims=True)), axis=-1)
        drawn = xp.sum(mass <= uniform[..., None] * mass[..., -1:], axis=-1)
        return xp.where(greedy, xp.argmax(logits, axis=-1), drawn)

    return draw_fn


def make_drawn_plan_fn(make_plan_fn, **settings):
    """Return plan_fn(table, greedy, params, rng_key, context, observation) with the draws as arguments."""

    def plan_fn(table, greedy, *arguments):
        return make_plan_fn(**settings, draw_fn=draw_from(table, greedy))(*arguments)

    return plan_fn


def random_table(plan_config, num_envs, seed):
    size = (num_envs, plan_config.beam_width, plan_config.num_expand)
    return jnp.asarray(
        np.random.default_rng(seed).random((plan_config.horizon * SPEC.transition_dim, *size)), jnp.float32
    )


def assert_same_plans(got, expected, *, atol=2e-4):
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(got.actions, expected.actions, rtol=1e-6)
    np.testing.assert_array_equal(got.action, got.actions[:, 0])


# The reference's plans. Its limit of 27 tokens cuts 28 tokens to three transitions, which is the window (4, 3); a
# limit of 2 D - 1 or D - 1 is the window (2, 1).
REFERENCE_PLANS = {
    "greedy_horizon_3": ["det/H3_C0_M5", "det/H3_C1_M5", "det/H3_C3_M5"],
    "greedy_horizon_5": ["det/H5_C0_M5", "det/H5_C1_M5", "det/H5_C3_M5", "det/H5_C5_M5", "det/H5_C3_M0"],
    "greedy_short_window": ["det/H5_C3_M2"],
    "greedy_one_step": ["det/H1_C1_M1"],
    "cdf_06": ["table/s0"],
    "cdf_03": ["table/s1"],
    "top_3_short_window": ["table/s2"],
    "everything_filtered": ["table/s3"],
    # table/s4 scores by a percentile, where the reference reads the bin below the right one.
}


def reference_settings(arrays, case):
    """Return the PlanConfig of a stored case and its number of remembered transitions."""
    window = (2, 1) if arrays[f"{case}/max_context_transitions"] in (1, 2) else (4, 3)
    size = 0 if arrays[f"{case}/max_context_transitions"] == 1 else window[1]
    filters = {"action_cdf": 0.0, "action_top_k": 1}
    beams = (4, 2)
    if case.startswith("table"):
        names = [("observation", "obs"), ("action", "act"), ("reward", "rew")]
        filters = {f"{name}_cdf": float(arrays[f"{case}/cdf_{short}"]) for name, short in names}
        filters |= {f"{name}_top_k": int(arrays[f"{case}/k_{short}"]) for name, short in names}
        beams = int(arrays[f"{case}/beam_width"]), int(arrays[f"{case}/n_expand"])
    plan_config = sequence_planner.PlanConfig(
        horizon=int(arrays[f"{case}/horizon"]),
        beam_width=beams[0],
        num_expand=beams[1],
        window=window,
        context_transitions=size,
        stop_ends_episode=False,
        **filters,
    )
    return plan_config, size


def reference_draw_fn(uniforms, plan_config):
    """Read `uniforms` [calls, W * K], in which the reference's candidate i is expansion i // W of beam i mod W."""
    width, expand = plan_config.beam_width, plan_config.num_expand

    def draw_fn(rng_key, logits, call_index):
        del rng_key
        row = uniforms[call_index]
        uniform = row.reshape(1, expand, width).swapaxes(1, 2) if logits.ndim == 4 else row[None, :width]
        return sampling.categorical(logits, uniform)

    return draw_fn


@pytest.mark.parametrize("cases", REFERENCE_PLANS.values(), ids=REFERENCE_PLANS)
def test_plans_are_those_of_the_reference(cases):
    arrays = golden.load("beam")
    plan_config, size = reference_settings(arrays, cases[0])
    draw_fn = None
    if cases[0].startswith("table"):
        draw_fn = reference_draw_fn(jnp.asarray(arrays[f"{cases[0]}/uniforms"], jnp.float32), plan_config)
    params = sequence_planner.PlannerParams(
        transformer=golden.params_from(golden.load("gpt"), "state/"),
        discretizer=golden.discretizer_from(arrays["thresholds"]),
    )
    tokens = np.zeros((len(cases), size, golden.SPEC.transition_dim), np.int32)
    ages = np.array([arrays[f"{case}/context_transitions"] for case in cases])
    for row, age in zip(tokens, ages, strict=True):
        newest = arrays["context_tokens"][max(age - size, 0) : age]
        row[: len(newest)] = newest
    context = types.Context(tokens=jnp.asarray(tokens), length=jnp.asarray(np.minimum(ages, size)))
    observation = jnp.asarray(arrays["context_observations"][ages], jnp.float32)
    plan_fn = sequence_planner.make_plan_fn(config=golden.CONFIG, plan_config=plan_config, draw_fn=draw_fn)
    keys = jax.random.split(jax.random.key(0), len(cases))
    plans = jax.jit(plan_fn)(params, keys, context, observation)
    for env, case in enumerate(cases):
        np.testing.assert_array_equal(plans.tokens[env], arrays[f"{case}/best_sequence"])
        np.testing.assert_allclose(plans.actions[env], arrays[f"{case}/best_actions"], rtol=1e-6)
        kept = arrays[f"{case}/t{plan_config.horizon - 1}/values_kept"]
        np.testing.assert_allclose(plans.scores[env], kept, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("settings", [{"action_cdf": 0.2}, {"action_cdf": 0.6, "temperature": 3.0}], ids=str)
def test_two_actions_in_a_row_are_drawn_as_often_as_the_reference_says(settings):
    arrays = golden.load("beam")
    num_plans, names = 3000, ("p0", "p1", "p2")  # contexts of 0, 1 and 2 transitions
    plan_config = sequence_planner.PlanConfig(horizon=1, beam_width=1, num_expand=1, window=(4, 3), **settings)
    params = sequence_planner.PlannerParams(
        transformer=golden.params_from(golden.load("gpt"), "state/"),
        discretizer=golden.discretizer_from(arrays["thresholds"]),
    )
    age = np.repeat([0, 1, 2], num_plans)
    context = types.Context(
        tokens=jnp.asarray(np.repeat(arrays["context_tokens"][None, :2], len(age), axis=0), jnp.int32),
        length=jnp.asarray(age),
    )
    observation = jnp.asarray(arrays["context_observations"][age], jnp.float32)
    plan_fn = sequence_planner.make_plan_fn(config=golden.CONFIG, plan_config=plan_config)
    keys = jax.random.split(jax.random.key(0), len(age))
    tokens = jax.jit(plan_fn)(params, keys, context, observation).tokens
    first, second = np.asarray(tokens[:, 0, 3]), np.asarray(tokens[:, 0, 4])
    label = f"t{int(plan_config.temperature)}_cdf0{int(10 * plan_config.action_cdf)}"
    for index, name in enumerate(names):
        probs = arrays[f"dist/{name}/{label}/joint_first_two"]
        counts = np.zeros((11, 11))
        np.add.at(counts, (first[age == index], second[age == index]), 1)
        assert not counts[probs == 0].any()
        sigma = np.sqrt(num_plans * probs * (1 - probs))
        assert (np.abs(counts - num_plans * probs) <= 4 * sigma + 1).all()


@dataclasses.dataclass(frozen=True)
class Case:
    window: tuple[int, int]
    size: int  # of the context's buffer
    lengths: tuple[int, ...]
    horizon: int
    settings: dict = dataclasses.field(default_factory=dict)
    config: transformer.TransformerConfig = CONFIG


CASES = {
    # From the second step on the window slides after every step, in all environments although no buffer is full.
    "window_5_4": Case((5, 4), 3, (1, 0, 1), 7),
    # More past than fits; it slides before and after every second step.
    "window_4_2_long_context": Case(
        (4, 2), 5, (5, 3, 0), 7, {"observation_top_k": 0, "action_top_k": 5, "share_ancestors": False}
    ),
    # As much past as fits; only the newest transition survives a slide.
    "window_3_1_percentile": Case((3, 1), 3, (3, 1, 2), 6, {"percentile": 0.4, "temperature": 1.5, "reward_top_k": 0}),
    # It slides when 5 and again when 10 transitions are planned.
    "window_10_5": Case((10, 5), 5, (5, 3, 0), 12, {"observation_top_k": 2, "reward_cdf": 0.3, "reward_top_k": 3}),
    "near_the_median": Case((3, 2), 2, (2, 0), 3, {"action_central": 0.4, "observation_top_k": 0}, ONE_LAYER),
    "no_context_one_environment": Case((5, 4), 0, (0,), 7, {"observation_top_k": 0}, ONE_LAYER),
    "stops_go_on_one_environment": Case(
        (2, 1), 1, (1,), 4, {"stop_ends_episode": False, "observation_cdf": 0.5}, ONE_LAYER
    ),
    "the_present_alone": Case((1, 0), 2, (2, 0, 1), 1, {"action_cdf": 0.0, "reward_top_k": 0}),
    # More beams than are read together, many of them with the same past: cdf filters leave few actions.
    "many_beams": Case((4, 3), 2, (2, 0), 5, {"beam_width": 40, "num_expand": 2}, ONE_LAYER),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cached_plans_equal_those_of_uncached_passes(case):
    plan_config = sequence_planner.PlanConfig(
        horizon=case.horizon,
        window=case.window,
        context_transitions=case.size,
        **({"beam_width": 4, "num_expand": 3} | case.settings),
    )
    make = functools.partial(make_drawn_plan_fn, config=case.config, plan_config=plan_config)
    cached = jax.jit(make(sequence_planner.make_plan_fn))
    uncached = make(plain_search.make_plan_fn)
    num_stopped = 0
    for seed, (greedy, stop_logit) in enumerate([(False, -5.0), (True, -5.0), (False, 1.0)]):
        params = random_params(config=case.config, seed=seed, stop_logit=stop_logit)
        arguments = (params, *random_roots(size=case.size, lengths=case.lengths, seed=seed))
        table = random_table(plan_config, len(case.lengths), seed)
        got = cached(table, greedy, *arguments)
        assert_same_plans(got, uncached(table, greedy, *arguments))
        assert np.isfinite(got.scores[:, 0]).all()
        num_stopped += int((got.tokens == SPEC.stop_token).any())
    assert num_stopped, "no plan has met a stop token: raise stop_logit"


@pytest.fixture(scope="module")
def greedy_plans():
    """Return the configuration and the jitted function of greedy plans, which counts its traces."""
    plan_config = sequence_planner.PlanConfig(
        horizon=6, beam_width=4, num_expand=3, window=(5, 3), context_transitions=3, action_cdf=0.0, action_top_k=1
    )
    plan_fn = sequence_planner.make_plan_fn(config=CONFIG, plan_config=plan_config)
    chex.clear_trace_counter()
    return plan_config, jax.jit(chex.assert_max_traces(plan_fn, n=1))


def test_greedy_plans_equal_those_of_uncached_passes(greedy_plans):
    plan_config, plan_fn = greedy_plans
    arguments = (random_params(), *random_roots(size=3, lengths=(3, 1, 0)))
    uncached = plain_search.make_plan_fn(config=CONFIG, plan_config=plan_config)
    assert_same_plans(plan_fn(*arguments), uncached(*arguments))


def test_contexts_of_any_length_share_one_program_and_rows_beyond_it_do_not_matter(greedy_plans):
    _, plan_fn = greedy_plans
    params = random_params()
    rng_key, context, observation = random_roots(size=3, lengths=(3, 1, 0))
    plans = plan_fn(params, rng_key, context, observation)
    beyond = np.arange(3)[None] >= np.asarray(context.length)[:, None]
    other = context.replace(tokens=jnp.where(beyond[..., None], 0, context.tokens))
    chex.assert_trees_all_equal(plan_fn(params, rng_key, other, observation), plans)
    longer = context.replace(length=jnp.array([2, 3, 3], jnp.int32))  # traced again, this would raise
    assert (plan_fn(params, rng_key, longer, observation).tokens != plans.tokens).any(axis=(1, 2)).all()


def test_a_plan_does_not_depend_on_the_other_environments():
    plan_config = sequence_planner.PlanConfig(
        horizon=5, beam_width=3, num_expand=2, window=(3, 2), action_cdf=0.0, observation_top_k=0, reward_top_k=0
    )
    plan_fn = sequence_planner.make_plan_fn(config=ONE_LAYER, plan_config=plan_config)
    plan_fn = jax.jit(plan_fn)
    params = random_params(config=ONE_LAYER)
    roots = random_roots(size=2, lengths=(2, 0, 1))
    plans = plan_fn(params, *roots)
    others = random_roots(size=2, lengths=(1, 2, 2), seed=1)
    mixed = jax.tree.map(lambda own, other: jnp.stack([own[0], other[1], own[2]]), roots, others)
    moved = plan_fn(params, *mixed)
    for env in (0, 2):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf, e=env: leaf[e], x) for x in (moved, plans)))
    assert (moved.tokens[1] != plans.tokens[1]).any()

    turned = plan_fn(params, *jax.tree.map(lambda leaf: leaf[jnp.array([2, 0, 1])], roots))
    np.testing.assert_array_equal(turned.tokens, plans.tokens[jnp.array([2, 0, 1])])
    rekeyed = plan_fn(params, others[0], *roots[1:])
    assert (rekeyed.tokens != plans.tokens).any(axis=(1, 2)).all()


@pytest.fixture(scope="module")
def uniform_plans():
    """Return plan(table, centers) of plans with the tokens in `table` [calls, B, W, K], three steps long.

    The head is zero, so that all tokens are equally likely and every reward and value can be told by hand.
    """
    plan_config = sequence_planner.PlanConfig(
        horizon=3, beam_width=2, num_expand=2, window=(5, 4), action_cdf=0.0, observation_top_k=0, reward_top_k=0
    )
    params = random_params(config=ONE_LAYER)
    params.transformer["head"]["kernel"][:] = 0.0

    @jax.jit
    def plan(table, params, *root):
        def draw_fn(rng_key, logits, call_index):
            del rng_key
            return table[call_index] if logits.ndim == 4 else table[call_index][..., 0]

        make = sequence_planner.make_plan_fn
        return make(config=ONE_LAYER, plan_config=plan_config, draw_fn=draw_fn)(params, *root)

    def plan_with(table, centers):
        with_centers = params.replace(discretizer=params.discretizer.replace(centers=centers))
        return plan(jnp.asarray(table), with_centers, *random_roots(size=0, lengths=(0,) * table.shape[1]))

    return plan_with


STOP, DIM, ACTION_DIM = SPEC.stop_token, SPEC.transition_dim, SPEC.action_dim
STOPS = {  # (call, expansions), all of the first beam
    "first_action": (DIM, slice(1)),
    "last_action": (DIM + ACTION_DIM - 1, slice(1)),
    "reward": (DIM + ACTION_DIM, slice(1)),
    "value": (DIM + ACTION_DIM + 1, slice(1)),
    "observation": (DIM - 2, slice(None)),  # drawn at the end of the step before
    "none": (0, slice(0)),
}


def test_a_stop_token_ends_the_rewards_of_a_plan_and_a_stopped_beam_is_one_candidate(uniform_plans):
    table = np.full((3 * DIM, len(STOPS), 2, 2), 3)
    for env, (call, expansions) in enumerate(STOPS.values()):
        table[call, env, 0, expansions] = STOP
    # All centers of a column average to -1 for rewards and -10 for values, of which stopping takes its share: it
    # counts as 0. So the plan that ends in the second step is the best, and whole ones come next.
    centers = np.zeros((DIM, SPEC.num_bins)) + np.linspace(-1.5, -0.5, SPEC.num_bins)[None]
    centers[-1] *= 10
    plans = uniform_plans(table, centers)
    reward = -SPEC.num_bins / (SPEC.num_bins + 1)
    whole = reward * (1 + 0.99 + 0.99**2) + 0.99**3 * 10 * reward
    before, after = reward, reward * (1 + 0.99)  # the stop token comes before, or after, the reward of its step
    expected = [(before, whole)] * 3 + [(after, whole), (before, whole), (whole, whole)]
    np.testing.assert_allclose(plans.scores, expected, rtol=1e-5)
    np.testing.assert_array_equal((plans.tokens == STOP).sum(axis=(1, 2)), [1, 1, 1, 1, 1, 0])

    plans = uniform_plans(table, -centers)
    np.testing.assert_allclose(plans.scores, np.full((len(STOPS), 2), -whole), rtol=1e-5)
    assert (plans.tokens != STOP).all()


def test_bfloat16_predicts_nearly_the_rewards_of_float32():
    # Tokens are drawn from a table and beams are picked by the tokens, so that rounding cannot change the plan.
    plan_config = sequence_planner.PlanConfig(
        horizon=6, beam_width=3, num_expand=2, window=(3, 2), action_cdf=0.0, observation_top_k=0, reward_top_k=0
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SPEC.num_bins, size=(6 * SPEC.transition_dim, 2, 3, 2)))
    spread = 1000.0

    def draw_fn(rng_key, logits, call_index):
        del rng_key
        return tokens[call_index] if logits.ndim == 4 else tokens[call_index][..., 0]

    def rank(proposal):  # distinct integers
        return jnp.argsort(jnp.argsort(proposal.tokens[..., 4].reshape(2, -1) * 10 + jnp.arange(6)[None])).reshape(
            2, 3, 2
        )

    def score_fn(params, returns, proposal, step):
        predicted = planning.score_by_value(plan_config.discount)(params, returns, proposal, step)
        return spread * rank(proposal) + predicted

    arguments = (random_params(config=ONE_LAYER), *random_roots(size=3, lengths=(3, 1)))
    settings = {"plan_config": plan_config, "draw_fn": draw_fn, "score_fn": score_fn}
    half = dataclasses.replace(ONE_LAYER, dtype="bfloat16")
    plan_fn = sequence_planner.make_plan_fn(config=half, **settings)
    got = jax.jit(plan_fn)(*arguments)
    expected = plain_search.make_plan_fn(config=ONE_LAYER, **settings)(*arguments)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=0.1)
    assert np.abs(got.scores - expected.scores).max() > 1e-3, "this was not computed in bfloat16"
    predicted = np.asarray(expected.scores) % spread
    assert np.minimum(predicted, spread - predicted).max() > 0.5, "predicted rewards are too small to tell"


def test_a_score_fn_replaces_the_score_and_sees_the_whole_proposal():
    plan_config = sequence_planner.PlanConfig(horizon=3, beam_width=3, num_expand=2, window=(3, 2), observation_top_k=0)

    def score_fn(params, returns, proposal, step):
        weights = params.extra["weights"].reshape(1, 1, 1, -1)
        chex.assert_shape(proposal.observation, (2, 3, SPEC.observation_dim))
        observed = proposal.observation.sum(-1)[..., None]
        return returns[..., None] + (proposal.action * weights).sum(-1) + observed + 0.1 * proposal.log_prob + step

    make = functools.partial(make_drawn_plan_fn, config=ONE_LAYER, plan_config=plan_config, score_fn=score_fn)
    params = random_params(config=ONE_LAYER).replace(extra={"weights": jnp.array([1.0, -2.0])})
    arguments = (random_table(plan_config, 2, 0), False, params, *random_roots(size=2, lengths=(2, 0)))
    got = jax.jit(make(sequence_planner.make_plan_fn))(*arguments)
    assert_same_plans(got, make(plain_search.make_plan_fn)(*arguments))


def test_stop_tokens_can_be_kept_to_whole_transitions():
    # Stop is by far the likeliest token everywhere.
    params, roots = random_params(config=ONE_LAYER, stop_logit=40.0), random_roots(size=2, lengths=[0, 2])
    plan_config = sequence_planner.PlanConfig(horizon=3, beam_width=3, window=(3, 2), action_cdf=0.0)

    def stops(**changes):
        changed = dataclasses.replace(plan_config, **changes)
        plan_fn = sequence_planner.make_plan_fn(config=ONE_LAYER, plan_config=changed)
        plan = jax.jit(plan_fn)(params, *roots)
        return np.asarray(plan.tokens == SPEC.stop_token)  # [B, H, D]

    assert stops()[:, 0, SPEC.observation_dim :].all()
    kept = stops(stop_within_transition=False)
    assert kept[:, 1:].all() and not kept[:, 0].any()


def test_iql_guides_by_the_least_critic_in_the_units_of_its_rewards():
    plan_config = sequence_planner.PlanConfig(horizon=4, beam_width=4, num_expand=2, window=(3, 2), discount=0.8)
    iql_config = iql.IQLConfig(observation_dim=3, action_dim=2, hidden_dims=(8, 8))
    units = {
        "observation_mean": np.ones(3),
        "observation_std": np.full(3, 2.0),
        "reward_scale": 3.0,
        "reward_shift": -0.5,
    }
    init = functools.partial(iql.init, config=iql_config, units=units)
    learners = jax.vmap(init)(jax.random.split(jax.random.key(1), 2)).params
    params = random_params(config=ONE_LAYER, stop_logit=-20.0).replace(extra=learners)

    def plain_score_fn(params, returns, proposal, step):
        """Add up rewards one by one: 3 r - 0.5 each; then the least of two learners' two critics."""
        shift = -0.5 * sum(0.8**k for k in range(step))
        place = proposal.observation[:, :, None], proposal.action
        first, second = (jax.tree.map(operator.itemgetter(i), learners) for i in range(2))
        least = np.minimum(iql.q_values(first, *place).min(axis=0), iql.q_values(second, *place).min(axis=0))
        return (3 * returns + shift)[..., None] + 0.8**step * least

    roots = random_roots(size=2, lengths=[0, 2])
    table = random_table(plan_config, 2, seed=3)
    settings = {"config": ONE_LAYER, "plan_config": plan_config}
    expected = make_drawn_plan_fn(plain_search.make_plan_fn, **settings, score_fn=plain_score_fn)(
        np.asarray(table), False, params, *roots
    )
    guided = sequence_planner.guide_by_q(discount=0.8)
    plan_fn = make_drawn_plan_fn(sequence_planner.make_plan_fn, **settings, **guided)
    got = jax.jit(plan_fn)(table, False, params, *roots)
    assert_same_plans(got, expected, atol=1e-3)


def test_memory_does_not_hold_the_context_once_per_beam():
    width, contexts = 64, (4, 34)
    config = dataclasses.replace(ONE_LAYER, embed_dim=64, max_transitions=40)
    params = random_params(config=config)
    sizes = []
    for size in contexts:
        plan_config = sequence_planner.PlanConfig(horizon=2, beam_width=width, window=(40, 2), context_transitions=size)
        plan_fn = sequence_planner.make_plan_fn(config=config, plan_config=plan_config)
        lowered = jax.jit(plan_fn).lower(params, *random_roots(size=size, lengths=(size,)))
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    keys_and_values = 2 * 4 * config.embed_dim * (SPEC.transition_dim - 1) * (contexts[1] - contexts[0])
    assert sizes[1] - sizes[0] < width * keys_and_values / 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": (4, 4)}, r"window=\(4, 4\) must be \(max, keep\) with 1 <= keep < max"),
        ({"window": (1, 0)}, r"window=\(1, 0\) must be"),
        ({"horizon": 0}, "horizon=0 must be at least 1"),
        ({"beam_width": 0}, "beam_width=0 must be at least 1"),
        ({"horizon": 2, "replan_every": 3}, "replan_every=3 must not exceed horizon=2"),
        ({"beam_width": 4, "num_elites": 5}, "num_elites=5 must not exceed beam_width=4"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"discount": 1.5}, r"discount=1.5 must be in \[0, 1\]"),
        ({"action_cdf": -0.1}, r"action_cdf=-0.1 must be in \[0, 1\]"),
        ({"action_central": 1.1}, r"action_central=1.1 must be in \[0, 1\]"),
        ({"reward_top_k": -1}, "reward_top_k=-1 must not be negative"),
        ({"percentile": 1.0}, r"percentile=1.0 must be in \[0, 1\), or -1 for the mean"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sequence_planner.PlanConfig(**changes)


def test_what_does_not_suit_the_model_is_refused():
    plan_config = sequence_planner.PlanConfig(window=(11, 4))
    with pytest.raises(ValueError, match=r"window=\(11, 4\) exceeds the model's max_transitions=10; use at most"):
        sequence_planner.make_plan_fn(config=ONE_LAYER, plan_config=plan_config)
    with pytest.raises(ValueError, match="a top_k of 10 exceeds the 9 tokens of a dimension"):
        sequence_planner.make_plan_fn(config=CONFIG, plan_config=sequence_planner.PlanConfig(action_top_k=10))
    with pytest.raises(ValueError, match="goal-conditioned"):
        sequence_planner.make_plan_fn(
            config=dataclasses.replace(ONE_LAYER, goal_conditioned=True), plan_config=sequence_planner.PlanConfig()
        )
    plan_fn = sequence_planner.make_plan_fn(config=ONE_LAYER, plan_config=sequence_planner.PlanConfig())
    rng_key, context, observation = random_roots(size=2, lengths=(1,))
    with pytest.raises(ValueError, match="observation has 2 dimensions, the model 3"):
        plan_fn(random_params(), rng_key, context, observation[:, :2])
