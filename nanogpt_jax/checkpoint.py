"""
Checkpoints: out_dir/<iter_num>/ with the items params, optimizer (its state and the loss scale) and
meta (JSON, with a checksum of each array), written by Orbax in the background and renamed into
place once complete (in a bucket: marked as complete). They hold arrays and JSON only, so reading
one runs no code.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import sys
import time
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from nanogpt_jax import run_dir
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import check_out_dir

# orbax warns about every save without a metric, and logs at length what it raises as well; when one
# of its reads fails, asyncio and Python complain that nobody waited for the others
for logger in ('absl', 'asyncio'):
    logging.getLogger(logger).setLevel(logging.CRITICAL)
warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)

ARRAYS = 'params', 'optimizer'  # the items with arrays
VAL_LOSS = 'val_loss.json'


class DamagedError(UserError):
    """A checkpoint cannot be read, or is not what was saved."""


# -----------------------------------------------------------------------------
# checksums

@jax.jit
def checksum(a):
    """The sum, modulo 2**32, of a hash of each word of an array and its position.

    The same however the array is sharded; each device reads its own shard only. A change of one
    word always changes it, since the hash is invertible; of other damage it misses one in 2**32,
    like a CRC.
    """
    position = jnp.uint32(0)
    for dim in range(a.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, a.shape, dim)
        position = position * jnp.uint32(0x9E3779B1) + index
    words = jax.lax.bitcast_convert_type(a, f'uint{8 * a.dtype.itemsize}').astype(jnp.uint32)
    h = words + position * jnp.uint32(0x9E3779B1)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)  # the last steps of MurmurHash3
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def checksums_of(tree):
    return [int(c) for c in jax.device_get([checksum(a) for a in jax.tree.leaves(tree)])]


def seal(values):
    """values, a dict for a JSON file, with a checksum that unseal looks at."""
    return values | {'crc32': zlib.crc32(json.dumps(values, sort_keys=True).encode())}


def unseal(values):
    values = dict(values)
    crc32 = values.pop('crc32')
    if seal(values)['crc32'] != crc32:
        raise ValueError('its JSON is changed')
    return values


def check_files(folder, item):
    """Raise ValueError if a file of an item has another SHA-256 than checksums.json says.

    Checkpoints have had that file until their arrays and their JSON got checksums of their own.
    """
    with run_dir.open_file(run_dir.join(folder, 'checksums.json')) as f:
        expected = {path: digest for path, digest in json.load(f).items()
                    if path.split(os.sep)[0] == item}
    if not expected:
        raise ValueError(f'its checksums.json names no files of {item}')
    for path, digest in expected.items():
        with open(os.path.join(folder, path), 'rb') as f:
            if hashlib.file_digest(f, 'sha256').hexdigest() != digest:
                raise ValueError(f'{path} is changed')


# -----------------------------------------------------------------------------

def hide_orbax_coroutines(unraisable):
    """sys.unraisablehook that is silent about coroutines and closed event loops.

    When one read or write of orbax's fails, those of its other threads print dozens of lines; the
    failure itself is raised.
    """
    if not (asyncio.iscoroutine(unraisable.object)
            or str(unraisable.exc_value) == 'Event loop is closed'):
        sys.__unraisablehook__(unraisable)


def steps_on_disk(out_dir):
    """The iterations that a folder has checkpoints of, ascending, valid or not."""
    if not run_dir.is_dir(out_dir):
        return []
    if run_dir.is_remote(out_dir):  # no rename is atomic there: a marker is written last
        return sorted(int(name) for name in run_dir.listdir(out_dir) if name.isdecimal()
                      and ocp.utils.is_checkpoint_finalized(run_dir.join(out_dir, name)))
    return sorted(int(e.name) for e in os.scandir(out_dir) if e.name.isdecimal() and e.is_dir())


def remove_unfinished(out_dir):
    """Delete what a killed save has left in a bucket."""
    # Orbax would take every folder without its marker for that: other data in the bucket too
    if run_dir.is_dir(out_dir):
        finished = steps_on_disk(out_dir)
        for name in run_dir.listdir(out_dir):
            if name.isdecimal() and int(name) not in finished:
                run_dir.remove_tree(run_dir.join(out_dir, name))


class Manager(ocp.CheckpointManager):

    def reached_preemption(self, step):
        # the training loop asks this itself. Orbax's background thread would ask for the step of
        # the last save, which sets JAX's step counter back; a preemption notice at that moment
        # would name a step that has passed already
        return False


class KeepLatestAndBest(PreservationPolicy):

    def __init__(self, find_best):
        self.find_best = find_best

    def should_preserve(self, checkpoints, *, context):
        keep = {max(c.step for c in checkpoints), self.find_best()}
        return [c.step in keep for c in checkpoints]


class Checkpoints:
    """The checkpoints of a run. The latest and the best are kept.

    As a context manager it waits for the save in the background at the end. read_only: for a reader
    beside a run; raises UserError if there is no checkpoint. A writer removes what a killed save
    has left.
    """

    def __init__(self, out_dir, read_only=False):
        check_out_dir(out_dir, must_exist=read_only)
        self.out_dir = out_dir
        self.blocked, self.saves = 0.0, 0  # seconds spent in save(), and number of calls
        self.val_losses = {}
        sys.unraisablehook = hide_orbax_coroutines
        remote = run_dir.is_remote(out_dir)
        if remote and not read_only and jax.process_index() == 0:
            remove_unfinished(out_dir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=KeepLatestAndBest(self.best), read_only=read_only,
            cleanup_tmp_directories=not read_only and not remote)
        # zstd takes most of a save's processor time, and makes it a few percent smaller
        registry = ocp.handlers.create_default_handler_registry(
            **{item: ocp.PyTreeCheckpointHandler(use_compression=False) for item in ARRAYS})
        try:
            with run_dir.reached(out_dir) if remote else contextlib.nullcontext():
                self.manager = Manager(run_dir.absolute(out_dir), options=options,
                                       handler_registry=registry)
            if not read_only and not remote and not os.access(out_dir, os.W_OK | os.X_OK):
                raise PermissionError('no permission')
        except OSError as e:
            raise UserError(f'cannot write to {out_dir}: {e}; choose another --out_dir') from e
        if read_only and not self.steps():
            raise UserError(f'no checkpoint in {out_dir}: train first, or give another --out_dir')
        self.val_losses = {step: self._read_val_loss(step) for step in self.steps()}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # when another process has died, waiting for it would take until the heartbeat timeout
        if kind is None or issubclass(kind, UserError) or not jax.distributed.is_initialized():
            self.close()

    def steps(self):
        return steps_on_disk(self.out_dir)

    def folder(self, step):
        return run_dir.join(self.out_dir, str(step))

    def best(self):
        """The iteration with the lowest validation loss, or None if none was evaluated."""
        evaluated = [step for step, loss in self.val_losses.items() if loss is not None]
        return min(evaluated, key=self.val_losses.get, default=None)

    # -------------------------------------------------------------------------
    # writing

    def save(self, state, iter_num, best_val_loss, model_args, config, vocabulary, val_loss=None):
        """Save what nanoGPT's checkpoints hold; waits for checksums and the copy off the device.

        vocabulary: of nanogpt_jax/tokenizer.py, saved under its old name chars. val_loss: the
        validation loss at this iteration if it was evaluated; the checkpoint can then be the best.
        Raises UserError if an earlier save has failed or a later checkpoint exists.
        """
        self.check()
        t0, self.val_losses[iter_num] = time.time(), val_loss
        arrays = split_items(state)
        meta = dict(iter_num=iter_num, best_val_loss=best_val_loss, model_args=model_args,
                    config=config, chars=vocabulary, val_loss=val_loss,
                    checksums={item: checksums_of(tree) for item, tree in arrays.items()})
        try:
            saved = self.manager.save(iter_num, args=ocp.args.Composite(
                meta=ocp.args.JsonSave(seal(meta)),
                **{item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()}))
        except Exception as e:  # errors of the file system arrive as many types
            raise self._failed(e) from e
        self.blocked, self.saves = self.blocked + time.time() - t0, self.saves + 1
        if not saved:
            raise UserError(f'{self.out_dir} already has checkpoint {self.steps()[-1]}, so '
                            f'{iter_num} was not saved: choose another --out_dir')

    def record_val_loss(self, step, val_loss):
        """Add the validation loss of a checkpoint that was saved without one."""
        self.val_losses[step] = val_loss
        if jax.process_index() == 0:
            with run_dir.open_file(run_dir.join(self.folder(step), VAL_LOSS), 'w') as f:
                json.dump(seal({'val_loss': val_loss}), f)

    def _read_val_loss(self, step):
        """The validation loss of a checkpoint, or None: not evaluated, or damaged."""
        path = run_dir.join(self.folder(step), VAL_LOSS)
        try:
            if not run_dir.exists(path):
                return self.meta(step).get('val_loss')
            with run_dir.open_file(path) as f:
                val_loss = json.load(f)
            # a bare number in checkpoints that have a checksums.json
            return val_loss if isinstance(val_loss, float) else unseal(val_loss)['val_loss']
        except Exception:  # orbax raises many types
            return None

    def check(self):
        """Raise UserError if a save in the background has failed."""
        try:
            self.manager.check_for_errors()
        except Exception as e:
            raise self._failed(e) from e

    def close(self):
        """Wait for the save in the background. Raises UserError if it fails."""
        try:
            self.manager.wait_until_finished()
            self.manager.close()
        except Exception as e:
            raise self._failed(e) from e

    def _failed(self, error):
        text = one_line(error)
        text = text if len(text) < 300 else '...' + text[-300:]  # the cause is at the end
        return UserError(f'saving to {self.out_dir} failed: {text}; {self.describe_valid()}')

    def describe_valid(self):
        """Which checkpoint a failed run can be resumed from, as text; waits for the last save."""
        with contextlib.suppress(Exception):  # check() and close() report it
            self.manager.wait_until_finished()
        try:
            return f'checkpoint {self.latest_valid_step()} is complete and can be resumed from'
        except UserError:
            return 'no checkpoint was saved yet'

    def quarantine_after(self, step):
        """Rename checkpoints after `step` to damaged-<iter_num>-<time>.

        Orbax saves none at or below an existing step.
        """
        for later in [s for s in self.val_losses if s > step]:
            if jax.process_index() == 0:
                name = f'damaged-{later}-{time.time_ns()}'
                run_dir.replace(self.folder(later), run_dir.join(self.out_dir, name))
            del self.val_losses[later]
        multihost_utils.sync_global_devices('damaged checkpoints are renamed')
        self.manager.reload()

    # -------------------------------------------------------------------------
    # reading

    def metas(self):
        """({iteration: meta}, latest first, {iteration: DamagedError} of those without)."""
        intact, damaged = {}, {}
        for step in reversed(self.steps()):
            try:
                intact[step] = self.meta(step)
            except Exception as e:  # of many types
                damaged[step] = self._damaged(step, e)
        return intact, damaged

    def latest_valid_step(self):
        """The latest iteration whose meta is intact; its arrays are checked when they are read.

        Raises UserError if there is none.
        """
        intact, damaged = self.metas()
        return next(iter(intact)) if intact else self._give_up(damaged.values())

    def candidates(self, checkpoint='auto'):
        """The iterations that 'latest', 'best', a number or 'auto' stands for, first choice first.

        auto is the best if the run saved improvements only (as nanoGPT's single file would be),
        else the latest. Warns of those whose meta is damaged. Raises UserError for a checkpoint
        that is absent.
        """
        if checkpoint in map(str, self.steps()):
            return [int(checkpoint)]
        if checkpoint not in ('auto', 'latest', 'best'):
            raise UserError(f'no checkpoint {checkpoint!r} in {self.out_dir}: give auto, latest, '
                            f'best, or one of {self.steps()}')
        best, (intact, damaged) = self.best(), self.metas()
        warn(*damaged.values())
        if checkpoint == 'best' and best is None:
            raise UserError(f'no checkpoint in {self.out_dir} has a validation loss, so none is '
                            'the best; use --checkpoint=latest')
        if checkpoint == 'best':
            return [best]
        latest = next(iter(intact.values()), None)
        if checkpoint == 'auto' and latest and not latest['config']['always_save_checkpoint']:
            return sorted(intact, key=lambda step: step != best)
        return list(intact)

    def load(self, checkpoint, abstract_of):
        """(iteration, meta, arrays) of the first of a checkpoint's candidates that is intact.

        abstract_of: from meta to a training state as a tree of jax.ShapeDtypeStruct with shardings,
        or to its params only: {'params': ...}. The number of devices that wrote it does not matter.
        Warns of damaged checkpoints. Raises UserError if none is intact.
        """
        for step in self.candidates(checkpoint):
            try:
                meta = self._read(step, self.meta)
                abstract = split_items(abstract_of(meta))
                arrays = self._read(step, self.restore, meta, abstract)
                self._compare(step, meta, arrays)
                return step, meta, {'params': arrays['params'], **arrays.get('optimizer', {})}
            except DamagedError as e:
                if checkpoint not in ('auto', 'latest'):
                    raise UserError(f'{e}; try --checkpoint=latest') from e
                warn(e)
        self._give_up()

    def _give_up(self, damaged=()):
        warn(*damaged)
        raise UserError(f'no checkpoint in {self.out_dir} is valid; '
                        'start again with another --out_dir')

    def _read(self, step, read, *args):
        """read(step, *args). Raises DamagedError on all processes if it fails on one of them."""
        try:
            result, damage = read(step, *args), None
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # says nothing about the checkpoint
        except Exception as e:  # of many types
            result, damage = None, e
        if not np.all(multihost_utils.process_allgather(np.array(damage is None))):
            raise self._damaged(step, damage or OSError('another process cannot read it'))
        return result

    def _compare(self, step, meta, arrays):
        for item in arrays if 'checksums' in meta else ():
            if checksums_of(arrays[item]) != meta['checksums'][item]:
                raise self._damaged(step, ValueError(f'its {item} are not what was saved'))

    def _damaged(self, step, e):
        return DamagedError(f'checkpoint {self.folder(step)} is damaged: {type(e).__name__}: '
                            + one_line(e)[:300])

    # the handlers are called without self.manager, whose restore() waits for all processes even if
    # one of them has failed

    def meta(self, step):
        """The JSON part: iter_num, best_val_loss, model_args, config, chars. Raises any error."""
        folder = self.manager.directory / str(step)
        meta = ocp.JsonCheckpointHandler().restore(folder / 'meta')
        if 'crc32' in meta:
            return unseal(meta)
        check_files(folder, 'meta')
        return meta

    def restore(self, step, meta, abstract):
        """The items that abstract has; load checks their arrays. Raises any error."""
        folder = self.manager.directory / str(step)
        for item in abstract if 'checksums' not in meta else ():
            check_files(folder, item)
        return {item: ocp.StandardCheckpointHandler().restore(
            folder / item, args=ocp.args.StandardRestore(tree)) for item, tree in abstract.items()}


def split_items(state):
    """A training state as the items of a checkpoint that hold arrays: parameters, and all else."""
    rest = {k: v for k, v in state.items() if k != 'params'}
    return {'params': state['params']} | ({'optimizer': rest} if rest else {})


def one_line(error):
    return ' '.join(str(error).split())


def warn(*damaged):
    for damage in damaged:
        print(f'WARNING: {damage}; it is not used')
