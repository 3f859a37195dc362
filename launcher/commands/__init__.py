"""One module for each command of `phalanx`."""
