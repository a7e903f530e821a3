"""
Time the training step alone, a much shorter train_jax.py, or sampling.
$ python bench_jax.py --real_data=False
$ python bench_jax.py --real_data=False --batch_size=32 --gradient_accumulation_steps=4 --remat=True
$ python bench_jax.py --real_data=False --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --vocab_size=65
$ python bench_jax.py --max_new_tokens=100 --batch_size=1
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_devices import (
    attention_path, compute_dtype, enable_compilation_cache, peak_flops, report_user_error, select_devices,
)
from jax_sampling import sampling_weights
from jax_train_utils import (
    check_settings, check_tokens, count_tokens, create_optimizer, get_train_batch, init_train_state, make_mesh, make_train_step,
    micro_batch_rows, shard_batch, share_rows, split_model,
)
from jax_transformer import GPT, GPTConfig

# -----------------------------------------------------------------------------
batch_size = 12 # rows that the device takes at a time
gradient_accumulation_steps = 1 # an iteration has gradient_accumulation_steps * batch_size rows
block_size = 1024
bias = False
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
vocab_size = 50304
real_data = True # batches of dataset, or else one batch of random tokens again and again
dataset = 'openwebtext'
seed = 1337
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1', 'tpu'; several devices: one of them is timed
dtype = 'bfloat16' # compute type: 'float32', 'bfloat16' or 'float16'; a CPU computes in float32
attention = 'auto' # 'cudnn', the fused kernel of NVIDIA GPUs, 'xla', or the faster one that the device has
remat = False # compute each block again in the backward pass: less memory, a third more work
compilation_cache = False # True: with programs kept from an earlier run, as train_jax.py has it
compile = True # no meaning here: XLA always compiles
max_new_tokens = 0 # time sampling instead: so many tokens after a prompt of one, in a batch of batch_size samples
profile = False # write a trace of 5 steps to ./bench_log, for TensorBoard or ui.perfetto.dev
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
if 'compile' in given:
    print('--compile has no counterpart here and is ignored: XLA always compiles')
check_settings(config)
devices = select_devices(device)[:1]
if compilation_cache:
    enable_compilation_cache()
compute_type = compute_dtype(dtype, devices)
mesh = make_mesh(devices)
attention = attention_path(attention, compute_type, n_embd // n_head, devices[0])
gptconf = GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout,
                    bias=bias, dtype=compute_type, attention=attention, remat=remat)
print(f'platform: {devices[0].platform} ({devices[0].device_kind}), computing in {compute_type}, '
      f'attention: {"xla" if dropout else attention}')

def median_time(f, n):
    """Median seconds of n calls."""
    times = []
    for _ in range(n):
        t0 = time.time()
        jax.block_until_ready(f())
        times.append(time.time() - t0)
    return float(np.median(times))

if max_new_tokens:
    model = GPT(gptconf, rngs=nnx.Rngs(seed))
    idx = np.zeros((batch_size, 1), np.int32)
    def generate():
        return model.generate(idx, max_new_tokens, top_k=min(200, vocab_size), key=jax.random.key(seed))
    print(f'first call, with compilation: {median_time(generate, 1):.2f} s')
    dt = median_time(generate, 5)
    # no token can come faster than the weights are read; their sums read them and do little else
    weights = jax.tree.leaves(sampling_weights(model)[1])
    read = jax.jit(lambda weights: [w.sum() for w in weights])
    floor = median_time(lambda: read(weights), 10)
    rate, n_bytes = batch_size * max_new_tokens / dt, sum(w.nbytes for w in weights)
    print(f'{batch_size} samples of {max_new_tokens} tokens: {dt:.3f} s, {rate:,.1f} tokens per second')
    print(f'time per token of each: {dt / max_new_tokens * 1000:.2f}ms; '
          f'reading the {n_bytes / 1e6:,.1f} MB of weights once: {floor * 1000:.2f}ms')
    sys.exit()

# data
n_rows = gradient_accumulation_steps * batch_size
_, n_micro = share_rows(n_rows, micro_batch_rows(batch_size, block_size, n_embd, devices[0].platform), 1)
data_dir = os.path.join('data', dataset)
if real_data:
    count_tokens(data_dir, 'train', block_size)
    check_tokens(data_dir, vocab_size, splits=('train',))
def get_batch(iter_num):
    if real_data:
        return get_train_batch(mesh, data_dir, n_rows, n_micro, block_size, seed, iter_num)
    return fixed_batch
tokens = np.random.default_rng(seed).integers(vocab_size, size=(2, n_micro, n_rows // n_micro, block_size), dtype=np.int32)
fixed_batch = shard_batch(mesh, *tokens) # x, y: (n_micro, n_rows / n_micro, block_size)

# model and step
model, graphdef, _ = split_model(gptconf)
tx = create_optimizer(lambda it: 1e-4, weight_decay=1e-2, betas=(0.9, 0.95), grad_clip=0.0)
state = init_train_state(gptconf, tx, seed, mesh)
train_step = make_train_step(graphdef, tx, seed, mesh, scale_loss=compute_type == 'float16')
t0 = time.time()
train_step = train_step.lower(state, *get_batch(0), np.int32(0)).compile()
print(f'compiled in {time.time() - t0:.1f} s')
memory = train_step.memory_analysis()
print(f'memory by the compiled program: {memory.argument_size_in_bytes / 2**30:.2f} GiB of state and batch, '
      f'{memory.temp_size_in_bytes / 2**30:.2f} GiB while it runs')

def run(step, state, num_steps):
    """num_steps training steps as train_jax.py takes them, the loss of each read while the next one is computed."""
    batch, metrics = get_batch(0), None
    for k in range(num_steps):
        previous = metrics
        state, metrics = step(state, *batch, np.int32(k))
        batch = get_batch(k + 1)
        if previous:
            print(f'{k - 1}/{num_steps} loss: {float(previous["loss"]):.4f}')
    print(f'{num_steps - 1}/{num_steps} loss: {float(metrics["loss"]):.4f}')
    return jax.block_until_ready(state)

state = run(train_step, state, 10) # burn-in
if profile:
    with jax.profiler.trace('bench_log'):
        run(train_step, state, 5)
    print('trace written to bench_log')
else:
    num_steps = 20
    t0 = time.time()
    state = run(train_step, state, num_steps)
    dt = (time.time() - t0) / num_steps

    # the host's own share, by a step that takes and returns the same state and computes next to nothing
    idle = jax.jit(lambda state, x, y, it: (state, {'loss': jnp.float32(0) * it}), donate_argnums=0)
    idle = idle.lower(state, *get_batch(0), np.int32(0)).compile()
    host = []
    for k in range(100):
        t0 = time.time()
        state, metrics = idle(state, *get_batch(k), np.int32(k))
        host.append(time.time() - t0)
        jax.block_until_ready(metrics)

    peak, peak_of = peak_flops(devices[0])
    print(f'mfu is counted against {peak / 1e12:g} TFLOP/s, the bfloat16 peak of {peak_of}')
    print(f'time per iteration: {dt * 1000:.4f}ms, MFU: {model.estimate_mfu(n_rows, dt, peak) * 100:.2f}%')
    print(f'tokens per second: {n_rows * block_size / dt:,.0f}')
    print(f'host time per iteration (batch and dispatch): {np.median(host) * 1000:.2f}ms')
    in_use = (devices[0].memory_stats() or {}).get('peak_bytes_in_use')
    if in_use: # a CPU has no count of it
        print(f'peak memory of the device: {in_use / 2**30:.2f} GiB')
