"""seqio's offline cache: everything up to the random window is computed once, by Apache Beam."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from music_synth.data.data_dir import default_data_dir
from music_synth.data.quiet_tensorflow import seqio, silent_stderr
from music_synth.data.tasks import look_first_in
from music_synth.errors import UserError

with silent_stderr():
    import apache_beam as beam
    from seqio.scripts import cache_tasks_main

TASKS_MODULE = "music_synth.data.seqio_tasks"  # for Beam workers in processes or machines of their own


def write_cache(
    tasks: Sequence[str],
    cache_dir: Path,
    data_dir: Path | None = None,
    beam_options: Sequence[str] = (),
    min_files: int = 64,
) -> list[str]:
    """Runs seqio's cache tool on registered tasks; those that `cache_dir` holds already are left as they are.

    Args:
      data_dir: of the data sets, for Beam workers that do not share this process's registry.
      min_files: into which a split is divided at least; a process of a training run reads files of its own.
      beam_options: as the tool's --pipeline_options, for example "--runner=FlinkRunner".

    Returns:
      The tasks that were cached now.

    Raises:
      UserError: the pipeline failed.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # the tool reads its defaults from there
    flags.FLAGS.min_shards = min_files
    flags.FLAGS.tfds_data_dir = str(data_dir or default_data_dir())
    look_first_in(cache_dir)
    held = lambda name: Path(seqio.TaskRegistry.get(name).cache_dir or "/").is_relative_to(cache_dir)
    missing = [name for name in tasks if not held(name)]
    if not missing:
        return []
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    options = beam.options.pipeline_options.PipelineOptions(["--runner=DirectRunner", *beam_options])
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with beam.Pipeline(options=options) as pipeline:
            cache_tasks_main.run_pipeline(
                pipeline, missing, str(cache_dir), ignore_other_caches=True, modules_to_import=[TASKS_MODULE]
            )
    except Exception as error:  # Beam wraps whatever goes wrong in a worker
        raise UserError(f"Apache Beam could not write the cache in {cache_dir}: {error}") from error
    finally:
        seqio.set_tfds_data_dir_override(None)  # which a worker in this process has set
    return missing
