"""Every architecture of transformers that calls its attention interface: tiny models, inputs, comparison."""
