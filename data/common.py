"""What the prepare scripts share: downloads, .bin files, characters, and large corpora."""
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from urllib.request import urlopen

import numpy as np
from tqdm import tqdm

# the repository's root
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanogpt_jax.errors import UserError
from nanogpt_jax.run_dir import is_locked, open_file
from nanogpt_jax.tokenizer import (
    END_OF_TEXT, MOST_TOKENS, end_of_text, make_tokenizer, read_tokenizer,
)
from nanogpt_jax.tokenizer import gpt2_encoding  # noqa: F401 - re-exported

tinyshakespeare_url = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
                       'tinyshakespeare/input.txt')
rows = 100  # documents in memory at a time


# -----------------------------------------------------------------------------
# files

@contextmanager
def locked(folder):
    """Create a data folder if it is missing, and lock it: one process writes at a time.

    Raises UserError if another process has the lock, and for an OSError inside the block.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'prepare.lock'), 'w') as f:
            if not is_locked(f):
                raise UserError(f'another process is preparing {folder}: wait for it, or stop it')
            yield
    except OSError as e:  # a full disk, no permission, an input file that was deleted
        raise UserError(f'cannot prepare {folder} ({e}): fix that and start again') from e


@contextmanager
def replacing(*paths):
    """Yield a temporary path for each path; rename them all if the block succeeds."""
    temporary = [f'{path}.tmp' for path in paths]
    try:
        yield temporary
        for tmp, path in zip(temporary, paths):
            os.replace(tmp, path)
    finally:
        for tmp in temporary:
            if os.path.exists(tmp):
                os.remove(tmp)


def fetch(url, path):
    """Download url to path, unless path exists. Raises UserError."""
    if os.path.exists(path):
        return
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()  # read(n) would not raise when the connection is cut
    except (OSError, HTTPException) as e:
        raise UserError(f'cannot download {url} ({e}): download it by hand to {path}') from e
    with replacing(path) as [tmp], open(tmp, 'wb') as f:
        f.write(content)


def read_text(path):
    """The text of a UTF-8 file. Raises UserError if it is not a file or not UTF-8, and OSError."""
    try:
        with open_file(path) as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8 text ({e}): '
                        'convert it, or delete it to start over') from e


# -----------------------------------------------------------------------------
# one text

def split_text(text):
    """The first 90% of the characters for training, the rest for validation.

    Raises UserError if a split would be empty.
    """
    n = int(len(text) * 0.9)
    if n == 0:
        raise UserError(f'the text has {len(text)} characters, too few for two splits')
    return text[:n], text[n:]


def write_splits(folder, train_ids, val_ids, meta=None, tokenizer=None):
    """Write train.bin and val.bin: raw uint16 without a header. Raises UserError for other ids.

    Data with its own vocabulary also gets a meta.pkl (meta: a dict) or a tokenizer.json
    (tokenizer: its text).
    """
    files = {}
    for split, ids in (('train', np.asarray(train_ids)), ('val', np.asarray(val_ids))):
        if ids.size and not 0 <= ids.min() <= ids.max() < MOST_TOKENS:
            raise UserError(f'{split}.bin: token ids run from {ids.min()} to {ids.max()}, but must '
                            f'be in 0..{MOST_TOKENS - 1} (uint16): use a smaller vocabulary')
        files[f'{split}.bin'] = ids.astype(np.uint16)
    if meta:
        files['meta.pkl'] = pickle.dumps(meta)
    if tokenizer:
        files['tokenizer.json'] = tokenizer.encode()
    with replacing(*(os.path.join(folder, name) for name in files)) as temporary:
        for tmp, content in zip(temporary, files.values()):
            with open(tmp, 'wb') as f:  # ids.tofile(tmp) does not say why it fails
                f.write(content)
    for split in ('train', 'val'):
        print(f'{split} has {len(files[f"{split}.bin"]):,} tokens')


def prepare_chars(text, folder):
    """Write train.bin, val.bin and meta.pkl: one token per character, ids in code point order."""
    codes = np.frombuffer(text.encode('utf-32-le'), dtype='<u4')  # one number per character
    vocab, ids = np.unique(codes, return_inverse=True)
    chars = [chr(c) for c in vocab]
    sys.stdout.reconfigure(errors='replace')  # prints ? for a character that the terminal lacks
    print(f'length of dataset in characters: {len(text):,}')
    print('all the unique characters:', ''.join(chars))
    print(f'vocab size: {len(chars):,}')
    # only dicts, strings and ints: load_meta refuses all other pickles
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
            'stoi': {c: i for i, c in enumerate(chars)}}
    write_splits(folder, *split_text(ids), meta)


# -----------------------------------------------------------------------------
# many documents

class OwnEncoding:
    """A tokenizer.json with the methods of tiktoken's Encoding that write_documents uses.

    Raises UserError if it is damaged, or has no token that ends a document.
    """

    def __init__(self, path):
        self.tokenizer, self.n_vocab = make_tokenizer(read_tokenizer(path), path)
        self.tokenizer.encode_special_tokens = True  # as text: documents have no special tokens
        self.name, self.max_token_value = path, self.n_vocab - 1
        self.eot_token = end_of_text(self.tokenizer)
        if self.eot_token is None:
            raise UserError(f'{path} has no token that ends a document: add one of '
                            f'{", ".join(END_OF_TEXT)}')

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)


def slices(texts):
    """Yield the texts in short lists, so that few are in memory."""
    for start in range(0, len(texts), rows):
        yield texts[start:start + rows]


def write_documents(folder, splits, enc, num_proc):
    """Write train.bin and val.bin: the ids of each split's documents, each ended by enc.eot_token.

    splits: {'train': texts, 'val': texts}; texts: a sequence of str that can be sliced. Raises
    UserError if an id does not fit uint16.
    """
    if enc.max_token_value >= MOST_TOKENS:
        raise UserError(f'the ids of {enc.name} run to {enc.max_token_value}, but must fit uint16: '
                        'use a smaller vocabulary')
    paths = [os.path.join(folder, f'{split}.bin') for split in splits]
    with replacing(*paths) as temporary:
        for tmp, (split, texts) in zip(temporary, splits.items()):
            t0 = time.perf_counter()
            n_tokens = write_texts(tmp, texts, enc, num_proc)
            print(f'{split} has {n_tokens:,} tokens from {len(texts):,} documents, '
                  f'in {time.perf_counter() - t0:.0f} s')


def write_texts(path, texts, enc, num_proc):
    """Write the ids of texts to path; returns their number."""
    def encode(text):
        # as encode_ordinary, without special tokens, but faster: no Python lists
        ids = enc.encode_to_numpy(text, disallowed_special=())
        return np.append(ids, enc.eot_token).astype(np.uint16)
    # datasets.map is as fast, but stores a copy of all ids in its cache (OpenWebText: 18 GB)
    with (open(path, 'wb') as f, ThreadPoolExecutor(num_proc) as pool,  # tokenizers drop the GIL
          tqdm(total=len(texts), unit=' documents', disable=None) as bar):  # None: on a terminal
        for part in slices(texts):
            for ids in pool.map(encode, part):
                f.write(ids)
            bar.update(len(part))
        return f.tell() // 2
