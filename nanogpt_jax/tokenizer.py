"""
Text to token ids and back. A vocabulary, as checkpoints keep it, is a list of characters (from a
data set's meta.pkl), the text of a tokenizer.json, or None for GPT-2's BPE.
The scripts of data/ use this file too, so it imports neither JAX nor NumPy.
"""

import contextlib
import io
import json
import pickle
import re

from nanogpt_jax import run_dir
from nanogpt_jax.errors import UserError, optional_import


MOST_TOKENS = 2 ** 16  # token ids are uint16 in train.bin, as nanoGPT's
END_OF_TEXT = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>')  # GPT-2's name, and others


# -----------------------------------------------------------------------------
# the vocabulary of a data set

def find_vocabulary(data_dir):
    """The path of a data set's tokenizer.json or meta.pkl; None for GPT-2's tokens.

    Raises UserError if it has both files.
    """
    names = [run_dir.join(data_dir, name) for name in ('tokenizer.json', 'meta.pkl')]
    found = [name for name in names if run_dir.exists(name)]
    if len(found) == 2:
        raise UserError(f'{data_dir} has a tokenizer.json and a meta.pkl: keep only the one that '
                        'its train.bin was made with')
    return found[0] if found else None


def load_vocabulary(data_dir):
    """(number of tokens, vocabulary) of a data set; (None, None) for GPT-2's tokens.

    Raises UserError if its tokenizer.json or meta.pkl cannot be used.
    """
    path = find_vocabulary(data_dir)
    if not path:
        return None, None
    if path.endswith('.pkl'):
        return load_meta(path)
    text = read_tokenizer(path)
    return make_tokenizer(text, path)[1], text


@contextlib.contextmanager
def read_errors(path, hint):
    """A context that turns errors in reading a file, of nearly any type, into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        reason = ' '.join(str(e).split())[:300]
        raise UserError(f'cannot use {path} ({type(e).__name__}: {reason}); {hint}') from e


def read_bytes(path):
    with run_dir.open_file(path, 'rb') as f:
        return f.read()


# Python's own unpickler: a few bytes make the one in C allocate gigabytes
class PlainUnpickler(pickle._Unpickler):
    """Reads plain dicts, lists, strings and numbers, and refuses everything else: it could run
    code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}; '
                                     'only plain Python data is allowed')


def load_meta(path):
    """(vocab_size, list of at most so many characters) of a meta.pkl. Raises UserError if it
    cannot be used."""
    with read_errors(path, 'make it again with the prepare.py beside it'):
        meta = PlainUnpickler(io.BytesIO(read_bytes(path))).load()
        itos = meta.get('itos', {})
        vocab_size, chars = meta['vocab_size'], [itos[i] for i in range(len(itos))]
        if type(vocab_size) is not int or not 1 <= vocab_size <= MOST_TOKENS:
            raise ValueError(f'vocab_size is {vocab_size!r}; it must be an int from 1 to '
                             f'{MOST_TOKENS}, since token ids are uint16')
        if len(chars) > vocab_size or not all(isinstance(c, str) for c in chars):
            raise ValueError(f'itos must have a string for each of at most {vocab_size} ids')
        return vocab_size, chars


# -----------------------------------------------------------------------------
# tokenizer.json, of Hugging Face's tokenizers

A_TOKENIZER = "it must be a tokenizer.json of Hugging Face's tokenizers"


def read_tokenizer(path):
    """The text of a tokenizer.json, without white space. Raises UserError if it is not JSON."""
    with read_errors(path, A_TOKENIZER):
        return json.dumps(json.loads(read_bytes(path)), ensure_ascii=False, separators=(',', ':'))


def make_tokenizer(text, source):
    """(Tokenizer, number of its tokens) from the text of a tokenizer.json; runs no code in it.

    source: a name for messages. Raises UserError if the text cannot be used, or has more than
    MOST_TOKENS.
    """
    tokenizers = optional_import('tokenizers')
    with read_errors(source, A_TOKENIZER):
        tokenizer = tokenizers.Tokenizer.from_str(text)
    n = 1 + max(tokenizer.get_vocab().values(), default=-1)  # with added tokens
    if not 1 <= n <= MOST_TOKENS:
        raise UserError(f'{source} has {n:,} tokens; it must have 1 to {MOST_TOKENS:,}, since the '
                        "ids in train.bin are uint16, as nanoGPT's: train a smaller one, with "
                        'data/openwebtext/prepare.py --train_tokenizer=32000 for instance')
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, n


def end_of_text(tokenizer):
    """The id of the token that ends a document, or None if there is none."""
    ids = [tokenizer.token_to_id(name) for name in END_OF_TEXT]
    return next((i for i in ids if i is not None), None)


def train_tokenizer(texts, n_tokens, show_progress=False):
    """Train byte-level BPE with at most n_tokens; returns the text of its tokenizer.json.

    It splits words as GPT-2 does, has <|endoftext|>, and can encode any text.
    """
    tokenizers = optional_import('tokenizers')
    bytes_as_chars = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_tokens, initial_alphabet=sorted(bytes_as_chars),
        special_tokens=[END_OF_TEXT[0]], show_progress=show_progress)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def stream_decoder(tokenizer, prompt):
    """decode() for one continuation of a prompt's ids: new ids to their UTF-8 bytes.

    The text of a token may depend on earlier tokens, and a character may take several tokens.
    """
    DecodeStream = optional_import('tokenizers').decoders.DecodeStream
    stream = DecodeStream(skip_special_tokens=False)

    def step(token):
        nonlocal stream
        try:
            return stream.step(tokenizer, token) or ''
        except Exception:  # a byte-fallback tokenizer, after bytes that are not UTF-8
            stream = DecodeStream(skip_special_tokens=False)
            return '\ufffd' + (stream.step(tokenizer, token) or '')

    def decode(tokens):
        return ''.join(map(step, tokens)).encode()
    decode(prompt)
    return decode


def as_tokenizer(vocabulary, source):
    """The tokenizers.Tokenizer of a vocabulary. source: a name for messages."""
    tokenizers = optional_import('tokenizers')
    if isinstance(vocabulary, str):
        return make_tokenizer(vocabulary, source)[0]
    if vocabulary is None:
        return gpt2_tokenizer(tokenizers)
    vocab = {char: i for i, char in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))  # refuses other characters
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'),
                                                              'isolated')
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


def gpt2_tokenizer(tokenizers):
    """GPT-2's BPE as a tokenizers.Tokenizer, from the files that tiktoken downloads."""
    end = gpt2_encoding().eot_token
    read = optional_import('tiktoken.load').read_file_cached
    url = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
    vocab = json.loads(read(url + 'encoder.json'))
    _, *merges = read(url + 'vocab.bpe').decode().splitlines()  # after the version
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab, [tuple(merge.split(' ')) for merge in merges]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT[0]])
    assert tokenizer.token_to_id(END_OF_TEXT[0]) == end
    return tokenizer


# -----------------------------------------------------------------------------
# text to ids and back

def get_tokenizer(vocabulary):
    """(encode, make_decode, number of tokens) for a vocabulary.

    encode: str to a list of ids. make_decode: the ids of a prompt to the decode of one continuation
    of it, which takes the next ids and returns UTF-8 bytes, since a token may be a part of a
    character; ids past the vocabulary are skipped. encode raises UserError for a character that is
    not in a list.
    """
    if vocabulary is None:
        enc = gpt2_encoding()
        n = enc.n_vocab  # a model's vocabulary may be padded past it
        return (lambda text: enc.encode(text, allowed_special={'<|endoftext|>'}),
                lambda prompt: lambda tokens: enc.decode_bytes([t for t in tokens if t < n]), n)
    if isinstance(vocabulary, str):
        tokenizer, n = make_tokenizer(vocabulary, "the model's tokenizer")
        return (lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                lambda prompt: stream_decoder(tokenizer, prompt), n)
    return (*char_tokenizer(vocabulary), len(vocabulary))


def char_tokenizer(chars):
    """(encode, make_decode) of get_tokenizer for a list of characters."""
    if not chars:
        raise UserError("the meta.pkl of the model's data set has no characters (itos), "
                        'so text cannot be encoded')
    ids = {c: i for i, c in enumerate(chars)}

    def encode(text):
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            raise UserError(f'the model never saw the characters {unknown}; '
                            f'it knows {"".join(chars)!r}')
        return [ids[c] for c in text]

    def decode(tokens):
        # a finetuned model may have a larger vocabulary than its data set has characters
        return ''.join(chars[i] for i in tokens if i < len(chars)).encode('utf-8', 'replace')
    return encode, lambda prompt: decode


def bytes_of_tokens(vocabulary):
    """How many bytes of UTF-8 text each id stands for, as a list of ints: for bits per byte."""
    if vocabulary is None:
        enc = gpt2_encoding()
        return [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
    if isinstance(vocabulary, list):
        return [len(char.encode('utf-8', 'replace')) for char in vocabulary]
    tokenizer, n = make_tokenizer(vocabulary, "the model's tokenizer")

    def count(i):
        token = tokenizer.id_to_token(i)
        once, twice = (tokenizer.decode([i] * k, skip_special_tokens=False) for k in (1, 2))
        if token and '\ufffd' in once:  # a part of a character: the token has its bytes
            return 1 if re.fullmatch('<0x[0-9A-F]{2}>', token) else len(token)
        return len(twice.encode()) - len(once.encode())  # with the space that it may begin with
    return [*map(count, range(n))]


def gpt2_encoding():
    """tiktoken's GPT-2 encoding, cached or downloaded. Raises UserError if it is neither."""
    tiktoken = optional_import('tiktoken')
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as e:  # of many types: no network, or files that tiktoken cannot use
        raise UserError('the GPT-2 tokenizer is neither cached nor reachable '
                        f'({type(e).__name__}): connect once so that its files can be downloaded, '
                        'or set TIKTOKEN_CACHE_DIR to a folder that has them') from e


def read_prompt(start):
    """--start as text; 'FILE:name' reads a UTF-8 file. Raises UserError if there is no text."""
    if start.startswith('FILE:'):
        try:
            with open(start[5:], encoding='utf-8') as f:
                start = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'cannot read the prompt file {start[5:]}: {e}') from e
    if not start:
        raise UserError('the prompt is empty; give at least one character with --start')
    return start
