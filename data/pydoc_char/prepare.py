"""Write Python's language reference as train.bin, val.bin and meta.pkl: one token per character."""
import os
import sys
from pydoc_data.topics import topics  # the texts of help('if') and so on

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # common.py
from common import locked, prepare_chars
from nanogpt_jax.errors import report_user_error

sys.excepthook = report_user_error
folder = os.path.dirname(os.path.abspath(__file__))
with locked(folder):
    prepare_chars('\n\n'.join(topics[key] for key in sorted(topics)), folder)
