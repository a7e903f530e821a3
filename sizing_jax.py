"""
What a model and a run will take, before they take it: parameters, FLOPs and kept activations by part, memory, the size of
a checkpoint, days of training, and how many tokens would be compute-optimal. Nothing is computed, so it needs no GPU.
$ python sizing_jax.py
$ python sizing_jax.py config/train_shakespeare_char.py
$ python sizing_jax.py --init_from=gpt2-xl --batch_size=4 --remat=True
"""

import math
import os
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_devices import attention_path, report_user_error, select_devices
from jax_ops import causal_attention
from jax_train_utils import check_settings, create_optimizer, load_meta, split_model, train_state
from jax_transformer import HF_MODELS, GPTConfig, UserError

# -----------------------------------------------------------------------------
# model
init_from = 'scratch' # 'scratch': the shape below, or that of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'
dataset = 'openwebtext' # its vocabulary counts
vocab_size = 0 # 0: of data/<dataset>/meta.pkl, or else GPT-2's 50257 padded to 50304, as in train_jax.py
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
# memory
batch_size = 12 # rows that a device takes at a time
dtype = 'bfloat16' # compute type: 'float32', 'bfloat16' or 'float16'
attention = 'auto' # 'cudnn', 'xla', or 'auto': what train_jax.py takes on an NVIDIA GPU
remat = False # compute each block again in the backward pass
# the run
gradient_accumulation_steps = 5 * 8 # a step has gradient_accumulation_steps * batch_size rows, whatever the number of devices
max_iters = 600000
devices = 8 # so many share the work
peak = 312e12 # FLOP/s of a device; an A100's in bfloat16
utilization = 0.3 # the share of it that training reaches, the mfu of the log
compute = 0.0 # FLOP to find the best model for; 0.0: the run's
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.excepthook = report_user_error
sys.stdout.reconfigure(line_buffering=True)
check_settings(config)
for name in ('max_iters', 'devices', 'peak', 'utilization'):
    if not 0 < config[name] < math.inf:
        raise UserError(f'{name} is {config[name]}; it must be more than 0')
if utilization > 1:
    raise UserError(f'utilization is {utilization}; it must be a share of the peak, at most 1')
if not 0 <= compute < math.inf:
    raise UserError(f'compute is {compute}; it must be a number of FLOP, or 0.0 for what the run takes')
if init_from != 'scratch' and init_from not in HF_MODELS:
    raise UserError(f'init_from is {init_from!r}; it must be scratch or one of {", ".join(HF_MODELS)}. For other weights give '
                    'their shape, by n_layer, n_head, n_embd, block_size, vocab_size and bias')
if init_from in HF_MODELS and block_size > 1024:
    raise UserError(f'block_size is {block_size}; the weights of {init_from} have 1024: give that or less')
select_devices('cpu')

# the model, without weights
if init_from in HF_MODELS:
    (n_layer, n_head, n_embd), vocab_size, bias, vocab_of = HF_MODELS[init_from], 50257, True, init_from
elif vocab_size:
    vocab_of = 'as given'
else:
    meta = os.path.join('data', dataset, 'meta.pkl')
    vocab_size = load_meta(os.path.dirname(meta))[0]
    vocab_of = f'of {meta}' if vocab_size else f"GPT-2's padded, since there is no {meta}"
    vocab_size = vocab_size or GPTConfig.vocab_size
GPTConfig(n_embd=n_embd, n_head=n_head, dtype=dtype) # complains of these before attention_path does
gpu = SimpleNamespace(device_kind='an NVIDIA GPU', compute_capability='9.0')
attention = attention_path(attention, dtype, n_embd // n_head, gpu)
if dropout:
    attention = 'xla' # as in training: JAX offers the fused kernel without dropout only
model = split_model(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, dtype, attention, remat))[0]
n_params = model.get_num_params() # without wpe
T, C = block_size, n_embd


def scores_computed():
    """How many attention scores of a row causal_attention computes and keeps, all heads of one block."""
    q, sizes = jax.ShapeDtypeStruct((1, T, n_head, 1), jnp.float32), []
    jax.eval_shape(lambda q: causal_attention(q, q, q, lambda att: sizes.append(att.size) or att), q)
    return sum(sizes)


def count_parts():
    """{part: parameters} and {part: weights that it multiplies each token with}, a part being that of all blocks together."""
    params, products = Counter(), Counter()
    for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        part = '.'.join(name for name in path[1:-1] if isinstance(name, str))
        params[part] += p.size
        if path[-1] == 'kernel':
            products[part] += p.size
    return params, products


def kept_by_part():
    """{part: bytes that it keeps of a row for the backward pass}, one block's for those in blocks.

    Each part keeps its input, GELU its derivative in place of it.
    """
    c = jnp.dtype(dtype).itemsize
    kept = {'h.ln_1': 4 * T * C, 'h.attn.c_attn': c * T * C, 'h.attn.scores': c * 3 * T * C, 'h.attn.c_proj': c * T * C,
            'h.ln_2': 4 * T * C, 'h.mlp.c_fc': c * T * C, 'h.mlp.gelu': c * 4 * T * C, 'h.mlp.c_proj': c * 4 * T * C,
            'ln_f': 4 * T * C, 'head': c * T * C, 'loss': c * T * vocab_size}
    if attention == 'xla': # the weights of the values, in float32, and in 16 bits beside it
        kept['h.attn.values'] = (4 if c == 4 else 4 + c) * scores_computed()
    if dropout: # masks, a byte for each element
        kept |= {'h.dropout': scores_computed() + 2 * T * C, 'dropout': T * C}
    return kept


def columns(*rows):
    """Print rows of text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print('  '.join([first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:]))]).rstrip())


def short(x):
    """Four digits of a large number, as in 2.472B."""
    for unit, name in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M')):
        if x >= unit:
            return f'{x / unit:#.4g}{name}'
    return f'{x:#.4g}'


def comma(n):
    return f'{n:,}' if n else ''


print(f'{n_layer} layers, {n_head} heads, {n_embd} wide, {block_size} tokens, bias {bias}, '
      f'vocabulary {vocab_size} ({vocab_of})\n')

# by part
params, products = count_parts()
forward = {part: 2 * T * n for part, n in products.items()}
forward |= {'h.attn.scores': n_layer * 2 * T * T * C, 'h.attn.values': n_layer * 2 * T * T * C, 'head': 2 * T * vocab_size * C}
block = kept_by_part()
rest = {part: block.pop(part) for part in list(block) if not part.startswith('h.')}
if remat: # the input of every block, and the rest of one block or what follows the blocks: not both at a time
    block['h.ln_1'] *= n_layer
    activations = block['h.ln_1'] + max(sum(block.values()) - block['h.ln_1'], sum(rest.values()))
else:
    block = {part: n_layer * n for part, n in block.items()}
    activations = sum(block.values()) + sum(rest.values())
kept = block | rest
total_params, total_forward = sum(params.values()), sum(forward.values())
order = ('wte', 'wpe', 'dropout', 'h.ln_1', 'h.attn.c_attn', 'h.attn.scores', 'h.attn.values', 'h.attn.c_proj', 'h.ln_2',
         'h.mlp.c_fc', 'h.mlp.gelu', 'h.mlp.c_proj', 'h.dropout', 'ln_f', 'head', 'loss')
columns(('', 'parameters', 'share', 'FLOP forward', 'FLOP backward', 'share', 'bytes kept'), *(
    (part, comma(params[part]), f'{params[part] / total_params:.2%}' if params[part] else '', comma(forward.get(part)),
     comma(2 * forward.get(part, 0)), f'{forward[part] / total_forward:.2%}' if part in forward else '', comma(kept.get(part)))
    for part in order if part in {*params, *forward, *kept}),
    ('total', comma(total_params), '', comma(total_forward), comma(2 * total_forward), '', comma(activations)))
print(f'h: {n_layer} blocks together. FLOP and bytes are of one row, {T} tokens; FLOP those of matrix products, all scores '
      'counted')
if attention == 'xla':
    print(f'attention in causal parts computes {scores_computed() / (n_head * T * T):.1%} of the scores and values')
if remat: # all but the last product of a block, whose result its backward pass does not need
    print("with remat every block keeps ln_1's input; the rest is one block's, and goes before or after what follows the blocks\n"
          f'the backward pass computes {total_forward - forward["head"] - forward["h.mlp.c_proj"]:,} FLOP of the blocks again')
print()

# of a token
flops_per_token = model.estimate_mfu(1, 1.0, peak_flops=1.0) / T
columns(('parameters without wpe, N', f'{n_params:,}'),
        ('FLOP per token, forward and backward', f'{3 * total_forward / T:,.0f}'),
        ('6N + 12LHQT, which mfu is counted by', f'{flops_per_token:,.0f}'))
print()

# memory
def n_bytes(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
tx = create_optimizer(lambda it: 1e-4, weight_decay=1e-1, betas=(0.9, 0.95), grad_clip=1.0)
state = jax.eval_shape(lambda params: train_state(params, tx), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
memory = {"weights, float32": n_bytes(state['params']), "AdamW's two moments": n_bytes(state['opt_state']),
          'gradients, float32': n_bytes(state['params']), f'activations of {batch_size} rows': batch_size * activations}
*held, gradients, kept_rows = memory.values()
# one micro-step's gradients come as its activations go, but a sum over several is there all the time
memory['together'] = sum(held) + (gradients + kept_rows if gradient_accumulation_steps > 1 else max(gradients, kept_rows))
memory['a checkpoint'] = n_bytes(state)
columns((f'memory of a device, about ({dtype}, {attention} attention)', 'bytes', 'GiB'),
        *((name, f'{n:,}', f'{n / 2**30:.2f}') for name, n in memory.items()))
print()

# the run
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
tokens = max_iters * tokens_per_iter
def days(flops):
    return f'{flops / (devices * peak * utilization) / 86400:.3g}'
columns((f'{max_iters:,} iterations of {tokens_per_iter:,} tokens: {short(tokens)}', 'FLOP', 'days'),
        ('by 6N + 12LHQT', f'{flops_per_token * tokens:.3e}', days(flops_per_token * tokens)),
        ('by 6N', f'{6 * n_params * tokens:.3e}', days(6 * n_params * tokens)))
print(f'with {devices} devices of {peak / 1e12:g} TFLOP/s and an mfu of {utilization:.0%}\n')

# compute-optimal training. The loss of a model of N parameters after D tokens is about E + A / N^alpha + B / D^beta
# (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, equation 2). Of all N and D with 6ND = C it is smallest where
# alpha A / N^alpha = beta B / D^beta (their equation 4 in another form). So D is k N^m, as in the other laws
def approach_3(A, B, alpha, beta):
    """k, m."""
    return (beta * B / (alpha * A)) ** (1 / beta), alpha / beta

# N and D of their approach 2, from table A3
N2 = [400e6, 1e9, 10e9, 67e9, 175e9, 280e9, 520e9, 1e12, 10e12]
D2 = [7.7e9, 20.0e9, 219.5e9, 1.7e12, 4.3e12, 7.1e12, 13.4e12, 26.5e12, 292.0e12]
slope, intercept = np.polyfit(np.log(N2), np.log(D2), 1)
LAWS = { # k, m
    '20 tokens per parameter': (20.0, 1.0),
    'approach 2, a line through table A3': (math.exp(intercept), slope),
    'approach 3, equation 10': approach_3(406.4, 410.7, 0.34, 0.28), # as printed, and as nanoGPT has it
    'approach 3, less rounded': approach_3(406.4, 410.7, 0.3392, 0.2849), # from the paper's source, by the next authors
    'refit by Besiroglu et al. 2024': approach_3(482.01, 2085.43, 0.3478, 0.3658), # https://arxiv.org/abs/2404.10102
}
budget = compute or 6 * n_params * tokens
rows = []
for name, (k, m) in LAWS.items():
    D = k * n_params ** m
    best = (budget / (6 * k)) ** (1 / (1 + m))
    rows.append((name, short(D), f'{D / n_params:.1f}', f'{6 * n_params * D:.3e}', f'{D / tokens_per_iter:,.0f}',
                 short(best), short(k * best ** m)))
columns(('compute-optimal, by Hoffmann et al. 2022', 'D', 'D / N', '6ND', 'iterations', 'best N', 'and D'), *rows)
print(f'D: tokens for this N, {short(n_params)}; best N and D: for {budget:.3e} FLOP')
