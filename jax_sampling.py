"""
Sampling: the key/value cache, the loop over tokens inside one compiled function, and text as it comes.
Inside block_size each token costs one position; past it nanoGPT's window slides, every position changes, and a token costs a
whole window.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_transformer import UserError

SMALLEST_BUCKET = 64  # tokens; prompts are padded to this, or its next double, up to block_size


def sampling_logits(logits, temperature, top_k=None, top_p=1.0):
    """float32 logits (..., V) of the distribution that is sampled: divided by temperature, all below the top_k-th at -inf, and
    all but the most likely that together reach the probability top_p."""
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # what the more likely ones have together
        least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def empty_cache(config, B):
    """For each block keys and values of all positions, (B, nh, block_size, hs) in the compute type."""
    shape = B, config.n_head, config.block_size, config.n_embd // config.n_head
    return [(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.n_layer)]


def cached_hidden(model, idx, start, cache):
    """(hidden states (B, T, C), cache) of tokens idx (B, T) at the positions from start on; what is before is in the cache."""
    B, T = idx.shape
    positions = start + jnp.arange(T)
    mask = positions[:, None] >= jnp.arange(model.config.block_size)
    x = model.transformer.wte(idx) + model.transformer.wpe(positions)  # (B, T, C)
    filled = []
    for block, (ks, vs) in zip(model.transformer.h, cache):
        q, k, v = (a.swapaxes(1, 2) for a in block.attn.qkv(block.ln_1(x)))  # (B, nh, T, hs)
        ks, vs = (jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=2) for old, new in ((ks, k), (vs, v)))
        att = jnp.einsum('bnqh,bnkh->bnqk', q, ks, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        att = jax.nn.softmax(jnp.where(mask, att, -jnp.inf), axis=-1).astype(vs.dtype)
        y = jnp.einsum('bnqk,bnkh->bnqh', att, vs).swapaxes(1, 2).reshape(x.shape)
        x = x + block.attn.c_proj(y)
        x = x + block.mlp(block.ln_2(x))
        filled.append((ks, vs))
    return model.transformer.ln_f(x), filled


def draw(logits, t, keys, temperature, top_k, top_p, n_vocab):
    """int32 (B,): a token for position t from logits (B, V), each row by its own key; ids from n_vocab on are never drawn."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < n_vocab, logits, -jnp.inf)
    logits = sampling_logits(logits, temperature, top_k, top_p)
    return jax.vmap(jax.random.categorical)(jax.vmap(lambda key: jax.random.fold_in(key, t))(keys), logits).astype(jnp.int32)


def write_token(tokens, token, t):
    return jax.lax.dynamic_update_index_in_dim(tokens, token, t, axis=1)


@partial(jax.jit, static_argnames=('graphdef', 'bucket'))
def prefill(graphdef, params, tokens, t, bucket):
    """(logits (B, V) after the first t tokens, cache), in one pass over the first `bucket` of tokens (B, L)."""
    model = nnx.merge(graphdef, params)
    # what lies past t - 1 goes into the cache too, unseen: attention is causal, and it is overwritten before its turn
    x, cache = cached_hidden(model, tokens[:, :bucket], 0, empty_cache(model.config, tokens.shape[0]))
    return model.head(jax.lax.dynamic_index_in_dim(x, t - 1, axis=1, keepdims=False)), cache


@partial(jax.jit, static_argnames=('graphdef', 'top_k', 'top_p'), donate_argnames=('tokens', 'cache'))
def decode(graphdef, params, tokens, logits, cache, t, stop, keys, temperature, top_k, top_p, n_vocab):
    """Fill tokens[:, t:stop], stop at most block_size, from the logits for t; (tokens, logits for stop, cache)."""
    model = nnx.merge(graphdef, params)

    def step(t, carry):
        tokens, logits, cache = carry
        token = draw(logits, t, keys, temperature, top_k, top_p, n_vocab)
        x, cache = cached_hidden(model, token[:, None], t, cache)
        return write_token(tokens, token, t), model.head(x[:, 0]), cache
    return jax.lax.fori_loop(t, stop, step, (tokens, logits, cache))


@partial(jax.jit, static_argnames=('graphdef', 'top_k', 'top_p'), donate_argnames='tokens')
def slide(graphdef, params, tokens, t, stop, keys, temperature, top_k, top_p, n_vocab):
    """Fill tokens[:, t:stop] past block_size, each from a whole window of the block_size tokens before it."""
    model = nnx.merge(graphdef, params)
    window = model.config.block_size

    def step(t, tokens):
        x = model.hidden(jax.lax.dynamic_slice_in_dim(tokens, t - window, window, axis=1))  # (B, window, C)
        return write_token(tokens, draw(model.head(x[:, -1]), t, keys, temperature, top_k, top_p, n_vocab), t)
    return jax.lax.fori_loop(t, stop, step, tokens)


def bucket_of(n, smallest, largest):
    """The smallest of smallest, twice that and so on that holds n, or largest."""
    while smallest < n:
        smallest *= 2
    return min(smallest, largest)


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, key=None, n_vocab=None, chunk=None):
    """Yield the continuation of idx, int (B, T), as numpy arrays (B, n): max_new_tokens in all, at most chunk at a time.

    Past block_size the model sees the last block_size tokens. Dropout is off. temperature 0 takes the most likely token. key: a
    jax.random key; row b draws with a key of its own, whatever B is. n_vocab: ids from here on are padding, never drawn.
    Raises UserError for settings that nothing can be drawn with.
    """
    check(idx, max_new_tokens, temperature, top_k, top_p, key)
    if temperature == 0:
        temperature, top_k, top_p = 1.0, 1, 1.0
    (B, t), block_size = idx.shape, model.config.block_size
    graphdef, params = nnx.split(in_eval_mode(model), nnx.Param)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0) if key is None else key))(jnp.arange(B))
    how = dict(keys=keys, temperature=temperature, top_k=top_k, top_p=top_p, n_vocab=n_vocab or model.config.vocab_size)
    end = t + max_new_tokens
    tokens = jnp.pad(jnp.asarray(idx, jnp.int32), ((0, 0), (0, bucket_of(max(end, block_size), block_size, 2**31) - t)))
    logits = None
    while t < end:
        stop = min(end, t + (chunk or end))
        if t < block_size:
            stop = min(stop, block_size)
            if logits is None:
                logits, cache = prefill(graphdef, params, tokens, t, bucket_of(t, SMALLEST_BUCKET, block_size))
            tokens, logits, cache = decode(graphdef, params, tokens, logits, cache, t, stop, **how)
        else:
            tokens = slide(graphdef, params, tokens, t, stop, **how)
        yield np.asarray(tokens[:, t:stop])
        t = stop


def check(idx, max_new_tokens, temperature, top_k, top_p, key):
    """Raise UserError for settings that nothing can be drawn with."""
    if idx.shape[1] < 1:
        raise UserError('generate needs at least one token to continue; the prompt is empty')
    if max_new_tokens < 0:
        raise UserError(f'max_new_tokens is {max_new_tokens}; it must be at least 0')
    if top_k is not None and top_k < 1:
        raise UserError(f'top_k is {top_k}; it must be at least 1')
    if not 0 < top_p <= 1:
        raise UserError(f'top_p is {top_p}; it must be more than 0 and at most 1')
    if temperature < 0:
        raise UserError(f'temperature is {temperature}; it must be 0 (most likely token) or more')
    if key is None and top_k != 1 and temperature != 0:
        raise UserError('generate needs key=jax.random.key(seed), unless temperature is 0 or top_k is 1')


def in_eval_mode(model):
    """The model with its dropout off; the one given stays as it is."""
    model = nnx.merge(*nnx.split(model))
    model.eval()
    return model
