"""data/common.py, and the prepare scripts as processes on a copy of data/, without a network."""

import os
import pickle
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from helpers import ROOT, one_line_error, run

from nanogpt_jax.errors import UserError
from nanogpt_jax.tokenizer import gpt2_encoding

sys.path.insert(0, os.path.join(ROOT, 'data'))
import common

NO_NETWORK = {'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9',
              'no_proxy': '', 'NO_PROXY': ''}
TEXT = 'The cat, the caf\u00e9.\n\nROMEO:\n<|endoftext|> is text here.\n' * 9


@pytest.fixture
def data(tmp_path):
    """A copy of data/ without prepared files, beside nanogpt_jax as in the repository."""
    made = shutil.ignore_patterns('*.bin', '*.pkl', '*.tmp', 'input.txt', '__pycache__')
    os.symlink(os.path.join(ROOT, 'nanogpt_jax'), tmp_path / 'nanogpt_jax')
    return shutil.copytree(os.path.join(ROOT, 'data'), tmp_path / 'data', ignore=made)


def prepare(folder, cwd, **env):
    """The finished process of a folder's prepare.py."""
    return run(cwd, folder / 'prepare.py', **NO_NETWORK | {'PYTHONIOENCODING': 'utf-8'} | env)


def read_bins(folder):
    return [np.fromfile(folder / f'{split}.bin', dtype=np.uint16) for split in ('train', 'val')]


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise AssertionError(f'meta.pkl asks for {module}.{name}')


def read_meta(folder):
    with open(folder / 'meta.pkl', 'rb') as f:
        return PlainUnpickler(f).load()


@pytest.fixture
def gpt2(monkeypatch):
    """GPT-2's encoding, or a skipped test if its files are not cached: no test uses the network."""
    for key, value in NO_NETWORK.items():
        monkeypatch.setenv(key, value)
    try:
        return gpt2_encoding()
    except UserError as e:
        pytest.skip(str(e))


# -----------------------------------------------------------------------------
# common.py

def test_fetch_writes_the_bytes_unchanged_and_nothing_else(tmp_path):
    (tmp_path / 'source').write_bytes(b'a\r\nb\xff\n')
    common.fetch((tmp_path / 'source').as_uri(), str(tmp_path / 'input.txt'))
    assert (tmp_path / 'input.txt').read_bytes() == b'a\r\nb\xff\n'
    assert sorted(os.listdir(tmp_path)) == ['input.txt', 'source']


def test_a_connection_that_is_cut_leaves_no_file(tmp_path, monkeypatch):
    class Cut(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', '10')
            self.end_headers()
            self.wfile.write(b'half')

        def log_message(self, *args):
            pass

    monkeypatch.setenv('no_proxy', '*')
    with HTTPServer(('127.0.0.1', 0), Cut) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UserError, match='cannot download'):
            common.fetch(f'http://127.0.0.1:{server.server_port}/', str(tmp_path / 'input.txt'))
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / 'train.bin'
    path.write_bytes(b'old')
    with pytest.raises(KeyError), common.replacing(str(path)) as tmp:
        with open(tmp, 'wb') as f:
            f.write(b'half')
        raise KeyError
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['train.bin']


def test_read_text_refuses_other_encodings_than_utf8(tmp_path):
    (tmp_path / 'input.txt').write_bytes('caf\u00e9'.encode('latin-1'))
    with pytest.raises(UserError, match='input.txt is not UTF-8'):
        common.read_text(str(tmp_path / 'input.txt'))


def test_files_that_cannot_be_read_or_written_are_user_errors(tmp_path):
    (tmp_path / 'input.txt').mkdir()
    with pytest.raises(UserError, match='cannot read .*input.txt'):
        common.read_text(str(tmp_path / 'input.txt'))
    with pytest.raises(UserError, match='cannot write .*input.txt'):
        common.write_bin(str(tmp_path / 'input.txt'), [1])
    assert os.listdir(tmp_path) == ['input.txt']


def test_a_text_too_short_for_two_splits_is_refused():
    with pytest.raises(UserError, match='1 characters, too few'):
        common.split_text('a')
    assert common.split_text('ab') == ('a', 'b')


def test_write_bin_writes_little_endian_uint16(tmp_path):
    common.write_bin(str(tmp_path / 'a.bin'), [0, 1, 65535])
    assert (tmp_path / 'a.bin').read_bytes() == b'\x00\x00\x01\x00\xff\xff'


@pytest.mark.parametrize('bad', [65536, -1])
def test_write_bin_refuses_ids_outside_uint16(tmp_path, bad):
    with pytest.raises(UserError, match=f'{bad}.*uint16'):
        common.write_bin(str(tmp_path / 'a.bin'), [5, bad])
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# shakespeare_char, shakespeare

def test_characters_round_trip_and_are_split_in_order(data, tmp_path):
    folder = data / 'shakespeare_char'
    (folder / 'input.txt').write_text(TEXT, encoding='utf-8', newline='')
    result = prepare(folder, tmp_path)
    assert result.returncode == 0, result.stderr

    meta = read_meta(folder)
    train, val = read_bins(folder)
    chars = sorted(set(TEXT))
    assert meta == {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                    'stoi': {c: i for i, c in enumerate(chars)}}
    assert len(train) == int(len(TEXT) * 0.9)
    assert ''.join(meta['itos'][i] for i in [*train.tolist(), *val.tolist()]) == TEXT
    lines = result.stdout.splitlines()
    assert lines[0] == f'length of dataset in characters: {len(TEXT):,}'
    assert lines[-3:] == [f'vocab size: {len(chars)}', f'train has {len(train):,} tokens',
                          f'val has {len(val):,} tokens']


def test_each_split_has_the_gpt2_tokens_of_its_text(data, tmp_path, gpt2):
    folder = data / 'shakespeare'
    (folder / 'input.txt').write_text(TEXT, encoding='utf-8', newline='')
    result = prepare(folder, tmp_path)
    assert result.returncode == 0, result.stderr

    n = int(len(TEXT) * 0.9)
    train, val = (ids.tolist() for ids in read_bins(folder))
    assert train == gpt2.encode_ordinary(TEXT[:n]) and val == gpt2.encode_ordinary(TEXT[n:])
    assert result.stdout.splitlines() == [f'train has {len(train):,} tokens',
                                          f'val has {len(val):,} tokens']
    assert not (folder / 'meta.pkl').exists()  # without it sample_jax.py decodes GPT-2's tokens


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare'])
def test_a_failed_download_is_one_line_and_leaves_no_file(data, tmp_path, name):
    before = sorted(os.listdir(data / name))
    result = prepare(data / name, tmp_path)
    one_line_error(result, common.tinyshakespeare_url, str(data / name / 'input.txt'), alone=True)
    assert sorted(os.listdir(data / name)) == before


def test_an_existing_input_is_used_and_not_changed(data, tmp_path):
    path = data / 'shakespeare_char' / 'input.txt'
    path.write_text('my own text\n')
    stamp = path.stat().st_mtime_ns
    assert prepare(path.parent, tmp_path).returncode == 0  # a download would fail here
    assert path.read_text() == 'my own text\n' and path.stat().st_mtime_ns == stamp


def test_a_tokenizer_that_cannot_be_downloaded_names_the_cache_folder(data, tmp_path):
    pytest.importorskip('tiktoken')
    folder = data / 'shakespeare'
    (folder / 'input.txt').write_text(TEXT, encoding='utf-8')
    result = prepare(folder, tmp_path, TIKTOKEN_CACHE_DIR=str(tmp_path / 'empty'))
    one_line_error(result, 'TIKTOKEN_CACHE_DIR', alone=True)
    assert not (folder / 'train.bin').exists()


@pytest.mark.parametrize('name, module', [('shakespeare', 'tiktoken'), ('openwebtext', 'datasets')])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(
        data, tmp_path, name, module):
    (data / name / 'input.txt').write_text('text')
    (tmp_path / f'{module}.py').write_text(f'raise ImportError("No module named {module}")')
    result = prepare(data / name, tmp_path, PYTHONPATH=str(tmp_path))
    one_line_error(result, f'pip install {module}', alone=True)


# -----------------------------------------------------------------------------
# pydoc_char

def test_pydoc_is_prepared_without_a_network_and_all_of_its_ids_occur(data, tmp_path):
    # stdout in ASCII cannot have all characters that the script prints
    result = prepare(data / 'pydoc_char', tmp_path, PYTHONIOENCODING='ascii')
    assert result.returncode == 0, result.stderr
    meta = read_meta(data / 'pydoc_char')
    ids = np.concatenate(read_bins(data / 'pydoc_char'))
    assert np.array_equal(np.unique(ids), np.arange(meta['vocab_size']))

    from pydoc_data.topics import topics
    text = ''.join(meta['itos'][i] for i in ids.tolist())
    assert text == '\n\n'.join(topics[key] for key in sorted(topics))
