"""An index of images by their vectors, kept up to date, and searched with a photo or with words."""
