"""Messages mean what they say or are refused; frames hold the samples of an audio file."""

import json
import struct

import numpy as np
import pytest

from music_synth.audio.io import audio_to_int16
from music_synth.audio.mel import MAX_LOG_MEL, MIN_LOG_MEL
from music_synth.studio import protocol
from music_synth.studio.protocol import Edit, PartEdit, Play, ProtocolError, Voice, read_message

VOICE = {"kind": "decoder"}
PLAY = {"type": "play", "job": 1, "piece": "a", "voices": [VOICE]}


def test_a_message_is_read():
    part = {"program": 40, "gain": -6, "mute": True}
    text = {**PLAY, "edit": {"parts": {"3": part}, "tempo": 2}, "at": 7, "change": True}
    edit = Edit({3: PartEdit(program=40, gain=-6.0, mute=True)}, 0, 2.0)
    assert read_message(json.dumps(text)) == Play(1, "a", (Voice("decoder"),), edit, 0, 7, True)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not JSON"),
        ("[" * 30000, "not JSON"),
        ("[]", "must be an object"),
        ({"type": "sing"}, "type must be one of"),
        ({**PLAY, "voices": []}, "at least one"),
        ({**PLAY, "voices": [VOICE] * 5}, "a list of at most 4"),
        ({**PLAY, "voices": [{"kind": "../../etc"}]}, "kind must be one of"),
        ({**PLAY, "selected": 1}, "selected must be a whole number"),
        ({**PLAY, "at": True}, "at must be a whole number"),
        ({**PLAY, "at": 1e9}, "at must be a whole number"),
        ({**PLAY, "piece": "x" * 201}, "at most 200 characters"),
        ({**PLAY, "piece": "\ud800"}, "at most 200 characters"),
        ({**PLAY, "edit": {"tempo": float("nan")}}, "tempo must be a number"),
        ({**PLAY, "edit": {"parts": {"-1": {}}}}, "no number of a part"),
        ({**PLAY, "edit": {"parts": {"1": {"program": 128}}}}, "program must be"),
        ({**PLAY, "more": 1}, "no field 'more'"),
        ({"type": "key", "pitch": 128, "velocity": 1, "at": 0}, "pitch must be"),
        ({"type": "live", "voice": {"kind": "soundfont"}}, "played by a decoder"),
        ('"' + "x" * (65 << 10) + '"', "at most"),
    ],
)
def test_what_means_nothing_is_refused(text, said):
    with pytest.raises(ProtocolError, match=said):
        read_message(text if isinstance(text, str) else json.dumps(text))


def test_audio_frames_have_the_samples_of_a_file():
    audio = np.array([0.0, 0.5, -2.0, 1.0, 1e-5], np.float32)
    frame = protocol.pcm_frame(9, 2, 320, audio, protocol.FIRST)
    assert struct.unpack("<BBHIII", frame[:16]) == (1, 2, 1, 9, 320, 5)
    np.testing.assert_array_equal(np.frombuffer(frame[16:], "<i2"), audio_to_int16(audio))


def test_mel_frames_go_from_silence_to_the_loudest():
    mel = np.full((2, 128), MIN_LOG_MEL, np.float32)
    mel[1] = MAX_LOG_MEL
    frame = protocol.mel_frame(1, 0, 256, mel)
    assert struct.unpack("<BBHIII", frame[:16]) == (2, 0, 0, 1, 256, 2)
    assert frame[16:] == bytes(128) + bytes([255]) * 128
