"""OpenWebText in GPT-2's tokens: writes train.bin and val.bin beside this file. Large: read readme.md first."""
import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where common.py lies
from common import gpt2_encoding, replacing

try:
    from datasets import load_dataset
    from tqdm import tqdm  # datasets brings it along
except ImportError as e:
    raise SystemExit(f'preparing OpenWebText needs the datasets library ({e}): pip install datasets') from None

folder = os.path.dirname(os.path.abspath(__file__))
repo = 'Skylion007/openwebtext'
num_documents = 8013769  # in the whole corpus


def load_documents(revision, num_proc):
    """The corpus from the Hugging Face hub, as one split."""
    try:
        docs = load_dataset(repo, revision=revision, split='train', num_proc=num_proc)
    except Exception as e:  # hub, network, disk: the library raises many kinds
        raise SystemExit(f'cannot load {repo} at revision {revision or "main"} ({" ".join(str(e).split())}): if the '
                         'network is fine, try --revision=refs/convert/parquet or --revision=refs/pr/22') from None
    if len(docs) != num_documents:
        print(f'warning: {len(docs):,} documents where the whole corpus has {num_documents:,}; '
              'this revision may be partial, --revision chooses another')
    return docs


def tokenize(example, enc):
    ids = enc.encode_ordinary(example['text'])  # ordinary: no text counts as a special token
    ids.append(enc.eot_token)  # ends each document
    return {'ids': np.array(ids, dtype=np.uint16), 'len': len(ids)}  # uint16 keeps the cache small


def write_split(path, docs, num_batches=1024):
    """Concatenates all ids into one file, a batch of documents at a time, since they do not fit in memory."""
    docs = docs.with_format('numpy')
    num_batches = min(num_batches, len(docs))  # shard refuses to make empty ones
    with replacing(path) as tmp:
        arr = np.memmap(tmp, dtype=np.uint16, mode='w+', shape=(int(np.sum(docs['len'][:], dtype=np.uint64)),))
        start = 0
        for i in tqdm(range(num_batches), desc=f'writing {path}'):
            ids = np.concatenate(docs.shard(num_shards=num_batches, index=i, contiguous=True)['ids'][:])
            arr[start:start + len(ids)] = ids
            start += len(ids)
        arr.flush()
        del arr  # Windows renames no mapped file
    print(f'{path} has {start:,} tokens')


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--num_proc', type=int, default=8, help='worker processes; about half the CPU cores')
    parser.add_argument('--revision', help=f'branch or pull request of {repo} on the hub')
    args = parser.parse_args()

    enc = gpt2_encoding()  # first, since it fails sooner than the download
    docs = load_documents(args.revision, args.num_proc)
    # the corpus comes as one split: nanoGPT's share and seed give nanoGPT's validation documents
    splits = docs.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for name, split in (('train', splits['train']), ('val', splits['test'])):
        tokens = split.map(tokenize, fn_kwargs={'enc': enc}, remove_columns=split.column_names,
                           num_proc=args.num_proc, desc=f'tokenizing {name}')
        write_split(os.path.join(folder, f'{name}.bin'), tokens)


if __name__ == '__main__':
    main()
