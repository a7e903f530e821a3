"""Properties that hypothesis tests: the configurator, batches, the token check, the tokenizer."""

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
from nanogpt_jax.errors import UserError
from nanogpt_jax.tokenizer import get_tokenizer, load_meta
from test_jax_transformer import one_device_mesh

DEFAULTS = {'count': 12, 'rate': 1e-3, 'flag': False, 'text': 'out'}


def configured(*args):
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(dict(DEFAULTS), args)


@given(st.sampled_from(sorted(DEFAULTS)), st.text())
def test_any_value_gets_the_type_of_the_default_or_is_refused_by_name(key, value):
    try:
        config, names = configured(f'--{key}={value}')
    except UserError as e:  # and no other exception, whatever the text
        assert key in str(e)
    else:
        assert type(config[key]) is type(DEFAULTS[key]) and names == {key}
        assert config | {key: DEFAULTS[key]} == DEFAULTS


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text())
def test_what_python_prints_is_read_back(count, rate, flag, text):
    config, _ = configured(f'--count={count}', f'--rate={rate!r}', f'--flag={flag}',
                           f'--text={text!r}')
    assert config == {'count': count, 'rate': rate, 'flag': flag, 'text': text}


@given(st.text().filter(lambda arg: arg.split('=')[0] not in DEFAULTS and arg != 'help'))
def test_any_argument_that_names_no_setting_is_a_user_error(arg):
    with pytest.raises(UserError):
        configured('--' + arg)


@given(st.integers(1, 50), st.integers(1, 10 ** 12), st.integers(0, 2 ** 32),
       st.integers(0, 2 ** 40))
def test_offsets_are_in_range_and_reproducible(n, n_offsets, seed, iter_num):
    offsets = utils.batch_offsets(n, n_offsets, seed, iter_num, utils.TRAIN)
    assert offsets.shape == (n,) and offsets.dtype == np.int64
    assert 0 <= offsets.min() and offsets.max() < n_offsets
    again = utils.batch_offsets(n, n_offsets, seed, iter_num, utils.TRAIN)
    np.testing.assert_array_equal(offsets, again)


@settings(max_examples=30, deadline=None)  # the first example initializes JAX
@given(st.lists(st.integers(0, 65535), min_size=2, max_size=200), st.integers(1, 200),
       st.integers(0, 9))
def test_sequences_are_consecutive_tokens_of_the_file(ids, block_size, iter_num):
    def read(folder):
        x, y = utils.get_train_batch(one_device_mesh(), folder, 3, 1, block_size, 0, iter_num)
        return np.asarray(x)[0], np.asarray(y)[0]
    with tempfile.TemporaryDirectory() as folder:
        np.array(ids, np.uint16).tofile(os.path.join(folder, 'train.bin'))
        assert utils.largest_token(os.path.join(folder, 'train.bin')) == max(ids)
        if len(ids) <= block_size:
            with pytest.raises(UserError, match='block_size'):
                read(folder)
            return
        x, y = read(folder)
    sequences = {tuple(ids[i:i + block_size + 1]) for i in range(len(ids) - block_size)}
    assert all((*seq, last) in sequences for seq, last in zip(x.tolist(), y[:, -1].tolist()))
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def test_the_token_check_notices_a_changed_file(tmp_path):
    path = str(tmp_path / 'train.bin')
    for ids in ([1, 2, 3], [1, 9, 3, 4]):
        np.array(ids, np.uint16).tofile(path)
        assert utils.largest_token(path) == max(ids) == utils.largest_token(path)
    stamp = os.stat(path)
    np.array([7, 7, 7, 7], np.uint16).tofile(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    # the same size and time: the cached answer, without reading the file again
    assert utils.largest_token(path) == 9


def test_the_token_check_reads_in_bounded_memory(tmp_path, monkeypatch):
    path = str(tmp_path / 'train.bin')
    ids = np.zeros(5 * 2 ** 24 // 2, np.uint16)  # two and a half chunks
    ids[-1] = 77
    ids.tofile(path)
    sizes, fromfile = [], np.fromfile

    def counted(*args, **kwargs):
        sizes.append(len(fromfile(*args, **kwargs)))
        return fromfile(*args, **kwargs)
    monkeypatch.setattr(np, 'fromfile', counted)
    assert utils.largest_token(path) == 77
    assert sum(sizes) == len(ids) and max(sizes) <= 2 ** 24


@given(st.lists(st.characters(codec='utf-8'), min_size=1, unique=True), st.data())
def test_characters_round_trip(chars, data):
    text = data.draw(st.text(alphabet=chars))
    encode, decode = get_tokenizer(chars)
    assert decode(encode(text)).decode() == text


@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_random_bytes_as_meta_are_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
            f.write(content)
        with pytest.raises(UserError, match='meta.pkl'):
            load_meta(folder)
