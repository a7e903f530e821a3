"""
Write train.bin and val.bin: OpenWebText, or documents of your own, in GPT-2's tokens. OpenWebText
is large: read readme.md first.
$ python data/openwebtext/prepare.py --num_proc=8
$ python data/openwebtext/prepare.py --input='text/*.jsonl' --out_dir=data/mytext
"""
import argparse
import glob
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py
from common import gpt2_encoding, read_text, write_documents
from nanogpt_jax.errors import UserError, optional_import, report_user_error

sys.excepthook = report_user_error
try:
    datasets = optional_import('datasets')
except KeyboardInterrupt:  # the import takes a second
    raise SystemExit(130) from None
if int(datasets.__version__.split('.')[0]) < 4:
    raise UserError(f'datasets {datasets.__version__} reads whole columns into memory: '
                    'pip install -U datasets')

repo = 'Skylion007/openwebtext'
num_documents = 8013769  # in the whole corpus
readers = {'.jsonl': 'json', '.parquet': 'parquet', '.txt': None}


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add('--input', help='local files instead of OpenWebText: .jsonl, .parquet or .txt (one\n'
                        'document per file); patterns like text/*.txt, several with commas')
    add('--text_column', help='the column of --input that has the text, if it is not named text')
    add('--out_dir', help="folder to write to: by default this script's; required with --input")
    add('--val_share', type=float, default=0.0005,
        help="fraction of the documents for val.bin; nanoGPT's is 0.0005")
    add('--num_proc', type=int, default=8, help='threads that tokenize, processes that download')
    add('--revision', help=f'branch or pull request of {repo} on the hub')

    def refuse(message):
        raise UserError(f'{message}; --help lists the flags')
    parser.error = refuse
    args = parser.parse_args()
    if args.num_proc < 1:
        refuse(f'--num_proc is {args.num_proc}; it must be at least 1')
    if args.input is None and args.text_column or args.input is not None and args.revision:
        refuse('--text_column belongs to --input, --revision to OpenWebText')
    if args.input is not None and not args.out_dir:
        refuse('--input needs --out_dir, as in --out_dir=data/mytext, so that OpenWebText is not '
               'overwritten')
    args.out_dir = args.out_dir or os.path.dirname(os.path.abspath(__file__))
    if os.path.exists(os.path.join(args.out_dir, 'meta.pkl')):
        refuse(f'{args.out_dir} has a meta.pkl, the vocabulary of other data: choose another '
               '--out_dir, or delete it')
    return args


def find_files(patterns):
    """(paths that match, sorted within each pattern; their common extension)."""
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


def load_files(paths, ending, column):
    """(data set with the text column, str that identifies it) of local files."""
    source = str([(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths])
    if ending == '.txt':
        for path in paths:
            read_text(path)  # raises for invalid UTF-8 now, not after hours

        def read(batch):
            return {column: [read_text(path) for path in batch[column]]}
        # reads each text when it is needed
        return datasets.Dataset.from_dict({column: paths}).with_transform(read), source
    # one at a time, so that an error names its file, and other columns may differ
    docs = [load_file(path, readers[ending], column) for path in paths]
    return datasets.concatenate_datasets(docs), source


def load_file(path, reader, column):
    try:
        docs = datasets.load_dataset(reader, data_files=glob.escape(path), split='train')
        docs.data.validate(full=True)  # checks UTF-8, which the readers do not
    except Exception as e:  # the library raises many types, with the reason in their cause
        reason = ' '.join(str(e.__cause__ or e).split()) or 'no documents'
        raise UserError(f'cannot read {path} ({reason})') from e
    if column not in docs.column_names:
        raise UserError(f'{path} has no column {column!r}, but {docs.column_names}: '
                        'choose one with --text_column=')
    feature, nulls = docs.features[column], docs.data.column(column).null_count
    if feature not in (datasets.Value('string'), datasets.Value('large_string')) or nulls:
        raise UserError(f'{path}: column {column!r} must have a text in each row; '
                        f'it is {feature} with {nulls:,} nulls')
    return docs.select_columns(column)


def load_hub(revision, num_proc):
    """(data set, str that identifies it) of the corpus on the Hugging Face hub."""
    try:
        docs = datasets.load_dataset(repo, revision=revision, split='train', num_proc=num_proc)
    except Exception as e:  # hub, network, disk
        raise UserError(f'cannot load {repo} at revision {revision or "main"} '
                        f'({" ".join(str(e).split())}): if the network is fine, try '
                        '--revision=refs/convert/parquet or --revision=refs/pr/22') from e
    if len(docs) != num_documents:
        print(f'warning: {len(docs):,} documents where the whole corpus has {num_documents:,}; '
              'this revision may be partial, --revision chooses another')
    return docs, str(docs.cache_files)  # whose names contain the commit


def main():
    args = parse_flags()
    column = args.text_column or 'text'
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # the errors raised here have the reason in one line
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    files = None if args.input is None else find_files(args.input)
    enc = gpt2_encoding()  # may fail, so before the long download
    if files:
        docs, source = load_files(*files, column)
    else:
        docs, source = load_hub(args.revision, args.num_proc)
    if not 0 < args.val_share < 1 or math.ceil(args.val_share * len(docs)) >= len(docs):
        raise UserError(f'--val_share={args.val_share} of {len(docs):,} documents leaves a split '
                        'without any; to split a single text, see data/shakespeare/prepare.py')
    # nanoGPT's share and seed, so the documents and their order are nanoGPT's too
    parts = docs.train_test_split(test_size=args.val_share, seed=2357, shuffle=True)
    splits = {'val': parts['test'][column], 'train': parts['train'][column]}
    source = f'{source} {column} {args.val_share}'
    write_documents(args.out_dir, splits, enc, source, args.num_proc)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print('stopped; run the same command to resume', file=sys.stderr)
        sys.exit(130)
    except OSError as e:  # an unreadable file, a full disk
        raise UserError(str(e)) from e
