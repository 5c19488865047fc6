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
    replay,
    step,
    stop_table,
    stream,
)
from internjax.decode.sample import make_sampling
from internjax.decode.score import logprobs
from internjax.model import decoder, rope
from internjax.model.cache import dense_cache, paged_cache
from internjax.model.config import DynamicNTK
from internjax.model.lora import LoraConfig, apply_config, init_lora
from internjax.model.quantize import quantize_params
from tests.decode.small import CONFIG, PARAMS

LENGTHS = np.array([5, 1, 9, 3], np.int32)
# Padding holds real-looking tokens: whatever stands there must not matter.
PROMPTS = np.random.default_rng(0).integers(0, 64, (4, 9)).astype(np.int32)
GREEDY = make_sampling(4, temperature=0.0)
N = 12
LENGTH_OF_ROWS = 9 + N
FREQUENCIES = rope.inv_freq(CONFIG)[None]


def run(prompts=PROMPTS, lengths=LENGTHS, *, sampling=GREEDY, stop_ids=(), params=PARAMS, **inputs):
    """Generates at the one shape that these tests share, so that few programs are compiled: N tokens, 3 stop ids."""
    keywords = {"config": CONFIG, "inv_freq_BF": FREQUENCIES} | inputs
    stop_ids = np.asarray(stop_ids, np.int32)
    stop_ids = np.broadcast_to(stop_ids, (len(lengths), stop_ids.shape[-1]))
    stops = np.pad(stop_ids, ((0, 0), (0, 3 - stop_ids.shape[-1])), constant_values=-1)
    return generate(params, prompts, lengths, sampling=sampling, max_new_tokens=N, stop_ids=stops, **keywords)


@functools.cache
def greedy():
    return run()


_LOGITS = jax.jit(decoder.logits, static_argnames=("config",))
_LOGPROBS = jax.jit(logprobs, static_argnames=("config",))


def whole_rows(out):
    """Returns `[B, 9 + N]` prompts with what was generated after them."""
    rows = [np.concatenate([PROMPTS[b, :n], out.tokens_BN[b], np.zeros(9 - n, int)]) for b, n in enumerate(LENGTHS)]
    return jnp.array(rows, jnp.int32)


def generated_part(found_BT):
    """Returns `[B, N]` what stands at the places of generated tokens."""
    return np.array([np.asarray(found_BT)[b, n : n + N] for b, n in enumerate(LENGTHS)])


def full_forward_greedy(out, *, inv_freq_BF=FREQUENCIES, params=PARAMS, lora=None):
    """Returns `[B, N]` what the forward pass over whole rows would have drawn at every place of `out`.

    Equal to out.tokens exactly if `out` is the greedy continuation: the first differing token would show.
    """
    logits_BTV = _LOGITS(params, whole_rows(out), config=CONFIG, inv_freq_BF=inv_freq_BF, lora=lora)
    best_BT = np.asarray(logits_BTV).argmax(axis=-1)
    return generated_part(np.pad(best_BT, ((0, 0), (1, 0))))


def with_pages(state, *, config, dtype, page_size=4, seed=0):
    """Returns the state on a paged cache whose rows own scattered pages."""
    B, S = state.tokens_BS.shape
    pages_per_row = -(-S // page_size)
    num_pages = B * pages_per_row + 3
    cache = paged_cache(config, num_pages, page_size, batch=B, pages_per_row=pages_per_row, dtype=dtype)
    table = np.random.default_rng(seed).permutation(num_pages)[: B * pages_per_row].reshape(B, -1)
    return dataclasses.replace(state, cache=dataclasses.replace(cache, page_table_BM=jnp.asarray(table, jnp.int32)))


@jax.jit
def decoded(params, state):
    """Returns the state after its prompts are read and N steps are done, in one program."""
    state = prefill(params, state, config=CONFIG, prompt_length=PROMPTS.shape[1])
    return jax.lax.fori_loop(0, N, lambda _, state: step(params, state, config=CONFIG), state)


@functools.partial(jax.jit, static_argnames=("dtype",))
def paged_state(max_new_tokens, *, dtype="float32"):
    cache = dense_cache(CONFIG, 4, LENGTH_OF_ROWS, dtype=dtype)
    keywords = {"config": CONFIG, "sampling": GREEDY, "length": LENGTH_OF_ROWS, "cache": cache}
    state = init_state(jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), max_new_tokens=max_new_tokens, **keywords)
    return with_pages(state, config=CONFIG, dtype=dtype)


@functools.cache
def answers(layout, dtype):
    """Returns the greedy answers `[B, N]` under a cache, and the log-probabilities that decoding gave its tokens."""
    if layout == "dense":
        out = run(cache_dtype=dtype)
        return out.tokens_BN, np.asarray(out.logprobs_BN)
    state = decoded(PARAMS, paged_state(jnp.full(4, N), dtype=dtype))
    return generated_part(state.tokens_BS), generated_part(state.logprobs_BS)


@pytest.mark.parametrize(
    ("layout", "dtype", "bound"),
    [
        ("dense", "float32", 2e-5),
        ("dense", "bfloat16", 0.05),
        ("paged", "float32", 2e-5),
        ("paged", "int8", 0.1),
    ],
)
def test_cached_decode_equals_the_full_forward(layout, dtype, bound):
    tokens_BN, values_BN = answers(layout, dtype)
    rows_BT = whole_rows(greedy()._replace(tokens_BN=tokens_BN))
    wanted_BN = generated_part(_LOGPROBS(PARAMS, rows_BT, config=CONFIG))
    assert np.abs(values_BN - wanted_BN).max() < bound
    # The most likely tokens, but for ties within the rounding of the cache.
    logits_BTV = np.asarray(_LOGITS(PARAMS, rows_BT, config=CONFIG, inv_freq_BF=FREQUENCIES, lora=None))
    short_BT = logits_BTV.max(axis=-1) - np.take_along_axis(logits_BTV, np.roll(rows_BT, -1, 1)[..., None], 2)[..., 0]
    assert generated_part(np.roll(short_BT, 1, axis=1)).max() < 2 * bound


def test_lossy_caches_are_really_lossy():
    """The bounds above would also hold for a cache that ignored its dtype."""
    for layout, dtype in (("dense", "bfloat16"), ("paged", "int8")):
        assert np.abs(answers(layout, dtype)[1][:, :3] - answers("dense", "float32")[1][:, :3]).max() > 1e-4


def test_generate_equals_repeated_full_forwards_on_ragged_prompts():
    out = greedy()
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out))
    assert out.lengths_B.tolist() == [N] * 4 and out.finish_B.tolist() == [LENGTH] * 4


def test_what_stands_in_the_padding_does_not_matter():
    other = np.where(np.arange(9) < LENGTHS[:, None], PROMPTS, 63 - PROMPTS)
    a, b = (run(p, sampling=make_sampling(4, repetition_penalty=1.3)) for p in (PROMPTS, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_long_prompts_are_read_in_chunks(monkeypatch):
    """The state before the first draw, all that drawing knows of a prompt, is that of prompts read at once."""
    prompts = np.tile(PROMPTS, (1, 5))
    lengths = LENGTHS + np.array([30, 0, 36, 12], np.int32)
    states, num_read = [], []
    read = module.prefill_chunk
    monkeypatch.setattr(
        module, "prefill_chunk", lambda p, c, t, **k: (num_read.append(t.shape[1]), read(p, c, t, **k))[1]
    )
    for tokens in (4096, 4):  # the smallest chunk is 16 tokens a row
        monkeypatch.setattr(module, "PREFILL_TOKENS", tokens)
        start = functools.partial(module._start.__wrapped__, config=CONFIG, max_new_tokens=5, cache_dtype="float32")
        # A function of its own each time: jit would give back the program of the other chunks.
        states.append(
            jax.jit(lambda *args, start=start: start(*args))(PARAMS, prompts, lengths, GREEDY, (), None, None)
        )
    assert num_read == [44, 16]
    caches = [dataclasses.astuple(state.cache) for state in states]
    whole, chunked = (dataclasses.replace(state, cache=None) for state in states)
    jax.tree.map(np.testing.assert_array_equal, whole, chunked)
    written = False
    for one, other in zip(jax.tree.leaves(caches[0]), jax.tree.leaves(caches[1])):
        np.testing.assert_allclose(one, other, atol=2e-5)
        written |= bool(np.abs(one).max() > 0.1)
    assert written


def test_a_stop_token_ends_its_row_and_is_kept_and_counted():
    free = greedy()
    stop = int(free.tokens_BN[2, 4])
    out = run(stop_ids=(99, stop))
    for row in range(4):
        tokens = free.tokens_BN[row].tolist()
        wanted = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert out.lengths_B[row] == len(wanted)
        assert out.tokens_BN[row].tolist() == wanted + [0] * (N - len(wanted))
        assert (out.logprobs_BN[row, len(wanted) :] == 0).all() and (out.logprobs_BN[row, : len(wanted)] < 0).all()
        assert out.finish_B[row] == (STOP if stop in tokens else LENGTH)


def test_a_stop_token_in_the_last_place_is_a_stop():
    free = np.asarray(run(sampling=make_sampling(4, seed=0)).tokens_BN)
    last = free[:, -1:]
    assert last[2] not in free[2, :-1], "the last token stands earlier too: choose another seed"
    out = run(sampling=make_sampling(4, seed=0), stop_ids=np.where(np.arange(4)[:, None] == 2, last, -1))
    assert out.finish_B.tolist() == [LENGTH, LENGTH, STOP, LENGTH] and out.lengths_B.tolist() == [N] * 4


def streamed(sampling, stop_ids):
    """Returns the steps of a stream at the shape of `run`."""
    stops = np.broadcast_to(np.asarray(stop_ids, np.int32), (4, 3))
    return list(stream(PARAMS, PROMPTS, LENGTHS, config=CONFIG, sampling=sampling, max_new_tokens=N, stop_ids=stops))


def test_the_loop_ends_when_every_row_is_done():
    """All rows stop at their first token, long before their length."""
    (only,) = streamed(GREEDY, np.repeat(greedy().tokens_BN[:, :1], 3, axis=1))
    assert only.finish_B.tolist() == [STOP] * 4 and only.ids_B.tolist() == greedy().tokens_BN[:, 0].tolist()


def test_stream_brings_the_tokens_of_generate():
    sampling, stop_ids = make_sampling(4, seed=5), (7, 9, 20)
    out = run(sampling=sampling, stop_ids=stop_ids)
    rows, values, finish = [[] for _ in range(4)], [[] for _ in range(4)], None
    for drawn in streamed(sampling, stop_ids):
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
    together = run(sampling=sampling)
    order = np.array([2, 0, 3, 1])
    moved = run(PROMPTS[order], LENGTHS[order], sampling=jax.tree.map(lambda x: x[order], sampling))
    np.testing.assert_array_equal(moved.tokens_BN, together.tokens_BN[order])
    for row in range(4):
        one = slice(row, row + 1)
        alone = run(PROMPTS[one], LENGTHS[one], sampling=jax.tree.map(lambda x, one=one: x[one], sampling))
        np.testing.assert_array_equal(alone.tokens_BN[0], together.tokens_BN[row])


def test_equal_prompts_are_answered_differently_under_one_seed():
    out = run(np.repeat(PROMPTS[:1], 4, axis=0), np.repeat(LENGTHS[:1], 4), sampling=make_sampling(4, seed=1))
    assert len({tuple(row) for row in out.tokens_BN.tolist()}) == 4


def test_repetition_penalty_sees_prompt_and_answer():
    """Under an enormous penalty a seen token only wins when no unseen one has a positive logit: not in 12 of 64."""
    out = run(sampling=make_sampling(4, temperature=0.0, repetition_penalty=1e6))
    for row in range(4):
        prompt, answer = PROMPTS[row, : LENGTHS[row]].tolist(), out.tokens_BN[row].tolist()
        assert len(set(answer)) == N and not set(answer) & set(prompt)
        assert len(set(greedy().tokens_BN[row].tolist())) < N or set(greedy().tokens_BN[row].tolist()) & set(prompt)


def test_logprobs_are_those_of_the_trainers_forward():
    out = run(sampling=make_sampling(4, temperature=0.7, top_k=8, repetition_penalty=1.2, seed=2))
    scored = _LOGPROBS(PARAMS, whole_rows(out), config=CONFIG, temperature=0.7)
    np.testing.assert_allclose(out.logprobs_BN, generated_part(scored), atol=2e-5)


def test_generate_compiles_once_per_shape():
    run()
    before = module._generate._cache_size()
    run(sampling=make_sampling(4, temperature=0.0, top_k=3), stop_ids=(5, 6))
    run(sampling=make_sampling(4, top_p=0.5, seed=[1, 2, 3, 4]))
    run(sampling=jax.tree.map(jnp.asarray, make_sampling(4)))
    assert module._generate._cache_size() - before <= 1  # NumPy and JAX arrays may each have an entry, one program
    before = module._generate._cache_size()
    for _ in range(2):
        run(PROMPTS[:, :1], np.ones(4, np.int32))
    assert module._generate._cache_size() == before + 1


def test_generate_runs_inside_another_jitted_function():
    sampling = make_sampling(4, seed=8)
    inside = jax.jit(lambda params, prompts, lengths: run(prompts, lengths, sampling=sampling, params=params).tokens_BN)
    np.testing.assert_array_equal(inside(PARAMS, PROMPTS, LENGTHS), run(sampling=sampling).tokens_BN)


def test_dynamic_ntk_frequencies_are_those_of_the_declared_length():
    config = dataclasses.replace(CONFIG, max_position_embeddings=8, rope_scaling=DynamicNTK(2.0))
    out = run(config=config, inv_freq_BF=None)
    declared, chosen = (rope.inv_freq(config, length=length)[None] for length in (LENGTH_OF_ROWS, 40))
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out, inv_freq_BF=declared))
    assert (out.tokens_BN != full_forward_greedy(out)).any(), "the scaling changed nothing"
    assert (out.tokens_BN != full_forward_greedy(out, inv_freq_BF=chosen)).any(), "the length changed nothing"
    out = run(inv_freq_BF=chosen)
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out, inv_freq_BF=chosen))


def test_adapters_over_quantised_weights_decode_like_their_full_forward():
    lora_config = LoraConfig(rank=4, targets=("query", "value", "down"))
    zero = jax.device_get(jax.jit(functools.partial(init_lora, lora_config))(PARAMS, jax.random.key(1)))
    rng = np.random.default_rng(2)
    trained = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), zero)
    zero, lora = (apply_config(weights, lora_config) for weights in (zero, trained))
    packed = jax.jit(functools.partial(quantize_params, scheme="int4"))(PARAMS)
    out = run(params=packed, lora=lora)
    np.testing.assert_array_equal(out.tokens_BN, full_forward_greedy(out, params=packed, lora=lora))
    assert (out.tokens_BN != full_forward_greedy(out, params=packed, lora=zero)).any(), "the adapter changed nothing"
    assert (run(params=packed, lora=zero).tokens_BN != greedy().tokens_BN).any(), "int4 changed nothing"


def test_decoding_params_change_the_stored_dtype_and_no_result():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", norm_head=True)
    narrow = decoding_params(PARAMS, config)
    assert narrow["layers"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16
    assert narrow["head"]["kernel"].dtype == jnp.float32, "rows are normalised in float32 before the cast"
    np.testing.assert_array_equal(_LOGITS(narrow, PROMPTS, config=config), _LOGITS(PARAMS, PROMPTS, config=config))


def test_a_row_whose_logits_break_says_so_and_leaves_the_others_alone():
    """Token 31 has a NaN embedding; only row 1 has it in its prompt."""
    embedding = PARAMS["embed"]["embedding"].at[31].set(jnp.nan)
    broken = PARAMS | {"embed": {"embedding": embedding}}
    prompts = np.where(PROMPTS == 31, 0, PROMPTS)
    good = run(prompts)
    assert not (good.tokens_BN == 31).any(), "the model drew the broken token by itself: choose another seed"
    prompts[1, 0] = 31
    out = run(prompts, params=broken)
    assert out.finish_B.tolist() == [LENGTH, ERROR, LENGTH, LENGTH] and out.lengths_B[1] == 0
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(out.tokens_BN[others], good.tokens_BN[others])


def test_rows_may_have_their_own_longest_length():
    longest = jnp.array([1, N, 3, 2])
    state = decoded(PARAMS, paged_state(longest))
    assert (state.lengths_B - LENGTHS).tolist() == longest.tolist()
    assert state.finish_B.tolist() == [LENGTH] * 4 and RUNNING not in state.finish_B
    for row, n in enumerate(longest):
        np.testing.assert_array_equal(generated_part(state.tokens_BS)[row, :n], greedy().tokens_BN[row, :n])


@pytest.mark.parametrize(("layout", "driver"), [("dense", "generate"), ("dense", "step"), ("paged", "step")])
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
    whole = run(PROMPTS[:1], LENGTHS[:1], params=flat, sampling=sampling)
    assert len(set(whole.tokens_BN[0].tolist())) > 6
    longer = np.concatenate([PROMPTS[0, :5], whole.tokens_BN[0, :4]])[None]
    rest = run(longer, np.array([9], np.int32), params=flat, sampling=sampling)
    assert rest.tokens_BN[0, : N - 4].tolist() == whole.tokens_BN[0, 4:].tolist()


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_replayed_answers_have_the_bits_of_the_draw(cache_dtype):
    """Ragged prompts, answers that stop early, settings of every kind; one answer that nobody drew."""
    sampling = make_sampling(
        4,
        temperature=np.array([1.0, 0.7, 0.0, 1.3]),
        top_p=0.9,
        repetition_penalty=np.array([1.0, 1.2, 1.0, 0.8]),
        seed=5,
    )
    out = run(sampling=sampling, stop_ids=(41, 46, 25), cache_dtype=cache_dtype)
    again = functools.partial(
        replay,
        PARAMS,
        PROMPTS,
        LENGTHS,
        config=CONFIG,
        sampling=sampling,
        cache_dtype=cache_dtype,
        inv_freq_BF=FREQUENCIES,
    )
    values_BN = again(out.tokens_BN, out.lengths_B)
    np.testing.assert_array_equal(values_BN, out.logprobs_BN)
    assert len(set(np.asarray(out.lengths_B).tolist())) > 1 and (np.asarray(values_BN) != 0).any()
    other_BN = (np.asarray(out.tokens_BN) + 1) % CONFIG.vocab_size
    lengths_B = np.array([N, 3, 0, N])
    values_BN = np.asarray(again(other_BN, lengths_B))
    for answers, lengths in ((other_BN[:3], lengths_B[:3]), (other_BN, lengths_B + 1), (other_BN, lengths_B - 1)):
        with pytest.raises(ValueError, match=f"replay wants an answer for each of the 4 prompts, .* 0..{N}"):
            again(answers, lengths)
    assert (values_BN[np.arange(N) >= lengths_B[:, None]] == 0).all()
    rows_BT = whole_rows(out._replace(tokens_BN=other_BN))
    temperatures = jnp.array([1.0, 0.7, 1.0, 1.3])
    scored_BT = _LOGPROBS(PARAMS, rows_BT, config=CONFIG, inv_freq_BF=FREQUENCIES, temperature=temperatures)
    scored_BN = generated_part(scored_BT)
    bound = 2e-5 if cache_dtype == "float32" else 0.3
    assert np.abs(values_BN - scored_BN)[np.arange(N) < lengths_B[:, None]].max() < bound


def test_generation_on_a_mesh_draws_the_same_tokens():
    """Parameters over fsdp and tensor, prompts over the batch axes, on 8 devices."""
    sampling = make_sampling(4, temperature=0.7, top_p=0.9, seed=2)
    alone = run(sampling=sampling)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    try:
        places = sharding.shardings(decoder.logical_axes(CONFIG), decoder.abstract_params(CONFIG), mesh)
        with sharding.use(mesh):
            params = jax.device_put(PARAMS, places)
            prompts = jax.device_put(PROMPTS, sharding.batch_sharding(mesh))
            out = run(prompts, params=params, sampling=sampling)
            np.testing.assert_array_equal(out.tokens_BN, alone.tokens_BN)
            np.testing.assert_allclose(out.logprobs_BN, alone.logprobs_BN, atol=2e-5)
    finally:
        sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
