"""data/openwebtext/prepare.py, and write_documents of data/common.py, mostly with a tokenizer that
needs no files."""

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
from corpus import DOCS, TINY, WAITING, tiny_encoding
from helpers import ROOT, one_line_error

from nanogpt_jax.errors import UserError

SCRIPT = os.path.join(ROOT, 'data', 'openwebtext', 'prepare.py')
sys.path.insert(0, os.path.join(ROOT, 'data'))
import common


def expected_bytes(texts, enc=TINY):
    """The bytes that a file must have: each document's tokens and an end-of-text token."""
    return np.array([t for text in texts for t in [*enc.encode_ordinary(text), enc.eot_token]],
                    dtype=np.uint16).tobytes()


def write(folder, train=DOCS, val=DOCS[:9], source='here', num_proc=2, enc=TINY):
    """The bytes of train.bin and val.bin, written by write_documents; no other file is left."""
    common.write_documents(str(folder), {'val': val, 'train': train}, enc, source, num_proc)
    assert sorted(os.listdir(folder)) == ['train.bin', 'val.bin']
    return (folder / 'train.bin').read_bytes(), (folder / 'val.bin').read_bytes()


# -----------------------------------------------------------------------------
# common.write_documents

@pytest.mark.parametrize('num_proc', [1, 3])
def test_the_bytes_are_those_of_a_sequential_loop(tmp_path, num_proc, capsys):
    assert write(tmp_path / 'new', num_proc=num_proc) == (
        expected_bytes(DOCS), expected_bytes(DOCS[:9]))
    n_tokens = len(expected_bytes(DOCS)) // 2
    assert f'train has {n_tokens:,} tokens from 150 documents' in capsys.readouterr().out


def test_a_tokenizer_that_does_not_fit_uint16_is_refused(tmp_path):
    large = tiktoken.Encoding('large', pat_str='.', mergeable_ranks={b'a': 0},
                              special_tokens={'<|endoftext|>': 65536})
    with pytest.raises(UserError, match='ids of large run to 65536'):
        write(tmp_path, enc=large)
    assert os.listdir(tmp_path) == []


def test_at_most_6_items_are_submitted_ahead_of_the_results_used():
    submitted = []

    class Pool:
        def submit(self, function, item):
            submitted.append(item)
            future = Future()
            future.set_result(function(item))
            return future

    results = common.map_in_order(Pool(), lambda i: i * i, range(100), ahead=5)
    for used, result in enumerate(results):
        assert result == used * used and len(submitted) <= used + 6
    assert submitted == list(range(100))


# runs before a piece of code: makes tokenize wait, at a document with 'wait here', until a file
# named go exists, for a minute at most
WAIT = f"""
import os, re, signal, sys, time
sys.path[:0] = [{os.path.join(ROOT, 'tests')!r}, {os.path.join(ROOT, 'data')!r}]
import common
import numpy as np
from corpus import DOCS, TINY, WAITING, tiny_encoding
from nanogpt_jax.errors import report_user_error
sys.excepthook = report_user_error
common.gpt2_encoding, common.save_seconds = tiny_encoding, -1
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
tokenize = common.tokenize
def wait(texts, enc):
    end = time.monotonic() + 60
    while (any('wait here' in text for text in texts) and not os.path.exists('go')
           and time.monotonic() < end):
        time.sleep(0.01)
    return tokenize(texts, enc)
common.tokenize = wait
"""
WRITE = 'common.write_documents("out", {"val": DOCS[:9], "train": WAITING}, TINY, "here", 2)'
BEFORE = 100 // common.rows * common.rows  # documents in full chunks before the one that waits


def start(folder, code, *args):
    """A running process of a piece of code, after WAIT."""
    env = {**os.environ, 'HF_HOME': str(folder / 'hf'), 'HF_HUB_OFFLINE': '1'}
    return subprocess.Popen([sys.executable, '-c', WAIT + code, *args], cwd=folder, env=env,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """The subprocess.CompletedProcess of a process."""
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_progress(process, path, documents):
    """Return once N documents are done, and saved."""
    while not (os.path.exists(path) and json.loads(path.read_text())['documents'] >= documents):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


class Recorded(list):
    """Documents that record the slices that are read."""

    def __init__(self, texts):
        super().__init__(texts)
        self.slices = []

    def __getitem__(self, rows):
        self.slices.append(rows)
        return super().__getitem__(rows)


def killed(folder):
    """folder/out as SIGKILL leaves it, during the documents of train."""
    process = start(folder, WRITE)
    wait_for_progress(process, folder / 'out' / 'train.bin.progress.tmp', BEFORE)
    process.kill()
    process.communicate()
    assert sorted(os.listdir(folder / 'out')) == [
        'train.bin.progress.tmp', 'train.bin.tmp', 'val.bin.progress.tmp', 'val.bin.tmp']
    return folder / 'out'


def test_a_killed_call_is_resumed_with_the_same_bytes(tmp_path, capsys):
    out = killed(tmp_path)
    with open(out / 'train.bin.tmp', 'ab') as f:
        f.write(b'written after the last save')
    train = Recorded(WAITING)
    assert write(out, train) == (expected_bytes(WAITING), expected_bytes(DOCS[:9]))
    assert f'train.bin.tmp has {BEFORE} documents' in capsys.readouterr().out
    assert min(rows.start for rows in train.slices) == BEFORE
    assert all(rows.stop - rows.start <= common.rows for rows in train.slices)


@pytest.mark.parametrize('other', ['source', 'number', 'tokenizer'])
def test_a_killed_call_with_other_documents_is_not_resumed(tmp_path, capsys, other):
    out = killed(tmp_path)
    source = 'there' if other == 'source' else 'here'
    train = WAITING[:-1] if other == 'number' else WAITING
    enc = tiny_encoding('other', [b'do']) if other == 'tokenizer' else TINY
    assert write(out, train, source=source, enc=enc)[0] == expected_bytes(train, enc)
    assert 'train.bin.tmp was made from other documents' in capsys.readouterr().out


def test_progress_that_exceeds_the_tokens_is_ignored(tmp_path):
    out = killed(tmp_path)
    os.truncate(out / 'train.bin.tmp', 5)  # a power cut
    (out / 'val.bin.progress.tmp').write_text('')
    assert write(out, WAITING) == (expected_bytes(WAITING), expected_bytes(DOCS[:9]))


def test_old_files_stay_until_the_new_ones_are_complete(tmp_path):
    out = tmp_path / 'out'
    old = write(out, DOCS[:7])
    process = start(tmp_path, WRITE)
    wait_for_progress(process, out / 'train.bin.progress.tmp', BEFORE)
    assert ((out / 'train.bin').read_bytes(), (out / 'val.bin').read_bytes()) == old
    (tmp_path / 'go').touch()
    assert process.wait(60) == 0
    assert (out / 'train.bin').read_bytes() == expected_bytes(WAITING)


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    process = start(tmp_path, WRITE)
    wait_for_progress(process, tmp_path / 'out' / 'train.bin.progress.tmp', BEFORE)
    with pytest.raises(UserError, match='another process is writing .*train.bin.tmp'):
        write(tmp_path / 'out', WAITING)
    (tmp_path / 'go').touch()
    assert process.wait(60) == 0
    assert (tmp_path / 'out' / 'train.bin').read_bytes() == expected_bytes(WAITING)


def test_a_full_disk_is_one_line_and_every_written_document_is_saved(tmp_path, capsys):
    (tmp_path / 'go').touch()
    ends = np.cumsum([len(expected_bytes([text])) for text in WAITING])
    limit = int(ends[-1]) // 4 * 3  # bytes of a file
    full = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n'
    result = finish(start(tmp_path, full + 'common.rows = 1\n' + WRITE))
    one_line_error(result, 'File too large', 'start again', alone=True)
    assert re.match(r'error: stopped \(\[Errno \d+\] File too large\): ', result.stderr)
    write(tmp_path / 'out', WAITING)
    assert f'train.bin.tmp has {sum(ends <= limit)} documents' in capsys.readouterr().out


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
    result = finish(start(tmp_path, code))
    assert not result.stderr
    assert os.path.getsize(tmp_path / 'out' / 'train.bin') == 3000 * 50001 * 2
    # MB; the tokens of all documents are 300 MB. In memory: 2 chunks of 16 documents being
    # tokenized, 4 that wait, 4 bytes per token, and copies
    assert float(result.stdout.splitlines()[-1]) < 100


# -----------------------------------------------------------------------------
# prepare.py, if the datasets package is installed

@pytest.fixture
def script(tmp_path, monkeypatch):
    """prepare.py as a module, with tiny_encoding, and with datasets' cache in tmp_path."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf'))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # restored after the script has set it
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
    """(train, val) by the definition of nanoGPT's train_test_split(test_size=0.0005, seed=2357,
    shuffle=True)."""
    order = np.random.default_rng(2357).permutation(len(docs))
    docs, n = [docs[i] for i in order], math.ceil(len(docs) * share)
    return docs[n:], docs[:n]


def made(folder):
    return [(folder / f'{split}.bin').read_bytes() for split in ('train', 'val')]


def write_files(folder, ending, docs=DOCS):
    """Write docs to local files, in the order of their names."""
    folder.mkdir(parents=True)
    if ending == 'txt':
        for i, doc in enumerate(docs):
            (folder / f'{i:04}.txt').write_text(doc, encoding='utf-8')
        return
    # the files have another column too, of different types
    for name, part, other in (('a', docs[:60], 1), ('b', docs[60:], 'a')):
        if ending == 'jsonl':
            lines = [json.dumps({'id': other, 'text': doc}, ensure_ascii=name == 'a') + '\n'
                     for doc in part]
            (folder / f'{name}.jsonl').write_text(''.join(lines), encoding='utf-8')
        else:
            pa = pytest.importorskip('pyarrow')
            table = pa.table({'id': [other] * len(part), 'text': part})
            pytest.importorskip('pyarrow.parquet').write_table(
                table, folder / f'{name}.parquet', row_group_size=7)


@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'txt'])
def test_local_files_give_the_bytes_of_a_sequential_loop_in_nanogpts_order(
        tmp_path, script, ending):
    write_files(tmp_path / 'in', ending)
    script.prepare(f'--input=in/*.{ending}', '--out_dir=out', '--num_proc=3')
    assert made(tmp_path / 'out') == [expected_bytes(part) for part in split(DOCS)]


def test_several_patterns_a_share_and_a_column_can_be_chosen(tmp_path, script):
    (tmp_path / 'a[1].jsonl').write_text(
        ''.join(json.dumps({'text': 0, 'body': doc}) + '\n' for doc in DOCS[:50]))
    (tmp_path / 'b.jsonl').write_text(
        ''.join(json.dumps({'body': doc}) + '\n' for doc in DOCS[50:]))
    script.prepare('--input=b.jsonl,*.jsonl', '--text_column=body', '--out_dir=out',
                   '--val_share=0.1')
    assert made(tmp_path / 'out') == [
        expected_bytes(part) for part in split(DOCS[50:] + DOCS[:50], 0.1)]


def test_the_hubs_corpus_is_split_as_nanogpt_splits_it(tmp_path, script, monkeypatch, capsys):
    docs = [f'{i} <|endoftext|>' + ' word' * (i % 5) for i in range(2001)]
    corpus = script.datasets.Dataset.from_dict({'text': docs, 'url': docs})
    asked = {}

    def load_dataset(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return corpus

    monkeypatch.setattr(script.datasets, 'load_dataset', load_dataset)
    script.prepare('--num_proc=2', '--revision=refs/pr/22', '--out_dir=out')
    assert asked == {'repo': script.openwebtext, 'name': None, 'revision': 'refs/pr/22',
                     'split': 'train', 'num_proc': 2}
    warning = 'warning: 2,001 documents where the whole corpus has 8,013,769'
    assert warning in capsys.readouterr().out.lower()
    parts = corpus.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert made(tmp_path / 'out') == [
        expected_bytes(parts[name]['text']) for name in ('train', 'test')]
    assert list(split(docs)) == [list(parts[name]['text']) for name in ('train', 'test')]


def test_any_data_set_of_the_hub_can_be_chosen_by_name(tmp_path, script):
    # a folder has the layout of a repository: a configuration is a folder of files
    for name, docs in (('small', DOCS[:60]), ('large', DOCS)):
        write_files(tmp_path / 'repo' / name, 'jsonl', docs)
    (tmp_path / 'repo' / 'README.md').write_text(
        '---\nconfigs:\n' + ''.join(f'- config_name: {name}\n  data_files: {name}/a.jsonl\n'
                                    for name in ('small', 'large')) + '---\n')
    script.prepare('--repo=repo', '--name=small', '--out_dir=out', '--num_proc=1')
    assert made(tmp_path / 'out') == [expected_bytes(part) for part in split(DOCS[:60])]
    with pytest.raises(UserError, match="no column 'body', but .*'text'"):
        script.prepare('--repo=repo', '--name=small', '--text_column=body', '--out_dir=out')
    with pytest.raises(UserError, match='cannot load repo .*small.*another --repo, --name'):
        script.prepare('--repo=repo', '--out_dir=out')


# -----------------------------------------------------------------------------
# tokens of one's own

def own_bytes(out, texts):
    """As expected_bytes, by out's tokenizer.json."""
    tokenizer = pytest.importorskip('tokenizers').Tokenizer.from_file(str(out / 'tokenizer.json'))
    tokenizer.encode_special_tokens = True
    return np.array([t for text in texts for t in [*tokenizer.encode(text).ids, 0]],
                    dtype=np.uint16).tobytes()


def test_a_tokenizer_is_trained_on_the_documents_for_training_and_used(tmp_path, script, capsys):
    tokenizers = pytest.importorskip('tokenizers')
    write_files(tmp_path / 'in', 'jsonl')
    flags = ['--input=in/*.jsonl', '--out_dir=out', '--train_tokenizer=270', '--val_share=0.1']
    script.prepare(*flags)
    out = tmp_path / 'out'
    train, val = split(DOCS, 0.1)
    assert made(out) == [own_bytes(out, part) for part in (train, val)]
    assert len(made(out)[0]) < 2 * sum(len(doc.encode()) for doc in train)  # merges are learned
    assert 'tokenizer.json has 270 tokens, trained in' in capsys.readouterr().out
    first, tokenizer = made(out), (out / 'tokenizer.json').read_text()
    assert tokenizers.Tokenizer.from_str(tokenizer).token_to_id('<|endoftext|>') == 0

    script.prepare(*flags) # uses the tokenizer that lies there now
    assert 'tokenizer.json, with 270 tokens' in capsys.readouterr().out
    assert (made(out), (out / 'tokenizer.json').read_text()) == (first, tokenizer)
    script.prepare(*flags[:2], flags[3]) # without the flag too
    assert made(out) == first
    with pytest.raises(UserError, match='has 270 tokens, not 260: delete it'):
        script.prepare(*flags, '--train_tokenizer=260')
    os.remove(out / 'tokenizer.json')
    with pytest.raises(UserError, match='out has a train.bin of other tokens'):
        script.prepare(*flags)
    assert made(out) == first


def test_a_tokenizer_sees_no_more_than_the_first_characters(tmp_path, script, monkeypatch):
    pytest.importorskip('tokenizers')
    seen = []
    train = script.train_tokenizer
    monkeypatch.setattr(script, 'train_tokenizer', lambda texts, *args, **kwargs: train(
        seen.extend(texts) or seen, *args, **kwargs))
    monkeypatch.setattr(script, 'tokenizer_text', 1000)
    write_files(tmp_path / 'in', 'jsonl')
    script.prepare('--input=in/*.jsonl', '--out_dir=out', '--train_tokenizer=260')
    assert ''.join(seen) == ''.join(split(DOCS)[0])[:1000]


@pytest.mark.parametrize('content, words', [
    ('{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
     ['no token that ends a document', '<|endoftext|>']),
    ('{"vocab": {}}', ['cannot use', 'tokenizers']),
    ('{', ['cannot read', 'JSONDecodeError']),
    ('{"model": {"type": "WordLevel", "vocab": {"a": 65536}, "unk_token": "a"}}',
     ['has 65,537 tokens', '65,536', 'uint16']),
])
def test_a_tokenizer_json_that_cannot_be_used_is_refused(tmp_path, script, content, words):
    pytest.importorskip('tokenizers')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'tokenizer.json').write_text(content)
    write_files(tmp_path / 'in', 'jsonl')
    with pytest.raises(UserError) as e:
        script.prepare('--input=in/*.jsonl', '--out_dir=out')
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in words), e.value
    assert os.listdir(tmp_path / 'out') == ['tokenizer.json']


def test_the_tokens_are_gpt2s(tmp_path, script, monkeypatch):
    monkeypatch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')  # no test uses the network
    try:
        gpt2 = common.gpt2_encoding()
    except UserError as e:
        pytest.skip(str(e))
    monkeypatch.setattr(script, 'gpt2_encoding', common.gpt2_encoding)
    write_files(tmp_path / 'in', 'jsonl')
    script.prepare('--input=in/*.jsonl', '--out_dir=out')
    assert made(tmp_path / 'out') == [expected_bytes(part, gpt2) for part in split(DOCS)]


def test_openwebtext_is_written_to_the_scripts_folder_by_default(script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['prepare.py'])
    assert script.parse_flags().out_dir == os.path.dirname(SCRIPT)


# prepare.py as a process, after WAIT
RUN = ('import runpy; sys.argv[0] = "prepare.py"; '
       f'runpy.run_path({SCRIPT!r}, run_name="__main__")')
WAITS = ['--input=in/*.jsonl', '--out_dir=out', '--num_proc=2', '--val_share=0.02']


def test_ctrl_c_is_one_line_and_the_same_command_resumes(tmp_path, script, capsys):
    write_files(tmp_path / 'in', 'jsonl', WAITING)
    n = split(WAITING, 0.02)[0].index('wait here') // common.rows * common.rows
    assert n > 0
    process = start(tmp_path, RUN, *WAITS)
    wait_for_progress(process, tmp_path / 'out' / 'train.bin.progress.tmp', n)
    process.send_signal(signal.SIGINT)
    (tmp_path / 'go').touch()
    stopped = finish(process)
    assert stopped.returncode == 130
    assert re.fullmatch(r'stopped; run the same command .*\n', stopped.stderr)
    shutil.copytree(tmp_path / 'out', tmp_path / 'copy')

    result = finish(start(tmp_path, RUN, *WAITS))
    # no progress bar without a terminal
    assert result.returncode == 0 and result.stderr == ''
    assert int(re.search(r'train.bin.tmp has (\d+) documents', result.stdout)[1]) >= n
    assert made(tmp_path / 'out') == [expected_bytes(part) for part in split(WAITING, 0.02)]

    script.prepare(*WAITS)  # complete files are made again, as by nanoGPT
    assert 'train.bin.tmp' not in capsys.readouterr().out
    (tmp_path / 'in' / 'b.jsonl').touch()
    script.prepare(*WAITS, '--out_dir=copy')
    assert 'train.bin.tmp was made from other documents' in capsys.readouterr().out
    assert made(tmp_path / 'copy') == made(tmp_path / 'out')


BAD = {  # the content of a file, and words of the error
    'broken.jsonl': ('{"text": "a"}\n{"text": "b"\n',
                     ['broken.jsonl', 'Missing a comma', 'row 1']),
    'empty.jsonl': ('', ['empty.jsonl', 'no documents']),
    'null.jsonl': ('{"text": "a"}\n{"text": null}\n', ['null.jsonl', "column 'text'", '1 nulls']),
    'number.jsonl': ('{"text": 1}\n{"text": 2}\n', ['number.jsonl', "column 'text'", 'int64']),
    'other.jsonl': ('{"content": "a", "url": "b"}\n',
                    ["no column 'text'", "['content', 'url']", '--text_column=']),
    'latin.jsonl': ('{"text": "caf\u00e9"}\n', ['latin.jsonl', 'UTF8']),
    'surrogate.jsonl': ('{"text": "\\ud83d"}\n', ['surrogate.jsonl', 'surrogate pair']),
    'latin.txt': ('caf\u00e9', ['latin.txt is not UTF-8']),
    'broken.parquet': ('no parquet', ['broken.parquet', 'Parquet']),
    'one.txt': ('a single text',
                ['--val_share=0.0005 of 1 documents', 'data/shakespeare/prepare.py']),
    'a.csv': ('text\n', ['.jsonl, .parquet, .txt', "'.csv'"]),
    'a.txt,a.csv': ('text\n', ["'.csv', '.txt'"]),
}


@pytest.mark.parametrize('name', BAD)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path, script, name):
    for path in name.split(','):
        (tmp_path / path).write_bytes(BAD[name][0].encode('latin-1'))
    with pytest.raises(UserError) as e:
        script.prepare(f'--input={name}', '--out_dir=out')
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in BAD[name][1]), e.value
    assert not os.path.exists('out')


@pytest.mark.parametrize('flags, words', [
    (['--input=*.none', '--out_dir=out'], ['no file matches *.none']),
    (['--input=', '--out_dir=out'], ['no file matches']),
    (['--input=a.txt'], ['--input needs --out_dir']),
    (['--input=a.txt', '--out_dir=out', '--revision=x'], ['--revision are for the hub']),
    (['--input=a.txt', '--out_dir=out', '--repo=x'], ['--input is for local files']),
    (['--text_column=x'], ['--text_column belongs to --input or --repo']),
    (['--name=x'], ['--name to --repo']),
    (['--repo=x'], ['--repo needs --out_dir']),
    (['--train_tokenizer=256'], ['--train_tokenizer is 256', 'from 257']),
    (['--train_tokenizer=65537'], ['--train_tokenizer is 65537', 'to 65536', 'uint16']),
    (['--num_proc=0'], ['--num_proc is 0']),
    (['--num_proc=x'], ['--num_proc', "'x'"]),
    (['--nope=1'], ['--nope=1', '--help']),
    (['--out_dir=has_meta'], ['meta.pkl', '--out_dir']),
    (['--input=a.txt,b.txt', '--out_dir=out', '--val_share=0.6'],
     ['--val_share=0.6', 'of 2 documents']),
    (['--input=a.txt', '--out_dir=out', '--val_share=0'], ['--val_share=0.0']),
], ids=str)
def test_wrong_flags_are_refused(tmp_path, script, flags, words):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'b.txt').write_text('text')
    (tmp_path / 'has_meta').mkdir()
    (tmp_path / 'has_meta' / 'meta.pkl').touch()
    with pytest.raises(UserError) as e:
        script.prepare(*flags)
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('flags, words', [
    ([], ['cannot load Skylion007/openwebtext', '--revision=']),
    (['--repo=absent/absent', '--out_dir=out'], ['cannot load absent/absent', 'another --repo']),
    (['--input=broken.jsonl', '--out_dir=out'], ['broken.jsonl', 'row 1']),
    (['--input=folder.txt', '--out_dir=out'], ['folder.txt', 'directory']),
], ids=str)
def test_a_failed_load_ends_the_process_with_one_line(tmp_path, script, flags, words):
    (tmp_path / 'broken.jsonl').write_text(BAD['broken.jsonl'][0])
    (tmp_path / 'folder.txt').mkdir()
    one_line_error(finish(start(tmp_path, RUN, *flags)), *words, alone=True)


def test_an_old_datasets_is_refused(script, monkeypatch):
    monkeypatch.setattr(script.datasets, '__version__', '3.6.0')
    with pytest.raises(UserError, match='datasets 3.6.0 .*pip install -U datasets'):
        script.__spec__.loader.exec_module(script)
