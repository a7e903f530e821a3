"""Documents and a tokenizer without files, for test_openwebtext.py and the processes it starts."""

import tiktoken


def tiny_encoding(name='tiny', more=()):
    """A byte-level encoding with GPT-2's word pattern and a few merges."""
    merges = [b'th', b'the', b' the', b'in', b' w', b'or', b' wor', *more]
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + merges)}
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding(name, pat_str=words, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': len(ranks)})


TINY = tiny_encoding()
DOCS = [f'document {i}: the words in it,' + ' the word' * (i % 7) + ' caf\u00e9 \U0001f600\n'
        for i in range(150)]
DOCS[3:6] = ['', '<|endoftext|> is text here', ' ' * 3000 + 'a' * 3000]
WAITING = DOCS[:100] + ['wait here'] + DOCS
