"""Conversations with labelled spans, data sets and a tokenizer in; labelled tokens and leak-free splits out."""

from pilotfish.texts.chat_sets import (
    read_halueval,
    read_halueval_benign,
    read_liedetector,
    read_mitre_frr,
    read_toxic_spans,
    read_xstest,
)
from pilotfish.texts.conversations import read_jsonl, write_jsonl
from pilotfish.texts.endpoint import Endpoint
from pilotfish.texts.injection import AttackSplit, injection_class, read_bipia, split_by_attack
from pilotfish.texts.labelling import Judged, Labelling, judge_passages, labelled
from pilotfish.texts.readers import read_cyberseceval, read_sven
from pilotfish.texts.splits import apart_from, check_leak, joined_groups, num_documents, split
from pilotfish.texts.steering_sets import (
    Contrast,
    read_actadd_essays,
    read_anthropic_evals,
    read_contrasts,
    read_repe_facts,
)
from pilotfish.texts.tokens import Encoded, Rendered, TokenizedText, encode, render, tokenize

__all__ = [
    "AttackSplit",
    "Contrast",
    "Encoded",
    "Endpoint",
    "Judged",
    "Labelling",
    "Rendered",
    "TokenizedText",
    "apart_from",
    "check_leak",
    "encode",
    "injection_class",
    "joined_groups",
    "judge_passages",
    "labelled",
    "num_documents",
    "read_actadd_essays",
    "read_anthropic_evals",
    "read_bipia",
    "read_contrasts",
    "read_cyberseceval",
    "read_halueval",
    "read_halueval_benign",
    "read_jsonl",
    "read_liedetector",
    "read_mitre_frr",
    "read_repe_facts",
    "read_sven",
    "read_toxic_spans",
    "read_xstest",
    "render",
    "split",
    "split_by_attack",
    "tokenize",
    "write_jsonl",
]
