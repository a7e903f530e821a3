"""Write Tiny Shakespeare as train.bin and val.bin: GPT-2's tokens."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py
from common import (
    fetch, gpt2_encoding, locked, read_text, split_text, tinyshakespeare_url, write_splits,
)
from nanogpt_jax.errors import report_user_error

sys.excepthook = report_user_error
folder = os.path.dirname(os.path.abspath(__file__))
path = os.path.join(folder, 'input.txt')  # put your own text here to use it instead
with locked(folder):
    fetch(tinyshakespeare_url, path)
    enc = gpt2_encoding()
    # split before encoding, so that no token spans both; ordinary: no text is a special token
    write_splits(folder, *(enc.encode_ordinary(part) for part in split_text(read_text(path))))
