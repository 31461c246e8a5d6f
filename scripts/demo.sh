#!/usr/bin/env bash
# From a fresh checkout to sound: sets up, plays a MIDI file with the decoder that ships, builds the embedded data set,
# trains both decoders for a few minutes, plays the file through the one of diffusion and scores both. Made for 2 CPU
# cores and 20 minutes; a run that was broken off goes on where it stopped.
#
#   scripts/demo.sh [FILE.mid]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DIFFUSION_STEPS=${DIFFUSION_STEPS:-300}
AUTOREGRESSIVE_STEPS=${AUTOREGRESSIVE_STEPS:-200}
EVALUATION_SECONDS=${EVALUATION_SECONDS:-60}  # of the test split, from its start
OUT=runs/demo

midi=${1:-data/piano_with_pedal.mid}
if [[ ! -f "$midi" ]]; then
  printf 'error: no MIDI file %s\n' "$midi" >&2
  exit 1
fi
say() { printf '\n[demo] %s (%d s so far)\n' "$*" "$SECONDS"; }

scripts/setup.sh
# shellcheck source=/dev/null
source .venv/bin/activate

mkdir -p "$OUT"
say "playing $midi with the decoder that ships"
python -m music_synth.synthesize "$midi" --out "$OUT/shipped.wav"
printf '\n  first sound: %s\n' "$OUT/shipped.wav"

train() { # recipe, steps
  python -m music_synth.train --gin_file="$1.gin" --gin.MODEL_DIR="$OUT/$1" --gin.TRAIN_STEPS="$2" \
    --gin.TASK=synthetic
}
say "training the diffusion decoder for $DIFFUSION_STEPS steps (the data set is built first)"
train diffusion "$DIFFUSION_STEPS"
say "training the autoregressive decoder for $AUTOREGRESSIVE_STEPS steps"
train autoregressive "$AUTOREGRESSIVE_STEPS"
say "playing $midi with the decoder that was trained here"
python -m music_synth.synthesize "$midi" --checkpoint "$OUT/diffusion" --out "$OUT/demo.wav" --plot "$OUT/demo.png"
say "scoring both decoders"
python -m music_synth.evaluate --gin_file=evaluate.gin --checkpoints="$OUT/autoregressive,$OUT/diffusion" \
  --gin.MAX_SECONDS="$EVALUATION_SECONDS" --gin.OUTPUT_DIR="$OUT/scores"
say "done"
printf '%s\n' "  sounds   $OUT/shipped.wav (shipped), $OUT/demo.wav (trained here)" "  picture  $OUT/demo.png" "  scores   $OUT/scores/table.md" "  report   $OUT/scores/report.html"
