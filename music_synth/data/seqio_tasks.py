"""Registers the tasks on import: for seqio's tools only, which find tasks by importing a module.

    python -m seqio.scripts.cache_tasks_main --module_import=music_synth.data.seqio_tasks --tasks=synthetic \\
        --tfds_data_dir=data --output_cache_dir=CACHE --pipeline_options=--runner=DirectRunner

What is cached does not depend on the tokenizer, so the default one does. The data set must have been built.
"""

from music_synth.data.quiet_tensorflow import seqio
from music_synth.data.tasks import DATA_SETS, register_tasks

# A worker in the process that registered the tasks keeps them, with the data_dir they were given there.
register_tasks(names=[name for name in DATA_SETS if name not in seqio.TaskRegistry.names()])
