"""
Time the training step without train_jax.py's evaluations and checkpoints, or time sampling.
$ python bench_jax.py --real_data=False
$ python bench_jax.py --real_data=False --batch_size=32 --remat=True
$ python bench_jax.py --real_data=False --n_layer=4 --n_head=4 --n_embd=128 --block_size=64
$ python bench_jax.py --max_new_tokens=100 --batch_size=1
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__))) # python -P and -I leave it out
import jax_train_utils as utils
from jax_transformer import GPT, GPT_ARGS, GPTConfig
from nanogpt_jax.devices import (
    attention_path, compute_dtype, describe_peak, enable_compilation_cache, peak_flops,
    program_memory, select_devices,
)
from nanogpt_jax.errors import report_user_error
from nanogpt_jax.run_dir import data_dir_of
from nanogpt_jax.sampling import check_sampling_memory, sampling_weights
from nanogpt_jax.sharding import choose_layout, choose_micro_batch_size, shard_batch

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
# -----------------------------------------------------------------------------
batch_size = 12 # max sequences per micro-step
gradient_accumulation_steps = 1 # the global batch is this * batch_size sequences
block_size = 1024 # context length, in tokens
bias = False # biases inside LayerNorm and Linear layers?
n_layer = 12 # transformer blocks
n_head = 12 # attention heads; must divide n_embd
n_embd = 768 # width of the embeddings
dropout = 0.0 # above 0 attention is computed by XLA, which is slower on GPUs and TPUs
vocab_size = 50304 # GPT-2's 50257, padded to a multiple of 64
real_data = True # batches of dataset; False: one batch of random tokens, repeated
dataset = 'openwebtext' # a folder in data/
seed = 1337 # of weights and batches
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1', 'tpu'; of several devices one is timed
dtype = 'bfloat16' # compute dtype: 'float32', 'bfloat16' or 'float16'; a CPU computes in float32
attention = 'auto' # 'cudnn' (NVIDIA GPUs), 'splash' (TPUs), 'xla' (any device), 'auto': the fastest
remat = False # recompute each block in the backward pass: less memory, a third more FLOPs
compilation_cache = False # True: use cached programs of earlier runs, as train_jax.py does
compile = True # no effect: XLA always compiles
max_new_tokens = 0 # above 0: time sampling instead, batch_size samples of this many tokens
profile = False # write a trace of 5 steps to ./bench_log, for TensorBoard or ui.perfetto.dev
from configurator import configure
config, given = configure(globals()) # all settings, and the names of those that were given
# -----------------------------------------------------------------------------

if 'compile' in given:
    print('--compile has no effect: XLA always compiles')
utils.check_settings(config)
devices = select_devices(device)[:1]
platform = devices[0].platform
if compilation_cache:
    enable_compilation_cache()
compute_type = compute_dtype(dtype, devices, 'dtype' in given)
kernel = attention_path(attention, compute_type, n_embd // n_head, devices[0])
fields = {name: config[name] for name in GPT_ARGS if name in config}
gptconf = GPTConfig(**fields, dtype=compute_type, attention=kernel, remat=remat)
global_batch_size = gradient_accumulation_steps * batch_size
micro_batch_size = choose_micro_batch_size(batch_size, block_size, n_embd, platform)
layout = choose_layout(devices, global_batch_size, micro_batch_size)
mesh = layout.mesh
print(f'platform: {platform} ({devices[0].device_kind}), computing in {compute_type}, '
      f'attention: {"xla" if dropout else kernel}')

def median_time(f, n):
    """Median seconds of n calls."""
    times = []
    for _ in range(n):
        t0 = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - t0)
    return float(np.median(times))

utils.check_model_memory(gptconf, mesh, 'the weights', 4)
if max_new_tokens:
    check_sampling_memory(gptconf, batch_size, 1, max_new_tokens)
    model = GPT(gptconf, rngs=nnx.Rngs(seed))
    idx = np.zeros((batch_size, 1), np.int32)
    def generate():
        return model.generate(idx, max_new_tokens, top_k=min(200, vocab_size),
                              key=jax.random.key(seed))
    print(f'first call, with compilation: {median_time(generate, 1):.2f} s')
    dt = median_time(generate, 5)
    # sampling a token takes at least as long as reading the weights, timed here by summing them
    _, params, head = sampling_weights(model)
    if head is not None:
        del params['transformer']['wte'] # only a few rows are read; the output layer has a copy
    weights = jax.tree.leaves((params, head))
    read = jax.jit(lambda weights: [w.sum() for w in weights])
    floor = median_time(lambda: read(weights), 10)
    rate, n_bytes = batch_size * max_new_tokens / dt, sum(w.nbytes for w in weights)
    print(f'{batch_size} samples of {max_new_tokens} tokens: {dt:.3f} s, '
          f'{rate:,.1f} tokens per second')
    print(f'time per token of each: {dt / max_new_tokens * 1000:.2f}ms; '
          f'reading the {n_bytes / 1e6:,.1f} MB of weights once: {floor * 1000:.2f}ms')
    sys.exit()

# data
batches = utils.Batches(layout, data_dir_of(dataset), block_size, vocab_size, seed,
                        eval_iters=1, batch_size=batch_size)
shape = layout.micro_steps, global_batch_size // layout.micro_steps, block_size
tokens = np.random.default_rng(seed).integers(vocab_size, size=(2, *shape), dtype=np.int32)
fixed_batch = shard_batch(mesh, *tokens) # x, y
def get_batch(iter_num):
    return batches.train(iter_num) if real_data else fixed_batch

# model and step
model, graphdef, _ = utils.split_model(gptconf)
tx = utils.create_optimizer(lambda it: 1e-4, weight_decay=1e-2, betas=(0.9, 0.95), grad_clip=0.0)
state = utils.init_train_state(gptconf, tx, seed, mesh)
train_step = utils.make_train_step(graphdef, tx, seed, mesh,
                                   scale_loss=compute_type == 'float16')
t0 = time.perf_counter()
train_step = train_step.lower(state, *get_batch(0), np.int32(0)).compile()
print(f'compiled in {time.perf_counter() - t0:.1f} s')
arguments, temporary = program_memory(train_step, platform)
print(f'memory by the compiled program: {arguments / 2**30:.2f} GiB of state and batch, '
      f'{temporary / 2**30:.2f} GiB while it runs')

def run(step, state, num_steps):
    """Make num_steps training steps; each loss is read while the next step runs."""
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
    t0 = time.perf_counter()
    state = run(train_step, state, num_steps)
    dt = (time.perf_counter() - t0) / num_steps

    # the host's share of the time, from a step that computes almost nothing
    idle = jax.jit(lambda state, x, y, it: (state, {'loss': jnp.float32(0) * it}),
                   donate_argnums=0)
    idle = idle.lower(state, *get_batch(0), np.int32(0)).compile()
    host = []
    for k in range(100):
        t0 = time.perf_counter()
        state, metrics = idle(state, *get_batch(k), np.int32(k))
        host.append(time.perf_counter() - t0)
        jax.block_until_ready(metrics)

    mfu = model.estimate_mfu(global_batch_size, dt, peak_flops(devices[0]))
    print(describe_peak(devices[0]))
    print(f'time per iteration: {dt * 1000:.4f}ms, MFU: {mfu * 100:.2f}%')
    print(f'tokens per second: {global_batch_size * block_size / dt:,.0f}')
    print(f'host time per iteration (batch and dispatch): {np.median(host) * 1000:.2f}ms')
    in_use = (devices[0].memory_stats() or {}).get('peak_bytes_in_use')
    if in_use: # None on a CPU
        print(f'peak memory of the device: {in_use / 2**30:.2f} GiB')
