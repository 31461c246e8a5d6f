# Plays MIDI files:
#
#   docker build --tag music_synth .
#   docker run --rm --volume "$PWD/played:/out" music_synth
#   docker run --rm --volume "$PWD/pieces:/in" --volume "$PWD/played:/out" music_synth /in/mine.mid --out /out/mine.wav
#
# The first stage trains the decoder that the image plays with, about 10 minutes on two cores for the default STEPS; the
# second holds what playing needs and no TensorFlow. --build-arg STEPS=1500 trains as long as the recipe does.

FROM python:3.13-slim-bookworm AS trained
WORKDIR /src
COPY . .
RUN scripts/setup.sh
ARG STEPS=300
RUN .venv/bin/python -m music_synth.train --gin_file=diffusion.gin --gin.TASK=synthetic --gin.TRAIN_STEPS="$STEPS" \
    && .venv/bin/python -m music_synth.convert runs/diffusion /model --dtype float16 \
    && .venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir /wheel .

FROM python:3.13-slim-bookworm
COPY --from=trained /wheel /wheel
RUN pip install --quiet --no-cache-dir /wheel/*.whl && rm -r /wheel
COPY --from=trained /model /model
COPY data/*.mid /pieces/
VOLUME /out
ENTRYPOINT ["python", "-m", "music_synth.synthesize", "--checkpoint", "/model"]
CMD ["/pieces/string_quartet.mid", "--out", "/out/string_quartet.wav"]
