"""Write Tiny Shakespeare as train.bin, val.bin and meta.pkl: one token per character."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py
from common import fetch, locked, prepare_chars, read_text, tinyshakespeare_url
from nanogpt_jax.errors import report_user_error

sys.excepthook = report_user_error
folder = os.path.dirname(os.path.abspath(__file__))
path = os.path.join(folder, 'input.txt')  # put your own text here to use it instead
with locked(folder):
    fetch(tinyshakespeare_url, path)
    prepare_chars(read_text(path), folder)
