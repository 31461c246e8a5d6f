"""seqio's offline cache: everything up to the random window is computed once, by Apache Beam."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from music_synth.data.data_dir import default_data_dir
from music_synth.data.quiet_tensorflow import seqio, silent_stderr
from music_synth.data.tasks import look_first_in
from music_synth.errors import UserError
from music_synth.files import whole_folder

with silent_stderr():
    import apache_beam as beam
    from seqio.scripts import cache_tasks_main

TASKS_MODULE = "music_synth.data.seqio_tasks"  # for Beam workers in processes or machines of their own
MIN_FILES = 64  # into which a split is divided at least; training reads a group of them at a time


def write_cache(task: str, cache_dir: Path, data_dir: Path | None = None, beam_options: Sequence[str] = ()) -> None:
    """Runs seqio's cache tool on a registered task, unless `cache_dir` holds it already. It is there when it is whole.

    Args:
      data_dir: of the data sets, for Beam workers that do not share this process's registry.
      beam_options: as the tool's --pipeline_options, for example "--runner=FlinkRunner".

    Raises:
      UserError: the pipeline failed. Nothing is left of what it wrote.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # the tool reads its defaults from there
    flags.FLAGS["min_shards"].value = MIN_FILES
    flags.FLAGS["tfds_data_dir"].value = str(data_dir or default_data_dir())
    look_first_in(cache_dir)
    if Path(seqio.TaskRegistry.get(task).cache_dir or "/").is_relative_to(cache_dir):
        return
    target = cache_dir / seqio.get_task_dir_from_name(task)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    options = beam.options.pipeline_options.PipelineOptions(["--runner=DirectRunner", *beam_options])
    try:
        if target.is_dir():  # seqio does not take it for whole, so it was broken off
            shutil.rmtree(target)
        with whole_folder(target) as part:
            with beam.Pipeline(options=options) as pipeline:
                cache_tasks_main.run_pipeline(
                    pipeline, [task], str(part), ignore_other_caches=True, modules_to_import=[TASKS_MODULE]
                )
            made = part / target.name
            for path in list(made.iterdir()):
                path.rename(part / path.name)
            made.rmdir()
    except Exception as error:  # Beam wraps whatever goes wrong in a worker
        raise UserError(f"Apache Beam could not write the cache in {cache_dir}: {error}") from error
    finally:
        seqio.set_tfds_data_dir_override(None)  # which a worker in this process has set
