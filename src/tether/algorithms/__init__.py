"""The algorithms, one module each: ``Config``, ``State`` and ``step``, independent of files, processes and loggers."""
