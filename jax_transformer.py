"""
The GPT language model of nanoGPT in JAX/Flax NNX, all of it in this one file.

Read next to nanoGPT's model.py: the modules and their attributes have the same names in
the same order. Modules hold parameters and the forward pass; training lives in
jax_train_utils.py and train_jax.py.
"""

import importlib
import json
import math
import os
from dataclasses import dataclass, fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_ops import causal_attention, cross_entropy, dropout, fused_attention, gelu, matmul


class UserError(ValueError):
    """Something that the user can mend; the scripts print it as one line, without a traceback."""


def optional_import(name):
    """A module that only some commands need. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f'this needs the package {name.split(".")[0]}: pip install {name.split(".")[0]}') from e


# -----------------------------------------------------------------------------
# configuration

@dataclass(frozen=True)  # frozen, since nnx.split keeps it in the hashable part of the model
class GPTConfig:
    """Shape of a model, and how it is computed: `dtype` is the compute type, float32, bfloat16 or float16 (parameters
    are float32 always); `attention` 'xla', or 'cudnn' for NVIDIA's fused kernel; `remat` computes each block again in the
    backward pass, in place of keeping what it computed. Raises UserError for what no model can have."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for efficiency
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linears and LayerNorms, as in GPT-2; False is a bit better and faster
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
        if self.attention not in ('xla', 'cudnn'):
            raise UserError(f'attention is {self.attention!r}; it must be xla or cudnn')
        if self.attention == 'cudnn' and (self.dtype == 'float32' or self.n_embd // self.n_head % 8):
            raise UserError('cuDNN attention computes in bfloat16 or float16, with a multiple of 8 dimensions per head, '
                            f'not {self.dtype} with {self.n_embd // self.n_head}; use --attention=xla')


GPT_ARGS = tuple(f.name for f in fields(GPTConfig))[:7]  # nanoGPT's model_args: the shape


# -----------------------------------------------------------------------------
# the model

class Linear(nnx.Module):
    """x @ kernel + bias in x's type; the kernel is (n_in, n_out), normal with standard deviation `std`."""

    def __init__(self, n_in, n_out, config, *, rngs, std=0.02):
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if config.bias else None

    def __call__(self, x):
        x = matmul(x, self.kernel[...])
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class Dropout(nnx.Module):
    """Dropout in training mode, by a key of the `rngs` given to the call; model.eval() makes it deterministic."""

    def __init__(self, rate):
        self.rate = rate
        self.deterministic = False

    @property
    def active(self):
        return self.rate > 0 and not self.deterministic

    def __call__(self, x, rngs=None):
        return dropout(x, self.rate, rngs.dropout()) if self.active else x


class LayerNorm(nnx.Module):
    """LayerNorm with an optional bias; computed in float32, returned in `dtype`."""

    def __init__(self, ndim, bias, dtype='float32'):
        self.scale = nnx.Param(jnp.ones(ndim))
        self.bias = nnx.Param(jnp.zeros(ndim)) if bias else None
        self.dtype = dtype

    def __call__(self, x):
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)  # torch's epsilon; flax has 1e-6
        x = x * self.scale[...]
        if self.bias is not None:
            x = x + self.bias[...]
        return x.astype(self.dtype)


class CausalSelfAttention(nnx.Module):

    def __init__(self, config, *, rngs):
        # key, query, value projections of all heads in one product
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config, rngs=rngs)
        self.c_proj = Linear(config.n_embd, config.n_embd, config, rngs=rngs, std=0.02 / math.sqrt(2 * config.n_layer))
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)
        self.n_head = config.n_head
        self.fused = config.attention == 'cudnn'

    def qkv(self, x):
        """Queries, keys and values of x (B, T, C): (B, T, nh, hs) each."""
        B, T, C = x.shape
        return (a.reshape(B, T, self.n_head, C // self.n_head) for a in jnp.split(self.c_attn(x), 3, axis=-1))

    def __call__(self, x, rngs=None):
        q, k, v = self.qkv(x)
        if self.fused and not self.attn_dropout.active:  # JAX offers cuDNN's kernel without dropout only
            y = fused_attention(q, k, v)
        else:
            y = causal_attention(q, k, v, partial(self.attn_dropout, rngs=rngs))
        y = y.reshape(x.shape)
        return self.resid_dropout(self.c_proj(y), rngs=rngs)


class MLP(nnx.Module):

    def __init__(self, config, *, rngs):
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config, rngs=rngs)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config, rngs=rngs, std=0.02 / math.sqrt(2 * config.n_layer))
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

    def __call__(self, x, rngs=None):
        with jax.named_scope('attn'):  # so that profiles read like the code
            x = x + self.attn(self.ln_1(x), rngs)
        with jax.named_scope('mlp'):
            x = x + self.mlp(self.ln_2(x), rngs)
        return x


class GPT(nnx.Module):
    """GPT(config, rngs=nnx.Rngs(seed)). A new model is in training mode: with dropout > 0 a call
    then needs `rngs=nnx.Rngs(dropout=key)`; `model.eval()` turns dropout off, `model.train()` on."""

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
        # no lm_head of its own: the output layer is wte's matrix again (weight tying)

    def hidden(self, idx, rngs=None):
        """The transformer without its head: int (B, T) to (B, T, n_embd) in the compute type."""
        B, T = idx.shape
        if T > self.config.block_size:
            raise UserError(f'cannot forward a sequence of length {T}: block_size is only {self.config.block_size}')
        if rngs is None and self.config.dropout > 0 and not self.transformer.drop.deterministic:
            raise UserError('dropout needs randomness in training mode: call model(..., rngs=nnx.Rngs(dropout=key)), '
                            'or model.eval() first')
        # embeddings and the residual stream stay float32, as they do under torch's autocast
        x = self.transformer.wte(idx) + self.transformer.wpe(jnp.arange(T))  # (B, T, C)
        x = self.transformer.drop(x, rngs=rngs)
        run_block = nnx.remat(Block.__call__) if self.config.remat else Block.__call__
        for block in self.transformer.h:
            x = run_block(block, x, rngs)
        return self.transformer.ln_f(x)

    def head(self, x):
        """Logits (..., vocab_size) in the compute type, from hidden states (..., n_embd)."""
        return matmul(x, self.transformer.wte.embedding[...].T)

    def __call__(self, idx, targets=None, rngs=None):
        """idx, targets: int (B, T). With targets: logits (B, T, vocab_size) and the loss, a float32
        scalar over the targets that are not -1. Without: logits of the last position, (B, 1, vocab_size), and None.
        """
        x = self.hidden(idx, rngs)
        if targets is None:
            return self.head(x[:, -1:]), None
        logits = self.head(x)
        return logits, cross_entropy(logits, targets)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, by default without the position embeddings (wte counts: it is the head too)."""
        n_params = sum(p.size for p in jax.tree.leaves(nnx.state(self, nnx.Param)))
        return n_params - self.transformer.wpe.embedding.size if non_embedding else n_params

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilization, as a fraction of peak_flops (FLOP/s; the default is an A100 in bfloat16).

        fwdbwd_per_iter: sequences per iteration; dt: seconds per iteration.
        Counts as nanoGPT does, after the PaLM paper's appendix B (https://arxiv.org/abs/2204.02311).
        """
        cfg = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / peak_flops

    def crop_block_size(self, block_size):
        """Shorten the context to block_size: the position embeddings past it go. Raises UserError for a longer one."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f'cannot crop to block_size={block_size}: the model has {self.config.block_size}; give that or less')
        wpe = self.transformer.wpe
        wpe.embedding.set_value(wpe.embedding[...][:block_size])
        wpe.num_embeddings = block_size
        self.config = replace(self.config, block_size=block_size)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, key=None, top_p=1.0, n_vocab=None):
        """Continue idx, int (B, T), by max_new_tokens tokens each: int (B, T + max_new_tokens). See jax_sampling."""
        from jax_sampling import stream_tokens  # which imports this module
        new = stream_tokens(self, idx, max_new_tokens, temperature, top_k, top_p, key, n_vocab)
        return jnp.concatenate([jnp.asarray(idx), *new], axis=1)

    @classmethod
    def from_pretrained(cls, model_type_or_path, override_args=None, dtype='float32'):
        """A model with GPT-2's weights: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' from the Hugging Face hub,
        or a folder with config.json and model.safetensors. override_args: dropout, nothing else.
        Like nanoGPT it computes the exact GELU on weights that were trained with the tanh form, and prints that.
        Tensors are read one at a time: no more than one of them is in memory twice.
        """
        override_args = override_args or {}
        if set(override_args) - {'dropout'}:
            raise UserError(f'from_pretrained can override dropout only, not {sorted(set(override_args) - {"dropout"})}')
        folder = _pretrained_folder(model_type_or_path)
        args, activation = _read_hf_config(folder)
        if activation == 'gelu_new':
            print(f'{model_type_or_path} was trained with the tanh form of GELU; computed here with the exact one, as in nanoGPT')
        config = GPTConfig(**args | override_args, dtype=dtype)
        model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))  # shapes alone: every weight comes from the file
        load_torch_weights(model, _read_hf_weights(folder))
        return model


# -----------------------------------------------------------------------------
# weights in and out, under nanoGPT's state_dict names and in torch's layout

def _torch_name(path):
    """('transformer', 'h', 0, 'attn', 'c_attn', 'kernel') to 'transformer.h.0.attn.c_attn.weight'."""
    *module, leaf = (str(part) for part in path)
    return '.'.join([*module, leaf if leaf == 'bias' else 'weight'])


def load_torch_weights(model, weights):
    """Set every parameter of model from `weights`: {nanoGPT state_dict name: array in torch's layout, or what becomes one}.

    lm_head.weight may be left out, and must equal transformer.wte.weight if given. Raises UserError,
    with every missing, extra or misshaped name in one message, before anything is changed.
    """
    params = {_torch_name(path): (path, p) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    problems = [f'{name} is missing' for name in sorted(params.keys() - weights.keys())]
    problems += [f'{name} is not in the model' for name in sorted(weights.keys() - params.keys() - {'lm_head.weight'})]
    for name in sorted(params.keys() & weights.keys()):
        path, p = params[name]
        want = p.shape[::-1] if path[-1] == 'kernel' else p.shape  # torch's Linear is (out, in)
        if weights[name].shape != want:
            problems.append(f'{name} has shape {weights[name].shape}, the model has {want}')
    head = weights.get('lm_head.weight')
    if head is not None and 'transformer.wte.weight' in weights and not np.array_equal(head, weights['transformer.wte.weight']):
        problems.append('lm_head.weight differs from transformer.wte.weight, which it is tied to')
    if problems:
        raise UserError('these weights do not fit the model: ' + '; '.join(problems))
    for name, (path, p) in params.items():
        w = np.array(weights[name], np.float32)  # a copy, which device_put takes over on a CPU
        p.set_value(jax.device_put(w.T if path[-1] == 'kernel' else w))


def export_torch_weights(model):
    """{nanoGPT state_dict name: float32 numpy array in torch's layout}, lm_head.weight included."""
    weights = {}
    for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        w = np.asarray(p[...])
        weights[_torch_name(path)] = np.ascontiguousarray(w.T) if path[-1] == 'kernel' else w
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    return weights


HF_MODELS = {'gpt2': (12, 12, 768), 'gpt2-medium': (24, 16, 1024), 'gpt2-large': (36, 20, 1280),
             'gpt2-xl': (48, 25, 1600)}  # n_layer, n_head, n_embd
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')  # stored (in, out) there


def _pretrained_folder(model_type_or_path):
    """The local folder of a model's files; names of the hub are downloaded into its cache."""
    if os.path.isdir(model_type_or_path):
        return model_type_or_path
    if model_type_or_path not in HF_MODELS:
        raise UserError(f'no pretrained model {model_type_or_path!r}: give one of {", ".join(HF_MODELS)}, '
                        'or a folder with config.json and model.safetensors')
    hub = optional_import('huggingface_hub')
    try:
        return hub.snapshot_download(f'openai-community/{model_type_or_path}',
                                     allow_patterns=['config.json', 'model.safetensors'])
    except Exception as e:  # the hub's client raises a dozen types: no network, no such file, not cached
        raise UserError(f'could not get {model_type_or_path} from the Hugging Face hub ({type(e).__name__}): check the '
                        'network, or give a local folder with config.json and model.safetensors') from e


# what a config.json may say beside the shape, where it says anything: all else is another model than nanoGPT's
HF_FIXED = dict(model_type=('gpt2',), activation_function=('gelu_new', 'gelu'), layer_norm_epsilon=(1e-5,),
                scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
                tie_word_embeddings=(True,))


def _read_hf_config(folder):
    """GPTConfig's arguments out of a Hugging Face config.json, and the name of its activation function."""
    path = os.path.join(folder, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
        # some files say n_ctx for n_positions
        args = dict(block_size=hf.get('n_positions', hf.get('n_ctx', 1024)), vocab_size=hf['vocab_size'],
                    n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=hf['n_embd'], bias=True)
        wrong = [f'{name} is {hf[name]!r}' for name, allowed in HF_FIXED.items() if name in hf and hf[name] not in allowed]
        if hf.get('n_inner') not in (None, 4 * args['n_embd']):
            wrong.append(f'n_inner is {hf["n_inner"]!r}')
    except (OSError, KeyError, ValueError, AttributeError) as e:
        raise UserError(f'cannot read a GPT-2 configuration from {path}: {type(e).__name__}: {e}') from e
    if wrong:
        raise UserError(f'{path} is of another model than GPT-2: {", ".join(wrong)}')
    return args, hf.get('activation_function', 'gelu_new')


class FileTensor:
    """A tensor of a safetensors file, read each time it is turned into an array; transposed: as torch's Linear has it."""

    def __init__(self, file, name, transposed):
        self.file, self.name, self.transposed = file, name, transposed
        shape = tuple(file.get_slice(name).get_shape())
        self.shape = shape[::-1] if transposed else shape

    def __array__(self, dtype=None, copy=None):
        w = np.asarray(self.file.get_tensor(self.name), dtype)
        return w.T if self.transposed else w


def _read_hf_weights(folder):
    """{nanoGPT state_dict name: FileTensor}. The hub's files lack the transformer. prefix and hold mask buffers;
    their Conv1D layers are (in, out), nanoGPT's Linear is (out, in)."""
    safetensors = optional_import('safetensors')
    path, index = (os.path.join(folder, f'model.safetensors{end}') for end in ('', '.index.json'))
    weights = {}
    try:
        paths = [path]
        if not os.path.exists(path) and os.path.exists(index):  # a large model in several files
            with open(index, encoding='utf-8') as f:
                names = sorted(set(json.load(f)['weight_map'].values()))
            paths = [os.path.join(folder, os.path.basename(name)) for name in names]
        for path in paths:
            file = safetensors.safe_open(path, framework='numpy')
            for name in file.keys():
                if name.endswith(('.attn.bias', '.attn.masked_bias')):
                    continue  # causal mask buffers, not parameters
                full = name if name.startswith(('transformer.', 'lm_head.')) else 'transformer.' + name
                weights[full] = FileTensor(file, name, name.endswith(CONV1D))
    except (OSError, KeyError, ValueError, AttributeError, safetensors.SafetensorError) as e:
        raise UserError(f'cannot read weights from {path}: {e}') from e
    return weights
