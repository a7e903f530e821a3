"""
The GPT language model of nanoGPT in JAX/Flax NNX: modules, parameters and the forward pass.

Read it next to nanoGPT's model.py: modules have the same names; parameters have Flax's (kernel,
scale, embedding). At first skip what is for 'splash' (TPUs) and caches (sampling). The operations
(attention, dropout, GELU, cross-entropy, matmul) are in nanogpt_jax/ops.py, sampling is in
nanogpt_jax/sampling.py.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanogpt_jax import pretrained
from nanogpt_jax.errors import UserError
from nanogpt_jax.ops import (
    causal_attention, cross_entropy, dropout, einsum, fused_attention, gelu, matmul,
    normalize, splash_attention,
)
from nanogpt_jax.sampling import Sampler, stream_tokens

# if you change what the model computes, name it here, such as {'norm': 'rmsnorm'}: checkpoints
# store it, and another model refuses them
VARIANT = {}


@dataclass(frozen=True)  # frozen: nnx.split keeps it in the graphdef, which must be hashable
class GPTConfig:
    """Shape of a model, and how to compute it.

    dtype: compute dtype, float32, bfloat16 or float16; parameters are always float32.
    attention: 'xla', or a fused kernel: 'cudnn' on NVIDIA GPUs, 'splash' on TPUs. remat:
    recompute each block in the backward pass instead of saving its activations. Raises UserError
    for invalid values.
    """
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to 64 * 786 for faster matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in every Linear and LayerNorm, as in GPT-2; False is slightly faster
    dtype: str = 'float32'
    attention: str = 'xla'
    remat: bool = False

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if self.n_embd % self.n_head != 0:
            raise UserError(f'n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})')
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout is {self.dropout}; it must be at least 0 and below 1')
        if self.dtype not in ('float32', 'bfloat16', 'float16'):
            raise UserError(f'dtype is {self.dtype!r}; it must be float32, bfloat16 or float16')
        if self.attention not in ('xla', 'cudnn', 'splash'):
            raise UserError(f'attention is {self.attention!r}; it must be xla, cudnn or splash')
        head_size = self.n_embd // self.n_head
        if self.attention == 'cudnn' and (self.dtype == 'float32' or head_size % 8):
            raise UserError('cuDNN attention needs bfloat16 or float16, and a head size that is a '
                            f'multiple of 8, not {self.dtype} and {head_size}; '
                            'use --attention=xla')

    @classmethod
    def from_model_args(cls, model_args, **how_computed):
        """The config of a checkpoint's model_args; how_computed: dtype, attention, remat.

        Raises UserError if the model_args are incomplete or from another model.
        """
        missing = sorted({'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size'}
                         - model_args.keys())  # those that nanoGPT forces on resume
        if missing:
            raise UserError(f'the checkpoint lacks {", ".join(missing)} in its model_args: '
                            f'{model_args}')
        variant = {name: value for name, value in model_args.items() if name not in GPT_ARGS}
        if variant != VARIANT:
            raise UserError('the checkpoint was written by another model: its model_args have '
                            f'{variant or "nothing"} where this one has {VARIANT or "nothing"}')
        known = {name: value for name, value in model_args.items() if name in GPT_ARGS}
        return cls(**known, **how_computed)


# nanoGPT's model_args, for checkpoints: all fields except those on how to compute
GPT_ARGS = tuple(f.name for f in fields(GPTConfig) if f.name not in ('dtype', 'attention', 'remat'))


def model_args(config):
    """What a checkpoint stores of a GPTConfig."""
    return {name: getattr(config, name) for name in GPT_ARGS} | VARIANT


# -----------------------------------------------------------------------------
# the model

# our own layers instead of flax.nnx's: they compute in x's dtype from float32 parameters, with the
# faster operations of nanogpt_jax/ops.py

class Linear(nnx.Module):
    """x @ kernel + bias in x's dtype. kernel: (n_in, n_out), normal with standard deviation std."""

    # rngs.params() returns a new key; [...] reads the array of an nnx.Param
    def __init__(self, n_in, n_out, config, *, rngs, std=0.02):
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if config.bias else None

    def __call__(self, x):
        x = matmul(x, self.kernel[...])
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class Dropout(nnx.Module):
    """Dropout with a key from rngs; off after model.eval()."""

    def __init__(self, rate):
        self.rate = rate
        self.deterministic = False  # model.eval() and model.train() set attributes of this name

    @property
    def active(self):
        return self.rate > 0 and not self.deterministic

    def __call__(self, x, rngs=None):
        return dropout(x, self.rate, rngs.dropout()) if self.active else x


class LayerNorm(nnx.Module):
    """Layer normalization in float32, returned in `dtype`; bias=False leaves out the shift."""

    def __init__(self, ndim, bias, dtype='float32'):
        self.scale = nnx.Param(jnp.ones(ndim))
        self.bias = nnx.Param(jnp.zeros(ndim)) if bias else None
        self.dtype = dtype

    def __call__(self, x):
        x = normalize(x.astype(jnp.float32)) * self.scale[...]
        if self.bias is not None:
            x = x + self.bias[...]
        return x.astype(self.dtype)  # the next Linear's compute dtype


class CausalSelfAttention(nnx.Module):

    def __init__(self, config, *, rngs):
        # queries, keys and values of all heads in one matmul; c_proj's init is scaled, per GPT-2
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config, rngs=rngs)
        self.c_proj = Linear(config.n_embd, config.n_embd, config, rngs=rngs,
                             std=0.02 / math.sqrt(2 * config.n_layer))
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head = config.n_head
        self.attention = config.attention

    def split_heads(self, a):
        """Queries, keys and values of a, (..., 3 * C): (..., nh, hs) each."""
        return [part.reshape(*part.shape[:-1], self.n_head, -1)
                for part in jnp.split(a, 3, axis=-1)]

    def to_heads(self, x, kernel='xla'):
        """Queries, keys and values of x (B, T, C) for an attention kernel: (B, T, nh, hs) each."""
        if kernel != 'splash':
            return self.split_heads(self.c_attn(x))
        # reshape the weights, not the activations: otherwise a TPU spends 7% of a step on copies
        # into this kernel's layout
        heads = [einsum('btc,cnh->btnh', x, w) for w in self.split_heads(self.c_attn.kernel[...])]
        if self.c_attn.bias is not None:
            biases = self.split_heads(self.c_attn.bias[...].astype(x.dtype))
            heads = [a + b for a, b in zip(heads, biases)]
        return heads

    def from_heads(self, y, kernel='xla'):
        """The output (B, T, C) from the heads' results y (B, T, nh, hs)."""
        if kernel != 'splash':
            return self.c_proj(y.reshape(*y.shape[:2], -1))
        nh, hs = y.shape[2:]
        y = einsum('btnh,nhc->btc', y, self.c_proj.kernel[...].reshape(nh, hs, -1))
        return y if self.c_proj.bias is None else y + self.c_proj.bias[...].astype(y.dtype)

    def __call__(self, x, rngs=None, cache=None):
        # the fused kernels support neither dropout nor a cache
        kernel = 'xla' if cache or self.attn_dropout.active else self.attention
        q, k, v = self.to_heads(x, kernel)  # (B, T, nh, hs)
        if cache:
            y = cache.attend(q, k, v)
        elif kernel == 'xla':
            y = causal_attention(q, k, v, partial(self.attn_dropout, rngs=rngs))
        else:
            y = {'cudnn': fused_attention, 'splash': splash_attention}[kernel](q, k, v)
        return self.resid_dropout(self.from_heads(y, kernel), rngs=rngs)


class MLP(nnx.Module):

    def __init__(self, config, *, rngs):
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config, rngs=rngs)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config, rngs=rngs,
                             std=0.02 / math.sqrt(2 * config.n_layer))
        self.dropout = Dropout(config.dropout)

    def __call__(self, x, rngs=None):
        x = self.c_fc(x)
        x = gelu(x)  # the exact form, as nn.GELU()
        return self.dropout(self.c_proj(x), rngs=rngs)


class Block(nnx.Module):

    def __init__(self, config, *, rngs):
        self.ln_1 = LayerNorm(config.n_embd, config.bias, config.dtype)
        self.attn = CausalSelfAttention(config, rngs=rngs)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, config.dtype)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, rngs=None, cache=None):
        with jax.named_scope('attn'):  # so that profiles read like the code
            y = self.attn(self.ln_1(x), rngs, cache)
            x = x[:, -y.shape[1]:] + y  # all T positions, or with sampling.LastPosition only one
        with jax.named_scope('mlp'):
            x = x + self.mlp(self.ln_2(x), rngs)
        return x


def run_blocks(blocks, x, rngs, remat):
    """x (B, T, C) after all blocks; remat: recompute each block in the backward pass."""
    run_block = nnx.remat(Block.__call__) if remat else Block.__call__
    for block in blocks:
        x = run_block(block, x, rngs)
    return x


class GPT(nnx.Module):
    """GPT(config, rngs=nnx.Rngs(seed)). A new model is in training mode: with dropout > 0, calls
    need `rngs=nnx.Rngs(dropout=key)`. model.eval() turns dropout off, model.train() on."""

    def __init__(self, config, *, rngs):
        self.config = config
        embed_init = nnx.initializers.normal(0.02)
        self.transformer = nnx.Dict(
            wte=nnx.Embed(config.vocab_size, config.n_embd, embedding_init=embed_init, rngs=rngs),
            wpe=nnx.Embed(config.block_size, config.n_embd, embedding_init=embed_init, rngs=rngs),
            drop=Dropout(config.dropout),
            h=nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias, config.dtype),
        )
        # no lm_head parameter: the output layer uses wte's matrix (weight tying)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, by default without wpe (wte counts, since it is the head too)."""
        return sum(p.size for path, p in nnx.to_flat_state(nnx.state(self, nnx.Param))
                   if not (non_embedding and 'wpe' in path))

    def hidden(self, idx, rngs=None, run_blocks=run_blocks, start=0, caches=None):
        """The transformer without its head: int (B, T) to (B, T, C) in the compute dtype.

        start: position of the first token. caches: for each block a cache, such as sampling.Cache,
        that replaces causal attention within idx, or None.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise UserError(f'idx has {T} tokens, but the model sees at most block_size = '
                            f'{self.config.block_size}')
        if rngs is None and self.transformer.drop.active:
            raise UserError('dropout needs randomness in training mode: call '
                            'model(..., rngs=nnx.Rngs(dropout=key)), or model.eval() first')
        # embeddings and the residual stream are float32, as under torch's autocast
        x = self.transformer.wte(idx) + self.transformer.wpe(start + jnp.arange(T))  # (B, T, C)
        x = self.transformer.drop(x, rngs=rngs)
        if caches is None:
            x = run_blocks(self.transformer.h, x, rngs, self.config.remat)
        else:
            for block, cache in zip(self.transformer.h, caches):
                x = block(x, cache=cache)
        return self.transformer.ln_f(x)

    def empty_cache(self, B, length):
        """[keys, values] of each block, all zero: (B, nh, length, hs) in the compute dtype."""
        x = jax.ShapeDtypeStruct((B, length, self.config.n_embd), self.config.dtype)
        cache = []
        for block in self.transformer.h:
            _, *kv = jax.eval_shape(block.attn.to_heads, x)  # (B, length, nh, hs)
            cache.append([jnp.zeros((B, a.shape[2], length, a.shape[3]), a.dtype) for a in kv])
        return cache

    def head_kernel(self):
        """The matrix of the head, (C, vocab_size), float32."""
        return self.transformer.wte.embedding[...].T

    def head(self, x, kernel=None):
        """Logits (..., vocab_size) in the compute dtype, from hidden states (..., C).

        kernel: a copy of head_kernel(), or of some of its columns, to use instead.
        """
        return matmul(x, self.head_kernel() if kernel is None else kernel)

    def __call__(self, idx, targets=None, rngs=None, run_blocks=run_blocks):
        """Logits and loss of token ids idx, int (B, T).

        With targets, int (B, T): logits (B, T, vocab_size), and the mean loss over the targets that
        are not -1, a float32 scalar. Without: logits of the last position only, (B, 1, vocab_size),
        and None. run_blocks: replaces the loop over the blocks, as sharding.scan_blocks does.
        """
        x = self.hidden(idx, rngs, run_blocks)
        if targets is None:
            return self.head(x[:, -1:]), None
        with jax.named_scope('head'):
            logits = self.head(x)
            # a TPU subtracts their maximum, without waiting for all logits; unused elsewhere
            some_logits = self.head(x, self.head_kernel()[:, :128])
            return logits, cross_entropy(logits, targets, some_logits)

    def crop_block_size(self, block_size):
        """Shorten the context to block_size. Raises UserError if the model's is shorter."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f'cannot crop to block_size={block_size}: the model has '
                            f'{self.config.block_size}; give that or less')
        wpe = self.transformer.wpe
        wpe.embedding.set_value(wpe.embedding[...][:block_size])
        wpe.num_embeddings = block_size
        self.config = replace(self.config, block_size=block_size)

    @classmethod
    def from_pretrained(cls, model_type_or_path, override_args=None, dtype='float32'):
        """A model with GPT-2's weights, read one tensor at a time.

        model_type_or_path: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' from the Hugging Face
        hub, or a folder with config.json and model.safetensors. override_args: dropout only.
        GPT-2 was trained with the tanh approximation of GELU. Like nanoGPT, the model computes
        the exact GELU, and a printed line says so.
        """
        override_args = override_args or {}
        unknown = sorted(set(override_args) - {'dropout'})
        if unknown:
            raise UserError(f'from_pretrained can override dropout only, not {unknown}')
        folder = pretrained.find_folder(model_type_or_path)
        args, activation = pretrained.read_config(folder)
        if activation == 'gelu_new':
            print(f'{model_type_or_path} was trained with the tanh approximation of GELU; '
                  'the exact GELU is computed here, as in nanoGPT')
        config = GPTConfig.from_model_args(args | override_args, dtype=dtype)
        model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))  # shapes only, no weights
        load_torch_weights(model, pretrained.read_weights(folder))
        return model

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilization, as a fraction of peak_flops (FLOP/s; default: A100 bfloat16).

        fwdbwd_per_iter: sequences per iteration. dt: seconds per iteration. FLOPs are counted as in
        nanoGPT, by the PaLM paper's appendix B (https://arxiv.org/abs/2204.02311).
        """
        cfg = self.config
        N, L, C, T = self.get_num_params(), cfg.n_layer, cfg.n_embd, cfg.block_size
        flops_per_token = 6 * N + 12 * L * C * T
        flops_per_iter = flops_per_token * T * fwdbwd_per_iter
        return flops_per_iter / dt / peak_flops

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, *, top_p=1.0, key=None,
                 n_vocab=None):
        """Continue idx, int (B, T), by max_new_tokens tokens: int (B, T + max_new_tokens).

        key: a jax.random key, needed unless temperature is 0 or top_k is 1. n_vocab: ids from here
        on are padding, never sampled.
        """
        sampler = Sampler(temperature, top_k, top_p, n_vocab)
        new = stream_tokens(self, idx, max_new_tokens, sampler, key)
        return jnp.concatenate([jnp.asarray(idx), *new], axis=1)


def training_loss(model, x, y, rngs):
    """The float32 scalar that training minimizes, of token ids x and targets y, int (B, T)."""
    return model(x, y, rngs=rngs)[1]


# -----------------------------------------------------------------------------
# weights in and out, under nanoGPT's state_dict names and in torch's layout

def _torch_name(path):
    """('transformer', 'h', 0, 'mlp', 'c_fc', 'kernel') to 'transformer.h.0.mlp.c_fc.weight'."""
    *module, leaf = (str(part) for part in path)
    return '.'.join([*module, leaf if leaf == 'bias' else 'weight'])


def load_torch_weights(model, weights):
    """Set all parameters of model from {nanoGPT state_dict name: array in torch's layout}.

    lm_head.weight is optional, and must equal transformer.wte.weight if given. If names are
    missing, extra or misshaped, raises a UserError that lists all of them, and changes nothing.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = {_torch_name(path): (path, p) for path, p in flat}
    problems = [f'{name} is missing' for name in sorted(params.keys() - weights.keys())]
    extra = weights.keys() - params.keys() - {'lm_head.weight'}
    problems += [f'{name} is not in the model' for name in sorted(extra)]
    for name in sorted(params.keys() & weights.keys()):
        path, p = params[name]
        expected = p.shape[::-1] if path[-1] == 'kernel' else p.shape  # torch's Linear is (out, in)
        if weights[name].shape != expected:
            problems.append(f'{name} has shape {weights[name].shape}, the model has {expected}')
    head, wte = (weights.get(f'{name}.weight') for name in ('lm_head', 'transformer.wte'))
    if head is not None and wte is not None and not np.array_equal(head, wte):
        problems.append('lm_head.weight differs from transformer.wte.weight, which it is tied to')
    if problems:
        raise UserError('these weights do not fit the model: ' + '; '.join(problems))
    for name, (path, p) in params.items():
        w = np.array(weights[name], np.float32)  # a copy: on a CPU device_put may use its memory
        p.set_value(jax.device_put(w.T if path[-1] == 'kernel' else w))


def export_torch_weights(model):
    """{nanoGPT state_dict name: float32 numpy array in torch's layout}, lm_head.weight included."""
    weights = {}
    for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        w = np.asarray(p[...])
        weights[_torch_name(path)] = np.ascontiguousarray(w.T) if path[-1] == 'kernel' else w
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    return weights
