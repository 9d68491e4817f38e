"""What is in an image, out of a list of labels: without training on them, or by a probe of an encoder's features."""
