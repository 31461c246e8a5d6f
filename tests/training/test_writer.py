"""metrics.jsonl over restarts, event files that TensorBoard reads, pictures."""

import json

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from music_synth.training.writer import Writer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """All events of a run, read by the record format: length, its checksum, data, its checksum."""
    found = []
    for path in sorted((folder / "events").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_resuming_drops_what_came_after_the_restored_step(tmp_path):
    writer = Writer(tmp_path)
    for step in (10, 20, 30):
        writer.scalars(step, {"train/loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed while writing
    writer = Writer(tmp_path, start_step=20)
    writer.scalars(30, {"train/loss": 0.5})
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 0.5)]


def test_event_files_hold_curves_pictures_sounds_and_text(tmp_path):
    writer = Writer(tmp_path)
    writer.scalars(5, {"eval/loss": 0.25})
    writer.image(5, "mel", np.zeros((4, 6, 3), np.uint8))
    writer.audio(5, "sound", np.sin(np.arange(1600) / 10), 16000)
    writer.config(5, "train.num_steps = 3")
    writer.close()
    values = {value.tag: (event.step, value) for event in events(tmp_path) for value in event.summary.value}
    assert values["eval/loss"][0] == 5
    assert values["eval/loss"][1].simple_value == 0.25
    assert (values["mel"][1].image.height, values["mel"][1].image.width) == (4, 6)
    assert values["sound"][1].audio.sample_rate == 16000
    assert b"train.num_steps = 3" in values["config/text_summary"][1].tensor.string_val[0]
