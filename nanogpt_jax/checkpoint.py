"""
Checkpoints in out_dir/<iter_num>/, each with three items: params, optimizer (its state and the loss
scale) and meta (JSON, with a checksum of each array).

Orbax writes one in the background and renames it into place when it is complete; in a bucket it
writes a marker last. Checkpoints hold only arrays and JSON, so reading one runs no code. A folder
counts as ours if its meta/metadata says so. Other folders are never counted, renamed or deleted.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import glob
import json
import logging
import os
import re
import stat
import sys
import time
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanogpt_jax import run_dir
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import check_out_dir, join

ARRAYS = 'params', 'optimizer'  # the items with arrays
VAL_LOSS = 'val_loss.json'  # losses measured after the checkpoint was saved
UNFINISHED = 'unfinished.json'  # lists the folders that a save is writing or deleting
MEASURE = 'dataset', 'block_size', 'batch_size', 'eval_iters'  # settings of an evaluation
ITERATION = '0|[1-9][0-9]*'
TRIAL = 'save-test'  # the folder of a checkpoint with a few bytes
BAD_JSON = ValueError, RecursionError, TypeError, KeyError


def should_save(val_loss, best_val_loss, always_save_checkpoint):
    """Whether to save after an evaluation."""
    return always_save_checkpoint or val_loss < best_val_loss


def should_keep(iter_num, latest, best):
    """Whether to keep a checkpoint when a newer one is complete.

    best: the iterations with the lowest validation loss, one for each set of MEASURE settings.
    """
    return iter_num == latest or iter_num in best


def quiet_orbax():
    """For scripts: hide the long logs of errors that Orbax also raises.

    When one of its threads fails, the others log dozens of lines about results that nobody awaited.
    """
    for logger in ('absl', 'asyncio'):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)

    def report(unraisable):
        if not (asyncio.iscoroutine(unraisable.object)
                or str(unraisable.exc_value) == 'Event loop is closed'):
            sys.__unraisablehook__(unraisable)
    sys.unraisablehook = report


# -----------------------------------------------------------------------------
# checksums

@jax.jit
def checksum(a):
    """The sum, modulo 2**32, of a hash of each word of an array and its position.

    It does not depend on the sharding, and each device reads only its own shard. The hash is
    invertible, so a change of one word always changes the sum. Like a CRC, it misses other damage
    with a probability of 2**-32.
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
    # one at a time: CPU devices share threads, so several programs that communicate can deadlock
    return [int(checksum(a)) for a in jax.tree.leaves(tree)]


def seal(values):
    """values, a dict for a JSON file, with a checksum that read_sealed verifies."""
    return values | {'crc32': zlib.crc32(json.dumps(values, sort_keys=True).encode())}


def read_sealed(path):
    """The dict of a JSON file; None if it was not sealed. Raises OSError, or one of BAD_JSON if the
    file is damaged."""
    with run_dir.open_file(path, 'rb') as f:
        text = f.read()
    values = json.loads(text)  # not inside open_file: in a bucket it reports all errors as its own
    if not isinstance(values, dict) or 'crc32' not in values:
        return None
    crc32 = values.pop('crc32')
    if seal(values)['crc32'] != crc32:
        raise ValueError('its JSON is changed')
    return values


def restore(folder, item, tree):
    """An item's arrays. tree: of jax.ShapeDtypeStruct with shardings."""
    return ocp.StandardCheckpointHandler().restore(
        epath.Path(run_dir.absolute(folder)) / item, args=ocp.args.StandardRestore(tree))


# -----------------------------------------------------------------------------
# the contents of a folder

class Loaded(NamedTuple):
    step: int
    meta: dict
    state: Any


def read_meta(folder):
    """A checkpoint's meta, a message if it is damaged, or None if this project did not write it.

    Raises OSError if it cannot be read.
    """
    try:
        return read_sealed(join(folder, 'meta', 'metadata'))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except BAD_JSON as e:  # then the names of the items show whether it is ours
        ours = all(run_dir.is_dir(join(folder, item)) for item in ARRAYS)
        return damaged(folder, e) if ours else None


def numbered(out_dir):
    """The folders whose names are iterations, ascending, whoever wrote them."""
    names = run_dir.listdir(out_dir) if run_dir.is_dir(out_dir) else []
    return sorted((name for name in names if re.fullmatch(ITERATION, name)), key=int)


def find_checkpoints(out_dir):
    """{iteration: result of read_meta} of this project's checkpoints, ascending.

    Raises UserError if one cannot be read.
    """
    try:
        names = None
        while names != (names := numbered(out_dir)):  # a run may replace one meanwhile
            found = {int(name): read_meta(join(out_dir, name)) for name in names
                     # in a bucket a marker is written last, since renames are not atomic
                     if not run_dir.is_remote(out_dir)
                     or ocp.utils.is_checkpoint_finalized(join(out_dir, name))}
    except OSError as e:
        raise UserError(f'cannot read {e.filename or out_dir}: {e.strerror or e}') from e
    return {step: meta for step, meta in found.items() if meta is not None}


def steps_on_disk(out_dir):
    """The iterations of the checkpoints in a folder, ascending, valid or not."""
    return [*find_checkpoints(out_dir)]


def measure(config):
    """The settings behind a validation loss, as text. Losses are comparable only if it is equal."""
    return ', '.join(f'{name}={config.get(name)}' for name in MEASURE)


def read_val_losses(folder):
    """The losses that record_val_loss added to a checkpoint: {measure(config): val_loss}."""
    try:
        return read_sealed(join(folder, VAL_LOSS))['measured']
    except (FileNotFoundError, *BAD_JSON):
        return {}
    except OSError as e:
        raise UserError(f'cannot read {e.filename or folder}: {e.strerror or e}') from e


def split_items(state):
    """A training state as the items of a checkpoint: the parameters, and everything else."""
    rest = {k: v for k, v in state.items() if k != 'params'}
    return {'params': state['params']} | ({'optimizer': rest} if rest else {})


def shapes_of(tree):
    """{name: shape} of a tree of arrays, or of Orbax's metadata of one."""
    return {jax.tree_util.keystr(path, simple=True, separator='.'): [*leaf.shape]
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# -----------------------------------------------------------------------------
# errors

ABOUT_MEMORY = MemoryError, jax.errors.JaxRuntimeError  # the scripts give advice for these

# TensorStore's errors begin with a status; any other than these means that files have changed
NOT_DAMAGE = ('UNKNOWN', 'PERMISSION_DENIED', 'UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'INTERNAL',
              'DEADLINE_EXCEEDED', 'UNAUTHENTICATED', 'ABORTED', 'CANCELLED')


def is_damage(error):
    """Whether an error means that a checkpoint has changed since it was saved. Errors of
    permissions, I/O and memory do not."""
    while error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return True
        if isinstance(error, (OSError, *ABOUT_MEMORY)) or str(error).startswith(NOT_DAMAGE):
            return False
        error = error.__cause__ or error.__context__
    return True


def check_reachable(folder):
    """Raise OSError if a file in a folder cannot be reached. Orbax would report it as missing,
    which counts as damage."""
    for entry in os.scandir(folder):
        if stat.S_ISDIR(entry.stat().st_mode):
            check_reachable(entry.path)


def one_line(error):
    """An error's type and text. A long text is cut in the middle: the cause is at one end."""
    text = f'{type(error).__name__}: ' + ' '.join(str(error).split())
    return text if len(text) < 300 else f'{text[:150]} ... {text[-150:]}'


def damaged(folder, error):
    return f'checkpoint {folder} is damaged: {one_line(error)}'


# -----------------------------------------------------------------------------
# several processes

def gather(value):
    """The values of all processes, on all processes. value: anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(np.max(multihost_utils.process_allgather(np.int32(data.size))))
    rows = multihost_utils.process_allgather(np.pad(data, (0, size - data.size)))
    return [json.loads(row.tobytes().rstrip(b'\0')) for row in rows]


def by_process_0(method):
    """Run a method on process 0 only. All processes return its value, which JSON must hold, or
    raise its UserError."""
    @functools.wraps(method)
    def shared(self, *args):
        value = error = None
        if jax.process_index() == 0:
            try:
                value = method(self, *args)
            except UserError as e:
                error = e
        value, text = gather([value, error and str(error)])[0]
        if text:
            raise error or UserError(text)
        return value
    return shared


# -----------------------------------------------------------------------------

class Checkpoints:
    """The checkpoints of a run; should_keep decides which ones stay.

    As a context manager it waits at the end for the save in the background. All processes of a run
    open it. A writer first saves a few bytes, to fail early, and removes what a killed save left.
    read_only: only read, maybe while a run writes. Raises UserError if there is no checkpoint.
    """

    def __init__(self, out_dir, read_only=False):
        check_out_dir(out_dir, must_exist=read_only)
        self.out_dir, self.is_writer = out_dir, not read_only and jax.process_index() == 0
        self.blocked, self.saves = 0.0, 0  # seconds spent in save(), and number of calls
        self.damaged = {}  # {iteration: message}; the next save renames them
        self.saving = None  # the iteration of a save, and its concurrent.futures.Future
        self.orbax = None
        if not read_only:
            self._open_for_writing()
        elif not self.steps():
            raise UserError(f'{out_dir} has no checkpoint of this project: train first, or give '
                            'the --out_dir of a run')

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # if another process has died, waiting would take until the heartbeat timeout
        if kind is None or issubclass(kind, UserError) or not jax.distributed.is_initialized():
            self.close()

    def steps(self):
        return steps_on_disk(self.out_dir)

    def folder(self, step):
        return join(self.out_dir, str(step))

    # -------------------------------------------------------------------------
    # writing

    def _open_for_writing(self):
        # with ocdbt orbax searches for files by a glob of the whole path, which a [, * or ? in a
        # name breaks; without it each array has its own files
        path = run_dir.absolute(self.out_dir)
        # zstd takes most of a save's processor time and saves a few percent of space
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, use_ocdbt=glob.escape(str(path)) == str(path))
        self.orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(
            handler_registry=ocp.handlers.create_default_handler_registry(
                **dict.fromkeys(ARRAYS, handler))))
        self.background = concurrent.futures.ThreadPoolExecutor(1)
        try:
            if self.is_writer:
                if not run_dir.is_remote(path):
                    os.makedirs(path, exist_ok=True)
                self._remove_unfinished()
            self._try_to_save()
        except (UserError, *ABOUT_MEMORY):
            raise
        except Exception as e:  # file systems raise many types
            raise UserError(f'cannot save to {self.out_dir}: {one_line(e)}; choose another '
                            '--out_dir') from e

    def _try_to_save(self):
        """Save a few bytes from each process, read them back on all, and delete them."""
        devices = [*{d.process_index: d for d in reversed(jax.devices())}.values()]
        mesh, values = Mesh(np.array(devices), 'all'), np.arange(len(devices), dtype=np.int32)
        split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('all', None))
        array = jax.make_array_from_callback(values.shape, split, lambda index: values[index])
        path = join(run_dir.absolute(self.out_dir), TRIAL)
        self._note([TRIAL])
        gather(None)  # wait until process 0 has written it
        # without this check orbax would wait forever
        if False in (seen := gather(run_dir.exists(join(self.out_dir, UNFINISHED)))):
            raise UserError(f'process {seen.index(False)} does not see what process 0 writes to '
                            f'{self.out_dir}: give all processes one folder that they share')
        self._write(path, {}, {'params': {'a': array}})
        self.orbax.wait_until_finished()
        read = restore(path, 'params', {'a': jax.ShapeDtypeStruct(
            values.shape, values.dtype, sharding=whole)})['a']
        if not np.array_equal(read.addressable_data(0), values):
            raise OSError('the data read back differs from the data written')
        multihost_utils.sync_global_devices('all have read')
        if self.is_writer:
            run_dir.remove_tree(path)
        self._note([])

    def _note(self, names):
        """Record which folders are being written or deleted. _remove_unfinished reads this."""
        path = join(self.out_dir, UNFINISHED)
        if self.is_writer and names:
            with run_dir.open_file(path, 'w') as f:
                json.dump(seal({'names': [*map(str, names)]}), f)
        elif self.is_writer:
            run_dir.remove_tree(path)

    def _remove_unfinished(self):
        """Delete what a killed save left behind."""
        try:
            names = read_sealed(join(self.out_dir, UNFINISHED))['names']
        except FileNotFoundError:
            return
        except BAD_JSON:  # cut off by a crash
            names = [TRIAL]
        for name in {*map(str, names)} - {*map(str, self.steps())}:
            if re.fullmatch(f'{TRIAL}|{ITERATION}', name):  # the file may come from elsewhere
                for left in (self.folder(name), self.folder(name + ocp.utils.TMP_DIR_SUFFIX)):
                    if run_dir.exists(left):
                        run_dir.remove_tree(left)
        self._note([])

    def _write(self, path, meta, arrays):
        self.orbax.save(path, args=ocp.args.Composite(
            meta=ocp.args.JsonSave(meta),
            **{item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()}))

    @by_process_0
    def check_free(self, iterations):
        """Raise UserError if a folder that is not ours has the name of a later checkpoint."""
        first = max(self._intact(), default=0)
        for name in {*map(int, numbered(self.out_dir))} - {*self.steps()}:
            if name >= first and name in iterations:
                raise UserError(f'cannot save iteration {name}: {self.folder(name)} exists and was '
                                'not written by this project; move it, or choose another --out_dir')

    def save(self, state, meta, val_loss=None):
        """Start to save a training state; blocks until it is copied off the device.

        meta: iter_num, best_val_loss, model_args, config, chars (the vocabulary). val_loss: the
        validation loss at this iteration; without it the checkpoint cannot become the best. Raises
        UserError if the last save failed, or if this iteration or a later one exists.
        """
        t0, step = time.perf_counter(), meta['iter_num']
        self._finish()
        arrays = split_items(state)
        meta = seal(meta | dict(
            val_loss=val_loss,
            checksums={item: checksums_of(tree) for item, tree in arrays.items()},
            shapes={item: shapes_of(tree) for item, tree in arrays.items()}))
        try:
            if self.is_writer:
                self._make_room(step)
            self.damaged.clear()  # they are renamed
            self._note([step])
            self._write(run_dir.absolute(self.folder(step)), meta, arrays)
        except UserError:
            raise
        except Exception as e:  # file systems raise many types
            raise self._failed(e) from e
        self.saving = step, self.background.submit(self._complete, step, meta)
        self.blocked, self.saves = self.blocked + time.perf_counter() - t0, self.saves + 1

    def _make_room(self, step):
        """Rename damaged checkpoints to damaged-<iter_num>-<time>. Raises UserError if the folder
        of `step`, or a later checkpoint, exists."""
        for name in self.damaged.keys() & {*self.steps()}:
            run_dir.replace(self.folder(name),
                            join(self.out_dir, f'damaged-{name}-{time.time_ns()}'))
        taken = [self.folder(s) for s in self.steps() if s > step]
        # orbax would delete the second; one of ours was removed at the start
        taken += filter(run_dir.exists,
                        map(self.folder, [step, f'{step}{ocp.utils.TMP_DIR_SUFFIX}']))
        if taken:
            raise UserError(f'{taken[0]} already exists, so iteration {step} was not saved; '
                            'choose another --out_dir')

    def _complete(self, step, meta):
        """In the background: wait for a save, read it back, then delete old checkpoints."""
        self.orbax.wait_until_finished()
        if not self.is_writer:
            return
        folder = self.folder(step)
        found = read_meta(folder)
        if not isinstance(found, dict) or seal(found)['crc32'] != meta['crc32']:
            raise OSError('its meta differs from what was written')
        for item, shapes in meta['shapes'].items():
            saved = shapes_of(ocp.StandardCheckpointHandler().metadata(
                epath.Path(run_dir.absolute(folder)) / item).tree)
            if saved != shapes:
                raise OSError(f'its {item} differ from what was written')
        self._delete_old()

    # orbax's own retention counts every numbered folder as a checkpoint, and deletes before the new
    # one is read back
    def _delete_old(self):
        metas = self._intact()
        best = {step for _, step in self._best(metas).values()}
        old = [step for step in metas if not should_keep(step, max(metas), best)
               and not os.path.islink(self.folder(step))]
        if old:
            self._note(old)
        for step in old:
            try:
                # the meta first: without it no reader takes the folder for a checkpoint
                run_dir.remove_tree(join(self.folder(step), 'meta', 'metadata'))
                run_dir.remove_tree(self.folder(step))
            except OSError as e:  # NFS keeps files that somebody reads
                print(f'WARNING: cannot delete {self.folder(step)} ({e}); training continues')
        self._note([])

    def record_val_loss(self, step, val_loss, config):
        """Add to a checkpoint a validation loss that a run with `config` measured later."""
        if self.is_writer:
            measured = read_val_losses(self.folder(step)) | {measure(config): val_loss}
            with run_dir.open_file(join(self.folder(step), VAL_LOSS), 'w') as f:
                json.dump(seal({'measured': measured}), f)

    def check(self):
        """Raise UserError if the save in the background failed."""
        if self.saving and self.saving[1].done():
            self._finish()

    def close(self):
        """Wait for the save in the background. Raises UserError if it fails."""
        self._finish()
        if self.orbax:
            self.background.shutdown()
            self.orbax.close()

    def _finish(self):
        (step, future), self.saving = self.saving or (None, None), None
        if future and (error := future.exception()):
            self.damaged[step] = damaged(self.folder(step), error)
            raise self._failed(error) from error

    def _failed(self, error):
        return UserError(f'saving to {self.out_dir} failed: {one_line(error)}; '
                         + self.describe_valid())

    def describe_valid(self):
        """Wait for the last save; return as text which checkpoint a failed run can resume from."""
        with contextlib.suppress(UserError):
            self._finish()
        with contextlib.suppress(UserError):
            if valid := self._intact():
                return f'checkpoint {max(valid)} is complete; you can resume from it'
        return 'no checkpoint was saved yet'

    # -------------------------------------------------------------------------
    # reading

    def _intact(self):
        """{iteration: meta} of the checkpoints not known to be damaged. Warns of new damage."""
        found = find_checkpoints(self.out_dir)
        for step, meta in found.items():
            if isinstance(meta, str) and step not in self.damaged:
                self._give_up_on(step, meta)
        return {step: meta for step, meta in found.items() if step not in self.damaged}

    def _give_up_on(self, step, text):
        self.damaged[step] = text
        print(f'WARNING: {text}; ignoring it')

    def _best(self, metas):
        """{measure(config): (lowest validation loss, its iteration)}."""
        measured = [
            (how, val_loss, step) for step, meta in metas.items()
            for how, val_loss in [(measure(meta['config']), meta['val_loss']),
                                  *read_val_losses(self.folder(step)).items()]
            if val_loss is not None and not np.isnan(val_loss)]
        return {how: found for how, *found in sorted(measured, reverse=True)}

    @by_process_0
    def best_val_loss(self, config):
        """The lowest validation loss that was measured with config's settings, or 1e9. Prints a
        line if the latest checkpoint was measured with other settings."""
        metas, how = self._intact(), measure(config)
        alike = [meta['best_val_loss'] for meta in metas.values() if measure(meta['config']) == how]
        alike += [val_loss for other, (val_loss, _) in self._best(metas).items() if other == how]
        latest = metas[max(metas)]['config'] if metas else config
        if changed := [name for name in MEASURE if latest.get(name) != config.get(name)]:
            best = 'is from an earlier checkpoint with this one' if alike else 'starts anew'
            print(f'the latest checkpoint is of a run with another {", ".join(changed)}; '
                  f'the best validation loss {best}')
        return min([*alike, 1e9])

    def latest_meta(self):
        """(iteration, meta) of the latest checkpoint with an intact meta, the same on all
        processes. Loading it checks its arrays. Raises UserError if there is none."""
        return self._choose('latest')

    @by_process_0
    def _choose(self, checkpoint):
        """(iteration, meta) of the checkpoint 'latest', 'best', 'auto' or a number, if it is not
        known to be damaged.

        'auto' is the best if the run saved only improvements, as nanoGPT's single file would be,
        else the latest. Raises UserError if there is none.
        """
        metas = self._intact()
        if checkpoint in map(str, self.damaged):
            raise UserError(f'{self.damaged[int(checkpoint)]}; try --checkpoint=latest')
        if not metas:
            raise UserError(f'no checkpoint in {self.out_dir} is valid: start again with another '
                            '--out_dir')
        latest = max(metas)
        config = metas[latest]['config']
        _, best = self._best(metas).get(measure(config), (None, None))
        choices = {str(step): step for step in metas} | {'latest': latest, 'best': best}
        choices['auto'] = latest if best is None or config['always_save_checkpoint'] else best
        step = choices.get(checkpoint)
        if step is None:
            raise UserError(f'no checkpoint {checkpoint!r} in {self.out_dir}: give auto, latest, '
                            f'best (if a validation loss was measured), or one of {[*metas]}')
        return step, metas[step]

    def load(self, checkpoint, abstract_of):
        """Load a checkpoint as Loaded(step, meta, state), the same on all processes. If it is
        damaged, warn and load the one before.

        abstract_of: maps meta to the training state to load, a tree of jax.ShapeDtypeStruct with
        shardings, or to its params only: {'params': ...}. Other devices may have written it.
        Raises UserError if no checkpoint is intact, if another model wrote it, or if it cannot be
        read.
        """
        while True:
            step, meta = self._choose(checkpoint)
            wanted = split_items(abstract_of(meta))
            self._check_shapes(wanted, meta['shapes'])
            arrays = self._read(step, wanted, meta['checksums'])
            if arrays:
                state = {'params': arrays['params'], **arrays.get('optimizer', {})}
                return Loaded(step, meta, state)
            if checkpoint == 'best' and step in self.damaged:
                checkpoint = str(step)  # which raises its error: not the second best

    def _check_shapes(self, wanted, saved):
        """saved: {item: {name: shape}}."""
        for item, tree in wanted.items():
            here, there = shapes_of(tree), saved.get(item, {})
            if changed := sorted(name for name in here.keys() | there.keys()
                                 if here.get(name) != there.get(name)):
                name, other = changed[0], 'model' if item == 'params' else 'optimizer'
                raise UserError(
                    f'{self.out_dir} was written by another {other}: the shape of {name} is '
                    f'{there.get(name)} there and {here.get(name)} here; use the code that wrote '
                    'it, or start again with another --out_dir')

    @by_process_0
    def _is_there(self, step):
        return step in self.steps()

    # not by orbax's checkpointer: its restore() waits for all processes, even if one has failed
    def _read(self, step, wanted, checksums):
        """{item: arrays}; None if they are damaged, or if a run has replaced them meanwhile."""
        folder, arrays, text = self.folder(step), {}, ''
        try:
            if not run_dir.is_remote(folder):
                check_reachable(folder)
            for item, tree in wanted.items():
                arrays[item] = restore(folder, item, tree)
        except ABOUT_MEMORY:
            raise
        except Exception as e:  # of many types
            if not is_damage(e):
                raise UserError(f'cannot read {folder}: {one_line(e)}') from e
            text = damaged(folder, e)
        text = next(filter(None, gather(text)), '')
        if not text:
            changed = [item for item in arrays if checksums_of(arrays[item]) != checksums[item]]
            if not changed:
                return arrays
            text = damaged(folder, ValueError(f'its {changed[0]} differ from what was saved'))
        if self._is_there(step):  # else a run has deleted it
            self._give_up_on(step, text)
        return None
