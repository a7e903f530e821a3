"""
Checkpoints: out_dir/<iter_num>/ with the items params, optimizer (its state and the loss scale) and
meta (JSON), written by Orbax in the background and renamed into place once complete, with the
checksums of their files. They hold arrays and JSON only, so reading one runs no code.
"""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import socket
import sys
import time

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: nothing keeps two runs apart there
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from nanogpt_jax.errors import UserError

# orbax warns about every save without a metric, and logs at length what it raises as well
logging.getLogger('absl').setLevel(logging.CRITICAL)

CHECKSUMS = 'checksums.json'
VAL_LOSS = 'val_loss.json'
LOCK = 'run.lock'


# -----------------------------------------------------------------------------
# one run in an out_dir

held = []  # of this process: its lock, the lock's path, and the folders created for it


def check_out_dir(out_dir, must_exist):
    """Raise UserError for an out_dir that is no folder, or does not exist though it must."""
    if not out_dir:
        raise UserError('out_dir is empty: give a folder, as in --out_dir=out_jax')
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise UserError(f'cannot use {out_dir} as out_dir, since it is a file and not a folder: '
                        'give another --out_dir')
    if must_exist and not os.path.isdir(out_dir):
        raise UserError(f'{out_dir} does not exist, so there is no checkpoint: train first, '
                        'or give another --out_dir')


def hold_out_dir(out_dir, resume=False):
    """Keep out_dir for this process's run until release_out_dir, or the end of the process by
    whatever signal.

    Creates out_dir unless resume. Raises UserError if it cannot be written, or if another run has
    it, with that run's host and process number.
    """
    check_out_dir(out_dir, must_exist=resume)
    release_out_dir()
    path = pathlib.Path(out_dir).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path / LOCK, out_dir)
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {socket.gethostname()}')
        lock.flush()
    except OSError as e:
        raise UserError(f'cannot write to {out_dir}: {e}; choose another --out_dir') from e
    held.append((lock, path / LOCK, new))
    atexit.register(release_out_dir)


def lock_file(path, out_dir):
    """The file at path, open and locked by the operating system for as long as it is open.

    Raises UserError if another process has it locked, and OSError.
    """
    while True:
        lock = open(path, 'a+', encoding='utf-8')
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.seek(0)
            owner = lock.read() or 'another process'
            raise UserError(f'another run is writing to {out_dir}: {owner}. Wait for it or stop '
                            'it, or choose another --out_dir') from e
        except OSError as e:  # a file system without locks
            print(f'WARNING: {out_dir} cannot be locked ({e}): take care that no other run '
                  'writes to it')
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        lock.close()  # its last owner has removed it since it was opened


def release_out_dir():
    """Let other runs use the out_dir that this process holds; removes the lock's file, and the
    folders created for it if they are empty."""
    while held:
        lock, path, new = held.pop()
        with contextlib.suppress(OSError):
            path.unlink()
        lock.close()
        with contextlib.suppress(OSError):  # from the first folder on that has files
            for folder in new:
                folder.rmdir()
    atexit.unregister(release_out_dir)


# -----------------------------------------------------------------------------
# checkpoints


def checksums_of(folder):
    """{relative path: SHA-256} of the files of a checkpoint's items; the others are Orbax's own."""
    sums = {}
    for item in (e.path for e in os.scandir(folder) if e.is_dir()):
        for root, _, names in os.walk(item):
            for path in (os.path.join(root, name) for name in names):
                with open(path, 'rb') as f:
                    digest = hashlib.file_digest(f, 'sha256').hexdigest()
                sums[os.path.relpath(path, folder)] = digest
    return sums


def find_damage(folder):
    """What is wrong with a checkpoint's files, as text, or None; reads each for its checksum."""
    try:
        with open(os.path.join(folder, CHECKSUMS), encoding='utf-8') as f:
            expected = json.load(f)
        found = checksums_of(folder)
    except FileNotFoundError:
        return f'it has no {CHECKSUMS}, so it was never finished'
    except (OSError, ValueError) as e:
        return f'{type(e).__name__}: {e}'
    if not (isinstance(expected, dict) and expected):
        return f'{CHECKSUMS} names no files'
    wrong = sorted(path for path in expected if found.get(path) != expected[path])
    if not wrong:
        return None
    return f'{wrong[0]} is {"changed" if wrong[0] in found else "missing"}'


def hide_closed_loop(unraisable):
    """sys.unraisablehook that is silent about closed event loops.

    When one write of a save fails, tensorstore's other threads print dozens of lines about theirs;
    the failure itself is raised by check().
    """
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def steps_on_disk(out_dir):
    """The iterations that a folder has checkpoints of, ascending, valid or not."""
    if not os.path.isdir(out_dir):
        return []
    return sorted(int(e.name) for e in os.scandir(out_dir) if e.name.isdecimal() and e.is_dir())


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
        self.val_losses = {step: self._read_val_loss(step) for step in self.steps()}
        sys.unraisablehook = hide_closed_loop
        options = ocp.CheckpointManagerOptions(
            preservation_policy=KeepLatestAndBest(self.best), read_only=read_only,
            cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums))
        try:
            self.manager = Manager(os.path.abspath(out_dir), options=options)
            if not read_only and not os.access(out_dir, os.W_OK | os.X_OK):
                raise PermissionError('no permission')
        except OSError as e:
            raise UserError(f'cannot write to {out_dir}: {e}; choose another --out_dir') from e
        if read_only and not self.steps():
            raise UserError(f'no checkpoint in {out_dir}: train first, or give another --out_dir')

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # when another process has died, waiting for it would take until the heartbeat timeout
        if kind is None or issubclass(kind, UserError) or not jax.distributed.is_initialized():
            self.close()

    def _write_checksums(self):
        # orbax calls this in its background thread once all files are written, before it renames
        # their folder
        if jax.process_index() != 0:
            return
        for entry in os.scandir(self.manager.directory):
            if '.orbax-checkpoint-tmp' in entry.name:
                sums = checksums_of(entry.path)
                with open(os.path.join(entry.path, CHECKSUMS), 'w', encoding='utf-8') as f:
                    json.dump(sums, f, indent=1)
                self._write_val_loss(entry.path, int(entry.name.split('.')[0]))

    def _write_val_loss(self, folder, step):
        if self.val_losses[step] is not None:
            with open(os.path.join(folder, VAL_LOSS), 'w', encoding='utf-8') as f:
                json.dump(self.val_losses[step], f)

    def _read_val_loss(self, step):
        try:
            with open(os.path.join(self.folder(step), VAL_LOSS), encoding='utf-8') as f:
                return float(json.load(f))
        except (OSError, ValueError, TypeError):
            return None  # not evaluated at that iteration, or damaged: then it is not the best

    def steps(self):
        return steps_on_disk(self.out_dir)

    def folder(self, step):
        return os.path.join(self.out_dir, str(step))

    def best(self):
        """The iteration with the lowest validation loss, or None if none was evaluated."""
        evaluated = [step for step, loss in self.val_losses.items() if loss is not None]
        return min(evaluated, key=self.val_losses.get, default=None)

    # -------------------------------------------------------------------------
    # writing

    def save(self, state, iter_num, best_val_loss, model_args, config, chars, val_loss=None):
        """Save what nanoGPT's checkpoints hold; waits for the copy off the device only.

        chars: the characters of the vocabulary, or None for GPT-2's BPE. val_loss: the validation
        loss at this iteration if it was evaluated; the checkpoint can then be the best. Raises
        UserError if an earlier save has failed or a later checkpoint exists.
        """
        self.check()
        t0, self.val_losses[iter_num] = time.time(), val_loss
        meta = dict(iter_num=iter_num, best_val_loss=best_val_loss, model_args=model_args,
                    config=config, chars=chars)
        params, optimizer = split_items(state)
        try:
            items = ocp.args.Composite(params=ocp.args.StandardSave(params),
                                       optimizer=ocp.args.StandardSave(optimizer),
                                       meta=ocp.args.JsonSave(meta))
            saved = self.manager.save(iter_num, args=items)
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
            self._write_val_loss(self.folder(step), step)

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
        text = ' '.join(str(error).split())
        text = text if len(text) < 300 else '...' + text[-300:]  # the cause is at the end
        return UserError(f'saving to {self.out_dir} failed: {text}; {self.describe_valid()}')

    def describe_valid(self):
        """Which checkpoint a failed run can be resumed from, as text; waits for the last save."""
        with contextlib.suppress(Exception):  # check() and close() report it
            self.manager.wait_until_finished()
        valid = [step for step in self.steps() if find_damage(self.folder(step)) is None]
        if not valid:
            return 'no checkpoint was saved yet'
        return f'checkpoint {valid[-1]} is valid and can be resumed from'

    def quarantine_after(self, step):
        """Rename checkpoints after `step` to damaged-<iter_num>-<time>.

        Orbax saves none at or below an existing step.
        """
        for later in [s for s in self.val_losses if s > step]:
            if jax.process_index() == 0:
                name = f'damaged-{later}-{time.time_ns()}'
                os.replace(self.folder(later), os.path.join(self.out_dir, name))
            del self.val_losses[later]
        multihost_utils.sync_global_devices('damaged checkpoints are renamed')
        self.manager.reload()

    # -------------------------------------------------------------------------
    # reading

    def latest_valid_step(self):
        """The latest iteration whose files are intact; prints which are not.

        Process 0 reads the files and broadcasts the result. Raises UserError if no checkpoint is
        valid.
        """
        valid = -1
        for step in reversed(self.steps()) if jax.process_index() == 0 else ():
            damage = find_damage(self.folder(step))
            if damage is None:
                valid = step
                break
            self._warn_of_damage(step, damage)
        valid = int(multihost_utils.broadcast_one_to_all(np.int32(valid)))
        if valid < 0:
            raise UserError(f'no checkpoint in {self.out_dir} is valid; '
                            'start again with another --out_dir')
        return valid

    def _warn_of_damage(self, step, damage):
        print(f'WARNING: checkpoint {self.folder(step)} is damaged and not used: {damage}')

    def find(self, checkpoint='auto'):
        """The iteration of a checkpoint: 'latest', 'best', a number, or 'auto'.

        auto is the best if the run saved improvements only (as nanoGPT's single file would be),
        else the latest. latest and auto fall back to the latest valid one. Raises UserError for
        a checkpoint that is absent or damaged.
        """
        if checkpoint in ('auto', 'latest'):
            latest = self.latest_valid_step()
            saves_all = self.meta(latest)['config']['always_save_checkpoint']
            if checkpoint == 'latest' or saves_all or self.best() is None:
                return latest
        number = int(checkpoint) if checkpoint.isdecimal() else None
        if checkpoint not in ('auto', 'best') and number not in self.steps():
            raise UserError(f'no checkpoint {checkpoint!r} in {self.out_dir}: give auto, latest, '
                            f'best, or one of {self.steps()}')
        if checkpoint == 'best' and self.best() is None:
            raise UserError(f'no checkpoint in {self.out_dir} has a validation loss, so none is '
                            'the best; use --checkpoint=latest')
        step = self.best() if number is None else number
        damage = find_damage(self.folder(step))
        if damage and checkpoint == 'auto':
            self._warn_of_damage(step, damage)
            return latest
        if damage:
            raise UserError(f'checkpoint {self.folder(step)} is damaged: {damage}; '
                            'try --checkpoint=latest')
        return step

    def meta(self, step):
        """The JSON part: iter_num, best_val_loss, model_args, config, chars."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self.manager.restore(step, args=items)['meta']

    def params(self, step, abstract):
        """The parameters, into a tree of jax.ShapeDtypeStruct with shardings."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=items)['params']

    def state(self, step, abstract):
        """The training state, into a tree of jax.ShapeDtypeStruct with shardings.

        The number of devices that wrote it does not matter.
        """
        params, optimizer = split_items(abstract)
        items = self.manager.restore(step, args=ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer)))
        return {'params': items['params'], **items['optimizer']}


def split_items(state):
    """A training state as two items of a checkpoint: the parameters, and all else."""
    return state['params'], {k: v for k, v in state.items() if k != 'params'}
