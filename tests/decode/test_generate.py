"""Generation: decode with a cache equals the full forward, in one compiled loop, whatever stands beside a row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.decode import generate as module
from internjax.decode.generate import (
    ERROR,
    LENGTH,
    RUNNING,
    STOP,
    decoding_params,
    generate,
    init_state,
    prefill,
    step,
    stop_table,
    stream,
)
from internjax.decode.sample import make_sampling
from internjax.decode.score import logprobs
from internjax.model import decoder, rope
from internjax.model.cache import dense_cache, paged_cache
from internjax.model.config import DynamicNTK, ModelConfig
from internjax.model.lora import LoraConfig, apply_config, init_lora
from internjax.model.quantize import quantize_params

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_position_embeddings=64,
    rope_theta=10_000.0,
    initializer_range=0.2,
    dtype="float32",
)
PARAMS = decoder.init(CONFIG, jax.random.key(0))
LENGTHS = np.array([5, 1, 9, 3], np.int32)
# Padding holds real-looking tokens: whatever stands there must not matter.
PROMPTS = np.random.default_rng(0).integers(0, 64, (4, 9)).astype(np.int32)
GREEDY = make_sampling(4, temperature=0.0)


_LOGITS = jax.jit(decoder.logits, static_argnames=("config",))


def full_forward_greedy(out, *, config=CONFIG, params=PARAMS, length=None, lora=None):
    """Returns `[B, N]` what the forward pass over whole rows would have drawn at every place of `out`.

    Equal to out.tokens exactly if `out` is the greedy continuation: the first differing token would show.
    """
    N = out.tokens_BN.shape[1]
    rows = [np.concatenate([PROMPTS[b, :n], out.tokens_BN[b], np.zeros(9 - n, int)]) for b, n in enumerate(LENGTHS)]
    inv_freq_BF = rope.inv_freq(config, length=length)[None]
    logits_BTV = _LOGITS(params, jnp.array(rows), config=config, inv_freq_BF=inv_freq_BF, lora=lora)
    best_BT = np.asarray(logits_BTV).argmax(axis=-1)
    return np.array([best_BT[b, n - 1 : n - 1 + N] for b, n in enumerate(LENGTHS)])


def with_pages(state, *, config, dtype, page_size=4, seed=0):
    """Returns the state on a paged cache whose rows own scattered pages."""
    B, S = state.tokens_BS.shape
    pages_per_row = -(-S // page_size)
    num_pages = B * pages_per_row + 3
    cache = paged_cache(config, num_pages, page_size, batch=B, pages_per_row=pages_per_row, dtype=dtype)
    table = np.random.default_rng(seed).permutation(num_pages)[: B * pages_per_row].reshape(B, -1)
    return dataclasses.replace(state, cache=dataclasses.replace(cache, page_table_BM=jnp.asarray(table, jnp.int32)))


def decoded_logits(dtype, paged, *, num_tokens=6):
    """Returns per step the logits `[N, B, V]` of the decode path, and the tokens `[B, S]` that it was fed."""
    length = PROMPTS.shape[1] + num_tokens
    state = init_state(
        PROMPTS,
        LENGTHS,
        config=CONFIG,
        sampling=GREEDY,
        max_new_tokens=num_tokens,
        length=length,
        cache=dense_cache(CONFIG, 4, length, dtype=dtype),
    )
    if paged:
        state = with_pages(state, config=CONFIG, dtype=dtype)
    state = jax.jit(lambda p, s: prefill(p, s, config=CONFIG, prompt_length=PROMPTS.shape[1]))(PARAMS, state)
    steps = []
    run = jax.jit(lambda p, s: step(p, s, config=CONFIG))
    read = jax.jit(
        lambda p, s: decoder.logits(
            p,
            s.tokens_BS[jnp.arange(4), s.lengths_B - 1][:, None],
            config=CONFIG,
            positions_BT=(s.lengths_B - 1)[:, None],
            cache=s.cache,
        )[:, 0]
    )
    for _ in range(num_tokens):
        steps.append(read(PARAMS, state))
        state = run(PARAMS, state)
    return np.array(steps), np.array(state.tokens_BS)


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 0.05), ("int8", 0.1)])
def test_cached_decode_equals_the_full_forward(dtype, bound, paged):
    steps_NBV, tokens_BS = decoded_logits(dtype, paged)
    full_BSV = np.array(decoder.logits(PARAMS, jnp.asarray(tokens_BS), config=CONFIG))
    for b, length in enumerate(LENGTHS):
        wanted_NV = full_BSV[b, length - 1 : length - 1 + len(steps_NBV)]
        assert np.abs(steps_NBV[:, b] - wanted_NV).max() < bound * np.abs(full_BSV).max()


def test_lossy_caches_are_really_lossy():
    """The bounds above would also hold for a cache that ignored its dtype."""
    exact, _ = decoded_logits("float32", False)
    for dtype in ("bfloat16", "int8"):
        assert np.abs(decoded_logits(dtype, False)[0][:3] - exact[:3]).max() > 1e-4


def test_generate_equals_repeated_full_forwards_on_ragged_prompts():
    out = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=12)
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out))
    assert out.lengths_B.tolist() == [12] * 4 and out.finish_B.tolist() == [LENGTH] * 4


def test_what_stands_in_the_padding_does_not_matter():
    other = np.where(np.arange(9) < LENGTHS[:, None], PROMPTS, 63 - PROMPTS)
    a, b = (
        generate(PARAMS, p, LENGTHS, config=CONFIG, sampling=make_sampling(4, repetition_penalty=1.3), max_new_tokens=8)
        for p in (PROMPTS, other)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_long_prompts_are_read_in_chunks(monkeypatch):
    whole = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=5)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 4)  # the smallest chunk is 16 tokens a row
    prompts = np.tile(PROMPTS, (1, 5))
    lengths = LENGTHS + np.array([30, 0, 36, 12], np.int32)
    chunked = generate(PARAMS, prompts, lengths, config=CONFIG, sampling=GREEDY, max_new_tokens=5)
    monkeypatch.undo()
    jax.clear_caches()
    at_once = generate(PARAMS, prompts, lengths, config=CONFIG, sampling=GREEDY, max_new_tokens=5)
    np.testing.assert_array_equal(chunked.tokens_BN, at_once.tokens_BN)
    np.testing.assert_array_equal(chunked.tokens_BN[1], whole.tokens_BN[1])


def test_a_stop_token_ends_its_row_and_is_kept_and_counted():
    free = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=12)
    stop = int(free.tokens_BN[2, 4])
    out = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=12, stop_ids=(99, stop))
    for row in range(4):
        tokens = free.tokens_BN[row].tolist()
        wanted = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert out.lengths_B[row] == len(wanted)
        assert out.tokens_BN[row].tolist() == wanted + [0] * (12 - len(wanted))
        assert (out.logprobs_BN[row, len(wanted) :] == 0).all() and (out.logprobs_BN[row, : len(wanted)] < 0).all()
        assert out.finish_B[row] == (STOP if stop in tokens else LENGTH)


def test_a_stop_token_in_the_last_place_is_a_stop():
    free = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=1)
    stop_ids = np.where(np.arange(4)[:, None] == 2, free.tokens_BN, -1)
    out = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=1, stop_ids=stop_ids)
    assert out.finish_B.tolist() == [LENGTH, LENGTH, STOP, LENGTH]


def test_the_loop_ends_when_every_row_is_done():
    """A row that never stops would need 10^5 steps; all rows stop at their first token."""
    free = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=1)
    state = module._start(
        PARAMS,
        PROMPTS,
        LENGTHS,
        GREEDY,
        jnp.asarray(free.tokens_BN),
        None,
        None,
        config=CONFIG,
        max_new_tokens=4,
        cache_dtype="float32",
    )
    steps = 0
    while bool(state.active_B.any()):
        state, steps = step(PARAMS, state, config=CONFIG), steps + 1
    assert steps == 1


def test_stream_brings_the_tokens_of_generate():
    keywords = {"config": CONFIG, "sampling": make_sampling(4, seed=5), "max_new_tokens": 12, "stop_ids": (7, 9, 20)}
    out = generate(PARAMS, PROMPTS, LENGTHS, **keywords)
    rows, values, finish = [[] for _ in range(4)], [[] for _ in range(4)], None
    for drawn in stream(PARAMS, PROMPTS, LENGTHS, **keywords):
        for row, token in enumerate(drawn.ids_B):
            if token >= 0:
                rows[row].append(int(token))
                values[row].append(float(drawn.logprobs_B[row]))
        finish = drawn.finish_B
    assert len(set(out.lengths_B.tolist())) > 1, "no row stopped early: the test shows nothing"
    for row, length in enumerate(out.lengths_B):
        assert rows[row] == out.tokens_BN[row, :length].tolist()
        np.testing.assert_allclose(values[row], out.logprobs_BN[row, :length], atol=1e-5)
    np.testing.assert_array_equal(finish, out.finish_B)


def test_a_row_draws_the_same_alone_beside_others_and_in_another_slot():
    sampling = make_sampling(4, temperature=0.8, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=[3, 4, 5, 6])
    together = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=sampling, max_new_tokens=10)
    order = np.array([2, 0, 3, 1])
    moved = generate(
        PARAMS,
        PROMPTS[order],
        LENGTHS[order],
        config=CONFIG,
        sampling=jax.tree.map(lambda x: x[order], sampling),
        max_new_tokens=10,
    )
    np.testing.assert_array_equal(moved.tokens_BN, together.tokens_BN[order])
    for row in range(4):
        alone = generate(
            PARAMS,
            PROMPTS[row : row + 1],
            LENGTHS[row : row + 1],
            config=CONFIG,
            sampling=jax.tree.map(lambda x, row=row: x[row : row + 1], sampling),
            max_new_tokens=10,
        )
        np.testing.assert_array_equal(alone.tokens_BN[0], together.tokens_BN[row])


def test_equal_prompts_are_answered_differently_under_one_seed():
    prompts, lengths = np.repeat(PROMPTS[:1], 8, axis=0), np.repeat(LENGTHS[:1], 8)
    out = generate(PARAMS, prompts, lengths, config=CONFIG, sampling=make_sampling(8, seed=1), max_new_tokens=8)
    assert len({tuple(row) for row in out.tokens_BN.tolist()}) > 4


def test_repetition_penalty_sees_prompt_and_answer():
    """Under an enormous penalty a seen token only wins when no unseen one has a positive logit: not in 20 of 64."""
    out = generate(
        PARAMS,
        PROMPTS,
        LENGTHS,
        config=CONFIG,
        sampling=make_sampling(4, temperature=0.0, repetition_penalty=1e6),
        max_new_tokens=20,
    )
    for row in range(4):
        prompt, answer = PROMPTS[row, : LENGTHS[row]].tolist(), out.tokens_BN[row].tolist()
        assert len(set(answer)) == 20 and not set(answer) & set(prompt)


def test_logprobs_are_those_of_the_trainers_forward():
    sampling = make_sampling(4, temperature=0.7, top_k=8, repetition_penalty=1.2, seed=2)
    out = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=sampling, max_new_tokens=6)
    for row, length in enumerate(LENGTHS):
        tokens = np.concatenate([PROMPTS[row, :length], out.tokens_BN[row]])[None]
        scored = jax.jit(lambda t: logprobs(PARAMS, t, config=CONFIG, temperature=0.7))(jnp.asarray(tokens))
        np.testing.assert_allclose(out.logprobs_BN[row], scored[0, length:], atol=2e-5)


def test_generate_compiles_once_per_shape():
    def run(config=CONFIG, width=9, **changes):
        keywords = {"sampling": make_sampling(4), "max_new_tokens": 7} | changes
        return generate(PARAMS, PROMPTS[:, :width], np.minimum(LENGTHS, width), config=config, **keywords)

    run()
    before = module._generate._cache_size()
    run(sampling=make_sampling(4, temperature=0.0, top_k=3))
    run(sampling=make_sampling(4, top_p=0.5, seed=[1, 2, 3, 4]))
    run(sampling=jax.tree.map(jnp.asarray, make_sampling(4)))
    assert module._generate._cache_size() - before <= 1  # NumPy and JAX arrays may each have an entry, one program
    before = module._generate._cache_size()
    run(max_new_tokens=8)
    run(width=6)
    assert module._generate._cache_size() == before + 2


def test_generate_runs_inside_another_jitted_function():
    inside = jax.jit(
        lambda params, prompts, lengths: (
            generate(
                params, prompts, lengths, config=CONFIG, sampling=make_sampling(4, seed=8), max_new_tokens=5
            ).tokens_BN
        )
    )
    outside = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=make_sampling(4, seed=8), max_new_tokens=5)
    np.testing.assert_array_equal(inside(PARAMS, PROMPTS, LENGTHS), outside.tokens_BN)


def test_dynamic_ntk_frequencies_are_those_of_the_declared_length():
    config = dataclasses.replace(CONFIG, max_position_embeddings=8, rope_scaling=DynamicNTK(2.0))
    out = generate(PARAMS, PROMPTS, LENGTHS, config=config, sampling=GREEDY, max_new_tokens=20)
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out, config=config, length=29))
    assert (out.tokens_BN != full_forward_greedy(out, config=config)).any(), "the scaling changed nothing"
    chosen = rope.inv_freq(config, length=40)[None]
    out = generate(PARAMS, PROMPTS, LENGTHS, config=config, sampling=GREEDY, max_new_tokens=20, inv_freq_BF=chosen)
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out, config=config, length=40))


def test_adapters_and_quantised_weights_decode_like_their_full_forward():
    lora_config = LoraConfig(rank=4)
    weights = init_lora(lora_config, PARAMS, jax.random.key(1))
    weights = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), weights)
    lora = apply_config(weights, lora_config)
    out = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=6, lora=lora)
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out, lora=lora))
    assert (out.tokens_BN != full_forward_greedy(out)).any(), "the adapter changed nothing"
    packed = quantize_params(PARAMS, scheme="int4")
    out = generate(packed, PROMPTS, LENGTHS, config=CONFIG, sampling=GREEDY, max_new_tokens=6)
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out, params=packed))


def test_decoding_params_change_the_stored_dtype_and_no_result():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", norm_head=True)
    narrow = decoding_params(PARAMS, config)
    assert narrow["layers"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16
    assert narrow["head"]["kernel"].dtype == jnp.float32, "rows are normalised in float32 before the cast"
    run = jax.jit(functools.partial(decoder.logits, config=config))
    np.testing.assert_array_equal(run(narrow, PROMPTS), run(PARAMS, PROMPTS))


def test_a_row_whose_logits_break_says_so_and_leaves_the_others_alone():
    """Token 63 has a NaN embedding; only row 1 has it in its prompt."""
    embedding = PARAMS["embed"]["embedding"].at[63].set(jnp.nan)
    broken = PARAMS | {"embed": {"embedding": embedding}}
    prompts = np.where(PROMPTS == 63, 0, PROMPTS)
    sampling = make_sampling(4, temperature=0.0)
    keywords = {"config": CONFIG, "sampling": sampling, "max_new_tokens": 6}
    good = generate(PARAMS, prompts, LENGTHS, **keywords)
    assert not (good.tokens_BN == 63).any(), "the model drew the broken token by itself: choose another seed"
    prompts[1, 0] = 63
    out = generate(broken, prompts, LENGTHS, **keywords)
    assert out.finish_B.tolist() == [LENGTH, ERROR, LENGTH, LENGTH] and out.lengths_B[1] == 0
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(out.tokens_BN[others], good.tokens_BN[others])


def test_rows_may_have_their_own_longest_length():
    length = 9 + 6
    state = init_state(
        PROMPTS,
        LENGTHS,
        config=CONFIG,
        sampling=GREEDY,
        max_new_tokens=jnp.array([1, 6, 3, 2]),
        length=length,
        cache=dense_cache(CONFIG, 4, length, dtype="float32"),
    )
    state = jax.jit(lambda s: prefill(PARAMS, s, config=CONFIG, prompt_length=9))(state)
    run = jax.jit(lambda s: step(PARAMS, s, config=CONFIG))
    for _ in range(8):
        state = run(state)
    assert (state.lengths_B - LENGTHS).tolist() == [1, 6, 3, 2]
    assert state.finish_B.tolist() == [LENGTH] * 4 and RUNNING not in state.finish_B


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("driver", ["step", "generate"])
def test_memory_of_a_step_is_about_one_layers_cache(layout, driver):
    """The cache is written in place: temporaries hold one layer's slots, never a copy of all layers.

    The constant covers activations and logits of these shapes; the whole cache is 8 layers and would not fit.
    """
    config = dataclasses.replace(
        CONFIG, num_layers=8, num_kv_heads=2, num_heads=2, head_dim=32, d_model=32, vocab_size=128
    )
    B, S = 8, 2048
    params = decoder.abstract_params(config)
    one_layer = 2 * B * S * 2 * 32 * 4

    def init():
        state = init_state(
            jnp.zeros((B, 16), jnp.int32),
            jnp.full(B, 16),
            config=config,
            sampling=make_sampling(B),
            max_new_tokens=S - 16,
            length=S,
            stop_ids=(1,),
            cache=dense_cache(config, B, S, dtype="float32"),
        )
        return with_pages(state, config=config, dtype="float32", page_size=16) if layout == "paged" else state

    def loop(params, state):
        return jax.lax.while_loop(lambda s: s.active_B.any(), lambda s: step(params, s, config=config), state)

    run = loop if driver == "generate" else functools.partial(step, config=config)
    compiled = jax.jit(run, donate_argnums=1).lower(params, jax.eval_shape(init)).compile()
    memory = compiled.memory_analysis()
    constant = 2 << 20
    assert memory.alias_size_in_bytes >= 8 * one_layer, "the cache was not donated"
    assert memory.temp_size_in_bytes < 1.5 * one_layer + constant, memory.temp_size_in_bytes / one_layer


def test_stop_tables():
    assert stop_table(3, (1, 2)).tolist() == [[1, 2]] * 3
    assert stop_table(2, np.array([[1], [-1]])).tolist() == [[1], [-1]]
    assert stop_table(2, ()).shape == (2, 0)
    with pytest.raises(ValueError, match="one row of ids for each of the 3 rows"):
        stop_table(3, np.array([[1], [2]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths_B": np.array([5, 0, 9, 3])}, r"prompt lengths must be in 1..9.*given 0..9.*first token"),
        ({"lengths_B": np.array([5, 1, 10, 3])}, r"prompt lengths must be in 1..9.*given 1..10"),
        ({"lengths_B": np.array([5, 1])}, r"prompts must be \[B, T\] token ids and lengths \[B\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, given 0"),
        ({"config": dataclasses.replace(CONFIG, head="scalar")}, "scalar head"),
    ],
)
@pytest.mark.parametrize("driver", [generate, lambda *a, **k: next(stream(*a, **k))], ids=["generate", "stream"])
def test_bad_arguments_are_refused(driver, change, message):
    arguments = {"lengths_B": LENGTHS, "config": CONFIG, "sampling": GREEDY, "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        driver(PARAMS, PROMPTS, arguments.pop("lengths_B"), **arguments)


def test_draws_are_keyed_by_absolute_position():
    """The rest of an answer is drawn alike when its beginning is part of the prompt, and no two places share a draw."""
    flat = PARAMS | {"head": {"kernel": jnp.zeros_like(PARAMS["head"]["kernel"])}}
    sampling = make_sampling(1, seed=[3])
    whole = generate(flat, PROMPTS[:1], LENGTHS[:1], config=CONFIG, sampling=sampling, max_new_tokens=12)
    assert len(set(whole.tokens_BN[0].tolist())) > 6
    longer = np.concatenate([PROMPTS[0, :5], whole.tokens_BN[0, :4]])[None]
    rest = generate(flat, longer, np.array([9]), config=CONFIG, sampling=sampling, max_new_tokens=8)
    assert rest.tokens_BN[0].tolist() == whole.tokens_BN[0, 4:].tolist()


def test_generation_on_a_mesh_draws_the_same_tokens():
    """Parameters over fsdp and tensor, prompts over the batch axes, on 8 devices."""
    sampling = make_sampling(4, temperature=0.7, top_p=0.9, seed=2)
    alone = generate(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=sampling, max_new_tokens=8)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    try:
        places = sharding.shardings(decoder.logical_axes(CONFIG), decoder.abstract_params(CONFIG), mesh)
        with sharding.use(mesh):
            params = jax.device_put(PARAMS, places)
            prompts = jax.device_put(PROMPTS, sharding.batch_sharding(mesh))
            out = generate(params, prompts, LENGTHS, config=CONFIG, sampling=sampling, max_new_tokens=8)
            np.testing.assert_array_equal(out.tokens_BN, alone.tokens_BN)
            np.testing.assert_allclose(out.logprobs_BN, alone.logprobs_BN, atol=2e-5)
    finally:
        sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
