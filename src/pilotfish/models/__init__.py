"""A name in, a loaded target-draft pair out."""

from pilotfish.models.families import (
    FAMILIES,
    Family,
    evenly_spaced_sites,
    family_named,
    family_of,
    num_layers,
    site_module,
)
from pilotfish.models.identity import Identity, identify, identify_folder
from pilotfish.models.pair import DEMO_PAIRS, LoadedModel, Pair, check_same_vocabulary, load_model, load_pair
from pilotfish.models.tiny import tiny_model, tiny_pair, tiny_tokenizer
from pilotfish.models.weights import default_cache, resolve
from pilotfish.models.wheels import DEMO_MODELS

__all__ = [
    "DEMO_MODELS",
    "DEMO_PAIRS",
    "FAMILIES",
    "Family",
    "Identity",
    "LoadedModel",
    "Pair",
    "check_same_vocabulary",
    "default_cache",
    "evenly_spaced_sites",
    "family_named",
    "family_of",
    "identify",
    "identify_folder",
    "load_model",
    "load_pair",
    "num_layers",
    "resolve",
    "site_module",
    "tiny_model",
    "tiny_pair",
    "tiny_tokenizer",
]
