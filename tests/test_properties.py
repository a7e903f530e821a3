"""Properties of the configurator, batches and meta.pkl, tested by hypothesis."""

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
from nanogpt_jax.tokenizer import load_vocabulary
from test_jax_transformer import layout_of, one_device_mesh

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


@given(st.integers(-2 ** 63, 2 ** 63 - 1), st.floats(allow_nan=False, allow_infinity=False),
       st.booleans(), st.text(st.characters(codec='utf-8', exclude_characters='\0')))
def test_what_python_prints_is_read_back(count, rate, flag, text):
    config, _ = configured(f'--count={count}', f'--rate={rate!r}', f'--flag={flag}',
                           f'--text={text!r}')
    assert config == {'count': count, 'rate': rate, 'flag': flag, 'text': text}


@given(st.text().filter(lambda arg: arg.split('=')[0] not in DEFAULTS and arg != 'help'))
def test_any_argument_that_names_no_setting_is_a_user_error(arg):
    with pytest.raises(UserError):
        configured('--' + arg)


@settings(max_examples=30, deadline=None)  # the first example initializes JAX
@given(st.lists(st.integers(0, 65535), min_size=2, max_size=200), st.integers(1, 200),
       st.integers(0, 9))
def test_sequences_are_consecutive_tokens_of_the_file(ids, block_size, iter_num):
    def read(folder):
        layout = layout_of(one_device_mesh(), 3)
        batches = utils.Batches(layout, folder, block_size, 2 ** 16, 0, 1, 3)
        return tuple(np.asarray(a)[0] for a in batches.train(iter_num))
    with tempfile.TemporaryDirectory() as folder:
        np.array(ids, np.uint16).tofile(os.path.join(folder, 'train.bin'))
        if len(ids) <= block_size:
            with pytest.raises(UserError, match='block_size'):
                read(folder)
            return
        x, y = read(folder)
    sequences = {tuple(ids[i:i + block_size + 1]) for i in range(len(ids) - block_size)}
    assert all((*seq, last) in sequences for seq, last in zip(x.tolist(), y[:, -1].tolist()))
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_as_meta_are_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
            f.write(content)
        with pytest.raises(UserError, match='meta.pkl'):
            load_vocabulary(folder)
