"""
What a model and a run need: parameters, FLOP and activations by part, memory, the size of a
checkpoint, the time of training, and the compute-optimal number of tokens. Runs on any CPU.
$ python -m tools.sizing
$ python -m tools.sizing config/train_shakespeare_char.py
$ python -m tools.sizing --init_from=gpt2-xl --batch_size=4 --remat=True
"""

import sys
from collections import Counter

import jax
import jax.numpy as jnp
from flax import nnx

from jax_train_utils import abstract_train_state, check_settings, create_optimizer, split_model
from jax_transformer import GPTConfig
from nanogpt_jax.devices import select_devices
from nanogpt_jax.errors import UserError, report_user_error
from nanogpt_jax.ops import causal_attention
from nanogpt_jax.pretrained import GPT2_SHAPES
from nanogpt_jax.run_dir import data_dir_of
from nanogpt_jax.tokenizer import load_vocabulary
from tools import print_table

if __name__ == '__main__':
    sys.excepthook = report_user_error
# -----------------------------------------------------------------------------
# model
init_from = 'scratch' # the shape below, or that of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'
dataset = 'openwebtext' # folder in data/, for its vocabulary size
vocab_size = 0 # 0: that of data/<dataset>, or else GPT-2's, padded
block_size = 1024 # context length
n_layer = 12 # blocks
n_head = 12 # attention heads; must divide n_embd
n_embd = 768 # width
dropout = 0.0 # more than 0: masks take memory, and attention is not fused
bias = False # biases inside LayerNorm and Linear layers?
# memory
batch_size = 12 # sequences per device per micro-step
dtype = 'bfloat16' # compute dtype: 'float32', 'bfloat16' or 'float16'
attention = 'auto' # 'xla': not fused; 'auto': fused in 16 bits without dropout
remat = False # recompute each block in the backward pass, to save memory
# the run
gradient_accumulation_steps = 5 * 8 # the global batch is this * batch_size sequences
max_iters = 600000 # iterations
n_devices = 8 # they share each iteration
peak = 312e12 # FLOP/s of a device; an A100's in bfloat16
utilization = 0.3 # fraction of the peak that training reaches: mfu in the log
compute = 0.0 # FLOP to find the best model for; 0.0: those of the run
from configurator import configure
# overrides from the command line and config files
config, given = configure(globals(), sys.argv[1:] if __name__ == '__main__' else [])
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# by part: dicts by the name of a part, such as h.ln_1, with the sum over all blocks

PARTS = ('wte', 'wpe', 'dropout', 'h.ln_1', 'h.attn.c_attn', 'h.attn.scores', 'h.attn.values',
         'h.attn.c_proj', 'h.ln_2', 'h.mlp.c_fc', 'h.mlp.gelu', 'h.mlp.c_proj', 'h.dropout',
         'ln_f', 'head', 'loss')


def scores_computed(gptconf):
    """Number of attention scores that one block computes and saves for one sequence, by XLA."""
    q = jax.ShapeDtypeStruct((1, gptconf.block_size, gptconf.n_head, 1), jnp.float32)
    sizes = []
    jax.eval_shape(lambda q: causal_attention(q, q, q, lambda a: sizes.append(a.size) or a), q)
    return sum(sizes)


def count_parameters(model):
    """(parameters, those in the kernels of Linear layers)."""
    params, kernels = Counter(), Counter()
    for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        part = '.'.join(name for name in path[1:-1] if isinstance(name, str))
        params[part] += p.size
        kernels[part] += p.size * (path[-1] == 'kernel')
    return params, +kernels  # + leaves out zeros


def count_flops(gptconf, kernels):
    """FLOP of the forward pass of one sequence, in matmuls, with masked scores."""
    T, C = gptconf.block_size, gptconf.n_embd
    flops = {part: 2 * T * n for part, n in kernels.items()}
    flops['h.attn.scores'] = flops['h.attn.values'] = gptconf.n_layer * 2 * T * T * C
    flops['head'] = 2 * T * gptconf.vocab_size * C
    return flops


def count_saved(gptconf):
    """(bytes saved of one sequence for the backward pass, the most that are saved at a time).

    Each part saves its input, but GELU its derivative.
    """
    T, C, c = gptconf.block_size, gptconf.n_embd, jnp.dtype(gptconf.dtype).itemsize
    block = {'h.ln_1': 4 * T * C, 'h.attn.c_attn': c * T * C, 'h.attn.scores': c * 3 * T * C,
             'h.attn.c_proj': c * T * C, 'h.ln_2': 4 * T * C, 'h.mlp.c_fc': c * T * C,
             'h.mlp.gelu': c * 4 * T * C, 'h.mlp.c_proj': c * 4 * T * C}
    rest = {'ln_f': 4 * T * C, 'head': c * T * C, 'loss': c * T * gptconf.vocab_size}
    if gptconf.attention == 'xla':  # the softmax's output in float32, and a 16-bit copy
        block['h.attn.values'] = (4 if c == 4 else 4 + c) * scores_computed(gptconf)
    if gptconf.dropout:  # masks, one byte per element
        block['h.dropout'], rest['dropout'] = scores_computed(gptconf) + 2 * T * C, T * C
    if not gptconf.remat:
        saved = {part: gptconf.n_layer * n for part, n in block.items()} | rest
        return saved, sum(saved.values())
    # the input of every block, and all else of either one block or the parts after the blocks
    recomputed = sum(block.values()) - block['h.ln_1']
    block['h.ln_1'] *= gptconf.n_layer
    return block | rest, block['h.ln_1'] + max(recomputed, sum(rest.values()))


def print_parts(gptconf, model):
    """Print the table by part; returns the FLOP of the forward pass of one sequence."""
    params, kernels = count_parameters(model)
    forward = Counter(count_flops(gptconf, kernels))
    saved, activations = count_saved(gptconf)
    n_params, flops = params.total(), forward.total()

    def comma(n):
        return f'{n:,}' if n else ''

    def share(n, total):
        return f'{n / total:.2%}' if n else ''
    rows = [(part, comma(params[part]), share(params[part], n_params), comma(forward[part]),
             comma(2 * forward[part]), share(forward[part], flops), comma(saved.get(part)))
            for part in PARTS if part in {*params, *forward, *saved}]
    rows.append(('total', comma(n_params), '', comma(flops), comma(2 * flops), '',
                 comma(activations)))
    print_table(('', 'parameters', 'share', 'FLOP forward', 'FLOP backward', 'share',
                 'bytes saved'), rows)
    print(f'h: all {gptconf.n_layer} blocks. FLOP and bytes are for one sequence of '
          f'{gptconf.block_size} tokens; FLOP are those of the matmuls, with all scores\n')
    return flops


# -----------------------------------------------------------------------------
# memory and time

def device_memory(gptconf, batch_size, micro_steps):
    """{what: bytes} of one device, for batch_size sequences in a micro-step."""
    def n_bytes(tree):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    tx = create_optimizer(lambda it: 1e-4, weight_decay=1e-1, betas=(0.9, 0.95), grad_clip=1.0)
    state = abstract_train_state(gptconf, tx)
    weights = gradients = n_bytes(state['params'])
    moments, activations = n_bytes(state['opt_state']), batch_size * count_saved(gptconf)[1]
    # in a micro-step gradients replace activations; accumulation also keeps a sum of gradients
    temporary = gradients + activations if micro_steps > 1 else max(gradients, activations)
    return {'weights, float32': weights, "AdamW's two moments": moments,
            'gradients, float32': gradients, f'activations of {batch_size} sequences': activations,
            'together': weights + moments + temporary, 'a checkpoint': n_bytes(state)}


def duration(seconds):
    """Three digits, in the largest unit that it reaches."""
    for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= length:
            return f'{seconds / length:.3g} {unit}'
    return f'{seconds:.3g} seconds'


# -----------------------------------------------------------------------------
# compute-optimal training: how many tokens D for a model of N parameters, as a power law D = k N^m

def approach_3(A, B, alpha, beta):
    """(k, m) from the loss after training, E + A / N^alpha + B / D^beta.

    Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, equation 2. At a fixed 6ND the loss is
    lowest where alpha A / N^alpha = beta B / D^beta.
    """
    return (beta * B / (alpha * A)) ** (1 / beta), alpha / beta


LAWS = {  # k, m
    '20 tokens per parameter': (20.0, 1.0),
    # fitted to log N and log D of the table's approach 2, as in nanoGPT's notebook
    'approach 2, a line through table A3': (8.617647295493468, 1.0409573169995912),
    # as printed, and as nanoGPT has it
    'approach 3, equation 10': approach_3(406.4, 410.7, 0.34, 0.28),
    # from the paper's source, by Besiroglu et al.
    'approach 3, less rounded': approach_3(406.4, 410.7, 0.3392, 0.2849),
    # https://arxiv.org/abs/2404.10102
    'refit by Besiroglu et al. 2024': approach_3(482.01, 2085.43, 0.3478, 0.3658),
}


def optimal_size(law, budget):
    """(N, D) of the lowest loss for a budget of 6ND FLOP, by one of LAWS."""
    k, m = LAWS[law]
    best = (budget / (6 * k)) ** (1 / (1 + m))
    return best, k * best ** m


# -----------------------------------------------------------------------------
# the command line

def check():
    check_settings(config)
    for name in ('n_devices', 'peak', 'utilization'):
        if config[name] <= 0:
            raise UserError(f'{name} is {config[name]}; it must be more than 0')
    if init_from not in ('scratch', *GPT2_SHAPES):
        raise UserError(f'init_from is {init_from!r}; it must be scratch or one of '
                        f'{", ".join(GPT2_SHAPES)}')


def read_shape():
    """The GPTConfig of the settings."""
    fused = attention != 'xla' and dtype != 'float32' and not dropout
    rest = dict(dropout=dropout, dtype=dtype, attention='cudnn' if fused else 'xla', remat=remat)
    if init_from in GPT2_SHAPES:
        return GPTConfig(block_size, 50257, *GPT2_SHAPES[init_from], bias=True, **rest)
    size = vocab_size or load_vocabulary(data_dir_of(dataset))[0] or GPTConfig.vocab_size
    return GPTConfig(block_size, size, n_layer, n_head, n_embd, bias=bias, **rest)


def print_time(flops_per_token, n_params, tokens_per_iter):
    speed, tokens = n_devices * peak * utilization, max_iters * tokens_per_iter
    rows = [(name, f'{flops:.3e}', duration(flops / speed))
            for name, flops in (('by 6N + 12LHQT', flops_per_token * tokens),
                                ('by 6N', 6 * n_params * tokens))]
    print_table((f'{max_iters:,} iterations of {tokens_per_iter:,} tokens: {tokens:.3e}', 'FLOP',
                 'time'), rows)
    print(f'with {n_devices} device{"s" * (n_devices > 1)} of {peak / 1e12:g} TFLOP/s '
          f'and an mfu of {utilization:.0%}\n')


def print_laws(n_params, tokens_per_iter):
    budget = compute or 6 * n_params * max_iters * tokens_per_iter
    rows = []
    for name, (k, m) in LAWS.items():
        D = k * n_params ** m
        best_n, best_d = optimal_size(name, budget)
        rows.append((name, f'{D:.3e}', f'{D / n_params:.1f}', f'{6 * n_params * D:.3e}',
                     f'{D / tokens_per_iter:,.0f}', f'{best_n:.3e}', f'{best_d:.3e}'))
    print_table(('compute-optimal, by Hoffmann et al. 2022', 'D', 'D / N', '6ND', 'iterations',
                 'best N', 'and D'), rows)
    print(f'D: tokens for this N, {n_params:.3e}; best N and D: for {budget:.3e} FLOP')


def main():
    check()
    select_devices('cpu')
    gptconf = read_shape()
    model = split_model(gptconf).model
    n_params = model.get_num_params()  # without wpe
    flops_per_token = model.estimate_mfu(1, 1.0, peak_flops=1.0) / block_size
    tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
    print(f'{gptconf.n_layer} layers, {gptconf.n_head} heads, {gptconf.n_embd} wide, '
          f'{block_size} tokens, bias {gptconf.bias}, vocabulary {gptconf.vocab_size}\n')
    total_forward = print_parts(gptconf, model)
    print_table(('parameters without wpe, N', f'{n_params:,}'), [
        ('FLOP per token, forward and backward', f'{3 * total_forward / block_size:,.0f}'),
        ('6N + 12LHQT, which mfu is counted by', f'{flops_per_token:,.0f}')])
    print()
    memory = device_memory(gptconf, batch_size, gradient_accumulation_steps)
    print_table((f'memory of a device, about ({gptconf.dtype}, {gptconf.attention} attention)',
                 'bytes', 'GiB'),
                [(name, f'{n:,}', f'{n / 2**30:.2f}') for name, n in memory.items()])
    print()
    print_time(flops_per_token, n_params, tokens_per_iter)
    print_laws(n_params, tokens_per_iter)


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    main()
