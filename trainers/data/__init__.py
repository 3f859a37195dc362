"""Turn the rows of a file into micro-batches: files, columns, templates, encoders, packing, sampling."""
