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
from nanogpt_jax.tokenizer import gpt2_encoding, load_vocabulary, make_tokenizer

sys.path.insert(0, os.path.join(ROOT, 'data'))
import common

NO_NETWORK = {'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9',
              'no_proxy': '', 'NO_PROXY': ''}
TEXT = 'The cat, the caf\u00e9.\n\nROMEO:\n<|endoftext|> is text here.\n' * 9


@pytest.fixture
def data(tmp_path):
    """A copy of data/ without prepared files, beside the code as in the repository."""
    made = shutil.ignore_patterns('*.bin', '*.pkl', 'tokenizer.json', '*.tmp', '*.lock',
                                  'input.txt', '__pycache__')
    for name in ('nanogpt_jax', 'configurator.py'):
        os.symlink(os.path.join(ROOT, name), tmp_path / name)
    return shutil.copytree(os.path.join(ROOT, 'data'), tmp_path / 'data', ignore=made)


def prepare(folder, **env):
    """The finished process of a folder's prepare.py."""
    return run(folder.parent, str(folder / 'prepare.py'),
               **NO_NETWORK | {'PYTHONIOENCODING': 'utf-8'} | env)


def read_bins(folder):
    return [np.fromfile(folder / f'{split}.bin', dtype=np.uint16) for split in ('train', 'val')]


def pydoc_text():
    from pydoc_data.topics import topics
    return '\n\n'.join(topics[key] for key in sorted(topics))


# -----------------------------------------------------------------------------
# common.py

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
        url = f'http://127.0.0.1:{server.server_port}/'
        with pytest.raises(UserError, match=f'cannot download {url}.* by hand to .*input.txt'):
            common.fetch(url, str(tmp_path / 'input.txt'))
    assert os.listdir(tmp_path) == []
    (tmp_path / 'source').write_bytes(b'a\r\nb\xff\n')
    common.fetch((tmp_path / 'source').as_uri(), str(tmp_path / 'input.txt'))
    assert (tmp_path / 'input.txt').read_bytes() == b'a\r\nb\xff\n'


def test_a_failed_write_keeps_the_old_files_and_leaves_no_other(tmp_path):
    common.write_splits(tmp_path, [0, 1, 65535], [7])
    assert (tmp_path / 'train.bin').read_bytes() == b'\x00\x00\x01\x00\xff\xff'
    with pytest.raises(AttributeError):  # meta.pkl, the last file, cannot be pickled
        common.write_splits(tmp_path, [2], [2], meta={'stoi': lambda: 0})
    for ids in ([5, 65536], [5, -1]):
        with pytest.raises(UserError, match=f'{ids[1]}.*uint16'):
            common.write_splits(tmp_path, [2], ids)
    assert [ids.tolist() for ids in read_bins(tmp_path)] == [[0, 1, 65535], [7]]
    assert sorted(os.listdir(tmp_path)) == ['train.bin', 'val.bin']


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path):
    with common.locked(tmp_path):
        with pytest.raises(UserError, match=f'another process is preparing {tmp_path}'):
            with common.locked(tmp_path):
                raise AssertionError
    with common.locked(tmp_path), pytest.raises(UserError, match='cannot prepare .*start again'):
        with common.locked(tmp_path / 'out'):
            raise OSError('No space left on device')


def test_texts_that_cannot_be_prepared_are_user_errors(tmp_path):
    (tmp_path / 'input.txt').write_bytes('caf\u00e9'.encode('latin-1'))
    with pytest.raises(UserError, match='input.txt is not UTF-8'):
        common.read_text(tmp_path / 'input.txt')
    with pytest.raises(UserError, match='is not a file'):
        common.read_text('/dev/zero')  # which never ends
    with pytest.raises(UserError, match='1 characters, too few'):
        common.split_text('a')
    assert common.split_text('ab') == ('a', 'b')


# -----------------------------------------------------------------------------
# the scripts

def test_characters_round_trip_and_are_split_in_order(data):
    folder = data / 'shakespeare_char'
    (folder / 'input.txt').write_text(TEXT, encoding='utf-8', newline='')
    result = prepare(folder)
    assert result.returncode == 0, result.stderr

    train, val = read_bins(folder)
    chars = sorted(set(TEXT))
    assert pickle.loads((folder / 'meta.pkl').read_bytes()) == {
        'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
        'stoi': {c: i for i, c in enumerate(chars)}}
    assert len(train) == int(len(TEXT) * 0.9)
    assert ''.join(chars[i] for i in [*train.tolist(), *val.tolist()]) == TEXT
    lines = result.stdout.splitlines()
    assert lines[0] == f'length of dataset in characters: {len(TEXT):,}'
    assert lines[-3:] == [f'vocab size: {len(chars)}', f'train has {len(train):,} tokens',
                          f'val has {len(val):,} tokens']


def test_pydoc_is_prepared_without_a_network_and_all_of_its_ids_occur(data):
    # stdout in ASCII cannot have all characters that the script prints
    result = prepare(data / 'pydoc_char', PYTHONIOENCODING='ascii')
    assert result.returncode == 0, result.stderr
    n, chars = load_vocabulary(str(data / 'pydoc_char'))
    ids = np.concatenate(read_bins(data / 'pydoc_char'))
    assert np.array_equal(np.unique(ids), np.arange(n))
    assert ''.join(chars[i] for i in ids.tolist()) == pydoc_text()


def test_pydoc_is_prepared_with_a_tokenizer_of_its_own(data):
    result = prepare(data / 'pydoc')
    assert result.returncode == 0, result.stderr
    n, text = load_vocabulary(str(data / 'pydoc'))
    tokenizer, _ = make_tokenizer(text, 'tokenizer.json')
    ids = np.concatenate(read_bins(data / 'pydoc'))
    assert n == 1024 and tokenizer.decode(ids.tolist()) == pydoc_text()


@pytest.mark.slow
def test_each_split_has_the_gpt2_tokens_of_its_text(data, monkeypatch):
    for key, value in NO_NETWORK.items():  # no test uses the network
        monkeypatch.setenv(key, value)
    folder = data / 'shakespeare'
    (folder / 'input.txt').write_text(TEXT, encoding='utf-8', newline='')
    result = prepare(folder)
    try:
        gpt2 = gpt2_encoding()
    except UserError as e:
        one_line_error(result, 'TIKTOKEN_CACHE_DIR', alone=True)
        pytest.skip(str(e))
    assert result.returncode == 0, result.stderr
    n = int(len(TEXT) * 0.9)
    train, val = (ids.tolist() for ids in read_bins(folder))
    assert train == gpt2.encode_ordinary(TEXT[:n]) and val == gpt2.encode_ordinary(TEXT[n:])
    assert not (folder / 'meta.pkl').exists()  # without it sample_jax.py decodes GPT-2's tokens


@pytest.mark.slow
@pytest.mark.parametrize('name, module', [('shakespeare', 'tiktoken'), ('openwebtext', 'datasets')])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(data, name, module):
    (data / name / 'input.txt').write_text('text')
    (data / f'{module}.py').write_text(f'raise ImportError("No module named {module}")')
    one_line_error(prepare(data / name, PYTHONPATH=str(data)), f'pip install {module}', alone=True)
