"""Monitor heads on the draft of speculative decoding: every token scored, with no extra forward pass."""

__version__ = "0.1.0"
