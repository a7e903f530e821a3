"""
OpenWebText in GPT-2's tokens, or documents of your own, as train.bin and val.bin. Large: read readme.md first.
$ python data/openwebtext/prepare.py --num_proc=8
$ python data/openwebtext/prepare.py --input='text/*.jsonl' --out_dir=data/mytext
"""
import argparse
import glob
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where common.py lies
from common import gpt2_encoding, read_text, write_documents

try:
    import datasets
except ImportError as e:
    raise SystemExit(f'preparing OpenWebText needs the datasets library ({e}): pip install datasets') from None
except KeyboardInterrupt:  # it takes a second
    raise SystemExit(130) from None
if int(datasets.__version__.split('.')[0]) < 4:
    raise SystemExit(f'datasets {datasets.__version__} reads whole columns into memory: pip install -U datasets')

repo = 'Skylion007/openwebtext'
num_documents = 8013769  # in the whole corpus
readers = {'.jsonl': 'json', '.parquet': 'parquet', '.txt': None}


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--input', help='local files instead of OpenWebText: .jsonl, .parquet or .txt (a file is a document);\n'
                                        'patterns like text/*.txt, several with commas')
    parser.add_argument('--text_column', help='the column of --input that has the text, if it is not named text')
    parser.add_argument('--out_dir', help="where the files go: this script's folder, for --input one of your choice")
    parser.add_argument('--val_share', type=float, default=0.0005, help="of the documents, for val.bin; nanoGPT's is 0.0005")
    parser.add_argument('--num_proc', type=int, default=8, help='threads that tokenize, processes that download')
    parser.add_argument('--revision', help=f'branch or pull request of {repo} on the hub')
    parser.error = lambda message: sys.exit(f'{message}; --help lists the flags')
    args = parser.parse_args()
    if args.num_proc < 1:
        parser.error(f'--num_proc is {args.num_proc}; it must be at least 1')
    if args.input is None and args.text_column or args.input is not None and args.revision:
        parser.error('--text_column belongs to --input, --revision to OpenWebText')
    if args.input is not None and not args.out_dir:
        parser.error('--input needs --out_dir, as in --out_dir=data/mytext, so that OpenWebText is not overwritten')
    args.out_dir = args.out_dir or os.path.dirname(os.path.abspath(__file__))
    if os.path.exists(os.path.join(args.out_dir, 'meta.pkl')):
        parser.error(f'{args.out_dir} has a meta.pkl, the vocabulary of other data: choose another --out_dir, or delete it')
    return args


def find_files(patterns):
    """The files that match, sorted within each pattern, and their ending."""
    paths = []
    for pattern in patterns.split(','):
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise SystemExit(f'--input: no file matches {pattern}')
        paths += [os.path.abspath(path) for path in found]
    endings = sorted({os.path.splitext(path)[1] for path in paths})
    if len(endings) > 1 or endings[0] not in readers:
        raise SystemExit(f'--input takes files of one kind, {", ".join(readers)}; {patterns} has {", ".join(map(repr, endings))}')
    return list(dict.fromkeys(paths)), endings[0]


def load_files(paths, ending, column):
    """(documents, what tells them from others) of local files, as one split with this column."""
    source = str([(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths])
    if ending == '.txt':
        for path in paths:
            read_text(path)  # what is not UTF-8 is said now, not after hours
        docs = datasets.Dataset.from_dict({column: paths})  # read when their turn comes
        return docs.with_transform(lambda batch: {column: [read_text(path) for path in batch[column]]}), source
    # one at a time: an error has a file then, and columns beside the text may differ
    return datasets.concatenate_datasets([load_file(path, readers[ending], column) for path in paths]), source


def load_file(path, reader, column):
    try:
        docs = datasets.load_dataset(reader, data_files=glob.escape(path), split='train')
        docs.data.validate(full=True)  # UTF-8, which the readers take on trust
    except Exception as e:  # the library raises many kinds, with the reason in their cause
        raise SystemExit(f'cannot read {path} ({" ".join(str(e.__cause__ or e).split()) or "no documents"})') from None
    if column not in docs.column_names:
        raise SystemExit(f'{path} has no column {column!r}, but {docs.column_names}: choose one with --text_column=')
    feature, nulls = docs.features[column], docs.data.column(column).null_count
    if feature not in (datasets.Value('string'), datasets.Value('large_string')) or nulls:
        raise SystemExit(f'{path}: column {column!r} must have a text in each row; it is {feature} with {nulls:,} nulls')
    return docs.select_columns(column)


def load_hub(revision, num_proc):
    """(documents, what tells them from others) of the corpus on the Hugging Face hub, as one split."""
    try:
        docs = datasets.load_dataset(repo, revision=revision, split='train', num_proc=num_proc)
    except Exception as e:  # hub, network, disk
        raise SystemExit(f'cannot load {repo} at revision {revision or "main"} ({" ".join(str(e).split())}): if the '
                         'network is fine, try --revision=refs/convert/parquet or --revision=refs/pr/22') from None
    if len(docs) != num_documents:
        print(f'warning: {len(docs):,} documents where the whole corpus has {num_documents:,}; '
              'this revision may be partial, --revision chooses another')
    return docs, str(docs.cache_files)  # their names hold the commit


def main():
    args = parse_flags()
    column = args.text_column or 'text'
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the errors here, in one line
    files = None if args.input is None else find_files(args.input)
    enc = gpt2_encoding()  # first, since it fails sooner than the download
    if files:
        docs, source = load_files(*files, column)
    else:
        docs, source = load_hub(args.revision, args.num_proc)
    if not 0 < args.val_share < 1 or math.ceil(args.val_share * len(docs)) >= len(docs):
        raise SystemExit(f'--val_share={args.val_share} of {len(docs):,} documents leaves a split without any; to cut a '
                         'single text in two, see data/shakespeare/prepare.py')
    # nanoGPT's share and seed give nanoGPT's documents in nanoGPT's order
    parts = docs.train_test_split(test_size=args.val_share, seed=2357, shuffle=True)
    splits = {'val': parts['test'][column], 'train': parts['train'][column]}
    write_documents(args.out_dir, splits, enc, f'{source} {column} {args.val_share}', args.num_proc)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print('stopped; the same command goes on from there', file=sys.stderr)
        sys.exit(130)
    except OSError as e:  # a file that may not be read, a full disk
        sys.exit(str(e))
