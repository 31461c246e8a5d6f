"""How much the studio takes from its clients, and holds for them."""

MAX_CLIENTS = 32  # WebSockets at a time
MAX_VOICES = 4  # of a client
MAX_MIDI_BYTES = 2 << 20  # of an uploaded file
MAX_PIECE_SECONDS = 1800.0
MAX_NOTES = 50_000  # of a piece
MAX_UPLOADS = 32  # pieces kept; then the one that was used least recently goes
MAX_MESSAGE_BYTES = 64 << 10  # of a WebSocket's text
MAX_KEYS = 4096  # notes of a phrase
MAX_SAVES = 2  # files that are made at a time
MAX_SETTINGS = 24  # samplings (temperature, steps) that are compiled; a restart forgets them
MAX_RENDERED = 8  # pieces whose sound by the SoundFont is kept
AHEAD_SECONDS = 20.0  # audio that is made beyond the cursor
FAVORED_SECONDS = 5.0  # by which the voice that is heard leads the others
MAX_MADE = 12  # segments that a voice remembers: those ahead, and a few behind
PENDING_BYTES = 4 << 20  # made, and not taken by the client yet
