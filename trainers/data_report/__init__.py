"""What `phalanx data` shows: the rows of a config as the model sees them, and facts about them."""
