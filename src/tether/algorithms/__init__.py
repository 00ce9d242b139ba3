"""The algorithms, one file each: ``Config``, ``State`` and ``step``. None of them knows a file, a rank or a logger."""
