"""Data sets for tfds: one builder for all that have a reader, one for the embedded one. All store the same record."""
