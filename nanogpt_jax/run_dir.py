"""
A run's out_dir, on this machine or in a bucket (gs://, s3://): paths, lock, and metrics.jsonl.
etils.epath reads and writes buckets, as in Orbax.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import stat
import tempfile
import time

from etils import epath

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: nothing keeps two runs apart there

from nanogpt_jax.errors import UserError

# by scheme: the package that fsspec needs, and the command that stores credentials
BUCKETS = {'gs': ('gcsfs', 'gcloud auth application-default login'),
           's3': ('s3fs', 'aws configure')}


def is_remote(path):
    return '://' in os.fspath(path)


def join(folder, *names):
    # os.path.join would put \ into a bucket's names on Windows
    return '/'.join((folder.rstrip('/'), *names)) if is_remote(folder) else os.path.join(
        folder, *names)


def absolute(path):
    """Raises UserError for a relative path if the current folder has been deleted."""
    try:
        return path if is_remote(path) else os.path.abspath(path)
    except FileNotFoundError as e:
        raise UserError('the current folder has been deleted: change to another one') from e


def data_dir_of(dataset):
    """The folder of a data set: data/<dataset>, or `dataset` itself if it is in a bucket."""
    return dataset.rstrip('/') if is_remote(dataset) else os.path.join('data', dataset)


@contextlib.contextmanager
def reached(path):
    """Yields the epath.Path of a path.

    Raises UserError for any error of a bucket except FileNotFoundError, for other kinds of URL, and
    if a package is missing.
    """
    if not is_remote(path):
        yield epath.Path(path)
        return
    scheme, _, name = path.partition('://')
    if scheme not in BUCKETS or not name.split('/')[0]:
        raise UserError(f'cannot use {path}: give a path on this machine, or gs://BUCKET/NAME or '
                        's3://BUCKET/NAME')
    package, login = BUCKETS[scheme]
    try:
        import fsspec  # slow, and not needed for folders
        # Orbax's driver writes to the bucket too, so a cached listing would be out of date
        fsspec.config.conf.setdefault(scheme, {}).setdefault('use_listings_cache', False)
        fsspec.filesystem(scheme)
        yield epath.Path(path)
    except (FileNotFoundError, UserError):
        raise
    except ImportError as e:
        raise UserError(f'{path} needs the package {package}: pip install {package}') from e
    except Exception as e:  # of the network, of the bucket's owner, of credentials: many types
        raise UserError(f'cannot reach {path} ({type(e).__name__}: {" ".join(str(e).split())[:200]}'
                        '): check its name, the network, and the credentials of this machine '
                        f'({login})') from e


def fsspec_of(path):
    """(fsspec's file system, the name of the path there); use it inside `with reached(path)`."""
    import fsspec
    return fsspec.core.url_to_fs(path)


def exists(path):
    with reached(path) as p:
        return p.exists()


def is_dir(path):
    """In a bucket: whether there is anything below path."""
    with reached(path) as p:
        return p.is_dir()


def listdir(path):
    with reached(path) as p:
        return [entry.name for entry in p.iterdir()]


def replace(path, new_path):
    with reached(path) as p:
        p.replace(new_path)


def remove_tree(path):
    """Delete a file, or a folder with all its contents."""
    with reached(path) as p:
        if p.is_dir():
            p.rmtree()
        else:
            p.unlink()


def check_is_file(path):
    """Raise UserError if path exists and is not a regular file: a FIFO would block for ever."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f'{path} is not a file')


@contextlib.contextmanager
def open_file(path, mode='r', errors=None):
    """open() of a regular file, as a context manager; text is UTF-8. An object in a bucket appears
    when the with block ends."""
    kwargs = {} if 'b' in mode else {'encoding': 'utf-8', 'errors': errors}
    if not is_remote(path):
        check_is_file(path)
        with open(path, mode, **kwargs) as f:
            yield f
        return
    with reached(path):
        fs, name = fsspec_of(path)
        with fs.open(name, mode, **kwargs) as f:
            yield f


# -----------------------------------------------------------------------------
# reading parts of large files

def file_size(path):
    """Bytes of a file; None if there is no such file."""
    try:
        with reached(path) as p:
            found = p.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from e
    return None if found.is_directory else found.length


def file_version(path):
    """A value that differs once a file has changed; None in a bucket, where it costs a request."""
    if is_remote(path) or not os.path.exists(path):
        return None
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def read_ranges(path, starts, n_bytes):
    """n_bytes from each start, joined: bytes. Fewer at the end of the file."""
    if is_remote(path):
        with reached(path):
            fs, name = fsspec_of(path)  # cat_ranges reads them concurrently
            return b''.join(fs.cat_ranges([name] * len(starts), starts,
                                          [start + n_bytes for start in starts], on_error='raise'))
    check_is_file(path)
    # read() instead of a memory map: a new map per batch costs more in page faults than reading,
    # and pages of a map that stays open count as this process's memory
    with open(path, 'rb', buffering=0) as f:
        found = []
        for start in starts:
            f.seek(start)
            found.append(f.read(n_bytes))
        return b''.join(found)


# -----------------------------------------------------------------------------
# the lock

LOCK = 'run.lock'
held = []  # this process's lock file, locked as long as it is open


def check_out_dir(out_dir, must_exist):
    """Raise UserError for an impossible out_dir, or if it must exist and does not."""
    if not out_dir:
        raise UserError('out_dir is empty: give a folder, as in --out_dir=out_jax')
    path = os.fspath(absolute(out_dir))
    if is_remote(path) and not path.startswith('gs://'):
        raise UserError(f'cannot use {out_dir} as out_dir: Orbax keeps checkpoints in folders and '
                        'in gs:// only; give a folder, and copy it when the run has ended')
    # TensorStore, which writes the arrays, reads \ as /
    if path.encode(errors='replace').decode() != path or os.sep == '/' and '\\' in path:
        raise UserError(f'cannot use {path} as out_dir: arrays cannot be written to a folder whose '
                        r'name has a \ or is not UTF-8; give another --out_dir')
    if is_dir(out_dir):
        return
    if os.path.islink(out_dir) or exists(out_dir):
        raise UserError(f'cannot use {out_dir} as out_dir: it is not a folder; give another '
                        '--out_dir')
    if must_exist:
        raise UserError(f'{out_dir} does not exist, so there is no checkpoint: train first, '
                        'or give another --out_dir')


def hold_out_dir(out_dir, resume=False):
    """Lock out_dir for this run until the process ends, however it ends.

    Creates out_dir unless resume. Raises UserError if it cannot be written, or if another run
    holds it, with the host and process number of that run.
    """
    check_out_dir(out_dir, must_exist=resume)
    release_out_dir()  # an earlier run in the same notebook
    if is_remote(out_dir):
        print(f'WARNING: {out_dir} cannot be locked, as it is in a bucket: make sure that no other '
              'run writes to it')
        return
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(join(out_dir, LOCK), 'a+', encoding='utf-8')
        held.append(lock)
        if not is_locked(lock):
            lock.seek(0)
            raise UserError(f'another run is writing to {out_dir}: '
                            f'{lock.read() or "another process"}. Wait for it or stop it, or '
                            'choose another --out_dir')
        lock.truncate(0)
        print(f'process {os.getpid()} on {socket.gethostname()}', file=lock, end='', flush=True)
    except OSError as e:
        raise UserError(f'cannot write to {out_dir}: {e}; choose another --out_dir') from e


def is_locked(lock):
    """Lock a file; False if another process has locked it."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:  # a file system without locks
        print(f'WARNING: {lock.name} cannot be locked ({e}): make sure that no other run writes '
              'there')
    return True


def release_out_dir():
    """Unlock the out_dir that this process holds, for several runs in one process."""
    while held:
        held.pop().close()


# -----------------------------------------------------------------------------
# metrics.jsonl

METRICS = 'metrics.jsonl'


class MetricsFile:
    """out_dir/metrics.jsonl: a JSON object per line, for pandas.read_json(path, lines=True).

    A run that resumes at start_iter keeps the lines of earlier iterations. The file of another run
    is renamed to metrics-<time>.jsonl. In a bucket the file changes with each upload().
    """

    def __init__(self, out_dir, start_iter):
        self.path, self.is_remote = join(out_dir, METRICS), is_remote(out_dir)
        earlier = []
        try:
            if start_iter > 0:
                earlier = [line for line in read_metrics(out_dir) if line['iter'] < start_iter]
            elif exists(self.path):
                replace(self.path, join(out_dir, f'metrics-{time.time_ns()}.jsonl'))
            self.file = self._file_with([json.dumps(line) + '\n' for line in earlier])
        except (OSError, UserError) as e:
            self._disable(e)

    def _file_with(self, lines):
        """An open file that begins with these lines."""
        if self.is_remote:  # nothing can be appended to an object in a bucket
            file = tempfile.TemporaryFile('w+', encoding='utf-8')
            file.writelines(lines)
            return file
        with open_file(self.path + '.tmp', 'w') as f:
            f.writelines(lines)
        os.replace(self.path + '.tmp', self.path)
        return open(self.path, 'a', encoding='utf-8', buffering=1)  # flushed line by line

    def write(self, **values):
        """Add a line. Numbers that are not finite become null, since JSON does not have them."""
        if self.file is None:
            return
        values = {name: x if math.isfinite(x) else None for name, x in values.items()}
        try:
            self.file.write(json.dumps(values) + '\n')
        except OSError as e:
            self._disable(e)

    def upload(self):
        """Copy all lines to the bucket; for a folder do nothing.

        Call it before each checkpoint, so that a resumed run finds the lines before it.
        """
        if self.file is None or not self.is_remote:
            return
        try:
            self.file.seek(0)
            with open_file(self.path, 'w') as f:
                shutil.copyfileobj(self.file, f)
        except (OSError, UserError) as e:
            print(f'WARNING: {self.path} is not up to date: {e}; training continues')
        finally:
            self.file.seek(0, os.SEEK_END)

    def _disable(self, error):
        print(f'WARNING: cannot write {self.path} ({error}); training continues without it')
        self.file = None


def read_metrics(path):
    """The lines of an out_dir's metrics.jsonl, or of a .jsonl file, as dicts with an int 'iter'.

    Skips lines that a crash has cut off. An out_dir without the file has no lines.
    """
    if is_dir(path):
        path = join(path, METRICS)
        if not exists(path):
            return []
    lines = []
    with open_file(path, 'rb') as f:
        for line in f:
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and isinstance(values.get('iter'), int):
                    lines.append(values)
    return lines
