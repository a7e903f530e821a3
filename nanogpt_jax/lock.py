"""
A run's out_dir: whether it can be used at all, and the lock that keeps a second run out of it.
"""

import atexit
import contextlib
import os
import pathlib
import socket

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: nothing keeps two runs apart there

from nanogpt_jax import paths
from nanogpt_jax.errors import UserError

LOCK = 'run.lock'
held = []  # of this process: its lock, the lock's path, and the folders created for it


def check_out_dir(out_dir, must_exist):
    """Raise UserError for an out_dir that is no folder, or does not exist though it must."""
    if not out_dir:
        raise UserError('out_dir is empty: give a folder, as in --out_dir=out_jax')
    if paths.is_remote(out_dir) and paths.scheme(out_dir) != 'gs':
        raise UserError(f'cannot use {out_dir} as out_dir: Orbax keeps checkpoints in folders and '
                        'in gs:// only; give a folder, and copy it when the run has ended')
    if paths.exists(out_dir) and not paths.is_dir(out_dir):
        raise UserError(f'cannot use {out_dir} as out_dir, since it is a file and not a folder: '
                        'give another --out_dir')
    if must_exist and not paths.is_dir(out_dir):
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
    if paths.is_remote(out_dir):
        check_writable(out_dir)
        print(f'WARNING: {out_dir} cannot be locked, as it is in a bucket: take care that no other '
              'run writes to it')
        return
    path = pathlib.Path(out_dir).absolute()
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path / LOCK, out_dir)
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {socket.gethostname()}')
        lock.flush()
    except OSError as e:
        raise UserError(f'cannot write to {out_dir}: {e}; choose another --out_dir') from e
    held.append((lock, path / LOCK, new))
    atexit.register(release_out_dir)


def check_writable(out_dir):
    """Raise UserError if nothing can be written to an out_dir in a bucket: now, not at the first
    checkpoint."""
    with paths.open_file(paths.join(out_dir, LOCK), 'w') as f:
        f.write(f'process {os.getpid()} on {socket.gethostname()}')
    paths.remove_tree(paths.join(out_dir, LOCK))


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
