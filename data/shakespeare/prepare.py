"""Tiny Shakespeare in GPT-2's tokens: writes train.bin and val.bin beside this file."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where common.py lies
from common import fetch, gpt2_encoding, read_text, split_text, tinyshakespeare_url, write_splits

folder = os.path.dirname(os.path.abspath(__file__))
path = os.path.join(folder, 'input.txt')  # your own text, if you put it here first
fetch(tinyshakespeare_url, path)
enc = gpt2_encoding()
# split before encoding, so that no token straddles the border; ordinary: no text counts as a special token
write_splits(folder, *(enc.encode_ordinary(part) for part in split_text(read_text(path))))
