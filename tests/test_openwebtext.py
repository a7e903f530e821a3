"""data/openwebtext/prepare.py, and the loop under it in data/common.py; with a tokenizer made here, but for one test."""
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import numpy as np
import pytest
import tiktoken

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, 'data', 'openwebtext', 'prepare.py')
sys.path.insert(0, os.path.join(ROOT, 'data'))
import common


def tiny_encoding(name='tiny', more=()):
    """A byte-level encoding with GPT-2's way of cutting words and a few merges, which needs no files."""
    merges = [b'th', b'the', b' the', b'in', b' w', b'or', b' wor', *more]
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + merges)}
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding(name, pat_str=words, mergeable_ranks=ranks, special_tokens={'<|endoftext|>': len(ranks)})


TINY = tiny_encoding()
DOCS = [f'document {i}: the words in it,' + ' the word' * (i % 7) + ' caf\u00e9 \U0001f600\n' for i in range(150)]
DOCS[3:6] = ['', '<|endoftext|> is text here', ' ' * 3000 + 'a' * 3000]


def plain(texts, enc=TINY):
    """The bytes that a file must have: one document after the other, each ended."""
    return np.array([t for text in texts for t in [*enc.encode_ordinary(text), enc.eot_token]], dtype=np.uint16).tobytes()


def write(folder, train=DOCS, val=DOCS[:9], source='here', num_proc=2, enc=TINY):
    common.write_documents(str(folder), {'val': val, 'train': train}, enc, source, num_proc)
    assert sorted(os.listdir(folder)) == ['train.bin', 'val.bin']
    return (folder / 'train.bin').read_bytes(), (folder / 'val.bin').read_bytes()


# -----------------------------------------------------------------------------
# common.write_documents

@pytest.mark.parametrize('num_proc', [1, 3])
def test_the_bytes_are_those_of_a_sequential_loop(tmp_path, num_proc, capsys):
    assert write(tmp_path / 'new', num_proc=num_proc) == (plain(DOCS), plain(DOCS[:9]))
    assert f'train has {len(plain(DOCS)) // 2:,} tokens from 150 documents' in capsys.readouterr().out


def test_a_tokenizer_that_does_not_fit_uint16_is_refused(tmp_path):
    large = tiktoken.Encoding('large', pat_str='.', mergeable_ranks={b'a': 0}, special_tokens={'<|endoftext|>': 65536})
    with pytest.raises(SystemExit, match='ids of large run to 65536'):
        write(tmp_path, enc=large)
    assert os.listdir(tmp_path) == []


def test_no_more_than_the_look_ahead_is_computed_before_it_is_taken():
    submitted = []

    class Pool:
        def submit(self, function, item):
            submitted.append(item)
            future = Future()
            future.set_result(function(item))
            return future

    for taken, result in enumerate(common.map_in_order(Pool(), lambda i: i * i, range(100), ahead=5)):
        assert result == taken * taken and len(submitted) <= taken + 6
    assert submitted == list(range(100))


# before a piece of code: a tokenize that waits at a document with 'wait here' until a file named go appears, or a minute
WAIT = f"""
import os, sys, time
sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
from test_openwebtext import *
common.gpt2_encoding, common.save_seconds = tiny_encoding, -1
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it as ignored
tokenize = common.tokenize
def wait(texts, enc):
    end = time.monotonic() + 60
    while any('wait here' in text for text in texts) and not os.path.exists('go') and time.monotonic() < end:
        time.sleep(0.01)
    return tokenize(texts, enc)
common.tokenize = wait
"""


def start(folder, code, *args):
    env = {**os.environ, 'HF_HOME': str(folder / 'hf'), 'HF_HUB_OFFLINE': '1'}
    return subprocess.Popen([sys.executable, '-c', WAIT + code, *args], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_progress(process, path, documents):
    """Returns once so many documents are done, and saved."""
    while not (os.path.exists(path) and json.loads(path.read_text())['documents'] >= documents):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


WRITE = 'common.write_documents("out", {"val": DOCS[:9], "train": DOCS[:100] + ["wait here"] + DOCS}, TINY, "here", 2)'
WAITING = DOCS[:100] + ['wait here'] + DOCS
BEFORE = 100 // common.rows * common.rows  # documents in whole chunks before the one that waits


class Asked(list):
    """Documents that keep which slices they were asked for."""

    def __init__(self, texts):
        super().__init__(texts)
        self.slices = []

    def __getitem__(self, rows):
        self.slices.append(rows)
        return super().__getitem__(rows)


def killed(folder):
    """folder/out as SIGKILL leaves it, among the documents of train."""
    process = start(folder, WRITE)
    wait_for_progress(process, folder / 'out' / 'train.bin.progress.tmp', BEFORE)
    process.kill()
    process.communicate()
    assert sorted(os.listdir(folder / 'out')) == [
        'train.bin.progress.tmp', 'train.bin.tmp', 'val.bin.progress.tmp', 'val.bin.tmp']
    return folder / 'out'


def test_a_killed_start_is_gone_on_with_and_the_bytes_are_the_same(tmp_path, capsys):
    out = killed(tmp_path)
    with open(out / 'train.bin.tmp', 'ab') as f:
        f.write(b'what came after the last save')
    train = Asked(WAITING)
    assert write(out, train) == (plain(WAITING), plain(DOCS[:9]))
    assert f'train.bin.tmp has {BEFORE} documents: going on after them' in capsys.readouterr().out
    assert min(rows.start for rows in train.slices) == BEFORE
    assert all(rows.stop - rows.start <= common.rows for rows in train.slices)


@pytest.mark.parametrize('other', ['source', 'number', 'tokenizer'])
def test_a_killed_start_of_something_else_is_not_gone_on_with(tmp_path, capsys, other):
    out = killed(tmp_path)
    source = 'there' if other == 'source' else 'here'
    train = WAITING[:-1] if other == 'number' else WAITING
    enc = tiny_encoding('other', [b'do']) if other == 'tokenizer' else TINY
    assert write(out, train, source=source, enc=enc)[0] == plain(train, enc)
    assert 'train.bin.tmp was made from other documents: starting anew' in capsys.readouterr().out


def test_progress_that_the_tokens_do_not_bear_out_is_not_believed(tmp_path):
    out = killed(tmp_path)
    os.truncate(out / 'train.bin.tmp', 5)  # a power cut
    (out / 'val.bin.progress.tmp').write_text('')
    assert write(out, WAITING) == (plain(WAITING), plain(DOCS[:9]))


def test_old_files_stay_until_the_new_ones_are_whole(tmp_path):
    out = tmp_path / 'out'
    old = write(out, DOCS[:7])
    process = start(tmp_path, WRITE)
    wait_for_progress(process, out / 'train.bin.progress.tmp', BEFORE)
    assert ((out / 'train.bin').read_bytes(), (out / 'val.bin').read_bytes()) == old
    (tmp_path / 'go').touch()
    assert process.wait(60) == 0
    assert (out / 'train.bin').read_bytes() == plain(WAITING)


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    process = start(tmp_path, WRITE)
    wait_for_progress(process, tmp_path / 'out' / 'train.bin.progress.tmp', BEFORE)
    with pytest.raises(SystemExit, match='another process is writing .*train.bin.tmp'):
        write(tmp_path / 'out', WAITING)
    (tmp_path / 'go').touch()
    assert process.wait(60) == 0
    assert (tmp_path / 'out' / 'train.bin').read_bytes() == plain(WAITING)


def test_a_full_disk_is_one_line_and_costs_no_work(tmp_path, capsys):
    (tmp_path / 'go').touch()
    ends = np.cumsum([len(plain([text])) for text in WAITING])
    limit = int(ends[-1]) // 4 * 3  # of bytes in a file
    full = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n'
    process = start(tmp_path, full + 'common.rows = 1\n' + WRITE)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r'stopped \(\[Errno \d+\] File too large\): .*start again.*\n', error)
    write(tmp_path / 'out', WAITING)
    assert f'train.bin.tmp has {sum(ends <= limit)} documents: going on' in capsys.readouterr().out


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    code = """
class Texts(list):  # 50 kB each, the first one slow
    def __getitem__(self, rows):
        if rows.start == 0:
            time.sleep(1)
        return ['x' * 50000] * len(range(len(self))[rows])
class Encoding:
    name, max_token_value, eot_token = 'bytes', 255, 0
    def encode_to_numpy(self, text, disallowed_special):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
def peak():
    with open('/proc/self/status') as f:
        return int(re.search(r'VmHWM:\\s+(\\d+) kB', f.read())[1]) / 1000
before = peak()
common.write_documents('out', {'train': Texts([0] * 3000)}, Encoding(), 'here', 2)
print(peak() - before)
"""
    out, error = start(tmp_path, code).communicate(timeout=60)
    assert not error and os.path.getsize(tmp_path / 'out' / 'train.bin') == 3000 * 50001 * 2
    # MB; the tokens are 300 of them. In memory: 2 chunks of 16 documents in work, 4 that wait, 4 bytes a token, and copies
    assert float(out.splitlines()[-1]) < 100


# -----------------------------------------------------------------------------
# prepare.py, where the datasets package is installed

@pytest.fixture
def script(tmp_path, monkeypatch):
    """prepare.py as a module, with the tokenizer made here, and datasets' cache in tmp_path."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf'))
    spec = importlib.util.spec_from_file_location('openwebtext', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'gpt2_encoding', tiny_encoding)
    monkeypatch.chdir(tmp_path)

    def prepare(*flags):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *flags])
        module.main()
    module.prepare = prepare
    return module


def split(docs, share=0.0005):
    """(train, val) as nanoGPT's train_test_split(test_size=0.0005, seed=2357, shuffle=True) has them, by its definition."""
    order = np.random.default_rng(2357).permutation(len(docs))
    docs, n = [docs[i] for i in order], math.ceil(len(docs) * share)
    return docs[n:], docs[:n]


def made(folder):
    return [(folder / f'{split}.bin').read_bytes() for split in ('train', 'val')]


def write_files(folder, ending, docs=DOCS):
    """docs as local files, whose order is that of their names."""
    folder.mkdir()
    if ending == 'txt':
        for i, doc in enumerate(docs):
            (folder / f'{i:04}.txt').write_text(doc, encoding='utf-8')
        return
    for name, part, other in (('a', docs[:60], 1), ('b', docs[60:], 'a')):  # a column beside the text, of two types
        if ending == 'jsonl':
            lines = [json.dumps({'id': other, 'text': doc}, ensure_ascii=name == 'a') + '\n' for doc in part]
            (folder / f'{name}.jsonl').write_text(''.join(lines), encoding='utf-8')
        else:
            pa = pytest.importorskip('pyarrow')
            pytest.importorskip('pyarrow.parquet').write_table(
                pa.table({'id': [other] * len(part), 'text': part}), folder / f'{name}.parquet', row_group_size=7)


@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'txt'])
def test_local_files_give_the_bytes_of_a_sequential_loop_in_nanogpts_order(tmp_path, script, ending):
    write_files(tmp_path / 'in', ending)
    script.prepare(f'--input=in/*.{ending}', '--out_dir=out', '--num_proc=3')
    assert made(tmp_path / 'out') == [plain(part) for part in split(DOCS)]


def test_several_patterns_a_share_and_a_column_can_be_chosen(tmp_path, script):
    (tmp_path / 'a[1].jsonl').write_text(''.join(json.dumps({'text': 0, 'body': doc}) + '\n' for doc in DOCS[:50]))
    (tmp_path / 'b.jsonl').write_text(''.join(json.dumps({'body': doc}) + '\n' for doc in DOCS[50:]))
    script.prepare('--input=b.jsonl,*.jsonl', '--text_column=body', '--out_dir=out', '--val_share=0.1')
    assert made(tmp_path / 'out') == [plain(part) for part in split(DOCS[50:] + DOCS[:50], 0.1)]


def test_the_hubs_corpus_is_split_as_nanogpt_splits_it(tmp_path, script, monkeypatch, capsys):
    docs = [f'{i} <|endoftext|>' + ' word' * (i % 5) for i in range(2001)]
    corpus = script.datasets.Dataset.from_dict({'text': docs, 'url': docs})
    asked = {}

    def load_dataset(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return corpus

    monkeypatch.setattr(script.datasets, 'load_dataset', load_dataset)
    script.prepare('--num_proc=2', '--revision=refs/pr/22', '--out_dir=out')
    assert asked == {'repo': script.repo, 'revision': 'refs/pr/22', 'split': 'train', 'num_proc': 2}
    assert 'warning: 2,001 documents where the whole corpus has 8,013,769' in capsys.readouterr().out
    parts = corpus.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert made(tmp_path / 'out') == [plain(parts[name]['text']) for name in ('train', 'test')]
    assert list(split(docs)) == [list(parts[name]['text']) for name in ('train', 'test')]


def test_the_tokens_are_gpt2s(tmp_path, script, monkeypatch):
    monkeypatch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')  # no network: a test never waits for it
    try:
        gpt2 = common.gpt2_encoding()
    except SystemExit as e:
        pytest.skip(str(e))
    monkeypatch.setattr(script, 'gpt2_encoding', common.gpt2_encoding)
    write_files(tmp_path / 'in', 'jsonl')
    script.prepare('--input=in/*.jsonl', '--out_dir=out')
    assert made(tmp_path / 'out') == [plain(part, gpt2) for part in split(DOCS)]


def test_openwebtext_goes_to_the_scripts_folder(script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['prepare.py'])
    assert script.parse_flags().out_dir == os.path.dirname(SCRIPT)


# prepare.py in a process of its own, as WAIT has it
RUN = f'import runpy; sys.argv[0] = "prepare.py"; runpy.run_path({SCRIPT!r}, run_name="__main__")'
WAITS = ['--input=in/*.jsonl', '--out_dir=out', '--num_proc=2', '--val_share=0.02']


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path, script, capsys):
    write_files(tmp_path / 'in', 'jsonl', WAITING)
    n = split(WAITING, 0.02)[0].index('wait here') // common.rows * common.rows
    assert n > 0
    process = start(tmp_path, RUN, *WAITS)
    wait_for_progress(process, tmp_path / 'out' / 'train.bin.progress.tmp', n)
    process.send_signal(signal.SIGINT)
    (tmp_path / 'go').touch()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == 'stopped; the same command goes on from there\n'
    shutil.copytree(tmp_path / 'out', tmp_path / 'copy')

    process = start(tmp_path, RUN, *WAITS)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ''  # no bar where there is no terminal
    assert int(re.search(r'train.bin.tmp has (\d+) documents: going on after them', out)[1]) >= n
    assert made(tmp_path / 'out') == [plain(part) for part in split(WAITING, 0.02)]

    script.prepare(*WAITS)
    assert 'going on' not in capsys.readouterr().out  # what is complete is made again, as nanoGPT does
    (tmp_path / 'in' / 'b.jsonl').touch()
    script.prepare(*WAITS, '--out_dir=copy')
    assert 'train.bin.tmp was made from other documents: starting anew' in capsys.readouterr().out
    assert made(tmp_path / 'copy') == made(tmp_path / 'out')


BAD = {  # what stands in a file, and what must stand in the answer
    'broken.jsonl': ('{"text": "a"}\n{"text": "b"\n', ['broken.jsonl', 'Missing a comma', 'row 1']),
    'empty.jsonl': ('', ['empty.jsonl', 'no documents']),
    'null.jsonl': ('{"text": "a"}\n{"text": null}\n', ['null.jsonl', "column 'text'", '1 nulls']),
    'number.jsonl': ('{"text": 1}\n{"text": 2}\n', ['number.jsonl', "column 'text'", 'int64']),
    'other.jsonl': ('{"content": "a", "url": "b"}\n', ["no column 'text'", "['content', 'url']", '--text_column=']),
    'latin.jsonl': ('{"text": "caf\u00e9"}\n', ['latin.jsonl', 'UTF8']),
    'surrogate.jsonl': ('{"text": "\\ud83d"}\n', ['surrogate.jsonl', 'surrogate pair']),
    'latin.txt': ('caf\u00e9', ['latin.txt is not UTF-8']),
    'broken.parquet': ('no parquet', ['broken.parquet', 'Parquet']),
    'one.txt': ('a single text', ['--val_share=0.0005 of 1 documents', 'data/shakespeare/prepare.py']),
    'a.csv': ('text\n', ['.jsonl, .parquet, .txt', "'.csv'"]),
    'a.txt,a.csv': ('text\n', ["'.csv', '.txt'"]),
}


@pytest.mark.parametrize('name', BAD)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, script, name):
    for path in name.split(','):
        (tmp_path / path).write_bytes(BAD[name][0].encode('latin-1'))
    with pytest.raises(SystemExit) as e:
        script.prepare(f'--input={name}', '--out_dir=out')
    assert '\n' not in str(e.value) and all(words in str(e.value) for words in BAD[name][1]), e.value
    assert not os.path.exists('out')


@pytest.mark.parametrize('flags, words', [
    (['--input=*.none', '--out_dir=out'], ['no file matches *.none']),
    (['--input=', '--out_dir=out'], ['no file matches']),
    (['--input=a.txt'], ['--input needs --out_dir']),
    (['--input=a.txt', '--out_dir=out', '--revision=x'], ['--revision to OpenWebText']),
    (['--text_column=x'], ['--text_column belongs to --input']),
    (['--num_proc=0'], ['--num_proc is 0']),
    (['--num_proc=x'], ['--num_proc', "'x'"]),
    (['--nope=1'], ['--nope=1', '--help']),
    (['--out_dir=has_meta'], ['meta.pkl', '--out_dir']),
    (['--input=a.txt,b.txt', '--out_dir=out', '--val_share=0.6'], ['--val_share=0.6', 'of 2 documents']),
    (['--input=a.txt', '--out_dir=out', '--val_share=0'], ['--val_share=0.0']),
], ids=str)
def test_flags_that_cannot_be_meant_are_refused(tmp_path, script, flags, words):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'b.txt').write_text('text')
    (tmp_path / 'has_meta').mkdir()
    (tmp_path / 'has_meta' / 'meta.pkl').touch()
    with pytest.raises(SystemExit) as e:
        script.prepare(*flags)
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('flags, words', [
    ([], ['cannot load Skylion007/openwebtext', '--revision=']),
    (['--input=broken.jsonl', '--out_dir=out'], ['broken.jsonl', 'row 1']),
    (['--input=folder.txt', '--out_dir=out'], ['folder.txt', 'directory']),
], ids=str)
def test_what_cannot_be_loaded_is_one_line(tmp_path, script, flags, words):
    (tmp_path / 'broken.jsonl').write_text(BAD['broken.jsonl'][0])
    (tmp_path / 'folder.txt').mkdir()
    process = start(tmp_path, RUN, *flags)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and len(error.splitlines()) == 1, error
    assert all(word in error for word in words)


def test_an_old_datasets_is_refused(script, monkeypatch):
    monkeypatch.setattr(script.datasets, '__version__', '3.6.0')
    with pytest.raises(SystemExit, match='datasets 3.6.0 .*pip install -U datasets'):
        script.__spec__.loader.exec_module(script)
