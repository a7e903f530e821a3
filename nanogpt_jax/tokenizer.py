"""
Text to token ids and back: characters by a data set's meta.pkl, or GPT-2's BPE.
Needs neither JAX nor NumPy, so that the scripts of data/ can use it too.
"""

import os
import pickle

from nanogpt_jax.errors import UserError, optional_import


LARGEST_PROMPT = 2 ** 24  # characters


class PlainUnpickler(pickle.Unpickler):
    """Reads plain dicts, lists, strings and numbers; a pickle that names anything else is refused,
    since loading it would run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}; '
                                     'only plain Python data is allowed')


def load_meta(data_dir):
    """Read a data set's meta.pkl: (vocab_size, characters in the order of their ids).

    The list may be shorter than vocab_size. (None, None) if there is no such file: the ids are
    GPT-2's BPE. Raises UserError if the file cannot be used.
    """
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        return None, None
    try:
        if not os.path.isfile(path):
            raise OSError('it is no file')
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
        itos = meta.get('itos', {})
        vocab_size, chars = meta['vocab_size'], [itos[i] for i in range(len(itos))]
        if type(vocab_size) is not int or not 1 <= vocab_size <= 2 ** 16:
            raise ValueError(f'vocab_size is {vocab_size!r}; it must be an int from 1 to 65536, '
                             'since token ids are uint16')
        if len(chars) > vocab_size or not all(isinstance(c, str) for c in chars):
            raise ValueError(f'itos must have a string for each of at most {vocab_size} ids')
        return vocab_size, chars
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f'cannot use {path} ({type(e).__name__}: {e}); '
                        'make it again with the prepare.py beside it') from e


def get_tokenizer(chars):
    """(encode, decode) for a list of characters, or for GPT-2's BPE if chars is None.

    encode: str to a list of ids. decode: ids to UTF-8 bytes, since a BPE token may be a part of a
    character; ids past the vocabulary are skipped. encode raises UserError for a character that is
    not in the list.
    """
    if chars is None:
        enc = gpt2_encoding()
        n = enc.n_vocab  # a model's vocabulary may be padded past it
        return (lambda text: enc.encode(text, allowed_special={'<|endoftext|>'}),
                lambda tokens: enc.decode_bytes([t for t in tokens if t < n]))
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
    return encode, decode


def gpt2_encoding():
    """tiktoken's GPT-2 encoding, cached or downloaded. Raises UserError if it is neither."""
    tiktoken = optional_import('tiktoken')
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as e:  # no network, or files that are not what tiktoken expects: many types
        raise UserError('the GPT-2 tokenizer is neither cached nor reachable '
                        f'({type(e).__name__}): connect once so that its files can be downloaded, '
                        'or set TIKTOKEN_CACHE_DIR to a folder that has them') from e


def read_prompt(start):
    """--start as text; 'FILE:name' reads a UTF-8 file. Raises UserError if there is no text."""
    if start.startswith('FILE:'):
        try:
            with open(start[5:], encoding='utf-8') as f:
                text = f.read(LARGEST_PROMPT)
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'cannot read the prompt file {start[5:]}: {e}') from e
        if len(text) == LARGEST_PROMPT:
            raise UserError(f'the prompt file {start[5:]} has {LARGEST_PROMPT:,} characters or '
                            'more; a model sees the last block_size tokens only: give the end')
        start = text
    if not start:
        raise UserError('the prompt is empty; give at least one character with --start')
    return start
