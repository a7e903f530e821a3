"""What the prepare scripts share: downloads, the .bin format, characters, the GPT-2 tokenizer, many documents."""
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

tinyshakespeare_url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
save_seconds = 5.0  # of tokens that a kill may cost write_documents
rows = 16  # documents that a thread takes at a time: few, since all of them are in memory, with the tokens they make


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


def write_documents(folder, splits, enc, source, num_proc):
    """Writes train.bin and val.bin: the ids of each split's documents, in order, each ended by enc.eot_token.

    splits: {'val': texts, 'train': texts}, sequences of str whose slices need not be in memory before they are asked for.
    source: any str that another corpus, order or text would not have. A start that was killed, and had the same, is
    gone on with; the bytes are those of one that was not.
    """
    if enc.max_token_value > np.iinfo(np.uint16).max:
        raise SystemExit(f'the ids of {enc.name} run to {enc.max_token_value}, but must fit uint16: use a smaller vocabulary')
    paths = {split: os.path.join(folder, f'{split}.bin') for split in splits}
    try:
        os.makedirs(folder, exist_ok=True)
        for split, texts in splits.items():
            key = hashlib.sha256(f'{split} {len(texts)} {enc.name} {source}'.encode()).hexdigest()
            t0 = time.monotonic()
            tokens = append_documents(paths[split], texts, enc, key, num_proc)
            print(f'{split} has {tokens:,} tokens from {len(texts):,} documents, in {time.monotonic() - t0:.0f} s')
        for path in paths.values():  # together, so that a folder has splits of one corpus
            os.replace(f'{path}.tmp', path)
            os.remove(f'{path}.progress.tmp')
    except OSError as e:  # a full disk, an input that is gone
        raise SystemExit(f'stopped ({e}): see to it and start again; it goes on where it stopped') from None


def append_documents(path, texts, enc, source, num_proc):
    """Appends to path.tmp what is not there yet, by num_proc threads; the number of tokens that are there then.

    Threads, since tiktoken works without the interpreter's lock. They need no copies, and die with their process.
    """
    from tqdm import tqdm  # here, since most data sets do without it
    with open(f'{path}.tmp', 'ab') as f, ThreadPoolExecutor(num_proc) as pool:
        lock(f)
        done = read_progress(path, source)
        f.truncate(done['bytes'])  # what came after the last save
        starts = range(done['documents'], len(texts), rows)
        chunks = map_in_order(pool, lambda start: tokenize(texts[start:start + rows], enc), starts, ahead=2 * num_proc)
        saved = time.monotonic()
        with tqdm(total=len(texts), initial=done['documents'], desc=os.path.basename(path), unit=' documents',
                  disable=None) as bar:  # None: no bar unless it goes to a terminal
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
    """function of each item, in order; at most so many wait to be taken, or one slow item would fill the memory."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def tokenize(texts, enc):
    """The ids of all texts in one uint16 array, enc.eot_token after each."""
    parts = []
    for text in texts:  # nothing disallowed: no text counts as a special token, as in encode_ordinary, which makes slow lists
        parts += [enc.encode_to_numpy(text, disallowed_special=()), np.array([enc.eot_token], dtype=np.uint32)]
    return np.concatenate(parts).astype(np.uint16)


def lock(f):
    """Refuses a file that another process has locked; holds the lock until the file is closed."""
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f'another process is writing {f.name}: wait for it, or end it') from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks


def read_progress(path, source):
    """How much of path.tmp is done: {'source', 'documents', 'bytes'}. None of it, if its source was another."""
    new = {'source': source, 'documents': 0, 'bytes': 0}
    try:
        with open(f'{path}.progress.tmp') as f:
            done = json.load(f)
    except (OSError, ValueError):
        return new
    if done['source'] != source:
        print(f'{path}.tmp was made from other documents: starting anew')
        return new
    if done['bytes'] > os.path.getsize(f'{path}.tmp'):
        return new
    print(f'{path}.tmp has {done["documents"]:,} documents: going on after them')
    return done


def save_progress(f, path, done):
    f.flush()
    os.fsync(f.fileno())  # the tokens first: a power cut must not leave a count of what is lost
    with replacing(f'{path}.progress.tmp') as tmp, open(tmp, 'w') as g:
        json.dump(done, g)
