"""The prepare scripts, run as a user runs them, on copies of data/ and without a network."""
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(root, 'data'))
import common

no_network = {'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9', 'no_proxy': '', 'NO_PROXY': ''}
text = 'The cat, the caf\u00e9.\n\nROMEO:\n<|endoftext|> is text here.\n' * 9


@pytest.fixture
def data(tmp_path):
    """A copy of data/ without what may have been prepared there."""
    made = shutil.ignore_patterns('*.bin', '*.pkl', '*.tmp', 'input.txt', '__pycache__')
    return shutil.copytree(os.path.join(root, 'data'), tmp_path / 'data', ignore=made)


def prepare(folder, cwd, *flags, **env):
    command = [sys.executable, os.path.join(folder, 'prepare.py'), *flags]
    env = {**os.environ, **no_network, 'PYTHONIOENCODING': 'utf-8', **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding='utf-8')


def assert_one_line_error(result, *words):
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


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
    """GPT-2's encoding where its files are cached; the network is kept out, so that a test never waits for it."""
    for key, value in no_network.items():
        monkeypatch.setenv(key, value)
    try:
        return common.gpt2_encoding()
    except SystemExit as e:
        pytest.skip(str(e))


# -----------------------------------------------------------------------------
# common.py

def test_fetch_downloads_the_bytes_as_they_are(tmp_path):
    (tmp_path / 'source').write_bytes(b'a\r\nb\xff\n')
    common.fetch((tmp_path / 'source').as_uri(), str(tmp_path / 'input.txt'))
    assert (tmp_path / 'input.txt').read_bytes() == b'a\r\nb\xff\n'
    assert sorted(os.listdir(tmp_path)) == ['input.txt', 'source']


def test_a_connection_cut_half_way_leaves_no_file(tmp_path, monkeypatch):
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
        with pytest.raises(SystemExit, match='cannot download'):
            common.fetch(f'http://127.0.0.1:{server.server_port}/', str(tmp_path / 'input.txt'))
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / 'train.bin'
    path.write_bytes(b'old')
    with pytest.raises(KeyError), common.replacing(str(path)) as tmp:
        with open(tmp, 'wb') as f:
            f.write(b'half')
        raise KeyError
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['train.bin']


def test_read_text_refuses_what_is_not_utf8(tmp_path):
    (tmp_path / 'input.txt').write_bytes('caf\u00e9'.encode('latin-1'))
    with pytest.raises(SystemExit, match='input.txt is not UTF-8'):
        common.read_text(str(tmp_path / 'input.txt'))


def test_write_bin_round_trips_all_of_uint16(tmp_path):
    common.write_bin(str(tmp_path / 'a.bin'), [0, 1, 65535])
    assert (tmp_path / 'a.bin').read_bytes() == b'\x00\x00\x01\x00\xff\xff'


@pytest.mark.parametrize('bad', [65536, -1])
def test_write_bin_refuses_ids_outside_uint16(tmp_path, bad):
    with pytest.raises(SystemExit, match=f'{bad}.*uint16'):
        common.write_bin(str(tmp_path / 'a.bin'), [5, bad])
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# shakespeare_char, shakespeare

def test_characters_round_trip_and_split_in_order(data, tmp_path):
    folder = data / 'shakespeare_char'
    (folder / 'input.txt').write_text(text, encoding='utf-8', newline='')
    result = prepare(folder, tmp_path)
    assert result.returncode == 0, result.stderr

    meta = read_meta(folder)
    train, val = read_bins(folder)
    chars = sorted(set(text))
    assert meta == {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    assert len(train) == int(len(text) * 0.9)
    assert ''.join(meta['itos'][i] for i in [*train.tolist(), *val.tolist()]) == text
    assert result.stdout.splitlines()[0] == f'length of dataset in characters: {len(text):,}'
    assert result.stdout.splitlines()[-3:] == [
        f'vocab size: {len(chars)}', f'train has {len(train):,} tokens', f'val has {len(val):,} tokens']


def test_gpt2_tokens_are_those_of_each_part_of_the_text(data, tmp_path, gpt2):
    folder = data / 'shakespeare'
    (folder / 'input.txt').write_text(text, encoding='utf-8', newline='')
    result = prepare(folder, tmp_path)
    assert result.returncode == 0, result.stderr

    n = int(len(text) * 0.9)
    train, val = (ids.tolist() for ids in read_bins(folder))
    assert train == gpt2.encode_ordinary(text[:n]) and val == gpt2.encode_ordinary(text[n:])
    assert result.stdout.splitlines() == [f'train has {len(train):,} tokens', f'val has {len(val):,} tokens']
    assert not (folder / 'meta.pkl').exists()  # its absence is what tells a sampler to decode with GPT-2's tokens


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare'])
def test_a_failed_download_is_one_line_and_leaves_nothing(data, tmp_path, name):
    before = sorted(os.listdir(data / name))
    result = prepare(data / name, tmp_path)
    assert_one_line_error(result, common.tinyshakespeare_url, str(data / name / 'input.txt'))
    assert sorted(os.listdir(data / name)) == before


def test_an_input_that_is_there_is_left_alone(data, tmp_path):
    path = data / 'shakespeare_char' / 'input.txt'
    path.write_text('my own text\n')
    stamp = path.stat().st_mtime_ns
    assert prepare(path.parent, tmp_path).returncode == 0  # a download would fail here
    assert path.read_text() == 'my own text\n' and path.stat().st_mtime_ns == stamp


def test_tokenizer_out_of_reach_names_the_cache_folder(data, tmp_path):
    pytest.importorskip('tiktoken')
    folder = data / 'shakespeare'
    (folder / 'input.txt').write_text(text, encoding='utf-8')
    result = prepare(folder, tmp_path, TIKTOKEN_CACHE_DIR=str(tmp_path / 'empty'))
    assert_one_line_error(result, 'TIKTOKEN_CACHE_DIR')
    assert not (folder / 'train.bin').exists()


@pytest.mark.parametrize('name, module', [('shakespeare', 'tiktoken'), ('openwebtext', 'datasets')])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(data, tmp_path, name, module):
    (data / name / 'input.txt').write_text('text')
    (tmp_path / f'{module}.py').write_text(f'raise ImportError("No module named {module}")')
    assert_one_line_error(prepare(data / name, tmp_path, PYTHONPATH=str(tmp_path)), f'pip install {module}')


# -----------------------------------------------------------------------------
# pydoc_char

def test_pydoc_needs_no_network_and_its_ids_are_its_vocabulary(data, tmp_path):
    # an ascii terminal cannot print all its characters: that must not matter
    result = prepare(data / 'pydoc_char', tmp_path, PYTHONIOENCODING='ascii')
    assert result.returncode == 0, result.stderr
    meta = read_meta(data / 'pydoc_char')
    ids = np.concatenate(read_bins(data / 'pydoc_char'))
    assert np.array_equal(np.unique(ids), np.arange(meta['vocab_size']))

    from pydoc_data.topics import topics
    whole = ''.join(meta['itos'][i] for i in ids.tolist())
    assert whole == '\n\n'.join(topics[key] for key in sorted(topics))
