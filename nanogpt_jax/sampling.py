"""
Sampling: the key/value cache, the decoding loops over the model's forward pass (one compiled
function each), and streamed text. Within block_size, only the new token is computed. Past it,
nanoGPT's window slides, every position changes, and each token costs a full window.
"""

import codecs
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanogpt_jax.errors import UserError, check_memory
from nanogpt_jax.ops import random_bits

MIN_BUCKET = 64  # tokens; prompts and the cache are padded to 64, 128, ... up to block_size


# -----------------------------------------------------------------------------
# the next token

def filter_logits(logits, temperature, top_k=None, top_p=1.0):
    """Logits to sample from: float32 (..., V), -inf for excluded tokens.

    Divides by temperature and keeps the top_k largest logits. Of these it keeps the most likely
    ones that together reach the probability top_p.
    """
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        ordered = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
        # min, not [..., -1:], which XLA's CPU compiler rewrites to a full sort, 60 times as slow
        logits = jnp.where(logits < ordered.min(axis=-1, keepdims=True), -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True) if top_k is None else ordered
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # probability of all more likely tokens
        smallest = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn from logits."""
    temperature: float = 1.0  # 0: the most likely token
    top_k: int | None = field(default=None, metadata={'static': True})
    top_p: float = field(default=1.0, metadata={'static': True})
    n_vocab: int | None = None  # ids from here on are padding and never sampled
    keys: Any = None  # a jax.random key for each sequence, (B,)

    def draw(self, logits, t):
        """The token at position t of each sequence, int32 (B,), from logits (B, V)."""
        logits = jnp.where(jnp.arange(logits.shape[-1]) < self.n_vocab, logits, -jnp.inf)
        logits = filter_logits(logits, self.temperature, self.top_k, self.top_p)
        bits = jax.vmap(lambda key: random_bits(key, logits.shape[-1:], t))(self.keys)
        u = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0 ** -23  # uniform in (0, 1)
        # the Gumbel-max trick: the argmax of logits plus this noise is a sample from their softmax
        return jnp.argmax(logits - jnp.log(-jnp.log(u)), axis=-1).astype(jnp.int32)


# -----------------------------------------------------------------------------
# the cache

class Cache:
    """Keys and values of one block, (B, nh, L, hs) each; those before position start are filled."""

    def __init__(self, k, v, start):
        self.k, self.v, self.start = k, v, start

    def attend(self, q, k, v):
        """Add the keys and values of T tokens from start on; return their causal attention.

        q, k, v and the result are (B, T, nh, hs). k and v may have fewer heads, a divisor of q's.
        """
        self.k = write_cache(self.k, k.swapaxes(1, 2), self.start)
        self.v = write_cache(self.v, v.swapaxes(1, 2), self.start)
        positions = self.start + jnp.arange(q.shape[1])
        mask = positions[:, None] >= jnp.arange(self.k.shape[2])
        return jax.nn.dot_product_attention(q, self.k.swapaxes(1, 2), self.v.swapaxes(1, 2),
                                            mask=mask[None, None])


class LastPosition:
    """Replaces the last block's cache, so that the block computes only the last position."""

    start = 0

    def attend(self, q, k, v):
        """Attention of the last token: (B, 1, nh, hs), from q, k and v of (B, T, nh, hs)."""
        return jax.nn.dot_product_attention(q[:, -1:], k, v)


def forward_with_cache(model, idx, start, cache):
    """(hidden states (B, T, C), new cache) of tokens idx (B, T) at the positions from start on."""
    caches = [Cache(k, v, start) for k, v in cache]
    x = model.hidden(idx, start=start, caches=caches)
    return x, [[c.k, c.v] for c in caches]


def write_cache(cache, new, start):
    """cache (B, nh, L, hs) with new (B, nh, T, hs) at the positions from start on."""
    def on_tpu(cache, new):
        # L last in memory: otherwise the compiler pads the cache and copies it in every call, which
        # makes ten samples three times as slow
        B, nh, L, hs = cache.shape
        cache, new = (a.swapaxes(2, 3).reshape(-1, a.shape[2]) for a in (cache, new))
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=1)
        return cache.reshape(B, nh, hs, L).swapaxes(2, 3)
    return jax.lax.platform_dependent(
        cache, new, tpu=on_tpu,
        default=lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis=2))


# -----------------------------------------------------------------------------
# decoding loops

def write_token(tokens, token, t):
    return jax.lax.dynamic_update_index_in_dim(tokens, token, t, axis=1)


@partial(jax.jit, static_argnames=('graphdef', 'bucket', 'length'))
def prefill(graphdef, params, tokens, bucket, length):
    """A cache of the given length, filled with the first `bucket` tokens (B, L) in one pass."""
    model = nnx.merge(graphdef, params)
    cache = model.empty_cache(tokens.shape[0], length)
    return forward_with_cache(model, tokens[:, :bucket], 0, cache)[1]


@partial(jax.jit, static_argnames='graphdef', donate_argnames=('tokens', 'cache'))
def decode(graphdef, weights, tokens, cache, t, stop, sampler):
    """Sample tokens[:, t:stop] with the cache, which holds all positions before t - 1.

    weights: (params, head) from sampling_weights. stop: at most the cache's length plus one.
    Returns (tokens, cache).
    """
    params, head = weights
    model = nnx.merge(graphdef, params)

    def step(t, carry):
        tokens, cache = carry
        last = jax.lax.dynamic_slice_in_dim(tokens, t - 1, 1, axis=1)
        x, cache = forward_with_cache(model, last, t - 1, cache)
        token = sampler.draw(model.head(x[:, 0], head), t)
        return write_token(tokens, token, t), cache
    return jax.lax.fori_loop(t, stop, step, (tokens, cache))


@partial(jax.jit, static_argnames='graphdef', donate_argnames='tokens')
def decode_sliding_window(graphdef, weights, tokens, t, stop, sampler):
    """Sample tokens[:, t:stop] past block_size, each from the block_size tokens before it."""
    params, head = weights
    model = nnx.merge(graphdef, params)
    window = model.config.block_size
    caches = [None] * (model.config.n_layer - 1) + [LastPosition()]

    def step(t, tokens):
        idx = jax.lax.dynamic_slice_in_dim(tokens, t - window, window, axis=1)
        logits = model.head(model.hidden(idx, caches=caches)[:, 0], head)
        return write_token(tokens, sampler.draw(logits, t), t)
    return jax.lax.fori_loop(t, stop, step, tokens)


def bucket_size(n, smallest, largest):
    """The first of smallest, 2 * smallest, 4 * smallest, ... that holds n, or largest."""
    while smallest < n:
        smallest *= 2
    return min(smallest, largest)


def stream_tokens(model, idx, max_new_tokens, sampler, key=None, chunk=None, first=0):
    """Yield the continuation of idx, int (B, T), as numpy arrays (B, n) of at most `chunk` tokens.

    Past block_size, the model sees the last block_size tokens. Dropout is off. key: a jax.random
    key, needed unless the most likely token is taken. Sequence b uses a key folded from it and
    first + b, so its tokens do not depend on B. Raises UserError for impossible settings.
    """
    check_sampling_settings(max_new_tokens, sampler)
    check_sampling_memory(model.config, *idx.shape, max_new_tokens)
    if idx.shape[1] < 1:
        raise UserError('generate needs at least one token to continue; the prompt is empty')
    if key is None and sampler.top_k != 1 and sampler.temperature != 0:
        raise UserError('generate needs key=jax.random.key(seed), '
                        'unless temperature is 0 or top_k is 1')
    if sampler.temperature == 0:
        sampler = replace(sampler, temperature=1.0, top_k=1, top_p=1.0)
    (B, t), block_size = idx.shape, model.config.block_size
    graphdef, *weights = sampling_weights(model)
    key = jax.random.key(0) if key is None else key
    sampler = replace(sampler, n_vocab=sampler.n_vocab or model.config.vocab_size,
                      keys=jax.vmap(partial(jax.random.fold_in, key))(first + np.arange(B)))
    end = t + max_new_tokens
    length = bucket_size(max(end, block_size), block_size, 2 ** 31)
    tokens = jnp.asarray(np.pad(np.asarray(idx, np.int32), ((0, 0), (0, length - t))))
    cache = None
    while t < end:
        stop = min(end, t + (chunk or end))
        if t <= block_size:
            stop = min(stop, block_size + 1)
            if cache is None:
                cache = filled_cache(graphdef, weights[0], tokens, t, end)
            tokens, cache = decode(graphdef, weights, tokens, cache, t, stop, sampler)
        else:
            tokens = decode_sliding_window(graphdef, weights, tokens, t, stop, sampler)
        yield np.asarray(tokens)[:, t:stop].copy()
        t = stop


def filled_cache(graphdef, params, tokens, t, end):
    """A cache for the positions below end (at most block_size), with those below t - 1 filled."""
    model = nnx.merge(graphdef, params)
    # prefill may read past the prompt: attention is causal, and those positions of the cache are
    # overwritten before they are seen
    length, bucket = (bucket_size(n, MIN_BUCKET, model.config.block_size) for n in (end - 1, t - 1))
    if t == 1:
        return model.empty_cache(tokens.shape[0], length)
    return prefill(graphdef, params, tokens, bucket, length)


def check_sampling_settings(max_new_tokens, sampler):
    """Raise UserError for impossible settings."""
    temperature, top_k, top_p = sampler.temperature, sampler.top_k, sampler.top_p
    if not 0 <= max_new_tokens < 2 ** 31:
        raise UserError(f'max_new_tokens is {max_new_tokens}; it must be at least 0 and below '
                        '2147483648')
    if top_k is not None and top_k < 1:
        raise UserError(f'top_k is {top_k}; it must be at least 1')
    # float32 would round smaller numbers to 0, and logits / temperature to inf
    if not 1e-30 <= top_p <= 1:
        raise UserError(f'top_p is {top_p}; it must be more than 0 (at least 1e-30) and at most 1')
    if temperature != 0 and not 1e-30 <= temperature <= 1e30:
        raise UserError(f'temperature is {temperature}; it must be 0 (the most likely token), or '
                        'from 1e-30 to 1e30')


def check_sampling_memory(config, B, T, max_new_tokens):
    """Raise UserError if B sequences of T tokens and their continuation exceed the memory."""
    # ids: buffers of up to twice the length, on the device and on the host. cache: keys and values
    # of at least two bytes
    cached = min(config.block_size, T + max_new_tokens) * config.n_layer * 2 * config.n_embd * 2
    check_memory(B * (16 * (T + max_new_tokens) + cached),
                 f'{B} samples of {max_new_tokens} new tokens',
                 'use fewer or shorter ones; --stream=True draws one after the other')


def sampling_weights(model):
    """(graphdef with dropout off, parameters with the kernels in the compute dtype, head).

    In 16 bits, each token then reads half the bytes. head: the output layer's matrix (C, V) in
    16 bits, or None in float32, to use the model's own. The given model does not change.
    """
    model = nnx.merge(*nnx.split(model))
    model.eval()
    graphdef, params = nnx.split(model, nnx.Param)
    dtype = model.config.dtype

    def convert(path, p):
        return p.astype(dtype) if path[-1].key == 'kernel' else p
    # a copy, because the embeddings are summed in float32. A conversion inside the loop would copy
    # the full matrix for every token; another layout would copy it in every call
    head = None if dtype == 'float32' else model.head_kernel().astype(dtype)
    return graphdef, jax.tree_util.tree_map_with_path(convert, nnx.to_pure_dict(params)), head


# -----------------------------------------------------------------------------
# text

class Continuation:
    """The text of one sample, built from its tokens as they arrive.

    decode: token ids to UTF-8 bytes, which may end inside a character. stop: the sample ends before
    this text; '' for none. text: all text so far. ended: whether stop was found. n_tokens: number
    of tokens up to there.
    """

    def __init__(self, decode, stop=''):
        self.decode, self.stop = decode, stop
        self.utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        self.text, self.held, self.ended, self.n_tokens = '', '', False, 0

    def add(self, tokens, final=False):
        """Add token ids and return the new text, except an ending that may be part of stop."""
        if self.ended:
            return ''
        self.n_tokens += len(tokens)
        new = self.held + self.utf8.decode(self.decode(tokens), final)
        end = new.find(self.stop) if self.stop else -1
        self.ended = end >= 0
        if not self.ended:
            partial_stop = (n for n in range(len(self.stop)) if new.endswith(self.stop[:n]))
            end = len(new) - (0 if final else max(partial_stop, default=0))
        new, self.held = new[:end], new[end:]
        self.text += new
        return new

    def close(self):
        """End the sample: return the text that was held back."""
        return self.add([], final=True)
