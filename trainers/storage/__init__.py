"""What a run keeps on disk, and how it is verified. Light: the launcher reads it too."""
