"""Properties that hold for whatever hypothesis comes up with: the configurator, batches, the token check, codecs."""

import contextlib
import io
import os
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_train_utils as utils
from configurator import configure
from jax_transformer import UserError

DEFAULTS = {'count': 12, 'rate': 1e-3, 'flag': False, 'text': 'out'}


def configured(*args):
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(dict(DEFAULTS), args)


@given(st.sampled_from(sorted(DEFAULTS)), st.text())
def test_any_value_is_taken_in_its_type_or_refused_by_name(key, value):
    try:
        config, names = configured(f'--{key}={value}')
    except SystemExit as e:
        assert key in str(e) and str(e).startswith('error: ')  # no other exception, whatever the text
    else:
        assert type(config[key]) is type(DEFAULTS[key]) and names == {key}
        assert {k: v for k, v in config.items() if k != key} == {k: v for k, v in DEFAULTS.items() if k != key}


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text())
def test_what_python_prints_is_read_back(count, rate, flag, text):
    config, _ = configured(f'--count={count}', f'--rate={rate!r}', f'--flag={flag}', f'--text={text!r}')
    assert config == {'count': count, 'rate': rate, 'flag': flag, 'text': text}


@given(st.text())
def test_any_argument_is_taken_or_refused_in_one_line(arg):
    with pytest.raises(SystemExit) as e:
        configured('--' + arg)
    assert str(e.value).startswith('error: ')


@given(st.integers(1, 50), st.integers(1, 10 ** 12), st.integers(0, 2 ** 32), st.integers(0, 2 ** 40))
def test_offsets_lie_in_range_and_repeat(n_rows, n_offsets, seed, iter_num):
    offsets = utils.batch_offsets(n_rows, n_offsets, seed, iter_num, utils.TRAIN)
    assert offsets.shape == (n_rows,) and offsets.dtype == np.int64 and 0 <= offsets.min() and offsets.max() < n_offsets
    np.testing.assert_array_equal(offsets, utils.batch_offsets(n_rows, n_offsets, seed, iter_num, utils.TRAIN))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 65535), min_size=2, max_size=200), st.integers(1, 200), st.integers(0, 9))
def test_batches_are_consecutive_pieces_of_the_file(ids, block_size, iter_num):
    with tempfile.TemporaryDirectory() as folder:
        np.array(ids, np.uint16).tofile(os.path.join(folder, 'train.bin'))
        assert utils.largest_token(os.path.join(folder, 'train.bin')) == max(ids)
        if len(ids) <= block_size:
            with pytest.raises(UserError, match='block_size'):
                utils.get_batch(folder, 'train', 3, block_size, 0, iter_num)
            return
        x, y = utils.get_batch(folder, 'train', 3, block_size, 0, iter_num)
    pieces = {tuple(ids[i:i + block_size + 1]) for i in range(len(ids) - block_size)}
    assert all((*row, last) in pieces for row, last in zip(x.tolist(), y[:, -1].tolist()))
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def test_the_token_check_notices_a_changed_file(tmp_path):
    path = str(tmp_path / 'train.bin')
    for ids in ([1, 2, 3], [1, 9, 3, 4]):
        np.array(ids, np.uint16).tofile(path)
        assert utils.largest_token(path) == max(ids) == utils.largest_token(path)
    stamp = os.stat(path)
    np.array([7, 7, 7, 7], np.uint16).tofile(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert utils.largest_token(path) == 9  # the same size and time: the answer was kept, the file not read again


def test_the_token_check_reads_in_bounded_memory(tmp_path, monkeypatch):
    path = str(tmp_path / 'train.bin')
    ids = np.zeros(5 * 2 ** 24 // 2, np.uint16)  # two and a half chunks
    ids[-1] = 77
    ids.tofile(path)
    read, fromfile = [], np.fromfile

    def counted(*args, **kwargs):
        read.append(len(fromfile(*args, **kwargs)))
        return fromfile(*args, **kwargs)
    monkeypatch.setattr(np, 'fromfile', counted)
    assert utils.largest_token(path) == 77 and sum(read) == len(ids) and max(read) <= 2 ** 24


@given(st.lists(st.characters(), min_size=1, unique=True), st.data())
def test_characters_round_trip(chars, data):
    text = data.draw(st.text(alphabet=chars))
    encode, decode = utils.create_codec(chars)
    assert decode(encode(text)).decode() == text


@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_any_bytes_as_meta_are_plain_data_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
            f.write(content)
        with pytest.raises(UserError, match='meta.pkl'):
            utils.load_meta(folder)
