"""From any source to examples, and from examples to batches. docs/data.md describes the formats."""
