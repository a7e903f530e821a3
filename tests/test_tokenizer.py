"""A tokenizer.json of one's own: what a run, its checkpoint, sampling and conversion make of it."""

import contextlib
import json
import os

import numpy as np
import optax
import pytest
from corpus import DOCS
from flax import nnx
from helpers import TINY, one_line_error, run, saved, train, with_data
from test_weights import write_hf

from jax_train_utils import create_train_state
from jax_transformer import GPT, GPTConfig, export_torch_weights, model_args
from nanogpt_jax import tokenizer
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.errors import UserError
from nanogpt_jax.sampling import Continuation

tokenizers = pytest.importorskip('tokenizers')


def word_level(*words, size=None):
    """The text of a tokenizer.json whose tokens are words."""
    vocab = {word: i for i, word in enumerate(words)} | ({'z': size - 1} if size else {})
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made.to_str()


def write_tokens(data, text):
    """Make a data set of DOCS with a tokenizer.json."""
    data.mkdir(parents=True, exist_ok=True)
    (data / 'tokenizer.json').write_text(text, encoding='utf-8')
    ids = tokenizers.Tokenizer.from_str(text).encode(''.join(DOCS)).ids
    for split, part in (('train', ids[100:]), ('val', ids[:100])):
        np.array(part, np.uint16).tofile(data / f'{split}.bin')


@pytest.fixture(scope='module')
def own():
    """The text of a tokenizer.json with 280 tokens."""
    return tokenizer.train_tokenizer(DOCS, 280)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, own):
    """A working directory with data/own, data/tiny, and a run on the former in out_jax."""
    folder = with_data(tmp_path_factory.mktemp('own'))
    write_tokens(folder / 'data' / 'own', own)
    out = train(folder, '--dataset=own', '--max_iters=4')
    assert 'found vocab_size = 280 (inside data/own/tokenizer.json)' in out
    return folder


def sample(folder, *args):
    return run(folder, 'sample_jax.py', '--device=cpu', '--max_new_tokens=20', *args)


def test_a_run_takes_its_vocabulary_from_tokenizer_json_and_its_checkpoint_keeps_it(trained, own):
    _, meta = saved(trained, 'out_jax', 5)
    assert meta['model_args']['vocab_size'] == 280
    assert json.loads(meta['chars']) == json.loads(own)
    (trained / 'data' / 'own' / 'tokenizer.json').rename(trained / 'away.json')
    try:
        # without it too: the tokens are those of the checkpoint
        # any text can be encoded
        flags = ['--start=the words \u00fc\U0001f40d', '--num_samples=2']
        result, streamed = sample(trained, *flags), sample(trained, *flags, '--stream=True')
        assert result.returncode == 0, result.stderr
        assert result.stdout == streamed.stdout
        texts = result.stdout.split('\n---------------\n')
        assert [text[:12] for text in texts] == ['the words \u00fc\U0001f40d'] * 2 + ['']
        train(trained, '--init_from=resume', '--dataset=own', '--max_iters=5')
        assert saved(trained, 'out_jax', 6)[1]['chars'] == meta['chars']
    finally:
        (trained / 'away.json').rename(trained / 'data' / 'own' / 'tokenizer.json')
    # white space does not make it another one
    path = trained / 'data' / 'own' / 'tokenizer.json'
    path.write_text(json.dumps(json.loads(own), indent=4), encoding='utf-8')
    train(trained, '--init_from=resume', '--dataset=own', '--max_iters=6')


@pytest.mark.parametrize('text, words', [
    (None, ['data/other/tokenizer.json', 'not a file']),  # a FIFO
    (word_level('<|endoftext|>', 'the'), ['the vocabulary of data/other differs']),
    (word_level('a', size=65537), ['data/other/tokenizer.json', '65,537 tokens', 'uint16']),
    ('{"model": 1}', ['cannot use data/other/tokenizer.json']),
    ('no JSON', ['cannot use data/other/tokenizer.json']),
])
def test_another_tokenizer_is_refused_in_one_line(trained, text, words):
    write_tokens(trained / 'data' / 'other', word_level('a'))
    path = trained / 'data' / 'other' / 'tokenizer.json'
    if text is None:
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(text)
    result = run(trained, 'train_jax.py', *TINY, '--init_from=resume', '--dataset=other',
                        '--max_iters=9')
    path.unlink()
    one_line_error(result, *words)


def test_an_error_in_a_buckets_file_is_not_one_of_the_bucket(monkeypatch, tmp_path):
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


def test_a_short_meta_pkl_takes_little_memory(tmp_path):
    # an index of 4 billion in a pickle of a few bytes, for which C's unpickler makes room
    (tmp_path / 'meta.pkl').write_bytes(b'\x80\x02}r\xff\xff\xff\xff.')
    with pytest.raises(UserError, match='meta.pkl .KeyError'):
        tokenizer.load_vocabulary(str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_in_one_line(folder, own):
    train(folder, '--max_iters=2', '--eval_iters=1')
    meta = folder / 'data' / 'tiny' / 'meta.pkl'
    meta.unlink()
    (folder / 'data' / 'tiny' / 'tokenizer.json').write_text(own)
    one_line_error(run(folder, 'train_jax.py', *TINY, '--init_from=resume', '--max_iters=9'),
                   'the vocabulary of data/tiny differs')
    write_hf_folder(folder / 'hf') # 65 tokens, of no known text
    one_line_error(run(folder, 'train_jax.py', *TINY, '--init_from=hf', '--out_dir=b'),
                   'data/tiny/tokenizer.json has 280 tokens', 'the model only 65')


def write_hf_folder(path):
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
    write_hf(path, export_torch_weights(GPT(config, rngs=nnx.Rngs(0))))


def test_sampling_with_more_tokens_than_the_model_is_refused_in_one_line(tmp_path, own):
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=2, n_embd=32)
    state = create_train_state(GPT(config, rngs=nnx.Rngs(0)), optax.identity())
    with Checkpoints(str(tmp_path / 'out_jax')) as checkpoints:
        checkpoints.save(state, dict(iter_num=1, best_val_loss=1.0, model_args=model_args(config),
                                     config={'always_save_checkpoint': True}, chars=own))
    one_line_error(sample(tmp_path), 'the tokenizer has 280 tokens, the model only 65')


def test_two_vocabularies_of_one_data_set_are_refused(folder, own):
    (folder / 'data' / 'tiny' / 'tokenizer.json').write_text(own)
    one_line_error(run(folder, 'train_jax.py', *TINY),
                   'data/tiny has a tokenizer.json and a meta.pkl', alone=True)


def test_without_the_package_one_line_says_how_to_install_it(trained, tmp_path):
    (tmp_path / 'tokenizers.py').write_text('raise ImportError')
    for script, *args in (['train_jax.py', *TINY, '--dataset=own', '--out_dir=b'],
                          ['sample_jax.py', '--device=cpu']):
        one_line_error(run(trained, script, *args, PYTHONPATH=str(tmp_path)),
                       'pip install tokenizers')


def test_the_size_of_a_model_counts_its_own_tokens(trained):
    result = run(trained, 'tools.sizing', '--dataset=own')
    assert ', vocabulary 280\n' in result.stdout, result.stderr


# -----------------------------------------------------------------------------
# text and ids

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


@pytest.mark.parametrize('kind', ['own', 'byte_fallback'])
def test_text_comes_in_parts_as_it_was_encoded(own, kind):
    encode, make_decode, n = tokenizer.get_tokenizer(own if kind == 'own' else byte_fallback())
    for text in DOCS[:9]:
        decode, ids = make_decode([]), encode(text)
        assert max(ids, default=0) < n
        parts = [decode([token]).decode() for token in ids] # never half a character
        assert ''.join(parts) == text
    # the space before a word belongs to the continuation
    ids = encode('the words in it')
    for n in range(1, len(ids)):
        assert make_decode([])(ids[:n]) + make_decode(ids[:n])(ids[n:]) == b'the words in it'


@pytest.mark.parametrize('kind', ['own', 'byte_fallback'])
def test_any_ids_of_an_untrained_model_become_text(own, kind):
    text = own if kind == 'own' else byte_fallback()
    encode, make_decode, n = tokenizer.get_tokenizer(text)
    rng = np.random.default_rng(0)
    for _ in range(100):
        sample = Continuation(make_decode(encode('the')))
        sample.add(rng.integers(n, size=50).tolist())
        assert len(sample.text + sample.close()) > 10


@pytest.mark.parametrize('kind', ['own', 'byte_fallback', 'gpt2', 'characters'])
def test_the_bytes_of_a_texts_tokens_add_up_to_its_bytes(own, kind):
    text = ''.join(map(chr, [97, 10, *range(32, 256), 0x20ac, 0x1f600])) + DOCS[7]
    vocabulary = {'own': own, 'byte_fallback': byte_fallback(), 'gpt2': None,
                  'characters': sorted(set(text))}[kind]
    try:
        encode, _, n = tokenizer.get_tokenizer(vocabulary)
    except UserError:
        pytest.skip("GPT-2's tokenizer is neither cached nor reachable")
    n_bytes = tokenizer.bytes_of_tokens(vocabulary)
    # sentencepiece's way puts a space before a text
    added = kind == 'byte_fallback'
    assert len(n_bytes) == n
    assert sum(n_bytes[i] for i in encode(text)) == len(text.encode()) + added


def test_end_of_text_is_a_token_in_a_prompt(own):
    encode, make_decode, _ = tokenizer.get_tokenizer(own)
    assert encode('<|endoftext|>') == [0]
    assert make_decode([0])([0]) == b'<|endoftext|>'


def test_a_tokenizer_json_does_not_pad_cut_or_add_tokens(own):
    made = tokenizers.Tokenizer.from_str(own)
    ids = made.encode('the words').ids
    made.enable_padding(length=64)
    made.enable_truncation(1)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    assert tokenizer.get_tokenizer(made.to_str())[0]('the words') == ids


def test_a_trained_tokenizer_has_every_byte_and_at_most_the_tokens_asked_for(own):
    for n in (257, 270):
        text = tokenizer.train_tokenizer(DOCS, n)
        assert tokenizer.make_tokenizer(text, 'it')[1] == n
        assert text == tokenizer.train_tokenizer(DOCS, n) # the same each time
    encode, make_decode, _ = tokenizer.get_tokenizer(own)
    every = ''.join(map(chr, [*range(256), 0x20ac, 0x1f600]))
    assert make_decode([])(encode(every)).decode() == every
    with pytest.raises(UserError, match='must have 1 to 65,536'):
        tokenizer.make_tokenizer(word_level('a', size=2 ** 16 + 1), 'it')
    assert tokenizer.make_tokenizer(word_level('a', size=2 ** 16), 'it')[1] == 2 ** 16
