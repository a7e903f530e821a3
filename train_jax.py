"""
Train a GPT on every device that JAX sees, from one CPU to several GPUs or a TPU.

To run with the defaults (GPT-2 124M on OpenWebText), or small on a CPU:
$ python train_jax.py
$ python train_jax.py config/train_pydoc_char.py
To change any setting below, and to go on where a run has stopped:
$ python train_jax.py config/train_shakespeare_char.py --batch_size=32 --device=cpu
$ python train_jax.py --init_from=resume --out_dir=out-shakespeare-char
"""

import math
import os
import sys
import time
from functools import partial

import jax
import numpy as np
import optax

from jax_checkpoint import Checkpoints, steps_on_disk
from jax_devices import (
    attention_path, compute_dtype, enable_compilation_cache, launched_as, mute_all_but_first, on_host, peak_flops,
    print_or_go_on as print, report_user_error, select_devices, start_processes,
)
from jax_metrics import Metrics, progress, time_left
from jax_train_utils import (
    StopRequest, check_settings, check_tokens, count_tokens, create_learning_rate_schedule, create_optimizer, crop_state,
    decay_groups, estimate_loss, find_non_finite, get_train_batch, init_train_state, load_meta, make_eval_step, make_mesh,
    make_train_step, merge_resumed_config, micro_batch_rows, place_train_state, share_rows, split_model, state_bytes,
    take_devices,
)
from jax_transformer import GPT, GPT_ARGS, GPTConfig, UserError, optional_import

sys.excepthook = report_user_error # a user's mistake is one line, not a traceback
mute_all_but_first(launched_as()[0])
# -----------------------------------------------------------------------------
# defaults: GPT-2 (124M) on OpenWebText
# files and logging
out_dir = 'out_jax'
eval_interval = 2000
log_interval = 1
eval_iters = 200
eval_only = False # evaluate once, write nothing, and stop
always_save_checkpoint = True # save after every evaluation; False: only when the validation loss has improved
init_from = 'scratch' # 'scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with GPT-2 weights
# wandb logging
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'
gradient_accumulation_steps = 5 * 8 # a step has gradient_accumulation_steps * batch_size rows
batch_size = 12 # rows that a device takes at a time
block_size = 1024
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0 # 0 is good for pretraining, try 0.1+ for finetuning
bias = False # biases inside LayerNorm and Linear layers?
# adamw optimizer
learning_rate = 6e-4 # the peak
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0 # largest global gradient norm, 0.0 for no clipping
# learning rate decay
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000 # about max_iters, per Chinchilla
min_lr = 6e-5 # about learning_rate/10, per Chinchilla
# system
seed = 1337
device = 'auto' # 'auto', 'cpu', 'gpu' or 'cuda', 'cuda:1' for one of several, 'tpu'
dtype = 'bfloat16' # compute type: 'float32', 'bfloat16', or 'float16' with dynamic loss scaling; a CPU computes in float32
attention = 'auto' # 'cudnn', the fused kernel of NVIDIA GPUs, 'xla', or the faster one that the device has
remat = False # compute each block again in the backward pass: less memory, a third more work
compilation_cache = True # keep compiled programs in the user's cache folder, for a quick start the next time
compile = True # no meaning here: XLA always compiles
fsdp = 1 # so many devices share one copy of weights, gradients and optimizer state; the batch is shared by all in any case
peer_timeout = 100 # of several processes: seconds of silence after which one counts as dead, which ends the others
backend = 'nccl' # no meaning here: XLA chooses its own
from configurator import configure
config, given = configure(globals()) # overrides from the command line and config files
# -----------------------------------------------------------------------------

sys.stdout.reconfigure(line_buffering=True) # log lines reach a pipe or file when they are printed

# processes and devices first: --device must be known before JAX is used
start_processes(device, peer_timeout)
devices = select_devices(device)
if compilation_cache:
    enable_compilation_cache()
print(f'platform: {devices[0].platform}, devices: {len(devices)} ({devices[0].device_kind}), processes: {jax.process_count()}')
for key in sorted(given & {'compile', 'backend'}):
    print(f'--{key} has no counterpart here and is ignored: XLA always compiles, and brings its own communication')

# a resumed run takes from its checkpoint what was not given this time
iter_num = 0
best_val_loss = 1e9
chars = None # the characters of the vocabulary, where the data set has its own
if init_from == 'resume':
    saved_checkpoints = Checkpoints(out_dir, read_only=True)
    iter_num = saved_checkpoints.newest_whole()
    print(f'Resuming training from {out_dir}, from iteration {iter_num}')
    saved = saved_checkpoints.meta(iter_num)
    best_val_loss, chars = saved['best_val_loss'], saved['chars']
    config, differs = merge_resumed_config(config, given, saved['config'])
    globals().update(config)
    if differs:
        print(f'differs from the checkpoint: {differs}')
    if iter_num > max_iters and not eval_only:
        print(f'nothing left to train: {out_dir} is at iteration {iter_num}, past max_iters={max_iters}')
        sys.exit(0)
check_settings(config)
if init_from != 'resume' and not eval_only and steps_on_disk(out_dir):
    raise UserError(f'{out_dir} holds checkpoints of another run (iteration {steps_on_disk(out_dir)[-1]}): go on with it '
                    'by --init_from=resume, or choose another --out_dir')

# the rows of a step, shared by the devices
n_rows = gradient_accumulation_steps * batch_size
micro_rows = micro_batch_rows(batch_size, block_size, n_embd, devices[0].platform)
n_devices, n_micro = share_rows(n_rows, micro_rows, len(devices), fsdp, jax.process_count())
if n_devices < len(devices):
    print(f'using {n_devices} of {len(devices)} devices: {n_rows} rows a step cannot be shared equally by more')
mesh = make_mesh(take_devices(devices, n_devices), fsdp)
tokens_per_iter = n_rows * block_size
print(f'tokens per iteration will be: {tokens_per_iter:,}')
compute_type = compute_dtype(dtype, devices)
if compute_type != dtype:
    print(f'computing in {compute_type}, as nanoGPT does on the {devices[0].platform}, not in {dtype}')

# data
data_dir = os.path.join('data', dataset)
for split in ('train', 'val'):
    count_tokens(data_dir, split, block_size) # complains now rather than at the first evaluation
meta_vocab_size, meta_chars = load_meta(data_dir)
if meta_vocab_size is not None:
    print(f"found vocab_size = {meta_vocab_size} (inside {os.path.join(data_dir, 'meta.pkl')})")
    if chars and chars != meta_chars:
        raise UserError(f'{out_dir} was trained on other characters than those of {data_dir}: resume it with --dataset set to '
                        'its own data, or prepare that again as it was')
    chars = meta_chars

# model and optimizer, as one training state on the devices
schedule = create_learning_rate_schedule(learning_rate, warmup_iters, lr_decay_iters, min_lr, decay_lr)
tx = create_optimizer(schedule, weight_decay, (beta1, beta2), grad_clip)
model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias,
                  vocab_size=50304, dropout=dropout)
if init_from == 'scratch':
    print('Initializing a new model from scratch')
    if meta_vocab_size is None:
        print('defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)')
    else:
        model_args['vocab_size'] = meta_vocab_size
    state = init_train_state(GPTConfig(**model_args), tx, seed, mesh)
elif init_from == 'resume':
    model_args = saved['model_args'] | dict(dropout=dropout)
    state = saved_checkpoints.state(iter_num, GPTConfig(**model_args), tx, mesh)
    if block_size < model_args['block_size']:
        state = crop_state(state, block_size, mesh)
        model_args['block_size'] = block_size
elif init_from.startswith('gpt2') or os.path.isdir(init_from):
    print(f'Initializing from OpenAI GPT-2 weights: {init_from}')
    with on_host(): # whole; the devices get their parts of it
        model = GPT.from_pretrained(init_from, dict(dropout=dropout))
        model.crop_block_size(block_size)
    model_args = {name: getattr(model.config, name) for name in GPT_ARGS}
    state = place_train_state(model, tx, mesh)
else:
    raise UserError(f"init_from is {init_from!r}; it must be 'scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', "
                    "'gpt2-xl', or a folder with config.json and model.safetensors")
config |= {name: value for name, value in model_args.items() if name in config} # as pretrained weights have it
check_tokens(data_dir, model_args['vocab_size'])
attention = attention_path(attention, compute_type, model_args['n_embd'] // model_args['n_head'], devices[0])
if attention == 'cudnn' and dropout > 0:
    print('attention: cudnn in evaluation, xla in training, since JAX offers the fused kernel without dropout only')
model, train_graphdef, eval_graphdef = split_model(GPTConfig(**model_args, dtype=compute_type, attention=attention, remat=remat))
print(f'number of parameters: {model.get_num_params() / 1e6:.2f}M')
for name, tensors in zip(('decayed', 'non-decayed'), decay_groups(state['params'])):
    print(f'num {name} parameter tensors: {len(tensors)}, with {sum(p.size for p in tensors):,} parameters')

held, in_all = (n_bytes / 1e6 for n_bytes in state_bytes(state))
print(f"mesh: data {mesh.shape['data']} x fsdp {fsdp}, {held:,.1f} MB of the {in_all:,.1f} MB of training state on each device")

train_step = make_train_step(train_graphdef, tx, seed, mesh, scale_loss=compute_type == 'float16')
eval_step = make_eval_step(eval_graphdef, mesh)
peak, peak_of = peak_flops(devices[0])
print(f'mfu is counted against {n_devices} x {peak / 1e12:g} TFLOP/s, the bfloat16 peak of {peak_of}')
if eval_only and 'wandb_log' not in given:
    wandb_log = False # evaluating a checkpoint is not a run of its own
wandb_log = wandb_log and jax.process_index() == 0 # of several processes the first alone logs
# a resumed run goes on under its own id, which its checkpoints hold, those of a time without wandb_log too
run_id = saved['config'].get('wandb_run_id') if init_from == 'resume' and not eval_only else None
if wandb_log:
    wandb = optional_import('wandb')
    run_id = wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=run_id, resume='allow').id
if run_id:
    config['wandb_run_id'] = run_id

# where checkpoints go; opened this late so that a mistake above leaves no folder behind
if not eval_only:
    checkpoints = Checkpoints(out_dir)
    if init_from == 'resume':
        checkpoints.set_aside_after(iter_num) # damaged ones, which would be in the way
    metrics_file = Metrics(out_dir, iter_num) if jax.process_index() == 0 else None

# training loop
get_step_batch = partial(get_train_batch, mesh, data_dir, n_rows, n_micro, block_size, seed)
stop = StopRequest() # SIGTERM and SIGINT end the loop at its next turn
if not eval_only:
    batch = get_step_batch(iter_num) # the very first
    t0 = time.time()
    train_step = train_step.lower(state, *batch, np.int32(iter_num)).compile()
    print(f'compiled in {time.time() - t0:.1f} s')
start_iter, start_time = iter_num, time.time()
running_mfu = -1.0
last_step = {} # of the last logged iteration, the gradient's norm and, in float16, the loss scale
pending = None # (iteration, metrics) of a step whose line is still to be printed
last_logged = iter_num - 1
train_time = 0.0 # seconds since the last logged iteration and before t0, evaluations excluded
problem = None

def log_step():
    """Print the pending step's line; reading its loss waits for it, so the next step should be queued by then."""
    global pending, last_logged, last_step, train_time, t0, running_mfu, problem
    if not pending:
        return
    it, metrics = pending
    loss = float(metrics['loss'])
    dt = (train_time + time.time() - t0) / (it - last_logged)
    pending, last_logged, train_time, t0 = None, it, 0.0, time.time()
    if it - start_iter >= 5: # let the training loop settle a bit
        mfu = model.estimate_mfu(n_rows, dt, n_devices * peak)
        running_mfu = mfu if running_mfu == -1.0 else 0.9 * running_mfu + 0.1 * mfu
    print(f'iter {it}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {running_mfu * 100:.2f}%')
    last_step = {name: float(value) for name, value in metrics.items() if name != 'loss'}
    if metrics_file:
        metrics_file.write(iter=it, tokens=(it + 1) * tokens_per_iter, loss=loss, lr=float(schedule(it)), **last_step,
                           ms_per_iter=dt * 1000, tokens_per_s=tokens_per_iter / dt,
                           mfu=running_mfu if running_mfu >= 0 else math.nan)
    problem = find_non_finite(it, metrics)
    checkpoints.check() # for an error in the background

t0 = time.time()
while (iter_num <= max_iters or eval_only) and not stop.reached(iter_num) and not problem:

    # evaluate the loss on the train and val sets, and write checkpoints
    if iter_num % eval_interval == 0 or eval_only:
        log_step()
        if problem:
            break
        jax.block_until_ready(state)
        train_time += time.time() - t0
        losses = estimate_loss(eval_step, state['params'], mesh, data_dir, eval_iters, batch_size, block_size, micro_rows,
                               progress)
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if wandb_log:
            wandb.log({
                'iter': iter_num,
                'train/loss': losses['train'],
                'val/loss': losses['val'],
                'lr': float(schedule(iter_num)),
                'mfu': running_mfu * 100, # in percent
                **last_step,
            })
        if eval_only:
            break
        if metrics_file:
            metrics_file.write(iter=iter_num, tokens=iter_num * tokens_per_iter, train_loss=losses['train'],
                               val_loss=losses['val'], lr=float(schedule(iter_num)))
        if iter_num > start_iter: # as fast as so far, evaluations included
            left = time_left((time.time() - start_time) / (iter_num - start_iter) * (max_iters + 1 - iter_num))
            if left:
                print(left)
        problem = find_non_finite(iter_num, {'validation loss': losses['val']})
        if problem:
            break
        improved = losses['val'] < best_val_loss
        if improved or always_save_checkpoint:
            best_val_loss = min(losses['val'], best_val_loss)
            if init_from == 'resume' and iter_num == start_iter: # the checkpoint is there, maybe without this loss
                checkpoints.evaluated(iter_num, losses['val'])
            elif iter_num > 0:
                print(f'saving checkpoint to {out_dir}')
                checkpoints.save(state, iter_num, best_val_loss, model_args, config, chars, losses['val'])
        t0 = time.time()

    # one optimizer step; while the devices compute it, the host prepares the next batch and logs the step before
    state, metrics = train_step(state, *batch, np.int32(iter_num))
    batch = get_step_batch(iter_num + 1)
    log_step()
    if iter_num % log_interval == 0:
        pending = iter_num, metrics
    iter_num += 1
if not problem:
    log_step()

# the last iteration is kept too, and saving in the background is waited for
if not eval_only:
    if iter_num > start_iter and not problem:
        problem = find_non_finite(iter_num, {'norm of the weights': jax.jit(optax.tree.norm)(state['params'])})
    if iter_num > start_iter and not problem:
        checkpoints.save(state, iter_num, best_val_loss, model_args, config, chars)
    checkpoints.close()
    if problem:
        raise UserError(f'{problem}; {checkpoints.what_is_whole()}. Try a smaller --learning_rate, a larger --warmup_iters, '
                        'a --grad_clip of 1.0, or --dtype=float32')
    if stop.signum and checkpoints.steps():
        print(f'stopped by {stop.signum.name} before iteration {iter_num}; '
              f'go on with: python train_jax.py --init_from=resume --out_dir={out_dir}')
    print(f'training waited {checkpoints.blocked:.2f} s for {checkpoints.saves} checkpoints')
sys.exit(stop.exit_code)
