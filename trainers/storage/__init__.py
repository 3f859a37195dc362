"""The files of a run: run folder, manifests, data cache. Does not import torch: the launcher uses it too."""
