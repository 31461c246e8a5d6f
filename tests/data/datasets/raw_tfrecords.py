"""Writes TFRecords as the published ones, small, of what the readers of the archives find, with TensorFlow itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from music_synth.data.datasets import reading
from music_synth.data.datasets.corpus import Recording
from music_synth.data.note_sequences import write_note_sequence
from music_synth.data.quiet_tensorflow import tf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from note_seq import midi_to_note_sequence
    from note_seq.protobuf import music_pb2

STEMS = {  # names of files, by split
    "maestro": "maestro-v3.0.0_ns_wav_{}",
    "slakh": "slakh_multi_full_{}_all_inst",
    "cerberus4": "slakh_multi_cerberus_{}_bass:drums:guitar:piano",
    "guitarset": "{}",
    "musicnet": "musicnet-{}",
    "musicnet_em": "{}",
    "urmp": "{}",
}
CLASSES = {0: "Acoustic Piano", 33: "Electric Bass", 29: "Distorted Electric Guitar", 48: "String Ensemble"}
QUARTET = {32: "bass", None: "drums", 24: "guitar", 0: "piano"}


def write_tfrecords(folder: Path, name: str, recordings: Sequence[Recording], shards: int = 2) -> Path:
    """The recordings of a data set, in their order, a split in `shards` files at most (URMP's in one), in `folder`."""
    for split in dict.fromkeys(item.split for item in recordings):
        stem = STEMS[name].format("subsets_10_train" if (name, split) == ("slakh", "train") else split)
        contents = [features_of(name, item) for item in recordings if item.split == split]
        if name == "urmp":
            write_file(folder / f"{stem}.tfrecord", contents)
            continue
        total = min(shards, len(contents))
        for i, part in enumerate(np.array_split(np.arange(len(contents)), total)):
            write_file(folder / f"{stem}.tfrecord-{i:05d}-of-{total:05d}", [contents[k] for k in part])
    return folder


def write_file(path: Path, contents: Sequence[Mapping[str, Any] | bytes]) -> Path:
    """A TFRecord file of Examples: strings, floats or integers, one or a list each; or of bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for content in contents:
            writer.write(content if isinstance(content, bytes) else example(content))
    return path


def example(features: Mapping[str, Any]) -> bytes:
    lists = {}
    for name, value in features.items():
        values = [value] if isinstance(value, (str, bytes, int, float)) else list(value)
        if values and isinstance(values[0], (str, bytes)):
            values = [each.encode() if isinstance(each, str) else each for each in values]
            lists[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        elif values and isinstance(values[0], (int, np.integer)):
            lists[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        else:
            lists[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Example(features=tf.train.Features(feature=lists)).SerializeToString()


def features_of(name: str, item: Recording) -> dict[str, Any]:
    """What a published record holds, of the files of an archive."""
    if name in ("slakh", "cerberus4"):
        return _multitrack(name, item)
    notes = reading.corpus(name).read_notes(item)
    sequence = write_note_sequence(item.id, notes)
    if name == "maestro":  # keys and pedals
        midi, wav = (path.read_bytes() for path in item.files)
        return {"audio": wav, "sequence": midi_to_note_sequence(midi).SerializeToString(), "id": item.id}
    if name == "guitarset":
        velocities = music_pb2.VelocityRange(min=1, max=127).SerializeToString()
        sequence = write_note_sequence("", [note._replace(program=0) for note in notes])  # nobody says which guitar
        audio = item.files[1].read_bytes()
        return {"sequence": sequence, "audio": audio, "velocity_range": velocities, "id": item.id}
    if name in ("musicnet", "musicnet_em"):
        samples, rate = soundfile.read(item.files[0], dtype="float32")
        return {"id": item.id, "sample_rate": float(rate), "audio": samples, "sequence": sequence}
    codes = item.id.split("_")[2:]
    parts = [[n._replace(instrument=0, program=0) for n in notes if n.instrument == i] for i in range(len(codes))]
    return {
        "id": item.id,
        "tracks": list(range(1, len(codes) + 1)),
        "inst_names": codes,
        "audio": item.files[0].read_bytes(),
        "sequence": sequence,
        "instrument_sequences": [write_note_sequence("", part) for part in parts],
    }


def _multitrack(name: str, item: Recording) -> dict[str, Any]:
    sounds = np.stack([soundfile.read(stem.audio, dtype="float32")[0] for stem in item.stems])
    if name == "slakh":
        names = ["Drums" if stem.is_drum else CLASSES[stem.program] for stem in item.stems]
    else:
        names = [QUARTET[None if stem.is_drum else stem.program] for stem in item.stems]
    return {
        "audio_sample_rate": soundfile.info(item.stems[0].audio).samplerate,
        "inst_names": names,
        "midi_class": [0] * len(names),
        "mix": sounds.sum(axis=0),
        "note_sequences": [midi_to_note_sequence(stem.midi.read_bytes()).SerializeToString() for stem in item.stems],
        "plugin_name": [7] * len(names),
        "program_num": [stem.program for stem in item.stems],
        "slakh_class": [1] * len(names),
        "src_ids": [stem.name for stem in item.stems],
        "stems": sounds.ravel(),
        "stems_shape": list(sounds.shape),
        "target_type": "all_inst",
        "track_id": item.id[:10],
    }
