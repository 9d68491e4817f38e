"""Join any vision encoder to any Hugging Face language model through a small trainable bridge."""

__version__ = "0.1.0"
