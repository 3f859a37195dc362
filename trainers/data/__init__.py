"""From the rows of a file to micro-batches: files, columns, templates, encoders, packing, sampling."""
