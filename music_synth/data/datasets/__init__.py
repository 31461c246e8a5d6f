"""One tfds builder a data set. All store the same record: id, audio, sequence, programs."""
