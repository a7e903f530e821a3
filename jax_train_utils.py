"""
The parts of a training run: learning rate and optimizer, batches, the training state, the jitted
steps, and the settings that a resumed run takes over. No function here reads a global setting.
"""

import math
import os
import sys
import time
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_transformer import GPT, GPT_ARGS, GPTConfig, training_loss
from nanogpt_jax import run_dir
from nanogpt_jax.checkpoint import Checkpoints as Checkpoints  # re-exported
from nanogpt_jax.devices import on_host
from nanogpt_jax.errors import (
    UserError, check_memory, optional_import, report_user_error,
)
from nanogpt_jax.sharding import (
    batch_sharding, cast_kernels, gather_params, make_mesh, partition_specs, scan_blocks,
    pop_blocks, shard_batch, shardings, stack_blocks, unstack_blocks,
)
from nanogpt_jax.tokenizer import bytes_of_tokens, read_tokenizer

# -----------------------------------------------------------------------------
# learning rate and optimizer

def create_learning_rate_schedule(learning_rate, warmup_iters, lr_decay_iters, min_lr,
                                  decay_lr=True):
    """nanoGPT's get_lr as a callable: iteration to learning rate.

    Linear warmup, cosine decay to min_lr at lr_decay_iters, then constant; constant throughout if
    decay_lr is False. float64 for a Python int, float32 for a traced iteration.
    """
    def schedule(it):
        if not decay_lr:
            return learning_rate
        xp = jnp if isinstance(it, jax.Array) else np
        warmup = learning_rate * (it + 1) / (warmup_iters + 1)
        ratio = xp.clip((it - warmup_iters) / max(1, lr_decay_iters - warmup_iters), 0, 1)
        coeff = 0.5 * (1 + xp.cos(math.pi * ratio))  # from 1 to 0
        decayed = min_lr + coeff * (learning_rate - min_lr)
        decayed = xp.where(it > lr_decay_iters, min_lr, decayed)
        return xp.where(it < warmup_iters, warmup, decayed)
    return schedule


def decay_mask(params):
    """True for tensors of two or more dimensions, which alone decay, as in nanoGPT."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def decay_groups(params):
    """(tensors with weight decay, tensors without), as lists."""
    tensors = list(zip(jax.tree.leaves(params), jax.tree.leaves(decay_mask(params))))
    return [p for p, decayed in tensors if decayed], [p for p, decayed in tensors if not decayed]


def create_optimizer(schedule, weight_decay, betas, grad_clip):
    """torch's clip_grad_norm_ and AdamW with nanoGPT's two parameter groups, in optax.

    schedule: iteration to learning rate. grad_clip: maximum global norm of the gradient; 0 disables
    clipping.
    """
    return optax.chain(
        optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
        optax.adamw(schedule, b1=betas[0], b2=betas[1], eps=1e-8, weight_decay=weight_decay,
                    mask=decay_mask),
    )


# -----------------------------------------------------------------------------
# data: raw uint16 token ids in data/<dataset>/train.bin and val.bin, or in a bucket

TRAIN, EVAL = 0, 1  # random streams


def batch_offsets(n, n_offsets, seed, iter_num, stream):
    """n random offsets below n_offsets, int64: a function of (seed, iter_num, stream) only."""
    # a counter-based generator has no state, so a resumed run draws the offsets of an uninterrupted
    # one. It is NumPy's because OpenWebText's offsets do not fit jax.random's int32
    bits = np.random.Philox(key=[seed, stream], counter=[0, 0, 0, iter_num])
    return np.random.Generator(bits).integers(n_offsets, size=n)


def count_tokens(data_dir, split, block_size):
    """Number of tokens in a split. Raises UserError if it is too short for a batch."""
    path = run_dir.join(data_dir, f'{split}.bin')
    size = run_dir.file_size(path)
    if size is None and run_dir.is_remote(path):
        raise UserError(f'{path} does not exist: prepare the data on some machine, and copy its '
                        f'files to {data_dir}')
    if size is None and not os.path.isdir(data_dir):
        raise UserError(f'there is no folder {os.path.abspath(data_dir)}: choose another '
                        '--dataset, or start the script in the folder that has data/')
    if size is None:
        hint = '. That is large; for a first run see config/train_pydoc.py'
        raise UserError(f'{path} does not exist: prepare the data first, with python '
                        + os.path.join(data_dir, 'prepare.py')
                        + (hint if data_dir.endswith('openwebtext') else ''))
    if size % 2:
        raise UserError(f'{path} has {size} bytes, but token ids have two bytes each: prepare the '
                        'data again')
    if size // 2 < block_size + 1:
        raise UserError(f'{path} has {size // 2} tokens, but needs block_size + 1 = '
                        f'{block_size + 1}: use a longer text, or a smaller --block_size')
    return size // 2


class Batches:
    """Batches of a data set on the devices of a layout: int32 x and y, y one token ahead of x.

    vocab_size: the model's; every id must be below it. seed: for the training batches. An
    evaluation draws eval_iters batches of batch_size sequences. Each process reads only the
    sequences of its own devices. Methods raise UserError if a file cannot be used.
    """

    def __init__(self, layout, data_dir, block_size, vocab_size, seed, eval_iters, batch_size):
        self.layout, self.data_dir, self.block_size = layout, data_dir, block_size
        self.vocab_size, self.seed = vocab_size, seed
        self.eval_iters, self.batch_size = eval_iters, batch_size
        self.n_offsets, self.versions = {}, {}

    def train(self, iter_num):
        """x, y of an optimizer step, (micro_steps, B, block_size), B split over the devices."""
        n, micro_steps = self.layout.global_batch_size, self.layout.micro_steps
        offsets = batch_offsets(n, self._n_offsets('train'), self.seed, iter_num, TRAIN)
        return self._load('train', offsets.reshape(micro_steps, -1))

    def evaluation(self, split):
        """Yield x, y (B, block_size), the same in every run. Targets of padding are -1."""
        self._warn_if_changed(split)
        offsets = self._evaluation_offsets(split)
        n_devices = self.layout.mesh.size
        largest = n_devices * self.layout.micro_batch_size
        B = min(largest, math.ceil(len(offsets) / n_devices) * n_devices)
        padding = -len(offsets) % B
        for part in np.pad(offsets, (0, padding), constant_values=-1).reshape(-1, B):
            yield self._load(split, part)

    def bytes_per_token(self, split, vocabulary):
        """Mean number of bytes of text in a target of evaluation(split). Raises UserError if the
        vocabulary has no text for one."""
        n_bytes = np.array(bytes_of_tokens(vocabulary))
        targets = self._read(split, self._evaluation_offsets(split))[:, 1:]
        if (largest := targets.max()) >= len(n_bytes):
            raise UserError(f'the vocabulary has no text for the token id {largest}')
        return float(n_bytes[targets].mean())

    def _evaluation_offsets(self, split):
        return np.concatenate([
            batch_offsets(self.batch_size, self._n_offsets(split), 0, k, EVAL)
            for k in range(self.eval_iters)])

    def _path(self, split):
        return run_dir.join(self.data_dir, f'{split}.bin')

    def _n_offsets(self, split):
        if split not in self.n_offsets:
            n_tokens = count_tokens(self.data_dir, split, self.block_size)
            self.versions[split] = run_dir.file_version(self._path(split))
            self.n_offsets[split] = n_tokens - self.block_size
        return self.n_offsets[split]

    def _warn_if_changed(self, split):
        self._n_offsets(split)
        version = run_dir.file_version(self._path(split))
        if version != self.versions[split]:
            print(f'WARNING: {self._path(split)} has changed since this run started; '
                  'its batches differ from those of an uninterrupted run')
            self.versions[split] = version

    def _read(self, split, offsets):
        """The block_size + 1 tokens at each offset: offsets (n,) to int32 (n, block_size + 1)."""
        path, n_bytes = self._path(split), 2 * (self.block_size + 1)
        try:
            # in one call, since bucket reads are slow but concurrent
            data = run_dir.read_ranges(path, [2 * int(i) for i in offsets], n_bytes)
        except OSError as e:
            raise UserError(f'cannot read {path}: {e.strerror or e}') from e
        if len(data) < n_bytes * len(offsets):
            raise UserError(f'{path} has become shorter since this run started; restore it, and '
                            'resume the run')
        tokens = np.frombuffer(data, np.uint16).reshape(len(offsets), -1)
        # jax's gather returns nan for such an id
        if (largest := tokens.max(initial=0)) >= self.vocab_size:
            raise UserError(f"{path} has the token id {largest}, but the model's vocabulary ends "
                            f'at {self.vocab_size - 1}: prepare the data again, or train a model '
                            "with the data's vocabulary")
        return tokens.astype(np.int32)

    def _load(self, split, offsets):
        """x, y on the devices for offsets (..., B); a negative offset means padding."""
        tokens = np.zeros((*offsets.shape, self.block_size + 1), np.int32)
        sharding = batch_sharding(self.layout.mesh, tokens.ndim)  # splits B, so it fits offsets
        own = np.zeros(offsets.shape, bool)
        for index in sharding.addressable_devices_indices_map(offsets.shape).values():
            own[index] = True
        tokens[own] = self._read(split, offsets[own].clip(0))
        x, y = tokens[..., :-1], np.where(offsets[..., None] < 0, -1, tokens[..., 1:])
        return shard_batch(self.layout.mesh, x, y)


# -----------------------------------------------------------------------------
# the model and the training state

class SplitModel(NamedTuple):
    """A model without its weights, as the jitted steps take it."""
    model: GPT  # shapes only
    train_graphdef: nnx.GraphDef
    eval_graphdef: nnx.GraphDef  # without dropout


def split_model(config):
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    model.eval()
    eval_graphdef = nnx.split(model, nnx.Param)[0]
    model.train()
    return SplitModel(model, nnx.split(model, nnx.Param)[0], eval_graphdef)


def _train_state(params, tx):
    # jit dispatches plain dicts fastest. Every dtype has the loss scale, so that a run can resume
    # in another one. 65536 is GradScaler's initial scale
    loss_scale = {'scale': jnp.float32(65536), 'good_steps': jnp.int32(0)}
    return {'params': params, 'opt_state': tx.init(params), 'loss_scale': loss_scale}


def create_train_state(model, tx, mesh=None):
    """The training state {'params', 'opt_state', 'loss_scale'} of a model with its weights.

    mesh: shard the state over these devices; otherwise it stays where the weights are.
    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if mesh is None:
        return _train_state(params, tx)
    params = jax.tree.map(
        lambda p, s: jax.make_array_from_callback(p.shape, s, np.asarray(p).__getitem__),
        params, shardings(params, mesh))
    create = partial(_train_state, tx=tx)
    out_shardings = shardings(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=out_shardings, donate_argnums=0)(params)


def check_model_memory(config, mesh, what, bytes_per_weight):
    """Raise UserError if a model does not fit into this machine's memory. For CPUs only."""
    if mesh.devices.flat[0].platform == 'cpu':  # other devices fail at once
        n_params = config.n_embd * (config.vocab_size + config.block_size
                                    + 12 * config.n_layer * config.n_embd)  # without biases
        check_memory(bytes_per_weight * n_params / mesh.shape['fsdp'], what,
                     'lower n_layer, n_embd, vocab_size or block_size')


def init_train_state(config, tx, seed, mesh):
    """The training state of a new model, initialized on the mesh's devices."""
    check_model_memory(config, mesh, 'the weights and their two moments of AdamW', 12)

    def init():
        return create_train_state(GPT(config, rngs=nnx.Rngs(seed)), tx)
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh))()


def abstract_train_state(config, tx, mesh=None):
    """A training state as a tree of jax.ShapeDtypeStruct, with shardings if mesh is given."""
    def init():
        return create_train_state(GPT(config, rngs=nnx.Rngs(0)), tx)
    shapes = jax.eval_shape(init)
    if mesh is None:
        return shapes
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        shapes, shardings(shapes, mesh))


def load_pretrained(model_type_or_path, tx, mesh, block_size, dropout):
    """(training state on the mesh's devices, GPTConfig) from GPT-2's weights."""
    with on_host():  # in full; each device then gets its shards
        model = GPT.from_pretrained(model_type_or_path, dict(dropout=dropout))
        model.crop_block_size(block_size)
    return create_train_state(model, tx, mesh), model.config


class LoadedModel(NamedTuple):
    """A model in evaluation mode, from load_model."""
    model: GPT
    vocabulary: Any  # of nanogpt_jax/tokenizer.py
    step: int | None  # of the checkpoint; None for pretrained weights


def load_model(init_from, out_dir, checkpoint, mesh, dtype):
    """Load a checkpoint in out_dir if init_from is 'resume', else GPT-2's weights, as a LoadedModel
    that computes in dtype on the mesh's devices."""
    if init_from != 'resume':
        model = GPT.from_pretrained(init_from, dict(dropout=0.0), dtype=dtype)
        replicated = NamedSharding(mesh, PartitionSpec())
        nnx.update(model, jax.device_put(nnx.state(model, nnx.Param), replicated))
        model.eval()
        path = os.path.join(init_from, 'tokenizer.json')
        return LoadedModel(model, read_tokenizer(path) if os.path.exists(path) else None, None)

    def abstract_params(meta):
        config = GPTConfig.from_model_args(meta['model_args'])
        return {'params': abstract_train_state(config, optax.identity(), mesh)['params']}
    step, meta, state = Checkpoints(out_dir, read_only=True).load(checkpoint, abstract_params)
    config = GPTConfig.from_model_args(meta['model_args'], dtype=dtype)
    model = nnx.merge(split_model(config).eval_graphdef, state['params'])
    return LoadedModel(model, meta['chars'], step)


# -----------------------------------------------------------------------------
# float16

def update_loss_scale(loss_scale, finite):
    """GradScaler's rule: halve the scale after an overflow, double it after 2000 good steps."""
    good_steps = jnp.where(finite, loss_scale['good_steps'] + 1, 0)
    grow = good_steps == 2000
    factor = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    return {'scale': loss_scale['scale'] * factor, 'good_steps': jnp.where(grow, 0, good_steps)}


def skip_on_overflow(finite, new, old):
    """Keep the old optimizer state after an overflow; only the schedule's step count advances."""
    def choose(new, old):
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    return jax.tree.map(choose, new, old,
                        is_leaf=lambda s: isinstance(s, optax.ScaleByScheduleState))


# -----------------------------------------------------------------------------
# the jitted steps

def sharded_model(graphdef, params, specs):
    """(params, specs, make_model) from one device's shards of the parameters.

    The returned params and specs have their blocks stacked. make_model(params): the model as a
    function. It gathers embeddings once for the whole pass, and blocks one at a time.
    """
    dtype = nnx.merge(graphdef, params).config.dtype
    params, specs = stack_blocks(params, specs)  # once per step: a copy of this device's shards
    cast = cast_kernels(params, dtype)

    def make_model(params):
        model = nnx.merge(graphdef, unstack_blocks(params))
        (own, own_h), (own_cast, cast_h), (spec, spec_h) = map(pop_blocks, (params, cast, specs))
        nnx.update(model, gather_params(own, own_cast, spec))
        return partial(model, run_blocks=partial(
            scan_blocks, stacked=(own_h, cast_h),
            gather=lambda shards: gather_params(*shards, spec_h)))
    return params, specs, make_model


def add_grads(sums, loss_fn, params, in_loop):
    """sums, (gradients, loss), plus those of loss_fn(params) -> (scaled loss, loss).

    in_loop: the loop over the blocks adds their gradients to the sums itself. To return them all
    would take one more float32 copy of the blocks' shards.
    """
    _, backward, loss = jax.vjp(loss_fn, params, has_aux=True)
    if not in_loop:
        return jax.tree.map(jnp.add, sums, (*backward(jnp.float32(1)), loss))
    refs = jax.tree.map(jax.new_ref, sums[0])
    backward.with_refs(refs)(jnp.float32(1))
    return jax.tree.map(jax.freeze, refs), sums[1] + loss


def make_grad_fn(graphdef, mesh):
    """grad_fn(params, x, y, key, scale) -> (grads, loss): means over all micro-batches and devices.

    x, y: int (micro_steps, B, T). grads are float32 and `scale` times the gradient. For one device
    and one micro-batch, see lesson 2 of TORCH_TO_JAX_MAPPING.md.
    """
    sharded = mesh.shape['fsdp'] > 1

    def accumulate(params, x, y, key, scale, specs):
        """The computation of one device, from its sequences and its shards of params."""
        micro_steps = x.shape[0]
        key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names))
        make_model = partial(nnx.merge, graphdef)
        if sharded:
            params, specs, make_model = sharded_model(graphdef, params, specs)

        def loss_fn(params, x, y, key):
            model = make_model(params)
            loss = training_loss(model, x, y, nnx.Rngs(dropout=key))
            return loss * scale, loss

        def micro_step(sums, batch):
            i, x, y = batch
            micro_loss = partial(loss_fn, x=x, y=y, key=jax.random.fold_in(key, i))
            return add_grads(sums, micro_loss, params, in_loop=sharded), None

        zeros = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        sums, _ = jax.lax.scan(micro_step, zeros, (jnp.arange(micro_steps), x, y))

        def mean(total, spec):
            # one all-reduce per step, over data and, for replicated arrays, over fsdp;
            # all_gather_param's gradient has summed sharded ones over fsdp already
            axes = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in spec)
            return jax.lax.psum(total, axes) / (micro_steps * mesh.size)
        grads, loss = jax.tree.map(mean, sums, (specs, PartitionSpec()))
        return unstack_blocks(grads) if sharded else grads, loss

    def grad_fn(params, x, y, key, scale):
        specs, batch = partition_specs(params, mesh), batch_sharding(mesh, 3).spec
        replicated = PartitionSpec()
        # in a shard_map nothing moves between devices except by the collectives written above
        return jax.shard_map(partial(accumulate, specs=specs), mesh=mesh, check_vma=False,
                             in_specs=(specs, batch, batch, replicated, replicated),
                             out_specs=(specs, replicated))(params, x, y, key, scale)
    return grad_fn


def make_train_step(graphdef, tx, seed, mesh=None, scale_loss=False):
    """The jitted train_step(state, x, y, iter_num) -> (state, metrics), one optimizer step.

    x, y: int (micro_steps, B, T), B split over the devices of mesh (None: the first device).
    Donates the state: do not use the old one. metrics: float32 scalars loss (the mean), grad_norm
    (before clipping) and, with scale_loss, loss_scale. scale_loss: dynamic loss scaling, for
    float16: a step whose gradient overflows changes no weight.
    """
    mesh = mesh or make_mesh(jax.devices()[:1])
    grad_fn = make_grad_fn(graphdef, mesh)

    def train_step(state, x, y, iter_num):
        params = state['params']
        key = jax.random.fold_in(jax.random.key(seed), iter_num)
        scale = state['loss_scale']['scale'] if scale_loss else jnp.float32(1)
        grads, loss = grad_fn(params, x, y, key, scale)
        grads = jax.tree.map(lambda g: g / scale, grads)
        metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads)}

        with jax.named_scope('optimizer'):
            updates, opt_state = tx.update(grads, state['opt_state'], params)
            new = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state,
                   'loss_scale': state['loss_scale']}
        if scale_loss:
            finite = jnp.isfinite(metrics['grad_norm'])
            metrics['loss_scale'] = scale
            new['params'] = jax.tree.map(lambda n, o: jnp.where(finite, n, o),
                                         new['params'], params)
            new['opt_state'] = skip_on_overflow(finite, opt_state, state['opt_state'])
            new['loss_scale'] = update_loss_scale(state['loss_scale'], finite)
        return jax.lax.with_sharding_constraint(new, shardings(new, mesh)), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(graphdef, mesh=None):
    """The jitted eval_step(params, x, y) -> (loss, count) of one batch, without dropout.

    x, y: int (B, T), B split over the devices of mesh (None: the first device). loss: float32, the
    mean over the targets that are not -1; count: int, their number.
    """
    mesh = mesh or make_mesh(jax.devices()[:1])
    sharded = mesh.shape['fsdp'] > 1

    def batch_loss(params, x, y, specs):
        """The computation of one device, from its sequences and its shards of params."""
        make_model = partial(nnx.merge, graphdef)
        if sharded:
            params, specs, make_model = sharded_model(graphdef, params, specs)
        count = (y != -1).sum()
        _, loss = make_model(params)(x, y)
        total, count = jax.lax.psum((jnp.where(count > 0, loss * count, 0), count), mesh.axis_names)
        return total / count, count

    @jax.jit
    def eval_step(params, x, y):
        specs, batch = partition_specs(params, mesh), batch_sharding(mesh, 2).spec
        return jax.shard_map(partial(batch_loss, specs=specs), mesh=mesh, check_vma=False,
                             in_specs=(specs, batch, batch),
                             out_specs=PartitionSpec())(params, x, y)
    return eval_step


def estimate_loss(eval_step, params, batches, stop=None):
    """{'train': loss, 'val': loss}: means over the fixed evaluation batches of a Batches.

    stop: a StopRequest; None is returned once it is reached.
    """
    losses = {}
    for split in ('train', 'val'):
        results = []
        for x, y in progress(batches.evaluation(split), f'evaluating {split}'):
            if stop and stop.reached():
                return None
            # one at a time, see checksums_of; the next batch is read meanwhile
            jax.block_until_ready(results[-1:])
            results.append(eval_step(params, x, y))
        means, counts = np.array(jax.device_get(results), np.float64).T
        losses[split] = float(np.average(means, weights=counts))
    return losses


# -----------------------------------------------------------------------------
# settings, and what a resumed run takes from its checkpoint

def check_settings(config):
    """Raise UserError for a number in config that no run can use."""
    counts = ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps',
              'batch_size', 'fsdp')
    ranges = dict.fromkeys(counts, (1, math.inf))
    # array indices are int32, and each layer is compiled separately
    ranges |= dict.fromkeys(('block_size', 'n_head', 'n_embd'), (1, 2 ** 31)) | dict(
        n_layer=(1, 10 ** 4), vocab_size=(0, 2 ** 31), max_new_tokens=(0, 2 ** 31))
    # the devices count iterations in int32
    ranges |= dict.fromkeys(('max_iters', 'warmup_iters', 'lr_decay_iters'), (0, 2 ** 31))
    ranges |= dict.fromkeys(('learning_rate', 'min_lr', 'weight_decay', 'grad_clip'),
                            (0, math.inf))
    ranges |= dict(beta1=(0, 1), beta2=(0, 1), seed=(0, 2 ** 32))
    for name, (least, end) in ranges.items():
        if name in config and not least <= config[name] < end:
            below = '' if end == math.inf else f' and below {end}'
            raise UserError(f'{name} is {config[name]}; it must be at least {least}{below}')
    for name in ('gradient_accumulation_steps', 'eval_iters'):  # sequences that are read at once
        if name in config:
            factors = config[name], config['batch_size'], config['block_size']
            check_memory(8 * math.prod(factors), f'the token ids of {name} * batch_size * '
                         f'block_size = {" * ".join(map(str, factors))}', 'lower one of them')


def check_same_settings(configs):
    """Raise UserError if the processes of a run have different settings. configs: one of each."""
    for name, value in configs[0].items():
        # processes may differ in their device and in their path to the shared folder
        if name not in ('device', 'out_dir'):
            for index, config in enumerate(configs):
                if config[name] != value:
                    raise UserError(f'{name} is {value!r} in process 0 and {config[name]!r} in '
                                    f'process {index}: start all processes with the same settings')


def check_finite(iter_num, numbers, checkpoints):
    """Raise UserError if one of these named scalars is not finite; waits for the device.

    checkpoints: the error names the one to resume from. In float16 an overflow only skips the step,
    until the loss scale drops below 1.
    """
    if float(numbers.get('loss_scale', 0)) >= 1:
        return
    wrong = [f'{name} is {float(x)}' for name, x in numbers.items() if not math.isfinite(x)]
    if wrong:
        raise UserError(
            f'{" and ".join(wrong)} at iteration {iter_num}, not a finite number; '
            f'{checkpoints.describe_valid()}. Try a smaller --learning_rate, a larger '
            '--warmup_iters, a --grad_clip of 1.0, or --dtype=float32')


def crop_state(state, block_size, mesh):
    """GPT.crop_block_size for a training state: the position embeddings and their moments."""
    def crop_leaf(path, leaf):
        is_wpe = any(getattr(k, 'key', None) == 'wpe' for k in path)
        return leaf[:block_size] if is_wpe else leaf

    def crop(state):
        return jax.tree_util.tree_map_with_path(crop_leaf, state)
    return jax.jit(crop, out_shardings=shardings(jax.eval_shape(crop, state), mesh))(state)


# always taken from the checkpoint, since its weights have this shape; block_size can be cropped
MODEL_SHAPE = set(GPT_ARGS) - {'block_size', 'dropout'}
# never taken from the checkpoint: they belong to the command and the machine
NOT_RESUMED = ('init_from', 'out_dir', 'eval_only', 'device', 'attention', 'compilation_cache',
               'fsdp', 'heartbeat_timeout')


def merge_resumed_config(config, given, saved):
    """(config of a resumed run, its differences from the saved one as text).

    config: this command's settings. given: the names that the user set. saved: the checkpoint's
    config. Given settings win, except for the model's shape; the others come from the checkpoint.
    Raises UserError if block_size is larger than the checkpoint's.
    """
    merged, differs = dict(config), []
    for name in (k for k in saved if k in config and k not in NOT_RESUMED):
        if name in MODEL_SHAPE or name not in given:
            merged[name] = saved[name]
        if name in given and config[name] != saved[name]:
            result = (' (kept: the checkpoint has this model)' if name in MODEL_SHAPE else
                      f' -> {config[name]}')
            differs.append(f'{name} {saved[name]}{result}')
    # settings of other code, such as a fork
    differs += [f'{name} {saved[name]} (not a setting of this train_jax.py)'
                for name in sorted(saved.keys() - config.keys() - {'wandb_run_id'})]
    if merged['block_size'] > saved['block_size']:
        raise UserError(f'block_size={merged["block_size"]} is larger than the checkpoint\'s '
                        f'{saved["block_size"]}; give a smaller one, or no config file: a resumed '
                        'run takes its settings from the checkpoint')
    return merged, ', '.join(differs)


# -----------------------------------------------------------------------------
# Weights & Biases, and a terminal

def start_wandb(project, name, config, run_id):
    """Start a wandb run, or continue run_id if it is not None. Raises UserError without a login."""
    wandb = optional_import('wandb')
    try:
        run = wandb.init(project=project, name=name, config=config, id=run_id, resume='allow')
    except wandb.errors.Error as e:
        raise UserError(f'Weights & Biases cannot be used ({e}): run `wandb login`, or set '
                        'WANDB_MODE=offline to keep the log here, or give --wandb_log=False'
                        ) from e
    finally:
        sys.excepthook = report_user_error  # wandb replaces it
    return run


def progress(items, description):
    """The items, with a progress bar on a terminal if they take more than three seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, description, unit=' batches', delay=3, leave=False,
                disable=not sys.stdout.isatty())


def print_time_left(seconds):
    """On a terminal, print how long a run still takes and when it will be done."""
    if sys.stdout.isatty() and round(seconds) > 0:
        at = time.strftime('%a %H:%M', time.localtime(time.time() + seconds))
        print(f'{timedelta(seconds=round(seconds))} left, done at about {at}')
