"""What the prepare scripts share: downloads, the .bin format, characters, the GPT-2 tokenizer."""
import os
import pickle
import sys
from contextlib import contextmanager
from http.client import HTTPException
from urllib.request import urlopen

import numpy as np

tinyshakespeare_url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


@contextmanager
def replacing(path):
    """Yields a temporary name beside path; the file takes path's place only if the block succeeds."""
    tmp = f'{path}.{os.getpid()}.tmp'
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def fetch(url, path):
    """Downloads url to path, unless path is there already."""
    if os.path.exists(path):
        return
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()  # in one go: only then does http.client notice a cut connection
    except (OSError, HTTPException) as e:
        raise SystemExit(f'cannot download {url} ({e}): download it by hand and put it at {path}') from None
    with replacing(path) as tmp, open(tmp, 'wb') as f:
        f.write(content)


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except UnicodeDecodeError as e:
        raise SystemExit(f'{path} is not UTF-8 text ({e}): convert it, or delete it to start over') from None


def split_text(text):
    """The first 90% of the characters for training, the rest for validation."""
    n = int(len(text) * 0.9)
    return text[:n], text[n:]


def write_bin(path, ids):
    """Writes token ids as raw uint16, nothing before or after them."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.uint16).max):
        raise SystemExit(f'{path}: token ids run from {ids.min()} to {ids.max()}, but must lie in '
                         f'0..{np.iinfo(np.uint16).max} (uint16): use a smaller vocabulary')
    with replacing(path) as tmp:
        ids.astype(np.uint16).tofile(tmp)


def write_splits(folder, train_ids, val_ids):
    """Writes train.bin and val.bin, and says how long they are."""
    for split, ids in (('train', train_ids), ('val', val_ids)):
        write_bin(os.path.join(folder, f'{split}.bin'), ids)
        print(f'{split} has {len(ids):,} tokens')


def prepare_chars(text, folder):
    """Writes train.bin, val.bin and meta.pkl with one token per character, ids in code point order."""
    codes = np.frombuffer(text.encode('utf-32-le'), dtype='<u4')  # one number per character
    vocab, ids = np.unique(codes, return_inverse=True)
    chars = [chr(c) for c in vocab]
    print(f'length of dataset in characters: {len(text):,}')
    encoding = sys.stdout.encoding or 'utf-8'  # a terminal that lacks a character gets ? for it, not an error
    print('all the unique characters:', ''.join(chars).encode(encoding, 'replace').decode(encoding))
    print(f'vocab size: {len(chars):,}')
    write_splits(folder, *split_text(ids))

    # plain dicts, strings and ints, so that a reader can refuse every other kind of pickle
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    with replacing(os.path.join(folder, 'meta.pkl')) as tmp, open(tmp, 'wb') as f:
        pickle.dump(meta, f)


def gpt2_encoding():
    """tiktoken's GPT-2 encoding, from its cache or the network."""
    try:
        import tiktoken  # here, since most data sets do without it
        return tiktoken.get_encoding('gpt2')
    except ImportError as e:
        raise SystemExit(f'the GPT-2 tokenizer needs tiktoken ({e}): pip install tiktoken') from None
    except (OSError, ValueError) as e:  # no network, or files that are not what tiktoken expects
        raise SystemExit(f'the GPT-2 tokenizer is neither cached nor reachable ({e}): set TIKTOKEN_CACHE_DIR to a '
                         'folder with its files, filled by one run with a network and that variable set') from None
