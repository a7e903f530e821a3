"""
Time the training step alone: a much shorter train_jax.py.
$ python bench_jax.py --real_data=False
$ python bench_jax.py --real_data=False --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --vocab_size=65
"""

import os
import sys
import time

import jax
import numpy as np

from jax_train_utils import (
    check_settings, check_tokens, compute_dtype, create_optimizer, get_train_batch, init_train_state, make_mesh,
    make_train_step, open_tokens, peak_flops, report_user_error, select_devices, shard_batch, split_model,
)
from jax_transformer import GPTConfig

# -----------------------------------------------------------------------------
batch_size = 12
block_size = 1024
bias = False
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
real_data = True # batches of dataset, or else one batch of random tokens again and again
dataset = 'openwebtext'
seed = 1337
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1', 'tpu'; several devices: one of them is timed
dtype = 'bfloat16' # compute type: 'float32', 'bfloat16' or 'float16'; a CPU computes in float32
compile = True # no meaning here: XLA always compiles
profile = False # write a trace of 5 steps to ./bench_log, for TensorBoard or ui.perfetto.dev
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
if 'compile' in given:
    print('--compile has no counterpart here and is ignored: XLA always compiles')
check_settings(config)
devices = select_devices(device)[:1]
compute_type = compute_dtype(dtype, devices)
mesh = make_mesh(devices)
gptconf = GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                    dropout=0.0, bias=bias, dtype=compute_type) # no dropout, for determinism
print(f'platform: {devices[0].platform} ({devices[0].device_kind}), computing in {compute_type}')

# data
data_dir = os.path.join('data', dataset)
if real_data:
    open_tokens(data_dir, 'train', block_size)
    check_tokens(data_dir, vocab_size, splits=('train',))
def get_batch(iter_num):
    if real_data:
        return get_train_batch(mesh, data_dir, batch_size, 1, block_size, seed, iter_num)
    return fixed_batch
tokens = np.random.default_rng(seed).integers(vocab_size, size=(2, 1, batch_size, block_size), dtype=np.int32)
fixed_batch = shard_batch(mesh, *tokens) # x, y: (1, batch_size, block_size)

# model and step
model, graphdef, _ = split_model(gptconf)
tx = create_optimizer(lambda it: 1e-4, weight_decay=1e-2, betas=(0.9, 0.95), grad_clip=0.0)
state = init_train_state(gptconf, tx, seed, mesh)
train_step = make_train_step(graphdef, tx, seed, scale_loss=compute_type == 'float16')
t0 = time.time()
train_step = train_step.lower(state, *get_batch(0), np.int32(0)).compile()
print(f'compiled in {time.time() - t0:.1f} s')

def run(state, num_steps):
    """num_steps training steps, each waited for, as nanoGPT's bench.py does; returns the state."""
    batch = get_batch(0)
    for k in range(num_steps):
        state, metrics = train_step(state, *batch, np.int32(k))
        batch = get_batch(k + 1)
        print(f'{k}/{num_steps} loss: {float(metrics["loss"]):.4f}')
    return state

state = run(state, 10) # burn-in
if profile:
    with jax.profiler.trace('bench_log'):
        run(state, 5)
    print('trace written to bench_log')
else:
    num_steps = 20
    t0 = time.time()
    state = jax.block_until_ready(run(state, num_steps))
    dt = (time.time() - t0) / num_steps
    peak, peak_of = peak_flops(devices[0])
    print(f'mfu is counted against {peak / 1e12:g} TFLOP/s, the bfloat16 peak of {peak_of}')
    print(f'time per iteration: {dt * 1000:.4f}ms, MFU: {model.estimate_mfu(batch_size, dt, peak) * 100:.2f}%')
