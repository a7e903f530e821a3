"""
Write train.bin and val.bin from OpenWebText, from another data set of the Hugging Face hub, or from
your documents, in GPT-2's tokens or in your own. They are large: read readme.md first.
$ python data/openwebtext/prepare.py --num_proc=8
$ python data/openwebtext/prepare.py --input='text/*.jsonl' --out_dir=data/mytext
$ python data/openwebtext/prepare.py --repo=HuggingFaceFW/fineweb-edu --name=sample-10BT \\
    --train_tokenizer=32000 --out_dir=data/fineweb
"""
import glob
import math
import os
import sys
import time
from itertools import chain

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py
from common import (
    OwnEncoding, gpt2_encoding, locked, read_text, replacing, slices, write_documents,
)
from nanogpt_jax import tokenizer
from nanogpt_jax.errors import UserError, optional_import, report_user_error

sys.excepthook = report_user_error
# -----------------------------------------------------------------------------
input = '' # local files instead of OpenWebText: .jsonl, .parquet or .txt (one document per file);
           # patterns like text/*.txt, separated by commas
repo = 'Skylion007/openwebtext' # a data set of the hub, such as HuggingFaceFW/fineweb-edu
name = '' # a configuration of repo, such as sample-10BT
revision = '' # a branch or pull request of repo on the hub
text_column = 'text' # the column of input or repo that holds the text
out_dir = '' # folder to write to; '': this script's; required with input and repo
train_tokenizer = 0 # train a tokenizer.json with this many tokens in out_dir, and use it; one that
                    # is there already is always used, in place of GPT-2's tokens
val_share = 0.0005 # fraction of the documents for val.bin; the default is nanoGPT's
num_proc = 8 # threads that tokenize, processes that download
from configurator import configure
args = sys.argv[1:] if __name__ == '__main__' else []
# no config files: a file given here could be a document
config, given = configure(globals(), [arg for arg in args if arg.startswith('-')])
# -----------------------------------------------------------------------------

datasets = optional_import('datasets')
if int(datasets.__version__.split('.')[0]) < 4:
    raise UserError(f'datasets {datasets.__version__} reads whole columns into memory: '
                    'pip install -U datasets')

openwebtext = repo
num_documents = 8013769  # in all of OpenWebText
readers = {'.jsonl': 'json', '.parquet': 'parquet', '.txt': None}
fewest_tokens = 257  # all bytes and <|endoftext|>
tokenizer_text = 10 ** 9  # most characters that a tokenizer is trained on


def check_flags():
    """Raise UserError for flags that do not fit together."""
    if others := [arg for arg in args if not arg.startswith('-')]:
        raise UserError(f'{others[0]} is not a flag; give files as --input={others[0]}')
    if num_proc < 1:
        raise UserError(f'--num_proc is {num_proc}; it must be at least 1')
    if train_tokenizer and not fewest_tokens <= train_tokenizer <= tokenizer.MOST_TOKENS:
        raise UserError(
            f'--train_tokenizer is {train_tokenizer}; it must be from {fewest_tokens} (all bytes '
            f'and <|endoftext|>) to {tokenizer.MOST_TOKENS} (uint16)')
    if 'input' in given and given & {'repo', 'name', 'revision'}:
        raise UserError('--input is for local files, --repo, --name and --revision for the hub')
    if given & {'input', 'repo'} and not out_dir:
        raise UserError('--input and --repo need --out_dir, as in --out_dir=data/mytext, so that '
                        'OpenWebText is not overwritten')


def find_files(patterns):
    """(paths that match, sorted within each pattern; their common extension). Raises UserError."""
    paths = []
    for pattern in patterns.split(','):
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f'--input: no file matches {pattern}')
        paths += [os.path.abspath(path) for path in found]
    endings = sorted({os.path.splitext(path)[1] for path in paths})
    if len(endings) > 1 or endings[0] not in readers:
        raise UserError(f'--input takes files of one kind, {", ".join(readers)}; {patterns} has '
                        f'{", ".join(map(repr, endings))}')
    return list(dict.fromkeys(paths)), endings[0]


def load_files(paths, ending):
    """The data set of local files, with the text column alone."""
    if ending == '.txt':
        for path in paths:
            read_text(path)  # fail early if one is not UTF-8

        def read(batch):
            return {text_column: [read_text(path) for path in batch[text_column]]}
        # read a text when it is needed
        return datasets.Dataset.from_dict({text_column: paths}).with_transform(read)
    # load one at a time: an error names its file, and other columns may differ
    return datasets.concatenate_datasets([load_file(path, readers[ending]) for path in paths])


def load_file(path, reader):
    try:
        docs = datasets.load_dataset(reader, data_files=glob.escape(path), split='train')
        docs.data.validate(full=True)  # the readers do not check UTF-8
    except Exception as e:  # of many types, with the reason in their cause
        reason = ' '.join(str(e.__cause__ or e).split()) or 'no documents'
        raise UserError(f'cannot read {path} ({reason})') from e
    return select_text(docs, path)


def select_text(docs, source):
    """docs with the text column alone. Raises UserError if a row has no text."""
    if text_column not in docs.column_names:
        raise UserError(f'{source} has no column {text_column!r}, but {docs.column_names}: '
                        'choose one with --text_column=')
    feature, nulls = docs.features[text_column], docs.data.column(text_column).null_count
    if feature not in (datasets.Value('string'), datasets.Value('large_string')) or nulls:
        raise UserError(f'{source}: column {text_column!r} must have a text in each row; '
                        f'it is {feature} with {nulls:,} nulls')
    return docs.select_columns(text_column)


def load_hub():
    """A data set of the Hugging Face hub, with the text column alone."""
    try:
        docs = datasets.load_dataset(repo, name=name or None, revision=revision or None,
                                     split='train', num_proc=num_proc)
    except Exception as e:  # hub, network, disk
        hint = ('--revision=refs/convert/parquet or --revision=refs/pr/22' if repo == openwebtext
                else 'another --repo, --name or --revision')
        raise UserError(f'cannot load {repo} at revision {revision or "main"} '
                        f'({" ".join(str(e).split())}): if the network is fine, try {hint}') from e
    if repo == openwebtext and len(docs) != num_documents:
        print(f'warning: {len(docs):,} documents where the whole corpus has {num_documents:,}; '
              'this revision may be partial, --revision chooses another')
    return select_text(docs, repo)


def find_encoding(folder):
    """The encoding of the folder's tokenizer.json, or GPT-2's; None if one is to be trained.

    Raises UserError if the folder has other tokens than the flags ask for.
    """
    path = os.path.join(folder, 'tokenizer.json')
    if os.path.exists(os.path.join(folder, 'meta.pkl')):
        raise UserError(f'{folder} has a meta.pkl, the vocabulary of other data: choose another '
                        '--out_dir, or delete it')
    if os.path.exists(path):
        enc = OwnEncoding(path)
        if train_tokenizer and enc.n_vocab > train_tokenizer:
            raise UserError(f'{path} has {enc.n_vocab:,} tokens, not {train_tokenizer:,}: delete '
                            'it to train another one, or leave --train_tokenizer out')
        print(f'using {path}, with {enc.n_vocab:,} tokens')
        return enc
    if not train_tokenizer:
        return gpt2_encoding()
    optional_import('tokenizers')
    if os.path.exists(os.path.join(folder, 'train.bin')):
        raise UserError(f'{folder} has a train.bin of other tokens, and a new tokenizer.json '
                        'would make it unreadable: choose another --out_dir, or delete it')
    return None


def first_texts(texts):
    """Yield the texts that a tokenizer is trained on."""
    left = tokenizer_text
    for text in chain.from_iterable(slices(texts)):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def train_encoding(path, texts):
    """Train a tokenizer.json on the first of the texts; returns its encoding."""
    t0 = time.perf_counter()
    text = tokenizer.train_tokenizer(first_texts(texts), train_tokenizer,
                                     show_progress=sys.stderr.isatty())
    with replacing(path) as [tmp], open(tmp, 'w', encoding='utf-8') as f:
        f.write(text)
    enc = OwnEncoding(path)
    print(f'{path} has {enc.n_vocab:,} tokens, trained in {time.perf_counter() - t0:.0f} s')
    return enc


def prepare(folder, files):
    """Write the files of a folder. files: what find_files returns, or None for the hub."""
    enc = find_encoding(folder)  # before the long download, since it may fail
    docs = load_files(*files) if files else load_hub()
    if not 0 < val_share < 1 or math.ceil(val_share * len(docs)) >= len(docs):
        raise UserError(f'--val_share={val_share} of {len(docs):,} documents leaves a split '
                        'without any; to split a single text, see data/shakespeare/prepare.py')
    # nanoGPT's share and seed, so the documents and their order are nanoGPT's too
    parts = docs.train_test_split(test_size=val_share, seed=2357, shuffle=True)
    splits = {'val': parts['test'][text_column], 'train': parts['train'][text_column]}
    enc = enc or train_encoding(os.path.join(folder, 'tokenizer.json'), splits['train'])
    write_documents(folder, splits, enc, num_proc)


def main():
    check_flags()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # this script reports the errors, in one line
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    files = find_files(input) if 'input' in given else None
    folder = out_dir or os.path.dirname(os.path.abspath(__file__))
    with locked(folder):
        prepare(folder, files)


if __name__ == '__main__':
    main()
