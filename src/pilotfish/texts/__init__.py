"""Conversations with labelled spans, data sets and a tokenizer in; labelled tokens and leak-free splits out."""

from pilotfish.texts.conversations import read_jsonl, write_jsonl
from pilotfish.texts.readers import read_cyberseceval, read_halueval_benign, read_sven
from pilotfish.texts.splits import check_leak, split
from pilotfish.texts.tokens import Encoded, Rendered, TokenizedText, encode, render, tokenize

__all__ = [
    "Encoded",
    "Rendered",
    "TokenizedText",
    "check_leak",
    "encode",
    "read_cyberseceval",
    "read_halueval_benign",
    "read_jsonl",
    "read_sven",
    "render",
    "split",
    "tokenize",
    "write_jsonl",
]
