"""
Write train.bin and val.bin: OpenWebText, another data set of the Hugging Face hub, or documents of
your own, in GPT-2's tokens or those of a tokenizer.json. They are large: read readme.md first.
$ python data/openwebtext/prepare.py --num_proc=8
$ python data/openwebtext/prepare.py --input='text/*.jsonl' --out_dir=data/mytext
$ python data/openwebtext/prepare.py --repo=HuggingFaceFW/fineweb-edu --name=sample-10BT \\
    --train_tokenizer=32000 --out_dir=data/fineweb
"""
import argparse
import glob
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py
from common import OwnEncoding, gpt2_encoding, locked, read_text, replacing, rows, write_documents
from nanogpt_jax.errors import UserError, optional_import, report_user_error
from nanogpt_jax.tokenizer import MOST_TOKENS, train_tokenizer

sys.excepthook = report_user_error
datasets = optional_import('datasets')
if int(datasets.__version__.split('.')[0]) < 4:
    raise UserError(f'datasets {datasets.__version__} reads whole columns into memory: '
                    'pip install -U datasets')

openwebtext = 'Skylion007/openwebtext'
num_documents = 8013769  # in the whole corpus
readers = {'.jsonl': 'json', '.parquet': 'parquet', '.txt': None}
fewest_tokens = 257  # all bytes and <|endoftext|>
tokenizer_text = 10 ** 9  # characters that a tokenizer is trained on at most


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add('--input', help='local files instead of OpenWebText: .jsonl, .parquet or .txt (one\n'
                        'document per file); patterns like text/*.txt, separated by commas')
    add('--repo', help='another data set of the hub, such as HuggingFaceFW/fineweb-edu')
    add('--name', help="which of the --repo's configurations, such as sample-10BT")
    add('--text_column', help='the column of --input or --repo with the text (text)')
    add('--out_dir', help="folder to write to: by default this script's; required with --input\n"
                          'and --repo')
    add('--train_tokenizer', type=int, metavar='N',
        help='train a tokenizer with N tokens on the text, write it to tokenizer.json in\n'
             "out_dir, and use it; one that lies there is used anyway, in place of GPT-2's")
    add('--val_share', type=float, default=0.0005,
        help="fraction of the documents for val.bin; nanoGPT's is 0.0005")
    add('--num_proc', type=int, default=8, help='threads that tokenize, processes that download')
    add('--revision', help='branch or pull request of the data set on the hub')

    def refuse(message):
        raise UserError(f'{message}; --help lists the flags')
    parser.error = refuse
    args = parser.parse_args()
    check_flags(args)
    args.out_dir = args.out_dir or os.path.dirname(os.path.abspath(__file__))
    if os.path.exists(os.path.join(args.out_dir, 'meta.pkl')):
        raise UserError(f'{args.out_dir} has a meta.pkl, the vocabulary of other data: choose '
                        'another --out_dir, or delete it')
    return args


def check_flags(args):
    """Raise UserError for flags that do not fit together."""
    local, hub = args.input is not None, args.repo is not None
    if args.num_proc < 1:
        raise UserError(f'--num_proc is {args.num_proc}; it must be at least 1')
    if args.train_tokenizer is not None and not (
            fewest_tokens <= args.train_tokenizer <= MOST_TOKENS):
        raise UserError(f'--train_tokenizer is {args.train_tokenizer}; it must be from '
                        f'{fewest_tokens} (all bytes and <|endoftext|>) to {MOST_TOKENS} (uint16)')
    if local and (hub or args.revision):
        raise UserError('--input is for local files, --repo and --revision are for the hub')
    if args.text_column and not (local or hub) or args.name and not hub:
        raise UserError('--text_column belongs to --input or --repo, --name to --repo')
    if (local or hub) and not args.out_dir:
        raise UserError(f'--{"input" if local else "repo"} needs --out_dir, as in '
                        '--out_dir=data/mytext, so that OpenWebText is not overwritten')


def find_files(patterns):
    """(paths that match, sorted within each pattern; their common extension). Raises UserError."""
    paths = []
    for pattern in patterns.split(','):
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f'--input: no file matches {pattern}')
        if others := [path for path in found if not os.path.isfile(path)]:
            raise UserError(f'--input: {others[0]} is not a file')  # a folder, or an endless pipe
        paths += [os.path.abspath(path) for path in found]
    endings = sorted({os.path.splitext(path)[1] for path in paths})
    if len(endings) > 1 or endings[0] not in readers:
        raise UserError(f'--input takes files of one kind, {", ".join(readers)}; {patterns} has '
                        f'{", ".join(map(repr, endings))}')
    return list(dict.fromkeys(paths)), endings[0]


def load_files(paths, ending, column):
    """The data set of local files, with the text column alone."""
    if ending == '.txt':
        for path in paths:
            read_text(path)  # fail early if one is not UTF-8

        def read(batch):
            return {column: [read_text(path) for path in batch[column]]}
        # a text is read when it is needed
        return datasets.Dataset.from_dict({column: paths}).with_transform(read)
    # one at a time, so that an error names its file, and other columns may differ
    docs = [load_file(path, readers[ending], column) for path in paths]
    return datasets.concatenate_datasets(docs)


def load_file(path, reader, column):
    try:
        docs = datasets.load_dataset(reader, data_files=glob.escape(path), split='train')
        docs.data.validate(full=True)  # checks UTF-8, which the readers do not
    except Exception as e:  # the library raises many types, with the reason in their cause
        reason = ' '.join(str(e.__cause__ or e).split()) or 'no documents'
        raise UserError(f'cannot read {path} ({reason})') from e
    return select_text(docs, column, path)


def select_text(docs, column, source):
    """docs with the text column alone. Raises UserError if it has no text in each row."""
    if column not in docs.column_names:
        raise UserError(f'{source} has no column {column!r}, but {docs.column_names}: '
                        'choose one with --text_column=')
    feature, nulls = docs.features[column], docs.data.column(column).null_count
    if feature not in (datasets.Value('string'), datasets.Value('large_string')) or nulls:
        raise UserError(f'{source}: column {column!r} must have a text in each row; '
                        f'it is {feature} with {nulls:,} nulls')
    return docs.select_columns(column)


def load_hub(repo, name, revision, column, num_proc):
    """A data set of the Hugging Face hub, with the text column alone."""
    try:
        docs = datasets.load_dataset(repo, name=name, revision=revision, split='train',
                                     num_proc=num_proc)
    except Exception as e:  # hub, network, disk
        hint = ('--revision=refs/convert/parquet or --revision=refs/pr/22' if repo == openwebtext
                else 'another --repo, --name or --revision')
        raise UserError(f'cannot load {repo} at revision {revision or "main"} '
                        f'({" ".join(str(e).split())}): if the network is fine, try {hint}') from e
    if repo == openwebtext and len(docs) != num_documents:
        print(f'warning: {len(docs):,} documents where the whole corpus has {num_documents:,}; '
              'this revision may be partial, --revision chooses another')
    return select_text(docs, column, repo)


def find_encoding(path, n_tokens):
    """The encoding of the tokenizer.json at path, or GPT-2's; None if one is to be trained there
    with n_tokens. Raises UserError if that is impossible."""
    if os.path.exists(path):
        enc = OwnEncoding(path)
        if n_tokens and enc.n_vocab > n_tokens:
            raise UserError(f'{path} has {enc.n_vocab:,} tokens, not {n_tokens:,}: delete it to '
                            'train another one, or leave --train_tokenizer out')
        print(f'using {path}, with {enc.n_vocab:,} tokens')
        return enc
    if not n_tokens:
        return gpt2_encoding()
    optional_import('tokenizers')
    folder = os.path.dirname(path)
    if os.path.exists(os.path.join(folder, 'train.bin')):
        raise UserError(f'{folder} has a train.bin of other tokens, which a tokenizer.json beside '
                        'it would make unreadable: choose another --out_dir, or delete it')
    return None


def train_encoding(path, n_tokens, texts):
    """The encoding of a new tokenizer.json with n_tokens, trained on the first of the texts."""
    def first_texts():
        left = tokenizer_text
        for start in range(0, len(texts), rows):
            for text in texts[start:start + rows]:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return
    t0 = time.perf_counter()
    text = train_tokenizer(first_texts(), n_tokens, show_progress=sys.stderr.isatty())
    with replacing(path) as [tmp], open(tmp, 'w', encoding='utf-8') as f:
        f.write(text)
    enc = OwnEncoding(path)
    print(f'{path} has {enc.n_vocab:,} tokens, trained in {time.perf_counter() - t0:.0f} s')
    return enc


def main():
    args = parse_flags()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # errors are raised here, with the reason in one line
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    files = None if args.input is None else find_files(args.input)
    with locked(args.out_dir):
        prepare(args, files)


def prepare(args, files):
    """Write the files of args.out_dir; files: what find_files returns, None for the hub."""
    column = args.text_column or 'text'
    tokenizer = os.path.join(args.out_dir, 'tokenizer.json')
    enc = find_encoding(tokenizer, args.train_tokenizer)  # may fail, so before the long download
    if files:
        docs = load_files(*files, column)
    else:
        repo = args.repo if args.repo is not None else openwebtext
        docs = load_hub(repo, args.name, args.revision, column, args.num_proc)
    if not 0 < args.val_share < 1 or math.ceil(args.val_share * len(docs)) >= len(docs):
        raise UserError(f'--val_share={args.val_share} of {len(docs):,} documents leaves a split '
                        'without any; to split a single text, see data/shakespeare/prepare.py')
    # nanoGPT's share and seed, so the documents and their order are nanoGPT's too
    parts = docs.train_test_split(test_size=args.val_share, seed=2357, shuffle=True)
    splits = {'val': parts['test'][column], 'train': parts['train'][column]}
    enc = enc or train_encoding(tokenizer, args.train_tokenizer, splits['train'])
    write_documents(args.out_dir, splits, enc, args.num_proc)


if __name__ == '__main__':
    main()
