"""data/openwebtext/prepare.py, and write_documents of data/common.py."""

import importlib.util
import json
import math
import os
import sys

import numpy as np
import pytest
import tiktoken
from corpus import DOCS, TINY, WAITING, tiny_encoding
from helpers import ROOT, one_line_error, run

from configurator import configure
from nanogpt_jax.errors import UserError

SCRIPT = os.path.join(ROOT, 'data', 'openwebtext', 'prepare.py')
sys.path.insert(0, os.path.join(ROOT, 'data'))
import common

pytestmark = pytest.mark.slow  # most need the package datasets, which .ci/run installs


def expected_bytes(texts, enc=TINY):
    """The bytes that a file must have: each document's tokens and an end-of-text token."""
    return np.array([t for text in texts for t in [*enc.encode_ordinary(text), enc.eot_token]],
                    dtype=np.uint16).tobytes()


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
        table = pytest.importorskip('datasets').Dataset.from_dict(
            {'id': [other] * len(part), 'text': part})
        write = table.to_json if ending == 'jsonl' else table.to_parquet
        write(folder / f'{name}.{ending}')


def split(docs, share=0.0005):
    """(train, val) as nanoGPT's train_test_split(test_size=share, seed=2357, shuffle=True)."""
    order = np.random.default_rng(2357).permutation(len(docs))
    docs, n = [docs[i] for i in order], math.ceil(len(docs) * share)
    return docs[n:], docs[:n]


# -----------------------------------------------------------------------------
# common.write_documents

class Documents(list):
    """Documents that record how many are read at a time, and cannot be read from `broken` on."""

    def __init__(self, texts, broken=math.inf):
        super().__init__(texts)
        self.broken, self.read = broken, []

    def __getitem__(self, rows):
        if rows.stop > self.broken:
            raise OSError('the input was deleted')
        self.read.append(rows.stop - rows.start)
        return super().__getitem__(rows)


def test_the_bytes_are_those_of_a_sequential_loop_and_replaced_together(tmp_path, capsys):
    train = Documents(DOCS * 3)
    common.write_documents(tmp_path, {'val': DOCS[:9], 'train': train}, TINY, 3)
    assert made(tmp_path) == [expected_bytes(train), expected_bytes(DOCS[:9])]
    assert max(train.read) <= common.rows < len(train)  # a part of the corpus is in memory
    n_tokens = len(expected_bytes(train)) // 2
    assert f'train has {n_tokens:,} tokens from 450 documents' in capsys.readouterr().out

    old = made(tmp_path)
    broken = Documents(DOCS * 3, broken=300)
    with pytest.raises(UserError, match='deleted.*start again'), common.locked(tmp_path):
        common.write_documents(tmp_path, {'val': DOCS[:5], 'train': broken}, TINY, 3)
    assert made(tmp_path) == old
    assert sorted(os.listdir(tmp_path)) == ['prepare.lock', 'train.bin', 'val.bin']


def test_a_tokenizer_that_does_not_fit_uint16_is_refused(tmp_path):
    large = tiktoken.Encoding('large', pat_str='.', mergeable_ranks={b'a': 0},
                              special_tokens={'<|endoftext|>': 65536})
    with pytest.raises(UserError, match='ids of large run to 65536'):
        common.write_documents(tmp_path, {'train': DOCS}, large, 1)
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# prepare.py as functions, if the datasets package is installed

@pytest.fixture
def script(tmp_path, monkeypatch):
    """prepare.py as a module, with tiny_encoding. datasets' cache is in tmp_path."""
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf'))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # restored after the script has set it
    spec = importlib.util.spec_from_file_location('openwebtext', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'gpt2_encoding', tiny_encoding)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        settings = dict(module.config)  # the defaults
        _, given = configure(settings, [flag for flag in flags if flag.startswith('-')])
        vars(module).update(settings, args=flags, given=given)
        module.main()
    module.run = run
    return module


@pytest.mark.parametrize('ending', ['jsonl', 'parquet', 'txt'])
def test_local_files_give_the_bytes_of_a_sequential_loop_in_nanogpts_order(
        tmp_path, script, ending):
    write_files(tmp_path / 'in', ending)
    script.run(f'--input=in/*.{ending}', '--out_dir=out', '--num_proc=3')
    assert made(tmp_path / 'out') == [expected_bytes(part) for part in split(DOCS)]


def test_several_patterns_a_share_and_a_column_can_be_chosen(tmp_path, script):
    (tmp_path / 'a[1].jsonl').write_text(
        ''.join(json.dumps({'text': 0, 'body': doc}) + '\n' for doc in DOCS[:50]))
    (tmp_path / 'b.jsonl').write_text(
        ''.join(json.dumps({'body': doc}) + '\n' for doc in DOCS[50:]))
    script.run('--input=b.jsonl,*.jsonl', '--text_column=body', '--out_dir=out', '--val_share=0.1')
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
    script.run('--num_proc=2', '--revision=refs/pr/22', '--out_dir=out')
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
    script.run('--repo=repo', '--name=small', '--out_dir=out', '--num_proc=1')
    assert made(tmp_path / 'out') == [expected_bytes(part) for part in split(DOCS[:60])]
    with pytest.raises(UserError, match="no column 'body', but .*'text'"):
        script.run('--repo=repo', '--name=small', '--text_column=body', '--out_dir=out')
    with pytest.raises(UserError, match='cannot load repo .*small.*another --repo, --name'):
        script.run('--repo=repo', '--out_dir=out')


def own_bytes(out, texts):
    """As expected_bytes, by out's tokenizer.json."""
    tokenizer = pytest.importorskip('tokenizers').Tokenizer.from_file(str(out / 'tokenizer.json'))
    tokenizer.encode_special_tokens = True
    return np.array([t for text in texts for t in [*tokenizer.encode(text).ids, 0]],
                    dtype=np.uint16).tobytes()


def test_a_tokenizer_is_trained_on_the_documents_for_training_and_used(
        tmp_path, script, monkeypatch, capsys):
    pytest.importorskip('tokenizers')
    seen, train = [], script.tokenizer.train_tokenizer
    monkeypatch.setattr(script.tokenizer, 'train_tokenizer', lambda texts, *args, **kwargs: train(
        seen.extend(texts) or seen, *args, **kwargs))
    monkeypatch.setattr(script, 'tokenizer_text', 3000)
    write_files(tmp_path / 'in', 'jsonl')
    flags = ['--input=in/*.jsonl', '--out_dir=out', '--train_tokenizer=270', '--val_share=0.1']
    script.run(*flags)
    out = tmp_path / 'out'
    parts = split(DOCS, 0.1)
    assert ''.join(seen) == ''.join(parts[0])[:3000]
    assert made(out) == [own_bytes(out, part) for part in parts]
    assert len(made(out)[0]) < 2 * sum(len(doc.encode()) for doc in parts[0])  # merges are learned
    first, tokenizer = made(out), (out / 'tokenizer.json').read_text()

    script.run(*flags[:2], flags[3])  # without the flag it is used too
    assert 'tokenizer.json, with 270 tokens' in capsys.readouterr().out
    assert (made(out), (out / 'tokenizer.json').read_text()) == (first, tokenizer)
    with pytest.raises(UserError, match='has 270 tokens, not 260: delete it'):
        script.run(*flags, '--train_tokenizer=260')
    os.remove(out / 'tokenizer.json')
    with pytest.raises(UserError, match='out has a train.bin of other tokens'):
        script.run(*flags)
    assert made(out) == first


@pytest.mark.parametrize('name, content, words', [
    ('broken.jsonl', '{"text": "a"}\n{"text": "b"\n', 'broken.jsonl.*row 1'),
    ('null.jsonl', '{"text": "a"}\n{"text": null}\n', "null.jsonl.*column 'text'.*1 nulls"),
    ('other.jsonl', '{"content": "a", "url": "b"}\n', "no column 'text'.*--text_column="),
    ('latin.txt', 'caf\u00e9', 'latin.txt is not UTF-8'),
    ('one.txt', 'a single text', '--val_share=0.0005 of 1 documents.*shakespeare/prepare.py')])
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(
        tmp_path, script, name, content, words):
    (tmp_path / name).write_bytes(content.encode('latin-1'))
    with pytest.raises(UserError, match=words):
        script.run(f'--input={name}', '--out_dir=out')
    assert not os.path.exists('out/train.bin')


@pytest.mark.parametrize('flags, words', [
    (['--input=*.none', '--out_dir=out'], 'no file matches'),
    (['--input=a.txt'], 'need --out_dir'),
    (['--input=a.txt', '--out_dir=out', '--repo=x'], '--input is for local files'),
    (['a.txt', '--out_dir=out'], 'a.txt is not a flag.*--input=a.txt'),
    (['--train_tokenizer=65537'], '--train_tokenizer is 65537.*to 65536.*uint16'),
    (['--num_proc=0'], '--num_proc is 0'),
    (['--out_dir=has_meta'], 'meta.pkl.*--out_dir')], ids=str)
def test_wrong_flags_are_refused(tmp_path, script, flags, words):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'has_meta').mkdir()
    (tmp_path / 'has_meta' / 'meta.pkl').touch()
    with pytest.raises(UserError, match=words):
        script.run(*flags)


# -----------------------------------------------------------------------------
# a process that ends while it writes

# run prepare.py with tiny_encoding, and kill the process at a document with 'wait here'
RUN = f"""
import os, runpy, sys
sys.path[:0] = [{os.path.join(ROOT, 'tests')!r}, {os.path.join(ROOT, 'data')!r}]
import common, corpus, tiktoken
common.gpt2_encoding, encode = corpus.tiny_encoding, tiktoken.Encoding.encode_to_numpy
def end(self, text, **kwargs):
    if 'wait here' in text:
        os.kill(os.getpid(), 9)
    return encode(self, text, **kwargs)
tiktoken.Encoding.encode_to_numpy = end
runpy.run_path({SCRIPT!r}, run_name='__main__')
"""


@pytest.mark.slow
def test_a_killed_process_changes_nothing_and_a_full_disk_is_one_line(tmp_path, script):
    write_files(tmp_path / 'in', 'jsonl', WAITING)
    assert 'wait here' in split(WAITING, 0.1)[0]
    flags = ['--input=in/*.jsonl', '--out_dir=out', '--num_proc=2']
    script.run(*flags, '--val_share=0.1')
    expected = [expected_bytes(part) for part in split(WAITING, 0.1)]
    env = {'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_OFFLINE': '1'}
    # with a larger share val.bin would have other tokens
    assert run(tmp_path, '-c', RUN, *flags, '--val_share=0.3', **env).returncode == -9
    assert made(tmp_path / 'out') == expected
    full = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n'
    code = full + RUN.replace('wait here', 'none')
    result = run(tmp_path, '-c', code, *flags, '--val_share=0.3', **env)
    one_line_error(result, 'cannot prepare out', 'File too large', 'start again', alone=True)
    assert made(tmp_path / 'out') == expected
    script.run(*flags, '--val_share=0.3')
    assert made(tmp_path / 'out') == [expected_bytes(part) for part in split(WAITING, 0.3)]
    assert sorted(os.listdir(tmp_path / 'out')) == ['prepare.lock', 'train.bin', 'val.bin']
