"""tokenizer.json in a run, in its checkpoint and in sampling; all kinds of vocabularies."""

import contextlib
import json
import os
import sys

import numpy as np
import pytest
from corpus import DOCS
from helpers import RUN, TINY, one_line_error, run, save_model, saved, train, with_data

from jax_transformer import GPTConfig
from nanogpt_jax import tokenizer
from nanogpt_jax.errors import UserError
from nanogpt_jax.sampling import Continuation
from tools import sizing

tokenizers = pytest.importorskip('tokenizers')


def word_level(*words, size=None):
    """The text of a tokenizer.json with a token for each word."""
    vocab = {word: i for i, word in enumerate(words)} | ({'z': size - 1} if size else {})
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made.to_str()


def byte_fallback():
    """A tokenizer.json like Llama's: spaces are part of words, unknown characters are bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token='<unk>'))
    d, n = tokenizers.decoders, tokenizers.normalizers
    made.normalizer = n.Sequence([n.Prepend('\u2581'), n.Replace(' ', '\u2581')])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split('\u2581', 'merged_with_next')
    made.decoder = d.Sequence([d.Replace('\u2581', ' '), d.ByteFallback(), d.Fuse(),
                               d.Strip(' ', 1, 0)])
    names = ['<unk>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
    made.train_from_iterator(DOCS, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, max_token_length=8, show_progress=False))
    return made.to_str()


@pytest.fixture(scope='module')
def own():
    """The text of a tokenizer.json with 280 tokens."""
    return tokenizer.train_tokenizer(DOCS, 280)


@pytest.fixture(scope='module')
def texts(own):
    return {'own': own, 'byte_fallback': byte_fallback(), 'gpt2': None,
            'characters': sorted(set(EVERY_CHAR))}


EVERY_CHAR = ''.join(map(chr, [10, *range(32, 256), 0x20ac, 0x1f600])) + DOCS[7]


PROMPT = 'the words \u00fc\U0001f40d'


@pytest.fixture(scope='module')
def trained(tmp_path_factory, own):
    """A working directory with data/own and a run on it in out_jax; what the run and then sampling,
    without data/own, have printed."""
    folder = with_data(tmp_path_factory.mktemp('own'))
    data = folder / 'data' / 'own'
    data.mkdir()
    (data / 'tokenizer.json').write_text(own, encoding='utf-8')
    ids = tokenizers.Tokenizer.from_str(own).encode(''.join(DOCS)).ids
    for split, part in (('train', ids[100:]), ('val', ids[:100])):
        np.array(part, np.uint16).tofile(data / f'{split}.bin')
    sampling = ['--device=cpu', '--max_new_tokens=20', '--num_samples=2', f'--start={PROMPT}',
                '--stream=True']
    result = run(folder, '-c', RUN + f'''
import os
run('train_jax.py', *{[*TINY, '--dataset=own', '--max_iters=4']})
os.rename('data/own', 'away')
print('samples:')
run('sample_jax.py', *{sampling!a})
os.rename('away', 'data/own')
''')
    assert result.returncode == 0, result.stderr
    return folder, *result.stdout.split('samples:\n')


# -----------------------------------------------------------------------------
# runs

def test_a_run_takes_its_vocabulary_from_tokenizer_json_and_its_checkpoint_keeps_it(
        trained, own, monkeypatch, capsys):
    folder, out, samples = trained
    assert 'found vocab_size = 280 (inside data/own/tokenizer.json)' in out
    _, meta = saved(folder, 'out_jax', 5)
    assert meta['model_args']['vocab_size'] == 280
    assert json.loads(meta['chars']) == json.loads(own)
    # sampling needs the checkpoint only; any text can be encoded
    samples = samples.split('\n---------------\n')
    assert [text[:len(PROMPT)] for text in samples] == [PROMPT] * 2 + ['']
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sizing, 'dataset', 'own')
    monkeypatch.setattr(sizing, 'select_devices', lambda device: None)
    sizing.main()
    assert ', vocabulary 280\n' in capsys.readouterr().out


def test_white_space_does_not_change_a_tokenizer(tmp_path, own):
    (tmp_path / 'tokenizer.json').write_text(own, encoding='utf-8')
    want = tokenizer.load_vocabulary(str(tmp_path))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(json.loads(own), indent=4))
    assert tokenizer.load_vocabulary(str(tmp_path)) == want and want[0] == 280


@pytest.mark.slow
def test_resuming_and_sampling_with_another_tokenizer_are_one_line_errors(folder, trained, own):
    there, tiny = trained[0], trained[0] / 'data' / 'tiny'
    (tiny / 'meta.pkl').unlink()
    (tiny / 'tokenizer.json').write_text(word_level('a', size=20))
    one_line_error(run(there, 'train_jax.py', *TINY, '--init_from=resume', '--max_iters=9'),
                   'the vocabulary of data/tiny differs')
    train(there, '--init_from=resume', '--dataset=own', '--max_iters=5')
    assert json.loads(saved(there, 'out_jax', 6)[1]['chars']) == json.loads(own)
    save_model(folder, GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32), own)
    one_line_error(run(folder, 'sample_jax.py', '--device=cpu'),
                   'the tokenizer has 280 tokens, the model only 65')


# -----------------------------------------------------------------------------
# files that cannot be used

@pytest.mark.parametrize('text, words', [
    (None, 'tokenizer.json.*not a file'),  # a FIFO
    (word_level('a', size=65537), '65,537 tokens; .*uint16'),
    ('{"model": 1}', 'cannot use .*tokenizer.json'),
    ('no JSON', 'cannot use .*tokenizer.json')])
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, text, words):
    path = tmp_path / 'tokenizer.json'
    os.mkfifo(path) if text is None else path.write_text(text)
    with pytest.raises(UserError, match=words):
        tokenizer.load_vocabulary(str(tmp_path))
    path.unlink()
    path.write_text(word_level('a', size=2 ** 16))
    assert tokenizer.load_vocabulary(str(tmp_path))[0] == 2 ** 16
    (tmp_path / 'meta.pkl').touch()
    with pytest.raises(UserError, match='has a tokenizer.json and a meta.pkl'):
        tokenizer.load_vocabulary(str(tmp_path))


def test_an_error_in_a_file_is_not_reported_as_one_of_the_bucket(monkeypatch, tmp_path):
    @contextlib.contextmanager
    def open_in_bucket(path, mode='r'):
        try:
            with open(path, mode) as f:
                yield f
        except Exception as e:
            raise UserError('check the credentials') from e
    monkeypatch.setattr(tokenizer.run_dir, 'open_file', open_in_bucket)
    for name in ('tokenizer.json', 'meta.pkl'):
        (tmp_path / name).write_text('no JSON')
        with pytest.raises(UserError, match=f'cannot use .*{name}'):
            tokenizer.load_vocabulary(str(tmp_path))
        (tmp_path / name).unlink()


def test_a_pickle_cannot_ask_for_more_memory_than_it_has_bytes(tmp_path):
    # an index of 4 billion in a few bytes: C's unpickler allocates memory up to it
    (tmp_path / 'meta.pkl').write_bytes(b'\x80\x02}r\xff\xff\xff\xff.')
    with pytest.raises(UserError, match='meta.pkl .KeyError'):
        tokenizer.load_vocabulary(str(tmp_path))


def test_a_package_or_download_that_is_missing_is_named(monkeypatch, own):
    import tiktoken
    def unreachable(name):
        raise OSError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', unreachable)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR'):
        tokenizer.gpt2_encoding()
    for package, load in (('tiktoken', tokenizer.gpt2_encoding),
                          ('tokenizers', lambda: tokenizer.make_tokenizer(own, 'it'))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f'pip install {package}'):
            load()


# -----------------------------------------------------------------------------
# text and ids

@pytest.mark.parametrize('kind', ['own', 'byte_fallback'])
def test_text_comes_in_parts_as_it_was_encoded(texts, kind):
    encode, make_decode, n = tokenizer.get_tokenizer(texts[kind])
    for text in DOCS[:9]:
        decode, ids = make_decode([]), encode(text)
        assert max(ids, default=0) < n
        parts = [decode([token]).decode() for token in ids]  # never half a character
        assert ''.join(parts) == text
    # the space before a word belongs to the continuation
    ids = encode('the words in it')
    for i in range(1, len(ids)):
        assert make_decode([])(ids[:i]) + make_decode(ids[:i])(ids[i:]) == b'the words in it'
    # any ids of an untrained model become text
    rng = np.random.default_rng(0)
    for _ in range(100):
        sample = Continuation(make_decode(encode('the')))
        sample.add(rng.integers(n, size=50).tolist())
        assert len(sample.text + sample.close()) > 10


@pytest.mark.parametrize('kind', ['own', 'byte_fallback', 'gpt2', 'characters'])
def test_the_bytes_of_a_texts_tokens_add_up_to_its_bytes(texts, kind):
    try:
        encode, make_decode, n = tokenizer.get_tokenizer(texts[kind])
    except UserError:
        pytest.skip("GPT-2's tokenizer is neither cached nor reachable")
    n_bytes, ids = tokenizer.bytes_of_tokens(texts[kind]), encode(EVERY_CHAR)
    # a tokenizer like sentencepiece puts a space before a text
    assert len(n_bytes) == n
    assert sum(n_bytes[i] for i in ids) == len(EVERY_CHAR.encode()) + (kind == 'byte_fallback')
    assert make_decode([])(ids).decode() == EVERY_CHAR


def test_a_tokenizer_json_does_not_pad_cut_or_add_tokens(own):
    made = tokenizers.Tokenizer.from_str(own)
    ids = made.encode('the words').ids
    made.enable_padding(length=64)
    made.enable_truncation(1)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    encode, make_decode, _ = tokenizer.get_tokenizer(made.to_str())
    assert encode('the words') == ids
    # end of text is a token in a prompt
    assert encode('<|endoftext|>') == [0] and make_decode([0])([0]) == b'<|endoftext|>'


def test_a_trained_tokenizer_has_the_requested_size_and_is_the_same_each_time():
    for n in (257, 270):
        text = tokenizer.train_tokenizer(DOCS, n)
        assert tokenizer.make_tokenizer(text, 'it')[1] == n
        assert text == tokenizer.train_tokenizer(DOCS, n)
