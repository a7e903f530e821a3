"""
Will it fit, and how fast will it be? Compile train_jax.py's step for devices that you don't have,
by their own compiler; print the memory, the communication and, for a TPU, the time it predicts.
$ python -m tools.plan --target=v5e
$ python -m tools.plan config/train_gpt2.py --target=h100:8
$ python -m tools.plan --target=v6e:2x4 --init_from=gpt2-xl --fsdp=8 --batch_size=4 --largest=True
"""

import math
import sys
import time
from collections import Counter

import jax

from jax_train_utils import check_settings, split_model
from jax_transformer import GPTConfig
from nanogpt_jax.devices import attention_path, compute_dtype, peak_flops, program_memory
from nanogpt_jax.errors import UserError, report_user_error
from nanogpt_jax.run_dir import data_dir_of
from nanogpt_jax.pretrained import GPT2_SHAPES
from nanogpt_jax.sharding import choose_layout
from nanogpt_jax.tokenizer import load_vocabulary
from tools import print_table
from tools.hlo import collectives, custom_calls, cycles_by_part, sent_bytes
from tools.targets import TPUS, compile_step, largest_fit, target_devices, usable_memory

sys.excepthook = report_user_error
# -----------------------------------------------------------------------------
target = 'v5e' # v5e, v5p, v6e or tpu7x: one chip, or a topology as in 'v5e:2x4'; a GPU (v100, t4,
               # l4, a100, h100, h200, b200, ...) and how many, as in 'h100:8'; 'cpu:8': eight
               # virtual devices, which need no other compiler
largest = False # also find the largest micro-batch that fits; compiles several times
# as in train_jax.py
init_from = 'scratch' # 'scratch': the shape below; or gpt2, gpt2-medium, gpt2-large, gpt2-xl
dataset = 'openwebtext' # folder in data/, for its vocabulary size
vocab_size = 0 # 0: that of data/<dataset>, or else GPT-2's, padded
gradient_accumulation_steps = 5 * 8 # the global batch is this * batch_size sequences
batch_size = 12 # max sequences per device per micro-step
block_size = 1024 # context length
n_layer = 12 # blocks
n_head = 12 # attention heads
n_embd = 768 # width
dropout = 0.0 # more than 0: attention by XLA
bias = False # biases inside LayerNorm and Linear layers?
dtype = 'bfloat16' # compute dtype: 'float32', 'bfloat16' or 'float16'
attention = 'auto' # 'cudnn' (NVIDIA GPUs), 'splash' (TPUs), 'xla' (any device), 'auto': the fastest
remat = False # recompute each block in the backward pass: less memory, a third more FLOPs
fsdp = 1 # weights, gradients and optimizer state are sharded across groups of this many devices
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.stdout.reconfigure(line_buffering=True)
check_settings(config)
if init_from in GPT2_SHAPES:
    n_layer, n_head, n_embd = GPT2_SHAPES[init_from]
elif init_from != 'scratch':
    raise UserError(f'init_from is {init_from!r}; it must be scratch or one of '
                    f'{", ".join(GPT2_SHAPES)}')
devices = target_devices(target)
layout = choose_layout(devices, gradient_accumulation_steps * batch_size, batch_size, fsdp)
mesh, micro_steps = layout.mesh, layout.micro_steps
micro_batch_size = layout.global_batch_size // mesh.size // micro_steps
compute = compute_dtype(dtype, devices, 'dtype' in given)
gptconf = GPTConfig(
    block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout,
    bias=bias, dtype=compute, remat=remat,
    vocab_size=vocab_size or load_vocabulary(data_dir_of(dataset))[0] or GPTConfig.vocab_size,
    # the fused kernels have no dropout
    attention='xla' if dropout else attention_path(
        attention, compute, n_embd // n_head, devices[0]))
model = split_model(gptconf).model
memory, memory_note = usable_memory(target)
if largest and memory == math.inf:
    raise UserError(f'largest needs a TPU or a GPU, with a memory of its own; target is {target!r}')


def measure(n_sequences):
    """(step compiled for micro-batches of n_sequences, bytes of its arguments, all bytes that a
    device needs); (None, 0, inf) if the compiler says that it does not fit."""
    t0 = time.perf_counter()
    try:
        step = compile_step(gptconf, mesh, micro_steps, n_sequences)
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        print(f'{n_sequences} sequences do not fit: {str(e).splitlines()[0]}')
        return None, 0, math.inf
    arguments, temporary = program_memory(step, devices[0].platform)
    n_bytes = arguments + temporary
    print(f'{n_sequences} sequences: {n_bytes / 2**30:.2f} GiB, compiled in '
          f'{time.perf_counter() - t0:.0f} s')
    return step, arguments, n_bytes


def print_memory(arguments, n_bytes):
    rows = [('state and batch', arguments), ('while it runs', n_bytes - arguments),
            ('in all', n_bytes)]
    if memory < math.inf:
        rows.append((f'usable ({memory_note})', memory))
    print_table(['memory of a device', 'GiB'], [(name, f'{n / 2**30:.2f}') for name, n in rows])
    if memory < math.inf:
        print('it fits' if n_bytes <= memory else 'it does NOT fit')
    print()


def print_collectives(hlo):
    """Print the collectives of a step: how often they run, and the bytes that a device sends."""
    times, sent = Counter(), Counter()
    for op, n_bytes, n_devices, count, in_loop in collectives(hlo, mesh.size):
        key = op, n_devices, 'every micro-step' if in_loop else 'once'
        times[key] += count
        sent[key] += count * sent_bytes(op, n_bytes, n_devices)
    if times:
        print_table(['communication in a step', 'devices', 'when', 'times', 'MB sent'],
                    [(*key, count, f'{sent[key] / 1e6:,.1f}') for key, count in times.items()])
        print()


def print_time(hlo):
    """FLOP and, for a TPU, the compiler's estimate of clock cycles and the time that they take."""
    flops = model.estimate_mfu(micro_steps * micro_batch_size, 1.0, peak_flops=1.0)
    peak = peak_flops(devices[0])
    print(f'{flops / 1e12:.2f} TFLOP in a step on each device (6N + 12LHQT), '
          f'at the peak of {peak / 1e12:g} TFLOP/s {flops / peak * 1000:.1f} ms')
    if not (cycles := cycles_by_part(hlo)):
        print('only the compiler for TPUs estimates time')
        return
    total = sum(cycles.values())
    print()
    print_table(['estimated cycles in a step', 'M', 'share'],
                [(part, f'{n / 1e6:.1f}', f'{n / total:.0%}') for part, n in cycles.items()]
                + [('in all', f'{total / 1e6:.1f}', '')])
    clock = TPUS[target.lower().partition(':')[0]].clock * 1e9
    seconds = total / clock
    if kernels := custom_calls(hlo, 'tpu_custom_call'):
        # causal attention's matmuls: half of what 12LHQT counts, and the scores once more backward
        n_tokens = micro_steps * micro_batch_size * block_size
        floor = 7 * n_layer * n_embd * block_size * n_tokens / peak
        print(f'plus {kernels} calls of Pallas kernels, for which the compiler has no estimate: '
              f'{floor * 1000:.1f} ms at the peak')
        seconds += floor
    print(f'at {clock / 1e9:g} GHz a step takes at least {seconds * 1000:.1f} ms, '
          f'mfu {flops / peak / seconds:.1%}, '
          f'{gradient_accumulation_steps * batch_size * block_size / seconds:,.0f} tokens/s; '
          'this leaves out waiting for other devices')


n_params = model.get_num_params(non_embedding=False)
print(f'{n_params / 1e6:,.2f}M parameters: {n_layer} layers, {n_head} heads, {n_embd} wide')
print(f'{target}: {mesh.size} x {devices[0].device_kind}, mesh: data {mesh.shape["data"]} x fsdp '
      f'{fsdp}; {gptconf.dtype}, attention {gptconf.attention}, remat {remat}')
print(f'each device computes {micro_steps} micro-steps of {micro_batch_size} x {block_size} '
      'tokens in a step')
step, arguments, n_bytes = measure(micro_batch_size)
print()
if step:
    hlo = step.as_text()
    print_memory(arguments, n_bytes)
    print_collectives(hlo)
    print_time(hlo)
if largest:
    print()
    n = largest_fit(lambda n: measure(n)[2], memory, micro_batch_size, n_bytes)
    print(f'largest micro-batch that fits: {n} sequences')
sys.exit(not step or n_bytes > memory)
