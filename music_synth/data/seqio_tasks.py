"""Registers the tasks on import: for seqio's tools only, which find tasks by importing a module.

    python -m seqio.scripts.cache_tasks_main --module_import=music_synth.data.seqio_tasks --tasks=synthetic \\
        --tfds_data_dir=data --output_cache_dir=CACHE --pipeline_options=--runner=DirectRunner

What is cached does not depend on the tokenizer, so the default one does. The data set must have been built.
"""

from music_synth.data.tasks import register_tasks

register_tasks()
