"""
Sampling: the key/value cache, the loop over tokens inside one compiled function, and tokens as text while they come.
Inside block_size each token costs one position; past it nanoGPT's window slides, every position changes, and a token costs a
whole window.
"""

import codecs
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_ops import random_bits
from jax_transformer import UserError

SMALLEST_BUCKET = 64  # tokens; prompts and the cache are padded to this, or its next double, up to block_size


def sampling_logits(logits, temperature, top_k=None, top_p=1.0):
    """float32 logits (..., V) of the distribution that is sampled: divided by temperature, all below the top_k-th at -inf, and
    all but the most likely that together reach the probability top_p."""
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        ordered = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
        # min, not the last: of a slice XLA's CPU compiler makes a sort of all logits, which takes 60 times as long
        logits = jnp.where(logits < ordered.min(axis=-1, keepdims=True), -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True) if top_k is None else ordered
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # what the more likely ones have together
        least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def empty_cache(config, B, length):
    """For each block keys and values of so many positions, (B, nh, length, hs) in the compute type."""
    shape = B, config.n_head, length, config.n_embd // config.n_head
    return [(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.n_layer)]


def cached_hidden(model, idx, start, cache):
    """(hidden states (B, T, C), cache) of tokens idx (B, T) at the positions from start on; what is before is in the cache."""
    B, T = idx.shape
    positions = start + jnp.arange(T)
    mask = positions[:, None] >= jnp.arange(cache[0][0].shape[2])
    x = model.transformer.wte(idx) + model.transformer.wpe(positions)  # (B, T, C)
    filled = []
    for block, (ks, vs) in zip(model.transformer.h, cache):
        q, k, v = (a.swapaxes(1, 2) for a in block.attn.qkv(block.ln_1(x)))  # (B, nh, T, hs)
        ks, vs = (jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=2) for old, new in ((ks, k), (vs, v)))
        x = rest_of_block(block, x, q, ks, vs, mask)
        filled.append((ks, vs))
    return model.transformer.ln_f(x), filled


def rest_of_block(block, x, q, ks, vs, mask):
    """A block's output for x (B, T, C), whose queries q (B, nh, T, hs) see the keys and values (B, nh, L, hs) where mask, that
    broadcasts to (T, L), is true."""
    att = jnp.einsum('bnqh,bnkh->bnqk', q, ks, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    att = jax.nn.softmax(jnp.where(mask, att, -jnp.inf), axis=-1).astype(vs.dtype)
    y = jnp.einsum('bnqk,bnkh->bnqh', att, vs).swapaxes(1, 2).reshape(x.shape)
    x = x + block.attn.c_proj(y)
    return x + block.mlp(block.ln_2(x))


def last_hidden(model, idx):
    """Hidden states (B, C) of the last position of idx (B, T), without a cache: the last block works for that one alone."""
    x = model.transformer.wte(idx) + model.transformer.wpe(jnp.arange(idx.shape[1]))  # (B, T, C)
    *blocks, last = model.transformer.h
    for block in blocks:
        x = block(x)
    q, k, v = (a.swapaxes(1, 2) for a in last.attn.qkv(last.ln_1(x)))  # (B, nh, T, hs)
    return model.transformer.ln_f(rest_of_block(last, x[:, -1:], q[:, :, -1:], k, v, True))[:, 0]


def draw(logits, t, keys, temperature, top_k, top_p, n_vocab):
    """int32 (B,): a token for position t from logits (B, V), each row by its own key; ids from n_vocab on are never drawn."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < n_vocab, logits, -jnp.inf)
    logits = sampling_logits(logits, temperature, top_k, top_p)
    bits = jax.vmap(lambda key: random_bits(key, logits.shape[-1:], t))(keys)
    u = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0 ** -23  # uniform, and neither 0 nor 1
    # the Gumbel-max trick: with this noise the largest logit is a draw from their softmax
    return jnp.argmax(logits - jnp.log(-jnp.log(u)), axis=-1).astype(jnp.int32)


def write_token(tokens, token, t):
    return jax.lax.dynamic_update_index_in_dim(tokens, token, t, axis=1)


@partial(jax.jit, static_argnames=('graphdef', 'bucket', 'length'))
def prefill(graphdef, params, tokens, bucket, length):
    """The cache, of that length, of the first `bucket` of tokens (B, L), in one pass."""
    model = nnx.merge(graphdef, params)
    return cached_hidden(model, tokens[:, :bucket], 0, empty_cache(model.config, tokens.shape[0], length))[1]


@partial(jax.jit, static_argnames=('graphdef', 'top_k', 'top_p'), donate_argnames=('tokens', 'cache'))
def decode(graphdef, params, tokens, cache, t, stop, keys, temperature, top_k, top_p, n_vocab):
    """Fill tokens[:, t:stop], stop at most one past the cache's length, which holds what comes before t - 1; (tokens, cache)."""
    model = nnx.merge(graphdef, params)

    def step(t, carry):
        tokens, cache = carry
        x, cache = cached_hidden(model, jax.lax.dynamic_slice_in_dim(tokens, t - 1, 1, axis=1), t - 1, cache)
        return write_token(tokens, draw(model.head(x[:, 0]), t, keys, temperature, top_k, top_p, n_vocab), t), cache
    return jax.lax.fori_loop(t, stop, step, (tokens, cache))


@partial(jax.jit, static_argnames=('graphdef', 'top_k', 'top_p'), donate_argnames='tokens')
def slide(graphdef, params, tokens, t, stop, keys, temperature, top_k, top_p, n_vocab):
    """Fill tokens[:, t:stop] past block_size, each from a whole window of the block_size tokens before it."""
    model = nnx.merge(graphdef, params)
    window = model.config.block_size

    def step(t, tokens):
        x = last_hidden(model, jax.lax.dynamic_slice_in_dim(tokens, t - window, window, axis=1))
        return write_token(tokens, draw(model.head(x), t, keys, temperature, top_k, top_p, n_vocab), t)
    return jax.lax.fori_loop(t, stop, step, tokens)


def bucket_of(n, smallest, largest):
    """The smallest of smallest, twice that and so on that holds n, or largest."""
    while smallest < n:
        smallest *= 2
    return min(smallest, largest)


def stream_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, key=None, n_vocab=None, chunk=None,
                  first=0):
    """Yield the continuation of idx, int (B, T), as numpy arrays (B, n): max_new_tokens in all, at most chunk at a time.

    Past block_size the model sees the last block_size tokens. Dropout is off. temperature 0 takes the most likely token. key: a
    jax.random key; row b draws with a key of its own, that of number first + b, whatever B is. n_vocab: ids from here on are
    padding, never drawn. Raises UserError for settings that nothing can be drawn with.
    """
    check(idx, max_new_tokens, temperature, top_k, top_p, key)
    if temperature == 0:
        temperature, top_k, top_p = 1.0, 1, 1.0
    (B, t), block_size = idx.shape, model.config.block_size
    graphdef, params = sampling_weights(model)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0) if key is None else key))(first + np.arange(B))
    how = dict(keys=keys, temperature=temperature, top_k=top_k, top_p=top_p, n_vocab=n_vocab or model.config.vocab_size)
    end = t + max_new_tokens
    room = bucket_of(max(end, block_size), block_size, 2**31) - t
    tokens = jnp.asarray(np.pad(np.asarray(idx, np.int32), ((0, 0), (0, room))))
    cache = None
    while t < end:
        stop = min(end, t + (chunk or end))
        if t <= block_size:
            stop = min(stop, block_size + 1)
            if cache is None:
                # what lies past the prompt goes in too, unseen: attention is causal, and it is overwritten before its turn
                length, filled = (bucket_of(n, SMALLEST_BUCKET, block_size) for n in (end - 1, t - 1))
                cache = (prefill(graphdef, params, tokens, filled, length) if t > 1 else
                         empty_cache(model.config, B, length))
            tokens, cache = decode(graphdef, params, tokens, cache, t, stop, **how)
        else:
            tokens = slide(graphdef, params, tokens, t, stop, **how)
        yield np.asarray(tokens)[:, t:stop].copy()
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


def sampling_weights(model):
    """(graph definition with dropout off, parameters with the kernels in the compute type): half the bytes for every token in
    16 bits. The model given stays as it is."""
    model = nnx.merge(*nnx.split(model))
    model.eval()
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, jax.tree_util.tree_map_with_path(
        lambda path, p: p.astype(model.config.dtype) if path[-1].key == 'kernel' else p, nnx.to_pure_dict(params))


# -----------------------------------------------------------------------------
# text

class Continuation:
    """The text of one sample, out of its tokens as they come.

    decode: tokens to UTF-8 bytes, which need not end where a character does. stop: a string that the sample ends before, '' for
    none. text: all of it so far; ended: stop was found; n_tokens: how many came until then.
    """

    def __init__(self, decode, stop=''):
        self.decode, self.stop = decode, stop
        self.utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        self.text, self.held, self.ended, self.n_tokens = '', '', False, 0

    def add(self, tokens, final=False):
        """What these tokens, a list of ids, add to the text; what may yet be part of stop or of a character is held back."""
        if self.ended:
            return ''
        self.n_tokens += len(tokens)
        new = self.held + self.utf8.decode(self.decode(tokens), final)
        end = new.find(self.stop) if self.stop else -1
        self.ended = end >= 0
        if not self.ended:
            end = len(new) - (0 if final else max((n for n in range(len(self.stop)) if new.endswith(self.stop[:n])), default=0))
        new, self.held = new[:end], new[end:]
        self.text += new
        return new

    def close(self):
        """What was held back, now that no more tokens come."""
        return self.add([], final=True)
