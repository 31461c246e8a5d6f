"""A small seeded composer: theory -> lines -> ensembles -> score (MIDI). No TensorFlow."""
