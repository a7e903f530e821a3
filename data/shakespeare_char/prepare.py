"""Tiny Shakespeare, one token per character: writes train.bin, val.bin and meta.pkl beside this file."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where common.py lies
from common import fetch, prepare_chars, read_text, tinyshakespeare_url

folder = os.path.dirname(os.path.abspath(__file__))
path = os.path.join(folder, 'input.txt')  # your own text, if you put it here first
fetch(tinyshakespeare_url, path)
prepare_chars(read_text(path), folder)
