"""Write Python's language reference as train.bin, val.bin and a tokenizer.json of its own."""
import os
import sys
from pydoc_data.topics import topics  # the texts of help('if') and so on

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py
from common import locked, split_text, write_splits
from nanogpt_jax.errors import report_user_error
from nanogpt_jax.tokenizer import make_tokenizer, train_tokenizer

sys.excepthook = report_user_error
folder = os.path.dirname(os.path.abspath(__file__))
with locked(folder):
    train, val = split_text('\n\n'.join(topics[key] for key in sorted(topics)))
    tokenizer = train_tokenizer([train], n_tokens=1024)
    encode = make_tokenizer(tokenizer, folder)[0].encode
    write_splits(folder, encode(train).ids, encode(val).ids, tokenizer=tokenizer)
