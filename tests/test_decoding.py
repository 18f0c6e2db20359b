"""The model that is decoded token by token is the one that reads whole sequences."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tt_jax import decoding, transformer

SPEC, CONFIG, DIM = golden.SPEC, golden.CONFIG, golden.SPEC.transition_dim


@pytest.fixture(scope="module")
def arrays():
    return golden.load("gpt")


@pytest.fixture(scope="module")
def params(arrays):
    return jax.tree.map(jnp.asarray, golden.params_from(arrays, "state/"))


def test_decoding_token_by_token_gives_the_reference_s_logits_at_every_length(arrays, params):
    tokens = arrays["X"]

    @jax.jit
    def read(cache, token, dim, position, count):
        x, own = decoding.decode(
            params,
            token[:, None, None, None],
            dim[None],
            jnp.reshape(position, (1, 1, 1, 1)),
            [(cache, count)],
            config=CONFIG,
            visible=jnp.reshape(dim != DIM - 1, (1, 1, 1)),
        )
        own = jax.tree.map(lambda leaf: leaf[:, 0, 0], own)
        logits = decoding.next_logits(params, x[:, 0, 0, 0], dim, config=CONFIG)
        return logits, decoding.write_cache(cache, own, count)

    cache, count = decoding.empty_cache((5,), CONFIG.block_size, config=CONFIG), 0
    for position, token in enumerate(tokens.T):
        logits, cache = read(
            cache, jnp.asarray(token), jnp.int32(position % DIM), jnp.int32(position), jnp.int32(count)
        )
        count += position % DIM != DIM - 1  # what a value token has written is overwritten by the next token
        np.testing.assert_allclose(logits, arrays["logits_f64"][:, position], rtol=1e-5, atol=1e-5)


def test_decoding_a_tree_gives_each_branch_the_logits_of_its_own_sequence(params):
    # Contexts of 1 and 2 transitions, 3 beams with 8 tokens of their own, 2 candidates with 3 tokens of theirs.
    generator = np.random.default_rng(0)
    lengths, num_beams, num_expand = np.array([1, 2]), 3, 2
    keys_per_transition = DIM - 1
    trunk = generator.integers(SPEC.num_bins, size=(2, 2, DIM)).astype(np.int32)
    branch = generator.integers(SPEC.num_bins, size=(2, num_beams, DIM + SPEC.observation_dim)).astype(np.int32)
    twigs = generator.integers(SPEC.num_bins, size=(2, num_beams, num_expand, 3)).astype(np.int32)
    dims = np.delete(np.arange(DIM + SPEC.observation_dim), DIM - 1)  # but for the value token
    start = (lengths * DIM)[:, None, None, None]

    @jax.jit
    def decode(tokens, dims, positions, past):
        visible = jnp.tri(tokens.shape[-1], dtype=bool)[None]
        return decoding.decode(params, tokens, dims % DIM, positions, past, config=CONFIG, visible=visible)

    trunk_dims = np.arange(2 * DIM).reshape(2, DIM)[:, :-1].reshape(-1)
    trunk_positions = trunk_dims[None, None, None]
    _, roots = decode(trunk[:, :, :-1].reshape(2, 1, 1, -1), trunk_dims, trunk_positions, [])
    shared = (jax.tree.map(lambda leaf: leaf[:, 0, 0], roots), lengths * keys_per_transition)
    _, own = decode(branch[:, :, None, dims], dims, start + dims, [shared])
    beams = (jax.tree.map(lambda leaf: leaf[:, :, 0], own), len(dims))
    twig_dims = DIM + SPEC.observation_dim + np.arange(3)
    x, _ = decode(twigs, twig_dims, start + twig_dims, [shared, beams])
    logits = decoding.next_logits(params, x[..., -1, :], jnp.int32(twig_dims[-1] % DIM), config=CONFIG)
    apply = jax.jit(lambda params, tokens: transformer.apply(params, tokens, config=CONFIG))
    for env, length in enumerate(lengths):
        sequences = [
            np.concatenate([trunk[env, :length].reshape(-1), branch[env, beam], twigs[env, beam, expansion]])
            for beam, expansion in np.ndindex(num_beams, num_expand)
        ]
        expected = apply(params, np.stack(sequences))[:, -1].reshape(num_beams, num_expand, -1)
        np.testing.assert_allclose(logits[env], expected, rtol=1e-5, atol=1e-5)
