"""The search by likelihood is the reference's, and cached or not it finds the same tokens in every window."""

import dataclasses
import functools
import itertools

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sequence_planner import CONFIG, ONE_LAYER, SPEC, random_params, random_roots
from transform_checks import check_transforms

from experiments.common import plain_search
from tt_jax import likelihood_search, planning, sequence_planner, tokenization, types

GOAL_CONFIG = dataclasses.replace(golden.CONFIG, goal_conditioned=True, reference_goal_mask=True)
NO_FILTERS = {"action_cdf": 0.0, "observation_top_k": 0, "reward_top_k": 0}
NUM_TOKENS, VOCABULARY = 4, 3


def search_chain(tables, beam_width):
    """Search where `tables` [B, T, V + 1, V + 1] are the logits of a token by step and the token before it (first: 0).

    The state is the whole of what was found, so that a wrong beam is noticed.
    """

    def next_logits(tables, found, step):
        before = jnp.where(step == 0, 0, found[:, :, step - 1])
        return jax.vmap(lambda table, row: table[step][row])(tables, before)

    def extend(tables, found, beam, token, step):
        del tables
        return planning.take_beams(found, beam).at[:, :, step].set(token)

    return planning.likelihood_search(
        tables,
        jnp.zeros([len(tables), beam_width, NUM_TOKENS], jnp.int32),
        next_logits_fn=next_logits,
        extend_fn=extend,
        num_tokens=NUM_TOKENS,
        beam_width=beam_width,
    )


def enumerate_chain(table):
    """Return all sequences of a chain and their log-likelihoods, best first, leaving out impossible ones."""
    with np.errstate(divide="ignore"):
        log_probs = table - np.log(np.exp(table).sum(axis=-1, keepdims=True))
    scored = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=NUM_TOKENS):
        scored[tokens] = sum(log_probs[range(NUM_TOKENS), (0, *tokens[:-1]), tokens])
    best = sorted((tokens for tokens in scored if np.isfinite(scored[tokens])), key=lambda tokens: -scored[tokens])
    return best, [scored[tokens] for tokens in best]


def random_tables(*, size=3):
    shape = (size, NUM_TOKENS, VOCABULARY, VOCABULARY)
    return 2 * np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_beam_as_wide_as_the_tree_finds_all_sequences_in_order():
    tables = random_tables()
    tables[0, 1, :, 2] = -np.inf  # no candidates: fewer sequences than beams
    tables[1, 2, 1, 0] = -1000.0  # floored tokens are candidates
    width = VOCABULARY**NUM_TOKENS
    tokens, scores = jax.jit(search_chain, static_argnums=1)(tables, width)
    for env, table in enumerate(tables):
        expected, expected_scores = enumerate_chain(table)
        assert len(expected) == (54 if env == 0 else width)
        np.testing.assert_allclose(scores[env, : len(expected)], expected_scores, rtol=1e-5, atol=1e-5)
        assert np.isneginf(scores[env, len(expected) :]).all()
        np.testing.assert_array_equal(tokens[env, :20], expected[:20])
    assert np.isfinite(scores[1]).all() and (scores[1] < -900).any()


def test_a_narrow_beam_misses_what_begins_badly_and_a_wider_one_finds_it():
    probs = np.full((NUM_TOKENS, VOCABULARY, VOCABULARY), 1 / 3, np.float32)
    probs[0, 0] = 0.6, 0.3, 0.1
    probs[1, 1] = 0.02, 0.96, 0.02  # 0.3 * 0.96 > 0.6 / 3
    tables = np.log(probs)[None]
    tokens, scores = search_chain(tables, 1)
    np.testing.assert_allclose(scores, [[np.log(0.6 / 27)]], rtol=1e-6)
    assert tokens[0, 0, 0] == 0
    tokens, scores = search_chain(tables, 2)
    np.testing.assert_allclose(scores[:, 0], np.log(0.3 * 0.96 / 9), rtol=1e-6)
    np.testing.assert_array_equal(tokens[0, 0], [1, 1, 0, 0])  # equals: the lower token first


def test_plain_jitted_and_vmapped_searches_agree():
    tables = random_tables(size=4).reshape(2, 2, NUM_TOKENS, VOCABULARY, VOCABULARY)
    _, scores = check_transforms(lambda table: search_chain(table, 3), jnp.asarray(tables))
    assert (np.diff(scores) <= 0).all()


def reference_roots(prefix, window):
    """Split a stored prefix into a context of one environment and the tokens of the observation."""
    dim = golden.SPEC.transition_dim
    tokens = np.zeros((1, window[1], dim), np.int32)
    past = prefix[0, :-3].reshape(-1, dim)[-window[1] :]
    tokens[0, : len(past)] = past
    return tokens, np.array([len(past)], np.int32), prefix[0, -3:]


def search_reference(arrays, case, config, window, **filters):
    """Search as in a stored case with the cached model."""
    tokens, length, observed = reference_roots(arrays[f"{case}/prefix"], window)
    edges = golden.load("beam")["thresholds"]
    discretizer = golden.discretizer_from(edges)
    goal = None
    if config.goal_conditioned:
        goal = tokenization.decode(discretizer, arrays[f"{case}/goal"][0], dims=slice(3)).astype(np.float32)
    state = golden.load("goal" if config.goal_conditioned else "gpt")
    params = sequence_planner.PlannerParams(
        transformer=golden.params_from(state, "state/", config), discretizer=discretizer, goal=goal
    )
    num_tokens = len(arrays[f"{case}/best"]) - arrays[f"{case}/prefix"].size
    plan_config = sequence_planner.PlanConfig(
        beam_width=len(arrays[f"{case}/cum_logp"]), window=window, context_transitions=window[1], **filters
    )
    search_fn = likelihood_search.make_search_fn(config=config, plan_config=plan_config, num_tokens=num_tokens)
    observation = tokenization.decode(discretizer, observed, dims=slice(3)).astype(np.float32)[None]
    context = types.Context(tokens=tokens, length=length)
    found, scores = jax.jit(search_fn)(params, context, observation)
    np.testing.assert_array_equal(found[0, 0], arrays[f"{case}/best"][arrays[f"{case}/prefix"].size :])
    np.testing.assert_allclose(scores[0], arrays[f"{case}/cum_logp"], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("case", ["plain", "wide", "ctx1", "topk3", "cdf03", "temp2", "crop"])
def test_the_search_is_the_reference_s(case):
    arrays, name = golden.load("beam"), f"beam_search/{case}"
    top_k, cdf = int(arrays[f"{name}/topk"]), float(arrays[f"{name}/cdf"])
    filters = {f"{kind}_top_k": top_k for kind in ("action", "observation", "reward")}
    filters |= {f"{kind}_cdf": cdf for kind in ("action", "observation", "reward")}
    # The reference's limit of m D - 1 tokens is the window (m, m - 1); none is that of the model, 27 tokens.
    window = {0: (4, 3), 13: (2, 1)}[int(arrays[f"{name}/max_block"])]
    temperature = float(arrays[f"{name}/temperature"])
    search_reference(arrays, name, golden.CONFIG, window, temperature=temperature, **filters)


@pytest.mark.parametrize("case, top_k", [("plain", 0), ("topk3", 3)])
def test_the_search_for_a_goal_is_the_reference_s_with_its_columns(case, top_k):
    filters = {f"{kind}_top_k": top_k for kind in ("action", "observation", "reward")}
    search_reference(golden.load("goal"), f"beam_search/{case}", GOAL_CONFIG, (4, 3), action_cdf=0.0, **filters)


@dataclasses.dataclass(frozen=True)
class Case:
    window: tuple[int, int]
    size: int  # of the context's buffer
    lengths: tuple[int, ...]
    horizon: int
    filters: dict = dataclasses.field(default_factory=lambda: NO_FILTERS)
    goal_conditioned: bool = False
    reference_goal_mask: bool = False


CASES = {
    "window_5_4": Case((5, 4), 3, (1, 0, 3), 5),
    "window_4_2_long_context": Case((4, 2), 5, (5, 3, 0), 5, {"observation_top_k": 2, "action_cdf": 0.3}),
    "window_3_1_greedy_observations": Case((3, 1), 3, (3, 1, 2), 4, {"temperature": 1.5, "action_top_k": 3}),
    "window_10_5": Case((10, 5), 5, (5, 3, 0), 7, {"action_cdf": 0.9, "reward_cdf": 0.5, "reward_top_k": 0}),
    "near_the_median": Case((3, 2), 2, (2, 0), 3, NO_FILTERS | {"action_central": 0.6}),
    "no_context": Case((2, 1), 0, (0,), 3),
    "the_present_alone": Case((1, 0), 2, (2, 0), 1),
    "goal": Case((4, 2), 2, (2, 0, 1), 5, goal_conditioned=True),
    "goal_with_the_reference_s_columns": Case((3, 2), 2, (2, 1), 4, NO_FILTERS, True, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cached_searches_equal_those_of_uncached_passes(case):
    config = dataclasses.replace(
        CONFIG, goal_conditioned=case.goal_conditioned, reference_goal_mask=case.reference_goal_mask
    )
    plan_config = sequence_planner.PlanConfig(
        horizon=case.horizon, window=case.window, context_transitions=case.size, beam_width=5, **case.filters
    )
    plan_fn = likelihood_search.make_likelihood_plan_fn(config=config, plan_config=plan_config, keep_beams=True)
    plan_fn = jax.jit(plan_fn)
    num_tokens = case.horizon * SPEC.transition_dim - SPEC.observation_dim
    for seed in range(2):
        params = random_params(config=config, seed=seed)
        rng_key, context, observation = random_roots(size=case.size, lengths=case.lengths, seed=seed)
        edges = jax.tree.map(np.float32, params.discretizer)
        goals = [None] * len(case.lengths)
        if case.goal_conditioned:
            params = params.replace(goal=observation[::-1])
            goals = tokenization.encode(edges, np.asarray(params.goal), dims=slice(SPEC.observation_dim))
        plans = plan_fn(params, rng_key, context, observation)
        observed = tokenization.encode(edges, np.asarray(observation), dims=slice(SPEC.observation_dim))
        for env, length in enumerate(case.lengths):
            tokens, scores = plain_search.search_by_likelihood(
                params.transformer,
                np.asarray(context.tokens)[env, :length],
                observed[env],
                num_tokens,
                config=config,
                plan_config=plan_config,
                goal=goals[env],
            )
            np.testing.assert_allclose(plans.scores[env], scores, rtol=1e-5, atol=2e-4)
            expected = np.concatenate([observed[env], tokens[0]]).reshape(case.horizon, -1)
            np.testing.assert_array_equal(plans.tokens[env], expected)
            beams = np.asarray(plans.beams)[env].reshape(len(tokens), -1)
            np.testing.assert_array_equal(beams[:, SPEC.observation_dim :], tokens)
            assert (beams[:, : SPEC.observation_dim] == observed[env]).all()
            actions = expected[:, SPEC.observation_dim : SPEC.observation_dim + SPEC.action_dim]
            dims = slice(SPEC.observation_dim, SPEC.observation_dim + SPEC.action_dim)
            decoded = tokenization.decode(params.discretizer, actions, dims=dims)
            np.testing.assert_allclose(plans.actions[env], decoded, rtol=1e-6)
        np.testing.assert_array_equal(plans.action, plans.actions[:, 0])


def test_the_stop_token_can_be_kept_to_the_beginning_of_a_transition():
    # Stop is by far the likeliest token everywhere.
    params, roots = random_params(config=ONE_LAYER, stop_logit=40.0), random_roots(size=2, lengths=[0, 2])
    plan_config = sequence_planner.PlanConfig(horizon=3, beam_width=3, window=(3, 2), **NO_FILTERS)

    def stops(**changes):
        changed = dataclasses.replace(plan_config, **changes)
        plan_fn = likelihood_search.make_likelihood_plan_fn(config=ONE_LAYER, plan_config=changed)
        plan = jax.jit(plan_fn)(params, *roots)
        assert np.isfinite(plan.scores).all()
        return np.asarray(plan.tokens == SPEC.stop_token)  # [B, H, D]

    assert stops()[:, 0, SPEC.observation_dim :].all()
    kept = stops(stop_within_transition=False)
    assert not kept[:, 0].any() and kept[:, 1:].all()


@pytest.fixture(scope="module")
def goal_plans():
    """Return the jitted function of plans for a goal, which counts its traces."""
    config = dataclasses.replace(ONE_LAYER, goal_conditioned=True)
    plan_config = sequence_planner.PlanConfig(horizon=3, beam_width=4, window=(3, 2), context_transitions=2)
    plan_fn = likelihood_search.make_likelihood_plan_fn(config=config, plan_config=plan_config)
    chex.clear_trace_counter()
    params = random_params(config=config).replace(goal=jnp.array([[0.5, -1.0, 2.0], [-2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    return params, jax.jit(chex.assert_max_traces(plan_fn, n=2))


def test_a_plan_for_a_goal_depends_on_its_own_environment_alone(goal_plans):
    params, plan_fn = goal_plans
    rng_key, context, observation = random_roots(size=2, lengths=(2, 0, 1))
    plans = plan_fn(params, rng_key, context, observation)
    other_goal = params.replace(goal=params.goal.at[1].set(jnp.array([3.0, 3.0, -3.0])))
    beyond = np.arange(2)[None] >= np.asarray(context.length)[:, None]
    other_context = context.replace(tokens=jnp.where(beyond[..., None], 0, context.tokens))
    other_keys = random_roots(size=2, lengths=(2, 0, 1), seed=1)[0]
    moved = plan_fn(other_goal, other_keys, other_context, observation)
    for env in (0, 2):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf, e=env: leaf[e], x) for x in (moved, plans)))
    assert (moved.scores[1] != plans.scores[1]).all()


def test_one_goal_serves_all_environments(goal_plans):
    params, plan_fn = goal_plans
    roots = random_roots(size=2, lengths=(2, 0, 1))
    shared = plan_fn(params.replace(goal=params.goal[0]), *roots)
    repeated = plan_fn(params.replace(goal=jnp.tile(params.goal[:1], (3, 1))), *roots)
    chex.assert_trees_all_equal(shared, repeated)


def test_what_does_not_suit_the_model_is_refused():
    config = dataclasses.replace(ONE_LAYER, goal_conditioned=True)
    plan_config = sequence_planner.PlanConfig(horizon=1, beam_width=2, window=(2, 1))
    make = functools.partial(likelihood_search.make_likelihood_plan_fn, plan_config=plan_config)
    roots = random_roots(size=1, lengths=(1, 1))
    params = random_params(config=config)
    with pytest.raises(ValueError, match="a goal-conditioned model needs a goal; set PlannerParams.goal"):
        make(config=config)(params, *roots)
    with pytest.raises(ValueError, match=r"goal has shape \(1, 3\), expected \(3,\) or \(2, 3\)"):
        make(config=config)(params.replace(goal=np.zeros([1, 3])), *roots)
    with pytest.raises(ValueError, match="trained without goals; leave PlannerParams.goal unset"):
        make(config=ONE_LAYER)(random_params(config=ONE_LAYER).replace(goal=np.zeros(3)), *roots)
    with pytest.raises(ValueError, match="observation has 2 dimensions, the model 3"):
        make(config=config)(params, *roots[:2], roots[2][:, :2])
    long = sequence_planner.PlanConfig(window=(11, 4))
    with pytest.raises(ValueError, match=r"window=\(11, 4\) exceeds the model's max_transitions=10; use at most"):
        likelihood_search.make_likelihood_plan_fn(config=ONE_LAYER, plan_config=long)
    with pytest.raises(ValueError, match="num_tokens=0 and beam_width=2 must both be at least 1"):
        planning.likelihood_search(None, None, next_logits_fn=None, extend_fn=None, num_tokens=0, beam_width=2)
