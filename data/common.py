"""What the prepare scripts share: downloads, .bin files, characters, and large corpora."""
import hashlib
import json
import os
import pickle
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from urllib.request import urlopen

import numpy as np

# the repository's root
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanogpt_jax.errors import UserError
from nanogpt_jax.tokenizer import END_OF_TEXT, end_of_text, make_tokenizer, read_tokenizer
from nanogpt_jax.tokenizer import gpt2_encoding  # noqa: F401 - for the prepare scripts

tinyshakespeare_url = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
                       'tinyshakespeare/input.txt')
save_seconds = 5.0  # between saves of write_documents: work that a kill may cost
rows = 16  # documents per task of a thread: few, since their texts and tokens are in memory


@contextmanager
def writing(path):
    """As replacing, and raises UserError if the file cannot be written."""
    try:
        with replacing(path) as tmp:
            yield tmp
    except OSError as e:  # a full disk, a read-only folder
        raise UserError(f'cannot write {path} ({e})') from e


@contextmanager
def replacing(path):
    """Yield a temporary path; rename it to path only if the block succeeds."""
    tmp = f'{path}.{os.getpid()}.tmp'
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def fetch(url, path):
    """Download url to path, unless path exists. Raises UserError."""
    if os.path.exists(path):
        return
    try:
        with urlopen(url, timeout=60) as response:
            # all at once: read(n) does not raise when the connection is cut
            content = response.read()
    except (OSError, HTTPException) as e:
        raise UserError(f'cannot download {url} ({e}): download it by hand to {path}') from e
    with writing(path) as tmp, open(tmp, 'wb') as f:
        f.write(content)


def read_text(path):
    """The text of a UTF-8 file. Raises UserError if it is not UTF-8, or not a file."""
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except OSError as e:
        raise UserError(f'cannot read {path} ({e})') from e
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8 text ({e}): '
                        'convert it, or delete it to start over') from e


def split_text(text):
    """The first 90% of the characters for training, the rest for validation. Raises UserError if
    one of them is empty."""
    n = int(len(text) * 0.9)
    if n == 0:
        raise UserError(f'the text has {len(text)} characters, too few for two splits')
    return text[:n], text[n:]


def write_bin(path, ids):
    """Write token ids as raw uint16, without a header. Raises UserError if one does not fit."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.uint16).max):
        raise UserError(f'{path}: token ids run from {ids.min()} to {ids.max()}, but must be in '
                        f'0..{np.iinfo(np.uint16).max} (uint16): use a smaller vocabulary')
    with writing(path) as tmp:
        ids.astype(np.uint16).tofile(tmp)


def write_splits(folder, train_ids, val_ids):
    """Write train.bin and val.bin, and print their lengths."""
    for split, ids in (('train', train_ids), ('val', val_ids)):
        write_bin(os.path.join(folder, f'{split}.bin'), ids)
        print(f'{split} has {len(ids):,} tokens')


def prepare_chars(text, folder):
    """Write train.bin, val.bin and meta.pkl: one token per character, ids in code point order."""
    codes = np.frombuffer(text.encode('utf-32-le'), dtype='<u4')  # one number per character
    vocab, ids = np.unique(codes, return_inverse=True)
    chars = [chr(c) for c in vocab]
    print(f'length of dataset in characters: {len(text):,}')
    encoding = sys.stdout.encoding or 'utf-8'  # prints ? for a character that the terminal lacks
    print('all the unique characters:', ''.join(chars).encode(encoding, 'replace').decode(encoding))
    print(f'vocab size: {len(chars):,}')
    write_splits(folder, *split_text(ids))

    # dicts, strings and ints only, since load_meta refuses all other pickles
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
            'stoi': {c: i for i, c in enumerate(chars)}}
    with writing(os.path.join(folder, 'meta.pkl')) as tmp, open(tmp, 'wb') as f:
        pickle.dump(meta, f)


class OwnEncoding:
    """A tokenizer.json with the methods of tiktoken's Encoding that write_documents uses.

    Raises UserError if it cannot be used, or has no token that ends a document.
    """

    def __init__(self, path):
        text = read_tokenizer(path)
        self.tokenizer, self.n_vocab = make_tokenizer(text, path)
        self.tokenizer.encode_special_tokens = True  # in documents no text is a special token
        self.name = f'tokenizer.json {hashlib.sha256(text.encode()).hexdigest()}'
        self.max_token_value, self.eot_token = self.n_vocab - 1, end_of_text(self.tokenizer)
        if self.eot_token is None:
            raise UserError(f'{path} has no token that ends a document: add one of '
                            f'{", ".join(END_OF_TEXT)}')

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)


def write_documents(folder, splits, enc, source, num_proc):
    """Write train.bin and val.bin: the ids of each split's documents, each ended by enc.eot_token.

    splits: {'val': texts, 'train': texts}, sequences of str that are read in slices.
    source: a str that identifies the corpus and its order. An interrupted call with the same source
    is resumed, and gives the same bytes. Raises UserError.
    """
    if enc.max_token_value > np.iinfo(np.uint16).max:
        raise UserError(f'the ids of {enc.name} run to {enc.max_token_value}, but must fit uint16: '
                        'use a smaller vocabulary')
    paths = {split: os.path.join(folder, f'{split}.bin') for split in splits}
    try:
        os.makedirs(folder, exist_ok=True)
        for split, texts in splits.items():
            key = hashlib.sha256(f'{split} {len(texts)} {enc.name} {source}'.encode()).hexdigest()
            t0 = time.monotonic()
            tokens = append_documents(paths[split], texts, enc, key, num_proc)
            print(f'{split} has {tokens:,} tokens from {len(texts):,} documents, '
                  f'in {time.monotonic() - t0:.0f} s')
        for path in paths.values():  # at the end, so that both splits are of the same corpus
            os.replace(f'{path}.tmp', path)
            os.remove(f'{path}.progress.tmp')
    except OSError as e:  # a full disk, an input file that was deleted
        raise UserError(f'stopped ({e}): fix that and start again; '
                        'it continues where it stopped') from e


def append_documents(path, texts, enc, source, num_proc):
    """Append the documents that path.tmp lacks; returns its number of tokens.

    Tokenizes in num_proc threads, not processes, since the tokenizers release the GIL: nothing is
    copied between them, and none is left behind when this process is killed.
    """
    from tqdm import tqdm  # here, since most data sets do without it
    with open(f'{path}.tmp', 'ab') as f, ThreadPoolExecutor(num_proc) as pool:
        lock(f)
        done = read_progress(path, source)
        f.truncate(done['bytes'])  # drop what was written after the last save
        starts = range(done['documents'], len(texts), rows)
        chunks = map_in_order(pool, lambda start: tokenize(texts[start:start + rows], enc), starts,
                              ahead=2 * num_proc)
        saved = time.monotonic()
        with tqdm(total=len(texts), initial=done['documents'], desc=os.path.basename(path),
                  unit=' documents', disable=None) as bar:  # None: a bar on a terminal only
            for ids in chunks:
                f.write(ids)
                done['bytes'] += ids.nbytes
                bar.update(min(rows, len(texts) - done['documents']))
                done['documents'] = min(done['documents'] + rows, len(texts))
                if time.monotonic() - saved > save_seconds:
                    save_progress(f, path, done)
                    saved = time.monotonic()
        save_progress(f, path, done)
    return done['bytes'] // 2


def map_in_order(pool, function, items, ahead):
    """Yield function(item) of each item, in order. At most `ahead` results wait behind a slow item,
    which bounds the memory."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def tokenize(texts, enc):
    """The ids of all texts in one uint16 array, with enc.eot_token after each text."""
    eot, parts = np.array([enc.eot_token], dtype=np.uint32), []
    for text in texts:
        # as encode_ordinary, in which no text is a special token, but without slow Python lists
        parts += [enc.encode_to_numpy(text, disallowed_special=()), eot]
    return np.concatenate(parts).astype(np.uint16)


def lock(f):
    """Lock a file until it is closed. Raises UserError if another process has locked it."""
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'another process is writing {f.name}: wait for it, or stop it') from None
    except (ImportError, OSError):
        pass  # no locks on Windows and some file systems


def read_progress(path, source):
    """How much of path.tmp is done: {'source', 'documents', 'bytes'}; none of it if its source
    differs."""
    new = {'source': source, 'documents': 0, 'bytes': 0}
    try:
        with open(f'{path}.progress.tmp') as f:
            done = json.load(f)
    except (OSError, ValueError):
        return new
    if done['source'] != source:
        print(f'{path}.tmp was made from other documents: starting over')
        return new
    if done['bytes'] > os.path.getsize(f'{path}.tmp'):
        return new
    print(f'{path}.tmp has {done["documents"]:,} documents: continuing after them')
    return done


def save_progress(f, path, done):
    f.flush()
    os.fsync(f.fileno())  # tokens before their count: a power cut must not lose counted tokens
    with replacing(f'{path}.progress.tmp') as tmp, open(tmp, 'w') as g:
        json.dump(done, g)
