"""
Reads files of torch.save, without torch and without running code: a zip with a pickle and the raw
storages of tensors. Tensors become NumPy arrays; everything else must be plain data.
"""

import io
import math
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np

from nanogpt_jax.errors import UserError

STORAGES = {
    'DoubleStorage': np.float64, 'FloatStorage': np.float32, 'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
    'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}


class PlainDict(dict):
    """An OrderedDict of the file, without the attributes that were saved with it."""

    def __setstate__(self, attributes):
        pass


def rebuild_tensor(storage, offset, shape, strides, *_):
    """A view of a storage (a 1-D array); strides count elements, as in torch."""
    if min((offset, *shape, *strides)) < 0 or math.prod(shape) > storage.size:
        raise ValueError(f'a tensor of shape {shape} has a storage of {storage.size} elements')
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.size:
        raise ValueError(f'a tensor of shape {shape} ends past its storage of {storage.size} '
                         'elements')
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [stride * storage.itemsize for stride in strides],
        writeable=False)


ALLOWED = {
    ('collections', 'OrderedDict'): PlainDict,
    ('torch._utils', '_rebuild_tensor_v2'): rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
    **{('torch', name): np.dtype(dtype) for name, dtype in STORAGES.items()},
}


# Python's own unpickler: C's allocates memory for whatever index a pickle names
class TensorUnpickler(pickle._Unpickler):
    """Reads plain data and dense tensors, and refuses everything else."""

    def __init__(self, file, read_storage):
        super().__init__(file)
        self.read_storage, self.storages = read_storage, {}

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}'[:100] + '; only dense '
                                         'tensors and plain data are allowed')
        return ALLOWED[module, name]

    def persistent_load(self, saved_id):
        kind, dtype, key, _, n = saved_id
        if kind != 'storage' or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError('it refers to something that is not a storage')
        if key not in self.storages:  # tied tensors share one
            self.storages[key] = np.frombuffer(self.read_storage(key), dtype)
        if self.storages[key].dtype != dtype or self.storages[key].size != n:
            raise ValueError(f'storage {key} has {self.storages[key].nbytes} bytes; it should '
                             f'have {n} of {dtype}')
        return self.storages[key]


def read_torch_file(path):
    """The contents of a file of torch.save, with NumPy arrays for tensors. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as file:
            # torch does not compress, so a larger sum is a zip bomb
            if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
                raise ValueError('its parts are larger than the file')
            name = next(name for name in file.namelist() if name.endswith('/data.pkl'))
            folder = name.removesuffix('data.pkl')
            return TensorUnpickler(io.BytesIO(file.read(name)),
                                   lambda key: file.read(f'{folder}data/{key}')).load()
    except MemoryError as e:
        raise UserError(f'not enough memory to read {path}') from e
    except Exception as e:  # a damaged file can raise nearly anything
        reason = ' '.join(str(e).split())[:200]
        raise UserError(f'cannot read {path} ({type(e).__name__}: {reason}): it is damaged, or '
                        'holds more than dense tensors and plain data') from e
