"""
Files and folders on this machine or in a bucket, where their names start with gs:// or s3://.
Buckets are reached by fsspec, as Orbax reaches them; for all else each function is os's own.
"""

import contextlib
import functools
import os

from nanogpt_jax.errors import UserError

PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}  # what fsspec needs, by the part before ://
CREDENTIALS = {'gs': 'gcloud auth application-default login', 's3': 'aws configure'}


def is_remote(path):
    return '://' in os.fspath(path)


def scheme(path):
    return path.partition('://')[0] if is_remote(path) else None


def join(folder, *names):
    # not os.path.join, which is another one on Windows
    return '/'.join((folder.rstrip('/'), *names)) if is_remote(folder) else os.path.join(
        folder, *names)


def absolute(path):
    return path if is_remote(path) else os.path.abspath(path)  # which makes a folder of gs://


def data_dir_of(dataset):
    """The folder of a data set: data/<dataset>, or the data set itself if it is in a bucket."""
    return dataset.rstrip('/') if is_remote(dataset) else os.path.join('data', dataset)


# -----------------------------------------------------------------------------
# buckets

def filesystem(path):
    """(fsspec's file system, the path's name there) of a path in a bucket.

    Raises UserError for another kind of URL, and if a package is missing.
    """
    kind, _, name = path.partition('://')
    if kind not in PACKAGES or not name.split('/')[0]:
        raise UserError(f'cannot use {path}: give a path on this machine, or gs://BUCKET/NAME or '
                        's3://BUCKET/NAME')
    import fsspec  # slow, and not needed for folders
    # others write to the bucket too, Orbax's driver among them, so a list of what it has gets old
    fsspec.config.conf.setdefault(kind, {}).setdefault('use_listings_cache', False)
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as e:
        raise UserError(f'{path} needs the package {PACKAGES[kind]}: '
                        f'pip install {PACKAGES[kind]}') from e


@contextlib.contextmanager
def reached(path):
    """fsspec's file system and a path's name there, for a with block whose errors become
    UserErrors; but for FileNotFoundError."""
    fs, name = filesystem(path)
    try:
        yield fs, name
    except (FileNotFoundError, UserError):
        raise
    except Exception as e:  # of the network, of the bucket's owner, of credentials: many types
        raise UserError(f'cannot reach {path} ({type(e).__name__}: {" ".join(str(e).split())[:200]}'
                        '): check its name, the network, and the credentials of this machine '
                        f'({CREDENTIALS[scheme(path)]})') from e


def exists(path):
    if not is_remote(path):
        return os.path.exists(path)
    with reached(path) as (fs, name):
        return fs.exists(name)


def is_dir(path):
    """In a bucket: whether there is anything below path."""
    if not is_remote(path):
        return os.path.isdir(path)
    with reached(path) as (fs, name):
        return fs.isdir(name)


def listdir(path):
    if not is_remote(path):
        return os.listdir(path)
    with reached(path) as (fs, name):
        names = (entry.rstrip('/').rpartition('/')[2] for entry in fs.ls(name, detail=False))
        return [*names]


@contextlib.contextmanager
def open_file(path, mode='r', errors=None):
    """open(), text being UTF-8, as a context manager. What is written to a bucket is there at its
    end."""
    kwargs = {} if 'b' in mode else {'encoding': 'utf-8', 'errors': errors}
    if not is_remote(path):
        with open(path, mode, **kwargs) as f:
            yield f
        return
    with reached(path) as (fs, name), fs.open(name, mode, **kwargs) as f:
        yield f


def replace(path, new_path):
    """os.replace; in a bucket, copies what is below path and then deletes it."""
    if not is_remote(path):
        os.replace(path, new_path)
        return
    with reached(path) as (fs, name):
        fs.mv(name, filesystem(new_path)[1], recursive=fs.isdir(name))


def remove_tree(path):
    """Delete all that is below a path in a bucket."""
    with reached(path) as (fs, name):
        fs.rm(name, recursive=True)


# -----------------------------------------------------------------------------
# reading parts of large files

def file_size(path):
    """Bytes of a file, None if there is no such file. In a bucket, as they were at first."""
    if not is_remote(path):
        return os.path.getsize(path) if os.path.isfile(path) else None
    with contextlib.suppress(FileNotFoundError):
        return remote_size(path)


@functools.cache  # it is asked for with every batch
def remote_size(path):
    with reached(path) as (fs, name):
        return fs.size(name)


def read_ranges(path, starts, n_bytes):
    """n_bytes from each start on, one after the other, fewer at the end of the file: bytes."""
    if is_remote(path):
        with reached(path) as (fs, name):  # all at the same time
            return b''.join(fs.cat_ranges([name] * len(starts), starts,
                                          [start + n_bytes for start in starts], on_error='raise'))
    # read() instead of a memory map: a new map per batch costs more in page faults than reading,
    # and a map that stays open counts all pages it ever read as this process's memory
    with open(path, 'rb', buffering=0) as f:
        found = []
        for start in starts:
            f.seek(start)
            found.append(f.read(n_bytes))
        return b''.join(found)
