"""
The parts of a training run: learning rate and optimizer, batches, the training state, the jitted
steps, and what a resumed run takes from its checkpoint. Functions with explicit arguments; none
reads a global setting.
"""

import math
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from jax_transformer import GPT, training_loss
from nanogpt_jax import run_dir
# handed on, so that a script gets optimizer, schedule, batches and checkpoints from one file
from nanogpt_jax.checkpoint import Checkpoints as Checkpoints
from nanogpt_jax.checkpoint import steps_on_disk as steps_on_disk
from nanogpt_jax.devices import on_host
from nanogpt_jax.errors import UserError, check_memory
from nanogpt_jax.sharding import (
    batch_sharding, cast_kernels, gather_params, make_mesh, partition_specs, scan_blocks,
    shard_batch, shardings, stack_blocks, unstack_blocks,
)

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
    """True for the tensors with weight decay: those of two or more dimensions, as in nanoGPT."""
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

TRAIN, EVAL = 0, 1  # purposes that batches are drawn for
ALL_IDS = 2 ** 16  # a vocabulary that has every uint16
TOKENS_AT_START = 2 ** 24  # of each split, 32 MB: checked before anything is computed


def batch_offsets(n, n_offsets, seed, iter_num, purpose):
    """n random offsets below n_offsets, int64: a function of (seed, iter_num, purpose) only."""
    # a counter-based generator has no state, so a resumed run draws the same offsets as an
    # uninterrupted one. NumPy's, since OpenWebText's offsets do not fit jax.random's int32
    bits = np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, iter_num])
    return np.random.Generator(bits).integers(n_offsets, size=n)


def count_tokens(data_dir, split, block_size):
    """Number of tokens in a split. Raises UserError if no batch can be drawn from it."""
    path = run_dir.join(data_dir, f'{split}.bin')
    size = run_dir.file_size(path)
    script = os.path.join(data_dir, 'prepare.py')
    if size is None and run_dir.is_remote(path):
        raise UserError(f'{path} does not exist: prepare the data on some machine, and copy its '
                        f'files to {data_dir}')
    if size is None and os.path.exists(path):
        raise UserError(f'{path} is no file: remove it, and prepare the data with python {script}')
    if size is None:
        hint = '. That is large; for a first run see config/train_pydoc_char.py'
        raise UserError(f'{path} does not exist: prepare the data first, with python {script}'
                        + (hint if data_dir.endswith('openwebtext') else ''))
    if size % 2 or size // 2 < block_size + 1:
        raise UserError(f'{path} has {size} bytes; it must have token ids of two bytes each, at '
                        f'least block_size + 1 = {block_size + 1}')
    return size // 2


def check_tokens(data_dir, vocab_size, splits=('train', 'val')):
    """Raise UserError if a split's first TOKENS_AT_START ids are not all below vocab_size.

    In a larger file the others are checked as they are read, by read_sequences.
    """
    for split in splits:
        path = run_dir.join(data_dir, f'{split}.bin')
        try:
            if run_dir.is_remote(path):
                data = run_dir.read_ranges(path, [0], 2 * TOKENS_AT_START)
                tokens = np.frombuffer(data, np.uint16)
            else:
                tokens = np.fromfile(path, np.uint16, count=TOKENS_AT_START)
            check_ids(path, tokens, vocab_size)
        except OSError as e:
            raise UserError(f'cannot read {path} ({e.strerror or e})') from e


def check_ids(path, tokens, vocab_size):
    """Raise UserError if a token id of a file is outside the model's vocabulary."""
    # JAX would take the embedding of another id for it, without an error
    if (largest := tokens.max(initial=0)) >= vocab_size:
        raise UserError(f"{path} has the token id {largest}, but the model's vocabulary ends at "
                        f"{vocab_size - 1}: prepare the data again, or train a model with the "
                        "data's vocabulary")


def read_sequences(data_dir, split, offsets, block_size, vocab_size=ALL_IDS):
    """The block_size + 1 tokens that start at each offset (n,): int32 (n, block_size + 1).

    Raises UserError for an id that is not below vocab_size.
    """
    path = run_dir.join(data_dir, f'{split}.bin')
    starts = [2 * int(offset) for offset in offsets]
    tokens = np.frombuffer(run_dir.read_ranges(path, starts, 2 * (block_size + 1)), np.uint16)
    check_ids(path, tokens, vocab_size)
    return tokens.reshape(len(offsets), block_size + 1).astype(np.int32)


def load_batch(mesh, data_dir, split, offsets, block_size, vocab_size=ALL_IDS):
    """x, y on the mesh's devices for offsets (n, B): int32 (n, B, block_size), y one token ahead.

    A negative offset stands for padding: a sequence whose targets are all -1. Each process reads
    the sequences of its own devices only. Raises UserError for an id that is not below vocab_size.
    """
    tokens = np.zeros((*offsets.shape, block_size + 1), np.int32)
    sharding = batch_sharding(mesh, tokens.ndim)  # splits B, so it fits offsets too
    own = np.zeros(offsets.shape, bool)
    for index in sharding.addressable_devices_indices_map(offsets.shape).values():
        own[index] = True
    # in one call, since a bucket takes long to answer, but can answer many at the same time
    tokens[own] = read_sequences(data_dir, split, offsets[own].clip(0), block_size, vocab_size)
    x, y = tokens[..., :-1], np.where(offsets[..., None] < 0, -1, tokens[..., 1:])
    return shard_batch(mesh, x, y)


def get_train_batch(mesh, data_dir, global_batch_size, grad_accum_steps, block_size, seed,
                    iter_num, vocab_size=ALL_IDS):
    """x, y of an optimizer step on the mesh's devices: int32 (grad_accum_steps, B, block_size)."""
    n_offsets = count_tokens(data_dir, 'train', block_size) - block_size
    offsets = batch_offsets(global_batch_size, n_offsets, seed, iter_num, TRAIN)
    return load_batch(mesh, data_dir, 'train', offsets.reshape(grad_accum_steps, -1), block_size,
                      vocab_size)


# -----------------------------------------------------------------------------
# the model and the training state

def split_model(config):
    """(model without weights, graphdef in training mode, graphdef in evaluation mode)."""
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    model.eval()
    eval_graphdef = nnx.split(model, nnx.Param)[0]
    model.train()
    return model, nnx.split(model, nnx.Param)[0], eval_graphdef


def _train_state(params, tx):
    # plain dicts, which jit dispatches fastest. The loss scale is there for every dtype, so that a
    # run can be resumed in another one; GradScaler's initial scale
    loss_scale = {'scale': jnp.float32(65536), 'good_steps': jnp.int32(0)}
    return {'params': params, 'opt_state': tx.init(params), 'loss_scale': loss_scale}


def create_train_state(model, tx, mesh=None):
    """The training state {'params', 'opt_state', 'loss_scale'} of a model that has weights.

    mesh: place it on these devices, sharded; otherwise it stays where the weights are.
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
    """Raise UserError if a model does not fit into the memory of a CPU's machine."""
    if mesh.devices.flat[0].platform == 'cpu':  # other devices refuse at once what they cannot hold
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
        own, own_cast, spec = (tree['transformer'] for tree in (params, cast, specs))
        nnx.update(model.transformer, {name: gather_params(own[name], own_cast[name], spec[name])
                                       for name in own if name != 'h'})
        return partial(model, run_blocks=partial(
            scan_blocks, stacked=(own['h'], own_cast['h']),
            gather=lambda shards: gather_params(*shards, spec['h'])))
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

    x, y: int (grad_accum_steps, B, T). grads are float32 and `scale` times the gradient.
    """
    sharded = mesh.shape['fsdp'] > 1

    def accumulate(params, x, y, key, scale, specs):
        """What each device computes, from its sequences and its shards of params."""
        grad_accum_steps = x.shape[0]
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
        sums, _ = jax.lax.scan(micro_step, zeros, (jnp.arange(grad_accum_steps), x, y))

        def mean(total, spec):
            # one all-reduce per step, over data and, for replicated arrays, over fsdp;
            # all_gather_param's gradient has summed sharded ones over fsdp already
            axes = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in spec)
            return jax.lax.psum(total, axes) / (grad_accum_steps * mesh.size)
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

    x, y: int (grad_accum_steps, B, T), B split over the devices of mesh (None: the first device).
    Donates the state. metrics: float32 scalars loss (the mean), grad_norm (before clipping) and,
    with scale_loss, loss_scale. scale_loss: dynamic loss scaling, for float16: a step whose
    gradient overflows changes no weight.
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
    """The jitted eval_step(params, x, y) -> (losses, counts) for n batches, without dropout.

    x, y: int (n, B, T), B split over the devices of mesh (None: the first device). losses: float32
    (n,), the mean loss of each batch; counts: int (n,), its number of targets that are not -1.
    """
    mesh = mesh or make_mesh(jax.devices()[:1])
    sharded = mesh.shape['fsdp'] > 1

    def batch_losses(params, x, y, specs):
        """What each device computes, from its sequences and its shards of params."""
        make_model = partial(nnx.merge, graphdef)
        if sharded:
            params, specs, make_model = sharded_model(graphdef, params, specs)

        def batch_loss(_, batch):
            x, y = batch
            model = make_model(params)
            count = (y != -1).sum()
            return None, (jnp.where(count > 0, model(x, y)[1] * count, 0), count)
        sums = jax.lax.scan(batch_loss, None, (x, y))[1]
        totals, counts = jax.lax.psum(sums, mesh.axis_names)
        return totals / counts, counts

    @jax.jit
    def eval_step(params, x, y):
        specs, batch = partition_specs(params, mesh), batch_sharding(mesh, 3).spec
        return jax.shard_map(partial(batch_losses, specs=specs), mesh=mesh, check_vma=False,
                             in_specs=(specs, batch, batch),
                             out_specs=PartitionSpec())(params, x, y)
    return eval_step


def n_parts(n_batches, params, tokens):
    """How many equal parts to evaluate n_batches in, of `tokens` each on a device: at least 20 if
    there are as many batches."""
    # equal, so that eval_step compiles once. A run can stop between parts, so none should take
    # longer than about a second, on a CPU too: 1e11 FLOPs, two for each parameter and token
    flops = 2 * tokens * sum(p.size for p in jax.tree.leaves(params))
    most = max(1, min(n_batches // 20, int(1e11 // flops)))
    return next(n for n in range(1, n_batches + 1)
                if n_batches % n == 0 and n_batches // n <= most)


def estimate_loss(eval_step, params, mesh, data_dir, eval_iters, batch_size, block_size,
                  micro_batch_size, progress=lambda items, *_: items, vocab_size=ALL_IDS,
                  stopped=lambda: False):
    """{'train': loss, 'val': loss}: means over eval_iters batches, the same batches in every run.

    micro_batch_size: the most sequences that a device processes at a time. progress(items,
    description, n_batches): wraps the loop over the parts of an evaluation. stopped(): asked before
    each part; None is returned once it is true. Raises UserError for an id in the data that is not
    below vocab_size.
    """
    means = {}
    for split in ('train', 'val'):
        n_offsets = count_tokens(data_dir, split, block_size) - block_size
        offsets = np.concatenate([batch_offsets(batch_size, n_offsets, 0, k, EVAL)
                                  for k in range(eval_iters)])
        # padded to batches of B sequences
        B = min(mesh.size * micro_batch_size, math.ceil(len(offsets) / mesh.size) * mesh.size)
        offsets = np.pad(offsets, (0, -len(offsets) % B), constant_values=-1).reshape(-1, B)
        results = []
        parts = np.split(offsets, n_parts(len(offsets), params, B // mesh.size * block_size))
        for part in progress(parts, f'evaluating {split}', eval_iters):
            if stopped():
                return None
            batch = load_batch(mesh, data_dir, split, part, block_size, vocab_size)
            results.append(eval_step(params, *batch))
            # the devices have the next part to compute meanwhile; more would have to end first
            # when the run is to stop
            jax.block_until_ready(results[-2:-1])
        losses, counts = map(np.concatenate, zip(*jax.device_get(results)))
        losses = losses.astype(np.float64)
        means[split] = float(np.average(losses, weights=counts))
    return means


# -----------------------------------------------------------------------------
# settings, and what a resumed run takes from its checkpoint

FLOAT32_END = 2.0 ** 128 - 2.0 ** 103  # from here on float32 rounds to inf
NEAREST_ONE = 1 - 2.0 ** -25  # and from here on to 1


def check_settings(config):
    """Raise UserError for numbers that no run can use, among the settings that config has."""
    counts = ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps',
              'batch_size', 'fsdp')
    ranges = dict.fromkeys(counts, (1, math.inf))
    # of arrays, whose indices are int32; each layer is traced and compiled by itself
    ranges |= dict.fromkeys(('block_size', 'n_head', 'n_embd'), (1, 2 ** 31)) | dict(
        n_layer=(1, 10 ** 4), vocab_size=(0, 2 ** 31), max_new_tokens=(0, 2 ** 31))
    # the devices count iterations in int32
    ranges |= dict.fromkeys(('max_iters', 'warmup_iters', 'lr_decay_iters'), (0, 2 ** 31))
    ranges |= dict.fromkeys(('learning_rate', 'min_lr', 'weight_decay', 'grad_clip'),
                            (0, FLOAT32_END))
    ranges |= dict(beta1=(0, NEAREST_ONE), beta2=(0, NEAREST_ONE), seed=(0, 2 ** 32))
    for name, (least, end) in ranges.items():
        if name in config and not least <= config[name] < end:
            below = ('' if end == math.inf else f' and below {end}' if isinstance(end, int) else
                     f' and below {end:g} in float32')
            raise UserError(f'{name} is {config[name]}; it must be at least {least}{below}')
    for name in ('gradient_accumulation_steps', 'eval_iters'):  # the sequences read at a time
        if name in config:
            factors = config[name], config['batch_size'], config['block_size']
            check_memory(8 * math.prod(factors), f'the token ids of {name} * batch_size * '
                         f'block_size = {" * ".join(map(str, factors))}', 'lower one of them')


def crop_state(state, block_size, mesh):
    """GPT.crop_block_size for a training state: the position embeddings and their moments."""
    def crop_leaf(path, leaf):
        is_wpe = any(getattr(k, 'key', None) == 'wpe' for k in path)
        return leaf[:block_size] if is_wpe else leaf

    def crop(state):
        return jax.tree_util.tree_map_with_path(crop_leaf, state)
    return jax.jit(crop, out_shardings=shardings(jax.eval_shape(crop, state), mesh))(state)


# always from the checkpoint, since its weights have this shape
MODEL_SHAPE = ('n_layer', 'n_head', 'n_embd', 'bias')
# never from the checkpoint, since they belong to the command and the machine
NOT_RESUMED = ('init_from', 'out_dir', 'eval_only', 'device', 'attention', 'compilation_cache',
               'fsdp', 'heartbeat_timeout')


def merge_resumed_config(config, given, saved):
    """(config of a resumed run, text that lists how it differs from the saved one).

    config: this command's settings. given: the names that the user set. saved: the checkpoint's
    config. Given settings have precedence, except for the model's shape; all others come from the
    checkpoint. Raises UserError if block_size is larger than the checkpoint's.
    """
    merged, differs = dict(config), []
    for name in (k for k in saved if k in config and k not in NOT_RESUMED):
        if name in MODEL_SHAPE or name not in given:
            merged[name] = saved[name]
        if name in given and config[name] != saved[name]:
            result = (' (kept: the weights have this shape)' if name in MODEL_SHAPE else
                      f' -> {config[name]}')
            differs.append(f'{name} {saved[name]}{result}')
    if merged['block_size'] > saved['block_size']:
        raise UserError(f'block_size={merged["block_size"]} is larger than the checkpoint\'s '
                        f'{saved["block_size"]}; give a smaller one, or none')
    return merged, ', '.join(differs)
