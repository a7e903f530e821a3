"""Python's own language reference, one token per character: writes train.bin, val.bin and meta.pkl beside this file."""
import os
import sys
from pydoc_data.topics import topics  # the text behind help('if'), part of the standard library

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where common.py lies
from common import prepare_chars

folder = os.path.dirname(os.path.abspath(__file__))
prepare_chars('\n\n'.join(topics[key] for key in sorted(topics)), folder)
